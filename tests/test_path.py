"""The posterior from scores along a path: against exact answers, with errors that are what they claim."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffsbi as ds
from diffsbi.sampling import path, path_posterior
from diffsbi.sampling.surface import features, fit_surface, slopes, terms_to

CURVATURE = np.array([[1.5, 0.3], [0.3, 0.8]])


def quadratic(v, shift=(0.4, -0.2)):
    """Gradients of the log-density of a normal about `shift`."""
    return -(v - np.array(shift)) @ CURVATURE


def peak(surface):
    slope, curvature = surface.quadratic()
    return np.linalg.solve(curvature, slope)


@pytest.mark.parametrize("dim", [1, 3])
def test_slopes_are_those_of_the_features(dim):
    v, terms, step = np.random.default_rng(0).standard_normal((7, dim)), terms_to(3, dim), 1e-6
    for a in range(dim):
        by = step * np.eye(dim)[a]
        differences = (features(v + by, terms) - features(v - by, terms)) / (2 * step)
        np.testing.assert_allclose(slopes(v, terms)[:, a], differences, atol=1e-7)


@pytest.mark.parametrize("degree", [2, 3])
def test_gradients_of_a_normal_give_it_back(degree):
    v = np.random.default_rng(1).standard_normal((12, 2))
    surface = fit_surface(v, quadratic(v), np.eye(2), degree)
    np.testing.assert_allclose(peak(surface), [0.4, -0.2], atol=2e-3)
    np.testing.assert_allclose(surface.quadratic()[1], CURVATURE, atol=3e-3)
    at = np.array([[0.0, 0.0], [1.0, 2.0]])
    from_peak = -0.5 * np.einsum("ni,ij,nj->n", at - [0.4, -0.2], CURVATURE, at - [0.4, -0.2])
    assert np.diff(surface(at)) == pytest.approx(np.diff(from_peak), abs=0.02)


def test_skewness_is_found_where_there_is_any():
    """The third degree's coefficients are those of the density, and zero within errors where it is a normal."""
    rng = np.random.default_rng(2)
    v, terms = rng.standard_normal((200, 2)), terms_to(3, 2)
    noise = 0.1 * rng.standard_normal(v.shape)
    cubic = np.flatnonzero((terms < 2).sum(1) == 3)
    truth = np.zeros(len(terms))
    truth[cubic[0]] = 0.2
    for coefficients in (truth, np.zeros(len(terms))):
        surface = fit_surface(v, quadratic(v) + slopes(v, terms) @ coefficients + noise, np.eye(2), 3)
        error = np.sqrt(np.diag(surface.covariance))[cubic]
        assert (np.abs(surface.coefficients - coefficients)[cubic] < 4.5 * error + 0.01).all()
        assert error.max() < 0.03


def test_errors_of_the_surface_are_what_they_claim():
    rng = np.random.default_rng(3)
    root, pulls = np.array([[0.8, 0.0], [-0.4, 0.3]]), []
    for _ in range(200):
        v = rng.standard_normal((30, 2))
        surface = fit_surface(v, quadratic(v) + rng.standard_normal((30, 2)) @ root.T, np.eye(2))
        found = surface.coefficients - fit_surface(v, quadratic(v), np.eye(2)).coefficients
        pulls.append(found / np.sqrt(np.diag(surface.covariance)))
    pulls = np.array(pulls)
    assert np.abs(pulls.mean(0) * np.sqrt(len(pulls))).max() < 4
    assert (0.8 < pulls.std(0)).all() and (pulls.std(0) < 1.25).all()


def test_gradients_that_belong_elsewhere_count_little():
    rng = np.random.default_rng(4)
    v = rng.standard_normal((40, 2))
    gradients = quadratic(v) + 0.1 * rng.standard_normal(v.shape)
    gradients[:3] += 50.0
    surface = fit_surface(v, gradients, np.eye(2))
    np.testing.assert_allclose(peak(surface), [0.4, -0.2], atol=0.15)
    assert surface.weights[:3].max() < 0.01 and np.median(surface.weights) > 0.8
    plain = np.linalg.lstsq(np.c_[np.ones(40), v], gradients)[0]
    assert np.abs(np.linalg.solve(-plain[1:].T, plain[0]) - [0.4, -0.2]).max() > 1  # least squares is led astray


def test_points_from_elsewhere_count_as_draws_of_the_posterior_do():
    """A skewed density: a quadratic has its moments if points count as its draws, and not if all count the same."""
    rng = np.random.default_rng(5)
    log_gradient = lambda v: 3.0 - 3.0 * np.exp(v)  # noqa: E731  (the logarithm of a gamma variate of shape 3, mean 1)
    draws = np.log(rng.gamma(3.0, 1 / 3.0, 200_000))
    mean, sd = draws.mean(), draws.std()
    frame = (np.array([mean]), np.array([[sd]]))
    wide = (np.array([mean]), np.array([[1.6 * sd]]))
    u = wide[0] + 1.6 * sd * rng.standard_normal((4000, 1))
    v, gradient = (u - mean) / sd, sd * log_gradient(u)
    counts = path._counts(u, *frame, [wide])
    np.testing.assert_allclose(np.average(v[:, 0] ** 2, weights=counts), 1, atol=0.1)
    by_counts = [np.average(gradient[:, 0] * power, weights=counts) for power in (1.0, v[:, 0])]
    alike = [np.mean(gradient[:, 0] * power) for power in (1.0, v[:, 0])]
    assert abs(by_counts[0]) < 0.2 < abs(alike[0])
    assert abs(by_counts[1] + 1) < 0.25 < abs(alike[1] + 1)


def exact(sim, x):
    mean, covariance = sim.posterior(x)
    return np.asarray(mean), np.sqrt(np.diag(np.asarray(covariance)))


@pytest.mark.parametrize("dim", [1, 2])
def test_without_noise_the_posterior_is_exact(x64, dim):
    """Whitened latents of the linear simulator: every score is the marginal score. The prior is ten times as wide."""
    sim = ds.linear_gaussian(dim=dim, n_latents=3, n_data=40, noise=0.5, scale=3.0)
    x = sim.draw(jax.random.key(1), 1).x[0]
    found = path_posterior(sim, x, jax.random.key(2), n_points=18)
    mean, sd = exact(sim, x)
    rows = found.summary().values()
    np.testing.assert_allclose([row.mean for row in rows], mean, atol=0.03 * sd.max())
    np.testing.assert_allclose([row.sd for row in rows], sd, rtol=0.04)
    assert max(row.mean_error for row in rows) < 0.01 * sd.max()
    draws = np.asarray(found.sample(jax.random.key(3), 4000))
    assert np.abs((draws.mean(0) - mean) / sd).max() < 0.1 and len(np.unique(draws[:, 0])) == 4000
    at = mean + sd * np.random.default_rng(0).standard_normal((6, dim))
    known = np.asarray(jax.vmap(lambda t: sim.log_likelihood(t, x))(jnp.asarray(at)))
    np.testing.assert_allclose(np.diff(found.log_likelihood(at)), np.diff(known), atol=0.02)


def test_with_noise_it_is_right_within_its_errors(x64):
    """White latents: noisy scores, six paths. Their means scatter about the exact one as they say."""
    sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=2.0, seed=3)
    x = sim.draw(jax.random.key(4), 1).x[0]
    mean, sd = exact(sim, x)
    pulls, sizes = [], []
    for seed in range(6):
        found = path_posterior(sim, x, jax.random.key(seed), latents="white", n_points=24, until_error=None)
        rows = found.summary().values()
        pulls.append([(row.mean - m) / row.mean_error for row, m in zip(rows, mean, strict=True)])
        sizes.append([row.mean_error for row in rows] / sd)
        np.testing.assert_allclose([row.sd for row in rows], sd, rtol=0.3)
    assert 0.003 < np.mean(sizes) < 0.3, "the scores have noise, and it averages out"
    assert 0.4 < np.sqrt(np.mean(np.square(pulls))) < 1.8


def test_it_stops_when_it_knows_enough(x64):
    sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=2.0, seed=3)
    x = sim.draw(jax.random.key(4), 1).x[0]
    settings = dict(latents="white", n_points=120)
    rough, fine = (path_posterior(sim, x, jax.random.key(0), until_error=e, **settings) for e in (0.3, 0.05))
    with pytest.warns(UserWarning, match=r"raise n_points \(12\)"):
        path_posterior(sim, x, jax.random.key(0), until_error=1e-4, latents="white", n_points=12)
    assert len(rough.u) < len(fine.u) <= 120
    assert rough.error < 0.3 and fine.error < 0.05 and rough.gradients < fine.gradients


def test_an_interrupted_path_goes_on(x64, tmp_path, monkeypatch):
    sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=2.0, seed=3)
    x = sim.draw(jax.random.key(4), 1).x[0]
    settings = dict(latents="white", n_points=24, until_error=None)
    whole = path_posterior(sim, x, jax.random.key(0), **settings)
    walk, rounds = path.Walk.round, []

    def interrupted(self, k, *rest):
        if k == 2:
            raise KeyboardInterrupt
        return walk(self, k, *rest)

    monkeypatch.setattr(path.Walk, "round", interrupted)
    with pytest.raises(KeyboardInterrupt):
        path_posterior(sim, x, jax.random.key(0), folder=tmp_path, **settings)
    monkeypatch.setattr(path.Walk, "round", lambda self, k, *rest: rounds.append(k) or walk(self, k, *rest))
    again = path_posterior(sim, x, jax.random.key(0), folder=tmp_path, **settings)
    assert rounds == [2, 3] and again.gradients == whole.gradients
    np.testing.assert_array_equal(again.scores, whole.scores)
    np.testing.assert_array_equal(again.surface.coefficients, whole.surface.coefficients)
    with pytest.raises(ValueError, match="data_start_and_key"):
        path_posterior(sim, x + 1, jax.random.key(0), folder=tmp_path, **settings)


def test_bad_input(x64):
    sim = ds.linear_gaussian()
    x = sim.draw(jax.random.key(4), 1).x[0]
    refused = lambda match, x=x, **settings: _refused(sim, x, match, settings)  # noqa: E731
    refused("two rounds", n_points=11)
    refused("n_turns", n_turns=0)
    refused("until_error", until_error=0.0)
    refused("degree 2 or 3", degree=4)
    refused("Unknown latent", latents="whitenet")
    refused("shape", x=x[:-1])
    refused("finite", x=x.at[0].set(jnp.nan))
    refused("at least 4 draws", start=np.zeros((3, 2)))
    refused("finite start", start=np.full((9, 2), np.nan))
    found = path_posterior(sim, x, jax.random.key(0), n_points=12)
    with pytest.raises(ValueError, match="n >= 1"):
        found.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match="trailing"):
        found.log_likelihood(np.zeros(3))


def _refused(sim, x, match, settings):
    with pytest.raises(ValueError, match=match):
        path_posterior(sim, x, jax.random.key(0), **settings)


def test_scores_that_are_not_finite_are_left_out_and_named(x64):
    """A likelihood that breaks for some parameters; and for all."""

    class Broken(type(ds.linear_gaussian())):
        limit: float = 0.0

        def setup(self, theta):
            return jnp.where(theta[0] > self.limit, jnp.nan, 1.0) * theta

    whole = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=2.0, seed=3)
    parts = {f.name: getattr(whole, f.name) for f in dataclasses.fields(whole)}
    x = whole.draw(jax.random.key(4), 1).x[0]
    mean, sd = exact(whole, x)
    assert mean[0] + sd[0] < 1.2
    with pytest.raises(RuntimeError, match="not finite at 6 of 6"):
        path_posterior(Broken(**parts, limit=-9.0), x, jax.random.key(0))
    found = path_posterior(Broken(**parts, limit=1.2), x, jax.random.key(0), n_points=48)
    assert len(found.u) < 48 and np.isfinite(found.scores).all()
    assert np.abs([row.mean for row in found.summary().values()] - mean).max() < 0.5 * sd.max()


def test_a_surface_that_noise_bends_upwards_is_made_flat():
    v = np.random.default_rng(6).standard_normal((9, 2))
    surface = fit_surface(v, v @ np.diag([-1.0, 0.5]), np.eye(2))
    assert np.linalg.eigvalsh(surface.quadratic()[1]).min() < -0.4
    flat = path._concave(surface)
    np.testing.assert_allclose(flat.quadratic()[1], np.diag([1.0, 0.0]), atol=0.02)
    np.testing.assert_allclose(flat.quadratic()[0], surface.quadratic()[0])
    good = fit_surface(v, quadratic(v), np.eye(2))
    assert path._concave(good) is good


def test_latents_that_hardly_move_are_told(x64):
    """Likelihoods too narrow, and far too narrow, for quarter turns about a standard normal in white latents."""
    x = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=0.1, seed=3).draw(jax.random.key(4), 1).x[0]
    for noise, error, message in ((0.3, UserWarning, "lag behind the path"), (0.1, RuntimeError, "did not move")):
        sim = ds.linear_gaussian(dim=2, n_latents=3, n_data=8, noise=noise, seed=3)
        with pytest.warns(error, match=message) if error is UserWarning else pytest.raises(error, match=message):
            path_posterior(sim, x, jax.random.key(0), latents="white", n_points=12, until_error=None)


@pytest.mark.slow
def test_a_small_map_as_by_its_chain():
    sim = ds.lsst_y10(n_pix=16, side_deg=0.625)
    x = sim.draw(jax.random.key(1), 1, sim.fiducial, with_score=False).x[0]
    chain = ds.full_field_posterior(sim, x, jax.random.key(2), until_ess=400, n_samples=3000).summary()
    found = path_posterior(sim, x, jax.random.key(3), n_points=96, until_error=None)
    assert found.gradients < 3000
    for name, row in found.summary().items():
        assert abs(row.mean - chain[name].mean) < 0.3 * chain[name].sd
        assert row.sd == pytest.approx(chain[name].sd, rel=0.25)


def test_scores_beyond_all_bounds_end_in_a_refusal_that_says_what_to_do(x64, monkeypatch):
    def wild(self, k, points, n_turns):
        scores = -points
        scores[:2] *= 1e6
        return dict(u=points, scores=scores, acceptance=np.ones(len(points)))

    monkeypatch.setattr(path.Walk, "round", wild)
    sim = ds.linear_gaussian(dim=6, n_latents=3, n_data=8)
    x = sim.draw(jax.random.key(4), 1).x[0]
    with pytest.raises(path.PathError, match="no posterior that can be sampled") as refused:
        path_posterior(sim, x, jax.random.key(0), n_points=24, until_error=None)
    assert isinstance(refused.value.__cause__, np.linalg.LinAlgError)
