"""Maps against their spectra, scores against finite differences, whitening against its definition."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_theta import draws_at, scores_at

import diffsbi as ds
from diffsbi.bands import Bands
from diffsbi.cosmology.redshifts import tabulated
from diffsbi.simulators import fields
from diffsbi.simulators.lensing import LensingMaps


@pytest.fixture(scope="module")
def sim():
    return ds.lsst_y10(n_pix=64, side_deg=5.0)


@pytest.fixture
def small(x64):
    return ds.lsst_y10(n_pix=8, side_deg=2.0, n_bins=2)


def corners(sim):
    """Every corner of the prior's 3 sigma box, clipped to the support."""
    sigma = np.array([0.2, 0.006, 0.14, 0.063, 0.08, 0.9])
    box = np.stack([np.asarray(sim.fiducial) - 3 * sigma, np.asarray(sim.fiducial) + 3 * sigma])
    box[:, 0] = np.maximum(box[:, 0], 0.0)
    box[:, 5] = np.clip(box[:, 5], -2.0, -0.3)
    return jnp.asarray([[box[b, i] for i, b in enumerate(bits)] for bits in itertools.product((0, 1), repeat=6)])


# Compiled once for every survey of the same shape: computed operation by operation, each of them is compiled.
@eqx.filter_jit
def drawn(sim, key, theta):
    return sim.draw_one(key, theta)


@eqx.filter_jit
def score(sim, theta, z, x, latents="white", **options):
    return sim.score(theta, z, x, latents=latents, **options)


@eqx.filter_jit
def joint(sim, theta, xi, x, latents):
    return sim.log_conditional(theta, xi, x, latents=latents)


@eqx.filter_jit
def slopes(sim, theta, xi, x, latents):
    return jax.grad(sim.log_conditional, (0, 1))(theta, xi, x, latents=latents)


@eqx.filter_jit
def from_latents(sim, theta, z, x, latents):
    return sim.transport(latents).from_latents(sim.setup(theta), z, x)


@pytest.fixture(scope="module")
def at_fiducial():
    """A survey, 300 simulations of it, and their scores in either coordinate."""
    sim = ds.lsst_y10(n_pix=16, side_deg=2.0, n_bins=3)
    rows = draws_at(sim, sim.fiducial, jax.random.key(8), 300)
    return sim, rows, {name: scores_at(sim, sim.fiducial, *rows, name) for name in ("white", "whitened")}


# -- fields -----------------------------------------------------------------------------------------------------------


def test_hartley_is_its_definition_and_its_own_inverse(x64):
    n = 6
    x = np.asarray(jax.random.normal(jax.random.key(0), (3, n, n)))
    index = np.arange(n)
    phase = 2 * np.pi / n * (index[:, None, None, None] * index[:, None] + index[:, None, None] * index)
    cas = (np.cos(phase) + np.sin(phase)) / n  # (ky, kx, y, x)
    np.testing.assert_allclose(fields.hartley(x), np.einsum("klyx,byx->bkl", cas, x), atol=1e-12)
    np.testing.assert_allclose(fields.hartley(fields.hartley(x)), x, atol=1e-12)


def test_fold_and_unfold_are_inverse_and_count_every_mode(x64):
    x = jax.random.normal(jax.random.key(1), (2, 8, 8))
    np.testing.assert_array_equal(fields.unfold(fields.fold(x)), x)
    np.testing.assert_array_equal(fields.fold(jnp.ones((8, 8))).sum((0, 1)), fields.mode_weights(8))
    k = 2 * np.pi * np.fft.fftfreq(8)
    folded = fields.fold(jnp.asarray(np.hypot(k[:, None], k)))
    quadrant = fields.mode_multipoles(8, 8.0)
    np.testing.assert_allclose(folded, np.where(fields.fold(jnp.ones((8, 8))) > 0, quadrant, 0.0), atol=1e-12)


def test_cosine_transform_is_the_inverse_fourier_transform(x64):
    n = 8
    power = np.asarray(fields.mode_multipoles(n, 1.0)) + 1
    full = np.where(np.arange(n) <= n // 2, np.arange(n), n - np.arange(n))
    expected = np.fft.ifft2(power[np.ix_(full, full)]).real[: n // 2 + 1, : n // 2 + 1]
    cosines = fields.cosine_matrix(n)
    got = fields.even_transform(cosines, power) / n**2
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(fields.even_transform(cosines, got), power, atol=1e-10)


def test_cholesky_and_inverse_match_numpy(x64):
    a = np.asarray(jax.random.normal(jax.random.key(2), (7, 4, 4)))
    spd = a @ a.transpose(0, 2, 1) + 0.1 * np.eye(4)
    i, j = np.triu_indices(4)
    factor = fields.cholesky(jnp.asarray(spd.transpose(1, 2, 0)[i, j]), 4)
    expected = np.linalg.cholesky(spd)
    inverse = fields.lower_inverse(factor)
    for r, c in itertools.combinations_with_replacement(range(4), 2):
        np.testing.assert_allclose(factor[c][r], expected[:, c, r], atol=1e-10)
        np.testing.assert_allclose(inverse[c][r], np.linalg.inv(expected)[:, c, r], atol=1e-10)


def test_cholesky_without_a_factor_stays_finite():
    pairs = jnp.array([1.0, 2.0, 1.0])[:, None]  # [[1, 2], [2, 1]] is indefinite
    factor, pullback = jax.vjp(lambda p: fields.cholesky(p, 2), pairs)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((factor, pullback(factor))))
    assert factor[1][1] == pytest.approx(1e-3)


# -- maps -------------------------------------------------------------------------------------------------------------


def band_statistics(sim, n_maps=200):
    z = jax.random.normal(jax.random.key(3), (n_maps, *sim._map_shape))
    maps = eqx.filter_jit(lambda s, z: jax.lax.map(lambda one: s.convergence(s.fiducial, one), z))(sim, z)
    bands = Bands(sim.n_pix, sim.side_deg, 10)
    return maps, np.asarray(jax.lax.map(bands, maps)), bands


@pytest.fixture(scope="module")
def maps(sim):
    return band_statistics(sim)


def expected_bands(sim, bands):
    """Exact average of the input C_l over the modes of every band, from `spectra` at every mode's own multipole."""
    ell = np.asarray(fields.mode_multipoles(sim.n_pix, np.deg2rad(sim.side_deg)))
    inside = ell > 0
    values = np.asarray(sim.spectra(sim.fiducial, ell[inside]))
    weights = np.asarray(fields.mode_weights(sim.n_pix))[inside]
    which = np.digitize(ell[inside], np.asarray(bands.edges)) - 1
    out = np.zeros((len(values), len(bands.edges) - 1))
    for b in range(out.shape[1]):
        out[:, b] = (values[:, which == b] * weights[which == b]).sum(1) / weights[which == b].sum()
    return out


def test_mean_power_of_maps_is_the_input(sim, maps):
    _, powers, bands = maps
    expected = expected_bands(sim, bands)
    error = powers.std(0, ddof=1) / np.sqrt(len(powers))
    z = (powers.mean(0) - expected) / error
    assert np.abs(z).max() < 4.5, np.abs(z).max()
    assert (z**2).mean() < 1.6
    wrong = (powers.mean(0) - 1.05 * expected) / error
    assert np.abs(wrong).max() > 4.5 and (wrong**2).mean() > 1.6


def test_variance_and_skewness_of_maps_are_the_lognormal_ones(sim, maps):
    kappa = np.asarray(maps[0], float)
    power = np.asarray(sim.mode_power(sim.fiducial), float)[[i == j for i, j in sim.pairs]]
    variance = (power * np.asarray(fields.mode_weights(sim.n_pix))).sum((1, 2)) / sim.n_pix**2
    shift = np.asarray(sim.shift(sim.fiducial), float)
    third = 3 * variance**2 / shift + variance**3 / shift**3
    for moment, expected in ((2, variance), (3, third)):
        each = (kappa**moment).mean((2, 3))
        z = (each.mean(0) - expected) / (each.std(0, ddof=1) / np.sqrt(len(each)))
        assert np.abs(z).max() < 4, (moment, z)
    assert (kappa.min((0, 2, 3)) > -shift).all()
    assert np.abs(kappa.mean((0, 2, 3)) / (kappa.mean((2, 3)).std(0) / np.sqrt(len(kappa)))).max() < 4


def test_gaussian_field_has_no_skewness_and_the_same_power(x64):
    sim = ds.lsst_y10(n_pix=32, side_deg=2.5, n_bins=2, field="gaussian")
    maps, powers, bands = band_statistics(sim, 100)
    z = (powers.mean(0) - expected_bands(sim, bands)) / (powers.std(0, ddof=1) / 10)
    assert np.abs(z).max() < 4.5
    third = (np.asarray(maps) ** 3).mean((2, 3))
    assert np.abs(third.mean(0) / (third.std(0) / 10)).max() < 4


def test_noise_is_that_of_the_survey(sim):
    density, pixel = 27 / 5, 60 * 5.0 / 64
    np.testing.assert_allclose(sim.noise, 0.26 / np.sqrt(density * pixel**2), rtol=1e-6)
    d = sim.draw(jax.random.key(4), 1, sim.fiducial, with_score=False, keep_latents=True)
    noise = np.asarray(d.x[0] - sim.convergence(sim.fiducial, d.latents[0]))
    np.testing.assert_allclose(noise.std((1, 2)) / np.asarray(sim.noise), 1.0, atol=4 / np.sqrt(2 * 64**2))


def test_published_normalisation_uses_each_maps_own_variance(shift_table):
    sim = ds.lsst_y10(n_pix=32, side_deg=1.25, shift="published", shift_table=shift_table)
    kappa = sim.convergence(sim.fiducial, jax.random.normal(jax.random.key(5), (5, 32, 32)))
    g = jnp.log1p(kappa / sim.shift(sim.fiducial)[:, None, None])
    np.testing.assert_allclose(g.mean((1, 2)), -0.5 * g.var((1, 2)), rtol=1e-3)


# -- scores and joints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, latents",
    [
        ("lognormal", "white"),
        ("lognormal", "whitened"),
        # A Gaussian field's whitened score is compared with the marginal one, that with differences (test_full_field).
        pytest.param("gaussian", "whitened", marks=pytest.mark.slow),
        pytest.param("gaussian", "white", marks=pytest.mark.slow),
    ],
)
def test_scores_and_latent_gradients_match_finite_differences(x64, field, latents):
    sim = ds.lsst_y10(n_pix=8, side_deg=2.0, n_bins=2, field=field)
    theta, z, x = drawn(sim, jax.random.key(6), sim.fiducial)
    xi, _ = from_latents(sim, theta, z, x, latents)
    value = lambda s, t, xi: joint(s, t, xi, x, latents)  # noqa: E731
    found = score(sim, theta, z, x, latents)
    for i in range(6):
        h = 1e-4 * abs(float(theta[i]))
        e = jnp.zeros(6).at[i].set(h)
        # fourth-order differences
        ends = [value(sim, theta + k * e, xi) for k in (-2, -1, 1, 2)]
        expected = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
        assert abs(found[i] - expected) < 1e-6 * max(1.0, abs(expected)), (i, found[i], expected)
    direction = jax.random.normal(jax.random.key(7), xi.shape)
    gradient = eqx.filter_jit(jax.grad(lambda xi, sim: sim.log_conditional(theta, xi, x, latents=latents)))(xi, sim)
    step = 1e-5
    expected = (value(sim, theta, xi + step * direction) - value(sim, theta, xi - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.sum(gradient * direction), expected, rtol=1e-6)


@pytest.mark.parametrize("latents", ["white", "whitened"])
def test_mean_score_at_fixed_theta_is_zero(at_fiducial, latents):
    sim, rows, scores = at_fiducial
    right = np.asarray(scores[latents], float)
    z = right.mean(0) / (right.std(0, ddof=1) / np.sqrt(len(right)))
    assert np.abs(z).max() < 4, z
    # Nor would a wrong theta pass:
    wrong = sim.fiducial.at[2].multiply(1.15)
    biased = np.asarray(scores_at(sim, wrong, *rows, latents), float)
    assert np.abs(biased.mean(0) / (biased.std(0, ddof=1) / np.sqrt(len(biased)))).max() > 4


def test_a_misspelt_coordinate_is_named(small):
    shape = jnp.zeros((2, 8, 8))
    with pytest.raises(ValueError, match="Unknown latent coordinate 'whitend'.*Did you mean 'whitened'"):
        small.score(small.fiducial, shape, shape, latents="whitend")


def test_whitening_is_a_change_of_variables(small):
    sim = small
    theta, z, x = drawn(sim, jax.random.key(10), sim.fiducial)
    xi, inverse_log_det = from_latents(sim, theta, z, x, "whitened")

    @eqx.filter_jit
    def back_and_jacobian(sim, xi):
        state, transport = sim.setup(theta), sim.transport("whitened")
        matrix = jax.jacfwd(lambda v: transport.to_latents(state, v.reshape(xi.shape), x)[0].ravel())(xi.ravel())
        return *transport.to_latents(state, xi, x), matrix

    back, log_det, matrix = back_and_jacobian(sim, xi)
    np.testing.assert_allclose(back, z, atol=1e-10)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(matrix)[1], rtol=1e-10)
    np.testing.assert_allclose(inverse_log_det, -log_det, rtol=1e-12)
    white, whitened = joint(sim, theta, z, x, "white"), joint(sim, theta, xi, x, "whitened")
    np.testing.assert_allclose(whitened - log_det, white, rtol=1e-12)


def test_whitened_gaussian_field_is_exactly_normal(x64):
    """There xi ~ N(0, 1) whatever theta and x, so the joint score is the marginal one, without noise."""
    sim = ds.lsst_y10(n_pix=8, side_deg=2.0, n_bins=2, field="gaussian")
    theta, z, x = drawn(sim, jax.random.key(11), 1.01 * sim.fiducial)
    xi = jax.random.normal(jax.random.key(12), z.shape)
    marginal, in_latents = slopes(sim, theta, xi, x, "whitened")
    np.testing.assert_allclose(in_latents, -xi, atol=1e-10)
    np.testing.assert_allclose(marginal, slopes(sim, theta, z, x, "whitened")[0], rtol=1e-9)
    np.testing.assert_allclose(score(sim, theta, z, x, "whitened"), marginal, rtol=1e-9)


def test_whitening_lowers_the_noise_of_the_score(at_fiducial):
    white, whitened = (np.asarray(at_fiducial[2][name], float) for name in ("white", "whitened"))
    assert (whitened.var(0) < white.var(0)).all()


# -- everywhere in the prior ------------------------------------------------------------------------------------------


def finite_everywhere(n_draws, n_pix):
    """Corners and draws of the prior, and where baryons dominate: there the fits are far outside their range."""
    sim = ds.lsst_y10(n_pix=n_pix, side_deg=n_pix * 10 / 256)
    theta = sim.prior.sample(jax.random.key(14), (n_draws,))
    baryons = theta[: n_draws // 3].at[:, 0].set(jnp.linspace(0.0, 0.05, n_draws // 3))
    theta = jnp.concatenate([corners(sim), theta, baryons])

    @eqx.filter_jit
    def check(sim, theta):
        def one(args):
            t, key = args
            _, z, x = sim.draw_one(key, t)
            state, pull_back = jax.vjp(sim.setup, t)  # once for both coordinates: this is what takes long
            found = [x]
            for transport in (sim.transport("white"), sim.transport("whitened")):
                xi, _ = transport.from_latents(state, z, x)
                density = jax.value_and_grad(sim.log_conditional_of, (0, 1))
                value, (of_state, of_latents) = density(state, xi, x, transport)
                found += [value, of_latents, *pull_back(of_state)]
            return jnp.stack([jnp.isfinite(a).all() for a in found])

        return jax.lax.map(one, (theta, jax.random.split(jax.random.key(15), len(theta))))

    ok = np.asarray(check(sim, theta))
    assert ok.all(), (
        f"not finite (map; value, slope, score: white, whitened): {ok.sum(0)} of {len(ok)}, {theta[~ok.all(1)][:3]}"
    )


def test_finite_over_the_prior_float32():
    finite_everywhere(36, 8)


@pytest.mark.slow
def test_finite_over_the_prior_float64(x64):
    finite_everywhere(36, 8)


@pytest.mark.slow
@pytest.mark.parametrize("n_pix", [16, 256])
@pytest.mark.parametrize("double", [False, True])
def test_finite_at_many_points_of_the_prior(double, n_pix):
    with jax.enable_x64(double):
        finite_everywhere(2000, n_pix)


# -- the interface ----------------------------------------------------------------------------------------------------


def test_shapes_names_and_spectra(sim):
    d = sim.draw(jax.random.key(0), 3, with_score=False)
    assert d.theta.shape == (3, 6) and d.x.shape == (3, 5, 64, 64) and d.score is None and d.latents is None
    assert d.names == sim.names == ("omega_c", "omega_b", "sigma_8", "h_0", "n_s", "w_0")
    assert sim.pairs[:6] == ((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 1))
    assert sim.spectra(sim.fiducial, [100.0, 1000.0]).shape == (15, 2)
    assert sim.redshift_distribution(np.linspace(0, 3, 7)).shape == (5, 7)


def test_single_and_double_precision_agree(sim):
    with jax.enable_x64(True):
        double = ds.lsst_y10(n_pix=64, side_deg=5.0)
        reference, shift = double.spectra(double.fiducial, [80.0, 3000.0]), double.shift(double.fiducial)
    np.testing.assert_allclose(sim.spectra(sim.fiducial, [80.0, 3000.0]), reference, rtol=1e-4)
    np.testing.assert_allclose(sim.shift(sim.fiducial), shift, rtol=1e-4)


def test_any_survey():
    z = np.linspace(0.0, 3.0, 50)
    table = tabulated(z, np.stack([z * np.exp(-4 * z), z**3 * np.exp(-3 * z)]))
    sim = LensingMaps(table, n_pix=16, side_deg=3.0, sigma_e=[0.2, 0.3], density=[3.0, 5.0], shift=0.03)
    d = sim.draw(jax.random.key(1), 2)
    assert d.x.shape == (2, 2, 16, 16) and d.score.shape == (2, 6) and np.isfinite(d.score).all()
    np.testing.assert_allclose(sim.shift(sim.fiducial), 0.03)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"n_pix": 63}, "n_pix to be even.*63"),
        ({"n_pix": 0}, "n_pix to be even.*0"),
        ({"n_pix": -8}, "n_pix to be even.*-8"),
        ({"side_deg": 0.0}, "side_deg"),
        ({"sigma_e": -0.1}, "sigma_e > 0; got -0.1"),
        ({"density": [1.0, 2.0]}, "density as one number or 5"),
        ({"field": "lognormla"}, "field"),
        ({"shift": "publishd"}, "shift"),
        ({"shift": "published"}, "shift_table"),
        ({"shift": -0.1}, "shift > 0"),
        ({"shift": "published", "shift_table": "/no/such/file.npy"}, "no such file"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ds.lsst_y10(**({"n_pix": 64, "side_deg": 5.0} | options))


def test_bad_calls_are_refused(sim):
    with pytest.raises(ValueError, match="omega_c inside the prior's support"):
        sim.draw(jax.random.key(0), 1, sim.fiducial.at[0].set(-0.1))
    with pytest.raises(ValueError, match=r"trailing shape \(6,\); got \(5,\)"):
        sim.spectra(jnp.ones(5), [100.0])
    with pytest.raises(ValueError, match="ell"):
        sim.spectra(sim.fiducial, [1e9])
    with pytest.raises(ValueError, match=r"trailing shape \(5, 64, 64\)"):
        sim.convergence(sim.fiducial, jnp.ones((5, 32, 32)))
