r"""Is the weight of the score that is measured as good as the best constant, on lensing maps?

NPE from the simulations of `experiments.scores_lensing`, in `maps/` of the run folder, with the measured weight of the
score and with constants; compared is the mean of $-\log q$ over simulations that no fit has seen, under the proposal,
by pairs of the same simulations.
"""

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi.runs import start_run
from experiments import command_line, scores_lensing
from experiments.curves import print_table, standard_error
from experiments.lensing import observe

MEASURED = "measured"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """`weights`: constants in place of the measured weight; `n_test`: the last simulations without scores."""

    maps: scores_lensing.Config = scores_lensing.PRESETS["latent_scores"]
    n: tuple[int, ...] = (50, 200)
    weights: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0)
    n_test: int = 2000
    members: int = 2
    seed: int = 0


SMALL = dataclasses.replace(scores_lensing.PRESETS["smoke"], summary="latent_scores")
PRESETS = {"smoke": Config(maps=SMALL, n=(20,), weights=(0.1,), n_test=40, members=1), "paper": Config()}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `log_probs.json`, print the tables."""
    if max(cfg.n) > cfg.maps.n_scored or cfg.n_test > cfg.maps.n_reference:
        most = f"n <= {cfg.maps.n_scored} and n_test <= {cfg.maps.n_reference}"
        raise ValueError(f"Expected {most}, the simulations of each seed; got {cfg.n} and {cfg.n_test}.")
    run = start_run(out, {"name": "score_weights"} | dataclasses.asdict(cfg), ("fits",))
    sim, maps, x = observe(cfg.maps, "scores_lensing", out / "maps", scores_lensing.STAGES)
    proposal, _, pool, many = scores_lensing.simulated(cfg.maps, sim, maps, x)
    rows = []
    cases = itertools.product(range(cfg.maps.seeds), cfg.n, cfg.maps.scores, (MEASURED, *cfg.weights))
    for seed, n, kind, weight in cases:
        score = scores_lensing.score_name(kind)
        path = out / "fits" / f"{score}_{weight}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            arrays = scores_lensing.rows_of(cfg.maps, pool, many, seed, n, kind)
            npe = ds.NPE(sim.prior, score_weight="auto" if weight == MEASURED else weight)
            posterior = npe.append(*arrays, proposal=proposal).fit(
                jax.random.fold_in(run.key("fits"), 10_000 * seed + n), members=cfg.members
            )
            q = posterior if proposal is None else posterior.under_proposal()
            unseen = (many[name][-cfg.n_test :] for name in ("theta", "t"))
            write_json(path, {"nll": -float(np.mean(q.log_prob(*unseen)))})
        rows.append(read_json(path) | dict(score=score, weight=str(weight), n=n, seed=seed))
    write_json(out / "log_probs.json", rows)
    print(f"\n-log q of {cfg.n_test} unseen simulations, mean and standard error over {cfg.maps.seeds} seeds")
    print_table(rows, ("score", "weight"), "nll")
    print("\nThe same less that with the measured weight, by pairs")
    by = {tuple(row[name] for name in ("score", "weight", "n", "seed")): row["nll"] for row in rows}
    for score, weight, n in dict.fromkeys((r["score"], r["weight"], r["n"]) for r in rows if r["weight"] != MEASURED):
        pairs = [by[score, weight, n, s] - by[score, MEASURED, n, s] for s in range(cfg.maps.seeds)]
        print(f"{score:14}{weight:>8}{n:6}: {np.mean(pairs):+.3f} ± {standard_error(pairs):.3f}")


if __name__ == "__main__":
    command_line(main, PRESETS, "score_weights")
