"""L-C2ST on exact conditionals, and on estimators that are wrong everywhere or only near the observation."""

import numpy as np
import pytest
from scipy import stats

from diffsbi.diagnostics import local_c2st

SPREAD = np.sqrt(0.5)


def calibration(seed, n=300, p=2, scale=1.0, shift=0.0, bump=0.0, x_o=0.5):
    """theta ~ N(0, 1), x = theta + N(0, 1): the posterior N(x/2, 1/2), tampered with; `bump` shifts it near x = 0.5."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(n, p))
    x = theta + rng.normal(size=(n, p))
    x_o = np.full(p, x_o)

    def estimator(x):
        near = bump * np.exp(-0.5 * np.sum((x - 0.5) ** 2, -1, keepdims=True) / 0.5**2)
        return x / 2 + SPREAD * (shift + near + scale * rng.normal(size=x.shape))

    return theta, x, estimator(x), x_o, estimator(np.broadcast_to(x_o, (500, p)))


def test_p_values_of_exact_posteriors_are_uniform():
    found = np.array([local_c2st(*calibration(s, 100), n_null=99, seed=s).p_value for s in range(50)])
    assert np.sum(found <= 0.01) <= stats.binom.ppf(0.9999, 50, 0.01)
    assert np.sum(found <= 0.1) <= stats.binom.ppf(0.9999, 50, 0.1)
    spread = found - 0.01 * np.random.default_rng(0).uniform(size=50)  # of 100 possible values: continuous
    assert stats.kstest(spread, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("p", [1, pytest.param(2, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize(
    "wrong", [{"shift": 0.5}, {"shift": -0.5}, {"scale": 0.6}, {"scale": 1.6}], ids=["up", "down", "narrow", "wide"]
)
def test_wrong_posteriors_are_rejected(wrong, p):
    for seed in range(3):
        result = local_c2st(*calibration(seed, 600, p, **wrong), n_null=99, seed=seed)
        assert result.p_value <= 0.05 and result.statistic > 2 * np.median(result.null)


def test_the_statistic_is_the_classifiers_distance_from_a_half():
    """Exact: d = p / (p + q), averaged over q."""
    theta, x, theta_q, x_o, theta_o = calibration(0, 2000, 1, shift=1.0)
    log_ratio = stats.norm.logpdf(theta_o, x_o / 2, SPREAD) - stats.norm.logpdf(theta_o, x_o / 2 + SPREAD, SPREAD)
    exact = np.mean((1 / (1 + np.exp(-log_ratio)) - 0.5) ** 2)
    assert abs(local_c2st(theta, x, theta_q, x_o, theta_o).statistic / exact - 1) < 0.2


def test_errors_near_the_observation_are_seen_there_and_not_elsewhere():
    here = [local_c2st(*calibration(s, 600, bump=1.0), n_null=49, seed=s).p_value for s in range(10)]
    there = [local_c2st(*calibration(s, 600, bump=1.0, x_o=-3.0), n_null=49, seed=s).p_value for s in range(10)]
    assert np.sum(np.array(here) <= 0.05) >= 8
    assert np.sum(np.array(there) <= 0.05) <= stats.binom.ppf(0.9999, 10, 0.05)


def test_wrong_shape_with_right_moments_is_rejected():
    theta, x, theta_q, x_o, theta_o = calibration(0, 1500, 1)
    rng = np.random.default_rng(1)

    def lumps(x):  # two narrow lumps with the mean and the variance of the posterior
        return x / 2 + SPREAD * (0.9 * rng.choice([-1, 1], x.shape) + np.sqrt(1 - 0.81) * rng.normal(size=x.shape))

    assert local_c2st(theta, x, lumps(x), x_o, lumps(np.broadcast_to(x_o, (500, 1))), n_null=99).p_value == 0.01


def test_units_do_not_matter_and_seeds_reproduce():
    theta, x, theta_q, x_o, theta_o = calibration(3, shift=0.2)
    a = local_c2st(theta, x, theta_q, x_o, theta_o, n_null=19, seed=1)
    u, w = np.array([1e-5, 1e4]), np.array([1e6, 1e-3])
    b = local_c2st(theta * u, x * w, theta_q * u, x_o * w, theta_o * u, n_null=19, seed=1)
    np.testing.assert_allclose(b.null, a.null, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(b.statistic, a.statistic, rtol=1e-5)
    assert a.n == 300 and a.null.shape == (19,)
    assert not np.array_equal(a.null, local_c2st(theta, x, theta_q, x_o, theta_o, n_null=19, seed=2).null)


def test_constant_and_repeated_columns_are_allowed():
    theta, x, theta_q, x_o, theta_o = calibration(4, shift=1.0)
    x, x_o = np.concatenate([x, x, np.ones((300, 1))], 1), np.concatenate([x_o, x_o, [1.0]])
    assert local_c2st(theta, x, theta_q, x_o, theta_o, n_null=19).p_value == 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, x, q, xo, to: (t[:, :1], x, q, xo, to), r"got \(300, 1\), \(300, 2\) and \(300, 2\)"),
        (lambda t, x, q, xo, to: (t, x[:200], q, xo, to), "one row for each pair"),
        (lambda t, x, q, xo, to: (t[:20], x[:20], q[:20], xo, to), r"theta with shape \(n >= 50"),
        (lambda t, x, q, xo, to: (t, x, q, xo[:1], to), r"x_o with shape \(2,\).*got \(1,\)"),
        (lambda t, x, q, xo, to: (t, x, q, xo * np.nan, to), "finite x_o; got 2"),
        (lambda t, x, q, xo, to: (t, x, q, xo, 0 * to), "theta_o that vary"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        local_c2st(*change(*calibration(0)))


def test_no_null_is_refused():
    with pytest.raises(ValueError, match="n_null >= 1; got 0"):
        local_c2st(*calibration(0), n_null=0)
