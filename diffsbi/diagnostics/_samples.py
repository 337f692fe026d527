"""Checks on arrays of draws, shared by the diagnostics."""

import numpy as np

from diffsbi._types import check_finite


def as_draws(name: str, samples, least: int = 2) -> np.ndarray:
    """`samples` as a finite float64 array `(n, p)` with n >= `least`."""
    samples = np.asarray(samples, np.float64)
    if samples.ndim != 2 or samples.shape[0] < least or samples.shape[1] < 1:
        raise ValueError(f"Expected {name} with shape (n >= {least}, p >= 1); got {samples.shape}.")
    check_finite(name, samples)
    return samples


def check_same_width(a: np.ndarray, b: np.ndarray) -> None:
    """Raise `ValueError` unless both have the same number of parameters."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Expected draws of the same parameters; got {a.shape[1]} and {b.shape[1]} columns.")


def check_names_fit(names, samples: np.ndarray) -> tuple[str, ...]:
    """`names` as a tuple, one for each column."""
    names = tuple(names)
    if len(names) != samples.shape[1] or len(set(names)) != len(names):
        raise ValueError(f"Expected {samples.shape[1]} different names, one for each column; got {list(names)}.")
    return names
