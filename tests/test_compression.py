"""Trained compressions against the exact posterior of data whose summary is known, and their mistakes."""

import dataclasses
import functools
import json
import warnings

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import diffsbi as ds
from diffsbi.compression import (
    LOSSES,
    HybridNetwork,
    LatentScores,
    MapNetwork,
    MarginalScore,
    ResidualNetwork,
    ScoreChange,
    fit_compressor,
    load_compressor,
    networks,
    square_symmetry,
    torus_symmetry,
)
from diffsbi.compression.latent_scores import steps_of_a_turn
from diffsbi.compression.losses import AbstractLoss
from diffsbi.compression.networks import features_of, torus_convolution
from diffsbi.compression.saving import check_probe, described, fixed_input
from diffsbi.simulators import fresh_noise
from diffsbi.simulators.fields import hartley

N = 1000


class Scale(ds.AbstractSimulator):
    """Twelve numbers about one mean with a latent each: all that is known of theta is in mean and mean square."""

    prior: ds.Prior = ds.Prior({"mean": dist.Normal(0.0, 1.0), "log_scale": dist.Normal(0.0, 0.4)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(12), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] + 0.5 * jnp.exp(theta[1]) * z, 0.5 * jnp.exp(theta[1])).to_event(1)


class Moments(eqx.Module):
    """Means of a learned function of the members, and the logarithm of their variance."""

    hidden: eqx.nn.Linear

    def __call__(self, x):
        learned = jnp.mean(jax.vmap(lambda one: jax.nn.silu(self.hidden(one[None])))(x), 0)
        return jnp.concatenate([learned, jnp.log(jnp.mean((x - jnp.mean(x)) ** 2))[None]])


@pytest.fixture(scope="module")
def simulations():
    sim = Scale()
    return sim, sim.draw(jax.random.key(0), N, n_average=6), sim.draw(jax.random.key(1), 400, with_score=False)


def network(width=16):
    made = Moments(eqx.nn.Linear(1, width, key=jax.random.key(2)))
    return eqx.tree_at(lambda m: m.hidden.weight, made, 3 * made.hidden.weight)


@pytest.fixture(scope="module")
def compressors(simulations):
    sim, draws, _ = simulations
    options = dict(prior=sim, max_epochs=100, batch_size=100, learning_rate=5e-3, weight_decay=0.0, patience=40)
    return {
        loss: fit_compressor(jax.random.key(3), network(), draws.theta, draws.x, draws.score, loss=loss, **options)
        for loss in LOSSES
    }


def residuals(t, theta):
    """What a quadratic regression of theta on t leaves."""
    columns = np.c_[np.ones(len(t)), t, t**2, t[:, :1] * t[:, 1:]]
    return theta - columns @ np.linalg.lstsq(columns, theta, rcond=None)[0]


@pytest.mark.parametrize("loss", list(LOSSES))
def test_little_is_lost(simulations, compressors, loss):
    _, _, test = simulations
    theta = np.asarray(test.theta)
    left = residuals(compressors[loss].many(test.x), theta)
    x = np.asarray(test.x)
    exact = residuals(np.c_[x.mean(1), np.log(x.std(1))], theta)
    # Paired over the same 400 rows: the ratio's standard error is a few per cent.
    ratio = (left**2).mean(0) / (exact**2).mean(0)
    assert np.all(ratio < 1.2), ratio
    assert np.all(ratio > 0.8), ratio


def test_rows_that_are_not_finite_are_not_compressed(compressors, simulations):
    x = np.asarray(simulations[2].x).copy()
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"Expected finite x; got 1 non-finite of \d+ values, first at \(3, 1\)"):
        compressors["mse"].many(x)


def test_a_summary_that_loses_is_seen(simulations):
    _, _, test = simulations
    theta, x = np.asarray(test.theta), np.asarray(test.x)
    lost = residuals(np.c_[x.mean(1), x[:, 0]], theta)
    exact = residuals(np.c_[x.mean(1), np.log(x.std(1))], theta)
    assert (lost**2).mean(0)[1] > 1.5 * (exact**2).mean(0)[1]


def test_training_starts_at_the_linear_answer_and_improves(compressors):
    for loss, compressor in compressors.items():
        history = compressor.history
        assert history.best_validation < history.first_validation, loss
        assert compressor.n_simulations == N


def test_decay_pulls_no_constant(simulations):
    """Whitening of the features and units of the residual are what they were before training."""
    sim, draws, _ = simulations
    options = dict(prior=sim, loss="gnll", max_epochs=15)
    theta, x = draws.theta, draws.x
    with_decay, without = (
        fit_compressor(jax.random.key(0), network(), theta, x, weight_decay=w, **options) for w in (1.0, 0.0)
    )
    for name in ("loc", "whiten", "lower"):
        np.testing.assert_array_equal(getattr(with_decay, name), getattr(without, name))
    assert min(with_decay.history.best_epoch, without.history.best_epoch) > 0
    assert not np.array_equal(with_decay.linear, without.linear)


def test_it_comes_back_from_its_file(compressors, simulations, tmp_path):
    _, _, test = simulations
    compressor, path = compressors["mse"], tmp_path / "compressor"
    compressor.save(path)
    loaded = load_compressor(path, network())
    np.testing.assert_array_equal(loaded.many(test.x), compressor.many(test.x))
    assert loaded.n_simulations == N
    with pytest.raises(ValueError, match="Expected the architecture that was saved .*hidden.weight"):
        load_compressor(path, network(8))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="undamaged"):
        load_compressor(path, network())
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="Expected a diffsbi compressor"):
        load_compressor(path, network())


@pytest.mark.parametrize("rows", [lambda x: x, lambda x: (x, {"mean": x.mean(-1, keepdims=True)})])
def test_files_know_the_head_and_the_activation(simulations, tmp_path, rows):
    sim, draws, _ = simulations

    class Network(eqx.Module):
        mlp: eqx.nn.MLP

        def __init__(self, activation):
            self.mlp = eqx.nn.MLP(12, 4, 6, 1, activation, key=jax.random.key(0))

        def __call__(self, x):
            return self.mlp(x[0] + x[1]["mean"] if isinstance(x, tuple) else x)

    x, path = rows(np.asarray(draws.x)), tmp_path / "compressor"
    options = dict(prior=sim, loss="mse", width=7, max_epochs=1)
    made = fit_compressor(jax.random.key(3), Network(jnp.tanh), draws.theta, x, **options)
    made.save(path)
    np.testing.assert_array_equal(load_compressor(path, Network(jnp.tanh)).many(x), made.many(x))
    with pytest.raises(ValueError, match="Is its activation another one"):
        load_compressor(path, Network(jax.nn.relu))


def test_what_a_network_is_probed_with_is_like_the_data():
    rows = np.random.default_rng(1)
    x = (3.0 + 0.1 * rows.normal(size=(50, 2, 3)), {"a": rows.normal(size=(50, 4))})
    one = fixed_input(json.loads(json.dumps(described(x))))
    assert isinstance(one, tuple) and one[0].shape == (2, 3) and one[1]["a"].shape == (4,)
    assert np.all(np.abs(np.asarray(one[0]) - 3.0) < 0.5)
    for other in (x[0].astype(int), (x[0], None), {0: x[0]}, [x[0], {"a": x[0].astype(int)}]):
        assert described(other) is None
    check_probe("file", [np.nan, 1.0], [np.nan, 1.001])
    with pytest.raises(ValueError, match="another one"):
        check_probe("file", [1.0, 1.0], [np.nan, 1.0])


def test_scores_with_the_prior_left_in_are_noticed(simulations):
    sim, draws, _ = simulations
    of_prior = jax.vmap(jax.grad(sim.prior.log_prob))(draws.theta)
    options = dict(prior=sim, loss="score", max_epochs=1)
    with pytest.warns(UserWarning, match="WITHOUT the prior's"):
        fit_compressor(jax.random.key(0), network(), draws.theta, draws.x, draws.score + of_prior, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_compressor(jax.random.key(0), network(), draws.theta, draws.x, draws.score, **options)


def at_one_theta(n, n_average):
    theta = jnp.tile(jnp.array([0.3, -0.2]), (n, 1))
    return Scale().draw(jax.random.key(7), n, theta, n_average=n_average)


def share_left(found, x):
    """Of the exact marginal score at (.3, -.2), after a regression on the numbers of x."""
    variance = 0.5 * np.exp(-0.4)
    exact = np.c_[np.sum(x - 0.3, 1) / variance, np.sum((x - 0.3) ** 2, 1) / variance - 12]
    columns = np.c_[np.ones(len(x)), found.many(x)]
    left = exact - columns @ np.linalg.lstsq(columns, exact, rcond=None)[0]
    return left.var(0) / exact.var(0)


def test_scores_at_one_theta_give_the_marginal_score_there():
    draws, test = at_one_theta(N, 2), at_one_theta(N + 400, 1)
    options = dict(prior=Scale(), loss="score", max_epochs=60, batch_size=100, learning_rate=5e-3, weight_decay=0.0)
    found = fit_compressor(jax.random.key(3), network(), draws.theta, draws.x, draws.score, **options)
    left = share_left(found, np.asarray(test.x[N:], float))
    # The noise of a thousand scores of about a variance of noise each; the linear start leaves .14 of the second.
    assert np.all(left < 0.04), left


class ScoresOfTheirRows(AbstractLoss):
    """How far scores are from the linear function of theta and x that they were in the first rows."""

    def head(self, key, n_features, batch):
        columns = jnp.c_[jnp.ones(len(batch["v"])), batch["v"], batch["x"]]
        return jnp.linalg.lstsq(columns, batch["score"])[0]

    def __call__(self, compressor, head, batch):
        columns = jnp.c_[jnp.ones(len(batch["v"])), batch["v"], batch["x"]]
        return jnp.mean((batch["score"] - columns @ jax.lax.stop_gradient(head)) ** 2)


def test_fresh_noise_in_every_epoch_comes_with_its_scores(linear, x64):
    """The whitened score of a linear Gaussian is a linear function of theta and x: of those of the same row alone."""
    draws = linear.draw(jax.random.key(0), 60, latents="whitened", keep_latents=True)
    made = []

    def renew(key):
        made.append(fresh_noise(linear, key, draws, latents="whitened"))
        return made[-1]

    def run(renew):
        options = dict(prior=linear, loss=ScoresOfTheirRows(), max_epochs=4, weight_decay=0.0, renew=renew)
        return fit_compressor(jax.random.key(1), eqx.nn.Identity(), draws.theta, draws.x, draws.score, **options)

    right = run(renew).history
    assert len({float(rows.x[0, 0]) for rows in made}) == len(made) == 3, "once before each epoch but the first"
    assert np.max(right.train) < 1e-12
    wrong = run(lambda key: dataclasses.replace(renew(key), score=draws.score)).history
    assert wrong.train[0] < 1e-12, "the first epoch is of the rows themselves"
    assert np.min(wrong.train[1:]) > 0.01
    with pytest.raises(ValueError, match=r"x of shape \(60, 4\), as the rows it renews; got \(59, 4\)"):
        run(lambda key: dataclasses.replace(draws, x=draws.x[:-1]))
    with pytest.raises(ValueError, match="the theta of the rows, in their order"):
        run(lambda key: jax.tree.map(lambda a: a[::-1], draws))
    with pytest.raises(ValueError, match="renew.* with scores, as the rows it renews have"):
        run(lambda key: dataclasses.replace(draws, score=None))


def test_mistakes_at_one_theta_are_told():
    draws = at_one_theta(100, 1)

    def run(theta=draws.theta, score=draws.score, loss="score", **options):
        options = dict(prior=Scale(), loss=loss, max_epochs=1) | options
        return fit_compressor(jax.random.key(0), network(), theta, draws.x, score, **options)

    with pytest.raises(ValueError, match="All 100 rows have the same theta.*got VMIM, scores"):
        run(loss="vmim")
    with pytest.raises(ValueError, match="got ScoreRegression, no scores"):
        run(score=None)
    with pytest.raises(ValueError, match="not training rows; 30 of 30 have the same score"):
        run(validation=(draws.theta[:30], draws.x[:30], draws.score[:30]))
    with pytest.raises(ValueError, match="validation rows at the one theta of the training rows"):
        run(validation=(draws.theta[:30] + 1.0, draws.x[:30], draws.score[:30]))
    with pytest.raises(ValueError, match=r"validation=\(theta, x, score\), as there are scores"):
        run(validation=(draws.theta[:30], draws.x[:30]))
    with pytest.raises(ValueError, match=r"every parameter to vary among the training rows; \['mean'\] does not"):
        run(theta=draws.theta.at[:, 1].set(jnp.linspace(-1.0, 1.0, 100)))
    with pytest.warns(UserWarning, match="mean score of mean at the one theta is .* standard errors from 0"):
        run(score=draws.score + jnp.array([[10.0, 0.0]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()


def test_one_wild_score_at_one_theta_decides_nothing():
    draws = at_one_theta(200, 1)
    options = dict(prior=Scale(), loss="score", max_epochs=1)
    wild = draws.score.at[7].set(1e6)
    found = [
        fit_compressor(jax.random.key(0), network(), draws.theta, draws.x, score, **options)
        for score in (draws.score, wild)
    ]
    scales = [np.std(one.many(draws.x), axis=0) for one in found]
    np.testing.assert_allclose(scales[1], scales[0], rtol=0.1)


def test_mistakes_are_told(simulations):
    sim, draws, _ = simulations
    theta, x = np.asarray(draws.theta), np.asarray(draws.x)

    def run(theta=theta, x=x, score=None, **options):
        return fit_compressor(jax.random.key(0), network(), theta, x, score, prior=sim, **options)

    with pytest.raises(ValueError, match=r"Expected theta with shape \(n, 2\)"):
        run(theta[:, :1])
    with pytest.raises(ValueError, match="Expected x with 1000 rows"):
        run(x=x[:-1])
    with pytest.raises(ValueError, match="Expected finite x; got 1 non-finite"):
        run(x=np.where(np.arange(x.size).reshape(x.shape) == 5, np.nan, x))
    with pytest.raises(ValueError, match="at least 20 simulations"):
        run(theta[:19], x[:19])
    with pytest.raises(ValueError, match="Expected scores for score regression"):
        run(loss="score")
    with pytest.raises(ValueError, match="Expected score with shape"):
        run(score=np.asarray(draws.score)[:, :1])
    with pytest.raises(ValueError, match="Expected finite score; got 1 non-finite"):
        run(score=np.where(np.arange(theta.size).reshape(theta.shape) == 5, np.nan, draws.score))
    with pytest.raises(ValueError, match="Unknown loss 'mes'.*mse"):
        run(loss="mes")
    with pytest.raises(ValueError, match="not training rows; 100 of 100"):
        run(validation=(theta[:100], x[:100]))


def test_features_of_maps_do_not_change_with_shifts(x64):
    x = jax.random.normal(jax.random.key(0), (3, 16, 16))
    made = MapNetwork(jax.random.key(1), 3, (4, 6, 8))
    assert made(x).shape == (18,)
    folded = MapNetwork(jax.random.key(1), 3, (4, 6), fold=2)
    assert folded.convolutions[0].weight.shape == (4, 12, 3, 3)
    np.testing.assert_allclose(folded(jnp.roll(x, (4, 8), (1, 2))), folded(x), rtol=1e-9)
    assert np.abs(np.asarray(folded(jnp.roll(x, (1, 0), (1, 2))) / folded(x) - 1)).max() > 1e-3
    with pytest.raises(ValueError, match="multiple of 4"):
        folded(x[:, :14, :14])
    np.testing.assert_allclose(made(jnp.roll(x, (4, 8), (1, 2))), made(x), rtol=1e-9)
    with pytest.raises(ValueError, match=r"Expected a map of shape \(3, n, n\) with n a multiple of 4"):
        made(x[:2])
    residual = ResidualNetwork(jax.random.key(1), 3, width=4, levels=2, blocks=1)
    assert residual(x).shape == (8,)
    np.testing.assert_allclose(residual(jnp.roll(x, (4, 8), (1, 2))), residual(x), rtol=1e-9)


def test_both_convolutions_are_the_sum_over_kernel_and_channels(x64):
    weight = jax.random.normal(jax.random.key(0), (4, 3, 3, 3))
    x = jax.random.normal(jax.random.key(1), (3, 6, 8))
    around = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="wrap")
    exact = np.zeros((4, 6, 8))
    for o, c, a, b in np.ndindex(*weight.shape):
        exact[o] += float(weight[o, c, a, b]) * around[c, a : a + 6, b : b + 8]
    for convolution in (torus_convolution, networks._product_of_shifted, networks.padded_convolution):
        np.testing.assert_allclose(convolution(weight, x), exact, rtol=1e-12, atol=1e-12)
        chex.assert_numerical_grads(convolution, (weight, x), order=1, modes=("fwd", "rev"), atol=1e-6)


@pytest.mark.parametrize("large, at_once", [(0, 100), (2**18, 2), (2**18, 3), (2**18, 100)])
def test_features_of_rows_a_few_at_a_time_have_the_same_gradient(large, at_once, x64, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (6, 3, 8, 8)), jax.random.normal(jax.random.key(2), (6, 4))
    network = HybridNetwork(MapNetwork(jax.random.key(1), 3, (4, 6)))
    monkeypatch.setattr(networks, "_LARGE_ROW", large)
    monkeypatch.setattr(networks, "_ROWS_BYTES", at_once * sum(a[0].nbytes for a in x))

    def loss(network, features):
        return jnp.sum(features(network, x) ** 3)

    found = eqx.filter_value_and_grad(loss)(network, features_of)
    exact = eqx.filter_value_and_grad(loss)(network, lambda network, x: jax.vmap(network)(x))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), *map(jax.tree.leaves, (found, exact)))


def test_adapted_networks_have_unit_variance_in_any_unit(x64):
    x = 1e-3 * jax.random.normal(jax.random.key(0), (40, 3, 16, 16)) + 5e-3
    made = MapNetwork(jax.random.key(1), 3, (4, 6)).adapted(x)
    first = jax.vmap(made.convolutions[0])(x)
    np.testing.assert_allclose(jnp.mean(first, (0, 2, 3)), 0, atol=1e-9)
    np.testing.assert_allclose(jnp.std(first, (0, 2, 3)), 1, rtol=1e-9)
    scaled = MapNetwork(jax.random.key(1), 3, (4, 6)).adapted(7 * x)
    np.testing.assert_allclose(scaled(7 * x[0]), made(x[0]), rtol=1e-9)


def test_a_hybrid_has_the_networks_features_beside_the_numbers(x64):
    x = 1e-3 * jax.random.normal(jax.random.key(0), (40, 3, 16, 16)), jax.random.normal(jax.random.key(2), (40, 4))
    inner = MapNetwork(jax.random.key(1), 3, (4, 6))
    made = HybridNetwork(inner).adapted(x)((x[0][0], x[1][0]))
    np.testing.assert_allclose(made, jnp.concatenate([inner.adapted(x[0])(x[0][0]), x[1][0]]), rtol=1e-12)
    residual = HybridNetwork(ResidualNetwork(jax.random.key(1), 3, width=4, levels=2, blocks=1))
    assert residual.adapted(x)((x[0][0], x[1][0])).shape == (8 + 4,)


@pytest.mark.parametrize("symmetry", [torus_symmetry, square_symmetry])
def test_symmetries_keep_the_power_and_reach_every_orientation(symmetry, x64):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    moved = jax.vmap(symmetry, (0, None))(jax.random.split(jax.random.key(1), 200), x)
    np.testing.assert_allclose(jnp.sum(moved**2, (1, 2, 3)), jnp.sum(x**2), rtol=1e-9)
    np.testing.assert_allclose(jnp.sum(moved[:, 0] * moved[:, 1], (1, 2)), jnp.sum(x[0] * x[1]), rtol=1e-9)
    distinct = len({np.asarray(m).tobytes() for m in moved})
    assert distinct == 8 if symmetry is square_symmetry else distinct > 150


@eqx.filter_jit
def drawn(sim):
    return sim.draw_one(jax.random.key(0), sim.fiducial)


def test_scores_of_a_shifted_map_are_its_own(x64):
    """Why augmentation may keep the rows' scores: the joint of shifted latents and data is the same."""
    sim = ds.lsst_y10(n_pix=8, side_deg=1.0, n_bins=2)
    theta, z, x = drawn(sim)
    shift = lambda a: jnp.roll(a, (3, 5), (1, 2))  # noqa: E731
    moved = hartley(shift(hartley(z)))  # latents are coefficients of the real Fourier basis
    score = eqx.filter_jit(lambda sim, z, x: sim.score(theta, z, x))
    np.testing.assert_allclose(score(sim, moved, shift(x)), score(sim, z, x), rtol=1e-6)


@pytest.fixture(scope="module")
def small_survey():
    return ds.lsst_y10(n_pix=8, side_deg=2.0, n_bins=2)


def test_latent_scores_of_a_gaussian_are_its_marginal_score(x64):
    """There every latent in the whitened coordinate has the marginal score, without noise."""
    linear = ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2)
    theta, x = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, -1.0, 0.2, 1.5])
    scores = LatentScores(linear, theta, rates=(0.5, 0.5))
    exact = jnp.broadcast_to(linear.marginal_score(theta, x), (3, 2))
    np.testing.assert_allclose(scores(x).reshape(3, 2), exact, rtol=1e-8)
    np.testing.assert_allclose(scores.many(jnp.stack([x, x + 1]))[0], scores(x), rtol=1e-10)


def test_latent_scores_are_joint_scores_at_their_latents(small_survey):
    """By the simulator's own score: at the origin, and after a step of the joint's own gradient."""
    sim = small_survey
    theta, _, x = drawn(sim)
    transport, origin = sim.transport("whitened"), jnp.zeros(x.shape)
    density = lambda sim, xi: sim.log_conditional(theta, xi, x, latents="whitened")  # noqa: E731
    slope = eqx.filter_jit(lambda sim, xi: jax.grad(density, 1)(sim, xi))(sim, origin)
    score = eqx.filter_jit(
        lambda sim, xi: sim.score(theta, transport.to_latents(sim.setup(theta), xi, x)[0], x, latents="whitened")
    )
    exact = [score(sim, xi) for xi in (origin, 0.1 * slope)]
    scores = LatentScores(sim, theta, rates=(0.1,))
    np.testing.assert_allclose(scores.many(x[None]).reshape(2, -1), jnp.stack(exact), rtol=2e-3, atol=5e-3)


def test_the_mean_over_a_chain_is_the_marginal_score(x64):
    """Without noise in whitened latents; in white ones within the error that chains of other momenta have."""
    linear = ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2)
    theta, x = jnp.asarray([0.3, -0.2]), jnp.asarray([0.5, -1.0, 0.2, 1.5])
    exact = linear.marginal_score(theta, x)
    np.testing.assert_allclose(MarginalScore(linear, theta, n_turns=4)(x), exact, rtol=1e-8)
    settings = dict(n_turns=300, n_steps=8, latents="white")
    means = np.stack([MarginalScore(linear, theta, seed=seed, **settings).many(x[None])[0] for seed in range(6)])
    error = means.std(0, ddof=1) / np.sqrt(len(means))
    assert np.all(np.abs(means.mean(0) - exact) < 5 * error) and np.all(error < 0.1 * np.abs(exact))
    first = MarginalScore(linear, theta, n_turns=1, n_burn=0, n_steps=8, latents="white")(x)
    assert np.all(np.abs(first - exact) > 5 * error)  # one turn from the origin is another number
    # What one chain's turns say of its error, in batches of ten for their correlation: 29 batches, and 6 chains.
    turns = np.stack([MarginalScore(linear, theta, seed=seed, **settings).turns(x) for seed in range(6)])
    batches = turns[:, 10:].reshape(6, 29, 10, 2).mean(2)
    told = np.sqrt(batches.var(1, ddof=1).mean(0) / 29)
    assert np.all(np.abs(np.log(means.std(0, ddof=1) / told)) < 5 / np.sqrt(2 * 5))
    np.testing.assert_allclose(turns[:, 3:].mean(1), means, rtol=1e-8)


def test_the_mean_over_a_chain_is_what_the_score_at_its_start_misses(x64):
    r"""$x_i \sim N(m, e^{2s} / 2)$ marginally; at z = 0 the joint score of s knows only half the variance."""
    sim, theta = Scale(), jnp.asarray([0.2, -0.1])
    x = sim.draw(jax.random.key(5), 20, theta, with_score=False).x
    mean, square = jnp.mean(x - theta[0], 1), jnp.mean((x - theta[0]) ** 2, 1)
    variance = jnp.exp(2 * theta[1]) / 2
    exact = jnp.stack([12 * mean / variance, 12 * (square / variance - 1)], 1)
    chain, start = (
        jnp.abs(statistic.many(x) - exact).mean(0)
        for statistic in (
            MarginalScore(sim, theta, n_turns=400, n_steps=6, latents="white"),
            LatentScores(sim, theta, rates=(), latents="white"),
        )
    )
    assert np.all(chain < 0.1 * start) and np.all(chain < 0.1 * exact.std(0)), (chain, start)


def test_the_change_of_a_score_is_the_curvature_of_the_datas_own_likelihood(x64):
    """Against the Hessian for a small step; of the linear simulator it is minus the information, whatever the data."""
    sim, theta = Scale(), jnp.asarray([0.2, -0.1])
    x = sim.draw(jax.random.key(5), 4, theta, with_score=False).x

    def log_likelihood(theta, x):
        return jnp.sum(dist.Normal(theta[0], jnp.exp(theta[1]) * jnp.sqrt(0.5)).log_prob(x))

    at = lambda theta: lambda x: jax.grad(log_likelihood)(theta, x)  # noqa: E731
    step = jnp.asarray([1e-4, -2e-4])
    numbers = ScoreChange(at, sim, theta, step).many(x)
    hessian = jax.vmap(lambda x: jax.hessian(log_likelihood)(theta, x))(x)
    np.testing.assert_allclose(numbers[:, :2], jax.vmap(at(theta))(x), rtol=1e-12)
    np.testing.assert_allclose(numbers[:, 2:], 2 * hessian @ step, rtol=1e-5)
    assert np.all(np.std(hessian, 0)[[0, 1], [1, 1]] > 1)  # they differ from one to the next
    linear, x = ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2), jnp.asarray([0.5, -1.0, 0.2, 1.5])
    step = jnp.asarray([0.3, 0.1])  # theta is unconstrained
    numbers = ScoreChange(functools.partial(MarginalScore, linear, n_turns=4), linear, theta, step)(x)
    np.testing.assert_allclose(numbers[:2], linear.marginal_score(theta, x), rtol=1e-7)
    exact = linear.marginal_score(theta + step, x) - linear.marginal_score(theta - step, x)
    np.testing.assert_allclose(numbers[2:], exact, rtol=1e-7)


def test_points_of_a_change_are_within_the_prior_and_wrong_steps_are_told():
    prior = ds.Prior({"a": dist.Uniform(0.0, 1.0)})
    points = ScoreChange(lambda theta: lambda x: theta, prior, jnp.asarray([0.9]), jnp.asarray([3.0]))
    assert points.below(0.0) > 0.1 and 0.99 < points.above(0.0) < 1
    for wrong in (jnp.zeros(1), jnp.ones(2), jnp.asarray([jnp.nan])):
        with pytest.raises(ValueError, match="[Ee]xpected .*step"):
            ScoreChange(lambda theta: lambda x: theta, prior, jnp.asarray([0.9]), wrong)
    with pytest.raises(ValueError, match="prior"):
        ScoreChange(lambda theta: lambda x: theta, prior, jnp.asarray([1.2]), jnp.ones(1))


class Stiff(Scale):
    """So little noise that a step of a quarter turn throws the latents far away."""

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] + jnp.exp(theta[1]) * z, 0.01).to_event(1)


def test_steps_that_go_astray_are_made_shorter(x64):
    sim, theta = Stiff(), jnp.asarray([0.2, -0.1])
    x = sim.draw(jax.random.key(5), 3, theta, with_score=False).x
    settings = dict(n_turns=12, n_burn=8, latents="white")
    assert np.all(np.isnan(MarginalScore(sim, theta, n_steps=1, **settings).many(x)))  # 16 in a turn are too few
    start = LatentScores(sim, theta, rates=(), latents="white").many(x)[:, 0]
    shortened, short = (MarginalScore(sim, theta, n_steps=n, **settings).many(x)[:, 0] for n in (25, 400))
    assert np.all(np.abs(short) < 0.01 * np.abs(start)) and np.all(np.abs(shortened) < 0.01 * np.abs(start))
    turns = np.asarray(MarginalScore(sim, theta, n_steps=25, **settings).turns(x[0]))
    undone = np.isnan(turns).all(1)
    assert 0 < undone.sum() <= 4 and np.isfinite(turns[~undone]).all()
    np.testing.assert_allclose(turns[8:][~undone[8:]].mean(0)[0], shortened[0], rtol=1e-8)


def test_the_last_score_alone(small_survey):
    x = drawn(small_survey)[2]
    both, last = (LatentScores(small_survey, rates=(0.1,), last=one)(x) for one in (False, True))
    np.testing.assert_array_equal(both[-last.size :], last)


def test_steps_of_a_turn_grow_as_the_fourth_root_of_the_number_of_latents():
    assert [steps_of_a_turn(5 * n_pix**2) for n_pix in (16, 64, 128, 256)] == [4, 4, 6, 8]
    many = ds.linear_gaussian(dim=1, n_latents=5 * 128**2, n_data=2)
    assert MarginalScore(many, latents="white").n_steps == 6


def test_wrong_points_and_rates_are_told(small_survey):
    sim = small_survey
    statistic = MarginalScore(sim)
    with pytest.raises(
        ValueError, match=r"Expected rows of data of shape \(2, 8, 8\); got an array of shape \(2, 8, 8\)"
    ):
        statistic.many(jnp.zeros((2, 8, 8)))
    with pytest.raises(ValueError, match=r"x with trailing shape \(2, 8, 8\); got \(2, 8, 9\)"):
        statistic(jnp.zeros((2, 8, 9)))
    with pytest.raises(ValueError, match="finite x; got 1 non-finite"):
        statistic.many(jnp.zeros((3, 2, 8, 8)).at[1, 0, 2, 3].set(jnp.nan))
    for wrong in (dict(n_turns=2, n_burn=2), dict(n_burn=-1), dict(n_steps=0)):
        with pytest.raises(ValueError, match="Expected 0 <= n_burn < n_turns and n_steps >= 1"):
            MarginalScore(sim, **wrong)
    with pytest.raises(ValueError, match="Expected rates between 0 and 2"):
        LatentScores(sim, rates=(2.5,))
    with pytest.raises(ValueError, match="theta0 with trailing shape"):
        LatentScores(sim, jnp.zeros(5))
    with pytest.raises(ValueError, match="Unknown latent coordinate"):
        LatentScores(sim, latents="whitend")
