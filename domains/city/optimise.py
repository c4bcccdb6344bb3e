"""Tolls and green splits that serve an aim best: less time on the road, less CO2 or NOx, cleaner air where people live.

A bilevel problem: whatever is charged or switched, drivers settle into a user equilibrium. Its flows have kinks, so the gradient is that
of the smooth mode, a logit over a set of ways, through its fixed point (`equilibrium.logit_flow`); L-BFGS-B (Byrd et al. 1995) finds the
best measures within their bounds. Tolls change which ways matter: after each such search the exact equilibrium is solved, its ways join the
set, and drivers of the smooth mode become sharper. Only what the exact equilibrium confirms is kept, and only its figures are reported.
Source of the approach: Patriksson & Rockafellar (2002), "A mathematical model and descent algorithm for bilevel traffic management".

Where drivers pay for what they cost others, v dt/dv on each link, the equilibrium of fixed trips is the system optimum: the least total
time that any tolls can reach (Pigou 1920; Beckmann, McGuire & Winsten 1956, ch. 4).
"""

import csv
import difflib
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import sparse
from scipy.optimize import minimize

from domains.city import days, dispersion, gmns, maps, place
from domains.city.calibration import read_trips, with_zones
from domains.city.emissions import POLLUTANTS, Fleet, fleet, line_strength, link_emissions
from domains.city.equilibrium import Equilibrium, Paths, equilibrium, logit_flow, logit_parameters
from domains.city.network import Demand, Network, check, find_street
from domains.city.place import CONNECTOR, FREE_FLOWING, Place
from domains.city.readers import read_network
from domains.city.traffic import Response
from domains.city.weather import Background, Winds
from twinsim.base import Array, BadInput

UNITS = {"time": "vehicle hours an hour", "CO2": "kg/h", "NOx": "kg/h", "NO2": "ug/m3 of traffic where people live"}
ROUNDS = 10
SHARPNESS = (10.0, 30.0, 100.0, 300.0, 1000.0)  # of drivers, over the mean cost of a trip: 1000 tells ways apart that differ by 0.1 %
LEAST_GAIN = 1e-4  # of the aim; a round at the last sharpness that gains less is the last
EVALUATIONS = 100  # of the smooth mode in a round, about
_SHARES = 0.5 ** np.arange(5)  # of the way to the smooth optimum that are tried in the exact equilibrium
_STEEPEST = 6.0  # of ln of a phase's share of green against the others, to either side
_DEMAND_ROUNDS, _SETTLED = 40, 1e-6  # of trips and traffic in turn; change of all trips, relative, at which they agree


@dataclass(frozen=True)
class Signals:
    """Signalised junctions. Approaches of one phase have green together; a junction's phases share the cycle, less what is lost.

    Attributes:
      approach: links that end there, `[approach]`. phase: of each, `[approach]`. junction: node of each phase, `[phase]`, ascending.
      saturation: flow at green all the time, veh/h, `[approach]`.
      lost: share of the cycle that nobody has, 0-1. least: share that a phase has at least, 0-1.
    """

    approach: np.ndarray
    phase: np.ndarray
    junction: np.ndarray
    saturation: np.ndarray
    lost: float
    least: float


@dataclass(frozen=True)
class Levers:
    """What may be changed.

    Attributes:
      links: that may be tolled, `[n]`. most: the highest toll on each, s, `[n]`. signals: whose green may be split anew, or None.
    """

    links: np.ndarray
    most: np.ndarray
    signals: Signals | None = None

    @property
    def size(self) -> int:
        return len(self.links) + (0 if self.signals is None else len(self.signals.junction))

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Of each variable: a toll's share of the highest one; ln of a phase's weight."""
        phases = self.size - len(self.links)
        return [(0.0, 1.0)] * len(self.links) + [(-_STEEPEST, _STEEPEST)] * phases

    def green(self, x: Array) -> jax.Array:
        """Each phase's share of the cycle, `[phase]`: those of a junction sum to 1 - lost."""
        assert self.signals is not None
        signals = self.signals
        _, at, count = np.unique(signals.junction, return_inverse=True, return_counts=True)
        weight = jnp.exp(jnp.asarray(x)[len(self.links) :])
        share = weight / jax.ops.segment_sum(weight, at, len(count))[at]
        return jnp.asarray(signals.least + (1 - signals.lost - count[at] * signals.least) * share)

    def apply(self, network: Network, x: Array) -> tuple[jax.Array, jax.Array]:
        """Toll, s, and capacity, veh/h, `[link]` each."""
        toll = jnp.zeros(network.links) if network.toll is None else jnp.asarray(network.toll, float)
        toll = toll.at[self.links].add(self.most * jnp.asarray(x)[: len(self.links)])
        capacity = jnp.asarray(network.capacity, float)
        if self.signals is not None:
            capacity = capacity.at[self.signals.approach].set(self.signals.saturation * self.green(x)[self.signals.phase])
        return toll, capacity

    @property
    def nothing(self) -> np.ndarray:
        """No tolls, and equal green for all phases of a junction."""
        return np.zeros(self.size)


@dataclass(frozen=True, eq=False)
class Air:
    """What emissions add to the air that people breathe.

    Attributes:
      unit: what 1 g/(m s) of each road adds at each receptor in the mean weather of a part of the day, s/m2, `[receptor, road]`.
      people: at each receptor, `[receptor]`. photolysis: J of NO2, 1/s. background: of the air that comes in.
    """

    unit: np.ndarray
    people: np.ndarray
    photolysis: float
    background: Background

    @classmethod
    def of(cls, city: Place, period: int = 0, background: Background | None = None) -> "Air":
        """Of a part of the day, on dry days: the mean over types of weather by how often they come."""
        winds = Winds(city)
        often = np.outer(winds.rose, [state.often[period] for state in winds.stabilities]).ravel()
        unit = np.tensordot(often / often.sum(), winds.unit, 1)
        return cls(unit, city.people, winds.photolysis[period], background or Background())

    def no2(self, nox: jax.Array, primary: jax.Array) -> jax.Array:
        """Mean NO2 that a person breathes because of the traffic, ug/m3; from strengths of the roads, g/(m s), `[road]`.

        Concentrations are linear in emissions, so that the mean weather's matrix gives their mean; chemistry is that of these means.
        """
        single = jnp.float32
        add = 1e6 * jnp.dot(jnp.asarray(self.unit, single), jnp.stack([nox, primary], 1), precision="highest")  # ug/m3
        back, J = self.background, jnp.asarray(self.photolysis, single)
        now = dispersion.no2(add[:, 0], add[:, 1], back.nox, back.no2, back.o3, J)
        none = dispersion.no2(jnp.zeros(1, single), jnp.zeros(1, single), back.nox, back.no2, back.o3, J)
        return jnp.dot(now - none, jnp.asarray(self.people / self.people.sum(), single))


@dataclass(frozen=True, eq=False)
class Measure:
    """What a city's traffic costs, by the names of `UNITS`; NO2 where there is `air`."""

    network: Network
    fleet: Fleet
    air: Air | None = None

    @classmethod
    def of(cls, network: Network, air: Air | None = None) -> "Measure":
        return cls(network, fleet(), air)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(UNITS) if self.air is not None else tuple(UNITS)[:-1]

    @cached_property
    def roads(self) -> np.ndarray:
        return np.flatnonzero(self.network.kind != CONNECTOR)

    def __call__(self, flow: Array, time: Array) -> dict[str, jax.Array]:
        """From flow, veh/h, and travel time, s, `[link]` each."""
        flow, time = jnp.asarray(flow), jnp.asarray(time)
        length = self.network.length[self.roads]
        speed = length / jnp.maximum(time[self.roads], 1e-3)
        emitted = link_emissions(flow[self.roads], speed, length, self.fleet)  # g/h
        found = {"time": flow @ time / 3600}
        found |= {name: jnp.sum(emitted[POLLUTANTS.index(name)]) / 1000 for name in ("CO2", "NOx")}
        if self.air is not None:
            strength = line_strength(emitted, length)
            found["NO2"] = self.air.no2(strength[POLLUTANTS.index("NOx")], strength[POLLUTANTS.index("NO2")])
        return found


@dataclass(frozen=True)
class Round:
    """One search of the smooth mode: the aim it promised and the exact equilibrium's, both over today's; the share of the way that was
    taken, 0 for none; ways in its set; its drivers' sharpness, 1/s; evaluations."""

    promised: float
    exact: float
    share: float
    ways: int
    sharpness: float
    evaluations: int


@dataclass(frozen=True)
class Optimum:
    """Measures and what they do, in exact equilibria.

    Attributes:
      toll: s, `[link]`, a network's own left out. capacity: veh/h, `[link]`. green: of each phase, share of the cycle, `[phase]`.
      before, after: equilibria. trips_before, trips_after: veh/h, `[zone, zone]`.
      values_before, values_after: by name, in `UNITS`. aim: over today's, 1 at the beginning, by round, the best so far.
      rounds: what each search found. converged: whether the last one found hardly more.
      smooth: the smooth mode's aim at the measures found, over today's; its difference from `aim[-1]` is the error of that model.
      flow_error: root mean square difference of the smooth mode's flows from the exact ones, over the mean flow.
      variables: as `Levers` has them, where a search may begin again.
    """

    toll: np.ndarray
    capacity: np.ndarray
    green: np.ndarray
    before: Equilibrium
    after: Equilibrium
    trips_before: np.ndarray
    trips_after: np.ndarray
    values_before: dict[str, float]
    values_after: dict[str, float]
    aim: tuple[float, ...]
    rounds: tuple[Round, ...]
    converged: bool
    smooth: float
    flow_error: float
    variables: np.ndarray


def optimise(
    network: Network,
    trips: Demand | np.ndarray,
    levers: Levers,
    aim: Mapping[str, float] | None = None,
    *,
    air: Air | None = None,
    response: Response | None = None,
    start: np.ndarray | None = None,
    rounds: int = ROUNDS,
    gap: float = 1e-7,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Optimum:
    """Measures that make an aim least; an aim weighs names of `UNITS`, each over what it is today. Trips are veh/h `[zone, zone]`.

    Trips are fixed, or answer to their cost by a `response`; then fewer trips serve any aim too. `start` holds variables of `Levers` to
    begin with; by default no tolls and equal green. What is never confirmed by an exact equilibrium is not taken: the result may be that
    nothing changes. Raises BadInput on numbers that make no sense, and where there is nothing to change.
    """
    matrix = np.asarray(trips.trips if isinstance(trips, Demand) else trips, float)
    aim = {name: weight for name, weight in ({"time": 1.0} if aim is None else aim).items() if weight != 0}
    if matrix.shape != (network.zones, network.zones) or not _between(matrix) > 0:
        raise BadInput(f"optimise: expected trips [{network.zones}, {network.zones}] with some between zones, got {list(matrix.shape)}")
    measure = Measure.of(network, air)
    _check_aim(aim, measure)
    _check_levers(network, levers)
    x = levers.nothing if start is None else np.asarray(start, float)
    if x.shape != (levers.size,):
        raise BadInput(f"optimise: expected {levers.size} variables to start from, got {list(x.shape)}")
    model = Model(network, matrix, levers, aim, measure, response, gap)
    now = model.settle_today()
    here = model.settle(x, now)
    # ways that the system optimum takes may matter once there are tolls
    marginal = replace(network, alpha=network.alpha * (1 + network.beta))
    ways = _union([now.found.paths, here.found.paths, equilibrium(marginal, matrix, 1e-4).paths])
    per_trip = float(now.found.flow @ now.found.time) / max(float(matrix.sum() - np.trace(matrix)), 1e-300)
    best, history, log, converged, sharp = here, [model.value(here, now)], [], False, 0
    smooth = model.smooth(ways, now)
    for done in range(rounds):
        theta = SHARPNESS[sharp] / per_trip
        found = minimize(
            lambda x, theta=theta, smooth=smooth: smooth(x, theta)[:2], best.x, jac=True, method="L-BFGS-B", bounds=levers.bounds,
            options={"maxfun": EVALUATIONS, "maxls": 12, "ftol": 1e-12, "gtol": 1e-9},
        )  # fmt: skip
        taken, known = 0.0, ways.links.shape[0]
        all_ways = ways
        for share in _SHARES:
            there = model.settle(best.x + share * (found.x - best.x), now)
            all_ways = _union([all_ways, there.found.paths])
            if model.value(there, now) < history[-1]:
                best, taken = there, float(share)
                break
        history.append(model.value(best, now))
        log.append(Round(float(found.fun), model.value(there, now), taken, known, theta, int(found.nfev)))
        progress(done + 1, rounds)
        gained = history[-2] - history[-1]
        if all_ways.links.shape[0] > known:  # else the compiled one will do
            ways, smooth = all_ways, model.smooth(all_ways, now)
        last = sharp == len(SHARPNESS) - 1
        if last and gained < LEAST_GAIN * history[-2] and ways.links.shape[0] <= 1.02 * known:
            converged = True
            break
        sharp = min(sharp + 1, len(SHARPNESS) - 1)
    if model.value(now, now) < history[-1]:  # from a bad start, what there is may be better
        best = now
        history.append(model.value(now, now))
    aims, _, flow = smooth(best.x, SHARPNESS[-1] / per_trip)
    error = float(np.sqrt(np.mean((flow - best.found.flow) ** 2)) / max(best.found.flow.mean(), 1e-300))
    with jax.enable_x64():
        toll, capacity = (np.asarray(part) for part in levers.apply(network, best.x))
        green = np.zeros(0) if levers.signals is None else np.asarray(levers.green(best.x))
    own = np.zeros(network.links) if network.toll is None else network.toll
    return Optimum(
        toll - own, capacity, green, now.found, best.found, matrix, best.trips, now.values, best.values, tuple(history), tuple(log),
        converged, aims, error, best.x,
    )  # fmt: skip


def all_roads(network: Network) -> np.ndarray:
    """Links that are roads, `[n]`."""
    return np.flatnonzero(network.kind != CONNECTOR)


def cordon(city: Place, districts: Sequence[str]) -> np.ndarray:
    """Roads that lead from outside into some districts, `[n]`. Raises BadInput."""
    return np.intersect1d(city.roads, city.entries(districts))


def signals(network: Network, nodes: Sequence[int] | np.ndarray | None = None, *, lost: float = 0.1, least: float = 0.1) -> Signals:
    """Signals at some junctions, by node index; by default wherever roads of two phases meet that are no motorways or trunk roads.

    On a map, approaches from opposite sides share a phase; without one each has its own. Today's capacity is taken for that at equal green
    of all phases: an assumption. Raises BadInput.
    """
    if not (np.isfinite(lost) and 0 <= lost < 1 and np.isfinite(least) and 0 < least < 1):
        raise BadInput(f"signals: expected a lost share of the cycle of 0 to 1 and a least green above 0, got {lost} and {least}")
    free = np.isin(network.kind, FREE_FLOWING)
    zone = set(network.zone.tolist()) if not network.through_zones else set()
    approach: list[int] = []
    phase: list[int] = []
    junction: list[int] = []
    saturation: list[float] = []
    for node in np.arange(network.nodes) if nodes is None else np.unique(nodes):
        links = np.flatnonzero((network.end == node) & ~free)
        group = _phases(network, links)
        count = int(group.max(initial=-1)) + 1
        ends = set(network.start[links].tolist()) | set(network.end[(network.start == node) & ~free].tolist())
        if count < 2 or (nodes is None and (len(ends) < 3 or int(node) in zone)):
            if nodes is not None:
                raise BadInput(
                    f"signals at node {network.node_id[node]}: expected roads of two phases or more that meet there, got {count}"
                )
            continue
        if count * least > 1 - lost:
            raise BadInput(
                f"signals at node {network.node_id[node]}: {count} phases of {least:g} of the cycle or more do not fit in the {1 - lost:g} "
                "that is not lost; expected a smaller least"
            )
        approach += links.tolist()
        phase += (len(junction) + group).tolist()
        junction += [int(node)] * count
        saturation += (network.capacity[links] * count / (1 - lost)).tolist()
    return Signals(np.array(approach, int), np.array(phase, int), np.array(junction, int), np.array(saturation), lost, least)


# ---- files


def optimise_files(
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    network: str | None = None,
    demand: str | None = None,
    made_up: Mapping[str, Any] | None = None,
    zones: int = 40,
    population: float | None = None,
    junction_delay: float = place.JUNCTION_DELAY,
    aim: Mapping[str, float] | None = None,
    tolls: Mapping[str, Any] | None = None,
    signals: Mapping[str, Any] | None = None,
    value_of_time: float = 12.0,
    elastic: bool = False,
    rounds: int = ROUNDS,
) -> list[str]:
    """Optimises a city and writes the answer into `folder`; returns what came out, in lines.

    The city is that of a `network` and a `demand` of veh/h (`calibration.read_trips`), or else a made-up one on a weekday morning; the
    junction at the end of a link costs `junction_delay`, s, as in `place.junction_delay`. Where the zones have no people, those of
    `population` live in them as `place.of` says; only NO2 asks for them.
    Written: gmns/ (the network with tolls and capacities), trips.npz, tolls.csv, streets.csv, splits.csv, optimum.json, convergence.svg
    and, where there is a map, map.png. Raises BadInput.
    """
    if not (np.isfinite(value_of_time) and value_of_time > 0):
        raise BadInput(f"value_of_time: expected euro/h above 0, got {value_of_time}")
    if rounds < 1:
        raise BadInput(f"rounds: expected 1 or more, got {rounds}")
    wanted = {name: float(weight) for name, weight in ({"time": 1.0} if aim is None else aim).items()}
    city, trips = _city(network, demand, dict(made_up or {}), zones, population, bool(wanted.get("NO2")))
    city = replace(city, delay=place.junction_delay(city.network, junction_delay))
    levers = _levers(city, dict(tolls or {}), dict(signals or {}), value_of_time)
    air = Air.of(city) if wanted.get("NO2") else None
    response = Response() if elastic else None
    roads = place.stopped(city.network, city.delay)
    found = optimise(roads, trips, levers, wanted, air=air, response=response, rounds=rounds, progress=progress)
    return _write(found, city, levers, wanted, value_of_time, Path(folder))


def _city(
    network: str | None, demand: str | None, made_up: dict[str, Any], zones: int, population: float | None, homes: bool
) -> tuple[Place, np.ndarray]:
    """The city and its trips, veh/h; with the people's `homes`, or, where nobody asks for them, with nobody."""
    if (network is None) != (demand is None):
        raise BadInput("optimise: expected network= and demand= together, or neither for the made-up city, got one of them")
    if network is not None and demand is not None:
        roads = with_zones(read_network(network), zones)
        trips = read_trips(demand, roads)
        check(roads, Demand(trips))
        if homes:
            city = place.of(roads, population=population)
            if not city.people.sum() > 0:
                raise BadInput("aim.NO2: expected people in the zones of the network, or population=, got nobody")
            return city, trips
        xy, nobody = np.stack([roads.x, roads.y], axis=1)[roads.zone], np.zeros(roads.zones)
        return Place(roads, place.zone_names(roads), xy, nobody, np.arange(roads.zones), place.junction_delay(roads)), trips
    try:
        town = place.synthetic(**made_up)
    except TypeError as error:
        raise BadInput(f"made_up: expected arguments of domains.city.synthetic.city, got: {error}") from None
    record = days.simulated(town, "2024-01-01", 14, int(made_up.get("seed", 0)))
    workday = days.weekday_of(record["time"].values) < 5
    trips = record["trips"].values[workday, 0].mean(0).astype(float) / days.LENGTHS[0]
    return town, trips


def _levers(city: Place, tolls: dict[str, Any], wanted: dict[str, Any], value_of_time: float) -> Levers:
    links, most = _tolled(city, tolls, value_of_time)
    network = city.network
    where, names = _where("signals", wanted, ("none", "junctions", "streets", "nodes"))
    chosen: Signals | None = None
    if where != "none":
        shares = {name: float(wanted[name]) for name in ("lost", "least") if name in wanted}
        nodes: np.ndarray | None = None
        if where == "streets":
            nodes = np.intersect1d(network.end[city.streets(names)], signals(network, None, **shares).junction)
        elif where == "nodes":
            nodes = np.array([_node(network, name) for name in names], int)
        chosen = signals(network, nodes, **shares)
    return Levers(links, most, chosen if chosen is not None and len(chosen.approach) else None)


def _tolled(city: Place, tolls: dict[str, Any], value_of_time: float) -> tuple[np.ndarray, np.ndarray]:
    """Links that may be tolled, and the highest toll, s."""
    where, names = _where("tolls", tolls, ("roads", "streets", "districts", "cordon", "none"))
    unit, most = tolls.get("unit", "euro"), tolls.get("most", 2.0)
    if unit not in ("euro", "s"):
        raise BadInput(f"tolls.unit: expected euro or s, got {unit!r}")
    if not (np.isfinite(most) and most > 0):
        raise BadInput(f"tolls.most: expected a highest toll above 0 {unit}, got {most}")
    network = city.network
    if where in ("districts", "cordon") and not network.has_map:
        raise BadInput(f"tolls.where: {where}: expected a network with a map, got one without")
    if where == "streets":
        links = np.unique(np.concatenate([find_street(network, name) for name in names]))
    elif where == "districts":
        links = city.links_in(names)
    elif where == "cordon":
        links = cordon(city, names)
    else:
        links = all_roads(network) if where == "roads" else np.zeros(0, int)
    if where != "none" and not len(links):
        raise BadInput(f"tolls.where: {where} {', '.join(names)}: expected some roads, found none")
    return links, np.full(len(links), float(most) * (3600 / value_of_time if unit == "euro" else 1.0))


def _where(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> tuple[str, list[str]]:
    where, names = given.get("where", known[0]), given.get("names") or []
    if where not in known:
        close = difflib.get_close_matches(str(where), known, 1)
        raise BadInput(
            f"{what}.where: expected one of {', '.join(known)}, got {where!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    names = [str(name) for name in ([names] if isinstance(names, str | int) else names)]
    needed = where in ("streets", "districts", "cordon", "nodes")
    if needed != bool(names):
        expected = f"names of {'districts' if where == 'cordon' else where}" if needed else "none"
        raise BadInput(f"{what}.names: expected {expected} for {what}.where={where}, got {', '.join(names) or 'none'}")
    return where, names


def _node(network: Network, name: str) -> int:
    found = np.flatnonzero(network.node_id == name)
    if not len(found):
        close = difflib.get_close_matches(name, network.node_id.tolist(), 3, 0.5)
        raise BadInput(f"signals at node {name!r}: the network has none" + (f"; did you mean {', '.join(close)}?" if close else ""))
    return int(found[0])


def _write(found: Optimum, city: Place, levers: Levers, aim: Mapping[str, float], value_of_time: float, folder: Path) -> list[str]:
    network, euro = city.network, value_of_time / 3600
    own = np.zeros(network.links) if network.toll is None else network.toll
    tolled = own + found.toll
    gmns.write_network(replace(network, capacity=found.capacity, toll=tolled if tolled.any() else None), folder / "gmns")
    np.savez_compressed(folder / "trips.npz", trips=found.trips_before, after=found.trips_after, zone=network.node_id[network.zone])
    flow = (found.before.flow, found.after.flow)
    with (folder / "tolls.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("link", "street", "toll_s", "toll_euro", "flow_before_veh_h", "flow_after_veh_h"))
        for link in levers.links.tolist():
            values = (found.toll[link], euro * found.toll[link], flow[0][link], flow[1][link])
            table.writerow((network.link_id[link], network.name[link], *(round(float(value), 3) for value in values)))
    with (folder / "streets.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("street", "tolled_links", "mean_toll_euro", "highest_toll_euro", "paid_euro_h"))
        for street in sorted(set(network.name[levers.links].tolist()) - {""}):
            links = levers.links[network.name[levers.links] == street]
            toll = euro * found.toll[links]
            numbers = (np.mean(toll), np.max(toll), toll @ flow[1][links])
            table.writerow((street, int((toll > 0).sum()), *(round(float(value), 3) for value in numbers)))
    if levers.signals is not None:
        with (folder / "splits.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("node", "phase", "link", "street", "green", "capacity_before_veh_h", "capacity_after_veh_h"))
            first = {node: index for index, node in reversed(list(enumerate(levers.signals.junction.tolist())))}
            for link, phase in zip(levers.signals.approach.tolist(), levers.signals.phase.tolist(), strict=True):
                node = int(levers.signals.junction[phase])
                shares = (found.green[phase], network.capacity[link], found.capacity[link])
                row = (network.node_id[node], phase - first[node] + 1, network.link_id[link], network.name[link])
                table.writerow((*row, *(round(float(value), 4) for value in shares)))
    (folder / "optimum.json").write_text(json.dumps(summary(found, aim, value_of_time), indent=1))
    (folder / "convergence.svg").write_bytes(convergence(found))
    if network.has_map:
        change = found.after.flow - found.before.flow
        (folder / "map.png").write_bytes(maps.measures(city, euro * found.toll, found.capacity / network.capacity - 1, change))
    return lines(found, levers, value_of_time)


def summary(found: Optimum, aim: Mapping[str, float], value_of_time: float) -> dict[str, Any]:
    """The optimum in plain numbers, of exact user equilibria unless a name says smooth."""
    return {
        "aim": dict(aim),
        "units": {name: UNITS[name] for name in found.values_after},
        "before": found.values_before,
        "after": found.values_after,
        "aim_over_todays": list(found.aim),
        "rounds": [vars(each) for each in found.rounds],
        "converged": found.converged,
        "smooth_aim_over_todays": found.smooth,
        "smooth_minus_exact": found.smooth - found.aim[-1],
        "smooth_flow_error": found.flow_error,
        "relative_gap_of_the_equilibria": [found.before.gap, found.after.gap],
        "trips_veh_h": [_between(found.trips_before), _between(found.trips_after)],
        "tolled_links": int((found.toll > 0).sum()),
        "paid_euro_h": float(found.toll @ found.after.flow) * value_of_time / 3600,
    }


def lines(found: Optimum, levers: Levers, value_of_time: float) -> list[str]:
    """The optimum in words."""
    answer = []
    for name, after in found.values_after.items():
        before = found.values_before[name]
        answer.append(f"{name:<5} {before:.6g} -> {after:.6g} {UNITS[name]} ({100 * (after / max(before, 1e-300) - 1):+.2f} %)")
    if len(levers.links):
        euro = found.toll * value_of_time / 3600
        paid = float(euro @ found.after.flow)
        answer.append(
            f"tolls {int((euro > 0).sum())} of {len(levers.links)} links, up to {euro.max():.2f} euro; {paid:.0f} euro paid an hour"
        )
    if levers.signals is not None:
        count = len(np.unique(levers.signals.junction))
        answer.append(f"green {count} junctions, phases of {found.green.min():.0%} to {found.green.max():.0%} of the cycle")
    trips = [_between(matrix) for matrix in (found.trips_before, found.trips_after)]
    if abs(trips[1] - trips[0]) > 1e-6 * trips[0]:
        answer.append(f"trips {trips[0]:.0f} -> {trips[1]:.0f} veh/h: part of the gain is that fewer drive")
    answer.append(f"aim   {found.aim[-1]:.4f} of today's in exact user equilibria, as all above; {found.smooth:.4f} in the smooth model")
    if found.aim[-1] >= found.aim[0]:
        answer.append("no gain of the smooth model held in the exact equilibrium: everything stays as it was")
    if not found.converged:
        answer.append(f"not converged after {len(found.rounds)} rounds: more of them may find more")
    return answer


def convergence(found: Optimum) -> bytes:
    """The aim by round, promised by the smooth model and in the exact equilibrium, as SVG."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.subplots()
    number = np.arange(1, len(found.rounds) + 1)
    axes.plot(np.arange(len(found.aim)), found.aim, color="#1b1f24", marker="o", markersize=4, label="exact, best so far")
    axes.plot(number, [one.promised for one in found.rounds], "x", color="#b35806", label="promised by the smooth model")
    axes.plot(number, [one.exact for one in found.rounds], "+", color="#542788", markersize=9, label="exact, of the last trial")
    axes.set(xlabel="round", ylabel="aim over today's")
    axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "twinsim", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return stream.getvalue()


# ---- the search


@dataclass(frozen=True)
class State:
    """Variables, the exact equilibrium that they lead to, its trips, and what it costs by name."""

    x: np.ndarray
    found: Equilibrium
    trips: np.ndarray
    values: dict[str, float]


@dataclass(frozen=True)
class Model:
    """A city, what may be changed in it, and what for."""

    network: Network
    trips: np.ndarray
    levers: Levers
    aim: Mapping[str, float]
    measure: Measure
    response: Response | None
    gap: float

    def settle_today(self) -> State:
        found = self._equilibrium(self.network, self.trips, None)
        return State(self.levers.nothing, found, self.trips, self._values(found))

    def settle(self, x: np.ndarray, now: State) -> State:
        """The exact equilibrium under the measures, trips and their costs in agreement."""
        x = np.clip(x, *np.array(self.levers.bounds).T)
        with jax.enable_x64():
            toll, capacity = (np.asarray(part) for part in self.levers.apply(self.network, x))
        network, trips = replace(self.network, capacity=capacity), self.trips
        found = self._equilibrium(network, trips, toll)
        for _ in range(_DEMAND_ROUNDS if self.response is not None else 0):
            assert self.response is not None
            change = np.where(np.isfinite(found.cost[0]), found.cost[0], 0.0) - _finite(now.found.cost[0])
            wish = self.trips * self.response(change)
            if np.abs(wish - trips).sum() <= _SETTLED * trips.sum():
                break
            trips = (trips + wish) / 2
            found = self._equilibrium(network, trips, toll)
        return State(x, found, trips, self._values(found))

    def value(self, state: State, now: State) -> float:
        """The aim, over today's."""
        return sum(weight * state.values[name] / now.values[name] for name, weight in self.aim.items()) / sum(self.aim.values())

    def smooth(self, ways: Paths, now: State) -> Callable[[np.ndarray, float], tuple[float, np.ndarray, np.ndarray]]:
        """The smooth model over given ways: from variables and drivers' sharpness, 1/s, the aim over today's, its gradient by the
        variables, and flows, veh/h, `[link]`."""
        with jax.enable_x64():
            fixed = logit_parameters(self.network, self.trips, 1.0) | {"base_cost": jnp.asarray(_finite(now.found.cost))}
        response = None if self.response is None else _answer(self.response)

        def value(x: jax.Array, theta: jax.Array) -> tuple[jax.Array, jax.Array]:
            toll, capacity = self.levers.apply(self.network, x)
            flow = logit_flow(ways, {**fixed, "theta": theta, "toll": toll[None], "capacity": capacity}, response)
            time = fixed["free_time"] * (1 + fixed["alpha"] * (flow / capacity) ** fixed["beta"])
            found = self.measure(flow, time)
            parts = [weight / now.values[name] * found[name].astype(float) for name, weight in self.aim.items()]
            return jnp.sum(jnp.stack(parts)) / sum(self.aim.values()), flow

        both = jax.jit(jax.value_and_grad(value, has_aux=True))

        def at(x: np.ndarray, theta: float) -> tuple[float, np.ndarray, np.ndarray]:
            with jax.enable_x64():
                (found, flow), gradient = both(jnp.asarray(x), jnp.asarray(theta, float))
            if not np.isfinite(found):
                raise FloatingPointError(f"optimise: the smooth equilibrium is not finite at a sharpness of {theta:g} 1/s")
            return float(found), np.asarray(gradient, float), np.asarray(flow)

        return at

    def _equilibrium(self, network: Network, trips: np.ndarray, toll: np.ndarray | None) -> Equilibrium:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a gap that is missed stands in the result
            return equilibrium(network, trips, self.gap, toll=toll)

    def _values(self, found: Equilibrium) -> dict[str, float]:
        with jax.enable_x64():
            return {name: float(value) for name, value in self.measure(found.flow, found.time).items()}


def _answer(response: Response) -> Callable[[jax.Array], jax.Array]:
    """`Response`, differentiable."""
    share, sensitivity = response.car_share, response.sensitivity

    def answer(change: jax.Array) -> jax.Array:
        pull = share * jnp.exp(jnp.clip(-sensitivity * change, -50, 50))
        return pull / (pull + 1 - share) / share

    return answer


def _union(sets: Sequence[Paths]) -> Paths:
    """All ways of several sets, each once."""
    table = sparse.vstack([one.links for one in sets], format="csr")
    table.sort_indices()
    ends = np.stack([np.concatenate([getattr(one, name) for one in sets]) for name in ("user", "origin", "destination")], axis=1)
    flow = np.concatenate([one.flow for one in sets])
    first: dict[bytes, int] = {}
    for row in range(len(flow)):
        links = table.indices[table.indptr[row] : table.indptr[row + 1]]
        first.setdefault(ends[row].tobytes() + links.tobytes(), row)
    kept = np.fromiter(first.values(), int)
    user, origin, destination = ends[kept].T
    return Paths(table[kept], user, origin, destination, flow[kept])


def _phases(network: Network, links: np.ndarray) -> np.ndarray:
    """The phase of each approach, `[n]`: opposite ones share one, to 45 degrees."""
    phase = np.full(len(links), -1)
    heading = np.full((len(links), 2), np.nan)
    if network.has_map:
        xy = np.stack([network.x, network.y], axis=1)
        heading = xy[network.end[links]] - xy[network.start[links]]
        heading /= np.maximum(np.hypot(*heading.T), 1e-9)[:, None]
    count = 0
    for index in range(len(links)):
        if phase[index] >= 0:
            continue
        phase[index] = count
        against = np.where(phase < 0, heading @ heading[index], np.inf)
        if np.isfinite(against).any() and np.nanmin(against) < -np.sqrt(0.5):
            phase[int(np.nanargmin(against))] = count
        count += 1
    return phase


def _finite(cost: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(cost), cost, 0.0)


def _between(trips: np.ndarray) -> float:
    """Trips between zones, veh/h."""
    return float(trips.sum() - np.trace(trips))


def _check_aim(aim: Mapping[str, float], measure: Measure) -> None:
    for name, weight in aim.items():
        if name not in UNITS:
            close = difflib.get_close_matches(name, UNITS, 1)
            raise BadInput(f"aim: expected some of {', '.join(UNITS)}, got {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
        if name not in measure.names:
            raise BadInput("aim: NO2: expected a city with people and a map, whose air is known")
        if not (np.isfinite(weight) and weight > 0):
            raise BadInput(f"aim.{name}: expected a weight of 0 or more, got {weight}")
    if not aim:
        raise BadInput(f"aim: expected a weight above 0 for some of {', '.join(UNITS)}, got none")


def _check_levers(network: Network, levers: Levers) -> None:
    if not levers.size:
        raise BadInput("optimise: there is nothing to optimise: expected links that may be tolled, or junctions with signals, got none")
    if len(levers.most) != len(levers.links):
        raise BadInput(f"optimise: expected a highest toll for each of {len(levers.links)} links, got {len(levers.most)}")
    wrong = np.flatnonzero(~(np.isfinite(levers.most) & (levers.most > 0)))
    if len(wrong):
        link = network.link_id[levers.links[wrong[0]]]
        raise BadInput(f"toll of link {link}: expected a highest toll above 0 s, got {levers.most[wrong[0]]}")
