r"""Conditional mixtures of full-covariance normals: no bijection, a density and its draws in one pass each."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.flows.constructors import FIRST_OUTPUTS, check_sizes, small_network, with_shared_static
from diffsbi.flows.ramps import bounded, log_sum_exp

_SPREAD = 0.5  # standard deviation of the first means in the direction where they are widest


class GaussianMixture(AbstractDistribution):
    r"""$q(\theta|c) = \sum_k w_k(c)\, N(\theta; m_k(c), (R_k^T R_k)^{-1}(c))$, C∞ in $\theta$, c and the parameters.

    $R_k = (D_k + T_k) R_0$ is the Cholesky factor of a precision: D diagonal, of logarithm within ±4, T strictly
    lower triangular. Free numbers that are all zero give equal weights, fixed distinct means, and the $R_0$ with
    which mean and covariance of the whole are those of a standard normal.

    Args:
        raw: Free numbers of a condition, a network c → (K (1 + p + p(p+1)/2),); or they themselves, where there is
            no condition.
        dim: p.
        condition_dim: Dimension of c, or None.

    Reference:
        Bishop 1994, "Mixture density networks".
    """

    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None
    raw: eqx.nn.MLP | Float[Array, " m"]
    components: int = eqx.field(static=True)

    def __init__(self, raw, dim: int, condition_dim: int | None, components: int):
        self.shape = (dim,)
        self.cond_shape = None if condition_dim is None else (condition_dim,)
        self.raw = raw
        self.components = components

    def _parts(self, condition) -> tuple[Array, Array, Array, Array]:
        """Logits (K,), means (K, p), D + T (K, p, p), log-diagonals of D (K, p)."""
        (p,) = self.shape
        raw: Any = self.raw(condition) if isinstance(self.raw, eqx.nn.MLP) else self.raw
        logits, means, log_diagonal, lower = jnp.split(
            raw.reshape(self.components, -1), np.cumsum([1, p, p]).tolist(), axis=1
        )
        log_diagonal = bounded(log_diagonal)
        rows, columns = np.tril_indices(p, -1)
        factors = jnp.zeros((self.components, p, p), raw.dtype).at[:, rows, columns].set(lower)
        factors = factors + jnp.exp(log_diagonal)[:, :, None] * jnp.eye(p, dtype=raw.dtype)[None]
        return logits[:, 0], means + _first(self.components, p)[0].astype(raw.dtype), factors, log_diagonal

    def _log_prob(self, x, condition=None):
        (p,) = self.shape
        logits, means, factors, log_diagonal = self._parts(condition)
        root = _first(self.components, p)[1].astype(means.dtype)
        white = jnp.einsum("kij,kj->ki", factors, (x[None] - means) @ root.T)
        log_det = jnp.sum(log_diagonal, 1) + np.log(np.diag(root)).sum()
        terms = jax.nn.log_softmax(logits) - 0.5 * jnp.sum(white**2, 1) + log_det
        return log_sum_exp(terms) - 0.5 * p * np.log(2 * np.pi)

    def _sample(self, key, condition=None):
        (p,) = self.shape
        key_component, key_normal = jax.random.split(key)
        logits, means, factors, _ = self._parts(condition)
        k = jax.random.categorical(key_component, logits)
        normal = jax.random.normal(key_normal, (p,), means.dtype)
        root = _first(self.components, p)[1].astype(means.dtype)
        return means[k] + jax.scipy.linalg.solve_triangular(factors[k] @ root, normal, lower=True)


@functools.lru_cache(maxsize=64)
def _first(components: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct first means (K, p), and the factor R of the precision that makes up for their spread."""
    random = np.random.default_rng(0)
    means = np.stack([random.permutation(np.linspace(-1.0, 1.0, components)) for _ in range(dim)], 1)
    means = means - means.mean(0)
    widest = np.linalg.eigvalsh(means.T @ means / components).max()
    means = means * (_SPREAD / np.sqrt(widest)) if components > 1 else means
    covariance = np.eye(dim) - means.T @ means / components
    return means, np.linalg.inv(np.linalg.cholesky(covariance))


def mixture_density(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    components: int = 8,
    width: int = 64,
    depth: int = 2,
) -> AbstractDistribution:
    """Mixture of normals whose weights, means and precisions a silu network gives: see `GaussianMixture`.

    Args:
        key: Initial weights.
        dim: Dimension p of theta.
        condition_dim: Dimension of the condition; None for an unconditional density.
        components: Number K of normals.
        width: Hidden units of the network.
        depth: Its hidden layers.

    Raises:
        ValueError: For sizes below 1.
    """
    check_key(key)
    check_sizes(dim=dim, condition_dim=condition_dim, components=components, width=width, depth=depth)
    return with_shared_static(_build, key, (dim, condition_dim, components, width, depth))


def _build(key, dim, condition_dim, components, width, depth):
    size = components * (1 + 2 * dim + dim * (dim - 1) // 2)
    if condition_dim is None:
        raw = FIRST_OUTPUTS * jax.random.normal(key, (size,))
    else:
        raw = small_network(key, condition_dim, size, width, depth)
    return GaussianMixture(raw, dim, condition_dim, components)
