"""Meshes and shardings: sizes that fit, rules that split, rows that are read once."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from twinsim import mesh as meshes
from twinsim.base import BadInput


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [({}, (8, 1, 1)), ({"fsdp": 4}, (2, 4, 1)), ({"data": 2, "fsdp": 2, "model": -1}, (2, 2, 2)), ({"data": 1, "fsdp": 8}, (1, 8, 1))],
)
def test_rest_fills_the_mesh(sizes, shape):
    mesh = meshes.make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "model")
    assert tuple(mesh.shape.values()) == shape


@pytest.mark.parametrize("sizes", [{"data": 3}, {"fsdp": 16}, {"data": 2, "fsdp": 2, "model": 1}, {"data": -1, "fsdp": 3}])
def test_sizes_that_do_not_fit_are_named(sizes):
    with pytest.raises(BadInput, match="8 devices") as error:
        meshes.make_mesh(sizes)
    for axis, size in sizes.items():
        assert f"{axis}={size}" in str(error.value)


@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"data": 0}, {"data": -1, "fsdp": -1}, {"data": -2}])
def test_senseless_sizes_are_refused(sizes):
    with pytest.raises(BadInput, match="mesh: expected"):
        meshes.make_mesh(sizes)


def test_default_rules_split_kernels():
    tree = {
        "linear": {"kernel": jnp.zeros((16, 32)), "bias": jnp.zeros(32)},
        "conv": {"kernel": jnp.zeros((3, 3, 8, 6))},
        "odd": {"kernel": jnp.zeros((5, 6))},
        "step": jnp.zeros((), jnp.int32),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, meshes.shard(tree, meshes.make_mesh({"data": 1, "fsdp": 4, "model": 2})))
    assert specs["linear"] == {"kernel": PartitionSpec("fsdp", "model"), "bias": PartitionSpec(None)}
    assert specs["conv"]["kernel"] == PartitionSpec(None, None, "fsdp", "model")
    assert specs["odd"]["kernel"] == PartitionSpec(None, "model")  # 4 does not divide 5
    assert specs["step"] == PartitionSpec()


def test_first_rule_wins_and_optimizer_state_follows_its_parameter():
    mesh = meshes.make_mesh({"data": 1, "fsdp": 8})
    rules = ((r"special/kernel$", PartitionSpec(None, "fsdp")), (r"kernel$", PartitionSpec("fsdp", None)))
    tree = {"params": {"special": {"kernel": jnp.zeros((8, 8))}}, "opt": ({"mu": {"other": {"kernel": jnp.zeros((8, 8))}}},)}
    specs = jax.tree.map(lambda sharding: sharding.spec, meshes.shard(tree, mesh, rules))
    assert specs["params"]["special"]["kernel"] == PartitionSpec(None, "fsdp")
    assert specs["opt"][0]["mu"]["other"]["kernel"] == PartitionSpec("fsdp", None)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"data": 2, "fsdp": 1, "model": 4}])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_every_row_and_place_it_where_it_belongs(sizes, processes):
    mesh, batch = meshes.make_mesh(sizes), 16
    devices = np.array(jax.devices()).reshape(processes, -1)
    rows = [meshes.process_rows(mesh, batch, mine) for mine in devices]
    np.testing.assert_array_equal(np.unique(np.concatenate(rows)), np.arange(batch))
    if sizes != {"data": 2, "fsdp": 1, "model": 4}:  # there, copies of a row live on several devices
        assert sum(len(part) for part in rows) == batch


def test_place_gives_the_global_array():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    rows = meshes.process_rows(mesh, 8)
    values = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    placed = meshes.place(rows, values[rows], mesh, 8)
    np.testing.assert_array_equal(placed, values)
    assert placed.sharding.is_equivalent_to(meshes.batch_sharding(mesh), 2)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(BadInput, match="multiple of data x fsdp = 8, got 12"):
        meshes.check_batch(meshes.make_mesh(), 12)


def test_one_task_starts_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("started"))
    meshes.start_distributed(environ={})
    meshes.start_distributed(environ={"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"})


def test_several_tasks_without_srun_are_an_error():
    with pytest.raises(BadInput, match="SLURM_STEP_NODELIST.*srun"):
        meshes.start_distributed(environ={"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


def test_several_tasks_that_do_not_meet_are_an_error(monkeypatch):
    environ = {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[1-4]"}
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: given.update(settings))
    with pytest.raises(meshes.Apart, match="SLURM_NTASKS is 4, but JAX sees 1"):
        meshes.start_distributed(20, 10, environ)
    assert (given["initialization_timeout"], given["heartbeat_timeout_seconds"]) == (20, 10)

    def refuse(**_):
        raise RuntimeError("deadline exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(meshes.Apart, match="4 tasks of SLURM job 7 did not find each other: deadline"):
        meshes.start_distributed(environ=environ)


def test_sigterm_asks_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with meshes.preemption() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    assert signal.getsignal(signal.SIGTERM) is before
