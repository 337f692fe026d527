"""What experiments on lensing maps share: the compression, and summaries of many simulations."""

from pathlib import Path

import jax
import numpy as np

from diffsbi import summaries


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
