"""Blocks of a chain on disk: written whole, checked when read, so that a killed run goes on where it stopped."""

import hashlib
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._files import differences, explain_full_disk, load_npz, read_json, write_json, write_npz

VERSION = 1
START = "log_density_at_start"


class BlockStore:
    """`sampler.json` (the configuration) and, for each group of chains, its blocks and the state after each.

    The state of a block is written before the block: whenever the run is killed, every whole block has its state. All
    states stay, so that a block whose file is damaged later can be sampled again from the state before it.

    Raises:
        ValueError: If the folder holds blocks of another configuration or target, naming the differences.
    """

    def __init__(self, folder, configuration: dict):
        self.folder = Path(folder)
        path = self.folder / "sampler.json"
        configuration = dict(configuration, version=VERSION)
        if path.exists():
            _same(path, read_json(path), configuration)
        elif any(self.folder.glob("group*_block*.npz")):
            raise ValueError(f"Expected {path} beside the blocks of a chain; it is missing.")
        else:
            with explain_full_disk(self.folder, "the sampler's configuration"):
                write_json(path, configuration)

    def write(self, group: int, k: int, record: dict[str, np.ndarray], state) -> None:
        """Write block `k` of a group and the state after it.

        Raises:
            RuntimeError: If a state is there that differs: this machine does not repeat the chain, whose later blocks
                would not follow.
        """
        packed, path = _pack(state), self._state(group, k)
        before = _read(path) if path.exists() else None
        if before is not None and array_digest(*before.values()) != array_digest(*packed.values()):
            raise RuntimeError(f"Expected block {k} sampled again to end in {path}; it does not. Remove {self.folder}.")
        with explain_full_disk(self.folder, f"block {k} of the chains"):
            if before is None:
                _write(path, packed)
            _write(self._block(group, k), record)

    def read(self, group: int, k: int) -> dict[str, np.ndarray] | None:
        """Block `k` of a group; None where there is none, with a warning where its file is damaged or lost."""
        path = self._block(group, k)
        return _read(path) if path.exists() or self.has_state(group, k + 1) else None

    def has_state(self, group: int, k: int) -> bool:
        return self._state(group, k).exists()

    def read_state(self, group: int, k: int, like):
        """The state after block `k`, a pytree as `like`; None, with a warning, where its file is damaged."""
        path = self._state(group, k)
        arrays = _read(path)
        try:
            return None if arrays is None else _unpack(arrays, like)
        except (KeyError, ValueError) as error:
            raise ValueError(f"Expected {path} to hold this sampler's state; {error}.") from error

    def _block(self, group: int, k: int) -> Path:
        return self.folder / f"group{group:02d}_block{k:05d}.npz"

    def _state(self, group: int, k: int) -> Path:
        return self.folder / f"group{group:02d}_state{k:05d}.npz"


def array_digest(*arrays) -> str:
    """SHA-256 of arrays: their types, shapes and values."""
    total = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        total.update(f"{array.dtype.str}{array.shape}".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def _same(path: Path, there: dict, here: dict) -> None:
    there, here = dict(there), dict(here)
    start, wanted = np.asarray(there.pop(START, [])), np.asarray(here.pop(START, []))
    found = differences(there, here)
    if found:
        lines = "; ".join(found)
        raise ValueError(f"Expected {path.parent} to hold chains of this configuration; it differs in {lines}.")
    if start.shape != wanted.shape or not np.allclose(start, wanted, rtol=1e-3, atol=1e-2):
        values = f"at the starting points its log-density was {start.tolist()}, now it is {wanted.tolist()}"
        raise ValueError(f"Expected {path.parent} to hold chains of this target; {values}.")


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    digest = array_digest(*[arrays[name] for name in sorted(arrays)])
    write_npz(path, arrays | dict(sha256=np.frombuffer(digest.encode(), np.uint8)))


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a file, None with a warning if it is damaged or missing."""
    try:
        arrays = load_npz(path)
    except (FileNotFoundError, ValueError) as error:
        _warn(path, str(error))
        return None
    digest = bytes(arrays.pop("sha256", np.zeros(0, np.uint8))).decode("ascii", "replace")
    if digest != array_digest(*[arrays[name] for name in sorted(arrays)]):
        _warn(path, f"its content does not have its checksum {digest or '(none)'}")
        return None
    return arrays


def _warn(path: Path, why: str) -> None:
    warnings.warn(f"{path} is damaged or missing ({why}): its block is sampled again.", stacklevel=3)


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _pack(state) -> dict[str, np.ndarray]:
    leaves = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]
    return {f"leaf{i:03d}": np.asarray(leaf) for i, leaf in enumerate(leaves)}


def _unpack(arrays: dict[str, np.ndarray], like):
    leaves, structure = jax.tree.flatten(like)
    out = []
    for i, leaf in enumerate(leaves):
        value = arrays[f"leaf{i:03d}"]
        shape = jax.random.key_data(leaf).shape if _is_key(leaf) else leaf.shape
        if value.shape != shape:
            raise ValueError(f"leaf {i} has shape {value.shape}, not {shape}")
        there = jnp.asarray(value)
        out.append(jax.random.wrap_key_data(there, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else there)
    return jax.tree.unflatten(structure, out)
