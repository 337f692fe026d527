"""Normals of short paths of marginal scores: exact where posteriors are normal and scores have no noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsbi as ds
from diffsbi.compression import PathMode, path_mode
from diffsbi.inference import LocalFrame
from diffsbi.inference.frames import frame_width

NOISY = dict(dim=2, n_latents=3, n_data=8, noise=2.0, seed=3)


def unpacked(numbers, dim):
    return (np.asarray(a) for a in LocalFrame(dim).unpack(numbers))


def test_without_noise_it_is_the_exact_posterior_of_every_data_set(x64):
    sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=40, noise=0.5, scale=3.0)
    x = sim.draw(jax.random.key(1), 4, with_score=False).x
    found = PathMode(sim).many(x)
    assert found.shape == (4, frame_width(2))
    for row, mean, root in zip(x, *unpacked(found, 2), strict=True):
        exact_mean, covariance = (np.asarray(a) for a in sim.posterior(row))
        sd = np.sqrt(np.diag(covariance))
        np.testing.assert_allclose(mean, exact_mean, atol=0.06 * sd.max())
        np.testing.assert_allclose(root @ root.T, covariance, atol=0.1 * np.outer(sd, sd).max())


def test_with_noise_it_covers_the_truth_and_more_turns_do_so_better(x64):
    """White latents of 20 data sets: the truth is where the exact posterior says, but for the noise of the path."""
    sim = ds.linear_gaussian(**NOISY)
    draws = sim.draw(jax.random.key(2), 20, with_score=False)
    misses = {}
    for n_turns in (1, 8):
        mean, root = unpacked(
            PathMode(sim, latents="white", n_points=12, n_turns=n_turns, until_error=None).many(draws.x), 2
        )
        exact = np.stack([np.asarray(sim.posterior(row)[0]) for row in draws.x])
        misses[n_turns] = np.linalg.solve(root, (mean - exact)[..., None])[..., 0].std()
        r = np.linalg.solve(root, (np.asarray(draws.theta) - mean)[..., None])[..., 0]
        # Standard errors: .22 of the mean, beside the noise that all data sets share; .11 of the deviation.
        assert np.abs(r.mean(0)).max() < 0.7 and 0.75 < r.std() < 1.4
    assert 0.01 < misses[8] < 0.7 * misses[1]


def test_a_path_goes_on_until_it_knows_enough(x64):
    sim = ds.linear_gaussian(**NOISY)
    x = sim.draw(jax.random.key(2), 3, with_score=False).x
    settings = dict(latents="white", n_turns=1, n_points=60)
    rough, fine = (PathMode(sim, until_error=error, **settings) for error in (10.0, 0.03))
    gradients = [[int(mode._one(row)["gradients"]) for row in x] for mode in (rough, fine)]
    assert np.all(np.less(*gradients))


def test_it_is_a_function_of_the_data_and_of_its_seed():
    sim = ds.linear_gaussian(**NOISY)
    x = sim.draw(jax.random.key(2), 3, with_score=False).x
    mode = PathMode(sim, latents="white", n_points=12, until_error=None)
    np.testing.assert_array_equal(mode.many(x)[2], mode(x[2]))
    other = PathMode(sim, latents="white", n_points=12, until_error=None, seed=1)(x[2])
    assert np.abs(other - mode(x[2])).max() > 1e-3


def test_an_interrupted_call_goes_on_and_rows_of_another_are_refused(tmp_path, monkeypatch):
    sim = ds.linear_gaussian(**NOISY)
    x = sim.draw(jax.random.key(2), 4, with_score=False).x
    mode = PathMode(sim, latents="white", n_points=12, until_error=None)
    whole, path, calls = mode.many(x), path_mode.path_posterior, []

    def counted(*arguments, stop=None, **settings):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return path(*arguments, **settings)

    monkeypatch.setattr(path_mode, "path_posterior", lambda *a, **s: counted(*a, stop=3, **s))
    with pytest.raises(KeyboardInterrupt):
        mode.many(x, folder=tmp_path)
    calls.clear()
    monkeypatch.setattr(path_mode, "path_posterior", counted)
    np.testing.assert_array_equal(mode.many(x, folder=tmp_path), whole)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="data"):
        mode.many(x + 1, folder=tmp_path)
    other = ds.linear_gaussian(**NOISY | dict(noise=2.1))
    with pytest.raises(ValueError, match="chains of this target"):
        PathMode(other, latents="white", n_points=12, until_error=None).many(x, folder=tmp_path)


def test_a_path_that_fails_is_replaced_by_its_start_and_told_of(x64):
    class Broken(type(ds.linear_gaussian())):
        """Breaks for parameters above the limit."""

        limit: float = 0.0

        def setup(self, theta):
            return jnp.where(theta[0] > self.limit, jnp.nan, 1.0) * theta

    whole = ds.linear_gaussian(**NOISY)
    sim = Broken(**{f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}, limit=-9.0)
    x = whole.draw(jax.random.key(4), 2, with_score=False).x
    with pytest.warns(UserWarning, match=r"paths of 2 of 2 rows failed.* first is row 0: The score is not finite"):
        mean, root = unpacked(PathMode(sim, latents="white", n_points=12, until_error=None).many(x), 2)
    prior_mean, prior_sd = sim.prior.unconstrained_spread()
    np.testing.assert_allclose(mean, np.tile(prior_mean, (2, 1)), atol=1e-6)
    np.testing.assert_allclose(root[0], np.diag(prior_sd), rtol=1e-5, atol=1e-9)


def test_bad_input_is_refused_by_name():
    sim = ds.linear_gaussian()
    with pytest.raises(
        ValueError, match=r"n_points >= 12 \(two rounds\).* got n_points=11, n_turns=2, until_error=0.25"
    ):
        PathMode(sim, n_points=11)
    with pytest.raises(ValueError, match="n_turns=0"):
        PathMode(sim, n_turns=0)
    with pytest.raises(ValueError, match="until_error=0.0"):
        PathMode(sim, until_error=0.0)
    with pytest.raises(ValueError, match="Unknown latent"):
        PathMode(sim, latents="whitenet")
    with pytest.raises(ValueError, match=r"trailing shape \(6,\); got \(2, 99\)"):
        PathMode(sim).many(np.zeros((2, 99)))
    with pytest.raises(ValueError, match="finite x"):
        PathMode(sim).many(np.full((1, 6), np.nan))
