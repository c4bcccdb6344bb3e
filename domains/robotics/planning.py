"""Planning: finds actions that a simulator, or a model in its place, expects to come to the least cost, and finds them anew as one goes.

Sources: cross-entropy method with noise that lasts and elites that are kept, Pinneri et al. (2020), "iCEM"; path-integral control (MPPI),
Williams et al. (2017), "Information-theoretic MPC", with a temperature relative to the scatter of the costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from domains.robotics import worlds
from domains.robotics.dynamics import bounds
from domains.robotics.physics import CStepper
from domains.robotics.tasks import LATEST, Played, Scene, Start, due
from twinsim.base import BadInput

# Of the simulator, `[task, size]`, and the last actions `[task, LATEST, action]`, as in `Scene.advance`.
State = tuple[np.ndarray, np.ndarray]
# States, observations `[task, channel]` and actions `[task, sample, step, action]` -> what would be seen after each action,
# `[task, sample, step, channel]`.
Imagine = Callable[[State, np.ndarray, np.ndarray], np.ndarray]
Cost = Callable[[np.ndarray, np.ndarray], np.ndarray]  # what would be seen, and the actions -> `[task, sample]`


@dataclass(frozen=True)
class Planner:
    """How actions are searched for.

    Attributes:
      method: "cem" or "mppi".
      horizon: control steps looked ahead; stride: of them carried out before planning again.
      samples, iterations: sequences tried at a time, and how many times; the best of the last time are among them.
      elites: share of the samples that decide, for cem.
      temperature: of the weights, in standard deviations of the costs among samples, for mppi.
      spread: standard deviation of the first samples, in halves of an action's range; lasting: correlation of noise from step to step.
      momentum: how much of the last mean and spread stays.
    """

    method: Literal["cem", "mppi"] = "cem"
    horizon: int = 15
    stride: int = 3
    samples: int = 64
    iterations: int = 3
    elites: float = 0.12
    temperature: float = 0.3
    spread: float = 0.7
    lasting: float = 0.7
    momentum: float = 0.1

    def __post_init__(self) -> None:
        if self.method not in ("cem", "mppi"):
            raise BadInput(f"planner: method: expected cem or mppi, got {self.method!r}")
        if not 1 <= self.stride <= self.horizon or self.samples < 4 or self.iterations < 1:
            raise BadInput(
                "planner: expected 1 <= stride <= horizon, samples of at least 4 and iterations of at least 1,"
                f" got {self.stride}, {self.horizon}, {self.samples} and {self.iterations}"
            )
        if not (0 < self.elites <= 1 and self.temperature > 0 and self.spread > 0 and 0 <= self.lasting < 1 and 0 <= self.momentum < 1):
            raise BadInput("planner: expected elites in (0, 1], temperature and spread above 0, lasting and momentum in [0, 1)")


def plan(
    planner: Planner,
    imagine: Imagine,
    cost: Cost,
    state: State,
    seen: np.ndarray,
    limits: tuple[np.ndarray, np.ndarray],
    noise: np.random.Generator,
    mean: np.ndarray | None = None,
) -> np.ndarray:
    """Actions of the least expected cost found, `[task, step, action]`.

    Args:
      limits: lowest and highest action, `[action]`.
      mean: what the search begins with, `[task, step, action]`; the middle of the limits by default.
    """
    lower, upper = (np.asarray(limit, np.float64) for limit in limits)
    shape = (len(seen), planner.horizon, len(lower))
    mean = np.broadcast_to((lower + upper) / 2, shape) if mean is None else np.asarray(mean, np.float64)
    spread = np.broadcast_to(planner.spread * (upper - lower) / 2, shape)
    kept = mean[:, None]
    few = max(2, round(planner.elites * planner.samples))
    for _ in range(planner.iterations):
        drawn = mean[:, None] + spread[:, None] * _lasting(noise, (len(seen), planner.samples - kept.shape[1], *shape[1:]), planner.lasting)
        tried = np.concatenate([kept, np.clip(drawn, lower, upper)], 1)
        costs = np.asarray(cost(imagine(state, seen, tried), tried), np.float64)
        order = np.argsort(costs, 1)
        best = np.take_along_axis(tried, order[:, :few, None, None], 1)
        kept = best[:, : max(1, few // 3)]
        if planner.method == "cem":
            weight = np.ones((len(seen), few)) / few
            among = best
        else:
            scatter = np.maximum(costs.std(1, keepdims=True), 1e-12)
            weight = np.exp(-(costs - costs.min(1, keepdims=True)) / (planner.temperature * scatter))
            weight, among = weight / weight.sum(1, keepdims=True), tried
        new = np.einsum("ts,tsha->tha", weight, among)
        wide = np.sqrt(np.einsum("ts,tsha->tha", weight, (among - new[:, None]) ** 2))
        mean = planner.momentum * mean + (1 - planner.momentum) * new
        spread = planner.momentum * spread + (1 - planner.momentum) * wide
    return kept[:, 0] if planner.method == "cem" else np.clip(mean, lower, upper)


def _lasting(noise: np.random.Generator, shape: tuple[int, ...], lasting: float) -> np.ndarray:
    """Standard normal noise `[task, sample, step, action]`, each step's correlated with the one before."""
    drawn = noise.standard_normal(shape)
    for step in range(1, shape[2]):
        drawn[:, :, step] = lasting * drawn[:, :, step - 1] + np.sqrt(1 - lasting**2) * drawn[:, :, step]
    return drawn


def pursue(
    planner: Planner, scene: Scene, start: Start, world: np.ndarray, imagine: Imagine, cost: Cost, seed: int, frames: int | None = None
) -> Played:
    """Episodes in the simulator, planned with `imagine` anew every `stride` control steps, each plan from the last one's rest.

    A plan sets out from what the sensors tell, or, where `imagine` goes by it, from the simulator's own state.
    """
    task, noise, stride = scene.task, np.random.default_rng(seed), planner.stride
    frames = task.frames if frames is None else frames
    limits = bounds(task.action)
    state, sent = scene.begin(start, world), np.zeros((len(world), LATEST, len(task.action)), np.float32)
    sensors = worlds.Sensors(np.arange(len(world)))
    told = sensors.tell(task.observe(scene.stepper(world), start), world, task.observation, task.rate).told
    assert told is not None
    mean: np.ndarray | None = None
    parts: list[Played] = []
    for first in range(0, frames, stride):
        found = plan(planner, imagine, cost, (state, sent), told, limits, noise, mean)
        many = min(stride, frames - first)
        state, sent, played = scene.advance(state, sent, start, world, lambda frame, _: found[:, frame], many, sensors)  # noqa: B023
        parts.append(played)
        told, sensors = played.last_seen, worlds.Sensors(sensors.seed, first + many, played.seen[:, -1])
        mean = np.concatenate([found[:, stride:], np.repeat(found[:, -1:], stride, 1)], 1)
    names = ("observation", "seen", "action", "depth", "gain", "work")
    joined = {name: np.concatenate([getattr(part, name) for part in parts], 1) for name in names}
    return Played(**joined, last=parts[-1].last, last_seen=parts[-1].last_seen)


def in_simulator(scene: Scene, start: Start, world: np.ndarray, samples: int) -> Imagine:
    """What the simulator itself would come to, from its own state, each task in its own world, for `samples` sequences a task."""
    task = scene.task
    many = np.repeat(world, samples, 0)
    begun = {name: np.repeat(np.asarray(values), samples) for name, values in start.items()}
    stepper = CStepper(scene.model, len(many), task.fields(scene.model, many))

    def imagine(state: State, seen: np.ndarray, actions: np.ndarray) -> np.ndarray:
        stepper.state, sent = (np.repeat(part, samples, 0) for part in state)
        line = np.concatenate([sent, np.asarray(actions, np.float32).reshape(len(many), *actions.shape[2:])], 1)
        after, now = [], task.observe(stepper, begun)
        for step in range(actions.shape[2]):
            stepper.step(task.control(now, due(line, many, step)), task.steps)
            now = task.observe(stepper, begun)
            after.append(now)
        return np.stack(after, 1).reshape(*actions.shape[:3], -1)

    return imagine


def stepping(step: Callable[[jax.Array, jax.Array], jax.Array]) -> Imagine:
    """The same for any step function of one observation and one action that JAX can trace, whose observation is its state."""

    def unrolled(seen: jax.Array, actions: jax.Array) -> jax.Array:
        def advance(now: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
            after = step(now, action)
            return after, after

        return jax.lax.scan(advance, seen, actions)[1]

    many = jax.jit(jax.vmap(jax.vmap(unrolled, (None, 0)), (0, 0)))
    return lambda state, seen, actions: np.asarray(many(np.asarray(seen, np.float32), np.asarray(actions, np.float32)))


def push_cost(seen: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Of the planar push: how far the puck is from its goal, and, while it is, how far the peg is from behind the puck; m, `[..., sample]`.

    Mean over the steps, the last one's counted half as much as all others together.
    """
    tip, puck, goal = seen[..., 4:6], seen[..., 6:8], seen[..., 10:12]
    apart = goal - puck
    left = np.linalg.norm(apart, axis=-1)
    ahead = apart / np.maximum(left, 1e-6)[..., None]
    beside = tip - puck
    far = np.linalg.norm(beside, axis=-1)
    turned = 1 + (beside * ahead).sum(-1) / np.maximum(far, 1e-6)  # 0 = the peg is behind the puck, 2 = before it
    open_ = np.maximum(left - 0.02, 0.0)
    wanting = np.minimum(open_ / 0.02, 1.0)
    each = open_ + wanting * (0.05 * turned + 0.2 * np.maximum(far - 0.095, 0.0))
    return each.mean(-1) + 0.5 * each[..., -1]
