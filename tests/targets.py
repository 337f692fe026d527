"""Targets with known moments that the samplers' tests share, and the density that estimators' tests share."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import StandardNormal

from diffsbi.flows.affine import ConditionalAffine, with_linear_part

COVARIANCE = np.array([[1.0, 0.6, 0.0], [0.6, 2.0, -0.3], [0.0, -0.3, 0.5]])
MEAN = np.array([1.0, -2.0, 0.5])


class Normal(eqx.Module):
    """A correlated normal target: an `eqx.Module`, so that every test shares one compiled sampler."""

    mean: jax.Array
    precision: jax.Array

    def __call__(self, z):
        r = z - self.mean
        return -0.5 * r @ self.precision @ r


def normal(scale=1.0) -> Normal:
    return Normal(jnp.asarray(MEAN) * scale, jnp.asarray(np.linalg.inv(COVARIANCE) / scale**2))


def assert_means(chains, expected):
    """Means within 4 standard errors; those are small enough to mean something."""
    for row, mean in zip(chains.summary().values(), expected, strict=True):
        error = row.sd / np.sqrt(row.ess_bulk)
        assert row.rhat < 1.02 and row.ess_bulk > 400 and abs(row.mean - mean) < 4 * error, (row, mean)


def linear_gaussian_density(key, dim, condition_dim):
    """A linear-Gaussian density that can learn how its mean depends on the data; `gaussian` can by scores alone."""
    return with_linear_part(StandardNormal((dim,)), ConditionalAffine(dim, condition_dim))


def gaussian(key, dim, condition_dim):
    """A density with only the linear part that every density gets: exact for a linear Gaussian simulator, and quick."""
    return StandardNormal((dim,))
