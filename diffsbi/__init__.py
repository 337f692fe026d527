"""diffsbi: simulation-based inference with simulators that can be differentiated."""

from diffsbi import _cache, _xla  # noqa: F401  (_xla first of all that computes)
from diffsbi.inference import FMPE, NLE, NPE, NRE, gaussian_proposal, load_posterior, rounds, truncated_marginals
from diffsbi.prior import Prior
from diffsbi.sampling import (
    Chains,
    full_field_posterior,
    load_chains,
    nuts,
    path_posterior,
    power_spectrum_posterior,
)
from diffsbi.simulators import (
    AbstractSimulator,
    AbstractTransport,
    Draws,
    LensingMaps,
    linear_gaussian,
    lotka_volterra,
    lsst_y10,
    two_moons,
)

__version__ = "0.1.0"

_cache.enable()

__all__ = [
    "FMPE",
    "NLE",
    "NPE",
    "NRE",
    "AbstractSimulator",
    "AbstractTransport",
    "Chains",
    "Draws",
    "LensingMaps",
    "Prior",
    "full_field_posterior",
    "gaussian_proposal",
    "linear_gaussian",
    "load_chains",
    "load_posterior",
    "lotka_volterra",
    "lsst_y10",
    "nuts",
    "path_posterior",
    "power_spectrum_posterior",
    "rounds",
    "truncated_marginals",
    "two_moons",
]
