"""Is path sampling calibrated? Ranks and TARP over maps whose parameters come from the prior.

One path on each simulated LSST-Y10 map, from the default start, as a user would call it. Besides the p-values the table
has the standard deviation of (truth - mean) / sd, one for a calibrated normal posterior and more for one too narrow,
and what the fit itself states as its largest error.
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi._files import write_json
from diffsbi.runs import start_run
from diffsbi.sampling import path_posterior
from experiments import command_line
from experiments.lensing import calibration, in_blocks

BLOCK = 10
ACCOUNT = ("gradients", "stated", "acceptance")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """`n` maps of side `n_pix`; a posterior of `n_samples` draws after each of the `n_points` of one path."""

    n_pix: int = 64
    n: int = 500
    n_points: tuple[int, ...] = (24, 48, 96)
    n_turns: int = 4
    degree: int = 2
    n_samples: int = 200
    seed: int = 0


PRESETS = {
    "smoke": Config(n_pix=16, n=8, n_points=(24,), n_samples=50),
    "paper": Config(),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `coverage.json`, print the table."""
    if cfg.n < 2 or cfg.n_samples < 1 or not cfg.n_points or min(cfg.n_points) < 24:
        raise ValueError(
            f"Expected n >= 2, n_samples >= 1 and n_points >= 24; got {cfg.n}, {cfg.n_samples} and {cfg.n_points}."
        )
    sim = ds.lsst_y10(n_pix=cfg.n_pix, side_deg=cfg.n_pix * 10 / 256)
    run = start_run(out, {"name": "path_coverage"} | dataclasses.asdict(cfg), ("theta", "paths"))
    theta = sim.prior.sample(run.key("theta"), (cfg.n,))

    def make(start: int, count: int) -> dict:
        keys = [jax.random.fold_in(run.key("paths"), i) for i in range(start, start + count)]
        rows = [_posteriors(cfg, sim, *pair) for pair in zip(theta[start : start + count], keys, strict=True)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    found = in_blocks("maps", cfg.n, BLOCK, make, out / "blocks")
    cases = [_calibration(found, np.asarray(theta), k) | dict(n=n) for k, n in enumerate(cfg.n_points)]
    print(f"\n{cfg.n} maps of parameters from the prior; p-values of TARP, and of the ranks of {sim.names}")
    for case in cases:
        ranks, spread = (" ".join(f"{p:.3f}" for p in case[name]) for name in ("rank_p_values", "spread"))
        print(f"{case['n']} points, {case['gradients']:.0f} gradients, failed {case['failed']}, stated error ", end="")
        print(f"{case['stated']:.2f}: {case['tarp_p_value']:.3f}; {ranks}")
        print(f"  (truth - mean) / sd: {spread} (± {case['spread_error']:.3f})")
    write_json(out / "coverage.json", dict(cases=cases, names=sim.names, n_pix=cfg.n_pix))


def _posteriors(cfg: Config, sim, theta, key) -> dict[str, np.ndarray]:
    """Draws, gradients and stated error after each length of one map's path; NaN where it fails."""
    key_x, key_path, key_draw = jax.random.split(key, 3)
    x = sim.draw(key_x, 1, theta, with_score=False).x[0]
    draws = np.full((len(cfg.n_points), cfg.n_samples, sim.prior.dim), np.nan)
    account = np.full((len(cfg.n_points), len(ACCOUNT)), np.nan)
    with tempfile.TemporaryDirectory() as folder:  # longer paths go on from where shorter ones ended
        settings = dict(n_turns=cfg.n_turns, degree=cfg.degree, until_error=None, folder=Path(folder, "path"))
        for k, n in enumerate(cfg.n_points):
            try:
                found = path_posterior(sim, x, key_path, n_points=n, **settings)
                draws[k] = found.sample(key_draw, cfg.n_samples)
            except RuntimeError as error:  # a path that cannot be had is part of the answer
                print(f"{n} points at {np.asarray(theta).round(3).tolist()}: {error}", flush=True)
                break
            account[k] = found.gradients, found.error, found.acceptance.mean()
    return dict(draws=draws, account=account)


def _calibration(found: dict, theta: np.ndarray, k: int) -> dict:
    """Ranks, TARP and the spread of the truths about the means, of the maps whose path did not fail."""
    draws, account = found["draws"][:, k], found["account"][:, k]
    good = np.isfinite(draws).all((1, 2))
    if good.sum() < 2:
        raise RuntimeError(f"Expected two paths at least to compare; {len(good) - good.sum()} of {len(good)} failed.")
    draws, theta, account = draws[good], theta[good], account[good]
    z = (theta - draws.mean(1)) / draws.std(1, ddof=1)
    return dict(
        failed=int((~good).sum()), spread=z.std(0).tolist(), spread_error=float(1 / np.sqrt(2 * len(theta))),
        **dict(zip(ACCOUNT, account.mean(0).tolist(), strict=True)), **calibration(draws, theta),
    )  # fmt: skip


if __name__ == "__main__":
    command_line(main, PRESETS, "path_coverage")
