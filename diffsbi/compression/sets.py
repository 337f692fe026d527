r"""Networks for sets: what is said of each member, and how it is pooled; deep sets as baselines; maps as sets."""

import abc
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float, Key, check_key

POOLS = ("sum", "mean", "max")


class AbstractSetNetwork(eqx.Module):
    """Members → anything per member, and anything per member with a mask → (score t, Fisher matrix F)."""

    additive: eqx.AbstractClassVar[bool]

    @abc.abstractmethod
    def members(self, x):
        """What is said of each member: x `(n, *event)` → a pytree whose leaves have n rows."""

    @abc.abstractmethod
    def pooled(self, found, mask: Float[Array, " n"]) -> tuple[Float[Array, " p"], Float[Array, "p p"]]:
        """t and F of those members where `mask` is True."""


class MemberNetwork(eqx.Module):
    r"""One member → $(t_i, F_i)$, from a linear map beside a perceptron of its features.

    "residual" writes $F_i = A_i A_i^T$ and $t_i = A_i r_i$, as the score of a normal member is its whitened
    derivative times its whitened residual; A and r share a positive scale $e^{s_i}$. A is any square root of F_i:
    a Cholesky factor is the same up to a rotation, but not continuous where $F_i$ is singular ($F_i = v v^T$ has
    the factor $v\,\mathrm{sign}(v_1)$), and members of few data have just such matrices. "cholesky" is the published
    form: $t_i$ free, $F_i = L_i L_i^T$, L lower triangular, its diagonal through a softplus.

    Args:
        key: Initial weights.
        n_in: Features of a member (of `embed`'s output, where there is one).
        dim: Parameters p.
        width: Hidden units.
        depth: Hidden layers; 0 for the linear map alone.
        form: "residual" or "cholesky".
        embed: A network, trained too, from one member to its features; None flattens the member.
    """

    linear: eqx.nn.Linear
    mlp: eqx.nn.MLP | None
    embed: Callable | None
    dim: int = eqx.field(static=True)
    form: str = eqx.field(static=True)

    def __init__(
        self,
        key: Key,
        n_in: int,
        dim: int,
        *,
        width: int = 32,
        depth: int = 2,
        form: Literal["residual", "cholesky"] = "residual",
        embed: Callable | None = None,
    ):
        if min(n_in, dim, width) < 1 or depth < 0:
            got = f"{n_in}, {dim}, {width} and {depth}"
            raise ValueError(f"Expected n_in >= 1, dim >= 1, width >= 1 and depth >= 0; got {got}.")
        if form not in ("residual", "cholesky"):
            raise ValueError(f"Expected form 'residual' or 'cholesky'; got {form!r}.")
        key_linear, key_mlp = jax.random.split(check_key(key))
        n_out = dim + (dim * dim + 1 if form == "residual" else dim * (dim + 1) // 2)
        linear = eqx.nn.Linear(n_in, n_out, key=key_linear)
        weight, bias = 0.3 * linear.weight, jnp.zeros(n_out).at[-1].set(-1.0 if form == "residual" else 0.0)
        self.linear = eqx.tree_at(lambda m: (m.weight, m.bias), linear, (weight, bias))
        self.mlp = residual_mlp(key_mlp, n_in, n_out, width, depth)
        self.embed, self.dim, self.form = embed, dim, form

    def __call__(self, x: Array) -> tuple[Float[Array, " p"], Float[Array, "p p"]]:
        x = jnp.ravel(x) if self.embed is None else self.embed(x)
        out = self.linear(x)
        out = out if self.mlp is None else out + self.mlp(x)
        first, rest = out[: self.dim], out[self.dim :]
        if self.form == "residual":
            root, scale = rest[:-1].reshape(self.dim, self.dim), jnp.exp(2 * rest[-1])
            return scale * (root @ first), scale * (root @ root.T)
        lower = triangle(rest, self.dim)
        return first, lower @ lower.T


class AbstractFisherSum(AbstractSetNetwork):
    r"""$t = \sum_i t_i$ and $F = \sum_i F_i$ of members $(t_i, F_i)$."""

    additive = True

    def pooled(self, found, mask):
        score, fisher = found
        mask = mask.astype(score.dtype)
        return mask @ score, jnp.tensordot(mask, fisher, 1)


class FisherSum(AbstractFisherSum):
    """The sum over members that know nothing of each other."""

    member: MemberNetwork

    def members(self, x):
        return jax.vmap(self.member)(x)


class DeepSet(AbstractSetNetwork):
    r"""Baseline (Zaheer et al. 2017, arXiv:1703.06114): sum, mean or largest of a member's features, then a network.

    As many features as hidden units; the second network returns t and a Cholesky factor of F.
    """

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP
    dim: int = eqx.field(static=True)
    pool: str = eqx.field(static=True)
    additive = False

    def __init__(self, key: Key, n_in: int, dim: int, pool: str, *, width: int = 32, depth: int = 2):
        if pool not in POOLS:
            raise ValueError(f"Expected pool to be one of {list(POOLS)}; got {pool!r}.")
        keys = jax.random.split(check_key(key))
        self.encoder = eqx.nn.MLP(n_in, width, width, depth, jax.nn.silu, key=keys[0])
        self.decoder = eqx.nn.MLP(width, dim + dim * (dim + 1) // 2, width, depth, jax.nn.silu, key=keys[1])
        self.dim, self.pool = dim, pool

    def members(self, x):
        return jax.vmap(lambda one: self.encoder(jnp.ravel(one)))(x)

    def pooled(self, found, mask):
        out = self.decoder(pool_rows(found, mask, self.pool))
        lower = triangle(out[self.dim :], self.dim)
        return out[: self.dim], lower @ lower.T


def pool_rows(rows: Float[Array, "n d"], mask: Float[Array, " n"], pool: str) -> Float[Array, " d"]:
    """Sum, mean or largest of the rows where `mask` is True; zeros where it nowhere is."""
    there = mask[:, None]
    if pool == "max":
        return jnp.where(mask.any(), jnp.max(jnp.where(there, rows, -jnp.inf), 0), 0.0)
    total = jnp.sum(jnp.where(there, rows, 0.0), 0)
    return total / jnp.maximum(jnp.sum(mask), 1) if pool == "mean" else total


def residual_mlp(key: Key, n_in: int, n_out: int, width: int, depth: int) -> eqx.nn.MLP | None:
    """A smooth perceptron that starts small beside a linear map; None for depth 0."""
    if depth == 0:
        return None
    mlp = eqx.nn.MLP(n_in, n_out, width, depth, jax.nn.silu, key=key)
    return eqx.tree_at(lambda m: m.layers[-1].weight, mlp, 0.3 * mlp.layers[-1].weight)


def triangle(entries: Float[Array, " k"], dim: int) -> Float[Array, "p p"]:
    """Lower triangle of p (p + 1) / 2 numbers, its diagonal made positive by a softplus."""
    lower = jnp.zeros((dim, dim), entries.dtype).at[np.tril_indices(dim)].set(entries)
    return jnp.where(np.eye(dim, dtype=bool), jax.nn.softplus(lower), lower)


def cholesky(matrix: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Lower Cholesky factor, written out for few parameters: XLA fuses it over thousands of small matrices."""
    p = len(matrix)
    if p > 8:
        return jnp.linalg.cholesky(matrix)
    rows: list[list[Array]] = []
    for i in range(p):
        row: list[Array] = []
        for j in range(i + 1):
            rest = matrix[i, j] - sum((a * b for a, b in zip(row, rows[j] if j < i else row, strict=False)), 0.0)
            row.append(jnp.sqrt(rest) if i == j else rest / rows[j][j])
        rows.append(row)
    zero = jnp.zeros((), matrix.dtype)
    return jnp.stack([jnp.stack(row + [zero] * (p - len(row))) for row in rows])


def solve_lower(lower: Float[Array, "p p"], b: Float[Array, " p"]) -> Float[Array, " p"]:
    """$L^{-1} b$ by forward substitution, written out for few parameters."""
    if len(b) > 8:
        return jax.scipy.linalg.solve_triangular(lower, b, lower=True)
    found: list[Array] = []
    for i in range(len(b)):
        found.append((b[i] - sum((lower[i, j] * found[j] for j in range(i)), 0.0)) / lower[i, i])
    return jnp.stack(found)


def patches(x: Float[Array, "*bins n n"], size: int) -> Float[Array, "patches *bins s s"]:
    """A map as a set: its non-overlapping squares of `size` pixels, row by row, each with all bins.

    Raises:
        ValueError: Unless the last two dimensions are equal and a multiple of `size`.
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or size < 1 or x.shape[-1] % size:
        raise ValueError(f"Expected x (*bins, n, n) with n a multiple of size; got {x.shape} and size {size}.")
    bins, m = x.shape[:-2], x.shape[-1] // size
    cut = jnp.moveaxis(x.reshape(*bins, m, size, m, size), (-4, -2), (0, 1))
    return cut.reshape(m * m, *bins, size, size)


def check_set(x, mask, event: tuple[int, ...], *, batch: bool = False, empty: bool = False) -> tuple[Array, Array]:
    """x `(n, *event)` and its mask as arrays, checked; `(sets, n, *event)` with `batch`.

    Args:
        x: Members.
        mask: True where there is a member; None for all.
        event: Shape of a member.
        batch: Whether there are several sets.
        empty: Whether a set may have no members.

    Raises:
        ValueError: For wrong shapes; where the numbers are known (not inside jit) for sets without members and for
            members that are not finite.
    """
    leading = 1 + batch
    what = ("sets, members" if batch else "members") + "".join(f", {n}" for n in event)
    if np.ndim(x) != leading + len(event) or np.shape(x)[leading:] != event:
        raise ValueError(f"Expected x of shape ({what}); got {np.shape(x)}.")
    rows = np.shape(x)[:leading]
    mask = check_mask(mask, rows, empty=empty)
    if isinstance(x, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return x, mask
    mask = np.asarray(mask)
    good = np.isfinite(np.asarray(x)).reshape(*rows, -1).all(-1) | ~mask
    if not good.all():
        first = tuple(int(i) for i in np.argwhere(~good)[0])
        advice = "Mask them out, or mend the simulator"
        raise ValueError(f"Expected finite members; {int((~good).sum())} are not, the first at {first}. {advice}.")
    return jnp.asarray(x), jnp.asarray(mask)


def check_mask(mask, rows: tuple[int, ...], *, empty: bool = False) -> Array:
    """The mask of one set, `rows` (n,), or of many, (sets, n), as booleans; None: all. Errors as of `check_set`."""
    if mask is None:
        mask = jnp.ones(rows, bool)
    elif np.shape(mask) != rows:
        raise ValueError(f"Expected mask of shape {rows}, one entry for each member; got {np.shape(mask)}.")
    if isinstance(mask, jax.core.Tracer):
        return mask.astype(bool)
    mask = np.asarray(mask)
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise ValueError("Expected mask of True and False, or 1 and 0; got other values. Weights are no masks.")
    mask = mask.astype(bool)
    if not empty and not (counts := mask.sum(-1)).all():
        many = f"; the first of {int(np.sum(counts == 0))} empty ones is set {int(np.argmin(counts))}"
        which = many if len(rows) > 1 else ""
        raise ValueError(f"Expected sets with at least one member{which}. Leave such sets out, or mend the mask.")
    return jnp.asarray(mask)
