"""What a city may change, each a pure function from the state of the city to that after the change.

A `City` state holds everything that a change can touch, as arrays; where it is touched comes as an array as well, so that
changes compose in any order that the planner means, `jax.vmap` runs over their strength, and `jax.grad` differentiates by it wherever
the result is smooth. Nothing here knows a scenario file: see `domains.city.questions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from domains.city import emissions
from domains.city.emissions import Fleet
from twinsim.base import Array, BadInput

CONDITION = "city_"  # the conditions of a scenario are the fields of a `City` under this prefix
MEETS, FAILS = 0, 1  # classes of users: vehicles that meet the standard of a low-emission zone, and those that do not
NO_WAY = 7200.0  # s: what a banned class "pays" for a link of the zone, so that it goes round where there is any other way
# Speeds and capacities on wet roads, times those on dry ones: US Highway Capacity Manual 2010, exhibit 10-15, as cited for light and heavy
# rain on freeways (from memory: not verified against the page); taken for city roads, which is an assumption.
WET_SPEED, WET_CAPACITY = (0.98, 0.94), (0.98, 0.86)
HEAVY_RAIN = 10.0  # mm a day from which on the second figure holds; between 0 and this, linear
# Share of what traffic adds to PM and NO2 that one more tenth of tree cover takes away: an assumption, of the order of what deposition
# studies find for whole cities (Nowak et al. 2006, Urban Forestry & Urban Greening 4, 115); trees in a narrow street may do harm.
REMOVAL = {"pm": 0.02, "no2": 0.005}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class City:
    """What traffic and air depend on.

    Attributes:
      free_speed: m/s, `[link]`. capacity: veh/h, `[link]`; 0 is closed.
      charge: what a class of users pays for a link, in seconds of travel time, `[user, link]`.
      trips: times the sampled ones, by class of users, `[user, zone, zone]`; 1 in sum over users where nothing is changed.
      extra: vehicles a period that come on top, `[period, zone, zone]`.
      fleet: share of each vehicle class in a class of users, `[user, class]`.
      removed_pm, removed_no2: share of what traffic adds to the air that greenery takes away, `[receptor]`.
    """

    free_speed: Array
    capacity: Array
    charge: Array
    trips: Array
    extra: Array
    fleet: Array
    removed_pm: Array
    removed_no2: Array


def base(free_speed: Array, capacity: Array, toll: Array, zones: int, periods: int, fleet: Fleet, receptors: int) -> City:
    """The city as it is: one class of users, who drive the whole fleet; the other has nobody in it yet."""
    trips = np.zeros((2, zones, zones), np.float32)
    trips[MEETS] = 1.0
    share = np.stack([np.asarray(fleet.share, np.float32)] * 2)
    return City(
        free_speed=np.asarray(free_speed, np.float32),
        capacity=np.asarray(capacity, np.float32),
        charge=np.stack([np.asarray(toll, np.float32)] * 2),
        trips=trips,
        extra=np.zeros((periods, zones, zones), np.float32),
        fleet=share,
        removed_pm=np.zeros(receptors, np.float32),
        removed_no2=np.zeros(receptors, np.float32),
    )


def close(city: City, links: Array) -> City:
    """Nobody drives on the links, `[link]` 0 or 1."""
    return replace(city, capacity=jnp.where(jnp.asarray(links) > 0, 0.0, city.capacity))


def scale_capacity(city: City, links: Array, factor: Array | float) -> City:
    """A lane more or less, a bus lane, a building site: capacity of the links, `[link]` 0 or 1, times `factor`."""
    return replace(city, capacity=city.capacity * jnp.where(jnp.asarray(links) > 0, factor, 1.0))


def limit_speed(city: City, links: Array, limit: Array | float) -> City:
    """Nobody drives faster than `limit`, m/s, on the links, `[link]` 0 or 1; where the limit is higher already, nothing changes."""
    return replace(city, free_speed=jnp.where(jnp.asarray(links) > 0, jnp.minimum(city.free_speed, limit), city.free_speed))


def charge_cordon(city: City, entries: Array, seconds: Array | float) -> City:
    """Who drives over one of the links that lead into the cordon, `[link]` 0 or 1, pays the worth of so many seconds."""
    return replace(city, charge=city.charge + jnp.asarray(entries, jnp.float32)[None] * seconds)


def charge_distance(city: City, links: Array, length: Array, seconds_per_metre: Array | float) -> City:
    """A toll by distance on the links, `[link]` 0 or 1."""
    metres = jnp.asarray(links, jnp.float32) * jnp.asarray(length, jnp.float32)
    return replace(city, charge=city.charge + metres[None] * seconds_per_metre)


def electrify(city: City, vehicles: Fleet, share: Array | float) -> City:
    """A share, 0-1, of cars and vans of every class of users runs on a battery."""
    of_users = jax.vmap(lambda mix: emissions.electrify(replace(vehicles, share=mix), share).share)
    return replace(city, fleet=of_users(jnp.asarray(city.fleet)))


def ban(city: City, vehicles: Fleet, banned: Sequence[str], links: Array, zones: Array, replaced: Array | float) -> City:
    """A low-emission zone: banned vehicles go round its links, `[link]` 0 or 1, and reach no zone in it, `[zone]` 0 or 1.

    Of the trips that banned vehicles made to, from and within its zones, the share `replaced` is made by what is allowed, in the
    proportions of the rest of its kind; the others go by other modes. There are two classes of users, so that there can be one such zone.
    Raises BadInput where nothing would be allowed.
    """
    out = np.array([name in banned for name in vehicles.classes], np.float32)
    share = jnp.asarray(city.fleet[MEETS])
    part = jnp.sum(share * out)
    clean = emissions.without(replace(vehicles, share=share), banned).share
    dirty = jnp.where(part > 0, share * out / jnp.maximum(part, 1e-12), share)
    inside = jnp.asarray(zones, jnp.float32)
    ends = jnp.maximum(inside[:, None], inside[None, :])
    all_trips = city.trips[MEETS]
    # those who may go on as they are: vehicles that meet the standard, and replaced ones
    meets = all_trips * ((1 - part) + part * ends * replaced)
    fails = all_trips * part * (1 - ends)
    charge = jnp.stack([jnp.asarray(city.charge[MEETS]), city.charge[MEETS] + jnp.asarray(links, jnp.float32) * NO_WAY])
    return replace(city, trips=jnp.stack([meets, fails]), fleet=jnp.stack([clean, dirty]), charge=charge)


def shift_mode(city: City, pairs: Array, share: Array | float) -> City:
    """A share, 0-1, of the car trips of the pairs, `[zone, zone]` 0 or 1, goes by other modes."""
    return replace(city, trips=city.trips * (1 - jnp.asarray(pairs, jnp.float32)[None] * share))


def host_event(city: City, zone: int, period: int, vehicles: Array) -> City:
    """Vehicles that come to a zone in a period and leave in the next, `[zone]` by where they come from."""
    extra = jnp.asarray(city.extra)
    after = (period + 1) % extra.shape[0]
    coming = extra.at[period, :, zone].add(jnp.asarray(vehicles, jnp.float32))
    return replace(city, extra=coming.at[after, zone, :].add(jnp.asarray(vehicles, jnp.float32)))


def rain(city: City, millimetres: Array | float) -> City:
    """Wet roads: slower and narrower, linear in the rain of the day up to `HEAVY_RAIN`."""
    wet = jnp.minimum(jnp.asarray(millimetres, jnp.float32) / HEAVY_RAIN, 1.0)
    factor = [jnp.where(wet > 0, light + wet * (heavy - light), 1.0) for light, heavy in (WET_SPEED, WET_CAPACITY)]
    return replace(city, free_speed=city.free_speed * factor[0], capacity=city.capacity * factor[1])


def green(city: City, receptors: Array, cover: Array | float) -> City:
    """More tree cover, 0-1 of the ground, at the receptors, `[receptor]` 0 or 1. Of low confidence: see `REMOVAL`."""
    here = jnp.asarray(receptors, jnp.float32) * cover * 10
    return replace(
        city,
        removed_pm=1 - (1 - city.removed_pm) * (1 - jnp.minimum(REMOVAL["pm"] * here, 1.0)),
        removed_no2=1 - (1 - city.removed_no2) * (1 - jnp.minimum(REMOVAL["no2"] * here, 1.0)),
    )


def below_standard(vehicles: Fleet, diesel: int, petrol: int) -> list[str]:
    """Classes whose Euro standard is below that asked of their fuel; HBEFA's names hold both. Buses and lorries count as diesel."""
    roman = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6}
    found = []
    for name in vehicles.classes:
        words = name.replace("Euro-", "Euro ").split("Euro ")
        if len(words) < 2:
            continue  # electric
        stage = words[1].split("_")[0].split("-")[0].rstrip("abcdeg")
        level = roman.get(stage) or (int(stage) if stage.isdigit() else None)
        if level is None:
            raise BadInput(f"vehicle class {name}: expected a Euro standard in its name, got {words[1]!r}")
        if level < (petrol if "petrol" in name or name.startswith("MC_") else diesel):
            found.append(name)
    return found
