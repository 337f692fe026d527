"""What the score of a map loses, by the gradients that it takes: `experiments.marginal_score`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line

TITLES = {"ascent": "steps of ascent", "chain": "mean over a chain"}


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "marginal_score" / "lost.json")
    points = [
        (f"{TITLES[row['kind']]}, {row['terms']}", row["gradients"], row["volume"], row["volume_error"])
        for row in found["rows"]
    ]
    title = f"gradients a map ({found['n_pix']}² × 5)"
    return plotting.curves(points, title, "log volume over the full field's", {"nothing lost": 0.0}, log_y=False)


if __name__ == "__main__":
    command_line(draw, "marginal_score")
