"""The two-moons density, a smooth and a spline flow fitted to it, and their scores. From `experiments.two_moons`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz
from diffsbi.runs import open_run
from paper_figures import command_line

TITLES = {"exact": "exact", "smooth": "smooth flow", "spline": "spline flow"}


def draw(runs: Path) -> plotting.Figure:
    run = open_run(runs / "two_moons")
    fits = {title: load_npz(run.path(stage, "density.npz")) for stage, title in TITLES.items()}
    grid, line = fits["exact"]["grid"], fits["exact"]["line"]
    extent = (grid[0, 0, 0], grid[0, -1, 0], grid[0, 0, 1], grid[-1, 0, 1])
    densities = {title: fit["log_density"] for title, fit in fits.items()}
    scores = {title: fit["score"] for title, fit in fits.items()}
    return plotting.two_moons(extent, densities, scores, {"x": line[:, 0], "y": run.config["cut"]})


if __name__ == "__main__":
    command_line(draw, "two_moons_smooth_vs_spline")
