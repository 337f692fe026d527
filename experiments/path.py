"""How few gradients does a posterior take that is as good as the full field's? Path sampling against short chains.

One simulated LSST-Y10 map. `path_posterior` takes marginal scores at more and more parameters and fits a log-likelihood
to them: no simulation, no training. Each length and seed is compared by C2ST with the converged full-field chain.
Beside it: chains on (theta, latents) that were stopped early, made smooth by the normal with their draws' moments in
the prior's unconstrained space, and the power-spectrum posterior. A gradient is one of the joint, of one map, burn-in
and warm-up included.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi._files import read_json, write_json, write_npz
from diffsbi.inference.proposals import gaussian_proposal
from diffsbi.sampling import path_posterior
from experiments import command_line
from experiments.curves import print_table
from experiments.lensing import MERITS, MapConfig, about, begin, distances, merits, spectrum_draws

STAGES = ("observed", "reference", "spectrum", "fits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """Lengths: `n_points` of the path, (warm-up, draws) of each of two `chains`; `n_samples` of every posterior."""

    n_points: tuple[int, ...] = (24, 36, 48, 96)
    n_turns: int = 4
    degree: int = 2
    chains: tuple[tuple[int, int], ...] = ((40, 40), (100, 100))
    seeds: int = 5
    n_samples: int = 4000


PRESETS = {
    "smoke": Config(
        n_pix=16, n_points=(24,), chains=((20, 20),), seeds=1, n_samples=200, ess=20, n_warmup=20, n_draws=40,
        n_chains=2, n_spectrum=40,
    ),
    "paper": Config(),
    "large": Config(n_pix=256, ess=1000.0),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the tables."""
    if cfg.seeds < 1 or not cfg.n_points or min(cfg.n_points) < 24:
        raise ValueError(f"Expected seeds >= 1 and n_points >= 24; got {cfg.seeds} and {cfg.n_points}.")
    sim, run, x, chain = begin(cfg, "path", out, STAGES)
    spectrum = spectrum_draws(cfg, sim, x, run)
    (out / "fits").mkdir(exist_ok=True)
    rows = []
    for seed in range(cfg.seeds):
        key = jax.random.fold_in(run.key("fits"), seed)
        for n in cfg.n_points:
            rows.append(_row(out, "path", n, seed, chain, sim, lambda n=n, key=key: _path(cfg, sim, x, key, n, out)))
        for lengths in cfg.chains:
            rows.append(
                _row(out, "chains", sum(lengths), seed, chain, sim, lambda w=lengths, k=key: _chains(cfg, sim, x, k, w))
            )
    limit = distances(spectrum, {"c2st": chain}, sim.names, 0) | merits(spectrum, chain, sim.names)
    write_json(out / "distances.json", dict(rows=rows, spectrum=limit["c2st"], n_pix=cfg.n_pix, **about(sim)))
    for value, title in ({"gradients": "Gradients", "c2st": "C2ST against the full field"} | MERITS).items():
        print(f"\n{title}, mean and standard error over {cfg.seeds} seeds (n: points, or transitions of a chain)")
        print_table(rows, ("method",), value, 0 if value == "gradients" else 3)
    print(f"The power-spectrum posterior: {limit}")


def _row(out: Path, method: str, n: int, seed: int, chain, sim, make) -> dict:
    """What one posterior comes to; kept, with its draws, once it is done."""
    path = out / "fits" / f"{method}_{n}_{seed}.json"
    if not path.exists():
        print(path.stem, flush=True)
        theta, account = make()
        write_npz(path.with_suffix(".npz"), {"theta": np.asarray(theta)})
        write_json(path, account | distances(theta, {"c2st": chain}, sim.names, seed) | merits(theta, chain, sim.names))
    return read_json(path) | dict(method=method, n=n, seed=seed)


def _path(cfg: Config, sim, x, key, n: int, out: Path):
    """The first n points of the seed's path: longer ones go on from where shorter ones ended."""
    name = "-".join(str(part) for part in np.asarray(jax.random.key_data(key)))
    settings = dict(n_turns=cfg.n_turns, degree=cfg.degree, until_error=None, folder=out / "paths" / name)
    found = path_posterior(sim, x, key, n_points=n, progress=True, **settings)
    theta = np.asarray(found.sample(jax.random.fold_in(key, n), cfg.n_samples))
    return theta, dict(gradients=found.gradients, error=found.error, acceptance=float(found.acceptance.mean()))


def _chains(cfg: Config, sim, x, key, lengths: tuple[int, int]):
    n_warmup, n_samples = lengths
    settings = dict(n_chains=2, n_warmup=n_warmup, n_samples=n_samples, progress=True)
    found = ds.full_field_posterior(sim, x, jax.random.fold_in(key, n_warmup), **settings)
    smooth = gaussian_proposal(sim, found.flat(), 1.0)
    return np.asarray(smooth.sample(key, (cfg.n_samples,))), dict(gradients=found.gradients)


if __name__ == "__main__":
    command_line(main, PRESETS, "path")
