"""The parameters of the LSST-Y10 preset: names, fiducial values and priors."""

import numpyro.distributions as dist

from diffsbi.prior import Prior

FIDUCIAL = {"omega_c": 0.2664, "omega_b": 0.0492, "sigma_8": 0.831, "h_0": 0.6727, "n_s": 0.9645, "w_0": -1.0}


def lsst_y10_prior() -> Prior:
    """Independent normals around the fiducial values, omega_c cut at 0 and w_0 to (−2, −0.3) (arXiv:2409.17975)."""
    f = FIDUCIAL
    return Prior(
        {
            "omega_c": dist.TruncatedNormal(f["omega_c"], 0.2, low=0.0),
            "omega_b": dist.Normal(f["omega_b"], 0.006),
            "sigma_8": dist.Normal(f["sigma_8"], 0.14),
            "h_0": dist.Normal(f["h_0"], 0.063),
            "n_s": dist.Normal(f["n_s"], 0.08),
            "w_0": dist.TruncatedNormal(f["w_0"], 0.9, low=-2.0, high=-0.3),
        },
        FIDUCIAL,
    )
