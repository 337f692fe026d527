"""Simulations on disk: written block by block, each with its checksums, resumed at the first missing block."""

import dataclasses
import errno
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from tqdm.auto import tqdm

from diffsbi._files import differences, explain_full_disk, read_json, write_json
from diffsbi._types import check_names

FORMAT = {"format": "diffsbi simulations", "version": 1}

TRAINING = ("theta", "score", "statistics")
"""What estimators are trained on."""

__all__ = [
    "TRAINING", "Block", "SimulationStore", "StoredArray", "bad_rows", "create_store", "open_store", "training_rows",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows `[start, stop)` of a store."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class SimulationStore:
    """A zarr 3 folder with one array per quantity, chunked by blocks of rows.

    A block counts only once its marker `blocks/<index>.json` is there: it holds the SHA-256 of every array's
    rows and is written, atomically, after them. A process killed at any moment thus loses one block at most.
    Make one with `create_store` or `open_store`.
    """

    folder: Path
    header: Mapping

    @property
    def n(self) -> int:
        return self.header["n"]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.header["names"])

    @property
    def blocks(self) -> list[Block]:
        size = self.header["block_size"]
        return [Block(i, start, min(start + size, self.n)) for i, start in enumerate(range(0, self.n, size))]

    def missing(self) -> list[Block]:
        """The blocks that are still to be written."""
        return [block for block in self.blocks if not self._complete(block)]

    def each_missing(self, progress: bool = False, what: str = "simulate") -> Iterator[Block]:
        """The missing blocks, with a bar over rows, named `what`, that starts at those that are done."""
        missing = self.missing()
        done = self.n - sum(map(len, missing))
        with tqdm(total=self.n, initial=done, disable=not (progress and missing), desc=what, unit="sim") as bar:
            for block in missing:
                yield block
                bar.update(len(block))

    def write(self, block: Block, arrays: Mapping[str, np.ndarray]) -> None:
        """Write one block; nothing of it counts before all of it is on disk.

        Raises:
            ValueError: If an array is missing, unknown or of the wrong shape.
            OSError: If the disk is full; the blocks before stay as they are.
        """
        arrays = {name: self._checked(name, value, block) for name, value in arrays.items()}
        if set(arrays) != set(self.header["arrays"]):
            raise ValueError(f"Expected arrays {sorted(self.header['arrays'])}; got {sorted(arrays)}.")
        with explain_full_disk(self.folder, f"simulations {block.start} to {block.stop - 1}"):
            group: Any = zarr.open_group(self.folder, mode="r+")
            with zarr.config.set({"array.write_empty_chunks": True}):  # rows of zeros must exist as a file too
                for name, value in arrays.items():
                    group[name][block.start : block.stop] = value
            checksums = {name: _checksum(value) for name, value in arrays.items()}
            write_json(self._marker(block), dataclasses.asdict(block) | {"sha256": checksums})

    def read(self, block: Block, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Read one block, of the named arrays or of all.

        Raises:
            ValueError: If the block is missing, or a file of it is truncated or altered: the message names the file.
        """
        if not self._complete(block):
            raise ValueError(f"Expected block {block.index} in {self.folder}; it has not been simulated yet.")
        expected = read_json(self._marker(block))["sha256"]
        group = zarr.open_group(self.folder, mode="r")
        return {name: self._read_checked(group, name, block, expected[name]) for name in names or self.header["arrays"]}

    def iterate(self, names: Sequence[str] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The blocks in order, one at a time in memory."""
        for block in self.blocks:
            yield self.read(block, names)

    def __getitem__(self, name: str) -> "StoredArray":
        """All rows of one array, read from disk where they are sliced: what `Estimator.append` takes."""
        check_names([name], list(self.header["arrays"]), "array")
        return StoredArray(self, name)

    def load(self, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """All rows of the named arrays (or of all arrays)."""
        blocks = list(self.iterate(names))
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

    def _checked(self, name: str, value, block: Block) -> np.ndarray:
        spec = self.header["arrays"].get(name)
        if spec is None:
            raise ValueError(f"Unknown array {name!r}; expected {sorted(self.header['arrays'])}.")
        value = np.ascontiguousarray(value, dtype=spec["dtype"])
        expected = (len(block), *spec["shape"])
        if value.shape != expected:
            raise ValueError(f"Expected {name} with shape {expected}; got {value.shape}.")
        return value

    def _read_checked(self, group, name: str, block: Block, expected: str) -> np.ndarray:
        file = self._chunk(name, block)
        try:
            value = np.ascontiguousarray(group[name][block.start : block.stop])
        except Exception as error:  # zarr's codecs raise many types on damaged bytes
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EMFILE):
                raise
            raise ValueError(_damaged(file, f"cannot be decoded: {error}")) from error
        if _checksum(value) != expected:
            raise ValueError(_damaged(file, "does not match its checksum"))
        return value

    def _complete(self, block: Block) -> bool:
        chunks = [self._chunk(name, block) for name in self.header["arrays"]]
        return self._marker(block).is_file() and all(chunk.is_file() for chunk in chunks)

    def _chunk(self, name: str, block: Block) -> Path:
        zeros = ["0"] * len(self.header["arrays"][name]["shape"])
        return self.folder.joinpath(name, "c", str(block.index), *zeros)

    def _marker(self, block: Block) -> Path:
        return self.folder / "blocks" / f"{block.index:06d}.json"


class StoredArray:
    """One array of a store, of which slices of rows are read; a block's checksum is tested when it is first read."""

    def __init__(self, store: SimulationStore, name: str):
        self._store, self._name = store, name
        group: Any = zarr.open_group(store.folder, mode="r")
        self._array = group[name]
        self._tested: set[int] = set()
        self.shape: tuple[int, ...] = self._array.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows `[start, stop)`.

        Raises:
            ValueError: As `SimulationStore.read`.
        """
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"Expected a slice of consecutive rows; got {rows}.")
        blocks, size = self._store.blocks, self._store.header["block_size"]
        for index in range(start // size, -(-stop // size)):
            if index not in self._tested:
                self._store.read(blocks[index], [self._name])
                self._tested.add(index)
        return self._array[start:stop]


def create_store(
    folder: str | Path,
    *,
    config: Mapping,
    seed: int,
    names: Sequence[str],
    n: int,
    arrays: Mapping[str, tuple[int, ...]],
    block_size: int = 100,
    dtype: str = "float32",
) -> SimulationStore:
    """Create a store, or go on with the one that is there if it is the same.

    Args:
        folder: Where it lives (a new or existing store).
        config: Everything that decides the numbers, as JSON values.
        seed: The seed they were drawn with.
        names: Parameter names, in the order of theta's last axis.
        n: Number of rows.
        arrays: Array name → shape of one row.
        block_size: Rows per block.
        dtype: Of every array.

    Raises:
        ValueError: If `folder` holds a store from another configuration: the message says what differs.
        OSError: If the disk is full.
    """
    if n < 1 or block_size < 1:
        raise ValueError(f"Expected n >= 1 and block_size >= 1; got n = {n}, block_size = {block_size}.")
    folder = Path(folder)
    shapes = {name: {"shape": list(shape), "dtype": dtype} for name, shape in arrays.items()}
    header = FORMAT | {"n": n, "block_size": block_size, "seed": seed, "names": list(names)}
    header |= {"arrays": shapes, "config": dict(config)}
    if (folder / "header.json").exists():
        found = differences(open_store(folder).header, header)
        if found:
            there = "; ".join(found)
            raise ValueError(f"{folder} holds simulations from another configuration ({there}). {_ELSEWHERE}")
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"Expected {folder} to be empty or a store of simulations; it holds other files.")
    with explain_full_disk(folder, "a new store of simulations"):
        write_json(folder / "header.json", header)
        group = zarr.open_group(folder, mode="a", zarr_format=3)
        for name, shape in arrays.items():
            if name not in group:
                group.create_array(name, shape=(n, *shape), chunks=(min(block_size, n), *shape), dtype=dtype)
    return SimulationStore(folder, header)


def open_store(folder: str | Path) -> SimulationStore:
    """Open an existing store for reading.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its header is damaged or of another format.
    """
    path = Path(folder) / "header.json"
    if not path.is_file():
        raise FileNotFoundError(f"Expected a store of simulations at {folder}; it has no header.json.")
    header = read_json(path)
    if not isinstance(header, dict) or {key: header.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"Expected {path} to say {FORMAT}; it was written by something else or another version.")
    return SimulationStore(Path(folder), header)


_ELSEWHERE = "Choose another folder, or go back to that configuration."


def _checksum(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def _damaged(file: Path, why: str) -> str:
    return (
        f"The stored simulations in {file} are damaged (the file {why}). Delete that file and simulate again with "
        "the same command: only its block is made anew; the others stay as they are."
    )


def bad_rows(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Indices of the rows with a value that is not finite."""
    finite = [np.isfinite(value.reshape(len(value), -1)).all(1) for value in rows.values()]
    return np.flatnonzero(~np.all(finite, axis=0))


def training_rows(store: SimulationStore, compress) -> dict[str, np.ndarray]:
    """theta, score and compressed statistics t of the finite simulations; of the statistics, one block is in memory."""
    parts = []
    for block in store.iterate(TRAINING):
        rows = {name: np.delete(value, bad_rows(block), axis=0) for name, value in block.items()}
        parts.append({name: rows[name] for name in ("theta", "score")} | {"t": compress(rows["statistics"])})
    return {name: np.concatenate([rows[name] for rows in parts]) for name in parts[0]}
