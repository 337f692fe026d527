r"""Fisher information of summaries at one point, from simulations, $F = \partial\mu^T C^{-1} \partial\mu$; its loss."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float


class Information(NamedTuple):
    """Moments of summaries and what a Gaussian with that mean and a constant covariance knows about theta.

    Attributes:
        mean: μ, `(m,)`.
        covariance: C with n_s − 1 in the denominator, `(m, m)`.
        precision: C⁻¹, `(m, m)`.
        derivative: ∂μ/∂θ, `(m, p)`.
        fisher: F, `(p, p)`.
        unbiased: F without its Hartlap factor and without the noise of the derivatives, `(p, p)`.
    """

    mean: Array
    covariance: Array
    precision: Array
    derivative: Array
    fisher: Array
    unbiased: Array


def information(t: Float[Array, "n_s m"], dt: Float[Array, "n_d m p"], xp=jnp) -> Information:
    r"""Moments of the summaries `t` and of their derivatives `dt`, and the Fisher matrix.

    $F = \partial\mu^T C^{-1} \partial\mu$ is too large twice: by $(n_s - 1)/(n_s - m - 2)$ from $C^{-1}$, for normal
    summaries (Hartlap et al. 2007), and by the noise of the mean derivative, which adds
    $\mathrm{tr}(C^{-1} \mathrm{Cov}(\partial_a t, \partial_b t)) / n_d$. `unbiased` is without both; it need not be
    positive. With `xp=numpy` the arrays are NumPy's.
    """
    n_s, m = t.shape
    n_d = dt.shape[0]
    mean, derivative = xp.mean(t, 0), xp.mean(dt, 0)
    centred = t - mean[None]
    covariance = centred.T @ centred / (n_s - 1)
    precision = xp.linalg.inv(covariance)
    fisher = derivative.T @ precision @ derivative
    scatter = dt - derivative[None]
    noise = xp.einsum("nia,ij,njb->ab", scatter, precision, scatter) / (n_d * max(n_d - 1, 1))
    unbiased = (n_s - m - 2) / (n_s - 1) * (fisher - noise)
    return Information(mean, covariance, precision, derivative, fisher, unbiased)


class Regularisation(eqx.Module):
    r"""Keeps the covariance of the summaries near one: $r\,L_2$ with $L_2 = \|C - 1\| + \|C^{-1} - 1\|$ (Frobenius).

    $r = \lambda L_2 / (L_2 + e^{-\alpha L_2})$ rises from 0 to λ, and is about 1 where $L_2 = \epsilon$:
    $\alpha = -\ln(\epsilon(\lambda - 1) + \epsilon^2/(1 + \epsilon)) / \epsilon$ (Charnock, Lavaux & Wandelt 2018,
    arXiv:1802.03634; Makinen et al. 2021, arXiv:2107.07405). The Fisher information itself is the same for every
    invertible linear map of the summaries: without this term nothing would fix their scale. A strong one is costly
    all the same: the sampled covariance is noisy, and pulls at the shape of the summaries too (λ = 10 instead of 1, 500
    simulations a step, weights not averaged: det F 41 after 1 000 steps instead of 48 after 600, of 50).

    Args:
        strength: λ.
        closeness: ε.

    Raises:
        ValueError: For λ and ε whose α is not positive, so that r would vanish far from C = 1.
    """

    strength: float = eqx.field(static=True, default=1.0)
    closeness: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        if not (self.strength > 0 and self.closeness > 0):
            raise ValueError(f"Expected strength > 0 and closeness > 0; got {self.strength} and {self.closeness}.")
        if not 0 < self._at_closeness < 1:
            lowest, highest = (1 + (bound - self._rest) / self.closeness for bound in (0.0, 1.0))
            raise ValueError(
                f"Expected strength between {max(lowest, 0.0):.4g} and {highest:.4g} at closeness = {self.closeness}; "
                f"got {self.strength}. Outside, alpha is not a positive number, and r does not rise from 0 to the "
                "strength as C moves away from 1: choose another strength, or a smaller closeness."
            )

    @property
    def _rest(self) -> float:
        return self.closeness**2 / (1 + self.closeness)

    @property
    def _at_closeness(self) -> float:
        return self.closeness * (self.strength - 1) + self._rest

    @property
    def alpha(self) -> float:
        return float(-np.log(self._at_closeness) / self.closeness)

    def __call__(self, found: Information) -> tuple[Array, Array]:
        """(L2, r), scalars."""
        one = jnp.eye(len(found.mean), dtype=found.mean.dtype)
        distance = _norm(found.covariance - one) + _norm(found.precision - one)
        # e^{-αL2} alone underflows for large L2, as it should: r is λ there.
        return distance, self.strength * distance / (distance + jnp.exp(-self.alpha * distance))


def information_loss(t, dt, regularisation: Regularisation) -> tuple[Array, dict[str, Array]]:
    r"""$-\ln\det F + r L_2$; and ln det F, det F (`unbiased`; 0 where it is not positive), det C, det C⁻¹, L2, r."""
    found = information(t, dt)
    distance, rate = regularisation(found)
    log_det = jnp.linalg.slogdet(found.fisher)[1]
    # Of a matrix with two negative eigenvalues the determinant is positive as well: there nothing is known.
    negative = jnp.linalg.eigvalsh(jax.lax.stop_gradient(found.unbiased))[0] <= 0
    measures = {"det F": jnp.where(negative, 0.0, jnp.linalg.det(found.unbiased))}
    measures |= {"det C": jnp.linalg.det(found.covariance), "det C^-1": jnp.linalg.det(found.precision)}
    measures |= {"L2": distance, "r": rate}
    return -log_det + rate * distance, measures | {"ln det F": log_det}


def _norm(a: Array) -> Array:
    """Frobenius norm; its gradient at zero is zero, not NaN."""
    square = jnp.sum(a**2)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def measured_information(t, dt, n_blocks: int = 20) -> tuple[Information, float]:
    """`information` in float64, and the standard error of ln det `unbiased` by a jackknife over blocks of rows."""
    t, dt = np.asarray(t, float), np.asarray(dt, float)
    n_blocks = min(n_blocks, len(dt))
    log_dets = []
    for block in range(n_blocks):
        kept, d_kept = (a[np.arange(len(a)) % n_blocks != block] for a in (t, dt))
        log_dets.append(log_det(information(kept, d_kept, np).unbiased))
    return information(t, dt, np), float(jackknife_error(np.asarray(log_dets)))


def log_det(matrix: np.ndarray) -> float:
    """ln det of a symmetric matrix; minus infinity where it is not positive, whatever the sign of its determinant."""
    matrix = np.asarray(matrix, float)
    if not np.isfinite(matrix).all():
        return np.nan
    values = np.linalg.eigvalsh(matrix)
    return float(np.sum(np.log(values))) if values[0] > 0 else -np.inf


def check_positive(fisher: np.ndarray) -> None:
    """Raise `ValueError` where an estimate of F without bias, from too few simulations, is not positive.

    Inside jit nothing is known of the numbers.
    """
    if not isinstance(fisher, jax.core.Tracer) and not log_det(fisher) > -np.inf:
        raise ValueError(
            f"Expected a positive Fisher matrix; got {np.asarray(fisher).tolist()}: it was measured from too few "
            "simulations, or the summaries know nothing. Take more derivatives (n_d) or a larger n_refit."
        )


def jackknife_error(without: np.ndarray) -> np.ndarray:
    """Standard error of an estimate, from its values without each block of the data; infinite where one of them is."""
    finite = np.isfinite(without).all(0)
    return np.where(finite, np.sqrt((len(without) - 1) * np.var(np.where(finite, without, 0), axis=0)), np.inf)
