"""How many simulations do scores save on lensing maps? NPE and NLE, without scores and with scores of less noise.

One simulated LSST-Y10 map; every posterior is compared with the converged full-field chain of that map by C2ST. Maps
are compressed to a number for each parameter (score compression at the fiducial), which loses information: no posterior
given these numbers comes nearer to the full field's than that allows. So every posterior is also compared with what the
numbers themselves say, as NLE learns it from `n_reference` simulations without scores (there is no exact answer).
Parameters are drawn from the prior, or from the power-spectrum posterior of the map (`gaussian_proposal`). Each seed
has simulations of its own; those of a smaller N are the first ones of a larger.
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
from diffsbi.sampling import full_field_posterior, load_chains, power_spectrum_posterior
from experiments import command_line
from experiments.curves import print_saved, print_table
from experiments.lensing import compress, summarised

ESTIMATORS = {"NPE": ds.NPE, "NLE": ds.NLE}
STAGES = ("observed", "reference", "spectrum", "compression", "simulations", "summaries", "fits", "given_summaries")


@dataclasses.dataclass(frozen=True)
class Config:
    """`scores`: latent coordinate and number of averaged draws of each kind of score.

    The first `n_scored` simulations of each seed have scores; all `n_reference` of the summaries' own fit have none.
    """

    n_pix: int = 64
    proposal: str = "spectrum"
    widen: float = 1.25
    n: tuple[int, ...] = (25, 50, 100, 200, 400, 600, 1000, 2000)
    n_scored: int = 2000
    seeds: int = 5
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    scores: tuple[tuple[str, int], ...] = (("white", 1), ("whitened", 4))
    n_covariance: int = 400
    n_derivative: int = 50
    n_reference: int = 20_000
    n_samples: int = 2000
    members: int = 4
    ess: float = 2000.0
    n_warmup: int = 200
    n_draws: int = 10_000
    n_chains: int = 4
    seed: int = 0


PRESETS = {
    "smoke": Config(
        16, "spectrum", 1.25, (20,), 20, 1, ("NPE",), (("whitened", 2),), 50, 5, 100, 200, 1, 20, 60, 60, 2
    ),
    "paper": Config(),
    "prior": Config(proposal="prior", seeds=3),
    # The full configuration; the sizes past the scored ones tell how many simulations without scores it takes.
    "large": Config(
        256, n=(50, 100, 200, 400, 1000, 2000), n_scored=200, seeds=4, ess=1000.0, n_reference=8000, members=2
    ),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the table."""
    if cfg.proposal not in ("prior", "spectrum"):
        raise ValueError(f"Expected proposal 'prior' or 'spectrum'; got {cfg.proposal!r}.")
    sim = ds.lsst_y10(n_pix=cfg.n_pix, side_deg=cfg.n_pix * 10 / 256)
    run = start_run(out, {"name": "scores_lensing"} | dataclasses.asdict(cfg), STAGES)
    x = sim.draw(run.key("observed"), 1, sim.fiducial, with_score=False).x[0]
    run.once("reference", lambda folder: _reference(cfg, sim, x, run, folder))
    chain = load_chains(run.path("reference")).flat()
    proposal = None
    if cfg.proposal == "spectrum":
        run.once("spectrum", lambda folder: _spectrum(cfg, sim, x, run, folder))
        proposal = ds.gaussian_proposal(sim, load_chains(run.path("spectrum")).flat(), cfg.widen)
    statistics = summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise)
    sizes = (cfg.n_covariance, cfg.n_derivative)
    run.once("compression", lambda folder: compress(sim, statistics, run.key("compression"), folder, *sizes))
    compression = summaries.ScoreCompression.load(run.path("compression", "compression.npz"))
    observed = compression(statistics(jnp.asarray(x)))

    def summary(x):
        return compression(statistics(x))

    run.once("simulations", lambda folder: _simulate(cfg, sim, summary, proposal, run, folder))
    run.once("summaries", lambda folder: _many(cfg, sim, summary, proposal, run, folder))
    pool, many = load_npz(run.path("simulations", "pool.npz")), load_npz(run.path("summaries", "pool.npz"))
    run.once("given_summaries", lambda folder: _given_summaries(cfg, sim, proposal, many, observed, chain, run, folder))
    references = {"c2st": chain, "c2st_summaries": load_npz(run.path("given_summaries", "samples.npz"))["theta"]}
    rows = []
    for seed, n, kind, name in itertools.product(range(cfg.seeds), cfg.n, [None, *cfg.scores], cfg.estimators):
        if kind is not None and n > cfg.n_scored:
            continue
        path = out / "fits" / f"{name}_{_name(kind)}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            key, arrays = jax.random.fold_in(run.key("fits"), 1000 * seed + n), _rows(cfg, pool, many, seed, n, kind)
            theta = _fit(cfg, sim, ESTIMATORS[name], proposal, arrays, observed, key)
            write_json(path, _distances(theta, references, sim.names, seed))
        rows.append(read_json(path) | dict(estimator=name, score=_name(kind), n=n, seed=seed))
    limit = run.account("given_summaries")
    write_json(out / "distances.json", dict(rows=rows, limit=limit["c2st"]))
    for value, title in (("c2st", "the full field"), ("c2st_summaries", "what the summaries hold")):
        print(f"\nC2ST against {title}, mean and standard error over {cfg.seeds} seeds")
        print_table(rows, ("estimator", "score"), value)
        for name, kind in itertools.product(cfg.estimators, cfg.scores):
            print_saved(rows, {"estimator": name}, _name(kind), value)
    print(f"What the summaries hold against the full field: {limit}")


def _name(kind: tuple[str, int] | None) -> str:
    return "none" if kind is None else f"{kind[0]}_{kind[1]}"


def _reference(cfg: Config, sim, x, run, folder: Path) -> dict:
    settings = dict(until_ess=cfg.ess, n_samples=cfg.n_draws, n_warmup=cfg.n_warmup, n_chains=cfg.n_chains)
    chains = full_field_posterior(sim, x, run.key("reference"), folder=folder / "blocks", progress=True, **settings)
    chains.save(folder)
    return {"gradients": chains.gradients}


def _spectrum(cfg: Config, sim, x, run, folder: Path) -> dict:
    chains = power_spectrum_posterior(sim, x, run.key("spectrum"), progress=True)
    chains.save(folder)
    return {}


def _simulate(cfg: Config, sim, summary, proposal, run, folder: Path) -> dict:
    """Scored simulations, in blocks that an interrupted run keeps."""
    n, size = cfg.seeds * cfg.n_scored, 50
    key_theta, key_draw = jax.random.split(run.key("simulations"))
    theta = (sim.prior if proposal is None else proposal).sample(key_theta, (n,))
    blocks = folder / "blocks"
    blocks.mkdir(exist_ok=True)
    steps = {kind: sim.averaging_steps(key_draw, kind[0]) for kind in cfg.scores if kind[1] > 1}
    parts = []
    for start in range(0, n, size):
        path = blocks / f"{start:06d}.npz"
        if not path.exists():
            print(f"scored simulations: {start} of {n}", flush=True)
            count, part = min(size, n - start), {}
            for kind in cfg.scores:
                options = dict(latents=kind[0], n_average=kind[1], n_steps=steps.get(kind), start=start)
                draws = sim.draw(key_draw, count, theta[start : start + count], **options)
                part[_name(kind)] = np.asarray(draws.score)
            part |= {"theta": np.asarray(draws.theta), "t": np.asarray(jax.lax.map(summary, draws.x))}
            np.savez(path.with_suffix(".part.npz"), **part)
            path.with_suffix(".part.npz").rename(path)
        parts.append(load_npz(path))
    np.savez(folder / "pool.npz", **{name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    return {"simulations": n}


def _many(cfg: Config, sim, summary, proposal, run, folder: Path) -> dict:
    """Summaries of many simulations without scores."""
    key_theta, key_draw = jax.random.split(run.key("summaries"))
    theta = (sim.prior if proposal is None else proposal).sample(key_theta, (cfg.n_reference,))
    t = summarised(sim, summary, key_draw, cfg.n_reference, theta)
    np.savez(folder / "pool.npz", theta=np.asarray(theta), t=t)
    return {"simulations": cfg.n_reference}


def _rows(cfg: Config, pool, many, seed: int, n: int, kind):
    """Parameters, summaries and scores of one seed's first n simulations; past the scored ones, those without."""
    first = slice(seed * cfg.n_scored, seed * cfg.n_scored + min(n, cfg.n_scored))
    theta, t = pool["theta"][first], pool["t"][first]
    if n > cfg.n_scored:
        width = max(cfg.n) - cfg.n_scored
        more = slice(seed * width, seed * width + n - cfg.n_scored)
        theta, t = np.concatenate([theta, many["theta"][more]]), np.concatenate([t, many["t"][more]])
    return theta, t, None if kind is None else pool[_name(kind)][first]


def _fit(cfg: Config, sim, estimator, proposal, arrays, observed, key, n_samples: int | None = None) -> np.ndarray:
    key_fit, key_sample = jax.random.split(key)
    posterior = estimator(sim.prior).append(*arrays, proposal=proposal).fit(key_fit, members=cfg.members)
    return np.asarray(posterior.sample(key_sample, n_samples or cfg.n_samples, observed))


def _given_summaries(cfg: Config, sim, proposal, many, observed, chain, run, folder: Path) -> dict:
    """What the summaries say, from all simulations without scores, and how far NPE is from it."""
    arrays, n = (many["theta"], many["t"], None), 2 * cfg.n_samples
    theta, other = (
        _fit(cfg, sim, e, proposal, arrays, observed, run.key("given_summaries"), n) for e in (ds.NLE, ds.NPE)
    )
    np.savez(folder / "samples.npz", theta=theta)
    account = _distances(theta, {"c2st": chain, "c2st_npe": other}, sim.names, 0)
    return account | {"simulations": cfg.n_reference}


def _distances(theta, references: dict[str, np.ndarray], names, seed: int) -> dict:
    moments = compare_moments(theta, references["c2st"], names)
    distances = {name: c2st(theta, to, seed=seed, duplicates="drop").value for name, to in references.items()}
    shift, width = (np.asarray(a).tolist() for a in (moments.shift, moments.width_ratio))
    return distances | dict(shift=shift, width_ratio=width)


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_lensing")
