r"""Log-normal (or Gaussian) convergence maps in tomographic bins: cosmology + fields + shape noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from diffsbi._types import Array, Float, check_trailing
from diffsbi.cosmology.lensing import Convergence
from diffsbi.cosmology.priors import lsst_y10_prior
from diffsbi.cosmology.published import PublishedShift
from diffsbi.cosmology.quadrature import spline_matrix
from diffsbi.cosmology.redshifts import RedshiftBins, smail
from diffsbi.prior import Prior
from diffsbi.simulators import fields
from diffsbi.simulators.base import AbstractSimulator, Identity
from diffsbi.simulators.transport import WienerWhitening


class FieldState(eqx.Module):
    """What a theta fixes: the Cholesky factor of the Gaussian power per mode, its variance, the shift, the response."""

    factor: fields.Triangle
    variance: Float[Array, " bins"]
    shift: Float[Array, " bins"]
    response: Float[Array, " bins"]


class LensingMaps(AbstractSimulator):
    r"""Convergence maps $x_i = \kappa_i + n_i$ with $\kappa_i = \lambda_i(e^{g_i - \mathrm{Var}(g_i)/2} - 1)$.

    The latents z `(n_bins, n_pix, n_pix)` are white noise in the real Fourier (Hartley) basis of the periodic pixel
    grid: $g = H[L(k; \theta)\,z]$, $L L^T$ the Gaussian power, a small matrix for each mode. Maps are dimensionless;
    data axes are (bin, row, column).
    """

    prior: Prior
    spectrum: Convergence
    redshifts: RedshiftBins = eqx.field(static=True)
    shift_model: PublishedShift | None
    constant_shift: Array | None
    noise: Float[Array, " bins"]
    density: tuple[float, ...] = eqx.field(static=True)
    interpolation: Array
    mode_factor: Array
    cosines: Array
    n_pix: int = eqx.field(static=True)
    side_deg: float = eqx.field(static=True)
    field: Literal["lognormal", "gaussian"] = eqx.field(static=True)

    def __init__(
        self,
        redshifts: RedshiftBins,
        *,
        n_pix: int,
        side_deg: float,
        sigma_e: float | Sequence[float],
        density: float | Sequence[float],
        field: Literal["lognormal", "gaussian"] = "lognormal",
        shift: str | float | Sequence[float] = "perturbation",
        shift_table: str | Path | None = None,
        prior: Prior | None = None,
    ):
        _check_grid(n_pix, side_deg)
        if field not in ("lognormal", "gaussian"):
            raise ValueError(f"Expected field 'lognormal' or 'gaussian'; got {field!r}.")
        self.prior = lsst_y10_prior() if prior is None else prior
        if self.prior.names != lsst_y10_prior().names:
            raise ValueError(f"Expected prior names {lsst_y10_prior().names} in this order; got {self.prior.names}.")
        self.redshifts, self.n_pix, self.side_deg, self.field = redshifts, int(n_pix), float(side_deg), field
        side = np.deg2rad(side_deg)
        self.spectrum = Convergence(redshifts, side / n_pix)
        self.shift_model, self.constant_shift = _choose_shift(shift, shift_table, redshifts.n_bins)
        densities = _per_bin("density", density, redshifts.n_bins, share=True)
        self.density = tuple(float(d) for d in densities)
        self.noise = jnp.asarray(_pixel_noise(sigma_e, densities, 60 * side_deg / n_pix))

        ell = fields.mode_multipoles(self.n_pix, side)
        ell[0, 0] = ell[0, 1]
        mode_factor = _limber_factor(ell) / (side / n_pix) ** 2
        mode_factor[0, 0] = 0.0
        self.mode_factor = jnp.asarray(mode_factor)
        self.interpolation = jnp.asarray(self._interpolation(ell.ravel()))
        self.cosines = jnp.asarray(fields.cosine_matrix(self.n_pix))

    # -- the protocol -------------------------------------------------------------------------------------------

    def setup(self, theta: Float[Array, " 6"]) -> FieldState:
        log_limber, perturbative = self.spectrum(theta)
        shift = self._shift(theta, perturbative)
        power = self._mode_power(log_limber)
        if self.field == "gaussian":
            variance, response = jnp.zeros_like(shift), jnp.ones_like(shift)
        else:
            i, j = np.triu_indices(self.n_bins)
            power, zero_lag = fields.lognormal_to_gaussian(power, shift[i] * shift[j], self.cosines)
            variance, response = zero_lag[i == j], shift
        factor = fields.cholesky(power, self.n_bins)
        return FieldState(factor, variance, shift, response)

    def latents(self, state):
        return dist.Normal(0.0, 1.0).expand(self._map_shape).to_event(3)

    def likelihood(self, state, z):
        return dist.Normal(
            self._convergence(state, z), jnp.broadcast_to(self.noise[:, None, None], self._map_shape)
        ).to_event(3)

    def transports(self):
        return {"white": Identity(), "whitened": WienerWhitening(self.noise)}

    # -- what cosmologists ask for --------------------------------------------------------------------------------

    @property
    def n_bins(self) -> int:
        return self.redshifts.n_bins

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs of bins in the order of spectra: the upper triangle, row by row."""
        return tuple(zip(*(index.tolist() for index in np.triu_indices(self.n_bins)), strict=True))

    def convergence(self, theta: Float[Array, " 6"], z: Array) -> Float[Array, "bins n n"]:
        """Noiseless convergence maps of latents `z`."""
        check_trailing("theta", theta, (6,))
        check_trailing("z", z, self._map_shape)
        return self._convergence(self.setup(jnp.asarray(theta)), z)

    def spectra(self, theta: Float[Array, " 6"], ell) -> Float[Array, "pairs ell"]:
        r"""Limber spectra of every pair of bins.

        $C_\ell^{ij} = f_\ell \int d\chi\, q_i q_j P_{nl}((\ell+\frac12)/\chi, \chi)/\chi^2$,
        $f_\ell = (\ell-1)\ell(\ell+1)(\ell+2)/(\ell+\frac12)^4$. `ell` holds numbers (not traced) between 2 and the
        pixel scale's limit; not smoothed by the pixel.
        """
        check_trailing("theta", theta, (6,))
        ell = np.atleast_1d(np.asarray(ell, float))
        low, high = 2.0, float(np.exp(self._log_nu[-1])) - 0.5
        if ell.ndim != 1 or not ((ell >= low) & (ell <= high)).all():
            raise ValueError(
                f"Expected ell (one-dimensional) within [{low:g}, {high:.0f}]; got {ell.min()} to {ell.max()}."
            )
        log_limber, _ = self.spectrum(jnp.asarray(theta))
        operator, factor = (jnp.asarray(a, log_limber.dtype) for a in (self._interpolation(ell), _limber_factor(ell)))
        return jnp.exp(jnp.einsum("pn,mn->pm", log_limber, operator)) * factor[None, :]

    def mode_power(self, theta: Float[Array, " 6"]) -> Float[Array, "pairs m m"]:
        r"""Variance $C_\ell / A_\mathrm{pix}$ of the convergence in every mode of the quadrant; zero at k = 0."""
        check_trailing("theta", theta, (6,))
        return self._mode_power(self.spectrum(jnp.asarray(theta))[0])

    def shift(self, theta: Float[Array, " 6"]) -> Float[Array, " bins"]:
        """Log-normal shift λ of every bin: the map's minimum is −λ."""
        check_trailing("theta", theta, (6,))
        return self._shift(jnp.asarray(theta), self.spectrum(jnp.asarray(theta))[1])

    def redshift_distribution(self, z) -> np.ndarray:
        """n_i(z) of every bin, normalised to one, `(n_bins, *z.shape)`."""
        return self.redshifts(np.asarray(z, float))

    # -- inner workings -------------------------------------------------------------------------------------------

    @property
    def _map_shape(self):
        return (self.n_bins, self.n_pix, self.n_pix)

    @property
    def _log_nu(self) -> np.ndarray:
        return self.spectrum.log_nu_grid

    def _interpolation(self, ell: np.ndarray) -> np.ndarray:
        """Cubic-spline operator in ln(ℓ + ½) from the multipole nodes to `ell`."""
        return spline_matrix(self._log_nu, np.log(ell + 0.5))

    def _mode_power(self, log_limber):
        power = jnp.exp(jnp.einsum("pn,mn->pm", log_limber, self.interpolation))
        return power.reshape(-1, *self.mode_factor.shape) * self.mode_factor[None]

    def _shift(self, theta, perturbative):
        if self.constant_shift is not None:
            return self.constant_shift
        return perturbative if self.shift_model is None else self.shift_model(theta)

    def _convergence(self, state: FieldState, z):
        g = fields.hartley(fields.unfold(jnp.stack(fields.lower_times(state.factor, fields.unstack(fields.fold(z))))))
        if self.field == "gaussian":
            return g
        # The published benchmark normalised every map by its own variance, not by the ensemble's.
        variance = state.variance if self.shift_model is None else jnp.var(g, axis=(1, 2))
        return fields.lognormal(g, variance[:, None, None], state.shift[:, None, None])


def lsst_y10(n_pix: int = 256, side_deg: float = 10.0, n_bins: int = 5, **options) -> LensingMaps:
    r"""The LSST-Y10-like preset: Smail n(z) with a = 2, b = 0.68, z0 = 0.11, photo-z error 0.05 (1+z).

    Args:
        n_pix: Pixels on a side, even.
        side_deg: Side of the map in degrees.
        n_bins: Number of equal-number source bins.
        **options: `sigma_e` = 0.26, `density` = 27 galaxies/arcmin² in all (or one for each bin),
            `field` = "lognormal" or "gaussian", `shift` = "perturbation", a number (or one for each bin), or
            "published" with `shift_table` = path, `prior`.
    """
    survey = {"sigma_e": 0.26, "density": 27.0} | options
    return LensingMaps(smail(2.0, 0.68, 0.11, n_bins), n_pix=n_pix, side_deg=side_deg, **survey)


def _limber_factor(ell):
    return (ell - 1) * ell * (ell + 1) * (ell + 2) / (ell + 0.5) ** 4


def _pixel_noise(sigma_e, densities, pixel_arcmin: float) -> np.ndarray:
    r"""Shape-noise standard deviation of one pixel and bin, $\sigma_e / \sqrt{n_\mathrm{gal} A_\mathrm{pix}}$."""
    return _per_bin("sigma_e", sigma_e, len(densities)) / np.sqrt(densities * pixel_arcmin**2)


def _per_bin(name: str, value, n_bins: int, share: bool = False) -> np.ndarray:
    values = np.asarray(value, float)
    if values.shape not in ((), (n_bins,)):
        raise ValueError(f"Expected {name} as one number or {n_bins} numbers; got shape {values.shape}.")
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"Expected {name} > 0; got {value}.")
    return np.broadcast_to(values / n_bins if share and values.shape == () else values, (n_bins,)).copy()


def _check_grid(n_pix, side_deg) -> None:
    if n_pix != int(n_pix) or n_pix < 4 or n_pix % 2:
        raise ValueError(f"Expected n_pix to be even and at least 4; got {n_pix}.")
    if not 0 < side_deg <= 60:
        raise ValueError(f"Expected 0 < side_deg <= 60 (flat sky); got {side_deg}.")
    if side_deg > 3 * n_pix:
        raise ValueError(f"Expected pixels below 3 degrees; got {side_deg / n_pix:.2f}.")


def _choose_shift(shift, shift_table, n_bins: int):
    if isinstance(shift, str):
        if shift not in ("perturbation", "published"):
            raise ValueError(f"Expected shift 'perturbation', 'published' or positive numbers; got {shift!r}.")
        if (shift == "published") != (shift_table is not None):
            raise ValueError(
                f"Expected shift_table=PATH with shift='published' and only then; got {shift=}, {shift_table=}."
            )
        if shift == "perturbation":
            return None, None
        model = PublishedShift.load(shift_table)
        if model.n_bins != n_bins:
            raise ValueError(f"Expected a shift table of {n_bins} bins; got {model.n_bins}.")
        return model, None
    if shift_table is not None:
        raise ValueError(f"Expected shift_table only with shift='published'; got {shift=}.")
    return None, jnp.asarray(_per_bin("shift", shift, n_bins))
