"""What a sampler must offer to be run in blocks: one transition of one chain."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Key

UNKNOWN = -1e30  # log-density of a state that `step` has not evaluated; it stays where the density there is not finite


class Record(NamedTuple):
    """What is written of one transition, besides the parameters."""

    log_density: Array
    energy: Array
    diverging: Array
    num_steps: Array
    step_size: Array


class AbstractKernel(eqx.Module):
    """A Markov kernel on positions (any pytree of arrays), its warm-up included.

    `start` must not evaluate the density but give it as `UNKNOWN`: the first `step` evaluates it at the starting point
    and stays there, so that one compiled function serves both. Its record says `diverging` where the gradient is not
    finite.
    """

    log_density: eqx.AbstractVar[Callable]
    n_warmup: eqx.AbstractVar[int]

    @abc.abstractmethod
    def start(self, position, key: Key) -> Any:
        """The state of a chain at a position, the density unknown."""

    @abc.abstractmethod
    def step(self, state: Any) -> tuple[Any, Record]:
        """One transition; adapts while fewer than `n_warmup` are done."""

    @abc.abstractmethod
    def position(self, state: Any) -> Any:
        """The position, in the coordinates of `log_density`."""

    @abc.abstractmethod
    def account(self) -> dict[str, Any]:
        """Every setting that decides the chain's numbers, as JSON values."""


def all_finite(*trees) -> Array:
    """Whether every number in these is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(trees)]
    return jnp.stack(leaves).all()


def select(condition, yes, no):
    """Every leaf of one tree or of the other; typed keys included."""
    return jax.tree.map(lambda a, b: jax.lax.select(jnp.broadcast_to(condition, a.shape), a, b), yes, no)


def size(position) -> int:
    """Numbers in a position."""
    return sum(leaf.size for leaf in jax.tree.leaves(position))
