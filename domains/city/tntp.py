"""Networks, trips and published flows in TNTP, the text format of the Transportation Networks for Research collection.

Source: github.com/bstabler/TransportationNetworks, README.md ("TNTP data format"). The files there are for academic research only.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from domains.city import files
from domains.city.network import BPR_ALPHA, UNBOUNDED_SPEED, Demand, Network, build
from domains.city.projection import to_metres, utm_zone
from twinsim.base import BadInput

METRES = {"m": 1.0, "km": 1000.0, "ft": 0.3048, "mile": 1609.344}  # international foot and mile, 1959
COLUMNS = ("init_node", "term_node", "capacity", "length", "free_flow_time", "b", "power", "speed", "toll", "link_type")
SHORTEST = 1.0  # m, of a link whose file says 0: lengths are positive here; its travel time stays the file's
SMALLEST_B = 1e-3  # below it capacity is folded into B (Barcelona: 4e-71), too small for float32

PathLike = str | os.PathLike


def read_network(
    net: PathLike,
    nodes: PathLike | None = None,
    *,
    length_unit: str | None = None,
    minutes: float = 1.0,
    toll_weight: float = 0.0,
    distance_weight: float = 0.0,
    node_unit: str | None = None,
) -> Network:
    """The network of a `_net.tntp` file, zones being its first nodes. Raises BadInput.

    A link whose B is below 1e-3 gets the capacity at which B is 0.15: the same travel time. One whose power is 0 takes
    t0 (1 + B) at any flow, as the format says; one that takes no time at all gets a speed of 1e12 m/s.

    Args:
      nodes: positions, a `_node.tntp` or GeoJSON file.
      length_unit: of the file: m, km, ft or mile; by default what its header says, km where it says nothing.
      minutes: how long the file's unit of time is.
      toll_weight, distance_weight: the collection's generalised cost weights, in the file's time per unit of toll and of length.
      node_unit: of the positions: deg, m, km, ft or mile; by default deg where they are within those of the Earth and
        farther than 5 from its origin, which is open sea, km where they are within 5 of it, else m.
    """
    net = Path(net)
    said, header, rows = _table(net)
    announced = ("NUMBER OF ZONES", "NUMBER OF NODES", "FIRST THRU NODE", "NUMBER OF LINKS")
    zones, count, through, links = (_whole(net, said, key) for key in announced)
    if 1 < through <= zones:
        raise BadInput(f"{net}: expected FIRST THRU NODE 1 or {zones + 1}, all zones or none closed to through trips, got {through}")
    if len(rows) != links:
        raise BadInput(f"{net}: expected the {links} links it announces, got {len(rows)}")
    column = {name: rows[:, header.index(name)] for name in COLUMNS}
    ends = np.stack([column["init_node"], column["term_node"]])
    unknown = np.flatnonzero(((ends < 1) | (ends > count) | (ends != np.round(ends))).any(axis=0))
    if len(unknown):
        a, b = ends[:, unknown[0]]
        raise BadInput(f"{net} link {unknown[0] + 1} from node {a:g} to {b:g}: expected nodes 1 to {count}, as the file announces")

    unit = METRES[_known(length_unit or _length_unit(said), METRES, "length_unit")]
    time = 60 * minutes * column["free_flow_time"]
    alpha, beta, capacity = column["b"].copy(), column["power"].copy(), column["capacity"].copy()
    constant = (beta == 0) | (alpha == 0)
    time, alpha, beta = np.where(beta == 0, time * (1 + alpha), time), np.where(constant, 0.0, alpha), np.where(constant, 1.0, beta)
    folded = ~constant & (alpha < SMALLEST_B)
    with np.errstate(over="ignore"):  # what becomes infinite is what `check` names
        capacity[folded] *= np.exp(np.log(BPR_ALPHA / alpha[folded]) / beta[folded])
        length = np.where(column["length"] > 0, unit * column["length"], SHORTEST)
        free_speed = np.where(time > 0, length / np.where(time > 0, time, 1.0), UNBOUNDED_SPEED)
    alpha[folded] = BPR_ALPHA
    toll = 60 * minutes * (toll_weight * column["toll"] + distance_weight * column["length"])
    place = {} if nodes is None else _positions(Path(nodes), count, node_unit)
    return build(
        start=ends[0].astype(np.int64) - 1,
        end=ends[1].astype(np.int64) - 1,
        length=length,
        free_speed=free_speed,
        capacity=capacity,
        lanes=np.clip(np.round(capacity / 1800), 1, 8),  # the format has none: one for each 1800 veh/h
        alpha=alpha,
        beta=beta,
        toll=toll if toll.any() else None,
        kind=np.char.mod("type %d", column["link_type"].astype(np.int64)),
        node_id=np.arange(1, count + 1).astype(str),
        zone=np.arange(zones),
        through_zones=through <= 1,
        source=f"TNTP {net.name}",
        **place,
    )


def read_trips(path: PathLike) -> Demand:
    """The demand of a `_trips.tntp` file, `[zone, zone]`; its unit of time is the file's. Raises BadInput."""
    path = Path(path)
    said: dict[str, str] = {}
    trips = np.zeros((0, 0))
    zones = origin = 0
    for number, line in enumerate(files.lines(path), 1):
        line = line.split("~")[0].strip()
        if line.startswith("<"):
            _metadata(line, said)
        elif line.lower().startswith("origin"):
            if not zones:
                zones = _whole(path, said, "NUMBER OF ZONES")
                if zones > 30_000:
                    raise BadInput(f"{path}: expected at most 30,000 zones, got {zones:,}")
                trips = np.zeros((zones, zones))
            origin = _zone(path, number, line[6:].strip(), zones)
        elif line:
            for item in line.rstrip(";").split(";"):
                to, colon, amount = item.partition(":")
                if not colon or not origin:
                    raise BadInput(f"{path} line {number}: expected `destination : trips;` below an `Origin` line, got {item.strip()!r}")
                trips[origin - 1, _zone(path, number, to.strip(), zones) - 1] += _number(path, number, amount)
    if not zones:
        raise BadInput(f"{path}: expected `Origin` lines, got none")
    if (trips < 0).any():
        row, to = np.argwhere(trips < 0)[0] + 1
        raise BadInput(f"{path} origin {row} destination {to}: expected trips of 0 or more, got {trips[row - 1, to - 1]:g}")
    announced = said.get("TOTAL OD FLOW")
    if announced and abs(trips.sum() - (total := _number(path, None, announced))) > 1e-3 * abs(total):
        raise BadInput(f"{path}: expected the {announced} trips it announces, got {trips.sum():.1f}; is it whole?")
    return Demand(trips)


def read_flows(path: PathLike, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Published flows and costs of a `_flow.tntp` file in the order of the network's links, `[link]` each, as the file has them.

    Links between the same nodes are taken in the file's order. Raises BadInput where a link lacks, or a line has no link.
    """
    path = Path(path)
    waiting: dict[tuple[str, str], list[int]] = {}
    for link, ends in enumerate(zip(network.node_id[network.start].tolist(), network.node_id[network.end].tolist(), strict=True)):
        waiting.setdefault(ends, []).append(link)
    answer = np.full((2, network.links), np.nan)
    for number, line in enumerate(files.lines(path), 1):
        words = line.replace(";", " ").replace(":", " ").split()
        if not words or not words[0].isdigit():
            continue
        if len(words) < 4:
            raise BadInput(f"{path} line {number}: expected from, to, volume and cost, got {line.strip()!r}")
        links = waiting.get((words[0], words[1]))
        if not links:
            raise BadInput(f"{path} line {number}: the network has no further link from node {words[0]} to {words[1]}")
        answer[:, links.pop(0)] = _number(path, number, words[2]), _number(path, number, words[3])
    missing = np.flatnonzero(np.isnan(answer[0]))
    if len(missing):
        a, b = network.node_id[network.start[missing[0]]], network.node_id[network.end[missing[0]]]
        raise BadInput(f"{path}: expected a flow for each link, none for {len(missing)} of them, such as that from node {a} to {b}")
    return answer[0], answer[1]


def _table(path: Path) -> tuple[dict[str, str], list[str], np.ndarray]:
    """Metadata, column names and the numbers below, `[row, column]`."""
    said: dict[str, str] = {}
    header = list(COLUMNS)
    rows: list[list[float]] = []
    body = False
    for number, line in enumerate(files.lines(path), 1):
        line = line.strip()
        if line.startswith("<"):
            _metadata(line, said)
            if line.startswith("<END"):
                body = True
                files.at_most(_whole(path, said, "NUMBER OF LINKS"), path)
        elif line.startswith("~") and body and not rows:
            header = _header(path, line) or header
        elif line and not line.startswith("~"):
            words = line.rstrip("; \t").split()
            if len(words) != len(header):
                raise BadInput(f"{path} line {number}: expected the {len(header)} columns {', '.join(header)}, got {len(words)} values")
            rows.append([_number(path, number, word) for word in words])
            files.at_most(len(rows), path)
    if not rows:
        raise BadInput(f"{path}: expected links below <END OF METADATA>, got none; is it a TNTP network?")
    return said, header, np.array(rows)


def _header(path: Path, line: str) -> list[str]:
    names = line.strip("~; \t").lower().replace(";", " ").split()
    if "init_node" not in names and "term_node" not in names:
        return []
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise BadInput(f"{path}: expected the columns {', '.join(COLUMNS)}; there is no {missing[0]}")
    return names


def _metadata(line: str, said: dict[str, str]) -> None:
    key, _, value = line[1:].partition(">")
    said[key.strip().upper()] = value.strip()


def _length_unit(said: dict[str, str]) -> str:
    found = re.search(r"length\s*\(\s*(ft|mile|km|m)", said.get("ORIGINAL HEADER", "").lower())
    return found.group(1) if found else "km"


def _positions(path: Path, count: int, unit: str | None) -> dict:
    xy = np.full((count, 2), np.nan)
    if path.suffix in (".geojson", ".json"):
        for feature in _features(path):
            node, point = feature
            if 1 <= node <= count:
                xy[node - 1] = point
    else:
        for number, line in enumerate(files.lines(path), 1):
            words = line.replace(";", " ").split()
            if not words or not words[0].isdigit():
                continue
            if len(words) < 3:
                raise BadInput(f"{path} line {number}: expected node, X and Y, got {line.strip()!r}")
            if not 1 <= int(words[0]) <= count:
                raise BadInput(f"{path} line {number}: expected a node of 1 to {count}, got {words[0]}")
            xy[int(words[0]) - 1] = _number(path, number, words[1]), _number(path, number, words[2])
    missing = np.flatnonzero(~np.isfinite(xy).all(axis=1))
    if len(missing):
        raise BadInput(f"{path}: expected a position for each of {count} nodes, none for {len(missing)}, such as node {missing[0] + 1}")
    x, y = xy.T
    if unit is None:
        earth = (np.abs(x) <= 180).all() and (np.abs(y) <= 90).all()
        unit = "m" if not earth else "deg" if np.abs(xy).max() > 5 else "km"
    if _known(unit, ("deg", *METRES), "node_unit") == "deg":
        zone = utm_zone(x, y)
        east, north = to_metres(x, y, zone)
        return {"x": east, "y": north, "lon": x, "lat": y, "utm": zone}
    return {"x": x * METRES[unit], "y": y * METRES[unit]}


def _features(path: Path) -> list[tuple[int, list[float]]]:
    try:
        content = json.loads(b"".join(files.blocks(path)))
        return [(int(one["properties"]["id"]), one["geometry"]["coordinates"][:2]) for one in content["features"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path}: expected GeoJSON points with a property `id`, got {type(error).__name__}: {error}") from None


def _whole(path: Path, said: dict[str, str], key: str) -> int:
    value = said.get(key, "")
    if not re.fullmatch(r"\d{1,12}", value):
        raise BadInput(f"{path}: expected a line `<{key}> number`, got {value!r}")
    return int(value)


def _zone(path: Path, number: int, word: str, zones: int) -> int:
    if not word.isdigit() or not 1 <= int(word) <= zones:
        raise BadInput(f"{path} line {number}: expected a zone of 1 to {zones}, got {word!r}")
    return int(word)


def _number(path: Path, number: int | None, word: str) -> float:
    return files.number(word, f"{path} line {number}" if number else f"{path} metadata")


def _known(unit: str, known: Iterable[str], what: str) -> str:
    if unit not in known:
        raise BadInput(f"{what}: expected one of {', '.join(known)}, got {unit!r}")
    return unit
