"""Chains in resumable blocks: damage, kills, stopping, and what the bar says; no sampler in particular."""

import os
import subprocess
import sys
import textwrap
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.sampling import Chains, hmc, load_chains, mclmc, nuts
from diffsbi.sampling.chains import ess_bulk, rhat
from diffsbi.sampling.kernels import UNKNOWN, AbstractKernel, Record
from diffsbi.sampling.runner import sample


class Metropolis(AbstractKernel):
    """A random walk that knows no gradient: the cheapest kernel to compile, and a lively one."""

    log_density: eqx.Module
    n_warmup: int = eqx.field(static=True)
    scale: float = 1.0

    def account(self):
        return dict(n_warmup=self.n_warmup, scale=self.scale, sampler="metropolis")

    def start(self, position, key):
        return position, jnp.asarray(UNKNOWN), key, jnp.asarray(True)

    def step(self, state):
        position, value, key, starting = state
        key, key_move, key_accept = jax.random.split(key, 3)
        move = jnp.where(starting, 0.0, self.scale) * jax.random.normal(key_move, position.shape)
        there = self.log_density(position + move)
        accept = jnp.log(jax.random.uniform(key_accept)) < there - value
        position, value = jnp.where(accept, position + move, position), jnp.where(accept, there, value)
        row = Record(value, -value, jnp.isnan(there), jnp.asarray(1), jnp.asarray(self.scale))
        return (position, value, key, jnp.asarray(False)), row

    def position(self, state):
        return state[0]


class Normal(eqx.Module):
    """A normal target: an `eqx.Module`, so that every test shares one compiled program."""

    width: jax.Array

    def __call__(self, z):
        return -0.5 * jnp.sum((z / self.width) ** 2)


def normal(width=1.0):
    return Normal(jnp.asarray([1.0, 2.0, 0.5]) * width)


def start(n_chains=2):
    return jax.random.normal(jax.random.key(9), (n_chains, 3))


def short(folder=None, n_samples=40, *, key=0, init=None, kernel=None, **running):
    """Two chains of 40 + 40 transitions in 4 blocks, unless told otherwise."""
    kernel = kernel or Metropolis(normal(), 40)
    running = dict(names=("a", "b", "c"), block=20, track=jnp.square, folder=folder) | running
    return sample(kernel, start() if init is None else init, jax.random.key(key), n_samples, **running)


def assert_same(one: Chains, other: Chains):
    for name in ("theta", "log_density", "energy", "diverging", "num_steps", "step_size"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.gradients == other.gradients and one.settings == other.settings and one.names == other.names
    assert (one.tracked is None) == (other.tracked is None)
    for here, there in zip(one.tracked or (), other.tracked or (), strict=True):
        np.testing.assert_array_equal(here, there)


def block(folder, k, group=0):
    return folder / f"group{group:02d}_block{k:05d}.npz"


def state(folder, k, group=0):
    return folder / f"group{group:02d}_state{k:05d}.npz"


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def never(account):
    pytest.fail("sampled again")


# -- interruption ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(n: int):
    """A callback that interrupts the run at its n-th block, and the accounts that it saw."""
    seen = []

    def stop(account):
        seen.append(account)
        if len(seen) == n:
            raise Stop

    return stop, seen


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, x64, method):
    whole = short(chain_method=method)
    stop, seen = stop_at(2)
    with pytest.raises(Stop):
        short(tmp_path, chain_method=method, on_block=stop)
    assert sorted(seen[-1]["done"]) == ([20, 20] if method == "sequential" else [40, 40])
    accounts = []
    resumed = short(tmp_path, chain_method=method, on_block=accounts.append)
    assert len(accounts) == (6 if method == "sequential" else 2)
    assert accounts[-1]["gradients"] == resumed.gradients
    assert_same(whole, resumed)
    assert_same(whole, short(tmp_path, chain_method=method, on_block=never))


SAMPLERS = {
    "hmc": lambda *a, **k: hmc(*a, 70, 30, adapt="v", **k),
    "mclmc": lambda *a, **k: mclmc(*a, 40, 40, **k),
    "unadjusted": lambda *a, **k: mclmc(*a, 40, 40, adjusted=False, **k),
    "nuts": lambda *a, **k: nuts(*a, 40, 40, mass=("v",), step_size=0.5, max_tree_depth=4, **k),
}


class Latents(eqx.Module):
    """Latents whose width follows a parameter."""

    def __call__(self, z):
        return -0.5 * jnp.sum(z["v"] ** 2) - 0.5 * jnp.sum((z["xi"] / (1 + z["v"][0] ** 2)) ** 2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_resumes_bit_for_bit_in_the_midst_of_warm_up(tmp_path, x64, name):
    init = {"v": start()[:, :2], "xi": jnp.ones((2, 5))}
    running = dict(extract=lambda z: z["v"], track=lambda z: z["xi"], block=20, folder=tmp_path / "stopped")
    arguments = (Latents(), init, jax.random.key(3))
    stop, _ = stop_at(1)
    with pytest.raises(Stop):
        SAMPLERS[name](*arguments, **running, on_block=stop)
    assert len(list((tmp_path / "stopped").glob("*block*"))) in (1, 2)
    resumed = SAMPLERS[name](*arguments, **running)
    assert_same(SAMPLERS[name](*arguments, **(running | dict(folder=None))), resumed)
    assert not (resumed.theta[:, 1:] == resumed.theta[:, :-1]).all((1, 2)).any() and resumed.settings["block"] == 20


def test_more_samples_continue_the_chains(tmp_path, x64):
    short(tmp_path, n_samples=30)
    longer = short(tmp_path, n_samples=60)
    assert_same(longer, short(n_samples=60))
    np.testing.assert_array_equal(short(tmp_path, n_samples=30, on_block=never).theta, longer.theta[:, :30])


def test_a_folder_of_another_configuration_or_target_is_refused(tmp_path, x64):
    short(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="differs in scale: 1.0 there, 0.9 here"):
        short(tmp_path, kernel=Metropolis(normal(), 40, 0.9))
    with pytest.raises(ValueError, match="differs in key"):
        short(tmp_path, key=1)
    with pytest.raises(ValueError, match="differs in init"):
        short(tmp_path, init=start() + 0.1)
    with pytest.raises(ValueError, match="differs in data: None there, 3 here"):
        short(tmp_path, context=dict(data=3))
    with pytest.raises(ValueError, match="chains of this target; at the starting points its log-density was"):
        short(tmp_path, kernel=Metropolis(normal(2.0), 40))
    assert before == contents(tmp_path)
    (tmp_path / "sampler.json").unlink()
    with pytest.raises(ValueError, match="sampler.json beside the blocks"):
        short(tmp_path)


# -- damaged files -----------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """One byte of the largest array: a valid archive whose content is another."""
    with np.load(path) as file:
        arrays = dict(file)
    name = max(set(arrays) - {"sha256"}, key=lambda name: arrays[name].nbytes)
    bytes_ = bytearray(arrays[name].tobytes())
    bytes_[len(bytes_) // 2] ^= 1
    arrays[name] = np.frombuffer(bytes(bytes_), arrays[name].dtype).reshape(arrays[name].shape)
    np.savez(path, **arrays)


def flip_on_disk(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, flip_on_disk, delete])
@pytest.mark.parametrize("k", [0, 1, 3], ids=["first", "inner", "last"])
def test_a_damaged_block_is_named_and_sampled_again_alone(tmp_path, x64, damage, k):
    whole = short(tmp_path)
    before = contents(tmp_path)
    path = block(tmp_path, k, group=1)
    damage(path)
    accounts = []
    if damage is delete and k == 3:  # as after a kill between the last state and its block: no damage
        again = short(tmp_path, on_block=accounts.append)
    else:
        with pytest.warns(UserWarning, match=f"{path.name} is damaged or missing .*: its block is sampled again"):
            again = short(tmp_path, on_block=accounts.append)
    assert_same(whole, again)
    assert len(accounts) == 1 and accounts[0]["chains"] == [1]
    after = contents(tmp_path)
    assert after.pop(path.name)[0] == before.pop(path.name)[0]
    assert after == before  # no other file was written
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(whole, short(tmp_path, on_block=never))


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_a_damaged_state_costs_the_block_before_it_too(tmp_path, x64, method):
    whole = short(tmp_path, chain_method=method)
    before = contents(tmp_path)
    flip(state(tmp_path, 0))
    truncate(state(tmp_path, 1))
    delete(block(tmp_path, 2))
    with pytest.warns(UserWarning) as caught:
        assert_same(whole, short(tmp_path, chain_method=method))
    text = " ".join(str(warning.message) for warning in caught)
    assert all(path.name in text for path in (state(tmp_path, 0), state(tmp_path, 1), block(tmp_path, 2)))
    after = contents(tmp_path)
    assert {name: content for name, (content, _) in after.items()} == {name: row[0] for name, row in before.items()}
    for path in (block(tmp_path, 3), state(tmp_path, 2), state(tmp_path, 3)):
        assert after[path.name] == before[path.name]


def test_a_damaged_last_state_is_sampled_again_for_the_moments_and_for_more(tmp_path, x64):
    whole = short(tmp_path)
    truncate(state(tmp_path, 3))
    with pytest.warns(UserWarning, match="group00_state00003.npz is damaged"):
        assert_same(whole, short(tmp_path))
    delete(state(tmp_path, 3, group=1))
    with pytest.warns(UserWarning, match="group01_state00003.npz is damaged or missing"):
        assert_same(short(n_samples=60), short(tmp_path, n_samples=60))


def test_a_damaged_state_that_nothing_needs_is_not_read(tmp_path, x64):
    whole = short(tmp_path)
    truncate(state(tmp_path, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(whole, short(tmp_path, on_block=never))


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
@pytest.mark.parametrize("damage", [truncate, delete])
def test_a_short_block_that_ended_a_shorter_run_is_sampled_again(tmp_path, x64, method, damage):
    short(tmp_path, n_samples=30, chain_method=method)  # its last block has 10 transitions
    whole = short(tmp_path, n_samples=60, chain_method=method)
    for path in tmp_path.glob("*block00003.npz"):
        damage(path)
    with pytest.warns(UserWarning, match="block00003.npz is damaged"):
        assert_same(whole, short(tmp_path, n_samples=60, chain_method=method))


def test_blocks_that_no_longer_follow_each_other_are_refused(tmp_path, x64):
    settings = dict(chain_method="vectorized")
    short(tmp_path, n_samples=30, **settings)
    short(tmp_path, n_samples=60, **settings)
    delete(block(tmp_path, 3)), delete(state(tmp_path, 3))  # nothing says that it had 10 transitions, not 20
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="end where its state does; it does not. Remove"):
        short(tmp_path, n_samples=60, **settings)


def test_a_block_that_does_not_end_in_its_state_is_refused(tmp_path, x64):
    short(tmp_path / "one"), short(tmp_path / "other", key=1)
    damaged = block(tmp_path / "one", 1)
    delete(damaged)
    state(tmp_path / "one", 1).write_bytes(state(tmp_path / "other", 1).read_bytes())  # valid, of another chain
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="block 1 sampled again to end in .*state00001"):
        short(tmp_path / "one")
    assert not damaged.exists()


def test_a_run_killed_between_state_and_block_loses_that_block_alone(tmp_path, x64):
    whole = short(tmp_path)
    before = contents(tmp_path)
    for path in (block(tmp_path, 3), block(tmp_path, 3, group=1), block(tmp_path, 2), state(tmp_path, 3)):
        path.unlink()  # chain 0: after state 2; chain 1: after state 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(whole, short(tmp_path))
    assert contents(tmp_path)["group00_state00002.npz"] == before["group00_state00002.npz"]


def test_a_run_killed_between_state_and_block_may_go_on_with_another_length(tmp_path, x64):
    short(tmp_path, n_samples=30)
    for group in (0, 1):
        delete(block(tmp_path, 3, group))  # of 10 transitions
    assert_same(short(n_samples=60), short(tmp_path, n_samples=60))


# -- kill -9 -----------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys, time
import diffrax, equinox, flowjax.flows, jax, jax_cosmo, numpyro.infer.hmc, optax, scipy.stats, tqdm.auto
import jax._src.xla_bridge
import numpy as np

folder, kills, method = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_compilation_cache_dir", folder + "/cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_enable_x64", True)
assert not jax._src.xla_bridge._backends  # its threads would not survive the fork


def run(folder):
    import jax.numpy as jnp

    from diffsbi.sampling import hmc

    def log_density(z):
        return -0.5 * jnp.sum(z["v"] ** 2) - 0.5 * jnp.sum((z["xi"] / (1 + 0.3 * z["v"][0] ** 2)) ** 2)

    init = {"v": jnp.ones((2, 2)), "xi": jnp.ones((2, 10))}
    settings = dict(adapt="v", extract=lambda z: z["v"], track=lambda z: z["xi"], block=5, chain_method=method)
    pause = lambda account: time.sleep(0.002)  # a run must outlive the kills
    chains = hmc(log_density, init, jax.random.key(0), 200, BLOCKS * 5 - 200, folder=folder, on_block=pause, **settings)
    chains.save(folder)


def start(folder):
    pid = os.fork()
    if pid == 0:
        try:
            run(folder)
        finally:
            os._exit(0 if os.path.exists(folder + "/chains.json") else 1)
    return pid


def blocks():
    return sum("_block" in name and name.endswith(".npz") and name[0] != "." for name in os.listdir(folder + "/killed"))


BLOCKS = 20 * kills + 40
rng = np.random.default_rng(0)
os.makedirs(folder + "/killed")
assert os.waitpid(start(folder + "/whole"), 0)[1] == 0
while True:
    before, pid = blocks(), start(folder + "/killed")
    limit = time.monotonic() + 120
    while kills and blocks() == before and time.monotonic() < limit and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.0005)
    if kills:
        time.sleep(rng.uniform(0, 0.08))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    print(before, blocks(), status, flush=True)
    if not os.WIFSIGNALED(status):
        sys.exit(status)
    kills -= 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "kills, method",
    [(3, "sequential"), *(pytest.param(20, m, marks=pytest.mark.slow) for m in ("sequential", "vectorized"))],
)
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path, kills, method):
    """`kill -9` at random moments after the first new block; one warm parent forks every attempt."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, script, tmp_path, str(kills), method]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), DIFFSBI_CACHE="off", JAX_PLATFORMS="cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    killed = [(before, after) for before, after, status in attempts if status == 9]
    total = attempts[-1][1]
    assert len(killed) == kills and all(before < after < total for before, after in killed)  # each in the middle
    whole, resumed = (load_chains(tmp_path / name) for name in ("whole", "killed"))
    assert_same(whole, resumed)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("group*")} for name in ("whole", "killed")
    ]
    assert files[0] == files[1]


# -- stopping ----------------------------------------------------------------------------------------------------------


def enough(theta, n_warmup, wanted, max_rhat=1.01):
    """Whether `until_ess` may stop after these draws."""
    ess = min(ess_bulk(theta[..., i]) for i in range(theta.shape[-1]))
    return ess >= wanted and max(rhat(theta[..., i]) for i in range(theta.shape[-1])) < max_rhat


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_until_ess_stops_at_the_first_block_that_suffices(tmp_path, x64, method):
    settings = dict(init=start(4), chain_method=method, max_rhat=1.05)
    longest = short(n_samples=2000, **settings)
    chains = short(tmp_path, n_samples=2000, until_ess=100, **settings)
    n = chains.n_draws
    assert 20 < n < 2000 and n % 20 == 0
    np.testing.assert_array_equal(chains.theta, longest.theta[:, :n])
    rounds = [longest.theta[:, :m] for m in range(20, n + 1, 20)]
    assert [enough(theta, 40, 100, 1.05) for theta in rounds] == [False] * (len(rounds) - 1) + [True]
    expected = dict(n_samples=n, until_ess=100, max_rhat=1.05)
    assert {name: chains.settings[name] for name in expected} == expected
    assert "until_ess" not in longest.settings
    assert_same(chains, short(tmp_path, n_samples=2000, until_ess=100, on_block=never, **settings))
    more = short(tmp_path, n_samples=n + 20, **settings)
    assert more.n_draws == n + 20
    assert_same(chains, short(tmp_path, n_samples=2000, until_ess=100, on_block=never, **settings))


def test_an_interrupted_run_until_ess_stops_at_the_same_place(tmp_path, x64):
    settings = dict(n_samples=2000, until_ess=100, max_rhat=1.05, init=start(4))
    whole = short(**settings)
    stop, _ = stop_at(13)
    with pytest.raises(Stop):
        short(tmp_path, on_block=stop, **settings)
    assert_same(whole, short(tmp_path, **settings))


def test_until_ess_waits_for_chains_that_disagree_and_n_samples_is_the_most(x64):
    """Two separate modes: 50 effective draws are soon there by each chain's count, R̂ says that they are not."""
    apart = Metropolis(Modes(), 40)
    init = jnp.array([[-20.0], [-20.0], [20.0], [20.0]])
    settings = dict(init=init, kernel=apart, names=("a",), n_samples=110, until_ess=4)
    chains = short(**settings)
    assert chains.n_draws == chains.settings["n_samples"] == 110
    assert ess_bulk(chains.theta[..., 0]) >= 4 and rhat(chains.theta[..., 0]) > 1.5
    assert short(**settings, max_rhat=100.0).n_draws < 110
    with pytest.raises(ValueError, match="until_ess > 0; got -1"):
        short(until_ess=-1)


class Modes(eqx.Module):
    def __call__(self, z):
        return jnp.logaddexp(-0.5 * (z[0] - 20.0) ** 2, -0.5 * (z[0] + 20.0) ** 2)


class Diverges(Metropolis):
    """Every transition after `good` ones diverges."""

    good: int = 0

    def start(self, position, key):
        return super().start(position, key), jnp.asarray(-1)

    def step(self, state):
        inner, row = super().step(state[0])
        return (inner, state[1] + 1), row._replace(diverging=state[1] >= self.good)

    def position(self, state):
        return state[0][0]


def test_a_storm_of_divergences_says_so_and_keeps_its_blocks(tmp_path, x64):
    storm = dict(kernel=Diverges(normal(), 100, good=60), block=50)
    for _ in range(2):  # a second start comes to the same end
        with pytest.raises(
            RuntimeError, match=r"diverged in all of 50 transitions \(step size 1, 50 divergences\): a lon"
        ):
            short(tmp_path, n_samples=200, **storm)
        assert block(tmp_path, 1).exists() and block(tmp_path, 2).exists() and not block(tmp_path, 3).exists()
    chains = short(n_samples=200, **(storm | dict(block=49)))  # too short a block to be sure
    assert chains.n_diverging == 2 * 200


class Needle(eqx.Module):
    def __call__(self, z):
        return jnp.where(jnp.sum(z**2) < 1e-20, 0.0, -1e6)


class Bottomless(eqx.Module):
    def __call__(self, z):
        return jnp.where(z[0] > 1.5, jnp.inf, -0.5 * jnp.sum(z**2))


@pytest.mark.parametrize(
    "target, message, name",
    [
        (Needle(), "Chain 0 did not move in 20 transitions", "block"),
        (Bottomless(), "Chain 0 has a non-finite energy at transition .* bounded", "block"),
    ],
)
def test_a_stuck_chain_and_a_bottomless_density_say_so_and_keep_their_blocks(tmp_path, x64, target, message, name):
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            short(tmp_path, n_samples=40, kernel=Metropolis(target, 0), init=jnp.zeros((1, 3)))
        assert block(tmp_path, 0).exists() and state(tmp_path, 0).exists()


class Half(eqx.Module):
    outside: jax.Array

    def __call__(self, z):
        return jnp.where(z[0] > 0, -jnp.sum(z), self.outside)


@pytest.mark.parametrize("outside", [-np.inf, np.inf, np.nan])
def test_starting_points_without_a_density_are_named(x64, outside):
    kernel = Metropolis(Half(jnp.asarray(outside)), 5)
    with pytest.raises(ValueError, match="finite log-density and gradient at the starting point of chain 1"):
        short(kernel=kernel, init=jnp.array([[1.0, 1.0, 1.0], [-1.0, 1.0, 1.0]]))


def test_settings_that_make_no_sense_are_named(x64):
    with pytest.raises(ValueError, match="n_samples >= 1.*got"):
        short(n_samples=0)
    with pytest.raises(ValueError, match="block >= 1; got"):
        short(block=0)
    with pytest.raises(ValueError, match='"sequential" or "vectorized"; got \'parallel\''):
        short(chain_method="parallel")
    with pytest.raises(ValueError, match="leading chain axis"):
        short(init={"u": jnp.zeros((2, 3)), "v": jnp.zeros((3, 3))})
    with pytest.raises(ValueError, match="Expected extract"):
        short(init={"u": jnp.zeros((2, 3)), "v": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"shape \(2,\), one for each name; got \(3,\)"):
        short(names=("a", "b"))
    with pytest.raises(TypeError, match="typed JAX key"):
        sample(Metropolis(normal(), 1), start(), jax.random.PRNGKey(0), 5)


# -- the account -------------------------------------------------------------------------------------------------------


def test_tracked_moments_are_those_of_the_draws(x64):
    chains = short()
    np.testing.assert_allclose(chains.tracked[0], (chains.flat() ** 2).mean(0), rtol=1e-10)
    np.testing.assert_allclose(chains.tracked[1], (chains.flat() ** 2).std(0, ddof=1), rtol=1e-10)


def test_the_bar_shows_effective_draws_agreement_and_the_time_left(tmp_path, x64, monkeypatch):
    shown, counts = [], []

    class Bar:
        def __init__(self, total, disable, **_):
            self.disable = disable
            counts.append(total)

        def update(self, n):
            counts.append(n)

        def set_postfix(self, postfix):
            shown.append(dict(postfix))

        def close(self):
            counts.append("closed")

        format_interval = staticmethod(lambda seconds: f"{seconds:.6f} s")

    monkeypatch.setattr("diffsbi.sampling.progress.tqdm", Bar)
    settings = dict(n_samples=100, progress=True, init=start(4))
    chains = short(tmp_path, **settings, until_ess=1e6)
    assert counts == [4 * 140] + [20] * 28 + ["closed"]
    assert len(shown) == 7  # once a round, when the chains are level
    assert [set(row) >= {"ess", "rhat"} for row in shown] == [False, False] + [True] * 5
    assert [row["gradients"] for row in shown] == [4 + 80 * k for k in range(1, 8)]
    assert shown[-1]["gradients"] == chains.gradients and shown[-1]["divergences"] == 0
    theta = chains.theta
    assert shown[-1]["ess"] == round(min(ess_bulk(theta[..., i]) for i in range(3)))
    assert shown[-1]["rhat"] == f"{max(rhat(theta[..., i]) for i in range(3)):.3f}"
    assert float(shown[-1]["left"].split()[0]) > 0
    shown.clear()
    short(None, **settings)
    assert shown and not any("left" in row for row in shown)
    shown.clear()
    short(tmp_path, **(settings | dict(n_samples=120)), until_ess=1.0, max_rhat=100.0)  # was reached on disk
    assert not shown
    (tmp_path / "group00_block00006.npz").unlink()
    short(tmp_path, **settings, until_ess=1e6)
    assert len(shown) == 1 and shown[0]["gradients"] == 4 + 80 * 7  # read blocks count, but not for the pace


def test_the_time_left_is_what_is_missing_at_the_pace_so_far(x64, monkeypatch):
    clock = iter(np.arange(1000.0))
    monkeypatch.setattr("diffsbi.sampling.progress.time.monotonic", lambda: next(clock))
    left = []
    monkeypatch.setattr("diffsbi.sampling.progress.tqdm.format_interval", lambda seconds: left.append(seconds))
    chains = short(n_samples=100, progress=True, init=start(4), until_ess=1000)
    effective = min(ess_bulk(chains.theta[..., i]) for i in range(3))
    done = 4 * 140  # transitions of one gradient; the clock ticks once at the start and once for each `left`
    expected = (1000 / effective - 1) * 4 * 100 * (len(left) / done)
    assert left[-1] == pytest.approx(expected, rel=0.02)


class Shifted(eqx.Module):
    def __call__(self, z, data):
        return -0.5 * jnp.sum((z - data) ** 2)


@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_chains_with_data_of_their_own_have_targets_of_their_own_and_resume(tmp_path, x64, method):
    data = jnp.asarray([[-30.0, 0.0, 5.0], [40.0, 1.0, -5.0]])
    run = dict(kernel=Metropolis(Shifted(), 40), init=start() + data, data=data, chain_method=method)
    whole = short(n_samples=2000, **run)
    np.testing.assert_allclose(whole.theta.mean(1), data, atol=0.5)
    with pytest.raises(Stop):
        short(tmp_path, on_block=stop_at(3)[0], **run)
    assert_same(short(tmp_path, **run), short(**run))
    with pytest.raises(ValueError, match="it differs in data: "):
        short(tmp_path, **(run | dict(data=data + 1)))


def test_with_data_a_stuck_chain_is_warned_about_and_wrong_data_are_refused(x64):
    class Well(eqx.Module):
        def __call__(self, z, hard):
            return -0.5 * jnp.sum(z**2) - jnp.where(jnp.sum(z**2) < 1e-20, 0.0, hard)

    kernel, hard = Metropolis(Well(), 0), jnp.asarray([0.0, 1e6])
    with pytest.warns(UserWarning, match="Chain 1 did not move in 20 transitions"):
        chains = short(kernel=kernel, init=jnp.zeros((2, 3)), data=hard)
    assert np.ptp(chains.theta[0]) > 1
    with pytest.raises(ValueError, match="leading axis of 2 chains"):
        short(kernel=kernel, data=jnp.zeros(3))
    with pytest.raises(ValueError, match="no until_ess"):
        short(kernel=kernel, data=hard, until_ess=10)
