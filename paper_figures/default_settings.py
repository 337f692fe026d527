"""Divergence from the exact answer by simulations, with default settings: `experiments.default_settings`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

SIMULATORS = {"linear_gaussian": "linear", "scatter": "mean and scatter"}
SCORES = {"none": "no score", "scores": "scores"}
LABELS = {"NPE": "divergence of the posterior (nats)", "NLE": "divergence of the likelihood (nats)"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    rows = read_json(runs / "default_settings" / "divergences.json")
    titles = {f"{s}_{k}": f"{name}, {how}" for s, name in SIMULATORS.items() for k, how in SCORES.items()}
    figures = {}
    for estimator, ylabel in LABELS.items():
        chosen = [r | {"case": f"{r['simulator']}_{r['score']}"} for r in rows if r["estimator"] == estimator]
        points = mean_points(chosen, titles, value="nats", by="case")
        figures[f"default_settings_{estimator.lower()}"] = plotting.curves(points, "simulations", ylabel, {})
    return figures


if __name__ == "__main__":
    command_line(draw, "default_settings")
