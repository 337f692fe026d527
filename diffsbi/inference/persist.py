"""Posteriors on disk: one file with a JSON header, a checksum and the arrays; no pickle."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flowjax.distributions import AbstractDistribution
from numpyro.distributions.truncated import (
    LeftTruncatedDistribution,
    RightTruncatedDistribution,
    TwoSidedTruncatedDistribution,
)

from diffsbi._types import check_names
from diffsbi.inference.estimator import build_density
from diffsbi.inference.frames import LocalFrame
from diffsbi.inference.nle import LikelihoodPosterior
from diffsbi.inference.nre import RatioMember, build_ratio
from diffsbi.inference.posterior import FittedPosterior, Member, Posterior
from diffsbi.inference.proposals import GaussianProposal, Proposals
from diffsbi.inference.reweighted import ReweightedPosterior
from diffsbi.inference.standardise import Standardiser
from diffsbi.inference.training import History
from diffsbi.prior import Prior

MAGIC = b"diffsbi-posterior\n"
VERSION = 1

_SCALAR: dict[str, tuple[type, tuple[str, ...]]] = {
    "Normal": (dist.Normal, ("loc", "scale")),
    "Uniform": (dist.Uniform, ("low", "high")),
    "LogNormal": (dist.LogNormal, ("loc", "scale")),
}
_TRUNCATED: dict[type, tuple[str, ...]] = {
    LeftTruncatedDistribution: ("low",),
    RightTruncatedDistribution: ("high",),
    TwoSidedTruncatedDistribution: ("low", "high"),
}


def prior_to_json(prior: Prior) -> dict[str, Any]:
    """A JSON-able description: Normal, Uniform, LogNormal, and the truncated Normal with one or two bounds.

    Raises:
        ValueError: For any other distribution, naming it.
    """
    specs = {name: _to_spec(name, d) for name, d in zip(prior.names, prior.distributions, strict=True)}
    fiducial = {name: float(v) for name, v in zip(prior.names, prior._fiducial, strict=True)}
    return {"distributions": specs, "fiducial": fiducial}


def prior_from_json(spec: dict[str, Any]) -> Prior:
    """The prior that `prior_to_json` described."""
    distributions = {}
    for name, entry in spec["distributions"].items():
        arguments = dict(entry)
        kind = arguments.pop("type")
        check_names([kind], [*_SCALAR, "TruncatedNormal"], f"distribution of {name!r}")
        constructor = dist.TruncatedNormal if kind == "TruncatedNormal" else _SCALAR[kind][0]
        distributions[name] = constructor(**arguments)
    return Prior(distributions, spec["fiducial"])


def _to_spec(name: str, d) -> dict[str, Any]:
    for kind, (cls, fields) in _SCALAR.items():
        if type(d) is cls:
            return {"type": kind} | {f: float(getattr(d, f)) for f in fields}
    bounds = _TRUNCATED.get(type(d))
    if bounds is not None and type(d.base_dist) is dist.Normal:
        spec = {"type": "TruncatedNormal", "loc": float(d.base_dist.loc), "scale": float(d.base_dist.scale)}
        return spec | {f: float(getattr(d, f)) for f in bounds}
    known = [*_SCALAR, "TruncatedNormal"]
    raise ValueError(f"Cannot describe the {type(d).__name__} prior of {name!r} in JSON; expected one of {known}.")


def save_posterior(posterior: FittedPosterior, path) -> None:
    """Write `posterior` to `path`; a file that is already there is replaced only when the new one is complete.

    Raises:
        ValueError: If it was fitted under proposals other than the prior and `GaussianProposal`.
    """
    kinds, proposals = _describe_proposals(posterior)
    buffer = io.BytesIO()
    eqx.tree_serialise_leaves(buffer, (posterior.members, posterior.default_x, proposals))
    payload = buffer.getvalue()
    try:
        prior = prior_to_json(posterior.prior)
    except ValueError:
        prior = None  # the one who loads it passes prior=
    header = {
        "version": VERSION,
        "names": list(posterior.names),
        "prior": prior,
        "config": posterior.config,
        "shapes": _shapes(posterior.members),
        "dtype": str(posterior.members[0].standardiser.x_loc.dtype),
        "conditioned": posterior.default_x is not None,
        "proposals": kinds,
        "histories": [_history_to_json(h) for h in posterior.histories],
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    _write(Path(path), MAGIC + json.dumps(header).encode() + b"\n" + payload)


def load_posterior(
    path, prior: Prior | None = None, density: Callable[..., AbstractDistribution] | None = None
) -> Posterior | ReweightedPosterior | LikelihoodPosterior:
    """Read what a posterior's `save` wrote.

    Args:
        path: The file.
        prior: The prior; needed where its distributions have no JSON description, checked against it otherwise.
        density: The constructor; needed where the posterior was fitted with one that is not in `FLOWS`.

    Raises:
        ValueError: Naming what is wrong: not such a file, another version, truncated, damaged, another prior.
    """
    header, payload = _read(Path(path))
    names = tuple(header["names"])
    prior = _matching_prior(path, header, names, prior)
    config = header["config"]
    density = config["density"] if density is None else density
    if density is None:
        raise ValueError(f"Expected density=..., the constructor that {path} was fitted with: it has no name in FLOWS.")
    like = tuple(_empty_member(density, len(names), config) for _ in range(config["members"]))
    if _shapes(like) != header["shapes"]:
        raise ValueError(
            f"Expected arrays of shapes {header['shapes']}, as in {path}; the density has {_shapes(like)}."
        )
    empty_x = jnp.zeros(config["x_dim"]) if header["conditioned"] else None
    dtype = jnp.dtype(header["dtype"])
    if dtype != jnp.result_type(float):
        raise ValueError(
            f"Expected floats of {jnp.result_type(float)}, the precision JAX is set to; {path} has {dtype}."
        )
    kinds = header.get("proposals")
    empty = () if kinds is None else tuple(_empty_proposal(len(names)) if f["gaussian"] else None for f in kinds)
    members, default_x, arrays = eqx.tree_deserialise_leaves(io.BytesIO(payload), (like, empty_x, empty))
    histories = tuple(_history_from_json(h) for h in header["histories"])
    parts = (prior, members, histories, json.dumps(config), default_x)
    if kinds is not None:
        components = tuple(None if a is None else GaussianProposal(prior, *a) for a in arrays)
        proposals = Proposals(prior, components, tuple(f["fraction"] for f in kinds), kinds[0]["floor"])
        return ReweightedPosterior(*parts, proposals=proposals)
    return (LikelihoodPosterior if _models_data(config) else Posterior)(*parts)


def _describe_proposals(posterior: FittedPosterior) -> tuple[list[dict[str, Any]] | None, tuple]:
    """Kinds and fractions of a posterior's proposals, None where it has none, and their arrays."""
    if not isinstance(posterior, ReweightedPosterior):
        return None, ()
    kinds, arrays = [], []
    for component, fraction in zip(posterior.proposals.components, posterior.proposals.fractions, strict=True):
        if not (component is None or isinstance(component, GaussianProposal)):
            name = type(component).__name__
            raise ValueError(f"Expected proposals made by gaussian_proposal, or the prior, to save; got a {name}.")
        floor = posterior.proposals.floor
        kinds.append({"gaussian": component is not None, "fraction": fraction, "floor": floor})
        arrays.append(None if component is None else (component.loc, component.root))
    return kinds, tuple(arrays)


def _empty_proposal(dim: int) -> tuple:
    return jnp.zeros(dim), jnp.zeros((dim, dim))


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise ValueError(f"Expected a diffsbi posterior in {path}; it starts with {content[:18]!r}.")
    end = content.find(b"\n", len(MAGIC))
    try:
        header = json.loads(content[len(MAGIC) : end]) if end > 0 else None
    except json.JSONDecodeError:
        header = None
    if header is None:
        raise ValueError(f"Expected a complete header in {path}; the file is truncated or damaged.")
    if header.get("version") != VERSION:
        raise ValueError(f"Expected version {VERSION} of the posterior format in {path}; got {header.get('version')}.")
    payload = content[end + 1 :]
    if len(payload) != header["bytes"]:
        raise ValueError(f"Expected {header['bytes']} bytes of arrays in {path}; got {len(payload)}: it is truncated.")
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise ValueError(f"Expected the checksum {header['sha256'][:12]}… in {path}; its arrays are damaged.")
    return header, payload


def _matching_prior(path, header, names, prior: Prior | None) -> Prior:
    if prior is None:
        if header["prior"] is None:
            raise ValueError(f"Expected prior=...: the distributions of {list(names)} in {path} have no description.")
        return prior_from_json(header["prior"])
    if prior.names != names:
        raise ValueError(f"Expected a prior of {list(names)}, as in {path}; got {list(prior.names)}.")
    if header["prior"] is not None:
        for name, d in zip(names, prior.distributions, strict=True):
            expected, got = header["prior"]["distributions"][name], _to_spec(name, d)
            if expected != got:
                raise ValueError(f"Expected the prior {expected} of {name!r}, as in {path}; got {got}.")
    return prior


def _empty_member(density, dim: int, config: dict[str, Any]) -> Member:
    of, given = (config["x_dim"], dim) if _models_data(config) else (dim, config["x_dim"])
    shapes = ((given,), (given, given), (of,), (of, given), (of, of))
    framed = config.get("framed")
    tilt = (jnp.zeros((dim, dim)), jnp.zeros(dim)) if framed and framed.get("tilted") else None
    frame = LocalFrame(dim, framed["reach"], tilt) if framed else None
    standardiser = Standardiser(*(jnp.zeros(shape) for shape in shapes), bound=framed["bound"] if framed else None)
    if config.get("estimator") == "NRE":
        return RatioMember(standardiser, build_ratio(jax.random.key(0), density, of, given, config["density_options"]))
    return Member(standardiser, build_density(jax.random.key(0), density, of, given, config["density_options"]), frame)


def _models_data(config: dict[str, Any]) -> bool:
    """Whether the members are densities (or ratios) of the data given the parameters."""
    return config.get("estimator") in ("NLE", "NRE")


def _shapes(members) -> list[list[int]]:
    return [list(np.shape(leaf)) for leaf in jax.tree.leaves(eqx.filter(members, eqx.is_array))]


def _history_to_json(history: History) -> dict[str, Any]:
    series = {name: getattr(history, name).tolist() for name in ("train", "validation")}
    rest = {name: getattr(history, name) for name in ("best_epoch", "stop_reason", "steps", "first_validation")}
    return series | rest


def _history_from_json(entry: dict[str, Any]) -> History:
    series = {name: np.asarray(entry[name], float) for name in ("train", "validation")}
    return History(**(entry | series))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
