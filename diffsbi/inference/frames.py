r"""A normal approximation of each data set's own posterior, and the coordinates in which it is a standard normal."""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from scipy.special import multigammaln

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, Key
from diffsbi.inference.proposals import GaussianProposal
from diffsbi.inference.standardise import Standardiser, fit_standardiser
from diffsbi.prior import Prior

REACH = 5.0
"""Widths beyond which residuals are counted in logarithms: an approximation at a wrong mode must not decide a fit."""

PSEUDO_ROWS = np.geomspace(10.0, 1000.0, 25)
"""Numbers of simulations that the frames may be believed for before any is seen."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
UNIT = float(_WEIGHTS @ (REACH * np.arcsinh(_NODES / REACH)) ** 2 / np.sqrt(2 * np.pi))
"""Variance of w where r is a standard normal: .96."""

PSEUDO_DRAWS = 256
"""Rows that stand for the pseudo-simulations while a density is trained, each by its part of their number."""

MOST_WIDENED = 2.0
"""Times as wide as it was that a normal becomes at most under a proposal (in places wider than the prior)."""

_ROWS = 20_000  # of each set of parameters, for its moments

FARTHEST = 4.0
"""Standard deviations that no column of the condition is farther out than."""


def frame_width(dim: int) -> int:
    """Numbers that describe a normal of `dim` dimensions: 2, 5, 9, 14 for 1 to 4."""
    return dim + dim * (dim + 1) // 2


def pack_frame(mean: Float[Array, "*n p"], root: Float[Array, "*n p p"]) -> Float[Array, "*n k"]:
    r"""Numbers of the normal $N(m, L L^T)$: m, then $\log L_{ii}$, then $L_{ij}/L_{ii}$ (i > j, row by row).

    Args:
        mean: m, in the prior's unconstrained space.
        root: L, the lower Cholesky factor of the covariance there, with a positive diagonal.

    Raises:
        ValueError: Shapes that do not belong together, or a root that is not lower triangular of positive diagonal.
    """
    if root.shape != (*mean.shape, mean.shape[-1]):
        raise ValueError(f"Expected root with shape {(*mean.shape, mean.shape[-1])}; got {root.shape}.")
    diagonal = jnp.diagonal(root, axis1=-2, axis2=-1)
    if not isinstance(root, jax.core.Tracer):
        given = np.asarray(root)  # known, though what is made of it may be traced
        bad = np.any(np.triu(given, 1) != 0, (-2, -1)) | np.any(np.diagonal(given, axis1=-2, axis2=-1) <= 0, -1)
        if np.any(bad):
            example = given[bad][0].tolist()
            raise ValueError(
                f"Expected lower triangular roots with a positive diagonal; {bad.sum()} are not: {example}."
            )
    i, j = np.tril_indices(mean.shape[-1], -1)
    return jnp.concatenate([mean, jnp.log(diagonal), root[..., i, j] / diagonal[..., i]], -1)


class LocalFrame(eqx.Module):
    r"""$u = m(x) + L(x) r$, $r_i = 5 \sinh(w_i / 5)$, with m and L in the first columns of x (`pack_frame`).

    Where the posterior of every x is near the normal $N(m(x), L(x) L(x)^T)$ in the prior's unconstrained space, w is
    near a standard normal for all x, however much posteriors move and change their widths over the prior.

    Under a proposal in place of the prior posteriors are others: with a `tilt` $(\Delta, \delta)$ the normal in use is
    that of precision $(LL^T)^{-1} + \Delta$ and of that times its mean $(LL^T)^{-1} m + \delta$ (`tilt_to`), but for
    directions in which that would be more than twice as wide.

    Attributes:
        dim: Number of parameters p.
        reach: The 5 above.
        tilt: As above; None for the normals as x has them.
    """

    dim: int = eqx.field(static=True)
    reach: float = eqx.field(static=True, default=REACH)
    tilt: tuple[Float[Array, "p p"], Float[Array, " p"]] | None = None

    def unpack(self, x: Float[Array, "*n d"]) -> tuple[Float[Array, "*n p"], Float[Array, "*n p p"]]:
        """(m, L) of rows of x."""
        p = self.dim
        i, j = np.tril_indices(p, -1)
        unit = jnp.broadcast_to(jnp.eye(p, dtype=x.dtype), (*x.shape[:-1], p, p))
        unit = unit.at[..., i, j].set(x[..., 2 * p : frame_width(p)])
        return x[..., :p], jnp.exp(x[..., p : 2 * p])[..., None] * unit

    def normal(self, x: Float[Array, "*n d"]) -> tuple[Float[Array, "*n p"], Float[Array, "*n p p"]]:
        """(m, L) of the normals in use."""
        mean, root = self.unpack(x)
        if self.tilt is None:
            return mean, root
        more, shift = (jnp.asarray(a, mean.dtype) for a in self.tilt)
        # In units of L, where the precision is M = 1 + L' Delta L: numbers of order one whatever the parameters' units.
        unit = jnp.broadcast_to(jnp.eye(self.dim, dtype=mean.dtype), root.shape)
        values, vectors = jnp.linalg.eigh(unit + jnp.einsum("...ji,jk,...kl->...il", root, more, root))
        values = jnp.maximum(values, 1 / MOST_WIDENED**2)
        covariance = jnp.einsum("...ij,...j,...kj->...ik", vectors, 1 / values, vectors)
        pull = jnp.broadcast_to(shift, mean.shape) - jnp.einsum("ij,...j->...i", more, mean)
        moved = mean + jnp.einsum("...ij,...jk,...lk,...l->...i", root, covariance, root, pull)
        return moved, root @ jnp.linalg.cholesky(covariance)

    def to_local(self, u: Float[Array, "*n p"], x: Float[Array, "*n d"]) -> tuple[Array, Float[Array, "*n"]]:
        r"""$(w, \log|\det \partial w/\partial u|)$; leading dimensions are the same."""
        mean, root = self.normal(x)
        r = solve_triangular(root, (u - mean)[..., None], lower=True)[..., 0]
        log_slope = -0.5 * jnp.log1p((r / self.reach) ** 2) - jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1))
        return self.reach * jnp.arcsinh(r / self.reach), jnp.sum(log_slope, -1)

    def from_local(self, w: Float[Array, "*n p"], x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """u(w, x)."""
        mean, root = self.normal(x)
        return mean + jnp.einsum("...ij,...j->...i", root, self.reach * jnp.sinh(w / self.reach))

    def score_to_local(self, score: Float[Array, "n p"], u: Float[Array, "n p"], x: Float[Array, "n d"]):
        r"""$\nabla_w \log p(w | x) = (\partial u/\partial w)^T \nabla_u \log p(u | x) + \nabla_w \log|\det|$."""

        def one(score, u, x):
            w, _ = self.to_local(u, x)
            _, pull_back = jax.vjp(lambda w: self.from_local(w, x), w)
            return pull_back(score)[0] + jnp.tanh(w / self.reach) / self.reach

        return jax.vmap(one)(score, u, x)

    def check(self, x_width: int) -> None:
        """Raise a ValueError where rows of so many numbers cannot begin with a frame."""
        if x_width < frame_width(self.dim):
            raise ValueError(
                f"Expected x that begins with a normal approximation (pack_frame), {frame_width(self.dim)} numbers for "
                f"{self.dim} parameters; got {x_width} columns. Without one: framed=False."
            )


def tilt_to(prior: Prior, parts: Sequence[tuple[Any, Any]]) -> tuple[Array, Array]:
    r"""`LocalFrame.tilt` from posteriors under the prior (0) to those under proposals (1).

    $(P_1 - P_0, P_1 m_1 - P_0 m_0)$ with their precisions P and means m in unconstrained space.

    Args:
        prior: The prior.
        parts: The proposal (None for the prior) and the parameters (n, p) of each set of simulations. Those of a
            proposal that is no `GaussianProposal` give its moments.
    """
    loc, scale = prior.unconstrained_spread()
    weights = np.array([len(theta) for _, theta in parts]) / sum(len(theta) for _, theta in parts)
    moments = [_moments(prior, *part) for part in parts]
    mean = weights @ np.stack([m for m, _ in moments])
    covariance = sum(w * (c + np.outer(m - mean, m - mean)) for w, (m, c) in zip(weights, moments, strict=True))
    before, after = np.diag(scale**-2.0), np.linalg.inv(covariance)
    more, shift = after - before, after @ mean - before @ loc
    return jnp.asarray(more, jnp.result_type(float)), jnp.asarray(shift, jnp.result_type(float))


def _moments(prior: Prior, proposal, theta) -> tuple[np.ndarray, np.ndarray]:
    if proposal is None:
        loc, scale = prior.unconstrained_spread()
        return loc, np.diag(scale**2)
    if isinstance(proposal, GaussianProposal):
        root = np.asarray(proposal.root, float)
        return np.asarray(proposal.loc, float), root @ root.T
    return prior.unconstrained_moments(np.asarray(theta[:_ROWS]))


def winsorised(u: np.ndarray, cut: float = 4.0) -> np.ndarray:
    """Rows `(n, p)` with each column held within `cut` robust standard deviations of its median."""
    u = np.asarray(u, float)
    centre, spread = median_and_spread(u)
    return np.clip(u, centre - cut * spread, centre + cut * spread)


def log_evidence(w, pseudo_rows: float) -> float:
    r"""$\log p(w)$ of rows of a normal whose mean and covariance are unknown but believed to be zero and one.

    As if `pseudo_rows` $= \kappa$ rows had said so: $\mu | \Sigma \sim N(0, \Sigma / \kappa)$ and $\Sigma$ of an
    inverse Wishart distribution with $\kappa + p + 1$ degrees of freedom and mean one (Gelman et al. 2013, Bayesian
    Data Analysis, section 3.6). Without the constant $-\frac{np}{2} \log \pi$.
    """
    n, p = np.shape(w)
    mean, freedom = np.mean(w, 0), pseudo_rows + p + 1
    both = pseudo_rows + n
    scatter = (w - mean).T @ (w - mean) + pseudo_rows * n / both * np.outer(mean, mean) + pseudo_rows * np.eye(p)
    return (
        multigammaln((freedom + n) / 2, p) - multigammaln(freedom / 2, p) + freedom / 2 * p * np.log(pseudo_rows)
        - (freedom + n) / 2 * np.linalg.slogdet(scatter)[1] + p / 2 * np.log(pseudo_rows / both)
    )  # fmt: skip


def pseudo_rows_for(w) -> float:
    """The `PSEUDO_ROWS` under which rows w are most probable."""
    return max(PSEUDO_ROWS, key=functools.partial(log_evidence, winsorised(w)))


def with_pseudo_rows(key: Key, rows: dict[str, Array], standardiser: Standardiser, pseudo_rows: float):
    r"""Standardised rows, and `PSEUDO_DRAWS` more that say that the frames are right, r a standard normal at any x.

    These count for `pseudo_rows` simulations, by "weight", and have no scores; each of the numbers of their x is one of
    the rows', independently of the others. Weights that the rows have are relative to each other; those of all have
    mean one.
    """
    n, total = len(rows["v"]), len(rows["v"]) + PSEUDO_DRAWS
    key_w, key_c, key_row = jax.random.split(key, 3)
    c = jnp.take_along_axis(rows["c"], jax.random.randint(key_c, (PSEUDO_DRAWS, rows["c"].shape[1]), 0, n), 0)
    r = jax.random.normal(key_w, (PSEUDO_DRAWS, rows["v"].shape[1]), rows["v"].dtype)
    w = REACH * jnp.arcsinh(r / REACH)
    more = {"v": standardiser.to_standard(w, c), "c": c}
    weight = (
        jnp.full(n, total / (n + pseudo_rows)),
        jnp.full(PSEUDO_DRAWS, total / (n + pseudo_rows) * pseudo_rows / PSEUDO_DRAWS),
    )
    own = rows.get("weight", jnp.ones(n, rows["v"].dtype))
    rows = rows | {"weight": weight[0] * own / jnp.mean(own)}
    more["weight"] = weight[1]
    if "score" in rows:
        like = jax.random.randint(key_row, (PSEUDO_DRAWS,), 0, n)
        more["score"] = rows["score"][like] + rows["v"][like] - more["v"]  # for the noise's first guess alone
        more["use"] = jnp.zeros(PSEUDO_DRAWS, rows["use"].dtype)
        rows = rows | {"use": weight[0] * rows["use"]}
    return {name: jnp.concatenate([value, more[name].astype(value.dtype)]) for name, value in rows.items()}


def fit_in_frames(w, x) -> Standardiser:
    r"""`fit_standardiser` of rows in local frames, which are believed where the rows agree with them.

    To the rows as many are added that say that the frames are right, r a standard normal, as makes the rows most
    probable (`PSEUDO_ROWS`, `log_evidence`): many where frames are good, few where they are not, so that no more is
    learned from few rows than they can tell. Single rows count for little (`winsorised`), and no data are farther out
    than `FARTHEST`.
    """
    held = winsorised(w)
    fitted = fit_standardiser(held, x, FARTHEST)
    share = len(held) / (len(held) + pseudo_rows_for(w))
    covariance = share * fitted.lower @ fitted.lower.T + (1 - share) * UNIT * jnp.eye(len(fitted.lower))
    new = share * fitted.u_loc, share * fitted.slope, jnp.linalg.cholesky(covariance.astype(fitted.lower.dtype))
    return eqx.tree_at(lambda s: (s.u_loc, s.slope, s.lower), fitted, new)
