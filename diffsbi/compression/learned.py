r"""Compression by a network that is trained on simulations: $x \to t(x)$, one number for each parameter."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._robust import median_and_spread
from diffsbi._types import Array, Float, Key, check_finite, check_finite_values, check_key, check_names
from diffsbi.compression.arrays import shared_rows
from diffsbi.compression.losses import LOSSES, AbstractLoss, LocalScoreRegression, ScoreRegression
from diffsbi.compression.networks import features_of
from diffsbi.compression.saving import check_probe, described, fixed_input, load_module, read_header, save_module
from diffsbi.inference.checks import SIGNIFICANT, score_warnings
from diffsbi.inference.losses import left_in, likelihood_score, score_outliers, zero_at_first
from diffsbi.inference.proposals import Proposals
from diffsbi.inference.standardise import ridge_regression, whitening
from diffsbi.inference.training import History, fit, split_rows
from diffsbi.prior import Prior

SMALLEST_N = 20
_KIND = "diffsbi compressor"
_BOUND = 5.0  # of a whitened feature
_WIDTH = 64  # hidden units of the head g, where nothing is said
_ROWS = 64  # rows that a network takes at once, outside training
Augment = Callable[[Key, Any], Any]


class Compressor(eqx.Module):
    r"""$t(x) = A c + g(c)$, $c = b \tanh(W(f(x) - \bar f) / b)$: features f of a network, A, and a small network g.

    The features are whitened, and bounded by b = 5: single objects give some statistics very heavy tails. W and
    $\bar f$ are of the untrained network and stay; A starts as the ridge regression of the parameters on c and g at
    zero: training starts at the best linear answer that the untrained features give.

    t estimates the parameters in unconstrained space, less their mean and divided by their Cholesky factor over the
    training rows: the unit of every loss, and no unit that an estimator trained on t would need.
    """

    network: Any
    loc: Float[Array, " f"]
    whiten: Float[Array, "f f"]
    linear: Float[Array, "p f"]
    correction: eqx.nn.MLP
    lower: Float[Array, "p p"]
    history: History | None = None
    n_simulations: int = eqx.field(static=True, default=0)
    x_like: str = eqx.field(static=True, default="null")  # `described` rows, as JSON: static fields are hashed

    def __call__(self, x) -> Float[Array, " p"]:
        """t of one data set (any arrays the network takes)."""
        return self.features_and_summary(x)[1]

    def many(self, x) -> np.ndarray:
        """t of every row of `x`, `(n, p)`; they must be finite."""
        check_finite_values("x", x)
        return np.asarray(_rows_of(self, x))

    def features_and_summary(self, x) -> tuple[Float[Array, " f"], Float[Array, " p"]]:
        """(c, t) of one data set."""
        c = _bounded(self.whiten @ (self.network(x) - self.loc))
        return c, self.linear @ c + self.correction(c)

    @property
    def constants(self) -> tuple[Array, ...]:
        """What is not trained."""
        return self.loc, self.whiten, self.lower

    def residual(self, v: Float[Array, " p"], t: Float[Array, " p"]) -> Float[Array, " p"]:
        """$e = L^{-1} (v - t)$."""
        return jax.scipy.linalg.solve_triangular(self.lower, v - t, lower=True)

    def score_of_residual(self, score: Float[Array, " p"]) -> Float[Array, " p"]:
        r"""$\nabla_e = L^T \nabla_v$ at fixed data."""
        return self.lower.T @ score

    def save(self, path) -> None:
        """Write the arrays with a checksum; `load_compressor` reads them into a network of the same architecture."""
        like = json.loads(self.x_like)
        probe = None if like is None else np.asarray(self(fixed_input(like)), float).tolist()
        sizes = {"features": len(self.loc), "parameters": len(self.lower), "width": self.correction.width_size}
        about = {"n_simulations": self.n_simulations, "x_like": like, "probe": probe}
        save_module(path, _KIND, dataclasses.replace(self, history=None), sizes | about)


def load_compressor(path, network) -> Compressor:
    """Read what `Compressor.save` wrote, into a `network` of the architecture that was saved (any weights).

    Raises:
        ValueError: For another kind of file, a damaged one, or another architecture, naming the first difference: in
            the shapes of its arrays, or in what it makes of a fixed input (another activation has the same shapes; not
            for data that hold anything but float arrays in tuples, lists and dictionaries).
    """
    header, about, payload = read_header(path, _KIND)
    like = _empty(jax.random.key(0), network, header["features"], header["parameters"], header.get("width", _WIDTH))
    x_like = header.get("x_like")  # files of older versions have neither this nor a width
    known = dict(n_simulations=header["n_simulations"], x_like=json.dumps(x_like))
    loaded = dataclasses.replace(load_module(path, about, payload, like), **known)
    if x_like is not None:
        check_probe(path, loaded(fixed_input(x_like)), header["probe"])
    return loaded


def fit_compressor(
    key: Key,
    network,
    theta: Float[Array, "n p"],
    x,
    score: Float[Array, "n p"] | None = None,
    *,
    prior,
    proposal=None,
    loss: str | AbstractLoss = "vmim",
    augment: Augment | None = None,
    renew: Callable[[Key], Any] | None = None,
    validation: tuple | None = None,
    validation_fraction: float = 0.1,
    width: int = _WIDTH,
    max_epochs: int = 100,
    batch_size: int = 64,
    patience: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.1,
    progress: bool = False,
) -> Compressor:
    r"""Train `network` to compress x to one number for each parameter.

    Args:
        key: Split, initial weights of the heads, order of the rows, augmentation.
        network: Any Equinox module, row of x → features `(f,)`. One with `adapted(x)` (`MapNetwork`) is scaled to
            the data first.
        theta: Parameters. Rows that are all the same are allowed with the loss "score": t then estimates the marginal
            score there, in units of its spread (`LocalScoreRegression`).
        x: Data: an array with a leading n, or any pytree of such.
        score: $\nabla_\theta \log p(x, z | \theta)$ without the prior's; used by "vmim" and "score".
        prior: A `Prior`, or anything with one.
        proposal: What theta was drawn from, None for the prior: the summary is then best for posteriors under it.
        loss: A name in `LOSSES`, or an `AbstractLoss`.
        augment: (key, row of x) → a row as likely at every theta (`torus_symmetry`); drawn anew at every step. The row
            keeps its score.
        renew: key → `Draws` of the same theta with other x and the scores that go with it, as
            `lambda key: fresh_noise(sim, key, draws, latents="whitened")`; called after every epoch, for the rows of
            the next one. Rows to stop by stay as they are, so their scores should be as noisy: averages over draws of
            the latents are not renewed as such.
        validation: (theta, x) or (theta, x, score) of rows to stop by; by default a part of the training rows.
        validation_fraction: That part.
        width: Hidden units of the head g.
        max_epochs, batch_size, patience, learning_rate, weight_decay, progress: Of `inference.training.fit`. Strong
            decay (1) pulls the readout away from its linear start by more than the network wins.

    Raises:
        ValueError: Wrong shapes, values that are not finite, fewer than 20 rows, validation rows that are training
            rows, a loss that needs scores without them, a parameter that does not vary, renewed rows that are others.

    Warns where scores look as if the prior's gradient were in them, or the parameters in another order.
    """
    check_key(key)
    prior = prior if isinstance(prior, Prior) else prior.prior
    if isinstance(loss, str):
        check_names([loss], list(LOSSES), "loss")
        loss = LOSSES[loss]
    parts = [_checked(prior, proposal, theta, x, score)]
    n = len(parts[0]["u"])
    if n < SMALLEST_N:
        raise ValueError(f"Expected at least {SMALLEST_N} simulations to compress from; got {n}.")
    if validation is not None:
        parts.append(_checked(prior, proposal, *validation))
        if "own" in parts[0] and "own" not in parts[1]:
            raise ValueError("Expected validation=(theta, x, score), as there are scores to train on; got no score.")
    thetas = [np.asarray(theta), *(np.asarray(other) for other in (validation or ())[:1])]
    if one_theta := not np.ptp(thetas[0], axis=0).any():
        if any((other != thetas[0][0]).any() for other in thetas):
            raise ValueError("Expected validation rows at the one theta of the training rows; they are at others.")
        _check_at_one_theta(loss, parts[0], proposal)
        for message in _mean_score_warnings(prior.names, parts[0]["own"]):
            warnings.warn(message, stacklevel=2)
        parts, loss = [_with_score_as_target(part) for part in parts], LocalScoreRegression()
    key_split, key_head, key_fit, key_renew = jax.random.split(key, 4)
    if validation is None:
        index, others = split_rows(key_split, n, validation_fraction)
        train, held_out = _take(parts[0], index), _take(parts[0], others)
    else:
        index, (train, held_out) = np.arange(n), parts
        _refuse_equal(train["u"], held_out["u"], "score" if one_theta else "theta")
    if hasattr(network, "adapted"):
        network = network.adapted(jax.tree.map(lambda a: jnp.asarray(a[:128]), train["x"]))
    key_loss, key_correction = jax.random.split(key_head)
    features = _features(network, train["x"])
    if "own" in train:
        of_prior = left_in(prior, prior.from_unconstrained(jnp.asarray(train["u"])))
        for message in score_warnings(prior.names, train["u"], _without_tails(features), train["own"], of_prior):
            warnings.warn(message, stacklevel=2)
    units = _units(prior.names, train["u"], "score" if one_theta else "parameter")
    train, held_out = _in_units(units, train), _in_units(units, held_out)
    compressor, residuals = _linear_start(key_correction, network, features, train["v"], width)
    if "score" in train:
        residuals["score_of_e"] = train["score"] @ compressor.lower
    extra = loss.head(key_loss, len(compressor.loc), train | residuals)

    def rows_of(done: int) -> dict[str, Any]:
        if not done or renew is None:
            return train
        new = renew(jax.random.fold_in(key_renew, done))
        _check_renewed(new, theta, x, "use" in train)
        rows = _checked(prior, proposal, theta, new.x, new.score if "use" in train else None)
        return _in_units(units, _take(_with_score_as_target(rows) if one_theta else rows, index))

    objective = Objective(loss, augment)
    options: dict[str, Any] = dict(
        max_epochs=max_epochs, batch_size=batch_size, patience=patience, learning_rate=learning_rate,
        weight_decay=weight_decay, progress=progress, constants=lambda m: [*m[0].constants, *loss.constants(m[1])],
    )  # fmt: skip
    (compressor, _), history = fit(key_fit, (compressor, extra), rows_of, held_out, objective, **options)
    count = n + (0 if validation is None else len(held_out["v"]))
    x_like = json.dumps(described(train["x"]))
    return dataclasses.replace(compressor, history=history, n_simulations=count, x_like=x_like)


class Objective(eqx.Module):
    """A loss for the training loop: rows augmented, the network's features of them, then the loss's own mean."""

    loss: AbstractLoss
    augment: Augment | None = eqx.field(static=True)

    def __call__(self, params, static, batch, key):
        compressor, head = eqx.combine(params, static)
        if self.augment is not None:
            batch = batch | {"x": jax.vmap(self.augment)(jax.random.split(key, len(batch["v"])), batch["x"])}
        features = features_of(compressor.network, batch["x"])
        compressor = eqx.tree_at(lambda c: c.network, compressor, eqx.nn.Identity())
        return self.loss(compressor, head, batch | {"x": features})


def _checked(prior: Prior, proposal, theta, x, score=None) -> dict[str, Any]:
    """Rows in unconstrained space, on the host."""
    theta = np.asarray(theta)
    if theta.ndim != 2 or theta.shape[1] != prior.dim:
        raise ValueError(f"Expected theta with shape (n, {prior.dim}) for {list(prior.names)}; got {theta.shape}.")
    x = jax.tree.map(np.asarray, x)
    for leaf in jax.tree.leaves(x):
        if leaf.shape[:1] != theta.shape[:1]:
            raise ValueError(f"Expected x with {len(theta)} rows, as theta; got an array of shape {leaf.shape}.")
        check_finite("x", leaf)
    check_finite("theta", theta)
    prior.check(theta)
    rows = {"u": np.asarray(prior.to_unconstrained(jnp.asarray(theta))), "x": x}
    if score is not None:
        score = np.asarray(score)
        if score.shape != theta.shape:
            raise ValueError(f"Expected score with shape {theta.shape}, as theta; got {score.shape}.")
        check_finite("score", score)
        components, fractions = (proposal,), (1.0,)
        of_prior = Proposals(prior, components, fractions).score(jnp.asarray(theta))
        rows["own"] = np.asarray(likelihood_score(prior, theta, score))
        rows["score"] = rows["own"] + np.asarray(of_prior)
        rows["use"] = 1.0 - score_outliers(rows["score"]).astype(rows["u"].dtype)
    return rows


def _take(rows: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    return jax.tree.map(lambda a: a[index], rows)


def _refuse_equal(train: np.ndarray, held_out: np.ndarray, what: str) -> None:
    shared = shared_rows([train], [held_out])
    if shared:
        raise ValueError(
            f"Expected validation rows that are not training rows; {shared} of {len(held_out)} have the same {what}."
        )


def _check_at_one_theta(loss: AbstractLoss, rows: dict[str, Any], proposal) -> None:
    if not isinstance(loss, ScoreRegression) or "own" not in rows or proposal is not None:
        raise ValueError(
            f"All {len(rows['u'])} rows have the same theta: expected parameters that differ, or loss='score' with "
            f"scores and no proposal, which regresses the score there; got {type(loss).__name__}, "
            f"{'scores' if 'own' in rows else 'no scores'} and proposal={proposal}."
        )


def _mean_score_warnings(names, score: np.ndarray) -> list[str]:
    """The mean of the scores at one theta must be zero."""
    score = _without_tails(score)
    spread = score.std(0)
    far = np.abs(score.mean(0)) * np.sqrt(len(score)) / np.where(spread > 0, spread, np.inf)
    return [
        f"The mean score of {name} at the one theta is {value:.0f} standard errors from 0, which it must be: "
        "scores are expected WITHOUT the prior's, and all rows of the simulator."
        for name, value in zip(names, far, strict=True)
        if value > SIGNIFICANT
    ]


def _with_score_as_target(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with their score in the place of the parameters; one that is left out may not decide the units."""
    score, used = rows["own"], rows["use"] > 0
    score = np.where(used[:, None], score, score[used].mean(0))
    return {"u": score.astype(rows["u"].dtype), "x": rows["x"], "use": rows["use"]}


def _check_renewed(new, theta, x, scored: bool) -> None:
    """Renewed rows must be the same simulations, with data of the same shapes."""
    if scored and new.score is None:
        raise ValueError("Expected renew(key) with scores, as the rows it renews have; got none.")
    if not np.array_equal(np.asarray(new.theta), np.asarray(theta)):
        raise ValueError("Expected renew(key) with the theta of the rows, in their order; got another.")
    shapes, found = (jax.tree.map(np.shape, rows) for rows in (x, new.x))
    if shapes != found:
        raise ValueError(f"Expected renew(key) with x of shape {shapes}, as the rows it renews; got {found}.")


def _units(names, u: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and Cholesky factor of the rows, in which they are standardised."""
    still = [name for name, column in zip(names, u.T, strict=True) if not np.ptp(column)]
    if still:
        raise ValueError(f"Expected every {what} to vary among the training rows; {still} does not. Leave it out.")
    return u.mean(0), np.linalg.cholesky(np.cov(u.T).reshape((u.shape[1],) * 2))


def _features(network, x) -> np.ndarray:
    """Of every row, before training."""
    features = np.asarray(_rows_of(network, x), float)
    if features.ndim != 2:
        raise ValueError(f"Expected a network that gives features (f,) for a row of x; got {features.shape[1:]}.")
    check_finite("the network's features", features)
    return features


def _in_units(units: tuple[np.ndarray, np.ndarray], rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with v, the standardised u, and scores with respect to it."""
    loc, root = units
    v = np.linalg.solve(root, (rows["u"] - loc).T).T
    found = {"v": jnp.asarray(v, jnp.result_type(float)), "x": jax.tree.map(jnp.asarray, rows["x"])}
    if "use" in rows:
        found["use"] = rows["use"]
    if "score" in rows:
        found["score"] = jnp.asarray(rows["score"] @ root, jnp.result_type(float))
    return found


def _linear_start(key, network, features, v, width) -> tuple[Compressor, dict[str, Array]]:
    """The compressor before training, and what it leaves of v."""
    loc, whiten = whitening(_without_tails(features))
    c, v = np.asarray(_bounded((features - loc) @ whiten.T)), np.asarray(v, float)
    linear, left = ridge_regression(c, v)
    lower = np.linalg.cholesky(left.T @ left / len(v) + 1e-9 * np.eye(v.shape[1]))
    made = _empty(key, network, len(loc), v.shape[1], width)
    arrays = (jnp.asarray(a, jnp.result_type(float)) for a in (loc, whiten, linear, lower))
    compressor = eqx.tree_at(lambda c: (c.loc, c.whiten, c.linear, c.lower), made, tuple(arrays))
    return compressor, {"e": jnp.asarray(np.linalg.solve(lower, left.T).T, jnp.result_type(float))}


def _without_tails(features: np.ndarray) -> np.ndarray:
    """Columns clipped at `_BOUND` robust standard deviations: one row in a hundred may not decide the covariance."""
    centre, scale = median_and_spread(features)
    scale = np.where(scale > 0, scale, np.inf)
    return np.clip(features, centre - _BOUND * scale, centre + _BOUND * scale)


def _bounded(c):
    return _BOUND * jnp.tanh(c / _BOUND)


def _empty(key: Key, network, n_features: int, dim: int, width: int) -> Compressor:
    correction = zero_at_first(eqx.nn.MLP(n_features, dim, width, 1, activation=jax.nn.silu, key=key))
    zeros = (jnp.zeros(n_features), jnp.eye(n_features), jnp.zeros((dim, n_features)))
    return Compressor(network, *zeros, correction, jnp.eye(dim))


@eqx.filter_jit
def _rows_of(function, x):
    return jax.lax.map(function, jax.tree.map(jnp.asarray, x), batch_size=_ROWS)
