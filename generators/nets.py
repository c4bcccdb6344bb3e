"""Backbones: networks that read a noisy target, its noise level and its conditions, on a grid of rank 1, 2 or 3.

All are built as `Net(spec, *, rngs, **sizes)` and called, for one sample, as
`net(x [*grid, channel], noise_level, fields [*grid, field], scalars [scalar], key=None) -> [*grid, channel]`.
The output is zero at the start of training. A `key` switches dropout on, where there is any.

Sources: U-Net, Ronneberger et al. (2015) with the residual blocks of Dhariwal & Nichol (2021); DiT, Peebles & Xie (2023);
FiLM, Perez et al. (2018).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

from twinsim.base import BadInput, Spec
from twinsim.mesh import Rules

Padding = Literal["zero", "edge"]

# How a backbone is split, over the mesh axes `fsdp` and `model`. Layers come in pairs, the first split by output channels or heads, the
# second by input channels, so that what lies between them is whole nowhere and one sum over `model` joins a pair (Shoeybi et al.
# 2019, "Megatron-LM", section 3). Modulations are split by input channels: their small outputs are needed whole.
RULES: Rules = (
    (r"qkv/kernel$", P("fsdp", None, "model", None)),
    (r"(expand|conv1)/kernel$", P("fsdp", "model")),
    (r"(expand/bias|conv1/bias|norm2/(scale|bias))$", P("model")),
    (r"(mix|contract|conv2|modulate|film)/kernel$", P("model", "fsdp")),
    (r"kernel$", P("fsdp", None)),
)

FAN_IN = nnx.initializers.lecun_normal()
ZERO = nnx.initializers.zeros_init()


# ---------------------------------------------------------------- U-Net


class UNet(nnx.Module):
    """Residual convolutions at several resolutions, modulated by the noise level and the scalars.

    Attributes:
      widths: channels of each level, finest first; each next level has half the resolution (rounded up).
      blocks: residual blocks a level, on the way down and on the way up.
      embedding: width of the embedding of noise level and scalars.
      patch: cells a side, one number or one an axis, of the patches that the net sees as one cell of its finest level (Hoogeboom et al.
        2023, "simple diffusion", section 3.2): the widest grids are then the cheapest part; a grid that it does not divide is padded and
        cut again.
      positions: channels of a learned embedding of each cell of the finest level; 0 keeps the net blind to where it is.
      attention: self-attention among the cells of the coarsest level.
      padding: what lies beyond the edge of an axis that is not periodic.
      dropout: share of activations dropped in each block while training.
      dtype: of the arithmetic; parameters stay float32.
      remat: compute each block again in the backward pass instead of keeping its activations.
    """

    rules = RULES

    def __init__(
        self,
        spec: Spec,
        *,
        rngs: nnx.Rngs,
        widths: Sequence[int] = (32, 64, 96),
        blocks: int = 1,
        embedding: int = 128,
        patch: int | Sequence[int] = 1,
        positions: int = 0,
        attention: bool = False,
        padding: Padding = "zero",
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        check_grid(spec)
        if not widths or min(widths) < 1 or blocks < 1:
            raise BadInput(f"UNet: expected positive widths and at least one block a level, got widths={widths}, blocks={blocks}")
        if padding not in ("zero", "edge"):
            raise BadInput(f"UNet: padding must be 'zero' or 'edge', got {padding!r}")
        dtype = jnp.dtype(dtype)
        shared = {"periodic": tuple(spec.periodic), "padding": padding, "dtype": dtype, "rngs": rngs}
        block = {"embedding": embedding, "dropout": dropout, **shared}
        self.patch, finest = patching("UNet", patch, spec.grid)
        self.periodic, self.dtype, self.remat = tuple(spec.periodic), dtype, remat
        cells = math.prod(self.patch)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (*finest, positions))) if positions else None
        self.embed = Embedding(spec.scalars, embedding, rngs=rngs)
        self.inward = Conv(cells * (spec.channels + spec.fields) + positions, widths[0], **shared)
        self.down: nnx.List = nnx.List()
        self.up: nnx.List = nnx.List()
        self.merge: nnx.List = nnx.List()
        for width, last in zip(widths, (widths[0], *widths), strict=False):
            self.down.append(nnx.List([Block(last if i == 0 else width, width, **block) for i in range(blocks)]))
        self.middle: nnx.List = nnx.List([Block(widths[-1], widths[-1], **block)])
        if attention:
            self.middle.append(SelfAttention(widths[-1], dtype=dtype, rngs=rngs))
        for width, below in zip(widths, (*widths[1:], widths[-1]), strict=True):
            # The coarser level is brought to this level's width before it is enlarged: a 1x1 convolution there is nearly free.
            self.merge.append(Linear(below, width, dtype=dtype, rngs=rngs))
            self.up.append(nnx.List([Block(2 * width if i == 0 else width, width, **block) for i in range(blocks)]))
        self.norm = GroupNorm(widths[0], rngs=rngs)
        self.outward = Conv(widths[0], cells * spec.channels, initial=ZERO, **shared)

    def __call__(self, x: Array, noise_level: Array, fields: Array, scalars: Array, key: Array | None = None) -> Array:
        call = Caller(key, self.remat)
        e = self.embed(noise_level, scalars)
        patches, finest = to_patches(jnp.concatenate([x, fields], -1), self.patch, self.periodic)
        inputs = [patches.reshape(*finest, -1)] + ([] if self.positions is None else [self.positions[...]])
        h = self.inward(jnp.concatenate(inputs, -1).astype(self.dtype))
        skips = []
        for level, blocks in enumerate(self.down):
            h = halve(h) if level else h
            for block in blocks:
                h = call(block, h, e)
            skips.append(h)
        for block in self.middle:
            h = call(block, h, e)
        for level in reversed(range(len(skips))):
            skip = skips[level]
            h = jnp.concatenate([enlarge(self.merge[level](h), skip.shape[:-1]), skip], -1)
            for block in self.up[level]:
                h = call(block, h, e)
        out = self.outward(nnx.silu(self.norm(h))).astype(jnp.float32)
        return from_patches(out, self.patch, finest, x.shape)


class Block(nnx.Module):
    """Two convolutions around a skip; the embedding scales and shifts the second one's input (FiLM)."""

    def __init__(self, width_in: int, width: int, *, embedding: int, dropout: float, rngs: nnx.Rngs, dtype: Any, **conv: Any):
        self.norm1 = GroupNorm(width_in, rngs=rngs)
        self.conv1 = Conv(width_in, width, rngs=rngs, dtype=dtype, **conv)
        self.film = Linear(embedding, 2 * width, kernel_init=ZERO, dtype=jnp.float32, rngs=rngs)
        self.norm2 = GroupNorm(width, rngs=rngs)
        self.conv2 = Conv(width, width, rngs=rngs, dtype=dtype, initial=ZERO, **conv)
        self.skip = Linear(width_in, width, use_bias=False, dtype=dtype, rngs=rngs) if width_in != width else None
        self.dropout = dropout

    def __call__(self, x: Array, e: Array, key: Array | None = None) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        scale, shift = jnp.split(self.film(e), 2)
        h = nnx.silu(self.norm2(h, scale, shift))
        h = self.conv2(drop(h, self.dropout, key))
        return h + (x if self.skip is None else self.skip(x))


class SelfAttention(nnx.Module):
    """Multi-head attention among all cells, with a skip around it."""

    def __init__(self, width: int, *, dtype: Any, rngs: nnx.Rngs, head: int = 32):
        self.heads = max(1, width // head)
        if width % self.heads:
            raise BadInput(f"attention: the width must be a multiple of its {self.heads} heads, got {width}")
        self.norm = GroupNorm(width, rngs=rngs)
        self.qkv = Heads(width, self.heads, dtype=dtype, rngs=rngs)
        self.mix = Linear(width, width, kernel_init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, e: Array, key: Array | None = None) -> Array:
        h = self.norm(x).reshape(-1, x.shape[-1])
        return x + self.mix(attend(self.qkv(h))).reshape(x.shape)


class Conv(nnx.Module):
    """A convolution that keeps the grid's shape and closes its periodic axes."""

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        periodic: tuple[bool, ...],
        padding: Padding,
        dtype: Any,
        rngs: nnx.Rngs,
        size: int = 3,
        initial: Callable[..., Array] = FAN_IN,
    ):
        self.kernel = nnx.Param(initial(rngs.params(), (size,) * len(periodic) + (width_in, width), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width))
        self.periodic, self.padding, self.dtype = periodic, padding, dtype

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        rank = len(self.periodic)
        half = kernel.shape[0] // 2
        for axis, periodic in enumerate(self.periodic):
            if periodic or self.padding == "edge":
                x = jnp.pad(x, [(half, half) if a == axis else (0, 0) for a in range(rank + 1)], "wrap" if periodic else "edge")
        pads = tuple(0 if periodic or self.padding == "edge" else half for periodic in self.periodic)
        y = convolution(x, kernel, pads=pads)
        return y + along_channels(self.bias[...].astype(self.dtype), y)


class GroupNorm(nnx.Module):
    """Group normalisation (Wu & He 2018) of one sample, with an optional modulation folded in."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, groups: int = 8):
        self.groups = math.gcd(groups, width)
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array, scale: Array | None = None, shift: Array | None = None) -> Array:
        # Moments a channel first, then a group, by a product that also hands them back to each channel: a broadcast would be
        # fused into the pass over the grid, whose inner loop then divides indices and is 5 to 10 times slower on a CPU.
        grid, width = tuple(range(x.ndim - 1)), x.shape[-1]
        h = x.astype(jnp.float32)
        group = np.arange(width) * self.groups // width
        share = (group[:, None] == group).astype(np.float32) * (self.groups / width)
        mean, square = jnp.matmul(jnp.stack([h.mean(grid), jnp.square(h).mean(grid)]), share, precision=lax.Precision.HIGHEST)
        a = self.scale[...] * lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + 1e-5)
        b = self.bias[...] - mean * a
        if scale is not None and shift is not None:
            a, b = a * (1 + scale), b * (1 + scale) + shift
        return (h * along_channels(a, h) + along_channels(b, h)).astype(x.dtype)


# ---------------------------------------------------------------- transformer


class DiT(nnx.Module):
    """A transformer over patches of the grid; the noise level and the scalars modulate every layer (adaLN-zero).

    Attributes:
      patch: cells a patch, one number or one an axis; a grid that it does not divide is padded and cut again.
      width, depth, heads: of the transformer; `expansion`: of its hidden layers.
      positions: "learned", which starts from sinusoids, or fixed "sinusoids"; periodic along periodic axes.
      dropout: share of hidden activations dropped in each block while training.
      dtype: of the arithmetic; parameters stay float32.
      remat: compute each block again in the backward pass instead of keeping its activations.
    """

    rules = RULES

    def __init__(
        self,
        spec: Spec,
        *,
        rngs: nnx.Rngs,
        patch: int | Sequence[int] = 4,
        width: int = 192,
        depth: int = 6,
        heads: int = 6,
        expansion: int = 4,
        embedding: int = 192,
        positions: Literal["learned", "sinusoids"] = "learned",
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        check_grid(spec)
        self.patch, tokens = patching("DiT", patch, spec.grid)
        if width % heads or depth < 1:
            raise BadInput(f"DiT: width must be a multiple of heads and depth at least 1, got width={width}, heads={heads}, depth={depth}")
        if positions not in ("learned", "sinusoids"):
            raise BadInput(f"DiT: positions must be 'learned' or 'sinusoids', got {positions!r}")
        dtype = jnp.dtype(dtype)
        cells = math.prod(self.patch)
        self.periodic, self.dtype, self.remat, self.width = tuple(spec.periodic), dtype, remat, width
        self.positions = nnx.Param(sinusoids(tokens, self.periodic, width)) if positions == "learned" else None
        self.embed = Embedding(spec.scalars, embedding, rngs=rngs)
        self.inward = Linear(cells * (spec.channels + spec.fields), width, dtype=dtype, rngs=rngs)
        sizes: dict[str, Any] = {"heads": heads, "expansion": expansion, "embedding": embedding, "dropout": dropout}
        self.blocks = nnx.List([TransformerBlock(width, dtype=dtype, rngs=rngs, **sizes) for _ in range(depth)])
        self.modulate = Linear(embedding, 2 * width, kernel_init=ZERO, dtype=jnp.float32, rngs=rngs)
        self.outward = Linear(width, cells * spec.channels, kernel_init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_level: Array, fields: Array, scalars: Array, key: Array | None = None) -> Array:
        call = Caller(key, self.remat)
        e = self.embed(noise_level, scalars)
        patches, tokens = to_patches(jnp.concatenate([x, fields], -1), self.patch, self.periodic)
        where = sinusoids(tokens, self.periodic, self.width) if self.positions is None else self.positions[...]
        h = self.inward(patches.astype(self.dtype)) + where.astype(self.dtype)
        for block in self.blocks:
            h = call(block, h, e)
        scale, shift = jnp.split(self.modulate(e), 2)
        return from_patches(self.outward(layer_norm(h, scale, shift)).astype(jnp.float32), self.patch, tokens, x.shape)


class TransformerBlock(nnx.Module):
    """Attention and a hidden layer, each scaled, shifted and gated by the embedding; the identity at the start."""

    def __init__(
        self, width: int, *, heads: int, expansion: int, embedding: int, dropout: float = 0.0, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        self.modulate = Linear(embedding, 6 * width, kernel_init=ZERO, dtype=jnp.float32, rngs=rngs)
        self.qkv = Heads(width, heads, dtype=dtype, rngs=rngs)
        self.mix = Linear(width, width, dtype=dtype, rngs=rngs)
        self.expand = Linear(width, expansion * width, dtype=dtype, rngs=rngs)
        self.contract = Linear(expansion * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, e: Array, key: Array | None = None) -> Array:
        scale1, shift1, gate1, scale2, shift2, gate2 = jnp.split(self.modulate(e), 6)
        change = self.mix(attend(self.qkv(layer_norm(h, scale1, shift1))))
        h = h + along_channels(gate1, h).astype(h.dtype) * change
        hidden = drop(nnx.gelu(self.expand(layer_norm(h, scale2, shift2))), self.dropout, key)
        return h + along_channels(gate2, h).astype(h.dtype) * self.contract(hidden)


# ---------------------------------------------------------------- vectors


class ResidualMLP(nnx.Module):
    """Fully connected residual blocks over the flattened target, for latent vectors; modulated as the DiT is.

    Attributes:
      leading: channels that the network reads and corrects; for the others it stays silent, and a diffusion model then draws them
        from a unit Gaussian. 0 means all. For principal components, whose long tail is Gaussian and not to be learnt by heart.
      width, depth: of the residual stream; `expansion`: of the hidden layers.
      dropout: share of hidden activations dropped in each block while training.
      dtype: of the arithmetic; parameters stay float32.
      remat: compute each block again in the backward pass instead of keeping its activations.
    """

    rules = RULES

    def __init__(
        self,
        spec: Spec,
        *,
        rngs: nnx.Rngs,
        leading: int = 0,
        width: int = 512,
        depth: int = 4,
        expansion: int = 2,
        embedding: int = 128,
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        check_grid(spec)
        if min(width, depth, expansion) < 1 or leading < 0:
            raise BadInput(f"ResidualMLP: expected positive sizes, got {width=}, {depth=}, {expansion=}, {leading=}")
        dtype = jnp.dtype(dtype)
        cells = math.prod(spec.grid)
        self.leading = min(leading, spec.channels) or spec.channels
        self.dtype, self.remat = dtype, remat
        self.embed = Embedding(spec.scalars, embedding, rngs=rngs)
        self.inward = Linear(cells * (self.leading + spec.fields), width, dtype=dtype, rngs=rngs)
        sizes: dict[str, Any] = {"expansion": expansion, "embedding": embedding, "dropout": dropout}
        self.blocks = nnx.List([HiddenBlock(width, dtype=dtype, rngs=rngs, **sizes) for _ in range(depth)])
        self.modulate = Linear(embedding, 2 * width, kernel_init=ZERO, dtype=jnp.float32, rngs=rngs)
        self.outward = Linear(width, cells * self.leading, kernel_init=ZERO, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, noise_level: Array, fields: Array, scalars: Array, key: Array | None = None) -> Array:
        call = Caller(key, self.remat)
        e = self.embed(noise_level, scalars)
        h = self.inward(jnp.concatenate([x[..., : self.leading].ravel(), fields.ravel()]).astype(self.dtype))
        for block in self.blocks:
            h = call(block, h, e)
        scale, shift = jnp.split(self.modulate(e), 2)
        out = self.outward(layer_norm(h, scale, shift)).astype(jnp.float32).reshape(*x.shape[:-1], self.leading)
        return jnp.concatenate([out, jnp.zeros((*x.shape[:-1], x.shape[-1] - self.leading))], -1)


class HiddenBlock(nnx.Module):
    """One hidden layer, scaled, shifted and gated by the embedding; the identity at the start."""

    def __init__(self, width: int, *, expansion: int, embedding: int, dropout: float = 0.0, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.dropout = dropout
        self.modulate = Linear(embedding, 3 * width, kernel_init=ZERO, dtype=jnp.float32, rngs=rngs)
        self.expand = Linear(width, expansion * width, dtype=dtype, rngs=rngs)
        self.contract = Linear(expansion * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, e: Array, key: Array | None = None) -> Array:
        scale, shift, gate = jnp.split(self.modulate(e), 3)
        hidden = drop(nnx.silu(self.expand(layer_norm(h, scale, shift))), self.dropout, key)
        return h + gate.astype(h.dtype) * self.contract(hidden)


# ---------------------------------------------------------------- parts they share


class Heads(nnx.Module):
    """Queries, keys and values of each head, `[token, channel] -> [token, 3, head, channel of a head]`.

    Its kernel keeps the axis of the heads, along which a mesh can split it.
    """

    def __init__(self, width: int, heads: int, *, dtype: Any, rngs: nnx.Rngs):
        flat = Linear(width, 3 * width, rngs=rngs)
        self.kernel = nnx.Param(flat.kernel[...].reshape(width, 3, heads, -1))
        self.bias = nnx.Param(jnp.zeros(3 * width))  # one axis, as every bias has: what has more decays in training
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...].astype(self.dtype)
        y = product(x.astype(self.dtype), kernel)
        return y + self.bias[...].astype(self.dtype).reshape(1, *kernel.shape[1:])


class Embedding(nnx.Module):
    """Noise level and scalars as one vector: sinusoids of the level, then two layers."""

    def __init__(self, scalars: int, width: int, *, rngs: nnx.Rngs, waves: int = 32):
        self.waves = waves
        self.first = Linear(2 * waves + scalars, width, dtype=jnp.float32, rngs=rngs)
        self.second = Linear(width, width, dtype=jnp.float32, rngs=rngs)

    def __call__(self, noise_level: Array, scalars: Array) -> Array:
        phase = noise_level * jnp.exp(jnp.linspace(0.0, math.log(100.0), self.waves))
        features = jnp.concatenate([jnp.sin(phase), jnp.cos(phase), scalars])
        return nnx.silu(self.second(nnx.silu(self.first(features))))


class Caller:
    """Calls blocks one after the other: a key of its own for each, and its activations forgotten where that is asked."""

    def __init__(self, key: Array | None, remat: bool):
        self.key, self.remat = key, remat

    def __call__(self, block: Callable[..., Array], h: Array, e: Array) -> Array:
        key = None
        if self.key is not None:
            self.key, key = jax.random.split(self.key)
        run = jax.checkpoint(lambda h, e: block(h, e, key)) if self.remat else lambda h, e: block(h, e, key)
        return run(h, e)


def bilinear(name: str, apply: Callable[..., Array], to_x: Callable[..., Array], to_kernel: Callable[..., Array]) -> Callable[..., Array]:
    """`apply(x [..., *sample], kernel, **sizes)`, linear in both, as a primitive of JAX: `vmap` over `x` alone gives it one axis more.

    So the samples of a batch stay one large product, and so does the gradient of the kernel, a sum over all of them, which is then
    computed as `to_kernel` says. Left to itself, JAX makes that gradient `[out, in]`, and XLA's CPU transposes whole copies for it.

    Args:
      to_x, to_kernel: what reaches `x` or `kernel` of a cotangent: `(cotangent, shape wanted, the other factor, **sizes)`.
    """
    primitive = Primitive(name)

    def batched(factors: Sequence[Array], axes: Sequence[int | None], **sizes: Any) -> tuple[Array, int]:
        (x, kernel), (along, several) = factors, axes
        if several is None and along is not None:
            return primitive.bind(jnp.moveaxis(x, along, 0), kernel, **sizes), 0
        return jax.vmap(partial(apply, **sizes), axes)(x, kernel), 0

    def shaped(x: Any, kernel: Any, **sizes: Any) -> Any:
        out = jax.eval_shape(partial(apply, **sizes), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)))
        return jax.core.ShapedArray(out.shape, out.dtype)

    primitive.def_impl(lambda x, kernel, **sizes: jax.jit(partial(apply, **sizes))(x, kernel))
    primitive.def_abstract_eval(shaped)
    mlir.register_lowering(primitive, mlir.lower_fun(apply, multiple_results=False))
    ad.defbilinear(
        primitive,
        lambda change, x, kernel, **sizes: to_x(change, x.aval.shape, kernel, **sizes),
        lambda change, x, kernel, **sizes: to_kernel(change, kernel.aval.shape, x, **sizes),
    )
    batching.primitive_batchers[primitive] = batched
    return primitive.bind


def _product(x: Array, kernel: Array) -> Array:
    rows = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())))
    return rows.reshape(*x.shape[:-1], *kernel.shape[1:])


def _product_to_x(change: Array, shape: tuple[int, ...], kernel: Array) -> Array:
    out = tuple(range(1, kernel.ndim))
    return lax.dot_general(change.reshape(-1, *kernel.shape[1:]), kernel, ((out, out), ((), ()))).reshape(shape)


def _product_to_kernel(change: Array, shape: tuple[int, ...], x: Array) -> Array:
    rows = (((0,), (0,)), ((), ()))
    x, change = x.reshape(-1, shape[0]), change.reshape(-1, *shape[1:])
    if shape[0] <= math.prod(shape[1:]):
        return lax.dot_general(x, change, rows)
    # XLA's CPU takes 1.5 times as long for a tall result. The barrier keeps it from turning this product round again.
    turned = lax.optimization_barrier(lax.dot_general(change, x, rows))
    return jnp.moveaxis(turned, -1, 0)


product = bilinear("product", _product, _product_to_x, _product_to_kernel)  # `[..., in]` times `[in, *out]`: `[..., *out]`


def _convolution(x: Array, kernel: Array, pads: tuple[int, ...]) -> Array:
    rank = len(pads)
    grid = tuple(range(1, rank + 1))
    numbers = lax.ConvDimensionNumbers((0, rank + 1, *grid), (rank + 1, rank, *range(rank)), (0, rank + 1, *grid))
    # One convolution, padding itself: on XLA's CPU it runs at the speed of a matrix product, where nine shifted products or
    # their im2col take 2 to 8 times as long.
    samples = x.reshape(-1, *x.shape[-rank - 1 :])
    y = lax.conv_general_dilated(samples, kernel, (1,) * rank, [(pad, pad) for pad in pads], dimension_numbers=numbers)
    return y.reshape(*x.shape[: -rank - 1], *y.shape[1:])


def _convolution_to_x(change: Array, shape: tuple[int, ...], kernel: Array, pads: tuple[int, ...]) -> Array:
    turned = jnp.flip(kernel, tuple(range(len(pads)))).swapaxes(-1, -2)
    return _convolution(change, turned, tuple(size - 1 - pad for size, pad in zip(kernel.shape, pads, strict=False)))


def _convolution_to_kernel(change: Array, shape: tuple[int, ...], x: Array, pads: tuple[int, ...]) -> Array:
    """One product of `x`, shifted along every axis of the grid but the first, and `change`, shifted along the first.

    Half the time, for 48 channels, of the convolution with samples and channels exchanged that JAX would take.
    """
    rank, sizes = len(pads), shape[:-2]
    x, change = (a.reshape(-1, *a.shape[-rank - 1 :]) for a in (x, change))

    def shifted(a: Array, by: Sequence[int], size: Sequence[int]) -> Array:
        margins = [(-start, start + n - old, 0) for start, n, old in zip(by, size, a.shape[1:-1], strict=True)]
        return lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *margins, (0, 0, 0)])

    rest = list(np.ndindex(*sizes[1:]))
    seen = (x.shape[1], *change.shape[2:-1])
    xs = [shifted(x, (0, *(k - pad for k, pad in zip(tap, pads[1:], strict=True))), seen) for tap in rest]
    changes = [shifted(change, (pads[0] - k, *(0 for _ in pads[1:])), seen) for k in range(sizes[0])]
    left, right = (jnp.concatenate(parts, -1) for parts in (xs, changes))
    sums = lax.dot_general(left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1]), (((0,), (0,)), ((), ())))
    return jnp.moveaxis(sums.reshape(*sizes[1:], shape[-2], sizes[0], shape[-1]), -2, 0)


# `[..., *grid, in]` with `[*size, in, out]`, `pads` zeros before and after each axis: `[..., *grid, out]`.
convolution = bilinear("convolution", _convolution, _convolution_to_x, _convolution_to_kernel)

Linear = partial(nnx.Linear, dot_general=lambda x, kernel, *_, **__: product(x, kernel))


def check_grid(spec: Spec) -> None:
    """Raises BadInput unless the backbones can work on `spec`."""
    if len(spec.grid) not in (1, 2, 3) or len(spec.periodic) != len(spec.grid) or min(spec.grid) < 1:
        raise BadInput(f"spec: expected a grid of rank 1, 2 or 3 and one `periodic` an axis, got {spec.grid} and {spec.periodic}")


def attend(qkv: Array) -> Array:
    """Attention among tokens, from the queries, keys and values `[token, 3, head, channel]`: `[token, head * channel]`."""
    q, k, v = (qkv[:, i] for i in range(3))
    logits = jnp.einsum("qhd,khd->hqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(logits).astype(v.dtype), v).reshape(qkv.shape[0], -1)


def layer_norm(x: Array, scale: Array, shift: Array) -> Array:
    """Unit variance over the channels of each token, then a modulation by `scale` and `shift` `[channel]`."""
    h = x.astype(jnp.float32)
    h = h - h.mean(-1, keepdims=True)
    h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)
    return (h * along_channels(1 + scale, h) + along_channels(shift, h)).astype(x.dtype)


def patching(name: str, patch: int | Sequence[int], grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cells of a patch along each axis, and how many patches cover `grid`. Raises BadInput, which calls the backbone by its `name`."""
    sizes = (patch,) * len(grid) if isinstance(patch, int) else tuple(patch)
    if len(sizes) != len(grid) or min(sizes) < 1:
        raise BadInput(f"{name}: expected one positive patch size, or one for each of {len(grid)} axes, got {patch}")
    return sizes, tuple(-(-size // p) for size, p in zip(grid, sizes, strict=True))


def to_patches(x: Array, patch: tuple[int, ...], periodic: tuple[bool, ...]) -> tuple[Array, tuple[int, ...]]:
    """Patches of a grid as tokens, `[token, cell * channel]`, and how many lie along each axis."""
    for axis, p in enumerate(patch):
        lack = -x.shape[axis] % p
        if lack:
            x = jnp.pad(x, [(0, lack) if a == axis else (0, 0) for a in range(x.ndim)], "wrap" if periodic[axis] else "edge")
    rank = len(patch)
    tokens = tuple(size // p for size, p in zip(x.shape, patch, strict=False))
    x = x.reshape(*(n for pair in zip(tokens, patch, strict=True) for n in pair), x.shape[-1])
    x = x.transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), 2 * rank)
    return x.reshape(math.prod(tokens), -1), tokens


def from_patches(x: Array, patch: tuple[int, ...], tokens: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """The grid of `shape` that patches came from."""
    rank = len(patch)
    x = x.reshape(*tokens, *patch, -1).transpose(
        *(a for pair in zip(range(rank), range(rank, 2 * rank), strict=True) for a in pair), 2 * rank
    )
    x = x.reshape(*(n * p for n, p in zip(tokens, patch, strict=True)), -1)
    return x[tuple(slice(size) for size in shape[:-1])]


def sinusoids(tokens: tuple[int, ...], periodic: tuple[bool, ...], width: int) -> Array:
    """Fixed positions of tokens, `[token, width]`: for each axis, waves that close on it where it is periodic."""
    columns = [np.zeros((math.prod(tokens), 0))]
    for axis, (count, closed) in enumerate(zip(tokens, periodic, strict=True)):
        waves = -(-width // (2 * len(tokens)))
        if closed:
            frequencies = 2 * np.pi / count * (1 + np.arange(waves) % max(1, count // 2))
        else:
            frequencies = 10000.0 ** -(np.arange(waves) / waves)
        phase = np.indices(tokens)[axis].reshape(-1, 1) * frequencies
        columns += [np.sin(phase), np.cos(phase)]
    return jnp.asarray(np.concatenate(columns, 1)[:, :width], jnp.float32)


def halve(x: Array) -> Array:
    """Averages of two cells along every grid axis; the last cell of an odd axis stands alone."""
    for axis, size in enumerate(x.shape[:-1]):
        if size == 1:
            continue
        if size % 2:
            x = jnp.pad(x, [(0, 1) if a == axis else (0, 0) for a in range(x.ndim)], "edge")
        x = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :]).mean(axis + 1)
    return x


def enlarge(x: Array, grid: tuple[int, ...]) -> Array:
    """Each cell repeated along every grid axis, up to the shape `grid`."""
    for axis, size in enumerate(grid):
        if x.shape[axis] != size:
            x = lax.slice_in_dim(jnp.repeat(x, 2, axis), 0, size, axis=axis)
    return x


def along_channels(vector: Array, like: Array) -> Array:
    """`vector` `[channel]` with the rank of `like` `[*grid, channel]`."""
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def drop(x: Array, share: float, key: Array | None) -> Array:
    """`x` with a random `share` of its values zero and the others scaled up; `x` itself without a key."""
    if key is None or share == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), jnp.zeros_like(x))
