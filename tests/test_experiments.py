"""Every experiment's small preset runs, resumes, and its figures are drawn."""

import importlib

import numpy as np
import pytest

from experiments.curves import simulations_saved

QUICK = ("scores_lotka_volterra",)
LONG = (
    "compressors",
    "fishnets",
    "imnn",
    "maps",
    "misspecified",
    "sbibm_tasks",
    "score_noise",
    "scores_lensing",
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
    if name.startswith(("scores_", "sbibm", "imnn", "fishnets", "compressors")):
        figures = importlib.import_module(f"paper_figures.{name}").draw(tmp_path)
        assert figures and all(figure.axes for figure in (figures.values() if isinstance(figures, dict) else [figures]))


def test_simulations_saved_is_the_factor_between_two_curves():
    n = [10, 100, 1000]
    curve = lambda x: 0.9 - 0.1 * np.log10(np.asarray(x, float) / 10)  # noqa: E731
    noise = 0.002 * np.random.default_rng(0).standard_normal((2, 5, 3))
    without, better = curve(n) + noise[0], curve(3 * np.asarray(n)) + noise[1]
    saved = simulations_saved(n, without, better)
    for factor, error, bound in saved[:2]:
        assert abs(factor - 3) < 4 * error and error < 0.5 and not bound
    assert saved[2][2] and saved[2][0] == pytest.approx(1.0)
    same = simulations_saved(n, without, without)
    assert all(abs(factor - 1) < 1e-9 for factor, _, _ in same)
    worse = simulations_saved(n, better, without)
    assert all(factor < 0.5 for factor, _, _ in worse[1:])
    with pytest.raises(ValueError, match="columns of 3 sizes"):
        simulations_saved(n, without[:, :2], better)
