"""Regions of zones with the trips between them: read from a file, or made up; and what a model may know of zones and of ways.

A region is as many zones as it has; a model works on blocks, rectangles of at most so many origins and destinations. Every block knows
its zones, the ways between them and what the rest of its region is like, so that a prediction needs nothing beside it.
"""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.city.demand import Deterrence, gravity
from domains.city.pairwise import Blocks
from twinsim.base import BadInput

REACHES = (2.0, 5.0, 15.0, 40.0)  # km over which what can be reached fades to 1/e
NEAREST = 0.1  # km: no way is shorter
WAYS = 10  # features of a pair
LN_DISTANCE, DISTANCE, SAME = 0, 1, 2  # of them, by place
KNOWN = 3  # what is known of a region beside the means of its zones


@dataclass(frozen=True)
class Region:
    """Zones, and the trips between them where they are known.

    Attributes:
      population: people in a zone, `[zone]`.
      features: more that is known of a zone, numbers of 0 or more, `[zone, feature]`.
      distance: between the middles of two zones, m, `[zone, zone]`; 0 from a zone to itself.
      trips: a day, `[zone, zone]`; None where they are asked for.
    """

    name: str
    population: np.ndarray
    features: np.ndarray
    distance: np.ndarray
    trips: np.ndarray | None = None

    def __post_init__(self) -> None:
        zones = len(self.population)
        if zones < 2:
            raise BadInput(f"region {self.name}: expected at least 2 zones, got {zones}")
        shapes = {"population": (zones,), "features": (zones, self.features.shape[-1]), "distance": (zones, zones)}
        for what, shape in (shapes | ({} if self.trips is None else {"trips": (zones, zones)})).items():
            values = np.asarray(getattr(self, what))
            if values.shape != shape:
                raise BadInput(f"region {self.name}: {what}: expected {list(shape)}, as there are {zones} zones, got {list(values.shape)}")
            wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
            if len(wrong):
                place = tuple(wrong[0])
                where = f"zone {place[0]}" if what != "distance" and what != "trips" else f"zone {place[0]} to zone {place[1]}"
                raise BadInput(f"region {self.name}: {what} of {where}: expected a number of 0 or more, got {values[place]}")
        off = ~np.eye(zones, dtype=bool)
        if not (np.asarray(self.distance)[off] > 0).any():
            raise BadInput(f"region {self.name}: distance: expected zones apart from one another, got 0 between all")

    @property
    def zones(self) -> int:
        return len(self.population)


@dataclass(frozen=True)
class Regions:
    """What a twin of commuting learns from.

    Attributes:
      licence: of what is made from them. source: where they come from, in words. files: name, place, licence, sha256, size of each.
    """

    regions: Sequence[Region]
    licence: str
    source: str
    files: Sequence[Mapping[str, Any]] = ()


def recorded(path: str, licence: str = "not stated", trips: bool = True) -> Regions:
    """Regions from an .npz whose keys are `<region>/<part>`.

    Parts: `od` trips `[zone, zone]` (not needed without `trips`), `dis` m `[zone, zone]`, `demos` `[zone, feature]`, the first of which
    is the population; what else there is is not read. This is the form of the CommutingODGen data set (tsinghua-fib-lab), whose points
    of interest (`pois`) are left out on purpose: in the counties looked at, their rows do not go with the zones (rank correlation with
    arriving workers below 0.01).

    Raises:
      BadInput: no such file, a missing key, a value that is missing or negative.
    """
    file = Path(path)
    if not file.is_file():
        raise BadInput(f"{file}: expected an .npz of regions, found {'a folder' if file.is_dir() else 'nothing'}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files if not name.endswith(("/pois", "/adj"))}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{file}: expected an .npz of plain arrays, cannot read it ({type(error).__name__})") from None
    names = sorted({name.rpartition("/")[0] for name in held if "/" in name})
    if not names:
        raise BadInput(f"{file}: expected keys like 01015/od, got {', '.join(sorted(held)[:3]) or 'none'}")
    found = []
    for name in names:
        parts = {}
        for part in ("dis", "demos", "od") if trips else ("dis", "demos"):
            key = f"{name}/{part}"
            if key not in held:
                raise BadInput(
                    f"{file}: expected the key {key}, there are {', '.join(sorted(k for k in held if k.startswith(f'{name}/')))}"
                )
            values = held[key]
            if values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
                raise BadInput(f"{file}: {key}: expected a table of numbers, got {values.dtype} {list(values.shape)}")
            parts[part] = values.astype(np.float64)
        try:
            found.append(Region(name, parts["demos"][:, 0], parts["demos"][:, 1:], parts["dis"], parts.get("od")))
        except BadInput as wrong:
            raise BadInput(f"{file}: {wrong}") from None
    if len({region.features.shape[1] for region in found}) > 1:
        raise BadInput(f"{file}: demos: expected as many features in every region, got {sorted({r.features.shape[1] for r in found})}")
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    held_file = {"name": file.name, "place": str(file), "licence": licence, "sha256": digest, "size": file.stat().st_size}
    return Regions(found, licence, f"the trips recorded in {file.name}", [held_file])


def shipped(count: int = 60, seed: int = 0, zones: Sequence[int] = (12, 30)) -> Regions:
    """Made-up regions to start with: no real place, no download.

    How one comes about: zones lie about one to three centres; people thin out exponentially from these (Clark 1951) and jobs more
    steeply, each zone with log-normal chances of its own; workers choose jobs by a gravity model with both margins kept, whose deterrence
    differs from region to region and whose pairs differ log-normally with an effect each of origin, destination and pair; trips are
    Poisson. Known of a zone are its people, households, cars and shops: the jobs themselves are not known, only what goes with them.

    Args:
      count: regions. zones: least and most of a region.
    """
    least, most = zones
    if not (count >= 2 and 4 <= least <= most):
        raise BadInput(f"made-up regions: expected 2 or more of 4 or more zones, got {count} of {least} to {most}")
    made = [_made(np.random.default_rng([seed, index]), f"made-up-{index:03d}", least, most) for index in range(count)]
    return Regions(made, "Apache-2.0", f"{count} made-up regions (seed {seed}); they show no real place")


def _made(random: np.random.Generator, name: str, least: int, most: int) -> Region:
    zones = int(random.integers(least, most + 1))
    extent = random.uniform(8, 30)  # km
    centres = random.normal(0, extent / 3, (int(random.integers(1, 4)), 2))
    place = centres[random.integers(0, len(centres), zones)] + random.laplace(0, extent / 5, (zones, 2))
    apart = np.linalg.norm(place[:, None] - place[None], axis=-1)
    to_centre = np.linalg.norm(place[:, None] - centres[None], axis=-1).min(1)
    people = np.round(4000 * np.exp(-to_centre / extent) * random.lognormal(0, 0.4, zones)) + 50
    jobs = np.exp(-2.5 * to_centre / extent) * random.lognormal(0, 0.9, zones)
    households = np.round(people / random.uniform(1.8, 3.0, zones))
    cars = np.round(households * random.uniform(0.8, 1.6, zones))
    shops = np.round(60 * jobs * random.lognormal(0, 0.4, zones))
    workers = 0.45 * people * random.lognormal(0, 0.1, zones)
    cost = np.where(np.eye(zones, dtype=bool), 0.5, apart + 0.5)
    trips = gravity(workers, jobs, cost, Deterrence(beta=random.uniform(0.08, 0.25)))
    trips = trips * random.lognormal(0, 0.5, (zones, zones)) * random.lognormal(0, 0.3, (1, zones))
    counts = random.poisson(trips * workers.sum() / trips.sum()).astype(np.float64)
    return Region(name, people, np.stack([households, cars, shops], 1), 1000 * apart, counts)


# ---------------------------------------------------------------- what a model may know


@dataclass(frozen=True)
class Known:
    """What is known of a region's zones `[zone, feature]`, of itself `[known]` and of its ways `[zone, zone, feature]`, float32."""

    zones: np.ndarray
    region: np.ndarray
    ways: np.ndarray


def known(region: Region) -> Known:
    """Logarithms of what is counted, and geometry: how near others are, how much can be reached, how much lies in between."""
    zones, people = region.zones, region.population + 1.0
    same = np.eye(zones, dtype=bool)
    others = np.where(same, np.inf, region.distance / 1000)
    nearest = np.sort(others, axis=1)[:, : min(3, zones - 1)]
    km = np.maximum(np.where(same, nearest[:, :1] / 2, others), NEAREST)  # a way within a zone: half of that to the next
    mean = np.where(same, 0, others).sum(1) / (zones - 1)
    near, wide = np.log(nearest[:, 0] + NEAREST), np.log(nearest.mean(1) + NEAREST)
    reach = [np.log((who * np.exp(-km / r)).sum(1) + 1e-9) for r in REACHES for who in (people[None], np.ones((1, zones)))]
    places = [near, wide, np.log(mean), np.log(mean / mean.mean()), np.log(people) - 2 * wide, *reach]
    about = np.concatenate([np.log1p(region.population)[:, None], np.log1p(region.features), np.stack(places, 1)], 1)
    of_region = np.concatenate([about.mean(0), [np.log(zones), np.log(people.sum()), np.log(mean.mean())]])

    order = np.argsort(km, axis=1, kind="stable")
    rank = np.argsort(order, axis=1) / zones
    sorted_people = people[order]
    between = np.empty((zones, zones))
    np.put_along_axis(between, order, np.cumsum(sorted_people, axis=1) - sorted_people, axis=1)
    own, theirs = people[:, None], people[None]
    apart = between - own * (np.diag(rank)[:, None] < rank)  # without those of either end: Simini et al. (2012), eq. 2
    radiation = np.log(own * theirs / ((own + apart) * (own + theirs + apart)))
    lnkm, total = np.log(km), np.log(people.sum())
    ways = [lnkm, km / 30, same, rank, rank.T, np.log1p(between) - total, np.log1p(between.T) - total, radiation, radiation.T]
    ways.append(lnkm - lnkm.mean(1, keepdims=True))
    return Known(about.astype(np.float32), of_region.astype(np.float32), np.stack(ways, -1).astype(np.float32))


@dataclass(frozen=True)
class Cut:
    """The blocks of many regions.

    Attributes:
      blocks: `[n, ...]`. trips: `[n, origin, destination]`; 0 where they are not known.
      region: index of each block's region, `[n]`. origins, destinations: its zones, -1 where the grid is filled up, `[n, size]`.
    """

    blocks: Blocks
    trips: np.ndarray
    region: np.ndarray
    origins: np.ndarray
    destinations: np.ndarray

    def rows(self, chosen: np.ndarray) -> "Cut":
        """Some of the blocks."""
        blocks = Blocks(*(np.asarray(part)[chosen] for part in self.blocks))
        return Cut(blocks, self.trips[chosen], self.region[chosen], self.origins[chosen], self.destinations[chosen])

    def whole(self, values: np.ndarray, region: int, zones: int) -> np.ndarray:
        """Values on blocks `[..., n, origin, destination]` put together for one region, `[..., zone, zone]`."""
        made = np.zeros((*values.shape[:-3], zones, zones))
        for row in np.flatnonzero(self.region == region):
            i, j = self.origins[row], self.destinations[row]
            made[..., i[i >= 0][:, None], j[j >= 0][None]] = values[..., row, : (i >= 0).sum(), : (j >= 0).sum()]
        return made


def cut(regions: Sequence[Region], size: int) -> Cut:
    """Blocks of at most `size` origins and destinations.

    Zones of a larger region are grouped by where they lie along its longest direction; within a group the densely settled come first, so
    that a place on the grid means something.
    """
    rows = []
    for index, region in enumerate(regions):
        about = known(region)
        density = about.zones[:, 1 + region.features.shape[1]]  # ln distance to the next zone
        groups = [group[np.argsort(density[group], kind="stable")] for group in _groups(region.distance, size)]
        rows += [_block(region, about, index, i, j, size) for i in groups for j in groups]
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    return Cut(Blocks(*columns[:6]), *columns[6:])


def _block(region: Region, about: Known, index: int, origins: np.ndarray, destinations: np.ndarray, size: int) -> tuple[np.ndarray, ...]:
    """The fields of `Blocks`, then of `Cut`, for one block."""
    i, j = (np.pad(group, (0, size - len(group)), constant_values=-1) for group in (origins, destinations))
    is_origin, is_destination = i >= 0, j >= 0
    within = (is_origin[:, None] & is_destination[None]).astype(np.float32)
    at = np.ix_(np.maximum(i, 0), np.maximum(j, 0))
    trips = np.zeros((size, size)) if region.trips is None else region.trips[at] * within
    return (
        about.zones[i] * is_origin[:, None],
        about.zones[j] * is_destination[:, None],
        about.region,
        about.ways[at] * within[..., None],
        (region.population[i] * is_origin).astype(np.float32),
        within,
        trips.astype(np.float32),
        np.asarray(index),
        i,
        j,
    )


def _groups(distance: np.ndarray, size: int) -> list[np.ndarray]:
    """Zones in as few groups of at most `size` as there can be, of one size, along the first axis of classical scaling (Torgerson 1952)."""
    zones = len(distance)
    count = -(-zones // size)
    if count == 1:
        return [np.arange(zones)]
    squared = (distance + distance.T) ** 2 / 4
    centred = -(squared - squared.mean(0)[None] - squared.mean(1)[:, None] + squared.mean()) / 2
    along = np.linalg.eigh(centred)[1][:, -1]
    return np.array_split(np.argsort(along * np.sign(along[0] or 1.0), kind="stable"), count)
