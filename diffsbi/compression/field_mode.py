"""Posteriors of lensing maps as normals: the mode of the Gaussian-field likelihood, found for every map."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, checked_rows
from diffsbi.inference.frames import pack_frame
from diffsbi.sampling.gaussian_field import approximate_posterior
from diffsbi.simulators.lensing import LensingMaps


class GaussianFieldMode(eqx.Module):
    r"""$x \to$ the normal approximation of $p(\theta | x)$ that takes the maps for Gaussian fields, 27 numbers.

    Mode and curvature of the likelihood of all modes' powers with the latents integrated out
    (`sampling.gaussian_field.GaussianFieldLikelihood`) under a normal with the moments of the prior in unconstrained
    space, by damped Fisher scoring, as `pack_frame`. It needs neither simulations nor gradients of the map. JAX cannot
    trace it: it is no `summary` of `rounds`. What is not Gaussian is left out: `NPE(sim, framed=True)` learns it, about
    a posterior that it need not find first. `LaplaceMode` does so for simulators with few latents.

    Args:
        sim: The survey.

    Raises:
        TypeError: Another simulator.
    """

    sim: LensingMaps

    def __init__(self, sim: LensingMaps):
        if not isinstance(sim, LensingMaps):
            raise TypeError(f"Expected a LensingMaps; got {type(sim).__name__}.")
        self.sim = sim

    def __call__(self, x: Float[Array, "bins n n"]) -> Float[Array, " k"]:
        """The numbers of one map."""
        return self.many(jnp.asarray(x)[None])[0]

    def many(self, x, *, progress: bool = False) -> Float[Array, "m k"]:
        """The numbers of every row of `x`.

        Raises:
            ValueError: Rows of another shape than the survey's maps, or not finite.
        """
        x = checked_rows(x, (self.sim.n_bins, self.sim.n_pix, self.sim.n_pix))
        rows = tqdm(x, desc=type(self).__name__, unit="map", disable=not progress)
        mean, root = (
            np.stack(parts) for parts in zip(*(approximate_posterior(self.sim, row) for row in rows), strict=True)
        )
        return pack_frame(*(jnp.asarray(a, x.dtype) for a in (mean, root)))
