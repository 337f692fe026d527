"""Linear maps of trailing axes as JAX primitives whose transposes are given, not derived."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def linear_primitive(name: str, function: Callable) -> Primitive:
    """A primitive that applies the linear `function` of trailing axes; leading axes are batch axes."""
    primitive = Primitive(name)
    primitive.def_impl(jax.jit(function))
    primitive.def_abstract_eval(lambda aval: aval.update(**_shape_of(function, aval)))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))

    def batch(arguments, axes):
        return primitive.bind(jnp.moveaxis(arguments[0], axes[0], 0)), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


def set_transpose(primitive: Primitive, transpose: Primitive) -> None:
    """Declare `transpose` the transpose of `primitive`, in both directions of differentiation."""
    ad.deflinear2(primitive, lambda cotangent, _: [transpose.bind(ad.instantiate_zeros(cotangent))])


def _shape_of(function, aval):
    out = jax.eval_shape(function, jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return {"shape": out.shape, "dtype": out.dtype}
