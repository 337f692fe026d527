"""Compiled programs: kept on disk, so that the second start of a script does not compile again; few in memory."""

import gc
import os
from pathlib import Path

import jax
from platformdirs import user_cache_path


def enable() -> None:
    """Cache compiled programs in the user's cache folder, unless the user has set JAX's cache or DIFFSBI_CACHE=off.

    A folder that cannot be written is left alone: compilation is then only slower.
    """
    folder = os.environ.get("DIFFSBI_CACHE", "")
    if folder == "off" or jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    path = Path(folder) if folder else user_cache_path("diffsbi") / "jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(path, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
_left = [0]  # maps after the last time


def forget_when_many(share: float = 0.5) -> bool:
    """Drop JAX's compiled programs where they fill this share of the memory maps that Linux grants a process.

    XLA maps several pages for each program and keeps them: some two thousand maps for each new number of rows that is
    fitted and sampled. At the limit (vm.max_map_count, 65 530) LLVM ends the process, which no one can catch. What is
    still wanted comes back from the cache on disk. Where other things fill the maps, nothing is dropped again and
    again.

    Returns:
        Whether anything was dropped; never where there is no /proc.
    """
    if not (_MAPS.exists() and _MOST_MAPS.exists()):
        return False
    limit = share * int(_MOST_MAPS.read_text())
    if _MAPS.read_bytes().count(b"\n") < max(limit, _left[0] + limit / 4):
        return False
    jax.clear_caches()
    gc.collect()
    _left[0] = _MAPS.read_bytes().count(b"\n")
    return True
