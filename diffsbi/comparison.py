"""Several posteriors of one observation side by side, the full field as the yardstick where there is one."""

from collections.abc import Mapping, Sequence

import numpy as np

from diffsbi import diagnostics
from diffsbi.prior import Prior

METHODS = {
    "power_spectrum": "Power spectrum (NUTS)",
    "npe": "NPE",
    "npe_score": "NPE with scores",
    "gaussian_field": "Gaussian field (NUTS)",
    "path": "Path sampling",
    "full_field": "Full field",
}
REFERENCE = "full_field"
_LEVEL = 0.01  # rate of false alarms that an observation is unlike the simulations
_LEAST_TO_TEST = 100

__all__ = [
    "METHODS", "REFERENCE", "compare_posteriors", "dropped", "outside_training", "prior_bounds", "unconverged",
]  # fmt: skip


def compare_posteriors(
    samples: Mapping[str, np.ndarray],
    accounts: Mapping[str, Mapping],
    names: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    *,
    n_samples: int = 2000,
    seed: int = 0,
) -> dict:
    """Means, widths and figures of merit of every method, and its distance from the reference, as JSON values.

    Args:
        samples: Method → draws `(chains, draws, p)`.
        accounts: Method → its account; `"ess"`, by parameter, where the draws are a Markov chain's.
        names: The p parameters.
        pairs: Parameters of the figures of merit.
        n_samples: Most draws of each posterior for the classifier.
        seed: Of the classifier.
    """
    reference = REFERENCE if REFERENCE in samples else None
    rows: dict[str, dict] = {}
    warnings: list[str] = []
    for name, theta in samples.items():
        moments = diagnostics.moments(_flat(theta), names)
        merit = diagnostics.figure_of_merit(_flat(theta), names, pairs)
        rows[name] = {
            "mean": moments.mean.tolist(),
            "std": moments.std.tolist(),
            "figure_of_merit": {",".join(pair): value for pair, value in merit.items()},
            "account": dict(accounts[name]),
        }
        if reference not in (None, name):
            ess = [accounts[m].get("ess") for m in (name, reference)]
            both = theta, samples[reference]
            rows[name]["distance"] = _moment_distance(*both, ess, names)
            rows[name]["distance"] |= _classifier_distance(*both, ess, n_samples, seed)
            if "too_few" in rows[name]["distance"]:
                warnings.append(f"{METHODS.get(name, name)}: no C2ST; {rows[name]['distance']['too_few']}")
    return {"names": list(names), "methods": rows, "reference": reference, "warnings": warnings}


def unconverged(accounts: Mapping[str, Mapping], max_rhat: float) -> list[str]:
    """A warning for every parameter whose chains disagree, and for divergent trajectories."""
    found = []
    for method, account in accounts.items():
        title = METHODS.get(method, method)
        for name, rhat in account.get("rhat", {}).items():
            if not rhat < max_rhat:
                found.append(f"{title}: not converged; R-hat of {name} is {rhat:.3f}, expected below {max_rhat:g}.")
        if account.get("divergences"):
            found.append(f"{title}: {account['divergences']} divergent trajectories.")
        if account.get("cut_short"):
            found.append(
                f"{title}: {account['cut_short']} trajectories were cut short at the sampler's limit of steps."
            )
    return found


def dropped(n: int) -> list[str]:
    """A warning if simulations were left out of the training."""
    return [f"{n} non-finite simulations were dropped from the training: the posterior may be biased."] * (n > 0)


def outside_training(names, observed, t) -> list[str]:
    """A warning for every observed summary beyond those of the training simulations, and where all together are far."""
    low, high = t.min(0), t.max(0)
    found = [
        f"summary of {name}: the observed {value:.4g} lies outside the simulated range [{a:.4g}, {b:.4g}]; "
        "the neural posterior extrapolates there."
        for name, value, a, b in zip(names, observed, low, high, strict=True)
        if not a <= value <= b
    ]
    if len(t) < _LEAST_TO_TEST:
        return found
    together = diagnostics.misspecification(t, observed, names=[f"summary of {name}" for name in names], level=_LEVEL)
    return [*found, together.warning] if together.misspecified else found


def prior_bounds(prior: Prior) -> dict[str, list[float | None]]:
    """Lower and upper end of every parameter's support, None where it is open."""

    def ends(support):
        return [None if (end := getattr(support, side, None)) is None else float(end) for side in _SIDES]

    return {name: ends(d.support) for name, d in zip(prior.names, prior.distributions, strict=True)}


_SIDES = ("lower_bound", "upper_bound")


def _moment_distance(a, b, ess, names) -> dict:
    sizes = [None if e is None else np.array([e[name] for name in names]) for e in ess]
    shift = diagnostics.compare_moments(_flat(a), _flat(b), names, ess_a=sizes[0], ess_b=sizes[1])
    values = {
        "mean_shift": shift.shift,
        "mean_shift_error": shift.shift_error,
        "width_ratio": shift.width_ratio,
        "width_ratio_error": shift.width_error,
    }
    return {key: dict(zip(names, map(float, value), strict=True)) for key, value in values.items()}


def _classifier_distance(a, b, ess, n_samples: int, seed: int) -> dict:
    draws = [_independent(theta, e, n_samples) for theta, e in zip((a, b), ess, strict=True)]
    try:
        test = diagnostics.c2st(*draws, seed=seed, duplicates="drop")
    except ValueError as error:
        return {"too_few": str(error)}
    return {"c2st": test.value, "c2st_error": test.error, "draws": test.n}


def _independent(theta: np.ndarray, ess: Mapping | None, most: int) -> np.ndarray:
    """Draws thinned to their effective number: a classifier learns the clumps of a chain's neighbours by heart."""
    flat = _flat(theta)
    n = min(most, len(flat), len(flat) if ess is None else int(min(ess.values())))
    return flat[np.linspace(0, len(flat) - 1, max(n, 1)).round().astype(int)]


def _flat(theta: np.ndarray) -> np.ndarray:
    return theta.reshape(-1, theta.shape[-1])
