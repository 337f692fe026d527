r"""Losses of conditional densities: the negative log-likelihood, and the score beside it."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, Key
from diffsbi.flows.affine import ConditionalAffine
from diffsbi.inference.standardise import Standardiser
from diffsbi.prior import Prior

_SMALLEST_NOISE = 0.05  # of the score, in units of the standardised posterior's own score
_NOISE_RATE = 5.0  # the noise level learns this many times faster than the network


@eqx.filter_jit
def unconstrained(prior: Prior, theta: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """u(theta), by one program."""
    return prior.to_unconstrained(theta)


@eqx.filter_jit
def likelihood_score(prior: Prior, theta: Float[Array, "n p"], score: Float[Array, "n p"]) -> Float[Array, "n p"]:
    r"""$\nabla_u \log p(x, z | \theta(u)) = J^T s$ with $s$ the joint score.

    Args:
        prior: Gives u(theta).
        theta: Parameters.
        score: $\nabla_\theta \log p(x, z | \theta)$ at each, WITHOUT the prior's.
    """

    def one(theta, score):
        _, pull_back = jax.vjp(prior.from_unconstrained, prior.to_unconstrained(theta))
        return pull_back(score)[0]

    return jax.vmap(one)(jnp.asarray(theta), jnp.asarray(score))


@eqx.filter_jit
def prior_score(prior: Prior, theta: Float[Array, "n p"]) -> Float[Array, "n p"]:
    r"""$\nabla_u \log p(u)$, of the prior with its change of variables."""
    return jax.vmap(jax.grad(prior.log_prob_unconstrained))(prior.to_unconstrained(jnp.asarray(theta)))


@eqx.filter_jit
def left_in(prior: Prior, theta: Float[Array, "n p"]) -> Float[Array, "n p"]:
    r"""$J^T \nabla_\theta \log p(\theta)$: what `likelihood_score` has too much where scores hold the prior's gradient.

    It is not `prior_score`, which has that of the change of variables as well.
    """
    theta = jnp.asarray(theta)
    return likelihood_score(prior, theta, jax.vmap(jax.grad(prior.log_prob))(theta))


def posterior_score(prior: Prior, theta: Float[Array, "n p"], score: Float[Array, "n p"]) -> Float[Array, "n p"]:
    r"""$\nabla_u [\log p(x, z | \theta(u)) + \log p(u)]$; arguments as `likelihood_score`."""
    return likelihood_score(prior, theta, score) + prior_score(prior, theta)


def score_outliers(score: np.ndarray, cut: float = 10.0, of: np.ndarray | None = None) -> np.ndarray:
    """True for rows `(n,)` with a component beyond `cut` robust standard deviations of the median `of` all.

    Simulators can have corners of the prior where the joint score is larger by orders of magnitude (for lensing maps
    where baryons dominate, or at modes without a Gaussian partner). One such row would decide a squared loss.
    """
    centre, scale = median_and_spread(score if of is None else of)
    return np.any(np.abs(score - centre) > cut * np.maximum(scale, np.finfo(score.dtype).tiny), axis=1)


class ScoredDensity(eqx.Module):
    r"""What is trained: a density, and the covariance of the score's noise, $\Sigma(v, c) = e^{2 s(v, c)} \Sigma_0$.

    `noise` holds the Cholesky factor of $\Sigma_0^{-1}$ and `level` is a small network for s, zero at first:
    scores are larger where posteriors are narrower.
    """

    density: AbstractDistribution
    noise: Float[Array, "p p"] | None = None
    level: eqx.nn.MLP | None = None

    def log_level(self, v: Float[Array, "n p"], c: Float[Array, "n d"]) -> Float[Array, " n"]:
        """s, between −3 and 3."""
        level = jax.vmap(self.level)(jnp.concatenate([v, c], -1))  # type: ignore[type-var]
        return 3 * jnp.tanh(level / 3)

    def whiten_noise(self, residual: Float[Array, "n p"]) -> tuple[Array, Array]:
        r"""$(R r, \log\det R)$ with $R = D (1 + T)$: T strictly lower triangular, D diagonal, at most 1/0.05."""
        log_d = -jnp.logaddexp(_NOISE_RATE * jnp.diag(self.noise), jnp.log(_SMALLEST_NOISE))
        tilted = residual + residual @ (_NOISE_RATE * jnp.tril(self.noise, -1)).T
        return tilted * jnp.broadcast_to(jnp.exp(log_d), residual.shape), jnp.sum(log_d)


FirstTerm = Callable[[Any, dict[str, Array], Array], Array]


def mean_nll(density, batch, value: Float[Array, " n"]) -> Array:
    r"""$-\langle \log q \rangle$, each row by `batch["weight"]` where there is one."""
    return -jnp.mean(value * batch.get("weight", 1.0))


class Atomic(eqx.Module):
    r"""The atomic loss of sequential posterior estimation, SNPE-C (Greenberg et al. 2019, arXiv:1905.07488).

    $-\langle\log\frac{q(u_i|x_i)/p(u_i)}{\sum_k q(u_k|x_i)/p(u_k)}\rangle$, the sum over $u_i$ itself and
    the parameters of the next `n_atoms` − 1 rows: q becomes the posterior under the prior p wherever the
    parameters were drawn. It leaves q's normalisation where there are no parameters free; a score does not.
    `batch["log_prior"]` holds $\log p(u)$; `tilt` is $-\partial v/\partial c$ at fixed u, (p, d).
    """

    n_atoms: int = eqx.field(static=True)
    tilt: Float[Array, "p d"]

    def __call__(self, density, batch, value) -> Array:
        fixed = batch["v"] + batch["c"] @ self.tilt.T  # u, in units of v
        own = value - batch["log_prior"]
        others = []
        for shift in range(1, min(self.n_atoms, len(value))):
            v = jnp.roll(fixed, -shift, axis=0) - batch["c"] @ self.tilt.T
            others.append(density.log_prob(v, batch["c"]) - jnp.roll(batch["log_prior"], -shift))
        return jnp.mean(jax.nn.logsumexp(jnp.stack([own, *others]), axis=0) - own)


class Contrast(eqx.Module):
    r"""The contrastive loss of neural ratio estimation, NRE-C (Miller et al. 2022, arXiv:2210.06170).

    With $r(x, \theta) = e^f$ meant to be $p(x|\theta)/p(x)$, K parameters $\theta_k$ and odds $\gamma$:
    $-\frac{\gamma}{1+\gamma}\langle\log\frac{\gamma r(x,\theta_1)}{K + \gamma\sum_k r(x,\theta_k)}\rangle_{x|\theta_1}
    - \frac{1}{1+\gamma}\langle\log\frac{K}{K + \gamma\sum_k r(x,\theta_k)}\rangle_{x\ \mathrm{alone}}$. K = γ = 1 is
    the cross-entropy. The other parameters are those of the next rows of the batch. `batch["offset"]` is added to f;
    `along` is $\partial v/\partial c$ at fixed data.
    """

    n_classes: int = eqx.field(static=True)
    gamma: float = eqx.field(static=True)
    along: Float[Array, "m d"]

    def __call__(self, ratio, batch, value) -> Array:
        v, c = batch["v"], batch["c"]
        k = min(self.n_classes, len(v) - 1)
        rows = []
        for shift in range(k + 1):
            other = jnp.roll(c, -shift, axis=0)
            rows.append(ratio.log_prob(v + (other - c) @ self.along.T, other) + batch["offset"])
        f = jnp.stack(rows)

        def denominator(f):  # log(K + γ Σ r)
            return jnp.logaddexp(jnp.log(float(k)), jnp.log(self.gamma) + jax.nn.logsumexp(f, axis=0))

        together = jnp.log(self.gamma) + f[0] - denominator(f[:k])
        alone = jnp.log(float(k)) - denominator(f[1:])
        return -(self.gamma * jnp.mean(together) + jnp.mean(alone)) / (1 + self.gamma)


class AbstractScoreLoss(eqx.Module):
    r"""A loss over batches `{"v": (n, m), "c": (n, d), "score": (n, p), "use": (n,)}` of standardised rows.

    `use` is 1 where a row's score counts and 0 where it is left out (`score_outliers`). The density's score is
    $\nabla_v \log q(v | c)$ (a posterior's), or, where `along` holds $\partial v/\partial c$ at fixed data, an (m, d)
    matrix, $\nabla_c \log q(v(c) | c)$ (a likelihood's). `first` is what is minimised beside the score: the negative
    log-likelihood, or a contrast, of (density, batch, values of log q).
    """

    along: eqx.AbstractVar[Float[Array, "m d"] | None]
    first: eqx.AbstractVar[FirstTerm]

    def start(self, v: Float[Array, "n m"]) -> Float[Array, "n p"]:
        """The score of the density that training starts at, a standard normal."""
        return -v if self.along is None else -v @ self.along

    def value_and_residual(self, density, batch) -> tuple[Float[Array, " n"], Float[Array, "n p"]]:
        """log q, and the rows' scores less the density's own."""

        def total(v, c):
            value = density.log_prob(v, c)
            return jnp.sum(value), value

        if self.along is None:
            gradient, value = jax.grad(total, has_aux=True)(batch["v"], batch["c"])
        else:
            (in_v, in_c), value = jax.grad(total, (0, 1), has_aux=True)(batch["v"], batch["c"])
            gradient = in_c + in_v @ self.along
        return value, batch["score"] - gradient

    @abc.abstractmethod
    def __call__(self, params, static, batch, key) -> Array:
        """Mean over the batch."""


class Start(NamedTuple):
    """What one fit starts from; rows are standardised, `held_out` are the indices of those for validation.

    `train` are rows, or the `Blocks` of a stream; `affine` is a linear part that is not trained any more, to be put
    about the density.
    """

    standardiser: Standardiser
    model: ScoredDensity
    train: Any
    validation: dict[str, Array]
    loss: Callable[..., Array]
    held_out: np.ndarray
    affine: ConditionalAffine | None = None


class WithoutScore(AbstractScoreLoss):
    """The first term alone."""

    along: Array | None = None
    first: FirstTerm = mean_nll

    def __call__(self, params, static, batch, key):
        density = eqx.combine(params, static).density
        return self.first(density, batch, density.log_prob(batch["v"], batch["c"]))


class WeightedScore(AbstractScoreLoss):
    r"""$\langle -\log q + \sum_a \lambda_a (\partial_a \log q - s_a)^2 \rangle$ in standardised coordinates.

    Args:
        weight: $\lambda$, shape (p,).
    """

    weight: Float[Array, " p"]
    along: Array | None = None
    first: FirstTerm = mean_nll

    def __call__(self, params, static, batch, key):
        density = eqx.combine(params, static).density
        value, residual = self.value_and_residual(density, batch)
        return self.first(density, batch, value) + jnp.mean(batch["use"] * (residual**2 @ self.weight))


class MeasuredScore(AbstractScoreLoss):
    r"""$\langle -\log q(v|c) - \log \mathcal N(s;\, \nabla_v \log q(v|c), \Sigma) \rangle$, $\Sigma$ learned with q.

    The joint score is the marginal one plus noise of zero mean (Fisher's identity), so (v, s) is one observation
    of q: its likelihood weighs the score by its inverse noise covariance, $\frac12 r^T \Sigma^{-1} r +
    \frac12\log\det\Sigma$, in every direction by its own. $\Sigma$ is at its optimum the measured covariance of the
    residuals $r = s - \nabla_v\log q$: a score that is all noise gets no weight, an exact one gets much (at most
    1/0.05² in units of the posterior's own score variance).

    The level of the noise counts as far as scores are noise (`noise_share`, of each batch): what a density has not
    learned yet of exact ones must not pass for it. `share` fixes that; 1 is the log-density of all scores as it stands.
    """

    along: Array | None = None
    first: FirstTerm = mean_nll
    share: float | None = None

    def __call__(self, params, static, batch, key):
        model = eqx.combine(params, static)
        value, residual = self.value_and_residual(model.density, batch)
        white, log_det = model.whiten_noise(residual)
        share = noise_share(batch, residual) if self.share is None else self.share
        level = share * model.log_level(batch["v"], batch["c"])
        distance = jnp.sum(white**2, -1) * jnp.exp(-2 * level)
        of_score = batch["use"] * (0.5 * distance + level * residual.shape[-1] - log_det)
        return self.first(model.density, batch, value) + jnp.mean(of_score)


def noise_share(batch, residual: Float[Array, "n p"]) -> Array:
    r"""$\langle r^2\rangle / \langle s^2\rangle$, at most 1: how much of the scores is noise. No gradient."""
    of = [jnp.sum(batch["use"][:, None] * a**2) for a in (residual, batch["score"])]
    return jax.lax.stop_gradient(jnp.minimum(of[0] / jnp.maximum(of[1], jnp.finfo(residual.dtype).tiny), 1.0))


@eqx.filter_jit
def noise_level(key: Key, dim: int, condition_dim: int) -> eqx.nn.MLP:
    """A new `ScoredDensity.level`."""
    return zero_at_first(eqx.nn.MLP(dim + condition_dim, "scalar", 16, 1, activation=jax.nn.silu, key=key))


def zero_at_first(network: eqx.nn.MLP) -> eqx.nn.MLP:
    """The network with its last layer zero: training starts where it adds nothing."""
    last = lambda n: (n.layers[-1].weight, n.layers[-1].bias)  # noqa: E731
    return eqx.tree_at(last, network, replace_fn=jnp.zeros_like)


@eqx.filter_jit
def first_noise(residual: Float[Array, "n p"]) -> Float[Array, "p p"]:
    r"""`ScoredDensity.noise` for the residuals of the density that training starts at.

    Rows far in the tails of the residuals are clipped, lest one of them decides.
    """
    scale = jnp.broadcast_to(3 * jnp.sqrt(jnp.median(residual**2, axis=0) / 0.455), residual.shape)
    residual = jnp.clip(residual, -scale, scale)
    identity = jnp.eye(residual.shape[-1], dtype=residual.dtype)
    covariance = residual.T @ residual / len(residual) + _SMALLEST_NOISE**2 * identity
    root = jnp.linalg.cholesky(covariance)
    inverse = jax.scipy.linalg.solve_triangular(root, identity, lower=True)
    d = jnp.diag(inverse)
    level = jnp.log(jnp.maximum(1 / d - _SMALLEST_NOISE, 1e-3))
    return (jnp.tril(inverse / d[:, None], -1) + jnp.diag(level)) / _NOISE_RATE
