"""Networks for maps: a compact convolutional one, a residual one for GPUs; symmetries of maps as augmentation."""

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, Key, check_key

_LARGE_ROW = 2**18  # bytes
_ROWS_BYTES = 2**23  # of small rows that are taken at once


class TorusConvolution(eqx.Module):
    """Map x (n_in, n, n) → (n_out, n, n): 3 × 3 kernels on a torus; the SiLU of it has about x's variance at first."""

    weight: Float[Array, "n_out n_in 3 3"]
    bias: Float[Array, "n_out 1 1"]

    def __init__(self, key: Key, n_in: int, n_out: int):
        made = eqx.nn.Conv2d(n_in, n_out, 3, key=key)
        self.weight = 1.7 * 3**0.5 * made.weight  # it was uniform within 1 / sqrt(9 n_in)
        self.bias = jnp.asarray(made.bias)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1]

    def __call__(self, x: Float[Array, "n_in n n"]) -> Float[Array, "n_out n n"]:
        return torus_convolution(self.weight, x) + self.bias


def torus_convolution(weight: Float[Array, "n_out n_in 3 3"], x: Float[Array, "n_in n m"]) -> Float[Array, "n_out n m"]:
    """y[o, i, j] = Σ weight[o, c, a, b] x[c, i + a - 1, j + b - 1] over c, a and b, indices around the torus.

    On CPUs one matrix product of three shifted copies of the map, whose parts are shifted and added: XLA's own
    convolution takes ten times longer there inside a loop, which an epoch of training is (jax issue 12868).
    """
    return jax.lax.platform_dependent(weight, x, cpu=_product_of_shifted, default=padded_convolution)


def _product_of_shifted(weight, x):
    n_out, n_in = weight.shape[:2]
    shifted = jnp.concatenate([jnp.roll(x, 1 - column, 2) for column in range(3)])
    rows = jnp.moveaxis(weight, (2, 3), (0, 2)).reshape(3 * n_out, 3 * n_in)
    y = (rows @ shifted.reshape(3 * n_in, -1)).reshape(3, n_out, *x.shape[1:])
    return jnp.roll(y[0], 1, 1) + y[1] + jnp.roll(y[2], -1, 1)


def padded_convolution(weight, x):
    """The same by XLA's own convolution, the best outside a loop."""
    around = jnp.pad(x, ((0, 0), (1, 1), (1, 1)), mode="wrap")
    return jax.lax.conv(around[None], weight, (1, 1), "VALID")[0]


class MapNetwork(eqx.Module):
    r"""Map x (bins, n, n) → features (sum of `channels`,): at each scale, the mean over the map of every channel.

    Level l convolves with 3 × 3 kernels on a torus (bins are channels), takes the SiLU, and halves the map for the
    next level. A mean over all pixels does not change when a map is shifted: features are statistics like spectra and
    counts of peaks, of a learned kind and at every scale. No normalisation, over a batch or a map, which would divide
    the amplitude of the signal out; `adapted` instead gives every level inputs of unit variance once, at the start.

    Args:
        key: Initial weights.
        n_bins: Channels of the map.
        channels: Width of each level; the map must halve as often as there are levels but one.
        fold: Squares of fold × fold pixels become channels first: no pixel is lost, and the first level, which costs
            most, is fold² times smaller. Features then change with shifts by less than `fold` pixels.
    """

    convolutions: tuple[TorusConvolution, ...]
    fold: int = eqx.field(static=True)

    def __init__(self, key: Key, n_bins: int, channels: tuple[int, ...] = (16, 32, 64, 64), fold: int = 1):
        if not channels or fold < 1:
            raise ValueError(f"Expected at least one level of channels and fold >= 1; got {channels} and {fold}.")
        self.fold = fold
        widths = (n_bins * fold**2, *channels)
        keys = jax.random.split(check_key(key), len(channels))
        self.convolutions = tuple(
            TorusConvolution(k, a, b) for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
        )

    def __call__(self, x: Float[Array, "bins n n"]) -> Float[Array, " features"]:
        n_bins = self.convolutions[0].in_channels // self.fold**2
        _check_map(x, n_bins, self.fold * 2 ** (len(self.convolutions) - 1))
        x, features = folded(x, self.fold), []
        for level, convolution in enumerate(self.convolutions):
            x = jax.nn.silu(convolution(halved(x) if level else x))
            features.append(jnp.mean(x, (1, 2)))
        return jnp.concatenate(features)

    def adapted(self, x: Float[Array, "n bins n_pix n_pix"]) -> "MapNetwork":
        """The network with weights scaled so that every channel has mean 0 and variance 1 over the maps `x`.

        Layer by layer, before the SiLU (Mishkin & Matas 2016, arXiv:1511.06422): of maps in any unit.
        """
        made, x = [], jax.vmap(lambda row: folded(row, self.fold))(x)
        for level, convolution in enumerate(self.convolutions):
            x = jax.vmap(halved)(x) if level else x
            y = jax.vmap(convolution)(x)
            loc, scale = (moment(y, (0, 2, 3))[:, None, None] for moment in (jnp.mean, jnp.std))
            weight, bias = convolution.weight / scale[..., None], (convolution.bias - loc) / scale
            made.append(eqx.tree_at(lambda c: (c.weight, c.bias), convolution, (weight, bias)))
            x = jax.nn.silu(jax.vmap(made[-1])(x))
        return eqx.tree_at(lambda network: network.convolutions, self, tuple(made))


class _Block(eqx.Module):
    """Two convolutions, each after a normalisation over groups of channels, beside the identity."""

    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    convolutions: tuple[TorusConvolution, TorusConvolution]

    def __init__(self, key: Key, n_in: int, n_out: int):
        keys = jax.random.split(key)
        self.norms = (eqx.nn.GroupNorm(min(8, n_in), n_in), eqx.nn.GroupNorm(min(8, n_out), n_out))
        self.convolutions = (TorusConvolution(keys[0], n_in, n_out), TorusConvolution(keys[1], n_out, n_out))

    def __call__(self, x):
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(jax.nn.silu(norm(y)))
        return y + jnp.pad(x, ((0, len(y) - len(x)), (0, 0), (0, 0)))


class ResidualNetwork(eqx.Module):
    """Map → features, after ResNet-18 (He et al. 2016, arXiv:1512.03385): four levels of two blocks, for GPUs.

    Group instead of batch normalisation, circular borders, no max-pooling; the mean over the map of the last level.
    """

    first: TorusConvolution
    levels: tuple[tuple[_Block, ...], ...]

    def __init__(self, key: Key, n_bins: int, width: int = 64, levels: int = 4, blocks: int = 2):
        key_first, *keys = jax.random.split(check_key(key), 1 + levels * blocks)
        self.first = TorusConvolution(key_first, n_bins, width)
        made, n_in = [], width
        for level in range(levels):
            n_out = width * 2**level
            row = []
            for _ in range(blocks):
                row.append(_Block(keys.pop(), n_in, n_out))
                n_in = n_out
            made.append(tuple(row))
        self.levels = tuple(made)

    def __call__(self, x: Float[Array, "bins n n"]) -> Float[Array, " features"]:
        _check_map(x, self.first.in_channels, 2 ** len(self.levels))
        x = halved(self.first(x))
        for level, blocks in enumerate(self.levels):
            x = halved(x) if level else x
            for block in blocks:
                x = block(x)
        return jnp.mean(jax.nn.silu(x), (1, 2))


class HybridNetwork(eqx.Module):
    """(map, numbers of it) → the features of `network` beside the numbers, such as binned spectra.

    Whitened together and read out by one regression, training spends the network on what the numbers lack. Numbers that
    do not change under a symmetry are computed once: augment with `lambda key, x: (torus_symmetry(key, x[0]), x[1])`.
    """

    network: MapNetwork | ResidualNetwork

    def __call__(self, x: tuple[Float[Array, "bins n n"], Float[Array, " k"]]) -> Float[Array, " features"]:
        return jnp.concatenate([self.network(x[0]), x[1]])

    def adapted(self, x) -> "HybridNetwork":
        """With the network scaled to the maps, where it can be."""
        return HybridNetwork(self.network.adapted(x[0])) if isinstance(self.network, MapNetwork) else self


def features_of(network, x):
    """`network` of every row of `x`, any pytree of arrays with a leading n, within a loss.

    Large rows, from a map of 128² × 5 on, are taken one after the other, and computed once more for the gradient: on
    CPUs what a row needs then stays in the cache, and memory does not grow with the rows (256² × 5: 38 MiB instead of
    348 for 16 of them, in three quarters of the time). Small ones some hundred at once.
    """
    leaves = jax.tree.leaves(x)
    n, size = len(leaves[0]), sum(leaf.nbytes for leaf in leaves) / max(1, len(leaves[0]))
    at_once = 1 if size > _LARGE_ROW else int(_ROWS_BYTES // max(1, size))
    if at_once >= n or jax.default_backend() != "cpu":
        return jax.vmap(network)(x)
    at_once = next(count for count in range(at_once, 0, -1) if n % count == 0)
    again = jax.checkpoint(lambda row: network(row), prevent_cse=False)
    return jax.lax.map(again, x, batch_size=at_once if at_once > 1 else None)


def torus_symmetry(key: Key, x: Float[Array, "bins n n"]) -> Float[Array, "bins n n"]:
    """The map shifted, reflected and turned at random: as likely as itself at every theta, so a row of its own.

    The shift is periodic: for simulated maps on a torus. The score in theta stays the row's own.
    """
    key_shift, key_flip, key_turn = jax.random.split(key, 3)
    x = jnp.roll(x, jax.random.randint(key_shift, (2,), 0, x.shape[-1]), (1, 2))
    return _reflected(key_flip, key_turn, x)


def square_symmetry(key: Key, x: Float[Array, "bins n n"]) -> Float[Array, "bins n n"]:
    """One of the eight reflections and quarter turns of the square: for maps with borders."""
    key_flip, key_turn = jax.random.split(key)
    return _reflected(key_flip, key_turn, x)


def _reflected(key_flip, key_turn, x):
    flip = jax.random.bernoulli(key_flip, shape=(3,))
    x = jnp.where(flip[0], x[:, ::-1], x)
    x = jnp.where(flip[1], x[:, :, ::-1], x)
    return jnp.where(flip[2], jnp.swapaxes(x, 1, 2), x)


def halved(x: Float[Array, "c n n"]) -> Float[Array, "c n/2 n/2"]:
    """Mean over squares of 2 × 2 pixels."""
    c, n, m = x.shape
    return jnp.mean(x.reshape(c, n // 2, 2, m // 2, 2), (2, 4))


def folded(x: Float[Array, "c n n"], fold: int) -> Float[Array, "fold2_c n/fold n/fold"]:
    """Every pixel of a square a channel of its own."""
    c, n, m = x.shape
    x = x.reshape(c, n // fold, fold, m // fold, fold)
    return jnp.moveaxis(x, (2, 4), (0, 1)).reshape(c * fold**2, n // fold, m // fold)


def _check_map(x, n_bins: int, divisor: int) -> None:
    if x.ndim != 3 or x.shape[0] != n_bins or x.shape[1] % divisor or x.shape[2] % divisor:
        raise ValueError(
            f"Expected a map of shape ({n_bins}, n, n) with n a multiple of {divisor}; got {tuple(x.shape)}."
        )
