"""The benchmark's tasks against their definitions, finite differences and an adaptive solver."""

import bz2
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import bernoulli, binom, multivariate_normal

from experiments.folds import Moons, SmoothHalfRing
from experiments.sbibm_simulators import TASKS, sir
from experiments.sbibm_tasks import Unconstrained, package_files

EMPTY = jnp.zeros(0)


def infected(beta, gamma):
    """I/N at t = 0, 17, …, 153 by an adaptive solver, in populations, not logarithms."""

    def rates(t, y):
        return [-beta * y[0] * y[1] / 1e6, beta * y[0] * y[1] / 1e6 - gamma * y[1]]

    return solve_ivp(rates, (0, 160), [1e6 - 1, 1], "DOP853", np.arange(0, 160, 17), rtol=1e-11, atol=1e-12).y[1] / 1e6


def log_gaussian_mixture(theta, x):
    parts = [multivariate_normal(theta, width**2 * np.eye(2)).pdf(x) for width in (1.0, 0.1)]
    return np.log(np.mean(parts))


def log_slcp(theta, x):
    s1, s2, rho = theta[2] ** 2, theta[3] ** 2, np.tanh(theta[4])
    covariance = np.array([[s1**2, rho * s1 * s2], [rho * s1 * s2, s2**2]]) + 1e-6 * np.eye(2)
    return multivariate_normal(theta[:2], covariance).logpdf(x.reshape(4, 2)).sum()


def log_sir(theta, x):
    return binom(1000, infected(*theta)).logpmf(x).sum()


def log_two_moons(theta, x):
    """x less its shift is a point of the half ring; the uniform angle has density 1/π, the area element is r dr da."""
    turn = np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    total, difference = turn @ theta
    u, v = x - [0.25 - abs(total), difference]
    r = np.hypot(u, v)
    return -0.5 * ((r - 0.1) / 0.01) ** 2 - np.log(0.01 * np.sqrt(2 * np.pi)) - np.log(np.pi * r) if u > 0 else -np.inf


DEFINITIONS = {
    "gaussian_mixture": log_gaussian_mixture,
    "slcp": log_slcp,
    "sir": log_sir,
    "two_moons": log_two_moons,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_likelihood_is_the_definition(name, x64):
    sim = TASKS[name]()
    draws = sim.draw(jax.random.key(0), 8, with_score=False)
    density = eqx.filter_jit(sim.log_conditional)
    for theta, x in zip(draws.theta, draws.x, strict=True):
        expected = DEFINITIONS[name](np.asarray(theta), np.asarray(x))
        np.testing.assert_allclose(density(theta, EMPTY, x), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("name", TASKS)
def test_score_against_finite_differences(name, x64):
    sim = TASKS[name]()
    draws = sim.draw(jax.random.key(1), 6)
    density = eqx.filter_jit(sim.log_conditional)
    for theta, x, score in zip(draws.theta, draws.x, draws.score, strict=True):
        steps = np.diag(1e-6 * np.maximum(np.abs(theta), 0.1))
        numeric = [float(density(theta + e, EMPTY, x) - density(theta - e, EMPTY, x)) / (2 * e.max()) for e in steps]
        np.testing.assert_allclose(score, numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max())


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"two_moons"}))  # its density jumps: no such identity
def test_mean_score_vanishes_at_fixed_theta(name, x64):
    sim = TASKS[name]()
    n, theta = 600, 0.9 * sim.fiducial + 0.05
    score = np.asarray(sim.draw(jax.random.key(2), n, theta).score)
    assert (np.abs(score.mean(0)) < 4.5 * score.std(0) / np.sqrt(n)).all()


@pytest.mark.parametrize("name", TASKS)
def test_finite_at_prior_draws_in_float32(name):
    sim = TASKS[name]()
    draws = sim.draw(jax.random.key(3), 300)
    x = jnp.asarray(draws.x, jnp.float32)
    summaries = sim.summaries(x, jax.random.key(4))
    published = sim.published(draws.theta)
    assert all(jnp.isfinite(a).all() for a in (x, draws.score, summaries, published))
    assert summaries.shape == x.shape and published.shape == draws.theta.shape


def test_two_moons_density_holds_all_draws(x64):
    """The density integrates to one on a grid, and the draws have its mean and spread."""
    sim, theta = TASKS["two_moons"](), jnp.array([0.3, -0.5])
    likelihood = sim.likelihood(theta, EMPTY)
    axes = [np.asarray(c) + np.linspace(-0.2, 0.2, 801)[:-1] + 2.5e-4 for c in likelihood.centre]
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    weight = np.exp(np.asarray(jax.jit(jax.vmap(lambda x: sim.likelihood(theta, EMPTY).log_prob(x)))(points)))
    np.testing.assert_allclose(weight.sum() * 5e-4**2, 1.0, rtol=1e-3)
    draws, weight = np.asarray(sim.draw(jax.random.key(5), 2000, theta).x), weight / weight.sum()
    mean = weight @ np.asarray(points)
    std = np.sqrt(weight @ (np.asarray(points) - mean) ** 2)
    assert (np.abs(draws.mean(0) - mean) < 4.5 * std / np.sqrt(2000)).all()
    np.testing.assert_allclose(draws.std(0), std, rtol=0.07)


def test_bernoulli_glm_is_the_likelihood_of_its_spikes(x64):
    """log p(x | theta) changes with theta as that of the spike train, drawn here, of which x are the statistics."""
    sim = TASKS["bernoulli_glm"]()
    design = np.asarray(sim.design)
    np.testing.assert_allclose(design[:4, 1], [0.49671414, -0.1382643, 0.64768857, 1.5230298])  # the published stimulus
    np.testing.assert_allclose(design[8:, 9], design[:-8, 1])
    spikes = np.random.default_rng(0).integers(0, 2, 100)
    epsilon = sim.prior.sample(jax.random.key(6), (4,))
    rates = 1 / (1 + np.exp(-np.asarray(sim.published(epsilon)) @ design.T))
    expected = bernoulli(rates).logpmf(spikes).sum(-1)
    values = np.asarray([sim.log_conditional(e, EMPTY, spikes @ design) for e in epsilon])
    np.testing.assert_allclose(np.diff(values), np.diff(expected), rtol=1e-9)


def test_bernoulli_glm_prior_penalises_second_differences(x64):
    sim = TASKS["bernoulli_glm"]()
    epsilon = sim.prior.sample(jax.random.key(7), (3,))
    for e, theta in zip(np.asarray(epsilon), np.asarray(sim.published(epsilon)), strict=True):
        f = np.concatenate([[0, 0], theta[1:]])
        rough = f[2:] - 2 * f[1:-1] + f[:-2] + np.sqrt(np.arange(9) / 9) * f[2:]
        np.testing.assert_allclose(e @ e, 0.5 * theta[0] ** 2 + rough @ rough, rtol=1e-9)


def test_sir_solver_against_an_adaptive_one(x64):
    sim = sir()
    theta = sim.prior.sample(jax.random.key(8), (40,))
    found = np.exp(np.asarray(jax.jit(jax.vmap(sim.log_fractions))(theta))[..., 1])
    expected = np.stack([infected(*t) for t in np.asarray(theta)])
    # A thousandth of the binomial's own scatter is 2e-5.
    assert np.abs(found - expected).max() < 2e-5
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_counts_with_a_fraction_stay_in_their_cell():
    sim = sir()
    x = jnp.tile(jnp.arange(0.0, 1001.0)[:, None], 10)
    middle = sim.summaries(x)
    moved = sim.summaries(x, jax.random.key(9))
    edges = jnp.tile(jnp.arcsin(jnp.sqrt(jnp.arange(1002.0) / 1001))[:, None], 10)
    assert ((moved >= edges[:-1] - 1e-6) & (moved <= edges[1:] + 1e-6)).all()
    assert ((middle > edges[:-1]) & (middle < edges[1:])).all()


def test_package_files_are_read_or_asked_for(tmp_path):
    folder = tmp_path / "sbibm" / "tasks" / "slcp" / "files" / "num_observation_1"
    folder.mkdir(parents=True)
    (folder / "observation.csv").write_text("data_1,data_2\n1.0,2.5\n")
    with bz2.open(folder / "reference_posterior_samples.csv.bz2", "wt") as table:
        table.write("parameter_1\n0.5\n-1.5\n0.25\n")
    x, theta = package_files("slcp", 1, str(tmp_path))
    assert x.tolist() == [1.0, 2.5] and theta.ravel().tolist() == [0.5, -1.5, 0.25]
    for missing in (None, str(tmp_path / "elsewhere")):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps --target FOLDER sbibm"):
            package_files("slcp", 1, missing)


def test_sir_refuses_no_steps():
    with pytest.raises(ValueError, match="substeps >= 1; got 0"):
        sir(substeps=0)


@pytest.mark.skipif("DIFFSBI_SBIBM" not in os.environ, reason="no data files of the package sbibm")
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"two_moons"}))
def test_published_reference_is_the_tasks_posterior(name, x64):
    """Over draws of a density, its own score averages to zero (Stein's identity)."""
    sim = TASKS[name]()
    x, theta = package_files(name, 1, os.environ["DIFFSBI_SBIBM"])
    theta = theta[::4]  # one task's draws are a Markov chain
    if name == "bernoulli_glm":
        theta = np.linalg.solve(np.asarray(sim.root), theta.T).T
    density = Unconstrained(sim, jnp.asarray(x))
    score = np.asarray(jax.jit(jax.vmap(jax.grad(density)))(sim.prior.to_unconstrained(jnp.asarray(theta))))
    assert (np.abs(score.mean(0)) < 5 * score.std(0) / np.sqrt(len(score))).all()


def test_half_ring_with_smooth_ends():
    """Its density is one in all; the mean of cos² a is that of 2/π cos⁴ a, 3/4."""
    ring = SmoothHalfRing(jnp.array([0.3, -0.2]))
    r, a = np.linspace(0.04, 0.16, 241), (np.arange(400) + 0.5) * np.pi / 400 - np.pi / 2
    points = np.array([0.3, -0.2]) + r[:, None, None] * np.stack([np.cos(a), np.sin(a)], -1)
    density = np.exp(jax.vmap(ring.log_prob)(points.reshape(-1, 2)).reshape(241, 400)) * r[:, None]
    np.testing.assert_allclose(density.sum() * (r[1] - r[0]) * np.pi / 400, 1.0, rtol=1e-6)
    offset = np.asarray(jax.vmap(ring.sample)(jax.random.split(jax.random.key(0), 40_000))) - np.array([0.3, -0.2])
    square = offset[:, 0] ** 2 / (offset**2).sum(1)
    assert abs(square.mean() - 0.75) < 4 * square.std() / 200


def test_two_moons_without_its_fold_differ_on_one_side_only():
    prior, x = TASKS["two_moons"]().prior, jnp.array([0.3, 0.02])
    own, folded, unfolded = TASKS["two_moons"](), Moons(prior, True, "sharp"), Moons(prior, False, "sharp")
    for theta, same in (([0.02, 0.03], True), ([-0.02, -0.03], False)):
        values = [sim.log_conditional(jnp.array(theta), EMPTY, x) for sim in (own, folded, unfolded)]
        assert values[0] == values[1] and (values[1] == values[2]) == same
