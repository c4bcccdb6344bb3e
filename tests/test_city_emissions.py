"""Emissions of traffic against SUMO's own values, closed forms and what a fleet must keep."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domains.city import emissions
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "mobility" / "emissions"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED}")
CO2, NOX, NO2, PM25, PM10 = range(5)

# speed m/s, acceleration m/s2, slope degrees, CO2 and NOx mg/s, as `emissionsMap -e HBEFA4/PC_petrol_Euro-4` of SUMO 1.28 writes them
SUMO = np.array([
    [0, 0.2, 0, 1660.02, 0.6117],
    [10, -0.3, 0, 0, 0],
    [10, 0.2, 0, 2269.5, 0.80785],
    [10, 1.2, 2, 5441.9, 1.75615],
    [20, -0.3, 0, 1376.39, 0.46304],
    [20, 0.7, 2, 7710.05, 3.09143],
    [30, -0.3, 2, 5553.87, 2.25129],
])  # fmt: skip


def petrol() -> np.ndarray:
    return emissions.fleet({"PC_petrol_Euro-4": 1.0}).hot[0]


def traffic() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array([900.0, 300.0, 1200.0]), np.array([12.0, 2.1, 7.7]), np.array([250.0, 80.0, 1000.0])


def test_the_rate_is_sumos():
    v, a, slope, co2, nox = SUMO.T.astype(np.float32)
    # the coefficients have four digits
    np.testing.assert_allclose(emissions.rate(petrol()[0], v, a, slope), co2, rtol=3e-4)
    np.testing.assert_allclose(emissions.rate(petrol()[1], v, a, slope), nox, rtol=1e-3)


def test_a_coasting_engine_emits_nothing_and_a_standing_one_idles():
    assert emissions.rate(petrol()[0], 15.0, -0.31) == 0.0
    assert emissions.rate(petrol()[0], 15.0, -0.29) > 0.0  # SUMO's threshold there is -0.3035 m/s2
    assert emissions.rate(petrol()[0], 0.0, 0.0) == pytest.approx(1521)
    assert emissions.rate(petrol()[0], 15.0, -2.0, burns=False) >= 0.0  # clipped, not off


def test_a_steady_fast_drive_emits_its_rate_over_its_speed():
    v = np.array([20.0, 28.0, 45.0], np.float32)
    expected = emissions.rate(petrol()[0], v, np.zeros(3, np.float32)) / v
    # the speed's square is interpolated linearly in its root: exact for v^3, and for v^2 / v
    np.testing.assert_allclose(emissions.per_metre(petrol()[0], v), expected, rtol=1e-5)


def test_a_queue_emits_idling_over_its_speed():
    coefficients = np.array([1000.0, 0, 0, 0, 0, 0, 0])
    assert emissions.per_metre(coefficients, 0.5) == pytest.approx(1000 * 0.903 / 0.5, rel=1e-6)
    assert emissions.per_metre(coefficients, 0.0) == emissions.per_metre(coefficients, emissions.LEAST_SPEED)


def test_slow_traffic_emits_more_by_the_kilometre_and_an_urban_car_about_what_is_measured():
    grams = emissions.per_metre(petrol()[0], np.array([2.0, 5.0, 12.0]))  # mg/m is g/km
    assert grams[0] > grams[1] > grams[2]
    assert 130 < grams[2] < 230  # g CO2 per km of a petrol car in urban traffic; HBEFA 4 has 160-220


def test_emission_is_linear_in_flow_length_and_share():
    flow, speed, length = traffic()
    both = emissions.fleet({"PC_petrol_Euro-4": 0.7, "PC_diesel_Euro-5": 0.3})
    e = emissions.link_emissions(flow, speed, length, both)
    assert e.shape == (5, 3)
    np.testing.assert_allclose(emissions.link_emissions(2 * flow, speed, 3 * length, both), 6 * e, rtol=1e-5)
    one, other = (emissions.link_emissions(flow, speed, length, emissions.fleet({name: 1.0})) for name in both.classes[:2])
    np.testing.assert_allclose(e, 0.7 * one + 0.3 * other, rtol=1e-5)
    hours = emissions.link_emissions(np.stack([flow, flow]), np.stack([speed, speed]), length, both)
    np.testing.assert_allclose(hours[:, 1], e, rtol=1e-6)


def test_electric_cars_leave_only_wear():
    flow, speed, length = traffic()
    cars = emissions.fleet({"PC_petrol_Euro-4": 0.6, "PC_diesel_Euro-4": 0.4})
    e = emissions.link_emissions(flow, speed, length, emissions.electrify(cars, 1.0))
    assert not e[:PM25].any()
    np.testing.assert_allclose(e[PM10], flow * length / 1000 * 21.25e-3, rtol=1e-5)  # g/km, EMEP/EEA Tier 1
    np.testing.assert_allclose(e[PM25], flow * length / 1000 * 11.47e-3, rtol=1e-5)
    half = emissions.electrify(cars, 0.5)
    before = emissions.link_emissions(flow, speed, length, cars)
    np.testing.assert_allclose(emissions.link_emissions(flow, speed, length, half)[NOX], before[NOX] / 2, rtol=1e-5)
    assert np.sum(half.share) == pytest.approx(1)


def test_the_primary_share_and_the_fine_part_stay_below_the_whole():
    e = emissions.link_emissions(*traffic(), emissions.fleet())
    assert (e > 0).all() and (e[NO2] < e[NOX]).all() and (e[PM25] < e[PM10]).all()
    assert (e[NO2] / e[NOX] > 0.05).all() and (e[NO2] / e[NOX] < 0.5).all()


def test_a_ban_keeps_the_traffic_and_each_kind_of_it():
    whole = emissions.fleet()
    after = emissions.without(whole, ["PC_diesel_Euro-4", "PC_diesel_Euro-5", "LCV_diesel_N1-III_Euro-5"])
    for kind in set(whole.kinds):
        of_kind = np.array(whole.kinds) == kind
        assert after.share[of_kind].sum() == pytest.approx(whole.share[of_kind].sum(), rel=1e-5)
    flow, speed, length = traffic()
    before, now = (emissions.link_emissions(flow, speed, length, f) for f in (whole, after))
    assert (now[NOX] < 0.7 * before[NOX]).all()
    with pytest.raises(BadInput, match="a ban of them all"):
        emissions.without(emissions.fleet({"MC_BEV": 1.0}), ["MC_BEV"])


def test_shares_may_differ_by_link():
    flow, speed, length = traffic()
    one, other = emissions.fleet(), emissions.electrify(emissions.fleet(), 1.0)
    mixed = dataclasses.replace(one, share=jnp.stack([jnp.asarray(one.share), other.share, other.share]))
    e = emissions.link_emissions(flow, speed, length, mixed)
    np.testing.assert_allclose(e[:, 0], emissions.link_emissions(flow, speed, length, one)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(e[:, 1:], emissions.link_emissions(flow, speed, length, other)[:, 1:], rtol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    flow, speed, length = traffic()
    vehicles = emissions.fleet()

    def total(flow, speed, battery):
        return jnp.sum(jnp.log(emissions.link_emissions(flow, speed, length, emissions.electrify(vehicles, battery))))

    at = (jnp.asarray(flow, jnp.float32), jnp.asarray(speed, jnp.float32), jnp.float32(0.3))
    slopes = jax.grad(total, (0, 1, 2))(*at)
    for i, step in enumerate((9.0, 0.05, 0.02)):  # a sum of logs of order 10 in float32: steps large enough to see
        along = jnp.ones_like(at[i])
        up, down = (total(*(x + s * step * along if j == i else x for j, x in enumerate(at))) for s in (1, -1))
        assert jnp.sum(slopes[i]) == pytest.approx(float(up - down) / (2 * step), rel=2e-2)


def test_line_strength_is_emission_by_metre_and_second():
    np.testing.assert_allclose(emissions.line_strength(np.array([3600.0, 7200.0]), np.array([100.0, 50.0])), [0.01, 0.04], rtol=1e-6)


@needs_data
def test_the_classes_here_are_those_of_the_table():
    table = emissions.read_coefficients(SHARED / "hbefa4_sumo_coeffs.csv.gz")
    assert len(table) == 833
    for name, (_, _, rows) in emissions._CLASSES.items():
        np.testing.assert_allclose(rows, table[name], rtol=1e-6, err_msg=name)


@needs_data
def test_average_speed_factors_are_positive_and_of_the_size_that_is_published():
    rows = emissions.read_average_speed(SHARED / "copert4_pc_hot.csv")
    factor = {
        (r["fuel"], r["euro"], r["pollutant"]): np.asarray(emissions.average_speed_factor(r, np.linspace(3, 36, 12, dtype=np.float32)))
        for r in rows
    }
    assert all(np.isfinite(f).all() for f in factor.values())
    nox = factor["diesel", "5", "NOx"]
    assert (nox > 0.4).all() and (nox < 1.5).all()  # g/km: COPERT's Euro 5 diesel lies at 0.5-1.2
    # the same by numpy in float64, straight from the formula
    r = next(r for r in rows if (r["fuel"], r["euro"], r["pollutant"]) == ("petrol", "5", "NOx"))
    V = 50.0
    straight = (r["a"] + r["c"] * V + r["e"] * V**2 + r["f"] / V) / (1 + r["b"] * V + r["d"] * V**2)
    assert emissions.average_speed_factor(r, V / 3.6) == pytest.approx(straight, rel=1e-4)


def test_a_wrong_mix_is_answered_in_words():
    with pytest.raises(BadInput, match="expected classes among"):
        emissions.fleet({"PC_steam": 1.0})
    with pytest.raises(BadInput, match="sum to 1"):
        emissions.fleet({"PC_BEV": 0.4})
