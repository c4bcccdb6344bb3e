"""Climate laws on states for which the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domains.climate import grid, physics

LAT = np.linspace(-88, 88, 89)
PHI = np.deg2rad(LAT)[:, None]
LON = np.linspace(0, 2 * np.pi, 24, endpoint=False)
U0 = 20.0  # m/s


def balanced(surface_swing: float = 0.0) -> tuple[jax.Array, ...]:
    """Height, temperature, surface pressure and wind of solid-body zonal flow u = U0 cos(lat), in exact balance.

    -(g z' + R T (ln ps)')/(a f) = u with f = 2 Omega sin gives g z = -a Omega U0 sin^2(lat) - R T ln ps for constant T.
    """
    ta = np.full((89, 24), 260.0)
    log_ps = np.log(1e5) + surface_swing * np.cos(PHI) ** 2 * (1 + 0 * LON)
    zg = 5600 - (physics.EARTH_RADIUS * physics.ROTATION * U0 * np.sin(PHI) ** 2 + physics.DRY_AIR * ta * log_ps) / physics.GRAVITY
    u = U0 * np.cos(PHI) * (1 + 0 * LON)
    return tuple(jnp.asarray(x, jnp.float32) for x in (zg, ta, np.exp(log_ps), u))


@pytest.mark.parametrize("surface_swing", [0.0, 0.05])
def test_a_state_in_balance_has_no_geostrophic_residual(surface_swing):
    zg, ta, ps, u = balanced(surface_swing)
    # centred differences over 2 degrees: relative error (2 deg)^2 / 6 * 4 of a sin^2, times u / std(u)
    assert physics.geostrophic_residual(zg, ta, ps, u, LAT) < 0.02
    np.testing.assert_allclose(physics.geostrophic_wind(zg, ta, ps, LAT)[10:35], u[10:35], rtol=5e-3)


def test_broken_balance_is_found():
    zg, ta, ps, u = balanced()
    assert physics.geostrophic_residual(zg, ta, ps, -u, LAT) > 1.0
    wrong_ps = ps * jnp.exp(jnp.asarray(0.05 * np.cos(PHI) ** 2, jnp.float32))
    assert physics.geostrophic_residual(zg, ta, wrong_ps, u, LAT) > 0.5


def test_the_residual_can_be_guided_through_on_a_grid_with_an_equator():
    zg, ta, ps, u = balanced()
    assert (LAT == 0).any()
    slope = jax.jit(jax.grad(lambda z: physics.geostrophic_residual(z, ta, ps, 1.1 * u, LAT)))(zg)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0


def test_bounds_give_the_largest_excess_and_nothing_inside():
    x = jnp.asarray([[-0.3, 0.5], [1.5, 2.0]])
    assert physics.below(x, 0.0) == pytest.approx(0.3)
    assert physics.above(x, 1.5) == pytest.approx(0.5)
    assert physics.below(x, -1.0) == 0.0 and physics.above(x, 2.0) == 0.0


def test_block_mean_mismatch_is_zero_after_projection():
    x = jnp.asarray(np.random.default_rng(0).gamma(1.0, 2.0, (8, 8)), jnp.float32)
    coarse = jnp.full((2, 2), 3.0)
    assert physics.block_mean_mismatch(x, coarse, 4) > 0.1
    assert physics.block_mean_mismatch(grid.conserve_block_mean(x, coarse, 4, "scale"), coarse, 4) < 1e-5


def test_mass_deviation_is_that_of_the_area_mean():
    weights = grid.area_weights(LAT)
    ps = jnp.full((89, 24), 98500.0) + jnp.asarray(1000 * np.sin(PHI) * (1 + 0 * LON), jnp.float32)  # odd in latitude: no mass
    assert physics.mass_deviation(ps, weights, 98500.0) == pytest.approx(0.0, abs=0.05)
    assert physics.mass_deviation(ps + 7.0, weights, 98500.0) == pytest.approx(7.0, abs=0.05)
