"""Observed map, reconstructed convergence and its uncertainty. From `experiments.full_field`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz
from diffsbi.runs import open_run
from paper_figures import command_line


def draw(runs: Path) -> plotting.Figure:
    run = open_run(runs / "full_field" / "simulated")
    x = load_npz(run.path("observation", "observation.npz"))["x"]
    chains = load_npz(run.path("full_field", "chains.npz"))
    return plotting.reconstruction(x, chains["tracked_mean"], chains["tracked_sd"], run.config["survey"]["side_deg"])


if __name__ == "__main__":
    command_line(draw, "reconstructed_maps")
