"""Networks for maps: a compact convolutional one, a residual one for GPUs; symmetries of maps as augmentation."""

import equinox as eqx
import jax
import jax.numpy as jnp

from diffsbi._types import Array, Float, Key, check_key


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

    convolutions: tuple[eqx.nn.Conv2d, ...]
    fold: int = eqx.field(static=True)

    def __init__(self, key: Key, n_bins: int, channels: tuple[int, ...] = (16, 32, 64, 64), fold: int = 1):
        if not channels or fold < 1:
            raise ValueError(f"Expected at least one level of channels and fold >= 1; got {channels} and {fold}.")
        self.fold = fold
        widths = (n_bins * fold**2, *channels)
        keys = jax.random.split(check_key(key), len(channels))
        self.convolutions = tuple(_convolution(k, a, b) for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True))

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
            weight, bias = convolution.weight / scale[..., None], (jnp.asarray(convolution.bias) - loc) / scale
            made.append(eqx.tree_at(lambda c: (c.weight, c.bias), convolution, (weight, bias)))
            x = jax.nn.silu(jax.vmap(made[-1])(x))
        return eqx.tree_at(lambda network: network.convolutions, self, tuple(made))


class _Block(eqx.Module):
    """Two convolutions, each after a normalisation over groups of channels, beside the identity."""

    norms: tuple[eqx.nn.GroupNorm, eqx.nn.GroupNorm]
    convolutions: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]

    def __init__(self, key: Key, n_in: int, n_out: int):
        keys = jax.random.split(key)
        self.norms = (eqx.nn.GroupNorm(min(8, n_in), n_in), eqx.nn.GroupNorm(min(8, n_out), n_out))
        self.convolutions = (_convolution(keys[0], n_in, n_out), _convolution(keys[1], n_out, n_out))

    def __call__(self, x):
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(jax.nn.silu(norm(y)))
        return y + jnp.pad(x, ((0, len(y) - len(x)), (0, 0), (0, 0)))


class ResidualNetwork(eqx.Module):
    """Map → features, after ResNet-18 (He et al. 2016, arXiv:1512.03385): four levels of two blocks, for GPUs.

    Group instead of batch normalisation, circular borders, no max-pooling; the mean over the map of the last level.
    """

    first: eqx.nn.Conv2d
    levels: tuple[tuple[_Block, ...], ...]

    def __init__(self, key: Key, n_bins: int, width: int = 64, levels: int = 4, blocks: int = 2):
        key_first, *keys = jax.random.split(check_key(key), 1 + levels * blocks)
        self.first = _convolution(key_first, n_bins, width)
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


def _convolution(key: Key, n_in: int, n_out: int) -> eqx.nn.Conv2d:
    """3 × 3 on a torus; weights such that the SiLU's output has about the variance of its input."""
    convolution = eqx.nn.Conv2d(n_in, n_out, 3, padding=1, padding_mode="CIRCULAR", key=key)
    return eqx.tree_at(lambda c: c.weight, convolution, 1.7 * 3**0.5 * convolution.weight)  # were 1/sqrt(3 fan_in)


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
