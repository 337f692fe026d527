r"""Neural ratio estimation: $\log p(x | \theta) / p(x)$ from telling true pairs from shuffled ones, and from scores."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from diffsbi._types import Array, Float, Key
from diffsbi.flows.constructors import small_network
from diffsbi.inference.estimator import first_model
from diffsbi.inference.losses import Contrast
from diffsbi.inference.nle import NLE
from diffsbi.inference.posterior import Member
from diffsbi.inference.standardise import Standardiser
from diffsbi.inference.streams import first_of


class RatioNetwork(eqx.Module):
    r"""$-\frac12|v|^2 + f(v, c)$, f a network that is nearly zero at first: it starts at the linear-Gaussian answer."""

    network: eqx.nn.MLP

    def log_prob(self, v: Float[Array, "*n m"], c: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        """The logarithm of the ratio, but for what x alone decides."""
        f = jnp.vectorize(self.network, signature="(i)->()")(jnp.concatenate([v, c], -1))
        return f - 0.5 * jnp.sum(v**2, -1)


def marginal_offset(standardiser: Standardiser, v: Array, c: Array) -> Array:
    r"""$\frac12 y^T S^{-1} y + \frac12 \log|S|$ of $y = x - \bar x = L v + A c$ with $S = L L^T + A A^T$: the linear
    model's $-\log p(x)$, up to the constant that $\log p(x|\theta)$ has too."""
    y = standardiser.from_standard(v, c) - jnp.broadcast_to(standardiser.u_loc, v.shape)
    lower, slope = standardiser.lower, standardiser.slope
    root = cho_factor(lower @ lower.T + slope @ slope.T, lower=True)
    distance = jnp.sum(y * cho_solve(root, y.reshape(-1, y.shape[-1]).T).T.reshape(y.shape), -1)
    return 0.5 * distance + jnp.sum(jnp.log(jnp.diag(root[0])))


class RatioMember(Member):
    r"""A fitted ratio: `log_prob(x, u)` is $\log p(x | \theta)/p(x)$; there is nothing to sample."""

    def log_prob(self, u, x):
        c = self.standardiser.condition(x)
        v = self.standardiser.to_standard(u, c)
        ratio = self.density.log_prob(v, c) + self.standardiser.log_det
        return ratio + marginal_offset(self.standardiser, v, c)

    def sample(self, key, n, x):
        raise NotImplementedError("A ratio has no draws of the data; sample the posterior that it makes.")


class NRE(NLE):
    r"""Neural ratio estimation by the contrastive loss NRE-C (`Contrast`), with the score of the log-ratio beside it.

    $\nabla_\theta \log p(x|\theta)/p(x)$ is the likelihood's score: as for `NLE`, its target is the joint score (the
    idea of RASCAL and ALICES: Brehmer et al. 2018, arXiv:1805.12244; Stoye et al. 2018, arXiv:1808.00973).

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        density: A constructor `(key, m, d) -> network` whose `log_prob(v, c)` is the logarithm of the ratio, of
            standardised data (m,) and parameters (d,); None for `RatioNetwork`.
        score_weight: As `Estimator`.
        n_classes: K, parameters that each datum is compared with.
        gamma: Odds that one of them is the true one. K = gamma = 1 is the cross-entropy of NRE-A.
        width: Hidden units of `RatioNetwork`.
        depth: Its hidden layers.
    """

    _member = RatioMember
    _fewest_in_batch = 2  # a row is told from another's parameters

    def __init__(
        self,
        prior,
        density: Callable[..., eqx.Module] | None = None,
        *,
        score_weight="auto",
        n_classes: int = 5,
        gamma: float = 1.0,
        width: int = 64,
        depth: int = 2,
    ):
        if density is not None and not callable(density):
            raise ValueError(f"Expected the constructor of a ratio's network, not of a density; got {density!r}.")
        options = {"width": width, "depth": depth} if density is None else {}
        super().__init__(prior, density, score_weight=score_weight, density_options=options)
        if n_classes < 1 or not gamma > 0 or width < 1 or depth < 1:
            got = f"{n_classes}, {gamma}, {width} and {depth}"
            raise ValueError(f"Expected n_classes >= 1, gamma > 0, width >= 1 and depth >= 1; got {got}.")
        self.n_classes, self.gamma = int(n_classes), float(gamma)

    def _density(self, key: Key, dim: int, condition_dim: int):
        return build_ratio(key, self.density, dim, condition_dim, self.density_options)

    def _is_likelihood(self):
        return False

    def _first(self, standardiser):
        return Contrast(self.n_classes, self.gamma, self._along(standardiser))

    def _more(self, standardiser, v, c):
        return {"offset": marginal_offset(standardiser, v, c) + standardiser.log_det}

    def _linear_start(self, key, density, data, validation, loss, options):
        return first_model(key, density, first_of(data), loss)  # the network starts at the linear answer as it is


def ratio_network(key: Key, dim: int, condition_dim: int, width: int = 64, depth: int = 2) -> RatioNetwork:
    """A new `RatioNetwork`."""
    return RatioNetwork(small_network(key, dim + condition_dim, "scalar", width, depth))


def build_ratio(key: Key, density, dim: int, condition_dim: int, options: dict[str, Any]) -> eqx.Module:
    """An untrained ratio: of `density` where that is a constructor, else `ratio_network`."""
    return (density if callable(density) else ratio_network)(key, dim, condition_dim, **options)
