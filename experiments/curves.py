"""Tables of C2ST against the number of simulations, and how many simulations one way of fitting saves over another."""

from typing import NamedTuple

import numpy as np


def print_table(rows: list[dict], of: tuple[str, ...], value: str = "c2st", digits: int = 3) -> None:
    """Mean and standard error over seeds: a line for each combination of the columns `of`, a column for each n."""
    sizes = sorted({row["n"] for row in rows})
    print(f"{'':36}" + "".join(f"{n:>15}" for n in sizes))
    for case in dict.fromkeys(tuple(row[c] for c in of) for row in rows):
        line = f"{' '.join(map(str, case)):36}"
        for n in sizes:
            values = [r[value] for r in rows if tuple(r[c] for c in of) == case and r["n"] == n]
            cell = f"{np.mean(values):.{digits}f} ± {standard_error(values):.{digits}f}" if values else ""
            line += f"{cell:>15}"
        print(line)


def standard_error(values) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


class Saved(NamedTuple):
    """`factor`, from `low` to `high` (68 % of resamplings); `bound` ">" or "<" where the factor is only that.

    `low` and `high` are bounds as well where they are the smallest or largest factor that the curve can show.
    """

    factor: float
    low: float
    high: float
    bound: str

    def __str__(self) -> str:
        return f"{self.bound}{self.factor:.2g} ({self.low:.2g} to {self.high:.2g})"


def simulations_saved(n, without, with_score, n_with=None, *, draws: int = 1000, seed: int = 0) -> list[Saved]:
    """For each n with scores, how many times as many simulations the fits without need to come as near.

    The mean curve without scores, made monotone, is interpolated in log n at the mean with scores. Nothing is known
    beyond its ends: from n the factor is at most max(n) / n and at least min(n) / n, and a bound there. The seeds are
    resampled, those of both curves together, as fits of one seed share their simulations.

    Args:
        n: Numbers of simulations, increasing, (k,).
        without: Distances without scores, (seeds, k).
        with_score: With scores, of the same seeds, (seeds, m).
        n_with: Numbers of simulations of its columns, (m,); None: those of `without`.
        draws: Resamplings.
        seed: Of them.
    """
    n, without, with_score = np.asarray(n, float), np.asarray(without, float), np.asarray(with_score, float)
    n_with = n if n_with is None else np.asarray(n_with, float)
    if without.shape != (len(without), len(n)) or with_score.shape != (len(without), len(n_with)):
        sizes = f"{len(n)} and {len(n_with)} sizes, as many"
        raise ValueError(f"Expected rows of {sizes}; got {without.shape} and {with_score.shape}.")

    def factors(rows):
        falling, wanted = np.minimum.accumulate(without[rows].mean(0)), with_score[rows].mean(0)
        bound = np.where(wanted < falling[-1], ">", np.where(wanted > falling[0], "<", ""))
        return np.exp(np.interp(-wanted, -falling, np.log(n))) / n_with, bound

    rng = np.random.default_rng(seed)
    count = len(without)
    resampled = [factors(rng.integers(count, size=count))[0] for _ in range(draws)]
    low, high = np.quantile(resampled, [0.16, 0.84], axis=0)
    columns = (*factors(np.arange(count)), low, high)
    return [Saved(float(f), float(a), float(b), str(bound)) for f, bound, a, b in zip(*columns, strict=True)]


def print_saved(rows: list[dict], of: dict, score: str, value: str = "c2st") -> None:
    """A line with `simulations_saved` by `score` against "none", among the rows that have the entries `of`."""
    chosen = [row for row in rows if all(row[k] == v for k, v in of.items())]
    sizes = [sorted({r["n"] for r in chosen if r["score"] == kind}) for kind in ("none", score)]
    seeds = sorted({r["seed"] for r in chosen})
    by = {(r["score"], r["n"], r["seed"]): r[value] for r in chosen}
    kinds = zip(("none", score), sizes, strict=True)
    tables = [[[by[kind, n, s] for n in of_kind] for s in seeds] for kind, of_kind in kinds]
    saved = simulations_saved(sizes[0], *tables, sizes[1])
    parts = [f"{n}: {factor}" for n, factor in zip(sizes[1], saved, strict=True)]
    print(f"  simulations saved by {score} scores, {' '.join(map(str, of.values()))}: " + "; ".join(parts))
