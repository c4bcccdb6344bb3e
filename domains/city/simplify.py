"""A raw map made fit for traffic models: dead ends off, chains merged, short links drawn into their junctions, zones laid over it.

Each step gives a network whose trips between what is left are the same: turn bans are carried along, and merging keeps the lane-kilometres
and, for chains, the travel time. Links much shorter than a time step's drive break dynamic models (github.com/toruseo/UXsim, issue 203).
"""

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from domains.city.network import BPR_ALPHA, BPR_BETA, Network, reached, select, turns
from domains.city.projection import to_degrees
from twinsim.base import BadInput

SHORTEST = 50.0  # m: at 50 km/h 3.6 s
GATES = ("motorway", "motorway_link", "trunk", "trunk_link", "primary", "primary_link", "secondary", "secondary_link", "tertiary")


def prepare(network: Network, zones: int, *, shortest: float = SHORTEST, seed: int = 0) -> Network:
    """A map without zones made ready: a zone at each road out of it, simplified, and `zones` districts within. Raises BadInput."""
    gated = drop_lost_zones(simplify(add_gates(network), shortest=shortest))
    return drop_lost_zones(add_zones(simplify(gated, shortest=shortest), zones, seed=seed))


def simplify(network: Network, *, shortest: float = SHORTEST) -> Network:
    """All steps in turn: the largest connected part, without dead ends, chains merged, links below `shortest` (m) drawn together.

    Raises BadInput where nothing is left.
    """
    network = merge_chains(_something_left(drop_dead_ends(largest_part(network))))
    network = merge_short(network, shortest)
    return merge_chains(_something_left(drop_dead_ends(largest_part(network))))


def largest_part(network: Network) -> Network:
    """The links and nodes of the largest part in which each link reaches each other one, turn bans kept; zones elsewhere are lost."""
    pairs = turns(dataclasses.replace(network, through_zones=True))
    graph = csr_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(network.links, network.links))
    _, part = connected_components(graph, connection="strong")
    # a connector with nothing beyond its centroid, and back, is a part by way of the centroid: through_zones above
    return without_lone_nodes(select(network, part == np.bincount(part).argmax()))


def drop_dead_ends(network: Network) -> Network:
    """The network without streets that end nowhere, unless a zone lies at their end."""
    start, end = network.start, network.end
    keep = np.ones(network.links, bool)
    safe = np.zeros(network.nodes, bool)
    safe[network.zone] = True
    while True:
        ends = np.sort(np.stack([start[keep], end[keep]], axis=1), axis=1)
        streets = np.unique(ends[ends[:, 0] != ends[:, 1]], axis=0)
        neighbours = np.bincount(streets.ravel(), minlength=network.nodes)
        dead = ~safe & (neighbours <= 1)
        gone = keep & (dead[start] | dead[end])
        if not gone.any():
            return without_lone_nodes(select(network, keep))
        keep &= ~gone


def merge_chains(network: Network) -> Network:
    """The network without nodes at which nothing can be decided: where a link goes on as one other of its kind, lanes and capacity.

    Length, lane-kilometres and free travel time of the whole are kept; the longest part gives the name.
    """
    links = network.links
    into, out = _by_node(network.end, network.nodes), _by_node(network.start, network.nodes)
    zones = set(network.zone.tolist())
    bans = {(int(a), int(b)) for a, b in network.turn_bans} if network.turn_bans is not None else set()
    follower = np.full(links, -1)

    def alike(a: int, b: int) -> bool:
        same = all(getattr(network, key)[a] == getattr(network, key)[b] for key in ("kind", "lanes", "capacity", "alpha", "beta"))
        return same and (a, b) not in bans

    for node in range(network.nodes):
        ins, outs = into.get(node, []), out.get(node, [])
        if node in zones or not 1 <= len(ins) == len(outs) <= 2:
            continue
        around = {int(network.start[k]) for k in ins} | {int(network.end[k]) for k in outs}
        if len(around) != 2 or node in around:
            continue
        # straight on: from one neighbour to the other, never back
        pairs = [(a, b) for a in ins for b in outs if network.start[a] != network.end[b]]
        if len(pairs) == len(ins) and all(alike(a, b) for a, b in pairs):
            for a, b in pairs:
                follower[a] = b
    has_before = np.zeros(links, bool)
    has_before[follower[follower >= 0]] = True
    chains: list[list[int]] = []
    chained = np.zeros(links, bool)
    for first in np.flatnonzero(~has_before).tolist():
        chains.append(_chain(follower, first, network))
        chained[chains[-1]] = True
    for first in range(links):  # a ring road without a junction has no first link; and what a chain left over starts anew
        if not chained[first]:
            chains.append(_chain(follower, first, network, chained))
            chained[chains[-1]] = True
    return _merged(network, chains)


def merge_short(network: Network, shortest: float = SHORTEST) -> Network:
    """The network with links below `shortest` (m) drawn into one junction, which is nowhere wider than twice that.

    What was driven within a junction goes to the links at it, so that lane-kilometres are kept; ways through it that did not exist
    (by one-way links or bans) become turn bans.
    """
    _needs_map(network, "merging short links")
    zones = np.zeros(network.nodes, bool)
    zones[network.zone] = True
    group = np.arange(network.nodes)
    members: dict[int, list[int]] = {k: [k] for k in range(network.nodes)}
    xy = np.stack([network.x, network.y], axis=1)
    short = np.flatnonzero((network.length < shortest) & ~zones[network.start] & ~zones[network.end])
    for link in short[np.argsort(network.length[short], kind="stable")]:
        a, b = int(group[network.start[link]]), int(group[network.end[link]])
        if a == b:
            continue
        both = members[a] + members[b]
        if np.hypot(*np.ptp(xy[both], axis=0)) > 2 * shortest:
            continue
        group[members[b]] = a
        members[a] = both
        del members[b]
    inner = (group[network.start] == group[network.end]) & (network.start != network.end)
    if not inner.any():
        return network
    outer = ~inner
    lane_metres = np.bincount(group[network.start[inner]], (network.length * network.lanes)[inner], minlength=network.nodes)
    attached = np.bincount(group[network.start[outer]], network.lanes[outer], minlength=network.nodes)
    attached += np.bincount(group[network.end[outer]], network.lanes[outer], minlength=network.nodes)
    lonely = inner & (attached[group[network.start]] == 0)  # a part of the map that is one junction and no more: leave it
    if lonely.any():
        free = np.isin(group, group[network.start[lonely]])
        group = np.where(free, np.arange(network.nodes), group)
        inner, outer = inner & ~lonely, outer | lonely
    extra = np.divide(lane_metres, attached, out=np.zeros_like(lane_metres), where=attached > 0)
    grown = np.where(outer & ~lonely, extra[group[network.start]] + extra[group[network.end]], 0.0)

    bans = _bans_through(network, group, inner)
    size = np.bincount(group, minlength=network.nodes)
    middle = np.stack([np.bincount(group, xy[:, k], minlength=network.nodes) / np.maximum(size, 1) for k in (0, 1)], axis=1)
    middle[zones] = xy[zones]
    lon, lat = (network.lon, network.lat) if network.utm is None else to_degrees(middle[:, 0], middle[:, 1], network.utm)
    made = dataclasses.replace(
        network,
        start=group[network.start],
        end=group[network.end],
        length=network.length + grown,
        x=middle[:, 0],
        y=middle[:, 1],
        lon=lon,
        lat=lat,
        turn_bans=bans,
    )
    return without_lone_nodes(select(made, outer))


def add_gates(network: Network, *, within: float = 300.0, kinds: tuple[str, ...] = GATES) -> Network:
    """The network with a zone wherever roads of these classes leave the map; what lies `within` m of another is one zone.

    It is there that trips from outside begin and end, and that the two carriageways of a motorway belong together: without it they are
    dead ends. Roads without a class count. Nobody drives through the centroids.
    """
    _needs_map(network, "adding gates")
    ends = np.sort(np.stack([network.start, network.end], axis=1), axis=1)
    streets = np.unique(ends[ends[:, 0] != ends[:, 1]], axis=0)
    lone = np.bincount(streets.ravel(), minlength=network.nodes) == 1
    lone[network.zone] = False
    major = np.zeros(network.nodes, bool)
    for one in (network.start, network.end):
        major[one[np.isin(network.kind, (*kinds, ""))]] = True
    fringe = np.flatnonzero(lone & major)
    if not len(fringe):
        return network
    xy = np.stack([network.x, network.y], axis=1)[fringe]
    near = cKDTree(xy).query_pairs(within, output_type="ndarray")
    graph = csr_array((np.ones(len(near), np.int8), (near[:, 0], near[:, 1])), shape=(len(fringe), len(fringe)))
    gates, gate = connected_components(graph, directed=False)
    size = np.bincount(gate)
    middle = np.stack([np.bincount(gate, xy[:, k]) / size for k in (0, 1)], axis=1)
    leaves, enters = np.isin(fringe, network.end), np.isin(fringe, network.start)
    return _with_centroids(network, middle, (fringe[leaves], gate[leaves]), (fringe[enters], gate[enters]), "gate")


def drop_lost_zones(network: Network) -> Network:
    """The network with zones that all reach each other: those that most others cannot reach, or that reach fewest, go first."""
    lost = ~reached(network)
    keep = np.ones(network.zones, bool)
    while lost[np.ix_(keep, keep)].any():
        misses = (lost & keep & keep[:, None]).sum(axis=0) + (lost & keep & keep[:, None]).sum(axis=1)
        keep[misses.argmax()] = False
    if keep.all():
        return network
    gone = np.isin(np.arange(network.nodes), network.zone[~keep])
    return without_lone_nodes(select(network, ~gone[network.start] & ~gone[network.end]))


def add_zones(network: Network, zones: int, *, seed: int = 0, connectors: int = 3) -> Network:
    """The network with `zones` more, districts laid over its junctions: a centroid in each, tied to its nearest junctions.

    Lloyd's algorithm (1982) on the junctions; nobody drives through the centroids. Raises BadInput where there are too few junctions.
    """
    _needs_map(network, "adding zones")
    junctions = np.setdiff1d(np.arange(network.nodes), network.zone)
    if not 2 <= zones <= len(junctions) // 2:
        raise BadInput(f"adding zones: expected 2 to {len(junctions) // 2} zones for {len(junctions)} junctions, got {zones}")
    xy = np.stack([network.x, network.y], axis=1)[junctions]
    middle = xy[np.random.default_rng(seed).choice(len(xy), zones, replace=False)]
    for _ in range(20):
        owner = cKDTree(middle).query(xy)[1]
        count = np.bincount(owner, minlength=zones)
        mean = np.stack([np.bincount(owner, xy[:, k], minlength=zones) / np.maximum(count, 1) for k in (0, 1)], axis=1)
        middle = np.where(count[:, None] > 0, mean, middle)
    near = cKDTree(xy).query(middle, k=min(connectors, len(xy)))[1].reshape(zones, -1)
    ties = junctions[near.ravel()], np.repeat(np.arange(zones), near.shape[1])
    return _with_centroids(network, middle, ties, ties, "zone")


def without_lone_nodes(network: Network) -> Network:
    """The network without nodes that no link touches, zones among them; indices close ranks."""
    used = np.zeros(network.nodes, bool)
    used[network.start] = used[network.end] = True
    new = np.cumsum(used) - 1
    kept = used[network.zone]
    of_zone = ("zone_id", "population", "jobs")
    changed: dict[str, Any] = {key: getattr(network, key) for key in ("x", "y", "lon", "lat", "node_id", *of_zone)}
    for key, value in changed.items():
        if value is not None:
            changed[key] = value[kept] if key in of_zone else value[used]
    ends = {"start": new[network.start], "end": new[network.end], "zone": new[network.zone[kept]]}
    return dataclasses.replace(network, **changed | ends)


def _something_left(network: Network) -> Network:
    if not network.links:
        raise BadInput(
            f"simplifying {network.source or 'a network'}: nothing is left; expected streets that lead round, not dead ends alone"
        )
    return network


def _needs_map(network: Network, what: str) -> None:
    if not network.has_map:
        raise BadInput(f"{what}: expected a network with positions, this one has none")


def _with_centroids(
    network: Network, middle: np.ndarray, to: tuple[np.ndarray, np.ndarray], off: tuple[np.ndarray, np.ndarray], what: str
) -> Network:
    """Centroids at `middle`, `[zone, 2]`, with connectors to them and off them, each given as (junction, zone)."""
    start = np.concatenate([to[0], network.nodes + off[1]])
    end = np.concatenate([network.nodes + to[1], off[0]])
    x, y = np.concatenate([np.stack([network.x, network.y], axis=1), middle]).T
    length = np.maximum(np.hypot(x[start] - x[end], y[start] - y[end]), 1.0)
    ties = len(start)

    def more(name: str, value: float | str | np.ndarray) -> np.ndarray:
        return np.concatenate([getattr(network, name), np.broadcast_to(np.asarray(value), ties)])

    courses = tuple(np.array([[x[a], y[a]], [x[b], y[b]]]) for a, b in zip(start, end, strict=True))
    lon, lat = (None, None) if network.utm is None else to_degrees(x, y, network.utm)
    return dataclasses.replace(
        network,
        x=x,
        y=y,
        lon=lon,
        lat=lat,
        node_id=np.concatenate([network.node_id, [f"{what} {k + 1}" for k in range(len(middle))]]),
        start=more("start", start),
        end=more("end", end),
        length=more("length", length),
        free_speed=more("free_speed", 30 / 3.6),
        capacity=more("capacity", 1e4),  # a connector stands for many side streets: it shall not be what jams
        lanes=more("lanes", 1.0),
        alpha=more("alpha", BPR_ALPHA),
        beta=more("beta", BPR_BETA),
        link_id=more("link_id", np.array([f"{what} connector {k + 1}" for k in range(ties)])),
        name=more("name", ""),
        kind=more("kind", "connector"),
        toll=None if network.toll is None else more("toll", 0.0),
        shape=None if network.shape is None else network.shape + courses,
        zone=np.concatenate([network.zone, network.nodes + np.arange(len(middle))]),
        zone_id=None,
        population=None,
        jobs=None,
        through_zones=False,
    )


def _by_node(end: np.ndarray, nodes: int) -> dict[int, list[int]]:
    answer: dict[int, list[int]] = defaultdict(list)
    for link, node in enumerate(end.tolist()):
        answer[node].append(link)
    return answer


def _chain(follower: np.ndarray, first: int, network: Network, chained: np.ndarray | None = None) -> list[int]:
    """Links from `first` on, ending before a link that is taken or would close the chain to a loop."""
    chain = [first]
    while (after := int(follower[chain[-1]])) >= 0:
        if network.end[after] == network.start[first] or (chained is not None and chained[after]) or after == first:
            break
        chain.append(after)
    return chain


def _merged(network: Network, chains: list[list[int]]) -> Network:
    """One link a chain."""
    first, last = np.array([chain[0] for chain in chains]), np.array([chain[-1] for chain in chains])
    member = np.concatenate([np.array(chain) for chain in chains])
    owner = np.repeat(np.arange(len(chains)), [len(chain) for chain in chains])
    longest = np.array([chain[int(network.length[chain].argmax())] for chain in chains])
    length = np.bincount(owner, network.length[member])
    alone = np.bincount(owner) == 1
    time = np.bincount(owner, network.free_time[member])
    made = select(network, longest)
    shape = network.shape
    if shape is not None:
        shape = tuple(np.concatenate([shape[chain[0]]] + [shape[k][1:] for k in chain[1:]]) for chain in chains)
    elif network.has_map and not alone.all():
        xy = np.stack([network.x, network.y], axis=1)
        shape = tuple(xy[[network.start[chain[0]], *network.end[chain]]] for chain in chains)
    bans = None
    if network.turn_bans is not None:
        ends_as, starts_as = np.full(network.links, -1), np.full(network.links, -1)
        ends_as[last], starts_as[first] = np.arange(len(chains)), np.arange(len(chains))
        bans = np.stack([ends_as[network.turn_bans[:, 0]], starts_as[network.turn_bans[:, 1]]], axis=1)
        bans = bans[(bans >= 0).all(axis=1)]  # the others were at nodes that are gone
    changed = dataclasses.replace(
        made,
        start=network.start[first],
        end=network.end[last],
        length=length,
        free_speed=np.where(alone, made.free_speed, length / time),
        toll=None if network.toll is None else np.bincount(owner, network.toll[member]),
        shape=shape,
        turn_bans=bans,
    )
    return without_lone_nodes(changed)


def _bans_through(network: Network, group: np.ndarray, inner: np.ndarray) -> np.ndarray | None:
    """Pairs of outer links that meet at a drawn-together junction but have no way through it, and the bans elsewhere, `[ban, 2]`."""
    wide = np.bincount(group, minlength=network.nodes)[group] > 1  # nodes that were drawn together
    old = network.turn_bans if network.turn_bans is not None else np.zeros((0, 2), np.int64)
    kept = [(int(a), int(b)) for a, b in old if not wide[network.end[a]]]
    after: dict[int, list[int]] = defaultdict(list)
    pairs = turns(dataclasses.replace(network, through_zones=True))
    for a, b in pairs[wide[network.end[pairs[:, 0]]]].tolist():
        after[a].append(b)
    outs: dict[int, list[int]] = defaultdict(list)
    for link in np.flatnonzero(~inner & wide[network.start]).tolist():
        outs[int(group[network.start[link]])].append(link)
    for link in np.flatnonzero(~inner & wide[network.end]).tolist():
        found, queue = set(), [link]
        while queue:
            for b in after[queue.pop()]:
                if b not in found:
                    found.add(b)
                    if inner[b]:
                        queue.append(b)
        kept += [(link, b) for b in outs[int(group[network.end[link]])] if b not in found]
    return np.array(kept, np.int64).reshape(-1, 2) if kept else None
