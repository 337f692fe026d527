"""The trained density of summaries: what it says where distances are blind, and how often it is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffsbi.diagnostics import misspecification
from diffsbi.inference import fit_novelty

SMALL = {"layers": 2, "width": 32, "depth": 1}
QUICK = {"density": "masked_autoregressive", "density_options": SMALL, "members": 1, "max_epochs": 1}


def banana(rng, n):
    a, b = rng.normal(size=(2, n))
    return np.stack([2 * a, a**2 + 0.3 * b], 1)


def heavy(rng, n):
    return rng.standard_t(2, size=(n, 2))


# What each observation is: inside the bend; off both axes, along which heavy tails reach out.
CASES = {"banana": (banana, [0.0, 2.5]), "heavy tails": (heavy, [5.0, -5.0])}


@pytest.fixture(scope="module", params=list(CASES))
def trained(request):
    draw, odd = CASES[request.param]
    x = draw(np.random.default_rng(0), 2400)
    score, held_out = fit_novelty(jax.random.key(0), x, density_options=SMALL, members=2, patience=15)
    return request.param, draw, odd, x, score, held_out


def test_the_trained_density_sees_what_distances_do_not(trained):
    _, _, odd, _, score, held_out = trained
    assert not misspecification(held_out, odd, level=0.03).misspecified
    result = misspecification(held_out, odd, level=0.03, score=score, names=("a", "b"))
    assert result.misspecified and result.p_score < result.p_distance
    assert "trained density" in result.warning and "a (" in result.warning


def test_right_observations_are_flagged_at_the_stated_rate(trained):
    _, draw, _, _, score, _ = trained
    rng = np.random.default_rng(1)
    found = np.array(
        [misspecification(draw(rng, 99), draw(rng, 1)[0], score=score, level=0.1).p_score for _ in range(300)]
    )
    spread = found - 0.01 * rng.uniform(size=300)
    assert stats.kstest(spread, "uniform").pvalue > 1e-3
    assert np.mean(found <= 0.05) < 0.05 + 4.5 * np.sqrt(0.05 * 0.95 / 300)


def test_held_out_rows_are_rows_that_nothing_was_trained_on(trained):
    _, _, _, x, score, held_out = trained
    assert held_out.shape == (600, 2)
    assert len(np.unique(np.concatenate([x, held_out]), axis=0)) == len(x)
    train = x[~(x[:, None, 0] == held_out[None, :, 0]).any(1)]
    np.testing.assert_allclose(score.centre, np.median(train, 0), rtol=1e-5)
    assert score(held_out).shape == (600,) and len(score.histories) == 2


def test_it_is_a_density_and_near_the_right_one(trained):
    name, _, _, _, score, held_out = trained
    mine = np.asarray(score(held_out))
    if name == "banana":
        a = held_out[:, 0] / 2
        exact = stats.norm.logpdf(a) - np.log(2) + stats.norm.logpdf(held_out[:, 1], a**2, 0.3)
        grid = np.stack(np.meshgrid(np.linspace(-10, 10, 300), np.linspace(-4, 16, 300), indexing="ij"), -1).reshape(
            -1, 2
        )
        total = np.sum(np.exp(score(grid))) * (20 / 299) ** 2
        assert abs(total - 1) < 0.01
    else:
        exact = stats.t.logpdf(held_out, 2).sum(1)
    loss = exact - mine  # of which the mean is the Kullback–Leibler divergence
    assert -4.5 * loss.std() / np.sqrt(600) < loss.mean() < 0.2


def test_it_is_smooth_and_finite_far_out(x64):
    score, _ = fit_novelty(jax.random.key(1), heavy(np.random.default_rng(2), 60), **QUICK)
    x = jnp.asarray([0.3, -40.0])
    slope = jax.jit(jax.grad(lambda x: score(x[None])[0]))(x)
    numeric = [(score((x + h)[None]) - score((x - h)[None]))[0] / 2e-5 for h in 1e-5 * jnp.eye(2)]
    np.testing.assert_allclose(slope, numeric, rtol=1e-5)
    assert np.isfinite(score(jnp.asarray([[1e30, -1e30]]))).all()


def test_one_column_and_a_constant_one():
    rng = np.random.default_rng(3)
    one, _ = fit_novelty(jax.random.key(0), rng.normal(size=(60, 1)), **QUICK)
    assert np.isfinite(one(np.zeros((3, 1)))).all()
    x = np.concatenate([rng.normal(size=(60, 1)), np.ones((60, 1))], 1)
    constant, _ = fit_novelty(jax.random.key(0), x, **QUICK)
    assert np.isfinite(constant(x)).all()


@pytest.mark.parametrize(
    "x, options, message",
    [
        (np.zeros((60, 2)) * np.nan, {}, "finite x; got 120"),
        (np.zeros((20, 2)), {}, r"n >= 50.*got \(20, 2\)"),
        (np.zeros((60, 2)), {"members": 0}, "members >= 1; got 0"),
        (np.zeros((60, 2)), {"held_out": 1.0}, "held_out between 0 and 1; got 1.0"),
    ],
)
def test_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        fit_novelty(jax.random.key(0), x, **options)
