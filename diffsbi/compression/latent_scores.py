"""Statistics from gradients of the simulator alone: scores at one theta, at latents that the data suggest."""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, check_finite, check_trailing, checked_rows
from diffsbi.inference.frames import pack_frame
from diffsbi.integrators import QUARTER_TURN, kick, rotate
from diffsbi.prior import Prior
from diffsbi.simulators.averaging import energy_lost, energy_slack, evaluator, unevaluated
from diffsbi.simulators.base import draw_shapes

_FEWEST_STEPS = 4  # of a quarter turn
_FEW_LATENTS = 5 * 64**2  # for which so many do


def steps_of_a_turn(n_latents: int) -> int:
    """Of quarter turns of so many latents, by default: four, and as their fourth root from 64² × 5 on."""
    return max(_FEWEST_STEPS, round(_FEWEST_STEPS * (n_latents / _FEW_LATENTS) ** 0.25))


class _ScoresAtOnePoint(eqx.Module):
    """What statistics made of joint scores at `theta0` share; what depends on `theta0` alone is computed once."""

    sim: Any
    theta0: Float[Array, " p"]
    state: Any
    jacobian: Any
    latents: str = eqx.field(static=True)

    def _set(self, sim, theta0, latents: str):
        self.sim = sim
        self.theta0 = checked_point(sim, theta0)
        sim.transport(latents)
        self.latents = latents
        self.state, self.jacobian = setup_and_jacobian(sim, self.theta0)

    @abstractmethod
    def __call__(self, x: Array) -> Array:
        """The numbers of one data set."""

    def many(self, x, *, progress: bool = False) -> Array:
        """The numbers of every row of `x`.

        Raises:
            ValueError: Rows of another shape than the simulator's data, or not finite.
        """
        return _of_every_row(self, x, self._shape, progress)

    @property
    def _shape(self) -> tuple[int, ...]:
        return draw_shapes(self.sim)[2].shape

    def _start(self, x: Array):
        r"""The state at $\xi = 0$, and the function of $\xi$ that returns the state there: one gradient."""
        check_trailing("x", x, self._shape)
        transport = self.sim.transport(self.latents)
        white = self.sim.latents(self.state).sample(jax.random.key(0))
        shape = jax.eval_shape(lambda: transport.from_latents(self.state, white, x)[0])
        evaluate = functools.partial(evaluator(self.sim, x, self.latents), self.state)
        return jnp.zeros(shape.shape, shape.dtype), evaluate

    def _score(self, of_state) -> Float[Array, " p"]:
        return chain_rule(of_state, self.jacobian)


class LatentScores(_ScoresAtOnePoint):
    r"""$x \to \nabla_\theta \log p(x, \xi_k(x) | \theta_0)$ at a few latents $\xi_k(x)$, `(len(rates) + 1) p` numbers.

    With `last=True` only those at the last of these latents, p numbers.

    The marginal score at $\theta_0$ is the best statistic there is near it: the mean of the joint score over the
    latents that the data allow. In coordinates where these are nearly a standard normal whatever the data ("whitened")
    the score at $\xi = 0$ stands for that mean; what is not normal moves it, so it is taken again after steps of
    gradient ascent $\xi \leftarrow \xi + a \nabla_\xi \log p(x, \xi | \theta_0)$ as well. It costs a gradient each,
    needs no training, and is a deterministic function of x. `MarginalScore` takes the mean itself, for more gradients.

    Single objects give these numbers heavy tails; `fit_compressor(key, eqx.nn.Identity(), theta, scores, ...)` bounds
    them and makes one number for each parameter of them.

    Attributes:
        rates: a of each step; the first score is at $\xi = 0$, one more after each step.
        last: Whether only the score after the last step is returned.
        latents: The coordinate.
    """

    rates: tuple[float, ...] = eqx.field(static=True)
    last: bool = eqx.field(static=True)

    def __init__(
        self,
        sim,
        theta0=None,
        *,
        rates: Sequence[float] = (0.1, 0.25, 0.25, 0.25),
        last: bool = False,
        latents: str = "whitened",
    ):
        if not all(0 < rate < 2 for rate in rates):
            raise ValueError(f"Expected rates between 0 and 2, beyond which ascent diverges; got {tuple(rates)}.")
        self.rates, self.last = tuple(map(float, rates)), bool(last)
        self._set(sim, theta0, latents)

    @eqx.filter_jit
    def __call__(self, x: Array) -> Float[Array, " k_p"]:
        """The scores of one data set."""
        start, evaluate = self._start(x)

        def step(xi, rate):
            at = evaluate(xi)
            return xi + rate * at.slope, self._score(at.slope_of_setup)

        _, scores = jax.lax.scan(step, start, jnp.asarray((*self.rates, 0.0), start.dtype))
        return scores[-1] if self.last else scores.ravel()


class MarginalScore(_ScoresAtOnePoint):
    r"""$x \to E[\nabla_\theta \log p(x, \xi | \theta_0)]$ over a chain on $\xi | x, \theta_0$: `p` numbers.

    By Fisher's identity the mean is the marginal score at $\theta_0$, which is sufficient near it (locally lossless).
    The chain is Hamiltonian about a standard normal: quarter turns, each with a new momentum, made of `n_steps` steps
    kick - rotate - kick with a gradient each. It starts at $\xi = 0$, and all points of the turns after the first
    `n_burn` count. As a statistic the mean need not be exact, so there is no acceptance step: as a score it is biased
    (on 256² lensing maps by 1.4 posterior widths of w_0 with four steps a turn, .2 with eight; `path_posterior` has
    exact ones). What of the bias differs from map to map is lost as well. The energy that a step of length e changes
    by grows as e⁴ d for d latents (Beskos et al. 2013, arXiv:1001.4460): steps are as d^(1/4), four a turn at 64² × 5
    and below, eight at 256² × 5. A single object can make a step unstable: a turn over which the energy grows by more
    than `energy_slack` is undone, and steps are half as long from there on (at most four times). The momenta are the
    same for all data: a deterministic function of x, its error partly common to all.

    It costs `n_turns * n_steps + 1` gradients, and more for data that want shorter steps. Where those do not help
    either the numbers are NaN, which estimators refuse: take more steps.

    Args:
        sim: Any simulator of the protocol.
        theta0: Where the score is taken; the fiducial unless given. The nearer to the truth, the less is lost.
        n_turns: Quarter turns of the chain.
        n_burn: Those at its start that are left out.
        n_steps: Steps of each, by default by the number of latents.
        latents: The coordinate; the nearer the latents are to a standard normal in it, the fewer turns it takes.
        seed: Of the momenta.

    Raises:
        ValueError: Lengths that leave nothing to average, `theta0` of another shape or outside the prior, or an
            unknown coordinate.
    """

    n_turns: int = eqx.field(static=True)
    n_burn: int = eqx.field(static=True)
    n_steps: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __init__(self, sim, theta0=None, *, n_turns=12, n_burn=3, n_steps=None, latents="whitened", seed=0):
        if n_steps is None:
            n_steps = steps_of_a_turn(math.prod(draw_shapes(sim)[1].shape))
        if not 0 <= n_burn < n_turns or n_steps < 1:
            raise ValueError(
                "Expected 0 <= n_burn < n_turns and n_steps >= 1; "
                f"got n_burn={n_burn}, n_turns={n_turns}, n_steps={n_steps}."
            )
        self.n_turns, self.n_burn, self.n_steps, self.seed = n_turns, n_burn, n_steps, seed
        self._set(sim, theta0, latents)

    def __call__(self, x: Array) -> Float[Array, " p"]:
        """The mean score of one data set."""
        scores = self.turns(x)
        counts = jnp.isfinite(scores[:, 0]) & (jnp.arange(self.n_turns) >= self.n_burn)
        return jnp.sum(jnp.where(counts[:, None], scores, 0), 0) / jnp.sum(counts)

    @eqx.filter_jit
    def turns(self, x: Array) -> Float[Array, " n_turns p"]:
        r"""The mean score over each turn of one data set's chain, NaN where it was undone.

        Their running mean after the first `n_burn` is the number for fewer turns; their spread, as that of any chain,
        tells its error.
        """
        start, evaluate = self._start(x)
        key, zero = jax.random.key(self.seed), jax.tree.map(jnp.zeros_like, self.state)
        limit = energy_slack(start.size)

        def turn(carry, k):  # -1 evaluates the start where it is
            at, n_steps = carry
            angle = jnp.where(k < 0, 0, QUARTER_TURN / n_steps.astype(start.dtype))

            def step(_, carry):
                at, p, path = carry
                xi, p = rotate(at.xi, kick(at.xi, p, at.slope, angle / 2), angle)
                at = evaluate(xi)
                return at, kick(xi, p, at.slope, angle / 2), jax.tree.map(jnp.add, path, at.slope_of_setup)

            momentum = jax.random.normal(jax.random.fold_in(key, k), start.shape, start.dtype)
            new, p, path = jax.lax.fori_loop(0, jnp.where(k < 0, 1, n_steps), step, (at, momentum, zero))
            good = (k < 0) | (energy_lost(at, new, momentum, p) > -limit)  # not where it is NaN
            score = jnp.where(good, self._score(path) / n_steps, jnp.nan)
            at = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, at)
            return (at, jnp.where(good, n_steps, jnp.minimum(2 * n_steps, 16 * self.n_steps))), score

        carry = (unevaluated(evaluate, start), jnp.asarray(self.n_steps))
        return jax.lax.scan(turn, carry, jnp.arange(-1, self.n_turns))[1][1:]


class ScoreChange(eqx.Module):
    r"""$x \to (s(x, \theta_0), s(x, \theta_+) - s(x, \theta_-))$: scores, and their change along a direction.

    The change is the curvature of this data set's own log-likelihood, $s(\theta_+) - s(\theta_-) \approx
    \nabla\nabla\log p(x|\theta_0) (\theta_+ - \theta_-)$: what the score at one point does not tell, and what decides
    how wide the posterior is and where, if that is no normal. `2 p` numbers for the price of three scores.

    Momenta of `MarginalScore` are the same at the three points: most of their noise is, and is not in the difference.

    Args:
        at: theta → statistic, as `functools.partial(MarginalScore, sim)`.
        prior: A `Prior`, or anything with a `prior` (a simulator).
        theta0: The centre.
        step: $\pm$ this, in unconstrained space, lead to $\theta_\pm$: about a width of the posterior in the direction
            along which it is least normal (`GaussianProposal.along`).

    Raises:
        ValueError: A step that is zero, not finite or of another shape than theta.
    """

    centre: Callable[[Array], Array]
    below: Callable[[Array], Array]
    above: Callable[[Array], Array]

    def __init__(self, at: Callable[[Array], Any], prior, theta0, step):
        prior = prior if isinstance(prior, Prior) else prior.prior
        step = jnp.asarray(step, jnp.result_type(float))
        check_trailing("step", step, (prior.dim,))
        if step.shape != (prior.dim,) or not np.all(np.isfinite(step)) or not np.any(step):
            raise ValueError(f"Expected a step of {prior.dim} finite numbers, not all zero; got {step}.")
        theta0 = jnp.asarray(theta0, jnp.result_type(float))
        prior.check(theta0[None])
        u = prior.to_unconstrained(theta0)
        self.centre = at(theta0)
        self.below, self.above = (at(prior.from_unconstrained(u + sign * step)) for sign in (-1, 1))

    def __call__(self, x: Array) -> Float[Array, " 2p"]:
        """The numbers of one data set."""
        return jnp.concatenate([self.centre(x), self.above(x) - self.below(x)])

    def many(self, x, *, progress: bool = False) -> Float[Array, "n 2p"]:
        """The numbers of every row of `x`."""
        return _of_every_row(self, x, np.shape(x)[1:], progress)


class ScoreFrame(eqx.Module):
    r"""The normal approximation of one observation's posterior, moved to other data by their scores (`pack_frame`).

    $x \to N(m + C J^T (s(x) - s(x_o)), C)$ in the prior's unconstrained space, with m and C the moments of draws of the
    posterior of $x_o$, s scores at $\theta_0$ and $J = \partial\theta/\partial u$ there: a step of Newton's method with
    the curvature at $x_o$. What all scores have in common, as the bias of short chains, cancels. From there
    `NPE(sim, framed=True)` learns, from simulations of about the same place, what is wrong with it: widths, where the
    curvature at x is another. Numbers that tell it may follow the score, and are then passed on behind the frame's:
    with `at=functools.partial(ScoreChange, at, sim, step=step)` the change of the score along a direction.

    Args:
        at: theta → score of one data set, as `functools.partial(MarginalScore, sim)`, or numbers that begin with it.
        prior: A `Prior`, or anything with a `prior` (a simulator).
        theta0: Where scores are taken.
        x: The observation.
        theta: Draws of its posterior, `(n, p)`, from `path_posterior`, say.

    Raises:
        ValueError: Draws of the wrong shape, too few of them, not finite or outside the prior; or a score of x that is
            not finite.
    """

    score: Callable[[Array], Array]
    mean: Float[Array, " p"]
    root: Float[Array, "p p"]
    gain: Float[Array, "p p"]
    observed: Float[Array, " p"]
    shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(self, at: Callable[[Array], Any], prior, theta0, x, theta):
        prior = prior if isinstance(prior, Prior) else prior.prior
        mean, covariance = prior.unconstrained_moments(theta)
        theta0 = jnp.asarray(theta0, jnp.result_type(float))
        prior.check(theta0[None])
        jacobian = np.asarray(jax.jacfwd(prior.from_unconstrained)(prior.to_unconstrained(theta0)), float)
        moments = (mean, np.linalg.cholesky(covariance), covariance @ jacobian.T)
        self.mean, self.root, self.gain = (jnp.asarray(a, jnp.result_type(float)) for a in moments)
        self.score = at(theta0)
        self.shape = tuple(np.shape(x))
        self.observed = self.score(jnp.asarray(x, jnp.result_type(float)))[: prior.dim]
        check_finite("score of the observation", self.observed)

    def __call__(self, x: Array) -> Float[Array, " k"]:
        """The numbers of the normal of one data set."""
        numbers = self.score(x)
        score, more = numbers[: len(self.mean)], numbers[len(self.mean) :]
        return jnp.concatenate([pack_frame(self.mean + self.gain @ (score - self.observed), self.root), more])

    def many(self, x, *, progress: bool = False) -> Float[Array, "n k"]:
        """Those of every row of `x`."""
        return _of_every_row(self, x, self.shape, progress)


def _of_every_row(statistic: Callable[[Array], Array], x, shape: tuple[int, ...], progress: bool) -> Array:
    rows = tqdm(checked_rows(x, shape), desc=type(statistic).__name__, unit="row", disable=not progress)
    return jnp.stack([statistic(row) for row in rows])


def checked_point(sim, theta0) -> Float[Array, " p"]:
    """The fiducial where `theta0` is None.

    Raises:
        ValueError: `theta0` of another shape or outside the prior.
    """
    theta0 = sim.fiducial if theta0 is None else jnp.asarray(theta0, jnp.result_type(float))
    check_trailing("theta0", theta0, (sim.prior.dim,))
    sim.prior.check(theta0[None])
    return theta0


@eqx.filter_jit
def setup_and_jacobian(sim, theta0: Float[Array, " p"]):
    """What theta fixes and its derivatives: computed once for all data at one theta."""
    return sim.setup(theta0), jax.jacfwd(sim.setup)(theta0)


def chain_rule(of_setup, jacobian) -> Float[Array, " p"]:
    """The gradient in theta, from that in what theta fixes."""
    parts = jax.tree.leaves(jax.tree.map(lambda a, j: jnp.tensordot(a, j, a.ndim), of_setup, jacobian))
    return sum(parts[1:], start=parts[0])
