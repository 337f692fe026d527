"""Wavelets on a torus and the scattering coefficients of maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.bands import Bands
from diffsbi.summaries import WaveletStatistics, wavelet_statistics
from diffsbi.summaries.wavelets import CENTRE, WIDTH, morlet

N_PIX, SIDE, N_BINS = 16, 2.5, 2


def _power(n_pix, slope=1.0):
    """Amplitude of the modes of a red spectrum, at the modes of `rfft2`."""
    return (0.02 + np.hypot(np.fft.fftfreq(n_pix)[:, None], np.fft.rfftfreq(n_pix))) ** -slope


def _gaussian(seed, n, n_pix=N_PIX, n_bins=N_BINS, slope=1.0):
    """Gaussian maps of unit variance, the bins correlated by 0.6."""
    white = np.random.default_rng(seed).normal(size=(n, n_bins, n_pix, n_pix))
    g = np.fft.irfft2(np.fft.rfft2(white) * _power(n_pix, slope), s=(n_pix, n_pix))
    g /= np.sqrt(np.mean(np.fft.irfft2(_power(n_pix, slope), s=(n_pix, n_pix)) ** 2)) * n_pix
    g[:, 1:] = 0.6 * g[:, :1] + 0.8 * g[:, 1:]
    return jnp.asarray(g)


def _maps(seed=0, n=1, **settings):
    """Log-normal maps with white noise."""
    g = _gaussian(seed, n, **settings)
    return jnp.exp(g) + 0.3 * jnp.asarray(np.random.default_rng(seed + 1).normal(size=g.shape))


def _evaluate(statistics):
    return jax.jit(jax.vmap(lambda y: statistics(y)))


@pytest.fixture(scope="module")
def exact():
    """Without subsampling, compiled once for this module; to be called with float64 rows."""
    with jax.enable_x64(True):
        statistics = wavelet_statistics(N_PIX, SIDE, N_BINS, order=2, crop=False)
        evaluate = _evaluate(statistics)

    def values(x):
        rows = jnp.pad(x, ((0, -len(x) % 8), (0, 0), (0, 0), (0, 0)), mode="wrap")  # one size, one compilation
        return np.concatenate([evaluate(rows[i : i + 8]) for i in range(0, len(rows), 8)])[: len(x)]

    return statistics, values


def _direct(x, n_scales, n_angles):
    """Every S1, S2 by complex transforms of the full plane, one filter after another."""
    n_pix = x.shape[-1]
    psi = [[morlet(n_pix, j, m, n_angles) for m in range(n_angles)] for j in range(n_scales)]

    def waves(maps, j, m):
        return np.fft.ifft2(np.fft.fft2(maps) * psi[j][m])

    pairs = [(i, k) for i in range(len(x)) for k in range(i + 1, len(x))]

    def norms(w):
        return np.array([np.abs(w[i]).mean() for i in range(len(x))] + [np.abs(w[i] + w[k]).mean() for i, k in pairs])

    def correlations(s):
        return [
            np.arctanh((s[len(x) + p] ** 2 - s[i] ** 2 - s[k] ** 2) / 2 / s[i] / s[k]) for p, (i, k) in enumerate(pairs)
        ]

    directions = range(n_angles)
    values = {}
    for j in range(n_scales):
        s1 = np.mean([norms(waves(x, j, m)) for m in directions], 0)
        values |= {f"s1_{i}_j{j}": np.log(s1[i]) for i in range(len(x))}
        values |= {f"s1_{i}{k}_j{j}": c for (i, k), c in zip(pairs, correlations(s1), strict=True)}
        for larger in range(j + 1, n_scales):
            s2 = {(a, b): norms(waves(np.abs(waves(x, j, a)), larger, b)) for a in directions for b in directions}
            for d in range(n_angles // 2 + 1):
                apart = [v for (a, b), v in s2.items() if min((a - b) % n_angles, (b - a) % n_angles) == d]
                ratio = np.log(np.mean(apart, 0)[: len(x)] / s1[: len(x)])
                values |= {f"s2_{i}_j{j}k{larger}_d{d}": ratio[i] for i in range(len(x))}
            together = correlations(np.mean(list(s2.values()), 0))
            values |= {f"s2_{i}{k}_j{j}k{larger}": c for (i, k), c in zip(pairs, together, strict=True)}
            mean = np.mean([np.abs(waves(x, j, a)) for a in directions], 0)
            u, w = (np.array([waves(maps, larger, b) for b in directions]) for maps in (mean, x))
            for i, k in np.ndindex(len(x), len(x)):
                product, own, other = (
                    np.vdot(a, b).real for a, b in ((u[:, i], w[:, k]), (u[:, i],) * 2, (w[:, k],) * 2)
                )
                values[f"s3_{i}{k}_j{j}k{larger}"] = product / np.sqrt(own * other)
    return values


@pytest.mark.parametrize("n_angles", [3, 4, 8])
@pytest.mark.parametrize("n_pix", [16, 20, 64])
def test_wavelets_have_no_mean_and_together_see_every_mode(n_pix, n_angles):
    n_scales = len(wavelet_statistics(n_pix, SIDE, 1, n_angles=n_angles).filters)
    psi = np.array([[morlet(n_pix, j, m, n_angles) for m in range(n_angles)] for j in range(n_scales)])
    assert np.all(psi[..., 0, 0] == 0) and np.all(np.abs(np.fft.ifft2(psi).sum((-2, -1))) < 1e-12)
    seen = np.sum(psi**2, (0, 1))
    seen = 0.5 * (seen + np.roll(seen[::-1, ::-1], 1, (0, 1)))  # a real map has the mode −k too
    seen = np.delete(seen.ravel(), 0)
    assert 0.08 < seen.min() and seen.max() < 1.15  # frame bounds, but for the mean of the map
    if n_angles % 2 == 0:
        turned = np.roll(np.rot90(psi, 1, (-2, -1)), 1, -2)  # by a quarter about the mode zero
        permuted = np.concatenate(
            [psi[:, n_angles // 2 :], np.roll(psi[:, : n_angles // 2, ::-1, ::-1], 1, (-2, -1))], 1
        )
        np.testing.assert_allclose(turned, permuted, atol=1e-14)


def test_wavelets_are_those_of_their_formula_in_pixel_space():
    """Gabor function minus a bell, written down at the pixels of a torus, and its convolution summed up there."""
    n, scale, n_angles = 8, 1, 4
    width, centre = WIDTH * 2**scale, CENTRE / 2**scale
    u = (np.arange(n)[:, None] + n * np.arange(-3, 4)).ravel()
    for direction in range(n_angles):
        angle = np.pi * direction / n_angles
        along = np.cos(angle) * u[:, None] + np.sin(angle) * u
        bell = np.exp(-(u[:, None] ** 2 + u**2) / (2 * width**2)) / (2 * np.pi * width**2)
        wave, bell = (a.reshape(n, 7, n, 7).sum((1, 3)) for a in (bell * np.exp(1j * centre * along), bell))
        psi = wave - wave.sum() / bell.sum() * bell
        found = morlet(n, scale, direction, n_angles)
        np.testing.assert_allclose(np.fft.ifft2(found), psi, atol=1e-12)
        x = np.random.default_rng(direction).normal(size=(n, n))
        shifts = [(i, k) for i in range(n) for k in range(n)]
        convolved = sum(psi[s] * np.roll(x, s, (0, 1)) for s in shifts)
        np.testing.assert_allclose(np.fft.ifft2(np.fft.fft2(x) * found), convolved, atol=1e-12)


def test_every_number_has_its_name_and_is_that_of_direct_sums(x64, exact):
    statistics, values = exact
    x = _maps(n=2)
    for row, found in zip(np.asarray(x), values(x), strict=True):
        wanted = _direct(row, 3, 4)
        assert statistics.n_stats == len(wanted) and set(wanted) == set(statistics.names)
        np.testing.assert_allclose(found, [wanted[name] for name in statistics.names], rtol=1e-11, atol=1e-12)


def test_other_settings_by_direct_sums(x64):
    """Three bins, an odd number of directions, a grid that is no power of two; and one bin to first order."""
    statistics = wavelet_statistics(12, SIDE, 3, n_scales=2, n_angles=3, order=2, crop=False)
    x = _maps(n_pix=12, n_bins=3)[0]
    wanted = _direct(np.asarray(x), 2, 3)
    np.testing.assert_allclose(
        _evaluate(statistics)(x[None])[0], [wanted[n] for n in statistics.names], rtol=1e-11, atol=1e-12
    )
    single = wavelet_statistics(12, SIDE, 1, n_scales=2, n_angles=3)
    assert single.names == ("s1_0_j0", "s1_0_j1", "s3_00_j0k1")
    wanted = [wanted[name] for name in ("s1_1_j0", "s1_1_j1", "s3_11_j0k1")]
    np.testing.assert_allclose(_evaluate(single)(x[None, 1:2])[0], wanted, rtol=1e-11, atol=1e-12)
    few = wavelet_statistics(12, SIDE, 1, n_scales=2, n_angles=3, signed=False)
    assert few.names == single.names[:2]
    np.testing.assert_allclose(_evaluate(few)(x[None, 1:2])[0], wanted[:2], rtol=1e-11)


def test_shifts_flips_and_quarter_turns_change_nothing(x64, exact):
    x = _maps()[0]
    moved = [jnp.roll(x, (3, 5), (1, 2)), x[:, ::-1], x[:, :, ::-1], jnp.rot90(x, 1, (1, 2)), jnp.swapaxes(x, 1, 2), -x]
    found = exact[1](jnp.stack([x, *moved]))
    odd = np.array([name.startswith("s3") for name in exact[0].names])
    found[-1, odd] *= -1
    np.testing.assert_allclose(found[1:], np.broadcast_to(found[0], found[1:].shape), rtol=1e-10, atol=1e-12)


def test_coarse_grids_cost_little(x64):
    """What they change is small beside the scatter of the statistics from map to map, as are shifts then."""
    x = _maps(n_pix=32, n_bins=1, n=16, seed=5)
    full, crop = (wavelet_statistics(32, SIDE, 1, order=2, crop=crop) for crop in (False, True))
    assert full.names == crop.names and [f.shape[-2] for f in crop.filters] == [32, 32, 32, 16]
    evaluate, wanted = _evaluate(crop), np.asarray(_evaluate(full)(x))
    for found in (evaluate(x), evaluate(jnp.roll(x, (1, 1), (2, 3)))):
        assert np.abs(found - wanted).max() < 1e-3
        assert np.all(np.abs(found - wanted).max(0) < 0.05 * wanted.std(0))


def test_first_order_of_gaussian_maps_is_analytic(x64, exact):
    r"""|W| of a complex normal W has the mean $\sqrt{\pi}/2\,\sigma$, $\sigma^2 = \sum_k P(k) |\hat\psi(k)|^2$."""
    statistics, values = exact
    n, power = 400, np.abs(np.fft.fft2(np.fft.irfft2(_power(N_PIX), s=(N_PIX, N_PIX)))) ** 2
    found = values(_gaussian(3, n))
    column = {name: found[:, i] for i, name in enumerate(statistics.names)}
    for j in range(3):
        sigma = np.sqrt([np.sum(power * morlet(N_PIX, j, m, 4) ** 2) / np.sum(power) for m in range(4)])
        wanted = np.mean(np.sqrt(np.pi) / 2 * sigma)
        for i in range(N_BINS):
            s1 = np.exp(column[f"s1_{i}_j{j}"])
            assert abs(s1.mean() - wanted) < 4 * s1.std() / np.sqrt(n)
            assert abs(s1.mean() - 1.05 * wanted) > 4 * s1.std() / np.sqrt(n)
        correlation = np.tanh(column[f"s1_01_j{j}"])
        assert abs(correlation.mean() - 0.6) < 4 * correlation.std() / np.sqrt(n)


def test_second_order_sees_what_spectra_do_not(x64, exact):
    """Log-normal maps, and the same moduli of the modes with the phases of noise: band powers cannot tell."""
    statistics, values = exact
    skewed = jnp.exp(1.5 * _gaussian(7, 100))
    phases = jnp.angle(jnp.fft.rfft2(_gaussian(8, 100)))
    plain = jnp.fft.irfft2(jnp.abs(jnp.fft.rfft2(skewed)) * jnp.exp(1j * phases), s=(N_PIX, N_PIX))
    auto = jax.vmap(Bands(N_PIX, SIDE, 4))
    np.testing.assert_allclose(auto(skewed)[:, jnp.array([0, 2])], auto(plain)[:, jnp.array([0, 2])], rtol=1e-9)
    difference = values(skewed) - values(plain)
    pull = dict(zip(statistics.names, difference.mean(0) / difference.std(0) * np.sqrt(100), strict=True))
    hills = [pull[f"s3_{i}{k}_j0k{larger}"] for i in range(N_BINS) for k in range(N_BINS) for larger in (1, 2)]
    sparse = [pull[f"s1_{i}_j{j}"] for i in range(N_BINS) for j in range(2)]
    clustered = [pull[f"s2_{i}_j0k{k}_d{d}"] for i in range(N_BINS) for k in (1, 2) for d in range(3)]
    assert max(sparse) < -8 and min(clustered + hills) > 8  # the same power in fewer places: a smaller l1 norm


def test_derivatives_are_those_of_finite_differences(x64):
    statistics = wavelet_statistics(N_PIX, SIDE, N_BINS, n_scales=2, order=2)
    x, direction = _maps()[0], _gaussian(11, 1, slope=0.0)[0]
    weights = jnp.asarray(np.random.default_rng(2).normal(size=statistics.n_stats))
    value = jax.jit(lambda y: statistics(y) @ weights)
    gradient = jax.jit(jax.grad(lambda y: statistics(y) @ weights))
    finite = (value(x + 1e-5 * direction) - value(x - 1e-5 * direction)) / 2e-5
    assert jnp.sum(gradient(x) * direction) == pytest.approx(float(finite), rel=1e-6)
    tangent = jax.jit(lambda y: jax.jvp(statistics, (y,), (direction,))[1] @ weights)(x)
    assert tangent == pytest.approx(float(finite), rel=1e-6)


def test_single_precision_stays_close(x64, exact):
    x = _maps(n=8)
    single = _evaluate(exact[0])(x.astype(jnp.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact[1](x), rtol=1e-4, atol=1e-4)


def test_scales_have_their_multipoles():
    statistics = wavelet_statistics(64, 2.5, 5)
    assert isinstance(statistics, WaveletStatistics) and statistics.n_stats == 5 * 15 + 10 * 25
    assert wavelet_statistics(64, 2.5, 5, order=2).n_stats == 5 * 15 + 10 * (5 * 3 + 10 + 25)
    nyquist = np.pi * 64 / np.deg2rad(2.5)
    np.testing.assert_allclose(statistics.ell, 0.75 * nyquist / 2.0 ** np.arange(5))
    assert statistics.ell[-1] / 2 < 2 * np.pi / np.deg2rad(2.5) < statistics.ell[-1]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_pix=15), "even n_pix >= 4; got 15"),
        (dict(side_deg=0.0), "side_deg > 0 degrees; got 0"),
        (dict(n_bins=0), "n_bins >= 1 and n_angles >= 1; got 0 and 4"),
        (dict(n_angles=0), "n_bins >= 1 and n_angles >= 1; got 2 and 0"),
        (dict(n_scales=4), "1 <= n_scales <= 3, whose waves fit 16 pixels; got 4"),
        (dict(n_scales=0), "1 <= n_scales <= 3, whose waves fit 16 pixels; got 0"),
        (dict(order=3), "order 1 or 2; got 3"),
    ],
)
def test_settings_that_cannot_be_met_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        wavelet_statistics(**dict(n_pix=N_PIX, side_deg=SIDE, n_bins=N_BINS) | settings)


@pytest.mark.parametrize("shape", [(2, 16, 18), (3, 16, 16), (2, 32, 32), (16, 16, 2), (4, 2, 16, 16)])
def test_maps_of_another_shape_are_refused(shape):
    statistics = wavelet_statistics(N_PIX, SIDE, N_BINS)
    with pytest.raises(ValueError, match=r"x with shape \(2, 16, 16\); got \(" + str(shape[0])):
        statistics(jnp.zeros(shape))
