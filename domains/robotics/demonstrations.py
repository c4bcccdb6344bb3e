"""Demonstrations: episodes of a task done well, made by its scripted demonstrator or recorded."""

import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains.robotics import worlds
from domains.robotics.tasks import Played, Scene, Start, Task, reached, wobbling
from twinsim.base import BadInput

MOST_FRAMES = 10_000_000


@dataclass(frozen=True)
class Episode:
    """What was seen and done until the goal was kept: `observation` `[frame, channel]`, before each `action` `[frame, channel]`."""

    observation: np.ndarray
    action: np.ndarray
    world: np.ndarray

    def __len__(self) -> int:
        return len(self.action)


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """Episodes, and where they are from.

    Attributes:
      files: those that were read, as records of inputs.
      source: where they are from, for the report.
    """

    episodes: tuple[Episode, ...]
    source: str
    licence: str
    files: tuple[Mapping[str, Any], ...] = field(default=())


def scripted(
    task: Task, count: int, seed: int = 0, region: str = "narrow", wobble: float = 0.25, world: Mapping[str, float] | None = None
) -> Demonstrations:
    """Successful episodes of the scripted demonstrator, whose hand wobbles. Raises BadInput where it does not succeed."""
    if count < 1:
        raise BadInput(f"demonstrations of {task.name}: expected a count of at least 1, got {count}")
    episodes: list[Episode] = []
    scene, noise = Scene(task), np.random.default_rng(seed)
    for _ in range(20):
        many = max(8, count - len(episodes))
        start, vector = task.draw(noise, many, region), np.repeat(worlds.world(world)[None], many, 0)
        episodes += successes(task, scene.play(start, vector, wobbling(task, noise, wobble)), vector)
        if len(episodes) >= count:
            source = f"a scripted demonstrator with a wobble of {wobble:g}, starts {region}, simulated by MuJoCo"
            return Demonstrations(tuple(episodes[:count]), source, "CC0-1.0")
    raise BadInput(f"demonstrations of {task.name}: expected {count} successes, the demonstrator came to {len(episodes)}; a gentler world?")


def successes(task: Task, played: Played, world: np.ndarray) -> list[Episode]:
    """The episodes that reached their goal, up to there."""
    length, done = reached(task, played.after)
    return [Episode(played.observation[row, : length[row]], played.action[row, : length[row]], world[row]) for row in np.flatnonzero(done)]


def recorded(task: Task, path: str, world: Mapping[str, float] | None = None, licence: str = "not stated") -> Demonstrations:
    """Episodes from a file: an .npz with `obs` `[frame, channel]`, `act` `[frame, channel]` and `length` `[episode]`. Raises BadInput."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"obs", "act", "length"} - set(arrays.files)
            if missing:
                raise BadInput(f"{path}: expected the arrays obs, act and length, {' and '.join(sorted(missing))} is not there")
            observation, action, length = arrays["obs"], arrays["act"], arrays["length"]
    except (EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: expected an .npz of demonstrations, could not read it ({type(error).__name__})") from error
    check(task, path, observation, action, length)
    ends = np.cumsum(length)
    vector = worlds.world(world)
    episodes = [
        Episode(observation[end - size : end].astype(np.float32), action[end - size : end].astype(np.float32), vector)
        for size, end in zip(length, ends, strict=True)
    ]
    digest, size = hashlib.sha256(Path(path).read_bytes()).hexdigest(), Path(path).stat().st_size
    file = {"name": Path(path).name, "place": str(path), "licence": licence, "sha256": digest, "size": size}
    return Demonstrations(tuple(episodes), f"recorded, {Path(path).name}", licence, (file,))


def check(task: Task, where: str, observation: np.ndarray, action: np.ndarray, length: np.ndarray) -> None:
    """Raises BadInput where arrays of episodes are not demonstrations of the task's robot."""
    for name, values, channels in (("obs", observation, task.observation), ("act", action, task.action)):
        if values.ndim != 2 or values.shape[1] != len(channels):
            told = f"{len(channels)} channels ({', '.join(channel.name for channel in channels)})"
            raise BadInput(f"{where}: {name}: expected demonstrations of the {task.robot}, {told}, got an array of shape {values.shape}")
        if not np.isfinite(values).all():
            frame, channel = np.argwhere(~np.isfinite(values))[0]
            raise BadInput(
                f"{where}: {name}: expected finite numbers, got {values[frame, channel]} in frame {frame}, {channels[channel].name}"
            )
        for index, channel in enumerate(channels):
            worst = float(np.abs(values[:, index]).max(initial=0.0))
            if channel.units == "rad" and worst > 4 * np.pi:
                raise BadInput(f"{where}: {name}: {channel.name}: expected radians, got values up to {worst:.0f}, which look like degrees")
            least, most = float(values[:, index].min(initial=0.0)), float(values[:, index].max(initial=0.0))
            slack = 1e-3 * max(1.0, abs(channel.lower) if np.isfinite(channel.lower) else 1.0)
            if least < channel.lower - slack or most > channel.upper + slack:
                raise BadInput(
                    f"{where}: {name}: {channel.name}: expected {channel.lower:g} to {channel.upper:g} {channel.units},"
                    f" got {least:.3g} to {most:.3g}"
                )
    if length.ndim != 1 or (length < 1).any() or length.sum() != len(observation) or len(observation) != len(action):
        raise BadInput(
            f"{where}: length: expected the frames of each episode, {len(observation)} in all as in obs, and as many in act ({len(action)}),"
            f" got {int(length.sum())}"
        )
    if len(observation) > MOST_FRAMES:
        raise BadInput(f"{where}: expected at most {MOST_FRAMES} frames, got {len(observation)}")


def windows(task: Task, episodes: Iterable[Episode], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every stretch of `size` control steps that begins in an episode; beyond its end the last way point stays.

    Returns:
      observations at the beginning `[n, channel]`, way points `[n, size, planned]` and worlds `[n, parameter]`.
    """
    seen, ways, world = [], [], []
    for episode in episodes:
        way = np.asarray(task.way(episode.observation, episode.action), np.float32)
        rows = np.minimum(np.arange(len(episode))[:, None] + np.arange(size), len(episode) - 1)
        seen.append(episode.observation)
        ways.append(way[rows])
        world.append(np.repeat(episode.world[None], len(episode), 0))
    return np.concatenate(seen), np.concatenate(ways), np.concatenate(world)


def start_of(task: Task, start: Start) -> np.ndarray:
    """A start as a vector in the order of the task's names, `[count, name]`."""
    return np.stack([np.asarray(start[name], np.float32) for name in task.start], -1)


def start_from(task: Task, vector: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `start_of`, in float64 of float32 values."""
    return {name: np.asarray(vector[..., index], np.float64) for index, name in enumerate(task.start)}
