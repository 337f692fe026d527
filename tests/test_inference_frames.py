"""Posteriors in the coordinates of each data set's own normal approximation, against answers known in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import invwishart

import diffsbi as ds
from diffsbi.compression import GaussianFieldMode, LaplaceMode, MarginalScore, ScoreChange, ScoreFrame
from diffsbi.inference import NPE, LocalFrame, load_posterior, pack_frame
from diffsbi.inference.frames import (
    FARTHEST,
    PSEUDO_DRAWS,
    PSEUDO_ROWS,
    REACH,
    UNIT,
    fit_in_frames,
    frame_width,
    log_evidence,
    tilt_to,
    winsorised,
    with_pseudo_rows,
)
from diffsbi.inference.standardise import fit_standardiser
from diffsbi.prior import Prior
from diffsbi.sampling.gaussian_field import approximate_posterior
from diffsbi.simulators import AbstractSimulator
from diffsbi.simulators.linear_gaussian import linear_gaussian

SMALL = {"layers": 1, "width": 16, "depth": 1, "ramps": 4}


class Decades(AbstractSimulator):
    """Posteriors that are nearly normal, in places and of widths that vary by decades over the prior."""

    prior: Prior = Prior({"a": dist.Normal(0.0, 1.5), "b": dist.Normal(0.0, 1.5)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(2), 0.1).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(jnp.sinh(jnp.array([theta[0], theta[0] + theta[1]])) + z, 0.1).to_event(1)


def frames(n, p, seed=0):
    """Random means and roots, packed."""
    rng = np.random.default_rng(seed)
    root = np.tril(rng.standard_normal((n, p, p)), -1) + np.stack([np.diag(d) for d in np.exp(rng.normal(size=(n, p)))])
    mean = rng.standard_normal((n, p))
    return jnp.asarray(mean), jnp.asarray(root), pack_frame(jnp.asarray(mean), jnp.asarray(root))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_frame_is_what_was_packed_and_its_coordinates_are_a_bijection(x64, p):
    mean, root, x = frames(50, p)
    frame = LocalFrame(p)
    assert x.shape == (50, frame_width(p)) and frame_width(p) == p + p * (p + 1) // 2
    for found, expected in zip(frame.unpack(x), (mean, root), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    w = 3 * jax.random.normal(jax.random.key(1), (50, p))
    u = frame.from_local(w, x)
    back, log_det = frame.to_local(u, x)
    np.testing.assert_allclose(back, w, rtol=1e-9, atol=1e-10)
    jacobian = jax.vmap(jax.jacfwd(lambda u, x: frame.to_local(u, x)[0]))(u, x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(np.asarray(jacobian))[1], rtol=1e-9)


def test_near_the_mean_they_are_standard_coordinates_and_far_out_logarithms(x64):
    mean, root, x = frames(1, 2)
    r = jnp.array([[0.01, -0.02]])
    w, _ = LocalFrame(2).to_local(mean + r @ root[0].T, x)
    np.testing.assert_allclose(w, r, rtol=1e-4)
    w, _ = LocalFrame(2).to_local(mean + 1e6 * (r @ root[0].T), x)
    np.testing.assert_allclose(w, REACH * np.sign(r) * np.log(2e6 * np.abs(r) / REACH), rtol=1e-4)


def test_the_score_in_the_frame_is_that_of_the_density_there(x64):
    mean, root, x = frames(20, 3)
    frame = LocalFrame(3)
    density = lambda u: dist.StudentT(5.0, 0.3, 2.0).log_prob(u).sum()  # noqa: E731

    def local(w, x):
        u = frame.from_local(w, x)
        return density(u) - frame.to_local(u, x)[1]

    w = 2 * jax.random.normal(jax.random.key(2), (20, 3))
    u = frame.from_local(w, x)
    found = frame.score_to_local(jax.vmap(jax.grad(density))(u), u, x)
    step = 1e-6
    for a in range(3):
        e = jnp.broadcast_to(step * jnp.eye(3)[a], w.shape)
        slope = (jax.vmap(local)(w + e, x) - jax.vmap(local)(w - e, x)) / (2 * step)
        np.testing.assert_allclose(found[:, a], slope, rtol=1e-5, atol=1e-6)


def shares(w, x):
    """What part of the rows' own mean `fit_in_frames` takes, and whether all else goes with it."""
    plain, fitted = fit_standardiser(winsorised(w), x, FARTHEST), fit_in_frames(w, x)
    share = float(fitted.u_loc[0] / plain.u_loc[0])
    np.testing.assert_allclose(fitted.u_loc, share * plain.u_loc, rtol=1e-4)
    np.testing.assert_allclose(fitted.slope, share * plain.slope, rtol=1e-4, atol=1e-9)
    expected = share * plain.lower @ plain.lower.T + (1 - share) * UNIT * np.eye(w.shape[1])
    np.testing.assert_allclose(fitted.lower @ fitted.lower.T, expected, rtol=1e-4, atol=1e-6)
    return share


def test_frames_are_believed_as_far_as_the_rows_agree_with_them(x64):
    rng = np.random.default_rng(0)
    rows = [(rng.standard_normal((50, 3)), rng.standard_normal((50, 1))) for _ in range(8)]
    right, wrong = (np.median([shares(a * w + b, x) for w, x in rows]) for a, b in ((1.0, 0.0), (0.3, 2.0)))
    least, most = (50 / (50 + rows) for rows in (PSEUDO_ROWS[-1], PSEUDO_ROWS[0]))
    assert least <= right < 0.35 and wrong == pytest.approx(most, rel=1e-3)
    many = rng.standard_normal((20_000, 3)) * [1.0, 1.0, 1.3]
    assert shares(many, rng.standard_normal((20_000, 1))) > 0.95


@pytest.mark.parametrize(("n", "p", "pseudo_rows"), [(7, 1, 4.0), (12, 2, 30.0)])
def test_the_evidence_is_that_of_the_conjugate_prior(n, p, pseudo_rows):
    """By another road: the mean density of the rows over draws of the covariance, the mean integrated out."""
    rng = np.random.default_rng(1)
    w = 0.3 + rng.standard_normal((n, p))
    freedom = pseudo_rows + p + 1
    drawn = invwishart(freedom, pseudo_rows * np.eye(p)).rvs(100_000, random_state=2).reshape(-1, p, p)
    precision, mean = np.linalg.inv(drawn), w.mean(0)
    scatter = (w - mean).T @ (w - mean) + pseudo_rows * n / (pseudo_rows + n) * np.outer(mean, mean)
    log_density = (
        -0.5 * np.einsum("kij,ji->k", precision, scatter) - n / 2 * np.linalg.slogdet(drawn)[1]
        - n * p / 2 * np.log(2) + p / 2 * np.log(pseudo_rows / (pseudo_rows + n))
    )  # fmt: skip
    density = np.exp(log_density - log_density.max())
    error = density.std() / density.mean() / np.sqrt(len(density))
    expected = np.log(density.mean()) + log_density.max()
    assert abs(log_evidence(w, pseudo_rows) - expected) < 5 * error < 0.1


def test_data_far_outside_are_taken_for_the_outermost_ones(x64):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 2))
    fitted = fit_in_frames(rng.standard_normal((200, 2)), x)
    far, farther = fitted.condition(jnp.array([[1e3, 0.0], [1e6, 0.0]]))
    np.testing.assert_allclose(far, farther, rtol=1e-3)
    assert np.abs(far).max() <= FARTHEST
    near = fit_standardiser(rng.standard_normal((200, 2)), x).condition(jnp.asarray(x))
    np.testing.assert_allclose(fitted.condition(jnp.asarray(x)), FARTHEST * np.tanh(near / FARTHEST), rtol=1e-9)


def test_outliers_are_held_and_the_others_left():
    u = np.random.default_rng(0).standard_normal((500, 1))
    u[0] = 1e9
    held = winsorised(u)
    assert 3 < held[0, 0] < 6
    np.testing.assert_array_equal(held[np.abs(u) < 3], u[np.abs(u) < 3])


def exact(sim, x):
    mean, covariance = sim.posterior(x)
    return mean, jnp.linalg.cholesky(covariance)


def test_laplace_mode_is_the_exact_posterior_of_a_linear_simulator(x64):
    sim = linear_gaussian()
    x = sim.draw(jax.random.key(0), 5).x
    found = LaplaceMode(sim, n_starts=2, n_steps=12).many(x)
    mean, root = LocalFrame(sim.prior.dim).unpack(found)
    for row in range(5):
        # The prior is normal in theta, so its unconstrained space is theta.
        for a, b in zip((mean[row], root[row]), exact(sim, x[row]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(LaplaceMode(sim, n_starts=2, n_steps=12)(x[2]), found[2], rtol=1e-7, atol=1e-9)


def test_laplace_mode_rows_do_not_depend_on_how_many_there_are():
    sim = linear_gaussian()
    x = sim.draw(jax.random.key(0), 70, with_score=False).x
    mode = LaplaceMode(sim, n_starts=1, n_steps=4)
    np.testing.assert_allclose(mode.many(x)[64:], mode.many(x[64:]), rtol=2e-4, atol=2e-5)


def test_laplace_mode_covers_the_truth_where_posteriors_move_and_change_their_width():
    sim = Decades()
    draws = sim.draw(jax.random.key(3), 400, with_score=False)
    numbers = LaplaceMode(sim, n_starts=4, n_steps=20).many(draws.x)
    mean, root = LocalFrame(2).unpack(numbers)
    r = jnp.linalg.solve(root, (draws.theta - mean)[..., None])[..., 0]
    # Standard errors: .05 of the mean, .035 of the deviation.
    assert np.abs(np.asarray(r).mean(0)).max() < 0.2 and np.abs(np.asarray(r).std(0) - 1).max() < 0.15
    assert np.ptp(np.log(np.asarray(root)[:, 0, 0])) > 1.5, "the test is meant to have widths that vary"


class Wide(AbstractSimulator):
    """Latents and a parameter that are both far wider than one, and of which the data know the sum."""

    prior: Prior = Prior({"a": dist.Normal(0.0, 100.0)})

    def latents(self, theta):
        return dist.Normal(jnp.zeros(1), 100.0).to_event(1)

    def likelihood(self, theta, z):
        return dist.Normal(theta + z, 1.0).to_event(1)


def test_laplace_mode_is_exact_whatever_the_units_of_the_latents(x64):
    mean, root = LocalFrame(1).unpack(LaplaceMode(Wide(), n_starts=3, n_steps=20)(jnp.array([50.0])))
    np.testing.assert_allclose(mean, [50 * 1e4 / (2e4 + 1)], rtol=1e-6)
    np.testing.assert_allclose(root, [[np.sqrt(1e4 - 1e8 / (2e4 + 1))]], rtol=1e-6)


def test_a_summary_of_rounds_can_be_a_frame():
    sim = linear_gaussian()
    x = sim.draw(jax.random.key(0), 1, sim.fiducial, with_score=False).x[0]
    npe = NPE(sim, density_options=SMALL, framed=True)
    mode = LaplaceMode(sim, n_starts=1, n_steps=4)
    found = ds.rounds(
        sim, x, npe, jax.random.key(1), n_rounds=1, n_per_round=40, summary=mode, fit=dict(members=1, max_epochs=5)
    )
    draws = np.asarray(found.posterior.sample(jax.random.key(2), 2000, mode(x)))
    mean, root = exact(sim, x)
    assert np.all(np.abs(draws.mean(0) - mean) < 0.6 * np.sqrt(np.diag(root @ root.T)))


def test_a_store_on_disk_is_taken_and_too_few_columns_are_not(tmp_path):
    theta = np.random.default_rng(0).standard_normal((40, 1)).astype(np.float32)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(40, 2))
    npe = NPE(Wide(), framed=True)
    npe.append(theta, x)
    with pytest.raises(ValueError, match="got 1 columns"):
        npe.append(theta, np.memmap(tmp_path / "y", np.float32, "w+", shape=(40, 1)))


def test_data_that_are_no_frames_are_warned_about():
    theta = np.random.default_rng(0).uniform(100, 300, (40, 1))
    npe = NPE(Wide(), density_options=SMALL, framed=True).append(theta, np.zeros((40, 2)))
    with pytest.warns(UserWarning, match="does x begin with pack_frame"):
        npe.fit(jax.random.key(0), members=1, max_epochs=1)


def test_the_gaussian_field_mode_covers_the_truth_of_gaussian_maps():
    sim = ds.lsst_y10(n_pix=16, side_deg=1.25, field="gaussian")
    draws = sim.draw(jax.random.key(0), 60, with_score=False)
    mode = GaussianFieldMode(sim)
    numbers = mode.many(draws.x)
    assert numbers.shape == (60, frame_width(6)) and np.all(np.isfinite(numbers))
    u = sim.prior.to_unconstrained(draws.theta)
    mean, root = LocalFrame(6).unpack(numbers)
    r = np.asarray(jnp.linalg.solve(root, (u - mean)[..., None])[..., 0])
    # Standard errors of one parameter: .13 of the mean, .09 of the deviation.
    assert np.abs(r.mean(0)).max() < 0.45 and np.abs(r.std(0) - 1).max() < 0.35
    np.testing.assert_allclose(mode(draws.x[3]), numbers[3], rtol=1e-3, atol=1e-3)
    x = np.asarray(draws.x[0])
    np.testing.assert_allclose(numbers[0, :6], approximate_posterior(sim, x)[0], rtol=1e-3, atol=1e-3)


def wide_case(n, seed):
    sim = Decades()
    draws = sim.draw(jax.random.key(seed), n)
    return sim, draws, LaplaceMode(sim, n_starts=4, n_steps=20).many(draws.x)


def mean_log_prob(posterior, theta, x):
    return float(np.mean(posterior.log_prob(theta, x)))


@pytest.fixture(scope="module")
def wide():
    """Held-out log q of plain and framed NPE, with and without scores, from 60 simulations of a wide prior."""
    sim, test, test_numbers = wide_case(300, 100)
    out, framed = {}, None
    for seed in range(3):
        _, draws, numbers = wide_case(60, seed)
        for name in ("plain", "framed", "framed scores"):
            score = draws.score if "scores" in name else None
            npe = NPE(sim, density_options=SMALL, framed=name != "plain")
            npe.append(draws.theta, draws.x if name == "plain" else numbers, score)
            posterior = npe.fit(jax.random.key(seed), members=1, max_epochs=60)
            x = test.x if name == "plain" else test_numbers
            out.setdefault(name, []).append(mean_log_prob(posterior, test.theta, x))
            framed = posterior if name == "framed" else framed
    return sim, {name: np.array(values) for name, values in out.items()}, framed, test_numbers


def test_posteriors_over_a_wide_prior_are_learned_in_their_frames_from_few_simulations(wide):
    _, found, *_ = wide
    for name in ("framed", "framed scores"):
        gain = found[name] - found["plain"]
        assert gain.min() > 0.3, found
    assert (found["framed scores"] - found["framed"]).mean() > -0.05, found


def test_a_framed_density_is_normalised_and_its_draws_follow_it(wide):
    _, _, posterior, numbers = wide
    x = numbers[0]
    mean, root = LocalFrame(2).unpack(x)
    draws = np.asarray(posterior.sample(jax.random.key(0), 20_000, x))
    t = dist.StudentT(4.0)
    r = t.sample(jax.random.key(1), (20_000, 2))
    theta = jnp.broadcast_to(mean, r.shape) + 1.5 * r @ root.T
    log_q = posterior.log_prob(theta, jnp.broadcast_to(x, (20_000, len(x))))
    log_weight = np.asarray(log_q - t.log_prob(r).sum(-1) + jnp.log(jnp.linalg.det(1.5 * root)))
    weight = np.exp(log_weight)
    error = weight.std() / np.sqrt(len(weight))
    assert abs(weight.mean() - 1) < 4 * error < 0.1
    by_weight = np.average(np.asarray(theta), axis=0, weights=weight)
    assert np.all(np.abs(by_weight - draws.mean(0)) < 0.06 * np.sqrt(np.diag(root @ root.T)))


def test_a_framed_posterior_is_the_same_after_saving(wide, tmp_path):
    _, _, posterior, numbers = wide
    posterior.save(tmp_path / "framed")
    again = load_posterior(tmp_path / "framed")
    draws = posterior.sample(jax.random.key(0), 10, numbers[0])
    np.testing.assert_array_equal(again.sample(jax.random.key(0), 10, numbers[0]), draws)
    np.testing.assert_array_equal(again.log_prob(draws, numbers[0]), posterior.log_prob(draws, numbers[0]))


def test_bad_input_is_refused_by_name():
    sim = linear_gaussian()
    with pytest.raises(ValueError, match=r"begins with a normal approximation .*got 1 columns"):
        NPE(sim, framed=True).append(sim.prior.sample(jax.random.key(0), (20,)), np.zeros((20, 1)))
    with pytest.raises(ValueError, match="framed=True; got 'atomic'"):
        NPE(sim, framed=True, correction="atomic")
    with pytest.raises(ValueError, match=r"root with shape \(3, 2, 2\); got \(3, 2\)"):
        pack_frame(jnp.zeros((3, 2)), jnp.ones((3, 2)))
    for wrong in (np.array([[1.0, 0.9], [0.9, 1.0]]), np.diag([1.0, -1.0])):
        with pytest.raises(ValueError, match="lower triangular roots with a positive diagonal; 1 are not"):
            pack_frame(jnp.zeros((1, 2)), jnp.asarray(wrong)[None])
    with pytest.raises(ValueError, match="n_starts >= 1 and n_steps >= 1; got 0 and 3"):
        LaplaceMode(sim, n_starts=0, n_steps=3)
    with pytest.raises(ValueError, match=r"trailing shape \(6,\); got \(2, 99\)"):
        LaplaceMode(sim, n_starts=1, n_steps=1).many(np.zeros((2, 99)))
    with pytest.raises(TypeError, match="Expected a LensingMaps; got LinearGaussian"):
        GaussianFieldMode(sim)
    with pytest.raises(ValueError, match=r"trailing shape \(5, 16, 16\); got \(2, 5, 8, 8\)"):
        GaussianFieldMode(ds.lsst_y10(n_pix=16, side_deg=1.0)).many(np.zeros((2, 5, 8, 8)))
    with pytest.raises(ValueError, match="latents for LaplaceMode; got"):
        LaplaceMode(ds.lsst_y10(n_pix=16, side_deg=1.0))


def standard_rows(n=40, p=2, d=3):
    rng = np.random.default_rng(4)
    w, x = rng.standard_normal((n, p)), rng.standard_normal((n, d))
    fitted = fit_in_frames(w, x)
    c = fitted.condition(jnp.asarray(x))
    return fitted, {"v": fitted.to_standard(jnp.asarray(w), c), "c": c, "score": -jnp.asarray(w), "use": jnp.ones(n)}


def test_pseudo_rows_say_that_the_frames_are_right(x64):
    """w of a standard normal, by weights that make as many simulations of them as asked for, no score counted."""
    standardiser, rows = standard_rows()
    more = with_pseudo_rows(jax.random.key(0), rows, standardiser, 120.0)
    assert {len(a) for a in more.values()} == {40 + PSEUDO_DRAWS}
    weight = np.asarray(more["weight"])
    assert weight.mean() == pytest.approx(1) and weight[40:].sum() / weight[:40].sum() == pytest.approx(120 / 40)
    np.testing.assert_array_equal(more["use"][40:], 0)
    np.testing.assert_allclose(more["use"][:40], weight[:40])
    np.testing.assert_array_equal(more["v"][:40], rows["v"])
    w = np.asarray(standardiser.from_standard(more["v"], more["c"]))[40:]
    # Standard errors: .06 of a mean, .04 of a deviation.
    assert np.abs(w.mean(0)).max() < 0.25 and np.abs(w.std(0) - 1).max() < 0.2
    for column, known in zip(np.asarray(more["c"])[40:].T, np.asarray(rows["c"]).T, strict=True):
        assert set(column) <= set(known) and len(set(column)) > 20


def test_the_width_of_a_standard_normal_in_logarithms():
    r = np.random.default_rng(0).standard_normal(200_000)
    assert UNIT == pytest.approx(np.mean((REACH * np.arcsinh(r / REACH)) ** 2), abs=0.015)


def test_weights_of_the_rows_themselves_stay(x64):
    standardiser, rows = standard_rows()
    own = 0.1 * jnp.linspace(0.5, 1.5, 40)
    more = with_pseudo_rows(jax.random.key(0), rows | {"weight": own}, standardiser, 120.0)
    weight = np.asarray(more["weight"])
    np.testing.assert_allclose(weight[:40] / weight[0], own / own[0])
    assert weight[40:].sum() / weight[:40].sum() == pytest.approx(120 / 40), "only relative to each other"
    assert weight.mean() == pytest.approx(1)


def test_the_normal_under_another_prior_is_that_of_bayes(x64):
    """A normal likelihood of precision A and information b under two normal priors: exact posteriors of both."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((5, 3, 3))
    a = half @ np.swapaxes(half, 1, 2)
    b = rng.standard_normal((5, 3))
    (before, m0), (after, m1) = ((np.diag(rng.uniform(0.5, 2, 3)), rng.standard_normal(3)) for _ in range(2))
    covariances = [np.linalg.inv(a + prior) for prior in (before, after)]
    means = [
        np.einsum("nij,nj->ni", c, b + p @ m) for c, p, m in zip(covariances, (before, after), (m0, m1), strict=True)
    ]
    x = pack_frame(jnp.asarray(means[0]), jnp.linalg.cholesky(jnp.asarray(covariances[0])))
    tilt = jnp.asarray(after - before), jnp.asarray(after @ m1 - before @ m0)
    mean, root = LocalFrame(3, tilt=tilt).normal(x)
    np.testing.assert_allclose(mean, means[1], rtol=1e-9)
    np.testing.assert_allclose(root @ np.swapaxes(root, 1, 2), covariances[1], rtol=1e-9, atol=1e-12)
    assert np.all(np.triu(root, 1) == 0)
    u, frame = jnp.asarray(rng.standard_normal((5, 3))), LocalFrame(3, tilt=tilt)
    w, log_det = frame.to_local(u, x)
    np.testing.assert_allclose(frame.from_local(w, x), u, rtol=1e-9)
    slope = jax.vmap(jax.jacfwd(lambda u, x: frame.to_local(u, x)[0]))(u, x)
    np.testing.assert_allclose(log_det, np.linalg.slogdet(slope)[1], rtol=1e-9)
    # A proposal wider than a prior that decides everything has no such normal, or one of any width: twice that of x.
    for share in (0.76, 0.999, 1.0, 10.0):
        wide = LocalFrame(3, tilt=(-share * jnp.linalg.inv(jnp.asarray(covariances[0][0])), jnp.zeros(3)))
        root = wide.normal(x[:1])[1][0]
        np.testing.assert_allclose(root @ root.T, 4 * covariances[0][0], rtol=1e-9)


def test_the_tilt_is_from_the_prior_to_the_mixture_of_proposals(x64):
    prior = Prior({"a": dist.Normal(0.5, 2.0), "b": dist.Normal(-1.0, 0.7)})
    parts = [
        ds.gaussian_proposal(prior, prior.sample(jax.random.key(k), (n,)), w) for k, n, w in ((0, 9, 0.4), (1, 7, 1))
    ]
    drawn = [part.sample(jax.random.key(k), (n,)) for part, k, n in zip(parts, (2, 3), (30_000, 10_000), strict=True)]
    exact = tilt_to(prior, list(zip(parts, drawn, strict=True)))
    u = np.concatenate(drawn)
    precision, before = np.linalg.inv(np.cov(u.T)), np.diag(np.array([2.0, 0.7]) ** -2)
    np.testing.assert_allclose(exact[0], precision - before, rtol=0.05, atol=0.1)
    np.testing.assert_allclose(exact[1], precision @ u.mean(0) - before @ [0.5, -1.0], rtol=0.05, atol=0.2)
    # With one that is not known to be normal, by the parameters themselves; the prior by its own moments.
    by_rows = tilt_to(prior, [(parts[0], drawn[0]), (object(), drawn[1])])
    np.testing.assert_allclose(by_rows[0], exact[0], rtol=0.02, atol=0.05)
    own = tilt_to(prior, [(None, drawn[0][:5])])
    np.testing.assert_allclose(own[0], 0, atol=1e-6)
    np.testing.assert_allclose(own[1], 0, atol=1e-6)


@pytest.fixture(scope="module")
def proposed():
    """Exact frames of the linear simulator, parameters from about one posterior, and that posterior."""
    sim = linear_gaussian()
    observed = sim.draw(jax.random.key(9), 1, sim.fiducial, with_score=False).x[0]
    exact = tuple(np.asarray(a) for a in sim.posterior(observed))
    proposal = ds.gaussian_proposal(sim, np.random.default_rng(0).multivariate_normal(*exact, 4000), 1.5)
    draws = sim.draw(jax.random.key(0), 1000, proposal.sample(jax.random.key(1), (1000,)))
    mode = LaplaceMode(sim, n_starts=1, n_steps=4)
    return sim, proposal, draws, mode.many(draws.x), mode(observed), exact


@pytest.mark.parametrize("correction", ["reweight", "importance"])
def test_frames_are_of_the_posterior_that_is_learned(proposed, correction):
    """Under the proposal, where that is reweighted later: then nothing about r is told by the data.

    Else their mean lies towards the proposal's centre, the more so the less this is wider than the posterior.
    """
    sim, proposal, draws, numbers, *_ = proposed
    npe = NPE(sim, framed=True, correction=correction).append(draws.theta, numbers, proposal=proposal)
    w, _ = npe._frame().to_local(draws.theta, numbers)
    r, m = REACH * np.sinh(np.asarray(w) / REACH), np.asarray(numbers)[:, :2]
    np.testing.assert_allclose(np.cov(r.T), np.eye(2), atol=0.2)
    design = np.c_[np.ones(len(m)), m]
    residual = r - design @ np.linalg.lstsq(design, r)[0]
    told = 1 - residual.var(0) / r.var(0)  # of noise 2 in 1000; of what the data decide, 1 / (1.5**2 + 1)
    if correction == "reweight":
        assert np.all(told < 0.02)
        np.testing.assert_allclose(r.mean(0), 0, atol=4 / np.sqrt(1000))
    else:
        assert told.max() > 0.2


def test_a_framed_posterior_that_is_reweighted_is_the_exact_one(proposed, tmp_path):
    sim, proposal, draws, numbers, observed, (mean, covariance) = proposed
    npe = NPE(sim, density_options=SMALL, framed=True)
    npe.append(draws.theta[:25], numbers[:25], draws.score[:25], proposal=proposal)
    posterior = npe.fit(jax.random.key(2), members=1)
    theta = np.asarray(posterior.sample(jax.random.key(3), 2000, observed))
    width = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((theta.mean(0) - mean) / width, 0, atol=0.25)
    np.testing.assert_allclose(theta.std(0) / width, 1, atol=0.15)
    assert posterior.config["framed"]["tilted"]
    posterior.save(tmp_path / "tilted")
    again = load_posterior(tmp_path / "tilted")
    np.testing.assert_array_equal(again.log_prob(theta[:5], observed), posterior.log_prob(theta[:5], observed))


def test_a_posterior_moves_with_the_scores_as_the_exact_one_does():
    """Of the linear simulator means are linear in scores, and widths are the same for all data."""
    sim = linear_gaussian()
    x = sim.draw(jax.random.key(0), 6, sim.fiducial, with_score=False).x
    mean, covariance = sim.posterior(x[0])
    draws = np.random.default_rng(0).multivariate_normal(mean, covariance, 20_000)
    frame = ScoreFrame(functools.partial(MarginalScore, sim, n_turns=4), sim, sim.fiducial, x[0], draws)
    means, roots = (np.asarray(a) for a in LocalFrame(2).unpack(frame.many(x)))
    exact, width = np.stack([sim.posterior(row)[0] for row in x]), np.sqrt(np.diag(covariance))
    assert np.ptp(exact / width, 0).min() > 0.5  # they do move
    np.testing.assert_allclose(means / width, exact / width, atol=0.05)  # five errors of a mean, and of a covariance
    np.testing.assert_allclose(roots[3] @ roots[3].T, covariance, rtol=0.05, atol=0.05 * covariance.min())
    np.testing.assert_allclose(frame(x[0])[:2], draws.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jax.jit(lambda x: frame(x))(x[2]), frame(x[2]), rtol=1e-5, atol=1e-5
    )  # as `rounds` calls it
    at = functools.partial(ScoreChange, functools.partial(MarginalScore, sim, n_turns=4), sim, step=jnp.ones(2))
    more = ScoreFrame(at, sim, sim.fiducial, x[0], draws)(x[3])
    np.testing.assert_allclose(more[:5], frame(x[3]), rtol=1e-6)
    np.testing.assert_array_equal(more[5:], at(sim.fiducial)(x[3])[2:])
    with pytest.raises(ValueError, match="finite score of the observation"):
        ScoreFrame(functools.partial(MarginalScore, sim), sim, sim.fiducial, x[0] * jnp.nan, draws)
    with pytest.raises(ValueError, match="theta with at least 4 draws"):
        ScoreFrame(functools.partial(MarginalScore, sim), sim, sim.fiducial, x[0], draws[:3])


def test_what_is_learned_from_few_rows_does_not_spoil_frames_that_are_right():
    """Frames that are exact: no fit can be better than they are, and from 25 rows it must not be much worse."""
    sim = linear_gaussian()
    draws, test = (sim.draw(jax.random.key(k), n) for k, n in ((0, 25), (1, 400)))
    numbers, at = (LaplaceMode(sim, n_starts=1, n_steps=4).many(d.x) for d in (draws, test))
    mean, root = LocalFrame(2).unpack(at)
    alone = float(dist.MultivariateNormal(mean, scale_tril=root).log_prob(test.theta).mean())
    for score in (None, draws.score):
        npe = NPE(sim, density_options=SMALL, framed=True).append(draws.theta, numbers, score)
        posterior = npe.fit(jax.random.key(2), members=1)
        # Without what is believed of the frames it loses between .3 and 5 nats.
        assert -0.03 < alone - mean_log_prob(posterior, test.theta, at) < 0.15
