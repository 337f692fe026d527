"""Binned auto and cross spectra of flat maps, re-exported from the room below that the samplers share."""

from diffsbi._types import Array, Float
from diffsbi.bands import Bands, band_edges, pairs

__all__ = ["Bands", "band_edges", "bandpowers", "pairs"]


def bandpowers(
    x: Float[Array, "bins n_pix n_pix"], side_deg: float, n_bands: int = 12, edges=None
) -> Float[Array, "pairs bands"]:
    r"""Band powers $\langle \mathrm{Re}(F_i F_j^*) \rangle A_\mathrm{pix} / N_\mathrm{pix}$, `(n_pairs, n_bands)`.

    Args:
        x: One map for each bin, on a periodic square grid.
        side_deg: Side of the map, in degrees.
        n_bands: Number of logarithmic bands between the fundamental and the Nyquist mode.
        edges: Multipoles of the band edges instead.

    Raises:
        ValueError: If the maps are not square or a band holds no mode.
    """
    if x.ndim != 3 or x.shape[-1] != x.shape[-2]:
        raise ValueError(f"Expected x with shape (n_bins, n_pix, n_pix); got {x.shape}.")
    return Bands(x.shape[-1], side_deg, n_bands, edges)(x)
