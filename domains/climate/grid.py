"""Block means on a grid, the way back to the fine grid, and area means on a sphere.

A coarse cell is the mean of `factor` x `factor` fine cells. Everything here works on `[..., y, x]`, for numpy arrays and
under `jit` alike: an input of numpy gives numpy, one of jax gives jax.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import zoom

from twinsim.base import Array, BadInput

EDGE = 4  # coarse cells kept on either side of an axis while interpolating; the cubic spline has forgotten its end by then


def coarsen(x: Array, factor: int) -> Array:
    """Block means of `x` `[..., y, x]` over `factor` x `factor` cells. Raises BadInput."""
    *lead, ny, nx = x.shape
    if factor < 1 or ny % factor or nx % factor:
        raise BadInput(f"coarsen: expected a grid that factor {factor} divides, got {ny} x {nx} cells")
    return x.reshape(*lead, ny // factor, factor, nx // factor, factor).mean((-3, -1))


def repeat(x: Array, factor: int) -> Array:
    """Every cell of `x` `[..., y, x]` as a block of `factor` x `factor` equal cells."""
    xp = array_module(x)
    return xp.repeat(xp.repeat(x, factor, axis=-2), factor, axis=-1)


def refine(x: Array, factor: int, order: Literal[1, 3] = 1, periodic: tuple[bool, bool] = (False, False)) -> Array:
    """Spline interpolation of cell means `[..., y, x]` to a grid `factor` times finer, cell-centred.

    Beyond the outer cell centres edge values are extended, or wrapped where the axis is periodic. Order 1 is bilinear,
    3 the interpolating cubic spline.
    """
    my = refine_matrix(x.shape[-2], factor, periodic[0], order).astype(x.dtype)
    mx = refine_matrix(x.shape[-1], factor, periodic[1], order).astype(x.dtype)
    return matmul(matmul(my, x), mx.T)


@lru_cache(maxsize=64)
def refine_matrix(n: int, factor: int, periodic: bool = False, order: Literal[1, 3] = 1) -> np.ndarray:
    """The interpolation of `refine` along one axis, as a matrix `[n * factor, n]` whose rows sum to one. Read-only."""
    if order not in (1, 3):
        raise BadInput(f"refine: expected order 1 or 3, got {order}")
    mode: Literal["wrap", "edge"] = "wrap" if periodic else "edge"
    unit = np.pad(np.eye(n), ((EDGE, EDGE), (0, 0)), mode=mode)
    fine = zoom(unit, (factor, 1), order=order, mode="nearest", grid_mode=True)
    matrix = fine[EDGE * factor : -EDGE * factor]
    matrix.setflags(write=False)
    return matrix


def conserve_block_mean(x: Array, coarse: Array, factor: int, kind: Literal["shift", "scale"] = "shift") -> Array:
    """The field closest to `x` `[..., y, x]` whose block means are `coarse` `[..., y/factor, x/factor]`.

    "shift" adds one number a block (orthogonal projection). "scale" multiplies by one, for quantities that are never
    negative: negative cells of `x` become 0 first, and a block without anything to scale is filled evenly.
    """
    if kind == "shift":
        return x + repeat(coarse - coarsen(x, factor), factor)
    if kind != "scale":
        raise BadInput(f"conserve_block_mean: expected kind 'shift' or 'scale', got {kind!r}")
    xp = array_module(x)
    positive, wanted = xp.maximum(x, 0), xp.maximum(coarse, 0)
    # its scale cancels, so no gradient goes by way of it: that of a maximum is 0 / 0 where it is computed twice and rounded otherwise
    peak = repeat(_block_max(positive if xp is np else jax.lax.stop_gradient(positive), factor), factor)
    empty = peak < np.finfo(np.float32).tiny * 1e6  # relative shape first, so that tiny blocks neither over- nor underflow
    shape = xp.where(empty, 1.0, positive / xp.where(empty, 1.0, peak)).astype(x.dtype)
    return shape * repeat(wanted / coarsen(shape, factor), factor)


def area_weights(lat: Array) -> np.ndarray:
    """Cosine of latitude (degrees) `[lat]`, normalised to mean one."""
    weight = np.cos(np.deg2rad(np.asarray(lat, np.float64)))
    return weight / weight.mean()


def global_mean(x: Array, weights: np.ndarray) -> Array:
    """Mean of `x` `[..., lat, lon]` under latitude weights `[lat]`."""
    weight = np.asarray(weights, x.dtype)
    return matmul(x.mean(-1), weight / weight.sum())


def array_module(*x: Any) -> ModuleType:
    """jax.numpy where one of the arrays is a jax array (or traced), numpy otherwise."""
    return jnp if any(isinstance(a, jax.Array) for a in x) else np


def matmul(a: Array, b: Array) -> Array:
    """Matrix product at full precision; accelerators would round 300 K to a tenth of a kelvin otherwise."""
    if array_module(a, b) is jnp:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return np.matmul(a, b)


def _block_max(x: Array, factor: int) -> Array:
    *lead, ny, nx = x.shape
    return x.reshape(*lead, ny // factor, factor, nx // factor, factor).max((-3, -1))
