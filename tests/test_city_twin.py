"""The city twin: recorded days, what interventions do, traffic before and after, the air, questions, and what is written."""

import dataclasses
import json
import re
import sqlite3
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from domains.city import days, emissions, gmns, interventions, outputs, place, questions, results, traffic
from domains.city.domain import COUNTING, CityTwin, _shared
from domains.city.interventions import FAILS, MEETS
from domains.city.network import build
from domains.city.weather import STABILITIES, Winds
from twinsim import cli
from twinsim.base import BadInput

SMALL = {"population": 40_000, "radius": 1600.0, "block": 500.0, "districts": 5, "towns": 2, "bridges": 1}
SPLITS = {"train": ("2023-01-01", "2023-02-20"), "test": ("2023-02-21", "2023-03-20")}


@pytest.fixture(scope="module")
def twin():
    town = place.synthetic(1, spacing=500.0, **SMALL)
    return CityTwin("city/twin", town, days.simulated(town, days=80), SPLITS)


@pytest.fixture(scope="module")
def network(twin):
    return twin.place.network


@pytest.fixture(scope="module")
def state(twin, network):
    given = (network.free_speed, network.capacity, np.zeros(network.links), network.zones, len(days.PERIODS))
    return interventions.base(*given, twin.fleet, len(twin.place.receptors))


def scenario(*wanted: dict, **more) -> questions.CityScenario:
    words = {"title": "T", "domain": "city/twin", "asks": "?", "command": "c", "takes": "t", "expect": "e", "members": 2}
    return questions.CityScenario.model_validate_json(json.dumps({**words, "interventions": list(wanted), **more}))


def both(before: interventions.City, after: interventions.City) -> interventions.City:
    return jax.tree.map(lambda a, b: np.stack([np.asarray(a), np.asarray(b)]), before, after)


PHYSICS: dict[int, Any] = {}  # of a twin, compiled once


def simulated(twin, asked):
    """Outcomes of two recorded days under a scenario, `[day, ...]`, the question, and its conditions of both days."""
    physics = PHYSICS.setdefault(id(twin), jax.jit(jax.vmap(twin.simulate)))
    question = twin.ask(asked, None)
    sample, _ = twin.days(np.arange(3, 5))
    condition = {name: np.repeat(value, 2, axis=0) for name, value in question.condition.items()}
    return jax.device_get(physics(sample, condition, jax.random.split(jax.random.key(0), 2))), question, condition


# ---------------------------------------------------------------- recorded days


def test_the_simulated_record_is_that_of_its_seed_and_shows_a_week(twin):
    again = days.simulated(twin.place, days=80)
    xr.testing.assert_identical(again, twin.record)
    trips, weekday = twin.record["trips"].values, days.weekday_of(twin.record["time"].values)
    assert weekday[0] == 6 and (trips == np.floor(trips)).all()  # 1 January 2023 was a Sunday; vehicles are whole
    total = trips.sum((1, 2, 3))
    assert total[weekday < 5].mean() > 1.15 * total[weekday == 6].mean()
    assert (np.einsum("dpzz->dpz", trips) == 0).all()
    assert days.LENGTHS.sum() == 24 and sorted(np.concatenate([period.hours for period in days.PERIODS])) == list(range(24))


def test_a_record_is_read_back_and_what_is_wrong_in_it_is_named(twin, tmp_path):
    path = tmp_path / "days.nc"
    twin.record.drop_attrs().to_netcdf(path)
    read = days.recorded(twin.place, str(path), "CC-BY-4.0")
    np.testing.assert_array_equal(read["trips"].values, twin.record["trips"].values)
    assert read.attrs["license"] == "CC-BY-4.0" and len(read.attrs["inputs"][0]["sha256"]) == 64
    within = twin.record.drop_attrs().copy(deep=True)
    within["trips"][:2, 0, 1, 1] = 50.0
    within.to_netcdf(tmp_path / "within.nc")
    read = days.recorded(twin.place, str(tmp_path / "within.nc"))
    np.testing.assert_array_equal(read["trips"].values, twin.record["trips"].values)
    assert f", without the 100 of {twin.record['trips'].values.sum() + 100:,.0f} trips within zones" in read.attrs["source"]
    named = twin.record.drop_attrs().assign_coords(destination=list(twin.place.zone_name))
    turned = named.isel(period=slice(None, None, -1), origin=slice(None, None, -1), destination=slice(None, None, -1))
    turned.to_netcdf(tmp_path / "turned.nc")
    np.testing.assert_array_equal(days.recorded(twin.place, str(tmp_path / "turned.nc"))["trips"].values, twin.record["trips"].values)
    named.assign_coords(origin=["Nowhere", *twin.place.zone_name[1:]]).to_netcdf(tmp_path / "nowhere.nc")
    with pytest.raises(BadInput, match="origin: expected .*, each once, or no names, got 'Nowhere'"):
        days.recorded(twin.place, str(tmp_path / "nowhere.nc"))
    twin.record.drop_attrs().drop_vars("time").to_netcdf(tmp_path / "timeless.nc")
    with pytest.raises(BadInput, match="expected a coordinate time of dates"):
        days.recorded(twin.place, str(tmp_path / "timeless.nc"))
    first, second = twin.place.zone_name[1], twin.place.zone_name[2]
    for value in (np.nan, -3.0):
        broken = twin.record.drop_attrs().copy(deep=True)
        broken["trips"][4, 2, 1, 2] = value
        broken.to_netcdf(tmp_path / f"broken{value}.nc")
        with pytest.raises(BadInput, match=f"trips from {first} to {second} on 2023-01-05, evening 16-19 h: expected 0 or more, got"):
            days.recorded(twin.place, str(tmp_path / f"broken{value}.nc"))
    twin.record.drop_attrs().isel(period=slice(3)).to_netcdf(tmp_path / "short.nc")
    with pytest.raises(BadInput, match="expected 4 along period, got 3"):
        days.recorded(twin.place, str(tmp_path / "short.nc"))
    (tmp_path / "text.nc").write_text("no")
    with pytest.raises(BadInput, match="expected a NetCDF file"):
        days.recorded(twin.place, str(tmp_path / "text.nc"))


def test_every_table_of_a_folder_is_an_input(tmp_path):
    gmns.write_network(place.made_up.city(1, **SMALL).network, tmp_path)
    inputs = place.read(str(tmp_path), spacing=500.0, licence="ODbL-1.0").inputs
    assert {each["name"] for each in inputs} == {"node.csv", "link.csv", "config.csv", "zone.csv"}
    assert all(each["licence"] == "ODbL-1.0" and len(each["sha256"]) == 64 and each["size"] > 20 for each in inputs)
    (tmp_path / "link.csv").write_text((tmp_path / "link.csv").read_text().replace("50.0", "30.0"))
    changed = place.read(str(tmp_path), spacing=500.0).inputs
    assert [a["name"] for a, b in zip(inputs, changed, strict=True) if a["sha256"] != b["sha256"]] == ["link.csv"]


def test_a_tntp_network_is_read_with_its_positions(tmp_path):
    (tmp_path / "x_net.tntp").write_text(
        "<NUMBER OF ZONES> 2\n<NUMBER OF NODES> 2\n<FIRST THRU NODE> 1\n<NUMBER OF LINKS> 2\n<END OF METADATA>\n"
        "~ init_node term_node capacity length free_flow_time b power speed toll link_type ;\n"
        "1 2 1800 1 1 0.15 4 0 0 1 ;\n2 1 1800 1 1 0.15 4 0 0 1 ;\n"
    )
    (tmp_path / "nodes.tntp").write_text("Node X Y ;\n1 0 0 ;\n2 1000 0 ;\n")
    path, nodes = str(tmp_path / "x_net.tntp"), str(tmp_path / "nodes.tntp")
    town = place.read(path, spacing=100.0, population=100.0, nodes=nodes)
    assert town.people.sum() == pytest.approx(100) and [each["name"] for each in town.inputs] == ["x_net.tntp", "nodes.tntp"]
    with pytest.raises(BadInput, match="positions of its nodes, got one without; TNTP has them in a file nodes="):
        place.read(path, population=100.0)
    with pytest.raises(BadInput, match="expected options of the reader of this format, got: .*node_file"):
        place.read(path, population=100.0, node_file=nodes)


def test_what_pairs_share_is_told_from_counting():
    """Three shared directions of known variance in counting noise: found, and their variance freed of the noise to some per cent."""
    random = np.random.default_rng(0)
    n, p, signal = 2000, 400, np.array([4.0, 2.0, 1.0])
    basis = np.linalg.qr(random.normal(size=(p, 3)))[0].T
    residual = random.normal(size=(n, 3)) * signal @ basis + np.sqrt(COUNTING) * random.normal(size=(n, p))
    found, scale, rate = _shared(residual)
    assert len(scale) == 3
    np.testing.assert_allclose(rate, signal, rtol=0.06)  # sampling error of a variance of 2000 days: 2 x 3 %
    assert (scale > rate).all()
    np.testing.assert_allclose(np.abs(np.einsum("kp,kp->k", found, basis)), 1.0, atol=0.05)
    assert len(_shared(np.sqrt(COUNTING) * random.normal(size=(n, p)))[1]) == 1  # noise alone has none, and one is kept


def test_a_drawn_day_has_the_mean_and_the_spread_of_recorded_ones(twin):
    statistics = twin.fit()
    _, condition = twin.days(np.repeat(3, 400))
    target = np.random.default_rng(0).normal(size=(400, 1, len(statistics["scale"]))).astype(np.float32)
    draw = jax.jit(jax.vmap(lambda t, c, k: twin.simulate(twin.decode(statistics, t, c), c, k)))
    drawn = draw(target, condition, jax.random.split(jax.random.key(0), 400))
    recorded, kind = twin.days(np.arange(51))
    same = (kind["weekday"] == condition["weekday"][0]) & ((kind["rain"] > 0) == (condition["rain"][0] > 0))
    for name in ("trips_day", "trips_evening"):
        own, true = np.asarray(drawn[name]).sum((1, 2)), recorded[name][same].sum((1, 2))
        assert abs(own.mean() / true.mean() - 1) < 0.08  # some days of 51 are of this kind: their mean is known to about 3 %
        assert (np.asarray(drawn[name]) >= 0).all() and (np.asarray(drawn[name]) % 1 == 0).all()


# ---------------------------------------------------------------- interventions


def test_interventions_leave_what_they_are_given_alone_and_run_over_strengths(state, network):
    some = np.zeros(network.links, np.float32)
    some[:10] = 1
    kept = jax.tree.map(np.copy, state)
    limits = jnp.array([4.0, 8.0, 100.0])
    many = jax.vmap(lambda limit: interventions.limit_speed(state, some, limit))(limits)
    for index, limit in enumerate(limits):
        one = interventions.limit_speed(state, some, limit)
        np.testing.assert_array_equal(many.free_speed[index], one.free_speed)
    np.testing.assert_array_equal(many.free_speed[2], state.free_speed)
    assert jax.grad(lambda limit: interventions.limit_speed(state, some, limit).free_speed.sum())(3.0) == 10
    jax.tree.map(np.testing.assert_array_equal, kept, state)


def test_closing_and_slowing_may_come_in_any_order(state, network):
    some = (np.arange(network.links) % 3 == 0).astype(np.float32)
    steps = [lambda c: interventions.close(c, some), lambda c: interventions.limit_speed(c, 1 - some, 5.0)]
    jax.tree.map(np.testing.assert_array_equal, steps[1](steps[0](state)), steps[0](steps[1](state)))


def test_a_low_emission_zone_keeps_trips_apart_by_class(twin, state, network):
    banned = interventions.below_standard(twin.fleet, 6, 4)
    assert "PC_diesel_Euro-5" in banned and "PC_diesel_Euro-6d" not in banned and "PC_petrol_Euro-4" not in banned
    assert "PC_BEV" not in banned and "UBus_Std_gt15-18t_Euro-V_SCR" in banned
    part = float(np.asarray(twin.fleet.share)[[name in banned for name in twin.fleet.classes]].sum())
    inside = np.zeros(network.zones)
    inside[0] = 1
    links = np.zeros(network.links)
    links[twin.place.links_in([twin.place.zone_name[0]])] = 1
    for replaced in (0.0, 0.6, 1.0):
        made = interventions.ban(state, twin.fleet, banned, links, inside, replaced)
        total = np.asarray(made.trips).sum(0)
        ends = np.maximum(inside[:, None], inside[None])
        np.testing.assert_allclose(total, np.where(ends > 0, 1 - part * (1 - replaced), 1.0), rtol=1e-5)
        assert (np.asarray(made.trips)[FAILS][ends > 0] == 0).all()
        np.testing.assert_allclose(np.asarray(made.fleet).sum(1), 1.0, rtol=1e-5)
        forbidden = [index for index, name in enumerate(twin.fleet.classes) if name in banned]
        assert (np.asarray(made.fleet)[MEETS, forbidden] == 0).all()
        allowed = [index for index, name in enumerate(twin.fleet.classes) if name not in banned]
        assert (np.asarray(made.fleet)[FAILS, allowed] == 0).all()


def test_electric_cars_take_the_exhaust_and_leave_the_wear(twin, state):
    every = interventions.electrify(state, twin.fleet, 1.0)
    share = np.asarray(every.fleet)[MEETS]
    np.testing.assert_allclose(share.sum(), 1.0, rtol=1e-5)
    burning = [i for i, name in enumerate(twin.fleet.classes) if name.startswith(("PC_", "LCV_")) and "BEV" not in name]
    assert (share[burning] == 0).all()
    vehicles = dataclasses.replace(twin.fleet, share=share)
    before = emissions.link_emissions(jnp.ones(1), jnp.full(1, 10.0), jnp.ones(1), twin.fleet)
    after = emissions.link_emissions(jnp.ones(1), jnp.full(1, 10.0), jnp.ones(1), vehicles)
    assert after[0, 0] < 0.35 * before[0, 0] and after[4, 0] > 0.7 * before[4, 0]


# ---------------------------------------------------------------- traffic before and after


def test_where_nothing_changes_before_is_after(twin, network, state):
    trips = twin.record["trips"].values[3].astype(float)
    found = traffic.day(network, twin.place.delay, trips, days.LENGTHS, both(state, state), traffic.Response(), 1e-8)
    np.testing.assert_allclose(found.time[1], found.time[0], rtol=1e-4)
    np.testing.assert_allclose(found.trips[0].sum(), trips.sum(), rtol=1e-9)
    assert found.gap.max() <= 1e-8 and found.unsettled.max() < 1e-4
    assert (found.flow[:, :, FAILS] == 0).all()


def test_a_charge_is_felt_and_drives_some_away(twin, network, state):
    trips = twin.record["trips"].values[3].astype(float)
    every = np.ones(network.links) * (network.kind != place.CONNECTOR)
    charged = interventions.charge_distance(state, every, network.length, 0.05)  # 50 s/km
    stay, answer = (
        traffic.day(network, twin.place.delay, trips, days.LENGTHS, both(state, charged), traffic.Response(sensitivity), 1e-6)
        for sensitivity in (0.0, 4e-4)
    )
    np.testing.assert_allclose(stay.trips[1], stay.trips[0])
    assert (stay.cost[1] > stay.cost[0]).all()
    assert (answer.trips[1] < answer.trips[0]).all() and answer.unsettled[1] < 0.01
    rise = stay.cost[1] - stay.cost[0]
    expected = traffic.Response()(np.average(rise, weights=stay.trips[0]))
    assert abs(answer.trips[1].sum() / answer.trips[0].sum() - expected) < 0.02


def test_demand_answers_as_the_pivot_logit_says():
    response = traffic.Response(4e-4, 0.55)
    assert response(np.array(0.0)) == pytest.approx(1.0, abs=1e-12)
    slope = (response(np.array(1e-3)) - response(np.array(-1e-3))) / 2e-3
    assert slope == pytest.approx(-4e-4 * 0.45, rel=1e-5)
    assert response(np.array(1e9)) < 1e-6 and response(np.array(-1e9)) == pytest.approx(1 / 0.55)


def test_no_link_of_a_closed_street_is_driven_on(twin, network):
    street = next(name for name in np.unique(network.name[twin.place.roads]) if name and _may_close(twin, name))
    outcome, _, condition = simulated(twin, scenario({"do": "close", "streets": [street]}))
    links = twin.place.streets([street])
    flow = np.asarray(outcome["flow"])
    assert flow[:, 0][..., links].sum() > 0 and (flow[:, 1][..., links] == 0).all()
    for index in range(2):
        rules = twin.check({k: v[index] for k, v in outcome.items()}, {k: v[index] for k, v in condition.items()})
        assert all(float(broken) == 0 for broken in rules.values()), rules


def _may_close(twin, street):
    try:
        twin.ask(scenario({"do": "close", "streets": [str(street)]}), None)
    except BadInput:
        return False
    return True


def test_a_draw_does_not_depend_on_its_neighbours(twin):
    asked = scenario({"do": "modal_shift", "share": 0.2})
    two, _, _ = simulated(twin, asked)
    question = twin.ask(asked, None)
    sample, _ = twin.days(np.arange(3, 5))
    turned = {k: v[::-1] for k, v in sample.items()}
    keys = jax.random.split(jax.random.key(0), 2)[::-1]
    condition = {k: np.repeat(v, 2, axis=0) for k, v in question.condition.items()}
    alone = jax.tree.map(lambda v: v[0], jax.device_get(PHYSICS[id(twin)](turned, condition, keys)))
    np.testing.assert_array_equal(np.asarray(alone["flow"]), np.asarray(two["flow"])[1])
    share = float(alone["car_trips"][1].sum() / alone["car_trips"][0].sum())
    assert share == pytest.approx(0.8, abs=0.02)  # fewer cars are faster, which brings a few back


# ---------------------------------------------------------------- the air


def test_types_of_weather_come_as_often_as_they_are_said_to(twin):
    winds = Winds(twin.place)
    drawn = np.asarray(jax.vmap(lambda key: winds.draw(key, jnp.asarray(False)))(jax.random.split(jax.random.key(0), 4000)))
    assert drawn.min() >= 0 and drawn.max() < winds.types
    state = drawn % len(winds.stabilities)
    assert not (state[:, 3] == 2).any() and not (state[:, 1] == 3).any()  # no sun at night, no clear night by day
    often = np.array([each.often[0] for each in winds.stabilities])
    np.testing.assert_allclose(np.bincount(state[:, 0], minlength=4) / 4000, often / often.sum(), atol=0.03)
    with pytest.raises(BadInput, match="expected a rose of 12 frequencies"):
        Winds(twin.place, rose=(1, 2, 3))


def test_half_the_exhaust_is_half_of_what_traffic_adds(twin):
    """The chain from emission to the air is linear for what does not react."""
    outcome, _, _ = simulated(twin, scenario({"do": "electric_share", "share": 0.5}))
    emitted, air = (np.asarray(outcome[name]) for name in ("emitted_NOx", "air_NOx"))
    added = air - twin.background.nox
    assert (added >= -1e-4).all() and (np.asarray(outcome["air_NO2"]) <= air + 1e-3).all()
    ratio = emitted[:, 1].sum(-1) / emitted[:, 0].sum(-1)
    np.testing.assert_allclose(added[:, 1].sum(-1) / added[:, 0].sum(-1), ratio, rtol=0.02)  # the fleet is the same everywhere


def bent(**given):
    """A place with a road of 2422 m between points 1000 m apart, drawn over a bend, and its halves as two straight roads of 1000 m."""
    x, y = [0.0, 1000.0, 500.0], [0.0, 0.0, np.sqrt(0.75) * 1000]
    network = build(start=[0, 0, 2], end=[1, 2, 1], length=[2422.0, 1000, 1000], x=x, y=y, zone=[0, 1], population=[1.0, 1.0], **given)
    points = np.array([[480.0, 100.0], [400.0, 900.0], [1500.0, 300.0]])
    return place.Place(network, ("a", "b"), points, np.ones(3), np.zeros(3, int), np.zeros(3))


def test_a_road_emits_along_its_course_and_all_that_its_length_makes(monkeypatch):
    monkeypatch.setattr("domains.city.weather.BLOCK", 2)
    a, b, c = np.array([[0.0, 0.0], [1000.0, 0.0], [500.0, np.sqrt(0.75) * 1000]])
    drawn, straight = (
        Winds(bent(**given), stabilities=STABILITIES[:1]).unit
        for given in ({"shape": (np.array([a, c, b]), np.array([a, c]), np.array([c, b]))}, {})
    )
    assert drawn.shape == (12, 3, 3)
    np.testing.assert_allclose(drawn[..., 0], 1.211 * drawn[..., 1:].sum(-1), rtol=1e-4)  # 2422 m on 2000 m of drawn road
    np.testing.assert_allclose(drawn[..., 1:], straight[..., 1:], rtol=1e-4)
    shorter = bent()
    shorter.network.length[0] = 1000.0
    np.testing.assert_allclose(straight[..., 0], 2.422 * Winds(shorter, stabilities=STABILITIES[:1]).unit[..., 0], rtol=1e-4)


def test_everybody_lives_somewhere():
    """Zones nearer to each other than the points of air: what has none of its own counts at the nearest."""
    town = place.made_up.city(1, **SMALL).network
    for spacing in (300.0, 1200.0):
        grid, people, zone_of = place._receptors(town, spacing, np.arange(town.zones), np.zeros(2), 2500.0)
        assert people.sum() == pytest.approx(town.population.sum())
    assert len(np.unique(zone_of)) < town.zones


def test_nobody_lives_on_a_road_that_bends():
    a, b, c = np.array([[0.0, 0.0], [1000.0, 0.0], [500.0, 500.0]])
    network = bent(shape=(np.array([a, c, b]), np.array([a, c]), np.array([c, b]))).network
    grid, _, _ = place._receptors(network, 50.0, np.arange(2), np.array([500.0, 250.0]), 600.0)
    on_chord = (np.abs(grid[:, 1]) < 1) & (grid[:, 0] > 100) & (grid[:, 0] < 900)
    on_bend = np.abs(np.abs(grid[:, 0] - 500) - (500 - grid[:, 1])) < 12 * np.sqrt(2)
    assert on_chord.any() and not (on_bend & (grid[:, 1] > 0)).any()


# ---------------------------------------------------------------- questions


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"do": "close", "streets": ["Ring Rod"]}, "street 'Ring Rod': the network has none of that name; did you mean 'Ring Road'"),
        (
            {"do": "greening", "districts": ["Harbor"], "cover": 0.1},
            "district 'Harbor': the city has none of that name; did you mean 'Harbour'",
        ),
        ({"do": "modal_shift", "share": 0.0}, "its interventions change nothing"),
        ({"do": "speed_limit", "streets": ["Ring Road"], "kmh": 200}, "its interventions change nothing"),
    ],
)
def test_what_a_scenario_cannot_mean_is_said_in_a_sentence(twin, wanted, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        twin.ask(scenario(wanted), None)


def test_a_day_that_was_never_recorded_is_refused_and_rain_that_was_not_is_told(twin):
    workday = days.weekday_of(twin.record["time"].values) < 5
    dry = dataclasses.replace(twin, record=twin.record.isel(time=workday).assign(rain=twin.record["rain"][workday] * 0))
    wish = {"do": "modal_shift", "share": 0.1}
    with pytest.raises(BadInput, match="weekday: expected one that the record has for training, Monday, .*, Friday, got Saturday"):
        dry.ask(scenario(wish, weekday="Saturday"), None)
    told = "The record has no rain: the trips are those of dry days."
    assert told in dry.ask(scenario(wish, rain=5.0), None).notes and told not in dry.ask(scenario(wish), None).notes
    assert told not in twin.ask(scenario(wish, rain=5.0), None).notes


def test_rain_falls_once():
    wet = {"do": "rain", "mm": 10}
    assert scenario(wet).rain == 0
    for words in ({"rain": 10.0}, {"both": [wet]}):
        with pytest.raises(ValueError, match="expected rain once"):
            scenario(wet, **words)


def test_formats_that_cannot_be_written_are_refused_beforehand(twin, monkeypatch):
    wish = {"do": "modal_shift", "share": 0.1}
    local = dataclasses.replace(twin.place.network, lon=None, lat=None, utm=None)
    nowhere = dataclasses.replace(twin, place=dataclasses.replace(twin.place, network=local))
    nowhere.ask(scenario(wish, formats=["gmns"]), None)
    for name in ("geojson", "geopackage", "ngsi-ld"):
        with pytest.raises(BadInput, match=f"format {name}: it is in degrees; expected a network whose projection is known"):
            nowhere.ask(scenario(wish, formats=[name]), None)
    monkeypatch.setitem(sys.modules, "pyogrio.raw", None)
    with pytest.raises(BadInput, match="expected pyogrio, which is not installed"):
        twin.ask(scenario(wish, formats=["geopackage"]), None)


def test_closing_everything_is_refused(twin):
    with pytest.raises(BadInput, match="it closes every road of the city"):
        twin.ask(scenario({"do": "close", "districts": list(twin.place.zone_name)}), None)
    with pytest.raises(BadInput, match="with these roads closed there is no way from .* to "):
        twin.ask(scenario({"do": "close", "districts": ["Harbour"]}, {"do": "close", "streets": ["Ring Road"]}), None)


def test_one_low_emission_zone_names_all_its_districts(twin):
    zone = {"do": "low_emission_zone", "districts": ["Harbour"]}
    with pytest.raises(BadInput, match="expected one of them, which names all its districts, got a second one"):
        twin.ask(scenario({**zone, "districts": [twin.place.zone_name[1]]}, both=[zone]), None)


def test_what_is_expected_of_a_counted_link_is_its_flow_on_the_usual_day(twin, network):
    """With banned vehicles that go round, fewer trips, an event and a charge, before the change."""
    both = [
        {"do": "low_emission_zone", "districts": ["Harbour"], "diesel": 6, "petrol": 6},
        {"do": "modal_shift", "share": 0.3},
        {"do": "event", "district": "Harbour", "visitors": 4000, "period": "evening"},
        {"do": "cordon_charge", "districts": ["Harbour"], "euro": 2.0},
    ]
    counted = [{"link": str(network.link_id[link]), "period": "evening", "vehicles": 1.0, "error": 1.0} for link in twin.place.roads[::5]]
    question = twin.ask(scenario({"do": "electric_share", "share": 0.5}, both=both, counts=counted[:60]), None)
    sample, condition = twin.days(twin.rows("train"))
    usual = {name: values[condition["weekday"] == 2].mean(0) for name, values in sample.items()}
    (observed,) = question.constrain(lambda target: usual, {})
    state = interventions.City(**{f.name: question.condition[f"city_{f.name}"][0] for f in dataclasses.fields(interventions.City)})
    day = traffic.day(network, twin.place.delay, np.stack(list(usual.values())), days.LENGTHS, state, traffic.Response(), 1e-4)
    flow = day.flow[0, 2].sum(0)[twin.place.roads[::5][:60]]
    assert flow.max() > 100
    np.testing.assert_allclose(observed.operator(None), flow, atol=0.01 * flow.max())  # equilibria to a gap of 1e-4


def test_what_holds_before_and_after_changes_both(twin):
    event = {"do": "event", "district": "Harbour", "visitors": 1000, "period": "evening"}
    question = twin.ask(scenario({"do": "modal_shift", "share": 0.1}, both=[event]), None)
    extra = question.condition["city_extra"][0]
    np.testing.assert_array_equal(extra[0], extra[1])
    np.testing.assert_allclose(extra.sum((2, 3))[0], [0, 0, 500, 500], rtol=1e-5)  # two in a car; they come, and leave


def test_days_are_drawn_that_agree_with_a_count(twin, network):
    """The counted flow lies two standard deviations above the usual one; guided draws have it, in an equilibrium of their own."""
    statistics = twin.fit()
    modest = {"do": "modal_shift", "share": 0.1}
    outcome, _, _ = simulated(twin, scenario(modest))
    usual = np.asarray(outcome["flow"])[:, 0, 1]  # by day
    link = int(usual.mean(0).argmax())
    wanted = float(usual[:, link].mean() * 1.08)
    counted = {"link": str(network.link_id[link]), "period": "day", "vehicles": wanted, "error": wanted / 100}
    question = twin.ask(scenario(modest, counts=[counted]), None)
    condition = {name: jnp.asarray(value[0]) for name, value in question.condition.items()}
    decode = lambda target: twin.decode(statistics, target, condition)  # noqa: E731
    (observed,) = question.constrain(decode, condition)
    mean_day = jnp.zeros((1, len(statistics["scale"])))
    gradient = jax.grad(lambda target: observed.operator(target)[0])(mean_day)
    towards = gradient * (wanted - observed.operator(mean_day)[0]) / jnp.sum(gradient**2)
    for target, agrees in ((mean_day, False), (towards, True)):
        pair = jax.tree.map(lambda one: jnp.stack([one, one]), (decode(target), condition))
        made = jax.tree.map(lambda v: v[0], PHYSICS[id(twin)](*pair, jax.random.split(jax.random.key(0), 2)))
        assert (float(question.misses(made, condition)) == 0) is agrees
    with pytest.raises(BadInput, match="counts: link 'nowhere': the network has none of that name"):
        twin.ask(scenario(modest, counts=[{**counted, "link": "nowhere"}]), None)


# ---------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def answered(twin):
    outcome, question, _ = simulated(twin, scenario({"do": "electric_share", "share": 0.5}))
    return twin.dataset_of({name: np.asarray(values)[:, None] for name, values in outcome.items()}, question), question


def test_indicators_are_sums_over_the_day(twin, answered, network):
    dataset, _ = answered
    found = results.indicators(twin, dataset)
    flow = dataset["flow"].values[:, 0]
    by_hand = sum(flow[0, 1, p, link] * days.LENGTHS[p] * network.length[link] / 1000 for p in range(4) for link in twin.place.roads)
    assert found["vehicle kilometres"][0, 1] == pytest.approx(by_hand, rel=1e-6)
    np.testing.assert_allclose(found["mean speed, km/h"], found["vehicle kilometres"] / found["vehicle hours"])
    at = results.ranges(np.array([[10.0, 5.0], [20.0, 10.0]]))
    assert at["change"][0] == -7.5 and at["relative"] == pytest.approx((-50.0, -50.0, -50.0))
    limits = results.above_limits(twin, dataset)
    assert limits["NO2 above 10 ug/m3 (WHO 2021)"][0, 0] <= twin.place.people.sum() * 1.000001


def test_a_lower_limit_is_no_delay_and_a_lane_less_fills_a_road(twin, network):
    # nobody on the roads but for one vehicle: whatever the limit, it is not held up; a road at 80 % of two lanes is full on one
    one = twin.ask(scenario({"do": "speed_limit", "districts": list(twin.place.zone_name), "kmh": 20}), None)
    lane = twin.ask(scenario({"do": "capacity", "districts": list(twin.place.zone_name), "factor": 0.5}), None)
    shape, road = (1, 1, 2, len(days.PERIODS), network.links), twin.place.roads[0]
    for question in (one, lane):
        state = {name: question.condition[f"city_{name}"][0] for name in ("free_speed", "capacity")}
        free = np.broadcast_to((network.length / state["free_speed"] + twin.place.delay)[:, None], shape)
        flow = np.zeros(shape)
        flow[..., road] = 0.8 * network.capacity[road]
        none = {name: np.zeros((1, 1, *([2] if d[0] == "case" else []), *([len(twin.place.receptors)] if "receptor" in d else []),
                                *([len(twin.place.roads)] if "road" in d else []), *([network.zones] if "zone" in d else [])))
                for name, (_, d, _, _) in results.WRITTEN.items()}  # fmt: skip
        days_of = {name: np.zeros((1, 1, *(network.zones,) * 2)) for name in twin.sample}
        found = results.indicators(twin, twin.dataset_of({**days_of, **none, "flow": flow, "time": free}, question))
        np.testing.assert_allclose(found["hours of delay"], 0, atol=1e-3)
        if question is one:
            assert found["vehicle hours"][0, 1] > 1.2 * found["vehicle hours"][0, 0] > 0
        else:
            np.testing.assert_allclose(found["kilometres on full roads, %"], [[0, 100]])


def test_every_format_is_read_back(twin, answered, network, tmp_path):
    dataset, _ = answered
    found = {name: results.ranges(values) for name, values in results.indicators(twin, dataset).items()}
    outputs.write(twin.place, dataset, found, ["geojson", "ngsi-ld", "gmns"], tmp_path)
    assert json.loads((tmp_path / "indicators.json").read_text())["CO2, t"]["relative"][0] < -10
    links = json.loads((tmp_path / "links.geojson").read_text())["features"]
    morning = dataset["flow"].values[:, 0].mean(0)[1, 0]
    assert len(links) == network.links and links[7]["properties"]["flow_scenario_morning_veh_h"] == pytest.approx(morning[7], abs=0.06)
    air = json.loads((tmp_path / "air.geojson").read_text())["features"]
    assert len(air) == len(twin.place.receptors)
    entities = json.loads((tmp_path / "ngsi-ld.json").read_text())
    assert {each["type"] for each in entities} == {"RoadSegment", "TrafficFlowObserved", "AirQualityObserved"}
    assert len({each["id"] for each in entities}) == len(entities)
    for each in entities:
        assert each["id"].startswith(f"urn:ngsi-ld:{each['type']}:") and each["@context"]
        assert each["type"] == "RoadSegment" or "synthetic" in each["description"]["value"]
        for name, value in each.items():
            assert name in ("id", "type", "@context") or value["type"] in ("Property", "GeoProperty", "Relationship")
    back = gmns.read_network(tmp_path / "gmns")
    np.testing.assert_allclose(back.length, network.length, rtol=1e-5)
    np.testing.assert_allclose(back.capacity, network.capacity, rtol=1e-5)


def test_a_geopackage_is_one(twin, answered, network, tmp_path):
    pyogrio = pytest.importorskip("pyogrio", reason="pyogrio writes GeoPackages: pip install 'twinsim[city]'")
    outputs.write_geopackage(twin.place, answered[0], tmp_path)
    assert {layer for layer, _ in pyogrio.list_layers(tmp_path / "city.gpkg")} == {"links", "air"}
    assert pyogrio.read_info(tmp_path / "city.gpkg", layer="links")["features"] == network.links
    with sqlite3.connect(tmp_path / "city.gpkg") as file:
        (total,) = file.execute("select sum(change_day) from links").fetchone()
    assert total == pytest.approx(outputs.link_values(answered[0])["change_day"].sum(), rel=1e-6)


def test_sections_say_what_they_show(twin, answered):
    dataset, question = answered
    text = results.summary(twin, question, dataset)
    assert "50% of cars and vans electric" in text and "people" in text and "NO2" in text
    found = {name: results.ranges(values) for name, values in results.indicators(twin, dataset).items()}
    citizens = results._for_citizens(twin, question, dataset, found)
    assert "tonnes of CO2 less" in citizens.text[0]
    assert len(results._where(twin, dataset).figures) == 2 and all(
        png[:4] == b"\x89PNG" for png in results._where(twin, dataset).figures.values()
    )
    table = results._for_whom(twin, dataset).tables
    assert len(next(iter(table.values()))) == twin.place.network.zones + 1


# ---------------------------------------------------------------- the whole


@pytest.mark.slow
def test_a_scenario_from_file_to_report(tmp_path):
    path = tmp_path / "half.yaml"
    path.write_text(
        "title: Half electric\ndomain: city/twin\nasks: What?\ncommand: twinsim run half.yaml\ntakes: a minute\nexpect: less\n"
        "members: 3\ninterventions: [{do: electric_share, share: 0.5}]\nformats: [geojson, netcdf]\n"
    )
    words = [f"out={tmp_path}/out", f"scenario={path}", "domain=city/twin", "train.steps=20", "optimizer.warmup=2", "scale=tiny"]
    words += [f"+domain.place.{name}={value}" for name, value in SMALL.items() if name != "population"]
    words += ["domain.place.population=40000", "+domain.place.spacing=500", "domain.record.days=80", "domain.record.start=2023-01-01"]
    words += ["domain.splits={train: [2023-01-01, 2023-02-20], test: [2023-02-21, 2023-03-20]}", "evaluate={members: 3, most: 6}"]
    assert cli.main(["run", *words]) == 0
    (folder,) = (tmp_path / "out" / "runs").glob("half-*")
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"https?://", page.replace('href="https://www.w3.org', ""))
    assert "In plain words" in page and "For whom" in page
    with xr.open_zarr(folder / "samples.zarr", consolidated=False) as data, xr.open_dataset(folder / "samples.nc") as same:
        assert dict(data.sizes)["member"] == 3 and set(data["case"].values) == {"base", "scenario"}
        np.testing.assert_array_equal(data["flow"].values, same["flow"].values)
        less = data["CO2"].sel(case="scenario").sum("road") / data["CO2"].sel(case="base").sum("road")
        assert (less < 0.75).all()
    assert cli.main(["verify", str(folder)]) == 0
    checks = json.loads((folder / "checks.json").read_text())
    assert all(each["kept"] == 1.0 for each in checks.values())
