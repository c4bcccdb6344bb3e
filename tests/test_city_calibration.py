"""Calibration finds the trips that made the counts, its gradient is the equilibrium's, and wrong counts are answered in one sentence."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from domains.city import calibration, gmns, place
from domains.city.calibration import Spread, calibrate, draws, fit, geh, guessed_trips, read_trips, sensitivity, with_zones
from domains.city.counts import Counts, read_counts
from domains.city.equilibrium import equilibrium
from domains.city.network import Network, build
from domains.city.sumo_net import read_network
from domains.city.synthetic import city
from twinsim import cli
from twinsim.base import BadInput

ROOT = Path(__file__).parents[1]
WILDAU = Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")) / "data" / "mobility" / "sumo" / "Wildau"
WIDE = Spread(3.0, 2.0, 1.0, 1.0, 1.0)


def linear(ends: list[tuple[int, int]], time: list[float], slope: list[float], zone: list[int]) -> Network:
    """Links of travel time `time + slope * flow`, s."""
    start, end = np.array(ends).T
    t, s = np.array(time, float), np.array(slope, float)
    return build(start=start, end=end, length=t, free_speed=1.0, capacity=t / np.maximum(s, 1e-9), alpha=1.0, beta=1.0, zone=zone)


def two_routes() -> Network:
    # 10 + v1 = 20 + 2 v2, v1 + v2 = T: v1 = (10 + 2 T) / 3
    return linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])


def pair(trips: float) -> np.ndarray:
    return np.array([[0.0, trips], [0.0, 0.0]])


def counted(network: Network, trips: np.ndarray, links: np.ndarray) -> Counts:
    return Counts(links, equilibrium(network, trips, 1e-10).flow[links])


def town() -> tuple[Network, np.ndarray]:
    """A small city and congested trips in it."""
    network = city(seed=3, districts=5, towns=2, radius=2000, block=600).network
    trips = guessed_trips(network).trips
    return network, trips * 4000 / trips.sum()


# ---------------------------------------------------------------- statistics


def test_geh_is_its_formula() -> None:
    np.testing.assert_allclose(geh(np.array([120.0, 0, 8, 50]), np.array([100.0, 0, 0, 50])), [np.sqrt(2 * 400 / 220), 0, 4, 0])


def test_fit_of_known_numbers() -> None:
    found = fit(np.array([110.0, 300, 400]), np.array([100.0, 200, 300]))
    np.testing.assert_allclose(found.share, 1 / 3)  # GEH 0.98, 6.3, 5.3
    np.testing.assert_allclose(found.rmse_percent, 100 * np.sqrt((100 + 10000 + 10000) / 3) / 200)
    np.testing.assert_allclose(found.r2, 1 - 20100 / 20000)
    assert np.isnan(fit(np.ones(2), np.ones(2)).r2)


# ---------------------------------------------------------------- gradient


def test_sensitivity_of_two_routes_is_their_closed_form() -> None:
    network, trips = two_routes(), pair(25.0)
    rise = sensitivity(network, trips, equilibrium(network, trips, 1e-10), np.array([0, 1])).toarray()
    # dv1/dT = t2' / (t1' + t2'); the logit is this sharp, not infinitely so
    np.testing.assert_allclose(rise[:, 1], [2 / 3, 1 / 3], rtol=0.01)
    np.testing.assert_allclose(rise[:, 1].sum(), 1, rtol=1e-6)
    assert (rise[:, [0, 2, 3]] == 0).all()
    sharp = sensitivity(network, trips, equilibrium(network, trips, 1e-10), np.array([0]), sharpness=1e4).toarray()
    np.testing.assert_allclose(sharp[0, 1], 2 / 3, rtol=1e-5)


def test_sensitivity_is_that_of_finite_differences() -> None:
    network, trips = town()
    found = equilibrium(network, trips, 1e-12)
    links = np.argsort(found.flow)[-12:]
    rise = sensitivity(network, trips, found, links, sharpness=1e4)
    for origin, destination in ((0, 3), (4, 1), (2, 6)):
        step = np.zeros_like(trips)
        step[origin, destination] = 0.01 * trips[origin, destination]
        ends = [equilibrium(network, trips + sign * step, 1e-12).flow[links] for sign in (1, -1)]
        exact = (ends[0] - ends[1]) / (2 * step.sum())
        ours = rise[:, [origin * network.zones + destination]].toarray().ravel()
        np.testing.assert_allclose(ours, exact, atol=2e-3 * np.abs(exact).max())


# ---------------------------------------------------------------- the fit


def test_one_count_on_two_routes_finds_the_trips() -> None:
    network = two_routes()
    found = calibrate(network, pair(10.0), Counts(np.array([0]), np.array([(10 + 2 * 25) / 3])), tolerance=1e-3, spread=WIDE)
    np.testing.assert_allclose(found.trips, pair(25.0), rtol=1e-4)
    np.testing.assert_allclose(found.flow, 20, rtol=1e-4)
    assert found.converged and found.held_out is None  # one count cannot be left out
    assert found.after.share == 1


def test_trips_are_found_exactly_where_counts_tell_them_all() -> None:
    # each pair of three zones has a road of its own
    ends = [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)]
    network = linear(ends, [10] * 6, [0.01] * 6, zone=[0, 1, 2])
    true = np.array([[0.0, 300, 150], [90, 0, 700], [40, 520, 0]])
    prior = np.full((3, 3), 100.0)
    found = calibrate(network, prior, counted(network, true, np.arange(6)), tolerance=1e-3, spread=WIDE, folds=0)
    np.testing.assert_allclose(found.trips, true + 100 * np.eye(3), rtol=1e-4)  # within a zone they stay
    assert found.moved["total"] == pytest.approx(true.sum(), rel=1e-4)


def test_counts_of_a_known_matrix_are_met_from_a_wrong_prior() -> None:
    network, trips = town()
    wrong = trips * np.exp(np.random.default_rng(0).normal(0.3, 0.5, trips.shape))
    wrong[0, 1] = 0.0
    links = np.argsort(equilibrium(network, trips).flow)[-30:]
    found = calibrate(network, wrong, counted(network, trips, links), tolerance=0.1, spread=Spread(1, 0.5, 0.5, 0.5, 0.5), folds=0)
    assert found.after.geh.max() < 1 < found.before.geh.mean()
    assert found.objective[-1] < 0.1 * found.objective[0]
    assert found.trips[0, 1] == 0 and (found.trips >= 0).all()
    off = ~np.eye(len(trips), dtype=bool) & (wrong > 0)

    def apart(some: np.ndarray) -> float:
        return float(np.sqrt(np.mean(np.log(some[off] / trips[off]) ** 2)))

    assert apart(found.trips) < 0.9 * apart(wrong)  # 30 counts do not tell 42 pairs


def test_level_alone_keeps_the_shape_of_the_prior() -> None:
    network, trips = town()
    links = np.argsort(equilibrium(network, trips).flow)[-10:]
    found = calibrate(network, 3 * trips, counted(network, trips, links), spread=Spread.level_only(), tolerance=0.01)
    np.testing.assert_allclose(found.trips, trips, rtol=1e-3)
    assert found.moved["common_part"] == pytest.approx(1)
    assert found.held_out is not None and found.held_out.share == 1  # counts that agree predict each other


def test_nothing_moves_where_the_prior_is_right_or_may_not_be_left() -> None:
    network, trips = two_routes(), pair(25.0)
    right = calibrate(network, trips, counted(network, trips, np.array([0, 1])), folds=0)
    np.testing.assert_allclose(right.trips, trips, rtol=1e-6)
    bound = calibrate(network, trips, Counts(np.array([0]), np.array([90.0])), spread=Spread.level_only(0.0))
    np.testing.assert_allclose(bound.trips, trips)


def test_parts_are_left_out_together() -> None:
    network, trips = town()
    links = np.argsort(equilibrium(network, trips).flow)[-4:]
    found = calibrate(network, 2 * trips, counted(network, trips, links), folds=np.array([0, 0, 1, 1]))
    assert found.held_out_flow is not None and np.isfinite(found.held_out_flow).all()


def test_draws_vary_as_the_counts_leave_it_open() -> None:
    # one pair, one link: variance of ln trips = 1 / (1 / deviation^2 + J^2)
    network = linear([(0, 1)], [10], [0], zone=[0, 1])
    found = calibrate(network, pair(100.0), Counts(np.array([0]), np.array([100.0])), spread=Spread.level_only(0.5))
    J = found.sensitivity.toarray()[0, 1]
    many = np.log(draws(found, 4000)[:, 0, 1] / found.trips[0, 1])
    np.testing.assert_allclose(many.std(), (1 / 0.5**2 + J**2) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(J, 100 / np.sqrt(100.5), rtol=0.01)  # GEH is nearly (m - c) / sqrt(c), for m near c
    np.testing.assert_array_equal(draws(found, 2, seed=1), draws(found, 2, seed=1))


# ---------------------------------------------------------------- gravity


def test_gravity_keeps_the_trip_ends() -> None:
    network, _ = town()
    assert network.population is not None and network.jobs is not None
    trips, ends = guessed_trips(network).trips, 0.1 * (network.population + network.jobs)
    np.testing.assert_allclose(trips.sum(0), ends, rtol=1e-6)
    np.testing.assert_allclose(trips.sum(1), ends, rtol=1e-3)
    assert (np.diag(trips) == 0).all()


# ---------------------------------------------------------------- files


def test_counts_are_read_from_every_format(tmp_path: Path) -> None:
    network = two_routes()
    (tmp_path / "edges.xml").write_text(
        '<meandata><interval begin="0" end="1800"><edge id="1" entered="10"/><edge id="2" entered="0"/></interval></meandata>'
    )
    (tmp_path / "cadyts.xml").write_text(
        '<measurements><singlelink link="1" start="0" end="1800" value="10" stddev="8" type="COUNT_VEH"/>'
        '<singlelink link="2" start="0" end="1800" value="0" type="FLOW_VEH_H"/></measurements>'
    )
    (tmp_path / "plain.csv").write_text("link,count\n1,20\n2,0\n")
    for name in ("edges.xml", "cadyts.xml", "plain.csv"):
        found = read_counts(tmp_path / name, network)
        assert found.link.tolist() == [0, 1] and found.flow.tolist() == [20, 0]
    single = linear([(0, 1), (1, 0)], [10, 10], [1, 1], zone=[0, 1])
    (tmp_path / "ends.csv").write_text("from_node_id,to_node_id,hour,count\n2,1,7,5\n2,1,8,6\n")
    found = read_counts(tmp_path / "ends.csv", single, hour=8)
    assert found.link.tolist() == [1] and found.flow.tolist() == [6]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("link,count\n1,nan\n", "line 2: expected a finite number for count, got nan"),
        ("link,count\n1,-3\n", "link 1: expected a count of 0 or more veh/h, got -3"),
        ("link,count\n1,many\n", "line 2: expected a number for count, got 'many'"),
        ("link,count\nhigh street 1,5\n", "the network has no link 'high street 1'; did you mean 'high street'"),
        ("link,count\nzzz,5\n", "the network has no link 'zzz', nor one of its 2 that is like it"),
        ("link,count\n1,5\n1,6\n", "expected each link once, got link 1 again"),
        ("link,hour,count\n1,7,5\n1,8,6\n", "links are counted in several hours; expected hour=, one of 7, 8"),
        ("link,hour,count\n1,7,5\nhigh street,8,6\n", "links are counted in several hours; expected hour=, one of 7, 8"),
        ("link,hour,count\n1,7,5\n1,7.5,6\n", "expected each link once, got link 1 again"),
        ("road,count\n1,5\n", "expected columns link (or from_node_id and to_node_id) and count"),
        ("link,count\n1\n", "line 2: expected 2 values"),
        ("link,count\n", "expected counts, found none"),
        ("from_node_id,to_node_id,count\n1,2,5\n", "expected one link from node 1 to node 2, found 2: 1, high street"),
        ("from_node_id,to_node_id,count\n1,9,5\n", "the network has no node '9'"),
    ],
)
def test_wrong_counts_are_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    network = linear([(0, 1), (0, 1)], [10, 20], [1, 2], zone=[0, 1])
    network.link_id[:] = ["1", "h"]
    network = build(**{name: getattr(network, name) for name in ("start", "end", "length", "zone")}, link_id=["1", "high street"])
    (tmp_path / "counts.csv").write_text(text)
    with pytest.raises(BadInput) as error:
        read_counts(tmp_path / "counts.csv", network)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<net/>", "expected SUMO's edge data (<meandata>) or Cadyts' <measurements>, got <net>"),
        ('<meandata><interval begin="5" end="5"/></meandata>', "expected begin before end"),
        ('<meandata><interval begin="0" end="9"><edge id="1" speed="3"/></interval></meandata>', "expected an attribute entered"),
        ('<measurements><singlelink link="1" start="0" end="9" value="3" type="TRAVELTIME"/></measurements>', "expected type COUNT_VEH"),
    ],
)
def test_wrong_xml_counts_are_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "counts.xml").write_text(text)
    with pytest.raises(BadInput, match="counts.xml") as error:
        read_counts(tmp_path / "counts.xml", two_routes())
    assert says in str(error.value)


def test_what_cannot_be_calibrated_is_one_sentence() -> None:
    # link 3 leads from a zone to nowhere, link 4 is reached by nobody
    network = linear([(0, 1), (0, 1), (0, 2), (3, 1)], [10, 20, 5, 5], [1, 2, 0, 0], zone=[0, 1])
    prior = pair(10.0)

    def refused(match: str, link: int = 0, flow: float = 5.0, trips: np.ndarray = prior, **options) -> None:
        with pytest.raises(BadInput, match=match):
            calibrate(network, trips, Counts(np.array([link]), np.array([flow])), **options)

    refused("count on link 3 from node 1 to 3: no trip of the prior can reach it", link=2)
    refused("count on link 4 from node 4 to 2: no trip of the prior can reach it", link=3)
    refused("count on link 1: expected 0 or more veh/h, got nan", flow=float("nan"))
    refused("count on link 1: expected 0 or more veh/h, got -1", flow=-1.0)
    refused("expected counted links 0 to 3, got 9", link=9)
    refused("expected a prior with trips between zones", trips=np.eye(2))
    refused(r"expected a prior \[2, 2\], one row and column a zone, got \[3, 3\]", trips=np.ones((3, 3)))
    refused("prior from zone 1 to zone 2: expected trips of 0 or more, got -1", trips=pair(10) - np.array([[0, 11.0], [-1, 0]]))
    refused("expected a tolerance above 0", tolerance=0.0)
    refused("expected a spread.pair of 0 or more, got -1", spread=Spread(pair=-1))
    refused("expected 0 or 2 to 1 folds for 1 counts, got 3", folds=3)
    calibrate(network, prior, Counts(np.array([0, 2]), np.array([5.0, 0.0])), folds=0)  # a count of nothing where nothing comes is right


def test_a_link_on_nobodys_way_is_told() -> None:
    network = linear([(0, 1), (0, 1)], [10, 50], [0, 0], zone=[0, 1])
    found = calibrate(network, pair(10.0), Counts(np.array([0, 1]), np.array([20.0, 5.0])), folds=0)
    assert found.unreached.tolist() == [1]


# ---------------------------------------------------------------- real counts


@pytest.mark.skipif(not WILDAU.is_dir(), reason=f"no folder {WILDAU}")
def test_wildaus_real_counts_are_met() -> None:
    raw = read_network(WILDAU / "Netzmodell2.net.xml.gz")
    network = with_zones(raw, 30)
    counts = read_counts(WILDAU / "edgedata-file_Wildau.xml", network)
    assert len(counts.link) == 18
    measured = read_counts(WILDAU / "cadyts" / "measurements.xml", network)
    np.testing.assert_allclose(measured.flow, counts.flow, rtol=0.02)  # the same counts, of an interval that is 90 s longer
    found = calibrate(network, guessed_trips(network), counts, folds=0)
    assert found.before.share < 0.6 < 0.85 <= found.after.share
    assert found.converged


# ---------------------------------------------------------------- the command


@pytest.fixture
def files(tmp_path: Path) -> Path:
    network, trips = town()
    gmns.write_network(network, tmp_path / "net")
    links = np.argsort(equilibrium(network, trips).flow)[-8:]
    flow = equilibrium(network, trips).flow[links]
    rows = [f"{network.link_id[link]},{each}" for link, each in zip(links, flow, strict=True)]
    (tmp_path / "counts.csv").write_text("\n".join(["link,count", *rows, ""]))
    return tmp_path


def call(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["calibrate", *words])
    return code, *capsys.readouterr()


def test_the_command_writes_the_fit(files: Path, capsys: pytest.CaptureFixture) -> None:
    out = files / "fitted"
    words = ["city", f"network={files / 'net'}", f"counts={files / 'counts.csv'}", f"out={out}", "folds=2"]
    code, said, _ = call(capsys, *words)
    assert code == 0 and "fitted    GEH below 5 on 100.0% of 8 counts" in said and f"calibration: {out}" in said
    told = json.loads((out / "fit.json").read_text())
    assert told["after"]["GEH_below_5"] == 1 and told["before"]["RMSE_percent"] > told["after"]["RMSE_percent"] and "held_out" in told
    assert (out / "scatter.svg").read_text().count("GEH below 5") == 1
    network = gmns.read_network(out / "gmns")
    np.testing.assert_array_equal(read_trips(out / "gmns" / "demand.csv", network), read_trips(out / "trips.npz", network))
    assert len((out / "counts.csv").read_text().splitlines()) == 9
    assert cli.main(["verify", str(out)]) == 0
    # what was fitted is a prior that needs no more
    code, said, _ = call(capsys, *words[:3], f"out={files / 'again'}", f"prior={out / 'trips.npz'}", "folds=0")
    assert code == 0 and "prior     GEH below 5 on 100.0% of 8 counts" in said
    code, _, error = call(capsys, *words)
    assert code == 2 and "expected the name of a new folder as out=" in error


def test_counts_are_fitted_with_the_delay_at_junctions(files: Path) -> None:
    network, trips = town()
    driven = place.stopped(network, place.junction_delay(network, 12.0))
    flow = equilibrium(driven, trips).flow
    links = np.argsort(flow)[-20:]
    rows = [f"{network.link_id[link]},{flow[link]}" for link in links]
    (files / "counts.csv").write_text("\n".join(["link,count", *rows, ""]))
    np.savez(files / "trips.npz", trips=trips)
    given = {"network": str(files / "net"), "counts": str(files / "counts.csv"), "prior": str(files / "trips.npz"), "folds": 0}
    calibration.calibrate_files(files / "with", **given)
    calibration.calibrate_files(files / "without", **given, junction_delay=0.0)
    before = [json.loads((files / name / "fit.json").read_text())["before"]["RMSE_percent"] for name in ("with", "without")]
    assert before[0] < 0.1 < 1 < before[1]
    np.testing.assert_allclose(gmns.read_network(files / "with" / "gmns").free_speed, network.free_speed)


def test_a_fit_has_nothing_of_one_that_was_killed(files: Path, capsys: pytest.CaptureFixture) -> None:
    left = files / "fitted.partial"
    left.mkdir()
    (left / "trips_of_another_fit.csv").write_text("1")
    (files / "city").mkdir()  # the name of the choice is no path
    (files / "fit.yaml").write_text("calibrate: city\nnetwork: net\ncounts: counts.csv\nfolds: 0\n")
    code, _, error = call(capsys, str(files / "fit.yaml"), f"out={files / 'fitted'}")
    assert code == 0, error
    assert not list(files.rglob("trips_of_another_fit.csv")) and (files / "fitted" / "fit.json").exists()


def test_the_command_takes_a_yaml_file(files: Path, capsys: pytest.CaptureFixture) -> None:
    (files / "mine.yaml").write_text("calibrate: city\nnetwork: net\ncounts: counts.csv\nspread:\n  pair: 0.1\nfolds: 0\n")
    code, said, _ = call(capsys, str(files / "mine.yaml"), f"out={files / 'x'}", "spread.way=0.05")
    assert code == 0 and (files / "x" / "fit.json").exists()
    assert "pair: 0.1\n" in (files / "x" / "config.yaml").read_text() and "way: 0.05\n" in (files / "x" / "config.yaml").read_text()
    code, said, _ = call(capsys, str(files / "mine.yaml"), "--cfg")
    assert code == 0 and "tolerance: 1.0" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "calibrate: expected one of city, tosses, or a YAML file"),
        (["cty"], "no calibrate is called cty, did you mean city?"),
        (["city"], "config: counts, network: expected a value, got none; give it as counts=VALUE"),
        (["city", "netwrk=x"], "no value is called netwrk, did you mean network?"),
        (["city", "network=NET", "counts=none.csv"], "none.csv: expected a file, found nothing"),
        (["city", "network=none.net.xml", "counts=COUNTS"], "none.net.xml: expected a file, found nothing"),
        (["city", "network=NET", "counts=COUNTS", "prior=p.txt"], "p.txt: expected a prior as gravity"),
        (["city", "network=NET", "counts=COUNTS", "tolerance=much"], "tolerance: expected a number, got 'much'"),
        (["city", "network=NET", "counts=COUNTS", "tolerance=0"], "expected a tolerance above 0"),
        (["city", "network=NET", "counts=COUNTS", "spread.pear=1"], "did you mean spread.pair?"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_the_command_answers_mistakes_and_leaves_nothing(files: Path, capsys: pytest.CaptureFixture, words: list[str], says: str) -> None:
    given = [word.replace("NET", str(files / "net")).replace("COUNTS", str(files / "counts.csv")) for word in words]
    before = sorted(files.iterdir())
    code, _, error = call(capsys, *given, *([f"out={files / 'out'}"] if words and words[0] == "city" else []))
    assert code == 2 and says in error and error.count("\n") == 1
    assert sorted(path for path in files.iterdir() if path.name != ".out.lock") == before


def test_a_demand_table_is_read_by_the_zones_own_names(tmp_path: Path) -> None:
    network = dataclasses.replace(linear([(0, 1), (1, 2), (2, 0)], [10] * 3, [1] * 3, zone=[0, 1, 2]), zone_id=np.array(["3", "101", "4"]))
    gmns.write_network(network, tmp_path / "net")
    network = gmns.read_network(tmp_path / "net")
    assert network.zone_names == ["3", "4", "101"] and network.node_id[network.zone].tolist() == ["1", "3", "2"]
    table = tmp_path / "demand.csv"
    table.write_text("o_zone_id,d_zone_id,volume\n3,101,100\n101,4,7\n")
    trips = read_trips(table, network)
    np.testing.assert_array_equal(trips, [[0, 0, 100], [0, 0, 0], [0, 7, 0]])
    found = calibrate(network, trips, Counts(np.array([0]), np.array([90.0])), folds=0)
    calibration._write(found, network, "demand.csv", tmp_path)
    written = tmp_path / "gmns" / "demand.csv"
    assert written.read_text().splitlines()[1].startswith("3,101,")
    np.testing.assert_array_equal(read_trips(written, gmns.read_network(tmp_path / "gmns")), found.trips)
    table.write_text("o_zone_id,d_zone_id,volume\n3,2,100\n")
    with pytest.raises(BadInput, match="line 2: the network has no zone '2'; its zones are 3, 4, 101"):
        read_trips(table, network)
