"""One file per figure: load run folders, plot, never compute; run as `-m paper_figures.NAME`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from diffsbi.runs import open_run

__all__ = ["command_line", "mean_points"]


def posterior_contours(folder: Path, titles: Mapping[str, str]) -> plotting.Figure:
    """Contours of those posteriors of a run that are there, the first one filled, with the truth where it is known."""
    run = open_run(folder)
    comparison = read_json(folder / "comparison.json")
    samples = {m: load_npz(run.path(m, "samples.npz"))["theta"] for m in titles if m in comparison["methods"]}
    flat = {m: theta.reshape(-1, theta.shape[-1]) for m, theta in samples.items()}
    truth, bounds = run.account("observation")["truth"], comparison["bounds"]
    return plotting.contours(flat, comparison["names"], truth=truth, titles=titles, bounds=bounds)


Figures = plotting.Figure | dict[str, plotting.Figure] | None


def command_line(draw: Callable[[Path], Figures], name: str) -> None:
    """Parse `--runs` (the folder that holds the run folders) and `--out`; save the figure(s) as PNG and PDF."""
    parser = argparse.ArgumentParser(prog=f"paper_figures.{name}")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=None, help="folder of the figures; <runs>/figures where left out")
    arguments = parser.parse_args()
    figures = draw(arguments.runs)
    if figures is None:
        return
    for title, figure in (figures if isinstance(figures, dict) else {name: figures}).items():
        for suffix in ("png", "pdf"):
            print(plotting.save(figure, (arguments.out or arguments.runs / "figures") / f"{title}.{suffix}"))


def mean_points(rows: list[dict], titles: dict[str, str], value: str = "c2st") -> list[tuple[str, float, float, float]]:
    """(title, n, mean, its standard error over seeds) of every score among `titles` and every n."""
    points = []
    found = {(row["score"], row["n"]) for row in rows}
    for score, n in sorted(
        (pair for pair in found if pair[0] in titles), key=lambda p: (list(titles).index(p[0]), p[1])
    ):
        values = [row[value] for row in rows if (row["score"], row["n"]) == (score, n)]
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        points.append((titles[score], n, float(np.mean(values)), float(error)))
    return points
