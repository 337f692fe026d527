"""Markov chains on a joint density: the witness that shares no code with the neural posteriors."""

from diffsbi.sampling.chains import Chains, Estimate, load_chains
from diffsbi.sampling.nuts import nuts

__all__ = ["Chains", "Estimate", "load_chains", "nuts"]
