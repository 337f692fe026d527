"""C2ST against the full field after each round, by score; coverage; contours: `experiments.scores_rounds`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, coverage, mean_points, score_colors
from paper_figures.scores_lensing import TITLES, by_estimator


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "scores_rounds"
    found = read_json(folder / "distances.json")
    kinds, figures = list(dict.fromkeys(row["score"] for row in found["rows"])), {}
    colors = score_colors(kinds, TITLES)
    for estimator in dict.fromkeys(row["estimator"] for row in found["rows"]):
        chosen = [row for row in found["rows"] if row["estimator"] == estimator]
        points = mean_points(chosen, TITLES)
        label = f"simulations of all rounds ({estimator})"
        figures[f"scores_rounds_{estimator.lower()}"] = plotting.curves(
            points, label, "C2ST against the full field", {}, log_y=False, colors=colors
        )
    figures["scores_rounds_coverage"] = coverage(by_estimator(found["coverage"]), colors)
    figures["scores_rounds_contours"] = _contours(found, kinds, folder)
    return figures


def _contours(found: dict, kinds: list[str], folder: Path) -> plotting.Figure:
    """The full field, and the first seed's last round without scores and with the last kind."""
    n, name = max(row["n"] for row in found["rows"]), found["rows"][0]["estimator"]
    samples, titles = {"full_field": load_npz(folder / "full_field.npz")["theta"]}, {"full_field": "full field (HMC)"}
    for kind in (kinds[0], kinds[-1]):
        samples[kind] = load_npz(folder / "fits" / f"{name}_{kind}_0.draws.npz")["theta"][-1]
        titles[kind] = f"{name}, {n} simulations, {TITLES.get(kind, kind)}"
    return compared(found, samples, titles, score_colors(kinds))


if __name__ == "__main__":
    command_line(draw, "scores_rounds")
