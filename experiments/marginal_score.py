"""How near does the score of one map, averaged over a chain on its latents, come to losing nothing, at what cost?

Maps of parameters from the power-spectrum posterior of one simulated LSST-Y10 map are made into numbers without any
training: the score at the centre at xi = 0 and after each of a few steps of ascent (`LatentScores`), and its mean over
a chain of more and more turns (`MarginalScore`). What they lose is told by a linear regression of the parameters on
them, and one on them and their products: residuals against the width of the map's converged full-field chain.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from diffsbi._files import load_npz, write_json, write_npz
from diffsbi.compression import LatentScores, MarginalScore
from experiments import command_line
from experiments.lensing import MapConfig, begin, in_blocks, lost, spectrum_proposal

STAGES = ("observed", "reference", "spectrum", "numbers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """`n` simulations; `turns`: lengths of the chain, the first `burn` turns of which do not count."""

    n: int = 600
    turns: tuple[int, ...] = (4, 6, 12, 24)
    burn: int = 3
    n_steps: int = 4


PRESETS = {
    "smoke": Config(n_pix=16, n=60, turns=(4, 6), ess=20, n_warmup=20, n_draws=40, n_chains=2, n_spectrum=10),
    "paper": Config(),
    "large": Config(n_pix=256, n=300, ess=1000.0),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `lost.json`, print the table."""
    if not 0 <= cfg.burn < min(cfg.turns, default=0):
        raise ValueError(f"Expected turns, each more than burn; got {cfg.turns} and burn={cfg.burn}.")
    sim, run, x, chain = begin(cfg, "marginal_score", out, STAGES)
    proposal = spectrum_proposal(cfg, sim, x, run)
    run.once("numbers", lambda folder: _numbers(cfg, sim, proposal, run, folder))
    pool = load_npz(run.path("numbers", "pool.npz"))
    numbers = {("ascent", k + 1): pool["ascent"][:, k] for k in range(pool["ascent"].shape[1])}
    numbers |= {("chain", cfg.n_steps * n + 1): np.nanmean(pool["turns"][:, cfg.burn : n], 1) for n in cfg.turns}
    rows = []
    print("Lost: log of the residuals' widths and volume over the full field's, by regression on the numbers' terms")
    for (kind, gradients), t in numbers.items():
        for terms, design in (("linear", t), ("quadratic", _quadratic(t))):
            found = lost(pool["theta"], design, chain, proposal)
            rows.append(dict(kind=kind, gradients=gradients, terms=terms) | found)
            told = [f"{found[name]:7.3f} ± {found[f'{name}_error']:.3f}" for name in ("widths", "volume")]
            print(f"{kind:8}{gradients:5} gradients  {terms:10}", *told)
    write_json(out / "lost.json", dict(rows=rows, n_pix=cfg.n_pix, n=cfg.n))


def _quadratic(t: np.ndarray) -> np.ndarray:
    """The numbers and their products, of about unit size."""
    t = (t - t.mean(0)) / t.std(0)
    i, j = np.triu_indices(t.shape[1])
    return np.concatenate([t, t[:, i] * t[:, j]], 1)


def _numbers(cfg: Config, sim, proposal, run, folder: Path) -> dict:
    """Scores of every simulation, by points of ascent and by turns of the chain, in blocks that are kept."""
    key_theta, key_draw = jax.random.split(run.key("numbers"))
    theta = proposal.sample(key_theta, (cfg.n,))
    centre = sim.prior.from_unconstrained(proposal.loc)
    ascent = LatentScores(sim, centre)
    chain = MarginalScore(sim, centre, n_turns=max(cfg.turns), n_burn=cfg.burn, n_steps=cfg.n_steps)

    def make(start: int, count: int) -> dict:
        rows = theta[start : start + count]
        x = sim.draw(key_draw, count, rows, with_score=False, start=start).x
        points = ascent.many(x).reshape(count, -1, sim.prior.dim)
        return {"theta": rows, "ascent": points, "turns": np.stack([chain.turns(row) for row in x])}

    write_npz(folder / "pool.npz", in_blocks("numbers of simulations", cfg.n, 50, make, folder / "blocks"))
    return {"simulations": cfg.n}


if __name__ == "__main__":
    command_line(main, PRESETS, "marginal_score")
