r"""Are these scores what they are said to be? Identities that the scores of any simulator fulfil."""

import itertools

import jax.numpy as jnp
import numpy as np

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, check_finite
from diffsbi.inference.losses import left_in, likelihood_score, unconstrained
from diffsbi.inference.standardise import ridge_regression, whitening
from diffsbi.inference.tails import REACH, robust_moments
from diffsbi.prior import Prior

SIGNIFICANT = 5.0  # standard errors
_LEAST_ROWS = 50
_LEAST_FOR_PRIOR = 20
_TOO_FAR = 300.0  # robust standard deviations
_COARSE = 0.02  # steps of a float in units of the spread
_OTHER_SCALE = 3.0


def outlier_warnings(x: Float[Array, "n d"], drawn_in: bool = True) -> list[str]:
    """Rows so far from all others that something may be wrong with them; whether they are `drawn_in` (`Tails`)."""
    data, moments = np.asarray(x, float), robust_moments(x)
    distance = moments.distance(data)
    rows = np.flatnonzero((distance > _TOO_FAR).any(1))
    if len(data) < _LEAST_ROWS or not len(rows):
        return []
    row, column = np.unravel_index(int(distance.argmax()), distance.shape)
    done = f"counted in logarithms from {REACH:g} on" + ("" if drawn_in else " in the standardisation, and bounded")
    return [
        f"{len(rows)} of {len(data)} rows of x lie more than {_TOO_FAR:g} robust standard deviations from the median "
        f"(row {row}, column {column}: {data[row, column]:.3g}, the median {moments.centre[column]:.3g}). They are "
        f"{done}, so that they do not decide the fit; x with shorter tails (its logarithm, arcsinh) may say more."
    ]


def precision_warnings(x: Float[Array, "n d"]) -> list[str]:
    """Columns whose spread is lost in the precision of the fit, such as 1e6 plus a few hundredths in float32."""
    data, dtype = np.asarray(x, float), jnp.result_type(float)
    spread = median_and_spread(data)[1]
    step = float(jnp.finfo(dtype).eps) * np.abs(data).max(0)
    coarse = np.flatnonzero((spread > 0) & (step > _COARSE * spread))
    if not len(coarse):
        return []
    j = int(coarse[0])
    return [
        f"{len(coarse)} of {data.shape[1]} columns of x vary by little more than the precision of {dtype.name} (column "
        f"{j}: spread {spread[j]:.3g}, steps of {step[j]:.3g} at {np.abs(data[:, j]).max():.3g}), and are learned as "
        "coarsely: subtract a constant from them."
    ]


def score_warnings(
    names: tuple[str, ...],
    theta: Float[Array, "n p"],
    x: Float[Array, "n d"],
    score: Float[Array, "n p"],
    prior_score: Float[Array, "n p"],
) -> list[str]:
    r"""What is wrong with the scores $s = \nabla_\theta\log p(x, z|\theta)$, in words; empty where nothing is seen.

    Two identities hold for every simulator: $\langle s | \theta \rangle = 0$, so that s does not correlate with the
    prior's gradient; and $\langle s_a f(x) \rangle_{x|\theta} = \partial_a \langle f | \theta \rangle$, so that the
    covariance of $s_a$ with the data follows the data's dependence on parameter a and on no other.

    Nothing is seen where the scores' noise hides it: of white scores with heavy tails (Lotka-Volterra), or of few rows.

    Args:
        names: Names of the parameters.
        theta: Parameters, in a space without bounds.
        x: Data.
        score: Scores without the prior's, in that space.
        prior_score: Gradient of the log-prior in theta, brought to that space as the scores are.
    """
    parameters, data, scores, gradients = (np.asarray(a, float) for a in (theta, x, score, prior_score))
    if len(parameters) < _LEAST_FOR_PRIOR:
        return []
    far = 10 * median_and_spread(scores)[1] + 1e-300
    scores = np.clip(scores, -far, far)
    found = _with_prior(names, scores, gradients)
    if len(parameters) >= max(_LEAST_ROWS, 2 * data.shape[1]):  # fewer suggest another order by chance
        found += _otherwise(names, parameters, data, scores)
    return found


def warnings_of_scores(prior: Prior, theta, x, score) -> list[str]:
    """`score_warnings` of rows with theta and scores as an estimator is given them."""
    theta, score = (jnp.asarray(a, jnp.result_type(float)) for a in (theta, score))
    u, own = unconstrained(prior, theta), likelihood_score(prior, theta, score)
    check_finite("u in unconstrained space", u)
    check_finite("score in unconstrained space", own)
    return score_warnings(prior.names, u, x, own, left_in(prior, theta))


def _responding(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the p uncorrelated combinations of the data that know most of theta: slopes `(p, p)`, residuals `(n, p)`."""
    _, whiten = whitening(x)
    theta = theta - theta.mean(0)
    coefficients, _ = ridge_regression((x - x.mean(0)) @ whiten.T, theta)
    t = (x - x.mean(0)) @ whiten.T @ coefficients.T
    t = t @ whitening(t)[1].T
    slope = np.linalg.lstsq(theta, t, rcond=None)[0]  # (parameter, combination)
    return slope, t - theta @ slope


def _with_prior(names, score, prior_score) -> list[str]:
    """The slope of s on the prior's gradient: 0, or 1 where that gradient was left in.

    To regress s on the data's residuals as well would make the errors smaller, but not what chance puts into the slope:
    residuals about a mean that is fitted to the same rows do not correlate with theta, and s does.
    """
    out = []
    for name, s, g in zip(names, score.T, prior_score.T, strict=True):
        g = g - g.mean()
        if g.std() < 1e-6 * max(s.std(), 1e-300):
            continue
        slope = (g @ s) / (g @ g)
        error = np.sqrt(np.mean((s - slope * g) ** 2) / (g @ g))
        if abs(slope) > SIGNIFICANT * error and abs(slope - 1) < SIGNIFICANT * error:
            out.append(
                f"The score of {name} follows the prior's gradient (slope {slope:.2f} ± {error:.2f}, expected 0): "
                "scores are expected WITHOUT the prior's."
            )
    return out


def _otherwise(names, theta, x, score) -> list[str]:
    """Whether another sign, order or scale explains the covariance of scores and data much better than theirs."""
    p, (slope, residual) = len(names), _responding(theta, x)
    products = score[:, :, None] * residual[:, None, :]  # of mean ∂t/∂theta
    response, error = products.mean(0), products.std(0) / np.sqrt(len(score)) + 1e-300
    misfit, negative = (
        np.sum(((response[:, None, :] - sign * slope[None, :, :]) / error[:, None, :]) ** 2, -1) for sign in (1, -1)
    )  # (score, parameter)
    own = np.trace(misfit)
    if p > 7:  # too many orders to try: pairs
        orders = [list(range(p)), *(_swapped(p, a, b) for a, b in itertools.combinations(range(p), 2))]
    else:
        orders = [list(order) for order in itertools.permutations(range(p))]
    best = min(orders, key=lambda order: sum(misfit[a, b] for a, b in enumerate(order)))
    total = sum(misfit[a, b] for a, b in enumerate(best))
    if np.trace(negative) < min(total, 0.3 * own) and own - np.trace(negative) > SIGNIFICANT**2:
        return ["The scores look as if they had the opposite sign: gradients of +log p(x, z | theta) are expected."]
    if best != list(range(p)) and total <= 0.3 * own and own - total >= SIGNIFICANT**2:
        return [f"The scores look as if they were in the order {[names[b] for b in best]}, not {list(names)}."]
    # Of data that are bent in theta the two differ by a factor of their own.
    information = np.sum((slope / error) ** 2) + 1e-300
    scale, spread = np.sum((response / error) * (slope / error)) / information, 1 / np.sqrt(information)
    if scale - SIGNIFICANT * spread > _OTHER_SCALE or 0 < scale + SIGNIFICANT * spread < 1 / _OTHER_SCALE:
        return [
            f"The scores are {scale:.2g} ± {spread:.2g} times what the data's dependence on the parameters says: are "
            "they of these simulations, in their units, and of one simulation each (no mean or sum over several)?"
        ]
    return []


def _swapped(p: int, a: int, b: int) -> list[int]:
    order = list(range(p))
    order[a], order[b] = b, a
    return order
