"""One file per question, each with a `Config`, presets and `main(cfg, out)`; run as `-m experiments.NAME`."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["command_line"]


def command_line(main: Callable[[Any, Path], None], presets: Mapping[str, Any], name: str) -> None:
    """Parse `--preset` and `--out`, and call `main`."""
    parser = argparse.ArgumentParser(prog=f"experiments.{name}")
    parser.add_argument("--preset", choices=sorted(presets), default="smoke")
    parser.add_argument("--out", type=Path, default=None, help=f"run folder; runs/<preset>/{name} where left out")
    arguments = parser.parse_args()
    main(presets[arguments.preset], arguments.out or Path("runs", arguments.preset, name))
