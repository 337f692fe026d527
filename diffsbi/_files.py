"""Files that survive interruption: written whole or not at all, checked when read."""

import contextlib
import errno
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

__all__ = [
    "differences",
    "digest",
    "explain_full_disk",
    "load_npz",
    "read_json",
    "write_atomically",
    "write_json",
    "write_npz",
]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write `path` whole: a reader (or a crash) sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path):
    """Read JSON; raise `ValueError` naming the file where it is damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected {path} to be JSON; it is truncated or damaged ({error}).") from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to an `.npz` file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_atomically(path, buffer.getvalue())


# numpy parses each header with `ast.literal_eval`, which in Python 3.11 raises SystemError now and then where two
# threads are in it at once (https://github.com/python/cpython/issues/106905).
_READING = threading.Lock()


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an `.npz` file; raise `ValueError` naming the file where it is damaged."""
    import zipfile
    import zlib

    try:
        with _READING, np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"Expected {path} to be an .npz file; it is truncated or damaged ({error}).") from error


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(there, here, path: str = "") -> list[str]:
    """Where two nested settings differ: `["survey.n_pix: 64 there, 256 here", ...]`."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = list(there) + [k for k in here if k not in there]
        found = [differences(there.get(k), here.get(k), f"{path}.{k}" if path else str(k)) for k in keys]
        return [line for lines in found for line in lines]
    return [] if there == here else [f"{path}: {there!r} there, {here!r} here"]


@contextlib.contextmanager
def explain_full_disk(path: Path, what: str) -> Iterator[None]:
    """Turn "no space left on device" into a message that names the place, what was written, and what to do."""
    try:
        yield
    except OSError as error:
        explained = str(error.strerror).startswith(_FULL)  # by a caller nearer to what was written
        if explained or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"{_FULL} that holds {path}, while writing {what}. What was finished before is "
            "untouched; free some space (or choose another --out) and repeat the same command to go on."
        )
        raise OSError(error.errno, message) from error


_FULL = "No space left on the disk"
