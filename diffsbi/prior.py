r"""Named, independent priors and their map to unconstrained space."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution, biject_to, constraints

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_names, check_trailing


class Prior(eqx.Module):
    r"""Independent one-dimensional priors with names: $p(\theta) = \prod_a p_a(\theta_a)$.

    Unconstrained space is $u = b^{-1}(\theta)$ with NumPyro's bijection $b$ of each support (identity
    on the real line, exp on a half line, a scaled sigmoid on an interval), so that
    $\log p(u) = \log p(\theta(u)) + \log|\det \partial\theta/\partial u|$.

    Args:
        distributions: Parameter name → scalar NumPyro distribution, in the order of the array axis.
        fiducial: Parameter name → reference value; the distributions' means where left out.

    Raises:
        ValueError: If there is no distribution, one is not scalar, or a fiducial value is unknown or outside.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    distributions: tuple[Distribution, ...]
    _fiducial: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, distributions: Mapping[str, Distribution], fiducial: Mapping[str, float] | None = None):
        if not distributions:
            raise ValueError("Expected at least one named distribution; got none.")
        for name, distribution in distributions.items():
            if distribution.shape() != ():
                raise ValueError(f"Expected a scalar distribution for {name!r}; got shape {distribution.shape()}.")
        fiducial = dict(fiducial or {})
        check_names(list(fiducial), list(distributions))
        self.names = tuple(distributions)
        self.distributions = tuple(distributions.values())
        self._fiducial = tuple(
            float(fiducial[n] if n in fiducial else np.asarray(d.mean)) for n, d in distributions.items()
        )
        # `log_prob` leans on this point outside the support; a distribution without a mean needs one given.
        self.check(np.asarray(self._fiducial))

    @property
    def dim(self) -> int:
        return len(self.names)

    @property
    def fiducial(self) -> Float[Array, " p"]:
        return jnp.asarray(self._fiducial, jnp.result_type(float))

    def sample(self, key: Key, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*n p"]:
        """Draw theta, shape `(*sample_shape, p)`."""
        keys = jax.random.split(check_key(key), self.dim)
        return jnp.stack([d.sample(k, sample_shape) for d, k in zip(self.distributions, keys, strict=True)], -1)

    def log_prob(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        """log p(theta), shape `(*n,)`; −inf (with zero gradient) outside the support."""
        check_trailing("theta", theta, (self.dim,))
        theta = jnp.asarray(theta)
        inside = self.in_support(theta)
        # Outside, evaluate at the fiducial point instead: -inf there must not make the gradient NaN.
        safe = jnp.where(inside[..., None], theta, self.fiducial.astype(theta.dtype))
        total = sum(d.log_prob(safe[..., i]) for i, d in enumerate(self.distributions))
        return jnp.where(inside, total, -jnp.inf)

    def in_support(self, theta: Float[Array, "*n p"]) -> Array:
        """True where every parameter lies in its support (and is finite), shape `(*n,)`."""
        theta = jnp.asarray(theta)
        ok = [d.support(theta[..., i]) for i, d in enumerate(self.distributions)]
        return jnp.all(jnp.stack(ok, -1), -1) & jnp.all(jnp.isfinite(theta), -1)

    def to_unconstrained(self, theta: Float[Array, "*n p"]) -> Float[Array, "*n p"]:
        """u(theta), elementwise; of a value on a support's edge, that of one just inside it."""
        check_trailing("theta", theta, (self.dim,))
        theta = jnp.asarray(theta)
        columns = [_off_edges(d.support, theta[..., i], self._fiducial[i]) for i, d in enumerate(self.distributions)]
        return jnp.stack([b.inv(column) for b, column in zip(self._bijections, columns, strict=True)], -1)

    def from_unconstrained(self, u: Float[Array, "*n p"]) -> Float[Array, "*n p"]:
        """theta(u), elementwise."""
        check_trailing("u", u, (self.dim,))
        u = jnp.asarray(u)
        return jnp.stack([b(u[..., i]) for i, b in enumerate(self._bijections)], -1)

    def log_det_jacobian(self, u: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        r"""$\log|\det \partial\theta/\partial u|$ at `u`, shape `(*n,)`."""
        u = jnp.asarray(u)
        terms = [b.log_abs_det_jacobian(u[..., i], b(u[..., i])) for i, b in enumerate(self._bijections)]
        return jnp.sum(jnp.stack(terms, -1), -1)

    def log_prob_unconstrained(self, u: Float[Array, "*n p"]) -> Float[Array, "*n"]:
        """Log-density of u when theta(u) follows the prior, shape `(*n,)`."""
        return self.log_prob(self.from_unconstrained(u)) + self.log_det_jacobian(u)

    def check(self, theta) -> None:
        """Raise `ValueError` naming the first parameter value outside its support."""
        theta = np.asarray(theta)
        check_trailing("theta", theta, (self.dim,))
        for i, (name, d) in enumerate(zip(self.names, self.distributions, strict=True)):
            values = theta[..., i].ravel()
            bad = ~(np.asarray(d.support(jnp.asarray(values))) & np.isfinite(values))
            if bad.any():
                where = f" (row {int(bad.argmax())}; {int(bad.sum())} of {len(bad)} are not)" if len(bad) > 1 else ""
                raise ValueError(
                    f"Expected {name} inside the prior's support {d.support}; got {values[bad][0]}{where}."
                )

    def unconstrained_moments(self, theta: Float[Array, "n p"], what: str = "theta") -> tuple[np.ndarray, np.ndarray]:
        """Mean `(p,)` and covariance `(p, p)` of u over draws of some posterior, which messages call `what`.

        Raises:
            ValueError: Draws of the wrong shape, too few of them, not finite or outside the prior.
        """
        draws = np.asarray(theta)
        if draws.ndim != 2 or draws.shape[1] != self.dim or len(draws) < self.dim + 2:
            raise ValueError(f"Expected {what} with at least {self.dim + 2} draws, (n, {self.dim}); got {draws.shape}.")
        check_finite(what, draws)
        self.check(draws)
        u = np.asarray(self.to_unconstrained(jnp.asarray(draws)), float)
        return u.mean(0), np.atleast_2d(np.cov(u.T))

    def unconstrained_spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of u, `(p,)` each, of 4000 draws, always the same: for scales only."""
        u = np.asarray(_draws_unconstrained(self), float)
        return u.mean(0), u.std(0)

    def marginal(self, names: Sequence[str]) -> "Prior":
        """The prior of some of the parameters."""
        check_names(list(names), list(self.names))
        index = [self.names.index(name) for name in names]
        fiducial = {self.names[i]: self._fiducial[i] for i in index}
        return Prior({n: self.distributions[i] for n, i in zip(names, index, strict=True)}, fiducial)

    def truncated(self, low: Float[Array, " p"], high: Float[Array, " p"]) -> "Prior":
        """The prior within a box of finite sides, renormalised; the fiducial is moved inside.

        Raises:
            ValueError: If the box has no prior mass along a parameter, or a distribution has no `cdf` and `icdf`.
        """
        check_trailing("low", low, (self.dim,))
        check_trailing("high", high, (self.dim,))
        box, inside = np.stack([np.asarray(low, float), np.asarray(high, float)]), {}
        for name, d, (a, b) in zip(self.names, self.distributions, box.T, strict=True):
            if not (np.isfinite(b - a) and a < b and float(d.cdf(b)) > float(d.cdf(a))):
                raise ValueError(f"Expected prior mass of {name} between low and high; got [{a}, {b}].")
            inside[name] = Within(d, a, b)
        eighth = (box[1] - box[0]) / 8
        fiducial = np.clip(self._fiducial, box[0] + eighth, box[1] - eighth)
        return Prior(inside, dict(zip(self.names, fiducial.tolist(), strict=True)))

    @property
    def _bijections(self):
        return [biject_to(d.support) for d in self.distributions]


def _off_edges(support, value: Array, fiducial: float) -> Array:
    """Values on a bound of the support moved inside: by a millionth of the way to the fiducial, or two steps of floats.

    The bound belongs to the support of a uniform distribution, whose draws reach it, and has no finite u.
    """
    value = jnp.asarray(value, jnp.result_type(value, float))
    for bound in (getattr(support, name, None) for name in ("lower_bound", "upper_bound")):
        if bound is not None:
            step = jnp.maximum(1e-6 * jnp.abs(fiducial - bound), 2 * jnp.finfo(value.dtype).eps * jnp.abs(bound))
            inside = bound + jnp.sign(fiducial - bound) * step
            value = jnp.where(value == bound, inside.astype(value.dtype), value)
    return value


class Within(Distribution):
    """A scalar distribution with `cdf` and `icdf`, between two bounds and renormalised."""

    arg_constraints: ClassVar[dict] = {}
    pytree_data_fields = ("base", "low", "high")

    def __init__(self, base: Distribution, low: float, high: float):
        # The box may reach past the distribution's own support.
        own = base.support
        self.base = base
        self.low = float(np.maximum(low, getattr(own, "lower_bound", -np.inf)))
        self.high = float(np.minimum(high, getattr(own, "upper_bound", np.inf)))
        super().__init__(batch_shape=(), event_shape=())

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return constraints.interval(self.low, self.high)

    def sample(self, key, sample_shape=()):
        at = jax.random.uniform(key, sample_shape, minval=self.base.cdf(self.low), maxval=self.base.cdf(self.high))
        return jnp.clip(self.base.icdf(at), self.low, self.high)

    def log_prob(self, value):
        mass = self.base.cdf(self.high) - self.base.cdf(self.low)
        inside = (value >= self.low) & (value <= self.high)
        return jnp.where(inside, self.base.log_prob(jnp.clip(value, self.low, self.high)) - jnp.log(mass), -jnp.inf)

    def cdf(self, value):
        below, above = self.base.cdf(self.low), self.base.cdf(self.high)
        return jnp.clip((self.base.cdf(value) - below) / (above - below), 0.0, 1.0)

    def icdf(self, q):
        below, above = self.base.cdf(self.low), self.base.cdf(self.high)
        return jnp.clip(self.base.icdf(below + q * (above - below)), self.low, self.high)

    @property
    def mean(self):
        return self.icdf(jnp.asarray(0.5))


@eqx.filter_jit
def _draws_unconstrained(prior: Prior) -> Float[Array, "4000 p"]:
    return prior.to_unconstrained(prior.sample(jax.random.key(0), (4000,)))
