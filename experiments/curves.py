"""Tables of C2ST against the number of simulations, and how many simulations one way of fitting saves over another."""

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


def simulations_saved(n, without, with_score, *, draws: int = 1000, seed: int = 0) -> list[tuple[float, float, bool]]:
    """For each n, how many times as many simulations the fits without scores need to come as near.

    The mean curve without scores, made monotone, is interpolated in log n at the mean with scores; the error is that of
    resampling the seeds.

    Args:
        n: Numbers of simulations, increasing, (k,).
        without: Distances without scores, (seeds, k).
        with_score: With scores, (seeds, k).
        draws: Resamplings.
        seed: Of them.

    Returns:
        (factor, its standard error, whether it is only a lower bound: no n without scores comes as near), for each n.
    """
    n, without, with_score = np.asarray(n, float), np.asarray(without, float), np.asarray(with_score, float)
    if without.shape[1:] != n.shape or with_score.shape[1:] != n.shape:
        raise ValueError(f"Expected columns of {len(n)} sizes; got {without.shape} and {with_score.shape}.")

    def log_factors(a, b):
        falling = np.minimum.accumulate(a.mean(0))
        needed = np.interp(-b.mean(0), -falling, np.log(n))
        return needed - np.log(n), b.mean(0) < falling[-1]

    rng = np.random.default_rng(seed)
    pick = lambda a: a[rng.integers(len(a), size=len(a))]  # noqa: E731
    spread = np.std([log_factors(pick(without), pick(with_score))[0] for _ in range(draws)], axis=0)
    value, bound = log_factors(without, with_score)
    factor = np.exp(value)
    return [(float(f), float(f * s), bool(b)) for f, s, b in zip(factor, spread, bound, strict=True)]


def print_saved(rows: list[dict], of: dict, score: str, value: str = "c2st") -> None:
    """A line with `simulations_saved` by `score` against "none", among the rows that have the entries `of`."""
    chosen = [row for row in rows if all(row[k] == v for k, v in of.items())]
    sizes = sorted({r["n"] for r in chosen if r["score"] == score})
    seeds = sorted({r["seed"] for r in chosen})
    by = {(r["score"], r["n"], r["seed"]): r[value] for r in chosen}
    tables = [[[by[kind, n, s] for n in sizes] for s in seeds] for kind in ("none", score)]
    parts = []
    for n, (factor, error, bound) in zip(sizes, simulations_saved(sizes, *tables), strict=True):
        parts.append(f"{n}: {'> ' if bound else ''}{factor:.1f} ± {error:.1f}")
    print(f"  simulations saved by {score} scores, {' '.join(map(str, of.values()))}: " + "; ".join(parts))
