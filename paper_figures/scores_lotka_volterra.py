"""C2ST against the exact Lotka-Volterra posterior, by proposal and score; contours of the fewest and most simulations.

From `experiments.scores_lotka_volterra`.
"""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, mean_points, score_colors

TITLES = {"none": "no score", "white": "score, white latents", "laplace": "score, Laplace coordinates"}
PUBLISHED = {"none": "no score, published", "score": "score, published"}
NAMES = {"wide": "prior", "narrow": "narrow proposal"}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "scores_lotka_volterra"
    found = read_json(folder / "distances.json")
    rows, figures, colors = found["rows"], {}, score_colors(TITLES, TITLES)
    published = [
        (PUBLISHED[kind], float(n), c2st, 0.0) for kind, row in found["published"].items() for n, c2st in row.items()
    ]
    for proposal in dict.fromkeys(row["proposal"] for row in rows):
        chosen = [row for row in rows if row["proposal"] == proposal]
        figures[f"scores_lotka_volterra_{proposal}"] = plotting.curves(
            mean_points(chosen, TITLES) + (published if proposal == "wide" else []),
            f"simulations ({NAMES[proposal]})", "C2ST against the exact posterior", {}, log_y=False, colors=colors,
        )  # fmt: skip
        numbers = [row["n"] for row in chosen]
        for n in sorted({min(numbers), max(numbers)}):
            figures[f"scores_lotka_volterra_{proposal}_contours_{n}"] = _contours(found, folder, proposal, chosen, n)
    return figures


def _contours(found: dict, folder: Path, proposal: str, rows: list[dict], n: int) -> plotting.Figure:
    """The exact posterior, and the first seed's fits to n simulations without scores and with the last kind of them."""
    *_, kind = dict.fromkeys(row["score"] for row in rows)
    samples, titles = {"full_field": load_npz(folder / "exact.npz")["theta"]}, {"full_field": "exact (NUTS)"}
    for score in dict.fromkeys(("none", kind)):
        samples[score] = load_npz(folder / "fits" / f"{proposal}_{score}_{n}_0.draws.npz")["theta"]
        titles[score] = f"{n} simulations, {TITLES[score]}"
    return compared(found, samples, titles, score_colors([*samples][1:]))


if __name__ == "__main__":
    command_line(draw, "scores_lotka_volterra")
