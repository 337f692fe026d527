"""Simulators with a differentiable joint: lensing maps, and toys with known answers."""

from diffsbi.simulators.base import AbstractSimulator, AbstractTransport, Draws, Identity
from diffsbi.simulators.laplace import Laplace
from diffsbi.simulators.lensing import LensingMaps, lsst_y10
from diffsbi.simulators.linear_gaussian import linear_gaussian
from diffsbi.simulators.lotka_volterra import lotka_volterra
from diffsbi.simulators.renewal import fresh_noise
from diffsbi.simulators.two_moons import two_moons

__all__ = [
    "AbstractSimulator",
    "AbstractTransport",
    "Draws",
    "Identity",
    "Laplace",
    "LensingMaps",
    "fresh_noise",
    "linear_gaussian",
    "lotka_volterra",
    "lsst_y10",
    "two_moons",
]
