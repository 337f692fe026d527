"""One file per figure: load run folders, plot, never compute; run as `-m paper_figures.NAME`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from diffsbi.runs import open_run

__all__ = ["command_line", "compared", "coverage", "mean_points", "posterior_contours", "score_colors"]


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


def score_colors(kinds, titles: Mapping[str, str] | None = None) -> dict[str, str]:
    """A kind of score (or its title) → its colour, the same in all figures: without, white, and of little noise."""
    known = {"none": 0, "white": 1, "white_1": 1}
    quiet = iter((2, 3, 4, 5) * len(kinds))
    places = {kind: known[kind] if kind in known else next(quiet) for kind in kinds}
    return {(titles or {}).get(kind, kind): plotting.CYCLE[place] for kind, place in places.items()}


def mean_points(
    rows: list[dict], titles: Mapping, value: str = "c2st", by: str = "score", against: str = "n"
) -> list[tuple[str, float, float, float]]:
    """(title, mean of `against`, mean, its standard error over seeds) of every `by` among `titles` and every n."""
    points = []
    found = {(row[by], row["n"]) for row in rows if row[by] in titles}
    for kind, n in sorted(found, key=lambda pair: (list(titles).index(pair[0]), pair[1])):
        chosen = [row for row in rows if (row[by], row["n"]) == (kind, n)]
        values = [row[value] for row in chosen]
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        x = np.mean([row[against] for row in chosen])
        points.append((titles[kind], float(x), float(np.mean(values)), float(error)))
    return points


def coverage(cases: Mapping[str, Mapping[str, Mapping]], colors=None) -> plotting.Figure:
    """Coverage less the credibility level with its binomial errors, of TARP's `levels` and `shares`: panel → title.

    Curves of one panel were tested on the same observations: their errors are not independent.
    """
    panels = {}
    for panel, by_title in cases.items():
        panels[panel] = []
        for title, case in by_title.items():
            level, share = np.array(case["levels"]), np.array(case["shares"])
            error = np.sqrt(level * (1 - level) / case["observations"])
            panels[panel] += [(title, *point) for point in np.stack([level, share - level, error], -1).tolist()]
    labels = ("credibility level (TARP)", "coverage − level", {"calibrated": 0.0})
    return plotting.curves(panels, *labels, log_y=False, log_x=False, colors=colors)


def compared(found: Mapping, samples: Mapping, titles: Mapping[str, str], colors=None) -> plotting.Figure:
    """Contours of an experiment's posteriors; `found` has its names, truth and bounds."""
    options = dict(truth=dict(zip(found["names"], found["truth"], strict=True)), bounds=found["bounds"])
    return plotting.contours(samples, found["names"], titles=titles, colors=colors, **options)
