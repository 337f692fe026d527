r"""Microcanonical Langevin Monte Carlo (BlackJAX), with and without a Metropolis test."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc import adjusted_mclmc_dynamic as adjusted_mclmc
from blackjax.mcmc import mclmc as unadjusted_mclmc
from blackjax.mcmc.dynamic_hmc import DynamicHMCState
from blackjax.mcmc.integrators import IntegratorState
from blackjax.util import generate_unit_vector

from diffsbi._types import Array
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.hmc import AIM, damped_dual_averaging
from diffsbi.sampling.kernels import UNKNOWN, AbstractKernel, Record, all_finite, size
from diffsbi.sampling.runner import sample

GRADIENTS = 2  # of one step of the isokinetic McLachlan integrator
MOST_STEPS = 200.0  # of one proposal, on average


class _State(NamedTuple):
    inner: Any
    key: Array
    i: Array
    step_size: Array
    tuning: Any


class MCLMCKernel(AbstractKernel):
    """Steps of MCLMC; without a Metropolis test, the energy error per dimension sets the step and the bias stays."""

    log_density: Callable
    n_warmup: int = eqx.field(static=True)
    adjusted: bool = eqx.field(static=True)
    decoherence: float = eqx.field(static=True)
    energy_variance: float = eqx.field(static=True)
    target_accept: float = eqx.field(static=True)
    step_size: float = eqx.field(static=True)
    n_steps: int = eqx.field(static=True)

    def __check_init__(self):
        numbers = (self.decoherence, self.energy_variance, self.step_size, self.n_steps)
        if not all(v > 0 for v in numbers) or not 0 < self.target_accept < 1:
            raise ValueError(
                "Expected decoherence, energy_variance, step_size, n_steps > 0 and 0 < target_accept < 1; "
                f"got {numbers} and {self.target_accept}."
            )

    def account(self):
        used = ("target_accept",) if self.adjusted else ("energy_variance", "n_steps")
        names = ("n_warmup", "decoherence", "step_size", *used)
        sampler = "mclmc" if self.adjusted else "mclmc_unadjusted"
        return dict({name: getattr(self, name) for name in names}, sampler=sampler)

    def start(self, position, key):
        if size(position) < 2:
            raise ValueError(f"Expected positions of at least two dimensions; got {size(position)}.")
        dtype = jnp.result_type(float)
        key, key_momentum = jax.random.split(key)
        still = jax.tree.map(jnp.zeros_like, position)
        low = jnp.asarray(UNKNOWN, dtype)
        if self.adjusted:
            inner = DynamicHMCState(position, low, still, key_momentum)
        else:
            inner = IntegratorState(position, generate_unit_vector(key_momentum, position), low, still)
        step_size = jnp.asarray(self.step_size, dtype)
        tuning = damped_dual_averaging(self.target_accept)[0](AIM * step_size) if self.adjusted else jnp.zeros(2, dtype)
        return _State(inner, key, jnp.asarray(-1), step_size, tuning)

    def position(self, state):
        return state.inner.position

    def step(self, state: _State):
        """One Metropolis proposal, or `n_steps` unadjusted steps; of length zero at the starting point."""
        key, key_step = jax.random.split(state.key)
        starting = state.i < 0
        scale = np.sqrt(size(state.inner.position))
        length = self.decoherence * scale
        step = jnp.where(starting, 0.0, state.step_size * scale)
        move = self._adjusted if self.adjusted else self._unadjusted
        inner, tuning, tuned, diverging, n_steps = move(state, key_step, step, length, starting)
        adapting = ~starting & (state.i < self.n_warmup)
        new = _State(
            inner, key, state.i + 1, jnp.where(adapting, tuned, state.step_size),
            jax.tree.map(lambda a, b: jnp.where(adapting, a, b), tuning, state.tuning),
        )  # fmt: skip
        diverging = jnp.where(starting, ~all_finite(inner.logdensity, inner.logdensity_grad), diverging)
        return new, Record(inner.logdensity, -inner.logdensity, diverging, GRADIENTS * n_steps, state.step_size)

    def _adjusted(self, state, key, step, length, starting):
        step = jnp.maximum(step, 1e-30)  # BlackJAX multiplies it by an infinite length
        mean = jnp.maximum(length / step, 1.0)
        steps_of = lambda key, mean: jnp.ceil(mean * jax.random.uniform(key, minval=0.6, maxval=1.4)).astype(int)  # noqa: E731
        kernel = adjusted_mclmc.build_kernel(integration_steps_fn=steps_of)
        count = jnp.where(starting, 1.0, jnp.minimum(mean, MOST_STEPS))
        inner, info = kernel(key, state.inner, self.log_density, step, integration_steps_params=(count,))
        _, update, final = damped_dual_averaging(self.target_accept)
        tuning = update(state.tuning, jnp.where(jnp.isfinite(info.acceptance_rate), info.acceptance_rate, 0.0))
        last = state.i >= self.n_warmup - 1
        tuned = jnp.where(last, final(tuning), jnp.exp(tuning.log_step_size)).astype(step.dtype)
        return inner, tuning, tuned, info.is_divergent, info.num_integration_steps

    def _unadjusted(self, state, key, step, length, starting):
        kernel = unadjusted_mclmc.build_kernel()
        dim = size(state.inner.position)

        def one(k, carry):
            inner, sum_error, bad = carry
            new, info = kernel(jax.random.fold_in(key, k), inner, self.log_density, jnp.ones(()), length, step)
            return new, sum_error + info.energy_change**2, bad | ~info.nonans

        n_steps = jnp.where(starting, 1, self.n_steps)
        inner, sum_error, bad = jax.lax.fori_loop(0, n_steps, one, (state.inner, jnp.zeros(()), jnp.asarray(False)))
        # Var E ~ step^6 (the integrator's order): a running mean of error / step^6 gives the step for the wanted error.
        error = jnp.maximum(sum_error / (n_steps * dim), 1e-30)
        wanted = jnp.clip((self.energy_variance / error) ** (1 / 6), 0.5, 2.0)
        weight, mean_log = state.tuning * 0.95
        here = jnp.log(state.step_size * jnp.where(bad, 0.5, wanted))
        tuning = jnp.stack([weight + 1, mean_log + here])
        return inner, tuning, jnp.exp(tuning[1] / tuning[0]).astype(step.dtype), bad, n_steps


def mclmc(
    log_density: Callable[[Any], Array],
    init,
    key,
    n_warmup: int,
    n_samples: int,
    *,
    adjusted: bool = True,
    decoherence: float | None = None,
    energy_variance: float = 1e-7,
    target_accept: float = 0.9,
    step_size: float = 0.1,
    n_steps: int = 8,
    **running,
) -> Chains:
    r"""Sample `exp(log_density)` by microcanonical Langevin dynamics (Robnik et al. 2023, JMLR 24, 311).

    Unadjusted, the chain's distribution is biased at order ε². For a *global* parameter the bias does not shrink with
    the dimension d at a given energy error per dimension: a small change of the d latents' curvature with it shifts it
    by a sum over all of them. So the energy variance must fall as 1/d, or the bias must be measured; no posterior from
    `adjusted=False` should be shown without.

    Args:
        log_density: Position → scalar log-density, differentiable, of ONE chain.
        init: Starting positions: an array `(chains, d)` or a pytree whose leaves have a leading chain axis.
        key: A typed JAX key.
        n_warmup: Transitions of each chain that adapt the step size and are discarded.
        n_samples: Kept transitions of each chain (at most, with `until_ess`).
        adjusted: Proposals of random length with a Metropolis test (exact), or none at all.
        decoherence: Length over which the momentum is forgotten, in units of √d; adjusted: of a proposal. 1.5 and 0.5.
        energy_variance: Wanted variance of a step's energy error per dimension, unadjusted.
        target_accept: Acceptance that the step size is adapted to, adjusted.
        step_size: The first step, in units of √d.
        n_steps: Steps between two recorded draws, unadjusted.
        running: How the chains are run; see `diffsbi.sampling.runner.sample`.

    Raises:
        ValueError, RuntimeError: As `diffsbi.sampling.runner.sample`.
    """
    decoherence = (1.5 if adjusted else 0.5) if decoherence is None else float(decoherence)
    kernel = MCLMCKernel(
        log_density, n_warmup=n_warmup, adjusted=adjusted, decoherence=decoherence, energy_variance=energy_variance,
        target_accept=target_accept, step_size=step_size, n_steps=n_steps,
    )  # fmt: skip
    return sample(kernel, init, key, n_samples, **running)
