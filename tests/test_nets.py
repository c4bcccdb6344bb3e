"""Backbones: shapes for every grid, what they are before training, and the symmetries they must have."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from building import built, rough_jit
from flax import nnx
from jax import lax

from generators.nets import (
    Conv,
    DiT,
    HiddenBlock,
    ResidualMLP,
    TransformerBlock,
    UNet,
    convolution,
    drop,
    enlarge,
    from_patches,
    halve,
    product,
    to_patches,
)
from twinsim.base import BadInput, Spec

KEY = jax.random.key(0)
SMALL = {
    "unet": partial(UNet, widths=(8, 12), embedding=16, positions=2, attention=True),
    "dit": partial(DiT, patch=4, width=16, depth=1, heads=2, embedding=16),
    "mlp": partial(ResidualMLP, width=16, depth=1, embedding=16),
}
SPECS = [
    Spec((30,), 1, 0, 0, (False,)),
    Spec((17, 33), 2, 3, 1, (False, True)),
    Spec((4, 5, 8), 2, 0, 2, (True, False, True)),
    Spec((1, 6), 1, 1, 0, (False, False)),
]


def inputs(spec: Spec, seed: int = 0):
    shapes = ((*spec.grid, spec.channels), (), (*spec.grid, spec.fields), (spec.scalars,))
    draw = np.random.default_rng(seed)
    return tuple(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes)


def shaken(net: nnx.Module) -> nnx.Module:
    """The net with random parameters everywhere, as after training."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    draw = np.random.default_rng(0)  # on the host: nothing to compile
    noisy = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) + 0.1 * draw.normal(size=leaf.shape), jnp.float32), params)
    return nnx.merge(graph, noisy, rest)


def untrained(build, *args, **options) -> nnx.Module:
    return built(lambda: build(*args, **options, rngs=nnx.Rngs(0)))


def trained(build, *args, **options) -> nnx.Module:
    return shaken(untrained(build, *args, **options))


call = rough_jit(lambda net, *args: net(*args))


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "x".join(map(str, s.grid)))
@pytest.mark.parametrize("name", SMALL)
def test_output_has_the_shape_of_the_target_and_starts_at_zero(name, spec):
    net = untrained(SMALL[name], spec)
    args = inputs(spec)
    out = call(net, *args)
    assert out.shape == args[0].shape and out.dtype == jnp.float32
    assert not out.any()
    out = call(shaken(net), *args)
    assert jnp.isfinite(out).all() and out.any()


@pytest.mark.parametrize("name", SMALL)
def test_every_input_reaches_the_output(name):
    spec = Spec((4, 6), 1, 1, 1, (False, True))
    net = trained(SMALL[name], spec)
    slopes = rough_jit(lambda net, *a: jax.grad(lambda *a: net(*a)[3, 3, 0], argnums=(0, 1, 2, 3))(*a))(net, *inputs(spec))
    assert all(jnp.abs(slope).max() > 0 for slope in slopes)


@pytest.mark.parametrize("build, shape", [(partial(TransformerBlock, heads=2), (5, 8)), (HiddenBlock, (8,))])
def test_adaln_zero_blocks_start_as_the_identity(build, shape):
    block = untrained(build, 8, expansion=2, embedding=4)
    h = jax.random.normal(KEY, shape)
    np.testing.assert_array_equal(call(block, h, jnp.ones(4)), h)


def test_unet_commutes_with_a_shift_along_periodic_axes_only():
    spec = Spec((12, 16), 1, 1, 0, (False, True))
    net = trained(UNet, spec, widths=(8, 8, 8), embedding=16, attention=True)
    x, level, fields, scalars = inputs(spec)
    out = call(net, x, level, fields, scalars)
    move = partial(jnp.roll, shift=4, axis=1)  # a multiple of the coarsest cell, 2**2
    np.testing.assert_allclose(call(net, move(x), level, move(fields), scalars), move(out), atol=2e-5)  # float32 sums in another order
    wrong = partial(jnp.roll, shift=4, axis=0)
    assert jnp.abs(call(net, wrong(x), level, wrong(fields), scalars) - wrong(out)).max() > 1e-2


def test_unet_over_patches_works_at_full_resolution_and_commutes_with_a_shift_by_patches():
    spec = Spec((10, 18), 1, 1, 0, (False, True))  # 10 rows are padded to 12
    net = trained(UNet, spec, widths=(8,), embedding=16, patch=3, positions=0)
    assert net.inward.kernel.shape == (3, 3, 2 * 3 * 3, 8)
    x, level, fields, scalars = inputs(spec)
    out = call(net, x, level, fields, scalars)
    assert out.shape == x.shape and jnp.unique(out).size == x.size  # no two cells of a patch get the same
    by_patch, by_cell = (partial(jnp.roll, shift=cells, axis=1) for cells in (3, 1))
    np.testing.assert_allclose(call(net, by_patch(x), level, by_patch(fields), scalars), by_patch(out), atol=2e-5)
    assert jnp.abs(call(net, by_cell(x), level, by_cell(fields), scalars) - by_cell(out)).max() > 1e-2


@pytest.mark.slow
def test_positions_break_the_shift_symmetry():
    spec = Spec((16,), 1, 0, 0, (True,))
    net = trained(UNet, spec, widths=(8,), embedding=16, positions=4)
    x, *rest = inputs(spec)
    assert jnp.abs(call(net, jnp.roll(x, 4, 0), *rest) - jnp.roll(call(net, x, *rest), 4, 0)).max() > 1e-2


@pytest.mark.parametrize("padding", ["zero", "edge"])
def test_convolution_pads_as_told(padding):
    options = {"periodic": (False, True), "padding": padding, "dtype": jnp.float32, "initial": nnx.initializers.ones_init()}
    conv = untrained(Conv, 1, 1, **options)
    x = jax.random.normal(KEY, (5, 6, 1))
    wide = np.pad(np.pad(x[..., 0], ((0, 0), (1, 1)), "wrap"), ((1, 1), (0, 0)), "edge" if padding == "edge" else "constant")
    direct = sum(wide[i : i + 5, j : j + 6] for i in range(3) for j in range(3))
    np.testing.assert_allclose(call(conv, x)[..., 0], direct, atol=1e-5)


@pytest.mark.parametrize("grid, patch", [((8, 12), (4, 4)), ((7, 9), (4, 2)), ((5,), (3,)), ((4, 5, 6), (2, 2, 4))])
def test_patches_are_undone(grid, patch):
    x = jax.random.normal(KEY, (*grid, 3))
    tokens, count = to_patches(x, patch, (False,) * len(grid))
    assert tokens.shape == (np.prod(count), np.prod(patch) * 3)
    np.testing.assert_array_equal(from_patches(tokens, patch, count, x.shape), x)


def test_a_patch_holds_neighbouring_cells():
    tokens, _ = to_patches(jnp.arange(16.0).reshape(4, 4, 1), (2, 2), (False, False))
    np.testing.assert_array_equal(tokens[1], [2, 3, 6, 7])


def test_halving_keeps_the_mean_and_enlarging_undoes_it():
    coarse = jax.random.normal(KEY, (3, 5, 2))
    fine = enlarge(coarse, (5, 10))
    np.testing.assert_allclose(halve(fine), coarse, atol=1e-6)
    x = jax.random.normal(KEY, (6, 1, 8, 2))
    assert halve(x).shape == (3, 1, 4, 2)
    np.testing.assert_allclose(halve(x).mean((0, 1, 2)), x.mean((0, 1, 2)), atol=1e-6)


def test_dropout_keeps_the_expectation_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    dropped = drop(x, 0.25, KEY)
    assert abs(dropped.mean() - 1) < 0.015  # five standard errors, sqrt(1/3 / 40000) each
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert drop(x, 0.25, None) is x


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_options_change_cost_not_result(name):
    spec = Spec((4, 4), 1, 0, 1, (False, False))
    args = inputs(spec)
    value_and_slope = rough_jit(lambda net, x, *rest: jax.value_and_grad(lambda x: jnp.sum(jnp.square(net(x, *rest))))(x))
    plain, spare, half = (trained(SMALL[name], spec, **options) for options in ({}, {"remat": True, "dropout": 0.5}, {"dtype": "bfloat16"}))
    value, slope = value_and_slope(plain, *args)
    again, slope_again = value_and_slope(spare, *args)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(slope_again, slope, rtol=1e-3, atol=1e-4)
    rough = jnp.sum(jnp.square(call(half, *args)))
    assert abs(jnp.sqrt(rough / value) - 1) < 0.05  # bfloat16 has 8 bits, over a handful of layers
    dropped = jnp.sum(jnp.square(call(spare, *args, KEY)))
    assert abs(dropped / value - 1) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_learns_what_float32_learns(name):
    spec = Spec((4, 4), 1, 0, 1, (False, False))
    x, level, fields, scalars = inputs(spec)
    wanted = inputs(spec, 1)[0]

    def losses(**options):
        graph, params, rest = nnx.split(trained(SMALL[name], spec, **options), nnx.Param, ...)

        def loss(params):
            return jnp.mean(jnp.square(nnx.merge(graph, params, rest)(x, level, fields, scalars) - wanted))

        def step(params, _):
            value, grads = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda param, grad: param - 0.02 * grad, params, grads), value

        params, values = rough_jit(lambda params: jax.lax.scan(step, params, length=60))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        return np.asarray(values)

    whole, half = losses(), losses(dtype="bfloat16", remat=True)
    np.testing.assert_allclose(half[0], whole[0], rtol=0.05)
    assert whole[-1] < 0.3 * whole[0] and half[-1] < 0.3 * half[0]


@pytest.mark.parametrize(
    "build",
    [
        lambda s: UNet(s, widths=(), rngs=nnx.Rngs(0)),
        lambda s: UNet(s, patch=0, rngs=nnx.Rngs(0)),
        lambda s: UNet(s, padding="mirror", rngs=nnx.Rngs(0)),
        lambda s: DiT(s, width=10, heads=4, rngs=nnx.Rngs(0)),
        lambda s: DiT(s, patch=(2, 2, 2), rngs=nnx.Rngs(0)),
        lambda s: ResidualMLP(s, depth=0, rngs=nnx.Rngs(0)),
        lambda s: UNet(s._replace(grid=(2, 2, 2, 2)), rngs=nnx.Rngs(0)),
    ],
)
def test_wrong_sizes_are_refused(build):
    with pytest.raises(BadInput, match="expected|must be"):
        build(Spec((8, 8), 1, 0, 0, (False, False)))


@pytest.mark.parametrize("out", [(5,), (3, 2, 4)])
def test_a_product_is_that_of_jax_in_every_order_of_vmap_and_grad(out):
    draw = np.random.default_rng(0)
    x, kernel = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((7, 3, 6), (6, *out)))
    check_bilinear(product, lambda x, kernel: jnp.tensordot(x, kernel, 1), x, kernel)


@pytest.mark.parametrize("grid, size, pads", [((6,), (3,), (1,)), ((5, 4), (3, 3), (0, 1)), ((3, 4, 5), (3, 1, 3), (1, 0, 0))])
def test_a_convolution_is_that_of_jax_in_every_order_of_vmap_and_grad(grid, size, pads):
    draw = np.random.default_rng(0)
    x, kernel = (jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in ((2, *grid, 3), (*size, 3, 4)))

    def theirs(x, kernel, pads):
        axes = "xyz"[: len(grid)]
        numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(x[None], kernel, (1,) * len(grid), [(pad, pad) for pad in pads], dimension_numbers=numbers)[0]

    check_bilinear(partial(convolution, pads=pads), partial(theirs, pads=pads), x, kernel)


def check_bilinear(ours, theirs, x, kernel):
    def gradients(times):
        loss = lambda kernel, x: jnp.sum(jnp.sin(times(x, kernel)))  # noqa: E731
        together = jax.grad(lambda kernel, x: jnp.sum(jax.vmap(loss, (None, 0))(kernel, x)), (0, 1))(kernel, x)
        alone = jax.vmap(jax.grad(loss, (0, 1)), (None, 0))(kernel, x)
        pairs = jax.vmap(lambda x: times(x, kernel * x.mean()))(x)  # a kernel of its own for each sample
        return together, alone, pairs

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients(ours), gradients(theirs))
