"""What all estimators share: simulations with their scores, the split, the linear start, an ensemble of densities."""

import abc
import copy
import json
import warnings
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed

from diffsbi._types import Array, Key, check_finite, check_key, check_names
from diffsbi.flows import FLOWS, is_smooth
from diffsbi.flows.affine import ConditionalAffine, with_linear_part
from diffsbi.inference.checks import score_warnings
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
    score_outliers,
)
from diffsbi.inference.posterior import Member
from diffsbi.inference.proposals import Proposals
from diffsbi.inference.standardise import Standardiser, fit_standardiser
from diffsbi.inference.training import History, fit, schedule, split_rows
from diffsbi.inference.weighting import validation_weights
from diffsbi.prior import Prior

SMALLEST_N = 10
Density = str | Callable[..., AbstractDistribution] | None


Fitted = TypeVar("Fitted")


class Estimator(abc.ABC, Generic[Fitted]):
    r"""Collects simulations (`append` changes it and returns it) and fits conditional densities to them.

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

    def __init__(
        self,
        prior,
        density: Density = None,
        *,
        score_weight="auto",
        density_options: dict[str, Any] | None = None,
        force_scores: bool = False,
    ):
        self.prior: Prior = prior if isinstance(prior, Prior) else prior.prior
        self.density = "smooth" if density is None else density
        if isinstance(self.density, str):
            check_names([self.density], list(FLOWS), "density")
        self.density_options = dict(density_options or {})
        self.force_scores = bool(force_scores)
        self.score_weight = _checked_weight(score_weight, self.prior.dim)
        self._rows: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, Any]] = []

    def __len__(self) -> int:
        return sum(len(row[0]) for row in self._rows)

    def append(self, theta, x, score=None, *, proposal=None, on_invalid: str = "raise") -> Self:
        r"""Add simulations and return this object.

        Args:
            theta: Parameters, (n, p).
            x: Summaries, (n, d).
            score: $\nabla_\theta \log p(x, z | \theta)$ without the prior's, (n, p); for all appended rows or for none.
            proposal: What theta was drawn from, with a `log_prob(theta)` in JAX (`gaussian_proposal`); None for the
                prior. Likelihoods and ratios do not depend on it; posteriors are corrected for it.
            on_invalid: "raise", or "drop": rows with a number that is not finite are left out, with a warning that
                says how many; the fit is then biased wherever such rows are likelier than elsewhere.

        Raises:
            ValueError: Wrong shapes, values that are not finite, theta outside the prior, or scores for only some
                of the rows.
        """
        theta, x = np.asarray(theta), np.asarray(x)
        score = None if score is None else np.asarray(score)
        self._check_shapes(theta, x, score)
        check_names([on_invalid], ["raise", "drop"], "on_invalid")
        if score is not None and self._uses_scores() and not self.force_scores and not self._smooth():
            raise ValueError(
                f"Expected a smooth density for scores; the score of {self.density!r} is not continuous. "
                "Choose another density, score_weight=0, or force_scores=True."
            )
        if on_invalid == "drop":
            theta, x, score = _finite_rows(theta, x, score)
        check_finite("theta", theta)
        check_finite("x", x)
        if score is not None:
            check_finite("score", score)
        self.prior.check(theta)
        if proposal is not None and not hasattr(proposal, "log_prob"):
            raise ValueError(f"Expected a proposal with log_prob(theta), or None for the prior; got {proposal!r}.")
        self._rows.append((theta, x, score, proposal))
        return self

    def restricted(self, inside: Callable[[np.ndarray], np.ndarray] | None = None) -> Self:
        """A copy with the simulations whose theta `(n, p)` is `inside` `(n,)`; all of them for None."""
        if inside is not None and any(row[3] is not None for row in self._rows):
            raise ValueError("Expected simulations from the prior for truncated rounds; these had a proposal. Use NLE.")
        other = copy.copy(self)
        rows = list(self._rows)
        other._rows = rows if inside is None else [(*_select(inside(row[0]), *row[:3]), row[3]) for row in rows]
        return other

    def _check_shapes(self, theta, x, score):
        p = self.prior.dim
        if theta.ndim != 2 or theta.shape[1] != p:
            raise ValueError(f"Expected theta with shape (n, {p}) for {list(self.prior.names)}; got {theta.shape}.")
        if x.ndim != 2 or len(x) != len(theta) or x.shape[1] < 1:
            raise ValueError(f"Expected x with shape ({len(theta)}, d), summaries of each row; got {x.shape}.")
        if score is not None and score.shape != theta.shape:
            raise ValueError(f"Expected score with shape {theta.shape}, as theta; got {score.shape}.")
        if not self._rows:
            return
        _, x_before, score_before, _ = self._rows[0]
        if x.shape[1] != x_before.shape[1]:
            raise ValueError(f"Expected x with {x_before.shape[1]} columns, as appended before; got {x.shape[1]}.")
        if (score is None) != (score_before is None):
            with_score = "with" if score_before is not None else "without"
            raise ValueError(f"Expected rows {with_score} score, as appended before; got the opposite.")

    @abc.abstractmethod
    def _posterior(self, members: tuple[Member, ...], histories: tuple[History, ...], config_json: str) -> Fitted:
        """What `fit` returns."""

    @abc.abstractmethod
    def _roles(self, rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
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
            max_epochs: Most epochs; by default those of about 5 000 steps, at least 50.
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
        rows = self._unconstrained_rows()
        options = schedule(len(self), max_epochs, batch_size, patience)
        options |= {"learning_rate": learning_rate, "weight_decay": weight_decay, "progress": progress}
        fits = [self._fit_one(k, rows, validation_fraction, options) for k in jax.random.split(key, members)]
        config = self._config(rows, members)
        if weighting == "validation" and members > 1:
            config["weights"] = validation_weights([(m, held_out) for m, _, held_out in fits], *self._roles(rows))
        return self._posterior(tuple(m for m, *_ in fits), tuple(h for _, h, _ in fits), json.dumps(config))

    def _config(self, rows: dict[str, np.ndarray], members: int) -> dict[str, Any]:
        """What a posterior's file says about it."""
        return {
            "estimator": type(self).__name__,
            "density": self.density if isinstance(self.density, str) else None,
            "density_options": self.density_options,
            "x_dim": int(rows["x"].shape[1]),
            "members": members,
            "simulations": len(self),
            "x_range": [rows["x"].min(0).tolist(), rows["x"].max(0).tolist()],
            "scores_left_out": int(len(self) - rows["use"].sum()) if "use" in rows else 0,
        }

    def _unconstrained_rows(self) -> dict[str, np.ndarray]:
        thetas, xs, scores, _ = zip(*self._rows, strict=True)
        theta, x = (jnp.asarray(np.concatenate(a), jnp.result_type(float)) for a in (thetas, xs))
        rows = {"u": self.prior.to_unconstrained(theta), "x": x}
        if scores[0] is not None and self._uses_scores():
            score = jnp.asarray(np.concatenate(scores), jnp.result_type(float))
            of_likelihood, of_prior = likelihood_score(self.prior, theta, score), prior_score(self.prior, theta)
            rows["score"] = self._target_score(of_likelihood, self._prior_score(theta))
        rows |= self._proposal_rows(theta)
        for name, value in rows.items():
            check_finite(f"{name} in unconstrained space", value)
        if "score" in rows:
            for message in score_warnings(self.prior.names, rows["u"], x, of_likelihood, of_prior):
                warnings.warn(message, stacklevel=3)
        arrays = {name: np.asarray(value) for name, value in rows.items()}
        if "score" in arrays:
            arrays["use"] = 1 - score_outliers(arrays["score"]).astype(arrays["score"].dtype)
        return arrays

    def _smooth(self) -> bool:
        return not isinstance(self.density, str) or is_smooth(self.density)

    def _uses_scores(self) -> bool:
        return isinstance(self.score_weight, str) or bool(np.any(self.score_weight > 0))

    def _proposals(self) -> Proposals | None:
        """What all rows were drawn from; None for the prior."""
        components = {id(row[3]): row[3] for row in self._rows}
        if all(c is None for c in components.values()):
            return None
        counts = [sum(len(row[0]) for row in self._rows if id(row[3]) == i) for i in components]
        return Proposals(self.prior, tuple(components.values()), tuple(c / len(self) for c in counts))

    def _prior_score(self, theta: Array) -> Array:
        """Gradient of the log-density that the fit takes for the prior's."""
        return prior_score(self.prior, theta)

    def _proposal_rows(self, theta: Array) -> dict[str, Array]:
        """Columns of the rows that correct for proposals."""
        return {}

    def _first(self, standardiser: Standardiser) -> FirstTerm:
        """What is minimised beside the score."""
        return mean_nll

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

    def _start(self, key, rows, validation_fraction, options) -> Start:
        """All that a fit needs, the model at its linear start."""
        key_split, key_density, key_linear, _ = jax.random.split(key, 4)
        train, held_out = split_rows(key_split, len(rows["u"]), validation_fraction)
        modelled, condition = self._roles(rows)
        standardiser = fit_standardiser(modelled[train], condition[train])

        def standardised(index):
            c = standardiser.condition(jnp.asarray(condition[index]))
            out = {"v": standardiser.to_standard(jnp.asarray(modelled[index]), c), "c": c}
            if "score" in rows:
                used = rows["score"] * rows["use"][:, None]  # so that no term overflows where it is left out
                out["score"] = self._standard_score(standardiser, jnp.asarray(used[index]))
                out["use"] = jnp.asarray(rows["use"][index])
            out |= {name: jnp.asarray(rows[name][index]) for name in ("weight", "log_prior") if name in rows}
            return out | self._more(standardiser, out["v"], c)

        keys = (key_density, key_linear)
        return self._begin(keys, standardiser, standardised(train), standardised(held_out), held_out, options)

    def _begin(self, keys, standardiser: Standardiser, data, validation, held_out, options) -> Start:
        """The model at its start, from standardised rows; `keys` of the density and of the linear fit."""
        key_density, key_linear = keys
        density = self._density(key_density, data["v"].shape[1], data["c"].shape[1])
        loss = self._loss(data, self._along(standardiser), self._first(standardiser))
        model = ScoredDensity(density)
        if "score" in data:
            model = self._linear_start(key_linear, density, data, validation, loss, options)
        return Start(standardiser, model, data, validation, loss, held_out)

    def _loss(self, data, along: Array | None, first: FirstTerm) -> AbstractScoreLoss:
        if "score" not in data:
            return WithoutScore(along, first)
        if isinstance(self.score_weight, str):
            return MeasuredScore(along, first)
        weight = jnp.broadcast_to(jnp.asarray(self.score_weight, data["v"].dtype), (self.prior.dim,))
        return WeightedScore(weight, along, first)

    def _linear_start(self, key, density, data, validation, loss, options) -> ScoredDensity:
        """The density with its linear part, and the noise model, fitted first: few parameters, so little to overfit."""
        key_level, key_fit = jax.random.split(key)
        p, d = data["v"].shape[1], data["c"].shape[1]
        linear = with_linear_part(StandardNormal((p,)), ConditionalAffine(p, d))  # type: ignore[call-arg]
        model = first_model(key_level, linear, data, loss)
        rate = {"learning_rate": 10 * options["learning_rate"], "weight_decay": 0.0}
        model, _ = fit(key_fit, model, data, validation, loss, **(options | rate))
        return ScoredDensity(with_linear_part(density.base_dist, model.density.bijection), model.noise, model.level)


def first_model(key: Key, density, data: dict[str, Array], loss: AbstractScoreLoss) -> ScoredDensity:
    """An untrained density with the noise of its scores, where the loss learns that."""
    if not isinstance(loss, MeasuredScore):
        return ScoredDensity(density)
    noise = first_noise(data["score"] - loss.start(data["v"]))
    return ScoredDensity(density, noise, noise_level(key, data["v"].shape[1], data["c"].shape[1]))


def _finite_rows(theta, x, score):
    """The rows in which every number is finite."""
    named = {"theta": theta, "x": x} | ({} if score is None else {"score": score})
    bad = {name: ~np.isfinite(a).all(1) for name, a in named.items()}
    keep = ~np.logical_or.reduce(list(bad.values()))
    if not keep.all():
        where = ", ".join(f"{name} in {int(rows.sum())}" for name, rows in bad.items() if rows.any())
        warnings.warn(
            f"Left out {int((~keep).sum())} of {len(keep)} rows that are not finite ({where}): the fit is biased "
            "wherever such rows are likelier than elsewhere.",
            stacklevel=3,
        )
    return _select(keep, theta, x, score)


def _select(keep, theta, x, score):
    return theta[keep], x[keep], None if score is None else score[keep]


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
