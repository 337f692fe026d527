"""Compiled programs are dropped before they fill the table of memory maps, and not again and again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsbi as ds
from diffsbi import _cache

needs_proc = pytest.mark.skipif(not _cache._MAPS.exists(), reason="Linux's account of memory maps")


def maps() -> int:
    return _cache._MAPS.read_bytes().count(b"\n")


@pytest.fixture
def limit(monkeypatch, tmp_path):
    """Sets the limit of memory maps that is read; nothing was dropped so far."""
    monkeypatch.setattr(_cache, "_MOST_MAPS", tmp_path / "max_map_count")
    monkeypatch.setattr(_cache, "_left", [0])
    return lambda most: (tmp_path / "max_map_count").write_text(f"{most}\n")


@jax.jit
def something(a):
    return jnp.sin(a) + 1


def compile_many(n: int) -> None:
    for size in range(1, n + 1):
        something(np.ones(1000 + size)).block_until_ready()


@needs_proc
def test_programs_are_dropped_at_half_the_limit_and_only_there(limit):
    compile_many(20)
    before = maps()
    limit(4 * before)
    assert not _cache.forget_when_many()
    limit(2 * before - 40)
    assert _cache.forget_when_many()
    assert maps() < before - 20  # each program has more than one


@needs_proc
def test_what_else_fills_the_maps_does_not_cost_the_programs_every_time(limit):
    limit(400)
    assert _cache.forget_when_many()  # Python and its libraries alone have more than 200
    assert not _cache.forget_when_many()
    compile_many(60)
    assert _cache.forget_when_many()


def test_nothing_is_dropped_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(_cache, "_MAPS", tmp_path / "none")
    assert not _cache.forget_when_many(0.0)


@needs_proc
@pytest.mark.parametrize("work", ["fit", "chains"])
def test_fits_and_chains_look_at_the_maps(limit, linear, work):
    """Many fits of ever other sizes ended the process: LLVM cannot be caught."""
    limit(2)
    if work == "fit":
        draws = linear.draw(jax.random.key(0), 20)
        ds.NPE(linear).append(draws.theta, draws.x).fit(jax.random.key(1), members=1, max_epochs=1)
    else:
        init = np.zeros((2, 2))
        ds.nuts(lambda q: -0.5 * jnp.sum(q**2), init, jax.random.key(1), 2, 2)
    assert _cache._left[0] > 0
