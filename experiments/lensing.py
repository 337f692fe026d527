"""What experiments on lensing maps share: chains of one map, the score compression, summaries, distances."""

from pathlib import Path

import jax
import numpy as np

from diffsbi import summaries
from diffsbi.diagnostics import c2st, compare_moments
from diffsbi.sampling import full_field_posterior, power_spectrum_posterior


def reference(sim, x, key, folder: Path, **settings) -> dict:
    """Write the full-field chains of one map to `folder`, block by block; return their account."""
    chains = full_field_posterior(sim, x, key, folder=folder / "blocks", progress=True, **settings)
    chains.save(folder)
    return {"gradients": chains.gradients}


def spectrum(sim, x, key, folder: Path) -> dict:
    """Write the chains of the map's power spectra to `folder`."""
    power_spectrum_posterior(sim, x, key, progress=True).save(folder)
    return {}


def compress(sim, statistics, key, folder: Path, n_covariance: int, n_derivative: int) -> dict:
    """Write the score compression of `statistics` at the fiducial to `folder`; return its account."""
    compression = summaries.score_compression(
        statistics, lambda theta, key: sim.draw_one(key, theta)[2], sim.fiducial, key,
        n_covariance=n_covariance, n_derivative=n_derivative, progress=True,
    )  # fmt: skip
    compression.save(folder / "compression.npz")
    return {"simulations": compression.n_simulations}


def summarised(sim, summary, key, n: int, theta=None) -> np.ndarray:
    """Summaries `(n, d)` of simulations without scores; theta is None, one vector, or one for each row."""
    parts = []
    for start in range(0, n, 500):
        count = min(500, n - start)
        rows = theta[start : start + count] if np.ndim(theta) == 2 else theta
        draws = sim.draw(key, count, rows, with_score=False, start=start)
        parts.append(np.asarray(jax.lax.map(summary, draws.x)))
        print(f"simulations without scores: {start + count} of {n}", flush=True)
    return np.concatenate(parts)


def distances(theta, references: dict[str, np.ndarray], names, seed: int) -> dict:
    """C2ST from each of the references; shift and width against the one named "c2st"."""
    moments = compare_moments(theta, references["c2st"], names)
    found = {name: c2st(theta, to, seed=seed, duplicates="drop").value for name, to in references.items()}
    shift, width = (np.asarray(a).tolist() for a in (moments.shift, moments.width_ratio))
    return found | dict(shift=shift, width_ratio=width)
