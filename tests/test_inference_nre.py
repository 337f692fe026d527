"""Neural ratio estimation against a ratio that is known."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import diffsbi as ds
from diffsbi.inference import load_posterior
from diffsbi.inference.losses import Contrast
from diffsbi.inference.nre import marginal_offset
from diffsbi.inference.standardise import Standardiser

MATRIX = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5]])
NOISE = 0.7


class ExactRatio:
    """log p(x | theta) / p(x), but for the offset, of x = MATRIX theta + noise with theta ~ N(0, 1)."""

    scale = 1.0

    def log_prob(self, v, c):
        return -0.5 * self.scale * jnp.sum(v**2, -1)


def batch(n, key=0):
    """Standardised rows of that model, and how v changes with c."""
    key_c, key_e = jax.random.split(jax.random.key(key))
    c = jax.random.normal(key_c, (n, 2))
    v = jax.random.normal(key_e, (n, 3))
    zero, one = jnp.zeros, jnp.eye
    standardiser = Standardiser(zero(2), one(2), zero(3), jnp.asarray(MATRIX), NOISE * one(3))
    offset = marginal_offset(standardiser, v, c) + standardiser.log_det
    return {"v": v, "c": c, "offset": offset}, -jnp.asarray(MATRIX) / NOISE


def test_offset_makes_the_linear_models_exact_ratio(x64):
    rows, _ = batch(50)
    x = rows["c"] @ MATRIX.T + NOISE * rows["v"]
    noise = NOISE**2 * np.eye(3)
    marginal = scipy.stats.multivariate_normal(np.zeros(3), noise + MATRIX @ MATRIX.T)
    given = scipy.stats.multivariate_normal(np.zeros(3), noise)
    expected = given.logpdf(x - rows["c"] @ MATRIX.T) - marginal.logpdf(x)
    np.testing.assert_allclose(ExactRatio().log_prob(rows["v"], rows["c"]) + rows["offset"], expected, rtol=1e-9)


def test_one_class_at_even_odds_is_the_cross_entropy(x64):
    rows, along = batch(40)
    loss = Contrast(1, 1.0, along)(ExactRatio(), rows, None)
    x, c = rows["c"] @ MATRIX.T + NOISE * rows["v"], rows["c"]
    right = ExactRatio().log_prob(rows["v"], c) + rows["offset"]
    other = jnp.roll(c, -1, axis=0)
    wrong = ExactRatio().log_prob((x - other @ MATRIX.T) / NOISE, other) + rows["offset"]
    expected = -0.5 * jnp.mean(jax.nn.log_sigmoid(right)) - 0.5 * jnp.mean(jax.nn.log_sigmoid(-wrong))
    np.testing.assert_allclose(loss, expected, rtol=1e-9)


@pytest.mark.parametrize("classes, gamma", [(1, 1.0), (5, 1.0), (3, 4.0)])
def test_the_contrast_is_least_at_the_exact_ratio(x64, classes, gamma):
    rows, along = batch(20_000)

    @jax.jit
    def loss(scale, offset):
        ratio = ExactRatio()
        ratio.scale = scale
        return Contrast(classes, gamma, along)(ratio, rows | {"offset": rows["offset"] + offset}, None)

    slope = jax.jit(jax.grad(loss, (0, 1)))(1.0, 0.0)
    np.testing.assert_allclose(slope, 0.0, atol=0.02)
    for wrong in ((0.6, 0.0), (1.5, 0.0), (1.0, 0.5), (1.0, -0.5)):
        assert loss(*wrong) > loss(1.0, 0.0) + 0.005


@pytest.fixture(scope="module")
def scored(linear):
    draws = linear.draw(jax.random.key(1), 60, latents="whitened")
    return ds.NRE(linear, width=16, depth=1).append(draws.theta, draws.x, draws.score).fit(jax.random.key(2), members=2)


def test_sixty_scored_simulations_give_the_exact_posterior(linear, scored):
    x = linear.draw(jax.random.key(9), 1, with_score=False).x[0]
    chains = scored.chains(jax.random.key(3), x)
    mean, covariance = linear.posterior(x)
    width = np.sqrt(np.diag(covariance))
    assert max(row.rhat for row in chains.summary().values()) < 1.02
    np.testing.assert_allclose((chains.flat().mean(0) - mean) / width, 0.0, atol=0.2)
    np.testing.assert_allclose(chains.flat().std(0) / width, 1.0, atol=0.15)


def test_the_log_ratio_is_near_the_exact_one(linear, scored):
    draws = linear.draw(jax.random.key(5), 200, with_score=False)
    exact = jax.vmap(linear.log_likelihood)(draws.theta, draws.x) - jax.vmap(linear.log_evidence)(draws.x)
    difference = np.asarray(scored.log_likelihood(draws.theta, draws.x) - exact)
    assert np.median(np.abs(difference)) < 0.3 * np.std(exact)


def test_round_trip_and_no_draws_of_data(linear, scored, tmp_path):
    scored.save(tmp_path / "ratio")
    back = load_posterior(tmp_path / "ratio")
    draws = linear.draw(jax.random.key(9), 3, with_score=False)
    np.testing.assert_array_equal(back.log_prob(draws.theta, draws.x), scored.log_prob(draws.theta, draws.x))
    with pytest.raises(NotImplementedError, match="no draws of the data"):
        scored.members[0].sample(jax.random.key(0), 1, draws.theta)


class Quadratic(eqx.Module):
    """A ratio of one's own: normal, of learned width."""

    log_width: jax.Array

    def log_prob(self, v, c):
        return -0.5 * jnp.sum((v * jnp.exp(-self.log_width)) ** 2, -1) - v.shape[-1] * self.log_width


def quadratic(key, dim, condition_dim):
    return Quadratic(jnp.asarray(0.3))


@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("scored", [False, True])
def test_a_network_of_ones_own_learns_its_only_number(linear, classes, scored, tmp_path):
    """v is a standard normal at given theta: its width is one, by contrast, by cross-entropy, and by scores."""
    draws = linear.draw(jax.random.key(1), 800, latents="whitened")
    nre = ds.NRE(linear, quadratic, n_classes=classes).append(draws.theta, draws.x, draws.score if scored else None)
    fitted = nre.fit(jax.random.key(2), members=1, max_epochs=60, learning_rate=1e-2, weight_decay=0.0)
    assert abs(fitted.members[0].density.log_width) < (0.05 if scored else 0.12)
    fitted.save(tmp_path / "ratio")
    back, few = load_posterior(tmp_path / "ratio", density=quadratic), (draws.theta[:3], draws.x[:3])
    np.testing.assert_array_equal(back.log_prob(*few), fitted.log_prob(*few))


def test_a_density_is_no_ratio(linear):
    with pytest.raises(ValueError, match="constructor of a ratio's network, not of a density; got 'smooth'"):
        ds.NRE(linear, "smooth")


@pytest.mark.parametrize("wrong", [{"n_classes": 0}, {"gamma": 0.0}, {"width": 0}])
def test_refusals(linear, wrong):
    with pytest.raises(ValueError, match="Expected n_classes >= 1, gamma > 0"):
        ds.NRE(linear, **wrong)


def test_a_batch_of_one_row_has_no_contrast(linear):
    draws = linear.draw(jax.random.key(0), 20, with_score=False)
    with pytest.raises(ValueError, match="batch_size >= 2; got 1"):
        ds.NRE(linear).append(draws.theta, draws.x).fit(jax.random.key(1), batch_size=1)
