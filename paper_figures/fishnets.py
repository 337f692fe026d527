"""Fishnets on sets and graphs larger than those they were trained on. From `experiments.fishnets`."""

from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line

SETS = {
    "fishnet": "Fishnet",
    "published": "Fishnet, published form",
    "sum": "deep set, sum",
    "mean": "deep set, mean",
    "max": "deep set, max",
}
GRAPHS = {"fisher": "Fisher weights", "sum": "sum", "mean": "mean", "max": "max", "attention": "attention"}
NOISE = {"training": "noise as in training", "other": "other noise"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    found = read_json(runs / "fishnets" / "results.json")
    figures = {}
    for noise in NOISE:
        rows = [row for row in found["regression"] if row["noise"] == noise]
        x = f"members of a set ({NOISE[noise]})"
        for name, ylabel, levels in (
            ("ratio", r"claimed information / exact, $(\det\hat F/\det F)^{1/2}$", {"exact": 1.0}),
            ("score", "relative error of the score", {"2 %": 0.02, "5 %": 0.05}),
        ):
            figures[f"fishnets_{name}_{noise}"] = plotting.curves(_points(rows, SETS, "n", name), x, ylabel, levels)
    rows, x = found["graphs"], "halos of a graph"
    linear = {"log_x": False, "log_y": False}
    points = _points(rows, GRAPHS, "halos", "loss")
    figures["fishnets_graphs"] = plotting.curves(points, x, "loss above the exact posterior, nats", {}, **linear)
    points = _points(rows, GRAPHS, "halos", "error")
    label = "error of the estimate / exact posterior's"
    figures["fishnets_graphs_error"] = plotting.curves(points, x, label, {}, **linear)
    titles = {"megabytes": "all patches at once", "chunked_megabytes": "16 patches at a time"}
    points = [(titles[t], row["n_pix"] ** 2 / 1000, row[t], 0.0) for t in titles for row in found["cost"]]
    figures["fishnets_memory"] = plotting.curves(
        points, "thousands of pixels of a map", "working memory of a gradient, MiB", {}, **linear
    )
    return figures


def _points(rows: list[dict], titles: dict[str, str], x: str, value: str) -> list[tuple[str, float, float, float]]:
    """(title, x, mean over seeds, its standard error), in the order of the titles; medians of ratios."""
    points = []
    for case, title in titles.items():
        for n in sorted({row[x] for row in rows}):
            values = [row[value] for row in rows if (row["case"], row[x]) == (case, n)]
            if not values:
                continue
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
            mean = np.mean(values)
            if value == "ratio":  # of deep sets' sums it can be anything from 0 to 10
                mean, error = np.median(values), 0.0
            points.append((title, float(n), float(mean), float(error)))
    return points


if __name__ == "__main__":
    command_line(draw, "fishnets")
