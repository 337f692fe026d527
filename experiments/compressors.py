"""Which compressor of lensing maps keeps most, from the same simulations? Six losses of one network, and six others.

One simulated LSST-Y10 map, parameters from its power-spectrum posterior. Every loss trains the same convolutional
network on the same `n` simulations for as many steps, "vmim" and "score" with their scores; "vmim_without_scores" is
the former as it was published. "imnn" spends as many at the proposal's centre, a derivative counted as p of them. For
simulators without gradients are "hybrid", that network beside binned spectra, moments and peaks, "statistics", those
alone, and "wavelets", the wavelet statistics alone, by VMIM without scores. "latent_scores" (two gradients a map),
"score_change" (these and their change along w_0, six) and "marginal_score" (a chain) need neither network nor
simulation. Then NPE learns the posterior of the compressed numbers from `n_inference` other simulations, the same ones
for each, without scores.

Compared are the mean log-density of the parameters of `n_test` further simulations given their numbers (information,
in nats), and for the one map C2ST and figures of merit against the converged full-field chain.
"""

import dataclasses
import functools
import itertools
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

import diffsbi as ds
from diffsbi import summaries
from diffsbi._files import read_json, write_json, write_npz
from diffsbi.compression import (
    IMNN,
    HybridNetwork,
    LatentScores,
    MapNetwork,
    MarginalScore,
    ScoreChange,
    fit_compressor,
    torus_symmetry,
)
from experiments import command_line
from experiments.curves import print_table
from experiments.lensing import MERITS, MapConfig, about, begin, distances, in_blocks, merits, spectrum_proposal

WITHOUT = "vmim_without_scores"
LOSSES = ("mse", "mae", "gnll", "vmim", WITHOUT, "score", "imnn")
FREE = ("latent_scores", "score_change", "marginal_score")
NUMBERS = {"hybrid": 1, "statistics": 1, "wavelets": 2}  # where in a row (map, statistics, wavelets)
OTHERS = (*NUMBERS, *FREE)
AT_CENTRE = "score_at_centre"  # score regression on simulations that are all there; for `experiments.information`
SCORED = ("vmim", "score")  # and `AT_CENTRE`
STAGES = ("observed", "reference", "spectrum", "simulations", "scores", "derivatives", "network", "compress", "fits")
_BATCH = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MapConfig):
    """`n_average`: states of latents in a score; `imnn_share`: of the n that are for derivatives; rest: training.

    `steps`: of training, about, where n is large enough for them within `max_epochs`; the IMNN has `imnn_steps`.
    """

    compressors: tuple[str, ...] = LOSSES + OTHERS
    n: tuple[int, ...] = (4000,)
    n_inference: int = 1000
    n_test: int = 500
    seeds: int = 3
    channels: tuple[int, ...] = (16, 32, 32)
    fold: int = 2
    n_average: int = 8
    steps: int = 1600
    max_epochs: int = 300
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    imnn_share: float = 0.4
    imnn_steps: int = 60
    n_samples: int = 4000
    members: int = 2
    ess: float = 2000.0


PRESETS = {
    "smoke": Config(
        n_pix=16, compressors=("imnn", "hybrid", "wavelets", "marginal_score"), n=(240,), n_inference=60, n_test=40,
        seeds=1, channels=(4, 4), n_average=1, steps=4, max_epochs=2, imnn_steps=2, n_samples=200, members=1,
        ess=20, n_warmup=20, n_draws=40, n_chains=2, n_spectrum=10,
    ),
    "paper": Config(),
    "few": Config(compressors=("vmim", WITHOUT, *OTHERS), n=(1000,)),
}  # fmt: skip


class Numbers(eqx.Module):
    """(map, numbers, other numbers) → one kind of numbers: the hybrid without its network."""

    place: int = eqx.field(static=True)

    def __call__(self, x):
        return x[self.place]


class Readout(eqx.Module):
    """Features → as many numbers as parameters, for the IMNN: linear, first the best that untrained features give."""

    network: eqx.Module
    loc: jax.Array
    linear: jax.Array

    def __call__(self, x):
        return self.linear @ (self.network(x) - jax.lax.stop_gradient(self.loc))


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `compressors.json`, print the tables."""
    unknown = set(cfg.compressors) - {*LOSSES, *OTHERS}
    if unknown:
        raise ValueError(f"Expected compressors among {LOSSES + OTHERS}; got {sorted(unknown)}.")
    sim, run, x, chain = begin(cfg, "compressors", out, STAGES)
    proposal = spectrum_proposal(cfg, sim, x, run)
    rows = []
    for n, seed in itertools.product(sorted(cfg.n, reverse=True), range(cfg.seeds)):
        data = None
        for name in cfg.compressors:
            if name in FREE and n != max(cfg.n):
                continue  # uses none of them
            path = out / "fits" / f"{name}_{n}_{seed}.json"
            if not path.exists():
                data = data or _data(cfg, sim, proposal, run, seed, x)
                print(path.stem, flush=True)
                row, theta = _fit(cfg, sim, proposal, run, data, chain, name, n, seed)
                write_npz(path.with_suffix(".npz"), {"theta": theta})
                write_json(path, row)
            rows.append(read_json(path) | dict(compressor=name, n=n, seed=seed))
    write_json(out / "compressors.json", dict(rows=rows) | about(sim))
    columns = {
        "log_density": "Mean log-density of the parameters of test simulations, nats",
        "c2st": "C2ST against the full field",
        **MERITS,
        "seconds": "Seconds of training",
    }
    for value, title in columns.items():
        print(f"\n{title}: mean and standard error over {cfg.seeds} seeds")
        print_table(rows, ("compressor",), value)


def _data(cfg: Config, sim, proposal, run, seed: int, x) -> dict:
    """Rows of one seed, and the observed map as one; scores, which take longest, are kept, maps are drawn again."""
    most, key = max(cfg.n), jax.random.fold_in(run.key("simulations"), seed)
    sizes = {"train": most, "inference": cfg.n_inference, "test": cfg.n_test}
    kinds = [summaries.map_statistics(sim.n_pix, sim.side_deg, sim.noise)]
    if "wavelets" in cfg.compressors:
        kinds.append(summaries.wavelet_statistics(sim.n_pix, sim.side_deg, sim.n_bins))
    data: dict = {"observed": dict(x=(x[None], *(numbers(x)[None] for numbers in kinds)))}
    for i, (name, count) in enumerate(sizes.items()):
        key_theta, key_draw = jax.random.split(jax.random.fold_in(key, i))
        theta = proposal.sample(key_theta, (count,))
        draws = sim.draw(key_draw, count, theta, with_score=False)
        made = (np.asarray(jax.lax.map(numbers, draws.x, batch_size=50)) for numbers in kinds)
        data[name] = dict(theta=np.asarray(theta), x=(np.asarray(draws.x), *made))
        if name == "train" and set(SCORED) & set(cfg.compressors):
            data[name]["score"] = scores_of(cfg, sim, run, seed, key_draw, theta)
    return data


def scores_of(cfg: Config, sim, run, seed: int, key, theta) -> np.ndarray:
    """Scores of the simulations that `key` makes."""
    options = dict(latents="whitened", n_average=cfg.n_average)
    if cfg.n_average > 1:
        options["n_steps"] = sim.averaging_steps(run.key("scores"), "whitened")

    def make(start: int, count: int) -> dict:
        return {"score": sim.draw(key, count, theta[start : start + count], start=start, **options).score}

    return in_blocks("scored simulations", len(theta), 100, make, run.folder / "scores", f"{seed}_")["score"]


def _fit(cfg: Config, sim, proposal, run, data, chain, name: str, n: int, seed: int) -> tuple[dict, np.ndarray]:
    """Compress by `name` from n simulations, infer, compare."""
    key = _key_of(run, "fits", seed, n)
    start = time.perf_counter()
    compress, simulations, epochs = compressor(cfg, sim, proposal, run, data["train"], name, n, seed)
    seconds = time.perf_counter() - start
    t, t_test, (observed,) = (np.asarray(compress(data[part]["x"])) for part in ("inference", "test", "observed"))
    posterior = ds.NPE(sim.prior).append(data["inference"]["theta"], t, proposal=proposal)
    posterior = posterior.fit(jax.random.split(key)[0], members=cfg.members)
    log_density = posterior.under_proposal().log_prob(jnp.asarray(data["test"]["theta"]), jnp.asarray(t_test))
    theta = np.asarray(posterior.sample(jax.random.split(key)[1], cfg.n_samples, observed))
    row = dict(log_density=float(jnp.mean(log_density)), seconds=seconds, simulations=simulations, epochs=epochs)
    row |= distances(theta[: cfg.n_samples // 2], {"c2st": chain}, sim.names, seed)
    return row | merits(theta, chain, sim.names), theta


def compressor(cfg: Config, sim, proposal, run, train, name: str, n: int, seed: int):
    """(function of rows of (map, statistics and maybe wavelets), simulations it took, epochs)."""
    centre = sim.prior.from_unconstrained(proposal.loc)
    at = functools.partial(LatentScores, sim, rates=(0.1,), last=True)
    if name == "latent_scores":
        scores = at(centre)
        return lambda x: scores.many(x[0]), 0, 0
    if name == "score_change":
        changes = ScoreChange(at, sim, centre, proposal.along("w_0"))
        return lambda x: changes.many(x[0]), 0, 0
    if name == "marginal_score":
        score = MarginalScore(sim, centre)
        return lambda x: score.many(x[0]), 0, 0
    network = MapNetwork(jax.random.fold_in(run.key("network"), seed), sim.n_bins, cfg.channels, cfg.fold)
    key = _key_of(run, "compress", seed, n)
    if name == "imnn":
        fitted, simulations = _imnn(cfg, sim, centre, network, run, n, seed, key)
        return lambda x: fitted(x[0]), simulations, len(fitted.history.train)
    both = name in NUMBERS
    rows = jax.tree.map(lambda a: a[:n], train if both else train | {"x": train["x"][0]})
    if both:
        network = HybridNetwork(network) if name == "hybrid" else Numbers(NUMBERS[name])
    scored = name in (*SCORED, AT_CENTRE)
    loss = "vmim" if both or name == WITHOUT else "score" if name == AT_CENTRE else name
    epochs = int(np.clip(_BATCH * cfg.steps // n, 1, cfg.max_epochs))
    fitted = fit_compressor(
        key, network, rows["theta"], rows["x"], rows["score"] if scored else None,
        prior=sim.prior, proposal=None if name == AT_CENTRE else proposal,
        loss=loss, augment=_turned if both else torus_symmetry, batch_size=_BATCH,
        max_epochs=epochs, patience=epochs, learning_rate=cfg.learning_rate, weight_decay=cfg.weight_decay,
    )  # fmt: skip
    return lambda x: fitted.many(x if both else x[0]), n, len(fitted.history.train)


def _key_of(run, stage: str, seed: int, n: int):
    return jax.random.fold_in(jax.random.fold_in(run.key(stage), seed), n)


def _turned(key, x):
    """The numbers are the same for a map that is shifted, reflected or turned."""
    return torus_symmetry(key, x[0]), *x[1:]


def _imnn(cfg: Config, sim, centre, network, run, n: int, seed: int, key):
    """Trained at the centre on a budget of n simulations, a fifth of them for validation; how many it took."""
    simulate = lambda theta, key: sim.draw_one(key, theta)[2]  # noqa: E731
    both = jax.jit(lambda key: (simulate(centre, key), jax.jacfwd(simulate)(centre, key)))
    sets, used = [], 0
    for i, budget in enumerate((n - n // 5, n // 5)):
        n_d = max(1, int(cfg.imnn_share * budget) // sim.prior.dim)
        n_s = budget - n_d * sim.prior.dim
        keys = jax.random.split(jax.random.fold_in(_key_of(run, "derivatives", seed, n), i), n_s)
        dx = np.stack([np.asarray(both(k)[1]) for k in keys[:n_d]])
        sets.append((np.asarray(jax.lax.map(jax.jit(lambda k: simulate(centre, k)), keys)), dx))
        used += n_s + n_d * sim.prior.dim
    readout = _first_readout(network.adapted(jnp.asarray(sets[0][0][:128])), *sets[0])
    found = IMNN.from_derivatives(readout, centre, *sets, n_per_device=64)
    every = max(1, cfg.imnn_steps // 10)
    settings = dict(max_iterations=cfg.imnn_steps, patience=cfg.imnn_steps, validate_every=every, average=0.0)
    return found.fit(key, learning_rate=cfg.learning_rate, **settings), used


def _first_readout(network, x, dx) -> Readout:
    r"""The linear summaries of largest Fisher information: $C^{-1} \partial\mu$ of the features, in units of its root.

    C is shrunk towards its diagonal: features of a small network are many, and simulations few.
    """

    def derivative(x, dx):
        return jnp.stack([jax.jvp(network, (x,), (dx[..., a],))[1] for a in range(dx.shape[-1])], -1)

    f = np.asarray(jax.lax.map(network, jnp.asarray(x), batch_size=64), float)
    mean = np.asarray(jax.lax.map(lambda row: derivative(*row), (jnp.asarray(x[: len(dx)]), jnp.asarray(dx)))).mean(0)
    weights = np.linalg.solve(summaries.shrunk_covariance(f)[0], mean.astype(float))
    lower = np.linalg.cholesky(weights.T @ mean)
    linear = solve_triangular(jnp.asarray(lower), jnp.asarray(weights.T), lower=True)
    return Readout(network, jnp.asarray(f.mean(0), jnp.float32), jnp.asarray(linear, jnp.float32))


if __name__ == "__main__":
    command_line(main, PRESETS, "compressors")
