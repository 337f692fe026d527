"""Chains in resumable blocks, for positions too large to be kept: one loop for every sampler."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._cache import forget_when_many
from diffsbi._types import Array, Key, check_key
from diffsbi.sampling.blocks import START, BlockStore, array_digest
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.kernels import UNKNOWN, AbstractKernel, select
from diffsbi.sampling.progress import Report, check_record, kept, largest_rhat, smallest_ess


class BadStart(ValueError):
    """A chain's starting point has no finite log-density and gradient."""

    def __init__(self, chain: int):
        super().__init__(f"Expected a finite log-density and gradient at the starting point of chain {chain}.")
        self.chain = chain


class _Chain(NamedTuple):
    """One chain between two transitions: the kernel's state, kept transitions, running moments of what is tracked.

    `data` is what its log-density takes beside the position; None where all chains have one target.
    """

    kernel: Any
    n: Array
    mean: Any
    scatter: Any
    data: Any = None


class _Program(eqx.Module):
    """One target, one kernel, one compiled function: starting points, warm-up and sampling."""

    kernel: AbstractKernel
    extract: Callable
    track: Callable | None
    block: int = eqx.field(static=True)

    def start(self, init, key, chains: list[int], data=None) -> tuple[_Chain, dict[str, np.ndarray]]:
        """States at the starting points, a leading axis of `len(chains)` on every leaf, and what was recorded there."""
        index = jnp.asarray(chains)
        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(index)
        fresh = jax.vmap(self._fresh)(*jax.tree.map(lambda a: a[index], (init, keys, data)))
        state = jax.tree.map(lambda a: jax.lax.convert_element_type(a, a.dtype) if _numeric(a) else a, fresh)
        state, record = self.advance(state, 1)
        for c, chain in enumerate(chains):
            if record["diverging"][c, 0] or not UNKNOWN / 2 < record["log_density"][c, 0] < np.inf:
                raise BadStart(chain)
        return state, record

    def _fresh(self, position, key, data) -> _Chain:
        zero = () if self.track is None else jax.tree.map(_zeros, jax.eval_shape(self.track, position))
        state = self.kernel_of(data).start(position, key)
        return _Chain(state, jnp.asarray(-1 - self.kernel.n_warmup), zero, zero, data)

    def kernel_of(self, data) -> AbstractKernel:
        """The kernel of the target that a chain's data make."""
        if data is None:
            return self.kernel
        density = self.kernel.log_density
        return eqx.tree_at(lambda k: k.log_density, self.kernel, lambda position: density(position, data))

    def advance(self, state: _Chain, n: int) -> tuple[_Chain, dict[str, np.ndarray]]:
        """`n` transitions (at most a block) of every chain; records `(chains, n, ...)`."""
        state, record = _advance(self, state, jnp.asarray(n, jnp.int32))
        return state, {name: np.asarray(value)[:, :n] for name, value in record.items()}


@eqx.filter_jit
def _advance(program: _Program, state: _Chain, n):
    if state.n.shape[0] > 1:
        return jax.vmap(lambda one: _transitions(program, one, n))(state)
    out = _transitions(program, jax.tree.map(lambda a: a[0], state), n)  # no vmap: `cond` stays a branch
    return jax.tree.map(lambda a: a[None], out)


def _transitions(program: _Program, state: _Chain, n):
    kernel = program.kernel_of(state.data)

    def body(k, carry):
        state, record = carry
        new, row = kernel.step(state.kernel)
        state = _accumulate(program, state._replace(kernel=new, n=state.n + 1))
        row = dict(row._asdict(), theta=program.extract(kernel.position(new)))
        return state, jax.tree.map(lambda all, one: all.at[k].set(one), record, row)

    def row_shape(state):
        row = kernel.step(state.kernel)[1]
        return dict(row._asdict(), theta=program.extract(kernel.position(state.kernel)))

    shapes = jax.eval_shape(row_shape, state)
    record = jax.tree.map(lambda a: jnp.zeros((program.block, *a.shape), a.dtype), shapes)
    return jax.lax.fori_loop(0, n, body, (state, record))


def _accumulate(program: _Program, state: _Chain) -> _Chain:
    """Welford's running mean and sum of squares of what is tracked, after warm-up."""
    if program.track is None:
        return state
    value = program.track(program.kernel.position(state.kernel))
    count = jnp.maximum(state.n, 1)
    first = jax.tree.map(lambda v, m: v - m, value, state.mean)
    mean = jax.tree.map(lambda m, d: m + d / count.astype(m.dtype), state.mean, first)
    scatter = jax.tree.map(lambda s, d, v, m: s + d * (v - m), state.scatter, first, value, mean)
    return select(state.n > 0, state._replace(mean=mean, scatter=scatter), state)


def sample(
    kernel: AbstractKernel,
    init,
    key: Key,
    n_samples: int,
    *,
    names: tuple[str, ...] | None = None,
    extract: Callable[[Any], Array] | None = None,
    track: Callable[[Any], Array] | None = None,
    until_ess: float | None = None,
    max_rhat: float = 1.01,
    chain_method: str = "sequential",
    folder=None,
    block: int = 50,
    progress: bool = False,
    on_block: Callable[[dict], None] | None = None,
    context: dict[str, Any] | None = None,
    data=None,
) -> Chains:
    r"""Run a kernel's chains in blocks; only `extract(position)` of each draw is kept.

    One compilation serves starting points, warm-up and sampling; it is shared between calls when the log-density is an
    `eqx.Module` (or a bound method of one) of the same structure.

    Args:
        kernel: The sampler.
        init: Starting positions: an array `(chains, d)` or a pytree whose leaves have a leading chain axis.
        key: A typed JAX key; chain `c` depends on `key` and `c` alone.
        n_samples: Kept transitions of each chain. A larger number continues the chains in `folder`.
        names: Names of the extracted parameters.
        extract: Position → `(p,)`; by default the position itself, where that is one array.
        track: Position → array whose posterior mean and standard deviation are accumulated (never its draws).
        until_ess: Stop at the first block after which every parameter has this bulk effective sample size and an R̂
            below `max_rhat`; `n_samples` is then the most that each chain may take.
        max_rhat: Largest rank-normalised R̂ of a parameter at which `until_ess` may stop.
        chain_method: "sequential" (a thread for each core, no chain waits for another) or "vectorized".
        folder: Where blocks are written. A run that was killed goes on from its last whole block, bit for bit; a block
            whose file is damaged is named and sampled again, the others stay.
        block: Transitions of each chain between two writes.
        progress: Show a bar with gradients, divergences, the smallest effective sample size, the largest R̂ and, with
            `until_ess`, the time that is left.
        on_block: Called after every block with the account that the bar shows.
        context: Further settings that decide the numbers, for the record and the folder's configuration.
        data: What the log-density takes beside the position, with a leading chain axis: each chain has a target of its
            own, and one compilation serves all. A chain that is stuck is then warned about, and the others go on.

    Raises:
        ValueError: On settings that make no sense, a log-density that is not finite at a starting point, or a `folder`
            of another configuration.
        RuntimeError: If a chain's energy is not finite, it no longer moves, or it only diverges (its blocks are kept on
            disk).
    """
    init = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), init)
    n_chains = _check(init, kernel.n_warmup, block, n_samples, chain_method, until_ess)
    data = jax.tree.map(jnp.asarray, data)
    if data is not None:
        _check_data(data, n_chains, until_ess)
    forget_when_many()
    program = _Program(kernel, extract or _whole(init), track, block)
    names = _names(names, program.extract, init)
    groups = [[c] for c in range(n_chains)] if chain_method == "sequential" else [list(range(n_chains))]
    started = [program.start(init, check_key(key), group, data) for group in groups]
    account = dict(kernel.account(), **(context or {}), block=block, chain_method=chain_method)
    store = None
    if folder is not None:
        configuration = dict(account, n_chains=n_chains, names=names, dtype=str(jnp.result_type(float)))
        configuration |= dict(init=array_digest(*jax.tree.leaves(init)), key=array_digest(jax.random.key_data(key)))
        configuration |= {} if data is None else dict(data=array_digest(*jax.tree.leaves(data)))
        start = [float(value) for _, record in started for value in record["log_density"][:, 0]]
        store = BlockStore(folder, _plain(configuration | {START: start}))
    gradients = sum(int(record["num_steps"].sum()) for _, record in started)
    total = n_chains * (kernel.n_warmup + n_samples)
    report = Report(total, n_chains, kernel.n_warmup, gradients, progress, on_block, until_ess)
    stop = _Stop(kernel.n_warmup, n_samples, until_ess, max_rhat)
    records, states = _run(program, [state for state, _ in started], groups, stop, store, report)
    n_kept = min(n_samples, sum(r["theta"].shape[1] for r in records[0]) - kernel.n_warmup)
    account |= dict(n_samples=n_kept) | ({} if until_ess is None else dict(until_ess=until_ess, max_rhat=max_rhat))
    return _collect(records, states, names, kernel.n_warmup, n_kept, gradients, _plain(account), track is not None)


class _Stop(NamedTuple):
    """When the chains are long enough: decided at whole rounds of blocks, so that a resumed run stops there too."""

    n_warmup: int
    n_samples: int
    until_ess: float | None
    max_rhat: float

    def __call__(self, records) -> bool:
        done = sum(r["theta"].shape[1] for r in records[0])
        if done >= self.n_warmup + self.n_samples:
            return True
        if self.until_ess is None or done < self.n_warmup + 10:
            return False
        theta = kept(records, self.n_warmup)
        return smallest_ess(theta) >= self.until_ess and largest_rhat(theta) < self.max_rhat


class _Blocks:
    """The chains' blocks: those on disk are read, damaged or missing ones sampled, from the state before them."""

    def __init__(self, program: _Program, starts: list[_Chain], store: BlockStore | None):
        self.program, self.store, self.starts = program, store, starts
        self.records: list[list[dict[str, np.ndarray]]] = [[] for _ in starts]
        self.latest: list[_Chain | None] = list(starts)  # None: on disk
        # A context of the calling thread, which threads of a pool do not share.
        self.x64 = jnp.result_type(float) == jnp.float64

    def read(self, k: int) -> dict[int, dict[str, np.ndarray]]:
        """Block k of the groups whose file is whole."""
        return {} if self.store is None else {g: r for g in range(len(self.starts)) if (r := self.store.read(g, k))}

    def sample(self, g: int, k: int, n: int) -> dict[str, np.ndarray]:
        """Sample block k of a group, and write it with the state after it."""
        with jax.enable_x64(self.x64):
            state, record = self.program.advance(self.state(g, k - 1), n)
        if self.store is not None:
            self.store.write(g, k, record, state)
        self.latest[g] = state
        return record

    def accept(self, g: int, record, resumed: bool) -> None:
        self.records[g].append(record)
        if resumed:
            self.latest[g] = None

    def state(self, g: int, k: int) -> _Chain:
        """The state after block k; where its file is damaged, that block is sampled again to have it."""
        latest = self.latest[g]
        if latest is not None and k == len(self.records[g]) - 1:
            return latest
        if k < 0 or self.store is None:
            return self.starts[g]
        state = self.store.read_state(g, k, self.starts[g])
        if state is None:
            n = self.records[g][k]["theta"].shape[1]
            state, record = self.program.advance(self.state(g, k - 1), n)
            self.store.write(g, k, record, state)
        elif self._since(state, g, k + 1):
            folder = self.store.folder
            raise RuntimeError(
                f"Expected block {k} of {folder} to end where its state does; it does not. Remove {folder}."
            )
        return state

    def length(self, k: int) -> int | None:
        """Transitions of block k where no chain has it but its state is there: a shorter run may have ended in it."""
        for g, like in enumerate(self.starts):
            if self.store is not None and self.store.has_state(g, k):
                state = self.store.read_state(g, k, like)
                if state is not None and 0 < self._since(state, g, k) <= self.program.block:
                    return self._since(state, g, k)
        return None

    def _since(self, state: _Chain, g: int, k: int) -> int:
        """Transitions of a state that are not in the first k blocks."""
        done = sum(record["theta"].shape[1] for record in self.records[g][:k])
        return int(state.n[0]) + self.program.kernel.n_warmup - done


def _run(program, starts, groups, stop, store, report):
    """All blocks of all groups, in rounds, so that the chains stay level."""
    blocks = _Blocks(program, starts, store)
    size, k, own_data = program.block, 0, starts[0].data is not None
    # One thread for each core: a chain's many small operations leave the other cores idle.
    with report, ThreadPoolExecutor(min(len(groups), os.cpu_count() or 1)) as pool:
        while k == 0 or not stop(blocks.records):
            done = sum(r["theta"].shape[1] for r in blocks.records[0])
            there = blocks.read(k)
            lengths = {record["theta"].shape[1] for record in there.values()}
            left = stop.n_warmup + stop.n_samples - done
            n = lengths.pop() if lengths else blocks.length(k) or min(size, left)
            for g, record in there.items():
                blocks.accept(g, record, resumed=True)
                check_record(record, groups[g], done, stop.n_warmup, own_data)
                report(groups[g], record, resumed=True)
            running = {pool.submit(blocks.sample, g, k, n): g for g in range(len(groups)) if g not in there}
            for finished in as_completed(running):
                g, record = running[finished], finished.result()
                blocks.accept(g, record, resumed=False)
                check_record(record, groups[g], done, stop.n_warmup, own_data)
                report(groups[g], record)
            k += 1
        return blocks.records, [blocks.state(g, k - 1) for g in range(len(groups))]


def _collect(records, states, names, n_warmup, n_samples, gradients, account, tracked) -> Chains:
    total = n_warmup + n_samples
    chains = [{k: np.concatenate([r[k] for r in rows], 1)[:, :total] for k in rows[0]} for rows in records]
    record = {k: np.concatenate([chain[k] for chain in chains]) for k in chains[0]}
    kept = {k: v[:, n_warmup:] for k, v in record.items()}
    steps = kept.pop("step_size")[:, -1]
    gradients += int(record["num_steps"].sum())
    moments = _moments(states) if tracked else None
    return Chains(
        names=names, step_size=steps, gradients=gradients, n_warmup=n_warmup, settings=account, tracked=moments, **kept
    )


def _moments(states) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all draws of all chains, from each chain's mean and sum of squares."""
    n = int(states[0].n.ravel()[0])
    mean = np.concatenate([np.asarray(s.mean, float) for s in states])
    scatter = np.concatenate([np.asarray(s.scatter, float) for s in states])
    centre = mean.mean(0)
    variance = (scatter.sum(0) + n * ((mean - centre) ** 2).sum(0)) / (n * len(mean) - 1)
    return centre, np.sqrt(variance)


def _check(init, n_warmup: int, block: int, n_samples: int, chain_method: str, until_ess) -> int:
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(init)}
    if len(counts) != 1 or counts == {()} or counts == {(0,)}:
        shapes = jax.tree.map(jnp.shape, init)
        raise ValueError(f"Expected init with one leading chain axis on every leaf; got shapes {shapes}.")
    if chain_method not in ("sequential", "vectorized"):
        raise ValueError(f'Expected chain_method "sequential" or "vectorized"; got {chain_method!r}.')
    if n_warmup < 0 or n_samples < 1 or block < 1:
        got = f"{n_warmup}, {n_samples} and {block}"
        raise ValueError(f"Expected n_warmup >= 0, n_samples >= 1 and block >= 1; got {got}.")
    if until_ess is not None and not until_ess > 0:
        raise ValueError(f"Expected until_ess > 0; got {until_ess}.")
    return counts.pop()[0]


def _whole(init) -> Callable:
    if len(jax.tree.leaves(init)) > 1 or jax.tree.leaves(init)[0].ndim != 2:
        raise ValueError("Expected extract, position -> (p,), for positions that are not one vector; got None.")
    return _only_leaf


def _only_leaf(z) -> Array:
    return jax.tree.leaves(z)[0]


def _names(names, extract, init) -> tuple[str, ...]:
    shape = jax.eval_shape(extract, jax.tree.map(lambda a: a[0], init)).shape
    names = tuple(f"theta_{i}" for i in range(shape[0] if shape else 1)) if names is None else tuple(names)
    if shape != (len(names),):
        raise ValueError(f"Expected extract(position) with shape ({len(names)},), one for each name; got {shape}.")
    return names


def _check_data(data, n_chains: int, until_ess) -> None:
    shapes = [leaf.shape for leaf in jax.tree.leaves(data)]
    if any(shape[:1] != (n_chains,) for shape in shapes):
        raise ValueError(f"Expected data with a leading axis of {n_chains} chains on every leaf; got shapes {shapes}.")
    if until_ess is not None:
        raise ValueError("Expected no until_ess where chains have data, so targets, of their own.")


def _zeros(shape) -> Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _numeric(leaf) -> bool:
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _plain(value):
    """Nested tuples as lists, as JSON returns them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
