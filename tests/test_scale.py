"""The table `scale`: every shipped file is whole, what is misspelt is named, and what a file claims of a machine fits together."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from twinsim import cli, run, slurm
from twinsim import scale as scales
from twinsim.base import BadInput

FOLDER = Path(__file__).parent.parent / "conf/scale"
SYSTEMS = ("jupiter", "leonardo", "lumi", "marenostrum5")  # of EuroHPC, none of which was at hand
REQUIRED = ("scale.slurm.account=a", "scale.slurm.partition=p")


def composed(name: str, *more: str) -> dict:
    required = REQUIRED if name in SYSTEMS else ()
    return run.resolve(cli._compose([f"scale={name}", *required, *more]))


def read(name: str) -> scales.Scale:
    return scales.read(composed(name)["scale"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_field_is_written_out(path):
    table = composed(path.stem)["scale"]
    assert set(table) == set(scales.Scale.__dataclass_fields__)
    assert set(table["hardware"]) == set(scales.Hardware.__dataclass_fields__)
    assert table["slurm"] is None or set(table["slurm"]) == set(slurm.Settings.__dataclass_fields__) - {"environment"}
    scales.read(table)


@pytest.mark.parametrize("name", ["node", *SYSTEMS])
def test_a_node_has_a_process_a_device_and_splits_parameters_among_them(name):
    scale = read(name)
    assert scale.slurm and scale.slurm.tasks_per_node == scale.hardware.devices_per_node == scale.mesh["fsdp"] and scale.mesh["data"] == -1
    assert scale.precision == "bfloat16" and scale.slurm.grace >= 60
    assert scale.slurm.gpus_per_node or any("gpu" in option for option in scale.slurm.sbatch)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_named_system_asks_who_pays_and_says_that_nobody_ran_it(name):
    with pytest.raises(BadInput, match="scale.slurm.account, scale.slurm.partition: expected a value, .* scale.slurm.account=VALUE"):
        run.resolve(cli._compose([f"scale={name}"]))
    opening = (FOLDER / f"{name}.yaml").read_text().partition("\ndefaults:")[0]
    assert "NOT RUN ON THIS SYSTEM" in opening and "Sources:" in opening
    hardware = read(name).hardware
    assert hardware.source and None not in (
        hardware.device_memory_gib,
        hardware.peak_tflops,
        hardware.device_power_w,
        hardware.node_power_w,
    )


def test_lumi_binds_each_task_to_six_cores_of_a_chiplet_of_its_own():
    scale = read("lumi")
    found = re.search(r"mask_cpu:([0-9a-f,]+)", scale.slurm.run)
    masks = [int(mask, 16) for mask in found[1].split(",")]
    assert len(masks) == 8 and [mask.bit_count() for mask in masks] == [int(scale.environment["OMP_NUM_THREADS"])] * 8
    chiplets = [{core // 8 for core in range(64) if mask >> core & 1} for mask in masks]
    assert sorted(map(tuple, chiplets)) == [(chiplet,) for chiplet in range(8)]
    assert not sum(masks) & sum(1 << core for core in range(0, 64, 8))  # the first core of a chiplet is the system's


@pytest.mark.parametrize("name", ["node", "leonardo", "marenostrum5", "jupiter"])
def test_threads_fit_the_cores_of_a_task(name):
    for scale in (read(name), scales.read(composed(name, "scale.slurm.cpus_per_task=3")["scale"])):
        assert int(scale.environment["OMP_NUM_THREADS"]) == scale.slurm.cpus_per_task
        assert f"--cpus-per-task={scale.slurm.cpus_per_task} " in scale.slurm.run  # srun does not inherit it


def test_xla_knows_the_flags():
    """XLA ends a process that is given a flag which it does not know."""
    flags = {flag for path in FOLDER.glob("*.yaml") for flag in str(read(path.stem).environment.get("XLA_FLAGS", "")).split()}
    assert flags
    environment = {**os.environ, "XLA_FLAGS": " ".join(sorted(flags)), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("+scale.precison=float32", "config scale: .* has no argument 'precison', did you mean 'precision'"),
        ("scale.slurm={node: 2}", "config scale.slurm.node: expected .*, did you mean nodes"),
        ("+scale.hardware.peak_tflop=5", "config scale.hardware: .* has no argument 'peak_tflop', did you mean 'peak_tflops'"),
        ("scale.precision=float16", "config scale.precision: expected one of float32, bfloat16, got 'float16'"),
        ("scale.remat=maybe", "config scale.remat: expected true or false, got 'maybe'"),
        ("scale.slurm=true", "config scale.slurm: expected a table, got True"),
        ("scale.slurm={nodes: many}", "config scale.slurm.nodes: expected a whole number of at least 1, got 'many'"),
        ("scale.slurm={nodes: 0}", "config scale.slurm.nodes: expected a whole number of at least 1, got 0"),
        ("scale.slurm={sbatch: --exclusive}", "config scale.slurm.sbatch: expected a list of lines, got '--exclusive'"),
        ("scale.start.heartbeat_timeout=0", "config scale.start.heartbeat_timeout: expected at least 1, got 0"),
        ("+scale.environment.A=[1]", "config scale.environment.A: expected text or a whole number or a number"),
        ("scale.hardware.peak_tflops=0", "config scale.hardware.peak_tflops: expected a positive number or null, got 0"),
        ("scale.mesh.fsdp=two", "config scale.mesh: expected a table of whole numbers"),
        ("+scale._target_=twinsim.base.Bounds", "config scale: expected names of settings, got '_target_'"),
        ("+scale.start._partial_=true", "config scale.start: expected names of settings, got '_partial_'"),
        ("+train._partial_=1", "config train: expected names of settings, got '_partial_'"),
    ],
)
def test_what_is_wrong_is_named(change, says):
    with pytest.raises(BadInput, match=says):
        run.check(composed("laptop", change))


def test_older_configurations_are_still_read():
    assert scales.read({"mesh": {"data": -1}}) == scales.Scale(mesh={"data": -1})


def test_the_scale_does_not_name_the_model():
    assert run.places(composed("laptop")) == run.places(composed("lumi", "scale.slurm.nodes=4"))


def test_devices_of_a_job():
    assert scales.devices(read("laptop")) is None
    assert scales.devices(scales.read(composed("lumi", "scale.slurm.nodes=8")["scale"])) == 64
    with pytest.raises(BadInput, match="tasks_per_node: expected at most the 8 devices of a node, got 9"):
        scales.devices(scales.read(composed("lumi", "scale.slurm.tasks_per_node=9")["scale"]))
