"""Fisher information of compressed maps against the number of simulations, by loss: `experiments.information`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points
from paper_figures.compressors import FREE

TITLES = {
    "mse": "MSE",
    "mae": "MAE",
    "gnll": "Gaussian NLL",
    "vmim": "VMIM with scores",
    "vmim_without_scores": "VMIM without",
    "score": "score regression",
    "score_at_centre": "the same, at the centre",
    "imnn": "IMNN",
}


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "information" / "information.json")
    points = mean_points(found["rows"], TITLES, value="nats", by="compressor")
    free = [row["nats"] for row in found["rows"] if row["compressor"] in FREE]  # as good as the same
    levels = {"the maps themselves": found["full"]["nats"]}
    levels |= {"scores of each map, no training": max(free)} if free else {}
    return plotting.curves(points, "simulations", "Fisher information (nats)", levels, log_y=False, width=5.6)


if __name__ == "__main__":
    command_line(draw, "information")
