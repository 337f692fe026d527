"""The training loop, on models small enough to be solved by hand."""

import warnings

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffsbi.inference.training import fit, schedule, split_rows


class Line(eqx.Module):
    slope: jax.Array
    name: str = "line"


def line():
    return Line(jnp.zeros(()))


def data(n, seed=0):
    x = jax.random.normal(jax.random.key(seed), (n,))
    return {"x": x, "y": 2 * x}


def squared(params, static, batch, key):
    return jnp.mean((eqx.combine(params, static).slope * batch["x"] - batch["y"]) ** 2)


def test_solves_least_squares_and_accounts_for_it():
    options = {"max_epochs": 400, "batch_size": 20, "learning_rate": 5e-2, "patience": 30}
    model, history = fit(jax.random.key(0), line(), data(50), data(20, 1), squared, **options)
    assert abs(float(model.slope) - 2) < 1e-2
    assert model.name == "line"
    assert history.steps == 3 * len(history.train) and len(history.train) == len(history.validation)
    assert history.best_validation == history.validation[history.best_epoch - 1]
    assert history.best_validation < history.validation.min() + 1e-5 < history.first_validation


def test_stops_early_with_the_best_state():
    """Validation rows that want another slope: the best model is one that passes near it on the way."""
    other = {"x": jnp.ones(10), "y": jnp.full(10, 1.0)}
    options = {"max_epochs": 2000, "learning_rate": 2e-2, "patience": 25}
    model, history = fit(jax.random.key(0), line(), data(64), other, squared, **options)
    assert history.stop_reason == "no improvement in 25 epochs"
    assert len(history.train) == history.best_epoch + 25
    assert abs(float(model.slope) - 1) < 0.05
    np.testing.assert_allclose((model.slope - 1) ** 2, history.best_validation, rtol=1e-5)


def test_same_key_same_fit():
    options = {"max_epochs": 5, "batch_size": 10, "learning_rate": 0.3}
    fits = [fit(jax.random.key(k), line(), data(50), data(20, 1), squared, **options)[0] for k in (0, 0, 1)]
    assert float(fits[0].slope) == float(fits[1].slope) != float(fits[2].slope)


def test_weights_decay_and_constants_stay():
    class Shifted(Line):
        shift: jax.Array = eqx.field(default_factory=lambda: jnp.ones(()))

    def loss(params, static, batch, key):
        model = eqx.combine(params, static)
        return jnp.mean((model.slope * batch["x"] + model.shift - batch["y"]) ** 2)

    options = {"max_epochs": 300, "batch_size": 20, "learning_rate": 5e-2, "keep": "last"}
    options["constants"] = lambda model: [model.shift]
    free, pulled = (
        fit(jax.random.key(0), Shifted(jnp.zeros(())), data(50), data(20, 1), loss, weight_decay=decay, **options)[0]
        for decay in (0.0, 1.0)
    )
    assert free.shift == pulled.shift == 1.0
    assert 0.0 < pulled.slope < free.slope - 0.1


def test_the_validation_loss_has_the_same_noise_in_every_epoch():
    noisy = lambda params, static, batch, key: squared(params, static, batch, key) + jax.random.normal(key)  # noqa: E731
    _, history = fit(jax.random.key(0), line(), data(64), data(20, 1), noisy, max_epochs=3, learning_rate=1e-9)
    np.testing.assert_allclose(history.validation, history.first_validation, rtol=1e-5)
    assert np.ptp(history.train) > 0.1


def test_loss_that_is_not_finite_stops_with_the_best_state_kept():
    def brittle(params, static, batch, key):
        slope = eqx.combine(params, static).slope
        return squared(params, static, batch, key) + jnp.where(slope > 1.0, jnp.nan, 0.0)

    with pytest.warns(UserWarning, match=r"The loss became .*nan .* at epoch \d+; kept epoch \d+"):
        model, history = fit(jax.random.key(0), line(), data(64), data(20, 1), brittle, learning_rate=2e-2)
    assert 0.5 < float(model.slope) <= 1.0
    assert history.stop_reason.startswith("loss not finite at epoch")


def test_loss_never_finite_returns_the_untrained_model():
    with pytest.warns(UserWarning, match="at epoch 1; kept the untrained model"):
        model, history = fit(
            jax.random.key(0), line(), data(64), data(20, 1), lambda p, s, b, k: squared(p, s, b, k) + jnp.nan
        )
    assert float(model.slope) == 0 and history.best_epoch == 0


def test_compiles_once_whatever_the_number_of_epochs_and_fits():
    counted = chex.assert_max_traces(squared, n=3)  # once with its gradient inside the scan, once for the validation
    for seed in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(jax.random.key(seed), line(), data(50, seed), data(20, 1), counted, max_epochs=6, batch_size=7)
    chex.clear_trace_counter()


def test_split_is_disjoint_complete_and_fixed():
    train, held_out = split_rows(jax.random.key(0), 103, 0.1)
    assert len(held_out) == 10
    assert sorted([*train, *held_out]) == list(range(103))
    assert np.array_equal(split_rows(jax.random.key(0), 103, 0.1)[0], train)
    with pytest.raises(ValueError, match="between 0 and 1; got 1.5"):
        split_rows(jax.random.key(0), 103, 1.5)


@pytest.mark.parametrize("option", ["max_epochs", "batch_size", "patience", "learning_rate"])
def test_settings_out_of_range_are_named(option):
    with pytest.raises(ValueError, match=f"{option} >=? ?.*; got 0"):
        fit(jax.random.key(0), line(), data(64), data(20, 1), squared, **{option: 0})


def test_last_epoch_averaged_weights_and_measures():
    def measured(params, static, batch, key):
        value = squared(params, static, batch, key)
        return value, {"double": 2 * value}

    options = {"max_epochs": 12, "batch_size": 10, "learning_rate": 0.3, "has_measures": True}
    rows = data(50), data(20, 1)
    best, history = fit(jax.random.key(0), line(), *rows, measured, **options)
    last, _ = fit(jax.random.key(0), line(), *rows, measured, **options, keep="last")
    at = lambda model: float(jnp.mean(((model.slope - 2) * rows[1]["x"]) ** 2))  # noqa: E731
    np.testing.assert_allclose([at(best), at(last)], [history.best_validation, history.validation[-1]], rtol=1e-4)
    doubled = 2 * np.stack([history.train, history.validation], -1)
    np.testing.assert_allclose(history.measures["double"], doubled, rtol=1e-5)
    averaged, other = fit(jax.random.key(0), line(), *rows, measured, **options, keep="last", average=0.9)
    np.testing.assert_allclose(at(averaged), other.validation[-1], rtol=1e-4)
    assert other.train[0] == history.train[0] and other.validation[1] != history.validation[1]
    short, account = fit(jax.random.key(0), line(), data(20), rows[1], squared, patience=1, min_epochs=9, max_epochs=9)
    assert len(account.train) == 9 and account.measures == {}
    with pytest.raises(ValueError, match="Unknown keep 'first'"):
        fit(jax.random.key(0), line(), *rows, squared, keep="first")
    with pytest.raises(ValueError, match="0 <= average < 1; got 1"):
        fit(jax.random.key(0), line(), *rows, squared, average=1)


@pytest.mark.parametrize(
    ("n", "steps"), [(50, 5000), (1000, 5000), (5000, 10_000), (10_000, 20_000), (100_000, 20_000)]
)
def test_more_rows_have_more_steps_up_to_a_limit(n, steps):
    found = schedule(n, None, None, None)
    assert found["max_epochs"] * n / found["batch_size"] == pytest.approx(steps, rel=0.03)
    assert schedule(n, 7, 10, 3) == {"max_epochs": 7, "batch_size": 10, "patience": 3}
