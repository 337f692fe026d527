r"""How noisy is a score, in which coordinate, and what does averaging over the latents cost?

With N the covariance of the score's noise about the marginal score, C the posterior covariance of a converged chain at
the fiducial and $F = C^{-1} -$ prior precision, the figure is noise over information, tr(CN) / tr(CF).
The marginal score of a simulation is estimated twice, from two long chains of its latents: their own noise drops out of
$(s - \bar s_a)(s - \bar s_b)^T$, but for the states near the one that all of them start at, some per cent.
"""

import dataclasses
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffsbi as ds
from diffsbi._files import load_npz, write_json, write_npz
from diffsbi.runs import start_run
from diffsbi.sampling import load_chains
from diffsbi.simulators.averaging import average_score
from experiments import command_line, sampling


@dataclasses.dataclass(frozen=True)
class Config:
    """Simulations at the fiducial for each size; `reference` states in each of the two long chains.

    `repeats`: averages of each kind that a simulation is given, each with its own momenta: the noise is their mean.
    """

    n_pix: tuple[int, ...] = (64, 256)
    n: tuple[int, ...] = (200, 60)
    averages: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16)
    repeats: int = 4
    reference: int = 256
    chains: sampling.Config = dataclasses.field(default_factory=lambda: sampling.PRESETS["paper"])
    seed: int = 0


PRESETS = {
    "smoke": Config((16,), (12,), (1, 2, 4), 2, 8, sampling.PRESETS["smoke"]),
    "paper": Config(),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `noise.json`, print the table."""
    start_run(out, {"name": "score_noise"} | dataclasses.asdict(cfg), ())
    rows = [row for n_pix, n in zip(cfg.n_pix, cfg.n, strict=True) for row in measure(cfg, n_pix, n, out)]
    write_json(out / "noise.json", dict(rows=rows))
    print(f"\n{'map':>6}  {'latents':10}{'averaged':>9}{'gradients':>10}{'ms':>7}   noise / information")
    for row in rows:
        print(
            f"{row['n_pix']:5}²  {row['latents']:10}{row['n_average']:9}{row['gradients']:10}{row['ms']:7.0f}"
            f"   {row['ratio']:.3f} ± {row['error']:.3f}"
        )


def measure(cfg: Config, n_pix: int, n: int, out: Path) -> list[dict]:
    """Noise over information of every coordinate and average at one size."""
    sim = ds.lsst_y10(n_pix=n_pix, side_deg=n_pix * 10 / 256)
    sampling.measure(cfg.chains, n_pix, sampling.REFERENCE, out.parent / "sampling")
    chains = load_chains(sampling.folder_of(out.parent / "sampling", n_pix, sampling.REFERENCE))
    covariance = np.cov(chains.flat().T)
    spread = np.asarray(sim.prior.sample(jax.random.key(0), (100_000,))).std(0)
    information = sim.prior.dim - np.trace(covariance / spread**2)
    key = jax.random.fold_in(jax.random.key(cfg.seed), n_pix)
    n_steps = sim.averaging_steps(key, "whitened")
    scores = [_simulation(cfg, sim, key, i, n_steps, out / f"{n_pix}_{i}.npz") for i in range(n)]
    rows = []
    for name in [name for name in scores[0] if name.startswith(("white_", "whitened_"))]:
        latents, k = name.split("_")
        # Of which the mean is tr(C N).
        noise = np.array([_product(s[name] - s["long_a"], s[name] - s["long_b"], covariance) for s in scores])
        rows.append(
            dict(
                n_pix=n_pix, latents=latents, n_average=int(k), gradients=2 * int(k) - 1, n=n,
                ratio=noise.mean() / information, error=noise.std(ddof=1) / np.sqrt(n) / information,
                ms=float(np.median([s[f"ms_{name}"] for s in scores])),
            )
        )  # fmt: skip
    return rows


def _product(a, b, covariance) -> float:
    """a C b, the mean over repeats."""
    return np.mean(np.sum(a @ covariance * b, -1))


def _simulation(cfg: Config, sim, key, i: int, n_steps: int, path: Path) -> dict[str, np.ndarray]:
    """Scores of one simulation at the fiducial, from its file if they were computed."""
    if not path.exists():
        print(f"{sim.n_pix}²: simulation {i}", flush=True)
        key_draw, *keys = jax.random.split(jax.random.fold_in(key, i), 3 + len(cfg.averages))
        z, x = _draw(sim, key_draw)
        made: dict[str, np.ndarray] = {}
        for latents in ("white", "whitened"):
            made[f"{latents}_1"], made[f"ms_{latents}_1"] = _timed(_score, sim, z, x, latents)
        long = jnp.asarray(cfg.reference)
        for name, k, one in zip(("long_a", "long_b"), (long, long), keys, strict=False):
            made[name], _ = _timed(_averaged, sim, z, x, one, k, jnp.asarray(n_steps))
        for k, one in zip(cfg.averages, keys[2:], strict=True):
            if k == 1:
                continue
            counts = jnp.asarray(k), jnp.asarray(n_steps)
            repeats = [_timed(_averaged, sim, z, x, key, *counts) for key in jax.random.split(one, cfg.repeats)]
            made[f"whitened_{k}"] = np.stack([score for score, _ in repeats])
            made[f"ms_whitened_{k}"] = np.median([ms for _, ms in repeats])
        write_npz(path, made)
    return load_npz(path)


def _timed(function, *arguments) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    value = np.asarray(jax.block_until_ready(function(*arguments)), float)
    return value, 1e3 * (time.perf_counter() - start)


@eqx.filter_jit
def _draw(sim, key):
    return sim.draw_one(key, sim.fiducial)[1:]


@eqx.filter_jit
def _score(sim, z, x, latents):
    return sim.score(sim.fiducial, z, x, latents=latents)


@eqx.filter_jit
def _averaged(sim, z, x, key, k, n_steps):
    return average_score(sim, sim.fiducial, z, x, key, latents="whitened", n_average=k, n_steps=n_steps)[0]


if __name__ == "__main__":
    command_line(main, PRESETS, "score_noise")
