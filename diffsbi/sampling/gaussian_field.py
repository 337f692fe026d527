r"""The Gaussian-field likelihood of maps, latents integrated out: a posterior, and where full-field chains start."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_key, check_trailing
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.power_spectrum import check_maps, sample_theta
from diffsbi.simulators.fields import cholesky, hartley, lower_inverse
from diffsbi.simulators.lensing import LensingMaps


class GaussianFieldLikelihood(eqx.Module):
    r"""$\log p(x | \theta)$ of a Gaussian field, latents integrated out, up to a constant.

    $-\frac12 \sum_k [\mathrm{tr}(C^{-1} X) + w \log|C|]$, k the groups of w modes of one |ℓ|, all but k = 0;
    $C = \sigma^{-1} S(\theta)\,\sigma^{-1} + 1$, S the power of `sim.mode_power` and σ the noise; X the sum of
    $\sigma^{-1} x x^T \sigma^{-1}$ over the group. S depends on |ℓ| alone, so nothing is approximated for a Gaussian
    field; a log-normal one has the same S, and what it has beyond (covariance between modes, skewness) is left out.
    The constant is that of $\mathrm{tr}(C^{-1} X) - \mathrm{tr} X$, which keeps the sum small enough for single
    precision.

    Args:
        sim: The survey; its `field` does not matter.
        x: Observed maps, `(n_bins, n_pix, n_pix)`.

    Raises:
        ValueError: If the maps have another shape than the survey's.
    """

    sim: LensingMaps
    moments: Float[Array, "pairs groups"]  # X, the upper triangle row by row
    count: Float[Array, " groups"]
    interpolation: Array
    factor: Float[Array, "pairs groups"]

    def __init__(self, sim: LensingMaps, x: Float[Array, "bins n n"]):
        check_trailing("x", x, (sim.n_bins, sim.n_pix, sim.n_pix))
        x = jnp.asarray(x, jnp.result_type(float))
        group, count, where = _groups(sim.n_pix)
        i, j = np.triu_indices(sim.n_bins)
        noise = sim.noise.astype(x.dtype)
        modes = hartley(x / noise[:, None, None]).reshape(sim.n_bins, -1)
        total = jax.ops.segment_sum((modes[i] * modes[j]).T, jnp.asarray(group), len(count) + 1)
        self.sim, self.moments, self.count = sim, total[1:].T, jnp.asarray(count, x.dtype)
        self.interpolation = sim.interpolation[where]
        self.factor = sim.mode_factor.ravel()[where][None, :] / (noise[i] * noise[j])[:, None]

    def covariance(self, theta: Float[Array, " 6"]) -> Float[Array, "pairs groups"]:
        """C of every group, signal and noise in units of the noise."""
        log_limber, _ = self.sim.spectrum(theta)
        i, j = np.triu_indices(self.sim.n_bins)
        signal = jnp.exp(jnp.einsum("pn,kn->pk", log_limber, self.interpolation)) * self.factor
        return signal + jnp.asarray(i == j, signal.dtype)[:, None]

    def log_prob(self, theta: Float[Array, " 6"]) -> Array:
        """Log-likelihood, without its constant."""
        n = self.sim.n_bins
        root = cholesky(self.covariance(theta), n)
        inverse = lower_inverse(root)
        log_det = 2 * sum(jnp.log(row[-1]) for row in root)
        misfit = -sum(self.moments[p] for p in np.flatnonzero(np.equal(*np.triu_indices(n))))
        for p, (i, j) in enumerate(zip(*np.triu_indices(n), strict=True)):
            element = sum(inverse[k][i] * inverse[k][j] for k in range(j, n))  # of C⁻¹ = L⁻ᵀ L⁻¹
            misfit = misfit + (1 if i == j else 2) * element * self.moments[p]
        return -0.5 * jnp.sum(misfit + self.count * log_det)

    def fisher(self, theta: Float[Array, " 6"]) -> Float[Array, "6 6"]:
        r"""$F_{ab} = \frac12 \sum_k w\,\mathrm{tr}[C^{-1} C_a C^{-1} C_b]$."""
        inverse = jnp.linalg.inv(self._matrices(self.covariance(theta)))
        slopes = self._matrices(jnp.moveaxis(jax.jacfwd(self.covariance)(theta), -1, 0))
        whitened = jnp.einsum("kij,akjl->akil", inverse, slopes)
        return 0.5 * jnp.einsum("akij,bkji,k->ab", whitened, whitened, self.count)

    def _matrices(self, triangle: Float[Array, "*a pairs groups"]) -> Float[Array, "*a groups bins bins"]:
        i, j = np.triu_indices(self.sim.n_bins)
        index = np.zeros((self.sim.n_bins,) * 2, int)
        index[i, j] = index[j, i] = np.arange(len(i))
        return jnp.moveaxis(triangle[..., index, :], -1, -3)


def _groups(n_pix: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Modes of one |ℓ|: the group of every mode of the grid (0 is k = 0), and of all others their number of modes and
    one position each on the quadrant, flat."""
    k = np.abs(np.fft.fftfreq(n_pix, 1 / n_pix)).astype(int)
    _, first, group, count = np.unique(
        (k[:, None] ** 2 + k[None, :] ** 2).ravel(), return_index=True, return_inverse=True, return_counts=True
    )
    row, column = np.divmod(first, n_pix)
    return group, count[1:], (k[row] * (n_pix // 2 + 1) + k[column])[1:]


@eqx.filter_jit
def _scoring(likelihood: GaussianFieldLikelihood, theta):
    value, score = jax.value_and_grad(likelihood.log_prob)(theta)
    return score, likelihood.fisher(theta), value


def scoring_step(sim: LensingMaps, x: Float[Array, "bins n n"], theta: Float[Array, " 6"]):
    r"""Score and Fisher matrix of theta for a Gaussian field of the same spectra, all modes but k = 0.

    With $C = S(\theta) + \sigma^2$ per mode and X the observed second moments,
    $s_a = \frac12\sum\mathrm{tr}[C^{-1}C_a C^{-1}(X - C)]$ and $F_{ab} = \frac12\sum\mathrm{tr}[C^{-1}C_aC^{-1}C_b]$.

    Returns:
        (score (6,), Fisher (6, 6), log-likelihood up to a constant).
    """
    return _scoring(GaussianFieldLikelihood(sim, x), theta)


def gaussian_field_posterior(
    sim: LensingMaps,
    x: Float[Array, "bins n_pix n_pix"],
    key: Key,
    *,
    n_chains: int = 4,
    n_warmup: int = 300,
    n_samples: int = 500,
    **settings,
) -> Chains:
    """Posterior of theta given all modes of `x` as a Gaussian field (`GaussianFieldLikelihood`), by NUTS.

    Exact where `sim.field` is "gaussian"; for log-normal maps, the answer of who takes them for Gaussian. The sampler
    works in unconstrained space, in coordinates whitened by the posterior's curvature (`approximate_posterior`); chains
    start around its peak, overdispersed by a factor of two. `Chains.gradients` counts evaluations of the likelihood.

    Args:
        sim: The survey.
        x: Observed maps, `(n_bins, n_pix, n_pix)`.
        key: A typed JAX key.
        n_chains: Chains.
        n_warmup: Discarded transitions of each chain.
        n_samples: Kept draws of each chain.
        settings: Further settings of `nuts`, such as `folder` and `progress`.

    Raises:
        ValueError: If the maps have another shape than the survey's, are not finite or all zero.
    """
    check_maps(sim, x)
    check_key(key)
    likelihood = GaussianFieldLikelihood(sim, x)
    preconditioner = _peak(likelihood)
    return sample_theta(likelihood, sim.prior, preconditioner, key, n_chains, n_warmup, n_samples, **settings)


def approximate_posterior(sim: LensingMaps, x, n_steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    r"""Centre $u_0$ and root $R$, $R R^T = (J^T F J + P)^{-1}$, of the Gaussian-field posterior in unconstrained space.

    Damped Fisher scoring from the fiducial parameters. P is the inverse variance of the prior's u. The observation's
    true parameters and latents are not used.
    """
    return _peak(GaussianFieldLikelihood(sim, x), n_steps)


@eqx.filter_jit
def _jacobian(prior, u):
    return jax.jacfwd(prior.from_unconstrained)(u)


def _peak(likelihood: GaussianFieldLikelihood, n_steps: int = 25) -> tuple[np.ndarray, np.ndarray]:
    prior = likelihood.sim.prior
    mean, sd = prior.unconstrained_spread()
    precision = np.diag(sd**-2)
    u = np.asarray(prior.to_unconstrained(prior.fiducial), float)
    best = (-np.inf, u, precision)
    step = np.zeros_like(u)
    for _ in range(n_steps):
        theta = prior.from_unconstrained(jnp.asarray(u, jnp.result_type(float)))
        score, fisher, fit = (np.asarray(a, float) for a in _scoring(likelihood, theta))
        j = np.asarray(_jacobian(prior, jnp.asarray(u, jnp.result_type(float))), float)
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
