"""The linear-Gaussian part of a conditional density, given to the flow so that it need not learn it."""

import jax.numpy as jnp
from flowjax.bijections import AbstractBijection
from flowjax.distributions import AbstractDistribution, Transformed
from jax.scipy.linalg import solve_triangular

from diffsbi._types import Array, Float


class ConditionalAffine(AbstractBijection):
    r"""$y = L x + A c + b$ with L lower triangular of positive diagonal $e^d$; the identity to begin with.

    Args:
        dim: Dimension of x.
        condition_dim: Dimension of c, or None.
    """

    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None
    lower: Float[Array, "p p"]
    log_diagonal: Float[Array, " p"]
    slope: Float[Array, "p d"] | None
    loc: Float[Array, " p"]

    def __init__(self, dim: int, condition_dim: int | None = None):
        self.shape = (dim,)
        self.cond_shape = None if condition_dim is None else (condition_dim,)
        self.lower = jnp.zeros((dim, dim))
        self.log_diagonal = jnp.zeros(dim)
        self.slope = None if condition_dim is None else jnp.zeros((dim, condition_dim))
        self.loc = jnp.zeros(dim)

    def matrix(self) -> Float[Array, "p p"]:
        """L."""
        return jnp.tril(self.lower, -1) + jnp.diag(jnp.exp(self.log_diagonal))

    def _mean(self, condition) -> Array:
        return self.loc if self.slope is None else self.loc + self.slope @ condition

    def transform_and_log_det(self, x, condition=None):
        return self.matrix() @ x + self._mean(condition), jnp.sum(self.log_diagonal)

    def inverse_and_log_det(self, y, condition=None):
        x = solve_triangular(self.matrix(), y - self._mean(condition), lower=True)
        return x, -jnp.sum(self.log_diagonal)


def with_linear_part(density: AbstractDistribution, affine: ConditionalAffine | None = None) -> Transformed:
    r"""The density of $L v + A c + b$ with v from `density`: a linear-Gaussian answer costs the flow nothing."""
    condition_dim = None if density.cond_shape is None else density.cond_shape[0]
    return Transformed(density, ConditionalAffine(density.shape[0], condition_dim) if affine is None else affine)
