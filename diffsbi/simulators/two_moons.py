r"""Two moons: a sharp, bimodal density in the plane with an exact score."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Categorical, Distribution, MixtureSameFamily, Normal, Uniform

from diffsbi._types import Array, Float, Key, check_key, check_trailing
from diffsbi.prior import Prior
from diffsbi.simulators.base import AbstractSimulator


class TwoMoons(AbstractSimulator):
    r"""The two-moons density $p^*(\theta) = \frac{1}{K} \sum_k N(\theta; c_k, \sigma^2 I)$ as a posterior.

    The density has no data: it is a target to be fitted from draws and scores. It takes the shape of a simulator
    as a location family, $x = \theta - c_k - \sigma\epsilon$ with $k$ uniform and a flat prior on the unit square.
    Then $p(x | \theta) = p^*(\theta - x)$, and **at the observation x = 0 the posterior is the density itself**
    (the square's edge is 25 σ away from the nearest centre) and the score is its exact gradient.

    $k$ is summed over in the likelihood, so the latents are an empty vector and the joint score has no noise.
    For the density fit itself use `sample`, `log_density` and `density_score`.

    Args:
        prior: Uniform on the unit square.
        centres: $c_k$, shape `(K, 2)`.
        sigma: $\sigma$, the width of each component.
    """

    prior: Prior
    centres: Array
    sigma: float = eqx.field(static=True)

    @property
    def observation(self) -> Float[Array, " 2"]:
        """The data vector at which the posterior is the two-moons density."""
        return jnp.zeros(2, self.centres.dtype)

    def latents(self, theta: Float[Array, " 2"]) -> Distribution:
        return Normal(jnp.zeros(0, jnp.result_type(theta)), 1.0).to_event(1)

    def likelihood(self, theta: Float[Array, " 2"], z: Array) -> Distribution:
        weights = Categorical(logits=jnp.zeros(len(self.centres)))
        return MixtureSameFamily(weights, Normal(theta[None, :] - self.centres, self.sigma).to_event(1))

    def log_density(self, theta: Float[Array, "*n 2"]) -> Float[Array, "*n"]:
        r"""$\log p^*(\theta)$, normalised over the plane, shape `(*n,)`."""
        check_trailing("theta", theta, (2,))
        flat = jnp.reshape(jnp.asarray(theta), (-1, 2))
        return jax.lax.map(self._log_density, flat, batch_size=256).reshape(jnp.shape(theta)[:-1])

    def density_score(self, theta: Float[Array, "*n 2"]) -> Float[Array, "*n 2"]:
        r"""$\nabla_\theta \log p^*(\theta)$, shape `(*n, 2)`."""
        check_trailing("theta", theta, (2,))
        flat = jnp.reshape(jnp.asarray(theta), (-1, 2))
        return jax.lax.map(jax.grad(self._log_density), flat, batch_size=256).reshape(jnp.shape(theta))

    def sample(self, key: Key, n: int) -> Float[Array, "n 2"]:
        """Draw `n` independent points of the density."""
        if n < 1:
            raise ValueError(f"Expected n >= 1 points; got {n}.")
        key_centre, key_noise = jax.random.split(check_key(key))
        index = jax.random.randint(key_centre, (n,), 0, len(self.centres))
        return self.centres[index] + self.sigma * jax.random.normal(key_noise, (n, 2), self.centres.dtype)

    def _log_density(self, theta):
        squared = jnp.sum((theta[None, :] - self.centres) ** 2, -1)
        log_norm = jnp.log(2 * jnp.pi * self.sigma**2 * len(self.centres))
        return jax.nn.logsumexp(-0.5 * squared / self.sigma**2) - log_norm


def two_moons(n_centres: int = 1024, sigma: float = 0.01) -> TwoMoons:
    r"""Half circles $(\cos t, \sin t)$ and $(1 - \cos t, ½ - \sin t)$, $t \in [0, \pi]$, all coordinates /5 + 0.45.

    Args:
        n_centres: Gaussians on each half circle, equally spaced in t, ends included.
        sigma: Their isotropic width.

    Raises:
        ValueError: If `n_centres` < 1, or `sigma` is not in (0, 0.03], where the prior's edge is out of reach.

    Reference: the density fit of Zeghal et al. 2022, arXiv:2207.05636.
    """
    if n_centres < 1:
        raise ValueError(f"Expected n_centres >= 1; got {n_centres}.")
    if not 0 < sigma <= 0.03:
        raise ValueError(f"Expected sigma in (0, 0.03]; got {sigma}.")
    t = np.linspace(0, np.pi, n_centres)
    upper, lower = np.stack([np.cos(t), np.sin(t)], -1), np.stack([1 - np.cos(t), 0.5 - np.sin(t)], -1)
    prior = Prior({"theta_1": Uniform(0.0, 1.0), "theta_2": Uniform(0.0, 1.0)})
    return TwoMoons(prior, jnp.asarray(np.concatenate([upper, lower]) / 5 + 0.45), float(sigma))
