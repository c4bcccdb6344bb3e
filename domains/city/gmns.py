"""Networks as GMNS tables, the exchange format of choice between traffic models: a folder with node.csv, link.csv and a few more.

Source: General Modeling Network Specification 0.96, github.com/zephyr-data-specs/GMNS. Capacity there is per lane, length and speed are
in the units of config.csv. What it has no field for goes into columns of our own: `vdf_alpha`, `vdf_beta` (as DTALite names them), `toll_s`
in seconds of travel time. A node that movement.csv names has the turns named there and no others, and of those none with a capacity of 0.
"""

import csv
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from domains.city import files
from domains.city.network import BPR_ALPHA, BPR_BETA, Network, build, turns
from domains.city.projection import to_degrees, to_metres, utm_zone
from domains.city.roads import MILE, ROADS
from twinsim.base import BadInput

TABLES = ("node.csv", "link.csv", "config.csv", "zone.csv", "movement.csv")  # that are read, where they are there
_KM = {"km": 1.0, "kilometer": 1.0, "kilometers": 1.0, "mi": MILE, "mile": MILE, "miles": MILE, "m": 1e-3, "meter": 1e-3, "meters": 1e-3}
_KM |= {"ft": 0.3048e-3, "feet": 0.3048e-3, "foot": 0.3048e-3}
_KMH = {"kph": 1.0, "kmh": 1.0, "km/h": 1.0, "mph": MILE, "mi/h": MILE, "mps": 3.6, "m/s": 3.6}
# a metre or two apart: all taken as WGS84
_DEGREES = ("WGS84", "EPSG:4326", "OGC:CRS84", "CRS84", "ETRS89", "EPSG:4258", "NAD83", "EPSG:4269")
_LOCAL = "local metres"
_UTM = re.compile(r"EPSG:(326|327|258|269)(0[1-9]|[1-5]\d|60)")  # WGS84 north and south, ETRS89, NAD83
_NO_CARS = {"walk", "foot", "ped", "pedestrian", "bike", "bicycle", "cycle", "transit", "bus", "tram", "rail", "railway", "ferry", "truck"}
_MOVES = ("mvmt_id", "node_id", "ib_link_id", "ob_link_id", "type", "capacity")
_Projection = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
_CONFIG = ("dataset_name", "short_length", "long_length", "speed", "crs", "geometry_field_format", "id_type", "through_zones", "utm_zone")


def write_network(network: Network, folder: str | os.PathLike) -> list[Path]:
    """Writes node.csv, link.csv, config.csv and, where there are any, zone.csv and movement.csv; gives their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    crs = "WGS84" if network.lon is not None else f"EPSG:{_epsg(network.utm)}" if network.utm else _LOCAL
    zone_of = dict(zip(network.zone.tolist(), network.zone_names, strict=True))
    x, y = (network.x, network.y) if network.lon is None or network.lat is None else (network.lon, network.lat)
    through, utm = int(network.through_zones), network.utm if network.utm is not None else ""
    written = [
        _write(folder / "config.csv", _CONFIG, [(network.source, "m", "km", "kph", crs, "wkt", "string", through, utm)]),
        _write(
            folder / "node.csv",
            ("node_id", "x_coord", "y_coord", "node_type", "zone_id"),
            (
                (node, _text(x[k]), _text(y[k]), "centroid" if k in zone_of else "", zone_of.get(k, ""))
                for k, node in enumerate(network.node_id.tolist())
            ),
        ),
        _write(folder / "link.csv", *_link_table(network)),
    ]
    if network.population is not None or network.jobs is not None:
        columns = [(key, value) for key in ("population", "jobs") if (value := getattr(network, key)) is not None]
        rows = ((name, *(_text(value[k]) for _, value in columns)) for k, name in enumerate(network.zone_names))
        written.append(_write(folder / "zone.csv", ("zone_id", *(key for key, _ in columns)), rows))
    if network.turn_bans is not None:
        written.append(_write(folder / "movement.csv", _MOVES, _move_table(network, network.turn_bans)))
    return written


def read_network(folder: str | os.PathLike) -> Network:
    """The network of a GMNS folder. Raises BadInput.

    Positions within degrees are taken as WGS84 unless config.csv names another system. A node is a zone where it has a zone_id and is a
    centroid, or, where no node says centroid, where it has one at all; in the first case nobody drives through it, unless `through_zones`
    of config.csv says otherwise. What a link lacks comes from its class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected a folder with node.csv and link.csv, found none")
    config = next((row for _, row in _rows(folder / "config.csv", ())), {}) if (folder / "config.csv").is_file() else {}
    long, speed = (_unit(folder, config, *each) for each in (("long_length", "km", _KM), ("speed", "kph", _KMH)))

    node_id, place, kinds, zone_ids = [], [], [], []
    for number, row in _rows(folder / "node.csv", ("node_id", "x_coord", "y_coord")):
        where = f"{folder / 'node.csv'} line {number}"
        node_id.append(row["node_id"])
        place.append([_number(where, row, key, np.nan) for key in ("x_coord", "y_coord")])
        kinds.append(row.get("node_type") or "")
        zone_ids.append(row.get("zone_id") or "")
    index = {node: k for k, node in enumerate(node_id)}
    if len(index) != len(node_id):
        twice = next(node for k, node in enumerate(node_id) if index[node] != k)
        raise BadInput(f"{folder / 'node.csv'}: expected each node_id once, got {twice!r} twice")
    marked = any("centroid" in kind for kind in kinds)
    centroids = [k for k, zone in enumerate(zone_ids) if zone and ("centroid" in kinds[k] or not marked)]
    centroids.sort(key=lambda k: (len(zone_ids[k]), zone_ids[k]))  # 2 before 10
    zones = [zone_ids[k] for k in centroids]
    for a, b in itertools.pairwise(centroids):
        if zone_ids[a] == zone_ids[b]:
            raise BadInput(
                f"{folder / 'node.csv'}: expected one node a zone, got {node_id[a]} and {node_id[b]} with zone_id {zone_ids[a]!r}; "
                "node_type centroid marks the one that stands for it"
            )

    table: dict[str, list] = {key: [] for key in ("start", "end", "length", "free_speed", "capacity", "lanes", "alpha", "beta", "toll")}
    table |= {key: [] for key in ("link_id", "name", "kind", "shape")}
    without_cars: set[str] = set()
    for number, row in _rows(folder / "link.csv", ("link_id", "from_node_id", "to_node_id", "length")):
        where = f"{folder / 'link.csv'} line {number}"
        for key in ("from_node_id", "to_node_id"):
            if row[key] not in index:
                raise BadInput(f"{where}: link {row['link_id']} has {key} {row[key]!r}, expected a node_id of node.csv")
        if not _for_cars(row):
            without_cars.add(row["link_id"])
            continue
        both = (row.get("directed") or "1").lower() in ("0", "false")
        for back in (False, True)[: 1 + both]:
            _add_link(table, where, row, index, back, long, speed)
        files.at_most(len(table["start"]), folder / "link.csv")
    if not table["start"]:
        raise BadInput(f"{folder / 'link.csv'}: expected at least one link, got none")

    if again := [link for link, times in Counter(table["link_id"]).items() if times > 1]:
        raise BadInput(f"{folder / 'link.csv'}: expected each link_id once, got {again[0]!r} twice")

    xy = np.array(place).reshape(-1, 2)
    position, to_xy = _projected(folder, xy, config)
    shapes = None
    if all(len(points) for points in table["shape"]):
        shapes = tuple(np.stack(to_xy(np.array(points)), axis=1) for points in table["shape"])
    toll = np.array(table["toll"])
    keys = ("start", "end", "length", "free_speed", "capacity", "lanes", "alpha", "beta", "link_id", "name", "kind")
    network = build(
        **{key: np.array(table[key]) for key in keys},
        node_id=np.array(node_id),
        zone=np.array(centroids, np.int64),
        zone_id=None if zones == [str(k + 1) for k in range(len(zones))] else zones,
        through_zones=(config.get("through_zones") or str(int(not marked))) not in ("0", "false"),
        toll=toll if toll.any() else None,
        shape=shapes,
        source=config.get("dataset_name") or f"GMNS {folder.name}",
        **position,
        **_zone_table(folder, zones),
    )
    _check_scale(folder, network)
    return dataclasses.replace(network, turn_bans=_bans(folder / "movement.csv", network, without_cars))


def _link_table(network: Network) -> tuple[tuple[str, ...], Iterator[tuple]]:
    header: tuple[str, ...] = (
        "link_id",
        "name",
        "from_node_id",
        "to_node_id",
        "directed",
        "length",
        "facility_type",
        "capacity",
        "free_speed",
    )
    header += ("lanes",)
    header += ("vdf_alpha", "vdf_beta") + ("toll_s",) * (network.toll is not None) + ("geometry",) * (network.shape is not None)

    def rows() -> Iterator[tuple]:
        for k in range(network.links):
            numbers = [
                network.capacity[k] / network.lanes[k],
                network.free_speed[k] * 3.6,
                network.lanes[k],
                network.alpha[k],
                network.beta[k],
            ]
            ends = network.node_id[network.start[k]], network.node_id[network.end[k]]
            row = (network.link_id[k], network.name[k], *ends, 1, _text(network.length[k] / 1000), network.kind[k], *map(_text, numbers))
            if network.toll is not None:
                row += (_text(network.toll[k]),)
            if network.shape is not None:
                points = network.shape[k]
                if network.lon is not None and network.utm:
                    points = np.stack(to_degrees(points[:, 0], points[:, 1], network.utm), axis=1)
                row += (f"LINESTRING ({', '.join(f'{_text(a)} {_text(b)}' for a, b in points)})",)
            yield row

    return header, rows()


def _add_link(
    table: dict[str, list], where: str, row: dict[str, str], index: dict[str, int], back: bool, long: float, speed: float
) -> None:
    kind = row.get("facility_type") or ""
    road = ROADS.get(kind, ROADS["road"])
    lanes = _number(where, row, "lanes", float(road.lanes))
    ends = [index[row["from_node_id"]], index[row["to_node_id"]]]
    points = _points(where, row.get("geometry") or "")
    # GMNS calls lanes and capacity 0 what is closed; a model that divides by them needs it left out instead
    for key, value in (("lanes", lanes), ("length", _number(where, row, "length", np.nan))):
        if not value > 0:
            raise BadInput(f"{where}: link {row['link_id']}: expected a positive {key}, got {row.get(key)!r}")
    table["start"].append(ends[1 if back else 0])
    table["end"].append(ends[0 if back else 1])
    table["length"].append(1000 * long * _number(where, row, "length", np.nan))
    table["free_speed"].append(_number(where, row, "free_speed", road.speed / speed) * speed / 3.6)
    table["capacity"].append(lanes * _number(where, row, "capacity", road.lane_capacity))
    table["lanes"].append(lanes)
    table["alpha"].append(_number(where, row, "vdf_alpha", BPR_ALPHA))
    table["beta"].append(_number(where, row, "vdf_beta", BPR_BETA))
    table["toll"].append(_number(where, row, "toll_s", 0.0))
    table["link_id"].append(row["link_id"] + ("-" if back else ""))
    table["name"].append(row.get("name") or "")
    table["kind"].append(kind)
    table["shape"].append(points[::-1] if back else points)


def _projected(folder: Path, xy: np.ndarray, config: dict[str, str]) -> tuple[dict[str, Any], _Projection]:
    """The nodes' positions as a network has them, and what brings other points to x and y."""
    crs, local = ((text or "").upper().replace(" ", "") for text in (config.get("crs"), _LOCAL))
    degrees = crs in _DEGREES or (not crs and bool((np.abs(xy) <= (180, 90)).all()))
    zone, projected = config.get("utm_zone") or "", _UTM.fullmatch(crs)
    if not (degrees or projected or crs in ("", local)):
        raise BadInput(
            f"{folder / 'config.csv'}: expected crs of {', '.join(_DEGREES)}, a UTM zone as EPSG:32632, or {_LOCAL!r} for any other system "
            f"in metres, got {config['crs']!r}"
        )
    if projected:
        zone = f"{'-' * (projected[1] == '327')}{int(projected[2])}"
    if not degrees or np.isnan(xy).all():
        lonlat = {}
        if zone.lstrip("-").isdigit():
            lon, lat = to_degrees(xy[:, 0], xy[:, 1], int(zone))
            lonlat = {"lon": lon, "lat": lat, "utm": int(zone)}
        return {"x": xy[:, 0], "y": xy[:, 1], **lonlat}, lambda points: (points[:, 0], points[:, 1])
    if np.isnan(xy).any():
        raise BadInput(f"{folder / 'node.csv'}: expected x_coord and y_coord for every node or none")
    utm = int(zone) if zone.lstrip("-").isdigit() else utm_zone(xy[:, 0], xy[:, 1])
    x, y = to_metres(xy[:, 0], xy[:, 1], utm)
    place = {"x": x, "y": y, "lon": xy[:, 0], "lat": xy[:, 1], "utm": utm}
    return place, lambda points: to_metres(points[:, 0], points[:, 1], utm)


def _zone_table(folder: Path, zones: list[str]) -> dict[str, np.ndarray]:
    if not (folder / "zone.csv").is_file():
        return {}
    found = {row["zone_id"]: (number, row) for number, row in _rows(folder / "zone.csv", ("zone_id",))}
    answer = {}
    for key in ("population", "jobs"):
        if found and all(key in row for _, row in found.values()):
            missing = [zone for zone in zones if zone not in found]
            if missing:
                raise BadInput(f"{folder / 'zone.csv'}: expected a row for zone {missing[0]!r} of node.csv, found none")
            answer[key] = np.array([_number(f"{folder / 'zone.csv'} line {found[z][0]}", found[z][1], key, np.nan) for z in zones])
    return answer


def _bans(path: Path, network: Network, without_cars: set[str]) -> np.ndarray | None:
    """Turns that a movement.csv leaves out at the nodes that it names, `[ban, 2]`; None without the file."""
    if not path.is_file():
        return None
    index = {link: k for k, link in enumerate(network.link_id.tolist())}
    sides = {"ib_link_id": network.node_id[network.end], "ob_link_id": network.node_id[network.start]}
    nodes, allowed = set(), set()
    for number, row in _rows(path, _MOVES[:5]):
        if not _for_cars(row) or {row[key] for key in sides} & without_cars:
            continue
        pair = []
        for key, at in sides.items():  # a two-way link has one name in the file
            links = [index[name] for name in (row[key], f"{row[key]}-") if name in index and at[index[name]] == row["node_id"]]
            if not links:
                raise BadInput(f"{path} line {number}: expected {key} of a link of link.csv at node {row['node_id']}, got {row[key]!r}")
            pair.append(links[0])
        nodes.add(int(network.end[pair[0]]))
        if _number(f"{path} line {number}", row, "capacity", 1.0) > 0:
            allowed.add(tuple(pair))
    every = turns(dataclasses.replace(network, through_zones=True)).tolist()
    bans = [(a, b) for a, b in every if network.end[a] in nodes and (a, b) not in allowed]
    return np.array(bans, np.int64).reshape(-1, 2)


def _move_table(network: Network, bans: np.ndarray) -> Iterator[tuple]:
    """The turns that are left at nodes with bans; where none is, one of them with a capacity of 0."""
    banned, nodes = set(map(tuple, bans.tolist())), set(network.end[bans[:, 0]].tolist())
    every = turns(dataclasses.replace(network, turn_bans=None, through_zones=True)).tolist()
    left = [((a, b), "") for a, b in every if network.end[a] in nodes and (a, b) not in banned]
    shut = {int(network.end[a]): (a, b) for a, b in banned}
    for (a, _), _ in left:
        shut.pop(int(network.end[a]), None)
    for k, ((a, b), capacity) in enumerate([*left, *((pair, "0") for pair in shut.values())]):
        ends = network.node_id[network.end[a]], network.link_id[a], network.link_id[b]
        yield (k + 1, *ends, _turn(network, a, b), capacity)


def _turn(network: Network, a: int, b: int) -> str:
    """The way one turns from a link to another, straight ahead to 45 degrees."""
    if network.end[b] == network.start[a]:
        return "uturn"
    x, y = ((place[network.end[[a, b]]] - place[network.start[[a, b]]]) for place in (network.x, network.y))
    side, ahead = x[0] * y[1] - y[0] * x[1], x[0] * x[1] + y[0] * y[1]
    return ("left" if side > 0 else "right") if abs(side) > ahead else "thru"


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and values by column name of a CSV file, one row at a time."""
    reader = csv.DictReader(files.lines(path), strict=True)
    try:
        for column in needed:
            if column not in (reader.fieldnames or ()):
                raise BadInput(f"{path}: expected a column {column}, got {', '.join(reader.fieldnames or ()) or 'none'}")
        for row in reader:
            if None in row or None in row.values():
                raise BadInput(f"{path} line {reader.line_num}: expected {len(reader.fieldnames or ())} values, got another number of them")
            yield reader.line_num, row
    except csv.Error as error:
        raise BadInput(f"{path} line {reader.line_num}: expected CSV, got: {error}") from None


def _write(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _text(value: float) -> str:
    return "" if np.isnan(value) else repr(float(value))


def _points(where: str, text: str) -> list[list[float]]:
    if not text.strip():
        return []
    body = text.strip().removeprefix("LINESTRING").strip().strip("()")
    try:
        points = [[float(word) for word in point.split()[:2]] for point in body.split(",")]
    except ValueError:
        points = []
    if len(points) < 2 or any(len(point) != 2 for point in points) or not np.isfinite(points).all():
        raise BadInput(f"{where}: expected a geometry `LINESTRING (x y, x y, ...)`, got {text[:40]!r}")
    return points


def _number(where: str, row: dict[str, str], key: str, missing: float) -> float:
    text = (row.get(key) or "").strip()
    return files.number(text, where, key) if text else missing


def _unit(folder: Path, config: dict[str, str], key: str, default: str, known: Mapping[str, float]) -> float:
    """What the unit that config.csv names is worth, in km or km/h."""
    unit = (config.get(key) or default).strip().lower()
    if unit not in known:
        raise BadInput(f"{folder / 'config.csv'}: expected {key} of {', '.join(known)}, got {unit!r}")
    return known[unit]


def _for_cars(row: dict[str, str]) -> bool:
    """Whether a link or a turn is open to cars: not where each of its `allowed_uses` is something else."""
    uses = re.findall(r"[^\s,;|]+", (row.get("allowed_uses") or "").lower())
    return not uses or not _NO_CARS.issuperset(uses)


def _check_scale(folder: Path, network: Network) -> None:
    """Raises BadInput where links are not about as long as their ends are apart: lengths or positions have another unit than is said."""
    if not network.has_map:
        return
    apart = np.hypot(network.x[network.start] - network.x[network.end], network.y[network.start] - network.y[network.end])
    ratio = float(np.median(network.length[apart > 0] / apart[apart > 0])) if (apart > 0).any() else 1.0
    if not 0.5 <= ratio <= 3:
        raise BadInput(
            f"{folder / 'link.csv'}: expected lengths of about the distance between nodes, got {ratio:.3g} times as much in the median; "
            "config.csv names their units as long_length (km where it does not) and crs"
        )


def _epsg(utm: int | None) -> int:
    return 0 if utm is None else 32600 + utm if utm > 0 else 32700 - utm
