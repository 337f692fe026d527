"""Truncated marginal ratios: exact marginals, boxes that keep them, priors within bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.integrate import trapezoid

import diffsbi as ds

NETWORK = {"width": 16, "depth": 1}


@pytest.fixture(scope="module")
def done(linear):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    settings = dict(n_rounds=2, n_per_round=200, shrink=1.0, options=NETWORK, fit={"members": 1, "max_epochs": 120})
    return x, ds.truncated_marginals(linear, x, jax.random.key(1), **settings)


def test_marginals_are_the_exact_ones(linear, done):
    x, out = done
    mean, covariance = linear.posterior(x)
    assert out.marginals == (("theta_1",), ("theta_2",), ("theta_1", "theta_2")) and out.simulations == 400
    mean, width = np.asarray(mean), np.sqrt(np.diag(covariance))
    for i, name in enumerate(linear.names):
        grid = np.linspace(*out.bounds[-1][:, i], 402)[1:-1]
        density = np.exp(np.asarray(out[name].log_prob(jnp.asarray(grid)[:, None]), float))
        density /= density.sum()
        centre = density @ grid
        assert abs(centre - mean[i]) < 0.2 * width[i]
        assert abs(np.sqrt(density @ (grid - centre) ** 2) / width[i] - 1) < 0.15
    draws = np.asarray(out[linear.names].sample(jax.random.key(3), 2000))
    np.testing.assert_allclose((draws.mean(0) - mean) / width, 0.0, atol=0.2)
    np.testing.assert_allclose(draws.std(0) / width, 1.0, atol=0.15)
    assert np.sign(np.cov(draws.T)[0, 1]) == np.sign(covariance[0, 1])
    with pytest.raises(KeyError, match="theta_3"):
        out["theta_3"]


def test_the_box_shrinks_and_holds_the_posterior(linear, done):
    x, out = done
    mean, covariance = linear.posterior(x)
    width = np.sqrt(np.diag(covariance))
    assert out.bounds.shape == (2, 2, 2)
    sides = out.bounds[:, 1] - out.bounds[:, 0]
    assert np.all(sides[1] <= sides[0] * (1 + 1e-6))
    low, high = out.bounds[-1]
    assert np.all(low < mean - 3 * width) and np.all(high > mean + 3 * width)
    # 1e-4 of the maximum is 4.3 widths of the likelihood, where that is not beyond the prior's last quantile.
    cut = np.abs(out.bounds[-1] - np.asarray(mean)) / width
    assert np.any(cut < 6) and np.all((cut < 6) | (np.abs(out.bounds[-1]) > 3))
    assert out.prior.in_support(out[linear.names].sample(jax.random.key(1), 500)).all()


def test_simulations_are_kept_in_a_folder_that_refuses_another_call(linear, tmp_path, monkeypatch):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    settings = dict(marginals=["theta_1"], n_rounds=1, n_per_round=30, block_size=10, folder=tmp_path)
    settings |= dict(options=NETWORK, fit={"members": 1, "max_epochs": 2})
    made, draw = [], type(linear).draw

    def counted(*arguments, **options):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(options["start"])
        return draw(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(linear), "draw", counted)
        ds.truncated_marginals(linear, x, jax.random.key(1), **settings)
    assert made == [0, 10]
    resumed = ds.truncated_marginals(linear, x, jax.random.key(1), **settings)
    whole = ds.truncated_marginals(linear, x, jax.random.key(1), **(settings | dict(folder=None)))
    np.testing.assert_allclose(resumed.bounds, whole.bounds, rtol=1e-3)
    for other, message in (
        (dict(summary=lambda x: -x), "its first simulation is another"),
        (dict(with_score=False), "configuration"),
        (dict(block_size=0), "block_size >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ds.truncated_marginals(linear, x, jax.random.key(1), **(settings | other))


@pytest.mark.parametrize(
    "whole, low, high",
    [
        (dist.Normal(1.0, 2.0), 0.5, 4.0),
        (dist.LogNormal(0.1, 0.5), 0.7, 1.1),
        (dist.TruncatedNormal(-1.0, 0.9, low=-2.0, high=-0.3), -5.0, -0.8),
        (dist.Uniform(0.0, 1.0), 0.2, 0.3),
    ],
)
def test_a_prior_within_a_box(x64, whole, low, high):
    prior = ds.Prior({"a": whole}, {"a": 0.9 * low + 0.1 * high if low > -5 else -1.0})
    inside = prior.truncated(np.array([low]), np.array([high]))
    draws = np.asarray(inside.sample(jax.random.key(0), (20_000,)))[:, 0]
    edge = max(low, float(getattr(whole.support, "lower_bound", low)))
    assert draws.min() >= edge and draws.max() <= high
    grid = np.linspace(edge, high, 4001)[1:-1]
    density = np.exp(inside.log_prob(jnp.asarray(grid[:, None])))
    assert np.isclose(trapezoid(density, grid), 1.0, atol=2e-3)
    ratio = inside.log_prob(jnp.asarray(grid[:, None])) - prior.log_prob(jnp.asarray(grid[:, None]))
    assert np.ptp(ratio) < 1e-9
    assert abs(draws.mean() - trapezoid(grid * density, grid)) < 4 * draws.std() / np.sqrt(20_000)
    assert np.isneginf(inside.log_prob(jnp.asarray([high + 0.1])))
    again = inside.truncated(np.array([edge]), np.array([0.5 * (edge + high)]))
    assert np.asarray(again.sample(jax.random.key(1), (100,))).max() <= 0.5 * (edge + high)
    u = inside.to_unconstrained(jnp.asarray(grid[1:-1:500, None]))
    np.testing.assert_allclose(inside.from_unconstrained(u)[:, 0], grid[1:-1:500], rtol=1e-9)


def test_the_marginal_prior_has_the_chosen_parameters():
    prior = ds.Prior({"a": dist.Normal(0.0, 1.0), "b": dist.Normal(1.0, 2.0), "c": dist.Uniform()}, {"b": 1.5})
    chosen = prior.marginal(["c", "b"])
    assert chosen.names == ("c", "b") and chosen.fiducial[1] == 1.5
    with pytest.raises(ValueError, match="'d'"):
        prior.marginal(["d"])


def test_bad_input_is_named(linear):
    x = jnp.zeros(4)
    with pytest.raises(ValueError, match="threshold in"):
        ds.truncated_marginals(linear, x, jax.random.key(0), threshold=0.0)
    with pytest.raises(ValueError, match="'omega_c'"):
        ds.truncated_marginals(linear, x, jax.random.key(0), marginals=["omega_c"])
    with pytest.raises(ValueError, match=r"prior mass of theta_1 between low and high; got \[1.0, 0.0\]"):
        linear.prior.truncated(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
