"""How good are our posteriors on a standard benchmark, and what do scores change? Five tasks of Lueckmann et al. 2021.

Each fit is compared by C2ST with the benchmark's reference posteriors of its first observations. Those are files of the
package sbibm: `DIFFSBI_SBIBM` names the folder that `pip install --no-deps --target FOLDER sbibm` put it into. For a
quick look, observations and references are made here instead: NUTS on the task's own likelihood.
"""

import bz2
import dataclasses
import itertools
import os
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import diffsbi as ds
from diffsbi._files import load_npz, read_json, write_json
from diffsbi.diagnostics import c2st
from diffsbi.runs import start_run
from experiments import command_line
from experiments.curves import print_table
from experiments.sbibm_simulators import TASKS, AbstractTask

ESTIMATORS = {"NPE": ds.NPE, "NLE": ds.NLE}
PUBLISHED = {
    ("gaussian_mixture", "NPE", 1000): (.78895, .7027, .6866, .69865, .73525, .68375, .73155, .67835, .6922, .7633),
    ("gaussian_mixture", "NPE", 10_000): (.6613, .5604, .6697, .60735, .64705, .5699, .5853, .58475, .67075, .59645),
    ("gaussian_mixture", "NLE", 1000): (.7767, .74585, .74585, .76735, .67785, .739, .7464, .7061, .75295, .7426),
    ("gaussian_mixture", "NLE", 10_000): (.73175, .65675, .8825, .71935, .64705, .63435, .7357, .73215, .74075, .75365),
    ("two_moons", "NPE", 1000): (.66635, .6958, .6771, .6996, .74755, .7105, .8045, .75055, .71885, .78025),
    ("two_moons", "NPE", 10_000): (.5421, .57055, .64625, .67445, .58765, .5764, .617, .5988, .6164, .63425),
    ("two_moons", "NLE", 1000): (.67485, .68275, .7674, .8951, .8726, .6283, .85075, .8144, .73445, .81055),
    ("two_moons", "NLE", 10_000): (.6318, .6456, .71525, .6494, .71745, .6107, .84845, .8096, .67095, .83305),
    ("slcp", "NPE", 1000): (.98805, .9754, .9646, .98535, .96595, .96015, .99245, .9891, .96075, .97055),
    ("slcp", "NPE", 10_000): (.9444, .9376, .7988, .916, .84905, .8832, .9495, .89845, .9319, .89725),
    ("slcp", "NLE", 1000): (.9661, .9609, .91245, .97675, .86985, .9556, .97755, .95105, .952, .93395),
    ("slcp", "NLE", 10_000): (.7429, .7604, .7433, .8352, .7715, .75185, .92825, .79305, .71005, .6731),
    ("bernoulli_glm", "NPE", 1000): (.87305, .77485, .9134, .8863, .87455, .8308, .8535, .86425, .8867, .8724),
    ("bernoulli_glm", "NPE", 10_000): (.6751, .65865, .7591, .68325, .62955, .6388, .66, .65045, .74265, .6855),
    ("bernoulli_glm", "NLE", 1000): (.68385, .7635, .8001, .76015, .7298, .7085, .7064, .7411, .78855, .7211),
    ("bernoulli_glm", "NLE", 10_000): (.5931, .58085, .5967, .6676, .62275, .5904, .6079, .5977, .60065, .58935),
    ("sir", "NPE", 1000): (.9534, .97245, .9751, .8048, .71395, .70145, .65175, .746, .81025, .82205),
    ("sir", "NPE", 10_000): (.897, .95255, .6746, .59425, .5683, .61155, .5893, .58095, .68015, .64755),
    ("sir", "NLE", 1000): (.7291, .79175, .73535, .67745, .74405, .72705, .81745, .6349, .7564, .99675),
    ("sir", "NLE", 10_000): (.8038, .77525, .62315, .72005, .817, .68385, .7757, .7051, .6497, .9296),
}  # fmt: skip
"""C2ST (of standardised draws, 10 000 of them) at observations 1 to 10, of the benchmark's repository.

sbi-benchmark/results: `gaussian_mixture_rerun` (the task as corrected in sbibm 1.1), and the runs of the paper
(Lueckmann et al. 2021, arXiv:2101.04653), NPE with a spline flow and NLE with a MAF, from its files
`supplement_hyperparameters_snpe.csv` and `supplement_hyperparameters_snle.csv`.
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """`seeds`: sets of simulations for each n; `reference`: "package" or "nuts"; `n_chains` of NLE, at one x.

    `activation`: of the densities' networks, "silu", "tanh" or "sin".
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    n: tuple[int, ...] = (1000,)
    seeds: tuple[int, ...] = (1,)
    estimators: tuple[str, ...] = ("NPE", "NLE")
    scores: tuple[str, ...] = ("none", "exact")
    observations: int = 3
    reference: str = "package"
    members: int = 2
    activation: str = "silu"
    max_epochs: int | None = None
    n_samples: int = 2000
    n_chains: int = 50
    n_warmup: int = 100
    max_tree_depth: int = 5
    seed: int = 0


PRESETS = {
    "smoke": Config(
        ("gaussian_mixture",), (60,), scores=("exact",), observations=1, reference="nuts", members=1, max_epochs=5,
        n_samples=200, n_chains=4, n_warmup=40,
    ),
    "paper": Config(),
    "large": Config(n=(1000, 10_000), seeds=(1, 1)),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `distances.json`, print the table."""
    streams = [f"{stream}_{task}" for task in cfg.tasks for stream in ("simulations", "summaries", "observed", "exact")]
    complete = lambda old: {"activation": "silu"} | dict(old)  # noqa: E731  (runs of older versions)
    run = start_run(out, {"name": "sbibm_tasks"} | dataclasses.asdict(cfg), ("fit", *streams), complete=complete)
    tasks, rows = {task: TASKS[task]() for task in cfg.tasks}, []
    for task, sim in tasks.items():
        run.once(f"references_{task}", lambda folder, t=task, s=sim: _references(cfg, t, s, run, folder))
        run.once(f"simulations_{task}", lambda folder, t=task, s=sim: _simulate(cfg, t, s, run, folder))
    sets = [(n, seed) for n, seeds in zip(cfg.n, cfg.seeds, strict=True) for seed in range(seeds)]
    for (n, seed), estimator, task, score in itertools.product(sets, cfg.estimators, tasks, cfg.scores):
        path = out / "fits" / f"{task}_{estimator}_{score}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            write_json(path, _fit(cfg, tasks[task], task, run, estimator, score, n, seed))
        found = dict(task=task, estimator=estimator, score=score, n=n, seed=seed)
        rows += [found | dict(observation=i + 1, c2st=c) for i, c in enumerate(read_json(path)["c2st"])]
    rows += _published(cfg)
    write_json(out / "distances.json", dict(rows=rows))
    print(f"\nC2ST against the reference, mean and standard error over {cfg.observations} observations (and seeds)")
    print_table(rows, ("task", "estimator", "score"))


def _published(cfg: Config) -> list[dict]:
    """Rows for what is published of the same cases."""
    return [
        dict(task=task, estimator=estimator, score="published", n=n, seed=0, observation=i + 1, c2st=c)
        for (task, estimator, n), values in PUBLISHED.items()
        if task in cfg.tasks and estimator in cfg.estimators and n in cfg.n
        for i, c in enumerate(values[: cfg.observations])
    ]


def package_files(task: str, observation: int, folder: str | None = os.environ.get("DIFFSBI_SBIBM")):
    """An observation (d,) and 10 000 draws of its reference posterior (n, p), from the package's data files.

    Raises:
        FileNotFoundError: If `folder` is None or does not hold them.
    """
    files = Path(folder or "", "sbibm", "tasks", task, "files", f"num_observation_{observation}")
    if folder is None or not files.is_dir():
        raise FileNotFoundError(
            "Expected the benchmark's data files in the folder that DIFFSBI_SBIBM names; "
            f"got {folder!r}. To fetch them: pip install --no-deps --target FOLDER sbibm"
        )
    x = np.loadtxt(files / "observation.csv", delimiter=",", skiprows=1)
    with bz2.open(files / "reference_posterior_samples.csv.bz2", "rt") as table:
        return x, np.loadtxt(table, delimiter=",", skiprows=1)


def _references(cfg: Config, task: str, sim: AbstractTask, run, folder: Path) -> dict:
    if cfg.reference == "package":
        cases = [package_files(task, i + 1) for i in range(cfg.observations)]
    else:
        keys = jax.random.split(run.key(f"exact_{task}"), cfg.observations)
        draws = sim.draw(run.key(f"observed_{task}"), cfg.observations, with_score=False)
        cases = [(x, _exact(cfg, sim, x, key)) for x, key in zip(draws.x, keys, strict=True)]
    x, theta = (np.stack(a) for a in zip(*cases, strict=True))
    np.savez(folder / "references.npz", x=x, theta=theta)
    return {"observations": len(x), "draws": theta.shape[1]}


class Unconstrained(eqx.Module):
    """log p(theta | x) in unconstrained space, up to a constant."""

    sim: AbstractTask
    x: jax.Array

    def __call__(self, u):
        prior, theta = self.sim.prior, self.sim.prior.from_unconstrained(u)
        return prior.log_prob_unconstrained(u) + self.sim.log_conditional(theta, jnp.zeros(0), self.x)


def _exact(cfg: Config, sim: AbstractTask, x, key) -> np.ndarray:
    """NUTS in unconstrained space: for posteriors with one mode."""
    target = Unconstrained(sim, jnp.asarray(x, jnp.result_type(float)))
    init = sim.prior.to_unconstrained(sim.prior.sample(jax.random.fold_in(key, 0), (cfg.n_chains,)))
    settings = dict(mass="dense", chain_method="vectorized")
    chains = ds.nuts(target, init, key, 5 * cfg.n_warmup, cfg.n_samples // cfg.n_chains, **settings)
    return np.asarray(sim.published(sim.prior.from_unconstrained(jnp.asarray(chains.flat()))))


def _simulate(cfg: Config, task: str, sim: AbstractTask, run, folder: Path) -> dict:
    n = max(size * seeds for size, seeds in zip(cfg.n, cfg.seeds, strict=True))
    draws = sim.draw(run.key(f"simulations_{task}"), n)
    x = sim.summaries(jnp.asarray(draws.x, jnp.result_type(float)), run.key(f"summaries_{task}"))
    np.savez(folder / "pool.npz", theta=np.asarray(draws.theta), x=np.asarray(x), score=np.asarray(draws.score))
    return {"simulations": n}


def _fit(cfg: Config, sim: AbstractTask, task: str, run, estimator: str, score: str, n: int, seed: int) -> dict:
    data = load_npz(run.path(f"references_{task}", "references.npz"))
    pool = load_npz(run.path(f"simulations_{task}", "pool.npz"))
    rows = slice(seed * n, (seed + 1) * n)
    start = time.monotonic()
    key_fit, key_sample = jax.random.split(jax.random.fold_in(jax.random.fold_in(run.key("fit"), n), seed))
    model = ESTIMATORS[estimator](sim, density_options={"activation": cfg.activation}).append(
        pool["theta"][rows], pool["x"][rows], None if score == "none" else pool["score"][rows]
    )
    posterior = model.fit(key_fit, members=cfg.members, max_epochs=cfg.max_epochs)
    observed = sim.summaries(jnp.asarray(data["x"], jnp.result_type(float)))
    settings = dict(n_chains=cfg.n_chains, n_warmup=cfg.n_warmup, max_tree_depth=cfg.max_tree_depth)
    settings = settings if estimator == "NLE" else {}
    theta = np.asarray(sim.published(posterior.sample(key_sample, cfg.n_samples, observed, **settings)))
    seconds = time.monotonic() - start
    compare = lambda i: c2st(theta[:, i], data["theta"][i], seed=seed, duplicates="drop")  # noqa: E731
    return dict(c2st=[compare(i).value for i in range(len(observed))], seconds=seconds)


if __name__ == "__main__":
    command_line(main, PRESETS, "sbibm_tasks")
