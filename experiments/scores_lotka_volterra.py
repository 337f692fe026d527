"""How many simulations do scores save on Lotka–Volterra? NPE from the prior, or from a narrow proposal.

Every posterior is compared by C2ST with the exact one, from NUTS on the parameters and the initial populations. NPE is
given the twenty logarithms of the observed populations themselves (`summary="logs"`), or the normal approximation of
each data set's own posterior (`"mode"`: `LaplaceMode`), in whose coordinates it then works. What that normal says
without any simulation is measured too. "wide" is the prior, "narrow" a normal in unconstrained space with `widen` times
the exact posterior's standard deviations, as a pilot run would find it.

Calibration (SBC ranks, TARP) is tested on `n_coverage` simulated observations from where the parameters were drawn,
shared out among the seeds.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diffsbi as ds
from diffsbi._files import load_npz, read_json, write_json, write_npz
from diffsbi._types import check_names
from diffsbi.compression import LaplaceMode
from diffsbi.runs import start_run
from diffsbi.sampling import full_field_posterior, load_chains
from experiments import command_line
from experiments.curves import print_saved, print_table
from experiments.lensing import (
    about,
    calibration_of,
    distances,
    draws_under,
    frame_draws,
    in_blocks,
    print_calibration,
)

PUBLISHED = {
    "none": {20: 0.997, 50: 0.972, 100: 0.942, 200: 0.860, 500: 0.788, 1000: 0.778},
    "score": {20: 0.987, 50: 0.948, 100: 0.910, 200: 0.838, 500: 0.793, 1000: 0.788},
}
"""C2ST from the prior behind a learned compression, 20 seeds, of Zeghal et al. 2022, arXiv:2207.05636."""


@dataclasses.dataclass(frozen=True)
class Config:
    """`substeps` of the solver between two observations; the same for the exact posterior and for the simulations.

    `summary`: "mode", from `starts` starts, or "logs".
    """

    substeps: int = 28
    summary: str = "mode"
    starts: int = 16
    n: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)
    seeds: int = 20
    proposals: tuple[str, ...] = ("wide",)
    scores: tuple[str, ...] = ("white", "laplace")
    widen: float = 2.0
    members: int = 2
    max_epochs: int | None = None
    coverage_n: tuple[int, ...] = (50, 200)
    n_coverage: int = 500
    n_samples: int = 2000
    ess: float = 4000.0
    n_warmup: int = 400
    n_draws: int = 10_000
    seed: int = 0


PRESETS = {
    "smoke": Config(
        8, "mode", 2, (20,), 1, scores=("white",), members=1, max_epochs=5, coverage_n=(20,), n_coverage=20,
        n_samples=200, ess=20, n_warmup=60, n_draws=60,
    ),
    "paper": Config(),
    "narrow": Config(seeds=5, proposals=("narrow",)),
    "logs": Config(
        summary="logs", seeds=5, proposals=("narrow", "wide"), members=4, coverage_n=()
    ),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the tables."""
    check_names([cfg.summary], ["mode", "logs"], "summary")
    check_names(cfg.proposals, ["wide", "narrow"], "proposals")
    if not set(cfg.coverage_n) <= set(cfg.n):
        raise ValueError(f"Expected coverage_n among n={cfg.n}, whose fits are made; got {cfg.coverage_n}.")
    if cfg.coverage_n and cfg.n_coverage < cfg.seeds:
        raise ValueError(f"Expected n_coverage >= seeds ({cfg.seeds}); got {cfg.n_coverage}.")
    streams = ("observed", "exact", *(f"{stream}_{p}" for p in ("narrow", "wide") for stream in ("theta", "draws")))
    run = start_run(out, {"name": "scores_lotka_volterra"} | dataclasses.asdict(cfg), streams)
    sim = ds.lotka_volterra(substeps=cfg.substeps)
    x = sim.draw(run.key("observed"), 1, sim.fiducial, with_score=False).x
    run.once("exact", lambda folder: _exact(cfg, sim, x[0], run, folder))
    exact = load_chains(run.path("exact")).flat()
    summary = LaplaceMode(sim, n_starts=cfg.starts).many if cfg.summary == "mode" else jnp.log
    write_npz(out / "exact.npz", {"theta": exact})  # for the figures, which know nothing of chains
    case = _Case(cfg, sim, summary(x)[0], exact)
    narrow = ds.gaussian_proposal(sim, exact, cfg.widen)
    rows, coverage = [], []
    for name in cfg.proposals:
        proposal = {"wide": None, "narrow": narrow}[name]
        run.once(f"simulations_{name}", lambda folder, n=name, p=proposal: _simulate(case, summary, n, p, run, folder))
        pool = load_npz(run.path(f"simulations_{name}", "pool.npz"))
        for seed, n, score in itertools.product(range(cfg.seeds), cfg.n, ("none", *cfg.scores)):
            path = out / "fits" / f"{name}_{score}_{n}_{seed}.json"
            if not path.exists():
                print(path.stem, flush=True)
                write_json(path, case.fit(proposal, pool, n, seed, score, path))
            rows.append(read_json(path) | dict(proposal=name, score=score, n=n, seed=seed))
        for score, n in itertools.product(("none", *cfg.scores), cfg.coverage_n):
            files = [out / "fits" / f"{name}_{score}_{n}_{seed}.npz" for seed in range(cfg.seeds)]
            coverage.append(dict(estimator=f"NPE {name}", score=score, n=n) | calibration_of(files))
    alone = case.mode_alone(run.key("observed")) if cfg.summary == "mode" else {}
    found = dict(rows=rows, published=PUBLISHED, mode_alone=alone, coverage=coverage)
    write_json(out / "distances.json", found | about(sim))
    print(f"\nC2ST against the exact posterior, mean and standard error over {cfg.seeds} seeds; published: {PUBLISHED}")
    print_table(rows, ("proposal", "score"))
    for name, score in itertools.product(cfg.proposals, cfg.scores):
        print_saved(rows, {"proposal": name}, score)
    if alone:
        print(f"The normal approximation without any simulation: {alone['c2st']:.3f}")
    print_calibration(coverage, sim.names)


def _exact(cfg: Config, sim, x, run, folder: Path) -> dict:
    settings = dict(until_ess=cfg.ess, n_samples=cfg.n_draws, n_warmup=cfg.n_warmup, latents="white")
    chains = full_field_posterior(sim, x, run.key("exact"), folder=folder / "blocks", progress=True, **settings)
    chains.save(folder)
    return {name: [row.mean, row.sd, row.ess_bulk, row.rhat] for name, row in chains.summary().items()}


def _simulate(case: "_Case", summary, name: str, proposal, run, folder: Path) -> dict:
    """Scored simulations for all seeds, then those that calibration is tested on."""
    cfg, sim = case.cfg, case.sim
    scored = cfg.seeds * max(cfg.n)
    n = scored + (cfg.n_coverage if cfg.coverage_n else 0)
    theta = (sim.prior if proposal is None else proposal).sample(run.key(f"theta_{name}"), (n,))

    def make(start: int, count: int) -> dict:
        part, rows = {}, theta[start : start + count]
        for kind in cfg.scores:
            draws = sim.draw(run.key(f"draws_{name}"), count, rows, latents=kind, start=start)
            part[kind] = draws.score
        return part | {"theta": draws.theta, "x": summary(draws.x)}

    write_npz(folder / "pool.npz", in_blocks(f"simulations ({name})", n, 1000, make, folder / "blocks"))
    return {"simulations": n}


class _Case(NamedTuple):
    """The observation's summary and its exact posterior."""

    cfg: Config
    sim: Any
    observed: Any
    exact: np.ndarray

    def fit(self, proposal, pool, n: int, seed: int, score: str, path: Path) -> dict:
        """Distances of one fit; its draws, and those at the test observations, go beside `path`."""
        cfg = self.cfg
        rows = slice(seed * max(cfg.n), seed * max(cfg.n) + n)
        key_fit, key_sample = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 1000 * seed + n))
        npe = ds.NPE(self.sim, framed=cfg.summary == "mode").append(
            pool["theta"][rows], pool["x"][rows], None if score == "none" else pool[score][rows], proposal=proposal
        )
        posterior = npe.fit(key_fit, members=cfg.members, max_epochs=cfg.max_epochs)
        if n in cfg.coverage_n:
            share = cfg.n_coverage // cfg.seeds
            first = cfg.seeds * max(cfg.n) + seed * share
            theta, x = (pool[name][first : first + share] for name in ("theta", "x"))
            samples = draws_under(posterior, proposal, x, jax.random.fold_in(key_sample, 1))
            write_npz(path.with_suffix(".npz"), dict(theta=theta, samples=samples))
        theta = np.asarray(posterior.sample(key_sample, cfg.n_samples, self.observed))
        write_npz(path.with_suffix(".draws.npz"), {"theta": theta})
        return distances(theta, {"c2st": self.exact}, self.sim.names, seed)

    def mode_alone(self, key) -> dict:
        """What the normal approximation says of the observation."""
        theta = frame_draws(self.sim, self.observed, jax.random.fold_in(key, 1), self.cfg.n_samples)
        return distances(theta, {"c2st": self.exact}, self.sim.names, 0)


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_lotka_volterra")
