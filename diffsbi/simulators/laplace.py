r"""The Laplace coordinate: latents in units of their own posterior given theta and x, for any small simulator."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import Distribution, biject_to
from numpyro.distributions.transforms import Transform

from diffsbi._types import Array, Float, check_trailing
from diffsbi.simulators.base import AbstractSimulator, AbstractTransport

MAX_LATENTS = 200

THRESHOLD = 1e-2
"""Eigenvalues of a curvature above this, in units of the prior's curvature, are left exactly as they are."""


class Laplace(AbstractTransport):
    r"""$w = w^*(\theta, x) + R^{-T}\xi$: standard normal given theta and x where the latents' posterior is Gaussian.

    $w$ are the latents in the unconstrained space of their support, $w^*$ is (nearly) the mode of
    $\log p(x, w | \theta)$, and $RR^T$ its curvature there: the latents' prior's own plus the likelihood's
    Gauss–Newton one, that is with the parameters of the distribution `likelihood(state, z)` linearised in z. Exact
    for linear models with Gaussian noise (any prior of theta). However poor the fit, the coordinate is a smooth
    bijection with its exact log-determinant: posteriors and mean scores are the same, their cost and variance differ.
    Where the latents' posterior has several modes the steps may jump between them as theta moves: the score's variance
    is then large, and "white" the better coordinate. Compare the two variances before use.

    For a simulator with up to 200 latents, its own `latents` and `likelihood` are all that is needed:

        class Mine(AbstractSimulator):
            ...
            def transports(self):
                return {"white": Identity(), "laplace": Laplace(self)}

    (built when asked for: a simulator must not hold itself in a field). A density in this coordinate runs the
    simulator `steps + 2` times, all but one with one tangent for each latent: of use where the latents are far better
    known from the data than from the prior, or where scores are worth more than simulations.

    Args:
        sim: The simulator whose latents are moved.
        steps: Newton steps, fixed. All but the last three weigh the likelihood less: by 1/4 the last, 1/16 ...

    Raises:
        ValueError: If `steps` < 1, or (when used) the latents are none, more than 200, discrete, or have another
            shape in unconstrained space.
    """

    sim: AbstractSimulator
    steps: int = eqx.field(static=True, default=6)

    def __check_init__(self):
        if self.steps < 1:
            raise ValueError(f"Expected steps >= 1; got {self.steps}.")

    def to_latents(self, state, xi, x):
        frame = _frame(self.sim.latents(state))
        check_trailing("xi", xi, frame.shape)
        mode, root = self._mode_and_root(state, x, frame)
        z, log_det = frame.outward(mode + solve_triangular(root, xi.reshape(-1), trans=1, lower=True))
        return z, log_det - _log_det(root)

    def from_latents(self, state, z, x):
        frame = _frame(self.sim.latents(state))
        check_trailing("z", z, frame.shape)
        mode, root = self._mode_and_root(state, x, frame)
        v, log_det = frame.inward(z)
        return (root.T @ (v - mode)).reshape(frame.shape), log_det + _log_det(root)

    def _mode_and_root(self, state, x, frame):
        """Mode and Cholesky factor of the curvature, in the frame's units."""
        dtype = frame.centre.dtype
        radius = 4.0 + np.sqrt(frame.centre.size)
        # The likelihood enters by degrees, so that steps from the prior's centre stay where the linearisation holds.
        weights = jnp.minimum(1.0, 4.0 ** (jnp.arange(self.steps + 1, dtype=dtype) - self.steps + 3))

        def step(carry, weight):
            v, _, _ = carry
            slope, curvature = self._slope_and_curvature(state, v, x, frame, weight)
            root = jnp.linalg.cholesky(positive(curvature))
            whitened = solve_triangular(root, slope, lower=True)
            return (within(v + solve_triangular(root, whitened, trans=1, lower=True), radius), v, root), None

        # The steps are differentiated themselves. Implicit derivatives hold at the exact mode alone: where the steps
        # have not converged, the gradient would not be that of the density, and scores and chains would be biased.
        # One turn more gives the curvature at the last point; its own step is not used.
        zero = jnp.zeros_like(frame.centre)
        (_, mode, root), _ = jax.lax.scan(step, (zero, zero, jnp.zeros_like(frame.root)), weights)
        return mode, root

    def _slope_and_curvature(self, state, v, x, frame, weight):
        likelihood = lambda v: self.sim.likelihood(state, frame.outward(v)[0])  # noqa: E731
        return slope_and_curvature(likelihood, frame.log_prior, v, x, weight)


def slope_and_curvature(likelihood, log_prior, v: Float[Array, " n"], x, weight=1.0):
    r"""Gradient `(n,)` and negative Gauss–Newton Hessian `(n, n)` in v of $\log p(v) + w \log p(x | v)$.

    Args:
        likelihood: v → distribution of x, whose parameters are linearised in v.
        log_prior: v → its log-density.
        v: Where.
        x: Data.
        weight: w.
    """

    def along(direction):
        return eqx.filter_jvp(likelihood, (v,), (direction,))

    zero = jnp.zeros_like(v)
    here, tangents = eqx.filter_vmap(along, out_axes=(None, 0))(jnp.eye(v.size, dtype=v.dtype))
    moving, rest = eqx.partition(here, jax.tree.map(lambda t: t is not None, tangents, is_leaf=lambda t: t is None))

    def log_density(step):
        moved = jax.tree.map(lambda p, t: p + jnp.tensordot(step, t, 1), moving, tangents)
        data = jnp.sum(eqx.combine(moved, rest).log_prob(x))
        return log_prior(v + step) + weight * data

    return jax.grad(log_density)(zero), -jax.hessian(log_density)(zero)


class _Frame(NamedTuple):
    r"""$w = c + L^{-T}v$: v has the prior's centre as origin and its curvature there as unit."""

    latents: Distribution
    bijection: Transform
    shape: tuple[int, ...]
    centre: Float[Array, " n"]
    root: Float[Array, "n n"]

    def outward(self, v):
        """z(v) and log|det dz/dv|."""
        w = (self.centre + solve_triangular(self.root, v, trans=1, lower=True)).reshape(self.shape)
        z = self.bijection(w)
        return z, jnp.sum(self.bijection.log_abs_det_jacobian(w, z)) - _log_det(self.root)

    def inward(self, z):
        """v(z) and log|det dv/dz|."""
        w = self.bijection.inv(z)
        v = self.root.T @ (w.reshape(-1) - self.centre)
        return v, _log_det(self.root) - jnp.sum(self.bijection.log_abs_det_jacobian(w, z))

    def log_prior(self, v):
        z, log_det = self.outward(v)
        return jnp.sum(self.latents.log_prob(z)) + log_det


def _frame(latents: Distribution) -> _Frame:
    shape = latents.shape()
    size = int(np.prod(shape))
    if not 1 <= size <= MAX_LATENTS:
        raise ValueError(f"Expected 1 to {MAX_LATENTS} latents for the Laplace coordinate; got {size}, shape {shape}.")
    if latents.support.is_discrete:
        raise ValueError("Expected continuous latents for the Laplace coordinate; got a discrete support.")
    bijection = biject_to(latents.support)
    if bijection.inverse_shape(shape) != shape:
        free = bijection.inverse_shape(shape)
        raise ValueError(f"Expected latents with as many degrees of freedom as numbers; got {shape}, {free} free.")
    centre = _centre(latents, bijection, shape)
    unit = _Frame(latents, bijection, shape, centre, jnp.eye(size, dtype=centre.dtype))
    curvature = -jax.hessian(unit.log_prior)(jnp.zeros_like(centre))
    scale = jnp.sqrt(jnp.sqrt(jnp.diag(curvature) ** 2 + jnp.finfo(centre.dtype).tiny))
    scaled = positive(curvature / scale[:, None] / scale[None, :])
    return unit._replace(root=scale[:, None] * jnp.linalg.cholesky(scaled))


def _centre(latents, bijection, shape):
    """The prior's mean, in unconstrained space; zero where there is none."""
    dtype = jnp.result_type(float)
    try:
        w = bijection.inv(jnp.broadcast_to(latents.mean, shape)).reshape(-1).astype(dtype)
    except NotImplementedError:
        return jnp.zeros(int(np.prod(shape)), dtype)
    return jnp.where(jnp.isfinite(w), w, 0.0)


def within(v: Float[Array, " n"], radius: float) -> Float[Array, " n"]:
    """`v` itself up to the length `radius`; beyond, drawn back (twice continuously) to no more than 1.3 of it."""
    excess = jnp.maximum(jnp.sum(v**2) / radius**2 - 1.0, 0.0)
    # The power is taken of a bounded number: excess**3 would overflow float32.
    near, far = jnp.minimum(excess, 1.0), jnp.maximum(excess, 1.0)
    shrink = jnp.where(excess < 1.0, (1.0 + near**3) ** (-1 / 6), (far**-3 + 1.0) ** (-1 / 6) * far**-0.5)
    return v * shrink


@jax.custom_jvp
def positive(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    r"""Symmetric `matrix` with eigenvalues $|\lambda|$, rounded off to at least 3/8 `THRESHOLD` about zero.

    The identity where all eigenvalues are above `THRESHOLD`; twice continuously differentiable everywhere. Its
    derivative is the Daleckii–Krein formula, finite for coinciding eigenvalues, where that of `eigh` is not.
    """
    values, vectors = jnp.linalg.eigh(matrix)
    return matrix + (vectors * _lift(values)[None, :]) @ vectors.T


@positive.defjvp
def _positive_jvp(primals, tangents):
    (matrix,), (change,) = primals, tangents
    values, vectors = jnp.linalg.eigh(matrix)
    a, b = values[:, None], values[None, :]
    apart = jnp.abs(a - b) > 1e-3 * THRESHOLD
    quotient = (_lift(a) - _lift(b)) / jnp.where(apart, a - b, 1.0)
    simpson = (_lift_slope(a) + 4 * _lift_slope((a + b) / 2) + _lift_slope(b)) / 6
    inner = jnp.where(apart, quotient, simpson) * (vectors.T @ change @ vectors)
    return matrix + (vectors * _lift(values)[None, :]) @ vectors.T, change + vectors @ inner @ vectors.T


def _lift(value):
    """What is added to an eigenvalue: 0 above the threshold, -2 value below minus the threshold."""
    t = jnp.clip(value / THRESHOLD, -1.0, 1.0)
    even = THRESHOLD * (0.375 + 0.75 * t**2 - 0.125 * t**4 - t)
    return even - 2 * jnp.minimum(value + THRESHOLD, 0.0)


def _lift_slope(value):
    t = jnp.clip(value / THRESHOLD, -1.0, 1.0)
    return 1.5 * t - 0.5 * t**3 - 1.0


def _log_det(root):
    return jnp.sum(jnp.log(jnp.diag(root)))
