"""Examples of docs/compression.md run, given what they do not make themselves; its table names what there is."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsbi as ds
from diffsbi import compression, summaries
from experiments.set_toys import Velocities, regression_sets, velocity_graphs

PAGE = (Path(__file__).parents[1] / "docs" / "compression.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)


def example(*words):
    (found,) = (text for text in EXAMPLES if all(word in text for word in words))
    return found


def test_the_table_names_what_there_is():
    table = PAGE[: PAGE.index("## Each data set's own frame")]
    named = set(re.findall(r"`(?:compression\.|summaries\.)?(\w+)", table)) - {"diffsbi"}
    assert len(named) > 10
    assert all(hasattr(compression, name) or hasattr(summaries, name) for name in named), named


@pytest.mark.slow
def test_information_at_one_point():
    found: dict = {}
    exec(example("IMNN.from_simulator"), found)
    assert 43 < found["fitted"].det_fisher < 51
    draws, exact = found["draws"], found["posterior"]
    assert draws.effective_size > 100
    assert abs(draws.weights @ draws.theta[:, 0] - exact.mean[0]) < np.sqrt(exact.covariance_matrix[0, 0])


@pytest.mark.slow
def test_sets_and_graphs(tmp_path, monkeypatch):
    theta, x = regression_sets(jax.random.key(0), 300, 20)
    given = dict(jax=jax, theta=theta, x=x, mask=jnp.ones(x.shape[:2], bool), one_set=x[0], chunks=[x[0], x[1]])
    exec(example("chunks)"), given)
    assert np.linalg.eigvalsh(given["found"].fisher).min() > 0
    u, graphs, _ = velocity_graphs(jax.random.key(1), Velocities(), 500, 8)
    graph = jax.tree.map(lambda a: a[0], graphs)
    mask = jnp.ones(8, bool)
    given = dict(jax=jax, u=u, graphs=graphs, nodes=jnp.ones((500, 8), bool), graph=graph, mask=mask)
    monkeypatch.chdir(tmp_path)
    exec(example("u, graphs, nodes"), given)
    assert given["history"].best_validation < given["history"].first_validation
    np.testing.assert_array_equal(given["fishnet"].information(graph, mask).fisher, given["found"].fisher)


@pytest.mark.slow
def test_scores_at_a_point_and_their_change():
    sim = ds.lsst_y10(n_pix=8, side_deg=2.0, n_bins=2)
    proposal = ds.gaussian_proposal(sim, sim.prior.sample(jax.random.key(0), (100,)))
    given = dict(sim=sim, proposal=proposal, draws=sim.draw(jax.random.key(1), 3, with_score=False))
    exec(example("import LatentScores, MarginalScore"), given)
    assert given["t"].shape == (3, 6)
    first = given["t"]
    exec(example("import ScoreChange"), given)
    assert given["t"].shape == (3, 12)
    np.testing.assert_allclose(given["t"][:, :6], first, rtol=1e-4, atol=1e-4)
