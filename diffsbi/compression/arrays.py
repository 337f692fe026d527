"""Sets of stored simulations, checked before long work: what is wrong, and what to change."""

import hashlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Key
from diffsbi.compression.simulations import AbstractSimulations, Pairs, Simulated, Stored, Streamed

_DISAGREE = 0.05  # largest difference from a finite difference, in units of its norm
_CHECKED = 4  # rows that are compared with the simulator
_HINT = "the order of axes (data first, parameters last) and of the parameters"
_BLOCK = 256  # rows that are looked at at a time


class _Reader:
    """Rows of arrays that stay where they are; anything with a shape that can be sliced: memmaps, HDF5, Zarr."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __call__(self, index: np.ndarray, n_arrays: int) -> tuple[np.ndarray, ...]:
        low, high = int(index.min()), int(index.max()) + 1
        return tuple(np.asarray(a[low:high])[index - low] for a in self.arrays[:n_arrays])


def stored(theta0, x, dx, *, check: tuple[Callable, Key] | None = None) -> Stored | Streamed:
    """A set of simulations with derivatives.

    Args:
        theta0: Where they were made, `(p,)`.
        x: `(n_s, *x_shape)`; memmaps and other arrays that are neither NumPy's nor JAX's are streamed.
        dx: dx/dtheta of the first n_d of them, `(n_d, *x_shape, p)`.
        check: (simulate(theta, key), key): row i is `simulate(theta0, jax.random.fold_in(key, i))`; the first rows
            are compared with it, and their derivatives with its finite differences.

    Raises:
        ValueError: On shapes that do not fit, rows that are not finite, and derivatives that are not the simulator's.
    """
    theta0 = jnp.asarray(theta0, jnp.result_type(float))
    p, shape = len(theta0), tuple(x.shape[1:])
    if tuple(dx.shape[1:]) != (*shape, p):
        if tuple(dx.shape[1:]) == (p, *shape):
            hint = " The parameter's axis comes first there and should be the last: np.moveaxis(dx, 1, -1)."
        else:
            hint = ""
        raise ValueError(f"Expected derivatives of shape (n_d, {_joined(*shape, p)}); got {dx.shape}.{hint}")
    _check_counts(len(x), len(dx))
    _check_rows("x", x)
    _check_rows("dx/dtheta", dx)
    found = _streamed_or_not(Stored, dict(theta0=theta0), x, (dx,))
    if check is not None:
        check_derivatives(*check, theta0, x, dx)
    return found


def pairs(theta0, width, x, minus, plus, *, check: tuple[Callable, Key] | None = None) -> Pairs | Streamed:
    r"""A set of simulations with others of the same seeds at $\theta_0 \mp \delta\theta/2$.

    Args:
        theta0: The middle, `(p,)`.
        width: δθ, the whole distance of a pair, `(p,)`.
        x: `(n_s, *x_shape)` at theta0, as in `stored`.
        minus: Of the seeds of the first n_d, `(n_d, p, *x_shape)`: `minus[:, a]` has parameter a at its lower value.
        plus: The same, upper value.
        check: (simulate, key), to compare the first rows i with simulate(theta, fold_in(key, i)) at theta0 and at
            both ends of each pair.

    Raises:
        ValueError: Shapes that do not fit, rows that are not finite, pairs that do not differ, or are other ones.
    """
    theta0, width = (jnp.asarray(a, jnp.result_type(float)) for a in (theta0, width))
    if width.shape != theta0.shape or not bool(jnp.all(width > 0)):
        raise ValueError(f"Expected positive widths of shape {theta0.shape}; got {width}.")
    wanted = (len(theta0), *x.shape[1:])
    for name, a in (("minus", minus), ("plus", plus)):
        if tuple(a.shape[1:]) != wanted or len(a) != len(minus):
            raise ValueError(f"Expected {name} of shape ({len(minus)}, {_joined(*wanted)}); got {tuple(a.shape)}.")
    _check_counts(len(x), len(minus))
    for name, a in (("x", x), ("minus", minus), ("plus", plus)):
        _check_rows(name, a)
    if np.array_equal(np.asarray(minus[:1]), np.asarray(plus[:1])):
        raise ValueError("Expected pairs that differ; minus and plus are the same: were both simulated at theta0?")
    if check is not None:
        change = np.asarray(plus[:_CHECKED], float) - np.asarray(minus[:_CHECKED], float)
        derivatives = np.moveaxis(change, 1, -1) / np.asarray(width)
        hint = "which of minus and plus is which, whether width is the whole distance, the order of the parameters"
        check_derivatives(*check, theta0, x, derivatives, step=width / 2, what=("(plus - minus)[:, {}] / width", hint))
    return _streamed_or_not(Pairs, dict(theta0=theta0, width=width), x, (minus, plus))


def simulated(
    simulate: Callable[[Array, Key], Array], theta0, n_s: int, n_d: int | None = None, key: Key | None = None
):
    """Simulations on the fly, once tried: shapes, finite values, and forward-mode derivatives against differences.

    Raises:
        ValueError: If a simulation or its derivative is not finite, or no derivative (draws that jump with theta at
            fixed seeds cannot be differentiated: use `pairs`, or another way to draw).
    """
    theta0, n_d = jnp.asarray(theta0, jnp.result_type(float)), n_s if n_d is None else n_d
    _check_counts(n_s, n_d)
    trial = jax.random.key(0) if key is None else key
    shape = jax.eval_shape(simulate, theta0, trial).shape
    keys = jax.vmap(lambda i: jax.random.fold_in(trial, i))(jnp.arange(_CHECKED))
    x, dx = jax.jit(jax.vmap(lambda k: (simulate(theta0, k), jax.jacfwd(simulate)(theta0, k))))(keys)
    _check_rows("simulations", x)
    _check_rows("derivatives of the simulator", dx)
    check_derivatives(simulate, trial, theta0, x, dx)
    return Simulated(simulate=simulate, theta0=theta0, n_s=n_s, n_d=n_d, x_shape=shape, key=key)


def check_derivatives(simulate, key: Key, theta0, x, dx, *, step=None, what=("dx[..., {}]", _HINT)) -> None:
    """Raise `ValueError` unless the first rows of `x` are the simulator's, and of `dx` its central differences."""
    n = min(_CHECKED, len(dx))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
    some = jax.jit(jax.vmap(simulate, (None, 0)))
    at = lambda theta: np.asarray(some(theta, keys), float)  # noqa: E731
    values, derivatives = at(theta0), np.asarray(dx[:n])
    if not np.allclose(values, np.asarray(x[:n]), rtol=1e-3, atol=1e-3 * np.std(values)):
        raise ValueError(
            "Expected row i of x to be simulate(theta0, fold_in(key, i)), to check derivatives; it is not."
        )
    if step is None:
        step = float(jnp.finfo(theta0.dtype).eps) ** (1 / 3) * np.maximum(1.0, np.abs(theta0))
    for a in range(len(theta0)):
        move = np.where(np.arange(len(theta0)) == a, step, 0.0)
        expected = (at(theta0 + move) - at(theta0 - move)) / (2 * step[a])
        error = np.linalg.norm(derivatives[..., a] - expected)
        if error > _DISAGREE * max(np.linalg.norm(expected), 1e-3 * np.std(values)):
            raise ValueError(
                f"Expected {what[0].format(a)} to be the derivative with respect to parameter {a}; it differs by "
                f"{error:.3g} from the simulator's finite difference, of norm {np.linalg.norm(expected):.3g}. Look at "
                f"{what[1]}, and whether draws jump with theta."
            )


def check_different(train: AbstractSimulations, validation: AbstractSimulations) -> None:
    """Raise `ValueError` where validation rows are training rows; sets on disk are read for it once."""
    if isinstance(train, Simulated) != isinstance(validation, Simulated):
        return
    if isinstance(train, Simulated) and isinstance(validation, Simulated):
        same = train.key is not None and validation.key is not None and bool(train.key == validation.key)
        shared = validation.n_s if same else 0
    else:
        known, held_out = (_own_digests(s) for s in (train, validation))
        distinct = set(known)
        shared = sum(digest in distinct for digest in held_out)
        # Rows of few values coincide by chance: then only all of them say something.
        by_chance = len(distinct) < len(known) or len(set(held_out)) < len(held_out)
        shared = shared if shared == len(held_out) or not by_chance else 0
    if shared:
        raise ValueError(
            f"Expected validation simulations of other seeds than the training ones; {shared} are the same, and would "
            "not show overfitting. Split the rows, or simulate others."
        )


def shared_rows(train, held_out) -> int:
    """How many rows of the arrays `held_out` are rows of the arrays `train` as well."""
    known = set(_digests(*train))
    return sum(digest in known for digest in _digests(*held_out))


def _digests(*arrays) -> list[bytes]:
    rows = zip(*map(np.asarray, arrays), strict=True)
    return [hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in row)).digest() for row in rows]


def check_size(simulations: AbstractSimulations, m: int, what: str) -> None:
    """Raise `ValueError` unless n_s simulations have an invertible covariance of m summaries, and m are enough."""
    p = len(simulations.theta0)
    if m < p:
        raise ValueError(f"Expected at least as many summaries as parameters, {p}; the network has {m}: F is singular.")
    if simulations.n_s < m + 3:
        raise ValueError(
            f"Expected n_s >= n_summaries + 3 = {m + 3} {what} simulations (for an invertible covariance whose inverse "
            f"has a mean); got {simulations.n_s}. Simulate more, or let the network have fewer outputs."
        )


def _streamed_or_not(kind, fields, x, with_derivatives):
    n_s, n_d = len(x), len(with_derivatives[0])
    counts = dict(n_s=n_s, n_d=n_d, x_shape=tuple(x.shape[1:]))
    arrays = (x, *with_derivatives)
    if any(isinstance(a, np.memmap) or not isinstance(a, np.ndarray | jax.Array) for a in arrays):
        data = jnp.arange(n_d), jnp.arange(n_d, n_s)
        about = dict(read=_Reader(arrays), row_shapes=tuple(tuple(a.shape[1:]) for a in arrays))
        about |= dict(theta0=fields["theta0"], kind=kind(data=None, **fields, **counts))
        return Streamed(data=data, **about, **counts)
    x, *rest = (jnp.asarray(a, jnp.result_type(float)) for a in arrays)
    return kind(data=((x[:n_d], *rest), x[n_d:]), **fields, **counts)


def _own_digests(simulations) -> list[bytes]:
    if isinstance(simulations, Streamed):
        n, digests = simulations.n_s, []
        for i in range(0, n, _BLOCK):
            x = simulations.read(np.arange(i, min(i + _BLOCK, n)), 1)[0]
            digests += _digests(x.astype(simulations.theta0.dtype))
        return digests
    (x, *_), rest = simulations.data
    return _digests(x) + _digests(rest)


def _check_counts(n_s: int, n_d: int) -> None:
    if not 2 <= n_d <= n_s:
        raise ValueError(f"Expected 2 <= n_d <= n_s simulations with derivatives; got n_d = {n_d} and n_s = {n_s}.")


def _check_rows(name: str, a) -> None:
    """Block by block: the array may be larger than the memory."""
    bad = [i + np.flatnonzero(~_finite_rows(a[i : i + _BLOCK])) for i in range(0, len(a), _BLOCK)]
    rows = np.concatenate(bad)
    if len(rows):
        raise ValueError(f"Expected finite {name}; {len(rows)} of {len(a)} rows are not, the first is row {rows[0]}.")


def _finite_rows(block) -> np.ndarray:
    block = np.asarray(block)
    return np.isfinite(block.reshape(len(block), -1)).all(1)


def _joined(*shape: int) -> str:
    return ", ".join(map(str, shape))


def check_summaries(t: np.ndarray) -> None:
    """Raise `ValueError` where an untrained network's summaries `(n, m)` cannot be trained on."""
    if not np.isfinite(t).all():
        raise ValueError("Expected finite summaries of the untrained network; they are not. Scale the data.")
    if not np.all(t.std(0) > 0):
        constant = np.flatnonzero(t.std(0) == 0).tolist()
        raise ValueError(
            f"Expected summaries that vary with the data; {constant} of the untrained network are constant."
        )
