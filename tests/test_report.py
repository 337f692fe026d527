"""The report: one file, everything in it, warnings shown; figures are drawn from the arrays they are given."""

import re

import numpy as np
import pytest

from diffsbi import plotting
from diffsbi._files import write_json
from diffsbi.config import Config
from diffsbi.report import write_report
from diffsbi.runs import start_run

NAMES = ["omega_c", "omega_b", "sigma_8", "h_0", "n_s", "w_0"]
FIDUCIAL = np.array([0.2664, 0.0492, 0.831, 0.6727, 0.9645, -1.0])
WIDTHS = np.array([0.06, 0.006, 0.05, 0.06, 0.06, 0.3])
METHODS = ("power_spectrum", "npe", "npe_score", "full_field")


def finished_run(folder):
    """A run of made-up results, complete enough to report on."""
    rng = np.random.default_rng(0)
    run = start_run(folder, Config().resolved(), ("observation",))

    def observation(stage):
        np.savez(stage / "observation.npz", x=rng.normal(0, 0.02, (5, 64, 64)).astype("float32"))
        pairs = [(i, j) for i in range(5) for j in range(i, 5)]
        theory = np.array([1e-8 * (i + 1) * (j + 1) * np.geomspace(1, 0.02, 9) + 2e-9 * (i == j) for i, j in pairs])
        measured = theory * rng.normal(1, 0.1, theory.shape)
        np.savez(stage / "spectra.npz", ell=np.geomspace(80, 2000, 9), measured=measured, theory=theory,
                 scatter=0.1 * theory, noise=np.full(5, 2e-9), pairs=pairs)  # fmt: skip
        truth = dict(zip(NAMES, FIDUCIAL.tolist(), strict=True))
        return {"file": None, "truth": truth, "simulations": 1, "warnings": ["bin 0: <strange> units"]}

    def posterior(width):
        def work(stage):
            np.savez(stage / "samples.npz", theta=FIDUCIAL + width * WIDTHS * rng.normal(size=(4, 500, 6)))
            curve = np.exp(-np.arange(40) / 9) + 0.01 * rng.normal(size=40)
            history = {"train": curve.tolist(), "validation": (curve + 0.1).tolist(), "best_epoch": 35}
            write_json(stage / "history.json", [history])
            chains = {"rhat": dict.fromkeys(NAMES, 1.123), "ess": dict.fromkeys(NAMES, 321.0), "gradients": 98765}
            return {"simulations": 0, "stop_reasons": ["no improvement"]} | chains

        return work

    run.once("observation", observation)
    rows = {}
    for i, method in enumerate(METHODS):
        run.once(method, posterior(1 - 0.15 * i))
        shares = {"figure_of_merit": {"omega_c,sigma_8": 2520.4}, "account": run.account(method)}
        moments = {"mean": FIDUCIAL.tolist(), "std": (WIDTHS * (1 - 0.15 * i)).tolist()}
        distance = {
            "c2st": 0.612,
            "c2st_error": 0.013,
            "mean_shift": dict.fromkeys(NAMES, -0.21),
            "width_ratio": dict.fromkeys(NAMES, 1.07),
        }
        rows[method] = shares | moments | ({"distance": distance} if method != "full_field" else {})
    comparison = {"names": NAMES, "methods": rows, "reference": "full_field", "bounds": {"w_0": [-2.0, -0.3]}}
    write_json(run.folder / "comparison.json", comparison)
    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_report(finished_run(tmp_path_factory.mktemp("report") / "run")).read_text()


def test_the_report_stands_alone(page):
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page


@pytest.mark.parametrize(
    "content",
    [
        "64 × 64 pixels",
        "0.612 ± 0.013",
        "2,520",
        "-0.21 σ",
        "1.07 to 1.07",
        "98,765",
        "321",
        "NPE with scores",
        "0.266 ± 0.060",
    ],
)
def test_the_report_says_what_was_found(page, content):
    assert content in page


def test_warnings_are_shown_and_escaped(page):
    assert "bin 0: &lt;strange&gt; units" in page and "<strange>" not in page
    assert '<b class=alarm title="not converged">1.123' in page


def test_a_run_without_comparison_says_what_to_do(tmp_path):
    run = start_run(tmp_path / "run", Config().resolved(), ())
    with pytest.raises(ValueError, match="comparison.json; run `diffsbi compare"):
        write_report(run)


def test_maps_show_the_maps_they_are_given():
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    figure = plotting.maps(x, 5.0, rows=("one", "two"))
    images = [image.get_array() for axis in figure.axes for image in axis.images]
    np.testing.assert_array_equal(images[:6], x.reshape(6, 8, 8))


def test_spectra_put_each_pair_in_its_panel():
    pairs = [(0, 0), (0, 1), (1, 1)]
    measured = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]) * 1e-9
    figure = plotting.spectra([100, 1000], measured, measured, 0.1 * measured, [1e-9, 1e-9], pairs)
    shown = {axis.texts[0].get_text(): axis.lines[1].get_ydata() for axis in figure.axes if axis.texts}
    np.testing.assert_allclose(shown["1 × 2"], [3.0, 4.0])
    assert set(shown) == {"1 × 1", "1 × 2", "2 × 2"}
