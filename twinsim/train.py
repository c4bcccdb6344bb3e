"""Fits a generator to examples, by one jitted update and the loop around it; the only home of optax.

The state is a plain pytree, the module is split once, and where each leaf lives is decided by the rule table of `mesh`: so that
one update serves one device, replicas (`data`), split states (`fsdp`) and split layers (`model`). The noise of an example is keyed
by (seed, step, row of the batch), hence the same on any number of devices.
"""

import collections
import contextlib
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from twinsim import checkpoint
from twinsim import mesh as meshes
from twinsim.base import Array, BadInput, Example
from twinsim.data import ExampleStore, batches, indices
from twinsim.log import Progress, TrainingLog

LAG = 3  # steps whose results are still awaited while the next one is sent off
RECENT = 100  # losses that a jump is judged by
WIDEST_EMA = 12**-0.5  # the relative width of a plain average over all steps, Karras et al. (2024) eq. 126 at gamma = 0

Params = dict[Any, Any]  # nested dicts of arrays
Assemble = Callable[[Params], Any]  # parameters -> the nnx module that has them
Loss = Callable[[Params, Example, Array], Array]  # of one example, a scalar
Metrics = dict[str, jax.Array]


class Diverged(RuntimeError):
    """The loss or its gradient is not finite, or the loss has jumped. The newest checkpoint is the last good state."""

    exit_code = 3


class TrainState(NamedTuple):
    """Everything that an update changes, and the key it draws from.

    Attributes:
      step: updates made so far, int32.
      params: trained parameters.
      opt: the optimizer's state.
      ema: averages of `params` over training, one for each width in `Settings.ema`.
      key: the run's random key; never changes.
    """

    step: Array
    params: Params
    opt: Any
    ema: tuple[Params, ...]
    key: Array


@dataclass(frozen=True)
class Settings:
    """How long and how to train.

    Attributes:
      steps, batch: updates, and examples in each.
      ema: widths sigma_rel of the power-function averages, as a share of the training so far; in (0, 0.288].
      max_grad_norm: a longer gradient is shortened to this; None for never.
      max_loss_jump: a loss above this many times the median of the last `RECENT` ends the training; None for never.
      microbatches: parts of a batch whose gradients are taken one after the other, to save memory; changes nothing else.
      save_every, log_every: steps between checkpoints and between lines of the log.
      keep: newest checkpoints kept.
      ahead: batches read in advance.
    """

    steps: int
    batch: int
    ema: tuple[float, ...] = (0.05, 0.10)
    max_grad_norm: float | None = 1.0
    max_loss_jump: float | None = 1000.0
    microbatches: int = 1
    save_every: int = 1000
    log_every: int = 50
    keep: int = 3
    ahead: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "microbatches", "save_every", "log_every", "keep", "ahead"):
            if getattr(self, name) < 1:
                raise BadInput(f"training: {name}: expected at least 1, got {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise BadInput(f"training: max_grad_norm: expected a positive number, got {self.max_grad_norm}")
        if self.max_loss_jump is not None and not self.max_loss_jump > 1:
            raise BadInput(f"training: max_loss_jump: expected a number above 1, got {self.max_loss_jump}")
        if self.batch % self.microbatches:
            raise BadInput(f"training: expected microbatches to divide the batch of {self.batch}, got {self.microbatches}")
        if not self.ema or not all(0 < width < WIDEST_EMA for width in self.ema):
            raise BadInput(f"training: ema: expected one or more widths above 0 and below {WIDEST_EMA:.4f}, got {tuple(self.ema)}")


# ---------------------------------------------------------------- averages


def ema_exponent(width: float) -> float:
    """The gamma of a power-function average whose relative width (standard deviation over training time) is `width`.

    Source: Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models", eq. 126 and algorithm 2.
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def ema_params(state: TrainState, which: int = 0) -> Params:
    """The averaged parameters, what one samples with; `which` counts `Settings.ema`."""
    return state.ema[which]


def _average(ema: Params, params: Params, gamma: float, step: Array) -> Params:
    """One step of the average, `step` counting from 1: beta = (1 - 1/step)^(gamma + 1), Karras et al. (2024) eq. 127."""
    rate = -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / step.astype(jnp.float32)))
    return jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), ema, params)


# ---------------------------------------------------------------- optimizer


def adamw(
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.99,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW whose rate rises over `warmup` steps to `learning_rate`, then falls on a cosine to `final` of it at `steps`.

    Only arrays of two or more axes decay. Gradients are shortened by `Settings.max_grad_norm`, not here.
    """
    if not (learning_rate > 0 and 0 <= warmup < steps and 0 <= final <= 1 and weight_decay >= 0):
        raise BadInput(
            "optimizer: expected learning_rate > 0, 0 <= warmup < steps, final in [0, 1] and weight_decay >= 0, "
            f"got {learning_rate}, {warmup} of {steps}, {final} and {weight_decay}"
        )
    fall = optax.cosine_decay_schedule(learning_rate, steps - warmup, alpha=final)
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, max(warmup, 1))
    schedule = optax.join_schedules([rise, fall], [warmup]) if warmup else fall
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=matrices)


# ---------------------------------------------------------------- state and update


def made(make: Callable[[nnx.Rngs], nnx.Module], seed: int) -> nnx.Module:
    """The module that `make` gives, its values drawn by one compiled program, the same for every seed: layer after layer takes seconds."""
    return nnx.jit(lambda key: make(nnx.Rngs(key)))(jax.random.key(seed))


def split(module: nnx.Module) -> tuple[Assemble, Params]:
    """A module's parameters as nested dicts of arrays, and the function that puts such parameters back into it."""
    graph, trained, *fixed = nnx.split(module, nnx.Param, ...)
    return lambda params: nnx.merge(graph, params, *fixed), nnx.to_pure_dict(trained)


def init(
    module: nnx.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    rules: meshes.Rules = meshes.RULES,
    averages: int = 2,
) -> tuple[Assemble, TrainState]:
    """The state before the first update, on `mesh`, and the function that makes a module of its parameters."""
    assemble, params = split(module)
    fresh = partial(begin, optimizer=optimizer, seed=seed, averages=averages)
    params = jax.device_put(params, meshes.shard(params, mesh, rules))
    shardings = meshes.shard(jax.eval_shape(fresh, params), mesh, rules)
    return assemble, jax.jit(fresh, out_shardings=shardings)(params)


def begin(params: Params, optimizer: optax.GradientTransformation, seed: int, averages: int) -> TrainState:
    """The state before the first update, of parameters as they were drawn; pure, so that its shapes are known without it."""
    ema = tuple(jax.tree.map(jnp.copy, params) for _ in range(averages))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema, jax.random.key(seed))


def make_update(
    loss: Loss, optimizer: optax.GradientTransformation, settings: Settings, shardings: Any, precision: Any = jnp.float32
) -> jax.stages.Wrapped:
    """The update: `(state, batch) -> (state, {"loss", "grad_norm"})`, jitted; the state that goes in is used up.

    The metrics are of the batch before the update; the gradient norm is that before shortening.

    Args:
      shardings: where each leaf of the state lives, as `where(state)` says.
      precision: in which type the loss gets the parameters of two or more axes; the state, and gradients summed over devices, are
        of float32.
    """
    mesh: Mesh = shardings.step.mesh
    exponents = [ema_exponent(width) for width in settings.ema]

    def local(whole: Assemble, params: Params, batch: Example, keys: Array) -> tuple[Array, Params]:
        def mean_loss(params: Params, batch: Example, keys: Array) -> Array:
            return jnp.mean(jax.vmap(loss, (None, 0, 0))(whole(params), batch, keys))

        slope = jax.value_and_grad(meshes.forgetting(mean_loss) if mesh.shape["fsdp"] > 1 else mean_loss)
        if settings.microbatches == 1:
            return slope(params, batch, keys)

        def part(rows: Array) -> Array:  # part i has rows i, i + count, ...: the same on any number of devices
            return jnp.swapaxes(rows.reshape(len(rows) // settings.microbatches, settings.microbatches, *rows.shape[1:]), 0, 1)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, slope(params, *part)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = lax.scan(add, zero, jax.tree.map(part, (batch, keys)))
        return jax.tree.map(lambda x: x / settings.microbatches, total)

    gradient = meshes.mean_gradient(local, shardings.params, precision)

    def update(state: TrainState, batch: Example) -> tuple[TrainState, Metrics]:
        value, grads = gradient(state.params, batch, row_keys(state.key, state.step, settings.batch))
        if mesh.size > 1:
            grads = lax.with_sharding_constraint(grads, shardings.params)
        norm = optax.tree.norm(grads)
        if settings.max_grad_norm is not None:
            shorter = jnp.minimum(1.0, settings.max_grad_norm / norm)
            grads = jax.tree.map(lambda grad: grad * shorter.astype(grad.dtype), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            change, opt = optimizer.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, change)
        step = state.step + 1
        ema = tuple(_average(old, params, gamma, step) for old, gamma in zip(state.ema, exponents, strict=True))
        return TrainState(step, params, opt, ema, state.key), {"loss": value, "grad_norm": norm}

    return jax.jit(update, donate_argnums=0, out_shardings=(shardings, meshes.replicated(mesh)))


def where(state: TrainState) -> Any:
    """The sharding of each leaf, as a `TrainState`."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def row_keys(key: Array, step: Array | int, batch: int) -> Array:
    """The random key of each row of the batch of `step`, `[batch]`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(batch))


# ---------------------------------------------------------------- the loop


def fit(
    module: nnx.Module,
    store: ExampleStore,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    folder: Path,
    mesh: Mesh,
    seed: int,
    progress: Progress | None = None,
    rules: meshes.Rules = meshes.RULES,
    report: checkpoint.Report = warnings.warn,
    precision: Any = jnp.float32,
    peak_tflops: float | None = None,
) -> TrainState:
    """Trains `module`, a `Generator`, on `store`; called again with the same arguments, goes on from the newest checkpoint.

    Leaves in `folder`: `checkpoints/`, and what `TrainingLog` writes every `log_every` steps.

    Raises:
      Diverged: loss or gradient is not finite, or the loss has jumped; `diverged.json` names the examples and the key that did it.
      Preempted: the machine asked to leave; the state is saved.
      BadInput: the batch does not fit the mesh, the disk is too small, or `folder` holds the checkpoints of another run.
    """
    meshes.check_batch(mesh, settings.batch)
    meshes.check_batch(mesh, settings.batch // settings.microbatches)
    saved = folder / "checkpoints"
    assemble, state = init(module, optimizer, seed, mesh, rules, len(settings.ema))
    if checkpoint.steps(saved):
        state = _resume(saved, state, settings, report)
    first = int(state.step)
    update = make_update(lambda params, example, key: assemble(params).loss(example, key), optimizer, settings, where(state), precision)
    awaited: collections.deque[tuple[int, Metrics]] = collections.deque()
    recent: collections.deque[float] = collections.deque(maxlen=RECENT)
    log = TrainingLog(folder, first, settings.steps, settings.batch, settings.log_every, progress, peak_tflops)

    def settle(left: int) -> None:
        """Reads results until only `left` are awaited; raises Diverged."""
        while len(awaited) > left:
            step, metrics = awaited.popleft()
            loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
            jump = settings.max_loss_jump
            most = math.inf if jump is None or len(recent) < RECENT else jump * statistics.median(recent)
            if not (math.isfinite(loss) and math.isfinite(norm) and loss <= most):
                raise Diverged(_dump(folder, step, loss, norm, most, seed, settings, len(store)))
            recent.append(loss)
            log(step, loss, norm)

    def save(step: int) -> None:
        settle(0)
        if bad := checkpoint.nonfinite(state):
            raise Diverged(f"step {step}: {bad[0]} is not finite after the update; the last good state is in {saved}")
        checkpoint.save(saved, step, state, keep=settings.keep)

    stream = batches(store, seed, settings.batch, mesh, first, settings.ahead)
    with contextlib.closing(stream), contextlib.closing(log), _saves_finished(saved), meshes.preemption() as asked:
        for step in range(first + 1, settings.steps + 1):
            with log.waiting():
                batch = next(stream)
            if step == first + 1:
                compiled = update.lower(state, batch).compile()
                log.flops = _flops(compiled, settings)
            state, metrics = compiled(state, batch)
            awaited.append((step, metrics))
            settle(LAG)
            leave = asked() and step < settings.steps
            if leave or step == settings.steps or step % settings.save_every == 0:
                save(step)
            if leave:
                checkpoint.finish(saved)
                raise meshes.Preempted(
                    f"asked to leave at step {step} of {settings.steps}; the state is saved, and the same command goes on from it"
                )
    return state


def _flops(update: Any, settings: Settings) -> float | None:
    """Floating-point operations of a compiled update on one device; None where the compiler does not tell, or counts a loop once."""
    analysis = update.cost_analysis() or {}
    return analysis.get("flops") if settings.microbatches == 1 else None


@contextlib.contextmanager
def _saves_finished(folder: Path) -> Iterator[None]:
    """Ends with every save complete and seen by every process; after an error, which may be of one process alone, waits for none."""
    try:
        yield
    finally:
        checkpoint.finish(folder)
    meshes.wait_for_all(f"training in {folder} finished")


def _resume(saved: Path, state: TrainState, settings: Settings, report: checkpoint.Report) -> TrainState:
    begun = np.asarray(jax.random.key_data(state.key))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # room for what is read
    step, state = checkpoint.restore(saved, like, report=report)
    if not np.array_equal(begun, np.asarray(jax.random.key_data(state.key))):
        raise BadInput(f"training: the checkpoints in {saved} were begun with another seed")
    if step > settings.steps:
        raise BadInput(f"training: expected at least the {step} steps that {saved} has already seen, got steps={settings.steps}")
    return state


def _dump(folder: Path, step: int, loss: float, norm: float, most: float, seed: int, settings: Settings, size: int) -> str:
    """Writes down what update `step` was made of; returns the message for the user."""
    rows = indices(seed, step - 1, settings.batch, size)
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), step - 1))
    facts = {"step": step, "loss": str(loss), "grad_norm": str(norm), "seed": seed, "rows": rows.tolist(), "key": np.asarray(key).tolist()}
    path = folder / "diverged.json"
    if meshes.is_first():
        path.write_text(json.dumps(facts))
    checkpoint.finish(folder / "checkpoints")
    found = checkpoint.steps(folder / "checkpoints")
    kept = f"the last good state is checkpoint {found[-1]}" if found else "no checkpoint was saved before"
    wanted = (
        "expected finite numbers" if not math.isfinite(loss + norm) else f"expected a loss of at most {most:.4g}, as the last {RECENT} tell"
    )
    return f"step {step}: loss {loss}, gradient norm {norm}: {wanted}; {kept}; {path} names the batch"
