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
        found += _other_order(names, parameters, data, scores)
    return found


def warnings_of_scores(prior: Prior, theta, x, score) -> list[str]:
    """`score_warnings` of rows with theta and scores as an estimator is given them."""
    theta, score = (jnp.asarray(a, jnp.result_type(float)) for a in (theta, score))
    u, own = unconstrained(prior, theta), likelihood_score(prior, theta, score)
    check_finite("u in unconstrained space", u)
    check_finite("score in unconstrained space", own)
    return score_warnings(prior.names, u, x, own, left_in(prior, theta))


def _with_prior(names, score, prior_score) -> list[str]:
    """The slope of s on the prior's gradient: 0, or 1 where that gradient was left in."""
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


def _other_order(names, theta, x, score) -> list[str]:
    """Whether another order of the parameters explains the covariance of scores and data much better than theirs."""
    p = len(names)
    if p < 2:
        return []
    _, whiten = whitening(x)
    theta = theta - theta.mean(0)
    # The data as the p combinations that know most of theta, uncorrelated: what their response to theta is.
    coefficients, _ = ridge_regression((x - x.mean(0)) @ whiten.T, theta)
    t = (x - x.mean(0)) @ whiten.T @ coefficients.T
    t = t @ whitening(t)[1].T
    slope = np.linalg.lstsq(theta, t, rcond=None)[0]  # (parameter, combination)
    products = score[:, :, None] * (t - theta @ slope)[:, None, :]  # of mean ∂t/∂theta
    response, error = products.mean(0), products.std(0) / np.sqrt(len(t)) + 1e-300
    misfit = np.sum(((response[:, None, :] - slope[None, :, :]) / error[:, None, :]) ** 2, -1)  # (score, parameter)
    own = np.trace(misfit)
    if p > 7:  # too many orders to try: pairs
        orders = [_swapped(p, a, b) for a, b in itertools.combinations(range(p), 2)]
    else:
        orders = [list(order) for order in itertools.permutations(range(p))]
    best = min(orders, key=lambda order: sum(misfit[a, b] for a, b in enumerate(order)))
    total = sum(misfit[a, b] for a, b in enumerate(best))
    if best == list(range(p)) or total > 0.3 * own or own - total < SIGNIFICANT**2:
        return []
    order = [names[b] for b in best]
    return [f"The scores look as if they were in the order {order}, not {list(names)}."]


def _swapped(p: int, a: int, b: int) -> list[int]:
    order = list(range(p))
    order[a], order[b] = b, a
    return order
