"""Band powers, one-point and peak statistics, and score compression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.bands import Bands, band_edges, fundamental, pairs, pixel_area
from diffsbi.compression import torus_symmetry
from diffsbi.summaries import (
    bandpowers,
    dominance,
    hartlap,
    map_statistics,
    minima,
    moments,
    moped,
    peaks,
    score_compression,
    shrunk_covariance,
)
from diffsbi.summaries.points import PEAK_EDGES, extrema, smooth, smoothed_noise

SIDE = 5.0


@pytest.mark.parametrize("n_pix, n_bands", [(16, 5), (32, 12), (64, 12), (256, 12), (32, 40)])
def test_bands_run_from_the_fundamental_to_nyquist_and_none_is_empty(n_pix, n_bands):
    edges = band_edges(n_pix, SIDE, n_bands)
    assert len(edges) == n_bands + 1 and np.all(np.diff(edges) > 0)
    assert np.allclose(edges[[0, -1]], fundamental(SIDE) * np.array([1, n_pix / 2]))
    k = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n_pix, 1 / n_pix)] * 2))
    counts = Bands(n_pix, SIDE, n_bands).mode_counts
    assert min(counts) >= 4 and sum(counts) == np.sum((k > 0) & (k < n_pix / 2))


def test_band_settings_that_cannot_be_met_are_named():
    with pytest.raises(ValueError, match="at most 8 bands on a 8 x 8 grid; got n_bands = 20"):
        band_edges(8, SIDE, 20)
    with pytest.raises(ValueError, match="even n_pix >= 4; got 15"):
        Bands(15, SIDE)
    with pytest.raises(ValueError, match="side_deg > 0 degrees; got -1"):
        Bands(16, -1.0)
    with pytest.raises(ValueError, match="band 0, ell 10 to 20, holds none"):
        Bands(16, SIDE, edges=[10.0, 20.0, 400.0])
    with pytest.raises(ValueError, match="increasing band edges"):
        Bands(16, SIDE, edges=[300.0, 200.0])
    with pytest.raises(ValueError, match="n_bins, n_pix, n_pix"):
        bandpowers(np.zeros((16, 16)), SIDE)


def test_white_noise_has_its_variance_times_the_pixel_area_in_every_pair(x64):
    sigma, n_pix, n = np.array([0.5, 1.0, 3.0]), 32, 200
    bands = Bands(n_pix, SIDE, 6)
    x = sigma[:, None, None] * np.random.default_rng(1).normal(size=(n, 3, n_pix, n_pix))
    power = np.asarray(jax.jit(jax.vmap(lambda y: bands(y)))(jnp.asarray(x)))
    white = sigma**2 * pixel_area(n_pix, SIDE)

    def pulls(expected):
        first, second = np.array(pairs(3)).T
        same = first == second
        error = np.sqrt(np.where(same, 2, 1) * white[first] * white[second] / n)[:, None] / np.sqrt(bands.mode_counts)
        return (power.mean(0) - np.where(same, expected[first], 0.0)[:, None]) / error

    assert np.abs(pulls(white)).max() < 4 and 0.5 < np.mean(pulls(white) ** 2) < 1.7
    assert np.abs(pulls(1.05 * white)).max() > 6


def test_a_plane_wave_lands_in_its_band_with_its_power(x64):
    n_pix, amplitude, phase, wave = 32, 0.7, 0.4, (5, -3)
    grid = np.arange(n_pix)
    angle = 2 * np.pi * (wave[0] * grid[:, None] + wave[1] * grid[None, :]) / n_pix
    x = amplitude * np.stack([np.cos(angle), np.cos(angle + phase)])
    bands = Bands(n_pix, SIDE, 8)
    band = np.searchsorted(bands.edges, np.hypot(*wave) * fundamental(SIDE), side="right") - 1
    power = amplitude**2 / 2 * np.deg2rad(SIDE) ** 2 / bands.mode_counts[band]
    expected = np.zeros((3, 8))
    expected[:, band] = power * np.cos([0.0, phase, 0.0])
    np.testing.assert_allclose(bands(x), expected, atol=1e-12 * power)
    np.testing.assert_allclose(bandpowers(jnp.asarray(x), SIDE, 8), expected, atol=1e-12 * power)


def test_a_theory_curve_is_binned_alike_by_three_roads(x64):
    n_pix = 32
    bands = Bands(n_pix, SIDE, 7)

    def curve(ell):
        return np.exp(-0.1 * np.log(ell / 300) ** 2) * ell**-1.3

    full = np.hypot(*np.meshgrid(*[np.fft.fftfreq(n_pix, 1 / n_pix)] * 2)) * fundamental(SIDE)
    below = np.array(bands.edges) * (1 - 1e-9)
    loop = [curve(full[(full > below[b]) & (full < below[b + 1])]).mean() for b in range(7)]
    on_modes = jnp.asarray(curve(np.maximum(bands.ell, 1.0)))
    np.testing.assert_allclose(bands.bin_theory(on_modes), loop, rtol=1e-12)
    nodes, weights = bands.quadrature(4)
    np.testing.assert_allclose(np.sum(curve(nodes) * weights, 1), loop, rtol=1e-6)
    np.testing.assert_allclose(np.sum(nodes * weights, 1), bands.ell_effective, rtol=1e-4)


def test_the_quadrature_is_exact_for_polynomials_in_log_ell(x64):
    bands = Bands(64, SIDE, 5)
    nodes, weights = bands.quadrature(3)
    for degree in range(6):
        exact = bands.bin_theory(jnp.asarray(np.log(np.maximum(bands.ell, 1.0)) ** degree))
        np.testing.assert_allclose(np.sum(np.log(nodes) ** degree * weights, 1), exact, rtol=1e-11)


def _hard_maxima(maps, radius):
    steps = range(-radius, radius + 1)
    neighbours = [np.roll(maps, (i, j), (-2, -1)) for i in steps for j in steps if (i, j) != (0, 0)]
    return maps > np.max(neighbours, 0)


def _smooth_noise(n_pix=64, n_bins=2, scale=2.0):
    x = np.random.default_rng(3).normal(size=(n_bins, n_pix, n_pix))
    return np.asarray(smooth(jnp.fft.rfft2(x), n_pix, (scale,))[0]) / smoothed_noise(n_pix, scale)


def test_smoothing_divided_by_its_noise_has_unit_variance(x64):
    snr = _smooth_noise(128, 4, 1.0)
    assert abs(snr.var() - 1) < 4 * np.sqrt(2 * 4 * np.pi / snr.size)  # about N / (4 pi s²) independent values


def test_cold_peaks_are_hard_peaks_and_default_peaks_are_close(x64):
    snr = _smooth_noise()
    maxima = _hard_maxima(snr, 2)
    edges = [-np.inf, *PEAK_EDGES, np.inf]
    hard = np.stack([np.histogram(s[m], edges)[0] for s, m in zip(snr, maxima, strict=True)])
    cold = peaks(jnp.asarray(snr), temperature=1e-6, width=1e-6, radius=2)
    np.testing.assert_allclose(cold, hard, atol=0.1)
    soft = peaks(jnp.asarray(snr), radius=2)
    assert hard.sum() > 70 and abs(float(soft.sum()) / hard.sum() - 1) < 0.1
    assert np.corrcoef(np.asarray(soft).ravel(), hard.ravel())[0, 1] > 0.95


def test_minima_are_the_peaks_of_the_negative_map_from_low_to_high(x64):
    snr = jnp.asarray(_smooth_noise())
    np.testing.assert_allclose(minima(snr, (-2.0, -1.0)), peaks(-snr, (1.0, 2.0))[:, ::-1], rtol=1e-12)
    deep = jnp.zeros((1, 16, 16)).at[0, 4, 4].set(-5.0)
    assert minima(deep, (-2.0, -1.0), temperature=1e-3)[0, 0] == pytest.approx(1.0, abs=1e-3)


def test_extrema_are_peaks_and_minima_together(x64):
    snr = jnp.asarray(_smooth_noise(32))
    both = jnp.concatenate([peaks(snr, radius=2), minima(snr, radius=2)], -1)
    np.testing.assert_allclose(extrema(snr, radius=2), both, rtol=1e-12)


def test_dominance_is_a_softmax_over_a_periodic_window(x64):
    snr = jnp.asarray(_smooth_noise(16, 1, 1.0))
    weight = dominance(snr, 0.3)[0]
    rows = jnp.roll(snr[0], (1, 1), (0, 1))[:3, :3]  # the window of pixel (0, 0) wraps around both sides
    assert weight[0, 0] == pytest.approx(float(jnp.exp(snr[0, 0, 0] / 0.3) / jnp.sum(jnp.exp(rows / 0.3))), rel=1e-10)


def test_moments_of_normal_and_lognormal_maps(x64):
    normal = jax.random.normal(jax.random.key(2), (1, 128, 128)) * 3.0
    n = normal.size
    value = moments(normal, clip=50.0)[0]
    pulls = (value - np.array([np.log(9.0), 0.0, 0.0])) / np.sqrt(np.array([2, 6, 24]) / n)
    assert np.abs(pulls).max() < 4
    skewed = moments(jnp.exp(0.5 * normal / 3.0))[0]
    assert skewed[1] > 0.7 and skewed[2] > 0.3
    spiked = normal.at[0, 0, 0].set(1e4)
    assert abs(moments(spiked)[0, 1]) < 200 / n * 5  # one pixel cannot dominate


def _family(theta, key, n_pix=16, n_bins=2):
    """Skewed, correlated maps whose amplitude, slope and skewness are the parameters."""
    white = jax.random.normal(key, (n_bins, n_pix, n_pix))
    radius = jnp.hypot(*jnp.meshgrid(jnp.fft.fftfreq(n_pix) * n_pix, jnp.fft.rfftfreq(n_pix) * n_pix, indexing="ij"))
    shape = jnp.where(radius > 0, jnp.maximum(radius, 1.0) ** -theta[1], 0.0)
    g = jnp.fft.irfft2(jnp.fft.rfft2(white) * shape[None], s=(n_pix, n_pix))
    g = jnp.stack([g[0], 0.6 * g[0] + 0.8 * g[1]])
    noise = 0.1 * jax.random.normal(jax.random.fold_in(key, 1), g.shape)
    return theta[0] * (jnp.exp(theta[2] * g) - 1) / theta[2] + noise


def test_every_statistic_differentiates_like_finite_differences(x64):
    statistic = map_statistics(16, SIDE, [0.1, 0.2], 4, scales=(1.0,), peak_scales=(1.0,))
    theta = jnp.array([1.0, 0.7, 0.5])
    keys = jax.random.split(jax.random.key(0), 4)
    values = jax.jit(lambda t: jax.vmap(lambda k: statistic(_family(t, k)))(keys))
    forward = jax.jit(jax.jacfwd(lambda t: jax.vmap(lambda k: statistic(_family(t, k)))(keys)))(theta)
    assert values(theta).shape == (4, len(statistic.names)) and np.isfinite(values(theta)).all()
    for i, step in enumerate(1e-5 * np.eye(3)):
        finite = (values(theta + step) - values(theta - step)) / 2e-5
        np.testing.assert_allclose(forward[..., i], finite, rtol=1e-5, atol=1e-6)
    assert np.abs(forward).max(axis=(0, 2)).min() > 1e-4  # none of them is deaf


def test_reverse_mode_agrees_with_forward_mode(x64):
    statistic = map_statistics(16, SIDE, [0.1, 0.2], 4)
    x = _family(jnp.array([1.0, 0.7, 0.5]), jax.random.key(3))
    direction = jax.random.normal(jax.random.key(4), x.shape)
    weights = jax.random.normal(jax.random.key(5), (statistic.n_stats,))
    tangent = jax.jit(lambda: jax.jvp(lambda y: statistic(y), (x,), (direction,))[1])()
    gradient = jax.jit(jax.grad(lambda y: weights @ statistic(y)))(x)
    np.testing.assert_allclose(weights @ tangent, jnp.sum(gradient * direction), rtol=1e-10)


def test_statistics_are_named_one_by_one_in_order(x64):
    statistic = map_statistics(16, SIDE, [0.1, 0.2], 4, scales=(1.0,), peak_scales=(1.0,))
    x = _family(jnp.array([1.0, 0.7, 0.5]), jax.random.key(3))
    evaluate = jax.jit(lambda y: statistic(y))
    values = dict(zip(statistic.names, np.asarray(evaluate(x)), strict=True))
    power = bandpowers(x, SIDE, 4)
    assert len(values) == len(statistic.names)
    assert values["cl_11_b02"] == pytest.approx(float(jnp.log(power[2, 2])))
    assert np.tanh(values["cl_01_b03"]) == pytest.approx(float(power[1, 3] / jnp.sqrt(power[0, 3] * power[2, 3])))
    level = jnp.var(smooth(jnp.fft.rfft2(x), 16, (1.0,))[0, 1])
    assert values["var_1_s1"] == pytest.approx(float(jnp.log(level)))
    louder = dict(zip(statistic.names, np.asarray(evaluate(x.at[1].multiply(3.0))), strict=True))
    changed = {name for name in values if not np.isclose(values[name], louder[name], rtol=1e-6, atol=1e-9)}
    assert changed and all(name.startswith(("cl_11", "var_1", "peak_1", "mini_1")) for name in changed)


def test_statistics_do_not_change_when_the_map_is_shifted_or_turned(x64):
    statistic = map_statistics(16, SIDE, [0.1, 0.2], 4, scales=(1.0,), peak_scales=(1.0,))
    x = _family(jnp.array([1.0, 0.3, 0.5]), jax.random.key(4))
    moved = [torus_symmetry(key, x) for key in jax.random.split(jax.random.key(5), 6)]
    assert all(np.abs(other - x).max() > 0.1 for other in moved)
    for other in moved:
        np.testing.assert_allclose(statistic(other), statistic(x), rtol=1e-9, atol=1e-12)


def test_statistics_in_single_precision_stay_close(x64):
    x = _family(jnp.array([1.0, 0.7, 0.5]), jax.random.key(3))
    statistic = map_statistics(16, SIDE, [0.1, 0.2], 4)
    evaluate = jax.jit(lambda y: statistic(y))
    single = evaluate(x.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, evaluate(x), rtol=1e-3, atol=1e-3)


def test_statistics_refuse_wrong_maps_and_noise():
    with pytest.raises(ValueError, match="positive pixel noise"):
        map_statistics(16, SIDE, [0.1, -0.2], 4)
    with pytest.raises(ValueError, match=r"x with shape \(1, 16, 16\); got \(2, 16, 16\)"):
        map_statistics(16, SIDE, 0.1, 4)(jnp.zeros((2, 16, 16)))
    with pytest.raises(ValueError, match="smoothing scale >= 0"):
        map_statistics(16, SIDE, 0.1, 4, scales=(-1.0,))


def _linear_problem(n_stats=40, p=3, seed=0):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(n_stats, p)) * np.array([1.0, 1e-3, 30.0])
    root = np.eye(n_stats) + 0.4 * np.tril(rng.normal(size=(n_stats, n_stats))) / np.sqrt(n_stats)
    root = root * rng.lognormal(0, 2, n_stats)[:, None]
    return design, root, np.linalg.inv(root @ root.T)


def test_compression_of_a_linear_gaussian_model_is_its_maximum_likelihood(x64):
    design, root, precision = _linear_problem()
    theta0 = np.array([0.3, -1.0, 2.0])
    compression = moped(design, root @ root.T, design @ theta0 + 5.0, theta0)
    data = np.random.default_rng(1).normal(size=(7, 40))
    fisher = design.T @ precision @ design
    estimate = np.linalg.solve(fisher, design.T @ precision @ (data - 5.0).T).T
    np.testing.assert_allclose(compression(data), estimate, rtol=1e-8)
    np.testing.assert_allclose(compression.fisher, fisher, rtol=1e-8)


@pytest.mark.parametrize("shrinkage", [False, True])
def test_compression_from_simulations_finds_the_exact_fisher_matrix(x64, shrinkage):
    design, root, precision = _linear_problem()
    theta0 = jnp.array([0.3, -1.0, 2.0])

    def simulate(theta, key):
        return jnp.asarray(design) @ theta + jnp.asarray(root) @ jax.random.normal(key, (40,))

    settings = dict(shrinkage=shrinkage, batch_size=64)
    compression = score_compression(lambda x: x, simulate, theta0, jax.random.key(1), 1000, 10, **settings)
    exact = np.linalg.cholesky(design.T @ precision @ design)
    ratio = np.linalg.eigvalsh(np.linalg.solve(exact, np.linalg.solve(exact, compression.fisher).T))
    # A sample precision scatters by sqrt(2/n); shrinkage leaves a bias that grows with the correlations.
    assert np.abs(ratio - 1).max() < (0.35 if shrinkage else 5 * np.sqrt(2 / 1000))
    assert compression.n_simulations == 1010 and (compression.shrinkage > 0) == shrinkage
    t = compression(np.asarray(jax.vmap(lambda k: simulate(theta0, k))(jax.random.split(jax.random.key(2), 2000))))
    error = t.std(0) / np.sqrt(2000)
    assert np.all(np.abs(t.mean(0) - theta0) < 4 * np.sqrt(3) * error)  # the mean statistic has 1000 draws of its own


def test_shrinkage_keeps_more_information_when_draws_are_few():
    """Known Gaussian problem, 200 statistics in blocks, 400 draws: information left in t, over all of it."""
    rng = np.random.default_rng(5)
    block = 0.5 * np.eye(5) + 0.5
    covariance = np.kron(np.eye(40), block)
    slope = np.repeat(rng.normal(size=40), 5) * rng.normal(1.0, 0.5, size=200)

    def kept(estimate):
        weights = np.linalg.solve(estimate, slope)
        return (weights @ slope) ** 2 / (weights @ covariance @ weights) / (slope @ np.linalg.solve(covariance, slope))

    draws = rng.normal(size=(400, 200)) @ np.linalg.cholesky(covariance).T
    shrunk, rho = shrunk_covariance(draws)
    assert 0 < rho < 1
    assert kept(shrunk) > kept(np.cov(draws.T)) + 0.1
    assert kept(np.cov(draws.T)) == pytest.approx(1 - 200 / 400, abs=0.12)  # what a sample covariance must lose
    assert kept(covariance) == pytest.approx(1.0)


def test_shrinkage_weight_by_two_roads():
    samples = np.random.default_rng(0).normal(size=(30, 4)) @ np.linalg.cholesky(0.5 * np.eye(4) + 0.5).T
    unit = (samples - samples.mean(0)) / samples.std(0, ddof=1)
    variance = total = 0.0
    for i in range(4):
        for j in range(4):
            if i != j:
                w = unit[:, i] * unit[:, j]
                variance += 30 / 29**3 * np.sum((w - w.mean()) ** 2)
                total += (30 / 29 * w.mean()) ** 2
    covariance, rho = shrunk_covariance(samples)
    assert rho == pytest.approx(variance / total)
    np.testing.assert_allclose(np.diag(covariance), samples.var(0, ddof=1))


def test_hartlap_unbiases_the_inverse_covariance():
    rng = np.random.default_rng(0)
    trace = [np.trace(np.linalg.inv(np.cov(rng.normal(size=(30, 10)).T))) / 10 for _ in range(300)]
    error = np.std(trace) / np.sqrt(300)
    assert abs(hartlap(30, 10) * np.mean(trace) - 1) < 4 * error < abs(np.mean(trace) - 1)
    with pytest.raises(ValueError, match="more than n_stats"):
        hartlap(11, 10)


def test_compression_explains_what_it_cannot_do():
    design, root, _ = _linear_problem()
    mean, theta0, covariance = np.zeros(40), np.zeros(3), root @ root.T
    with pytest.raises(ValueError, match=r"mean_jacobian with shape \(40, 3\)"):
        moped(design.T, covariance, mean, theta0)
    with pytest.raises(ValueError, match="Fisher matrix is singular"):
        moped(design[:, [0, 1, 1]], covariance, mean, theta0)
    with pytest.raises(ValueError, match="positive definite"):
        moped(design, np.ones((40, 40)), mean, theta0)
    with pytest.raises(ValueError, match="non-finite"):
        moped(design * np.nan, covariance, mean, theta0)
    with pytest.raises(ValueError, match=r"Expected s with trailing shape \(40,\)"):
        moped(design, covariance, mean, theta0)(np.zeros(5))


def test_an_interrupted_compression_goes_on_from_its_batches(x64):
    """The batches that were kept are not simulated again, and the result is the same."""
    kept, computed, stop_after = {}, [], [3]

    def keep(name, compute):
        if name not in kept:
            if len(computed) == stop_after[0]:
                raise KeyboardInterrupt
            computed.append(name)
            kept[name] = compute()
        return kept[name]

    def build(keep):
        simulate = lambda theta, key: theta + jax.random.normal(key, (2,))  # noqa: E731
        arguments = (lambda x: jnp.concatenate([x, x**2]), simulate, jnp.array([1.0, 2.0]), jax.random.key(0), 40, 10)
        return score_compression(*arguments, batch_size=10, keep=keep)

    with pytest.raises(KeyboardInterrupt):
        build(keep)
    stop_after[0] = None
    again = build(keep)
    assert len(computed) == len(set(computed)) == 8  # four batches of values, four of derivatives, each once
    whole = build(lambda name, compute: compute())
    np.testing.assert_array_equal(again.matrix, whole.matrix)
