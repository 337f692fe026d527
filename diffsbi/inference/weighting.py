r"""Weights of an ensemble's members from rows that each of them did not train on."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.inference.posterior import Member

_DEEPEST = 10.0  # nats below a row's best at which a member's log-density is cut: one row must not decide
_PRIOR_ROWS = 10.0  # rows that each member is given before any is seen: some tens of rows tell good members apart badly
_FAILED = 0.05  # members that answer for less than this fraction of their share are left out
_STEPS = 500


def validation_weights(fits: Sequence[tuple[Member, np.ndarray]], of, given) -> list[float]:
    """`stacking_weights` of fitted members, each with the indices of its held-out rows among `of`, `given`."""
    values = np.stack([_log_prob(member, jnp.asarray(of), jnp.asarray(given)) for member, _ in fits], 1)
    held_out = np.zeros(values.shape, bool)
    for k, (_, index) in enumerate(fits):
        held_out[index, k] = True
    return stacking_weights(values, held_out).tolist()


@eqx.filter_jit
def _log_prob(member: Member, of: Array, given: Array) -> Array:
    return member.log_prob(of, given)


def check_fitted(histories) -> None:
    """Raise where no member has had a finite loss, before any step or after."""
    if all(h.best_epoch == 0 and not np.isfinite(h.first_validation) for h in histories):
        losses = ", ".join(f"{h.first_validation:g}" for h in histories)
        raise ValueError(
            f"Expected a finite loss; before the first step it was {losses} (a value for each member), and it stayed "
            "so. Look for outliers in theta, x and score."
        )


def stacking_weights(log_prob: Float[Array, "n m"], held_out) -> np.ndarray:
    r"""Weights $w$ of the mixture $\sum_k w_k q_k$, `(m,)`, summing to one; zero for members that failed.

    Stacking (Yao et al. 2018, arXiv:1704.02030) maximises $\sum_i \log \sum_k w_k q_k(i)$ over rows that no member has
    seen. Here a row was held out by few members, and the values of different members on different rows cannot be
    compared: rows differ more than members do. So the table $\ell_{ik} = \log q_k(i)$ is read as
    $a_i + b_k + o_k [k \mathrm{\ trained\ on\ } i]$ plus noise. The $b_k$ (how good a member is) and $o_k$ (how much
    better it looks on rows that it has seen) are fitted by least squares, in which the rows' $a_i$ cancel; the $b_k$
    are shrunk by their errors e to $b_k \tau^2/(\tau^2 + e^2)$, with $\tau^2$ their scatter beyond twice what errors
    explain; each $\ell_{ik}$ is corrected to what an unseen row would have given; and the rows that somebody held out
    are stacked, with ten more rows for each member, so that equally good members keep nearly equal weights.

    Args:
        log_prob: $\ell_{ik}$ of all rows under all members.
        held_out: True where member k did not train on row i, `(n, m)`.

    Raises:
        ValueError: If the shapes differ, or a member held out no row.
    """
    value, held_out = np.asarray(log_prob, float), np.asarray(held_out, bool)
    if value.ndim != 2 or value.shape != held_out.shape or not held_out.any(0).all():
        got = f"{value.shape} and {held_out.shape}, held out {held_out.sum(0).tolist()}"
        raise ValueError(
            f"Expected log_prob and held_out of one shape (n, m), every member with held-out rows; got {got}."
        )
    usable = np.isfinite(value).all(0)
    if not usable.any():
        raise ValueError("Expected a member with finite log-densities at all rows; got none.")
    weights = np.zeros(len(usable))
    weights[usable] = _stacked(_as_unseen(value[:, usable], held_out[:, usable]))
    return weights


def _as_unseen(value: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The values at the rows that were held out, each as if its member had not trained on that row."""
    value = np.maximum(value, value.max(1, keepdims=True) - _DEEPEST)
    good, optimism, error = _two_way(value, held_out)
    scatter = max(0.0, good.var() - 2 * np.mean(error**2))  # chance alone exceeds the errors half of the time
    shrunk = good * scatter / (scatter + error**2) if scatter > 0 else np.zeros_like(good)
    corrected = value + np.where(held_out, shrunk - good, shrunk - good - optimism)
    return corrected[held_out.any(1)]


def _two_way(value: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares b (of zero mean), o, and the standard errors of b; the rows' own levels are projected out."""
    n, m = value.shape
    design = np.concatenate([np.broadcast_to(np.eye(m), (n, m, m)), np.eye(m) * ~held_out[:, :, None]], -1)
    centred = (design - design.mean(1, keepdims=True)).reshape(n * m, 2 * m)
    response = (value - value.mean(1, keepdims=True)).reshape(n * m)
    inverse = np.linalg.pinv(centred.T @ centred, rcond=1e-10, hermitian=True)
    fitted = inverse @ (centred.T @ response)
    # Rows are the independent unit (White's estimate).
    by_row = np.einsum("ikj,ik->ij", centred.reshape(n, m, 2 * m), (response - centred @ fitted).reshape(n, m))
    covariance = inverse @ (by_row.T @ by_row) @ inverse
    difference = np.eye(m) - 1 / m
    error = np.sqrt(np.maximum(np.diag(difference @ covariance[:m, :m] @ difference.T), 0))
    return fitted[:m] - fitted[:m].mean(), fitted[m:], error


def _stacked(value: np.ndarray) -> np.ndarray:
    """Expectation-maximisation for the weights of fixed densities, from equal ones."""
    n, m = value.shape
    density = np.exp(value - value.max(1, keepdims=True))
    weights = np.full(m, 1 / m)
    for _ in range(_STEPS):
        share = density * weights
        share = (share / share.sum(1, keepdims=True)).sum(0)
        weights = (share + _PRIOR_ROWS) / (n + m * _PRIOR_ROWS)
    weights = np.where(share < _FAILED * n / m, 0.0, weights)
    return weights / weights.sum()
