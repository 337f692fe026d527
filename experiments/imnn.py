"""How much of the exact Fisher information do Information Maximising Neural Networks keep, and do they overfit?

Ten normal draws with unknown mean and variance, and variance alone; a Gaussian field of unknown power law, 128². det F
is measured on simulations that no training saw. The field is held in its Fourier (Hartley) basis, which is
orthonormal: nothing is lost, and the network, which begins with the power of modes, needs no transform.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._files import read_json, write_json
from diffsbi._types import Array
from diffsbi.compression import IMNN
from diffsbi.runs import start_run
from diffsbi.simulators.fields import fold, mode_weights
from experiments import command_line
from experiments.curves import standard_error


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of a problem: `n_s` simulations per step, `n_refit` for the last measurement, `average` of weights."""

    steps: int
    n_s: int
    n_validation: int
    n_refit: int
    average: float
    n_pix: int = 0
    learning_rate: float = 3e-3
    validations: int = 40


@dataclasses.dataclass(frozen=True)
class Config:
    """`fixed` is `normal` with the same simulations in every step, as in the original."""

    normal: Case = Case(1500, 500, 4000, 400_000, 0.995)
    variance: Case = Case(800, 500, 4000, 400_000, 0.99)
    fixed: Case = Case(1500, 500, 4000, 400_000, 0.0)
    field: Case = Case(150, 200, 400, 3000, 0.97, 128, 1e-2, 10)
    names: tuple[str, ...] = ("normal", "variance", "fixed", "field")
    seeds: int = 5
    seed: int = 0


_TINY = Case(20, 100, 200, 2000, 0.9)
PRESETS = {
    "smoke": Config(_TINY, _TINY, _TINY, dataclasses.replace(_TINY, n_pix=16), ("variance", "field"), 1),
    "paper": Config(),
}
SIDE = 10  # draws of a normal


def wavenumbers(n_pix: int) -> np.ndarray:
    """|k| of every mode of the grid, in radians per pixel."""
    one = 2 * np.pi * np.fft.fftfreq(n_pix)
    return np.hypot(one[:, None], one[None, :])


def amplitude(theta, n_pix: int):
    """Square root of P = A k^-B on the grid, zero at k = 0."""
    k = wavenumbers(n_pix)
    log_k = jnp.asarray(np.log(np.where(k > 0, k, 1.0)), theta.dtype)
    return jnp.sqrt(theta[0]) * jnp.exp(-theta[1] / 2 * log_k) * (k > 0)


def field_information(n_pix: int, theta=(1.0, 0.5), noise: float = 0.0) -> np.ndarray:
    """Exact Fisher matrix of the Gaussian field: n² - 1 independent real modes of variance P + σ², all quadrants."""
    k = wavenumbers(n_pix)
    log_k = np.log(k[k > 0])
    power = theta[0] * np.exp(-theta[1] * log_k)
    slope = np.stack([np.full_like(log_k, 1 / theta[0]), -log_k]) * power / (power + noise**2)
    return 0.5 * slope @ slope.T


def bands(n_pix: int, n_bands: int) -> np.ndarray:
    """Overlapping triangles in ln k on the quadrant, of sum one at every k but zero: `(m, m, n_bands)`."""
    half = n_pix // 2 + 1
    k = wavenumbers(n_pix)[:half, :half]
    inside = k > 0
    log_k = np.log(np.where(inside, k, 1.0))
    knots = np.linspace(log_k[inside].min(), log_k[inside].max(), n_bands)
    return np.maximum(0, 1 - np.abs(log_k[..., None] - knots) / (knots[1] - knots[0])) * inside[..., None]


class Bands(eqx.Module):
    """Power of the modes in units of the fiducial one, summed in overlapping triangular windows of ln k.

    A line through the outputs weighs modes by a piecewise linear function of ln k, as the score of a power law does.
    """

    windows: Array

    def __init__(self, n_pix: int, fiducial, n_bands: int = 8):
        half, windows = n_pix // 2 + 1, bands(n_pix, n_bands)
        weight = np.asarray(mode_weights(n_pix))[..., None]
        windows /= np.sqrt(2 * np.sum(weight * windows**2, (0, 1)))  # unit scatter in a Gaussian field
        power = np.asarray(amplitude(jnp.asarray(fiducial), n_pix))[:half, :half] ** 2
        power[0, 0] = 1.0  # k = 0, which no window has
        self.windows = jnp.asarray((windows / power[..., None]).reshape(-1, n_bands), jnp.float32)

    def __call__(self, modes):
        return fold(modes**2).sum((0, 1)).ravel() @ jax.lax.stop_gradient(self.windows)


class BandPowers(eqx.Module):
    """The network of the field, an informed one: band powers, then a line and a small MLP."""

    bands: Bands
    line: eqx.nn.Linear
    rest: eqx.nn.MLP

    def __init__(self, n_pix: int, fiducial, key):
        self.bands = Bands(n_pix, fiducial)
        size, keys = self.bands.windows.shape[1], jax.random.split(key)
        self.line = eqx.nn.Linear(size, 2, key=keys[0])
        self.rest = eqx.nn.MLP(size, 2, 8, 1, jax.nn.silu, key=keys[1])

    def __call__(self, modes):
        y = self.bands(modes)
        return self.line(y) + self.rest(y / 10)


def problem(name: str, case: Case, key) -> tuple[Callable, eqx.Module, np.ndarray, np.ndarray]:
    """(simulate, network, fiducial, exact Fisher matrix)."""
    mlp = lambda m: eqx.nn.MLP(SIDE, m, 64, 2, jax.nn.silu, key=key)  # noqa: E731
    white = lambda k, *shape: jax.random.normal(k, shape)  # noqa: E731
    if name in ("normal", "fixed"):
        simulate = lambda t, k: t[0] + jnp.sqrt(t[1]) * white(k, SIDE)  # noqa: E731
        return simulate, mlp(2), np.array([0.0, 1.0]), np.diag([SIDE, SIDE / 2])
    if name == "variance":
        return lambda t, k: jnp.sqrt(t[0]) * white(k, SIDE), mlp(1), np.array([1.0]), np.array([[SIDE / 2]])
    n, fiducial = case.n_pix, np.array([1.0, 0.5])
    return lambda t, k: amplitude(t, n) * white(k, n, n), BandPowers(n, fiducial, key), fiducial, field_information(n)


def information_by_score(t, score, exact) -> np.ndarray:
    r"""Fisher matrix of summaries `t (n, m)`, with little noise, where the `score (n, p)` and its covariance are known.

    The mean's derivative is $E[t s^T]$. With $t = \beta s + \epsilon$, ε uncorrelated with s, it is $\beta F$, and
    $C = \beta F \beta^T + \mathrm{Cov}(\epsilon)$: the score is a control variate, only what t lacks is sampled.
    """
    t, score = t - t.mean(0), score - score.mean(0)
    slope = np.linalg.lstsq(score, t, rcond=None)[0].T
    rest = t - score @ slope.T
    covariance = slope @ exact @ slope.T + rest.T @ rest / (len(t) - 1 - score.shape[1])
    derivative = slope @ exact
    return derivative.T @ np.linalg.solve(covariance, derivative)


def field_score(modes, theta, n_pix: int):
    """Score of the Gaussian field: half the sum over modes of (power over its mean - 1) times the slope of ln P."""
    k = wavenumbers(n_pix)
    log_k = jnp.asarray(np.log(np.where(k > 0, k, 1.0)), modes.dtype)
    excess = jnp.where(k > 0, modes**2 / jnp.maximum(amplitude(theta, n_pix) ** 2, 1e-30) - 1, 0.0)
    return 0.5 * jnp.stack([jnp.sum(excess) / theta[0], -jnp.sum(excess * log_k)])


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `information.json`, print the table."""
    run = start_run(out, {"name": "imnn"} | dataclasses.asdict(cfg), ("network", "fit"))
    rows = []
    for name in cfg.names:
        for seed in range(cfg.seeds):
            path = out / "fits" / f"{name}_{seed}.json"
            if not path.exists():
                print(path.stem, flush=True)
                write_json(path, _fit(cfg, run, name, seed))
            rows.append(read_json(path) | dict(name=name, seed=seed))
    write_json(out / "information.json", dict(rows=rows))
    print(f"\ndet F on new simulations, its share of the exact one, mean ± standard error of {cfg.seeds} seeds")
    for name in dict.fromkeys(row["name"] for row in rows):
        share = [row["det"] / row["exact"] for row in rows if row["name"] == name]
        dets = ", ".join(f"{row['det']:.4g}" for row in rows if row["name"] == name)
        exact = next(row["exact"] for row in rows if row["name"] == name)
        print(f"{name:10} {np.mean(share):.4f} ± {standard_error(share):.4f} of {exact:.5g}: {dets}")


def det_history(fitted) -> dict:
    """det F at every validation of a fit, for the figures."""
    history = fitted.panels()["det F"][0]
    return {k: np.asarray(history[k]).tolist() for k in ("train", "validation", "best_epoch")}


def _fit(cfg: Config, run, name: str, seed: int) -> dict:
    case: Case = getattr(cfg, name)
    key_network, key_fit = (jax.random.fold_in(run.key(k), seed) for k in ("network", "fit"))
    simulate, network, fiducial, exact = problem(name, case, key_network)
    key = jax.random.fold_in(key_fit, 1) if name == "fixed" else None
    sizes = dict(n_s=case.n_s, n_validation=case.n_validation, key=key)
    imnn = IMNN.from_simulator(network, simulate, fiducial, **sizes)
    every = case.steps // min(case.steps, case.validations)
    settings = dict(max_iterations=case.steps, patience=max(2, case.steps // 3), validate_every=every)
    settings |= dict(average=case.average, keep="last" if name == "fixed" else "best", learning_rate=case.learning_rate)
    start = time.perf_counter()
    fitted = imnn.fit(key_fit, n_refit=case.n_refit, **settings)
    row = dict(det=fitted.det_fisher, log_det_error=fitted.log_det_error, seconds=time.perf_counter() - start)
    if name == "field":
        theta = jnp.asarray(fiducial, jnp.float32)

        def both(key):
            modes = simulate(theta, key)
            return fitted.network(modes), field_score(modes, theta, case.n_pix)

        keys = jax.random.split(jax.random.fold_in(key_fit, 2), case.n_refit)
        t, score = (np.asarray(a, float) for a in jax.jit(lambda k: jax.lax.map(both, k, batch_size=50))(keys))
        row |= dict(det_sampled=row["det"], det=float(np.linalg.det(information_by_score(t, score, exact))))
    row |= det_history(fitted)
    if name == "fixed":
        row["best_epoch"] = len(row["train"])  # the last weights are kept
    return row | dict(exact=float(np.linalg.det(exact)), every=every)


if __name__ == "__main__":
    command_line(main, PRESETS, "imnn")
