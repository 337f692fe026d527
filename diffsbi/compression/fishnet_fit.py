"""Fitting Fishnets (and baselines for sets) with the one training loop, and keeping them in files."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Key, check_finite, check_key
from diffsbi.compression.arrays import shared_rows
from diffsbi.compression.fishnets import Fishnet, check_members, of_graphs, set_loss
from diffsbi.compression.graphs import AGGREGATIONS, Aggregation, FisherAggregation, Graph, GraphFishnet
from diffsbi.compression.saving import check_probe, fixed_input, load_module, read_header, save_module
from diffsbi.compression.sets import POOLS, AbstractSetNetwork, DeepSet, FisherSum, MemberNetwork
from diffsbi.inference.losses import zero_at_first
from diffsbi.inference.training import History, fit, split_rows

KIND = "fishnet"
KINDS = ("fishnet", *POOLS)
_PROBED = 3  # members of the set that tells two architectures apart
_SINGULAR = 1e-9  # smallest eigenvalue of the parameters' correlations


def fit_fishnet(
    key: Key,
    theta,
    x,
    mask=None,
    *,
    network: str | AbstractSetNetwork = "fishnet",
    form: str = "residual",
    width: int = 32,
    depth: int = 2,
    split: bool | None = None,
    start: bool = True,
    validation: tuple | float = 0.1,
    learning_rate: float = 3e-3,
    **options,
) -> tuple[Fishnet, History]:
    r"""Train a `Fishnet` on sets `x (n_sets, n, *event)` of parameters `theta (n_sets, p)`, or on graphs.

    Args:
        key: Initial weights, order of the rows, how sets are split.
        theta: Parameters; their mean is the fiducial, their covariance the prior's.
        x: Members of every set, padded to the same number. Features that a score is a simple function of help: the
            logarithm of a noise level rather than the level. Or a `Graph` with a leading axis of n_sets.
        mask: True where there is a member (a node), `(n_sets, n)`; None where all sets are full.
        network: "fishnet", a deep set with "sum", "mean" or "max", or an `AbstractSetNetwork` of your own. For graphs
            a `GraphFishnet`: "fishnet", whose messages have Fisher weights, or the other `AGGREGATIONS`.
        form: Of the members' Fisher matrices (`MemberNetwork`); of the nodes' those of a graph.
        width: Hidden units.
        depth: Hidden layers.
        split: Whether random parts of a set are sets too (`set_loss`): members independent given theta. By default
            so for sets; of a graph's nodes you must know.
        start: First fit the linear map of a "residual" `FisherSum` alone: few weights, in seconds. The perceptron
            then learns what is missing from it.
        validation: A fraction of the sets, or `(theta, x, mask)` of others. Of n sets, the epoch that is kept has
            Fisher matrices wrong by about $1/\sqrt{n p}$ at least, however many are trained on: keep many.
        learning_rate: First step size.
        options: Of `fit`: max_epochs, batch_size, patience, weight_decay, progress.

    Returns:
        The fishnet of the best epoch and the `History` of the last fit.

    Raises:
        ValueError: For shapes that do not fit, sets without members, non-finite members or parameters, and
            validation sets that are training sets as well.
    """
    key_network, key_split, key_start, key_fit = jax.random.split(check_key(key), 4)
    graphs = isinstance(x, Graph)
    event = (np.shape(x.nodes)[-1:], np.shape(x.edges)[-1:]) if graphs else np.shape(x)[2:]
    split = not graphs if split is None else split
    data = _checked(theta, x, mask, event)
    if isinstance(validation, tuple):
        theta, x, mask = (*validation, None)[:3]
        train, held_out = data, _checked(theta, x, mask, event)
        if held_out[0].shape[1] != train[0].shape[1]:
            p, got = train[0].shape[1], held_out[0].shape[1]
            raise ValueError(f"Expected validation with {p} parameters, as in training; got {got}.")
    else:
        chosen = split_rows(key_split, len(data[0]), validation)
        train, held_out = (jax.tree.map(lambda a, rows=rows: a[rows], data) for rows in chosen)
    _check_disjoint(train, held_out)
    module = _build(key_network, network, event, train[0].shape[1], form, width, depth)
    fishnet = _scaled(module, *train)
    rows, others = _rows(fishnet, train, int(split)), _rows(fishnet, held_out, 2 * split)
    options = {"batch_size": 32, "patience": 15, "max_epochs": 100} | options
    module = fishnet.network
    if start and isinstance(module, FisherSum) and module.member.form == "residual" and module.member.embed is None:
        module = _linear_start(key_start, module, rows, others, options)
    module, history = fit(key_fit, module, rows, others, set_loss, learning_rate=learning_rate, **options)
    return eqx.tree_at(lambda f: f.network, fishnet, module), history


def _linear_start(key, network: FisherSum, rows, others, options) -> FisherSum:
    """The network with its linear map fitted alone, and a perceptron that begins at zero."""
    member = network.member
    bare = FisherSum(eqx.tree_at(lambda m: m.mlp, member, None))
    bare, _ = fit(key, bare, rows, others, set_loss, learning_rate=2e-2, **options)
    if member.mlp is None:
        return bare
    start = (bare.member.linear, zero_at_first(member.mlp))
    return FisherSum(eqx.tree_at(lambda m: (m.linear, m.mlp), member, start))


def _checked(theta, x, mask, event: tuple[int, ...]) -> tuple:
    theta = np.asarray(theta)
    count = np.shape(x.nodes if isinstance(x, Graph) else x)[0]
    if theta.ndim != 2 or len(theta) != count:
        raise ValueError(f"Expected theta of shape (sets, p) with {count} sets, as x; got {theta.shape}.")
    check_finite("theta", theta)
    x, mask = check_members(x, mask, event, batch=True)
    return jnp.asarray(theta, jnp.result_type(float)), x, mask


def _check_disjoint(train, held_out) -> None:
    shared = shared_rows(jax.tree.leaves(train), jax.tree.leaves(held_out))
    if shared:
        raise ValueError(
            f"Expected validation sets that are not trained on; {shared} of {len(held_out[0])} are among the "
            "training sets, and the fit would not notice when it memorises. Simulate others, or give a fraction."
        )


def _build(key, network, event, dim, form, width, depth) -> AbstractSetNetwork:
    graphs = of_graphs(event)
    if isinstance(network, AbstractSetNetwork):
        if isinstance(network, FisherSum | DeepSet if graphs else GraphFishnet):
            what = "graphs" if graphs else "sets of members"
            raise ValueError(f"Expected a network for {what}; got a {type(network).__name__}.")
        return network
    kinds = ("fishnet", *AGGREGATIONS) if graphs else KINDS
    if network not in kinds:
        raise ValueError(f"Expected network to be one of {list(kinds)} or an AbstractSetNetwork; got {network!r}.")
    if graphs:
        sizes = event[0][0], event[1][0]
        return GraphFishnet.build(key, sizes, dim, network, form=form, width=width, depth=depth)
    n_in = int(np.prod(event))
    if network == "fishnet":
        return FisherSum(MemberNetwork(key, n_in, dim, width=width, depth=depth, form=form))  # type: ignore[arg-type]
    return DeepSet(key, n_in, dim, network, width=width, depth=depth)


def _scaled(network, theta, x, mask) -> Fishnet:
    """The fishnet with its standardisation, in float64 until the end."""
    if isinstance(x, Graph):
        parts = [_moments(x.nodes, mask), _moments(x.edges, x.mask)]
        moments: tuple = tuple(zip(*parts, strict=True))
    else:
        moments = _moments(x, mask)
    theta = np.asarray(theta, float)
    unit = theta.std(0, ddof=1)
    if not (unit > 0).all() or np.linalg.eigvalsh(np.atleast_2d(np.corrcoef(theta.T))).min() < _SINGULAR:
        raise ValueError(
            "Expected parameters that all vary, none a combination of others; their covariance is singular. "
            "Leave the superfluous ones out of theta."
        )
    root = np.linalg.cholesky(np.atleast_2d(np.cov(theta.T)))
    numbers = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), (*moments, theta.mean(0), root))
    return Fishnet(network, *numbers)


def _moments(x, mask) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of what is there; 1 for what does not vary."""
    members = np.asarray(x, float)[np.asarray(mask, bool)]
    scale = members.std(0)
    return members.mean(0), np.where(scale > 0, scale, 1.0)


def _rows(fishnet: Fishnet, data: tuple, split: int) -> dict[str, Any]:
    theta, x, mask = data
    shift = theta - jnp.broadcast_to(fishnet.fiducial, theta.shape)
    u = jax.scipy.linalg.solve_triangular(fishnet.root, shift.T, lower=True).T
    return {"u": u, "x": fishnet.standardised(x, mask), "mask": mask, "split": jnp.full(len(u), split)}


def save_fishnet(fishnet: Fishnet, path) -> None:
    """Write a fishnet: a JSON header with its architecture, a checksum and the arrays; no pickle."""
    event = fishnet.event
    header = {"architecture": _architecture(fishnet.network), "event": event, "dim": len(fishnet.fiducial)}
    about = {"dtype": str(fishnet.root.dtype), "probe": _probed(fishnet.network, event)}
    save_module(path, KIND, fishnet, header | about)


def load_fishnet(path, network: AbstractSetNetwork | None = None) -> Fishnet:
    """Read what `save_fishnet` wrote.

    Args:
        path: The file.
        network: A network of the same architecture (its weights do not matter); needed where it is your own.

    Raises:
        ValueError: Naming what is wrong: not such a file, another version, damaged, another precision or architecture.
    """
    header, about, payload = read_header(path, KIND)
    if header["dtype"] != str(jnp.dtype(jnp.result_type(float))):
        here = jnp.dtype(jnp.result_type(float))
        raise ValueError(f"Expected floats of {here}, the precision JAX is set to; {path} has {header['dtype']}.")
    event = tuple(tuple(n) if isinstance(n, list) else n for n in header["event"])
    dim, architecture = header["dim"], header["architecture"]
    if network is None:
        if architecture is None:
            raise ValueError(f"Expected network=..., the architecture that {path} was fitted with: it is your own.")
        network = _build(jax.random.key(0), event=event, dim=dim, **architecture)
    elif architecture is not None and _architecture(network) != architecture:
        raise ValueError(f"Expected a network of {architecture}, as in {path}; got {_architecture(network)}.")
    loc = tuple(jnp.zeros(shape) for shape in event) if of_graphs(event) else jnp.zeros(event)
    like = Fishnet(network, loc, loc, jnp.zeros(dim), jnp.eye(dim))
    fishnet = load_module(path, about, payload, like)
    if "probe" in header:  # not in files of older versions
        check_probe(path, _probed(fishnet.network, event), header["probe"])
    return fishnet


def _probed(network: AbstractSetNetwork, event) -> list[float]:
    """What the network says of a fixed set."""
    members = _fixed_graph(event) if of_graphs(event) else fixed_input([(_PROBED, *event), 0.0, 1.0])
    score, fisher = network.pooled(network.members(members), jnp.ones(_PROBED, bool))
    return [*np.asarray(score, float).tolist(), *np.asarray(fisher, float).ravel().tolist()]


def _fixed_graph(event) -> Graph:
    """Every node hears every other one: of one message a sum, a mean and the largest are the same."""
    senders, receivers = (jnp.asarray(ends) for ends in np.nonzero(~np.eye(_PROBED, dtype=bool)))
    nodes, edges = (
        fixed_input([(n, *shape), 0.0, 1.0]) for n, shape in zip((_PROBED, len(senders)), event, strict=True)
    )
    return Graph(nodes, edges, senders, receivers, jnp.ones(len(senders), bool))


def _architecture(network) -> dict[str, Any] | None:
    """Arguments of `_build`; None for a network of the user's own."""
    if type(network) is FisherSum and type(network.member) is MemberNetwork and network.member.embed is None:
        sizes = _sizes(network.member.mlp)
        return {"network": "fishnet", "form": network.member.form} | sizes
    if type(network) is DeepSet:
        return {"network": network.pool, "form": "residual"} | _sizes(network.encoder)
    if type(network) is GraphFishnet and network.node.embed is None:
        how, sizes = network.aggregation, _sizes(network.node.mlp)
        messages = how.message if isinstance(how, FisherAggregation) else how
        if _sizes(messages.mlp) == sizes:
            named = how.how if isinstance(how, Aggregation) else "fishnet"
            return {"network": named, "form": network.node.form} | sizes
    return None


def _sizes(mlp: eqx.nn.MLP | None) -> dict[str, int]:
    return {"width": 1, "depth": 0} if mlp is None else {"width": mlp.width_size, "depth": mlp.depth}
