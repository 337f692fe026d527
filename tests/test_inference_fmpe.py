"""Flow matching against posteriors known in closed form or on a grid, and its two targets against each other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import diffsbi as ds
from diffsbi.inference import FMPE, ReweightedPosterior, gaussian_proposal, load_posterior
from diffsbi.inference.fmpe import FlowMatching
from diffsbi.inference.losses import ScoredDensity
from diffsbi.prior import Prior
from diffsbi.simulators.linear_gaussian import linear_gaussian

SMALL = {"width": 32, "depth": 2, "steps": 12}
NOISE = 0.5
GRID = jnp.linspace(-5.0, 5.0, 1001)[:, None]


def prior():
    return Prior({"a": dist.Normal(0.0, 1.0)})


def simulate(key, n):
    """x = a² + noise, two modes, and the score of the likelihood."""
    key_theta, key_x = jax.random.split(key)
    theta = prior().sample(key_theta, (n,))
    e = jax.random.normal(key_x, (n, 1))
    return theta, theta**2 + NOISE * e, 2 * theta * e / NOISE


def divergence(posterior):
    """KL(exact || q), averaged over data, on a grid."""
    grid, out = np.asarray(GRID[:, 0], float), []
    for x in np.linspace(-0.5, 3.0, 8):
        log_p = -0.5 * ((grid**2 - x) / NOISE) ** 2 - 0.5 * grid**2
        log_p -= np.log(np.trapezoid(np.exp(log_p), grid))
        log_q = np.asarray(posterior.log_prob(GRID, jnp.asarray([x])), float)
        out.append(np.trapezoid(np.exp(log_p) * (log_p - log_q), grid))
    return float(np.mean(out))


def fitted(seed, weight, n=60, score=None, max_epochs=400):
    theta, x, own = simulate(jax.random.key(seed), n)
    estimator = FMPE(prior(), score_weight=weight, **SMALL).append(theta, x, own if score is None else score)
    return estimator.fit(jax.random.key(50 + seed), members=1, max_epochs=max_epochs)


@pytest.fixture(scope="module")
def fits():
    """At N = 60, without and with scores."""
    return {weight: fitted(0, weight, max_epochs=200) for weight in (0.0, "auto")}


class _KnownField(eqx.Module):
    r"""The field of $v \sim N(0, \tau^2)$, times a factor: $f = a(\tau^2 - 1) y / (a^2\tau^2 + b^2)$."""

    factor: jax.Array
    width: float = eqx.field(static=True)

    @property
    def bijection(self):
        return self

    def field(self, angle, y, c):
        a, b = jnp.sin(angle), jnp.cos(angle)
        return self.factor * a * (self.width**2 - 1) / (a**2 * self.width**2 + b**2) * y


def best_factor(weight, score_of, width=0.5, n=4000):
    """The factor at which the loss is smallest (it is quadratic), for eight sets of rows: mean and standard error."""

    @jax.jit
    def one(key):
        key_v, key_score, key_loss = jax.random.split(key, 3)
        v = width * jax.random.normal(key_v, (n, 1))
        batch = {"v": v, "c": jnp.zeros((n, 1)), "use": jnp.ones(n)}
        batch["score"] = score_of(v / width) / width + 2.0 * jax.random.normal(key_score, v.shape)
        loss = FlowMatching(float(np.arctan(1e3)), jnp.asarray([weight]))

        def value(factor):
            model = ScoredDensity(_KnownField(factor, width))  # type: ignore[arg-type]
            return loss(*eqx.partition(model, eqx.is_inexact_array), batch, key_loss)

        below, at, above = (value(jnp.asarray(f)) for f in (0.0, 1.0, 2.0))
        return 1 + 0.5 * (below - above) / (below - 2 * at + above)

    factors = np.array([one(key) for key in jax.random.split(jax.random.key(0), 8)])
    return factors.mean(), factors.std(ddof=1) / np.sqrt(len(factors))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1e4])
def test_both_targets_have_the_field_as_their_mean(x64, weight):
    """Denoising alone, with scores, and scores alone, which are noisy: each is smallest at the true field."""
    mean, error = best_factor(weight, lambda v: -v)
    assert abs(mean - 1) < 5 * error < 0.3
    if weight > 0:  # a score that is not the density's is noticed
        mean, error = best_factor(weight, lambda v: -0.5 * v)
        assert abs(mean - 1) > 5 * error


@pytest.mark.slow
def test_scores_bring_the_posterior_nearer_to_the_exact_one():
    """For most data sets: a fit now and then fails with scores, which the median does not see and an ensemble drops."""
    gain = [divergence(fitted(seed, 0.0, 240)) - divergence(fitted(seed, "auto", 240)) for seed in range(5)]
    assert np.median(gain) > 0.03 and np.sum(np.array(gain) > 0) >= 4


@pytest.mark.slow
def test_a_score_of_pure_noise_does_not_hurt():
    noise = 1e3 * jax.random.normal(jax.random.key(9), (240, 1))
    with_noise = [divergence(fitted(seed, "auto", 240, noise)) for seed in range(2)]
    without = [divergence(fitted(seed, 0.0, 240)) for seed in range(2)]
    assert np.mean(with_noise) < np.mean(without) + 0.1


def test_fixed_weights_in_float64(x64):
    estimator = FMPE(prior(), score_weight=0.5, **SMALL).append(*simulate(jax.random.key(0), 60))
    posterior = estimator.fit(jax.random.key(1), members=2, max_epochs=30)
    assert posterior.log_prob(GRID, jnp.asarray([1.0])).dtype == jnp.float64
    # Six held-out rows cannot tell an improvement from chance; the 54 that it trains on can.
    assert all(np.mean(h.train[-5:]) < np.mean(h.train[:5]) for h in posterior.histories)


def test_density_integrates_to_one_and_draws_follow_it(fits):
    grid = np.asarray(GRID[:, 0], float)
    for weight in (0.0, "auto"):
        posterior = fits[weight].condition(jnp.asarray([1.5]))
        density = np.exp(np.asarray(posterior.log_prob(GRID), float))
        assert abs(np.trapezoid(density, grid) - 1) < 0.01
        draws = np.sort(np.asarray(posterior.sample(jax.random.key(0), 4000))[:, 0])
        below = np.interp(draws, grid, np.cumsum(density) * (grid[1] - grid[0]))
        distance = np.abs(below - (np.arange(4000) + 0.5) / 4000).max()  # Kolmogorov and Smirnov's
        assert distance < 2.0 / np.sqrt(4000) + 0.005


@pytest.mark.parametrize("with_score", [False, True])
def test_exact_posterior_of_a_linear_gaussian(with_score):
    sim = linear_gaussian(dim=2, n_latents=2, n_data=3, seed=1)
    draws = sim.draw(jax.random.key(0), 400)
    estimator = FMPE(sim, **SMALL).append(draws.theta, draws.x, draws.score if with_score else None)
    posterior = estimator.fit(jax.random.key(1), members=2, max_epochs=200)
    observed = sim.draw(jax.random.key(2), 20).x
    samples = np.asarray(posterior.sample(jax.random.key(3), 1000, observed))
    means, covariances = jax.jit(jax.vmap(sim.posterior))(observed)
    width = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2))
    shift = (samples.mean(0) - np.asarray(means)) / width
    assert np.sqrt(np.mean(shift**2)) < 0.2
    assert abs(np.mean(samples.std(0) / width) - 1) < 0.1


def test_saved_and_loaded(fits, tmp_path):
    posterior = fits["auto"].condition(jnp.asarray([1.0]))
    posterior.save(tmp_path / "a")
    loaded = load_posterior(tmp_path / "a")
    np.testing.assert_array_equal(loaded.sample(jax.random.key(0), 5), posterior.sample(jax.random.key(0), 5))
    np.testing.assert_array_equal(loaded.log_prob(GRID[::100]), posterior.log_prob(GRID[::100]))
    assert loaded.config["estimator"] == "FMPE" and loaded.config["density_options"] == SMALL
    assert ds.FMPE is FMPE


@pytest.mark.slow
def test_rows_of_a_proposal_are_reweighted_to_the_prior():
    proposal = gaussian_proposal(prior(), 0.5 + jax.random.normal(jax.random.key(0), (200, 1)), widen=1.0)
    theta = proposal.sample(jax.random.key(1), (400,))
    x = theta + NOISE * jax.random.normal(jax.random.key(2), theta.shape)
    estimator = FMPE(prior(), **SMALL).append(theta, x, (x - theta) / NOISE**2, proposal=proposal)
    posterior = estimator.fit(jax.random.key(3), members=1)
    assert isinstance(posterior, ReweightedPosterior)
    draws = np.asarray(posterior.sample(jax.random.key(4), 2000, jnp.asarray([0.3])))
    precision = 1 + NOISE**-2
    assert abs(draws.mean() - 0.3 / NOISE**2 / precision) < 0.15 * precision**-0.5
    assert abs(draws.std() * precision**0.5 - 1) < 0.1


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps >= 1 .* got 64, 3, 0 and 0.001"),
    ({"width": 0}, "width, depth and steps >= 1"),
    ({"sigma_min": 0.0}, "sigma_min between 0 and 1; got 64, 3, 16 and 0.0"),
    ({"score_weight": "auot"}, "'auto', a number"),
])  # fmt: skip
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FMPE(prior(), **options)


def test_too_few_rows_are_refused():
    estimator = FMPE(prior())
    with pytest.raises(ValueError, match="at least 10 simulations to fit; got 0"):
        estimator.fit(jax.random.key(0))
    with pytest.raises(ValueError, match=r"Expected theta with shape \(n, 1\)"):
        estimator.append(jnp.zeros((5, 2)), jnp.zeros((5, 1)))
