r"""Posterior predictive check: do simulations at posterior draws look like the observation?"""

from collections.abc import Sequence

import equinox as eqx
import numpy as np

from diffsbi.diagnostics._distances import checked, left_out_distances, rank_p_value

_WORST = 5


class PredictiveCheck(eqx.Module):
    r"""The observed statistics among the predicted ones.

    Args:
        names: Of the statistics.
        tail_probability: Two-sided, $2 \min(P(s \le s_o), P(s \ge s_o))$, at most 1, `(d,)`.
        error: Its binomial standard error, `(d,)`.
        z: $(s_o - \bar s) / \sigma_s$, `(d,)`.
        distance: Mahalanobis distance of the observed statistics from the predicted ones.
        p_value: Share of the predictions that are as far from all others; of all statistics together.
        worst: The (at most five) statistics of least tail probability, the worst first.
        n: Predictions.
    """

    names: tuple[str, ...]
    tail_probability: np.ndarray
    error: np.ndarray
    z: np.ndarray
    distance: float
    p_value: float
    worst: tuple[str, ...]
    n: int


def predictive_check(simulated, observed, names: Sequence[str] | None = None) -> PredictiveCheck:
    r"""Compare observed statistics with those of simulations at draws of the posterior.

    Each statistic by itself, and all together by the Mahalanobis distance in their shrunk covariance. No χ² is
    assumed: each prediction's own distance is taken from all other rows, the observation among them, and the p-value is
    the rank of the observation's, exact for any distribution of independent predictions. The posterior has
    seen the observation, so p-values of a right model lie nearer to ½ than uniform ones: a small one means more,
    a middling one less. Among d statistics the least tail probability is about 1/d by chance.

    Args:
        simulated: Statistics of simulations at independent posterior draws, `(n, d)`, n ≥ 20.
        observed: Those of the observation, `(d,)`.
        names: One for each statistic.

    Raises:
        ValueError: On shapes or names that do not fit, values that are not finite, or fewer than 20 simulations.

    Reference: Gelman, Meng & Stern 1996, Statistica Sinica 6, 733.
    """
    simulated, observed, names = checked(simulated, observed, names, 20)
    n = len(simulated)
    below = (1 + np.sum(simulated <= observed, 0)) / (n + 1)
    above = (1 + np.sum(simulated >= observed, 0)) / (n + 1)
    tail = np.minimum(np.minimum(below, above), 0.5)
    deviation = simulated.std(0)
    shift = observed - simulated.mean(0)
    z = shift / np.where(deviation > 0, deviation, np.finfo(float).tiny ** 0.25)
    distances = np.sqrt(left_out_distances(np.concatenate([simulated, observed[None]])))
    order = np.lexsort((-np.abs(z), tail))[:_WORST]
    return PredictiveCheck(
        names, 2 * tail, 2 * np.sqrt(tail * (1 - tail) / n), z, float(distances[-1]),
        rank_p_value(distances[:-1], distances[-1]), tuple(names[i] for i in order), n,
    )  # fmt: skip
