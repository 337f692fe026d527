r"""The joint `log p(theta, z, x)`, written once: simulations, scores and posteriors all come from it."""

import abc
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpyro.distributions import Distribution
from tqdm.auto import tqdm

from diffsbi._types import Array, Float, Key, check_key, check_names, check_trailing
from diffsbi.prior import Prior
from diffsbi.simulators.averaging import LOW_ACCEPTANCE, average_score, best_steps

_PILOT = 2**32 - 1  # folded into the key of `draw` for simulations that are nobody's rows
_CHAIN = 2**32 - 2  # folded into a row's key for its chain of latents


class Draws(eqx.Module):
    """Simulations: `theta (n, p)`, `x (n, ...)`, `score (n, p)` or None, `latents (n, ...)` or None."""

    theta: Array
    x: Array
    score: Array | None
    latents: Array | None
    names: tuple[str, ...] = eqx.field(static=True)

    def __len__(self) -> int:
        return self.theta.shape[0]


class AbstractTransport(eqx.Module):
    r"""A smooth change of latent coordinates $z = T(\xi; \theta, x)$ and its log-determinant.

    The joint in $\xi$ is $\log p(\theta, T(\xi), x) + \log|\det \partial T/\partial\xi|$: the same posterior
    of theta in every coordinate, and an unbiased score in each (Fisher's identity).
    """

    @abc.abstractmethod
    def to_latents(self, state: Any, xi: Array, x: Array) -> tuple[Array, Array]:
        r"""$(T(\xi; \theta, x), \log|\det \partial T / \partial \xi|)$."""

    @abc.abstractmethod
    def from_latents(self, state: Any, z: Array, x: Array) -> tuple[Array, Array]:
        r"""$(T^{-1}(z; \theta, x), \log|\det \partial T^{-1} / \partial z|)$."""


class Identity(AbstractTransport):
    """The simulator's own latents."""

    def to_latents(self, state, xi, x):
        return xi, jnp.zeros(())

    def from_latents(self, state, z, x):
        return z, jnp.zeros(())


class AbstractSimulator(eqx.Module):
    """A simulator with a differentiable joint: a prior, latents given theta, data given both.

    A user's own simulator subclasses this, gives `prior` as a field, and writes `latents` and `likelihood`
    for ONE draw, with NumPyro distributions whose `event_shape` is the whole array. Everything else follows.
    """

    prior: eqx.AbstractVar[Prior]

    @abc.abstractmethod
    def latents(self, state: Any) -> Distribution:
        """p(z | theta); `state` is `setup(theta)`, that is theta itself unless `setup` is written."""

    @abc.abstractmethod
    def likelihood(self, state: Any, z: Array) -> Distribution:
        """p(x | theta, z); `state` as in `latents`."""

    def setup(self, theta: Float[Array, " p"]) -> Any:
        """What latents, likelihood and transports share and is computed once for each theta; theta by default."""
        return theta

    def transports(self) -> Mapping[str, AbstractTransport]:
        """The latent coordinates on offer, by name; `"white"` is the simulator's own."""
        return {"white": Identity()}

    @property
    def names(self) -> tuple[str, ...]:
        return self.prior.names

    @property
    def fiducial(self) -> Float[Array, " p"]:
        return self.prior.fiducial

    def transport(self, latents: str = "white") -> AbstractTransport:
        """The named latent coordinate."""
        offered = self.transports()
        check_names([latents], list(offered), "latent coordinate")
        return offered[latents]

    def best_latents(self, latents: str | None = None) -> str:
        """The coordinate asked for, which must be on offer; else "whitened" where there is one, and "white"."""
        latents = latents or ("whitened" if "whitened" in self.transports() else "white")
        self.transport(latents)
        return latents

    def log_conditional(self, theta: Float[Array, " p"], z: Array, x: Array, *, latents: str = "white") -> Array:
        r"""$\log p(x, z | \theta)$ of one draw, `z` given in the coordinate `latents`."""
        return self.log_conditional_of(self.setup(theta), z, x, self.transport(latents))

    def log_conditional_of(self, state: Any, xi: Array, x: Array, transport: AbstractTransport) -> Array:
        r"""$\log p(x, \xi | \theta)$ of one draw, given `setup(theta)` and a coordinate."""
        z, log_det = transport.to_latents(state, xi, x)
        return jnp.sum(self.latents(state).log_prob(z)) + jnp.sum(self.likelihood(state, z).log_prob(x)) + log_det

    def log_joint(self, theta: Float[Array, " p"], z: Array, x: Array, *, latents: str = "white") -> Array:
        r"""$\log p(\theta, z, x)$ of one draw, prior included, `z` given in the coordinate `latents`."""
        return self.prior.log_prob(theta) + self.log_conditional(theta, z, x, latents=latents)

    def score(
        self,
        theta: Float[Array, " p"],
        z: Array,
        x: Array,
        *,
        with_prior: bool = False,
        latents: str = "white",
        n_average: int = 1,
        n_steps: int = 2,
        key: Key | None = None,
    ) -> Float[Array, " p"]:
        r"""The joint score $\nabla_\theta \log p(x, \xi | \theta)$ of ONE draw (prior's gradient added on request).

        `z` is the draw's own (white) latent; it is moved to the coordinate `latents` before the gradient is
        taken at fixed $\xi$. In every coordinate its mean given (theta, x) is the marginal score
        $\nabla_\theta \log p(x | \theta)$; its variance differs. With `n_average` > 1 it is averaged over as many
        states of a chain of the latents (`averaging.average_score`), which `key` draws.
        """
        check_trailing("theta", theta, (self.prior.dim,))
        _check_average(n_average, n_steps)
        if n_average > 1:
            if key is None:
                raise ValueError(f"Expected a key, for the chain of {n_average} latents; got None.")
            theta = jnp.asarray(theta, jnp.result_type(float))
            score, _ = average_score(
                self, theta, z, x, check_key(key), latents=latents, n_average=n_average, n_steps=n_steps
            )
            return score + jax.grad(self.prior.log_prob)(theta) if with_prior else score
        xi, _ = self.transport(latents).from_latents(self.setup(theta), z, x)
        density = self.log_joint if with_prior else self.log_conditional
        return jax.grad(lambda t: density(t, xi, x, latents=latents))(jnp.asarray(theta))

    def draw_one(self, key: Key, theta: Float[Array, " p"] | None = None) -> tuple[Array, Array, Array]:
        """(theta, z, x) of one draw from the joint, or at the given theta (`draw` always gives it)."""
        key_theta, key_z, key_x = jax.random.split(key, 3)
        theta = self.prior.sample(key_theta) if theta is None else theta
        state = self.setup(theta)
        z = self.latents(state).sample(key_z)
        return theta, z, self.likelihood(state, z).sample(key_x)

    def draw(
        self,
        key: Key,
        n: int,
        theta=None,
        *,
        with_score: bool = True,
        latents: str = "white",
        n_average: int = 1,
        n_steps: int | None = None,
        keep_latents: bool = False,
        start: int = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Draws:
        """Draw `n` simulations; row `i` depends on `key` and `start + i` alone, whatever the batch size.

        Args:
            key: A typed JAX key.
            n: Number of simulations.
            theta: None to draw from the prior, else one parameter vector `(p,)` or one for each row `(n, p)`.
            with_score: Also return the joint score in the coordinate `latents`.
            latents: Latent coordinate of the score.
            n_average: States of a chain of the latents that the score is averaged over: less noise, the same mean;
                each but the first takes two gradients.
            n_steps: Steps in a quarter turn of their trajectories, by default chosen once for `key`
                (`averaging_steps`): more are shorter, and lead to likelier states. 4 `n_steps` states are once around.
            keep_latents: Also return the (white) latents.
            start: Number of the first row: `draw(key, 5, start=10)` gives rows 10 to 14 of `draw(key, 15)`.
            batch_size: Most rows that are computed per call; by default what fits 64 MiB, at most 128.
            progress: Show a progress bar.

        Raises:
            ValueError: If `n` or `batch_size` < 1, or theta is of the wrong shape or outside the prior's support.
        """
        check_key(key)
        if n < 1:
            raise ValueError(f"Expected n >= 1 simulations; got {n}.")
        if theta is not None:
            theta = _rows_of_theta(self.prior, theta, n)
        self.transport(latents)
        _check_average(n_average, 1 if n_steps is None else n_steps)
        average = None
        if with_score and n_average > 1:
            n_steps = self.averaging_steps(key, latents, batch_size) if n_steps is None else n_steps
            average = (n_average, n_steps)
        options = dict(with_score=with_score, latents=latents, average=average, keep_latents=keep_latents)
        blocks = []
        with tqdm(total=n, disable=not progress, desc="simulate", unit="sim") as bar:
            for block in self._blocks(key, start, n, theta, batch_size, **options):
                blocks.append(block)
                bar.update(len(block[-1]))
        *out, acceptance = jax.tree.map(lambda *b: jnp.asarray(np.concatenate(b)), *blocks)
        if jnp.mean(acceptance) < LOW_ACCEPTANCE:
            warnings.warn(
                f"The states of the latents' chains have {jnp.mean(acceptance):.0%} of the weight of their start: the "
                f"scores are unbiased but have hardly less noise. Try more steps than n_steps={n_steps}, or other "
                f"latents than {latents!r}.",
                stacklevel=3,
            )
        return Draws(*out, names=self.names)

    def averaging_steps(self, key: Key, latents: str = "white", batch_size: int | None = None) -> int:
        """`n_steps` of `draw(..., n_average=K)`: steps are as long as acceptance pays for, on 16 prior draws.

        They depend on `key` and `latents` alone, and on no simulation that `draw` returns.
        """
        key, options = jax.random.fold_in(check_key(key), _PILOT), dict(latents=latents, keep_latents=False)

        def acceptance_with(n_steps: int) -> float:
            blocks = self._blocks(key, 0, 16, None, batch_size, with_score=True, average=(2, n_steps), **options)
            return float(np.mean(np.concatenate([acceptance for *_, acceptance in blocks])))

        return best_steps(acceptance_with)

    def _blocks(self, key, start, n, theta, batch_size, *, average, **options) -> Iterator[list]:
        """[theta, x, score, latents, acceptance] of n rows, block by block.

        Blocks are of one size, of which the last is not filled: within that no n is compiled anew, nor other `average`.
        """
        shapes = draw_shapes(self)
        fit = _rows_that_fit(shapes)
        size = fit if batch_size is None else min(batch_size, max(n, fit))
        if size < 1:
            raise ValueError(f"Expected batch_size >= 1; got {batch_size}.")
        options |= dict(average=None if average is None else jnp.asarray(average), shapes=shapes, size=size)
        for first in range(0, n, size):
            count = min(size, n - first)
            number = jnp.asarray(start + first)
            if theta is None:
                of_rows = _theta_of_rows(self.prior, key, number, size)
            else:
                of_rows = jnp.asarray(theta[np.minimum(np.arange(first, first + size), n - 1)])
            rows = _draw_rows(self, key, number, jnp.asarray(count), of_rows, **options)
            yield jax.tree.map(lambda a, count=count: np.asarray(a)[:count], rows)


def _rows_that_fit(shapes, budget: int = 2**26) -> int:
    _, z, x = shapes
    return int(max(1, min(128, budget // (4 * (z.size + x.size)))))


def _check_average(n_average: int, n_steps: int) -> None:
    if n_average < 1 or n_steps < 1:
        raise ValueError(f"Expected n_average >= 1 and n_steps >= 1; got {n_average} and {n_steps}.")


def _rows_of_theta(prior: Prior, theta, n: int) -> np.ndarray:
    theta = np.asarray(theta, jnp.result_type(float))
    if theta.shape not in ((prior.dim,), (n, prior.dim)):
        raise ValueError(f"Expected theta with shape ({prior.dim},) or ({n}, {prior.dim}); got {theta.shape}.")
    prior.check(theta)
    return np.broadcast_to(theta, (n, prior.dim))


@eqx.filter_jit
def _theta_of_rows(prior, key, start, size):
    """What `draw_one` draws from the prior for these rows: with theta given, it is one program in either case."""
    at_least_two = jnp.arange(max(size, 2))  # a loop of one is unrolled and compiled differently, to other last bits
    keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(key, start + k), 3)[0])(at_least_two)
    return jax.lax.map(prior.sample, keys)[:size]


@eqx.filter_jit
def _draw_rows(sim, key, start, count, theta, *, with_score, latents, average, keep_latents, shapes, size):
    """The first `count` of `size` rows, one after the other: bit for bit the same rows in every batch size."""

    def row(k):
        key_row = jax.random.fold_in(key, start + k)
        t, z, x = sim.draw_one(key_row, theta[k])
        score, acceptance = None, jnp.ones(())
        if with_score and average is None:
            score = sim.score(t, z, x, latents=latents)
        elif with_score:
            key_chain = jax.random.fold_in(key_row, _CHAIN)
            score, acceptance = average_score(
                sim, t, z, x, key_chain, latents=latents, n_average=average[0], n_steps=average[1]
            )
        return [t, x, score, z if keep_latents else None, acceptance]  # as `rows` below

    of_theta, of_z, of_x = shapes
    empty = lambda of: jnp.zeros((size, *of.shape), of.dtype)  # noqa: E731
    score, latents_of_rows = empty(of_theta) if with_score else None, empty(of_z) if keep_latents else None
    rows = [theta, empty(of_x), score, latents_of_rows, jnp.zeros(size)]
    set_row = lambda k, rows: jax.tree.map(lambda a, of_row: a.at[k].set(of_row), rows, row(k))  # noqa: E731
    return jax.lax.fori_loop(0, count, set_row, rows)


def draw_shapes(sim: AbstractSimulator) -> tuple[Any, Any, Any]:
    """Shapes and types of the (theta, z, x) of one draw; traced once for all simulators of one structure."""
    arrays, rest = eqx.partition(sim, eqx.is_array)
    leaves, structure = jax.tree.flatten(rest)
    return _one_draw.eval_shape(arrays, tuple(leaves), structure)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _one_draw(arrays, leaves, structure):
    return eqx.combine(arrays, jax.tree.unflatten(structure, leaves)).draw_one(jax.random.key(0))
