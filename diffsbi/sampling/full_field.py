r"""The full-field posterior: Markov chains on the simulator's own joint, in whitened latent coordinates."""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_names
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.gaussian_field import approximate_posterior
from diffsbi.sampling.hmc import hmc
from diffsbi.sampling.mclmc import mclmc
from diffsbi.sampling.nuts import nuts
from diffsbi.sampling.runner import BadStart
from diffsbi.simulators.base import AbstractSimulator, draw_shapes
from diffsbi.simulators.lensing import LensingMaps


class FullFieldTarget(eqx.Module):
    r"""$\log p(\theta, \xi | x)$ up to a constant, in $(v, \xi)$ with $u = u_0 + R v$ the prior's unconstrained space.

    The joint is the simulator's `log_joint`, in the latent coordinate `latents`; nothing is approximated.
    """

    sim: AbstractSimulator
    x: Array
    centre: Float[Array, " p"]
    root: Float[Array, "p p"]
    latents: str = eqx.field(static=True)

    def __call__(self, position: dict[str, Array]) -> Array:
        prior = self.sim.prior
        u = self._unconstrained(position)
        theta = prior.from_unconstrained(u)
        latent = self.sim.log_conditional(theta, position["xi"], self.x, latents=self.latents)
        return latent + prior.log_prob_unconstrained(u)

    def theta(self, position: dict[str, Array]) -> Float[Array, " p"]:
        return self.sim.prior.from_unconstrained(self._unconstrained(position))

    def signal(self, position: dict[str, Array]) -> Array:
        """The mean of the data given the parameters and latents: for lensing, the noiseless convergence maps."""
        state = self.sim.setup(self.theta(position))
        z, _ = self.sim.transport(self.latents).to_latents(state, position["xi"], self.x)
        return self.sim.likelihood(state, z).mean

    def _unconstrained(self, position):
        return self.centre + self.root @ position["v"]


SAMPLERS: dict[str, Callable[..., Chains]] = {
    "hmc": partial(hmc, adapt="v"),
    "nuts": nuts,
    "mclmc": mclmc,
    "mclmc_unadjusted": partial(mclmc, adjusted=False),
}
"""The samplers of `full_field_posterior` by name."""

EXACT = ("hmc", "nuts", "mclmc")

MOVES = 20  # of starting points without a finite density, before giving up


def full_field_posterior(
    sim: AbstractSimulator,
    x: Array,
    key: Key,
    *,
    sampler: str = "best",
    latents: str | None = None,
    n_chains: int = 4,
    n_warmup: int = 200,
    n_samples: int = 400,
    maps: bool = False,
    **settings,
) -> Chains:
    r"""Posterior of theta given the data themselves, p(theta | x), from chains on p(theta, latents | x).

    For lensing maps theta is preconditioned by the Gaussian-field posterior (`approximate_posterior`), for other
    simulators by the prior's spread. Chains start overdispersed (twice the preconditioner's width in theta, or from the
    prior; fresh latents), never at the truth.

    Args:
        sim: Any simulator of the protocol.
        x: The observation, with the shape that the simulator draws.
        key: A typed JAX key; chain c depends on it and c alone.
        sampler: "hmc" (about a standard normal: for whitened latents), "nuts", "mclmc" (Metropolis-adjusted),
            "mclmc_unadjusted" (biased: see `diffsbi.sampling.mclmc`), or "best", the fastest exact one: "hmc" where the
            latents are whitened, else "nuts".
        latents: Latent coordinate; by default "whitened" where the simulator offers it, else "white".
        n_chains: Chains.
        n_warmup: Discarded transitions of each chain.
        n_samples: Kept draws of each chain; the most, with `until_ess`.
        maps: Also accumulate posterior mean and standard deviation of the data's noiseless mean (`Chains.tracked`).
        settings: Further settings of the sampler and of `diffsbi.sampling.runner.sample`: `until_ess`, `folder`, ...

    Raises:
        ValueError: If x is not finite or has another shape than the simulator draws, or a name is unknown.
    """
    latents = sim.best_latents(latents)
    lensing = isinstance(sim, LensingMaps)
    sampler = sampler if sampler != "best" else ("hmc" if latents == "whitened" else "nuts")
    check_names([sampler], list(SAMPLERS), "sampler")
    x, shape = observed(sim, x)
    centre, root = (jnp.asarray(a, x.dtype) for a in starting_frame(sim, x))
    target = FullFieldTarget(sim, x, centre, root, latents)
    key_v, key_xi, key_chain = jax.random.split(check_key(key), 3)
    v = 2.0 * jax.random.normal(key_v, (n_chains, sim.prior.dim)) if lensing else _starts(sim, key_v, n_chains, target)
    running = dict(names=sim.names, extract=target.theta, context=dict(latents=latents))
    running |= dict(track=target.signal) if maps else {}
    if sampler == "nuts":
        running |= dict(mass="unit" if lensing else ("v",), max_tree_depth=(6, 8))
    for _ in range(MOVES):
        init = {"v": v, "xi": _latent_starts(sim, target, v, key_xi, shape)}
        try:
            return SAMPLERS[sampler](target, init, key_chain, n_warmup, n_samples, **(running | settings))
        except BadStart as bad:  # far out the spectra may not be finite: half way to the centre
            v, last = v.at[bad.chain].multiply(0.5), bad
    raise last


def observed(sim: AbstractSimulator, x) -> tuple[Array, tuple[int, ...]]:
    """The observation as an array, and the shape of a draw's latents.

    Raises:
        ValueError: If x is not finite or has another shape than the simulator draws.
    """
    x = jnp.asarray(x, jnp.result_type(float))
    _, z_shape, x_shape = draw_shapes(sim)
    if x.shape != x_shape.shape:
        raise ValueError(f"Expected an observation with shape {x_shape.shape}; got {x.shape}.")
    check_finite("observation", x)
    return x, z_shape.shape


def starting_frame(sim: AbstractSimulator, x: Array) -> tuple[np.ndarray, np.ndarray]:
    """Centre and root of a first guess in unconstrained space: the Gaussian-field posterior of maps, else the prior."""
    if isinstance(sim, LensingMaps):
        return approximate_posterior(sim, x)
    mean, sd = sim.prior.unconstrained_spread()
    return mean, np.diag(sd)


def _latent_starts(sim, target: FullFieldTarget, v, key, shape) -> Array:
    """Prior draws of the latents at each start; standard normal in a whitened coordinate, nearly their posterior."""
    if target.latents != "white":
        return jax.random.normal(key, (len(v), *shape))
    theta = jax.vmap(lambda one: target.theta({"v": one}))(v)
    return jnp.stack(
        [sim.latents(sim.setup(t)).sample(k) for t, k in zip(theta, jax.random.split(key, len(v)), strict=True)]
    )


def _starts(sim, key, n_chains: int, target: FullFieldTarget) -> Array:
    u = sim.prior.to_unconstrained(sim.prior.sample(key, (n_chains,)))
    return jax.vmap(lambda one: jnp.linalg.solve(target.root, one - target.centre))(u)
