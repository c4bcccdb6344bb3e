"""SUMO as a cross-check: our network and our equilibrium's ways driven there vehicle by vehicle, and what it measures set beside ours.

The network is written as plain nodes, edges and connections, which SUMO's netconvert builds (sumo.dlr.de/docs/Networks/PlainXML.html);
connectors are left out, trips begin and end on the streets that they lead to. Vehicles keep the ways that they are given: what can differ
is how many get through in the hour that is measured, how fast they are, and what they emit. The BPR times of the static model know of no
queue at a junction, SUMO's vehicles do. Wants SUMO: pip install 'twinsim[sumo]'.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np

from domains.city import emissions, files
from domains.city.calibration import GEH_GOOD, geh
from domains.city.equilibrium import Equilibrium, Paths, equilibrium
from domains.city.network import Demand, Network, turns
from twinsim.base import BadInput

INSTALL = "pip install 'twinsim[sumo]'"
HOUR, WARM_UP = 3600.0, 900.0  # s: what is measured, after traffic has had time to fill the streets
VEHICLE = "PC_petrol_Euro-4"  # HBEFA4
_PATIENCE = 3600.0  # s, of one program


@dataclass(frozen=True)
class Measured:
    """What a simulation measured in its hour.

    Attributes:
      flow: vehicles that came onto a link or began on it, veh/h, `[link]`; connectors have nan.
      speed: mean over the vehicles' time on it, m/s, `[link]`; nan where there were none.
      vehicle_hours: `[link]`. co2, nox: g/h, `[link]`.
    """

    flow: np.ndarray
    speed: np.ndarray
    vehicle_hours: np.ndarray
    co2: np.ndarray
    nox: np.ndarray


def write_network(network: Network, folder: Path) -> list[Path]:
    """Writes plain.nod.xml, plain.edg.xml and plain.con.xml: node k is n<k>, link k is e<k>; gives their paths.

    Every turn that is allowed is a connection, so that a banned one is simply not there. Where the network knows of no bans, turning round
    is left out unless a link leads nowhere else. Raises BadInput without a map.
    """
    if not network.has_map:
        raise BadInput("SUMO: expected a network with positions, this one has none")
    street = _streets(network)
    folder = Path(folder)
    nodes = np.unique([network.start[street], network.end[street]])
    place = np.stack([network.x, network.y], 1)
    origin = place[nodes].min(0)  # small numbers: SUMO writes centimetres

    def at(points: np.ndarray) -> str:
        return " ".join(f"{x:.2f},{y:.2f}" for x, y in points - origin)

    rows = [f'<node id="n{k}" x="{x:.2f}" y="{y:.2f}"/>' for k, (x, y) in zip(nodes, place[nodes] - origin, strict=True)]
    written = [_write(folder / "plain.nod.xml", "nodes", rows)]
    rows = []
    for k in street:
        shape = "" if network.shape is None else f' shape="{at(network.shape[k])}"'
        name = f" name={quoteattr(str(network.name[k]))}" if network.name[k] else ""
        rows.append(
            f'<edge id="e{k}" from="n{network.start[k]}" to="n{network.end[k]}" numLanes="{max(1, round(network.lanes[k]))}" '
            f'speed="{min(network.free_speed[k], 70.0):.3f}" length="{max(network.length[k], 0.1):.2f}"{shape}{name}/>'
        )
    written.append(_write(folder / "plain.edg.xml", "edges", rows))
    pairs = _turns(network)
    rows = [f'<connection from="e{a}" to="e{b}"/>' for a, b in pairs]
    rows += [f'<connection from="e{a}"/>' for a in np.setdiff1d(street, pairs[:, 0])]  # from here nobody goes on
    return [*written, _write(folder / "plain.con.xml", "connections", rows)]


def write_routes(
    network: Network, paths: Paths, file: Path, *, seconds: float = WARM_UP + HOUR, seed: int = 0, vehicle: str = VEHICLE
) -> int:
    """Writes the vehicles of `seconds` on the paths, sorted by departure, as SUMO's routes; gives their number.

    A path of h veh/h has h * seconds / 3600 of them, the fraction by chance, and they depart at random times.
    """
    random = np.random.default_rng(seed)
    street = np.zeros(network.links, bool)
    street[_streets(network)] = True
    table = paths.links.tocsr()
    banned = set() if network.turn_bans is None else set(map(tuple, network.turn_bans.tolist()))
    ways: list[str] = []
    expected: list[float] = []
    for k, flow in enumerate(paths.flow):
        links = _in_order(network, table.indices[table.indptr[k] : table.indptr[k + 1]], int(network.zone[paths.origin[k]]), banned)
        links = [link for link in links if street[link]]
        if links and flow > 0:
            ways.append(" ".join(f"e{link}" for link in links))
            expected.append(flow * seconds / 3600)
    amount = np.floor(np.array(expected) + random.random(len(expected))).astype(int)
    way = np.repeat(np.arange(len(ways)), amount)
    depart = random.uniform(0, seconds, len(way))
    order = np.argsort(depart, kind="stable")
    rows = [f'<vType id="car" emissionClass="HBEFA4/{vehicle}"/>']
    rows += [f'<route id="r{k}" edges="{edges}"/>' for k, edges in enumerate(ways)]
    entry = 'departLane="best" departSpeed="max" departPos="base"'
    rows += [f'<vehicle id="{i}" type="car" route="r{way[k]}" depart="{depart[k]:.1f}" {entry}/>' for i, k in enumerate(order)]
    _write(file, "routes", rows)
    return len(way)


def simulate(
    network: Network, paths: Paths, *, meso: bool = True, seed: int = 0, vehicle: str = VEHICLE, folder: Path | None = None
) -> tuple[Measured, dict[str, float]]:
    """Drives the paths in SUMO, in mesoscopic queues or vehicle by vehicle, and reads an hour of it; with how many vehicles and losses.

    `folder` keeps SUMO's files. Raises BadInput where there is no SUMO, or it refuses what it is given.
    """
    netconvert, sumo = program("netconvert"), program("sumo")
    with tempfile.TemporaryDirectory(prefix="twinsim-sumo-") as scratch:
        at = Path(scratch) if folder is None else Path(folder)
        at.mkdir(parents=True, exist_ok=True)
        plain = dict(zip(("node-files", "edge-files", "connection-files"), write_network(network, at), strict=True))
        given = [f"--{key}={path}" for key, path in plain.items()]
        _run([netconvert, *given, f"--output-file={at / 'net.xml'}", "--no-turnarounds.except-deadend=true"])
        vehicles = write_routes(network, paths, at / "routes.xml", seed=seed, vehicle=vehicle)
        kinds = "".join(
            f'<edgeData id="{name}" {kind}file="{at / f"{name}.xml"}" begin="{WARM_UP:g}" end="{WARM_UP + HOUR:g}"/>'
            for name, kind in (("traffic", ""), ("emissions", 'type="emissions" '))
        )
        _write(at / "measure.xml", "additional", [kinds])
        _run([sumo, f"--net-file={at / 'net.xml'}", f"--route-files={at / 'routes.xml'}", f"--additional-files={at / 'measure.xml'}",
              "--begin=0", f"--end={WARM_UP + HOUR:g}", f"--seed={seed}", f"--mesosim={str(meso).lower()}", "--no-step-log=true",
              "--no-warnings=true", f"--statistic-output={at / 'statistics.xml'}", "--xml-validation=never"])  # fmt: skip
        measured = read_measured(network, at / "traffic.xml", at / "emissions.xml")
        lost = _statistics(at / "statistics.xml")
    return measured, {"vehicles": float(vehicles), **lost}


def read_measured(network: Network, traffic: Path, pollution: Path) -> Measured:
    """The hour of SUMO's two edge data files, by link."""
    names = "entered", "departed", "sampledSeconds", "speed", "CO2_abs", "NOx_abs"
    value = {name: np.zeros(network.links) for name in names}

    def start(tag: str, given: Mapping[str, str]) -> None:
        if tag == "edge" and given.get("id", "").startswith("e"):
            for name in names:
                if name in given:
                    value[name][int(given["id"][1:])] = float(given[name])

    for file in (traffic, pollution):
        files.parse_xml(file, start)
    street = np.zeros(network.links, bool)
    street[_streets(network)] = True
    seconds = value["sampledSeconds"]
    flow = np.where(street, value["entered"] + value["departed"], np.nan)
    speed = np.where(seconds > 0, value["speed"], np.nan)
    return Measured(flow, speed, seconds / 3600, value["CO2_abs"] / 1000, value["NOx_abs"] / 1000)


def cross_check(
    network: Network,
    trips: Demand | np.ndarray,
    *,
    found: Equilibrium | None = None,
    modes: Sequence[str] = ("meso", "micro"),
    seed: int = 0,
    vehicle: str = VEHICLE,
) -> tuple[dict[str, dict[str, float]], list[list[str]]]:
    """Our hour of traffic beside SUMO's on the same ways: numbers by mode, and a table with a header row.

    By mode: GEH_below_5 over links that have trips; vehicle km, mean speed in m/s, CO2 and NOx in kg, each with its `our_`, of the times of
    the equilibrium; `_at_its_speeds`, by our emission model from SUMO's flows and speeds; vehicles, those that wait to get in, teleports.
    `vehicle` is the HBEFA4 class of all. Raises BadInput.
    """
    if unknown := [mode for mode in modes if mode not in ("meso", "micro")]:
        raise BadInput(f"cross-check: expected modes meso or micro, got {unknown[0]}")
    found = equilibrium(network, trips) if found is None else found
    street = _streets(network)
    length, flow, time = network.length[street], _driven(network, found.paths)[street], found.time[street]
    cars = emissions.fleet({vehicle: 1.0})
    ours = {
        "our_km": float(flow @ length / 1000),
        "our_speed": float(flow @ length / max(flow @ time, 1e-300)),
        **_kilograms("our_", flow, length / time, length, cars),
    }
    report: dict[str, dict[str, float]] = {}
    for mode in modes:
        measured, lost = simulate(network, found.paths, meso=mode == "meso", seed=seed, vehicle=vehicle)
        theirs, hours, speed = measured.flow[street], measured.vehicle_hours[street], np.nan_to_num(measured.speed[street])
        km = float(speed @ hours * 3.6)
        used = (flow > 0) | (theirs > 0)
        driven = np.where(speed > 0, speed * hours * 3600 / length, 0.0)  # flow by the distance driven
        at_theirs = _kilograms("", driven, np.maximum(speed, emissions.LEAST_SPEED), length, cars)
        report[mode] = {
            **lost,
            "GEH_below_5": float((geh(theirs, flow)[used] < GEH_GOOD).mean()),
            "links": float(used.sum()),
            "km": km,
            "speed": km / 3.6 / max(float(hours.sum()), 1e-300),
            "co2_kg": float(measured.co2[street].sum() / 1000),
            "nox_kg": float(measured.nox[street].sum() / 1000),
            **ours,
            "co2_kg_at_its_speeds": at_theirs["co2_kg"],
            "nox_kg_at_its_speeds": at_theirs["nox_kg"],
        }
    return report, table(report)


def table(report: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The report as rows of text, a header first."""
    rows = [["", "ours", *(f"SUMO {mode}" for mode in report)]]
    first = next(iter(report.values()), {})
    for label, name, factor, digits in (
        ("vehicle km", "km", 1.0, 0),
        ("mean speed, km/h", "speed", 3.6, 1),
        ("CO2, kg", "co2_kg", 1.0, 1),
        ("NOx, kg", "nox_kg", 1.0, 3),
    ):
        each = (first.get(f"our_{name}", np.nan), *(one[name] for one in report.values()))
        rows.append([label, *(f"{factor * value:.{digits}f}" for value in each)])
    for label, shown in (
        ("CO2 by our model at its speeds, kg", "{co2_kg_at_its_speeds:.1f}"),
        ("links with GEH below 5", "{GEH_below_5:.1%} of {links:.0f}"),
        ("vehicles; that wait to get in; teleports", "{vehicles:.0f}; {waiting:.0f}; {teleports:.0f}"),
    ):
        rows.append([label, "", *(shown.format(**one) for one in report.values())])
    return rows


def program(name: str) -> str:
    """The path of one of SUMO's programs: of the package eclipse-sumo, of SUMO_HOME, or on the PATH. Raises BadInput."""
    homes = [Path(os.environ["SUMO_HOME"])] if os.environ.get("SUMO_HOME") else []
    spec = importlib.util.find_spec("sumo")
    homes += [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    for home in homes:
        if (home / "bin" / name).is_file():
            return str(home / "bin" / name)
    if found := shutil.which(name):
        return found
    raise BadInput(f"SUMO's program {name}: expected it installed, found none; {INSTALL}")


# ---- parts


def _streets(network: Network) -> np.ndarray:
    """Links that are no connectors."""
    return np.flatnonzero(network.kind != "connector")


def _turns(network: Network) -> np.ndarray:
    """Pairs of streets that follow each other, `[turn, 2]`."""
    pairs = turns(network)
    street = network.kind != "connector"
    pairs = pairs[street[pairs].all(1)]
    if network.turn_bans is not None:
        return pairs
    back = network.start[pairs[:, 0]] == network.end[pairs[:, 1]]
    onward = np.bincount(pairs[~back, 0], minlength=network.links) > 0
    return pairs[~(back & onward[pairs[:, 0]])]


def _in_order(network: Network, links: np.ndarray, node: int, banned: Collection[tuple[int, int]]) -> list[int]:
    """The links of a path as they are driven, from its origin's node on; round a block, a node may be passed twice."""
    after: dict[int, list[int]] = defaultdict(list)
    for link in links.tolist():
        after[int(network.start[link])].append(link)
    ways: list[list[int]] = [[link] for link in after[node]]
    while ways:
        way = ways.pop()
        if len(way) == len(links):
            return way
        ahead = after[int(network.end[way[-1]])]
        ways += [[*way, link] for link in ahead if link not in way and (way[-1], link) not in banned]
    return []


def _driven(network: Network, paths: Paths) -> np.ndarray:
    return np.asarray(paths.links.T @ paths.flow).ravel()


def _kilograms(name: str, flow: np.ndarray, speed: np.ndarray, length: np.ndarray, cars: emissions.Fleet) -> dict[str, float]:
    grams = np.asarray(emissions.link_emissions(flow, speed, length, cars), float).sum(1) / 1000
    return {f"{name}co2_kg": float(grams[0]), f"{name}nox_kg": float(grams[1])}


def _statistics(file: Path) -> dict[str, float]:
    """Vehicles that could not come in yet, and that SUMO moved past a jam."""
    found = {"waiting": 0.0, "teleports": 0.0}

    def start(tag: str, given: Mapping[str, str]) -> None:
        if tag == "vehicles":
            found["waiting"] = float(given.get("waiting", 0))
        elif tag == "teleports":
            found["teleports"] = float(given.get("total", 0))

    files.parse_xml(file, start)
    return found


def _run(words: list[str]) -> None:
    environment = {**os.environ, "SUMO_HOME": os.environ.get("SUMO_HOME") or str(Path(words[0]).parents[1])}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_PATIENCE, env=environment)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise BadInput(f"SUMO's {Path(words[0]).name} refused what it was given: {' '.join(said[:2])[:300]}")


def _write(file: Path, root: str, rows: Sequence[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join([f"<{root}>", *rows, f"</{root}>", ""]), encoding="utf-8")
    return file
