"""One file per figure: load run folders, plot, never compute; run as `-m paper_figures.NAME`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from diffsbi import plotting

__all__ = ["command_line"]


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
