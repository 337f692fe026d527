"""Scores averaged over a chain of latents: unbiased whatever the step, less noisy, and exact where theory is."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from one_theta import draws_at

from diffsbi.compression import MarginalScore
from diffsbi.prior import Prior
from diffsbi.sampling.walk import _visit
from diffsbi.simulators import averaging, lsst_y10
from diffsbi.simulators.averaging import average_score
from diffsbi.simulators.base import AbstractSimulator
from diffsbi.simulators.linear_gaussian import linear_gaussian

GRID = np.linspace(-7.0, 7.0, 4001)


class Stars(AbstractSimulator):
    """One latent brightness, seen through a curved response: the marginal score is an integral over one number."""

    prior: Prior = Prior({"gain": dist.Uniform(1.0, 3.0), "level": dist.Normal(0.0, 0.3)})

    def latents(self, theta):
        return dist.Normal(theta[1] * jnp.ones(1), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] * (z + 0.4 * jnp.sin(2 * z)) * jnp.ones(2), 1.0).to_event(1)

    def marginal_score(self, theta, x):
        z = jnp.asarray(GRID)[:, None]
        joint = jax.vmap(lambda z: self.log_conditional(theta, z, x))(z)
        scores = jax.vmap(lambda z: jax.grad(self.log_conditional)(theta, z, x))(z)
        return jax.nn.softmax(joint) @ scores


def residuals(sim, n, n_average, n_steps, exact, theta=None):
    """Averaged minus exact marginal score of n simulations, in units of its own standard error of the mean, and x."""
    draws = sim.draw(jax.random.key(1), n, theta, n_average=n_average, n_steps=n_steps)
    rows = np.asarray(draws.score - jax.jit(jax.vmap(exact))(draws.theta, draws.x))
    return rows, draws


def t_values(rows):
    return rows.mean(0) / (rows.std(0) / np.sqrt(len(rows)))


@pytest.mark.parametrize("n_average, n_steps", [(4, 1), (7, 1), (10, 1), (4, 3), (10, 2)])
def test_the_average_is_unbiased_given_the_data_for_every_step(x64, n_average, n_steps):
    """Against the exact score, and against the row's own score at its own latents, which needs no reference."""
    sim = Stars()
    rows, draws = residuals(sim, 4000, n_average, n_steps, sim.marginal_score)
    own = np.asarray(draws.score - sim.draw(jax.random.key(1), 4000, draws.theta).score)
    x = np.asarray(draws.x.mean(1, keepdims=True))
    for weight in (np.ones_like(x), np.tanh(x), (x > 1).astype(float), x**2 < 0.25):
        assert np.abs(t_values(rows * weight)).max() < 4.5
        assert np.abs(t_values(own * weight)).max() < 4.5


class Noise(AbstractSimulator):
    """Two latents seen in noise of unknown width: scores are quadratic, and those of wrong latents far too large."""

    prior: Prior = Prior({"log_noise": dist.Normal(-0.6, 0.2)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(z, jnp.exp(theta[0])).to_event(1)

    def marginal_score(self, theta, x):
        return jax.grad(lambda t: dist.Normal(0.0, jnp.sqrt(1 + jnp.exp(2 * t[0]))).log_prob(x).sum())(theta)


@pytest.mark.parametrize("n_average, n_steps", [(7, 1), (10, 1), (20, 2)])
def test_every_trajectory_starts_in_equilibrium(x64, n_average, n_steps):
    sim = Noise()
    rows, draws = residuals(sim, 4000, n_average, n_steps, sim.marginal_score, jnp.asarray([-0.6]))
    own = np.asarray(draws.score - sim.draw(jax.random.key(1), 4000, draws.theta).score)
    assert np.abs(t_values(rows)).max() < 4.5
    assert np.abs(t_values(own)).max() < 4.5


def test_without_the_weights_the_mean_would_be_wrong(x64, monkeypatch):
    inner = averaging._steps
    monkeypatch.setattr(averaging, "_steps", lambda *given: (*inner(*given)[:2], jnp.zeros(())))
    sim, theta, rows = Stars(), jnp.asarray([2.5, 0.1]), jnp.arange(8000)
    _, z, x = jax.vmap(lambda k: sim.draw_one(jax.random.fold_in(jax.random.key(2), k), theta))(rows)

    def one(z, x, k):
        score, _ = average_score(sim, theta, z, x, jax.random.key(k), latents="white", n_average=4, n_steps=2)
        return score - sim.marginal_score(theta, x)

    found = np.asarray(jax.jit(jax.vmap(one))(z, x, rows))
    assert np.isfinite(found).all()
    assert np.abs(t_values(found)).max() > 6


def test_trajectories_are_as_long_as_states_are_asked_for(x64, monkeypatch):
    """Once around are seven steps at two a quarter turn; the other two of nine are of a second trajectory."""
    begun, inner = [], averaging._begin
    monkeypatch.setattr(averaging, "_begin", lambda *given: (begun.append(int(given[2])), inner(*given))[1])
    sim = Stars()
    theta, z, x = sim.draw_one(jax.random.key(5))
    with jax.disable_jit():
        average_score(sim, theta, z, x, jax.random.key(0), latents="white", n_average=10, n_steps=2)
    assert begun == [7, 2]


def test_a_trajectory_is_the_same_from_each_of_its_states(x64):
    """Its weighted mean does not tell which state it started at; each was equally likely to be that."""
    sim = Stars()
    theta, z, x = sim.draw_one(jax.random.key(5), jnp.asarray([1.5, 0.1]))
    evaluate = functools.partial(averaging.evaluator(sim, x, "white"), theta)
    key, angle, most = jax.random.key(1), 0.08, 5

    def mean_from(start, momentum, ahead):
        path = averaging._at(start, momentum, most, ahead)
        for place in range(most):
            path = averaging._extended(evaluate, path, place, True, key, angle)
        return path.mean

    state, momentum = evaluate(z), 0.7 * jnp.ones(1)
    expected, values = mean_from(state, momentum, most), []
    for before in range(1, most + 1):
        state, momentum, _ = averaging._steps(evaluate, state, momentum, angle, 1)
        values.append(state.slope_of_setup)
        found = mean_from(state, momentum, most - before)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.ptp(np.stack(values), 0).min() > 0.05
    begin = jax.jit(lambda k, n_steps: averaging._begin(state, jax.random.key(k), 2, n_steps).ahead)
    ahead = [int(begin(k, 1)) for k in range(300)]
    np.testing.assert_allclose(np.bincount(ahead, minlength=3), 100, atol=4 * np.sqrt(300 * 2 / 9))
    ahead = [int(begin(k, 2)) for k in range(300)]  # a quarter turn: one of its ends
    np.testing.assert_allclose(np.bincount(ahead, minlength=3), [150, 0, 150], atol=4 * np.sqrt(300 / 4))


def test_more_draws_less_noise(x64):
    sim = Stars()
    spread = {}
    for k in (1, 4, 16):
        rows, _ = residuals(sim, 1500, k, 3, sim.marginal_score, jnp.asarray([1.5, 0.1]))
        spread[k] = np.median(np.abs(rows), 0)
    assert (spread[4] < 0.9 * spread[1]).all()
    assert (spread[16] < 0.65 * spread[1]).all()


def test_exact_in_the_whitened_coordinate_of_a_linear_simulator(x64):
    sim = linear_gaussian(dim=3, n_latents=4, n_data=5, seed=1)
    draws = sim.draw(jax.random.key(0), 20, latents="whitened", n_average=5)
    assert sim.averaging_steps(jax.random.key(0), "whitened") == 1
    np.testing.assert_allclose(draws.score, jax.vmap(sim.marginal_score)(draws.theta, draws.x), rtol=0, atol=1e-10)


def test_noise_of_a_linear_simulator_in_white_cancels_along_trajectories(x64):
    """The scores, of one draw or averaged, have the exact marginal score for a mean, and noise that theory knows.

    They are linear in latents that are nearly normal (B is small).

    Those of K states of one trajectory add up to |sum_k e^(ik pi/4)|^2 / K^2 of the noise of one, the ends alone to a
    half for K = 3; for K = 10 it is that of a second trajectory, of three states.
    """
    sim = linear_gaussian(dim=2, n_latents=2, n_data=4, seed=3)
    sim = type(sim)(sim.prior, sim.loc, sim.scale, sim.design, 0.1 * sim.mixing, sim.noise)
    found = {k: residuals(sim, 4000, k, 2, sim.marginal_score) for k in (1, 2, 3, 4, 8, 10)}
    noise, x = {k: rows for k, (rows, _) in found.items()}, np.asarray(found[1][1].x)
    shares = {k: np.abs(np.exp(0.25j * np.pi * np.arange(k)).mean()) ** 2 for k in (2, 4, 8)} | {3: 0.5}
    shares[10] = (3 / 11) ** 2 * 0.5
    for k, share in shares.items():
        ratio = noise[k].var(0) / noise[1].var(0)
        np.testing.assert_allclose(ratio, share, atol=4 * share * np.sqrt(4 / 4000) + 0.005)
    # Unbiased given the data: by any function of them, which are the same for every k.
    for rows in noise.values():
        for weight in (np.ones(len(x)), np.tanh(x[:, 0]), (x[:, 1] > 0).astype(float), x[:, 2] * x[:, 3]):
            assert np.abs(t_values(rows * weight[:, None])).max() < 4.5


def test_maps_keep_a_mean_score_of_zero():
    """States all along a trajectory, the way `draw` takes them; at other parameters the mean is not zero."""
    sim = lsst_y10(n_pix=8, side_deg=0.3125, n_bins=2)
    settings = dict(latents="whitened", n_average=8, n_steps=2)

    @eqx.filter_jit
    def averaged(sim, theta, z, x):
        keys = jax.random.split(jax.random.key(4), len(x))
        return jax.vmap(lambda z, x, key: sim.score(theta, z, x, key=key, **settings))(z, x, keys)

    rows = draws_at(sim, sim.fiducial, jax.random.key(4), 400)
    assert np.abs(t_values(np.asarray(averaged(sim, sim.fiducial, *rows)))).max() < 4.5
    wrong = sim.fiducial.at[sim.names.index("sigma_8")].multiply(1.3)
    assert np.abs(t_values(np.asarray(averaged(sim, wrong, *rows)))).max() > 4.5


def test_rows_do_not_depend_on_the_batch_and_the_data_not_on_the_average(x64):
    sim, key = Stars(), jax.random.key(3)
    whole = sim.draw(key, 12, n_average=3)
    for size in (1, 5):
        part = sim.draw(key, 12, n_average=3, batch_size=size)
        np.testing.assert_array_equal(part.score, whole.score)
    np.testing.assert_array_equal(sim.draw(key, 4, n_average=3, start=8).score, whole.score[8:])
    plain = sim.draw(key, 12)
    np.testing.assert_allclose(plain.x, whole.x, rtol=1e-12)
    assert (np.abs(plain.score - whole.score) > 1e-6).any()


def test_score_of_one_draw_and_the_priors_gradient(x64):
    sim = Stars()
    theta, z, x = eqx.filter_jit(sim.draw_one)(jax.random.key(5))
    arguments = dict(n_average=3, n_steps=2, key=jax.random.key(6))
    compiled = eqx.filter_jit(sim.score)
    score = compiled(theta, z, x, **arguments)
    expected, _ = average_score(sim, theta, z, x, jax.random.key(6), latents="white", n_average=3, n_steps=2)
    np.testing.assert_allclose(score, expected, rtol=1e-12)
    with_prior = compiled(theta, z, x, with_prior=True, **arguments)
    np.testing.assert_allclose(with_prior - score, jax.grad(sim.prior.log_prob)(theta), rtol=1e-10, atol=1e-12)


def test_steps_that_are_never_accepted_are_told(x64):
    sim = linear_gaussian(dim=2, n_latents=30, n_data=40, seed=0, noise=0.01)
    with pytest.warns(UserWarning, match="have 0% of the weight"):
        draws = sim.draw(jax.random.key(0), 5, n_average=2, n_steps=1)
    np.testing.assert_allclose(draws.score, sim.draw(jax.random.key(0), 5).score, rtol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.draw(jax.random.key(0), 2, n_average=0), "Expected n_average >= 1 and n_steps >= 1; got 0 and 1"),
        (lambda s: s.draw(jax.random.key(0), 2, n_average=2, n_steps=0), "n_steps >= 1; got 2 and 0"),
        (lambda s: s.score(*s.draw_one(jax.random.key(0)), n_average=2), "Expected a key, for the chain of 2 latents"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(Stars())


@pytest.mark.parametrize("of", ["average_score", "path", "marginal_score"])
def test_only_one_gradient_is_compiled(of):
    """The program has the cosine of the density's slope once: users wait for each."""
    sim, theta, x, key = Stars(), jnp.array([2.0, 0.1]), jnp.ones(2), jax.random.key(0)
    one = jax.make_jaxpr(functools.partial(averaging.evaluator(sim, x, "white"), sim.setup(theta)))(jnp.ones(1))
    if of == "average_score":
        program = jax.make_jaxpr(functools.partial(average_score, sim, latents="white", n_average=5, n_steps=2))(
            theta, jnp.ones(1), x, key
        )
    elif of == "path":
        program = jax.make_jaxpr(lambda u, xi: _visit(sim, x, u, xi, key, 2, 3, 1.0, 0.0, latents="white"))(
            sim.prior.to_unconstrained(theta), jnp.zeros(1)
        )
    else:
        program = jax.make_jaxpr(MarginalScore(sim, theta, latents="white").turns)(x)
    assert str(program).count("= cos ") == str(one).count("= cos ") == 1
