"""SUMO road networks (`.net.xml`, plain or packed): what cars may use of them, and which turns their connections leave out.

Source: sumo.dlr.de/docs/Networks/SUMO_Road_Networks.html. Lanes closed to the class `passenger` (buses, rails, footways) are left out.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from domains.city import files
from domains.city.network import Network, build, turns
from domains.city.projection import to_degrees
from domains.city.roads import ROADS
from twinsim.base import BadInput


def read_network(path: str | os.PathLike) -> Network:
    """The car network of a SUMO file; it has no zones. Positions are UTM metres where the file says how to get there. Raises BadInput.

    A link is an edge, as long as its lanes: what lies within junctions is not counted. SUMO knows no capacity: a lane has that of its
    OSM class where the edge's type names one, else 2000 veh/h from 90 km/h, 1500 from 60 km/h and 900 below, half a saturation flow of
    1800 for the red of signals.
    """
    path = Path(path)
    seen = _Seen(path)
    files.parse_xml(path, seen.start, seen.end)
    if not seen.junction:
        raise BadInput(f"{path}: expected a SUMO network, a <net> with junctions and edges; found no junction")
    edges = [edge for edge in seen.edges if edge["lanes"]]
    if not edges:
        raise BadInput(f"{path}: expected edges with lanes for cars, found none among {len(seen.edges)} edges")
    used = sorted({edge[end] for edge in edges for end in ("from", "to")})
    index = {junction: k for k, junction in enumerate(used)}
    for edge in edges:
        for end in ("from", "to"):
            if edge[end] not in seen.junction:
                raise BadInput(f"{path} edge {edge['id']}: it goes {end} junction {edge[end]!r}, which the file does not have")
    move, utm = seen.move()
    xy = np.array([seen.junction[junction] for junction in used]) + move
    speed = np.array([max(lane[0] for lane in edge["lanes"]) for edge in edges])
    lanes = np.array([float(len(edge["lanes"])) for edge in edges])
    kind = np.array([re.sub(r"^highway\.", "", edge["type"]).split("|")[0] for edge in edges])
    by_speed = np.where(speed >= 25, 2000.0, np.where(speed >= 60 / 3.6, 1500.0, 900.0))
    lane_capacity = np.array([ROADS[one].lane_capacity if one in ROADS else by_speed[k] for k, one in enumerate(kind)])
    lon, lat = to_degrees(xy[:, 0], xy[:, 1], utm) if utm else (None, None)
    shapes = tuple(_course(path, edge, xy[index[edge["from"]]], xy[index[edge["to"]]], move) for edge in edges)
    made = build(
        start=np.array([index[edge["from"]] for edge in edges]),
        end=np.array([index[edge["to"]] for edge in edges]),
        length=np.array([max(lane[1] for lane in edge["lanes"]) for edge in edges]),
        free_speed=speed,
        capacity=lanes * lane_capacity,
        lanes=lanes,
        link_id=np.array([edge["id"] for edge in edges]),
        name=np.array([edge["name"] for edge in edges]),
        kind=kind,
        node_id=np.array(used),
        x=xy[:, 0],
        y=xy[:, 1],
        lon=lon,
        lat=lat,
        utm=utm,
        shape=shapes,
        through_zones=False,
        source=f"SUMO {path.name}",
    )
    if not seen.connections:
        return made
    pairs = turns(made)
    allowed = np.array(
        [(a, b) in seen.connections for a, b in zip(made.link_id[pairs[:, 0]], made.link_id[pairs[:, 1]], strict=True)], bool
    )
    return dataclasses.replace(made, turn_bans=pairs[~allowed])


class _Seen:
    """What has come by of the file so far."""

    def __init__(self, path: Path):
        self.path = path
        self.location: Mapping[str, str] = {}
        self.junction: dict[str, tuple[float, float]] = {}
        self.edges: list[dict] = []
        self.connections: set[tuple[str, str]] = set()
        self.open = False

    def start(self, tag: str, given: Mapping[str, str]) -> None:
        if tag == "edge":
            self.open = given.get("function", "normal") == "normal" and "from" in given
            if self.open:
                ends = {key: given.get(key, "") for key in ("id", "from", "to", "name", "type", "shape")}
                self.edges.append({**ends, "lanes": []})
                files.at_most(len(self.edges), self.path)
        elif tag == "lane" and self.open:
            if _for_cars(given):
                where = f"{self.path} lane {given.get('id')}"
                self.edges[-1]["lanes"].append((_positive(where, given, "speed"), _positive(where, given, "length")))
        elif tag == "junction":
            if given.get("type") != "internal":
                where = f"{self.path} junction {given.get('id')}"
                self.junction[given.get("id", "")] = _float(where, given, "x"), _float(where, given, "y")
        elif tag == "connection":
            self.connections.add((given.get("from", ""), given.get("to", "")))
        elif tag == "location":
            self.location = dict(given)

    def end(self, tag: str) -> None:
        if tag == "edge":
            self.open = False

    def move(self) -> tuple[np.ndarray, int | None]:
        """What to add to the file's positions to get UTM's, and the zone; nothing and None where the file is not in UTM."""
        zone = re.search(r"\+proj=utm \+zone=(\d+)", self.location.get("projParameter", ""))
        if not zone:
            return np.zeros(2), None
        offset = [files.number(part, f"{self.path} location", "netOffset") for part in self.location.get("netOffset", "0,0").split(",")]
        return -np.array(offset[:2]), int(zone[1]) * (-1 if "+south" in self.location["projParameter"] else 1)


def _for_cars(lane: Mapping[str, str]) -> bool:
    allow, disallow = lane.get("allow"), lane.get("disallow", "")
    if allow is not None:
        return bool({"passenger", "all"} & set(allow.split()))
    return not {"passenger", "all"} & set(disallow.split())


def _course(path: Path, edge: dict, a: np.ndarray, b: np.ndarray, move: np.ndarray) -> np.ndarray:
    points = [[files.number(c, f"{path} edge {edge['id']}", "shape") for c in point.split(",")[:2]] for point in edge["shape"].split()]
    if len(points) < 2 or any(len(point) != 2 for point in points):
        return np.stack([a, b])
    return np.array(points) + move


def _float(where: str, given: Mapping[str, str], key: str) -> float:
    if key not in given:
        raise BadInput(f"{where}: expected an attribute {key}, found none")
    return files.number(given[key], where, key)


def _positive(where: str, given: Mapping[str, str], key: str) -> float:
    value = _float(where, given, key)
    if value <= 0:
        raise BadInput(f"{where}: expected a positive {key}, got {given[key]}")
    return value
