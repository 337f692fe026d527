"""Every experiment's small preset runs, resumes, and its figures are drawn."""

import dataclasses
import importlib
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import diffsbi as ds
from diffsbi._files import read_json
from experiments import changed, command_line, scores_lensing
from experiments.curves import simulations_saved
from experiments.information import _fisher, _measured
from experiments.lensing import MapConfig, begin, draws_under, local_check, lost, published_files

QUICK = ("scores_lotka_volterra",)
LONG = (
    "compressors",
    "default_settings",
    "fishnets",
    "folds",
    "imnn",
    "information",
    "lognormal_field",
    "maps",
    "marginal_score",
    "misspecified",
    "path",
    "path_coverage",
    "sbibm_tasks",
    "score_noise",
    "scores_lensing",
    "score_weights",
    "scores_rounds",
    "scores_two_moons",
    "two_moons",
)


def run_twice(name, folder, capsys):
    """What the experiment prints the first and the second time."""
    module = importlib.import_module(f"experiments.{name}")
    module.main(module.PRESETS["smoke"], folder / name)
    first = capsys.readouterr().out
    module.main(module.PRESETS["smoke"], folder / name)
    return first, capsys.readouterr().out


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_the_small_preset_runs_and_resumes(name, tmp_path, capsys):
    first, second = run_twice(name, tmp_path, capsys)
    assert len(second) <= len(first)
    tables = [text[text.index("C2ST") :] for text in (first, second) if "C2ST" in text]
    assert len(set(tables)) <= 1, "a run that is resumed must print the same table"
    if name not in ("folds", "maps", "misspecified", "score_weights", "two_moons"):  # drawn by others, or a table
        figures = importlib.import_module(f"paper_figures.{name}").draw(tmp_path)
        assert figures and all(figure.axes for figure in (figures.values() if isinstance(figures, dict) else [figures]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(summary="statistics", proposal="prior", estimators=("NPE", "NLE"), n_covariance=60, n_derivative=4),
        dict(summary="latent_scores", estimators=("NLE",), n=(20, 30), coverage_n=(20, 30), n_reference=80),
        dict(summary="score_frame", proposal="path", n_points=24),
        dict(summary="field_mode", proposal="prior"),
        dict(summary="path_mode", proposal="prior", n_points=24, turns=2),
    ],
    ids=lambda changes: changes["summary"],
)
def test_every_summary_of_lensing_maps(changes, tmp_path):
    scores_lensing.main(dataclasses.replace(scores_lensing.PRESETS["smoke"], **changes), tmp_path)
    found = read_json(tmp_path / "distances.json")
    estimators = changes.get("estimators", ("NPE",))
    assert {(row["estimator"], row["n"]) for row in found["rows"]} == set(
        itertools.product(estimators, changes.get("n", (20,)))
    )
    assert all(0.4 < row["c2st"] <= 1 for row in found["rows"])
    assert {(case["estimator"], case["observations"]) for case in found["coverage"]} == {(e, 50) for e in estimators}
    assert len(found["frames"]) == (changes["summary"] in scores_lensing.FRAMES)


def test_draws_under_a_proposal_have_its_weight_in_any_order():
    """A likelihood's posterior is under the prior; a proposal half as wide makes it narrower, first and last draws."""

    class Exact:
        prior = ds.Prior({"a": dist.Normal(0.0, 10.0)})

        def sample(self, key, n, t):
            return jax.random.normal(key, (n, len(t), 1)) + jnp.asarray(t)[None]

    proposal = ds.gaussian_proposal(Exact.prior, np.random.default_rng(0).normal(size=(4000, 1)), 1.0)
    samples = draws_under(Exact(), proposal, np.zeros((600, 1)), jax.random.key(0), 50)
    assert samples.shape == (600, 50, 1)
    for place in (0, -1):
        np.testing.assert_allclose(samples[:, place].std(), np.sqrt(1 / 2), rtol=4 / np.sqrt(2 * 600))


def test_local_check_sees_a_shift_at_the_map(tmp_path):
    rng = np.random.default_rng(0)
    t = rng.normal(size=(400, 1))
    theta = t + rng.normal(size=t.shape)
    for name, shift in (("right", 0.0), ("wrong", 1.0)):
        samples = t[:, None] + shift + rng.normal(size=(400, 3, 1))
        np.savez(tmp_path / name, theta=theta, samples=samples, observed=shift + rng.normal(size=(300, 1)))
    right, wrong = (local_check([tmp_path / f"{name}.npz"], t, np.zeros(1)) for name in ("right", "wrong"))
    assert right["local_p_value"] > 0.02 and wrong["local_p_value"] < 0.02
    assert local_check([tmp_path / "right.npz"], t[:20], np.zeros(1)) == {}


def test_information_of_numbers_that_know_all_is_exact():
    """x = A theta + e with unit noise: F = A^T A; and its error is the scatter among sets of simulations."""
    rng, root = np.random.default_rng(0), np.array([[2.0, 0.0], [1.9, 0.3], [0.5, 0.5]])
    steps, precision = np.array([0.1, 0.2]), np.eye(2)
    found = []
    for _ in range(40):
        x, noise = rng.normal(size=(2000, 3)), rng.normal(size=(100, 3))
        pairs = np.stack([[noise + sign * step * root[:, a] / 2 for sign in (-1, 1)] for a, step in enumerate(steps)])
        found.append(_measured(_fisher(lambda x: x, x, pairs, steps), precision))
    nats, errors = (np.array([one[name] for one in found]) for name in ("nats", "error"))
    exact = np.linalg.slogdet(root.T @ root + precision)[1] / 2
    assert abs(nats.mean() - exact) < 4 * nats.std() / np.sqrt(40)
    assert 0.7 < errors.mean() / nats.std() < 1.4


def test_simulations_saved_is_the_factor_between_two_curves():
    n = [10, 100, 1000]
    curve = lambda x: 0.9 - 0.1 * np.log10(np.asarray(x, float) / 10)  # noqa: E731
    noise = 0.002 * np.random.default_rng(0).standard_normal((2, 5, 3))
    without, better = curve(n) + noise[0], curve(3 * np.asarray(n)) + noise[1]
    saved = simulations_saved(n, without, better)
    for found in saved[:2]:
        assert (
            abs(found.factor - 3) < 4 * (found.high - found.low) / 2 and found.high - found.low < 1 and not found.bound
        )
        assert found.low < found.factor < found.high
    assert saved[2].bound == ">" and saved[2].factor == pytest.approx(1.0)
    same = simulations_saved(n, without, without)
    assert all(found == (pytest.approx(1), pytest.approx(1), pytest.approx(1), "") for found in same), "they are paired"
    worse = simulations_saved(n, better, without)
    assert worse[0].bound == "<" and all(found.factor < 0.5 and not found.bound for found in worse[1:])
    assert str(worse[0]).startswith("<1 (")
    fewer = simulations_saved(n, without, better[:, :2], n[:2])
    assert fewer == saved[:2]
    with pytest.raises(ValueError, match="rows of 3 and 3 sizes"):
        simulations_saved(n, without[:, :2], better)


def test_the_published_map_is_asked_for_by_name_and_needs_its_files(tmp_path):
    for folder in (None, str(tmp_path)):
        with pytest.raises(FileNotFoundError, match="lognormal_shifts_LSSTY10.npy .* DIFFSBI_DATA"):
            published_files(folder)
    with pytest.raises(ValueError, match="'simulated' or 'published'; got 'real'"):
        begin(MapConfig(observation="real"), "test", tmp_path, ())


def test_what_numbers_lose_is_the_ratio_of_exact_widths():
    """Numbers with a known noise, a full field without: widths and volumes by formula; and nothing lost, zero."""
    rng, dim, n = np.random.default_rng(0), 2, 4000
    prior = ds.linear_gaussian(dim=dim, n_latents=3, n_data=4, seed=2).prior  # a standard normal: u = theta
    root = np.array([[0.5, 0.0], [0.2, 0.3]])
    proposal = ds.gaussian_proposal(prior, rng.standard_normal((1000, dim)) @ root.T, 1.0)
    theta = np.asarray(proposal.sample(jax.random.key(1), (n,)))
    width = np.array([0.1, 0.2])
    t = theta + 2 * width * rng.standard_normal((n, dim))
    under_prior, under_proposal = np.eye(dim), np.linalg.inv(np.asarray(proposal.root @ proposal.root.T))
    exact = [np.linalg.inv(np.diag(1 / (a * width) ** 2) + under_proposal) for a in (2, 1)]
    chain = rng.multivariate_normal(np.zeros(dim), np.linalg.inv(np.diag(1 / width**2) + under_prior), 40_000)
    found = lost(theta, t, chain, proposal)
    widths = np.mean(np.log(np.diag(exact[0]) / np.diag(exact[1]))) / 2
    volume = (np.linalg.slogdet(exact[0])[1] - np.linalg.slogdet(exact[1])[1]) / 2
    assert abs(found["widths"] - widths) < 5 * np.hypot(found["widths_error"], 0.004) and widths > 0.3
    assert abs(found["volume"] - volume) < 5 * np.hypot(found["volume_error"], 0.007)
    few = [lost(theta[i : i + 20], t[i : i + 20], chain[:1000], proposal)["volume"] for i in range(0, n, 40)]
    many = lost(theta, t, chain[:1000], proposal)
    error = np.hypot(np.std(few) / np.sqrt(len(few)), many["volume_error"])
    assert abs(np.mean(few) - many["volume"]) < 5 * error  # no bias where rows are few
    assert np.std(few) == pytest.approx(lost(theta[:20], t[:20], chain, proposal)["volume_error"], rel=0.3)
    with pytest.raises(ValueError, match="Expected at least 5 simulations for 2 numbers; got 4"):
        lost(theta[:4], t[:4], chain, proposal)


@dataclasses.dataclass(frozen=True)
class Settings:
    name: str = "prior"
    n: tuple[int, ...] = (1, 2)
    size: int = 3
    width: float = 1.5


def test_settings_are_changed_by_name():
    assert changed(Settings(), ["n=(5,)", "width=2", "name=spectrum"]) == Settings("spectrum", (5,), 3, 2.0)
    assert changed(Settings(), []) == Settings()
    for wrong, told in (("sise=3", "'size', 'width'.*got 'sise=3'"), ("n", "NAME=VALUE"), ("n=5", "n of type tuple"),
                        ("size=1.5", "size of type int"), ("width=a", "width of type float")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            changed(Settings(), [wrong])


def test_make_figures_runs_every_experiment():
    """All but the one that needs files of its own: a figure without its run would end the whole command."""
    makefile = (Path(__file__).parents[1] / "Makefile").read_text().replace("\\\n", " ")
    listed = re.search(r"^EXPERIMENTS := (.*)$", makefile, re.MULTILINE).group(1).split()
    assert sorted(listed) == sorted({"demo", "full_field", "sampling", *QUICK, *LONG} - {"sbibm_tasks"})


@pytest.mark.parametrize("name", ["demo", "full_field", "sampling", *QUICK, *LONG])
def test_every_preset_is_run_as_it_is_from_the_command_line(name, monkeypatch, tmp_path):
    module, found = importlib.import_module(f"experiments.{name}"), []
    for preset, cfg in module.PRESETS.items():
        monkeypatch.setattr("sys.argv", [name, "--preset", preset, "--out", str(tmp_path)])
        command_line(lambda *arguments: found.append(arguments), module.PRESETS, name)
        assert found[-1] == (cfg, tmp_path)
    monkeypatch.setattr("sys.argv", [name, "--set", "no_such_setting=3"])
    with pytest.raises(SystemExit):
        command_line(lambda *arguments: found.append(arguments), module.PRESETS, name)
    assert len(found) == len(module.PRESETS)
