"""Cosmology against independent roads: jax_cosmo, SciPy quadrature, the published table, finite differences."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax_cosmo as jc
import numpy as np
import pytest
from jax.scipy.special import erf
from jax.tree_util import register_pytree_node_class
from scipy.integrate import quad, solve_ivp
from scipy.interpolate import RegularGridInterpolator

from diffsbi.cosmology import background, power
from diffsbi.cosmology.lensing import Convergence
from diffsbi.cosmology.priors import FIDUCIAL, lsst_y10_prior
from diffsbi.cosmology.published import OMEGA_M_GRID, SIGMA_8_GRID, W_0_GRID, PublishedShift
from diffsbi.cosmology.quadrature import spline_matrix
from diffsbi.cosmology.redshifts import smail, smail_edges, tabulated

FID = np.array(list(FIDUCIAL.values()))
PIXEL = np.deg2rad(10 / 256)
ELL = np.geomspace(30, 6500, 12)
PAIRS = list(zip(*np.triu_indices(5), strict=True))


@pytest.fixture(scope="module")
def bins():
    return smail(2.0, 0.68, 0.11, 5)


@pytest.fixture
def convergence(x64, bins):
    return Convergence(bins, PIXEL)


@eqx.filter_jit
def evaluate(convergence, theta):
    return convergence(theta)


@eqx.filter_jit
def jacobian(convergence, theta):
    return jax.jacfwd(convergence)(theta)


def spectra(convergence, theta):
    log_limber, _ = evaluate(convergence, jnp.asarray(theta))
    operator = spline_matrix(convergence.log_nu_grid, np.log(ELL + 0.5))
    factor = (ELL - 1) * ELL * (ELL + 1) * (ELL + 2) / (ELL + 0.5) ** 4
    return np.exp(np.asarray(log_limber) @ operator.T) * factor


@register_pytree_node_class
class PhotoZ(jc.redshift.redshift_distribution):
    def pz_fn(self, z):
        parent, low, high, scatter = self.params
        scale = 1 / (2**0.5 * scatter * (1 + z))
        return 0.5 * parent(z) * (erf((high - z) * scale) - erf((low - z) * scale))


def jax_cosmo_spectra(theta):
    """`jax_cosmo.angular_cl` with the wrong limits of its sigma_8 integral undone.

    Its integral runs over log10 of the limits, 0.018 to 20 h/Mpc. The halofit spectrum is not linear in sigma_8², so
    the bias is divided out of sigma_8 itself.
    """
    with jax.numpy_rank_promotion("allow"):
        return np.asarray(_jax_cosmo_spectra(jnp.asarray(theta)))


@jax.jit
def _jax_cosmo_spectra(theta):
    omega_c, omega_b, sigma_8, h, n_s, w_0 = theta
    shape = dict(Omega_c=omega_c, Omega_b=omega_b, h=h, n_s=n_s, w0=w_0, wa=0.0, Omega_k=0.0)
    cosmo = jc.Cosmology(sigma8=sigma_8, **shape)
    log_k = np.linspace(np.log(1e-4), np.log(1e3), 20_001)
    k, x = np.exp(log_k), 8 * np.exp(log_k)
    window = 3 * (np.sin(x) - x * np.cos(x)) / x**3
    transfer = jc.transfer.Eisenstein_Hu(cosmo, jnp.asarray(k))
    true = jnp.trapezoid(k ** (3 + n_s) * transfer**2 * window**2, log_k) / (2 * np.pi**2)
    bias = jc.power.sigmasqr(cosmo, 8.0, jc.transfer.Eisenstein_Hu) / true
    edges = smail_edges(2.0, 0.68, 0.11, 5)
    parent = jc.redshift.smail_nz(2.0, 0.68, 0.11)
    sources = [PhotoZ(parent, float(a), float(b), 0.05) for a, b in itertools.pairwise(edges)]
    cosmo = jc.Cosmology(sigma8=sigma_8 * bias**0.5, **shape)
    return jc.angular_cl.angular_cl(cosmo, jnp.asarray(ELL), [jc.probes.WeakLensing(sources)])


def test_bin_edges_are_the_published_ones():
    np.testing.assert_allclose(
        smail_edges(2.0, 0.68, 0.11, 5)[1:-1], [0.453506, 0.722384, 1.042010, 1.539234], rtol=1e-4
    )


@pytest.mark.parametrize("w_0,omega_c", [(-1.0, 0.2664), (-0.35, 0.1), (-1.9, 0.8)])
def test_growth_solves_its_differential_equation(x64, w_0, omega_c):
    cosmo = background.cosmology(jnp.array([omega_c, 0.0492, 0.8, 0.67, 0.96, w_0]))
    z = np.array([0.1, 0.5, 1.0, 2.0, 5.0])
    om = omega_c + 0.0492

    def e2(a):
        return om * a**-3 + (1 - om) * a ** (-3 * (1 + w_0))

    def rhs(ln_a, y):
        a = np.exp(ln_a)
        slope = 0.5 * (-3 * om * a**-3 - 3 * (1 + w_0) * (1 - om) * a ** (-3 * (1 + w_0))) / e2(a)
        return [y[1], -(2 + slope) * y[1] + 1.5 * om * a**-3 / e2(a) * y[0]]

    # Deep in matter domination D = a; dark energy with w = -0.35 still matters at a = 1e-3, so start far earlier.
    start = np.log(1e-9)
    solution = solve_ivp(rhs, [start, 0], [1e-9, 1e-9], rtol=1e-10, atol=1e-30, dense_output=True)
    expected = solution.sol(-np.log1p(z))[0] / solution.sol(0.0)[0]
    np.testing.assert_allclose(np.exp(background.log_growth(cosmo, jnp.asarray(z))), expected, rtol=2e-6)


def test_distance_matches_adaptive_quadrature(convergence):
    theta = jnp.asarray(FID).at[5].set(-0.6)
    cosmo = background.cosmology(theta)
    chi = convergence.distance @ background.distance_integrand(cosmo, convergence.z)
    for j in (3, 40, 95):
        expected = quad(lambda z: float(background.distance_integrand(cosmo, z)), 0, float(convergence.z[j]))[0]
        assert abs(chi[j] / expected - 1) < 1e-9


def test_linear_power_has_the_wanted_sigma_8(x64):
    linear = power.linear_power(background.cosmology(jnp.asarray(FID)))
    k = np.exp(power.LOG_K)
    window = lambda x: 3 * (np.sin(x) - x * np.cos(x)) / x**3 if x > 1e-3 else 1.0  # noqa: E731
    log_p = lambda u: np.interp(u, power.LOG_K, np.asarray(linear.log_power))  # noqa: E731
    integrand = lambda u: np.exp(log_p(u) + 3 * u) * window(8 * np.exp(u)) ** 2 / (2 * np.pi**2)  # noqa: E731
    sigma2 = sum(quad(integrand, a, b, limit=200)[0] for a, b in itertools.pairwise(np.linspace(np.log(k[0]), 3.0, 12)))
    assert abs(np.sqrt(sigma2) / FIDUCIAL["sigma_8"] - 1) < 1e-3


def test_transfer_function_matches_jax_cosmo(x64):
    k = np.geomspace(1e-4, 50, 200)
    for theta in (FID, FID * [0.5, 1.2, 1, 1.2, 1, 1]):
        omega_c, omega_b, sigma_8, h, n_s, w_0 = map(float, theta)
        cosmo = jc.Cosmology(
            Omega_c=omega_c, Omega_b=omega_b, h=h, n_s=n_s, sigma8=sigma_8, w0=w_0, wa=0.0, Omega_k=0.0
        )
        expected = np.asarray(jc.transfer.Eisenstein_Hu(cosmo, jnp.asarray(k)))
        got = power.log_transfer(background.cosmology(jnp.asarray(theta)), jnp.asarray(k))
        np.testing.assert_allclose(np.exp(got), np.abs(expected), rtol=2e-5)


def test_nonlinear_scale_is_where_the_variance_is_one(x64):
    cosmo = background.cosmology(jnp.asarray(FID))
    linear = power.linear_power(cosmo)
    growth = background.log_growth(cosmo, jnp.array([0.0, 0.5, 2.0, 6.0]))
    scale = power.nonlinear_scale(linear, growth)
    k, d2 = np.exp(power.LOG_K), np.asarray(linear.dimensionless)

    def log_variance(log_r):
        return np.log(np.sum(d2 * np.exp(-np.minimum((k * np.exp(log_r)) ** 2, 700))) * power.LOG_K_STEP)

    for log_r, g, n, c in zip(*map(np.asarray, (scale.log_r, growth, scale.n_eff, scale.curvature)), strict=True):
        assert abs(log_variance(log_r) + 2 * g) < 1e-6
        h = 1e-3
        up, here, down = (log_variance(log_r + s * h) for s in (1, 0, -1))
        assert abs(-3 - (up - down) / (2 * h) - n) < 1e-5
        assert abs(-(up - 2 * here + down) / h**2 - c) < 1e-4


@pytest.mark.parametrize(
    "theta", [FID + [0.1, 0.005, 0.1, -0.06, -0.05, 0.4], pytest.param(FID, marks=pytest.mark.slow)]
)
def test_spectra_match_jax_cosmo(convergence, theta):
    np.testing.assert_allclose(spectra(convergence, theta), jax_cosmo_spectra(theta), rtol=3e-3)


@pytest.mark.slow
def test_spectra_match_jax_cosmo_over_the_prior(convergence):
    # Where baryons dominate (omega_c < 0.03: undamped acoustic zeros in P) neither code resolves its line of sight to
    # better than some per cent; there only the order of magnitude is compared.
    theta = np.asarray(lsst_y10_prior().sample(jax.random.key(0), (20,)))
    worst = {}
    for row in theta:
        error = np.abs(spectra(convergence, row) / jax_cosmo_spectra(row) - 1).max()
        assert error < (0.2 if row[0] < 0.03 else 3e-3), (row, error)
        worst[float(row[0])] = error
    print("omega_c: largest relative difference", worst)


def test_derivatives_match_finite_differences(convergence):
    theta, step = jnp.asarray(FID), 1e-5
    slopes = jacobian(convergence, theta)
    for i in range(6):
        e = jnp.zeros(6).at[i].set(step)
        up, down = evaluate(convergence, theta + e), evaluate(convergence, theta - e)
        for slope, a, b in zip(slopes, up, down, strict=True):
            expected = (a - b) / (2 * step)
            assert np.abs(slope[..., i] - expected).max() < 1e-4 * np.abs(expected).max()


def test_reverse_and_forward_derivatives_agree(convergence):
    forward = jacobian(convergence, jnp.asarray(FID))[0]
    weights = jax.random.normal(jax.random.key(0), forward.shape[:-1])
    reverse = eqx.filter_jit(lambda c, t: jax.grad(lambda t: jnp.sum(weights * c(t)[0]))(t))
    reverse = reverse(convergence, jnp.asarray(FID))
    np.testing.assert_allclose(reverse, jnp.einsum("pn,pna->a", weights, forward), rtol=1e-10)


def test_spectra_are_smooth_in_theta(convergence):
    """The second difference shrinks as the step squared: no interpolation noise (jax_cosmo's jumps by 1e-3)."""

    def bend(step):
        e = np.zeros(6)
        e[2] = step
        up, here, down = (evaluate(convergence, jnp.asarray(FID + s * e))[0] for s in (1, 0, -1))
        return np.abs(up - 2 * here + down).max()

    assert 3.5 < bend(2e-3) / bend(1e-3) < 4.5


def test_shift_matches_the_published_table(convergence, shift_table):
    table = np.load(shift_table)
    grid = (SIGMA_8_GRID, OMEGA_M_GRID, W_0_GRID)
    read = RegularGridInterpolator(grid, np.log(table[..., 4]), method="cubic")
    points = [(FIDUCIAL["sigma_8"], FIDUCIAL["omega_c"] + FIDUCIAL["omega_b"], FIDUCIAL["w_0"])]
    points += [
        (SIGMA_8_GRID[a], OMEGA_M_GRID[b], W_0_GRID[c])
        for a, b, c in [(3, 2, 4), (4, 1, 3), (3, 3, 5), (4, 2, 2), (5, 3, 4)]
    ]
    for sigma_8, omega_m, w_0 in points:
        theta = FID.copy()
        theta[[0, 2, 5]] = omega_m - FIDUCIAL["omega_b"], sigma_8, w_0
        expected = np.exp(read((sigma_8, omega_m, w_0)))
        got = np.asarray(evaluate(convergence, jnp.asarray(theta))[1])
        np.testing.assert_allclose(got, expected, rtol=0.03, err_msg=f"{sigma_8=} {omega_m=} {w_0=}")


def test_published_shift_repeats_the_swapped_reading(x64, shift_table):
    model = PublishedShift.load(shift_table)
    np.testing.assert_allclose(model(jnp.asarray(FID)), [0.00706, 0.02004, 0.03663, 0.06115, 0.11478], rtol=1e-3)


def test_constant_floor_below_omega_c():
    theta = jnp.asarray(FID).at[0].set(0.0)
    convergence = Convergence(smail(2.0, 0.68, 0.11, 2), PIXEL)
    value, slope = evaluate(convergence, theta), jacobian(convergence, theta)
    floor = evaluate(convergence, theta.at[0].set(background.OMEGA_C_FLOOR))
    np.testing.assert_array_equal(value[0], floor[0])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, slope)))


@pytest.mark.parametrize(
    # In float32 the maps and their scores, which contain these, are checked in any case (test_lensing).
    "double, n",
    [(True, 60), *(pytest.param(d, n, marks=pytest.mark.slow) for d, n in ((False, 150), (False, 2500), (True, 2500)))],
)
def test_value_and_slope_are_finite_over_the_prior(bins, double, n):
    """Prior draws, a fifth of them where baryons dominate: there the fitting formulae are far outside their range."""
    with jax.enable_x64(double):
        convergence, prior = Convergence(bins, PIXEL), lsst_y10_prior()
        theta = prior.sample(jax.random.key(3), (n,))
        theta = theta.at[: n // 5, 0].set(jnp.linspace(0.0, 0.05, n // 5))
        with_slope = lambda c: jax.jacfwd(lambda t: 2 * (c(t),), has_aux=True)  # noqa: E731
        sweep = eqx.filter_jit(lambda c, t: jax.lax.map(with_slope(c), t, batch_size=30))
        for leaf in jax.tree.leaves(sweep(convergence, theta)):
            ok = np.asarray(jnp.isfinite(leaf).reshape(len(theta), -1).all(1))
            assert ok.all(), (int((~ok).sum()), theta[int(np.argmin(ok))])


def test_tabulated_bins_reproduce_the_formula(bins):
    z = np.linspace(0.0, 10.0, 2001)
    table = tabulated(z, bins(z))
    np.testing.assert_allclose(table(z), bins(z), atol=2e-4)
    np.testing.assert_allclose(np.trapezoid(table.n, table.z, axis=1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    "z,n,message",
    [
        ([0.0, 0.5, 0.4, 1.0], [[1, 1, 1, 1]], r"increasing z.*z\[1\] = 0.5, z\[2\] = 0.4"),
        ([0.0, 0.5, 0.6, 1.0], [[1, 1, -1, 1]], "n\\(z\\) >= 0"),
        ([0.0, 0.5, 0.6, 11.0], [[1, 1, 1, 1]], "within"),
        ([0.0, 0.5, 0.6, 1.0], [[1, 1, np.nan, 1]], "finite"),
        ([0.0, 0.5, 0.6, 1.0], [[1, 1, 1]], "shape"),
    ],
)
def test_bad_redshift_tables_are_refused(z, n, message):
    with pytest.raises(ValueError, match=message):
        tabulated(z, n)


@pytest.mark.parametrize("options", [{"a": -1.0}, {"z0": 0.0}, {"n_bins": 0}])
def test_bad_smail_parameters_are_refused(options):
    with pytest.raises(ValueError, match="> 0"):
        smail(**({"a": 2.0, "b": 0.68, "z0": 0.11, "n_bins": 5} | options))
