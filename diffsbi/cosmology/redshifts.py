r"""Source redshift distributions: Smail et al. with Gaussian photo-z errors, or a table."""

import hashlib

import numpy as np
from scipy.integrate import cumulative_simpson
from scipy.interpolate import PchipInterpolator
from scipy.special import erf

Z_MAX = 10.0
_FINE = np.linspace(0.0, Z_MAX, 20_001)


class RedshiftBins:
    """n_i(z) of every bin on a fine grid, each normalised to one; built once, does not depend on theta."""

    def __init__(self, z: np.ndarray, n: np.ndarray):
        self.z = z
        self.n = n / np.trapezoid(n, z, axis=-1)[:, None]
        self._digest = hashlib.sha256(self.z.tobytes() + self.n.tobytes()).hexdigest()

    def __eq__(self, other) -> bool:
        return isinstance(other, RedshiftBins) and self._digest == other._digest

    def __hash__(self) -> int:
        return int(self._digest[:15], 16)

    @property
    def n_bins(self) -> int:
        return len(self.n)

    def __call__(self, z) -> np.ndarray:
        """n_i(z), shape `(n_bins, *z.shape)`; zero outside the grid."""
        return np.stack([np.interp(z, self.z, row, left=0.0, right=0.0) for row in self.n])


def smail(a: float, b: float, z0: float, n_bins: int, photo_z: float = 0.05) -> RedshiftBins:
    r"""Equal-number bins of $n(z) \propto z^a \exp[-(z/z_0)^b]$, z < 10, each smeared by $\sigma_z = $ `photo_z` (1+z).

    Bin i is $n(z)\,\frac12[\mathrm{erf}\frac{z_{i+1}-z}{\sqrt2\sigma_z} - \mathrm{erf}\frac{z_i-z}{\sqrt2\sigma_z}]$,
    edges at the quantiles of n(z).
    """
    for name, value in {"a": a, "b": b, "z0": z0, "photo_z": photo_z, "n_bins": n_bins}.items():
        if not value > 0:
            raise ValueError(f"Expected {name} > 0; got {value}.")
    parent = _FINE**a * np.exp(-((_FINE / z0) ** b))
    edges = smail_edges(a, b, z0, n_bins)
    width = 1 / (np.sqrt(2) * photo_z * (1 + _FINE))
    step = erf((edges[:, None] - _FINE) * width)
    return RedshiftBins(_FINE, 0.5 * parent * np.diff(step, axis=0))


def smail_edges(a: float, b: float, z0: float, n_bins: int) -> np.ndarray:
    """Edges in true redshift of `n_bins` bins of equal number, from 0 to 10."""
    parent = _FINE**a * np.exp(-((_FINE / z0) ** b))
    cumulative = cumulative_simpson(parent, x=_FINE, initial=0)
    inner = np.interp(np.arange(1, n_bins) / n_bins, cumulative / cumulative[-1], _FINE)
    return np.concatenate([[0.0], inner, [Z_MAX]])


def tabulated(z, n) -> RedshiftBins:
    """Bins from a table: `z` (m,) increasing, `n` (n_bins, m) ≥ 0; monotone cubic interpolation, zero outside.

    Raises:
        ValueError: If z is not increasing or leaves (0, 10), or n is negative, non-finite, empty or misshapen.
    """
    z, n = np.asarray(z, float), np.atleast_2d(np.asarray(n, float))
    if z.ndim != 1 or n.shape[-1] != len(z) or len(z) < 4:
        raise ValueError(f"Expected z with shape (m,), m >= 4, and n with shape (n_bins, m); got {z.shape}, {n.shape}.")
    if not (np.isfinite(z).all() and np.isfinite(n).all()):
        raise ValueError("Expected a finite redshift table; got NaN or infinite values.")
    if (np.diff(z) <= 0).any():
        at = int(np.argmax(np.diff(z) <= 0))
        raise ValueError(
            f"Expected strictly increasing z in the n(z) table; got z[{at}] = {z[at]}, z[{at + 1}] = {z[at + 1]}."
        )
    if z[0] < 0 or z[-1] > Z_MAX:
        raise ValueError(f"Expected z within [0, {Z_MAX:g}]; got [{z[0]}, {z[-1]}].")
    if (n < 0).any() or (n.sum(axis=1) <= 0).any():
        raise ValueError("Expected n(z) >= 0 with at least one positive value in every bin.")
    inside = (z[0] <= _FINE) & (z[-1] >= _FINE)
    fine = np.zeros((len(n), len(_FINE)))
    fine[:, inside] = PchipInterpolator(z, n, axis=1)(_FINE[inside])
    return RedshiftBins(_FINE, fine)
