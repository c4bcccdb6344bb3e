"""Traffic over time where it is known: free flow, queues, shock waves, merges, shares of routes, and two ways that must agree."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from building import rough_jit

from domains.city.equilibrium import equilibrium
from domains.city.network import Network, build
from domains.city.transmission import Plan, Run, given, plan, simulate, transmission
from twinsim.base import BadInput

HOUR = 3600.0


def pair(trips: float) -> np.ndarray:
    return np.array([[0, trips], [0, 0]])


def road(*capacity: float, length: float = 1000.0, **more) -> Network:
    """Links one after the other, 10 m/s, from zone 0 to zone 1."""
    count = len(capacity)
    return build(
        start=np.arange(count),
        end=np.arange(1, count + 1),
        length=length,
        free_speed=10.0,
        capacity=np.array(capacity),
        zone=[0, count],
        **more,
    )


def grid(side: int = 4, **more) -> Network:
    rng = np.random.default_rng(0)
    node = np.arange(side * side).reshape(side, side)
    across, along = np.stack([node[:, :-1], node[:, 1:]], -1), np.stack([node[:-1], node[1:]], -1)
    start, end = np.concatenate([part.reshape(-1, 2)[:, way] for part in (across, along) for way in ([0, 1], [1, 0])]).T
    sizes = {"length": rng.uniform(300, 900, len(start)), "capacity": rng.uniform(600, 1200, len(start)), "free_speed": 12.0}
    return build(start=start, end=end, zone=node[:: side - 1, :: side - 1].ravel(), **(sizes | more))


def busy(zones: int = 4, trips: float = 400.0) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.5, 1.5, (zones, zones)) * trips


def onward(run: Run) -> np.ndarray:
    return np.asarray(run.entered[-1])


def test_no_vehicle_is_lost_and_none_is_made() -> None:
    network = grid()
    laid = plan(network, 2 * HOUR, dt=20, update=120)
    inputs = given(laid, busy(trips=900.0), profile=[1.0, 1.0, 0.0])
    run = jax.jit(lambda p: simulate(laid, p))(inputs)
    on_links = np.asarray(run.entered - run.left)
    there = on_links.sum(1) + run.waiting.sum(1)
    # trips of the step that has just passed start to wait with the next one
    np.testing.assert_allclose(run.started[1:-1] - run.ended[1:-1], there[1:-1] + np.diff(run.started)[:-1], rtol=1e-5, atol=0.1)
    np.testing.assert_allclose(run.started[-1], busy(trips=900.0)[~np.eye(4, dtype=bool)].sum() * 4 / 3, rtol=1e-5)
    assert (on_links > -1e-3).all() and (on_links <= 1.001 * laid.jam_density * laid.length + 1e-2).all()
    assert run.delay > 50 and run.ended[-1] > 0.5 * run.started[-1]
    # flows keep to capacity
    assert (np.asarray(run.outflow) <= network.capacity * 1.001).all() and (np.asarray(run.flow) <= network.capacity * 1.002).all()


def test_an_empty_road_is_driven_in_its_free_time() -> None:
    network = road(1800, 1800, length=950.0)
    run = transmission(network, pair(600.0), 0.5 * HOUR, profile=[0, 1, 0], dt=20, update=100)
    # 95 s are 4.75 steps
    entered, left = np.asarray(run.entered[:, 0]), np.asarray(run.left[:, 0])
    time = np.arange(len(entered))
    np.testing.assert_allclose(left, np.interp(time - 4.75, time, entered), atol=1e-4)
    np.testing.assert_allclose(run.travel_time[:60, 0], 95, atol=0.5)
    np.testing.assert_allclose([run.ended[-1], run.remaining, run.delay], [100, 0, 0], atol=1e-2)
    # a zone lets nobody go before the next step: vehicle-hours are those of 2 x 95 s and, on average, half a step
    np.testing.assert_allclose(run.vehicle_hours, 100 * 190 / HOUR, rtol=1e-4)


def test_a_bottleneck_makes_the_queue_that_kinematic_waves_say() -> None:
    # 1400 veh/h meet 900: the queue grows by 500 veh/h, its end goes upstream at (q - b) / (k_queue - k_free) (Newell 1993)
    inflow, narrow, length, speed, wave = 1400 / HOUR, 900 / HOUR, 4000.0, 10.0, 5.0
    network = road(1800, 1800, 900, length=length)
    laid = plan(network, 1.6 * HOUR, dt=10, update=100, wave_speed=wave)
    run = jax.jit(lambda p: simulate(laid, p))(given(laid, pair(1400.0)))
    begins = (10 + 2 * length / speed) / 10
    time = np.arange(laid.steps + 1)
    here = (time > begins + 5) & (time < begins + 150)
    np.testing.assert_allclose(np.asarray(run.queue[:, 1])[here], 500 / HOUR * 10 * (time[here] - begins), atol=0.5)
    jam = laid.jam_density[1] - narrow / wave
    back = begins * 10 + length / ((inflow - narrow) / (jam - inflow / speed))
    change = np.flatnonzero(np.asarray(run.flow[:, 1]) > 1150)[-1] * 10
    assert abs(change - back) <= 30
    # from there the link before takes the queue on, and the full link holds what its density says
    assert np.asarray(run.queue[int(back / 10) - 5, 0]) < 0.5 < np.asarray(run.queue[int(back / 10) + 20, 0])
    np.testing.assert_allclose(run.density[-1, 1], jam, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(run.outflow)[300:, 1], 900, rtol=1e-3)


def test_when_a_closure_ends_the_holes_travel_back_at_wave_speed() -> None:
    network = road(1800, 1800, length=1000.0)
    capacity = np.full((4, 2), 1800.0)
    capacity[:3, 1] = 0.0  # for three quarters of an hour the second link takes nothing
    run = transmission(network, pair(1200.0), HOUR, capacity=capacity, dt=10, update=300)
    inflow = np.asarray(run.flow[:, 0])
    assert inflow[200:270].max() < 1  # the first link is full
    restart = np.flatnonzero(inflow[270:] > 900)[0] * 10
    assert abs(restart - 1000 / 5) <= 20
    # and the zone's queue has what did not fit
    assert run.waiting[270, 0] > 500


def test_links_that_merge_share_by_their_capacities() -> None:
    network = build(
        start=[0, 1, 2], end=[2, 2, 3], length=1000.0, free_speed=10.0, capacity=np.array([2400.0, 1200.0, 1800.0]), zone=[0, 1, 3]
    )
    laid = plan(network, 0.5 * HOUR, dt=20, update=100)
    driven = rough_jit(lambda p: simulate(laid, p))
    for wanted, passing in (((2400, 1200), (1200, 600)), ((2400, 300), (1500, 300)), ((600, 600), (600, 600))):
        trips = np.zeros((3, 3))
        trips[:2, 2] = wanted
        run = driven(given(laid, trips))
        np.testing.assert_allclose(np.asarray(run.outflow)[-20:, :2].mean(0), passing, rtol=2e-3)


def test_vehicles_for_a_full_link_hold_up_those_behind_them() -> None:
    # half turns to a link that takes 300 veh/h: the other half gets no more
    network = build(
        start=[0, 1, 1], end=[1, 2, 3], length=1000.0, free_speed=10.0, capacity=np.array([1800.0, 300.0, 1800.0]), zone=[0, 2, 3]
    )
    trips = np.zeros((3, 3))
    trips[0, 1:] = 700
    run = transmission(network, trips, 0.5 * HOUR, dt=20, update=100)
    np.testing.assert_allclose(np.asarray(run.flow)[-20:, 1:].mean(0), 300, rtol=1e-3)


def test_who_comes_first_leaves_first() -> None:
    network = build(start=[0, 1, 1], end=[1, 2, 3], length=np.array([6000.0, 600, 600]), free_speed=10.0, capacity=1800.0, zone=[0, 2, 3])
    trips = np.zeros((2, 3, 3))
    trips[0, 0, 1] = trips[1, 0, 2] = 900
    late = np.asarray(transmission(network, trips, HOUR, dt=30, update=30, memory=30).entered[:, 2])
    # those of the second half hour reach the fork after 30 s + 30 min + 600 s; one cohort of 30 s is mixed
    first = (60 + 1 + 20) - 2
    assert late[first] < 1e-3 and late[first + 6] > 10
    mixed = np.asarray(transmission(network, trips, HOUR, dt=30, update=300, memory=0).entered[:, 2])
    assert mixed[first] > 10


def two_routes(**more) -> Network:
    """From node 0 to 1 over 2, 200 s, or over 3, 230 s."""
    length = np.array([1000.0, 1000, 1150, 1150])
    return build(start=[0, 2, 0, 3], end=[2, 1, 3, 1], length=length, free_speed=10.0, capacity=1200.0, **({"zone": [0, 1]} | more))


@pytest.fixture(scope="module")
def routes() -> Callable[..., Run]:
    """Half an hour on two routes, one program for all that is asked of it."""
    laid = plan(two_routes(), 0.5 * HOUR, dt=20, update=100)
    driven = rough_jit(lambda p: simulate(laid, p))
    return lambda trips, **asked: driven(given(laid, trips, **asked))


@pytest.mark.parametrize(("toll", "theta"), [(0.0, 30.0), (20.0, 30.0), (0.0, 60.0)])
def test_shares_are_those_of_the_logit(routes: Callable[..., Run], toll: float, theta: float) -> None:
    run = routes(pair(300.0), theta=theta, toll=np.array([toll, 0, 0, 0]))
    cost = np.array([200 + toll, 230.0])
    excess = cost - cost.min()
    weight = (np.exp(-excess / theta) - 0.01) * (1 - excess / np.array([100 + toll, 115.0]))
    np.testing.assert_allclose(np.asarray(run.flow)[-1, [0, 2]], 300 * weight / weight.sum(), rtol=1e-4)


def test_with_few_trips_routes_are_those_of_the_static_equilibrium() -> None:
    network, trips = grid(alpha=1e-9), busy(trips=20.0)
    run = transmission(network, trips, 2 * HOUR, dt=20, update=200, theta=0.5)
    static = equilibrium(network, trips)
    flow = np.asarray(run.outflow)[-90:].mean(0)
    np.testing.assert_allclose(flow, static.flow, rtol=0.01, atol=0.5)
    np.testing.assert_allclose(run.delay, 0, atol=0.01)


def test_drivers_leave_a_queue_for_another_way() -> None:
    network = dataclasses.replace(two_routes(), capacity=np.array([1200.0, 300, 1200, 1200]))
    run = transmission(network, pair(900.0), HOUR, dt=20, update=60, theta=20)
    time = np.asarray(run.travel_time)[60:150].mean(0)
    assert np.asarray(run.flow)[60:150].mean(0)[2] > 500
    # they react to the times they see, those that they meet come later: the routes swing about equal times
    assert abs((time[0] + time[1]) / (time[2] + time[3]) - 1) < 0.35


def test_batch_equals_single_runs() -> None:
    network = grid()
    laid = plan(network, 0.5 * HOUR, dt=20, update=200)
    rng = np.random.default_rng(2)
    cases = [
        given(
            laid,
            busy(trips=float(300 + 300 * i)),
            toll=rng.uniform(0, 30, network.links),
            capacity=network.capacity * rng.uniform(0.5, 1.0, network.links),
            free_speed=network.free_speed * rng.uniform(0.7, 1.0, network.links),
        )
        for i in range(3)
    ]
    many = jax.jit(jax.vmap(lambda p: simulate(laid, p)))(jax.tree.map(lambda *each: jnp.stack(each), *cases))
    single = jax.jit(lambda p: simulate(laid, p))
    for i, case in enumerate(cases):
        alone = single(case)
        for name in ("entered", "left", "ended", "waiting"):
            one = np.asarray(getattr(alone, name))
            np.testing.assert_allclose(np.asarray(getattr(many, name))[i], one, rtol=1e-5, atol=1e-5 * one.max())


@pytest.mark.parametrize(
    "network",
    [
        two_routes(),
        two_routes(turn_bans=[[2, 3]]),
        grid(3),
    ],
    ids=["routes", "bans", "grid"],
)
@pytest.mark.slow
def test_gradients_agree_with_finite_differences(network: Network) -> None:
    if network.turn_bans is not None:  # a third way, so that a ban leaves a choice
        network = build(
            start=[0, 2, 0, 3, 2, 3], end=[2, 1, 3, 1, 3, 2], length=np.array([1000.0, 1000, 1150, 1150, 300, 300]), free_speed=10.0,
            capacity=900.0, zone=[0, 1], turn_bans=[[0, 4]],
        )  # fmt: skip
    zones = network.zones
    with jax.enable_x64():
        laid = plan(network, 0.4 * HOUR, dt=20, update=120)
        inputs = given(laid, pair(900.0) if zones == 2 else busy(zones, 400.0), profile=[1.0, 1.2, 0.4])

        def hours(p: dict) -> jax.Array:
            return simulate(laid, p).vehicle_hours

        value, slope = jax.jit(hours), jax.jit(jax.grad(hours))(inputs)
        places = {
            "toll": [(0, 0), (0, 3)],
            "demand": [(0, 0, 1), (1, 0, zones - 1)],
            "capacity": [(0, 1)],
            "free_speed": [(2,)],
            "theta": [()],
        }
        for name, where in places.items():
            for place in where:
                h = 1e-6 * max(1.0, abs(float(inputs[name][place])))
                up, here, down = (float(value({**inputs, name: inputs[name].at[place].add(sign * h)})) for sign in (1, 0, -1))
                right, left, found = (up - here) / h, (here - down) / h, float(slope[name][place])
                if np.isclose(left, right, rtol=1e-3, atol=1e-7):
                    np.testing.assert_allclose(found, (up - down) / (2 * h), rtol=1e-4, atol=1e-9, err_msg=f"{name}{place}")
                else:  # a link that flows at just its capacity stands at a kink: the gradient lies between those of its sides
                    low, high = sorted((left, right))
                    slack = 1e-4 * max(abs(low), abs(high))
                    assert name == "capacity" and low - slack <= found <= high + slack, (place, found, left, right)


def test_banned_turns_and_closed_centroids_are_kept_out_of() -> None:
    free = onward(transmission(two_routes(), pair(300.0), 0.5 * HOUR, dt=20, theta=1.0))
    banned = onward(transmission(two_routes(turn_bans=[[0, 1]]), pair(300.0), 0.5 * HOUR, dt=20, theta=1.0))
    assert free[2] == 0 < free[0] and banned[0] == 0 < banned[2]
    trips = np.zeros((3, 3))
    trips[0, 1] = 300.0
    closed = transmission(two_routes(zone=[0, 1, 2], through_zones=False), trips, 0.5 * HOUR, dt=20, theta=1.0)
    assert onward(closed)[0] == 0 < onward(closed)[2]
    # but trips may start and end there
    trips[:] = [[0, 0, 90], [0, 0, 0], [0, 90, 0]]
    closed = transmission(two_routes(zone=[0, 1, 2], through_zones=False), trips, 0.5 * HOUR, profile=[1, 0], dt=20, theta=1.0)
    np.testing.assert_allclose(onward(closed), [22.5, 22.5, 0, 0], atol=1e-3)
    np.testing.assert_allclose(closed.ended[-1], 45, rtol=1e-4)


def test_a_zone_inside_the_network_keeps_what_does_not_fit() -> None:
    # zone 1 has links in; its trips wait there until there is room
    network = road(1800, 900)
    network = dataclasses.replace(network, zone=np.array([0, 1, 2]))
    trips = np.zeros((3, 3))
    trips[1, 2] = 1500.0
    run = transmission(network, trips, HOUR, dt=20)
    np.testing.assert_allclose(run.waiting[-1, 1], 600, rtol=0.02)
    np.testing.assert_allclose(run.remaining, run.waiting[-1].sum() + (run.entered - run.left)[-1].sum() + 1500 / 180, rtol=1e-3)


def test_short_links_are_lengthened_and_named() -> None:
    network = road(1800, 1800, 1800, length=np.array([1000.0, 30.0, 600.0]))
    laid = plan(network, HOUR, dt=10)
    assert laid.lengthened.tolist() == [1]
    np.testing.assert_allclose(laid.length, [1000, 100, 600])
    with pytest.raises(BadInput, match=r"step of 10 s is longer than 1 links take, link 2 the shortest; expected at most 3 s"):
        plan(network, HOUR, dt=10, lengthen=False)
    exact = plan(network, HOUR, lengthen=False)
    assert exact.dt <= 3 and not len(exact.lengthened)
    assert isinstance(plan(network, HOUR), Plan)
    # a link without a travel time takes one step
    instant = plan(dataclasses.replace(network, free_speed=np.array([10, 1e12, 10.0])), HOUR, dt=10)
    run = rough_jit(lambda p: simulate(instant, p))(given(instant, pair(1.0)))
    np.testing.assert_allclose(run.free_time, [100, 10, 60])


def test_wrong_numbers_are_named() -> None:
    network = road(1800, node_id=["A", "B"])
    laid = plan(network, HOUR, dt=20)
    with pytest.raises(BadInput, match="from zone A to zone B, interval 1: expected 0 veh/h or more, got -1.0"):
        given(laid, np.stack([pair(1.0), pair(-1.0)]))
    with pytest.raises(BadInput, match="from zone B to zone A: expected a way"):
        given(laid, pair(1.0).T)
    with pytest.raises(BadInput, match=r"expected \[interval, 2, 2\]"):
        given(laid, np.zeros((3, 3)))
    with pytest.raises(BadInput, match="capacity of link 1: expected a finite number of 0 or more, got -5.0"):
        given(laid, pair(1.0), capacity=np.array([-5.0]))
    with pytest.raises(BadInput, match=r"toll: expected \[1\]"):
        given(laid, pair(1.0), toll=np.zeros(3))
    with pytest.raises(BadInput, match="dt: expected seconds of more than 0, got -1"):
        plan(network, HOUR, dt=-1)
    with pytest.raises(BadInput, match="link 1: expected a finite length of more than 0, got 0"):
        plan(dataclasses.replace(network, length=np.zeros(1)), HOUR)
