"""Vehicles counted on links in an hour, read from SUMO's edge data, Cadyts measurements or a plain CSV.

CSV: a column `link` (or `from_node_id` and `to_node_id`), a column `count` in veh/h, and `hour` where there are several. SUMO: sumo.dlr.de/
docs/Simulation/Output/Lane-_or_Edge-based_Traffic_Measures.html, attribute `entered` of an interval; Cadyts: `singlelink` of a
measurements.xml, COUNT_VEH over the interval or FLOW_VEH_H.
"""

import csv
import difflib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from domains.city import files
from domains.city.network import Network
from twinsim.base import BadInput


@dataclass(frozen=True)
class Counts:
    """Counted flows.

    Attributes:
      link: index of a link of the network, each once, `[count]`. flow: veh/h, `[count]`.
    """

    link: np.ndarray
    flow: np.ndarray


@dataclass(frozen=True)
class _Row:
    """One line of a file of counts: where it stands, its link's name or ends, veh/h, and the hour of the day it belongs to."""

    where: str
    link: str
    flow: float
    hour: float | None


def read_counts(path: str | os.PathLike, network: Network, hour: int | None = None) -> Counts:
    """The counts of a `.csv` or `.xml` file (also `.gz`) on the links of a network, in `hour` of the day where the file has several.

    Raises BadInput: numbers that are no counts, links that the network does not have (with the nearest names), links counted twice.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith((".xml", ".csv")):
        raise BadInput(f"{path}: expected counts as .csv (link, count, hour) or SUMO's edge data or Cadyts' measurements as .xml")
    rows = list(_of_xml(path) if name.endswith(".xml") else _of_csv(path, network))
    if not rows:
        raise BadInput(f"{path}: expected counts, found none")
    hours = sorted({int(row.hour) for row in rows if row.hour is not None})
    if hour is None and len(hours) > 1:
        raise BadInput(f"{path}: links are counted in several hours; expected hour=, one of {', '.join(map(str, hours))}")
    if hour is not None and hours:
        rows = [row for row in rows if row.hour is None or int(row.hour) == hour]
        if not rows:
            raise BadInput(f"{path}: expected counts in hour {hour}, found hours {', '.join(map(str, hours))}")
    index = {str(one): k for k, one in enumerate(network.link_id)}
    seen: dict[int, _Row] = {}
    for row in rows:
        if row.flow < 0:
            raise BadInput(f"{row.where}: link {row.link}: expected a count of 0 or more veh/h, got {row.flow:g}")
        if row.link not in index:
            raise BadInput(f"{row.where}: the network has no link {row.link!r}{_nearest(row.link, list(index))}")
        if (link := index[row.link]) in seen:
            raise BadInput(f"{row.where}: expected each link once, got link {row.link} again")
        seen[link] = row
    return Counts(np.array(list(seen), np.int64), np.array([row.flow for row in seen.values()]))


def _of_xml(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    roots: list[str] = []
    interval: list[float] = []

    def seconds(where: str, given: Mapping[str, str], begin: str, end: str) -> list[float]:
        both = [files.number(given.get(key, ""), where, key) for key in (begin, end)]
        if not both[0] < both[1]:
            raise BadInput(f"{where}: expected {begin} before {end}, s, got {both[0]:g} and {both[1]:g}")
        return both

    def start(tag: str, given: Mapping[str, str]) -> None:
        roots.append(tag)
        if tag == "interval":
            interval[:] = seconds(f"{path} interval", given, "begin", "end")
        elif tag == "edge" and interval:
            link = given.get("id", "")
            where = f"{path} edge {link}"
            key = "entered" if "entered" in given else "count"
            if key not in given:
                raise BadInput(f"{where}: expected an attribute entered (or count), vehicles, got {', '.join(given)}")
            rows.append(_Row(where, link, files.number(given[key], where, key) * 3600 / (interval[1] - interval[0]), interval[0] // 3600))
        elif tag == "singlelink":
            link, kind = given.get("link", ""), given.get("type", "")
            where = f"{path} link {link}"
            begin, end = seconds(where, given, "start", "end")
            if kind not in ("COUNT_VEH", "FLOW_VEH_H"):
                raise BadInput(f"{where}: expected type COUNT_VEH or FLOW_VEH_H, got {kind!r}")
            per_hour = 3600 / (end - begin) if kind == "COUNT_VEH" else 1.0
            rows.append(_Row(where, link, files.number(given.get("value", ""), where, "value") * per_hour, begin // 3600))

    files.parse_xml(path, start)
    if roots and roots[0] not in ("meandata", "measurements", "data"):
        raise BadInput(f"{path}: expected SUMO's edge data (<meandata>) or Cadyts' <measurements>, got <{roots[0]}>")
    return rows


def _of_csv(path: Path, network: Network) -> Iterator[_Row]:
    reader = csv.DictReader(files.lines(path), strict=True)
    ends: dict[tuple[str, str], list[str]] = defaultdict(list)
    for a, b, link in zip(network.node_id[network.start], network.node_id[network.end], network.link_id, strict=True):
        ends[str(a), str(b)].append(str(link))
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        named = next((column for column in ("link", "link_id") if column in columns), None)
        if "count" not in columns or not (named or {"from_node_id", "to_node_id"} <= set(columns)):
            raise BadInput(
                f"{path}: expected columns link (or from_node_id and to_node_id) and count, also hour, got {', '.join(columns) or 'none'}"
            )
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise BadInput(f"{where}: expected {len(columns)} values, got another number of them")
            hour = row.get("hour", "").strip()
            link = row[named].strip() if named else _between(where, ends, row["from_node_id"].strip(), row["to_node_id"].strip(), network)
            yield _Row(where, link, files.number(row["count"], where, "count"), files.number(hour, where, "hour") if hour else None)
    except csv.Error as error:
        raise BadInput(f"{path} line {reader.line_num}: expected CSV, got: {error}") from None


def _between(where: str, ends: Mapping[tuple[str, str], list[str]], a: str, b: str, network: Network) -> str:
    """The one link from node `a` to node `b`."""
    for node in (a, b):
        if node not in network.node_id:
            raise BadInput(f"{where}: the network has no node {node!r}{_nearest(node, list(map(str, network.node_id)))}")
    links = ends.get((a, b), [])
    if len(links) != 1:
        found = f"{len(links)}: {', '.join(links[:5])}; name it in a column link" if links else "none"
        raise BadInput(f"{where}: expected one link from node {a} to node {b}, found {found}")
    return links[0]


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [one for one in known if name and name in one and one not in close][: 3 - len(close)]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else f", nor one of its {len(known)} that is like it"
