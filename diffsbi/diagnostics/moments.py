r"""Means, widths and the figure of merit of posterior draws."""

import itertools
from collections.abc import Sequence

import equinox as eqx
import numpy as np

from diffsbi._types import check_names
from diffsbi.diagnostics._samples import as_draws, check_names_fit, check_same_width


class Moments(eqx.Module):
    """Mean `(p,)`, standard deviation `(p,)` and covariance `(p, p)` of `n` draws."""

    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    cov: np.ndarray
    n: int


class MomentShift(eqx.Module):
    r"""How posterior a differs from posterior b, each of shape `(p,)`.

    Args:
        names: The parameters.
        shift: $(\bar\theta_a - \bar\theta_b) / \sigma_b$.
        shift_error: Its Monte-Carlo standard error.
        width_ratio: $\sigma_a / \sigma_b$.
        width_error: Its Monte-Carlo standard error, for nearly Gaussian marginals.
    """

    names: tuple[str, ...]
    shift: np.ndarray
    shift_error: np.ndarray
    width_ratio: np.ndarray
    width_error: np.ndarray


def moments(samples, names: Sequence[str]) -> Moments:
    """Mean, standard deviation and covariance of draws `(n, p)`.

    Raises:
        ValueError: If there are fewer than two draws, one is not finite, or the names do not fit the columns.
    """
    samples = as_draws("samples", samples)
    names = check_names_fit(names, samples)
    cov = np.atleast_2d(np.cov(samples.T))
    return Moments(names, samples.mean(0), np.sqrt(np.diag(cov)), cov, len(samples))


def compare_moments(samples_a, samples_b, names: Sequence[str], *, ess_a=None, ess_b=None) -> MomentShift:
    """Shift of the means in units of σ_b and ratio of the widths, with Monte-Carlo errors.

    Args:
        samples_a: Draws `(n_a, p)` of the posterior to be judged.
        samples_b: Draws `(n_b, p)` of the reference.
        names: One name for each column.
        ess_a: Effective number of draws in a, one number or `(p,)`; all of them if left out (independent draws).
        ess_b: Likewise for b.

    Raises:
        ValueError: As `moments`, and if a column of `samples_b` is constant.
    """
    a, b = moments(samples_a, names), moments(samples_b, names)
    check_same_width(a.cov, b.cov)
    if not (b.std > 0).all():
        raise ValueError(f"Expected samples_b that vary; got constant {b.names[int(np.argmin(b.std))]}.")
    n_a = np.broadcast_to(a.n if ess_a is None else ess_a, a.std.shape)
    n_b = np.broadcast_to(b.n if ess_b is None else ess_b, b.std.shape)
    ratio = a.std / b.std
    shift_error = np.sqrt(ratio**2 / n_a + 1 / n_b)
    return MomentShift(a.names, (a.mean - b.mean) / b.std, shift_error, ratio, ratio * np.sqrt(0.5 / n_a + 0.5 / n_b))


def figure_of_merit(
    samples, names: Sequence[str], pairs: Sequence[tuple[str, str]] | None = None
) -> dict[tuple[str, str], float]:
    r"""$1/\sqrt{\det C}$ of the 2-d covariance of each pair of parameters; all pairs if none are named.

    Raises:
        ValueError: As `moments`, if a name is unknown, or if two parameters of a pair determine each other.
    """
    m = moments(samples, names)
    merits = {}
    for first, second in itertools.combinations(m.names, 2) if pairs is None else pairs:
        check_names((first, second), m.names)
        index = [m.names.index(first), m.names.index(second)]
        determinant = np.linalg.det(m.cov[np.ix_(index, index)])
        if not determinant > 1e-14 * np.prod(np.diag(m.cov)[index]):
            raise ValueError(f"Expected two parameters that vary independently; got {(first, second)}.")
        merits[first, second] = float(1 / np.sqrt(determinant))
    return merits
