"""Markov chains on a joint density: the witness that shares no code with the neural posteriors."""

from diffsbi.sampling.chains import Chains, Estimate, load_chains
from diffsbi.sampling.full_field import EXACT, SAMPLERS, FullFieldTarget, full_field_posterior
from diffsbi.sampling.gaussian_field import GaussianFieldLikelihood, gaussian_field_posterior
from diffsbi.sampling.hmc import hmc
from diffsbi.sampling.mclmc import mclmc
from diffsbi.sampling.nuts import nuts
from diffsbi.sampling.path import PathEstimate, PathPosterior, path_posterior
from diffsbi.sampling.power_spectrum import BandPowerLikelihood, band_power_covariance, power_spectrum_posterior

__all__ = [
    "EXACT",
    "SAMPLERS",
    "BandPowerLikelihood",
    "Chains",
    "Estimate",
    "FullFieldTarget",
    "GaussianFieldLikelihood",
    "PathEstimate",
    "PathPosterior",
    "band_power_covariance",
    "full_field_posterior",
    "gaussian_field_posterior",
    "hmc",
    "load_chains",
    "mclmc",
    "nuts",
    "path_posterior",
    "power_spectrum_posterior",
]
