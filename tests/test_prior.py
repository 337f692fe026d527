"""The prior against SciPy, autodiff and its own draws; its edges and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats as st

from diffsbi.prior import Prior

# Truncations as the LSST-Y10 preset has them: one sided and two sided.
CASES = {
    "free": (dist.Normal(0.5, 2.0), st.norm(0.5, 2.0)),
    "half": (
        dist.TruncatedNormal(0.2664, 0.2, low=0.0),
        st.truncnorm(-0.2664 / 0.2, np.inf, 0.2664, 0.2),
    ),
    "interval": (
        dist.TruncatedNormal(-1.0, 0.9, low=-2.0, high=-0.3),
        st.truncnorm(-1 / 0.9, 0.7 / 0.9, -1.0, 0.9),
    ),
    "rate": (dist.LogNormal(-3.0, 0.5), st.lognorm(0.5, scale=np.exp(-3.0))),
    "box": (dist.Uniform(1.0, 3.0), st.uniform(1.0, 2.0)),
}
NUMBER = {name: i for i, name in enumerate(CASES)}


@pytest.fixture
def prior(x64):
    return make_prior()


def make_prior():
    return Prior({name: case[0] for name, case in CASES.items()})


def references():
    return [case[1] for case in CASES.values()]


def test_draws_follow_the_distributions(prior):
    n = 5000
    draws = np.asarray(prior.sample(jax.random.key(0), (n,)))
    for column, reference in zip(draws.T, references(), strict=True):
        assert st.kstest(column, reference.cdf).pvalue > 1e-4
        assert abs(column.mean() - reference.mean()) < 4.5 * reference.std() / np.sqrt(n)
    correlation = np.corrcoef(draws.T) - np.eye(len(CASES))
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_shapes_of_draws(prior):
    assert prior.sample(jax.random.key(0)).shape == (5,)
    batch = prior.sample(jax.random.key(0), (2, 3))
    assert batch.shape == (2, 3, 5) and jax.eval_shape(prior.log_prob, batch).shape == (2, 3)


def test_log_prob_against_scipy(prior):
    theta = np.asarray(prior.sample(jax.random.key(1), (50,)))
    expected = sum(r.logpdf(column) for r, column in zip(references(), theta.T, strict=True))
    np.testing.assert_allclose(jax.jit(prior.log_prob)(theta), expected, rtol=1e-10)


def test_gradient_against_finite_differences(prior):
    theta = np.asarray(prior.sample(jax.random.key(2), (50,)))[0]
    density = jax.jit(prior.log_prob)
    steps = 1e-6 * np.abs(theta)
    numeric = [
        float(density(theta + h * e) - density(theta - h * e)) / (2 * h) for h, e in zip(steps, np.eye(5), strict=True)
    ]
    np.testing.assert_allclose(jax.grad(prior.log_prob)(theta), numeric, rtol=1e-6, atol=1e-6)


def test_unconstrained_round_trip(prior):
    to, back = jax.jit(prior.to_unconstrained), jax.jit(prior.from_unconstrained)
    theta = prior.sample(jax.random.key(3), (50,))
    np.testing.assert_allclose(back(to(theta)), theta, rtol=1e-9)
    u = 3 * jax.random.normal(jax.random.key(4), (50, 5))
    np.testing.assert_allclose(to(back(u)), u, atol=1e-9)
    assert bool(jax.jit(prior.in_support)(back(u)).all())


def test_log_det_against_autodiff(prior):
    u = jax.random.normal(jax.random.key(5), (10, 5))
    jacobian = jax.jit(jax.vmap(jax.jacfwd(prior.from_unconstrained)))(u)
    log_det = np.linalg.slogdet(np.asarray(jacobian))[1]
    np.testing.assert_allclose(jax.jit(prior.log_det_jacobian)(u), log_det, atol=1e-10)
    density = jax.jit(lambda u: prior.log_prob(prior.from_unconstrained(u)))(u)
    np.testing.assert_allclose(jax.jit(prior.log_prob_unconstrained)(u), density + log_det, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_unconstrained_density_is_normalised(x64, name):
    prior = Prior({name: CASES[name][0]})
    u = jnp.linspace(-60, 60, 60_001)[:, None]
    np.testing.assert_allclose(np.exp(prior.log_prob_unconstrained(u)).sum() * 120 / 60_000, 1.0, atol=1e-6)


OUTSIDE = {
    "half": [-1e-3, -50.0],
    "interval": [-2.01, 4.0],
    "rate": [-1.0, 0.0],
    "box": [0.99, np.inf],
    "free": [np.nan],
}


@pytest.mark.parametrize("enable", [False, True], ids=["float32", "float64"])
def test_outside_the_support(enable):
    with jax.enable_x64(enable):
        prior = make_prior()
        both = jax.jit(jax.value_and_grad(prior.log_prob))
        for name, values in OUTSIDE.items():
            for value in values:
                theta = prior.fiducial.at[NUMBER[name]].set(value)
                log_prob, gradient = both(theta)
                assert log_prob == -jnp.inf and not prior.in_support(theta), (name, value)
                np.testing.assert_array_equal(gradient, np.zeros(5))


@pytest.mark.parametrize("enable", [False, True], ids=["float32", "float64"])
def test_finite_at_the_edges_of_the_support(enable):
    edges = {"half": [0.0, 1e-30, 5.0], "interval": [-2.0, -1.999999, -0.300001, -0.3], "box": [1.0, 3.0],
             "rate": [1e-6, 1e3], "free": [-1e3, 1e3]}  # fmt: skip
    with jax.enable_x64(enable):
        prior = make_prior()
        both = jax.jit(jax.value_and_grad(prior.log_prob))
        for name, values in edges.items():
            for value in values:
                log_prob, gradient = both(prior.fiducial.at[NUMBER[name]].set(value))
                assert not jnp.isnan(log_prob) and jnp.isfinite(gradient).all(), (name, value)


@pytest.mark.parametrize("enable", [False, True], ids=["float32", "float64"])
def test_unconstrained_density_is_finite_far_out(enable):
    with jax.enable_x64(enable):
        prior = make_prior()
        both = jax.jit(jax.value_and_grad(prior.log_prob_unconstrained))
        for u in (-30.0, -10.0, 10.0, 30.0):
            log_prob, gradient = both(jnp.full(5, u))
            assert jnp.isfinite(gradient).all(), u
            assert not jnp.isnan(log_prob), u


def test_fiducial(prior):
    np.testing.assert_allclose(prior.fiducial, [r.mean() for r in references()], rtol=1e-6)
    chosen = Prior({"a": dist.Normal(0.0, 1.0), "b": dist.Uniform(0.0, 1.0)}, {"b": 0.25})
    np.testing.assert_array_equal(chosen.fiducial, [0.0, 0.25])
    assert chosen.names == ("a", "b") and chosen.dim == 2


def test_check_accepts_draws(prior):
    prior.check(prior.sample(jax.random.key(6), (50,)))
    prior.check(prior.fiducial)


@pytest.mark.parametrize(
    "theta, message",
    [
        ([0.5, 0.3, -1.0, 0.05, 0.5], r"box inside the prior's support .*got 0.5"),
        ([[0.5, 0.3, -1.0, 0.05, 2.0], [0.5, -0.3, -1.0, 0.05, 2.0]], "half inside .*got -0.3"),
        ([np.nan, 0.3, -1.0, 0.05, 2.0], "free inside .*got nan"),
        ([0.5, 0.3], r"theta with trailing shape \(5,\); got \(2,\)"),
    ],
)
def test_check_refuses(prior, theta, message):
    with pytest.raises(ValueError, match=message):
        prior.check(np.array(theta))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Prior({}), "at least one named distribution"),
        (lambda: Prior({"a": dist.Normal(jnp.zeros(2), 1.0)}), r"scalar distribution for 'a'; got shape \(2,\)"),
        (lambda: Prior({"sigma_8": dist.Normal(0.0, 1.0)}, {"sigma8": 0.8}), "'sigma8'.*Did you mean 'sigma_8'"),
        (lambda: Prior({"a": dist.Uniform(0.0, 1.0)}, {"a": 2.0}), "a inside .*got 2.0"),
        (lambda: Prior({"a": dist.Cauchy(0.0, 1.0)}), "a inside .*got nan"),
    ],
)
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_shape_errors_name_both_shapes(prior):
    for method in (prior.log_prob, prior.to_unconstrained, prior.from_unconstrained):
        with pytest.raises(ValueError, match=r"trailing shape \(5,\); got \(4,\)"):
            method(jnp.ones(4))


def test_moments_in_unconstrained_space_are_those_of_draws():
    prior = Prior({"a": dist.LogNormal(0.3, 0.2), "b": dist.Normal(-1.0, 2.0)})
    theta = prior.sample(jax.random.key(0), (20_000,))
    mean, covariance = prior.unconstrained_moments(theta)
    true_mean, true_sd = np.array([0.3, -1.0]), np.array([0.2, 2.0])
    in_widths = covariance / np.outer(true_sd, true_sd)
    assert np.abs((mean - true_mean) / true_sd).max() < 5 / np.sqrt(20_000)
    assert np.abs(in_widths - np.eye(2)).max() < 5 * np.sqrt(2 / 20_000)
    mean, sd = prior.unconstrained_spread()
    assert np.abs((mean - true_mean) / true_sd).max() < 5 / np.sqrt(4000)
    assert np.abs(sd / true_sd - 1).max() < 5 / np.sqrt(2 * 4000)
    for bad, message in (
        (theta[:3], r"start with at least 4 draws, \(n, 2\); got \(3, 2\)"),
        (theta.at[1, 0].set(jnp.nan), "finite start"),
        (theta.at[1, 0].set(-1.0), "Expected a inside"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.unconstrained_moments(bad, "start")


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1000.0, 1001.0), (-1e6, 1e6)])
def test_values_on_the_edges_have_a_finite_place_without_bounds(low, high):
    """Draws of a uniform distribution reach them."""
    prior = Prior({"a": dist.Uniform(low, high)})
    theta = jnp.asarray([[low], [0.5 * (low + high)], [high]], jnp.float32)
    u = prior.to_unconstrained(theta)
    assert jnp.all(jnp.isfinite(u)) and u[0, 0] < -5 and u[2, 0] > 5
    np.testing.assert_allclose(prior.from_unconstrained(u), theta, rtol=0, atol=1e-3 * (high - low))
    tiny = Prior({"a": dist.HalfNormal(1e-9)}, {"a": 1e-9})
    assert 0 < tiny.from_unconstrained(tiny.to_unconstrained(jnp.zeros(1)))[0] < 1e-11
