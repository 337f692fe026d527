r"""Distances of rows from their cloud, shared by the checks of one observation."""

import numpy as np

from diffsbi._types import check_finite
from diffsbi.diagnostics._samples import as_draws, check_names_fit


def checked(simulated, observed, names, least: int):
    """Simulated statistics `(n, d)`, the observed ones `(d,)`, and a name for each column."""
    simulated, observed = as_draws("simulated", simulated, least), np.asarray(observed, np.float64)
    if observed.shape != simulated.shape[1:]:
        raise ValueError(f"Expected observed with shape {simulated.shape[1:]}, as simulated; got {observed.shape}.")
    check_finite("observed", observed)
    names = [f"statistic {i}" for i in range(simulated.shape[1])] if names is None else names
    return simulated, observed, check_names_fit(names, simulated)


def shrunk_correlation(unit: np.ndarray) -> tuple[np.ndarray, float]:
    r"""$(1 - \rho) R + \rho\,1$ of standardised columns, and ρ by Ledoit & Wolf 2004; at least 1e-6."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    rho = max(1e-6, float(ledoit_wolf_shrinkage(unit, assume_centered=True)))
    return (1 - rho) * (unit.T @ unit) / len(unit) + rho * np.eye(unit.shape[1]), rho


def standardised(rows: np.ndarray) -> np.ndarray:
    """Columns of mean zero and variance one; constant ones are zero."""
    deviation = rows.std(0)
    return (rows - rows.mean(0)) / np.where(deviation > 0, deviation, 1.0)


def left_out_distances(rows: np.ndarray) -> np.ndarray:
    r"""Squared Mahalanobis distance of each row from the mean and shrunk covariance of all the others, `(n,)`.

    Units and shrinkage ρ are those of all rows. Leaving a row, $z_i$ from the mean, out is then a change of rank one:
    with $a_i = z_i^T C^{-1} z_i$ the distance is $(\frac{n}{n-1})^2\, a_i / (1 - \frac{1-\rho}{n-1} a_i)$. All rows are
    treated alike: the rank of any of them is uniform where all are of one distribution, whatever that is.
    """
    n, unit = len(rows), standardised(rows)
    correlation, rho = shrunk_correlation(unit)
    inside = np.sum(unit * np.linalg.solve(correlation, unit.T).T, 1)
    return (n / (n - 1)) ** 2 * inside / np.maximum(1 - (1 - rho) / (n - 1) * inside, 1e-12)


def rank_p_value(of_rows: np.ndarray, of_observed: float) -> float:
    r"""$(1 + \#\{d_i \ge d_o\}) / (n + 1)$: uniform over its values where the observed one is a row like the others."""
    return float((1 + np.sum(of_rows >= of_observed)) / (len(of_rows) + 1))
