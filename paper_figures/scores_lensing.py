"""C2ST against the full field, by number of simulations and kind of score. From `experiments.scores_lensing`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

TITLES = {"none": "no score", "white_1": "white", "whitened_1": "whitened", "whitened_4": "whitened, mean of 4"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    found = read_json(runs / "scores_lensing" / "distances.json")
    figures = {}
    for estimator in dict.fromkeys(row["estimator"] for row in found["rows"]):
        chosen = [row for row in found["rows"] if row["estimator"] == estimator]
        x, limit = f"simulations ({estimator})", {"what the summaries hold": found["limit"]}
        full, own = (mean_points(chosen, TITLES, value) for value in ("c2st", "c2st_summaries"))
        name = f"scores_lensing_{estimator.lower()}"
        figures[name] = plotting.curves(full, x, "C2ST against the full field", limit, log_y=False)
        figures[f"{name}_summaries"] = plotting.curves(own, x, "C2ST against the summaries' posterior", {}, log_y=False)
    return figures


if __name__ == "__main__":
    command_line(draw, "scores_lensing")
