"""Draws by weight are distinct, and as many of each kind as their weights say."""

import numpy as np
import pytest

from diffsbi._choose import choose


def test_every_candidate_is_chosen_as_often_as_its_weight_says():
    weights, n, times = np.array([0.0, 1.0, 2.0, 3.0, 4.0, 40.0, 0.5, 9.5]), 4, 20_000
    # 40 and 9.5 are beyond one draw each: certain; what is left for the others are two draws of a sum of 10.5.
    expected = np.array([0, 1, 2, 3, 4, 0, 0.5, 0]) * 2 / 10.5 + np.array([0, 0, 0, 0, 0, 1, 0, 1])
    counts = np.zeros(8)
    for seed in range(times):
        chosen = choose(weights, n, np.random.default_rng(seed))
        assert len(set(chosen)) == n
        counts[chosen] += 1
    error = np.sqrt(expected * (1 - expected) / times)
    np.testing.assert_array_less(np.abs(counts / times - expected), 4 * error + 1e-12)


def test_draws_are_as_wide_as_what_they_stand_for():
    """A normal in six dimensions from one of three fifths of its variance; the usual trick makes it narrower."""
    n = 2000
    x = np.sqrt(0.6) * np.random.default_rng(0).standard_normal((200_000, 6))
    log_weight = 0.5 * np.sum(x**2, 1) * (1 / 0.6 - 1)
    log_weight[np.sum(x**2, 1) > 22] = -np.inf  # where no simulations were: weights are bounded
    weights = np.exp(log_weight - log_weight.max())
    exact = np.sqrt(np.sum(weights[:, None] * x**2) / weights.sum() / 6)
    effective = weights.sum() ** 2 / np.sum(weights**2)
    assert effective > 10 * n

    def usual(seed):
        with np.errstate(divide="ignore"):
            return np.argpartition(-(np.log(weights) + np.random.default_rng(seed).gumbel(size=len(x))), n)[:n]

    chosen, biased = (
        np.array([x[by(seed)].std() for seed in range(20)])
        for by in (lambda seed: choose(weights, n, np.random.default_rng(seed)), usual)
    )
    error = chosen.std() / np.sqrt(20)
    assert abs(chosen.mean() - exact) < 3 * error + 0.003  # and the few that are certain
    assert biased.mean() < exact - 5 * error - 0.003


def test_all_or_too_few():
    np.testing.assert_array_equal(np.sort(choose(np.array([1e-9, 0.0, 5.0]), 2, np.random.default_rng(0))), [0, 2])
    with pytest.raises(ValueError, match="at least 3 candidates with a positive weight; got 2 of 3"):
        choose(np.array([1.0, 0.0, 5.0]), 3, np.random.default_rng(0))
