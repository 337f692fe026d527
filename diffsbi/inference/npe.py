r"""Neural posterior estimation from simulations, with their scores where there are any."""

from diffsbi.inference.estimator import Estimator
from diffsbi.inference.posterior import Posterior


class NPE(Estimator[Posterior]):
    r"""Neural posterior estimation: $q(\theta | x)$ of summaries x, trained on its likelihood and on its score.

    The density is learned in standardised unconstrained coordinates v (`Standardiser`), where it minimises
    $-\langle\log q\rangle$ + (score term). The target of $\nabla_v \log q$ is the joint score, moved to v, with the
    prior's own: $L^T (J^T \nabla_\theta\log p(x,z|\theta) + \nabla_u \log p(u))$. With scores, the linear part of the
    density (and the noise of the score) is fitted first, the flow from there; histories tell of the latter.

    Arguments as `Estimator`.
    """

    def _roles(self, rows):
        return rows["u"], rows["x"]

    def _target_score(self, of_likelihood, of_prior):
        return of_likelihood + of_prior

    def _standard_score(self, standardiser, score):
        return standardiser.score_to_standard(score)

    def _posterior(self, members, histories, config_json):
        return Posterior(self.prior, members, histories, config_json)
