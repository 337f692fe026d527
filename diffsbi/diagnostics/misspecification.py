r"""Is an observation like the simulations at all? Networks extrapolate without a word where it is not."""

from collections.abc import Callable, Sequence

import equinox as eqx
import numpy as np

from diffsbi._robust import median_and_spread
from diffsbi.diagnostics._distances import checked, rank_p_value, shrunk_correlation

_WORST = 5
_WINSOR = 3.0  # robust deviations at which values are cut before correlations are taken


class Misspecification(eqx.Module):
    r"""Where one observation lies among the simulations.

    Args:
        names: Of the statistics.
        z: $(s_o - \mathrm{median}) / (1.4826\,\mathrm{MAD})$ of each, `(d,)`.
        conditional_z: The same of each, given all others: large where correlations are broken, `(d,)`.
        distance: Robust Mahalanobis distance of the observation.
        p_distance: Share of simulations that are as far.
        score: Trained log-density of the observation, or None.
        p_score: Share of simulations that have as small a one, or None.
        p_value: The least of the p-values times their number.
        level: Where the line is drawn.
        misspecified: Whether `p_value` is at most `level`.
        worst: The (at most five) statistics with the largest of |z| and |conditional z|, the worst first.
        warning: Empty where all is well; what is wrong, and in which statistics, otherwise.
    """

    names: tuple[str, ...]
    z: np.ndarray
    conditional_z: np.ndarray
    distance: float
    p_distance: float
    score: float | None
    p_score: float | None
    p_value: float
    level: float
    misspecified: bool
    worst: tuple[str, ...]
    warning: str


def misspecification(
    simulated,
    observed,
    *,
    names: Sequence[str] | None = None,
    score: Callable[[np.ndarray], np.ndarray] | None = None,
    level: float = 0.01,
) -> Misspecification:
    r"""Test whether the observed statistics could be one of the simulations.

    The distance is Mahalanobis' with medians, median absolute deviations and a shrunk correlation matrix of winsorised
    values; its p-value is the rank of the observation's among the simulations' own. All rows are treated alike: it is
    exact for any distribution. Distances see one ellipse: give a log-density of the statistics as `score`
    (`diffsbi.inference.fit_novelty` trains a flow) to see holes, bends and axes. It is calibrated by rank, too.

    Args:
        simulated: Statistics of simulations from the prior predictive, `(n, d)`, none of which trained `score`.
        observed: Those of the observation, `(d,)`.
        names: One for each statistic.
        score: Log-density of rows of statistics, `(n, d)` → `(n,)`, up to a constant.
        level: Rate at which right observations may be called misspecified.

    Raises:
        ValueError: On shapes or names that do not fit, values that are not finite, or too few simulations for `level`.

    Reference: Schmitt et al. 2021, arXiv:2112.08866, in which the distance is a maximum mean discrepancy.
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected level in (0, 1); got {level}.")
    tests = 1 if score is None else 2
    least = max(20, int(np.ceil(tests / level)) - 1)
    simulated, observed, names = checked(simulated, observed, names, 2)
    if len(simulated) < least:
        raise ValueError(f"Expected at least {least} simulations for level {level}; got {len(simulated)}.")
    distances, conditional = _robust(simulated, observed)
    p_values = [rank_p_value(distances[:-1], distances[-1])]
    value = p_score = None
    if score is not None:
        scores = _scores(score, np.concatenate([simulated, observed[None]]))
        value = float(scores[-1])
        p_score = rank_p_value(-scores[:-1], -value)
        p_values.append(p_score)
    p_value = min(1.0, tests * min(p_values))
    centre, scale = _units(simulated)
    z = (observed - centre) / scale
    order = np.argsort(-np.maximum(np.abs(z), np.abs(conditional)))[:_WORST]
    flagged = p_value <= level
    warning = _warning(names, z, conditional, order, p_values, len(simulated), level) if flagged else ""
    return Misspecification(
        names, z, conditional, float(distances[-1]), p_values[0], value, p_score, p_value, level, flagged,
        tuple(names[i] for i in order), warning,
    )  # fmt: skip


def _units(rows):
    centre, spread = median_and_spread(rows)
    spread = np.where(spread > 0, spread, rows.std(0))
    return centre, np.where(spread > 0, spread, np.finfo(float).tiny ** 0.25)


def _robust(simulated, observed):
    """Distance of each row, the observation last, and the observation's deviations given all other statistics."""
    rows = np.concatenate([simulated, observed[None]])
    centre, scale = _units(rows)
    unit = (rows - centre) / scale
    cut = np.clip(unit, -_WINSOR, _WINSOR)
    deviation = np.where(cut.std(0) > 0, np.sqrt(np.mean(cut**2, 0)), 1.0)
    correlation, _ = shrunk_correlation(cut / deviation)
    unit = unit / deviation
    turned = np.linalg.solve(correlation, unit.T).T
    precision = np.diag(np.linalg.inv(correlation))
    return np.sqrt(np.sum(unit * turned, 1)), turned[-1] / np.sqrt(precision)


def _scores(score, rows):
    values = np.asarray(score(rows), np.float64)
    if values.shape != (len(rows),):
        raise ValueError(f"Expected score to return shape ({len(rows)},); got {values.shape}.")
    if np.isnan(values).any():
        raise ValueError(
            f"Expected a score that is a number (-inf is allowed); got NaN in {np.isnan(values).sum()} rows."
        )
    return values


def _warning(names, z, conditional, order, p_values, n, level) -> str:
    found = [f"{names[i]} ({z[i]:+.1f} sigma, {conditional[i]:+.1f} given the others)" for i in order]
    by = ["distance", "trained density"][int(np.argmin(p_values))]
    shown = "; ".join(found)
    return (
        f"The observation is not like the simulations: by its {by}, p = {min(p_values):.2g} among {n} simulations "
        f"(level {level:g}). A posterior given these statistics is an extrapolation. Statistics farthest out: {shown}."
    )
