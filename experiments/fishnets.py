"""Do Fishnets find the exact score and Fisher matrix, and do they hold for larger sets? Regression, graphs, patches.

Regression: theta = (slope, intercept), members (x, y, log sigma), y = slope x + intercept + sigma eps. Trained on sets
of one size, tested on sets up to a hundred times larger and on another distribution of the noise levels.

Graphs: halos in groups; each sees its neighbours' radial velocities v = H d + g (d_x^2 - d_y^2) / d + b + sigma eps
over displacements (d_x, d_y), with an unknown velocity b of its own. The Fisher matrix of theta = (H, g) is known.

Patches: log-normal maps cut into squares; time and memory of the compression against the number of pixels.
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

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi.compression import FisherSum, Fishnet, MemberNetwork, fit_fishnet, patches
from diffsbi.compression.networks import torus_convolution
from diffsbi.runs import start_run
from experiments import command_line
from experiments.curves import standard_error
from experiments.set_toys import Velocities, exact_regression, regression_sets, relative_errors, velocity_graphs


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets, graphs and maps to train on, and their sizes; `sizes` and `test_halos` to test on."""

    regression: tuple[str, ...] = ("fishnet", "published", "sum", "mean", "max")
    aggregations: tuple[str, ...] = ("fisher", "sum", "mean", "max", "attention")
    seeds: int = 5
    n_sets: int = 10_000
    n_members: int = 100
    sizes: tuple[int, ...] = (10, 100, 1000, 10_000)
    epochs: int = 6
    n_graphs: int = 1000
    halos: int = 24
    test_halos: tuple[int, ...] = (24, 96)
    graph_epochs: int = 50
    n_maps: int = 600
    map_epochs: int = 8
    map_seeds: int = 5
    pixels: tuple[int, ...] = (64, 128, 256)
    patch: int = 16
    seed: int = 0


PRESETS = {
    "smoke": Config(("mean",), ("fisher",), 1, 60, 20, (40,), 2, 40, 8, (8,), 2, map_seeds=0, pixels=(32,), patch=8),
    "paper": Config(),
}


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `results.json`, print the tables."""
    run = start_run(out, {"name": "fishnets"} | dataclasses.asdict(cfg), ("regression", "graphs", "patches", "test"))
    results = {
        "regression": _cases(out, "regression", lambda *a: _regression(cfg, run, *a), cfg.regression, cfg.seeds),
        "graphs": _cases(out, "graphs", lambda *a: _graphs(cfg, run, *a), cfg.aggregations, cfg.seeds),
        "patches": _cases(out, "patches", lambda *a: _patches(cfg, run, *a), ("fishnet",), cfg.map_seeds),
        "cost": _cases(out, "cost", lambda *a: _cost(cfg, run), ("fishnet",), 1),
    }
    write_json(out / "results.json", results)
    _print("Regression", results["regression"], ("case", "noise", "n"), ("ratio", "fisher", "score", "sigma"))
    _print("Graphs", results["graphs"], ("case", "halos"), ("loss", "error", "information"))
    _print("Patches of maps", results["patches"], ("n_pix",), ("error", "chi2"))
    cost = ("milliseconds", "chunked_milliseconds", "megabytes", "chunked_megabytes")
    _print("Cost of patches", results["cost"], ("n_pix",), cost)


def _cases(out: Path, part: str, work, cases: tuple[str, ...], seeds: int) -> list[dict]:
    """Rows of `work(case, seed)` for every case and seed, each kept in a file of its own."""
    rows = []
    for seed, case in itertools.product(range(seeds), cases):
        path = out / part / f"{case}_{seed}.json"
        if not path.exists():
            print(part, path.stem, flush=True)
            write_json(path, work(case, seed))
        rows += [row | dict(case=case, seed=seed) for row in read_json(path)]
    return rows


def _regression(cfg: Config, run, case: str, seed: int) -> list[dict]:
    key_draw, key_fit = jax.random.split(jax.random.fold_in(run.key("regression"), seed))
    theta, x = regression_sets(key_draw, cfg.n_sets, cfg.n_members)
    # Few sets to validate would choose the epoch whose F is wrong by as much as theirs scatters.
    options = dict(max_epochs=cfg.epochs, patience=3, batch_size=64, validation=0.3)
    if case == "published":  # a plain perceptron, a free score, a Cholesky factor, whole sets
        options |= dict(form="cholesky", start=False, split=False)
    network = case if case in ("sum", "mean", "max") else "fishnet"
    fishnet, history = fit_fishnet(key_fit, theta, x, network=network, width=32, **options)
    rows = []
    for noise, n in itertools.product(("training", "other"), cfg.sizes):
        count = int(np.clip(100_000 // n, 20, 400))
        _, x = regression_sets(jax.random.fold_in(run.key("test"), n), count, n, noise)
        found = _information(fishnet, x)
        exact = exact_regression(x, fishnet.fiducial)
        rows.append(relative_errors((found.score, found.fisher), exact) | dict(noise=noise, n=n))
    return [row | dict(epochs=len(history.train)) for row in rows]


@eqx.filter_jit
def _information(fishnet, x):
    return jax.lax.map(fishnet.information, x)


def _graphs(cfg: Config, run, case: str, seed: int) -> list[dict]:
    """Only the aggregation of messages differs: what the nodes then say is always added up."""
    key_draw, key_fit = jax.random.split(jax.random.fold_in(run.key("graphs"), seed))
    toy = Velocities()
    u, graphs, _ = velocity_graphs(key_draw, toy, cfg.n_graphs, cfg.halos)
    how = "fishnet" if case == "fisher" else case
    options = dict(max_epochs=cfg.graph_epochs, patience=9, batch_size=32, learning_rate=5e-3, width=24)
    fishnet, history = fit_fishnet(key_fit, u, graphs, network=how, split=True, **options)
    return [_graph_test(cfg, run, toy, fishnet, n) | dict(halos=n, epochs=len(history.train)) for n in cfg.test_halos]


def _graph_test(cfg: Config, run, toy, fishnet: Fishnet, n: int) -> dict:
    """Loss above the exact posterior's, scatter in its units, and information that the estimates hold, over exact."""
    u, graphs, exact = velocity_graphs(jax.random.fold_in(run.key("test"), n), toy, 400, n)
    found = _information(fishnet, graphs)
    found = jax.vmap(lambda one: one.at(jnp.zeros(2)))(found)
    return _posterior_errors(u, (found.score, found.fisher), exact)


def _posterior_errors(u, found, exact) -> dict:
    one = np.eye(u.shape[-1])
    losses, estimates = [], []
    for score, fisher in (found, exact):
        precision = np.asarray(fisher, float) + one
        estimate = np.linalg.solve(precision, np.asarray(score, float)[..., None])[..., 0]
        miss = np.asarray(u, float) - estimate
        quadratic = np.einsum("bi,bij,bj->b", miss, precision, miss)
        losses.append(0.5 * quadratic - 0.5 * np.linalg.slogdet(precision)[1])
        estimates.append(miss)
    precision = np.asarray(exact[1], float) + one
    ratio = [np.mean(np.einsum("bi,bij,bj->b", miss, precision, miss)) for miss in estimates]
    return dict(
        loss=float(np.mean(losses[0] - losses[1])),
        error=float(np.sqrt(ratio[0] / ratio[1])),
        information=float(ratio[1] / ratio[0]),
    )


class PatchFeatures(eqx.Module):
    """Means over a patch of squares of its filtered values, on two scales, in logarithms: spectra of a learned kind."""

    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]

    def __init__(self, key, n_bins: int, channels: int = 8):
        keys = jax.random.split(key)
        self.convolutions = tuple(eqx.nn.Conv2d(n_bins, channels, 3, key=k) for k in keys)  # type: ignore[assignment]

    def __call__(self, x):
        coarse = x.reshape(len(x), x.shape[1] // 2, 2, -1, 2).mean((2, 4))

        def filtered(c, y):  # where no pixel is beyond the border
            return torus_convolution(c.weight, y)[:, 1:-1, 1:-1] + c.bias

        features = [
            jnp.mean(filtered(c, y) ** 2, (1, 2)) for c, y in zip(self.convolutions, (x, 2 * coarse), strict=True)
        ]
        return jnp.log(1e-3 + jnp.concatenate(features))


def _maps(n_pix: int):
    """A survey of `n_pix` pixels of one size: larger maps hold more of the same patches."""
    return ds.lsst_y10(n_pix=n_pix, side_deg=10 * n_pix / 256)


def _patch_network(key, n_bins: int, dim: int):
    keys = jax.random.split(key)
    embed = PatchFeatures(keys[0], n_bins)
    return FisherSum(MemberNetwork(keys[1], 16, dim, embed=embed, width=16, depth=1))


def _patches(cfg: Config, run, case: str, seed: int) -> list[dict]:
    """Trained on the smallest maps, tested on all: (omega_c, sigma_8) with the other parameters unknown."""
    key_draw, key_network, key_fit = jax.random.split(jax.random.fold_in(run.key("patches"), seed), 3)
    sim = _maps(cfg.pixels[0])
    chosen = np.array([sim.prior.names.index(name) for name in ("omega_c", "sigma_8")])
    draws = sim.draw(key_draw, cfg.n_maps, with_score=False)
    sets = jax.vmap(lambda x: patches(x, cfg.patch))(draws.x)
    network = _patch_network(key_network, sim.n_bins, 2)
    options = dict(max_epochs=cfg.map_epochs, patience=9, batch_size=16, learning_rate=5e-3, split=False)
    fishnet, _ = fit_fishnet(key_fit, draws.theta[:, chosen], sets, network=network, **options)
    return [_patch_test(cfg, run, fishnet, chosen, n) | dict(n_pix=n) for n in cfg.pixels]


def _patch_test(cfg: Config, run, fishnet, chosen, n_pix: int) -> dict:
    """Scatter of the estimate in units of the prior's, and chi^2 per parameter of the error that it claims."""
    draws = _maps(n_pix).draw(jax.random.fold_in(run.key("test"), n_pix), 60, with_score=False)
    theta = draws.theta[:, chosen]

    def one(inputs):
        theta, x = inputs
        found = fishnet.information(patches(x, cfg.patch), chunk=256)
        matrix = found.fisher + fishnet.precision
        miss = theta - found.estimate(fishnet.precision)
        return miss, miss @ matrix @ miss

    miss, chi2 = eqx.filter_jit(lambda inputs: jax.lax.map(one, inputs))((theta, draws.x))
    error = np.sqrt(np.mean(np.asarray(miss) ** 2, 0)) / np.sqrt(np.diag(fishnet.root @ fishnet.root.T))
    return dict(error=float(error.mean()), errors=error.tolist(), chi2=float(np.mean(chi2) / len(chosen)))


def _cost(cfg: Config, run) -> list[dict]:
    """Milliseconds of a gradient through the compression, best of five, and XLA's working memory beside the map."""
    shape = (5, cfg.patch, cfg.patch)
    scaling = (jnp.zeros(shape), jnp.ones(shape), jnp.zeros(2), jnp.eye(2))
    params, static = eqx.partition(Fishnet(_patch_network(run.key("patches"), 5, 2), *scaling), eqx.is_array)
    rows = []
    for n_pix in cfg.pixels:
        x, row = jax.random.normal(run.key("test"), (5, n_pix, n_pix)), dict(n_pix=n_pix)
        for name, chunk in (("", None), ("chunked_", 16)):
            total = functools.partial(_total, static, size=cfg.patch, chunk=chunk)
            gradient = jax.jit(jax.grad(total)).lower(params, x).compile()
            row[f"{name}megabytes"] = gradient.memory_analysis().temp_size_in_bytes / 2**20
            row[f"{name}milliseconds"] = _best_of(gradient, params, x)
        rows.append(row)
    return rows


def _total(static, params, x, size: int, chunk: int | None):
    found = eqx.combine(params, static).information(patches(x, size), chunk=chunk)
    return jnp.sum(found.score) + jnp.trace(found.fisher)


def _best_of(function, *arguments, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def _print(title: str, rows: list[dict], of: tuple[str, ...], values: tuple[str, ...]) -> None:
    """Mean and standard error over seeds of some values, a line for each case."""
    print(f"\n{title}: " + ", ".join(values))
    for case in dict.fromkeys(tuple(row[c] for c in of) for row in rows):
        chosen = [row for row in rows if tuple(row[c] for c in of) == case]
        numbers = ([row[v] for row in chosen] for v in values)
        text = "   ".join(f"{np.mean(v):9.4f} ± {standard_error(v):.4f}" for v in numbers)
        print(f"{' '.join(map(str, case)):30}{text}")


if __name__ == "__main__":
    command_line(main, PRESETS, "fishnets")
