r"""Hamiltonian Monte Carlo about a standard normal: the sampler for whitened coordinates."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from blackjax.adaptation.step_size import dual_averaging_adaptation
from blackjax.mcmc import hmc as blackjax_hmc
from blackjax.mcmc.integrators import velocity_verlet

from diffsbi._types import Array, Float
from diffsbi.integrators import gaussian_split
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.kernels import UNKNOWN, AbstractKernel, Record, all_finite, size
from diffsbi.sampling.runner import sample

AIM = 0.2
"""BlackJAX's dual averaging is drawn towards ten times the value that it starts from; with this, towards twice."""


def damped_dual_averaging(target_accept: float):
    """BlackJAX's, with a tenth of the usual swings: a step that is far too small costs hundreds of gradients."""
    return dual_averaging_adaptation(target_accept, gamma=0.5)


INTEGRATORS: dict[str, tuple[Callable, int]] = {"split": (gaussian_split, 2), "leapfrog": (velocity_verlet, 1)}
"""Name → (integrator in BlackJAX's form, gradients of a step)."""


class _Frame(NamedTuple):
    """The adapted entry is centre + root · w; w is what the chain moves in."""

    centre: Array
    root: Array


class _Spread(NamedTuple):
    """Welford's running mean and scatter of the adapted entry within a warm-up window."""

    n: Array
    mean: Array
    scatter: Array


class _State(NamedTuple):
    hmc: blackjax_hmc.HMCState
    key: Array
    i: Array
    step_size: Array
    dual: Any
    frame: _Frame
    spread: _Spread


class HMCKernel(AbstractKernel):
    """HMC with trajectories of random length; step size and the frame of one entry are adapted in warm-up."""

    log_density: Callable
    n_warmup: int = eqx.field(static=True)
    adapt: str | None = eqx.field(static=True)
    trajectory: float = eqx.field(static=True)
    target_accept: float = eqx.field(static=True)
    step_size: float = eqx.field(static=True)
    integrator: str = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __check_init__(self):
        if not 0 < self.target_accept < 1 or not self.step_size > 0 or not self.trajectory > 0 or self.max_steps < 1:
            got = f"{self.target_accept}, {self.step_size}, {self.trajectory} and {self.max_steps}"
            raise ValueError(
                f"Expected 0 < target_accept < 1, step_size > 0, trajectory > 0 and max_steps >= 1; got {got}."
            )
        if self.integrator not in INTEGRATORS:
            raise ValueError(f"Expected integrator {' or '.join(map(repr, INTEGRATORS))}; got {self.integrator!r}.")

    def account(self):
        names = ("n_warmup", "adapt", "trajectory", "target_accept", "step_size", "integrator", "max_steps")
        most = self.max_steps * INTEGRATORS[self.integrator][1]
        return dict({name: getattr(self, name) for name in names}, sampler="hmc", max_gradients=most)

    def start(self, position, key):
        if self.adapt is not None and not (isinstance(position, dict) and jnp.ndim(position.get(self.adapt, 0.0)) == 1):
            raise ValueError(f"Expected adapt to name a vector of a dictionary position; got {self.adapt!r}.")
        dim = 0 if self.adapt is None else position[self.adapt].size
        dtype = jnp.result_type(float)
        frame = _Frame(jnp.zeros(dim, dtype), jnp.eye(dim, dtype=dtype))
        init, _, _ = self._dual_averaging()
        # The first step, of length zero, is accepted from any energy.
        first = blackjax_hmc.HMCState(position, jnp.asarray(UNKNOWN, dtype), jax.tree.map(jnp.zeros_like, position))
        step_size = jnp.asarray(self.step_size, dtype)
        return _State(first, key, jnp.asarray(-1), step_size, init(AIM * step_size), frame, _no_spread(dim, dtype))

    def position(self, state):
        return self._outward(state.hmc.position, state.frame)

    def step(self, state: _State):
        key, key_hmc, key_length = jax.random.split(state.key, 3)
        starting = state.i < 0
        integrator, gradients = INTEGRATORS[self.integrator]
        # Random lengths, in whole steps no longer than the adapted one: a fixed length resonates with some direction.
        length = self.trajectory * jax.random.uniform(key_length, minval=0.6, maxval=1.4)
        steps = jnp.where(starting, 1, jnp.clip(jnp.ceil(length / state.step_size), 1, self.max_steps)).astype(int)
        step_size = jnp.where(starting, 0.0, jnp.minimum(length / steps, state.step_size))
        density = eqx.Partial(self._inner_density, state.frame)
        kernel = blackjax_hmc.build_kernel(integrator)
        unit = jnp.ones(size(state.hmc.position), jnp.result_type(float))
        before = state.hmc.logdensity
        new, info = kernel(key_hmc, state.hmc, density, step_size, unit, steps)
        state = state._replace(hmc=new, key=key, i=state.i + 1)
        adapted = self._adapt(state, jnp.where(jnp.isfinite(info.acceptance_rate), info.acceptance_rate, 0.0))
        diverging = jnp.where(starting, ~all_finite(new), info.is_divergent)
        kinetic = 0.5 * sum(jnp.sum(p**2) for p in jax.tree.leaves(info.momentum))
        energy = jnp.where(starting, -new.logdensity, kinetic - before)
        record = Record(new.logdensity, energy, diverging, gradients * steps, state.step_size)
        keep = starting | (state.i > self.n_warmup)
        return jax.lax.cond(keep, lambda: state, lambda: adapted), record

    # -- warm-up ---------------------------------------------------------------------------------------------------

    def _dual_averaging(self):
        return damped_dual_averaging(self.target_accept)

    def _capped(self, step_size):
        return jnp.minimum(step_size, 1.4 * self.trajectory)  # a normal target accepts any step

    @property
    def _windows(self) -> tuple[int, ...]:
        """Transitions after which the frame is set anew from the window that ends there."""
        return tuple(int(f * self.n_warmup) for f in (0.15, 0.4, 0.8)) if self.adapt and self.n_warmup >= 60 else ()

    def _adapt(self, state: _State, acceptance) -> _State:
        init, update, final = self._dual_averaging()
        dual = update(state.dual, acceptance)
        last = state.i >= self.n_warmup
        step_size = jnp.where(last, final(dual), jnp.exp(dual.log_step_size))
        step_size = self._capped(step_size)
        state = state._replace(dual=dual, step_size=step_size.astype(state.step_size.dtype))
        if not self._windows:
            return state
        state = state._replace(spread=_include(state.spread, self.position(state)[self.adapt]))
        ends = jnp.asarray(self._windows) == state.i
        return jax.lax.cond(ends.any(), lambda: self._reframe(state), lambda: state)

    def _reframe(self, state: _State) -> _State:
        """Centre and width of the window's draws; the first window only moved to where the posterior is."""
        init, _, final = self._dual_averaging()
        n, mean, scatter = state.spread
        dim = mean.size
        covariance = scatter / jnp.maximum(n - 1, 1)
        weight = n / (n + 5.0 * dim)
        shrunk = weight * covariance + (1 - weight) * state.frame.root @ state.frame.root.T
        first = state.i == self._windows[0]
        new = _Frame(mean, jnp.where(first, state.frame.root, jnp.linalg.cholesky(shrunk)))
        hmc = self._change(state.hmc, state.frame, new)
        step_size = self._capped(final(state.dual)).astype(state.step_size.dtype)
        fresh = _no_spread(dim, mean.dtype)
        return state._replace(hmc=hmc, frame=new, spread=fresh, dual=init(AIM * step_size), step_size=step_size)

    def _change(self, hmc, old: _Frame, new: _Frame):
        """The same state in another frame: nothing is evaluated anew."""
        w, slope = hmc.position[self.adapt], hmc.logdensity_grad[self.adapt]
        inward = jnp.linalg.solve(new.root, old.centre + old.root @ w - new.centre)
        slope = new.root.T @ jnp.linalg.solve(old.root.T, slope)
        position = dict(hmc.position, **{self.adapt: inward})
        return hmc._replace(position=position, logdensity_grad=dict(hmc.logdensity_grad, **{self.adapt: slope}))

    def _outward(self, position, frame: _Frame):
        if self.adapt is None:
            return position
        return dict(position, **{self.adapt: frame.centre + frame.root @ position[self.adapt]})

    def _inner_density(self, frame: _Frame, position):
        return self.log_density(self._outward(position, frame))


def _no_spread(dim: int, dtype) -> _Spread:
    return _Spread(jnp.zeros((), dtype), jnp.zeros(dim, dtype), jnp.zeros((dim, dim), dtype))


def _include(spread: _Spread, value: Float[Array, " p"]) -> _Spread:
    n = spread.n + 1
    first = value - spread.mean
    mean = spread.mean + first / n
    return _Spread(n, mean, spread.scatter + first[:, None] * (value - mean)[None, :])


def hmc(
    log_density: Callable[[Any], Array],
    init,
    key,
    n_warmup: int,
    n_samples: int,
    *,
    adapt: str | None = None,
    trajectory: float = 2.0,
    target_accept: float = 0.8,
    step_size: float = 0.3,
    integrator: str = "split",
    max_steps: int = 50,
    **running,
) -> Chains:
    r"""Sample `exp(log_density)`, of positions that are nearly standard normal, by Hamiltonian Monte Carlo (BlackJAX).

    The dynamics rotates (q, p) exactly and integrates only the departure from the standard normal
    (`gaussian_split`), so that a trajectory of angle π/2 takes a few gradients in 10^5 dimensions; it is
    Metropolis-adjusted and thus exact for every target. Not for targets far from standard normal: use `nuts`.

    Args:
        log_density: Position → scalar log-density, differentiable, of ONE chain.
        init: Starting positions: an array `(chains, d)` or a pytree whose leaves have a leading chain axis.
        key: A typed JAX key; chain `c` depends on `key` and `c` alone.
        n_warmup: Transitions of each chain that adapt and are discarded.
        n_samples: Kept transitions of each chain (at most, with `until_ess`).
        adapt: Entry of a dictionary position whose mean and covariance are adapted in warm-up.
        trajectory: Mean length of a trajectory, an angle; lengths are uniform within 40 % of it.
        target_accept: Acceptance that the step size is adapted to.
        step_size: The first step size, an angle.
        integrator: "split", or "leapfrog" (velocity Verlet).
        max_steps: Most steps of one trajectory.
        running: How the chains are run; see `diffsbi.sampling.runner.sample`.

    Raises:
        ValueError, RuntimeError: As `diffsbi.sampling.runner.sample`.
    """
    kernel = HMCKernel(
        log_density, n_warmup=n_warmup, adapt=adapt, trajectory=float(trajectory), target_accept=target_accept,
        step_size=step_size, integrator=integrator, max_steps=max_steps,
    )  # fmt: skip
    return sample(kernel, init, key, n_samples, **running)
