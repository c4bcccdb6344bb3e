"""What sensors of a city recorded: loop detectors and roadside air stations, read from files or made by a documented process.

A record is a dataset along a regular `time`: one variable a quantity, `[time]` or `[time, sensor]`, NaN where nothing was measured,
and weather `[time]` without a gap. Its attributes carry licence, source, gaps and inputs for the record of a run.
"""

import csv
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from domains.city import files
from domains.city.dispersion import photostationary
from twinsim.base import BadInput

FASTEST = 150.0  # mph; a loop that says more counts something else
MOST_VALUES = 100_000_000
MPH = 0.44704  # m/s
UNITS = {"nox": "ppb", "no2": "ppb", "o3": "ppb", "pm10": "ug m-3", "pm25": "ug m-3"}
WEATHER = {"ws": ("wind_speed", "m s-1"), "wd": ("wind_from", "degree")}


def loops(path: str | None = None, start: str = "2012-03-01T00:00", step_minutes: int = 5, licence: str = "not stated") -> xr.Dataset:
    """Speeds of loop detectors, mph, `[time, sensor]`: of a CSV file, or of the synthetic corridor where none is named.

    The file has one column a sensor, named in its first line, and one line a time step; 0 and empty mean missing. A first column `time`
    holds ISO times; without one the first line is of `start`, and each following one `step_minutes` later.

    Raises:
      BadInput: a file that is not so, a speed below 0 or above 150 mph, or a sensor without a single value.
    """
    if path is None:
        return corridor()
    names, rows = _table(path)
    if names[0] == "time":
        names, times = names[1:], _times(path, [row[0] for row in rows])
        rows = [row[1:] for row in rows]
    else:
        times = np.datetime64(start, "ns") + np.arange(len(rows)) * np.timedelta64(step_minutes, "m")
    speed = _numbers(path, names, rows)
    with np.errstate(invalid="ignore"):
        wrong = np.argwhere((speed < 0) | (speed > FASTEST))
    if len(wrong):
        line, column = wrong[0]
        raise BadInput(
            f"{path} line {line + 2}: sensor {names[column]}: expected a speed of 0 (missing) to 150 mph, got {speed[line, column]:g}"
        )
    speed[speed == 0] = np.nan
    made = xr.Dataset({"speed": (("time", "sensor"), speed.astype(np.float32))}, {"time": times, "sensor": names})
    return _with_inputs(made, path, licence, f"loop detectors of {Path(path).name}")


def roadside(
    path: str | None = None, species: Sequence[str] = tuple(UNITS), licence: str = "UK AURN, Open Government Licence"
) -> xr.Dataset:
    """Hourly concentrations beside a road and the wind, `[time]`: of a CSV file, or of a synthetic street where none is named.

    The file has the columns date (ISO, one line an hour, in order), ws (m/s), wd (degrees, where the wind comes from) and the species; an
    empty value is missing, and so is a NOx of 0, with the NO2 beside it. Missing wind is that of the hour before.

    Raises:
      BadInput: a column is missing, times are not in order, a value is no number or negative, or a species has no value at all.
    """
    if unknown := [name for name in species if name not in UNITS]:
        raise BadInput(f"species {unknown[0]}: expected some of {', '.join(UNITS)}")
    if path is None:
        return street()[[*species, *(name for name, _ in WEATHER.values())]]
    names, rows = _table(path)
    wanted = ["date", *WEATHER, *species]
    if absent := [name for name in wanted if name not in names]:
        raise BadInput(f"{path} line 1: expected a column {absent[0]}, got {', '.join(names)}")
    times = _times(path, [row[names.index("date")] for row in rows])
    columns = wanted[1:]
    values = _numbers(path, columns, [[row[names.index(name)] for name in columns] for row in rows])
    with np.errstate(invalid="ignore"):
        if len(wrong := np.argwhere(values < 0)):
            line, column = wrong[0]
            raise BadInput(f"{path} line {line + 2}: {columns[column]}: expected at least 0, got {values[line, column]:g}")
    held = dict(zip(columns, values.T, strict=True))
    if "nox" in held:
        off = held["nox"] == 0  # beside a road there always is some: the analyser was off
        for name in set(held) & {"nox", "no2"}:
            held[name] = np.where(off, np.nan, held[name])
    lost = {name: int(np.isnan(held[name]).sum()) for name in WEATHER}
    data = {name: ("time", held[name].astype(np.float32), {"units": UNITS[name]}) for name in species}
    data |= {
        name: ("time", _held(path, column, held[column]).astype(np.float32), {"units": unit}) for column, (name, unit) in WEATHER.items()
    }
    made = xr.Dataset(data, {"time": times})
    told = f"wind of {lost['ws']} hours and wind direction of {lost['wd']} hours is that of the hour before"
    return _with_inputs(made, path, licence, f"roadside station of {Path(path).name}", told)


# ---------------------------------------------------------------- files


def _table(path: str) -> tuple[list[str], list[list[str]]]:
    """The names in the first line of a CSV file, and the other lines. Raises BadInput where they differ in length."""
    reader = csv.reader(files.lines(path))
    names = [name.strip() for name in next(reader, [])]
    if not names or len(set(names)) < len(names):
        raise BadInput(f"{path} line 1: expected the names of the columns, each once, got {', '.join(names)[:80] or 'nothing'}")
    rows: list[list[str]] = []
    for row in reader:
        if not row:
            continue
        if len(row) != len(names):
            raise BadInput(f"{path} line {len(rows) + 2}: expected {len(names)} values as in line 1, got {len(row)}")
        rows.append(row)
        if len(rows) * len(names) > MOST_VALUES:
            raise BadInput(f"{path}: expected at most {MOST_VALUES:,} values, got more; cut out some months first")
    if len(rows) < 2:
        raise BadInput(f"{path}: expected two time steps or more, got {len(rows)}")
    return names, rows


def _numbers(path: str, names: Sequence[str], rows: list[list[str]]) -> np.ndarray:
    """The values `[time, column]`, NaN where a field is empty. Raises BadInput where it is no number."""
    values = np.full((len(rows), len(names)), np.nan)
    for line, row in enumerate(rows):
        for column, text in enumerate(row):
            if text.strip() in ("", "NA", "NaN", "nan"):
                continue
            try:
                values[line, column] = float(text)
            except ValueError:
                raise BadInput(f"{path} line {line + 2}: {names[column]}: expected a number or nothing, got {text[:30]!r}") from None
    if len(infinite := np.argwhere(np.isinf(values))):
        raise BadInput(f"{path} line {infinite[0][0] + 2}: {names[infinite[0][1]]}: expected a finite number")
    return values


def _times(path: str, texts: Sequence[str]) -> np.ndarray:
    """ISO times of UTC. Raises BadInput where one cannot be read, or they do not rise by one step."""
    times = np.empty(len(texts), "datetime64[ns]")
    for line, text in enumerate(texts):
        try:
            times[line] = np.datetime64(text.strip().removesuffix("Z"), "ns")
        except ValueError:
            raise BadInput(f"{path} line {line + 2}: expected an ISO time such as 2004-01-31T14:00:00Z, got {text[:30]!r}") from None
    steps = np.diff(times)
    if len(wrong := np.flatnonzero((steps != steps[0]) | (steps <= np.timedelta64(0)))):
        line = int(wrong[0]) + 3
        raise BadInput(f"{path} line {line}: expected times in order, one step of {steps[0]} after the other, got {texts[line - 2]}")
    return times


def _held(path: str, name: str, values: np.ndarray) -> np.ndarray:
    """Each missing value replaced by the last one before it, or the first after. Raises BadInput where there is none."""
    there = np.flatnonzero(np.isfinite(values))
    if not len(there):
        raise BadInput(f"{path}: {name}: expected values, all are missing")
    return values[there[np.maximum(np.searchsorted(there, np.arange(len(values)), "right") - 1, 0)]]


def _with_inputs(made: xr.Dataset, path: str, licence: str, source: str, told: str = "") -> xr.Dataset:
    raw = Path(path).read_bytes()
    entry = {"name": Path(path).name, "place": str(path), "licence": licence, "sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    return made.assign_attrs(inputs=json.dumps([entry]), license=licence, source=source, gaps=told)


def _made(data: Mapping, coords: Mapping, source: str) -> xr.Dataset:
    """A synthetic record, whose digest is that of its values."""
    made = xr.Dataset(dict(data), dict(coords))
    raw = b"".join(made[name].values.tobytes() for name in sorted(map(str, made.data_vars)))
    place, licence = f"{__name__.replace('.', '/')}.py", "Apache-2.0"
    entry = {"name": source, "place": place, "licence": licence, "sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    return made.assign_attrs(inputs=json.dumps([entry]), license=licence, source=source, gaps="made on purpose")


# ---------------------------------------------------------------- a synthetic corridor

CELL, TICK = 500.0, 12.0  # m, s: CELL / TICK is above the free speed, as the scheme wants
FREE, BACK, JAM = 29.0, 5.5, 0.45  # m/s, m/s, veh/m: triangular fundamental diagram of three lanes
CAPACITY = JAM * FREE * BACK / (FREE + BACK)  # veh/s


@functools.cache
def corridor(days: int = 21, sensors: int = 24, seed: int = 0) -> xr.Dataset:
    """Speeds every 5 min along a synthetic motorway of 12 km: queues grow at a lane drop and behind incidents, and travel upstream.

    The cell transmission model (Daganzo 1994, Transp. Res. B 28, 269) with a triangular fundamental diagram; demand of two peaks on
    workdays and one wide hump at weekends, each day and hour of its own strength; a lane drop of 12 % at three quarters of the way, an
    on-ramp before it; on three days of four one incident of 15 to 60 min that takes a third to two thirds of the capacity of its place.
    A loop measures the speed of its cell with an error; loops fall out for single steps (1 %) and for hours (2 %).
    """
    draw = np.random.default_rng(seed)
    ticks, per_step = int(86400 / TICK), int(300 / TICK)
    hour = (np.arange(ticks) * TICK / 3600)[None]  # [1, tick]
    start = np.datetime64("2012-03-05T00:00", "ns")  # a Monday
    weekend = (np.arange(days) % 7 >= 5)[:, None]
    bump = lambda at, width: np.exp(-0.5 * ((hour - at) / width) ** 2)  # noqa: E731
    shift = draw.normal(0, 0.15, (days, 1))
    workday = 0.12 + 0.72 * bump(7.8 + shift, 1.1) + 0.55 * bump(13, 3.0) + 0.80 * bump(17.3 + shift, 1.4)
    leisure = 0.10 + 0.68 * bump(14.5 + shift, 3.5)
    waver = np.repeat(draw.normal(0, 0.05, (days, 96)), ticks // 96, axis=1)  # a quarter of an hour each
    demand = CAPACITY * np.where(weekend, leisure, workday) * draw.normal(1.0, 0.05, (days, 1)) * (1 + waver)
    ramp_at, drop_at = int(0.6 * sensors), int(0.75 * sensors)
    capacity = np.full((days, sensors), CAPACITY)
    capacity[:, drop_at] *= 0.88
    happens = draw.random(days) < 0.75
    where, when = draw.integers(2, sensors, days), draw.uniform(6, 20, days)
    lasts, takes = draw.uniform(0.25, 1.0, days), draw.uniform(1 / 3, 2 / 3, days)

    density = np.zeros((days, sensors))
    queue = np.zeros(days)  # vehicles that wait to enter
    speed = np.zeros((days, ticks // per_step, sensors))
    for tick in range(ticks):
        now = hour[0, tick]
        blocked = happens & (now >= when) & (now < when + lasts)
        most = capacity.copy()
        most[np.flatnonzero(blocked), where[blocked]] *= 1 - takes[blocked]
        sending = np.minimum(FREE * density, most)
        receiving = np.minimum(BACK * (JAM - density), most)
        queue += 0.85 * demand[:, tick] * TICK
        enters = np.minimum(queue / TICK, receiving[:, 0])
        queue -= enters * TICK
        ramp = np.minimum(0.15 * demand[:, tick], receiving[:, ramp_at])
        onward = np.minimum(sending[:, :-1], receiving[:, 1:])
        onward[:, ramp_at - 1] = np.minimum(onward[:, ramp_at - 1], receiving[:, ramp_at] - ramp)
        arrives = np.concatenate([enters[:, None], onward], 1)
        leaves = np.concatenate([onward, sending[:, -1:]], 1)
        arrives[:, ramp_at] += ramp
        speed[:, tick // per_step] += np.where(density > 1e-4, leaves / np.maximum(density, 1e-4), FREE) / per_step
        density = np.clip(density + TICK / CELL * (arrives - leaves), 0.0, JAM)
    speed = np.minimum(speed, FREE) * draw.normal(1.0, 0.02, sensors) / MPH
    noisy = np.maximum(speed * draw.normal(1.0, 0.015, speed.shape) + draw.normal(0, 0.8, speed.shape), 1.0)
    measured = noisy.reshape(-1, sensors)
    lost = draw.random(measured.shape) < 0.01
    for _ in range(int(0.02 * measured.size / 24)):  # two hours each
        row, sensor = draw.integers(0, len(measured) - 24), draw.integers(0, sensors)
        lost[row : row + 24, sensor] = True
    measured[lost] = np.nan
    names = [f"km {CELL / 1e3 * (sensor + 0.5):g}" for sensor in range(sensors)]
    times = start + np.arange(len(measured)) * np.timedelta64(300, "s")
    data = {"speed": (("time", "sensor"), measured.astype(np.float32), {"units": "mph"})}
    return _made(data, {"time": times, "sensor": names}, "synthetic motorway corridor, cell transmission model")


# ---------------------------------------------------------------- a synthetic street


@functools.cache
def street(days: int = 3 * 365, seed: int = 0) -> xr.Dataset:
    """Hours beside a synthetic street canyon: NOx, NO2, O3, PM10 and PM2.5 from traffic, wind and season.

    Traffic has its hours and weekdays. What it adds is its emission over the wind, and more where the wind from 180 degrees blows over the
    street's southern roofs, whose vortex carries the exhaust to the station. The city's own air is a slow random process that stagnant
    winter air raises; ozone follows the season and the hour; NO2 is photostationary (`dispersion.photostationary`), with 12 % emitted as
    such. Particles: traffic, a random regional part, and wear; PM2.5 is a share of PM10. Some hours and some days are missing.
    """
    draw = np.random.default_rng(seed)
    hours = 24 * days
    times = np.datetime64("1998-01-01T00:00", "ns") + np.arange(hours) * np.timedelta64(1, "h")
    hour, day = np.arange(hours) % 24, np.arange(hours) // 24
    weekday = (day + 3) % 7  # the first day is a Thursday
    season = np.cos(2 * np.pi * (day - 15) / 365.25)  # 1 in mid January
    slow = lambda memory: _autoregressive(draw, hours, memory)  # noqa: E731
    wind = np.exp(np.log(3.6) + 0.15 * season + 0.45 * slow(18.0) + 0.12 * np.cos(2 * np.pi * (hour - 14) / 24))
    wind_from = (225 + 65 * slow(30.0)) % 360
    bump = lambda at, width: np.exp(-0.5 * ((hour - at) / width) ** 2)  # noqa: E731
    workday = 0.25 + 0.75 * (bump(8, 1.5) + bump(13, 4) + 0.9 * bump(18, 2)).clip(0, 1.1)
    weekend = 0.35 + 0.5 * bump(15, 4.5)
    traffic = np.where(weekday == 6, 0.85 * weekend, np.where(weekday == 5, weekend, workday)) * np.exp(0.08 * slow(3.0))
    canyon = 1.0 + 0.8 * np.cos(np.deg2rad(wind_from - 180))
    added = 260.0 * traffic * canyon / (0.6 + 0.35 * wind) * np.exp(0.15 * slow(2.0))  # ppb NOx
    background = np.exp(np.log(22) + 0.35 * season + 0.6 * slow(24.0) - 0.35 * np.log(wind / 3.6))
    nox = added + background
    sun = np.maximum(np.cos(2 * np.pi * (hour - 12.5) / 24) + 0.15 - 0.35 * season, 0)
    ozone = np.maximum(27 - 7 * season + 9 * sun + 7 * slow(20.0) + 3 * np.log(wind / 3.6), 1)  # of the country's air, ppb
    oxidant = ozone + 0.12 * added + 0.5 * np.minimum(background, 20)
    no2 = np.asarray(photostationary(nox.astype(np.float32), oxidant.astype(np.float32), (8e-3 * np.minimum(sun, 1)).astype(np.float32)))
    no2 = np.minimum(no2, nox)
    regional = np.exp(np.log(14) + 0.15 * season + 0.45 * slow(40.0))
    pm10 = regional + 0.055 * added + 4 * traffic
    pm25 = pm10 * np.clip(0.62 + 0.06 * slow(20.0), 0.2, 0.95)
    values = {"nox": nox, "no2": no2, "o3": np.maximum(oxidant - no2, 0), "pm10": pm10, "pm25": pm25}
    data = {}
    for name, value in values.items():
        noisy = np.maximum(value * draw.normal(1, 0.02, hours), 0).astype(np.float32)
        data[name] = noisy
    data["no2"] = np.minimum(data["no2"], data["nox"])
    gone = draw.random((hours, len(UNITS))) < 0.01
    for _ in range(days // 40):
        first, which = draw.integers(0, hours - 48), draw.integers(0, len(UNITS))
        gone[first : first + 48, which] = True
    held = {
        name: ("time", np.where(gone[:, i], np.nan, data[name]).astype(np.float32), {"units": UNITS[name]}) for i, name in enumerate(UNITS)
    }
    held["wind_speed"] = ("time", wind.astype(np.float32), {"units": "m s-1"})
    held["wind_from"] = ("time", wind_from.astype(np.float32), {"units": "degree"})
    return _made(held, {"time": times}, "synthetic street canyon, traffic and photostationary chemistry")


def _autoregressive(draw: np.random.Generator, steps: int, memory: float) -> np.ndarray:
    """A Gaussian process of unit variance whose correlation falls by e in `memory` steps."""
    share = np.exp(-1 / memory)
    noise = draw.normal(size=steps) * np.sqrt(1 - share**2)
    noise[0] = draw.normal()
    out = np.empty(steps)
    last = 0.0
    for step in range(steps):
        last = share * last + noise[step]
        out[step] = last
    return out
