"""Demand: margins, closed forms, parameters got back from matrices made with them, and inputs that make no sense."""

import numpy as np
import pytest

from domains.city import demand
from domains.city.demand import Deterrence, balance, cpc, fit_deterrence, gravity, jsd, nrmse, poisson_regression
from domains.city.synthetic import city
from twinsim.base import BadInput


@pytest.fixture
def zones():
    random = np.random.default_rng(0)
    place = random.uniform(0, 10, (12, 2))
    cost = 1 + np.linalg.norm(place[:, None] - place[None], axis=-1)
    return random.uniform(100, 1000, 12), random.uniform(50, 2000, 12), cost


def test_proportional_fitting_keeps_both_margins_and_what_is_zero(zones):
    production, attraction, cost = zones
    seed = np.exp(-cost)
    seed[0, 3] = 0
    wanted = attraction * production.sum() / attraction.sum()
    trips = balance(seed, production, wanted)
    np.testing.assert_allclose(trips.sum(1), production, rtol=1e-8)
    np.testing.assert_allclose(trips.sum(0), wanted, rtol=1e-8)
    assert trips[0, 3] == 0
    odds = lambda x: x[4, 5] * x[6, 7] / (x[4, 7] * x[6, 5])  # noqa: E731
    assert odds(trips) == pytest.approx(odds(seed), rel=1e-6)  # factors a row and a column change no odds ratio


def test_without_a_cost_gravity_is_the_outer_product(zones):
    production, attraction, cost = zones
    outer = np.outer(production, attraction / attraction.sum())
    for constraint in ("production", "both"):
        np.testing.assert_allclose(gravity(production, attraction, 0 * cost, constraint=constraint), outer, rtol=1e-9)
    np.testing.assert_allclose(gravity(production, attraction, 0 * cost + 1, Deterrence("power", 2.0)), outer, rtol=1e-9)


def test_one_more_constraint_one_more_margin(zones):
    production, attraction, cost = zones
    one, both = (gravity(production, attraction, cost, Deterrence(beta=0.7), constraint) for constraint in ("production", "both"))
    np.testing.assert_allclose(one.sum(1), production, rtol=1e-9)
    np.testing.assert_allclose(both.sum(1), production, rtol=1e-8)
    assert np.abs(one.sum(0) / one.sum() - attraction / attraction.sum()).max() > 0.01
    np.testing.assert_allclose(both.sum(0) / both.sum(), attraction / attraction.sum(), rtol=1e-8)


@pytest.mark.parametrize("kind", ["exponential", "power"])
@pytest.mark.parametrize("constraint", ["production", "both"])
def test_fit_gives_back_the_deterrence_that_made_the_trips(zones, kind, constraint):
    production, attraction, cost = zones
    trips = gravity(production, attraction, cost, Deterrence(kind, 0.8), constraint)
    assert fit_deterrence(trips, cost, kind, constraint).beta == pytest.approx(0.8, rel=1e-4 if constraint == "both" else 0.2)


def test_fitted_deterrence_is_the_likeliest(zones):
    production, attraction, cost = zones
    counts = np.random.default_rng(1).poisson(gravity(production, attraction, cost, Deterrence(beta=0.4)))
    fitted = fit_deterrence(counts, cost).beta

    def likelihood(beta):
        expected = gravity(counts.sum(1), counts.sum(0), cost, Deterrence(beta=beta))
        return (counts * np.log(expected)).sum()

    assert likelihood(fitted) > max(likelihood(fitted - 0.01), likelihood(fitted + 0.01))
    assert fitted == pytest.approx(0.4, abs=0.05)


def test_poisson_gravity_gives_back_exponents():
    random = np.random.default_rng(2)
    features = np.stack([np.ones(400), random.normal(size=400), random.normal(size=400)], 1)
    np.testing.assert_allclose(poisson_regression(features, np.exp(features @ [1.0, 0.5, -2.0])), [1.0, 0.5, -2.0], atol=1e-6)


def test_common_part_of_commuters_and_divergence_of_equal_and_disjoint_matrices():
    one, other = np.diag([3.0, 4.0]), np.array([[0.0, 2.0], [1.0, 0.0]])
    assert cpc(one, one) == 1 and cpc(one, other) == 0 and cpc(one, 2 * one) == pytest.approx(2 / 3)
    assert jsd(one, 5 * one) == pytest.approx(0, abs=1e-12) and jsd(one, other) == pytest.approx(1)
    assert nrmse(one, one) == 0 and nrmse(np.full((2, 2), one.mean()), one) == pytest.approx(1)


@pytest.mark.parametrize("day", ["weekday", "weekend"])
def test_everybody_who_leaves_comes_back(day):
    trips = {purpose: np.random.default_rng(3).uniform(0, 9, (4, 4)) for purpose in demand.PURPOSES}
    hours = demand.hourly(trips, day)
    assert hours.shape == (24, 4, 4) and (hours >= 0).all()
    whole = hours.sum(0)
    np.testing.assert_allclose(whole, whole.T, rtol=1e-9)
    factor = demand.WEEKEND_FACTOR if day == "weekend" else dict.fromkeys(demand.PURPOSES, 1.0)
    assert hours.sum() == pytest.approx(2 * sum(factor[name] * each.sum() for name, each in trips.items()))
    if day == "weekday":
        assert hours.sum((1, 2))[[7, 8, 16, 17]].min() > 3 * hours.sum((1, 2))[[1, 2, 3]].max()
    for purpose in demand.PURPOSES:
        assert all(share.sum() == pytest.approx(1) for share in demand.departures(purpose, day))


def test_city_gets_its_vehicles_by_hour():
    network = city(seed=1).network
    at = np.stack([network.x, network.y], 1)[network.zone]
    distance = np.linalg.norm(at[:, None] - at[None], axis=-1)
    ends = demand.trip_ends(network.population, network.jobs)
    out = {purpose: gravity(*ends[purpose], distance / 500, Deterrence(beta=0.15)) for purpose in ends}
    np.testing.assert_allclose(out["work"].sum(0) / out["work"].sum(), network.jobs / network.jobs.sum(), rtol=1e-6)
    fleet = demand.vehicles(demand.hourly(out), distance)
    assert set(fleet) == {"car", "van", "truck"} and fleet["car"].shape == (24, network.zones, network.zones)
    assert fleet["truck"].sum() / fleet["car"].sum() == pytest.approx(17.4 / 278.2)
    assert 0 < fleet["car"].sum() < sum(2 * each.sum() for each in out.values()) / demand.OCCUPANCY


def test_share_of_cars_rises_with_distance():
    share = demand.car_share(np.array([0.0, 500.0, demand.HALF_WAY, 1e9]))
    assert share[0] == 0 and (np.diff(share) > 0).all()
    assert share[2] == pytest.approx(demand.CAR_AT_MOST / 2) and share[3] == pytest.approx(demand.CAR_AT_MOST)


def test_what_makes_no_sense_is_named(zones):
    production, attraction, cost = zones
    hole = cost.copy()
    hole[2, 5] = np.nan
    blocked = np.ones((12, 12))
    blocked[:, 4] = 0
    wrong = {
        "cost of zone 2, 5: expected 0 or more, got nan": lambda: gravity(production, attraction, hole),
        r"attraction: expected \[12\].*got \[11\]": lambda: gravity(production, attraction[1:], cost),
        "production of zone 0.*got -1": lambda: gravity(production - production[0] - 1, attraction, cost),
        "expected a zone that draws trips": lambda: gravity(production, 0 * attraction, cost),
        "constraint production or both": lambda: gravity(production, attraction, cost, constraint="none"),
        "more than 0 for a power": lambda: gravity(production, attraction, 0 * cost, Deterrence("power")),
        "exponential or power": lambda: Deterrence("log"),
        "rows and columns of one total": lambda: balance(np.ones((12, 12)), production, attraction),
        "cannot be placed": lambda: balance(blocked, production, production),
        "ways of different cost": lambda: fit_deterrence(np.ones((12, 12)), np.ones((12, 12))),
        "trips: expected values of 0 or more": lambda: fit_deterrence(np.eye(12) * 3 - np.eye(12, k=1), cost),
        "purpose: expected one of work, school, other": lambda: demand.hourly({"fun": np.ones((2, 2))}),
        "day: expected weekday or weekend": lambda: demand.hourly({"work": np.ones((2, 2))}, "holiday"),
        "of one shape": lambda: cpc(np.ones((2, 2)), np.ones((3, 3))),
        "modelled trips: .*got -1": lambda: cpc(-np.ones((2, 2)), np.ones((2, 2))),
    }
    for sentence, call in wrong.items():
        with pytest.raises(BadInput, match=sentence):
            call()
