r"""Band powers of flat, periodic maps: the estimator and the exact average of a theory curve over the same modes.

A bottom room: the summaries and the power-spectrum likelihood bin with the same operator, so they cannot disagree.
"""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, check_trailing


def pairs(n_bins: int) -> tuple[tuple[int, int], ...]:
    """Upper triangle row by row: (0,0), (0,1), …, (n_bins-1, n_bins-1)."""
    return tuple(itertools.combinations_with_replacement(range(n_bins), 2))


def fundamental(side_deg: float) -> float:
    r"""Multipole $2\pi / L$ of the longest wave that fits a side of `side_deg` degrees."""
    return float(2 * np.pi / np.deg2rad(side_deg))


def pixel_area(n_pix: int, side_deg: float) -> float:
    """Area of one pixel, in steradian."""
    return float((np.deg2rad(side_deg) / n_pix) ** 2)


def band_edges(n_pix: int, side_deg: float, n_bands: int = 12) -> np.ndarray:
    r"""Edges of `n_bands` logarithmic bands from the fundamental to the Nyquist mode, shape `(n_bands + 1,)`.

    Where a logarithmic band would hold no mode of the grid, its upper edge is moved up to take in the next one.

    Raises:
        ValueError: If the grid has fewer distinct wavelengths than bands.
    """
    check_grid(n_pix, side_deg)
    if n_bands < 1:
        raise ValueError(f"Expected n_bands >= 1; got {n_bands}.")
    k = _radius(n_pix)
    radii = np.unique(k[(k >= 1) & (k < n_pix / 2)])
    if len(radii) < n_bands:
        raise ValueError(f"Expected at most {len(radii)} bands on a {n_pix} x {n_pix} grid; got n_bands = {n_bands}.")
    edges = np.geomspace(1.0, n_pix / 2, n_bands + 1)
    # Between neighbouring radii an edge can stand anywhere; the count of radii below it says all.
    below = np.searchsorted(radii, edges * (1 - 1e-9))
    for b in range(1, n_bands):
        lowest, highest = below[b - 1] + 1, len(radii) - (n_bands - b)
        wanted = int(np.clip(below[b], lowest, highest))
        if wanted != below[b]:
            below[b], edges[b] = wanted, np.sqrt(radii[wanted - 1] * radii[wanted])
    return edges * fundamental(side_deg)


class Bands(eqx.Module):
    r"""Annuli of Fourier modes of an `n_pix` x `n_pix` map and averages over them.

    The power of one mode is $\hat C_\ell^{ij} = \mathrm{Re}(F_i F_j^*)\, A_\mathrm{pix} / N_\mathrm{pix}$ with $F$ the
    unnormalised discrete Fourier transform: white noise of pixel variance σ² has $C_\ell = \sigma^2 A_\mathrm{pix}$.
    Bands are half open, [edge, next edge), and stay below the Nyquist mode: each mode has a distinct conjugate,
    and a band of `mode_counts` N (both counted) holds N real degrees of freedom.

    Args:
        n_pix: Pixels on a side (even).
        side_deg: Side of the map, in degrees.
        n_bands: Number of logarithmic bands (`band_edges`).
        edges: Multipoles of the band edges, increasing, instead of `n_bands`.

    Raises:
        ValueError: If the grid is not valid, the edges do not increase or a band holds no mode.
    """

    n_pix: int = eqx.field(static=True)
    side_deg: float = eqx.field(static=True)
    edges: tuple[float, ...] = eqx.field(static=True)
    mode_counts: tuple[int, ...] = eqx.field(static=True)
    _multiplicity: Array  # (n_bands, modes of the half plane): how often a mode counts, 0, 1 or 2

    def __init__(self, n_pix: int, side_deg: float, n_bands: int = 12, edges=None):
        edges = band_edges(n_pix, side_deg, n_bands) if edges is None else np.asarray(edges, float)
        check_grid(n_pix, side_deg)
        if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
            raise ValueError(f"Expected at least two increasing band edges; got {edges}.")
        half = _radius(n_pix)[:, : n_pix // 2 + 1]
        # A mode on an edge belongs to the band above, however the edge was rounded.
        scaled = edges / fundamental(side_deg) * (1 - 1e-9)
        band = np.where((half >= 1) & (half < n_pix / 2), np.searchsorted(scaled, half, side="right") - 1, -1)
        twice = np.ones_like(half, dtype=np.int8)
        twice[:, 1 : n_pix // 2] = 2  # the other half plane is their conjugate
        member = band.ravel() == np.arange(len(edges) - 1)[:, None]
        multiplicity = np.where(member, twice.ravel(), 0).astype(np.int8)
        counts = multiplicity.sum(1, dtype=int)
        if not counts.all():
            empty = int(np.argmin(counts))
            span = f"ell {edges[empty]:.6g} to {edges[empty + 1]:.6g}"
            raise ValueError(f"Expected modes in every band; band {empty}, {span}, holds none.")
        self.n_pix, self.side_deg = int(n_pix), float(side_deg)
        self.edges, self.mode_counts = tuple(map(float, edges)), tuple(map(int, counts))
        self._multiplicity = jnp.asarray(multiplicity)

    @property
    def n_bands(self) -> int:
        return len(self.mode_counts)

    @property
    def ell(self) -> np.ndarray:
        """|ℓ| of every mode of the half plane, shape `(n_pix * (n_pix // 2 + 1),)`, in the order of `bin_theory`."""
        return _radius(self.n_pix)[:, : self.n_pix // 2 + 1].ravel() * fundamental(self.side_deg)

    @property
    def ell_effective(self) -> np.ndarray:
        """Mean |ℓ| of the modes of each band, shape `(n_bands,)`."""
        return np.asarray(self._multiplicity) @ self.ell / np.asarray(self.mode_counts)

    def bin_theory(self, c_modes: Float[Array, "*n modes"]) -> Float[Array, "*n bands"]:
        """Average over each band's modes of a curve given on `ell`: exact, no interpolation."""
        c_modes = jnp.asarray(c_modes)
        weights = self._multiplicity.astype(c_modes.dtype)
        total = c_modes @ weights.T
        return total / jnp.broadcast_to(jnp.asarray(self.mode_counts, total.dtype), total.shape)

    def powers(self, modes) -> Float[Array, "pairs bands"]:
        """Auto and cross band powers, shape `(n_pairs, n_bands)`, of `modes = rfft2(x)` of the maps of all bins."""
        check_trailing("modes", modes, (self.n_pix, self.n_pix // 2 + 1))
        flat = modes.reshape(modes.shape[0], -1)
        first, second = map(list, zip(*pairs(modes.shape[0]), strict=True))
        re, im = flat.real, flat.imag
        product = re[jnp.array(first)] * re[jnp.array(second)] + im[jnp.array(first)] * im[jnp.array(second)]
        return self.bin_theory(product) * (pixel_area(self.n_pix, self.side_deg) / self.n_pix**2)

    def __call__(self, x: Float[Array, "bins n_pix n_pix"]) -> Float[Array, "pairs bands"]:
        """Auto and cross band powers of the maps `x`, shape `(n_pairs, n_bands)`, pairs row by row."""
        x = jnp.asarray(x)
        check_trailing("x", x, (self.n_pix, self.n_pix))
        return self.powers(jnp.fft.rfft2(x))

    def quadrature(self, order: int = 4) -> tuple[np.ndarray, np.ndarray]:
        r"""Multipoles and weights, each `(n_bands, order)`, whose weighted sum is a band's average of a smooth curve.

        Gauss quadrature of the modes' own discrete distribution in log ℓ (Lanczos): exact for polynomials of degree
        2 `order` − 1, and for every curve in bands of at most `order` distinct |ℓ| (padded with weight 0).
        """
        radius = self.ell
        nodes = np.zeros((self.n_bands, order))
        weights = np.zeros((self.n_bands, order))
        for b, multiplicity in enumerate(np.asarray(self._multiplicity)):
            ell, index = np.unique(np.round(radius[multiplicity > 0], 9), return_inverse=True)
            weight = np.bincount(index, multiplicity[multiplicity > 0]) / multiplicity.sum()
            node, w = _gauss(np.log(ell), weight, order)
            nodes[b], weights[b, : len(w)] = np.exp(node[-1]), w
            nodes[b, : len(w)] = np.exp(node)
        return nodes, weights


def check_grid(n_pix: int, side_deg: float) -> None:
    """Raise `ValueError` unless square maps have an even number of pixels on a side, at least 4, and a side > 0."""
    if n_pix < 4 or n_pix % 2:
        raise ValueError(f"Expected an even n_pix >= 4; got {n_pix}.")
    if not side_deg > 0:
        raise ValueError(f"Expected side_deg > 0 degrees; got {side_deg}.")


def _radius(n_pix: int) -> np.ndarray:
    """|k| in units of the fundamental, full plane."""
    k = np.fft.fftfreq(n_pix, 1 / n_pix)
    return np.sqrt(k[:, None] ** 2 + k[None, :] ** 2)  # of whole numbers: equal lengths are equal bit for bit


def _gauss(points: np.ndarray, weights: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss nodes and weights of a discrete probability measure (Golub and Welsch 1969)."""
    if len(points) <= order:
        return points, weights
    centre, scale = points.mean(), np.ptp(points)
    x = (points - centre) / scale
    basis = [np.sqrt(weights)]
    jacobi = np.zeros((order, order))
    for n in range(order):
        jacobi[n, n] = basis[n] @ (x * basis[n])
        rest = x * basis[n]
        for b in basis * 2:  # twice: full reorthogonalisation
            rest = rest - b * (b @ rest)
        if n + 1 < order:
            jacobi[n, n + 1] = jacobi[n + 1, n] = np.linalg.norm(rest)
            basis.append(rest / np.linalg.norm(rest))
    node, vector = np.linalg.eigh(jacobi)
    return centre + scale * node, vector[0] ** 2
