"""Full-field, power-spectrum and neural posteriors of the demo. From `experiments.demo` (or `make demo`)."""

from pathlib import Path

from diffsbi import plotting
from paper_figures import command_line, posterior_contours

TITLES = {"full_field": "Full field", "power_spectrum": "Power spectrum", "npe": "NPE", "npe_score": "NPE with scores"}


def draw(runs: Path) -> plotting.Figure:
    return posterior_contours(runs / "demo", TITLES)


if __name__ == "__main__":
    command_line(draw, "demo_contours")
