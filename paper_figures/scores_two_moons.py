"""C2ST of density fits to the two moons, with and without scores; what they learn: `experiments.scores_two_moons`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, mean_points

TITLES = {"none": "no score", "exact": "exact score"}

LEARNED = {"truth": "exact", "none": "fit without scores", "exact": "fit with scores"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "scores_two_moons"
    found = read_json(folder / "distances.json")
    points = mean_points(found["rows"], TITLES)
    for score, curve in found["published"].items():
        points += [(f"{TITLES[score]}, published", float(n), value, 0.0) for n, value in curve.items()]
    fits = {title: load_npz(folder / "learned" / f"{name}.npz") for name, title in LEARNED.items()}
    grid, line = fits["exact"]["grid"], fits["exact"]["line"]
    extent = (grid[0, 0, 0], grid[0, -1, 0], grid[0, 0, 1], grid[-1, 0, 1])
    density, score = ({title: fit[part] for title, fit in fits.items()} for part in ("log_density", "score"))
    return {
        "scores_two_moons": plotting.curves(points, "draws", "C2ST", {}, log_y=False),
        "scores_two_moons_learned": plotting.two_moons(extent, density, score, {"x": line[:, 0], "y": line[0, 1]}),
    }


if __name__ == "__main__":
    command_line(draw, "scores_two_moons")
