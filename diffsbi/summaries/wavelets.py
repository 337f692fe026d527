r"""Scattering coefficients of tomographic maps on a torus: how much there is of each scale, and how it clusters."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.bands import check_grid

# Of the finest wavelet: radians per pixel, pixels, and the ratio of its axes times the number of directions. Those of
# Kymatio (Andreux et al. 2020), which Cheng et al. 2020 use too.
CENTRE, WIDTH, SLANT = 0.75 * np.pi, 0.8, 4.0


class WaveletStatistics(eqx.Module):
    r"""Scattering coefficients of maps `x (n_bins, n_pix, n_pix)` → `(n_stats,)`, in the order of `names`.

    With Morlet wavelets $\psi_{j,l}$ of scale $2^j$ pixels and direction l (`morlet`), and means over pixels and l:

    - `s1_i_jJ`: log of $S_1 = \langle |x_i * \psi_{J,l}| \rangle$, the l1 norm of the wavelet coefficients.
    - `s1_ik_jJ`: artanh of $(S_{ik}^2 - S_i^2 - S_k^2) / 2 S_i S_k$, $S_{ik} = \langle |(x_i + x_k) * \psi| \rangle$.
      Of Gaussian maps that is about the correlation of the bins; the triangle inequality keeps it within ±1 for any.
      The convolution is linear: the pairs cost no transform.
    - `s2_i_jJkK_dD`: log of $S_2 / S_1$, $S_2 = \langle ||x_i * \psi_{J,l}| * \psi_{K,m}| \rangle$ for K > J and
      directions l and m that are D steps of π / `n_angles` apart: how what has scale J clusters on the scale K.
    - `s2_ik_jJkK`: as `s1_ik` with $|x_i * \psi_{J,l}|$ for $x_i$, over all l and m: whether at the same places.
    - `s3_ik_jJkK`: correlation (real part) of $\langle |x_i * \psi_{J,l}| \rangle_l * \psi_{K,m}$ and
      $x_k * \psi_{K,m}$ over pixels and m: whether what has scale J sits on the hills, or in the valleys, that bin k
      has at scale K. It changes its sign with the map, as a bispectrum does; all the others stay.

    They are the same for shifted and reflected maps, and for quarter turns if `n_angles` is even. Derivatives exist
    everywhere, that of a modulus at zero being zero. Build it with `wavelet_statistics`.
    """

    filters: tuple[Array, ...]  # of each scale: even and odd part in k, (2, n_angles, grid, grid // 2 + 1)
    n_pix: int = eqx.field(static=True)
    side_deg: float = eqx.field(static=True)
    n_bins: int = eqx.field(static=True)
    order: int = eqx.field(static=True)
    signed: bool = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    @property
    def n_stats(self) -> int:
        return len(self.names)

    @property
    def ell(self) -> np.ndarray:
        """Multipole at the centre of the wavelets of each scale, `(n_scales,)`."""
        return CENTRE / 2.0 ** np.arange(len(self.filters)) * self.n_pix / np.deg2rad(self.side_deg)

    def __call__(self, x: Float[Array, "bins n_pix n_pix"]) -> Float[Array, " stats"]:
        shape = (self.n_bins, self.n_pix, self.n_pix)
        if jnp.shape(x) != shape:
            raise ValueError(f"Expected x with shape {shape}; got {jnp.shape(x)}.")
        modes = jnp.fft.rfft2(x, norm="forward")
        waves = [_filtered(modes, filters) for filters in self.filters]
        first, second = [], []
        for j, wave in enumerate(waves):
            norms = jnp.mean(_norms(wave), -1)
            first += [jnp.log(norms[: self.n_bins]), _correlations(norms, self.n_bins)]
            if j + 1 < len(waves) and (self.order == 2 or self.signed):
                found = _modulus(wave) if self.order == 2 else jnp.mean(_modulus(wave), 1, keepdims=True)
                modes = jnp.fft.rfft2(found, norm="forward")
                for k in range(j + 1, len(waves)):
                    second += self._second(_filtered(modes, self.filters[k]), waves[k], first[-2])
        return jnp.concatenate(first + second)

    def _second(self, found, wave, log_first) -> list[Array]:
        """Of `found`, what one scale holds filtered by the wavelets of another, (2, bins, angles or 1, angles, …)."""
        values = []
        if self.order == 2:
            norms = _norms(found)
            apart = jnp.tensordot(norms[: self.n_bins], jnp.asarray(_steps_apart(norms.shape[-1]), norms.dtype), 2)
            own = jnp.log(apart) - log_first[:, None]
            values += [own.ravel(), _correlations(jnp.mean(norms, (1, 2)), self.n_bins)]
        if self.signed:
            mean = jnp.mean(found, 2)
            product = jnp.einsum("cilxy,cklxy->ik", mean, wave)
            own, other = (jnp.sum(w**2, (0, 2, 3, 4)) for w in (mean, wave))
            values.append((product * jax.lax.rsqrt(own[:, None] * other[None, :])).ravel())
        return values


def wavelet_statistics(
    n_pix: int,
    side_deg: float,
    n_bins: int,
    *,
    n_scales: int | None = None,
    n_angles: int = 4,
    order: int = 1,
    signed: bool = True,
    crop: bool = True,
) -> WaveletStatistics:
    """Scattering coefficients (Bruna & Mallat 2013) of lensing maps (Cheng et al. 2020), and what their phases add.

    `s1` is the l1 norm of oriented wavelets; Ajani et al. 2021 have that of isotropic ones, for each range of amplitude
    by itself. `s3` is one of the scattering spectra of Cheng et al. 2023 (arXiv:2306.17210), without their phase.

    Each bin takes L J transforms to complex maps for `s1`, with J scales and L directions. With `s2` it takes L J real
    transforms and L² J (J − 1) / 2 to complex maps more; with `s3` alone, both L times fewer.

    Args:
        n_pix: Pixels on a side (even).
        side_deg: Side of the maps, in degrees.
        n_bins: Maps that are seen together.
        n_scales: Scales of 1, 2, 4, … pixels; by default all of whose waves at least one fits the map.
        n_angles: Directions of the wavelets in half a turn.
        order: 1 for `s1`, 2 for `s2` as well: many numbers, which in noisy lensing maps say little that others do not.
        signed: Also `s3`.
        crop: Transform each scale on the coarsest grid that holds all modes of its wavelets. Shifts by pixels that are
            finer than this grid, reflections and turns then change the means of the moduli by less than 0.1 %, not by
            rounding alone.

    Raises:
        ValueError: On a grid that is not valid, no bin or direction, another order, or more scales than the map holds.
    """
    check_grid(n_pix, side_deg)
    most = 1 + int(math.log2(CENTRE * n_pix / (2 * np.pi)))
    n_scales = most if n_scales is None else n_scales
    if not 1 <= n_scales <= most:
        raise ValueError(f"Expected 1 <= n_scales <= {most}, whose waves fit {n_pix} pixels; got {n_scales}.")
    if n_bins < 1 or n_angles < 1:
        raise ValueError(f"Expected n_bins >= 1 and n_angles >= 1; got {n_bins} and {n_angles}.")
    if order not in (1, 2):
        raise ValueError(f"Expected order 1 or 2; got {order}.")
    filters = []
    for j in range(n_scales):
        psi = np.stack([morlet(n_pix, j, direction, n_angles) for direction in range(n_angles)])
        mirrored = np.roll(psi[:, ::-1, ::-1], 1, (1, 2))  # at −k
        half = 0.5 * np.stack([psi + mirrored, psi - mirrored])[..., : n_pix // 2 + 1]
        # The wavelet's tail is e-33 of its peak at the Nyquist mode of this grid, eight widths from the centre.
        grid = min(n_pix, 2 * math.ceil(2 * n_pix / 2**j)) if crop else n_pix
        filters.append(jnp.asarray(_cropped(half, grid)))
    names = _names(n_bins, n_scales, n_angles, order, signed)
    return WaveletStatistics(tuple(filters), n_pix, float(side_deg), n_bins, order, signed, names)


def morlet(n_pix: int, scale: int, direction: int, n_angles: int) -> np.ndarray:
    r"""Transform of a Morlet wavelet sampled on a torus, real, at the modes of `fft2`, `(n_pix, n_pix)`.

    $\hat\psi(k) = \sum_a G(k + 2\pi a - \xi) - \beta\, G(k + 2\pi a)$ with whole numbers $a$ and
    $G(k) = e^{-\sigma^2 (k_\parallel^2 + k_\perp^2 / s^2) / 2}$ along and across ξ. The sum over $a$ is what sampling
    at the pixels does, and β makes the mean $\hat\psi(0)$ zero. ξ and 1/σ halve from one scale to the next; the filter
    narrows across ξ as `n_angles` grows, $s = \min(1, 4 / \mathtt{n\_angles})$.
    """
    k = 2 * np.pi * (np.fft.fftfreq(n_pix)[:, None] + np.arange(-2, 3)).ravel()
    angle = np.pi * direction / n_angles
    along = np.cos(angle) * k[:, None] + np.sin(angle) * k[None, :]
    across = np.cos(angle) * k[None, :] - np.sin(angle) * k[:, None]
    width, slant = WIDTH * 2.0**scale, min(1.0, SLANT / n_angles)

    def bell(centre):
        values = np.exp(-0.5 * width**2 * ((along - centre) ** 2 + (across / slant) ** 2))
        return values.reshape(n_pix, 5, n_pix, 5).sum((1, 3))

    wave, envelope = bell(CENTRE / 2.0**scale), bell(0.0)
    psi = wave - wave[0, 0] / envelope[0, 0] * envelope
    psi[0, 0] = 0.0  # were it not for rounding
    return psi


def _names(n_bins: int, n_scales: int, n_angles: int, order: int, signed: bool) -> tuple[str, ...]:
    bins, cross = range(n_bins), [(i, k) for i in range(n_bins) for k in range(i + 1, n_bins)]
    first, second = [], []
    for j in range(n_scales):
        first += [f"s1_{i}_j{j}" for i in bins] + [f"s1_{i}{k}_j{j}" for i, k in cross]
        for scales in (f"j{j}k{larger}" for larger in range(j + 1, n_scales)):
            if order == 2:
                second += [f"s2_{i}_{scales}_d{d}" for i in bins for d in range(n_angles // 2 + 1)]
                second += [f"s2_{i}{k}_{scales}" for i, k in cross]
            second += [f"s3_{i}{k}_{scales}" for i in bins for k in bins] if signed else []
    return tuple(first + second)


def _cropped(modes, n: int):
    """Modes of the half plane of a grid of n pixels on a side, from those of a finer one (or of the same)."""
    if n == modes.shape[-2]:
        return modes
    xp = np if isinstance(modes, np.ndarray) else jnp
    return xp.concatenate([modes[..., : n // 2, : n // 2 + 1], modes[..., -(n // 2) :, : n // 2 + 1]], -2)


def _filtered(modes, filters) -> Float[Array, "2 *maps angles grid grid"]:
    """Real and imaginary part of the convolution with the wavelets of one scale: two real transforms each."""
    n = filters.shape[-2]
    modes = _cropped(modes, n)
    filters = filters.astype(modes.real.dtype).reshape((2,) + (1,) * (modes.ndim - 2) + filters.shape[1:])
    both = jnp.stack([modes, -1j * modes])[..., None, :, :] * filters
    return jnp.fft.irfft2(both, s=(n, n), norm="forward")


def _modulus(waves: Float[Array, "2 *maps grid grid"]) -> Float[Array, "*maps grid grid"]:
    # Nothing is lost to `tiny`; without it the derivative at zero is not finite.
    return jnp.sqrt(waves[0] ** 2 + waves[1] ** 2 + jnp.finfo(waves.dtype).tiny)


def _norms(waves: Float[Array, "2 bins *l grid grid"]) -> Array:
    """Mean modulus of every bin, then of the sums of pairs in the order of the upper triangle, `(norms, *l)`."""
    sums = [waves[:, i : i + 1] + waves[:, i + 1 :] for i in range(waves.shape[1] - 1)]
    return jnp.concatenate([jnp.mean(_modulus(w), (-2, -1)) for w in (waves, *sums)])


def _correlations(norms: Float[Array, " norms"], n_bins: int) -> Float[Array, " pairs"]:
    """The artanh of what the norm of a sum of two says of their correlation."""
    first, second = np.triu_indices(n_bins, 1)
    a, b, both = norms[first], norms[second], norms[n_bins:]
    return jnp.arctanh((both**2 - a**2 - b**2) / (2 * a * b))


def _steps_apart(n_angles: int) -> np.ndarray:
    """Weights `(n_angles, n_angles, n_angles // 2 + 1)` of the mean over pairs of directions so many steps apart."""
    steps = np.subtract.outer(np.arange(n_angles), np.arange(n_angles)) % n_angles
    weights = np.equal.outer(np.minimum(steps, n_angles - steps), np.arange(n_angles // 2 + 1))
    return weights / weights.sum((0, 1))
