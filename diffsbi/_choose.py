"""Distinct draws out of weighted candidates."""

import numpy as np

from diffsbi._types import Float


def choose(weights: Float[np.ndarray, " N"], n: int, rng: np.random.Generator) -> np.ndarray:
    r"""Indices `(n,)` of distinct candidates, each chosen with probability $\min(1, c w_i)$, which sum to n.

    Systematic sampling in random order. Taking one after the other without replacement (or the n largest of
    $\log w_i$ + Gumbel noise, which is the same) would choose large weights too seldom, and draws of a posterior with
    4 n effective candidates would be 3 to 4 % too narrow. Only weights beyond $1/c$ are cut here.

    Raises:
        ValueError: If fewer than n weights are positive.
    """
    weights = np.asarray(weights, float)
    if (positive := int(np.sum(weights > 0))) < n:
        raise ValueError(f"Expected at least {n} candidates with a positive weight; got {positive} of {len(weights)}.")
    certain = np.zeros(len(weights), bool)
    probability = n * weights / weights.sum()
    while np.any(probability > 1):
        certain |= probability >= 1
        rest = np.where(certain, 0.0, weights)
        left = n - certain.sum()
        probability = np.where(certain, 1.0, rest * (left / rest.sum() if left else 0.0))
    order = rng.permutation(len(weights))
    edges = np.cumsum(probability[order])
    found = np.searchsorted(edges * (n / edges[-1]), np.arange(n) + rng.uniform(), side="right")
    return rng.permutation(order[found])
