"""What a city scenario comes to: the data set, the indicators before and after with their ranges over days, and the part of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from domains.city import exposure, outputs
from domains.city.days import LENGTHS, PERIODS
from domains.city.interventions import CONDITION
from twinsim.base import Question, Sample, Section

if TYPE_CHECKING:
    from domains.city.domain import CityTwin

CASES = ("base", "scenario")
Ranges = Mapping[str, Mapping[str, tuple[float, float, float]]]  # of each indicator, as `ranges` gives them
RANGE = (5.0, 95.0)  # per cent of the sampled days
BUSY = 0.9  # of its capacity: from here on a road is said to be full
LEAST_CHANGE = 0.1  # ug/m3: less is neither better nor worse
RESAMPLES = 400

# name in the draws -> name, dims, units and meaning in the data set
WRITTEN: Mapping[str, tuple[str, tuple[str, ...], str, str]] = {
    "flow": ("flow", ("case", "period", "link"), "h-1", "vehicles an hour"),
    "time": ("travel_time", ("case", "period", "link"), "s", "travel time over a link"),
    "cost": ("trip_cost", ("case", "zone"), "s", "time and charges of a trip from a zone, mean of the day"),
    "car_trips": ("car_trips", ("case", "zone"), "1", "vehicles that leave a zone in a day"),
    "gap": ("gap", ("case",), "1", "relative gap of the equilibrium, worst part of the day"),
    "unsettled": ("unsettled", ("case",), "1", "last change of demand in its answer to cost, relative"),
    "emitted_CO2": ("CO2", ("case", "road"), "kg d-1", "CO2 emitted on a road"),
    "emitted_NOx": ("NOx", ("case", "road"), "kg d-1", "NOx emitted on a road, as NO2"),
    "emitted_PM2.5": ("PM2_5", ("case", "road"), "kg d-1", "PM2.5 emitted on a road, wear included"),
    "emitted_PM10": ("PM10", ("case", "road"), "kg d-1", "PM10 emitted on a road, wear included"),
    "air_NOx": ("air_NOx", ("case", "receptor"), "ug m-3", "NOx in the air, as NO2, mean of the day"),
    "air_NO2": ("air_NO2", ("case", "receptor"), "ug m-3", "NO2 in the air, mean of the day"),
    "air_PM2.5": ("air_PM2_5", ("case", "receptor"), "ug m-3", "PM2.5 in the air, mean of the day"),
    "air_PM10": ("air_PM10", ("case", "receptor"), "ug m-3", "PM10 in the air, mean of the day"),
}
AIR = {"NO2": "air_NO2", "PM2.5": "air_PM2_5", "PM10": "air_PM10"}


def dataset_of(twin: "CityTwin", samples: Sample, question: Question) -> xr.Dataset:
    """Draws `[member, 1, ...]` with names, units and coordinates; days of demand alone where no scenario was simulated."""
    place, network = twin.place, twin.place.network
    lead = ("member", "time")
    data: dict[str, Any] = {}
    for name, variable in twin.sample.items():
        attrs = {"units": variable.units, "long_name": f"synthetic {variable.long_name}"}
        data[name] = ((*lead, *variable.dims), np.asarray(samples[name]), attrs)
    for name, (written, dims, units, meaning) in WRITTEN.items():
        if name in samples:
            data[written] = ((*lead, *dims), np.asarray(samples[name]), {"units": units, "long_name": f"synthetic {meaning}"})
    members = len(np.asarray(samples[next(iter(samples))]))
    zone = list(place.zone_name)
    coords: dict[str, Any] = {
        "member": ("member", np.arange(members), {"standard_name": "realization", "long_name": "sampled day", "units": "1"}),
        **question.coords,
        "origin": zone,
        "destination": zone,
    }
    if "flow" in samples:
        metres = {"units": "m", "long_name": "length"}
        free_speed, capacity = (np.asarray(question.condition[f"{CONDITION}{name}"][0], float) for name in ("free_speed", "capacity"))
        coords |= {
            "case": list(CASES),
            "period": [period.name for period in PERIODS],
            "hours": ("period", LENGTHS, {"units": "h", "long_name": "length of the part of the day"}),
            "link": network.link_id,
            "street": ("link", network.name),
            "from_node": ("link", network.node_id[network.start]),
            "to_node": ("link", network.node_id[network.end]),
            "length": ("link", network.length, metres),
            "free_time": (
                ("case", "link"),
                network.length / free_speed + place.delay,
                {"units": "s", "long_name": "travel time when empty"},
            ),
            "capacity": (("case", "link"), capacity, {"units": "h-1", "long_name": "vehicles an hour that pass; 0 where closed"}),
            "road": network.link_id[place.roads],
            "zone": zone,
            "x": ("receptor", place.receptors[:, 0], {"units": "m", "standard_name": "projection_x_coordinate"}),
            "y": ("receptor", place.receptors[:, 1], {"units": "m", "standard_name": "projection_y_coordinate"}),
            "people": ("receptor", place.people, {"units": "1", "long_name": "people who live there"}),
        }
    return xr.Dataset(data, coords)


# ---------------------------------------------------------------- indicators


def indicators(twin: "CityTwin", dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """Name with unit -> value of each sampled day before and after, `[day, case]`.

    Delay is what roads take longer than when empty, and full is what is full, by the limits and lanes of the same case.
    """
    network, roads = twin.place.network, twin.place.roads
    flow, time = (dataset[name].values[:, 0][..., roads] for name in ("flow", "travel_time"))  # [day, case, period, road]
    hours, length = LENGTHS[:, None], network.length[roads]
    # of the same case, [case, 1, road]: who keeps to a lower limit is not held up by it
    free, capacity = (dataset[name].values[:, None, roads] for name in ("free_time", "capacity"))
    kilometres = (flow * hours * length / 1000).sum((-1, -2))
    spent = (flow * hours * time / 3600).sum((-1, -2))
    full = (flow * hours * length / 1000 * (flow > BUSY * capacity)).sum((-1, -2))
    found = {
        "car and goods trips": dataset["car_trips"].values[:, 0].sum(-1),
        "vehicle kilometres": kilometres,
        "vehicle hours": spent,
        "hours of delay": (flow * hours * np.maximum(time - free, 0) / 3600).sum((-1, -2)),
        "mean speed, km/h": kilometres / np.maximum(spent, 1e-12),
        "kilometres on full roads, %": 100 * full / np.maximum(kilometres, 1e-12),
        "CO2, t": dataset["CO2"].values[:, 0].sum(-1) / 1000,
        "NOx, kg": dataset["NOx"].values[:, 0].sum(-1),
        "PM2.5, kg": dataset["PM2_5"].values[:, 0].sum(-1),
        "PM10, kg": dataset["PM10"].values[:, 0].sum(-1),
    }
    people = twin.place.people
    for name, variable in AIR.items():
        found[f"{name} that people breathe, ug/m3"] = np.asarray(exposure.population_mean(dataset[variable].values[:, 0], people))
    return found


def ranges(values: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Mean, low and high over the sampled days of "base", "scenario", "change" and, in %, "relative"; of `[day, case]`."""
    base, after = values[:, 0], values[:, 1]
    relative = 100 * (after - base) / np.where(base == 0, np.inf, base)
    parts = {"base": base, "scenario": after, "change": after - base, "relative": relative}
    spans = {name: np.percentile(part, RANGE) for name, part in parts.items()}
    return {name: (float(part.mean()), float(spans[name][0]), float(spans[name][1])) for name, part in parts.items()}


def above_limits(twin: "CityTwin", dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """People whose mean over the days is above a limit: limit in words -> `[resample, case]`, the first of which is of all days."""
    people = twin.place.people
    days = dataset.sizes["member"]
    random = np.random.default_rng(0)
    chosen = np.concatenate([np.arange(days)[None], random.integers(0, days, (RESAMPLES, days))])
    count = np.stack([np.bincount(row, minlength=days) for row in chosen]) / days
    found = {}
    for name in ("NO2", "PM2.5"):
        mean = np.einsum("sd,dcr->scr", count, dataset[AIR[name]].values[:, 0].astype(float))
        for words, limit in exposure.LIMITS[name].items():
            found[f"{name} above {limit:g} ug/m3 ({words})"] = ((mean > limit) * people).sum(-1)
    return found


# ---------------------------------------------------------------- words and report


def summary(twin: "CityTwin", question: Question, dataset: xr.Dataset) -> str:
    """The answer in two sentences."""
    found = indicators(twin, dataset)
    parts = []
    for name in ("vehicle kilometres", "vehicle hours", "hours of delay", "CO2, t", "NO2 that people breathe, ug/m3"):
        mean, low, high = ranges(found[name])["relative"]
        parts.append(f"{name.partition(',')[0]} {mean:+.1f} % ({low:+.1f} to {high:+.1f})")
    gains = _gains(twin, dataset)
    return (
        f"{_changes(question)}: {'; '.join(parts)}, on {dataset.sizes['member']} sampled days, 90 % of them in brackets. "
        f"Of {twin.place.people.sum():,.0f} people {gains['better']:,.0f} breathe less NO2 by {LEAST_CHANGE:g} ug/m3 or more, "
        f"{gains['worse']:,.0f} breathe more."
    )


def sections(twin: "CityTwin", *, asked: Any, question: Question, dataset: xr.Dataset, evaluation: Any, **_: Any) -> Sequence[Section]:
    """What was asked; what changes; where; for whom; and generated days beside recorded ones."""
    found = {name: ranges(values) for name, values in indicators(twin, dataset).items()}
    return [
        _asked(twin, asked, question),
        _for_citizens(twin, question, dataset, found),
        _changed(twin, dataset, found),
        _where(twin, dataset),
        _for_whom(twin, dataset),
        _days(twin, evaluation),
    ]


def limits(twin: "CityTwin") -> list[str]:
    return [
        f"The map is {twin.place.source}; the days of demand are {twin.record.attrs.get('source', 'a record')}.",
        "Traffic is a static equilibrium in each part of the day: queues that grow and spill back within it are not seen.",
        "Junctions and signals are not modelled apart from the capacity and speed of the roads; cold starts are left out of emissions.",
        "Air is that of open ground: no buildings, no street canyons; the background, the winds and the fleet are assumptions.",
        "Demand answers by fewer or more car trips alone: not by other destinations, other hours, or people who move house.",
        "Ranges are over sampled days. What the model itself has wrong, such as travel times or emission factors, is not in them.",
    ]


def _changes(question: Question) -> str:
    """What is changed, in words."""
    words = "; ".join(getattr(question, "changes", ()))
    return words[:1].upper() + words[1:] if words else question.title


def _gains(twin: "CityTwin", dataset: xr.Dataset) -> dict[str, float]:
    mean = dataset["air_NO2"].values[:, 0].mean(0)
    return exposure.gains_and_losses(mean[0], mean[1], twin.place.people, LEAST_CHANGE)


def _asked(twin: "CityTwin", asked: Any, question: Question) -> Section:
    rows = [["What", "Value"], ["City", twin.place.source], ["Kind of day", asked.weekday], ["Days sampled", str(question.members)]]
    rows += [["Change", words] for words in getattr(question, "changes", ())]
    rows += [["Rain", f"{asked.rain:g} mm"]] if asked.rain else []
    network = twin.place.network
    people = "" if network.population is None else f" {network.population.sum():,.0f} people,"
    size = f"{network.links} links, {network.zones} districts and towns,{people} {len(twin.place.receptors)} points of air"
    return Section("What was asked", [asked.asks, f"To expect: {asked.expect.strip()}"], {"The question": [*rows, ["Size", size]]})


def _for_citizens(twin: "CityTwin", question: Question, dataset: xr.Dataset, found: Ranges) -> Section:
    """The answer in plain words."""
    gains = _gains(twin, dataset)
    spent, held_up, co2 = found["vehicle hours"], found["hours of delay"], found["CO2, t"]
    sure = "" if _sure(co2["change"]) else ", which is less than it varies between days"
    text = [
        f"What if: {_changes(question)[:1].lower() + _changes(question)[1:]}. On such a day, drivers together would be under way for "
        f"{abs(spent['change'][0]):,.0f} hours {_more(spent['change'][0])} than now, of {spent['base'][0]:,.0f}, and held up by traffic "
        f"for {abs(held_up['change'][0]):,.0f} hours {_more(held_up['change'][0])}, of {held_up['base'][0]:,.0f}. Traffic would give off "
        f"{abs(co2['change'][0]):,.1f} tonnes of CO2 {_more(co2['change'][0])}, of {co2['base'][0]:,.0f}{sure}.",
        f"The air would become better for {gains['better']:,.0f} people and worse for {gains['worse']:,.0f}; for "
        f"{gains['as before']:,.0f} it would stay as it is. The map below shows where.",
    ]
    return Section("In plain words", text)


def _more(change: float) -> str:
    return "more" if change > 0 else "less"


def _sure(change: tuple[float, float, float]) -> bool:
    """Whether nine days in ten agree on the sign."""
    return change[1] > 0 or change[2] < 0


def _changed(twin: "CityTwin", dataset: xr.Dataset, found: Ranges) -> Section:
    rows = [["A day in the city", "Now", "Then", "Change", "90 % of days", "Change, %"]]
    for name, at in found.items():
        rows.append(
            [
                name,
                _number(at["base"][0]),
                _number(at["scenario"][0]),
                _signed(at["change"][0]),
                f"{_signed(at['change'][1])} to {_signed(at['change'][2])}",
                f"{at['relative'][0]:+.2f}",
            ]
        )
    limits = [["People whose mean over the days is above", "Now", "Then", "Change", "90 % of resampled days"]]
    for name, counts in above_limits(twin, dataset).items():
        change = counts[:, 1] - counts[:, 0]
        low, high = np.percentile(change, RANGE)
        limits.append([name, *(f"{value:,.0f}" for value in counts[0]), f"{change[0]:+,.0f}", f"{low:+,.0f} to {high:+,.0f}"])
    text = [
        "Every sampled day is simulated twice, as the city is and after the change, with the same trips wanted and the same weather.",
        "Limits are for means of a year; the mean of the sampled days, all of one weekday, stands in for it.",
    ]
    return Section("What changes", text, {"Indicators": rows, "Limits and guidelines for the air": limits})


def _where(twin: "CityTwin", dataset: xr.Dataset) -> Section:
    from domains.city import maps  # with matplotlib: only a report waits for it

    network = twin.place.network
    flow = dataset["flow"].values[:, 0].mean(0)  # [case, period, link]
    morning = flow[:, 0]
    no2 = dataset["air_NO2"].values[:, 0].mean(0)
    pictures = {
        f"Traffic in the morning, vehicles an hour: now, and its change. {_streets(network.name, morning[1] - morning[0])}": maps.traffic(
            twin.place, morning[0], morning[1] - morning[0], dataset["capacity"].values[0]
        ),
        f"NO2, mean of the days: now, and its change. {_districts(twin, no2[1] - no2[0])}": maps.air(
            twin.place, no2[0], no2[1] - no2[0], "NO2, ug/m3"
        ),
    }
    return Section("Where", figures=pictures)


def _streets(name: np.ndarray, change: np.ndarray) -> str:
    """The streets on which most changes, in words."""
    streets = [street for street in np.unique(name) if street]
    most = {street: float(change[name == street][np.abs(change[name == street]).argmax()]) for street in streets}
    ordered = sorted(most, key=lambda street: most[street])
    less = ", ".join(f"{street} ({most[street]:+,.0f})" for street in ordered[:3] if most[street] < -1)
    more = ", ".join(f"{street} ({most[street]:+,.0f})" for street in ordered[::-1][:3] if most[street] > 1)
    return f"Most relieved: {less or 'none'}; most burdened: {more or 'none'}."


def _districts(twin: "CityTwin", change: np.ndarray) -> str:
    mean = _by_zone(twin, change)
    ordered = [zone for zone in np.argsort(mean) if np.isfinite(mean[zone])]
    best, worst = ordered[0], ordered[-1]
    return (
        f"Most falls in {twin.place.zone_name[best]} ({mean[best]:+.2f} ug/m3 where people live), the other end is "
        f"{twin.place.zone_name[worst]} ({mean[worst]:+.2f})."
    )


def _by_zone(twin: "CityTwin", values: np.ndarray) -> np.ndarray:
    """Mean over the people of each zone, `[zone]`; NaN for one without receptors."""
    people, zone = twin.place.people, twin.place.zone_of
    weight = np.bincount(zone, people, twin.shape[0])
    return np.bincount(zone, people * values, twin.shape[0]) / np.where(weight > 0, weight, np.nan)


def _for_whom(twin: "CityTwin", dataset: xr.Dataset) -> Section:
    """Districts with their people: what a trip costs, how many go by car, what is breathed."""
    cost = dataset["trip_cost"].values[:, 0] / 60  # [day, case, zone]
    trips = dataset["car_trips"].values[:, 0]
    change = cost[:, 1] - cost[:, 0]
    no2 = dataset["air_NO2"].values[:, 0].mean(0)
    breathed = _by_zone(twin, no2[1] - no2[0])
    rows = [["District", "People", "A car trip, min", "90 % of days", "Car trips, %", "NO2, ug/m3"]]
    for zone in np.argsort(change.mean(0)):
        low, high = np.percentile(change[:, zone], RANGE)
        fewer = 100 * (trips[:, 1, zone] / np.maximum(trips[:, 0, zone], 1e-9) - 1).mean()
        population = twin.place.network.population
        rows.append(
            [
                twin.place.zone_name[zone],
                f"{population[zone]:,.0f}" if population is not None else "-",
                _rounded(change[:, zone].mean(), 2),
                f"{_rounded(low, 2)} to {_rounded(high, 2)}",
                _rounded(fewer, 1),
                _rounded(breathed[zone], 2) if np.isfinite(breathed[zone]) else "not computed",
            ]
        )
    text = ["Who wins stands on top. A trip's cost is its time and, at the value of time, what it pays; charges go to the city's purse."]
    return Section("For whom", text, {"Change by where a trip begins and where people live": rows})


def _days(twin: "CityTwin", evaluation: Any) -> Section:
    """Generated days beside recorded ones of the same condition."""
    from domains.city import maps

    shown = {name: each for name, each in evaluation.examples.items()}
    name = next(iter(twin.sample))
    panels = {who: np.asarray(each[name][0] if who == "truth" else each[name][0, 0]) for who, each in shown.items()}
    caption = f"Trips between districts, {twin.sample[name].long_name}, on a held-out day: recorded, drawn, and of each baseline"
    return Section(
        "Days that were generated",
        ["What is learnt is how the trips between all districts vary together; the scores below judge it on held-out days."],
        figures={caption: maps.matrices(panels)},
    )


def write(twin: "CityTwin", asked: Any, dataset: xr.Dataset, folder: Path) -> None:
    """The formats that the scenario asks for, beside Zarr."""
    outputs.write(twin.place, dataset, {name: ranges(values) for name, values in indicators(twin, dataset).items()}, asked.formats, folder)


def _rounded(value: float, digits: int) -> str:
    """With its sign, which a value that rounds to 0 has none of."""
    return f"{value:+.{digits}f}" if round(float(value), digits) else f"{0:.{digits}f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+,.0f}" if abs(value) >= 1000 else f"{value:+.3g}"
