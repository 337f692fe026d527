r"""Losses of trained compressions: each a callable of (compressor, head, batch), the mean over the batch's rows.

A batch has `v (n, p)`, standardised parameters, `x` with a leading n, what the compressor takes (in a fit the features
of its network, computed before), and, where there are scores, `score (n, p)` = $\nabla_v \log p(v, z | x)$, noisy but
unbiased, and `use (n,)` (0: its score is left out). The compressor gives features c(x) and t(x);
$e = L^{-1}(v - t)$ is what t leaves, in units of what the linear start left.
"""

import abc
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, Key
from diffsbi.flows import FLOWS
from diffsbi.inference.losses import MeasuredScore, ScoredDensity, first_noise, noise_level, zero_at_first


class AbstractLoss(eqx.Module):
    """`head` makes what is trained beside the compressor, and is dropped after; None where there is nothing."""

    def head(self, key: Key, n_features: int, batch: dict[str, Array]) -> Any:
        """Untrained; `batch` has all training rows, and `e` (and `score_of_e`) of the linear start."""
        return None

    def constants(self, head: Any) -> tuple[Array, ...]:
        """What of the head is not trained."""
        return ()

    @abc.abstractmethod
    def __call__(self, compressor, head, batch: dict[str, Any]) -> Array:
        """Mean over the rows."""


class MeanSquared(AbstractLoss):
    r"""$\langle |v - t|^2 \rangle$: t is the posterior mean."""

    def __call__(self, compressor, head, batch):
        _, t = jax.vmap(compressor.features_and_summary)(batch["x"])
        return jnp.mean(jnp.sum((batch["v"] - t) ** 2, -1))


class MeanAbsolute(AbstractLoss):
    r"""$\langle \sum_a |v_a - t_a| \rangle$: t is the posterior median."""

    def __call__(self, compressor, head, batch):
        _, t = jax.vmap(compressor.features_and_summary)(batch["x"])
        return jnp.mean(jnp.sum(jnp.abs(batch["v"] - t), -1))


class _Precision(eqx.Module):
    r"""Features → M(c), lower triangular with a positive diagonal: $M M^T$ is the precision of e. M = 1 at first."""

    network: eqx.nn.MLP
    dim: int = eqx.field(static=True)

    def __init__(self, key: Key, n_features: int, dim: int):
        network = eqx.nn.MLP(n_features, dim * (dim + 1) // 2, 64, 1, activation=jax.nn.silu, key=key)
        self.network, self.dim = zero_at_first(network), dim

    def __call__(self, c: Float[Array, " f"]) -> tuple[Float[Array, "p p"], Array]:
        """(M, log det M)."""
        out = self.network(c)
        log_diagonal = 3 * jnp.tanh(out[: self.dim] / 3)
        rows, columns = jnp.tril_indices(self.dim, -1)
        m = jnp.diag(jnp.exp(log_diagonal)).at[rows, columns].set(out[self.dim :])
        return m, jnp.sum(log_diagonal)


class GaussianNLL(AbstractLoss):
    r"""$\langle -\log\mathcal N(v; t(x), \Sigma(x)) \rangle$, the covariance full and from the features."""

    def head(self, key, n_features, batch):
        return _Precision(key, n_features, batch["v"].shape[1])

    def __call__(self, compressor, head, batch):
        def one(x, v):
            c, t = compressor.features_and_summary(x)
            m, log_det = head(c)
            e = compressor.residual(v, t)
            return 0.5 * jnp.sum((m.T @ e) ** 2) - log_det

        return jnp.mean(jax.vmap(one)(batch["x"], batch["v"])) + _normal_constant(batch["v"].shape[1])


class ScoreRegression(AbstractLoss):
    r"""$\langle |s - \nabla_v \log q(v | x)|^2_W \rangle$ with q normal, mean t(x) and precision from the features.

    The score at the simulation's own parameters is regressed on the data alone: of all functions the marginal
    posterior's score is the nearest, $-P(x) (v - t(x))$ where that is normal. It uses no likelihood of v: with exact
    scores every row gives its t(x) exactly, with noisy ones the error is the score's noise over its information (after
    Brehmer et al. 2020, arXiv:1805.12244, there at one fixed theta). W: the inverse variance of s at the linear start.
    """

    def head(self, key, n_features, batch):
        _need_scores(batch)
        return _Precision(key, n_features, batch["v"].shape[1]), _spread(batch)

    def constants(self, head):
        return head[1:]

    def __call__(self, compressor, head, batch):
        precision, spread = head

        def one(x, v, score):
            c, t = compressor.features_and_summary(x)
            m, _ = precision(c)
            of_density = -m @ (m.T @ compressor.residual(v, t))
            return jnp.sum(((compressor.score_of_residual(score) - of_density) / spread) ** 2)

        return jnp.mean(batch["use"] * jax.vmap(one)(batch["x"], batch["v"], batch["score"]))


class LocalScoreRegression(AbstractLoss):
    r"""$\langle |v - t|^2 \rangle$ over simulations at one $\theta_0$, where v is their score, standardised.

    t is the marginal score at $\theta_0$, $E[\nabla_\theta\log p(x, z|\theta_0) | x]$ (SALLY, Brehmer et al. 2020,
    arXiv:1805.12244): locally sufficient, wherever the simulations all are.
    """

    def __call__(self, compressor, head, batch):
        _, t = jax.vmap(compressor.features_and_summary)(batch["x"])
        return jnp.mean(batch["use"] * jnp.sum((batch["v"] - t) ** 2, -1))


class VMIM(AbstractLoss):
    r"""Variational mutual information: $\langle -\log q(v | t(x)) \rangle$, q a flow that is trained with t.

    At its minimum I(t; theta) is as large as the compressor can make it (Jeffrey, Alsing & Lanusse 2021,
    arXiv:2009.08459). Where there are scores they are an observation of $\nabla_v \log q$ beside v, weighed by their
    measured noise (`inference.losses.MeasuredScore`).

    Args:
        density: Name in `diffsbi.flows.FLOWS`; smooth for scores.
        scores: Use scores where there are any.
    """

    density: str = eqx.field(static=True, default="smooth")
    scores: bool = eqx.field(static=True, default=True)

    def head(self, key, n_features, batch):
        dim = batch["v"].shape[1]
        key_density, key_level = jax.random.split(key)
        density = FLOWS[self.density](key_density, dim, dim)
        if not (self.scores and "score" in batch):
            return ScoredDensity(density)
        noise = first_noise((batch["score_of_e"] + batch["e"])[batch["use"] > 0])
        return ScoredDensity(density, noise, noise_level(key_level, dim, dim))

    def __call__(self, compressor, head, batch):
        _, t = jax.vmap(compressor.features_and_summary)(batch["x"])
        e = jax.vmap(compressor.residual)(batch["v"], t)
        if head.noise is None:
            return -jnp.mean(head.density.log_prob(e, t))
        rows = {"v": e, "c": t, "score": jax.vmap(compressor.score_of_residual)(batch["score"]), "use": batch["use"]}
        nothing = jax.tree.map(lambda _: None, head)
        return MeasuredScore()(head, nothing, rows, None)


LOSSES: dict[str, AbstractLoss] = {
    "mse": MeanSquared(),
    "mae": MeanAbsolute(),
    "gnll": GaussianNLL(),
    "vmim": VMIM(),
    "score": ScoreRegression(),
}
"""By name; "imnn" is a loss of a whole set of simulations at one theta and stands apart (`imnn`)."""


def _normal_constant(dim: int) -> float:
    return 0.5 * dim * math.log(2 * math.pi)


def _spread(batch) -> Float[Array, " p"]:
    """Standard deviation of the scores in e about those of a standard normal, without outliers."""
    residual = jnp.abs(batch["score_of_e"] + batch["e"])
    return 1.4826 * jnp.median(residual, axis=0)


def _need_scores(batch) -> None:
    if "score" not in batch:
        raise ValueError("Expected scores for score regression; got none. Give score=..., or another loss.")
