"""One file per question, each with a `Config`, presets and `main(cfg, out)`; run as `-m experiments.NAME`."""

import argparse
import ast
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["changed", "command_line"]


def command_line(main: Callable[[Any, Path], None], presets: Mapping[str, Any], name: str) -> None:
    """Parse `--preset`, `--set` and `--out`, and call `main`; "smoke" as it is compiles with little optimisation."""
    parser = argparse.ArgumentParser(prog=f"experiments.{name}")
    parser.add_argument("--preset", choices=sorted(presets), default="smoke")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of the preset"
    )
    parser.add_argument("--out", type=Path, default=None, help=f"run folder; runs/<preset>/{name} where left out")
    arguments = parser.parse_args()
    try:
        cfg = changed(presets[arguments.preset], arguments.set)
    except ValueError as error:
        parser.error(str(error))
    started_so = sys.orig_argv[1:3] == ["-m", f"experiments.{name}"] and os.name == "posix"
    if arguments.preset == "smoke" and not arguments.set and started_so and "DIFFSBI_COMPILE" not in os.environ:
        # Most of its time is compilation. XLA has read its flags by now: once more from the beginning, with others.
        print("DIFFSBI_COMPILE=quick: a quick look, with little optimisation", flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"DIFFSBI_COMPILE": "quick"})
    main(cfg, arguments.out or Path("runs", arguments.preset, name))


def changed(cfg: Any, settings: Sequence[str]) -> Any:
    """The config with settings "name=value" changed; values are Python literals, or text without quotes.

    Raises:
        ValueError: A setting that the config does not have, or a value of another type than the one it replaces; any
            setting of presets that are files of settings themselves, not a `Config` of the experiment.
    """
    if not settings:
        return cfg
    if not dataclasses.is_dataclass(cfg):
        raise ValueError(f"Expected no --set, as this experiment has fixed settings; got {list(settings)}.")
    values = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in {field.name for field in dataclasses.fields(cfg)}:
            raise ValueError(f"Expected NAME=VALUE with one of {list(vars(cfg))}; got {setting!r}.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        kind = type(getattr(cfg, name))
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise ValueError(f"Expected {name} of type {kind.__name__}, as {getattr(cfg, name)!r}; got {text!r}.")
        values[name] = value
    return dataclasses.replace(cfg, **values)
