"""Markov chains on a joint density: the witness that shares no code with the neural posteriors."""

from diffsbi.sampling.chains import Chains, Estimate, load_chains
from diffsbi.sampling.full_field import FullFieldTarget, full_field_posterior
from diffsbi.sampling.nuts import nuts
from diffsbi.sampling.power_spectrum import BandPowerLikelihood, power_spectrum_posterior

__all__ = [
    "BandPowerLikelihood",
    "Chains",
    "Estimate",
    "FullFieldTarget",
    "full_field_posterior",
    "load_chains",
    "nuts",
    "power_spectrum_posterior",
]
