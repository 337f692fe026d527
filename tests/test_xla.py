"""What is known to be faulty in XLA is switched off, and nothing else."""

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
