r"""Posteriors over the weights of a network: how far the simulations leave the fitted density itself undecided.

With N rows, the loss (a mean over rows) and weights w, the weights' posterior is

$$p(w | \mathrm{rows}) \propto e^{-N\,\mathrm{loss}(w)} \prod_j \mathcal N(w_j;\, w_{0j}, s_j^2),$$

$w_0$ the network at its linear start, $s$ = `prior_scale` for the network's weights and one (a posterior's own width)
for the linear part. The loss $-\log q$ is a log-likelihood of the rows. So is the score term of `MeasuredScore`, a
normal log-density of the scores given the density's own, with a covariance that is itself among the weights: it enters
as it is. `WeightedScore` and the contrasts of `NRE` and of the atomic correction are no likelihoods; there the result
is a generalised (Gibbs) posterior whose width is a convention. Coordinates (`Standardiser`) are fixed, as everywhere.

Draws of w become the members of an ordinary posterior object: their mixture is the posterior with the network
integrated out, and `network_spread` tells how much of its width is the network's.
"""

import dataclasses
import json
import warnings
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.flows.affine import ConditionalAffine
from diffsbi.inference.estimator import SMALLEST_N, Estimator
from diffsbi.inference.fmpe import FMPE
from diffsbi.inference.losses import AbstractScoreLoss, MeasuredScore, ScoredDensity, Start
from diffsbi.inference.nre import RatioMember
from diffsbi.inference.posterior import FittedPosterior, Member
from diffsbi.inference.streams import InMemory, Stream
from diffsbi.inference.training import History, fit, schedule
from diffsbi.sampling import Chains, nuts
from diffsbi.sampling.chains import rhat

MOST_WEIGHTS = 20_000
_FIRST_LOG_SD = -2.0  # of the variational posterior, in units of the prior's
_MOST_RHAT = 1.1
_REFERENCES = 3  # rows at which chains are compared

Fitted = TypeVar("Fitted", bound=FittedPosterior)


class Weights(eqx.Module):
    r"""All trained arrays as one vector: $w = w_0 + s z$ with $z \sim N(0, I)$ a priori.

    Attributes:
        centre: $w_0$, the trained arrays as a pytree.
        scale: s, `(D,)`.
        static: What is not trained.
    """

    centre: Any
    scale: Float[Array, " D"]
    static: Any

    def __init__(self, model: ScoredDensity, prior_scale: float):
        self.centre, self.static = eqx.partition(model, eqx.is_inexact_array)
        scale = jax.tree.map(lambda a: jnp.full_like(a, prior_scale), self.centre)
        if isinstance(getattr(model.density, "bijection", None), ConditionalAffine):
            linear = jax.tree.map(jnp.ones_like, scale.density.bijection)
            scale = eqx.tree_at(lambda m: m.density.bijection, scale, linear)
        self.scale = ravel_pytree(scale)[0]

    def params(self, z: Float[Array, " D"]):
        """The trained arrays at z."""
        flat, unravel = ravel_pytree(self.centre)
        return unravel(flat + self.scale * z)

    def model(self, z: Float[Array, " D"]) -> ScoredDensity:
        return eqx.combine(self.params(z), self.static)

    def of(self, model: ScoredDensity) -> Float[Array, " D"]:
        """The z of a model."""
        moved = ravel_pytree(eqx.filter(model, eqx.is_inexact_array))[0] - ravel_pytree(self.centre)[0]
        return moved / self.scale


class NegativeElbo(eqx.Module):
    r"""The negative evidence bound over N, $\langle\mathrm{loss}(w)\rangle_r + \mathrm{KL}(r\,\|\,\mathrm{prior})/N$.

    r is an independent normal for every weight; the mean over it is by `draws` reparametrised draws (Kingma & Welling
    2014, arXiv:1312.6114; Blundell et al. 2015, arXiv:1505.05424). Trained are `mean` and `log_sd` of z, `(D,)`.
    """

    loss: AbstractScoreLoss
    weights: Weights
    rows: int = eqx.field(static=True)
    draws: int = eqx.field(static=True)

    def __call__(self, params, static, batch, key):
        trained = eqx.combine(params, static)
        mean, log_sd = trained["mean"], trained["log_sd"]
        normal = jax.random.normal(key, (self.draws, mean.size), mean.dtype)

        def at(e):
            return self.loss(self.weights.params(mean + jnp.exp(log_sd) * e), self.weights.static, batch, key)

        divergence = jnp.sum(0.5 * (jnp.exp(2 * log_sd) + mean**2 - 1) - log_sd)
        return jnp.mean(jax.vmap(at)(normal)) + divergence / self.rows


def _as_density(loss: AbstractScoreLoss) -> AbstractScoreLoss:
    """The loss as a log-density of rows and scores, whose level of noise does not depend on the residuals."""
    return dataclasses.replace(loss, share=1.0) if isinstance(loss, MeasuredScore) else loss


class _LogPosterior(eqx.Module):
    """The weights' log-posterior at z, up to a constant."""

    loss: AbstractScoreLoss
    weights: Weights
    rows: dict[str, Array]

    def __call__(self, z):
        value = self.loss(self.weights.params(z), self.weights.static, self.rows, jax.random.key(0))
        return -len(self.rows["v"]) * value - 0.5 * jnp.sum(z**2)


def fit_variational(
    estimator: Estimator[Fitted],
    key: Key,
    *,
    members: int = 8,
    prior_scale: float = 0.1,
    draws: int = 4,
    learning_rate: float = 1e-2,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    patience: int | None = None,
    progress: bool = False,
) -> Fitted:
    r"""Fit with a mean-field normal posterior over the weights (`NegativeElbo`); any size of network.

    It starts at an ordinary fit and uses all rows: the divergence from the prior, not rows kept aside, keeps it from
    overfitting. (Where rows are so many that they are streamed, those held out of the ordinary fit are left out here.)
    It knows no correlations between weights: where many of them act together their spreads add up, and what they
    predict is up to about twice as uncertain as with `fit_chains`; less so for a smaller `prior_scale`.
    The bound compares settings, roughly: a larger `config["network"]["elbo"]` is a better `prior_scale`.

    Args:
        estimator: `NPE`, `NLE` or `NRE` with its simulations.
        key: A typed JAX key.
        members: Draws of the weights, the members of the posterior that is returned.
        prior_scale: Prior standard deviation of the network's weights about their start.
        draws: Draws of the weights for one step.
        learning_rate: First step size, in units of the prior's standard deviations.
        max_epochs: Most epochs, also of the ordinary fit; by default as `Estimator.fit`.
        batch_size: Rows per step, likewise.
        patience: Epochs without improvement of the bound, likewise.
        progress: Show progress bars.

    Returns:
        What `Estimator.fit` returns; `config["network"]` has the method, the number of weights and the bound per row.

    Raises:
        ValueError: Settings that make no sense, or fewer than 10 rows.
    """
    if draws < 1:
        raise ValueError(f"Expected draws >= 1; got {draws}.")
    rows = _checked(estimator, key, members, prior_scale)
    key_fit, key_elbo, key_draw = jax.random.split(key, 3)
    options = schedule(rows.per_epoch, max_epochs, batch_size, patience, len(estimator)) | {"progress": progress}
    start, weights, fitted, _ = _ordinary(estimator, key_fit, rows, prior_scale, options)
    if isinstance(rows, InMemory):
        data = judged = _all_rows(start)
        n = len(estimator)
    else:
        data, judged = start.train, start.validation
        n = len(estimator) - len(judged["v"])
    model = {"mean": fitted, "log_sd": jnp.full_like(fitted, _FIRST_LOG_SD)}
    bound = NegativeElbo(_as_density(start.loss), weights, n, draws)
    model, history = fit(key_elbo, model, data, judged, bound, **options | {"learning_rate": learning_rate})
    normal = jax.random.normal(key_draw, (members, fitted.size), fitted.dtype)
    chosen = model["mean"][None] + jnp.exp(model["log_sd"])[None] * normal
    account = {"method": "variational", "weights": fitted.size, "elbo": -history.best_validation}
    return _posterior(estimator, rows, start, weights, chosen, history, account | {"prior_scale": prior_scale})


def fit_chains(
    estimator: Estimator[Fitted],
    key: Key,
    *,
    members: int = 16,
    prior_scale: float = 0.1,
    n_chains: int = 2,
    n_warmup: int = 200,
    n_samples: int = 200,
    max_tree_depth: int = 6,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    patience: int | None = None,
    progress: bool = False,
) -> Fitted:
    r"""Fit with the weights sampled by NUTS, all rows at every step; for small networks.

    Chains start about an ordinary fit, each a tenth of the prior's width away. They are judged by what the weights are
    for: the mean of q (for a ratio, its value) at three of the rows. Weights themselves need not mix: hidden units can
    be exchanged.

    Args:
        estimator: As `fit_variational`.
        key: A typed JAX key.
        members: Draws of the weights to keep, evenly from all chains.
        prior_scale: As `fit_variational`.
        n_chains: Chains.
        n_warmup: Transitions of each that adapt and are discarded.
        n_samples: Kept transitions of each, from which members are chosen.
        max_tree_depth: At most 2**depth gradients for a transition.
        max_epochs: Of the ordinary fit; as `Estimator.fit`, and so are `batch_size` and `patience`.
        progress: Show progress bars.

    Returns:
        What `Estimator.fit` returns; `config["network"]` has the method, the number of weights, the largest R-hat of
        the means, the divergences and the gradients. A warning tells of an R-hat above 1.1 or of divergences.

    Raises:
        ValueError: More than 20 000 weights, settings that make no sense, or fewer than 10 rows.
    """
    rows = _checked(estimator, key, members, prior_scale)
    if not isinstance(rows, InMemory):
        got = f"{len(estimator)} are too many. Use fit_variational, or .fit"
        raise ValueError(f"Expected rows that fit in memory, all in one step; {got}.")
    if n_chains < 2 or n_samples * n_chains < members:
        got = f"{n_chains} chains of {n_samples}"
        raise ValueError(f"Expected n_chains >= 2 and at least {members} draws, one for each member; got {got}.")
    _check_size(estimator, key, rows)
    key_fit, key_init, key_chain, key_judge = jax.random.split(key, 4)
    options = schedule(len(estimator), max_epochs, batch_size, patience) | {"progress": progress}
    start, weights, fitted, history = _ordinary(estimator, key_fit, rows, prior_scale, options)
    init = fitted[None] + 0.1 * jax.random.normal(key_init, (n_chains, fitted.size), fitted.dtype)
    target = _LogPosterior(_as_density(start.loss), weights, _all_rows(start))
    chains = nuts(
        target, init, key_chain, n_warmup, n_samples,
        mass="diagonal", max_tree_depth=max_tree_depth, chain_method="vectorized", progress=progress,
    )  # fmt: skip
    account = {"method": "chains", "weights": fitted.size, "prior_scale": prior_scale}
    account |= _judged(chains, estimator, start, weights, key_judge)
    chosen = chains.flat()[np.linspace(0, n_chains * n_samples - 1, members).round().astype(int)]
    return _posterior(estimator, rows, start, weights, jnp.asarray(chosen), history, account)


class NetworkSpread(NamedTuple):
    """Of each member the mean and the width of theta, `(members, *m, p)`; the share of the variance between members."""

    means: np.ndarray
    widths: np.ndarray
    fraction: np.ndarray


def network_spread(posterior: FittedPosterior, key: Key, n: int = 1000, x=None) -> NetworkSpread:
    r"""How much of a posterior's width is the network's: what its members, each alone, say about theta.

    `fraction` is $B/(B + W)$ for every parameter, `(*m, p)`, with W the members' mean variance of theta and B the
    variance of their means, less what `n` draws add to it (never below 0). Members that are draws of the weights'
    posterior (`fit_chains`, `fit_variational`) make it that posterior's; members of an ordinary ensemble differ by
    their starts and splits only, which is a rough guide.

    Args:
        posterior: Any fitted posterior with two members or more.
        key: A typed JAX key.
        n: Draws of each member; in the units of theta.
        x: Data, `(*m, d)`; by default the posterior's.

    Raises:
        ValueError: If there are fewer than two members, or `n` < 2.
    """
    kept = np.flatnonzero(posterior.weights > 0)
    if len(kept) < 2 or n < 2:
        raise ValueError(f"Expected at least 2 members and n >= 2 draws; got {len(kept)} and {n}.")
    keys = jax.random.split(check_key(key), len(kept))
    draws = [
        np.asarray(_alone(posterior, int(k)).sample(one, n, x)).astype(float) for k, one in zip(kept, keys, strict=True)
    ]
    wild = [int(k) for k, d in zip(kept, draws, strict=True) if not np.isfinite(d).all()]
    if wild:
        warnings.warn(
            f"Members {wild} have draws of theta that are not finite, and so no spread: take a smaller prior_scale.",
            stacklevel=2,
        )
    means, widths = np.stack([d.mean(0) for d in draws]), np.stack([d.std(0, ddof=1) for d in draws])
    weights = posterior.weights[kept]
    average = lambda a: np.tensordot(weights, a, 1)  # noqa: E731
    within = average(widths**2)
    between = average((means - average(means)) ** 2) / (1 - np.sum(weights**2))
    between = np.maximum(between - within / n, 0.0)
    return NetworkSpread(means, widths, between / (between + within))


def _alone(posterior: FittedPosterior, k: int) -> FittedPosterior:
    """The posterior of one member."""
    config = {name: value for name, value in posterior.config.items() if name != "weights"} | {"members": 1}
    fields = {"members": posterior.members[k : k + 1], "config_json": json.dumps(config)}
    names = (name for name in posterior.__dataclass_fields__ if name not in fields)
    return type(posterior)(**{name: getattr(posterior, name) for name in names}, **fields)


def _checked(estimator: Estimator, key: Key, members: int, prior_scale: float) -> InMemory | Stream:
    check_key(key)
    if isinstance(estimator, FMPE):
        raise ValueError("Expected an estimator whose loss is a likelihood or a contrast; got FMPE. Use NPE or NLE.")
    if len(estimator) < SMALLEST_N:
        raise ValueError(f"Expected at least {SMALLEST_N} simulations to fit; got {len(estimator)}.")
    if members < 2 or not (np.isfinite(prior_scale) and prior_scale > 0):
        raise ValueError(f"Expected members >= 2 and prior_scale > 0; got {members} and {prior_scale}.")
    return estimator._unconstrained_rows()


def _check_size(estimator: Estimator, key: Key, rows) -> None:
    modelled, condition = estimator._roles(rows.columns)
    density = estimator._density(key, modelled.shape[1], condition.shape[1])
    size = sum(a.size for a in jax.tree.leaves(eqx.filter(density, eqx.is_inexact_array)))
    if size > MOST_WEIGHTS:
        raise ValueError(
            f"Expected at most {MOST_WEIGHTS} weights to sample; the density has {size}. Use fit_variational, or a "
            "smaller density, as density_options={'layers': 1, 'width': 16, 'depth': 1}."
        )


def _ordinary(estimator, key, rows, prior_scale, options) -> tuple[Start, Weights, Array, History]:
    """The linear start, the coordinates of the weights about it, and an ordinary fit in them."""
    key_start, key_fit = jax.random.split(key)
    options = options | {"learning_rate": 1e-3, "weight_decay": 1.0}
    start = estimator._start(key_start, rows, 0.1, options, believe=False)
    model, history = fit(key_fit, start.model, start.train, start.validation, start.loss, **options)
    weights = Weights(start.model, prior_scale)
    return start, weights, weights.of(model), history


def _all_rows(start: Start) -> dict[str, Array]:
    return {name: jnp.concatenate([start.train[name], start.validation[name]]) for name in start.train}


def _posterior(estimator, rows, start, weights, chosen, history, account):
    members = tuple(estimator._member(start.standardiser, weights.model(z).density) for z in chosen)
    config = estimator._config(rows, len(members)) | {"network": account}
    return estimator._posterior(members, (history,), json.dumps(config))


def _judged(chains: Chains, estimator, start: Start, weights: Weights, key) -> dict[str, Any]:
    values = np.asarray(_functional(weights, estimator._member, start, jnp.asarray(chains.theta), key))
    largest = max(rhat(values[..., i].astype(float)) for i in range(values.shape[-1]))
    if not largest < _MOST_RHAT or chains.n_diverging:
        warnings.warn(
            f"Chains of the weights: largest R-hat {largest:.2f} of what they predict, {chains.n_diverging} "
            f"divergences in {chains.diverging.size} transitions. Take a longer warm-up and more draws (n_warmup, "
            "n_samples), a smaller network or a smaller prior_scale.",
            stacklevel=3,
        )
    return {"rhat": largest, "divergences": chains.n_diverging, "gradients": chains.gradients}


@eqx.filter_jit
def _functional(weights: Weights, kind: type[Member], start: Start, z: Float[Array, "chains draws D"], key):
    """What every draw of the weights predicts at the first rows, `(chains, draws, k)`."""
    v, c = start.train["v"][:_REFERENCES], start.train["c"][:_REFERENCES]

    def one(z):
        density = weights.model(z).density
        if issubclass(kind, RatioMember):
            return density.log_prob(v, c)
        keys = jax.random.split(key, (50, len(c)))
        draws = jax.vmap(jax.vmap(lambda k, c: density.sample(k, (), c)), (0, None))(keys, c)
        return jnp.mean(draws, 0).ravel()

    return jax.lax.map(lambda chain: jax.lax.map(one, chain, batch_size=20), z)
