"""What a training will need, before anything is submitted: memory a device, time, energy and storage, from shapes alone.

Nothing is trained and nothing is written. What a device holds follows from the same rules that split the real state; operations and
activations are counted in the traced gradient of one example. Time and energy rest on assumptions, and say so.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from twinsim import mesh as meshes
from twinsim import run, scenario, train
from twinsim import scale as scales
from twinsim.base import BadInput, Domain, Example, Spec
from twinsim.build import build
from twinsim.data import ExampleStore
from twinsim.log import LINES

GIB = 2**30
# Share of the peak that a training step reaches: published trainings of large transformers reach 0.23 to 0.48 (MaxText, FMS-FSDP,
# WeatherMixer, arXiv 2507.05753); small networks reach less.
UTILISATION = (0.05, 0.40)
OVERHEAD = (0.001, 0.010)  # s of a step that are no arithmetic: kernel starts, collectives, the host
LOAD = (0.5, 1.0)  # share of its power that a busy device draws
MEM_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
PREALLOCATED = 0.75  # JAX's own share of an accelerator's memory, where the environment says nothing

Range = tuple[float, float]


class Memory(NamedTuple):
    """Bytes on one device.

    Attributes:
      parameters, gradients, optimizer, averages: as the mesh splits them, float32.
      gathered: parameters put together again, or in another precision, at most all of them at once.
      activations: what the backward pass needs of the forward pass, before the compiler fuses any of it away; with rematerialisation
        what is kept, and the largest of the blocks that are computed again.
      batch: the rows of this device.
    """

    parameters: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int
    activations: int
    batch: int

    @property
    def state(self) -> int:
        """What stays there between steps."""
        return self.parameters + self.optimizer + self.averages


class Cost(NamedTuple):
    """Of one example in one training step: operations of forward and backward pass, and bytes of activations."""

    flops: float
    activations: int


@dataclass(frozen=True)
class Plan:
    """What a configuration will need; bytes, s and kWh. None where something is not known.

    Attributes:
      spec: shape of one example, as text.
      mesh: size of each axis.
      memory, limit: bytes on one device, and how many it may use.
      flops: of one step, all devices together.
      step_s, training_s, node_hours, energy_kwh: lowest and highest estimate.
      measured: examples/s that the log of this model tells, None without one.
      storage: what -> bytes.
      assumptions: what the figures rest on, a sentence each.
      notes: what to know before submitting, a sentence each.
    """

    model: str
    spec: str
    parameters: int
    nodes: int
    devices: int
    mesh: Mapping[str, int]
    batch: int
    rows_per_device: int
    steps: int
    memory: Memory
    limit: int | None
    flops: float
    step_s: Range | None
    training_s: Range | None
    node_hours: Range | None
    energy_kwh: Range | None
    measured: float | None
    storage: Mapping[str, int | None]
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def needed(self) -> int:
        """Bytes on one device, at most."""
        return sum(self.memory)

    @property
    def misfit(self) -> str:
        """Why it does not fit into the memory of a device, and what to change; "" where it fits or the memory is not known."""
        if self.limit is None or self.needed <= self.limit:
            return ""
        held = f"plan: a device has {_gib(self.limit)} for JAX, but needs {_gib(self.needed)}"
        largest = max(Memory._fields, key=lambda name: getattr(self.memory, name))
        remedy = "scale.remat=true, more train.microbatches or more devices" if largest == "activations" else "a larger scale.mesh.fsdp"
        return f"{held}, most of it {largest}; expected it to fit: try {remedy}"


# ---------------------------------------------------------------- the plan


def plan(config: Mapping[str, Any], progress: run.Progress) -> Plan:
    """What training `config` will need. Raises BadInput where the configuration, its mesh or its batch does not fit."""
    scale = scales.read(config["scale"])
    devices = scales.devices(scale) or jax.device_count()
    run.check(config, devices)
    settings = run.training_settings(config)
    mesh = meshes.abstract_mesh(scale.mesh, devices)
    meshes.check_batch(mesh, settings.batch)
    meshes.check_batch(mesh, settings.batch // settings.microbatches)
    spec, examples, domain = _shapes(config, progress)
    with progress("count operations"):
        seed, asked = config["seed"], run.computing(config)
        module = Module(lambda: build(config["generator"], "generator", spec=spec, rngs=nnx.Rngs(seed), **asked))
        optimizer = build(config["optimizer"], "optimizer", steps=settings.steps)
        state = jax.eval_shape(partial(train.begin, optimizer=optimizer, seed=0, averages=len(settings.ema)), module.params)
        cost = cost_of(module, spec)
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = settings.batch // replicas
    memory = memory_per_device(state, mesh, spec, cost, rows, settings.microbatches, scale.precision, module.rules)
    limit, assumed = _limit(scale, devices)
    measured, told = _measured(config, settings)
    flops = cost.flops * settings.batch
    # every device of a `model` axis takes its part of each layer
    step, assumed_time = _step_time(flops / devices, scale, settings.batch / measured if measured and told.same_machine else None)
    training = None if step is None else (step[0] * settings.steps, step[1] * settings.steps)
    nodes = scale.slurm.nodes if scale.slurm else 1
    hours = None if training is None else (nodes * training[0] / 3600, nodes * training[1] / 3600)
    energy, assumed_power = _energy(hours, devices // nodes, scale)
    notes = [*told.sentences, *_notes(training, scale, settings), *_on_processors(scale)]
    storage = {
        "checkpoints": _bytes(state) * (settings.keep + 1),  # one more while the next is written
        "statistics": _held_on_disk(run.places(config).statistics),
        "examples": None if examples is None else examples * 4 * _numbers(spec),
        "samples": _answer_bytes(config, domain) if domain else None,
        "held-out draws": _exam_bytes(config, domain) if domain else None,
    }
    return Plan(
        model=run.places(config).model.name,
        spec=_described(spec),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(module.params)),
        nodes=nodes,
        devices=devices,
        mesh=dict(mesh.shape),
        batch=settings.batch,
        rows_per_device=rows,
        steps=settings.steps,
        memory=memory,
        limit=limit,
        flops=flops,
        step_s=step,
        training_s=training,
        node_hours=hours,
        energy_kwh=energy,
        measured=measured,
        storage=storage,
        assumptions=tuple([*assumed, *assumed_time, *assumed_power]),
        notes=(*notes, *_room(storage, scale, Path(config["out"]))),
    )


# ---------------------------------------------------------------- shapes


def _shapes(config: Mapping[str, Any], progress: run.Progress) -> tuple[Spec, int | None, Domain | None]:
    """The shape of an example, how many there are, and the domain; None where it is not known or would first have to make its data."""
    where = run.places(config)
    store = ExampleStore(where.examples) if (where.examples / "manifest.json").exists() else None
    made = run.makes_data(config)
    if store is not None and made:
        return store.spec, len(store), None
    if made:
        raise BadInput(
            f"plan: the data are not there yet, and {made[0]} would take long to make them: `twinsim data` first, with the same words"
        )
    try:
        with progress("open the domain"):
            domain = build(config["domain"], "domain")
    except BadInput:
        if store is None:
            raise
        return store.spec, len(store), None  # the examples are there, their source is not
    if store is not None:
        return store.spec, len(store), domain
    return domain.spec(), len(domain.source("train")), domain


def _held_on_disk(folder: Path) -> int | None:
    """Bytes of the files in `folder`; None where it is not there yet."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else None


def _answer_bytes(config: Mapping[str, Any], domain: Domain) -> int | None:
    """Bytes of the answer to the scenario that the configuration names; None without one."""
    if config.get("scenario") is None:
        return None
    asked = run.read_scenario(config)
    question = domain.ask(asked.scenario, asked.path.parent)
    return run.answer_bytes(domain, question)


def _exam_bytes(config: Mapping[str, Any], domain: Domain) -> int | None:
    """The most that an evaluation keeps until it is done: draws for the test, and no more to tell what is remembered."""
    members, most = (config["evaluate"].get(name) for name in ("members", "most"))
    return 2 * 4 * members * most * math.prod(domain.shape) * len(domain.sample) if members and most else None


def _numbers(spec: Spec) -> int:
    """Values of one example."""
    return math.prod(spec.grid) * (spec.channels + spec.fields) + spec.scalars


def _described(spec: Spec) -> str:
    return f"{' x '.join(map(str, spec.grid))} cells, {spec.channels} channels, {spec.fields} fields, {spec.scalars} scalars"


class Module:
    """A generator of which only the shapes exist.

    Attributes:
      params: shapes of its parameters, as `train.split` gives them.
      rules: how it is split over devices.
    """

    def __init__(self, make: Callable[[], nnx.Module]):
        made = nnx.eval_shape(make)
        self.graph, trained, *self.fixed = nnx.split(made, nnx.Param, ...)
        self.params: train.Params = nnx.to_pure_dict(trained)
        self.rules: meshes.Rules = getattr(made, "rules", meshes.RULES)

    def loss(self, params: train.Params, fixed: Any, example: Example, key: Any) -> Any:
        """The generator's loss of one example."""
        merged: Any = nnx.merge(self.graph, params, *fixed)
        return merged.loss(example, key)


# ---------------------------------------------------------------- operations and memory


def cost_of(module: Module, spec: Spec) -> Cost:
    """What one more example costs: the difference between a batch of two and one of one, which leaves out what they share."""

    def loss(params: train.Params, fixed: Any, batch: Example, keys: Any) -> Any:
        return jnp.mean(jax.vmap(module.loss, (None, None, 0, 0))(params, fixed, batch, keys))

    def residuals(params: train.Params, *rest: Any) -> Any:
        return jax.vjp(lambda params: loss(params, *rest), params)[1]  # a pytree of what the backward pass keeps

    def of(count: int) -> tuple[float, int, list[int]]:
        arrays = (module.params, module.fixed, _batch(spec, count), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)))
        analysis = jax.jit(jax.grad(loss)).lower(*arrays).cost_analysis() or {}
        again = [_bytes(jax.eval_shape(_residuals(block), *block.in_avals)) for block in _recomputed(jax.make_jaxpr(loss)(*arrays).jaxpr)]
        return float(analysis.get("flops", math.nan)), _bytes(jax.eval_shape(residuals, *arrays)), again

    (flops1, kept1, again1), (flops2, kept2, again2) = of(1), of(2)
    largest = max((two - one for one, two in zip(again1, again2, strict=True)), default=0)  # one block is there at a time
    return Cost(flops2 - flops1, kept2 - kept1 + largest)


def _recomputed(jaxpr: Jaxpr) -> Iterator[ClosedJaxpr]:
    """The parts of a traced loss whose activations are computed again in the backward pass."""
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if isinstance(inner, Jaxpr) and equation.primitive.name in ("checkpoint", "remat", "remat2"):
            yield ClosedJaxpr(inner, ())
        elif inner is not None:
            yield from _recomputed(getattr(inner, "jaxpr", inner))


def _residuals(block: ClosedJaxpr) -> Callable[..., Any]:
    """A function of the inputs of `block` that gives what its backward pass keeps of its forward pass."""
    return lambda *given: jax.vjp(jaxpr_as_fun(block), *given)[1]


def memory_per_device(
    state: train.TrainState,
    mesh: Any,
    spec: Spec,
    cost: Cost,
    rows: int,
    microbatches: int = 1,
    precision: str = "float32",
    rules: meshes.Rules = meshes.RULES,
) -> Memory:
    """What one device of `mesh` holds of `state`, shapes alone, and of a step with `rows` examples on it."""
    where = meshes.shard(state, mesh, rules)
    parameters = _held(state.params, where.params)
    computed = jnp.dtype(precision).itemsize
    copied = mesh.shape["fsdp"] > 1 or precision != "float32"
    split = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) // mesh.shape["model"]
    return Memory(
        parameters=parameters,
        gradients=parameters,
        optimizer=_held((state.step, state.opt, state.key), (where.step, where.opt, where.key)),
        averages=_held(state.ema, where.ema),
        gathered=computed * split if copied else 0,
        activations=cost.activations * rows // microbatches,
        batch=_bytes(_batch(spec, rows)),
    )


def _held(tree: Any, shardings: Any) -> int:
    """Bytes of the part of `tree` that each device has."""
    sizes = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(sizes))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _batch(spec: Spec, count: int) -> Example:
    shapes = ((*spec.grid, spec.channels), (*spec.grid, spec.fields), (spec.scalars,))
    arrays: list[Any] = [jax.ShapeDtypeStruct((count, *shape), jnp.float32) for shape in shapes]  # stand in for arrays
    return Example(*arrays)


def _limit(scale: scales.Scale, devices: int) -> tuple[int | None, list[str]]:
    """Bytes of a device that JAX may use, and what that rests on."""
    size = scale.hardware.device_memory_gib
    if size is None:
        if scale.slurm is not None or jax.default_backend() != "cpu":
            return None, ["the memory of a device is not known: give scale.hardware.device_memory_gib"]
        here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return here // devices, [f"memory: the {_gib(here)} of this machine, which its devices share"]
    try:
        share = float(scale.environment.get(MEM_FRACTION, PREALLOCATED))
    except ValueError:
        raise BadInput(f"config scale.environment.{MEM_FRACTION}: expected a number, got {scale.environment[MEM_FRACTION]!r}") from None
    return int(share * size * GIB), [f"memory: {share:g} of {size:g} GiB, the share that JAX takes"]


# ---------------------------------------------------------------- time and energy


class Told(NamedTuple):
    """What the log of an earlier training of the same model says, and whether it was one of the same machine and mesh."""

    same_machine: bool
    sentences: list[str]


def _measured(config: Mapping[str, Any], settings: train.Settings) -> tuple[float | None, Told]:
    """Examples/s of the same model as its log tells them: the median, without the first line, which holds the compilation."""
    folder = run.places(config).model
    lines = _log(folder / LINES)
    if not lines:
        return None, Told(False, [])
    rates = [line["examples_per_s"] for line in lines][1:] or [lines[0]["examples_per_s"]]
    rate = float(median(rates))
    done = f"{lines[-1]['step']} of {settings.steps} steps of this model are done; the figures are those of all of them"
    try:
        path = folder / "config.yaml"
        before = scenario.parse(scenario.read(path), str(path), targets=True)[0].get("scale")
    except BadInput:
        before = None
    same = before == config["scale"]
    source = "on this scale" if same else "on another scale, so it is not used here"
    return (rate if rate > 0 else None), Told(same, [f"{folder / LINES} tells {rate:.1f} examples/s, {source}", done])


def _log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line["examples_per_s"] > 0 and line["step"] > 0]
    except (OSError, ValueError, KeyError, TypeError):  # none, or one cut short by a kill
        return []


def _step_time(flops: float, scale: scales.Scale, measured: float | None) -> tuple[Range | None, list[str]]:
    """s of a step of `flops` a device, and what that rests on."""
    if measured is not None:
        return (measured, measured), ["time: as measured in the log of this model"]
    peak = scale.hardware.peak_tflops
    if peak is None:
        return None, ["the peak of a device is not known: give scale.hardware.peak_tflops"]
    fastest, slowest = (flops / (peak * 1e12 * share) + more for share, more in zip(reversed(UTILISATION), OVERHEAD, strict=True))
    rest = f"{OVERHEAD[0] * 1e3:g} to {OVERHEAD[1] * 1e3:g} ms a step that are no arithmetic"
    return (fastest, slowest), [f"time: {UTILISATION[0]:.0%} to {UTILISATION[1]:.0%} of {peak:g} TFLOP/s in {scale.precision}, and {rest}"]


def _energy(hours: Range | None, devices: int, scale: scales.Scale) -> tuple[Range | None, list[str]]:
    """kWh of `hours` of nodes with `devices` busy devices each, and what that rests on."""
    device, node = scale.hardware.device_power_w, scale.hardware.node_power_w
    if hours is None or device is None or node is None:
        return None, [] if hours is None else ["the power is not known: give scale.hardware.device_power_w and node_power_w"]
    low, high = ((node + share * devices * device) * time / 1000 for share, time in zip(LOAD, hours, strict=True))
    return (low, high), [
        f"energy: {LOAD[0]:.0%} to {LOAD[1]:.0%} of {device:g} W a device, and {node:g} W for the rest of a node; without cooling",
        f"hardware: {scale.hardware.source}",
    ]


def _notes(training: Range | None, scale: scales.Scale, settings: train.Settings) -> list[str]:
    notes = ["the time is that of the steps; starting and compiling, data, evaluation and generation come on top"]
    limit = _seconds(scale.slurm.time) if scale.slurm and scale.slurm.time else None
    if training and limit and training[0] > limit:
        notes.append(f"longer than the {scale.slurm.time if scale.slurm else ''} of one job: it saves, leaves and is requeued on the way")
    if training and training[1] / settings.steps * settings.save_every > 1800:
        notes.append("more than half an hour may lie between two checkpoints: a smaller train.save_every loses less to a crash")
    return notes


def _on_processors(scale: scales.Scale) -> list[str]:
    """What XLA makes of a training on this machine's processors, where the scale asks for what it knows for accelerators alone."""
    if scale.slurm is not None or jax.default_backend() != "cpu" or (scale.precision == "float32" and not scale.remat):
        return []
    return ["on processors XLA keeps what scale.remat would compute again, and computes bfloat16 in float32: activations as with neither"]


def _room(storage: Mapping[str, int | None], scale: scales.Scale, out: Path) -> list[str]:
    """What to say of the room for it: under a quota, or on this machine's disk."""
    quota, needed = scale.hardware.storage_gib, sum(size or 0 for size in storage.values())
    if quota is None and scale.slurm is not None:
        return []
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    room = shutil.disk_usage(there).free if quota is None else quota * GIB
    return [f"storage: {_gib(needed)} are needed, but there are {_gib(room)}"] if needed > room else []


def _seconds(text: str) -> int:
    """s of SLURM's `[days-]hours:minutes:seconds`, or of its minutes. Raises BadInput."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise BadInput(f"config scale.slurm.time: expected [days-]hours:minutes:seconds, got {text!r}")
    days, first, second, third = found.groups()
    if days is None and third is None:  # minutes, or minutes:seconds
        return int(first) * 60 + int(second or 0)
    return int(days or 0) * 86400 + int(first) * 3600 + int(second or 0) * 60 + int(third or 0)


# ---------------------------------------------------------------- as text


def lines(found: Plan) -> list[str]:
    """The plan as aligned lines."""
    mesh = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items())
    rows = [
        ("model", f"{found.model}, {found.parameters:,} parameters"),
        ("example", found.spec),
        ("machine", f"{_count(found.nodes, 'node')}, {_count(found.devices, 'device')}; mesh {mesh}"),
        ("batch", f"{_count(found.batch, 'example')}, {found.rows_per_device} a device; {_count(found.steps, 'step')}"),
        ("", ""),
        ("memory a device", f"{_gib(found.needed)}{'' if found.limit is None else f' of {_gib(found.limit)}'}"),
        *((f"  {name}", _gib(size)) for name, size in found.memory._asdict().items()),
        ("", ""),
        ("operations a step", f"{_short(found.flops / 1e9)} GFLOP on all devices together"),
        ("time a step", _between(found.step_s, ("ms", 1e-3), ("s", 1))),
        ("training", _between(found.training_s, ("s", 1), ("min", 60), ("hours", 3600))),
        ("node hours", _between(found.node_hours, ("", 1))),
        ("energy", _between(found.energy_kwh, ("Wh", 1e-3), ("kWh", 1), ("MWh", 1e3))),
        ("", ""),
        ("storage", _gib(sum(size or 0 for size in found.storage.values()))),
        *((f"  {name}", "not known" if size is None else _gib(size)) for name, size in found.storage.items()),
        ("", ""),
        *(("assumed", sentence) for sentence in found.assumptions),
        *(("note", sentence) for sentence in found.notes),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}".rstrip() for name, text in rows]


def as_json(found: Plan) -> str:
    """The plan as JSON: bytes, s, kWh."""
    facts = {**vars(found), "memory": found.memory._asdict(), "needed": found.needed, "fits": not found.misfit}
    return json.dumps(facts, indent=1)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _between(values: Range | None, *units: tuple[str, float]) -> str:
    """Lowest and highest in the largest of `units` (name, size) that leaves the highest above 2."""
    if values is None:
        return "not known"
    name, size = next((unit for unit in reversed(units) if values[1] >= 2 * unit[1]), units[0])
    low, high = (_short(value / size) for value in values)
    return f"{low if low == high else f'{low} to {high}'} {name}".rstrip()


def _short(value: float) -> str:
    if value and value < 0.001:
        return "under 0.001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"
