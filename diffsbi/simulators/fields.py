r"""Flat-sky maths on arrays: the real Fourier (Hartley) basis, isotropic modes, log-normal power, Cholesky factors.

Every field here is isotropic in the sense |kx|, |ky|: a function on the quadrant `(m, m)`, m = n_pix/2 + 1, of
non-negative frequencies stands for the whole grid, and the grid itself is `fold`ed into its four quadrants.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffsbi._types import Array, Float
from diffsbi.simulators.linear import linear_primitive, set_transpose

Triangle = tuple[tuple[Array, ...], ...]
"""Rows of many lower-triangular matrices, every element an array over the batch."""


def _hartley(x):
    n = x.shape[-1]
    f = jnp.fft.rfft2(x) / n
    half = f.real - f.imag
    # H(-k) = Re F + Im F fills the columns that rfft2 leaves out, at (-ky, -kx).
    rest = jnp.flip((f.real + f.imag)[..., 1 : n // 2], -1)
    rest = jnp.concatenate([rest[..., :1, :], jnp.flip(rest[..., 1:, :], -2)], -2)
    return jnp.concatenate([half, rest], -1)


def _fold(x):
    m = x.shape[-1] // 2 + 1
    pad = [(0, 0)] * (x.ndim - 1) + [(1, 1)]
    x = jnp.stack([x[..., :m], jnp.pad(jnp.flip(x[..., m:], -1), pad)], -3)
    pad = [(0, 0)] * (x.ndim - 2) + [(1, 1), (0, 0)]
    return jnp.stack([x[..., :m, :], jnp.pad(jnp.flip(x[..., m:, :], -2), pad)], -4)


def _unfold(x):
    x = jnp.concatenate([x[..., 0, :, :, :], jnp.flip(x[..., 1, :, 1:-1, :], -2)], -2)
    return jnp.concatenate([x[..., 0, :, :], jnp.flip(x[..., 1, :, 1:-1], -1)], -1)


def _spread(x):
    return jnp.broadcast_to(x[..., None, None, :, :], (*x.shape[:-2], 2, 2, *x.shape[-2:]))


def _gather(x):
    # Written as additions, which XLA fuses with what produces x; its reductions over such short axes are slow.
    return x[..., 0, 0, :, :] + x[..., 0, 1, :, :] + x[..., 1, 0, :, :] + x[..., 1, 1, :, :]


hartley_p = linear_primitive("hartley", _hartley)
fold_p = linear_primitive("fold", _fold)
unfold_p = linear_primitive("unfold", _unfold)
spread_p = linear_primitive("spread", _spread)
gather_p = linear_primitive("gather", _gather)
# Told to JAX, because the transposes that it derives cost several times as much.
set_transpose(hartley_p, hartley_p)
set_transpose(fold_p, unfold_p)
set_transpose(unfold_p, fold_p)
set_transpose(spread_p, gather_p)
set_transpose(gather_p, spread_p)


def hartley(x: Float[Array, "*b n n"]) -> Float[Array, "*b n n"]:
    r"""Orthonormal Hartley transform of the last two axes, $H(k) = \frac1N\sum_x (\cos k\cdot x + \sin k\cdot x)\,x$.

    It is symmetric, its own inverse, takes white noise to white noise, and is diagonal for every even convolution:
    the Fourier transform of real fields with no complex numbers and no redundant modes. `n` must be even.
    """
    return hartley_p.bind(jnp.asarray(x))


def fold(x: Float[Array, "*b n n"]) -> Float[Array, "*b 2 2 m m"]:
    """A grid in FFT order as four quadrants (±ky, ±kx), m = n/2 + 1; modes that are their own mirror are held once."""
    return fold_p.bind(jnp.asarray(x))


def unfold(x: Float[Array, "*b 2 2 m m"]) -> Float[Array, "*b n n"]:
    """The inverse of `fold`, and its transpose."""
    return unfold_p.bind(jnp.asarray(x))


def mode_multipoles(n_pix: int, side: float) -> Float[Array, "m m"]:
    r"""|ℓ| = 2π/side · √(i² + j²) on the quadrant, `side` in radians."""
    index = np.arange(n_pix // 2 + 1)
    return 2 * np.pi / side * np.hypot(index[:, None], index[None, :])


def mode_weights(n_pix: int) -> Float[Array, "m m"]:
    """How many modes of the full grid each quadrant mode stands for: 1, 2 or 4; they sum to n_pix²."""
    weight = np.full(n_pix // 2 + 1, 2.0)
    weight[[0, -1]] = 1.0
    return weight[:, None] * weight[None, :]


def cosine_matrix(n_pix: int) -> Float[Array, "m m"]:
    r"""C such that $\xi = C\,S\,C^T / n^2$ is the inverse Fourier transform of an even spectrum S on the quadrant.

    $C_{pk} = w_k \cos(2\pi pk/n)$, with w counting ±k; the forward transform is $S = C\,\xi\,C^T$.
    """
    index = np.arange(n_pix // 2 + 1)
    weight = np.full(n_pix // 2 + 1, 2.0)
    weight[[0, -1]] = 1.0
    return np.cos(2 * np.pi / n_pix * (index[:, None] * index[None, :] % n_pix)) * weight


def even_transform(cosines: Float[Array, "m m"], a: Float[Array, "*b m m"]) -> Float[Array, "*b m m"]:
    """C a Cᵀ over the last two axes."""
    return jnp.einsum("pk,...kl,ql->...pq", cosines, a, cosines)


def lognormal_to_gaussian(power: Array, shift_product: Array, cosines: Array) -> tuple[Array, Array]:
    r"""Gaussian power and correlation whose log-normal transform has exactly the given power.

    $\xi_g = \ln(1 + \xi_\kappa / \lambda_i\lambda_j)$ on the periodic grid, with the k = 0 mode removed.

    Args:
        power: $C_\ell / A_\mathrm{pix}$ on the quadrant, `(pairs, m, m)`; its k = 0 entry counts as zero.
        shift_product: $\lambda_i\lambda_j$ of every pair, `(pairs,)`.
        cosines: `cosine_matrix(n_pix)`.

    Returns:
        Gaussian power (same shape and convention) and the zero-lag correlation of every pair, `(pairs,)`.
    """
    n2 = (2 * (cosines.shape[0] - 1)) ** 2
    correlation = even_transform(cosines, power) / n2
    gaussian = even_transform(cosines, jnp.log1p(correlation / shift_product[:, None, None]))
    keep = np.ones(gaussian.shape[1:])
    keep[0, 0] = 0.0
    gaussian = gaussian * jnp.asarray(keep, gaussian.dtype)[None]
    return gaussian, jnp.einsum("k,pkl,l->p", cosines[0], gaussian, cosines[0]) / n2


def lognormal(g: Array, variance: Array, shift: Array) -> Array:
    r"""$\kappa = \lambda\,(e^{g - \mathrm{Var}(g)/2} - 1)$, all broadcast: mean zero, minimum −λ."""
    return shift * jnp.expm1(g - variance / 2)


def unstack(x: Array | Sequence[Array]) -> Sequence[Array]:
    """The entries along the first axis; unlike indexing, its transpose is one concatenation."""
    if not isinstance(x, jax.Array):
        return x
    return [jnp.squeeze(part, 0) for part in jax.lax.split(x, [1] * x.shape[0])]


def cholesky(pairs: Array | Sequence[Array], n: int, floor: float = 1e-6) -> Triangle:
    r"""Lower Cholesky factors of many small symmetric matrices, given and returned as separate arrays per element.

    Written out over the elements: a stacked array would make reverse mode pad and add the whole stack per element.
    Where a pivot is below `floor` times its diagonal element there is no factor (a log-normal field need not have a
    Gaussian partner: negative power at some mode, far out in the prior). The pivot is then held at that value and the
    rest of its column at zero, so that factor and gradient stay finite.

    Args:
        pairs: The upper triangle, row by row.
        n: Size of the matrices.
        floor: Smallest pivot relative to its diagonal element.

    Returns:
        Rows of the lower triangle.
    """
    i, j = np.triu_indices(n)
    a = {(int(q), int(p)): pair for p, q, pair in zip(i, j, unstack(pairs), strict=True)}
    least = [jnp.maximum(floor * jnp.abs(a[k, k]), jnp.finfo(a[k, k].dtype).tiny) for k in range(n)]
    for k in range(n):
        good = a[k, k] > least[k]
        root = jnp.sqrt(jnp.where(good, a[k, k], 1.0))  # 1 where unused: its derivative must be finite too
        scale = jnp.where(good, 1 / root, 0.0)
        a[k, k] = jnp.where(good, root, jax.lax.stop_gradient(jnp.sqrt(least[k])))
        for row in range(k + 1, n):
            a[row, k] = a[row, k] * scale
        for row in range(k + 1, n):
            for column in range(k + 1, row + 1):
                a[row, column] = a[row, column] - a[row, k] * a[column, k]
        # Without the barrier XLA fuses the columns into one another and computes each many times over.
        a = jax.lax.optimization_barrier(a)
    return tuple(tuple(a[row, column] for column in range(row + 1)) for row in range(n))


def lower_inverse(r: Triangle) -> Triangle:
    r"""$R^{-1}$ of many small lower-triangular matrices, by forward substitution row by row."""
    rows: list[tuple[Array, ...]] = []
    for i, row in enumerate(r):
        scale = 1 / row[i]
        new = [-scale * sum(row[k] * rows[k][j] for k in range(j, i)) for j in range(i)]
        rows.append(jax.lax.optimization_barrier((*new, scale)))
    return tuple(rows)


def lower_times(a: Triangle, y: Sequence[Array]) -> list[Array]:
    """A y for lower-triangular A on the quadrant `(m, m)` and folded y `(2, 2, m, m)`."""
    return [sum(spread_p.bind(x) * y[j] for j, x in enumerate(row)) for row in a]


def upper_times(a: Triangle, y: Sequence[Array]) -> list[Array]:
    """Aᵀ y for lower-triangular A on the quadrant and folded y."""
    return [sum(spread_p.bind(a[k][i]) * y[k] for k in range(i, len(a))) for i in range(len(a))]
