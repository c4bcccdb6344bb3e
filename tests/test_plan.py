"""What a training will need, against formulas by hand and against what XLA allots to the real update."""

import json
import math
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from building import built
from flax import nnx

from twinsim import checkpoint, cli, plan, run, train
from twinsim import mesh as meshes
from twinsim import scale as scales
from twinsim.base import BadInput, Example, Spec

WIDTH = 64
SPEC = Spec(grid=(WIDTH,), channels=1, fields=0, scalars=0, periodic=(False,))
QUANTITIES = WIDTH * WIDTH + WIDTH  # of a layer
LAYERS = 3


class Layers(nnx.Module):
    """Linear layers one after the other, a generator of which everything can be counted by hand."""

    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])
        self.shift = nnx.Variable(jnp.zeros(WIDTH))  # fixed, not trained

    def loss(self, example, key):
        x = example.target[:, 0] + self.shift[...]
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.mean(x**2)


class Again(Layers):
    """The same layers twice, computed again in the backward pass."""

    def loss(self, example, key):
        block = jax.checkpoint(lambda x: reduce(lambda x, layer: jnp.tanh(layer(x)), self.layers, x))
        return jnp.mean(block(block(example.target[:, 0])) ** 2)


def layers() -> Layers:
    return Layers(rngs=nnx.Rngs(0))


def adamw():
    return train.adamw(1e-2, steps=50, warmup=3, weight_decay=1e-2)


def abstract_state(params):
    return jax.eval_shape(partial(train.begin, optimizer=adamw(), seed=0, averages=2), params)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return toy.place(tmp_path_factory.mktemp("toy"))


# ---------------------------------------------------------------- counted by hand


def test_operations_of_one_example():
    cost = plan.cost_of(plan.Module(layers), SPEC)
    # forward and the gradient by the kernel for each layer, the gradient by its input for each but the first; two operations a product
    products = 2 * WIDTH**2 * (3 * LAYERS - 1)
    assert cost.flops == pytest.approx(products, rel=0.05)  # the rest grows with the width alone


def test_activations_of_one_example_are_the_inputs_and_outputs_of_layers():
    cost = plan.cost_of(plan.Module(layers), SPEC)
    vectors = cost.activations / (4 * WIDTH)
    assert LAYERS <= vectors <= 3 * LAYERS + 2  # each layer's input, and what its tanh needs


def test_of_blocks_that_are_computed_again_one_is_there_at_a_time():
    once, again = (plan.cost_of(plan.Module(lambda made=made: made(rngs=nnx.Rngs(0))), SPEC).activations for made in (Layers, Again))
    assert once < again <= once + 4 * 4 * WIDTH  # the layers of one block, and what stands between the blocks


def test_state_under_a_mesh():
    module = plan.Module(layers)
    state = abstract_state(module.params)
    memory = plan.memory_per_device(state, meshes.abstract_mesh({"fsdp": 4, "model": 2}, 64), SPEC, plan.Cost(0.0, 100), rows=3)
    kernels = LAYERS * WIDTH**2 // 8  # split over fsdp and model, replicated over the data axis
    biases = LAYERS * WIDTH
    assert memory.parameters == memory.gradients == 4 * (kernels + biases)
    assert memory.averages == 2 * memory.parameters
    assert 0 <= memory.optimizer - 2 * memory.parameters <= 32  # two moments, and a few counters and the key
    assert memory.activations == 300 and memory.batch == 3 * 4 * WIDTH
    assert memory.gathered == 4 * LAYERS * QUANTITIES // 2
    alone = plan.memory_per_device(state, meshes.abstract_mesh({}, 1), SPEC, plan.Cost(0.0, 100), rows=4, microbatches=2)
    assert alone.parameters == 4 * LAYERS * QUANTITIES and alone.gathered == 0 and alone.activations == 200


@pytest.mark.parametrize("sizes", [{"fsdp": 8, "data": 1}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "model": 2}, {}])
def test_memory_is_what_the_compiled_update_takes(sizes):
    mesh = meshes.make_mesh(sizes)
    settings = train.Settings(steps=5, batch=16)
    assemble, state = train.init(built(layers), adamw(), 0, mesh)
    loss = lambda params, example, key: assemble(params).loss(example, key)  # noqa: E731
    rows = jax.ShapeDtypeStruct((16, WIDTH, 1), jnp.float32, sharding=meshes.batch_sharding(mesh))
    empty = [jax.ShapeDtypeStruct((16, *shape), jnp.float32, sharding=meshes.batch_sharding(mesh)) for shape in ((WIDTH, 0), (0,))]
    update = train.make_update(loss, adamw(), settings, train.where(state))
    told = update.lower(state, Example(rows, *empty)).compile().memory_analysis()
    per_device = 16 // (mesh.shape["data"] * mesh.shape["fsdp"])
    shapes = abstract_state(plan.Module(layers).params)
    planned = plan.memory_per_device(shapes, meshes.abstract_mesh(sizes, 8), SPEC, plan.Cost(0.0, 0), per_device)
    assert planned.state + planned.batch == pytest.approx(told.argument_size_in_bytes, rel=0.02)


def test_time_and_energy_by_hand():
    scale = scales.read(
        {
            "slurm": {"nodes": 2, "tasks_per_node": 4},
            "hardware": {"devices_per_node": 4, "peak_tflops": 100.0, "device_power_w": 300.0, "node_power_w": 400.0},
        }
    )
    (fast, slow), _ = plan._step_time(1e12, scale, None)
    assert fast == pytest.approx(1e12 / 40e12 + 0.001) and slow == pytest.approx(1e12 / 5e12 + 0.010)
    (low, high), _ = plan._energy((1.0, 2.0), 4, scale)
    assert low == pytest.approx((400 + 0.5 * 4 * 300) / 1000) and high == pytest.approx(2 * (400 + 4 * 300) / 1000)
    assert plan._step_time(1e12, scale, 0.25)[0] == (0.25, 0.25)
    assert plan._step_time(1e12, scales.Scale(), None)[0] is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("02:00:00", 7200), ("1-12:00:00", 129600), ("30", 1800), ("30:15", 1815), ("2-0", 172800), ("1-6:30", 109800)]
)
def test_times_as_slurm_reads_them(text, seconds):
    assert plan._seconds(text) == seconds


@pytest.mark.slow
def test_precision_and_rematerialisation_reach_the_parts_that_take_them():
    node = {
        "_target_": "generators.diffusion.Diffusion",
        "net": {"_target_": "generators.nets.DiT", "_partial_": True, "width": 64, "heads": 4, "depth": 2},
    }
    spec = Spec((16, 16), 2, 1, 3, (False, True))
    build = lambda **asked: plan.Module(lambda: run.build(node, "", spec=spec, rngs=nnx.Rngs(0), **asked))  # noqa: E731
    plain, half, lean = (plan.cost_of(build(**asked), spec) for asked in ({}, {"precision": "bfloat16"}, {"remat": True}))
    assert 0.4 * plain.activations < half.activations < 0.8 * plain.activations
    assert lean.activations < 0.8 * plain.activations and lean.flops > 1.2 * plain.flops


# ---------------------------------------------------------------- a configuration


def test_plan_of_a_configuration(made):
    found = plan.plan(toy.config(made, "scale.mesh.fsdp=4", "scale.hardware.devices_per_node=8"), toy.quiet)
    assert found.devices == 8 and found.mesh == {"data": 2, "fsdp": 4, "model": 1} and (found.batch, found.rows_per_device) == (8, 1)
    assert found.storage["examples"] == 4 * 365 * (8 + 2)  # days of a year, components and the season
    assert found.storage["samples"] == 3 * 4 * 3 * 10 * 8 * 12 * 2  # as draws, data set and netCDF; members, days, cells, variables
    assert found.storage["held-out draws"] == 2 * 4 * 4 * 24 * 8 * 12 * 2  # for test and memory; members, days, cells, variables
    assert found.storage["checkpoints"] == pytest.approx(3 * 20 * found.parameters, rel=0.01)  # 5 copies of float32, 2 kept and a new one
    low, high = found.training_s
    assert (low, high) == pytest.approx([each * found.steps for each in found.step_s]) and low < high
    assert found.node_hours == pytest.approx((low / 3600, high / 3600)) and not found.misfit
    assert not (made / "out").exists()  # nothing is written


def told(*_, **__):
    raise RuntimeError


def test_what_is_there_is_used(made, tmp_path, monkeypatch):
    config = {**toy.config(made), "out": str(tmp_path)}
    expected = plan.plan(config, toy.quiet)
    run.data(config, toy.quiet)
    folder = run.places(config).model
    folder.mkdir(parents=True)
    rates = (1.0, 80.0, 40.0, 60.0)  # the first holds the compilation
    lines = [json.dumps({"step": step, "loss": 1.0, "grad_norm": 1.0, "examples_per_s": rate}) for step, rate in enumerate(rates, 1)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(json.dumps(config))
    found = plan.plan(config, toy.quiet)
    held = sum(path.stat().st_size for path in run.places(config).statistics.rglob("*") if path.is_file())
    assert (
        found.spec == expected.spec and found.storage == {**expected.storage, "statistics": held} and expected.storage["statistics"] is None
    )
    assert found.measured == 60.0 and found.step_s == pytest.approx((8 / 60, 8 / 60))
    monkeypatch.setattr(train, "fit", told)  # of a finished model what another machine looks at leaves no trace
    checkpoint.save(folder / "checkpoints", config["train"]["steps"], {"a": np.zeros(1)}, wait=True)
    with pytest.raises(RuntimeError):
        run.training({**config, "scale": {**config["scale"], "environment": {"A": "1"}}}, toy.quiet)
    assert (folder / "config.yaml").read_text() == json.dumps(config)
    elsewhere = plan.plan({**config, "scale": {**config["scale"], "environment": {"A": "1"}}}, toy.quiet)
    assert elsewhere.measured == 60.0 and elsewhere.step_s == expected.step_s and "not used here" in " ".join(elsewhere.notes)


@pytest.mark.parametrize("content", [b"scale: \xff", b"a: &a [1]\nscale: *a", b"[" * 10**5, b""])
def test_a_damaged_configuration_of_a_model_is_that_of_another_machine(made, tmp_path, content):
    config = {**toy.config(made), "out": str(tmp_path)}
    folder = run.places(config).model
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"step": 1, "examples_per_s": 5.0}')
    (folder / "config.yaml").write_bytes(content)
    measured, told = plan._measured(config, run.training_settings(config))
    assert measured == 5.0 and not told.same_machine


def test_what_does_not_fit_is_refused(made, capsys):
    words = [*toy.words(made / "toy.nc", made / "out"), f"scenario={made / 'toy.yaml'}"]
    assert cli.main(["plan", *words, "scale.hardware.device_memory_gib=0.0001"]) == 2
    out, err = capsys.readouterr()
    assert "memory a device" in out and "plan: a device has 78.6 KiB for JAX, but needs" in err
    assert cli.main(["plan", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["needed"] == sum(told["memory"].values()) and told["assumptions"]
    with pytest.raises(BadInput, match="batch: expected a multiple of data x fsdp = 3, got 8"):
        plan.plan(toy.config(made, "scale.hardware.devices_per_node=3"), toy.quiet)
    with pytest.raises(BadInput, match="product is the 6 devices, got data=-1, fsdp=4"):
        plan.plan(toy.config(made, "scale.hardware.devices_per_node=6", "scale.mesh.fsdp=4"), toy.quiet)


def test_data_that_take_long_to_make_are_not_made(tmp_path):
    config = run.resolve(cli._compose(["domain=climate/simulate", f"out={tmp_path}"]))
    with pytest.raises(BadInput, match="truth.simulated would take long to make them: `twinsim data` first"):
        plan.plan(config, toy.quiet)


def test_another_machine_needs_no_account(capsys, made):
    words = [*toy.words(made / "toy.nc", made / "out"), f"scenario={made / 'toy.yaml'}"]
    words = [word for word in words if word != "scale=tiny"] + ["scale=lumi", "scale.slurm.nodes=2", "train.batch=32"]
    assert cli.main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "2 nodes, 16 devices; mesh data=2, fsdp=8, model=1" in out and "32 examples, 2 a device" in out


def test_too_little_room_is_told(tmp_path):
    scale = scales.Scale(hardware=scales.Hardware(storage_gib=1.0))
    assert plan._room({"checkpoints": 2**30, "samples": 2**30}, scale, tmp_path) == ["storage: 2.00 GiB are needed, but there are 1.00 GiB"]
    assert plan._room({"checkpoints": 2**30, "samples": None}, scale, tmp_path) == []
    assert len(plan._room({"samples": 2**70}, scales.Scale(), tmp_path / "not" / "there")) == 1


def test_numbers_are_told_in_fitting_units():
    assert plan._gib(1536) == "1.5 KiB" and plan._gib(3 * 2**30) == "3.00 GiB"
    assert plan._between((60.0, 1800.0), ("s", 1), ("min", 60), ("hours", 3600)) == "1 to 30 min"
    assert plan._between(None, ("s", 1)) == "not known" and plan._between((0.5, 0.5), ("kWh", 1)) == "0.5 kWh"
    assert math.isclose(plan.GIB, 2**30)
