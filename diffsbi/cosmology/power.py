r"""Matter power: Eisenstein & Hu (1998) with wiggles, and halofit of Takahashi et al. (2012)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.cosmology.background import Cosmology, matter_fraction
from diffsbi.cosmology.quadrature import prefilter_taps

T_CMB = 2.726
"""CMB temperature in kelvin, as in jax_cosmo."""

_LARGEST = 40.0

LOG_K_STEP = 0.04
LOG_K = np.arange(np.log(1e-5), np.log(1e6), LOG_K_STEP)
"""ln k [h/Mpc] of the table of the linear power."""

LOG_R_STEP = 0.15
LOG_R = np.arange(np.log(1e-4), np.log(50.0), LOG_R_STEP)
"""ln R [Mpc/h] at which the Gaussian-smoothed variance is tabulated."""


def log_transfer(cosmo: Cosmology, k: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""ln |T(k)| of Eisenstein & Hu (1998), eqs. (2)–(24), `k` in h/Mpc.

    T crosses zero where baryons dominate (Ω_c → 0). To stay smooth there, T² is T² + (10⁻³ T₀)², T₀ the pressureless
    shape: a relative change of 10⁻⁶ in ordinary cosmologies.
    """
    theta2 = (T_CMB / 2.7) ** 2
    h = cosmo.h_0
    w_m, w_b = cosmo.omega_m * h**2, cosmo.omega_b * h**2
    f_b = cosmo.omega_b / cosmo.omega_m
    f_c = cosmo.omega_c / cosmo.omega_m

    k_eq = 0.0746 * w_m / theta2 / h
    z_eq = 2.5e4 * w_m / theta2**2
    b1 = 0.313 * w_m**-0.419 * (1 + 0.607 * w_m**0.674)
    b2 = 0.238 * w_m**0.223
    z_d = 1291 * w_m**0.251 / (1 + 0.659 * w_m**0.828) * (1 + b1 * w_b**b2)
    r_d = 31.5e3 * w_b / theta2**2 / z_d
    r_eq = 31.5e3 * w_b / theta2**2 / z_eq
    sound = 2 / (3 * k_eq) * jnp.sqrt(6 / r_eq)
    sound = sound * jnp.log((jnp.sqrt(1 + r_d) + jnp.sqrt(r_eq + r_d)) / (1 + jnp.sqrt(r_eq)))
    k_silk = 1.6 * w_b**0.52 * w_m**0.73 * (1 + (10.4 * w_m) ** -0.95) / h

    a1 = (46.9 * w_m) ** 0.670 * (1 + (32.1 * w_m) ** -0.532)
    a2 = (12.0 * w_m) ** 0.424 * (1 + (45.0 * w_m) ** -0.582)
    alpha_c = a1**-f_b * a2 ** (-(f_b**3))
    bc1 = 0.944 / (1 + (458 * w_m) ** -0.708)
    bc2 = (0.395 * w_m) ** -0.0266
    beta_c = 1 / (1 + bc1 * (f_c**bc2 - 1))

    y = (1 + z_eq) / (1 + z_d)
    root = jnp.sqrt(1 + y)
    g = y * (-6 * root + (2 + 3 * y) * jnp.log((root + 1) / (root - 1)))
    alpha_b = 2.07 * k_eq * sound * (1 + r_d) ** -0.75 * g
    beta_b = 0.5 + f_b + (3 - 2 * f_b) * jnp.sqrt((17.2 * w_m) ** 2 + 1)
    beta_node = 8.41 * w_m**0.435

    q = k / (13.41 * k_eq)
    q_power = 386 / (1 + 69.9 * jnp.exp(1.08 * jnp.log(q)))

    def pressureless(alpha, beta):
        log = jnp.log(np.e + 1.8 * beta * q)
        return log / (log + (14.2 / alpha + q_power) * q**2)

    ks = k * sound
    mix = 1 / (1 + (ks / 5.4) ** 4)
    cold = mix * pressureless(1.0, beta_c) + (1 - mix) * pressureless(alpha_c, beta_c)
    shifted = ks / (1 + (beta_node / ks) ** 3) ** (1 / 3)
    damping = jnp.exp(-jnp.exp(1.4 * jnp.log(k / k_silk)))
    baryons = pressureless(1.0, 1.0) / (1 + (ks / 5.2) ** 2) + alpha_b / (1 + (beta_b / ks) ** 3) * damping
    shape = pressureless(1.0, 1.0)
    ratio = (f_b * baryons * jnp.sin(shifted) / shifted + f_c * cold) / shape
    return jnp.log(shape) + 0.5 * jnp.log(ratio**2 + 1e-6)


class LinearPower(NamedTuple):
    """Linear matter power today on the grid `LOG_K`."""

    log_power: Array
    """ln P(k), P in (Mpc/h)³."""
    coefficients: Array
    """Cubic B-spline coefficients of `log_power`."""

    @property
    def dimensionless(self) -> Array:
        r"""$\Delta^2(k) = k^3 P / 2\pi^2$ on the grid."""
        return jnp.exp(self.log_power + 3 * jnp.asarray(LOG_K, self.log_power.dtype)) / (2 * np.pi**2)


def linear_power(cosmo: Cosmology) -> LinearPower:
    r"""$P(k) \propto k^{n_s} T^2(k)$ with $\sigma_8^2 = \int d\ln k\, \Delta^2 W^2(8k)$, W a sphere's top hat."""
    dtype = cosmo.sigma_8.dtype
    log_k = jnp.asarray(LOG_K, dtype)
    log_power = cosmo.n_s * log_k + 2 * log_transfer(cosmo, jnp.exp(log_k))
    tophat = jnp.asarray(_tophat_weights() * LOG_K_STEP / (2 * np.pi**2), dtype)
    norm = jnp.sum(jnp.exp(log_power + 3 * log_k) * tophat)
    log_power = log_power + 2 * jnp.log(cosmo.sigma_8) - jnp.log(norm)
    taps = jnp.asarray(prefilter_taps(), dtype)
    padded = jnp.pad(log_power, len(taps) // 2, mode="reflect", reflect_type="odd")
    return LinearPower(log_power, jnp.convolve(padded, taps, mode="valid"))


def _tophat_weights() -> np.ndarray:
    x = 8 * np.exp(LOG_K)
    series = 1 - x**2 / 5
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    return np.where(x < 1e-2, series**2, window**2)


def spline_weights(fraction: Array) -> list[Array]:
    """The four cubic B-spline weights at `fraction` of a cell."""
    f, g = fraction, 1 - fraction
    return [g**3 / 6, (3 * f**3 - 6 * f**2 + 4) / 6, (3 * g**3 - 6 * g**2 + 4) / 6, f**3 / 6]


def columns(linear: LinearPower, log_start: Float[Array, " z"], n: int, stride: int) -> Float[Array, "z n"]:
    """ln P at ln k = `log_start[j]` + i · `stride` · LOG_K_STEP, i < n, for each column j: one shifted window each."""
    position = (log_start - LOG_K[0]) / LOG_K_STEP
    last = len(LOG_K) - stride * n - 4
    whole = jnp.clip(jnp.floor(jax.lax.stop_gradient(position)), 1, last)
    fraction = (position - whole)[:, None]
    start = whole.astype(jnp.int32) - 1
    window = jax.vmap(lambda s: jax.lax.dynamic_slice(linear.coefficients, (s,), (stride * n + 3,)))(start)
    taps = [window[:, t : t + stride * n : stride] for t in range(4)]
    return sum(w * c for w, c in zip(spline_weights(fraction), taps, strict=True))


class NonLinearScale(NamedTuple):
    """Where the Gaussian-smoothed variance is one: `log_r` = −ln k_σ, effective index, curvature."""

    log_r: Array
    n_eff: Array
    curvature: Array


def nonlinear_scale(linear: LinearPower, log_growth: Float[Array, " z"]) -> NonLinearScale:
    r"""The root of $\ln\sigma^2(R) + 2\ln D(z) = 0$, $\sigma^2(R) = \int d\ln k\, \Delta^2 e^{-k^2R^2}$.

    The table of $\ln\sigma^2$ and its first two derivatives in ln R is joined by quintic Hermite polynomials (twice
    continuously differentiable), and the root found by Newton steps: smooth in theta, unlike a linear table look-up.
    Where even R = 1e-4 Mpc/h is linear, the scale stays there: halofit then returns the linear power.
    """
    y2 = np.exp(2 * (LOG_R[:, None] + LOG_K[None, :]))
    gauss = np.exp(-np.minimum(y2, 700.0)) * LOG_K_STEP
    moments = np.where(y2 < 700, np.stack([gauss, -2 * y2 * gauss, (4 * y2**2 - 4 * y2) * gauss]), 0.0)
    s0, s1, s2 = jnp.einsum("drk,k->dr", jnp.asarray(moments, log_growth.dtype), linear.dimensionless)
    v0, v1, v2 = jnp.log(s0), s1 / s0, s2 / s0 - (s1 / s0) ** 2

    target = -2 * log_growth
    above = jax.lax.stop_gradient(v0)[None, :] > jax.lax.stop_gradient(target)[:, None]
    cell = jnp.clip(jnp.sum(above, axis=1) - 1, 0, len(LOG_R) - 2)
    coefficients = _quintic(
        *(v[cell] * LOG_R_STEP**d for d, v in enumerate((v0, v1, v2))),
        *(v[cell + 1] * LOG_R_STEP**d for d, v in enumerate((v0, v1, v2))),
    )
    frozen = jax.lax.stop_gradient((coefficients, target))
    fraction = jnp.clip((frozen[1] - frozen[0][0]) / sum(frozen[0][1:]), 0.0, 1.0)
    # The steps before the last two only bring the root near; the last two carry first and second derivatives.
    for c, goal in [frozen, frozen, frozen, (coefficients, target), (coefficients, target)]:
        value, slope, _ = _polynomial(c, fraction)
        fraction = jnp.clip(fraction - (value - goal) / slope, 0.0, 1.0)
    _, slope, bend = _polynomial(coefficients, fraction)
    log_r = LOG_R[0] + (cell + fraction) * LOG_R_STEP
    return NonLinearScale(log_r, -3 - slope / LOG_R_STEP, -bend / LOG_R_STEP**2)


def _quintic(a0, a1, a2, b0, b1, b2):
    """Coefficients on [0, 1] of the quintic with value, slope and second derivative (a) at 0 and (b) at 1."""
    r0 = b0 - a0 - a1 - a2 / 2
    r1 = b1 - a1 - a2
    r2 = b2 - a2
    return a0, a1, a2 / 2, 10 * r0 - 4 * r1 + r2 / 2, -15 * r0 + 7 * r1 - r2, 6 * r0 - 3 * r1 + r2 / 2


def _polynomial(c, x):
    value = slope = bend = jnp.zeros_like(x)
    for coefficient in reversed(c):
        bend = bend * x + slope
        slope = slope * x + value
        value = value * x + coefficient
    return value, slope, 2 * bend


def halofit(cosmo: Cosmology, z: Array, scale: NonLinearScale, log_k: Array, log_d2: Array) -> Array:
    r"""Dimensionless non-linear power $\Delta^2(k, z)$ of Takahashi et al. (2012), eqs. (A1)–(A14).

    Args:
        cosmo: Parameters.
        z: Redshifts `(z,)`.
        scale: The non-linear scale at these redshifts.
        log_k: ln k [h/Mpc], `(z, n)`.
        log_d2: ln of the linear $\Delta^2(k, z)$, `(z, n)`.
    """
    n, c = scale.n_eff, scale.curvature
    om_m = matter_fraction(cosmo, z)
    dark = (1 - om_m) * (1 + cosmo.w_0)
    ln10 = np.log(10.0)
    log_a = ln10 * (_horner(n, 1.5222, 2.8553, 2.3706, 0.9903, 0.2250) - 0.6038 * c + 0.1749 * dark)
    log_b = ln10 * (_horner(n, -0.5642, 0.5864, 0.5716) - 1.5474 * c + 0.2279 * dark)
    log_c = ln10 * (_horner(n, 0.3698, 2.0404, 0.8161) + 0.5869 * c)
    gamma = 0.1971 - 0.0843 * n + 0.8460 * c
    # |alpha| has a kink that scores would feel; this differs from it by less than 1e-3 away from zero.
    alpha = jnp.sqrt((_horner(n, 6.0835, 1.3373, -0.1959) - 5.5274 * c) ** 2 + 1e-4)
    beta = _horner(n, 2.0379, -0.7354, 0.3157, 1.2490, 0.3980) - 0.1682 * c
    log_nu = ln10 * (5.2105 + 3.6902 * n)
    log_om = jnp.log(om_m)
    f1, f2, log_f3 = jnp.exp(-0.0307 * log_om), jnp.exp(-0.0585 * log_om), 0.0743 * log_om

    column = lambda v: v[:, None]  # noqa: E731
    log_y = log_k + column(scale.log_r)
    y, d2 = jnp.exp(log_y), jnp.exp(log_d2)
    quasi = log_d2 + column(beta) * jnp.log1p(d2) - jnp.log1p(column(alpha) * d2) - y / 4 - y**2 / 8
    one, two = column(log_b) + column(f2) * log_y, column(3 - gamma) * (column(log_c + log_f3) + log_y)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(one, two), 0.0))
    denominator = largest + jnp.log(jnp.exp(-largest) + jnp.exp(one - largest) + jnp.exp(two - largest))
    halo = column(log_a) + column(3 * f1) * log_y - denominator - jax.nn.softplus(column(log_nu) - 2 * log_y)
    # Far outside the simulations that it was fitted to (baryons alone) the formula can run away: sums of logarithms,
    # cut where exp would overflow in float32, keep value and slope finite.
    return jnp.exp(jnp.minimum(quasi, _LARGEST)) + jnp.exp(jnp.minimum(halo, _LARGEST))


def _horner(x, *coefficients):
    total = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total
