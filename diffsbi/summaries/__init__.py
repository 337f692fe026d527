"""Data to summaries: spectra, one-point and peak statistics of maps, and their compression."""

from diffsbi.summaries.compression import ScoreCompression, hartlap, moped, score_compression, shrunk_covariance
from diffsbi.summaries.maps import MapStatistics, map_statistics
from diffsbi.summaries.points import dominance, minima, moments, peaks
from diffsbi.summaries.spectra import Bands, band_edges, bandpowers, pairs

__all__ = [
    "Bands",
    "MapStatistics",
    "ScoreCompression",
    "band_edges",
    "bandpowers",
    "dominance",
    "hartlap",
    "map_statistics",
    "minima",
    "moments",
    "moped",
    "pairs",
    "peaks",
    "score_compression",
    "shrunk_covariance",
]
