r"""Continuous normalizing flow: a smooth ordinary differential equation between a standard normal and theta."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import AbstractBijection
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.flows.constructors import check_sizes, small_network, with_shared_static

# Runge and Kutta's four stages: where each is evaluated, its weight, whether it ends a step.
_NODES, _WEIGHTS, _ENDS = (0.0, 0.5, 0.5, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.0, 0.0, 1.0)


class AngularFlow(AbstractBijection):
    r"""$dy/d\varphi = \cos\varphi\, f(\varphi, y, c)$, $\varphi$ from 0 (y standard normal) to π/2 (y = theta).

    f is a network of $(\sin\varphi, \cos\varphi, y, c)$, small at first. The angle is the time in which a standard
    normal stays one where f = 0, and in which $y_\varphi = \sin\varphi\,\theta + \cos\varphi\,\epsilon$ for the
    straight paths $t\theta + (1 - t)\epsilon$ of flow matching, $\tan\varphi = t/(1-t)$, divided by their width
    $\sqrt{t^2 + (1-t)^2}$: the same flow in other coordinates.

    The equation is solved by `steps` steps of the fourth-order Runge-Kutta method, and so is
    $d\log|\det|/d\varphi = \cos\varphi\,\mathrm{tr}\,\partial f/\partial y$ with the exact trace. All of it is one scan
    over the stages: C∞, differentiable any number of times, and compiled once for all steps. The inverse is the
    solution backwards, equal to the inverse of the forward one up to the method's error, of order steps⁻⁴.

    Args:
        network: f.
        dim: Dimension p of theta.
        condition_dim: Dimension of c, or None.
        steps: Steps of the solver.

    Reference:
        Chen et al. 2018, arXiv:1806.07366.
    """

    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None
    network: eqx.nn.MLP
    steps: int = eqx.field(static=True)

    def __init__(self, network: eqx.nn.MLP, dim: int, condition_dim: int | None, steps: int):
        self.shape = (dim,)
        self.cond_shape = None if condition_dim is None else (condition_dim,)
        self.network = network
        self.steps = steps

    def field(self, angle: Float[Array, ""], y: Float[Array, " p"], condition: Float[Array, " d"] | None) -> Array:
        r"""$f = \cos^{-1}\varphi\; dy/d\varphi$, shape (p,)."""
        time = jnp.stack([jnp.sin(angle), jnp.cos(angle)]).astype(y.dtype)
        return self.network(jnp.concatenate([time, y] if condition is None else [time, y, condition]))

    def transform_and_log_det(self, x, condition=None):
        return self._solve(x, condition, 0.0, 0.5 * np.pi)

    def inverse_and_log_det(self, y, condition=None):
        return self._solve(y, condition, 0.5 * np.pi, 0.0)

    def transform(self, x, condition=None):
        slope = lambda angle, y: jnp.cos(angle) * self.field(angle, y, condition)  # noqa: E731
        return _runge_kutta(slope, x, 0.0, 0.5 * np.pi, self.steps)

    def _solve(self, y, condition, start, stop):
        identity = jnp.eye(self.shape[0], dtype=y.dtype)

        def slope(angle, state):
            of_y = lambda y: self.field(angle, y, condition)  # noqa: E731
            value, columns = jax.vmap(lambda e: jax.jvp(of_y, (state[:-1],), (e,)), out_axes=(None, -1))(identity)
            return jnp.cos(angle) * jnp.append(value, jnp.trace(columns))

        out = _runge_kutta(slope, jnp.append(y, jnp.zeros((), y.dtype)), start, stop, self.steps)
        return out[:-1], out[-1]


def _runge_kutta(slope, y: Array, start: float, stop: float, steps: int) -> Array:
    """Solve dy/dt = slope(t, y) from `start` to `stop`: the stages of all steps are one scan, so compiled once."""
    h = (stop - start) / steps
    times = start + h * (np.arange(steps)[:, None] + np.asarray(_NODES)).ravel()
    table = [times, *(np.tile(a, steps) for a in (_NODES, _WEIGHTS, _ENDS))]

    def stage(carry, entry):
        y, last, total = carry
        time, node, weight, end = entry
        last = slope(time, y + h * node * last)
        total = total + weight * last
        return (y + h * end * total, last, (1 - end) * total), None

    table = [jnp.asarray(a, y.dtype) for a in table]
    return jax.lax.scan(stage, (y, jnp.zeros_like(y), jnp.zeros_like(y)), table)[0][0]


def continuous_flow(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    width: int = 64,
    depth: int = 2,
    steps: int = 8,
) -> AbstractDistribution:
    """Continuous normalizing flow with a silu network: see `AngularFlow`. Slow beside the others; for `FMPE`.

    Args:
        key: Initial weights.
        dim: Dimension p of theta.
        condition_dim: Dimension of the condition; None for an unconditional density.
        width: Hidden units of the network.
        depth: Its hidden layers.
        steps: Steps of the solver; each evaluates the network 4 times, and 4 p derivatives of it for a density.

    Raises:
        ValueError: For sizes below 1.
    """
    check_key(key)
    check_sizes(dim=dim, condition_dim=condition_dim, width=width, depth=depth, steps=steps)
    return with_shared_static(_build, key, (dim, condition_dim, width, depth, steps))


def _build(key, dim, condition_dim, width, depth, steps):
    network = small_network(key, 2 + dim + (condition_dim or 0), dim, width, depth)
    return Transformed(StandardNormal((dim,)), AngularFlow(network, dim, condition_dim, steps))  # type: ignore[call-arg]
