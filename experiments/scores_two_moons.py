"""How many draws of the two-moons density do its scores save? Density fits with and without, against published ones.

C2ST and the mean of -log q are taken on 10 000 draws of the density and of the fit. Fits to few draws are far too sure
where they saw none, so each is mixed with the prior, which counts as a tenth of a draw: otherwise a few points decide
the mean of -log q.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._files import read_json, write_json, write_npz
from diffsbi.diagnostics import c2st
from diffsbi.inference import NPE
from diffsbi.runs import start_run
from diffsbi.simulators.two_moons import two_moons
from experiments import command_line
from experiments.curves import print_saved, print_table
from experiments.two_moons import tabulated

PUBLISHED = {
    "none": {20: 0.818, 50: 0.748, 100: 0.680, 200: 0.635, 500: 0.590, 1000: 0.582},
    "exact": {20: 0.759, 50: 0.699, 100: 0.654, 200: 0.611, 500: 0.583, 1000: 0.576},
}
"""C2ST, means of ten runs, of Zeghal et al. 2022, arXiv:2207.05636."""

CUT = 0.6
"""Height of the line across a moon, on which scores are compared."""


@dataclasses.dataclass(frozen=True)
class Config:
    """`patience`: steps without improvement; `weights`: score weights that "auto" is compared with at `weighted_n`.

    `of_prior`: the draws that the prior counts as in the mixture of fit and prior.

    Of the first seed's fits to `drawn_n` draws the density and the score are kept, on `n_grid` points a side.
    """

    n: tuple[int, ...] = (20, 50, 100, 200, 500, 1000)
    seeds: int = 10
    members: int = 4
    patience: int = 3000
    of_prior: float = 0.1
    n_test: int = 10_000
    weights: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    weighted_n: tuple[int, ...] = (50, 200)
    weighted_seeds: int = 5
    drawn_n: int = 100
    n_grid: int = 200
    seed: int = 0


PRESETS = {
    "smoke": Config((20,), 1, 1, 20, 0.1, 300, (0.1,), (20,), 1, 20, 30),
    "paper": Config(),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the tables."""
    if cfg.drawn_n not in cfg.n:
        raise ValueError(f"Expected drawn_n among n={cfg.n}, whose fits are made; got {cfg.drawn_n}.")
    run = start_run(out, {"name": "scores_two_moons"} | dataclasses.asdict(cfg), ("draws", "fit", "test"))
    target = two_moons()
    test = target.sample(run.key("test"), cfg.n_test)
    cases = list(itertools.product(cfg.n, range(cfg.seeds), ["none", "exact"]))
    cases += itertools.product(cfg.weighted_n, range(cfg.weighted_seeds), cfg.weights)
    rows = []
    for n, seed, score in cases:
        path = out / "fits" / f"{score}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            posterior = _fit(cfg, run, target, n, seed, score)
            if (n, seed) == (cfg.drawn_n, 0) and score in PUBLISHED:
                write_npz(out / "learned" / f"{score}.npz", _table(cfg, posterior.log_prob, posterior.score))
            write_json(path, _measured(cfg, run, posterior, test, n, seed))
        rows.append(read_json(path) | dict(score=str(score), n=n, seed=seed))
    if not (truth := out / "learned" / "truth.npz").exists():
        write_npz(truth, _table(cfg, target.log_density, target.density_score))
    write_json(out / "distances.json", dict(rows=rows, published=PUBLISHED))
    compared = [row for row in rows if row["score"] in PUBLISHED]
    print(f"\nC2ST, mean and standard error over {cfg.seeds} seeds; published: {PUBLISHED}")
    print_table(compared, ("score",))
    print_saved(compared, {}, "exact")
    print("\n-log q, the same")
    print_table(compared, ("score",), "nll")
    print("\n-log q by the weight of the score; 'exact' is the weight that is measured")
    same = [row for row in rows if row["n"] in cfg.weighted_n and row["seed"] < cfg.weighted_seeds]
    print_table(same, ("score",), "nll")


def _table(cfg: Config, log_density, score) -> dict[str, np.ndarray]:
    return tabulated(log_density, score, cfg.n_grid, CUT)


def _key(run, name: str, n: int, seed: int):
    return jax.random.fold_in(run.key(name), 10_000 * seed + n)


def _fit(cfg: Config, run, target, n: int, seed: int, score):
    """The density fitted to this seed's draws; `score`: "none", "exact" with the weight found, or a weight."""
    theta = target.sample(_key(run, "draws", n, seed), n)
    weight = "auto" if isinstance(score, str) else score
    npe = NPE(target.prior, score_weight=weight)
    npe.append(theta, np.zeros((n, 1)), None if score == "none" else target.density_score(theta))
    # A density with thin curved ridges, not a posterior: nothing should pull it towards a normal one.
    epochs = max(20, 32 * cfg.patience // n)  # of batches of 32; exact scores go on teaching for long
    settings = dict(members=cfg.members, weight_decay=0.0, patience=epochs, max_epochs=3 * epochs)
    return npe.fit(_key(run, "fit", n, seed), **settings).condition(jnp.zeros(1))


def _measured(cfg: Config, run, posterior, test, n: int, seed: int) -> dict:
    key_fit, key_prior, key_mix = jax.random.split(jax.random.fold_in(_key(run, "fit", n, seed), 1), 3)
    prior, share = posterior.prior, cfg.of_prior / (n + cfg.of_prior)
    draws = posterior.sample(key_fit, cfg.n_test)
    from_prior = jax.random.uniform(key_mix, (cfg.n_test, 1)) < share
    draws = jnp.where(from_prior, prior.sample(key_prior, (cfg.n_test,)), draws)
    distance = c2st(np.asarray(draws), np.asarray(test), seed=seed, duplicates="drop")
    log_fit = jax.lax.map(posterior.log_prob, test.reshape(-1, 100, 2)).ravel()
    log_q = jnp.logaddexp(jnp.log1p(-share) + log_fit, jnp.log(share) + prior.log_prob(test))
    return dict(c2st=distance.value, error=distance.error, nll=-float(jnp.mean(log_q)))


if __name__ == "__main__":
    command_line(main, PRESETS, "scores_two_moons")
