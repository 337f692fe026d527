r"""Hamiltonian dynamics about a standard normal, for the sampler and for averages over the latents."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

KICK = 0.193183
"""Weight of a step's two outer kicks: McLachlan's two-stage scheme of least error (McLachlan 1995, SIAM J. Sci. Comput.
16, 151)."""

KICKS = (KICK, 1 - 2 * KICK, KICK)
"""The kicks of one step; a rotation by half a step stands between them."""

QUARTER_TURN = math.pi / 2
"""Length of a trajectory after which a normal's draws are independent, and so are their squares."""


def kick(q, p, gradient, step):
    r"""Momentum after a time `step` under what is not normal: $p + \epsilon (\nabla\log\pi(q) + q)$."""
    return jax.tree.map(lambda p, q, g: p + step * (g + q), p, q, gradient)


def rotate(q, p, angle):
    r"""(q, p) after a time `angle` under $H_0 = (|q|^2 + |p|^2)/2$, exactly.

    The rotation is a product of three shears: their Jacobian is one whatever the rounding of the coefficients, where
    cos² + sin² = 1 + 1e-7 in float32 would change the energy of 10^5 dimensions at every step.
    """
    shear, sine = jnp.tan(angle / 2), jnp.sin(angle)
    q = jax.tree.map(lambda q, p: q + shear * p, q, p)
    p = jax.tree.map(lambda q, p: p - sine * q, q, p)
    return jax.tree.map(lambda q, p: q + shear * p, q, p), p


def gaussian_split(log_density: Callable, _kinetic_energy: Callable | None = None) -> Callable:
    r"""Integrator (in BlackJAX's form) that solves $H_0 = (|q|^2 + |p|^2)/2$ exactly and kicks with $U - |q|^2/2$.

    A step is kick(b), rotate(ε/2), kick(1 − 2b), rotate(ε/2), kick(b), two gradients. Where the target is nearly a
    standard normal, in however many dimensions, the step is limited by what is *not* normal, and not by the dimension
    (Shahbaba et al. 2014, Stat. Comput. 24, 339; Beskos et al. 2011, Stoch. Proc. Appl. 121, 2201).
    """
    value_and_grad = jax.value_and_grad(log_density)

    def step(state, step_size):
        q, p, value, gradient = state
        for weight in KICKS[:2]:
            p = kick(q, p, gradient, weight * step_size)
            q, p = rotate(q, p, step_size / 2)
            value, gradient = value_and_grad(q)
        return type(state)(q, kick(q, p, gradient, KICK * step_size), value, gradient)

    return step
