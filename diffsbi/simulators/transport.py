r"""Latent coordinates of Gaussian-driven fields: the Wiener whitening of the linearised map."""

import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array
from diffsbi.simulators.base import AbstractTransport
from diffsbi.simulators.fields import (
    cholesky,
    fold,
    hartley,
    lower_inverse,
    lower_times,
    mode_weights,
    unfold,
    unstack,
    upper_times,
)


class WienerWhitening(AbstractTransport):
    r"""$z = R^{-T}(\xi + R^{-1} A^T \sigma^{-1} \hat x)$ per mode, $\log|\det| = -\sum_k\sum_i \ln R_{ii}$.

    With $A = \sigma^{-1}\,\mathrm{diag}(\lambda) L$ the response of the data, in units of the noise, to the white
    latents of a mode, and $I + A^T A = R R^T$, this is the posterior of z given the *linearised* map: there
    $\xi \sim N(0, 1)$ exactly; for a log-normal map nearly so, and nearly independent of theta.
    """

    noise: Array

    def to_latents(self, state, xi, x):
        response, inverse, log_det, data = self._modes(state, x)
        source = lower_times(inverse, upper_times(response, data))
        z = upper_times(inverse, [a + b for a, b in zip(unstack(fold(xi)), source, strict=True)])
        return unfold(jnp.stack(z)), -log_det

    def from_latents(self, state, z, x):
        response, inverse, log_det, data = self._modes(state, x)
        # R^T z = R^{-1} (1 + A^T A) z: no second triangular factor is needed.
        z = unstack(fold(z))
        residual = [a - b for a, b in zip(lower_times(response, z), data, strict=True)]
        xi = lower_times(inverse, [a + b for a, b in zip(z, upper_times(response, residual), strict=True)])
        return unfold(jnp.stack(xi)), log_det

    def _modes(self, state, x):
        """A, R^{-1}, the sum of log R_ii over all modes, and the whitened data's modes."""
        scale = state.response / self.noise
        response = tuple(tuple(scale[i] * a for a in row) for i, row in enumerate(state.factor))
        n = len(response)
        gram = [
            sum(response[k][i] * response[k][j] for k in range(j, n)) + float(i == j)
            for i, j in zip(*np.triu_indices(n), strict=True)
        ]
        inverse = lower_inverse(cholesky(gram, n))
        diagonal = sum(jnp.log(inverse[i][i]) for i in range(n))
        weights = jnp.asarray(mode_weights(2 * (len(diagonal) - 1)), diagonal.dtype)
        return response, inverse, -jnp.sum(weights * diagonal), unstack(fold(hartley(x / self.noise[:, None, None])))
