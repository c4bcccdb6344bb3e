"""Tasks as Gymnasium environments, for policies that learn or are tried by acting.

Importing this makes them known to Gymnasium; so does `gymnasium.make("domains.robotics.environments:twinsim/PlanarPush-v0")`.
"""

from collections.abc import Mapping
from typing import Any, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from domains.robotics import sheet, worlds
from domains.robotics.arm import ArmPick, ArmPush, ArmReach
from domains.robotics.flyer import Inspection, Landing
from domains.robotics.push import PlanarPush
from domains.robotics.reach import OwnReach
from domains.robotics.tasks import LATEST, Scene, Task, environment_id
from domains.robotics.walker import Walk
from twinsim.base import BadInput

TASKS = {environment_id(task): task for task in (PlanarPush, ArmReach, ArmPush, ArmPick, Inspection, Landing, Walk, OwnReach)}
PICTURE = 240  # pixels


def make(
    task: str,
    region: str = "wide",
    world: Mapping[str, float] | None = None,
    render_mode: str | None = None,
    **options: Any,
) -> "TaskEnvironment":
    """The environment of a task of TASKS; `options` are the task's own, as the model and the tool of OwnReach."""
    return TaskEnvironment(cast(Task, TASKS[task](**options)), region, world, render_mode)


class TaskEnvironment(gymnasium.Env[np.ndarray, np.ndarray]):
    """One episode at a time of any task; a step is a control step.

    The reward is 1 for the step that has kept the goal for as long as the task asks, which ends the episode, else 0; after the task's
    longest time an episode is truncated. Observations are what the world's sensors tell. The reward goes by what is, and so does `info`,
    which holds `success` and `off`, how far the goal is from being reached.

    Args:
      region: where episodes start, as the task has it.
      world: physical parameters that differ from the scene's own (see `worlds.PARAMETERS`).
    """

    def __init__(self, task: Task, region: str = "wide", world: Mapping[str, float] | None = None, render_mode: str | None = None) -> None:
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(task.rate)}
        self.task, self.region, self.render_mode = task, region, render_mode
        self.observation_space = Box(-np.inf, np.inf, (len(task.observation),), np.float32)
        lower, upper = (np.array([getattr(channel, side) for channel in task.action], np.float32) for side in ("lower", "upper"))
        self.action_space = self._actions = Box(lower, upper, dtype=np.float32)
        self._scene = Scene(task)
        self._world = self._scene.world(world)[None]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; `options["start"]`, name -> value, says where, else it is drawn. Raises BadInput."""
        super().reset(seed=seed)
        task = self.task
        given = (options or {}).get("start", {})
        if not isinstance(given, Mapping) or given.keys() - task.start.keys():
            raise BadInput(f"{task.name}: start: expected some of {', '.join(task.start)}, got {given}")
        drawn = task.draw(self.np_random, 1, self.region)
        self._start = drawn | {name: np.array([float(value)]) for name, value in given.items()}
        self._state = self._scene.begin(self._start, self._world)
        self._sent = np.zeros((1, LATEST, len(task.action)), np.float32)
        self._frame = self._kept = 0
        self._sensors = worlds.Sensors(self.np_random.spawn(1)[0].integers(2**32, size=1, dtype=np.uint32))
        seen = task.observe(self._scene.stepper(self._world), self._start)
        told = self._sensors.tell(seen, self._world, task.observation, task.rate).told
        return np.asarray(told, np.float32)[0], self._info(seen, False)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One control step with `action` `[channel]`; what is beyond its bounds is cut off."""
        sent = np.clip(np.asarray(action, np.float32), self._actions.low, self._actions.high)
        self._state, self._sent, played = self._scene.advance(
            self._state, self._sent, self._start, self._world, lambda frame, seen: sent[None], 1, self._sensors
        )
        self._frame += 1
        self._sensors = worlds.Sensors(self._sensors.seed, self._frame, played.seen[:, -1])
        self._kept = self._kept + 1 if float(self.task.off(played.last)[0]) <= 0 else 0
        success = self._kept >= self.task.hold
        late = self._frame >= self.task.frames and not success
        return played.last_seen[0], float(success), success, late, self._info(played.last, success)

    def render(self) -> np.ndarray | None:
        """The present state as a picture `[240, 240, 3]` uint8, in the mode "rgb_array"; drawn from above where there is no GL library."""
        if self.render_mode != "rgb_array":
            return None
        stepper = self._scene.stepper(self._world)
        model = self._scene.marked({name: float(value[0]) for name, value in self._start.items()})
        return sheet.pictures(model, stepper.position, size=PICTURE)[0]

    def _info(self, seen: np.ndarray, success: bool) -> dict[str, Any]:
        return {"success": success, "off": float(self.task.off(seen)[0])}


for name in TASKS:
    gymnasium.register(name, entry_point="domains.robotics.environments:make", kwargs={"task": name})
