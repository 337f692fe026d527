"""An observed map from a file: every assumption about it is told or checked, none is guessed."""

from pathlib import Path

import jax
import numpy as np

from diffsbi._types import check_finite
from diffsbi.bands import Bands, pixel_area

AXES = ("bin", "row", "column")

__all__ = ["band_spectra", "describe_units", "parse_axis_order", "read_map"]


def parse_axis_order(axis_order: str | None, shape: tuple[int, ...]) -> tuple[str, ...]:
    """The three axis names of e.g. `"row,column,bin"`.

    Raises:
        ValueError: If it is missing or is not a permutation of bin, row and column.
    """
    example = "for example 'row,column,bin' or 'bin,row,column'"
    if axis_order is None:
        raise ValueError(f"Expected axis_order for an array of shape {shape}, {example}: it is not guessed.")
    names = tuple(name.strip() for name in axis_order.split(","))
    if sorted(names) != sorted(AXES):
        raise ValueError(f"Expected axis_order to name bin, row and column once each, {example}; got {axis_order!r}.")
    return names


def read_map(path: str | Path, axis_order: str | None, n_bins: int, n_pix: int) -> np.ndarray:
    """Read an observed convergence map from a `.npy` file.

    Args:
        path: The file; floating-point numbers with three axes.
        axis_order: What its axes are, such as `"row,column,bin"`.
        n_bins: Number of tomographic bins of the survey.
        n_pix: Pixels on a side.

    Returns:
        Float32 array of shape `(n_bins, n_pix, n_pix)` = (bin, row, column).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no readable `.npy` array, or its type, shape or values are not those of such a map.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected an observation at {path}; there is no such file.")
    try:
        raw = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"Expected {path} to be a .npy array; it cannot be read ({error}).") from error
    if not isinstance(raw, np.ndarray):
        raise ValueError(f"Expected {path} to hold one array (.npy); it is an archive of several (.npz).")
    if not np.issubdtype(raw.dtype, np.floating):
        raise ValueError(f"Expected floating-point values in {path}; got dtype {raw.dtype}.")
    axes = parse_axis_order(axis_order, raw.shape)
    sizes = {"bin": n_bins, "row": n_pix, "column": n_pix}
    expected = tuple(sizes[axis] for axis in axes)
    if raw.shape != expected:
        raise ValueError(f"Expected {path} with shape {expected} = ({', '.join(axes)}); got {raw.shape}.")
    check_finite(f"values in {path}", raw)
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(np.transpose(raw, [axes.index(axis) for axis in AXES]), dtype=np.float32)
    check_finite(f"values in {path} as float32", x)
    for i, one in enumerate(x):
        if np.ptp(one) == 0:
            raise ValueError(f"Expected a map with structure; bin {i} of {path} is {one.flat[0]} in every pixel.")
    return x


def describe_units(x: np.ndarray, noise) -> list[str]:
    """Warnings about bins whose scatter the survey's pixel noise `(n_bins,)` cannot explain (units? smoothing?)."""
    found = []
    for i, (scatter, sigma) in enumerate(zip(x.std((1, 2)), np.asarray(noise), strict=True)):
        if not 0.9 * sigma <= scatter <= 3 * sigma:
            found.append(
                f"bin {i}: standard deviation {scatter:.4g}, but the survey's noise alone is {sigma:.4g} per pixel; "
                "is the map smoothed, masked, in other units, or from another survey?"
            )
    return found


def band_spectra(sim, x: np.ndarray, theta, n_bands: int) -> dict[str, np.ndarray]:
    """Band powers of the maps `x`, and theory plus noise at `theta` with its Gaussian scatter.

    Returns:
        `ell (n_bands,)`; `measured`, `theory`, `scatter` `(n_pairs, n_bands)`; `noise (n_bins,)`; `pairs (n_pairs, 2)`.
    """
    bands = Bands(sim.n_pix, sim.side_deg, n_bands)
    ell, weights = bands.quadrature()
    signal = np.asarray(jax.jit(lambda theta: sim.spectra(theta, ell.ravel()))(theta))
    signal = signal.reshape(len(sim.pairs), *ell.shape)
    noise = np.asarray(sim.noise) ** 2 * pixel_area(sim.n_pix, sim.side_deg)
    theory = (signal * weights).sum(-1) + np.array([noise[i] if i == j else 0.0 for i, j in sim.pairs])[:, None]
    auto = {i: row for (i, j), row in zip(sim.pairs, theory, strict=True) if i == j}
    product = np.array([auto[i] * auto[j] for i, j in sim.pairs])
    scatter = np.sqrt((product + theory**2) / np.asarray(bands.mode_counts))
    spectra = {"measured": np.asarray(bands(x)), "theory": theory, "scatter": scatter}
    return spectra | {"ell": bands.ell_effective, "noise": noise, "pairs": np.array(sim.pairs)}
