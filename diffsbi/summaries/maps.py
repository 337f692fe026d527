"""One vector of statistics of a set of maps: spectra, one-point moments, peaks and minima, with their names."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.bands import Bands, pairs
from diffsbi.summaries import points


class MapStatistics(eqx.Module):
    r"""Statistics of maps `x (n_bins, n_pix, n_pix)` → `(n_stats,)`, in the order of `names`.

    - `cl_ii_bNN`: log of the auto band power; `cl_ij_bNN`: artanh of $C^{ij}/\sqrt{C^{ii}C^{jj}}$, Fisher's transform
      of the correlation (a cross power may be negative: no logarithm). Together they hold all band powers.
    - `var_i_sS`, `skew_i_sS`, `kurt_i_sS`: `points.moments` of the map smoothed by S pixels.
    - `peak_i_sS_kN`, `mini_i_sS_kN`: $\sqrt{n + 3/8}$ (nearly constant variance, Anscombe 1948) of the soft number of
      maxima and minima in bins of height, in units of the smoothed noise's standard deviation.

    Smooth in x: forward and reverse derivatives exist everywhere. Build it with `map_statistics`.
    """

    bands: Bands
    noise: Array  # (n_bins,)
    scales: tuple[float, ...] = eqx.field(static=True)
    peak_scales: tuple[float, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    @property
    def n_stats(self) -> int:
        return len(self.names)

    def __call__(self, x: Float[Array, "bins n_pix n_pix"]) -> Float[Array, " stats"]:
        n_pix = self.bands.n_pix
        if jnp.shape(x) != (len(self.noise), n_pix, n_pix):
            raise ValueError(f"Expected x with shape {(len(self.noise), n_pix, n_pix)}; got {jnp.shape(x)}.")
        modes = jnp.fft.rfft2(x)
        smoothed = points.smooth(modes, n_pix, (*self.scales, *self.peak_scales))  # (scales, bins, n_pix, n_pix)
        one_point = points.moments(smoothed[: len(self.scales)])
        extrema = [self._extrema(m, s) for m, s in zip(smoothed[len(self.scales) :], self.peak_scales, strict=True)]
        return jnp.concatenate([self._spectra(modes), one_point.ravel(), *extrema])

    def _spectra(self, modes) -> Array:
        power = self.bands.powers(modes)
        first, second = np.array(pairs(modes.shape[0])).T
        auto = jnp.log(power[np.flatnonzero(first == second)])
        correlation = power * jnp.exp(-0.5 * (auto[first] + auto[second]))
        cross = jnp.arctanh(jnp.where((first == second)[:, None], 0.0, correlation))
        return jnp.where((first == second)[:, None], auto[first], cross).ravel()

    def _extrema(self, maps, scale) -> Array:
        unit = self.noise.astype(maps.dtype) * points.smoothed_noise(self.bands.n_pix, scale)
        snr = maps / unit[:, None, None]
        radius = max(1, round(scale))  # a window as wide as the filter: the flat top of a peak counts once
        return jnp.sqrt(points.extrema(snr, radius=radius) + 0.375).ravel()


def map_statistics(
    n_pix: int,
    side_deg: float,
    noise,
    n_bands: int = 12,
    *,
    edges=None,
    scales: tuple[float, ...] = (1.0, 2.0, 4.0),
    peak_scales: tuple[float, ...] = (2.0,),
) -> MapStatistics:
    """The default statistics of maps with white pixel noise.

    Args:
        n_pix: Pixels on a side.
        side_deg: Side of the maps, in degrees.
        noise: Noise standard deviation of a pixel in each bin, `(n_bins,)`; the unit of the peaks' heights.
        n_bands: Logarithmic multipole bands (or give their `edges`).
        scales: Gaussian smoothing of the one-point moments, in pixels.
        peak_scales: The same for peaks and minima.

    Raises:
        ValueError: If the noise is not positive, a scale is negative or a band holds no mode.
    """
    noise = np.atleast_1d(np.asarray(noise, float))
    if noise.ndim != 1 or not np.all(np.isfinite(noise) & (noise > 0)):
        raise ValueError(f"Expected one positive pixel noise for each bin; got {noise}.")
    bands = Bands(n_pix, side_deg, n_bands, edges)
    scales, peak_scales = tuple(map(float, scales)), tuple(map(float, peak_scales))
    for scale in (*scales, *peak_scales):
        points.smoothing(n_pix, scale)
    n_bins = len(noise)
    names = [f"cl_{i}{j}_b{b:02d}" for i, j in pairs(n_bins) for b in range(bands.n_bands)]
    names += [f"{m}_{i}_s{s:g}" for s in scales for i in range(n_bins) for m in ("var", "skew", "kurt")]
    kinds = [("peak", len(points.PEAK_EDGES) + 1), ("mini", len(points.MINIMUM_EDGES) + 1)]
    extrema = [(kind, k) for kind, count in kinds for k in range(count)]
    names += [f"{kind}_{i}_s{s:g}_k{k}" for s in peak_scales for i in range(n_bins) for kind, k in extrema]
    return MapStatistics(bands, jnp.asarray(noise), scales, peak_scales, tuple(names))
