"""Rows of x far from all others are drawn in, and decide nothing; what is returned is of x as it was given."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from targets import gaussian

from diffsbi.inference import NLE, NPE, NRE, load_posterior, pack_frame, rows, streams
from diffsbi.inference.tails import Tails, fit_tails
from diffsbi.prior import Prior

TAILS = Tails(np.array([1.0, -2.0, 7.0]), np.array([2.0, 0.5, 0.0]))
FAR = 2e4  # robust standard deviations


def test_what_is_near_stays_and_what_is_far_is_counted_in_logarithms(x64):
    x = jnp.array([[1.0, 3.0, 1e9], [41.0, -2.0 - 0.5 * 30, 7.0], [-1e6, -6.9, 7.1]])
    y = TAILS.draw_in(x)
    np.testing.assert_array_equal(y[:, 2], x[:, 2])  # a column that mostly does not vary
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_allclose(y[1, :2], [1 + 2 * (10 + np.log(11)), -2 - 0.5 * (10 + np.log(21))])
    np.testing.assert_allclose(TAILS.let_out(y), x, rtol=1e-12)
    slopes = jax.vmap(lambda row: jnp.linalg.slogdet(jax.jacfwd(TAILS.draw_in)(row))[1])(x)
    np.testing.assert_allclose(TAILS.log_slope(x), slopes, rtol=1e-12)
    assert slopes[0] == 0 and np.all(slopes[1:] < -4)
    around = TAILS.draw_in(jnp.array([[21.0 - 1e-6, 0, 0], [21.0, 0, 0], [21.0 + 1e-6, 0, 0]]))[:, 0]
    np.testing.assert_allclose(np.diff(around), 1e-6, rtol=1e-5)


def test_rows_without_tails_are_left_alone():
    x = np.random.default_rng(0).standard_normal((5000, 2))
    assert fit_tails(x) is None
    assert fit_tails(np.where(np.arange(5000)[:, None] < 100, x, 0.0)) is None
    x[17, 1] = -FAR
    centre, scale = fit_tails(x)
    np.testing.assert_allclose(centre, np.median(x, 0))
    np.testing.assert_allclose(scale, 1, atol=0.06)  # three standard errors


def test_columns_of_which_most_rows_are_the_same_keep_their_information():
    rng = np.random.default_rng(0)
    counts = np.where(rng.uniform(size=5000) < 0.6, 1e-6 * rng.standard_normal(5000), rng.lognormal(0, 0.3, 5000))
    assert fit_tails(counts[:, None]) is None
    counts[3] = FAR
    tails = fit_tails(counts[:, None])
    drawn = np.asarray(tails.draw_in(jnp.asarray(counts[:, None])))[:, 0]
    np.testing.assert_array_equal(np.delete(drawn, 3), np.delete(counts, 3).astype(drawn.dtype))
    assert drawn[3] < 30
    few = np.where(rng.uniform(size=5000) < 0.8, 0.0, rng.standard_normal(5000))  # the median deviation is zero
    assert fit_tails(few[:, None]) is None
    few[3] = FAR
    assert fit_tails(few[:, None]).draw_in(jnp.asarray(few[3:4, None]))[0, 0] < 30


def data(sim, far=True):
    """Rows of the linear simulator, of which one is far out, and it alone."""
    draws = sim.draw(jax.random.key(0), 2000)
    theta, x, score = (np.array(a) for a in (draws.theta, draws.x, draws.score))
    x[5] += FAR * far * x.std(0)
    return theta, x, score


def error(sim, posterior):
    """Mean squared difference of means from exact ones in units of the exact widths, and the mean ratio of widths."""
    observed = sim.draw(jax.random.key(2), 20, with_score=False).x
    draws = np.asarray(posterior.sample(jax.random.key(3), 1000, observed))
    means, covariances = jax.jit(jax.vmap(sim.posterior))(observed)
    width = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    return np.sqrt(np.mean(((draws.mean(0) - np.asarray(means)) / width) ** 2)), np.mean(draws.std(0) / width)


@pytest.mark.filterwarnings("ignore:.*far outside:UserWarning")
@pytest.mark.parametrize("kind", [NPE, NLE])
@pytest.mark.parametrize("scored", [True, False])
def test_one_row_does_not_decide_a_fit(linear, kind, scored):
    theta, x, score = data(linear)
    estimator = kind(linear, gaussian).append(theta, x, score if scored else None)
    with pytest.warns(UserWarning, match="1 of 2000 rows of x .*counted in logarithms from 10 on"):
        posterior = estimator.fit(jax.random.key(1), members=1, max_epochs=15)
    shift, width = error(linear, posterior)
    assert shift < 0.15 and abs(width - 1) < 0.06
    np.testing.assert_allclose(posterior.config["x_range"][1], x.max(0), rtol=1e-5)  # as they were given


def test_data_are_kept_as_given_and_files_know_the_tails(linear, tmp_path):
    theta, x, _ = data(linear)
    with pytest.warns(UserWarning, match="counted in logarithms"):
        posterior = NPE(linear, gaussian).append(theta, x).fit(jax.random.key(1), members=1, max_epochs=1)
    observed = jnp.asarray(x[5])
    conditioned = posterior.condition(observed)
    np.testing.assert_array_equal(conditioned.default_x, observed)
    value = conditioned.log_prob(theta[:9])
    np.testing.assert_array_equal(value, posterior.log_prob(theta[:9], observed))
    conditioned.save(tmp_path / "tails")
    loaded = load_posterior(tmp_path / "tails", density=gaussian)
    np.testing.assert_array_equal(loaded.log_prob(theta[:9]), value)
    np.testing.assert_array_equal(loaded.default_x, observed)


PRIOR = Prior({"a": dist.Normal(0.0, 1.0)})


def heavy(n=2000):
    """A location with the noise of Student's t with one and a half degrees of freedom."""
    theta = np.asarray(PRIOR.sample(jax.random.key(0), (n,)))
    return theta, theta + np.random.default_rng(0).standard_t(1.5, (n, 1))


def test_a_likelihood_is_a_density_of_the_data_as_given(x64):
    posterior = NLE(PRIOR, gaussian).append(*heavy()).fit(jax.random.key(1), members=2, max_epochs=5)
    assert "tails" in posterior.config
    edge = jnp.sinh(jnp.linspace(-16, 16, 4001))[:, None]
    middle, width = (edge[1:] + edge[:-1]) / 2, edge[1:, 0] - edge[:-1, 0]
    theta = jnp.array([[0.3]])
    with pytest.warns(UserWarning, match="far outside"):
        density = jnp.exp(posterior.log_likelihood(theta, middle))
    np.testing.assert_allclose(density @ width, 1, rtol=1e-3)


def test_a_ratio_does_not_know_of_coordinates(x64, monkeypatch):
    theta, x = heavy()
    posterior = NRE(PRIOR, width=8).append(theta, x).fit(jax.random.key(1), members=1, max_epochs=2)
    tails = fit_tails(x)
    monkeypatch.setattr(NRE, "_tails", lambda self, x, always: None)
    given = NRE(PRIOR, width=8).append(theta, np.asarray(tails.draw_in(jnp.asarray(x))))
    expected = given.fit(jax.random.key(1), members=1, max_epochs=2)
    far = jnp.asarray(x[np.argsort(-np.abs(x[:, 0]))[:3]])
    np.testing.assert_allclose(
        posterior.log_prob(theta[:3], far), expected.log_prob(theta[:3], tails.draw_in(far)), rtol=1e-9
    )


def test_draws_and_chains_are_of_the_data_as_given():
    posterior = NLE(PRIOR, gaussian).append(*heavy()).fit(jax.random.key(1), members=1, max_epochs=5)
    x = jnp.asarray([60.0])
    assert abs(posterior._data(x) - x) > 1 and "tails" in posterior.config
    settings = dict(n_chains=2, n_warmup=50)
    theta = posterior.sample(jax.random.key(2), 200, x, **settings)
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(2), 0))
    chains = posterior.chains(key, x, n_samples=100, **settings)
    np.testing.assert_allclose(np.sort(theta.ravel()), np.sort(chains.theta.ravel()), rtol=1e-5)


def test_rows_that_are_streamed_have_their_tails_drawn_in(linear, monkeypatch, tmp_path):
    monkeypatch.setattr(streams, "MOST_ROWS", 1000)
    monkeypatch.setattr(rows, "_BLOCK_ROWS", 4096)
    theta, x, _ = data(linear)
    x[[5, 70]] = x[[70, 5]]  # among rows of which the sample that is looked at first has none
    np.save(tmp_path / "x.npy", x)
    theta[[5, 70]] = theta[[70, 5]]
    estimator = NPE(linear, gaussian).append(theta, np.load(tmp_path / "x.npy", mmap_mode="r"))
    posterior = estimator.fit(jax.random.key(1), members=1, max_epochs=5)
    assert "tails" in posterior.config
    np.testing.assert_allclose(posterior.config["x_range"][1], x.max(0), rtol=1e-5)


def test_frames_are_read_as_they_are_and_standardised_without_the_tails():
    rng = np.random.default_rng(0)
    theta = np.asarray(PRIOR.sample(jax.random.key(0), (2000,)))
    mean = theta + 0.5 * rng.standard_normal((2000, 1))
    frame = np.asarray(pack_frame(jnp.asarray(mean), jnp.full((2000, 1, 1), 0.45)))
    more = rng.standard_normal((2000, 1))
    more[3] = FAR
    x = np.concatenate([frame, more], 1)
    with pytest.warns(UserWarning, match="from 10 on in the standardisation, and bounded"):
        posterior = NPE(PRIOR, gaussian, framed=True).append(theta, x).fit(jax.random.key(1), members=1, max_epochs=2)
    assert "tails" not in posterior.config
    c = np.delete(posterior.members[0].standardiser.condition(jnp.asarray(x)), 3, 0)
    spread = np.linalg.svd(c - c.mean(0), compute_uv=False) / np.sqrt(len(c))
    np.testing.assert_allclose(spread, [1, 1, 0], atol=0.15)  # the frame's width does not vary; of one row 0, not 1
