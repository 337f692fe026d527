"""C2ST against the full field by number of simulations and score; contours; coverage: `experiments.scores_lensing`."""

from pathlib import Path

from diffsbi import plotting
from diffsbi._files import load_npz, read_json
from paper_figures import command_line, compared, coverage, mean_points

TITLES = {"none": "no score", "white_1": "white", "whitened_1": "whitened"}
TITLES |= {f"whitened_{k}": f"whitened, mean of {k}" for k in range(2, 33)}


def draw(runs: Path) -> dict[str, plotting.Figure]:
    folder = runs / "scores_lensing"
    found = read_json(folder / "distances.json")
    figures = {"scores_lensing_contours": _contours(found, folder)}
    for estimator in dict.fromkeys(row["estimator"] for row in found["rows"]):
        chosen = [row for row in found["rows"] if row["estimator"] == estimator]
        x, limit = f"simulations ({estimator})", {"what the summaries hold": found["limit"]}
        full, own = (mean_points(chosen, TITLES, value) for value in ("c2st", "c2st_summaries"))
        name = f"scores_lensing_{estimator.lower()}"
        figures[name] = plotting.curves(full, x, "C2ST against the full field", limit, log_y=False)
        figures[f"{name}_summaries"] = plotting.curves(own, x, "C2ST against the summaries' posterior", {}, log_y=False)
    for n in dict.fromkeys(case["n"] for case in found["coverage"]):
        cases = [case for case in found["coverage"] if case["n"] == n]
        figures[f"scores_lensing_coverage_{n}"] = coverage(by_title(cases))
    return figures


def by_title(cases: list[dict]) -> dict[str, dict]:
    """Calibrated fits by their estimator and score."""
    return {f"{case['estimator']}, {TITLES.get(case['score'], case['score'])}": case for case in cases}


def _contours(found: dict, folder: Path) -> plotting.Figure:
    """The full field, and each estimator on the first seed's simulations, the most with the last kind of score."""
    *_, kind = dict.fromkeys(row["score"] for row in found["rows"])
    n = max(row["n"] for row in found["rows"] if row["score"] == kind)
    samples, titles = {"full_field": load_npz(folder / "full_field.npz")["theta"]}, {"full_field": "full field (HMC)"}
    for name in dict.fromkeys(row["estimator"] for row in found["rows"]):
        samples[name] = load_npz(folder / "fits" / f"{name}_{kind}_{n}_0.draws.npz")["theta"]
        titles[name] = f"{name}, {n} simulations"
    return compared(found, samples, titles)


if __name__ == "__main__":
    command_line(draw, "scores_lensing")
