"""Demonstrations: episodes of a task done well, made by its scripted demonstrator or recorded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from domains.robotics import archives, lerobot, worlds
from domains.robotics.episodes import Episode, check, layout_of
from domains.robotics.tasks import Played, Scene, Start, Task, file_records, reached, wobbling
from twinsim.base import BadInput


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
    task: Task,
    count: int,
    seed: int = 0,
    region: str = "narrow",
    wobble: float = 0.25,
    world: Mapping[str, float] | None = None,
    ranges: Mapping[str, Sequence[float | str]] | None = None,
) -> Demonstrations:
    """Successful episodes of the scripted demonstrator, whose hand wobbles. Raises BadInput where it does not succeed.

    Args:
      world: what differs from the scene's own, in all of them.
      ranges: parameters of which every episode draws its own, as in `worlds.draw`: what is learnt is then conditional on them.
    """
    ranges = {**{name: [value, value] for name, value in (world or {}).items()}, **(ranges or {})}
    if count < 1:
        raise BadInput(f"demonstrations of {task.name}: expected a count of at least 1, got {count}")
    episodes: list[Episode] = []
    scene, noise = Scene(task), np.random.default_rng(seed)
    for _ in range(20):
        many = max(8, count - len(episodes))
        start = task.draw(noise, many, region)
        vector = worlds.draw(noise, many, ranges, scene.world())
        episodes += successes(task, scene.play(start, vector, wobbling(task, noise, wobble)), vector, seed)
        if len(episodes) >= count:
            source = f"a scripted demonstrator with a wobble of {wobble:g}, starts {region}, simulated by MuJoCo"
            if ranges:
                source += f", in worlds of {', '.join(f'{name} {_told(ranges[name])}' for name in ranges)}"
            return Demonstrations(tuple(episodes[:count]), source, "CC0-1.0")
    raise BadInput(f"demonstrations of {task.name}: expected {count} successes, the demonstrator came to {len(episodes)}; a gentler world?")


def _told(given: Sequence[float | str]) -> str:
    low, high = given[:2]
    return f"{low}" if low == high else f"{low} to {high}"


def successes(task: Task, played: Played, world: np.ndarray, seed: int = 0) -> list[Episode]:
    """The episodes that reached their goal, up to there, as the sensors told them to whoever acted."""
    length, done = reached(task, played.after)
    seen = np.concatenate([played.seen, played.last_seen[:, None]], 1)
    return [
        Episode(
            seen[row, : length[row]],
            played.action[row, : length[row]],
            seed=seed,
            final=seen[row, length[row]],
            environment=worlds.named(world[row]),
        )
        for row in np.flatnonzero(done)
    ]


def recorded(task: Task, path: str, licence: str = "not stated") -> Demonstrations:
    """Episodes from a LeRobot folder, or from an .npz with `obs` and `act` `[frame, channel]` and `length` `[episode]`. Raises BadInput."""
    place, wanted = Path(path), layout_of(task, "", 0, licence)
    episodes = lerobot.read(place, wanted)[1] if place.is_dir() else _arrays(place)
    check(wanted, episodes, path)
    good = tuple(each for each in episodes if each.success)
    if not good:
        raise BadInput(f"{path}: expected episodes that succeed, to learn from, none of {len(episodes)} does")
    files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file())
    return Demonstrations(good, f"recorded, {place.name}", licence, file_records(files, licence))


def _arrays(path: Path) -> list[Episode]:
    names = ("obs", "act", "length")
    arrays = archives.read(path, "a LeRobot folder or an .npz of demonstrations", names)
    observation, action, length = (arrays[name] for name in names)
    for name, values in (("obs", observation), ("act", action)):
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise BadInput(f"{path}: {name}: expected numbers [frame, channel], got {values.dtype} {list(values.shape)}")
    if length.ndim != 1 or length.dtype.kind not in "iu" or (length < 1).any():
        raise BadInput(f"{path}: length: expected whole numbers above 0 [episode], got {length.dtype} {list(length.shape)}")
    if not len(observation) == len(action) == sum(length.tolist()):
        raise BadInput(
            f"{path}: length: expected the frames of each episode, as many in all as in obs ({len(observation)}) and act ({len(action)}),"
            f" got {sum(length.tolist())}"
        )
    ends = np.cumsum(length)
    parts = [slice(end - size, end) for size, end in zip(length, ends, strict=True)]
    return [Episode(observation[part].astype(np.float32), action[part].astype(np.float32)) for part in parts]


def windows(scene: Scene, episodes: Iterable[Episode], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every stretch of `size` control steps that begins in an episode; beyond its end the last way point stays.

    Returns:
      observations at the beginning `[n, channel]`, way points `[n, size, planned]` and worlds `[n, parameter]`.
    """
    seen, ways, world = [], [], []
    for episode in episodes:
        way = np.asarray(scene.task.way(episode.observation, episode.action), np.float32)
        rows = np.minimum(np.arange(episode.frames)[:, None] + np.arange(size), episode.frames - 1)
        seen.append(episode.observation)
        ways.append(way[rows])
        world.append(np.repeat(scene.world(episode.environment)[None], episode.frames, 0))
    return np.concatenate(seen), np.concatenate(ways), np.concatenate(world)


def start_of(task: Task, start: Start) -> np.ndarray:
    """A start as a vector in the order of the task's names, `[count, name]`."""
    return np.stack([np.asarray(start[name], np.float32) for name in task.start], -1)


def start_from(task: Task, vector: np.ndarray) -> dict[str, np.ndarray]:
    """The inverse of `start_of`, in float64 of float32 values."""
    return {name: np.asarray(vector[..., index], np.float64) for index, name in enumerate(task.start)}
