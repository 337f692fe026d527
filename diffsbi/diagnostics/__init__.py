"""Is a posterior right? Coverage over many observations, distances and moments for one."""

from diffsbi.diagnostics.c2st import C2ST, c2st
from diffsbi.diagnostics.coverage import Coverage, expected_coverage, sbc_ranks, sbc_test, tarp
from diffsbi.diagnostics.local_c2st import LocalC2ST, local_c2st
from diffsbi.diagnostics.misspecification import Misspecification, misspecification
from diffsbi.diagnostics.moments import Moments, MomentShift, compare_moments, figure_of_merit, moments
from diffsbi.diagnostics.predictive import PredictiveCheck, predictive_check

__all__ = [
    "C2ST", "Coverage", "LocalC2ST", "Misspecification", "MomentShift", "Moments", "PredictiveCheck", "c2st",
    "compare_moments", "expected_coverage", "figure_of_merit", "local_c2st", "misspecification", "moments",
    "predictive_check", "sbc_ranks", "sbc_test", "tarp",
]  # fmt: skip
