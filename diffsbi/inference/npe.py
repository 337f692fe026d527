r"""Neural posterior estimation from simulations, with their scores where there are any."""

import warnings
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import check_finite, check_names
from diffsbi.inference.estimator import Density, Estimator
from diffsbi.inference.frames import (
    FARTHEST,
    PSEUDO_DRAWS,
    LocalFrame,
    fit_in_frames,
    pseudo_rows_for,
    tilt_to,
    with_pseudo_rows,
)
from diffsbi.inference.losses import Atomic, mean_nll, prior_score
from diffsbi.inference.posterior import Member, Posterior
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.inference.rows import Joined, as_rows, blocks_of
from diffsbi.inference.streams import InMemory

_FEW = 0.1  # effective rows, as a fraction of all, below which importance weights are warned about
_FAR = 7.0  # of parameters in local frames, where half of them are a sign of wrong frames


class NPE(Estimator[Posterior | ReweightedPosterior]):
    r"""Neural posterior estimation: $q(\theta | x)$ of summaries x, trained on its likelihood and on its score.

    The density is learned in standardised unconstrained coordinates v (`Standardiser`), where it minimises
    $-\langle\log q\rangle$ + (score term). The target of $\nabla_v \log q$ is the joint score, moved to v, with the
    prior's own: $L^T (J^T \nabla_\theta\log p(x,z|\theta) + \nabla_u \log p(u))$. With scores, the linear part of the
    density (and the noise of the score) is fitted first, the flow from there; histories tell of the latter.

    Where parameters were drawn from proposals $\tilde p(\theta)$ instead of the prior p, `correction` says how q
    becomes the posterior under p:

    - "reweight": q is fitted as if $\tilde p$ were the prior, so the score's target has its gradient, and
      its draws are reweighted by $p/\tilde p$ (`ReweightedPosterior`). Least noise; $\tilde p$ must be wider than the
      posterior.
    - "atomic": SNPE-C (`Atomic`); costs `n_atoms` times as much.
    - "importance": rows weighted by $p/\tilde p$ (SNPE-B, Lueckmann et al. 2017, arXiv:1711.01861).

    In the latter two the score term needs no correction: for every $\theta$, wherever it came from, the mean of
    $\nabla_\theta\log p(x, z|\theta) + \nabla_\theta\log p(\theta)$ over the latents at given $(\theta, x)$ is the
    score of the posterior under p.

    Where posteriors change their place and width a lot over the proposal, one linear standardisation is far from each
    of them. `framed=True` is for data that begin with a normal approximation of their own posterior (`LocalFrame`, made
    by `compression.LaplaceMode` or `PathMode`, say): the density is learned in its coordinates, and the fit has only to
    learn where the approximation is wrong; it starts from the belief that it is right (`fit_in_frames`). Where q is to
    be reweighted, the approximation is that under the proposals (`tilt_to`).

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        density: As `Estimator`.
        correction: As above.
        n_atoms: Of "atomic".
        framed: Whether x begins with `pack_frame(mean, root)`; not with the "atomic" correction.
        options: Further ones of `Estimator`.
    """

    def __init__(
        self,
        prior,
        density: Density = None,
        *,
        correction: str = "reweight",
        n_atoms: int = 10,
        framed: bool = False,
        **options: Any,
    ):
        super().__init__(prior, density, **options)
        check_names([correction], ["reweight", "atomic", "importance"], "correction")
        if n_atoms < 2:
            raise ValueError(f"Expected n_atoms >= 2; got {n_atoms}.")
        if framed and correction == "atomic":
            raise ValueError("Expected correction 'reweight' or 'importance' with framed=True; got 'atomic'.")
        self.correction, self.n_atoms = correction, int(n_atoms)
        self.frame = LocalFrame(self.prior.dim) if framed else None

    def append(self, theta, x, score=None, **settings: Any) -> Self:
        if self.frame is not None and len(shape := as_rows(x).shape) == 2:
            self.frame.check(shape[1])
        return super().append(theta, x, score, **settings)

    append.__doc__ = Estimator.append.__doc__

    def _roles(self, rows):
        return rows["u"], rows["x"]

    def _frame(self) -> LocalFrame | None:
        """The frame of what q is: the posterior under the prior, or under proposals where it is to be reweighted."""
        proposals = self._proposals()
        if self.frame is None or proposals is None or self.correction != "reweight":
            return self.frame
        tilt = tilt_to(self.prior, [(part.proposal, part.theta) for part in self._rows])
        return LocalFrame(self.frame.dim, self.frame.reach, tilt)

    def _tails(self, x, always):
        # Frames are read off x as it is; see `fit_in_frames`.
        return super()._tails(x, always) if self.frame is None else None

    def _columns(self, correct, tails, theta, x, score):
        rows = super()._columns(correct, tails, theta, x, score)
        frame = self._frame()
        if frame is None:
            return rows
        u, x = jnp.asarray(rows["u"]), jnp.asarray(rows["x"])
        moved = {"u": frame.to_local(u, x)[0]}
        if score is not None:
            moved["score"] = frame.score_to_local(jnp.asarray(rows["score"]), u, x)
        for name, value in moved.items():
            check_finite(f"{name} in the local frame", value)
        if (far := float(jnp.median(jnp.abs(moved["u"])))) > _FAR:
            warnings.warn(
                f"Half of the parameters are {far:.1f} or more from their frames' means, in 5 asinh(r / 5) of r "
                "standard deviations: does x begin with pack_frame(mean, root)?",
                stacklevel=2,
            )
        return rows | {name: np.asarray(value) for name, value in moved.items()}

    def _config(self, rows, members):
        config = super()._config(rows, members)
        if self.frame is not None:
            tilted = self._frame().tilt is not None
            config["framed"] = {"reach": self.frame.reach, "bound": FARTHEST, "tilted": tilted}
        return config

    def _fit_standardiser(self, modelled, condition):
        return (
            super()._fit_standardiser(modelled, condition) if self.frame is None else fit_in_frames(modelled, condition)
        )

    def _believed(self, key, standardiser, data, validation):
        if self.frame is None or callable(data):  # a stream has rows enough
            return data, validation
        w = standardiser.from_standard(data["v"], data["c"])
        for_each = pseudo_rows_for(np.asarray(w)) / len(w)
        return tuple(
            with_pseudo_rows(jax.random.fold_in(key, k), rows, standardiser, for_each * len(rows["v"]))
            for k, rows in enumerate((data, validation))
        )

    def _rows_per_epoch(self, rows):
        return rows.per_epoch + (PSEUDO_DRAWS if self.frame is not None and isinstance(rows, InMemory) else 0)

    def _target_score(self, of_likelihood, of_prior):
        return of_likelihood + of_prior

    def _standard_score(self, standardiser, score):
        return standardiser.score_to_standard(score)

    def _prior_score(self, theta):
        proposals = self._proposals()
        if proposals is None or self.correction != "reweight":
            return prior_score(self.prior, theta)
        return proposals.score(theta)

    def _correction(self, theta):
        proposals = self._proposals()
        if proposals is None or self.correction == "reweight":
            return super()._correction(theta)
        if self.correction == "atomic":
            u = self.prior.to_unconstrained
            return lambda theta: {"log_prior": self.prior.log_prob_unconstrained(u(theta))}
        log_weight = -proposals.log_ratio(theta)
        largest = jnp.max(log_weight)
        weight = jnp.exp(log_weight - largest)
        effective = float(jnp.sum(weight) ** 2 / jnp.sum(weight**2))
        if effective < _FEW * len(theta):
            warnings.warn(
                f"Importance weights leave {effective:.1f} effective of {len(theta)} simulations: the proposal is too "
                "far from the prior for them. Try correction='reweight' or 'atomic'.",
                stacklevel=5,
            )
        return lambda theta: {"weight": jnp.exp(-proposals.log_ratio(theta) - largest) / jnp.mean(weight)}

    def _is_likelihood(self):
        return self._proposals() is None or self.correction != "atomic"

    def _first(self, standardiser):
        if self._is_likelihood():
            return mean_nll
        return Atomic(self.n_atoms, jnp.linalg.solve(standardiser.lower, standardiser.slope))

    def _posterior(self, members, histories, config_json):
        frame = self._frame()
        members = tuple(Member(m.standardiser, m.density, frame) for m in members)
        proposals = self._proposals()
        if proposals is None or self.correction != "reweight":
            return Posterior(self.prior, members, histories, config_json)
        thetas = blocks_of(Joined([part.theta for part in self._rows]))
        proposals = min((proposals.with_floor(theta) for (theta,) in thetas), key=lambda p: p.floor)
        return ReweightedPosterior(self.prior, members, histories, config_json, proposals=proposals)
