"""What does the full field know that spectra do not? Full-field, Gaussian-field and power-spectrum posteriors.

Always of a simulated LSST-Y10 map, whose truth is known. Where `DIFFSBI_DATA` names the folder of the published
observation and shift table (from the package sbi_lens), also of that map, with the published shift and the correct one.
"""

from collections.abc import Mapping
from pathlib import Path

from diffsbi import pipeline
from diffsbi.config import Config, parse_config
from experiments import command_line
from experiments.lensing import AXES, published_files

SURVEY = {"n_pix": 256, "side_deg": 10.0}
SAMPLING = {"full_field": {"until_ess": 1000.0, "n_draws": 6000}}
SMALL = {
    "survey": {"n_pix": 16, "side_deg": 2.5},
    "full_field": {"n_warmup": 60, "n_draws": 60, "n_chains": 2},
    "power_spectrum": {"n_warmup": 100, "n_draws": 100},
    "gaussian_field": {"n_warmup": 100, "n_draws": 100},
}


def published_cases() -> dict[str, dict]:
    """The published map with both shifts; nothing where its files are not at hand."""
    try:
        observation, table = published_files()
    except FileNotFoundError:
        return {}
    observed = {"file": str(observation), "axis_order": AXES}
    swapped = SURVEY | {"shift": "published", "shift_table": str(table)}
    return {
        "published_shift": {"survey": swapped, "observation": observed},
        "correct_shift": {"survey": SURVEY, "observation": observed},
    }


PRESETS: dict[str, Mapping[str, Config]] = {
    "smoke": {"simulated": parse_config({"name": "simulated"} | SMALL)},
    "paper": {
        name: parse_config({"name": name} | SAMPLING | settings)
        for name, settings in ({"simulated": {"survey": SURVEY}} | published_cases()).items()
    },
}


def main(cfg: Mapping[str, Config], out: Path) -> None:
    """Every case in a run folder of its own."""
    for name, config in cfg.items():
        analysis = pipeline.begin(config, out / name)
        for stage in ("observe", "power_spectrum", "gaussian_field", "full_field"):
            pipeline.STAGES[stage][2](analysis)
        analysis.compare()


if __name__ == "__main__":
    command_line(main, PRESETS, "full_field")
