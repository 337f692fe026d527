"""Simulations that are read from disk in blocks: the same answers, and little memory."""

import threading
import time
from pathlib import Path

import jax
import numpy as np
import numpyro.distributions as dist
import pytest
from targets import gaussian

import diffsbi as ds
from diffsbi.inference import fit_chains, fit_variational, network_spread, rows, streams
from diffsbi.inference.rows import Joined, Selected
from diffsbi.store import create_store


def on_disk(folder, **arrays):
    """Memory maps of arrays."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return [np.load(folder / f"{name}.npy", mmap_mode="r") for name in arrays]


@pytest.fixture
def few(monkeypatch):
    """More than 2000 rows are many."""
    monkeypatch.setattr(streams, "MOST_ROWS", 2000)
    monkeypatch.setattr(rows, "_BLOCK_ROWS", 4096)


@pytest.fixture(scope="module")
def simulated(linear):
    draws = linear.draw(jax.random.key(0), 20_000)
    return tuple(np.asarray(a) for a in (draws.theta, draws.x, draws.score))


def errors(sim, posterior):
    """Of the mean in posterior widths (root mean square), and of the width (mean ratio), over twenty observations."""
    observed = sim.draw(jax.random.key(2), 20, with_score=False).x
    samples = np.asarray(posterior.sample(jax.random.key(3), 2000, observed))
    means, covariances = jax.jit(jax.vmap(sim.posterior))(observed)
    width = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    shift = (samples.mean(0) - np.asarray(means)) / width
    return np.sqrt(np.mean(shift**2)), np.mean(samples.std(0) / width)


def test_joined_and_selected_arrays_read_as_one():
    parts = [np.arange(2.0 * n).reshape(n, 2) for n in (3, 0, 5, 1)]
    whole = np.concatenate(parts)
    index = np.array([1, 2, 6, 8])
    for start, stop in [(0, 9), (2, 4), (3, 8), (8, 9), (7, 20)]:
        np.testing.assert_array_equal(Joined(parts)[start:stop], whole[start:stop])
    for start, stop in [(0, 4), (1, 3), (4, 9)]:
        np.testing.assert_array_equal(Selected(whole, index)[start:stop], whole[index][start:stop])


def test_a_streamed_fit_is_as_good_as_one_in_memory(linear, simulated, few, monkeypatch, tmp_path):
    arrays = on_disk(tmp_path, theta=simulated[0], x=simulated[1], score=simulated[2])
    found = []
    for most in (2000, 10**6):
        monkeypatch.setattr(streams, "MOST_ROWS", most)
        estimator = ds.NPE(linear, gaussian)
        for first, last in ((0, 15_000), (15_000, 20_000)):
            estimator.append(*(a[first:last] for a in arrays))
        posterior = estimator.fit(jax.random.key(1), members=2, max_epochs=8)
        found.append(errors(linear, posterior))
        assert posterior.config["simulations"] == 20_000 and posterior.config["scores_left_out"] == 0
        np.testing.assert_allclose(np.sum(posterior.weights), 1)
    for shift, width in found:
        assert shift < 0.1 and abs(width - 1) < 0.05


@pytest.mark.parametrize(("estimator", "options"), [
    (ds.NLE, {"density": gaussian}),
    (ds.NRE, {"width": 8, "depth": 1}),
    pytest.param(ds.FMPE, {"width": 8, "depth": 1, "steps": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_other_estimators_stream_too(linear, simulated, few, estimator, options):
    posterior = estimator(linear, **options).append(*simulated).fit(jax.random.key(1), members=1, max_epochs=1)
    assert posterior.histories[0].steps == 16  # one block of 4096 rows, in batches of 256
    assert np.isfinite(posterior.log_prob(simulated[0][:5], simulated[1][:5])).all()


@pytest.mark.parametrize("correction", ["importance", pytest.param("atomic", marks=pytest.mark.slow)])
def test_proposals_are_streamed(linear, simulated, few, correction):
    proposal = ds.gaussian_proposal(linear, simulated[0][:1000], widen=2.0)
    theta = proposal.sample(jax.random.key(4), (6000,))
    x = linear.draw(jax.random.key(5), 6000, theta, with_score=False).x
    estimator = ds.NPE(linear, density=gaussian, correction=correction).append(theta, x, proposal=proposal)
    assert np.isfinite(estimator.fit(jax.random.key(1), members=1, max_epochs=1).log_prob(theta[:5], x[:5])).all()
    if correction == "importance":
        weight = estimator._unconstrained_rows().take(np.arange(20))["weight"]
        assert abs(weight.mean() - 1) < 0.1


def test_an_epoch_is_a_block_and_a_pass_sees_every_row_once(linear, simulated, few):
    stream = ds.NPE(linear).append(*simulated)._unconstrained_rows()
    train, held_out = stream.split(jax.random.key(0), 0.1)
    assert stream.per_epoch == 4096 and len(held_out) <= stream.few == 16
    assert sorted([*train, *held_out]) == list(range(20_000 // 64))
    blocks = stream.train(jax.random.key(1), train, lambda columns: columns)

    def row(columns):
        """One number for each row, in float64: single columns in float32 may hold the same one twice."""
        return np.asarray(columns["x"], float) @ [1.0, np.pi, np.e, np.sqrt(2)]

    seen = np.concatenate([row(blocks(k)) for k in range(len(train) // 64)])
    kept = row(stream.take(train))
    assert len(np.unique(seen)) == len(seen) == 4096 * (len(train) // 64) and np.isin(seen, kept).all()
    again = np.concatenate([row(blocks(k)) for k in range(len(train) // 64, 2 * (len(train) // 64))])
    assert not np.array_equal(seen, again)


def test_small_arrays_on_disk_are_fitted_as_in_memory(linear, simulated, tmp_path):
    arrays = [a[:100] for a in simulated]
    mapped = on_disk(tmp_path, theta=arrays[0], x=arrays[1], score=arrays[2])
    fits = [
        ds.NPE(linear, gaussian).append(*a).fit(jax.random.key(0), members=1, max_epochs=3) for a in (arrays, mapped)
    ]
    at = simulated[0][:5], simulated[1][:5]
    np.testing.assert_array_equal(fits[0].log_prob(*at), fits[1].log_prob(*at))


def test_checks_see_every_block(linear, simulated, few, tmp_path):
    theta, x, score = (a[:9000].copy() for a in simulated)
    x[8765, 1] = np.nan
    score[4500, 0] = np.inf
    arrays = on_disk(tmp_path, theta=theta, x=x, score=score)
    with pytest.raises(
        ValueError, match=r"finite x; got 1 non-finite of 36000 values, in 1 of 9000 rows, first at \(8765, 1\)"
    ):
        ds.NPE(linear).append(*arrays)
    with pytest.warns(UserWarning, match=r"Left out 2 of 9000 rows .*x in 1, score in 1"):
        estimator = ds.NPE(linear).append(*arrays, on_invalid="drop")
    kept = estimator._rows[0]
    assert len(estimator) == 8998 and isinstance(kept.x, Selected)
    np.testing.assert_array_equal(kept.x[4499:4501], x[[4499, 4501]])
    bounded = ds.Prior({"a": dist.Uniform(-50.0, 50.0), "b": dist.Uniform(-50.0, 50.0)})
    theta[8000, 1] = 99.0
    with pytest.raises(ValueError, match="Expected b inside the prior's support .*got 99"):
        ds.NPE(bounded).append(*on_disk(tmp_path, theta=theta), simulated[1][:9000])
    with pytest.warns(UserWarning, match="in the order"):
        ds.NPE(linear).append(*simulated[:2], simulated[2][:, ::-1])._unconstrained_rows()
    with pytest.raises(ValueError, match="rows that fit in memory, all in one step; 20000 are too many"):
        fit_chains(ds.NPE(linear).append(*simulated), jax.random.key(0))


def test_weights_have_a_posterior_from_streamed_rows(linear, simulated, few, tmp_path):
    """As near to the exact one as an ordinary fit, and as sure of itself as so many rows allow."""
    arrays = on_disk(tmp_path, theta=simulated[0], x=simulated[1], score=simulated[2])
    fitted = fit_variational(ds.NPE(linear, gaussian).append(*arrays[:2]), jax.random.key(1), max_epochs=60, members=4)
    shift, width = errors(linear, fitted)
    assert shift < 0.1 and 0.95 < width < 1.05
    spread = network_spread(fitted, jax.random.key(4), 2000, linear.draw(jax.random.key(2), 5, with_score=False).x)
    assert np.all(spread.fraction < 0.02) and fitted.config["simulations"] == 20_000


def test_a_store_is_appended_as_it_is(linear, simulated, few, tmp_path):
    arrays = dict(zip(("theta", "x", "score"), simulated, strict=True))
    shapes = {name: a.shape[1:] for name, a in arrays.items()}
    store = create_store(
        tmp_path / "s", config={}, seed=0, names=linear.prior.names, n=3000, arrays=shapes, block_size=1000
    )
    for block in store.blocks:
        store.write(block, {name: a[block.start : block.stop] for name, a in arrays.items()})
    np.testing.assert_array_equal(store["x"][950:2050], simulated[1][950:2050])
    estimator = ds.NPE(linear, gaussian, score_weight=0).append(store["theta"], store["x"], store["score"])
    assert len(estimator) == 3000
    assert len(estimator.fit(jax.random.key(0), members=1, max_epochs=2).histories[0].train) == 2
    with pytest.raises(ValueError, match="Unknown array 'tetha'.*Did you mean 'theta'"):
        store["tetha"]
    with pytest.raises(ValueError, match="consecutive rows"):
        store["x"][::2]
    file = tmp_path / "s" / "x" / "c" / "2" / "0"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="x/c/2/0 are damaged"):
        ds.NPE(linear).append(store["theta"], store["x"], store["score"])


class Watch:
    """The largest anonymous memory of this process, in bytes, while it is watched: pages of mapped files are not in."""

    def __enter__(self):
        self.before, self.most, self._done = self._now(), 0, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done = True
        self._thread.join()

    def _run(self):
        while not self._done:
            self.most = max(self.most, self._now() - self.before)
            time.sleep(0.005)

    @staticmethod
    def _now():
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_far_below_the_size_of_the_data(tmp_path):
    """300 MB, after a fit of fewer rows that has compiled everything."""
    sim = ds.linear_gaussian(dim=2, n_latents=2, n_data=20, seed=0)
    draws = sim.draw(jax.random.key(0), 20_000)
    n = 3_400_000
    paths = {}
    for name in ("theta", "x"):
        array = np.asarray(getattr(draws, name), np.float32)
        paths[name] = tmp_path / f"{name}.npy"
        out = np.lib.format.open_memmap(paths[name], "w+", np.float32, (n, array.shape[1]))
        for start in range(0, n, len(array)):
            out[start : start + len(array)] = array
    assert sum(path.stat().st_size for path in paths.values()) > 295e6
    for rows_used in (300_000, n):
        theta, x = (np.load(path, mmap_mode="r")[:rows_used] for path in paths.values())
        with Watch() as watch:
            estimator = ds.NPE(sim, gaussian).append(theta, x)
            posterior = estimator.fit(jax.random.key(1), members=1, max_epochs=2)
    assert watch.most < 100e6
    assert posterior.histories[0].steps == 512
