"""How many simulations do scores save on lensing maps? NPE and NLE, without scores and with scores of less noise.

One simulated LSST-Y10 map; every posterior is compared with the converged full-field chain of that map by C2ST. Maps
are compressed to a number for each parameter (score compression at the fiducial), which loses some information: no
posterior given these numbers comes nearer to the full field's than that allows. Each seed has simulations of its own;
those of a smaller N are the first ones of a larger.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffsbi as ds
from diffsbi import summaries
from diffsbi._files import load_npz, read_json, write_json
from diffsbi.diagnostics import c2st, compare_moments
from diffsbi.runs import start_run
from diffsbi.sampling import load_chains
from experiments import command_line, sampling

ESTIMATORS = {"NPE": ds.NPE, "NLE": ds.NLE}


@dataclasses.dataclass(frozen=True)
class Config:
    """`scores`: latent coordinate and number of averaged draws of each kind of score."""

    n_pix: int = 64
    n: tuple[int, ...] = (50, 100, 200, 500, 1000)
    seeds: int = 3
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    scores: tuple[tuple[str, int], ...] = (("white", 1), ("whitened", 1), ("whitened", 4), ("whitened", 16))
    n_covariance: int = 400
    n_derivative: int = 50
    n_samples: int = 2000
    members: int = 4
    chains: sampling.Config = dataclasses.field(default_factory=lambda: sampling.PRESETS["paper"])
    seed: int = 0


PRESETS = {
    "smoke": Config(
        16, (20,), 1, ("NPE",), (("whitened", 2),), 50, 5, 200, 1, chains=sampling.PRESETS["smoke"]
    ),
    "paper": Config(),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the table."""
    sampling.measure(cfg.chains, cfg.n_pix, sampling.REFERENCE, out.parent / "sampling")
    chains = load_chains(sampling.folder_of(out.parent / "sampling", cfg.n_pix, sampling.REFERENCE))
    sim, x = sampling.observed(cfg.chains, cfg.n_pix)
    settings = {"name": "scores_lensing"} | dataclasses.asdict(cfg)
    run = start_run(out, settings, ("compression", "simulations", "fits"))
    statistics = summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise)
    run.once("compression", lambda folder: _compress(cfg, sim, statistics, run, folder))
    run.once("simulations", lambda folder: _simulate(cfg, sim, statistics, run, folder))
    compression = summaries.ScoreCompression.load(run.path("compression", "compression.npz"))
    pool = load_npz(run.path("simulations", "pool.npz"))
    observed = compression(statistics(jnp.asarray(x)))
    rows = []
    kinds = [None, *cfg.scores]
    for seed, n, kind, name in itertools.product(range(cfg.seeds), cfg.n, kinds, cfg.estimators):
        path = out / "fits" / f"{name}_{_name(kind)}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            write_json(path, _fit(cfg, sim, pool, compression, observed, chains.flat(), seed, n, kind, name))
        rows.append(read_json(path))
    write_json(out / "distances.json", dict(rows=rows))
    print_table(cfg, rows)


def _name(kind: tuple[str, int] | None) -> str:
    return "none" if kind is None else f"{kind[0]}_{kind[1]}"


def _compress(cfg: Config, sim, statistics, run, folder: Path) -> dict:
    compression = summaries.score_compression(
        statistics, lambda theta, key: sim.draw_one(key, theta)[2], sim.fiducial, run.key("compression"),
        n_covariance=cfg.n_covariance, n_derivative=cfg.n_derivative, progress=True,
    )  # fmt: skip
    compression.save(folder / "compression.npz")
    return {"simulations": compression.n_simulations}


def _simulate(cfg: Config, sim, statistics, run, folder: Path) -> dict:
    n, pool = cfg.seeds * max(cfg.n), {}
    for kind in cfg.scores:
        draws = sim.draw(run.key("simulations"), n, latents=kind[0], n_average=kind[1], progress=True)
        pool[_name(kind)] = np.asarray(draws.score)
    pool |= {"theta": np.asarray(draws.theta), "statistics": np.asarray(jax.lax.map(statistics, draws.x))}
    np.savez(folder / "pool.npz", **pool)
    return {"simulations": n}


def _fit(cfg: Config, sim, pool, compression, observed, chain, seed, n, kind, name) -> dict:
    rows = slice(seed * max(cfg.n), seed * max(cfg.n) + n)
    t = np.asarray(compression(pool["statistics"][rows]))
    score = None if kind is None else pool[_name(kind)][rows]
    key_fit, key_sample = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), 1000 * seed + n))
    estimator = ESTIMATORS[name](sim.prior).append(pool["theta"][rows], t, score)
    posterior = estimator.fit(key_fit, members=cfg.members)
    theta = np.asarray(posterior.sample(key_sample, cfg.n_samples, observed))
    distance = c2st(theta, chain, seed=seed, duplicates="drop")
    moments = compare_moments(theta, chain, sim.names)
    return dict(
        estimator=name, score=_name(kind), n=n, seed=seed, c2st=distance.value, error=distance.error,
        shift=np.asarray(moments.shift).tolist(), width_ratio=np.asarray(moments.width_ratio).tolist(),
    )  # fmt: skip


def print_table(cfg: Config, rows: list[dict]) -> None:
    print(f"\nC2ST against the full field, mean and standard error over {cfg.seeds} seeds")
    print(f"{'':22}" + "".join(f"{n:>15}" for n in cfg.n))
    for name, kind in itertools.product(cfg.estimators, [None, *cfg.scores]):
        line = f"{name} {_name(kind):18}"
        for n in cfg.n:
            values = [r["c2st"] for r in rows if (r["estimator"], r["score"], r["n"]) == (name, _name(kind), n)]
            error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            line += f"  {np.mean(values):.3f} ± {error:.3f}"
        print(line)


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_lensing")
