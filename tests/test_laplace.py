"""The Laplace coordinate: a bijection with its exact density on any simulator, exactly white on a linear one."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import diffsbi as ds
from diffsbi.prior import Prior
from diffsbi.sampling.full_field import SAMPLERS, FullFieldTarget
from diffsbi.simulators import AbstractSimulator, Identity, Laplace
from diffsbi.simulators.laplace import THRESHOLD, positive, within
from diffsbi.simulators.linear_gaussian import LinearGaussian

STEPS = 20


class Linear(LinearGaussian):
    def transports(self):
        return {"white": Identity(), "laplace": Laplace(self)}


class Mine(AbstractSimulator):
    """A user's own simulator: what `latents` and `likelihood` return is all that `Laplace` is told."""

    prior: Prior = Prior({"slope": dist.Uniform(1.0, 3.0), "level": dist.Normal(0.0, 0.5)})
    steps: int = eqx.field(static=True, default=6)

    def transports(self):
        return {"white": Identity(), "laplace": Laplace(self, self.steps)}


class Counts(Mine):
    """Positive latents of very different sizes, a `(2, 2)` array of them, seen through Poisson counts."""

    def latents(self, theta):
        scale = jnp.array([[1.0, 10.0], [100.0, 1e4]])
        return dist.Exponential(jnp.exp(theta[1]) / scale).to_event(2)

    def likelihood(self, theta, z):
        return dist.Poisson(theta[0] * jnp.concatenate([z.reshape(-1), z.sum(0)])).to_event(1)


class Bounded(Mine):
    """Bounded latents, correlated by data whose scale varies with them."""

    def latents(self, theta):
        return dist.Uniform(0.0, jnp.exp(theta[1]) * jnp.ones(3)).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] * jnp.cumsum(z), 0.2 + 0.3 * z).to_event(1)


class Folded(Mine):
    """Two modes, and a prior without a mean: no curvature need be positive."""

    def latents(self, theta):
        return dist.Cauchy(theta[1] * jnp.ones(2), 1.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta[0] * z**2, 0.2).to_event(1)


def linear():
    sim = ds.linear_gaussian(dim=3, n_latents=4, n_data=6, seed=1, noise=0.2)
    return Linear(sim.prior, sim.loc, sim.scale, sim.design, sim.mixing, sim.noise)


CASES = {
    "linear": linear,
    "counts": Counts,
    "bounded": Bounded,
    "folded": Folded,
    "unconverged": lambda: Bounded(steps=2),
    "lotka": lambda: ds.lotka_volterra(substeps=STEPS),
}


# "unconverged" is "bounded" with fewer steps.
@pytest.fixture(params=[pytest.param(c, marks=pytest.mark.slow) if c == "bounded" else c for c in CASES])
def sim(request, x64):
    return CASES[request.param]()


@eqx.filter_jit
def account(sim, theta, z, x):
    """Of each row: xi and log-det, back again and the slogdet of the Jacobian, and the density with its gradient."""

    def one(theta, z, x):
        transport = sim.transport("laplace")
        xi, log_det = transport.from_latents(theta, z, x)
        jacobian, (back, inverse) = jax.jacfwd(lambda xi: _twice(transport.to_latents(theta, xi, x)), has_aux=True)(xi)
        slogdet = jnp.linalg.slogdet(jacobian.reshape(z.size, z.size))[1]
        density, score = jax.value_and_grad(lambda t: sim.log_conditional(t, xi, x, latents="laplace"))(theta)
        return xi, log_det, back, inverse, slogdet, density, score

    return jax.vmap(one)(theta, z, x)


def _twice(pair):
    return pair[0], pair


@eqx.filter_jit
def numeric_gradient(sim, theta, xi, x, step):
    """Fourth-order central differences of the density at fixed xi."""

    def one(theta, xi, x, step):
        density = jax.vmap(lambda t: sim.log_conditional(t, xi, x, latents="laplace"))
        shifts = jnp.array([1.0, -1.0, 2.0, -2.0])[:, None, None] * jnp.diag(step)[None]
        values = density((theta[None, None, :] + shifts).reshape(-1, theta.size)).reshape(4, -1)
        return jnp.array([8.0, -8.0, -1.0, 1.0]) @ values / (12 * step)

    return jax.vmap(one)(theta, xi, x, step)


@eqx.filter_jit
def scores(sim, theta, z, x, latents):
    return jax.vmap(lambda t, z, x: sim.score(t, z, x, latents=latents))(theta, z, x)


def draw(sim, n, seed=0, theta=None):
    draws = sim.draw(jax.random.key(seed), n, theta, with_score=False, keep_latents=True)
    return draws.theta, draws.latents, draws.x


def test_a_bijection_with_its_own_density_and_gradient(sim):
    """The gradient is that of the density that is evaluated, whether or not the mode was reached."""
    theta, z, x = draw(sim, 20)
    xi, log_det, back, inverse, slogdet, density, score = account(sim, theta, z, x)
    assert xi.shape == z.shape
    np.testing.assert_allclose(back, z, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(inverse, -log_det, atol=1e-9)
    np.testing.assert_allclose(inverse, slogdet, atol=1e-9)
    white = jax.jit(jax.vmap(sim.log_conditional))(theta, z, x)
    np.testing.assert_allclose(density - inverse, white, rtol=1e-10, atol=1e-10)
    scale = jnp.where(theta > 0, theta, 1.0)
    numeric = scale * numeric_gradient(sim, theta, xi, x, 1e-5 * scale)
    np.testing.assert_allclose(scale * score, numeric, rtol=1e-6, atol=1e-6 * np.abs(numeric).max())


def test_a_linear_simulators_latents_are_exactly_white(x64):
    sim, exact = linear(), ds.linear_gaussian(dim=3, n_latents=4, n_data=6, seed=1, noise=0.2)
    theta, z, x = draw(sim, 20)
    xi, log_det, *_, score = account(sim, theta, z, x)
    whitened, expected = jax.jit(jax.vmap(exact.transport("whitened").from_latents))(theta, z, x)
    np.testing.assert_allclose(xi, whitened, atol=1e-10)
    np.testing.assert_allclose(log_det, expected, atol=1e-10)
    np.testing.assert_allclose(score, jax.jit(jax.vmap(exact.marginal_score))(theta, x), rtol=1e-9, atol=1e-9)


# What is finite in float32 need not be repeated in float64, which reaches further.
@pytest.mark.parametrize("enable", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "float64"])
def test_lotka_volterra_finite_at_prior_draws_with_any_data(enable):
    with jax.enable_x64(enable):
        sim = CASES["lotka"]()
        theta, z, x = draw(sim, 80, seed=1)
        for data in (x, x[::-1]):  # their own, and as a chain meets them at its start
            for rows in np.arange(80).reshape(-1, 20):
                for values in account(sim, theta[rows], z[rows], data[rows]):
                    assert jnp.isfinite(values).all()


def test_lotka_volterra_score_has_no_bias_and_less_noise(x64):
    sim, n = CASES["lotka"](), 500
    rows = draw(sim, n, seed=2, theta=sim.fiducial)
    white, moved = (
        np.asarray(scores(sim, *rows, latents)) * np.asarray(sim.fiducial) for latents in ("white", "laplace")
    )
    assert (np.abs(moved.mean(0)) < 4 * moved.std(0) / np.sqrt(n)).all()
    assert (white.var(0) > 1.5 * moved.var(0)).all()
    # The score's variance is the Fisher information plus its noise: the two share the first.
    shifted = moved.mean(0) + np.cov(moved.T) @ (0.02 * np.ones(4))
    assert (np.abs(shifted) > 4 * moved.std(0) / np.sqrt(n)).any()


@pytest.mark.slow
def test_lotka_volterra_posterior_is_the_same_in_both_coordinates():
    """From starts about the main mode: the posterior has others, which chains from the prior do not leave."""
    sim = CASES["lotka"]()
    x = sim.draw(jax.random.key(4), 1, sim.fiducial, with_score=False).x[0]
    u = sim.prior.to_unconstrained(sim.fiducial)
    v = 0.03 * jax.random.normal(jax.random.key(7), (4, 4))
    xi = 0.3 * jax.random.normal(jax.random.key(8), (4, 2))

    def run(latents, sampler, n, **settings):
        target = FullFieldTarget(sim, x, u, jnp.eye(4), latents)
        running = dict(names=sim.names, extract=target.theta) | settings
        return SAMPLERS[sampler](target, {"v": v, "xi": xi}, jax.random.key(5), n, n, **running).summary()

    first = run("white", "nuts", 300, mass=("v",), max_tree_depth=(6, 8))
    for other in (run("laplace", "nuts", 150, mass=("v",), max_tree_depth=(6, 8)), run("laplace", "hmc", 150)):
        for name, row in first.items():
            error = row.sd * np.hypot(1 / np.sqrt(row.ess_bulk), 1 / np.sqrt(other[name].ess_bulk))
            assert other[name].rhat < 1.03 and abs(other[name].mean - row.mean) < 4 * error


def symmetric(values, seed=0):
    basis, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (len(values), len(values))))
    return (basis * jnp.asarray(values)[None, :]) @ basis.T


def test_positive_leaves_positive_matrices_alone_and_turns_the_others(x64):
    good = symmetric([0.02, 1.0, 1.0, 1e5])
    np.testing.assert_allclose(positive(good), good, rtol=1e-12)
    bad = jnp.linalg.eigvalsh(positive(symmetric([-3.0, -1e-3, 0.0, 2.0])))
    np.testing.assert_allclose(bad[2:], [2.0, 3.0], rtol=1e-12)
    assert (bad[:2] >= 0.37 * THRESHOLD).all()


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 0.0, 5e-3], [-1.0, -1.0, 2.0], [-0.01, 0.01, 0.0099999]])
def test_derivative_of_positive(x64, values):
    matrix, step = symmetric(values), 1e-6
    change = symmetric([1.0, -0.5, 0.3], seed=1)
    numeric = (positive(matrix + step * change) - positive(matrix - step * change)) / (2 * step)
    _, tangent = jax.jvp(positive, (matrix,), (change,))
    np.testing.assert_allclose(tangent, numeric, atol=1e-6)
    reverse = jax.grad(lambda m: jnp.sum(positive(m) * matrix))(matrix)
    np.testing.assert_allclose(jnp.sum(reverse * change), jnp.sum(tangent * matrix), atol=1e-10)


def test_within_is_the_identity_in_the_ball_and_bounded_outside():
    inside = jnp.array([2.0, -1.0])
    np.testing.assert_array_equal(within(inside, 3.0), inside)
    length = lambda s: jnp.linalg.norm(within(s * inside, 3.0))  # noqa: E731
    scales = jnp.logspace(0, 15, 400)  # squares near the end of float32's range
    assert jax.jit(jax.vmap(length))(scales).max() < 1.3 * 3.0
    assert jnp.isfinite(jax.jit(jax.vmap(jax.grad(length)))(scales)).all()


class Dice(Mine):
    def latents(self, theta):
        return dist.Poisson(theta[0]).expand([2]).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(z, 1.0).to_event(1)


class Shares(Dice):
    def latents(self, theta):
        return dist.Dirichlet(theta[0] * jnp.ones(3))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ds.linear_gaussian(n_latents=201), "Expected 1 to 200 latents .* got 201"),
        (ds.two_moons, "Expected 1 to 200 latents .* got 0"),
        (Dice, "continuous latents"),
        (Shares, r"as many degrees of freedom as numbers; got \(3,\), \(2,\) free"),
    ],
)
def test_latents_it_cannot_move_are_refused(make, message):
    sim = make()
    theta, z, x = sim.draw_one(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        Laplace(sim).from_latents(theta, z, x)


def test_settings_and_shapes_are_checked():
    with pytest.raises(ValueError, match="steps >= 1; got 0"):
        Laplace(Counts(), 0)
    with pytest.raises(ValueError, match=r"xi with trailing shape \(2, 2\); got \(4,\)"):
        Laplace(Counts()).to_latents(jnp.array([2.0, 0.0]), jnp.zeros(4), jnp.ones(6))
