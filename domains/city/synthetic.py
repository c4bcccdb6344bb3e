"""A made-up city to start with: districts with people and jobs, a river with few bridges, a ring road, a grid that no two seeds share.

Nothing is downloaded and no real place is shown: the map lies in the middle of the Atlantic on purpose. The street plan is a turned and
bent grid, denser at its heart, cut by a winding river that only some roads cross; a ring road ties its ends together and carries the
roads to the towns around it. People fill the city as Clark (1951), Urban population densities, found: exponentially thinner outwards.
"""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from domains.city.network import Network, build, check, select
from domains.city.projection import to_degrees
from domains.city.roads import ROADS
from twinsim.base import BadInput

UTM, CENTRE = 26, (500_000.0, 4_983_000.0)  # 45 N 27 W: open sea

_STREETS = (
    ("Market Street", "Station Road", "Church Street", "Mill Street", "Garden Street", "School Street", "Castle Street", "Park Street")
    + ("Bridge Street", "Tower Street", "Linden Avenue", "Oak Avenue", "Chestnut Avenue", "Maple Avenue", "Birch Avenue", "Poplar Avenue")
    + ("Harbour Road", "Factory Road", "College Road", "Hospital Road", "Museum Street", "Theatre Street", "Spring Street", "Orchard Road")
    + ("Meadow Road", "Quarry Road", "Vineyard Road", "Observatory Road", "Windmill Road", "Abbey Road", "Forge Street", "Weaver Street")
)
_BRIDGES = (
    "Old Bridge",
    "Harbour Bridge",
    "Mill Bridge",
    "Castle Bridge",
    "Station Bridge",
    "Meadow Bridge",
    "College Bridge",
    "Long Bridge",
)
_COMPASS = ("East", "North East", "North", "North West", "West", "South West", "South", "South East")


@dataclass(frozen=True)
class City:
    """A synthetic city.

    Attributes:
      network: checked; its zones are the districts, then the towns around; population and jobs are given.
      district: name of each zone, `[zone]`.
      river: its course, m, `[point, 2]`.
      centre: the middle of the city, m, `[2]`.
      radius: of the ring road, m.
    """

    network: Network
    district: tuple[str, ...]
    river: np.ndarray
    centre: np.ndarray
    radius: float


def city(
    seed: int = 0,
    *,
    population: float = 120_000,
    radius: float = 3300.0,
    block: float = 620.0,
    districts: int = 18,
    towns: int = 6,
    bridges: int = 4,
) -> City:
    """A city of its seed: same arguments, same arrays. Raises BadInput for sizes of which no city can be made.

    Args:
      population: people, those of the towns around included; there is a job for every second.
      radius: of the ring road, m. block: mean distance of two parallel streets, m; half of it at the heart of the city.
      districts: zones within the ring road. towns: zones around it. bridges: within the ring road, which has two of its own.
    """
    limits = {"population": (population, 1e3, 1e8), "radius": (radius, 1500, 2e4), "block": (block, radius / 25, radius / 3)}
    limits |= {"districts": (districts, 4, 400), "towns": (towns, 2, len(_COMPASS)), "bridges": (bridges, 1, len(_BRIDGES))}
    for name, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise BadInput(f"synthetic city: expected {name} of {least:g} to {most:g}, got {value:g}")
    random = np.random.default_rng(seed)
    plan = _Plan(random, radius, block)
    plan.grid()
    plan.ring()
    plan.cut_by_river(bridges)
    plan.roads_out(towns)
    made = plan.network()
    made, names = _with_zones(random, made, plan, districts, towns, population)
    check(made)
    river = plan.river_course() + CENTRE
    return City(made, names, river, np.array(CENTRE), radius)


class _Plan:
    """The street plan while it is drawn: nodes, and roads (two-way until said otherwise) between them. The origin is the centre."""

    def __init__(self, random: np.random.Generator, radius: float, block: float):
        self.random, self.radius, self.block = random, radius, block
        self.xy: list[np.ndarray] = []
        self.roads: list[tuple[int, int, str, str, float, bool]] = []  # from, to, class, street, lanes, one-way
        self.outer: list[int] = []  # the nodes of the ring road, by angle
        self.out: list[int] = []  # the end of each road to a town
        angle = random.uniform(0, np.pi)
        self.along = np.array([np.cos(angle), np.sin(angle)])  # the river's main direction
        self.wave = random.uniform(0, 2 * np.pi), random.uniform(0.10, 0.16) * radius
        self.offset = random.choice([-1, 1]) * random.uniform(0.22, 0.30) * radius

    def beside_river(self, xy: np.ndarray) -> np.ndarray:
        """Signed distance across the river of points `[..., 2]`, m: its sign tells the bank."""
        along, across = xy @ self.along, xy @ np.array([-self.along[1], self.along[0]])
        return across - self._meander(along)

    def river_course(self) -> np.ndarray:
        """The river from edge to edge, `[point, 2]`."""
        along = np.linspace(-1.7, 1.7, 120) * self.radius
        return along[:, None] * self.along + self._meander(along)[:, None] * np.array([-self.along[1], self.along[0]])

    def grid(self) -> None:
        """A bent grid within the ring road: every third street an avenue, twice as dense at its heart, where minor streets are one-way."""
        turn = self.random.uniform(0, np.pi / 2)
        axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        bend = self.random.normal(0, 0.16 * self.block, (2, 3)), self.random.uniform(0, 2 * np.pi, (2, 3))
        half = int(1.2 * self.radius / self.block) * 2
        node: dict[tuple[int, int], int] = {}
        for i, j in itertools.product(range(-half, half + 1), repeat=2):
            heart = max(abs(i), abs(j)) <= 4
            if (i % 2 or j % 2) and not heart:
                continue
            flat = np.array([i, j]) * self.block / 2
            waves = [sum(bend[0][a] * np.sin(flat[1 - a] / self.radius * np.array([1.5, 2.5, 4.0]) + bend[1][a])) for a in (0, 1)]
            xy = (flat + waves + self.random.normal(0, 0.05 * self.block, 2)) @ axes
            bank = self.beside_river(xy)
            if abs(bank) < 0.22 * self.block:  # quays keep their feet dry
                xy = xy + np.sign(bank) * (0.22 * self.block - abs(bank)) * np.array([-self.along[1], self.along[0]])
            if np.hypot(*xy) < 0.9 * self.radius:
                node[i, j] = self._node(xy)
        names = self.random.permutation(len(_STREETS))
        for i, j in node:
            for axis, (di, dj) in enumerate(((1, 0), (0, 1))):
                line = j if axis == 0 else i
                step = 1 if (i + di, j + dj) in node else 2
                other = (i + step * di, j + step * dj)
                if other not in node:
                    continue
                kind = "primary" if line % 6 == 0 else "secondary" if line % 2 == 0 else "residential"
                if kind == "secondary" and max(abs(i), abs(j)) > 6 and self.random.random() < 0.12:
                    continue  # parks, yards and barracks interrupt the outer streets
                street = _STREETS[names[(line + half + axis * (2 * half + 1)) % len(_STREETS)]]
                a, b = node[i, j], node[other]
                oneway = kind == "residential"
                if oneway and (line // 2) % 2:
                    a, b = b, a
                self._road(a, b, kind, street, 2.0 if kind == "primary" else 1.0, oneway)

    def ring(self) -> None:
        """A ring road outside the grid, tied to the grid's avenues and to those streets that end near it."""
        inner = len(self.xy)
        count = max(16, round(2 * np.pi * self.radius / (1.35 * self.block)))
        bulge = self.random.uniform(0, 2 * np.pi, 2)
        for k in range(count):
            angle = 2 * np.pi * k / count
            r = self.radius * (1 + 0.05 * np.sin(2 * angle + bulge[0]) + 0.03 * np.sin(3 * angle + bulge[1]))
            self.outer.append(self._node(r * np.array([np.cos(angle), np.sin(angle)])))
        for a, b in zip(self.outer, self.outer[1:] + self.outer[:1], strict=True):
            self._road(a, b, "trunk", "Ring Road", 2.0)
        grid = np.array(self.xy[:inner])
        for k, ring_node in enumerate(self.outer):
            gap = np.hypot(*(grid - self.xy[ring_node]).T)
            gap[np.sign(self.beside_river(grid)) != np.sign(self.beside_river(self.xy[ring_node]))] = np.inf
            nearest = int(gap.argmin())
            if gap[nearest] < 1.6 * self.block and (k % 2 == 0 or self.random.random() < 0.4):
                self._road(
                    ring_node, nearest, "primary" if k % 4 == 0 else "secondary", f"{_COMPASS[_eighth(self.xy[ring_node])]} Link", 1.0
                )

    def cut_by_river(self, bridges: int) -> None:
        """Takes away the roads across the river but for the ring road and `bridges` others, spread along it, avenues first."""
        banks = np.sign(self.beside_river(np.array(self.xy)))
        crossing = [k for k, (a, b, *_) in enumerate(self.roads) if banks[a] != banks[b]]
        inside = [k for k in crossing if self.roads[k][2] != "trunk" and not self.roads[k][5]]
        along = {k: float((self.xy[self.roads[k][0]] + self.xy[self.roads[k][1]]) @ self.along / 2) for k in inside}
        span = 0.62 * self.radius
        kept: list[int] = []
        for wished in np.linspace(-span, span, bridges) if bridges > 1 else [0.0]:
            free = [k for k in inside if k not in kept]
            if free:
                avenue = {k: 0.35 * self.block * (self.roads[k][2] != "primary") for k in free}
                kept.append(min(free, key=lambda k: abs(along[k] - wished) + avenue[k]))
        if not kept:
            raise BadInput("synthetic city: no street of this plan crosses the river; take another seed or smaller blocks")
        kept.sort(key=lambda k: abs(along[k]))
        for number, k in enumerate(kept):
            a, b, kind, _, lanes, oneway = self.roads[k]
            self.roads[k] = a, b, kind, _BRIDGES[number], lanes, oneway
        gone = set(crossing) - set(kept) - {k for k in crossing if self.roads[k][2] == "trunk"}
        self.roads = [road for k, road in enumerate(self.roads) if k not in gone]

    def roads_out(self, towns: int) -> None:
        """Roads from the ring to the towns around, the first of them a motorway."""
        first = self.random.uniform(0, 2 * np.pi)
        for k in range(towns):
            wished = first + 2 * np.pi * (k + self.random.uniform(-0.15, 0.15)) / towns
            stretch = self.random.uniform(1.35, 1.5)
            places = np.array(self.xy)[self.outer]
            off = np.abs((np.arctan2(places[:, 1], places[:, 0]) - wished + np.pi) % (2 * np.pi) - np.pi)
            bank, bank_out = self.beside_river(places), self.beside_river(stretch * places)
            dry = (np.sign(bank) == np.sign(bank_out)) & (np.abs(bank_out) > 0.15 * self.radius)  # a town lies beside the river
            ring_node = self.outer.pop(int((off + 10 * ~dry).argmin()))  # one road out at a junction
            end = self._node(self.xy[ring_node] * stretch)
            name = "Motorway" if k == 0 else f"{_COMPASS[_eighth(self.xy[end])]} Road"
            self._road(ring_node, end, "motorway" if k == 0 else "primary", name, 2.0 if k == 0 else 1.0)
            self.out.append(end)

    def network(self) -> Network:
        """The plan as a network without zones; what no road joins to the rest is left out."""
        rows: list[tuple[int, int, str, str, float]] = []
        for a, b, kind, street, lanes, oneway in self.roads:
            rows.append((a, b, kind, street, lanes))
            if not oneway:
                rows.append((b, a, kind, street, lanes))
        start, end = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        classes, per_link = np.array([row[2] for row in rows]), np.array([row[4] for row in rows])
        xy = np.array(self.xy)
        # a street is a little longer than the straight line: 1.03 within this plan
        length = 1.03 * np.hypot(*(xy[start] - xy[end]).T)
        made = build(
            start=start,
            end=end,
            length=length,
            free_speed=np.array([ROADS[one].speed for one in classes]) / 3.6,
            capacity=per_link * np.array([ROADS[one].lane_capacity for one in classes]),
            lanes=per_link,
            name=np.array([row[3] for row in rows]),
            kind=classes,
            x=xy[:, 0],
            y=xy[:, 1],
        )
        graph = csr_array((np.ones(len(start)), (start, end)), shape=(len(xy), len(xy)))
        _, component = connected_components(graph, connection="strong")
        largest = component == np.bincount(component).argmax()
        made = select(made, largest[start] & largest[end])
        new = np.cumsum(largest) - 1
        self.out = [int(new[n]) for n in self.out]
        return dataclasses.replace(
            made,
            x=made.x[largest],
            y=made.y[largest],
            node_id=np.arange(1, largest.sum() + 1).astype(str),
            start=new[made.start],
            end=new[made.end],
        )

    def _meander(self, along: np.ndarray) -> np.ndarray:
        phase, height = self.wave
        return self.offset + height * np.sin(2.2 * along / self.radius + phase) + 0.3 * height * np.sin(5.1 * along / self.radius)

    def _node(self, xy: np.ndarray) -> int:
        self.xy.append(np.asarray(xy, float))
        return len(self.xy) - 1

    def _road(self, a: int, b: int, kind: str, street: str, lanes: float, oneway: bool = False) -> None:
        self.roads.append((a, b, kind, street, lanes, oneway))


def _with_zones(
    random: np.random.Generator, made: Network, plan: _Plan, districts: int, towns: int, population: float
) -> tuple[Network, tuple[str, ...]]:
    """Adds a centroid for each district and town, tied to its junctions by connectors nobody drives through, and its people and jobs."""
    xy = np.stack([made.x, made.y], axis=1)
    inside = np.setdiff1d(np.arange(made.nodes), plan.out)
    places = xy[inside]
    # Lloyd's algorithm (1982): each district is what lies nearest to its middle, and its middle is the mean of that; the river's
    # banks are set apart in a third dimension, so that no district lies on both
    places = np.column_stack([places, plan.radius * np.sign(plan.beside_river(places))])
    middle = places[random.choice(len(places), min(districts, len(places)), replace=False)]
    for _ in range(30):
        owner = np.linalg.norm(places[:, None] - middle[None], axis=2).argmin(axis=1)
        middle = np.array([places[owner == k].mean(axis=0) if (owner == k).any() else middle[k] for k in range(len(middle))])
    middle = middle[:, :2]
    centroids = np.concatenate([middle, xy[plan.out] * 1.06])
    start, end = [], []
    for zone, centroid in enumerate(centroids):
        if zone < len(middle):
            own = inside[owner == zone]
            reach = own[np.argsort(np.hypot(*(xy[own] - centroid).T))[:3]]
        else:
            reach = np.array([plan.out[zone - len(middle)]])
        start += list(reach)
        end += [made.nodes + zone] * len(reach)
    ties = len(start)
    link_start = np.concatenate([made.start, start, end]).astype(np.int64)
    link_end = np.concatenate([made.end, end, start]).astype(np.int64)
    place = np.concatenate([xy, centroids]) + CENTRE
    tie_length = np.maximum(np.hypot(*(place[start] - place[end]).T), 30.0)

    from_heart = np.hypot(*middle.T) / plan.radius
    size = np.bincount(owner, minlength=len(middle)) ** 0.5
    living = size * np.exp(-1.3 * from_heart) * (0.55 + 0.45 * np.minimum(from_heart / 0.3, 1)) * random.lognormal(0, 0.25, len(middle))
    working = size * np.exp(-3.0 * from_heart) * random.lognormal(0, 0.3, len(middle))
    # work outside the centre: a business park where the motorway meets the city, and the harbour
    park = int(np.hypot(*(middle - xy[plan.out[0]]).T).argmin())
    harbour = int((np.abs(plan.beside_river(middle)) + 0.8 * np.abs(middle @ plan.along - 0.6 * plan.radius)).argmin())
    working[park] += 0.14 * working.sum()
    working[harbour] += 0.10 * working.sum()
    around = random.lognormal(0, 0.3, towns)
    people = np.concatenate([0.8 * population * living / living.sum(), 0.2 * population * around / around.sum()])
    jobs = np.concatenate([0.44 * population * working / working.sum(), 0.06 * population * around[::-1] / around.sum()])

    lon, lat = to_degrees(place[:, 0], place[:, 1], UTM)

    def extended(name: str, value: float | str) -> np.ndarray:
        return np.concatenate([getattr(made, name), np.full(2 * ties, value)])

    network = dataclasses.replace(
        made,
        x=place[:, 0],
        y=place[:, 1],
        lon=lon,
        lat=lat,
        utm=UTM,
        node_id=np.concatenate([made.node_id, [f"Z{k + 1}" for k in range(len(centroids))]]),
        start=link_start,
        end=link_end,
        length=np.concatenate([made.length, tie_length, tie_length]),
        free_speed=extended("free_speed", 30 / 3.6),
        capacity=extended("capacity", 1e4),  # a connector stands for many side streets: it shall not be what jams
        lanes=extended("lanes", 1.0),
        alpha=extended("alpha", 0.15),
        beta=extended("beta", 4.0),
        name=extended("name", ""),
        kind=extended("kind", "connector"),
        link_id=np.arange(1, len(link_start) + 1).astype(str),
        zone=made.nodes + np.arange(len(centroids)),
        through_zones=False,
        population=np.round(people),
        jobs=np.round(jobs),
        source="synthetic",
    )
    return network, _names(middle, park, harbour) + tuple(f"Town {_COMPASS[_eighth(c)]} {k + 1}" for k, c in enumerate(xy[plan.out]))


def _names(middle: np.ndarray, park: int, harbour: int) -> tuple[str, ...]:
    names: list[str] = []
    heart = int(np.hypot(*middle.T).argmin())
    for k, place in enumerate(middle):
        special = {heart: "Old Town", park: "Business Park", harbour: "Harbour"}
        base = special.get(k, f"{_COMPASS[_eighth(place)]} {'Side' if np.hypot(*place) < 0.5 * np.hypot(*middle.T).max() else 'End'}")
        same = sum(name == base or name.startswith(f"{base} ") and name[len(base) + 1 :].isdigit() for name in names)
        names.append(f"{base} {same + 1}" if same else base)
    return tuple(names)


def _eighth(xy: np.ndarray) -> int:
    return int(np.round(np.arctan2(xy[1], xy[0]) / (np.pi / 4))) % 8
