"""Hamiltonian Monte Carlo about a standard normal: its integrator, its warm-up, its chains."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.mcmc.integrators import IntegratorState
from targets import COVARIANCE, MEAN, Normal, assert_means, normal

from diffsbi.integrators import gaussian_split
from diffsbi.sampling import Chains, hmc
from diffsbi.sampling.hmc import INTEGRATORS, HMCKernel


def standard_normal(q):
    return -0.5 * jnp.sum(q**2)


def quartic(q):
    """No normal: coupled and with heavier walls."""
    return -0.5 * jnp.sum(q**2) - 0.25 * jnp.sum(q**4) - 0.5 * q[0] ** 2 * q[1]


def point(q, p, log_density):
    return IntegratorState(q, p, *jax.value_and_grad(log_density)(q))


def hamiltonian(state) -> float:
    return float(0.5 * jnp.sum(state.momentum**2) - state.logdensity)


@eqx.filter_jit
def _integrate(log_density, state, step_size, n):
    step = gaussian_split(log_density)
    return jax.lax.fori_loop(0, n, lambda _, s: step(s, step_size), state)


def integrate(log_density, state, step_size, n):
    return _integrate(log_density, state, jnp.asarray(step_size, state.position.dtype), jnp.asarray(n))


def somewhere(dim=4):
    q, p = jax.random.normal(jax.random.key(1), (2, dim))
    return 0.7 * q, p


# -- the integrator ----------------------------------------------------------------------------------------------------


def test_a_trajectory_with_its_momentum_flipped_returns(x64):
    there = integrate(quartic, point(*somewhere(), quartic), 0.3, 20)
    back = integrate(quartic, there._replace(momentum=-there.momentum), 0.3, 20)
    q, p = somewhere()
    assert np.abs(there.position - q).max() > 0.3
    np.testing.assert_allclose(back.position, q, atol=1e-12)
    np.testing.assert_allclose(-back.momentum, p, atol=1e-12)


@pytest.mark.parametrize("step_size", [0.1, 0.9, 2.5])
def test_a_step_preserves_volume(x64, step_size):
    def flow(qp):
        state = integrate(quartic, point(qp[:3], qp[3:], quartic), step_size, 2)
        return jnp.concatenate([state.position, state.momentum])

    jacobian = jax.jacfwd(flow)(jnp.concatenate(somewhere(3)) * 0.5)
    assert np.abs(jacobian - np.eye(6)).max() > 0.1
    assert np.linalg.det(jacobian) == pytest.approx(1.0, abs=1e-10 * np.linalg.norm(jacobian) ** 2)


def test_the_energy_error_is_of_second_order(x64):
    state = point(*somewhere(), quartic)
    steps = np.array([40, 80, 160, 320])
    errors = np.abs([hamiltonian(integrate(quartic, state, 2.0 / n, n)) - hamiltonian(state) for n in steps])
    orders = -np.diff(np.log(errors)) / np.log(2)
    np.testing.assert_allclose(orders, 2.0, atol=0.05)


@pytest.mark.parametrize("step_size", [0.1, 1.0, 2.0, 3.0])
def test_a_standard_normal_is_solved_exactly(x64, step_size):
    q, p = somewhere()
    state = point(q, p, standard_normal)
    after = integrate(standard_normal, state, step_size, 7)
    assert abs(hamiltonian(after) - hamiltonian(state)) < 1e-12
    cos, sin = np.cos(7 * step_size), np.sin(7 * step_size)
    np.testing.assert_allclose(after.position, cos * q + sin * p, atol=1e-12)
    np.testing.assert_allclose(after.momentum, cos * p - sin * q, atol=1e-12)


def test_float32_does_not_drift_in_many_dimensions():
    """A rotation by cos and sin does: their rounded squares do not add to one, and 10^5 dimensions add that up."""
    q, p = jax.random.normal(jax.random.key(0), (2, 100_000))

    def energy(q, p):
        return 0.5 * np.sum(np.asarray(q, float) ** 2) + 0.5 * np.sum(np.asarray(p, float) ** 2)

    @jax.jit
    def rotate(q, p, angle):
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jax.lax.fori_loop(0, 200, lambda _, s: (cos * s[0] + sin * s[1], cos * s[1] - sin * s[0]), (q, p))

    drift, plain = [], []
    for step_size in (0.3, 0.37, 0.5, 0.71, 1.0):
        after = integrate(standard_normal, point(q, p, standard_normal), jnp.float32(step_size), 100)
        assert after.position.dtype == jnp.float32
        drift.append(energy(after.position, after.momentum) - energy(q, p))
        plain.append(energy(*rotate(q, p, jnp.float32(step_size / 2))) - energy(q, p))
    assert np.abs(drift).max() < 0.1, drift
    assert np.abs(plain).max() > 0.5, plain


# -- chains ------------------------------------------------------------------------------------------------------------


class Correlated(eqx.Module):
    """A correlated normal v, and latents that lean on it: their mean is v_0."""

    of_v: Normal

    def __call__(self, z):
        return self.of_v(z["v"]) - 0.5 * jnp.sum((z["xi"] - 0.5 * z["v"][0]) ** 2)


def correlated(scale=1.0):
    return Correlated(normal(scale))


def start(n_chains=4):
    return {"v": 3.0 * jax.random.normal(jax.random.key(9), (n_chains, 3)), "xi": jnp.zeros((n_chains, 5))}


def v(z):
    return z["v"]


def xi(z):
    return z["xi"]


SETTINGS = dict(adapt="v", extract=v, track=xi, block=100)


def run(n_warmup=200, n_samples=1000, *, target=None, init=None, key=1, **settings) -> Chains:
    settings = SETTINGS | settings
    init = start() if init is None else init
    return hmc(target or correlated(), init, jax.random.key(key), n_warmup, n_samples, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"chain_method": "vectorized"}, {"integrator": "leapfrog", "trajectory": 1.5}],
    ids=["sequential", "vectorized", "leapfrog"],
)
def test_a_correlated_normal_is_sampled_within_monte_carlo_error(x64, settings):
    chains = run(**settings)
    assert_means(chains, MEAN)
    effective = min(row.ess_tail for row in chains.summary().values())
    root = np.linalg.inv(np.linalg.cholesky(COVARIANCE))
    assert np.abs(root @ np.cov(chains.flat().T) @ root.T - np.eye(3)).max() < 4 * np.sqrt(2 / effective)
    np.testing.assert_allclose(chains.tracked[0], 0.5 * MEAN[0], atol=4 * np.sqrt(1.25 / effective))
    np.testing.assert_allclose(chains.tracked[1], np.sqrt(1.25), rtol=4 * np.sqrt(0.5 / effective))
    assert chains.n_diverging == 0 and chains.theta.shape == (4, 1000, 3)
    assert chains.settings["sampler"] == "hmc" and chains.settings["adapt"] == "v"


class Skewed(eqx.Module):
    """Independent log-gammas, x = log g with g ~ Gamma(k): E x = ψ(k), E e^x = k, var x = ψ'(k)."""

    shape: jax.Array

    def __call__(self, z):
        return jnp.sum(self.shape * z["v"] - jnp.exp(z["v"])) - 0.5 * jnp.sum(z["xi"] ** 2)


def test_a_skewed_target_is_sampled_exactly(x64):
    from scipy.special import polygamma, psi

    k = np.array([0.7, 1.5, 4.0])
    with_moments = dict(extract=lambda z: jnp.concatenate([z["v"], jnp.exp(z["v"]), (z["v"] - psi(k)) ** 2]))
    chains = run(n_samples=2000, target=Skewed(jnp.asarray(k)), **with_moments)
    assert_means(chains, np.concatenate([psi(k), k, polygamma(1, k)]))


class Banana(eqx.Module):
    """x ~ N(0, 1), y | x ~ N(0.4 x², 1)."""

    def __call__(self, z):
        x, y, w = z["v"]
        return -0.5 * x**2 - 0.5 * (y - 0.4 * x**2) ** 2 - 0.5 * w**2 - 0.5 * jnp.sum(z["xi"] ** 2)


def test_a_banana_has_its_moments(x64):
    def moments(z):
        x, y, _ = z["v"]
        return jnp.stack([x, y, x**2, (y - 0.4) ** 2, x**2 * y])

    chains = run(target=Banana(), n_samples=2000, extract=moments)
    assert_means(chains, [0.0, 0.4, 1.0, 1.0 + 0.16 * 2, 0.4 * 3])


def test_both_ways_of_running_chains_draw_the_same(x64):
    one, other = (run(n_samples=100, chain_method=method) for method in ("sequential", "vectorized"))
    np.testing.assert_array_equal(one.num_steps, other.num_steps)
    np.testing.assert_allclose(one.theta, other.theta, atol=1e-6)
    np.testing.assert_allclose(one.energy, other.energy, atol=1e-6)


def test_the_step_size_is_capped_where_any_step_is_accepted(x64):
    init = {"v": jnp.ones((2, 3)), "xi": jnp.ones((2, 5))}
    chains = hmc(Free(), init, jax.random.key(0), 100, 100, trajectory=1.3, **(SETTINGS | dict(adapt=None)))
    np.testing.assert_allclose(chains.step_size, 1.4 * 1.3)
    assert (chains.num_steps == 2).all()
    assert not (chains.theta[:, 1:] == chains.theta[:, :-1]).all(-1).any()  # all accepted: there is no error


class Free(eqx.Module):
    def __call__(self, z):
        return -0.5 * jnp.sum(z["v"] ** 2) - 0.5 * jnp.sum(z["xi"] ** 2)


def test_a_change_of_frame_moves_nothing(x64):
    """At the windows of warm-up position, density and gradient stay; only their coordinates change."""
    kernel = HMCKernel(
        correlated(), n_warmup=100, adapt="v", trajectory=2.0, target_accept=0.8, step_size=0.3, integrator="split",
        max_steps=200,
    )  # fmt: skip
    assert kernel._windows == (15, 40, 80)
    step, outward, reframe = map(eqx.filter_jit, (kernel.step, kernel.position, kernel._reframe))
    value_and_grad = jax.jit(jax.value_and_grad(kernel.log_density))
    one = jax.tree.map(lambda a: a[0], start())
    state = kernel.start(one, jax.random.key(0))
    changed = []
    for i in range(102):
        before = state
        state, record = step(state)
        position = outward(state)
        value, slope = value_and_grad(position)
        np.testing.assert_allclose(record.log_density, value, rtol=1e-10)
        np.testing.assert_allclose(state.hmc.logdensity, value, rtol=1e-10)
        np.testing.assert_allclose(state.hmc.logdensity_grad["xi"], slope["xi"], rtol=1e-9, atol=1e-9)
        inner = jnp.linalg.solve(state.frame.root.T, state.hmc.logdensity_grad["v"])
        np.testing.assert_allclose(inner, slope["v"], rtol=1e-9, atol=1e-9)
        if not np.array_equal(before.frame.centre, state.frame.centre):
            changed.append(i)
            again = reframe(state._replace(spread=before.spread))
            np.testing.assert_allclose(outward(again)["v"], position["v"], rtol=1e-10)
    assert changed == [15, 40, 80]
    assert state.frame.root[1, 0] != 0 and np.all(np.linalg.eigvalsh(state.frame.root @ state.frame.root.T) > 0)


def test_the_frame_learns_a_width_that_is_not_one(x64):
    """Of a hundredth: without the frame, the steps are as short, and the longest trajectory allowed is a short one."""
    chains, plain = run(target=correlated(0.01)), run(target=correlated(0.01), n_samples=100, adapt=None, max_steps=10)
    assert_means(chains, 0.01 * MEAN)
    assert np.all(chains.step_size > 4 * plain.step_size)
    assert plain.num_steps.max() == 2 * 10


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_gradients_are_counted_as_they_are_evaluated(x64, integrator):
    calls = []

    def counted(z):
        jax.debug.callback(lambda: calls.append(1))
        return correlated()(z)

    chains = run(70, 20, target=counted, integrator=integrator, block=20)
    jax.effects_barrier()
    assert chains.gradients == len(calls)
    assert chains.sampling_gradients == chains.num_steps.sum() < chains.gradients


def test_starting_points_without_a_density_are_named():
    def half(q):
        return jnp.where(q[0] > 0, -jnp.sum(q**2), -jnp.inf)

    with pytest.raises(ValueError, match="starting point of chain 1"):
        hmc(half, jnp.array([[1.0, 1.0], [-1.0, 1.0]]), jax.random.key(0), 5, 5)


def test_settings_that_make_no_sense_are_named():
    expected = "target_accept < 1, step_size > 0, trajectory > 0 and max_steps >= 1; got "
    for setting in (dict(target_accept=1.0), dict(step_size=0.0), dict(trajectory=-1.0), dict(max_steps=0)):
        with pytest.raises(ValueError, match=f"{expected}.*{next(iter(setting.values()))}"):
            run(**setting)
    with pytest.raises(ValueError, match="integrator 'split' or 'leapfrog'; got 'euler'"):
        run(integrator="euler")
    with pytest.raises(ValueError, match="adapt to name a vector .*'theta'"):
        run(adapt="theta")
    with pytest.raises(ValueError, match="adapt to name a vector .*'v'"):
        run(init=jnp.zeros((2, 3)), extract=None, track=None)
    with pytest.raises(ValueError, match="n_warmup >= 0.*got"):
        run(-1)
