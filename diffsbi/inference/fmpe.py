r"""Flow-matching posterior estimation: regression of the velocity of a continuous flow, on scores too."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key
from diffsbi.inference.losses import ScoredDensity, Start, first_noise, mean_nll, noise_level
from diffsbi.inference.npe import NPE
from diffsbi.inference.streams import first_of, moved
from diffsbi.inference.training import schedule

_DRAWS = 8  # angles and noises per row and step
_HELD_OUT_DRAWS = 32  # per validation row, the same in every epoch


class FlowMatching(eqx.Module):
    r"""The loss of `FMPE` over batches `{"v": (n, p), "c": (n, d)}`, with `"score"` and `"use"` where there are scores.

    `batch["angle"] (n, k)` and `batch["noise"] (n, k, p)` are used where they are given, drawn from the key otherwise.

    Args:
        last: Largest angle, $\arctan 1/\sigma_\mathrm{min}$.
        weight: $\Lambda$, shape (p,), in place of the measured precision of the scores; None to measure it.
    """

    last: float = eqx.field(static=True)
    weight: Float[Array, " p"] | None = None

    def __call__(self, params, static, batch, key) -> Array:
        model = eqx.combine(params, static)
        angle, noise = (
            (batch[k] for k in ("angle", "noise")) if "angle" in batch else self.draw(key, batch["v"], _DRAWS)
        )
        wide = lambda a: jnp.broadcast_to(a[:, None, :], (*angle.shape, a.shape[-1]))  # noqa: E731
        v, c = wide(batch["v"]), wide(batch["c"])
        a, b = (jnp.broadcast_to(f(angle)[..., None], v.shape) for f in (jnp.sin, jnp.cos))
        y = a * v + b * noise
        field = jnp.vectorize(model.density.bijection.field, signature="(),(p),(d)->(p)")(angle, y, c)
        value = 0.5 * jnp.mean(jnp.sum((b * (v - field) - a * noise) ** 2, -1))
        if "score" not in batch:
            return value
        residual = v + wide(batch["score"]) - field
        return value + jnp.mean(batch["use"] * jnp.mean(self._of_score(model, residual, y, a, c), 1))

    def _of_score(self, model: ScoredDensity, residual, y, a, c) -> Float[Array, "n k"]:
        """Minus the log-probability of the score's residuals."""
        if self.weight is not None:
            return residual**2 @ self.weight
        white, log_det = model.whiten_noise(residual)
        level = jax.vmap(model.log_level)(jnp.concatenate([y, a[..., :1]], -1), c)
        return 0.5 * jnp.sum(white**2, -1) * jnp.exp(-2 * level) + level * residual.shape[-1] - log_det

    def draw(self, key: Key, v: Float[Array, "n p"], draws: int) -> tuple[Float[Array, "n k"], Float[Array, "n k p"]]:
        """Angles, one in each of `draws` equal parts of their range, and standard normal noise."""
        key_angle, key_noise = jax.random.split(key)
        part = jnp.broadcast_to(jnp.arange(draws, dtype=v.dtype), (len(v), draws))
        angle = (part + jax.random.uniform(key_angle, part.shape, v.dtype)) * (self.last / draws)
        return angle, jax.random.normal(key_noise, (*part.shape, v.shape[-1]), v.dtype)


class FMPE(NPE):
    r"""Flow-matching posterior estimation: $q(\theta | x)$ is a continuous flow, trained without solving it.

    In the coordinates of `NPE` (standardised v, condition c), noise $\epsilon \sim N(0, 1)$ is carried to v along the
    straight paths $(1 - (1-\sigma_\mathrm{min}) t)\epsilon + t v$. Divided by their width they are
    $y = a v + b\epsilon$ with $a = \sin\varphi$, $b = \cos\varphi$, $\tan\varphi = t / (1 - (1-\sigma_\mathrm{min})t)$,
    and the flow is $dy/d\varphi = b f(\varphi, y, c)$ (`AngularFlow`). With $S = \nabla_y\log p_\varphi(y|c)$ the score
    of the noised posterior, $f = (y + S)/a$. Two regressions have this f as their mean:

    - denoising (conditional flow matching), $T_d = v - (a/b)\epsilon$, as $E[\epsilon | y] = -b S$ (Tweedie);
    - target score, $T_s = v + s$, s the joint score with the prior's, as $E[s | y] = a S$ (the target score identity,
      De Bortoli et al. 2024, $S = E[s/a | y]$, with Fisher's identity for the latents) and $E[v | y] = (y + b^2S)/a$.

    $T_d$ has the precision $b^2$ of a standard normal v: good where noise is large, none at $\varphi = π/2$. $T_s$ has
    that of the score's noise, $\Sigma^{-1}(y, \varphi, c)$, measured as in `MeasuredScore`: the same for all noise.
    Their combination of least variance is $(b^2 + \Sigma^{-1})^{-1}(b^2 T_d + \Sigma^{-1} T_s)$. The loss

    $\langle \frac12 b^2 |T_d - f|^2 + \frac12 (T_s - f)^T\Sigma^{-1}(T_s - f) + \frac12\log\det\Sigma \rangle$,

    $\varphi$ uniform, is the squared error of that combination with its precision, but for what f does not enter.
    Without scores it is the first term: exactly conditional flow matching with t uniform. With scores, the linear part
    of the posterior is fitted first (by likelihood and score, as `NPE`) and kept; rows kept aside are judged by the
    first term alone, the weights of which are known: the histories' validation loss is that, the training loss both.

    Densities and draws solve the flow. Proposals other than the prior are reweighted, as `NPE`'s "reweight".

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        score_weight: As `Estimator`; numbers stand for $\Sigma^{-1}/2$.
        width: Hidden units of the network.
        depth: Its hidden layers.
        steps: Of the solver (`continuous_flow`).
        sigma_min: Width of the path at its end, between 0 and 1, in units of the standardised posterior.

    Reference:
        Wildberger et al. 2023, arXiv:2305.17161; De Bortoli et al. 2024, arXiv:2402.08667.
    """

    def __init__(
        self,
        prior,
        *,
        score_weight="auto",
        width: int = 64,
        depth: int = 3,
        steps: int = 16,
        sigma_min: float = 1e-3,
    ):
        options = {"width": width, "depth": depth, "steps": steps}
        super().__init__(prior, "continuous", score_weight=score_weight, density_options=options)
        if min(width, depth, steps) < 1 or not 0 < sigma_min < 1:
            got = f"{width}, {depth}, {steps} and {sigma_min}"
            raise ValueError(f"Expected width, depth and steps >= 1 and sigma_min between 0 and 1; got {got}.")
        self.sigma_min = float(sigma_min)

    def fit(
        self,
        key: Key,
        *,
        patience: int | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.1,
        batch_size: int | None = None,
        **settings: Any,
    ):
        """As `Estimator.fit`, for a regression of which the targets are mostly noise.

        Steps are longer, the patience is that of about 1 000 of them (2 000 with scores, whose gradients are the
        larger and the noisier), and there is little weight decay: against such gradients the usual one would win.
        """
        batch_size = schedule(max(1, len(self)), None, batch_size, None)["batch_size"]
        steps = 2000 if self._with_score() else 1000
        patience = max(20, steps * batch_size // max(1, len(self))) if patience is None else patience
        options = {"patience": patience, "learning_rate": learning_rate, "weight_decay": weight_decay}
        return super().fit(key, batch_size=batch_size, **options, **settings)

    def _begin(self, keys, standardiser, data, validation, held_out, options):
        key_density, key_linear = keys
        key_linear, key_level, key_noise = jax.random.split(key_linear, 3)
        p, d = validation["v"].shape[1], validation["c"].shape[1]
        density = self._density(key_density, p, d)
        flow, affine = density.base_dist, density.bijection
        weight = None if isinstance(self.score_weight, str) else self.score_weight
        if weight is not None:
            weight = jnp.broadcast_to(jnp.asarray(weight, validation["v"].dtype), (p,))
        loss, model = FlowMatching(float(np.arctan(1 / self.sigma_min)), weight), ScoredDensity(flow)
        if "score" in validation:
            by_likelihood = self._loss(validation, None, mean_nll)
            affine = self._linear_start(key_linear, density, data, validation, by_likelihood, options).density.bijection
            data, validation = (moved(rows, functools.partial(_without, affine)) for rows in (data, validation))
            if weight is None:
                first = first_of(data)
                model = ScoredDensity(flow, first_noise(first["score"] + first["v"]), noise_level(key_level, p + 1, d))
        angle, noise = loss.draw(key_noise, validation["v"], _HELD_OUT_DRAWS)
        # The noise model of the scores overfits long before the field has learned: it must not decide when to stop.
        validation = {"v": validation["v"], "c": validation["c"], "angle": angle, "noise": noise}
        return Start(standardiser, model, data, validation, loss, held_out, affine)


def _without(affine, rows: dict[str, Array]) -> dict[str, Array]:
    """Rows and their scores in the coordinates in which `affine` is the identity."""
    v, lower = jax.vmap(affine.inverse)(rows["v"], rows["c"]), affine.matrix()
    return rows | {"v": v, "score": rows["score"] @ lower}
