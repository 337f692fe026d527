r"""Scores with little noise: the joint score averaged over states of exact chains on the latents."""

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


def unevaluated(evaluate: Callable[[Array], State], xi: Array) -> State:
    """A state at xi that is still to be evaluated, by the loop over all further states.

    With a gradient before the loop and one in it compilation takes twice as long.
    """
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(evaluate, xi))
    return empty._replace(xi=xi)


def best_steps(acceptance_with: Callable[[int], float], most: int = 12) -> int:
    """Steps of a quarter turn with the most acceptance for their number: more are tried while they could be better."""
    best, steps = 0.0, 1
    for n_steps in range(1, most + 1):
        if 1 / n_steps <= best:
            break
        best, steps = max((best, steps), (acceptance_with(n_steps) / n_steps, n_steps), key=lambda pair: pair[0])
    return steps


def average_score(
    sim, theta: Float[Array, " p"], z: Array, x: Array, key: Key, *, latents: str, n_average, n_steps
) -> tuple[Float[Array, " p"], Array]:
    r"""$\nabla_\theta \log p(x, \xi | \theta)$ averaged over K states of Markov chains on $\xi | x, \theta$.

    They start at the simulation's own latents, which are a draw of $p(z | x, \theta)$: in equilibrium from the first
    state, so that the average has the marginal score $\nabla_\theta\log p(x | \theta)$ as its mean given (theta, x).
    Nothing is adapted to the state. What depends on theta alone is computed, and differentiated, once for all K.

    The states are the ends of all steps of a trajectory about a standard normal, at most once around. Where on it the
    chain starts is drawn: each place is equally likely, and the other states are before and after it. Given the
    trajectory, the start was its state k with probability $w_k \propto e^{-H_k}$ (multinomial Hamiltonian Monte Carlo:
    Betancourt 2017, arXiv:1701.02434), so $\sum_k w_k s_k$ is unbiased whatever the step. Up to a quarter turn it
    starts at one of the two ends, and they alone count: what is between is too like them. Scores odd in $\xi$ cancel
    between opposite states (K > 2 `n_steps`), which those of independent momenta would only average; the noise of
    quadratic ones is halved after a quarter turn and no less after more of it. The next trajectory, with a new
    momentum, starts at a state drawn by these weights; trajectories count by their numbers of states. Best is K =
    4 `n_steps`, once around, or that with whole trajectories of 4 `n_steps` - 1 more.

    Args:
        sim: Any simulator of the protocol.
        theta: Parameters.
        z: The simulation's own (white) latents.
        x: Its data.
        key: Momenta and choices.
        latents: The coordinate, of the chain and of the score.
        n_average: K, the simulation's own state included; at least 2.
        n_steps: Steps of a quarter turn; once around are four times as many states.

    Returns:
        The average `(p,)` and the mean of min(1, $e^{H - H'}$), H at the start of a trajectory and H' at another of its
        states. It takes 2 (K - 1) + 1 gradients.
    """
    setup, pull_back = jax.vjp(sim.setup, theta)
    xi, _ = sim.transport(latents).from_latents(setup, z, x)
    evaluate = functools.partial(evaluator(sim, x, latents), setup)

    once_around = 4 * n_steps - 1  # one more step, and it would be back at its start

    def step(k, carry):  # the first only evaluates the state where it is
        path, total, count, acceptance = carry
        place, (key_begin, key_choice) = (k - 1) % once_around, jax.random.split(jax.random.fold_in(key, k))
        most = jnp.minimum(once_around, n_average - k)  # steps of a trajectory that starts here
        path = jax.lax.cond(place == 0, lambda: _begin(path.chosen, key_begin, most, n_steps), lambda: path)
        counts = (path.most > n_steps) | (place + 1 == path.most)
        path = _extended(evaluate, path, place, counts, key_choice, QUARTER_TURN / n_steps, k == 0)
        states = jnp.where((k > 0) & (place + 1 == path.most), place + 2, 0)  # none before its end
        total = jax.tree.map(lambda a, mean: a + states * mean, total, path.mean)
        accepted = jnp.where(k > 0, jnp.minimum(1.0, jnp.exp(path.log_weight)), 0)
        path = _where(k > 0, path, _at(path.end, path.moved, 0, 0))
        return path, total, count + states, acceptance + accepted

    first = unevaluated(evaluate, xi)
    start = (_at(first, jnp.zeros_like(xi), 0, 0), first.slope_of_setup, 0, first.value)
    _, total, count, acceptance = jax.lax.fori_loop(0, n_average, step, start)
    (score,) = pull_back(jax.tree.map(lambda a: a / count, total))
    return score, acceptance / (n_average - 1)


class _Trajectory(NamedTuple):
    """States a step apart: those where it starts and ends, the mean of all their scores by weight, one of them."""

    start: State
    momentum: Array
    most: Array  # steps that there will be
    ahead: Array  # of them after the start; the others are before it
    end: State
    moved: Array  # momentum at the end
    log_weight: Array  # of the end, that of the start is zero
    log_total: Array
    mean: Any
    chosen: State


def _at(state: State, momentum: Array, most, ahead) -> _Trajectory:
    zero = jnp.zeros_like(state.value)
    most, ahead = jnp.asarray(most, jnp.int32), jnp.asarray(ahead, jnp.int32)
    return _Trajectory(state, momentum, most, ahead, state, momentum, zero, zero, state.slope_of_setup, state)


def _begin(state: State, key: Key, most, n_steps) -> _Trajectory:
    """A trajectory of one state, with a new momentum and place among the `most` + 1 that there will be."""
    key_p, key_ahead = jax.random.split(key)
    momentum = jax.random.normal(key_p, state.xi.shape, state.xi.dtype)
    ahead = jax.random.randint(key_ahead, (), 0, jnp.where(most > n_steps, most, 1) + 1, jnp.int32)
    return _at(state, momentum, most, jnp.where(most > n_steps, ahead, most * ahead))


def _extended(evaluate, path: _Trajectory, place, counts, key: Key, angle, still=False) -> _Trajectory:
    """The trajectory with its step number `place`: on from its end, then backwards from its start."""
    back = place == path.ahead
    origin = path.start, -path.momentum, jnp.zeros_like(path.log_weight)
    here, momentum, log_weight = _where(back, origin, (path.end, path.moved, path.log_weight))
    new, moved, change = _steps(evaluate, here, momentum, angle, 1, still)
    log_weight = jnp.where(jnp.isfinite(change), log_weight + change, -jnp.inf).astype(path.log_weight.dtype)
    counted = jnp.where(counts, log_weight, -jnp.inf)
    log_total = jnp.logaddexp(path.log_total, counted)
    share = jnp.exp(counted - log_total)
    score = _where(share > 0, new.slope_of_setup, path.mean)  # lest zero times what is not finite
    mean = jax.tree.map(lambda m, s: (m + share * (s - m)).astype(m.dtype), path.mean, score)
    chosen = _where(jax.random.uniform(key, dtype=share.dtype) < share, new, path.chosen)
    return path._replace(end=new, moved=moved, log_weight=log_weight, log_total=log_total, mean=mean, chosen=chosen)


def _where(condition, yes, no):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _steps(evaluate, state: State, momentum: Array, angle, n_steps, still=False) -> tuple[State, Array, Array]:
    """The state and the momentum after so many steps of an `angle`, and the energy lost: two gradients a step.

    The same state, evaluated by one gradient, where it is to stand `still`: no energy is lost.
    """
    dtype = state.xi.dtype
    step = jnp.where(still, 0, angle).astype(dtype)

    def half_step(i, carry):
        new, p = carry
        # The last kick of a step and the first of the next are one.
        outer = jnp.where(i == 0, KICKS[0], 2 * KICKS[0])
        weight = jnp.where(i % 2 == 0, outer, KICKS[1]).astype(dtype)
        q, p = rotate(new.xi, kick(new.xi, p, new.slope, weight * step), step / 2)
        return evaluate(q), p

    new, p = jax.lax.fori_loop(0, jnp.where(still, 1, 2 * n_steps), half_step, (state, momentum))
    p = kick(new.xi, p, new.slope, KICKS[2] * step)
    return new, p, jnp.where(still, 0, energy_lost(state, new, momentum, p))


def quarter_turn(evaluate, state: State, key: Key, n_steps, slack=0.0, still=False) -> tuple[State, State, Array]:
    r"""A quarter turn with a new momentum: 2 `n_steps` gradients.

    Args:
        evaluate: xi → `State`.
        state: Where it starts.
        key: Momentum and acceptance.
        n_steps: Steps.
        slack: Accepted in any case if the energy grows by less; a chain that has yet to come to where it belongs would
            stand still without it.
        still: Whether the state is only evaluated (`unevaluated`): one gradient, acceptance 1.

    Returns:
        The state after the turn, that at the trajectory's end whether accepted or not, and the Metropolis acceptance.
    """
    key_p, key_u = jax.random.split(key)
    momentum = jax.random.normal(key_p, state.xi.shape, state.xi.dtype)
    new, _, change = _steps(evaluate, state, momentum, QUARTER_TURN / n_steps, n_steps, still)
    acceptance = jnp.where(jnp.isfinite(change), jnp.minimum(1.0, jnp.exp(change)), 0.0).astype(state.value.dtype)
    accepted = (jax.random.uniform(key_u, dtype=acceptance.dtype) < acceptance) | (change > -slack)
    return _where(accepted, new, state), new, acceptance
