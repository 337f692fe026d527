r"""Coordinates in which a posterior is near a standard normal: whitened data, and residuals of a linear regression."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from diffsbi._types import Array, Float
from diffsbi.inference.tails import drawn_in, fit_tails

_RIDGES = np.logspace(-3, 5, 33)
_FLOOR = 1e-6  # smallest eigenvalue of the data's correlation matrix that is still whitened


class Standardiser(eqx.Module):
    r"""$c = W (x - \bar x)$ and $v = L^{-1}(u - \bar u - A c)$, fixed once from the training rows.

    W whitens the data, A is the ridge regression of u on c, and $L L^T$ the covariance of its leave-one-out
    residuals: v has unit variance and, for a linear Gaussian model, v | c is exactly standard normal.

    With a `bound` b, c is $b \tanh(c / b)$ of that: no data are farther out than b standard deviations; and rows in
    long tails (`Tails`) are drawn in for the mean and W.
    """

    x_loc: Float[Array, " d"]
    whiten: Float[Array, "d d"]
    u_loc: Float[Array, " p"]
    slope: Float[Array, "p d"]
    lower: Float[Array, "p p"]
    bound: float | None = eqx.field(static=True, default=None)

    @eqx.filter_jit
    def condition(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """c(x)."""
        c = (x - jnp.broadcast_to(self.x_loc, x.shape)) @ self.whiten.T
        return c if self.bound is None else self.bound * jnp.tanh(c / self.bound)

    @eqx.filter_jit
    def to_standard(self, u: Float[Array, "*n p"], c: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """v(u, c)."""
        residual = u - self._mean(c)
        return solve_triangular(self.lower, residual.reshape(-1, u.shape[-1]).T, lower=True).T.reshape(residual.shape)

    @eqx.filter_jit
    def from_standard(self, v: Float[Array, "*n p"], c: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """u(v, c)."""
        return v @ self.lower.T + self._mean(c)

    def score_to_standard(self, score: Float[Array, "*n p"]) -> Float[Array, "*n p"]:
        r"""$\nabla_v = L^T \nabla_u$."""
        return score @ self.lower

    @property
    def log_det(self) -> Array:
        r"""$\log|\det \partial v/\partial u|$, a constant."""
        return -jnp.sum(jnp.log(jnp.diag(self.lower)))

    def _mean(self, c: Array) -> Array:
        shift = c @ self.slope.T
        return shift + jnp.broadcast_to(self.u_loc, shift.shape)


def fit_standardiser(u, x, bound: float | None = None) -> Standardiser:
    """The `Standardiser` of the rows `u (n, p)` and `x (n, d)`; the ridge is the one of least leave-one-out error."""
    u, x = np.asarray(u, np.float64), np.asarray(x, np.float64)
    near = x if bound is None else np.asarray(drawn_in(fit_tails(x), x), np.float64)
    x_loc, whiten = whitening(near)
    c = (x - x_loc) @ whiten.T
    c = c if bound is None else bound * np.tanh(c / bound)
    u_loc = u.mean(0)
    slope, residual = ridge_regression(c, u - u_loc)
    covariance = residual.T @ residual / len(u)
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12 * np.maximum(u.var(0), 1e-12)))
    correlation = covariance / np.outer(scale, scale) + 1e-6 * np.eye(len(scale))
    lower = scale[:, None] * np.linalg.cholesky(correlation)
    return Standardiser(
        *(jnp.asarray(a, jnp.result_type(float)) for a in (x_loc, whiten, u_loc, slope, lower)), bound=bound
    )


def whitening(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and whitening matrix; only a scaling of each column where the rows are too few to know correlations."""
    n, d = x.shape
    loc, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    if n < 5 * d:
        return loc, np.diag(1 / scale)
    values, vectors = np.linalg.eigh(np.cov(((x - loc) / scale).T, ddof=0).reshape(d, d))
    values = np.where(values > _FLOOR * values.max(initial=_FLOOR), values, 1.0)
    return loc, (vectors / np.sqrt(values)).T / scale


def ridge_regression(c: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Slope (p, d) of the ridge regression of u on c, and its leave-one-out residuals $e_i / (1 - h_{ii})$."""
    n = len(u)
    left, singular, right = np.linalg.svd(c, full_matrices=False)
    best = None
    for ridge in _RIDGES:
        shrink = singular**2 / (singular**2 + ridge)
        leverage = 1 / n + (left**2) @ shrink
        residual = (u - left @ (shrink[:, None] * (left.T @ u))) / np.maximum(1 - leverage, 1e-3)[:, None]
        error = np.sum(residual.var(0) / np.maximum(u.var(0), 1e-12))
        if best is None or error < best[0]:
            best = error, ridge, residual
    _, ridge, residual = best
    weight = singular / (singular**2 + ridge)
    return (right.T @ (weight[:, None] * (left.T @ u))).T, residual
