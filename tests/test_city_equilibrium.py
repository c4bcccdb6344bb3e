"""User equilibria whose flows are known: closed forms, published optima, and two ways that must agree."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from roads import linear, pair
from scipy import sparse
from scipy.sparse.csgraph import dijkstra

from domains.city import tntp
from domains.city.equilibrium import equilibria, equilibrium, logit_flow, logit_parameters, stochastic
from domains.city.network import Network, build
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared"))
TNTP = SHARED / "data" / "mobility" / "tntp"
needs_tntp = pytest.mark.skipif(not TNTP.is_dir(), reason=f"there is no folder {TNTP}")


def published(name: str, **weights: float) -> tuple[Network, np.ndarray, np.ndarray]:
    """A TNTP network, its trips and best known flows."""
    net, trips, flow = (next((TNTP / name).glob(f"*_{what}.tntp")) for what in ("net", "trips", "flow"))
    network = tntp.read_network(net, **weights)
    return network, tntp.read_trips(trips).trips, tntp.read_flows(flow, network)[0]


def test_parallel_links_share_trips_until_their_times_are_equal() -> None:
    # 10 + v1 = 20 + 2 v2 and v1 + v2 = 25: v1 = 20, v2 = 5, 30 s on either
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])
    found = equilibrium(network, pair(25.0), gap=1e-10)
    np.testing.assert_allclose(found.flow, [20, 5], rtol=1e-7)
    np.testing.assert_allclose(found.time, 30, rtol=1e-7)
    np.testing.assert_allclose(found.objective, 10 * 20 + 20**2 / 2 + 20 * 5 + 5**2, rtol=1e-9)
    assert found.converged and found.gap <= 1e-10
    np.testing.assert_allclose(found.cost[0, 0, 1], 30, rtol=1e-7)
    # with few trips the second link is not worth taking
    np.testing.assert_allclose(equilibrium(network, pair(8.0)).flow, [8, 0], atol=1e-9)


def braess(bridge: bool) -> Network:
    ends, base, slope = [(0, 2), (2, 1), (0, 3), (3, 1)], [0, 50, 50, 0], [10, 1, 1, 10]
    more = ([(2, 3)], [10], [1]) if bridge else ([], [], [])
    return linear(ends + more[0], base + more[1], slope + more[2], zone=[0, 1])


def test_braess_a_new_road_makes_everybody_slower() -> None:
    # Braess (1968): 6 trips; 83 s without the bridge, 92 s with it
    without, bridged = (equilibrium(braess(bridge), pair(6.0), gap=1e-9) for bridge in (False, True))
    np.testing.assert_allclose(without.flow, 3, rtol=1e-5)
    np.testing.assert_allclose(bridged.flow, [4, 2, 2, 4, 2], rtol=1e-5)
    np.testing.assert_allclose([without.total_time, bridged.total_time], [6 * 83, 6 * 92], rtol=1e-6)
    closed = equilibrium(braess(True), pair(6.0), gap=1e-9, closed=np.arange(5) == 4)
    np.testing.assert_allclose(closed.flow[:4], without.flow, rtol=1e-5)
    assert closed.flow[4] == 0


def test_gap_is_the_excess_over_the_cheapest_ways() -> None:
    # one search puts all 25 trips on the first link, 10 + 25 s; the second is empty and takes 20 s
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])
    with pytest.warns(UserWarning, match="miss the gap 1e-06, scenario 0 is at 0.429"):
        found = equilibrium(network, pair(25.0), iterations=1)
    assert not found.converged
    np.testing.assert_allclose(found.gap, (25 * 35 - 25 * 20) / (25 * 35), rtol=1e-9)


def test_marginal_cost_tolls_lead_to_the_least_total_time() -> None:
    # tolls v dt/dv at the optimum; there 10 + 2 v1 = 20 + 4 v2, so v1 = 55 / 3
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])
    v = np.array([55 / 3, 20 / 3])
    tolled = equilibrium(network, pair(25.0), gap=1e-10, toll=v * [1, 2])
    np.testing.assert_allclose(tolled.flow, v, rtol=1e-6)
    assert tolled.total_time < equilibrium(network, pair(25.0)).total_time


def test_who_minds_a_toll_less_takes_the_tolled_link() -> None:
    network = linear([(0, 1), (0, 1)], [10, 10], [1, 1], zone=[0, 1])
    found = equilibrium(network, np.stack([pair(10.0), pair(10.0)]), gap=1e-9, toll=np.array([[8.0, 0], [2.0, 0]]))
    # the first class pays 8, the second 2 s worth: with 9 on the tolled link it is the second class's margin that balances
    np.testing.assert_allclose(found.user_flow, [[0, 10], [9, 1]], atol=1e-4)
    np.testing.assert_allclose(found.user_flow.sum(0), found.flow)


def test_trips_keep_out_of_other_centroids_and_banned_turns() -> None:
    ends, times = [(0, 1), (1, 2), (0, 3), (3, 2)], [1, 1, 5, 5]
    trips = np.zeros((3, 3))
    trips[0, 2] = 10
    for more, through in (({"zone": [0, 1, 2]}, [10, 10, 0, 0]), ({"zone": [0, 1, 2], "through_zones": False}, [0, 0, 10, 10])):
        np.testing.assert_allclose(equilibrium(linear(ends, times, [0] * 4, **more), trips).flow, through)
    banned = linear(ends, times, [0] * 4, zone=[0, 1, 2], turn_bans=[[0, 1]])
    np.testing.assert_allclose(equilibrium(banned, trips).flow, [0, 0, 10, 10])


def grid(side: int, every: int, seed: int) -> tuple[Network, np.random.Generator]:
    """Two-way streets on a square, zones at every so many crossings."""
    rng = np.random.default_rng(seed)
    node = np.arange(side * side).reshape(side, side)
    one_way = np.concatenate([np.stack([node[:, :-1], node[:, 1:]], -1).reshape(-1, 2), np.stack([node[:-1], node[1:]], -1).reshape(-1, 2)])
    start, end = np.concatenate([one_way, one_way[:, ::-1]]).T
    length, capacity = rng.uniform(300, 900, len(start)), rng.uniform(300, 600, len(start))
    return build(start=start, end=end, length=length, capacity=capacity, zone=node[::every, ::every].ravel()), rng


def test_flow_is_conserved_and_batch_equals_single_runs() -> None:
    network, rng = grid(4, every=3, seed=0)
    start, end = network.start, network.end
    trips = rng.uniform(100, 500, (5, 4, 4))
    trips[2, 0, 1] = 0.0
    toll = rng.uniform(0, 20, (5, len(start))) * (rng.random((5, len(start))) < 0.2)
    closed = np.zeros((5, len(start)), bool)
    closed[3, 5] = True
    slow = [dataclasses.replace(network, free_speed=network.free_speed * (1 if i else 0.6)) for i in range(5)]
    many = equilibria(slow, trips, 1e-9, toll=toll, closed=closed)
    for i, batched in enumerate(many):
        alone = equilibrium(slow[i], trips[i], 1e-9, toll=toll[i], closed=closed[i])
        np.testing.assert_allclose(batched.flow, alone.flow, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(batched.objective, alone.objective, rtol=1e-8)
        net = np.bincount(end, batched.flow, network.nodes) - np.bincount(start, batched.flow, network.nodes)
        off = trips[i] * ~np.eye(4, dtype=bool)
        np.testing.assert_allclose(net[network.zone], off.sum(0) - off.sum(1), atol=1e-8)
    assert many[3].flow[5] == 0


def own_gap(network: Network, trips: np.ndarray, toll: np.ndarray, flow: np.ndarray, user_flow: np.ndarray) -> float:
    """The relative gap of link flows, `[user, link]` by class, from shortest paths that are searched here."""
    time = network.free_time * (1 + network.alpha * (flow / network.capacity) ** network.beta)
    spent, least = flow @ time, 0.0
    for own, demand, price in zip(user_flow, trips, toll, strict=True):
        spent += own[np.isfinite(price)] @ price[np.isfinite(price)]
        usable = np.isfinite(price)
        table = sparse.csr_matrix(((time + price)[usable], (network.start[usable], network.end[usable])), shape=(network.nodes,) * 2)
        least += (demand * dijkstra(table, indices=network.zone)[:, network.zone]).sum()
    return float((spent - least) / spent)


def test_many_scenarios_in_one_call_are_those_of_single_calls() -> None:
    # 18 scenarios that offer each other paths: demand from 0.3 to 1.7 times, two classes, tolls, closed links, pairs without trips
    network, rng = grid(5, every=2, seed=1)
    count, zones, links = 18, network.zones, network.links
    trips = rng.uniform(5, 60, (count, 2, zones, zones)) * rng.uniform(0.3, 1.7, (count, 1, 1, 1)) * ~np.eye(zones, dtype=bool)
    trips[rng.random(trips.shape) < 0.1] = 0.0
    trips[4] = 0.0
    toll = rng.uniform(0, 40, (count, 2, links)) * (rng.random((count, 2, links)) < 0.2)
    closed = np.zeros((count, links), bool)
    for i in range(5, 12):
        closed[i, rng.integers(links)] = True
    gap = 1e-8
    together = equilibria(network, trips, gap, toll=toll, closed=closed)
    searches = 0
    for i, one in enumerate(together):
        alone = equilibrium(network, trips[i], gap, toll=toll[i], closed=closed[i])
        assert one.converged and not one.flow[closed[i]].any()
        np.testing.assert_allclose(one.objective, alone.objective, rtol=2 * gap)
        np.testing.assert_allclose(one.flow, alone.flow, atol=1e-3 * max(alone.flow.max(), 1e-9))  # flows are the root of the gap
        if i == 4:
            assert not one.flow.any()
            continue
        price = np.where(closed[i], np.inf, toll[i])
        assert abs(own_gap(network, trips[i], price, one.flow, one.user_flow)) <= gap
        of_paths = np.bincount(np.ravel_multi_index((one.paths.user, one.paths.origin, one.paths.destination), trips[i].shape),
                               one.paths.flow, trips[i].size)  # fmt: skip
        np.testing.assert_allclose(of_paths, trips[i].ravel(), atol=1e-9)
        np.testing.assert_allclose(one.paths.links.T @ one.paths.flow, one.flow, atol=1e-6)
        searches += one.iterations - alone.iterations
    assert searches < 0


def test_wrong_numbers_and_lost_trips_are_named() -> None:
    network = linear([(0, 1)], [10], [1], zone=[0, 1], node_id=["A", "B"])
    with pytest.raises(BadInput, match="from zone B to A: expected a way"):
        equilibrium(network, np.array([[0, 1.0], [1, 0]]))
    with pytest.raises(BadInput, match="from zone A to zone B: expected 0 or more, got -1.0"):
        equilibrium(network, pair(-1.0))
    with pytest.raises(BadInput, match=r"expected \[2, 2\]"):
        equilibrium(network, np.zeros((3, 3)))
    with pytest.raises(BadInput, match="capacity of more than 0, got 0.0"):
        equilibrium(dataclasses.replace(network, capacity=np.zeros(1)), pair(1.0))
    with pytest.raises(BadInput, match="networks for 1 or 3 scenarios, got 2"):
        equilibria([network, network], np.zeros((3, 2, 2)))
    assert equilibrium(network, pair(0.0)).flow.sum() == 0


def test_logit_shares_follow_the_costs_they_make() -> None:
    # ln(v1 / v2) = theta (t2 - t1) at the fixed point, and with sharp eyes it is the user equilibrium (20, 5)
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])
    paths = equilibrium(network, pair(25.0)).paths
    v = stochastic(network, pair(25.0), 0.1, paths)
    np.testing.assert_allclose(np.log(v[0] / v[1]), 0.1 * ((20 + 2 * v[1]) - (10 + v[0])), rtol=1e-8)
    np.testing.assert_allclose(v.sum(), 25)
    np.testing.assert_allclose(stochastic(network, pair(25.0), 100.0, paths), [20, 5], rtol=1e-3)


def test_implicit_gradients_agree_with_finite_differences() -> None:
    network, trips = braess(True), pair(6.0)
    paths = equilibrium(network, trips).paths
    with jax.enable_x64():
        given = logit_parameters(network, trips, 0.05)

        def total_time(p: dict) -> jax.Array:
            v = logit_flow(paths, p)
            return jnp.sum(v * p["free_time"] * (1 + p["alpha"] * v / p["capacity"]))

        slope = jax.jit(jax.grad(total_time))(given)
        value = jax.jit(total_time)
        for name, place in (
            ("toll", (0, 0)),
            ("toll", (0, 4)),
            ("capacity", (1,)),
            ("free_time", (1,)),
            ("trips", (0, 0, 1)),
            ("theta", ()),
        ):
            h = 1e-5 * max(1.0, abs(float(given[name][place])))
            up, down = ({**given, name: given[name].at[place].add(sign * h)} for sign in (1, -1))
            np.testing.assert_allclose(slope[name][place], (value(up) - value(down)) / (2 * h), rtol=1e-5, atol=1e-7)


OPTIMA = {  # Beckmann's objective of the published flows, veh/h min (shared/reference/mobility.md, sec. 3)
    "SiouxFalls": (4_231_335.287, {}),
    "Anaheim": (1_286_032.171, {}),
    "Barcelona": (1_265_654.922, {}),
    "Chicago-Sketch": (17_313_018.739, {"toll_weight": 0.02, "distance_weight": 0.04}),
}


@needs_tntp
@pytest.mark.parametrize("name", ["SiouxFalls", "Anaheim", "Barcelona", pytest.param("Chicago-Sketch", marks=pytest.mark.slow)])
def test_published_optimum_is_reached(name: str) -> None:
    optimum, weights = OPTIMA[name]
    network, trips, flow = published(name, **weights)
    found = equilibrium(network, trips, gap=1e-9)
    assert found.converged
    np.testing.assert_allclose(found.objective / 60, optimum, rtol=1e-8)
    # flows are unique where time grows with flow; elsewhere ties of constant times may be split anyhow
    unique = network.alpha * network.beta > 0
    error = np.sqrt(np.mean((found.flow - flow)[unique] ** 2)) / flow[unique].mean()
    assert error < 2e-4
