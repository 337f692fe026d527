"""Information maximising networks: every road to the derivatives, whole or block by block, against exact answers."""

import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi import plotting
from diffsbi.compression import IMNN
from diffsbi.compression.arrays import pairs, simulated, stored
from diffsbi.compression.imnn import FittedIMNN, _SetLoss
from diffsbi.compression.information import Regularisation, information, information_loss, measured_information
from diffsbi.compression.simulations import summaries_of

THETA = np.array([0.3, 1.2])
N, SHAPE = 24, (3, 2)


def simulate(theta, key):
    """Six normal numbers on a 3 x 2 grid, of mean theta[0] and variance theta[1]."""
    return theta[0] + jnp.sqrt(theta[1]) * jax.random.normal(key, SHAPE)


class Moments(eqx.Module):
    """Mean and mean square, times weights: exact summaries of the toy, and something to differentiate."""

    weight: jax.Array

    def __call__(self, x):
        return self.weight @ jnp.stack([jnp.mean(x), jnp.mean(x**2)])


class Small(eqx.Module):
    mlp: eqx.nn.MLP

    def __init__(self, seed=0, m=2, activation=jnp.tanh, width=5):
        self.mlp = eqx.nn.MLP(6, m, width, 1, activation, key=jax.random.key(seed))

    def __call__(self, x):
        return self.mlp(x.ravel())


def simulations(seed=3, n=N):
    """x (n, 3, 2), dx/dtheta (n, 3, 2, 2) by hand, and pairs of the same seeds."""
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(n)]
    white = np.stack([jax.random.normal(k, SHAPE) for k in keys])
    at = lambda t: t[0] + np.sqrt(t[1]) * white  # noqa: E731
    dx = np.stack([np.ones_like(white), white / (2 * np.sqrt(THETA[1]))], -1)
    moved = lambda side: np.stack([at(THETA + side * w / 2) for w in 1e-4 * np.eye(2)], 1)  # noqa: E731
    return at(THETA), dx, moved(-1), moved(1)


class Slices:
    """An array of which only slices can be read, as of a file."""

    def __init__(self, a):
        self.a, self.shape, self.largest = a, a.shape, 0

    def __len__(self):
        return len(self.a)

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.largest = max(self.largest, rows.stop - rows.start)
        return self.a[rows]


def a_set(kind, n_d=16):
    x, dx, minus, plus = simulations()
    if kind == "simulator":
        return simulated(simulate, THETA, N, n_d, jax.random.key(3))
    if kind == "derivatives":
        return stored(THETA, x, dx[:n_d])
    if kind == "pairs":
        return pairs(THETA, np.full(2, 1e-4), x, minus[:n_d], plus[:n_d])
    return stored(THETA, Slices(x), Slices(dx[:n_d]))


KINDS = ["simulator", "derivatives", "pairs", "streamed"]


def compiled(simulations, n_per_device=None, devices=None):
    """network → (loss, gradient)."""
    loss = _SetLoss(simulations, None, Regularisation(), n_per_device, devices)
    value = lambda network: loss(*eqx.partition(network, eqx.is_inexact_array), {"train": 0}, jax.random.key(0))[0]  # noqa: E731
    return eqx.filter_jit(eqx.filter_value_and_grad(value))


def flat(tree):
    return jax.flatten_util.ravel_pytree(eqx.filter(tree, eqx.is_inexact_array))[0]


def test_moments_and_fisher_matrix_by_numpy(x64):
    rng = np.random.default_rng(0)
    t, dt = rng.normal(size=(50, 3)), rng.normal(1.0, 1.0, size=(40, 3, 2))
    found = information(jnp.asarray(t), jnp.asarray(dt))
    mean_dt, precision = dt.mean(0), np.linalg.inv(np.cov(t.T))
    np.testing.assert_allclose(found.covariance, np.cov(t.T), rtol=1e-12)
    np.testing.assert_allclose(found.fisher, mean_dt.T @ precision @ mean_dt, rtol=1e-10)
    noise = [[np.trace(precision @ np.cov(dt[..., a].T, dt[..., b].T)[:3, 3:]) / 40 for b in (0, 1)] for a in (0, 1)]
    np.testing.assert_allclose(found.unbiased, 45 / 49 * (found.fisher - np.array(noise)), rtol=1e-10)
    for same in (found.fisher, found.unbiased):  # whatever the units of the summaries
        linear = jnp.asarray(rng.normal(size=(3, 3)))
        other = information(t @ linear.T, jnp.einsum("ij,njp->nip", linear, dt))
        assert any(np.allclose(same, f, rtol=1e-8) for f in (other.fisher, other.unbiased))


def test_the_unbiased_matrix_has_no_bias_and_the_plain_one_has(x64):
    """Normal summaries with C = 1 and noisy derivatives of mean D: F = D^T D."""
    rng, slope = np.random.default_rng(1), np.array([[1.0, 0.2], [0.0, 0.5]])

    def once(t, dt):
        found = information(t, dt)
        return found.fisher, found.unbiased

    t, dt = rng.normal(size=(4000, 12, 2)), slope + rng.normal(size=(4000, 12, 2, 2))
    plain, unbiased = (np.asarray(a) for a in jax.vmap(once)(jnp.asarray(t), jnp.asarray(dt)))
    error = unbiased.std(0) / np.sqrt(len(t))
    assert np.all(np.abs(unbiased.mean(0) - slope.T @ slope) < 4 * error)
    assert np.all(np.diag(plain.mean(0) - slope.T @ slope) > 10 * np.diag(error))


def test_an_information_that_is_not_positive_is_none(x64):
    """Derivatives that are all noise: F without bias has two negative eigenvalues, and so a positive determinant."""
    rng = np.random.default_rng(0)
    t, dt = rng.normal(size=(50, 3)), rng.normal(size=(6, 3, 2))
    dt -= 0.9 * dt.mean(0)
    found, error = measured_information(t, dt)
    assert np.all(np.linalg.eigvalsh(found.unbiased) < 0) and np.linalg.det(found.unbiased) > 0
    assert error == np.inf
    measures = information_loss(jnp.asarray(t), jnp.asarray(dt), Regularisation())[1]
    assert measures["det F"] == 0.0 and np.isfinite(measures["ln det F"])
    fit = FittedIMNN(Small(), jnp.asarray(THETA), jnp.zeros(2), jnp.eye(2), jnp.asarray(found.unbiased), SHAPE)
    assert fit.det_fisher == 0.0
    compiled_mean = eqx.filter_jit(lambda fit, x: fit.gaussian(x).mean)
    assert compiled_mean(fit, np.zeros(SHAPE)).shape == (2,), "not known there"
    with pytest.raises(ValueError, match=r"positive Fisher matrix; got \[\[-.*more derivatives"):
        fit.gaussian(np.zeros(SHAPE))


def test_a_fit_that_knows_nothing_says_so():
    """Data that are all noise: the exact F is zero, and its estimate without bias as often negative as not."""
    x, dx = (
        np.random.default_rng(0).normal(size=(2, 30, *SHAPE)),
        np.random.default_rng(1).normal(size=(2, 30, *SHAPE, 2)),
    )
    dx -= dx.mean(1, keepdims=True)
    imnn = IMNN.from_derivatives(Small(), THETA, (x[0], dx[0]), (x[1], dx[1]))
    with pytest.warns(UserWarning, match="without bias, is not positive"):
        fitted = imnn.fit(jax.random.key(0), max_iterations=2, validate_every=1, keep="last")
    assert fitted.det_fisher == 0.0 and np.isfinite(fitted(x[1])).all()


def test_the_jackknife_error_is_the_scatter():
    rng = np.random.default_rng(2)
    results = []
    for _ in range(40):
        t, dt = rng.normal(size=(400, 2)), np.eye(2) + 0.1 * rng.normal(size=(400, 2, 2))
        found, error = measured_information(t, dt)
        assert found.fisher.dtype == np.float64
        results.append((np.linalg.slogdet(found.unbiased)[1], error))
    log_det, error = np.array(results).T
    assert 0.7 < np.mean(error) / log_det.std() < 1.5 and abs(log_det.mean()) < 4 * log_det.std() / np.sqrt(40)


def test_regularisation_follows_its_formula(x64):
    weight = Regularisation(10.0, 0.1)
    assert weight.alpha == pytest.approx(-np.log(0.1 * 9 + 0.01 / 1.1) / 0.1)
    t = jnp.asarray(np.random.default_rng(0).normal(size=(100, 2)))
    found = information(t, jnp.ones((10, 2, 1)))
    distance, rate = weight(found)
    c = np.cov(t.T)
    expected = np.linalg.norm(c - np.eye(2)) + np.linalg.norm(np.linalg.inv(c) - np.eye(2))
    np.testing.assert_allclose(
        [distance, rate], [expected, 10 * expected / (expected + np.exp(-weight.alpha * expected))]
    )
    at = found._replace(covariance=jnp.eye(2), precision=jnp.diag(jnp.array([1.1, 1.0])))
    assert float(weight(at)[1]) == pytest.approx(1, abs=0.02), "r is about one where L2 is the closeness"
    whole = lambda c: weight(found._replace(covariance=c, precision=jnp.linalg.inv(c)))[0]  # noqa: E731
    assert np.all(np.asarray(jax.grad(whole)(jnp.eye(2))) == 0), "no NaN at C = 1"
    value, measures = information_loss(t, jnp.ones((10, 2, 1)), weight)
    np.testing.assert_allclose(value, -np.log(np.linalg.det(found.fisher)) + distance * rate)
    np.testing.assert_allclose(measures["det C"] * measures["det C^-1"], 1)


@pytest.mark.parametrize("strength, closeness", [(11.0, 0.1), (0.9, 0.1), (200.0, 0.01)])
def test_a_regularisation_that_would_vanish_is_refused(strength, closeness):
    with pytest.raises(ValueError, match=r"strength between .* at closeness = "):
        Regularisation(strength, closeness)
    Regularisation(10.9, 0.1)


@pytest.mark.optimised
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_summaries_by_every_road(kind, x64):
    network = Small()
    x, dx, *_ = simulations()
    t, dt = summaries_of(network, a_set(kind), jax.random.key(0), 5 if kind == "streamed" else None)
    jacobians = jax.vmap(jax.jacrev(network))(jnp.asarray(x[:16]))
    np.testing.assert_allclose(t, jax.vmap(network)(x), rtol=1e-12)
    tolerance = 1e-7 if kind == "pairs" else 1e-12
    np.testing.assert_allclose(dt, jnp.einsum("nmij,nijp->nmp", jacobians, dx[:16]), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_give_the_loss_and_the_gradient_of_the_whole(kind, x64):
    """n_s = 24 and n_d = 16 in blocks of 5, with a rest; and the gradient by finite differences."""
    network, simulations = Small(), a_set(kind)
    whole = compiled(simulations)
    value, gradient = whole(network)
    block_value, block_gradient = compiled(simulations, 5)(network)
    np.testing.assert_allclose(block_value, value, rtol=1e-12)
    assert np.max(np.abs(flat(gradient) - flat(block_gradient))) < 1e-10 * np.max(np.abs(flat(gradient)))
    vector, rebuild = jax.flatten_util.ravel_pytree(eqx.filter(network, eqx.is_inexact_array))
    along = jnp.asarray(np.random.default_rng(1).normal(size=len(vector)))
    ends = [whole(eqx.combine(rebuild(vector + h * along), network))[0] for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(flat(gradient) @ along, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_only_a_block_is_in_memory():
    x = np.random.default_rng(0).normal(size=(400, 6))
    simulations = stored(THETA, x, np.random.default_rng(1).normal(size=(400, 6, 2)))
    params, static = eqx.partition(eqx.nn.MLP(6, 2, 512, 1, key=jax.random.key(0)), eqx.is_inexact_array)

    def temporary(n_per_device):
        loss = _SetLoss(simulations, None, Regularisation(), n_per_device, None)
        gradient = jax.grad(lambda p, key: loss(p, static, {"train": 0}, key)[0])
        return jax.jit(gradient).lower(params, jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(10) < temporary(None) / 5


@pytest.mark.optimised
def test_streamed_rows_are_read_block_by_block(tmp_path, x64):
    x, dx, *_ = simulations()
    for name, a in (("x", x), ("dx", dx)):
        np.save(tmp_path / f"{name}.npy", a)
    on_disk = stored(THETA, *(np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("x", "dx")))
    expected = summaries_of(Small(), stored(THETA, x, dx), jax.random.key(0))
    watched = stored(THETA, Slices(x), Slices(dx))
    watched.read.arrays[0].largest = 0  # the check of its rows reads larger blocks
    for streamed in (on_disk, watched):
        for a, b in zip(summaries_of(Small(), streamed, jax.random.key(0), 5), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert watched.read.arrays[0].largest == 5


@pytest.mark.parametrize("kinds", [("streamed",), pytest.param(tuple(KINDS[:3]), marks=pytest.mark.slow)])
def test_two_devices_give_the_same_gradient(kinds):
    """In a process of its own: the number of devices is fixed when JAX starts."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from test_imnn import Small, a_set, compiled, flat
assert len(jax.devices()) == 2
for kind in {kinds!r}:
    value, gradient = compiled(a_set(kind))(Small())
    other, split = compiled(a_set(kind), 3, tuple(jax.devices()))(Small())
    np.testing.assert_allclose(other, value, rtol=1e-12)
    assert np.max(np.abs(flat(gradient) - flat(split))) < 1e-10 * np.max(np.abs(flat(gradient))), kind
"""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"XLA_FLAGS": flags}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def quick(network=None, **settings):
    options = dict(n_s=200, n_validation=200) | settings
    return IMNN.from_simulator(Moments(jnp.eye(2)) if network is None else network, simulate, THETA, **options)


OPTIONS = dict(max_iterations=20, validate_every=10, patience=10)


def test_sufficient_summaries_have_the_exact_information_and_estimate_well():
    fitted = quick().fit(jax.random.key(0), n_refit=40_000, **OPTIONS)
    exact = np.diag([6 / THETA[1], 6 / (2 * THETA[1] ** 2)])
    np.testing.assert_allclose(fitted.fisher, exact, rtol=0.05, atol=0.1)
    assert abs(np.log(fitted.det_fisher / np.linalg.det(exact))) < 4 * fitted.log_det_error + 1e-3
    draws = lambda t: jax.vmap(lambda k: simulate(t, k))(jax.random.split(jax.random.key(5), 4000))  # noqa: E731
    for theta in (THETA, THETA + [0.05, 0.0]):
        estimates = np.asarray(fitted(draws(jnp.asarray(theta))))
        scatter = np.sqrt(np.diag(np.linalg.inv(exact)) / len(estimates))
        assert np.all(np.abs(estimates.mean(0) - theta) < 4.5 * scatter)
        np.testing.assert_allclose(np.cov(estimates.T), np.linalg.inv(exact), rtol=0.2, atol=0.03)
    x = draws(jnp.asarray(THETA))
    assert fitted(x[0]).shape == (2,) and fitted(x[:6].reshape(2, 3, *SHAPE)).shape == (2, 3, 2)
    normal = fitted.gaussian(x[0])
    np.testing.assert_allclose(normal.mean, fitted(x[0]))
    np.testing.assert_allclose(np.linalg.inv(normal.covariance_matrix), fitted.fisher, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="x with trailing shape"):
        fitted(jnp.zeros(6))
    with pytest.raises(ValueError, match="finite x; got 1 non-finite of 6"):
        fitted(np.where(np.arange(6).reshape(SHAPE) == 4, np.nan, 1.0))


def test_a_fit_learns_is_repeated_and_accounts_for_itself(tmp_path):
    (x, dx, *_), (other, d_other, *_) = simulations(3, 60), simulations(4, 60)
    imnn = IMNN.from_derivatives(Small(), THETA, (x, dx), (other, d_other))
    settings = dict(max_iterations=120, validate_every=20, learning_rate=1e-2, average=0.9)
    fits = [imnn.fit(jax.random.key(0), **settings) for _ in range(2)]
    history = fits[0].history
    assert np.array_equal(fits[0].matrix, fits[1].matrix)
    assert set(history.measures) == {"det F", "ln det F", "det C", "det C^-1", "L2", "r"}
    assert all(values.shape == (6, 2) and np.isfinite(values).all() for values in history.measures.values())
    assert history.steps == 120 and history.best_validation < history.first_validation
    assert history.train[-1] < history.train[0]
    np.testing.assert_allclose(history.validation, -history.measures["ln det F"][:, 1], rtol=1e-4)
    panels = fits[0].panels()
    assert panels["det F"][0]["every"] == 20
    assert all(axis.get_xlim()[1] > 100 for axis in plotting.training_curves(panels).axes)
    still = settings | dict(keep="last", max_iterations=60, patience=20, learning_rate=1e-9)  # nothing improves
    lengths = [len(imnn.fit(jax.random.key(0), **still, min_iterations=n).history.train) for n in (0, 60)]
    assert lengths == [1, 3], "patience does not end a fit before its fewest steps"

    fits[0].save(tmp_path / "imnn.bin")
    loaded = IMNN.load(tmp_path / "imnn.bin", Small(7))
    x = jax.vmap(lambda k: simulate(THETA, k))(jax.random.split(jax.random.key(5), 3))
    assert np.array_equal(loaded(x), fits[0](x)) and loaded.det_fisher == fits[0].det_fisher
    np.testing.assert_allclose(loaded.history.measures["r"], history.measures["r"])
    with pytest.raises(ValueError, match=r"mlp.layers\[0\].weight of shape \(5, 6\), float32 there and .*\(9, 6\)"):
        FittedIMNN.load(tmp_path / "imnn.bin", Small(width=9))
    with pytest.raises(ValueError, match="Is its activation another one"):
        FittedIMNN.load(tmp_path / "imnn.bin", Small(activation=jax.nn.relu))
    content = (tmp_path / "imnn.bin").read_bytes()
    for damaged, message in ((content[:-4], "truncated or altered"), (b"other", "another one")):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            FittedIMNN.load(tmp_path / "damaged", Small())


@pytest.mark.slow
def test_last_weights_and_fixed_simulations():
    """With the same simulations in every step the training loss falls steadily and the last weights are kept."""
    settings = dict(max_iterations=60, validate_every=20, keep="last", average=0.0, n_refit=500)
    fitted = quick(Small(), key=jax.random.key(8)).fit(jax.random.key(0), **settings)
    assert np.all(np.diff(fitted.history.train) < 0)


def test_stored_sets_are_fitted_and_measured_on_validation():
    x, dx, *_ = simulations(3, 60)
    other, d_other, *_ = simulations(4, 60)
    imnn = IMNN.from_derivatives(
        Moments(jnp.eye(2)), THETA, (x, dx), (other, d_other), check=(simulate, jax.random.key(3))
    )
    fitted = imnn.fit(jax.random.key(0), **OPTIONS)
    moments = lambda a: np.stack([a.mean((1, 2)), (a**2).mean((1, 2))], -1)  # noqa: E731
    slope = np.stack([d_other.mean((1, 2)), (2 * other[..., None] * d_other).mean((1, 2))], 1)
    expected = information(moments(other), slope, np)
    np.testing.assert_allclose(fitted.fisher, expected.unbiased, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="n_refit with a simulator only"):
        imnn.fit(jax.random.key(0), n_refit=10)


def test_bad_input_is_named_before_work():
    x, dx, minus, plus = simulations()
    with pytest.raises(ValueError, match=r"shape \(n_d, 3, 2, 2\); got \(24, 2, 3, 2\).*np.moveaxis"):
        stored(THETA, x, np.moveaxis(dx, -1, 1))
    with pytest.raises(ValueError, match="finite x; 1 of 24 rows are not, the first is row 5"):
        stored(THETA, np.where(np.arange(N)[:, None, None] == 5, np.nan, x), dx)
    with pytest.raises(ValueError, match=r"validation data of the training data's shape, \(3, 2\); got \(6,\)"):
        other = simulations(4)
        flat_rows = other[0].reshape(N, 6), other[1].reshape(N, 6, 2)
        IMNN.from_derivatives(Small(), THETA, simulations()[:2], flat_rows)
    with pytest.raises(ValueError, match="finite dx/dtheta"):
        stored(THETA, x, np.full_like(dx, np.inf))
    with pytest.raises(ValueError, match="2 <= n_d <= n_s"):
        stored(THETA, x[:4], dx)
    check = simulate, jax.random.key(3)
    stored(THETA, x, dx, check=check)
    for wrong, parameter in ((dx[..., ::-1], 0), (np.swapaxes(dx, -1, -2), 0), (0.8 * dx, 0)):
        with pytest.raises(ValueError, match=rf"dx\[..., {parameter}\] to be the derivative .* order of axes"):
            stored(THETA, x, wrong, check=check)
    with pytest.raises(ValueError, match="row i of x to be simulate"):
        stored(THETA, x[::-1], dx, check=check)
    with pytest.raises(ValueError, match="plus of shape .*; got"):
        pairs(THETA, np.full(2, 1e-4), x, minus, np.moveaxis(plus, 1, -1))
    with pytest.raises(ValueError, match="pairs that differ"):
        pairs(THETA, np.full(2, 1e-4), x, minus, minus)
    with pytest.raises(ValueError, match="positive widths"):
        pairs(THETA, np.zeros(2), x, minus, plus)
    with pytest.raises(ValueError, match="n_s >= n_summaries . 3 = 5 training simulations .*; got 4"):
        IMNN.from_derivatives(Small(), THETA, (x[:4], dx[:4]), (x[4:], dx[4:]))
    with pytest.raises(ValueError, match="validation simulations of other seeds"):
        IMNN.from_derivatives(Small(), THETA, (x, dx), (x, dx))
    with pytest.raises(ValueError, match="validation simulations of other seeds"):
        IMNN.from_derivatives(Small(), THETA, (x, dx), (Slices(x), Slices(dx)))
    many = np.random.default_rng(0).normal(size=(600, *x.shape[1:]))  # the shared row is beyond the first that are read
    disk = Slices(np.concatenate([many, x[:1]])), Slices(dx)
    with pytest.raises(ValueError, match="other seeds than the training ones; 1 are the same"):
        IMNN.from_derivatives(Small(), THETA, disk, (x, dx))
    other, d_other, *_ = simulations(4)
    mixed = np.concatenate([other[:-3], x[:3]]), np.concatenate([d_other[:-3], dx[:3]])
    with pytest.raises(ValueError, match="other seeds than the training ones; 3 are the same"):
        IMNN.from_derivatives(Small(), THETA, (x, dx), mixed)
    few = (x > 0).astype(float), np.ones_like(dx)  # of few values: rows coincide by chance
    IMNN.from_derivatives(Small(), THETA, (few[0], few[1]), ((other > 0).astype(float), few[1]))
    with pytest.raises(ValueError, match="other seeds than the training ones; 24 are the same"):
        IMNN.from_derivatives(Small(), THETA, few, few)
    pairs(THETA, np.full(2, 1e-4), x, minus, plus, check=check)
    for wrong, width in (((plus, minus), 1e-4), ((minus[:, ::-1], plus[:, ::-1]), 1e-4), ((minus, plus), 2e-4)):
        with pytest.raises(ValueError, match=r"\(plus - minus\)\[:, 0\] / width to be the derivative .* parameter 0"):
            pairs(THETA, np.full(2, width), x, *wrong, check=check)
    with pytest.raises(ValueError, match="n_summaries . 3 = 5 n_refit simulations .*; got 4"):
        quick(Small()).fit(jax.random.key(0), n_refit=4)
    with pytest.raises(ValueError, match="as many summaries as parameters, 2; the network has 1"):
        quick(Small(m=1))
    with pytest.raises(ValueError, match=r"network from \(3, 2\) to \(n_summaries,\)"):
        quick(lambda x: x)
    with pytest.raises(ValueError, match=r"\[1\] of the untrained network are constant"):
        quick(lambda x: jnp.stack([jnp.mean(x), 0.0])).fit(jax.random.key(0))
    with pytest.raises(TypeError, match=r"Unknown settings \['strenght'\]"):
        quick(strenght=3.0)


def test_simulators_without_a_derivative_are_refused():
    counts = lambda theta, key: theta[0] + (jax.random.uniform(key, (2000,)) < theta[1]).astype(float)  # noqa: E731
    with pytest.raises(ValueError, match="derivative with respect to parameter 1; .* draws jump with theta"):
        IMNN.from_simulator(eqx.nn.MLP(2000, 2, 4, 1, key=jax.random.key(0)), counts, np.array([0.1, 0.5]))
    with pytest.raises(ValueError, match="finite simulations; 4 of 4"):
        IMNN.from_simulator(Small(), lambda t, k: simulate(t, k) * jnp.nan, THETA)
