"""A masked autoregressive layer that is quick to invert."""

import jax
import jax.numpy as jnp
from flowjax.bijections import MaskedAutoregressive


class Autoregressive(MaskedAutoregressive):
    """FlowJAX's layer, inverted one coordinate at a time.

    FlowJAX evaluates all outputs of the network and inverts all coordinates in each of the `dim` passes, and keeps one:
    `dim` times the work, most of it in transformers without a closed inverse (`LogisticRamps`).
    """

    def inverse_and_log_det(self, y, condition=None):
        rows = jnp.arange(self.shape[0])

        def invert(x, rank):
            transformer = self.transformer_constructor(self._parameters(x, condition, rank))
            return x.at[rank].set(transformer.inverse(y[rank])), None

        x, _ = jax.lax.scan(invert, jnp.zeros_like(y), rows)
        return x, -self.transform_and_log_det(x, condition)[1]

    def _parameters(self, x, condition, rank):
        """Those of one coordinate's transformer, which depend on the coordinates before it."""
        hidden = x if condition is None else jnp.hstack((x, condition))
        *layers, last = self.masked_autoregressive_mlp.layers
        for layer in layers:
            hidden = self.masked_autoregressive_mlp.activation(layer(hidden))
        weight, bias = (a.reshape(self.shape[0], -1, *a.shape[1:])[rank] for a in (last.weight, last.bias))
        return weight @ hidden + bias
