"""Predictive checks and tests for misspecification: models that are right, and wrong in known ways."""

import numpy as np
import pytest
from scipy import stats

from diffsbi.diagnostics import misspecification, predictive_check
from diffsbi.diagnostics._distances import left_out_distances, shrunk_correlation, standardised

ROOT = np.array([[1.0, 0.0, 0.0, 0.0], [0.9, 0.3, 0.0, 0.0], [0.2, -0.5, 2.0, 0.0], [0.0, 0.1, 0.3, 0.5]])


def skewed(rng, n):
    """Correlated, skewed, in units of their own."""
    return np.exp(0.3 * rng.normal(size=(n, 4)) @ ROOT.T) * np.array([1e-6, 1.0, 1e4, 3.0])


def uniform_within_errors(p_values, values):
    """`p_values` take one of `values` values, evenly."""
    p_values = np.asarray(p_values) - np.random.default_rng(0).uniform(size=len(p_values)) / values
    return stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_p_values_of_a_right_model_are_uniform():
    rng = np.random.default_rng(0)
    checks = [predictive_check(skewed(rng, 60), skewed(rng, 1)[0]) for _ in range(400)]
    assert uniform_within_errors([c.p_value for c in checks], 61)
    tails = np.array([c.tail_probability for c in checks])
    for level in (0.1, 0.5):  # 2 (k + 1) / (n + 1) is at most the level for that many of the 61 ranks
        expected = 2 * np.floor(level * 61 / 2) / 61
        assert (np.abs((tails <= level).mean(0) - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 400)).all()


def test_tail_probability_and_its_error():
    rng = np.random.default_rng(1)
    check = predictive_check(rng.normal(size=(2000, 3)), np.array([0.0, 1.5, -3.0]), "abc")
    exact = 2 * stats.norm.sf([0.0, 1.5, 3.0])
    assert (np.abs(check.tail_probability - exact) < 4.5 * check.error + 1e-3).all()
    np.testing.assert_allclose(check.error[1], 2 * np.sqrt(exact[1] / 2 * (1 - exact[1] / 2) / 2000), rtol=0.1)
    assert check.worst == ("c", "b", "a") and check.n == 2000


@pytest.mark.parametrize("wrong", ["mean", "variance", "one", "correlation"])
def test_wrong_models_are_found_and_named(wrong):
    rng = np.random.default_rng(2)
    simulated = rng.normal(size=(300, 6))
    observed = rng.normal(size=6)
    if wrong == "mean":
        observed = observed + 3.0
    if wrong == "variance":
        simulated = 0.3 * simulated
        observed = 3 * observed / np.linalg.norm(observed)
    if wrong == "one":
        observed[4] = -7.0
    if wrong == "correlation":  # each within its range; together impossible
        simulated[:, 1] = simulated[:, 0] + 0.1 * rng.normal(size=300)
        observed = np.array([1.2, -1.2, 0.0, 0.0, 0.0, 0.0])
    check = predictive_check(simulated, observed)
    assert check.p_value <= 0.01
    if wrong == "one":
        assert (
            check.worst[0] == "statistic 4"
            and check.tail_probability[4] < 0.01 < np.delete(check.tail_probability, 4).min()
        )
    if wrong == "correlation":
        assert check.tail_probability.min() > 0.1


def test_predictions_that_are_too_wide_have_p_values_near_one():
    """A check of this kind can only refuse what is far: too wide a model shows as observations that are too central."""
    rng = np.random.default_rng(4)
    p_values = [predictive_check(5 * rng.normal(size=(100, 6)), rng.normal(size=6)).p_value for _ in range(40)]
    right = [predictive_check(rng.normal(size=(100, 6)), rng.normal(size=6)).p_value for _ in range(40)]
    assert np.mean(p_values) > 0.95 > 0.7 > np.mean(right)


def test_distances_are_those_of_rows_left_out():
    rows = np.random.default_rng(3).normal(size=(40, 3)) @ ROOT[:3, :3]
    unit = standardised(rows)
    _, rho = shrunk_correlation(unit)
    by_hand = []
    for i in range(40):
        others = np.delete(unit, i, 0)
        scatter = np.sum([np.outer(z, z) for z in others - others.mean(0)], 0) / 40
        r = unit[i] - others.mean(0)
        by_hand.append(r @ np.linalg.solve((1 - rho) * scatter + rho * np.eye(3), r))
    np.testing.assert_allclose(left_out_distances(rows), by_hand, rtol=1e-9)


def test_more_statistics_than_simulations():
    rng = np.random.default_rng(4)
    found = [predictive_check(rng.normal(size=(40, 60)), rng.normal(size=60)).p_value for _ in range(200)]
    assert uniform_within_errors(found, 41)
    assert predictive_check(rng.normal(size=(40, 60)), rng.normal(size=60) + 3.0).p_value <= 2 / 41


def test_constant_statistics():
    simulated = np.concatenate([np.random.default_rng(5).normal(size=(50, 1)), np.ones((50, 1))], 1)
    assert predictive_check(simulated, [0.0, 1.0]).tail_probability[1] == 1.0
    assert predictive_check(simulated, [0.0, 1.1], ("a", "b")).worst[0] == "b"
    assert misspecification(simulated, [0.0, 1.0], level=0.05).p_value > 0.05
    result = misspecification(simulated, [0.0, 1.1], names=("a", "b"), level=0.05)
    assert result.misspecified and result.worst[0] == "b"


# --- misspecification --------------------------------------------------------------------------------------------


def test_right_observations_are_flagged_at_the_stated_rate():
    rng = np.random.default_rng(6)
    found = [misspecification(skewed(rng, 99), skewed(rng, 1)[0], level=0.05) for _ in range(400)]
    assert uniform_within_errors([m.p_value for m in found], 100)
    rate = np.mean([m.misspecified for m in found])
    assert abs(rate - 0.05) < 4.5 * np.sqrt(0.05 * 0.95 / 400)
    assert all(bool(m.warning) == m.misspecified for m in found)


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_an_outlying_statistic_is_named(heavy):
    rng = np.random.default_rng(7)
    simulated = rng.standard_t(3, size=(400, 5)) if heavy else rng.normal(size=(400, 5))
    observed = np.array([0.1, -0.5, 40.0 if heavy else 6.0, 0.3, 0.9])
    result = misspecification(simulated, observed, names=[f"C{i}" for i in range(5)])
    assert result.misspecified and result.worst[0] == "C2"
    assert "C2 (+" in result.warning and "p = 0.0025 among 400 simulations (level 0.01)" in result.warning
    assert not misspecification(simulated, observed * [1, 1, 0.02, 1, 1]).misspecified


def test_a_broken_correlation_is_named():
    rng = np.random.default_rng(8)
    simulated = rng.normal(size=(400, 4))
    simulated[:, 1] = simulated[:, 0] + 0.1 * rng.normal(size=400)
    result = misspecification(simulated, [1.2, -1.2, 0.0, 0.0], names="abcd")
    assert result.misspecified and set(result.worst[:2]) == {"a", "b"}
    assert np.abs(result.z).max() < 2 and np.abs(result.conditional_z[:2]).min() > 5


def test_a_few_wild_simulations_do_not_hide_an_outlier():
    rng = np.random.default_rng(9)
    simulated = rng.normal(size=(400, 3))
    simulated[0] = 1e4
    assert misspecification(simulated, [6.0, -6.0, 6.0]).misspecified


def test_a_score_sees_what_a_distance_does_not():
    """A ring, looked at from its empty centre, with its exact log-density."""
    rng = np.random.default_rng(10)

    def ring(n):
        angle, radius = rng.uniform(0, 2 * np.pi, n), 5 + 0.3 * rng.normal(size=n)
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)

    def score(x):
        return -0.5 * ((np.linalg.norm(x, axis=1) - 5) / 0.3) ** 2 - np.log(np.linalg.norm(x, axis=1) + 1e-9)

    simulated = ring(400)
    assert not misspecification(simulated, [0.1, 0.0]).misspecified
    result = misspecification(simulated, [0.1, 0.0], score=score)
    assert result.misspecified and result.p_score == 1 / 401 and "trained density" in result.warning
    flagged = [misspecification(simulated, x, score=score, level=0.05).misspecified for x in ring(300)]
    assert np.mean(flagged) < 0.05 + 4.5 * np.sqrt(0.05 * 0.95 / 300)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, o: predictive_check(s, o[:2]), r"observed with shape \(3,\), as simulated; got \(2,\)"),
        (lambda s, o: predictive_check(s[:10], o), r"n >= 20.*got \(10, 3\)"),
        (lambda s, o: predictive_check(s, o * np.nan), "finite observed; got 3"),
        (lambda s, o: predictive_check(s, o, "ab"), r"3 different names.*\['a', 'b'\]"),
        (lambda s, o: misspecification(s, o, level=0.01), "at least 99 simulations for level 0.01; got 50"),
        (lambda s, o: misspecification(s, o, level=2.0), r"level in \(0, 1\); got 2.0"),
        (lambda s, o: misspecification(s, o, level=0.1, score=lambda x: x), r"return shape \(51,\); got \(51, 3\)"),
        (lambda s, o: misspecification(s, o, level=0.1, score=lambda x: x[:, 0] * np.nan), "NaN in 51 rows"),
    ],
)
def test_refusals(call, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        call(rng.normal(size=(50, 3)), rng.normal(size=3))
