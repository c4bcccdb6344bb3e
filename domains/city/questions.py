"""City scenarios: the schema of a scenario file, and how a list of interventions becomes the city before and after."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import pydantic

from domains.city import interventions, outputs
from domains.city.days import LENGTHS, PERIODS, WEEKDAYS, weekday_of
from domains.city.equilibrium import Paths, equilibria
from domains.city.interventions import City as State
from domains.city.network import check, reached, select
from domains.city.place import stopped
from twinsim.base import Array, BadInput, Condition, Constraint, Observation, Question, Sample, Target
from twinsim.scenario import Scenario

if TYPE_CHECKING:
    from domains.city.domain import CityTwin

PERIOD_NAMES = tuple(period.name for period in PERIODS)
PERSONS_A_CAR = 2.0  # of an event's visitors: assumption
Share = Annotated[float, pydantic.Field(ge=0, le=1)]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class _Where(_Part):
    """Some streets by name, the roads of some districts, or both; at least one of them."""

    streets: list[str] = pydantic.Field(default=[], max_length=200)
    districts: list[str] = pydantic.Field(default=[], max_length=200)

    @pydantic.model_validator(mode="after")
    def _somewhere(self) -> "_Where":
        if not self.streets and not self.districts:
            raise ValueError("expected streets or districts")
        return self

    @property
    def words(self) -> str:
        return ", ".join([*self.streets, *self.districts])


class Close(_Where):
    """Nobody drives there."""

    do: Literal["close"]


class Capacity(_Where):
    """A lane more or less, a bus lane, a building site: capacity times `factor`."""

    do: Literal["capacity"]
    factor: float = pydantic.Field(gt=0, le=5)


class SpeedLimit(_Where):
    """A lower speed limit, km/h."""

    do: Literal["speed_limit"]
    kmh: float = pydantic.Field(ge=5, le=200)


class LowEmissionZone(_Part):
    """Vehicles below a Euro standard stay out of some districts; `replaced` of their trips there are made by what is allowed."""

    do: Literal["low_emission_zone"]
    districts: list[str] = pydantic.Field(min_length=1, max_length=200)
    diesel: int = pydantic.Field(default=6, ge=1, le=6)
    petrol: int = pydantic.Field(default=4, ge=1, le=6)
    replaced: Share = 0.8


class CordonCharge(_Part):
    """Who drives into some districts pays, euro."""

    do: Literal["cordon_charge"]
    districts: list[str] = pydantic.Field(min_length=1, max_length=200)
    euro: float = pydantic.Field(gt=0, le=100)


class DistanceCharge(_Where):
    """Who drives there pays by the way, euro/km."""

    do: Literal["distance_charge"]
    euro_per_km: float = pydantic.Field(gt=0, le=20)


class ElectricShare(_Part):
    """A share of cars and vans runs on a battery."""

    do: Literal["electric_share"]
    share: Share


class ModalShift(_Part):
    """A share of the car trips goes by other modes: all, or those from, to and within some districts."""

    do: Literal["modal_shift"]
    share: Share
    districts: list[str] = pydantic.Field(default=[], max_length=200)


class Greening(_Part):
    """More tree cover in some districts, as a share of the ground."""

    do: Literal["greening"]
    districts: list[str] = pydantic.Field(min_length=1, max_length=200)
    cover: Share


class Event(_Part):
    """Visitors come to a district in one part of the day and leave in the next."""

    do: Literal["event"]
    district: str
    visitors: int = pydantic.Field(ge=1, le=1_000_000)
    period: Literal["morning", "day", "evening", "night"] = "evening"


class Rain(_Part):
    """A rainy day, mm; demand answers to it too."""

    do: Literal["rain"]
    mm: float = pydantic.Field(gt=0, le=200)


Intervention = Annotated[
    Close | Capacity | SpeedLimit | LowEmissionZone | CordonCharge | DistanceCharge | ElectricShare | ModalShift | Greening | Event | Rain,
    pydantic.Field(discriminator="do"),
]


class Count(_Part):
    """What was counted on a link in one part of the day, vehicles an hour, with its standard error: days are drawn that agree with it."""

    link: str
    period: Literal["morning", "day", "evening", "night"]
    vehicles: float = pydantic.Field(ge=0, le=1e5)
    error: float = pydantic.Field(gt=0, le=1e5)


class CityScenario(Scenario):
    """A question to a city twin; `members` are the days that are sampled.

    Attributes:
      weekday: the kind of day.
      rain: mm, on every sampled day, before and after the change.
      both: interventions that hold before and after: an event that takes place in any case.
      interventions: the change, made in this order.
      counts: what was counted before the change.
    """

    weekday: Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"] = "Wednesday"
    rain: float = pydantic.Field(default=0.0, ge=0, le=200)
    both: list[Intervention] = pydantic.Field(default=[], max_length=50)
    interventions: list[Intervention] = pydantic.Field(min_length=1, max_length=50)
    counts: list[Count] = pydantic.Field(default=[], max_length=60)
    formats: list[Literal["netcdf", "geojson", "geopackage", "ngsi-ld", "gmns"]] = []  # type: ignore[assignment]  # wider than any domain's

    @pydantic.model_validator(mode="after")
    def _rains_once(self) -> "CityScenario":
        if (self.rain > 0) + sum(isinstance(each, Rain) for each in [*self.both, *self.interventions]) > 1:
            raise ValueError("expected rain once: rain: mm before and after, or an intervention do: rain, got both or several")
        return self


@dataclass(frozen=True)
class CityQuestion(Question):
    """A question that remembers what is changed."""

    changes: Sequence[str] = ()


def ask(twin: "CityTwin", scenario: CityScenario) -> CityQuestion:
    """A checked scenario as the conditions of one day, `[1, ...]`: the kind of day, and the city before and after. Raises BadInput."""
    network = twin.place.network
    outputs.check(twin.place, scenario.formats)
    learnt = twin.record.isel(time=twin.rows("train"))
    known = np.unique(weekday_of(learnt["time"].values))
    if WEEKDAYS.index(scenario.weekday) not in known:
        names = ", ".join(WEEKDAYS[day] for day in known)
        raise BadInput(
            f"scenario {scenario.title!r}: weekday: expected one that the record has for training, {names}, got {scenario.weekday}"
        )
    toll = np.zeros(network.links) if network.toll is None else network.toll
    state = interventions.base(
        network.free_speed, network.capacity, toll, network.zones, len(PERIODS), twin.fleet, len(twin.place.receptors)
    )
    always = _changed(twin, state, scenario.both)
    before = _rained(always, scenario.rain)
    after = _rained(_changed(twin, always, scenario.interventions), scenario.rain)
    for case in (before, after):
        _check_ways(twin, scenario, case)
    if not any(_differs(before, after)):
        raise BadInput(f"scenario {scenario.title!r}: its interventions change nothing; expected a lower limit, a closed street, ...")
    rain = max([scenario.rain, *(each.mm for each in [*scenario.both, *scenario.interventions] if isinstance(each, Rain))])
    condition: dict[str, Any] = {
        "weekday": np.array([WEEKDAYS.index(scenario.weekday)], np.float32),
        "rain": np.array([rain], np.float32),
    }
    for each in fields(State):
        both = [np.asarray(getattr(case, each.name), np.float32) for case in (before, after)]
        condition[f"{interventions.CONDITION}{each.name}"] = np.stack(both)[None]
    coords = {"time": ("time", np.array([_next(scenario.weekday)]).astype("datetime64[ns]"))}
    changes = [_words(each) for each in scenario.interventions]
    constrain, misses = _counted(twin, scenario, before) if scenario.counts else (None, None)
    notes = _notes(scenario)
    if rain and not learnt["rain"].values.any():
        notes.append("The record has no rain: the trips are those of dry days.")
    return CityQuestion(condition, scenario.members, coords, scenario.title, constrain, misses, notes, changes)


def _counted(twin: "CityTwin", scenario: CityScenario, before: State) -> tuple[Any, Any]:
    """Guidance to days that agree with the counts, and how far a simulated day misses them, veh/h beyond three standard errors.

    Guidance knows which share of each pair's trips uses a link from the equilibrium of a mean day; the judge is the day's own.
    """
    network = twin.place.network
    known = {str(name): index for index, name in enumerate(network.link_id)}
    for each in scenario.counts:
        if each.link not in known:
            close = ", ".join(difflib.get_close_matches(each.link, list(known), n=3, cutoff=0.1))
            raise BadInput(
                f"scenario {scenario.title!r}: counts: link {each.link!r}: the network has none of that name; near it are {close}"
            )
    link = np.array([known[each.link] for each in scenario.counts])
    period = np.array([PERIOD_NAMES.index(each.period) for each in scenario.counts])
    value, error = (np.array([getattr(each, name) for each in scenario.counts], np.float32) for name in ("vehicles", "error"))
    sample, kind = twin.days(twin.rows("train"))
    alike = np.asarray(kind["weekday"]) == WEEKDAYS.index(scenario.weekday)
    usual = np.stack([np.asarray(values)[alike].mean(0) for values in sample.values()])  # [period, zone, zone]
    part, extra = np.asarray(before.trips, float), np.asarray(before.extra, float)  # [user, zone, zone], [period, zone, zone]
    wanted = usual[:, None] * part
    wanted[:, interventions.MEETS] += extra
    there = stopped(
        replace(network, free_speed=np.asarray(before.free_speed, float), capacity=np.maximum(before.capacity, 1.0)), twin.place.delay
    )
    toll = np.broadcast_to(np.asarray(before.charge, float), (len(usual), *before.charge.shape))
    closed = np.asarray(before.capacity)[None] <= 0
    settled = equilibria(there, wanted / LENGTHS[:, None, None, None], 1e-4, toll=toll, closed=closed)
    share = np.stack([_shares(settled[p].paths, one, part.shape) for p, one in zip(period, link, strict=True)])
    share /= LENGTHS[period][:, None, None, None]  # [count, user, zone, zone]
    per_hour = (share * part).sum(1).astype(np.float32)
    on_top = (share[:, interventions.MEETS] * extra[period]).sum((1, 2)).astype(np.float32)
    names = list(twin.sample)

    def expected(sample: Sample) -> Array:
        trips = jnp.stack([jnp.asarray(sample[names[p]]) for p in period])
        return (trips * per_hour).sum((1, 2)) + on_top

    def constrain(decode: Callable[[Target], Sample], condition: Condition) -> list[Constraint]:
        return [Observation(lambda target: expected(decode(target)), value, error)]

    def misses(sample: Sample, condition: Condition) -> Array:
        flow = jnp.asarray(sample["flow"])[0, period, link] if "flow" in sample else expected(sample)  # before its traffic is known
        return jnp.maximum(jnp.max(jnp.abs(flow - value) - 3 * error), 0.0)

    return constrain, misses


def _shares(paths: Paths, link: int, shape: tuple[int, ...]) -> np.ndarray:
    """The share of each class's and pair's trips that uses a link, `[user, zone, zone]` of `shape`; 0 for a pair without trips."""
    uses = paths.links[:, [link]].toarray()[:, 0] > 0
    total, over = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (paths.user, paths.origin, paths.destination), paths.flow)
    np.add.at(over, (paths.user[uses], paths.origin[uses], paths.destination[uses]), paths.flow[uses])
    return over / np.maximum(total, 1e-12)


def _changed(twin: "CityTwin", state: State, wanted: Sequence[Any]) -> State:
    """The state after all of `wanted`, in order. Raises BadInput for names that the city does not have."""
    for each in wanted:
        state = _make(twin, state, each)
    return state


def _make(twin: "CityTwin", state: State, each: Any) -> State:
    place, network = twin.place, twin.place.network
    seconds = 3600.0 / twin.value_of_time  # a euro is worth
    match each:
        case Close():
            return interventions.close(state, _links(twin, each))
        case Capacity():
            return interventions.scale_capacity(state, _links(twin, each), each.factor)
        case SpeedLimit():
            return interventions.limit_speed(state, _links(twin, each), each.kmh / 3.6)
        case LowEmissionZone():
            if np.asarray(state.trips)[interventions.FAILS].any():
                raise BadInput("low_emission_zone: expected one of them, which names all its districts, got a second one")
            banned = interventions.below_standard(twin.fleet, each.diesel, each.petrol)
            inside = _mask(network.zones, place.zones_called(each.districts))
            links = _mask(network.links, place.links_in(each.districts))
            return interventions.ban(state, twin.fleet, banned, links, inside, each.replaced)
        case CordonCharge():
            return interventions.charge_cordon(state, _mask(network.links, place.entries(each.districts)), each.euro * seconds)
        case DistanceCharge():
            return interventions.charge_distance(state, _links(twin, each), network.length, each.euro_per_km * seconds / 1000)
        case ElectricShare():
            return interventions.electrify(state, twin.fleet, each.share)
        case ModalShift():
            inside = _mask(network.zones, place.zones_called(each.districts)) if each.districts else np.ones(network.zones)
            return interventions.shift_mode(state, np.maximum(inside[:, None], inside[None]), each.share)
        case Greening():
            return interventions.green(state, np.isin(place.zone_of, place.zones_called(each.districts)), each.cover)
        case Event():
            zone = int(place.zones_called([each.district])[0])
            people = np.asarray(network.population, float).copy()
            people[zone] = 0.0
            vehicles = each.visitors / PERSONS_A_CAR * people / people.sum()
            return interventions.host_event(state, zone, PERIOD_NAMES.index(each.period), vehicles)
        case Rain():
            return interventions.rain(state, each.mm)
    raise BadInput(f"scenario: no intervention is called {each.do}")


def _rained(state: State, millimetres: float) -> State:
    return interventions.rain(state, millimetres) if millimetres > 0 else state


def _links(twin: "CityTwin", where: _Where) -> np.ndarray:
    """1 for the links of streets and districts, `[link]`. Raises BadInput."""
    place = twin.place
    found = [place.streets(where.streets)] if where.streets else []
    found += [place.links_in(where.districts)] if where.districts else []
    return _mask(place.network.links, np.concatenate(found))


def _mask(size: int, chosen: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, np.float32)
    mask[chosen] = 1.0
    return mask


def _check_ways(twin: "CityTwin", scenario: CityScenario, state: State) -> None:
    """Raises BadInput, naming districts, where closed roads leave trips without a way."""
    network = twin.place.network
    open_links = np.asarray(state.capacity) > 0
    if not open_links[twin.place.roads].any():
        raise BadInput(f"scenario {scenario.title!r}: it closes every road of the city, expected some to stay open")
    if open_links.all():
        return
    lost = np.argwhere(~reached(select(network, open_links)))
    if len(lost):
        pairs = ", ".join(f"{twin.place.zone_name[a]} to {twin.place.zone_name[b]}" for a, b in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise BadInput(
            f"scenario {scenario.title!r}: with these roads closed there is no way from {pairs}{more}; expected one to stay open"
        )
    check(replace(network, free_speed=np.asarray(state.free_speed, float)))


def _differs(before: State, after: State) -> list[bool]:
    return [not np.array_equal(np.asarray(getattr(before, each.name)), np.asarray(getattr(after, each.name))) for each in fields(State)]


def _next(weekday: str) -> np.datetime64:
    """A day of that name: the first of 2025, which only names the kind of day."""
    monday = np.datetime64("2025-01-06")
    return monday + np.timedelta64(WEEKDAYS.index(weekday), "D")


_WORDS: dict[str, Callable[[Any], str]] = {
    "close": lambda x: f"no cars on {x.words}",
    "capacity": lambda x: f"capacity x {x.factor:g} on {x.words}",
    "speed_limit": lambda x: f"at most {x.kmh:g} km/h on {x.words}",
    "low_emission_zone": lambda x: f"no diesel below Euro {x.diesel} and no petrol below Euro {x.petrol} in {', '.join(x.districts)}",
    "cordon_charge": lambda x: f"{x.euro:g} euro to drive into {', '.join(x.districts)}",
    "distance_charge": lambda x: f"{x.euro_per_km:g} euro/km on {x.words}",
    "electric_share": lambda x: f"{x.share:.0%} of cars and vans electric",
    "modal_shift": lambda x: f"{x.share:.0%} of car trips by other modes{' of ' + ', '.join(x.districts) if x.districts else ''}",
    "greening": lambda x: f"{x.cover:.0%} more tree cover in {', '.join(x.districts)}",
    "event": lambda x: f"{x.visitors:,} visitors in {x.district} ({x.period})",
    "rain": lambda x: f"{x.mm:g} mm of rain",
}


def _words(each: Any) -> str:
    """An intervention in a few words."""
    return _WORDS[each.do](each)


def _notes(scenario: CityScenario) -> list[str]:
    """What a reader must know of the interventions asked for."""
    notes = []
    if scenario.counts:
        notes.append("Days are drawn to agree with the counts given; days on which they were otherwise are not in the ranges.")
    kinds = {each.do for each in [*scenario.both, *scenario.interventions]}
    if "greening" in kinds:
        notes.append(
            "What trees take out of the air is of low confidence: a few per cent by deposition; in a narrow street they may do harm."
        )
    if "low_emission_zone" in kinds:
        notes.append(
            "How many banned vehicles are replaced and how many trips are given up is the scenario's assumption, not a prediction."
        )
    if "rain" in kinds or scenario.rain:
        notes.append("How rain slows roads down rests on figures of motorways, taken for city roads.")
    if "cordon_charge" in kinds or "distance_charge" in kinds:
        notes.append("Charges count by one value of time for all; who can afford them less is not told apart.")
    return notes
