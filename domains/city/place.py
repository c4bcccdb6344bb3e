"""A city as the twin sees it: its roads, its zones with people and jobs, and the points at which their air is asked for."""

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from domains.city import gmns
from domains.city import synthetic as made_up
from domains.city.equilibrium import equilibrium
from domains.city.exposure import people_at
from domains.city.network import Network, check, courses, find_street
from domains.city.readers import read_network
from domains.city.simplify import prepare
from twinsim.base import BadInput

CONNECTOR = "connector"  # the kind of a link that stands for many side streets: it carries trips and has no air of its own
JUNCTION_DELAY = 12.0  # s at the end of a street that meets others: signals and priority on the usual day, level of service B (HCM 2010)
FREE_FLOWING = ("motorway", "motorway_link", "trunk", "trunk_link", CONNECTOR)  # without junctions that stop anybody
NEAREST = 12.0  # m from the middle of a road: nearer than this nobody lives
STREET_LIFE = ("residential", "living_street", "unclassified", "tertiary", "secondary", "primary")  # where people are taken to live


@dataclass(frozen=True, eq=False)
class Place:
    """A city.

    Attributes:
      network: checked, with a map; its zones have population and jobs.
      zone_name: `[zone]`, all different.
      receptors: where the air is asked for, m, `[receptor, 2]`. people: who live there, `[receptor]`.
      zone_of: the zone of each receptor, `[receptor]`.
      delay: that the junction at the end of a link costs an empty road's driver, s, `[link]`.
      water: the course of a river for the maps, m, `[point, 2]`; None without one.
      licence, source: of the map, in words. inputs: the files it came from.
    """

    network: Network
    zone_name: tuple[str, ...]
    receptors: np.ndarray
    people: np.ndarray
    zone_of: np.ndarray
    delay: np.ndarray
    water: np.ndarray | None = None
    licence: str = "CC0-1.0"
    source: str = ""
    inputs: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @cached_property
    def roads(self) -> np.ndarray:
        """The links that are roads, `[road]`."""
        return np.flatnonzero(self.network.kind != CONNECTOR)

    @cached_property
    def link_zone(self) -> np.ndarray:
        """The zone that each link's middle is nearest to, `[link]`."""
        xy = np.stack([self.network.x, self.network.y], axis=1)
        middle = (xy[self.network.start] + xy[self.network.end]) / 2
        return cKDTree(xy[self.network.zone]).query(middle)[1]

    @cached_property
    def free_cost(self) -> np.ndarray:
        """Travel time between zones on empty roads, s, `[zone, zone]`, 0 within a zone."""
        few = np.full((self.network.zones, self.network.zones), 1e-6)
        cost = equilibrium(stopped(self.network, self.delay), few, 1e-3).cost[0].copy()
        np.fill_diagonal(cost, 0.0)
        return cost

    @cached_property
    def distance(self) -> np.ndarray:
        """As the crow flies between zones, m, `[zone, zone]`."""
        xy = np.stack([self.network.x, self.network.y], axis=1)[self.network.zone]
        return np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1))

    def zones_called(self, names: Sequence[str]) -> np.ndarray:
        """Indices of zones by name, case aside. Raises BadInput with the nearest names."""
        known = {name.casefold(): index for index, name in enumerate(self.zone_name)}
        found = []
        for name in names:
            if name.strip().casefold() not in known:
                close = difflib.get_close_matches(name.strip().casefold(), list(known), n=3, cutoff=0.5)
                nearest = ", ".join(repr(self.zone_name[known[one]]) for one in close) or ", ".join(self.zone_name[:8])
                raise BadInput(f"district {name!r}: the city has none of that name; did you mean {nearest}?")
            found.append(known[name.strip().casefold()])
        return np.array(found, int)

    def links_in(self, districts: Sequence[str]) -> np.ndarray:
        """The roads of some districts, `[n]`. Raises BadInput."""
        return self.roads[np.isin(self.link_zone[self.roads], self.zones_called(districts))]

    def entries(self, districts: Sequence[str]) -> np.ndarray:
        """The links that lead from outside into some districts, `[n]`: a node belongs to the nearest centroid. Raises BadInput."""
        network = self.network
        xy = np.stack([network.x, network.y], axis=1)
        inside = np.isin(cKDTree(xy[network.zone]).query(xy)[1], self.zones_called(districts))
        return np.flatnonzero(~inside[network.start] & inside[network.end])

    def streets(self, names: Sequence[str]) -> np.ndarray:
        """The links of some streets, `[n]`. Raises BadInput with the nearest names."""
        return np.unique(np.concatenate([find_street(self.network, name) for name in names]))


def synthetic(seed: int = 0, spacing: float = 330.0, **sizes: float) -> Place:
    """The made-up city of `domains.city.synthetic`; `sizes` are its arguments, `spacing` that of the receptors, m."""
    town = made_up.city(seed, **sizes)  # type: ignore[arg-type]  # checked there, by name
    inside = len([name for name in town.district if not name.startswith("Town ")])
    receptors, people, zone_of = _receptors(town.network, spacing, np.arange(inside), town.centre, town.radius)
    source = f"a made-up city (seed {seed}): no real place"
    return Place(town.network, town.district, receptors, people, zone_of, junction_delay(town.network), town.river, "CC0-1.0", source)


def junction_delay(network: Network, seconds: float = JUNCTION_DELAY) -> np.ndarray:
    """What the junction at the end of each link costs, s, `[link]`: nothing on free-flowing roads and where no other road comes in.

    Raises BadInput.
    """
    if not (np.isfinite(seconds) and seconds >= 0):
        raise BadInput(f"junction_delay: expected 0 s or more, got {seconds}")
    roads = network.kind != CONNECTOR
    neighbours: list[set[int]] = [set() for _ in range(network.nodes)]
    for start, end in zip(network.start[roads], network.end[roads], strict=True):
        neighbours[start].add(int(end)), neighbours[end].add(int(start))
    meets = np.array([len(each) > 2 for each in neighbours])
    return np.where(meets[network.end] & ~np.isin(network.kind, FREE_FLOWING), seconds, 0.0)


def stopped(network: Network, delay: np.ndarray) -> Network:
    """The network whose links take `delay`, s, `[link]`, longer when empty."""
    return replace(network, free_speed=network.length / (network.free_time + delay))


def read(
    path: str, zones: int = 24, spacing: float = 330.0, population: float | None = None, licence: str = "not stated", **options: Any
) -> Place:
    """A city from a road network of any format that `readers.read_network` knows; `options` are those of the format's own reader: TNTP
    needs `nodes`, the file of their positions.

    A map without zones gets `zones` districts and a gate at each road out of it; people are those of `of`. Raises BadInput.
    """
    try:
        network = read_network(path, **options)
    except TypeError as error:
        raise BadInput(f"{path}: expected options of the reader of this format, got: {error}") from None
    if not network.zones:
        network = prepare(network, zones)
    check(network)
    place = Path(path)
    read_from = [file for name in gmns.TABLES if (file := place / name).is_file()] if place.is_dir() else [place]
    read_from += [Path(options["nodes"])] if "nodes" in options else []
    return replace(of(network, spacing, population), licence=licence, inputs=[input_of(file, licence) for file in read_from])


def of(network: Network, spacing: float = 330.0, population: float | None = None) -> Place:
    """The city of a checked network with zones.

    Where the network tells nobody's home, `population` people and half as many jobs are spread over the zones by the length of their
    streets with houses, which is an assumption: `STREET_LIFE`. Raises BadInput.
    """
    if not network.has_map:
        raise BadInput(
            f"{network.source}: expected a network with the positions of its nodes, got one without; TNTP has them in a file nodes="
        )
    if network.population is None or network.jobs is None:
        if population is None:
            raise BadInput(
                f"{network.source}: expected people and jobs of each zone in the file, or population= for the whole, got neither"
            )
        network = _peopled(network, population)
    centre = np.array([np.median(network.x), np.median(network.y)])
    radius = float(np.quantile(np.hypot(network.x - centre[0], network.y - centre[1]), 0.98))
    receptors, people, zone_of = _receptors(network, spacing, np.arange(network.zones), centre, radius)
    return Place(network, zone_names(network), receptors, people, zone_of, junction_delay(network), source=network.source)


def zone_names(network: Network) -> tuple[str, ...]:
    """What districts without a name of their own are called, `[zone]`."""
    return tuple(f"Zone {name}" for name in network.node_id[network.zone])


def input_of(file: Path, licence: str) -> dict[str, Any]:
    """Of a file that was read, what the record of a run says of it."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {"name": file.name, "place": str(file), "licence": licence, "sha256": digest, "size": file.stat().st_size}


def _peopled(network: Network, population: float) -> Network:
    xy = np.stack([network.x, network.y], axis=1)
    owner = cKDTree(xy[network.zone]).query((xy[network.start] + xy[network.end]) / 2)[1]
    lived_in = np.where(np.isin(network.kind, STREET_LIFE), network.length, 0.0)
    share = np.bincount(owner, lived_in, network.zones) + 1e-9
    return replace(network, population=population * share / share.sum(), jobs=0.5 * population * share / share.sum())


def _apart(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Distance of a point, `[2]`, from the nearest of the lines from `a` to `b`, `[line, 2]`, m."""
    along = np.clip(((point - a) * (b - a)).sum(1) / np.maximum(((b - a) ** 2).sum(1), 1e-9), 0, 1)
    return float(np.hypot(*(point - a - along[:, None] * (b - a)).T).min())


def _receptors(
    network: Network, spacing: float, zones: np.ndarray, centre: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A square grid of points within the radius, off the roads; the people of each of `zones` live in equal parts at those nearest it,
    or, where there are none, at the point next to its centroid."""
    if not 50 <= spacing <= radius:
        raise BadInput(f"receptors: expected a spacing of 50 m to {radius:.0f} m, got {spacing:g}")
    steps = np.arange(-np.floor(radius / spacing), np.floor(radius / spacing) + 1) * spacing
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2) + centre
    xy = np.stack([network.x, network.y], axis=1)
    grid = grid[np.hypot(*(grid - centre).T) <= radius]
    a, b, _ = courses(network, np.flatnonzero(network.kind != CONNECTOR))
    grid = grid[np.array([_apart(point, a, b) >= NEAREST for point in grid], bool)]
    if not len(grid):
        raise BadInput(f"receptors: no point of a grid of {spacing:g} m lies {NEAREST:g} m or more from every road; expected a finer one")
    assert network.population is not None
    zone_of = zones[cKDTree(xy[network.zone[zones]]).query(grid)[1]]
    count = np.bincount(zone_of, minlength=network.zones)
    without = zones[count[zones] == 0]
    people = people_at(grid, xy[network.zone[without]], network.population[without])
    return grid, people + (network.population / np.maximum(count, 1))[zone_of], zone_of
