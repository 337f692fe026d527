r"""A chain of latents that goes with the parameters along a path: the marginal score at each of its points."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Key
from diffsbi.simulators.averaging import energy_slack, evaluator, quarter_turn, unevaluated

LEAST_ACCEPTANCE, MOST_STEPS = 0.7, 16
BURN_IN = 4  # quarter turns between two looks at the acceptance, before the path begins


class PathError(RuntimeError):
    """A path of which no posterior can be had."""


class Walk:
    """The chain of latents that goes with theta; `state` is all that a later round depends on."""

    def __init__(self, sim, x, xi, key, latents: str):
        self.sim, self.x, self.key, self.latents = sim, x, key, latents
        self.slack = energy_slack(xi.size)
        self.state = dict(xi=xi, n_steps=np.asarray(2), gradients=np.asarray(0))

    @property
    def gradients(self) -> int:
        return int(self.state["gradients"])

    def round(self, k: int, points: np.ndarray, n_turns: int) -> dict[str, np.ndarray]:
        """Scores at the points of round k; the chain is brought to the first round's mean before it."""
        key = jax.random.fold_in(self.key, k)
        if k == 0:
            self._burn_in(points.mean(0), jax.random.fold_in(key, len(points)))
        rows = [self._visit(u, jax.random.fold_in(key, i), n_turns, 0.0) for i, u in enumerate(points)]
        scores, acceptance = np.stack([row[0] for row in rows]), np.asarray([row[1] for row in rows])
        bad = ~np.isfinite(scores).all(1)
        if bad.mean() > 0.5:
            example = np.asarray(self.sim.prior.from_unconstrained(jnp.asarray(points[bad][0]))).tolist()
            raise PathError(
                f"The score is not finite at {bad.sum()} of {len(points)} parameters of round {k}, such as {example}; "
                "start from draws of a first posterior (start=...), or look at the simulator there."
            )
        if not acceptance[~bad].max() > 0:
            raise PathError(
                f"The latents did not move at any parameters of round {k}, in steps of a quarter turn over "
                f"{int(self.state['n_steps'])}: they are far from a standard normal in the coordinate "
                f"{self.latents!r}. Choose another, or sample with `full_field_posterior`."
            )
        self._shorter(acceptance.mean())
        return dict(u=points[~bad], scores=scores[~bad], acceptance=acceptance[~bad])

    def _burn_in(self, u: np.ndarray, key: Key) -> None:
        for i in range(2 * MOST_STEPS):
            _, acceptance = self._visit(u, jax.random.fold_in(key, i), BURN_IN, self.slack)
            if i > 0 and not self._shorter(acceptance):
                return

    def _shorter(self, acceptance: float) -> bool:
        """More and shorter steps if too few are accepted."""
        more = int(acceptance < LEAST_ACCEPTANCE) + int(acceptance < LEAST_ACCEPTANCE - 0.2)
        self.state["n_steps"] = np.minimum(self.state["n_steps"] + more, MOST_STEPS)
        return more > 0

    def _visit(self, u, key, n_turns: int, slack: float) -> tuple[np.ndarray, float]:
        n_steps = int(self.state["n_steps"])
        u, xi = jnp.asarray(u, self.x.dtype), jnp.asarray(self.state["xi"])
        counts = (jnp.asarray(n_steps), jnp.asarray(n_turns), jnp.asarray(self.slack), jnp.asarray(slack))
        new, score, acceptance = _visit(self.sim, self.x, u, xi, key, *counts, latents=self.latents)
        if bool(jnp.isfinite(score).all()):
            self.state["xi"] = new
        self.state["gradients"] = self.state["gradients"] + 1 + 2 * n_steps * (n_turns + 1)
        return np.asarray(score, float), float(acceptance)


@eqx.filter_jit
def _visit(sim, x, u, xi, key, n_steps, n_turns, slack_at_first, slack, *, latents):
    """The latents after, and the mean score over, `n_turns` turns at u; the turn before them is not counted."""
    setup, pull_back = jax.vjp(lambda u: sim.setup(sim.prior.from_unconstrained(u)), u)
    evaluate = functools.partial(evaluator(sim, x, latents), setup)
    key_first, key = jax.random.split(key)

    def turn(k, carry):  # -2 evaluates the state where it is, -1 is not counted
        state, total, accepted = carry
        key_turn = jnp.where(k < 0, key_first, jax.random.fold_in(key, k))
        of_turn = jnp.where(k < 0, slack_at_first, slack)
        after, end, acceptance = quarter_turn(evaluate, state, key_turn, n_steps, of_turn, still=k == -2)

        def add(total, end, start):  # what was proposed counts as often as it would be accepted
            mean = jnp.where(acceptance > 0, acceptance * end, 0) + (1 - acceptance) * start
            return jnp.where(k < 0, total, total + mean)

        total = jax.tree.map(add, total, end.slope_of_setup, state.slope_of_setup)
        return after, total, jnp.where(k < 0, accepted, accepted + acceptance)

    start = unevaluated(evaluate, xi)
    state, total, accepted = jax.lax.fori_loop(-2, n_turns, turn, (start, start.slope_of_setup, start.value))
    (score,) = pull_back(jax.tree.map(lambda a: a / n_turns, total))
    return state.xi, score, accepted / n_turns
