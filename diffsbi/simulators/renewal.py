"""Simulations used again: other noise on the same latents, with the scores that go with it."""

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Key, check_key
from diffsbi.simulators.base import AbstractSimulator, Draws


def fresh_noise(sim: AbstractSimulator, key: Key, draws: Draws, *, latents: str = "white") -> Draws:
    r"""The same parameters and latents with data drawn anew, $x \sim p(x | \theta, z)$: rows as good as new ones.

    The score is taken again, $\nabla_\theta \log p(x, z | \theta)$ depends on the noise: the former one would belong to
    other data. It saves what is dear in a simulation, its latents, at the price of a likelihood and a gradient.

    Args:
        sim: The simulator that made `draws`.
        key: One key; row i of the result depends on it and i alone.
        draws: Made with `keep_latents=True`.
        latents: Coordinate of the score, where `draws` have scores.

    Raises:
        ValueError: If `draws` have no latents.
    """
    check_key(key)
    if draws.latents is None:
        raise ValueError("Expected draws with latents, made by draw(..., keep_latents=True); got none.")
    sim.transport(latents)
    x, score = _renewed(sim, key, draws.theta, draws.latents, latents if draws.score is not None else None)
    return Draws(draws.theta, x, score, draws.latents, draws.names)


@eqx.filter_jit
def _renewed(sim, key, theta, z, latents):
    def row(args):
        i, theta, z = args
        x = sim.likelihood(sim.setup(theta), z).sample(jax.random.fold_in(key, i))
        return x, None if latents is None else sim.score(theta, z, x, latents=latents)

    return jax.lax.map(row, (jnp.arange(len(theta)), theta, z))
