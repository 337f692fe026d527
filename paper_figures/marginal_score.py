"""What the score of a map loses, by the gradients that it takes: `experiments.marginal_score`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line

TITLES = {"ascent": "steps of ascent", "chain": "mean over a chain"}


def draw(runs: Path) -> plotting.Figure:
    found = read_json(runs / "marginal_score" / "lost.json")
    rows = [row for row in found["rows"] if row["terms"] == "linear"]
    points = [(TITLES[row["kind"]], row["gradients"], row["volume"], row["volume_error"]) for row in rows]
    title = f"gradients a map ({found['n_pix']}² × 5)"
    return plotting.curves(points, title, "lost: log volume over the full field's", {}, log_y=False)


if __name__ == "__main__":
    command_line(draw, "marginal_score")
