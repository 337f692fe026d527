"""One-point moments and peaks of smoothed maps: smooth in the map, so `jax` derivatives of their means are right."""

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float

PEAK_EDGES = (1.0, 2.0, 3.0, 4.0)
MINIMUM_EDGES = (-3.0, -2.0, -1.0)


def smoothing(n_pix: int, scale: float) -> np.ndarray:
    r"""Gaussian filter $e^{-k^2 s^2/2}$ of `scale` s pixels on the `rfft2` modes, shape `(n_pix, n_pix // 2 + 1)`."""
    if not scale >= 0:
        raise ValueError(f"Expected a smoothing scale >= 0 pixels; got {scale}.")
    k = 2 * np.pi * np.fft.fftfreq(n_pix)
    kx = 2 * np.pi * np.fft.rfftfreq(n_pix)
    return np.exp(-0.5 * scale**2 * (k[:, None] ** 2 + kx[None, :] ** 2))


def smoothed_noise(n_pix: int, scale: float) -> float:
    """Standard deviation of unit white noise after smoothing with `scale` pixels."""
    k = 2 * np.pi * np.fft.fftfreq(n_pix)
    return float(np.mean(np.exp(-(scale**2) * k**2)))  # the filter is a product of two equal ones


def smooth(modes: Array, n_pix: int, scales: tuple[float, ...]) -> Float[Array, "scales bins n_pix n_pix"]:
    """Maps with modes `rfft2(x)` smoothed by Gaussians of `scales` pixels, all at once."""
    window = jnp.asarray(np.stack([smoothing(n_pix, s) for s in scales]), modes.real.dtype)
    return jnp.fft.irfft2(modes[None] * window[:, None], s=(n_pix, n_pix))


def moments(maps: Float[Array, "*n n_pix n_pix"], clip: float = 5.0) -> Float[Array, "*n 3"]:
    r"""Log variance, skewness and excess kurtosis of each map, shape `(*n, 3)`.

    With ν the map minus its mean over its standard deviation and $c(\nu) = a \tanh(\nu/a)$, `clip` a, the last two are
    ⟨c³⟩ and ⟨c⁴⟩ − 3: smooth, and a single extreme pixel cannot dominate them as it does the plain moments.
    """
    centred = maps - jnp.mean(maps, (-2, -1), keepdims=True)
    variance = jnp.mean(centred**2, (-2, -1))
    clipped = clip * jnp.tanh(centred * (jax.lax.rsqrt(variance) / clip)[..., None, None])
    third, fourth = jnp.mean(clipped**3, (-2, -1)), jnp.mean(clipped**4, (-2, -1))
    return jnp.stack([jnp.log(variance), third, fourth - 3.0], -1)


def dominance(
    maps: Float[Array, "*n n_pix n_pix"], temperature: float, radius: int = 1
) -> Float[Array, "*n n_pix n_pix"]:
    r"""How far each pixel is the maximum of its (2 `radius` + 1)² window: $e^{d/T} / \sum_\mathrm{window} e^{d'/T}$.

    The indicator of a local maximum is piecewise constant: its automatic derivative is zero although its mean moves
    with the parameters. This softmax is smooth, tends to that indicator as the temperature T falls, and sums to about
    one over the flat top of a peak at any T below the peak's relief. Neighbours wrap around: the maps are periodic.
    """
    scaled = maps / temperature
    total = scaled
    for axis in (-2, -1):
        shifts = [jnp.roll(total, s, axis) for s in range(-radius, radius + 1)]
        total = jax.nn.logsumexp(jnp.stack(shifts), 0)
    return jnp.exp(scaled - total)


def soft_histogram(
    height: Array, weight: Array, edges: tuple[float, ...], width: float = 0.15
) -> Float[Array, "*n bins"]:
    """Weighted counts of `height` over the last two axes between `edges` (the outer bins open), with sigmoid walls."""
    walls = jnp.asarray((-jnp.inf, *edges, jnp.inf), height.dtype).reshape((-1,) + (1,) * height.ndim)
    above = (weight[None] * jax.nn.sigmoid((height[None] - walls) / width)).sum((-2, -1))
    return jnp.moveaxis(above[:-1] - above[1:], 0, -1)


def peaks(
    snr: Float[Array, "*n n_pix n_pix"],
    edges: tuple[float, ...] = PEAK_EDGES,
    *,
    temperature: float = 0.05,
    radius: int = 1,
    width: float = 0.15,
) -> Float[Array, "*n bins"]:
    """Soft number of local maxima of `snr` in bins of height (`len(edges) + 1` of them, the outer two open)."""
    return soft_histogram(snr, dominance(snr, temperature, radius), edges, width)


def minima(
    snr: Float[Array, "*n n_pix n_pix"], edges: tuple[float, ...] = MINIMUM_EDGES, **settings
) -> Float[Array, "*n bins"]:
    """Soft number of local minima of `snr` in bins of height: the maxima of −`snr`, bins from low to high."""
    return peaks(-snr, tuple(-e for e in reversed(edges)), **settings)[..., ::-1]


def extrema(snr: Float[Array, "bins n_pix n_pix"], *, temperature: float = 0.05, radius: int = 1) -> Array:
    """`peaks` then `minima` with their default edges, `(n_bins, peak + minimum bins)`, in one pass over the window."""
    both = jnp.stack([snr, -snr])
    weight = dominance(both, temperature, radius)
    low = tuple(-e for e in reversed(MINIMUM_EDGES))
    return jnp.concatenate(
        [soft_histogram(snr, weight[0], PEAK_EDGES), soft_histogram(-snr, weight[1], low)[..., ::-1]], -1
    )
