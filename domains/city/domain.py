"""The city domain: days of travel demand, and what they do to congestion, CO2, the air and the people who breathe it.

What is generated is a day: vehicles between all zones in each part of the day, given the weekday and the rain. The generator draws how
the rates of all pairs vary together, as principal components of roots of counts; that vehicles come one by one is Poisson's part, which
`simulate` adds. For a scenario it then simulates the city before and after a change: traffic (`traffic`, `equilibrium`), emissions,
dispersion and exposure, on the same day and in the same weather, so that the difference is the change's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from domains.city import dispersion, emissions, questions, results, scores, traffic
from domains.city.days import LENGTHS, PERIODS, weekday_of
from domains.city.emissions import POLLUTANTS, Fleet
from domains.city.interventions import CONDITION
from domains.city.interventions import City as State
from domains.city.place import Place
from domains.city.weather import Background, Winds
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

ANSCOMBE = 3 / 8  # sqrt(count + 3/8) has a variance of about 1/4 for any Poisson count (Anscombe 1948) ...
COUNTING = 1 / 4  # ... and a mean whose square falls short of rate + 3/8 by as much
FEATURES = 9  # of a condition: seven weekdays, the logarithm of the rain, whether it rains
GAP = 1e-5  # relative, that equilibria are asked for
BALANCED = 1e-4  # of all trips: what may go astray in float32


def trips_in(period: str) -> str:
    """The name of the variable of a period."""
    return f"trips_{period}"


NAMES = tuple(trips_in(period.name) for period in PERIODS)


@dataclass(frozen=True, eq=False)
class CityTwin:
    """A city twin (see `twinsim.base.Domain`).

    Attributes:
      place: roads, zones, people.
      record: recorded days of demand, as `days.recorded` or `days.simulated` gives them.
      splits: "train", "test" (and "validation") -> first and last date, inclusive.
      mix: HBEFA4 class -> share of the vehicle kilometres; None for the example mix.
      value_of_time: money an hour of travel is worth, euro/h; a charge becomes time by it.
    """

    name: str
    place: Place
    record: xr.Dataset
    splits: Mapping[str, Sequence[str]]
    mix: Mapping[str, float] | None = None
    response: traffic.Response = traffic.Response()
    background: Background = Background()
    rose: Sequence[float] | None = None
    value_of_time: float = 12.0

    Scenario: ClassVar[type[scenarios.Scenario]] = questions.CityScenario

    def __post_init__(self) -> None:
        if self.value_of_time <= 0:
            raise BadInput(f"{self.name}: value_of_time: expected euro/h above 0, got {self.value_of_time}")
        for split in ("train", "test"):
            if split not in self.splits or not len(self.rows(split)):
                raise BadInput(f"split {split}: selects no day of the record, which goes from {self._extent()}")
        shared = np.intersect1d(self.rows("train"), self.rows("test"))
        if len(shared):
            raise BadInput(f"splits: train and test share {len(shared)} days, expected none")

    # ------------------------------------------------------------ what it is

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.place.network.zones,) * 2

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {trips_in(p.name): Variable(("origin", "destination"), "1", f"vehicles that set out, {p.label}", lower=0.0) for p in PERIODS}

    @property
    def condition(self) -> Mapping[str, Variable]:
        return {"weekday": Variable((), "1", "day of the week, 0 = Monday"), "rain": Variable((), "mm", "rain of the day", lower=0.0)}

    @property
    def licence(self) -> str:
        return str(self.record.attrs.get("license", "no licence stated"))

    @property
    def limits(self) -> Sequence[str]:
        return results.limits(self)

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        return [*self.place.inputs, *self.record.attrs.get("inputs", [])]

    @cached_property
    def fleet(self) -> Fleet:
        return emissions.fleet(self.mix)

    @cached_property
    def winds(self) -> Winds:
        return Winds(self.place) if self.rose is None else Winds(self.place, self.rose)

    # ------------------------------------------------------------ truth

    def rows(self, split: str) -> np.ndarray:
        """Positions of a split's days in the record, in order. Raises BadInput."""
        if split not in self.splits:
            if split == "validation":
                return np.array([], int)
            raise BadInput(f"split {split}: not configured; there are {', '.join(self.splits)}")
        first, last = (np.datetime64(date, "D") for date in self.splits[split])
        date = self.record["time"].values.astype("datetime64[D]")
        return np.flatnonzero((date >= first) & (date <= last))

    def _extent(self) -> str:
        date = self.record["time"].values.astype("datetime64[D]")
        return f"{date[0]} to {date[-1]}" if len(date) else "nowhere to nowhere"

    def source(self, split: str) -> Source:
        return Rows(self.days, self.rows(split))

    def days(self, rows: np.ndarray) -> tuple[Sample, Condition]:
        """Recorded days and their conditions, `[n, ...]`."""
        trips = self.record["trips"].values[rows].astype(np.float32)
        rain = self.record["rain"].values[rows].astype(np.float32)
        weekday = weekday_of(self.record["time"].values[rows]).astype(np.float32)
        return {name: trips[:, index] for index, name in enumerate(NAMES)}, {"weekday": weekday, "rain": rain}

    # ------------------------------------------------------------ one day <-> one example

    def _features(self, condition: Condition) -> jax.Array:
        """Weekday, one of seven, and rain, `[feature]`."""
        weekday = jnp.asarray(condition["weekday"]).astype(jnp.int32)
        rain = jnp.log1p(jnp.asarray(condition["rain"], jnp.float32))
        return jnp.concatenate([jax.nn.one_hot(weekday, 7), jnp.stack([jnp.minimum(rain, 3.0), (rain > 0).astype(jnp.float32)])])

    def fit(self) -> Statistics:
        sample, condition = self.days(self.rows("train"))
        root = np.sqrt(np.stack([sample[name] for name in NAMES], axis=1) + ANSCOMBE)  # [day, period, zone, zone]
        features = np.asarray(jax.vmap(self._features)(condition), np.float64)
        ridge = features.T @ features + 1e-3 * np.eye(features.shape[1])
        mean = np.linalg.solve(ridge, features.T @ root.reshape(len(root), -1).astype(np.float64))
        residual = root.reshape(len(root), -1) - features @ mean
        basis, scale, signal = _shared(residual)
        return {
            "mean": mean.reshape(-1, *root.shape[1:]).astype(np.float32),
            "basis": basis.reshape(-1, *root.shape[1:]).astype(np.float32),
            "scale": scale.astype(np.float32),
            "signal": signal.astype(np.float32),
        }

    def _expected(self, statistics: Statistics, condition: Condition) -> jax.Array:
        """Expected roots of counts, `[period, zone, zone]`."""
        return jnp.tensordot(self._features(condition), jnp.asarray(statistics["mean"]), 1)

    def spec(self, statistics: Statistics | None = None) -> Spec:
        most = min(len(self.rows("train")) - 1, len(PERIODS) * self.shape[0] ** 2)
        return Spec((1,), most if statistics is None else len(statistics["scale"]), 0, FEATURES, (False,))

    def examples(self, statistics: Statistics, split: str = "train", block: int = 128) -> Iterator[Example]:
        def example(sample: Sample, condition: Condition) -> Example:
            root = jnp.sqrt(jnp.stack([jnp.asarray(sample[name]) for name in NAMES]) + ANSCOMBE)
            score = jnp.tensordot(jnp.asarray(statistics["basis"]), root - self._expected(statistics, condition), 3)
            return Example((score / statistics["scale"])[None], *self.encode(statistics, condition))

        encode = jax.jit(jax.vmap(example))
        rows = self.rows(split)
        for first in range(0, len(rows), block):
            yield jax.tree.map(np.asarray, encode(*self.days(rows[first : first + block])))

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        return jnp.zeros((1, 0)), self._features(condition)

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        """Expected vehicles of a day whose components are `target`."""
        shared = jnp.tensordot(jnp.asarray(target)[0] * statistics["signal"], jnp.asarray(statistics["basis"]), 1)
        root = jnp.maximum(self._expected(statistics, condition) + shared, 0.0)
        rate = jnp.maximum(root**2 - (ANSCOMBE - COUNTING), 0.0) * (1 - jnp.eye(self.shape[0]))[None]
        return {name: rate[index] for index, name in enumerate(NAMES)}

    # ------------------------------------------------------------ physics

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        of_counts, of_weather = jax.random.split(jnp.asarray(key))
        rate = jnp.stack([jnp.asarray(sample[name]) for name in NAMES])
        count = jax.random.poisson(of_counts, rate).astype(jnp.float32)
        sample = {name: count[index] for index, name in enumerate(NAMES)}
        if f"{CONDITION}capacity" not in condition:
            return sample
        state = State(**{each.name: jnp.asarray(condition[f"{CONDITION}{each.name}"]) for each in fields(State)})  # [case, ...]
        flow, time, cost, trips, gap, unsettled = self._traffic(sample, state)
        emitted = self._emitted(flow, time, state)  # g/h, [case, period, pollutant, road]
        nox, no2, pm25, pm10 = self._air(emitted, state, condition, of_weather)
        per_day = jnp.einsum("cpkl,p->ckl", emitted, jnp.asarray(LENGTHS, jnp.float32)) / 1000
        named = {f"emitted_{name}": per_day[:, index] for index, name in enumerate(POLLUTANTS) if name != "NO2"}
        air = {"NOx": nox, "NO2": no2, "PM2.5": pm25, "PM10": pm10}
        return {
            **sample,
            "flow": flow.sum(2),
            "time": time,
            "cost": cost,
            "car_trips": trips,
            "gap": gap,
            "unsettled": unsettled,
            **named,
            **{f"air_{name}": values for name, values in air.items()},
        }

    def _traffic(self, sample: Sample, state: State) -> tuple[jax.Array, ...]:
        """Flow by class of users, time, cost, trips, gap, unsettled: as `traffic.Traffic`, float32."""
        network, periods, zones = self.place.network, len(PERIODS), self.shape[0]
        users = state.charge.shape[1]
        shapes = (
            (2, periods, users, network.links), (2, periods, network.links), (2, zones), (2, zones), (2,), (2,)
        )  # fmt: skip

        def settle(trips: np.ndarray, state: State) -> tuple[np.ndarray, ...]:
            before_and_after = jax.tree.map(np.asarray, state)
            one = traffic.day(network, self.place.delay, np.asarray(trips, float), LENGTHS, before_and_after, self.response, GAP)
            return tuple(np.asarray(part, np.float32) for part in (one.flow, one.time, one.cost, one.trips, one.gap, one.unsettled))

        trips = jnp.stack([sample[name] for name in NAMES])
        result = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return tuple(jax.pure_callback(settle, tuple(result), trips, state, vmap_method="sequential"))

    def _emitted(self, flow: jax.Array, time: jax.Array, state: State) -> jax.Array:
        """Of each road, g/h, `[case, period, pollutant, road]`."""
        roads = self.place.roads
        length = self.place.network.length[roads].astype(np.float32)
        speed = length[None, None] / time[..., roads]  # [case, period, road]

        def of_class(flow: jax.Array, speed: jax.Array, share: jax.Array) -> jax.Array:
            vehicles = Fleet(share, *(getattr(self.fleet, name) for name in ("hot", "no2", "wear", "classes", "kinds")))
            return emissions.link_emissions(flow, speed, length, vehicles)  # [pollutant, period, road]

        of_users = jax.vmap(of_class, (1, None, 0))  # over classes of users
        return jnp.moveaxis(jax.vmap(of_users)(flow[..., roads], speed, jnp.asarray(state.fleet)).sum(1), 1, 2)

    def _air(self, emitted: jax.Array, state: State, condition: Condition, key: Array) -> tuple[jax.Array, ...]:
        """Mean NOx, NO2, PM2.5 and PM10 of the day at the receptors, ug/m3, `[case, receptor]` each."""
        kinds = [POLLUTANTS.index(name) for name in ("NOx", "NO2", "PM2.5", "PM10")]
        length = self.place.network.length[self.place.roads].astype(np.float32)
        strength = emissions.line_strength(emitted[:, :, kinds, :], length) * 1e6  # ug/(m s), [case, period, kind, road]
        weather = self.winds.draw(jnp.asarray(key), jnp.asarray(condition["rain"]) > 0)
        unit = self.winds.unit
        shape = (*strength.shape[:3], len(self.place.receptors))

        def carry(strength: np.ndarray, weather: np.ndarray) -> np.ndarray:
            chosen = unit[np.asarray(weather)]  # [period, receptor, road]
            return np.einsum("cpkl,prl->cpkr", np.asarray(strength), chosen, optimize=True).astype(np.float32)

        added = jax.pure_callback(carry, jax.ShapeDtypeStruct(shape, jnp.float32), strength, weather, vmap_method="sequential")
        nox, primary, pm25, pm10 = (added[:, :, index] for index in range(4))  # [case, period, receptor]
        back = self.background
        kept_pm, kept_no2 = (1 - state.removed_pm)[:, None], (1 - state.removed_no2)[:, None]
        nox, primary = nox * kept_no2, primary * kept_no2
        photolysis = jnp.asarray(self.winds.photolysis, jnp.float32)[None, :, None]
        no2 = dispersion.no2(nox, primary, back.nox, back.no2, back.o3, jnp.broadcast_to(photolysis, nox.shape))
        share = jnp.asarray(LENGTHS / LENGTHS.sum(), jnp.float32)
        mean = lambda hourly: jnp.einsum("cpr,p->cr", hourly, share)  # noqa: E731
        return mean(nox + back.nox), mean(no2), mean(pm25 * kept_pm) + back.pm25, mean(pm10 * kept_pm) + back.pm10

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        least = jnp.min(jnp.stack([jnp.min(sample[name]) for name in NAMES]))
        rules = {"trips below 0": jnp.maximum(-least, 0.0)}
        if "flow" not in sample:
            return rules
        network = self.place.network
        free = network.length.astype(np.float32)[None] / jnp.asarray(condition[f"{CONDITION}free_speed"])
        faster = jnp.maximum(1 - jnp.asarray(sample["time"]) / free[:, None], 0.0)
        inner = np.ones(network.nodes, np.float32)
        inner[network.zone] = 0.0
        flow = jnp.asarray(sample["flow"])  # [case, period, link]
        balance = jnp.zeros((*flow.shape[:2], network.nodes)).at[..., network.end].add(flow).at[..., network.start].add(-flow)
        astray = jnp.abs(balance * inner[None, None]).max(-1) / jnp.maximum(flow.max(-1), 1.0)
        return {
            **rules,
            "vehicles lost or made at a junction, share of the busiest link": jnp.maximum(jnp.max(astray) - BALANCED, 0.0),
            "links faster than when empty, share": jnp.maximum(jnp.max(faster) - BALANCED, 0.0),
            "gap of the equilibrium above 1e-4": jnp.maximum(jnp.max(jnp.asarray(sample["gap"])) - 1e-4, 0.0),
            "NO2 above NOx, ug/m3": jnp.maximum(jnp.max(jnp.asarray(sample["air_NO2"]) - jnp.asarray(sample["air_NOx"])), 0.0),
            "demand not settled, share of the trips above 1 %": jnp.maximum(jnp.max(jnp.asarray(sample["unsettled"])) - 0.01, 0.0),
        }

    # ------------------------------------------------------------ questions and judges

    def ask(self, scenario: questions.CityScenario, folder: Any) -> Question:
        return questions.ask(self, scenario)

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        rows = self.rows("test")
        if most is not None and len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        truth, condition = self.days(rows)
        time = self.record["time"].values[rows]
        return Question(condition, members, {"time": ("time", time)}, "the held-out days"), truth

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        return scores.baselines(self, statistics)

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        return scores.score(self, generated, truth, condition)

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        return scores.membership(self, generated, truth, ask)

    # ------------------------------------------------------------ what is delivered

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        return results.dataset_of(self, samples, question)

    def write(self, *, asked: Any, question: Question, dataset: xr.Dataset, folder: Any) -> None:
        results.write(self, asked, dataset, folder)

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        return results.summary(self, question, dataset)

    def sections(self, **parts: Any) -> Sequence[Section]:
        return results.sections(self, **parts)


def _shared(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What pairs have in common: components whose variance counting alone does not give, of `residual` `[day, pair]`.

    Of n days and p pairs, noise of variance s2 alone has sample variances up to s2 (1 + sqrt(p / n))^2 along its components (Marchenko &
    Pastur 1967); above that a true variance l + s2 shows as (l + s2)(1 + s2 p / (n l)) (Baik & Silverstein 2006), solved here for l.

    Returns:
      basis, orthonormal `[component, pair]`; standard deviations of recorded days' scores, and of the rates behind them, `[component]`.
    """
    n, p = residual.shape
    _, root, vectors = np.linalg.svd(residual / np.sqrt(n), full_matrices=False)
    variance, ratio = root**2 / COUNTING, p / n
    kept = max(int((variance > (1 + np.sqrt(ratio)) ** 2).sum()), 1)
    above = np.maximum(variance[:kept], (1 + np.sqrt(ratio)) ** 2)
    half = above + 1 - ratio
    true = (half + np.sqrt(np.maximum(half**2 - 4 * above, 0.0))) / 2 - 1
    return vectors[:kept], root[:kept], np.sqrt(true * COUNTING)


if TYPE_CHECKING:  # the type checker proves that a CityTwin keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = CityTwin
