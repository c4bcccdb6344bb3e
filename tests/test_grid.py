"""Block means, refinement and their projections have exact answers; numpy and jax give the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import zoom

from domains.climate import grid
from twinsim.base import BadInput

RANDOM = np.random.default_rng(3)


def test_coarsen_is_the_block_mean():
    x = np.arange(24.0).reshape(4, 6)
    np.testing.assert_allclose(grid.coarsen(x, 2), [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])


def test_coarsen_undoes_repeat():
    x = RANDOM.normal(size=(2, 3, 5))
    np.testing.assert_allclose(grid.coarsen(grid.repeat(x, 4), 4), x)


def test_coarsen_refuses_a_factor_that_does_not_divide():
    with pytest.raises(BadInput, match="factor 4 divides, got 6 x 8"):
        grid.coarsen(np.zeros((6, 8)), 4)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("periodic", [False, True])
def test_refine_is_the_spline_of_scipy_on_padded_cells(order, periodic):
    x, f, p = RANDOM.normal(size=(5, 7)), 4, 4
    padded = np.pad(np.pad(x, ((p, p), (0, 0)), mode="edge"), ((0, 0), (p, p)), mode="wrap" if periodic else "edge")
    expected = zoom(padded, f, order=order, mode="nearest", grid_mode=True)[p * f : -p * f, p * f : -p * f]
    np.testing.assert_allclose(grid.refine(x, f, order, (False, periodic)), expected, atol=1e-12)


@pytest.mark.parametrize("order", [1, 3])
def test_refine_keeps_constants_and_wraps(order):
    np.testing.assert_allclose(grid.refine(np.full((3, 4), 280.0), 2, order), 280.0, rtol=1e-12)
    x = RANDOM.normal(size=(4, 6))
    turned = grid.refine(np.roll(x, 2, axis=1), 3, order, (False, True))
    # 4 wrapped cells end the cubic spline: what lies beyond them still counts (2 - sqrt 3)^4 = 0.5 %
    np.testing.assert_allclose(turned, np.roll(grid.refine(x, 3, order, (False, True)), 6, axis=1), atol=1e-9 if order == 1 else 0.02)


def test_refine_is_linear_between_cell_centres():
    x = np.tile(np.arange(6.0), (4, 1))
    fine = grid.refine(x, 2)
    np.testing.assert_allclose(fine[0, 1:-1], np.arange(10) / 2 + 0.25)
    np.testing.assert_allclose(fine[0, [0, -1]], [0.0, 5.0])  # edge values are extended


def test_refine_under_jit_and_with_leading_axes_is_that_of_numpy():
    x = RANDOM.normal(size=(2, 4, 6)).astype(np.float32)
    traced = jax.jit(lambda v: grid.refine(v, 4, 1, (False, True)))
    np.testing.assert_allclose(traced(jnp.asarray(x)), grid.refine(x, 4, 1, (False, True)), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(traced)(jnp.asarray(x)), grid.refine(x, 4, 1, (False, True)), atol=1e-5)


@pytest.mark.parametrize("kind", ["shift", "scale"])
@pytest.mark.parametrize("module", [np, jnp])
def test_block_means_are_conserved_exactly(kind, module):
    x = RANDOM.gamma(0.3, 5.0, size=(3, 8, 12)).astype(np.float32)
    x[:, :4, :4] = 0.0  # a dry block that must rain
    x[:, 4:, :4] *= 1e-30  # a nearly dry one
    coarse = RANDOM.gamma(0.5, 4.0, size=(3, 2, 3)).astype(np.float32)
    coarse[:, 0, 1] = 0.0  # a wet block that must be dry
    kept = grid.conserve_block_mean(module.asarray(x), module.asarray(coarse), 4, kind)
    np.testing.assert_allclose(grid.coarsen(kept, 4), coarse, rtol=2e-6, atol=2e-5 if kind == "shift" else 0)
    if kind == "scale":
        assert (np.asarray(kept) >= 0).all()
        assert (np.asarray(kept)[:, :4, 4:8] == 0).all()


def test_conserving_twice_changes_nothing_and_keeps_what_fits():
    x = RANDOM.gamma(0.5, 3.0, size=(8, 8))
    for kind in ("shift", "scale"):
        np.testing.assert_allclose(grid.conserve_block_mean(x, grid.coarsen(x, 4), 4, kind), x, atol=1e-12)


def test_conserving_is_differentiable_where_it_is_dry():
    slope = jax.grad(lambda v: (grid.conserve_block_mean(v, jnp.ones((1, 1)), 2, "scale") ** 2).sum())(jnp.zeros((2, 2)))
    assert np.isfinite(slope).all()


def test_area_weights_and_global_mean():
    lat = np.linspace(-87.5, 87.5, 36)
    weights = grid.area_weights(lat)
    assert weights.mean() == pytest.approx(1.0)
    sine = np.broadcast_to(np.sin(np.deg2rad(lat))[:, None] ** 2, (36, 4))
    assert grid.global_mean(sine, weights) == pytest.approx(1 / 3, abs=1e-3)  # the integral of sin^2 over the sphere; mid-point rule
    leading = jnp.broadcast_to(jnp.asarray(sine, jnp.float32), (2, 5, 36, 4))
    np.testing.assert_allclose(grid.global_mean(leading, weights), np.full((2, 5), grid.global_mean(sine, weights)), rtol=1e-5)
