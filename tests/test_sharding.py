"""What an update moves and holds, on meshes of 8 to 256 devices, from the compiled program; nothing is run, no memory is needed."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from generators.diffusion import Diffusion, Sampler
from generators.nets import DiT, ResidualMLP, UNet
from twinsim import generate, train
from twinsim import mesh as meshes
from twinsim.base import Example, Spec
from twinsim.collectives import KINDS, Collective, collectives, moved

SPEC = Spec((8, 16), 2, 1, 1, (False, True))
DEPTH, WIDTH = 1, 64
NETS = {
    "dit": partial(DiT, patch=4, width=WIDTH, depth=DEPTH, heads=4, embedding=64),
    "unet": partial(UNet, widths=(64, 64), embedding=64, positions=8, attention=True),
    "mlp": partial(ResidualMLP, width=64, depth=1, embedding=64),
}
LITTLE = 2000  # bytes: a scalar or two a leaf, for norms and the loss
STATES = 5  # arrays of the size of the parameters: they, two moments, two averages


def outlined(net: str, sizes: dict, **options):
    """Mesh, optimizer, `train.split`'s function and the state as shapes, types and shardings, of a net without a value."""
    module = nnx.eval_shape(lambda: Diffusion(SPEC, NETS[net], rngs=nnx.Rngs(0), **options))
    mesh = meshes.make_mesh(sizes)
    optimizer = train.adamw(1e-3, 100)
    assemble, params = train.split(module)
    state = jax.eval_shape(partial(train.begin, optimizer=optimizer, seed=0, averages=2), params)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return mesh, optimizer, assemble, jax.tree.map(place, state, meshes.shard(state, mesh, module.rules))


def facts(net: str, sizes: dict, rows: int = 2, **options) -> dict:
    """What an update of `rows` rows a device moves and holds, and the bytes of parameters that say what it should.

    `gathered`: of the leaves split over fsdp, whole along it; `held`: of parameters on one device; `whole`: of those not split.
    """
    mesh, optimizer, assemble, state = outlined(net, sizes, **options)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    batch = rows * mesh.shape["data"] * mesh.shape["fsdp"]
    update = train.make_update(
        lambda params, example, key: assemble(params).loss(example, key),
        optimizer,
        train.Settings(steps=100, batch=batch),
        where,
        options.get("precision", "float32"),
    )
    shapes = ((*SPEC.grid, SPEC.channels), (*SPEC.grid, SPEC.fields), (SPEC.scalars,))
    split = meshes.batch_sharding(mesh)
    examples = Example(*(jax.ShapeDtypeStruct((batch, *shape), jnp.float32, sharding=split) for shape in shapes))
    compiled = update.lower(state, examples).compile(compiler_options={"xla_backend_optimization_level": 0})
    bytes_of = lambda leaf: 4 * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))  # noqa: E731
    leaves = jax.tree.leaves(state.params)
    fsdp = mesh.shape["fsdp"]
    over = [leaf for leaf in leaves if fsdp > 1 and "fsdp" in leaf.sharding.spec]
    return {
        "moved": moved(compiled),
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "examples": 4 * rows * sum(int(np.prod(shape)) for shape in shapes),
        "total": sum(4 * leaf.size for leaf in leaves),
        "gathered": sum(map(bytes_of, over)) * fsdp,
        "held": sum(map(bytes_of, leaves)),
        "whole": sum(map(bytes_of, leaves)) - sum(map(bytes_of, over)),
    }


def on_devices(count: int, cases: list) -> list[dict]:
    """`facts` of each case, (net, sizes), on `count` devices of a process of its own."""
    program = "import json, sys, test_sharding as t; print(json.dumps([t.facts(*case) for case in json.loads(sys.argv[1])]))"
    tests = Path(__file__).parent
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "PYTHONPATH": f"{tests}:{tests.parent}"}
    ran = subprocess.run(
        [sys.executable, "-c", program, json.dumps(cases)], capture_output=True, text=True, env=os.environ | flags, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def assert_fsdp_moves_parameters_alone(found: dict) -> None:
    """ZeRO-3: split leaves gathered (for the forward pass, and where XLA wants it again for the backward one), their gradients
    scattered once, and what is held summed over `data`; a batch or an activation appears nowhere."""
    moves = found["moved"]
    assert found["gathered"] <= moves["all-gather"] <= 2 * found["gathered"]
    assert moves["reduce-scatter"] == found["gathered"]
    summed = found["held"] + found["whole"]  # leaves that are not split are summed over `fsdp` as well
    assert summed <= moves["all-reduce"] <= summed + LITTLE
    assert moves["all-to-all"] == moves["collective-permute"] == 0


def assert_state_is_split(found: dict, fsdp: int) -> None:
    assert found["whole"] <= 0.1 * found["total"] and found["held"] == pytest.approx(found["total"] / fsdp, abs=found["whole"])
    assert found["arguments"] == pytest.approx(STATES * found["held"] + found["examples"], abs=LITTLE)


# ---------------------------------------------------------------- the reader of HLO


def test_collectives_are_read_from_text():
    text = """HloModule m

%body (p: f32[4]) -> f32[4] {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.2 = (f32[3]{0}, bf16[5]{0}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
  %reduce-scatter.3 = bf16[2,2]{1,0} reduce-scatter(%b), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %agd = f32[8]{0} all-gather-done(%ag)
}
"""
    assert collectives(text) == [
        Collective("all-gather", 128, 3),
        Collective("all-reduce", 22, 1),
        Collective("reduce-scatter", 32, 1),
        Collective("all-gather", 32, 1),
    ]


def test_bytes_of_a_sum_over_devices():
    mesh = meshes.make_mesh({"data": 8})
    rows = jax.ShapeDtypeStruct((16, 100), jnp.float32, sharding=meshes.batch_sharding(mesh))
    compiled = jax.jit(lambda x: x.sum(0), out_shardings=meshes.replicated(mesh)).lower(rows).compile()
    assert moved(compiled) == dict.fromkeys(KINDS, 0) | {"all-reduce": 400}


# ---------------------------------------------------------------- where leaves live


@pytest.mark.parametrize("net", NETS)
def test_no_large_leaf_is_whole_under_fsdp(net):
    _, _, _, state = outlined(net, {"data": 2, "fsdp": 4})
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.size > meshes.SMALL:
            assert np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size // 4, meshes.leaf_path(path)


def test_a_pair_is_split_by_columns_then_rows():
    _, _, _, state = outlined("dit", {"data": 2, "fsdp": 2, "model": 2})
    block = jax.tree.map(lambda leaf: leaf.sharding.spec, state.params["net"]["blocks"][0])
    assert block["qkv"]["kernel"] == P("fsdp", None, "model", None) and block["mix"]["kernel"] == P("model", "fsdp")
    assert block["expand"] == {"kernel": P("fsdp", "model"), "bias": P("model")}
    assert block["contract"]["kernel"] == P("model", "fsdp")


def test_large_leaf_that_its_rule_cannot_split_is_split_along_another_axis():
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    tree = {"kernel": jnp.zeros((3, 3, 9, 512)), "positions": jnp.zeros((30, 64, 4)), "bias": jnp.zeros(8), "odd": jnp.zeros((99, 99))}
    specs = jax.tree.map(lambda sharding: sharding.spec, meshes.shard(tree, mesh, ((r"kernel$", P("fsdp", None)),)))
    assert specs == {"kernel": P(None, None, None, "fsdp"), "positions": P(None, "fsdp", None), "bias": P(None), "odd": P(None, None)}


# ---------------------------------------------------------------- what moves


def test_data_parallel_sums_gradients_once():
    found = facts("mlp", {"data": 8})
    assert found["total"] == found["held"] == found["whole"]
    assert found["total"] <= found["moved"].pop("all-reduce") <= found["total"] + LITTLE
    assert not any(found["moved"].values())


def test_fsdp_moves_parameters_alone():
    found = facts("mlp", {"data": 2, "fsdp": 4})
    assert_fsdp_moves_parameters_alone(found)
    assert_state_is_split(found, 4)


@pytest.mark.slow
def test_bfloat16_halves_what_is_gathered_not_what_is_summed():
    found = facts("mlp", {"data": 2, "fsdp": 4}, precision="bfloat16", remat=True)
    assert found["gathered"] / 2 <= found["moved"]["all-gather"] <= found["gathered"]
    assert found["moved"]["reduce-scatter"] == found["gathered"]
    assert found["arguments"] == pytest.approx(STATES * found["held"] + found["examples"], abs=LITTLE)  # the state is float32


@pytest.mark.slow
def test_tensor_parallel_block_sums_its_activations_once_a_pair():
    rows = 2
    found = facts("dit", {"data": 2, "fsdp": 2, "model": 2}, rows)
    moves = found["moved"]
    tokens = 4 * rows * 8 * WIDTH  # bytes of the activations of a device, on 2 x 4 patches
    modulations = 4 * rows * WIDTH * (6 * DEPTH + 2 + 2)
    sums = moves["all-reduce"] - found["held"] - found["whole"]
    assert 4 * DEPTH * tokens <= sums <= 4 * DEPTH * tokens + modulations + LITTLE  # two pairs a block, forward and backward
    # gathered besides: the gradients of the embedding's second layer and of the biases of queries, keys and values
    assert found["gathered"] <= moves["all-gather"] <= 2.2 * found["gathered"]  # twice where XLA gathers again
    assert moves["reduce-scatter"] == found["gathered"]
    assert moves["all-to-all"] == moves["collective-permute"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("net", ["dit", "unet"])
def test_nothing_grows_from_64_to_256_devices(net):
    cases = [(net, {"data": -1, "fsdp": 8})]
    some, many = (on_devices(count, cases)[0] for count in (64, 256))
    for found in (some, many):
        assert_fsdp_moves_parameters_alone(found)
        assert_state_is_split(found, 8)
    assert some == many


@pytest.mark.slow
def test_all_three_axes_at_256_devices():
    eight = facts("dit", {"data": 2, "fsdp": 2, "model": 2})
    (many,) = on_devices(256, [("dit", {"data": 64, "fsdp": 2, "model": 2})])
    assert eight == many


def test_sampling_moves_nothing():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 4})
    spec = Spec((1,), 6, 0, 1, (False,))
    module = nnx.eval_shape(lambda: Diffusion(spec, NETS["mlp"], sampler=Sampler(steps=2), rngs=nnx.Rngs(0)))
    assemble, params = train.split(module)

    class Plain:
        """A domain whose samples are targets and whose conditions are one number."""

        encode = staticmethod(lambda statistics, condition: (jnp.zeros((1, 0)), condition["x"]))
        decode = staticmethod(lambda statistics, target, condition: {"y": target})
        simulate = staticmethod(lambda sample, condition, key: sample)
        check = staticmethod(lambda outcome, condition: {"bound": jnp.abs(outcome["y"]).max()})

    sampler = generate.make_sampler(Plain(), assemble, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (8, 2)))
    compiled = sampler.lower(params, {}, keys, {"x": jax.ShapeDtypeStruct((8, 2, 1), jnp.float32)}).compile()
    assert not any(moved(compiled).values())
