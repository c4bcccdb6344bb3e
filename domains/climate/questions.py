"""Climate scenarios: the schema of a scenario file, and how a question becomes conditions and constraints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr

from domains.climate import means, sources
from twinsim.base import Array, BadInput, Condition, Constraint, Exceedance, Observation, Question, Sample, Target
from twinsim.scenario import Scenario, inside

if TYPE_CHECKING:
    from domains.climate.domain import Climate

MOST_DAYS = 40_000  # in one scenario, about a century
SST = "sst_offset"  # the forcing that scenarios call by its own name, and that is 0 where they say nothing
MOST_WARMING = 10.0  # K, either way
MISPLACED = 0.1  # of a coarse cell: how far a cell of a background file may lie from the block of the model's grid


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class Period(_Part):
    """Days from `start` to `end`, both included, as ISO dates; `every` that many days."""

    start: str = pydantic.Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    end: str = pydantic.Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    every: int = pydantic.Field(default=1, ge=1, le=366)


class Box(_Part):
    """A box in degrees; longitudes may be given east of Greenwich or on both sides of it."""

    lat: tuple[float, float] = pydantic.Field(strict=False)
    lon: tuple[float, float] = pydantic.Field(strict=False)


class Impose(_Part):
    """The mean of a variable over a box is above (or below) a quantile of the training days of that season."""

    variable: str
    box: Box
    above_quantile: float | None = pydantic.Field(default=None, gt=0.5, lt=1)
    below_quantile: float | None = pydantic.Field(default=None, gt=0, lt=0.5)

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Impose":
        if (self.above_quantile is None) == (self.below_quantile is None):
            raise ValueError("expected exactly one of above_quantile and below_quantile")
        return self


class Observe(_Part):
    """A value measured at a place, with its standard error, in the variable's units; it holds on every day asked for."""

    variable: str
    lat: float = pydantic.Field(ge=-90, le=90)
    lon: float = pydantic.Field(ge=-180, le=360)
    value: float
    error: float = pydantic.Field(gt=0)


class Background(_Part):
    """Where the coarse fields come from: the held-out days of the model's own data, or a CF file beside the scenario."""

    held_out: bool = False
    file: str | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Background":
        if self.held_out == (self.file is not None):
            raise ValueError("expected held_out: true or a file, one of them")
        return self


class ClimateScenario(Scenario):
    """A question to a climate twin.

    Attributes:
      period: the days to draw. With a background, the days to take from it; all of them where it is left out.
      sst_offset: warming of the sea surface, K, where the model was trained with one; none where it is left out.
      forcing: value of whatever the model was trained with (`forcing` of its domain), in that coordinate's units.
      impose, observe: what every drawn day must keep.
      background: coarse fields, where the model downscales.
    """

    period: Period | None = None
    sst_offset: float | None = pydantic.Field(default=None, ge=-MOST_WARMING, le=MOST_WARMING)
    forcing: float | None = pydantic.Field(default=None, allow_inf_nan=False)
    impose: list[Impose] = pydantic.Field(default=[], max_length=8)
    observe: list[Observe] = pydantic.Field(default=[], max_length=200)
    background: Background | None = None

    def files(self) -> list[str]:
        return [self.background.file] if self.background and self.background.file else []

    @property
    def forced(self) -> float | None:
        """The value of the forcing under either of its names."""
        return self.forcing if self.sst_offset is None else self.sst_offset


@dataclass(frozen=True)
class ClimateQuestion(Question):
    """A question that remembers what it imposes, and so where an answer is to be looked at."""

    imposed: Sequence[Impose] = ()


def ask(domain: "Climate", scenario: ClimateScenario, folder: Path) -> Question:
    """A checked scenario as conditions `[day, ...]` and constraints. Raises BadInput."""
    if scenario.period and domain.item != "time":
        raise BadInput(f"scenario {scenario.title!r}: period: the samples of {domain.name} lie along {domain.item} and have no dates")
    if domain.background:
        condition, coords = _from_background(domain, scenario, folder)
    else:
        if scenario.background:
            raise BadInput(f"scenario {scenario.title!r}: background is for a model that downscales, {domain.name} does not")
        condition, coords = _from_period(domain, scenario)
    days = len(next(iter(coords.values()))[1])
    condition |= _forced(domain, scenario, condition, days)
    condition = condition or dict(domain.unconditioned(days))
    imposed = [_imposed(domain, each, condition) for each in scenario.impose]
    for index, (_, _, threshold) in enumerate(imposed):
        condition[f"threshold{index}"] = threshold
    observed = [_observed(domain, each) for each in scenario.observe]
    constrain, misses = _constraints(domain, imposed, observed)
    notes = _notes(domain, scenario, condition)
    return ClimateQuestion(condition, scenario.members, coords, scenario.title, constrain, misses, notes, tuple(scenario.impose))


def _forced(domain: "Climate", scenario: ClimateScenario, condition: Condition, days: int) -> Condition:
    """The forcing of each item `[item]`: what the scenario says, else that of the held-out days, else no warming. Raises BadInput."""
    where, name = f"scenario {scenario.title!r}", domain.forcing
    given = "forcing" if scenario.sst_offset is None else SST
    if scenario.sst_offset is not None and scenario.forcing is not None:
        raise BadInput(f"{where}: expected one of sst_offset and forcing, got both")
    if name is None:
        if scenario.forced is not None:
            raise BadInput(f"{where}: {given} is set, but {domain.name} was not trained with one")
        return {}
    if given == SST and name != SST:
        raise BadInput(f"{where}: sst_offset is set, but {domain.name} was not trained with one; give {name} as forcing")
    if name == SST and abs(scenario.forced or 0.0) > MOST_WARMING:
        raise BadInput(f"{where}: forcing: expected a warming from {-MOST_WARMING:g} to {MOST_WARMING:g} K, got {scenario.forced:g}")
    if scenario.forced is None:
        if name in condition:
            return {name: condition[name]}
        if name != SST:
            low, high = _seen(domain)
            raise BadInput(
                f"{where}: expected a forcing, {domain.name} was trained with {name} from {low:g} to {_with_units(domain, high)}"
            )
    return {name: np.full(days, scenario.forced or 0.0, np.float32)}


def _seen(domain: "Climate") -> tuple[float, float]:
    """Least and greatest forcing of the training days."""
    values = domain.dataset[domain.forcing].values[domain.rows("train")].astype(np.float32)
    return float(values.min()), float(values.max())


def _with_units(domain: "Climate", value: float) -> str:
    return f"{value:g} {forcing_words(domain)[1]}".strip()


def forcing_words(domain: "Climate") -> tuple[str, str]:
    """What the forcing is, and its units, "" where the data state none."""
    if domain.forcing == SST:
        return "warming of the sea surface", "K"
    attrs = domain.dataset[domain.forcing].attrs
    return str(attrs.get("long_name", domain.forcing)), str(attrs.get("units", ""))


def _from_period(domain: "Climate", scenario: ClimateScenario) -> tuple[dict[str, Array], dict[str, Any]]:
    if scenario.period is None:
        raise BadInput(f"scenario {scenario.title!r}: expected a period of days to draw, got none")
    try:
        first, last = np.datetime64(scenario.period.start), np.datetime64(scenario.period.end)
    except ValueError as error:
        raise BadInput(f"scenario {scenario.title!r}: period: {error}") from error
    count = int((last - first) / np.timedelta64(1, "D")) // scenario.period.every + 1
    if last < first or count > MOST_DAYS:
        raise BadInput(f"scenario {scenario.title!r}: period: expected 1 to {MOST_DAYS} days, got {first} to {last}")
    step = scenario.period.every
    if domain.window > 1:
        if step != 1 or count % domain.window:
            raise BadInput(
                f"scenario {scenario.title!r}: period: {domain.name} draws {domain.window} days in a row, so expected a multiple of"
                f" {domain.window} days, with every: 1, got {count} with every: {step}"
            )
        step, count = domain.window, count // domain.window
    time = (first + np.arange(count) * np.timedelta64(step, "D")).astype("datetime64[ns]")
    stamps = xr.DataArray(time, dims="time")
    condition: dict[str, Array] = {"day_of_year": _days(stamps)} if domain.season else {}
    return condition, {"time": ("time", time)}


def _from_background(domain: "Climate", scenario: ClimateScenario, folder: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    assert domain.background
    if scenario.background is None:
        raise BadInput(f"scenario {scenario.title!r}: {domain.name} downscales, so expected a background: held_out: true, or a file")
    if scenario.background.held_out:
        rows = domain.rows("test")
        if scenario.period and domain.item == "time":
            stamps = domain.dataset["time"].dt.strftime("%Y-%m-%d").values[rows]
            rows = rows[(stamps >= scenario.period.start) & (stamps <= scenario.period.end)][:: scenario.period.every]
        if not len(rows):
            raise BadInput(f"scenario {scenario.title!r}: no held-out day lies in the period")
        condition = dict(domain.conditions(rows))
        axis = domain.dataset[domain.item].values[rows] if domain.item in domain.dataset.coords else rows
        return condition, {domain.item: (domain.item, axis)}
    if domain.item != "time":
        raise BadInput(
            f"scenario {scenario.title!r}: background: a file holds days, but the samples of {domain.name} lie along {domain.item}"
            " and have no place; expected held_out: true"
        )
    path = inside(folder, scenario.background.file or "")
    names = {name: {"name": name, "units": quantity.units} for name, quantity in domain.quantities.items()}
    period = (scenario.period.start, scenario.period.end) if scenario.period else None
    coarse = sources.open_cf([path], names, period=period)
    want = tuple(cells // domain.background.factor for cells in domain.grid)
    condition = {}
    for name, quantity in domain.quantities.items():
        field = coarse[name][:: scenario.period.every if scenario.period else 1]
        if field.shape[1:] != want:
            raise BadInput(f"background {path.name}: {name}: expected a grid of {want[0]} x {want[1]} cells, got {field.shape[1:]}")
        values = field.values[np.ix_(np.arange(len(field)), *_blocks(domain, field, f"background {path.name}"))].astype(np.float32)
        if not np.isfinite(values).all():
            raise BadInput(f"background {path.name}: {name}: {int((~np.isfinite(values)).sum())} values are missing, expected none")
        condition[f"coarse_{name}"] = np.maximum(values, quantity.lower) if np.isfinite(quantity.lower) else values
    time = coarse["time"][:: scenario.period.every if scenario.period else 1]
    if domain.season:
        condition["day_of_year"] = _days(time)
    return condition, {"time": ("time", time.values)}


def _blocks(domain: "Climate", field: xr.DataArray, where: str) -> list[np.ndarray]:
    """Rows and columns of a coarse field `[time, y, x]`, in the order of the blocks of the domain's grid.

    Longitudes may differ by whole turns. An axis of plain cell numbers, there or here, says nothing and is taken as it comes.

    Raises:
      BadInput: the cells lie elsewhere than the blocks.
    """
    assert domain.background
    found = []
    for ours, theirs in zip(domain.dims, field.dims[1:], strict=True):
        fine, given = domain.dataset[ours], field[theirs]
        order = np.arange(given.size)
        if _numbered(fine) or _numbered(given):
            found.append(order)
            continue
        turns = ours == domain.dims[1] and str(fine.attrs.get("units", "")).startswith("degree")
        centres, at = fine.values.astype(np.float64), given.values.astype(np.float64)
        centres = np.unwrap(centres, period=360) if turns else centres
        blocks = centres.reshape(-1, domain.background.factor).mean(1)
        cell = domain.background.factor * float(np.median(np.abs(np.diff(centres))))
        if turns:
            order = np.argsort((at - blocks[0] + cell / 2) % 360, kind="stable")
        apart = at[order] - blocks
        apart = np.abs((apart + 180) % 360 - 180 if turns else apart).max()
        if not apart <= MISPLACED * cell:
            raise BadInput(
                f"{where}: {theirs}: expected the centres of the model's blocks, {blocks[0]:.6g} to {blocks[-1]:.6g},"
                f" got {at[0]:.6g} to {at[-1]:.6g}, up to {apart:.3g} apart"
            )
        found.append(order)
    return found


def _numbered(axis: xr.DataArray) -> bool:
    """Whether an axis only counts its cells."""
    return not axis.attrs.get("units") and np.array_equal(axis.values, np.arange(axis.size))


def _days(time: xr.DataArray) -> np.ndarray:
    """Day of the year, 0 at its start, `[time]`."""
    return (means.YEAR * sources.day_of_year(time)).astype(np.float32)


def _imposed(domain: "Climate", impose: Impose, condition: Condition) -> tuple[float, Callable[[Sample], Array], np.ndarray]:
    """Sign, area mean and the threshold of each item `[item]`, from training days of the season.

    Where a sample is several days in a row, the mean is that of all of them, and so are those that make the threshold.
    """
    if impose.variable not in domain.quantities:
        raise BadInput(f"impose: variable {impose.variable!r}: expected one of {', '.join(domain.quantities)}")
    weights = box_weights(domain, impose.box)
    rows = domain.starts("train")
    daily = (domain.dataset[impose.variable].values[domain.days(rows)] * weights).sum((1, 2))
    series = daily.reshape(len(rows), domain.window).mean(1)
    above = impose.above_quantile is not None
    level = np.float64(impose.above_quantile if above else impose.below_quantile)
    if domain.season:
        recorded = _days(domain.dataset["time"][rows])
        wanted = np.asarray(condition["day_of_year"])
        seasons = means.days_apart(recorded[None], wanted[:, None]) <= means.SEASON
        threshold = np.array([np.quantile(series[season], level) if season.any() else np.nan for season in seasons])
        if not np.isfinite(threshold).all():
            raise BadInput(
                f"impose: no training day lies within {means.SEASON} days of day {wanted[~np.isfinite(threshold)][0]:.0f} of the year"
            )
    else:
        threshold = np.full(len(next(iter(condition.values()))), np.quantile(series, level))
    sign = 1.0 if above else -1.0
    return sign, lambda sample: jnp.sum(sample[impose.variable] * weights) / domain.window, threshold.astype(np.float32)


def box_weights(domain: "Climate", box: Box) -> np.ndarray:
    """Area weights of the cells whose centres lie in the box, summing to one, `[y, x]`. Raises BadInput."""
    latitude, longitude = positions(domain)
    west, east = box.lon
    across = (longitude - west) % 360 <= (east - west) % 360 if (east - west) % 360 else np.ones_like(longitude, bool)
    chosen = (latitude >= box.lat[0]) & (latitude <= box.lat[1]) & across
    if not chosen.any():
        raise BadInput(f"box lat {list(box.lat)} lon {list(box.lon)}: no cell of the grid lies in it")
    weights = np.where(chosen, domain.weights, 0.0)
    return (weights / weights.sum()).astype(np.float32)


def positions(domain: "Climate") -> tuple[np.ndarray, np.ndarray]:
    """Latitude and longitude of every cell, degrees, `[y, x]`. Raises BadInput where the data has none."""
    data = domain.dataset
    lat, lon = (sources.coordinate_of(data, kind) for kind in ("latitude", "longitude"))
    if lat and lon:
        if data[lat].ndim == 2:
            return data[lat].values, data[lon].values
        latitude, longitude = np.meshgrid(data[lat].values, data[lon].values, indexing="ij")
        return latitude, longitude
    raise BadInput(f"{domain.name}: the data has no latitude and longitude in degrees, so no place can be named")


def _observed(domain: "Climate", observe: Observe) -> tuple[Callable[[Sample], Array], float, float]:
    if observe.variable not in domain.quantities:
        raise BadInput(f"observe: variable {observe.variable!r}: expected one of {', '.join(domain.quantities)}")
    latitude, longitude = positions(domain)
    closeness = _closeness(observe.lat, observe.lon, latitude, longitude)
    y, x = map(int, np.unravel_index(np.argmax(closeness), closeness.shape))
    near = (slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
    beside = _closeness(latitude[y, x], longitude[y, x], latitude[near], longitude[near])
    if closeness[y, x] < beside.min() - 1e-9:  # further than the cells around that one
        raise BadInput(
            f"observe: {observe.variable} at {observe.lat:g} N, {observe.lon:g} E: outside the grid, its nearest cell lies at"
            f" {latitude[y, x]:.4g} N, {longitude[y, x]:.4g} E"
        )
    return lambda sample: sample[observe.variable][..., y, x], observe.value, observe.error


def _closeness(lat: float, lon: float, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Cosine of the angle at the Earth's centre between a place and others, in degrees."""
    here, there = np.deg2rad(lat), np.deg2rad(latitude)
    return np.sin(here) * np.sin(there) + np.cos(here) * np.cos(there) * np.cos(np.deg2rad(longitude - lon))


def _constraints(domain: "Climate", imposed: Sequence[Any], observed: Sequence[Any]) -> tuple[Any, Any]:
    """The two functions of a question: constraints while sampling, and how far a finished sample misses them."""
    if not imposed and not observed:
        return None, None

    def constrain(decode: Callable[[Target], Sample], condition: Condition) -> list[Constraint]:
        made: list[Constraint] = []
        if observed:
            values, errors = (jnp.repeat(jnp.array([each[i] for each in observed]), domain.window) for i in (1, 2))
            made.append(Observation(lambda target: jnp.stack([each[0](decode(target)) for each in observed]).ravel(), values, errors))
        for index, (sign, mean, _) in enumerate(imposed):
            threshold = sign * condition[f"threshold{index}"]

            def functional(target: Target, sign: float = sign, mean: Callable[[Sample], Array] = mean) -> Array:
                return sign * mean(decode(target))

            made.append(Exceedance(functional, threshold))
        return made

    def misses(sample: Sample, condition: Condition) -> Array:
        gaps = [sign * (condition[f"threshold{index}"] - mean(sample)) for index, (sign, mean, _) in enumerate(imposed)]
        gaps += [jnp.max(jnp.abs(of(sample) - value)) - 3 * error for of, value, error in observed]
        return jnp.maximum(jnp.max(jnp.stack(gaps)), 0.0)

    return constrain, misses


def _notes(domain: "Climate", scenario: ClimateScenario, condition: Condition) -> list[str]:
    notes = []
    if domain.window > 1:
        notes.append(
            f"{domain.window} days in a row are drawn together: each begins from the day before it. What follows after them is drawn anew."
        )
    elif not domain.background:
        notes.append("Each day is drawn on its own: statistics of single days hold, a sequence of days is no weather history.")
    if domain.forcing:
        low, high = _seen(domain)
        asked = np.asarray(condition[domain.forcing])
        farthest = float(asked[np.argmax(np.maximum(low - asked, asked - high))])
        if not low <= farthest <= high:
            if domain.forcing == SST:
                told = f"A warming of {farthest:+g} K lies outside the training data ({low:+g} to {high:+g} K)"
            else:
                seen = f"{low:g} to {_with_units(domain, high)}"
                told = f"{forcing_words(domain)[0]} = {_with_units(domain, farthest)} lies outside the training data ({seen})"
            notes.append(f"{told}: the mean response and the growth of the spread are extrapolated.")
    if scenario.observe:
        notes.append("An observation counts as kept when the drawn value lies within three standard errors of it.")
    return notes
