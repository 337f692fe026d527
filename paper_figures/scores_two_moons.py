"""C2ST of density fits to the two moons, with and without scores. From `experiments.scores_two_moons`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

TITLES = {"none": "no score", "exact": "exact score"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    found = read_json(runs / "scores_two_moons" / "distances.json")
    points = mean_points(found["rows"], TITLES)
    for score, curve in found["published"].items():
        points += [(f"{TITLES[score]}, published", float(n), value, 0.0) for n, value in curve.items()]
    return {"scores_two_moons": plotting.curves(points, "draws", "C2ST", {}, log_y=False)}


if __name__ == "__main__":
    command_line(draw, "scores_two_moons")
