"""Data to a few numbers by trained networks, and by scores of the latents."""

from diffsbi.compression.field_mode import GaussianFieldMode
from diffsbi.compression.fishnet_fit import fit_fishnet, load_fishnet, save_fishnet
from diffsbi.compression.fishnets import Fishnet, Information, set_loss, stream
from diffsbi.compression.graphs import Aggregation, FisherAggregation, Graph, GraphFishnet, check_graph
from diffsbi.compression.imnn import IMNN
from diffsbi.compression.laplace_mode import LaplaceMode
from diffsbi.compression.latent_scores import LatentScores, MarginalScore, ScoreChange, ScoreFrame
from diffsbi.compression.learned import Compressor, fit_compressor, load_compressor
from diffsbi.compression.losses import LOSSES
from diffsbi.compression.marginal_information import MarginalInformation, marginal_information
from diffsbi.compression.networks import HybridNetwork, MapNetwork, ResidualNetwork, square_symmetry, torus_symmetry
from diffsbi.compression.path_mode import PathMode
from diffsbi.compression.rejection import population_monte_carlo, rejection
from diffsbi.compression.sets import DeepSet, FisherSum, MemberNetwork, patches

__all__ = [
    "IMNN",
    "LOSSES",
    "Aggregation",
    "Compressor",
    "DeepSet",
    "FisherAggregation",
    "FisherSum",
    "Fishnet",
    "GaussianFieldMode",
    "Graph",
    "GraphFishnet",
    "HybridNetwork",
    "Information",
    "LaplaceMode",
    "LatentScores",
    "MapNetwork",
    "MarginalInformation",
    "MarginalScore",
    "MemberNetwork",
    "PathMode",
    "ResidualNetwork",
    "ScoreChange",
    "ScoreFrame",
    "check_graph",
    "fit_compressor",
    "fit_fishnet",
    "load_compressor",
    "load_fishnet",
    "marginal_information",
    "patches",
    "population_monte_carlo",
    "rejection",
    "save_fishnet",
    "set_loss",
    "square_symmetry",
    "stream",
    "torus_symmetry",
]
