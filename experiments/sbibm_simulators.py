r"""Five tasks of the benchmark of Lueckmann et al. 2021 (arXiv:2101.04653, appendix T) as differentiable simulators.

In all of them the likelihood is known, so the latents are an empty vector and the scores have no noise.
"""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    Distribution,
    LogNormal,
    MixtureSameFamily,
    Normal,
    Uniform,
    constraints,
)

import diffsbi as ds
from diffsbi._types import Array, Float, Key

_N_SPIKES = 100
_N_FILTER = 9


class AbstractTask(ds.AbstractSimulator):
    """A simulator with a known likelihood, what of its data an estimator sees, and the published parameters."""

    def latents(self, theta: Float[Array, " p"]) -> Distribution:
        return Normal(jnp.zeros(0, jnp.result_type(theta)), 1.0).to_event(1)

    def summaries(self, x: Float[Array, "*n d"], key: Key | None = None) -> Float[Array, "*n d"]:
        """An invertible function of the data.

        Counts are made continuous by adding a uniform number in [0, 1) that `key` draws, or ½ without a key: the
        posterior given the sum is the posterior given the count.
        """
        return x

    def published(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n p"]:
        """The parameters as the benchmark has them."""
        return theta


class GaussianMixture(AbstractTask):
    r"""$x \sim \frac12 N(\theta, I) + \frac12 N(\theta, 0.01\,I)$, $\theta \sim U(-10, 10)^2$ (T.7).

    The component is summed over in the likelihood.
    """

    prior: ds.Prior

    def likelihood(self, theta: Float[Array, " 2"], z: Array) -> Distribution:
        widths = jnp.array([1.0, 0.1], theta.dtype)[:, None]
        means = jnp.broadcast_to(theta, (2, 2))
        return MixtureSameFamily(Categorical(logits=jnp.zeros(2)), Normal(means, widths).to_event(1))


class TwoMoons(AbstractTask):
    r"""$x = (r\cos a + ¼ - |\theta_1 + \theta_2|/\sqrt2,\; r\sin a + (\theta_2 - \theta_1)/\sqrt2)$ (T.8).

    $a \sim U(-\pi/2, \pi/2)$, $r \sim N(0.1, 0.01^2)$, $\theta \sim U(-1, 1)^2$. The density of x is that of $(r, a)$
    over r; it jumps to zero at the ends of the half circle, where its gradient is taken as that of either side.
    """

    prior: ds.Prior

    def likelihood(self, theta: Float[Array, " 2"], z: Array) -> Distribution:
        total, difference = theta[0] + theta[1], theta[1] - theta[0]
        return self.ring(jnp.stack([0.25 - self.across(total) / math.sqrt(2), difference / math.sqrt(2)]))

    def across(self, total: Array) -> Array:
        """What the data depend on of θ₁ + θ₂."""
        return jnp.abs(total)

    def ring(self, centre: Float[Array, " 2"]) -> Distribution:
        """Of the data about their centre."""
        return HalfRing(centre)


class HalfRing(Distribution):
    r"""$c + r(\cos a, \sin a)$ with $a \sim U(-\pi/2, \pi/2)$ and $r \sim N(0.1, 0.01^2)$."""

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("centre",)
    support = constraints.real_vector
    radius, width = 0.1, 0.01

    def __init__(self, centre: Float[Array, " 2"]):
        self.centre = centre
        super().__init__(batch_shape=(), event_shape=(2,))

    def sample(self, key, sample_shape=()):
        key_angle, key_radius = jax.random.split(key)
        a = self.angle(key_angle, sample_shape)
        r = self.radius + self.width * jax.random.normal(key_radius, sample_shape, self.centre.dtype)
        return self.centre + r[..., None] * jnp.stack([jnp.cos(a), jnp.sin(a)], -1)

    def angle(self, key, shape):
        """Draws of a."""
        return jax.random.uniform(key, shape, self.centre.dtype, -math.pi / 2, math.pi / 2)

    def log_prob(self, value):
        offset = value - self.centre
        # At the very centre the distance has no gradient.
        r = jnp.sqrt(jnp.maximum(jnp.sum(offset**2, -1), 1e-12))
        log_ring = Normal(self.radius, self.width).log_prob(r) - jnp.log(math.pi * r)
        return jnp.where(offset[..., 0] > 0, log_ring, -jnp.inf)


class SLCP(AbstractTask):
    r"""Four draws of $N((\theta_1, \theta_2), S)$, $\theta \sim U(-3, 3)^5$ (T.3).

    $S = \begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix} + 10^{-6} I$ with
    $s_1 = \theta_3^2$, $s_2 = \theta_4^2$, $\rho = \tanh\theta_5$.
    """

    prior: ds.Prior

    def likelihood(self, theta: Float[Array, " 5"], z: Array) -> Distribution:
        s1, s2, rho = theta[2] ** 2, theta[3] ** 2, jnp.tanh(theta[4])
        first = jnp.sqrt(s1**2 + 1e-6)
        below = rho * s1 * s2 / first
        # s2^2 - below^2 without its cancellation.
        second = jnp.sqrt(s2**2 * (s1**2 / jnp.cosh(theta[4]) ** 2 + 1e-6) / first**2 + 1e-6)
        root = jnp.stack([jnp.stack([first, jnp.zeros_like(first)]), jnp.stack([below, second])])
        return FourDraws(theta[:2], root)


class FourDraws(Distribution):
    r"""Four draws of $N(m, L L^T)$ in the plane, one after the other in a vector."""

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("centre", "root")
    support = constraints.real_vector

    def __init__(self, centre: Float[Array, " 2"], root: Float[Array, "2 2"]):
        self.centre, self.root = centre, root
        super().__init__(batch_shape=(), event_shape=(8,))

    def sample(self, key, sample_shape=()):
        white = jax.random.normal(key, (*sample_shape, 4, 2), self.centre.dtype)
        return jnp.tile(self.centre, 4) + (white @ self.root.T).reshape(*sample_shape, 8)

    def log_prob(self, value):
        offset = (value - jnp.tile(self.centre, 4)).reshape(4, 2)
        white = jax.scipy.linalg.solve_triangular(self.root, offset.T, lower=True)
        return -0.5 * jnp.sum(white**2) - 4 * jnp.sum(jnp.log(jnp.diag(self.root))) - 4 * math.log(2 * math.pi)


class BernoulliGLM(AbstractTask):
    r"""Spikes $z_i \sim$ Bernoulli($\sigma(V\theta)_i$) at 100 times, seen as $x = V^T z$ (T.5).

    The first column of V is one, the others are the stimulus, white noise, at lags 0 to 8. x is sufficient:
    $\log p(x | \theta) = x^T\theta - \sum_i \log(1 + e^{(V\theta)_i})$ + constant, the logarithm of the number of spike
    trains with that x, which is left out. The published prior, $\theta \sim N(0, B^{-1})$, is correlated: the
    parameters here are $\varepsilon \sim N(0, I)$ with $\theta = L\varepsilon$, $L L^T = B^{-1}$.
    """

    prior: ds.Prior
    design: Float[Array, "100 10"]
    root: Float[Array, "10 10"]

    def likelihood(self, epsilon: Float[Array, " 10"], z: Array) -> Distribution:
        return SpikeStatistics(self.published(epsilon), self.design)

    def summaries(self, x, key=None):
        return x.at[..., 0].add(_fraction(x[..., 0], key))

    def published(self, theta):
        return theta @ self.root.T


class SpikeStatistics(Distribution):
    r"""$x = V^T z$ of independent Bernoulli z with logits $V\theta$; log-density up to a constant of θ."""

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("theta", "design")
    support = constraints.real_vector

    def __init__(self, theta: Float[Array, " p"], design: Float[Array, "n p"]):
        self.theta, self.design = theta, design
        super().__init__(batch_shape=(), event_shape=theta.shape)

    def sample(self, key, sample_shape=()):
        spikes = Bernoulli(logits=self.design @ self.theta).sample(key, sample_shape)
        return spikes.astype(self.design.dtype) @ self.design

    def log_prob(self, value):
        return value @ self.theta - jnp.sum(jax.nn.softplus(self.design @ self.theta))


class SIR(AbstractTask):
    r"""An epidemic, $\dot S = -\beta S I/N$, $\dot I = \beta S I/N - \gamma I$, from one infected of $N = 10^6$ (T.9).

    The data are ten counts, Binomial(1000, I(t)/N) at $t = 0, 17, …, 153$ days; $\beta \sim$ LogNormal(log 0.4, 0.5),
    $\gamma \sim$ LogNormal(log 0.125, 0.2). Logarithms of S and I are integrated by fixed steps of Runge and Kutta's
    method: positive by construction, and smooth in θ. The summaries are the counts' arcsines (Anscombe 1948), whose
    variance hardly depends on θ.
    """

    prior: ds.Prior
    substeps: int = eqx.field(static=True)

    population: ClassVar[float] = 1e6
    tests: ClassVar[int] = 1000
    interval: ClassVar[float] = 17.0

    def likelihood(self, theta: Float[Array, " 2"], z: Array) -> Distribution:
        log_infected = self.log_fractions(theta)[:, 1]
        logits = log_infected - jnp.log(-jnp.expm1(log_infected))
        return Binomial(self.tests, logits=logits).to_event(1)

    def summaries(self, x, key=None):
        return jnp.arcsin(jnp.sqrt((x + _fraction(x, key)) / (self.tests + 1)))

    def log_fractions(self, theta: Float[Array, " 2"]) -> Float[Array, "10 2"]:
        """(log S/N, log I/N) at the ten times."""
        beta, gamma = theta
        h = self.interval / self.substeps

        def rates(y):
            s, i = jnp.exp(y)
            return jnp.stack([-beta * i, beta * s - gamma])

        def advance(y, _):
            k1 = rates(y)
            k2 = rates(y + h / 2 * k1)
            k3 = rates(y + h / 2 * k2)
            k4 = rates(y + h * k3)
            return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

        def observe(y, _):
            later, _ = jax.lax.scan(advance, y, None, length=self.substeps)
            return later, y

        start = jnp.array([math.log1p(-1 / self.population), -math.log(self.population)], jnp.result_type(theta))
        return jax.lax.scan(observe, start, None, length=10)[1]


def _fraction(count, key):
    return 0.5 if key is None else jax.random.uniform(key, count.shape, jnp.result_type(float))


def _uniform(dim: int, bound: float) -> ds.Prior:
    return ds.Prior({f"theta_{i + 1}": Uniform(-bound, bound) for i in range(dim)})


def gaussian_mixture() -> GaussianMixture:
    return GaussianMixture(_uniform(2, 10.0))


def two_moons() -> TwoMoons:
    return TwoMoons(_uniform(2, 1.0))


def slcp() -> SLCP:
    names = [f"theta_{i + 1}" for i in range(5)]
    # The means of the priors would make S singular.
    return SLCP(ds.Prior({name: Uniform(-3.0, 3.0) for name in names}, {"theta_3": 1.0, "theta_4": 1.0}))


def bernoulli_glm() -> BernoulliGLM:
    r"""With $B = \mathrm{diag}(½, F^T F)$, $F = D^2 + \mathrm{diag}(\sqrt{i/9})$, D the first differences."""
    stimulus = np.random.RandomState(42).randn(_N_SPIKES).astype(np.float32)
    lagged = [np.concatenate([np.zeros(lag), stimulus[: _N_SPIKES - lag]]) for lag in range(_N_FILTER)]
    design = np.stack([np.ones(_N_SPIKES), *lagged], 1)
    difference = np.eye(_N_FILTER) - np.eye(_N_FILTER, k=-1)
    smooth = difference @ difference + np.diag(np.sqrt(np.arange(_N_FILTER) / _N_FILTER))
    precision = np.zeros((_N_FILTER + 1, _N_FILTER + 1))
    precision[0, 0], precision[1:, 1:] = 0.5, smooth.T @ smooth
    root = np.linalg.cholesky(np.linalg.inv(precision))
    prior = ds.Prior({f"epsilon_{i + 1}": Normal(0.0, 1.0) for i in range(_N_FILTER + 1)})
    return BernoulliGLM(prior, *(jnp.asarray(a, jnp.result_type(float)) for a in (design, root)))


def sir(substeps: int = 34) -> SIR:
    """`substeps` of the solver between two counts."""
    if substeps < 1:
        raise ValueError(f"Expected substeps >= 1; got {substeps}.")
    medians = {"beta": 0.4, "gamma": 0.125}
    prior = {"beta": LogNormal(math.log(0.4), 0.5), "gamma": LogNormal(math.log(0.125), 0.2)}
    return SIR(ds.Prior(prior, medians), int(substeps))


TASKS = {f.__name__: f for f in (gaussian_mixture, two_moons, slcp, bernoulli_glm, sir)}
