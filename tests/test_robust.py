"""Centre and spread that outliers do not move."""

import numpy as np
from scipy.stats import median_abs_deviation

from diffsbi._robust import median_and_spread


def test_the_spread_is_a_normals_standard_deviation_whatever_one_row_in_a_hundred():
    n, sigma = 40_000, np.array([0.1, 30.0])
    x = np.random.default_rng(0).normal([2.0, -5.0], sigma, (n, 2))
    centre, spread = median_and_spread(x)
    # Standard errors, in units of sigma: 1.25 / sqrt(n) of a median, 1.17 / sqrt(n) of the spread.
    np.testing.assert_array_less(np.abs(centre - [2.0, -5.0]) / sigma, 4 * 1.25 / np.sqrt(n))
    np.testing.assert_array_less(np.abs(spread / sigma - 1), 4 * 1.17 / np.sqrt(n))
    np.testing.assert_allclose(spread, median_abs_deviation(x, axis=0, scale="normal"), rtol=1e-5)
    x[::100] = 1e6
    moved, wider = median_and_spread(x)
    np.testing.assert_array_less(np.abs(moved - centre) / sigma, 0.03)
    np.testing.assert_allclose(wider, spread, rtol=0.03)


def test_columns_of_which_half_is_the_same_have_no_spread():
    assert median_and_spread(np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [7.0, 3.0]]))[1][0] == 0
