"""Traffic and air as sensors see them: windows of sensor by time, drawn given any part of them, the weekday, the hour and the weather.

One model serves forecasts (the past is given), gaps and lost sensors (what is left is given) and synthetic days (nothing is given): while
training, each window is shown through a random mask. What the generator learns is the remainder of two fits of the training split:
a mean and spread that follow hour, kind of day, season and weather (out of fold), in scores of each sensor; and of a Gaussian
model of the anomalies given the shown cells (`kriging`), which carries persistence and neighbourhood. A silent network draws exactly that
Gaussian model. A cell that was not measured enters no fit, no loss and no score: the target holds a draw of the Gaussian model there.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr
from scipy.stats import norm

from domains.city import kriging
from twinsim import metrics
from twinsim import scenario as scenarios
from twinsim.base import (
    Array,
    BadInput,
    Baseline,
    Condition,
    Constraint,
    Example,
    Observation,
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

Task = Literal["forecast", "gaps", "sensors", "none"]
TASKS: tuple[Task, ...] = ("forecast", "gaps", "sensors", "none")
SENSOR = "sensor"
LEVELS = 400  # quantiles of a normal-score table
SECTORS = 12  # of the wind's direction
SEASON = 365.25
LEAST_SPREAD = 0.2  # of a sensor's mean spread: at no hour is less expected
MOST_WINDOWS = 2000  # in one scenario
KEPT_TIMES = 3.0  # standard errors within which an observation counts as kept


@dataclass(frozen=True)
class Quantity:
    """What is measured: one variable of the record.

    Attributes:
      within: another quantity of which this one is a part, and so never above it (NO2 of NOx).
    """

    units: str
    long_name: str
    lower: float = 0.0
    upper: float = np.inf
    within: str | None = None

    def variable(self, dims: tuple[str, ...]) -> Variable:
        return Variable(dims, self.units, self.long_name, "", self.lower, self.upper)


@dataclass(frozen=True)
class Calendar:
    """What the mean and the spread follow.

    Attributes:
      knots: of the hour of the day, between which they are linear.
      kinds_of_day: weekdays (Monday is 0) that are alike.
      season: let them follow the day of the year, and the hour's part in it.
      wind: let them follow `wind_from` and `wind_speed` of the record.
      penalty: of the ridge regression, in time steps.
    """

    knots: int = 72
    kinds_of_day: Sequence[Sequence[int]] = ((0, 1, 2, 3, 4), (5, 6))
    season: bool = False
    wind: bool = False
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if sorted(day for kind in self.kinds_of_day for day in kind) != list(range(7)):
            raise BadInput(f"calendar: kinds_of_day: expected each weekday 0 to 6 once, got {self.kinds_of_day}")
        if self.knots < 2 or self.penalty <= 0:
            raise BadInput(f"calendar: expected at least 2 knots and a positive penalty, got {self.knots} and {self.penalty}")

    def variables(self) -> dict[str, Variable]:
        named = {
            "hour": Variable(("time",), "h", "hour of the day", "", 0.0, 24.0),
            "kind_of_day": Variable(("time",), "1", "kind of day, in the order of the configuration"),
            "day_of_year": Variable(("time",), "day", "day of the year, 0 at its start"),
        }
        if self.wind:
            named["wind_from"] = Variable(("time",), "degree", "direction the wind comes from", "wind_from_direction", 0.0, 360.0)
            named["wind_speed"] = Variable(("time",), "m s-1", "wind speed", "wind_speed", 0.0)
        return named

    def of(self, times: np.ndarray) -> dict[str, np.ndarray]:
        """The calendar of times `[...]`."""
        day = times.astype("datetime64[D]")
        weekday = (day.astype(int) + 3) % 7  # 1970-01-01 was a Thursday
        kind = np.array([next(i for i, days in enumerate(self.kinds_of_day) if each in days) for each in range(7)])
        hour = (times - day) / np.timedelta64(1, "h")
        year = (day - times.astype("datetime64[Y]")) / np.timedelta64(1, "D")
        named = {"hour": hour, "kind_of_day": kind[weekday], "day_of_year": year}
        return {name: values.astype(np.float32) for name, values in named.items()}

    def features(self, condition: Condition) -> Array:
        """What mean and spread are linear in, `[..., feature]`, of conditions `[...]`; works on numpy and JAX arrays."""
        hour = _hats(jnp.asarray(condition["hour"]) / 24.0, self.knots)
        kinds = np.arange(len(self.kinds_of_day), dtype=np.float32)
        kind = jnp.asarray(condition["kind_of_day"])[..., None]
        parts = [jnp.where(jnp.abs(kind - value) < 0.5, hour, 0.0) for value in kinds]
        if self.season:
            phase = 2 * np.pi * jnp.asarray(condition["day_of_year"]) / SEASON
            waves = [wave(times * phase)[..., None] for times in (1.0, 2.0) for wave in (jnp.cos, jnp.sin)]
            few = _hats(jnp.asarray(condition["hour"]) / 24.0, 8)
            parts += [*waves, few * jnp.broadcast_to(waves[0], few.shape), few * jnp.broadcast_to(waves[1], few.shape)]
        if self.wind:
            speed = jnp.log(jnp.maximum(jnp.asarray(condition["wind_speed"]), 0.5))[..., None]
            sector = _hats(jnp.asarray(condition["wind_from"]) / 360.0, SECTORS)
            parts += [sector, sector * jnp.broadcast_to(speed, sector.shape), speed, speed**2]
        return jnp.concatenate(parts, axis=-1)


def _hats(turn: jax.Array, knots: int) -> jax.Array:
    """Weights of equally spaced knots of something that goes round once in a unit, linear between them, `[..., knot]`."""
    away = (turn * knots)[..., None] - jnp.broadcast_to(jnp.arange(knots, dtype=jnp.float32), (*turn.shape, knots))
    around = jnp.abs(away - knots * jnp.round(away / knots))
    return jnp.maximum(1.0 - around, 0.0)


@dataclass(frozen=True, eq=False)
class Sensors:
    """A twin of a city's sensors.

    Attributes:
      dataset: the record (see `records`), with one variable a quantity: `[time, sensor]`, or several of `[time]`, each a sensor.
      window: time steps of a sample; `past`: of them, given in a forecast; `stride`: steps between the starts of training windows.
      test_share: the last part of the record, kept for judging.
      practice: share of the tasks among training windows; `exam`: the task that is judged.
      gaussian: share of a sensor's normal score in what is fitted, the rest is the standardised value itself: a jam is a long way from
        free flow then, though few values lie between.
      factors, modes: of the Gaussian model, in space and in time.
      leads: steps ahead whose error is told of a forecast.
      folds, fold_steps: for the out-of-fold mean, pieces of so many steps that follow one another belong to so many folds in turn.
      aligned: steps of which a window's first is a multiple, such as those of a day.
    """

    name: str
    dataset: xr.Dataset
    quantities: Mapping[str, Quantity]
    calendar: Calendar = field(default_factory=Calendar)
    window: int = 24
    past: int = 12
    stride: int = 3
    aligned: int = 1
    test_share: float = 0.2
    practice: Mapping[str, float] = field(default_factory=lambda: {"forecast": 0.5, "gaps": 0.2, "sensors": 0.2, "none": 0.1})
    exam_task: Task = "forecast"
    gaussian: float = 0.75
    factors: int = 12
    modes: int = 8
    leads: Sequence[int] = ()
    folds: int = 6
    fold_steps: int = 288

    def __post_init__(self) -> None:
        for name in self.quantities:
            if name not in self.dataset:
                raise BadInput(f"{self.name}: {name}: not in the record, which has {', '.join(map(str, self.dataset.data_vars))}")
            if self.dataset[name].dims not in (("time",), ("time", SENSOR)):
                raise BadInput(f"{self.name}: {name}: expected dims (time) or (time, sensor), got {self.dataset[name].dims}")
        for quantity in self.quantities.values():
            if quantity.within is not None and quantity.within not in self.quantities:
                raise BadInput(f"{self.name}: within: expected one of {', '.join(self.quantities)}, got {quantity.within!r}")
        if len({self.dataset[name].dims for name in self.quantities}) > 1 or (self.along_sensors and len(self.quantities) > 1):
            raise BadInput(f"{self.name}: expected one quantity of (time, sensor), or some of (time), got {', '.join(self.quantities)}")
        if not (0 < self.past < self.window and self.stride > 0 and self.aligned > 0 and 0 < self.test_share < 1):
            raise BadInput(
                f"{self.name}: expected 0 < past < window, a positive stride and 0 < test_share < 1, got {self.past}, {self.window}, "
                f"{self.stride}, {self.test_share}"
            )
        if not (1 <= self.modes <= self.window and self.factors >= 1):
            raise BadInput(f"{self.name}: expected 1 to {self.window} modes and at least 1 factor, got {self.modes} and {self.factors}")
        if unknown := [task for task in (*self.practice, self.exam_task) if task not in TASKS]:
            raise BadInput(f"{self.name}: task {unknown[0]!r}: expected one of {', '.join(TASKS)}")
        if not self.practice or min(self.practice.values()) < 0 or sum(self.practice.values()) <= 0:
            raise BadInput(f"{self.name}: practice: expected shares of tasks that are not negative, got {dict(self.practice)}")
        if any(not 1 <= lead <= self.window - self.past for lead in self.leads):
            raise BadInput(f"{self.name}: leads: expected steps from 1 to {self.window - self.past}, got {list(self.leads)}")
        if self.calendar.wind:
            for name in ("wind_speed", "wind_from"):
                if name not in self.dataset or not np.isfinite(self.dataset[name].values).all():
                    raise BadInput(f"{self.name}: {name}: expected a value at every time of the record, found none or a gap")
        for split in ("train", "test"):
            if len(self.starts(split)) < 4:
                raise BadInput(f"{self.name}: split {split}: expected room for 4 windows of {self.window} steps, got {self._rows(split)}")
        empty = ~self.measured[: self._border].any(0)
        if empty.any():
            raise BadInput(
                f"{self.name}: sensor {self.sensors[int(np.argmax(empty))]}: expected values in the training split, all are missing"
            )

    # ------------------------------------------------------------ the record

    @property
    def along_sensors(self) -> bool:
        return self.dataset[next(iter(self.quantities))].ndim == 2

    @cached_property
    def sensors(self) -> list[str]:
        """Names of the rows of a stacked window: sensors, or quantities measured at one place."""
        return [str(name) for name in self.dataset[SENSOR].values] if self.along_sensors else list(self.quantities)

    @cached_property
    def values(self) -> np.ndarray:
        """The whole record, NaN where nothing was measured, `[time, sensor]`."""
        columns = [self.dataset[name].values for name in self.quantities]
        return (columns[0] if self.along_sensors else np.stack(columns, 1)).astype(np.float32)

    @cached_property
    def measured(self) -> np.ndarray:
        return np.isfinite(self.values)

    @property
    def times(self) -> np.ndarray:
        return self.dataset["time"].values.astype("datetime64[ns]")

    @property
    def step(self) -> np.timedelta64:
        return self.times[1] - self.times[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sensors), self.window) if self.along_sensors else (self.window,)

    @property
    def dims(self) -> tuple[str, ...]:
        return (SENSOR, "time") if self.along_sensors else ("time",)

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {name: quantity.variable(self.dims) for name, quantity in self.quantities.items()}

    @property
    def condition(self) -> Mapping[str, Variable]:
        """The calendar and the weather; per quantity what is given, where it is given, and where truth was measured (1) or filled (0)."""
        named = self.calendar.variables()
        for name, quantity in self.quantities.items():
            named[f"given_{name}"] = Variable(self.dims, quantity.units, f"given {quantity.long_name}, 0 where none is given")
            named[f"is_given_{name}"] = Variable(self.dims, "1", f"whether {quantity.long_name} is given")
            named[f"measured_{name}"] = Variable(self.dims, "1", f"whether {quantity.long_name} was measured; judged only there")
        return named

    @cached_property
    def _border(self) -> int:
        """The first step of the test split."""
        return int(len(self.values) * (1 - self.test_share))

    def _rows(self, split: str) -> range:
        if split not in ("train", "test", "validation"):
            raise BadInput(f"split {split}: expected train, validation or test")
        return {"train": range(self._border), "test": range(self._border, len(self.values)), "validation": range(0)}[split]

    def starts(self, split: str) -> np.ndarray:
        """First steps of the windows of a split, which lie in it whole."""
        rows = self._rows(split)
        first = -(-rows.start // self.aligned) * self.aligned
        return np.arange(first, rows.stop - self.window + 1, int(np.lcm(self.stride, self.aligned)))

    def stack(self, sample: Mapping[str, Array], prefix: str = "") -> Array:
        """Values by name as `[..., sensor, time]`."""
        if self.along_sensors:
            return jnp.asarray(sample[prefix + next(iter(self.quantities))])
        return jnp.stack([jnp.asarray(sample[prefix + name]) for name in self.quantities], axis=-2)

    def unstack(self, values: Array, prefix: str = "") -> dict[str, Array]:
        """The inverse of `stack`."""
        if self.along_sensors:
            return {prefix + next(iter(self.quantities)): values}
        return {prefix + name: values[..., row, :] for row, name in enumerate(self.quantities)}

    def source(self, split: str) -> Source:
        return Rows(self._recorded, self.starts(split))

    def _recorded(self, starts: np.ndarray) -> tuple[Sample, Condition]:
        """Recorded windows, each with a part of it given."""
        return self.samples(starts), self.conditions(starts, self.shown(starts, "practice"))

    def windows(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Recorded windows `[n, sensor, time]`, filled by the calendar's usual value where nothing was measured, and where it was."""
        rows = starts[:, None] + np.arange(self.window)
        values, measured = (np.swapaxes(of[rows], 1, 2) for of in (self.values, self.measured))
        if not measured.all():
            usual = self._restored(self._fill, self._expected(self._fill, self.conditions_of(starts))[0])
            values = np.where(measured, values, self._consistent(np.array(usual), measured, values))
        return values.astype(np.float32), measured

    @cached_property
    def _fill(self) -> Statistics:
        """Tables and regressions, by which gaps are filled."""
        return self._usual_fit[0]

    def _consistent(self, usual: np.ndarray, measured: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Usual values `[n, sensor, time]` between the parts and wholes that were measured."""
        for name, quantity in self.quantities.items():
            if quantity.within is not None and not self.along_sensors:
                part, whole = self.sensors.index(name), self.sensors.index(quantity.within)
                known = lambda row: np.where(measured[:, row], values[:, row], usual[:, row])  # noqa: E731
                usual[:, part] = np.minimum(usual[:, part], known(whole))
                usual[:, whole] = np.maximum(usual[:, whole], known(part))
        return usual

    def samples(self, starts: np.ndarray) -> Sample:
        return self.unstack(self.windows(starts)[0])

    def conditions_of(self, starts: np.ndarray) -> dict[str, Array]:
        """Calendar and weather of recorded windows, `[n, time]`."""
        rows = starts[:, None] + np.arange(self.window)
        named: dict[str, Array] = dict(self.calendar.of(self.times[rows]))
        if self.calendar.wind:
            named |= {name: self.dataset[name].values[rows].astype(np.float32) for name in ("wind_from", "wind_speed")}
        return named

    def conditions(self, starts: np.ndarray, shown: np.ndarray) -> Condition:
        """Conditions of recorded windows of which the cells `shown` `[n, sensor, time]` are given, as far as they were measured."""
        values, measured = self.windows(starts)
        given = (shown & measured).astype(np.float32)
        named = self.conditions_of(starts)
        named |= self.unstack(given * values, "given_") | self.unstack(given, "is_given_")
        return named | self.unstack(measured.astype(np.float32), "measured_")

    def shown(self, starts: np.ndarray, task: str, seed: int = 0, share: float | None = None, without: Sequence[str] = ()) -> np.ndarray:
        """Which cells of each window a task shows, `[n, sensor, time]`; the same for a window whatever it is asked with.

        Args:
          task: "forecast": the first `past` steps; "gaps": single cells are hidden, and runs of an hour and more; "sensors": some are
            hidden whole; "none": nothing is shown; "practice": one of them for each window.
          share: of what is hidden; random from 0.1 to 0.9 where it is left out (of sensors: to 0.5).
          without: sensors hidden besides.
        """
        out = np.zeros((len(starts), len(self.sensors), self.window), bool)
        tasks = list(self.practice)
        weights = np.array([self.practice[name] for name in tasks], float)
        for row, start in enumerate(starts):
            draw = np.random.default_rng([seed, int(start)])
            of = tasks[draw.choice(len(tasks), p=weights / weights.sum())] if task == "practice" else task
            if of == "forecast":
                out[row, :, : self.past] = True
            elif of == "gaps":
                hidden = draw.uniform(0.1, 0.9) if share is None else share
                run = int(draw.integers(1, self.past + 1))
                blocks = draw.random((len(self.sensors), -(-self.window // run) + 1)) >= hidden
                out[row] = np.repeat(blocks, run, axis=1)[:, draw.integers(0, run) :][:, : self.window]
            elif of == "sensors":
                hidden = draw.uniform(0.1, 0.5) if share is None else share
                count = min(max(1, round(hidden * len(self.sensors))), len(self.sensors))
                out[row, draw.permutation(len(self.sensors))[count:]] = True
        out[:, [self.sensors.index(name) for name in without]] = False
        return out

    # ------------------------------------------------------------ statistics

    def fit(self) -> Statistics:
        statistics, anomaly = dict(self._usual_fit[0]), self._usual_fit[1]
        seen = self.measured[: self._border]
        factors = min(self.factors, len(self.sensors))
        statistics["kriging"] = kriging.fit(anomaly, seen, self.starts("train"), self.window, factors, self.modes)
        return statistics

    @cached_property
    def _usual_fit(self) -> tuple[dict[str, Any], np.ndarray]:
        """Normal-score tables, regressions of mean and spread; and the training split's anomalies out of fold, `[time, sensor]`."""
        values, seen = self.values[: self._border], self.measured[: self._border]
        tables = np.stack([_table(values[seen[:, i], i]) for i in range(values.shape[1])])
        standard = (tables - tables.mean(1, keepdims=True)) / (tables.std(1, keepdims=True) + 1e-6)
        levels = self.gaussian * norm.ppf((np.arange(LEVELS) + 0.5) / LEVELS) + (1 - self.gaussian) * standard
        statistics: dict[str, Any] = {"levels": levels.astype(np.float32), "tables": tables.astype(np.float32)}
        scores = np.where(seen, np.asarray(self._scored(statistics, np.where(seen, values, 0.0).T)).T, 0.0)
        design = np.asarray(self.calendar.features(self._calendar_of_record(slice(0, self._border))), np.float64)
        fold = np.arange(self._border) // self.fold_steps % self.folds
        coefficients, expected = _ridge(design, scores, seen, fold, self.calendar.penalty)
        residual = np.where(seen, scores - expected, 0.0)
        spread, _ = _ridge(design, residual**2, seen, fold, self.calendar.penalty)
        floor = LEAST_SPREAD**2 * (residual**2).sum(0) / seen.sum(0) + 1e-6
        statistics["mean"], statistics["variance"] = coefficients.astype(np.float32), spread.astype(np.float32)
        statistics["least_variance"] = floor.astype(np.float32)
        wide = np.sqrt(np.maximum(_applied(design, spread), floor))
        return statistics, np.where(seen, residual / wide, 0.0).astype(np.float32)

    def _calendar_of_record(self, rows: slice) -> Condition:
        named: dict[str, Array] = dict(self.calendar.of(self.times[rows]))
        if self.calendar.wind:
            named |= {name: self.dataset[name].values[rows].astype(np.float32) for name in ("wind_from", "wind_speed")}
        return named

    def _scored(self, statistics: Statistics, values: Array) -> Array:
        """Values as scores, each sensor by its own table, `[..., sensor, time]`."""
        of_sensor = jax.vmap(jnp.interp, (-2, 0, 0), -2)
        return of_sensor(jnp.asarray(values, jnp.float32), jnp.asarray(statistics["tables"]), jnp.asarray(statistics["levels"]))

    def _restored(self, statistics: Statistics, scores: Array) -> Array:
        """The inverse of `_scored`; beyond the table its ends."""
        of_sensor = jax.vmap(jnp.interp, (-2, 0, 0), -2)
        return of_sensor(jnp.asarray(scores), jnp.asarray(statistics["levels"]), jnp.asarray(statistics["tables"]))

    def _expected(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        """Mean and spread of the scores that calendar and weather tell, `[..., sensor, time]`."""
        features = self.calendar.features(condition)
        features = jnp.concatenate([features, jnp.ones((*features.shape[:-1], 1))], -1)
        mean, variance = (jnp.einsum("...tf,fi->...it", features, jnp.asarray(statistics[name])) for name in ("mean", "variance"))
        floor = jnp.broadcast_to(jnp.asarray(statistics["least_variance"])[:, None], variance.shape)
        return mean, jnp.sqrt(jnp.maximum(variance, floor))

    # ------------------------------------------------------------ one sample <-> one example

    def spec(self, statistics: Statistics | None = None) -> Spec:
        factors = min(self.factors, len(self.sensors))
        scalars = factors * self.modes + factors + self._few + 2 + len(self.calendar.kinds_of_day) + 2 * self.calendar.season
        return Spec((1,), factors * self.modes + len(self.sensors) * self.window, 0, scalars, (False,))

    @property
    def _few(self) -> int:
        """Modes by which the net is told when cells are given."""
        return min(self.modes, 6)

    def examples(self, statistics: Statistics, split: str = "train", block: int = 64) -> Iterator[Example]:
        starts = self.starts(split)
        if split == "train":
            anomaly = self._usual_fit[1]
        each = lambda statistics, *parts: jax.lax.map(lambda one: self._example(statistics, *one), parts)  # noqa: E731
        encode = jax.jit(each)  # one after the other: the matrices of one stay in the cache
        for first in range(0, len(starts), block):
            some = starts[first : first + block]
            condition = self.conditions(some, self.shown(some, "practice"))
            rows = some[:, None] + np.arange(self.window)
            measured = np.swapaxes(self.measured[rows], 1, 2).astype(np.float32)
            out_of_fold = np.swapaxes(anomaly[rows], 1, 2) if split == "train" else self._anomaly(statistics, condition, some)
            keys = jax.vmap(jax.random.key)(jnp.asarray(some))
            yield jax.tree.map(np.asarray, encode(statistics, condition, out_of_fold, measured, keys))

    def _anomaly(self, statistics: Statistics, condition: Condition, starts: np.ndarray) -> np.ndarray:
        """Scaled anomalies of recorded windows, `[n, sensor, time]`."""
        mean, spread = self._expected(statistics, condition)
        return np.asarray((self._scored(statistics, self.windows(starts)[0]) - mean) / spread)

    def _example(self, statistics: Statistics, condition: Condition, anomaly: Array, measured: Array, key: jax.Array) -> Example:
        given = self.stack(condition, "is_given_")
        told = kriging.posterior(statistics["kriging"], given * anomaly, given)
        u, epsilon = kriging.to_noise(statistics["kriging"], told, anomaly, measured, key)
        target = jnp.concatenate([u, epsilon.ravel()])[None]
        return Example(target, jnp.zeros((1, 0)), self._scalars(statistics, condition, told, given))

    def _scalars(self, statistics: Statistics, condition: Condition, told: kriging.Posterior, given: Array) -> Array:
        """What the given cells tell of the factors, when they are, and what calendar and weather make of the whole window."""
        model = statistics["kriging"]
        usual = jnp.asarray(model["patterns"]).T @ self._expected(statistics, condition)[0].mean(-1) / np.sqrt(len(self.sensors))
        when = jnp.asarray(model["basis"])[:, : self._few].T @ given.mean(0) / np.sqrt(self.window)
        hour = 2 * jnp.pi * jnp.asarray(condition["hour"])[self.past] / 24.0
        kinds = jnp.arange(len(self.calendar.kinds_of_day), dtype=jnp.float32)
        kind = (jnp.abs(kinds - jnp.asarray(condition["kind_of_day"])[self.past]) < 0.5).astype(jnp.float32)
        parts = [told.mean, usual, when, jnp.stack([jnp.cos(hour), jnp.sin(hour)]), kind]
        if self.calendar.season:
            phase = 2 * jnp.pi * jnp.asarray(condition["day_of_year"])[0] / SEASON
            parts.append(jnp.stack([jnp.cos(phase), jnp.sin(phase)]))
        return jnp.concatenate(parts)

    def _told(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array, Array, Array, kriging.Posterior]:
        """Given mask and anomalies, mean and spread `[sensor, time]`, and the factors' posterior, of one condition."""
        given = self.stack(condition, "is_given_")
        mean, spread = self._expected(statistics, condition)
        anomaly = given * (self._scored(statistics, self.stack(condition, "given_")) - mean) / spread
        return given, anomaly, mean, spread, kriging.posterior(statistics["kriging"], anomaly, given)

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        given, *_, told = self._told(statistics, condition)
        return jnp.zeros((1, 0)), self._scalars(statistics, condition, told, given)

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        given, anomaly, mean, spread, told = self._told(statistics, condition)
        count = told.mean.shape[0]
        u, epsilon = target[0, :count], jnp.reshape(target[0, count:], given.shape)
        drawn = kriging.from_noise(statistics["kriging"], told, anomaly, given, u, epsilon)
        values = self.unstack(self._restored(statistics, mean + spread * drawn))
        known = {name: (jnp.asarray(condition[f"is_given_{name}"]) > 0, jnp.asarray(condition[f"given_{name}"])) for name in values}
        values = {name: jnp.where(*known[name], value) for name, value in values.items()}
        for name, quantity in self.quantities.items():
            if (whole := quantity.within) is not None:
                values[name] = jnp.where(*known[name], jnp.minimum(values[name], values[whole]))
                values[whole] = jnp.where(*known[whole], jnp.maximum(values[whole], values[name]))
        return values

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: what sensors say is judged by `check`, not stepped on."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        broken: dict[str, Array] = {}
        for name, quantity in self.quantities.items():
            value = jnp.asarray(sample[name])
            broken[f"{name} below {quantity.lower:g} {quantity.units}"] = jnp.max(jnp.maximum(quantity.lower - value, 0.0))
            if np.isfinite(quantity.upper):
                broken[f"{name} above {quantity.upper:g} {quantity.units}"] = jnp.max(jnp.maximum(value - quantity.upper, 0.0))
            given = jnp.asarray(condition[f"is_given_{name}"])
            broken[f"{name} other than given, {quantity.units}"] = jnp.max(given * jnp.abs(value - jnp.asarray(condition[f"given_{name}"])))
            if quantity.within is not None:
                both = jnp.asarray(sample[quantity.within])
                broken[f"{name} above {quantity.within}, {quantity.units}"] = jnp.max(jnp.maximum(value - both, 0.0))
        return broken

    # ------------------------------------------------------------ questions

    Scenario: ClassVar[type[scenarios.Scenario]]

    def ask(self, scenario: "SensorScenario", folder: Path) -> Question:
        return ask(self, scenario)

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        """Windows of the test split that do not overlap, evenly spaced, as a question; and what was measured there."""
        starts = self.starts("test")
        starts = starts[:: max(1, -(-self.window // int(np.lcm(self.stride, self.aligned))))]
        if most and len(starts) > most:
            starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
        return self.held_out(starts, members, self.shown(starts, self.exam_task, seed=1)), self.samples(starts)

    def held_out(self, starts: np.ndarray, members: int, shown: np.ndarray, title: str = "") -> "SensorQuestion":
        """The recorded windows at `starts`, of which `shown` is given, as a question that knows its true answer."""
        return SensorQuestion(
            condition=self.conditions(starts, shown),
            members=members,
            coords={"time": ("time", self.times[starts])},
            title=title or f"{self.name}: {len(starts)} held-out windows",
            truth=self.samples(starts),
        )

    # ------------------------------------------------------------ judges

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        named: dict[str, Baseline] = {"days like it": _DaysLikeIt(self), "last value and its errors": _Persistence(self)}
        return named | {"Gaussian model": _Gaussian(self, statistics)}

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """None: training windows overlap, and a held-out week is another week."""
        return None

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        """Scores of the cells that were measured and not given."""
        table: dict[str, Score] = {}
        curves: dict[str, np.ndarray] = {}
        for name, quantity in self.quantities.items():
            judged = (np.asarray(condition[f"measured_{name}"]) > 0) & (np.asarray(condition[f"is_given_{name}"]) == 0)
            drawn, true = np.asarray(generated[name]), np.asarray(truth[name])
            table |= {f"{name}: {what}": score for what, score in _judged(drawn, true, judged, quantity.units).items()}
            at_lead = _absolute(drawn, true)
            for lead in self.leads:
                step = self.past + lead - 1
                what = f"{name}: MAE of the median, {lead * self.step / np.timedelta64(1, 'm'):g} min ahead"
                table[what] = _mean_over(at_lead[..., step], judged[..., step], quantity.units)
            cells = judged.reshape(-1, self.window).sum(0)
            error = np.where(judged, at_lead, 0.0).reshape(-1, self.window).sum(0)
            curves[f"absolute error by step/{name}"] = np.where(cells > 0, error / np.maximum(cells, 1), np.nan)
        return Scores(table, curves)

    # ------------------------------------------------------------ what is delivered

    def write(self, **_: Any) -> None:
        """Nothing: Zarr and NetCDF are all there is."""

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        """Generated windows `[member, time, (sensor,) step]`; `time` is that of a window's first step, `step` minutes after it."""
        dims = ("member", "time", *((SENSOR,) if self.along_sensors else ()), "step")
        data = {}
        for name, quantity in self.quantities.items():
            data[name] = (dims, samples[name], {"units": quantity.units, "long_name": f"synthetic {quantity.long_name}"})
        members = next(iter(samples.values())).shape[0]
        minutes = np.arange(self.window) * (self.step / np.timedelta64(1, "m"))
        coords: dict[str, Any] = dict(question.coords)
        coords["member"] = ("member", np.arange(members), {"standard_name": "realization", "long_name": "member", "units": "1"})
        coords["step"] = ("step", minutes, {"units": "min", "long_name": "time after the first step of the window"})
        if self.along_sensors:
            coords[SENSOR] = (SENSOR, np.array(self.sensors, dtype=str), {"long_name": "name of the sensor"})
        return xr.Dataset(data, coords)

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        return json.loads(self.dataset.attrs.get("inputs", "[]"))

    @property
    def licence(self) -> str:
        return str(self.dataset.attrs.get("license", "no licence stated"))

    @property
    def limits(self) -> Sequence[str]:
        told = [f"The truth is a {self.dataset.attrs.get('source', 'record')}; its errors and gaps are learnt with it."]
        if gaps := self.dataset.attrs.get("gaps"):
            told.append(f"Gaps in the record: {gaps}.")
        told.append("Values beyond the highest and lowest that a sensor ever measured in the training split are not drawn.")
        told.append("Windows are drawn one by one: two that follow one another do not join where nothing of them is given.")
        told.append("Whether a draw gives away training windows is not tested: they overlap, and there are few of them.")
        return told

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        from domains.city import sensor_figures  # with matplotlib: only a report waits for it

        return sensor_figures.summary(self, question, dataset)

    def sections(self, **parts: Any) -> Sequence[Section]:
        from domains.city import sensor_figures

        return sensor_figures.sections(self, **parts)


def _table(values: np.ndarray) -> np.ndarray:
    """Quantiles of a sensor's values, its ends the least and the largest, rising, `[level]`."""
    table = np.quantile(values.astype(np.float64), (np.arange(LEVELS) + 0.5) / LEVELS)
    table[0], table[-1] = values.min(), values.max()
    width = max(table[-1] - table[0], 1e-3)
    return table + 1e-5 * width * np.linspace(0, 1, LEVELS)  # values that repeat still have one score each


def _applied(design: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
    return design @ coefficients[:-1] + coefficients[-1]


def _ridge(design: np.ndarray, values: np.ndarray, seen: np.ndarray, fold: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression of each column of `values` `[n, sensor]` where it was `seen`; its mean is not shrunk.

    Returns:
      Coefficients `[feature + 1, sensor]`, the last row the intercepts; and predictions `[n, sensor]` by fits without their own fold.
    """
    folds = int(fold.max()) + 1
    out = np.empty((design.shape[1] + 1, values.shape[1]))
    predicted = np.empty_like(values, dtype=np.float64)
    whole = [design[fold == each].T @ design[fold == each] for each in range(folds)]
    shrink = penalty * np.eye(design.shape[1])
    whole_columns = seen.all(0)  # they share one matrix
    groups = [np.flatnonzero(whole_columns), *np.flatnonzero(~whole_columns)[:, None]]
    for columns in (group for group in groups if len(group)):
        there = seen[:, columns[0]]
        centre = values[np.ix_(there, columns)].mean(0)
        y = np.where(there[:, None], values[:, columns] - centre, 0.0)
        lost = [design[~there & (fold == each)] for each in range(folds)]
        gram = [part - gone.T @ gone for part, gone in zip(whole, lost, strict=True)]
        moment = [design[fold == each].T @ y[fold == each] for each in range(folds)]
        total, told = np.sum(gram, 0), np.sum(moment, 0)
        out[:-1, columns], out[-1, columns] = np.linalg.solve(total + shrink, told), centre
        for each in range(folds):
            without = np.linalg.solve(total - gram[each] + shrink, told - moment[each])
            predicted[np.ix_(fold == each, columns)] = design[fold == each] @ without + centre
    return out, predicted


# ---------------------------------------------------------------- scenarios


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class Observe(_Part):
    """A value at a sensor (or of a quantity) so many minutes after a window begins, with its standard error; in every window."""

    sensor: str
    minute: float = pydantic.Field(ge=0)
    value: float
    error: float = pydantic.Field(gt=0)


class Weather(_Part):
    """Wind that blows all the time."""

    wind_speed: float = pydantic.Field(ge=0, le=60)
    wind_from: float = pydantic.Field(ge=0, le=360)


class SensorScenario(scenarios.Scenario):
    """A question to a twin of sensors.

    Attributes:
      task: what is given (see `Sensors.shown`); of the record, unless it is none.
      start: of the first window, ISO; evenly spaced over the held-out record where it is left out.
      windows: how many, one after the other.
      hidden: share that gaps or lost sensors hide; `without`: sensors that are hidden whole.
      weather: in place of the recorded one; then a window may begin at any time.
      observe: values that every draw must meet.
    """

    task: Task
    start: str | None = pydantic.Field(default=None, pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}$")
    windows: int = pydantic.Field(default=1, ge=1, le=MOST_WINDOWS)
    hidden: float | None = pydantic.Field(default=None, gt=0, lt=1)
    without: list[str] = pydantic.Field(default=[], max_length=1000)
    weather: Weather | None = None
    observe: list[Observe] = pydantic.Field(default=[], max_length=200)


Sensors.Scenario = SensorScenario


@dataclass(frozen=True)
class SensorQuestion(Question):
    """A question that knows its true answer, where that was recorded: `[item, ...]`."""

    truth: Sample | None = None


def ask(domain: Sensors, scenario: SensorScenario) -> Question:
    """A checked scenario as conditions `[window, ...]` and constraints. Raises BadInput."""
    title = scenario.title
    for name in scenario.without:
        if name not in domain.sensors:
            raise BadInput(f"scenario {title!r}: without: no sensor {name}; there are {', '.join(domain.sensors[:8])} ...")
    if scenario.weather is not None and (not domain.calendar.wind or scenario.task != "none"):
        raise BadInput(f"scenario {title!r}: weather: expected task: none and a twin that follows the wind, got {scenario.task}")
    test = domain.starts("test")
    if scenario.start is None:
        apart = test[:: max(1, -(-domain.window // int(np.lcm(domain.stride, domain.aligned))))]
        if len(apart) < scenario.windows:
            raise BadInput(f"scenario {title!r}: windows: the held-out record has room for {len(apart)}, got {scenario.windows}")
        starts = apart[np.linspace(0, len(apart) - 1, scenario.windows).round().astype(int)]
        times = domain.times[starts]
    else:
        first = _instant(title, scenario.start)
        times = first + np.arange(scenario.windows) * domain.window * domain.step
        starts = np.searchsorted(domain.times, times)
    last = starts + domain.window <= len(domain.times)
    there = last & (domain.times[np.minimum(starts, len(domain.times) - 1)] == times) & (starts >= test[0])
    if there.all():
        shown = domain.shown(starts, scenario.task, scenario.seed, scenario.hidden, scenario.without)
        question = domain.held_out(starts, scenario.members, shown, title)
        if scenario.weather is not None:
            question = dataclasses.replace(question, condition=_blown(domain, question.condition, scenario.weather), truth=None)
    elif scenario.task == "none" and (scenario.weather is not None or not domain.calendar.wind):
        question = _anywhere(domain, times, scenario)
    else:
        bounds = f"{str(domain.times[test[0]])[:16]} and {str(domain.times[test[-1]])[:16]}"
        raise BadInput(
            f"scenario {title!r}: start: expected every window to begin at a step of the held-out record, between {bounds}, "
            f"got {str(times[np.argmin(there)])[:16]}; elsewhere only task: none can be asked, with a weather"
        )
    return _observing(domain, question, scenario)


def _instant(title: str, text: str) -> np.datetime64:
    try:
        return np.datetime64(text, "ns")
    except ValueError:
        raise BadInput(f"scenario {title!r}: start: expected a date and time that exist, got {text}") from None


def _blown(domain: Sensors, condition: Condition, weather: Weather) -> Condition:
    like = np.asarray(condition["hour"])
    return {**condition, **{name: np.full_like(like, getattr(weather, name)) for name in ("wind_speed", "wind_from")}}


def _anywhere(domain: Sensors, times: np.ndarray, scenario: SensorScenario) -> SensorQuestion:
    """Windows of which nothing is given, at any time."""
    condition: Condition = domain.calendar.of(times[:, None] + np.arange(domain.window) * domain.step)
    if scenario.weather is not None:
        condition = _blown(domain, condition, scenario.weather)
    nothing = np.zeros((len(times), len(domain.sensors), domain.window), np.float32)
    for prefix, cells in (("given_", nothing), ("is_given_", nothing), ("measured_", nothing + 1)):
        condition = {**condition, **domain.unstack(cells, prefix)}
    return SensorQuestion(condition, scenario.members, {"time": ("time", times)}, scenario.title)


def _observing(domain: Sensors, question: SensorQuestion, scenario: SensorScenario) -> Question:
    """The question with what was observed imposed on every draw."""
    if not scenario.observe:
        return question
    rows, steps = [], []
    for each in scenario.observe:
        if each.sensor not in domain.sensors:
            raise BadInput(f"scenario {scenario.title!r}: observe: no sensor {each.sensor}; there are {', '.join(domain.sensors[:8])} ...")
        step = each.minute / (domain.step / np.timedelta64(1, "m"))
        if step != round(step) or step >= domain.window:
            raise BadInput(f"scenario {scenario.title!r}: observe: minute: expected a step of the window, got {each.minute:g}")
        rows.append(domain.sensors.index(each.sensor))
        steps.append(int(step))
    value, error = (np.array([getattr(each, name) for each in scenario.observe], np.float32) for name in ("value", "error"))

    def seen(sample: Sample) -> Array:
        return domain.stack(sample)[np.array(rows), np.array(steps)]

    def constrain(decode: Callable[[Target], Sample], condition: Condition) -> Sequence[Constraint]:
        return [Observation(lambda target: seen(decode(target)), value, error)]

    def misses(sample: Sample, condition: Condition) -> Array:
        return jnp.max(jnp.maximum(jnp.abs(seen(sample) - value) - KEPT_TIMES * error, 0.0))

    return dataclasses.replace(question, constrain=constrain, misses=misses)


# ---------------------------------------------------------------- baselines


@dataclass(frozen=True, eq=False)
class _DaysLikeIt:
    """Climatology: recorded training windows of the same kind of day, within half an hour of the same time and 45 days of the season."""

    domain: Sensors

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        domain, draw = self.domain, np.random.default_rng(seed)
        pool = _Pool(domain)
        n = len(np.asarray(condition["hour"]))
        out = np.empty((members, n, len(domain.sensors), domain.window), np.float32)
        for item in range(n):
            out[:, item] = domain.windows(draw.choice(pool.like(condition, item), members))[0]
        return _given(domain, out, condition)


@dataclass(frozen=True, eq=False)
class _Persistence:
    """The last value that is given of a sensor, plus what came after such a value in a training window at that time of the day.

    A sensor of which nothing is given takes that window's values as they are.
    """

    domain: Sensors

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        domain, draw = self.domain, np.random.default_rng(seed)
        pool = _Pool(domain)
        given = np.asarray(domain.stack(condition, "is_given_")) > 0
        known = np.asarray(domain.stack(condition, "given_"))
        n = len(given)
        lower, upper = np.nanmin(domain.values[: domain._border], 0), np.nanmax(domain.values[: domain._border], 0)
        out = np.empty((members, n, len(domain.sensors), domain.window), np.float32)
        step = np.arange(domain.window)
        for item in range(n):
            like = domain.windows(draw.choice(pool.like(condition, item), members))[0]
            last = np.maximum.accumulate(np.where(given[item], step, -1), axis=1)  # [sensor, time]
            first = np.where(given[item].any(1), given[item].argmax(1), -1)[:, None]
            anchor = np.where(last >= 0, last, first)
            at = np.broadcast_to(np.maximum(anchor, 0), like.shape)
            change = like - np.take_along_axis(like, at, 2)
            held = np.take_along_axis(known[item], np.maximum(anchor, 0), 1)
            out[:, item] = np.where(anchor >= 0, np.clip(held + change, lower[:, None], upper[:, None]), like)
        return _given(domain, out, condition)


@dataclass(frozen=True, eq=False)
class _Gaussian:
    """The Gaussian model given the shown cells, in normal scores: what the generator starts from."""

    domain: Sensors
    statistics: Statistics

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        domain, spec = self.domain, self.domain.spec()
        draw = jax.jit(jax.vmap(lambda s, target, one: domain.decode(s, target, one), (None, 0, None)))
        items = len(np.asarray(condition["hour"]))
        found: list[Sample] = []
        for item in range(items):
            key = jax.random.fold_in(jax.random.key(seed), item)
            targets = jax.random.normal(key, (members, *spec.grid, spec.channels))
            one = {name: np.asarray(values)[item] for name, values in condition.items()}
            found.append(jax.tree.map(np.asarray, draw(self.statistics, targets, one)))
        return {name: np.stack([each[name] for each in found], 1) for name in domain.sample}


class _Pool:
    """Training windows to choose from, by their calendar."""

    def __init__(self, domain: Sensors):
        self.domain = domain
        rows = domain._rows("train")
        self.starts = np.arange(0, rows.stop - domain.window + 1, 1 if domain.aligned == 1 else domain.aligned)
        named = domain.calendar.of(domain.times[self.starts])
        self.hour, self.kind, self.day = named["hour"], named["kind_of_day"], named["day_of_year"]
        self.weekday = (domain.times[self.starts].astype("datetime64[D]").astype(int) + 3) % 7

    def like(self, condition: Condition, item: int) -> np.ndarray:
        """Starts of the windows like that of an item; as many conditions are let go as it takes to find some."""
        hour, kind, day = (float(np.asarray(condition[name])[item, 0]) for name in ("hour", "kind_of_day", "day_of_year"))
        # windows of several days have to begin on a day like the item's, and go on like it
        kinds = np.asarray(condition["kind_of_day"])[item]
        apart = np.abs((self.hour - hour + 12) % 24 - 12)
        away = np.abs((self.day - day + SEASON / 2) % SEASON - SEASON / 2)
        near, season = apart <= 0.5, away <= 45
        same = self.kind == kind
        if len(set(kinds)) > 1:
            rows = self.starts[:, None] + np.arange(self.domain.window)
            same &= (self.domain.calendar.of(self.domain.times[rows])["kind_of_day"] == kinds).all(1)
        for chosen in (near & same & season, near & same, near, np.ones_like(near)):
            if chosen.any():
                return self.starts[chosen]
        raise AssertionError("a training split has windows")


def _given(domain: Sensors, drawn: np.ndarray, condition: Condition) -> Sample:
    """Draws `[member, n, sensor, time]` with the given cells in their place."""
    given, known = (np.asarray(domain.stack(condition, prefix)) for prefix in ("is_given_", "given_"))
    return {name: np.asarray(values) for name, values in domain.unstack(np.where(given > 0, known, drawn)).items()}


# ---------------------------------------------------------------- scores


def _judged(drawn: np.ndarray, true: np.ndarray, judged: np.ndarray, units: str) -> dict[str, Score]:
    """Scores of draws `[member, n, ...]` of one quantity at the cells that are `judged` `[n, ...]`."""
    members = len(drawn)
    some, truth = drawn[:, judged], true[judged]
    per_cell = {
        "CRPS": metrics.crps(some, truth),
        "error": metrics.squared_error(some, truth),
        "spread": metrics.variance(some),
    }

    def over(values: np.ndarray) -> list[np.ndarray]:
        return _sums(values, judged)

    low, high = np.quantile(some, [0.05, 0.95], axis=0)
    inside = ((truth >= low) & (truth <= high)).astype(float)
    table = {
        "CRPS": metrics.interval(over(per_cell["CRPS"]), metrics.ratio, block=4, units=units),
        "MAE of the median": metrics.interval(over(np.abs(np.median(some, 0) - truth)), metrics.ratio, block=4, units=units),
        "RMSE of the mean": metrics.interval(
            over(per_cell["error"]), lambda total, count: metrics.rmse(metrics.ratio(total, count)), block=4, units=units
        ),
    }
    ratio = metrics.spread_skill_ratio(members)
    both = [over(per_cell["spread"])[0], over(per_cell["error"])[0]]
    table["spread / skill"] = metrics.interval(both, ratio, block=4, ideal=1.0, units="1")
    share = 0.9 * (members - 1) / (members + 1)  # of quantiles between the members' ranks, Hyndman & Fan (1996) type 7
    table["coverage of the 90 % interval"] = metrics.interval(over(inside), metrics.ratio, block=4, ideal=share, units="1")
    whole = np.where(judged, true, 0.0).astype(np.float32)
    energy = metrics.energy_score(np.where(judged, drawn, 0.0).astype(np.float32), whole)
    table["energy score"] = metrics.interval(energy, block=4, units=units)
    return table


def _sums(values: np.ndarray, judged: np.ndarray) -> list[np.ndarray]:
    """Per item: the sum of values at judged cells, and how many there are."""
    item = np.nonzero(judged)[0]
    n = len(judged)
    return [np.bincount(item, weights=values, minlength=n), np.bincount(item, minlength=n).astype(float)]


def _absolute(drawn: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.abs(np.median(drawn, 0) - true)


def _mean_over(errors: np.ndarray, judged: np.ndarray, units: str) -> Score:
    return metrics.interval(_sums(errors[judged], judged), metrics.ratio, block=4, units=units)


if TYPE_CHECKING:  # the type checker proves that Sensors keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Sensors
