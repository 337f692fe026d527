"""Rejection and population Monte Carlo with compressed data, against a posterior in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from diffsbi.compression.rejection import population_monte_carlo, rejection
from diffsbi.prior import Prior


class Mean(eqx.Module):
    """The sufficient summary of a normal mean, as a fitted compression."""

    fisher: jax.Array

    def __call__(self, x):
        return jnp.mean(x, keepdims=True)


def test_rejection_and_population_monte_carlo_find_a_normal_posterior():
    """Mean of four normal numbers under a wide normal prior: the posterior is N(mean / (1 + 1/100), 1 / (4 + 1/25))."""
    prior = Prior({"mean": dist.Normal(0.0, 5.0)})
    draw = lambda theta, key: theta[0] + jax.random.normal(key, (4,))  # noqa: E731
    x, compress = jnp.array([0.2, 1.0, 1.8, 1.0]), Mean(jnp.full((1, 1), 4.0))
    width = 1 / np.sqrt(4 + 1 / 25)
    found = rejection(jax.random.key(0), compress, draw, prior, x, 50_000, keep=0.01)
    assert len(found.theta) == 500 and found.epsilon == found.distance.max() and found.n_simulations == 50_000
    assert abs(found.theta.mean() - 4 * width**2) < 4 * width / np.sqrt(500)
    assert abs(found.theta.std() / width - 1) < 0.15
    population = population_monte_carlo(jax.random.key(1), compress, draw, prior, x, 500)
    assert population.n_simulations < 50_000 and population.epsilon < 0.3
    size = population.effective_size
    mean = population.weights @ population.theta[:, 0]
    spread = np.sqrt(population.weights @ (population.theta[:, 0] - mean) ** 2)
    assert abs(mean - 4 * width**2) < 4 * width / np.sqrt(size) and abs(spread / width - 1) < 0.2
    with pytest.raises(ValueError, match="positive Fisher matrix"):
        rejection(jax.random.key(0), Mean(jnp.full((1, 1), -4.0)), draw, prior, x, 1000)
    with pytest.raises(ValueError, match="keep between 1/n and 1"):
        rejection(jax.random.key(0), compress, draw, prior, x, 50, keep=0.01)
    with pytest.raises(ValueError, match="quantile and smallest_acceptance between 0 and 1"):
        population_monte_carlo(jax.random.key(0), compress, draw, prior, x, quantile=1.0)
