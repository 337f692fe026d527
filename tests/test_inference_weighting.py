"""Weights of an ensemble's members: tables whose best weights are known, and mixtures by two roads."""

import json
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.inference import NLE, NPE, NRE, gaussian_proposal, load_posterior
from diffsbi.inference.posterior import mixture_log_prob
from diffsbi.inference.weighting import check_fitted, stacking_weights
from diffsbi.simulators.linear_gaussian import linear_gaussian

SMALL = {"layers": 1, "width": 8, "depth": 1}
SIM = linear_gaussian(dim=2, n_latents=1, n_data=2)


def table(seed, n, good, optimism, noise=0.3, m=4, fraction=0.1):
    """Log-densities whose rows differ much more than members do, and which rows each member held out."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros((n, m), bool)
    for k in range(m):
        held_out[rng.choice(n, max(2, round(fraction * n)), replace=False), k] = True
    level = 3.0 * rng.standard_normal((n, 1))
    value = level + np.asarray(good) + noise * rng.standard_normal((n, m)) + np.asarray(optimism) * ~held_out
    return value, held_out


@pytest.mark.parametrize("n", [50, 200])
def test_equally_good_members_keep_nearly_equal_weights(n):
    weights = [stacking_weights(*table(seed, n, np.zeros(4), 0.3)) for seed in range(10)]
    assert np.allclose(np.sum(weights, 1), 1)
    assert np.abs(np.mean(weights, 0) - 0.25).max() < 0.08
    assert np.min(weights) > 0.02 and np.max(weights) < 0.6


@pytest.mark.parametrize("n", [50, 200])
def test_a_member_that_failed_is_left_out(n):
    for seed in range(10):
        weights = stacking_weights(*table(seed, n, [0.0, 0.0, 0.0, -4.0], 0.3))
        assert weights[3] < 0.01 and np.min(weights[:3]) > 0.05


def test_a_member_that_only_looks_good_where_it_was_trained_loses():
    """In-sample it is the best by 2 nats; on unseen rows it is the worst by 2."""
    weights = np.mean([stacking_weights(*table(s, 200, [0, 0, 0, -2.0], [0.2, 0.2, 0.2, 4.0])) for s in range(5)], 0)
    assert weights[3] < 0.15 < 0.2 < np.min(weights[:3])


def test_weights_of_known_mixture_are_found():
    """Rows from 0.8 N(0, 1) + 0.2 N(3, 1), with members N(0, 1) and N(3, 1) that never trained."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2000) + 3 * (rng.random(2000) < 0.2)
    value = -0.5 * (x[:, None] - np.array([0.0, 3.0])) ** 2
    weights = stacking_weights(value, np.ones(value.shape, bool))
    np.testing.assert_allclose(weights, [0.8, 0.2], atol=4 * np.sqrt(0.8 * 0.2 / 2000))


def test_members_that_are_not_finite_get_nothing():
    value, held_out = table(0, 50, np.zeros(4), 0.3)
    value[7, 2] = np.nan
    weights = stacking_weights(value, held_out)
    assert weights[2] == 0 and abs(weights.sum() - 1) < 1e-12
    with pytest.raises(ValueError, match="a member with finite log-densities"):
        stacking_weights(np.full((50, 4), np.nan), held_out)
    with pytest.raises(ValueError, match=r"held out \[0, 0, 0, 0\]"):
        stacking_weights(value, np.zeros_like(held_out))


@pytest.fixture(scope="module")
def rows():
    return SIM.draw(jax.random.key(0), 40)


def estimator(kind, rows, **options):
    return kind(SIM, "coupling", density_options=SMALL, **options).append(rows.theta, rows.x)


def weighted(posterior, weights):
    """The same posterior with other weights, and members that are told apart by their centres."""
    members = tuple(
        eqx.tree_at(lambda m: m.standardiser.u_loc, member, member.standardiser.u_loc + 10.0 * k)
        for k, member in enumerate(posterior.members)
    )
    config = json.dumps(posterior.config | {"weights": weights})
    return type(posterior)(posterior.prior, members, posterior.histories, config)


@pytest.fixture(scope="module")
def posterior(rows):
    return estimator(NPE, rows).fit(jax.random.key(1), members=3, max_epochs=5, weighting="equal")


def test_draws_and_density_follow_the_weights(posterior):
    weights = [0.7, 0.0, 0.3]
    mixture, x = weighted(posterior, weights), jnp.zeros(2)
    draws = np.asarray(mixture.sample(jax.random.key(2), 1000, x))
    nearest = np.round(draws[:, 0] / 10).astype(int)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / 1000, weights, atol=0.002)
    assert np.any(np.diff(nearest) < 0)  # in random order
    for n in (1, 7, 50):  # other divisions into blocks
        nearest = np.round(np.asarray(mixture.sample(jax.random.key(n), n, x))[:, 0] / 10).astype(int)
        np.testing.assert_allclose(np.bincount(nearest, minlength=3), n * np.asarray(weights), atol=1)
    several = mixture.sample(jax.random.key(2), 7, jnp.zeros((5, 2)))
    assert several.shape == (7, 5, 2)
    log_prob = eqx.filter_jit(lambda m: m.log_prob(jnp.asarray(draws), x[None]))
    parts = np.stack([log_prob(m) for m in mixture.members])
    expected = np.log(weights[0] * np.exp(parts[0]) + weights[2] * np.exp(parts[2]))
    u_is_theta = np.asarray(mixture.prior.to_unconstrained(jnp.asarray(draws)))
    np.testing.assert_allclose(u_is_theta, draws, rtol=1e-6)
    np.testing.assert_allclose(mixture.log_prob(draws, x), expected, rtol=1e-4, atol=1e-4)


def test_files_without_weights_have_equal_ones(posterior):
    assert "weights" not in posterior.config
    np.testing.assert_allclose(posterior.weights, 1 / 3)
    u, x = jnp.zeros((4, 2)), jnp.ones((4, 2))
    mixture = eqx.filter_jit(mixture_log_prob)
    equal = mixture(posterior.members, u, x, jnp.full(3, 1 / 3))
    np.testing.assert_allclose(mixture(posterior.members, u, x), equal, rtol=1e-5)


def test_weights_survive_the_disk(rows, posterior, tmp_path):
    fitted = estimator(NPE, rows).fit(jax.random.key(1), members=2, max_epochs=5)  # by validation, the default
    assert fitted.config["weights"] == fitted.weights.tolist()
    assert fitted.weights.shape == (2,) and abs(fitted.weights.sum() - 1) < 1e-12
    for name, one in {"fitted": fitted, "changed": weighted(posterior, [0.1, 0.9, 0.0])}.items():
        one.save(tmp_path / name)
        loaded = load_posterior(tmp_path / name)
        np.testing.assert_array_equal(loaded.weights, one.weights)
        theta, x = jnp.ones((3, 2)), jnp.zeros(2)
        np.testing.assert_array_equal(loaded.log_prob(theta, x), one.log_prob(theta, x))


def test_a_likelihood_uses_the_weights(rows):
    fitted = estimator(NLE, rows).fit(jax.random.key(1), members=2, max_epochs=5, weighting="equal")
    theta, x = jnp.ones((3, 2)), jnp.zeros(2)
    only = type(fitted)(fitted.prior, fitted.members[1:], fitted.histories, fitted.config_json)
    chosen = type(fitted)(
        fitted.prior, fitted.members, fitted.histories, json.dumps(fitted.config | {"weights": [0.0, 1.0]})
    )
    np.testing.assert_allclose(chosen.log_likelihood(theta, x), only.log_likelihood(theta, x), rtol=1e-5)
    assert np.abs(np.asarray(chosen.log_likelihood(theta, x) - fitted.log_likelihood(theta, x))).max() > 1e-3


def test_contrasts_and_misspelt_weightings_are_refused(rows):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="Unknown weighting 'validated'.*Did you mean 'validation'"):
        estimator(NPE, rows).fit(key, weighting="validated")
    ratio = NRE(SIM, width=8, depth=1).append(rows.theta, rows.x)
    with pytest.raises(ValueError, match="the loss is a contrast"):
        ratio.fit(key, weighting="validation")
    proposal = gaussian_proposal(SIM.prior, rows.theta)
    atomic = NPE(SIM, correction="atomic").append(rows.theta, rows.x, proposal=proposal)
    with pytest.raises(ValueError, match="the loss is a contrast"):
        atomic.fit(key, weighting="validation")


def test_a_fit_without_a_finite_loss_is_refused():
    history = lambda first, best: types.SimpleNamespace(first_validation=first, best_epoch=best)  # noqa: E731
    check_fitted([history(np.nan, 0), history(1.0, 0)])
    check_fitted([history(np.inf, 3)])
    with pytest.raises(ValueError, match=r"before the first step it was nan, inf"):
        check_fitted([history(np.nan, 0), history(np.inf, 0)])
