"""Where drivers settle on a road network when each takes the way that costs least: static user equilibrium, one scenario or many at once.

The equilibrium minimises Beckmann's objective, the sum over links of the integral of travel time up to the flow, plus tolls paid
(Beckmann, McGuire & Winsten 1956, ch. 3). It is found on a set of paths that grows: shortest-path trees under the times so far give
every pair of zones its cheapest way; where that beats the ways in use it joins them; then trips move between the ways of all pairs at
once, by projected Newton steps whose linear systems are solved by conjugate gradients (Bertsekas & Gafni 1983, "Projected Newton
methods and optimization of multicommodity flows"). Scenarios stand side by side in one block-diagonal problem, so that 64 of them
cost far less than 64 runs. All of this is float64 on the host.

`stochastic` is the smooth mode, in JAX: drivers perceive costs with an error and choose among given paths by a logit; its flows
are differentiable with respect to times, capacities, tolls and demand by the implicit function theorem.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from domains.city.network import Demand, Network, turns
from twinsim.base import BadInput

ITERATIONS = 200  # of path search and Newton steps; convergence takes 5 to 20
_STEPS = 6  # Newton steps between two path searches
_ROUNDS, _CONJUGATE = 3, 20  # in a step: times that paths which empty are held at zero, and CG iterations each time
_CG_TOLERANCE = 0.1
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
class _Case:
    """All scenarios: links one scenario after the other, `[scenario * link]`, and pairs of zones with trips, by scenario and class."""

    network: Network
    graph: _Graph
    scenarios: int
    users: int
    free_time: np.ndarray  # s, [scenario * link]
    capacity: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    toll: np.ndarray  # s, inf where closed, [scenario, user, link]
    scenario: np.ndarray  # [pair]
    user: np.ndarray
    origin: np.ndarray
    destination: np.ndarray
    trips: np.ndarray  # veh/h, [pair]

    @property
    def links(self) -> int:
        return self.network.links

    def time(self, flow: np.ndarray) -> np.ndarray:
        """BPR travel time, s, `[scenario * link]`."""
        return self.free_time * (1 + self.alpha * _power(flow / self.capacity, self.beta))

    def slope(self, flow: np.ndarray) -> np.ndarray:
        """Derivative of the travel time by flow; 0 for constant times."""
        with np.errstate(divide="ignore", invalid="ignore"):
            steep = self.free_time * self.alpha * self.beta / self.capacity * _power(flow / self.capacity, self.beta - 1)
        return np.where(np.isfinite(steep), steep, 0.0)  # infinite at no flow where 0 < beta < 1: any step will do

    def integral(self, flow: np.ndarray) -> np.ndarray:
        """Integral of the travel time from 0 to the flow, Beckmann's term."""
        return self.free_time * flow * (1 + self.alpha / (self.beta + 1) * _power(flow / self.capacity, self.beta))

    def by_scenario(self, of_links: np.ndarray) -> np.ndarray:
        """Sums over the links of each scenario, `[scenario]`."""
        return of_links.reshape(self.scenarios, -1).sum(1)


def _power(base: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """`base ** exponent`, several times as fast for the usual BPR exponents."""
    top = float(exponent[0])
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
    flat = {
        name: np.broadcast_to(np.stack([getattr(one, name) for one in given]), (count, links)).ravel()
        for name in ("free_time", "capacity", "alpha", "beta")
    }
    scenario, user, origin, destination = np.nonzero(trip)
    return _Case(
        first, _graph(first), count, users, **flat, toll=price,
        scenario=scenario, user=user, origin=origin, destination=destination, trips=trip[scenario, user, origin, destination],
    )  # fmt: skip


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
class _Pool:
    """The paths in play, those of a pair next to each other."""

    links: sparse.csr_matrix  # [path, scenario * link]
    pair: np.ndarray  # [path]
    toll: np.ndarray  # s, [path]
    flow: np.ndarray  # veh/h, [path]

    @classmethod
    def empty(cls, case: _Case) -> "_Pool":
        none = np.zeros(0)
        return cls(sparse.csr_matrix((0, case.scenarios * case.links)), none.astype(int), none, none)

    def join(self, case: _Case, new: "_Pool") -> "_Pool":
        """With the new paths, without those that nobody uses; a pair that had no path has all its trips on its new one."""
        used = self.flow > 0
        lonely = np.isin(new.pair, self.pair[used], invert=True)
        pair = np.concatenate([self.pair[used], new.pair])
        order = np.argsort(pair, kind="stable")
        return _Pool(
            sparse.vstack([self.links[used], new.links], format="csr")[order],
            pair[order],
            np.concatenate([self.toll[used], new.toll])[order],
            np.concatenate([self.flow[used], np.where(lonely, case.trips[new.pair], 0.0)])[order],
        )

    def cheapest(self, case: _Case, time: np.ndarray) -> np.ndarray:
        """Cost of the cheapest path of each pair, s, `[pair]`; inf for a pair without one."""
        cost = np.full(len(case.trips), np.inf)
        np.minimum.at(cost, self.pair, self.links @ time + self.toll)
        return cost


def _search(case: _Case, time: np.ndarray, known: np.ndarray, busy: np.ndarray, margin: float) -> tuple[np.ndarray, np.ndarray, _Pool]:
    """Costs of the cheapest ways and the paths that beat `known` costs `[pair]` by more than the fraction `margin`.

    Only `busy` scenarios are searched, `[scenario]`. Returns costs `[pair]`, costs between all zones `[scenario, user, zone, zone]`, paths.
    """
    zones, links = case.network.zones, case.links
    best = known.copy()
    matrix = np.full((case.scenarios, case.users, zones, zones), np.inf)
    bounds = np.searchsorted(case.scenario * case.users + case.user, np.arange(case.scenarios * case.users + 1))
    rows: list[np.ndarray] = []
    columns: list[np.ndarray] = []
    pairs: list[np.ndarray] = []
    tolls: list[np.ndarray] = []
    found = 0
    for scenario, user in np.ndindex(case.scenarios, case.users):
        if not busy[scenario]:
            continue
        price = case.toll[scenario, user]
        weight, carried = case.graph.weigh(time[scenario * links : (scenario + 1) * links] + price)
        graph = sparse.csr_matrix((weight, case.graph.head, case.graph.first), shape=(case.graph.vertices,) * 2)
        distance, before = dijkstra(graph, indices=case.graph.source, return_predecessors=True)
        matrix[scenario, user] = distance[:, case.graph.sink]
        here = np.arange(*bounds[scenario * case.users + user :][:2])
        best[here] = cost = matrix[scenario, user][case.origin[here], case.destination[here]]
        _refuse_lost(case, here[~np.isfinite(cost)])
        better = here[known[here] - cost > margin * cost]
        if not len(better):
            continue
        row, link = _trace(case.graph, before, carried, case.origin[better], case.destination[better])
        rows.append(row + found)
        found += len(better)
        columns.append(link + scenario * links)
        pairs.append(better)
        tolls.append(np.bincount(row, price[link], len(better)))
    if not pairs:
        return best, matrix, _Pool.empty(case)
    row, pair = np.concatenate(rows), np.concatenate(pairs)
    table = sparse.csr_matrix((np.ones(len(row)), (row, np.concatenate(columns))), shape=(len(pair), case.scenarios * links))
    return best, matrix, _Pool(table, pair, np.concatenate(tolls), np.zeros(len(pair)))


def _trace(
    graph: _Graph, before: np.ndarray, carried: np.ndarray, origin: np.ndarray, destination: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Links on the tree paths of many pairs, followed back together: (index into the pairs, link), both `[n]`."""
    keys = np.repeat(np.arange(graph.vertices), np.diff(graph.first)) * graph.vertices + graph.head
    alive, vertex = np.arange(len(origin)), graph.sink[destination]
    rows, links = [], []
    while len(alive):
        ahead = before[origin[alive], vertex].astype(np.int64)
        rows.append(alive)
        links.append(carried[np.searchsorted(keys, ahead * graph.vertices + vertex)])
        further = ahead != graph.source[origin[alive]]
        alive, vertex = alive[further], ahead[further]
    row, link = np.concatenate(rows), np.concatenate(links)
    return row[link >= 0], link[link >= 0]


def _refuse_lost(case: _Case, lost: np.ndarray) -> None:
    if len(lost):
        names = case.network.node_id[case.network.zone]
        some = ", ".join(f"{names[case.origin[pair]]} to {names[case.destination[pair]]}" for pair in lost[:3])
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        where = f" in scenario {case.scenario[lost[0]]}" if case.scenarios > 1 else ""
        raise BadInput(f"trips from zone {some}{more}{where}: expected a way by open links, there is none")


def _like_the_mean(case: _Case) -> _Pool:
    """Paths of the mean scenario for every scenario, its trips shared out among them alike, ways over closed links left out."""
    # a link may be closed in some scenarios only, so the mean one has it open
    links = case.links
    opened = np.where(np.isfinite(case.toll), case.toll, 0.0)
    key = np.ravel_multi_index((case.user, case.origin, case.destination), (case.users, case.network.zones, case.network.zones))
    keys, place = np.unique(key, return_inverse=True)
    user, origin, destination = np.unravel_index(keys, (case.users, case.network.zones, case.network.zones))
    flat = {name: getattr(case, name).reshape(-1, links).mean(0) for name in ("free_time", "capacity", "alpha", "beta")}
    shares = np.bincount(place, case.trips) / case.scenarios
    shut = np.isinf(case.toll).all(0)
    mean = _Case(
        case.network, case.graph, 1, case.users, **flat, toll=np.where(shut, np.inf, opened.mean(0))[None],
        scenario=np.zeros(len(keys), int), user=user, origin=origin, destination=destination, trips=shares,
    )  # fmt: skip
    found = _iterate(mean, _Pool.empty(mean), 1e-4, ITERATIONS)[0]
    share = found.flow / shares[found.pair]
    pair_of = np.full((case.scenarios, len(keys)), -1)
    pair_of[case.scenario, place] = np.arange(len(case.trips))
    pair = pair_of[:, found.pair].ravel()  # [scenario * path]
    table = sparse.kron(sparse.eye(case.scenarios), found.links, format="csr")
    toll = np.concatenate([_path_tolls(found.links, opened[s], user[found.pair]) for s in range(case.scenarios)])
    blocked = np.concatenate([_path_tolls(found.links, np.isinf(case.toll[s]) * 1.0, user[found.pair]) for s in range(case.scenarios)])
    flow = np.tile(share, case.scenarios)
    kept = (pair >= 0) & (blocked == 0) & (flow > 0)
    order = np.flatnonzero(kept)[np.argsort(pair[kept], kind="stable")]
    pair, flow = pair[order], flow[order]
    total = np.bincount(pair, flow, len(case.trips))[pair]
    return _Pool(table[order], pair, toll[order], flow / total * case.trips[pair])


def _path_tolls(links: sparse.csr_matrix, toll: np.ndarray, user: np.ndarray) -> np.ndarray:
    """Sum over a path's links of its class's toll, `[path]`; from tolls `[user, link]`."""
    return (links @ toll.T)[np.arange(len(user)), user]


# ---- the solution


def _solve(case: _Case, pool: _Pool, gap: float, iterations: int) -> list[Equilibrium]:
    pool, gaps, matrix, turns_taken = _iterate(case, pool, gap, iterations)
    flow = pool.links.T @ pool.flow
    time = case.time(flow)
    objective = case.by_scenario(case.integral(flow)) + _sum(case, case.scenario[pool.pair], pool.flow * pool.toll)
    missed = np.flatnonzero(gaps > gap)
    if len(missed):
        worst = missed[np.argmax(gaps[missed])]
        count = f"{len(missed)} of {case.scenarios} scenarios miss"
        warnings.warn(f"equilibrium: {count} the gap {gap:g}, scenario {worst} is at {gaps[worst]:.3g}", stacklevel=4)
    answers = []
    bounds = np.searchsorted(case.scenario[pool.pair], np.arange(case.scenarios + 1))
    for scenario in range(case.scenarios):
        rows, columns = slice(*bounds[scenario:][:2]), slice(scenario * case.links, (scenario + 1) * case.links)
        links, pair = pool.links[rows, columns], pool.pair[rows]
        paths = Paths(links, case.user[pair], case.origin[pair], case.destination[pair], pool.flow[rows])
        by_user = np.stack([links.T @ np.where(paths.user == user, paths.flow, 0.0) for user in range(case.users)])
        reached = bool(gaps[scenario] <= gap)
        answers.append(
            Equilibrium(
                flow[columns],
                time[columns],
                by_user,
                matrix[scenario],
                float(gaps[scenario]),
                reached,
                float(objective[scenario]),
                int(turns_taken[scenario]),
                paths,
            )  # fmt: skip
        )
    return answers


def _iterate(case: _Case, pool: _Pool, gap: float, iterations: int) -> tuple[_Pool, np.ndarray, np.ndarray, np.ndarray]:
    """Searches paths and moves trips until every scenario's gap is reached; returns paths, gaps, costs between zones, searches made."""
    gaps, taken = np.full(case.scenarios, np.inf), np.zeros(case.scenarios, int)
    costs = np.full((case.scenarios, case.users, case.network.zones, case.network.zones), np.inf)
    busy, caution = np.ones(case.scenarios, bool), np.full(case.scenarios, _SHIFT[0])
    for done in range(iterations + 1):
        flow = pool.links.T @ pool.flow
        time = case.time(flow)
        known = pool.cheapest(case, time)
        best, matrix, new = _search(case, time, known, busy, margin=1e-3 * gap)
        fresh = np.isinf(known).any()
        taken[busy] += 1
        costs[busy] = matrix[busy]
        if not fresh:
            total = case.by_scenario(flow * time) + _sum(case, case.scenario[pool.pair], pool.flow * pool.toll)
            least = _sum(case, case.scenario, case.trips * best)
            gaps[busy] = ((total - least) / np.maximum(total, 1e-300))[busy]
            busy = gaps > gap
            if not busy.any() or done == iterations:
                break
        pool = pool.join(case, new)
        if not fresh:
            pool = _equilibrate(case, pool, np.where(busy, np.maximum(0.02 * gaps, 0.1 * gap), np.inf), caution)
    return pool, gaps, costs, taken


def _sum(case: _Case, scenario: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums by scenario, `[scenario]`."""
    return np.array([values.sum()]) if case.scenarios == 1 else np.bincount(scenario, values, case.scenarios)


def _equilibrate(case: _Case, pool: _Pool, enough: np.ndarray, caution: np.ndarray) -> _Pool:
    """Moves trips among the paths of their pairs, a few Newton steps, until the gap over these paths is `enough`, `[scenario]`."""
    first = np.searchsorted(pool.pair, np.arange(len(case.trips)))
    choice = np.diff(np.append(first, len(pool.pair)))[pool.pair] > 1
    scenario = case.scenario[pool.pair]
    h, v = pool.flow, pool.links.T @ pool.flow
    for _ in range(_STEPS):
        cost = pool.links @ case.time(v) + pool.toll
        excess = cost - np.minimum.reduceat(cost, first)[pool.pair]
        inner = _sum(case, scenario, h * excess) / np.maximum(_sum(case, scenario, h * cost), 1e-300)
        moving = (inner > enough)[scenario] & choice
        if not moving.any():
            break
        wish = _newton(case, pool, h, v, cost, first, moving, caution)
        share, downhill = _line_search(case, pool, v, h, wish)
        caution[:] = np.clip(np.where(share > 0.5, caution / 10, np.where(share < 0.1, caution * 10, caution)), *_SHIFT)
        stuck = moving & ~downhill[scenario]
        if stuck.any():  # a projected Newton step may point uphill; this one cannot
            caution[~downhill] = np.maximum(caution[~downhill], 1e-3)
            wish = np.where(stuck, _shift_to_cheapest(case, pool, h, v, excess, first, stuck), wish)
            share, _ = _line_search(case, pool, v, h, wish)
        h = h + share[scenario] * (wish - h)
        v = pool.links.T @ h
    return _Pool(pool.links, pool.pair, pool.toll, h)


def _newton(
    case: _Case, pool: _Pool, h: np.ndarray, v: np.ndarray, cost: np.ndarray, first: np.ndarray, moving: np.ndarray, caution: np.ndarray
) -> np.ndarray:
    """Path flows where the objective's quadratic model is least, nearly, among those that are not negative, `[path]`.

    The path with most flow of each pair takes what the others leave, so that one variable less a pair and only bounds at 0 remain
    (Bertsekas & Gafni 1983). `caution` `[scenario]` shortens the step as Levenberg and Marquardt do; it grows where steps fail. Paths at
    their bound stay there; those that a solution of the free ones would empty are emptied, and the rest is solved for again.
    """
    main = _first_of_pair(pool, h == np.maximum.reduceat(h, first)[pool.pair], first)
    gradient = cost - cost[main][pool.pair]
    free = moving & ((h > 0) | (gradient < 0))
    free[main] = False
    some = np.flatnonzero(free)
    # of link flows, by a vehicle more on a path, [free path, scenario * link]
    change = pool.links[some] - pool.links[main[pool.pair[some]]]
    back, slope = change.T.tocsr(), case.slope(v)
    diagonal = abs(change) @ slope
    shift = caution[case.scenario[pool.pair[some]]] * diagonal + 1e-12 * diagonal.max(initial=1e-300)
    diagonal = diagonal + shift
    gradient, flow, scenario = gradient[some], h[some], case.scenario[pool.pair[some]]

    def curvature(x: np.ndarray) -> np.ndarray:
        return change @ (slope * (back @ x)) + shift * x

    # as good as empty, and on its way down by its own Newton step (the binding set of Bertsekas 1982)
    free = (flow > gradient / diagonal) | (flow >= 1e-3 * case.trips[pool.pair[some]])
    step = np.where(free, 0.0, -flow)
    start = None
    for _ in range(_ROUNDS):
        residual = np.where(free, -gradient - curvature(step), 0.0)
        scaled = residual / diagonal
        square = _sum(case, scenario, residual * scaled)
        start = square if start is None else start
        direction = scaled
        for _ in range(_CONJUGATE):  # conjugate gradients, each scenario with numbers of its own
            going = square > _CG_TOLERANCE**2 * start
            if not going.any():
                break
            bent = np.where(free, curvature(direction), 0.0)
            length = np.where(going, square / np.maximum(_sum(case, scenario, direction * bent), 1e-300), 0.0)[scenario]
            step = step + length * direction
            residual = residual - length * bent
            scaled = residual / diagonal
            old, square = square, _sum(case, scenario, residual * scaled)
            direction = scaled + (square / np.maximum(old, 1e-300))[scenario] * direction
        below = free & (flow + step < 0)
        if not below.any():
            break
        free &= ~below
        step = np.where(below, -flow, step)
    wish = h.copy()
    wish[some] = np.maximum(flow + step, 0.0)
    return _fill(case, pool, wish, main, first)


def _shift_to_cheapest(
    case: _Case, pool: _Pool, h: np.ndarray, v: np.ndarray, excess: np.ndarray, first: np.ndarray, moving: np.ndarray
) -> np.ndarray:
    """Path flows after each path's own Newton step towards the cheapest of its pair, `[path]`; always downhill.

    Source: Jayakrishnan et al. (1994), "A faster path-based algorithm for traffic assignment".
    """
    cheapest = _first_of_pair(pool, excess == 0, first)
    some = np.flatnonzero(moving & (h > 0) & (excess > 0))
    diagonal = abs(pool.links[some] - pool.links[cheapest[pool.pair[some]]]) @ case.slope(v)
    wish = h.copy()
    wish[some] -= np.minimum(h[some], excess[some] / np.maximum(diagonal, 1e-300))
    return _fill(case, pool, wish, cheapest, first)


def _first_of_pair(pool: _Pool, chosen: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The first chosen path of each pair, `[pair]`; one of each has to be chosen."""
    paths = np.flatnonzero(chosen)[::-1]
    answer = np.empty(len(first), np.int64)
    answer[pool.pair[paths]] = paths
    return answer


def _fill(case: _Case, pool: _Pool, wish: np.ndarray, main: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Gives the main path of each pair the trips that the others leave; shrinks those where they want more than there is."""
    wish[main] = 0.0
    others = np.add.reduceat(wish, first)
    wish *= np.minimum(1.0, case.trips / np.maximum(others, 1e-300))[pool.pair]
    wish[main] = np.maximum(case.trips - others, 0.0)
    return wish


def _line_search(case: _Case, pool: _Pool, v: np.ndarray, h: np.ndarray, wish: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far to go from h to the wish, 0 to 1, for the objective to be least, and whether it falls at all; both `[scenario]`."""
    change = wish - h
    dv = pool.links.T @ change
    paid = _sum(case, case.scenario[pool.pair], change * pool.toll)

    def rise(share: np.ndarray) -> np.ndarray:
        """Derivative of the objective along the way."""
        flow = np.maximum(v.reshape(case.scenarios, -1) + share[:, None] * dv.reshape(case.scenarios, -1), 0.0).ravel()
        return case.by_scenario(dv * case.time(flow)) + paid

    low, high = np.zeros(case.scenarios), np.ones(case.scenarios)
    at_low, at_high = rise(low), rise(high)
    downhill = at_low < 0
    all_the_way = at_high <= 0
    if (downhill & ~all_the_way).any():
        for _ in range(8):  # false position; halving the end that stays (the Illinois rule)
            share = low + (high - low) * at_low / np.where(at_low < at_high, at_low - at_high, -1.0)
            value = rise(share)
            left = value < 0
            low, at_low, at_high = np.where(left, share, low), np.where(left, value, at_low / 2), np.where(left, at_high / 2, value)
            high = np.where(left, high, share)
    return np.where(all_the_way, 1.0, low) * downhill, downhill


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
