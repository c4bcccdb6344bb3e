"""How traffic builds up and clears over a day: a link transmission model in JAX, with drivers who follow the times they meet.

Links carry cumulative counts of vehicles at their two ends (Newell 1993, "A simplified theory of kinematic waves", triangular relation
of flow and density; Yperman 2007, "The link transmission model for dynamic network loading", ch. 4). In a step dt a link sends at most

  S = min(N_up(t + dt - L / v) - N_down(t), q dt)                      what has driven through, and no more than capacity
  R = min(N_down(t + dt - L / w) + k L - N_up(t), q dt)                is what it can take in: the holes that have come back

At a node, supply is shared in proportion to the capacities of the links that lead in, and a link whose foremost vehicles cannot leave
holds up those behind them (Tampere, Corthout, Cattrysse & Immers 2011, "A generic class of first order node models", sec. 5).
Vehicles are told apart by destination. Those that came onto a link within one cohort (a routing interval) are mixed, cohorts leave in
the order they came; of the last `memory` cohorts on a link that is, older ones are mixed with each other. Drivers choose at every node
anew (reactive dynamic user optimum): every `update` seconds shortest times to each destination are found, and the ways onward that lead
nearer to it share by a logit of the time they lose. Each zone has a vertical queue, so no trip is lost where the network is full.

`plan` lays the network out once, on the host; `simulate` is pure: it can be jitted, vmapped over scenarios and differentiated in reverse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domains.city.network import Demand, Network, reached
from twinsim.base import BadInput

WAVE_SPEED = 5.0  # m/s, w: 18 km/h, of the usual 15 to 20 (Treiber & Kesting 2013, "Traffic Flow Dynamics", ch. 8)
FASTEST = 50.0  # m/s: a link that a file gives no travel time takes one step, or this speed
UPDATE, THETA, MEMORY = 300.0, 30.0, 2  # s, s, cohorts
_FAR = 1e9  # s, to where there is no way
_CUT = 0.01  # of the best way's weight: a way that is worth less is not taken, so that nobody waits for a turn that nearly nobody makes
_LONE = 1e-3  # share of a link's vehicles below which those for a full link hold up the others ever less
_SLOWEST = 0.05  # of capacity: a queue is not believed to clear slower than this
_NOBODY = 1e-7  # vehicles: fewer are none; whose reciprocal squared float32 still holds
_ROUNDS = 4  # in which links into a node stop sending, each for one reason; those that have not by then stop at the next
_MERGE = 0.05  # of all rows: so much padding is accepted to treat two kinds of nodes together


@dataclass(frozen=True)
class _Block:
    """Nodes with as many links in and out (less padding): their places in the rows, and where a vertex's ways lead.

    A vertex is where drivers choose: a node, or, where turns are banned, each of its links in (`own`).
    """

    nodes: int
    ins: int
    outs: int
    own: bool
    first_in: int
    first_out: int
    first_vertex: int
    open: np.ndarray  # whether the way is there, [node, vertex, out]
    head: np.ndarray  # vertex at its end, [node, vertex, out]

    @property
    def choices(self) -> int:
        """Vertices of a node."""
        return self.ins if self.own else 1

    def vertices(self) -> slice:
        return slice(self.first_vertex, self.first_vertex + self.nodes * self.choices)

    def of_ins(self, rows: jax.Array) -> jax.Array:
        """`[in row, ...]` to `[node, in, ...]`."""
        return rows[self.first_in : self.first_in + self.nodes * self.ins].reshape(self.nodes, self.ins, *rows.shape[1:])

    def of_outs(self, rows: jax.Array) -> jax.Array:
        """`[out row, ...]` to `[node, out, ...]`."""
        return rows[self.first_out : self.first_out + self.nodes * self.outs].reshape(self.nodes, self.outs, *rows.shape[1:])


@dataclass(frozen=True, eq=False)
class Plan:
    """A network laid out for `simulate`.

    Rows stand for links as they enter their end node, for the queues of zones, and for padding (in rows), and for links as they leave
    their start node (out rows).

    Attributes:
      network: what was laid out. dt: length of a step, s. steps: how many. every: steps between two updates of the routes.
      memory: cohorts that leave a link in the order they came.
      destinations: zones that trips may end at, `[destination]`.
      length: m, of links as they are simulated, `[link]`; `lengthened`: indices of those that were too short for dt, or too fast.
      jam_density: veh/m, `[link]`. wave_speed: m/s, `[link]`.
    """

    network: Network
    dt: float
    steps: int
    every: int
    memory: int
    destinations: np.ndarray
    length: np.ndarray
    lengthened: np.ndarray
    jam_density: np.ndarray
    wave_speed: np.ndarray
    blocks: tuple[_Block, ...] = field(repr=False)
    in_row: np.ndarray = field(repr=False)  # of a link
    out_row: np.ndarray = field(repr=False)
    origin_row: np.ndarray = field(repr=False)  # in row of a zone's queue
    exits: np.ndarray = field(repr=False)  # whether trips end here, [vertex, destination]

    @property
    def duration(self) -> float:
        """Simulated time, s."""
        return self.steps * self.dt

    @property
    def times(self) -> np.ndarray:
        """Ends of the steps, s, the start first, `[time]`."""
        return np.arange(self.steps + 1) * self.dt


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Run:
    """What a simulation gives; `time` counts the steps' ends, the start first.

    Attributes:
      entered, left: vehicles that have come onto a link and gone off it, `[time, link]`.
      queue: vehicles that would be gone by now on an empty road, `[time, link]`.
      waiting: vehicles at a zone that are not let onto the network yet, `[time, zone]`.
      started, ended: trips that have begun (waiting ones too) and ended, `[time]`.
      dt: s. free_time: of a link as it is simulated, s, `[link]`. length: likewise, m. capacity: the least of the run, veh/s, `[link]`.
    """

    entered: jax.Array
    left: jax.Array
    queue: jax.Array
    waiting: jax.Array
    started: jax.Array
    ended: jax.Array
    dt: jax.Array
    free_time: jax.Array
    length: jax.Array
    capacity: jax.Array

    @property
    def flow(self) -> jax.Array:
        """Onto a link, veh/h, `[step, link]`."""
        return jnp.diff(self.entered, axis=0) * (3600 / self.dt)

    @property
    def outflow(self) -> jax.Array:
        """Off a link, veh/h, `[step, link]`."""
        return jnp.diff(self.left, axis=0) * (3600 / self.dt)

    @property
    def density(self) -> jax.Array:
        """Vehicles per metre, `[time, link]`."""
        return (self.entered - self.left) / self.length[None]

    @property
    def vehicle_hours(self) -> jax.Array:
        """Spent on the links and waiting, until the end of the simulation."""
        return (_integral(self.entered - self.left) + _integral(self.waiting)) * self.dt / 3600

    @property
    def delay(self) -> jax.Array:
        """Vehicle-hours beyond those of empty roads; waiting for the next step to begin is none."""
        return (_integral(self.queue) + _integral(self.waiting)) * self.dt / 3600

    @property
    def remaining(self) -> jax.Array:
        """Vehicles still on their way, or waiting, at the end."""
        return self.started[-1] - self.ended[-1]

    @property
    def travel_time(self) -> jax.Array:
        """Of a link for who enters now, s, `[time, link]`: the horizontal distance of the two curves.

        Who has not left at the end is given the rest of the time, and the time that those before him take at capacity.
        """

        def of_link(entered: jax.Array, left: jax.Array, free: jax.Array, capacity: jax.Array) -> jax.Array:
            index = jnp.searchsorted(left, entered, side="left")
            after = jnp.clip(index, 1, len(left) - 1)
            low, high = left[after - 1], left[after]
            share = (entered - low) / jnp.where(high > low, high - low, 1.0)
            inside = (after - 1).astype(left.dtype) + jnp.clip(share, 0.0, 1.0)
            beyond = jnp.maximum(entered - left[-1], 0.0) / (capacity * self.dt)
            now = jnp.arange(len(left), dtype=left.dtype)
            return jnp.maximum((inside + beyond - now) * self.dt, free)

        return jax.vmap(of_link, in_axes=(1, 1, 0, 0), out_axes=1)(self.entered, self.left, self.free_time, self.capacity)


def _integral(counts: jax.Array) -> jax.Array:
    """Trapezoids over time, summed over what else there is, in steps."""
    return counts.sum() - (counts[0] + counts[-1]).sum() / 2


# ---- the border


def transmission(
    network: Network,
    demand: Demand | np.ndarray,
    duration: float,
    *,
    profile: np.ndarray | None = None,
    toll: np.ndarray | None = None,
    capacity: np.ndarray | None = None,
    free_speed: np.ndarray | None = None,
    theta: float = THETA,
    **layout: Any,
) -> Run:
    """Simulates one scenario for `duration` s; `layout` is what `plan` takes. For many, or gradients: `plan`, `given`, `simulate`."""
    trips = demand.trips if isinstance(demand, Demand) else np.asarray(demand, float)
    ends = np.flatnonzero((trips.reshape(-1, trips.shape[-1]) > 0).any(axis=0)) if trips.ndim >= 2 else None
    laid = plan(network, duration, **({"destinations": ends} | layout))
    inputs = given(laid, demand, profile=profile, toll=toll, capacity=capacity, free_speed=free_speed, theta=theta)
    return jax.jit(lambda p: simulate(laid, p))(inputs)


def plan(
    network: Network,
    duration: float,
    *,
    dt: float | None = None,
    update: float = UPDATE,
    memory: int = MEMORY,
    lengthen: bool = True,
    destinations: np.ndarray | None = None,
    wave_speed: float | np.ndarray = WAVE_SPEED,
    jam_density: np.ndarray | None = None,
) -> Plan:
    """Lays a network out for a simulation of `duration` s in steps of `dt`.

    A step may not be longer than the shortest link takes. With `lengthen`, links that are too short are as long as is needed
    (`Plan.lengthened` names them), and by default dt is such that 1 link in 20 is, between 1 and 30 s; without, by default none is.
    Both `duration` and `update` are rounded to whole steps and intervals. Jam density defaults to that of the triangle of capacity,
    free speed and wave speed, k = q / v + q / w; `destinations` to all zones. Raises BadInput.
    """
    for name, value in (("duration", duration), ("update", update)) + ((("dt", dt),) if dt is not None else ()):
        if not (np.isfinite(value) and value > 0):
            raise BadInput(f"{name}: expected seconds of more than 0, got {value}")
    if memory < 0:
        raise BadInput(f"memory: expected 0 cohorts or more, got {memory}")
    wave = np.broadcast_to(np.asarray(wave_speed, float), network.links).copy()
    for name, of_link in (
        ("length", network.length),
        ("free speed", network.free_speed),
        ("capacity", network.capacity),
        ("wave speed", wave),
    ):
        _refuse(network, name, of_link)
    usual = np.minimum(network.free_speed, FASTEST)
    crossing = network.length / np.maximum(network.free_speed, wave)
    slow_enough = network.length / np.maximum(usual, wave)
    if dt is None:
        if lengthen:
            dt = float(np.clip(np.quantile(slow_enough, 0.05), 1.0, 30.0))
        else:
            dt = float(min(crossing.min(), 30.0))
        dt = update / math.ceil(update / dt - 1e-9)
    short = np.flatnonzero(crossing < dt * (1 - 1e-9))
    if len(short) and not lengthen:
        worst = int(np.argmin(crossing))
        raise BadInput(
            f"dt: a step of {dt:g} s is longer than {len(short)} links take, link {network.link_id[worst]} the shortest; "
            f"expected at most {crossing[worst]:.3g} s, or lengthen=True"
        )
    speed = np.minimum(network.free_speed, np.maximum(network.length / dt, FASTEST))
    length = np.maximum(network.length, np.maximum(speed, wave) * dt)
    density = network.capacity / 3600 * (1 / speed + 1 / wave) if jam_density is None else np.asarray(jam_density, float)
    _refuse(network, "jam density", density)
    ends = np.arange(network.zones) if destinations is None else np.unique(np.asarray(destinations, np.int64))
    every = max(1, round(update / dt))
    steps = every * max(1, math.ceil(duration / (every * dt) - 1e-9))
    return Plan(network, float(dt), steps, every, memory, ends, length, short, density, wave, **_lay_out(network, ends))


def given(
    plan: Plan,
    demand: Demand | np.ndarray,
    *,
    profile: np.ndarray | None = None,
    toll: np.ndarray | None = None,
    capacity: np.ndarray | None = None,
    free_speed: np.ndarray | None = None,
    theta: float = THETA,
) -> dict[str, jax.Array]:
    """What `simulate` depends on and can be differentiated by, checked, in the precision that JAX has.

    Series have intervals of equal length that fill the simulated time. Raises BadInput.

    Args:
      demand: veh/h, `[interval, zone, zone]`; or `[zone, zone]`, the same all the time or times the `profile`, `[interval]`.
      toll: seconds of travel time, `[link]` or `[interval, link]`; by default the network's.
      capacity: veh/h, `[link]` or `[interval, link]`: works, incidents, signals; 0 closes a link.
      free_speed: m/s, `[link]`. No link is driven through in less than a step.
      theta: how much time a driver takes for little, s.
    """
    network, zones, links = plan.network, plan.network.zones, plan.network.links
    trips = np.asarray(demand.trips if isinstance(demand, Demand) else demand, float)
    if trips.ndim not in (2, 3) or trips.shape[-2:] != (zones, zones):
        raise BadInput(
            f"demand: expected [interval, {zones}, {zones}] or [{zones}, {zones}], one row and column a zone, got {list(trips.shape)}"
        )
    trips = trips if trips.ndim == 3 else trips[None]
    if profile is not None:
        shape = np.asarray(profile, float)
        if shape.ndim != 1 or len(trips) != 1 or not (np.isfinite(shape) & (shape >= 0)).all():
            raise BadInput("profile: expected one factor of 0 or more an interval, and a demand without intervals")
        trips = shape[:, None, None] * trips
    wrong = np.argwhere(~(np.isfinite(trips) & (trips >= 0)))
    if len(wrong):
        a, b = network.node_id[network.zone[wrong[0][1:]]]
        raise BadInput(f"demand from zone {a} to zone {b}, interval {wrong[0][0]}: expected 0 veh/h or more, got {trips[tuple(wrong[0])]}")
    trips = trips * ~np.eye(zones, dtype=bool)
    wanted = (trips > 0).any(axis=0)
    others = np.setdiff1d(np.flatnonzero(wanted.any(axis=0)), plan.destinations)
    if len(others):
        raise BadInput(f"demand to zone {network.node_id[network.zone[others[0]]]}: expected only destinations that the plan was made for")
    lost = np.argwhere(wanted & ~reached(network))
    if len(lost):
        a, b = network.node_id[network.zone[lost[0]]]
        raise BadInput(f"demand from zone {a} to zone {b}: expected a way, there is none")
    series = {
        "toll": (np.zeros(links) if network.toll is None else network.toll) if toll is None else toll,
        "capacity": network.capacity if capacity is None else capacity,
        "free_speed": network.free_speed if free_speed is None else free_speed,
    }
    inputs: dict[str, Any] = {"demand": trips, "theta": theta}
    for name, value in series.items():
        value = np.asarray(value, float)
        if value.ndim not in (1, 2 if name != "free_speed" else 1) or value.shape[-1] != links:
            also = "" if name == "free_speed" else ", or [interval, link]"
            raise BadInput(f"{name}: expected [{links}], one value a link{also}, got {list(value.shape)}")
        lowest = np.nextafter(0, 1) if name == "free_speed" else 0.0
        wrong = np.argwhere(~(np.isfinite(value) & (value >= lowest)))
        if len(wrong):
            least = "more than 0" if lowest else "0 or more"
            raise BadInput(
                f"{name} of link {network.link_id[wrong[0][-1]]}: expected a finite number of {least}, got {value[tuple(wrong[0])]}"
            )
        inputs[name] = value if name == "free_speed" or value.ndim == 2 else value[None]
    inputs["free_speed"] = np.minimum(inputs["free_speed"], 1e6)  # in float32 as well
    if not (np.isfinite(theta) and theta > 0):
        raise BadInput(f"theta: expected seconds of more than 0, got {theta}")
    return {name: jnp.asarray(value, float) for name, value in inputs.items()}


def _refuse(network: Network, name: str, of_link: np.ndarray) -> None:
    wrong = np.flatnonzero(~(np.isfinite(of_link) & (of_link > 0)))
    if len(wrong):
        raise BadInput(f"link {network.link_id[wrong[0]]}: expected a finite {name} of more than 0, got {of_link[wrong[0]]}")


# ---- the layout


def _lay_out(network: Network, destinations: np.ndarray) -> dict[str, Any]:
    """Blocks of like nodes, and who has which row. A centroid that may not be driven through is two nodes: one to start, one to end at."""
    links, zones = network.links, network.zones
    start, end, origin, nodes = network.start.copy(), network.end, network.zone.copy(), network.nodes
    if not network.through_zones:
        place = np.full(nodes, -1)
        place[network.zone] = np.arange(zones)
        start = np.where(place[start] >= 0, nodes + place[start], start)
        origin, nodes = nodes + np.arange(zones), nodes + zones
    bans = np.zeros((0, 2), np.int64) if network.turn_bans is None else network.turn_bans
    own = np.zeros(nodes, bool)
    own[end[bans[:, 0]]] = True
    node_in = np.concatenate([end, origin])  # rows in: links, then zones
    ins, outs = np.bincount(node_in, minlength=nodes), np.bincount(start, minlength=nodes)
    kinds = _kinds(ins, outs, own)
    in_row, out_row = np.zeros(links + zones, np.int64), np.zeros(links, np.int64)
    node_vertex, vertex_step = np.zeros(nodes, np.int64), own.astype(np.int64)
    slot_in, slot_out = _rank(node_in), _rank(start)
    sizes = np.zeros(3, np.int64)  # in rows, out rows, vertices so far
    places = []
    for members, most_in, most_out, private in kinds:
        index = np.full(nodes, -1)
        index[members] = np.arange(len(members))
        here_in, here_out = index[node_in] >= 0, index[start] >= 0
        in_row[here_in] = sizes[0] + index[node_in[here_in]] * most_in + slot_in[here_in]
        out_row[here_out] = sizes[1] + index[start[here_out]] * most_out + slot_out[here_out]
        choices = most_in if private else 1
        node_vertex[members] = sizes[2] + np.arange(len(members)) * choices
        places.append([int(size) for size in sizes])
        sizes += len(members) * np.array([most_in, most_out, choices])
    vertex = node_vertex[node_in] + vertex_step[node_in] * slot_in  # at which who comes by a row chooses
    link_of = np.full(sizes[1], -1)
    link_of[out_row] = np.arange(links)
    in_of = np.full(sizes[0], -1)
    in_of[in_row] = np.arange(links + zones)
    banned = np.sort(bans @ np.array([links, 1]))
    blocks = []
    for (members, most_in, most_out, private), (first_in, first_out, first_vertex) in zip(kinds, places, strict=True):
        count, choices = len(members), most_in if private else 1
        onward = link_of[first_out : first_out + count * most_out].reshape(count, 1, most_out)
        ways = np.broadcast_to(onward >= 0, (count, choices, most_out)).copy()
        if private:
            came = in_of[first_in : first_in + count * most_in].reshape(count, most_in, 1)
            ways &= (came >= 0) & ~((came < links) & np.isin(came * links + onward, banned))
        head = np.where(ways, vertex[onward], 0)
        blocks.append(_Block(count, most_in, most_out, private, first_in, first_out, first_vertex, ways, head))
    exits = np.zeros((sizes[2], len(destinations)), bool)
    for column, zone in enumerate(destinations):
        exits[vertex[:links][end == network.zone[zone]], column] = True
    return {"blocks": tuple(blocks), "in_row": in_row[:links], "out_row": out_row, "origin_row": in_row[links:], "exits": exits}


def _kinds(ins: np.ndarray, outs: np.ndarray, own: np.ndarray) -> list[tuple[np.ndarray, int, int, bool]]:
    """Nodes by links in and out, nearly: like kinds are merged as long as little padding comes of it."""
    sizes, which = np.unique(np.stack([ins, outs, own]), axis=1, return_inverse=True)
    which = which.reshape(-1)
    groups = [(np.flatnonzero(which == i), max(int(a), 1), max(int(b), 1), bool(c)) for i, (a, b, c) in enumerate(sizes.T) if a or b]

    def merged(one: tuple, other: tuple) -> tuple:
        return np.concatenate([one[0], other[0]]), max(one[1], other[1]), max(one[2], other[2]), one[3]

    def rows(group: tuple) -> int:
        return len(group[0]) * (group[1] + group[2])

    while True:
        pairs = [
            (rows(merged(a, b)) - rows(a) - rows(b), i, j)
            for i, a in enumerate(groups)
            for j, b in enumerate(groups)
            if i < j and a[3] == b[3]
        ]
        cost, i, j = min(pairs, default=(np.inf, 0, 0))
        if cost > _MERGE * (ins.sum() + outs.sum()):
            return groups
        groups = [group for k, group in enumerate(groups) if k not in (i, j)] + [merged(groups[i], groups[j])]


def _rank(of: np.ndarray) -> np.ndarray:
    """How many before an entry have its value."""
    order = np.argsort(of, kind="stable")
    ranked = of[order]
    first = np.searchsorted(ranked, ranked)
    answer = np.empty(len(of), np.int64)
    answer[order] = np.arange(len(of)) - first
    return answer


# ---- the simulation


def simulate(plan: Plan, given: dict[str, jax.Array]) -> Run:
    """One scenario. Pure: jit it, vmap it over leading axes of `given` (see the function of that name), differentiate it in reverse.

    A gradient's memory: the state at each update of the routes, and what the steps of one interval leave. Forward mode is not there.
    """
    network, dt = plan.network, plan.dt
    kind = given["demand"].dtype
    to_rows = _to_rows(plan)
    rows_in = sum(block.nodes * block.ins for block in plan.blocks)
    links = plan.in_row

    def constant(values: np.ndarray) -> jax.Array:
        return jnp.asarray(values, kind)

    def on_rows(of_links: jax.Array, elsewhere: float) -> jax.Array:
        """`[link]` to `[in row]`."""
        return jnp.full(rows_in, elsewhere, kind).at[links].set(of_links)

    length = constant(plan.length)
    free_steps = jnp.maximum(length / (given["free_speed"] * dt), 1.0)
    free_time = free_steps * dt
    lag = on_rows(free_steps, 1.0)
    back = on_rows(jnp.maximum(length / constant(plan.wave_speed * dt), 1.0), 1.0)
    storage = on_rows(constant(plan.jam_density) * length, np.inf)
    capacities = given["capacity"] / 3600  # veh/s
    row_of_link = np.full(sum(block.nodes * block.outs for block in plan.blocks), rows_in)
    row_of_link[plan.out_row] = links  # in row of an out row's link; padding takes nothing
    trips = given["demand"][:, :, plan.destinations] * constant(np.asarray(dt / 3600))  # veh a step
    no_trip = constant(network.zone[:, None] != network.zone[plan.destinations][None])
    ends = constant(plan.exits)
    zones = network.zones
    place = np.full(network.nodes, -1)
    place[network.zone] = np.arange(zones)
    leads = np.flatnonzero(place[network.start] >= 0)
    starts = place[network.start[leads]]
    number = constant(np.maximum(np.bincount(starts, minlength=zones), 1))
    mean_capacity = _means(plan, capacities)

    def at(series: jax.Array, step: jax.Array) -> jax.Array:
        return series[jnp.minimum(step * len(series) // plan.steps, len(series) - 1)]

    def step(carry: tuple, known: tuple, past: jax.Array, bounds: jax.Array, ways: list[jax.Array]) -> tuple[tuple, tuple]:
        """One step: `past` cohorts `[memory, in row, destination]` and their `bounds` [memory, in row], both cumulative counts."""
        recent_up, recent_down, came, gone, cohort = carry  # recent: since the interval began, [time, in row]
        index, flow, demand, driven, holes = known
        limit = on_rows(flow, np.inf)
        # a zone's queue merges like a link as wide as the mean of those that it leads onto
        weight = jnp.maximum(on_rows(flow, 0.0).at[plan.origin_row].set(jax.ops.segment_sum(flow[leads], starts, zones) / number), 1e-6)
        n_up, n_down = recent_up[index], recent_down[index]
        sending = jnp.clip(jnp.minimum(_complete(driven, recent_up, (index + 1).astype(kind) - lag) - n_down, limit), 0.0)
        receiving = jnp.clip(jnp.minimum(_complete(holes, recent_down, (index + 1).astype(kind) - back) + storage - n_up, limit), 0.0)
        supply = jnp.append(receiving, 0.0)[row_of_link]
        cohort = jnp.maximum(cohort, jnp.sum(bounds < (n_down + sending)[None], axis=0, dtype=jnp.int32))
        ahead = came
        for place in range(plan.memory):
            ahead = jnp.where((cohort == place)[:, None], past[place], ahead)
        ahead = jnp.maximum(ahead - gone, 0.0)  # vehicles up to the end of the cohort that leaves, by destination
        count = ahead.sum(axis=1)
        sending = jnp.where(count > _NOBODY, jnp.minimum(sending, count), 0.0)
        outflow, inflow, out_trips, in_trips, ended = _pass_nodes(plan, ahead, sending, supply, weight, ways, ends)
        came = came + to_rows(in_trips, demand)
        gone = gone + out_trips
        recent_up = recent_up.at[index + 1].set(n_up + to_rows(inflow, demand.sum(axis=1)))
        recent_down = recent_down.at[index + 1].set(n_down + outflow)
        return (recent_up, recent_down, came, gone, cohort), (ended, demand.sum())

    @jax.checkpoint
    def interval(carry: tuple, begin: jax.Array) -> tuple[tuple, tuple]:
        """The steps between two updates of the routes. What they read of the time before it is read at once."""
        up, down, came, gone, cohort, past, bounds, earlier = carry
        index = jnp.arange(plan.every, dtype=jnp.int32)
        steps = begin + index
        cost = _time(plan, up, down, earlier, begin, lag) + at(given["toll"], begin)
        cost = jnp.where(at(mean_capacity, begin) > 0, cost, _FAR)  # closed, and not only for a red light
        ways = _routes(plan, cost, given["theta"])
        known = (
            index,
            at(capacities, steps) * dt,
            at(trips, steps) * no_trip[None],
            _before(up, begin, index, lag),
            _before(down, begin, index, back),
        )

        def inner(state: tuple, now: tuple) -> tuple[tuple, tuple]:
            return step(state, now, past, bounds, ways)

        recent = jnp.zeros((plan.every + 1, rows_in), kind)
        first = (recent.at[0].set(up[begin]), recent.at[0].set(down[begin]), came, gone, cohort)
        (recent_up, recent_down, came, gone, cohort), counts = jax.lax.scan(inner, first, known)
        earlier = down[begin]
        up = jax.lax.dynamic_update_slice_in_dim(up, recent_up[1:], begin + 1, 0)
        down = jax.lax.dynamic_update_slice_in_dim(down, recent_down[1:], begin + 1, 0)
        if plan.memory:
            past = jnp.concatenate([past[1:], came[None]])
            bounds = jnp.concatenate([bounds[1:], recent_up[-1:]])
            cohort = jnp.maximum(cohort - 1, 0)
        return (up, down, came, gone, cohort, past, bounds, earlier), counts

    width = len(plan.destinations)
    zeros = jnp.zeros((rows_in, width), kind)
    history = jnp.zeros((plan.steps + 1, rows_in), kind)
    past, bounds = jnp.zeros((plan.memory, rows_in, width), kind), jnp.zeros((plan.memory, rows_in), kind)
    first = (history, history, zeros, zeros, jnp.zeros(rows_in, jnp.int32), past, bounds, history[0])
    (up, down, *_), (ended, started) = jax.lax.scan(interval, first, jnp.arange(0, plan.steps, plan.every, dtype=jnp.int32))
    free = jax.vmap(lambda now: _read(up, now - lag))(jnp.arange(plan.steps + 1, dtype=kind))
    queue = jnp.maximum(free - down, 0.0)
    return Run(
        entered=up[:, links],
        left=down[:, links],
        queue=queue[:, links],
        waiting=queue[:, plan.origin_row],
        started=jnp.append(jnp.zeros(1, kind), jnp.cumsum(started.ravel())),
        ended=jnp.append(jnp.zeros(1, kind), jnp.cumsum(ended.ravel())),
        dt=jnp.asarray(dt, kind),
        free_time=free_time,
        length=length,
        capacity=jnp.maximum(capacities.min(axis=0), 1e-9),
    )


def _means(plan: Plan, capacities: jax.Array) -> jax.Array:
    """Of each interval between updates, `[update, link]`."""
    if len(capacities) == 1:
        return capacities
    which = np.minimum(np.arange(plan.steps) * len(capacities) // plan.steps, len(capacities) - 1).reshape(-1, plan.every)
    return jax.vmap(lambda steps: capacities[steps].mean(axis=0))(which)


def _read(counts: jax.Array, when: jax.Array) -> jax.Array:
    """Cumulative counts `[time, row]` at times, in steps, of each row's own, `[row]`; before the start there are none."""
    base = jnp.floor(when)
    share = when - base
    index = base.astype(jnp.int32)
    row = jnp.arange(counts.shape[1])
    low = counts[jnp.maximum(index, 0), row]
    high = counts[jnp.clip(index + 1, 0, len(counts) - 1), row]
    return low + share * (high - low)


def _before(counts: jax.Array, begin: jax.Array, index: jax.Array, lag: jax.Array) -> jax.Array:
    """What `_read` at the ends of an interval's steps less `lag` needs of the time up to its `begin`: two counts, `[step, 2, row]`."""
    low = begin + jnp.floor((index + 1).astype(lag.dtype)[:, None] - lag[None]).astype(jnp.int32)
    both = jnp.stack([low, low + 1], axis=1)
    return counts[jnp.clip(both, 0, begin), jnp.arange(counts.shape[1])[None, None]]


def _complete(before: jax.Array, recent: jax.Array, when: jax.Array) -> jax.Array:
    """Counts at `when`, in steps since the interval began, from those `before` and the recent ones, `[row]`."""
    base = jnp.floor(when)
    index, row = base.astype(jnp.int32), jnp.arange(len(when))
    low = jnp.where(index > 0, recent[jnp.clip(index, 0, len(recent) - 1), row], before[0])
    high = jnp.where(index >= 0, recent[jnp.clip(index + 1, 0, len(recent) - 1), row], before[1])
    return low + (when - base) * (high - low)


def _to_rows(plan: Plan) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The map from out rows and zones to in rows: what goes onto a link, or starts in a zone, `[in row, ...]`.

    A permutation but for padding, so that its transpose is a gather as well, and not a scatter.
    """
    outs = sum(block.nodes * block.outs for block in plan.blocks)
    ins, zones = sum(block.nodes * block.ins for block in plan.blocks), len(plan.origin_row)
    forth = np.full(ins, outs + zones)  # nothing
    forth[plan.in_row] = plan.out_row
    forth[plan.origin_row] = outs + np.arange(zones)
    back = np.full(outs + zones, ins)
    back[plan.out_row] = plan.in_row
    back[outs:] = plan.origin_row

    def take(rows: jax.Array, index: np.ndarray) -> jax.Array:
        return jnp.concatenate([rows, jnp.zeros_like(rows[:1])]).at[index].get(mode="promise_in_bounds")

    @jax.custom_vjp
    def permute(rows: jax.Array) -> jax.Array:
        return take(rows, forth)

    permute.defvjp(lambda rows: (take(rows, forth), None), lambda _, change: (take(change, back),))
    return lambda of_outs, of_zones: permute(jnp.concatenate([of_outs, of_zones]))


def _pass_nodes(
    plan: Plan, ahead: jax.Array, sending: jax.Array, supply: jax.Array, weight: jax.Array, ways: list[jax.Array], ends: jax.Array
) -> tuple[jax.Array, ...]:
    """What passes the nodes in a step: off in rows and onto out rows, both in all and by destination, and the trips that end."""
    parts: list[tuple] = []
    ended = jnp.zeros((), ahead.dtype)
    for block, way in zip(plan.blocks, ways, strict=True):
        vehicles, wish, here = block.of_ins(ahead), block.of_ins(sending), ends[block.vertices()]
        count = vehicles.sum(axis=2)
        some = count > _NOBODY
        each = jnp.where(some, 1 / jnp.where(some, count, 1.0), 0.0)
        meeting = "niz,nioz->nio" if block.own else "niz,noz->nio"
        way = way if block.own else way[:, 0]
        turning = jnp.einsum(meeting, vehicles, way) * each[..., None]
        passing = _share_supply(wish, turning, block.of_outs(supply), block.of_ins(weight))
        leaving = vehicles * (passing * each)[..., None]
        if block.own:
            entering = jnp.einsum("niz,nioz->noz", leaving, way)
            ended = ended + (leaving * here.reshape(leaving.shape)).sum()
        else:
            together = leaving.sum(axis=1)
            entering = together[:, None] * way
            ended = ended + (together * here).sum()
        onto = (passing[..., None] * turning).sum(axis=1)
        parts.append((passing.ravel(), onto.ravel(), leaving.reshape(-1, ahead.shape[1]), entering.reshape(-1, ahead.shape[1])))
    return *(jnp.concatenate(each) for each in zip(*parts, strict=True)), ended


def _share_supply(wish: jax.Array, turning: jax.Array, room: jax.Array, weight: jax.Array) -> jax.Array:
    """Vehicles that leave each link in, `[node, in]`, of those that wish to, in what room there is on the links out, `[node, out]`.

    All links in rise together, in proportion to their weights, until their wish is met or a link that they turn to is full; then those
    go on that do not turn to it (Tampere et al. 2011, sec. 5.3). Those of whom fewer than `_LONE` turn to the full link are held up
    in part, so that what leaves is continuous in `turning`, `[node, in, out]`; the room is exceeded by at most that share.
    """
    wanted = wish / weight

    rounds = min(_ROUNDS, wish.shape[1])

    def freeze(turn: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        level, rising = state
        taken = (jnp.where(rising, 0.0, weight * level)[..., None] * turning).sum(axis=1)
        pull = (jnp.where(rising, weight, 0.0)[..., None] * turning).sum(axis=1)
        pulled = pull > _NOBODY
        full_at = jnp.where(pulled, jnp.maximum(room - taken, 0.0) / jnp.where(pulled, pull, 1.0), jnp.inf)
        lowest = full_at.min(axis=1, keepdims=True)
        met = rising & (wanted <= lowest)
        shut = jnp.where(((full_at <= lowest) & pulled)[:, None], turning, 0.0).max(axis=2)
        held = rising & (shut > 0)
        stop = jnp.where(met.any(axis=1, keepdims=True), met, held) | (rising & (turn == rounds - 1))
        alone = jnp.where(held, jnp.maximum(1 - shut / _LONE, 0.0), 0.0)
        rest = wanted * alone + jnp.where(jnp.isfinite(lowest), lowest, 0.0)
        return jnp.where(stop & ~met, jnp.minimum(wanted, rest), level), rising & ~stop

    level, _ = jax.lax.fori_loop(0, rounds, freeze, (wanted, wish > 0))
    return weight * level


# ---- routes


def _time(plan: Plan, up: jax.Array, down: jax.Array, earlier: jax.Array, now: jax.Array, lag: jax.Array) -> jax.Array:
    """What a link takes as it looks now, s, `[link]`: driven freely, and its queue served as fast as it was of late.

    Of late means since the routes were last updated, or in the last step, whichever was faster.
    """
    queue = jnp.maximum(_read(up, now.astype(lag.dtype) - lag) - down[now], 0.0)[plan.in_row]
    served = jnp.maximum((down[now] - earlier) / plan.every, down[now] - down[jnp.maximum(now - 1, 0)])[plan.in_row]
    slowest = jnp.asarray(_SLOWEST * plan.network.capacity * plan.dt / 3600, up.dtype)
    return (lag[plan.in_row] + queue / jnp.maximum(served, slowest)) * plan.dt


def _routes(plan: Plan, cost: jax.Array, theta: jax.Array) -> list[jax.Array]:
    """Shares of the ways onward by destination, of each block `[node, vertex, out, destination]`, under costs `[link]`, s.

    With e what a way costs more than the best one, and c its first link: (exp(-e / theta) - cut)+ (1 - e / c)+. The last factor is 0
    where the link does not lead nearer to the destination (Dial 1971's efficient links, without the jump), so nobody drives in circles.
    """
    rows = jnp.full(sum(block.nodes * block.outs for block in plan.blocks), _FAR, cost.dtype).at[plan.out_row].set(cost)
    ends = jnp.asarray(plan.exits)
    far = _distances(plan)(rows)
    shares = []
    for block in plan.blocks:
        first = _first_cost(block, rows)[..., None]
        whole = first + far[block.head]
        excess = whole - whole.min(axis=2, keepdims=True)
        weight = jnp.maximum(jnp.exp(-excess / theta) - _CUT, 0.0) * jnp.maximum(1 - excess / first, 0.0)
        here = ends[block.vertices()].reshape(block.nodes, block.choices, 1, -1)
        shares.append(jnp.where(here, 0.0, weight / weight.sum(axis=2, keepdims=True)))
    return shares


def _first_cost(block: _Block, rows: jax.Array) -> jax.Array:
    """Of the link that a way begins with, `[node, vertex, out]`."""
    return jnp.where(block.open, block.of_outs(rows)[:, None], _FAR)


def _distances(plan: Plan) -> Callable[[jax.Array], jax.Array]:
    """The map from costs `[out row]` to those of the cheapest way from a vertex to a destination, `[vertex, destination]`.

    Bellman (1958) and Ford, all destinations at once. The derivative is that of the ways found: what a change of distances is worth
    flows down each tree to its root, two, four, eight ... links at a time.
    """
    ends = plan.exits  # numpy: what a derivative's rule closes over must not be traced
    vertices, width = plan.exits.shape

    def onward(block: _Block, rows: jax.Array, far: jax.Array) -> list[jax.Array]:
        first = _first_cost(block, rows)
        return [first[:, :, out, None] + far.at[block.head[:, :, out]].get(mode="promise_in_bounds") for out in range(block.outs)]

    def least(ways: list[jax.Array]) -> jax.Array:
        best = ways[0]
        for way in ways[1:]:
            best = jnp.minimum(best, way)
        return best

    def relax(rows: jax.Array, far: jax.Array) -> jax.Array:
        best = jnp.concatenate([least(onward(block, rows, far)).reshape(-1, width) for block in plan.blocks])
        return jnp.where(ends, 0.0, jnp.minimum(best, far))

    def search(rows: jax.Array) -> jax.Array:
        start = jnp.where(ends, 0.0, jnp.full(ends.shape, _FAR, rows.dtype))

        def more(state: tuple) -> jax.Array:
            return state[1] & (state[2] < vertices)

        def sweep(state: tuple) -> tuple:
            new = relax(rows, state[0])
            return new, (new < state[0]).any(), state[2] + 1

        return jax.lax.while_loop(more, sweep, (start, jnp.asarray(True), jnp.asarray(0, jnp.int32)))[0]

    @jax.custom_vjp
    def distances(rows: jax.Array) -> jax.Array:
        return search(rows)

    def forward(rows: jax.Array) -> tuple[jax.Array, tuple]:
        far = search(rows)
        return far, (rows, far)

    def backward(kept: tuple, worth: jax.Array) -> tuple[jax.Array]:
        rows, far = kept
        taken, heads = [], []
        for block in plan.blocks:
            ways = onward(block, rows, far)
            best = least(ways)
            which, head = jnp.zeros(best.shape, jnp.int32), jnp.broadcast_to(jnp.asarray(block.head[:, :, 0, None], jnp.int32), best.shape)
            for out in range(1, block.outs):
                better = (ways[out] == best) & (ways[0] != best) & (which == 0)
                which = jnp.where(better, out, which)
                head = jnp.where(better, jnp.asarray(block.head[:, :, out, None], jnp.int32), head)
            taken.append(which)
            heads.append(head.reshape(-1, width))
        column = jnp.arange(width, dtype=jnp.int32)[None]
        place = jnp.arange(vertices, dtype=jnp.int32)[:, None] * width + column
        jump = jnp.where(ends, place, jnp.concatenate(heads) * width + column).ravel()
        inner = ~ends & (far < _FAR)
        worth = jnp.where(inner, worth, 0.0).ravel()
        inner, root = inner.ravel(), jnp.asarray(ends.ravel())

        def gather(state: tuple) -> tuple:
            worth, jump, turn = state
            moved = jnp.zeros_like(worth).at[jump].add(worth)
            return worth + jnp.where(inner, moved, 0.0), jump[jump], turn + 1

        def going(state: tuple) -> jax.Array:
            return ~(root[state[1]] | ~inner).all() & (state[2] < math.ceil(math.log2(vertices + 1)) + 1)

        worth = jax.lax.while_loop(going, gather, (worth, jump, jnp.asarray(0, jnp.int32)))[0].reshape(vertices, width)
        slopes = []
        for block, which in zip(plan.blocks, taken, strict=True):
            of_block = worth[block.vertices()].reshape(which.shape)
            by_out = [jnp.where(which == out, of_block, 0.0).sum(axis=2) for out in range(block.outs)]
            slopes.append(jnp.where(block.open, jnp.stack(by_out, axis=2), 0.0).sum(axis=1).ravel())
        return (jnp.concatenate(slopes),)

    distances.defvjp(forward, backward)
    return distances
