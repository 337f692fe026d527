r"""Neural likelihood estimation: a density of the summaries given the parameters, and the posterior that it makes."""

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, Key, check_key, check_trailing
from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import FittedPosterior, Member, mixture_log_prob, within_support
from diffsbi.prior import Prior
from diffsbi.sampling import Chains, nuts

_CANDIDATES = 2000  # points among which the chains' starts are chosen
_NARROWINGS = 4


class LikelihoodPosterior(FittedPosterior):
    r"""$p(\theta) q(x | \theta)$ up to a constant, sampled by NUTS in unconstrained space.

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
        return mixture_log_prob(members, self._data(x), self.prior.to_unconstrained(theta), weights)

    def log_prob(self, theta: Float[Array, "*n p"], x: Float[Array, "*n d"] | None = None) -> Float[Array, "*n"]:
        r"""$\log p(\theta) + \log q(x | \theta)$, the posterior up to a constant; −inf outside the prior's support."""
        check_trailing("theta", theta, (self.prior.dim,))
        theta = jnp.asarray(theta, jnp.result_type(float))
        inside, safe = within_support(self.prior, theta)
        return jnp.where(inside, self.prior.log_prob(safe) + self.log_likelihood(safe, x), -jnp.inf)

    def chains(
        self, key: Key, x: Float[Array, " d"] | None = None, *, n_samples: int = 500, n_chains: int = 4, **settings
    ) -> Chains:
        """NUTS chains on theta for one observation, with their diagnostics.

        They start in the bulk (`_starts`); `settings` are those of `diffsbi.nuts`.
        """
        data = self._data(x)
        if data.ndim != 1:
            raise ValueError(f"Expected one observation, x with shape ({self.x_dim},); got {data.shape}.")
        key_start, key_chain = jax.random.split(check_key(key))
        target = _Target(*self._core(), data)
        init = _starts(target, key_start, n_chains)
        settings = dict(n_warmup=400, chain_method="vectorized", mass="dense") | settings
        n_warmup = settings.pop("n_warmup")
        return nuts(
            target, init, key_chain, n_warmup, n_samples,
            names=self.names, extract=self.prior.from_unconstrained, **settings,
        )  # fmt: skip

    def sample(self, key: Key, n: int, x: Float[Array, "*m d"] | None = None, **settings) -> Float[Array, "n *m p"]:
        """`n` draws of theta, `(n, p)`; `(n, *m, p)` for data with leading dimensions, one set of chains for each.

        The draws are those of `chains`, in random order.

        Raises:
            ValueError: If `n` < 1, or x has the wrong width, is not finite, or is missing.
        """
        if n < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        data = self._data(x)
        flat = data.reshape(-1, self.x_dim)
        n_chains = settings.setdefault("n_chains", 4)
        draws = []
        for i, one in enumerate(flat):
            key_chain, key_order = jax.random.split(jax.random.fold_in(check_key(key), i))
            chains = self.chains(key_chain, one, n_samples=-(-n // n_chains), **settings)
            draws.append(jax.random.permutation(key_order, jnp.asarray(chains.flat()))[:n])
        return jnp.stack(draws, 1).reshape(n, *data.shape[:-1], self.prior.dim)

    def propose(self, key, n, x=None):
        """Draws of the posterior itself: a likelihood may be learned anywhere."""
        return self.sample(key, n, x), None


class _Target(eqx.Module):
    prior: Prior
    members: tuple[Member, ...]
    weights: Array | None
    x: Array

    def __call__(self, u):
        return self.prior.log_prob_unconstrained(u) + mixture_log_prob(self.members, self.x, u, self.weights)


@eqx.filter_jit
def _values(target: _Target, u: Float[Array, "n p"]) -> Float[Array, " n"]:
    """The target, −inf where it is not finite."""
    value = jax.vmap(target)(u)
    return jnp.where(jnp.isfinite(value), value, -jnp.inf)


def _starts(target: "_Target", key: Key, n_chains: int) -> Float[Array, "chains p"]:
    """Unconstrained starts in the bulk of the posterior, by importance resampling of ever narrower candidates."""
    key_prior, key = jax.random.split(key)
    u = target.prior.to_unconstrained(target.prior.sample(key_prior, (_CANDIDATES,)))
    log_weight = _values(target, u) - jax.vmap(target.prior.log_prob_unconstrained)(u)
    for key_round in jax.random.split(key, _NARROWINGS):
        key_choose, key_move = jax.random.split(key_round)
        chosen = u[jax.random.categorical(key_choose, log_weight, shape=(_CANDIDATES,))]
        # Candidates that are copies of few are told apart by a tenth of the last round's spread at least.
        width = jnp.maximum(jnp.std(chosen, 0), 0.1 * jnp.std(u, 0))
        u = chosen + jnp.broadcast_to(width, chosen.shape) * jax.random.normal(key_move, chosen.shape)
        log_weight = _values(target, u)
    # Distinct ones, in proportion to the density (Gumbel's trick).
    order = log_weight + jax.random.gumbel(key, log_weight.shape)
    return u[jnp.argsort(-order)[:n_chains]]


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
