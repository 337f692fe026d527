"""NumPyro's No-U-Turn sampler: the reference for targets of any shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from numpyro.infer.hmc import hmc as numpyro_hmc
from numpyro.infer.util import ParamInfo

from diffsbi._types import Array, Key, check_finite
from diffsbi.sampling.blocks import array_digest
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.kernels import UNKNOWN, AbstractKernel, Record, all_finite, select
from diffsbi.sampling.runner import sample


class _State(NamedTuple):
    hmc: Any
    started: Array


class NUTSKernel(AbstractKernel):
    """NumPyro's NUTS with its own warm-up of step size and mass matrix."""

    log_density: Callable
    inverse_mass: Array | None
    n_warmup: int = eqx.field(static=True)
    target_accept: float = eqx.field(static=True)
    max_tree_depth: tuple[int, int] = eqx.field(static=True)
    mass: str | tuple[str, ...] = eqx.field(static=True)
    step_size: float = eqx.field(static=True)
    forward_mode: bool = eqx.field(static=True)

    def __check_init__(self):
        if not 0 < self.target_accept < 1 or not self.step_size > 0 or min(self.max_tree_depth) < 1:
            got = f"{self.target_accept}, {self.step_size} and {self.max_tree_depth}"
            raise ValueError(f"Expected 0 < target_accept < 1, step_size > 0 and max_tree_depth >= 1; got {got}.")

    def account(self):
        names = ("n_warmup", "target_accept", "max_tree_depth", "mass", "step_size", "forward_mode")
        inverse_mass = None if self.inverse_mass is None else array_digest(self.inverse_mass)
        fixed = dict(inverse_mass=inverse_mass, max_gradients=2 ** self.max_tree_depth[1] - 1)
        return dict({name: getattr(self, name) for name in names}, sampler="nuts", **fixed)

    def start(self, position, key):
        init_kernel, _ = numpyro_hmc(self._potential, algo="NUTS")
        # With the density given, NumPyro does not compile a gradient of its own for the starting point.
        info = ParamInfo(position, jnp.zeros(()), jax.tree.map(jnp.zeros_like, position))
        state = init_kernel(info, rng_key=key, inverse_mass_matrix=self.inverse_mass, **self._settings())
        high = jnp.full_like(state.potential_energy, -UNKNOWN)
        return _State(state._replace(potential_energy=high), jnp.asarray(False))

    def position(self, state):
        return state.hmc.z

    def step(self, state: _State):
        h = state.hmc
        init_kernel, kernel = numpyro_hmc(self._potential, algo="NUTS")
        info = ParamInfo(h.z, h.potential_energy, h.z_grad)
        init_kernel(info, rng_key=h.rng_key, **self._settings())  # sets the kernel up; result unused
        # A transition without momentum and step evaluates one gradient, at the starting point, and stops.
        still = h.adapt_state._replace(
            step_size=jnp.zeros_like(h.adapt_state.step_size),
            mass_matrix_sqrt=jax.tree.map(jnp.zeros_like, h.adapt_state.mass_matrix_sqrt),
        )
        new = kernel(h._replace(adapt_state=select(state.started, h.adapt_state, still)))
        known = dict(potential_energy=new.potential_energy, z_grad=new.z_grad, energy=new.potential_energy)
        known |= dict(num_steps=new.num_steps)
        new = select(state.started, new, h._replace(**known))
        diverging = jnp.where(state.started, new.diverging, ~all_finite(new.z_grad))
        record = Record(-new.potential_energy, new.energy, diverging, new.num_steps, new.adapt_state.step_size)
        return _State(new, jnp.asarray(True)), record

    def _potential(self, z):
        return -self.log_density(z)

    def _settings(self) -> dict[str, Any]:
        dense = [self.mass] if isinstance(self.mass, tuple) else self.mass in ("dense", "fixed dense")
        adapts = isinstance(self.mass, tuple) or self.mass in ("diagonal", "dense")
        adaptation = dict(adapt_mass_matrix=adapts, dense_mass=dense, target_accept_prob=self.target_accept)
        lengths = dict(num_warmup=self.n_warmup, max_tree_depth=self.max_tree_depth, trajectory_length=None)
        lengths |= dict(step_size=self.step_size, forward_mode_differentiation=self.forward_mode)
        return adaptation | lengths


def nuts(
    log_density: Callable[[Any], Array],
    init,
    key: Key,
    n_warmup: int,
    n_samples: int,
    *,
    target_accept: float = 0.8,
    max_tree_depth: int | tuple[int, int] = 10,
    mass="unit",
    step_size: float = 0.1,
    forward_mode: bool = False,
    **running,
) -> Chains:
    r"""Sample `exp(log_density)` with the No-U-Turn sampler (Hoffman & Gelman 2014; NumPyro's).

    Args:
        log_density: Position → scalar log-density, differentiable, of ONE chain.
        init: Starting positions: an array `(chains, d)` or a pytree whose leaves have a leading chain axis.
        key: A typed JAX key; chain `c` depends on `key` and `c` alone.
        n_warmup: Transitions of each chain that adapt step size (and mass matrix) and are discarded.
        n_samples: Kept transitions of each chain (at most, with `until_ess`).
        target_accept: Acceptance that the step size is adapted to.
        max_tree_depth: At most 2**depth gradients for a transition; or (warm-up, sampling).
        mass: "unit"; adapted "diagonal" or "dense"; names of a dictionary position's entries to adapt a dense block
            over, the rest diagonal; or a fixed inverse mass matrix, `(d,)` or `(d, d)`, in the order of `ravel_pytree`.
        step_size: The first step size.
        forward_mode: Forward-mode gradients: for a handful of dimensions they compile faster.
        running: How the chains are run: `folder`, `until_ess`, `data`, ...; see `diffsbi.sampling.runner.sample`.

    Raises:
        ValueError, RuntimeError: As `diffsbi.sampling.runner.sample`.
    """
    mass, inverse_mass = _mass(mass)
    depth = (max_tree_depth, max_tree_depth) if isinstance(max_tree_depth, int) else tuple(max_tree_depth)
    kernel = NUTSKernel(
        log_density, inverse_mass=inverse_mass, n_warmup=n_warmup, target_accept=target_accept, max_tree_depth=depth,
        mass=mass, step_size=step_size, forward_mode=forward_mode,
    )  # fmt: skip
    return sample(kernel, init, key, n_samples, **running)


def _mass(mass) -> tuple[Any, Any]:
    """(description, fixed inverse mass matrix or None)."""
    if isinstance(mass, str):
        if mass not in ("unit", "diagonal", "dense"):
            raise ValueError(f'Expected mass "unit", "diagonal", "dense", names or an array; got {mass!r}.')
        return mass, None
    if isinstance(mass, tuple | list) and all(isinstance(m, str) for m in mass):
        return tuple(mass), None
    inverse = jnp.asarray(mass, jnp.result_type(float))
    if inverse.ndim not in (1, 2):
        raise ValueError(f"Expected an inverse mass matrix of shape (d,) or (d, d); got {inverse.shape}.")
    check_finite("inverse mass matrix", inverse)
    return ("fixed diagonal", "fixed dense")[inverse.ndim - 1], inverse
