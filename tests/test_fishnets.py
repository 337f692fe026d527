"""Fishnets: sums of learned scores and Fisher matrices against exact ones, in sets, in streams and on graphs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal, norm

from diffsbi.compression import (
    Aggregation,
    DeepSet,
    FisherAggregation,
    FisherSum,
    Fishnet,
    Graph,
    GraphFishnet,
    Information,
    MemberNetwork,
    check_graph,
    fit_fishnet,
    load_fishnet,
    patches,
    save_fishnet,
    set_loss,
    stream,
)
from diffsbi.compression.fishnets import normal_loss
from diffsbi.compression.sets import cholesky, pool_rows, solve_lower
from experiments.set_toys import Velocities, exact_regression, regression_sets, relative_errors, velocity_graphs

pytestmark = pytest.mark.usefixtures("x64")

FIDUCIAL, ROOT = np.array([0.7, -0.2]), np.array([[1.3, 0.0], [0.4, 0.8]])


def solved_regression():
    """A fishnet that holds the exact answer: A = (x, 1), r the residual at the fiducial, the scale 1 / sigma."""
    member = MemberNetwork(jax.random.key(0), 3, 2, depth=0)
    weight, bias = np.zeros((7, 3)), np.zeros(7)
    weight[0], bias[0] = [-FIDUCIAL[0], 1.0, 0.0], -FIDUCIAL[1]
    weight[2], weight[4] = [ROOT[0, 0], 0, 0], [ROOT[0, 1], 0, 0]  # first column of A = R^T (x, 1)
    bias[2], bias[4] = ROOT[1, 0], ROOT[1, 1]
    weight[6] = [0, 0, -1.0]
    linear = (jnp.asarray(weight), jnp.asarray(bias))
    member = eqx.tree_at(lambda m: (m.linear.weight, m.linear.bias), member, linear)
    return Fishnet(FisherSum(member), jnp.zeros(3), jnp.ones(3), jnp.asarray(FIDUCIAL), jnp.asarray(ROOT))


def random_fishnet(seed=0, network=None, event=(3,)):
    network = network or FisherSum(MemberNetwork(jax.random.key(seed), int(np.prod(event)), 2, width=8))
    loc, scale = jnp.full(event, 0.3), jnp.full(event, 1.7)
    return Fishnet(network, loc, scale, jnp.asarray(FIDUCIAL), jnp.asarray(ROOT))


def members(n, seed=0):
    return regression_sets(jax.random.key(seed), 1, n)[1][0]


# -- the exact answer ---------------------------------------------------------------------------------------------


def test_score_and_fisher_are_derivatives_of_the_log_likelihood():
    x = members(40)

    @jax.jit
    def log_likelihood(theta):
        return jnp.sum(norm.logpdf(x[:, 1], theta[0] * x[:, 0] + theta[1], jnp.exp(x[:, 2])))

    found = solved_regression().information(x)
    point = jnp.asarray(FIDUCIAL)
    np.testing.assert_allclose(found.score, jax.grad(log_likelihood)(point), rtol=1e-10)
    np.testing.assert_allclose(found.fisher, -jax.jit(jax.hessian(log_likelihood))(point), rtol=1e-10)
    np.testing.assert_allclose(found.score, exact_regression(x, FIDUCIAL)[0], rtol=1e-10)
    elsewhere = jnp.array([0.1, 0.5])
    np.testing.assert_allclose(found.at(elsewhere).score, jax.grad(log_likelihood)(elsewhere), rtol=1e-9)


def test_estimate_is_the_exact_posterior_mean_for_any_number_of_members():
    fishnet = solved_regression()
    for n in (1, 60):
        x = np.asarray(members(n))
        design, weight = np.stack([x[:, 0], np.ones(n)], 1), np.exp(-2 * x[:, 2])
        precision = np.linalg.inv(ROOT @ ROOT.T)
        normal = design.T @ (weight[:, None] * design) + precision
        mean = np.linalg.solve(normal, design.T @ (weight * x[:, 1]) + precision @ FIDUCIAL)
        np.testing.assert_allclose(fishnet(jnp.asarray(x)), mean, rtol=1e-9)
        least_squares = np.linalg.lstsq(np.sqrt(weight)[:, None] * design, np.sqrt(weight) * x[:, 1])[0]
        if n > 1:
            np.testing.assert_allclose(fishnet.information(x).estimate(), least_squares, rtol=1e-7)


def test_loss_is_the_negative_log_posterior():
    rng = np.random.default_rng(0)
    half, u, t = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3)
    fisher = half @ half.T
    covariance = np.linalg.inv(fisher + np.eye(3))
    exact = -multivariate_normal.logpdf(u, covariance @ t, covariance) - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(normal_loss(*map(jnp.asarray, (u, t, fisher))), exact, rtol=1e-10)
    slope = jax.jit(jax.grad(normal_loss, (1, 2)))(*map(jnp.asarray, (u, 0 * t, 0 * fisher)))  # of an empty set
    assert all(np.isfinite(s).all() for s in slope)


def test_the_exact_answer_is_where_the_loss_is_least():
    """The gradient of the mean loss vanishes there, within its scatter, for whole and for split sets of any size."""
    fishnet = solved_regression()
    keys = jax.random.split(jax.random.key(3), 3)
    u = jax.random.normal(keys[0], (400, 2))
    theta = jnp.asarray(FIDUCIAL + np.asarray(u) @ ROOT.T)
    _, x = regression_sets(keys[1], 400, 30)
    noise = jax.random.normal(keys[2], x.shape[:2]) * jnp.exp(x[..., 2])
    x = x.at[..., 1].set(theta[:, :1] * x[..., 0] + theta[:, 1:] + noise)
    params, static = eqx.partition(fishnet.network, eqx.is_inexact_array)
    batch = {"u": u[:, None], "x": x[:, None], "mask": jnp.ones((400, 1, 30), bool), "split": jnp.ones((400, 1), int)}
    slope = lambda row: jax.grad(set_loss)(params, static, row, jax.random.key(1))  # noqa: E731
    slopes = jax.jit(jax.vmap(slope))(batch)
    for leaf in jax.tree.leaves(slopes):
        error = leaf.std(0) / 20
        assert np.all(np.abs(leaf.mean(0)) < 4.5 * error + 1e-12)


def test_a_wrong_fisher_matrix_is_found():
    x = members(50)
    exact = exact_regression(x, FIDUCIAL)
    right = relative_errors(exact, exact)
    assert right.pop("ratio") == pytest.approx(1) and max(right.values()) < 1e-12
    wrong = relative_errors((1.1 * exact[0], 1.1 * exact[1]), exact)
    np.testing.assert_allclose([wrong[k] for k in ("fisher", "score", "sigma", "ratio")], [0.1, 0.1, 0, 1.1], atol=1e-9)


@pytest.mark.parametrize("dim", [1, 2, 5, 9])
def test_small_cholesky_is_the_usual_one(dim):
    half = np.random.default_rng(dim).normal(size=(dim, dim))
    matrix, b = jnp.asarray(half @ half.T + np.eye(dim)), jnp.arange(1.0, dim + 1)
    lower = cholesky(matrix)
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(lower @ solve_lower(lower, b), b, rtol=1e-9)


# -- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["residual", "cholesky"])
def test_sets_add_up_in_any_order_and_masked_members_are_not_there(form):
    fishnet = random_fishnet(network=FisherSum(MemberNetwork(jax.random.key(1), 3, 2, width=8, form=form)))
    x = members(30)
    whole = fishnet.information(x)
    assert np.linalg.eigvalsh(whole.fisher).min() > 0
    parts = [fishnet.information(a) for a in (x[:7], x[7:])]
    np.testing.assert_allclose(parts[0].fisher + parts[1].fisher, whole.fisher, rtol=1e-11)
    np.testing.assert_allclose(fishnet.information(x[::-1]).score, whole.score, rtol=1e-11)
    broken = jnp.concatenate([x, jnp.full((3, 3), jnp.nan)])
    masked = fishnet.information(broken, jnp.arange(33) < 30)
    np.testing.assert_allclose(masked.score, whole.score, rtol=1e-11)
    slope = eqx.filter_jit(eqx.filter_grad(lambda f: jnp.sum(f(broken, jnp.arange(33) < 30))))(fishnet)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("chunk", [7, 100])
def test_chunks_are_the_direct_sum_with_its_gradient(chunk):
    fishnet, x, mask = random_fishnet(), members(64), jnp.arange(64) % 3 > 0

    def answers(f, **options):
        found = f.information(x, mask, **options)
        return found.score, found.fisher

    for a, b in zip(answers(fishnet, chunk=chunk), answers(fishnet), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    square = lambda f, chunk: jnp.sum(f(x, mask, chunk=chunk)) ** 2  # noqa: E731
    slopes = [eqx.filter_jit(eqx.filter_grad(square))(fishnet, c) for c in (chunk, None)]
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_a_stream_is_the_direct_sum():
    fishnet, x, mask = random_fishnet(), members(90), jnp.arange(90) % 4 > 0
    direct = fishnet.information(x, mask)
    streamed = stream(fishnet, ((x[i : i + 30], mask[i : i + 30]) for i in range(0, 90, 30)))
    for name in ("score", "fisher", "fiducial"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(direct, name), rtol=1e-10)
    assert isinstance(streamed, Information) and streamed.fisher.dtype == np.float64


@pytest.mark.parametrize("pool", ["sum", "mean", "max"])
def test_pools_are_those_of_the_members_that_are_there(pool):
    rows = np.random.default_rng(0).normal(size=(9, 4))
    mask = np.arange(9) % 2 == 0
    np.testing.assert_allclose(pool_rows(*map(jnp.asarray, (rows, mask)), pool), getattr(rows[mask], pool)(0))
    assert not pool_rows(jnp.asarray(rows), jnp.zeros(9, bool), pool).any()
    deep = random_fishnet(network=DeepSet(jax.random.key(0), 3, 2, pool, width=8))
    assert np.linalg.eigvalsh(deep.information(members(5)).fisher).min() > 0
    with pytest.raises(ValueError, match="deep set cannot be added up"):
        deep.information(members(5), chunk=2)


def test_patches_are_the_squares_of_a_map():
    x = np.arange(2 * 6 * 6).reshape(2, 6, 6)
    cut = patches(x, 2)
    assert cut.shape == (9, 2, 2, 2)
    np.testing.assert_array_equal(cut[5], x[:, 2:4, 4:6])
    np.testing.assert_array_equal(np.asarray(cut).reshape(3, 3, 2, 2, 2).transpose(2, 0, 3, 1, 4).reshape(x.shape), x)
    for wrong, size in ((x, 4), (x[:, :4], 2), (x, 0)):
        with pytest.raises(ValueError, match="n a multiple of size"):
            patches(wrong, size)


# -- graphs -------------------------------------------------------------------------------------------------------


def test_fisher_aggregation_is_a_weighted_mean_at_every_node():
    rng = np.random.default_rng(0)
    messages, receivers = jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray([0, 0, 0, 1, 1, 3, 3, 3, 3, 3, 0, 2])
    mask = jnp.arange(12) < 11  # node 2 hears nothing
    aggregation = FisherAggregation(jax.random.key(0), 3, 2, width=8)
    out = jax.jit(lambda m: aggregation(m, receivers, 4, mask))(messages)
    assert out.shape == (4, aggregation.size) and not out[2].any()
    found = jax.jit(jax.vmap(aggregation.message))(messages)
    for node in (0, 1, 3):
        t, f = np.zeros(2), np.eye(2)
        for j in np.flatnonzero((receivers == node) & mask):
            ti, fi = found[0][j], found[1][j]
            t, f = t + ti, f + fi
        lower = np.linalg.cholesky(f)
        expected = [*np.linalg.solve(f, t), *np.log(np.diag(lower)), lower[1, 0] / lower[0, 0]]
        np.testing.assert_allclose(out[node], expected, rtol=1e-9)
    slope = jax.jit(jax.grad(lambda m: jnp.sum(aggregation(m, receivers, 4, mask) ** 2)))(messages)
    assert np.isfinite(slope).all() and not slope[11].any()


@pytest.mark.parametrize("how", ["sum", "mean", "max", "attention"])
def test_usual_aggregations(how):
    rng = np.random.default_rng(1)
    messages, receivers = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray([0, 0, 0, 1, 1, 2, 0])
    aggregation = Aggregation(jax.random.key(0), 3, 4, how, width=8)
    mask = jnp.arange(7) < 6
    out = jax.jit(lambda m: aggregation(m, receivers, 4, mask))(messages)
    rows = np.asarray(jax.jit(jax.vmap(lambda m: aggregation.linear(m) + aggregation.mlp(m)))(messages))
    if how == "attention":
        weights = np.exp(rows[:3, -1] - rows[:3, -1].max())
        expected = weights @ rows[:3, :4] / weights.sum()
    else:
        expected = getattr(rows[:3], how)(0)
    np.testing.assert_allclose(out[0], expected, rtol=1e-9)
    assert not out[3].any()
    slope = jax.jit(jax.grad(lambda m: jnp.sum(aggregation(m, receivers, 4, mask) ** 2)))(messages)
    assert np.isfinite(slope).all() and not slope[6].any()


def test_the_graphs_fisher_matrix_is_that_of_the_dense_covariance():
    toy = Velocities()
    u, graphs, (score, fisher) = velocity_graphs(jax.random.key(0), toy, 3, 8)
    graph: Graph = jax.tree.map(lambda a: np.asarray(a[1]), graphs)
    total, gradient = np.zeros((2, 2)), np.zeros(2)
    for node in range(8):
        d, shape, v, log_sigma = graph.edges[(graph.receivers == node) & graph.mask].T
        inverse = np.linalg.inv(np.diag(np.exp(2 * log_sigma)) + toy.scatter**2)
        jacobian = np.stack([d, shape], 1)
        total, gradient = total + jacobian.T @ inverse @ jacobian, gradient + jacobian.T @ inverse @ v
    np.testing.assert_allclose(fisher[1], total, rtol=1e-9)
    np.testing.assert_allclose(score[1], gradient, rtol=1e-9)


def test_a_graph_is_the_same_whatever_the_order_of_its_edges():
    _, graphs, _ = velocity_graphs(jax.random.key(0), Velocities(), 3, 8)
    graph = jax.tree.map(lambda a: a[0], graphs)
    keys = jax.random.split(jax.random.key(1))
    network = GraphFishnet(FisherAggregation(keys[0], 4, 2, width=8), MemberNetwork(keys[1], 5, 2, width=8))
    answer = jax.jit(lambda g: network.pooled(network.members(g), jnp.ones(8, bool)))
    order = np.random.default_rng(0).permutation(len(graph.senders))
    shuffled = Graph(graph.nodes, *(a[order] for a in (graph.edges, graph.senders, graph.receivers, graph.mask)))
    for a, b in zip(answer(graph), answer(shuffled), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_graphs_that_are_none_are_named(x64):
    _, graphs, _ = velocity_graphs(jax.random.key(0), Velocities(), 3, 8)
    check_graph(graphs)
    check_graph(jax.tree.map(lambda a: a[0], graphs))

    def changed(name, index, value):
        return eqx.tree_at(lambda g: getattr(g, name), graphs, getattr(graphs, name).at[index].set(value))

    edge = tuple(map(int, np.argwhere(np.asarray(graphs.mask))[-1]))
    for name, index, value, message in (
        ("receivers", edge, 8, rf"receivers between 0 and 7, the nodes; got 8 at \({edge[0]}, {edge[1]}\)"),
        ("senders", edge, -1, "senders between 0 and 7.*got -1"),
        ("edges", edge, np.nan, "Expected finite edges; 1 are not"),
        ("mask", 1, False, "at least one edge; 1 of 3 have none"),
    ):
        with pytest.raises(ValueError, match=message):
            check_graph(changed(name, index, value))
    with pytest.raises(ValueError, match="senders of shape"):
        check_graph(eqx.tree_at(lambda g: g.senders, graphs, graphs.senders[:, 1:]))
    aggregation = FisherAggregation(jax.random.key(0), 2, 2, width=8)
    with pytest.raises(ValueError, match="receivers between 0 and 2"):
        aggregation(jnp.ones((4, 2)), jnp.array([0, 1, 2, 3]), 3)


@pytest.fixture(scope="module")
def graph_fit():
    """(u, graphs, fishnet, history), and a fishnet of graphs in other units; the nodes' features are noise."""
    with jax.enable_x64(True):
        u, graphs, _ = velocity_graphs(jax.random.key(0), Velocities(), 120, 8)
        nodes = 3 + 2 * jax.random.normal(jax.random.key(1), (120, 8, 1))
        graphs = eqx.tree_at(lambda g: g.nodes, graphs, nodes)
        scaled = eqx.tree_at(lambda g: (g.nodes, g.edges), graphs, (10 * graphs.nodes - 1, 5 * graphs.edges + 2))
        options = dict(width=8, depth=1, max_epochs=8, learning_rate=1e-2)
        fits = [fit_fishnet(jax.random.key(2), u, x, **options) for x in (graphs, scaled)]
    return u, graphs, *fits[0], scaled, fits[1][0]


def test_graphs_are_fitted_whatever_their_padding_and_units(graph_fit):
    _, graphs, fishnet, history, scaled, same = graph_fit
    assert history.best_validation < history.first_validation - 0.05
    graph = jax.tree.map(lambda a: a[0], graphs)
    found = fishnet.information(graph)
    assert found.fisher.shape == (2, 2) and np.linalg.eigvalsh(found.fisher).min() > 0
    pad = lambda a, value: jnp.concatenate([a, jnp.full((3, *a.shape[1:]), value, a.dtype)])  # noqa: E731
    ends = (pad(graph.senders, 0), pad(graph.receivers, 10))
    padded = Graph(pad(graph.nodes, jnp.nan), pad(graph.edges, jnp.nan), *ends, pad(graph.mask, False))
    again = fishnet.information(padded, np.arange(11) < 8)
    np.testing.assert_allclose(again.fisher, found.fisher, rtol=1e-9)
    np.testing.assert_allclose(again.score, found.score, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(eqx.filter_jit(fishnet)(graph), fishnet(graph), rtol=1e-9, atol=1e-9)
    two = stream(fishnet, [graph, second := jax.tree.map(lambda a: a[1], graphs)])
    other = fishnet.information(second)
    np.testing.assert_allclose(two.fisher, found.fisher + other.fisher, rtol=1e-9)
    np.testing.assert_allclose(same(jax.tree.map(lambda a: a[0], scaled)), fishnet(graph), rtol=1e-6, atol=1e-6)


def test_graphs_and_sets_are_not_confused(graph_fit, tmp_path):
    u, graphs, fishnet, *_ = graph_fit
    graph = jax.tree.map(lambda a: a[0], graphs)
    off = np.ones((120, 8), bool)
    off[4] = False
    build = lambda key, **sizes: GraphFishnet.build(jax.random.key(key), (1, 4), 2, **sizes)  # noqa: E731
    cases = [
        (lambda: fishnet(jnp.ones((3, 1))), "Expected a Graph, as in training; got an array"),
        (lambda: random_fishnet()(graph), "an array of members, as in training; got a Graph"),
        (lambda: fishnet(graphs), r"nodes and edges of shapes \(n, 1\) and \(m, 4\); got \(120, 8, 1\)"),
        (lambda: fishnet(graph, np.ones(7, bool)), r"mask of shape \(8,\)"),
        (lambda: fishnet(graph, np.zeros(8, bool)), "at least one member"),
        (lambda: fishnet(graph, np.arange(8) > 0), "that are nodes of the mask"),
        (lambda: fishnet.information(graph, chunk=4), "chunk=None for a graph"),
        (lambda: stream(fishnet, [(graph, np.zeros(8, bool))]), "nodes of the mask"),
        (lambda: fit_fishnet(jax.random.key(0), u, graphs, off), "first of 1 empty ones is set 4"),
        (lambda: fit_fishnet(jax.random.key(0), u[:9], graphs), r"\(sets, p\) with 120 sets"),
        (lambda: fit_fishnet(jax.random.key(0), u, graphs, network="median"), "'attention'.*; got 'median'"),
        (lambda: fit_fishnet(jax.random.key(0), u, graphs, validation=(u, graphs)), "120 of 120 are among"),
        (lambda: fit_fishnet(jax.random.key(0), u, graphs, network=random_fishnet().network), "a network for graphs"),
        (lambda: fit_fishnet(jax.random.key(0), u, graphs.nodes, network=build(0)), "a network for sets of members"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    save_fishnet(fishnet, tmp_path / "g")
    with pytest.raises(ValueError, match="'width': 8"):
        load_fishnet(tmp_path / "g", build(0, width=9, depth=1))
    for again in (load_fishnet(tmp_path / "g"), load_fishnet(tmp_path / "g", build(0, width=8, depth=1))):
        np.testing.assert_array_equal(again(graph), fishnet(graph))


def test_files_of_graphs_know_how_messages_are_pooled(tmp_path):
    """A sum, a mean and the largest have arrays of the same shapes; also where the networks are one's own."""
    loc = (jnp.zeros(1), jnp.zeros(4))
    scale = (jnp.ones(1), jnp.ones(4))
    built = lambda how: GraphFishnet.build(jax.random.key(0), (1, 4), 2, how, width=8, depth=1)  # noqa: E731
    own = lambda how: GraphFishnet(built(how).aggregation, MemberNetwork(jax.random.key(1), 10, 2, width=5))  # noqa: E731
    for make, message in ((built, "Expected a network of .*'network': 'sum'"), (own, "makes .* of a fixed input")):
        save_fishnet(Fishnet(make("sum"), loc, scale, FIDUCIAL, ROOT), tmp_path / "g")
        assert load_fishnet(tmp_path / "g", make("sum")).network.aggregation.how == "sum"
        for other in ("mean", "max"):
            with pytest.raises(ValueError, match=message):
                load_fishnet(tmp_path / "g", make(other))
    with pytest.raises(ValueError, match=r"network=\.\.\."):
        load_fishnet(tmp_path / "g")


# -- fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_fit_is_within_the_promise():
    theta, x = regression_sets(jax.random.key(0), 8000, 60)
    fishnet, _ = fit_fishnet(jax.random.key(1), theta, x, max_epochs=6, patience=3, batch_size=64, validation=0.3)
    for n, noise, limit in ((60, "training", 0.02), (600, "training", 0.05), (6000, "other", 0.05)):
        _, x = regression_sets(jax.random.key(5), 20, n, noise)
        found = eqx.filter_jit(jax.vmap(fishnet.information))(x)
        errors = relative_errors((found.score, found.fisher), exact_regression(x, fishnet.fiducial))
        assert errors["fisher"] < limit and errors["score"] < limit, (n, errors)


def test_fits_in_float32_and_with_ragged_sets():
    with jax.enable_x64(False):
        theta, x = regression_sets(jax.random.key(0), 200, 10)
        mask = np.arange(10) < np.random.default_rng(0).integers(1, 11, 200)[:, None]
        x = np.where(mask[..., None], x, np.nan)
        options = dict(depth=0, start=False, learning_rate=2e-2, max_epochs=25)
        fishnet, history = fit_fishnet(jax.random.key(1), theta, x, mask, **options)
        assert np.isfinite(history.train).all() and history.best_validation < history.first_validation
        assert fishnet(jnp.asarray(x[0]), mask[0]).dtype == jnp.float32
        _, x = regression_sets(jax.random.key(5), 200, 10)
        found = eqx.filter_jit(jax.vmap(fishnet.information))(x)
        errors = relative_errors((found.score, found.fisher), exact_regression(x, fishnet.fiducial))
        assert errors["fisher"] < 0.4, errors  # an untrained one: 0.9


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_sets_are_named():
    fishnet, x = random_fishnet(), members(6)
    bad = x.at[4, 1].set(jnp.inf)
    cases = [
        (lambda: fishnet(x, jnp.zeros(6, bool)), "at least one member"),
        (lambda: fishnet(x[:0]), "at least one member"),
        (lambda: fishnet(x, jnp.ones(5, bool)), r"mask of shape \(6,\).*got \(5,\)"),
        (lambda: fishnet(x, jnp.full(6, 0.5)), "Weights are no masks"),
        (lambda: fishnet(bad), r"1 are not, the first at \(4,\). Mask them out"),
        (lambda: fishnet(x[:, :2]), r"x of shape \(members, 3\); got \(6, 2\)"),
        (lambda: fishnet.information(x, chunk=0), "chunk >= 1"),
        (lambda: stream(fishnet, [x, bad]), "Chunk 1: Expected finite members"),
        (lambda: stream(fishnet, []), "at least one member in all"),
        (lambda: FisherAggregation(jax.random.key(0), 3, 2)(x, jnp.arange(5), 6), r"receivers \(m,\)"),
        (lambda: Aggregation(jax.random.key(0), 3, 2, "median"), "one of"),
        (lambda: MemberNetwork(jax.random.key(0), 3, 0), "dim >= 1"),
        (lambda: MemberNetwork(jax.random.key(0), 3, 2, form="diagonal"), "'residual' or 'cholesky'"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_training_data_are_named():
    theta, x = (np.asarray(a) for a in regression_sets(jax.random.key(0), 20, 5))
    key, mask = jax.random.key(1), np.ones((20, 5), bool)
    empty, bad = mask.copy(), x.copy()
    empty[3], bad[7, 2, 0] = False, np.nan
    cases = [
        (dict(mask=empty), "first of 1 empty ones is set 3"),
        (dict(mask=mask[:, :4]), r"mask of shape \(20, 5\)"),
        (dict(x=bad), r"the first at \(7, 2\)"),
        (dict(theta=theta[:19]), "theta of shape"),
        (dict(theta=theta * [1, np.nan]), "finite theta"),
        (dict(theta=theta[:, [0, 0]]), "their covariance is singular"),
        (dict(validation=(theta, x, mask)), "20 of 20 are among the training sets"),
        (dict(validation=(theta[18:], x[18:])), "2 of 2 are among"),
        (dict(network="median"), "one of"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            fit_fishnet(key, **(dict(theta=theta, x=x, max_epochs=1) | change))
    with pytest.raises(TypeError, match="typed JAX key"):
        fit_fishnet(0, theta, x)


@pytest.mark.parametrize("kind", ["fishnet", "cholesky", "max"])
def test_files_give_the_same_fishnet_back(tmp_path, kind):
    if kind == "max":
        network = DeepSet(jax.random.key(2), 3, 2, "max", width=8)
    else:
        form = "cholesky" if kind == "cholesky" else "residual"
        network = FisherSum(MemberNetwork(jax.random.key(2), 3, 2, width=8, form=form))
    fishnet = random_fishnet(network=network)
    save_fishnet(fishnet, tmp_path / "f")
    again = load_fishnet(tmp_path / "f")
    x = members(9)
    np.testing.assert_array_equal(again(x), fishnet(x))
    assert b"pickle" not in (tmp_path / "f").read_bytes()


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "f"
    save_fishnet(random_fishnet(), path)
    wide = FisherSum(MemberNetwork(jax.random.key(0), 3, 2, width=9))
    with pytest.raises(ValueError, match="'width': 8"):
        load_fishnet(path, wide)
    embedded = MemberNetwork(jax.random.key(0), 3, 2, width=8, embed=eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="Expected a network of"):
        load_fishnet(path, FisherSum(embedded))
    own = tmp_path / "own"
    save_fishnet(random_fishnet(network=FisherSum(embedded)), own)
    with pytest.raises(ValueError, match="network=..."):
        load_fishnet(own)
    with pytest.raises(ValueError, match="the arrays differ"):
        load_fishnet(own, wide)
    assert load_fishnet(own, FisherSum(embedded)).network.member.embed is not None
    other = eqx.tree_at(lambda m: m.embed, embedded, eqx.nn.Sequential([embedded.embed, eqx.nn.Lambda(jnp.tanh)]))
    same = eqx.tree_at(lambda m: m.embed, embedded, eqx.nn.Sequential([embedded.embed, eqx.nn.Lambda(jax.nn.relu)]))
    save_fishnet(random_fishnet(network=FisherSum(other)), own)
    with pytest.raises(ValueError, match="Is its activation another one"):
        load_fishnet(own, FisherSum(same))
    content = path.read_bytes()
    for broken, message in (
        (content[:-3], "damaged"),
        (content[:40], "truncated or damaged"),
        (b"something else", "Expected a fishnet"),
        (content.replace(b'"version": 1', b'"version": 7'), "version 1"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message):
            load_fishnet(path)
    path.write_bytes(content)
    with jax.enable_x64(False), pytest.raises(ValueError, match="floats of float32"):
        load_fishnet(path)
