"""The information of the data themselves: against closed forms, in several coordinates, with its errors."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsbi as ds
from diffsbi.compression import marginal_information
from diffsbi.compression.marginal_information import _from_scores


@pytest.fixture(scope="module")
def sim():
    return ds.linear_gaussian(dim=2, n_latents=3, n_data=6)


def exact(sim):
    return np.asarray(sim.design.T @ jnp.linalg.solve(sim.covariance, sim.design), float)


@pytest.mark.parametrize("latents", ["white", "whitened"])
def test_it_is_the_exact_one_in_every_coordinate(sim, latents):
    found = marginal_information(sim, jax.random.key(0), n=3000, latents=latents)
    fisher = exact(sim)
    assert (np.abs(found.fisher - fisher) < 4 * found.error).all()
    assert abs(found.log_det - np.linalg.slogdet(fisher)[1]) < 4 * found.log_det_error
    # The error is at least that of a covariance of 3000 draws, and the noise of the scores adds little.
    least = np.sqrt(2 / 3000)
    ratio = np.diag(found.error / fisher) / least
    assert (ratio > 0.5).all() and (ratio < 2.5).all()


def test_products_at_short_lags_have_the_noise_of_the_score(sim):
    """A known-wrong answer: without the gap the noise counts as information; where there is no noise all lags agree."""
    white = marginal_information(sim, jax.random.key(1), n=2000, latents="white")
    quiet = marginal_information(sim, jax.random.key(1), n=2000, latents="whitened")
    fisher = exact(sim)
    for a in range(2):
        assert white.lags[0, a, a] - fisher[a, a] > 8 * white.error[a, a]
        np.testing.assert_allclose(quiet.lags[:, a, a], quiet.lags[0, a, a], rtol=0.01)
    assert white.lags.shape == (16, 2, 2) and white.gradients > quiet.gradients


def test_a_chain_that_forgets_slowly_is_told_of(sim):
    with pytest.warns(UserWarning, match="raise gap and n_average"):
        marginal_information(sim, jax.random.key(2), n=1000, gap=1, latents="white")
    with pytest.warns(UserWarning, match="accepted 0% of their turns"):
        marginal_information(sim, jax.random.key(2), n=100, n_steps=1, latents="white")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marginal_information(sim, jax.random.key(2), n=400, n_average=9, latents="whitened")


def test_the_errors_are_those_of_repetitions(sim):
    found = [marginal_information(sim, jax.random.key(k), n=200, latents="whitened") for k in range(24)]
    spread = np.std([f.log_det for f in found], ddof=1)
    assert 0.6 < np.mean([f.log_det_error for f in found]) / spread < 1.6
    assert abs(np.mean([f.log_det for f in found]) - np.linalg.slogdet(exact(sim))[1]) < 4 * spread / np.sqrt(24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(n=10), "n >= 20"),
        (dict(gap=16), "gap < n_average"),
        (dict(gap=0), "gap < n_average"),
        (dict(n_steps=0), "n_steps >= 1"),
        (dict(theta0=[0.0]), "theta0 with trailing shape"),
        (dict(theta0=[0.0, np.nan]), "inside the prior"),
        (dict(latents="whitend"), "Did you mean 'whitened'"),
    ],
)
def test_bad_input_is_refused(sim, change, message):
    with pytest.raises(ValueError, match=message):
        marginal_information(sim, jax.random.key(0), **change)


def test_scores_that_are_not_finite_are_counted(sim):
    broken = eqx.tree_at(lambda s: s.design, sim, sim.design.at[0, 0].set(jnp.nan))
    with pytest.raises(RuntimeError, match="not finite in 20 of 20 simulations"):
        marginal_information(broken, jax.random.key(0), n=20, n_steps=1, latents="white")


def test_an_estimate_that_is_not_positive_has_no_determinant():
    """Scores of alternating sign: at odd lags their products are negative."""
    signs = np.array([1.0, -1.0, 1.0, -1.0])[:, None]
    scores = np.random.default_rng(0).standard_normal((40, 1, 1)) * signs
    found = _from_scores(scores, 3, 1.0, 1)
    assert found.fisher[0, 0] < 0 and found.log_det == -np.inf and found.log_det_error == np.inf
