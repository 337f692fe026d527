r"""The full-field posterior from marginal scores along a path of parameters: a log-likelihood from its gradients."""

import warnings
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp
from tqdm.auto import tqdm

from diffsbi._choose import choose
from diffsbi._types import Array, Float, Key, check_key, check_trailing
from diffsbi.prior import Prior
from diffsbi.sampling.blocks import BlockStore, array_digest
from diffsbi.sampling.full_field import observed, starting_frame
from diffsbi.sampling.surface import Surface, features, fit_surface
from diffsbi.sampling.walk import PathError, Walk
from diffsbi.simulators.averaging import LOW_ACCEPTANCE
from diffsbi.simulators.base import AbstractSimulator

LEAST_ROUND = 6
LEAST_ROUNDS = 3  # before a path ends by itself: errors that 4 p gradients leave are badly known
REFITS = 2  # of the surface after each round, each in the frame of the last
MOST_SHIFT, MOST_WIDENING = 3.0, 1.5  # from one round to the next, in standard deviations of the first
MOST_MOVES = 12
CANDIDATES = 10_000
TAIL = 6.0  # degrees of freedom of the candidates' t distribution


NO_POSTERIOR = (
    "The scores so far give no posterior that can be sampled: they are too noisy, or the log-likelihood is far "
    "from quadratic. Try more n_turns, or start from draws of a first posterior (start=...)."
)


class PathEstimate(NamedTuple):
    """Posterior mean and standard deviation of one parameter, with the standard errors that the path leaves them."""

    mean: float
    sd: float
    mean_error: float
    sd_error: float


class PathPosterior(eqx.Module):
    r"""$p(\theta | x) \propto p(\theta) e^{\ell(v)}$, $u(\theta) = u_0 + R v$, with a surface $\ell$ fitted to scores.

    Attributes:
        prior: Of theta.
        centre: $u_0$, near the posterior's mean in the prior's unconstrained space, `(p,)`; `normal()` has it.
        root: R, nearly of its covariance there, `(p, p)`.
        surface: $\ell$.
        u: The points of the path, `(n, p)`.
        scores: $\nabla_u \log p(x | \theta(u))$ there, with Monte Carlo noise, `(n, p)`.
        acceptance: Of the chain at each point, `(n,)`.
        gradients: All gradients of the joint that it took, burn-in included.
    """

    prior: Prior
    centre: np.ndarray
    root: np.ndarray
    surface: Surface
    u: np.ndarray
    scores: np.ndarray
    acceptance: np.ndarray
    gradients: int = eqx.field(static=True)

    def log_likelihood(self, theta: Float[Array, "*n p"]) -> np.ndarray:
        r"""$\log p(x | \theta)$ up to a constant; beyond the posterior, where the path did not go, an extrapolation."""
        check_trailing("theta", theta, (self.prior.dim,))
        u = np.asarray(self.prior.to_unconstrained(jnp.asarray(theta)), float)
        v = np.linalg.solve(self.root, (u - self.centre).reshape(-1, self.prior.dim).T).T
        return self.surface(v).reshape(u.shape[:-1])

    def sample(self, key: Key, n: int) -> Float[Array, "n p"]:
        """`n` distinct draws, chosen by their weights among candidates of a t distribution.

        Raises:
            ValueError: `n` < 1.
        """
        if n < 1:
            raise ValueError(f"Expected n >= 1 draws; got {n}.")
        v, log_weight = self._weighted(_generator(key), max(CANDIDATES, 20 * n))
        chosen = choose(np.exp(log_weight - log_weight.max()), n, _generator(jax.random.fold_in(key, 1)))
        u = self.centre + v[chosen] @ self.root.T
        return self.prior.from_unconstrained(jnp.asarray(u, jnp.result_type(float)))

    def normal(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean `(p,)` and lower Cholesky factor of the covariance, in the prior's unconstrained space."""
        v, log_weight = self._weighted(np.random.default_rng(0), CANDIDATES)
        return _normal(self.centre, self.root, v, log_weight)

    def summary(self) -> dict[str, PathEstimate]:
        """Mean, standard deviation and their errors for every parameter.

        Errors come from the covariance of the surface's coefficients: noise of the scores and their number, not terms
        that the surface lacks. Compare `degree=3`, or another key, for these.
        """
        generator = np.random.default_rng(0)
        v, log_weight = self._weighted(generator, CANDIDATES)
        theta = np.asarray(self.prior.from_unconstrained(jnp.asarray(self.centre + v @ self.root.T)), float)
        root = np.linalg.cholesky(self.surface.covariance)
        change = features(v, self.surface.terms) @ root @ generator.standard_normal((root.shape[1], 64))
        moments = [_moments(theta, log_weight + by) for by in (np.zeros(len(v)), *change.T)]
        means, widths = (np.stack(part) for part in zip(*moments, strict=True))
        columns = (means[0], widths[0], means[1:].std(0), widths[1:].std(0))
        return {
            n: PathEstimate(*map(float, row))
            for n, row in zip(self.prior.names, zip(*columns, strict=True), strict=True)
        }

    @property
    def error(self) -> float:
        """The largest error of a mean or a standard deviation, in standard deviations."""
        return max(max(row.mean_error, row.sd_error) / row.sd for row in self.summary().values())

    def _weighted(self, generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        return _candidates(self.prior, self.centre, self.root, self.surface, generator, n)


def path_posterior(
    sim: AbstractSimulator,
    x: Array,
    key: Key,
    *,
    n_points: int = 96,
    n_turns: int = 4,
    until_error: float | None = 0.1,
    degree: int = 2,
    start: Float[Array, "n p"] | None = None,
    latents: str | None = None,
    folder=None,
    progress: bool = False,
) -> PathPosterior:
    r"""Posterior of theta given the data themselves, from the marginal score at some ten to a hundred parameters.

    By Fisher's identity $\nabla_\theta \log p(x | \theta) = E[\nabla_\theta \log p(x, \xi | \theta)]$ over the latents
    that x and theta allow, and its integral along a path of parameters is the log-likelihood (path sampling; Gelman &
    Meng 1998, Stat. Sci. 13, 163). One Markov chain of the latents (quarter turns about a standard normal, Metropolis
    adjusted, ends and starts weighted by acceptance) goes with the parameters from point to point; at each, one turn
    lets it follow and `n_turns` are averaged. The log-likelihood is the quadratic in the prior's unconstrained space
    whose gradients these scores are (`fit_surface`); the prior is exact. Points come in rounds of 2 p (six at
    least) from the posterior so far, so that later ones are where they matter.

    It needs neither simulations nor training, and far fewer gradients than chains on (theta, latents). It is an
    approximation where they are exact: the log-likelihood is quadratic (or cubic) in u, and the chain follows the path
    with a lag, which makes widths too small where it does not move (`PathPosterior.acceptance`). Take
    `full_field_posterior` to judge others by.

    Args:
        sim: Any simulator of the protocol whose latents are near a standard normal in the coordinate `latents`.
        x: The observation, with the shape that the simulator draws.
        key: A typed JAX key.
        n_points: The most points, in whole rounds.
        n_turns: Quarter turns averaged at each.
        until_error: Stop, after three rounds at least, once all means and standard deviations are known to so many
            standard deviations (`PathPosterior.error`); None to take all `n_points`.
        degree: 2, or 3 to learn the log-likelihood's skewness as well, which takes more points.
        start: Draws of a first posterior, about which the first points are; by default the Gaussian-field posterior for
            lensing maps and the prior for other simulators.
        latents: Latent coordinate; by default "whitened" where the simulator offers it, else "white".
        folder: Where each round is kept; a call with the same arguments goes on from there.
        progress: Show a progress bar.

    Raises:
        ValueError: Data that are not finite or of another shape, numbers that are not positive, fewer than two rounds,
            or a folder of another configuration.
        PathError: A RuntimeError: scores that are not finite at half the points of a round, or so noisy or so far from
            those of a quadratic that no posterior can be had.
    """
    dim = sim.prior.dim
    size = check_lengths(dim, n_points, n_turns, until_error)
    if degree not in (2, 3):
        raise ValueError(f"Expected degree 2 or 3; got {degree}.")
    latents = sim.best_latents(latents)
    x, shape = observed(sim, x)
    centre, root = starting_frame(sim, x) if start is None else _frame_of(sim.prior, start)
    key_xi, key_points, key_chain = jax.random.split(check_key(key), 3)
    walk = Walk(sim, x, jax.random.normal(key_xi, shape, x.dtype), key_chain, latents)
    # What is kept is this path's only as long as everything that it depends on is the same.
    where = array_digest(*(np.asarray(a, np.float32) for a in (x, centre, root)), np.asarray(jax.random.key_data(key)))
    about = dict(sampler="path", n_turns=n_turns, degree=degree, latents=latents, data_start_and_key=where)
    store = BlockStore(folder, about) if folder else None
    kept: list[dict[str, np.ndarray]] = []
    posterior = None
    with tqdm(total=n_points // size * size, disable=not progress, desc="path", unit="point") as bar:
        for k in range(n_points // size):
            v = np.asarray(jax.random.normal(jax.random.fold_in(key_points, k), (size, dim)), float)
            record = _stored(store, k, walk)
            if record is None:
                record = walk.round(k, centre + v @ root.T, n_turns)
                record |= dict(centre=centre, root=root)
                if store:
                    store.write(0, k, record, walk.state)
            kept.append(record)
            try:
                posterior = _fitted(sim.prior, centre, root, kept, degree, walk.gradients)
                error = posterior.error
            except np.linalg.LinAlgError as error:  # scores beyond all bounds, a covariance that is none
                raise PathError(NO_POSTERIOR) from error
            centre, root = posterior.centre, posterior.root
            bar.update(size)
            acceptance = record["acceptance"].mean()
            bar.set_postfix(gradients=posterior.gradients, acceptance=f"{acceptance:.2f}", error=f"{error:.2f}")
            if k + 1 >= LEAST_ROUNDS and until_error is not None and error < until_error:
                break
    _warn_of(posterior, error, until_error, f"raise n_points ({n_points}) or n_turns ({n_turns})", latents)
    return posterior


def check_lengths(dim: int, n_points: int, n_turns: int, until_error: float | None) -> int:
    """Points of one round; a ValueError for fewer than two rounds, no turn, or an error that is not positive."""
    size = max(2 * dim, LEAST_ROUND)
    if n_points < 2 * size or n_turns < 1 or (until_error is not None and not until_error > 0):
        got = f"n_points={n_points}, n_turns={n_turns}, until_error={until_error}"
        raise ValueError(f"Expected n_points >= {2 * size} (two rounds), n_turns >= 1 and until_error > 0; got {got}.")
    return size


def _warn_of(posterior: PathPosterior, error: float, until_error: float | None, advice: str, latents: str) -> None:
    if until_error is not None and error > until_error:
        message = f"Means or widths have errors of {error:.2f} standard deviations: {advice}."
        warnings.warn(message, stacklevel=3)
    share = posterior.acceptance.mean()
    if share < LOW_ACCEPTANCE:
        warnings.warn(
            f"The latents accepted {share:.0%} of their moves and lag behind the path: widths may be too small. Try "
            f"other latents than {latents!r}, or `full_field_posterior`.",
            stacklevel=3,
        )


def _stored(store: BlockStore | None, k: int, walk: Walk) -> dict[str, np.ndarray] | None:
    """Round k of a former run, the walk brought to its end; None where there is none."""
    record = store.read(0, k) if store else None
    state = store.read_state(0, k, walk.state) if store and record is not None else None
    if state is None:
        return None
    walk.state = jax.tree.map(np.asarray, state)
    return record


def _fitted(prior: Prior, centre, root, kept, degree: int, gradients: int) -> PathPosterior:
    """The surface through all scores so far, in the frame of the posterior that it gives."""
    u, scores, acceptance = (np.concatenate([r[name] for r in kept]) for name in ("u", "scores", "acceptance"))
    _, sd = prior.unconstrained_spread()
    frames = [(r["centre"], r["root"]) for r in kept]

    def fit(centre, root) -> PathPosterior:
        v, in_frame = np.linalg.solve(root, (u - centre).T).T, scores @ root
        guess = np.eye(prior.dim) - root.T @ (root / sd[:, None] ** 2)
        counts = _counts(u, centre, root, frames) * acceptance / acceptance.mean()
        surface = _concave(fit_surface(v, in_frame, guess, degree, counts))
        return PathPosterior(prior, centre, root, surface, u, scores, acceptance, gradients)

    fitted = fit(centre, root)
    for _ in range(REFITS - 1):
        fitted = fit(*_near((centre, root), *fitted.normal()))
    return fitted


def _normal(centre, root, v, log_weight) -> tuple[np.ndarray, np.ndarray]:
    """Mean and root of weighted candidates."""
    weight = np.exp(log_weight - logsumexp(log_weight))
    return centre + root @ (weight @ v), root @ np.linalg.cholesky(np.atleast_2d(np.cov(v.T, aweights=weight)))


def _near(start, centre, root) -> tuple[np.ndarray, np.ndarray]:
    """The frame, not too far from that at the `start` nor too wide: a few noisy scores may suggest anything."""
    centre_0, root_0 = start
    shift = np.linalg.solve(root_0, centre - centre_0)
    relative = np.linalg.solve(root_0, root)
    values, vectors = np.linalg.eigh(relative @ relative.T)
    bounded = (vectors * np.minimum(values, MOST_WIDENING**2)) @ vectors.T
    centre = centre_0 + root_0 @ shift * min(1.0, MOST_SHIFT / np.linalg.norm(shift))
    return centre, root_0 @ np.linalg.cholesky(bounded)


def _concave(surface: Surface) -> Surface:
    """The surface without positive second derivatives at its centre, which only noise gives it."""
    values, vectors = np.linalg.eigh(surface.quadratic()[1])
    return surface if values.min() >= 0 else surface.with_curvature((vectors * np.maximum(values, 0)) @ vectors.T)


def _counts(u, centre, root, frames) -> np.ndarray:
    r"""The posterior's density over that of the points, so that they count as draws of the posterior do.

    A quadratic regressed on $\nabla \log p$ at draws of p has the mean and covariance of p, whatever its shape (Stein's
    identity: $E[\nabla \log p] = 0$, $E[v \nabla \log p^T] = -1$); at other points only if $\log p$ is quadratic.
    The ratio is tempered as far as it takes for half of the points to count.
    """
    of_points = logsumexp([_log_normal(u, *frame) for frame in frames], axis=0)
    ratio = _log_normal(u, centre, root) - of_points
    for temper in (1.0, 0.7, 0.5, 0.3, 0.1, 0.0):
        counts = np.exp(temper * (ratio - ratio.max()))
        if counts.sum() ** 2 > 0.5 * len(u) * np.sum(counts**2):
            break
    return counts / counts.mean()


def _log_normal(u, centre, root) -> np.ndarray:
    v = np.linalg.solve(root, (u - centre).T)
    return -0.5 * (v**2).sum(0) - np.linalg.slogdet(root)[1]


def _candidates(prior: Prior, centre, root, surface: Surface, generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points v of a t distribution about the posterior, and the logarithms of their weights."""
    mean, sd = prior.unconstrained_spread()  # the prior as if it were normal: where candidates begin, nothing more
    dim, (slope, curvature) = prior.dim, surface.quadratic()
    prior_part = root.T / sd**2
    values, vectors = np.linalg.eigh(curvature + prior_part @ root)
    covariance = (vectors / np.maximum(values, 0.05)) @ vectors.T
    at = covariance @ (slope + prior_part @ (mean - centre))
    for _ in range(MOST_MOVES):  # from the quadratic's own normal to the posterior's moments
        z = generator.standard_normal((n, dim)) / np.sqrt(generator.chisquare(TAIL, (n, 1)) / TAIL)
        v = at + z @ np.linalg.cholesky(covariance).T
        u = jnp.asarray(centre + v @ root.T, jnp.result_type(float))
        log_weight = np.asarray(_log_prior(prior, u), float) + surface(v)
        log_weight += 0.5 * (TAIL + dim) * np.log1p((z**2).sum(1) / TAIL)
        log_weight = np.where(np.isfinite(log_weight), log_weight, -np.inf)
        for temper in (1.0, 0.5, 0.2, 0.1, 0.03, 0.01):
            weight = np.exp(temper * log_weight - logsumexp(temper * log_weight))
            effective = 1 / np.sum(weight**2)
            if effective > 20 * dim:
                break
        if temper == 1 and effective > 0.3 * n:
            break
        at, covariance = weight @ v, np.atleast_2d(np.cov(v.T, aweights=weight)) + 1e-9 * np.eye(dim)
    if temper < 1 or not np.isfinite(effective):
        raise PathError(NO_POSTERIOR)
    return v, log_weight


def _frame_of(prior: Prior, draws) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = prior.unconstrained_moments(draws, "start")
    return mean, np.linalg.cholesky(covariance)


@eqx.filter_jit
def _log_prior(prior: Prior, u):
    return prior.log_prob_unconstrained(u)


def _moments(theta: np.ndarray, log_weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weight = np.exp(log_weight - logsumexp(log_weight))
    mean = weight @ theta
    return mean, np.sqrt(weight @ (theta - mean) ** 2)


def _generator(key: Key) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(check_key(key))).tolist())
