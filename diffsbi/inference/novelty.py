r"""The density of summaries by themselves: how unlike the simulations is an observation?"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, Key, check_finite, check_key, check_trailing
from diffsbi.inference.estimator import Density, build_density
from diffsbi.inference.losses import ScoredDensity, WithoutScore
from diffsbi.inference.standardise import whitening
from diffsbi.inference.training import History, fit, schedule, split_rows

_SMALLEST_N = 50


class Novelty(eqx.Module):
    r"""$\log q(x)$ of summaries, the equal mixture of its members; called with `(n, d)`, returns `(n,)`.

    Each member is a flow of $v = W(y - \bar y)$ with $y = \mathrm{arsinh}((x - \mathrm{median})/\mathrm{MAD})$, so
    that heavy tails are within a flow's reach.
    """

    centre: Float[Array, " d"]
    scale: Float[Array, " d"]
    mean: Float[Array, " d"]
    whiten: Float[Array, "d d"]
    members: tuple[AbstractDistribution, ...]
    histories: tuple[History, ...]

    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        check_trailing("x", x, self.centre.shape)
        return _log_density(self, jnp.asarray(x, jnp.result_type(float)))


@eqx.filter_jit
def _log_density(novelty: Novelty, x: Array) -> Array:
    unit = (x - jnp.broadcast_to(novelty.centre, x.shape)) / jnp.broadcast_to(novelty.scale, x.shape)
    y = jnp.arcsinh(unit)
    v = (y - jnp.broadcast_to(novelty.mean, x.shape)) @ novelty.whiten.T
    # log cosh(arsinh t) = log sqrt(1 + t²), which must not overflow.
    jacobian = -jnp.sum(jnp.log(jnp.hypot(1.0, unit)), -1) - jnp.sum(jnp.log(novelty.scale))
    jacobian = jacobian + jnp.linalg.slogdet(novelty.whiten)[1]
    values = jnp.stack([member.log_prob(v) for member in novelty.members])
    return jax.nn.logsumexp(values, axis=0) - jnp.log(len(novelty.members)) + jacobian


def fit_novelty(
    key: Key,
    x,
    *,
    held_out: float = 0.25,
    density: Density = "smooth",
    density_options: dict[str, Any] | None = None,
    members: int = 2,
    max_epochs: int | None = None,
    batch_size: int | None = None,
    patience: int = 40,
    learning_rate: float = 1e-3,
    weight_decay: float = 1.0,
) -> tuple[Novelty, np.ndarray]:
    r"""Train an unconditional flow on simulated summaries, for `diffsbi.diagnostics.misspecification`.

    Args:
        key: Which rows are held out, first weights, order of the rows.
        x: Summaries of simulations from the prior predictive, `(n, d)`.
        held_out: Share of the rows that take no part in the training: they calibrate the score.
        density: As `Estimator`.
        density_options: As `Estimator`.
        members: Flows to fit.
        max_epochs: As `fit`; by default those of about 5 000 steps, 20 000 from 10 000 rows on.
        batch_size: As `fit`; by default 32 to 256, growing with the number of rows.
        patience: As `fit`.
        learning_rate: As `fit`.
        weight_decay: As `fit`: towards a normal distribution of the transformed summaries.

    Returns:
        The log-density, and the rows that were held out, `(m, d)`: pass these on as `simulated`.

    Raises:
        ValueError: If x is no finite matrix or has fewer than 50 rows, or held_out is not between 0 and 1.
    """
    check_key(key)
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[0] < _SMALLEST_N or x.shape[1] < 1:
        raise ValueError(f"Expected x with shape (n >= {_SMALLEST_N}, d >= 1); got {x.shape}.")
    check_finite("x", x)
    if members < 1:
        raise ValueError(f"Expected members >= 1; got {members}.")
    if not 0 < held_out < 1:
        raise ValueError(f"Expected held_out between 0 and 1; got {held_out}.")
    key_split, *keys = jax.random.split(key, members + 1)
    train, kept = split_rows(key_split, len(x), held_out)
    centre, scale = _units(x[train])
    y = np.arcsinh((x[train] - centre) / scale)
    mean, whiten = whitening(y)
    v = jnp.asarray((y - mean) @ whiten.T, jnp.result_type(float))
    options = schedule(len(v), max_epochs, batch_size, patience)
    options |= {"learning_rate": learning_rate, "weight_decay": weight_decay}
    fits = [_fit_one(k, v, density, density_options or {}, options) for k in keys]
    to_units = [jnp.asarray(a, jnp.result_type(float)) for a in (centre, scale, mean, whiten)]
    return Novelty(*to_units, members=tuple(d for d, _ in fits), histories=tuple(h for _, h in fits)), x[kept]


def _fit_one(key, v, density, density_options, options):
    key_split, key_density, key_fit = jax.random.split(key, 3)
    train, validation = split_rows(key_split, len(v), 0.1)
    model = ScoredDensity(build_density(key_density, density, v.shape[1], None, density_options))
    rows = [{"v": v[index], "c": None} for index in (train, validation)]
    model, history = fit(key_fit, model, *rows, WithoutScore(), **options)
    return model.density, history


def _units(x):
    centre, spread = median_and_spread(x)
    spread = np.where(spread > 0, spread, x.std(0))
    return centre, np.where(spread > 0, spread, 1.0)
