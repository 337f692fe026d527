"""Configurations: strict models, read from YAML, with errors that name the line and suggest the right key."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

__all__ = ["Config", "load_config", "parse_config", "with_table"]


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Survey(_Section):
    """What is observed; see `diffsbi.lsst_y10`."""

    n_pix: int = 64
    side_deg: Positive = 5.0
    n_bins: Count = 5
    sigma_e: Positive = 0.26
    density: Positive = 27.0
    field: Literal["lognormal", "gaussian"] = "lognormal"
    shift: str | float | list[float] = "perturbation"
    shift_table: str | None = None

    @pydantic.field_validator("n_pix")
    @classmethod
    def _even(cls, value: int) -> int:
        if value <= 0 or value % 2:
            raise ValueError(f"Expected a positive, even number of pixels; got {value}")
        return value

    @pydantic.field_validator("shift", mode="before")
    @classmethod
    def _known_shift(cls, value):
        numbers = value if isinstance(value, list | tuple) else [value]
        if value in ("perturbation", "published") or all(_is_number(v) and v > 0 for v in numbers):
            return value
        raise ValueError(f"Expected 'perturbation', 'published', a positive number or one per bin; got {value!r}")

    @pydantic.model_validator(mode="after")
    def _consistent_shift(self):
        if (self.shift == "published") != (self.shift_table is not None):
            raise ValueError("Expected shift_table exactly when shift is 'published'")
        if isinstance(self.shift, list) and len(self.shift) != self.n_bins:
            raise ValueError(f"Expected one shift per bin ({self.n_bins}); got {len(self.shift)}")
        return self


class Observation(_Section):
    """The map: read from an .npy file, or simulated at `truth` (the fiducial values where left out)."""

    file: str | None = None
    axis_order: str | None = None
    sha256: str | None = None
    truth: dict[str, float] = {}


class Simulations(_Section):
    """Training simulations, drawn from the prior.

    Scores are taken in the latent coordinate `latents` and averaged over `n_average` states of a chain of the latents;
    see `AbstractSimulator.draw`.
    """

    n: Count = 1000
    block_size: Count = 50
    latents: str = "whitened"
    n_average: Count = 8
    keep_maps: bool = False
    max_nonfinite: Annotated[int, Field(ge=0)] = 0


class Summaries(_Section):
    """Map statistics, compressed to one number per parameter by score compression at the fiducial values."""

    n_bands: Count = 12
    n_covariance: Annotated[int, Field(ge=2)] = 400
    n_derivative: Count = 50


class Flow(_Section):
    """Neural posterior estimation, trained without and with scores; see `diffsbi.inference.NPE`."""

    density: str = "smooth"
    score_weight: Literal["auto"] | Positive = "auto"
    members: Count = 4
    max_epochs: Count = 2000
    patience: Count | None = None
    batch_size: Count | None = None
    learning_rate: Positive = 1e-3
    n_samples: Annotated[int, Field(ge=100)] = 4000


class PowerSpectrum(_Section):
    """NUTS on the Gaussian likelihood of the binned spectra.

    Their covariance is that of a Gaussian field, or with the log-normal field's connected part from `n_covariance`
    simulations at the fiducial parameters.
    """

    n_covariance: Annotated[int, Field(ge=0)] = 0

    n_chains: Count = 4
    n_warmup: Count = 300
    n_draws: Count = 500


class FullField(_Section):
    """Markov chains on the joint of parameters and latents; see `diffsbi.full_field_posterior`.

    With `until_ess` the chains stop when every parameter has that effective sample size and R-hat is below `max_rhat`,
    or after `n_draws` each.
    """

    enabled: bool = True
    sampler: str = "best"
    latents: str = "whitened"
    n_chains: Count = 4
    n_warmup: Count = 200
    n_draws: Count = 600
    until_ess: Positive | None = None
    max_rhat: Positive = 1.01
    maps: bool = True


class GaussianField(_Section):
    """NUTS on the exact likelihood of a Gaussian field with the same spectra."""

    n_chains: Count = 4
    n_warmup: Count = 300
    n_draws: Count = 500


class PathSampling(_Section):
    """Marginal scores along a path of parameters; see `diffsbi.path_posterior`."""

    n_points: Annotated[int, Field(ge=24)] = 192
    n_turns: Count = 4
    until_error: Positive | None = 0.1
    degree: Annotated[int, Field(ge=2, le=3)] = 2
    n_draws: Annotated[int, Field(ge=100)] = 4000


class Compare(_Section):
    """Distances between the posteriors."""

    n_samples: Annotated[int, Field(ge=100)] = 2000
    pairs: list[tuple[str, str]] = [("omega_c", "sigma_8"), ("omega_c", "w_0"), ("sigma_8", "w_0")]


class Config(_Section):
    """Everything that decides a run's numbers. The defaults are the demo."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")] = "demo"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    survey: Survey = Survey()
    observation: Observation = Observation()
    simulations: Simulations = Simulations()
    summaries: Summaries = Summaries()
    flow: Flow = Flow()
    power_spectrum: PowerSpectrum = PowerSpectrum()
    gaussian_field: GaussianField = GaussianField()
    path: PathSampling = PathSampling()
    full_field: FullField = FullField()
    compare: Compare = Compare()

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults written out, as JSON values."""
        return self.model_dump(mode="json")


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML configuration.

    Args:
        path: The file.
        overrides: Dotted key → value, put in place of the file's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or a key or value is not understood: the message names file, line and
            key, and the known key that is nearest to a misspelt one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a configuration file at {path}; there is none.")
    text = path.read_text()
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected {path} to be YAML; {' '.join(str(error).split())}.") from error
    return parse_config(content, overrides, source=str(path), lines=_lines(node))


def parse_config(
    content: Any, overrides: Mapping[str, Any] | None = None, *, source: str = "configuration", lines=None
) -> Config:
    """Check nested settings against the models; raise `ValueError` with one line per mistake."""
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"Expected {source} to hold settings (key: value); got {type(content).__name__}.")
    for key, value in (overrides or {}).items():
        content = _put(content, key.split("."), value)
    try:
        return Config.model_validate(content)
    except pydantic.ValidationError as error:
        mistakes = [_explain(mistake, lines or {}) for mistake in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(mistakes) + ".") from None


def with_table(survey: Survey, observation: str | None) -> Survey:
    """The survey with the path of its shift table: as it is, or beside the observation, or in $DIFFSBI_DATA."""
    if survey.shift_table is None:
        return survey
    folders = [Path(), *([Path(observation).parent] if observation else [])]
    folders += [Path(os.environ["DIFFSBI_DATA"])] if os.environ.get("DIFFSBI_DATA") else []
    for folder in folders:
        if (folder / survey.shift_table).is_file():
            return survey.model_copy(update={"shift_table": str((folder / survey.shift_table).resolve())})
    looked = ", ".join(str(folder.resolve()) for folder in folders)
    raise FileNotFoundError(
        f"Expected the shift table {survey.shift_table}; it is not in {looked}. Name its folder by DIFFSBI_DATA, or "
        "give its path: --set survey.shift_table=PATH."
    )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _put(content: dict, path: list[str], value) -> dict:
    head, *rest = path
    inner = content.get(head)
    return content | {head: _put(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _lines(node, path: tuple = ()) -> dict[tuple, int]:
    """Key path → line number in the YAML text."""
    found: dict[tuple, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, key.value)
            found |= {inner: key.start_mark.line + 1} | _lines(value, inner)
    return found


def _explain(error, lines: Mapping[tuple, int]) -> str:
    path = error["loc"]
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    where = "" if line is None else f"line {line}: "
    key = ".".join(map(str, path)) or "settings"
    if error["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {known}"
        return f"{where}unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}{key}: {message}" + ("" if "got" in message else f"; got {error['input']!r}")


def _known_keys(path: tuple) -> list[str]:
    model: Any = Config
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
