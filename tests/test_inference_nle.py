"""Neural likelihood estimation against a likelihood and a posterior that are known."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from targets import gaussian

import diffsbi as ds
from diffsbi.diagnostics import sbc_ranks, sbc_test
from diffsbi.inference import load_posterior
from diffsbi.inference.losses import MeasuredScore, WeightedScore, likelihood_score, prior_score
from diffsbi.inference.nle import LikelihoodPosterior, _largest_rhat
from diffsbi.inference.standardise import fit_standardiser

SMALL = {"width": 8, "depth": 1, "layers": 1, "ramps": 4}


@pytest.fixture(scope="module")
def scored(linear):
    draws = linear.draw(jax.random.key(1), 60, latents="whitened")
    return (
        ds.NLE(linear, density_options=SMALL)
        .append(draws.theta, draws.x, draws.score)
        .fit(jax.random.key(2), members=2, max_epochs=600)
    )


def test_sixty_scored_simulations_give_the_exact_posterior(linear, scored):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    chains = scored.chains(jax.random.key(3), x, n_samples=400)
    mean, covariance = linear.posterior(x)
    width = np.sqrt(np.diag(covariance))
    summary = chains.summary().values()
    assert max(row.rhat for row in summary) < 1.02
    np.testing.assert_allclose((chains.flat().mean(0) - mean) / width, 0.0, atol=0.15)
    np.testing.assert_allclose(chains.flat().std(0) / width, 1.0, atol=0.1)


def test_log_likelihood_is_normalised_and_near_the_exact_one(linear, scored):
    draws = linear.draw(jax.random.key(5), 200, with_score=False)
    learned = scored.log_likelihood(draws.theta, draws.x)
    exact = jax.vmap(linear.log_likelihood)(draws.theta, draws.x)
    # The mean is a Kullback-Leibler divergence: not negative for anything that is normalised.
    assert -0.02 < float(jnp.mean(exact - learned)) < 0.15


def test_scores_need_fewer_simulations(linear):
    test = linear.draw(jax.random.key(6), 300, with_score=False)
    exact = jax.vmap(linear.log_likelihood)(test.theta, test.x)
    draws = linear.draw(jax.random.key(7), 20, latents="whitened")
    loss = {}
    for name, score in (("without", None), ("with", draws.score)):
        estimator = ds.NLE(linear, density_options=SMALL).append(draws.theta, draws.x, score)
        fitted = estimator.fit(jax.random.key(8), members=1, max_epochs=600)
        loss[name] = float(jnp.mean(exact - fitted.log_likelihood(test.theta, test.x)))
    assert loss["with"] < 0.7 * loss["without"]


@pytest.mark.parametrize("loss", [MeasuredScore, lambda along: WeightedScore(jnp.ones(2), along)])
def test_the_losses_score_is_the_derivative_in_the_condition_at_fixed_data(x64, linear, loss):
    """d/dc of log q(v(c) | c), by finite differences in the parameters."""
    draws = linear.draw(jax.random.key(1), 30)
    u, x = linear.prior.to_unconstrained(draws.theta), draws.x
    estimator = ds.NLE(linear)
    standardiser = fit_standardiser(x, u)
    c = standardiser.condition(u)

    class Density:
        def log_prob(self, v, c):
            return -0.5 * jnp.sum((v - 0.3 * v**2 - jnp.tanh(c @ jnp.ones((2, 4)))) ** 2, -1)

    batch = {"v": standardiser.to_standard(x, c), "c": c, "score": jnp.zeros_like(c)}
    _, residual = loss(estimator._along(standardiser)).value_and_residual(Density(), batch)
    step, numeric = 1e-5, []
    for i in range(2):
        move = step * jnp.eye(2)[i]
        ends = [
            Density().log_prob(standardiser.to_standard(x, e), e)
            for e in (c + jnp.broadcast_to(move, c.shape), c - jnp.broadcast_to(move, c.shape))
        ]
        numeric.append((ends[0] - ends[1]) / (2 * step))
    np.testing.assert_allclose(-residual, jnp.stack(numeric, -1), rtol=1e-6, atol=1e-7)


def test_the_exact_score_is_what_the_rows_are_given(x64):
    """The standardised target of a row is the derivative of the exact log-likelihood in its standardised parameters."""
    linear = ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2)
    draws = linear.draw(jax.random.key(1), 30, latents="whitened")
    estimator = ds.NLE(linear)
    u = linear.prior.to_unconstrained(draws.theta)
    standardiser = fit_standardiser(draws.x, u)
    of_likelihood = likelihood_score(linear.prior, draws.theta, draws.score)
    of_prior = prior_score(linear.prior, draws.theta)
    target = estimator._standard_score(standardiser, estimator._target_score(of_likelihood, of_prior))

    def exact(c, x):
        u = jnp.linalg.solve(standardiser.whiten, c) + standardiser.x_loc
        return linear.log_likelihood(linear.prior.from_unconstrained(u), x)

    expected = jax.vmap(jax.grad(exact))(standardiser.condition(u), draws.x)
    np.testing.assert_allclose(target, expected, rtol=1e-8, atol=1e-9)


def test_one_observation_and_the_unnormalised_density(linear, scored):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    theta = scored.condition(x).sample(jax.random.key(0), 7)
    assert theta.shape == (7, 2)
    value = scored.log_prob(theta, x)
    expected = linear.prior.log_prob(theta) + scored.log_likelihood(theta, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("sampler", ["nuts", "hmc"])
def test_many_observations_at_once_are_calibrated(linear, scored, sampler):
    """The posterior of each row is that of its own data: shuffled rows fail at once."""
    truth = linear.draw(jax.random.key(10), 100, with_score=False)
    settings = dict(sampler=sampler, n_warmup=60, n_chains=2)
    theta = scored.sample(jax.random.key(0), 60, truth.x.reshape(4, 25, 4), **settings)
    assert theta.shape == (60, 4, 25, 2)
    theta = np.asarray(theta).reshape(60, 100, 2)
    means, _ = jax.vmap(linear.posterior)(truth.x)
    width = np.sqrt(np.diag(linear.posterior(truth.x[0])[1]))
    z = (theta.mean(0) - np.asarray(means)) / width
    assert np.sqrt(np.mean(z**2)) < 0.3  # sixty draws, and the fit's own error
    ranks = sbc_ranks(theta.swapaxes(0, 1), truth.theta)
    assert sbc_test(ranks, 60).min() > 1e-3
    shuffled = sbc_ranks(np.roll(theta.swapaxes(0, 1), 1, axis=0), truth.theta)
    assert sbc_test(shuffled, 60).min() < 1e-3


def test_both_samplers_give_the_posterior_of_one_observation(linear, scored):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    found = {name: scored.chains(jax.random.key(0), x, n_samples=1000, sampler=name) for name in ("nuts", "hmc")}
    mean, covariance = (np.asarray(a) for a in linear.posterior(x))
    width = np.sqrt(np.diag(covariance))
    tables = [list(chains.summary().values()) for chains in found.values()]
    for rows in tables:
        assert all(row.rhat < 1.01 for row in rows)
        np.testing.assert_allclose([row.mean for row in rows], mean, atol=0.2 * width.max())
        np.testing.assert_allclose([row.sd for row in rows] / width, 1.0, atol=0.12)
    # The same density: means agree to their Monte Carlo errors.
    for one, other in zip(*tables, strict=True):
        assert abs(one.mean - other.mean) < 4 * one.sd * np.sqrt(1 / one.ess_bulk + 1 / other.ess_bulk)


def test_outside_the_prior_the_posterior_is_zero():
    sim = ds.lotka_volterra()
    draws = sim.draw(jax.random.key(0), 12, with_score=False)
    x = jnp.log(draws.x.reshape(12, -1))[:, :3]
    fitted = ds.NLE(sim, gaussian).append(draws.theta, x).fit(jax.random.key(1), members=1, max_epochs=1)
    assert fitted.log_prob(-draws.theta[:1], x[:1])[0] == -jnp.inf
    assert np.isfinite(jax.jit(jax.grad(lambda t: fitted.log_prob(t, x[0])))(-draws.theta[0])).all()


def test_round_trip(linear, scored, tmp_path):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    scored.condition(x).save(tmp_path / "likelihood")
    back = load_posterior(tmp_path / "likelihood")
    theta = linear.prior.sample(jax.random.key(4), (5,))
    np.testing.assert_array_equal(back.log_prob(theta), scored.log_prob(theta, x))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p.sample(jax.random.key(0), 0), "Expected n >= 1 draws; got 0"),
        (lambda p: p.sample(jax.random.key(0), 5, jnp.zeros(4), sampler="hcm"), "Unknown sampler 'hcm'.*nuts"),
        (lambda p: p.sample(jax.random.key(0), 5), "Expected data x="),
        (lambda p: p.chains(jax.random.key(0), jnp.zeros((2, 4)), until_ess=10), "Expected no until_ess"),
        (lambda p: p.log_prob(jnp.zeros(2), jnp.zeros(3)), "3"),
        (lambda p: p.condition(jnp.full(4, jnp.nan)), "x"),
    ],
)
def test_refusals(scored, call, message):
    with pytest.raises(ValueError, match=message):
        call(scored)


class Width(eqx.Module):
    u_loc: Any


class Squared(eqx.Module):
    """Says that x is (theta_1 squared, theta_2) and noise: what is known of theta_1 has two modes."""

    standardiser: Width

    def log_prob(self, x, u):
        mean = jnp.stack([u[..., 0] ** 2, u[..., 1]], -1)
        return -0.5 * jnp.sum(((x - mean) / 0.1) ** 2, -1)


@pytest.mark.parametrize("seed", range(3))
def test_modes_have_their_shares_from_four_chains(seed):
    prior = ds.Prior({"a": dist.Normal(0.4, 1.0), "b": dist.Normal(0.0, 1.0)})
    member = Squared(Width(jnp.zeros(2)))
    posterior = LikelihoodPosterior(prior, (member,), (), "{}", jnp.asarray([1.5, 0.3]))
    with pytest.warns(UserWarning, match="chains of 1 of 1 rows of x are not in one place"):
        theta = posterior.sample(jax.random.key(seed), 400)
    exact = 1 / (1 + np.exp(-2 * 0.4 * np.sqrt(1.5)))  # .73, but for the modes' own curvature
    assert abs(np.mean(theta[:, 0] > 0) - exact) < 0.15
    np.testing.assert_allclose(np.abs(theta[:, 0]).mean(), np.sqrt(1.5), atol=0.02)


def test_chains_of_one_mode_are_not_called_apart():
    rng = np.random.default_rng(0)
    together = rng.normal(size=(2, 4, 100, 3))
    apart = together + np.array([0.0, 3.0])[:, None, None, None] * np.arange(4)[:, None, None]
    assert (_largest_rhat(together) < 1.1).all()
    assert (_largest_rhat(apart) > 1.3).tolist() == [False, True]
    assert _largest_rhat(together[:, :1]).tolist() == [1.0, 1.0]
