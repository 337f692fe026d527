"""Rejection and population Monte Carlo with compressed data, for comparison: no density is learned.

Distances are those of the estimates under the Fisher matrix; the posterior is that of a data set nearer than epsilon.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Key, check_key
from diffsbi.compression.information import check_positive
from diffsbi.prior import Prior


class WeightedDraws(NamedTuple):
    """Accepted parameters `theta (n, p)`, their `weights (n,)` (sum one), `distance (n,)`, and what they took."""

    theta: np.ndarray
    weights: np.ndarray
    distance: np.ndarray
    epsilon: float
    n_simulations: int

    @property
    def effective_size(self) -> float:
        return float(1 / np.sum(self.weights**2))


class _Distance(eqx.Module):
    r"""$\sqrt{\delta^T F \delta}$, $\delta = \hat\theta(x) - \hat\theta_\mathrm{observed}$, of simulated x."""

    compress: Callable[[Array], Array]
    fisher: Array
    observed: Array

    def __call__(self, x):
        shift = self.compress(x) - self.observed
        return jnp.sqrt(shift @ self.fisher @ shift)


def rejection(
    key: Key, compress, simulate, prior: Prior, x, n: int, *, keep: float = 0.01, batch_size: int = 1000
) -> WeightedDraws:
    """The `keep` fraction of `n` simulations from the prior whose estimates are nearest to that of `x`.

    Args:
        key: Parameters and simulations.
        compress: x → estimate `(p,)`, with the attribute `fisher (p, p)`, such as a fitted IMNN.
        simulate: (theta, key) → x.
        prior: Of theta, in the order of `simulate`.
        x: The observed data set.
        n: Simulations.
        keep: Fraction of them.
        batch_size: Simulations at a time.
    """
    if not 0 < keep <= 1 or n * keep < 1:
        raise ValueError(f"Expected keep between 1/n and 1; got keep = {keep} of n = {n}.")
    key_theta, key_x = jax.random.split(check_key(key))
    theta = prior.sample(key_theta, (n,))
    distance = _distances(_distance_to(compress, x), simulate, theta, key_x, batch_size)
    nearest = np.argsort(distance)[: round(keep * n)]
    weights = np.full(len(nearest), 1 / len(nearest))
    return WeightedDraws(np.asarray(theta)[nearest], weights, distance[nearest], float(distance[nearest[-1]]), n)


def population_monte_carlo(
    key: Key,
    compress,
    simulate,
    prior: Prior,
    x,
    n: int = 1000,
    *,
    quantile: float = 0.5,
    smallest_acceptance: float = 0.05,
    max_rounds: int = 30,
    batch_size: int = 1000,
    progress: bool = False,
) -> WeightedDraws:
    r"""`n` weighted draws nearer and nearer to `x` (Beaumont et al. 2009; Turner & Van Zandt 2012).

    A round moves draws by a normal kernel of twice their weighted covariance until `n` lie nearer than the `quantile`
    of the last round's distances; weights are $p(\theta_i) / \sum_j w_j K(\theta_i | \theta_j)$. It ends when fewer
    than `smallest_acceptance` of the simulations are accepted. Other arguments as in `rejection`.
    """
    if not 0 < quantile < 1 or not 0 < smallest_acceptance < 1:
        got = f"got {quantile} and {smallest_acceptance}"
        raise ValueError(f"Expected quantile and smallest_acceptance between 0 and 1; {got}.")
    measure = _distance_to(compress, x)
    first = jax.random.fold_in(check_key(key), 0)
    found = rejection(first, compress, simulate, prior, x, 2 * n, keep=0.5, batch_size=batch_size)
    theta, weights, distance, epsilon, total = found
    for i in (bar := tqdm(range(1, max_rounds + 1), disable=not progress, desc="population Monte Carlo")):
        threshold = float(np.quantile(distance, quantile))
        rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.fold_in(key, i))))
        root = np.linalg.cholesky(2 * np.cov(theta.T, aweights=weights).reshape(theta.shape[1], -1))
        kept: list[tuple[np.ndarray, np.ndarray]] = []
        tried = 0
        while sum(len(d) for _, d in kept) < n:
            if tried * smallest_acceptance > n:
                return WeightedDraws(theta, weights, distance, epsilon, total + tried)
            moved = theta[rng.choice(len(theta), batch_size, p=weights)]
            moved = moved + rng.normal(size=moved.shape) @ root.T
            inside = np.asarray(prior.in_support(jnp.asarray(moved)))
            key_x = jax.random.fold_in(jax.random.fold_in(key, i), tried)
            safe = np.where(inside[:, None], moved, theta[:1])
            near = _distances(measure, simulate, jnp.asarray(safe, measure.fisher.dtype), key_x, batch_size)
            accepted = inside & (near <= threshold)
            kept.append((moved[accepted], near[accepted]))
            tried += batch_size
        total += tried
        new, distance = (np.concatenate(parts)[:n] for parts in zip(*kept, strict=True))
        apart = np.linalg.solve(root, (new[:, None] - theta[None]).reshape(-1, theta.shape[1]).T)
        kernel = np.exp(-0.5 * np.sum(apart**2, 0)).reshape(n, -1) @ weights
        weights = np.exp(np.asarray(prior.log_prob(jnp.asarray(new)), float)) / kernel
        theta, weights, epsilon = new, weights / weights.sum(), threshold
        bar.set_postfix(epsilon=f"{epsilon:.3g}", acceptance=f"{n / tried:.2f}")
    return WeightedDraws(theta, weights, distance, epsilon, total)


def _distance_to(compress, x) -> _Distance:
    check_positive(compress.fisher)
    return _Distance(compress, compress.fisher, compress(x))


def _distances(measure, simulate, theta, key: Key, batch_size: int) -> np.ndarray:
    keys = jax.random.split(key, len(theta))
    return np.asarray(_simulated_distances(measure, simulate, theta, keys, batch_size), float)


@eqx.filter_jit
def _simulated_distances(measure, simulate, theta, keys, batch_size):
    return jax.lax.map(lambda row: measure(simulate(*row)), (theta, keys), batch_size=batch_size)
