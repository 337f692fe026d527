"""Sets and graphs with known score and Fisher matrix: regression with unequal noise, velocities of neighbours."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi.compression import Graph


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def regression_sets(key, n_sets: int, n: int, noise: str = "training"):
    """theta (n_sets, 2) = (slope, intercept), normal about (1, 0), and members (n_sets, n, 3) = (x, y, log sigma).

    x is uniform in (-2, 2). The noise levels are log-normal about 1 ("training"), or ("other") uniform in (½, 4) but
    for a fifth of them that are five times smaller.
    """
    keys = jax.random.split(key, 5)
    theta = jax.random.normal(keys[0], (n_sets, 2)) + jnp.array([[1.0, 0.0]])
    x = jax.random.uniform(keys[1], (n_sets, n), minval=-2.0, maxval=2.0)
    if noise == "training":
        sigma = jnp.exp(0.7 * jax.random.normal(keys[2], x.shape))
    else:
        sigma = jax.random.uniform(keys[2], x.shape, minval=0.5, maxval=4.0)
        sigma = jnp.where(jax.random.uniform(keys[3], x.shape) < 0.2, sigma / 5, sigma)
    y = theta[:, :1] * x + theta[:, 1:] + sigma * jax.random.normal(keys[4], x.shape)
    return theta, jnp.stack([x, y, jnp.log(sigma)], -1)


def exact_regression(members, fiducial):
    r"""$t = \sum_i J_i (y_i - J_i^T \theta_0) / \sigma_i^2$, $F = \sum_i J_i J_i^T / \sigma_i^2$, $J_i = (x_i, 1)$."""
    x, y, log_sigma = np.moveaxis(np.asarray(members, float), -1, 0)
    jacobian = np.stack([x, np.ones_like(x)], -1)
    weight = np.exp(-2 * log_sigma)
    residual = y - jacobian @ np.asarray(fiducial, float)
    score = np.einsum("...n,...ni->...i", weight * residual, jacobian)
    return score, np.einsum("...n,...ni,...nj->...ij", weight, jacobian, jacobian)


def relative_errors(found, exact) -> dict[str, float]:
    r"""Errors of scores and Fisher matrices in the exact metric, $F = L L^T$.

    "fisher" is the root mean square of $|L^{-1} \hat F L^{-T} - 1|_F / \sqrt p$, "score" that of
    $|L^{-1}(\hat t - t)|$ over that of $|L^{-1} t|$, "sigma" that of the estimates' difference $\hat\theta - \theta$
    in exact standard deviations, $|L^T(\hat F^{-1} \hat t - F^{-1} t)| / \sqrt p$; "ratio" is the geometric mean of
    $(\det \hat F / \det F)^{1/p}$, the information that is claimed over what there is.
    """
    (score, fisher), (t, f) = ([np.asarray(a, float) for a in pair] for pair in (found, exact))
    p, lower = t.shape[-1], np.linalg.cholesky(f)
    white = np.linalg.inv(lower)
    ratio = white @ fisher @ np.swapaxes(white, -1, -2) - np.eye(p)
    wrong, size = (np.einsum("...ij,...j->...i", white, a) for a in (score - t, t))
    shift = np.linalg.solve(fisher, score[..., None])[..., 0] - np.linalg.solve(f, t[..., None])[..., 0]
    log_ratio = (np.linalg.slogdet(fisher)[1] - np.linalg.slogdet(f)[1]) / p
    return {
        "ratio": float(np.exp(np.mean(log_ratio))),
        "fisher": float(np.sqrt(np.mean(np.sum(ratio**2, (-1, -2)) / p))),
        "score": float(np.sqrt(np.mean(wrong**2) / np.mean(size**2))),
        "sigma": float(np.sqrt(np.mean(np.einsum("...ji,...j->...i", lower, shift) ** 2))),
    }


@dataclasses.dataclass(frozen=True)
class Velocities:
    """Halos in groups of about `richness`; at most `neighbours` of each within `radius` of it are seen.

    `scatter` is the standard deviation of the halos' own velocities, `noise` the median of the measurements' errors,
    whose logarithms scatter by `spread`.
    """

    richness: int = 6
    neighbours: int = 6
    radius: float = 1.0
    scatter: float = 1.0
    noise: float = 0.5
    spread: float = 0.8


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def velocity_graphs(key, toy: Velocities, n_graphs: int, n: int):
    r"""u (n_graphs, 2), a `Graph` of each, and the exact score and Fisher matrix at u = 0.

    With b a receiver's own velocity, integrated out: $F = \sum_r D_r C_r^{-1} D_r^T$,
    $C_r = \mathrm{diag}(\sigma^2) + \tau^2 1 1^T$, D the derivatives (d, (d_x² - d_y²)/d) of its edges. Edge features
    are those two, the velocity and log sigma; nodes have none.
    """
    key_u, key_graph = jax.random.split(key)
    u = jax.random.normal(key_u, (n_graphs, 2))
    graphs, score, fisher = jax.vmap(lambda k, v: _graph(k, v, toy, n))(jax.random.split(key_graph, n_graphs), u)
    return u, graphs, (score, fisher)


def _graph(key, u, toy: Velocities, n: int):
    keys = jax.random.split(key, 5)
    groups = -(-n // toy.richness)
    # The density of groups stays the same: a larger graph is a larger region.
    centres = jnp.sqrt(groups) * jax.random.uniform(keys[0], (groups, 2), minval=0.0, maxval=2.0)
    home = jax.random.randint(keys[1], (n,), 0, groups)
    position = centres[home] + 0.4 * jax.random.normal(keys[2], (n, 2))
    offset = position[None] - position[:, None]
    distance = jnp.sqrt(jnp.sum(offset**2, -1)) + 1e6 * jnp.eye(n)
    k = min(toy.neighbours, n - 1)
    nearest = jnp.argsort(distance, 1)[:, :k]
    d = jnp.take_along_axis(distance, nearest, 1)
    x, y = (jnp.take_along_axis(offset[..., i], nearest, 1) for i in (0, 1))
    mask = d < toy.radius
    shape = jnp.stack([d, (x**2 - y**2) / d], -1)
    sigma = toy.noise * jnp.exp(toy.spread * jax.random.normal(keys[3], d.shape))
    draws = jax.random.normal(keys[4], (n, k + 1))
    velocity = shape @ u + sigma * draws[:, 1:] + toy.scatter * draws[:, :1]
    features = jnp.stack([d, shape[..., 1], velocity, jnp.log(sigma)], -1)
    features = jnp.where(mask[..., None], features, 0.0).reshape(n * k, 4)
    senders, receivers = nearest.reshape(-1), jnp.repeat(jnp.arange(n), k)
    graph = Graph(jnp.zeros((n, 0)), features, senders, receivers, mask.reshape(-1))
    weight = jnp.where(mask, sigma**-2, 0.0)
    return graph, *_velocity_information(weight, shape, velocity, toy.scatter)


def _velocity_information(weight, shape, velocity, scatter):
    """Sums over receivers of D C⁻¹ v and D C⁻¹ Dᵀ, by the Sherman-Morrison formula."""
    s1, sd, sv = weight.sum(1), jnp.einsum("nk,nki->ni", weight, shape), jnp.sum(weight * velocity, 1)
    shared = 1 / (s1 + scatter**-2)
    score = jnp.einsum("nk,nki->i", weight * velocity, shape) - jnp.einsum("n,ni->i", shared * sv, sd)
    fisher = jnp.einsum("nk,nki,nkj->ij", weight, shape, shape) - jnp.einsum("n,ni,nj->ij", shared, sd, sd)
    return score, fisher
