"""Sequential rounds: the exact posterior from few simulations, proposals that stay where they must, clear ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import gaussian

import diffsbi as ds
from diffsbi.inference.posterior import truncated_prior

FLOW = ("smooth", {"width": 16, "depth": 1, "layers": 1, "ramps": 4})
FIT = {"members": 1, "max_epochs": 250}


@pytest.mark.parametrize(
    "estimator, density, options",
    [
        (ds.NPE, gaussian, None),
        pytest.param(ds.NPE, *FLOW, marks=pytest.mark.slow),
        pytest.param(ds.NLE, *FLOW, marks=pytest.mark.slow),
    ],
)
def test_rounds_end_at_the_exact_posterior(linear, observed, estimator, density, options):
    result = ds.rounds(
        linear, observed, estimator(linear, density, density_options=options), jax.random.key(1),
        n_rounds=2, n_per_round=80, tolerance=1e-9, fit=FIT,
    )  # fmt: skip
    mean, covariance = linear.posterior(observed)
    width = np.sqrt(np.diag(covariance))
    draws = result.samples[-1]
    np.testing.assert_allclose((draws.mean(0) - mean) / width, 0.0, atol=0.2)
    np.testing.assert_allclose(draws.std(0) / width, 1.0, atol=0.12)
    assert result.simulations == 160 and result.samples.shape == (2, 2000, 2) and len(result.moved) == 1
    assert result.stop_reason == "n_rounds reached"


def test_rounds_stop_when_the_posterior_rests_and_keep_the_estimator(linear, observed):
    start = ds.NPE(linear, gaussian)
    draws = linear.draw(jax.random.key(3), 80, latents="whitened")
    start.append(draws.theta, draws.x, draws.score)
    result = ds.rounds(linear, observed, start, jax.random.key(1), n_rounds=5, n_per_round=40, tolerance=0.5, fit=FIT)
    assert len(start) == 80
    assert result.simulations == 40 and result.stop_reason.startswith("moved by 0.")
    assert result.moved[-1] < 0.5


def test_a_posterior_proposes_the_prior_within_its_region(linear, observed):
    draws = linear.draw(jax.random.key(3), 100, latents="whitened")
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x, draws.score)
    posterior = fitted.fit(jax.random.key(0), **FIT).condition(observed)
    theta, inside = posterior.propose(jax.random.key(5), 500)
    assert inside(theta).all()
    assert abs(inside(posterior.sample(jax.random.key(6), 20_000)).mean() - (1 - 1e-4)) < 4e-4
    # Within the region the proposal is the prior: the ratio of densities is the same everywhere in it.
    mean, covariance = linear.posterior(observed)
    theta, mean, root = (np.asarray(a) for a in (theta, mean, np.linalg.cholesky(covariance)))
    near = np.linalg.norm(np.linalg.solve(root, (theta - mean).T), axis=0)
    prior = np.asarray(linear.prior.sample(jax.random.key(7), (20_000,)))
    prior = prior[inside(prior)]
    expected = np.linalg.norm(np.linalg.solve(root, (prior - mean).T), axis=0)
    error = np.sqrt(0.25 / len(near) + 0.25 / len(expected))
    assert abs(np.mean(near < np.median(expected)) - 0.5) < 4 * error
    kept = fitted.restricted(inside)
    assert 0 < len(kept) < len(fitted) == 100 and inside(kept._rows[0][0]).all()


def test_a_region_with_little_prior_is_told(linear, observed):
    draws = linear.draw(jax.random.key(3), 30, latents="whitened")
    posterior = ds.NPE(linear, gaussian).append(draws.theta, draws.x).fit(jax.random.key(0), max_epochs=1)
    with pytest.raises(ValueError, match="Expected 90000 draws of the prior within the posterior's region; 20000 cand"):
        truncated_prior(posterior, jax.random.key(5), 90_000, observed, most_candidates=20_000)


@pytest.mark.parametrize("wrong", [{"n_rounds": 0}, {"n_per_round": 0}, {"tolerance": 0.0}])
def test_refusals(linear, observed, wrong):
    with pytest.raises(ValueError, match="Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0"):
        ds.rounds(linear, observed, ds.NPE(linear), jax.random.key(0), **wrong)


def test_the_summary_is_applied_to_simulations_and_observation(linear, observed):
    result = ds.rounds(
        linear, observed, ds.NPE(linear, gaussian), jax.random.key(1),
        n_rounds=1, n_per_round=30, summary=lambda x: x[:2], with_score=False, fit=FIT | {"max_epochs": 1},
    )  # fmt: skip
    np.testing.assert_array_equal(result.posterior.default_x, jnp.asarray(observed[:2]))
    assert result.moved == ()
