r"""Conditional densities $q(\theta | c)$, each built by one function of the same signature.

Every constructor returns a FlowJAX distribution with `log_prob(theta, condition)`, one fast pass, and
`sample(key, shape, condition)`. Flows of the same architecture share their static parts, so that a training
step that is compiled once serves all of them.
"""

import functools
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from flowjax.bijections import (
    AbstractBijection,
    Affine,
    Chain,
    Coupling,
    Flip,
    Invert,
    Permute,
    RationalQuadraticSpline,
    Scan,
    Vmap,
)
from flowjax.distributions import AbstractDistribution, StandardNormal, Transformed
from paramax import Parameterize

from diffsbi._types import Key, check_key, check_names
from diffsbi.flows.autoregressive import Autoregressive
from diffsbi.flows.ramps import LogisticRamps

FIRST_OUTPUTS = 0.02  # a network's last layer is scaled by this, so that a new density is near a standard normal


def smooth_flow(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    layers: int | None = None,
    width: int = 64,
    depth: int = 2,
    ramps: int = 8,
    kind: str = "autoregressive",
    activation: str = "silu",
) -> AbstractDistribution:
    r"""Mixture-of-ramps flow: C∞ in its argument, its condition and its parameters. The default for scores.

    Args:
        key: Initial weights.
        dim: Dimension p of theta; 1 is allowed.
        condition_dim: Dimension of the condition; None for an unconditional density.
        layers: Number of layers; by default 3 autoregressive ones or 6 couplings.
        width: Hidden units of each conditioner.
        depth: Hidden layers of each conditioner.
        ramps: Ramps per transformer (`LogisticRamps`).
        kind: "autoregressive" (density in one pass, sampling in `dim`) or "coupling" (one pass for both).
        activation: Of the conditioners: "silu", "tanh" or "sin".

    Raises:
        ValueError: For sizes below 1, or an unknown `kind` or `activation`.
    """
    return _flow(key, dim, condition_dim, "ramps", ramps, kind, layers, width, depth, activation)


def masked_autoregressive(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    layers: int | None = None,
    width: int = 64,
    depth: int = 2,
    activation: str = "silu",
) -> AbstractDistribution:
    """FlowJAX's affine masked autoregressive flow (arXiv:1705.07057) with a smooth activation: silu, tanh, sin."""
    layers = layers or 5
    return _flow(key, dim, condition_dim, "affine", 0, "autoregressive", layers, width, depth, activation)


def coupling(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    layers: int | None = None,
    width: int = 64,
    depth: int = 2,
    activation: str = "silu",
) -> AbstractDistribution:
    """FlowJAX's affine coupling flow (RealNVP, arXiv:1605.08803) with a smooth activation: silu, tanh, sin."""
    return _flow(key, dim, condition_dim, "affine", 0, "coupling", layers or 8, width, depth, activation)


def spline_flow(
    key: Key,
    dim: int,
    condition_dim: int | None = None,
    *,
    layers: int | None = None,
    width: int = 64,
    depth: int = 2,
    knots: int = 8,
    kind: str = "coupling",
) -> AbstractDistribution:
    """Rational-quadratic spline flow on [−5, 5] (arXiv:1906.04032). NOT smooth: its score kinks at every knot."""
    return _flow(key, dim, condition_dim, "spline", knots, kind, layers, width, depth, "silu")


def _positive_exp(raw):
    return jnp.exp(4.0 * jnp.tanh(raw / 4.0))


def _affine() -> Affine:
    return eqx.tree_at(lambda a: a.scale, Affine(), Parameterize(_positive_exp, jnp.zeros(())))


_ACTIVATIONS: dict[str, Callable] = {"silu": jax.nn.silu, "tanh": jnp.tanh, "sin": jnp.sin}
_TRANSFORMERS: dict[str, Callable[[int], AbstractBijection]] = {
    "ramps": LogisticRamps,
    "affine": lambda _: _affine(),
    "spline": lambda knots: RationalQuadraticSpline(knots=knots, interval=5.0),
}
_DEFAULT_LAYERS = {"autoregressive": 3, "coupling": 6}


def _flow(key, dim, condition_dim, transformer, size, kind, layers, width, depth, activation):
    check_key(key)
    check_names([kind], list(_DEFAULT_LAYERS), "kind of flow")
    check_names([activation], list(_ACTIVATIONS), "activation")
    layers = _DEFAULT_LAYERS[kind] if layers is None else layers
    check_sizes(dim=dim, condition_dim=condition_dim, layers=layers, width=width, depth=depth)
    config = (dim, condition_dim, transformer, size, kind, layers, width, depth, activation)
    return with_shared_static(_build, key, config)


def check_sizes(**sizes: int | None) -> None:
    """Raise a ValueError that names the first size below 1; None is allowed."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1; got {value}.")


def small_network(key: Key, inputs: int, outputs: int | Literal["scalar"], width: int, depth: int) -> eqx.nn.MLP:
    """A silu network whose outputs are small to begin with."""
    network = eqx.nn.MLP(inputs, outputs, width, depth, activation=jax.nn.silu, key=key)
    last = lambda n: (n.layers[-1].weight, n.layers[-1].bias)  # noqa: E731
    return eqx.tree_at(last, network, replace_fn=lambda w: FIRST_OUTPUTS * w)


def with_shared_static(build: Callable[..., AbstractDistribution], key: Key, config: tuple) -> AbstractDistribution:
    """`build(key, *config)` with what is not an array shared by all densities of the configuration.

    A step that is compiled for one of them then serves all: FlowJAX and Equinox make fresh closures each time.
    """
    density = build(key, *config)
    if isinstance(jnp.zeros(()), jax.core.Tracer):  # inside jit: nothing may stay in the cache
        return density
    return eqx.combine(eqx.filter(density, eqx.is_array), _static(build, config, str(jnp.result_type(float))))


@functools.lru_cache(maxsize=64)
def _static(build, config, dtype: str):
    return eqx.partition(build(jax.random.key(0), *config), eqx.is_array)[1]


def _build(key, dim, condition_dim, transformer, size, kind, layers, width, depth, activation):
    transformer = _TRANSFORMERS[transformer](size)
    base = StandardNormal((dim,))
    if dim == 1 and condition_dim is None:  # nothing to condition on: the transformers' own parameters are learned
        stack = eqx.filter_vmap(lambda _: Vmap(_jittered(_, transformer), in_axes=eqx.if_array(0)))
        return Transformed(base, Invert(Scan(stack(jax.random.split(key, layers)))))
    network = {"nn_width": width, "nn_depth": depth, "nn_activation": _ACTIVATIONS[activation]}

    def layer(key):
        key_network, key_permutation = jax.random.split(key)
        shared = {"transformer": transformer, "dim": dim, "cond_dim": condition_dim, **network}
        if kind == "autoregressive":
            bijection = Autoregressive(key_network, **shared)
            last = _last_of_autoregressive
        else:
            bijection = Coupling(key_network, untransformed_dim=dim // 2, **shared)
            last = _last_of_coupling
        return _permuted(eqx.tree_at(last, bijection, replace_fn=lambda w: FIRST_OUTPUTS * w), kind, key_permutation)

    with jax.numpy_rank_promotion("allow"):  # FlowJAX builds its masks so
        return Transformed(base, Invert(Scan(eqx.filter_vmap(layer)(jax.random.split(key, layers)))))


def _last_of_autoregressive(bijection):
    layer = bijection.masked_autoregressive_mlp.layers[-1]
    return layer.weight.args[1], layer.bias  # the weight is wrapped in its mask


def _last_of_coupling(bijection):
    layer = bijection.conditioner.layers[-1]
    return layer.weight, layer.bias


def _permuted(bijection: AbstractBijection, kind: str, key: Key) -> AbstractBijection:
    (dim,) = bijection.shape
    if dim == 1:
        return bijection
    if dim == 2 or kind == "autoregressive":
        return Chain([bijection, Flip((dim,))])  # type: ignore[call-arg]
    return Chain([bijection, Permute(jax.random.permutation(key, dim))])


def _jittered(key: Key, transformer: AbstractBijection) -> AbstractBijection:
    """One-vector of transformers with slightly random parameters, so that no two ramps start alike."""
    arrays, static = eqx.partition(transformer, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(arrays)
    keys = jax.random.split(key, len(leaves))
    moved = [a[None] + 0.05 * jax.random.normal(k, (1, *a.shape)) for a, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(tree, moved), static)
