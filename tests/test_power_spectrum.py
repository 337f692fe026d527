"""The power-spectrum posterior, on Gaussian fields of a two-parameter spectrum whose information is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from diffsbi.bands import Bands, pairs, pixel_area
from diffsbi.prior import Prior
from diffsbi.sampling import BandPowerLikelihood, power_spectrum_posterior
from diffsbi.sampling.power_spectrum import _Target, _whitened


class PowerLaws(eqx.Module):
    r"""$C^{ij}_\ell = g_{ij} A (\ell/\ell_0)^{-s}$: two correlated bins, an amplitude and a slope."""

    prior: Prior
    noise: jax.Array
    n_pix: int = eqx.field(static=True, default=32)
    side_deg: float = eqx.field(static=True, default=5.0)
    n_bins: int = eqx.field(static=True, default=2)

    @property
    def pairs(self):
        return pairs(2)

    @property
    def fiducial(self):
        return self.prior.fiducial

    def spectra(self, theta, ell):
        weight = jnp.array([1.0, 1.2, 2.0])
        return 1e-6 * weight[:, None] * (theta[0] * (ell / 500.0) ** -theta[1])[None]


def simulator():
    prior = Prior({"amplitude": dist.Normal(1.0, 1.0), "slope": dist.Uniform(0.2, 2.0)}, {"slope": 1.0})
    return PowerLaws(prior, jnp.array([0.2, 0.3]))


def observe(sim, theta, seed):
    """Gaussian maps with these spectra on the modes of the periodic grid, and white noise."""
    rng = np.random.default_rng(seed)
    white = np.fft.rfft2(rng.normal(size=(2, sim.n_pix, sim.n_pix)))
    ell = Bands(sim.n_pix, sim.side_deg, 4).ell.reshape(white.shape[1:])
    c = np.asarray(sim.spectra(jnp.asarray(theta), jnp.asarray(np.maximum(ell, 1.0).ravel()))).reshape(3, *ell.shape)
    c = np.where(ell > 0, c, 0.0) / pixel_area(sim.n_pix, sim.side_deg)
    first = np.sqrt(c[0])
    cross = np.divide(c[1], first, out=np.zeros_like(first), where=first > 0)
    modes = [first * white[0], cross * white[0] + np.sqrt(c[2] - cross**2) * white[1]]
    maps = np.fft.irfft2(np.stack(modes), s=(sim.n_pix, sim.n_pix))
    return maps + np.asarray(sim.noise)[:, None, None] * rng.normal(size=maps.shape)


def fisher(sim, theta, n_bands):
    r"""Information of the field, mode by mode: $\frac12 \sum_k \mathrm{tr}(C^{-1} C_{,a} C^{-1} C_{,b})$."""
    bands = Bands(sim.n_pix, sim.side_deg, n_bands)
    weight = np.asarray(bands._multiplicity).sum(0)
    ell = jnp.asarray(bands.ell[weight > 0])
    value, slope = sim.spectra(theta, ell), jax.jacfwd(sim.spectra)(theta, ell)

    def matrix(c):
        return np.moveaxis(np.array([[c[0], c[1]], [c[1], c[2]]]), (0, 1), (-2, -1))

    noise = np.diag(np.asarray(sim.noise) ** 2) * pixel_area(sim.n_pix, sim.side_deg)
    inverse = np.linalg.inv(matrix(value) + noise)
    parts = [inverse @ matrix(slope[..., a]) for a in range(2)]
    trace = [[np.sum(weight[weight > 0] * np.trace(p @ q, axis1=-2, axis2=-1)) for q in parts] for p in parts]
    return 0.5 * np.array(trace)


def test_the_mean_is_the_exact_band_average_plus_noise(x64):
    sim = simulator()
    likelihood = BandPowerLikelihood(sim, observe(sim, [1.0, 1.0], 0), n_bands=6)
    theta = jnp.array([1.3, 0.8])
    exact = likelihood.bands.bin_theory(sim.spectra(theta, jnp.maximum(likelihood.bands.ell, 1.0)))
    exact = np.asarray(exact) + np.array([0.04, 0, 0.09])[:, None] * pixel_area(32, 5.0)
    np.testing.assert_allclose(likelihood.mean(theta), exact, rtol=1e-6)


def test_the_covariance_is_that_of_many_maps(x64):
    sim = simulator()
    likelihood = BandPowerLikelihood(sim, observe(sim, [1.0, 1.0], 0), n_bands=4)
    n = 1500
    maps = jnp.asarray(np.stack([observe(sim, [1.0, 1.0], seed) for seed in range(n)]))
    data = np.asarray(jax.jit(jax.vmap(lambda x: likelihood.bands(x)))(maps)).reshape(n, -1)
    residual = (data - np.asarray(likelihood.mean(sim.fiducial)).ravel()) @ np.asarray(likelihood.whiten).T
    # Whitened band powers have mean 0 and covariance 1; low bands are sums of few squares, with a heavier tail.
    excess = 12 / likelihood.bands.mode_counts[0]
    assert np.abs(residual.mean(0)).max() < 4 / np.sqrt(n)
    assert np.abs(np.cov(residual.T) - np.eye(12)).max() < 4.5 * np.sqrt((2 + excess) / n)


@pytest.fixture(scope="module")
def posteriors():
    with jax.enable_x64(True):
        sim, truth = simulator(), np.array([1.0, 1.0])
        runs = []
        for seed in range(10):
            settings = dict(n_bands=6, n_chains=2, n_warmup=150, n_samples=250)
            runs.append(power_spectrum_posterior(sim, observe(sim, truth, seed), jax.random.key(seed), **settings))
        return sim, truth, runs


def test_the_posterior_is_unbiased_and_as_wide_as_its_pulls(posteriors):
    _, truth, runs = posteriors
    pulls = np.array(
        [[(row.mean - t) / row.sd for row, t in zip(c.summary().values(), truth, strict=True)] for c in runs]
    )
    assert np.abs(pulls.mean(0)).max() < 3.5 / np.sqrt(len(runs))
    assert np.all((pulls**2).sum(0) < 30) and np.all((pulls**2).sum(0) > 1.5)  # chi² of 10: 0.1 % on either side


def test_the_posterior_has_the_fisher_width(posteriors, x64):
    sim, truth, runs = posteriors
    information = fisher(sim, jnp.asarray(truth), 6)
    expected = np.sqrt(np.diag(np.linalg.inv(information)))
    widths = np.array([[row.sd for row in c.summary().values()] for c in runs]).mean(0)
    # The widths of single runs differ by the curvature of the model; their mean follows the Fisher matrix.
    np.testing.assert_allclose(widths, expected, rtol=0.12)
    assert expected[0] < 0.2  # far narrower than the prior


def test_the_chains_converge_and_are_named(posteriors):
    for chains in posteriors[2]:
        rows = chains.summary()
        assert tuple(rows) == ("amplitude", "slope") and chains.n_diverging == 0
        assert max(row.rhat for row in rows.values()) < 1.05 and min(row.ess_bulk for row in rows.values()) > 100
    assert not np.array_equal(posteriors[2][0].theta[0], posteriors[2][0].theta[1])


def test_the_whitened_origin_is_the_peak(x64):
    sim = simulator()
    likelihood = BandPowerLikelihood(sim, observe(sim, [1.0, 1.0], 0), n_bands=4)
    target = _Target(likelihood, sim.prior, *map(jnp.asarray, _whitened(likelihood, sim.prior, jax.random.key(0))))
    assert np.abs(jax.jit(jax.grad(lambda v: target(v)))(jnp.zeros(2))).max() < 0.3  # but for the prior's shape
    bend = -jax.jit(jax.hessian(lambda v: target(v)))(jnp.zeros(2))
    np.testing.assert_allclose(bend, np.eye(2), atol=0.3)


def test_noise_matters_and_a_given_covariance_is_used(x64):
    sim = simulator()
    x = observe(sim, [1.0, 1.0], 0)
    likelihood = BandPowerLikelihood(sim, x, n_bands=4)
    wide = BandPowerLikelihood(sim, x, n_bands=4, covariance=4 * np.linalg.inv(likelihood.whiten.T @ likelihood.whiten))
    theta = jnp.array([1.2, 0.9])
    assert wide.log_prob(theta) == pytest.approx(float(likelihood.log_prob(theta)) / 4, rel=1e-6)
    quiet = eqx.tree_at(lambda s: s.noise, sim, 0.5 * sim.noise)
    assert BandPowerLikelihood(quiet, x, n_bands=4).log_prob(theta) < likelihood.log_prob(theta)


def test_the_likelihood_in_single_precision_is_close():
    sim = simulator()
    x, theta = observe(sim, [1.0, 1.0], 0), [1.2, 0.9]
    single = BandPowerLikelihood(sim, x, n_bands=6).log_prob(jnp.array(theta))
    with jax.enable_x64(True):
        double = BandPowerLikelihood(simulator(), x, n_bands=6).log_prob(jnp.array(theta))
    assert single.dtype == jnp.float32 and float(single) == pytest.approx(float(double), abs=0.02)


def test_observations_that_cannot_be_are_refused():
    sim, key = simulator(), jax.random.key(0)
    x = observe(sim, [1.0, 1.0], 0)
    with pytest.raises(ValueError, match=r"x with trailing shape \(2, 32, 32\); got \(2, 16, 16\)"):
        power_spectrum_posterior(sim, x[:, :16, :16], key)
    with pytest.raises(ValueError, match="one observation"):
        power_spectrum_posterior(sim, x[None], key)
    with pytest.raises(ValueError, match="1 non-finite of 2048 values"):
        power_spectrum_posterior(sim, x * _one_nan(x), key)
    with pytest.raises(ValueError, match="zero everywhere"):
        power_spectrum_posterior(sim, 0 * x, key)
    with pytest.raises(ValueError, match=r"covariance with shape \(12, 12\)"):
        power_spectrum_posterior(sim, x, key, n_bands=4, covariance=np.eye(3))


def _one_nan(x):
    out = np.ones_like(x)
    out[1, 2, 3] = np.nan
    return out
