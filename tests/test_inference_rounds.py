"""Sequential rounds: the exact posterior from few simulations, proposals that stay where they must, clear ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from targets import gaussian

import diffsbi as ds
from diffsbi.compression import MarginalScore
from diffsbi.inference.posterior import Posterior, truncated_prior
from diffsbi.inference.rounds import _leakage

FLOW = ("smooth", {"width": 16, "depth": 1, "layers": 1, "ramps": 4})
FIT = {"members": 1, "max_epochs": 250}


@pytest.mark.parametrize(
    "estimator, density, options",
    [
        (ds.NPE, gaussian, None),
        pytest.param(ds.NPE, *FLOW, marks=pytest.mark.slow),
        pytest.param(ds.NLE, *FLOW, marks=pytest.mark.slow),
    ],
)
def test_rounds_end_at_the_exact_posterior(linear, observed, estimator, density, options):
    result = ds.rounds(
        linear, observed, estimator(linear, density, density_options=options), jax.random.key(1),
        n_rounds=2, n_per_round=80, tolerance=1e-9, fit=FIT,
    )  # fmt: skip
    mean, covariance = linear.posterior(observed)
    width = np.sqrt(np.diag(covariance))
    draws = result.samples[-1]
    np.testing.assert_allclose((draws.mean(0) - mean) / width, 0.0, atol=0.2)
    np.testing.assert_allclose(draws.std(0) / width, 1.0, atol=0.12)
    assert result.simulations == 160 and result.samples.shape == (2, 2000, 2) and len(result.moved) == 1
    assert result.leakage[0] == 0.0 and len(result.leakage) == 2
    assert (result.leakage[1] == 0.0) if estimator is ds.NLE else (result.leakage[1] < 0.02)
    assert result.stop_reason == "n_rounds reached"


def test_leakage_is_the_share_of_draws_where_nothing_was_simulated(linear, observed):
    draws = linear.draw(jax.random.key(3), 60, latents="whitened")
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x, draws.score)
    posterior = fitted.fit(jax.random.key(0), members=1, max_epochs=2).condition(observed)
    theta = np.asarray(posterior.sample(jax.random.key(1), 2000))
    half = lambda t: t[:, 0] > np.median(theta[:, 0])  # noqa: E731
    assert _leakage(posterior, theta, None, None, jax.random.key(0)) == 0.0
    np.testing.assert_allclose(_leakage(posterior, theta, half, None, jax.random.key(0)), 0.5, atol=1e-3)
    np.testing.assert_allclose(_leakage(posterior, theta, None, half, jax.random.key(0)), 0.5, atol=1e-3)
    # A proposal that misses half of the posterior: the atomic correction leaves the fit there as it is.
    proposal = starting(linear, observed)
    result = ds.rounds(
        linear, observed, ds.NPE(linear, gaussian, correction="atomic"), jax.random.key(1), proposal=proposal,
        n_rounds=1, n_per_round=40, fit={"members": 1, "max_epochs": 3},
    )  # fmt: skip
    floor = proposal.log_prob(proposal.sample(jax.random.key(0), (4000,))).min()
    beyond = np.mean(np.asarray(proposal.log_prob(jnp.asarray(result.samples[0]))) < floor)
    assert result.leakage[0] >= beyond and 0 < result.leakage[0] < 1


def test_rounds_stop_when_the_posterior_rests_and_keep_the_estimator(linear, observed):
    start = ds.NPE(linear, gaussian)
    draws = linear.draw(jax.random.key(3), 80, latents="whitened")
    start.append(draws.theta, draws.x, draws.score)
    result = ds.rounds(linear, observed, start, jax.random.key(1), n_rounds=5, n_per_round=40, tolerance=0.5, fit=FIT)
    assert len(start) == 80
    assert result.simulations == 40 and result.stop_reason.startswith("moved by 0.")
    assert result.moved[-1] < 0.5


def test_a_posterior_proposes_the_prior_within_its_region(linear, observed):
    draws = linear.draw(jax.random.key(3), 100, latents="whitened")
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x, draws.score)
    posterior = fitted.fit(jax.random.key(0), **FIT).condition(observed)
    theta, inside = posterior.propose(jax.random.key(5), 500)
    assert inside(theta).all()
    assert abs(inside(posterior.sample(jax.random.key(6), 20_000)).mean() - (1 - 1e-4)) < 4e-4
    # Within the region the proposal is the prior: the ratio of densities is the same everywhere in it.
    mean, covariance = linear.posterior(observed)
    theta, mean, root = (np.asarray(a) for a in (theta, mean, np.linalg.cholesky(covariance)))
    near = np.linalg.norm(np.linalg.solve(root, (theta - mean).T), axis=0)
    prior = np.asarray(linear.prior.sample(jax.random.key(7), (20_000,)))
    prior = prior[inside(prior)]
    expected = np.linalg.norm(np.linalg.solve(root, (prior - mean).T), axis=0)
    error = np.sqrt(0.25 / len(near) + 0.25 / len(expected))
    assert abs(np.mean(near < np.median(expected)) - 0.5) < 4 * error
    kept = fitted.restricted(inside)
    assert 0 < len(kept) < len(fitted) == 100 and inside(kept._rows[0][0]).all()


def test_a_region_with_little_prior_is_told(linear, observed):
    draws = linear.draw(jax.random.key(3), 30, latents="whitened")
    posterior = ds.NPE(linear, gaussian).append(draws.theta, draws.x).fit(jax.random.key(0), max_epochs=1)
    with pytest.raises(ValueError, match="Expected 90000 draws of the prior within the posterior's region; 20000 cand"):
        truncated_prior(posterior, jax.random.key(5), 90_000, observed, most_candidates=20_000)
    # A few blocks are enough to see that all will not do.
    with pytest.raises(ValueError, match="region; 200000 candidates gave .* at most 900000 are tried"):
        truncated_prior(posterior, jax.random.key(5), 890_000, observed, most_candidates=900_000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_rounds": 0}, "Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0; got 0, 200 and 0.1"),
        ({"n_per_round": 0}, "Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0; got 5, 0"),
        ({"tolerance": 0.0}, "Expected n_rounds >= 1, n_per_round >= 1 and tolerance > 0; got 5, 200 and 0"),
        ({"block_size": 0}, "Expected block_size >= 1 and a finite widen > 0; got 0"),
        ({"widen": -1.0}, "Expected block_size >= 1 and a finite widen > 0; got 10 and -1"),
    ],
)
def test_refusals(linear, observed, wrong, message):
    with pytest.raises(ValueError, match=message):
        ds.rounds(linear, observed, ds.NPE(linear), jax.random.key(0), **wrong)


@pytest.mark.parametrize("run", [ds.rounds, ds.truncated_marginals])
def test_an_observation_that_is_none_of_the_simulators_is_refused_at_once(linear, observed, run):
    estimator = (ds.NPE(linear),) if run is ds.rounds else ()
    broken = {r"an observation with shape \(4,\); got \(3,\)": observed[:3]}
    for message, x in (broken | {"Expected finite observation": observed.at[1].set(jnp.nan)}).items():
        with pytest.raises(ValueError, match=message):
            run(linear, x, *estimator, jax.random.key(0), n_rounds=1, n_per_round=10**9)


@pytest.mark.parametrize("part", ["propose", "sample"])
def test_what_earlier_rounds_gave_is_kept(linear, observed, monkeypatch, part):
    """The second round's posterior cannot be drawn from, or the first's region not be simulated in."""
    whole, calls, failing_from = getattr(Posterior, part), [], {"propose": 0, "sample": 2}[part]

    def failing(*arguments, **options):
        calls.append(part)
        if len(calls) > failing_from:
            raise ValueError("Expected more of the prior.")
        return whole(*arguments, **options)

    monkeypatch.setattr(Posterior, part, failing)
    settings = dict(n_rounds=3, n_per_round=30, tolerance=1e-9, fit=FIT | {"max_epochs": 2})
    with pytest.warns(UserWarning, match="round 2 failed: Expected more of the prior.*round 1 is kept"):
        result = ds.rounds(linear, observed, ds.NPE(linear, gaussian), jax.random.key(1), **settings)
    assert len(result.posteriors) == len(result.samples) == len(result.leakage) == 1 and result.moved == ()
    assert result.stop_reason == "round 2 failed: Expected more of the prior."
    assert result.simulations == {"propose": 30, "sample": 60}[part]  # `propose` samples as well, once


def test_the_summary_is_applied_to_simulations_and_observation(linear, observed):
    result = ds.rounds(
        linear, observed, ds.NPE(linear, gaussian), jax.random.key(1),
        n_rounds=1, n_per_round=30, summary=lambda x: x[:2], with_score=False, fit=FIT | {"max_epochs": 1},
    )  # fmt: skip
    np.testing.assert_array_equal(result.posterior.default_x, jnp.asarray(observed[:2]))
    assert result.moved == ()


def starting(linear, observed, off: float = 2.0):
    """`off` widths from the posterior, three times as wide."""
    mean, covariance = (np.asarray(a) for a in linear.posterior(observed))
    width = np.sqrt(np.diag(covariance))
    draws = mean + off * width + 3 * width * np.random.default_rng(0).normal(size=(2000, 2))
    return ds.gaussian_proposal(linear, draws, 1.0)


RECENTRED = dict(n_rounds=2, n_per_round=60, tolerance=1e-9, fit=FIT, widen=1.5, n_samples=4000)


@pytest.mark.parametrize(
    "estimator, options, off",
    [
        # The mixture of two proposals makes a posterior that a normal can only be if both have one centre.
        (ds.NPE, {"correction": "reweight"}, 0.0),
        (ds.NPE, {"correction": "atomic"}, 2.0),
        pytest.param(ds.NLE, {}, 2.0, marks=pytest.mark.slow),
    ],
)
def test_rounds_from_a_proposal_end_at_the_exact_posterior(linear, observed, estimator, options, off):
    """Simulations of both rounds count, with statistics made anew, corrected for the mixture of both proposals."""
    centres = []

    def summary_at(theta0):
        centres.append(np.asarray(theta0))
        return MarginalScore(linear, theta0, n_turns=4, n_burn=1)

    proposal = starting(linear, observed, off)
    result = ds.rounds(
        linear, observed, estimator(linear, gaussian, **options), jax.random.key(2), proposal=proposal,
        summary_at=summary_at, **RECENTRED,
    )  # fmt: skip
    mean, covariance = linear.posterior(observed)
    width = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((result.samples[-1].mean(0) - mean) / width, 0.0, atol=0.2)
    np.testing.assert_allclose(result.samples[-1].std(0) / width, 1.0, atol=0.12)
    # Around the first proposal (its draws' mean), then around the posterior of the first round.
    root = np.sqrt(np.diag(proposal.root @ proposal.root.T))
    assert np.all(np.abs(centres[0] - proposal.loc) < 4 * root / np.sqrt(60))
    np.testing.assert_allclose(centres[1], result.samples[0].mean(0), atol=1e-5)
    assert len(result.posteriors) == len(result.summaries) == 2
    np.testing.assert_allclose(result.posterior.default_x, result.summary(observed), rtol=1e-5)
    np.testing.assert_allclose(result.posteriors[0].default_x, result.summaries[0](observed), rtol=1e-5)


def test_the_first_centre_is_the_fiducial_without_a_proposal(linear, observed):
    centres = []

    def summary_at(theta0):
        centres.append(np.asarray(theta0))
        return lambda x: x[:2] - theta0.sum()

    fit = FIT | {"max_epochs": 1}
    ds.rounds(linear, observed, ds.NPE(linear, gaussian), jax.random.key(2), summary_at=summary_at, n_rounds=1, fit=fit)
    np.testing.assert_array_equal(centres, [linear.fiducial])


def test_a_folder_goes_on_where_it_was_left(linear, observed, tmp_path, monkeypatch):
    fit = {"max_epochs": 3, "members": 1}
    run = functools.partial(
        ds.rounds, linear, observed, ds.NPE(linear, gaussian), summary_at=lambda theta0: lambda x: x - theta0.sum(),
        proposal=starting(linear, observed), folder=tmp_path, block_size=25, **RECENTRED | {"fit": fit},
    )  # fmt: skip
    real, calls = type(linear).draw, []

    def draw(self, key, n, *args, **options):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append((n, options["start"]))
        return real(self, key, n, *args, **options)

    most = 4
    monkeypatch.setattr(type(linear), "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        run(jax.random.key(2))
    assert calls == [(25, 0), (25, 25), (10, 50), (25, 0)]
    del calls[:2]
    most = None
    again = run(jax.random.key(2))
    check = (1, 0)  # of a round that was there: is its first simulation this simulator's?
    assert calls == [(10, 50), (25, 0), check, (25, 25), (10, 50), check]  # the second round's from its second block on
    monkeypatch.setattr(type(linear), "draw", real)
    whole = run(jax.random.key(2), folder=tmp_path / "other")
    np.testing.assert_allclose(again.samples, whole.samples, rtol=1e-5)
    with pytest.raises(ValueError, match="another configuration.*key"):
        run(jax.random.key(3))
    with pytest.raises(ValueError, match="to hold round 2 of this call; its theta are others"):
        run(jax.random.key(2), widen=3.0)


def test_an_estimator_with_a_proposal_goes_on_from_one(linear, observed):
    """Its simulations cannot be cut to a region of the prior: later ones are from a normal, and those stay."""
    proposal = starting(linear, observed, 0.0)
    theta = proposal.sample(jax.random.key(4), (40,))
    draws = linear.draw(jax.random.key(3), 40, theta, latents="whitened")
    start = ds.NPE(linear, gaussian).append(draws.theta, draws.x, draws.score, proposal=proposal)
    assert not start.from_prior and ds.NPE(linear).from_prior
    fit = FIT | {"max_epochs": 60}
    result = ds.rounds(linear, observed, start, jax.random.key(1), n_rounds=2, n_per_round=40, tolerance=1e-9, fit=fit)
    components = result.posterior.proposals.components
    assert result.simulations == 40 and len(components) == 2
    np.testing.assert_array_equal(components[0].root, proposal.root)
    np.testing.assert_allclose(components[1].loc, result.samples[0].mean(0), atol=1e-5)
    covariance = components[1].root @ components[1].root.T
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), 1.25 * result.samples[0].std(0, ddof=1), rtol=1e-3)


def test_what_needs_an_empty_estimator_or_one_summary_is_refused(linear, observed):
    start = ds.NPE(linear, gaussian)
    draws = linear.draw(jax.random.key(3), 20)
    start.append(draws.theta, draws.x, draws.score)
    anew = functools.partial(MarginalScore, linear)
    with pytest.raises(ValueError, match=r"without simulations for summary_at=...; it has 20"):
        ds.rounds(linear, observed, start, jax.random.key(0), summary_at=anew)
    with pytest.raises(ValueError, match=r"without simulations for proposal=...; it has 20"):
        ds.rounds(linear, observed, start, jax.random.key(0), proposal=starting(linear, observed))
    with pytest.raises(ValueError, match="summary or summary_at; got both"):
        ds.rounds(linear, observed, ds.NPE(linear), jax.random.key(0), summary_at=anew, summary=jnp.ravel)


def test_what_cannot_join_is_refused_before_anything_is_simulated(linear, observed, monkeypatch):
    monkeypatch.setattr(type(linear), "draw", lambda *_, **__: pytest.fail("simulated"))
    names, theta, x = linear.names, np.zeros((20, 2)), np.zeros((20, 3))
    turned = ds.Prior({names[1]: dist.Normal(0.0, 1.0), names[0]: dist.Normal(0.0, 1.0)})
    wider = ds.Prior({name: dist.Normal(0.0, 5.0) for name in names})
    cases = [
        (linear, ds.NPE(turned), "its parameters are"),
        (linear, ds.NPE(wider), "their densities differ"),
        (linear, ds.NPE, "an estimator, such as"),
        (lambda key, theta: theta, ds.NPE(linear), "a simulator, with a prior"),
        (linear, ds.NPE(linear).append(theta, x, theta), r"summaries of shape \(3,\)"),
        (linear, ds.NPE(linear).append(theta, np.zeros((20, *observed.shape))), "with_score=False, as the"),
    ]
    for sim, estimator, message in cases:
        with pytest.raises(ValueError, match=message):
            ds.rounds(sim, observed, estimator, jax.random.key(0))


def test_the_posterior_of_another_fit_proposes(linear, observed):
    draws = linear.draw(jax.random.key(0), 100, with_score=False)
    first = ds.NPE(linear, gaussian).append(draws.theta, draws.x).fit(jax.random.key(1), members=1, max_epochs=50)
    result = ds.rounds(
        linear, observed, ds.NPE(linear, gaussian), jax.random.key(2), n_rounds=1, n_per_round=100,
        proposal=first.condition(observed), fit=FIT,
    )  # fmt: skip
    mean, covariance = linear.posterior(observed)
    np.testing.assert_allclose((result.samples[-1].mean(0) - mean) / np.sqrt(np.diag(covariance)), 0.0, atol=0.4)


def test_a_region_is_not_looked_for_without_end(linear, observed):
    draws = linear.draw(jax.random.key(0), 100, with_score=False)
    fitted = ds.NPE(linear, gaussian).append(draws.theta, draws.x).fit(jax.random.key(1), members=1, max_epochs=50)
    with pytest.raises(ValueError, match="within the posterior's region in 1e-09 s"):
        truncated_prior(fitted.condition(observed), jax.random.key(2), 10**6, most_seconds=1e-9)
