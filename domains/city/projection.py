"""Degrees to metres and back: the universal transverse Mercator projection on WGS84, by our own formulas.

Source: Krueger's series as in Karney (2011), Transverse Mercator with an accuracy of a few nanometers, J. Geodesy 85, eq. 7-15 for
the conformal latitude, 35 and 36 for the coefficients to the fourth order of the third flattening, which is below 1 um within a zone.
"""

import numpy as np

from twinsim.base import BadInput

A, F = 6378137.0, 1 / 298.257223563  # m and 1: WGS84's equatorial radius and flattening (NIMA TR8350.2)
SCALE = 0.9996  # on the central meridian: definition of UTM
FALSE_EASTING, FALSE_NORTHING = 500_000.0, 10_000_000.0  # m; the latter south of the equator only
WIDEST = 84.0  # degrees: UTM ends there

_n = F / (2 - F)
_e = np.sqrt(F * (2 - F))
_radius = A / (1 + _n) * (1 + _n**2 / 4 + _n**4 / 64)  # of the rectifying sphere, Karney eq. 14
_alpha = (
    _n / 2 - 2 * _n**2 / 3 + 5 * _n**3 / 16 + 41 * _n**4 / 180,
    13 * _n**2 / 48 - 3 * _n**3 / 5 + 557 * _n**4 / 1440,
    61 * _n**3 / 240 - 103 * _n**4 / 140,
    49561 * _n**4 / 161280,
)
_beta = (
    _n / 2 - 2 * _n**2 / 3 + 37 * _n**3 / 96 - _n**4 / 360,
    _n**2 / 48 + _n**3 / 15 - 437 * _n**4 / 1440,
    17 * _n**3 / 480 - 37 * _n**4 / 840,
    4397 * _n**4 / 161280,
)


def utm_zone(lon: np.ndarray, lat: np.ndarray) -> int:
    """The zone of the points' middle: 1 to 60, negative south of the equator. Raises BadInput."""
    lon, lat = np.asarray(lon, float), np.asarray(lat, float)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all() and (np.abs(lat) <= WIDEST).all() and (np.abs(lon) <= 180).all()):
        raise BadInput(f"positions: expected longitudes within +-180 and latitudes within +-{WIDEST:g} degrees, got others or NaN")
    middle = (lon.min() + lon.max()) / 2
    zone = min(int((middle + 180) // 6) + 1, 60)
    return zone if (lat.min() + lat.max()) / 2 >= 0 else -zone


def to_metres(lon: np.ndarray, lat: np.ndarray, zone: int) -> tuple[np.ndarray, np.ndarray]:
    """Easting and northing in m of points in degrees, any shape."""
    lam, phi = np.radians(np.asarray(lon, float) - _meridian(zone)), np.radians(np.asarray(lat, float))
    tau = np.tan(phi)
    tau_c = _conformal(tau)
    xi_c = np.arctan2(tau_c, np.cos(lam))
    eta_c = np.arcsinh(np.sin(lam) / np.hypot(tau_c, np.cos(lam)))
    zeta_c = xi_c + 1j * eta_c
    zeta = zeta_c + sum(a * np.sin(2 * (j + 1) * zeta_c) for j, a in enumerate(_alpha))
    north = SCALE * _radius * zeta.real + (FALSE_NORTHING if zone < 0 else 0.0)
    return SCALE * _radius * zeta.imag + FALSE_EASTING, north


def to_degrees(x: np.ndarray, y: np.ndarray, zone: int) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude in degrees of points in m, any shape: the inverse of `to_metres`."""
    north = np.asarray(y, float) - (FALSE_NORTHING if zone < 0 else 0.0)
    zeta = (north + 1j * (np.asarray(x, float) - FALSE_EASTING)) / (SCALE * _radius)
    zeta_c = zeta - sum(b * np.sin(2 * (j + 1) * zeta) for j, b in enumerate(_beta))
    xi_c, eta_c = zeta_c.real, zeta_c.imag
    lam = np.arctan2(np.sinh(eta_c), np.cos(xi_c))
    tau_c = np.sin(xi_c) / np.hypot(np.sinh(eta_c), np.cos(xi_c))
    tau = tau_c
    for _ in range(5):  # Newton, Karney eq. 19-21: two steps reach double precision, five cost nothing
        had = _conformal(tau)
        slope = (1 + (1 - _e**2) * tau**2) / ((1 - _e**2) * np.hypot(1, tau))
        tau = tau + (tau_c - had) / np.hypot(1, had) * slope
    return np.degrees(lam) + _meridian(zone), np.degrees(np.arctan(tau))


def point_scale(x: np.ndarray) -> np.ndarray:
    """Metres on the map per metre on the ground at easting `x`, any shape; within 1e-6 in a zone (Snyder 1987, eq. 8-11, first terms)."""
    return SCALE * (1 + ((np.asarray(x, float) - FALSE_EASTING) / (SCALE * _radius)) ** 2 / 2)


def _meridian(zone: int) -> float:
    if not 1 <= abs(zone) <= 60:
        raise BadInput(f"UTM zone: expected 1 to 60, negative in the south, got {zone}")
    return 6.0 * abs(zone) - 183


def _conformal(tau: np.ndarray) -> np.ndarray:
    """Tangent of the conformal latitude of the tangent of the geographic one, Karney eq. 7-9."""
    sigma = np.sinh(_e * np.arctanh(_e * tau / np.hypot(1, tau)))
    return tau * np.hypot(1, sigma) - sigma * np.hypot(1, tau)
