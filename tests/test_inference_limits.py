"""Too little memory, no rows of data, too few simulations: what the messages say and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from targets import gaussian

import diffsbi as ds
from diffsbi.inference import posterior, training
from experiments.scores_lensing import PRESETS, Config, _check_sizes

FULL = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 98304000 bytes.")


def squared(params, static, batch, key):
    return jnp.mean((params * batch["x"] - 2.0) ** 2)


def fit(loss=squared, n=20, **options):
    rows = {"x": jnp.ones(n)}
    return training.fit(jax.random.key(0), jnp.zeros(()), rows, rows, loss, **{"max_epochs": 9} | options)


@pytest.mark.parametrize("error", [FULL, MemoryError()])
def test_too_little_memory_for_the_first_step_names_what_to_lower(error):
    def loss(params, static, batch, key):
        raise error

    message = r"for steps of 8 rows \(batch_size=8\) and 24 validation rows at once: lower batch_size or"
    with pytest.raises(MemoryError, match=message):
        fit(loss, 24, batch_size=8)


def test_other_errors_pass():
    def loss(params, static, batch, key):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        fit(loss)


@pytest.mark.parametrize("good", [0, 3])
def test_too_little_memory_later_keeps_the_best_state(monkeypatch, good):
    left, epoch = iter(range(good + 1)), training._epoch

    def until_full(*args):
        if next(left, None) is None:
            raise FULL
        return epoch(*args)

    monkeypatch.setattr(training, "_epoch", until_full)
    if not good:
        with pytest.raises(MemoryError, match="batch_size=64"):
            fit()
        return
    with pytest.warns(UserWarning, match="lower batch_size .* Stopped at epoch 4; kept epoch 3"):
        model, history = fit(learning_rate=0.1)
    assert float(model) > 0 and history.best_epoch == 3 and len(history.train) == 3
    assert history.stop_reason == "not enough memory at epoch 4"


def test_a_batch_may_be_larger_than_the_rows():
    _, history = fit(batch_size=1000)
    assert history.steps == 9


def test_one_bad_loss_is_told_from_the_first_epoch():
    with pytest.warns(UserWarning, match=r"loss became nan .*epoch 1; kept the untrained model.*outliers in theta, x"):
        fit(lambda params, static, batch, key: params * jnp.nan)


@pytest.fixture(scope="module", params=[ds.NPE, ds.NLE, "reweighted"])
def fitted(request, linear):
    draws = linear.draw(jax.random.key(0), 20, with_score=False)
    kind = ds.NPE if request.param == "reweighted" else request.param
    proposal = ds.gaussian_proposal(linear, draws.theta) if request.param == "reweighted" else None
    estimator = kind(linear, gaussian).append(draws.theta, draws.x, proposal=proposal)
    return estimator.fit(jax.random.key(1), members=1, max_epochs=1)


def test_no_rows_of_data_are_refused(fitted):
    with pytest.raises(ValueError, match=r"at least one row of x to sample for; got shape \(0, 4\)"):
        fitted.sample(jax.random.key(0), 5, np.zeros((0, 4)))
    if hasattr(fitted, "chains"):
        with pytest.raises(ValueError, match=r"at least one row of x .*\(3, 0, 4\)"):
            fitted.chains(jax.random.key(0), np.zeros((3, 0, 4)))
        with pytest.raises(ValueError, match="n_samples >= 1 and n_chains >= 1; got 0 and 4"):
            fitted.chains(jax.random.key(0), np.zeros(4), n_samples=0)
        with pytest.raises(ValueError, match="n_chains >= 1; got 0"):
            fitted.sample(jax.random.key(0), 5, np.zeros(4), n_chains=0)


def test_too_little_memory_to_sample_names_n(linear, monkeypatch):
    draws = linear.draw(jax.random.key(0), 20, with_score=False)
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x).fit(jax.random.key(1), members=1, max_epochs=1)

    def full(*args):
        raise FULL

    monkeypatch.setattr(posterior, "sample_of", full)
    with pytest.raises(MemoryError, match="n=500 draws for each of 20 rows of x: lower n, or sample fewer rows"):
        fitted.sample(jax.random.key(0), 500, draws.x)


def test_lensing_experiment_wants_enough_reference_simulations():
    for preset in PRESETS.values():
        _check_sizes(preset)
    sizes = dict(n=(100, 400), n_scored=100, seeds=3)
    with pytest.raises(ValueError, match="n_reference >= 1400, .* 900; got n_reference=1000, n_coverage=500"):
        _check_sizes(Config(**sizes, coverage_n=(100, 400), n_reference=1000))
    _check_sizes(Config(**sizes, coverage_n=(100,), n_reference=900))  # those that are tested train on none of them
    with pytest.raises(ValueError, match="n_reference >= 900, .*; got n_reference=800"):
        _check_sizes(Config(**sizes, coverage_n=(), n_reference=800))
    with pytest.raises(ValueError, match="n <= n_scored with summary 'path_mode'; got 400 and 100"):
        _check_sizes(Config(**sizes, summary="path_mode", n_reference=2000))
    with pytest.raises(ValueError, match="n_coverage >= seeds"):
        _check_sizes(Config(n_coverage=2))
