"""Convergence of the five redshift bins, without and with shape noise. From `experiments.maps`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz
from diffsbi.runs import open_run
from paper_figures import command_line


def draw(runs: Path) -> plotting.Figure:
    run = open_run(runs / "maps")
    maps = load_npz(run.path("maps", "maps.npz"))["maps"]
    return plotting.maps(maps, run.config["side_deg"], rows=("noiseless", "with noise"))


if __name__ == "__main__":
    command_line(draw, "maps_five_bins")
