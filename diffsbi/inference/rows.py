"""Appended simulations: arrays in memory or on disk, checked block by block, read slice by slice."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import ks_2samp

from diffsbi._types import check_names
from diffsbi.prior import Prior

_BLOCK_ROWS = 2**16
_BLOCK_BYTES = 2**25
_FEWEST_TO_PLACE = 10
_ELSEWHERE = 1e-4  # p-value

Columns = dict[str, np.ndarray]


class Part(NamedTuple):
    """The rows of one `append`: arrays, or what can be sliced like arrays, and what theta was drawn from."""

    theta: Any
    x: Any
    score: Any
    proposal: Any


def checked_part(prior: Prior, before: Sequence[Part], theta, x, score, proposal, on_invalid: str) -> Part:
    """What `Estimator.append` adds to the rows `before`; raises as it says."""
    theta, x, score = (None if a is None else as_rows(a) for a in (theta, x, score))
    _check_shapes(prior, before, theta, x, score)
    check_names([on_invalid], ["raise", "drop"], "on_invalid")
    if on_invalid == "drop":
        theta, x, score = _finite_rows(prior, theta, x, score)
    for name, array in {"theta": theta, "x": x, "score": score}.items():
        if array is not None:
            _check_finite(name, array, () if name == "x" else prior.names)
    for (block,) in blocks_of(theta):
        prior.check(block)
    if proposal is not None:
        _check_proposal(proposal, theta)
    return Part(theta, x, score, proposal)


def _check_proposal(proposal, theta) -> None:
    if not hasattr(proposal, "log_prob"):
        raise ValueError(f"Expected a proposal with log_prob(theta), or None for the prior; got {proposal!r}.")
    if not getattr(proposal, "is_normalised", True):
        raise ValueError(
            f"Expected a proposal whose log_prob is normalised; that of a {type(proposal).__name__} is known up to a "
            "constant only. Take gaussian_proposal(prior, draws) of its draws, or give the rows to NLE or NRE, which "
            "need no proposal."
        )
    p = theta.shape[1]
    try:
        shape = jax.eval_shape(proposal.log_prob, jax.ShapeDtypeStruct((2, p), jnp.result_type(float))).shape
    except Exception as error:
        what = f"Expected a proposal whose log_prob is a JAX function, theta (n, {p}) -> (n,)"
        raise ValueError(f"{what}; got {error}") from error
    if shape != (2,):
        raise ValueError(f"Expected a proposal with log_prob of theta (n, {p}) -> (n,); got {shape} for n = 2.")


def _check_shapes(prior: Prior, before: Sequence[Part], theta, x, score) -> None:
    p = prior.dim
    if len(theta.shape) != 2 or theta.shape[1] != p:
        raise ValueError(f"Expected theta with shape (n, {p}) for {list(prior.names)}; got {theta.shape}.")
    if len(x.shape) != 2 or len_of(x) != len_of(theta) or x.shape[1] < 1:
        raise ValueError(f"Expected x with shape ({len_of(theta)}, d), summaries of each row; got {x.shape}.")
    if score is not None and tuple(score.shape) != tuple(theta.shape):
        raise ValueError(f"Expected score with shape {theta.shape}, as theta; got {score.shape}.")
    if not before:
        return
    if x.shape[1] != before[0].x.shape[1]:
        raise ValueError(f"Expected x with {before[0].x.shape[1]} columns, as appended before; got {x.shape[1]}.")
    if (score is None) != (before[0].score is None):
        with_score = "with" if before[0].score is not None else "without"
        raise ValueError(
            f"Expected rows {with_score} score, as appended before; got the opposite. Leave it out everywhere, or "
            "use two estimators."
        )


def as_rows(array):
    """The array itself where slices of it can be read (memmap, zarr, h5py), all of it as a NumPy array otherwise."""
    sliced = hasattr(array, "shape") and hasattr(array, "__getitem__")
    return array if sliced and not isinstance(array, jax.Array) else np.asarray(array)


class Joined:
    """Arrays one after another, read slice by slice."""

    def __init__(self, parts: Sequence):
        self.parts = tuple(parts)
        self.edges = np.cumsum([0, *(len_of(part) for part in self.parts)])
        self.shape = (int(self.edges[-1]), *self.parts[0].shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = np.searchsorted(self.edges, [start, max(start, stop - 1)], side="right") - 1
        inside = zip(self.edges[first:], self.parts[first : last + 1], strict=False)
        return np.concatenate([np.asarray(p[max(start - edge, 0) : min(stop - edge, len_of(p))]) for edge, p in inside])


class Selected:
    """Some rows of an array, by their ascending indices, read slice by slice."""

    def __init__(self, array, index: np.ndarray):
        self.array, self.index = array, index
        self.shape = (len(index), *array.shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        index = self.index[rows]
        if not len(index):
            return np.asarray(self.array[0:0])
        return np.asarray(self.array[int(index[0]) : int(index[-1]) + 1])[index - index[0]]


def len_of(array) -> int:
    return int(array.shape[0])


def select(keep: np.ndarray, *arrays):
    """The rows of each array (or None) where `keep (n,)` is true: copied from memory, referred to on disk."""
    index = np.flatnonzero(keep)
    chosen = lambda a: a[index] if type(a) is np.ndarray else Selected(a, index)  # noqa: E731
    return tuple(None if a is None else chosen(a) for a in arrays)


def block_size(*arrays) -> int:
    """Rows of these arrays (or None) that are held at once: at most 65 536, and about 32 MiB."""
    width = 4 * sum(int(np.prod(a.shape[1:])) for a in arrays if a is not None)
    return int(np.clip(_BLOCK_BYTES // max(1, width), 1, _BLOCK_ROWS))


def blocks_of(*arrays) -> Iterator[tuple]:
    """Arrays of the same length (or None), block by block."""
    size = block_size(*arrays)
    for start in range(0, max(1, len_of(arrays[0])), size):
        yield tuple(None if a is None else np.asarray(a[start : start + size]) for a in arrays)


def _check_finite(name: str, array, columns: Sequence[str]) -> None:
    """Raise where a value of a long array is not finite, and say how many there are, in which rows and columns."""
    bad, first, start = np.zeros(array.shape[1], int), None, 0
    rows = 0
    for (block,) in blocks_of(array):
        wrong = ~np.isfinite(block)
        if wrong.any() and first is None:
            row, *rest = np.argwhere(wrong)[0]
            first = (int(row) + start, *map(int, rest))
        bad, rows, start = bad + wrong.sum(0), rows + int(wrong.any(1).sum()), start + len(block)
    if rows:
        named = "; ".join(f"{c}: {k}" for c, k in zip(columns, bad, strict=True) if k) if columns else ""
        raise ValueError(
            f"Expected finite {name}; got {bad.sum()} non-finite of {int(np.prod(array.shape))} values, in {rows} of "
            f"{start} rows{f' ({named})' if named else ''}, first at {first}. on_invalid='drop' leaves such rows out."
        )


def _finite_rows(prior: Prior, theta, x, score):
    """The rows in which every number is finite."""
    named = {"theta": theta, "x": x} | ({} if score is None else {"score": score})
    blocks = [[~np.isfinite(a).all(1) for a in block] for block in blocks_of(*named.values())]
    bad = dict(zip(named, map(np.concatenate, zip(*blocks, strict=True)), strict=True))
    keep = ~np.logical_or.reduce(list(bad.values()))
    if keep.all():
        return theta, x, score
    where = ", ".join(f"{name} in {int(rows.sum())}" for name, rows in bad.items() if rows.any())
    if not keep.any():
        raise ValueError(f"Expected a row that is finite; none of {len(keep)} is ({where}).")
    places = _places(prior.names, theta, keep, bad["theta"])
    warnings.warn(
        f"Left out {int((~keep).sum())} of {len(keep)} rows that are not finite ({where}): the fit is biased "
        f"{places or 'wherever such rows are likelier than elsewhere'}.",
        stacklevel=4,
    )
    return select(keep, theta, x, score)


def _places(names: Sequence[str], theta, keep: np.ndarray, unknown: np.ndarray) -> str:
    """In which parameters rows that are left out are elsewhere than the others, in words; empty where in none."""
    theta = np.concatenate([block for (block,) in blocks_of(theta)])[~unknown].astype(float)
    out = ~keep[~unknown]
    if not _FEWEST_TO_PLACE <= out.sum() <= len(out) - _FEWEST_TO_PLACE:
        return ""
    found = []
    for name, column in zip(names, theta.T, strict=True):
        if ks_2samp(column[out], column[~out]).pvalue < _ELSEWHERE / len(names):
            (low, high), (least, most) = (np.quantile(a, [0.1, 0.9]) for a in (column[out], column))
            found.append(f"{name} in [{low:.3g}, {high:.3g}] (of all rows: in [{least:.3g}, {most:.3g}])")
    return "there, as these are not like the others: 80 % of them have " + ", ".join(found) if found else ""


def where(inside: Callable[[np.ndarray], np.ndarray], part: Part) -> Part:
    """The rows with theta `inside` a region."""
    keep = np.concatenate([np.asarray(inside(block)) for (block,) in blocks_of(part.theta)])
    theta, x, score = select(keep, *part[:3])
    return Part(theta, x, score, part.proposal)
