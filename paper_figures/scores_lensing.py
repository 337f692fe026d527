"""C2ST against the full field by number of simulations and score; contours; coverage: `experiments.scores_lensing`."""

from pathlib import Path

import numpy as np

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, coverage, mean_points, score_colors

TITLES = {"none": "no score", "white_1": "white", "whitened_1": "whitened"}
TITLES |= {f"whitened_{k}": f"whitened, mean of {k}" for k in range(2, 33)}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "scores_lensing"
    found = read_json(folder / "distances.json")
    kinds = list(dict.fromkeys(row["score"] for row in found["rows"]))
    options = dict(log_y=False, colors=score_colors(kinds, TITLES))
    full, own = (
        {
            name: mean_points([row for row in found["rows"] if row["estimator"] == name], TITLES, value)
            for name in dict.fromkeys(row["estimator"] for row in found["rows"])
        }
        for value in ("c2st", "c2st_summaries")
    )
    alone = {"the frame alone": float(np.mean([row["c2st"] for row in found["frames"]]))} if found["frames"] else {}
    limits, title = {"the summaries' posterior": found["limit"]} | alone, "C2ST against the summaries' posterior"
    figures = {
        "scores_lensing_contours": _contours(found, kinds, folder),
        "scores_lensing": plotting.curves(full, "simulations", "C2ST against the full field", limits, **options),
        "scores_lensing_summaries": plotting.curves(own, "simulations", title, {}, **options),
    }
    for n in dict.fromkeys(case["n"] for case in found["coverage"]):
        cases = [case for case in found["coverage"] if case["n"] == n]
        figures[f"scores_lensing_coverage_{n}"] = coverage(by_estimator(cases), options["colors"])
    return figures


def by_estimator(cases: list[dict]) -> dict[str, dict[str, dict]]:
    """Calibrated fits: estimator → title of the score."""
    names = dict.fromkeys(case["estimator"] for case in cases)
    return {name: {TITLES[case["score"]]: case for case in cases if case["estimator"] == name} for name in names}


def _contours(found: dict, kinds: list[str], folder: Path) -> plotting.Figure:
    """The full field, and fits to the first seed's simulations, the most with the last kind of score.

    Of all estimators with that score, or of a single one without and with it.
    """
    n = max(row["n"] for row in found["rows"] if row["score"] == kinds[-1])
    names = list(dict.fromkeys(row["estimator"] for row in found["rows"]))
    cases = [(name, kinds[-1]) for name in names] if len(names) > 1 else [(names[0], "none"), (names[0], kinds[-1])]
    samples, titles = {"full_field": load_npz(folder / "full_field.npz")["theta"]}, {"full_field": "full field (HMC)"}
    for name, kind in cases:
        of = kind if len(names) == 1 else name
        samples[of] = load_npz(folder / "fits" / f"{name}_{kind}_{n}_0.draws.npz")["theta"]
        titles[of] = f"{name}, {n} simulations, {TITLES[kind]}"
    return compared(found, samples, titles, score_colors([*samples][1:]))


if __name__ == "__main__":
    command_line(draw, "scores_lensing")
