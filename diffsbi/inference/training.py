"""The one training loop. It knows no model: a loss is a callable of (params, static, batch, key).

A loss need not be a mean over rows. One of a whole set of simulations (the Fisher information of summaries) holds its
sets itself, as a pytree; a row is then one step, with its own key, and an epoch as many steps as there are rows.
"""

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from diffsbi._cache import forget_when_many
from diffsbi._types import Array, Key, check_key, check_names
from diffsbi.inference.memory import explained, is_out_of_memory

Loss = Callable[[Any, Any, Any, Key], Array]

_CLIP = 5.0  # global norm of the gradient above which a step is shortened
_IMPROVEMENT = 1e-6
_SMALLEST_RATE = 1e-2  # the learning rate falls to this fraction of its first value at most


class History(eqx.Module):
    """How a fit went: loss per epoch, which epoch was kept (0: before any step), and why it stopped.

    `train[e]` is the mean loss over the batches of epoch e + 1 while it ran, `validation[e]` the loss on the
    held-out rows after it. `measures[name][e]` are (training, validation) of what the loss reported beside its value.
    """

    train: np.ndarray
    validation: np.ndarray
    best_epoch: int
    stop_reason: str
    steps: int
    first_validation: float
    measures: dict[str, np.ndarray] = eqx.field(default_factory=dict)

    @property
    def best_validation(self) -> float:
        return float(self.first_validation if self.best_epoch == 0 else self.validation[self.best_epoch - 1])


def split_rows(key: Key, n: int, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the validation rows, disjoint and together all `n`; at least 2 to validate."""
    if not 0 < validation_fraction < 1:
        raise ValueError(f"Expected validation_fraction between 0 and 1; got {validation_fraction}.")
    held_out = min(max(2, round(validation_fraction * n)), n - 1)
    order = np.asarray(jax.random.permutation(key, n))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def schedule(
    n: int, max_epochs: int | None, batch_size: int | None, patience: int | None, of: int = 0
) -> dict[str, Any]:
    """Settings of `fit` for epochs of n rows; None: batches of 32 to 256, about 5 000 steps, 400 without improvement.

    Beyond 2 500 rows there are more steps in proportion, to 20 000 from 10 000 rows on: what so many tell takes longer
    to learn (the likelihood of SLCP from 10 000: C2ST .86 after 5 000 steps, .83 after 20 000). Where the rows are
    more, `of` all, there are epochs for two passes over them at least.
    """
    batch_size = int(np.clip(n // 10, 32, 256) if batch_size is None else batch_size)
    patience = int(max(20, 400 * batch_size // n) if patience is None else patience)
    steps = int(5000 * np.clip(n / 2500, 1, 4))
    max_epochs = int(max(50, steps * batch_size // n, 2 * of // n) if max_epochs is None else max_epochs)
    return {"max_epochs": max_epochs, "batch_size": batch_size, "patience": patience}


def fit(
    key: Key,
    model,
    train,
    validation,
    loss: Loss,
    *,
    max_epochs: int = 1000,
    batch_size: int = 64,
    patience: int = 50,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    constants: Callable[[Any], Any] | None = None,
    min_epochs: int = 0,
    keep: str = "best",
    average: float = 0.0,
    has_measures: bool = False,
    progress: bool = False,
) -> tuple[Any, History]:
    """Minimise `loss` over the inexact arrays of `model` by Adam with clipped gradients; keep the best epoch.

    The learning rate halves whenever a third of the patience passes without improvement. Batches are of equal size,
    as near to `batch_size` as the rows allow, and are drawn anew in every epoch; an epoch is one compiled scan.

    Args:
        key: Order of the rows, and the key handed to the loss.
        model: Any pytree.
        train: Pytree of arrays with the training rows first; or a function of the number of epochs that are done to
            such a pytree, always of the same shapes: the rows that the next epoch passes over.
        validation: The same of the validation rows; the same ones in every epoch, with the same key.
        loss: (params, static, batch, key) → scalar mean over the batch, `eqx.combine(params, static)` the model.
        max_epochs: Most epochs.
        batch_size: Rows per step (fewer where there are fewer).
        patience: Epochs without improvement of the validation loss before stopping.
        learning_rate: First step size.
        weight_decay: Pull of every parameter towards zero, per step and unit of step size (as AdamW).
        constants: model → those of its arrays that are no parameters, and stay.
        min_epochs: Epochs before patience may end the fit.
        keep: "best" or "last" epoch; the last one whose loss is finite.
        average: Decay per step of a moving average of the weights, which is then what is validated and returned:
            against the jitter of noisy gradients. 0: the weights themselves.
        has_measures: The loss returns (scalar, dict of named scalars); the latter go into `History.measures`.
        progress: Show a progress bar.

    Returns:
        The model of the best (or last) epoch, and the `History`. A loss that is not finite ends the fit with a warning,
        and so does too little memory.

    Raises:
        MemoryError: If memory is used up before any epoch was good.
    """
    check_key(key)
    for name, value in {"max_epochs": max_epochs, "batch_size": batch_size, "patience": patience}.items():
        if value < 1:
            raise ValueError(f"Expected {name} >= 1; got {value}.")
    if learning_rate <= 0:
        raise ValueError(f"Expected learning_rate > 0; got {learning_rate}.")
    check_names([keep], ["best", "last"], "keep")
    if not 0 <= average < 1:
        raise ValueError(f"Expected 0 <= average < 1; got {average}.")
    forget_when_many()
    trained = jax.tree.map(eqx.is_inexact_array, model)
    if constants is not None:
        trained = eqx.tree_at(constants, trained, replace_fn=lambda _: False)
    params, static = eqx.partition(model, trained)
    rows_of = train if callable(train) else lambda done: train
    rows = rows_of(0)
    n, held_out = (jax.tree.leaves(a)[0].shape[0] for a in (rows, validation))
    batches = -(-n // batch_size)
    advice = (
        f"for steps of {-(-n // batches)} rows (batch_size={batch_size}) and {held_out} validation rows at once: lower "
        "batch_size or validation_fraction, or take a smaller density."
    )
    best, state = params, (params, params, _first_moments(params))
    # An epoch that does not move: the first value, and no second compilation.
    still = jnp.zeros(3, jnp.result_type(float))
    key_validation = jax.random.fold_in(key, 0)  # the same in every epoch: its noise must not choose among them
    keys = key, key_validation
    with explained(advice):
        first = float(_epoch(state, static, rows, validation, keys, still, loss, batches, has_measures)[-1][0])
    progressed = _Progress(first, patience, learning_rate, min_epochs)
    for epoch in (bar := tqdm(range(1, max_epochs + 1), disable=not progress, desc="fit", unit="epoch")):
        decay = min(average, 1 - 10 / (10 + (epoch - 1) * batches))  # the first weights are forgotten soon
        rates = jnp.asarray([progressed.rate, progressed.rate * weight_decay, decay], jnp.result_type(float))
        keys = jax.random.fold_in(key, epoch), key_validation
        try:
            step = _epoch(state, static, rows, validation, keys, rates, loss, batches, has_measures)
            if epoch < max_epochs:
                rows = rows_of(epoch)  # read while the step is computed
            state, (of_train, train_measures), (of_validation, measures) = step
            train_value, validated = float(of_train), float(of_validation)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            progressed.gave_up(epoch, f"Not enough memory {advice}", error)
            break
        improved = progressed.record(epoch, train_value, validated)
        progressed.measure(train_measures, measures)
        if improved or (keep == "last" and np.isfinite(validated) and np.isfinite(train_value)):
            best = state[1]
        bar.set_postfix(validation=f"{validated:.3f}", best=f"{progressed.best:.3f}")
        if progressed.stop_reason:
            break
    return eqx.combine(best, static), progressed.history(batches)


class _Progress:
    """The bookkeeping of one fit: best value, learning rate, when to stop."""

    def __init__(self, first: float, patience: int, rate: float, min_epochs: int = 0):
        self.min_epochs = min_epochs
        self.first, self.best = first, first if np.isfinite(first) else np.inf
        self.patience, self.rate, self.smallest = patience, rate, rate * _SMALLEST_RATE
        self.best_epoch, self.since_cut, self.stop_reason = 0, 0, ""
        self.train: list[float] = []
        self.validation: list[float] = []
        self.measures: dict[str, list[tuple[float, float]]] = {}

    def measure(self, train, validation) -> None:
        """Note what the loss reported beside its value."""
        for name in validation:
            self.measures.setdefault(name, []).append((float(train[name]), float(validation[name])))

    def record(self, epoch: int, train: float, validation: float) -> bool:
        """Note one epoch; True when it is the best so far."""
        self.train.append(train)
        self.validation.append(validation)
        if not (np.isfinite(train) and np.isfinite(validation)):
            self.stop_reason = f"loss not finite at epoch {epoch}"
            kept = f"epoch {self.best_epoch}" if self.best_epoch else "the untrained model"
            warnings.warn(
                f"The loss became {train} (train), {validation} (validation) at epoch {epoch}; kept {kept}. "
                "Try a smaller learning_rate, and look for outliers in theta, x and score.",
                stacklevel=3,
            )
            return False
        improved = validation < self.best - _IMPROVEMENT
        if improved:
            self.best, self.best_epoch, self.since_cut = validation, epoch, 0
            return True
        self.since_cut += 1
        if self.since_cut >= max(1, self.patience // 3):
            self.rate, self.since_cut = max(0.5 * self.rate, self.smallest), 0
        if epoch >= self.min_epochs and epoch - self.best_epoch >= self.patience:
            self.stop_reason = f"no improvement in {self.patience} epochs"
        return False

    def gave_up(self, epoch: int, why: str, error: Exception) -> None:
        """Warn where memory is used up, or raise where there is no trained state to keep."""
        if not self.best_epoch:
            raise MemoryError(why) from error
        self.stop_reason = f"not enough memory at epoch {epoch}"
        warnings.warn(f"{why} Stopped at epoch {epoch}; kept epoch {self.best_epoch}.", stacklevel=3)

    def history(self, batches: int) -> History:
        reason = self.stop_reason or "max_epochs reached"
        steps = batches * len(self.train)
        series = np.asarray(self.train), np.asarray(self.validation)
        measures = {name: np.asarray(values) for name, values in self.measures.items()}
        return History(*series, self.best_epoch, reason, steps, float(self.first), measures)


def _optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(_CLIP), optax.scale_by_adam())


@eqx.filter_jit
def _first_moments(params):
    return _optimizer().init(params)


@eqx.filter_jit
def _epoch(state, static, train, validation, keys, rates, loss, batches, has_measures):
    """One pass over the training rows and the validation loss after it, each with its measures.

    The state is the weights, their moving average and Adam's moments; `rates` step, decay of weights, of the average.
    """
    key, key_validation = keys
    key_order, key_steps = jax.random.split(key)
    n = jax.tree.leaves(train)[0].shape[0]
    order = jax.random.permutation(key_order, n)[: batches * (n // batches)].reshape(batches, -1)

    def measured(params, batch, key):
        value = loss(params, static, batch, key)
        return value if has_measures else (value, {})

    def step(carry, inputs):
        params, mean, state = carry
        index, key = inputs
        batch = jax.tree.map(lambda a: a[index], train)
        value, gradient = jax.value_and_grad(measured, has_aux=True)(params, batch, key)
        updates, state = _optimizer().update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - rates[0] * u - rates[1] * p, params, updates)
        mean = jax.tree.map(lambda m, p: p + rates[2] * (m - p), mean, params)
        return (params, mean, state), value

    state, values = jax.lax.scan(step, state, (order, jax.random.split(key_steps, batches)))
    return state, jax.tree.map(jnp.mean, values), measured(state[1], validation, key_validation)
