r"""An infinitely differentiable, monotone, scalar transformer: a mixture of logistic ramps.

The derivatives of a flow's log-density are trained on, so the transformer must be smooth in its argument
and in its parameters, in both directions. Rational-quadratic splines are not.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.bijections import AbstractBijection
from jax.nn import log_sigmoid, log_softmax

from diffsbi._types import Array, Float

_LOG_RANGE = 4.0  # every slope lies in (e^-4, e^4): one layer can neither collapse nor explode
_MAX_STEPS = 80


class LogisticRamps(AbstractBijection):
    r"""$y = b + e^s\,\mathrm{logit}\big(\sum_k w_k\,\sigma(a_k (x - m_k))\big)$, a C∞ bijection of the real line.

    When y/e^s is logistic, x follows a mixture of K logistic densities with weights w, centres m and widths
    1/a: multimodal and skewed densities are within reach of one layer. The tails are linear, of slope
    e^s min(a), and every quantity stays in log space, so that the value, the log-derivative and their gradients are
    finite in float32 far outside the bulk. All fields are free real numbers, to be offset by a
    conditioner; with none of them moved the map is the identity within two per cent.

    The inverse is a bracketed Newton iteration (the bracket is exact: a mixture of ramps lies between its
    smallest and its largest) with an implicit derivative in the argument and in all the parameters.

    Args:
        ramps: Number K of ramps.

    Reference:
        Huang et al. 2018, arXiv:1804.00779 (the "deep sigmoidal" transformer).
    """

    shape: tuple[int, ...]
    cond_shape: ClassVar[None] = None
    logits: Float[Array, " k"]
    log_slopes: Float[Array, " k"]
    centres: Float[Array, " k"]
    log_scale: Float[Array, ""]
    loc: Float[Array, ""]

    def __init__(self, ramps: int = 8):
        if ramps < 1:
            raise ValueError(f"Expected at least one ramp; got {ramps}.")
        centres = np.linspace(-0.5, 0.5, ramps) if ramps > 1 else np.zeros(1)
        # Centres spread apart would widen the mixture; steeper ramps keep the variance of one standard logistic.
        slope = (1 - np.var(centres) / (np.pi**2 / 3)) ** -0.5
        self.shape = ()
        self.logits = jnp.zeros(ramps)
        self.log_slopes = jnp.full(ramps, _LOG_RANGE * np.arctanh(np.log(slope) / _LOG_RANGE))
        self.centres = jnp.asarray(centres, self.logits.dtype)
        self.log_scale = jnp.zeros(())
        self.loc = jnp.zeros(())

    def _ramps(self) -> tuple[Array, Array, Array]:
        return log_softmax(self.logits), bounded(self.log_slopes), self.centres

    def transform_and_log_det(self, x, condition=None):
        log_scale = bounded(self.log_scale)
        y, log_slope = _mixture(self._ramps(), x)
        return self.loc + jnp.exp(log_scale) * y, log_slope + log_scale

    def inverse_and_log_det(self, y, condition=None):
        log_scale = bounded(self.log_scale)
        x = _invert_mixture(self._ramps(), (y - self.loc) * jnp.exp(-log_scale))
        return x, -_mixture(self._ramps(), x)[1] - log_scale


def bounded(log_value: Array) -> Array:
    """A logarithm held within ±4, smoothly."""
    return _LOG_RANGE * jnp.tanh(log_value / _LOG_RANGE)


def _mixture(ramps, x: Array) -> tuple[Array, Array]:
    r"""$y = \mathrm{logit} \sum_k w_k \sigma(a_k(x - m_k))$ and $\log dy/dx$ of one scalar x.

    With $P = \sum w\sigma(h)$ and $Q = \sum w\sigma(-h) = 1 - P$: $y = \log P - \log Q$ and
    $dy/dx = \sum w a \sigma(h)\sigma(-h) / (P Q)$.
    """
    log_w, log_a, m = ramps
    h = jnp.exp(log_a) * (x - m)
    below = log_sigmoid(h)
    above = below - h
    log_p = log_sum_exp(log_w + below)
    log_q = log_sum_exp(log_w + above)
    return log_p - log_q, log_sum_exp(log_w + log_a + below + above) - log_p - log_q


def log_sum_exp(terms: Array) -> Array:
    """log Σ exp of finite terms. `jax.scipy`'s guards against infinities crash XLA's CPU backend (jaxlib 0.10.2)."""
    top = jax.lax.stop_gradient(jnp.max(terms))
    return top + jnp.log(jnp.sum(jnp.exp(terms - top)))


@jax.custom_jvp
def _invert_mixture(ramps, y: Array) -> Array:
    """The x with `_mixture(ramps, x)[0] == y`: Newton steps, bisection where they leave the bracket or crawl."""
    _, log_a, m = ramps
    nodes = m + y * jnp.exp(-log_a)
    tolerance = 4 * jnp.finfo(nodes.dtype).eps

    def unfinished(state):
        x, low, high, step, i = state
        return (i < _MAX_STEPS) & (jnp.abs(step) > tolerance * (1 + jnp.abs(x)))

    def update(state):
        x, low, high, last, i = state
        value, log_slope = _mixture(ramps, x)
        low, high = jnp.where(value < y, x, low), jnp.where(value < y, high, x)
        newton = x - (value - y) * jnp.exp(-log_slope)
        good = (newton >= low) & (newton <= high) & (jnp.abs(newton - x) < 0.5 * jnp.abs(last))
        new = jnp.where(good, newton, 0.5 * (low + high))
        # Where only rounding is left, steps need not become small.
        new = jnp.where(jnp.abs(value - y) <= tolerance * (1 + jnp.abs(y)), x, new)
        return new, low, high, new - x, i + 1

    low, high = jnp.min(nodes), jnp.max(nodes)
    start = 0.5 * (low + high)
    first = 2 * (high - low) + 1
    return jax.lax.while_loop(unfinished, update, (start, low, high, first, 0))[0]


@_invert_mixture.defjvp
def _invert_mixture_jvp(primals, tangents):
    r"""Implicit derivative: $f(x; p) = y$ gives $\dot x = (\dot y - \partial_p f\,\dot p) / f'(x)$."""
    (ramps, y), (ramps_dot, y_dot) = primals, tangents
    x = _invert_mixture(ramps, y)
    f_dot = jax.jvp(lambda r: _mixture(r, x)[0], (ramps,), (ramps_dot,))[1]
    return x, (y_dot - f_dot) * jnp.exp(-_mixture(ramps, x)[1])
