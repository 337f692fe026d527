r"""A linear simulator whose posterior, marginal score and evidence are known in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve, solve_triangular
from numpyro.distributions import Distribution, MultivariateNormal, Normal

from diffsbi._types import Array, Float, check_trailing
from diffsbi.prior import Prior
from diffsbi.simulators.base import AbstractSimulator, AbstractTransport, Identity


class LinearGaussian(AbstractSimulator):
    r"""$\theta \sim N(m, \mathrm{diag}\,s^2)$, $z \sim N(0, I)$, $x = A\theta + Bz + \sigma\epsilon$.

    With the latents integrated out, $x | \theta \sim N(A\theta, \Sigma)$ where $\Sigma = BB^T + \sigma^2 I$.

    Args:
        prior: Independent normal priors, mean $m$ and standard deviation $s$.
        loc: $m$, shape `(p,)`.
        scale: $s$, shape `(p,)`.
        design: $A$, shape `(n_data, p)`.
        mixing: $B$, shape `(n_data, n_latents)`.
        noise: $\sigma > 0$.
    """

    prior: Prior
    loc: Array
    scale: Array
    design: Array
    mixing: Array
    noise: float = eqx.field(static=True)

    def latents(self, theta: Float[Array, " p"]) -> Distribution:
        return Normal(jnp.zeros(self.mixing.shape[1], jnp.result_type(theta)), 1.0).to_event(1)

    def likelihood(self, theta: Float[Array, " p"], z: Array) -> Distribution:
        return Normal(self.design @ theta + self.mixing @ z, self.noise).to_event(1)

    def transports(self):
        return {"white": Identity(), "whitened": WienerTransport(self.design, self.mixing, self.noise)}

    @property
    def covariance(self) -> Array:
        r"""$\Sigma = BB^T + \sigma^2 I$, the covariance of x given theta, shape `(n_data, n_data)`."""
        return self.mixing @ self.mixing.T + self.noise**2 * jnp.eye(self.mixing.shape[0])

    def posterior(self, x: Float[Array, " d"]) -> tuple[Float[Array, " p"], Float[Array, "p p"]]:
        r"""Mean $C(A^T\Sigma^{-1}x + S^{-2}m)$ and covariance $C = (A^T\Sigma^{-1}A + S^{-2})^{-1}$ of $\theta | x$."""
        check_trailing("x", x, (self.design.shape[0],))
        weighted = cho_solve(cho_factor(self.covariance, lower=True), self.design).T
        precision = cho_factor(weighted @ self.design + jnp.diag(self.scale**-2), lower=True)
        mean = cho_solve(precision, weighted @ x + self.loc / self.scale**2)
        return mean, cho_solve(precision, jnp.eye(self.prior.dim))

    def log_likelihood(self, theta: Float[Array, " p"], x: Float[Array, " d"]) -> Array:
        r"""$\log p(x | \theta) = \log N(x; A\theta, \Sigma)$, latents integrated out."""
        return MultivariateNormal(self.design @ theta, self.covariance).log_prob(x)

    def marginal_score(self, theta: Float[Array, " p"], x: Float[Array, " d"]) -> Float[Array, " p"]:
        r"""$\nabla_\theta \log p(x | \theta) = A^T \Sigma^{-1} (x - A\theta)$."""
        return self.design.T @ cho_solve(cho_factor(self.covariance, lower=True), x - self.design @ theta)

    def log_evidence(self, x: Float[Array, " d"]) -> Array:
        r"""$\log p(x) = \log N(x; Am, A S^2 A^T + \Sigma)$."""
        scaled = self.design * self.scale[None, :]
        return MultivariateNormal(self.design @ self.loc, scaled @ scaled.T + self.covariance).log_prob(x)


class WienerTransport(AbstractTransport):
    r"""$z = \mu(\theta, x) + R^{-T}\xi$ with $\xi | \theta, x \sim N(0, I)$ exactly.

    $P = I + B^TB/\sigma^2 = RR^T$ is the precision of $z | \theta, x$ and
    $\mu = P^{-1}B^T(x - A\theta)/\sigma^2$ its mean, so that $p(x, \xi | \theta) = N(\xi; 0, I)\, p(x | \theta)$:
    in this coordinate the joint score is the marginal score, free of noise.
    """

    design: Array
    mixing: Array
    noise: float = eqx.field(static=True)

    def to_latents(self, theta, xi, x):
        root, mean = self._root_and_mean(theta, x)
        return mean + solve_triangular(root, xi, trans=1, lower=True), -_log_det(root)

    def from_latents(self, theta, z, x):
        root, mean = self._root_and_mean(theta, x)
        return root.T @ (z - mean), _log_det(root)

    def _root_and_mean(self, theta, x):
        scaled = self.mixing / self.noise
        root = jnp.linalg.cholesky(scaled.T @ scaled + jnp.eye(scaled.shape[1]))
        return root, cho_solve((root, True), scaled.T @ (x - self.design @ theta) / self.noise)


def _log_det(root):
    return jnp.sum(jnp.log(jnp.diag(root)))


def linear_gaussian(
    dim: int = 2, n_latents: int = 3, n_data: int = 6, seed: int = 0, *, loc=0.0, scale=1.0, noise: float = 0.5
) -> LinearGaussian:
    r"""A `LinearGaussian` with random matrices, entries of $A$ and $B$ drawn from N(0, 1).

    Args:
        dim: Number of parameters.
        n_latents: Number of latents.
        n_data: Length of the data vector.
        seed: Seed of the matrices.
        loc: Prior mean, one number or one per parameter.
        scale: Prior standard deviation, likewise.
        noise: Standard deviation of the noise.

    Raises:
        ValueError: If a size is below 1, or `noise` or a `scale` is not positive.
    """
    for name, size in (("dim", dim), ("n_latents", n_latents), ("n_data", n_data)):
        if size < 1:
            raise ValueError(f"Expected {name} >= 1; got {size}.")
    if not noise > 0:
        raise ValueError(f"Expected noise > 0; got {noise}.")
    loc, scale = np.broadcast_to(loc, (dim,)).astype(float), np.broadcast_to(scale, (dim,)).astype(float)
    if not (scale > 0).all():
        raise ValueError(f"Expected scale > 0; got {scale.tolist()}.")
    prior = Prior({f"theta_{i + 1}": Normal(float(loc[i]), float(scale[i])) for i in range(dim)})
    key_a, key_b = jax.random.split(jax.random.key(seed))
    design, mixing = jax.random.normal(key_a, (n_data, dim)), jax.random.normal(key_b, (n_data, n_latents))
    return LinearGaussian(prior, jnp.asarray(loc), jnp.asarray(scale), design, mixing, float(noise))
