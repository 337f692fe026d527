"""The exact Fisher information of the Gaussian field of `experiments.imnn`, and what its band powers keep of it."""

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi.compression.information import information
from diffsbi.simulators.fields import hartley
from experiments.imnn import Bands, amplitude, field_information, field_score, information_by_score

THETA, N = np.array([1.2, 0.7]), 8


def test_the_information_of_the_modes_is_that_of_the_pixels(x64):
    """F = tr(C^-1 dC C^-1 dC) / 2 with the dense covariance of the pixels, of rank n^2 - 1."""

    def covariance(theta):
        unit = jnp.eye(N * N).reshape(-1, N, N)
        root = hartley(amplitude(theta, N)[None] * unit).reshape(N * N, -1)
        return root.T @ root

    theta = jnp.asarray(THETA)
    inverse = np.linalg.pinv(covariance(theta), rcond=1e-10)
    slope = np.moveaxis(np.asarray(jax.jacfwd(covariance)(theta)), -1, 0)
    dense = [[0.5 * np.trace(inverse @ a @ inverse @ b) for b in slope] for a in slope]
    np.testing.assert_allclose(field_information(N, THETA), dense, rtol=1e-8)
    assert field_information(128)[0, 0] == (128**2 - 1) / 2, "both quadrants, axes and Nyquist modes"


def test_the_score_and_the_bands(x64):
    theta = jnp.asarray(THETA)
    white = jax.random.normal(jax.random.key(0), (4000, N, N))
    modes = amplitude(theta, N)[None] * white

    def log_prob(theta, x):
        root = amplitude(theta, N)
        inside = root > 0
        root = jnp.where(inside, root, 1.0)
        return jnp.sum(jnp.where(inside, -0.5 * (x / root) ** 2 - jnp.log(root), 0.0))

    score = jax.vmap(lambda x: field_score(x, theta, N))(modes)
    np.testing.assert_allclose(score[0], jax.grad(log_prob)(theta, modes[0]), rtol=1e-9)
    np.testing.assert_allclose(np.cov(score.T), field_information(N, THETA), rtol=0.15)
    y = np.asarray(jax.vmap(Bands(N, THETA, 4))(modes), float)
    np.testing.assert_allclose(y.std(0), 1, rtol=0.1)
    kept = information_by_score(y, np.asarray(score), field_information(N, THETA))
    np.testing.assert_allclose(kept, field_information(N, THETA), rtol=1e-5)


def test_the_score_as_control_variate_agrees_with_the_moments():
    """A normal mean in x_1, noise in x_2: t = x_1 + x_2 knows half of it, by both estimators."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20_000, 2))
    t, slope = x.sum(1, keepdims=True), np.ones((20_000, 1, 1))
    by_score = information_by_score(t, x[:, :1], np.eye(1))
    np.testing.assert_allclose([by_score, information(t, slope, np).unbiased], 0.5, rtol=0.05)
