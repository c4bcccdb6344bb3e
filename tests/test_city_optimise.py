"""Tolls and green splits: closed forms, the system optimum, gradients against differences, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from roads import linear, pair
from scipy.optimize import brentq

from domains.city import dispersion, gmns, place
from domains.city import optimise as optimisation
from domains.city.calibration import guessed_trips
from domains.city.equilibrium import equilibrium
from domains.city.network import Network, build, courses
from domains.city.optimise import Air, Levers, Measure, Model, all_roads, optimise, signals
from domains.city.synthetic import city
from domains.city.traffic import Response
from domains.city.weather import Background
from twinsim import cli
from twinsim.base import BadInput


def tolls(links: list[int], most: float) -> Levers:
    return Levers(np.array(links), np.full(len(links), most))


def town() -> tuple[Network, np.ndarray]:
    """A small city and congested trips in it."""
    network = city(seed=3, districts=5, towns=2, radius=2000, block=600).network
    trips = guessed_trips(network).trips
    return network, trips * 4000 / trips.sum()


# ---------------------------------------------------------------- tolls


def test_pigous_toll_leads_to_three_quarters_of_the_time() -> None:
    # 100 s, or 0.1 s a vehicle: all 1000 take the second, 100 s each; best are 500 on either, at a toll of 50 s
    network = linear([(0, 1), (0, 1)], [100, 0], [0, 0.1], zone=[0, 1])
    found = optimise(network, pair(1000.0), tolls([1], 200.0))
    np.testing.assert_allclose(found.values_before["time"], 1000 * 100 / 3600, rtol=1e-5)
    np.testing.assert_allclose(found.values_after["time"] / found.values_before["time"], 0.75, rtol=1e-4)
    np.testing.assert_allclose(found.toll, [0, 50], atol=1.0)
    assert found.converged and found.aim[-1] == pytest.approx(0.75, rel=1e-4) and abs(found.smooth - found.aim[-1]) < 1e-3


def test_braess_tolls_win_back_what_the_new_road_lost() -> None:
    ends, base, slope = [(0, 2), (2, 1), (0, 3), (3, 1), (2, 3)], [0, 50, 50, 0, 10], [10, 1, 1, 10, 1]
    network = linear(ends, base, slope, zone=[0, 1])
    found = optimise(network, pair(6.0), tolls([0, 1, 2, 3, 4], 60.0))
    np.testing.assert_allclose([found.values_before["time"], found.values_after["time"]], [6 * 92 / 3600, 6 * 83 / 3600], rtol=1e-3)


def test_toll_of_two_bpr_routes_is_the_difference_of_marginal_costs() -> None:
    free, capacity, trips = np.array([600.0, 900.0]), np.array([1000.0, 2000.0]), 3000.0
    network = build(start=[0, 0], end=[1, 1], length=free, free_speed=1.0, capacity=capacity, zone=[0, 1])

    def external(v: np.ndarray) -> np.ndarray:
        return 4 * free * 0.15 * (v / capacity) ** 4  # v dt/dv

    def uneven(first: float) -> float:
        v = np.array([first, trips - first])
        marginal = free * (1 + 0.15 * (v / capacity) ** 4) + external(v)
        return float(marginal[0] - marginal[1])

    first = brentq(uneven, 1.0, trips - 1.0)
    best = np.array([first, trips - first])
    found = optimise(network, pair(trips), tolls([0], 2000.0))
    np.testing.assert_allclose(found.after.flow, best, rtol=5e-3)
    toll = external(best)
    np.testing.assert_allclose(found.toll[0], toll[0] - toll[1], rtol=0.02)  # flat about the optimum
    least = best @ (free * (1 + 0.15 * (best / capacity) ** 4)) / 3600
    np.testing.assert_allclose(found.values_after["time"], least, rtol=1e-5)


def test_where_nothing_can_be_gained_nothing_is_lost() -> None:
    network = linear([(0, 1), (0, 1)], [10, 10], [1, 1], zone=[0, 1])
    found = optimise(network, pair(20.0), tolls([0], 30.0), rounds=2)
    np.testing.assert_allclose(found.after.flow, 10, rtol=1e-3)
    assert found.values_after["time"] <= found.values_before["time"]
    # nor from a bad beginning that cannot be left
    bad = optimise(network, pair(20.0), tolls([0], 30.0), start=np.array([1.0]), rounds=1)
    assert bad.values_after["time"] <= bad.values_before["time"] and bad.aim[0] > 1


def test_trips_that_answer_to_cost_agree_with_it() -> None:
    # one way: a toll only keeps trips off, and the least time is at the highest toll
    network, response = linear([(0, 1)], [100], [0.1], zone=[0, 1]), Response(2e-3, 0.6)
    found = optimise(network, pair(1000.0), tolls([0], 120.0), response=response)
    np.testing.assert_allclose(found.toll, 120, rtol=1e-6)
    trips = brentq(lambda q: q - 1000 * float(response(np.array(100 + 0.1 * q + 120 - 200))), 1, 1000)
    np.testing.assert_allclose(found.after.flow, trips, rtol=1e-5)
    np.testing.assert_allclose(found.smooth, found.aim[-1], rtol=1e-4)


# ---------------------------------------------------------------- green


def junction(flow: tuple[float, float]) -> tuple[Network, np.ndarray]:
    """Two roads that cross at node 2: 0 to 3 and 1 to 4."""
    x, y = [0, 100, 100, 200, 100], [100, 0, 100, 100, 200]
    network = build(
        start=[0, 1, 2, 2], end=[2, 2, 3, 4], length=100.0, free_speed=10.0, capacity=800.0, x=x, y=y, zone=[0, 1, 3, 4],
        turn_bans=[[0, 3], [1, 2]], name=["West Street", "South Street", "East Street", "North Street"],
    )  # fmt: skip
    trips = np.zeros((4, 4))
    trips[0, 2], trips[1, 3] = flow
    return network, trips


@pytest.mark.parametrize("flow", [(600.0, 600.0), (600.0, 400.0)])
def test_green_goes_in_proportion_to_the_flow(flow: tuple[float, float]) -> None:
    # sum of v t0 a (v / (s g))^b is least where v_i / g_i is the same for all: equal green for equal flows
    network, trips = junction(flow)
    levers = Levers(np.zeros(0, int), np.zeros(0), signals(network, [2], lost=0.1, least=0.05))
    found = optimise(network, trips, levers, start=np.array([1.0, -0.5]))
    np.testing.assert_allclose(found.green, 0.9 * np.array(flow) / sum(flow), rtol=2e-3)
    np.testing.assert_allclose(found.capacity[:2], 2 * 800 * np.array(flow) / sum(flow), rtol=2e-3)
    np.testing.assert_allclose(found.capacity[2:], 800)


def test_opposite_approaches_share_a_phase() -> None:
    x, y = [0, 100, 200, 100, 100], [100, 0, 100, 200, 100]  # four arms about node 4
    arms = list(range(4))
    network = build(start=arms + [4] * 4, end=[4] * 4 + arms, length=100.0, x=x, y=y, zone=[0, 1])
    found = signals(network)
    assert found.junction.tolist() == [4, 4] and found.approach.tolist() == arms and found.phase.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(found.saturation, 1800 * 2 / 0.9)
    levers = Levers(np.zeros(0, int), np.zeros(0), found)
    with jax.enable_x64():
        np.testing.assert_allclose(levers.apply(network, levers.nothing)[1], network.capacity)  # as it is today
        np.testing.assert_allclose(levers.green(np.array([3.0, -6.0])).sum(), 0.9)
        assert levers.green(np.array([6.0, -6.0])).min() >= 0.1
    alone = signals(build(start=arms, end=[4] * 4, length=100.0, zone=[0]))  # without a map
    assert alone.phase.tolist() == arms


# ---------------------------------------------------------------- gradient, measures


@pytest.mark.parametrize("response", [None, pytest.param(Response(), marks=pytest.mark.slow)])
def test_gradient_is_that_of_differences(response: Response | None) -> None:
    network, trips = town()
    levers = Levers(all_roads(network), np.full(len(all_roads(network)), 300.0), signals(network))
    model = Model(network, trips, levers, {"time": 1.0}, Measure.of(network), response, 1e-8)
    now = model.settle_today()
    smooth = model.smooth(now.found.paths, now)
    random = np.random.default_rng(0)
    x = np.where(np.arange(levers.size) < len(levers.links), random.uniform(0, 0.2, levers.size), random.normal(0, 0.3, levers.size))
    gradient = smooth(x, 0.05)[1]
    for way in (gradient / np.linalg.norm(gradient), random.normal(size=levers.size) / np.sqrt(levers.size)):
        ends = [smooth(x + step * way, 0.05)[0] for step in (1e-4, -1e-4)]
        np.testing.assert_allclose(gradient @ way, (ends[0] - ends[1]) / 2e-4, rtol=1e-3)


def test_no2_is_what_traffic_adds_by_the_chemistry_of_dispersion() -> None:
    air = Air(np.array([[2e-3, 1e-3], [0.0, 0.0]]), np.array([100.0, 300.0]), 3e-3, Background())
    nox, primary = jnp.array([5e-3, 1e-2], jnp.float32), jnp.array([1e-3, 2e-3], jnp.float32)
    back = air.background
    clean, dirty = (float(dispersion.no2(n, p, back.nox, back.no2, back.o3, 3e-3)) for n, p in ((0.0, 0.0), (20.0, 4.0)))
    np.testing.assert_allclose(air.no2(nox, primary), (dirty - clean) * 0.25, rtol=1e-3)  # a quarter of the people breathe it


def test_an_aim_of_co2_is_made_less_where_the_way_is_shorter() -> None:
    # the detour is quicker and three times as long
    network = build(start=[0, 0], end=[1, 1], length=[1000.0, 3000.0], free_speed=[8.0, 25.0], capacity=2000.0, zone=[0, 1])
    found = optimise(network, pair(1000.0), tolls([1], 100.0), {"CO2": 1.0}, rounds=4)
    assert found.values_after["CO2"] < 0.7 * found.values_before["CO2"] and found.values_after["time"] > found.values_before["time"]


# ---------------------------------------------------------------- mistakes


def test_what_cannot_be_optimised_is_one_sentence() -> None:
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])

    def refused(match: str, levers: Levers, **options) -> None:
        with pytest.raises(BadInput, match=match):
            optimise(network, pair(10.0), levers, **options)

    refused("there is nothing to optimise", tolls([], 1.0))
    with pytest.raises(BadInput, match="expected trips .* with some between zones"):
        optimise(network, pair(0.0), tolls([0], 1.0))
    refused("toll of link 2: expected a highest toll above 0 s, got -1", tolls([1], -1.0))
    refused("expected some of time, CO2, NOx, NO2, got 'tme'; did you mean time", tolls([0], 1.0), aim={"tme": 1.0})
    refused("aim.time: expected a weight of 0 or more, got -1", tolls([0], 1.0), aim={"time": -1.0})
    refused("expected a weight above 0", tolls([0], 1.0), aim={"time": 0.0, "CO2": 0.0})
    refused("NO2: expected a city with people", tolls([0], 1.0), aim={"NO2": 1.0})
    refused("expected 1 variables to start from", tolls([0], 1.0), start=np.zeros(3))
    with pytest.raises(BadInput, match="signals at node 1: expected roads of two phases"):
        signals(network, [0])
    with pytest.raises(BadInput, match="signals at node 2: 2 phases of 0.5 of the cycle or more do not fit in the 0.9"):
        signals(network, [1], least=0.5)
    with pytest.raises(BadInput, match="signals: expected a lost share"):
        signals(network, lost=1.0)


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    network, trips = junction((600.0, 400.0))
    gmns.write_network(network, tmp_path / "net")
    np.savez(tmp_path / "trips.npz", trips=trips)
    return tmp_path


def call(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["optimise", *words])
    return code, *capsys.readouterr()


def test_the_command_writes_the_optimum(files: Path, capsys: pytest.CaptureFixture) -> None:
    out = files / "best"
    words = ["city", f"network={files / 'net'}", f"demand={files / 'trips.npz'}", "signals.where=nodes", "signals.names=[3]", "rounds=2"]
    code, said, error = call(capsys, *words, "tolls.where=streets", "tolls.names=[east street]", f"out={out}")
    assert code == 0 and "vehicle hours an hour (-" in said and f"optimisation: {out}" in said, error
    told = json.loads((out / "optimum.json").read_text())
    assert told["after"]["time"] < told["before"]["time"] and told["aim_over_todays"][-1] < 1 and len(told["rounds"]) == 2
    assert (out / "map.png").stat().st_size > 10_000 and "promised by the smooth model" in (out / "convergence.svg").read_text()
    trips = np.load(out / "trips.npz")["trips"]
    roads = gmns.read_network(out / "gmns")
    again = equilibrium(place.stopped(roads, place.junction_delay(roads)), trips, 1e-7)  # what is written is what was judged
    np.testing.assert_allclose(again.total_time / 3600, told["after"]["time"], rtol=1e-6)
    splits = (out / "splits.csv").read_text().splitlines()
    assert splits[1].startswith("3,1,1,West Street,0.54") and splits[2].startswith("3,2,2,South Street,0.36") and len(splits) == 3
    assert (out / "tolls.csv").read_text().splitlines()[1].startswith("3,East Street,")
    assert (out / "streets.csv").read_text().splitlines()[1].startswith("East Street,")
    assert cli.main(["verify", str(out)]) == 0
    assert "twinsim optimise city network=" in (out / "ro-crate-metadata.json").read_text()


def test_people_of_an_own_network_live_off_its_roads(tmp_path: Path) -> None:
    network, trips = town()
    gmns.write_network(replace(network, population=None, jobs=None), tmp_path / "net")
    np.savez(tmp_path / "trips.npz", trips=trips)
    given = str(tmp_path / "net"), str(tmp_path / "trips.npz"), {}, 40
    own, read = optimisation._city(*given, 5000.0, True)
    np.testing.assert_array_equal(read, trips)
    assert own.people.sum() == pytest.approx(5000)
    a, b, _ = courses(network, own.roads)
    assert min(place._apart(point, a, b) for point in own.receptors) >= place.NEAREST
    with pytest.raises(BadInput, match="expected people and jobs of each zone in the file, or population= for the whole"):
        optimisation._city(*given, None, True)
    assert optimisation._city(*given, None, False)[0].people.sum() == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "optimise: expected one of city, robotics, or a YAML file"),
        (["city", "network=NET"], "expected network= and demand= together"),
        (
            ["city", "tolls.where=rods"],
            "tolls.where: expected one of roads, streets, districts, cordon, none, got 'rods'; did you mean roads?",
        ),
        (["city", "tolls.where=none"], "there is nothing to optimise"),
        (["city", "tolls.most=-1"], "tolls.most: expected a highest toll above 0 euro, got -1"),
        (["city", "tolls.unit=pound"], "tolls.unit: expected euro or s"),
        (
            ["city", "tolls.where=streets", "tolls.names=[Markt Street]"],
            "street 'Markt Street': the network has none of that name; did you mean 'Market Street'",
        ),  # fmt: skip
        (
            ["city", "tolls.where=cordon", "tolls.names=[Old Twon]"],
            "district 'Old Twon': the city has none of that name; did you mean 'Old Town'",
        ),
        (["city", "tolls.where=cordon"], "tolls.names: expected names of districts for tolls.where=cordon, got none"),
        (["city", "signals.where=nodes", "signals.names=[x9]"], "signals at node 'x9': the network has none"),
        (["city", "aim.time=0"], "aim: expected a weight above 0"),
        (["city", "value_of_time=0"], "value_of_time: expected euro/h above 0"),
        (["city", "rounds=0"], "rounds: expected 1 or more, got 0"),
        (["city", "rond=3"], "optimise: no value is called rond, did you mean rounds?"),
    ],
)
def test_the_command_answers_mistakes_and_leaves_nothing(files: Path, capsys: pytest.CaptureFixture, words: list[str], says: str) -> None:
    given = [word.replace("NET", str(files / "net")) for word in words]
    if words and "names" not in " ".join(words) and not any(word.startswith("network=") for word in words):
        given += [f"network={files / 'net'}", f"demand={files / 'trips.npz'}"]  # quicker than the made-up city, whose names others need
    before = sorted(files.iterdir())
    code, _, error = call(capsys, *given, *([f"out={files / 'out'}"] if words else []))
    assert code == 2 and says in error and error.count("\n") == 1
    assert sorted(path for path in files.iterdir() if path.name != ".out.lock") == before
