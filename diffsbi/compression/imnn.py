r"""Information Maximising Neural Networks: summaries that keep as much Fisher information at one point as they can.

Charnock, Lavaux & Wandelt 2018 (arXiv:1802.03634); the regularisation as in Makinen et al. 2021 (arXiv:2107.07405).
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.distributions import MultivariateNormal

from diffsbi._types import Array, Float, Key, check_finite_values, check_key, check_trailing
from diffsbi.compression import arrays
from diffsbi.compression.information import (
    Information,
    Regularisation,
    check_positive,
    information_loss,
    log_det,
    measured_information,
)
from diffsbi.compression.saving import check_probe, fixed_input, load_module, read_header, save_module
from diffsbi.compression.simulations import AbstractSimulations, Network, Simulated, Streamed, summaries_of
from diffsbi.inference.training import History, fit

_STREAMED = 100  # rows that are read at a time where nothing is said
_SMALLEST_EIGENVALUE = 1e-4  # of the first covariance, relative to the largest


class IMNN(eqx.Module):
    r"""A network x → t `(m,)` and simulations at one point, before training; made by one of the `from_...` methods.

    The loss $-\ln\det F + r L_2$, $F = \partial\mu^T C^{-1}\partial\mu$, is of a whole set of simulations. With
    `n_per_device`, only so many of them are in memory at a time on each of the `devices`; the loss is the same.

    Attributes:
        network: Any Equinox module, `x_shape` → `(m,)`, m at least the number of parameters.
        train, validation: The two sets of simulations.
        regularisation: λ and ε.
        n_per_device: Simulations in memory at a time; None: all.
        devices: Devices that share the work; None: the default one.
    """

    network: Network
    train: AbstractSimulations
    validation: AbstractSimulations
    regularisation: Regularisation = Regularisation()
    n_per_device: int | None = eqx.field(static=True, default=None)
    devices: tuple[jax.Device, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        t = self._summary_shape()
        if not (isinstance(t, jax.ShapeDtypeStruct) and t.ndim == 1):
            raise ValueError(f"Expected a network from {self.train.x_shape} to (n_summaries,); it gives {t}.")
        if self.validation.x_shape != self.train.x_shape:
            raise ValueError(
                f"Expected validation data of the training data's shape, {self.train.x_shape}; got "
                f"{self.validation.x_shape}."
            )
        for name, simulations in (("training", self.train), ("validation", self.validation)):
            arrays.check_size(simulations, t.shape[0], name)
            for count in (simulations.n_d, simulations.n_s - simulations.n_d):
                if self.devices and count % len(self.devices):
                    raise ValueError(
                        f"Expected n_d and n_s - n_d to be multiples of the {len(self.devices)} devices; got {count} "
                        f"{name} simulations. Leave out a few, or use fewer devices."
                    )
        if self.n_per_device is not None and self.n_per_device < 1:
            raise ValueError(f"Expected n_per_device >= 1; got {self.n_per_device}.")
        arrays.check_different(self.train, self.validation)

    def _summary_shape(self):
        shape = jax.ShapeDtypeStruct(self.train.x_shape, self.train.theta0.dtype)
        return eqx.filter_eval_shape(lambda network, x: network(x), self.network, shape)

    @classmethod
    def from_simulator(
        cls,
        network: Network,
        simulate: Callable[[Array, Key], Array],
        theta0,
        *,
        n_s: int = 1000,
        n_d: int | None = None,
        n_validation: int | None = None,
        key: Key | None = None,
        **settings,
    ) -> "IMNN":
        """Simulations and forward-mode derivatives on the fly, `simulate(theta, key)` → x.

        New ones in every step, which cannot be overfitted; with `key` the same ones in every step, as in the original.
        `n_d` of the `n_s` have derivatives (all, where left out). Seeds of the `n_validation` (`n_s` where left out),
        the same ones in every validation, come from the key of `fit`.
        """
        train = arrays.simulated(simulate, theta0, n_s, n_d, key)
        n = n_validation or n_s
        return _make(
            cls,
            network,
            train,
            Simulated(simulate=simulate, theta0=train.theta0, n_s=n, n_d=n, x_shape=train.x_shape),
            settings,
        )

    @classmethod
    def from_derivatives(cls, network: Network, theta0, train, validation, *, check=None, **settings) -> "IMNN":
        """Stored simulations with derivatives: `train` and `validation` are (x, dx/dtheta), parameters last.

        Arrays on disk stay there (`diffsbi.compression.arrays.stored`, which also explains `check`).
        """
        sets = arrays.stored(theta0, *train, check=check), arrays.stored(theta0, *validation)
        return _make(cls, network, *sets, settings)

    @classmethod
    def from_pairs(cls, network: Network, theta0, width, train, validation, *, check=None, **settings) -> "IMNN":
        """Derivatives of the summaries by finite differences: `train` and `validation` are (x, minus, plus).

        `minus` and `plus` are simulations of the same seeds at theta0 ∓ width/2 (`diffsbi.compression.arrays.pairs`,
        which also explains `check`).
        """
        sets = arrays.pairs(theta0, width, *train, check=check), arrays.pairs(theta0, width, *validation)
        return _make(cls, network, *sets, settings)

    def fit(
        self,
        key: Key,
        *,
        max_iterations: int = 10_000,
        min_iterations: int = 0,
        patience: int = 1000,
        validate_every: int = 10,
        learning_rate: float = 1e-3,
        keep: str = "best",
        average: float = 0.995,
        n_refit: int | None = None,
        progress: bool = False,
    ) -> "FittedIMNN":
        """Train the network, then measure μ, C, ∂μ/∂θ and F anew, with simulations that the training did not use.

        Args:
            key: Seeds of the simulations (training, validation and last ones are different), and of nothing else.
            max_iterations, min_iterations: Gradient steps.
            patience: Steps without improvement of the validation's ln det F before stopping.
            validate_every: Steps between two looks at the validation set, and entries of the history, whose validation
                value is -ln det F alone.
            learning_rate: Of Adam; it halves when a third of the patience has passed without improvement.
            keep: Weights of the "best" or the "last" validation.
            average: Decay per step of a moving average of the weights, which is what is validated and kept.
            n_refit: Simulations for the last measurement, of a simulator only (ten times n_s where left out); stored
                ones are measured on their validation set.
            progress: Show a progress bar.
        """
        key_start, key_fit, key_validation, key_refit = jax.random.split(check_key(key), 4)
        validation = self.validation
        if isinstance(validation, Simulated) and validation.key is None:
            validation = eqx.tree_at(lambda s: s.key, validation, key_validation, is_leaf=lambda x: x is None)
        if n_refit is not None and not isinstance(validation, Simulated):
            raise ValueError(
                "Expected n_refit with a simulator only; stored simulations are measured on their validation."
            )
        if n_refit is not None:
            arrays.check_size(dataclasses.replace(validation, n_s=n_refit), self._summary_shape().shape[0], "n_refit")
        memory = self.n_per_device or (_STREAMED if isinstance(self.train, Streamed) else None)
        train, validation = (self._placed(s) for s in (self.train, validation))
        start = _whitened(self.network, _all_summaries(self.network, train, key_start, memory, self.devices)[0])
        loss = _SetLoss(train, validation, self.regularisation, memory, self.devices)
        epochs = lambda n: -(-n // validate_every)  # noqa: E731
        # One row is one step with the whole set: the loss holds the sets, the loop only counts and hands out keys.
        rows = {"train": jnp.arange(validate_every)}, {"validation": jnp.arange(1)}
        limits = dict(max_epochs=epochs(max_iterations), min_epochs=epochs(min_iterations), patience=epochs(patience))
        options = dict(batch_size=1, learning_rate=learning_rate, keep=keep, average=average, progress=progress)
        options["constants"] = lambda network: [network.shift, network.matrix]
        network, history = fit(key_fit, start, *rows, loss, has_measures=True, **limits, **options)
        last = validation
        if isinstance(validation, Simulated):
            n = n_refit or 10 * validation.n_s
            last = dataclasses.replace(validation, n_s=n, n_d=n, key=key_refit)
        memory = min(self.n_per_device or validation.n_d, validation.n_d)
        found, error = measured_information(*_all_summaries(network, last, key_refit, memory, None))
        return _fitted(network, found, error, self.train, history, validate_every)

    @staticmethod
    def load(path, network: Network) -> "FittedIMNN":
        """The fit that `FittedIMNN.save` wrote, with a network of the same architecture."""
        return FittedIMNN.load(path, network)

    def _placed(self, simulations):
        """Stored simulations split among the devices."""
        if self.devices is None or simulations.data is None:
            return simulations
        sharding = NamedSharding(Mesh(np.asarray(self.devices), ("device",)), PartitionSpec("device"))
        return eqx.tree_at(lambda s: s.data, simulations, jax.device_put(simulations.data, sharding))


class FittedIMNN(eqx.Module):
    r"""Quasi-maximum-likelihood estimates $\hat\theta(x) = \theta_0 + F^{-1} \partial\mu^T C^{-1} (t(x) - \mu)$.

    Attributes:
        network: x → t.
        theta0: Expansion point, `(p,)`.
        mean: μ, `(m,)`.
        matrix: $F^{-1} \partial\mu^T C^{-1}$, `(p, m)`.
        fisher: F without bias, `(p, p)`, of simulations that the network was not trained on.
        log_det_error: Standard error of its ln det.
        history: One entry for each validation; `measures` has det F, det C, det C^-1, L2 and r.
    """

    network: Network
    theta0: Float[Array, " p"]
    mean: Float[Array, " m"]
    matrix: Float[Array, "p m"]
    fisher: Float[Array, "p p"]
    x_shape: tuple[int, ...] = eqx.field(static=True)
    log_det_error: float = eqx.field(static=True, default=float("nan"))
    validate_every: int = eqx.field(static=True, default=1)
    history: History | None = None

    @property
    def det_fisher(self) -> float:
        """det F; 0 where F is not positive."""
        return float(np.exp(log_det(self.fisher)))

    def summaries(self, x: Float[Array, "*n x"], batch_size: int = 256) -> Float[Array, "*n m"]:
        """t(x), of one data set or of many."""
        x = jnp.asarray(x, self.theta0.dtype)
        check_trailing("x", x, self.x_shape)
        check_finite_values("x", x)
        leading = x.shape[: x.ndim - len(self.x_shape)]
        return _summaries(self.network, x.reshape(-1, *self.x_shape), batch_size).reshape(*leading, -1)

    def __call__(self, x: Float[Array, "*n x"]) -> Float[Array, "*n p"]:
        t = self.summaries(x)
        shift = (t - jnp.broadcast_to(self.mean, t.shape)) @ self.matrix.T
        return shift + jnp.broadcast_to(self.theta0, shift.shape)

    def gaussian(self, x) -> MultivariateNormal:
        r"""$\mathcal N(\hat\theta(x), F^{-1})$: the posterior for a flat prior, where F does not change with theta."""
        check_positive(self.fisher)
        return MultivariateNormal(self(x), precision_matrix=self.fisher)

    def panels(self) -> dict[str, list[dict]]:
        """The history as `plotting.training_curves` takes it, a panel for each measure."""
        found = self.history
        if found is None:
            raise ValueError("Expected a fit with its history.")
        kept = {"best_epoch": found.best_epoch, "every": self.validate_every}
        return {n: [kept | {"train": v[:, 0], "validation": v[:, 1]}] for n, v in found.measures.items()}

    def save(self, path) -> None:
        """Write one file; `IMNN.load` reads it."""
        series = self.history and {
            **{name: getattr(self.history, name).tolist() for name in ("train", "validation")},
            **{
                name: getattr(self.history, name) for name in ("best_epoch", "stop_reason", "steps", "first_validation")
            },
            "measures": {name: values.tolist() for name, values in self.history.measures.items()},
        }
        account = {"log_det_error": self.log_det_error, "validate_every": self.validate_every, "history": series}
        probe = np.asarray(self.summaries(fixed_input([self.x_shape, 0.0, 1.0])), float).tolist()
        sizes = {"x_shape": list(self.x_shape), "p": len(self.theta0), "m": len(self.mean), "probe": probe}
        save_module(path, "IMNN", self._arrays(), sizes | account)

    def _arrays(self):
        return self.network, self.theta0, self.mean, self.matrix, self.fisher

    @classmethod
    def load(cls, path, network: Network) -> "FittedIMNN":
        """The fit that `save` wrote; `network` is one of the same architecture, its weights are replaced.

        Raises:
            ValueError: If the file is damaged, or the network another one: in the shapes of its arrays, or in what it
                makes of a fixed input (another activation has the same shapes).
        """
        header, about, payload = read_header(path, "IMNN")
        p, m, shape = header["p"], header["m"], tuple(header["x_shape"])
        empty = (_Whitened(network, jnp.zeros(m), jnp.zeros((m, m))), jnp.zeros(p), jnp.zeros(m))
        like = (*empty, jnp.zeros((p, m)), jnp.zeros((p, p)))
        network, theta0, mean, matrix, fisher = load_module(path, about, payload, like)
        history = header["history"] and History(**_as_arrays(header["history"]))
        account = {"log_det_error": header["log_det_error"], "validate_every": header["validate_every"]}
        found = cls(network, theta0, mean, matrix, fisher, shape, history=history, **account)
        check_probe(path, found.summaries(fixed_input([shape, 0.0, 1.0])), header["probe"])
        return found


class _Whitened(eqx.Module):
    """A linear map of the summaries to C = 1 before the first step: the same F, and a regularisation near zero."""

    network: Network
    shift: Array
    matrix: Array

    def __call__(self, x):
        return self.matrix @ (self.network(x) - self.shift)


class _SetLoss(eqx.Module):
    """`information_loss` of whole sets of simulations; the batch only says which."""

    train: AbstractSimulations
    validation: AbstractSimulations
    regularisation: Regularisation
    n_per_device: int | None = eqx.field(static=True)
    devices: tuple[jax.Device, ...] | None = eqx.field(static=True)

    def __call__(self, params, static, batch, key):
        simulations = self.validation if "validation" in batch else self.train
        network = eqx.combine(params, static)
        t, dt = summaries_of(network, simulations, key, self.n_per_device, self.devices)
        value, measures = information_loss(t, dt, self.regularisation)
        # Weights are chosen by what they know; the regularisation only fixes the scale of the summaries.
        return (-measures["ln det F"] if simulations is self.validation else value), measures


def _make(cls, network, train, validation, settings) -> IMNN:
    settings = dict(settings)
    strength, closeness = settings.pop("strength", 1.0), settings.pop("closeness", 0.1)
    devices: Sequence | None = settings.pop("devices", None)
    n_per_device = settings.pop("n_per_device", None)
    if settings:
        known = "strength, closeness, n_per_device and devices"
        raise TypeError(f"Unknown settings {sorted(settings)}; expected some of {known}.")
    regularisation = Regularisation(strength, closeness)
    return cls(network, train, validation, regularisation, n_per_device, devices and tuple(devices))


def _whitened(network, t) -> _Whitened:
    t = np.asarray(t, float)
    arrays.check_summaries(t)
    values, vectors = np.linalg.eigh(np.cov(t.T, ddof=1).reshape(t.shape[1], -1))
    root = vectors / np.sqrt(np.maximum(values, _SMALLEST_EIGENVALUE * values[-1]))
    dtype = jnp.result_type(float)
    return _Whitened(network, jnp.asarray(t.mean(0), dtype), jnp.asarray(root.T, dtype))


def _fitted(network, found: Information, error, simulations, history, validate_every) -> FittedIMNN:
    weights = np.linalg.solve(found.fisher, found.derivative.T @ found.precision)
    if not np.isfinite(found.unbiased).all():
        warnings.warn("Summaries of some of the simulations of the last measurement are not finite.", stacklevel=3)
    elif log_det(found.unbiased) == -np.inf:
        warnings.warn(
            "The Fisher matrix, measured without bias, is not positive: too few simulations, or summaries that know "
            "nothing. Estimates are kept; for `gaussian` take more derivatives (n_d) or a larger n_refit.",
            stacklevel=3,
        )
    measured = (found.mean, weights, found.unbiased)
    mean, matrix, fisher = (jnp.asarray(a, simulations.theta0.dtype) for a in measured)
    account = (simulations.x_shape, error, validate_every, history)
    return FittedIMNN(network, simulations.theta0, mean, matrix, fisher, *account)


_all_summaries = eqx.filter_jit(summaries_of)


@eqx.filter_jit
def _summaries(network, x, batch_size):
    return jax.lax.map(network, x, batch_size=batch_size)


def _as_arrays(entry: dict) -> dict:
    measures = {name: np.asarray(values, float) for name, values in entry["measures"].items()}
    return entry | {n: np.asarray(entry[n], float) for n in ("train", "validation")} | {"measures": measures}
