"""How noisy scores are, by latent coordinate and gradients that they take. From `experiments.score_noise`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line


def draw(runs: Path) -> plotting.Figure:
    rows = read_json(runs / "score_noise" / "noise.json")["rows"]
    points = [(f"{row['latents']}, {row['n_pix']}²", row["gradients"], row["ratio"], row["error"]) for row in rows]
    return plotting.curves(points, "gradients per simulation", "noise / information of the score", {"target": 0.5})


if __name__ == "__main__":
    command_line(draw, "score_noise")
