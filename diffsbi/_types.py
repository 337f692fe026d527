"""Array aliases and the checks that every room shares."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

Key = PRNGKeyArray
Vector = Float[Array, " p"]

__all__ = [
    "Array",
    "Float",
    "Key",
    "Vector",
    "check_finite",
    "check_finite_values",
    "check_key",
    "check_names",
    "check_trailing",
    "checked_rows",
]


def check_key(key: Key) -> Key:
    """Return `key` if it is one new-style key (`jax.random.key(0)`); raise `TypeError` otherwise."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(f"Expected a typed JAX key, jax.random.key(seed); got {key!r}.")
    if key.shape != ():
        raise ValueError(f"Expected one key with shape (); got keys with shape {key.shape}.")
    return key


def check_trailing(name: str, value, trailing: tuple[int, ...]) -> None:
    """Raise `ValueError` unless the last dimensions of `value` are `trailing`."""
    shape = np.shape(value)
    if len(shape) < len(trailing) or shape[len(shape) - len(trailing) :] != trailing:
        raise ValueError(f"Expected {name} with trailing shape {trailing}; got {shape}.")


def check_finite(name: str, value) -> None:
    """Raise `ValueError` with the count and the first position of non-finite entries."""
    bad = ~np.isfinite(np.asarray(value))
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"Expected finite {name}; got {int(bad.sum())} non-finite of {bad.size} values, first at {first}."
        )


def check_finite_values(name: str, value) -> None:
    """`check_finite` of everything that has a value; in a function that is being traced nothing is known yet."""
    for leaf in jax.tree.leaves(value):
        if not isinstance(leaf, jax.core.Tracer):
            check_finite(name, leaf)


def checked_rows(x, shape: tuple[int, ...]) -> Array:
    """Data sets of one shape as an array; raise `ValueError` where their shape is another, or a value is not finite."""
    x = jnp.asarray(x, jnp.result_type(float))
    if x.ndim != len(shape) + 1 or not len(x):
        raise ValueError(f"Expected rows of data of shape {shape}; got an array of shape {x.shape}.")
    check_trailing("x", x, shape)
    check_finite("x", x)
    return x


def check_names(names: Sequence[str], known: Sequence[str], what: str = "parameter") -> None:
    """Raise `ValueError` for a name that is not among `known`, suggesting the nearest one."""
    import difflib

    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"Unknown {what} {name!r}; expected one of {list(known)}.{hint}")
