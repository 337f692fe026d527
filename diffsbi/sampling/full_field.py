r"""The full-field posterior: NUTS on the simulator's own joint, in whitened latent coordinates."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_finite, check_key
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.gaussian_field import approximate_posterior
from diffsbi.sampling.nuts import nuts
from diffsbi.simulators.base import AbstractSimulator
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

    def _unconstrained(self, position):
        return self.centre + self.root @ position["v"]


def full_field_posterior(
    sim: AbstractSimulator,
    x: Array,
    key: Key,
    *,
    latents: str | None = None,
    n_chains: int = 4,
    n_warmup: int = 150,
    n_samples: int = 250,
    **settings,
) -> Chains:
    r"""Posterior of theta given the data themselves, p(theta | x), by NUTS on p(theta, latents | x).

    For lensing maps theta is preconditioned by the Gaussian-field posterior (`approximate_posterior`) and the mass
    matrix is the identity; for other simulators by the prior's spread, with a dense mass matrix adapted over theta.
    Chains start overdispersed (twice the preconditioner's width in theta, fresh normal latents), never at the truth.

    Args:
        sim: Any simulator of the protocol.
        x: The observation, with the shape that the simulator draws.
        key: A typed JAX key; chain c depends on it and c alone.
        latents: Latent coordinate; "whitened" where the simulator offers it, else "white".
        n_chains: Chains.
        n_warmup: Discarded transitions of each chain.
        n_samples: Kept draws of each chain.
        settings: Further settings of `nuts`, such as `folder`, `progress`, `max_tree_depth`.

    Raises:
        ValueError: If x is not finite or has another shape than the simulator draws.
    """
    latents = latents or ("whitened" if "whitened" in sim.transports() else "white")
    sim.transport(latents)
    x = jnp.asarray(x, jnp.result_type(float))
    _, z_shape, x_shape = eqx.filter_eval_shape(sim.draw_one, jax.random.key(0))
    if x.shape != x_shape.shape:
        raise ValueError(f"Expected an observation with shape {x_shape.shape}; got {x.shape}.")
    check_finite("observation", x)
    lensing = isinstance(sim, LensingMaps)
    preconditioner = approximate_posterior(sim, x) if lensing else _prior_spread(sim)
    centre, root = (jnp.asarray(a, x.dtype) for a in preconditioner)
    target = FullFieldTarget(sim, x, centre, root, latents)
    key_v, key_xi, key_chain = jax.random.split(check_key(key), 3)
    v = 2.0 * jax.random.normal(key_v, (n_chains, sim.prior.dim)) if lensing else _starts(sim, key_v, n_chains, target)
    init = {"v": v, "xi": _latent_starts(sim, target, v, key_xi, z_shape.shape)}
    defaults = dict(names=sim.names, step_size=0.1, mass="unit" if lensing else ("v",), max_tree_depth=(6, 8))
    return nuts(target, init, key_chain, n_warmup, n_samples, extract=target.theta, **(defaults | settings))


def _latent_starts(sim, target: FullFieldTarget, v, key, shape) -> Array:
    """Prior draws of the latents at each start; standard normal in a whitened coordinate, whose prior that is."""
    if target.latents == "whitened":
        return jax.random.normal(key, (len(v), *shape))
    theta = jax.vmap(lambda one: target.theta({"v": one}))(v)
    return jnp.stack(
        [sim.latents(sim.setup(t)).sample(k) for t, k in zip(theta, jax.random.split(key, len(v)), strict=True)]
    )


def _starts(sim, key, n_chains: int, target: FullFieldTarget) -> Array:
    u = sim.prior.to_unconstrained(sim.prior.sample(key, (n_chains,)))
    return jax.vmap(lambda one: jnp.linalg.solve(target.root, one - target.centre))(u)


def _prior_spread(sim) -> tuple[np.ndarray, np.ndarray]:
    u = sim.prior.to_unconstrained(sim.prior.sample(jax.random.key(0), (4000,)))
    return np.asarray(u.mean(0)), np.diag(np.asarray(u.std(0)))
