"""Fisher information of compressed maps against the number of simulations, by loss: `experiments.information`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

TITLES = {
    "mse": "MSE",
    "mae": "MAE",
    "gnll": "Gaussian NLL",
    "vmim": "VMIM, scores",
    "score": "score regression",
    "score_at_centre": "the same, at the centre",
    "imnn": "IMNN",
}
FREE = {
    "latent_scores": "latent scores",
    "score_change": "latent scores and change",
    "marginal_score": "marginal score",
}


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "information" / "information.json")
    points = mean_points(found["rows"], TITLES, value="nats", by="compressor")
    levels = {FREE[row["compressor"]]: row["nats"] for row in found["rows"] if row["compressor"] in FREE}
    levels |= {"the maps themselves": found["full"]["nats"]}
    return plotting.curves(points, "simulations", "Fisher information (nats)", levels, log_y=False, width=5.4)


if __name__ == "__main__":
    command_line(draw, "information")
