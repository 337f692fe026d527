r"""Score (MOPED) compression of a statistic to one number per parameter at a fiducial point."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._files import load_npz, write_npz
from diffsbi._types import Array, Float, Key, check_finite, check_key, check_trailing

_STORED = ("theta0", "mean", "matrix", "fisher")


class ScoreCompression(eqx.Module):
    r"""$t(s) = \theta_0 + F^{-1} (\partial\mu/\partial\theta)^T \Sigma^{-1} (s - \mu)$, shape `(*n, p)`.

    For a Gaussian statistic with covariance independent of theta, t is the score at $\theta_0$ in the parameters' units
    and loses no information there (Heavens, Jimenez & Lahav 2000; Alsing & Wandelt 2018).
    With Σ from n draws of n_stats statistics, t keeps about 1 − n_stats/n of it (more with shrinkage), and `fisher` is
    optimistic by as much: take n of several n_stats.

    Attributes:
        theta0: Expansion point, `(p,)`.
        mean: Mean statistic there, `(n_stats,)`.
        matrix: $F^{-1} (\partial\mu/\partial\theta)^T \Sigma^{-1}$, `(p, n_stats)`.
        fisher: $F = (\partial\mu/\partial\theta)^T \Sigma^{-1} \partial\mu/\partial\theta$, `(p, p)`.
        n_simulations: Draws (with and without derivative) that were spent to build it.
        shrinkage: Weight of the diagonal in the covariance that was inverted.
    """

    theta0: Float[Array, " p"]
    mean: Float[Array, " stats"]
    matrix: Float[Array, "p stats"]
    fisher: Float[Array, "p p"]
    n_simulations: int = eqx.field(static=True, default=0)
    shrinkage: float = eqx.field(static=True, default=0.0)

    def save(self, path) -> None:
        """Write what `load` needs: one `.npz` file."""
        write_npz(path, {name: np.asarray(getattr(self, name)) for name in _STORED})

    @classmethod
    def load(cls, path) -> "ScoreCompression":
        """The compression that `save` wrote; its simulations are not counted again."""
        return cls(**{name: jnp.asarray(value) for name, value in load_npz(path).items()})

    def __call__(self, s: Float[Array, "*n stats"]) -> Float[Array, "*n p"]:
        s = jnp.asarray(s)
        check_trailing("s", s, self.mean.shape)
        shift = (s - jnp.broadcast_to(self.mean, s.shape)) @ self.matrix.T
        return shift + jnp.broadcast_to(self.theta0, shift.shape)


def moped(mean_jacobian, covariance, mean, theta0, *, precision_factor: float = 1.0, **account) -> ScoreCompression:
    r"""Compression from arrays, in float64 whatever JAX's own precision.

    Args:
        mean_jacobian: $\partial\mu/\partial\theta$, `(n_stats, p)`.
        covariance: Σ, `(n_stats, n_stats)`, positive definite.
        mean: μ, `(n_stats,)`.
        theta0: Expansion point, `(p,)`.
        precision_factor: Factor on Σ⁻¹ (`hartlap` for a sample covariance); it scales `fisher` and leaves t alone.

    Raises:
        ValueError: On shapes that do not fit, non-finite values, a covariance that is not positive definite or
            parameters that the statistic's mean cannot tell apart.
    """
    mean, theta0 = np.asarray(mean, float), np.asarray(theta0, float)
    jacobian, covariance = np.asarray(mean_jacobian, float), np.asarray(covariance, float)
    if jacobian.shape != (len(mean), len(theta0)) or covariance.shape != (len(mean),) * 2:
        wanted = f"({len(mean)}, {len(theta0)}) and covariance with shape ({len(mean)}, {len(mean)})"
        raise ValueError(f"Expected mean_jacobian with shape {wanted}; got {jacobian.shape} and {covariance.shape}.")
    for name, value in (("mean_jacobian", jacobian), ("covariance", covariance), ("mean", mean)):
        check_finite(name, value)
    scale = np.sqrt(np.diag(covariance))
    if not np.all(scale > 0):
        raise ValueError(f"Expected positive variances; statistic {int(np.argmin(scale))} has {scale.min() ** 2}.")
    try:
        root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    except np.linalg.LinAlgError as error:
        raise ValueError("Expected a positive definite covariance; draw more simulations or use shrinkage.") from error
    white = np.linalg.solve(root, jacobian / scale[:, None])
    information = white.T @ white
    unit = np.sqrt(np.diag(information))
    if not np.all(unit > 0) or np.linalg.cond(information / np.outer(unit, unit)) > 1e13:
        raise ValueError("Expected a statistic that responds to every parameter; the Fisher matrix is singular.")
    matrix = np.linalg.solve(information, np.linalg.solve(root.T, white).T) / scale
    t0, mu, m, fisher = map(jnp.asarray, (theta0, mean, matrix, precision_factor * information))
    return ScoreCompression(t0, mu, m, fisher, **account)


def hartlap(n: int, n_stats: int) -> float:
    """(n − n_stats − 2) / (n − 1), which unbiases the inverse of a sample covariance (Hartlap et al. 2007)."""
    if n <= n_stats + 2:
        raise ValueError(f"Expected more than n_stats + 2 = {n_stats + 2} draws for a sample covariance; got {n}.")
    return (n - n_stats - 2) / (n - 1)


def shrunk_covariance(samples) -> tuple[np.ndarray, float]:
    r"""$(1-\rho) S + \rho\,\mathrm{diag}(S)$ of `samples (n, n_stats)`, and ρ: Ledoit–Wolf in correlation space.

    Statistics in different units are first divided by their standard deviations, so the target keeps the variances
    (Ledoit & Wolf 2004; Schäfer & Strimmer 2005, target D).
    """
    samples = np.asarray(samples, float)
    n = len(samples)
    centred = samples - samples.mean(0)
    scale = centred.std(0, ddof=1)
    unit = centred / np.where(scale > 0, scale, 1.0)
    correlation = unit.T @ unit / (n - 1)
    # Var of each sample correlation: (n/(n-1)^3) sum_k (w_k - mean w)^2 with w_k = unit_ki unit_kj.
    mean = correlation * (n - 1) / n
    variance = n / (n - 1) ** 3 * ((unit**2).T @ unit**2 - n * mean**2)
    off = ~np.eye(samples.shape[1], dtype=bool)
    total = np.sum(correlation[off] ** 2)
    rho = float(np.clip(np.sum(variance[off]) / total, 0.0, 1.0)) if total > 0 else 1.0
    correlation[off] *= 1 - rho
    return correlation * np.outer(scale, scale), rho


def score_compression(
    statistic: Callable[[Array], Array],
    simulate: Callable[[Array, Key], Array],
    theta0: Float[Array, " p"],
    key: Key,
    n_covariance: int = 1000,
    n_derivative: int = 100,
    *,
    shrinkage: bool = True,
    batch_size: int = 16,
    progress: bool = False,
    keep: Callable[[str, Callable[[], np.ndarray]], np.ndarray] = lambda name, compute: compute(),
) -> ScoreCompression:
    r"""Build the compression of `statistic(simulate(theta, key))` at `theta0` from simulations.

    The mean's derivative is the average over keys of `jax.jacfwd` through the simulator at a fixed key, free of the
    noise of finite differences; the covariance comes from independent draws.

    Args:
        statistic: x → `(n_stats,)`, differentiable.
        simulate: (theta, key) → x, one draw, differentiable in theta at a fixed key.
        theta0: Expansion point, `(p,)`.
        key: A typed JAX key.
        n_covariance: Draws for mean and covariance.
        n_derivative: Draws for the derivative.
        shrinkage: Shrink the covariance (`shrunk_covariance`); otherwise the sample covariance with Hartlap's factor.
        batch_size: Draws computed at once.
        progress: Show a progress bar.
        keep: Called with the name of each batch and the function that computes its rows, returns the rows: a place
            to store them, and to give them back to a run that was interrupted.

    Raises:
        ValueError: If there are too few draws, or a statistic or derivative is not finite.
    """
    key_covariance, key_derivative = jax.random.split(check_key(key))
    if n_covariance < 2 or n_derivative < 1:
        raise ValueError(f"Expected n_covariance >= 2 and n_derivative >= 1; got {n_covariance} and {n_derivative}.")
    theta0 = jnp.asarray(theta0, jnp.result_type(float))

    def summarise(theta, one_key):
        return statistic(simulate(theta, one_key))

    with tqdm(total=n_covariance + n_derivative, disable=not progress, desc="compression", unit="sim") as bar:
        keep_value, keep_slope = (functools.partial(_keep, keep, name) for name in ("values", "derivatives"))
        values = _over_keys(summarise, theta0, key_covariance, n_covariance, batch_size, bar, keep_value)
        small = max(1, batch_size // (len(theta0) + 1))
        jacobians = _over_keys(jax.jacfwd(summarise), theta0, key_derivative, n_derivative, small, bar, keep_slope)
    check_finite("statistics", values)
    check_finite("derivatives of the statistics", jacobians)
    factor = 1.0 if shrinkage else hartlap(n_covariance, values.shape[1])
    covariance, rho = shrunk_covariance(values) if shrinkage else (np.cov(values.T), 0.0)
    account = dict(n_simulations=n_covariance + n_derivative, shrinkage=rho)
    return moped(jacobians.mean(0), covariance, values.mean(0), theta0, precision_factor=factor, **account)


def _keep(keep, name: str, start: int, compute):
    return keep(f"{name}_{start:06d}", compute)


def _over_keys(function, theta, key, n, batch_size, bar, keep) -> np.ndarray:
    """function(theta, fold_in(key, i)) for i < n, in float64; every batch has the same size: one compilation."""
    size = min(n, max(1, batch_size))

    @jax.jit
    def batch(theta, index):
        return jax.vmap(lambda i: function(theta, jax.random.fold_in(key, i)))(index)

    rows = []
    for start in range(0, n, size):
        count = min(size, n - start)
        rows.append(keep(start, lambda s=start, c=count: np.asarray(batch(theta, s + jnp.arange(size)), float)[:c]))
        bar.update(count)
    return np.concatenate(rows)
