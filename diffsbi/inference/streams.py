"""Rows as a fit reads them: all at once where they are few, block by block where they are many.

A fit keeps its rows on the device, next to copies in memory, up to `MOST_ROWS` rows and `MOST_BYTES` bytes. Beyond
either it is streamed. The first is where an epoch takes a thousand steps of the largest batch, long enough to wait for
a validation loss; the second is where the half a dozen copies that a fit makes fill some gigabytes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Key
from diffsbi.inference.losses import score_outliers
from diffsbi.inference.rows import Columns, block_size, len_of
from diffsbi.inference.tails import Tails
from diffsbi.inference.training import split_rows

MOST_ROWS = 2**18
MOST_BYTES = 2**28
_MOST_RUN = 256  # rows next to each other that are read, and held out, together
_LEAST_RUNS = 64  # of a block


def is_many(*arrays) -> bool:
    """Whether these arrays (or None) are streamed."""
    n = len_of(arrays[0])
    width = sum(int(np.prod(a.shape[1:])) for a in arrays if a is not None)
    return n > MOST_ROWS or n * width * 4 > MOST_BYTES


class Blocks(NamedTuple):
    """Training rows of a stream: `blocks(k)` are those of an epoch after k others, `first` what a fit starts from."""

    first: dict[str, Array]
    read: Callable[[int], dict[str, Array]]

    def __call__(self, done: int) -> dict[str, Array]:
        return self.read(done)


def first_of(data: dict[str, Array] | Blocks) -> dict[str, Array]:
    """Training rows for what a fit starts from: all of them where they are in memory."""
    return data.first if isinstance(data, Blocks) else data


def moved(data: dict[str, Array] | Blocks, function: Callable[[dict[str, Array]], dict[str, Array]]):
    """Training rows in other coordinates."""
    if not isinstance(data, Blocks):
        return function(data)
    return Blocks(function(data.first), lambda done: function(data.read(done)))


class InMemory:
    """Unconstrained rows, all of them; an epoch passes over all that are trained on."""

    def __init__(self, columns: Columns, tails: Tails | None = None):
        self.columns, self._tails = columns, tails
        if "score" in columns:
            columns["use"] = 1 - score_outliers(columns["score"]).astype(columns["score"].dtype)

    @property
    def per_epoch(self) -> int:
        return len(self.columns["u"])

    def account(self) -> dict[str, Any]:
        """Least and largest data, how many scores are left out, and how long tails are drawn in."""
        x, use = self.columns["x"], self.columns.get("use")
        return _account(x.min(0), x.max(0), 0 if use is None else len(use) - use.sum(), self._tails)

    def split(self, key: Key, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices of rows to train on, and of those that are held out."""
        return split_rows(key, self.per_epoch, fraction)

    def take(self, index: np.ndarray) -> Columns:
        return {name: column[index] for name, column in self.columns.items()}

    sample = take

    def train(self, key: Key, index: np.ndarray, standardised: Callable[[Columns], dict[str, Array]]):
        """Standardised training rows, as `diffsbi.inference.training.fit` takes them."""
        return standardised(self.take(index))

    def judged(self, held_out: Sequence[np.ndarray]) -> tuple[Columns, list[np.ndarray]]:
        """Rows at which members are compared, and for each member the indices among them that it held out."""
        return self.columns, list(held_out)


class Stream:
    r"""Unconstrained rows that are read as they are needed, in runs of (usually) 256 rows next to each other.

    An epoch passes over one block: runs from anywhere among all rows, of which the training loop shuffles the rows.
    A pass over all runs, in an order of its own, takes many epochs; every epoch ends with a validation loss. Held out
    are whole runs, a quarter of a block of rows at most. As many rows give the standardisation, which rows have their
    score left out, and what `columns` needs to know about all rows. The last rows, which fill no run, are not used.

    Args:
        theta, x, score: What can be sliced; score may be None.
        prepare: Rows (theta, x, score) to learn from → (how tails of x are drawn in, the function from rows to
            unconstrained columns).
    """

    def __init__(self, theta, x, score, prepare: Callable[..., tuple[Tails | None, Callable[..., Columns]]]):
        self._arrays = (theta, x, score)
        size = block_size(*self._arrays)
        self._run = int(np.clip(size // _LEAST_RUNS, 1, _MOST_RUN))
        self.n_runs, self._per_block = len_of(theta) // self._run, size // self._run
        self.few = max(1, self._per_block // 4)
        chosen = np.random.default_rng(0).permutation(self.n_runs)[: self.few]
        sample = self._read(np.sort(chosen))
        self._tails, self._columns = prepare(*sample)
        self._of_scores = self._columns(*sample).get("score")
        self._account = self._checked()

    @property
    def per_epoch(self) -> int:
        return self._per_block * self._run

    def account(self) -> dict[str, Any]:
        return self._account

    def split(self, key: Key, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Runs to train on, and runs that are held out."""
        few = self.few / self.n_runs
        return split_rows(key, self.n_runs, min(fraction, few) if fraction < 1 else fraction)

    def take(self, runs: np.ndarray) -> Columns:
        return self._with_use(self._columns(*self._read(runs)))

    def sample(self, runs: np.ndarray) -> Columns:
        """Rows of some of the runs, for moments."""
        return self.take(runs[np.linspace(0, len(runs) - 1, min(self.few, len(runs))).round().astype(int)])

    def train(self, key: Key, runs: np.ndarray, standardised: Callable[[Columns], dict[str, Array]]) -> Blocks:
        per_block = min(self._per_block, len(runs))
        per_pass = len(runs) // per_block

        def read(done: int) -> dict[str, Array]:
            passes, place = divmod(done, per_pass)
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, passes), len(runs)))
            chosen = runs[order[place * per_block : (place + 1) * per_block]]
            return standardised(self.take(np.sort(chosen)))

        return Blocks(standardised(self.sample(runs)), read)

    def judged(self, held_out: Sequence[np.ndarray]) -> tuple[Columns, list[np.ndarray]]:
        union = np.unique(np.concatenate(held_out))
        rows = [np.searchsorted(union, runs)[:, None] * self._run + np.arange(self._run) for runs in held_out]
        return self.take(union), [index.ravel() for index in rows]

    def _read(self, runs: np.ndarray) -> tuple:
        """Rows of ascending runs; those that follow each other are read together."""
        run, pieces = self._run, np.split(runs, np.flatnonzero(np.diff(runs) > 1) + 1)
        parts = lambda a: [np.asarray(a[int(p[0]) * run : (int(p[-1]) + 1) * run]) for p in pieces]  # noqa: E731
        return tuple(None if a is None else np.concatenate(parts(a)) for a in self._arrays)

    def _with_use(self, columns: Columns) -> Columns:
        if "score" in columns:
            outliers = score_outliers(columns["score"], of=self._of_scores)
            columns["use"] = 1 - outliers.astype(columns["score"].dtype)
        return columns

    def _checked(self) -> dict[str, Any]:
        """One pass over everything: all columns are finite, and the account of them."""
        low, high, left_out = np.asarray(np.inf), np.asarray(-np.inf), 0
        for start in range(0, self.n_runs, self._per_block):
            columns = self.take(np.arange(start, min(start + self._per_block, self.n_runs)))
            low, high = np.minimum(low, columns["x"].min(0)), np.maximum(high, columns["x"].max(0))
            left_out += int(np.sum(1 - columns["use"])) if "use" in columns else 0
        return _account(low, high, left_out, self._tails)


def _account(low: np.ndarray, high: np.ndarray, left_out, tails: Tails | None) -> dict[str, Any]:
    if tails is None:
        limits = [low.tolist(), high.tolist()]
    else:
        limits = np.asarray(tails.let_out(jnp.stack([jnp.asarray(low), jnp.asarray(high)]))).tolist()
    account = {"x_range": limits, "scores_left_out": int(left_out)}
    return account if tails is None else account | {"tails": tails.described()}
