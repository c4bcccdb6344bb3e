"""Recorded days of traffic demand: vehicles between zones in each part of the day, read from a file or simulated for a made-up city.

The simulated record is no real city's. It is drawn from a process with what such records show: purposes that gravity distributes, a
week, districts whose attraction wanders from day to day, market days, rain that moves people into cars, and counts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from domains.city import demand
from domains.city.place import Place, input_of
from twinsim.base import BadInput


class Period(NamedTuple):
    """A part of the day, from the beginning of one hour to that of another."""

    name: str
    first: int
    last: int

    @property
    def hours(self) -> np.ndarray:
        """The hours of the day it has, `[hour]`."""
        return np.arange(self.first, self.last + 24 * (self.last <= self.first)) % 24

    @property
    def label(self) -> str:
        return f"{self.name} {self.first}-{self.last} h"


PERIODS = (Period("morning", 7, 9), Period("day", 9, 16), Period("evening", 16, 19), Period("night", 19, 7))
LENGTHS = np.array([len(period.hours) for period in PERIODS], float)  # h
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

# The simulated record. All of it is assumed, none is fitted to any city.
DETERRENCE = demand.Deterrence("exponential", 0.18)  # 1/min of empty roads
ERRANDS = np.array([0.97, 1.0, 1.0, 1.02, 1.1, 1.0, 0.8])  # by weekday, times those of demand.trip_ends
CITY_SPREAD, CITY_MEMORY = 0.03, 0.6  # of the logarithm of all trips; its correlation from a day to the next
PULL_SPREAD = {"work": 0.04, "school": 0.03, "other": 0.12}  # of a district's attraction
PULL_MEMORY = 0.5
MARKET_DAYS, MARKET = 0.02, 2.0  # share of a district's days on which its errands are so many times as many
PERIOD_SPREAD = 0.03  # of each part of the day
WET_AFTER = {False: 0.22, True: 0.55}  # probability of rain by whether it rained the day before
RAIN = 5.0  # mm on a wet day, mean of an exponential
WET_ERRANDS, WET_HALF_WAY = 0.92, 0.85  # errands left on a wet day; the distance at which half of all drive, shorter


def simulated(place: Place, start: str = "2023-01-01", days: int = 730, seed: int = 0) -> xr.Dataset:
    """A record of `days` days: vehicles `[day, period, origin, destination]` and rain, mm. Raises BadInput."""
    if not 14 <= days <= 20_000:
        raise BadInput(f"days: expected 14 to 20000 of them, got {days}")
    network = place.network
    if network.population is None or network.jobs is None:
        raise BadInput("days: expected a network whose zones have people and jobs")
    random = np.random.default_rng(seed)
    date = np.datetime64(start, "D") + np.arange(days)
    weekday = weekday_of(date)
    minutes = place.free_cost / 60
    usual = {
        purpose: _without_diagonal(demand.gravity(production, attraction, minutes, DETERRENCE, "production"))
        for purpose, (production, attraction) in demand.trip_ends(network.population, network.jobs).items()
    }
    profile = {(purpose, kind): _by_period(purpose, kind) for purpose in usual for kind in ("weekday", "weekend")}
    rain = _rain(random, days)
    city = np.exp(_wander(random, (days,), CITY_SPREAD, CITY_MEMORY))
    pull = {purpose: np.exp(_wander(random, (days, network.zones), PULL_SPREAD[purpose], PULL_MEMORY)) for purpose in usual}
    pull["other"] *= np.where(random.random((days, network.zones)) < MARKET_DAYS, MARKET, 1.0)
    busy = np.exp(PERIOD_SPREAD * random.standard_normal((days, len(PERIODS))))
    trips = np.empty((days, len(PERIODS), network.zones, network.zones), np.float32)
    for day in range(days):
        kind = "weekend" if weekday[day] >= 5 else "weekday"
        wet = rain[day] > 0
        people = np.zeros(trips.shape[1:])
        for purpose, ways in usual.items():
            often = demand.WEEKEND_FACTOR[purpose] if kind == "weekend" else 1.0
            often *= ERRANDS[weekday[day]] * (WET_ERRANDS if wet else 1.0) if purpose == "other" else 1.0
            out = often * ways * pull[purpose][day]
            there, back = profile[purpose, kind]
            people += there[:, None, None] * out + back[:, None, None] * out.T
        share = {"half_way": demand.HALF_WAY * (WET_HALF_WAY if wet else 1.0)}
        vehicles = sum(demand.vehicles(people, place.distance, **share).values())
        trips[day] = random.poisson(vehicles * city[day] * busy[day][:, None, None])
    return _record(trips, rain, date, place, f"simulated for {place.source}", "CC0-1.0")


def recorded(place: Place, path: str, licence: str = "not stated") -> xr.Dataset:
    """A record from a NetCDF file: `trips` (time, period, origin, destination), vehicles; `rain` (time), mm, if any. Raises BadInput.

    What has names, `period`, `origin` or `destination`, is put in the order of this city's by them; what has none is in that order.
    Trips within a zone use no link: they are left out, and the record's source says how many.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{path}: expected a NetCDF file with recorded trips, found nothing")
    try:
        with xr.open_dataset(file, engine="netcdf4") as opened:
            record = opened.load()
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected a NetCDF file, got: {error}") from None
    zones = place.network.zones
    expected = {"period": len(PERIODS), "origin": zones, "destination": zones}
    if "trips" not in record or record["trips"].dims != ("time", *expected):
        raise BadInput(f"{path}: expected a variable trips (time, {', '.join(expected)}), got {dict(record.sizes)}")
    for name, size in expected.items():
        if record.sizes[name] != size:
            raise BadInput(f"{path}: expected {size} along {name}, got {record.sizes[name]}")
        if name in record.coords:
            record = record.isel({name: _order(path, name, record[name].values, place)})
    if "time" not in record.coords or record["time"].dtype.kind != "M" or np.isnat(record["time"].values).any():
        raise BadInput(f"{path}: expected a coordinate time of dates, as CF has them (days since 2023-01-01), got none")
    trips = record["trips"].values.astype(np.float32)
    wrong = np.argwhere(~(np.isfinite(trips) & (trips >= 0)))
    if len(wrong):
        day, period, origin, destination = wrong[0]
        names = f"from {place.zone_name[origin]} to {place.zone_name[destination]}"
        raise BadInput(
            f"{path}: trips {names} on {str(record['time'].values[day])[:10]}, {PERIODS[period].label}: expected 0 or more, got "
            f"{trips[tuple(wrong[0])]}"
        )
    rain = record["rain"].values.astype(float) if "rain" in record else np.zeros(len(trips))
    if rain.shape != (len(trips),) or not (np.isfinite(rain) & (rain >= 0)).all():
        raise BadInput(f"{path}: expected rain (time) of 0 mm or more")
    within = float(np.einsum("dpzz->", trips.astype(float)))
    source = f"recorded in {file.name}" + (
        f", without the {within:,.0f} of {trips.sum(dtype=float):,.0f} trips within zones" if within else ""
    )
    made = _record(_without_diagonal(trips), rain, record["time"].values.astype("datetime64[D]"), place, source, licence)
    return made.assign_attrs(inputs=[input_of(file, licence)])


def _order(path: str, name: str, found: np.ndarray, place: Place) -> list[int]:
    """Where the city's periods or zones stand among those found. Raises BadInput."""
    wanted = [period.name for period in PERIODS] if name == "period" else list(place.zone_name)
    names = [str(each) for each in found]
    if sorted(names) != sorted(wanted):
        odd = next((each for each in names if each not in wanted or names.count(each) > 1), "")
        raise BadInput(
            f"{path}: {name}: expected {', '.join(wanted[:5])}{', ...' * (len(wanted) > 5)}, each once, or no names, got {odd!r}"
        )
    return [names.index(each) for each in wanted]


def _record(trips: np.ndarray, rain: np.ndarray, date: np.ndarray, place: Place, source: str, licence: str) -> xr.Dataset:
    attrs: Mapping[str, Any] = {"source": source, "license": licence, "inputs": []}
    return xr.Dataset(
        {
            "trips": (("time", "period", "origin", "destination"), trips, {"units": "1", "long_name": "vehicles that set out"}),
            "rain": ("time", rain.astype(np.float32), {"units": "mm", "long_name": "rain of the day"}),
        },
        {"time": date.astype("datetime64[ns]"), "period": [period.name for period in PERIODS], "origin": list(place.zone_name)},
        attrs,
    )


def weekday_of(dates: np.ndarray) -> np.ndarray:
    """0 for Monday to 6 for Sunday, `[...]`."""
    return (np.asarray(dates).astype("datetime64[D]").astype(int) + 3) % 7  # 1970-01-01 was a Thursday


def _by_period(purpose: str, kind: demand.Day) -> tuple[np.ndarray, np.ndarray]:
    """Share of the day's departures out and back in each period, `[period]`."""
    out, back = demand.departures(purpose, kind)
    there, again = (np.array([hours[period.hours].sum() for period in PERIODS]) for hours in (out, back))
    return there, again


def _without_diagonal(trips: np.ndarray) -> np.ndarray:
    """Ways within a zone use no link and are left out; `[..., zone, zone]`."""
    return trips * (1 - np.eye(trips.shape[-1], dtype=trips.dtype))


def _rain(random: np.random.Generator, days: int) -> np.ndarray:
    """mm a day, `[day]`: a chain of wet and dry days, exponential amounts on wet ones."""
    draw, amount = random.random(days), random.exponential(RAIN, days)
    rain = np.zeros(days)
    for day in range(days):
        if draw[day] < WET_AFTER[bool(day and rain[day - 1] > 0)]:
            rain[day] = amount[day]
    return rain


def _wander(random: np.random.Generator, shape: tuple[int, ...], spread: float, memory: float) -> np.ndarray:
    """A Gaussian autoregression along the first axis, of standard deviation `spread`."""
    new = random.standard_normal(shape)
    for day in range(1, shape[0]):
        new[day] = memory * new[day - 1] + np.sqrt(1 - memory**2) * new[day]
    return spread * new
