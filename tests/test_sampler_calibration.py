"""Simulation-based calibration of the full-field sampler: ranks of the true parameters among the draws are uniform."""

import jax
import numpy as np
import pytest
from scipy import stats

import diffsbi as ds
from diffsbi.diagnostics import sbc_ranks

DRAWS = 20  # nearly independent ones of each chain: ranks 0 to 20, in seven cells of three


def ranks(sim, model, n: int, **settings) -> np.ndarray:
    """Ranks of n prior draws from `sim` among draws of the posterior under `model`, `(n, p)`."""
    data = sim.draw(jax.random.key(6), n, with_score=False)
    thinned = []
    for i in range(n):
        key = jax.random.fold_in(jax.random.key(7), i)
        chains = ds.full_field_posterior(model, data.x[i], key, n_chains=1, **settings)
        thinned.append(chains.theta[0][np.linspace(0, chains.n_draws - 1, DRAWS).astype(int)])
    return sbc_ranks(np.array(thinned), np.asarray(data.theta))


def p_values(ranks: np.ndarray) -> np.ndarray:
    """χ² probability of uniform ranks, one for each parameter."""
    cells = [np.bincount(column // 3, minlength=7) for column in ranks.T]
    return np.array([stats.chisquare(cell).pvalue for cell in cells])


# NUTS is calibrated on many observations at once in test_inference_nle.
@pytest.mark.parametrize("sampler", ["hmc", pytest.param("nuts", marks=pytest.mark.slow)])
def test_ranks_are_uniform_and_a_wrong_likelihood_is_seen(sampler):
    """A toy: 120 observations take seconds. The wrong model thinks the noise twice as large as it is."""
    sim, wrong = (ds.linear_gaussian(n_data=24, n_latents=2, noise=noise) for noise in (0.5, 1.0))
    settings = dict(sampler=sampler, latents="whitened", n_warmup=60, n_samples=100, block=100)
    assert p_values(ranks(sim, sim, 120, **settings)).min() > 0.01
    assert p_values(ranks(sim, wrong, 60, **settings)).max() < 0.01


@pytest.mark.slow
def test_ranks_of_a_lensing_survey_are_uniform_and_a_wrong_likelihood_is_seen():
    sim = ds.lsst_y10(n_pix=16, side_deg=2.5)
    wrong = ds.lsst_y10(n_pix=16, side_deg=2.5, sigma_e=0.26 * 1.25)
    settings = dict(n_warmup=100, n_samples=200, block=100)
    right = p_values(ranks(sim, sim, 200, **settings))
    print("right", right)
    assert right.min() > 0.01
    false = p_values(ranks(sim, wrong, 200, **settings))
    print("wrong", false)
    assert false.min() < 0.01
