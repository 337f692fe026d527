"""Full-field, power-spectrum and neural posteriors of the demo. From `experiments.demo` (or `make demo`)."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from diffsbi.runs import open_run
from paper_figures import command_line

TITLES = {"full_field": "Full field", "power_spectrum": "Power spectrum", "npe": "NPE", "npe_score": "NPE with scores"}


def draw(runs: Path) -> plotting.Figure:
    run = open_run(runs / "demo")
    comparison = read_json(run.folder / "comparison.json")
    samples = {m: load_npz(run.path(m, "samples.npz"))["theta"] for m in TITLES if m in comparison["methods"]}
    flat = {m: theta.reshape(-1, theta.shape[-1]) for m, theta in samples.items()}
    truth, bounds = run.account("observation")["truth"], comparison["bounds"]
    return plotting.contours(flat, comparison["names"], truth=truth, titles=TITLES, bounds=bounds)


if __name__ == "__main__":
    command_line(draw, "demo_contours")
