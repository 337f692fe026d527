r"""The Gaussian-field likelihood of maps, latents integrated out: where to start, and how to scale theta."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.simulators.fields import fold, hartley, mode_weights
from diffsbi.simulators.lensing import LensingMaps


@eqx.filter_jit
def scoring_step(sim: LensingMaps, x: Float[Array, "bins n n"], theta: Float[Array, " 6"]):
    r"""Score and Fisher matrix of theta for a Gaussian field of the same spectra, all modes but k = 0.

    With $C = S(\theta) + \sigma^2$ per mode and X the observed second moments,
    $s_a = \frac12\sum\mathrm{tr}[C^{-1}C_a C^{-1}(X - C)]$ and $F_{ab} = \frac12\sum\mathrm{tr}[C^{-1}C_aC^{-1}C_b]$.

    Returns:
        (score (6,), Fisher (6, 6), log-likelihood up to a constant).
    """
    n, m = sim.n_bins, sim.n_pix // 2 + 1
    weights = jnp.asarray(mode_weights(sim.n_pix), theta.dtype).at[0, 0].set(0.0).ravel()
    modes = fold(hartley(x)).reshape(n, 4, m * m)
    observed = jnp.einsum("iqk,jqk->kij", modes, modes)
    i, j = np.triu_indices(n)
    index = np.zeros((n, n), int)
    index[i, j] = index[j, i] = np.arange(len(i))

    def matrices(t):
        return sim.mode_power(t).reshape(len(i), m * m)[index].transpose(2, 0, 1)

    covariance = matrices(theta) + jnp.diag(sim.noise**2)[None]
    slopes = jnp.moveaxis(jax.jacfwd(matrices)(theta), -1, 0)
    inverse = jnp.linalg.inv(covariance)
    whitened = jnp.einsum("kij,akjl->akil", inverse, slopes)
    misfit = jnp.einsum("kij,kjl->kil", inverse, observed - weights[:, None, None] * covariance)
    score = 0.5 * jnp.einsum("akij,kji->a", whitened, misfit)
    fisher = 0.5 * jnp.einsum("akij,bkji,k->ab", whitened, whitened, weights)
    log_det = jnp.linalg.slogdet(covariance)[1]
    fit = -0.5 * (jnp.einsum("kij,kji->", inverse, observed) + jnp.sum(weights * log_det))
    return score, fisher, fit


def approximate_posterior(sim: LensingMaps, x, n_steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    r"""Centre $u_0$ and root $R$, $R R^T = (J^T F J + P)^{-1}$, of the Gaussian-field posterior in unconstrained space.

    Damped Fisher scoring from the fiducial parameters. P is the inverse variance of the prior's u. The observation's
    true parameters and latents are not used.
    """
    prior = sim.prior
    spread = prior.to_unconstrained(prior.sample(jax.random.key(0), (4000,)))
    mean, precision = np.asarray(spread.mean(0), float), np.diag(1 / np.asarray(spread.var(0), float))
    u = np.asarray(prior.to_unconstrained(sim.fiducial), float)
    jacobian = jax.jit(jax.jacfwd(prior.from_unconstrained))
    x = jnp.asarray(x, jnp.result_type(float))
    best = (-np.inf, u, precision)
    step = np.zeros_like(u)
    for _ in range(n_steps):
        theta = prior.from_unconstrained(jnp.asarray(u, jnp.result_type(float)))
        score, fisher, fit = (np.asarray(a, float) for a in scoring_step(sim, x, theta))
        j = np.asarray(jacobian(jnp.asarray(u, jnp.result_type(float))), float)
        value = float(fit) - 0.5 * (u - mean) @ precision @ (u - mean)
        if np.isfinite(value) and np.isfinite(fisher).all() and value > best[0]:
            curvature = j.T @ fisher @ j + precision
            gain, best = value - best[0], (value, u, curvature)
            step = np.linalg.solve(curvature, j.T @ score - precision @ (u - mean))
            if gain < 1e-3:
                break
        else:
            step = step / 3
        u = best[1] + step * min(1.0, 1.0 / np.abs(step).max())
    return best[1], np.linalg.cholesky(np.linalg.inv(best[2]))
