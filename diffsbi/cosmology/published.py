"""The published benchmark's own log-normal shift: a table read with its first two axes swapped."""

from pathlib import Path

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from diffsbi._types import Array, Float

SIGMA_8_GRID = np.linspace(0.3, 1.3, 8)
OMEGA_M_GRID = np.linspace(0.1, 0.9, 8)
W_0_GRID = np.linspace(-2.0, -0.3, 8)


class PublishedShift(eqx.Module):
    r"""λ(Ω_m, σ_8, w_0) as arXiv:2409.17975's code looked it up: only for comparison with its results.

    The table is indexed [sigma_8, Omega_m, w_0, bin]; that code read it as [Omega_m, sigma_8, w_0], at the index
    $8 (x - x_\mathrm{min})/(x_\mathrm{max} - x_\mathrm{min}) - \frac12$, linear, edges clamped. The result is 7 % to
    76 % too large in the prior's range.
    """

    table: Float[Array, "8 8 8 bins"]

    @classmethod
    def load(cls, path: str | Path) -> "PublishedShift":
        """Read the table's `.npy` file, shape (8, 8, 8, n_bins, 5) = (…, (Omega_m, sigma_8, w_0, bin, shift))."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"Expected the shift table at {path}; no such file.")
        table = np.load(path, allow_pickle=False)
        if table.ndim != 5 or table.shape[:3] != (8, 8, 8) or table.shape[-1] != 5:
            raise ValueError(f"Expected a shift table with shape (8, 8, 8, n_bins, 5) in {path}; got {table.shape}.")
        if not (np.isfinite(table).all() and (table[..., 4] > 0).all()):
            raise ValueError(f"Expected finite, positive shifts in {path}.")
        return cls(jnp.asarray(table[..., 4]))

    @property
    def n_bins(self) -> int:
        return self.table.shape[-1]

    def __call__(self, theta: Float[Array, " 6"]) -> Float[Array, " bins"]:
        omega_m, sigma_8, w_0 = theta[0] + theta[1], theta[2], theta[5]
        grids = zip((omega_m, sigma_8, w_0), (OMEGA_M_GRID, SIGMA_8_GRID, W_0_GRID), strict=True)
        index = [8 * (value - grid[0]) / (grid[-1] - grid[0]) - 0.5 for value, grid in grids]
        at = lambda b: map_coordinates(self.table[..., b], index, order=1, mode="nearest")  # noqa: E731
        return jnp.stack([at(b) for b in range(self.n_bins)])
