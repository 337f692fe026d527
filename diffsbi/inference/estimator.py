"""What all estimators share: simulations with their scores, the split, the linear start, an ensemble of densities."""

import abc
import copy
import functools
import json
import warnings
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed

from diffsbi._types import Array, Float, Key, check_finite, check_key, check_names
from diffsbi.flows import FLOWS, is_smooth
from diffsbi.flows.affine import ConditionalAffine, with_linear_part
from diffsbi.inference.checks import outlier_warnings, precision_warnings, warnings_of_scores
from diffsbi.inference.losses import (
    AbstractScoreLoss,
    FirstTerm,
    MeasuredScore,
    ScoredDensity,
    Start,
    WeightedScore,
    WithoutScore,
    first_noise,
    likelihood_score,
    mean_nll,
    noise_level,
    prior_score,
    unconstrained,
)
from diffsbi.inference.posterior import Member
from diffsbi.inference.proposals import Proposals
from diffsbi.inference.rows import Columns, Joined, Part, checked_part, len_of, where
from diffsbi.inference.standardise import Standardiser, fit_standardiser
from diffsbi.inference.streams import InMemory, Stream, first_of, is_many
from diffsbi.inference.tails import Tails, drawn_in, fit_tails
from diffsbi.inference.training import History, fit, schedule
from diffsbi.inference.weighting import check_fitted, validation_weights
from diffsbi.prior import Prior

SMALLEST_N = 10
Density = str | Callable[..., AbstractDistribution] | None


Fitted = TypeVar("Fitted")


class Estimator(abc.ABC, Generic[Fitted]):
    r"""Collects simulations (`append` changes it and returns it) and fits conditional densities to them.

    More rows than fit into memory comfortably (`diffsbi.inference.streams`) are streamed from wherever they are.

    What is modelled, what it is conditioned on, and in which of the two the score is taken is the subclass's; what is
    fitted is in the frozen posterior that `fit` returns.

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        density: Name in `diffsbi.flows.FLOWS`, a constructor `(key, dim, condition_dim) -> distribution`, or
            None for the default, "smooth".
        score_weight: "auto" (the inverse covariance of the score's noise, measured: `MeasuredScore`), a
            number $\lambda$ or one per standardised parameter (`WeightedScore`). 0 ignores the scores.
        density_options: Further keywords of the density's constructor.
        force_scores: Train a density on scores although its own is not continuous ("spline"), which is refused.
    """

    _member: type[Member] = Member
    _fewest_in_batch = 1

    def __init__(
        self,
        prior,
        density: Density = None,
        *,
        score_weight="auto",
        density_options: dict[str, Any] | None = None,
        force_scores: bool = False,
    ):
        own = prior if isinstance(prior, Prior) else getattr(prior, "prior", None)
        if not isinstance(own, Prior):
            given = type(prior).__name__
            raise ValueError(f'Expected a Prior({{"name": distribution, ...}}), or something with one; got {given}.')
        self.prior: Prior = own
        self.density = "smooth" if density is None else density
        if isinstance(self.density, str):
            check_names([self.density], list(FLOWS), "density")
        options = dict(density_options or {}).items()
        self.density_options = {name: v.item() if isinstance(v, np.generic) else v for name, v in options}
        self.force_scores = bool(force_scores)
        self.score_weight = _checked_weight(score_weight, self.prior.dim)
        self._rows: list[Part] = []

    def __len__(self) -> int:
        return sum(len_of(part.theta) for part in self._rows)

    @property
    def from_prior(self) -> bool:
        """Whether all simulations are, as far as is known, from the prior: none was appended with a proposal."""
        return all(part.proposal is None for part in self._rows)

    def append(self, theta, x, score=None, *, proposal=None, on_invalid: str = "raise") -> Self:
        r"""Add simulations and return this object.

        Arrays on disk (`numpy.memmap`, zarr, `SimulationStore.__getitem__`) are checked block by block and stay there.

        Args:
            theta: Parameters, (n, p).
            x: Summaries, (n, d).
            score: $\nabla_\theta \log p(x, z | \theta)$ without the prior's, (n, p); for all appended rows or for none.
            proposal: What theta was drawn from, with a normalised `log_prob`, a JAX function of theta (n, p); None for
                the prior. Posteriors are corrected for it, likelihoods and ratios do not depend on it.
            on_invalid: "raise", or "drop": rows with a number that is not finite are left out, with a warning that
                says how many, and where; the fit is then biased wherever such rows are likelier than elsewhere.

        Raises:
            ValueError: Wrong shapes, values that are not finite, theta outside the prior, or scores for only some
                of the rows.
        """
        if score is not None and self._uses_scores() and not self.force_scores and not is_smooth(self.density):
            raise ValueError(
                f"Expected a smooth density for scores; the score of {self.density!r} is not continuous. "
                "Choose another density, score_weight=0, or force_scores=True."
            )
        self._rows.append(checked_part(self.prior, self._rows, theta, x, score, proposal, on_invalid))
        return self

    def restricted(self, inside: Callable[[np.ndarray], np.ndarray] | None = None) -> Self:
        """A copy with the simulations whose theta `(n, p)` is `inside` `(n,)`; all of them for None."""
        if inside is not None and not self.from_prior:
            raise ValueError("Expected simulations from the prior for truncated rounds; these had a proposal. Use NLE.")
        other = copy.copy(self)
        parts = list(self._rows)
        other._rows = parts if inside is None else [where(inside, part) for part in parts]
        return other

    @abc.abstractmethod
    def _posterior(self, members: tuple[Member, ...], histories: tuple[History, ...], config_json: str) -> Fitted:
        """What `fit` returns."""

    @abc.abstractmethod
    def _roles(self, rows: Columns) -> tuple[np.ndarray, np.ndarray]:
        """(what is modelled, what it is conditioned on), from unconstrained parameters "u" and data "x"."""

    @abc.abstractmethod
    def _target_score(self, of_likelihood: Array, of_prior: Array) -> Array:
        """The score in unconstrained space that the density's own is compared with."""

    @abc.abstractmethod
    def _standard_score(self, standardiser: Standardiser, score: Array) -> Array:
        """That score in the standardised parameters."""

    def _along(self, standardiser: Standardiser) -> Array | None:
        """What the losses need to take the density's score in the condition; None: it is taken in what is modelled."""
        return None

    def fit(
        self,
        key: Key,
        *,
        members: int = 4,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        patience: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1.0,
        validation_fraction: float = 0.1,
        weighting: str | None = None,
        progress: bool = False,
    ) -> Fitted:
        """Fit to all appended rows.

        Args:
            key: Initial weights, validation split and order of the rows.
            members: Densities to fit, each with its own split and start; the posterior is their mixture,
                which overfits less than any of them (they share one compilation).
            max_epochs: Most epochs; by default those of about 5 000 steps, 20 000 from 10 000 rows on.
            batch_size: Rows per step; by default 32 to 256, growing with the number of rows.
            patience: Epochs without improvement before stopping; by default those of about 400 steps, at least 20.
            learning_rate: First step size of Adam.
            weight_decay: Decoupled weight decay (as AdamW): towards the linear-Gaussian answer.
            validation_fraction: Rows kept aside to decide when to stop.
            weighting: "validation": the mixture's weights by the rows that members did not train on
                (`stacking_weights`); "equal"; None for the former wherever the loss is a log-density (not for NRE,
                nor the atomic correction).
            progress: Show a progress bar.

        Raises:
            ValueError: Fewer than 10 rows, or weights by validation where the loss is not a log-density.
        """
        check_key(key)
        weighting = weighting or ("validation" if self._is_likelihood() else "equal")
        check_names([weighting], ["equal", "validation"], "weighting")
        if weighting == "validation" and not self._is_likelihood():
            raise ValueError("Expected weighting='equal' where the loss is a contrast (NRE, atomic); got 'validation'.")
        if len(self) < SMALLEST_N:
            raise ValueError(f"Expected at least {SMALLEST_N} simulations to fit; got {len(self)}.")
        if members < 1:
            raise ValueError(f"Expected members >= 1; got {members}.")
        if batch_size is not None and batch_size < self._fewest_in_batch:
            raise ValueError(f"Expected batch_size >= {self._fewest_in_batch}; got {batch_size}.")
        rows = self._unconstrained_rows()
        options = schedule(self._rows_per_epoch(rows), max_epochs, batch_size, patience, len(self))
        options |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "progress": progress}
        fits = [self._fit_one(k, rows, validation_fraction, options) for k in jax.random.split(key, int(members))]
        check_fitted([history for _, history, _ in fits])
        config = self._config(rows, int(members))
        if weighting == "validation" and members > 1:
            columns, held_out = rows.judged([held_out for *_, held_out in fits])
            judged = zip((m for m, *_ in fits), held_out, strict=True)
            config["weights"] = validation_weights(list(judged), *self._roles(columns))
        return self._posterior(tuple(m for m, *_ in fits), tuple(h for _, h, _ in fits), json.dumps(config))

    def _config(self, rows: InMemory | Stream, members: int) -> dict[str, Any]:
        """What a posterior's file says about it."""
        return {
            "estimator": type(self).__name__,
            "density": self.density if isinstance(self.density, str) else None,
            "density_options": self.density_options,
            "x_dim": int(self._rows[0].x.shape[1]),
            "members": members,
            "simulations": len(self),
        } | rows.account()

    def _unconstrained_rows(self) -> InMemory | Stream:
        """All rows, or what streams them."""
        thetas, xs, scores, _ = zip(*self._rows, strict=True)
        arrays = Joined(thetas), Joined(xs), Joined(scores) if self._with_score() else None
        messages: list[str] = []

        def prepare(theta, x, score):
            tails = self._tails(x, is_many(*arrays))
            messages.extend([*outlier_warnings(x, tails is not None), *precision_warnings(x)])
            if score is not None:
                messages.extend(warnings_of_scores(self.prior, theta, drawn_in(tails, x), score))
            correct = self._correction(jnp.asarray(theta, jnp.result_type(float)))
            return tails, lambda *rows: self._columns(correct, tails, *rows)

        rows: InMemory | Stream
        if is_many(*arrays):
            rows = Stream(*arrays, prepare)
        else:
            everything = [None if a is None else a[:] for a in arrays]
            tails, columns = prepare(*everything)
            rows = InMemory(columns(*everything), tails)
        for message in messages:
            warnings.warn(message, stacklevel=3)
        return rows

    def _tails(self, x: Float[Array, "n d"], always: bool) -> Tails | None:
        """How rows that are far from all others are drawn in; `always`: there are more rows than these of x."""
        return fit_tails(x, always)

    def _columns(self, correct, tails: Tails | None, theta, x, score) -> Columns:
        """Rows in unconstrained space, x with its tails drawn in."""
        theta, x = jnp.asarray(theta, jnp.result_type(float)), drawn_in(tails, x)
        rows = {"u": unconstrained(self.prior, theta), "x": x}
        if score is not None:
            of_likelihood = likelihood_score(self.prior, theta, jnp.asarray(score, jnp.result_type(float)))
            rows["score"] = self._target_score(of_likelihood, self._prior_score(theta))
        rows |= correct(theta)
        for name, value in rows.items():
            where = "in unconstrained space" if name != "x" else f"as {value.dtype} (rescale what is too large for it)"
            check_finite(f"{name} {where}", value)
        return {name: np.asarray(value) for name, value in rows.items()}

    def _uses_scores(self) -> bool:
        return isinstance(self.score_weight, str) or bool(np.any(self.score_weight > 0))

    def _with_score(self) -> bool:
        """Whether there are scores, and they are used."""
        return bool(self._rows) and self._rows[0].score is not None and self._uses_scores()

    def _proposals(self) -> Proposals | None:
        """What all rows were drawn from; None for the prior."""
        components = {id(part.proposal): part.proposal for part in self._rows}
        if all(c is None for c in components.values()):
            return None
        counts = [sum(len_of(part.theta) for part in self._rows if id(part.proposal) == i) for i in components]
        return Proposals(self.prior, tuple(components.values()), tuple(c / len(self) for c in counts))

    def _prior_score(self, theta: Array) -> Array:
        """Gradient of the log-density that the fit takes for the prior's."""
        return prior_score(self.prior, theta)

    def _correction(self, theta: Float[Array, "n p"]) -> Callable[[Array], dict[str, Array]]:
        """theta → columns that correct for proposals; made from all rows, or from some of very many."""
        return lambda theta: {}

    def _first(self, standardiser: Standardiser) -> FirstTerm:
        """What is minimised beside the score."""
        return mean_nll

    def _rows_per_epoch(self, rows: InMemory | Stream) -> int:
        return rows.per_epoch

    def _more(self, standardiser: Standardiser, v: Array, c: Array) -> dict[str, Array]:
        """Further columns of the rows, for the loss."""
        return {}

    def _is_likelihood(self) -> bool:
        """Whether the first term of the loss is a mean negative log-density."""
        return True

    def _density(self, key: Key, dim: int, condition_dim: int):
        """What is trained, untrained."""
        return build_density(key, self.density, dim, condition_dim, self.density_options)

    def _fit_one(self, key, rows, validation_fraction, options):
        key_fit = jax.random.split(key, 4)[3]
        start = self._start(key, rows, validation_fraction, options)
        model, history = fit(key_fit, start.model, start.train, start.validation, start.loss, **options)
        density = model.density if start.affine is None else with_linear_part(model.density, start.affine)
        return self._member(start.standardiser, density), history, start.held_out

    def _start(self, key, rows, validation_fraction, options, *, believe: bool = True) -> Start:
        """All that a fit needs, the model at its linear start; with pseudo-rows where those are for it to `believe`."""
        key_split, key_density, key_linear, _ = jax.random.split(key, 4)
        train, held_out = rows.split(key_split, validation_fraction)
        standardiser = self._fit_standardiser(*self._roles(rows.sample(train)))
        standardised = functools.partial(self._standardised, standardiser)
        data, validation = rows.train(key_split, train, standardised), standardised(rows.take(held_out))
        if believe:
            data, validation = self._believed(jax.random.fold_in(key_split, 1), standardiser, data, validation)
        return self._begin((key_density, key_linear), standardiser, data, validation, held_out, options)

    def _believed(self, key, standardiser: Standardiser, data, validation):
        """The rows, and more that say what is believed before any."""
        return data, validation

    def _fit_standardiser(self, modelled: np.ndarray, condition: np.ndarray) -> Standardiser:
        return fit_standardiser(modelled, condition)

    def _standardised(self, standardiser: Standardiser, rows: Columns) -> dict[str, Array]:
        modelled, condition = self._roles(rows)
        c = standardiser.condition(jnp.asarray(condition))
        out = {"v": standardiser.to_standard(jnp.asarray(modelled), c), "c": c}
        if "score" in rows:
            used = rows["score"] * rows["use"][:, None]  # so that no term overflows where it is left out
            out["score"] = self._standard_score(standardiser, jnp.asarray(used))
            out["use"] = jnp.asarray(rows["use"])
        out |= {name: jnp.asarray(rows[name]) for name in ("weight", "log_prior") if name in rows}
        return out | self._more(standardiser, out["v"], c)

    def _begin(self, keys, standardiser: Standardiser, data, validation, held_out, options) -> Start:
        """The model at its start, from standardised rows; `keys` of the density and of the linear fit."""
        key_density, key_linear = keys
        density = self._density(key_density, validation["v"].shape[1], validation["c"].shape[1])
        loss = self._loss(validation, self._along(standardiser), self._first(standardiser))
        model = ScoredDensity(density)
        if "score" in validation:
            model = self._linear_start(key_linear, density, data, validation, loss, options)
        return Start(standardiser, model, data, validation, loss, held_out)

    def _loss(self, data, along: Array | None, first: FirstTerm) -> AbstractScoreLoss:
        if "score" not in data:
            return WithoutScore(along, first)
        if isinstance(self.score_weight, str):
            # Of contrasts the density is not normalised, and its scores follow the level better as it stands.
            return MeasuredScore(along, first, None if self._is_likelihood() else 1.0)
        weight = jnp.broadcast_to(jnp.asarray(self.score_weight, data["v"].dtype), (self.prior.dim,))
        return WeightedScore(weight, along, first)

    def _linear_start(self, key, density, data, validation, loss, options) -> ScoredDensity:
        """The density with its linear part, and the noise model, fitted first: few parameters, so little to overfit."""
        key_level, key_fit = jax.random.split(key)
        p, d = validation["v"].shape[1], validation["c"].shape[1]
        linear = with_linear_part(StandardNormal((p,)), ConditionalAffine(p, d))  # type: ignore[call-arg]
        model = first_model(key_level, linear, first_of(data), loss)
        rate = {"learning_rate": 10 * options["learning_rate"], "weight_decay": 0.0}
        model, _ = fit(key_fit, model, data, validation, loss, **(options | rate))
        level = noise_level(key_level, p, d) if model.level is not None else None
        return ScoredDensity(with_linear_part(density.base_dist, model.density.bijection), model.noise, level)


def first_model(key: Key, density, data: dict[str, Array], loss: AbstractScoreLoss) -> ScoredDensity:
    """An untrained density with the noise of its scores, where the loss learns that."""
    if not isinstance(loss, MeasuredScore):
        return ScoredDensity(density)
    noise = first_noise(data["score"] - loss.start(data["v"]))
    return ScoredDensity(density, noise, noise_level(key, data["v"].shape[1], data["c"].shape[1]))


def build_density(key: Key, density: Density, dim: int, condition_dim: int, options: dict[str, Any]) -> Transformed:
    """The density with a linear part, untrained."""
    constructor = FLOWS[density] if isinstance(density, str) else density
    return with_linear_part(constructor(key, dim, condition_dim, **options))


def _checked_weight(weight, dim: int) -> str | np.ndarray:
    if isinstance(weight, str):
        if weight != "auto":
            raise ValueError(f"Expected score_weight 'auto', a number or {dim} numbers; got {weight!r}.")
        return weight
    value = np.asarray(weight, float)
    if value.shape not in ((), (1,), (dim,)) or not np.all(np.isfinite(value)) or np.any(value < 0):
        raise ValueError(f"Expected score_weight 'auto', a number >= 0 or {dim} of them; got {weight!r}.")
    return value
