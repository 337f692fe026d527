"""The command line and the stages behind it, on a survey small enough for tests; and every kind of bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from typer.testing import CliRunner

from diffsbi import pipeline, report
from diffsbi._files import digest, load_npz
from diffsbi.bands import pixel_area
from diffsbi.cli import app
from diffsbi.config import load_config
from diffsbi.prior import Prior
from diffsbi.simulators.base import AbstractSimulator, Identity
from diffsbi.store import open_store

SMALL = """
name: toy
survey: {n_pix: 8, side_deg: 5.0, n_bins: 2}
simulations: {n: 60, block_size: 20}
summaries: {n_bands: 2, n_covariance: 100, n_derivative: 10}
flow: {density: mixture, members: 2, max_epochs: 2, n_samples: 200}
power_spectrum: {n_chains: 2, n_warmup: 30, n_draws: 40}
full_field: {n_chains: 2, n_warmup: 20, n_draws: 40}
compare: {pairs: [[a, b]]}
"""


class ToyMaps(AbstractSimulator):
    """Two white maps, e^a z0 and e^a z0 / 2 + e^b z1, with noise: the shape of a survey, quick to compile."""

    prior: Prior
    noise: jnp.ndarray
    n_bins: int = 2
    n_pix: int = 8
    side_deg: float = 5.0
    pairs: tuple = ((0, 0), (0, 1), (1, 1))

    def latents(self, theta):
        return dist.Normal(jnp.zeros((2, 8, 8)), 1.0).to_event(3)

    def likelihood(self, theta, z):
        first = jnp.exp(theta[0]) * z[0]
        maps = jnp.stack([first, 0.5 * first + jnp.exp(theta[1]) * z[1]])
        return dist.Normal(maps, self.noise[:, None, None]).to_event(3)

    def transports(self):
        return {"white": Identity(), "whitened": Identity()}

    def spectra(self, theta, ell):
        a, b = jnp.exp(2 * theta[0]), jnp.exp(2 * theta[1])
        power = jnp.stack([a, 0.5 * a, 0.25 * a + b]) * pixel_area(8, 5.0)
        return jnp.broadcast_to(power[:, None], (3, len(ell)))


@pytest.fixture
def toy(monkeypatch, tmp_path):
    prior = Prior({"a": dist.Normal(0.0, 0.3), "b": dist.Normal(0.0, 0.3)})
    monkeypatch.setattr(pipeline, "lsst_y10", lambda **survey: ToyMaps(prior, jnp.array([0.5, 0.5])))
    config = tmp_path / "toy.yaml"
    config.write_text(SMALL)
    return config


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(result, *parts):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr.replace("\n", " "), result.stderr


def test_the_whole_path_and_what_it_leaves(toy, tmp_path, monkeypatch):
    out = tmp_path / "run"
    result = call("demo", "--config", toy, "--out", out, "--quiet")
    assert result.exit_code == 0, (result.output, result.exception)
    assert f"Report: {out / 'report.html'}" in result.output and (out / "report.html").is_file()
    comparison = json.loads((out / "comparison.json").read_text())
    assert set(comparison["methods"]) == {"npe", "npe_score", "power_spectrum", "full_field"}
    assert comparison["reference"] == "full_field"
    assert {"mean_shift", "width_ratio"} <= set(comparison["methods"]["npe"]["distance"])
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    assert {name: stage["account"].get("simulations", 0) for name, stage in stages.items()} == {
        "observation": 1, "compression": 110, "simulations": 60, "npe": 0, "npe_score": 0, "power_spectrum": 0,
        "full_field": 0,
    }  # fmt: skip

    monkeypatch.setattr(report, "_image", lambda figure, caption: caption)  # drawn once above
    before = {path: path.stat().st_mtime_ns for path in out.rglob("samples.npz")}
    again = call("demo", "--config", toy, "--out", out, "--quiet")
    assert again.exit_code == 0 and again.output.count("(done before)") == 7
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("samples.npz")}
    for command in ("compare", "report"):
        assert call(command, "--out", out).exit_code == 0

    refused(call("demo", "--config", toy, "--out", out, "--seed", 5), "seed: 0 there, 5 here", "--out")
    samples = out / "npe" / "samples.npz"
    samples.write_bytes(samples.read_bytes()[:100])
    refused(call("compare", "--out", out), "npe/samples.npz is truncated or altered")


def test_statistics_in_the_store_belong_to_their_theta(toy, tmp_path):
    assert call("simulate", "--config", toy, "--out", tmp_path / "run", "--quiet").exit_code == 0
    rows = open_store(tmp_path / "run" / "simulations" / "store.zarr").load()
    power = rows["statistics"][:, 1]  # log power of the first map's upper band; its variance is exp(2 a) + 1/4
    expected = np.log(np.exp(2 * rows["theta"][:, 0]) + 0.25)
    assert np.corrcoef(power, expected)[0, 1] > 0.5
    assert len(np.unique(rows["theta"][:, 0])) == 60


def test_interrupted_simulations_resume_to_the_same_numbers(toy, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert call("simulate", "--config", toy, "--out", whole, "--quiet").exit_code == 0
    real, done = pipeline.Analysis._simulate_block, []

    def interrupt(self, block):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(block)
        return real(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Analysis, "_simulate_block", interrupt)
        result = call("simulate", "--config", toy, "--out", cut, "--quiet")
    assert result.exit_code == 130 and "resume with the same command" in result.stderr
    store = open_store(cut / "simulations" / "store.zarr")
    assert [block.index for block in store.missing()] == [1, 2]
    assert call("simulate", "--config", toy, "--out", cut, "--quiet").exit_code == 0
    reference = open_store(whole / "simulations" / "store.zarr").load()
    for name, value in store.load().items():
        np.testing.assert_array_equal(value, reference[name])


def test_a_damaged_store_is_named_and_mended(toy, tmp_path):
    command = ["simulate", "--config", toy, "--out", tmp_path / "run", "--quiet"]
    assert call(*command).exit_code == 0
    store = open_store(tmp_path / "run" / "simulations" / "store.zarr")
    whole = store.load()
    chunk = store.folder / "statistics" / "c" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-7])
    refused(call(*command), "statistics/c/2/0 are damaged", "Delete that file")
    chunk.unlink()
    assert call(*command).exit_code == 0
    np.testing.assert_array_equal(store.load()["statistics"], whole["statistics"])


def test_non_finite_simulations_are_refused_with_their_number(toy, tmp_path, monkeypatch):
    real = pipeline.Analysis._simulate_block

    def spoilt(self, block):
        rows = real(self, block)
        rows["score"] = np.where(np.arange(len(block))[:, None] == 3, np.nan, rows["score"])
        return rows

    monkeypatch.setattr(pipeline.Analysis, "_simulate_block", spoilt)
    command = ["simulate", "--config", toy, "--out", tmp_path / "run", "--quiet"]
    refused(call(*command), "at most 0 non-finite simulations", "got 3 of 60, the first at row 3, {'a':")
    assert call(*command, "--set", "simulations.max_nonfinite=3").exit_code == 0


def test_a_full_disk_is_explained_and_the_run_goes_on_later(toy, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("zarr.Array.__setitem__", full)
        refused(
            call("simulate", "--config", toy, "--out", tmp_path / "run"),
            "error: No space left on the disk",
            "simulations 0 to 19",
        )
    assert call("simulate", "--config", toy, "--out", tmp_path / "run").exit_code == 0


def good_map(path, shape=(2, 8, 8), **changes):
    x = np.random.default_rng(0).normal(0, 1.1, shape).astype("float32")
    for index, value in changes.get("put", {}).items():
        x[index] = value
    np.save(path, changes.get("cast", lambda a: a)(x))
    return path


def test_an_observed_map_is_read_in_the_order_that_is_told(toy, tmp_path):
    path = good_map(tmp_path / "x.npy", (8, 8, 2))
    run = tmp_path / "run"
    refused(call("infer", "--config", toy, "--observation", path, "--out", run), "Expected axis_order", "not guessed")
    wrong = call("infer", "--config", toy, "--observation", path, "--axis-order", "bin,row,column", "--out", run)
    refused(wrong, "shape (2, 8, 8) = (bin, row, column); got (8, 8, 2)")
    assert not run.exists()
    told = {"observation.file": str(path), "observation.axis_order": "column,row,bin"}
    x = pipeline.begin(load_config(toy, told), run).observe()
    np.testing.assert_array_equal(x, np.load(path).transpose(2, 1, 0))
    assert load_config(run / "config.yaml").observation.sha256 == digest(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: good_map(p, (2, 8, 9)), "shape (2, 8, 8) = (bin, row, column); got (2, 8, 9)"),
        (lambda p: good_map(p, (8, 8)), "got (8, 8)"),
        (lambda p: good_map(p, put={(1, 2, 3): np.nan}), "1 non-finite of 128 values, first at (1, 2, 3)"),
        (lambda p: good_map(p, put={(0, 0, 0): np.inf}), "non-finite"),
        (lambda p: good_map(p, put={0: 0.0, 1: 0.0}), "bin 0 of"),
        (lambda p: good_map(p, put={1: 0.25}), "is 0.25 in every pixel"),
        (lambda p: good_map(p, cast=lambda a: (100 * a).astype(int)), "floating-point values"),
        (lambda p: good_map(p, cast=lambda a: a.astype(complex)), "got dtype complex128"),
        (lambda p: good_map(p, cast=lambda a: 1e39 * a.astype(float)), "as float32"),
        (lambda p: p.write_bytes(b"\x93NUMPY truncated"), "cannot be read"),
        (lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), "cannot be read"),
        (lambda p: np.savez(p.with_suffix(""), x=1) or p.with_suffix(".npz").rename(p), "one array"),
        (lambda p: None, "there is no such file"),
    ],
)
def test_bad_observations_are_refused(toy, tmp_path, make, message):
    path = tmp_path / "x.npy"
    make(path)
    order = ["--axis-order", "bin,row,column"]
    result = call("infer", "--config", toy, "--observation", path, *order, "--out", tmp_path / "run")
    refused(result, message, "x.npy")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "survey.n_pixx=8"], "did you mean 'n_pix'?"),
        (["--set", "survey.n_pix=7"], "positive, even number of pixels; got 7"),
        (["--set", "survey.sigma_e=-1"], "survey.sigma_e"),
        (["--set", "observation.truth={a: 0.1, c: 2}"], "Unknown parameter 'c'"),
        (["--set", "compare.pairs=[[a, bb]]"], "Unknown parameter 'bb'"),
        (["--set", "simulations.latents=whitend"], "Did you mean 'whitened'?"),
        (["--set", "flow.density=smoth"], "Did you mean 'smooth'?"),
        (["--set", "seed"], "Expected --set section.key=value; got 'seed'"),
        (["--axis-order", "bin,row"], "axis_order to name bin, row and column once each"),
        (["--config", "nowhere.yaml"], "configuration file at nowhere.yaml"),
        (["--out", __file__], "holds something else"),
        (["--sed", "3"], "No such option"),
    ],
)
def test_bad_settings_are_refused(toy, tmp_path, words, message):
    result = call("infer", "--config", toy, "--out", tmp_path / "run", *words)
    refused(result, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("observation.truth={w_0: -0.1}", "w_0 inside the prior's support"),
        ("observation.truth={omega_m: 0.3}", "Unknown parameter 'omega_m'"),
        ("survey.n_pix=2", "at least 4; got 2"),
    ],
)
def test_bad_surveys_are_refused_by_the_real_simulator(tmp_path, settings, message):
    words = ["--set", "survey.n_pix=8", "--set", settings]
    refused(call("demo", "--out", tmp_path / "run", *words), message)
    assert not (tmp_path / "run").exists()


def test_a_finished_full_field_goes_on_where_more_is_wanted(toy, tmp_path):
    out = tmp_path / "run"
    first = call("hmc", "--config", toy, "--out", out, "--quiet")
    assert first.exit_code == 0, first.output
    before = load_npz(out / "full_field" / "samples.npz")["theta"]
    assert call("hmc", "--out", out, "--quiet").exit_code == 0
    assert before.shape == load_npz(out / "full_field" / "samples.npz")["theta"].shape == (2, 40, 2)
    assert call("hmc", "--out", out, "--set", "full_field.n_draws=60", "--quiet").exit_code == 0
    after = load_npz(out / "full_field" / "samples.npz")["theta"]
    assert after.shape == (2, 60, 2)
    np.testing.assert_array_equal(after[:, :40], before)
    refused(call("hmc", "--out", out, "--sampler", "nuts"), "another configuration", "full_field.sampler")
    refused(call("hmc", "--config", toy, "--out", tmp_path / "new", "--sampler", "gibbs"), "Unknown sampler", "gibbs")


def test_path_sampling_beside_the_chains_of_a_run(toy, tmp_path):
    out = tmp_path / "run"
    assert call("hmc", "--config", toy, "--out", out, "--quiet").exit_code == 0
    few = call("path", "--out", out, "--quiet", "--set", "path.n_points=24", "--set", "path.until_error=0.001")
    assert few.exit_code == 0, few.output
    draws = load_npz(out / "path" / "samples.npz")["theta"]
    assert draws.shape == (1, 4000, 2) and np.isfinite(draws).all()
    manifest = json.loads((out / "manifest.json").read_text())
    account = manifest["stages"]["path"]["account"]
    assert account["gradients"] > 24 * 11 and account["error"] > 0.001
    assert "raise path.n_points" in account["warnings"][0]
    found = json.loads((out / "comparison.json").read_text())["methods"]
    assert set(found) == {"path", "full_field"} and "Path sampling" in (out / "report.html").read_text()
    assert call("path", "--out", out, "--quiet", "--set", "path.n_points=48").exit_code == 0
    more = json.loads((out / "manifest.json").read_text())["stages"]["path"]["account"]
    assert more["gradients"] > 1.7 * account["gradients"] and more["error"] < account["error"]
    refused(call("path", "--out", out, "--set", "path.degree=3"), "another configuration", "path.degree")
    refused(call("path", "--config", toy, "--out", tmp_path / "new", "--set", "path.degree=4"), "path.degree")


def test_commands_on_folders_that_are_no_runs(tmp_path):
    for command in ("compare", "report", "hmc", "path"):
        refused(call(command, "--out", tmp_path), "Expected a run folder", "manifest.json")


@pytest.mark.slow
def test_a_killed_process_resumes(tmp_path):
    """SIGKILL during the real simulations, then the same command again."""
    out = tmp_path / "run"
    settings = ["survey.n_pix=16", "simulations.n=400", "simulations.block_size=5", "summaries.n_bands=3"]
    command = [sys.executable, "-c", "from diffsbi.cli import main; main()", "simulate", "--out", str(out)]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment)
    while not list((out / "simulations" / "store.zarr" / "blocks").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = open_store(out / "simulations" / "store.zarr")
    assert 0 < len(store.missing()) < 80
    assert subprocess.run(command, env=environment).returncode == 0
    assert store.missing() == [] and len(store.load()["theta"]) == 400


@pytest.mark.slow
def test_the_real_path_on_a_tiny_survey(tmp_path):
    settings = ["survey.n_pix=16", "simulations.n=100", "summaries.n_bands=3", "summaries.n_covariance=200"]
    settings += ["flow.max_epochs=5", "power_spectrum.n_draws=100", "full_field.n_warmup=20", "full_field.n_draws=30"]
    words = [word for setting in settings for word in ("--set", setting)]
    result = call("demo", "--out", tmp_path / "run", "--quiet", *words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "run" / "report.html").is_file()
