"""Data far outside the simulations of a fit are warned about: once, by column, value and range."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from diffsbi.comparison import outside_training
from diffsbi.inference import NLE, NPE, gaussian_proposal, load_posterior
from diffsbi.inference.checks import outlier_warnings
from diffsbi.prior import Prior

SMALL = {"layers": 1, "width": 4, "depth": 1}
PRIOR = Prior({"a": dist.Uniform(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})


def rows():
    rng = np.random.default_rng(0)
    theta = np.asarray(PRIOR.sample(jax.random.key(0), (40,)))
    x = np.stack([rng.uniform(-1, 3, 40), rng.uniform(100, 101, 40), np.full(40, 7.0)], 1)
    x[0], x[1] = [-1.0, 100.0, 7.0], [3.0, 101.0, 7.0]
    return theta, x


def fitted(kind=NPE, **options):
    estimator = kind(PRIOR, "coupling", density_options=SMALL).append(*rows(), **options)
    return estimator.fit(jax.random.key(1), members=1, max_epochs=1)


@pytest.fixture(scope="module")
def posterior():
    return fitted()


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if "far outside the simulations" in str(w.message)]


@pytest.mark.parametrize("x", [[1.0, 100.5, 7.0], [4.9, 100.5, 7.0], [-2.9, 101.4, 7.0]], ids=["in", "above", "below"])
def test_near_data_are_not_warned_about(posterior, x):
    assert warned(lambda: posterior.condition(jnp.asarray(x))) == []


@pytest.mark.parametrize(
    "x, named",
    [
        ([5.1, 100.5, 7.0], "column 0 is 5.1 (simulations -1 to 3)"),
        ([-3.1, 100.5, 7.0], "column 0 is -3.1 (simulations -1 to 3)"),
        ([1.0, 102.0, 7.0], "column 1 is 102 (simulations 100 to 101)"),
        ([1.0, 100.5, 7.1], "column 2 is 7.1 (simulations 7 to 7)"),
        ([6.0, 200.0, 7.0], "column 1 is 200 (simulations 100 to 101); column 0 is 6 (simulations -1 to 3)"),
    ],
)
def test_far_data_are_named(posterior, x, named):
    found = warned(lambda: posterior.condition(jnp.asarray(x)))
    assert len(found) == 1 and named in str(found[0].message)


def test_once_for_the_same_data(posterior):
    x, theta = jnp.asarray([30.0, 100.5, 7.0]), jnp.asarray([0.5, 0.0])

    def use():
        conditioned = posterior.condition(x)
        for _ in range(2):
            posterior.sample(jax.random.key(0), 2, x)
            posterior.log_prob(theta, x)
            conditioned.log_prob(theta)

    assert len(warned(use)) == 1
    assert len(warned(lambda: posterior.log_prob(theta, 2 * x))) == 1


def test_many_data_in_one_warning(posterior):
    x = jnp.asarray([[1.0, 100.5, 7.0], [50.0, 100.5, 7.0], [60.0, 100.5, 7.0]])
    (found,) = warned(lambda: posterior.sample(jax.random.key(0), 2, x))
    assert "2 of 3 rows of x lie far outside" in str(found.message) and "column 0 is 60" in str(found.message)


def test_likelihoods_and_reweighted_posteriors_warn():
    x = jnp.asarray([9.0, 100.5, 7.0])
    theta = jnp.asarray([0.5, 0.0])
    assert len(warned(lambda: fitted(NLE).log_prob(theta, x))) == 1
    proposal = gaussian_proposal(PRIOR, rows()[0], 1.0)
    assert len(warned(lambda: fitted(proposal=proposal).log_prob(theta, x))) == 1


def test_saved_and_loaded(posterior, tmp_path):
    posterior.save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a")
    assert loaded.config["x_range"] == [[-1.0, 100.0, 7.0], [3.0, 101.0, 7.0]]
    (found,) = warned(lambda: loaded.condition(jnp.asarray([11.0, 100.5, 7.0])))
    assert "column 0 is 11 (simulations -1 to 3)" in str(found.message)


def test_traced_data_are_left_alone(posterior):
    theta = jnp.asarray([0.5, 0.0])
    assert warned(lambda: jax.jit(lambda x: posterior.log_prob(theta, x))(jnp.asarray([99.0, 100.5, 7.0]))) == []


def test_posteriors_without_a_range_are_left_alone(posterior):
    import dataclasses

    old = dataclasses.replace(posterior, config_json="{}")
    assert warned(lambda: old.condition(jnp.asarray([99.0, 100.5, 7.0]))) == []


def test_rows_far_from_all_others_are_named():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, size=(400, 2))  # heavy tails alone are no reason
    assert outlier_warnings(x) == []
    x[7, 1] = 2e4
    (warning,) = outlier_warnings(x)
    assert "1 of 400 rows of x" in warning and "row 7, column 1: 2e+04" in warning
    assert outlier_warnings(np.c_[np.zeros(400), x[:, 0]]) == []  # a column that mostly does not vary
    theta = np.asarray(PRIOR.sample(jax.random.key(0), (400,)))
    with pytest.warns(UserWarning, match="they do not decide the fit"):
        NPE(PRIOR, density_options=SMALL).append(theta, x).fit(jax.random.key(0), members=1, max_epochs=1)


def test_the_report_warns_of_numbers_that_only_together_are_unlike_the_simulations():
    rng = np.random.default_rng(0)
    t = rng.normal(size=(300, 1)) + 0.1 * rng.normal(size=(300, 2))  # nearly equal to each other
    assert outside_training(("a", "b"), np.array([1.0, 1.1]), t) == []
    (warning,) = outside_training(("a", "b"), np.array([1.0, -1.0]), t)
    assert "not like the simulations" in warning and "summary of a" in warning
    assert outside_training(("a", "b"), np.array([1.0, -1.0]), t[:50]) == []  # too few to tell
    assert "outside the simulated range" in outside_training(("a", "b"), np.array([9.0, 9.0]), t)[0]
