"""What a generator of motions has to beat, in the simulator too: demonstrations with noise, and demonstrations moved to a new start."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from domains.robotics.demonstrations import start_from
from twinsim.base import Baseline, Condition, Sample

if TYPE_CHECKING:
    from domains.robotics.domain import Motions

JITTER = 0.05  # of an action's range


def of(domain: "Motions") -> Mapping[str, Baseline]:
    """The baselines of a twin by name."""
    return {"jitter": _jitter(domain), "moved demonstrations": _moved(domain)}


def _jitter(domain: "Motions") -> Baseline:
    """The actions of a random demonstration with Gaussian noise, sent from the new start."""

    def draw(condition: Condition, members: int, seed: int) -> Sample:
        noise = np.random.default_rng(seed)

        def once(start: dict, world: np.ndarray, observation: np.ndarray) -> Sample:
            frames = domain.task.frames
            actions = np.zeros((len(world), frames, len(domain.task.action)), np.float32)
            for row, chosen in enumerate(noise.integers(len(domain.demonstrations.episodes), size=len(world))):
                given = domain.demonstrations.episodes[chosen].action[:frames]
                actions[row, : len(given)] = given
            lower, upper = (np.array([getattr(each, name) for each in domain.task.action], np.float32) for name in ("lower", "upper"))
            shaken = actions + JITTER * noise.standard_normal(actions.shape).astype(np.float32) * (upper - lower)
            return domain.as_sample(domain.scene.replay(start, world, np.clip(shaken, lower, upper)))

        return _each(domain, condition, members, once)

    return draw


def _moved(domain: "Motions") -> Baseline:
    """The way points of a random demonstration, moved with what it handles to the new start, and tracked.

    After Mandlekar et al. (2023), "MimicGen": one segment a demonstration, its source drawn at random.
    """
    task = domain.task
    ways = [np.asarray(task.way(each.observation, each.action), np.float32) for each in domain.demonstrations.episodes]
    frames = task.frames
    filled = np.stack([np.concatenate([way, np.repeat(way[-1:], frames, 0)])[:frames] for way in ways])
    first = np.stack([each.observation[0] for each in domain.demonstrations.episodes])
    moved = jax.jit(jax.vmap(task.moved))

    def draw(condition: Condition, members: int, seed: int) -> Sample:
        noise = np.random.default_rng(seed)

        def once(start: dict, world: np.ndarray, observation: np.ndarray) -> Sample:
            chosen = noise.integers(len(ways), size=len(world))
            way = np.asarray(moved(first[chosen], observation, filled[chosen]), np.float64)
            at = np.zeros(len(world), int)  # the first way point is gone to before the others are followed

            def policy(_: int, seen: np.ndarray) -> np.ndarray:
                now = way[np.arange(len(at)), np.minimum(at, frames - 1)]
                action = task.track(now, seen)
                near = (np.abs(action) < 1 - 1e-9).all(1) & (np.linalg.norm(action, axis=1) < 1 - 1e-9)
                at[near | (at > 0)] += 1
                return action

            return domain.as_sample(domain.scene.play(start, world, policy))

        return _each(domain, condition, members, once)

    return draw


def _each(domain: "Motions", condition: Condition, members: int, once: "object") -> Sample:
    """Samples `[member, n, ...]` of a function of starts, worlds and first observations, all `[n, ...]`."""
    start, world = start_from(domain.task, np.asarray(condition["start"])), np.asarray(condition["world"])
    drawn = [once(start, world, np.asarray(condition["observation"])) for _ in range(members)]  # type: ignore[operator]
    return {name: np.stack([np.asarray(each[name]) for each in drawn]) for name in drawn[0]}
