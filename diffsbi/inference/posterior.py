r"""A fitted posterior: draws and densities in theta, whatever the space that it was learned in."""

import abc
import functools
import json
import time
import warnings
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_trailing
from diffsbi.inference.frames import LocalFrame
from diffsbi.inference.memory import explained
from diffsbi.inference.standardise import Standardiser
from diffsbi.inference.tails import drawn_in, tails_of
from diffsbi.inference.training import History
from diffsbi.prior import Prior

_BLOCKS = 16  # of draws of members with weights
_FEW_BLOCKS = 10  # of candidates, which tell how many it takes


class Member(eqx.Module):
    r"""One fitted density $q(v | c)$ with its coordinates; together $q(u | x) = q(v | c) |\partial v/\partial u|$.

    Where there is a `frame`, the standardiser works in its coordinates instead of u.
    """

    standardiser: Standardiser
    density: AbstractDistribution
    frame: LocalFrame | None = None

    def log_prob(self, u: Float[Array, "*n p"], x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        log_det = self.standardiser.log_det
        if self.frame is not None:
            u, of_frame = self.frame.to_local(u, x)
            log_det = log_det + of_frame
        c = self.standardiser.condition(x)
        return self.density.log_prob(self.standardiser.to_standard(u, c), c) + log_det

    def sample(self, key: Key, n: int, x: Float[Array, "*m d"]) -> Float[Array, "n *m p"]:
        c = self.standardiser.condition(x)
        keys = jax.random.split(key, (n, *c.shape[:-1]))
        wide = jnp.broadcast_to(c, (*keys.shape, c.shape[-1]))
        draw = jnp.vectorize(lambda key, c: self.density.sample(key, (), c), signature="(),(d)->(p)")
        u = self.standardiser.from_standard(draw(keys, wide), wide)
        return u if self.frame is None else self.frame.from_local(u, jnp.broadcast_to(x, (*keys.shape, x.shape[-1])))


_FAR_OUT = 0.5  # widths of a column's range, outside it, beyond which data are warned about
_MOST_NAMED = 5


class FittedPosterior(eqx.Module):
    """What posteriors of all estimators share.

    Data that lie outside the range of the simulations, by more than half the range's width in some column, are
    warned about, once for the same data.

    Attributes:
        prior: Names, supports, and the map to unconstrained space.
        members: The fitted densities.
        histories: How each of them was fitted.
        config_json: What rebuilds the densities when loading (see `persist`); as a dictionary, `config`.
        default_x: The data that `sample` and `log_prob` use where they are given none.
    """

    prior: Prior
    members: tuple[Member, ...]
    histories: tuple[History, ...]
    config_json: str = eqx.field(static=True)
    default_x: Array | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.prior.names

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.config_json)

    @property
    def weights(self) -> np.ndarray:
        """Weights of the members in the mixture, summing to one."""
        given = self.config.get("weights")
        return np.full(len(self.members), 1 / len(self.members)) if given is None else np.asarray(given, float)

    def _mixture(self) -> tuple[tuple[Member, ...], Array | None]:
        """The members with a weight, and the weights; None for equal ones."""
        if self.config.get("weights") is None:
            return self.members, None
        kept = np.flatnonzero(self.weights > 0)
        return tuple(self.members[k] for k in kept), jnp.asarray(self.weights[kept], jnp.result_type(float))

    def _core(self) -> tuple[Prior, tuple[Member, ...], Array | None]:
        """What draws and densities are computed from."""
        return self.prior, *self._mixture()

    @property
    @abc.abstractmethod
    def x_dim(self) -> int:
        """Width of the data."""

    @property
    def history(self) -> History:
        """The history of the first member."""
        return self.histories[0]

    @property
    def is_normalised(self) -> bool:
        """Whether `log_prob` is a density, and not one up to a constant."""
        return False

    def condition(self, x: Float[Array, " d"]) -> Self:
        """The same posterior with `x` as its default data."""
        return eqx.tree_at(lambda p: p.default_x, self, self._checked(x), is_leaf=lambda v: v is None)

    @abc.abstractmethod
    def sample(self, key: Key, n: int, x: Float[Array, "*m d"] | None = None) -> Float[Array, "n *m p"]:
        """`n` draws of theta, shape `(n, p)`; `(n, *m, p)` for data with leading dimensions."""

    @abc.abstractmethod
    def log_prob(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        """Log-density of theta, for some estimators up to a constant; −inf outside the prior's support."""

    @abc.abstractmethod
    def propose(
        self, key: Key, n: int, x: Float[Array, " d"] | None = None
    ) -> tuple[Float[Array, "n p"], Callable[[Array], Array] | None]:
        """Parameters at which to simulate next, and the region `theta (n, p) -> (n,)` of which simulations may be used.

        The region is None where any may be.
        """

    def save(self, path) -> None:
        """Write one file that `load_posterior` reads back."""
        from diffsbi.inference.persist import save_posterior

        save_posterior(self, path)

    def _data(self, x) -> Array:
        """What the members take for x."""
        return drawn_in(tails_of(self.config_json), self._checked(x))

    def _checked(self, x) -> Array:
        x = self.default_x if x is None else x
        if x is None:
            raise ValueError("Expected data x=..., or a posterior with default data from .condition(x); got neither.")
        check_trailing("x", x, (self.x_dim,))
        if not isinstance(x, jax.core.Tracer):
            check_finite("x", np.asarray(x))
            _check_range(np.asarray(x, float).reshape(-1, self.x_dim), self.config_json)
        return jnp.asarray(x, jnp.result_type(float))

    def _observations(self, x) -> Array:
        """The data to sample for, as the members take them."""
        return self._data(self._rows(x))

    def _rows(self, x) -> Array:
        """The data to sample for, as they are given: at least one row."""
        data = self._checked(x)
        if not data.size:
            raise ValueError(f"Expected at least one row of x to sample for; got shape {data.shape}.")
        return data


def enough_memory(n: int, data: Array):
    """The context in which `n` draws for each row of `data` are made."""
    rows = data.size // data.shape[-1]
    return explained(f"for n={n} draws for each of {rows} rows of x: lower n, or sample fewer rows of x at a time.")


@functools.lru_cache(maxsize=64)
def _range(config_json: str) -> np.ndarray | None:
    """Least and largest value of every column of the training data, `(2, d)`; None for older posteriors."""
    limits = json.loads(config_json).get("x_range")
    return None if limits is None else np.asarray(limits, float)


def _check_range(x: np.ndarray, config_json: str) -> None:
    """Warn where a column of x `(n, d)` lies far outside what the fit has seen."""
    limits = _range(config_json)
    if limits is None:
        return
    low, high = limits
    outside = np.maximum(low - x, x - high)
    rounding = 1e-6 * np.maximum(np.abs(low), np.abs(high))  # of constant columns
    by_row = outside > _FAR_OUT * (high - low) + rounding
    if not by_row.any():
        return
    worst = np.argmax(outside, 0)
    width = np.maximum(high - low, rounding)
    columns = sorted(np.flatnonzero(by_row.any(0)), key=lambda j: -outside[worst[j], j] / max(width[j], 1e-300))
    named = [f"column {j} is {x[worst[j], j]:.4g} (simulations {low[j]:.4g} to {high[j]:.4g})" for j in columns]
    more = f", and {len(named) - _MOST_NAMED} more columns" if len(named) > _MOST_NAMED else ""
    rows = f"{by_row.any(1).sum()} of {len(x)} rows of x lie" if len(x) > 1 else "x lies"
    _warn_once(
        f"{rows} far outside the simulations that this was fitted to: {'; '.join(named[:_MOST_NAMED])}{more}. The "
        "result is an extrapolation: see diffsbi.diagnostics.misspecification.",
        config_json,
    )


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str, config_json: str) -> None:
    warnings.warn(message, stacklevel=2)


class DensityPosterior(FittedPosterior):
    r"""What posteriors share whose members are densities $q(\theta | x)$."""

    @property
    def x_dim(self) -> int:
        return self.members[0].standardiser.x_loc.shape[0]

    def propose(self, key, n, x=None):
        """Draws of the prior within the posterior's region (`truncated_prior`)."""
        return truncated_prior(self, key, n, x)


class Posterior(DensityPosterior):
    r"""$q(\theta | x)$, a mixture of its members in unconstrained space: no draw leaves the prior's support."""

    @property
    def is_normalised(self) -> bool:
        return True

    def sample(self, key: Key, n: int, x: Float[Array, "*m d"] | None = None) -> Float[Array, "n *m p"]:
        """`n` draws of theta, shape `(n, p)`; `(n, *m, p)` for data with leading dimensions.

        Raises:
            ValueError: If `n` < 1, or x has the wrong width, no rows, is not finite, or is missing.
            MemoryError: If memory is used up; the message says what to lower.
        """
        check_key(key)
        if (n := int(n)) < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        data = self._observations(x)
        with enough_memory(n, data):
            return jax.block_until_ready(sample_of(self._core(), key, n, data))

    def log_prob(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        """log q(theta | x), shape `(*n,)`; −inf, with zero gradient, outside the prior's support.

        The leading dimensions of theta and x are broadcast against each other.
        """
        check_trailing("theta", theta, (self.prior.dim,))
        return log_prob_of(self._core(), jnp.asarray(theta, jnp.result_type(float)), self._data(x))

    def score(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n p"]:
        r"""$\nabla_\theta \log q(\theta | x)$, shape `(*n, p)`."""
        check_trailing("theta", theta, (self.prior.dim,))
        theta, core, data = jnp.asarray(theta, jnp.result_type(float)), self._core(), self._data(x)
        return jax.grad(lambda t: jnp.sum(log_prob_of(core, t, data)))(theta)


@eqx.filter_jit
def sample_of(core, key, n, x):
    """Draws of the mixture `core = (prior, members, weights)`; None for equal weights."""
    prior, members, weights = core
    if weights is not None:
        return prior.from_unconstrained(_weighted_draws(members, weights, key, n, x))
    sizes = [n // len(members) + (i < n % len(members)) for i in range(len(members))]
    keys = jax.random.split(key, len(members) + 1)
    draws = [m.sample(k, size, x) for m, k, size in zip(members, keys[1:], sizes, strict=True) if size]
    u = draws[0] if len(draws) == 1 else jax.random.permutation(keys[0], jnp.concatenate(draws))
    return prior.from_unconstrained(u)


def _weighted_draws(members, weights, key, n, x):
    """Draws in blocks of one member each, so that nothing is compiled anew for other weights and little is wasted."""
    key_start, key_order, key = jax.random.split(key, 3)
    places = (jnp.arange(n) + jax.random.uniform(key_start)) / n
    edges = jnp.cumsum(weights) / jnp.sum(weights)
    member = jnp.minimum(jnp.searchsorted(edges, places, side="right"), len(members) - 1)
    size = -(-n // min(n, _BLOCKS))
    counts = jnp.bincount(member, length=len(members))
    ends = jnp.cumsum(-(-counts // size))
    first = (ends + counts // -size)[member] * size - (jnp.cumsum(counts) - counts)[member]  # less its draws' own place
    n_blocks = -(-n // size) + len(members)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(n_blocks), side="right"), len(members) - 1)
    branches = [lambda key, m=m: m.sample(key, size, x) for m in members]
    draws = jax.lax.map(lambda a: jax.lax.switch(a[0], branches, a[1]), (owner, jax.random.split(key, n_blocks)))
    return draws.reshape(-1, *draws.shape[2:])[jax.random.permutation(key_order, first + jnp.arange(n))]


@eqx.filter_jit
def log_prob_of(core, theta, x):
    """Its log-density in theta."""
    prior, members, weights = core
    inside, safe = within_support(prior, theta)
    u = prior.to_unconstrained(safe)
    value = mixture_log_prob(members, u, x, weights)
    value = value - jnp.broadcast_to(prior.log_det_jacobian(u), value.shape)
    return jnp.where(jnp.broadcast_to(inside, value.shape), value, -jnp.inf)


def within_support(prior: Prior, theta: Float[Array, "*n p"]) -> tuple[Array, Float[Array, "*n p"]]:
    """Which rows are in the prior's support, and the rows with those outside moved to the fiducial.

    Densities are evaluated there instead: an infinite u must not make the gradient NaN.
    """
    inside = prior.in_support(theta)
    fiducial = jnp.broadcast_to(prior.fiducial.astype(theta.dtype), theta.shape)
    return inside, jnp.where(inside[..., None], theta, fiducial)


def mixture_log_prob(
    members, of: Float[Array, "*n a"], given: Float[Array, "*n b"], weights: Float[Array, " m"] | None = None
) -> Float[Array, "*n"]:
    """Log-density of the mixture of the members, leading dimensions broadcast; weights sum to one, None: equal ones."""
    batch = jnp.broadcast_shapes(of.shape[:-1], given.shape[:-1])
    of, given = (jnp.broadcast_to(a, (*batch, a.shape[-1])) for a in (of, given))
    values = jnp.stack([m.log_prob(of, given) for m in members])
    if weights is None:
        return jax.nn.logsumexp(values, axis=0) - jnp.log(len(members))
    log_weights = jnp.log(weights).reshape(-1, *(1,) * len(batch))
    return jax.nn.logsumexp(values + jnp.broadcast_to(log_weights, values.shape), axis=0)


def truncated_prior(
    posterior: FittedPosterior,
    key: Key,
    n: int,
    x=None,
    *,
    outside: float = 1e-4,
    most_candidates: int = 10_000_000,
    most_seconds: float = 900.0,
):
    """Draws of the prior within the posterior's highest-density region that holds all but `outside` of it.

    Returns:
        The draws `(n, p)`, and the region, theta `(m, p)` → `(m,)`.

    Raises:
        ValueError: If the region holds so little of the prior that `most_candidates` draws do not give n, nor
            `most_seconds` (some densities are slow: `FMPE`); after a few blocks already where these say so.
    """
    key_level, key = jax.random.split(check_key(key))
    draws = posterior.sample(key_level, 20_000, x)
    level = jnp.quantile(posterior.log_prob(draws, x), outside)

    def inside(theta):
        return np.asarray(posterior.log_prob(jnp.asarray(theta), x) >= level)

    kept: list[np.ndarray] = []
    found, tried, size, start = 0, 0, 20_000, time.monotonic()
    while found < n:
        likely = (found + 3 * np.sqrt(found) + 5) / max(tried, 1) * most_candidates  # three standard deviations up
        if tried >= most_candidates or (tried >= _FEW_BLOCKS * size and likely < n):
            raise ValueError(
                f"Expected {n} draws of the prior within the posterior's region; {tried} candidates gave {found}, and "
                f"at most {most_candidates} are tried. "
                "Propose from a likelihood's or a ratio's posterior (NLE, NRE), or from a narrower prior."
            )
        candidates = posterior.prior.sample(jax.random.fold_in(key, tried), (size,))
        good = np.asarray(candidates)[inside(candidates)]
        kept, found, tried = [*kept, good], found + len(good), tried + size
        if found < n and (seconds := time.monotonic() - start) > most_seconds:
            raise ValueError(
                f"Expected {n} draws of the prior within the posterior's region in {most_seconds:g} s; {tried} "
                f"candidates gave {found} in {seconds:.0f} s."
            )
    return jnp.asarray(np.concatenate(kept)[:n]), inside
