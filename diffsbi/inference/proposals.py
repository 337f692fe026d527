r"""Where parameters were drawn, if not from the prior: its density, and the mixture of several rounds."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from diffsbi._types import Array, Float, Key, check_key, check_names, check_trailing
from diffsbi.prior import Prior


class GaussianProposal(eqx.Module):
    r"""$u \sim N(m, RR^T)$ in the prior's unconstrained space: never outside the prior's support.

    Args:
        prior: Gives u(theta).
        loc: m, (p,).
        root: R, lower triangular, (p, p).
    """

    prior: Prior
    loc: Float[Array, " p"]
    root: Float[Array, "p p"]

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*n p"]:
        """Draw theta, shape `(*sample_shape, p)`."""
        shift = jax.random.normal(check_key(key), (*sample_shape, self.prior.dim)) @ self.root.T
        return self.prior.from_unconstrained(shift + jnp.broadcast_to(self.loc, shift.shape))

    def log_prob(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        """Log-density of theta, shape `(*n,)`."""
        check_trailing("theta", theta, (self.prior.dim,))
        u = self.prior.to_unconstrained(theta)
        flat = (u - jnp.broadcast_to(self.loc, u.shape)).reshape(-1, self.prior.dim)
        distance = jnp.sum(solve_triangular(self.root, flat.T, lower=True) ** 2, 0).reshape(u.shape[:-1])
        norm = 0.5 * self.prior.dim * jnp.log(2 * jnp.pi) + jnp.sum(jnp.log(jnp.diag(self.root)))
        return -0.5 * distance - norm - self.prior.log_det_jacobian(u)

    def along(self, name: str, widths: float = 0.8) -> Float[Array, " p"]:
        r"""The change of u where that of parameter `name` is so many widths, and the others follow it on average.

        $C_{\cdot i} / \sqrt{C_{ii}}$ times `widths`, with $C = RR^T$: a step along the proposal's longest direction in
        that parameter.
        """
        check_names([name], list(self.prior.names), "name")
        i = self.prior.names.index(name)
        return widths * self.root @ self.root[i] / jnp.linalg.norm(self.root[i])


def gaussian_proposal(prior, theta: Float[Array, "n p"], widen: float = 1.25) -> GaussianProposal:
    """The normal with the moments of draws, such as those of a power-spectrum posterior, and wider standard deviations.

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        theta: Draws.
        widen: Factor on the standard deviations, so that the proposal covers what the draws only just reach.

    Raises:
        ValueError: Draws of the wrong shape, too few of them, not finite or outside the prior; widen not positive.
    """
    prior = prior if isinstance(prior, Prior) else prior.prior
    if not (np.isfinite(widen) and widen > 0):
        raise ValueError(f"Expected widen > 0; got {widen}.")
    mean, covariance = prior.unconstrained_moments(theta)
    root = widen * np.linalg.cholesky(covariance)
    return GaussianProposal(prior, *(jnp.asarray(a, jnp.result_type(float)) for a in (mean, root)))


class Proposals(eqx.Module):
    r"""$\tilde p(\theta) = \sum_k f_k \tilde p_k(\theta)$, what all rows together were drawn from.

    Args:
        prior: Stands where a component is None.
        components: Each with `log_prob(theta)`, normalised, in JAX.
        fractions: $f_k$, of sum 1.
        floor: $\log \tilde p(u)$ below which there were no simulations (`with_floor`).
    """

    prior: Prior
    components: tuple
    fractions: tuple[float, ...] = eqx.field(static=True)
    floor: float = eqx.field(static=True, default=-np.inf)

    def with_floor(self, theta: Float[Array, "n p"]) -> "Proposals":
        """The same, with the smallest log-density among the drawn `theta` as the floor."""
        u = self.prior.to_unconstrained(jnp.asarray(theta))
        lowest = float(jnp.min(self.log_prob_unconstrained(u)))
        return Proposals(self.prior, self.components, self.fractions, lowest)

    def log_prob_unconstrained(self, u: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        r"""$\log \tilde p(u)$ of unconstrained parameters, shape `(*n,)`."""
        return self.log_ratio(self.prior.from_unconstrained(u)) + self.prior.log_prob_unconstrained(u)

    def log_weight(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        r"""$\log p(\theta) - \log\tilde p(\theta)$, −inf where there were no simulations, shape `(*n,)`."""
        ratio, u = self.log_ratio(theta), self.prior.to_unconstrained(theta)
        return jnp.where(ratio + self.prior.log_prob_unconstrained(u) >= self.floor, -ratio, -jnp.inf)

    def log_ratio(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        r"""$\log \tilde p(\theta) - \log p(\theta)$, shape `(*n,)`."""
        own = self.prior.log_prob(theta)
        terms = [jnp.log(f) + (own if c is None else c.log_prob(theta)) for c, f in self._parts()]
        return jax.nn.logsumexp(jnp.stack(terms), axis=0) - own

    def score(self, theta: Float[Array, "n p"]) -> Float[Array, "n p"]:
        r"""$\nabla_u \log \tilde p(u)$ in unconstrained space."""
        return jax.vmap(jax.grad(self.log_prob_unconstrained))(self.prior.to_unconstrained(jnp.asarray(theta)))

    def _parts(self):
        return zip(self.components, self.fractions, strict=True)
