"""What is written for SUMO says what the network says, and, where SUMO is installed, drives as the equilibrium has it."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import sparse

from domains.city import sumo, sumo_net
from domains.city.calibration import guessed_trips
from domains.city.equilibrium import Paths, equilibrium
from domains.city.network import Network, build, turns
from domains.city.synthetic import city
from twinsim.base import BadInput


def there_is_sumo() -> bool:
    try:
        return bool(sumo.program("sumo") and sumo.program("netconvert"))
    except BadInput:
        return False


needs_sumo = pytest.mark.skipif(not there_is_sumo(), reason=f"SUMO is not installed: {sumo.INSTALL}")


def crossing() -> Network:
    """Two-way roads from node 0 to 1, 2 and 3; no left turn from 1 to 2; zone 0 at node 4 with a connector from and to 1, zone 1 at 3."""
    start, end = np.array([(1, 0), (0, 1), (0, 2), (2, 0), (0, 3), (3, 0), (4, 1), (1, 4)]).T
    kind = ["secondary"] * 6 + ["connector"] * 2
    return build(
        start=start, end=end, length=300.0, lanes=[2, 1, 1, 1, 1, 1, 1, 1], name=['"Ring" & Co', *[""] * 7], kind=kind,
        x=[0, -300, 0, 300, -400], y=[0, 0, 300, 0, 10], zone=[4, 3], through_zones=False, turn_bans=[[0, 2]],
    )  # fmt: skip


def town(trips: float) -> tuple[Network, np.ndarray]:
    network = city(seed=3, districts=5, towns=2, radius=2000, block=600).network
    shape = guessed_trips(network).trips
    return network, shape * trips / shape.sum()


def parsed(file: Path) -> list[dict[str, str]]:
    return [each.attrib for each in ElementTree.parse(file).getroot()]


# ---------------------------------------------------------------- what is written


def test_plain_files_say_what_the_network_says(tmp_path: Path) -> None:
    network = crossing()
    nodes, edges, connections = (parsed(file) for file in sumo.write_network(network, tmp_path))
    assert [node["id"] for node in nodes] == ["n0", "n1", "n2", "n3"]  # the centroid with its connectors stays away
    assert [(float(node["x"]), float(node["y"])) for node in nodes] == [(300, 0), (0, 0), (300, 300), (600, 0)]
    assert [edge["id"] for edge in edges] == [f"e{k}" for k in range(6)]
    assert edges[0] == {"id": "e0", "from": "n1", "to": "n0", "numLanes": "2", "speed": "13.889", "length": "300.00", "name": '"Ring" & Co'}
    pairs = {(each["from"], each.get("to")) for each in connections}
    street = {(f"e{a}", f"e{b}") for a, b in turns(network).tolist() if max(a, b) < 6}
    ends = {(f"e{k}", None) for k in range(6)} - {(a, None) for a, _ in street}  # at the zone's node nobody goes on
    assert pairs == street | ends and ("e0", "e2") not in pairs and ("e0", "e4") in pairs


def test_nobody_turns_round_where_no_ban_is_known(tmp_path: Path) -> None:
    network = dataclasses.replace(crossing(), turn_bans=None)
    connections = {(each["from"], each.get("to")) for each in parsed(sumo.write_network(network, tmp_path)[2])}
    assert ("e0", "e1") not in connections and ("e0", "e2") in connections
    assert ("e2", "e3") in connections  # there is no other way on


def test_vehicles_are_those_of_the_paths(tmp_path: Path) -> None:
    network = crossing()
    found = equilibrium(network, np.array([[0.0, 144.0], [80.0, 0.0]]))
    count = sumo.write_routes(network, found.paths, tmp_path / "routes.xml", seconds=4500)
    rows = parsed(tmp_path / "routes.xml")
    routes = {row["id"]: row["edges"] for row in rows if "edges" in row}
    vehicles = [row for row in rows if "depart" in row]
    assert sorted(routes.values()) == ["e0 e4", "e5 e1"] and count == len(vehicles) == 180 + 100
    taken = [routes[vehicle["route"]] for vehicle in vehicles]
    assert taken.count("e0 e4") == 180 and taken.count("e5 e1") == 100
    times = [float(vehicle["depart"]) for vehicle in vehicles]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= 4500
    assert abs(np.mean(times) - 2250) < 5 * 4500 / np.sqrt(12 * 280)
    again = tmp_path / "again.xml"
    sumo.write_routes(network, found.paths, again, seconds=4500)
    assert again.read_bytes() == (tmp_path / "routes.xml").read_bytes()


def test_fractions_of_vehicles_are_kept_on_the_mean(tmp_path: Path) -> None:
    network, trips = town(50.0)
    found = equilibrium(network, trips)
    counts = [sumo.write_routes(network, found.paths, tmp_path / "r.xml", seconds=3600, seed=seed) for seed in range(20)]
    assert abs(np.mean(counts) - 50) < 5 * np.sqrt(len(found.paths.flow) / 4 / 20)


def test_a_path_that_passes_a_node_twice_is_put_in_order(tmp_path: Path) -> None:
    # 0 -> 1, round the block 1 -> 2 -> 3 -> 1, then 1 -> 4: the turn from the first to the last link is banned
    start, end = np.array([(0, 1), (1, 2), (2, 3), (3, 1), (1, 4)]).T
    network = build(start=start, end=end, length=100.0, x=np.arange(5.0), y=np.arange(5.0), zone=[0, 4], turn_bans=[[0, 4], [3, 1]])
    found = equilibrium(network, np.array([[0, 10.0], [0, 0]]))
    sumo.write_routes(network, found.paths, tmp_path / "routes.xml", seconds=3600)
    assert next(row["edges"] for row in parsed(tmp_path / "routes.xml") if "edges" in row) == "e0 e1 e2 e3 e4"


def test_a_way_of_connectors_alone_has_no_vehicles(tmp_path: Path) -> None:
    network = crossing()
    paths = Paths(sparse.csr_matrix(np.eye(8)[[6]]), np.zeros(1, int), np.zeros(1, int), np.ones(1, int), np.array([100.0]))
    assert sumo.write_routes(network, paths, tmp_path / "routes.xml") == 0


def test_what_sumo_measured_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        '<meandata><interval begin="0" end="3600"><edge id="e2" entered="7" departed="3" sampledSeconds="1800" speed="10"/>'
        '<edge id=":n0_1" entered="9"/></interval></meandata>'
    )
    (tmp_path / "e.xml").write_text('<meandata><interval><edge id="e2" CO2_abs="5000" NOx_abs="20"/></interval></meandata>')
    found = sumo.read_measured(crossing(), tmp_path / "t.xml", tmp_path / "e.xml")
    np.testing.assert_array_equal(found.flow, [0, 0, 10, 0, 0, 0, np.nan, np.nan])
    assert (found.speed[2], found.vehicle_hours[2], found.co2[2], found.nox[2]) == (10, 0.5, 5, 0.02)
    assert np.isnan(found.speed[0])


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected a network with positions"):
        sumo.write_network(dataclasses.replace(crossing(), x=np.full(5, np.nan)), tmp_path)
    with pytest.raises(BadInput, match="expected modes meso or micro, got macro"):
        sumo.cross_check(crossing(), np.zeros((2, 2)), modes=["macro"])
    monkeypatch.delenv("SUMO_HOME", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BadInput, match=r"SUMO's program netconvert: .* pip install 'twinsim\[sumo\]'"):
        sumo.cross_check(crossing(), np.array([[0.0, 10.0], [0.0, 0.0]]))


# ---------------------------------------------------------------- with SUMO


@needs_sumo
def test_netconvert_builds_the_network_that_was_written(tmp_path: Path) -> None:
    network = crossing()
    found = equilibrium(network, np.array([[0.0, 144.0], [80.0, 0.0]]))
    sumo.simulate(network, found.paths, folder=tmp_path)
    (tmp_path / "net.xml").rename(tmp_path / "back.net.xml")
    back = sumo_net.read_network(tmp_path / "back.net.xml")
    order = [back.link_id.tolist().index(f"e{k}") for k in range(6)]
    np.testing.assert_allclose(back.length[order], network.length[:6])
    np.testing.assert_allclose(back.free_speed[order], network.free_speed[:6], atol=0.01)
    np.testing.assert_array_equal(back.lanes[order], network.lanes[:6])
    ours = {(f"e{a}", f"e{b}") for a, b in turns(network).tolist() if max(a, b) < 6}
    assert {(back.link_id[a], back.link_id[b]) for a, b in turns(back).tolist()} == ours


@needs_sumo
def test_light_traffic_is_the_same_in_sumo() -> None:
    network, trips = town(600.0)
    report, rows = sumo.cross_check(network, trips)
    for mode, slower in (("meso", 0.9), ("micro", 0.8)):
        one = report[mode]
        assert one["GEH_below_5"] == 1 and one["waiting"] == one["teleports"] == 0
        assert abs(one["km"] / one["our_km"] - 1) < 0.05  # 600 vehicles are there or not by chance: 4 %
        assert slower < one["speed"] / one["our_speed"] < 1.02
    # what HBEFA4 gives at the same flows and speeds; meso vehicles do not brake at junctions
    assert abs(report["micro"]["co2_kg_at_its_speeds"] / report["micro"]["co2_kg"] - 1) < 0.1
    assert rows[0] == ["", "ours", "SUMO meso", "SUMO micro"] and all(len(row) == 4 for row in rows)


@needs_sumo
def test_what_sumo_refuses_is_one_sentence() -> None:
    network, trips = town(10.0)
    with pytest.raises(BadInput, match="SUMO's sumo refused what it was given: .*") as error:
        sumo.simulate(network, equilibrium(network, trips).paths, vehicle="no_such_car")
    assert "\n" not in str(error.value)
