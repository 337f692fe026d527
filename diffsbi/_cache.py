"""JAX's persistent compilation cache, on by default: the second start of a script does not compile again."""

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
