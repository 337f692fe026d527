"""The toy simulators against their closed forms, finite differences and quadrature."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import DirectAdjoint, ODETerm, PIDController, SaveAt, Tsit5, diffeqsolve
from one_theta import draws_at, scores_at
from scipy.stats import kstest

from diffsbi.simulators.linear_gaussian import linear_gaussian
from diffsbi.simulators.lotka_volterra import _rates, lotka_volterra
from diffsbi.simulators.two_moons import two_moons


def central_difference(f, theta, step=1e-5):
    theta = np.asarray(theta, np.float64)
    rows = [(f(theta + e) - f(theta - e)) / (2 * step) for e in step * np.eye(len(theta))]
    return np.array(rows)


@pytest.fixture
def linear(x64):
    return linear_gaussian(dim=3, n_latents=4, n_data=6, seed=1, loc=[0.5, -1.0, 2.0], scale=[1.0, 0.5, 2.0])


# --- linear Gaussian ---------------------------------------------------------------------------------------------


def test_linear_score_is_the_marginal_score_in_the_whitened_coordinate(linear):
    draws = linear.draw(jax.random.key(0), 50, latents="whitened")
    exact = jax.jit(jax.vmap(linear.marginal_score))(draws.theta, draws.x)
    np.testing.assert_allclose(draws.score, exact, rtol=0, atol=1e-10 * np.abs(exact).max())
    white = linear.draw(jax.random.key(0), 50)
    np.testing.assert_allclose(white.x, draws.x, rtol=1e-12)  # another program: the last bit may differ
    assert np.abs(white.score - exact).max() > 0.1


def test_linear_marginal_score_is_the_gradient_of_the_marginal_likelihood(linear):
    theta, _, x = eqx.filter_jit(linear.draw_one)(jax.random.key(1))
    density = eqx.filter_jit(linear.log_likelihood)
    numeric = central_difference(lambda t: float(density(t, x)), theta)
    np.testing.assert_allclose(linear.marginal_score(theta, x), numeric, rtol=1e-7)


def test_linear_whitened_coordinate_is_white_and_round_trips(linear):
    draws = linear.draw(jax.random.key(2), 4000, keep_latents=True, with_score=False)
    transport = linear.transport("whitened")
    xi, log_det = jax.jit(jax.vmap(transport.from_latents))(draws.theta, draws.latents, draws.x)
    z, inverse = jax.jit(jax.vmap(transport.to_latents))(draws.theta, xi, draws.x)
    np.testing.assert_allclose(z, draws.latents, atol=1e-12)
    np.testing.assert_allclose(inverse, -log_det, atol=1e-12)
    jacobian = jax.jacfwd(lambda v: transport.to_latents(draws.theta[0], v, draws.x[0])[0])(xi[0])
    np.testing.assert_allclose(jnp.linalg.slogdet(jacobian)[1], inverse[0], atol=1e-12)
    everything = np.concatenate([xi, draws.theta, draws.x], 1)
    correlation = np.corrcoef(everything.T)[:4]
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(4000)
    assert all(kstest(xi[:, i], "norm").pvalue > 1e-4 for i in range(4))


def test_linear_joint_is_the_same_posterior_in_each_coordinate(linear):
    theta, z, x = eqx.filter_jit(linear.draw_one)(jax.random.key(3))
    xi, log_det = linear.transport("whitened").from_latents(theta, z, x)
    joint = eqx.filter_jit(linear.log_joint)
    difference = joint(theta, z, x) - joint(theta, xi, x, latents="whitened")
    np.testing.assert_allclose(difference, log_det, atol=1e-12)


def test_linear_bayes_theorem_closes(linear):
    """prior x likelihood = posterior x evidence, at points that share nothing with the closed forms."""
    _, _, x = eqx.filter_jit(linear.draw_one)(jax.random.key(4))
    mean, covariance = map(np.asarray, linear.posterior(x))
    for theta in linear.prior.sample(jax.random.key(5), (5,)):
        offset = np.asarray(theta) - mean
        log_posterior = -0.5 * offset @ np.linalg.solve(covariance, offset)
        log_posterior -= 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
        joint = linear.prior.log_prob(theta) + linear.log_likelihood(theta, x)
        np.testing.assert_allclose(joint, log_posterior + linear.log_evidence(x), atol=1e-9)


def test_linear_marginal_likelihood_is_the_joint_integrated_over_latents(linear):
    """log p(x | theta) = log p(x, z | theta) - log p(z | theta, x) for every z."""
    theta, z, x = eqx.filter_jit(linear.draw_one)(jax.random.key(6))
    for latent in (z, z + 1.0):
        xi, log_det = linear.transport("whitened").from_latents(theta, latent, x)
        conditional = -0.5 * jnp.sum(xi**2) - 0.5 * len(z) * jnp.log(2 * jnp.pi) + log_det
        value = linear.log_conditional(theta, latent, x) - conditional
        np.testing.assert_allclose(value, linear.log_likelihood(theta, x), atol=1e-10)


def test_linear_posterior_covers_its_own_draws(linear):
    draws = linear.draw(jax.random.key(7), 2000, with_score=False)
    mean, covariance = jax.jit(jax.vmap(linear.posterior))(draws.x)
    standard = (draws.theta - mean) / jnp.sqrt(jnp.diagonal(covariance, axis1=1, axis2=2))
    assert all(kstest(standard[:, i], "norm").pvalue > 1e-4 for i in range(3))


@pytest.mark.parametrize(
    "wrong, message",
    [({"dim": 0}, "dim >= 1; got 0"), ({"noise": -1.0}, "noise > 0; got -1.0"), ({"scale": [1.0, 0.0]}, "scale > 0")],
)
def test_linear_refuses_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        linear_gaussian(**wrong)


# --- two moons ---------------------------------------------------------------------------------------------------


@pytest.fixture
def moons(x64):
    return two_moons()


@pytest.fixture
def moons_grid(moons):
    """Cell centres of a 300 x 300 grid on the unit square (spacing σ/3), and the density there."""
    axis = (np.arange(300) + 0.5) / 300
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)
    return axis, points, np.exp(np.asarray(moons.log_density(points)))


def test_moons_density_is_normalised(moons_grid):
    # The midpoint rule converges exponentially on Gaussians of three cells' width.
    np.testing.assert_allclose(moons_grid[2].mean(), 1.0, atol=1e-10)


def test_moons_samples_follow_the_density(moons, moons_grid):
    n, (_, _, density) = 40_000, moons_grid
    draws = np.asarray(moons.sample(jax.random.key(0), n))
    expected = n * density.reshape(30, 10, 30, 10).mean((1, 3)) / 900
    counts = np.histogram2d(*draws.T, bins=30, range=[[0, 1], [0, 1]])[0]
    filled = expected > 5
    assert expected[~filled].sum() < 0.01 * n and counts.sum() == n
    pull = (counts - expected)[filled] / np.sqrt(expected[filled])
    chi2, cells = np.sum(pull**2), filled.sum()
    assert abs(chi2 - cells) < 5 * np.sqrt(2 * cells)


def test_moons_moments_agree_with_the_grid(moons, moons_grid):
    axis, _, density = moons_grid
    n = 40_000
    draws = np.asarray(moons.sample(jax.random.key(1), n))
    for i in range(2):
        weight = density.mean(1 - i) / density.mean() / len(axis)
        mean = np.sum(weight * axis)
        std = np.sqrt(np.sum(weight * (axis - mean) ** 2))
        assert abs(draws[:, i].mean() - mean) < 4.5 * std / np.sqrt(n)
        assert abs(draws[:, i].std() / std - 1) < 4.5 / np.sqrt(2 * n)


def test_moons_score_against_finite_differences(moons):
    density, score = eqx.filter_jit(moons.log_density), eqx.filter_jit(moons.density_score)
    for theta in np.asarray(moons.sample(jax.random.key(2), 10)):
        numeric = central_difference(lambda t: float(density(t)), theta, 1e-6)
        np.testing.assert_allclose(score(theta), numeric, rtol=1e-6, atol=1e-5)


def test_moons_posterior_at_zero_is_the_density(moons):
    x = moons.observation
    points = moons.sample(jax.random.key(3), 20)
    scores = jax.jit(jax.vmap(lambda t: moons.score(t, jnp.zeros(0), x)))(points)
    np.testing.assert_allclose(scores, moons.density_score(points), rtol=1e-9, atol=1e-8)
    joint = jax.jit(jax.vmap(lambda t: moons.log_joint(t, jnp.zeros(0), x)))(points)
    np.testing.assert_allclose(joint, moons.log_density(points), atol=1e-10)


def test_moons_simulates_with_scores_of_its_own_likelihood(moons):
    draws = moons.draw(jax.random.key(4), 20)
    # p(x | theta) = p*(theta - x), so its score is the density's at the centre that was drawn, plus noise.
    np.testing.assert_allclose(draws.score, moons.density_score(draws.theta - draws.x), rtol=1e-8, atol=1e-7)


def test_moons_finite_far_away_in_float32():
    moons = two_moons()
    corners = jnp.array([[0.0, 0.0], [1.0, 1.0], [5.0, -5.0]])
    assert corners.dtype == jnp.float32
    assert jnp.isfinite(moons.log_density(corners)).all() and jnp.isfinite(moons.density_score(corners)).all()


def test_moons_refuses_bad_settings():
    with pytest.raises(ValueError, match=r"sigma in \(0, 0.03\]; got 0.5"):
        two_moons(sigma=0.5)
    with pytest.raises(ValueError, match=r"theta with trailing shape \(2,\); got \(3,\)"):
        two_moons().log_density(jnp.zeros(3))


# --- Lotka-Volterra ----------------------------------------------------------------------------------------------


def assert_all_finite_at_500_draws():
    sim = lotka_volterra()
    draws = sim.draw(jax.random.key(0), 500, with_score=False, keep_latents=True)
    gradient = jax.jit(jax.vmap(jax.value_and_grad(sim.log_joint, argnums=(0, 1))))
    for leaf in jax.tree.leaves((draws, gradient(draws.theta, draws.latents, draws.x))):
        assert jnp.isfinite(leaf).all()
    assert draws.x.shape == (500, 20) and (draws.x > 0).all()


@pytest.mark.slow  # float32 reaches less far
def test_lotka_volterra_finite_at_prior_draws_float64(x64):
    assert_all_finite_at_500_draws()


def test_lotka_volterra_finite_at_prior_draws_float32():
    assert_all_finite_at_500_draws()


def test_lotka_volterra_score_against_finite_differences(x64):
    sim = lotka_volterra()
    density = eqx.filter_jit(sim.log_conditional)
    draws = sim.draw(jax.random.key(1), 8, keep_latents=True)
    for theta, z, x, score in zip(draws.theta, draws.latents, draws.x, draws.score, strict=True):
        # Scaled steps: beta and delta are small, and some rates move the populations by hundreds of e-folds.
        relative = central_difference(lambda s: float(density(theta * s, z, x)), np.ones(4), 1e-6)  # noqa: B023
        np.testing.assert_allclose(score * theta, relative, rtol=1e-6, atol=1e-6 * np.abs(relative).max())


def test_lotka_volterra_mean_score_vanishes_at_fixed_theta(x64):
    sim = lotka_volterra()
    n = 800
    score = np.asarray(scores_at(sim, sim.fiducial, *draws_at(sim, sim.fiducial, jax.random.key(2), n)))
    assert (np.abs(score.mean(0)) < 4.5 * score.std(0) / np.sqrt(n)).all()
    # The same scores taken at a slightly wrong theta fail, so the test can.
    shifted = score.mean(0) + np.cov(score.T) @ (0.02 * np.asarray(sim.fiducial))
    assert (np.abs(shifted) > 4.5 * score.std(0) / np.sqrt(n)).any()


def test_lotka_volterra_solution_against_an_adaptive_solver(x64):
    sim = lotka_volterra()
    theta, z = sim.prior.sample(jax.random.key(3), (200,)), jax.random.normal(jax.random.key(4), (200, 2))

    def adaptive(theta, z):
        start, controller = jnp.log(sim.initial_populations(z)), PIDController(rtol=1e-9, atol=1e-9)
        return diffeqsolve(
            ODETerm(_rates), Tsit5(), 0.0, 18.9, None, start, theta, saveat=SaveAt(ts=sim.times),
            stepsize_controller=controller, max_steps=2**14, adjoint=DirectAdjoint(),
        ).ys  # fmt: skip

    error = jnp.abs(jax.jit(jax.vmap(adaptive))(theta, z) - jax.jit(jax.vmap(sim.log_populations))(theta, z))
    assert error.max() < 1e-4


def test_lotka_volterra_latents_are_the_published_initial_populations(x64):
    sim = lotka_volterra()
    z = jax.random.normal(jax.random.key(5), (4000, 2))
    log_start = np.log(np.asarray(jax.vmap(sim.initial_populations)(z)))
    assert all(kstest((log_start[:, i] - np.log(3)) / 0.5, "norm").pvalue > 1e-4 for i in range(2))
    np.testing.assert_allclose(sim.times, np.linspace(0, 18.9, 10), atol=1e-12)


def test_lotka_volterra_differentiates_forwards_too(x64):
    sim = lotka_volterra(substeps=20)
    theta, z, x = eqx.filter_jit(sim.draw_one)(jax.random.key(6))
    forward = jax.jit(jax.jacfwd(sim.log_conditional))(theta, z, x)
    np.testing.assert_allclose(forward, eqx.filter_jit(sim.score)(theta, z, x), rtol=1e-8)


def test_lotka_volterra_refuses_bad_settings():
    with pytest.raises(ValueError, match="substeps >= 1; got 0"):
        lotka_volterra(substeps=0)
    with pytest.raises(ValueError, match="noise > 0; got 0.0"):
        lotka_volterra(noise=0.0)
