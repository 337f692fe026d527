"""Full-field, Gaussian-field and power-spectrum posteriors of one LSST-Y10 map. From `experiments.full_field`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from diffsbi.runs import open_run
from paper_figures import command_line

TITLES = {"full_field": "Full field", "gaussian_field": "Gaussian field", "power_spectrum": "Power spectrum"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    """One figure for each case that was run."""
    cases = sorted(path.parent for path in (runs / "full_field").glob("*/comparison.json"))
    if not cases:
        raise FileNotFoundError(f"Expected runs of experiments.full_field in {runs / 'full_field'}; there are none.")
    return {f"full_field_contours_{case.name}": _contours(case) for case in cases}


def _contours(case: Path) -> plotting.Figure:
    run = open_run(case)
    comparison = read_json(case / "comparison.json")
    samples = {m: load_npz(run.path(m, "samples.npz"))["theta"] for m in TITLES if m in comparison["methods"]}
    flat = {m: theta.reshape(-1, theta.shape[-1]) for m, theta in samples.items()}
    truth, bounds = run.account("observation")["truth"], comparison["bounds"]
    return plotting.contours(flat, comparison["names"], truth=truth, titles=TITLES, bounds=bounds)


if __name__ == "__main__":
    command_line(draw, "full_field_contours")
