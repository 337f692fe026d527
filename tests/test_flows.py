"""Every conditional density of the table: one list of cases, the same properties for each."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flowjax.bijections import MaskedAutoregressive
from paramax import unwrap

from diffsbi.flows import FLOWS, NOT_SMOOTH, AngularFlow, LogisticRamps, is_smooth
from diffsbi.flows.affine import ConditionalAffine, with_linear_part

SMALL = {"width": 16, "depth": 1}
OWN = {"mixture": {"components": 3}, "continuous": {"steps": 16}}  # where there are no layers
SOLVED = {"continuous": 1e-4}  # where the inverse is the solution backwards, equal up to the solver's error
NAMES = sorted(FLOWS)
BIJECTIONS = [name for name in NAMES if name != "mixture"]


def make(name, dim, condition_dim, seed=0, moved_by=0.3):
    """A small flow with its parameters moved well away from the identity."""
    return _made(name, dim, condition_dim, seed, moved_by, str(jnp.result_type(float)))


@functools.cache
def _made(name, dim, condition_dim, seed, moved_by, dtype):
    flow = FLOWS[name](jax.random.key(seed), dim, condition_dim, **SMALL, **OWN.get(name, {"layers": 2}))
    arrays, static = eqx.partition(flow, eqx.is_inexact_array)
    return eqx.combine(_moved(arrays, jax.random.key(seed + 1), moved_by), static)


@jax.jit
def _moved(arrays, key, by):
    leaves, tree = jax.tree.flatten(arrays)
    keys = jax.random.split(key, len(leaves))
    moved = [a + by * jax.random.normal(k, a.shape, a.dtype) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def condition_of(condition_dim):
    return None if condition_dim is None else jnp.linspace(-0.5, 1.0, condition_dim)


@pytest.mark.parametrize(
    ("name", "dim", "condition_dim"), [(n, 3, 2) for n in BIJECTIONS] + [("smooth", 1, None), ("smooth", 1, 2)]
)
def test_round_trip_and_log_det(x64, name, dim, condition_dim):
    bijection, c = make(name, dim, condition_dim).bijection, condition_of(condition_dim)
    v = jax.random.normal(jax.random.key(2), (4, dim))

    @eqx.filter_jit
    def both(bijection, v):
        u, forward = bijection.transform_and_log_det(v, c)
        back, backward = bijection.inverse_and_log_det(u, c)
        jacobian = jax.jacfwd(lambda u: bijection.inverse_and_log_det(u, c)[0])(u)
        return back, forward, backward, jnp.linalg.slogdet(jacobian)[1]

    back, forward, backward, autodiff = jax.vmap(lambda v: both(bijection, v))(v)
    tolerance = SOLVED.get(name, 1e-9)
    np.testing.assert_allclose(back, v, atol=tolerance)
    np.testing.assert_allclose(forward, -backward, atol=tolerance)
    np.testing.assert_allclose(backward, autodiff, atol=tolerance)


@pytest.mark.parametrize("name", ["smooth", "masked_autoregressive"])
@pytest.mark.parametrize(("dim", "condition_dim"), [(3, 2), (3, None), (1, 2)])
def test_inverse_of_one_coordinate_at_a_time_equals_that_of_all(x64, name, dim, condition_dim):
    bijection, c = make(name, dim, condition_dim).bijection.bijection.bijection, condition_of(condition_dim)
    layer = unwrap(jax.tree.map(lambda a: a[0] if eqx.is_array(a) else a, bijection))
    layer = layer if dim == 1 else layer.bijections[0]
    u = jax.random.normal(jax.random.key(2), (dim,))
    ours, theirs = layer.inverse_and_log_det(u, c), MaskedAutoregressive.inverse_and_log_det(layer, u, c)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-13)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-13)
    assert not np.allclose(ours[0], u)


@pytest.mark.parametrize(
    ("name", "dim", "points", "edge"),
    [(n, 2, 251, 25.0) for n in NAMES] + [(n, 1, 2001, 60.0) for n in ("smooth", "coupling", "mixture", "continuous")],
)
def test_integrates_to_one(x64, name, dim, points, edge):
    flow = with_linear_part(make(name, dim, None if dim == 1 else 2, moved_by=0.15))
    # Stretched grid: fine in the bulk, out to far tails.
    t = jnp.linspace(-1, 1, points)
    axis, weight = edge * jnp.sinh(5 * t) / jnp.sinh(5.0), edge * 5 * jnp.cosh(5 * t) / jnp.sinh(5.0) * (t[1] - t[0])
    grid = jnp.stack(jnp.meshgrid(*[axis] * dim, indexing="ij"), -1).reshape(-1, dim)
    volume = functools.reduce(jnp.multiply.outer, [weight] * dim).ravel()
    c = condition_of(None if dim == 1 else 2)
    density = jnp.exp(eqx.filter_jit(jax.vmap(lambda u: flow.log_prob(u, c)))(grid))
    assert abs(float(jnp.sum(density * volume)) - 1) < 2e-3


@pytest.mark.parametrize("name", ["smooth", "smooth_coupling", "continuous"])
def test_samples_follow_the_density(x64, name):
    flow, c = make(name, 2, 2), condition_of(2)
    # Drawing goes one way through the bijection, the density the other way.
    keys = jax.random.split(jax.random.key(5), 1000)
    v = eqx.filter_jit(jax.vmap(lambda k: flow.bijection.inverse(flow.sample(k, (), c), c)))(keys)
    error = 1 / np.sqrt(len(v))
    assert np.all(np.abs(np.mean(v, 0)) < 4.5 * error)
    assert np.all(np.abs(np.var(v, 0) - 1) < 4.5 * np.sqrt(2) * error)


@pytest.mark.parametrize("name", NAMES)
def test_score_is_continuous_exactly_where_promised(x64, name):
    flow, c = make(name, 2, 2), condition_of(2)

    @eqx.filter_jit
    def slopes(flow, t):
        curvature = jax.grad(lambda t: flow.log_prob(jnp.stack([t, 0.3]), c))
        return jax.vmap(curvature)(t)

    def jump(n):
        return float(jnp.abs(jnp.diff(slopes(flow, jnp.linspace(-4, 4, n)))).max())

    smooth = jump(1_000) > 3 * jump(4_000)
    assert smooth == is_smooth(name)


@pytest.mark.parametrize("name", NAMES)
def test_saved_leaves_give_the_same_density(tmp_path, name):
    flow, other = make(name, 2, 2, seed=0), make(name, 2, 2, seed=3)
    eqx.tree_serialise_leaves(tmp_path / "flow.eqx", flow)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "flow.eqx", other)
    u, c = jnp.asarray([0.3, -1.0]), condition_of(2)
    value = eqx.filter_jit(lambda flow: flow.log_prob(u, c))
    assert float(value(flow)) == float(value(loaded))
    assert float(value(flow)) != float(value(other))


@pytest.mark.parametrize("name", NAMES)
def test_extreme_input_is_finite_in_float32(name):
    flow = FLOWS[name](jax.random.key(0), 3, 2)

    @eqx.filter_jit
    def value_and_gradients(flow, u, c):
        arrays, static = eqx.partition(flow, eqx.is_inexact_array)
        density = lambda a, u, c: eqx.combine(a, static).log_prob(u, c)  # noqa: E731
        return jax.value_and_grad(density, argnums=(0, 1, 2))(arrays, u, c)

    for size in (1e3, -1e3):
        for u, c in [(size, 0.1), (0.1, size), (size, size)]:
            out = value_and_gradients(flow, jnp.full(3, u), jnp.full(2, c))
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(out)), (u, c)
        assert bool(jnp.all(jnp.isfinite(flow.sample(jax.random.key(1), (), jnp.full(2, size)))))


def test_static_part_is_shared_so_that_a_compiled_step_serves_every_flow():
    for name in NAMES:
        one, two = (eqx.partition(FLOWS[name](jax.random.key(i), 2, 3), eqx.is_array)[1] for i in (0, 1))
        assert jax.tree.leaves(one) == jax.tree.leaves(two)
        assert jax.tree.structure(one) == jax.tree.structure(two)


def test_table_names_what_is_not_smooth():
    assert NOT_SMOOTH == {"spline"}
    with pytest.raises(ValueError, match="Unknown flow 'smoth'.*Did you mean 'smooth'"):
        is_smooth("smoth")


@pytest.mark.parametrize(("options", "message"), [
    ({"dim": 0}, "dim >= 1; got 0"),
    ({"dim": 2, "layers": 0}, "layers >= 1; got 0"),
    ({"dim": 2, "kind": "autoregresive"}, "Did you mean 'autoregressive'"),
    ({"dim": 2, "ramps": 0}, "at least one ramp; got 0"),
    ({"dim": 2, "activation": "tahn"}, "Did you mean 'tanh'"),
])  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FLOWS["smooth"](jax.random.key(0), **options)


def test_activation_is_that_of_the_conditioners():
    """With bounded units a density of far-off conditions stays what it is farther out; silu's goes on to change."""
    for activation, settles in [("tanh", True), ("silu", False)]:
        flow = FLOWS["smooth"](jax.random.key(0), 2, 1, activation=activation, **SMALL, layers=1)
        far, farther = (float(flow.log_prob(jnp.zeros(2), jnp.full(1, c))) for c in (300.0, 3000.0))
        assert (abs(far - farther) < 1e-3 * abs(far)) == settles


# The transformer itself


def ramps_with(seed, ramps=5):
    arrays, static = eqx.partition(LogisticRamps(ramps), eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [a + jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, moved), static)


def test_new_ramps_are_nearly_the_identity():
    x = jnp.linspace(-3, 3, 61)
    for ramps in (1, 4, 8):
        y, log_det = jax.jit(jax.vmap(LogisticRamps(ramps).transform_and_log_det))(x)
        np.testing.assert_allclose(y, x, atol=0.02)
        np.testing.assert_allclose(log_det, 0.0, atol=0.02)


def test_ramps_can_be_bimodal(x64):
    """Two far, narrow ramps: the density of x has two modes (an affine transformer has one)."""
    ramps = eqx.tree_at(
        lambda r: (r.centres, r.log_slopes), LogisticRamps(2), (jnp.asarray([-2.0, 2.0]), jnp.full(2, 1.5))
    )
    x = jnp.linspace(-5, 5, 401)
    y, log_det = jax.jit(jax.vmap(ramps.transform_and_log_det))(x)
    density = jnp.exp(jax.scipy.stats.norm.logpdf(y) + log_det)
    assert float(density[200]) < 0.1 * float(density.max())


@pytest.mark.parametrize("seed", range(4))
def test_gradient_of_the_inverse_equals_finite_differences(x64, seed):
    ramps = ramps_with(seed)
    arrays, static = eqx.partition(ramps, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(arrays)

    @jax.jit
    def both(flat, y):
        x, log_det = eqx.combine(unravel(flat), static).inverse_and_log_det(y)
        return jnp.stack([x, log_det])

    y, step = 0.7, 1e-6
    by_parameter, by_argument = jax.jit(jax.jacobian(both, argnums=(0, 1)))(flat, y)
    for i in range(len(flat)):
        move = step * jnp.eye(len(flat))[i]
        difference = (both(flat + move, y) - both(flat - move, y)) / (2 * step)
        np.testing.assert_allclose(by_parameter[:, i], difference, rtol=1e-6, atol=1e-8)
    difference = (both(flat, y + step) - both(flat, y - step)) / (2 * step)
    np.testing.assert_allclose(by_argument, difference, rtol=1e-6, atol=1e-8)
    # Twice differentiable: the score loss needs it.
    second = jax.jit(jax.hessian(lambda y: both(flat, y)[0]))(y)
    slope = jax.jit(jax.grad(lambda y: both(flat, y)[0]))
    np.testing.assert_allclose(second, (slope(y + 1e-5) - slope(y - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)


def test_inverse_converges_far_out(x64):
    y = jnp.asarray([-1e3, -30.0, -1e-9, 0.0, 2.0, 50.0, 1e3])
    back = eqx.filter_jit(lambda ramps: jax.vmap(lambda y: ramps.transform(ramps.inverse(y)))(y))
    for seed in range(8):
        np.testing.assert_allclose(back(ramps_with(seed)), y, rtol=1e-12, atol=1e-12)


def test_conditional_affine_is_the_linear_gaussian(x64):
    affine = ConditionalAffine(2, 3)
    fields = (
        jnp.asarray([[9.0, 9.0], [0.5, 9.0]]),
        jnp.asarray([0.1, -0.2]),
        jnp.ones((2, 3)),
        jnp.asarray([1.0, 2.0]),
    )
    affine = eqx.tree_at(lambda a: (a.lower, a.log_diagonal, a.slope, a.loc), affine, fields)
    c = jnp.asarray([0.1, 0.2, 0.3])
    y, log_det = affine.transform_and_log_det(jnp.asarray([1.0, 1.0]), c)
    np.testing.assert_allclose(y, [np.exp(0.1) + 1.6, 0.5 + np.exp(-0.2) + 2.6])
    np.testing.assert_allclose(log_det, -0.1)
    np.testing.assert_allclose(affine.inverse(y, c), 1.0)


# The mixture


def test_new_mixture_is_nearly_a_standard_normal_of_distinct_components(x64):
    @eqx.filter_jit
    def gap_and_means(mixture, x):
        own = jax.vmap(lambda x: mixture.log_prob(x, condition_of(2)))(x)
        return jnp.mean(jnp.sum(jax.scipy.stats.norm.logpdf(x), -1) - own), mixture._parts(condition_of(2))[1]

    for dim, components in [(1, 1), (1, 8), (3, 2), (3, 8)]:
        mixture = FLOWS["mixture"](jax.random.key(0), dim, 2, components=components)
        gap, means = map(np.asarray, gap_and_means(mixture, jax.random.normal(jax.random.key(1), (500, dim))))
        assert abs(gap) < 0.01
        apart = np.linalg.norm(means[:, None] - means[None], axis=-1) + np.eye(components)
        assert apart.min() > 0.05


@pytest.mark.parametrize("condition_dim", [None, 2])
def test_mixture_equals_the_sum_of_its_normals_and_draws_follow_it(x64, condition_dim):
    mixture, c = make("mixture", 2, condition_dim, moved_by=0.5), condition_of(condition_dim)
    logits, means, factors, _ = mixture._parts(c)
    weights = np.asarray(jax.nn.softmax(logits))
    roots = np.asarray(factors) @ np.linalg.inv(np.linalg.cholesky(np.eye(2) - mixture_spread(3, 2)))
    covariances = np.linalg.inv(np.swapaxes(roots, 1, 2) @ roots)
    normal = jax.scipy.stats.multivariate_normal.pdf
    x = jnp.asarray([0.4, -0.8])
    total = sum(w * normal(x, m, s) for w, m, s in zip(weights, means, covariances, strict=True))
    np.testing.assert_allclose(mixture.log_prob(x, c), np.log(total), rtol=1e-10)

    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = np.asarray(jax.vmap(lambda key: mixture.sample(key, (), c))(keys))
    mean = weights @ np.asarray(means)
    second = np.einsum("k,kij->ij", weights, covariances + np.einsum("ki,kj->kij", means, means))
    covariance = second - np.outer(mean, mean)
    products = np.einsum("ni,nj->nij", draws - mean, draws - mean)
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * draws.std(0) / np.sqrt(len(draws)))
    assert np.all(np.abs(products.mean(0) - covariance) < 5 * products.std(0) / np.sqrt(len(draws)))


def mixture_spread(components, dim):
    """Covariance of the means of a mixture whose free numbers are zero."""
    mixture = FLOWS["mixture"](jax.random.key(0), dim, components=components)
    means = eqx.tree_at(lambda m: m.raw, mixture, jnp.zeros_like(mixture.raw))._parts(None)[1]
    return np.cov(np.asarray(means).T, ddof=0).reshape(dim, dim)


def test_mixture_without_components_is_refused():
    with pytest.raises(ValueError, match="components >= 1; got 0"):
        FLOWS["mixture"](jax.random.key(0), 2, components=0)


# The continuous flow


def test_error_of_the_continuous_flow_falls_with_the_fourth_power_of_the_steps(x64):
    flow, c, v = make("continuous", 2, 2, moved_by=0.5), condition_of(2), jnp.asarray([0.4, -0.7])

    @eqx.filter_jit
    def ends(bijection, v):
        return jnp.append(*bijection.inverse_and_log_det(v, c)), bijection.transform(v, c)

    def at(steps):
        return ends(AngularFlow(flow.bijection.network, 2, 2, steps), v)

    exact, coarse, fine = at(128), at(8), at(16)
    for i in range(2):
        ratio = np.linalg.norm(coarse[i] - exact[i]) / np.linalg.norm(fine[i] - exact[i])
        assert 10 < ratio < 25
    np.testing.assert_allclose(exact[1], flow.bijection.transform_and_log_det(v, c)[0], atol=1e-4)


def test_score_loss_of_the_continuous_flow_has_the_gradient_of_finite_differences(x64):
    """The gradient in the parameters of the squared gradient in theta: what training on scores takes."""
    flow, c, v = make("continuous", 2, 2), condition_of(2), jnp.asarray([0.4, -0.7])
    arrays, static = eqx.partition(flow, eqx.is_inexact_array)
    flat, unravel = jax.flatten_util.ravel_pytree(arrays)

    @jax.jit
    def loss(flat):
        return jnp.sum(jax.grad(eqx.combine(unravel(flat), static).log_prob)(v, c) ** 2)

    direction = jax.random.normal(jax.random.key(9), flat.shape)
    difference = (loss(flat + 1e-5 * direction) - loss(flat - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(flat) @ direction, difference, rtol=1e-6)


def test_continuous_flow_without_steps_is_refused():
    with pytest.raises(ValueError, match="steps >= 1; got 0"):
        FLOWS["continuous"](jax.random.key(0), 2, steps=0)
