"""The No-U-Turn sampler, and its chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import COVARIANCE, MEAN, normal

from diffsbi.sampling import Chains, load_chains, nuts


def start(n_chains=2, seed=9):
    return 3.0 * jax.random.normal(jax.random.key(seed), (n_chains, 3))


SHORT = dict(names=("a", "b", "c"), block=20, step_size=0.5, max_tree_depth=6)


def short(target=None, **settings):
    return nuts(normal() if target is None else target, start(), jax.random.key(0), 40, 40, **(SHORT | settings))


def assert_same(one: Chains, other: Chains):
    for name in ("theta", "log_density", "energy", "diverging", "num_steps", "step_size"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.gradients == other.gradients and one.settings == other.settings


@pytest.mark.parametrize("settings", [{}, {"mass": "dense", "chain_method": "vectorized"}, {"mass": COVARIANCE}])
def test_a_normal_target_is_sampled_within_monte_carlo_error(x64, settings):
    chains = nuts(normal(), start(4), jax.random.key(1), 300, 1000, **(SHORT | dict(block=100) | settings))
    rows = chains.summary()
    flat = chains.flat()
    for i, name in enumerate("abc"):
        assert rows[name].rhat < 1.01 and rows[name].ess_bulk > 400
        assert abs(rows[name].mean - MEAN[i]) < 4 * rows[name].sd / np.sqrt(rows[name].ess_bulk)
    effective = min(row.ess_tail for row in rows.values())
    root = np.linalg.inv(np.linalg.cholesky(COVARIANCE))
    assert np.abs(root @ np.cov(flat.T) @ root.T - np.eye(3)).max() < 4 * np.sqrt(2 / effective)
    assert chains.n_diverging == 0 and chains.theta.shape == (4, 1000, 3)
    np.testing.assert_allclose(chains.log_density[2, 7], normal()(jnp.asarray(chains.theta[2, 7])), rtol=1e-10)


def test_gradients_are_counted_as_they_are_evaluated(x64):
    calls = []

    def counted(z):
        jax.debug.callback(lambda: calls.append(1))
        return normal()(z)

    chains = short(target=counted)
    jax.effects_barrier()
    assert chains.gradients == len(calls)
    assert chains.sampling_gradients == chains.num_steps.sum() < chains.gradients
    assert np.all(2 ** (chains.tree_depth - 1) <= chains.num_steps) and chains.tree_depth.max() <= 6


def _latent_target(z):
    return -0.5 * jnp.sum(z["u"] ** 2) / 4.0 - 0.5 * jnp.sum((z["xi"] - 1.0) ** 2)


def _latent_init(n_chains=2):
    return {"u": jnp.ones((n_chains, 2)), "xi": jnp.zeros((n_chains, 3, 5))}


def test_positions_may_be_trees_of_which_only_theta_is_kept(tmp_path, x64):
    settings = dict(extract=lambda z: z["u"], names=("p", "q"), block=50, step_size=0.5, folder=tmp_path, n_warmup=100)
    chains = nuts(_latent_target, _latent_init(), jax.random.key(0), n_samples=200, track=lambda z: z["xi"], **settings)
    assert chains.theta.shape == (2, 200, 2) and chains.tracked is not None
    mean, sd = chains.tracked
    assert mean.shape == sd.shape == (3, 5)
    assert np.abs(mean - 1).max() < 4.5 / np.sqrt(100) and np.abs(sd - 1).max() < 4.5 / np.sqrt(2 * 100)
    with np.load(tmp_path / "group00_block00000.npz") as file:
        assert max(file[name].size for name in file.files) <= 100  # no latents in the blocks


def test_a_dense_block_over_some_entries(x64):
    def target(z):
        return normal()(z["u"]) - 0.5 * jnp.sum(z["xi"] ** 2)

    init = {"u": start(), "xi": jnp.zeros((2, 4))}
    settings = dict(extract=lambda z: z["u"], mass=("u",), block=100, step_size=0.3)
    chains = nuts(target, init, jax.random.key(0), 300, 400, **settings)
    row = chains.summary()["theta_1"]
    assert abs(row.mean - MEAN[1]) < 4 * row.sd / np.sqrt(row.ess_bulk) and row.rhat < 1.05


def test_a_stuck_chain_and_a_bottomless_density_say_so_and_keep_their_blocks(tmp_path, x64):
    def needle(z):  # after the start everything diverges
        return jnp.where(jnp.sum(z**2) < 1e-20, 0.0, -1e6 * (1 + jnp.sum(z**2)))

    settings = dict(SHORT, folder=tmp_path / "stuck")
    with pytest.raises(RuntimeError, match="Chain 0 did not move in 20 transitions"):
        nuts(needle, jnp.zeros((1, 3)), jax.random.key(0), 0, 40, **settings)
    assert (tmp_path / "stuck" / "group00_block00000.npz").exists()

    def bottomless(z):
        return jnp.where(z[0] > 1.5, jnp.inf, -0.5 * jnp.sum(z**2))

    settings["folder"] = tmp_path / "bottomless"
    with pytest.raises(RuntimeError, match="Chain 0 has a non-finite energy at transition"):
        nuts(bottomless, jnp.zeros((1, 3)), jax.random.key(0), 0, 200, **settings)
    assert (tmp_path / "bottomless" / "group00_state00000.npz").exists()


def test_starting_points_without_a_density_are_named(x64):
    def half(z):
        return jnp.where(z[0] > 0, -z[0], -jnp.inf)

    with pytest.raises(ValueError, match="starting point of chain 1"):
        nuts(half, jnp.array([[1.0], [-1.0]]), jax.random.key(0), 5, 5)


def test_settings_that_make_no_sense_are_named():
    def call(**settings):
        arguments = dict(log_density=normal(), init=start(), key=jax.random.key(0), n_warmup=5, n_samples=5) | settings
        return nuts(**arguments)

    with pytest.raises(ValueError, match="target_accept < 1.*got"):
        call(target_accept=1.5)
    with pytest.raises(ValueError, match="mass .*got 'units'"):
        call(mass="units")
    with pytest.raises(ValueError, match="max_tree_depth >= 1; got .*0"):
        call(max_tree_depth=0)
    with pytest.raises(ValueError, match=r"shape \(d,\) or \(d, d\); got \(\)"):
        call(mass=2.0)


def test_chains_are_saved_loaded_and_shown_to_arviz(tmp_path, x64):
    chains = short(track=lambda z: z**2)
    chains.save(tmp_path)
    again = load_chains(tmp_path)
    assert_same(chains, again)
    assert again.names == ("a", "b", "c") and again.n_warmup == 40
    np.testing.assert_array_equal(again.tracked[1], chains.tracked[1])
    data = chains.to_arviz()
    np.testing.assert_array_equal(data.posterior["b"].values, chains.theta[..., 1])
    assert data.sample_stats["n_steps"].values.sum() == chains.sampling_gradients
    cost = chains.gradients_per_effective_sample()
    assert cost["a"] == pytest.approx(chains.sampling_gradients / chains.summary()["a"].ess_bulk)
    (tmp_path / "chains.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="chains.npz"):
        load_chains(tmp_path)


def test_diagnostics_see_chains_that_disagree():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(4, 500, 2))
    theta[0, :, 1] += 1.0
    theta[..., 0] = np.cumsum(theta[..., 0], 1) * 0.05 + theta[..., 0]
    blank = np.zeros((4, 500))
    extra = dict(log_density=blank, energy=blank, diverging=blank > 1, num_steps=blank, step_size=np.ones(4))
    chains = Chains(theta=theta, names=("slow", "split"), gradients=0, n_warmup=0, settings={}, **extra)
    rows = chains.summary()
    assert rows["split"].rhat > 1.05 and rows["slow"].ess_bulk < 500
    with pytest.raises(ValueError, match=r"theta with shape \(chains, draws, 1\)"):
        Chains(theta=theta, names=("one",), gradients=0, n_warmup=0, settings={}, **extra)
