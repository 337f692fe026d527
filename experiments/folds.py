r"""Why do scores teach likelihoods of the benchmark's two moons so little? NLE with the fold of that task and without.

Its data depend on $|\theta_1 + \theta_2|$, so the score changes sign where that sum does, and they end abruptly at both
ends of a half circle. Smooth flows have neither. Each can be taken away; compared is $\langle\log p - \log q\rangle$
over simulations that no fit has seen, by pairs of the same simulations.
"""

import dataclasses
import itertools
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Beta, Distribution

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi._types import Array, Float
from diffsbi.runs import start_run
from experiments import command_line
from experiments.curves import print_table, standard_error
from experiments.sbibm_simulators import TASKS, HalfRing, TwoMoons

CASES = tuple(itertools.product((True, False), ("sharp", "smooth")))


@dataclasses.dataclass(frozen=True)
class Config:
    """`seeds` sets of `n` simulations each."""

    n: int = 1000
    n_test: int = 3000
    seeds: int = 5
    members: int = 2
    max_epochs: int | None = None
    seed: int = 0


PRESETS = {"smoke": Config(60, 100, 1, 1, 3), "paper": Config()}


class SmoothHalfRing(HalfRing):
    r"""`HalfRing` with the density $\frac2\pi\cos^2 a$ of its angle: $\sin a = 2 b - 1$, $b \sim$ Beta(3/2, 3/2)."""

    def angle(self, key, shape):
        return jnp.arcsin(2 * Beta(1.5, 1.5).sample(key, shape).astype(self.centre.dtype) - 1)

    def log_prob(self, value):
        offset = value - self.centre
        square = jnp.maximum(offset[..., 0], 1e-12) ** 2 / jnp.maximum(jnp.sum(offset**2, -1), 1e-12)
        return super().log_prob(value) + jnp.log(2 * square)


class Moons(TwoMoons):
    """The benchmark's two moons, or (without the fold) one, with sharp or smooth ends."""

    fold: bool = eqx.field(static=True)
    ends: str = eqx.field(static=True)

    def across(self, total: Array) -> Array:
        return super().across(total) if self.fold else total

    def ring(self, centre: Float[Array, " 2"]) -> Distribution:
        return super().ring(centre) if self.ends == "sharp" else SmoothHalfRing(centre)


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `lost.json`, print the tables."""
    if min(cfg.n, cfg.n_test, cfg.seeds) < 1:
        raise ValueError(f"Expected n, n_test and seeds >= 1; got {cfg.n}, {cfg.n_test} and {cfg.seeds}.")
    run = start_run(out, {"name": "folds"} | dataclasses.asdict(cfg), ("simulations", "fits"))
    prior, rows = TASKS["two_moons"]().prior, []
    for seed, (fold, ends), score in itertools.product(range(cfg.seeds), CASES, ("none", "exact")):
        case = f"{'fold' if fold else 'no fold'}, {ends} ends"
        path = out / "fits" / f"{case.replace(', ', '_').replace(' ', '_')}_{score}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            write_json(path, _lost(cfg, Moons(prior, fold, ends), score, run, seed))
        rows.append(read_json(path) | dict(case=case, score=score, n=cfg.n, seed=seed))
    write_json(out / "lost.json", rows)
    print(f"\nMean of log p - log q over {cfg.n_test} unseen simulations (nats), and its standard error over seeds")
    print_table(rows, ("case", "score"), "lost")
    print("\nWithout scores less with them, by pairs of the same simulations: mean, and median of the seeds")
    for case in dict.fromkeys(row["case"] for row in rows):
        none, exact = ([r["lost"] for r in rows if (r["case"], r["score"]) == (case, s)] for s in ("none", "exact"))
        gain = np.subtract(none, exact)
        print(f"{case:24}{np.mean(gain):+.3f} ± {standard_error(gain):.3f}{np.median(gain):+9.3f}")


def _lost(cfg: Config, sim: Moons, score: str, run, seed: int) -> dict[str, float]:
    draws = sim.draw(jax.random.fold_in(run.key("simulations"), seed), cfg.n + cfg.n_test)
    theta, x, scores = draws.theta[: cfg.n], draws.x[: cfg.n], draws.score[: cfg.n]
    nle = ds.NLE(sim).append(theta, x, None if score == "none" else scores)
    key = jax.random.fold_in(run.key("fits"), seed)
    posterior = nle.fit(key, members=cfg.members, max_epochs=cfg.max_epochs)
    theta, x = draws.theta[cfg.n :], draws.x[cfg.n :]
    log_p = jax.vmap(lambda theta, x: sim.log_conditional(theta, jnp.zeros(0), x))(theta, x)
    return {"lost": float(jnp.mean(log_p - posterior.log_likelihood(theta, x)))}


if __name__ == "__main__":
    command_line(main, PRESETS, "folds")
