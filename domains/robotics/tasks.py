"""What a task is: a scene, where episodes start, what is seen, what can be done, when it is done, and in which frame it is learnt.

Host functions take `count` episodes at once, numpy in and out; those of one observation are traced by JAX and have no leading axis.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.physics import CStepper, compiled
from twinsim.base import Array, Variable

Policy = Callable[[int, np.ndarray], np.ndarray]  # control step, observations `[count, channel]` -> actions `[count, channel]`
Start = Mapping[str, np.ndarray]  # name -> `[count]`


class Channel(NamedTuple):
    """One number of an observation or an action, and the bounds beyond which it is broken."""

    name: str
    units: str
    lower: float = -np.inf
    upper: float = np.inf


class Task(Protocol):
    """A robot and what it is to do.

    Attributes:
      rate: control steps a second; `steps` physics steps each.
      frames: most control steps of an episode; `hold` of them in a row the goal must be kept.
      planned: names of the way points' coordinates that a generator draws.
      start: what an episode starts from and is after, scalars.
      handled: bodies that the payload of a world weighs down.
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
    planned: Sequence[str]
    start: Mapping[str, Variable]
    handled: Sequence[str]

    # ---- the host's part: `count` episodes at once

    def spec(self) -> mujoco.MjSpec:
        """The scene. Sensors of kind GEOMDIST whose names begin with "gap" tell how deep bodies are in each other."""
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

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mirror image, which is as possible as the original; both unchanged where there is none."""
        ...


@dataclass(frozen=True)
class Played:
    """Episodes as they went, all `frames` long.

    Attributes:
      observation: `[count, frame, channel]`, before each action; action: `[count, frame, channel]`.
      depth: how deep bodies were in each other, m, `[count, frame]`; energy: kinetic and potential, J.
      length: control steps until the goal was kept, `[count]`; `frames` where it was not.
      success: `[count]`.
    """

    observation: np.ndarray
    action: np.ndarray
    depth: np.ndarray
    energy: np.ndarray
    length: np.ndarray
    success: np.ndarray


class Scene:
    """A task's compiled model, and episodes played in it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        spec = task.spec()
        spec.option.enableflags |= int(mujoco.mjtEnableBit.mjENBL_ENERGY)
        self.model = compiled(spec)
        self.gaps = np.array(
            [
                self.model.sensor_adr[index]
                for index in range(self.model.nsensor)
                if (mujoco.mj_id2name(self.model, mujoco.mjtObj.mjOBJ_SENSOR, index) or "").startswith("gap")
            ],
            int,
        )

    def stepper(self, world: np.ndarray) -> CStepper:
        """Copies in worlds `[count, parameter]`."""
        return CStepper(self.model, len(world), self.task.fields(self.model, world))

    def measure(self, stepper: CStepper) -> tuple[np.ndarray, np.ndarray]:
        """Depth of contact, m, and energy, J, `[count]` each."""
        gaps = stepper.read("sensordata")[:, self.gaps] if len(self.gaps) else np.zeros((stepper.count, 1))
        return np.maximum(-gaps.min(1), 0.0), stepper.read("energy").sum(1)

    def play(self, start: Start, world: np.ndarray, policy: Policy, frames: int | None = None) -> Played:
        """Episodes from the start, with the policy in the loop. Actions are rounded to float32, which is what is kept of them."""
        task, stepper = self.task, self.stepper(world)
        stepper.place(task.place(start))
        frames = task.frames if frames is None else frames
        count = stepper.count
        late = np.round(worlds.of(world, "latency")).astype(int)
        observed = np.zeros((count, frames, len(task.observation)))
        acted = np.zeros((count, frames, len(task.action)), np.float32)
        depth, energy = np.zeros((count, frames)), np.zeros((count, frames))
        for frame in range(frames):
            observed[:, frame] = task.observe(stepper, start)
            depth[:, frame], energy[:, frame] = self.measure(stepper)
            acted[:, frame] = policy(frame, observed[:, frame])
            sent = acted[np.arange(count), np.maximum(frame - late, 0)].astype(np.float64)
            sent[frame < late] = 0.0
            stepper.step(task.control(observed[:, frame], sent), task.steps)
        last = task.observe(stepper, start)
        length, success = reached(task, np.concatenate([observed[:, 1:], last[:, None]], 1))
        return Played(observed.astype(np.float32), acted, depth, energy, length, success)


def reached(task: Task, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Control steps until the goal was kept for `hold` in a row, `[count]`, and whether it was.

    Args:
      after: observations after each action, `[count, frame, channel]`.
    """
    there = np.asarray(task.off(after)) <= 0
    run = np.zeros(len(there), int)
    length = np.full(len(there), there.shape[1])
    done = np.zeros(len(there), bool)
    for frame in range(there.shape[1]):
        run = np.where(there[:, frame], run + 1, 0)
        now = (run >= task.hold) & ~done
        length[now], done = frame + 1, done | now
    return length, done


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
