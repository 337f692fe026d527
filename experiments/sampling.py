"""What does an effective sample of the full field cost? Samplers and latent coordinates, and the size of the map.

`make bench-sampling` runs it and prints the table. Every chain starts overdispersed, without the truth. Cost is counted
in gradients of the joint, the worst parameter's, over the kept draws; the exact chains of one map are also compared
with each other, and those that are not exact with the reference: bias in units of the posterior's width.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi.diagnostics import compare_moments
from diffsbi.sampling import Chains, full_field_posterior, load_chains
from experiments import command_line

PUBLISHED = {"omega_c": 782.0, "omega_b": 106.0, "sigma_8": 1145.0, "h_0": 148.0, "n_s": 281.0, "w_0": 861.0}
"""NumPyro NUTS in white latents, started at the true ones: gradients per effective sample recomputed from the chains of
Zeghal et al. 2024, arXiv:2409.17975."""

REFERENCE = "HMC about a normal, whitened"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: dict(sampler="hmc"),
    "HMC leapfrog, whitened": dict(sampler="hmc", integrator="leapfrog", step_size=0.1),
    "NUTS, whitened": dict(sampler="nuts"),
    "MCLMC adjusted, whitened": dict(sampler="mclmc"),
    # Hundreds of gradients a draw: few draws, so a small effective sample size and a rough cost.
    "HMC about a normal, white": dict(sampler="hmc", latents="white", n_samples=200, n_warmup=100),
    "NUTS, white": dict(sampler="nuts", latents="white", n_samples=200, n_warmup=100),
    "MCLMC unadjusted, 1e-4": dict(sampler="mclmc_unadjusted", energy_variance=1e-4),
    "MCLMC unadjusted, 1e-6": dict(sampler="mclmc_unadjusted", energy_variance=1e-6),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes at a fixed pixel scale of 2.34 arcmin; every chain stops at `ess`, or after `draws` transitions."""

    variants_at: tuple[int, ...] = (64,)
    sizes: tuple[int, ...] = (32, 64, 128, 256)
    variants: tuple[str, ...] = tuple(VARIANTS)
    ess: float = 400.0
    draws: int = 1500
    n_warmup: int = 200
    n_chains: int = 4
    seed: int = 0


PRESETS = {
    "smoke": Config((16,), (16, 32), (REFERENCE, "NUTS, whitened"), ess=30, draws=100, n_warmup=60, n_chains=2),
    "paper": Config(),
    "large": Config(variants_at=(256,), sizes=(32, 64, 128, 256)),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `costs.json`, print the table."""
    rows = [measure(cfg, n_pix, name, out) for n_pix in cfg.variants_at for name in cfg.variants]
    rows += [measure(cfg, n_pix, REFERENCE, out) for n_pix in cfg.sizes if n_pix not in cfg.variants_at]
    amplitude, exponent = fit(rows, cfg.sizes)
    write_json(
        out / "costs.json",
        dict(rows=rows, reference=REFERENCE, published=PUBLISHED, amplitude=amplitude, exponent=exponent),
    )
    print_table(rows, exponent)


def measure(cfg: Config, n_pix: int, name: str, out: Path) -> dict:
    """One sampler on one simulated map, from its folder if it was done."""
    folder = folder_of(out, n_pix, name)
    if not (folder / "row.json").exists():
        sim, x = observed(cfg, n_pix)
        key = jax.random.fold_in(jax.random.key(cfg.seed), n_pix)
        settings = dict(until_ess=cfg.ess, n_samples=cfg.draws, n_warmup=cfg.n_warmup, n_chains=cfg.n_chains)
        print(f"{n_pix}² × 5: {name}", flush=True)
        start = time.monotonic()
        chains = full_field_posterior(
            sim, x, key, folder=folder / "blocks", progress=True, **(settings | VARIANTS[name])
        )
        chains.save(folder)
        row = dict(account(chains), name=name, n_pix=n_pix, seconds=time.monotonic() - start)
        write_json(folder / "row.json", row)
    row = read_json(folder / "row.json")
    reference = folder_of(out, n_pix, REFERENCE)
    return row | (bias(load_chains(folder), load_chains(reference)) if name != REFERENCE else {})


def observed(cfg: Config, n_pix: int) -> tuple[ds.LensingMaps, jax.Array]:
    """The survey of one size and the map that all chains are given, drawn at the fiducial."""
    sim = ds.lsst_y10(n_pix=n_pix, side_deg=n_pix * 10 / 256)
    key = jax.random.fold_in(jax.random.key(cfg.seed), n_pix)
    return sim, sim.draw(key, 1, sim.fiducial, with_score=False).x[0]


def folder_of(out: Path, n_pix: int, name: str) -> Path:
    """The folder of one row."""
    return out / f"{n_pix}_{name.replace(', ', '_').replace(' ', '_')}"


def account(chains: Chains) -> dict:
    """Cost and convergence of chains, as JSON values."""
    summary = chains.summary()
    return dict(
        cost=chains.gradients_per_effective_sample(),
        gradients=chains.gradients,
        ess=min(row.ess_bulk for row in summary.values()),
        rhat=max(row.rhat for row in summary.values()),
        step_size=float(chains.step_size.mean()),
        divergences=chains.n_diverging,
    )


def bias(chains: Chains, reference: Chains) -> dict:
    """Shift of the means in posterior widths and ratio of the widths, the worst parameter's, with standard errors."""
    ess = [np.array([row.ess_bulk for row in c.summary().values()]) for c in (chains, reference)]
    moments = compare_moments(chains.flat(), reference.flat(), chains.names, ess_a=ess[0], ess_b=ess[1])
    worst = int(np.argmax(np.abs(moments.shift)))
    width = int(np.argmax(np.abs(np.log(moments.width_ratio))))
    return dict(
        shift=float(moments.shift[worst]),
        shift_error=float(moments.shift_error[worst]),
        shift_of=chains.names[worst],
        width=float(moments.width_ratio[width]),
        width_error=float(moments.width_error[width]),
    )


def fit(rows: list[dict], sizes) -> tuple[float, float]:
    """Amplitude and exponent of cost ∝ d^b, d the number of latents, by least squares in logarithms."""
    costs = {row["n_pix"]: max(row["cost"].values()) for row in rows if row["name"] == REFERENCE}
    latents = np.log([5.0 * n**2 for n in sizes])
    exponent, intercept = np.polyfit(latents, np.log([costs[n] for n in sizes]), 1)
    return float(np.exp(intercept)), float(exponent)


def print_table(rows: list[dict], exponent: float) -> None:
    print(f"\n{'':34}{'map':>6}{'grad/ESS':>10}{'ESS':>7}{'R-hat':>7}{'s/ESS':>8}   worst shift, width vs reference")
    print(f"{'NUTS, white, started at the truth*':34}{'256²':>6}{max(PUBLISHED.values()):10.0f}")
    for row in rows:
        against = "   not converged" if row["rhat"] > 1.05 else ""
        if "shift" in row and not against:
            against = f"   {row['shift']:+.2f} ± {row['shift_error']:.2f} σ ({row['shift_of']}), "
            against += f"{row['width']:.2f} ± {row['width_error']:.2f}"
        size, cost = f"{row['n_pix']}²", max(row["cost"].values())
        print(
            f"{row['name']:34}{size:>6}{cost:10.1f}{row['ess']:7.0f}{row['rhat']:7.3f}"
            f"{row['seconds'] / row['ess']:8.2f}{against}"
        )
    print(f"* published (arXiv:2409.17975). Reference: cost grows as (number of latents)^{exponent:.2f}")


if __name__ == "__main__":
    command_line(main, PRESETS, "sampling")
