r"""Data with long tails, drawn in: a row far from all others must not decide how all of them are standardised."""

import functools
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float

REACH = 10.0
"""Robust standard deviations from the median that are left as they are."""


class Tails(NamedTuple):
    r"""$y \to y$ for $|y| \leq 10$ and $\pm(10 + \log(|y| - 9))$ beyond, $y = (x - m) / s$, column by column.

    s is 1.4826 × the median absolute deviation, or half the distance that 95 % of the rows are within where that is
    more, as in columns of which most rows are the same: about one for a normal, by both.

    A bijection with a continuous derivative. A posterior given x is that given the drawn in x, and so is the ratio; a
    likelihood differs by the slope, in which there are no parameters. Columns with $s = 0$ are left alone.

    Attributes:
        centre: m, the median.
        scale: s, robust standard deviations.
    """

    centre: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    def draw_in(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """x, with what is far out nearer."""
        y, far, centre, scale = self._parts(x)
        return jnp.where(far, centre + scale * jnp.sign(y) * (REACH + jnp.log1p(jnp.maximum(jnp.abs(y) - REACH, 0))), x)

    def let_out(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The inverse of `draw_in`."""
        y, far, centre, scale = self._parts(x)
        return jnp.where(far, centre + scale * jnp.sign(y) * (REACH + jnp.expm1(jnp.maximum(jnp.abs(y) - REACH, 0))), x)

    def log_slope(self, x: Float[Array, "*n d"]) -> Float[Array, "*n"]:
        r"""$\sum_i \log \partial \mathrm{draw\_in}(x)_i / \partial x_i$."""
        y, far, *_ = self._parts(x)
        return -jnp.sum(jnp.where(far, jnp.log1p(jnp.maximum(jnp.abs(y) - REACH, 0)), 0), -1)

    def _parts(self, x):
        centre, scale = (jnp.broadcast_to(jnp.asarray(a, x.dtype), x.shape) for a in self)
        varies = scale > 0
        y = (x - centre) / jnp.where(varies, scale, 1)
        return y, varies & (jnp.abs(y) > REACH), centre, scale

    def distance(self, x: Float[Array, "n d"]) -> Float[np.ndarray, "n d"]:
        """|y|; zero in columns with s = 0."""
        scale = np.where(self.scale > 0, self.scale, np.inf)
        return np.abs(np.asarray(x, float) - self.centre) / scale

    def described(self) -> dict[str, list[float]]:
        """For JSON; `tails_of` reads it."""
        return {"centre": self.centre.tolist(), "scale": self.scale.tolist()}


def fit_tails(x: Float[Array, "n d"], always: bool = False) -> Tails | None:
    """The `Tails` of these rows; None where no row is in them, unless `always` (there are more rows than these)."""
    tails = robust_moments(x)
    return tails if always or (tails.distance(x) > REACH).any() else None


def robust_moments(x: Float[Array, "n d"]) -> Tails:
    """Centres and scales of the columns."""
    data = np.asarray(x, float)
    centre, spread = median_and_spread(data)
    return Tails(centre, np.maximum(spread, np.quantile(np.abs(data - centre), 0.95, axis=0) / 2))


def drawn_in(tails: Tails | None, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """x in the default precision, with its tails drawn in where there are any."""
    x = jnp.asarray(x, jnp.result_type(float))
    return x if tails is None else tails.draw_in(x)


@functools.lru_cache(maxsize=64)
def tails_of(config_json: str) -> Tails | None:
    """Those of a posterior's data, from its `config`; None where there are none."""
    given: dict[str, Any] | None = json.loads(config_json).get("tails")
    return None if given is None else Tails(*(np.asarray(given[name], float) for name in Tails._fields))
