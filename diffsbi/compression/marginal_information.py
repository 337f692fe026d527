r"""The Fisher information of the data themselves, latents integrated out, from scores: what no summary can exceed."""

import functools
import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, Key, check_key
from diffsbi.compression.information import jackknife_error, log_det
from diffsbi.compression.latent_scores import chain_rule, checked_point, setup_and_jacobian
from diffsbi.simulators.averaging import LOW_ACCEPTANCE, best_steps, evaluator, quarter_turn, unevaluated
from diffsbi.simulators.base import AbstractSimulator

BLOCK = 50
JACKKNIFE = 20
PILOT = 16
TOO_FAR = 4.0  # standard errors between short and long lags


class MarginalInformation(NamedTuple):
    r"""$F = E[\nabla_\theta \log p(x|\theta)\, \nabla_\theta \log p(x|\theta)^T]$ at one theta.

    Attributes:
        fisher: F, `(p, p)`.
        error: Standard error of its elements, `(p, p)`.
        log_det: ln det F; minus infinity where the estimate is not positive.
        log_det_error: Its standard error.
        lags: Mean products of joint scores by their distance along the chain, `(n_average, p, p)`: at lag 0 F and the
            whole noise of a joint score, and F where the chain has forgotten.
        acceptance: Of the chains.
        gradients: For each simulation.
        without: F without each of 20 blocks of the simulations, `(20, p, p)`: `jackknife_error` of anything made of F.
    """

    fisher: np.ndarray
    error: np.ndarray
    log_det: float
    log_det_error: float
    lags: np.ndarray
    acceptance: float
    gradients: int
    without: np.ndarray


def marginal_information(
    sim: AbstractSimulator,
    key: Key,
    theta0: Float[Array, " p"] | None = None,
    *,
    n: int = 1000,
    n_average: int = 16,
    gap: int = 4,
    n_steps: int | None = None,
    latents: str | None = None,
    progress: bool = False,
) -> MarginalInformation:
    r"""Fisher matrix of x about theta at `theta0`, all latents integrated out, for any differentiable simulator.

    A chain on $z | x, \theta_0$ that starts at the simulation's own latents is in equilibrium from the first state, so
    that each of its joint scores $s_i$ has the marginal score as its mean given x (Fisher's identity). Two of them far
    apart are independent given x, and $E[s_i s_j^T] = F$ whatever their noise; with $|i - j| \ge$ `gap` all pairs are
    averaged. Closer ones have common noise and are left out.

    Its relative error is that of a covariance from n draws, $\sqrt{2 / n}$ for each diagonal element, and more where
    the noise of $s_i$ is large: then take more `n_average`, or other `latents`.

    Args:
        sim: Any simulator of the protocol.
        key: A typed JAX key.
        theta0: Where; the fiducial unless given.
        n: Simulations.
        n_average: States of the chain of each, its start included.
        gap: Quarter turns after which the latents are forgotten; too few make F too large, of which a warning tells if
            the products of longer lags disagree.
        n_steps: Steps of a turn; by default those with the most acceptance per gradient.
        latents: Latent coordinate; by default "whitened" where the simulator offers it, else "white".
        progress: Show a progress bar.

    Raises:
        ValueError: Fewer simulations than 20 or p + 2, a gap that leaves no pairs, `theta0` of another shape or outside
            the prior, an unknown coordinate.
        RuntimeError: Scores that are not finite.
    """
    latents = sim.best_latents(latents)
    theta0 = checked_point(sim, theta0)
    least = max(JACKKNIFE, sim.prior.dim + 2)
    if n < least or not 1 <= gap < n_average or (n_steps is not None and n_steps < 1):
        raise ValueError(
            f"Expected n >= {least}, 1 <= gap < n_average and n_steps >= 1; "
            f"got n={n}, gap={gap}, n_average={n_average}, n_steps={n_steps}."
        )
    run = functools.partial(_scores, sim, setup_and_jacobian(sim, theta0), latents=latents)
    key_pilot, key = jax.random.split(check_key(key))
    if n_steps is None:
        pilot = jnp.arange(PILOT)
        n_steps = best_steps(lambda k: float(np.mean(run(key_pilot, pilot, jnp.asarray(k), n_average=2)[1])))
    scores, accepted = [], []
    with tqdm(total=n, disable=not progress, desc="information", unit="sim") as bar:
        for first in range(0, n, BLOCK):
            rows = jnp.minimum(jnp.arange(first, first + BLOCK), n - 1)  # the last block is as long as the others
            found, acceptance = run(key, rows, jnp.asarray(n_steps), n_average=n_average)
            scores.append(np.asarray(found, float))
            accepted.append(np.asarray(acceptance, float))
            bar.update(min(BLOCK, n - first))
    s, acceptance = np.concatenate(scores)[:n], float(np.concatenate(accepted)[:n].mean())
    bad = ~np.isfinite(s).all((1, 2))
    if bad.any():
        raise RuntimeError(f"The score is not finite in {bad.sum()} of {n} simulations, first in row {bad.argmax()}.")
    if acceptance < LOW_ACCEPTANCE:
        warnings.warn(
            f"The chains of latents accepted {acceptance:.0%} of their turns and forget slowly: try more than "
            f"n_steps={n_steps}, other latents than {latents!r}, or a larger gap.",
            stacklevel=2,
        )
    return _from_scores(s, gap, acceptance, 2 * n_steps * (n_average - 1) + 1)


def _from_scores(s: np.ndarray, gap: int, acceptance: float, gradients: int) -> MarginalInformation:
    """The information from scores `(n, n_average, p)` along chains."""
    n_average = s.shape[1]
    blocks = [s[k::JACKKNIFE] for k in range(JACKKNIFE)]
    lags = np.stack([_lags(block) for block in blocks])  # (blocks, lag, p, p)
    sizes = np.array([len(block) for block in blocks], float)
    pairs = np.arange(n_average, 0, -1.0)

    def over(chosen: slice) -> tuple[np.ndarray, np.ndarray]:
        """The mean over lags and simulations, and that without each block."""
        of_block = np.average(lags[:, chosen], axis=1, weights=pairs[chosen])
        total = np.tensordot(sizes, of_block, 1)
        without = (total - sizes[:, None, None] * of_block) / (sizes.sum() - sizes)[:, None, None]
        return total / sizes.sum(), without

    fisher, without = over(slice(gap, None))
    log_dets = np.array([log_det(a) for a in without])
    if 2 * gap < n_average:
        (near, near_without), (far, far_without) = over(slice(gap, 2 * gap)), over(slice(2 * gap, None))
        scale = np.sqrt(np.outer(np.diag(fisher), np.diag(fisher)))
        difference = np.trace((near - far) / scale)
        spread = jackknife_error(np.trace((near_without - far_without) / scale, axis1=1, axis2=2))
        if abs(difference) > TOO_FAR * spread:
            warnings.warn(
                f"Scores {gap} to {2 * gap - 1} turns apart have products {difference / len(fisher):+.0%} from those "
                f"further apart, {abs(difference) / spread:.0f} standard errors: raise gap and n_average.",
                stacklevel=3,
            )
    return MarginalInformation(
        fisher, jackknife_error(without), log_det(fisher), float(jackknife_error(log_dets)),
        np.average(lags, axis=0, weights=sizes), acceptance, gradients, without,
    )  # fmt: skip


def _lags(s: np.ndarray) -> np.ndarray:
    """Mean of the symmetric products of scores at each lag, `(n_average, p, p)`."""
    n, n_average, _ = s.shape
    products = []
    for lag in range(n_average):
        mean = np.einsum("nka,nkb->ab", s[:, : n_average - lag], s[:, lag:]) / (n * (n_average - lag))
        products.append((mean + mean.T) / 2)
    return np.stack(products)


@eqx.filter_jit
def _scores(sim, at, key, rows, n_steps, *, latents: str, n_average: int):
    """Joint scores along the chain of each row's simulation, `(rows, n_average, p)`, and its acceptance."""
    setup, jacobian = at
    transport = sim.transport(latents)

    def one(row):
        key_z, key_x, key_chain = jax.random.split(jax.random.fold_in(key, row), 3)
        z = sim.latents(setup).sample(key_z)
        x = sim.likelihood(setup, z).sample(key_x)
        evaluate = functools.partial(evaluator(sim, x, latents), setup)

        def turn(state, k):  # -1 evaluates the state where it is
            key_turn = jax.random.fold_in(key_chain, k)
            after, _, acceptance = quarter_turn(evaluate, state, key_turn, n_steps, still=k < 0)
            return after, (chain_rule(after.slope_of_setup, jacobian), acceptance)

        start = unevaluated(evaluate, transport.from_latents(setup, z, x)[0])
        _, (scores, acceptance) = jax.lax.scan(turn, start, jnp.arange(-1, n_average - 1))
        return scores, jnp.mean(acceptance[1:])

    return jax.lax.map(one, rows)
