"""OpenStreetMap extracts (`.osm`, packed or not, and `.osm.pbf`): the roads that cars may use, with the turns they may not take.

Source: OSM wiki, Key:highway, Key:oneway, Key:lanes, Key:maxspeed, Key:access, Relation:restriction. What the tags do not say is filled
in from `roads`. Data (c) OpenStreetMap contributors, ODbL.
"""

import dataclasses
import os
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from domains.city import files, roads
from domains.city.network import Network, build
from domains.city.projection import point_scale, to_metres, utm_zone
from twinsim.base import BadInput

_CLOSED = {"no", "private", "agricultural", "forestry", "emergency", "military", "psv", "bus", "construction"}
_BY_FOOT = {"parking_aisle", "driveway", "drive-through", "emergency_access"}  # service roads that lead nowhere else
_FORTH, _BACK = {"yes", "true", "1"}, {"-1", "reverse"}


def read_network(path: str | os.PathLike, *, service: bool = False) -> Network:
    """The car network of an extract, one link from junction to junction and direction; it has no zones. Raises BadInput.

    Roads are cut where they meet, where one ends, and at the nodes of turn restrictions. Restrictions over a way, and those for some hours
    or vehicles only, are left out.

    Args:
      service: whether to take service roads too (yards, alleys); aisles of car parks and drives to houses never are.
    """
    path = Path(path)
    seen = _read_pbf(path, service) if path.name.endswith(".pbf") else _read_xml(path, service)
    if not seen.ways:
        raise BadInput(f"{path}: expected roads for cars (ways with highway={', '.join(list(roads.ROADS)[:3])} ...), found none")
    return _network(path, seen)


class _Seen:
    """What has come by of the file so far: nodes as packed columns, ways and restrictions of interest."""

    def __init__(self, path: Path, service: bool):
        self.path, self.service = path, service
        self.node, self.lon, self.lat = array("q"), array("d"), array("d")
        self.ways: list[tuple[str, list[int], dict[str, str]]] = []
        self.restrictions: list[tuple[str, list[tuple[str, str, str]]]] = []

    def add_way(self, number: str, refs: list[int], tags: dict[str, str]) -> None:
        refs = [ref for k, ref in enumerate(refs) if k == 0 or ref != refs[k - 1]]
        if len(refs) > 1 and _drivable(tags, self.service):
            self.ways.append((number, refs, tags))
            files.at_most(len(self.ways), self.path)

    def add_relation(self, members: list[tuple[str, str, str]], tags: dict[str, str]) -> None:
        what = tags.get("restriction:motorcar") or tags.get("restriction") or ""
        spared = {part.strip() for part in tags.get("except", "").split(";")} & {"motorcar", "motor_vehicle", "vehicle"}
        if tags.get("type", "restriction") == "restriction" and what.startswith(("no_", "only_")) and not spared:
            self.restrictions.append((what, members))


def _read_xml(path: Path, service: bool) -> _Seen:
    seen = _Seen(path, service)
    number, refs, tags, members = "", list[int](), dict[str, str](), list[tuple[str, str, str]]()
    inside = ""

    def start(tag: str, given: Mapping[str, str]) -> None:
        nonlocal inside, number, refs, tags, members
        if tag == "node":
            seen.node.append(_int(path, given, "id"))
            seen.lon.append(_degrees(path, given, "lon"))
            seen.lat.append(_degrees(path, given, "lat"))
        elif tag in ("way", "relation"):
            inside, number, refs, tags, members = tag, given.get("id", "?"), [], {}, []
        elif inside and tag == "nd":
            refs.append(_int(path, given, "ref"))
        elif inside and tag == "tag":
            tags[given.get("k", "")] = given.get("v", "")
        elif inside and tag == "member":
            members.append((given.get("type", ""), given.get("ref", ""), given.get("role", "")))

    def end(tag: str) -> None:
        nonlocal inside
        if tag == "way":
            seen.add_way(number, refs, tags)
        elif tag == "relation":
            seen.add_relation(members, tags)
        if tag in ("way", "relation"):
            inside = ""

    files.parse_xml(path, start, end)
    return seen


def _read_pbf(path: Path, service: bool) -> _Seen:
    try:
        import osmium
    except ImportError:
        raise BadInput(f"{path}: reading .osm.pbf needs osmium; pip install 'twinsim[city]', or give an .osm file") from None
    files.opened(path).close()  # is it there, and not too large
    seen = _Seen(path, service)
    types = {"n": "node", "w": "way", "r": "relation"}
    try:
        for thing in osmium.FileProcessor(str(path)):
            if isinstance(thing, osmium.osm.Node):
                seen.node.append(thing.id)
                seen.lon.append(thing.location.lon)
                seen.lat.append(thing.location.lat)
            elif isinstance(thing, osmium.osm.Way):
                if "highway" in thing.tags:
                    seen.add_way(str(thing.id), [node.ref for node in thing.nodes], dict(thing.tags))
            elif isinstance(thing, osmium.osm.Relation) and thing.tags.get("type") == "restriction":
                seen.add_relation([(types[member.type], str(member.ref), member.role) for member in thing.members], dict(thing.tags))
    except (RuntimeError, ValueError, OSError) as error:
        raise BadInput(f"{path}: expected an OpenStreetMap .pbf file, got: {error}") from None
    return seen


def _network(path: Path, seen: _Seen) -> Network:
    known = np.frombuffer(seen.node, np.int64)
    order = np.argsort(known, kind="stable")
    used = np.unique(np.concatenate([np.array(refs, np.int64) for _, refs, _ in seen.ways]))
    at = order[np.minimum(np.searchsorted(known, used, sorter=order), len(known) - 1)] if len(known) else used
    there = known[at] == used if len(known) else np.zeros(len(used), bool)
    place = {int(ref): k for k, ref in enumerate(used[there])}
    if not place:
        raise BadInput(f"{path}: expected the nodes of its roads with lat and lon, found none")
    lon, lat = np.frombuffer(seen.lon)[at[there]], np.frombuffer(seen.lat)[at[there]]
    utm = utm_zone(lon, lat)
    xy = np.stack(to_metres(lon, lat, utm), axis=1)

    # an extract cuts ways: what lies outside has no position, and the way goes on where it comes back in
    pieces = [(number, piece, tags) for number, refs, tags in seen.ways for piece in _within(refs, place)]
    uses = np.zeros(len(place), np.int64)
    for _, refs, _ in pieces:
        np.add.at(uses, [place[ref] for ref in refs], 1)
        uses[[place[refs[0]], place[refs[-1]]]] += 1
    for _, members in seen.restrictions:
        for kind, ref, role in members:
            if role == "via" and kind == "node" and ref.lstrip("-").isdigit() and int(ref) in place:
                uses[place[int(ref)]] += 1

    rows: list[tuple[int, int, np.ndarray, str, str, str, float, float, float]] = []
    for number, refs, tags in pieces:
        forward, backward = _directions(tags)
        kind, street = tags["highway"], tags.get("name") or tags.get("ref") or ""
        for part, course in enumerate(_cut([place[ref] for ref in refs], uses)):
            for turn, side in ((course, "forward"),) * forward + ((course[::-1], "backward"),) * backward:
                speed, lanes, capacity = _quality(tags, side, forward and backward)
                link = f"{'-' if side == 'backward' else ''}{number}#{part}"
                rows.append((turn[0], turn[-1], np.array(turn), link, street, kind, speed, lanes, capacity))
        files.at_most(len(rows), path)
    ends = sorted({row[0] for row in rows} | {row[1] for row in rows})
    new = {node: k for k, node in enumerate(ends)}
    shapes = tuple(xy[row[2]] for row in rows)
    ids = _unlike([row[3] for row in rows])
    made = build(
        start=np.array([new[row[0]] for row in rows]),
        end=np.array([new[row[1]] for row in rows]),
        length=np.array([max(_length(shape), 0.1) for shape in shapes]),
        free_speed=np.array([row[6] for row in rows]) / 3.6,
        lanes=np.array([row[7] for row in rows]),
        capacity=np.array([row[8] for row in rows]),
        link_id=np.array(ids),
        name=np.array([row[4] for row in rows]),
        kind=np.array([row[5] for row in rows]),
        node_id=used[there][ends].astype(str),
        x=xy[ends, 0],
        y=xy[ends, 1],
        lon=lon[ends],
        lat=lat[ends],
        utm=utm,
        shape=shapes,
        through_zones=False,
        source=f"OSM {path.name}",
    )
    bans = _bans(seen.restrictions, made, [row[3].lstrip("-").split("#")[0] for row in rows])
    return dataclasses.replace(made, turn_bans=bans) if len(bans) else made


def _drivable(tags: Mapping[str, str], service: bool) -> bool:
    kind = tags.get("highway", "")
    if kind not in roads.ROADS or tags.get("area") == "yes":
        return False
    if kind == "service" and (not service or tags.get("service") in _BY_FOOT):
        return False
    for key in ("motorcar", "motor_vehicle", "vehicle", "access"):  # the narrowest that is given decides
        if key in tags:
            return tags[key] not in _CLOSED
    return True


def _directions(tags: Mapping[str, str]) -> tuple[bool, bool]:
    """Whether a road may be driven along its drawing, and against it."""
    said = tags.get("oneway:motor_vehicle") or tags.get("oneway:vehicle") or tags.get("oneway") or ""
    if said in _BACK:
        return False, True
    if said in _FORTH:
        return True, False
    implied = roads.ROADS[tags["highway"]].oneway or tags.get("junction") in ("roundabout", "circular")
    return True, not implied or said == "no"


def _quality(tags: Mapping[str, str], side: str, both: bool) -> tuple[float, float, float]:
    """Free speed km/h, lanes and capacity veh/h of one direction."""
    road = roads.ROADS[tags["highway"]]
    speed = roads.speed(tags.get(f"maxspeed:{side}", "")) or roads.speed(tags.get("maxspeed", "")) or road.speed
    lanes = roads.lanes(tags.get(f"lanes:{side}", ""))
    if lanes is None and (total := roads.lanes(tags.get("lanes", ""))):
        buses = (roads.lanes(tags.get("lanes:psv", "")) or roads.lanes(tags.get("lanes:bus", ""))) or 0.0
        lanes = (total - buses) / (2 if both else 1)
    lanes = max(1.0, float(np.floor(lanes))) if lanes else float(road.lanes)
    return speed, lanes, lanes * road.lane_capacity


def _within(refs: list[int], place: Mapping[int, int]) -> Iterable[list[int]]:
    piece: list[int] = []
    for ref in refs:
        if ref in place:
            piece.append(ref)
            continue
        if len(piece) > 1:
            yield piece
        piece = []
    if len(piece) > 1:
        yield piece


def _cut(course: list[int], uses: np.ndarray) -> Iterable[list[int]]:
    """The way from junction to junction; a loop is cut in its middle as well, so that no link starts where it ends."""
    part = [course[0]]
    for node in course[1:]:
        part.append(node)
        if uses[node] > 1:
            if part[0] == part[-1]:
                half = len(part) // 2
                yield part[: half + 1]
                yield part[half:]
            else:
                yield part
            part = [node]


def _bans(restrictions: Iterable[tuple[str, list[tuple[str, str, str]]]], made: Network, way: list[str]) -> np.ndarray:
    """Pairs of links that restrictions forbid, `[ban, 2]`: named ones for no_..., all others for only_..."""
    into: dict[str, list[int]] = {}
    out: dict[str, list[int]] = {}
    for link, (a, b) in enumerate(zip(made.node_id[made.start].tolist(), made.node_id[made.end].tolist(), strict=True)):
        out.setdefault(a, []).append(link)
        into.setdefault(b, []).append(link)
    bans = set()
    for what, members in restrictions:
        vias = [ref for kind, ref, role in members if role == "via" and kind == "node"]
        if len(vias) != 1:
            continue
        froms = {ref for kind, ref, role in members if role == "from" and kind == "way"}
        tos = {ref for kind, ref, role in members if role == "to" and kind == "way"}
        goals = [link for link in out.get(vias[0], []) if way[link] in tos]
        if what.startswith("only_"):
            goals = [link for link in out.get(vias[0], []) if link not in goals] if goals else []
        bans |= {(a, b) for a in into.get(vias[0], []) if way[a] in froms for b in goals}
    return np.array(sorted(bans), np.int64).reshape(-1, 2)


def _length(shape: np.ndarray) -> float:
    """Length on the ground of a course in UTM metres, m."""
    middle = (shape[1:, 0] + shape[:-1, 0]) / 2
    return float((np.hypot(*np.diff(shape, axis=0).T) / point_scale(middle)).sum())


def _unlike(ids: list[str]) -> list[str]:
    """The same names, numbered where an extract's edge has cut a way into pieces."""
    seen: dict[str, int] = {}
    answer = []
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
        answer.append(one if seen[one] == 1 else f"{one}.{seen[one]}")
    return answer


def _int(path: Path, given: Mapping[str, str], key: str) -> int:
    text = given.get(key, "")
    if not text.lstrip("-").isdigit() or len(text) > 18:
        raise BadInput(f"{path}: expected a whole number for {key}, got {text!r}")
    return int(text)


def _degrees(path: Path, given: Mapping[str, str], key: str) -> float:
    try:
        value = float(given[key])
    except (KeyError, ValueError):
        value = float("nan")
    if not abs(value) <= 180:
        raise BadInput(f"{path} node {given.get('id')}: expected {key} in degrees, got {given.get(key)!r}")
    return value
