r"""Constant quadrature and interpolation operators, built once in NumPy (float64).

Everything that does not depend on the parameters is a matrix made here; what is left to trace are matrix products.
"""

import numpy as np
from numpy.polynomial import legendre
from scipy.interpolate import CubicSpline


def gauss_legendre_panel(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Nodes `t` and weights on (0, 1) and the integration matrix $Q_{jm}$, $\int_0^{t_j} f = \sum_m Q_{jm} f(t_m)$.

    `Q` integrates the polynomial interpolant of `f` in the nodes exactly, so it converges spectrally for smooth `f`.
    """
    x, w = legendre.leggauss(n)
    modes = np.arange(n)
    # Legendre coefficients of the interpolant are exact sums over Gauss nodes; integrate each polynomial from -1.
    to_modes = (modes + 0.5)[:, None] * legendre.legvander(x, n - 1).T * w
    integral = np.stack([legendre.legval(x, legendre.legint(np.eye(n)[m], lbnd=-1)) for m in modes], axis=-1)
    return (x + 1) / 2, w / 2, integral @ to_modes / 2


def legendre_interpolation(nodes: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Matrix that takes values at Gauss–Legendre `nodes` of (0, 1) to the interpolant's values at `t`."""
    n = len(nodes)
    x, w = legendre.leggauss(n)
    to_modes = (np.arange(n) + 0.5)[:, None] * legendre.legvander(x, n - 1).T * w
    return legendre.legvander(2 * t - 1, n - 1) @ to_modes


def spline_matrix(nodes: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Matrix that takes values at `nodes` to the not-a-knot cubic spline's values at `x` (within the nodes)."""
    return CubicSpline(nodes, np.eye(len(nodes)))(x)


def prefilter_taps(half_width: int = 14) -> np.ndarray:
    r"""Taps of the cubic B-spline prefilter, $\sqrt{3}\,(\sqrt{3}-2)^{|n|}$, cut where they are below 1e-8."""
    return np.sqrt(3.0) * (np.sqrt(3.0) - 2.0) ** np.abs(np.arange(-half_width, half_width + 1))
