r"""Truncated marginal neural ratio estimation: marginal posteriors, simulated only where they are not negligible."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Key, check_key, check_names
from diffsbi.inference.nle import LikelihoodPosterior
from diffsbi.inference.nre import NRE
from diffsbi.inference.rounds import RoundFiles
from diffsbi.prior import Prior
from diffsbi.sampling.full_field import observed as observed_by

_GRID = 1000
_TAIL = 1e-6  # prior mass left out beyond an end that has no bound


class Marginals(eqx.Module):
    """What `truncated_marginals` did.

    Attributes:
        posteriors: One for each of the wanted marginals, conditioned on the observation's summaries.
        marginals: Their parameters.
        prior: The last round's truncated prior: the posteriors are negligible outside it.
        bounds: Low and high of every parameter after each round, `(rounds, 2, p)`.
        simulations: Simulations of all rounds.
        stop_reason: Why it ended.
    """

    posteriors: tuple[LikelihoodPosterior, ...]
    marginals: tuple[tuple[str, ...], ...] = eqx.field(static=True)
    prior: Prior
    bounds: np.ndarray
    simulations: int
    stop_reason: str = eqx.field(static=True)

    def __getitem__(self, names: str | tuple[str, ...]) -> LikelihoodPosterior:
        wanted = (names,) if isinstance(names, str) else tuple(names)
        if wanted not in self.marginals:
            raise KeyError(f"Expected one of {list(self.marginals)}; got {wanted}.")
        return self.posteriors[self.marginals.index(wanted)]


def truncated_marginals(
    sim,
    x: Array,
    key: Key,
    *,
    marginals: Sequence[Sequence[str]] | None = None,
    n_rounds: int = 5,
    n_per_round: int = 500,
    summary: Callable[[Array], Array] | None = None,
    with_score: bool = True,
    latents: str | None = None,
    n_average: int = 1,
    threshold: float = 1e-4,
    shrink: float = 0.8,
    options: dict[str, Any] | None = None,
    fit: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    block_size: int = 50,
    progress: bool = False,
) -> Marginals:
    r"""TMNRE of p(theta_a | x) and of joint marginals, for one observation.

    Each round simulates from the prior within a box, fits the ratio $p(x|\theta_a)/p(x)$ of every single parameter, and
    cuts the box where that ratio is below `threshold` of its maximum. The box stays a product, so that simulations of
    earlier rounds inside it are kept as they are. The wanted marginals are fitted in the last box.

    The other parameters are latents of a marginal: the joint score's component $\partial_a \log p(x, z|\theta)$ has
    the mean $\partial_a \log p(x|\theta_a)$ at given $(\theta_a, x)$ (Fisher's identity, with independent priors), and
    trains the marginal ratio as it does the full one.

    Args:
        sim: The simulator.
        x: The observation, as the simulator draws it.
        key: A typed JAX key.
        marginals: Groups of names; by default every single parameter and every pair.
        n_rounds: Most rounds.
        n_per_round: Simulations of each.
        summary: Data of one simulation → `(d,)`; by default the flattened data.
        with_score: Whether scores are used.
        latents: Latent coordinate of the scores; by default "whitened" where the simulator offers it.
        n_average: States of a chain of the latents that a score is averaged over.
        threshold: Likelihood ratio to the best value below which a parameter's value is left out.
        shrink: Stop when a round leaves more than this fraction of the box's prior mass.
        options: Keywords of `NRE`.
        fit: Keywords of its `fit`.
        folder: Where summaries of the simulations are kept, block by block; the same call goes on from there.
        block_size: Rows of a block.
        progress: Show a bar for each round.

    Raises:
        ValueError: For numbers out of range, an observation that is none of the simulator's, unknown names, or a
            folder of another call.
        OSError: If the disk is full.

    Reference: Miller et al. 2021, arXiv:2107.01214.
    """
    if n_rounds < 1 or n_per_round < 1 or not 0 < threshold < 1 or not 0 < shrink <= 1:
        got = f"{n_rounds}, {n_per_round}, {threshold} and {shrink}"
        raise ValueError(f"Expected n_rounds, n_per_round >= 1, threshold in (0, 1), shrink in (0, 1]; got {got}.")
    if block_size < 1:
        raise ValueError(f"Expected block_size >= 1; got {block_size}.")
    names = sim.prior.names
    groups = _groups(names, marginals)
    summary = jnp.ravel if summary is None else summary
    latents = sim.best_latents(latents)
    x, _ = observed_by(sim, x)
    observed = summary(x)
    scores = dict(with_score=with_score, latents=latents, n_average=n_average)
    files = RoundFiles(folder, block_size, progress, sim, scores, x, check_key(key))
    prior, rows, bounds, reason, simulations = sim.prior, None, [], "n_rounds reached", 0
    *keys, key_last = jax.random.split(key, n_rounds + 1)
    arguments: dict[str, Any] = dict(options=options or {}, fit=fit or {})
    for r, key_round in enumerate(keys):
        key_theta, key_draw, key_fit = jax.random.split(key_round, 3)
        theta = prior.sample(key_theta, (n_per_round,))
        part = files.simulations(r, theta, key_draw, summary)
        rows = _joined(rows, (part.theta, part.x, part.score))
        simulations += n_per_round
        fitted = [_fit(prior, (name,), rows, key_fit, **arguments) for name in names]
        box = [_interval(posterior, observed, threshold) for posterior in fitted]
        low, high = np.array(box).T
        smaller = prior.truncated(low, high)
        left = float(np.exp(np.sum([np.log(_mass(prior, i, *pair)) for i, pair in enumerate(box)])))
        bounds.append(np.stack([low, high]))
        if left > shrink:
            reason = f"a round left {left:.2f} > {shrink} of the box"
            break
        prior, rows = smaller, _inside(smaller, rows)
    key_groups = jax.random.split(key_last, len(groups))
    posteriors = tuple(
        _fit(prior, g, rows, k, **arguments).condition(observed) for g, k in zip(groups, key_groups, strict=True)
    )
    return Marginals(posteriors, groups, prior, np.stack(bounds), simulations, reason)


def _groups(names, marginals) -> tuple[tuple[str, ...], ...]:
    if marginals is None:
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        return (*((name,) for name in names), *pairs)
    groups = tuple((group,) if isinstance(group, str) else tuple(group) for group in marginals)
    for group in groups:
        check_names(list(group), list(names))
    return groups


def _fit(prior: Prior, group, rows, key: Key, options, fit) -> LikelihoodPosterior:
    index = [prior.names.index(name) for name in group]
    theta, t, score = rows
    estimator = NRE(prior.marginal(group), **options)
    estimator.append(np.asarray(theta)[:, index], t, None if score is None else np.asarray(score)[:, index])
    return estimator.fit(key, **fit)


def _interval(posterior: LikelihoodPosterior, x, threshold: float) -> tuple[float, float]:
    """Where the ratio of one parameter is not negligible, from a grid over the prior's quantiles."""
    prior = posterior.prior
    grid = prior.distributions[0].icdf(jnp.linspace(0.0, 1.0, _GRID + 2)[1:-1])
    ratio = np.asarray(posterior.log_likelihood(grid[:, None], x))
    kept = np.flatnonzero(ratio >= ratio.max() + np.log(threshold))
    first, last = kept[0], kept[-1]
    support, d = prior.distributions[0].support, prior.distributions[0]
    low = float(grid[first - 1]) if first > 0 else getattr(support, "lower_bound", float(d.icdf(_TAIL)))
    high = float(grid[last + 1]) if last < _GRID - 1 else getattr(support, "upper_bound", float(d.icdf(1 - _TAIL)))
    return float(low), float(high)


def _mass(prior: Prior, i: int, low: float, high: float) -> float:
    d = prior.distributions[i]
    return float(d.cdf(high) - d.cdf(low))


def _joined(rows, new):
    if rows is None:
        return new
    return tuple(None if b is None else np.concatenate([a, b]) for a, b in zip(rows, new, strict=True))


def _inside(prior: Prior, rows):
    keep = np.asarray(prior.in_support(rows[0]))
    return tuple(None if a is None else a[keep] for a in rows)
