"""How much of the information in a noisy log-normal field do networks keep? Against the full field's own, by scores.

One field of n² pixels with P_g = A k^-B, made log-normal, under white noise: no closed form is known for its
information. `marginal_information` has it from the simulator's gradients, all latents integrated out. Beside it: the
power spectrum in bands and information maximising networks, both trained and measured on new simulations. The same
estimate for the Gaussian field tests it: that information is known.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

import diffsbi as ds
from diffsbi._files import read_json, write_json
from diffsbi._types import Array
from diffsbi.compression import IMNN, marginal_information
from diffsbi.runs import start_run
from diffsbi.simulators.base import Identity
from diffsbi.simulators.fields import fold, hartley, mode_weights, unfold
from diffsbi.simulators.transport import WienerWhitening
from experiments import command_line
from experiments.curves import standard_error
from experiments.imnn import amplitude, bands, det_history, field_information

FIDUCIAL = {"A": 0.5, "B": 0.5}


@dataclasses.dataclass(frozen=True)
class Config:
    """`n_scores` simulations of `n_average` latents for the full field; `steps` of `n_s` simulations for a network.

    `networks`: the numbers of learned maps at each level of a network; none for the powers alone.
    """

    n_pix: int = 32
    noise: float = 0.5
    n_scores: int = 6000
    n_average: int = 48
    gap: int = 20
    networks: tuple[tuple[int, ...], ...] = ((), (4,))
    steps: int = 300
    n_s: int = 200
    n_validation: int = 1000
    n_refit: int = 20_000
    n_bands: int = 8
    learning_rate: float = 1e-2
    average: float = 0.98
    seeds: int = 5
    seed: int = 0


PRESETS = {
    "smoke": Config(
        n_pix=16, n_scores=60, n_average=6, gap=2, networks=((), (2,)), steps=4, n_s=60, n_validation=60, n_refit=200,
        n_bands=4, average=0.5, seeds=1,
    ),
    "paper": Config(),
}  # fmt: skip


class Spectrum(NamedTuple):
    """What theta fixes: the square root of P_g on the quadrant, and the response of the field to g, one."""

    factor: tuple[tuple[Array]]
    response: Array


class LognormalField(ds.AbstractSimulator):
    r"""$x = e^{g - \sigma_g^2 / 2} - 1 + \sigma\epsilon$, $P_g = A k^{-B}$; `gaussian`: $x = g + \sigma\epsilon$."""

    n_pix: int = eqx.field(static=True)
    noise: float = eqx.field(static=True)
    gaussian: bool = eqx.field(static=True, default=False)
    prior: ds.Prior = ds.Prior({name: dist.Normal(value, 0.3) for name, value in FIDUCIAL.items()})

    def setup(self, theta):
        half = self.n_pix // 2 + 1
        return Spectrum(((amplitude(theta, self.n_pix)[:half, :half],),), jnp.ones(1))

    def latents(self, state):
        return dist.Normal(jnp.zeros((1, self.n_pix, self.n_pix)), 1.0).to_event(3)

    def likelihood(self, state, z):
        root = state.factor[0][0]
        g = hartley(unfold(root[None, None, None] * fold(z)))
        variance = jnp.sum(jnp.asarray(mode_weights(self.n_pix), root.dtype) * root**2) / self.n_pix**2
        return dist.Normal(g if self.gaussian else jnp.expm1(g - variance / 2), self.noise).to_event(3)

    def transports(self):
        return {"white": Identity(), "whitened": WienerWhitening(jnp.full(1, self.noise))}


class Filters(eqx.Module):
    """Isotropic filters with a weight for each window of ln k, then a function of the pixel, a few SiLUs."""

    weights: Array
    inner: Array
    outer: Array

    def __init__(self, key, n_in: int, n_out: int, n_bands: int, hidden: int = 4):
        keys = jax.random.split(key, 3)
        self.weights = (1 + 0.3 * jax.random.normal(keys[0], (n_out, n_in, n_bands))) / n_in**0.5
        self.inner = jax.random.normal(keys[1], (2, n_out, hidden, 1, 1))
        self.outer = jax.random.normal(keys[2], (n_out, hidden, 1, 1)) / hidden**0.5

    def __call__(self, modes, of_k):
        """Modes of maps `(n_in, n, n)` → maps `(n_out, n, n)`; `of_k` are the windows."""
        filters = jnp.einsum("oib,klb->oikl", self.weights, of_k)
        y = hartley(unfold(jnp.einsum("oikl,iabkl->oabkl", filters, fold(modes))))[:, None]
        return jnp.sum(self.outer * jax.nn.silu(self.inner[0] * y + self.inner[1]), 1)


class Network(eqx.Module):
    """Powers in bands, logarithms, then a line and a small MLP: of the field alone, or also of learned maps of it.

    A learned map is filtered, goes pixel by pixel through a learned function, and once more for the second of the
    `levels`; its mean, its power and its correlations with the others are numbers too.
    """

    levels: tuple[Filters, ...]
    line: eqx.nn.Linear
    rest: eqx.nn.MLP
    n_pix: int = eqx.field(static=True)
    n_bands: int = eqx.field(static=True)

    def __init__(self, key, n_pix: int, n_bands: int, widths: tuple[int, ...] = ()):
        self.n_pix, self.n_bands = n_pix, n_bands
        keys = jax.random.split(key, len(widths) + 2)
        ins = (1, *widths)[: len(widths)]
        self.levels = tuple(Filters(k, a, b, n_bands) for k, a, b in zip(keys[2:], ins, widths, strict=True))
        n = 1 + sum(widths)
        size = n_bands * n * (n + 1) // 2 + n - 1
        self.line, self.rest = eqx.nn.Linear(size, 2, key=keys[0]), eqx.nn.MLP(size, 2, 16, 1, jax.nn.silu, key=keys[1])

    def __call__(self, x):
        of_k = jnp.asarray(bands(self.n_pix, self.n_bands), x.dtype)
        last = hartley(x)
        modes, means = [last], []
        for level in self.levels:
            maps = level(last, of_k)
            last = hartley(maps)
            modes.append(last)
            means.append(jnp.mean(maps, (1, 2)))
        quadrants = fold(jnp.concatenate(modes))
        weight = of_k / jnp.sum(jnp.asarray(mode_weights(self.n_pix))[..., None] * of_k, (0, 1), keepdims=True)
        i, j = np.triu_indices(len(quadrants), 1)
        of_band = lambda a: jnp.einsum("ikl,klc->ic", jnp.sum(a, (1, 2)), weight)  # noqa: E731
        own, common = of_band(quadrants**2) + 1e-6, of_band(quadrants[i] * quadrants[j])
        y = jnp.concatenate([jnp.log(own).ravel(), (common / jnp.sqrt(own[i] * own[j])).ravel(), *means])
        return self.line(y) + self.rest(y)


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `information.json`, print the table."""
    run = start_run(out, {"name": "lognormal_field"} | dataclasses.asdict(cfg), ("network", "fit", "scores"))
    full, test = (_full_field(cfg, out / f"{name}.json", run, name) for name in ("lognormal", "gaussian"))
    exact = float(np.linalg.slogdet(field_information(cfg.n_pix, tuple(FIDUCIAL.values()), cfg.noise))[1])
    rows = []
    for widths, seed in itertools.product(cfg.networks, range(cfg.seeds)):
        name = "-".join(map(str, widths)) or "powers"
        path = out / "fits" / f"{name}_{seed}.json"
        if not path.exists():
            print(path.stem, flush=True)
            write_json(path, _fit(cfg, run, widths, seed))
        rows.append(read_json(path) | dict(name=name, seed=seed))
    write_json(out / "information.json", dict(rows=rows, full_field=full, n_pix=cfg.n_pix))
    by_scores = [f"{found['log_det']:.3f} ± {found['log_det_error']:.3f}" for found in (full, test)]
    print(f"\nln det F by scores: {by_scores[0]}; of the Gaussian field {by_scores[1]}, exactly {exact:.3f}")
    print(f"\nln det F on new simulations, det F over the full field's; mean ± standard error of {cfg.seeds} seeds")
    for name in dict.fromkeys(row["name"] for row in rows):
        found = np.log([row["det"] for row in rows if row["name"] == name])
        share = np.exp(found - full["log_det"])
        cells = [f"{np.mean(a):.3f} ± {standard_error(a):.3f}" for a in (found, share)]
        print(f"{name:10} {cells[0]}   {cells[1]}")


def _full_field(cfg: Config, path: Path, run, name: str) -> dict:
    if not path.exists():
        print(f"information of the field, {name}", flush=True)
        sim = LognormalField(n_pix=cfg.n_pix, noise=cfg.noise, gaussian=name == "gaussian")
        key = jax.random.fold_in(run.key("scores"), sim.gaussian)
        sizes = dict(n=cfg.n_scores, n_average=cfg.n_average, gap=cfg.gap)
        found = marginal_information(sim, key, progress=True, **sizes)
        write_json(path, {k: np.asarray(v).tolist() for k, v in found._asdict().items()})
    return read_json(path)


def _fit(cfg: Config, run, widths: tuple[int, ...], seed: int) -> dict:
    key_network, key_fit = (jax.random.fold_in(run.key(k), seed) for k in ("network", "fit"))
    sim = LognormalField(n_pix=cfg.n_pix, noise=cfg.noise)
    network = Network(key_network, cfg.n_pix, cfg.n_bands, widths)
    sizes = dict(n_s=cfg.n_s, n_validation=cfg.n_validation)
    imnn = IMNN.from_simulator(network, lambda theta, key: sim.draw_one(key, theta)[2], sim.fiducial, **sizes)
    every = max(1, cfg.steps // 30)
    settings = dict(max_iterations=cfg.steps, patience=cfg.steps, validate_every=every, average=cfg.average)
    fitted = imnn.fit(key_fit, learning_rate=cfg.learning_rate, n_refit=cfg.n_refit, **settings)
    return det_history(fitted) | dict(det=fitted.det_fisher, log_det_error=fitted.log_det_error, every=every)


if __name__ == "__main__":
    command_line(main, PRESETS, "lognormal_field")
