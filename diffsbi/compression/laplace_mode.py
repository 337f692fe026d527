"""Posteriors of small simulators as normals: the mode in parameters and latents together, found for every data set."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import biject_to
from tqdm.auto import tqdm

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, check_trailing, checked_rows
from diffsbi.inference.frames import pack_frame
from diffsbi.simulators.base import draw_shapes
from diffsbi.simulators.laplace import MAX_LATENTS, positive, slope_and_curvature

_DAMPING = (1e-6, 1e-1, 1e8)  # least, first and largest
_DRAWN = 200  # simulations that tell the latents' widths
_ROWS = 64  # of data that are worked on at once


class _At(NamedTuple):
    v: Array
    value: Array
    damping: Array


class LaplaceMode(eqx.Module):
    r"""$x \to$ the normal approximation of $p(\theta | x)$ about the mode in parameters and latents, p + p (p + 1) / 2
    numbers.

    The mode of $\log p(u) + \log p(w | \theta) + \log p(x | \theta, w)$, u the prior's unconstrained parameters and w
    the latents in the unconstrained space of their support, by damped Gauss–Newton steps (Levenberg–Marquardt) from
    `n_starts` points: the prior's centre, and draws of the prior. Of the modes that are found the one with the largest
    Laplace approximation of the evidence is taken; its covariance for u, latents integrated out, makes the numbers
    (`inference.pack_frame`). They are a summary that no training is needed for; as they tell where the posterior of x
    is and how wide, `NPE(sim, framed=True)` has only to learn what they get wrong.

    A row takes `n_starts * n_steps` steps, each the simulator with a tangent for each parameter and latent, and once
    more to see whether the step is good.

    Args:
        sim: Any simulator of the protocol with at most 200 latents, of the same number for all theta.
        n_starts: Where the search begins. More where posteriors have several modes.
        n_steps: Steps from each.
        seed: Of the starts, the same for all data.

    Raises:
        ValueError: Numbers below 1, or more than 200 latents.
    """

    sim: Any
    centre: Float[Array, " p_l"]
    spread: Float[Array, " p_l"]
    starts: Float[Array, "k n"]
    n_steps: int = eqx.field(static=True)

    def __init__(self, sim, *, n_starts: int = 16, n_steps: int = 16, seed: int = 0):
        if n_starts < 1 or n_steps < 1:
            raise ValueError(f"Expected n_starts >= 1 and n_steps >= 1; got {n_starts} and {n_steps}.")
        self.sim, self.n_steps = sim, n_steps
        latents = _latents(sim, sim.fiducial)
        n = int(np.prod(latents.shape()))
        if n > MAX_LATENTS:
            raise ValueError(f"Expected at most {MAX_LATENTS} latents for LaplaceMode; got {n}.")
        drawn = _drawn(sim, jax.random.key(seed), max(n_starts, _DRAWN))
        self.centre, self.spread = _scale(sim.prior.unconstrained_spread(), drawn)
        starts = (drawn[:n_starts] - self.centre[None]) / self.spread[None]
        self.starts = starts.at[0].set(0.0)

    @eqx.filter_jit
    def __call__(self, x: Array) -> Float[Array, " k"]:
        """The numbers of one data set."""
        x = jnp.asarray(x, jnp.result_type(float))
        check_trailing("x", x, self._shape)
        return self._one(x)

    @property
    def _shape(self) -> tuple[int, ...]:
        return draw_shapes(self.sim)[2].shape

    def many(self, x, *, progress: bool = False) -> Float[Array, "m k"]:
        """The numbers of every row of `x`.

        Raises:
            ValueError: Rows of another shape than the simulator's data, or not finite.
        """
        x = checked_rows(x, self._shape)
        blocks = []
        with tqdm(total=len(x), desc="LaplaceMode", unit="row", disable=not progress) as bar:
            for first in range(0, len(x), _ROWS):
                rows = x[np.minimum(np.arange(first, first + min(_ROWS, len(x))), len(x) - 1)]
                blocks.append(np.asarray(_numbers(self, rows)))
                bar.update(min(_ROWS, len(x) - first))
        return jnp.asarray(np.concatenate(blocks)[: len(x)])

    def _one(self, x: Array) -> Float[Array, " k"]:
        p = self.sim.prior.dim
        mean, spread = self.centre.astype(x.dtype), self.spread.astype(x.dtype)

        def theta_of(v):
            return self.sim.prior.from_unconstrained(mean[:p] + spread[:p] * v[:p])

        def latents_of(v):
            return _latents_of(self.sim, theta_of(v), mean[p:] + spread[p:] * v[p:])

        def likelihood(v):
            return self.sim.likelihood(self.sim.setup(theta_of(v)), latents_of(v)[0])

        def log_prior(v):
            z, log_det = latents_of(v)
            of_theta = self.sim.prior.log_prob_unconstrained(mean[:p] + spread[:p] * v[:p])
            return of_theta + jnp.sum(_latents(self.sim, theta_of(v)).log_prob(z)) + log_det

        def density(v):
            value = log_prior(v) + jnp.sum(likelihood(v).log_prob(x))
            return jnp.where(jnp.isfinite(value), value, -jnp.inf)

        def step(at: _At, _):
            slope, curvature = slope_and_curvature(likelihood, log_prior, at.v, x)
            curvature = positive(curvature)
            damped = curvature + at.damping * jnp.diag(jnp.diag(curvature))
            v = at.v + jnp.linalg.solve(damped, slope)
            value = density(v)
            good = value > at.value
            least, _, most = _DAMPING
            damping = jnp.where(good, jnp.maximum(at.damping / 5, least), jnp.minimum(4 * at.damping, most))
            return _At(jnp.where(good, v, at.v), jnp.where(good, value, at.value), damping), None

        def search(start):
            at = _At(start, density(start), jnp.asarray(_DAMPING[1], x.dtype))
            at, _ = jax.lax.scan(step, at, length=self.n_steps)
            root = jnp.linalg.cholesky(positive(slope_and_curvature(likelihood, log_prior, at.v, x)[1]))
            return at.v, root, at.value - jnp.sum(jnp.log(jnp.diag(root)))

        modes, roots, evidence = jax.vmap(search)(self.starts.astype(x.dtype))
        best = jnp.argmax(jnp.where(jnp.isfinite(evidence), evidence, -jnp.inf))
        inverse = solve_triangular(roots[best], jnp.eye(len(modes[best]), dtype=x.dtype), lower=True)[:, :p]
        covariance = inverse.T @ inverse * spread[:p, None] * spread[None, :p]
        return pack_frame(mean[:p] + spread[:p] * modes[best, :p], jnp.linalg.cholesky(covariance))


def _latents(sim, theta):
    return sim.latents(sim.setup(theta))


def _latents_of(sim, theta, w):
    """z(w) and log|det dz/dw|."""
    latents = _latents(sim, theta)
    bijection = biject_to(latents.support)
    w = w.reshape(bijection.inverse_shape(latents.shape()))
    z = bijection(w)
    return z, jnp.sum(bijection.log_abs_det_jacobian(w, z))


@eqx.filter_jit
def _drawn(sim, key, n: int):
    """Unconstrained parameters and latents of simulations, `(n, p + l)`."""

    def one(key):
        theta, z, _ = sim.draw_one(key)
        w = biject_to(_latents(sim, theta).support).inv(z).ravel()
        return jnp.concatenate([sim.prior.to_unconstrained(theta), w])

    return jax.vmap(one)(jax.random.split(key, n))


def _scale(of_prior, drawn: Float[Array, "n p_l"]) -> tuple[Float[Array, " p_l"], Float[Array, " p_l"]]:
    """Centre and width of parameters, as given, and of latents, robustly: curvatures are compared with these."""
    w = np.asarray(drawn, float)[:, len(of_prior[0]) :]
    centre, width = median_and_spread(w)
    both = (of_prior[0], centre), (of_prior[1], np.where(width > 0, width, 1.0))
    return tuple(jnp.asarray(np.concatenate(parts), drawn.dtype) for parts in both)


@eqx.filter_jit
def _numbers(compressor: LaplaceMode, x):
    return jax.vmap(compressor._one)(x)
