"""How much Fisher information do compressed lensing maps keep, by loss and by how many simulations the loss had?

Small LSST-Y10 maps. Networks are trained as in `experiments.compressors`, on simulations with parameters from the
power-spectrum posterior of one map; "imnn" and "score_at_centre" (the score regressed where all simulations have the
same parameters) on as many at its centre. F = dmu^T C^-1 dmu of the compressed numbers is measured at that centre, on
simulations that no network saw, the derivatives by pairs with the same seeds; with it goes the F of the data
themselves, from scores (`marginal_information`), which no summary can exceed.

F counts with the prior's: information is ln det(F + P) / 2 - ln det(P) / 2 in nats, P the precision of the prior's
draws. It is a normal's: numbers whose law is none know more than it says.
"""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import eigh

from diffsbi._files import load_npz, write_json, write_npz
from diffsbi.compression import marginal_information
from diffsbi.compression.information import information, jackknife_error
from diffsbi.compression.marginal_information import JACKKNIFE
from experiments import command_line, compressors
from experiments.compressors import AT_CENTRE, FREE, LOSSES, SCORED, compressor, scores_of
from experiments.curves import print_table
from experiments.lensing import observe, spectrum_proposal

STAGES = ("observed", "spectrum", "full", "test", "simulations", "scores", "derivatives", "network", "compress", "fits")
PAIRS_APART = 0.2  # widths of the proposal, between the two of a pair


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(compressors.Config):
    """`n_full`: simulations for the data's own F, whose chains of `full_average` turns forget within `full_gap`.

    `n_test`, `n_pairs`: simulations for F of the numbers, and for its derivatives.
    """

    n_pix: int = 32
    compressors: tuple[str, ...] = (*LOSSES, AT_CENTRE, *FREE)
    n: tuple[int, ...] = (250, 1000, 4000, 10_000)
    n_test: int = 2000
    n_pairs: int = 300
    n_full: int = 2000
    full_average: int = 24
    full_gap: int = 8
    full_steps: int = 3
    steps: int = 2000
    imnn_steps: int = 40


PRESETS = {
    "smoke": Config(
        n_pix=16, compressors=("mse", AT_CENTRE, "latent_scores"), n=(60, 120), n_test=60, n_pairs=20, n_full=20,
        full_average=4, full_gap=2, full_steps=1, seeds=1, channels=(4, 4), n_average=1, steps=4, max_epochs=2,
        n_warmup=20, n_chains=2, n_spectrum=10,
    ),
    "paper": Config(),
}  # fmt: skip


def main(cfg: Config, out: Path) -> None:
    """Run what is missing, write `information.json`, print the table."""
    unknown = set(cfg.compressors) - {*LOSSES, AT_CENTRE, *FREE}
    if unknown:
        raise ValueError(f"Expected compressors among {(*LOSSES, AT_CENTRE, *FREE)}; got {sorted(unknown)}.")
    sim, run, x = observe(cfg, "information", out, STAGES)
    proposal = spectrum_proposal(cfg, sim, x, run)
    centre = sim.prior.from_unconstrained(proposal.loc)
    precision = np.linalg.inv(np.cov(np.asarray(sim.prior.sample(run.key("full"), (10_000,)), float).T))
    run.once("full", lambda folder: _full(cfg, sim, centre, run, folder))
    full = _measured(load_npz(run.path("full", "fisher.npz")), precision)
    print(f"The data themselves: {full['nats']:.2f} ± {full['error']:.2f} nats")
    rows, test = [], None
    for n, seed in itertools.product(cfg.n, range(cfg.seeds)):
        data = None
        for name in cfg.compressors:
            if name in FREE and (n, seed) != (min(cfg.n), 0):
                continue  # uses no simulation
            path = out / "fits" / f"{name}_{n}_{seed}.npz"
            if not path.exists():
                test = _test(cfg, sim, proposal, run) if test is None else test
                data = _rows(cfg, sim, proposal, run, seed) if data is None and name not in FREE else data
                print(path.stem, flush=True)
                compress = _compress(cfg, sim, proposal, run, data, name, n, seed)
                write_npz(path, _fisher(compress, *test))
            row = dict(compressor=name, n=n, seed=seed) | _measured(load_npz(path), precision)
            rows.append(row | {"share": row["nats"] / full["nats"]})
    write_json(out / "information.json", dict(rows=rows, full=full, n_pix=cfg.n_pix))
    for value, title in {"nats": "Information, nats", "share": "Share of the data's own"}.items():
        print(f"\n{title}: mean and standard error over {cfg.seeds} seeds (numbers without training: once)")
        print_table(rows, ("compressor",), value)
    errors = sorted(row["error"] for row in rows)
    print(f"Of the measurement, mostly common to all of them: ± {errors[0]:.2f} to {errors[-1]:.2f} nats")


def _full(cfg: Config, sim, centre, run, folder: Path) -> dict:
    """F of the data at the centre."""
    settings = dict(n_average=cfg.full_average, gap=cfg.full_gap, n_steps=cfg.full_steps)
    found = marginal_information(sim, run.key("full"), centre, n=cfg.n_full, progress=True, **settings)
    write_npz(folder / "fisher.npz", {"fisher": found.fisher, "without": found.without})
    return {"simulations": cfg.n_full, "gradients": cfg.n_full * found.gradients}


def _nats(fisher, precision) -> float:
    """Directions of which an estimate without bias says less than nothing count as nothing."""
    return float(np.sum(np.log1p(np.maximum(eigh(fisher, precision, eigvals_only=True), 0)))) / 2


def _measured(found: dict, precision) -> dict[str, float]:
    """Nats, and their standard error by a jackknife."""
    error = jackknife_error(np.array([_nats(fisher, precision) for fisher in found["without"]]))
    return dict(nats=_nats(found["fisher"], precision), error=float(error))


def _rows(cfg: Config, sim, proposal, run, seed: int) -> dict:
    """Training rows of one seed: from the proposal ("near"), and `AT_CENTRE`, where all are at its centre."""
    key, most = jax.random.fold_in(run.key("simulations"), seed), max(cfg.n)
    key_theta, key_near, key_centre = jax.random.split(key, 3)

    def rows(key, theta, place: int, scored: bool) -> dict:
        score = scores_of(cfg, sim, run, 2 * seed + place, key, theta) if scored else None
        x = np.asarray(sim.draw(key, most, theta, with_score=False).x)
        return dict(theta=np.asarray(theta), x=(x,), score=score)

    theta = proposal.sample(key_theta, (most,))
    data = {"near": rows(key_near, theta, 0, bool(set(SCORED) & set(cfg.compressors)))}
    if AT_CENTRE in cfg.compressors:
        centre = sim.prior.from_unconstrained(proposal.loc)
        data[AT_CENTRE] = rows(key_centre, jnp.tile(centre, (most, 1)), 1, True)
    return data


def _compress(cfg: Config, sim, proposal, run, data, name: str, n: int, seed: int) -> Callable:
    """Maps → numbers, by `name` from n simulations."""
    train = None if name in FREE else data[name if name == AT_CENTRE else "near"]
    compress, _, _ = compressor(cfg, sim, proposal, run, train, name, n, seed)
    return lambda x: np.asarray(compress((x,)))


def _test(cfg: Config, sim, proposal, run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps at the centre `(n_test, ...)`, pairs about it `(p, 2, n_pairs, ...)`, and theta's steps `(p,)`."""
    key, key_pairs, key_widths = jax.random.split(run.key("test"), 3)
    centre = sim.prior.from_unconstrained(proposal.loc)
    widths = np.std(np.asarray(proposal.sample(key_widths, (1000,))), axis=0)

    def at(theta, key, count: int) -> np.ndarray:
        return np.asarray(sim.draw(key, count, jnp.tile(theta, (count, 1)), with_score=False).x)

    half = PAIRS_APART / 2 * jnp.diag(jnp.asarray(widths, centre.dtype))
    pairs = np.stack([[at(centre + sign * step, key_pairs, cfg.n_pairs) for sign in (-1, 1)] for step in half])
    return at(centre, key, cfg.n_test), pairs, PAIRS_APART * widths


def _fisher(compress: Callable, x: np.ndarray, pairs: np.ndarray, steps: np.ndarray) -> dict[str, np.ndarray]:
    """F of the compressed numbers without its bias, of all rows and without each block of them."""
    flat = pairs.reshape(-1, *x.shape[1:])
    t = np.asarray(compress(x), float)
    below, above = np.moveaxis(np.asarray(compress(flat), float).reshape(*pairs.shape[:3], -1), 1, 0)
    dt = np.moveaxis((above - below) / steps[:, None, None], 0, -1)
    blocks = np.arange(len(t)) % JACKKNIFE, np.arange(len(dt)) % JACKKNIFE
    without = [information(t[blocks[0] != k], dt[blocks[1] != k], np).unbiased for k in range(JACKKNIFE)]
    return dict(fisher=information(t, dt, np).unbiased, without=np.stack(without))


if __name__ == "__main__":
    command_line(main, PRESETS, "information")
