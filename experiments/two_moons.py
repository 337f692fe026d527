"""What does smoothness buy? A smooth flow and a spline flow fitted to draws and scores of the two-moons density."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._files import write_npz
from diffsbi.inference import NPE
from diffsbi.runs import start_run
from diffsbi.simulators.two_moons import two_moons
from experiments import command_line

DENSITIES = ("smooth", "spline")


@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 1000
    layers: int = 4
    width: int = 64
    depth: int = 2
    max_epochs: int = 625  # 5 000 steps of 128 rows
    n_grid: int = 300
    cut: float = 0.6
    seed: int = 0


PRESETS = {"smoke": Config(n=100, max_epochs=30, n_grid=80), "paper": Config()}


def main(cfg: Config, out: Path) -> None:
    run = start_run(out, {"name": "two_moons"} | dataclasses.asdict(cfg), ("draws", *DENSITIES))
    run.once("exact", lambda folder: _exact(cfg, folder))
    for density in DENSITIES:
        run.once(density, lambda folder, density=density: _fit(cfg, run, density, folder))


def tabulated(log_density, score, n: int, cut: float) -> dict[str, np.ndarray]:
    """A log-density on a grid over both moons `(n, n)`, and its score's first component on a line across one of them.

    With the points: "grid" `(n, n, 2)` and "line" `(20 n, 2)`, at the height `cut`.
    """
    grid = np.stack(np.meshgrid(np.linspace(0.2, 0.9, n), np.linspace(0.3, 0.7, n)), -1)
    line = np.linspace(0.25, 0.65, 20 * n)
    line = np.stack([line, np.full_like(line, cut)], -1)
    values = np.asarray(jax.lax.map(log_density, jnp.asarray(grid)))
    return dict(grid=grid, line=line, log_density=values, score=np.asarray(score(jnp.asarray(line)))[:, 0])


def _exact(cfg: Config, folder: Path) -> dict:
    target = two_moons()
    write_npz(folder / "density.npz", tabulated(target.log_density, target.density_score, cfg.n_grid, cfg.cut))
    return {}


def _fit(cfg: Config, run, density: str, folder: Path) -> dict:
    target = two_moons()
    theta = target.sample(run.key("draws"), cfg.n)
    x = np.zeros((cfg.n, 1))  # there is no data: every row has the same condition
    options = {"layers": cfg.layers, "width": cfg.width, "depth": cfg.depth}
    options |= {"ramps": 16} if density == "smooth" else {}
    npe = NPE(target.prior, density, density_options=options, force_scores=True).append(
        theta, x, target.density_score(theta)
    )
    # A density with thin curved ridges, not a posterior: nothing should pull it towards a normal one.
    settings = {"members": 1, "batch_size": 128, "patience": 200, "weight_decay": 0.0, "max_epochs": cfg.max_epochs}
    posterior = npe.fit(run.key(density), progress=True, **settings).condition(jnp.zeros(1))
    write_npz(folder / "density.npz", tabulated(posterior.log_prob, posterior.score, cfg.n_grid, cfg.cut))
    return {"simulations": cfg.n, "stop_reason": posterior.history.stop_reason}


if __name__ == "__main__":
    command_line(main, PRESETS, "two_moons")
