"""Sequential inference: simulate where the posterior of one observation is, and fit, until it no longer moves."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import FittedPosterior


class Rounds(eqx.Module):
    """What `rounds` did.

    Attributes:
        posterior: The last round's, conditioned on the observation's summaries.
        samples: Draws of theta of each round, `(rounds, n, p)`.
        moved: For each round after the first, the largest change of a mean (in widths) or of a log-width.
        simulations: Simulations of all rounds.
        stop_reason: Why it ended.
    """

    posterior: FittedPosterior
    samples: np.ndarray
    moved: tuple[float, ...]
    simulations: int
    stop_reason: str = eqx.field(static=True)


def rounds(
    sim,
    x: Array,
    estimator: Estimator,
    key: Key,
    *,
    n_rounds: int = 5,
    n_per_round: int = 200,
    summary: Callable[[Array], Array] | None = None,
    with_score: bool = True,
    latents: str | None = None,
    n_average: int = 1,
    n_samples: int = 2000,
    tolerance: float = 0.1,
    fit: dict | None = None,
) -> Rounds:
    r"""Sequential estimation of p(theta | x) for one observation.

    The first round draws from the prior (where `estimator` has no simulations yet), later ones from the fitted
    posterior's `propose`: likelihoods and ratios from the posterior itself, which needs no correction; posteriors from
    the prior cut to the region that holds all but 1e-4 of the posterior (TSNPE, Deistler et al. 2022,
    arXiv:2210.04815), where the posterior, and its score, is what it was under the whole prior. Simulations outside
    that region are then left out.

    Args:
        sim: The simulator.
        x: The observation, as the simulator draws it.
        estimator: `NPE`, `NLE` or `NRE`; simulations that it has already count as the first round's. It is not changed.
        key: A typed JAX key.
        n_rounds: Most rounds.
        n_per_round: Simulations of each.
        summary: Data of one simulation → `(d,)`; by default the flattened data.
        with_score: Whether the scores are used.
        latents: Latent coordinate of the scores; by default "whitened" where the simulator offers it.
        n_average: Draws of the latents that a score is averaged over.
        n_samples: Posterior draws after each round, by which its motion is measured.
        tolerance: Stop when no mean moves by more than this many widths, and no width by more than this fraction.
        fit: Keywords of `Estimator.fit`.
    """
    if n_rounds < 1 or n_per_round < 1 or not tolerance > 0:
        got = f"{n_rounds}, {n_per_round} and {tolerance}"
        raise ValueError(f"Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0; got {got}.")
    summary = jnp.ravel if summary is None else summary
    latents = sim.best_latents(latents)
    observed = summary(jnp.asarray(x))
    posterior: FittedPosterior | None = None
    samples, moved, reason, simulations = [], [], "n_rounds reached", 0
    for r, key_round in enumerate(jax.random.split(check_key(key), n_rounds)):
        key_theta, key_draw, key_fit, key_sample = jax.random.split(key_round, 4)
        if r > 0 or not len(estimator):
            theta, inside = posterior.propose(key_theta, n_per_round) if posterior is not None else (None, None)
            options = dict(with_score=with_score, latents=latents, n_average=n_average)
            draws = sim.draw(key_draw, n_per_round, theta, **options)
            t = jax.lax.map(summary, draws.x)
            estimator = estimator.restricted(inside).append(draws.theta, t, draws.score)
            simulations += n_per_round
        posterior = estimator.fit(key_fit, **(fit or {})).condition(observed)
        samples.append(np.asarray(posterior.sample(key_sample, n_samples)))
        if r > 0:
            moved.append(_motion(samples[-2], samples[-1]))
            if moved[-1] < tolerance:
                reason = f"moved by {moved[-1]:.3f} < {tolerance}"
                break
    return Rounds(posterior, np.stack(samples), tuple(moved), simulations, reason)


def _motion(before: Float[Array, "n p"], after: Float[Array, "n p"]) -> float:
    shift = np.abs(after.mean(0) - before.mean(0)) / after.std(0)
    return float(max(shift.max(), np.abs(np.log(after.std(0) / before.std(0))).max()))
