r"""Fishnets: the score and the Fisher information of a set, as sums of what a network says of each member.

Makinen, Alsing & Wandelt 2023, arXiv:2310.03812. Their loss is the posterior's negative log-density where that is
normal, and the precision of a posterior is that of the data *and* of the prior: here the prior's stands beside the
sum, so that it is not learned as a part of every member's own. Without it a network overestimates what large sets
know, and empty and tiny sets have a singular matrix.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key
from diffsbi.compression.graphs import Graph, check_graphs
from diffsbi.compression.sets import AbstractSetNetwork, check_set, cholesky, solve_lower

GROUPS = 8  # parts that a set is split into while training
_EDGES = np.cumsum(np.r_[0.0, 0.7 ** np.arange(GROUPS)]) / np.sum(0.7 ** np.arange(GROUPS))  # each 0.7 of the last


class Information(eqx.Module):
    r"""Score t and Fisher matrix F of a set, at the fiducial $\theta_0$; those of disjoint sets are added.

    Attributes:
        score: $t = \sum_i t_i$, gradient of the log-likelihood at $\theta_0$, `(p,)`.
        fisher: $F = \sum_i F_i$, `(p, p)`.
        fiducial: $\theta_0$, `(p,)`.
    """

    score: Float[Array, " p"]
    fisher: Float[Array, "p p"]
    fiducial: Float[Array, " p"]

    def at(self, theta: Float[Array, " p"]) -> "Information":
        r"""The same log-likelihood, quadratic in theta, expanded about another point: $t - F(\theta - \theta_0)$."""
        theta = jnp.asarray(theta)
        return Information(self.score - self.fisher @ (theta - self.fiducial), self.fisher, theta)

    def estimate(self, precision: Float[Array, "p p"] | None = None) -> Float[Array, " p"]:
        r"""$(F + P)^{-1} t + \theta_0$, most probable under a normal prior about $\theta_0$ of precision P, or none."""
        matrix = self.fisher if precision is None else self.fisher + precision
        return jnp.linalg.solve(matrix, self.score) + self.fiducial


class Fishnet(eqx.Module):
    r"""A compression of sets: x `(n, *event)`, mask `(n,)` → $\hat\theta = (F + P)^{-1} t + \theta_0$, `(p,)`.

    Or of graphs, whose nodes are the members: x is a `Graph`, the mask that of its nodes.

    The network works with standardised members and whitened parameters $u = R^{-1}(\theta - \theta_0)$, in which the
    prior's precision is the identity: $t = R^{-T} t_u$, $F = R^{-T} F_u R^{-1}$, $P = R^{-T} R^{-1}$.

    Attributes:
        network: What is trained; `FisherSum`, or a baseline.
        x_loc: Mean of the training members, shape of one member; of nodes and of edges `((d,), (e,))` of graphs.
        x_scale: Their standard deviation.
        fiducial: $\theta_0$, the mean of the training parameters, `(p,)`.
        root: R, Cholesky factor of their covariance, `(p, p)`.
    """

    network: AbstractSetNetwork
    x_loc: Any
    x_scale: Any
    fiducial: Float[Array, " p"]
    root: Float[Array, "p p"]

    def __call__(self, x: Array, mask: Array | None = None, *, chunk: int | None = None) -> Float[Array, " p"]:
        """The estimate; vmap it over sets. A mean of the prior and of the data, the prior's mean for an empty set."""
        return self.information(x, mask, chunk=chunk).estimate(self.precision)

    @property
    def precision(self) -> Float[Array, "p p"]:
        """P, the inverse covariance of the training parameters."""
        return self._outer(jnp.eye(len(self.fiducial), dtype=self.root.dtype))

    def information(self, x: Array, mask: Array | None = None, *, chunk: int | None = None) -> Information:
        """Score and Fisher matrix of one set.

        Args:
            x: Members, `(n, *event)`; the rows that are masked out may hold anything.
            mask: True where there is a member, `(n,)`; None for all of them.
            chunk: Members to compute at once, forwards and backwards; memory is then that of one chunk and of x.

        Raises:
            ValueError: For shapes that do not fit, or, outside jit, a set without members or with non-finite ones.
        """
        x, mask = check_members(x, mask, self.event)
        if chunk is not None and isinstance(x, Graph):
            raise ValueError(f"Expected chunk=None for a graph, whose nodes are known together; got {chunk}.")
        return _information(self, x, mask, chunk)

    @property
    def event(self) -> tuple:
        """Shape of a member; of nodes and of edges `((d,), (e,))` of graphs."""
        return tuple(a.shape for a in self.x_loc) if isinstance(self.x_loc, tuple) else self.x_loc.shape

    def standardised(self, x, mask: Array):
        """Members in units of the training members' scatter, `(*n, *event)`; zeros where there is none."""
        if not isinstance(x, Graph):
            return _standardised(x, mask, self.x_loc, self.x_scale)
        masks, numbers = (mask, x.mask), zip(self.x_loc, self.x_scale, strict=True)
        parts = zip((x.nodes, x.edges), masks, numbers, strict=True)
        nodes, edges = (_standardised(features, there, *of) for features, there, of in parts)
        return Graph(nodes, edges, x.senders, x.receivers, x.mask)

    def _outer(self, fisher):
        half = jax.scipy.linalg.solve_triangular(self.root, fisher, trans=1, lower=True)
        return jax.scipy.linalg.solve_triangular(self.root, half.T, trans=1, lower=True)


def of_graphs(event: tuple) -> bool:
    """Whether an `event` is that of nodes and edges."""
    return bool(event) and isinstance(event[0], tuple)


def check_members(x, mask, event: tuple, *, batch: bool = False, empty: bool = False):
    """A set or a graph (many with `batch`) and its mask, checked against the `event` of a `Fishnet`."""
    graphs = of_graphs(event)
    if graphs != isinstance(x, Graph):
        wanted, got = ("a Graph", "an array") if graphs else ("an array of members", "a Graph")
        raise ValueError(f"Expected {wanted}, as in training; got {got}.")
    if graphs:
        return check_graphs(x, mask, (event[0][0], event[1][0]), batch=batch, empty=empty)
    return check_set(x, mask, event, batch=batch, empty=empty)


def _standardised(x: Array, mask: Array, loc: Array, scale: Array) -> Array:
    there = mask.reshape(mask.shape + (1,) * loc.ndim)
    loc = jnp.broadcast_to(loc, x.shape)
    x = jnp.where(there, x, loc)  # before the arithmetic: what is not there may be NaN, in gradients too
    return (x - loc) / jnp.broadcast_to(scale, x.shape)


@eqx.filter_jit
def _information(fishnet: Fishnet, x, mask: Array, chunk: int | None) -> Information:
    network, x = fishnet.network, fishnet.standardised(x, mask)
    if chunk is None:
        score, fisher = network.pooled(network.members(x), mask)
    else:
        score, fisher = _in_chunks(network, x, mask, chunk)
    score = jax.scipy.linalg.solve_triangular(fishnet.root, score, trans=1, lower=True)
    return Information(score, fishnet._outer(fisher), fishnet.fiducial)


def _in_chunks(network: AbstractSetNetwork, x: Array, mask: Array, chunk: int):
    """(t, F) of a sum over members, a chunk after another; each is computed again for the gradient."""
    if not network.additive:
        raise ValueError("Expected a network that is a sum over members; a deep set cannot be added up in chunks.")
    if chunk < 1:
        raise ValueError(f"Expected chunk >= 1; got {chunk}.")
    parts = -(-len(x) // chunk)
    short = parts * chunk - len(x)
    x = jnp.pad(x, [(0, short)] + [(0, 0)] * (x.ndim - 1)).reshape(parts, chunk, *x.shape[1:])
    mask = jnp.pad(mask, (0, short)).reshape(parts, chunk)

    @jax.checkpoint
    def part(x, mask):
        return network.pooled(network.members(x), mask)

    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(part, x[0], mask[0]))
    return jax.lax.scan(lambda total, inputs: (jax.tree.map(jnp.add, total, part(*inputs)), None), start, (x, mask))[0]


def stream(fishnet: Fishnet, chunks: Iterable) -> Information:
    """Score and Fisher matrix of a set that is larger than memory, in float64 whatever JAX's own precision.

    Args:
        fishnet: A `Fishnet` that adds its members up.
        chunks: Parts of the set, `x (n, *event)` or `(x, mask)`, or graphs that share no edge; equal shapes compile
            once.

    Raises:
        ValueError: For no chunks, or where `Fishnet.information` raises, naming the chunk.
    """
    if not fishnet.network.additive:
        raise ValueError("Expected a network that is a sum over members; a deep set cannot be added up in chunks.")
    score, fisher, members = np.zeros(()), np.zeros(()), 0
    for i, part in enumerate(chunks):
        x, mask = part if isinstance(part, tuple) else (part, None)
        try:
            x, mask = check_members(x, mask, fishnet.event, empty=True)
        except ValueError as error:
            raise ValueError(f"Chunk {i}: {error}") from error
        found = _information(fishnet, x, mask, None)
        score, fisher = score + np.asarray(found.score, float), fisher + np.asarray(found.fisher, float)
        members += int(np.sum(mask))
    if not members:
        raise ValueError("Expected chunks with at least one member in all; got none.")
    return Information(score, fisher, np.asarray(fishnet.fiducial))  # type: ignore[call-arg]


def normal_loss(u: Float[Array, " p"], score: Float[Array, " p"], fisher: Float[Array, "p p"]) -> Array:
    r"""$\frac12 (u-\hat u)^T M (u-\hat u) - \frac12 \ln\det M$ with $M = F + 1$, $\hat u = M^{-1} t$.

    The negative log-density, but for a constant, of a normal posterior whose prior is a standard normal. Never
    inverts M: with $M = L L^T$ the quadratic form is $|L^T u - L^{-1} t|^2$.
    """
    lower = cholesky(fisher + jnp.eye(len(u), dtype=fisher.dtype))
    miss = lower.T @ u - solve_lower(lower, score)
    return 0.5 * jnp.sum(miss**2) - jnp.sum(jnp.log(jnp.diag(lower)))


def set_loss(params, static, batch, key: Key) -> Array:
    r"""Mean `normal_loss` of a batch: `u (b, p)`, `x` (leaves with b rows), `mask (b, n)`, `split (b,)`.

    Where `split` is not 0, a set is also dealt into `GROUPS` random parts of a third to a thirtieth of its members,
    each of them a set of the same theta: one pass over the members teaches sums of many sizes, and many estimates
    for each simulation. For members that are independent given theta. The parts are new in every step where `split`
    is 1, and always the same where it is 2, for validation.
    """
    network = eqx.combine(params, static)
    fresh, fixed = (jax.random.uniform(k, batch["mask"].shape) for k in (key, jax.random.key(0)))
    lot = jnp.where(batch["split"][:, None] == 1, fresh, fixed)

    def one(u, x, mask, split, lot):
        found = network.members(x)
        parts = mask[None] & (lot[None] >= _EDGES[:-1, None]) & (lot[None] < _EDGES[1:, None])
        score, fisher = jax.vmap(lambda m: network.pooled(found, m))(jnp.concatenate([mask[None], parts]))
        losses = jax.vmap(normal_loss, (None, 0, 0))(u, score, fisher)
        return jnp.where(split > 0, jnp.mean(losses), losses[0])

    return jnp.mean(jax.vmap(one)(batch["u"], batch["x"], batch["mask"], batch["split"], lot))
