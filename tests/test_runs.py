"""Run folders: written before the work, stages done once, strangers and damage refused."""

import errno
import json

import jax
import numpy as np
import pytest
import yaml

from diffsbi.runs import open_run, start_run

CONFIG = {"name": "demo", "seed": 3, "survey": {"n_pix": 64}}
STREAMS = ("observation", "simulations")


def start(folder, **changes):
    return start_run(folder, CONFIG | changes, STREAMS)


def test_config_and_seeds_are_there_before_any_work(tmp_path):
    run = start(tmp_path / "run")
    assert yaml.safe_load((run.folder / "config.yaml").read_text()) == CONFIG
    assert json.loads((run.folder / "seeds.json").read_text()) == {"seed": 3, "streams": list(STREAMS)}
    manifest = run.manifest
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["device"]["count"] == jax.device_count() and manifest["stages"] == {}
    assert open_run(run.folder).config == CONFIG


def test_streams_have_different_fixed_keys(tmp_path):
    run = start(tmp_path / "run")
    again = open_run(tmp_path / "run")
    draws = {name: np.asarray(jax.random.uniform(run.key(name))) for name in STREAMS}
    assert draws["observation"] != draws["simulations"]
    assert all(np.asarray(jax.random.uniform(again.key(name))) == draws[name] for name in STREAMS)
    with pytest.raises(ValueError, match="Unknown random stream 'noise'"):
        run.key("noise")


def test_a_stage_is_done_once(tmp_path):
    calls = []

    def work(folder):
        calls.append(folder)
        (folder / "result.txt").write_text("42")
        return {"simulations": 10}

    assert start(tmp_path / "run").once("simulate", work) == {"simulations": 10}
    run = start(tmp_path / "run")
    assert run.once("simulate", work) == {"simulations": 10} == run.account("simulate")
    assert calls == [run.path("simulate")]
    stage = run.manifest["stages"]["simulate"]
    assert stage["status"] == "finished" and stage["attempts"] == 1 and stage["seconds"] >= 0


def test_an_interrupted_stage_is_resumed_and_its_time_adds_up(tmp_path):
    run = start(tmp_path / "run")

    def interrupted(folder):
        (folder / "partial").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.once("simulate", interrupted)
    assert run.manifest["stages"]["simulate"]["status"] == "interrupted"
    with pytest.raises(ValueError, match="'simulate' .* to be finished"):
        run.account("simulate")
    before = run.manifest["stages"]["simulate"]["seconds"]
    account = start(tmp_path / "run").once("simulate", lambda folder: {"found": (folder / "partial").read_text()})
    stage = run.manifest["stages"]["simulate"]
    assert account == {"found": "half"} and stage["attempts"] == 2 and stage["seconds"] >= before


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_damaged_result_is_named_instead_of_used(tmp_path, harm):
    run = start(tmp_path / "run")
    run.once("npe", lambda folder: (folder / "posterior.eqx").write_bytes(b"weights") and {})
    file = run.path("npe", "posterior.eqx")
    file.write_bytes(b"wei") if harm == "truncate" else file.unlink()
    with pytest.raises(ValueError, match=r"npe/posterior.eqx is (truncated|missing)"):
        run.once("npe", lambda folder: pytest.fail("must not run"))


def test_another_configuration_is_refused(tmp_path):
    start(tmp_path / "run")
    with pytest.raises(ValueError, match=r"survey.n_pix: 64 there, 32 here.*--out"):
        start(tmp_path / "run", survey={"n_pix": 32})
    assert open_run(tmp_path / "run").config == CONFIG


def test_free_settings_may_change(tmp_path):
    free = ("survey.noise", "compare")
    old, new = ({"survey": {"n_pix": 64, "noise": n}, "compare": {"n": n}} for n in (1, 2))
    start_run(tmp_path / "run", CONFIG | old, STREAMS, free)
    assert start_run(tmp_path / "run", CONFIG | new, STREAMS, free).config == CONFIG | new
    assert open_run(tmp_path / "run").config == CONFIG | new
    with pytest.raises(ValueError, match=r"\(survey.n_pix: 64 there, 32 here\)"):
        start_run(tmp_path / "run", CONFIG | {"survey": {"n_pix": 32, "noise": 1}, "compare": {"n": 1}}, STREAMS, free)


def test_folders_that_are_no_runs_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something else"):
        start(tmp_path)
    with pytest.raises(ValueError, match="holds something else"):
        start(tmp_path / "thesis.tex")
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        open_run(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_damaged_run_files_are_named(tmp_path):
    run = start(tmp_path / "run")
    manifest = run.folder / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[:40])
    with pytest.raises(ValueError, match="manifest.json to be JSON"):
        start(tmp_path / "run")
    manifest.write_text(whole.replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="version 1; got 99"):
        start(tmp_path / "run")
    manifest.write_text(whole)
    (run.folder / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="config.yaml to hold a configuration"):
        start(tmp_path / "run")


def test_a_full_disk_is_explained(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    run = start(tmp_path / "run")
    with pytest.raises(OSError, match="while writing stage 'simulate'"):
        run.once("simulate", full)
    assert not run.finished("simulate")


def test_a_setting_that_a_run_of_an_older_version_lacks_has_its_default(tmp_path):
    start_run(tmp_path / "run", {"seed": 1}, ("a",))

    def complete(config):
        return {"members": 4} | dict(config)

    run = start_run(tmp_path / "run", {"seed": 1, "members": 4}, ("a", "b"), (), complete)
    assert run.config == {"seed": 1} and jax.random.key_data(run.key("b")).shape == (2,)
    with pytest.raises(ValueError, match="members: 4 there, 5 here"):
        start_run(tmp_path / "run", {"seed": 1, "members": 5}, ("a",), (), complete)


def test_a_configuration_with_tuples_is_found_again(tmp_path):
    first = start(tmp_path / "run", n=(20, 50), kinds=(("white", 1),))
    assert start(tmp_path / "run", n=(20, 50), kinds=(("white", 1),)).config == first.config
    with pytest.raises(ValueError, match="n: "):
        start(tmp_path / "run", n=(20, 51), kinds=(("white", 1),))
