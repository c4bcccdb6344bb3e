"""The laws a climate state obeys, each as a pure function of one sample that says how far the law is broken.

Derivatives are taken on a regular or Gaussian latitude axis; fields are `[lat, lon]` in SI units. All can be traced.
"""

import jax.numpy as jnp
import numpy as np

from domains.climate.grid import coarsen, global_mean, matmul
from twinsim.base import Array, BadInput

DRY_AIR = 287.05  # gas constant, J kg-1 K-1
GRAVITY = 9.80665  # m s-2
ROTATION = 7.292e-5  # rad s-1
EARTH_RADIUS = 6.371e6  # m
SIGMA = "sigma"  # what a data set says of its `levels` where its variables lie on one of the model's own
MID_LATITUDES = (25.0, 65.0)  # degrees, both hemispheres: where the wind is nearly geostrophic


def below(x: Array, lower: float) -> Array:
    """The largest amount by which a value of `x` lies under its lower bound; 0 where none does."""
    return jnp.maximum(lower - jnp.min(x), 0.0)


def above(x: Array, upper: float) -> Array:
    """The largest amount by which a value of `x` lies over its upper bound; 0 where none does."""
    return jnp.maximum(jnp.max(x) - upper, 0.0)


def block_mean_mismatch(x: Array, coarse: Array, factor: int) -> Array:
    """The largest difference between the block means of `x` `[y, x]` and the coarse field `[y/factor, x/factor]`."""
    return jnp.max(jnp.abs(coarsen(x, factor) - coarse))


def geostrophic_wind(zg: Array, ta: Array, ps: Array, lat: np.ndarray) -> Array:
    """Zonal wind in geostrophic balance on a sigma surface, m s-1, `[lat, lon]`; 0 on the equator itself, where there is none.

    u_g = -(g dz/dy + R T d ln ps/dy) / f, the two-term pressure-gradient force of sigma coordinates (Phillips 1957).

    Args:
      zg, ta: geopotential height (m) and temperature (K) on the surface; ps: surface pressure (Pa).
      lat: degrees, `[lat]`.
    """
    phi = np.deg2rad(np.asarray(lat, np.float64))
    f = 2 * ROTATION * np.sin(phi)[:, None]
    f = np.where(np.abs(f) < 1e-9, np.inf, f).astype(zg.dtype)
    force = GRAVITY * _northward(zg, phi) + DRY_AIR * ta * _northward(jnp.log(ps), phi)
    return -force / f


def geostrophic_residual(zg: Array, ta: Array, ps: Array, ua: Array, lat: np.ndarray) -> Array:
    """Root mean square of u - u_g over the standard deviation of u, 25-65 degrees of both hemispheres; 0 in exact balance."""
    u, balanced = _mid_latitudes(ua, zg, ta, ps, lat)
    return jnp.sqrt(jnp.mean((u - balanced) ** 2)) / jnp.std(u)


def mass_deviation(ps: Array, weights: np.ndarray, expected: Array | float) -> Array:
    """|global mean surface pressure - the expected one|, Pa: the mass of the atmosphere over g and the Earth's area."""
    return jnp.abs(global_mean(ps - expected, weights))  # the mean of a small difference, for float32


def mid_latitudes(lat: np.ndarray) -> np.ndarray:
    """Which rows of a grid lie where the wind is nearly geostrophic, `[lat]`."""
    return (np.abs(lat) > MID_LATITUDES[0]) & (np.abs(lat) < MID_LATITUDES[1])


def _mid_latitudes(ua: Array, zg: Array, ta: Array, ps: Array, lat: np.ndarray) -> tuple[Array, Array]:
    rows = np.flatnonzero(mid_latitudes(lat))
    if not len(rows):
        raise BadInput(f"geostrophic balance: expected latitudes between {MID_LATITUDES[0]} and {MID_LATITUDES[1]} degrees, got none")
    return jnp.asarray(ua)[rows], geostrophic_wind(zg, ta, ps, lat)[rows]


def _northward(x: Array, phi: np.ndarray) -> Array:
    """Derivative of `x` `[lat, lon]` towards north per metre; second order on an uneven axis, one-sided at its ends."""
    x = jnp.asarray(x)
    return matmul(_derivative_matrix(phi).astype(x.dtype), x - jnp.mean(x)) / EARTH_RADIUS  # less the mean: float32 keeps the slope


def _derivative_matrix(axis: np.ndarray) -> np.ndarray:
    """The derivative of `numpy.gradient` along an axis, as a matrix `[n, n]`."""
    return np.asarray(np.gradient(np.eye(len(axis)), axis, axis=0))
