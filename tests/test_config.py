"""Configurations: strict keys, values checked, mistakes explained with their line."""

from pathlib import Path

import pytest
import yaml

from diffsbi.config import Config, load_config, parse_config, with_table

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"


def write(folder, text):
    path = folder / "my.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_are_valid_and_named_after_their_file(path):
    assert load_config(path).name == path.stem


def test_defaults_are_the_demo():
    assert load_config(CONFIGS / "demo.yaml") == Config()


def test_resolved_settings_round_trip_through_yaml(tmp_path):
    config = Config.model_validate({"seed": 7, "survey": {"shift": [0.1, 0.2, 0.3, 0.4, 0.5]}})
    assert load_config(write(tmp_path, yaml.safe_dump(config.resolved()))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("survey:\n  n_pixx: 64", r"my.yaml: line 2: unknown key 'survey.n_pixx'; did you mean 'n_pix'\?"),
        ("simulation: {n: 3}", r"line 1: unknown key 'simulation'; did you mean 'simulations'\?"),
        ("zebra: 3", r"unknown key 'zebra'; expected one of \['name', 'seed'"),
        ("survey: {n_pix: 63}", "survey.n_pix: Expected a positive, even number of pixels; got 63"),
        ("survey: {n_pix: 0}", "survey.n_pix: Expected a positive, even number of pixels; got 0"),
        ("survey:\n  n_bins: 5\n  sigma_e: -0.1", "line 3: survey.sigma_e: .* greater than 0; got -0.1"),
        ("survey: {density: .nan}", "survey.density: .*got nan"),
        ("survey: {shift: table}", "survey.shift: Expected 'perturbation', 'published', a positive number .*'table'"),
        ("survey: {shift: [0.1, 0.2]}", r"Expected one shift per bin \(5\); got 2"),
        ("survey: {shift: published}", "Expected shift_table exactly when shift is 'published'"),
        ("seed: -1", "seed: .*got -1"),
        ("simulations: {n: 0}", "simulations.n: .*got 0"),
        ("observation:\n  truth:\n    omega_c: much", "line 3: observation.truth.omega_c: .*valid number"),
        ("name: ../elsewhere", "name: .*got '../elsewhere'"),
        ("a: [", "my.yaml to be YAML"),
        ("- 1", r"to hold settings \(key: value\); got list"),
    ],
)
def test_mistakes_are_explained(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


def test_every_mistake_is_reported_at_once(tmp_path):
    with pytest.raises(ValueError, match="seed.*n_pix"):
        parse_config({"survey": {"n_pix": 1}, "seed": "x"})


def test_overrides_replace_and_are_checked(tmp_path):
    path = write(tmp_path, "simulations: {n: 10, block_size: 5}")
    config = load_config(path, {"simulations.n": "20", "survey.n_pix": 32})
    assert (config.simulations.n, config.simulations.block_size, config.survey.n_pix) == (20, 5, 32)
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        load_config(path, {"seeds": 3})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_shift_table_is_found_beside_the_observation_or_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFSBI_DATA", raising=False)
    survey = parse_config({"survey": {"shift": "published", "shift_table": "table.npy"}}).survey
    with pytest.raises(FileNotFoundError, match="shift table table.npy; it is not in .*DIFFSBI_DATA"):
        with_table(survey, None)
    (tmp_path / "table.npy").write_bytes(b"")
    found = str(tmp_path / "table.npy")
    assert with_table(survey, str(tmp_path / "map.npy")).shift_table == found
    monkeypatch.setenv("DIFFSBI_DATA", str(tmp_path))
    assert with_table(survey, None).shift_table == found
    plain = parse_config({}).survey
    assert with_table(plain, None) is plain
