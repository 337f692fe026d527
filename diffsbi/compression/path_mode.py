"""Each data set's own posterior as a normal, from a short path of marginal scores."""

import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, checked_rows
from diffsbi.inference.frames import pack_frame
from diffsbi.sampling.blocks import START, BlockStore, array_digest
from diffsbi.sampling.full_field import starting_frame
from diffsbi.sampling.path import check_lengths, path_posterior
from diffsbi.sampling.walk import PathError
from diffsbi.simulators.base import AbstractSimulator, draw_shapes

RETRIES = 2  # of a path that fails, each with twice as many turns as the last


class PathMode(eqx.Module):
    r"""$x \to$ the normal of a short `sampling.path_posterior` of every data set, as `pack_frame`.

    The path integrates marginal scores of the data themselves over exact draws of the latents, so that nothing is left
    out but what is not normal, the noise of the scores, and posteriors that the path has not found:
    `NPE(sim, framed=True)` learns these, from few simulations. It costs hundreds of gradients a data set (lensing maps
    of 64²: 500 to 1 000, some 2 s on one core); `GaussianFieldMode` costs none and knows less.

    The momenta are the same for all data: a function of x, whose error is partly common to all. A path that fails is
    tried again with more turns; if that fails too its numbers are those of the path's start (the Gaussian-field
    posterior of lensing maps, else the prior), with a warning. JAX cannot trace it: it is no `summary` of `rounds`.

    Args:
        sim: Any simulator whose latents are near a standard normal in the coordinate `latents`.
        n_points: The most points of each path, in whole rounds of 2 p (six at least).
        n_turns: Averaged at each point.
        until_error: A path ends, after three rounds at least, when means and widths are known to so many standard
            deviations; None to take all points.
        latents: As `path_posterior`.
        seed: Of the momenta and the points.

    Raises:
        ValueError: Fewer points than two rounds, fewer turns than one, an error that is not positive, or an unknown
            coordinate.
    """

    sim: AbstractSimulator
    n_points: int = eqx.field(static=True)
    n_turns: int = eqx.field(static=True)
    until_error: float | None = eqx.field(static=True)
    latents: str = eqx.field(static=True)
    seed: int = eqx.field(static=True)

    def __init__(
        self,
        sim,
        *,
        n_points: int = 72,
        n_turns: int = 2,
        until_error: float | None = 0.25,
        latents: str | None = None,
        seed: int = 0,
    ):
        check_lengths(sim.prior.dim, n_points, n_turns, until_error)
        self.sim, self.n_points, self.n_turns, self.seed = sim, int(n_points), int(n_turns), int(seed)
        self.until_error, self.latents = until_error, sim.best_latents(latents)

    def __call__(self, x: Array) -> Float[Array, " k"]:
        """The numbers of one data set."""
        return self.many(jnp.asarray(x)[None])[0]

    def many(self, x, *, folder=None, progress: bool = False) -> Float[Array, "m k"]:
        """The numbers of every row of `x`.

        Args:
            x: Rows of data.
            folder: Where the numbers of each row are kept; a call with the same rows goes on from there.
            progress: Show a progress bar.

        Raises:
            ValueError: Rows of another shape than the simulator's data, or not finite; a folder of other rows or
                another simulator.
        """
        x = checked_rows(x, draw_shapes(self.sim)[2].shape)
        store = BlockStore(Path(folder), self._about(x)) if folder else None
        found = []
        for k, row in enumerate(tqdm(x, desc=type(self).__name__, unit="row", disable=not progress)):
            kept = store.read(0, k) if store else None
            if kept is None:
                kept = self._one(row)
                if store:
                    store.write(0, k, kept, ())
            found.append(kept)
        if failed := [k for k, one in enumerate(found) if one["gradients"] == 0]:
            why = found[failed[0]]["why"].tobytes().decode()
            warnings.warn(
                f"The paths of {len(failed)} of {len(x)} rows failed: their numbers are those of the path's start. The "
                f"first is row {failed[0]}: {why}",
                stacklevel=2,
            )
        return pack_frame(*(jnp.asarray(np.stack([one[name] for one in found]), x.dtype) for name in ("mean", "root")))

    def _about(self, x) -> dict[str, Any]:
        names = ("n_points", "n_turns", "until_error", "latents", "seed")
        about: dict[str, Any] = dict(compressor=type(self).__name__, simulator=type(self.sim).__name__)
        about |= dict(names=list(self.sim.names), data=array_digest(np.asarray(x)))
        about |= {name: getattr(self, name) for name in names}
        return about | {START: np.asarray(_at_a_draw(self.sim, x[0]), float).tolist()}

    def _one(self, x) -> dict[str, np.ndarray]:
        """Mean and root of one data set's normal; no gradients where these are only the path's start."""
        key = jax.random.key(self.seed)
        for trial in range(RETRIES + 1):
            settings = dict(n_points=self.n_points, n_turns=self.n_turns * 2**trial, until_error=self.until_error)
            try:
                with warnings.catch_warnings():  # errors, and latents that lag behind, are part of what NPE learns
                    warnings.simplefilter("ignore", UserWarning)
                    where = jax.random.fold_in(key, trial)
                    found = path_posterior(self.sim, x, where, latents=self.latents, **settings)
            except PathError as failed:  # told in `many`, of all rows together
                why = str(failed)
                continue
            mean, root = found.normal()
            return dict(mean=mean, root=root, gradients=np.asarray(found.gradients))
        mean, root = starting_frame(self.sim, x)
        note = np.frombuffer(why.encode(), np.uint8)
        return dict(mean=np.asarray(mean, float), root=np.asarray(root, float), gradients=np.asarray(0), why=note)


@eqx.filter_jit
def _at_a_draw(sim, x) -> Float[Array, " p_and_1"]:
    """The joint of the data and of parameters and latents of the simulator's own: tells it from any other."""
    theta, z, _ = sim.draw_one(jax.random.key(0))
    return jnp.append(theta, sim.log_joint(theta, z, x))
