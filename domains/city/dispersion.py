"""Concentrations that the traffic of straight road links causes: the R-LINE line-source model, and NO2 by photostationary chemistry.

A link is a row of point sources. Each sends a plume downwind and, as the wind meanders, a share of its matter in all directions:
    C = q * integral over the link of (1 - f) Cp + f Cm,   f = 2 sigma_v^2 / Ue^2
Sources: Snyder et al. (2013), Atmos. Environ. 77, 748 (model, meander, effective wind); Venkatram et al. (2013), Atmos. Environ. 77, 846
(spread); what they leave open (least sigma_v, least distance, cap by the mixing height, the profile made to meet the measured wind)
as EPA R-LINE v1.2 has it, whose own output the formulas are held against in tests and benchmarks. Clear of buildings only: no canyon.

Distances m, time s, angles degrees from north. Numbers are float32 and relative to the middle of the map.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf

from twinsim.base import Array, BadInput

KARMAN = 0.4
GRAVITY = 9.80665  # m s-2
AIR_HEAT = 1.2 * 1005.0  # density times heat capacity of air, J m-3 K-1
LEAST_SIGMA_V = 0.2  # m/s: R-LINE v1.2; it carries light wind and very stable air, where 1.9 u* is far less
LEAST_DISTANCE = 1.0  # m: R-LINE v1.2; nearer than this to a source is on the road
FARTHEST = 3e4  # m; beyond it the wind that carries a plume is held
DISPLACEMENT = 5.0  # zero-plane displacement over roughness length
SURE_PROFILE = 3.0  # roughness lengths above the displacement where the logarithmic profile begins to hold
POWERS = 16  # of the logarithm of distance, in which the logarithm of a plume's wind is fitted for an hour
FITTED_AT = np.geomspace(LEAST_DISTANCE, FARTHEST, 200)
_SCALE = 2 / np.log(FARTHEST / LEAST_DISTANCE)  # takes ln distance to -1 .. 1
_FIT = np.linalg.pinv(np.polynomial.polynomial.polyvander(np.log(FITTED_AT) * _SCALE - 1, POWERS)).astype(np.float32)  # [power, distance]
NODES = (16, 12)  # points of Gauss-Legendre quadrature a link, for its plume and its meander
WIDEST = 4.5  # standard deviations of a plume to either side that are integrated
MOLAR = {"NO2": 46.0055, "O3": 47.9982}  # g/mol
MOLAR_VOLUME = 24.055  # l/mol at 20 degrees C and 1013 hPa, where the EU's limits hold (Directive 2008/50/EC, annex VI)
MOLECULES = 1e-9 * 101325 / 1.380649e-23 * 1e-6  # K molecules/cm3: of a ppb at 1013 hPa, times the temperature
HALF_NORMAL = float(np.sqrt(2 / np.pi))  # mean of a half Gaussian of unit spread


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weather:
    """The surface layer, one entry an hour, `[hour]` (or without axis: one hour).

    Attributes:
      wind_speed: at `reference_height`, m/s; wind_direction: where it comes from, degrees from north.
      friction_velocity: u*, m/s.
      obukhov_length: L, m; positive is stable.
      convective_velocity: w*, m/s; give 0 in stable air. It is used as given, as R-LINE does: the stable hours of its evaluation
        files carry the place holder 1 m/s, which alone lowers their concentrations; with 0 they are 3-46 % higher.
      mixing_height: m.
      roughness: z0, m: 0.05 grass, 0.3-1.5 city (Grimmond & Oke 1999).
      reference_height: of the wind, m.
    """

    wind_speed: Array
    wind_direction: Array
    friction_velocity: Array
    obukhov_length: Array
    convective_velocity: Array
    mixing_height: Array
    roughness: Array
    reference_height: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heights:
    """How high links and receptors are, all alike.

    Attributes:
      source, receptor: m above ground.
      initial_sigma_z: depth of the mixing behind vehicles, m: 1.7 vehicle heights / 2.15 (EPA guidance).
    """

    source: Array | float = 0.5
    receptor: Array | float = 1.5
    initial_sigma_z: Array | float = 1.7 * 1.53 / 2.15


@jax.jit
def surface_layer(
    wind_speed: Array, wind_direction: Array, heat_flux: Array, mixing_height: Array, roughness: Array, reference_height: Array,
    temperature: Array | float = 288.0,
) -> Weather:  # fmt: skip
    """Weather from what a station measures, `[hour]`: friction velocity and Obukhov length that go with a wind and a heat flux.

    Unstable: u* = k U / (ln(z/z0) - psi(z/L) + psi(z0/L)), L = -rho cp T u*^3 / (k g H), iterated. Stable: the balance of neutral
    drag and stratification has a root only above a critical wind; below it u* falls in proportion (Cimorelli et al. 2005, eq. 9-14).

    Args:
      heat_flux: sensible, upwards, W/m2: 100-300 on a sunny day, -5 to -50 at night.
    """
    like = jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in
                                  (wind_speed, wind_direction, heat_flux, mixing_height, roughness, reference_height)))  # fmt: skip
    U, direction, H, zi, z0, z = like
    U = jnp.maximum(U, 0.3)  # calms: a cup anemometer starts there
    above_ground = jnp.maximum(z - DISPLACEMENT * z0, SURE_PROFILE * z0)
    drag = KARMAN / jnp.log(above_ground / z0)
    up = jnp.maximum(H, 0.0) / AIR_HEAT

    def length(u_star: jax.Array) -> jax.Array:
        return jnp.minimum(-temperature * u_star**3 / (KARMAN * GRAVITY * jnp.maximum(up, 1e-5)), -1.0)

    unstable = jax.lax.fori_loop(0, 12, lambda _, u_star: KARMAN * U / _profile(above_ground, z0, length(u_star)), drag * U)
    # theta* = -H / (rho cp u*), at most 0.08 K as observed (van Ulden & Holtslag 1985)
    neutral = drag * U
    theta = jnp.clip(jnp.maximum(-H, 0.0) / AIR_HEAT / neutral, 1e-4, 0.08)
    u0 = jnp.sqrt(5.0 * z * GRAVITY * theta / temperature)
    critical = 2 * u0 / jnp.sqrt(drag)
    above = jnp.maximum(U, critical)
    root = 0.5 * drag * above * (1 + jnp.sqrt(jnp.maximum(1 - (critical / above) ** 2, 1e-12)))
    stable = root * U / above
    theta = theta * U / above
    L_stable = temperature * stable**2 / (KARMAN * GRAVITY * theta)
    rising = H > 0
    return Weather(
        wind_speed=U,
        wind_direction=direction,
        friction_velocity=jnp.where(rising, unstable, stable),
        obukhov_length=jnp.where(rising, length(unstable), jnp.maximum(L_stable, 1.0)),
        convective_velocity=jnp.cbrt(GRAVITY / temperature * up * zi),
        mixing_height=zi,
        roughness=z0,
        reference_height=z,
    )


def sigma_v(weather: Weather) -> jax.Array:
    """Standard deviation of the crosswind, m/s: sqrt((0.6 w*)^2 + (1.9 u*)^2), at least 0.2."""
    w = jnp.maximum(weather.convective_velocity, 0.0)
    return jnp.maximum(jnp.sqrt((0.6 * w) ** 2 + (1.9 * weather.friction_velocity) ** 2), LEAST_SIGMA_V)


def wind(height: Array | float, weather: Weather) -> jax.Array:
    """Mean wind at a height above ground, m/s, of one hour: the Monin-Obukhov profile that passes through the measured wind.

    Within the displacement height it is sqrt(2) sigma_v of the profile, as in R-LINE v1.2; between there and where the logarithm
    holds, linear, where R-LINE would follow the logarithm to minus infinity.
    """
    return _similarity_wind(height, weather) * weather.wind_speed / _similarity_wind(weather.reference_height, weather)


def spread(distance: Array, weather: Weather, heights: Heights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Crosswind and vertical spread of a point's plume, m, and the wind that carries it, m/s; of one hour, for any distances >= 0.

    The wind is that at the plume's mean height, which grows with the spread, which falls with the wind: solved by iteration.
    """
    x = jnp.maximum(jnp.asarray(distance), LEAST_DISTANCE)
    zs, sv = heights.source, sigma_v(weather)

    def effective(step: int, U: jax.Array) -> jax.Array:
        _, sz = _spread_in(U, jnp.log(x), weather, heights)
        mean_height = HALF_NORMAL * sz * jnp.exp(-0.5 * (zs / sz) ** 2) + zs * erf(zs / (np.sqrt(2) * sz))
        return jnp.sqrt(2 * sv**2 + wind(jnp.maximum(mean_height, zs), weather) ** 2)

    U = jax.lax.fori_loop(0, 10, effective, jnp.ones_like(x) * jnp.sqrt(2 * sv**2 + wind(zs, weather) ** 2))
    return *_spread_in(U, jnp.log(x), weather, heights), U


def _spread_in(U: jax.Array, ln_x: jax.Array, weather: Weather, heights: Heights) -> tuple[jax.Array, jax.Array]:
    """Crosswind and vertical spread in a given wind, at a distance given by its logarithm (Venkatram et al. 2013)."""
    L, u_star, s0 = jnp.abs(weather.obukhov_length), weather.friction_velocity, heights.initial_sigma_z
    stable = weather.obukhov_length > 0
    k, x, power = u_star / U, jnp.exp(ln_x), jnp.exp((ln_x - jnp.log(L)) * jnp.where(stable, 2 / 3, 1.0))  # (x/L)^(2/3), or x/L
    growth = jnp.where(stable, 3.0, 1.5) * k * power
    sz = 0.57 * k * x * jnp.where(stable, 1 / (1 + growth), 1 + growth)
    sz = jnp.minimum(jnp.sqrt(sz**2 + s0**2), HALF_NORMAL * weather.mixing_height)
    own = jnp.sqrt(jnp.maximum(sz**2 - s0**2, 1e-12))
    sy = 1.6 * sigma_v(weather) / u_star * own * jnp.where(stable, 1 + 2.5 * own / L, jax.lax.rsqrt(1 + own / L))
    return sy, sz


def _similarity_wind(height: Array | float, weather: Weather) -> jax.Array:
    z0, L = weather.roughness, weather.obukhov_length
    above = (height - DISPLACEMENT * z0) / z0
    held = jnp.maximum(above, SURE_PROFILE)
    profile = weather.friction_velocity / KARMAN * _profile(held * z0, z0, L)
    canopy = np.sqrt(2) * sigma_v(weather)
    share = jnp.clip(above / SURE_PROFILE, 0.0, 1.0)
    return canopy + share * (profile - canopy)


def _profile(z: Array, z0: Array, L: Array) -> jax.Array:
    """ln(z/z0) - psi(z/L) + psi(z0/L): Businger's psi in unstable, van Ulden & Holtslag's (1985) in stable air."""
    return jnp.log(z / z0) - _psi(z, L) + _psi(z0, L)


def _psi(z: Array, L: Array) -> jax.Array:
    size = jnp.abs(L)
    x = jnp.sqrt(jnp.sqrt(1 + 16 * z / size))
    unstable = 2 * jnp.log((1 + x) / 2) + jnp.log((1 + x**2) / 2) - 2 * jnp.arctan(x) + np.pi / 2
    return jnp.where(L > 0, -17 * (1 - jnp.exp(-0.29 * z / size)), unstable)


# The wind that carries an hour's plume depends on distance alone. A polynomial spares the iteration for every point of every link.


def _fitted(weather: Weather, heights: Heights) -> jax.Array:
    """ln of the wind that carries a plume, m/s, as a polynomial of ln distance, `[power]`."""
    *_, U = spread(jnp.asarray(FITTED_AT, jnp.float32), weather, heights)
    return jnp.dot(jnp.asarray(_FIT), jnp.log(U), precision="highest")


def _wind_at(fitted: jax.Array, ln_x: jax.Array) -> jax.Array:
    u = ln_x * float(_SCALE) - 1
    value = jnp.zeros_like(u) + fitted[-1]
    for power in reversed(range(POWERS)):
        value = value * u + fitted[power]
    return jnp.exp(value)


def _ln(distance: jax.Array) -> jax.Array:
    return jnp.log(jnp.clip(distance, LEAST_DISTANCE, FARTHEST))


def _sine(angle: jax.Array) -> jax.Array:
    """Sine of -pi/2 .. pi/2 by its series, to 1e-7; ten times as fast on a CPU as XLA's, which is made for any angle."""
    value, square = jnp.zeros_like(angle), angle**2
    for odd in (11, 9, 7, 5, 3, 1):
        value = value * square + (-1) ** (odd // 2) / math.factorial(odd)
    return value * angle


def _vertical(sz: jax.Array, heights: Heights) -> jax.Array:
    """The plume's vertical distribution and its image below ground, at the receptor, 1/m."""
    near, far = (jnp.exp(-0.5 * ((heights.source + sign * heights.receptor) / sz) ** 2) for sign in (-1, 1))
    return (near + far) / (float(np.sqrt(2 * np.pi)) * sz)


def _unit_link(
    weather: Weather, heights: Heights, fitted: jax.Array, widest: jax.Array, along: jax.Array, start: jax.Array, end: jax.Array,
    receptor: jax.Array, nodes: tuple[int, int],
) -> jax.Array:  # fmt: skip
    """Concentration at one receptor from one link that emits 1 g/(m s), s/m^2.

    Integrated over the angle under which the receptor sees the link. There a plume is a bell of nearly constant width, near or far, and
    the meander nearly constant. The plume is integrated within `widest` (radians) of where the wind comes from only.
    """
    t, w = end - start, receptor - start
    length = jnp.maximum(jnp.sqrt(jnp.sum(t**2)), 1e-3)
    t = t / length
    foot = jnp.sum(w * t)
    beside = w[0] * t[1] - w[1] * t[0]  # the receptor's distance to the right of the link's line
    h = jnp.sqrt(beside**2 + LEAST_DISTANCE**2)
    first, last = jnp.arctan(-foot / h), jnp.arctan((length - foot) / h)

    def seen(first: jax.Array, last: jax.Array, nodes: int) -> tuple[jax.Array, ...]:
        points, weights = np.polynomial.legendre.leggauss(nodes)
        first, last = jax.lax.optimization_barrier((first, last))  # or XLA takes their arctangents again for every node
        angle = (first + last) / 2 + (last - first) / 2 * points.astype(np.float32)
        tangent = _sine(angle) / _sine(np.pi / 2 - jnp.abs(angle))
        s = foot + h * tangent
        dx, dy = w[0] - s * t[0], w[1] - s * t[1]
        stretch = h * (1 + tangent**2) * (last - first) / 2 * weights.astype(np.float32)
        return dx * along[0] + dy * along[1], dy * along[0] - dx * along[1], stretch

    # the point of the line straight upwind is seen at this angle; on the other side of the road, or along it, at none
    across = (along[0] * t[1] - along[1] * t[0]) * jnp.where(beside < 0, -1.0, 1.0)
    upwind = jnp.arctan2(-(along[0] * t[0] + along[1] * t[1]), across)

    def within(angle: jax.Array) -> jax.Array:
        return jnp.clip(angle, upwind - widest, upwind + widest)

    def share(U: jax.Array) -> jax.Array:
        return jnp.minimum(2 * sigma_v(weather) ** 2 / U**2, 1.0)

    X, Y, stretch = seen(within(first), within(last), nodes[0])
    ln_x = _ln(X)
    U = _wind_at(fitted, ln_x)
    sy, sz = _spread_in(U, ln_x, weather, heights)
    across_wind = jnp.exp(-0.5 * (Y / sy) ** 2) / (float(np.sqrt(2 * np.pi)) * sy)
    direct = jnp.where(X > 0, (1 - share(U)) * across_wind * _vertical(sz, heights) / U, 0.0)

    X, Y, around = seen(first, last, nodes[1])
    ln_r = _ln(jnp.sqrt(X**2 + Y**2))
    U = _wind_at(fitted, ln_r)
    _, sz = _spread_in(U, ln_r, weather, heights)
    meander = share(_wind_at(fitted, _ln(jnp.abs(X)))) * _vertical(sz, heights) / (2 * np.pi * jnp.exp(ln_r) * U)
    return jnp.sum(direct * stretch) + jnp.sum(meander * around)


def concentration(
    start: np.ndarray, end: np.ndarray, receptors: np.ndarray, emission: Array, weather: Weather, heights: Heights | None = None,
    nodes: tuple[int, int] = NODES, at_once: int = 1 << 20,
) -> jax.Array:  # fmt: skip
    """What the links add to the air at every receptor and hour, g/m3, `[hour, ..., receptor]`; linear in the emission.

    Args:
      start, end: of the links, m, `[link, 2]`; receptors: m, `[receptor, 2]`. Projected, x east and y north; host arrays.
      emission: g/(m s), `[hour, ..., link]`, pollutants or scenarios in the middle: they share the work.
      weather: `[hour]`.
      nodes: of quadrature a link, for plume and meander.
      at_once: how many of them to hold in memory at a time, over all links and a share of the receptors; 1 << 26 suits a GPU.
    """
    heights = heights or Heights()
    start, end, receptors = (np.asarray(x, np.float64) for x in (start, end, receptors))
    for name, x in (("start", start), ("end", end), ("receptors", receptors)):
        if x.ndim != 2 or x.shape[1] != 2 or not np.isfinite(x).all():
            raise BadInput(f"dispersion: {name}: expected finite [n, 2] metres, got shape {x.shape}")
    links, hours = len(start), (*np.shape(weather.wind_speed), 0)[0]
    if len(end) != links or np.shape(emission)[:1] != (hours,) or np.shape(emission)[-1:] != (links,):
        raise BadInput(f"dispersion: expected emission [hour {hours}, ..., link {links}] and as many ends, got {np.shape(emission)}")
    middle = receptors.mean(0) if len(receptors) else np.zeros(2)
    near = [(x - middle).astype(np.float32) for x in (start, end, receptors)]
    chunk = int(np.clip(at_once // (max(nodes) * max(links, 1)), 1, max(len(receptors), 1)))
    return _concentration(*near, jnp.asarray(emission, jnp.float32), weather, heights, nodes, chunk)


@partial(jax.jit, static_argnames=("nodes", "chunk"))
def _concentration(start, end, receptors, emission, weather, heights, nodes, chunk):
    pieces = -(-len(receptors) // chunk)
    padded = jnp.pad(receptors, ((0, pieces * chunk - len(receptors)), (0, 0)), mode="edge").reshape(pieces, chunk, 2)

    def an_hour(hour):
        weather, q = hour
        fitted = _fitted(weather, heights)
        near = jnp.linspace(0.0, np.log(1e3), 32)  # sy / x is largest near the road, or in convective air some hundred metres away
        widest = jnp.arctan(WIDEST * jnp.max(_spread_in(_wind_at(fitted, near), near, weather, heights)[0] / jnp.exp(near)))
        towards = jnp.deg2rad(270.0 - weather.wind_direction)
        along = jnp.stack([jnp.cos(towards), jnp.sin(towards)])
        over_links = jax.vmap(lambda a, b, r: _unit_link(weather, heights, fitted, widest, along, a, b, r, nodes), (0, 0, None))

        @jax.checkpoint  # the unit concentrations of all pairs would not fit
        def piece(some):
            unit = jax.vmap(over_links, (None, None, 0))(start, end, some)  # [receptor, link]
            return jnp.einsum("...l,rl->...r", q, unit, precision="highest")

        found = jax.lax.map(piece, padded)  # [piece, ..., receptor]
        return jnp.moveaxis(found, 0, -2).reshape(*q.shape[:-1], pieces * chunk)[..., : len(receptors)]

    return jax.lax.map(an_hour, (weather, emission))


def photostationary(nox: Array, oxidant: Array, photolysis: Array | float = 8e-3, temperature: Array | float = 288.0) -> jax.Array:
    """NO2 in the steady state of NO + O3 -> NO2, NO2 + light -> NO + O3, ppb; NOx = NO + NO2 and Ox = O3 + NO2 are kept.

    k (NOx - NO2)(Ox - NO2) = J NO2, the root below both (Leighton 1961), in the form that does not cancel: where J is 0, at night,
    the scarcer of the two is used up. It holds some minutes from the road; nearer to it there is less NO2 than this.

    Args:
      nox, oxidant: ppb. photolysis: J, 1/s, 0 at night to about 0.01 at noon.
    """
    J = jnp.asarray(photolysis) / rate_constant(temperature)
    nox, oxidant = jnp.asarray(nox), jnp.asarray(oxidant)
    A = nox + oxidant + J
    # (A^2 - 4 NOx Ox) = (NOx - Ox)^2 + J (2 NOx + 2 Ox + J): no difference of large numbers
    root = jnp.sqrt(jnp.maximum((nox - oxidant) ** 2 + J * (2 * (nox + oxidant) + J), 1e-12))
    return 2 * nox * oxidant / jnp.maximum(A + root, 1e-12)


def rate_constant(temperature: Array | float = 288.0) -> jax.Array:
    """k of NO + O3, 1/(ppb s): 1.4e-12 exp(-1310 / T) cm3/s (IUPAC, Atkinson et al. 2004)."""
    T = jnp.asarray(temperature, jnp.float32)
    return 1.4e-12 * MOLECULES * jnp.exp(-1310.0 / T) / T


def no2(
    nox_of_traffic: Array, no2_of_traffic: Array, background_nox: Array | float, background_no2: Array | float,
    background_o3: Array | float, photolysis: Array | float = 8e-3, temperature: Array | float = 288.0,
) -> jax.Array:  # fmt: skip
    """NO2 at a receptor, ug/m3: what traffic adds and the background, brought to the photostationary state.

    Args:
      nox_of_traffic, no2_of_traffic: from `concentration`, ug/m3; NOx counted as NO2, and of that the part emitted as NO2.
      background_nox, background_no2: ug/m3, NOx as NO2; background_o3: ug/m3.
    """
    to_ppb = {name: MOLAR_VOLUME / mass for name, mass in MOLAR.items()}
    nox = (jnp.asarray(nox_of_traffic) + background_nox) * to_ppb["NO2"]
    oxidant = (jnp.asarray(no2_of_traffic) + background_no2) * to_ppb["NO2"] + jnp.asarray(background_o3) * to_ppb["O3"]
    return photostationary(nox, oxidant, photolysis, temperature) / to_ppb["NO2"]
