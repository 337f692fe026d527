"""Run folders: the resolved configuration and the seeds first, then stage after stage, each done once."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import yaml

from diffsbi._files import differences, digest, explain_full_disk, read_json, write_atomically, write_json
from diffsbi._types import Key

VERSION = 1
PACKAGES = ("diffsbi", "jax", "jaxlib", "equinox", "numpyro", "blackjax", "flowjax", "optax", "arviz", "numpy", "zarr")

__all__ = ["Run", "describe_machine", "open_run", "start_run"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with `config.yaml`, `seeds.json`, `manifest.json` and one sub-folder per stage.

    Make one with `start_run` (new, or the same again) or `open_run` (existing, to look at).
    """

    folder: Path
    config: Mapping
    streams: tuple[str, ...]

    @property
    def manifest(self) -> dict:
        return read_json(self.folder / "manifest.json")

    def key(self, stream: str) -> Key:
        """The random key of one named stream: independent of every other stream and of the order of work."""
        if stream not in self.streams:
            raise ValueError(f"Unknown random stream {stream!r}; expected one of {list(self.streams)}.")
        return jax.random.fold_in(jax.random.key(self.config["seed"]), self.streams.index(stream))

    def finished(self, name: str) -> bool:
        """Whether the stage `name` is done."""
        return self.manifest["stages"].get(name, {}).get("status") == "finished"

    def account(self, name: str) -> dict:
        """What the finished stage `name` reported of itself (simulator calls, gradients, ...)."""
        if not self.finished(name):
            raise ValueError(f"Expected stage {name!r} of {self.folder} to be finished; it is not. Run it first.")
        return self.manifest["stages"][name]["account"]

    def path(self, name: str, *parts: str) -> Path:
        """A path inside the folder of stage `name`."""
        return self.folder.joinpath(name, *parts)

    def once(self, name: str, work: Callable[[Path], Mapping], *, more: bool = False) -> dict:
        """Do a stage unless it is finished, or `more` of it is wanted; return its account.

        `work` gets the stage's own folder, may find there what an interrupted attempt left, and returns
        its account as JSON values. The files it leaves are recorded with their SHA-256 (those of stores,
        which check themselves, apart), so that a damaged one is found instead of believed.

        Raises:
            ValueError: If a file of the finished stage is missing or damaged: the message names it.
            OSError: If the disk is full.
        """
        if self.finished(name) and not more:
            self.check(name)
            return self.account(name)
        folder = self.path(name)
        start = time.monotonic()
        try:
            with explain_full_disk(self.folder, f"stage {name!r}"):
                folder.mkdir(parents=True, exist_ok=True)
                self._record(name, "running", 0.0, {})
                account = dict(work(folder))
                self._record(name, "finished", time.monotonic() - start, account, _digests(folder))
        except BaseException:
            with contextlib.suppress(OSError, ValueError):  # a note; the failure itself matters more
                self._record(name, "interrupted", time.monotonic() - start, {})
            raise
        return account

    def check(self, name: str) -> None:
        """Raise `ValueError` naming the first file of stage `name` that is not as it was written."""
        for file, expected in self.manifest["stages"][name]["files"].items():
            path = self.path(name, file)
            if not path.is_file() or digest(path) != expected:
                state = "truncated or altered" if path.is_file() else "missing"
                raise ValueError(f"{path} is {state}. Delete the folder {path.parent} and run again to make it anew.")

    def _record(self, name: str, status: str, seconds: float, account: Mapping, files: Mapping | None = None) -> None:
        manifest = self.manifest
        before = manifest["stages"].get(name, {})
        manifest["stages"][name] = {
            "status": status,
            "seconds": round(before.get("seconds", 0.0) + seconds, 3),  # over all attempts
            "attempts": before.get("attempts", 0) + (status == "running"),
            "at": _now(),
            "account": account,
            "files": files or {},
        }
        write_json(self.folder / "manifest.json", manifest)


def start_run(
    folder: str | Path,
    config: Mapping,
    streams: tuple[str, ...],
    free: tuple[str, ...] = (),
    complete: Callable[[Mapping], Mapping] = dict,
) -> Run:
    """Open the run folder of `config`, new or begun before.

    Args:
        folder: The run folder.
        config: The resolved configuration, as JSON values, with its `seed`.
        streams: Names of the random streams; the position of a name decides its key.
        free: Dotted keys of settings (or sections) that may change in a begun run; `config.yaml` follows.
        complete: Puts defaults where a begun run's configuration, of an older version, has no value.

    Raises:
        ValueError: If the folder holds a run of another configuration (the message says what differs) or
            something that is no run.
        OSError: If the disk is full.
    """
    folder, config = Path(folder), json.loads(json.dumps(dict(config)))  # as it will be read back: tuples are lists
    if (folder / "manifest.json").exists():
        found = differences(dict(complete(open_run(folder).config)), dict(config))
        fixed = [line for line in found if not any(f"{line}.".startswith((f"{key}.", f"{key}:")) for key in free)]
        if fixed:
            there = "; ".join(fixed)
            raise ValueError(f"{folder} holds a run of another configuration ({there}). Choose another --out.")
        if found:
            write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        run = open_run(folder)
        # New streams come last, so that the keys of the old ones stay.
        newer = tuple(streams)[: len(run.streams)] == run.streams
        return dataclasses.replace(run, streams=tuple(streams)) if newer else run
    if folder.is_file() or (folder.exists() and any(p.name not in _FIRST_FILES for p in folder.iterdir())):
        raise ValueError(
            f"Expected {folder} to be a new folder or a run; it holds something else. Choose another --out."
        )
    with explain_full_disk(folder, "the configuration of a new run"):
        write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_json(folder / "seeds.json", {"seed": config["seed"], "streams": list(streams)})
        write_json(
            folder / "manifest.json", {"version": VERSION, "started": _now()} | describe_machine() | {"stages": {}}
        )
    return Run(folder, config, tuple(streams))


def open_run(folder: str | Path) -> Run:
    """Open an existing run folder.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If its files are damaged or of another version.
    """
    folder = Path(folder)
    for name in ("manifest.json", "config.yaml", "seeds.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"Expected a run folder at {folder}; it has no {name}.")
    version = read_json(folder / "manifest.json").get("version")
    if version != VERSION:
        raise ValueError(f"Expected {folder / 'manifest.json'} with version {VERSION}; got {version!r}.")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {folder / 'config.yaml'} to be YAML; it is damaged ({error}).") from error
    if not isinstance(config, dict):
        raise ValueError(f"Expected {folder / 'config.yaml'} to hold a configuration; it is truncated or damaged.")
    return Run(folder, config, tuple(read_json(folder / "seeds.json")["streams"]))


def describe_machine() -> dict:
    """Versions, device and code that a run is made with."""
    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


_FIRST_FILES = ("config.yaml", "seeds.json")  # a start that was cut short leaves these


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code, with "+changes" if it was edited since; None outside a repository."""

    def git(*words):
        where = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+changes" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the stage's files; stores (folders `*.zarr` and `blocks`) check themselves."""
    files = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.endswith((".zarr", "blocks")))
        for name in sorted(names):
            path = Path(root, name)
            files[path.relative_to(folder).as_posix()] = digest(path)
    return files
