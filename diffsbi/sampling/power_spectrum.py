r"""The posterior from the power spectra of the observed maps: a Gaussian likelihood of band powers, sampled by NUTS."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_trailing
from diffsbi.bands import Bands, pairs, pixel_area
from diffsbi.prior import Prior
from diffsbi.sampling.chains import Chains
from diffsbi.sampling.nuts import nuts
from diffsbi.simulators import fields
from diffsbi.simulators.lensing import LensingMaps


class BandPowerLikelihood(eqx.Module):
    r"""$\hat C_b^{ij} \sim N(\bar C_b^{ij}(\theta) + \delta_{ij} \sigma_i^2 A_\mathrm{pix}, \Sigma)$ with Σ fixed.

    $\bar C_b$ is the average of `sim.spectra(theta, ell)` over the modes of band b, through `Bands.quadrature`. Σ is
    that of Gaussian fields at `theta_covariance` (Knox 1995), noise included,
    $\mathrm{cov}(\hat C_b^{ij}, \hat C_b^{kl}) = \langle C^{ik} C^{jl} + C^{il} C^{jk} \rangle_b / N_b$, with $N_b$
    modes of which each counts beside its conjugate; a given `covariance` replaces it (`band_power_covariance` has that
    of log-normal maps). Σ does not follow theta: that would count the information of the Gaussian field's variance
    twice (Carron 2013).

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
        check_maps(sim, x)
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
        weights = np.asarray(self.weights, float)
        return _gaussian_covariance(nodes, lambda c: np.sum(c * weights, -1), self.bands)


class _Target(eqx.Module):
    """Log-posterior in $v$, where $u = u_0 + R v$ is the prior's unconstrained space."""

    likelihood: Any  # with `log_prob(theta)`
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
        covariance: That covariance itself, for instance from `band_power_covariance`.
        n_chains: Chains.
        n_warmup: Discarded transitions of each chain.
        n_samples: Kept draws of each chain.
        settings: Further settings of `nuts`, such as `folder` and `progress`.
    """
    likelihood = BandPowerLikelihood(
        sim, x, n_bands=n_bands, edges=edges, theta_covariance=theta_covariance, covariance=covariance
    )
    key_prior, key_sample = jax.random.split(check_key(key))
    preconditioner = _whitened(likelihood, sim.prior, key_prior)
    return sample_theta(likelihood, sim.prior, preconditioner, key_sample, n_chains, n_warmup, n_samples, **settings)


def sample_theta(
    likelihood, prior: Prior, preconditioner, key: Key, n_chains: int, n_warmup: int, n_samples: int, **settings
) -> Chains:
    """NUTS on prior times `likelihood.log_prob(theta)` in $v$, $u = u_0 + R v$, with `preconditioner` = (u_0, R)."""
    key_start, key_chain = jax.random.split(check_key(key))
    target = _Target(likelihood, prior, *(jnp.asarray(a, jnp.result_type(float)) for a in preconditioner))
    init = 2.0 * jax.random.normal(key_start, (n_chains, prior.dim))
    defaults = dict(names=prior.names, mass="dense", step_size=0.5, max_tree_depth=7)
    return nuts(target, init, key_chain, n_warmup, n_samples, extract=target.theta, **(defaults | settings))


def band_power_covariance(
    sim: LensingMaps,
    key: Key,
    n: int,
    theta: Float[Array, " p"] | None = None,
    *,
    n_bands: int = 12,
    edges=None,
    progress: bool = False,
) -> np.ndarray:
    r"""Covariance of the band powers of simulated maps, connected (non-Gaussian) part included.

    $\hat\Sigma = \Sigma_t + (S_x - S_t) + B$. Each simulation x has a Gaussian twin t, its linearised map
    $\lambda_i g_i$ with the same latents and noise; S are the sample covariances of their band powers, and $\Sigma_t$,
    that of the twins, is known exactly (Knox 1995, mode by mode). The simulations serve only for the difference, whose
    noise is several times smaller than that of $S_x$: control variates, as CARPool (Chartier & Wandelt 2021).
    $B = \mathrm{E}[N \Sigma_t^{-1} N]$ with N the noise of $S_x - S_t$, estimated from the scatter between simulations,
    makes the *inverse* of $\hat\Sigma$ unbiased to first order: what the factor (n − d − 2)/(n − 1) of Hartlap et al.
    (2007) does for d band powers without twins, so apply no such factor. For Gaussian fields $\hat\Sigma = \Sigma_t$.

    The noise of the inverse that remains widens no error bar (as Sellentin & Heavens 2016 would): at 64², 5 deg, with
    180 band powers, posterior widths scatter by 2 % for n = 200 and 0.3 % for n = 1000 (Hartlap: 10 % and 2 %).

    Args:
        sim: The survey.
        key: A typed JAX key; simulation i depends on it and i alone.
        n: Number of simulations; about as many as there are band powers, or more.
        theta: Where they are made; the fiducial point by default.
        n_bands: Logarithmic multipole bands (or give their `edges`), as in `power_spectrum_posterior`.
        edges: Multipoles of the band edges.
        progress: Show a progress bar.

    Returns:
        `(n_pairs * n_bands,)` squared, pair after pair, noise included: the `covariance` of `BandPowerLikelihood`.

    Raises:
        TypeError: If `sim` is not `LensingMaps`: other simulators have no known Gaussian twin.
        ValueError: If n < 2, theta is of the wrong shape or outside the prior's support, or n is too small for a
            positive definite covariance.
    """
    check_key(key)
    if not isinstance(sim, LensingMaps):
        raise TypeError(f"Expected a LensingMaps simulator; got {type(sim).__name__}.")
    if n < 2:
        raise ValueError(f"Expected n >= 2 simulations; got {n}.")
    theta = jnp.asarray(sim.fiducial if theta is None else theta, jnp.result_type(float))
    if theta.shape != (sim.prior.dim,):
        raise ValueError(f"Expected theta with shape ({sim.prior.dim},); got {theta.shape}.")
    sim.prior.check(theta)
    bands = Bands(sim.n_pix, sim.side_deg, n_bands, edges)
    exact = _twin_covariance(sim, bands, theta)
    scale = np.sqrt(np.diag(exact))
    root = scale[:, None] * np.linalg.cholesky(exact / np.outer(scale, scale))
    x, twin = (np.linalg.solve(root, rows.T).T for rows in _with_twins(sim, bands, key, n, theta, progress))
    white = np.eye(len(root)) + _unbiased_difference(x - x.mean(0), twin - twin.mean(0))
    smallest = np.linalg.eigvalsh(white)[0]
    if not smallest > 0:
        raise ValueError(f"Expected a positive definite covariance; got eigenvalue {smallest:.2g} with n = {n}.")
    covariance = root @ white @ root.T
    return (covariance + covariance.T) / 2


def _unbiased_difference(x: np.ndarray, twin: np.ndarray) -> np.ndarray:
    r"""$D + B$ of centred rows: $D = S_x - S_t$, and $B = \mathrm{E}[N^2]$ from the scatter of $x x^T - t t^T$."""
    n = len(x)
    difference = (x.T @ x - twin.T @ twin) / (n - 1)
    x2, twin2, mixed = np.sum(x**2, 1), np.sum(twin**2, 1), np.sum(x * twin, 1)
    cross = (x * mixed[:, None]).T @ twin
    squares = (x * x2[:, None]).T @ x + (twin * twin2[:, None]).T @ twin - cross - cross.T
    return difference + (squares / n - difference @ difference) / n


def _with_twins(sim: LensingMaps, bands: Bands, key, n: int, theta, progress: bool, size: int = 64):
    """Band powers of simulations and of their Gaussian twins, each `(n, n_pairs * n_bands)` in float64."""
    size = min(n, size)
    blocks = []
    with tqdm(total=n, disable=not progress, desc="covariance", unit="sim") as bar:
        for start in range(0, n, size):
            # The last block repeats its last row rather than be compiled anew for a shorter one.
            rows = _twin_rows(sim, bands, key, theta, jnp.minimum(jnp.arange(start, start + size), n - 1))
            blocks.append([np.asarray(a, float) for a in rows])
            bar.update(min(size, n - start))
    both = [np.concatenate(rows)[:n] for rows in zip(*blocks, strict=True)]
    check_finite("band powers", both)
    return both


@eqx.filter_jit
def _twin_rows(sim, bands, key, theta, index):
    state = sim.setup(theta)

    def row(i):
        key_z, key_x = jax.random.split(jax.random.fold_in(key, i))
        z = sim.latents(state).sample(key_z)
        data = sim.likelihood(state, z)
        x = data.sample(key_x)
        g = fields.lower_times(state.factor, fields.unstack(fields.fold(z)))
        linear = state.response[:, None, None] * fields.hartley(fields.unfold(jnp.stack(g)))
        return bands(x).ravel(), bands(x - data.mean + linear).ravel()

    return jax.lax.map(row, index)


def _twin_covariance(sim: LensingMaps, bands: Bands, theta) -> np.ndarray:
    """Covariance of the band powers of the Gaussian twins, exact on the modes of the grid, in float64."""
    state = eqx.filter_jit(sim.setup)(theta)
    factor = [[np.asarray(a, float) for a in row] for row in state.factor]
    response, noise = np.asarray(state.response, float), np.asarray(sim.noise, float)
    rows = np.abs(np.fft.fftfreq(sim.n_pix, 1 / sim.n_pix)).astype(int)  # the quadrant's rows in the half plane's order
    power = [
        response[i] * response[j] * sum(a * b for a, b in zip(factor[i], factor[j], strict=False))[rows].ravel()
        + (noise[i] ** 2 if i == j else 0.0)
        for i, j in pairs(sim.n_bins)
    ]
    weights = np.asarray(bands._multiplicity, float) / np.array(bands.mode_counts)[:, None]
    return _gaussian_covariance(np.stack(power) * pixel_area(sim.n_pix, sim.side_deg), lambda c: c @ weights.T, bands)


def _gaussian_covariance(power: np.ndarray, average, bands: Bands) -> np.ndarray:
    r"""$\langle C^{ik} C^{jl} + C^{il} C^{jk} \rangle_b / N_b$, `(n_pairs * n_bands,)` squared (Knox 1995).

    Args:
        power: $C^{ij}$, noise included, `(n_pairs, ...)`.
        average: `(n_pairs, n_pairs, ...)` → its averages over the bands `(n_pairs, n_pairs, n_bands)`.
        bands: The bands.
    """
    n_pairs, n_bands = len(power), bands.n_bands
    first, second = np.array(pairs(int(np.sqrt(2 * n_pairs)))).T
    full_power = np.zeros((second[-1] + 1,) * 2 + power.shape[1:])
    full_power[first, second] = full_power[second, first] = power

    def products(a, b):  # of all pairs p = (i, j) with all pairs q = (k, l)
        return full_power[a[0][:, None], a[1][None, :]] * full_power[b[0][:, None], b[1][None, :]]

    both = products((first, first), (second, second)) + products((first, second), (second, first))
    block = average(both) / np.asarray(bands.mode_counts)
    full = np.zeros((n_pairs, n_bands, n_pairs, n_bands))
    index = np.arange(n_bands)
    full[:, index, :, index] = np.moveaxis(block, -1, 0)
    return full.reshape(n_pairs * n_bands, -1)


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


def check_maps(sim, x) -> None:
    """Raise `ValueError` unless `x` is one finite observation of the survey that is not all zero."""
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
