"""How many simulations do scores save on Lotka–Volterra? NPE from a wide and from a narrow proposal.

The data are the logarithms of the twenty observed populations, with no compression; every posterior is compared by C2ST
with the exact one, from NUTS on the parameters and the initial populations. "wide" is the prior, "narrow" a normal in
unconstrained space with `widen` times the exact posterior's standard deviations, as a pilot run would find it.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffsbi as ds
from diffsbi._files import load_npz, read_json, write_json
from diffsbi.diagnostics import c2st, compare_moments
from diffsbi.runs import start_run
from diffsbi.sampling import full_field_posterior, load_chains
from experiments import command_line
from experiments.curves import print_saved, print_table

PUBLISHED = {
    "none": {20: 0.997, 50: 0.972, 100: 0.942, 200: 0.860, 500: 0.788, 1000: 0.778},
    "score": {20: 0.987, 50: 0.948, 100: 0.910, 200: 0.838, 500: 0.793, 1000: 0.788},
}
"""C2ST from the prior behind a learned compression, 20 seeds, of Zeghal et al. 2022, arXiv:2207.05636."""


@dataclasses.dataclass(frozen=True)
class Config:
    """`substeps` of the solver between two observations; the same for the exact posterior and for the simulations."""

    substeps: int = 28
    n: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)
    seeds: int = 20
    proposals: tuple[str, ...] = ("narrow", "wide")
    scores: tuple[str, ...] = ("white", "laplace")
    widen: float = 2.0
    members: int = 4
    max_epochs: int | None = None
    n_samples: int = 2000
    ess: float = 4000.0
    n_warmup: int = 400
    n_draws: int = 10_000
    seed: int = 0


PRESETS = {
    "smoke": Config(8, (20,), 1, ("wide",), ("white",), 2.0, 1, 5, 200, ess=20, n_warmup=60, n_draws=60),
    "paper": Config(),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the tables."""
    streams = ("observed", "exact", *(f"{stream}_{p}" for p in ("narrow", "wide") for stream in ("theta", "draws")))
    run = start_run(out, {"name": "scores_lotka_volterra"} | dataclasses.asdict(cfg), streams)
    sim = ds.lotka_volterra(substeps=cfg.substeps)
    x = sim.draw(run.key("observed"), 1, sim.fiducial, with_score=False).x[0]
    run.once("exact", lambda folder: _exact(cfg, sim, x, run, folder))
    exact = load_chains(run.path("exact")).flat()
    narrow = ds.gaussian_proposal(sim, exact, cfg.widen)
    rows = []
    for name in cfg.proposals:
        proposal = {"wide": None, "narrow": narrow}[name]
        run.once(f"simulations_{name}", lambda folder, n=name, p=proposal: _simulate(cfg, sim, n, p, run, folder))
        pool = load_npz(run.path(f"simulations_{name}", "pool.npz"))
        for seed, n, score in itertools.product(range(cfg.seeds), cfg.n, ("none", *cfg.scores)):
            path = out / "fits" / f"{name}_{score}_{n}_{seed}.json"
            if not path.exists():
                print(path.stem, flush=True)
                write_json(path, _fit(cfg, sim, proposal, pool, jnp.log(x), exact, n, seed, score))
            rows.append(read_json(path) | dict(proposal=name, score=score, n=n, seed=seed))
    write_json(out / "distances.json", dict(rows=rows, published=PUBLISHED))
    print(f"\nC2ST against the exact posterior, mean and standard error over {cfg.seeds} seeds; published: {PUBLISHED}")
    print_table(rows, ("proposal", "score"))
    for name, score in itertools.product(cfg.proposals, cfg.scores):
        print_saved(rows, {"proposal": name}, score)


def _exact(cfg: Config, sim, x, run, folder: Path) -> dict:
    settings = dict(until_ess=cfg.ess, n_samples=cfg.n_draws, n_warmup=cfg.n_warmup, latents="white")
    chains = full_field_posterior(sim, x, run.key("exact"), folder=folder / "blocks", progress=True, **settings)
    chains.save(folder)
    return {name: [row.mean, row.sd, row.ess_bulk, row.rhat] for name, row in chains.summary().items()}


def _simulate(cfg: Config, sim, name: str, proposal, run, folder: Path) -> dict:
    n, pool = cfg.seeds * max(cfg.n), {}
    theta = (sim.prior if proposal is None else proposal).sample(run.key(f"theta_{name}"), (n,))
    for kind in cfg.scores:
        draws = sim.draw(run.key(f"draws_{name}"), n, theta, latents=kind, progress=True)
        pool[kind] = np.asarray(draws.score)
    np.savez(folder / "pool.npz", theta=np.asarray(draws.theta), x=np.log(np.asarray(draws.x)), **pool)
    return {"simulations": n}


def _fit(cfg: Config, sim, proposal, pool, observed, exact, n: int, seed: int, score: str) -> dict:
    rows = slice(seed * max(cfg.n), seed * max(cfg.n) + n)
    key_fit, key_sample = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 1000 * seed + n))
    npe = ds.NPE(sim).append(
        pool["theta"][rows], pool["x"][rows], None if score == "none" else pool[score][rows], proposal=proposal
    )
    posterior = npe.fit(key_fit, members=cfg.members, max_epochs=cfg.max_epochs)
    theta = np.asarray(posterior.sample(key_sample, cfg.n_samples, observed))
    distance = c2st(theta, exact, seed=seed, duplicates="drop")
    moments = compare_moments(theta, exact, sim.names)
    return dict(
        c2st=distance.value, error=distance.error,
        shift=np.asarray(moments.shift).tolist(), width_ratio=np.asarray(moments.width_ratio).tolist(),
    )  # fmt: skip


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_lotka_volterra")
