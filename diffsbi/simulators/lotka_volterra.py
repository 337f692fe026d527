r"""Lotka–Volterra: predator and prey with unknown rates, seen ten times through multiplicative noise."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from diffrax import ODETerm, Tsit5
from numpyro.distributions import Distribution, LogNormal, Normal

from diffsbi._types import Array, Float
from diffsbi.prior import Prior
from diffsbi.simulators.base import AbstractSimulator, Identity
from diffsbi.simulators.laplace import Laplace

# Float32 cannot hold e^-88; a population that small is held at this level, so that data stay positive.
_LOG_FLOOR = -80.0
_LOG_MEANS = {"alpha": -0.125, "beta": -3.0, "gamma": -0.125, "delta": -3.0}


class LotkaVolterra(AbstractSimulator):
    r"""$\dot u = (\alpha - \beta v)u$, $\dot v = (-\gamma + \delta u)v$, observed at $t_k = 0, 2.1, \ldots, 18.9$.

    The initial populations are latent: $(u, v)(0) = 3 e^{z/2}$ with $z \sim N(0, I)$, that is LogNormal(log 3, ½).
    The data are `(u(t_1) … u(t_10), v(t_1) … v(t_10))` times $e^{0.1\epsilon}$.

    Log-populations are integrated (positivity by construction) by fixed steps of Tsitouras' 5th-order method:
    the solution is then a smooth function of theta and of z, which adaptive steps are not.

    Args:
        prior: LogNormal priors of alpha, beta, gamma, delta (per unit time).
        substeps: Steps between two observations.
        noise: Standard deviation of the log data.
    """

    prior: Prior
    substeps: int = eqx.field(static=True)
    noise: float = eqx.field(static=True)

    interval = 2.1
    n_times = 10

    @property
    def times(self) -> Float[Array, " 10"]:
        """The observation times."""
        return jnp.linspace(0.0, 18.9, self.n_times)

    def initial_populations(self, z: Float[Array, " 2"]) -> Float[Array, " 2"]:
        """(u, v) at t = 0."""
        return 3.0 * jnp.exp(0.5 * z)

    def latents(self, theta: Float[Array, " 4"]) -> Distribution:
        return Normal(jnp.zeros(2, jnp.result_type(theta)), 1.0).to_event(1)

    def likelihood(self, theta: Float[Array, " 4"], z: Array) -> Distribution:
        return LogNormal(self.log_populations(theta, z).T.reshape(-1), self.noise).to_event(1)

    def transports(self):
        return {"white": Identity(), "laplace": Laplace(self)}

    def log_populations(self, theta: Float[Array, " 4"], z: Float[Array, " 2"]) -> Float[Array, "10 2"]:
        """(log u, log v) at the observation times, noise-free."""
        # "bounded" loops can be differentiated forwards and backwards.
        solver, term, step = Tsit5(scan_kind="bounded"), ODETerm(_rates), self.interval / self.substeps

        def advance(y, _):
            state = solver.init(term, 0.0, step, y, theta)
            return solver.step(term, 0.0, step, y, theta, state, False)[0], None

        def observe(y, _):
            y, _ = jax.lax.scan(advance, y, None, length=self.substeps)
            return y, y

        start = jnp.log(self.initial_populations(z))
        _, later = jax.lax.scan(observe, start, None, length=self.n_times - 1)
        return jnp.maximum(jnp.concatenate([start[None], later]), _LOG_FLOOR)


def _rates(t, log_populations, theta):
    alpha, beta, gamma, delta = theta
    u, v = jnp.exp(log_populations)
    return jnp.stack([alpha - beta * v, -gamma + delta * u])


def lotka_volterra(substeps: int = 84, noise: float = 0.1) -> LotkaVolterra:
    """The Lotka–Volterra simulator with LogNormal((−.125, −3, −.125, −3), ½) priors; fiducial at their medians.

    Args:
        substeps: Integration steps between two observations; at 84 the log-populations of 99.9 % of the
            prior's draws are within 2e-5 of the exact ones.
        noise: Standard deviation of the log data.

    Raises:
        ValueError: If `substeps` < 1 or `noise` is not positive.

    Reference: Zeghal et al. 2022, arXiv:2207.05636.
    """
    if substeps < 1:
        raise ValueError(f"Expected substeps >= 1; got {substeps}.")
    if not noise > 0:
        raise ValueError(f"Expected noise > 0; got {noise}.")
    fiducial = {name: math.exp(mean) for name, mean in _LOG_MEANS.items()}
    prior = Prior({name: LogNormal(mean, 0.5) for name, mean in _LOG_MEANS.items()}, fiducial)
    return LotkaVolterra(prior, int(substeps), float(noise))
