r"""The posterior from the power spectra of the observed maps: a Gaussian likelihood of band powers, sampled by NUTS."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_trailing
from diffsbi.bands import Bands, pairs, pixel_area
from diffsbi.prior import Prior
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.nuts import nuts


class BandPowerLikelihood(eqx.Module):
    r"""$\hat C_b^{ij} \sim N(\bar C_b^{ij}(\theta) + \delta_{ij} \sigma_i^2 A_\mathrm{pix}, \Sigma)$ with Σ fixed.

    $\bar C_b$ is the average of `sim.spectra(theta, ell)` over the modes of band b, through `Bands.quadrature`. Σ is
    that of Gaussian fields at `theta_covariance` (Knox 1995), noise included,
    $\mathrm{cov}(\hat C_b^{ij}, \hat C_b^{kl}) = \langle C^{ik} C^{jl} + C^{il} C^{jk} \rangle_b / N_b$, with $N_b$
    modes of which each counts beside its conjugate; a given `covariance` replaces it. Σ does not follow theta: that
    would count the information of the Gaussian field's variance twice (Carron 2013).

    Args:
        sim: With `prior`, `n_bins`, `n_pix`, `side_deg`, `noise` (pixel standard deviation of each bin) and
            `spectra(theta, ell) -> (n_pairs, n_ell)`.
        x: Observed maps, `(n_bins, n_pix, n_pix)`.
        n_bands: Logarithmic multipole bands (or give their `edges`).
        theta_covariance: Where Σ is computed; the fiducial point by default.
        covariance: Σ itself, `(n_pairs * n_bands,)` squared, pair after pair.
        order: Multipoles of a band's quadrature.

    Raises:
        ValueError: If the maps have another shape, are not finite or all zero; if Σ is not positive definite.
    """

    sim: Any
    bands: Bands
    data: Float[Array, "pairs bands"]
    whiten: Float[Array, "n n"]  # inverse of Σ's Cholesky factor
    noise_power: Float[Array, " pairs"]
    ell: tuple[float, ...] = eqx.field(static=True)  # numbers, not an array: simulators interpolate to them
    weights: Float[Array, "bands order"]

    def __init__(self, sim, x, *, n_bands=12, edges=None, theta_covariance=None, covariance=None, order=4):
        _check_maps(sim, x)
        self.sim, self.bands = sim, Bands(sim.n_pix, sim.side_deg, n_bands, edges)
        self.data = self.bands(jnp.asarray(x, jnp.result_type(float)))
        nodes, weights = self.bands.quadrature(order)
        self.ell, self.weights = tuple(nodes.ravel().tolist()), jnp.asarray(weights)
        noise = np.broadcast_to(np.asarray(sim.noise, float), (sim.n_bins,))
        self.noise_power = jnp.asarray(
            [noise[i] ** 2 * pixel_area(sim.n_pix, sim.side_deg) if i == j else 0.0 for i, j in pairs(sim.n_bins)]
        )
        if covariance is None:
            covariance = self._knox(sim.fiducial if theta_covariance is None else theta_covariance)
        self.whiten = jnp.asarray(_whitening(covariance, self.data.size))

    def mean(self, theta: Float[Array, " p"]) -> Float[Array, "pairs bands"]:
        """Expected band powers, signal and noise, `(n_pairs, n_bands)`."""
        return jnp.sum(self._nodes(theta) * self.weights[None], -1)

    def residual(self, theta: Float[Array, " p"]) -> Float[Array, " n"]:
        """Whitened data minus mean: standard normal at the truth."""
        return self.whiten @ (self.data - self.mean(theta)).ravel()

    def log_prob(self, theta: Float[Array, " p"]) -> Array:
        """Log-likelihood, without its constant."""
        return -0.5 * jnp.sum(self.residual(theta) ** 2)

    def _nodes(self, theta) -> Float[Array, "pairs bands order"]:
        spectra = self.sim.spectra(theta, np.array(self.ell)).reshape(self.data.shape[0], *self.weights.shape)
        return spectra + self.noise_power[:, None, None]

    def _knox(self, theta) -> np.ndarray:
        """Covariance of the band powers of Gaussian fields, `(n_pairs * n_bands,)` squared, in float64."""
        nodes = np.asarray(jax.jit(lambda t: self._nodes(t))(jnp.asarray(theta, jnp.result_type(float))), float)
        power = np.zeros((self.sim.n_bins, self.sim.n_bins, *nodes.shape[1:]))
        first, second = np.array(pairs(self.sim.n_bins)).T
        power[first, second] = power[second, first] = nodes

        def products(a, b):  # of all pairs p = (i, j) with all pairs q = (k, l), at the nodes
            return power[a[0][:, None], a[1][None, :]] * power[b[0][:, None], b[1][None, :]]

        both = products((first, first), (second, second)) + products((first, second), (second, first))
        block = np.sum(both * np.asarray(self.weights, float), -1) / np.asarray(self.bands.mode_counts)
        n_pairs, n_bands = self.data.shape
        full = np.zeros((n_pairs, n_bands, n_pairs, n_bands))
        index = np.arange(n_bands)
        full[:, index, :, index] = np.moveaxis(block, -1, 0)
        return full.reshape(n_pairs * n_bands, -1)


class _Target(eqx.Module):
    """Log-posterior in $v$, where $u = u_0 + R v$ is the prior's unconstrained space."""

    likelihood: BandPowerLikelihood
    prior: Prior
    centre: Float[Array, " p"]
    root: Float[Array, "p p"]

    def __call__(self, v):
        u = self.centre + self.root @ v
        return self.prior.log_prob_unconstrained(u) + self.likelihood.log_prob(self.prior.from_unconstrained(u))

    def theta(self, v):
        return self.prior.from_unconstrained(self.centre + self.root @ v)


def power_spectrum_posterior(
    sim,
    x: Float[Array, "bins n_pix n_pix"],
    key: Key,
    *,
    n_bands: int = 12,
    edges=None,
    theta_covariance=None,
    covariance=None,
    n_chains: int = 4,
    n_warmup: int = 300,
    n_samples: int = 500,
    **settings,
) -> Chains:
    """Posterior of theta given the band powers of `x` (`BandPowerLikelihood`), by NUTS in unconstrained space.

    The sampler works in coordinates whitened by the posterior's curvature at its peak; chains start around it,
    overdispersed by a factor of two. `Chains.gradients` counts evaluations of the spectra within the chains.

    Args:
        sim: The simulator, as `BandPowerLikelihood` needs it.
        x: Observed maps, `(n_bins, n_pix, n_pix)`.
        key: A typed JAX key.
        n_bands: Logarithmic multipole bands (or give their `edges`).
        theta_covariance: Where the covariance of the band powers is computed; the fiducial point by default.
        covariance: That covariance itself.
        n_chains: Chains.
        n_warmup: Discarded transitions of each chain.
        n_samples: Kept draws of each chain.
        settings: Further settings of `nuts`, such as `folder` and `progress`.
    """
    likelihood = BandPowerLikelihood(
        sim, x, n_bands=n_bands, edges=edges, theta_covariance=theta_covariance, covariance=covariance
    )
    key_start, key_chain, key_prior = jax.random.split(check_key(key), 3)
    centre, root = _whitened(likelihood, sim.prior, key_prior)
    target = _Target(likelihood, sim.prior, *(jnp.asarray(a, jnp.result_type(float)) for a in (centre, root)))
    init = 2.0 * jax.random.normal(key_start, (n_chains, sim.prior.dim))
    defaults = dict(names=sim.prior.names, mass="dense", step_size=0.5, max_tree_depth=7)
    return nuts(target, init, key_chain, n_warmup, n_samples, extract=target.theta, **(defaults | settings))


def _whitened(likelihood: BandPowerLikelihood, prior: Prior, key, n_steps: int = 30) -> tuple[np.ndarray, np.ndarray]:
    r"""Peak $u_0$ of the posterior and $R$ with $R R^T = (J^T J + P)^{-1}$ there, by damped Gauss–Newton steps.

    P is the inverse variance of the prior's u: its curvature can vanish where a truncation cuts. J is by finite
    differences: it only sets the coordinates.
    """
    u_prior = np.asarray(prior.to_unconstrained(prior.sample(key, (2000,))), float)
    mean, spread = u_prior.mean(0), u_prior.std(0)
    steps = 0.02 * np.diag(spread)

    def evaluate(u):
        rows = _residuals(likelihood, prior, u + np.concatenate([steps * 0, steps, -steps]))
        residual, jacobian = (
            rows[0],
            ((rows[len(u) : 2 * len(u)] - rows[2 * len(u) :]) / (2 * np.diag(steps)[:, None])).T,
        )
        loss = residual @ residual + np.sum(((u - mean) / spread) ** 2)
        gradient = jacobian.T @ residual + (u - mean) / spread**2
        return (loss if np.isfinite(rows).all() else np.inf), gradient, jacobian.T @ jacobian + np.diag(spread**-2.0)

    u, damping = np.asarray(prior.to_unconstrained(prior.fiducial), float), 1e-3
    loss, gradient, curvature = evaluate(u)
    if not np.isfinite(loss):
        raise ValueError(f"Expected finite spectra around the fiducial point {np.asarray(prior.fiducial)}.")
    for _ in range(n_steps):
        trial = u - np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), gradient)
        new = evaluate(trial)
        gain = loss - new[0]
        if not gain > 0:
            damping *= 10
            if damping > 1e6:
                break
            continue
        u, (loss, gradient, curvature), damping = trial, new, damping / 10
        if gain < 1e-3:
            break
    return u, np.linalg.inv(np.linalg.cholesky(curvature)).T


def _residuals(likelihood: BandPowerLikelihood, prior: Prior, u, size: int = 64) -> np.ndarray:
    """Residuals at the rows of `u`, `(n, n_pairs * n_bands)` in float64; one compilation whatever their number."""
    rows = []
    for start in range(0, len(u), size):
        batch = u[start : start + size]
        padded = np.concatenate([batch, np.repeat(batch[:1], size - len(batch), 0)])
        out = _residual_rows(likelihood, prior, jnp.asarray(padded, jnp.result_type(float)))
        rows.append(np.asarray(out, float)[: len(batch)])
    return np.concatenate(rows)


@eqx.filter_jit
def _residual_rows(likelihood, prior, u):
    return jax.lax.map(lambda one: likelihood.residual(prior.from_unconstrained(one)), u)


def _check_maps(sim, x) -> None:
    check_trailing("x", x, (sim.n_bins, sim.n_pix, sim.n_pix))
    if np.ndim(x) != 3:
        raise ValueError(f"Expected one observation, shape {(sim.n_bins, sim.n_pix, sim.n_pix)}; got {np.shape(x)}.")
    check_finite("x", x)
    if not np.any(np.asarray(x)):
        raise ValueError("Expected an observation; got maps that are zero everywhere.")


def _whitening(covariance, n: int) -> np.ndarray:
    covariance = np.asarray(covariance, float)
    if covariance.shape != (n, n):
        raise ValueError(f"Expected covariance with shape {(n, n)}; got {covariance.shape}.")
    check_finite("covariance", covariance)
    scale = np.sqrt(np.diag(covariance))
    try:
        root = np.linalg.cholesky(covariance / np.outer(scale, scale))
    except np.linalg.LinAlgError as error:
        raise ValueError("Expected a positive definite covariance of the band powers.") from error
    return np.linalg.inv(root) / scale[None, :]
