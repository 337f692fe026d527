"""How many simulations does one lensing map take in rounds? NPE and NLE, without scores and with scores of less noise.

One simulated LSST-Y10 map; after every round the posterior is compared with the converged full-field chain of that map
by C2ST. The first round draws from the power-spectrum posterior of the map, from that of a short path
(`path_posterior`: gradients, no simulations; a new path for each seed), or from the prior; later ones from where the
last posterior is. Maps are compressed to their marginal score at the centre of that posterior, which loses least there:
the numbers of the simulations of all rounds are made anew in every round (`ds.rounds(..., summary_at=...)`), for
gradients but no simulations. All kinds of scores have the same first round.

Calibration (SBC ranks, TARP) is that of the first round's fits, on `n_coverage` simulated observations, shared out
among the seeds, from where that round drew: later rounds are for one observation.
"""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi._files import load_npz, read_json, write_json, write_npz
from diffsbi.compression import MarginalScore
from experiments import command_line
from experiments.curves import print_saved, print_table
from experiments.lensing import (
    MERITS,
    MapConfig,
    about,
    begin,
    calibration_of,
    distances,
    draws_under,
    merits,
    path_draws,
    print_calibration,
    spectrum_proposal,
    summarised,
)
from experiments.scores_lensing import ESTIMATORS, score_name

STAGES = ("observed", "reference", "spectrum", "paths", "rounds", "tests")
PROPOSALS = ("spectrum", "path", "prior")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """`n_rounds` of `n_per_round` simulations, the first from one of PROPOSALS; `n_points` of a path.

    `turns` of `MarginalScore` and their `steps`, by default by the number of pixels; `scores`: latents, averaged draws.
    """

    proposal: str = "spectrum"
    n_points: int = 24
    n_rounds: int = 2
    n_per_round: int = 50
    turns: int = 12
    steps: int | None = None
    seeds: int = 5
    estimators: tuple[str, ...] = ("NPE",)
    scores: tuple[tuple[str, int], ...] = (("white", 1), ("whitened", 8))
    n_coverage: int = 500
    n_samples: int = 2000
    members: int = 2


PRESETS = {
    "smoke": Config(
        n_pix=16, proposal="path", n_per_round=20, turns=4, seeds=1, scores=(("whitened", 2),), n_coverage=20,
        n_samples=200, members=1, ess=20, n_warmup=20, n_draws=40, n_chains=2, n_spectrum=10,
    ),
    "paper": Config(estimators=tuple(ESTIMATORS)),
    # The full configuration.
    "large": Config(n_pix=256, steps=4, ess=1000.0, scores=(("whitened", 8),)),
    "large_path": Config(n_pix=256, steps=4, ess=1000.0, scores=(("whitened", 8),), proposal="path"),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the table."""
    if cfg.n_rounds < 1 or cfg.seeds < 1:
        raise ValueError(f"Expected n_rounds >= 1 and seeds >= 1; got {cfg.n_rounds} and {cfg.seeds}.")
    if cfg.n_coverage < cfg.seeds:
        raise ValueError(f"Expected n_coverage >= seeds ({cfg.seeds}); got {cfg.n_coverage}.")
    if cfg.proposal not in PROPOSALS:
        raise ValueError(f"Expected a proposal among {PROPOSALS}; got {cfg.proposal!r}.")
    sim, run, x, chain = begin(cfg, "scores_rounds", out, STAGES)
    rows, first = [], []
    for seed in range(cfg.seeds):
        proposal = _proposal(cfg, sim, x, run, seed)
        if proposal is not None:
            theta = proposal.sample(jax.random.fold_in(run.key("paths"), seed), (cfg.n_samples,))
            first.append({"n": 0, "of": "proposal"} | distances(np.asarray(theta), {"c2st": chain}, sim.names, seed))
        for name, kind in itertools.product(cfg.estimators, (None, *cfg.scores)):
            path = out / "fits" / f"{name}_{score_name(kind)}_{seed}.json"
            if not path.exists():
                print(path.stem, flush=True)
                key = jax.random.fold_in(run.key("rounds"), seed)
                result = _rounds(cfg, sim, x, proposal, name, kind, key, out / "rounds" / path.stem)
                write_npz(path.with_suffix(".npz"), _tested(cfg, sim, proposal, result, run, seed))
                theta = result.samples
                write_npz(path.with_suffix(".draws.npz"), {"theta": theta})
                found = [distances(t, {"c2st": chain}, sim.names, seed) | merits(t, chain, sim.names) for t in theta]
                write_json(path, found)
            for r, row in enumerate(read_json(path)):
                rows.append(row | dict(estimator=name, score=score_name(kind), n=(r + 1) * cfg.n_per_round, seed=seed))
    fitted = dict.fromkeys((r["estimator"], r["score"]) for r in rows)
    coverage = [
        dict(estimator=name, score=score, n=cfg.n_per_round)
        | calibration_of(out / "fits" / f"{name}_{score}_{seed}.npz" for seed in range(cfg.seeds))
        for name, score in fitted
    ]
    write_json(out / "distances.json", dict(rows=rows, first=first, coverage=coverage, **about(sim)))
    for value, title in ({"c2st": "C2ST against the full field"} | MERITS).items():
        print(f"\n{title}, mean and standard error over {cfg.seeds} seeds")
        print_table(rows, ("estimator", "score"), value)
    for name, kind in itertools.product(cfg.estimators, cfg.scores):
        print_saved(rows, {"estimator": name}, score_name(kind))
    if first:
        print(f"\nThe proposal of the first round ({cfg.proposal}, {cfg.widen} times as wide)")
        print_table(first, ("of",))
    print_calibration(coverage, sim.names)


def _proposal(cfg: Config, sim, x, run, seed: int) -> ds.inference.GaussianProposal | None:
    """Where the seed's first round draws from."""
    if cfg.proposal == "prior":
        return None
    if cfg.proposal == "spectrum":
        return spectrum_proposal(cfg, sim, x, run)
    key, path = jax.random.fold_in(run.key("paths"), seed), run.path("paths", f"{seed}.npz")
    if not path.exists():
        write_npz(path, path_draws(sim, x, key, cfg.n_points, 2 * cfg.n_samples, run.path("paths", f"{seed}")))
    return ds.gaussian_proposal(sim, load_npz(path)["theta"], cfg.widen)


def _rounds(cfg: Config, sim, x, proposal, name: str, kind, key, folder: Path) -> ds.inference.Rounds:
    """All rounds of one seed; their simulations stay in `folder`."""
    latents, n_average = ("whitened", 1) if kind is None else kind
    return ds.rounds(
        sim, x, ESTIMATORS[name](sim.prior), key, proposal=proposal, widen=cfg.widen,
        n_rounds=cfg.n_rounds, n_per_round=cfg.n_per_round, n_samples=cfg.n_samples, tolerance=1e-9,
        summary_at=functools.partial(MarginalScore, sim, n_turns=cfg.turns, n_steps=cfg.steps),
        with_score=kind is not None, latents=latents, n_average=n_average, fit={"members": cfg.members},
        folder=folder, progress=True,
    )  # fmt: skip


def _tested(cfg: Config, sim, proposal, result: ds.inference.Rounds, run, seed: int) -> dict[str, np.ndarray]:
    """Parameters of this seed's test observations, and draws of the first round's posterior of each."""
    key_theta, key_draw, key = jax.random.split(jax.random.fold_in(run.key("tests"), seed), 3)
    n, source = cfg.n_coverage // cfg.seeds, sim.prior if proposal is None else proposal
    theta = source.sample(key_theta, (n,))
    t = summarised(sim, result.summaries[0].many, key_draw, n, theta, folder=run.folder / "tests" / str(seed))
    return dict(theta=np.asarray(theta), samples=draws_under(result.posteriors[0], proposal, t, key))


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_rounds")
