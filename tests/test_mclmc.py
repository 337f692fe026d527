"""Microcanonical Langevin Monte Carlo: exact with a Metropolis test, and biased in a known way without."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import COVARIANCE, MEAN, assert_means, normal

from diffsbi.sampling import Chains, mclmc


class Skewed(eqx.Module):
    """Independent log-gammas, x = log g with g ~ Gamma(k): E x = ψ(k), E e^x = k, var x = ψ'(k)."""

    shape: jax.Array

    def __call__(self, z):
        return jnp.sum(self.shape * z - jnp.exp(z))


class Coupled(eqx.Module):
    """v ~ N(0, 1) and d latents of width exp(-a v): every latent's curvature follows the one global parameter."""

    a: jax.Array

    def __call__(self, z):
        v, xi = z["v"][0], z["xi"]
        return -0.5 * v**2 - 0.5 * jnp.exp(2 * self.a * v) * jnp.sum(xi**2) + xi.size * self.a * v


def start(n_chains=4):
    return 3.0 * jax.random.normal(jax.random.key(9), (n_chains, 3))


def run(n_warmup=200, n_samples=1500, *, target=None, init=None, key=1, **settings) -> Chains:
    init = start() if init is None else init
    return mclmc(target or normal(), init, jax.random.key(key), n_warmup, n_samples, **(dict(block=100) | settings))


def test_adjusted_a_correlated_normal_is_sampled_within_monte_carlo_error(x64):
    root = np.linalg.inv(np.linalg.cholesky(COVARIANCE))
    whiten = lambda z: root @ (z - MEAN)  # noqa: E731
    second = lambda w: jnp.stack([*(w**2), w[0] * w[1], w[0] * w[2], w[1] * w[2]])  # noqa: E731
    extract = lambda z: jnp.concatenate([z, second(whiten(z))])  # noqa: E731
    chains = run(extract=extract)
    assert_means(chains, [*MEAN, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    assert chains.n_diverging == 0 and chains.settings["sampler"] == "mclmc"
    assert "energy_variance" not in chains.settings and "n_steps" not in chains.settings


def test_adjusted_a_skewed_target_is_sampled_exactly(x64):
    from scipy.special import polygamma, psi

    k = np.array([0.7, 1.5, 4.0])
    extract = lambda z: jnp.concatenate([z, jnp.exp(z), (z - psi(k)) ** 2])  # noqa: E731
    chains = run(n_samples=2500, target=Skewed(jnp.asarray(k)), extract=extract)
    assert_means(chains, np.concatenate([psi(k), k, polygamma(1, k)]))


def coupled_bias(**settings) -> tuple[float, float]:
    """Mean of v, which is 0 exactly, in the midst of 1000 latents, and its standard error."""
    key_v, key_xi = jax.random.split(jax.random.key(5))
    v = jax.random.normal(key_v, (4, 1))
    init = {"v": v, "xi": jax.random.normal(key_xi, (4, 1000)) * jnp.exp(-0.02 * v)}
    settings = dict(target=Coupled(jnp.asarray(0.02)), init=init, extract=lambda z: z["v"]) | settings
    row = run(150, 400, chain_method="vectorized", **settings).summary()["theta_0"]
    assert row.rhat < 1.05 and row.ess_bulk > 100
    return row.mean, row.sd / np.sqrt(row.ess_bulk)


@pytest.mark.optimised
def test_unadjusted_a_global_parameter_is_biased_and_less_so_at_a_smaller_energy_error(x64):
    """The bias is of order ε² ~ (energy variance)^(1/3): a hundredth of the variance leaves 1 / 4.6 of it."""
    unadjusted = dict(adjusted=False, n_steps=10)
    large, error = coupled_bias(energy_variance=1e-3, **unadjusted)
    small, small_error = coupled_bias(energy_variance=1e-5, **unadjusted)
    assert abs(large) > 10 * error and abs(large) > 0.4, (large, error)
    noise = np.hypot(small_error, error / 4.6)
    assert abs(small - large / 4.6) < 4 * noise + 0.03, (large, error, small, small_error)  # 0.03: higher orders
    exact, exact_error = coupled_bias()
    assert abs(exact) < 4 * exact_error < 0.7 * abs(large), (exact, exact_error)


@pytest.mark.parametrize("adjusted", [True, False])
def test_gradients_are_counted_as_they_are_evaluated(x64, adjusted):
    calls = []

    def counted(z):
        jax.debug.callback(lambda: calls.append(1))
        return normal()(z)

    chains = run(40, 20, target=counted, adjusted=adjusted, n_steps=3, block=20)
    jax.effects_barrier()
    assert chains.gradients == len(calls)
    assert chains.sampling_gradients == chains.num_steps.sum() < chains.gradients
    if not adjusted:
        assert (chains.num_steps == 2 * 3).all()


def test_starting_points_without_a_density_are_named():
    def half(z):
        return jnp.where(z[0] > 0, -jnp.sum(z**2), jnp.nan)

    for adjusted in (True, False):
        with pytest.raises(ValueError, match="starting point of chain 1"):
            mclmc(half, jnp.array([[1.0, 1.0], [-1.0, 1.0]]), jax.random.key(0), 5, 5, adjusted=adjusted)


def test_settings_that_make_no_sense_are_named():
    for setting in (dict(decoherence=0.0), dict(energy_variance=-1e-3), dict(step_size=-0.5), dict(n_steps=0)):
        with pytest.raises(
            ValueError, match=f"Expected decoherence, energy_variance.* got .*{next(iter(setting.values()))}"
        ):
            run(**setting)
    with pytest.raises(ValueError, match="0 < target_accept < 1; got .* and 1.5"):
        run(target_accept=1.5)
    with pytest.raises(ValueError, match="two dimensions.*got 1"):
        run(init=jnp.ones((2, 1)), target=lambda z: -0.5 * jnp.sum(z**2))
