r"""Sets of simulations at one point theta0, with derivatives with respect to theta, however they come about.

A set offers rows, and for ONE row the summary t = f(x) and its derivative dt/dtheta of a network f. What is done with
them (all at once, a few at a time, on several devices) is written once, in `summaries_of`.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from diffsbi._types import Array, Float, Key

Network = Callable[[Array], Array]


class AbstractSimulations(eqx.Module):
    """`n_s` simulations at `theta0 (p,)`, the first `n_d` of them with derivatives; `x` has shape `x_shape`.

    `data` is what rows are made of, so that it can be split among devices while the rest is copied to each.
    """

    theta0: eqx.AbstractVar[Float[Array, " p"]]
    data: eqx.AbstractVar[Any]
    n_s: eqx.AbstractVar[int]
    n_d: eqx.AbstractVar[int]
    x_shape: eqx.AbstractVar[tuple[int, ...]]

    @abc.abstractmethod
    def rows(self, key: Key) -> tuple[Any, Any]:
        """Pytrees with the rows first: the `n_d` with derivatives, and the `n_s - n_d` without."""

    @abc.abstractmethod
    def summary(self, network: Network, row) -> Float[Array, " m"]:
        """t of one row without derivative."""

    @abc.abstractmethod
    def linear(self, network: Network, row) -> tuple[Float[Array, " m"], Float[Array, "m p"]]:
        """(t, dt/dtheta) of one row with derivative."""


class Simulated(AbstractSimulations):
    """Simulations on the fly, `simulate(theta, key)`, with forward-mode derivatives at fixed seeds.

    With `key` the seeds, and so the simulations, are always the same; without, they are those of the key that is
    passed, new ones in every step of a fit.
    """

    simulate: Callable[[Array, Key], Array]
    theta0: Array
    n_s: int = eqx.field(static=True)
    n_d: int = eqx.field(static=True)
    x_shape: tuple[int, ...] = eqx.field(static=True)
    key: Key | None = None
    data: None = None

    def rows(self, key):
        key = key if self.key is None else self.key
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(self.n_s))
        return keys[: self.n_d], keys[self.n_d :]

    def summary(self, network, row):
        return network(self.simulate(self.theta0, row))

    def linear(self, network, row):
        through = lambda theta: network(self.simulate(theta, row))  # noqa: E731
        return _along(through, self.theta0, jnp.eye(len(self.theta0), dtype=self.theta0.dtype))


class _InMemory(AbstractSimulations):
    """Simulations that are kept: `data` = ((x, what derivatives are made of), x without)."""

    theta0: Array
    data: Any
    n_s: int = eqx.field(static=True)
    n_d: int = eqx.field(static=True)
    x_shape: tuple[int, ...] = eqx.field(static=True)

    def rows(self, key):
        return self.data

    def summary(self, network, row):
        return network(row)


class Stored(_InMemory):
    """Simulations with stored derivatives: `data` = ((x, dx/dtheta), x without), dx/dtheta of shape `(*x_shape, p)`."""

    def linear(self, network, row):
        x, dx = row
        return _along(network, x, dx)


class Pairs(_InMemory):
    r"""Simulations, and others of the same seeds at $\theta_0 \mp \delta\theta/2$; `data`: ((x, minus, plus), x alone).

    `minus` and `plus` of one row are `(p, *x_shape)`, row a at the a-th parameter moved; `width` is δθ `(p,)`.
    """

    width: Array

    def linear(self, network, row):
        x, minus, plus = row
        change = jax.vmap(network)(plus) - jax.vmap(network)(minus)
        return network(x), (change / self.width[:, None]).T


class Streamed(AbstractSimulations):
    """`Stored` or `Pairs` whose arrays stay where they are, on disk or in the host's memory; `data` are row numbers.

    Rows are read when they are needed, in blocks of as many as are summarised at once, and again in the backward pass.
    """

    theta0: Array
    kind: Stored | Pairs
    data: tuple[Array, Array]
    read: Callable[[np.ndarray, int], tuple[np.ndarray, ...]] = eqx.field(static=True)
    row_shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    n_s: int = eqx.field(static=True)
    n_d: int = eqx.field(static=True)
    x_shape: tuple[int, ...] = eqx.field(static=True)

    def rows(self, key):
        return self.data

    def summary(self, network, row):
        return self.kind.summary(network, self._read(row, 1)[0])

    def linear(self, network, row):
        return self.kind.linear(network, self._read(row, len(self.row_shapes)))

    def _read(self, index, n_arrays):
        dtype = self.theta0.dtype
        words = dtype.itemsize // 4
        # As 32-bit words: the thread that reads does not know of `jax.enable_x64`, and would make float32 of float64.
        wanted = tuple(jax.ShapeDtypeStruct((*s, words), jnp.uint32) for s in self.row_shapes[:n_arrays])

        def read(i):
            found = (np.ascontiguousarray(a, dtype) for a in self.read(np.asarray(i), n_arrays))
            return tuple(a.view(np.uint32).reshape(*a.shape, words) for a in found)

        rows = jax.pure_callback(read, wanted, index, vmap_method="broadcast_all")
        return tuple(jax.lax.bitcast_convert_type(a if words > 1 else a[..., 0], dtype) for a in rows)


def _along(function, at, tangents):
    """(f(at), its derivative along `tangents[..., a]`, `(m, p)`)."""
    push = jax.vmap(lambda d: jax.jvp(function, (at,), (d,)), in_axes=-1, out_axes=(None, -1))
    return push(tangents)


def summaries_of(
    network: Network,
    simulations: AbstractSimulations,
    key: Key,
    n_per_device: int | None = None,
    devices: tuple[jax.Device, ...] | None = None,
) -> tuple[Float[Array, "n_s m"], Float[Array, "n_d m p"]]:
    """Summaries of all simulations and the derivatives of the first n_d.

    With `n_per_device` only so many simulations (with derivatives and all activations) are in memory at a time, on
    every one of the devices: summaries are kept, the rest is forgotten and computed again in the backward pass.
    Reverse mode through this is the chain rule in two passes: d loss / d summaries of the whole set first, then
    block after block its product with d summaries / d weights.
    """
    rest = eqx.tree_at(lambda s: s.data, simulations, None, is_leaf=lambda x: x is None)
    together, alone = simulations.rows(key)

    def each(of_row: str, rows):
        arrays, static = eqx.partition((network, rest), eqx.is_array)

        def local(arrays, rows):
            model, source = eqx.combine(arrays, static)
            evaluate = lambda row: getattr(source, of_row)(model, row)  # noqa: E731
            if n_per_device is None:
                return jax.vmap(evaluate)(rows)
            return jax.lax.map(jax.checkpoint(evaluate), rows, batch_size=n_per_device)

        if devices is None or len(devices) == 1:
            return local(arrays, rows)
        specs = PartitionSpec(), PartitionSpec("device")
        # The check of replication knows nothing of callbacks to the host, and loses part of their gradient.
        mesh = Mesh(np.asarray(devices), ("device",))
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)(arrays, rows)

    t, dt = each("linear", together)
    if simulations.n_s > simulations.n_d:
        t = jnp.concatenate([t, each("summary", alone)])
    return t, dt
