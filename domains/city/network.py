"""A road network and the trips that use it, as plain numpy arrays, and the checks that every other part may then rely on.

Travel time of a link is that of the Bureau of Public Roads: t = t0 (1 + alpha (v / c)^beta), with t0 = length / free_speed
(Traffic Assignment Manual, US BPR 1964, alpha 0.15 and beta 4 unless a file says otherwise). What a driver weighs is t + toll.
"""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components

from twinsim.base import BadInput

BPR_ALPHA, BPR_BETA = 0.15, 4.0
UNBOUNDED_SPEED = 1e12  # m/s, of a link that a file gives no travel time: finite, so that length / speed stays a number

_PER_LINK = ("start", "end", "length", "free_speed", "capacity", "lanes", "alpha", "beta", "link_id", "name", "kind")


@dataclass(frozen=True)
class Network:
    """A directed road network. Indices are int64, quantities float64, names `str` arrays.

    Attributes:
      x, y: projected position of a node, m, `[node]`; all NaN where the file has no map.
      node_id: the file's own name of a node, `[node]`.
      start, end: node index at either end of a link, `[link]`.
      length: m, `[link]`. free_speed: of an empty link, m/s, `[link]`. capacity: veh/h, `[link]`. lanes: `[link]`.
      alpha, beta: of the BPR function, `[link]`; alpha is 0 where travel time is constant.
      link_id: the file's own name of a link, `[link]`. name: of its street, "" where it has none, `[link]`.
      kind: road class (OSM's words where they are known), `[link]`.
      zone: node index of each centroid, `[zone]`.
      zone_id: the file's own name of a zone, `[zone]`; None for 1, 2, ...
      through_zones: whether a trip may pass through a centroid that is neither its origin nor its destination.
      lon, lat: degrees, WGS84, `[node]`, where they are known. utm: the zone that x and y are in, +32 north, -32 south.
      turn_bans: pairs (link, link) that may not follow each other, `[ban, 2]`.
      toll: what a link costs besides time, in seconds of travel time, `[link]`; money over value of time, or a distance cost.
      shape: points of each link's course, m, `[point, 2]` each, ends included.
      population, jobs: people living and working in a zone, `[zone]`.
      source: where it came from, in words.
    """

    x: np.ndarray
    y: np.ndarray
    node_id: np.ndarray
    start: np.ndarray
    end: np.ndarray
    length: np.ndarray
    free_speed: np.ndarray
    capacity: np.ndarray
    lanes: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    link_id: np.ndarray
    name: np.ndarray
    kind: np.ndarray
    zone: np.ndarray
    zone_id: np.ndarray | None = None
    through_zones: bool = True
    lon: np.ndarray | None = None
    lat: np.ndarray | None = None
    utm: int | None = None
    turn_bans: np.ndarray | None = None
    toll: np.ndarray | None = None
    shape: tuple[np.ndarray, ...] | None = None
    population: np.ndarray | None = None
    jobs: np.ndarray | None = None
    source: str = ""

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self.node_id)

    @property
    def links(self) -> int:
        """How many links there are."""
        return len(self.start)

    @property
    def zones(self) -> int:
        """How many zones there are."""
        return len(self.zone)

    @property
    def zone_names(self) -> list[str]:
        """The file's own name of each zone, or 1, 2, ..."""
        return [str(k + 1) for k in range(self.zones)] if self.zone_id is None else self.zone_id.tolist()

    @property
    def free_time(self) -> np.ndarray:
        """Travel time of an empty link, s, `[link]`."""
        return self.length / self.free_speed

    @property
    def has_map(self) -> bool:
        """Whether the nodes have positions."""
        return bool(np.isfinite(self.x).all() and np.isfinite(self.y).all())

    @property
    def lane_km(self) -> float:
        """Length times lanes of all links, km."""
        return float(self.length @ self.lanes) / 1000


@dataclass(frozen=True)
class Demand:
    """Trips between zones in one hour.

    Attributes:
      trips: veh/h from zone (row) to zone (column), `[zone, zone]`.
    """

    trips: np.ndarray

    @property
    def total(self) -> float:
        """All trips, those within a zone included, veh/h."""
        return float(self.trips.sum())


def build(*, start: np.ndarray, end: np.ndarray, length: np.ndarray | float, **given: Any) -> Network:
    """A `Network` of what is given, the rest filled in: lane capacity 1800 veh/h, one lane, 50 km/h, classic BPR, no names.

    Arrays may be anything that numpy takes; a single number stands for all links. Not checked: see `check`.
    """
    links = len(np.asarray(start))
    zone = given.pop("zone", ())
    top = max((int(np.max(part)) for part in (start, end, zone) if np.size(part)), default=-1) + 1
    nodes = len(given["node_id"]) if "node_id" in given else len(given["x"]) if "x" in given else top
    lanes = _full(given.pop("lanes", 1.0), links)
    parts: dict[str, Any] = {
        "x": np.full(nodes, np.nan),
        "y": np.full(nodes, np.nan),
        "node_id": np.arange(1, nodes + 1).astype(str),
        "free_speed": 50 / 3.6,
        "capacity": 1800.0 * lanes,
        "alpha": BPR_ALPHA,
        "beta": BPR_BETA,
        "link_id": np.arange(1, links + 1).astype(str),
        "name": "",
        "kind": "",
    } | given
    for key in ("free_speed", "capacity", "alpha", "beta"):
        parts[key] = _full(parts[key], links)
    for key in ("x", "y", "lon", "lat", "toll", "population", "jobs"):
        if parts.get(key) is not None:
            parts[key] = np.asarray(parts[key], float)
    for key in ("name", "kind", "link_id"):
        parts[key] = np.full(links, parts[key]) if isinstance(parts[key], str) else np.asarray(parts[key], dtype=str)
    for key in ("node_id", "zone_id"):
        if parts.get(key) is not None:
            parts[key] = np.asarray(parts[key], dtype=str)
    if parts.get("turn_bans") is not None:
        parts["turn_bans"] = np.asarray(parts["turn_bans"], np.int64).reshape(-1, 2)
    ends: dict[str, Any] = {"start": np.asarray(start, np.int64), "end": np.asarray(end, np.int64), "zone": np.asarray(zone, np.int64)}
    return Network(length=_full(length, links), lanes=lanes, **ends, **parts)


def check(network: Network, demand: Demand | None = None) -> None:
    """Raises BadInput, naming nodes and links, unless every number makes sense and every trip has a way.

    With a demand, each zone must reach those it has trips to; without, each zone must reach each other one.
    """
    _check_links(network)
    trips = np.ones((network.zones, network.zones)) if demand is None else np.asarray(demand.trips)
    if trips.shape != (network.zones, network.zones):
        raise BadInput(f"demand: expected trips [{network.zones}, {network.zones}], one row a zone, got {list(trips.shape)}")
    if not np.isfinite(trips).all() or (trips < 0).any():
        row, column = np.argwhere(~(np.isfinite(trips) & (trips >= 0)))[0]
        names = network.node_id[network.zone]
        raise BadInput(f"demand from zone {names[row]} to zone {names[column]}: expected trips of 0 or more, got {trips[row, column]}")
    _check_ways(network, trips)


def turns(network: Network) -> np.ndarray:
    """Pairs of links (in, out) that may follow each other, `[turn, 2]`: all that meet at a node, less the banned ones.

    Where centroids may not be driven through, none leads through one.
    """
    order = np.argsort(network.start, kind="stable")
    first = np.searchsorted(network.start[order], np.arange(network.nodes + 1))
    count = (first[1:] - first[:-1])[network.end]
    into = np.repeat(np.arange(network.links), count)
    offset = np.arange(len(into)) - np.repeat(np.cumsum(count) - count, count)
    pairs = np.stack([into, order[first[network.end][into] + offset]], axis=1) if len(into) else np.zeros((0, 2), np.int64)
    allowed = np.ones(len(pairs), bool)
    if not network.through_zones:
        allowed &= ~np.isin(network.end[pairs[:, 0]], network.zone)
    if network.turn_bans is not None and len(network.turn_bans):
        banned = network.turn_bans @ np.array([network.links, 1])
        allowed &= ~np.isin(pairs @ np.array([network.links, 1]), banned)
    return pairs[allowed]


def reached(network: Network) -> np.ndarray:
    """Whether a zone (row) has a way to a zone (column), turn bans and closed centroids kept, `[zone, zone]` bool."""
    # one vertex a link, so that a ban is an absent edge; one more a zone to start from and one to end at
    L, Z = network.links, network.zones
    pairs = turns(network)
    index = np.full(network.nodes, -1)
    index[network.zone] = np.arange(Z)
    out, into = index[network.start], index[network.end]
    rows = np.concatenate([pairs[:, 0], L + out[out >= 0], np.flatnonzero(into >= 0)])
    columns = np.concatenate([pairs[:, 1], np.flatnonzero(out >= 0), L + Z + into[into >= 0]])
    graph = csr_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(L + 2 * Z, L + 2 * Z))
    answer = np.eye(Z, dtype=bool)
    _, component = connected_components(graph, connection="strong")
    known: dict[int, np.ndarray] = {}  # zones whose first link lies in one strong component reach the same zones
    for zone in range(Z):
        firsts = {int(component[link]) for link in graph.indices[graph.indptr[L + zone] : graph.indptr[L + zone + 1]]}
        for link_component in firsts:
            if link_component not in known:
                seed = int(np.flatnonzero(component == link_component)[0])
                ends = breadth_first_order(graph, seed, return_predecessors=False)
                ends = ends[ends >= L + Z] - L - Z
                known[link_component] = np.isin(np.arange(Z), ends)
            answer[zone] |= known[link_component]
    return answer


def courses(network: Network, links: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The straight pieces that links run along: their ends, m, `[piece, 2]` each, and the index in `links` of whose they are, `[piece]`."""
    if network.shape is None:
        xy = np.stack([network.x, network.y], axis=1)
        return xy[network.start[links]], xy[network.end[links]], np.arange(len(links))
    shapes = [network.shape[link] for link in links]
    owner = np.repeat(np.arange(len(links)), [len(points) - 1 for points in shapes])
    return np.concatenate([points[:-1] for points in shapes]), np.concatenate([points[1:] for points in shapes]), owner


def select(network: Network, keep: np.ndarray) -> Network:
    """The network with the links `keep` (mask or indices, `[link]`) alone; all nodes stay, bans of lost links go."""
    links = np.arange(network.links)[keep]
    parts: dict[str, Any] = {name: getattr(network, name)[links] for name in _PER_LINK}
    if network.toll is not None:
        parts["toll"] = network.toll[links]
    if network.shape is not None:
        parts["shape"] = tuple(network.shape[i] for i in links)
    if network.turn_bans is not None:
        new = np.full(network.links, -1)
        new[links] = np.arange(len(links))
        bans = new[network.turn_bans]
        parts["turn_bans"] = bans[(bans >= 0).all(axis=1)]
    return dataclasses.replace(network, **parts)


def find_street(network: Network, name: str) -> np.ndarray:
    """Indices of the links of the street `name`, case aside, `[n]`. Raises BadInput with the nearest names."""
    wanted = name.strip().casefold()
    folded = np.array([one.casefold() for one in network.name], dtype=str)
    links = np.flatnonzero(folded == wanted) if wanted else np.zeros(0, np.int64)
    if len(links):
        return links
    names = {one.casefold(): str(one) for one in network.name if one}
    close = [names[one] for one in difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.6)]
    close += [full for one, full in names.items() if wanted and wanted in one and full not in close][: 3 - len(close)]
    if close:
        raise BadInput(f"street {name!r}: the network has none of that name; did you mean {', '.join(map(repr, close))}?")
    raise BadInput(f"street {name!r}: expected one of the network's {len(names)} street names, none is like it")


def _check_links(network: Network) -> None:
    """Every array as long as it should be, every index in range, every quantity finite and positive."""
    if not network.links:
        raise BadInput("network: expected at least one link, got none")
    for name in _PER_LINK + ("toll",) * (network.toll is not None):
        if len(getattr(network, name)) != network.links:
            raise BadInput(f"network: expected {network.links} values of {name}, one a link, got {len(getattr(network, name))}")
    for name in ("x", "y"):
        if len(getattr(network, name)) != network.nodes:
            raise BadInput(f"network: expected {network.nodes} values of {name}, one a node, got {len(getattr(network, name))}")
    wide = np.isfinite(network.x) & np.isfinite(network.y)
    if wide.any() and not wide.all():
        raise BadInput(f"node {network.node_id[np.flatnonzero(~wide)[0]]}: expected a position, got none, while other nodes have one")
    for name in ("start", "end"):
        index = getattr(network, name)
        wrong = np.flatnonzero((index < 0) | (index >= network.nodes))
        if len(wrong):
            link = network.link_id[wrong[0]]
            raise BadInput(f"link {link}: its {name} is node index {index[wrong[0]]}, expected 0 to {network.nodes - 1}")
    wrong = np.flatnonzero((network.zone < 0) | (network.zone >= network.nodes))
    if len(wrong):
        raise BadInput(f"zone {wrong[0]}: its node index is {network.zone[wrong[0]]}, expected 0 to {network.nodes - 1}")
    if len(np.unique(network.zone)) != network.zones:
        raise BadInput("network: expected one zone a centroid node, got two zones at the same node")
    if len(set(network.zone_names)) != network.zones or len(network.zone_names) != network.zones:
        raise BadInput(f"network: expected {network.zones} zone_id that differ, one a zone, got {', '.join(network.zone_names)}")
    for name, unit in (("length", "m"), ("free_speed", "m/s"), ("capacity", "veh/h"), ("lanes", "")):
        value = getattr(network, name)
        _refuse(network, ~(np.isfinite(value) & (value > 0)), f"a finite positive {name}{f' in {unit}' if unit else ''}", value)
    for name in ("alpha", "beta") + ("toll",) * (network.toll is not None):
        value = getattr(network, name)
        _refuse(network, ~(np.isfinite(value) & (value >= 0)), f"a finite {name} of 0 or more", value)
    bans = network.turn_bans
    if bans is not None and len(bans):
        if bans.min() < 0 or bans.max() >= network.links:
            raise BadInput(f"turn ban: expected link indices 0 to {network.links - 1}, got {bans.min()} to {bans.max()}")
        apart = np.flatnonzero(network.end[bans[:, 0]] != network.start[bans[:, 1]])
        if len(apart):
            a, b = network.link_id[bans[apart[0]]]
            raise BadInput(f"turn ban from link {a} to link {b}: expected links that meet at a node, these do not")


def _check_ways(network: Network, trips: np.ndarray) -> None:
    """Raises BadInput, naming zones, where there are trips and no way."""
    lost = np.argwhere((trips > 0) & ~reached(network))
    if not len(lost):
        return
    names = network.node_id[network.zone]
    some = ", ".join(f"{names[a]} to {names[b]}" for a, b in lost[:3])
    more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    closed = "" if network.through_zones else "; nobody drives through a centroid here (through_zones of a GMNS config.csv)"
    raise BadInput(f"network is broken: no way from zone {some}{more}; expected every zone to reach those it has trips to{closed}")


def _refuse(network: Network, wrong: np.ndarray, expected: str, value: np.ndarray) -> None:
    for link in np.flatnonzero(wrong)[:1]:
        ends = f"{network.node_id[network.start[link]]} to {network.node_id[network.end[link]]}"
        raise BadInput(f"link {network.link_id[link]} from node {ends}: expected {expected}, got {value[link]}")


def _full(value: float | np.ndarray, links: int) -> np.ndarray:
    return np.full(links, value, float) if np.ndim(value) == 0 else np.asarray(value, float)
