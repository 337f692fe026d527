"""Many simulations at one theta: what depends on theta alone is computed once, which `draw` does for every row."""

import equinox as eqx
import jax


@eqx.filter_jit
def draws_at(sim, theta, key, n):
    """White latents and data of n simulations."""
    _, z, x = jax.vmap(lambda key: sim.draw_one(key, theta))(jax.random.split(key, n))
    return z, x


@eqx.filter_jit
def scores_at(sim, theta, z, x, latents="white"):
    """The joint score of each of them."""
    return jax.vmap(lambda z, x: sim.score(theta, z, x, latents=latents))(z, x)
