"""NumPyro's No-U-Turn sampler in resumable blocks, for positions too large to be kept."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc import hmc
from numpyro.infer.util import ParamInfo
from tqdm.auto import tqdm

from diffsbi._types import Array, Key, check_finite, check_key
from diffsbi.sampling.blocks import START, BlockStore, array_digest
from diffsbi.sampling.chains import Chains, ess_bulk

STUCK = 20  # transitions without a move that are no accident


class _Settings(NamedTuple):
    """What the compiled program depends on."""

    n_warmup: int
    target_accept: float
    max_tree_depth: tuple[int, int]
    mass: str | tuple[str, ...]
    step_size: float
    forward_mode: bool
    block: int

    @property
    def dense(self):
        return [self.mass] if isinstance(self.mass, tuple) else self.mass in ("dense", "fixed dense")

    @property
    def adapts_mass(self) -> bool:
        return isinstance(self.mass, tuple) or self.mass in ("diagonal", "dense")


class _State(NamedTuple):
    """One chain between two transitions: NumPyro's state, and running moments of what is tracked."""

    hmc: Any
    mean: Any
    scatter: Any


def nuts(
    log_density: Callable[[Any], Array],
    init,
    key: Key,
    n_warmup: int,
    n_samples: int,
    *,
    names: tuple[str, ...] | None = None,
    extract: Callable[[Any], Array] | None = None,
    track: Callable[[Any], Array] | None = None,
    target_accept: float = 0.8,
    max_tree_depth: int | tuple[int, int] = 10,
    mass="unit",
    step_size: float = 0.1,
    chain_method: str = "sequential",
    forward_mode: bool = False,
    folder=None,
    block: int = 50,
    progress: bool = False,
    on_block: Callable[[dict], None] | None = None,
) -> Chains:
    r"""Sample `exp(log_density)` with the No-U-Turn sampler (Hoffman & Gelman 2014; NumPyro's).

    Only `extract(position)` of each draw is kept. One compilation serves starting points, warm-up and sampling; it is
    shared between calls when `log_density` is an `eqx.Module` (or a bound method of one) of the same structure.

    Args:
        log_density: Position → scalar log-density, differentiable, of ONE chain.
        init: Starting positions: an array `(chains, d)` or a pytree whose leaves have a leading chain axis.
        key: A typed JAX key; chain `c` depends on `key` and `c` alone.
        n_warmup: Transitions of each chain that adapt step size (and mass matrix) and are discarded.
        n_samples: Kept transitions of each chain. A larger number continues the chains in `folder`.
        names: Names of the extracted parameters.
        extract: Position → `(p,)`; by default the position itself, where that is one array.
        track: Position → array whose posterior mean and standard deviation are accumulated (never its draws).
        target_accept: Acceptance that the step size is adapted to.
        max_tree_depth: At most 2**depth gradients for a transition; or (warm-up, sampling).
        mass: "unit"; adapted "diagonal" or "dense"; names of a dictionary position's entries to adapt a dense block
            over, the rest diagonal; or a fixed inverse mass matrix, `(d,)` or `(d, d)`, in the order of `ravel_pytree`.
        step_size: The first step size.
        chain_method: "sequential" (no chain waits for another) or "vectorized".
        forward_mode: Forward-mode gradients: for a handful of dimensions they compile faster.
        folder: Where blocks are written. A run that was killed goes on from its last whole block, bit for bit.
        block: Transitions of each chain between two writes.
        progress: Show a bar with gradients, step size, divergences and the smallest effective sample size.
        on_block: Called after every block with the account that the bar shows.

    Raises:
        ValueError: On settings that make no sense, a log-density that is not finite at a starting point, or a `folder`
            of another configuration or with a damaged file.
        RuntimeError: If a chain's energy is not finite or it no longer moves (its blocks are kept on disk).
    """
    mass, inverse_mass = _mass(mass)
    depth = (max_tree_depth, max_tree_depth) if isinstance(max_tree_depth, int) else max_tree_depth
    settings = _Settings(n_warmup, target_accept, depth, mass, step_size, forward_mode, block)
    init = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), init)
    n_chains = _check(init, settings, n_samples, chain_method)
    program = _Program(log_density, extract or _whole(init), track, settings)
    groups = [[c] for c in range(n_chains)] if chain_method == "sequential" else [list(range(n_chains))]
    states = [program.start(init, check_key(key), group, inverse_mass) for group in groups]
    names = _names(names, program, states[0])
    store = None
    if folder is not None:
        configuration = dict(settings._asdict(), n_chains=n_chains, chain_method=chain_method, names=names)
        configuration |= dict(init=array_digest(*jax.tree.leaves(init)), key=array_digest(jax.random.key_data(key)))
        configuration |= dict(dtype=str(jnp.result_type(float)), inverse_mass=array_digest(inverse_mass))
        start = [-float(v) for state in states for v in state.hmc.potential_energy]
        store = BlockStore(folder, _plain(configuration | {START: start}))
    report = _Report(n_chains * (n_warmup + n_samples), n_chains, n_warmup, progress, on_block)
    records, states = _run(program, states, groups, n_warmup + n_samples, store, report)
    return _collect(records, states, names, settings, n_samples, chain_method, track is not None)


class _Program(eqx.Module):
    """The sampler of one target: starting points and blocks of transitions, from one compiled function."""

    log_density: Callable
    extract: Callable
    track: Callable | None
    settings: _Settings = eqx.field(static=True)

    def start(self, init, key, chains: list[int], inverse_mass) -> _State:
        """States at the starting points; a leading axis of `len(chains)` on every leaf."""
        init_kernel, _ = hmc(self._potential, algo="NUTS")
        fresh = []
        for c in chains:
            z = jax.tree.map(lambda a, c=c: a[c], init)
            info = ParamInfo(z, jnp.zeros(()), jax.tree.map(jnp.zeros_like, z))  # spares a second compiled gradient
            one_key = jax.random.fold_in(key, c)
            one = init_kernel(info, rng_key=one_key, inverse_mass_matrix=inverse_mass, **self._kernel_settings())
            zero = () if self.track is None else jax.tree.map(_zeros, jax.eval_shape(self.track, z))
            fresh.append(_State(one, zero, zero))
        state = jax.tree.map(lambda *a: jax.lax.convert_element_type(jnp.stack(a), a[0].dtype), *fresh)
        # A transition without momentum and step evaluates one gradient, at the starting point, and stops.
        still = state.hmc.adapt_state._replace(
            step_size=jnp.zeros_like(state.hmc.adapt_state.step_size),
            mass_matrix_sqrt=jax.tree.map(jnp.zeros_like, state.hmc.adapt_state.mass_matrix_sqrt),
        )
        high = jnp.full_like(state.hmc.potential_energy, 1e30)
        moved, _ = self.advance(state._replace(hmc=state.hmc._replace(potential_energy=high, adapt_state=still)), 1)
        _check_start(moved.hmc, chains)
        known = dict(potential_energy=moved.hmc.potential_energy, z_grad=moved.hmc.z_grad)
        return state._replace(hmc=state.hmc._replace(**known, energy=moved.hmc.potential_energy))

    def advance(self, state: _State, n: int) -> tuple[_State, dict[str, np.ndarray]]:
        """`n` transitions (at most a block) of every chain; records `(chains, n, ...)`."""
        state, record = _advance(self, state, jnp.asarray(n, jnp.int32))
        return state, {name: np.asarray(value)[:, :n] for name, value in record.items()}

    def _potential(self, z):
        return -self.log_density(z)

    def _kernel_settings(self) -> dict[str, Any]:
        s = self.settings
        adaptation = dict(adapt_mass_matrix=s.adapts_mass, dense_mass=s.dense, target_accept_prob=s.target_accept)
        lengths = dict(num_warmup=s.n_warmup, max_tree_depth=s.max_tree_depth, trajectory_length=None)
        lengths |= dict(step_size=s.step_size, forward_mode_differentiation=s.forward_mode)
        return adaptation | lengths


@eqx.filter_jit
def _advance(program: _Program, state: _State, n):
    if jax.tree.leaves(state)[0].shape[0] > 1:
        return jax.vmap(lambda one: _transitions(program, one, n))(state)
    out = _transitions(program, jax.tree.map(lambda a: a[0], state), n)  # no vmap: `cond` stays a branch
    return jax.tree.map(lambda a: a[None], out)


def _transitions(program: _Program, state: _State, n):
    z = state.hmc.z
    init_kernel, kernel = hmc(program._potential, algo="NUTS")
    info = ParamInfo(z, state.hmc.potential_energy, state.hmc.z_grad)
    init_kernel(info, rng_key=state.hmc.rng_key, **program._kernel_settings())  # sets the kernel up; result unused

    def observe(state: _State):
        h = state.hmc
        numbers = dict(log_density=-h.potential_energy, energy=h.energy, diverging=h.diverging, num_steps=h.num_steps)
        return dict(theta=program.extract(h.z), step_size=h.adapt_state.step_size, **numbers)

    def body(k, carry):
        state, record = carry
        new = kernel(state.hmc)
        state = _accumulate(program, _State(new, state.mean, state.scatter))
        return state, jax.tree.map(lambda all, one: all.at[k].set(one), record, observe(state))

    record = jax.tree.map(lambda a: jnp.zeros((program.settings.block, *a.shape), a.dtype), observe(state))
    return jax.lax.fori_loop(0, n, body, (state, record))


def _accumulate(program: _Program, state: _State) -> _State:
    """Welford's running mean and sum of squares of what is tracked, after warm-up."""
    if program.track is None:
        return state
    count = state.hmc.i - program.settings.n_warmup
    value = program.track(state.hmc.z)
    weight = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0.0)
    first = jax.tree.map(lambda v, m: v - m, value, state.mean)
    mean = jax.tree.map(lambda m, d: m + weight.astype(m.dtype) * d, state.mean, first)
    gain = (count > 0).astype(weight.dtype)
    scatter = jax.tree.map(lambda s, d, v, m: s + gain.astype(s.dtype) * d * (v - m), state.scatter, first, value, mean)
    return _State(state.hmc, mean, scatter)


def _run(program, states, groups, total, store, report):
    """All blocks of all groups, interleaved so that the chains stay level; those on disk are read."""
    size = program.settings.block
    records, states = [[] for _ in groups], list(states)
    for g, group in enumerate(groups):
        done = 0 if store is None else min(store.count(g), -(-total // size))
        for k in range(done):
            records[g].append(store.read(g, k))
            report(group, records[g][-1], resumed=True)
        if done:
            states[g] = store.read_state(g, store.count(g) - 1, states[g])
    x64 = jax.config.jax_enable_x64  # a context of the calling thread, which the pool's threads do not share

    def advance(state, n):
        with jax.enable_x64(x64):
            return program.advance(state, n)

    # One thread for each core: a chain's many small operations leave the other cores idle.
    with report, ThreadPoolExecutor(min(len(groups), os.cpu_count() or 1)) as pool:
        while True:
            counts = [sum(r["theta"].shape[1] for r in rows) for rows in records]
            if min(counts) >= total:
                return records, states
            n = min(size, total - min(counts))
            behind = [g for g, count in enumerate(counts) if count == min(counts)]
            running = {pool.submit(advance, states[g], n): g for g in behind}
            for done in as_completed(running):
                g = running[done]
                states[g], record = done.result()
                if store is not None:
                    store.append(g, len(records[g]), record, states[g])
                records[g].append(record)
                _check_record(record, groups[g], counts[g], program.settings.n_warmup)
                report(groups[g], record)


class _Report:
    """The progress bar, and the account that `on_block` gets."""

    def __init__(self, total: int, n_chains: int, n_warmup: int, progress: bool, on_block):
        self.bar = tqdm(total=total, disable=not progress, desc="NUTS", unit="draw")
        self.on_block, self.n_warmup = on_block, n_warmup
        self.draws: list[list[np.ndarray]] = [[] for _ in range(n_chains)]
        self.account = dict(gradients=n_chains, divergences=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, group, record, resumed=False):
        for c, chain in enumerate(group):
            self.draws[chain].append(record["theta"][c])
        self.account["gradients"] += int(record["num_steps"].sum())
        self.account["step_size"] = float(record["step_size"][:, -1].mean())
        self.account["divergences"] += int(record["diverging"].sum())
        self.bar.update(record["theta"][..., 0].size)
        if not self.bar.disable and not resumed:
            effective = self._effective()
            self.bar.set_postfix(self.account | ({} if effective is None else dict(ess=round(effective))))
        if self.on_block is not None and not resumed:
            done = [sum(map(len, chain)) for chain in self.draws]
            self.on_block(dict(self.account, chains=list(group), done=done, effective=self._effective))

    def _effective(self) -> float | None:
        """Smallest bulk effective sample size over the parameters so far, None before there are ten draws."""
        done = min(sum(map(len, chain)) for chain in self.draws)
        if done < self.n_warmup + 10:
            return None
        theta = np.stack([np.concatenate(chain)[self.n_warmup : done] for chain in self.draws])
        return min(ess_bulk(theta[..., i].astype(float)) for i in range(theta.shape[-1]))


def _collect(records, states, names, settings, n_samples, chain_method, tracked) -> Chains:
    rows = [{k: np.concatenate([r[k] for r in group], 1) for k in group[0]} for group in records]
    total = settings.n_warmup + n_samples
    record = {k: np.concatenate([row[k][:, :total] for row in rows]) for k in rows[0]}
    kept = {k: v[:, settings.n_warmup :] for k, v in record.items()}
    steps = kept.pop("step_size")[:, -1]
    gradients = int(record["num_steps"].sum()) + len(steps)
    account = dict(settings._asdict(), n_samples=n_samples, chain_method=chain_method, sampler="numpyro.NUTS")
    moments = _moments(states, n_samples) if tracked else None
    return Chains(
        names=names, step_size=steps, gradients=gradients, n_warmup=settings.n_warmup,
        settings=_plain(account), tracked=moments, **kept,
    )  # fmt: skip


def _moments(states, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all draws of all chains, from each chain's mean and sum of squares."""
    mean = np.concatenate([np.asarray(s.mean, float) for s in states])
    scatter = np.concatenate([np.asarray(s.scatter, float) for s in states])
    centre = mean.mean(0)
    variance = (scatter.sum(0) + n * ((mean - centre) ** 2).sum(0)) / (n * len(mean) - 1)
    return centre, np.sqrt(variance)


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


def _check(init, settings: _Settings, n_samples: int, chain_method: str) -> int:
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(init)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        shapes = jax.tree.map(jnp.shape, init)
        raise ValueError(f"Expected init with one leading chain axis on every leaf; got shapes {shapes}.")
    if chain_method not in ("sequential", "vectorized"):
        raise ValueError(f'Expected chain_method "sequential" or "vectorized"; got {chain_method!r}.')
    if settings.n_warmup < 0 or n_samples < 1 or settings.block < 1:
        got = f"{settings.n_warmup}, {n_samples} and {settings.block}"
        raise ValueError(f"Expected n_warmup >= 0, n_samples >= 1 and block >= 1; got {got}.")
    if not 0 < settings.target_accept < 1 or not settings.step_size > 0 or min(settings.max_tree_depth) < 1:
        got = f"{settings.target_accept}, {settings.step_size} and {settings.max_tree_depth}"
        raise ValueError(f"Expected 0 < target_accept < 1, step_size > 0 and max_tree_depth >= 1; got {got}.")
    return counts.pop()[0]


def _whole(init) -> Callable:
    if len(jax.tree.leaves(init)) > 1 or jax.tree.leaves(init)[0].ndim != 2:
        raise ValueError("Expected extract, position -> (p,), for positions that are not one vector; got None.")
    return _only_leaf


def _only_leaf(z) -> Array:
    return jax.tree.leaves(z)[0]


def _names(names, program: _Program, state: _State) -> tuple[str, ...]:
    shape = jax.eval_shape(program.extract, jax.tree.map(lambda a: a[0], state.hmc.z)).shape
    names = tuple(f"theta_{i}" for i in range(shape[0] if shape else 1)) if names is None else tuple(names)
    if shape != (len(names),):
        raise ValueError(f"Expected extract(position) with shape ({len(names)},), one for each name; got {shape}.")
    return names


def _check_start(state, chains: list[int]) -> None:
    for c, chain in enumerate(chains):
        gradient = jax.tree.map(lambda g, c=c: bool(jnp.isfinite(g[c]).all()), state.z_grad)
        if bool(state.diverging[c]) or not all(jax.tree.leaves(gradient)):
            raise ValueError(f"Expected a finite log-density and gradient at the starting point of chain {chain}.")


def _check_record(record, group: list[int], before: int, n_warmup: int) -> None:
    for c, chain in enumerate(group):
        bad = ~(np.isfinite(record["energy"][c]) & np.isfinite(record["theta"][c]).all(-1))
        if bad.any():
            where = f"transition {before + int(np.argmax(bad))}"
            raise RuntimeError(f"Chain {chain} has a non-finite energy at {where}; is the log-density bounded?")
        theta = record["theta"][c]
        if before >= n_warmup and len(theta) >= STUCK and np.all(theta == theta[0]):
            step = f"step size {record['step_size'][c, -1]:.3g}, {int(record['diverging'][c].sum())} divergences"
            advice = "a longer warm-up, a smaller first step or a higher target_accept may help"
            raise RuntimeError(f"Chain {chain} did not move in {len(theta)} transitions ({step}): {advice}.")


def _zeros(shape) -> Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _plain(value):
    """Nested tuples as lists, as JSON returns them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
