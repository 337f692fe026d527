"""Simulations on disk: resumed after interruption, damage found and named, strangers refused."""

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr

from diffsbi._files import load_npz, write_npz
from diffsbi.store import create_store, open_store

ARRAYS = {"theta": (2,), "x": (3, 4)}


def make(folder, n=25, block_size=10, **changes):
    settings = {"config": {"survey": {"n_pix": 64}}, "seed": 0, "names": ["a", "b"], "arrays": ARRAYS}
    return create_store(folder, n=n, block_size=block_size, **(settings | changes))


def rows(block):
    rng = np.random.default_rng(block.index)
    return {name: rng.normal(size=(len(block), *shape)).astype("float32") for name, shape in ARRAYS.items()}


def filled(folder):
    store = make(folder)
    for block in store.missing():
        store.write(block, rows(block))
    return store


def test_blocks_cover_all_rows_and_read_back(tmp_path):
    store = filled(tmp_path / "s")
    assert [(b.start, b.stop) for b in store.blocks] == [(0, 10), (10, 20), (20, 25)]
    assert store.missing() == []
    loaded = open_store(tmp_path / "s").load()
    for name in ARRAYS:
        np.testing.assert_array_equal(loaded[name], np.concatenate([rows(b)[name] for b in store.blocks]))
    assert list(store.load(["theta"])) == ["theta"]


def test_a_store_resumes_at_the_first_missing_block(tmp_path):
    store = make(tmp_path / "s")
    store.write(store.blocks[0], rows(store.blocks[0]))
    assert [b.index for b in make(tmp_path / "s").missing()] == [1, 2]
    with pytest.raises(ValueError, match="block 1 .* not been simulated"):
        store.load()


def test_a_killed_process_loses_one_block_at_most(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path[:0] = {[os.path.dirname(__file__)]!r}
        from pathlib import Path
        import diffsbi.store as module
        from test_store import make, rows
        store = make(Path({str(tmp_path / "s")!r}))
        store.write(store.blocks[0], rows(store.blocks[0]))
        module.write_json = lambda *a: os.kill(os.getpid(), signal.SIGKILL)     # after the rows, before the marker
        store.write(store.blocks[1], rows(store.blocks[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = make(tmp_path / "s")
    assert [b.index for b in store.missing()] == [1, 2]
    np.testing.assert_array_equal(store.read(store.blocks[0])["x"], rows(store.blocks[0])["x"])


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_damage_is_found_and_the_file_named_then_remade(tmp_path, harm):
    store = filled(tmp_path / "s")
    file = tmp_path / "s" / "x" / "c" / "1" / "0" / "0"
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes({"truncate": content[: len(content) // 2], "flip": content, "empty": b""}[harm])
    with pytest.raises(ValueError, match=r"x/c/1/0/0 are damaged"):
        store.load()
    np.testing.assert_array_equal(store.read(store.blocks[0])["x"], rows(store.blocks[0])["x"])
    file.unlink()
    assert [b.index for b in make(tmp_path / "s").missing()] == [1]
    store.write(store.blocks[1], rows(store.blocks[1]))
    assert store.load()["x"].shape == (25, 3, 4)


def test_zero_rows_are_stored_too(tmp_path):
    store = make(tmp_path / "s", n=10)
    store.write(store.blocks[0], {name: np.zeros((10, *shape)) for name, shape in ARRAYS.items()})
    assert store.missing() == [] and not store.load()["x"].any()


def test_another_configuration_is_refused_and_the_difference_named(tmp_path):
    filled(tmp_path / "s")
    with pytest.raises(ValueError, match=r"config.survey.n_pix: 64 there, 128 here"):
        make(tmp_path / "s", config={"survey": {"n_pix": 128}})
    with pytest.raises(ValueError, match=r"seed: 0 there, 1 here"):
        make(tmp_path / "s", seed=1)
    assert make(tmp_path / "s").missing() == []


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        make(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_damaged_headers_are_named(tmp_path):
    filled(tmp_path / "s")
    header = tmp_path / "s" / "header.json"
    whole = header.read_text()
    header.write_text(whole[:50])
    with pytest.raises(ValueError, match="header.json to be JSON"):
        open_store(tmp_path / "s")
    header.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="written by something else"):
        make(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="no header.json"):
        open_store(tmp_path / "nothing")


def test_a_full_disk_is_explained_and_spares_earlier_blocks(tmp_path, monkeypatch):
    store = make(tmp_path / "s")
    store.write(store.blocks[0], rows(store.blocks[0]))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(OSError, match="No space left on the disk .* 10 to 19.* repeat the same command"):
            store.write(store.blocks[1], rows(store.blocks[1]))
    assert [b.index for b in store.missing()] == [1, 2]
    np.testing.assert_array_equal(store.read(store.blocks[0])["x"], rows(store.blocks[0])["x"])


def test_wrong_arrays_are_refused(tmp_path):
    store = make(tmp_path / "s")
    good = rows(store.blocks[0])
    with pytest.raises(ValueError, match=r"Expected theta with shape \(10, 2\); got \(9, 2\)"):
        store.write(store.blocks[0], good | {"theta": good["theta"][:9]})
    with pytest.raises(ValueError, match="Unknown array 'y'"):
        store.write(store.blocks[0], good | {"y": good["x"]})
    with pytest.raises(ValueError, match="Expected arrays"):
        store.write(store.blocks[0], {"x": good["x"]})
    assert len(store.missing()) == 3


def test_files_are_read_by_many_threads_at_once(tmp_path):
    # a collection in the midst of numpy's parsing of a header lets another thread in: SystemError in Python 3.11
    write_npz(tmp_path / "a.npz", {f"a{i}": np.ones((1, 3)) for i in range(10)})
    switch, thresholds = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(1)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: len(load_npz(tmp_path / "a.npz")), range(100)))
    finally:
        sys.setswitchinterval(switch)
        gc.set_threshold(*thresholds)
    assert found == [10] * 100
