"""Networks of every format have the counts that their files publish, survive writing and merging, and say what is wrong with them."""

import dataclasses
import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from domains.city import files, geojson, gmns, osm, projection, readers, roads, simplify, sumo_net, synthetic, tntp
from domains.city import network as networks
from domains.city.network import Demand, build, check, find_street
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "mobility"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"real networks are not at {SHARED} (set TWINSIM_SHARED)")


def square(**given) -> networks.Network:
    """Four nodes around a block of 100 m, driven both ways; zones at opposite corners."""
    start, end = [0, 1, 2, 3, 1, 2, 3, 0], [1, 2, 3, 0, 0, 1, 2, 3]
    x, y = np.array([0.0, 100, 100, 0]), np.array([0.0, 0, 100, 100])
    return build(**{"start": start, "end": end, "length": 100.0, "x": x, "y": y, "zone": [0, 2]} | given)


def same(a: networks.Network, b: networks.Network, tolerance: float = 1e-12) -> None:
    for field in dataclasses.fields(networks.Network):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if field.name == "source":
            continue
        if isinstance(one, np.ndarray) and one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-5 if field.name in ("x", "y") else 0, err_msg=field.name)
        elif field.name == "shape" and one is not None:
            for p, q in zip(one, other, strict=True):
                np.testing.assert_allclose(p, q, atol=1e-5)
        else:
            np.testing.assert_array_equal(one, other, err_msg=field.name)


# ---- the vocabulary and its checks


def test_a_sound_network_passes():
    check(square())
    check(square(through_zones=False), Demand(np.array([[0.0, 5], [3, 0]])))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"length": np.array([100.0, 100, np.nan, 100, 100, 100, 100, 100])}, "link 3 from node 3 to 4: expected a finite positive length"),
        ({"free_speed": 0.0}, "link 1 from node 1 to 2: expected a finite positive free_speed in m/s, got 0.0"),
        ({"capacity": -1.0}, "finite positive capacity in veh/h, got -1.0"),
        ({"alpha": np.inf}, "finite alpha of 0 or more, got inf"),
        ({"end": [1, 2, 3, 0, 0, 1, 2, 9], "node_id": ["a", "b", "c", "d"]}, "link 8: its end is node index 9, expected 0 to 3"),
        ({"zone": [0, 0]}, "two zones at the same node"),
        ({"x": np.array([0, np.nan, 1, 1])}, "node 2: expected a position"),
        ({"turn_bans": [[0, 2]]}, "turn ban from link 1 to link 3: expected links that meet"),
        ({"name": ["a", "b"]}, "expected 8 values of name, one a link, got 2"),
    ],
)
def test_what_makes_no_sense_is_named(given, message):
    with pytest.raises(BadInput, match=message):
        check(square(**given))


def test_a_broken_network_names_the_zones():
    one_way = networks.select(square(), np.arange(2))  # 1 -> 2 -> 3 alone
    with pytest.raises(BadInput, match="no way from zone 3 to 1; expected every zone"):
        check(one_way)
    check(one_way, Demand(np.array([[0.0, 5], [0, 0]])))  # nobody wants to go there


def test_closed_centroids_and_turn_bans_cut_ways():
    line = build(start=[0, 1], end=[1, 2], length=100.0, zone=[0, 1, 2])
    assert networks.reached(line)[0, 2]
    assert not networks.reached(dataclasses.replace(line, through_zones=False))[0, 2]
    assert not networks.reached(dataclasses.replace(line, turn_bans=np.array([[0, 1]])))[0, 2]


@pytest.mark.parametrize("trips", [np.array([[0, -1.0], [0, 0]]), np.array([[0, np.nan], [0, 0]])])
def test_trips_below_zero_or_none_are_refused(trips):
    with pytest.raises(BadInput, match="from zone 1 to zone 3: expected trips of 0 or more"):
        check(square(), Demand(trips))
    with pytest.raises(BadInput, match=r"expected trips \[2, 2\]"):
        check(square(), Demand(np.zeros((3, 3))))


def test_find_street_suggests():
    network = square(name=["Hauptstraße", "Hauptstraße", "Mill Lane", "", "", "", "", "Mill Road"])
    np.testing.assert_array_equal(find_street(network, "hauptstrasse"), [0, 1])
    with pytest.raises(BadInput, match="did you mean 'Mill Lane'"):
        find_street(network, "Mil Lane")
    with pytest.raises(BadInput, match="one of the network's 3 street names"):
        find_street(network, "Zzz")


# ---- degrees and metres


def test_utm_agrees_with_proj_and_comes_back():
    # pyproj 3.7.2, EPSG:32632 and EPSG:32756
    for lon, lat, zone, x, y in (
        (9.7, 50.87, 32, 549255.6022508846, 5635601.965798681),
        (151.2093, -33.8688, -56, 334368.633648097, 6250948.345385009),
    ):
        assert projection.utm_zone(np.array([lon]), np.array([lat])) == zone
        np.testing.assert_allclose(projection.to_metres(np.array(lon), np.array(lat), zone), (x, y), atol=1e-6)
    random = np.random.default_rng(0)
    lon, lat = random.uniform(6, 12, 500), random.uniform(-80, 80, 500)
    back = projection.to_degrees(*projection.to_metres(lon, lat, 32), 32)
    np.testing.assert_allclose(back, (lon, lat), atol=1e-10)


def test_point_scale_is_the_derivative_of_the_projection():
    lon, lat, step = np.array([9.0, 10.5, 12.0]), np.full(3, 50.0), 1e-5
    x0, y0 = projection.to_metres(lon, lat, 32)
    x1, y1 = projection.to_metres(lon, lat + step, 32)
    e2 = projection.F * (2 - projection.F)
    meridian = projection.A * (1 - e2) / (1 - e2 * np.sin(np.radians(lat + step / 2)) ** 2) ** 1.5 * np.radians(step)
    np.testing.assert_allclose(projection.point_scale(x0), np.hypot(x1 - x0, y1 - y0) / meridian, rtol=3e-6)


# ---- TNTP

# zones, nodes, links, trips of each README; Beckmann objective and what it is the optimum of, of the data's README
PUBLISHED = {
    "SiouxFalls": ("SiouxFalls", 24, 24, 76, 360600.0, 4231335.287, {}),
    "Anaheim": ("Anaheim", 38, 416, 914, 104694.40, 1286032.2, {}),
    "Barcelona": ("Barcelona", 110, 1020, 2522, 184679.561, 1265654.922, {}),
    "Chicago-Sketch": ("ChicagoSketch", 387, 933, 2950, 1260907.44, 17313018.739, {"toll_weight": 0.02, "distance_weight": 0.04}),
}


@real
@pytest.mark.parametrize("folder", list(PUBLISHED))
def test_tntp_gives_the_published_counts_costs_and_optimum(folder):
    name, zones, nodes, links, trips, objective, weights = PUBLISHED[folder]
    network = readers.read_network(SHARED / "tntp" / folder / f"{name}_net.tntp", **weights)
    demand = tntp.read_trips(SHARED / "tntp" / folder / f"{name}_trips.tntp")
    check(network, demand)
    assert (network.zones, network.nodes, network.links) == (zones, nodes, links)
    assert demand.total == pytest.approx(trips, rel=1e-9)
    v, cost = tntp.read_flows(SHARED / "tntp" / folder / f"{name}_flow.tntp", network)
    toll = np.zeros(links) if network.toll is None else network.toll
    ratio = (v / network.capacity) ** network.beta
    np.testing.assert_allclose((network.free_time * (1 + network.alpha * ratio) + toll) / 60, cost, rtol=1e-9, atol=1e-9)
    # the collection's minutes; the published figure has seven to ten digits
    beckmann = (network.free_time * (v + network.alpha / (network.beta + 1) * v * ratio) + toll * v).sum() / 60
    assert beckmann == pytest.approx(objective, rel=3e-8)
    assert not (network.alpha > 0).any() or network.alpha[network.alpha > 0].min() >= tntp.SMALLEST_B  # fits float32


@real
def test_tntp_positions_and_closed_centroids():
    folder = SHARED / "tntp" / "Anaheim"
    network = tntp.read_network(folder / "Anaheim_net.tntp", folder / "anaheim_nodes.geojson")
    assert not network.through_zones and network.utm == 11
    # most of Anaheim's lengths are feet between its positions
    straight = np.hypot(network.x[network.start] - network.x[network.end], network.y[network.start] - network.y[network.end])
    assert np.median(network.length / straight) == pytest.approx(1.0, abs=0.15)


NET = """<NUMBER OF ZONES> 2
<NUMBER OF NODES> 3
<FIRST THRU NODE> 3
<NUMBER OF LINKS> 4
<ORIGINAL HEADER>~ length (ft)
<END OF METADATA>

~\tinit_node\tterm_node\tcapacity\tlength\tfree_flow_time\tb\tpower\tspeed\ttoll\tlink_type\t;
\t1\t3\t1\t5280\t1\t4e-71\t16.83\t0\t0\t1\t;
\t3\t2\t1800\t0\t2\t0.5\t0\t0\t0\t1\t;
\t2\t3\t1800\t5280\t0\t0.15\t4\t0\t0\t1\t;
\t3\t1\t1800\t5280\t1\t0.15\t4\t0\t0\t1\t;
"""


def test_tntp_traps(tmp_path):
    path = tmp_path / "x_net.tntp"
    path.write_text(NET)
    network = tntp.read_network(path)
    check(network)
    v = 1e4
    t = network.free_time * (1 + network.alpha * (v / network.capacity) ** network.beta)
    assert network.alpha[0] == 0.15
    assert t[0] == pytest.approx(60 * (1 + 4e-71 * v**16.83), rel=1e-9)  # capacity folded into B
    assert (network.alpha[1], t[1]) == (0.0, pytest.approx(60 * 2 * 1.5))  # power 0
    assert network.length[1] == tntp.SHORTEST
    assert network.free_time[2] < 1e-6  # no time at all
    assert network.length[0] == pytest.approx(1609.344)
    assert not network.through_zones


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("\t3\t1\t1800", "\t3\t7\t1800", "link 4 from node 3 to 7: expected nodes 1 to 3"),
        ("capacity\t", "", "there is no capacity"),
        ("\t5280\t1\t4e", "\tnan\t1\t4e", "line 9: expected a finite number, got nan"),
        ("\t1\t3\t1\t5280", "\t1\t3\t1\tlong", "line 9: expected a number, got 'long'"),
        ("\t3\t1\t1800\t5280", "\t3\t1\t1800", "line 12: expected the 10 columns"),
        ("<NUMBER OF LINKS> 4", "<NUMBER OF LINKS> 5", "expected the 5 links it announces, got 4"),
        ("<NUMBER OF NODES> 3", "<NUMBER OF NODES> many", "expected a line `<NUMBER OF NODES> number`, got 'many'"),
        ("<FIRST THRU NODE> 3", "<FIRST THRU NODE> 2", "expected FIRST THRU NODE 1 or 3"),
        ("<NUMBER OF LINKS> 4", "<NUMBER OF LINKS> 10000000", "expected at most 3,000,000 links, got 10,000,000 or more"),
    ],
)
def test_tntp_says_what_is_wrong(tmp_path, old, new, message):
    path = tmp_path / "x_net.tntp"
    assert old in NET
    path.write_text(NET.replace(old, new))
    with pytest.raises(BadInput, match=message):
        tntp.read_network(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("Origin 1\n 3 : 5.0;", "line 3: expected a zone of 1 to 2, got '3'"),
        ("Origin 1\n 2 : nan;", "line 3: expected a finite number"),
        ("Origin 1\n 2 : -4;", "origin 1 destination 2: expected trips of 0 or more, got -4"),
        ("Origin 1\n 2 5", "expected `destination : trips;`"),
        ("<TOTAL OD FLOW> x\nOrigin 1\n 2 : 5;", "metadata: expected a number, got 'x'"),
        ("<TOTAL OD FLOW> 100\nOrigin 1\n 2 : 5;", "expected the 100 trips it announces, got 5.0"),
    ],
)
def test_trips_say_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "x_trips.tntp"
    path.write_text("<NUMBER OF ZONES> 2\n" + text)
    with pytest.raises(BadInput, match=message):
        tntp.read_trips(path)


def test_a_file_of_ten_million_links_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "big_net.tntp"
    with path.open("wb") as file:
        file.truncate(10_000_000 * 300)  # sparse: takes no room, and no time unless it were read
    with pytest.raises(BadInput, match="expected at most 2 GB, got 3.0 GB"):
        tntp.read_network(path)


def test_reading_stops_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINKS", 5)
    folder = tmp_path / "net"
    gmns.write_network(square(), folder)
    with pytest.raises(BadInput, match="expected at most 5 links, got 6 or more"):
        gmns.read_network(folder)
    monkeypatch.setattr(files, "MAX_BYTES", 100_000)
    bomb = tmp_path / "bomb.osm.gz"
    bomb.write_bytes(gzip.compress(b"<osm>" + b" " * 2_000_000))
    with pytest.raises(BadInput, match="once unpacked"):
        osm.read_network(bomb)


# ---- XML


@pytest.mark.parametrize("name", ["x.osm", "x.net.xml"])
def test_xml_from_outside(tmp_path, name):
    path = tmp_path / name
    laughs = "".join(f'<!ENTITY a{k + 1} "{f"&a{k};" * 10}">' for k in range(9))
    path.write_text(f'<?xml version="1.0"?><!DOCTYPE osm [<!ENTITY a0 "lol">{laughs}]><osm>&a9;</osm>')
    with pytest.raises(BadInput, match="without a document type definition"):
        readers.read_network(path)
    path.write_text("<osm><node></osm>")
    with pytest.raises(BadInput, match="expected well-formed XML|expected a whole number"):
        readers.read_network(path)
    path.write_text("<osm></osm>")
    with pytest.raises(BadInput, match="found no"):
        readers.read_network(path)
    with pytest.raises(BadInput, match="expected a file, found nothing"):
        readers.read_network(tmp_path / f"none{name}")
    with pytest.raises(BadInput, match="expected a network as .tntp"):
        readers.read_network(tmp_path / "x.doc")


# ---- OpenStreetMap

# A crossroads at 3, whose western arm is one-way into it; no right turn from the west into the south; a loop at 5.
OSM = """<osm>
<node id="1" lat="50.0" lon="9.000"/> <node id="2" lat="50.0" lon="9.001"/> <node id="3" lat="50.0" lon="9.002"/>
<node id="4" lat="50.0" lon="9.004"/> <node id="5" lat="50.001" lon="9.002"/> <node id="6" lat="49.999" lon="9.002"/>
<node id="7" lat="50.002" lon="9.003"/> <node id="8" lat="50.002" lon="9.001"/>
<way id="10"><nd ref="1"/><nd ref="2"/><nd ref="3"/><tag k="highway" v="secondary"/><tag k="oneway" v="yes"/>
  <tag k="name" v="West Street"/><tag k="lanes" v="2"/><tag k="maxspeed" v="30 mph"/></way>
<way id="11"><nd ref="3"/><nd ref="4"/><tag k="highway" v="primary"/><tag k="lanes" v="4"/></way>
<way id="12"><nd ref="6"/><nd ref="3"/><nd ref="5"/><tag k="highway" v="residential"/><tag k="maxspeed" v="DE:urban"/></way>
<way id="13"><nd ref="5"/><nd ref="7"/><nd ref="8"/><nd ref="5"/><tag k="highway" v="residential"/></way>
<way id="14"><nd ref="4"/><nd ref="7"/><tag k="highway" v="footway"/></way>
<way id="15"><nd ref="4"/><nd ref="7"/><tag k="highway" v="residential"/><tag k="access" v="private"/></way>
<relation id="20"><member type="way" ref="10" role="from"/><member type="node" ref="3" role="via"/>
  <member type="way" ref="12" role="to"/><tag k="type" v="restriction"/><tag k="restriction" v="only_straight_on"/></relation>
<relation id="21"><member type="way" ref="10" role="from"/><member type="node" ref="3" role="via"/>
  <member type="way" ref="11" role="to"/><tag k="type" v="restriction"/><tag k="restriction" v="no_left_turn"/>
  <tag k="except" v="motorcar"/></relation>
</osm>"""


def test_osm_small(tmp_path):
    path = tmp_path / "x.osm"
    path.write_text(OSM)
    network = osm.read_network(path)
    check(network)
    # west 1, east 2, north and south 2 each, the loop two ways round in two halves
    assert network.links == 1 + 2 + 4 + 4
    assert (network.start != network.end).all()
    west = find_street(network, "west street")[0]
    assert (network.lanes[west], network.capacity[west]) == (2, 2 * roads.ROADS["secondary"].lane_capacity)
    assert network.free_speed[west] == pytest.approx(30 * 1609.344 / 3600)
    # 0.002 degrees along the parallel of 50 N on WGS84
    e2 = projection.F * (2 - projection.F)
    radius = projection.A / np.sqrt(1 - e2 * np.sin(np.radians(50)) ** 2) * np.cos(np.radians(50))
    assert network.length[west] == pytest.approx(np.radians(0.002) * radius, rel=1e-5)
    np.testing.assert_array_equal(network.lanes[network.kind == "primary"], 2)  # four lanes, two a direction
    assert network.free_speed[network.link_id == "12#0"] == pytest.approx(50 / 3.6)
    # only to way 12, so not into the east; the other restriction is not for cars
    banned = {(str(network.link_id[a]), str(network.link_id[b])) for a, b in network.turn_bans}
    assert banned == {("10#0", "11#0")}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('lat="49.999"', 'lat="nan"', "node 6: expected lat in degrees, got 'nan'"),
        ('lon="9.004"', "", "node 4: expected lon in degrees, got None"),
        ('<nd ref="6"/>', '<nd ref="six"/>', "expected a whole number for ref, got 'six'"),
        ("highway", "waterway", "expected roads for cars"),
    ],
)
def test_osm_says_what_is_wrong(tmp_path, old, new, message):
    path = tmp_path / "x.osm"
    path.write_text(OSM.replace(old, new))
    with pytest.raises(BadInput, match=message):
        osm.read_network(path)


def test_osm_ways_may_leave_the_extract(tmp_path):
    path = tmp_path / "x.osm"
    path.write_text(OSM.replace('<node id="2" lat="50.0" lon="9.001"/>', ""))
    assert "West Street" not in osm.read_network(path).name


@pytest.mark.parametrize(
    "words, kmh", [("50", 50), ("30 mph", 48.28032), ("DE:zone30", 30), ("FR:urban", 50), ("walk", 7), ("80; 50", 50), ("signals", None)]
)
def test_speeds_in_words(words, kmh):
    assert roads.speed(words) == (None if kmh is None else pytest.approx(kmh))


def test_pbf_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "osmium", None)
    with pytest.raises(BadInput, match=r"pip install 'twinsim\[city\]'"):
        osm.read_network(tmp_path / "x.osm.pbf")


@real
def test_osm_pbf():
    pytest.importorskip("osmium", reason="osmium reads .osm.pbf")
    network = osm.read_network(SHARED / "osm" / "Helsinki.osm.pbf")
    check(network)
    assert network.lon.mean() == pytest.approx(24.95, abs=0.02) and network.lat.mean() == pytest.approx(60.17, abs=0.02)
    assert len(find_street(network, "Mannerheimintie"))
    with pytest.raises(BadInput, match="did you mean 'Mannerheimintie'"):
        find_street(network, "Manerheimintie")


def test_pbf_that_is_none(tmp_path):
    pytest.importorskip("osmium", reason="osmium reads .osm.pbf")
    path = tmp_path / "x.osm.pbf"
    path.write_bytes(b"not a map")
    with pytest.raises(BadInput, match="expected an OpenStreetMap .pbf file"):
        osm.read_network(path)


# ---- SUMO


@real
def test_sumo_bologna():
    path = SHARED / "sumo" / "bologna" / "acosta" / "acosta_buslanes.net.xml"
    network = sumo_net.read_network(path)
    check(network)
    text = path.read_text()
    connections = {tuple(part.split('"')[1:4:2]) for part in text.split("<connection ")[1:]}
    pairs = {(str(network.link_id[a]), str(network.link_id[b])) for a, b in networks.turns(network)}
    assert pairs and pairs <= connections  # nothing is allowed that the file does not connect
    assert {(a, b) for a, b in connections if {a, b} <= set(network.link_id.tolist())} == pairs  # and nothing is lost
    assert network.lon.mean() == pytest.approx(11.32, abs=0.02) and network.lat.mean() == pytest.approx(44.49, abs=0.02)


@real
def test_sumo_and_osm_agree_on_one_town():
    folder = SHARED / "sumo" / "BadHersfeld" / "osm"
    theirs, ours = sumo_net.read_network(folder / "osm_edited.net.xml.gz"), osm.read_network(folder / "osm_bbox.osm.xml.gz")
    # SUMO's edges are named for the OSM ways they come from; some were cut or drawn together by hand since
    way = [np.array([link.split("#")[0] for link in n.link_id.tolist()]) for n in (theirs, ours)]
    both = np.intersect1d(*way)
    assert len(both) > 1500
    course = [np.array([np.hypot(*np.diff(shape, axis=0).T).sum() for shape in n.shape]) for n in (theirs, ours)]
    metres = [
        np.bincount(np.searchsorted(both, w[kept]), c[kept]) for w, c in zip(way, course, strict=True) if (kept := np.isin(w, both)).any()
    ]
    np.testing.assert_allclose(np.percentile(metres[0] / metres[1], [25, 50, 75]), 1.0, atol=2e-4)
    lanes = [n.lanes[np.unique(w, return_index=True)[1]][np.isin(np.unique(w), both)] for n, w in zip((theirs, ours), way, strict=True)]
    assert (lanes[0] == lanes[1]).mean() > 0.95  # SUMO takes two for a primary road without a count
    assert theirs.utm == ours.utm == 32


SUMO = """<net><location netOffset="-500000.00,-5000000.00" projParameter="+proj=utm +zone=32 +ellps=WGS84"/>
<edge id=":b_0" function="internal"><lane id=":b_0_0" index="0" speed="9" length="5"/></edge>
<edge id="ab" from="a" to="b" name="Long Street"><lane id="ab_0" speed="13.89" length="95.0" disallow="tram"/>
<lane id="ab_1" speed="13.89" length="95.0"/></edge>
<edge id="ba" from="b" to="a"><lane id="ba_0" speed="13.89" length="95.0"/></edge>
<edge id="bc" from="b" to="c" type="highway.residential"><lane id="bc_0" speed="8.33" length="195.0"/>
<lane id="bc_1" allow="bus" speed="8.33" length="195"/></edge>
<edge id="bus" from="c" to="b"><lane id="bus_0" speed="8.33" length="195.0" allow="bus taxi"/></edge>
<junction id="a" x="0" y="0"/><junction id="b" x="100" y="0"/><junction id="c" x="100" y="200"/>
<connection from="ab" to="bc" fromLane="0" toLane="0"/></net>"""


def test_sumo_small(tmp_path):
    path = tmp_path / "x.net.xml.gz"
    path.write_bytes(gzip.compress(SUMO.encode()))
    network = sumo_net.read_network(path)
    assert network.link_id.tolist() == ["ab", "ba", "bc"]
    assert network.lanes.tolist() == [2, 1, 1] and network.length.tolist() == [95, 95, 195]
    assert network.capacity.tolist() == [1800, 900, 600]
    assert network.turn_bans.tolist() == [[0, 1], [1, 0]]  # no U-turns: no connection
    assert network.x.tolist() == [500000, 500100, 500100] and network.utm == 32
    plain = tmp_path / "x.net.xml"
    for old, new, message in (
        ('to="c"', 'to="d"', "edge bc: it goes to junction 'd', which the file does not have"),
        ('length="95.0" disallow', 'length="-95.0" disallow', "lane ab_0: expected a positive length"),
        ('speed="8.33" length="195.0"/>', 'speed="nan" length="195.0"/>', "lane bc_0: expected a finite number for speed"),
        ('id="a" x="0"', 'id="a"', "junction a: expected an attribute x, found none"),
    ):
        plain.write_text(SUMO.replace(old, new, 1))
        with pytest.raises(BadInput, match=message):
            sumo_net.read_network(plain)


# ---- merging


def test_chains_merge_to_the_same_length_lanes_and_time():
    # zone 0 - 1 - 2 - 3 zone, both ways, and a cul-de-sac at 2 that nobody needs
    start, end = [0, 1, 2, 3, 2, 1, 2, 4], [1, 2, 3, 2, 1, 0, 4, 2]
    x, y = np.array([0.0, 100, 200, 300, 200]), np.array([0.0, 0, 0, 0, 80])
    speed = np.array([10.0, 20, 10, 10, 20, 10, 5, 5])
    network = build(start=start, end=end, length=100.0, free_speed=speed, x=x, y=y, zone=[0, 3], name=["A", "B"] * 4)
    cut = simplify.drop_dead_ends(network)
    assert (cut.nodes, cut.links) == (4, 6)
    merged = simplify.merge_chains(cut)
    assert (merged.nodes, merged.links) == (2, 2)
    np.testing.assert_allclose(merged.length, 300)
    np.testing.assert_allclose(merged.free_time, [25, 25])
    assert merged.lane_km == pytest.approx(cut.lane_km)
    np.testing.assert_allclose(merged.shape[0][:, 0], [0, 100, 200, 300])
    check(merged)


def test_dead_ends_with_a_zone_stay():
    network = build(start=[0, 1, 1, 2], end=[1, 0, 2, 1], length=100.0, zone=[0, 2])
    assert simplify.drop_dead_ends(network).links == 4


def test_short_links_become_turn_bans_where_there_was_no_way():
    # 0 -> 1, 1 -> 2 short and one-way, 2 -> 3; and 4 -> 2, 1 -> 5: from 4 there is no way to 5
    x, y = np.array([0.0, 100, 110, 210, 110, 100]), np.array([0.0, 0, 0, 0, 100, -100])
    length = np.array([100.0, 10, 100, 100, 100])
    network = build(start=[0, 1, 2, 4, 1], end=[1, 2, 3, 2, 5], length=length, x=x, y=y, zone=[0, 3, 4, 5])
    merged = simplify.merge_short(network, 50)
    assert (merged.nodes, merged.links) == (5, 4)
    assert merged.lane_km == pytest.approx(network.lane_km, rel=1e-12)
    assert [(str(merged.link_id[a]), str(merged.link_id[b])) for a, b in merged.turn_bans] == [("4", "5")]
    np.testing.assert_array_equal(networks.reached(merged), networks.reached(network))


@real
@pytest.mark.parametrize("path", ["sumo/Wildau/Netzmodell2.net.xml.gz", "sumo/BadHersfeld/osm/osm_bbox.osm.xml.gz"])
def test_merging_a_town_keeps_its_lane_kilometres_and_its_ways(path):
    town = simplify.add_gates(readers.read_network(SHARED / path))
    town = simplify.drop_dead_ends(simplify.largest_part(town))
    chained = simplify.merge_chains(town)
    merged = simplify.merge_short(chained)
    for one in (chained, merged):
        assert one.lane_km == pytest.approx(town.lane_km, rel=1e-9)
        np.testing.assert_array_equal(networks.reached(one), networks.reached(town))
    assert chained.free_time @ chained.lanes == pytest.approx(town.free_time @ town.lanes, rel=1e-9)
    roads_only = merged.kind != "connector"
    assert (merged.length[roads_only] < simplify.SHORTEST).mean() < 0.05 < (town.length < simplify.SHORTEST).mean()
    ready = simplify.prepare(readers.read_network(SHARED / path), 12)
    check(ready)
    assert ready.zones > 12 and not ready.through_zones


def test_a_map_of_dead_ends_leaves_nothing():
    with pytest.raises(BadInput, match="nothing is left"):
        simplify.simplify(build(start=[0, 1], end=[1, 0], length=100.0, x=[0, 100], y=[0, 0]))


def test_zones_want_room():
    with pytest.raises(BadInput, match="expected 2 to 1 zones for 2 junctions, got 5"):
        simplify.add_zones(square(), 5)


# ---- writers


def test_gmns_comes_back(tmp_path):
    city = synthetic.city(3).network
    bans = networks.turns(city)[::50]
    shape = tuple(np.array([[city.x[a], city.y[a]], [city.x[b], city.y[b]]]) for a, b in zip(city.start, city.end, strict=True))
    network = dataclasses.replace(city, turn_bans=bans, toll=np.linspace(0, 9, city.links), shape=shape)
    gmns.write_network(network, tmp_path / "net")
    same(network, readers.read_network(tmp_path / "net"))
    local = square()
    gmns.write_network(local, tmp_path / "local")
    same(local, gmns.read_network(tmp_path / "local"))


@real
def test_gmns_keeps_a_tntp_network(tmp_path):
    network = tntp.read_network(SHARED / "tntp" / "Anaheim" / "Anaheim_net.tntp")
    gmns.write_network(network, tmp_path)
    same(network, gmns.read_network(tmp_path))


@pytest.mark.parametrize(
    "file, old, new, message",
    [
        ("link.csv", "to_node_id", "to", "expected a column to_node_id"),
        ("link.csv", "1,,1,2,1,", "1,,1,99,1,", "line 2: link 1 has to_node_id '99', expected a node_id of node.csv"),
        ("link.csv", "1,,1,2,1,0.1,", "1,,1,2,1,nan,", "line 2: expected a finite number for length, got nan"),
        ("link.csv", "1,,1,2,1,0.1,", "1,,1,2,1,,", "line 2: link 1: expected a positive length, got ''"),
        ("link.csv", "1,,1,2,1,0.1,", "1,1,2,1,0.1,", "line 2: expected 12 values"),
        ("link.csv", "2,,2,3,", "1,,2,3,", "expected each link_id once, got '1' twice"),
        ("node.csv", "2,100.0", "1,100.0", "expected each node_id once, got '1' twice"),
        ("config.csv", "km", "furlong", "expected long_length of km"),
    ],
)
def test_gmns_says_what_is_wrong(tmp_path, file, old, new, message):
    gmns.write_network(square(), tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(BadInput, match=message):
        gmns.read_network(tmp_path)


@pytest.mark.parametrize(
    "crs, utm", [("EPSG:25832", 32), ("epsg:32633", 33), ("EPSG:32756", -56), ("EPSG:26911", 11), ("local metres", None)]
)
def test_gmns_projections(tmp_path, crs, utm):
    gmns.write_network(square(x=np.array([5e5, 500100, 500100, 5e5]), y=np.array([5.5e6, 5.5e6, 5500100, 5500100])), tmp_path)
    (tmp_path / "config.csv").write_text((tmp_path / "config.csv").read_text().replace("local metres", crs))
    network = gmns.read_network(tmp_path)
    assert network.utm == utm and (network.lon is None) == (utm is None) and network.x[1] == 500100
    if utm == 32:
        np.testing.assert_allclose(network.lon, [9, 9.0014, 9.0014, 9], atol=1e-4)


@pytest.mark.parametrize("crs", ["EPSG:4258", "EPSG:4269", "NAD83", "OGC:CRS84", "WGS 84"])
def test_gmns_degrees(tmp_path, crs):
    gmns.write_network(square(), tmp_path)
    (tmp_path / "config.csv").write_text(f"crs,speed\n{crs},m/s\n")
    text = (tmp_path / "node.csv").read_text().replace("100.0", "0.001").replace("0.0,", "0.0000001,")
    (tmp_path / "node.csv").write_text(text)
    network = gmns.read_network(tmp_path)
    assert network.utm == 31 and network.x[1] - network.x[0] == pytest.approx(111.3, abs=0.3)  # the equator, 3 degrees off the middle
    np.testing.assert_allclose(network.free_speed, 50)


@pytest.mark.parametrize(
    "config, message",
    [
        ("crs\nEPSG:31256\n", "expected crs of WGS84, .*, or 'local metres' for any other system in metres, got 'EPSG:31256'"),
        ("speed\nknots\n", "expected speed of kph, .*, got 'knots'"),
        ("long_length\nm\n", "link.csv: expected lengths of about the distance between nodes, got 0.001 times as much in the median"),
    ],
)
def test_gmns_units_that_cannot_be(tmp_path, config, message):
    gmns.write_network(square(), tmp_path)
    (tmp_path / "config.csv").write_text(config)
    with pytest.raises(BadInput, match=message):
        gmns.read_network(tmp_path)


def test_gmns_movements_are_what_is_allowed(tmp_path):
    # a crossing: from the west (link 1) and the south (2) to the east (3), the north (4) and back to the west (5)
    x, y = np.array([0.0, 100, 100, 200, 100]), np.array([100.0, 0, 100, 100, 200])
    cross = build(start=[0, 1, 2, 2, 2], end=[2, 2, 3, 4, 0], length=100.0, x=x, y=y, turn_bans=[[0, 3], [0, 4]])
    gmns.write_network(cross, tmp_path)
    same(cross, gmns.read_network(tmp_path))
    path = tmp_path / "movement.csv"
    rows = [",".join(line.split(",")[1:]) for line in path.read_text().splitlines()]
    assert rows == ["node_id,ib_link_id,ob_link_id,type,capacity", "3,1,3,thru,", "3,2,3,right,", "3,2,4,thru,", "3,2,5,left,"]
    shut = dataclasses.replace(cross, turn_bans=networks.turns(dataclasses.replace(cross, turn_bans=None)))
    gmns.write_network(shut, tmp_path)
    same(shut, gmns.read_network(tmp_path))
    assert path.read_text().splitlines()[1].endswith(",0")
    path.write_text("mvmt_id,node_id,ib_link_id,ob_link_id,prohibited\n1,3,1,4,1\n")
    with pytest.raises(BadInput, match="expected a column type"):
        gmns.read_network(tmp_path)
    path.write_text("mvmt_id,node_id,ib_link_id,ob_link_id,type\n1,3,1,9,left\n")
    with pytest.raises(BadInput, match="line 2: expected ob_link_id of a link of link.csv at node 3, got '9'"):
        gmns.read_network(tmp_path)


def test_gmns_links_for_others_and_two_way_turns(tmp_path):
    (tmp_path / "node.csv").write_text("node_id,x_coord,y_coord\na,0,200\nb,900,200\nc,1800,200\n")
    table = 'link_id,from_node_id,to_node_id,directed,length,allowed_uses\n1,a,b,0,0.9,\n2,b,c,0,0.9,"auto,walk"\n'
    (tmp_path / "link.csv").write_text(table + '3,a,c,1,1.8,walk\n4,a,c,1,1.8,"bike,walk"\n')
    moves = "mvmt_id,node_id,ib_link_id,ob_link_id,type,allowed_uses\n"
    (tmp_path / "movement.csv").write_text(moves + "1,b,1,2,thru,\n2,b,2,1,thru,auto\n3,b,1,1,uturn,walk\n4,c,3,2,uturn,walk\n")
    network = gmns.read_network(tmp_path)
    assert network.link_id.tolist() == ["1", "1-", "2", "2-"]
    assert network.link_id[network.turn_bans].tolist() == [["1", "1-"], ["2-", "2"]]  # nobody turns round at b


def test_gmns_zones_are_one_node_each_and_open_unless_they_are_centroids(tmp_path):
    node = "node_id,x_coord,y_coord,node_type,zone_id\na,0,200,{},2\nb,900,200,{},1\nc,1800,200,{},{}\n"
    (tmp_path / "link.csv").write_text("link_id,from_node_id,to_node_id,directed,length\n1,a,b,0,0.9\n2,b,c,0,0.9\n")
    (tmp_path / "node.csv").write_text(node.format("", "", "", 3))
    network = gmns.read_network(tmp_path)
    check(network)
    assert network.through_zones and network.node_id[network.zone].tolist() == ["b", "a", "c"]
    (tmp_path / "node.csv").write_text(node.format(*["centroid"] * 3, 3))
    with pytest.raises(
        BadInput, match=r"no way from zone a to c.*nobody drives through a centroid here \(through_zones of a GMNS config.csv"
    ):
        check(gmns.read_network(tmp_path))
    (tmp_path / "config.csv").write_text("through_zones\n1\n")
    check(gmns.read_network(tmp_path))
    (tmp_path / "node.csv").write_text(node.format("", "", "", 1))
    with pytest.raises(BadInput, match="expected one node a zone, got b and c with zone_id '1'; node_type centroid marks"):
        gmns.read_network(tmp_path)
    (tmp_path / "node.csv").write_text(node.format("centroid", "centroid", "", 1))
    assert gmns.read_network(tmp_path).zones == 2


def test_gmns_two_way_links_miles_and_defaults(tmp_path):
    (tmp_path / "config.csv").write_text("long_length,speed\nmi,mph\n")
    (tmp_path / "node.csv").write_text("node_id,x_coord,y_coord,zone_id\na,9.0,50.0,1\nb,9.01,50.0,2\n")
    (tmp_path / "link.csv").write_text("link_id,from_node_id,to_node_id,directed,length,free_speed,facility_type\n1,a,b,0,0.5,30,primary\n")
    network = gmns.read_network(tmp_path)
    check(network)
    assert network.link_id.tolist() == ["1", "1-"] and network.utm == 32
    np.testing.assert_allclose(network.length, 804.672)
    np.testing.assert_allclose(network.free_speed, 30 * 1609.344 / 3600)
    np.testing.assert_allclose(network.capacity, 1500)


def test_geojson_has_each_link_where_it_lies(tmp_path):
    network = synthetic.city(1).network
    flow = np.arange(network.links, dtype=float)
    path = geojson.write_network(network, tmp_path / "x.geojson", {"flow": flow})
    features = json.loads(path.read_text())["features"]
    assert len(features) == network.links
    lon, lat = np.array([f["geometry"]["coordinates"][0] for f in features]).T
    x, y = projection.to_metres(lon, lat, network.utm)
    np.testing.assert_allclose(np.stack([x, y]), np.stack([network.x, network.y])[:, network.start], atol=0.02)  # seven decimals
    np.testing.assert_array_equal([f["properties"]["flow"] for f in features], flow)
    with pytest.raises(BadInput, match="expected a network with lon and lat"):
        geojson.write_network(square(), tmp_path / "y.geojson")
    with pytest.raises(BadInput, match="values of flow, one a link"):
        geojson.write_network(network, tmp_path / "y.geojson", {"flow": flow[1:]})


# ---- the made-up city


@pytest.mark.parametrize("seed", range(4))
def test_the_synthetic_city_is_one(seed):
    city = synthetic.city(seed)
    network = city.network
    check(network)
    assert 300 < network.links < 800 and network.zones == 24 == len(city.district) == len(set(city.district))
    assert network.population.sum() == pytest.approx(120_000, abs=20) and network.jobs.sum() == pytest.approx(60_000, abs=20)
    assert not network.through_zones and "connector" in network.kind
    straight = np.hypot(network.x[network.start] - network.x[network.end], network.y[network.start] - network.y[network.end])
    assert (network.length >= 0.999 * straight).all()
    # few bridges: four streets and the ring road twice, each both ways
    names = {name for name in network.name if name.endswith("Bridge")}
    assert len(names) == 4
    for name in names | {"Ring Road"}:
        assert len(find_street(network, name)) >= 2
    # work lies nearer the heart than homes do
    away = np.hypot(network.x[network.zone] - city.centre[0], network.y[network.zone] - city.centre[1])
    assert away @ network.jobs / network.jobs.sum() < away @ network.population / network.population.sum()


def test_the_river_parts_the_city():
    """Without its bridges and the ring road it falls apart."""
    city = synthetic.city(0)
    network = city.network
    bridge = np.array([name.endswith("Bridge") or name == "Ring Road" for name in network.name])
    assert not networks.reached(networks.select(network, ~bridge)).all()


def test_the_same_seed_gives_the_same_city():
    same(synthetic.city(5).network, synthetic.city(5).network, 0)
    assert not np.array_equal(synthetic.city(5).network.x[:50], synthetic.city(6).network.x[:50])
    big = synthetic.city(2, population=1e6, radius=9000, districts=60, towns=8, bridges=7)
    check(big.network)
    assert big.network.links > 2000 and big.network.zones == 68
    with pytest.raises(BadInput, match="expected towns of 2 to 8, got 1"):
        synthetic.city(0, towns=1)
