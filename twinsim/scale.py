"""What depends on the machine: the table `scale` of a configuration, checked, and what is known of the machine's hardware.

Nothing here decides what is computed: a model keeps its name, and its checkpoints, on every scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from twinsim import slurm as slurms
from twinsim.base import BadInput
from twinsim.build import build


def _at_least(least: int, place: str, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise BadInput(f"config scale.{place}.{name}: expected at least {least}, got {value}")


@dataclass(frozen=True)
class Start:
    """How long the processes of a job wait to find each other, and for a sign of life afterwards, s."""

    initialization_timeout: int = 60
    heartbeat_timeout: int = 30

    def __post_init__(self) -> None:
        _at_least(1, "start", initialization_timeout=self.initialization_timeout, heartbeat_timeout=self.heartbeat_timeout)


@dataclass(frozen=True)
class Hardware:
    """What is known of the machine, for `twinsim plan` alone; null where it is not known.

    Attributes:
      devices_per_node: devices that JAX sees there.
      device_memory_gib: GiB a device.
      peak_tflops: TFLOP/s of dense matrix products a device, in the precision of this scale.
      device_power_w, node_power_w: W of a busy device, and of a node without its devices.
      storage_gib: quota of the project's work folder, GiB.
      source: where these figures are from.
    """

    devices_per_node: int | None = None
    device_memory_gib: float | None = None
    peak_tflops: float | None = None
    device_power_w: float | None = None
    node_power_w: float | None = None
    storage_gib: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "source" and value is not None and not value > 0:
                raise BadInput(f"config scale.hardware.{each.name}: expected a positive number or null, got {value}")


@dataclass(frozen=True)
class Scale:
    """The table `scale`.

    Attributes:
      mesh: devices along `data`, `fsdp` and `model`; -1 for the rest.
      precision: of the computation; the state is always float32.
      remat: the activations of a block are computed again in the backward pass.
      environment: variables of each job.
      slurm: what each job asks of SLURM; null where there is none.
    """

    mesh: Mapping[str, int] = field(default_factory=dict)
    precision: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    start: Start = Start()
    environment: Mapping[str, str | int | float] = field(default_factory=dict)
    slurm: slurms.Settings | None = None
    hardware: Hardware = Hardware()


PARTS = {"start": Start, "hardware": Hardware}


def read(table: Mapping[str, Any]) -> Scale:
    """The table `scale` of a configuration. Raises BadInput: an unknown name, with the nearest known one, or a value of a wrong kind."""
    if not isinstance(table, Mapping):
        raise BadInput(f"config scale: expected a table, got {table!r}")
    sizes = table.get("mesh", {})
    if not isinstance(sizes, Mapping) or not all(type(size) is int for size in sizes.values()):
        raise BadInput(f"config scale.mesh: expected a table of whole numbers, got {sizes!r}")
    for place, part in (("scale", table), *((f"scale.{name}", table.get(name)) for name in PARTS)):
        if isinstance(part, Mapping) and (hidden := [name for name in part if str(name).startswith("_")]):
            raise BadInput(f"config {place}: expected names of settings, got {hidden[0]!r}")
    node = {"_target_": "twinsim.scale.Scale", **table}
    for name, part in PARTS.items():
        inner = table.get(name)
        if inner is not None and not isinstance(inner, Mapping):
            raise BadInput(f"config scale.{name}: expected a table, got {inner!r}")
        if inner is None:
            node.pop(name, None)
        else:
            node[name] = {"_target_": f"twinsim.scale.{part.__name__}", **inner}
    asked = node.pop("slurm", None)
    return replace(build(node, "scale"), slurm=None if asked is None else slurms.settings(table))


def devices(scale: Scale) -> int | None:
    """How many devices a job of this scale has, under SLURM one a task; None where that is whatever the machine has. Raises BadInput."""
    there = scale.hardware.devices_per_node
    if scale.slurm is None:
        return there
    if there is not None and scale.slurm.tasks_per_node > there:
        raise BadInput(
            f"config scale.slurm.tasks_per_node: expected at most the {there} devices of a node, got {scale.slurm.tasks_per_node}"
        )
    return scale.slurm.nodes * scale.slurm.tasks_per_node
