"""The command line: parse, call, show progress, explain mistakes."""

import errno
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Simulation-based inference with a differentiable lensing simulator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML configuration; the demo's where left out.")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Run folder; runs/<name> where left out.")]
RunFolder = Annotated[Path, typer.Option("--out", help="Run folder.")]
MapFile = Annotated[Path | None, typer.Option("--observation", help="Observed map, a .npy file.")]
AxisOrder = Annotated[str | None, typer.Option(help="Its axes, such as row,column,bin or bin,row,column.")]
Sampler = Annotated[str | None, typer.Option(help="best (the fastest), hmc, nuts or mclmc: all exact.")]
UntilEss = Annotated[
    float | None, typer.Option(help="Stop at this effective sample size in every parameter (and a small R-hat).")
]
Baselines = Annotated[
    bool, typer.Option("--baselines", help="Also the power-spectrum and Gaussian-field posteriors of the map.")
]
Seed = Annotated[int | None, typer.Option(help="Seed in place of the configuration's.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="section.key=value in place of the configuration's.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]

__all__ = ["app", "main"]


def _explained(command: Callable) -> Callable:
    """Users' mistakes end with one message and exit code 2, Ctrl-C with 130; bugs show their trace."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            if os.environ.get("DIFFSBI_DEBUG"):
                raise
            sys.stdout.flush()
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            typer.echo(f"\ndiffsbi: error: {error.strerror if full else error}", err=True)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if type(error) is not RuntimeError or os.environ.get("DIFFSBI_DEBUG"):  # XLA's own are subclasses
                raise
            typer.echo(f"\ndiffsbi: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("\ndiffsbi: interrupted; resume with the same command.", err=True)
            raise typer.Exit(130) from None

    return wrapped


@app.command()
@_explained
def demo(
    config: ConfigFile = None,
    out: OutFolder = None,
    seed: Seed = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """The whole path on a small simulated survey: simulate, infer, sample, compare, report."""
    analysis = _begin(config, out, None, None, seed, settings, quiet)
    _work(analysis, ["observe", "compress", "simulate", "npe", "npe_score", "power_spectrum", "full_field"])
    _conclude(analysis)


@app.command()
@_explained
def simulate(
    config: ConfigFile = None,
    out: OutFolder = None,
    seed: Seed = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Draw the training simulations with their scores and store them."""
    analysis = _begin(config, out, None, None, seed, settings, quiet)
    _work(analysis, ["simulate"])
    typer.echo(f"Simulations: {analysis.simulate().folder}")


@app.command()
@_explained
def infer(
    config: ConfigFile = None,
    observation: MapFile = None,
    axis_order: AxisOrder = None,
    out: OutFolder = None,
    seed: Seed = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Neural (without and with scores) and power-spectrum posteriors of an observed or simulated map, with a report."""
    analysis = _begin(config, out, observation, axis_order, seed, settings, quiet)
    stages = ["observe", "compress", "simulate", "npe", "npe_score", "power_spectrum"]
    _work(analysis, stages + ["full_field"] * analysis.config.full_field.enabled)
    _conclude(analysis)


@app.command()
@_explained
def hmc(
    config: ConfigFile = None,
    observation: MapFile = None,
    axis_order: AxisOrder = None,
    sampler: Sampler = None,
    until_ess: UntilEss = None,
    baselines: Baselines = False,
    out: OutFolder = None,
    seed: Seed = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Full-field posterior, of a new run or (with --out and no --config) of the run that is there."""
    chosen: dict[str, Any] = {} if sampler is None else {"full_field.sampler": sampler}
    chosen |= {} if until_ess is None else {"full_field.until_ess": until_ess}
    analysis = _begin(config, out, observation, axis_order, seed, settings, quiet, new=False, chosen=chosen)
    _work(analysis, ["observe", *["power_spectrum", "gaussian_field"] * baselines, "full_field"])
    _conclude(analysis)


@app.command()
@_explained
def path(
    config: ConfigFile = None,
    observation: MapFile = None,
    axis_order: AxisOrder = None,
    out: OutFolder = None,
    seed: Seed = None,
    settings: Settings = None,
    quiet: Quiet = False,
) -> None:
    """Full-field posterior in about a minute, by path sampling; runs as for `hmc`, which is the yardstick."""
    analysis = _begin(config, out, observation, axis_order, seed, settings, quiet, new=False)
    _work(analysis, ["observe", "path"])
    _conclude(analysis)


@app.command()
@_explained
def compare(out: RunFolder, quiet: Quiet = False) -> None:
    """Compare the posteriors of a run again and rewrite its report."""
    _conclude(_resume(out, quiet))


@app.command()
@_explained
def report(out: RunFolder) -> None:
    """Rewrite the report of a run."""
    from diffsbi.report import write_report
    from diffsbi.runs import open_run

    typer.echo(f"Report: {write_report(open_run(out)).resolve()}")


def main() -> None:
    """Entry point of the `diffsbi` command."""
    app()


def _is_there(out, config, observation, *others) -> bool:
    """Whether the command is about the run in `out`, rather than a new one."""
    begun = out is not None and (out / "manifest.json").is_file() and config is None and observation is None
    return begun or (out is not None and not any((config, observation, *others)))


def _begin(config, out, observation, axis_order, seed, settings, quiet, *, new=True, chosen: Mapping | None = None):
    """Open a run; unless it must be `new`, with the configuration of the run that is there. `chosen` prevails."""
    from diffsbi import pipeline
    from diffsbi.config import load_config, parse_config
    from diffsbi.runs import open_run

    overrides: dict[str, Any] = dict(_setting(text) for text in settings or [])
    overrides |= {} if seed is None else {"seed": seed}
    overrides |= {} if observation is None else {"observation.file": str(observation)}
    overrides |= {} if axis_order is None else {"observation.axis_order": axis_order}
    there = not new and _is_there(out, config, observation, axis_order, seed, settings)
    overrides |= chosen or {}
    begun = dict(open_run(out).config) if there else {}
    resolved = parse_config(begun, overrides) if config is None else load_config(config, overrides)
    folder = Path("runs", resolved.name) if out is None else out
    analysis = pipeline.begin(resolved, folder, progress=not quiet)
    typer.echo(f"Run folder: {folder}")
    return analysis


def _resume(out: Path, quiet: bool):
    from diffsbi import pipeline
    from diffsbi.config import parse_config
    from diffsbi.runs import open_run

    config = parse_config(dict(open_run(out).config), source=str(out / "config.yaml"))
    return pipeline.begin(config, out, progress=not quiet)


def _setting(text: str) -> tuple[str, Any]:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"Expected --set section.key=value; got {text!r}.")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError:
        raise ValueError(f"Expected a YAML value in --set {key}=...; got {value!r}.") from None


def _work(analysis, stages: list[str]) -> None:
    from diffsbi.pipeline import STAGES

    for number, stage in enumerate(stages, 1):
        title, folder, work = STAGES[stage]
        done = " (done before)" if analysis.run.finished(folder) else ""
        typer.echo(f"[{number}/{len(stages)}] {title}{done}")
        work(analysis)


def _conclude(analysis) -> None:
    """Compare, print the table, write the report."""
    from diffsbi.pipeline import METHODS
    from diffsbi.report import write_report

    result = analysis.compare()
    width = max(map(len, METHODS.values())) + 2
    typer.echo("\n" + " " * width + "".join(f"{name:>19}" for name in result["names"]) + "     C2ST")
    for method, row in result["methods"].items():
        cells = "".join(f"{f'{m:.4f} ± {s:.4f}':>19}" for m, s in zip(row["mean"], row["std"], strict=True))
        c2st = row.get("distance", {}).get("c2st")
        typer.echo(f"{METHODS[method]:<{width}}{cells}" + (f"{c2st:>9.3f}" if c2st is not None else ""))
    for warning in result["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(f"\nReport: {write_report(analysis.run).resolve()}")
