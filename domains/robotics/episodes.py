"""Episodes: trajectories of one robot at one task, and what all of them have in common."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from domains.robotics.tasks import Channel, Task
from twinsim.base import BadInput
from twinsim.data import publish

SYNTHETIC = "Synthetic: generated and replayed in a simulator, not recorded on a robot."
SLACK = 0.05  # share of a channel's range that a sensor or a soft joint stop may overshoot
TURNS = 4 * np.pi  # rad; a joint without limits that goes further is taken to be in degrees
NAMED = 4  # names that a message gives


@dataclass(frozen=True)
class Layout:
    """What all episodes of a set have in common.

    Attributes:
      task: a sentence, as a policy is told it.
      fps: frames a second.
      observation, action: one channel a column; units are "" where they are not known.
      mujoco: version of the simulator that the episodes hold in; "" where there was none.
      generator: what made them; seed: of the whole set.
      note: where the episodes are from, for whoever opens the files.
    """

    robot: str
    task: str
    fps: float
    observation: tuple[Channel, ...]
    action: tuple[Channel, ...]
    mujoco: str = ""
    generator: str = ""
    seed: int = 0
    licence: str = ""
    note: str = SYNTHETIC

    def describe(self) -> dict[str, Any]:
        """As JSON has it: names and units of channels, their bounds where there are any."""
        channels = {kind: [_described(channel) for channel in getattr(self, kind)] for kind in ("observation", "action")}
        plain = {name: getattr(self, name) for name in ("note", "robot", "task", "fps", "mujoco", "generator", "seed", "licence")}
        return plain | channels


@dataclass(frozen=True, eq=False)
class Episode:
    """One trajectory.

    Attributes:
      observation: before each action, `[frame, channel]` float32.
      action: `[frame, channel]` float32.
      final: observation after the last action, `[channel]`; None where it was not kept.
      states: positions and velocities of the simulator before each action, `[frame, nq + nv]` float64.
      images: `[frame, height, width, 3]` uint8.
      environment: physical parameters of the world it happened in, name -> value.
    """

    observation: np.ndarray
    action: np.ndarray
    success: bool = True
    seed: int = 0
    final: np.ndarray | None = None
    states: np.ndarray | None = None
    images: np.ndarray | None = None
    environment: Mapping[str, float] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        return len(self.action)


def layout_of(task: Task, generator: str, seed: int, licence: str, note: str = SYNTHETIC) -> Layout:
    """The layout of a task's episodes, as they hold in the simulator that is installed."""
    channels = tuple(task.observation), tuple(task.action)
    return Layout(task.robot, task.sentence, task.rate, *channels, mujoco.__version__, generator, seed, licence, note)


# ---------------------------------------------------------------- checks


def check(layout: Layout, episodes: Sequence[Episode], where: str) -> None:
    """Raises BadInput where episodes are not what their layout says: counts, NaN, degrees for radians, values beyond bounds."""
    if not episodes:
        raise BadInput(f"{where}: expected episodes, got none")
    if not (np.isfinite(layout.fps) and layout.fps > 0):
        raise BadInput(f"{where}: expected a positive number of frames a second, got {layout.fps}")
    for kind in ("observation", "action"):
        channels: tuple[Channel, ...] = getattr(layout, kind)
        names = [channel.name for channel in channels]
        if not names or len({*names}) < len(names):
            raise BadInput(f"{where}: {kind}: expected one name or more, each once, got {_some(names)}")
        for index, episode in enumerate(episodes):
            _check_shape(getattr(episode, kind), episode, len(channels), f"{where}: episode {index}: {kind}", _some(names))
        _check_values(channels, [getattr(episode, kind) for episode in episodes], where)
    finals = [(index, episode.final) for index, episode in enumerate(episodes) if episode.final is not None]
    for index, final in finals:
        if final.shape != (len(layout.observation),) or not np.isfinite(final).all():
            raise BadInput(f"{where}: episode {index}: final observation: expected {len(layout.observation)} finite numbers, got {final}")
    _check_alike(episodes, where)


def check_same_robot(layout: Layout, other: Layout, where: str) -> None:
    """Raises BadInput where `other`, which was read from `where`, is not of the robot and task layout that is expected."""
    for kind in ("observation", "action"):
        expected, got = ([channel.name for channel in getattr(each, kind)] for each in (layout, other))
        if expected != got:
            raise BadInput(f"{where}: {kind} of another robot: expected {_some(expected)}, got {_some(got)}")
    if abs(layout.fps - other.fps) > 1e-6 * layout.fps:
        raise BadInput(f"{where}: expected {layout.fps:g} frames a second, got {other.fps:g}")


def _check_shape(values: np.ndarray, episode: Episode, channels: int, where: str, names: str) -> None:
    if values.ndim != 2 or values.shape[1] != channels:
        raise BadInput(f"{where}: expected [frames, {channels}] for {names}, got {list(values.shape)}: another robot?")
    if not len(values):
        raise BadInput(f"{where}: expected one frame or more, got none")
    if len(values) != episode.frames:
        raise BadInput(f"{where}: expected as many frames as actions, {episode.frames}, got {len(values)}")


def _check_values(channels: Sequence[Channel], parts: Sequence[np.ndarray], where: str) -> None:
    values = np.concatenate(parts)
    lower, upper = (np.array([getattr(channel, side) for channel in channels]) for side in ("lower", "upper"))
    width = np.where(np.isfinite(upper - lower), upper - lower, 0.0)
    turning = np.array([channel.units == "rad" for channel in channels])
    wound = turning & ~np.isfinite(lower) & ~np.isfinite(upper) & (np.abs(values) > TURNS)
    beyond = (values < lower - SLACK * width - 1e-6) | (values > upper + SLACK * width + 1e-6)
    for fault in (~np.isfinite(values), wound | beyond):
        if fault.any():
            row, column = np.argwhere(fault)[0]
            starts = np.cumsum([0, *map(len, parts)])
            episode = int(np.searchsorted(starts, row, "right")) - 1
            channel, value = channels[column], values[row, column]
            raise BadInput(f"{where}: episode {episode}, frame {row - starts[episode]}: {channel.name}: {_expected(channel, value)}")


def _expected(channel: Channel, value: float) -> str:
    bounded = np.isfinite(channel.lower) or np.isfinite(channel.upper)
    bounds = f"{channel.lower:g} to {channel.upper:g} {channel.units}".strip() if bounded else f"finite {channel.units}".strip()
    if channel.units != "rad" or not np.isfinite(value):
        return f"expected {bounds}, got {value:g}"
    turned = np.deg2rad(value)
    if bounded and channel.lower <= turned <= channel.upper and abs(value) > np.pi:
        return f"expected {bounds}, got {value:g}, which degrees would explain"
    return f"expected {bounds}, got {value:g}" + ("" if bounded else f", {abs(value) / (2 * np.pi):.0f} turns: degrees taken for radians?")


def _check_alike(episodes: Sequence[Episode], where: str) -> None:
    """States, pictures and parameters of the world: all episodes have the same kind of them, or none has."""
    first = episodes[0]
    for index, episode in enumerate(episodes):
        for kind, values, model in (("states", episode.states, first.states), ("images", episode.images, first.images)):
            if (values is None) != (model is None) or (values is not None and model is not None and values.shape[1:] != model.shape[1:]):
                raise BadInput(
                    f"{where}: episode {index}: {kind}: expected the same as in episode 0, {_shape(model)}, got {_shape(values)}"
                )
            if values is not None and len(values) != episode.frames:
                raise BadInput(f"{where}: episode {index}: {kind}: expected {episode.frames} frames, got {len(values)}")
        if episode.images is not None and (episode.images.dtype != np.uint8 or episode.images.ndim != 4 or episode.images.shape[-1] != 3):
            got = f"{episode.images.dtype} {list(episode.images.shape)}"
            raise BadInput(f"{where}: episode {index}: images: expected uint8 [frames, height, width, 3], got {got}")
        if episode.states is not None and not np.isfinite(episode.states).all():
            raise BadInput(f"{where}: episode {index}: states: expected finite numbers, got some that are not")
        if episode.environment.keys() != first.environment.keys():
            raise BadInput(
                f"{where}: episode {index}: environment: expected {_some([*first.environment])}, got {_some([*episode.environment])}"
            )


def _shape(values: np.ndarray | None) -> str:
    return "none" if values is None else f"[frames, {', '.join(map(str, values.shape[1:]))}]"


def _some(names: Sequence[str]) -> str:
    """Names for a message: how many, and the first of them."""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} ({', '.join(names[:NAMED])}{more})" if names else "none"


def _described(channel: Channel) -> dict[str, Any]:
    bounds = {side: getattr(channel, side) for side in ("lower", "upper")}
    return {"name": channel.name, "units": channel.units} | {side: float(value) for side, value in bounds.items() if np.isfinite(value)}


# ---------------------------------------------------------------- for those who write them


def transitions(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Observations `[step + 1, channel]` and actions `[step, channel]`.

    Where what came of the last action was not kept, that action is left out: nothing is made up.
    """
    if episode.final is None:
        return episode.observation, episode.action[:-1]
    return np.concatenate([episode.observation, episode.final[None]]), episode.action


@contextmanager
def unfinished(place: Path, ours: str = "") -> Iterator[Path]:
    """A file or folder to write that takes the name `place` when the block ends well, and is gone where it does not.

    A folder that stands in the place is replaced only if it holds the file `ours`. Raises BadInput otherwise.
    """
    if place.is_dir() and any(place.iterdir()) and not (ours and (place / ours).exists()):
        raise BadInput(f"{place}: expected a new or empty folder, or one with {ours or 'nothing'} in it to replace")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(place.name + ".partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            _remove(place)
        publish(partial, place)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
