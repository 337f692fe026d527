r"""Neural likelihood estimation: a density of the summaries given the parameters, and the posterior that it makes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_key, check_names, check_trailing
from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import FittedPosterior, Member, enough_memory, mixture_log_prob, within_support
from diffsbi.inference.tails import tails_of
from diffsbi.prior import Prior
from diffsbi.sampling import Chains, hmc, nuts

_CANDIDATES = 2000  # points among which the chains' starts are chosen
_NARROWINGS = 4
_MOST_CHAINS = 512  # run together by `sample`


class LikelihoodPosterior(FittedPosterior):
    r"""$p(\theta) q(x | \theta)$ up to a constant, sampled by NUTS (or HMC) in unconstrained space.

    The likelihood is the mixture of the members, which are fitted densities (or ratios) of x.
    """

    @property
    def x_dim(self) -> int:
        return self.members[0].standardiser.u_loc.shape[0]

    def log_likelihood(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        """log q(x | theta), shape `(*n,)`, leading dimensions broadcast against each other; theta inside the prior."""
        check_trailing("theta", theta, (self.prior.dim,))
        theta = jnp.asarray(theta, jnp.result_type(float))
        members, weights = self._mixture()
        value = mixture_log_prob(members, self._data(x), self.prior.to_unconstrained(theta), weights)
        tails = tails_of(self.config_json)
        if tails is None or self.config["estimator"] == "NRE":  # which has the slope in neither density
            return value
        return value + jnp.broadcast_to(tails.log_slope(self._checked(x)), value.shape)

    def log_prob(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        r"""$\log p(\theta) + \log q(x | \theta)$, the posterior up to a constant; −inf outside the prior's support."""
        check_trailing("theta", theta, (self.prior.dim,))
        theta = jnp.asarray(theta, jnp.result_type(float))
        inside, safe = within_support(self.prior, theta)
        return jnp.where(inside, self.prior.log_prob(safe) + self.log_likelihood(safe, x), -jnp.inf)

    def chains(
        self,
        key: Key,
        x: Float[Array, "*m d"] | None = None,
        *,
        n_samples: int = 500,
        n_chains: int = 4,
        sampler: str = "nuts",
        **settings,
    ) -> Chains:
        """Chains on theta, with their diagnostics; those of several observations run together.

        They start in the bulk (`_starts`). With data `(m, d)` chain c is of observation c // n_chains, so that
        `.theta` is `(m * n_chains, n_samples, p)`: R-hat of all together means nothing there.

        The trees of one step of "nuts" are as deep as the deepest of all chains needs. "hmc" makes trajectories about
        a normal of the covariance that each chain adapts to, of nearly the same number of steps for all: for twenty
        observations of six bent parameters it took a sixth of the time, with two thirds as many effective draws.
        Where posteriors are far from normal (several modes, thin arcs) it is the worse one, and nothing says so where
        observations are many: look at R-hat of a few of them.

        Args:
            key: A typed JAX key.
            x: Data, or those that the posterior was conditioned on.
            n_samples: Draws of each chain.
            n_chains: Chains of each observation.
            sampler: "nuts" or "hmc".
            settings: Of `diffsbi.sampling.nuts` or `diffsbi.sampling.hmc`.
        """
        if n_samples < 1 or n_chains < 1:
            raise ValueError(f"Expected n_samples >= 1 and n_chains >= 1; got {n_samples} and {n_chains}.")
        check_names([sampler], list(_SAMPLERS), "sampler")
        data = self._observations(x)
        key_start, key_chain = jax.random.split(check_key(key))
        run, usual = _SAMPLERS[sampler]
        settings = dict(n_warmup=200, chain_method="vectorized", step_size=0.5) | usual | settings
        lengths = settings.pop("n_warmup"), n_samples
        target, flat = _Target(*self._core()), data.reshape(-1, self.x_dim)
        init, frames = _starts(target, jax.random.split(key_start, len(flat)), flat, n_chains)
        start = {"v": init}
        if len(flat) == 1:  # one target: its R-hat and effective sample size can be waited for
            one = _At(target, jax.tree.map(lambda a: a[0], frames))
            return run(one, start, key_chain, *lengths, names=self.names, extract=one.theta, **settings)
        if sampler == "nuts":  # all chains wait for the deepest tree
            settings = dict(max_tree_depth=(6, 8)) | settings
        frames = jax.tree.map(lambda a: jnp.repeat(a, n_chains, axis=0), frames)
        chains = run(
            target, start, key_chain, *lengths, names=self.names, extract=_coordinates, data=frames, **settings
        )
        theta = jax.vmap(target.theta)({"v": jnp.asarray(chains.theta)}, frames)
        return eqx.tree_at(lambda c: c.theta, chains, np.asarray(theta))

    def sample(self, key: Key, n: int, x: Float[Array, "*m d"] | None = None, **settings) -> Float[Array, "n *m p"]:
        """`n` draws of theta, `(n, p)`; `(n, *m, p)` for data with leading dimensions, one set of chains for each.

        The draws are those of `chains`, in random order; at most `_MOST_CHAINS` chains run together.

        Raises:
            ValueError: If `n` or `n_chains` < 1, or x has the wrong width, no rows, is not finite, or is missing.
            MemoryError: If memory is used up; the message says what to lower.
        """
        if n < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        data = self._rows(x)
        flat = data.reshape(-1, self.x_dim)
        n_chains = settings.setdefault("n_chains", 4)
        if n_chains < 1:
            raise ValueError(f"Expected n_chains >= 1; got {n_chains}.")
        # Blocks of one size: one compilation.
        n_blocks = -(-len(flat) * n_chains // _MOST_CHAINS)
        size = -(-len(flat) // n_blocks)
        draws = []
        for b, first in enumerate(range(0, len(flat), size)):
            key_chain, key_order = jax.random.split(jax.random.fold_in(check_key(key), b))
            block = flat[jnp.minimum(jnp.arange(first, first + size), len(flat) - 1)]
            with enough_memory(n, data):
                chains = self.chains(key_chain, block, n_samples=-(-n // n_chains), **settings)
            theta = jnp.asarray(chains.theta).reshape(size, -1, self.prior.dim)
            draws.append(jax.vmap(jax.random.permutation)(jax.random.split(key_order, size), theta)[:, :n])
        out = jnp.concatenate(draws)[: len(flat)]
        return jnp.moveaxis(out, 0, 1).reshape(n, *data.shape[:-1], self.prior.dim)

    def propose(self, key, n, x=None):
        """Draws of the posterior itself: a likelihood may be learned anywhere."""
        return self.sample(key, n, x), None


class _Frame(NamedTuple):
    """An observation, and the coordinates in which its posterior is near a standard normal: u = loc + root v."""

    x: Float[Array, " d"]
    loc: Float[Array, " p"]
    root: Float[Array, "p p"]


class _Target(eqx.Module):
    prior: Prior
    members: tuple[Member, ...]
    weights: Array | None

    def __call__(self, position, frame: _Frame):
        return self.log_prob(frame.loc + frame.root @ position["v"], frame.x)

    def log_prob(self, u, x):
        return self.prior.log_prob_unconstrained(u) + mixture_log_prob(self.members, x, u, self.weights)

    def theta(self, position: dict[str, Float[Array, "*n p"]], frame: _Frame) -> Float[Array, "*n p"]:
        moved = position["v"] @ frame.root.T
        return self.prior.from_unconstrained(moved + jnp.broadcast_to(frame.loc, moved.shape))


class _At(eqx.Module):
    target: _Target
    frame: _Frame

    def __call__(self, position):
        return self.target(position, self.frame)

    def theta(self, position):
        return self.target.theta(position, self.frame)


def _coordinates(position):
    return position["v"]


# With what is usual for a handful of parameters in a frame where they are nearly standard normal.
_SAMPLERS: dict[str, tuple[Callable[..., Chains], dict[str, Any]]] = {
    "nuts": (nuts, {"mass": "dense"}),
    "hmc": (hmc, {"adapt": "v", "max_steps": 30}),
}


@eqx.filter_jit
def _starts(target: _Target, keys: Key, x: Float[Array, "m d"], n_chains: int) -> tuple[Array, _Frame]:
    """Starts (m n_chains, p) in the bulk of each row's posterior, and the rows' frames; one row after the other."""
    starts, frames = jax.lax.map(lambda args: _starts_of(target, args[0], args[1], n_chains), (keys, x))
    return starts.reshape(-1, starts.shape[-1]), frames


def _starts_of(target: _Target, key: Key, x: Float[Array, " d"], n_chains: int) -> tuple[Array, _Frame]:
    """Importance resampling of ever narrower candidates."""

    def values(u):
        value = jax.vmap(lambda one: target.log_prob(one, x))(u)
        return jnp.where(jnp.isfinite(value), value, -jnp.inf)

    key_prior, key = jax.random.split(key)
    u = target.prior.to_unconstrained(target.prior.sample(key_prior, (_CANDIDATES,)))
    log_weight = values(u) - jax.vmap(target.prior.log_prob_unconstrained)(u)

    def narrow(carry, key_round):
        u, log_weight = carry
        key_choose, key_move = jax.random.split(key_round)
        # Systematic resampling.
        places = (jnp.arange(_CANDIDATES) + jax.random.uniform(key_choose)) / _CANDIDATES
        index = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weight)), places)
        chosen = u[jnp.minimum(index, _CANDIDATES - 1)]
        # Candidates that are copies of few are told apart by a tenth of the last round's spread at least.
        width = jnp.maximum(jnp.std(chosen, 0), 0.1 * jnp.std(u, 0))
        u = chosen + jnp.broadcast_to(width, chosen.shape) * jax.random.normal(key_move, chosen.shape)
        return (u, values(u)), None

    (u, log_weight), _ = jax.lax.scan(narrow, (u, log_weight), jax.random.split(key, _NARROWINGS))
    weight = jax.nn.softmax(log_weight)
    loc = weight @ u
    centred = u - jnp.broadcast_to(loc, u.shape)
    # The correlations of few candidates are not trusted all the way: their matrix might be singular.
    covariance = centred.T @ (weight[:, None] * centred)
    diagonal = jnp.diag(jnp.maximum(jnp.diag(covariance), 1e-3 * jnp.var(u, 0)))
    root = jnp.linalg.cholesky(0.9 * covariance + 0.1 * diagonal)
    # Distinct ones, in proportion to the density (Gumbel's trick).
    order = log_weight + jax.random.gumbel(key, log_weight.shape)
    chosen = centred[jnp.argsort(-order)[:n_chains]]
    return jax.scipy.linalg.solve_triangular(root, chosen.T, lower=True).T, _Frame(x, loc, root)


class NLE(Estimator[LikelihoodPosterior]):
    r"""Neural likelihood estimation: $q(x | \theta)$, trained on its likelihood and on its score in theta.

    Data are standardised by their linear regression on the whitened unconstrained parameters c (`Standardiser`). The
    target of $\nabla_c \log q(x | c)$ is the joint score $W^{-T} J^T \nabla_\theta \log p(x, z | \theta)$, of which the
    mean given (theta, x) is the likelihood's own (Fisher's identity). The proposal of theta may be any: no prior
    enters the fit.

    Arguments as `Estimator`.
    """

    def _roles(self, rows):
        return rows["x"], rows["u"]

    def _target_score(self, of_likelihood, of_prior):
        return of_likelihood

    def _standard_score(self, standardiser, score):
        return jnp.linalg.solve(standardiser.whiten.T, score.T).T

    def _along(self, standardiser):
        return -jax.scipy.linalg.solve_triangular(standardiser.lower, standardiser.slope, lower=True)

    def _posterior(self, members, histories, config_json):
        return LikelihoodPosterior(self.prior, members, histories, config_json)
