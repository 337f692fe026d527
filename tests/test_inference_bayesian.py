"""Posteriors over a network's weights, against what regression says of the same rows and against each other."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.inference import (
    FMPE,
    NLE,
    NPE,
    NRE,
    Posterior,
    fit_chains,
    fit_variational,
    load_posterior,
    network_spread,
)
from diffsbi.inference.bayesian import NegativeElbo, Weights, _judged
from diffsbi.inference.losses import ScoredDensity
from diffsbi.inference.training import fit
from diffsbi.sampling import Chains
from diffsbi.simulators.linear_gaussian import linear_gaussian

SMALL = {"layers": 1, "width": 8, "depth": 1}
SIM = linear_gaussian(dim=2, n_latents=2, n_data=3)
ROWS = SIM.draw(jax.random.key(1), 665)  # 360 to train, 5 to condition on, 300 to test
X = ROWS.x[360:365]
SHORT = {"members": 16, "n_warmup": 150, "n_samples": 100, "max_tree_depth": 5, "max_epochs": 50}


def estimator(n, kind=NPE, with_score=False, **options):
    kind = kind(SIM, "coupling", density_options=SMALL, **options) if kind is not NRE else NRE(SIM, width=8, depth=1)
    return kind.append(ROWS.theta[:n], ROWS.x[:n], ROWS.score[:n] if with_score else None)


def exact(x=X):
    """Means and widths of theta | x."""
    means, covariances = jax.vmap(SIM.posterior)(x)
    return np.asarray(means), np.sqrt(np.diagonal(np.asarray(covariances), axis1=1, axis2=2))


def by_regression(n, x=X):
    r"""Standard error of a regression's prediction at x, in units of its residual: $\sqrt{(1 + |c|^2)/N}$."""
    rows = np.asarray(ROWS.x[:n])
    moved = np.asarray(x) - rows.mean(0)
    distance = np.einsum("ni,ij,nj->n", moved, np.linalg.inv(np.cov(rows.T)), moved)
    return np.sqrt(np.mean(1 + distance) / n)


def between(posterior, n=1000):
    """Root mean square over X and theta of the spread of the members' means, in exact widths."""
    spread = network_spread(posterior, jax.random.key(5), n, X)
    share = spread.fraction / (1 - spread.fraction) * np.mean(spread.widths**2, 0)
    return np.sqrt(np.mean(share / exact()[1] ** 2))


@pytest.fixture(scope="module")
def sampled():
    return fit_chains(estimator(40), jax.random.key(2), **SHORT)


@pytest.fixture(scope="module")
def variational():
    return fit_variational(estimator(40), jax.random.key(2), members=16, max_epochs=400)


def test_the_spread_is_that_of_the_regression_of_the_same_rows(sampled):
    """By the chains, and by least squares; 16 draws tell a standard deviation to 18 %, the flow may add to it."""
    assert 0.6 < between(sampled) / by_regression(40) < 2.0
    assert sampled.config["network"]["rhat"] < 1.1 and sampled.config["network"]["divergences"] == 0


def test_variational_and_sampled_spreads_agree_within_a_factor_of_about_two(sampled, variational):
    assert 0.5 < between(variational) / between(sampled) < 2.2


@pytest.mark.parametrize("name", ["sampled", "variational"])
def test_the_posterior_stays_near_the_exact_one(name, request):
    posterior = request.getfixturevalue(name)
    assert isinstance(posterior, Posterior) and len(posterior.members) == 16
    mean, width = moments(posterior)
    means, widths = exact()
    # The simulations themselves move the mean by the regression's standard error.
    assert np.sqrt(np.mean(((mean - means) / widths) ** 2)) < 2 * by_regression(40)
    np.testing.assert_allclose(np.mean(width / widths), 1.0, atol=0.2)


def moments(posterior):
    """Mean and width of theta under the mixture of all members."""
    spread = network_spread(posterior, jax.random.key(3), 1000, X)
    return spread.means.mean(0), np.sqrt(np.mean(spread.widths**2, 0) + spread.means.var(0))


def test_a_network_that_was_trained_too_long_claims_too_little_width(sampled):
    """The minimum of the training loss against the mixture over the weights: widths, and held-out log-probability."""
    start = estimator(40)._start(jax.random.key(2), estimator(40)._unconstrained_rows(), 0.1, {})
    rows = {name: jnp.concatenate([start.train[name], start.validation[name]]) for name in start.train}
    longest = {"max_epochs": 600, "patience": 600, "learning_rate": 2e-2}
    model, _ = fit(jax.random.key(0), start.model, rows, rows, start.loss, **longest)
    single = alone(sampled, type(sampled.members[0])(start.standardiser, model.density))
    values = [alone(sampled, m).log_prob(ROWS.theta[365:], ROWS.x[365:]) for m in (*single.members, *sampled.members)]
    gain = np.asarray(jax.nn.logsumexp(jnp.stack(values[1:]), axis=0) - np.log(16) - values[0])
    gain = np.clip(gain, -5, 5)  # a few rows, of which the single network is certain that they do not happen
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain)) > 0
    width = np.asarray(single.sample(jax.random.key(3), 1000, X)).std(0)
    assert np.mean(width) < np.mean(moments(sampled)[1])


def alone(posterior, member):
    config = json.dumps(posterior.config | {"members": 1})
    return Posterior(posterior.prior, (member,), posterior.histories, config)


@pytest.mark.slow
def test_the_spread_shrinks_as_one_over_the_root_of_n(sampled):
    many = between(fit_chains(estimator(360), jax.random.key(2), **SHORT), 4000)
    assert 2.0 < between(sampled) / many < 4.5  # 3, and 16 draws of each


def test_draws_of_the_weights_are_saved(sampled, tmp_path):
    sampled.condition(X[0]).save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a")
    assert loaded.config == sampled.config and loaded.config["network"]["method"] == "chains"
    assert eqx.tree_equal(*(eqx.filter(p.members, eqx.is_array) for p in (loaded, sampled)))
    one = [alone(p, p.members[7]).log_prob(jnp.zeros(2), X) for p in (loaded, sampled)]
    np.testing.assert_array_equal(*one)


def test_spread_of_members_that_are_known(sampled):
    """Two equal members whose centres differ by 2 δ: B = 2 δ², whatever else they do."""
    one = sampled.members[0]
    shift = jnp.asarray([0.5, 0.0])
    moved = eqx.tree_at(lambda m: m.standardiser.u_loc, one, one.standardiser.u_loc + 2 * shift)
    pair = Posterior(sampled.prior, (one, moved), sampled.histories, json.dumps(sampled.config | {"members": 2}))
    spread = network_spread(pair, jax.random.key(0), 4000, X[0])
    variance = np.mean(spread.widths**2, 0)
    expected = 2 * np.asarray(shift) ** 2 / (2 * np.asarray(shift) ** 2 + variance)
    assert spread.means.shape == spread.widths.shape == (2, 2) and spread.fraction.shape == (2,)
    error = 4 * np.sqrt(2 * variance / 4000)  # of the distance of the means
    np.testing.assert_allclose((spread.means[1] - spread.means[0]), 2 * np.asarray(shift), atol=np.max(error))
    np.testing.assert_allclose(spread.fraction, expected, atol=0.05)
    config = json.dumps(sampled.config | {"members": 3, "weights": [0.5, 0.5, 0.0]})
    weighted = Posterior(sampled.prior, (one, moved, one), sampled.histories, config)
    assert network_spread(weighted, jax.random.key(0), 100, X[0]).means.shape == (2, 2)


def test_the_bound_is_that_of_the_formula(x64):
    """A density without parameters but one: loss w² by Monte Carlo against E[w²] + KL / N in closed form."""

    class Square(eqx.Module):
        def __call__(self, params, static, batch, key):
            return jnp.mean(batch) * params**2

    weights = eqx.tree_at(lambda w: w.centre, Weights(ScoredDensity(jnp.asarray(0.5)), 0.3), jnp.asarray(0.5))
    bound = NegativeElbo(Square(), weights, 10, 20_000)
    params = {"mean": jnp.asarray([0.7]), "log_sd": jnp.asarray([-0.4])}
    value = bound(params, {"mean": None, "log_sd": None}, jnp.ones(4), jax.random.key(0))
    mean, sd = 0.5 + 0.3 * 0.7, 0.3 * np.exp(-0.4)
    divergence = 0.5 * (np.exp(-0.8) + 0.7**2 - 1) + 0.4
    error = np.sqrt(4 * mean**2 * sd**2 + 2 * sd**4) / np.sqrt(20_000)
    np.testing.assert_allclose(np.squeeze(value), mean**2 + sd**2 + divergence / 10, atol=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [NPE, NLE, NRE])
def test_every_estimator_with_scores(kind):
    tiny = {"members": 2, "max_epochs": 5}
    one = fit_variational(estimator(40, kind, with_score=True), jax.random.key(0), draws=1, **tiny)
    two = fit_chains(estimator(40, kind, with_score=True), jax.random.key(0), **tiny, n_warmup=50, n_samples=20)
    for posterior in (one, two):
        assert np.isfinite(posterior.log_prob(jnp.zeros(2), X[0]))
        spread = network_spread(posterior, jax.random.key(1), 20, X[0])
        assert np.all((spread.fraction >= 0) & (spread.fraction < 1))


def test_chains_that_have_not_converged_are_told():
    """Two chains about different weights, of which one diverged twice."""
    with_rows = estimator(40)
    start = with_rows._start(jax.random.key(2), with_rows._unconstrained_rows(), 0.1, {})
    weights = Weights(start.model, 0.1)
    rng = np.random.default_rng(0)
    theta = 0.1 * rng.standard_normal((2, 20, weights.scale.size)).astype(np.float32)
    zero, diverging = np.zeros((2, 20)), np.zeros((2, 20), bool)
    diverging[1, :2] = True
    names = tuple(map(str, range(weights.scale.size)))
    chains = Chains(theta, names, zero, zero, diverging, zero.astype(int), np.ones(2), 1, 0, {})
    with pytest.warns(UserWarning, match="of what they predict, 2 divergences in 40 transitions"):
        account = _judged(chains, with_rows, start, weights, jax.random.key(0))
    assert account["divergences"] == 2 and account["rhat"] < 1.1
    apart = eqx.tree_at(lambda c: (c.theta, c.diverging), chains, (theta + np.array([[[0.0]], [[1.0]]]), zero > 0))
    with pytest.warns(UserWarning, match="largest R-hat .* of what they predict, 0 divergences"):
        assert _judged(apart, with_rows, start, weights, jax.random.key(0))["rhat"] > 1.5


def test_bad_settings_are_named(sampled):
    key = jax.random.key(0)
    large = NPE(SIM, "coupling", density_options={"layers": 2, "width": 150}).append(
        SIM.prior.sample(key, (20,)), jnp.ones((20, 3))
    )
    with pytest.raises(
        ValueError, match=r"at most 20000 weights to sample; the density has \d{5,}. Use fit_variational"
    ):
        fit_chains(large, key)
    flow_matching = FMPE(SIM).append(SIM.prior.sample(key, (20,)), jnp.ones((20, 3)))
    for fitting in (fit_chains, fit_variational):
        with pytest.raises(ValueError, match="a likelihood or a contrast; got FMPE"):
            fitting(flow_matching, key)
        with pytest.raises(ValueError, match="at least 10 simulations to fit; got 9"):
            fitting(estimator(9), key)
        with pytest.raises(ValueError, match="members >= 2 and prior_scale > 0; got 1 and 0.1"):
            fitting(estimator(20), key, members=1)
        with pytest.raises(ValueError, match="prior_scale > 0; got 8 and -1"):
            fitting(estimator(20), key, members=8, prior_scale=-1)
        with pytest.raises(TypeError, match="typed JAX key"):
            fitting(estimator(20), 0)
    with pytest.raises(ValueError, match="draws >= 1; got 0"):
        fit_variational(estimator(20), key, draws=0)
    with pytest.raises(ValueError, match="at least 16 draws, one for each member; got 2 chains of 4"):
        fit_chains(estimator(20), key, n_samples=4)
    with pytest.raises(ValueError, match="at least 2 members and n >= 2 draws; got 1 and 100"):
        single = Posterior(sampled.prior, sampled.members[:1], sampled.histories, sampled.config_json)
        network_spread(single, key, 100, X[0])
