r"""Coverage over many simulated observations: simulation-based calibration, expected coverage, TARP."""

import equinox as eqx
import numpy as np
from scipy import stats

from diffsbi._types import check_finite, check_names


class Coverage(eqx.Module):
    r"""Share of truths inside credible regions of each level; equal to the level when the posterior is right.

    Args:
        levels: Credibility levels, `(k,)`.
        coverage: Share of the truths inside, `(k,)`: below the level when the posterior is too narrow.
        error: Binomial standard error if the posterior is right, $\sqrt{l(1-l)/n}$, `(k,)`.
        p_value: Kolmogorov–Smirnov probability of a deviation at least as large from a right posterior.
    """

    levels: np.ndarray
    coverage: np.ndarray
    error: np.ndarray
    p_value: float


def sbc_ranks(samples, truths, *, seed: int = 0) -> np.ndarray:
    """Rank of each true value among its posterior draws, `(n, p)` integers from 0 to m.

    Uniform when the posterior is right; piled up at both ends when it is too narrow. Ties are broken at random.

    Args:
        samples: Posterior draws of each simulated observation, `(n, m, p)`.
        truths: The parameters it was simulated at, `(n, p)`.
        seed: Seed that breaks ties.

    Reference: Talts et al. 2018, arXiv:1804.06788.
    """
    samples, truths = _check(samples, truths)
    below = (samples < truths[:, None]).sum(1)
    ties = (samples == truths[:, None]).sum(1)
    return below + np.random.default_rng(seed).integers(0, ties + 1)


def sbc_test(ranks, n_draws: int) -> np.ndarray:
    """Kolmogorov–Smirnov p-value of uniform ranks, one for each parameter `(p,)`.

    Args:
        ranks: From `sbc_ranks`, `(n, p)`.
        n_draws: Posterior draws per observation, the largest possible rank.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim != 2 or ranks.min() < 0 or ranks.max() > n_draws:
        raise ValueError(
            f"Expected ranks (n, p) between 0 and {n_draws}; got {ranks.shape}, {ranks.min()}-{ranks.max()}."
        )
    return np.array([_uniform_p_value(_spread(column, n_draws)) for column in ranks.T])


def expected_coverage(log_prob_truths, log_prob_samples, levels=None) -> Coverage:
    r"""Expected coverage of the highest-density regions.

    A truth is inside the region of level l when at most a share l of the draws have a higher density.

    Args:
        log_prob_truths: $\log q(\theta^*_i | x_i)$, `(n,)`.
        log_prob_samples: $\log q(\theta_{ij} | x_i)$ of the posterior's own draws, `(n, m)`.
        levels: Credibility levels in (0, 1); 0.05 to 0.95 by default.

    Reference: Hermans et al. 2022, arXiv:2110.06581.
    """
    truths, draws = np.asarray(log_prob_truths, np.float64), np.asarray(log_prob_samples, np.float64)
    if truths.ndim != 1 or draws.ndim != 2 or len(draws) != len(truths):
        raise ValueError(f"Expected log-densities with shapes (n,) and (n, m); got {truths.shape} and {draws.shape}.")
    if np.isnan(truths).any() or np.isnan(draws).any():
        raise ValueError("Expected log-densities that are numbers (-inf is allowed); got NaN.")
    return _coverage(_spread((draws > truths[:, None]).sum(1), draws.shape[1]), levels)


def tarp(samples, truths, *, seed: int = 0, references="posterior", levels=None) -> Coverage:
    """Expected coverage of balls around points chosen without looking at the truth, which needs draws only.

    A truth is inside the ball of level l when at most a share l of the draws are nearer to the reference point.
    Distances are taken after scaling every parameter by the range of the truths.

    Args:
        samples: Posterior draws of each simulated observation, `(n, m, p)`.
        truths: The parameters it was simulated at, `(n, p)`.
        seed: Seed of the points of a "box".
        references: The points. "posterior": for each observation one standard deviation from the mean in every
            parameter, of the first half of its draws; the second half is compared. "box": uniform in the box of all
            truths, almost blind to a shift where posteriors are narrower than that; errors of fits from a wide prior
            have been seen by these alone. Or an array `(n, p)`.
        levels: Credibility levels in (0, 1); 0.05 to 0.95 by default.

    Reference: Lemos et al. 2023, arXiv:2302.03026.
    """
    samples, truths = _check(samples, truths)
    low, width = truths.min(0), np.ptp(truths, axis=0)
    if not (width > 0).all():
        raise ValueError(f"Expected truths that vary in every parameter; got ranges {width.tolist()}.")
    if isinstance(references, str):
        check_names([references], ["posterior", "box"], "references")
        references, samples = _reference_points(references, samples, low, width, seed)
    references = np.asarray(references, np.float64)
    if references.shape != truths.shape:
        raise ValueError(f"Expected references with shape {truths.shape}; got {references.shape}.")
    to_truth = np.linalg.norm((truths - references) / width, axis=-1)
    to_draws = np.linalg.norm((samples - references[:, None]) / width, axis=-1)
    return _coverage(_spread((to_draws < to_truth[:, None]).sum(1), samples.shape[1]), levels)


def _reference_points(kind: str, samples, low, width, seed: int):
    """Points `(n, p)`, and the draws to compare with them: none of those that the points were made from."""
    n, m, p = samples.shape
    if kind == "box":
        return low + width * np.random.default_rng(seed).uniform(size=(n, p)), samples
    if m < 2:
        raise ValueError(f"Expected at least 2 draws of each posterior with references='posterior'; got {m}.")
    own, others = samples[:, : m // 2], samples[:, m // 2 :]
    return own.mean(1) + own.std(1), others


def _check(samples, truths):
    samples, truths = np.asarray(samples, np.float64), np.asarray(truths, np.float64)
    if samples.ndim != 3 or truths.shape != (samples.shape[0], samples.shape[2]) or 0 in samples.shape:
        raise ValueError(f"Expected samples (n, m, p) with truths (n, p); got {samples.shape} and {truths.shape}.")
    check_finite("samples", samples)
    check_finite("truths", truths)
    return samples, truths


def _spread(ranks, n_draws, seed=0):
    """Ranks 0 … m as numbers in (0, 1), uniform within each rank: exactly uniform when the ranks are."""
    return (ranks + np.random.default_rng(seed).uniform(size=np.shape(ranks))) / (n_draws + 1)


def _coverage(credibility, levels):
    levels = np.linspace(0.05, 0.95, 19) if levels is None else np.asarray(levels, np.float64)
    if not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"Expected levels in (0, 1); got {levels.tolist()}.")
    share = (credibility[:, None] <= levels).mean(0)
    error = np.sqrt(levels * (1 - levels) / len(credibility))
    return Coverage(levels, share, error, _uniform_p_value(credibility))


def _uniform_p_value(values):
    return float(stats.kstest(values, "uniform").pvalue)
