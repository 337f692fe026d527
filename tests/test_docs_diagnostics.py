"""The example in docs/diagnostics.md runs as it stands, and its table names what there is."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import diffsbi as ds
from diffsbi import diagnostics, inference

PAGE = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()


def test_the_table_names_what_there_is():
    table = PAGE[: PAGE.index("## Coverage")]
    named = set(re.findall(r"`(?:inference\.)?(\w+)`", table)) - {"x"}
    assert all(hasattr(diagnostics, name) or hasattr(inference, name) for name in named)
    functions = {name for name in diagnostics.__all__ if name[0].islower()} - {"moments"}
    assert functions <= named


@pytest.mark.slow
def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    found: dict = {}
    exec(example, found)
    sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=4)
    draws = sim.draw(jax.random.key(0), 1600)
    posterior = (
        ds.NPE(sim.prior).append(draws.theta[:800], draws.x[:800], draws.score[:800]).fit(jax.random.key(1), members=1)
    )
    theta, t = np.asarray(draws.theta[800:-1]), np.asarray(draws.x[800:-1])
    found["check"](posterior, sim, lambda x: x, theta, t, np.asarray(draws.x[-1]), jax.random.key(2))
    said = capsys.readouterr().out
    assert "like the simulations" in said and float(re.search(r"here: p = ([\d.]+)", said)[1]) > 0.01
