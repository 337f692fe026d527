"""Who may look into whom: reads the imports and fails when an arrow runs the wrong way or a file grows too long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 400

BOTTOM = {"_types", "_files", "_choose", "_robust", "prior", "bands"}
ROOMS: dict[str, set[str]] = {
    "_types": set(),
    "_files": set(),
    "_cache": set(),
    "_xla": set(),
    "_choose": {"_types"},
    "_robust": {"_types"},
    "integrators": set(),
    "prior": {"_types"},
    "bands": {"_types"},
    "cosmology": BOTTOM,
    "simulators": BOTTOM | {"cosmology", "integrators"},
    "summaries": BOTTOM,
    "flows": BOTTOM,
    "inference": BOTTOM | {"_cache", "flows", "summaries", "sampling", "store"},
    "compression": BOTTOM | {"flows", "inference", "integrators", "sampling", "simulators"},
    "sampling": BOTTOM | {"_cache", "simulators", "cosmology", "integrators"},
    "diagnostics": BOTTOM,
    "store": BOTTOM,
    "runs": BOTTOM,
    "config": BOTTOM,
    "observation": BOTTOM,
    "plotting": BOTTOM | {"diagnostics", "runs"},
    "comparison": BOTTOM | {"diagnostics"},
    "report": BOTTOM | {"diagnostics", "runs", "plotting", "comparison"},
}
ROOMS["__init__"] = set(ROOMS) - {"config", "observation", "plotting", "report"}
ROOMS["pipeline"] = set(ROOMS) - {"plotting", "report"}
ROOMS["cli"] = set(ROOMS)
OUTSIDE = {
    "experiments": set(ROOMS) - {"plotting", "report", "cli"},
    "paper_figures": BOTTOM | {"runs", "diagnostics", "plotting"},
}
# Packages that only these rooms may import; the power spectrum's oracle serves the tests and the cosmology.
GUARDED = {
    "matplotlib": {"plotting", "report"},
    "getdist": {"plotting", "report"},
    "jax_cosmo": {"cosmology"},
    "typer": {"cli"},
    "zarr": {"store"},
    "pickle": set(),
    "haiku": set(),
    "jaxopt": set(),
    "tensorflow_probability": set(),
}

FILES = [path for folder in ("diffsbi", *OUTSIDE) for path in sorted((ROOT / folder).rglob("*.py"))]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "diffsbi" else parts[0]


def imported(source: str) -> set[str]:
    """Dotted names of everything that is imported, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide who looks into whom"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(room: str, source: str) -> list[str]:
    allowed = (ROOMS | OUTSIDE)[room] | {room}
    wrong = []
    for name in sorted(imported(source)):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "diffsbi" and target in ROOMS and target not in allowed:
            wrong.append(f"{room} must not import {name}")
        if package in GUARDED and room not in GUARDED[package]:
            wrong.append(f"{room} must not import {package}")
        if package in OUTSIDE and package != room:
            wrong.append(f"{room} must not import {package}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_follow_the_table(path):
    room = room_of(path)
    assert room in ROOMS | OUTSIDE, f"{path} is in no room: give it one here and in docs/architecture.md"
    assert violations(room, path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_arrows_form_no_circle():
    order: list[str] = []
    while len(order) < len(ROOMS):
        free = [room for room in ROOMS if room not in order and ROOMS[room] <= set(order)]
        assert free, f"circle among {set(ROOMS) - set(order)}"
        order += free


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("sampling", "from diffsbi.flows import smooth_flow"),
        ("sampling", "from diffsbi import inference"),
        ("sampling", "def f():\n    import diffsbi.summaries.maps"),
        ("inference", "from diffsbi.simulators.base import AbstractSimulator"),
        ("pipeline", "import matplotlib.pyplot as plt"),
        ("simulators", "import jax_cosmo as jc"),
        ("paper_figures", "from diffsbi import pipeline"),
        ("experiments", "from diffsbi.plotting import maps"),
        ("cli", "from experiments.demo import main"),
    ],
)
def test_wrong_arrows_are_found(room, line):
    assert violations(room, line)


def test_the_table_in_the_documentation_names_every_room():
    table = (ROOT / "docs" / "architecture.md").read_text()
    missing = [room for room in (ROOMS | OUTSIDE) if room != "__init__" and f"`{room}" not in table]
    assert missing == []
