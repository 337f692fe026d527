r"""Flat wCDM without radiation: parameters, expansion and linear growth."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float

HUBBLE_RADIUS = 2997.92458
"""c / (100 km/s/Mpc), in Mpc/h."""

OMEGA_C_FLOOR = 1e-3
"""Below this cold-matter density the fitting formulae have no finite slope; spectra are held constant there."""


class Cosmology(NamedTuple):
    """The six parameters, in the order of the array axis."""

    omega_c: Array
    omega_b: Array
    sigma_8: Array
    h_0: Array
    n_s: Array
    w_0: Array

    @property
    def omega_m(self) -> Array:
        return self.omega_c + self.omega_b


def cosmology(theta: Float[Array, " 6"]) -> Cosmology:
    """Read theta = (omega_c, omega_b, sigma_8, h_0, n_s, w_0), with omega_c held at `OMEGA_C_FLOOR` or more."""
    omega_c, *rest = jnp.asarray(theta)
    return Cosmology(jnp.maximum(omega_c, OMEGA_C_FLOOR), *rest)


def expansion(cosmo: Cosmology, z: Array) -> Array:
    r"""$E(z) = H(z)/H_0 = \sqrt{\Omega_m (1+z)^3 + (1-\Omega_m)(1+z)^{3(1+w_0)}}$."""
    log_a = jnp.log1p(z)
    dark = (1 - cosmo.omega_m) * jnp.exp(3 * (1 + cosmo.w_0) * log_a)
    return jnp.sqrt(cosmo.omega_m * jnp.exp(3 * log_a) + dark)


def matter_fraction(cosmo: Cosmology, z: Array) -> Array:
    r"""$\Omega_m(z) = 1 / (1 + \frac{1-\Omega_m}{\Omega_m} (1+z)^{3 w_0})$."""
    ratio = (1 - cosmo.omega_m) / cosmo.omega_m
    return 1 / (1 + ratio * jnp.exp(3 * cosmo.w_0 * jnp.log1p(z)))


def log_growth(cosmo: Cosmology, z: Float[Array, " n"]) -> Float[Array, " n"]:
    r"""$\ln D(z)/D(0)$, exact for flat wCDM.

    $D \propto a\, {}_2F_1(\alpha, \beta; \gamma; x)$ with $\alpha = -\frac{1}{3w}$, $\beta = \frac{w-1}{2w}$,
    $\gamma = 1 - \frac{5}{6w}$, $x = -\frac{1-\Omega_m}{\Omega_m} a^{-3w}$ (Silveira & Waga 1994), by Euler's integral
    $\int_0^1 t^{\beta-1}(1-t)^{\gamma-\beta-1}(1-xt)^{-\alpha} dt$ and a double-exponential rule.
    """
    tau = np.arange(-3.1, 3.11, 0.155)
    w = cosmo.w_0
    log_t = jnp.asarray(-np.logaddexp(0.0, -np.pi * np.sinh(tau)), w.dtype)
    log_1t = jnp.asarray(-np.logaddexp(0.0, np.pi * np.sinh(tau)), w.dtype)
    beta = (w - 1) / (2 * w)
    rest = 0.5 - 1 / (3 * w)
    weight = jnp.exp(beta * log_t + rest * log_1t) * jnp.asarray(np.cosh(tau), w.dtype)

    def log_integral(z):
        x = -(1 - cosmo.omega_m) / cosmo.omega_m * jnp.exp(3 * w * jnp.log1p(z))
        return jnp.log(jnp.exp(jnp.log1p(-x[:, None] * jnp.exp(log_t)[None, :]) / (3 * w)) @ weight)

    both = log_integral(jnp.concatenate([jnp.zeros((1,), z.dtype), z]))
    return both[1:] - both[0] - jnp.log1p(z)


def distance_integrand(cosmo: Cosmology, z: Array) -> Array:
    r"""$d\chi/dz = (c/H_0) / E(z)$, in Mpc/h."""
    return HUBBLE_RADIUS / expansion(cosmo, z)


__all__ = [
    "HUBBLE_RADIUS",
    "OMEGA_C_FLOOR",
    "Cosmology",
    "cosmology",
    "distance_integrand",
    "expansion",
    "log_growth",
    "matter_fraction",
]
