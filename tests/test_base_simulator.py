"""The protocol every simulator shares: reproducible rows, scores, coordinates and clear refusals."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from diffsbi.prior import Prior
from diffsbi.simulators.base import AbstractSimulator, AbstractTransport, Identity, draw_shapes
from diffsbi.simulators.linear_gaussian import linear_gaussian


class Sources(AbstractSimulator):
    """A user's own simulator: counts of faint sources, whose fluxes are latent and depend on theta."""

    prior: Prior = Prior({"slope": dist.Uniform(1.0, 3.0), "level": dist.Normal(0.0, 1.0)})

    def latents(self, theta):
        return dist.Normal(theta[1] * jnp.ones(5), 0.5).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(jnp.outer(jnp.ones(3), jnp.tanh(theta[0] * z)), 0.3).to_event(2)


@pytest.fixture
def sources(x64):
    return Sources()


def leaves(draws):
    return [np.asarray(leaf) for leaf in (draws.theta, draws.x, draws.score, draws.latents)]


@pytest.mark.parametrize("make, enable", [(Sources, False), (linear_gaussian, True)], ids=["float32", "float64"])
def test_rows_do_not_depend_on_the_batch_size(make, enable):
    with jax.enable_x64(enable):
        sim, key = make(), jax.random.key(3)
        whole = leaves(sim.draw(key, 12, keep_latents=True))
        for n, size in ((12, 5), (12, 1), (4, None), (1, None)):
            part = leaves(sim.draw(key, n, keep_latents=True, batch_size=size))
            for a, b in zip(whole, part, strict=True):
                np.testing.assert_array_equal(a[:n], b)
        later = leaves(sim.draw(key, 4, keep_latents=True, start=8))
        for a, b in zip(whole, later, strict=True):
            np.testing.assert_array_equal(a[8:], b)
        given = sim.draw(key, 12, whole[0], batch_size=7)
        np.testing.assert_array_equal(given.score, whole[2])


def test_keys_and_rows_differ(sources):
    first, second = sources.draw(jax.random.key(0), 6), sources.draw(jax.random.key(1), 6)
    everything = np.concatenate([first.x, second.x]).reshape(12, -1)
    assert len(np.unique(everything, axis=0)) == 12
    np.testing.assert_array_equal(first.x, sources.draw(jax.random.key(0), 6).x)


def test_theta_latents_and_noise_are_uncorrelated(x64):
    """A key used twice would tie a parameter to a latent or to the noise."""
    sim, n = linear_gaussian(dim=2, n_latents=3, n_data=4), 4000
    draws = sim.draw(jax.random.key(5), n, with_score=False, keep_latents=True)
    noise = draws.x - draws.theta @ sim.design.T - draws.latents @ sim.mixing.T
    correlation = np.corrcoef(np.concatenate([draws.theta, draws.latents, noise], 1).T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_score_against_finite_differences(sources):
    theta, z, x = eqx.filter_jit(sources.draw_one)(jax.random.key(1))
    step = 1e-5 * jnp.eye(2)
    density = jax.jit(lambda t: sources.log_conditional(t, z, x))
    numeric = [(density(theta + e) - density(theta - e)) / 2e-5 for e in step]
    np.testing.assert_allclose(eqx.filter_jit(sources.score)(theta, z, x), np.array(numeric), rtol=1e-7)


def test_score_with_prior_adds_the_priors_gradient(sources):
    theta, z, x = eqx.filter_jit(sources.draw_one)(jax.random.key(2))
    difference = sources.score(theta, z, x, with_prior=True) - sources.score(theta, z, x)
    np.testing.assert_allclose(difference, jax.grad(sources.prior.log_prob)(theta), atol=1e-10)
    assert abs(difference[1]) > 1e-3


def test_log_joint_is_the_sum_of_its_parts(sources):
    theta, z, x = eqx.filter_jit(sources.draw_one)(jax.random.key(4))
    parts = sources.prior.log_prob(theta)
    parts += dist.Normal(theta[1], 0.5).log_prob(z).sum()
    parts += dist.Normal(jnp.tanh(theta[0] * z)[None], 0.3).log_prob(x).sum()
    np.testing.assert_allclose(sources.log_joint(theta, z, x), parts, atol=1e-10)


def test_mean_score_vanishes_at_the_true_parameters(sources):
    n = 1500
    truth = np.array([1.5, 0.4])
    draws = sources.draw(jax.random.key(6), n, theta=truth, keep_latents=True)
    score = np.asarray(draws.score)
    error = score.std(0) / np.sqrt(n)
    assert (np.abs(score.mean(0)) < 4.5 * error).all()
    wrong = jax.jit(jax.vmap(lambda z, x: sources.score(truth + 0.3, z, x)))(draws.latents, draws.x)
    assert (np.abs(wrong.mean(0)) > 4.5 * error).any()


class Doubled(AbstractTransport):
    """z = 2 xi + theta_0."""

    def to_latents(self, theta, xi, x):
        return 2 * xi + theta[0], jnp.log(2.0) * xi.size

    def from_latents(self, theta, z, x):
        return (z - theta[0]) / 2, -jnp.log(2.0) * z.size


class Moved(Sources):
    def transports(self):
        return {"white": Identity(), "doubled": Doubled()}


def test_score_in_another_coordinate(x64):
    sim = Moved()
    theta, z, x = eqx.filter_jit(sim.draw_one)(jax.random.key(7))
    xi = (z - theta[0]) / 2
    by_hand = jax.grad(lambda t: sim.log_conditional(t, 2 * xi + t[0], x))(theta)
    np.testing.assert_allclose(sim.score(theta, z, x, latents="doubled"), by_hand, rtol=1e-10)
    difference = sim.log_joint(theta, xi, x, latents="doubled") - sim.log_joint(theta, z, x)
    np.testing.assert_allclose(difference, 5 * np.log(2), atol=1e-10)
    assert np.abs(sim.score(theta, z, x) - by_hand).max() > 1e-3


@pytest.mark.parametrize("rows", [1, 4])
def test_draw_at_given_parameters(sources, rows):
    theta = sources.prior.sample(jax.random.key(8), (4,)) if rows == 4 else jnp.array([2.0, -1.0])
    draws = sources.draw(jax.random.key(9), 4, theta)
    np.testing.assert_array_equal(draws.theta, jnp.broadcast_to(theta, (4, 2)))
    assert draws.x.shape == (4, 3, 5) and draws.score.shape == (4, 2) and draws.latents is None


def test_draw_leaves_out_what_is_not_asked_for(sources):
    draws = sources.draw(jax.random.key(10), 3, with_score=False, keep_latents=True)
    assert draws.score is None and draws.latents.shape == (3, 5)
    assert len(draws) == 3 and draws.names == sources.names == ("slope", "level")


def test_all_numbers_of_rows_share_one_compilation(x64):
    traces = []

    class Counting(Sources):
        def likelihood(self, theta, z):
            traces.append(1)
            return dist.Normal(jnp.outer(jnp.ones(3), jnp.tanh(theta[0] * z)), 0.3).to_event(2)

    draw = lambda n, *theta, **settings: Counting().draw(jax.random.key(0), n, *theta, **settings)  # noqa: E731
    drawn = draw(4)
    once = len(traces)
    assert len(draw(1).x) == 1 and len(draw(300).x) == 300
    given = draw(4, drawn.theta)
    assert len(traces) == once
    np.testing.assert_array_equal(given.x, drawn.x)
    np.testing.assert_array_equal(draw(4, drawn.theta[0]).x[0], drawn.x[0])
    assert len(draw(7, batch_size=4).x) == 7
    in_fours = len(traces)
    draw(9, drawn.theta[0], batch_size=4)
    assert once < len(traces) == in_fours


def test_shapes_are_those_of_a_draw_and_traced_once_for_one_structure(x64):
    traces = []

    class Sized(AbstractSimulator):
        offset: jax.Array
        n: int = eqx.field(static=True)
        prior: Prior = Prior({"level": dist.Normal(0.0, 1.0)})

        def latents(self, theta):
            return dist.Normal(self.offset * jnp.ones(5), 0.5).to_event(1)

        def likelihood(self, theta, z):
            traces.append(1)
            return dist.Normal(theta[0] * jnp.ones((self.n, 2)), 0.3).to_event(2)

    for n, offset, traced in ((3, 0.0, True), (3, 1.0, False), (4, 1.0, True)):
        before = len(traces)
        sim = Sized(jnp.asarray(offset), n)
        assert [a.shape for a in draw_shapes(sim)] == [(1,), (5,), (n, 2)]
        assert (len(traces) > before) == traced
        assert draw_shapes(sim)[2].dtype == jnp.float64
    with jax.enable_x64(False):
        assert draw_shapes(Sized(jnp.asarray(0.0), 3))[2].dtype == jnp.float32


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.draw(jax.random.key(0), 0), ValueError, "n >= 1 simulations; got 0"),
        (lambda s: s.draw(jax.random.key(0), 3, batch_size=0), ValueError, "batch_size >= 1; got 0"),
        (lambda s: s.draw(0, 3), TypeError, "typed JAX key"),
        (lambda s: s.draw(jax.random.split(jax.random.key(0)), 3), ValueError, r"one key with shape \(\)"),
        (lambda s: s.draw(jax.random.key(0), 3, [1.0, 2.0, 3.0]), ValueError, r"\(2,\) or \(3, 2\); got \(3,\)"),
        (lambda s: s.draw(jax.random.key(0), 3, [0.5, 2.0]), ValueError, "slope inside .* got 0.5"),
        (lambda s: s.draw(jax.random.key(0), 3, [2.0, np.nan]), ValueError, "level inside .* got nan"),
        (lambda s: s.draw(jax.random.key(0), 3, latents="whit"), ValueError, "'whit'.*Did you mean 'white'"),
        (lambda s: s.score(jnp.ones(3), jnp.ones(5), jnp.ones((3, 5))), ValueError, r"shape \(2,\); got \(3,\)"),
    ],
)
def test_refusals(sources, call, error, message):
    with pytest.raises(error, match=message):
        call(sources)


def test_a_simulator_without_likelihood_is_refused():
    class Half(AbstractSimulator):
        prior: Prior = eqx.field(default=None)

        def latents(self, theta):
            return dist.Normal(0.0, 1.0)

    with pytest.raises(TypeError, match="abstract"):
        Half()
