r"""Fisher-weighted aggregation for graph networks, and the usual ones; arrays as in jraph, no dependency on it.

A graph is `senders (m,)` and `receivers (m,)`, indices of the nodes of each of m edges, with features
`nodes (n, d)` and `edges (m, e)`. Graphs of different sizes are padded: masked edges send nothing.
"""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.compression.sets import (
    AbstractFisherSum,
    MemberNetwork,
    check_mask,
    cholesky,
    residual_mlp,
    solve_lower,
)

AGGREGATIONS = ("sum", "mean", "max", "attention")


class Graph(eqx.Module):
    """One graph, or many with a leading axis, padded to the same sizes.

    `check_graph` tells what is wrong with one.

    Attributes:
        nodes: Features of the nodes, `(n, d)`; d may be 0.
        edges: Features of the edges, `(m, e)`.
        senders: Index of the node where each edge begins, `(m,)`.
        receivers: Index of the node where it ends, `(m,)`.
        mask: True where there is an edge, `(m,)`.
    """

    nodes: Float[Array, "n d"]
    edges: Float[Array, "m e"]
    senders: Array
    receivers: Array
    mask: Array

    def messages(self) -> Float[Array, "m 2d+e"]:
        """Features of sender, receiver and edge of every message."""
        return jnp.concatenate([self.nodes[self.senders], self.nodes[self.receivers], self.edges], -1)


class FisherAggregation(eqx.Module):
    r"""Messages j → i to node i: $M_i = 1 + \sum_j F_{ij} = L L^T$ and $t_i = \sum_j t_{ij}$, learned weights.

    What a node receives is the estimate $\hat u_i = M_i^{-1} t_i$ of `dim` latent numbers that the messages are about,
    the logarithms of L's diagonal, and what is below it over the diagonal of the same column: `size` = dim +
    dim (dim + 1) / 2 features. As L is triangular, its last rows are the information on the last numbers with the
    first ones unknown: a nuisance of the node is integrated out. A node without messages receives zeros. A drop-in
    for a sum, mean or largest of messages.

    Args:
        key: Initial weights.
        n_in: Features of a message.
        dim: Latent numbers.
        width: Hidden units of the message network.
        depth: Its hidden layers.
    """

    message: MemberNetwork

    def __init__(self, key: Key, n_in: int, dim: int, *, width: int = 32, depth: int = 2):
        self.message = MemberNetwork(key, n_in, dim, width=width, depth=depth)

    @property
    def size(self) -> int:
        """Features that a node receives."""
        return _size(self.message.dim)

    def __call__(self, messages, receivers, n_nodes: int, mask=None) -> Float[Array, "n_nodes size"]:
        """Messages `(m, n_in)` to what each of `n_nodes` receives; `mask (m,)` is True where there is a message."""
        mask = _check_messages(messages, receivers, n_nodes, mask)
        score, fisher = jax.vmap(self.message)(jnp.where(mask[:, None], messages, 0.0))
        score = segment_sum(jnp.where(mask[:, None], score, 0.0), receivers, n_nodes)
        fisher = segment_sum(jnp.where(mask[:, None, None], fisher, 0.0), receivers, n_nodes)
        return jax.vmap(_received)(score, fisher)


def _size(dim: int) -> int:
    return dim * (dim + 3) // 2


def _received(score, fisher):
    dim = len(score)
    lower = cholesky(fisher + jnp.eye(dim, dtype=fisher.dtype))
    half, diagonal = solve_lower(lower, score), jnp.diag(lower)
    estimate = solve_lower(lower[::-1, ::-1].T, half[::-1])[::-1]  # L^T u = L^{-1} t, its rows reversed
    below = (lower / diagonal[None, :])[np.tril_indices(dim, -1)]
    return jnp.concatenate([estimate, jnp.log(diagonal), below])


class Aggregation(eqx.Module):
    """The usual aggregations: "sum", "mean" or "max" of messages, or "attention", a mean with softmax weights.

    Args:
        key: Initial weights.
        n_in: Features of a message.
        size: Features that a node receives.
        how: One of the four.
        width: Hidden units of the message network.
        depth: Its hidden layers.
    """

    linear: eqx.nn.Linear
    mlp: eqx.nn.MLP | None
    size: int = eqx.field(static=True)
    how: str = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        n_in: int,
        size: int,
        how: Literal["sum", "mean", "max", "attention"],
        *,
        width: int = 32,
        depth: int = 2,
    ):
        if how not in AGGREGATIONS:
            raise ValueError(f"Expected how to be one of {list(AGGREGATIONS)}; got {how!r}.")
        keys = jax.random.split(check_key(key))
        n_out = size + (how == "attention")
        self.linear = eqx.nn.Linear(n_in, n_out, key=keys[0])
        self.mlp = residual_mlp(keys[1], n_in, n_out, width, depth)
        self.size, self.how = size, how

    def __call__(self, messages, receivers, n_nodes: int, mask=None) -> Float[Array, "n_nodes size"]:
        """As `FisherAggregation`; a node without messages receives zeros."""
        mask = _check_messages(messages, receivers, n_nodes, mask)
        messages = jnp.where(mask[:, None], messages, 0.0)
        out = jax.vmap(self.linear)(messages)
        out = out if self.mlp is None else out + jax.vmap(self.mlp)(messages)
        values, there = out[:, : self.size], mask[:, None]
        weights = mask.astype(values.dtype)
        if self.how == "max":
            largest = _segment_max(jnp.where(there, values, -jnp.inf), receivers, n_nodes)
            return jnp.where(jnp.isfinite(largest), largest, 0.0)
        if self.how == "attention":
            weights = _softmax(jnp.where(mask, out[:, -1], -jnp.inf), receivers, n_nodes)
        total = segment_sum(jnp.where(there, values, 0.0) * weights[:, None], receivers, n_nodes)
        if self.how == "mean":
            return total / jnp.maximum(segment_sum(weights, receivers, n_nodes), 1.0)[:, None]
        return total


class GraphFishnet(AbstractFisherSum):
    r"""A graph → (t, F): messages aggregated at the nodes, and the nodes' scores and Fisher matrices added up.

    `fit_fishnet(key, theta, graphs)` makes and trains one; the nodes are the members of the set.
    """

    aggregation: FisherAggregation | Aggregation
    node: MemberNetwork

    @classmethod
    def build(
        cls,
        key: Key,
        sizes: tuple[int, int],
        dim: int,
        how: str = "fishnet",
        *,
        form: str = "residual",
        width: int = 32,
        depth: int = 2,
    ) -> "GraphFishnet":
        """For `sizes` (d, e) features of nodes and edges and `dim` parameters, how: "fishnet" or an `Aggregation`'s.

        Messages are about dim + 1 latent numbers, one for what is a node's own.
        """
        keys, (d, e) = jax.random.split(key), sizes
        hidden, latent = dict(width=width, depth=depth), dim + 1
        aggregation: FisherAggregation | Aggregation
        if how == "fishnet":
            aggregation = FisherAggregation(keys[0], 2 * d + e, latent, **hidden)
        else:
            aggregation = Aggregation(keys[0], 2 * d + e, _size(latent), how, **hidden)  # type: ignore[arg-type]
        node = MemberNetwork(keys[1], d + aggregation.size, dim, form=form, **hidden)  # type: ignore[arg-type]
        return cls(aggregation, node)

    def members(self, x: Graph):
        received = self.aggregation(x.messages(), x.receivers, len(x.nodes), x.mask)
        return jax.vmap(self.node)(jnp.concatenate([x.nodes, received], -1))


def segment_sum(values: Array, receivers, n_nodes: int) -> Array:
    """Sum of the rows that go to each node, `(n_nodes, ...)`."""
    return jax.ops.segment_sum(values, receivers, n_nodes)


def _segment_max(values, receivers, n_nodes):
    return jax.ops.segment_max(values, receivers, n_nodes)


def _softmax(logits: Float[Array, " m"], receivers, n_nodes: int) -> Float[Array, " m"]:
    """Softmax among the messages of each node; 0 where the logit is -inf."""
    largest = _segment_max(logits, receivers, n_nodes)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(logits - largest[receivers])
    total = segment_sum(weights, receivers, n_nodes)
    return weights / jnp.where(total > 0, total, 1.0)[receivers]


def check_graphs(
    graphs: Graph, mask, sizes: tuple[int, int], *, batch: bool = False, empty: bool = False
) -> tuple[Graph, Array]:
    """One graph (many with `batch`) of `sizes` (d, e) features of nodes and edges, and the mask of its nodes, checked.

    Raises:
        ValueError: As `check_graph` and `check_set`; inside jit only shapes are known.
    """
    shapes = jnp.shape(graphs.nodes), jnp.shape(graphs.edges)
    if len(shapes[0]) != 2 + batch or (shapes[0][-1], shapes[1][-1]) != tuple(sizes):
        leading = "graphs, " if batch else ""
        wanted = f"({leading}n, {sizes[0]}) and ({leading}m, {sizes[1]})"
        raise ValueError(f"Expected nodes and edges of shapes {wanted}; got {shapes[0]} and {shapes[1]}.")
    mask = check_mask(mask, shapes[0][:-1], empty=empty)
    if not any(isinstance(a, jax.core.Tracer) for a in (*jax.tree.leaves(graphs), mask)):
        check_graph(graphs, mask, empty=empty)
    nodes, edges = (jnp.asarray(a, jnp.result_type(float)) for a in (graphs.nodes, graphs.edges))
    senders, receivers = jnp.asarray(graphs.senders), jnp.asarray(graphs.receivers)
    return Graph(nodes, edges, senders, receivers, jnp.asarray(graphs.mask, bool)), mask


def check_graph(graph: Graph, nodes_mask=None, *, empty: bool = False) -> None:
    """Check one graph, or many with a leading axis, before training: inside jit nothing is known of the numbers.

    `nodes_mask` is True where there is a node; None: everywhere. With `empty` a graph may have no edge.

    Raises:
        ValueError: For shapes that do not fit, no edges, senders or receivers that are no nodes, and features that are
            not finite, naming the first.
    """
    nodes, edges, mask = (np.asarray(a) for a in (graph.nodes, graph.edges, graph.mask))
    rows = edges.shape[:-1]
    for name, ends in (("senders", graph.senders), ("receivers", graph.receivers), ("mask", mask)):
        if np.shape(ends) != rows:
            raise ValueError(f"Expected {name} of shape {rows}, one entry for each edge; got {np.shape(ends)}.")
    if nodes.ndim != edges.ndim or nodes.shape[:-2] != edges.shape[:-2]:
        raise ValueError(f"Expected nodes and edges of as many graphs; got {nodes.shape} and {edges.shape}.")
    there = mask.astype(bool)
    if not empty and not (counts := np.atleast_1d(there.sum(-1))).all():
        none = int(np.sum(counts == 0))
        raise ValueError(f"Expected graphs with at least one edge; {none} of {counts.size} have none.")
    known = np.ones(nodes.shape[:-1], bool) if nodes_mask is None else np.asarray(nodes_mask, bool)
    for name, ends in (("senders", np.asarray(graph.senders)), ("receivers", np.asarray(graph.receivers))):
        _check_ends(name, ends, there, nodes.shape[-2])
        none = there & ~np.take_along_axis(known, np.where(there, ends, 0), -1)
        if none.any():
            first = tuple(map(int, np.argwhere(none)[0]))
            raise ValueError(
                f"Expected {name} that are nodes of the mask; {int(none.sum())} are not, first at {first}."
            )
    for name, features, used in (("nodes", nodes, known), ("edges", edges, there)):
        bad = ~np.isfinite(features).all(-1) & used
        if bad.any():
            first = tuple(map(int, np.argwhere(bad)[0]))
            raise ValueError(f"Expected finite {name}; {int(bad.sum())} are not, the first at {first}.")


def _check_ends(name: str, ends: np.ndarray, there: np.ndarray, n_nodes: int) -> None:
    bad = there & ((ends < 0) | (ends >= n_nodes))
    if bad.any():
        raise ValueError(
            f"Expected {name} between 0 and {n_nodes - 1}, the nodes; got {int(ends[bad][0])} at "
            f"{tuple(map(int, np.argwhere(bad)[0]))}."
        )


def _check_messages(messages, receivers, n_nodes: int, mask) -> Array:
    if messages.ndim != 2 or receivers.shape != messages.shape[:1]:
        raise ValueError(
            f"Expected messages (m, features) and receivers (m,); got {messages.shape} and {receivers.shape}."
        )
    if mask is None:
        mask = jnp.ones(len(messages), bool)
    if mask.shape != receivers.shape:
        raise ValueError(f"Expected mask of shape {receivers.shape}, one entry for each message; got {mask.shape}.")
    if not any(isinstance(a, jax.core.Tracer) for a in (receivers, mask)):
        _check_ends("receivers", np.asarray(receivers), np.asarray(mask, bool), n_nodes)
    return mask.astype(bool)
