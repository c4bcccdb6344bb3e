"""The dynamics domain: what is seen of a robot and its task in the next control steps, given what is seen now and what will be done.

The truth is a mixture of episodes of the scripted demonstrator, gently and wildly wobbling, and of random actions in between. A generator
that has learnt it is a model of the world, which steps as the simulator does: see `imagined` and `planning`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr

from domains.robotics import dynamics_results
from domains.robotics.tasks import Channel, Played, Policy, Scene, Start, Task, wobbling
from twinsim import metrics
from twinsim import scenario as scenarios
from twinsim.base import (
    Array,
    BadInput,
    Baseline,
    Condition,
    Example,
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

MOTION, NOW, DONE = "motion", "now", "actions"
RIDGE = 1e-6  # of the linear baseline, in variances of a regressor
HORIZONS = (1, 5, 10, 20, 50)
STRIDE = 5  # control steps between the beginnings of two training examples


class DynamicsScenario(scenarios.Scenario):
    """A question to a world model.

    Attributes:
      starts: how many starts are drawn; `region`: where they lie, "narrow" or "wide".
      begin: numbers of the start that are given, by name; the others are drawn.
      actions: what is done, one action a control step, in the task's order; the last goes on until the window is full.
    """

    starts: int = pydantic.Field(default=10, ge=1, le=10_000)
    region: Literal["narrow", "wide"] = "wide"
    begin: dict[str, float] = pydantic.Field(default={}, max_length=32)
    actions: list[list[float]] = pydantic.Field(min_length=1, max_length=1000)


# ---------------------------------------------------------------- the truth


@dataclass(frozen=True, eq=False)
class Record:
    """Episodes to learn dynamics from, and as many others to be judged on.

    Attributes:
      seen: `[episode, frame + 1, channel]`; done: `[episode, frame, action]`.
      held_out: how many of them, the last ones, are the test.
      source: where they are from, for the report.
    """

    seen: np.ndarray
    done: np.ndarray
    held_out: int
    source: str
    licence: str = "CC0-1.0"


def mixed(
    task: Task, count: int = 200, held_out: int = 60, seed: int = 0, region: str = "wide", world: Mapping[str, float] | None = None
) -> Record:
    """Episodes of the demonstrator with a wobble of 0.25, with one of 1, and of random stretches in between, a third each, all whole."""
    if count < 3 or held_out < 3:
        raise BadInput(f"episodes of {task.name}: expected a count and a held_out of at least 3, got {count} and {held_out}")
    scene, noise, total = Scene(task), np.random.default_rng(seed), count + held_out
    vector = scene.world(world)
    parts: list[Played] = []
    policies: tuple[Policy, ...] = (wobbling(task, noise, 0.25), wobbling(task, noise, 1.0), _in_between(task, noise))
    for kind, policy in enumerate(policies):
        many = len(range(kind, total, len(policies)))
        parts.append(scene.play(task.draw(noise, many, region), np.repeat(vector[None], many, 0), policy))
    order = np.argsort(np.concatenate([np.arange(kind, total, len(policies)) for kind in range(len(policies))]))  # one of each in turn
    seen = np.concatenate([np.concatenate([part.observation, part.last[:, None]], 1) for part in parts])[order]
    source = f"a scripted demonstrator with wobbles of 0.25 and 1, and random actions in between, starts {region}, simulated by MuJoCo"
    return Record(seen, np.concatenate([part.action for part in parts])[order], held_out, source)


def _in_between(task: Task, noise: np.random.Generator) -> Policy:
    """Stretches of about ten control steps, by turns the demonstrator's and at random."""
    own = wobbling(task, noise, 0.25)
    lower, upper = bounds(task.action)
    random, strayed = np.zeros((0, 0)), np.zeros(0, bool)

    def policy(frame: int, observation: np.ndarray) -> np.ndarray:
        nonlocal random, strayed
        action = own(frame, observation)
        if len(random) != len(action):
            random, strayed = np.zeros(action.shape), np.zeros(len(action), bool)
        strayed = strayed ^ (noise.random(len(action)) < 0.1)
        random = 0.8 * random + 0.6 * 0.4 * (upper - lower) * noise.standard_normal(action.shape)
        return np.clip(np.where(strayed[:, None], random, action), lower, upper)

    return policy


def bounds(channels: Sequence[Channel]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each channel."""
    return np.array([each.lower for each in channels]), np.array([each.upper for each in channels])


# ---------------------------------------------------------------- the domain


class Normal(Protocol):
    """What a view on the system says of how it is normalised."""

    mean: Sequence[float]
    scale: Sequence[float]


@dataclass(frozen=True, eq=False)
class Dynamics:
    """What is seen after each of `window` control steps.

    Attributes:
      task: the robot and what it is to do.
      record: what is learnt from.
      window: control steps of an example.
      still: channels that never change in an episode, and are not predicted.
      view: normalises by its own mean and scale; None: by those of the training episodes.
    """

    name: str
    task: Task
    record: Record
    window: int = 50
    still: Sequence[str] = ()
    view: Normal | None = None

    Scenario: ClassVar[type[scenarios.Scenario]] = DynamicsScenario

    def __post_init__(self) -> None:
        frames = self.record.done.shape[1]
        if not 1 <= self.window <= frames:
            raise BadInput(f"{self.name}: window: expected 1 to {frames} control steps, got {self.window}")
        names = [each.name for each in self.task.observation]
        if unknown := sorted(set(self.still) - set(names)):
            raise BadInput(f"{self.name}: still: {unknown[0]}: expected some of {', '.join(names)}")
        if self.view is not None and len(self.view.mean) != len(self.moving):
            raise BadInput(f"{self.name}: view: expected one for {len(self.moving)} channels, got one for {len(self.view.mean)}")

    # ------------------------------------------------------------ what it is

    @cached_property
    def moving(self) -> np.ndarray:
        """Which channels of an observation are predicted."""
        return np.array([index for index, each in enumerate(self.task.observation) if each.name not in self.still])

    @property
    def channels(self) -> list[Channel]:
        return [self.task.observation[index] for index in self.moving]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.window, len(self.moving))

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {MOTION: Variable(("step", "channel"), "1", "what is seen after each action, in the units of its channels")}

    @property
    def condition(self) -> Mapping[str, Variable]:
        return {
            NOW: Variable(("channel",), "1", "what is seen before, in the units of its channels"),
            DONE: Variable(("step", "action"), "1", "what is done at each control step"),
        }

    @property
    def licence(self) -> str:
        return self.record.licence

    @property
    def limits(self) -> Sequence[str]:
        return dynamics_results.limits(self)

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        return ()

    @cached_property
    def scene(self) -> Scene:
        return Scene(self.task)

    # ------------------------------------------------------------ truth

    @cached_property
    def _seen(self) -> np.ndarray:
        return self.record.seen[..., self.moving].astype(np.float32)

    def rows(self, split: str) -> np.ndarray:
        """Episode and first control step of each stretch of a split, `[n, 2]`; those of the test do not overlap. Raises BadInput."""
        total, frames = self.record.done.shape[:2]
        episodes = {
            "train": range(total - self.record.held_out),
            "validation": range(0),
            "test": range(total - self.record.held_out, total),
        }
        if split not in episodes:
            raise BadInput(f"split {split}: expected train, validation or test")
        every = STRIDE if split == "train" else self.window
        found = [(episode, first) for episode in episodes[split] for first in range(0, frames - self.window + 1, every)]
        return np.array(found, int).reshape(-1, 2)

    def source(self, split: str) -> Source:
        return Rows(self._recorded, self.rows(split))

    def _recorded(self, rows: np.ndarray) -> tuple[Sample, Condition]:
        episode, steps = rows[:, :1], rows[:, 1:] + np.arange(self.window)
        now = self._seen[rows[:, 0], rows[:, 1]]
        return {MOTION: self._seen[episode, steps + 1]}, {NOW: now, DONE: self.record.done[episode, steps].astype(np.float32)}

    # ------------------------------------------------------------ one stretch <-> one example

    def fit(self) -> Statistics:
        """How things are normalised, and the linear model of one control step: ridge on what is seen and done."""
        train = len(self.record.seen) - self.record.held_out
        seen, done = self._seen[:train].astype(np.float64), self.record.done[:train].astype(np.float64)
        if self.view is None:
            mean, scale = seen.mean((0, 1)), np.maximum(seen.std((0, 1)), 1e-6)
        else:
            mean, scale = np.asarray(self.view.mean, np.float64), np.asarray(self.view.scale, np.float64)
        x, y = (seen[:, :-1] - mean) / scale, (seen[:, 1:] - seen[:, :-1]) / scale
        regressors = np.concatenate([x, done, np.ones((*x.shape[:2], 1))], -1).reshape(-1, x.shape[-1] + done.shape[-1] + 1)
        gram = regressors.T @ regressors
        linear = np.linalg.solve(gram + RIDGE * np.diag(np.diag(gram) + 1e-9), regressors.T @ y.reshape(len(regressors), -1))
        return {"mean": _float(mean), "scale": _float(scale), "linear": _float(linear)}

    def spec(self, statistics: Statistics | None = None) -> Spec:
        return Spec((self.window,), len(self.moving), len(self.task.action), len(self.moving), (False,))

    def examples(self, statistics: Statistics) -> Iterator[Example]:
        rows = self.rows("train")
        for part in np.array_split(rows, max(1, len(rows) // 1024)):
            sample, condition = self._recorded(part)
            mean, scale = np.asarray(statistics["mean"]), np.asarray(statistics["scale"])
            target, now = ((np.asarray(values) - mean) / scale for values in (sample[MOTION], condition[NOW]))
            yield Example(target.astype(np.float32), np.asarray(condition[DONE]), now.astype(np.float32))

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        return jnp.asarray(condition[DONE]), (jnp.asarray(condition[NOW]) - statistics["mean"]) / statistics["scale"]

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        scale, mean = (jnp.broadcast_to(statistics[name], self.shape) for name in ("scale", "mean"))
        return {MOTION: jnp.asarray(target) * scale + mean}

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: the generator is the simulator."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        """Whether channels keep their bounds, up to a fiftieth of their range."""
        values = jnp.asarray(sample[MOTION])
        broken: dict[str, list[Array]] = {}
        for index, each in enumerate(self.channels):
            if np.isfinite(each.lower) and np.isfinite(each.upper):
                slack = 0.02 * (each.upper - each.lower)
                over = jnp.maximum(each.lower - values[:, index], values[:, index] - each.upper).max() - slack
                broken.setdefault(f"channels in {each.units} beyond their bounds", []).append(jnp.maximum(over, 0.0))
        found = {rule: jnp.stack(over).max() for rule, over in broken.items()}
        return found or {"numbers that are not finite": (~jnp.isfinite(values)).sum().astype(jnp.float32)}

    # ------------------------------------------------------------ questions

    def ask(self, scenario: DynamicsScenario, folder: Path) -> Question:
        where = f"scenario {scenario.title!r}"
        task, size = self.task, len(self.task.action)
        if wrong := [action for action in scenario.actions if len(action) != size]:
            told = ", ".join(f"{each.name} {each.lower:g} to {each.upper:g}" for each in task.action)
            raise BadInput(f"{where}: actions: expected {size} numbers each, {told}, got {wrong[0]}")
        if len(scenario.actions) > self.window:
            raise BadInput(f"{where}: actions: expected at most {self.window}, got {len(scenario.actions)}")
        done = np.array(scenario.actions, np.float32)
        lower, upper = bounds(task.action)
        if ((done < lower) | (done > upper)).any():
            step, index = np.argwhere((done < lower) | (done > upper))[0]
            each = task.action[index]
            raise BadInput(
                f"{where}: actions: {each.name}: expected {each.lower:g} to {each.upper:g}, got {done[step, index]:g} at step {step}"
            )
        done = np.concatenate([done, np.repeat(done[-1:], self.window - len(done), 0)])
        start = task.draw(np.random.default_rng(scenario.seed), scenario.starts, scenario.region)
        for name, value in scenario.begin.items():
            if name not in start:
                raise BadInput(f"{where}: begin: {name}: expected some of {', '.join(start)}")
            start[name] = np.full(scenario.starts, value)
        now = self.at_rest(start)[:, self.moving].astype(np.float32)
        condition = {NOW: now, DONE: np.repeat(done[None], len(now), 0)}
        return Question(condition, scenario.members, self._coords(len(now)), scenario.title)

    def at_rest(self, start: Start) -> np.ndarray:
        """What is seen when episodes start, all channels, `[count, channel]`."""
        count = len(next(iter(start.values())))
        stepper = self.scene.stepper(np.repeat(self.scene.world()[None], count, 0))
        stepper.place(self.task.place(start))
        return self.task.observe(stepper, start)

    def _coords(self, count: int) -> dict[str, Any]:
        time = (np.arange(self.window) + 1) / self.task.rate
        return {
            "case": ("case", np.arange(count), {"long_name": "number of the case"}),
            "channel": ("channel", [each.name for each in self.channels]),
            "unit": ("channel", [each.units for each in self.channels]),
            "lead": ("step", time.astype(np.float32), {"units": "s", "long_name": "time since what is seen before"}),
        }

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        """Stretches of the held-out episodes; at most `most`, evenly spaced."""
        rows = self.rows("test")
        if most and len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        truth, condition = self._recorded(rows)
        return Question(condition, members, self._coords(len(rows)), f"{self.name}: {len(rows)} stretches of held-out episodes"), truth

    # ------------------------------------------------------------ judges

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        return {"no motion": self._rest, "linear": self._linear(statistics)}

    def _rest(self, condition: Condition, members: int, seed: int) -> Sample:
        """All stays as it is."""
        now = np.asarray(condition[NOW])
        return {MOTION: np.broadcast_to(now[None, :, None], (members, len(now), *self.shape)).astype(np.float32)}

    def _linear(self, statistics: Statistics) -> Baseline:
        mean, scale, linear = (np.asarray(statistics[name], np.float64) for name in ("mean", "scale", "linear"))

        def draw(condition: Condition, members: int, seed: int) -> Sample:
            state, done, found = (np.asarray(condition[NOW]) - mean) / scale, np.asarray(condition[DONE]), []
            for step in range(self.window):
                state = state + np.concatenate([state, done[:, step], np.ones((len(state), 1))], 1) @ linear
                found.append(state * scale + mean)
            return {MOTION: np.broadcast_to(np.stack(found, 1), (members, len(state), *self.shape)).astype(np.float32)}

        return draw

    @cached_property
    def groups(self) -> dict[str, list[int]]:
        """Channels of one thing, as `puck_x` and `puck_y`, by its name."""
        found: dict[str, list[int]] = {}
        for index, each in enumerate(self.channels):
            name = each.name.removesuffix("_x").removesuffix("_y").removesuffix("_z")
            found.setdefault("".join(letter for letter in name if not letter.isdigit()), []).append(index)
        return found

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        """Distance of the members' mean from the truth after some control steps, and the CRPS, for each thing that moves."""
        drawn, true = np.asarray(generated[MOTION], np.float64), np.asarray(truth[MOTION], np.float64)
        table: dict[str, Score] = {}
        curves: dict[str, np.ndarray] = {}
        block = max(1, self.record.done.shape[1] // self.window)  # stretches of one episode
        for name, which in self.groups.items():
            units = self.channels[which[0]].units
            error = np.linalg.norm((drawn.mean(0) - true)[..., which], axis=-1)
            curves[f"error/{name}"] = error.mean(0)
            for step in self.horizons:
                table[f"{name}: error after {step}"] = metrics.interval(error[:, step - 1], block=block, units=units)
            for step in self.horizons:
                crps = metrics.crps(drawn[:, :, step - 1, which], true[:, step - 1, which])
                table[f"{name}: CRPS after {step}"] = metrics.interval(crps, block=block, units=units)
        return Scores(table, curves)

    @property
    def horizons(self) -> tuple[int, ...]:
        return tuple(step for step in HORIZONS if step <= self.window) or (self.window,)

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """None: what follows from given actions is the same whether or not it was learnt from."""
        return None

    # ------------------------------------------------------------ what is delivered

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        variable, values = self.sample[MOTION], np.asarray(samples[MOTION])
        attrs = {"units": variable.units, "long_name": f"synthetic {variable.long_name}"}
        coords = {**question.coords, "member": ("member", np.arange(len(values)), {"standard_name": "realization", "units": "1"})}
        return xr.Dataset({MOTION: (("member", "case", "step", "channel"), values, attrs)}, coords)

    def write(self, **_: Any) -> None:
        """Nothing: Zarr and NetCDF are all there is."""

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        return dynamics_results.summary(self, dataset)

    def sections(
        self, *, asked: Any, question: Question, dataset: xr.Dataset, rules: Mapping[str, Any], evaluation: Any
    ) -> Sequence[Section]:
        return dynamics_results.sections(self, asked, dataset)


def _float(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


if TYPE_CHECKING:  # the type checker proves that Dynamics keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Dynamics
