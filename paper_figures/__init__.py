"""One file per figure: load run folders, plot, never compute; run as `-m paper_figures.NAME`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from diffsbi import plotting

__all__ = ["command_line"]


def command_line(draw: Callable[[Path], plotting.Figure], name: str) -> None:
    """Parse `--runs` (the folder that holds the run folders) and `--out`; save the figure as PNG and PDF."""
    parser = argparse.ArgumentParser(prog=f"paper_figures.{name}")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=None, help="folder of the figures; <runs>/figures where left out")
    arguments = parser.parse_args()
    figure = draw(arguments.runs)
    for suffix in ("png", "pdf"):
        print(plotting.save(figure, (arguments.out or arguments.runs / "figures") / f"{name}.{suffix}"))
