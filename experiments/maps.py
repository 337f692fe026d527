"""Do the maps have the spectra they should have? One realisation with and without noise, and the power of many."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi.bands import Bands
from diffsbi.observation import band_spectra
from diffsbi.runs import start_run
from experiments import command_line


@dataclasses.dataclass(frozen=True)
class Config:
    n_pix: int = 256
    side_deg: float = 10.0
    n_maps: int = 200
    n_bands: int = 12
    seed: int = 0


PRESETS = {"smoke": Config(n_pix=64, side_deg=5.0, n_maps=20), "paper": Config()}


def main(cfg: Config, out: Path) -> None:
    run = start_run(out, {"name": "maps"} | dataclasses.asdict(cfg), ("maps", "power"))
    run.once("maps", lambda folder: _maps(cfg, run, folder))
    run.once("power", lambda folder: _power(cfg, run, folder))


def _maps(cfg: Config, run, folder: Path) -> dict:
    sim = ds.lsst_y10(n_pix=cfg.n_pix, side_deg=cfg.side_deg)
    draws = sim.draw(run.key("maps"), 1, sim.fiducial, with_score=False, keep_latents=True)
    signal = jax.jit(lambda z: sim.convergence(sim.fiducial, z))(draws.latents[0])
    np.savez(folder / "maps.npz", maps=np.stack([signal, draws.x[0]]))
    return {"simulations": 1}


def _power(cfg: Config, run, folder: Path) -> dict:
    """Mean band powers of noiseless maps, its standard error, and theory averaged over the same modes."""
    sim = ds.lsst_y10(n_pix=cfg.n_pix, side_deg=cfg.side_deg)
    bands = Bands(cfg.n_pix, cfg.side_deg, cfg.n_bands)

    @jax.jit
    def power(key):
        _, z, _ = sim.draw_one(key, sim.fiducial)
        return bands(sim.convergence(sim.fiducial, z))

    powers = np.stack([power(jax.random.fold_in(run.key("power"), i)) for i in range(cfg.n_maps)]).astype(float)
    spectra = band_spectra(sim, np.zeros((sim.n_bins, cfg.n_pix, cfg.n_pix), np.float32), sim.fiducial, cfg.n_bands)
    auto = np.array([spectra["noise"][i] if i == j else 0.0 for i, j in sim.pairs])[:, None]
    error = powers.std(0, ddof=1) / np.sqrt(cfg.n_maps)
    measured = {"measured": powers.mean(0), "theory": spectra["theory"] - auto, "scatter": error}
    np.savez(folder / "spectra.npz", **(spectra | measured))
    return {"simulations": cfg.n_maps}


if __name__ == "__main__":
    command_line(main, PRESETS, "maps")
