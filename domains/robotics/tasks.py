"""What a task is: a scene, where episodes start, what is seen, what can be done, when it is done, and in which frame it is learnt.

Host functions take `count` episodes at once, numpy in and out; those of one observation are traced by JAX and have no leading axis.
"""

import copy
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.physics import CStepper, compiled
from twinsim.base import Array, Variable

Policy = Callable[[int, np.ndarray], np.ndarray]  # control step, observations `[count, channel]` -> actions `[count, channel]`
Start = Mapping[str, np.ndarray]  # name -> `[count]`
SOFT, ROUNDING = 1e-3, 0.02  # m that a contact gives way and comes back; of the work, what an integrator of first order is off
SMALL = 8  # degrees of freedom up to which copies step faster than threads meet
GAPS = (int(mujoco.mjtSensor.mjSENS_GEOMDIST), int(mujoco.mjtSensor.mjSENS_CONTACT))  # kinds of sensors that tell a distance
ALL = "gap of all contacts"
LATEST = int(worlds.PARAMETERS["latency"].upper)  # control steps that a command may be under way


class Channel(NamedTuple):
    """One number of an observation or an action, and the bounds beyond which it is broken."""

    name: str
    units: str = ""
    lower: float = -np.inf
    upper: float = np.inf


class Task(Protocol):
    """A robot and what it is to do.

    Attributes:
      rate: control steps a second; `steps` physics steps each.
      frames: most control steps of an episode; `hold` of them in a row the goal must be kept.
      planned: coordinates of the way points that a generator draws.
      start: what an episode starts from and is after, scalars.
      handled: bodies that the payload of a world weighs down.
      load: what contacts bear, N.
    """

    name: str
    robot: str
    sentence: str
    rate: float
    steps: int
    frames: int
    hold: int
    observation: Sequence[Channel]
    action: Sequence[Channel]
    planned: Sequence[Channel]
    start: Mapping[str, Variable]
    handled: Sequence[str]
    load: float

    # ---- the host's part: `count` episodes at once

    def spec(self) -> mujoco.MjSpec:
        """The scene. Sensors of GAPS whose names begin with "gap " tell how deep bodies are in each other, or the one called ALL alone."""
        ...

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        """Random starts in a region, "narrow" as demonstrated or "wide", `[count]` each. Raises BadInput for another region."""
        ...

    def place(self, start: Start) -> np.ndarray:
        """Generalised positions, `[count, nq]`, at rest. Raises BadInput where an episode cannot start, or not reach its goal."""
        ...

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        """What worlds `[count, parameter]` change of the model."""
        ...

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        """Where pictures of one episode have the site "goal", m."""
        ...

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        """`[count, channel]`."""
        ...

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Controls `[count, nu]` of the model."""
        ...

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """What the scripted demonstrator does, `[count, channel]`, without its wobble."""
        ...

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        """Actions towards way points `[count, planned]`."""
        ...

    # ---- of observations `[..., channel]`, traced or not

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """The way point that an action makes for, `[..., planned]`: `track(way(o, a), o)` is `a`."""
        ...

    def off(self, observation: Array) -> jax.Array:
        """How far the goal is from being reached, beyond its tolerance, `[...]`; 0 = reached."""
        ...

    # ---- of one observation `[channel]`, traced

    def features(self, observation: jax.Array) -> jax.Array:
        """What decides the next motion, in the task's own frame, of order one, `[feature]`."""
        ...

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        """Way points `[..., planned]` in the task's own frame as seen at `observation`."""
        ...

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        """The inverse of `into_frame`."""
        ...

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Way points `[frame, planned]` of an episode that began `before`, moved with its objects to one that begins `now`."""
        ...

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mirror image, which is as possible as the original; both unchanged where there is none."""
        ...


def environment_id(task: type) -> str:
    """What the environment of a kind of task is called in Gymnasium (see `environments`)."""
    return f"twinsim/{task.__name__}-v0"


def inputs(task: Task) -> Sequence[Mapping[str, Any]]:
    """Records of the files that a task's scene was read from, none where it is made here."""
    found: Sequence[Mapping[str, Any]] = getattr(task, "files", ())
    return found


def file_records(files: Iterable[Path], licence: str) -> tuple[Mapping[str, Any], ...]:
    """Of files that were read, what the record of a run says of them."""
    return tuple(
        {
            "name": file.name,
            "place": str(file),
            "licence": licence,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "size": file.stat().st_size,
        }
        for file in files
    )


@dataclass(frozen=True)
class Played:
    """Episodes as they went, all equally long.

    Attributes:
      observation: `[count, frame, channel]`, before each action, as it was; `last`: after the last, `[count, channel]`.
      seen, last_seen: the same as the sensors told it to the policy.
      action: `[count, frame, channel]`.
      depth: how deep bodies were in each other, m, `[count, frame]`.
      gain: energy gained during each control step beyond the work of the actuators, J, `[count, frame]`.
      work: of the actuators during each control step, braking counted as driving, J, `[count, frame]`.
    """

    observation: np.ndarray
    last: np.ndarray
    seen: np.ndarray
    last_seen: np.ndarray
    action: np.ndarray
    depth: np.ndarray
    gain: np.ndarray
    work: np.ndarray

    @property
    def after(self) -> np.ndarray:
        """Observations after each action, `[count, frame, channel]`."""
        return np.concatenate([self.observation[:, 1:], self.last[:, None]], 1)


class Scene:
    """A task's compiled model, and episodes played in it.

    What is sent and kept of an action is its float32, so that an episode can be played again from what is kept, to the same bits.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        spec = task.spec()
        spec.option.enableflags |= int(mujoco.mjtEnableBit.mjENBL_ENERGY)
        self.model = compiled(spec)
        sensors = [self.model.sensor(index) for index in range(self.model.nsensor)]
        gaps = [each for each in sensors if each.name.startswith("gap ") and each.type[0] in GAPS]
        self._gaps = np.array([each.adr[0] for each in gaps if each.name == ALL] or [each.adr[0] for each in gaps], int)
        self._last: tuple[bytes, CStepper] | None = None  # of many calls in a row for the same worlds
        self.turn = threading.RLock()  # each device calls from a thread of its own, and copies are stepped by one at a time

    def world(self, values: Mapping[str, float] | None = None) -> np.ndarray:
        """The vector of a world, `[parameter]`: as the scene is, its own gravity included, but for `values`. Raises BadInput."""
        return worlds.world({"gravity": float(np.linalg.norm(self.model.opt.gravity)), **(values or {})})

    def stepper(self, world: np.ndarray) -> CStepper:
        """Copies in worlds `[count, parameter]`, the same ones as long as these are asked for."""
        made_for = np.ascontiguousarray(world, np.float32).tobytes()
        if self._last is None or self._last[0] != made_for:
            threads = 1 if self.model.nv <= SMALL else os.cpu_count() or 1
            self._last = made_for, CStepper(self.model, len(world), self.task.fields(self.model, world), threads)
        return self._last[1]

    def begin(self, start: Start, world: np.ndarray) -> np.ndarray:
        """States of episodes that start, `[count, size]`."""
        with self.turn:
            stepper = self.stepper(world)
            stepper.place(self.task.place(start))
            return stepper.state

    def advance(
        self,
        state: np.ndarray,
        sent: np.ndarray,
        start: Start,
        world: np.ndarray,
        policy: Policy,
        frames: int,
        sensors: worlds.Sensors | None = None,
    ) -> tuple[np.ndarray, np.ndarray, Played]:
        """Goes on for some frames from `state` with the policy in the loop; motors follow their own encoders, which do not fail.

        Args:
          sent: the last actions before, `[count, LATEST, channel]`, which a slow line still has to carry out.
          sensors: seeds of their faults, and what they told before; fresh ones with the copies' numbers as seeds by default.

        Returns:
          the state and the last actions after, and what was played.
        """
        with self.turn:
            task, stepper = self.task, self.stepper(world)
            stepper.state = state
            count = stepper.count
            sensors = worlds.Sensors(np.arange(count)) if sensors is None else sensors
            observed = np.zeros((count, frames + 1, len(task.observation)), np.float32)
            told = np.zeros_like(observed)
            line = np.concatenate([sent, np.zeros((count, frames, len(task.action)), np.float32)], 1).astype(np.float32)
            depth, gain, work = np.zeros((3, count, frames), np.float32)
            energy = stepper.read("energy").sum(1)
            for frame in range(frames + 1):
                seen = task.observe(stepper, start)
                observed[:, frame] = seen
                sensors = sensors.tell(seen, world, task.observation, task.rate)
                assert sensors.told is not None
                told[:, frame] = sensors.told
                if frame == frames:
                    break
                depth[:, frame] = self._depth(stepper)
                line[:, LATEST + frame] = policy(frame, sensors.told)
                net, gross = stepper.work(task.control(seen, due(line, world, frame)), task.steps)
                before, energy = energy, stepper.read("energy").sum(1)
                gain[:, frame] = np.maximum(energy - before - net - SOFT * task.load / 2 - ROUNDING * gross, 0.0)
                work[:, frame] = gross
            both = observed[:, :frames], observed[:, frames], told[:, :frames], told[:, frames]
            played = Played(*both, line[:, LATEST:], depth, gain, work)
            return stepper.state, line[:, frames:], played

    def _depth(self, stepper: CStepper) -> np.ndarray:
        gaps = stepper.read("sensordata")[:, self._gaps] if len(self._gaps) else np.zeros((stepper.count, 1))
        return np.maximum(-gaps.min(1), 0.0)

    def play(
        self, start: Start, world: np.ndarray, policy: Policy, frames: int | None = None, sensors: worlds.Sensors | None = None
    ) -> Played:
        """Episodes from the start on; `sensors` as in `advance`."""
        state, sent = self.begin(start, world), np.zeros((len(world), LATEST, len(self.task.action)), np.float32)
        return self.advance(state, sent, start, world, policy, self.task.frames if frames is None else frames, sensors)[2]

    def replay(self, start: Start, world: np.ndarray, action: np.ndarray, sensors: worlds.Sensors | None = None) -> Played:
        """Episodes from the start on with given actions `[count, frame, channel]`."""
        return self.play(start, world, lambda frame, _: action[:, frame], action.shape[1], sensors)

    def marked(self, start: Mapping[str, float]) -> mujoco.MjModel:
        """A copy of the model whose site "goal" stands where an episode's start has it."""
        model = copy.copy(self.model)
        model.site("goal").pos = self.task.goal(start)
        model.site("goal").sameframe = 0  # it need not stand where its body does, as the compiler may have found
        return model

    def states(self, start: Start, world: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Generalised positions and velocities before each of given actions `[count, frame, channel]`, `[count, frame, nq + nv]`."""
        found: list[np.ndarray] = []

        def policy(frame: int, _: np.ndarray) -> np.ndarray:
            stepper = self.stepper(world)
            found.append(np.concatenate([stepper.position, stepper.velocity], 1))
            return action[:, frame]

        self.play(start, world, policy, action.shape[1])
        return np.stack(found, 1)


def due(line: np.ndarray, world: np.ndarray, frame: int) -> np.ndarray:
    """What slow lines carry out at a frame, `[count, channel]`, of actions sent, `[count, LATEST + frames, channel]`."""
    late = np.round(worlds.of(world, "latency")).astype(int)
    return line[np.arange(len(line)), LATEST + frame - late].astype(np.float64)


def reached(task: Task, after: Array) -> tuple[np.ndarray, np.ndarray]:
    """Control steps until the goal was kept for `hold` in a row, `[count]`, all of them where it was not; and whether it was.

    Args:
      after: observations after each action, `[count, frame, channel]`.
    """
    there = np.asarray(task.off(after)) <= 0
    kept = np.cumsum(np.pad(there, ((0, 0), (1, 0))), 1)
    whole: np.ndarray = kept[:, task.hold :] - kept[:, : -task.hold] == task.hold  # of the frames from each on
    success = np.asarray(whole.any(1))
    return np.where(success, whole.argmax(1) + task.hold, there.shape[1]), success


def wobbling(task: Task, noise: np.random.Generator, amount: float) -> Policy:
    """The demonstrator with the wobble of a human hand: noise that lasts for about five control steps."""
    wobble: float | np.ndarray = 0.0

    def policy(frame: int, observation: np.ndarray) -> np.ndarray:
        nonlocal wobble
        action = task.demonstrate(observation)
        wobble = 0.8 * wobble + 0.6 * amount * noise.standard_normal(action.shape)
        lower, upper = (np.array([getattr(channel, name) for channel in task.action]) for name in ("lower", "upper"))
        return np.clip(action + wobble, lower, upper)

    return policy
