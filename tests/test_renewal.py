"""Fresh noise keeps data, latents and scores consistent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.simulators import fresh_noise


@pytest.fixture(scope="module")
def draws(linear):
    return linear.draw(jax.random.key(0), 2000, keep_latents=True)


def test_scores_belong_to_the_new_data(linear, draws):
    new = fresh_noise(linear, jax.random.key(1), draws, latents="whitened")
    np.testing.assert_array_equal(new.theta, draws.theta)
    np.testing.assert_array_equal(new.latents, draws.latents)
    # The whitened score of a linear Gaussian is the marginal score of its data, exactly.
    exact = jax.vmap(linear.marginal_score)(new.theta, new.x)
    np.testing.assert_allclose(new.score, exact, rtol=1e-3, atol=1e-3)
    former = jax.vmap(linear.marginal_score)(draws.theta, draws.x)
    assert np.abs(former - exact).mean() > 0.1, "other noise must have another score"


def test_new_data_are_drawn_like_the_old(linear, draws):
    new = fresh_noise(linear, jax.random.key(1), draws)
    for a, b in ((new.x, draws.x), (new.score, draws.score)):
        error = np.asarray(a).std(0) / np.sqrt(len(a))
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 5 * error)
        np.testing.assert_allclose(np.cov(a.T), np.cov(b.T), atol=0.15 * np.abs(np.cov(b.T)).max())
    assert not np.any(np.all(np.asarray(new.x) == np.asarray(draws.x), axis=1))


def test_rows_do_not_depend_on_the_others_and_scores_are_optional(linear, draws):
    few = jax.tree.map(lambda a: a[:3], draws)
    np.testing.assert_array_equal(
        fresh_noise(linear, jax.random.key(1), few).x, fresh_noise(linear, jax.random.key(1), draws).x[:3]
    )
    bare = linear.draw(jax.random.key(0), 3, with_score=False, keep_latents=True)
    assert fresh_noise(linear, jax.random.key(1), bare).score is None
    with pytest.raises(ValueError, match="Expected draws with latents"):
        fresh_noise(linear, jax.random.key(1), linear.draw(jax.random.key(0), 3))
    assert jnp.all(jnp.isfinite(bare.x))
