"""Neural posterior estimation against answers known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from targets import gaussian

from diffsbi.flows import spline_flow
from diffsbi.inference import NPE, posterior_score
from diffsbi.inference.checks import precision_warnings, score_warnings, warnings_of_scores
from diffsbi.inference.losses import ScoredDensity, first_noise, noise_share
from diffsbi.inference.standardise import fit_standardiser
from diffsbi.prior import Prior, Within
from diffsbi.simulators.linear_gaussian import linear_gaussian

SMALL = {"layers": 1, "width": 16, "depth": 1, "ramps": 4}
A = np.array([[1.5, 0.3], [-0.4, 0.8]])
B = np.array([[0.25, 0.1], [0.05, 0.3]])
NOISE = 0.4


def normal_prior():
    return Prior({"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})


def simulate(key, n):
    """x = A theta + B z + noise, with the joint score A^T (x − A theta − B z) / noise²."""
    key_theta, key_z, key_x = jax.random.split(key, 3)
    theta = normal_prior().sample(key_theta, (n,))
    z, e = jax.random.normal(key_z, (n, 2)), jax.random.normal(key_x, (n, 2))
    x = theta @ A.T + z @ B.T + NOISE * e
    return theta, x, e @ A / NOISE


def exact(x):
    """Mean and covariance of theta | x."""
    data = B @ B.T + NOISE**2 * np.eye(2)
    covariance = np.linalg.inv(A.T @ np.linalg.solve(data, A) + np.eye(2))
    return x @ (covariance @ A.T @ np.linalg.inv(data)).T, covariance


def divergence(posterior, n_x=30, n=100):
    """KL(exact || q), averaged over data sets, by Monte Carlo with the same draws for every q."""
    _, x, _ = simulate(jax.random.key(999), n_x)
    mean, covariance = exact(np.asarray(x))
    root = np.linalg.cholesky(covariance)
    e = np.random.default_rng(0).standard_normal((n, n_x, 2))
    log_p = -0.5 * np.sum(e**2, -1) - np.log(np.diag(root)).sum() - np.log(2 * np.pi)
    log_q = posterior.log_prob(mean[None] + e @ root.T, jnp.broadcast_to(x, (n, n_x, 2)))
    return float(np.mean(log_p - log_q))


def npe(weight="auto", prior=None, **options):
    return NPE(prior or normal_prior(), score_weight=weight, density_options=SMALL, **options)


@pytest.fixture(scope="module")
def fits():
    """Divergence from the exact posterior at N = 100, eight data sets, without and with scores; one posterior."""
    out = {}
    for weight in (0.0, "auto"):
        posteriors = []
        for seed in range(8):
            rows = simulate(jax.random.key(seed), 100)
            posteriors.append(npe(weight).append(*rows).fit(jax.random.key(50 + seed), members=1, max_epochs=200))
        out[weight] = posteriors, np.array([divergence(p) for p in posteriors])
    return out


def test_scores_bring_the_posterior_nearer_to_the_exact_one(fits):
    gain = fits[0.0][1] - fits["auto"][1]
    assert gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)) > 0
    assert fits["auto"][1].mean() < 0.1


def test_draws_have_the_exact_moments_within_the_error_of_the_fit(fits):
    posterior = fits["auto"][0][0]
    x = np.array([0.7, -0.4])
    draws = posterior.sample(jax.random.key(0), 4000, x)
    mean, covariance = exact(x)
    assert draws.shape == (4000, 2)
    sigma = np.sqrt(np.diag(covariance))
    assert np.all(np.abs(np.mean(draws, 0) - mean) < 0.3 * sigma)
    np.testing.assert_allclose(np.std(draws, 0), sigma, rtol=0.3)


def test_draws_follow_log_prob(fits):
    """E_q[log q] from draws against the same by importance sampling from a wide Gaussian."""
    posterior = fits["auto"][0][1].condition(np.array([0.2, 0.1]))
    draws = np.asarray(posterior.sample(jax.random.key(1), 4000))
    entropy = posterior.log_prob(draws)
    centre, spread = np.mean(draws, 0), 2 * np.std(draws, 0)
    wide = centre + spread * np.random.default_rng(1).standard_normal((20000, 2))
    log_g = np.sum(-0.5 * ((wide - centre) / spread) ** 2 - np.log(spread * np.sqrt(2 * np.pi)), -1)
    log_q = posterior.log_prob(wide)
    weight = np.exp(log_q - log_g)
    assert abs(weight.mean() - 1) < 5 * weight.std() / np.sqrt(len(weight))
    by_weight = np.asarray(weight * log_q)
    error = np.hypot(by_weight.std() / np.sqrt(len(wide)), np.std(entropy) / np.sqrt(len(draws)))
    assert abs(by_weight.mean() - np.mean(entropy)) < 5 * error


def test_batched_data_and_score(fits):
    posterior = fits["auto"][0][0]
    x = simulate(jax.random.key(3), 5)[1]
    assert posterior.sample(jax.random.key(0), 7, x).shape == (7, 5, 2)
    theta = jnp.asarray([0.3, 0.1])
    values = posterior.log_prob(theta, x)
    np.testing.assert_allclose(values[2], posterior.log_prob(theta, x[2]), rtol=1e-5)
    step = 1e-2
    for i in range(2):
        move = step * jnp.eye(2)[i]
        difference = (posterior.log_prob(theta + move, x[0]) - posterior.log_prob(theta - move, x[0])) / (2 * step)
        np.testing.assert_allclose(posterior.score(theta, x[0])[i], difference, rtol=2e-2, atol=2e-2)


def bounded_prior():
    return Prior(
        {"a": dist.TruncatedNormal(0.3, 0.2, low=0.0), "w": dist.TruncatedNormal(-1.0, 0.9, low=-2.0, high=-0.3)}
    )


def test_target_score_is_the_derivative_of_the_exact_log_posterior(x64):
    """In unconstrained space, with no latents: the marginal score is the joint score."""
    prior = bounded_prior()
    theta = prior.sample(jax.random.key(0), (5,))
    x = jnp.asarray([0.2, 0.5])

    def log_likelihood(theta):
        return jnp.sum(dist.Normal(jnp.stack([theta[0] * theta[1], theta[0]]), 0.3).log_prob(x))

    target = posterior_score(prior, theta, jax.vmap(jax.grad(log_likelihood))(theta))

    @jax.jit
    @jax.vmap
    def log_posterior(u):
        theta = prior.from_unconstrained(u)
        return log_likelihood(theta) + prior.log_prob(theta) + prior.log_det_jacobian(u)

    u, step = prior.to_unconstrained(theta), 1e-5
    for i in range(2):
        move = step * jnp.eye(2)[i]
        difference = (log_posterior(u + move[None]) - log_posterior(u - move[None])) / (2 * step)
        np.testing.assert_allclose(target[:, i], difference, rtol=1e-7, atol=1e-8)


def test_standardised_coordinates_of_a_linear_gaussian_are_standard_normal(x64):
    theta, x, score = simulate(jax.random.key(0), 4000)
    standardiser = fit_standardiser(theta, x)
    c = standardiser.condition(x)
    np.testing.assert_allclose(np.cov(c.T, ddof=0), np.eye(2), atol=1e-8)
    v = standardiser.to_standard(theta, c)
    np.testing.assert_allclose(standardiser.from_standard(v, c), theta, atol=1e-10)
    np.testing.assert_allclose(np.cov(v.T), np.eye(2), atol=1e-2)
    jacobian = jax.jacobian(lambda u: standardiser.to_standard(u, c[0]))(theta[0])
    np.testing.assert_allclose(standardiser.log_det, jnp.linalg.slogdet(jacobian)[1])
    # The mean score there, given (v, c), is the standard normal's: −v.
    target = standardiser.score_to_standard(posterior_score(normal_prior(), theta, score))
    slope = np.linalg.lstsq(np.asarray(v), np.asarray(target), rcond=None)[0]
    error = np.std(np.asarray(target + v)) / np.sqrt(len(v))
    np.testing.assert_allclose(slope, -np.eye(2), atol=5 * error)


def test_regression_with_more_columns_than_rows_stays_finite():
    rng = np.random.default_rng(0)
    theta = rng.standard_normal((30, 2))
    x = np.concatenate([theta[:, :1] + 0.1 * rng.standard_normal((30, 1)), rng.standard_normal((30, 60))], 1)
    x[:, 5] = 3.0
    standardiser = fit_standardiser(theta, x)
    v = standardiser.to_standard(jnp.asarray(theta), standardiser.condition(jnp.asarray(x)))
    assert np.all(np.isfinite(v)) and np.abs(v).max() < 10


def test_measured_noise_weighs_each_direction_by_its_own_precision(x64):
    """At fixed density the best noise matrix is the inverse root of the residuals' covariance."""
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.standard_normal((5000, 2)))
    root = np.array([[3.0, 0.0], [1.0, 0.4]])
    score = -v + rng.standard_normal((5000, 2)) @ root.T
    model = ScoredDensity(None, first_noise(score + v))
    white, log_det = model.whiten_noise(score + v)
    np.testing.assert_allclose(np.cov(white.T), np.eye(2), atol=0.1)
    np.testing.assert_allclose(log_det, -np.log(3.0 * 0.4), atol=0.05)


def test_the_level_of_the_noise_counts_as_far_as_scores_are_noise(x64):
    """A score that is exact up to what the density has not learned yet has no noise whose level could vary."""
    rng = np.random.default_rng(0)
    score, use = jnp.asarray(10 * rng.standard_normal((4000, 2))), jnp.asarray(rng.integers(0, 2, 4000).astype(float))
    batch = {"score": jnp.where(use[:, None] > 0, score, 1e6), "use": use}
    noise = jnp.asarray(rng.standard_normal((4000, 2)))
    assert abs(noise_share(batch, noise) - 0.01) < 0.001
    assert noise_share(batch, score) == 1 == noise_share(batch, 3 * score)
    assert noise_share({"score": 0 * score, "use": use}, noise) == 1
    np.testing.assert_array_equal(jax.grad(lambda r: noise_share(batch, r))(noise), 0)


def test_a_score_of_pure_noise_does_not_hurt():
    theta, x, _ = simulate(jax.random.key(0), 100)
    noise = 1e4 * jax.random.normal(jax.random.key(9), theta.shape)
    options = {"members": 1, "max_epochs": 200}
    with_noise = npe("auto").append(theta, x, noise).fit(jax.random.key(50), **options)
    without = npe(0.0).append(theta, x, noise).fit(jax.random.key(50), **options)
    assert divergence(with_noise) < divergence(without) + 0.1


def test_support_is_respected():
    prior = bounded_prior()
    theta = prior.sample(jax.random.key(0), (60,))
    x = theta + 0.1 * jax.random.normal(jax.random.key(1), theta.shape)
    posterior = npe(0.0, prior).append(theta, x).fit(jax.random.key(2), members=1, max_epochs=20)
    draws = posterior.sample(jax.random.key(3), 500, x[0])
    prior.check(draws)
    outside = jnp.asarray([[-0.1, -1.0], [0.3, 0.0], [0.3, -2.5], [jnp.nan, -1.0]])
    assert np.all(posterior.log_prob(outside, x[0]) == -np.inf)
    assert np.all(posterior.score(outside, x[0]) == 0)
    near_edge = jnp.asarray([[1e-6, -1.999999], [3.0, -0.300001]])
    assert np.all(np.isfinite(posterior.log_prob(near_edge, x[0])))
    assert np.all(np.isfinite(posterior.score(near_edge, x[0])))


def rows(n=20):
    theta, x, score = (np.array(a) for a in simulate(jax.random.key(0), n))
    return theta, x, score


def changed(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_bad_rows_are_named():
    theta, x, score = rows()
    cases = [
        ((theta[:, :1], x), r"theta with shape \(n, 2\) for \['a', 'b'\]; got \(20, 1\)"),
        ((theta, x[:5]), r"x with shape \(20, d\).*got \(5, 2\)"),
        ((theta, x, score[:, :1]), r"score with shape \(20, 2\), as theta; got \(20, 1\)"),
        (
            (changed(theta, (3, 1), np.nan), x),
            r"finite theta; got 1 non-finite of 40 values, in 1 of 20 rows \(b: 1\), first at \(3, 1\)",
        ),
        (
            (theta, changed(x, 4, np.inf)),
            r"finite x; got 2 non-finite of 40 values, in 1 of 20 rows, first at \(4, 0\). on_invalid",
        ),
        ((theta, x, changed(score, 0, np.nan)), r"finite score; got 2 non-finite"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            npe().append(*arguments)
    with pytest.raises(ValueError, match="a inside the prior's support.*got -0.5"):
        npe(prior=bounded_prior()).append(np.array([[-0.5, -1.0]]), x[:1])


def test_rows_that_are_not_finite_can_be_left_out():
    theta, x, score = rows()
    spoiled = (theta, changed(x, 4, np.inf), changed(score, (7, 1), np.nan))
    with pytest.warns(UserWarning, match=r"Left out 2 of 20 rows that are not finite \(x in 1, score in 1\)"):
        estimator = npe().append(*spoiled, on_invalid="drop")
    assert len(estimator) == 18
    with pytest.raises(ValueError, match=r"a row that is finite; none of 20 is \(score in 20\)"):
        npe().append(theta, x, np.full_like(score, np.nan), on_invalid="drop")
    with pytest.raises(ValueError, match="'droop'"):
        npe().append(*rows(), on_invalid="droop")


@pytest.mark.parametrize("seed", range(3))
def test_scores_in_another_order_or_with_the_prior_are_seen(seed):
    sim = linear_gaussian(dim=3, n_latents=3, n_data=6, scale=0.3)
    draws = sim.draw(jax.random.key(seed), 400, latents="whitened")
    with_prior = draws.score - draws.theta / 0.3**2
    swapped = draws.score[:, np.array([1, 0, 2])]
    seen = {}
    cases = dict(right=draws.score, prior=with_prior, order=swapped, sign=-draws.score, scale=12 * draws.score)
    for name, score in cases.items():
        seen[name] = score_warnings(sim.names, draws.theta, draws.x, score, -draws.theta / 0.3**2)
    assert seen["right"] == []
    assert any("WITHOUT the prior's" in message for message in seen["prior"])
    assert any("opposite sign" in message for message in seen["sign"])
    assert any("times what the data's dependence" in message for message in seen["scale"])
    assert seen["order"] == [
        "The scores look as if they were in the order ['theta_2', 'theta_1', 'theta_3'], not "
        "['theta_1', 'theta_2', 'theta_3']."
    ]


def test_a_suspicious_score_is_told_when_fitting():
    sim = linear_gaussian(dim=3, n_latents=3, n_data=6)
    draws = sim.draw(jax.random.key(0), 200, latents="whitened")
    swapped = draws.score[:, np.array([1, 0, 2])]
    with pytest.warns(UserWarning, match="look as if they were in the order"):
        NPE(sim, gaussian).append(draws.theta, draws.x, swapped).fit(jax.random.key(1), members=1, max_epochs=1)


@pytest.mark.parametrize("n", [20, 400])
def test_a_prior_left_in_is_seen_between_bounds_too(n):
    """There the change of variables has a gradient of its own, which is in no score."""
    prior = Prior({"a": Within(dist.Normal(0.0, 0.5), -1.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    theta = prior.sample(jax.random.key(0), (n,))
    x = theta + 3.0 * jax.random.normal(jax.random.key(1), (n, 2))
    score = (x - theta) / 9.0
    assert warnings_of_scores(prior, theta, x, score) == []
    found = warnings_of_scores(prior, theta, x, score + jax.vmap(jax.grad(prior.log_prob))(theta))
    assert len([message for message in found if "WITHOUT" in message]) == 2


def test_rows_left_out_are_told_where_they_are():
    theta, x, _ = simulate(jax.random.key(0), 300)
    theta, x = np.asarray(theta), np.asarray(x)
    bad = {
        "corner": theta[:, 0] > 1,
        "both ends": np.abs(theta[:, 1]) > 1.5,
        "anywhere": np.random.default_rng(0).random(300) < 0.15,
    }
    said = {}
    for name, rows in bad.items():
        with pytest.warns(UserWarning, match=rf"Left out {rows.sum()} of 300") as caught:
            npe().append(theta, np.where(rows[:, None], np.nan, x), on_invalid="drop")
        said[name] = str(caught[0].message)
    assert "80 % of them have a in [1.0" in said["corner"] and " b in" not in said["corner"]
    assert "(of all rows: in [-1." in said["corner"]
    assert " b in [-" in said["both ends"] and " a in" not in said["both ends"]
    assert "biased wherever such rows are likelier than elsewhere" in said["anywhere"]


def test_few_rows_do_not_suggest_another_order():
    """Of right scores with heavy-tailed noise: from twenty rows of forty numbers one fit in five would."""
    rng, names = np.random.default_rng(0), [f"p{i}" for i in range(6)]
    for n in (20, 100):
        for _ in range(40):
            theta, z = rng.normal(size=(n, 6)), rng.normal(size=(n, 6))
            x = np.concatenate([theta + z, rng.normal(size=(n, 34))], 1)
            score = z + 3 * rng.standard_t(2, size=(n, 6))
            assert score_warnings(names, theta, x, score, -theta) == []


def test_appended_rows_must_agree():
    theta, x, score = rows()
    with pytest.raises(ValueError, match="rows with score, as appended before"):
        npe().append(theta, x, score).append(theta, x)
    with pytest.raises(ValueError, match="rows without score, as appended before"):
        npe().append(theta, x).append(theta, x, score)
    with pytest.raises(ValueError, match="x with 2 columns, as appended before; got 1"):
        npe().append(theta, x).append(theta, x[:, :1])
    estimator = npe()
    assert estimator.append(theta, x, score) is estimator
    assert len(estimator.append(theta, x, score)) == 40


def test_bad_settings_are_named():
    theta, x, _ = rows(9)
    with pytest.raises(ValueError, match="at least 10 simulations to fit; got 9"):
        npe().append(theta, x).fit(jax.random.key(0))
    with pytest.raises(ValueError, match="Unknown density 'smoth'.*Did you mean 'smooth'"):
        NPE(normal_prior(), "smoth")
    for weight in ("audo", -1.0, [1.0, 2.0, 3.0], np.nan):
        with pytest.raises(ValueError, match="score_weight 'auto', a number"):
            NPE(normal_prior(), score_weight=weight)


def test_bad_data_at_sampling_is_named(fits):
    posterior = fits["auto"][0][0]
    with pytest.raises(ValueError, match=r"x with trailing shape \(2,\); got \(3,\)"):
        posterior.sample(jax.random.key(0), 5, np.zeros(3))
    with pytest.raises(ValueError, match="finite x; got 1 non-finite"):
        posterior.sample(jax.random.key(0), 5, np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="Expected data x="):
        posterior.log_prob(np.zeros(2))
    with pytest.raises(ValueError, match="n >= 1 draws; got 0"):
        posterior.sample(jax.random.key(0), 0, np.zeros(2))


def test_fixed_weights():
    theta, x, score = rows(40)
    small = {"layers": 1, "width": 8, "depth": 1}
    fits = []
    for weight in (0.0, 0.1, [0.1, 0.0]):
        estimator = NPE(normal_prior(), "coupling", score_weight=weight, density_options=small)
        posterior = estimator.append(theta, x, score).fit(jax.random.key(0), members=1, max_epochs=3)
        fits.append(float(posterior.log_prob(theta[0], x[0])))
    assert len(set(fits)) == 3 and np.all(np.isfinite(fits))


def test_scores_are_refused_for_a_density_that_is_not_smooth():
    theta, x, score = rows(40)
    with pytest.raises(ValueError, match="the score of 'spline' is not continuous"):
        NPE(normal_prior(), "spline").append(theta, x, score)
    for constructor in (spline_flow, functools.partial(spline_flow, layers=1)):
        with pytest.raises(ValueError, match="not continuous"):
            NPE(normal_prior(), constructor).append(theta, x, score)
    NPE(normal_prior(), "spline").append(theta, x)
    NPE(normal_prior(), "spline", score_weight=0).append(theta, x, score)
    forced = NPE(normal_prior(), "spline", density_options={"layers": 1, "width": 8, "depth": 1}, force_scores=True)
    posterior = forced.append(theta, x, score).fit(jax.random.key(0), members=1, max_epochs=2)
    assert np.isfinite(posterior.log_prob(theta, x)).all()


def test_a_few_absurd_scores_do_not_decide():
    """Joint scores can be larger by orders of magnitude in a corner of the prior; such rows keep only their theta."""
    theta, x, score = simulate(jax.random.key(21), 200)
    wild = np.asarray(score).copy()
    wild[:3] = 1e6 * np.sign(wild[:3])
    plain, robust = (
        npe().append(theta, x, s).fit(jax.random.key(22), members=1, max_epochs=100) for s in (score, wild)
    )
    assert plain.config["scores_left_out"] == 0 and robust.config["scores_left_out"] == 3
    at = np.asarray(x[10])
    a, b = (np.asarray(p.sample(jax.random.key(23), 2000, x=at)) for p in (plain, robust))
    assert np.abs(b.mean(0) - a.mean(0)).max() < 0.2 * a.std(0).max()
    np.testing.assert_allclose(b.std(0), a.std(0), rtol=0.2)


def test_data_that_float32_cannot_tell_apart_are_told():
    noise = np.random.default_rng(0).normal(size=(100, 2))
    assert precision_warnings(noise + 1000.0) == [] == precision_warnings(np.ones((100, 2)))
    (found,) = precision_warnings(noise * [1.0, 0.01] + [0.0, 1e6])
    assert "1 of 2 columns" in found and "column 1" in found and "float32" in found


def test_parameters_on_the_edge_of_the_prior_are_taken():
    prior = Prior({"a": dist.Uniform(0.0, 1.0), "b": dist.Uniform(0.0, 1.0)})
    theta = np.random.default_rng(0).uniform(size=(20, 2))
    theta[3], theta[4, 0] = (0.0, 1.0), 1 - 1e-9
    fitted = NPE(prior, gaussian).append(theta, theta, np.ones((20, 2))).fit(jax.random.key(0), members=1, max_epochs=2)
    assert np.isfinite(fitted.sample(jax.random.key(1), 5, theta[0])).all()
