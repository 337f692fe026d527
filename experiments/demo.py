"""Do all roads lead to the same posterior? The whole path on the small LSST-Y10 configuration."""

from pathlib import Path

from diffsbi import pipeline
from diffsbi.config import Config, parse_config
from experiments import command_line

SMOKE = {
    "name": "demo_smoke",
    "survey": {"n_pix": 32},
    "simulations": {"n": 200},
    "summaries": {"n_bands": 6, "n_covariance": 300, "n_derivative": 10},
    "flow": {"max_epochs": 100},
    "power_spectrum": {"n_warmup": 100, "n_draws": 100},
    "full_field": {"n_warmup": 50, "n_draws": 50},
}
PRESETS = {"smoke": parse_config(SMOKE), "paper": Config()}


def main(cfg: Config, out: Path) -> None:
    analysis = pipeline.begin(cfg, out)
    for _, _, work in pipeline.STAGES.values():
        work(analysis)
    analysis.compare()


if __name__ == "__main__":
    command_line(main, PRESETS, "demo")
