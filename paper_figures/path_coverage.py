"""Coverage of path sampling over maps from the prior: `experiments.path_coverage`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, coverage


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "path_coverage" / "coverage.json")
    return coverage({"": {f"{case['n']} points, {case['gradients']:.0f} gradients": case for case in found["cases"]}})


if __name__ == "__main__":
    command_line(draw, "path_coverage")
