r"""A posterior that was fitted under a proposal, reweighted to the prior."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._choose import choose
from diffsbi._types import Array, Float, Key, check_key, check_trailing
from diffsbi.inference.posterior import (
    DensityPosterior,
    Posterior,
    enough_memory,
    log_prob_of,
    sample_of,
    within_support,
)
from diffsbi.inference.proposals import Proposals

_BLOCK = 20_000
_MOST_BLOCKS = 50
_EFFECTIVE = 10  # effective candidates for each draw that is returned
_FEW_EFFECTIVE = 4  # fewer than so many are warned about


class ReweightedPosterior(DensityPosterior):
    r"""$q(\theta|x)\,p(\theta)/\tilde p(\theta)$ up to a constant, with q fitted to parameters drawn from $\tilde p$.

    It is zero where $\tilde p$ is smaller than at any simulation: q is not known there, and $p/\tilde p$ is large.

    Attributes:
        proposals: $\tilde p$.
    """

    proposals: Proposals = eqx.field(kw_only=True)

    def sample(self, key: Key, n: int, x: Float[Array, "*m d"] | None = None) -> Float[Array, "n *m p"]:
        r"""`n` distinct draws of theta, `(n, p)`; `(n, *m, p)` for data with leading dimensions.

        Draws of q are kept with probabilities in proportion to $p/\tilde p$, out of enough of them to be worth 10 n
        effective ones; at most a million are made. A warning says where those are not worth 4 n.

        Raises:
            ValueError: If `n` < 1, or x has the wrong width, no rows, is not finite, or is missing; or if fewer than n
                of a million draws of q are where simulations were.
            MemoryError: If memory is used up; the message says what to lower.
        """
        if (n := int(n)) < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        data = self._observations(x)
        keys = jax.random.split(check_key(key), data.size // self.x_dim)
        with enough_memory(n, data):
            draws = [self._sample_one(k, n, one) for k, one in zip(keys, data.reshape(-1, self.x_dim), strict=True)]
        return jnp.stack(draws, 1).reshape(n, *data.shape[:-1], self.prior.dim)

    def under_proposal(self) -> Posterior:
        r"""q itself, the posterior with $\tilde p$ for a prior: what is calibrated on simulations from $\tilde p$."""
        return Posterior(self.prior, self.members, self.histories, self.config_json, self.default_x)

    def leakage(self, key: Key, x: Float[Array, "*m d"] | None = None) -> Float[Array, "*m"]:
        r"""The share of q that is cut off, beyond all simulations; nothing is ever outside the prior's support."""
        data = self._observations(x)
        keys = jax.random.split(check_key(key), data.size // self.x_dim)
        rows = zip(keys, data.reshape(-1, self.x_dim), strict=True)
        weights = [_candidates(self._core(), self.proposals, k, one)[1] for k, one in rows]
        return jnp.mean(jnp.isneginf(jnp.stack(weights)), 1).reshape(data.shape[:-1])

    def log_prob(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        """The log-posterior up to a constant for each x, shape `(*n,)`; −inf outside the prior's support."""
        check_trailing("theta", theta, (self.prior.dim,))
        theta = jnp.asarray(theta, jnp.result_type(float))
        value = log_prob_of(self._core(), theta, self._data(x))
        inside, safe = within_support(self.prior, theta)
        return jnp.where(inside, value + self.proposals.log_weight(safe), -jnp.inf)

    def _sample_one(self, key: Key, n: int, x: Float[Array, " d"]) -> Float[Array, "n p"]:
        key_choose, key = jax.random.split(key)
        thetas: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        effective = 0.0
        for block in range(_MOST_BLOCKS):
            theta, weight = _candidates(self._core(), self.proposals, jax.random.fold_in(key, block), x)
            thetas, weights = [*thetas, np.asarray(theta)], [*weights, np.asarray(weight, float)]
            log_weight = np.concatenate(weights)
            weight = np.exp(log_weight - max(log_weight.max(), np.finfo(float).min))  # all zero where none is inside
            if not weight.any():
                continue
            effective = weight.sum() ** 2 / np.sum(weight**2)
            if effective >= _EFFECTIVE * n:
                break
        if effective < _FEW_EFFECTIVE * n:
            warnings.warn(
                f"{len(weight)} draws under the proposal are worth {effective:.0f} of the posterior, of which {n} were "
                "asked for: the proposal, or the fit, does not cover it. Simulate from a wider proposal, or use NLE.",
                stacklevel=3,
            )
        if np.sum(weight > 0) < n:
            raise ValueError(
                f"Expected n={n} draws where simulations were; {np.sum(weight > 0)} of {len(weight)} candidates lie "
                "there: x is unlike the simulations, or the proposal is too narrow."
            )
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key_choose)))
        return jnp.asarray(np.concatenate(thetas)[choose(weight, n, rng)])


@eqx.filter_jit
def _candidates(core, proposals, key, x):
    theta = sample_of(core, key, _BLOCK, x)
    return theta, proposals.log_weight(theta)
