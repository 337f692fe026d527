r"""Limber spectra of the convergence in tomographic bins, and the variance and skewness behind the log-normal shift."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import j1

from diffsbi._types import Array, Float
from diffsbi.cosmology.background import HUBBLE_RADIUS, Cosmology, cosmology, distance_integrand, log_growth
from diffsbi.cosmology.power import LOG_K_STEP, columns, halofit, linear_power, nonlinear_scale
from diffsbi.cosmology.quadrature import gauss_legendre_panel, legendre_interpolation, spline_matrix
from diffsbi.cosmology.redshifts import Z_MAX, RedshiftBins

STRIDE = 3
"""Multipole nodes are STRIDE steps of the k table apart (Δ ln = 0.12): Limber columns are then windows of one table."""

Z_SCALE = 0.3


class Convergence(eqx.Module):
    r"""Spectra and shift of the convergence of one survey as functions of theta: constant operators and `__call__`.

    The line of sight is a Gauss–Legendre rule in $t = \ln(1 + z/0.3)$, so nodes crowd at low redshift. With
    $N_i(z) = \int_z n_i$ and $M_i(z) = \int_z n_i/\chi'\,dz'$ the lensing kernel at node j is
    $q_i = \frac32 \Omega_m (H_0/c)^2 \chi (1+z) [N_i - \chi M_i]$; $M_i$ is a constant matrix applied to $z/\chi$.
    """

    z: Array
    weight: Array
    distance: Array
    above: Array
    inverse: Array
    log_nu: Array
    window: Array
    window_slope: Array
    log_nu_range: tuple[float, int] = eqx.field(static=True)
    n_bins: int = eqx.field(static=True)

    def __init__(self, bins: RedshiftBins, pixel: float, n_z: int = 96):
        """Build the operators for source bins and a pixel side in radians."""
        self.n_bins = bins.n_bins
        t, weight, integrate = gauss_legendre_panel(n_z)
        scale = np.log1p(Z_MAX / Z_SCALE)
        z = Z_SCALE * np.expm1(scale * t)
        slope = scale * (z + Z_SCALE)
        self.z, self.weight = jnp.asarray(z), jnp.asarray(weight * slope)
        self.distance = jnp.asarray(integrate * slope)
        above, inverse = _tail_integrals(bins, t, z, scale)
        self.above, self.inverse = jnp.asarray(above), jnp.asarray(inverse)

        # From well below the fundamental mode to kR = 30, where the pixel has smoothed everything away.
        radius = pixel / np.sqrt(np.pi)
        log_nu = np.arange(np.log(1.5), np.log(30 / radius) + STRIDE * LOG_K_STEP, STRIDE * LOG_K_STEP)
        self.log_nu = jnp.asarray(log_nu)
        self.log_nu_range = (float(log_nu[0]), len(log_nu))
        window, slope = _disc_window(log_nu, np.log(radius))
        self.window, self.window_slope = jnp.asarray(window), jnp.asarray(slope)

    @property
    def log_nu_grid(self) -> np.ndarray:
        """ln ν at the multipole nodes, as constants also while tracing."""
        start, n = self.log_nu_range
        return start + STRIDE * LOG_K_STEP * np.arange(n)

    def __call__(self, theta: Float[Array, " 6"]) -> tuple[Float[Array, "pairs nu"], Float[Array, " bins"]]:
        r"""(ln of the Limber integral at the nodes ν = ℓ + ½, log-normal shift λ of every bin).

        The first is $\ln \int d\chi\, q_i q_j P(\nu/\chi)/\chi^2$, without $f_\ell$. Both, with six derivatives in
        theta (and in nothing else), are computed together in one forward sweep: what follows may then be
        differentiated either way cheaply.
        """
        return _with_forward_jacobian(self, theta)

    def _evaluate(self, theta):
        cosmo = cosmology(theta)
        per_z = distance_integrand(cosmo, self.z)
        chi = self.distance @ per_z
        kernel = self._kernels(cosmo, chi)
        growth = log_growth(cosmo, self.z)
        linear = linear_power(cosmo)
        scale = nonlinear_scale(linear, growth)
        log_chi = jnp.log(chi)
        log_k = self.log_nu[None, :] - log_chi[:, None]
        log_plin = columns(linear, self.log_nu[0] - log_chi, len(self.log_nu), STRIDE)
        log_d2 = log_plin + 3 * log_k + (2 * growth[:, None] - np.log(2 * np.pi**2))
        d2 = halofit(cosmo, self.z, scale, log_k, log_d2)

        i, j = np.triu_indices(self.n_bins)
        line = self.weight * per_z
        # P / chi^2 = 2 pi^2 d2 chi / nu^3; the factor of nu is put back in the logarithm.
        limber = (kernel[i] * kernel[j] * (line * chi)[None, :]) @ d2
        log_limber = jnp.log(limber) + (np.log(2 * np.pi**2) - 3 * self.log_nu)[None, :]
        return log_limber, self._shift(kernel, line, log_k, d2, jnp.exp(log_d2))

    def _kernels(self, cosmo: Cosmology, chi: Array) -> Array:
        tail = self.inverse @ (self.z / chi)
        geometry = ((1 + self.z) * chi)[None, :] * (self.above - chi[None, :] * tail)
        return 1.5 * cosmo.omega_m / HUBBLE_RADIUS**2 * geometry

    def _shift(self, kernel, line, log_k, d2, d2_linear):
        r"""λ, the positive root of $3\kappa_2^2/\lambda + \kappa_2^3/\lambda^3 = \kappa_3$, per bin.

        $\sigma^2(\chi) = \int d\ln k\, \frac{k^2}{2\pi} P\, W^2(kR)$, $R = \chi\theta_\mathrm{pix}/\sqrt\pi$ (a disc
        of the pixel's area), $S_3 = 36/7 + \frac32\, d\ln\sigma^2_\mathrm{lin}/d\ln R$, and at fixed χ the R derivative
        acts on the constant window only. Source: tree-level perturbation theory, Bernardeau et al. (2002).
        """
        per_k = np.pi * jnp.exp(-log_k)
        sigma2 = (d2 * per_k) @ self.window
        linear = d2_linear * per_k
        slope = (linear @ self.window_slope) / (linear @ self.window)
        skewness = 36 / 7 + 1.5 * slope
        kappa2 = kernel**2 @ (line * sigma2)
        kappa3 = kernel**3 @ (line * skewness * sigma2**2)
        root = jnp.sqrt(kappa2)
        return root / (2 * jnp.sinh(jnp.arcsinh(kappa3 / (2 * root**3)) / 3))


@jax.custom_jvp
def _with_forward_jacobian(convergence, theta):
    return convergence._evaluate(theta)


@_with_forward_jacobian.defjvp
def _(primals, tangents):
    convergence, theta = primals
    columns_of = jax.vmap(lambda v: jax.jvp(convergence._evaluate, (theta,), (v,)), out_axes=((None, None), (-1, -1)))
    value, jacobian = columns_of(jnp.eye(len(theta), dtype=theta.dtype))
    return value, tuple(j @ tangents[1] for j in jacobian)


def _tail_integrals(bins: RedshiftBins, t, z, scale):
    """N_i(z_j), and the operator on z/chi at the nodes that gives M_i(z_j), by a fine trapezoid rule from above."""
    fine_t = np.union1d(np.linspace(0.0, 1.0, 6001), t)
    fine_z = Z_SCALE * np.expm1(scale * fine_t)
    slope = scale * (fine_z + Z_SCALE)
    at = np.searchsorted(fine_t, t)
    n = bins(fine_z) * slope
    basis = legendre_interpolation(t, fine_t)

    def tail(f):
        cell = 0.5 * (f[..., 1:] + f[..., :-1]) * np.diff(fine_t)
        return np.flip(np.cumsum(np.flip(cell, -1), -1), -1)[..., np.minimum(at, len(fine_t) - 2)]

    inverse = np.stack([tail(row / np.maximum(fine_z, 1e-12) * basis.T).T for row in n])
    return tail(n), inverse


def _disc_window(log_nu, log_radius):
    r"""Weights $\int B_i W^2 d\ln\nu$ and the same of $dW^2/d\ln y$, $B_i$ the cardinal splines, $W = 2J_1(y)/y$."""
    fine = np.linspace(log_nu[0], log_nu[-1], 60 * len(log_nu))
    y = np.exp(fine + log_radius)
    w2 = np.where(y < 1e-3, 1 - y**2 / 4, (2 * j1(y) / y) ** 2)
    slope = np.gradient(w2, fine, edge_order=2)
    basis = spline_matrix(log_nu, fine)
    return tuple(np.trapezoid(basis * f[:, None], fine, axis=0) for f in (w2, slope))
