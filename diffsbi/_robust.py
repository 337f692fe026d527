"""Centre and spread of columns that outliers do not move."""

import numpy as np

from diffsbi._types import Float

_OF_NORMAL = 1.4826
"""Standard deviation of a normal over its median absolute deviation."""


def median_and_spread(x: Float[np.ndarray, "n d"]) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
    """Median and 1.4826 × median absolute deviation of each column: a normal's mean and standard deviation.

    The spread is zero where half of the rows are the same.
    """
    x = np.asarray(x)
    centre = np.median(x, axis=0)
    return centre, _OF_NORMAL * np.median(np.abs(x - centre), axis=0)
