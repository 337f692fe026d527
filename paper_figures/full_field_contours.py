"""Full-field, Gaussian-field and power-spectrum posteriors of one LSST-Y10 map. From `experiments.full_field`."""

from pathlib import Path

from diffsbi import plotting
from paper_figures import command_line, posterior_contours

TITLES = {"full_field": "Full field", "gaussian_field": "Gaussian field", "power_spectrum": "Power spectrum"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    """One figure for each case that was run."""
    cases = sorted(path.parent for path in (runs / "full_field").glob("*/comparison.json"))
    if not cases:
        raise FileNotFoundError(f"Expected runs of experiments.full_field in {runs / 'full_field'}; there are none.")
    return {f"full_field_contours_{case.name}": posterior_contours(case, TITLES) for case in cases}


if __name__ == "__main__":
    command_line(draw, "full_field_contours")
