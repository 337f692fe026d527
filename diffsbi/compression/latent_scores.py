"""Statistics from gradients of the simulator alone: scores at one theta, at latents that the data suggest."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, check_trailing


class LatentScores(eqx.Module):
    r"""$x \to \nabla_\theta \log p(x, \xi_k(x) | \theta_0)$ at a few latents $\xi_k(x)$, `(len(rates) p,)`.

    The marginal score at $\theta_0$ is the best statistic there is near it: the mean of the joint score over the
    latents that the data allow. In coordinates where these are nearly a standard normal whatever the data ("whitened")
    the score at $\xi = 0$ stands for that mean; what is not normal moves it, so it is taken again after steps of
    gradient ascent $\xi \leftarrow \xi + a \nabla_\xi \log p(x, \xi | \theta_0)$ as well. It costs a gradient each,
    needs no training, and is a deterministic function of x. What depends on $\theta_0$ alone is computed once.

    Single objects give these numbers heavy tails; `fit_compressor(key, eqx.nn.Identity(), theta, scores, ...)` bounds
    them and makes one number for each parameter of them.

    Attributes:
        rates: a of each step; the first score is at $\xi = 0$, one more after each step.
        latents: The coordinate.
    """

    sim: Any
    theta0: Float[Array, " p"]
    state: Any
    jacobian: Any
    rates: tuple[float, ...] = eqx.field(static=True)
    latents: str = eqx.field(static=True)

    def __init__(self, sim, theta0=None, *, rates: Sequence[float] = (0.1, 0.25, 0.25, 0.25), latents="whitened"):
        self.sim = sim
        self.theta0 = sim.fiducial if theta0 is None else jnp.asarray(theta0, jnp.result_type(float))
        check_trailing("theta0", self.theta0, (sim.prior.dim,))
        sim.prior.check(self.theta0[None])
        if not all(0 < rate < 2 for rate in rates):
            raise ValueError(f"Expected rates between 0 and 2, beyond which ascent diverges; got {tuple(rates)}.")
        sim.transport(latents)
        self.rates, self.latents = tuple(map(float, rates)), latents
        self.state, self.jacobian = _setup(sim, self.theta0)

    def __call__(self, x: Array) -> Float[Array, " k_p"]:
        """The scores of one data set."""
        transport = self.sim.transport(self.latents)

        def density(xi, state):
            return self.sim.log_conditional_of(state, xi, x, transport)

        def step(xi, rate):
            slope, of_state = jax.grad(density, (0, 1))(xi, self.state)
            return xi + rate * slope, self._score(of_state)

        shape = jax.eval_shape(lambda: transport.from_latents(self.state, self._latents(), x)[0])
        start = jnp.zeros(shape.shape, shape.dtype)
        _, scores = jax.lax.scan(step, start, jnp.asarray((*self.rates, 0.0), start.dtype))
        return scores.ravel()

    def many(self, x) -> Array:
        """The scores of every row of `x`."""
        return _many(self, jnp.asarray(x))

    def _latents(self) -> Array:
        return self.sim.latents(self.state).sample(jax.random.key(0))

    def _score(self, of_state) -> Float[Array, " p"]:
        """The gradient in theta, from that in what theta fixes."""
        parts = jax.tree.map(lambda a, j: jnp.tensordot(a, j, a.ndim), of_state, self.jacobian)
        return sum(jax.tree.leaves(parts), start=jnp.zeros_like(self.theta0))


@eqx.filter_jit
def _setup(sim, theta0):
    return sim.setup(theta0), jax.jacfwd(sim.setup)(theta0)


@eqx.filter_jit
def _many(scores, x):
    return jax.lax.map(scores, x)
