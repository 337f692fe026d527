"""Data to summaries: spectra, one-point, peak and wavelet statistics of maps, and their compression."""

from diffsbi.summaries.compression import ScoreCompression, hartlap, moped, score_compression, shrunk_covariance
from diffsbi.summaries.maps import MapStatistics, map_statistics
from diffsbi.summaries.points import dominance, minima, moments, peaks
from diffsbi.summaries.spectra import Bands, band_edges, bandpowers, pairs
from diffsbi.summaries.wavelets import WaveletStatistics, wavelet_statistics

__all__ = [
    "Bands",
    "MapStatistics",
    "ScoreCompression",
    "WaveletStatistics",
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
    "wavelet_statistics",
]
