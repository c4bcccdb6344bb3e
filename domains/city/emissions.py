"""What traffic emits: by the second from speed and acceleration (HBEFA4), by the link from flow and mean speed, for a mix of vehicles.

HBEFA4 as in SUMO (eclipse-sumo, src/utils/emissions/HelpersHBEFA4.h), in mg/s, v in m/s, a in m/s2 with the slope's share in it:
    e = c0 + c1 v + c2 a + c3 v^2 + c4 v^3 + c5 a v + c6 a v^2;   0 where a combustion vehicle coasts, never below 0
That is linear in the coefficients: the mean emission of any vehicle needs of its driving only seven means, those of 1, v, a, v^2, v^3,
a v, a v^2 while the engine pulls. `DRIVING` has them by mean speed. Hot engines only: there are no constants for cold starts here.

Pollutants, in this order wherever an axis has them: CO2, NOx (as NO2), NO2 (the primary share of NOx), PM2.5, PM10 (exhaust and wear).
"""

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from twinsim.base import Array, BadInput

POLLUTANTS = ("CO2", "NOx", "NO2", "PM2.5", "PM10")
GRAVITY = 9.80665  # m s-2
COASTING = (-0.11, -0.0129)  # m/s2, and per m/s: deceleration without the engine; of SUMO 1.28's `emissionsMap`, to 0.002 m/s2
COASTING_FROM = 10 / 3.6  # m/s; below it falls in proportion to 0
LEAST_SPEED = 0.3  # m/s, of a mean: in a standing queue emission per metre has no bound

# Means while the engine pulls, by mean speed over a link: [v, P, E[v]/v, E[a], E[v^2]/v, sqrt(E[v^3]/v), E[a v]/v, E[a v^2]/v], E over all
# seconds, standing ones too, P the share of seconds. To 13 m/s from 2.3 million vehicle seconds of SUMO 1.28 on Bologna, acosta (real
# morning demand, signals, 900 s a link and sample); held out, pasubio comes to 1.00 (CO2) and 0.99 (NOx) of the sum of seconds. From
# 20 m/s on a steady cruise, which is an assumption; between the two, linear.
DRIVING = np.array([
    [0.764, 0.903, 0.648, 0.120, 4.871, 6.865, 0.847, 6.046],
    [1.282, 0.865, 0.606, 0.158, 5.044, 7.179, 0.723, 5.462],
    [1.842, 0.813, 0.674, 0.233, 5.479, 7.461, 0.733, 5.688],
    [2.530, 0.828, 0.637, 0.229, 6.290, 8.362, 0.651, 5.860],
    [3.444, 0.791, 0.654, 0.278, 6.680, 8.742, 0.604, 5.647],
    [4.353, 0.763, 0.659, 0.309, 6.978, 9.053, 0.548, 5.253],
    [5.670, 0.769, 0.676, 0.323, 7.815, 9.795, 0.514, 5.426],
    [6.986, 0.723, 0.669, 0.381, 7.720, 9.676, 0.525, 5.639],
    [8.998, 0.607, 0.621, 0.415, 7.102, 9.230, 0.455, 4.921],
    [10.551, 0.679, 0.685, 0.500, 8.256, 10.131, 0.508, 5.800],
    [11.548, 0.681, 0.693, 0.475, 8.460, 10.267, 0.470, 5.572],
    [12.435, 0.677, 0.686, 0.299, 8.866, 10.767, 0.302, 3.885],
    [12.926, 0.680, 0.690, 0.228, 9.165, 11.086, 0.236, 3.195],
    [20.0, 1.0, 1.0, 0.0, 20.0, 20.0, 0.0, 0.0],
    [45.0, 1.0, 1.0, 0.0, 45.0, 45.0, 0.0, 0.0],
])  # fmt: skip

# HBEFA4 coefficients of some classes, c0 .. c6 (HBEFA by INFRAS, recovered from SUMO 1.28's `emissionsMap`): CO2, NOx, PM. SUMO's PM holds
# wear too: an electric car has 0.026 mg/m of it. What a class has above the electric vehicle of its kind is taken for exhaust.
_NONE = (0.0,) * 7
_CLASSES: dict[str, tuple[str, float, tuple[tuple[float, ...], ...]]] = {
    # kind; NO2 / NOx at the tailpipe (EMEP/EEA guidebook 2019, 1.A.3.b, from memory: not verified against the page)
    "PC_petrol_Euro-4": ("PC", 0.03, (
        (1521, 15.59, 695.1, 0, 0.1199, 132.5, 3.434),
        (0.6117, 0, 0, 0, 5.485e-5, 0.04339, 0.002726),
        (0, 0.02589, 0, 0.0001229, 5.704e-6, 0, 0.000362))),
    "PC_petrol_Euro-6d": ("PC", 0.03, (
        (1275, 26.43, 780.1, 0, 0.08965, 121.7, 2.9),
        (0, 0, 0, -1.981e-7, 6.379e-5, 0, 0.004489),
        (0, 0.02654, 0.01022, 0.0001581, 0, 0.001608, 1.296e-7))),
    "PC_diesel_Euro-4": ("PC", 0.46, (
        (1322, 46.88, 1029, 0, 0.1017, 126.1, 5.705),
        (5.261, 0, 0, 0, 0.001182, 0, 0.08146),
        (0.3195, 0.03786, 0.09338, 0.0001217, 1.292e-5, 0.03408, 3.288e-7))),
    "PC_diesel_Euro-5": ("PC", 0.33, (
        (1246, 45.41, 901.9, 0, 0.09496, 128.5, 5.049),
        (10.05, 0.01933, 1.517, 0, 0.001125, 0.1982, 0.0793),
        (0.02772, 0.02592, 0.01079, 0.0001217, 7.57e-7, 0, 3.005e-5))),
    "PC_diesel_Euro-6d": ("PC", 0.30, (
        (1299, 54.8, 866.5, 0, 0.09259, 165.1, 4.467),
        (0.2819, 0, 0, 0, 5.057e-5, 0.01544, 0.003125),
        (0.002852, 0.02593, 0, 0.0001213, 6.171e-7, 0, 4.547e-5))),
    "PC_BEV": ("PC", 0.0, (_NONE, _NONE, (0, 0.02593, 0, 0.0001213, 0, 0, 0))),
    "LCV_diesel_N1-III_Euro-5": ("LDV", 0.33, (
        (1933, 38.65, 437, 0, 0.2241, 259, 7.088),
        (8.498, 0, 1.572, 0, 0.002003, 0, 0.1285),
        (0.02166, 0.02587, 0.002492, 0.0001523, 1.779e-7, 0.0005699, 6.661e-6))),
    "LCV_diesel_N1-III_Euro-6d": ("LDV", 0.30, (
        (1754, 31.71, 650, 0, 0.207, 202.2, 7.559),
        (0.1608, 0.02736, 0, 0, 9.206e-5, 0.06855, 0.004466),
        (0, 0.02578, 0.275, 0.0001274, 3.976e-5, 0, 4.433e-6))),
    "LCV_BEV_N1-IIII": ("LDV", 0.0, (_NONE, _NONE, (0, 0.02577, 0, 0.0001278, 0, 0, 4.853e-6))),
    "RT_gt7_5-12t_Euro-VI_D-E": ("HDV", 0.10, (
        (0, 490.3, 0, 3.054, 0, 1141, 3.487),
        (0.7158, 0.04177, 0.1748, 0, 0, 0, 0),
        (1.445, 0, 0, 5.683e-5, 0.0001267, 0.004605, 9.897e-5))),
    "RigidTruck_BEV_gt7.5-12t": ("HDV", 0.0, (_NONE, _NONE, (1.431, 0, 0, 0, 0.0001282, 0.001646, 0.0001758))),
    "UBus_Std_gt15-18t_Euro-V_SCR": ("Bus", 0.10, (
        (2645, 670.1, 2210, -0.001055, 0, 1651, 0),
        (26.86, 0.4541, 0, 0.003209, 0, 0.0487, 0.1033),
        (1.959, 0.007787, 0.841, 0, 0.0001433, 0, 4.002e-5))),
    "UBus_Std_gt15-18t_Euro-VI_D-E": ("Bus", 0.10, (
        (2471, 665.1, 2176, -0.001055, 0, 1651, 0),
        (1.96, 0, 0, -7.813e-8, 0.0001055, 0, 0),
        (1.466, 0.004513, 0.01026, 1.05e-5, 0.0001199, 0.002134, 0.0001646))),
    "UBus_Electric_Std_gt15-18t": ("Bus", 0.0, (_NONE, _NONE, (1.197, 0.014, 0, -7.812e-8, 0.0001205, 0, 0))),
    "MC_4S_gt250cc_Euro-4": ("Motorcycle", 0.04, (
        (1008, 0, 34.01, 1.062, 0.07482, 25.41, 1.053),
        (0, 0, 0, 0, 5.923e-5, 0.00128, 0.001118),
        (0.2206, 0.001962, 0, -3.348e-9, 1.046e-6, 0, 0))),
    "MC_BEV": ("Motorcycle", 0.0, (_NONE, _NONE, (0.1436, 0.000577, 0, -3.348e-9, 1.046e-6, 0, 0))),
}  # fmt: skip
_ELECTRIC = {
    "PC": "PC_BEV",
    "LDV": "LCV_BEV_N1-IIII",
    "HDV": "RigidTruck_BEV_gt7.5-12t",
    "Bus": "UBus_Electric_Std_gt15-18t",
    "Motorcycle": "MC_BEV",
}
# tyres, brakes and road surface, PM2.5 and PM10, mg/km (EMEP/EEA guidebook 2019 Tier 1, as in the German inventory report 2022)
WEAR = {
    "PC": (4.49 + 2.93 + 4.05, 6.40 + 7.35 + 7.50),
    "LDV": (7.10 + 4.56 + 4.05, 10.1 + 11.5 + 7.50),
    "HDV": (18.9 + 12.7 + 20.5, 27.0 + 32.0 + 38.0),
    "Bus": (18.9 + 12.7 + 20.5, 24.3 + 28.8 + 34.2),
    "Motorcycle": (1.93 + 1.44 + 1.62, 2.80 + 3.63 + 3.00),
}
# An example of a European city's traffic by vehicle kilometres: an assumption, no statistic of any city.
EXAMPLE_MIX = {
    "PC_petrol_Euro-4": 0.22, "PC_petrol_Euro-6d": 0.26, "PC_diesel_Euro-4": 0.05, "PC_diesel_Euro-5": 0.12, "PC_diesel_Euro-6d": 0.14,
    "PC_BEV": 0.04, "LCV_diesel_N1-III_Euro-5": 0.04, "LCV_diesel_N1-III_Euro-6d": 0.06, "RT_gt7_5-12t_Euro-VI_D-E": 0.03,
    "UBus_Std_gt15-18t_Euro-V_SCR": 0.005, "UBus_Std_gt15-18t_Euro-VI_D-E": 0.015, "MC_4S_gt250cc_Euro-4": 0.02,
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fleet:
    """A mix of vehicles.

    Attributes:
      share: of the vehicle kilometres, `[..., class]`, sums to 1; with a leading `[link]` where zones differ.
      hot: HBEFA4 coefficients of CO2, NOx and exhaust PM, mg/s, `[class, 3, 7]`.
      no2: mass share of NOx that leaves the tailpipe as NO2, `[class]`.
      wear: PM2.5 and PM10 of tyres, brakes and road, mg/m, `[class, 2]`.
      classes: HBEFA4 names. kinds: PC, LDV, HDV, Bus or Motorcycle, `[class]`.
    """

    share: Array
    hot: Array
    no2: Array
    wear: Array
    classes: tuple[str, ...] = field(metadata={"static": True})
    kinds: tuple[str, ...] = field(metadata={"static": True})


def fleet(mix: Mapping[str, float] | None = None) -> Fleet:
    """The fleet of a mix, HBEFA4 class -> share of the vehicle kilometres; the electric class of every kind in it is added with share 0."""
    mix = dict(EXAMPLE_MIX if mix is None else mix)
    if unknown := [name for name in mix if name not in _CLASSES]:
        raise BadInput(f"fleet: expected classes among {', '.join(_CLASSES)}, got {', '.join(unknown)}")
    share = np.array(list(mix.values()), float)
    if not len(share) or (share < 0).any() or not np.isclose(share.sum(), 1, atol=1e-3):
        raise BadInput(f"fleet: expected shares of at least 0 that sum to 1, got {share.tolist()}")
    names = list(dict.fromkeys([*mix, *(_ELECTRIC[_CLASSES[name][0]] for name in mix)]))
    return _made(names, np.array([mix.get(name, 0.0) for name in names]) / share.sum())


def electrify(vehicles: Fleet, share: Array | float, kinds: Sequence[str] = ("PC", "LDV")) -> Fleet:
    """The fleet in which of each given kind the share `share` (0-1) runs on a battery; what burns fuel keeps its proportions."""
    new = jnp.asarray(vehicles.share, jnp.float32)
    for kind in kinds:
        of_kind = np.array([k == kind for k in vehicles.kinds], np.float32)
        battery = of_kind * np.array([name == _ELECTRIC[kind] for name in vehicles.classes], np.float32)
        if of_kind.any() and not battery.any():
            raise BadInput(f"electrify: expected a fleet with {_ELECTRIC[kind]}, got {', '.join(vehicles.classes)}")
        total = jnp.sum(new * of_kind, -1, keepdims=True)
        burning = new * (of_kind - battery)
        left = jnp.sum(burning, -1, keepdims=True)
        scale = jnp.where(left > 0, total * (1 - share) / jnp.maximum(left, 1e-12), 0.0)
        electric = jnp.where(left > 0, total * share, total)  # a kind that is all electric stays so
        new = new * (1 - of_kind) + burning * scale + battery * electric
    return replace(vehicles, share=new)


def without(vehicles: Fleet, banned: Sequence[str]) -> Fleet:
    """The fleet after a ban, for a low-emission zone: banned classes are replaced by the rest of their kind, in its proportions."""
    if unknown := set(banned) - set(vehicles.classes):
        raise BadInput(f"fleet: expected banned classes among {', '.join(vehicles.classes)}, got {', '.join(sorted(unknown))}")
    out = np.array([name in banned for name in vehicles.classes], np.float32)
    new = jnp.asarray(vehicles.share, jnp.float32)
    for kind in dict.fromkeys(vehicles.kinds):
        of_kind = np.array([k == kind for k in vehicles.kinds], np.float32)
        allowed = of_kind * (1 - out)
        if of_kind.any() and not allowed.any():
            raise BadInput(f"fleet: expected some class of kind {kind} to be allowed, got a ban of them all")
        left, total = jnp.sum(new * allowed, -1, keepdims=True), jnp.sum(new * of_kind, -1, keepdims=True)
        battery = np.array([name == _ELECTRIC[kind] for name in vehicles.classes], np.float32) * allowed
        spread = jnp.where(left > 0, new / jnp.maximum(left, 1e-12), battery / max(battery.sum(), 1.0))
        new = new * (1 - of_kind) + allowed * spread * total
    return replace(vehicles, share=new)


def rate(coefficients: Array, speed: Array, acceleration: Array, slope: Array | float = 0.0, burns: bool = True) -> jax.Array:
    """Emission of one vehicle now, mg/s, `[...]`, from its HBEFA4 coefficients `[7]`, m/s, m/s2 and slope in degrees."""
    v = jnp.asarray(speed)
    a = jnp.asarray(acceleration) + GRAVITY * jnp.sin(jnp.deg2rad(jnp.asarray(slope, v.dtype)))
    c = jnp.asarray(coefficients, v.dtype)
    e = c[0] + c[1] * v + c[2] * a + c[3] * v**2 + c[4] * v**3 + c[5] * a * v + c[6] * a * v**2
    least = COASTING[0] + COASTING[1] * jnp.maximum(v, COASTING_FROM)
    coasts = (v > 0.1) & (a < least * jnp.minimum(v / COASTING_FROM, 1.0))
    return jnp.maximum(jnp.where(coasts, 0.0, e) if burns else e, 0.0)


def per_metre(coefficients: Array, mean_speed: Array) -> jax.Array:
    """Mean emission of one vehicle over a link, mg/m, `[..., *class]`, from coefficients `[*class, 7]` and mean speed m/s `[...]`."""
    v = jnp.maximum(jnp.asarray(mean_speed, jnp.float32), LEAST_SPEED)
    table = DRIVING.astype(np.float32)
    P, mv, a, v2, v3, av, av2 = (jnp.interp(v, table[:, 0], table[:, i]) for i in range(1, 8))
    means = jnp.stack([P / v, mv, a / v, v2, v3**2, av, av2], -1)
    return jnp.maximum(jnp.tensordot(means, jnp.asarray(coefficients, jnp.float32), (-1, -1), precision="highest"), 0.0)


def link_emissions(flow: Array, speed: Array, length: Array, vehicles: Fleet) -> jax.Array:
    """What the traffic of each link emits, g/h, `[pollutant, ..., link]`, pollutants as in `POLLUTANTS`. Differentiable in all.

    Args:
      flow: veh/h, `[..., link]`. speed: mean over the link, stops and queues within it, m/s, `[..., link]`. length: m, `[link]`.
    """
    flow, speed = jnp.asarray(flow, jnp.float32), jnp.asarray(speed, jnp.float32)
    share = jnp.asarray(vehicles.share, jnp.float32)
    hot = per_metre(vehicles.hot, speed)  # [..., link, class, 3]
    co2, nox, pm = (hot[..., i] for i in range(3))
    wear = jnp.asarray(vehicles.wear, jnp.float32)
    each = jnp.stack([co2, nox, nox * _lifted(vehicles.no2, nox), pm + _lifted(wear[:, 0], pm), pm + _lifted(wear[:, 1], pm)])
    mean = jnp.sum(each * _lifted(share, each), -1)  # mg/m of the average vehicle
    kilometres = flow * _lifted(jnp.asarray(length, jnp.float32), flow) / 1000
    return mean * _lifted(kilometres, mean)  # mg/m is g/km


def line_strength(emission: Array, length: Array) -> jax.Array:
    """Emission of a link, g/h `[..., link]`, as the strength of a line source, g/(m s)."""
    e = jnp.asarray(emission)
    return e / (3600 * jnp.maximum(_lifted(jnp.asarray(length, e.dtype), e), 1e-3))


def average_speed_factor(row: Mapping[str, float], speed: Array, reduction: float = 0.0) -> jax.Array:
    """Hot emission factor at a mean speed, g/km: EMEP/EEA's general form, or the fifth-order polynomial of older sets.

    EF = (alpha V^2 + beta V + gamma + delta / V) / (epsilon V^2 + zeta V + eta) (1 - RF), V in km/h, held to [vmin, vmax].

    Args:
      row: one of `read_average_speed`. speed: m/s. reduction: RF, 0-1.
    """
    V = jnp.clip(jnp.asarray(speed) * 3.6, row["vmin"], row["vmax"])
    a, b, c, d, e, f = (row[name] for name in "abcdef")
    if row["eq"] == 17:
        factor = ((((a * V + b) * V + c) * V + d) * V + e) * V + f
    else:  # divided by its largest coefficient: sets go up to 1e33, which float32 does not square
        size = max(abs(x) for x in (1.0, a, b, c, d, e, f))
        a, b, c, d, e, f = (x / size for x in (a, b, c, d, e, f))
        factor = (e * V**2 + c * V + a + f / V) / (d * V**2 + b * V + 1 / size)
    return factor * (1 - reduction)


def read_average_speed(path: Path) -> list[dict]:
    """Rows of a file of average-speed functions: fuel, euro, pollutant, eq, a .. f, vmin and vmax in km/h."""
    with path.open() as lines:
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    words = ("fuel", "euro", "pollutant")
    try:
        return [{name: value if name in words else float(value) for name, value in row.items()} for row in rows]
    except (TypeError, ValueError) as e:
        raise BadInput(f"{path}: expected numbers in the columns eq, a to f, vmin and vmax, got {e}") from e


def read_coefficients(path: Path) -> dict[str, np.ndarray]:
    """HBEFA4 coefficients of a file of `class,pollutant,c0,...`: class -> CO2, NOx and PM with wear, mg/s, `[3, 7]`."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("pollutant") in ("CO2", "NOx", "PMx")]
    names = ("c0", "c_v", "c_a", "c_v2", "c_v3", "c_av", "c_av2")
    if not rows or not {"class", *names} <= set(rows[0]):
        raise BadInput(f"{path}: expected rows of CO2, NOx and PMx with class, pollutant, {', '.join(names)}, got {list(rows[:1])}")
    found: dict[str, np.ndarray] = {}
    for row in rows:  # a class without a row for a pollutant emits none
        found.setdefault(row["class"], np.zeros((3, 7)))[("CO2", "NOx", "PMx").index(row["pollutant"])] = [float(row[n]) for n in names]
    return found


def _made(names: list[str], share: np.ndarray) -> Fleet:
    kinds = tuple(_CLASSES[name][0] for name in names)
    hot = np.array([_CLASSES[name][2] for name in names], float)
    hot[:, 2] -= np.array([_CLASSES[_ELECTRIC[kind]][2][2] for kind in kinds], float)  # what is wear
    return Fleet(
        share=share.astype(np.float32),
        hot=hot.astype(np.float32),
        no2=np.array([_CLASSES[name][1] for name in names], np.float32),
        wear=np.array([WEAR[kind] for kind in kinds], np.float32) / 1000,
        classes=tuple(names),
        kinds=kinds,
    )


def _lifted(x: Array, like: jax.Array) -> jax.Array:
    """`x` with leading axes of length 1 until it has as many as `like`."""
    x = jnp.asarray(x)
    return x.reshape((1,) * (like.ndim - x.ndim) + x.shape)
