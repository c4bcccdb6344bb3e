"""Devices and processes become a mesh and shardings: the only file that knows how many there are.

Three axes: `data` holds replicas of the parameters, `fsdp` splits both batch and parameters, `model` splits parameters alone.
Which leaf is split how is a table of rules, so that the same code runs on a laptop's processor and on many nodes. What moves along
`data` and `fsdp` is written out here (`mean_gradient`); what moves along `model` follows from the rules, by XLA's partitioner.
"""

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from twinsim.base import Array, BadInput

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))  # the rows of a batch; every other axis of it is whole

SMALL = 4096  # elements of a leaf that may be whole on every device

Rules = Sequence[tuple[str, PartitionSpec]]
# For a generator without rules of its own. The last two axes of a kernel, of a linear layer `[in, out]` and of a convolution
# `[..., in, out]`, are its largest.
RULES: Rules = (
    (r"(^|/)(kernel|embedding)$", PartitionSpec("fsdp", "model")),
    (r"", PartitionSpec()),
)


GOODBYE = 5.0  # seconds that a process which ends with an error waits for the others to do so as well
TOGETHER = 60.0  # the same of one that was asked to leave: the others were too, and finish the step that they are in


class Preempted(RuntimeError):
    """The machine asked this run to leave; its state is saved and the same command goes on from there."""

    exit_code = 75


class Apart(RuntimeError):
    """The processes of a job did not find each other."""

    exit_code = 2


class Elsewhere(RuntimeError):
    """The first process of this run has ended, and has said why."""

    def __init__(self, exit_code: int):
        super().__init__("the first process of this run has ended")
        self.exit_code = exit_code


# ---------------------------------------------------------------- mesh


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all of them by default) with the given axis sizes; -1 stands for the rest.

    Raises:
      BadInput: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    return jax.make_mesh(mesh_shape(sizes, len(devices)), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def mesh_shape(sizes: Mapping[str, int] | None, count: int) -> tuple[int, ...]:
    """The size of each of `AXES` on `count` devices, whether they are here or not; -1 stands for the rest. Raises BadInput."""
    wished = {"data": -1, "fsdp": 1, "model": 1} | dict(sizes or {})
    if unknown := set(wished) - set(AXES):
        raise BadInput(f"mesh: expected the axes {', '.join(AXES)}, got {', '.join(sorted(unknown))}")
    named = ", ".join(f"{axis}={wished[axis]}" for axis in AXES)
    if any(size != -1 and size < 1 for size in wished.values()) or list(wished.values()).count(-1) > 1:
        raise BadInput(f"mesh: expected axis sizes of at least 1, at most one of them -1 for the rest, got {named}")
    fixed = int(np.prod([size for size in wished.values() if size != -1]))
    shape = tuple(count // fixed if wished[axis] == -1 else wished[axis] for axis in AXES)
    if int(np.prod(shape)) != count:
        raise BadInput(f"mesh: expected axis sizes whose product is the {count} devices, got {named}")
    return shape


def abstract_mesh(sizes: Mapping[str, int] | None, count: int) -> AbstractMesh:
    """The mesh that `count` devices would make: it says what each of them holds, and computes nothing. Raises BadInput."""
    return AbstractMesh(mesh_shape(sizes, count), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def copy_here(tree: Any, mesh: Mesh) -> Any:
    """`tree`, which lies spread over `mesh`, whole on every device of this process; all processes must ask."""
    here = replicated(local_mesh())
    if processes() == 1:
        return jax.device_put(tree, here)
    gathered = jax.jit(lambda whole: whole, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda leaf: jax.device_put(leaf.addressable_data(0), here), gathered)


# ---------------------------------------------------------------- parameters


def leaf_path(path: Sequence[Any]) -> str:
    """The keys from the top of a pytree to a leaf, joined by slashes: `params/blocks/0/kernel`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def shard(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """The sharding of each leaf of `tree`: that of the first rule whose pattern is found in the leaf's path.

    A spec shorter than the leaf's rank is meant for its last axes. An axis that its mesh axes do not divide stays whole; a leaf of
    more than `SMALL` elements that is then not split over `fsdp` is split along its largest axis that can be.
    """

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding:
        spec = next((spec for pattern, spec in rules if re.search(pattern, leaf_path(path))), PartitionSpec())
        rank = len(leaf.shape)
        aligned = (None,) * (rank - len(spec)) + tuple(spec) if len(spec) <= rank else (None,) * rank
        placed = [axes if size % _count(mesh, axes) == 0 else None for axes, size in zip(aligned, leaf.shape, strict=True)]
        if "fsdp" not in placed and int(np.prod(leaf.shape)) > SMALL:
            whole = [axis for axis in range(rank) if placed[axis] is None and leaf.shape[axis] % mesh.shape["fsdp"] == 0]
            if whole:
                placed[max(whole, key=lambda axis: leaf.shape[axis])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*placed))

    return jax.tree_util.tree_map_with_path(one, tree)


def _count(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


# ---------------------------------------------------------------- gradients


def mean_gradient(gradient: Callable[..., tuple[Any, Any]], shardings: Any, dtype: Any = jnp.float32) -> Callable[..., tuple[Any, Any]]:
    """`(params, *rows) -> (value, gradient)`, the means over all rows of a batch, from the `gradient` for the rows of one device.

    Each device takes its own rows, and nothing but parameters and their gradients ever moves along `data` and `fsdp`: a leaf that is
    split over `fsdp` is gathered where it is used, its gradient is summed back into the parts (reduce-scatter), and then summed
    over `data`. Rajbhandari et al. (2020), "ZeRO", stage 3.

    Args:
      gradient: `(whole, params, *rows) -> (value, gradient)`, where `whole(params)`, to be called inside of what is
        differentiated, are the whole parameters, in `dtype` where they have two or more axes.
      shardings: where each leaf of the parameters lives.
    """
    mesh: Mesh = jax.tree.leaves(shardings)[0].mesh
    axes = jax.tree.map(lambda sharding: _axis_along(sharding.spec, "fsdp") if mesh.shape["fsdp"] > 1 else -1, shardings)
    places = jax.tree.map(lambda sharding, axis: _Place(axis, _only(sharding.spec, "model"), mesh.shape["model"] > 1), shardings, axes)
    devices = _count(mesh, ("data", "fsdp"))

    def whole(params: Any) -> Any:
        return jax.tree.map(lambda leaf, place: _gather(leaf, place, jnp.dtype(dtype) if leaf.ndim > 1 else leaf.dtype), params, places)

    if mesh.size == 1:
        return lambda params, *rows: gradient(whole, params, *rows)

    def total(value: Array, along: Sequence[str]) -> Array:
        for axis in along:  # within a node, then between nodes: the same sums, in the same order, however processes hold the devices
            value = lax.psum(value, axis) if mesh.shape[axis] > 1 else value
        return value

    def mean(params: Any, *rows: Any) -> tuple[Any, Any]:
        value, grads = gradient(whole, params, *rows)
        grads = jax.tree.map(lambda grad, axis: total(grad, ("data",) if axis >= 0 else ("fsdp", "data")) / devices, grads, axes)
        return total(value, ("fsdp", "data")) / devices, grads

    held = jax.tree.map(lambda axis: PartitionSpec(*(None,) * axis, "fsdp") if axis >= 0 else PartitionSpec(), axes)

    def spread(params: Any, *rows: Any) -> tuple[Any, Any]:
        specs = (held, *(BATCH for _ in rows))
        alone = jax.shard_map(
            mean, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), held), axis_names={"data", "fsdp"}, check_vma=False
        )
        return alone(params, *rows)

    return spread


def forgetting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose gathered parameters are not kept for the backward pass but gathered again: else no memory were saved."""
    cheap = {"custom_vjp_call", "convert_element_type", "reshape", "transpose"}  # `_gather`, and what stands between it and a use
    return jax.checkpoint(function, policy=lambda primitive, *_, **__: primitive.name not in cheap)


def _axis_along(spec: PartitionSpec, name: str) -> int:
    """Which axis of an array with `spec` is split over the mesh axis `name`; -1 for none."""
    return next((axis for axis, names in enumerate(spec) if name == names), -1)


def _only(spec: PartitionSpec, name: str) -> PartitionSpec:
    """What of `spec` speaks of the mesh axis `name`."""
    return PartitionSpec(*(name if names == name else None for names in spec))


@dataclass(frozen=True)
class _Place:
    """Along which axis a leaf is split over `fsdp`, -1 for none; its split over `model`, and whether there is such a mesh axis."""

    axis: int
    model: PartitionSpec
    several: bool

    def along_fsdp(self, collective: Callable[[jax.Array], jax.Array], leaf: jax.Array) -> jax.Array:
        """A collective over `fsdp` of each part over `model`: XLA's partitioner alone would first make those parts whole."""
        if self.several:
            collective = jax.shard_map(collective, in_specs=self.model, out_specs=self.model, axis_names={"model"}, check_vma=False)
        return collective(leaf)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: jax.Array, place: _Place, dtype: Any) -> jax.Array:
    """The whole of a leaf that is split over `fsdp`, sent in `dtype`; its gradient is summed in the leaf's own type."""
    part = part.astype(dtype)
    return part if place.axis < 0 else place.along_fsdp(partial(lax.all_gather, axis_name="fsdp", axis=place.axis, tiled=True), part)


def _gather_forward(part: jax.Array, place: _Place, dtype: Any) -> tuple[jax.Array, jax.Array]:
    return _gather(part, place, dtype), jnp.zeros((), part.dtype)


def _gather_backward(place: _Place, dtype: Any, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    grad = grad.astype(like.dtype)
    if place.axis < 0:
        return (grad,)
    return (place.along_fsdp(partial(lax.psum_scatter, axis_name="fsdp", scatter_dimension=place.axis, tiled=True), grad),)


_gather.defvjp(_gather_forward, _gather_backward)


# ---------------------------------------------------------------- batches


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def check_batch(mesh: Mesh | AbstractMesh, batch: int) -> None:
    """Raises BadInput where `batch` rows do not divide evenly over the mesh."""
    if batch % (count := _count(mesh, ("data", "fsdp"))):
        raise BadInput(f"batch: expected a multiple of data x fsdp = {count}, got {batch}")


def process_rows(mesh: Mesh, batch: int, devices: Iterable[jax.Device] | None = None) -> np.ndarray:
    """Which rows of a global batch the given devices hold, this process's own by default; sorted, int64."""
    mine = set(jax.local_devices() if devices is None else devices)
    where = batch_sharding(mesh).devices_indices_map((batch,))
    held = [np.arange(batch)[index[0]] for device, index in where.items() if device in mine]
    return np.unique(np.concatenate(held)).astype(np.int64) if held else np.zeros(0, np.int64)


def place(rows: np.ndarray, local: np.ndarray, mesh: Mesh, batch: int) -> jax.Array:
    """A global array `[batch, ...]` from the values `local` of this process's `rows`; nothing is sent between processes."""

    def held(index: Any) -> np.ndarray:
        return local[np.searchsorted(rows, np.arange(batch)[index[0]])]

    return jax.make_array_from_callback((batch, *local.shape[1:]), batch_sharding(mesh), held)


# ---------------------------------------------------------------- processes


def start_distributed(initialization_timeout: int = 60, heartbeat_timeout: int = 30, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a SLURM step; does nothing where SLURM_NTASKS is absent or 1. Call before JAX touches a device.

    Timeouts in s.

    Raises:
      BadInput: there are several tasks, but this process was not started as one of them.
      Apart: the processes did not find each other.
    """
    tasks = environ.get("SLURM_NTASKS", "1")
    if not tasks.isdecimal():
        raise BadInput(f"SLURM_NTASKS: expected a number, got {tasks!r}")
    if int(tasks) <= 1:
        return
    needed = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if missing := [name for name in needed if name not in environ]:
        raise BadInput(f"SLURM_NTASKS is {tasks}, but {', '.join(missing)} is not set: start the command with srun")
    if not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # on processors, two programs at once may wait for each other's messages
        try:
            jax.distributed.initialize(
                initialization_timeout=initialization_timeout, heartbeat_timeout_seconds=heartbeat_timeout, cluster_detection_method="slurm"
            )
        except (RuntimeError, ValueError) as error:
            raise Apart(f"the {tasks} tasks of SLURM job {environ['SLURM_JOB_ID']} did not find each other: {error}") from error
    if jax.process_count() != int(tasks):
        raise Apart(f"SLURM_NTASKS is {tasks}, but JAX sees {jax.process_count()} processes")


def processes() -> int:
    """How many processes this run has; may be asked before JAX touches a device."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes logs and manifests."""
    return jax.process_index() == 0


def local_mesh() -> Mesh:
    """A mesh over the devices of this process alone, for work that needs no other process."""
    return make_mesh(devices=jax.local_devices())


def wait_for_all(name: str) -> None:
    """Returns when every process has come to this point."""
    if processes() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(fact: bool) -> bool:
    """Whether `fact` holds on every process; each of them must ask."""
    return bool(np.all(multihost_utils.process_allgather(np.array(fact)))) if processes() > 1 else fact


@contextlib.contextmanager
def first_leads() -> Iterator[None]:
    """The block runs on the first process and then on the others, which find what it made.

    Where it ends with an error on the first, the others do not begin it.

    Raises:
      Elsewhere: on the others, with the exit code of the first.
    """
    if processes() == 1:
        yield
    elif not is_first():
        if code := _from_first(0):
            raise Elsewhere(code)
        yield
    else:
        try:
            yield
        except Exception as error:
            _from_first(getattr(error, "exit_code", 2))
            raise
        _from_first(0)


def _from_first(code: int) -> int:
    """What the first process ended with, told to all; from here on they count their steps alike."""
    global _steps
    code, _steps = (int(value) for value in multihost_utils.broadcast_one_to_all(np.array([code, _steps])))
    return code


def leave(code: int) -> NoReturn:
    """Ends this process of several. It waits a moment for others that are leaving as well, but not for those that wait for it."""
    goodbye = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    goodbye.start()
    goodbye.join(TOGETHER if code == Preempted.exit_code else GOODBYE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_steps = 0  # times that `asked` was called: the same count on every process names the step at which all of them leave


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Gives `asked()`: whether this run should save and leave now, the same answer on every process.

    A SIGTERM asks. Every loop that may run for long calls it once a step; of several processes, all call it equally often, or do so
    within `first_leads`.
    """
    if processes() > 1:  # JAX has listened to SIGTERM since the processes found each other
        yield _agreed
        return
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may listen to signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: flag.set())
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
    if flag.is_set() and callable(before):  # the loop came to its end all the same: whoever listens around it is told
        signal.raise_signal(signal.SIGTERM)


def _agreed() -> bool:
    global _steps
    _steps += 1
    return bool(multihost_utils.reached_preemption_sync_point(_steps))
