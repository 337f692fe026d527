"""Fixtures shared by every room's tests."""

import functools
import itertools
import os
import threading
from importlib.metadata import version
from pathlib import Path

# The suite's time is mostly compilation: hardly anything is optimised, but for tests marked `optimised` (see below).
# Subprocesses inherit that.
os.environ.setdefault("DIFFSBI_COMPILE", "quick")
if version("jaxlib").startswith("0.10."):  # XLA aborts on a flag that it does not know
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")  # one piece: workers share the cores

import jax  # noqa: E402  (after the flags)
import matplotlib
import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
if jax.config.jax_compilation_cache_dir is None and "DIFFSBI_CACHE" not in os.environ:
    # Also the many small programs, for the other workers and the next run.
    jax.config.update("jax_compilation_cache_dir", str(REPOSITORY / ".pytest_cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

import diffsbi as ds  # noqa: E402  (it would choose another cache)
from diffsbi._cache import forget_when_many  # noqa: E402

if version("jax").startswith("0.10."):
    from jax._src.interpreters import mlir

    # JAX makes a new MLIR context for every function that it compiles, which takes longer than to lower a small one:
    # a third of the time of an operation that is compiled alone, and the suite has tens of thousands. A context keeps
    # what it has seen, so it is not kept for ever either; and every thread has its own.
    _new, _count = mlir.make_ir_context, itertools.count()
    _context = functools.lru_cache(maxsize=2)(lambda thread, block: _new())
    mlir.make_ir_context = lambda: _context(threading.get_ident(), next(_count) // 200)

matplotlib.use("Agg")
jax.config.update("jax_numpy_rank_promotion", "raise")
if hasattr(jax.config, "jax_use_shardy_partitioner"):
    jax.config.update("jax_use_shardy_partitioner", False)  # there is one device, and lowering is quicker


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Compile quickly: no optimisation but for tests marked `optimised`, which run longer than they compile.

    Before any fixture, also one of a module, is made.
    """
    jax.config.update("jax_disable_most_optimizations", item.get_closest_marker("optimised") is None)


@pytest.fixture(autouse=True)
def few_memory_maps():
    """Drop compiled functions long before they fill the table of memory maps; some tests compile a great many."""
    yield
    forget_when_many(0.38)


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def linear():
    """A linear simulator of two parameters, of which the exact posterior is known."""
    return ds.linear_gaussian(dim=2, n_latents=3, n_data=4, seed=2)


@pytest.fixture(scope="session")
def observed(linear):
    """One draw of it."""
    return linear.draw(jax.random.key(9), 1, with_score=False).x[0]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the published LSST-Y10 files; the test is skipped where there is none."""
    folder = Path(os.environ.get("DIFFSBI_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no published data: set DIFFSBI_DATA to its folder (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def shift_table(data_folder) -> Path:
    """Path of the published table of log-normal shifts."""
    return _file(data_folder, "lognormal_shifts_LSSTY10.npy")


@pytest.fixture(scope="session")
def observation(data_folder) -> np.ndarray:
    """The published map, float32, (256, 256, 5) = (row, column, bin)."""
    return np.load(_file(data_folder, "lsst_y10_observation_256.npy"))


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        pytest.skip(f"no {name} in {folder}")
    return folder / name
