"""Losses, the one training loop, posterior, likelihood and ratio estimation, flow matching, rounds, posteriors."""

from diffsbi.inference.bayesian import NetworkSpread, fit_chains, fit_variational, network_spread
from diffsbi.inference.fmpe import FMPE
from diffsbi.inference.frames import LocalFrame, pack_frame
from diffsbi.inference.losses import posterior_score
from diffsbi.inference.nle import NLE, LikelihoodPosterior
from diffsbi.inference.novelty import Novelty, fit_novelty
from diffsbi.inference.npe import NPE
from diffsbi.inference.nre import NRE
from diffsbi.inference.persist import load_posterior, prior_from_json, prior_to_json
from diffsbi.inference.posterior import Member, Posterior
from diffsbi.inference.proposals import GaussianProposal, gaussian_proposal
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.inference.rounds import Rounds, rounds
from diffsbi.inference.tmnre import Marginals, truncated_marginals
from diffsbi.inference.training import History, fit, split_rows
from diffsbi.inference.weighting import stacking_weights

__all__ = [
    "FMPE",
    "NLE",
    "NPE",
    "NRE",
    "GaussianProposal",
    "History",
    "LikelihoodPosterior",
    "LocalFrame",
    "Marginals",
    "Member",
    "Novelty",
    "NetworkSpread",
    "Posterior",
    "ReweightedPosterior",
    "Rounds",
    "fit",
    "fit_novelty",
    "fit_chains",
    "fit_variational",
    "gaussian_proposal",
    "load_posterior",
    "network_spread",
    "pack_frame",
    "posterior_score",
    "prior_from_json",
    "prior_to_json",
    "rounds",
    "split_rows",
    "truncated_marginals",
    "stacking_weights",
]
