"""Trained modules on disk: one file with a JSON header, a checksum and the arrays; no pickle.

The file holds numbers, not code: whoever loads it brings a module of the same architecture, which is checked.
"""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._files import write_atomically

MAGIC = b"diffsbi-compression\n"
VERSION = 1
_PROBE_TOLERANCE = 1e-2  # devices round the products of a network in their own way
_CONTAINERS = {"tuple": tuple, "list": list}


def save_module(path, kind: str, module, header: dict[str, Any]) -> None:
    """Write the arrays of `module` and a JSON-able `header`; an older file is replaced when the new one is complete."""
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, module)
    payload = buffer.getvalue()
    about = {"version": VERSION, "kind": kind, "arrays": _arrays(module), "bytes": len(payload)}
    about |= {"sha256": hashlib.sha256(payload).hexdigest(), "header": header}
    write_atomically(Path(path), MAGIC + json.dumps(about).encode() + b"\n" + payload)


def read_header(path, kind: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(the header of `save_module`, what it wrote about the arrays, the arrays' bytes), checked.

    Raises:
        ValueError: If the file is none of ours, of another kind or version, truncated or altered.
    """
    path = Path(path)
    start, _, content = path.read_bytes().partition(MAGIC)
    if start or not content:
        raise ValueError(f"Expected a {kind} in {path}; it is another one.")
    first, _, payload = content.partition(b"\n")
    try:
        about = json.loads(first)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a complete header in {path}; the file is truncated or damaged.") from error
    if (about["version"], about["kind"]) != (VERSION, kind):
        raise ValueError(f"Expected {kind} of version {VERSION} in {path}; got {about['kind']} of {about['version']}.")
    if len(payload) != about["bytes"] or hashlib.sha256(payload).hexdigest() != about["sha256"]:
        raise ValueError(
            f"Expected {about['bytes']} undamaged bytes of arrays in {path}; they are truncated or altered."
        )
    return about["header"], about, payload


def load_module(path, about: dict[str, Any], payload: bytes, like):
    """The module, of the same architecture as `like`.

    Raises:
        ValueError: If an array of `like` has another place, shape or type than in the file.
    """
    here = _arrays(like)
    if here != about["arrays"]:
        pairs = zip(about["arrays"] + [None] * len(here), here + [None] * len(about["arrays"]), strict=False)
        there, given = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"Expected the architecture that was saved in {path}; the arrays differ, first {_words(there)} there and "
            f"{_words(given)} here. Build the network with the settings it was trained with."
        )
    return eqx.tree_deserialise_leaves(io.BytesIO(payload), like)


def described(rows) -> Any:
    """Shape of a data set, mean and standard deviation of many, given `rows` with a leading n; for JSON.

    Float arrays may stand in tuples, lists, and dictionaries with names; None where there is anything else.
    """
    if isinstance(rows, dict):
        parts = {name: described(value) for name, value in rows.items()}
        named = all(isinstance(name, str) for name in parts)
        return {"dict": parts} if named and None not in parts.values() else None
    if type(rows) in _CONTAINERS.values():
        inside = [described(value) for value in rows]
        return None if None in inside else {type(rows).__name__: inside}
    if not (hasattr(rows, "dtype") and jnp.issubdtype(rows.dtype, jnp.floating)):
        return None
    return [list(map(int, rows.shape[1:])), float(np.mean(rows)), float(np.std(rows))]


def fixed_input(description) -> Any:
    """A data set as `described`, always the same: what a network makes of it tells two architectures apart."""
    if isinstance(description, dict):
        ((kind, parts),) = description.items()
        if kind == "dict":
            return {name: fixed_input(part) for name, part in parts.items()}
        return _CONTAINERS[kind](map(fixed_input, parts))
    shape, loc, scale = description
    return jnp.asarray(loc + scale * np.random.default_rng(0).normal(size=shape), jnp.result_type(float))


def check_probe(path, found, saved) -> None:
    """Raise ValueError where a loaded network makes other numbers of the `fixed_input` than the one that was saved."""
    found, saved = np.asarray(found, float), np.asarray(saved, float)
    largest = np.max(np.abs(saved), initial=0.0, where=np.isfinite(saved))
    if not np.allclose(found, saved, rtol=0, atol=_PROBE_TOLERANCE * largest, equal_nan=True):
        raise ValueError(
            f"Expected the network that was saved in {path}; the one given has arrays of the same shapes but makes "
            f"{found} of a fixed input instead of {saved}. Is its activation another one?"
        )


def _arrays(module) -> list[list]:
    """[place, shape, type] of every array."""
    leaves = jax.tree_util.tree_leaves_with_path(eqx.filter(module, eqx.is_array))
    return [[jax.tree_util.keystr(place), list(np.shape(leaf)), str(leaf.dtype)] for place, leaf in leaves]


def _words(entry) -> str:
    return "none" if entry is None else f"{entry[0]} of shape {tuple(entry[1])}, {entry[2]}"
