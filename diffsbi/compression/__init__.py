"""Data to a few numbers by trained networks, and by scores of the latents."""

from diffsbi.compression.imnn import IMNN
from diffsbi.compression.latent_scores import LatentScores
from diffsbi.compression.learned import Compressor, fit_compressor, load_compressor
from diffsbi.compression.losses import LOSSES
from diffsbi.compression.networks import MapNetwork, ResidualNetwork, square_symmetry, torus_symmetry

__all__ = [
    "IMNN",
    "LOSSES",
    "Compressor",
    "LatentScores",
    "MapNetwork",
    "ResidualNetwork",
    "fit_compressor",
    "load_compressor",
    "square_symmetry",
    "torus_symmetry",
]
