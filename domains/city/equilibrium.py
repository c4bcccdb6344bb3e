"""Where drivers settle on a road network when each takes the way that costs least: static user equilibrium, one scenario or many at once.

The equilibrium minimises Beckmann's objective, the sum over links of the integral of travel time up to the flow, plus tolls paid
(Beckmann, McGuire & Winsten 1956, ch. 3). It is found on a set of paths that grows: shortest-path trees under the times so far give
every pair of zones its cheapest way; where that beats the ways in use it joins them; then trips move between the ways of all pairs at
once, by projected Newton steps whose linear systems are solved by conjugate gradients (Bertsekas & Gafni 1983, "Projected Newton
methods and optimization of multicommodity flows"). Many scenarios start from their mean, offer each other the paths they find, and
move their trips in one problem of many blocks, so that 64 of them cost far less than 64 runs. All of this is float64 on the host.

`stochastic` is the smooth mode, in JAX: drivers perceive costs with an error and choose among given paths by a logit; its flows
are differentiable with respect to times, capacities, tolls and demand by the implicit function theorem.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from domains.city.network import Demand, Network, turns
from twinsim.base import BadInput

ITERATIONS = 200  # of path search and Newton steps; convergence takes 5 to 20
_ROUGH = 1e-4  # gap of the mean scenario, from which all start
_EVERY = 4  # of many scenarios each fourth is searched first: what it finds serves the others
_OFFERS = 2  # times that scenarios are offered each other's paths between two searches
_MARGIN = 0.1  # times the gap asked for: a path joins that is cheaper by more than this; all that do not add up to less of a gap
_STEPS, _WELL = 6, 0.02  # Newton steps between two searches, at most; times the gap over the known paths, at which they end
_ROUNDS = 3  # in a step: times that paths which empty are held at zero
_CONJUGATE = 4, 4, 4, 8, 20  # CG iterations of each round, by step: rough ones far from the solution, exact ones near it
_CG_TOLERANCE = 0.1
_TRIES, _FLAT = 8, 0.1  # of a line search; how flat the objective has to become, times its slope at the start
_SHIFT = 1e-6, 1e4  # times the Hessian's diagonal, added to it: least (paths that are sums of others make it singular) and most


@dataclass(frozen=True)
class Paths:
    """Ways that trips may take, `[path]` of them.

    Attributes:
      links: 1 where a path uses a link, scipy CSR `[path, link]`.
      user: class of the travellers, origin, destination: index of class and zones, `[path]`.
      flow: veh/h, `[path]`.
    """

    links: sparse.csr_matrix
    user: np.ndarray
    origin: np.ndarray
    destination: np.ndarray
    flow: np.ndarray


@dataclass(frozen=True)
class Equilibrium:
    """Flows at which nobody gains by another way, as nearly as `gap` says.

    Attributes:
      flow: veh/h, `[link]`. time: travel time, s, `[link]`.
      user_flow: flow by class of travellers, veh/h, `[user, link]`.
      cost: of the cheapest way between zones, time plus toll, s, `[user, zone, zone]`; inf where there is none.
      gap: relative gap, (total cost - total cost were all on their cheapest way) / total cost, under the times that `flow` makes.
      converged: whether `gap` is what was asked for.
      objective: Beckmann's, veh/h s. iterations: path searches made.
      paths: the ways in use.
    """

    flow: np.ndarray
    time: np.ndarray
    user_flow: np.ndarray
    cost: np.ndarray
    gap: float
    converged: bool
    objective: float
    iterations: int
    paths: Paths

    @property
    def total_time(self) -> float:
        """Vehicle-seconds that an hour's trips travel."""
        return float(self.flow @ self.time)


def equilibrium(
    network: Network,
    trips: Demand | np.ndarray,
    gap: float = 1e-6,
    *,
    toll: np.ndarray | None = None,
    closed: np.ndarray | None = None,
    iterations: int = ITERATIONS,
) -> Equilibrium:
    """The user equilibrium of one scenario.

    Trips are veh/h `[zone, zone]`, or `[user, zone, zone]` with classes of users who weigh tolls differently; trips within a zone use
    no link and are left out. `toll` is in seconds of travel time (money over the value of time), `[link]` or `[user, link]`, in place of
    the network's own. `closed` links, `[link]` bool, are not used. A gap that is missed after `iterations` is warned of and stands in
    the result. Raises BadInput on numbers that make no sense and, naming nodes, where trips have no way.
    """
    matrix = _matrix(trips)
    tolls = None if toll is None else np.asarray(toll, float)[None]
    shut = None if closed is None else np.asarray(closed, bool)[None]
    return equilibria([network], matrix[None], gap, toll=tolls, closed=shut, iterations=iterations)[0]


def equilibria(
    networks: Network | Sequence[Network],
    trips: Demand | np.ndarray | Sequence[Demand],
    gap: float = 1e-6,
    *,
    toll: np.ndarray | None = None,
    closed: np.ndarray | None = None,
    iterations: int = ITERATIONS,
) -> list[Equilibrium]:
    """The user equilibria of many scenarios in one call, each as `equilibrium` would give it to within its gap.

    Scenarios may differ in all but their graph: give one network, or one a scenario with the same nodes, links, zones and bans (its
    speeds, capacities and tolls may differ); trips `[zone, zone]` for all, `[scenario, zone, zone]` or `[scenario, user, zone, zone]`;
    `toll` `[scenario, link]` or `[scenario, user, link]`; `closed` `[scenario, link]`. The mean scenario is solved first, roughly,
    and all start from it.
    """
    case = _case(networks, trips, toll, closed)
    pool = _Pool.empty(case) if case.scenarios == 1 else _like_the_mean(case)
    return _solve(case, pool, gap, iterations)


# ---- the problem


@dataclass(frozen=True)
class _Graph:
    """What shortest paths run on: vertices and edges in compressed rows; an edge carries a link, or none (-1).

    Vertices are nodes and, where centroids may not be driven through, a second copy of each centroid that its trips start from; or, where
    turns are banned, links, so that a ban is an edge that is not there.
    """

    first: np.ndarray  # of a vertex's edges, [vertex + 1]
    head: np.ndarray  # vertex that an edge leads to, [edge]
    candidates: np.ndarray  # links from one vertex to the same other one stand together, [candidate]
    run: np.ndarray  # where each edge's candidates begin, [edge]
    source: np.ndarray  # [zone]
    sink: np.ndarray  # [zone]

    @property
    def vertices(self) -> int:
        return len(self.first) - 1

    def weigh(self, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each edge's cost and link, the cheapest of parallel ones, `[edge]`; from costs `[link]`."""
        weight = np.append(cost, 0.0)[self.candidates]  # -1 means the 0 at the end
        if len(self.run) == len(self.candidates):
            return weight, self.candidates
        edge = np.repeat(np.arange(len(self.run)), np.diff(np.append(self.run, len(weight))))
        best = np.lexsort((weight, edge))[self.run]
        return weight[best], self.candidates[best]


def _graph(network: Network) -> _Graph:
    links, zones, nodes = network.links, network.zones, network.nodes
    place = np.full(nodes, -1)
    place[network.zone] = np.arange(zones)
    link = np.arange(links)
    if network.turn_bans is not None and len(network.turn_bans):
        pairs = turns(network)
        out, into = np.flatnonzero(place[network.start] >= 0), np.flatnonzero(place[network.end] >= 0)
        tail = np.concatenate([pairs[:, 0], links + place[network.start[out]], into])
        head = np.concatenate([pairs[:, 1], out, links + zones + place[network.end[into]]])
        carried = np.concatenate([pairs[:, 1], out, np.full(len(into), -1)])
        source, sink, vertices = links + np.arange(zones), links + zones + np.arange(zones), links + 2 * zones
    else:
        tail, head, carried, source, sink, vertices = network.start, network.end, link, network.zone, network.zone, nodes
        if not network.through_zones:
            tail = np.where(place[tail] >= 0, nodes + place[tail], tail)
            source, vertices = nodes + np.arange(zones), nodes + zones
    key = tail * vertices + head
    order = np.argsort(key, kind="stable")
    keys, run = np.unique(key[order], return_index=True)
    first = np.searchsorted(keys, np.arange(vertices + 1) * vertices)
    return _Graph(first, keys % vertices, carried[order], run, source, sink)


@dataclass(frozen=True)
class _Roads:
    """How long links take, arrays `[link, scenario]`, or `[link]` with those of all scenarios one after the other."""

    free_time: np.ndarray  # s
    capacity: np.ndarray  # veh/h
    alpha: np.ndarray
    beta: np.ndarray

    def only(self, link: np.ndarray, scenario: np.ndarray) -> "_Roads":
        """Some links of some scenarios, one after the other, `[n]`."""
        return _Roads(*(part[link, scenario] for part in (self.free_time, self.capacity, self.alpha, self.beta)))

    def mean(self) -> "_Roads":
        """Those of the mean scenario, `[link, 1]`."""
        return _Roads(*(part.mean(1, keepdims=True) for part in (self.free_time, self.capacity, self.alpha, self.beta)))

    def time(self, flow: np.ndarray) -> np.ndarray:
        """BPR travel time, s."""
        return self.free_time * (1 + self.alpha * _power(flow / self.capacity, self.beta))

    def slope(self, flow: np.ndarray) -> np.ndarray:
        """Derivative of the travel time by flow; 0 for constant times."""
        with np.errstate(divide="ignore", invalid="ignore"):
            steep = self.free_time * self.alpha * self.beta / self.capacity * _power(flow / self.capacity, self.beta - 1)
        return np.where(np.isfinite(steep), steep, 0.0)  # infinite at no flow where 0 < beta < 1: any step will do

    def integral(self, flow: np.ndarray) -> np.ndarray:
        """Integral of the travel time from 0 to the flow, Beckmann's term."""
        return self.free_time * flow * (1 + self.alpha / (self.beta + 1) * _power(flow / self.capacity, self.beta))


@dataclass(frozen=True)
class _Case:
    """All scenarios side by side, and the pairs of zones, by class of users, that have trips in any of them."""

    network: Network
    graph: _Graph
    roads: _Roads  # [link, scenario]
    toll: np.ndarray  # s, inf where closed, [scenario, user, link]
    user: np.ndarray  # [pair]
    origin: np.ndarray
    destination: np.ndarray
    trips: np.ndarray  # veh/h, [pair, scenario]

    @property
    def scenarios(self) -> int:
        return self.trips.shape[1]

    @property
    def users(self) -> int:
        return self.toll.shape[1]


def _power(base: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """`base ** exponent`, several times as fast for the usual BPR exponents."""
    top = float(exponent.flat[0]) if exponent.size else 0.0
    if top in (3.0, 4.0) and (exponent == top).all():
        square = base * base
        return square * (base if top == 3.0 else square)
    return base**exponent


def _case(networks: Any, trips: Any, toll: np.ndarray | None, closed: np.ndarray | None) -> _Case:
    """Checks what is given and lays the scenarios out."""
    given = [networks] if isinstance(networks, Network) else list(networks)
    matrices = [_matrix(one) for one in trips] if isinstance(trips, Sequence) else list(_scenarios_of(_matrix(trips)))
    count = max([len(given), len(matrices)] + [len(one) for one in (toll, closed) if one is not None])
    for name, parts in (("networks", given), ("trips", matrices), ("toll", toll), ("closed", closed)):
        if parts is not None and len(parts) not in (1, count):
            raise BadInput(f"equilibria: expected {name} for 1 or {count} scenarios, got {len(parts)}")
    first = given[0]
    for index, one in enumerate(given):
        same = one is first or all(np.array_equal(getattr(one, name), getattr(first, name)) for name in ("start", "end", "zone"))
        if not same or one.through_zones != first.through_zones or not _same_bans(one, first):
            raise BadInput(
                f"equilibria: expected the same links, zones and turn bans in all networks, network {index} differs from the first"
            )
        _check_numbers(one)
    trip = np.stack([one if one.ndim == 3 else one[None] for one in matrices])  # [scenario, user, zone, zone]
    users, zones, links = trip.shape[1], first.zones, first.links
    if trip.shape[2:] != (zones, zones):
        raise BadInput(f"trips: expected [{zones}, {zones}], one row and one column a zone, got {list(trip.shape[2:])}")
    wrong = np.argwhere(~(np.isfinite(trip) & (trip >= 0)))
    if len(wrong):
        a, b = first.node_id[first.zone[wrong[0][2:]]]
        raise BadInput(f"trips from zone {a} to zone {b}: expected 0 or more, got {trip[tuple(wrong[0])]}")
    trip = np.broadcast_to(trip, (count, users, zones, zones)) * ~np.eye(zones, dtype=bool)
    price = np.stack([np.zeros(links) if one.toll is None else one.toll for one in given]) if toll is None else np.asarray(toll, float)
    price = price if price.ndim == 3 else price[:, None]
    if price.shape[1] not in (1, users) or price.shape[2] != links:
        raise BadInput(f"toll: expected one value a link, [{links}] or [{users}, {links}], got {list(price.shape[1:])}")
    if not (np.isfinite(price) & (price >= 0)).all():
        raise BadInput(f"toll: expected finite seconds of 0 or more, got {price[~(np.isfinite(price) & (price >= 0))][0]}")
    price = np.broadcast_to(price, (count, users, links)).copy()
    if closed is not None:
        price[np.broadcast_to(np.asarray(closed, bool)[:, None], price.shape)] = np.inf
    roads = _Roads(*(
        np.broadcast_to(np.stack([getattr(one, name) for one in given], 1), (links, count)).copy()
        for name in ("free_time", "capacity", "alpha", "beta")
    ))  # fmt: skip
    user, origin, destination = np.nonzero((trip > 0).any(0))
    return _Case(first, _graph(first), roads, price, user, origin, destination, trip[:, user, origin, destination].T.copy())


def _matrix(trips: Demand | np.ndarray) -> np.ndarray:
    return np.asarray(trips.trips if isinstance(trips, Demand) else trips, float)


def _scenarios_of(trips: np.ndarray) -> np.ndarray:
    if trips.ndim not in (2, 3, 4):
        raise BadInput(f"trips: expected axes [scenario, user, zone, zone], the first two may be left out, got {trips.ndim} axes")
    return trips[None] if trips.ndim == 2 else trips


def _same_bans(one: Network, other: Network) -> bool:
    none = np.zeros((0, 2), np.int64)
    return np.array_equal(none if one.turn_bans is None else one.turn_bans, none if other.turn_bans is None else other.turn_bans)


def _check_numbers(network: Network) -> None:
    for name, value, low in (("capacity", network.capacity, np.nextafter(0, 1)), ("free travel time", network.free_time, 0.0),
                             ("alpha", network.alpha, 0.0), ("beta", network.beta, 0.0)):  # fmt: skip
        wrong = np.flatnonzero(~(np.isfinite(value) & (value >= low)))
        if len(wrong):
            least = "more than 0" if low else "0 or more"
            raise BadInput(f"link {network.link_id[wrong[0]]}: expected a finite {name} of {least}, got {value[wrong[0]]}")


# ---- the set of paths


@dataclass(frozen=True)
class _Found:
    """Ways found by a search, each for one scenario."""

    links: sparse.csr_matrix  # [path, link]
    pair: np.ndarray  # [path]
    scenario: np.ndarray  # [path]


@dataclass(frozen=True)
class _Pool:
    """The paths in play, those of a pair next to each other; what one scenario has found is there for all."""

    links: sparse.csr_matrix  # [path, link]
    pair: np.ndarray  # [path]
    mark: np.ndarray  # a number that no other path has, [path]
    toll: np.ndarray  # s, inf over a closed link, [path, scenario]
    flow: np.ndarray  # veh/h, [path, scenario]
    open: np.ndarray  # whether a scenario may put trips on a path, [path, scenario]

    @classmethod
    def empty(cls, case: _Case) -> "_Pool":
        none, nothing = np.zeros(0, int), np.zeros((0, case.scenarios))
        return cls(sparse.csr_matrix((0, case.network.links)), none, none, nothing, nothing, nothing > 0)

    def join(self, case: _Case, found: _Found, known: np.ndarray) -> "_Pool":
        """With the paths found, without those that no scenario uses; pairs whose `known` cost was inf have all trips on their new one."""
        mark = _marks(case, found)
        old = len(self.mark)
        _, index, same = np.unique(np.concatenate([self.mark, mark]), return_index=True, return_inverse=True)
        place = index[same.reshape(-1)[old:]]  # of each path found, among the known and the found
        kept = np.zeros(old + len(mark), bool)
        kept[:old] = (self.flow > 0).any(1)
        kept[place] = True
        fresh = np.flatnonzero(kept[old:])
        pair = np.concatenate([self.pair, found.pair])
        order = np.flatnonzero(kept)[np.argsort(pair[kept], kind="stable")]
        number = np.empty(len(kept), int)
        number[order] = np.arange(len(order))
        rows = number[place]
        extended = np.where(order < old, order, old + np.searchsorted(fresh, order - old))
        links = sparse.vstack([self.links, found.links[fresh]], format="csr")[extended]
        toll = np.concatenate([self.toll, _tolls(case, found.links[fresh], found.pair[fresh])])[extended]
        flow = np.concatenate([self.flow, np.zeros((len(fresh), case.scenarios))])[extended]
        pool = _Pool(links, pair[order], np.concatenate([self.mark, mark])[order], toll, flow, flow > 0)
        return pool.opened(case, rows, found.scenario, known)

    def opened(self, case: _Case, path: np.ndarray, scenario: np.ndarray, known: np.ndarray) -> "_Pool":
        """With paths open to scenarios, both `[n]`; a pair whose `known` cost is inf, `[pair, scenario]`, has all its trips on it."""
        flow, open_ = self.flow.copy(), self.open.copy()
        none = np.isinf(known[self.pair[path], scenario])
        flow[path[none], scenario[none]] = case.trips[self.pair[path[none]], scenario[none]]
        open_[path, scenario] = True
        return replace(self, flow=flow, open=open_)

    def link_flow(self) -> np.ndarray:
        """Flow, veh/h, `[link, scenario]`."""
        return self.links.T @ self.flow

    def cost(self, time: np.ndarray) -> np.ndarray:
        """Cost of paths at travel times `[link, scenario]`, s, `[path, scenario]`."""
        return self.links @ time + self.toll

    def cheapest(self, case: _Case, cost: np.ndarray) -> np.ndarray:
        """The least of the costs `[path, scenario]` in each pair, `[pair, scenario]`; inf for a pair without a path."""
        least = np.full(case.trips.shape, np.inf)
        first = np.flatnonzero(np.diff(self.pair, prepend=-1))
        count, least[self.pair[first]] = np.diff(np.append(first, len(self.pair))), cost[first]
        for rank in range(1, count.max(initial=1)):  # faster than reduceat over rows
            rows = first[count > rank] + rank
            least[self.pair[rows]] = np.minimum(least[self.pair[rows]], cost[rows])
        return least


def _marks(case: _Case, found: _Found) -> np.ndarray:
    """A number for each path that, but for a chance of 2^-64, only the same links for the same pair have."""
    number = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, case.network.links + len(case.trips))
    return np.add.reduceat(number[found.links.indices], found.links.indptr[:-1]) + number[case.network.links + found.pair]


def _tolls(case: _Case, links: sparse.csr_matrix, pair: np.ndarray) -> np.ndarray:
    """What the class of a path's users pays on it, s, `[path, scenario]`."""
    paid = np.zeros((len(pair), case.scenarios))
    for user in range(case.users):
        rows = np.flatnonzero(case.user[pair] == user)
        paid[rows] = links[rows] @ case.toll[:, user].T
    return paid


def _search(case: _Case, time: np.ndarray, known: np.ndarray, busy: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray, _Found]:
    """Costs of the cheapest ways and the paths that beat `known` costs `[pair, scenario]` by more than the fraction `margin`.

    Only `busy` scenarios are searched, `[scenario]`. Returns costs `[pair, scenario]`, costs between all zones `[scenario, user, zone,
    zone]`, paths.
    """
    zones, graph = case.network.zones, case.graph
    best = known.copy()
    matrix = np.full((case.scenarios, case.users, zones, zones), np.inf)
    edge = np.repeat(np.arange(graph.vertices), np.diff(graph.first)) * graph.vertices + graph.head
    weighted = sparse.csr_matrix((np.ones(len(edge)), graph.head, graph.first), shape=(graph.vertices,) * 2)
    bounds = np.searchsorted(case.user, np.arange(case.users + 1))
    rows, columns, pairs, scenarios = [], [], [], []
    found = 0
    for scenario, user in np.ndindex(case.scenarios, case.users):
        if not busy[scenario]:
            continue
        weighted.data, carried = graph.weigh(time[:, scenario] + case.toll[scenario, user])
        distance, before = dijkstra(weighted, indices=graph.source, return_predecessors=True)
        matrix[scenario, user] = distance[:, graph.sink]
        here = np.arange(*bounds[user : user + 2])
        here = here[case.trips[here, scenario] > 0]
        best[here, scenario] = cost = matrix[scenario, user][case.origin[here], case.destination[here]]
        _refuse_lost(case, here[~np.isfinite(cost)], scenario)
        better = here[known[here, scenario] - cost > margin * cost]
        if not len(better):
            continue
        row, link = _trace(graph, edge, before, carried, case.origin[better], case.destination[better])
        rows.append(row + found)
        found += len(better)
        columns.append(link)
        pairs.append(better)
        scenarios.append(np.full(len(better), scenario))
    if not pairs:
        none = np.zeros(0, int)
        return best, matrix, _Found(sparse.csr_matrix((0, case.network.links)), none, none)
    row, column = np.concatenate(rows), np.concatenate(columns)
    table = sparse.csr_matrix((np.ones(len(row)), (row, column)), shape=(found, case.network.links))
    return best, matrix, _Found(table, np.concatenate(pairs), np.concatenate(scenarios))


def _trace(
    graph: _Graph, edge: np.ndarray, before: np.ndarray, carried: np.ndarray, origin: np.ndarray, destination: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Links on the tree paths of many pairs, followed back together: (index into the pairs, link), both `[n]`.

    `edge` is each edge's tail times the vertices, and its head, `[edge]`.
    """
    alive, vertex = np.arange(len(origin)), graph.sink[destination]
    rows, links = [], []
    while len(alive):
        ahead = before[origin[alive], vertex].astype(np.int64)
        rows.append(alive)
        links.append(carried[np.searchsorted(edge, ahead * graph.vertices + vertex)])
        further = ahead != graph.source[origin[alive]]
        alive, vertex = alive[further], ahead[further]
    row, link = np.concatenate(rows), np.concatenate(links)
    return row[link >= 0], link[link >= 0]


def _refuse_lost(case: _Case, lost: np.ndarray, scenario: int) -> None:
    if len(lost):
        names = case.network.node_id[case.network.zone]
        some = ", ".join(f"{names[case.origin[pair]]} to {names[case.destination[pair]]}" for pair in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        where = f" in scenario {scenario}" if case.scenarios > 1 else ""
        raise BadInput(f"trips from zone {some}{more}{where}: expected a way by open links, there is none")


def _like_the_mean(case: _Case) -> _Pool:
    """Paths of the mean scenario for every scenario, its trips shared out among them alike, ways over closed links left out."""
    # a link may be closed in some scenarios only, so the mean one has it open
    opened = np.where(np.isfinite(case.toll), case.toll, 0.0)
    toll = np.where(np.isinf(case.toll).all(0), np.inf, opened.mean(0))[None]
    mean = replace(case, roads=case.roads.mean(), toll=toll, trips=case.trips.mean(1, keepdims=True))
    found = _iterate(mean, _Pool.empty(mean), _ROUGH, ITERATIONS)[0]
    toll = _tolls(case, found.links, found.pair)
    share = np.where(np.isfinite(toll), found.flow, 0.0)
    first = np.searchsorted(found.pair, np.arange(len(case.trips)))
    total = np.add.reduceat(share, first, axis=0)
    flow = share * (case.trips / np.maximum(total, 1e-300))[found.pair]
    return replace(found, toll=toll, flow=flow, open=flow > 0)


# ---- the solution


def _solve(case: _Case, pool: _Pool, gap: float, iterations: int) -> list[Equilibrium]:
    pool, gaps, matrix, searches = _iterate(case, pool, gap, iterations)
    flow = pool.link_flow()
    time = case.roads.time(flow)
    paid = np.where(pool.flow > 0, pool.toll, 0.0) * pool.flow
    objective = case.roads.integral(flow).sum(0) + paid.sum(0)
    missed = np.flatnonzero(gaps > gap)
    if len(missed):
        worst = missed[np.argmax(gaps[missed])]
        count = f"{len(missed)} of {case.scenarios} scenarios miss"
        warnings.warn(f"equilibrium: {count} the gap {gap:g}, scenario {worst} is at {gaps[worst]:.3g}", stacklevel=4)
    answers = []
    for scenario in range(case.scenarios):
        used = np.flatnonzero(pool.open[:, scenario])
        pair = pool.pair[used]
        paths = Paths(pool.links[used], case.user[pair], case.origin[pair], case.destination[pair], pool.flow[used, scenario])
        by_user = np.stack([paths.links.T @ np.where(paths.user == user, paths.flow, 0.0) for user in range(case.users)])
        answers.append(
            Equilibrium(
                flow=flow[:, scenario].copy(),
                time=time[:, scenario].copy(),
                user_flow=by_user,
                cost=matrix[scenario],
                gap=float(gaps[scenario]),
                converged=bool(gaps[scenario] <= gap),
                objective=float(objective[scenario]),
                iterations=int(searches[scenario]),
                paths=paths,
            )  # fmt: skip
        )
    return answers


def _iterate(case: _Case, pool: _Pool, gap: float, iterations: int) -> tuple[_Pool, np.ndarray, np.ndarray, np.ndarray]:
    """Searches paths and moves trips until every scenario's gap is reached; returns paths, gaps, costs between zones, searches made.

    One scenario's paths are often what another one lacks, so that a few are searched first, and what they find is offered to all.
    """
    gaps, searches = np.full(case.scenarios, np.inf), np.zeros(case.scenarios, int)
    costs = np.full((case.scenarios, case.users, case.network.zones, case.network.zones), np.inf)
    caution, margin = np.full(case.scenarios, _SHIFT[0]), _MARGIN * gap
    pool = _settle(case, pool, gap, caution)
    some = np.arange(case.scenarios) % _EVERY == 0
    for done in range(iterations + 1):
        flow = pool.link_flow()
        time = case.roads.time(flow)
        cost = np.where(pool.open, pool.cost(time), np.inf)
        known = pool.cheapest(case, cost)
        busy = (gaps > gap) & (some if done == 0 else True)
        best, matrix, found = _search(case, time, known, busy, margin)
        searches[busy] += 1
        costs[busy] = matrix[busy]
        whole = busy & (np.isfinite(known) | (case.trips == 0)).all(0)
        gaps[whole] = _excess(case, pool, flow * time, cost, best)[0][whole]
        if not (gaps > gap).any() or done == iterations:
            break
        pool = _settle(case, pool.join(case, found, known), gap, caution)
    return pool, gaps, costs, searches


def _excess(case: _Case, pool: _Pool, spent: np.ndarray, cost: np.ndarray, best: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relative gap to the `best` costs `[pair, scenario]`, and all that trips cost; both `[scenario]`."""
    total = spent.sum(0) + (pool.flow * np.where(pool.flow > 0, pool.toll, 0.0)).sum(0)
    least = (case.trips * np.where(case.trips > 0, best, 0.0)).sum(0)
    return np.divide(total - least, total, out=np.zeros_like(total), where=total > 0), total


def _settle(case: _Case, pool: _Pool, gap: float, caution: np.ndarray) -> _Pool:
    """Moves trips until the gap over all known paths is well within `gap`, or for some rounds; opens paths to scenarios that lack them."""
    for _ in range(1 if case.scenarios == 1 else _OFFERS):
        flow = pool.link_flow()
        time = case.roads.time(flow)
        cost = pool.cost(time)
        best = pool.cheapest(case, cost)
        if case.scenarios > 1:
            pool = _offer(case, pool, cost, best, _MARGIN * gap)
        inner, total = _excess(case, pool, flow * time, cost, best)
        whole = (np.isfinite(best) | (case.trips == 0)).all(0) & np.isfinite(inner)
        moving = whole & (inner > 0.5 * gap)
        if not moving.any():
            break
        pool = _equilibrate(case, pool, total, np.where(moving, np.maximum(_WELL * inner, 0.1 * gap), np.inf), caution)
    return pool


def _offer(case: _Case, pool: _Pool, cost: np.ndarray, best: np.ndarray, margin: float) -> _Pool:
    """Opens to each scenario the known paths that are its pairs' cheapest, and closes those it does not use."""
    pool = replace(pool, open=pool.flow > 0)
    known = pool.cheapest(case, np.where(pool.open, cost, np.inf))
    wanted = (case.trips > 0) & np.isfinite(best) & (known > best * (1 + margin))
    path, scenario = np.nonzero(wanted[pool.pair] & (cost == best[pool.pair]))
    _, one = np.unique(pool.pair[path] * case.scenarios + scenario, return_index=True)
    return pool.opened(case, path[one], scenario[one], known)


@dataclass(frozen=True)
class _Choices:
    """The pairs that have a choice, scenario after scenario, and of the links those that not all paths of a pair use."""

    scenarios: int
    roads: _Roads  # [link]
    place: np.ndarray  # scenario of a link, [link]
    forth: sparse.csr_matrix  # links that a path has more (1) and less (-1) than the first of its pair, [path, link]
    back: sparse.csr_matrix  # its transpose
    pair: np.ndarray  # [path]
    first: np.ndarray  # path of a pair, [pair]
    toll: np.ndarray  # more than the first of its pair, s, [path]
    scenario: np.ndarray  # [path]
    trips: np.ndarray  # veh/h, [pair]

    def sum(self, of_paths: np.ndarray) -> np.ndarray:
        """By scenario, `[scenario]`."""
        return _sum(self.scenarios, self.scenario, of_paths)


def _sum(scenarios: int, scenario: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.array([values.sum()]) if scenarios == 1 else np.bincount(scenario, values, scenarios)


def _choices(case: _Case, pool: _Pool, scenarios: np.ndarray) -> tuple[_Choices, tuple, tuple]:
    """The choices of some scenarios, `[scenario]` bool; where their paths, and their links, stand: indices (path or link, scenario)."""
    before = np.concatenate([np.zeros((1, case.scenarios), np.int32), np.cumsum(pool.open, axis=0, dtype=np.int32)])
    several = np.diff(before[np.searchsorted(pool.pair, np.arange(len(case.trips) + 1))], axis=0) > 1
    rows = np.flatnonzero(np.any(several, axis=1)[pool.pair])
    scenario, row = np.nonzero((pool.open[rows] & (several & scenarios)[pool.pair[rows]]).T)
    path = rows[row]
    label = scenario * len(case.trips) + pool.pair[path]
    begins = np.diff(label, prepend=-1) != 0
    first, pair = np.flatnonzero(begins), np.cumsum(begins) - 1
    links = pool.links[path] - pool.links[path[first[pair]]]
    column = links.indices + np.repeat(scenario, np.diff(links.indptr)) * np.int64(case.network.links)
    used = np.zeros(case.scenarios * case.network.links, bool)
    used[column] = True
    place, link = np.divmod(np.flatnonzero(used), case.network.links)
    forth = sparse.csr_matrix((links.data, (np.cumsum(used) - 1)[column], links.indptr), shape=(len(path), len(link)))
    toll = pool.toll[path, scenario]
    trips = case.trips[pool.pair[path[first]], scenario[first]]
    choices = _Choices(
        case.scenarios, case.roads.only(link, place), place, forth, forth.T.tocsr(), pair, first, toll - toll[first[pair]], scenario, trips
    )
    return choices, (path, scenario), (link, place)


def _equilibrate(case: _Case, pool: _Pool, total: np.ndarray, enough: np.ndarray, caution: np.ndarray) -> _Pool:
    """Moves trips among the paths of their pairs, a few Newton steps, until the gap over these paths is `enough`, `[scenario]`.

    `total` is what all trips cost before, `[scenario]`.
    """
    choices, where, links = _choices(case, pool, np.isfinite(enough))
    if not len(choices.pair):
        return pool
    roads, first, scenario = choices.roads, choices.first, choices.scenario
    h = start = pool.flow[where]
    v = at_start = pool.link_flow()[links]
    for done in range(_STEPS):
        cost = choices.forth @ roads.time(v) + choices.toll
        excess = cost - np.minimum.reduceat(cost, first)[choices.pair]
        inner = choices.sum(h * excess) / np.maximum(total, 1e-300)
        moving = (inner > enough)[scenario]
        if not moving.any():
            break
        wish = _newton(choices, h, v, cost, moving, caution, _CONJUGATE[min(done, len(_CONJUGATE) - 1)])
        share, downhill = _line_search(choices, v, h, wish)
        caution[:] = np.clip(np.where(share > 0.5, caution / 10, np.where(share < 0.1, caution * 10, caution)), *_SHIFT)
        stuck = moving & ~downhill[scenario]
        if stuck.any():  # a projected Newton step may point uphill; this one cannot
            caution[~downhill] = np.maximum(caution[~downhill], 1e-3)
            wish = np.where(stuck, _shift_to_cheapest(choices, h, v, excess, stuck), wish)
            share, _ = _line_search(choices, v, h, wish)
        h = h + share[scenario] * (wish - h)
        v = np.maximum(at_start + choices.back @ (h - start), 0.0)
    flow = pool.flow.copy()
    flow[where] = h
    return replace(pool, flow=flow)


def _newton(
    choices: _Choices, h: np.ndarray, v: np.ndarray, cost: np.ndarray, moving: np.ndarray, caution: np.ndarray, most: int
) -> np.ndarray:
    """Path flows where the objective's quadratic model is least, nearly, among those that are not negative, `[path]`.

    The path with most flow of each pair takes what the others leave, so that one variable less a pair and only bounds at 0 remain
    (Bertsekas & Gafni 1983). `caution` `[scenario]` shortens the step as Levenberg and Marquardt do; it grows where steps fail. Paths at
    their bound stay there; those that a solution of the free ones would empty are emptied, and the rest is solved for again.
    """
    pair = choices.pair
    main = _first_of_pair(choices, h == np.maximum.reduceat(h, choices.first)[pair])
    gradient = cost - cost[main][pair]
    free = moving & ((h > 0) | (gradient < 0))
    free[main] = False
    some = np.flatnonzero(free)
    # of link flows, by a vehicle more on a path, [free path, link]
    change = choices.forth[some] - choices.forth[main[pair[some]]]
    back, slope = change.T.tocsr(), choices.roads.slope(v)
    diagonal = abs(change) @ slope
    gradient, flow, scenario = gradient[some], h[some], choices.scenario[some]
    shift = caution[scenario] * diagonal + 1e-12 * diagonal.max(initial=1e-300)
    diagonal = diagonal + shift

    def total(of_free: np.ndarray) -> np.ndarray:
        return _sum(choices.scenarios, scenario, of_free)

    def curvature(x: np.ndarray) -> np.ndarray:
        return change @ (slope * (back @ x)) + shift * x

    # as good as empty, and on its way down by its own Newton step (the binding set of Bertsekas 1982)
    free = (flow > gradient / diagonal) | (flow >= 1e-3 * choices.trips[pair[some]])
    step = np.where(free, 0.0, -flow)
    start = None
    for _ in range(_ROUNDS):
        residual = np.where(free, -gradient - curvature(step), 0.0)
        scaled = residual / diagonal
        square = total(residual * scaled)
        start = square if start is None else start
        direction = scaled
        for _ in range(most):  # conjugate gradients, each scenario with numbers of its own
            going = square > _CG_TOLERANCE**2 * start
            if not going.any():
                break
            bent = np.where(free, curvature(direction), 0.0)
            length = np.where(going, square / np.maximum(total(direction * bent), 1e-300), 0.0)[scenario]
            step = step + length * direction
            residual = residual - length * bent
            scaled = residual / diagonal
            old, square = square, total(residual * scaled)
            direction = scaled + (square / np.maximum(old, 1e-300))[scenario] * direction
        below = free & (flow + step < 0)
        if not below.any():
            break
        free &= ~below
        step = np.where(below, -flow, step)
    wish = h.copy()
    wish[some] = np.maximum(flow + step, 0.0)
    return _fill(choices, wish, main)


def _shift_to_cheapest(choices: _Choices, h: np.ndarray, v: np.ndarray, excess: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Path flows after each path's own Newton step towards the cheapest of its pair, `[path]`; always downhill.

    Source: Jayakrishnan et al. (1994), "A faster path-based algorithm for traffic assignment".
    """
    cheapest = _first_of_pair(choices, excess == 0)
    some = np.flatnonzero(moving & (h > 0) & (excess > 0))
    diagonal = abs(choices.forth[some] - choices.forth[cheapest[choices.pair[some]]]) @ choices.roads.slope(v)
    wish = h.copy()
    wish[some] -= np.minimum(h[some], excess[some] / np.maximum(diagonal, 1e-300))
    return _fill(choices, wish, cheapest)


def _first_of_pair(choices: _Choices, chosen: np.ndarray) -> np.ndarray:
    """The first chosen path of each pair, `[pair]`; one of each has to be chosen."""
    paths = np.flatnonzero(chosen)[::-1]
    answer = np.empty(len(choices.first), np.int64)
    answer[choices.pair[paths]] = paths
    return answer


def _fill(choices: _Choices, wish: np.ndarray, main: np.ndarray) -> np.ndarray:
    """Gives the main path of each pair the trips that the others leave; shrinks those where they want more than there is."""
    wish[main] = 0.0
    others = np.add.reduceat(wish, choices.first)
    wish *= np.minimum(1.0, choices.trips / np.maximum(others, 1e-300))[choices.pair]
    wish[main] = np.maximum(choices.trips - others, 0.0)
    return wish


def _line_search(choices: _Choices, v: np.ndarray, h: np.ndarray, wish: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far to go from h to the wish, 0 to 1, for the objective to be least, and whether it falls at all; both `[scenario]`."""
    change = wish - h
    dv = choices.back @ change
    paid = choices.sum(change * choices.toll)

    def rise(share: np.ndarray) -> np.ndarray:
        """Derivative of the objective along the way."""
        flow = np.maximum(v + share[choices.place] * dv, 0.0)
        return _sum(choices.scenarios, choices.place, dv * choices.roads.time(flow)) + paid

    low, high = np.zeros(choices.scenarios), np.ones(choices.scenarios)
    at_low, at_high = rise(low), rise(high)
    downhill, enough = at_low < 0, _FLAT * np.abs(at_low)
    share, at_share = high, at_high
    for _ in range(_TRIES):  # false position; halving the end that stays (the Illinois rule)
        open_ = downhill & (at_share > enough) | (share < 1) & (at_share < -enough)
        if not open_.any():
            break
        share = np.where(open_, low + (high - low) * at_low / np.where(at_low < at_high, at_low - at_high, -1.0), share)
        at_share = np.where(open_, rise(share), at_share)
        left = at_share < 0
        low, at_low, at_high = np.where(left, share, low), np.where(left, at_share, at_low / 2), np.where(left, at_high / 2, at_share)
        high = np.where(left, high, share)
    return np.where(at_share > enough, low, share) * downhill, downhill


# ---- the smooth mode


def stochastic(network: Network, trips: Demand | np.ndarray, theta: float, paths: Paths | None = None) -> np.ndarray:
    """Flows of the logit stochastic user equilibrium over given paths, veh/h, `[link]`; by default those that `equilibrium` uses.

    `theta` is how sharply drivers tell costs apart, 1/s: with a large one this is the user equilibrium. A fixed point that is
    missed is warned of.
    """
    paths = equilibrium(network, trips).paths if paths is None else paths
    with jax.enable_x64():
        given = logit_parameters(network, trips, theta)
        flow = jax.jit(lambda p: logit_flow(paths, p))(given)
        missed = float(jnp.abs(flow - _logit(paths)(flow, given)).max() / jnp.maximum(flow.max(), 1e-300))
    if missed > 1e-8:
        warnings.warn(f"stochastic: flows miss their fixed point by {missed:.3g} of the largest flow", stacklevel=2)
    return np.asarray(flow)


def logit_parameters(network: Network, trips: Demand | np.ndarray, theta: float) -> dict[str, jax.Array]:
    """What `logit_flow` depends on and can be differentiated by: times, capacities, tolls `[user, link]`, trips `[user, zone, zone]`."""
    matrix = _matrix(trips)
    matrix = matrix if matrix.ndim == 3 else matrix[None]
    toll = np.zeros(network.links) if network.toll is None else network.toll
    names = {name: getattr(network, name) for name in ("free_time", "capacity", "alpha", "beta")}
    given = {**names, "toll": np.broadcast_to(toll, (len(matrix), network.links)), "trips": matrix, "theta": theta}
    return {name: jnp.asarray(value, float) for name, value in given.items()}


def logit_flow(paths: Paths, given: dict[str, jax.Array], response: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """Flows v at which trips, split by a logit of the path costs that v makes, add up to v, veh/h, `[link]` (Fisk 1980).

    With a `response`, trips are those given times what it makes of the change of their cost in s, against `given["base_cost"]`
    `[user, zone, zone]`; it has to fall, and a pair's cost is the logit's, -ln(sum exp(-theta c)) / theta.

    Differentiable in reverse by every one of `given` (see `logit_parameters`), through the fixed point and not through the iterations:
    with load(v), J = I - dload/dv and the flows' cotangent w, parameters get (dload/dp)^T J^-T w. Runs in the precision that JAX has;
    call it under `jax.enable_x64()` where gradients matter. Source: Fisk, "Some developments in equilibrium traffic assignment".
    """
    load = _logit(paths, response)

    @jax.custom_vjp
    def settled(p: dict[str, jax.Array]) -> jax.Array:
        return _fixed_point(load, p)

    def forward(p: dict[str, jax.Array]) -> tuple[jax.Array, tuple]:
        v = _fixed_point(load, p)
        return v, (v, p)

    def backward(kept: tuple, w: jax.Array) -> tuple:
        v, p = kept
        root, spread = _linear(load, v, p)
        # J^T = I + T B, T = root^2: lambda = w - root z with (I + root B root) z = root B w
        z = _definite(lambda x: x + root * spread(root * x), root * spread(w))
        _, pull = jax.vjp(lambda q: load(v, q), p)
        return pull(w - root * z)

    settled.defvjp(forward, backward)
    return settled(given)


def _logit(paths: Paths, response: Callable[[jax.Array], jax.Array] | None = None) -> Callable:
    """The function (flow, parameters) -> flow that loads the trips on the paths by a logit of their costs; `cost` overrides the links'."""
    table = paths.links.tocoo()
    path, link, (count, links) = table.row, table.col, paths.links.shape
    ends = (paths.user, paths.origin, paths.destination)
    _, pair = np.unique(np.stack(ends), axis=1, return_inverse=True)
    pair = pair.reshape(-1)
    pairs, user = int(pair.max(initial=-1)) + 1, paths.user[path]

    def load(v: jax.Array, p: dict[str, jax.Array], cost: jax.Array | None = None) -> jax.Array:
        time = _link_time(v, p) if cost is None else cost
        wish = -p["theta"] * jax.ops.segment_sum(time[link] + p["toll"][user, link], path, count)
        top = jax.lax.stop_gradient(jax.ops.segment_max(wish, pair, pairs))
        weight = jnp.exp(wish - top[pair])
        total = jax.ops.segment_sum(weight, pair, pairs)
        flow = p["trips"][ends] * weight / total[pair]
        if response is not None:
            flow = flow * response(-(top + jnp.log(total))[pair] / p["theta"] - p["base_cost"][ends])
        return jax.ops.segment_sum(flow[path], link, links)

    return load


def _link_time(v: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    return p["free_time"] * (1 + p["alpha"] * (v / p["capacity"]) ** p["beta"])


def _linear(load: Callable, v: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, Callable]:
    """At v: the root of the links' dt/dv, and the map B, symmetric and not negative, from a rise of link costs to the fall of flows."""
    time, slope = jax.jvp(lambda x: _link_time(x, p), (v,), (jnp.ones_like(v),))
    return jnp.sqrt(slope), lambda rise: -jax.jvp(lambda cost: load(v, p, cost), (time,), (rise,))[1]


def _definite(matrix: Callable, right: jax.Array) -> jax.Array:
    return jax.scipy.sparse.linalg.cg(matrix, right, tol=1e-12, maxiter=500)[0]


def _fixed_point(load: Callable, p: dict[str, jax.Array]) -> jax.Array:
    """Newton's method on v - load(v), the step halved until the residual falls; J = I + B T is never singular."""

    def residual(v: jax.Array) -> jax.Array:
        return v - load(v, p)

    def size(v: jax.Array) -> jax.Array:
        return jnp.linalg.norm(residual(v))

    def step(state: tuple) -> tuple:
        v, before, count = state
        root, spread = _linear(load, v, p)
        r = residual(v)
        y = _definite(lambda x: x + root * spread(root * x), root * r)
        whole = r - spread(root * y)

        def moved(share: jax.Array) -> jax.Array:
            return jnp.maximum(v - share * whole, 0.0)

        share = jax.lax.while_loop(
            lambda s: (size(moved(s)) > (1 - 1e-4 * s) * before) & (s > 1e-6), lambda s: s / 2, jnp.ones((), v.dtype)
        )
        after = size(moved(share))
        return jnp.where(after < before, moved(share), v), jnp.where(after < before, after, 0.0), count + 1

    start = load(jnp.zeros_like(p["free_time"]), p)
    tolerance = 20 * jnp.finfo(start.dtype).eps * jnp.linalg.norm(start)
    return jax.lax.while_loop(lambda s: (s[1] > tolerance) & (s[2] < 100), step, (start, size(start), 0))[0]
