"""A log-likelihood near its peak from noisy gradients: Bayesian regression on a polynomial."""

import functools
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from diffsbi._types import Array, Float

FREEDOM = 4.0
"""Of the Student t that the noise of a gradient is taken to follow; its first guess counts for as many gradients."""

SHIFT, CURVATURE, SKEW = 20.0, 4.0, 0.1
"""Prior standard deviations of a polynomial's terms, where the posterior's widths are about one."""

REACH = 3.0
"""Where terms of third degree begin to be damped."""

LEAST_NOISE = 1e-6
ITERATIONS = 30


class Surface(NamedTuple):
    r"""$\ell(v) = \sum_k c_k \phi_k(v)$, without a constant; $\phi$ are `features`.

    Attributes:
        terms: The factors of each monomial, `(m, degree)`: numbers of parameters, and p for a factor of one.
        coefficients: c, `(m,)`.
        covariance: Of c, `(m, m)`.
        noise: Covariance of a gradient's noise, `(p, p)`.
        weights: Of the gradients, `(n,)`: `counts`, and less for those far from the surface.
    """

    terms: np.ndarray
    coefficients: np.ndarray
    covariance: np.ndarray
    noise: np.ndarray
    weights: np.ndarray

    def __call__(self, v: Float[Array, "n p"]) -> np.ndarray:
        """Its value at rows of v, `(n,)`."""
        return features(v, self.terms) @ self.coefficients

    def quadratic(self) -> tuple[np.ndarray, np.ndarray]:
        """Slope `(p,)` and curvature, minus the second derivatives, `(p, p)` at v = 0."""
        dim = len(self.noise)
        slope, curvature = np.zeros(dim), np.zeros((dim, dim))
        for term, c in zip(self.terms, self.coefficients, strict=True):
            i, *more = term[term < dim]
            if not more:
                slope[i] = c
            elif len(more) == 1:
                curvature[i, more[0]] -= c
                curvature[more[0], i] -= c
        return slope, curvature

    def with_curvature(self, curvature: np.ndarray) -> "Surface":
        """The same with another curvature at v = 0."""
        quadratic = _degree(self.terms, len(self.noise)) == 2
        coefficients = np.where(quadratic, _of_curvature(self.terms, curvature), self.coefficients)
        return self._replace(coefficients=coefficients)


def terms_to(degree: int, dim: int) -> np.ndarray:
    """The factors of all monomials of degree 1 to `degree`."""
    chosen = (c for d in range(1, degree + 1) for c in combinations_with_replacement(range(dim), d))
    return np.array([(*c, *[dim] * (degree - len(c))) for c in chosen])


def features(v: Float[Array, "n p"], terms: np.ndarray) -> np.ndarray:
    """Monomials of first and second degree; those of the third over $1 + |v|^2 / r^2$, r = `REACH`; `(n, m)`.

    These grow linearly far out, where the quadratic terms therefore prevail: gradients near the peak do not tell what a
    cubic would do there, and must not give a density that cannot be normalised.
    """
    return _monomials(v, terms) / _damping(v, terms)


def slopes(v: Float[Array, "n p"], terms: np.ndarray) -> np.ndarray:
    """Gradients of the features, `(n, p, m)`."""
    values, damping, cubic = _monomials(v, terms), _damping(v, terms), _degree(terms, v.shape[1]) > 2
    out = []
    for a in range(v.shape[1]):
        of_monomial = np.zeros_like(values)
        for factor in range(terms.shape[1]):  # the product rule
            without = terms.copy()
            without[:, factor] = v.shape[1]
            of_monomial += (terms[:, factor] == a) * _monomials(v, without)
        out.append(of_monomial / damping - values * cubic * (2 * v[:, [a]] / REACH**2) / damping**2)
    return np.stack(out, 1)


def _monomials(v, terms: np.ndarray) -> np.ndarray:
    padded = np.c_[np.asarray(v, float), np.ones(len(v))]
    return functools.reduce(np.multiply, (padded[:, column] for column in terms.T))


def _degree(terms: np.ndarray, dim: int) -> np.ndarray:
    return (terms < dim).sum(1)


def _of_curvature(terms: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    r"""Coefficients of $-\frac12 v^T F v$, F the `curvature`: zero but for terms of second degree."""
    dim, (i, j) = len(curvature), terms[:, :2].T
    of_pair = -np.pad(curvature, (0, 1))[i, j] * np.where(i == j, 0.5, 1.0)
    return np.where(_degree(terms, dim) == 2, of_pair, 0.0)


def _damping(v, terms: np.ndarray) -> np.ndarray:
    return np.where(_degree(terms, v.shape[1]) > 2, 1 + (np.asarray(v) ** 2).sum(1, keepdims=True) / REACH**2, 1.0)


def fit_surface(
    v: Float[Array, "n p"],
    gradients: Float[Array, "n p"],
    curvature: Float[Array, "p p"],
    degree: int = 2,
    counts: Float[Array, " n"] | None = None,
) -> Surface:
    r"""Regress gradients $g_i = \nabla\ell(v_i) + \epsilon_i$ on those of a polynomial.

    The noise is a Student t whose scale matrix is learned, by iterated weights: a gradient from a chain that has not
    come to where it belongs, or from where no polynomial holds, counts little. Terms of first and second degree have
    wide normal priors (`SHIFT`, and `CURVATURE` about $-\frac12 v^T F v$); the width of the prior of third-degree
    terms starts at `SKEW` and is learned with them (empirical Bayes; MacKay 1992, Neural Comput. 4, 415), so that
    they stay at zero until there are gradients enough to tell them.

    Args:
        v: Where the gradients are taken, in coordinates in which the posterior's widths are about one.
        gradients: g, in the same coordinates.
        curvature: F, a first guess of $-\nabla\nabla\ell$.
        degree: Of the polynomial, 2 or 3.
        counts: How much each gradient counts, with mean one; equally by default.

    Raises:
        ValueError: Another degree, or fewer than three gradients.
    """
    if degree not in (2, 3):
        raise ValueError(f"Expected degree 2 or 3; got {degree}.")
    n, dim = v.shape
    if n < 3:
        raise ValueError(f"Expected at least three gradients; got {n}.")
    terms = terms_to(degree, dim)
    order, design = _degree(terms, v.shape[1]), slopes(v, terms)
    mean = _of_curvature(terms, curvature)
    width = np.select([order == 1, order == 2], [SHIFT, CURVATURE], SKEW)
    times = np.ones(n) if counts is None else np.asarray(counts, float)
    noise, weights = np.eye(dim), times
    for _ in range(ITERATIONS):
        root = np.linalg.cholesky(np.linalg.inv(noise))
        scale = np.sqrt(weights)[:, None]
        rows = (np.einsum("pq,npm->nqm", root, design) * scale[..., None]).reshape(n * dim, -1)
        information = rows.T @ rows
        covariance = np.linalg.inv(information + np.diag(width**-2))
        coefficients = covariance @ (rows.T @ ((gradients @ root) * scale).ravel() + mean / width**2)
        residual = gradients - design @ coefficients
        used = np.trace(covariance @ information) / dim
        spread = (residual * weights[:, None]).T @ residual + FREEDOM * np.eye(dim) * min(1.0, np.abs(residual).max())
        noise = spread / max(n - used + FREEDOM, FREEDOM) + LEAST_NOISE * np.eye(dim)
        distance = np.einsum("ni,ij,nj->n", residual, np.linalg.inv(noise), residual)
        weights = times * (FREEDOM + dim) / (FREEDOM + distance)
        if degree == 3:
            width[order == 3] = np.sqrt((coefficients**2 + np.diag(covariance))[order == 3].mean())
    return Surface(terms, coefficients, covariance, noise, weights)
