"""Dispersion against EPA's own output, field data and closed forms; NO2 chemistry and exposure against theirs."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from building import rough_jit
from scipy.integrate import solve_ivp

from domains.city import dispersion, exposure
from domains.city.dispersion import Heights, Weather
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "mobility" / "dispersion"
LINE = np.array([[0.0, -500.0]]), np.array([[0.0, 500.0]])
TRACER = Heights(source=1.0, receptor=1.5, initial_sigma_z=0.0)
spread, wind_at = rough_jit(dispersion.spread), rough_jit(dispersion.wind)  # one program each, not one an operation
DISTANCES = (18.0, 36.0, 48.0, 66.0, 90.0, 120.0, 180.0)
RECEPTORS = np.array([[x, 0.0] for x in DISTANCES])

# Idaho Falls 2008: u*, w*, mixing height, L, wind, direction, and EPA R-LINE v1.2's output at DISTANCES for 1 g/(m s), ug/m3 (public
# domain): an hour each near neutral, in light convective wind, the lightest wind, stable, very stable and the stablest air
EPA = np.array([
    [0.58, 0.39, 1016, -500, 5.9, 258.1, 68732.3, 48335.9, 39771.0, 30987.4, 23652.3, 18125.8, 12216.9],
    [0.15, 0.93, 165, -1.7, 1.4, 260.9, 132194, 56306.0, 36281.8, 21625.1, 12763.0, 7719.11, 3748.45],
    [0.20, 1.46, 1100, -6.8, 0.7, 246.0, 103137, 46158.9, 30717.1, 18932.2, 11496.4, 7075.62, 3430.28],
    [0.31, 1.00, 397, 48.8, 3.3, 261.2, 131839, 98253.7, 85354.4, 71092.6, 58123.5, 47498.1, 35317.6],
    [0.12, 1.00, 96, 7.9, 1.6, 260.1, 318272, 236958, 212883, 189911, 168486, 148884, 122747],
    [0.05, 1.00, 26, 4.9, 1.8, 281.8, 323968, 333288, 298826, 258742, 226415, 202633, 174082],
])  # fmt: skip


def weather(u_star=0.3, w_star=0.0, zi=800.0, L=-1e5, speed=4.0, direction=270.0, z0=0.053, reference=3.0) -> Weather:
    values = np.broadcast_arrays(*(np.asarray(x, np.float32) for x in (speed, direction, u_star, L, w_star, zi, z0, reference)))
    return Weather(*(np.atleast_1d(x) for x in values))


def one(hours: Weather) -> Weather:
    return jax.tree.map(lambda x: jnp.asarray(x)[0], hours)


def strong(**given) -> Weather:
    """Wind so strong for its turbulence that nothing meanders: f < 1e-3."""
    return weather(speed=40.0, **given)


def test_epas_output_is_met_in_every_kind_of_air():
    u_star, w_star, zi, L, speed, direction = EPA[:, :6].T
    hours = weather(u_star, w_star, zi, L, speed, direction)
    ours = 1e6 * dispersion.concentration(*LINE, RECEPTORS, np.ones((len(EPA), 1)), hours, TRACER)
    # EPA integrates to 1e-3, looks exponentials up in a table and stops its iteration at 1 %
    np.testing.assert_allclose(ours, EPA[:, 6:], rtol=3e-3)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"there is no folder {SHARED}")
@pytest.mark.parametrize(("test", "bias"), [("1", 0.2), ("3", 0.1)])
def test_the_tracer_of_idaho_falls_is_met(test, bias):
    met = [row for row in csv.DictReader((SHARED / "idaho_falls_2008_met.csv").open()) if row["test"] == test]
    rows = [row for row in csv.DictReader((SHARED / "idaho_falls_2008_obs.csv").open()) if row["test"] == test]
    u_star, w_star, zic, zim, L, speed, direction = (
        np.array([float(row[name]) for row in met]) for name in ("ustar", "wstar", "zic", "zim", "L", "ws", "wd")
    )
    hours = weather(u_star, w_star, np.maximum(zic, zim), L, speed, direction)
    unit = 1e6 * dispersion.concentration(*LINE, RECEPTORS, np.ones((len(met), 1)), hours, TRACER)
    ours = {(m["bag"], x): c for m, cs in zip(met, np.asarray(unit), strict=True) for x, c in zip(DISTANCES, cs, strict=True)}
    seen = [row for row in rows if row["obs_ppb"]]
    modelled = np.array([ours[row["bag"], float(row["x_m"])] * float(row["q_gs"]) / 54 / 5.34 for row in seen])
    observed = np.array([float(row["obs_ppb"]) for row in seen])
    ratio = modelled / observed
    assert np.mean((ratio > 0.5) & (ratio < 2)) >= 0.9
    assert abs(2 * (observed.mean() - modelled.mean()) / (observed.mean() + modelled.mean())) <= bias


@pytest.mark.parametrize("L", [-1e5, -30.0, 20.0])
def test_a_very_long_line_across_the_wind_is_the_infinite_line(L):
    hours, x = strong(L=L), np.array([20.0, 40.0, 70.0, 100.0, 200.0, 300.0, 400.0])  # as many as RECEPTORS: one program
    far = np.array([[0.0, -2e4]]), np.array([[0.0, 2e4]])
    receptors, mixed = np.stack([x, np.zeros_like(x)], 1), Heights(1.0, 1.5, 1.0)
    ours = dispersion.concentration(*far, receptors, np.ones((1, 1)), hours, mixed)[0]
    _, sz, U = spread(x.astype(np.float32), one(hours), mixed)
    # C = q V / U, V the Gaussian and its image below ground; what meanders is 2 sigma_v^2 / U^2 < 1e-3 of it
    vertical = sum(np.exp(-0.5 * ((1.5 + sign) / sz) ** 2) for sign in (-1, 1)) / (np.sqrt(2 * np.pi) * sz)
    np.testing.assert_allclose(ours, vertical / U, rtol=2e-3)


def test_spread_in_neutral_air_grows_with_distance():
    hour = one(strong(zi=1e6))
    x = np.array([10.0, 100.0, 1000.0], np.float32)
    sy, sz, U = spread(x, hour, TRACER)
    np.testing.assert_allclose(sz, 0.57 * 0.3 * x / U, rtol=5e-3)  # Venkatram et al. (2013): sigma_z = 0.57 u* x / U
    np.testing.assert_allclose(sy, 1.6 * 1.9 * sz, rtol=2e-3)
    assert wind_at(3.0, hour) == pytest.approx(40.0)


@pytest.mark.parametrize("L", [-50.0, 30.0])
def test_as_much_passes_a_plane_downwind_as_is_emitted(L):
    hours, x, length = strong(L=L), 60.0, 30.0
    start, end = np.array([[0.0, -length / 2]]), np.array([[0.0, length / 2]])
    y, z = np.linspace(-80, 80, 81), np.linspace(0.125, 39.875, 160)
    plane = np.stack([np.full(81, x), y], 1)
    unit = jax.vmap(lambda z: dispersion.concentration(start, end, plane, jnp.ones((1, 1)), hours, Heights(1.0, z, 0.5))[0])
    _, _, U = spread(np.float32(x), one(hours), Heights(1.0, 1.5, 0.5))
    flux = float(jnp.sum(unit(jnp.asarray(z, jnp.float32)))) * float(U) * (y[1] - y[0]) * (z[1] - z[0])
    assert flux == pytest.approx(length, rel=5e-3)


def test_air_has_no_preferred_direction_and_a_link_no_front():
    rng = np.random.default_rng(0)
    start, end, receptors = (rng.uniform(-300, 300, (n, 2)) for n in (6, 6, 9))
    q = rng.uniform(0, 1, (1, 6))

    def seen(start, end, receptors, direction):
        return np.asarray(dispersion.concentration(start, end, receptors, q, weather(direction=direction)))

    there = seen(start, end, receptors, 250.0)
    np.testing.assert_allclose(seen(end, start, receptors, 250.0), there, rtol=1e-3)
    mirror = np.array([1.0, -1.0])
    np.testing.assert_allclose(seen(start * mirror, end * mirror, receptors * mirror, 290.0), there, rtol=1e-3)
    turn = np.deg2rad(70.0)
    turned = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    far = np.array([5e5, 5e6])  # as projected coordinates are: float32 alone would lose 0.5 m
    np.testing.assert_allclose(seen(*(x @ turned.T + far for x in (start, end, receptors)), 250.0 - 70.0), there, rtol=1e-3)


def test_a_link_is_the_sum_of_its_halves_and_the_quadrature_has_converged():
    rng = np.random.default_rng(1)
    start, receptors = rng.uniform(-300, 300, (20, 2)), rng.uniform(-400, 400, (40, 2))
    end = start + rng.uniform(-200, 200, (20, 2))
    lengths, velocities = np.array([-500, -20, -5, 200, 40, 8.0]), np.array([0.4, 0.3, 0.2, 0.3, 0.2, 0.08])
    hours = weather(direction=np.linspace(0, 345, 6), L=lengths, u_star=velocities)
    q = np.ones((6, 20))
    fine = np.asarray(dispersion.concentration(start, end, receptors, q, hours, nodes=(200, 200)))
    ours = np.asarray(dispersion.concentration(start, end, receptors, q, hours))
    middle = (start + end) / 2
    halves = dispersion.concentration(np.concatenate([start, middle]), np.concatenate([middle, end]), receptors, np.ones((6, 40)), hours)
    assert np.quantile(np.abs(ours / fine - 1), 0.99) < 0.01  # the rest stands on a link or beside one that points into the wind
    assert np.quantile(np.abs(halves / fine - 1), 0.99) < 0.01


def test_concentration_is_linear_in_the_emission_and_pollutants_share_the_work():
    rng = np.random.default_rng(2)
    start, end, receptors = (rng.uniform(-300, 300, (n, 2)) for n in (5, 5, 7))
    q = rng.uniform(0, 1, (2, 3, 5)).astype(np.float32)
    hours = weather(direction=[200.0, 20.0])
    c = dispersion.concentration(start, end, receptors, q, hours)
    assert c.shape == (2, 3, 7) and (c >= 0).all()
    summed = np.stack([q[:, 0] + 2 * q[:, 1]] * 3, 1)
    np.testing.assert_allclose(dispersion.concentration(start, end, receptors, summed, hours)[:, 0], c[:, 0] + 2 * c[:, 1], rtol=1e-5)
    # a receptor at a time, as where memory is short
    np.testing.assert_allclose(dispersion.concentration(start, end, receptors, q, hours, at_once=1), c, rtol=1e-5)


def test_nothing_but_the_meander_goes_upwind():
    upwind = np.array([[-100.0, 0.0]])
    both = np.concatenate([upwind, -upwind])
    windy, calm = (dispersion.concentration(*LINE, both, np.ones((1, 1)), w)[0] for w in (strong(), weather(speed=0.3, u_star=0.05)))
    assert windy[0] < 1e-3 * windy[1]
    assert 0.2 < calm[0] / calm[1] <= 1.0  # sigma_v is 0.2 m/s at least: nearly all of it meanders


def test_the_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(3)
    start, end, receptors = (rng.uniform(-200, 200, (n, 2)) for n in (4, 4, 6))
    q, hours = rng.uniform(0.5, 1, (1, 4)).astype(np.float32), weather(L=-80.0, direction=230.0)

    def total(q, speed, u_star):
        changed = replace(hours, wind_speed=speed, friction_velocity=u_star)
        return 1e3 * jnp.sum(dispersion.concentration(start, end, receptors, q, changed))

    at = (jnp.asarray(q), jnp.asarray(hours.wind_speed), jnp.asarray(hours.friction_velocity))
    slopes = jax.grad(total, (0, 1, 2))(*at)
    for i, step in enumerate((0.05, 0.1, 0.01)):
        up, down = (float(total(*(x + s * step if j == i else x for j, x in enumerate(at)))) for s in (1, -1))
        assert float(jnp.sum(slopes[i])) == pytest.approx((up - down) / (2 * step), rel=1e-2)


def test_the_wind_rises_through_what_was_measured_and_is_finite_in_the_canopy():
    rise = rough_jit(jax.vmap(dispersion.wind, in_axes=(0, None)))
    for L in (-1e5, -20.0, 15.0):
        hour = one(weather(L=L, z0=1.0, reference=20.0))  # a city: displacement 5 m
        speeds = np.asarray(rise(np.linspace(0, 20, 81, dtype=np.float32), hour))
        assert np.isfinite(speeds).all() and (speeds > 0).all() and speeds[-1] == pytest.approx(4.0)
    city = dispersion.concentration(*LINE, RECEPTORS, np.ones((1, 1)), weather(z0=1.0, reference=20.0, u_star=0.5))
    assert np.isfinite(city).all() and (np.diff(city[0]) < 0).all()


def test_the_surface_layer_is_neutral_without_heat_and_obeys_obukhov_with_it():
    heat = np.array([0.001, 200.0, -30.0, -30.0])
    found = dispersion.surface_layer([5.0, 3.0, 5.0, 0.6], 270.0, heat, 800.0, 0.1, 10.0)
    assert found.friction_velocity[0] == pytest.approx(0.4 * 5 / np.log(9.5 / 0.1), rel=1e-3)
    # L = -rho cp T u*^3 / (k g H)
    implied = -dispersion.AIR_HEAT * 288 * found.friction_velocity**3 / (0.4 * dispersion.GRAVITY * heat)
    assert found.obukhov_length[1] == pytest.approx(float(implied[1]), rel=1e-2)
    assert found.obukhov_length[1] < 0 < found.obukhov_length[3] < found.obukhov_length[2]
    assert found.convective_velocity[1] == pytest.approx((9.80665 / 288 * 200 / 1206 * 800) ** (1 / 3), rel=1e-3)
    assert (found.convective_velocity[2:] == 0).all()
    assert found.friction_velocity[2] < 0.4 * 5 / np.log(9.5 / 0.1)  # stable air is slower at the ground
    c = dispersion.concentration(*LINE, RECEPTORS, np.ones((4, 1)), found)
    assert np.isfinite(c).all() and c[3, 2] > c[2, 2] > c[1, 2]


def test_wrong_shapes_are_answered_in_words():
    with pytest.raises(BadInput, match="receptors: expected finite"):
        dispersion.concentration(*LINE, RECEPTORS.T, np.ones((1, 1)), weather())
    with pytest.raises(BadInput, match="expected emission"):
        dispersion.concentration(*LINE, RECEPTORS, np.ones((1, 2)), weather())


def test_chemistry_ends_in_the_steady_state_of_its_equations_and_keeps_nox_and_oxidant():
    J, k = 8e-3, float(dispersion.rate_constant())
    assert k == pytest.approx(3.8e-4, rel=0.02)  # 1/(ppb s), NO + O3 at 288 K
    for no, no2, o3 in ((80.0, 10.0, 30.0), (2.0, 5.0, 40.0), (300.0, 30.0, 1.0)):

        def change(_, c):
            r = k * c[0] * c[2] - J * c[1]
            return [-r, r, -r]

        end = solve_ivp(change, (0, 5e4), [no, no2, o3], method="LSODA", rtol=1e-9, atol=1e-9).y[:, -1]
        steady = float(dispersion.photostationary(jnp.float32(no + no2), jnp.float32(o3 + no2), J))
        assert steady == pytest.approx(end[1], rel=1e-4)
        assert end[0] + end[1] == pytest.approx(no + no2) and end[1] + end[2] == pytest.approx(o3 + no2)
        assert 0 <= steady <= min(no + no2, o3 + no2)


def test_at_night_the_scarcer_is_used_up_and_clean_air_stays_clean():
    night = dispersion.photostationary(jnp.array([50.0, 10.0, 0.0]), jnp.array([30.0, 40.0, 40.0]), 0.0)
    np.testing.assert_allclose(night, [30.0, 10.0, 0.0], atol=1e-4)
    assert dispersion.no2(jnp.float32(0), jnp.float32(0), 0.0, 0.0, 60.0) == 0.0
    assert np.isfinite(jax.grad(lambda x: dispersion.no2(x, 0.1 * x, 20.0, 15.0, 50.0))(jnp.float32(30.0)))


def test_exposure_counts_people():
    people, c = np.array([100.0, 300.0, 600.0]), np.array([[45.0, 25.0, 10.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(exposure.population_mean(c, people), [18.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(exposure.people_above(c, people, 40.0), [100, 0])
    np.testing.assert_allclose(exposure.people_above(c, people, 20.0), [400, 0])
    np.testing.assert_allclose(exposure.people_above(c, people, 20.0, softness=1e-2), [400, 0], atol=1e-3)
    np.testing.assert_allclose(exposure.group_means(c, people, np.array([0, 0, 1]), 3)[0], [30.0, 10.0, 0.0])
    np.testing.assert_allclose(exposure.period_mean(c, np.array([3.0, 1.0])), [35.0, 20.0, 8.75])
    assert exposure.summary({"NO2": c[0]}, people)["NO2: people above 20 ug/m3 (EU 2030)"] == 400
    assert exposure.gains_and_losses(c[0], c[1] + [0, 0, 5], people) == {"better": 400.0, "worse": 0.0, "as before": 600.0}


def test_people_are_counted_where_they_are_nearest():
    receptors = np.array([[0.0, 0.0], [100.0, 0.0]])
    homes, people = np.array([[10.0, 0.0], [60.0, 0.0], [90.0, 5.0], [900.0, 0.0]]), np.array([1.0, 2.0, 4.0, 8.0])
    np.testing.assert_array_equal(exposure.people_at(receptors, homes, people, farthest=200.0), [1.0, 6.0])
