"""Sequential inference: simulate where the posterior of one observation is, and fit, until it no longer moves."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import DensityPosterior, FittedPosterior
from diffsbi.inference.proposals import GaussianProposal, gaussian_proposal
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.prior import Prior
from diffsbi.sampling.full_field import observed as observed_by
from diffsbi.store import create_store

Summary = Callable[[Array], Array]


class Rounds(eqx.Module):
    """What `rounds` did.

    Attributes:
        posteriors: Of each round, conditioned on the observation's summaries.
        summaries: What each is given: data of one simulation → `(d,)`.
        samples: Draws of theta of each round, `(rounds, n, p)`.
        moved: For each round after the first, the largest change of a mean (in widths) or of a log-width.
        leakage: For each round, the share of the fitted density where there were no simulations: outside the region
            that they were drawn from (TSNPE), or where the mixture of proposals is smaller than at any of them, which
            is cut off where the correction is "reweight" (`ReweightedPosterior.leakage`). 0 for likelihoods and
            ratios, and for the whole prior, whose support no density leaves.
        simulations: Simulations of all rounds, without those that the estimator brought.
        stop_reason: Why it ended.
    """

    posteriors: tuple[FittedPosterior, ...]
    summaries: tuple[Summary, ...]
    samples: np.ndarray
    moved: tuple[float, ...]
    leakage: tuple[float, ...]
    simulations: int
    stop_reason: str = eqx.field(static=True)

    @property
    def posterior(self) -> FittedPosterior:
        """The last round's."""
        return self.posteriors[-1]

    @property
    def summary(self) -> Summary:
        """What the last round's posterior is given."""
        return self.summaries[-1]


def rounds(
    sim,
    x: Array,
    estimator: Estimator,
    key: Key,
    *,
    n_rounds: int = 5,
    n_per_round: int = 200,
    proposal: GaussianProposal | None = None,
    widen: float = 1.25,
    summary: Summary | None = None,
    summary_at: Callable[[Array], Summary] | None = None,
    with_score: bool = True,
    latents: str | None = None,
    n_average: int = 1,
    n_samples: int = 2000,
    tolerance: float = 0.1,
    fit: dict | None = None,
    folder: str | Path | None = None,
    block_size: int = 10,
    progress: bool = False,
) -> Rounds:
    r"""Sequential estimation of p(theta | x) for one observation.

    A round whose proposal or posterior cannot be drawn from ends it with a warning: what earlier rounds gave is kept.

    The first round draws from the prior or from `proposal` (where `estimator` has no simulations yet), later ones from
    where the posterior of the last is. Likelihoods and ratios: from that posterior itself, which needs no correction.
    Posteriors: from the prior cut to the region that holds all but 1e-4 of the posterior (TSNPE, Deistler et al. 2022,
    arXiv:2210.04815), where the posterior, and its score, is what it was under the whole prior; simulations outside
    that region are left out. Once any simulations were not from the prior: from a normal with the moments of the
    posterior, `widen` times as wide, all of which are kept and corrected for the mixture they come from together (NPE's
    `correction`).

    Statistics that lose little only near one $\theta_0$ (the marginal score, the score compression) can be made anew,
    for the simulations of all rounds, whose data stay in memory, at the mean of the last posterior:
    `summary_at=functools.partial(MarginalScore, sim)`.

    Args:
        sim: The simulator.
        x: The observation, as the simulator draws it.
        estimator: `NPE`, `NLE` or `NRE`; simulations that it has already count as the first round's. It is not changed.
        key: A typed JAX key.
        n_rounds: Most rounds.
        n_per_round: Simulations of each.
        proposal: Where the first round draws from, such as a power-spectrum posterior; None for the prior.
        widen: Factor on the standard deviations of the normals that later rounds draw from.
        summary: Data of one simulation → `(d,)`; by default the flattened data.
        summary_at: Instead of `summary`: theta0 → such a function. theta0 is the centre of the first round's draws
            (without `proposal`, the fiducial), then of the posterior's.
        with_score: Whether the scores are used.
        latents: Latent coordinate of the scores; by default "whitened" where the simulator offers it.
        n_average: States of a chain of the latents that a score is averaged over.
        n_samples: Posterior draws after each round, by which its motion is measured.
        tolerance: Stop when no mean moves by more than this many widths, and no width by more than this fraction.
        fit: Keywords of `Estimator.fit`.
        folder: Where simulations and their summaries are kept, block by block; the same call goes on from there.
        block_size: Rows of a block.
        progress: Show a bar for each round.

    Raises:
        ValueError: Settings that make no sense, an observation that is none of the simulator's, an estimator with
            simulations where they would need other summaries or had another proposal, or a folder of another call.
        OSError: If the disk is full.
    """
    if n_rounds < 1 or n_per_round < 1 or not tolerance > 0:
        got = f"{n_rounds}, {n_per_round} and {tolerance}"
        raise ValueError(f"Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0; got {got}.")
    if block_size < 1 or not 0 < widen < np.inf:
        raise ValueError(f"Expected block_size >= 1 and a finite widen > 0; got {block_size} and {widen}.")
    if summary is not None and summary_at is not None:
        raise ValueError("Expected summary or summary_at; got both.")
    _check_types(sim, estimator)
    if len(estimator) and (summary_at is not None or proposal is not None):
        which = "summary_at" if summary_at is not None else "proposal"
        raise ValueError(f"Expected an estimator without simulations for {which}=...; it has {len(estimator)}.")
    (x, _), latents = observed_by(sim, x), sim.best_latents(latents)
    scores = dict(with_score=with_score, latents=latents, n_average=n_average)
    files = RoundFiles(folder, block_size, progress, sim, scores, x, check_key(key))
    summary = jnp.ravel if summary is None else summary
    if len(estimator):
        _check_rows(estimator, jax.eval_shape(summary, x).shape, with_score)
    fitted = estimator
    parts: list[_Part] = []
    posteriors: list[FittedPosterior] = []
    summaries: list[Summary] = []
    samples: list[np.ndarray] = []
    moved: list[float] = []
    leaked: list[float] = []
    inside: Callable[[Any], Any] | None = None
    reason = "n_rounds reached"
    for r, key_round in enumerate(jax.random.split(key, n_rounds)):
        key_theta, key_draw, key_fit, key_sample = jax.random.split(key_round, 4)
        if r > 0 or not len(estimator):
            if not posteriors:
                theta, inside = _first_draws(sim.prior if proposal is None else proposal, key_theta, n_per_round), None
            elif isinstance(posteriors[-1], DensityPosterior) and not fitted.from_prior:
                proposal = gaussian_proposal(sim, samples[-1], widen)
                theta, inside = proposal.sample(key_theta, (n_per_round,)), None
            else:  # a region of the prior; or a likelihood's or a ratio's posterior, which asks for no correction
                proposal = None
                try:
                    theta, inside = posteriors[-1].propose(key_theta, n_per_round)
                except ValueError as error:
                    reason = _gave_up(r, error)
                    break
            if summary_at is not None:
                known = samples[-1] if samples else theta
                summary = summary_at(sim.fiducial if r == 0 and proposal is None else _centre(sim.prior, known))
            estimator, parts = estimator.restricted(inside), [part.restricted(inside) for part in parts]
            part = files.simulations(r, theta, key_draw, None if summary_at is not None else summary)
            parts.append(part._replace(proposal=proposal))
        data = [part.x for part in parts] if summary_at is None else files.summaries(r, summary, parts)
        observed = _summarised(summary, x[None])[0]
        fitted = _with(estimator, parts, data)
        posterior = fitted.fit(key_fit, **(fit or {})).condition(observed)
        try:
            samples.append(np.asarray(posterior.sample(key_sample, n_samples)))
        except ValueError as error:
            if not posteriors:
                raise
            reason = _gave_up(r, error)
            break
        posteriors.append(posterior)
        summaries.append(summary)
        key_leak = jax.random.fold_in(key_sample, 1)
        leaked.append(_leakage(posteriors[-1], samples[-1], inside, _beyond(fitted), key_leak))
        if r > 0:
            moved.append(_motion(samples[-2], samples[-1]))
            if moved[-1] < tolerance:
                reason = f"moved by {moved[-1]:.3f} < {tolerance}"
                break
    simulations = n_per_round * len(parts)
    return Rounds(
        tuple(posteriors), tuple(summaries), np.stack(samples), tuple(moved), tuple(leaked), simulations, reason
    )


def _check_types(sim, estimator) -> None:
    if not hasattr(sim, "draw_one") or not isinstance(getattr(sim, "prior", None), Prior):
        raise ValueError(f"Expected a simulator, with a prior and draws; got {type(sim).__name__}.")
    if not isinstance(estimator, Estimator):
        raise ValueError(f"Expected an estimator, such as diffsbi.NPE(sim); got {estimator!r:.80}.")
    if estimator.prior.names != sim.prior.names:
        names = f"{list(estimator.prior.names)}, not {list(sim.prior.names)}"
        raise ValueError(f"Expected the estimator's prior to be the simulator's; its parameters are {names}.")
    theta = sim.prior.sample(jax.random.key(0), (100,))
    own, other = (np.asarray(prior.log_prob(theta), float) for prior in (sim.prior, estimator.prior))
    if not np.allclose(own, other, rtol=1e-3, atol=1e-3):
        raise ValueError("Expected the estimator's prior to be the simulator's; their densities differ.")


def _check_rows(estimator: Estimator, shape: tuple[int, ...], with_score: bool) -> None:
    """Whether new rows can join those that the estimator has; before anything is simulated."""
    rows = estimator._rows[0]
    if shape != rows.x.shape[1:]:
        raise ValueError(f"Expected summaries of shape {rows.x.shape[1:]}, as the estimator has; got {shape}.")
    if with_score != (rows.score is not None):
        has = "no scores" if with_score else "scores"
        raise ValueError(f"Expected with_score={not with_score}, as the estimator's simulations have {has}.")


def _first_draws(proposal, key: Key, n: int) -> Array:
    """Draws of a distribution, or of the posterior of another fit."""
    return proposal.sample(key, n if isinstance(proposal, FittedPosterior) else (n,))


def _gave_up(r: int, error: ValueError) -> str:
    """Why round `r` (from 0) ends it all; warns."""
    reason = f"round {r + 1} failed: {error}"
    warnings.warn(f"Stopped: {reason} The posterior of round {r} is kept.", stacklevel=3)
    return reason


class _Part(NamedTuple):
    """Simulations of one round: their data where these are to be summarised again, else their summaries."""

    theta: np.ndarray
    x: np.ndarray
    score: np.ndarray | None
    used: np.ndarray
    proposal: Any = None

    def restricted(self, inside) -> "_Part":
        return self if inside is None else self._replace(used=self.used & inside(self.theta))


def _with(estimator: Estimator, parts: list[_Part], data: list[np.ndarray]) -> Estimator:
    """A copy of the estimator that has the simulations as well."""
    estimator = estimator.restricted()
    for part, t in zip(parts, data, strict=True):
        rows = part.used
        estimator.append(
            part.theta[rows], t[rows], None if part.score is None else part.score[rows], proposal=part.proposal
        )
    return estimator


@dataclasses.dataclass(frozen=True)
class RoundFiles:
    """Simulates and summarises, block by block, in stores within `folder` where there is one."""

    folder: str | Path | None
    block_size: int
    progress: bool
    sim: Any
    scores: dict[str, Any]
    x: Array
    key: Key

    def simulations(self, r: int, theta, key: Key, summary: Summary | None) -> _Part:
        """Simulations at `theta`, with their summaries or, without a summary, their data."""
        options, theta = dict(self.scores), np.asarray(theta)

        def make(start: int, count: int) -> dict[str, Array]:
            if options["with_score"] and options["n_average"] > 1 and "n_steps" not in options:
                options["n_steps"] = self.sim.averaging_steps(key, options["latents"])
            draws = self.sim.draw(key, count, jnp.asarray(theta[start : start + count]), start=start, **options)
            x = draws.x if summary is None else _summarised(summary, draws.x)
            return dict(theta=draws.theta, x=x) | ({} if draws.score is None else {"score": draws.score})

        shape = self.x.shape if summary is None else jax.eval_shape(summary, self.x).shape
        shapes = dict(theta=theta.shape[1:], x=shape) | ({"score": theta.shape[1:]} if options["with_score"] else {})
        what = f"round {r + 1} simulations"
        kept = self.folder is not None and self._store(what).exists()
        rows = self._rows(what, len(theta), shapes, make)
        if not np.allclose(rows["theta"], theta, rtol=1e-3):
            raise ValueError(f"Expected {self.folder} to hold round {r + 1} of this call; its theta are others.")
        if kept:  # by the same simulator, and with the same summary?
            x = self.sim.draw(key, 1, jnp.asarray(theta[:1]), start=0, with_score=False).x
            own = np.asarray(x if summary is None else _summarised(summary, x), float)
            if not np.allclose(rows["x"][:1], own, rtol=1e-3, atol=1e-3 * np.abs(own).max()):
                raise ValueError(
                    f"Expected {self.folder} to hold round {r + 1} of this call; its first simulation is another "
                    "(has the simulator or the summary changed?)."
                )
        return _Part(rows["theta"], rows["x"], rows.get("score"), np.ones(len(theta), bool))

    def summaries(self, r: int, summary: Summary, parts: list[_Part]) -> list[np.ndarray]:
        """Of the data of all parts."""
        x = np.concatenate([part.x for part in parts])

        def make(start: int, count: int) -> dict[str, Array]:
            return {"t": _summarised(summary, jnp.asarray(x[start : start + count]))}

        shapes = {"t": jax.eval_shape(summary, self.x).shape}
        t = self._rows(f"round {r + 1} summaries", len(x), shapes, make)["t"]
        return np.split(t, np.cumsum([len(part.x) for part in parts])[:-1])

    def _store(self, what: str) -> Path:
        return Path(self.folder or "") / what.replace(" ", "_")

    def _rows(self, what: str, n: int, shapes, make: Callable[[int, int], dict[str, Array]]) -> dict[str, np.ndarray]:
        if self.folder is None:
            size = self.block_size if self.progress else n
            starts = tqdm(range(0, n, size), desc=what, unit="block", disable=not self.progress)
            blocks = [make(start, min(size, n - start)) for start in starts]
            return {name: np.concatenate([block[name] for block in blocks]) for name in shapes}
        words = jax.random.key_data(self.key).tolist()
        config = self.scores | dict(key=words, observed=hashlib.sha256(np.asarray(self.x).tobytes()).hexdigest())
        store = create_store(
            self._store(what), config=config, seed=words[-1], names=self.sim.names, n=n,
            arrays=shapes, block_size=self.block_size, dtype=str(jnp.result_type(float)),
        )  # fmt: skip
        for block in store.each_missing(self.progress, what):
            store.write(block, {name: np.asarray(a) for name, a in make(block.start, len(block)).items()})
        return store.load()


@eqx.filter_jit
def _summarised(summary: Summary, x: Array) -> Array:
    return jax.lax.map(summary, x)


def _centre(prior: Prior, theta) -> Array:
    """The mean in unconstrained space, of parameters again."""
    return prior.from_unconstrained(jnp.asarray(prior.unconstrained_moments(theta)[0], jnp.result_type(float)))


def _beyond(estimator: Estimator) -> Callable[[np.ndarray], np.ndarray] | None:
    """Where there were no simulations, had these a proposal: theta (n, p) → (n,)."""
    proposals = estimator._proposals()
    if proposals is None:
        return None

    def beyond(theta):
        drawn = np.concatenate([np.asarray(part.theta[:]) for part in estimator._rows])
        return np.isneginf(proposals.with_floor(drawn).log_weight(jnp.asarray(theta)))

    return beyond


def _leakage(posterior: FittedPosterior, theta: np.ndarray, inside, beyond, key: Key) -> float:
    if isinstance(posterior, ReweightedPosterior):
        return float(posterior.leakage(key))
    if not isinstance(posterior, DensityPosterior):
        return 0.0
    if beyond is not None:
        return float(np.mean(beyond(theta)))
    return 0.0 if inside is None else float(1 - np.mean(inside(theta)))


def _motion(before: Float[Array, "n p"], after: Float[Array, "n p"]) -> float:
    shift = np.abs(after.mean(0) - before.mean(0)) / after.std(0)
    return float(max(shift.max(), np.abs(np.log(after.std(0) / before.std(0))).max()))
