"""C2ST against the full field, by number of simulations and kind of score. From `experiments.scores_lensing`."""

from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line

TITLES = {"none": "no score", "white_1": "white", "whitened_1": "whitened"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    rows = read_json(runs / "scores_lensing" / "distances.json")["rows"]
    figures = {}
    for estimator in dict.fromkeys(row["estimator"] for row in rows):
        chosen = [row for row in rows if row["estimator"] == estimator]
        points = []
        for score, n in dict.fromkeys((row["score"], row["n"]) for row in chosen):
            values = [row["c2st"] for row in chosen if (row["score"], row["n"]) == (score, n)]
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
            title = TITLES.get(score) or "whitened, mean of " + score.split("_")[1]
            points.append((title, n, float(np.mean(values)), float(error)))
        figures[f"scores_lensing_{estimator.lower()}"] = plotting.curves(
            points, f"simulations ({estimator})", "C2ST against the full field", {}, log_y=False
        )
    return figures


if __name__ == "__main__":
    command_line(draw, "scores_lensing")
