"""Which wrong simulators does one lensing map give away, before any inference?

Simulations are drawn from the prior with the simulator's own log-normal shift and shape noise. Observations at the
fiducial come from simulators with other ones. Each is tested by its distance among all statistics, and by its
distance and its trained density among their score compression. What a wrong simulator shares with other parameters of
the right one no such test can see.
"""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from tqdm.auto import tqdm

import diffsbi as ds
from diffsbi import summaries
from diffsbi._files import load_npz, write_json
from diffsbi.diagnostics import misspecification
from diffsbi.inference import fit_novelty
from diffsbi.runs import start_run
from experiments import command_line
from experiments.lensing import compress, summarised

TESTS = ("all statistics", "compressed", "compressed, density")
STREAMS = ("compression", "simulations", "observed", "density")


@dataclasses.dataclass(frozen=True)
class Config:
    """`wrong`: factors of the log-normal shifts and of the shape noise of each kind of observation."""

    n_pix: int = 64
    n_bands: int = 12
    wrong: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.5, 1.0), (3.0, 1.0), (1.0, 1.1), (1.0, 1.2))
    n: int = 3000
    n_observed: int = 40
    n_covariance: int = 600
    n_derivative: int = 50
    members: int = 2
    level: float = 0.05
    seed: int = 0


PRESETS = {
    "smoke": Config(16, 3, ((1.0, 1.0), (1.5, 1.0), (1.0, 2.0)), 200, 6, 60, 5, 1),
    "paper": Config(),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `flagged.json`, print the table."""
    sim = simulator(cfg)
    run = start_run(out, {"name": "misspecified"} | dataclasses.asdict(cfg), STREAMS)
    statistics = summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise, cfg.n_bands)
    sizes = (cfg.n_covariance, cfg.n_derivative)
    run.once("compression", lambda folder: compress(sim, statistics, run.key("compression"), folder, *sizes))
    run.once("simulations", lambda folder: _simulate(cfg, sim, statistics, run, folder))
    compression = summaries.ScoreCompression.load(run.path("compression", "compression.npz"))
    made = load_npz(run.path("simulations", "statistics.npz"))
    t = {name: np.asarray(compression(s)) for name, s in made.items()}
    score, held_out = fit_novelty(run.key("density"), t["simulated"], members=cfg.members)
    rows = []
    for i, (shift, noise) in enumerate(cfg.wrong):
        found = [
            _tests(cfg, statistics, made["simulated"], s, held_out, c, score)
            for s, c in zip(tqdm(made[f"observed_{i}"], desc=f"observations {i}"), t[f"observed_{i}"], strict=True)
        ]
        flagged = {name: [result[name].misspecified for result in found] for name in TESTS}
        share = {name: float(np.mean(values)) for name, values in flagged.items()}
        error = {name: float(np.std(values) / np.sqrt(len(values))) for name, values in flagged.items()}
        rows.append(dict(shift=shift, noise=noise, share=share, error=error, warning=found[0][TESTS[0]].warning))
    write_json(out / "flagged.json", dict(rows=rows, level=cfg.level))
    print_table(cfg, rows)


def simulator(cfg: Config, shift: float = 1.0, noise: float = 1.0):
    """The survey; with `shift` times the fiducial's log-normal shifts (at all parameters) unless it is 1."""
    survey = dict(n_pix=cfg.n_pix, side_deg=cfg.n_pix * 10 / 256)
    right = ds.lsst_y10(**survey)
    options = {} if noise == 1.0 else {"sigma_e": 0.26 * noise}
    if shift != 1.0:
        own = eqx.filter_jit(lambda sim, theta: sim.shift(theta))(right, right.fiducial)
        options["shift"] = (shift * np.asarray(own, float)).tolist()
    return ds.lsst_y10(**survey, **options) if options else right


def _simulate(cfg: Config, sim, statistics, run, folder: Path) -> dict:
    rows = jax.jit(lambda x: jax.lax.map(statistics, x))
    made = {"simulated": summarised(sim, rows, run.key("simulations"), cfg.n)}
    for i, (shift, noise) in enumerate(cfg.wrong):
        key = jax.random.fold_in(run.key("observed"), i)
        made[f"observed_{i}"] = summarised(simulator(cfg, shift, noise), rows, key, cfg.n_observed, sim.fiducial)
    np.savez(folder / "statistics.npz", **made)
    return {"simulations": cfg.n + len(cfg.wrong) * cfg.n_observed}


def _tests(cfg: Config, statistics, simulated, observed, held_out, compressed, score) -> dict:
    return {
        "all statistics": misspecification(simulated, observed, names=statistics.names, level=cfg.level),
        "compressed": misspecification(held_out, compressed, level=cfg.level),
        "compressed, density": misspecification(held_out, compressed, level=cfg.level, score=score),
    }


def print_table(cfg: Config, rows: list[dict]) -> None:
    print(f"\nShare of {cfg.n_observed} observations called misspecified at level {cfg.level:g}")
    print(f"{'shift':>7}{'noise':>7}" + "".join(f"{name:>22}" for name in TESTS))
    for row in rows:
        values = "".join(f"{row['share'][name]:>14.2f} ± {row['error'][name]:.2f} " for name in TESTS)
        print(f"{row['shift']:>7g}{row['noise']:>7g}{values}")


if __name__ == "__main__":
    command_line(main, PRESETS, "misspecified")
