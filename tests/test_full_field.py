"""The full-field sampler against posteriors known in closed form, and the Gaussian-field likelihood that starts it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from one_theta import draws_at, scores_at

import diffsbi as ds
from diffsbi.sampling.full_field import FullFieldTarget
from diffsbi.sampling.gaussian_field import approximate_posterior, scoring_step


@pytest.fixture(scope="module")
def drawn():
    """A Gaussian field: its latents integrate out exactly. With 1000 draws."""
    with jax.enable_x64(True):
        sim = ds.lsst_y10(n_pix=8, side_deg=4.0, n_bins=2, sigma_e=0.02, field="gaussian")
        return sim, *draws_at(sim, sim.fiducial, jax.random.key(3), 1000)


@pytest.fixture
def gaussian(x64, drawn):
    sim, _, x = drawn
    return sim, sim.fiducial, x[0]


@pytest.mark.parametrize("latents", ["white", "whitened"])
def test_linear_gaussian_posterior_is_the_exact_one(x64, latents):
    sim = ds.linear_gaussian()
    x = sim.draw(jax.random.key(1), 1).x[0]
    chains = ds.full_field_posterior(sim, x, jax.random.key(2), latents=latents, n_warmup=300, n_samples=1500)
    mean, covariance = map(np.asarray, sim.posterior(x))
    for i, row in enumerate(chains.summary().values()):
        assert row.rhat < 1.01
        sd = np.sqrt(covariance[i, i])
        assert abs(row.mean - mean[i]) < 4 * sd / np.sqrt(row.ess_bulk)
        assert abs(row.sd / sd - 1) < 4 / np.sqrt(2 * row.ess_tail)


def test_marginal_score_and_likelihood_of_a_gaussian_field(gaussian, drawn):
    """The scoring step's score is the slope of its likelihood, and the whitened joint score but for the k = 0 mode."""
    sim, theta, x = gaussian
    x = x - x.mean((1, 2), keepdims=True)
    score, fisher, _ = scoring_step(sim, x, theta)
    for i in range(6):
        h = 1e-4 * abs(float(theta[i]))
        up, down = (float(scoring_step(sim, x, theta.at[i].add(s * h))[2]) for s in (1, -1))
        np.testing.assert_allclose(score[i], (up - down) / (2 * h), rtol=1e-5, atol=1e-5)
    _, z, many = drawn
    joint = np.asarray(
        scores_at(sim, theta, jnp.concatenate([0 * z[:1], z]), jnp.concatenate([x[None], many]), "whitened")
    )
    np.testing.assert_allclose(score, joint[0], rtol=1e-8)
    scatter = np.cov(joint[1:].T)
    np.testing.assert_allclose(scatter / np.sqrt(np.outer(*[np.diag(fisher)] * 2)), _correlation(fisher), atol=0.15)


def _correlation(matrix):
    scale = np.sqrt(np.diag(matrix))
    return np.asarray(matrix) / np.outer(scale, scale)


def test_the_start_is_near_the_posteriors_peak(gaussian):
    sim, _, x = gaussian
    centre, root = map(jnp.asarray, approximate_posterior(sim, x))
    target = FullFieldTarget(sim, x, centre, root, "whitened")
    latents = jnp.zeros(x.shape)  # a Gaussian field's whitened joint depends on theta the same at any of them
    slope = jax.jit(jax.grad(lambda v: target({"v": v, "xi": latents})))(jnp.zeros(6))
    assert np.abs(slope).max() < 1.0  # in units of the posterior's width; the prior's shape is not part of the fit


def test_bad_observations_are_refused():
    sim = ds.linear_gaussian()
    with pytest.raises(ValueError, match="Expected an observation with shape"):
        ds.full_field_posterior(sim, jnp.zeros(3), jax.random.key(0))
    with pytest.raises(ValueError, match="finite observation"):
        ds.full_field_posterior(sim, jnp.full(6, jnp.nan), jax.random.key(0))
    with pytest.raises(ValueError, match="Unknown latent coordinate"):
        ds.full_field_posterior(sim, jnp.zeros(6), jax.random.key(0), latents="wite")


@pytest.mark.slow
def test_the_demo_survey_converges_and_covers_its_truth():
    sim = ds.lsst_y10(n_pix=64, side_deg=5.0)
    x = sim.draw(jax.random.key(4), 1, sim.fiducial, with_score=False).x[0]
    chains = ds.full_field_posterior(sim, x, jax.random.key(5), n_warmup=150, n_samples=400)
    for value, row in zip(sim.fiducial, chains.summary().values(), strict=True):
        assert row.rhat < 1.01 and row.ess_bulk > 400
        assert abs(row.mean - float(value)) < 3 * row.sd
    assert max(chains.gradients_per_effective_sample().values()) < 120


class Cliff(ds.AbstractSimulator):
    """No density where theta > 0.3, as spectra far out in a prior."""

    prior: ds.Prior = ds.Prior({"a": dist.Normal(0.0, 1.0)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(jnp.where(theta[0] > 0.3, jnp.nan, theta[0]) + z, 0.5).to_event(1)


def test_starts_without_a_density_move_inwards(x64):
    settings = dict(n_chains=8, n_warmup=20, n_samples=10)
    chains = ds.full_field_posterior(Cliff(), jnp.array([-0.5, -0.4]), jax.random.key(0), **settings)
    start = Cliff().prior.sample(jax.random.key(0), (4000,))
    assert (start > 0.3).mean() > 0.3  # so some of eight starts are bad
    assert chains.theta.max() <= 0.3 and chains.theta.shape == (8, 10, 1)


def test_the_signal_is_the_noiseless_map_and_its_moments_are_kept(x64):
    sim = ds.linear_gaussian()
    x = sim.draw(jax.random.key(1), 1).x[0]
    chains = ds.full_field_posterior(sim, x, jax.random.key(2), maps=True, n_samples=1000)
    mean, covariance = map(np.asarray, sim.posterior(x))
    # E[x | theta, z] has the posterior mean of A theta + B z: data minus noise, N(0, Sigma + A S A^T) conditioned on x.
    prior = np.diag(np.asarray(sim.scale) ** 2)
    signal = np.asarray(sim.design @ prior @ sim.design.T + sim.mixing @ sim.mixing.T)
    gain = signal @ np.linalg.inv(signal + sim.noise**2 * np.eye(len(x)))
    centre = np.asarray(sim.design @ sim.loc)
    expected, spread = centre + gain @ (np.asarray(x) - centre), np.sqrt(np.diag(signal - gain @ signal))
    error = spread / np.sqrt(min(row.ess_bulk for row in chains.summary().values()))
    assert np.all(np.abs(chains.tracked[0] - expected) < 4.5 * error)
    assert np.all(np.abs(chains.tracked[1] / spread - 1) < 4.5 / np.sqrt(2 * 500))


def test_trajectories_at_the_samplers_limit_are_counted(x64):
    sim = ds.linear_gaussian()
    x = sim.draw(jax.random.key(1), 1).x[0]
    run = dict(n_warmup=20, n_samples=50, n_chains=2)
    for settings in (dict(sampler="nuts", max_tree_depth=1), dict(sampler="hmc", latents="whitened", max_steps=1)):
        chains = ds.full_field_posterior(sim, x, jax.random.key(2), **run, **settings)
        assert chains.n_cut_short == 100
    assert ds.full_field_posterior(sim, x, jax.random.key(2), **run).n_cut_short == 0
