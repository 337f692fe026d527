r"""Scores with little noise: the joint score averaged over exact posterior draws of the latents."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, Key
from diffsbi.integrators import KICKS, QUARTER_TURN, kick, rotate

LOW_ACCEPTANCE = 0.3
"""Of a chain of latents: below it is slow to forget, and users are told."""


class State(NamedTuple):
    """A state of a chain: where it is, and the log-density with its slopes in the latents and in what theta fixes."""

    xi: Array
    value: Array
    slope: Array
    slope_of_setup: Any


def energy_lost(before: State, after: State, momentum: Array, moved: Array) -> Array:
    r"""$H - H'$ of a trajectory, $H = -\log p(x, \xi) + |p|^2/2$; p is `momentum` at its start and `moved` at its end.

    Differences come first: in 10^5 dimensions the energies themselves are too large for float32.
    """
    return (after.value - before.value) - 0.5 * jnp.sum((moved - momentum) * (moved + momentum))


def energy_slack(dim: int) -> float:
    r"""$10 + \sqrt{d} / 10$, far beyond what the energy grows by over a turn of good steps in d dimensions."""
    return 10 + 0.1 * math.sqrt(dim)


def evaluator(sim, x: Array, latents: str) -> Callable[[Any, Array], State]:
    r"""The function of (setup, $\xi$) that returns the `State` at $\xi$ for data x: one gradient."""
    transport = sim.transport(latents)

    def density(xi, setup):
        return sim.log_conditional_of(setup, xi, x, transport)

    def evaluate(setup, xi) -> State:
        value, (slope, slope_of_setup) = jax.value_and_grad(density, (0, 1))(xi, setup)
        return State(xi, value, slope, slope_of_setup)

    return evaluate


def best_steps(acceptance_with: Callable[[int], float], most: int = 12) -> int:
    """Steps of a trajectory with the most acceptance per gradient: more are tried while they could still be better."""
    best, steps = 0.0, 1
    for n_steps in range(1, most + 1):
        if 1 / n_steps <= best:
            break
        best, steps = max((best, steps), (acceptance_with(n_steps) / n_steps, n_steps), key=lambda pair: pair[0])
    return steps


def average_score(
    sim, theta: Float[Array, " p"], z: Array, x: Array, key: Key, *, latents: str, n_average, n_steps
) -> tuple[Float[Array, " p"], Array]:
    r"""$\frac1K \sum_k \nabla_\theta \log p(x, \xi_k | \theta)$ over K states of a Markov chain on $\xi | x, \theta$.

    The chain starts at the simulation's own latents, which are a draw of $p(z | x, \theta)$: it is in equilibrium from
    the first state, so that every term, and the average, has the marginal score $\nabla_\theta\log p(x | \theta)$ as
    its mean given (theta, x). It is Metropolis-adjusted Hamiltonian Monte Carlo about a standard normal, with
    trajectories of a quarter turn; nothing is adapted to the state. What depends on theta alone is computed, and
    differentiated, once for all K states.

    Args:
        sim: Any simulator of the protocol.
        theta: Parameters.
        z: The simulation's own (white) latents.
        x: Its data.
        key: Momenta and acceptances.
        latents: The coordinate, of the chain and of the score.
        n_average: K, the simulation's own state included; at least 2.
        n_steps: Steps of a trajectory; each takes two gradients.

    Returns:
        The average `(p,)` and the mean acceptance probability. It takes 2 (K - 1) n_steps + 1 gradients.
    """
    setup, pull_back = jax.vjp(sim.setup, theta)
    xi, _ = sim.transport(latents).from_latents(setup, z, x)
    evaluate = functools.partial(evaluator(sim, x, latents), setup)

    def transition(k, carry):
        state, total, acceptance = carry
        state, _, accepted = quarter_turn(evaluate, state, jax.random.fold_in(key, k), n_steps)
        return state, jax.tree.map(jnp.add, total, state.slope_of_setup), acceptance + accepted

    first = evaluate(xi)
    start = (first, first.slope_of_setup, jnp.zeros_like(first.value))
    _, total, acceptance = jax.lax.fori_loop(1, n_average, transition, start)
    (score,) = pull_back(jax.tree.map(lambda a: a / n_average, total))
    return score, acceptance / (n_average - 1)


def quarter_turn(evaluate, state: State, key: Key, n_steps, slack=0.0) -> tuple[State, State, Array]:
    r"""A quarter turn with a new momentum: 2 `n_steps` gradients.

    Args:
        evaluate: xi → `State`.
        state: Where it starts.
        key: Momentum and acceptance.
        n_steps: Steps.
        slack: Accepted in any case if the energy grows by less; a chain that has yet to come to where it belongs would
            stand still without it.

    Returns:
        The state after the turn, that at the trajectory's end whether accepted or not, and the Metropolis acceptance.
    """
    key_p, key_u = jax.random.split(key)
    dtype = state.xi.dtype
    step = jnp.asarray(QUARTER_TURN / n_steps, dtype)
    momentum = jax.random.normal(key_p, state.xi.shape, dtype)

    def half_step(i, carry):
        new, p = carry
        # The last kick of a step and the first of the next are one.
        outer = jnp.where(i == 0, KICKS[0], 2 * KICKS[0])
        weight = jnp.where(i % 2 == 0, outer, KICKS[1]).astype(dtype)
        q, p = rotate(new.xi, kick(new.xi, p, new.slope, weight * step), step / 2)
        return evaluate(q), p

    new, p = jax.lax.fori_loop(0, 2 * n_steps, half_step, (state, momentum))
    p = kick(new.xi, p, new.slope, KICKS[2] * step)
    change = energy_lost(state, new, momentum, p)
    acceptance = jnp.where(jnp.isfinite(change), jnp.minimum(1.0, jnp.exp(change)), 0.0).astype(state.value.dtype)
    accepted = (jax.random.uniform(key_u, dtype=acceptance.dtype) < acceptance) | (change > -slack)
    return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, state), new, acceptance
