"""Proposals other than the prior: their densities, and posteriors that are the prior's all the same."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import multivariate_normal
from targets import gaussian, linear_gaussian_density

import diffsbi as ds
from diffsbi.inference import load_posterior
from diffsbi.inference.losses import prior_score
from diffsbi.inference.proposals import GaussianProposal, Proposals

SMALL = {"width": 8, "depth": 1, "layers": 1}


def shifted(linear, observed):
    """A proposal a width away from the posterior and 1.6 times as wide."""
    mean, covariance = linear.posterior(observed)
    root = jnp.linalg.cholesky(covariance)
    return GaussianProposal(linear.prior, mean + root @ jnp.asarray([1.0, -0.5]), 1.6 * root)


def estimator(linear, observed, correction, n=150):
    drawn_from = shifted(linear, observed)
    theta = drawn_from.sample(jax.random.key(1), (n,))
    draws = linear.draw(jax.random.key(2), n, theta, latents="whitened")
    fitted = ds.NPE(linear, gaussian, correction=correction)
    return fitted.append(draws.theta, draws.x, draws.score, proposal=drawn_from)


def distance(linear, observed, posterior, n=4000):
    """Largest error of a mean, in widths, and largest relative error of a width."""
    mean, covariance = linear.posterior(observed)
    draws, width = np.asarray(posterior.sample(jax.random.key(3), n, observed)), np.sqrt(np.diag(covariance))
    return np.abs((draws.mean(0) - mean) / width).max(), np.abs(draws.std(0) / width - 1).max()


def test_the_gaussian_proposal_has_the_moments_of_its_draws_and_is_wider():
    prior = ds.Prior({"a": dist.Normal(0.0, 2.0), "b": dist.Normal(1.0, 3.0)})
    draws = np.random.default_rng(0).multivariate_normal([0.5, 1.0], [[1.0, 0.6], [0.6, 2.0]], 400)
    proposal = ds.gaussian_proposal(prior, draws, widen=1.5)
    exact = multivariate_normal(draws.mean(0), 1.5**2 * np.cov(draws.T))
    np.testing.assert_allclose(proposal.log_prob(jnp.asarray(draws[:5])), exact.logpdf(draws[:5]), rtol=2e-5)
    sampled = np.asarray(proposal.sample(jax.random.key(0), (20_000,)))
    np.testing.assert_allclose(np.cov(sampled.T), 1.5**2 * np.cov(draws.T), rtol=0.05)
    single = proposal.log_prob(jnp.asarray(draws[0]))
    assert single.shape == () and np.isclose(single, exact.logpdf(draws[0]), rtol=2e-5)


def test_a_step_along_a_parameter_takes_the_others_with_it(x64):
    prior = ds.Prior({"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    draws = np.random.default_rng(0).multivariate_normal([0.1, -0.3], [[0.5, 0.3], [0.3, 0.4]], 500)
    proposal = ds.gaussian_proposal(prior, draws, widen=1.5)
    covariance = 1.5**2 * np.cov(draws.T)
    np.testing.assert_allclose(proposal.along("b", 2.0), 2 * covariance[:, 1] / np.sqrt(covariance[1, 1]), rtol=1e-3)
    with pytest.raises(ValueError, match="'c'"):
        proposal.along("c")


def test_the_gaussian_proposal_is_normalised_within_bounds(x64):
    prior = ds.Prior({"a": dist.Uniform(-2.0, -0.3)})
    draws = prior.sample(jax.random.key(0), (200,))
    proposal = ds.gaussian_proposal(prior, draws, widen=1.0)
    grid = jnp.linspace(-2, -0.3, 20_001)[1:-1]
    assert np.isclose(np.trapezoid(np.exp(proposal.log_prob(grid[:, None])), grid), 1.0, atol=1e-3)
    assert prior.in_support(proposal.sample(jax.random.key(1), (1000,))).all()


def test_the_mixture_of_rounds_and_its_gradient(linear, observed, x64):
    linear = ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2)
    one = GaussianProposal(linear.prior, jnp.asarray([0.3, -0.2]), jnp.asarray([[0.5, 0.0], [0.2, 0.4]]))
    mixture = Proposals(linear.prior, (None, one), (0.25, 0.75))
    theta = jnp.asarray([[0.1, 0.2], [0.6, -0.4], [2.0, 1.0]])
    prior, other = np.exp(linear.prior.log_prob(theta)), np.exp(one.log_prob(theta))
    np.testing.assert_allclose(np.exp(mixture.log_ratio(theta)), (0.25 * prior + 0.75 * other) / prior, rtol=1e-10)
    log_density = lambda t: np.log(0.25 * np.exp(linear.prior.log_prob(t)) + 0.75 * np.exp(one.log_prob(t)))  # noqa: E731
    steps = [np.broadcast_to(e, (3, 2)) for e in 1e-6 * np.eye(2)]
    numeric = [(log_density(theta + e) - log_density(theta - e)) / 2e-6 for e in steps]
    np.testing.assert_allclose(mixture.score(theta), np.stack(numeric, -1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("correction", ["reweight", "atomic", "importance"])
def test_the_posterior_is_the_priors_wherever_parameters_were_drawn(linear, observed, correction):
    fitted = estimator(linear, observed, correction).fit(jax.random.key(0), members=1, max_epochs=400)
    mean, width = distance(linear, observed, fitted)
    assert mean < 0.15 and width < 0.15


@pytest.mark.filterwarnings("ignore:Importance weights")
@pytest.mark.parametrize(
    "correction, mean, width",
    [("reweight", (0.0, 0.1), (0.0, 0.1)), ("atomic", (0.0, 0.1), (0.0, 0.1)), ("importance", (0.0, 0.2), (0.0, 0.2))]
    + [(None, (0.35, 0.65), (0.2, 0.4))],
)
def test_corrections_without_scores(linear, observed, correction, mean, width):
    """Scores alone would say where the posterior is: here the correction has to, and without one (None) it is seen."""
    drawn_from, n = shifted(linear, observed), 1500
    draws = linear.draw(jax.random.key(2), n, drawn_from.sample(jax.random.key(1), (n,)), with_score=False)
    fitted = ds.NPE(linear, linear_gaussian_density, correction=correction or "reweight")
    fitted.append(draws.theta, draws.x, proposal=None if correction is None else drawn_from)
    found = distance(linear, observed, fitted.fit(jax.random.key(0), members=1, max_epochs=150, learning_rate=1e-2))
    assert all(low <= value < high for value, (low, high) in zip(found, (mean, width), strict=True)), found


def test_more_draws_than_there_are_where_simulations_were_are_refused(linear, observed):
    posterior = estimator(linear, observed, "reweight", n=60).fit(jax.random.key(0), members=1, max_epochs=5)
    with pytest.warns(UserWarning, match="far outside the simulations"), pytest.warns(UserWarning, match="worth 0 of"):
        with pytest.raises(ValueError, match="Expected n=100 draws where simulations were; 0 of"):
            posterior.sample(jax.random.key(1), 100, observed + 100.0)


def test_a_proposal_that_is_not_told_of_shifts_the_posterior(linear, observed):
    mean, covariance = linear.posterior(observed)
    root = jnp.linalg.cholesky(covariance)
    drawn_from = GaussianProposal(linear.prior, mean + root @ jnp.asarray([2.0, -1.0]), root)
    theta = drawn_from.sample(jax.random.key(1), (150,))
    draws = linear.draw(jax.random.key(2), 150, theta, with_score=False)
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x)
    shift, _ = distance(linear, observed, fitted.fit(jax.random.key(0), members=1))
    assert shift > 0.5


def test_a_likelihood_does_not_care(linear, observed):
    drawn_from = shifted(linear, observed)
    draws = linear.draw(jax.random.key(2), 80, drawn_from.sample(jax.random.key(1), (80,)), latents="whitened")
    fitted = ds.NLE(linear, gaussian).append(draws.theta, draws.x, draws.score, proposal=drawn_from)
    mean, width = distance(linear, observed, fitted.fit(jax.random.key(0), members=1, max_epochs=300), 1500)
    assert mean < 0.15 and width < 0.15


def test_the_score_term_needs_no_correction(linear, observed):
    """Whitened scores of this simulator are exact: what the rows are given is the gradient of the posterior's log."""
    fitted = estimator(linear, observed, "atomic", n=20)
    theta, x = fitted._rows[0][0], fitted._rows[0][1]

    def exact(theta, x, extra):
        mean, covariance = linear.posterior(x)
        return -jnp.linalg.solve(covariance, theta - mean) + extra

    none = jnp.zeros(2)
    under_prior = [exact(t, d, none) for t, d in zip(theta, x, strict=True)]
    np.testing.assert_allclose(fitted._unconstrained_rows().columns["score"], under_prior, rtol=2e-3, atol=2e-3)
    reweighted = estimator(linear, observed, "reweight", n=20)
    proposal = Proposals(linear.prior, (shifted(linear, observed),), (1.0,))
    swap = proposal.score(jnp.asarray(theta)) - prior_score(linear.prior, jnp.asarray(theta))
    under_proposal = [exact(t, d, s) for t, d, s in zip(theta, x, swap, strict=True)]
    np.testing.assert_allclose(reweighted._unconstrained_rows().columns["score"], under_proposal, rtol=2e-3, atol=2e-3)


def test_reweighted_draws_are_distinct_and_many_data_have_their_own(linear, observed):
    posterior = estimator(linear, observed, "reweight", n=60).fit(jax.random.key(0), members=1, max_epochs=5)
    draws = np.asarray(posterior.sample(jax.random.key(1), 3000, observed))
    assert draws.shape == (3000, 2) and len(np.unique(draws, axis=0)) == 3000
    two = posterior.sample(jax.random.key(1), 10, jnp.stack([observed, observed + 1.0]))
    assert two.shape == (10, 2, 2)
    outside = ds.Prior({"a": dist.Uniform(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    proposal = ds.gaussian_proposal(outside, outside.sample(jax.random.key(0), (50,)))
    theta = proposal.sample(jax.random.key(1), (50,))
    fitted = ds.NPE(outside, gaussian).append(theta, theta, proposal=proposal)
    value = fitted.fit(jax.random.key(0), members=1, max_epochs=2).log_prob(
        jnp.asarray([[2.0, 0.0], [0.5, 0.0]]), theta[0]
    )
    assert np.isneginf(value[0]) and np.isfinite(value[1])


def test_a_reweighted_posterior_ends_where_the_simulations_do(linear, observed):
    """Beyond them the fit is a guess, and the weight p/p~ grows without bound: one such draw would decide."""
    posterior = estimator(linear, observed, "reweight", n=60).fit(jax.random.key(0), members=1, max_epochs=2)
    proposal = shifted(linear, observed)
    theta = proposal.sample(jax.random.key(1), (60,))
    np.testing.assert_allclose(posterior.proposals.floor, proposal.log_prob(theta).min(), rtol=1e-5)
    draws = posterior.sample(jax.random.key(2), 2000, observed)
    assert proposal.log_prob(draws).min() >= posterior.proposals.floor - 1e-4
    # Under the proposal there is nothing to reweight: the two differ by its density, where it is known.
    under = posterior.under_proposal().log_prob(draws[:50], observed) - posterior.log_prob(draws[:50], observed)
    ratio = proposal.log_prob(draws[:50]) - linear.prior.log_prob(draws[:50])
    np.testing.assert_allclose(under, ratio, rtol=1e-4, atol=1e-4)
    far = proposal.loc + proposal.root @ jnp.asarray([20.0, 0.0])
    assert np.isneginf(posterior.log_prob(far, observed))
    assert np.isfinite(posterior.log_prob(proposal.loc, observed))
    fitted = posterior.under_proposal().sample(jax.random.key(3), 20_000, observed)
    beyond = float(np.mean(proposal.log_prob(fitted) < posterior.proposals.floor))
    leakage = posterior.leakage(jax.random.key(4), jnp.stack([observed, observed]))
    assert leakage.shape == (2,) and 0 < beyond < 0.5
    np.testing.assert_allclose(leakage, beyond, atol=5 * np.sqrt(2 * beyond / 20_000))


def test_a_proposal_that_misses_the_posterior_is_warned_about(linear, observed):
    mean, covariance = linear.posterior(observed)
    far = GaussianProposal(
        linear.prior, mean + 8 * jnp.sqrt(jnp.diag(covariance)), 0.2 * jnp.linalg.cholesky(covariance)
    )
    theta = far.sample(jax.random.key(1), (60,))
    draws = linear.draw(jax.random.key(2), 60, theta, with_score=False)
    posterior = ds.NPE(linear, gaussian).append(draws.theta, draws.x, proposal=far)
    fitted = posterior.fit(jax.random.key(0), members=1, max_epochs=5)
    with pytest.warns(UserWarning, match="under the proposal are worth"):
        fitted.sample(jax.random.key(1), 10_000, observed)
    weighted = ds.NPE(linear, gaussian, correction="importance")
    weighted.append(draws.theta, draws.x, proposal=far)
    with pytest.warns(UserWarning, match="Importance weights leave"):
        weighted.fit(jax.random.key(0), members=1, max_epochs=1)


def test_saved_and_loaded(linear, observed, tmp_path):
    draws = linear.draw(jax.random.key(7), 20, latents="whitened")
    estimate = ds.NPE(linear, "coupling", density_options=SMALL)
    estimate.append(draws.theta, draws.x, draws.score, proposal=shifted(linear, observed))
    posterior = estimate.append(draws.theta, draws.x, draws.score).fit(jax.random.key(0), members=1, max_epochs=2)
    posterior.save(tmp_path / "a.posterior")
    loaded = load_posterior(tmp_path / "a.posterior")
    np.testing.assert_array_equal(
        loaded.sample(jax.random.key(1), 9, observed), posterior.sample(jax.random.key(1), 9, observed)
    )

    class Own:
        def log_prob(self, theta):
            return linear.prior.log_prob(theta)

    own = ds.NPE(linear, "coupling", density_options=SMALL).append(draws.theta, draws.x, proposal=Own())
    with pytest.raises(ValueError, match="gaussian_proposal, or the prior, to save; got a Own"):
        own.fit(jax.random.key(0), members=1, max_epochs=1).save(tmp_path / "b.posterior")


def test_bad_input_is_named(linear, observed):
    theta = linear.prior.sample(jax.random.key(0), (30,))
    with pytest.raises(ValueError, match="widen > 0; got -1"):
        ds.gaussian_proposal(linear, theta, widen=-1)
    with pytest.raises(ValueError, match=r"at least 4 draws, \(n, 2\); got \(3, 2\)"):
        ds.gaussian_proposal(linear, theta[:3])
    with pytest.raises(ValueError, match="proposal with log_prob"):
        ds.NPE(linear).append(theta, theta, proposal="posterior")
    with pytest.raises(ValueError, match="Unknown correction 'none'"):
        ds.NPE(linear, correction="none")
    with pytest.raises(ValueError, match="n_atoms >= 2; got 1"):
        ds.NPE(linear, n_atoms=1)
    with pytest.raises(ValueError, match="truncated rounds"):
        estimator(linear, observed, "reweight").restricted(lambda t: np.ones(len(t), bool))


@pytest.mark.parametrize(
    "log_prob, message",
    [
        (lambda theta: np.asarray(theta).sum(-1), "log_prob is a JAX function"),
        (lambda theta: theta, r"-> \(n,\); got \(2, 2\) for n = 2"),
    ],
)
def test_a_density_that_is_none_is_refused_as_a_proposal(linear, log_prob, message):
    with pytest.raises(ValueError, match=message):
        ds.NPE(linear).append(np.zeros((20, 2)), np.zeros((20, 4)), proposal=types.SimpleNamespace(log_prob=log_prob))


def test_a_density_up_to_a_constant_is_refused_as_a_proposal(linear, observed):
    """Next to rows from elsewhere the constant counts."""
    draws = linear.draw(jax.random.key(0), 40, with_score=False)
    rows = draws.theta, draws.x
    fits = {
        kind: kind(linear, gaussian).append(*rows).fit(jax.random.key(1), members=1, max_epochs=1)
        for kind in (ds.NLE, ds.NPE)
    }
    with pytest.raises(ValueError, match="normalised; that of a LikelihoodPosterior"):
        ds.NPE(linear).append(*rows, proposal=fits[ds.NLE].condition(observed))
    ds.NPE(linear).append(*rows, proposal=fits[ds.NPE].condition(observed))
    with pytest.raises(ValueError, match="from .condition"):
        ds.NPE(linear).append(*rows, proposal=fits[ds.NPE])
