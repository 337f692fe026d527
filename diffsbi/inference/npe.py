r"""Neural posterior estimation from simulations, with their scores where there are any."""

import warnings
from typing import Any

import jax.numpy as jnp

from diffsbi._types import check_names
from diffsbi.inference.estimator import Density, Estimator
from diffsbi.inference.losses import Atomic, mean_nll, prior_score
from diffsbi.inference.posterior import Posterior
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.inference.rows import Joined, blocks_of

_FEW = 0.1  # effective rows, as a fraction of all, below which importance weights are warned about


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

    Args:
        prior: A `Prior`, or anything with a `prior` (a simulator).
        density: As `Estimator`.
        correction: As above.
        n_atoms: Of "atomic".
        options: Further ones of `Estimator`.
    """

    def __init__(
        self, prior, density: Density = None, *, correction: str = "reweight", n_atoms: int = 10, **options: Any
    ):
        super().__init__(prior, density, **options)
        check_names([correction], ["reweight", "atomic", "importance"], "correction")
        if n_atoms < 2:
            raise ValueError(f"Expected n_atoms >= 2; got {n_atoms}.")
        self.correction, self.n_atoms = correction, int(n_atoms)

    def _roles(self, rows):
        return rows["u"], rows["x"]

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
        proposals = self._proposals()
        if proposals is None or self.correction != "reweight":
            return Posterior(self.prior, members, histories, config_json)
        thetas = blocks_of(Joined([part.theta for part in self._rows]))
        proposals = min((proposals.with_floor(theta) for (theta,) in thetas), key=lambda p: p.floor)
        return ReweightedPosterior(self.prior, members, histories, config_json, proposals=proposals)
