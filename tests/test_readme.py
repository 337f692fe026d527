"""What the README says can be typed as it stands."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diffsbi.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def lines(example):
    return [line for line in example.splitlines() if line.strip()]


def test_examples_are_as_short_as_promised():
    maps, own = EXAMPLES
    assert len(lines(maps)) <= 15
    assert len(lines(own)) <= 20


def test_commands_exist():
    listed = CliRunner().invoke(app, ["--help"]).output
    for command in set(re.findall(r"diffsbi (demo|simulate|infer|path|hmc|compare|report)", README)):
        assert command in listed
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile


def test_modules_of_the_figures_exist():
    root = Path(__file__).parents[1]
    modules = set(re.findall(r"(?:experiments|paper_figures)\.\w+", README))
    assert len(modules) == 45
    assert all((root / f"{module.replace('.', '/')}.py").is_file() for module in modules)


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)", page.read_text())]
    assert len(links) > 30
    assert not [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()]


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_examples_run(index):
    example = EXAMPLES[index]
    small = {"n_pix=64": "n_pix=16", "(64, 5.0, sim.noise": "(16, 5.0, sim.noise, 3", "1000, latents": "100, latents"}
    for old, new in small.items():
        example = example.replace(old, new)
    found: dict = {"__name__": "example"}
    exec(example, found)
    assert found["samples"].shape[1] == found["sim"].prior.dim
