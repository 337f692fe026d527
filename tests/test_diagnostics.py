"""Diagnostics on answers that are right, and on answers known to be wrong."""

import numpy as np
import pytest
from scipy.stats import norm

from diffsbi.diagnostics import (
    c2st,
    compare_moments,
    expected_coverage,
    figure_of_merit,
    moments,
    sbc_ranks,
    sbc_test,
    tarp,
)


def normal(n, p, seed, scale=1.0, shift=0.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, p))


# --- C2ST --------------------------------------------------------------------------------------------------------


def test_c2st_of_one_distribution_is_a_half():
    results = [c2st(normal(600, 3, s), normal(600, 3, 100 + s), seed=s) for s in range(4)]
    for result in results:
        assert abs(result.value - 0.5) < 4 * result.error
        assert np.isclose(result.error, np.sqrt(0.25 / 1200), rtol=0.02)
        assert np.isclose(np.mean(result.folds), result.value) and len(result.folds) == 5


@pytest.mark.parametrize("distance", [1.0, 2.5])
def test_c2st_of_shifted_gaussians_is_the_optimal_accuracy(distance):
    shift = np.array([distance, 0.0])
    result = c2st(normal(1500, 2, 0), normal(1500, 2, 1, shift=shift))
    optimal = norm.cdf(distance / 2)
    # From above: chance alone. From below: the network, too, which loses at most a hundredth here.
    assert -0.01 - 4 * result.error < result.value - optimal < 4 * result.error


@pytest.mark.parametrize("scale", [0.5, 2.0], ids=["narrow", "wide"])
def test_c2st_sees_wrong_widths(scale):
    result = c2st(normal(1000, 2, 2, scale), normal(1000, 2, 3))
    # Two isotropic Gaussians in two dimensions: the radius decides, with variance 1 against 4 in the right units.
    cut = 2 * np.log(4) / (1 - 1 / 4)
    optimal = 0.5 * ((1 - np.exp(-cut / 2)) + np.exp(-cut / 8))
    assert abs(result.value - optimal) < 4 * result.error + 0.01


def test_c2st_sees_a_correlation_that_no_marginal_shows():
    a, z = normal(1000, 2, 4), normal(1000, 2, 5)
    b = np.stack([z[:, 0], 0.9 * z[:, 0] + np.sqrt(0.19) * z[:, 1]], 1)
    assert c2st(a, b).value > 0.65


def test_c2st_does_not_depend_on_units():
    a, b = normal(300, 2, 6), normal(300, 2, 7, shift=0.7)
    units = np.array([1e-6, 1e5])
    assert c2st(a, b).value == c2st(a * units, b * units).value


def test_c2st_subsamples_and_is_reproducible():
    a, b = normal(900, 2, 8), normal(300, 2, 9)
    first = c2st(a, b, seed=1)
    assert first.n == 300 and c2st(a, b, max_draws=200).n == 200
    assert first.value == c2st(a, b, seed=1).value
    assert first.folds != c2st(a, b, seed=2).folds


def test_c2st_refuses_repeated_draws():
    a, b = normal(300, 2, 10), normal(300, 2, 11)
    for x, y, count in ((a[np.arange(400) % 300], b, 100), (a, np.concatenate([b, a[:7]]), 7)):
        with pytest.raises(ValueError, match=f"got {count} repeated"):
            c2st(x, y)
        result = c2st(x, y, duplicates="drop")
        assert result.duplicates == count and result.n == 300


@pytest.mark.parametrize(
    "a, b, settings, message",
    [
        (np.ones((5, 2)) * np.nan, normal(5, 2, 0), {}, "samples_a; got 10 non-finite of 10"),
        (normal(5, 2, 0), normal(5, 3, 1), {}, "got 2 and 3 columns"),
        (normal(30, 2, 0), normal(30, 2, 1), {}, "at least 50 distinct draws .* got 30"),
        (normal(5, 2, 0)[0], normal(5, 2, 1), {}, r"samples_a with shape \(n >= 2, p >= 1\); got \(2,\)"),
        (normal(60, 2, 0), normal(60, 2, 1), {"folds": 1}, "folds >= 2; got 1"),
        (normal(60, 2, 0), normal(60, 2, 1), {"duplicates": "keep"}, "'refuse' or 'drop'; got 'keep'"),
    ],
)
def test_c2st_refusals(a, b, settings, message):
    with pytest.raises(ValueError, match=message):
        c2st(a, b, **settings)


# --- moments -----------------------------------------------------------------------------------------------------


def correlated(n, seed):
    cov = np.array([[4.0, 1.5, 0.0], [1.5, 1.0, 0.0], [0.0, 0.0, 0.25]])
    return np.random.default_rng(seed).multivariate_normal([1.0, -2.0, 0.5], cov, n), cov


def test_moments():
    n = 4000
    draws, cov = correlated(n, 0)
    result = moments(draws, ("a", "b", "c"))
    assert (np.abs(result.mean - [1.0, -2.0, 0.5]) < 4.5 * np.sqrt(np.diag(cov) / n)).all()
    assert (np.abs(result.std / np.sqrt(np.diag(cov)) - 1) < 4.5 / np.sqrt(2 * n)).all()
    np.testing.assert_allclose(result.cov, np.cov(draws.T))
    assert result.n == n and result.names == ("a", "b", "c")


def test_compare_moments_of_the_same_posterior_within_its_own_errors():
    pulls = []
    for seed in range(100):
        result = compare_moments(normal(200, 3, seed), normal(300, 3, 1000 + seed), "abc")
        pulls.append([result.shift / result.shift_error, (result.width_ratio - 1) / result.width_error])
    assert np.abs(np.std(pulls, axis=(0, 2)) - 1).max() < 4.5 / np.sqrt(2 * 300)
    assert np.abs(np.mean(pulls, axis=(0, 2))).max() < 4.5 / np.sqrt(300)


@pytest.mark.parametrize("scale, shift", [(0.8, 0.0), (1.25, 0.0), (1.0, 0.3)], ids=["narrow", "wide", "shifted"])
def test_compare_moments_sees_wrong_answers(scale, shift):
    reference = normal(4000, 1, 0, 3.0)
    result = compare_moments(normal(4000, 1, 1, 3.0 * scale, 3.0 * shift), reference, ("a",))
    assert abs(result.shift[0] - shift) < 4.5 * result.shift_error[0]
    assert abs(result.width_ratio[0] - scale) < 4.5 * result.width_error[0]
    wrong = max(abs(result.shift[0]) / result.shift_error[0], abs(result.width_ratio[0] - 1) / result.width_error[0])
    assert wrong > 6


def test_compare_moments_with_effective_sizes():
    a, b = normal(400, 2, 0), normal(400, 2, 1)
    independent, correlated = compare_moments(a, b, "ab"), compare_moments(a, b, "ab", ess_a=100, ess_b=100)
    np.testing.assert_allclose(correlated.shift_error, 2 * independent.shift_error)
    np.testing.assert_allclose(correlated.width_error, 2 * independent.width_error)


def test_figure_of_merit():
    n = 20_000
    draws, cov = correlated(n, 1)
    merits = figure_of_merit(draws, ("a", "b", "c"))
    assert list(merits) == [("a", "b"), ("a", "c"), ("b", "c")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        exact = 1 / np.sqrt(np.linalg.det(cov[np.ix_([i, j], [i, j])]))
        # The logarithm of a sample covariance's determinant has variance 2 p / n.
        assert abs(merits["abc"[i], "abc"[j]] / exact - 1) < 4.5 / np.sqrt(n)
    halved = figure_of_merit(draws / 2, ("a", "b", "c"), [("c", "a")])
    np.testing.assert_allclose(halved["c", "a"], 4 * merits["a", "c"])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda d: figure_of_merit(d, ("omega_c", "sigma_8"), [("omega_c", "sigma8")]), "'sigma8'.*mean 'sigma_8'"),
        (lambda d: figure_of_merit(np.repeat(d[:, :1], 2, 1), "ab"), r"vary independently; got \('a', 'b'\)"),
        (lambda d: moments(d, ("a",)), r"2 different names, .* got \['a'\]"),
        (lambda d: moments(d[:1], "ab"), r"shape \(n >= 2, p >= 1\); got \(1, 2\)"),
        (lambda d: compare_moments(d, 0 * d, "ab"), "samples_b that vary; got constant a"),
    ],
)
def test_moment_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(50, 2, 0))


# --- coverage ----------------------------------------------------------------------------------------------------


def calibration(scale=1.0, shift=0.0, n=500, m=99, p=2):
    """theta ~ N(0, 1), x = theta + N(0, 1): the posterior N(x/2, 1/2), with its width and mean tampered with."""
    rng = np.random.default_rng(0)
    truths = rng.normal(size=(n, p))
    x = truths + rng.normal(size=(n, p))
    deviation = scale * np.sqrt(0.5)
    mean = x / 2 + shift * np.sqrt(0.5)
    samples = mean[:, None] + deviation * rng.normal(size=(n, m, p))
    density = lambda t: norm.logpdf(t, mean if t.ndim == 2 else mean[:, None], deviation).sum(-1)  # noqa: E731
    return samples, truths, x, density


def p_values(scale=1.0, shift=0.0):
    samples, truths, x, density = calibration(scale, shift)
    return {
        "sbc": sbc_test(sbc_ranks(samples, truths), 99).min(),
        "expected coverage": expected_coverage(density(truths), density(samples)).p_value,
        "tarp": tarp(samples, truths).p_value,
        "tarp, own points": tarp(samples, truths, references=x + 1.0).p_value,
    }


def test_right_posteriors_pass():
    assert min(p_values().values()) > 1e-3
    samples, truths, x, density = calibration()
    balls = (tarp(samples, truths), tarp(samples, truths, references="box"))
    for result in (expected_coverage(density(truths), density(samples)), *balls):
        assert (np.abs(result.coverage - result.levels) < 4.5 * result.error).all()
        np.testing.assert_allclose(result.error, np.sqrt(result.levels * (1 - result.levels) / 500))


@pytest.mark.parametrize(
    "scale, shift, caught",
    [
        (0.6, 0.0, ("sbc", "expected coverage", "tarp", "tarp, own points")),
        (1.6, 0.0, ("sbc", "expected coverage", "tarp", "tarp, own points")),
        (1.0, 0.5, ("sbc", "expected coverage", "tarp", "tarp, own points")),
        (1.0, -0.5, ("sbc", "tarp", "tarp, own points")),
        (1.0, 0.3, ("tarp", "tarp, own points")),
    ],
    ids=["narrow", "wide", "shifted", "shifted back", "shifted a little"],
)
def test_wrong_posteriors_are_caught(scale, shift, caught):
    found = p_values(scale, shift)
    assert all(found[name] < 1e-4 for name in caught), found


def test_coverage_has_the_right_sign():
    for scale, sign in ((0.6, -1), (1.6, 1)):
        samples, truths, _, density = calibration(scale)
        result = expected_coverage(density(truths), density(samples), levels=[0.5, 0.8])
        assert (sign * (result.coverage - result.levels) > 4 * result.error).all()
        # Exact: a right posterior's region of squared radius r has level 1 - exp(-r / 2) in two dimensions.
        exact = 1 - (1 - result.levels) ** (scale**2)
        assert (np.abs(result.coverage - exact) < 4.5 * np.sqrt(exact * (1 - exact) / 500)).all()


def test_ranks_are_uniform_even_when_all_draws_are_tied():
    ranks = sbc_ranks(np.zeros((2000, 9, 1)), np.zeros((2000, 1)))
    counts = np.bincount(ranks[:, 0], minlength=10)
    assert np.sum((counts - 200) ** 2 / 200) < 9 + 5 * np.sqrt(18)


def test_p_values_are_uniform_for_right_posteriors():
    rng = np.random.default_rng(3)
    truths, samples = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 19, 1))
    found = [sbc_test(sbc_ranks(samples[i : i + 100], truths[i : i + 100]), 19)[0] for i in range(0, 4000, 100)]
    assert 0.5 - 4.5 / np.sqrt(12 * 40) < np.mean(found) < 0.5 + 4.5 / np.sqrt(12 * 40)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sbc_ranks(np.ones((4, 5, 2)), np.ones((4, 3))), r"got \(4, 5, 2\) and \(4, 3\)"),
        (lambda: sbc_test(np.full((4, 1), 12), 10), "between 0 and 10"),
        (lambda: tarp(np.ones((4, 5, 2)), np.ones((4, 2))), "vary in every parameter"),
        (lambda: tarp(normal(40, 2, 0).reshape(4, 10, 2), normal(4, 2, 1), references=np.ones(2)), r"got \(2,\)"),
        (lambda: tarp(normal(4, 2, 0).reshape(4, 1, 2), normal(4, 2, 1)), "at least 2 draws .* got 1"),
        (lambda: tarp(normal(40, 2, 0).reshape(4, 10, 2), normal(4, 2, 1), references="boxes"), "Did you mean 'box'"),
        (lambda: expected_coverage(np.zeros(4), np.zeros((3, 9))), r"got \(4,\) and \(3, 9\)"),
        (lambda: expected_coverage(np.full(4, np.nan), np.zeros((4, 9))), "got NaN"),
        (lambda: expected_coverage(np.zeros(4), np.zeros((4, 9)), levels=[1.5]), r"levels in \(0, 1\); got \[1.5\]"),
    ],
)
def test_coverage_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
