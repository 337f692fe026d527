"""C2ST against the exact Lotka-Volterra posterior, by proposal and score. From `experiments.scores_lotka_volterra`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import read_json
from paper_figures import command_line, mean_points

TITLES = {"none": "no score", "white": "score, white latents", "laplace": "score, Laplace coordinates"}
PUBLISHED = {"none": "no score, published", "score": "score, published"}
NAMES = {"wide": "prior", "narrow": "narrow proposal"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    found = read_json(runs / "scores_lotka_volterra" / "distances.json")
    rows, figures = found["rows"], {}
    published = [
        (PUBLISHED[kind], float(n), c2st, 0.0) for kind, row in found["published"].items() for n, c2st in row.items()
    ]
    for proposal in dict.fromkeys(row["proposal"] for row in rows):
        chosen = [row for row in rows if row["proposal"] == proposal]
        figures[f"scores_lotka_volterra_{proposal}"] = plotting.curves(
            mean_points(chosen, TITLES) + (published if proposal == "wide" else []),
            f"simulations ({NAMES[proposal]})", "C2ST against the exact posterior", {}, log_y=False,
        )  # fmt: skip
    return figures


if __name__ == "__main__":
    command_line(draw, "scores_lotka_volterra")
