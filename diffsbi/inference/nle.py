r"""Neural likelihood estimation: a density of the summaries given the parameters, and the posterior that it makes."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import multivariate_normal

from diffsbi._types import Array, Float, Key, check_key, check_names, check_trailing
from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import FittedPosterior, Member, enough_memory, mixture_log_prob, within_support
from diffsbi.inference.tails import tails_of
from diffsbi.prior import Prior
from diffsbi.sampling import Chains, hmc, nuts

_CANDIDATES = 2000  # points among which the chains' starts are chosen
_CENTRES = 200  # around which they are drawn anew
_NARROWINGS = 4
_MOST_CHAINS = 512  # run together by `sample`
_APART = 1.3  # R-hat


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
        return self._chains(key, x, n_samples, n_chains, sampler, settings)[0]

    def _chains(self, key, x, n_samples: int, n_chains: int, sampler: str, settings) -> tuple[Chains, "_Population"]:
        """Chains, and the weighted candidates that their starts were chosen among."""
        if n_samples < 1 or n_chains < 1:
            raise ValueError(f"Expected n_samples >= 1 and n_chains >= 1; got {n_samples} and {n_chains}.")
        check_names([sampler], list(_SAMPLERS), "sampler")
        data = self._observations(x)
        key_start, key_chain = jax.random.split(check_key(key))
        run, usual = _SAMPLERS[sampler]
        settings = dict(n_warmup=200, chain_method="vectorized", step_size=0.5) | usual | settings
        lengths = settings.pop("n_warmup"), n_samples
        target, flat = _Target(*self._core()), data.reshape(-1, self.x_dim)
        init, frames, population = _starts(target, jax.random.split(key_start, len(flat)), flat, n_chains)
        start = {"v": init}
        if len(flat) == 1:  # one target: its R-hat and effective sample size can be waited for
            one = _At(target, jax.tree.map(lambda a: a[0], frames))
            found = run(one, start, key_chain, *lengths, names=self.names, extract=one.theta, **settings)
            return found, population
        if sampler == "nuts":  # all chains wait for the deepest tree
            settings = dict(max_tree_depth=(6, 8)) | settings
        frames = jax.tree.map(lambda a: jnp.repeat(a, n_chains, axis=0), frames)
        chains = run(
            target, start, key_chain, *lengths, names=self.names, extract=_coordinates, data=frames, **settings
        )
        theta = jax.vmap(target.theta)({"v": jnp.asarray(chains.theta)}, frames)
        return eqx.tree_at(lambda c: c.theta, chains, np.asarray(theta)), population

    def sample(
        self, key: Key, n: int, x: Float[Array, "*m d"] | None = None, *, n_chains: int = 4, sampler="nuts", **settings
    ) -> Float[Array, "n *m p"]:
        """`n` draws of theta, `(n, p)`; `(n, *m, p)` for data with leading dimensions, one set of chains for each.

        The draws are those of `chains`, in random order; at most `_MOST_CHAINS` chains run together. Chains in modes
        that are far apart stay there: they then count by the weight of the candidates, drawn before, that are near
        each, and a warning says so.

        Raises:
            ValueError: If `n` or `n_chains` < 1, or x has the wrong width, no rows, is not finite, or is missing.
            MemoryError: If memory is used up; the message says what to lower.
        """
        if (n := int(n)) < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        data = self._rows(x)
        flat = data.reshape(-1, self.x_dim)
        if n_chains < 1:
            raise ValueError(f"Expected n_chains >= 1; got {n_chains}.")
        # Blocks of one size: one compilation.
        n_blocks = -(-len(flat) * n_chains // _MOST_CHAINS)
        size = -(-len(flat) // n_blocks)
        draws, apart = [], 0
        for b, first in enumerate(range(0, len(flat), size)):
            key_chain, key_order = jax.random.split(jax.random.fold_in(check_key(key), b))
            block = flat[jnp.minimum(jnp.arange(first, first + size), len(flat) - 1)]
            with enough_memory(n, data):
                chains, population = self._chains(key_chain, block, -(-n // n_chains), n_chains, sampler, settings)
            theta = np.array(chains.theta).reshape(size, n_chains, -1, self.prior.dim)
            for i in np.flatnonzero(_largest_rhat(theta) > _APART):
                apart += int(first + i < len(flat))
                theta[i] = _by_mode(self.prior, theta[i], population.u[i], population.weight[i])
            flattened = jnp.asarray(theta).reshape(size, -1, self.prior.dim)
            draws.append(jax.vmap(jax.random.permutation)(jax.random.split(key_order, size), flattened)[:, :n])
        if apart:
            warnings.warn(
                f"The {n_chains} chains of {apart} of {len(flat)} rows of x are not in one place: the posterior has "
                f"several modes, or they have not converged. Draws are shared out by the weights of {_CANDIDATES} "
                "candidates; a mode in which no chain started is missing. More chains (n_chains=20) find more, and NPE "
                "does not need any.",
                stacklevel=2,
            )
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


class _Population(NamedTuple):
    """Candidates in unconstrained space, `(m, k, p)`, and their importance weights, which sum to one."""

    u: Array
    weight: Array


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


def _largest_rhat(theta: Float[np.ndarray, "m c n p"]) -> np.ndarray:
    """R-hat of the chains of each of m rows, the largest of all parameters; 1 where there is one chain, or one draw.

    The plain one, of all rows at once: that of ranks (`Chains.summary`) takes milliseconds for each, and stays near 1.5
    where modes are apart.
    """
    n = theta.shape[2]
    if n < 2 or theta.shape[1] < 2:
        return np.ones(len(theta))
    within, between = theta.var(2, ddof=1).mean(1), theta.mean(2).var(1, ddof=1)
    return np.sqrt((n - 1) / n + between / np.maximum(within, 1e-300)).max(-1)


def _by_mode(prior: Prior, theta: Float[np.ndarray, "c n p"], candidates, weight) -> Float[np.ndarray, "c n p"]:
    """As many draws of these chains, each chain as often as the candidates weigh that are likeliest under its normal.

    Of chains in one mode any may have the more: together they have what the mode weighs.
    """
    u = np.asarray(prior.to_unconstrained(jnp.asarray(theta)), float)
    ridge = [np.diag(1e-6 + 0.05 * chain.var(0)) for chain in u]  # of few draws
    normals = [multivariate_normal(c.mean(0), np.atleast_2d(np.cov(c.T)) + r) for c, r in zip(u, ridge, strict=True)]
    closeness = np.stack([np.reshape(one.logpdf(candidates), len(candidates)) for one in normals])
    share = np.bincount(closeness.argmax(0), np.asarray(weight, float), len(u))
    n = theta.shape[0] * theta.shape[1]
    chain = np.minimum(np.searchsorted(np.cumsum(share / share.sum()), (np.arange(n) + 0.5) / n), len(u) - 1)
    first = np.searchsorted(chain, chain)  # where the picks of the same chain begin
    place = (np.arange(n) - first) * theta.shape[1] // np.maximum(np.bincount(chain, minlength=len(u))[chain], 1)
    return theta[chain, place].reshape(theta.shape)


@eqx.filter_jit
def _starts(target: _Target, keys: Key, x: Float[Array, "m d"], n_chains: int) -> tuple[Array, _Frame, _Population]:
    """Starts (m n_chains, p) in the bulk of each row's posterior, and the rows' frames; one row after the other."""
    of_row = lambda row: _starts_of(target, row[0], row[1], n_chains)  # noqa: E731
    starts, frames, population = jax.lax.map(of_row, (keys, x))
    return starts.reshape(-1, starts.shape[-1]), frames, population


def _starts_of(target: _Target, key: Key, x: Float[Array, " d"], n_chains: int) -> tuple[Array, _Frame, _Population]:
    """Importance resampling of ever narrower candidates (population Monte Carlo, Cappé et al. 2004)."""

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
        places = (jnp.arange(_CENTRES) + jax.random.uniform(key_choose)) / _CENTRES
        index = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weight)), places)
        centres = u[jnp.minimum(index, _CANDIDATES - 1)]
        # Candidates that are copies of few are told apart by a tenth of the last round's spread at least.
        width = jnp.maximum(jnp.std(centres, 0), 0.1 * jnp.std(u, 0))
        root = jnp.linalg.cholesky(
            0.9 * jnp.cov(centres, rowvar=False).reshape(width.size, -1) + 0.1 * jnp.diag(width**2)
        )
        step = jax.random.normal(key_move, u.shape)
        u = jnp.repeat(centres, _CANDIDATES // _CENTRES, axis=0) + step @ root.T
        # What they are drawn from: the mixture of the normals about all centres.
        a, b = (jax.scipy.linalg.solve_triangular(root, at.T, lower=True).T for at in (u, centres))
        distance = jnp.sum(a**2, 1)[:, None] - 2 * a @ b.T + jnp.sum(b**2, 1)[None, :]
        return (u, values(u) - jax.nn.logsumexp(-0.5 * distance, axis=1)), None

    (u, log_weight), _ = jax.lax.scan(narrow, (u, log_weight), jax.random.split(key, _NARROWINGS))
    weight = jax.nn.softmax(log_weight)
    loc = weight @ u
    centred = u - jnp.broadcast_to(loc, u.shape)
    # The correlations of few candidates are not trusted all the way: their matrix might be singular.
    covariance = centred.T @ (weight[:, None] * centred)
    diagonal = jnp.diag(jnp.maximum(jnp.diag(covariance), 1e-3 * jnp.var(u, 0)))
    root = jnp.linalg.cholesky(0.9 * covariance + 0.1 * diagonal)
    v = jax.scipy.linalg.solve_triangular(root, centred.T, lower=True).T
    return _spread_out(key, v, weight, n_chains), _Frame(x, loc, root), _Population(u, weight)


def _spread_out(key: Key, v: Float[Array, "k p"], weight: Float[Array, " k"], n: int) -> Float[Array, "n p"]:
    """n of the candidates, each by its weight times the squared distance from the nearest one before it (k-means++).

    So that modes have a chain each, where there are no more modes than chains.
    """

    def choose(nearest, key):
        # Gumbel's trick.
        index = jnp.argmax(jnp.log(weight * nearest) + jax.random.gumbel(key, weight.shape))
        distance = jnp.sum((v - jnp.broadcast_to(v[index], v.shape)) ** 2, 1)
        return jnp.minimum(nearest, distance), v[index]

    start = jnp.full(weight.shape, jnp.finfo(v.dtype).max ** 0.5, v.dtype)
    return jax.lax.scan(choose, start, jax.random.split(key, n))[1]


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
