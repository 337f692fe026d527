"""Do the default settings need tuning? NPE and NLE with nothing but defaults, from 50 to 100 000 simulations.

Two simulators whose posterior is known: the linear one with normal noise, and twelve numbers whose mean and logarithm
of the scatter are asked for, given as they are. Compared is the Kullback-Leibler divergence in nats, the mean over
test simulations of q/p - 1 - log(q/p), which is never negative: of the posterior for NPE, of the likelihood for NLE.

`--preset weights` asks the same of one setting: is the score's weight that is measured as good as the best constant?
"""

import dataclasses
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi._types import check_names
from diffsbi.runs import start_run
from experiments import command_line
from experiments.curves import print_table

ESTIMATORS = {"NPE": ds.NPE, "NLE": ds.NLE}


@dataclasses.dataclass(frozen=True)
class Config:
    """`weights`: constants for the score's weight, beside the measured one; `estimators`: of ESTIMATORS."""

    n: tuple[int, ...] = (50, 200, 1000, 10_000, 100_000)
    seeds: int = 2
    n_test: int = 1000
    n_grid: int = 200
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    weights: tuple[float, ...] = ()
    seed: int = 0


PRESETS = {
    "smoke": Config((40,), 1, 50, 60),
    "paper": Config(),
    "weights": Config((50, 200), 3, estimators=("NPE",), weights=(0.001, 0.01, 0.1, 1.0)),
}


class Scatter(ds.AbstractSimulator):
    """Twelve numbers about a common mean; their scatter is half latent: x is normal about theta[0]."""

    prior: ds.Prior = ds.Prior({"mean": dist.Normal(0.0, 1.0), "log_scatter": dist.Normal(0.0, 0.4)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(12), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] + 0.8 * jnp.exp(theta[1]) * z, 0.6 * jnp.exp(theta[1])).to_event(1)

    def log_likelihood(self, theta, x):
        """Latents integrated out."""
        return jnp.sum(dist.Normal(theta[0], jnp.exp(theta[1])).log_prob(x))

    def log_posterior(self, theta, x, n_grid: int):
        """By quadrature on a grid over seven standard deviations of the likelihood about the data's own moments."""
        width = 5 / np.sqrt(12.0)
        mean, log_scatter = jnp.mean(x), jnp.log(jnp.std(x))
        u = jnp.linspace(-1.0, 1.0, n_grid)
        first, second = mean + 1.5 * width * jnp.exp(log_scatter) * u, log_scatter + width * u
        grid = jnp.stack(jnp.meshgrid(first, second, indexing="ij"), -1).reshape(-1, 2)
        joint = lambda t: self.log_likelihood(t, x) + self.prior.log_prob(t)  # noqa: E731
        cell = jnp.log((first[1] - first[0]) * (second[1] - second[0]))
        return joint(theta) - jax.nn.logsumexp(jax.vmap(joint)(grid)) - cell


def exact(sim, estimator: str, theta, x, n_grid: int) -> np.ndarray:
    """log p(theta | x) for "NPE", log p(x | theta) for "NLE", of every row."""
    if estimator == "NLE":
        return np.asarray(jax.vmap(sim.log_likelihood)(theta, x))
    if isinstance(sim, Scatter):
        return np.asarray(jax.lax.map(lambda row: sim.log_posterior(*row, n_grid), (theta, x)))
    return np.asarray(jax.vmap(lambda t, x: dist.MultivariateNormal(*sim.posterior(x)).log_prob(t))(theta, x))


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `divergences.json`, print the tables."""
    check_names(cfg.estimators, list(ESTIMATORS), "estimators")
    complete = lambda old: {"estimators": list(ESTIMATORS), "weights": []} | dict(old)  # noqa: E731  (older runs)
    config = {"name": "default_settings"} | dataclasses.asdict(cfg)
    run = start_run(out, config, ("simulations", "fits", "test"), complete=complete)
    sims = {"linear_gaussian": ds.linear_gaussian(), "scatter": Scatter()}
    cases = itertools.product(sims, cfg.estimators, range(cfg.seeds))
    tests = {case: _test(cfg, run, sims[case[0]], *case[1:]) for case in cases}
    rows = []
    scores = {"none": None, "scores": "auto"} | {f"weight {w:g}": w for w in cfg.weights}
    for case in itertools.product(cfg.n, range(cfg.seeds), sims, cfg.estimators, scores):
        n, seed, name, estimator, score = case
        path = out / "fits" / f"{name}_{estimator}_{score.replace(' ', '_')}_{n}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            found = _divergence(run, sims[name], estimator, scores[score], n, seed, tests[name, estimator, seed])
            write_json(path, found)
        rows.append(read_json(path) | dict(simulator=name, estimator=estimator, score=score, n=n, seed=seed))
    write_json(out / "divergences.json", rows)
    for value, title in {"nats": "Divergence in nats", "seconds": "Seconds of a fit"}.items():
        print(f"\n{title}, mean and standard error over {cfg.seeds} seeds")
        print_table(rows, ("simulator", "estimator", "score"), value)


def _divergence(run, sim, estimator: str, weight, n: int, seed: int, test) -> dict[str, float]:
    """With scores of this weight; None for no scores."""
    key = jax.random.fold_in(jax.random.fold_in(run.key("simulations"), n), seed)
    draws = sim.draw(key, n, with_score=weight is not None, latents="white")
    options = {} if weight is None else {"score_weight": weight}
    fitting = ESTIMATORS[estimator](sim.prior, **options).append(draws.theta, draws.x, draws.score)
    start = time.perf_counter()
    posterior = fitting.fit(jax.random.fold_in(run.key("fits"), seed))
    seconds = time.perf_counter() - start
    theta, x, truth = test
    own = posterior.log_prob(theta, x) if estimator == "NPE" else posterior.log_likelihood(theta, x)
    log_ratio = np.asarray(own, float) - truth
    return dict(nats=float(np.mean(np.expm1(log_ratio) - log_ratio)), seconds=seconds)


def _test(cfg: Config, run, sim, estimator: str, seed: int):
    draws = sim.draw(jax.random.fold_in(run.key("test"), seed), cfg.n_test, with_score=False)
    return draws.theta, draws.x, exact(sim, estimator, draws.theta, draws.x, cfg.n_grid)


if __name__ == "__main__":
    command_line(main, PRESETS, "default_settings")
