"""What is known to be faulty in XLA is switched off, and nothing else; optimisation is, where that is asked for."""

import jax
import pytest

from diffsbi import _xla


@pytest.mark.parametrize(
    "release, flags, expected",
    [
        ("0.10.2", None, f"{_xla.FLAG}="),
        ("0.11.0", "--xla_dump_to=here", f"--xla_dump_to=here {_xla.FLAG}="),
        ("0.10.2", f"{_xla.FLAG}=LIBRARY_FUSION_TYPE_DOT", f"{_xla.FLAG}=LIBRARY_FUSION_TYPE_DOT"),
        ("0.10.1", None, None),
        ("0.12.0", "--xla_dump_to=here", "--xla_dump_to=here"),
    ],
)
def test_fusions_are_off_for_faulty_releases_unless_the_user_chose(monkeypatch, release, flags, expected):
    """XLA aborts on a flag that it does not know: releases that are not named are left alone."""
    monkeypatch.setattr(_xla, "version", lambda name: {"jaxlib": release}[name])
    if flags is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", flags)
    _xla.avoid_faults()
    assert _xla.os.environ.get("XLA_FLAGS") == expected


@pytest.mark.parametrize(
    "release, flags, expected",
    [
        ("0.10.2", "", " ".join(_xla.QUICK)),
        ("0.10.2", "--xla_backend_optimization_level=2", f"--xla_backend_optimization_level=2 {_xla.QUICK[0]}"),
        ("0.12.0", "", ""),
    ],
)
def test_little_optimisation_where_it_is_asked_for_and_the_user_did_not_choose(monkeypatch, release, flags, expected):
    monkeypatch.setattr(_xla, "version", lambda name: {"jaxlib": release}[name])
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    before = jax.config.read("jax_disable_most_optimizations")
    try:
        for choice, found, off in (("", flags, False), ("quick", expected, True)):
            jax.config.update("jax_disable_most_optimizations", False)
            monkeypatch.setenv("DIFFSBI_COMPILE", choice)
            _xla.compile_quickly()
            assert _xla.os.environ["XLA_FLAGS"] == found
            assert jax.config.read("jax_disable_most_optimizations") is off
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
    monkeypatch.setenv("DIFFSBI_COMPILE", "fast")
    with pytest.raises(ValueError, match="DIFFSBI_COMPILE to be 'quick' or empty; got 'fast'"):
        _xla.compile_quickly()
