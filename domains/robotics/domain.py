"""The robotics domain: motions of a robot at a task, learnt from a few demonstrations and carried out by the simulator.

What is generated is a window: the way points of the next few control steps, given what is seen. They are learnt in the task's own
frame (on the puck and looking at the goal, say), so that a motion seen at one place is known at every other. An answer is an episode: a
window is drawn, its first steps are tracked in the simulator, and from what came of them the next is drawn. Every episode is then
played again from what is kept of it, checked, and only what holds is delivered.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr

from domains.robotics import baselines, results, scores, worlds
from domains.robotics.demonstrations import Demonstrations, start_from, start_of, windows
from domains.robotics.episodes import Episode
from domains.robotics.tasks import LATEST, Played, Scene, Task, inputs, reached
from twinsim import scenario as scenarios
from twinsim.base import (
    Array,
    BadInput,
    Baseline,
    Condition,
    Example,
    Propose,
    Question,
    Rows,
    Sample,
    Score,
    Scores,
    Section,
    Source,
    Spec,
    Statistics,
    Target,
    Variable,
)

STOP = 0.01  # of a channel's range, by which a soft joint stop gives way
DEEPEST = 1e-3  # m that bodies may be in each other: MuJoCo's contacts are soft
KINDS = {"rad": "angles", "rad s-1": "turning speeds", "m": "places", "m s-1": "speeds", "1": "actions"}  # of channels, by their unit
UNSEEN = 1e9  # scale of what no demonstration varies: a world beyond them looks to the generator like theirs, and only the feedback knows
EXAM_SEED = 10_007  # of the held-out starts
AT_ONCE = 1000  # episodes that are played again for their states
FORMATS = Literal["netcdf", "lerobot", "robomimic", "minari", "mcap", "mjcf"]


class MotionScenario(scenarios.Scenario):
    """A question to a twin of a robot.

    Attributes:
      starts: how many starts are drawn; every member plays each of them once.
      region: where they lie: "narrow", where demonstrations start, or "wide".
      world: a named world of `worlds.PRESETS`, "" for the scene's own; `parameters` change single figures of it.
      formats: beside Zarr: "netcdf", and what trainers read.
    """

    starts: int = pydantic.Field(default=50, ge=1, le=100_000)
    region: Literal["narrow", "wide"] = "wide"
    world: str = pydantic.Field(default="", max_length=100)
    parameters: dict[str, float] = pydantic.Field(default={}, max_length=32)
    formats: list[FORMATS] = []  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Motions:
    """A twin of a robot at a task.

    Attributes:
      task: what is to be done.
      demonstrations: what is learnt from.
      window: control steps of a draw; `stride`: how many of them are carried out before the next is drawn.
      exam_starts: wide starts of the held-out test.
    """

    name: str
    task: Task
    demonstrations: Demonstrations
    window: int = 8
    stride: int = 4
    exam_starts: int = 100

    Scenario: ClassVar[type[scenarios.Scenario]] = MotionScenario

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window <= self.task.frames:
            raise BadInput(
                f"{self.name}: expected 1 <= stride <= window <= {self.task.frames}, got stride={self.stride}, window={self.window}"
            )
        if self.task.frames % self.stride:
            raise BadInput(f"{self.name}: stride: expected a divisor of the {self.task.frames} frames of an episode, got {self.stride}")

    # ------------------------------------------------------------ what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.window,)

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {
            each.name: Variable(("step",), each.units, f"way point, {each.name}", lower=each.lower, upper=each.upper)
            for each in self.task.planned
        }

    @property
    def outcome(self) -> Mapping[str, Variable]:
        """What an answer holds of each episode; beyond its length it stands still."""
        channels = {each.name: Variable(("frame",), each.units, each.name.replace("_", " ")) for each in self.task.observation}
        actions = {each.name: Variable(("frame",), each.units, f"action: {each.name.replace('_', ' ')}") for each in self.task.action}
        seen = {f"seen_{name}": dataclasses.replace(each, long_name=f"{each.long_name}, as sensed") for name, each in channels.items()}
        return {
            **channels,
            **seen,
            **actions,
            "depth": Variable(("frame",), "m", "greatest depth of contact"),
            "gain": Variable(("frame",), "J", "energy gained beyond the work of the actuators"),
            "length": Variable((), "1", "control steps until the goal was kept"),
            "success": Variable((), "1", "1 where the goal was reached and kept"),
            "replay_error": Variable((), "1", "greatest difference of an observation when the actions are played again"),
        }

    @property
    def condition(self) -> Mapping[str, Variable]:
        return {
            "observation": Variable(("channel",), "1", "what is seen, in the units of the channels"),
            "world": Variable(("parameter",), "1", "physical conditions, in the units of the parameters"),
        }

    @property
    def licence(self) -> str:
        return self.demonstrations.licence

    @property
    def limits(self) -> Sequence[str]:
        return results.limits(self)

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        return [*self.demonstrations.files, *inputs(self.task)]

    @cached_property
    def scene(self) -> Scene:
        return Scene(self.task)

    # ------------------------------------------------------------ truth

    @cached_property
    def _windows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Observations, way points and worlds of every window of the demonstrations, then of their mirror images."""
        seen, ways, world = windows(self.scene, self.demonstrations.episodes, self.window)
        images = jax.jit(jax.vmap(self.task.mirrored))(seen, ways)
        pairs = zip((seen, ways, world), (*images, world), strict=True)
        return tuple(np.concatenate([np.asarray(one), np.asarray(other)]) for one, other in pairs)  # type: ignore[return-value]

    def source(self, split: str) -> Source:
        """Windows of the demonstrations; all train, since the test is to do the task from other starts."""
        if split not in ("train", "validation", "test"):
            raise BadInput(f"split {split}: expected train, validation or test")
        return Rows(self._recorded, np.arange(len(self._windows[0]) if split == "train" else 0))

    def _recorded(self, rows: np.ndarray) -> tuple[Sample, Condition]:
        seen, ways, world = (part[rows] for part in self._windows)
        return {each.name: ways[..., index] for index, each in enumerate(self.task.planned)}, {"observation": seen, "world": world}

    # ------------------------------------------------------------ one window <-> one example

    @cached_property
    def _framed(self) -> tuple[np.ndarray, np.ndarray]:
        """Features and way points in the task's frame of all windows."""
        both = jax.jit(jax.vmap(lambda seen, way: (self.task.features(seen), self.task.into_frame(seen, way))))
        features, ways = both(*self._windows[:2])
        return np.asarray(features), np.asarray(ways)

    def fit(self) -> Statistics:
        features, ways = self._framed
        return {"features": _moments(features), "ways": _moments(ways), "world": _moments(self._windows[2], UNSEEN)}

    def spec(self, statistics: Statistics | None = None) -> Spec:
        (features,) = jax.eval_shape(self.task.features, jnp.zeros(len(self.task.observation))).shape
        return Spec((1,), self.window * len(self.task.planned), features, len(worlds.NAMES), (False,))

    def examples(self, statistics: Statistics) -> Iterator[Example]:
        features, ways = self._framed
        target = _normalised(statistics["ways"], ways).reshape(len(ways), 1, -1)
        fields = _normalised(statistics["features"], features)[:, None]
        world = _normalised(statistics["world"], self._windows[2])
        yield Example(*(np.asarray(part, np.float32) for part in (target, fields, world)))

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        features = self.task.features(jnp.asarray(condition["observation"]))
        return _normalised(statistics["features"], features)[None], _normalised(statistics["world"], jnp.asarray(condition["world"]))

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        moments = statistics["ways"]
        ways = jnp.asarray(target).reshape(self.window, -1) * moments["scale"] + moments["mean"]
        ways = self.task.out_of_frame(jnp.asarray(condition["observation"]), ways)
        return {each.name: jnp.clip(ways[:, index], each.lower, each.upper) for index, each in enumerate(self.task.planned)}

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: a window alone is a plan; episodes are simulated where they are unrolled."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        """Of a window, whether its way points can be gone to; of an episode, what the simulator found."""
        if "success" not in sample:
            beyond = [jnp.maximum(each.lower - sample[each.name], sample[each.name] - each.upper).max() for each in self.task.planned]
            return {"way points outside of the workspace": jnp.maximum(jnp.stack(beyond).max(), 0.0)}
        there = jnp.arange(self.task.frames, dtype=jnp.float32) < jnp.asarray(sample["length"])

        def worst(values: Array) -> Array:
            return jnp.max(jnp.where(there, values, 0.0))

        past: dict[str, list[Array]] = {}
        for each in (*self.task.observation, *self.task.action):
            values, slack = sample[each.name], STOP * (each.upper - each.lower if np.isfinite(each.upper - each.lower) else 1.0)
            over = worst(jnp.maximum(each.lower - slack - values, values - each.upper - slack))
            past.setdefault(f"{KINDS.get(each.units, each.units)} beyond their limits", []).append(jnp.maximum(over, 0.0))
        return {
            **{rule: jnp.stack(over).max() for rule, over in past.items()},
            "contact deeper than 1 mm, m": jnp.maximum(worst(sample["depth"]) - DEEPEST, 0.0),
            "energy from nowhere, J": worst(sample["gain"]),
            "difference when played again": sample["replay_error"],
        }

    # ------------------------------------------------------------ episodes

    def unroll(self, propose: Propose, condition: Condition, key: Array) -> Sample:
        """An episode: windows drawn one after the other, each from what came of the one before, then played again from its actions."""
        task, stride = self.task, self.stride
        start, world = jnp.asarray(condition["start"]), jnp.asarray(condition["world"])
        frames, seen_size, act_size = task.frames, len(task.observation), len(task.action)
        state_size = self._state_size
        shape = jax.ShapeDtypeStruct

        def called(function: Callable[..., Any], out: Any, *given: Array) -> Any:
            """The host's part, of all episodes of a tile at once."""
            return jax.pure_callback(function, out, *given, vmap_method="broadcast_all")

        state = called(self._begin, shape((state_size,), jnp.uint32), start, world)
        outs = (
            shape((state_size,), jnp.uint32),
            shape((LATEST, act_size), jnp.float32),
            shape((seen_size,), jnp.float32),
            shape((seen_size,), jnp.float32),
            shape((stride, act_size), jnp.float32),
            shape((stride, seen_size), jnp.float32),
        )
        first = jnp.asarray(condition["observation"])
        faults = jax.random.bits(jax.random.fold_in(key, frames), (), jnp.uint32)  # the seed of what the sensors tell wrongly
        sensed = called(self._sensed, shape((seen_size,), jnp.float32), first, faults, world)

        def unfinished(carry: tuple) -> Array:
            number, *_, kept = carry
            return (number < frames // stride) & (kept < task.hold)

        def step(carry: tuple) -> tuple:
            number, state, sent, before, sensed, actions, after, kept = carry
            window = propose({"observation": sensed, "world": world}, jax.random.fold_in(key, number))
            ways = jnp.stack([window[each.name] for each in task.planned], -1)[:stride]
            memory = (state, sent, before, faults, number * stride)
            state, sent, before, sensed, acted, then = called(self._advance, outs, *memory, ways, start, world)
            actions = jax.lax.dynamic_update_slice(actions, acted, (number * stride, 0))
            after = jax.lax.dynamic_update_slice(after, then, (number * stride, 0))
            for frame in range(stride):
                kept = jnp.where(kept >= task.hold, kept, jnp.where(task.off(then[frame]) <= 0, kept + 1, 0))
            return number + 1, state, sent, before, sensed, actions, after, kept

        zero = jnp.zeros((), jnp.int32)
        buffers = jnp.zeros((frames, act_size)), jnp.zeros((frames, seen_size))
        began = zero, state, jnp.zeros((LATEST, act_size)), first, sensed, *buffers, zero
        number, *_, actions, after, _ = jax.lax.while_loop(unfinished, step, began)
        wanted = (
            *[shape((frames, seen_size), jnp.float32)] * 2,
            *[shape((frames,), jnp.float32)] * 2,
            *[shape((), jnp.float32)] * 3,
        )
        return self._as_sample(called(self._again, wanted, actions, after, number * stride, faults, start, world), actions)

    def _as_sample(self, told: Sequence[Array], action: Array) -> Sample:
        """The outcome of episodes from what `told` tells of them, the error of the replay, and the actions `[..., frame, channel]`."""
        was, seen, depth, gain, length, success, error = told
        return {
            **{each.name: was[..., index] for index, each in enumerate(self.task.observation)},
            **{f"seen_{each.name}": seen[..., index] for index, each in enumerate(self.task.observation)},
            **{each.name: action[..., index] for index, each in enumerate(self.task.action)},
            "depth": depth,
            "gain": gain,
            "length": length,
            "success": success,
            "replay_error": error,
        }

    def _begin(self, start: np.ndarray, world: np.ndarray) -> np.ndarray:
        start, world, lead = _flat(start), _flat(world), np.shape(start)[:-1]
        return self._bits(self.scene.begin(start_from(self.task, start), world)).reshape(*lead, -1)

    def _sensed(self, seen: np.ndarray, faults: np.ndarray, world: np.ndarray) -> np.ndarray:
        """What sensors tell of the first observation."""
        sensors = worlds.Sensors(np.asarray(faults).reshape(-1)).tell(_flat(seen), _flat(world), self.task.observation, self.task.rate)
        return np.asarray(sensors.told, np.float32).reshape(np.shape(seen))

    def _advance(
        self,
        state: np.ndarray,
        sent: np.ndarray,
        before: np.ndarray,
        faults: np.ndarray,
        frame: np.ndarray,
        ways: np.ndarray,
        start: np.ndarray,
        world: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """The state, the line, what was told last and what is told now, the actions and what came of them."""
        lead = np.shape(start)[:-1]
        ways = np.asarray(ways, np.float64).reshape(-1, *np.shape(ways)[-2:])
        now = int(np.max(frame))  # of the episodes that still go on: what comes of the others, whose frame stands still, is not kept
        after, line, played = self.scene.advance(
            _flat(state).view(np.float64),
            np.asarray(sent).reshape(-1, *np.shape(sent)[-2:]),
            start_from(self.task, _flat(start)),
            _flat(world),
            lambda step, seen: self.task.track(ways[:, step], seen),
            self.stride,
            worlds.Sensors(np.asarray(faults).reshape(-1), now, _flat(before)),
        )
        parts = (self._bits(after), line, played.seen[:, -1], played.last_seen, played.action, played.after)
        return tuple(np.asarray(part).reshape((*lead, *part.shape[1:])) for part in parts)

    def _again(
        self, actions: np.ndarray, after: np.ndarray, played: np.ndarray, faults: np.ndarray, start: np.ndarray, world: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Plays the actions again, and tells by how much what then comes of them differs from what came of them the first time."""
        lead = np.shape(start)[:-1]
        actions, after = (np.asarray(part).reshape(-1, *np.shape(part)[-2:]) for part in (actions, after))
        last = np.asarray(played).reshape(-1)
        sensors = worlds.Sensors(np.asarray(faults).reshape(-1))
        again = self.scene.replay(start_from(self.task, _flat(start)), _flat(world), actions[:, : int(last.max())], sensors)
        there = np.arange(int(last.max()))[None, :, None] < last[:, None, None]
        error = np.abs(np.where(there, again.after - after[:, : int(last.max())], 0)).max((1, 2))
        return tuple(np.asarray(part, np.float32).reshape((*lead, *part.shape[1:])) for part in (*self.told(again), error))

    def told(self, played: Played) -> tuple[np.ndarray, ...]:
        """What was and what was sensed, depth, gain, length and success of episodes, which stand still from their length on."""
        length, success = reached(self.task, played.after)
        rows, rest = np.arange(self.task.frames)[None], self.task.frames - played.action.shape[1]
        told = ((played.observation, played.last), (played.seen, played.last_seen))
        until = np.minimum(rows, length[:, None])[..., None]
        was, seen = (np.take_along_axis(np.concatenate([part, last[:, None]], 1), until, 1) for part, last in told)
        depth, gain = (np.pad(part, ((0, 0), (0, rest))) * (rows < length[:, None]) for part in (played.depth, played.gain))
        length = np.where(success, length, self.task.frames)
        return was, seen, depth, gain, length.astype(np.float32), success.astype(np.float32)

    def as_sample(self, played: Played) -> Sample:
        """Episodes that were played, as the outcome that an answer holds, `[count, ...]`."""
        rest = self.task.frames - played.action.shape[1]
        action = np.pad(played.action, ((0, 0), (0, rest), (0, 0)))
        return self._as_sample((*self.told(played), np.zeros(len(action), np.float32)), action)

    @cached_property
    def _state_size(self) -> int:
        world = self.scene.world()[None]
        start = {name: values[:1] for name, values in self.task.draw(np.random.default_rng(0), 1, "narrow").items()}
        return self._bits(self.scene.begin(start, world)).shape[1]

    @staticmethod
    def _bits(state: np.ndarray) -> np.ndarray:
        """float64 as pairs of uint32, which JAX carries unchanged."""
        return np.ascontiguousarray(state, np.float64).view(np.uint32)

    # ------------------------------------------------------------ questions

    def ask(self, scenario: MotionScenario, folder: Path) -> Question:
        vector = self.scene.world({**(worlds.preset(scenario.world).values if scenario.world else {}), **scenario.parameters})
        start = self.task.draw(np.random.default_rng(scenario.seed), scenario.starts, scenario.region)
        question = self.question(start, np.repeat(vector[None], scenario.starts, 0), scenario.members, scenario.title)
        notes = [f"The world {scenario.world}: {worlds.preset(scenario.world).source}."] if scenario.world else []
        return dataclasses.replace(question, notes=notes)

    def question(self, start: Mapping[str, np.ndarray], world: np.ndarray, members: int, title: str, must: bool = True) -> Question:
        """Episodes from some starts in some worlds; where they `must` succeed, those that do not are drawn again."""
        vector = start_of(self.task, start)
        first = self.task.observe(self._placed(vector, world), start_from(self.task, vector)).astype(np.float32)
        condition = {"observation": first, "world": np.asarray(world, np.float32), "start": vector}
        coords: dict[str, Any] = {"episode": ("episode", np.arange(len(vector)), {"long_name": "number of the start"})}
        for name, variable in self.task.start.items():
            coords[f"start_{name}"] = (
                "episode",
                np.asarray(start[name], np.float32),
                {"units": variable.units, "long_name": variable.long_name},
            )
        for index, name in enumerate(worlds.NAMES):
            told = worlds.PARAMETERS[name]
            coords[f"world_{name}"] = ("episode", condition["world"][:, index], {"units": told.units, "long_name": told.long_name})
        misses = (lambda sample, _: 1.0 - jnp.asarray(sample["success"])) if must else None
        return Question(condition, members, coords, title, misses=misses, unroll=self.unroll)

    def _placed(self, start: np.ndarray, world: np.ndarray) -> Any:
        stepper = self.scene.stepper(world)
        stepper.place(self.task.place(start_from(self.task, start)))
        return stepper

    @cached_property
    def held_out(self) -> tuple[dict[str, np.ndarray], np.ndarray, Played]:
        """Wide starts, their worlds and the demonstrator's own episodes from there, none of which was learnt from."""
        start = self.task.draw(np.random.default_rng(EXAM_SEED), self.exam_starts, "wide")
        start = start_from(self.task, start_of(self.task, start))
        world = np.repeat(self.scene.world()[None], self.exam_starts, 0)
        return start, world, self.scene.play(start, world, lambda _, seen: self.task.demonstrate(seen))

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        start, world, played = self.held_out
        count = min(self.exam_starts, most or self.exam_starts)
        part = {name: values[:count] for name, values in start.items()}
        title = f"{self.name}: {count} wide starts that were not demonstrated"
        truth = {name: np.asarray(values)[:count] for name, values in self.as_sample(played).items()}
        return self.question(part, world[:count], members, title, must=False), truth

    # ------------------------------------------------------------ judges

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        return baselines.of(self)

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        return scores.judged(self, generated, truth)

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """None: an episode from another start than a demonstration's is not one of the demonstrations; copies are counted instead."""
        return None

    # ------------------------------------------------------------ what is delivered

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        realization = ("member", np.arange(len(next(iter(samples.values())))), {"standard_name": "realization", "units": "1"})
        coords = {**question.coords, "member": realization}
        told = self.outcome
        time = np.arange(self.task.frames) / self.task.rate
        coords["time_in_episode"] = ("frame", time.astype(np.float32), {"units": "s", "long_name": "time since the start"})
        return xr.Dataset(
            {
                name: (
                    ("member", "episode", *told[name].dims),
                    np.asarray(values),
                    {"units": told[name].units, "long_name": f"synthetic {told[name].long_name}"},
                )
                for name, values in samples.items()
            },
            coords,
        )

    def write(self, *, asked: Any, question: Question, dataset: xr.Dataset, folder: Path) -> None:
        results.write(self, asked, question, dataset, folder)

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        return results.summary(self, question, dataset)

    def sections(
        self, *, asked: Any, question: Question, dataset: xr.Dataset, rules: Mapping[str, Any], evaluation: Any
    ) -> Sequence[Section]:
        return results.sections(self, asked, question, dataset, rules, evaluation)

    def episodes(self, samples: Sample, condition: Condition, seed: int = 0, states: bool = False) -> list[Episode]:
        """Those of an answer `[member, episode, ...]` that reach their goal and keep every rule, up to it, as the sensors told them.

        Args:
          states: whether to play them again for the states of the simulator.
        """
        member, row = np.nonzero(self.holds(samples))
        seen = np.stack([np.asarray(samples[f"seen_{each.name}"])[member, row] for each in self.task.observation], -1)
        action = np.stack([np.asarray(samples[each.name])[member, row] for each in self.task.action], -1)
        length = np.asarray(samples["length"])[member, row].astype(int)
        start, world = (np.asarray(condition[name])[row] for name in ("start", "world"))
        passed: list[np.ndarray] = []
        for part in (slice(first, first + AT_ONCE) for first in range(0, len(row) if states else 0, AT_ONCE)):
            passed.extend(self.scene.states(start_from(self.task, start[part]), world[part], action[part, : length[part].max()]))
        return [
            Episode(
                seen[index, :size],
                action[index, :size],
                seed=seed,
                final=seen[index, size] if size < self.task.frames else None,
                states=passed[index][:size] if states else None,
                environment=worlds.named(world[index]),
            )
            for index, size in enumerate(length)
        ]

    @cached_property
    def _broken(self) -> Callable[[Sample], Mapping[str, Array]]:
        return jax.jit(jax.vmap(jax.vmap(lambda sample: self.check(sample, {}))))

    def holds(self, samples: Sample) -> np.ndarray:
        """Which episodes of an answer reach their goal and keep every rule, `[member, episode]`."""
        broken = self._broken({name: np.asarray(values) for name, values in samples.items()})
        kept = np.all([np.asarray(values) <= 0 for values in broken.values()], axis=0)
        return kept & (np.asarray(samples["success"]) > 0)


def _moments(values: np.ndarray, constant: float = 1.0) -> dict[str, np.ndarray]:
    """Mean and scale of each number; the scale of what never changes is `constant`."""
    scale = np.where(np.ptp(values, 0) > 0, values.std(0, np.float64), 0.0)  # rounding gives a constant a deviation, too
    mean = np.where(scale > 0, values.mean(0, np.float64), values[0])
    return {"mean": mean.astype(np.float32), "scale": np.where(scale > 1e-6, scale, constant).astype(np.float32)}


def _normalised(moments: Mapping[str, Array], values: Array) -> Array:
    return (values - moments["mean"]) / moments["scale"]


def _flat(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]))


if TYPE_CHECKING:  # the type checker proves that Motions keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Motions
