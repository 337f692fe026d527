"""The two baselines on the same map: the Gaussian-field posterior, and band powers with their connected covariance."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_theta import draws_at
from scipy.stats import multivariate_normal

import diffsbi as ds
from diffsbi.bands import Bands, pairs, pixel_area
from diffsbi.sampling import (
    BandPowerLikelihood,
    GaussianFieldLikelihood,
    band_power_covariance,
    gaussian_field_posterior,
)
from diffsbi.sampling.gaussian_field import _scoring, approximate_posterior, scoring_step
from diffsbi.sampling.power_spectrum import _Target, _unbiased_difference, _with_twins

N_BANDS = 3


@pytest.fixture(scope="module")
def gaussian():
    """A Gaussian field of 8 x 8 pixels in two bins, and maps of it at the fiducial point."""
    with jax.enable_x64(True):
        sim = ds.lsst_y10(n_pix=8, side_deg=4.0, n_bins=2, sigma_e=0.4, field="gaussian")
        return sim, draws_at(sim, sim.fiducial, jax.random.key(0), 300)[1]


@pytest.fixture(scope="module")
def lognormal():
    """Strongly log-normal fields of 16 x 16 pixels in two bins, and maps of them at the fiducial point."""
    with jax.enable_x64(True):
        sim = ds.lsst_y10(n_pix=16, side_deg=1.0, n_bins=2, sigma_e=0.05)
        return sim, np.asarray(draws_at(sim, sim.fiducial, jax.random.key(1), 3000)[1])


@eqx.filter_jit
def evaluate(likelihood, theta):
    return jax.lax.map(likelihood.log_prob, theta)


def dense_log_density(sim, spectra, x):
    """Of the maps less their means, as one multivariate normal of all pixels of all bins, given C_ℓ on the grid."""
    n, m = sim.n_pix, sim.n_pix**2
    at = np.indices((n, n)).reshape(2, m)
    lag = (at[:, :, None] - at[:, None, :]) % n
    covariance = np.zeros((sim.n_bins, m, sim.n_bins, m))
    for (i, j), row in zip(pairs(sim.n_bins), spectra / pixel_area(n, sim.side_deg), strict=True):
        correlation = np.fft.ifft2(np.concatenate([[0.0], row]).reshape(n, n)).real
        covariance[i, :, j] = covariance[j, :, i] = correlation[lag[0], lag[1]]
        covariance[i, :, j] += (i == j) * float(sim.noise[i]) ** 2 * np.eye(m)
    rest = np.linalg.svd(np.ones((1, m)))[2][1:]  # orthonormal, all orthogonal to a constant
    projector = np.kron(np.eye(sim.n_bins), rest)
    projected = projector @ covariance.reshape(sim.n_bins * m, -1) @ projector.T
    return multivariate_normal.logpdf(projector @ np.asarray(x).ravel(), cov=projected)


def test_the_density_is_that_of_all_pixels(x64, gaussian):
    sim, x = gaussian
    theta = jnp.concatenate([sim.fiducial[None], sim.prior.sample(jax.random.key(5), (11,))])
    fast = np.asarray(evaluate(GaussianFieldLikelihood(sim, x[0]), theta))
    k = np.fft.fftfreq(sim.n_pix, 1 / sim.n_pix)
    ell = 360.0 / sim.side_deg * np.hypot(k[:, None], k[None, :]).ravel()[1:]
    spectra = np.asarray(jax.jit(lambda t: jax.lax.map(lambda one: sim.spectra(one, ell), t))(theta))
    dense = np.array([dense_log_density(sim, c, x[0]) for c in spectra])
    np.testing.assert_allclose(fast - fast[0], dense - dense[0], rtol=1e-8, atol=1e-8)
    loud = eqx.tree_at(lambda s: s.noise, sim, 1.2 * sim.noise)
    wrong = np.array([dense_log_density(loud, c, x[0]) for c in spectra])
    assert np.abs((wrong - wrong[0] - (fast - fast[0]))[1:]).max() > 1
    assert np.ptp(dense) > 10


def test_the_gradient_is_that_of_finite_differences(x64, gaussian):
    sim, x = gaussian
    likelihood = GaussianFieldLikelihood(sim, x[0])
    theta = np.asarray(sim.fiducial) * 1.1
    h = 1e-4 * np.abs(theta)
    values = evaluate(likelihood, jnp.asarray(np.concatenate([theta + np.diag(h), theta - np.diag(h)])))
    score, fisher, value = scoring_step(sim, x[0], jnp.asarray(theta))
    np.testing.assert_allclose(score, (values[:6] - values[6:]) / (2 * h), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-5)
    assert np.linalg.eigvalsh(fisher).min() > 0


def test_the_mean_score_vanishes_at_the_truth_and_nowhere_else(x64, gaussian):
    r"""$n\,\bar s^T F^{-1} \bar s$ is chi² of 6; noise or amplitude off by 20 % is seen."""
    sim, x = gaussian

    def chi2(sim, theta):
        # The likelihood is linear in the second moments: their mean over maps gives the mean score.
        moments = jax.vmap(lambda one: GaussianFieldLikelihood(sim, one).moments)(x).mean(0)
        mean = eqx.tree_at(lambda a: a.moments, GaussianFieldLikelihood(sim, x[0]), moments)
        score, fisher, _ = map(np.asarray, _scoring(mean, theta))
        return len(x) * score @ np.linalg.solve(fisher, score)

    assert chi2(sim, sim.fiducial) < 22.5  # 0.1 %
    assert chi2(eqx.tree_at(lambda s: s.noise, sim, 1.2 * sim.noise), sim.fiducial) > 60
    assert chi2(sim, sim.fiducial.at[2].mul(1.2)) > 60


@pytest.mark.optimised
def test_the_chains_agree_with_importance_sampling(x64, gaussian):
    sim, x = gaussian
    chains = gaussian_field_posterior(sim, x[0], jax.random.key(2), n_chains=2, n_warmup=60, n_samples=120)
    target = _Target(GaussianFieldLikelihood(sim, x[0]), sim.prior, *map(jnp.asarray, approximate_posterior(sim, x[0])))
    n, dof = 2_000, 6.0

    @jax.jit
    def proposed(key):
        key_normal, key_chi2 = jax.random.split(key)
        scale = jnp.sqrt(jax.random.gamma(key_chi2, dof / 2, (n,)) * 2 / dof)
        # Student's t: wider tails than the posterior's.
        v = 1.2 * jax.random.normal(key_normal, (n, 6)) / scale[:, None]
        return v, jax.lax.map(target, v, batch_size=500), jax.vmap(target.theta)(v)

    v, log_target, theta = map(np.asarray, proposed(jax.random.key(3)))
    log_weight = log_target + 0.5 * (dof + 6) * np.log1p(np.sum((v / 1.2) ** 2, 1) / dof)
    assert np.isnan(log_weight).mean() < 0.01  # no spectra so far out (negative densities): the sampler stays away too
    weight = np.exp(np.nan_to_num(log_weight, nan=-np.inf) - np.nanmax(log_weight))
    weight /= weight.sum()
    effective = 1 / np.sum(weight**2)
    assert effective > n / 6
    for column, row in zip(theta.T, chains.summary().values(), strict=True):
        mean = weight @ column
        sd = np.sqrt(weight @ (column - mean) ** 2)
        assert row.rhat < 1.05 and row.ess_bulk > 100
        assert abs(row.mean - mean) < 4 * sd * np.sqrt(1 / row.ess_bulk + 1 / effective)
        assert abs(row.sd / sd - 1) < 4 * np.sqrt(1 / row.ess_tail + 1 / effective)
    assert chains.names == sim.names and chains.n_diverging == 0


def test_the_likelihood_in_single_precision_is_close(gaussian):
    x = np.asarray(gaussian[1][0])

    def value():  # in the precision of where it is called
        sim = ds.lsst_y10(n_pix=8, side_deg=4.0, n_bins=2, sigma_e=0.4)
        return evaluate(GaussianFieldLikelihood(sim, x), 1.05 * sim.fiducial[None])[0]

    single = value()
    with jax.enable_x64(True):
        double = value()
    assert single.dtype == jnp.float32 and float(single) == pytest.approx(float(double), abs=0.01)


def test_observations_that_cannot_be_are_refused(gaussian):
    sim, x = gaussian
    x, key = np.asarray(x), jax.random.key(0)
    with pytest.raises(ValueError, match=r"x with trailing shape \(2, 8, 8\); got \(2, 4, 8\)"):
        gaussian_field_posterior(sim, x[0, :, :4], key)
    with pytest.raises(ValueError, match="one observation"):
        gaussian_field_posterior(sim, x[:1], key)
    with pytest.raises(ValueError, match="128 non-finite of 128 values"):
        gaussian_field_posterior(sim, np.nan * x[0], key)
    with pytest.raises(ValueError, match="zero everywhere"):
        gaussian_field_posterior(sim, 0 * x[0], key)
    with pytest.raises(TypeError, match="typed JAX key"):
        gaussian_field_posterior(sim, x[0], 0)


# -- the covariance of the band powers ------------------------------------------------------------------------------


def knox(sim):
    """The analytic covariance of the likelihood."""
    x = np.ones((sim.n_bins, sim.n_pix, sim.n_pix))
    return BandPowerLikelihood(sim, x, n_bands=N_BANDS)._knox(sim.fiducial)


def whitened(sim, maps, reference):
    """Band powers of maps, centred, in the reference's units."""
    bands = Bands(sim.n_pix, sim.side_deg, N_BANDS)
    rows = np.asarray(jax.jit(jax.vmap(lambda one: bands(one).ravel()))(jnp.asarray(maps)))
    return np.linalg.solve(np.linalg.cholesky(reference), (rows - rows.mean(0)).T).T


def worst(rows, covariance=None):
    """Largest deviation of the rows' covariance from a given one (or unity), in its own standard errors."""
    products = rows[:, :, None] * rows[:, None, :]
    error = products.std(0) / np.sqrt(len(rows))
    return np.abs((products.mean(0) - (np.eye(rows.shape[1]) if covariance is None else covariance)) / error).max()


def test_a_gaussian_field_has_the_analytic_covariance(x64, gaussian):
    sim, x = gaussian
    analytic = knox(sim)
    covariance = band_power_covariance(sim, jax.random.key(3), 20, n_bands=N_BANDS)
    scale = np.sqrt(np.diag(analytic))
    np.testing.assert_allclose(covariance / np.outer(scale, scale), analytic / np.outer(scale, scale), atol=1e-4)
    assert worst(whitened(sim, x, covariance)) < 4.5
    assert worst(whitened(sim, x[:, ::-1], covariance)) > 6  # bins in another order


def test_a_lognormal_fields_connected_part_is_there(x64, lognormal):
    sim, x = lognormal
    analytic = knox(sim)
    covariance = band_power_covariance(sim, jax.random.key(4), 600, n_bands=N_BANDS)
    np.testing.assert_array_equal(covariance, covariance.T)
    root = np.linalg.cholesky(analytic)
    excess = np.linalg.solve(root, np.linalg.solve(root, covariance).T)
    rows = whitened(sim, x, analytic)
    # The simulations behind the covariance and behind `x` are different ones, five times as many.
    assert worst(rows, excess) < 4.5 * np.sqrt(1 + 5)
    assert worst(rows) > 10  # not the Gaussian covariance
    relative = (np.diag(covariance) / np.diag(analytic)).reshape(3, N_BANDS) - 1
    assert np.all(relative[0, 1:] > 0.1)  # the low-redshift bin


def test_twins_have_their_simulations_noise_and_latents(x64, lognormal):
    sim, _ = lognormal
    bands = Bands(sim.n_pix, sim.side_deg, N_BANDS)
    x, twin = _with_twins(sim, bands, jax.random.key(4), 100, sim.fiducial, False)
    correlation = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, twin.T, strict=True)]
    assert min(correlation) > 0.5
    again, _ = _with_twins(sim, bands, jax.random.key(4), 65, sim.fiducial, False)
    np.testing.assert_allclose(again, x[:65], rtol=1e-12)  # a simulation does not depend on how many there are


def test_the_inverse_is_unbiased_in_spite_of_noise():
    """E of the inverse is the inverse to first order; without the correction it is off by about d (1 − r²) 2 / n."""
    rng = np.random.default_rng(0)
    n, d, repeats = 100, 12, 600
    traces = []
    for _ in range(repeats):
        twin = rng.normal(size=(n, d))
        x = 0.8 * twin + 0.6 * rng.normal(size=(n, d))  # of the same unit covariance
        x, twin = x - x.mean(0), twin - twin.mean(0)
        plain = (x.T @ x - twin.T @ twin) / (n - 1)
        both = plain, _unbiased_difference(x, twin)
        traces.append([np.trace(np.linalg.inv(np.eye(d) + part)) / d - 1 for part in both])
    plain, corrected = np.mean(traces, 0)
    error = np.std(traces, 0)[1] / np.sqrt(repeats)
    first_order = 2 * (1 - 0.8**2) * d / n
    assert plain > 0.7 * first_order
    assert abs(corrected) < 4 * error + 0.5 * first_order**2 * 10


def test_settings_that_cannot_be_are_refused(gaussian):
    sim, _ = gaussian
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="n >= 2 simulations; got 1"):
        band_power_covariance(sim, key, 1)
    with pytest.raises(ValueError, match=r"theta with shape \(6,\); got \(5,\)"):
        band_power_covariance(sim, key, 10, sim.fiducial[:5])
    with pytest.raises(ValueError, match="w_0 inside the prior's support"):
        band_power_covariance(sim, key, 10, sim.fiducial.at[5].set(1.0))
    with pytest.raises(TypeError, match="LensingMaps simulator; got LinearGaussian"):
        band_power_covariance(ds.linear_gaussian(), key, 10)
