"""Worlds: the physical conditions a robot works in, as numbers that change a model and what its sensors tell.

A world is a vector, one number a parameter, so that it can be drawn at random, be learnt from and be a condition of what is generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mujoco
import numpy as np
from scipy.special import ndtri

from twinsim.base import BadInput, Variable

if TYPE_CHECKING:
    from domains.robotics.tasks import Channel

EARTH = 9.81  # m/s2

PARAMETERS: Mapping[str, Variable] = {
    "gravity": Variable((), "m s-2", "free fall", lower=0.0, upper=30.0),
    "friction": Variable((), "1", "sliding friction, relative to the scene's own", lower=0.0, upper=10.0),
    "payload": Variable((), "1", "mass of what is handled, relative to the scene's own", lower=0.05, upper=20.0),
    "gain": Variable((), "1", "gain of the actuators, relative to the scene's own", lower=0.05, upper=5.0),
    "torque": Variable((), "1", "greatest force of the actuators, relative to the scene's own", lower=0.02, upper=5.0),
    "damping": Variable((), "1", "damping of the joints, relative to the scene's own", lower=0.0, upper=20.0),
    "latency": Variable((), "1", "control steps between command and motion", lower=0.0, upper=10.0),
    "noise": Variable((), "1", "noise of the sensors, in standard deviations of their noise at work on Earth", lower=0.0, upper=1000.0),
    "dropout": Variable((), "1", "chance that a sensor tells its last value once more", lower=0.0, upper=1.0),
    "flips": Variable((), "1", "chance that a reading has a flipped bit", lower=0.0, upper=1.0),
    "drift": Variable((), "s-1", "relative drift of the sensors' gain", lower=-0.2, upper=0.2),
    "terrain": Variable((), "1", "share of the relief that stands out of level ground, where the scene has one", lower=0.0, upper=1.0),
    "light": Variable((), "1", "light on the scene in its pictures, relative to its own", lower=0.0, upper=4.0),
}
NAMES = tuple(PARAMETERS)
ZERO = ("latency", "noise", "dropout", "flips", "drift")  # of a world without faults; other parameters are relative, but for gravity
NOMINAL = {name: EARTH if name == "gravity" else 0.0 if name in ZERO else 1.0 for name in NAMES}


@dataclass(frozen=True)
class Preset:
    """A named world: what differs from the scene's own, and where the figures are from."""

    values: Mapping[str, float]
    source: str


_FACTS = "NASA Planetary Fact Sheets (D. R. Williams, NSSDCA)"
PRESETS: Mapping[str, Preset] = {
    "space_moon": Preset({"gravity": 1.62}, f"gravity: {_FACTS}, Moon"),
    "space_mars": Preset({"gravity": 3.71}, f"gravity: {_FACTS}, Mars"),
    "space_free_fall": Preset({"gravity": 0.0}, "gravity: none is felt in free fall; what is left of it in orbit is neglected"),
    "space_tired_actuators": Preset(
        {"gravity": 1.62, "gain": 0.7, "torque": 0.5, "damping": 3.0, "latency": 1.0},
        f"gravity: {_FACTS}, Moon; that cold lubricants drag and worn drives weaken: NASA Space Mechanisms Handbook (Fusaro 1999,"
        " NASA/TP-1999-206988); how much of each, and the latency: assumption",
    ),
    "nuclear_hot_cell": Preset(
        {"friction": 0.7, "noise": 3.0, "dropout": 0.02, "flips": 0.002, "latency": 2.0},
        "that radiation degrades sensors and electronics and walls lengthen the line: Tsitsimpelis et al. (2019), Progress in Nuclear"
        " Energy 111; all figures: assumption",
    ),
    "nuclear_high_dose": Preset(
        {"noise": 10.0, "dropout": 0.10, "flips": 0.02, "drift": 0.005},
        "kinds of damage: Nagatani et al. (2013), J. Field Robotics 30(1), on robots at Fukushima Daiichi, and Tsitsimpelis et al. (2019);"
        " all figures: assumption, far above rates of upsets in flight, so that an episode of seconds meets some",
    ),
    "slippery_floor": Preset({"friction": 0.25}, "friction, as of oil or wet ice against a dry floor: assumption"),
    "heavy_payload": Preset({"payload": 5.0}, "payload: assumption"),
}


def preset(name: str) -> Preset:
    """A named world. Raises BadInput."""
    if name not in PRESETS:
        raise BadInput(f"world {name}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def draw(noise: np.random.Generator, count: int, ranges: Mapping[str, Sequence[float | str]], own: np.ndarray | None = None) -> np.ndarray:
    """Random worlds, `[count, parameter]`: parameters uniform between two values, or [low, high, "log"] uniform in their logarithm.

    Others are as in the world `own`, by default `world()`. Raises BadInput.
    """
    drawn = np.repeat((world() if own is None else own)[None], count, 0)
    for name, given in ranges.items():
        parts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else []
        numbers = [value for value in parts[:2] if isinstance(value, int | float)]
        scale = parts[2] if len(parts) == 3 else "uniform"
        if len(parts) not in (2, 3) or len(numbers) != 2 or scale not in ("uniform", "log"):
            raise BadInput(f"world: {name}: expected [low, high] or [low, high, log], got {given}")
        low, high = numbers
        world({name: low}), world({name: high})
        if not low <= high or (scale == "log" and low <= 0):
            raise BadInput(f"world: {name}: expected low <= high{', both above 0' * (scale == 'log')}, got {list(given)}")
        share = noise.uniform(size=count)
        drawn[:, NAMES.index(name)] = low * (high / low) ** share if scale == "log" else low + share * (high - low)
    return drawn


def world(values: Mapping[str, float] | None = None) -> np.ndarray:
    """The vector of a world, `[parameter]`: on Earth, and the scene's own, but for `values`; see `tasks.Scene.world`. Raises BadInput."""
    given = dict(values or {})
    for name, value in given.items():
        if name not in PARAMETERS:
            raise BadInput(f"world: {name}: expected some of {', '.join(NAMES)}")
        bounds = PARAMETERS[name]
        if not bounds.lower <= value <= bounds.upper:
            raise BadInput(f"world: {name}: expected {bounds.lower:g} to {bounds.upper:g} {bounds.units}, got {value:g}")
    return np.array([{**NOMINAL, **given}[name] for name in NAMES], np.float32)


def named(vector: np.ndarray) -> dict[str, float]:
    """The figures of one world by name: the inverse of `world`."""
    return {name: float(value) for name, value in zip(NAMES, vector, strict=True)}


def of(worlds: np.ndarray, name: str) -> np.ndarray:
    """One parameter of worlds `[..., parameter]`, as float64."""
    return np.asarray(worlds, np.float64)[..., NAMES.index(name)]


def fields(model: mujoco.MjModel, worlds: np.ndarray, handled: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """What worlds `[count, parameter]` change of a model: MjModel field -> `[count, ...]`; only fields that do change.

    Args:
      handled: names of the bodies whose mass and inertia the payload scales.
    """
    changed: dict[str, np.ndarray] = {}

    def scaled(name: str, values: np.ndarray, by: np.ndarray) -> None:
        if (by != 1).any():
            changed[name] = values[None] * by.reshape(-1, *[1] * values.ndim)

    gravity = of(worlds, "gravity")
    own = float(np.linalg.norm(model.opt.gravity))
    if (np.abs(gravity - own) > 1e-3).any():
        down = model.opt.gravity / own if own > 0 else np.array([0.0, 0.0, -1.0])
        changed["opt.gravity"] = gravity[:, None] * down
    scaled("geom_friction", model.geom_friction, of(worlds, "friction"))
    scaled("dof_damping", model.dof_damping, of(worlds, "damping"))
    scaled("actuator_forcerange", model.actuator_forcerange, of(worlds, "torque"))
    if (of(worlds, "gain") != 1).any():
        scaled("actuator_gainprm", model.actuator_gainprm, of(worlds, "gain"))
        scaled("actuator_biasprm", model.actuator_biasprm, of(worlds, "gain"))
    payload = of(worlds, "payload")
    if handled and (payload != 1).any():
        bodies = [mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, name) for name in handled]
        for name, values in (("body_mass", model.body_mass), ("body_inertia", model.body_inertia)):
            each = np.repeat(values[None], len(payload), 0)
            each[:, bodies] *= payload.reshape(-1, *[1] * values.ndim)
            changed[name] = each
    return changed


# ---------------------------------------------------------------- what sensors tell

NOISE = {"rad": 1e-3, "rad s-1": 1e-2, "m": 1e-3, "m s-1": 1e-2, "1": 1e-3}  # standard deviations at work on Earth: assumption
BITS = 12  # of the converter behind a sensor, as common in flight electronics: assumption


@dataclass(frozen=True)
class Sensors:
    """The sensors of episodes in the course of time.

    Attributes:
      seed: of each episode's faults, `[count]`. frame: control steps since the start. told: what was last told, `[count, channel]`.
    """

    seed: np.ndarray
    frame: int = 0
    told: np.ndarray | None = None

    def tell(self, seen: np.ndarray, world: np.ndarray, channels: "Sequence[Channel]", rate: float) -> "Sensors":
        """What they tell of `seen` `[count, channel]`, as `told` of the sensors a control step later.

        A gain that drifts, noise, a flipped bit, and last, where a reading drops out, what was told before. A flip is one of the bits of
        a converter over the channel's range: so it moves a reading by 1/4096 to half of the range. In the exponent of an IEEE number a
        flip would give what any check of range throws away. What names a goal is no sensor's. The same seeds give the same faults.
        """
        told = seen.copy()
        if not any((of(world, name) != 0).any() for name in ("noise", "dropout", "flips", "drift")):
            return replace(self, frame=self.frame + 1, told=told)
        read = [index for index, each in enumerate(channels) if not each.name.startswith("goal")]
        chance = np.stack([_uniform(self.seed, self.frame, kind, len(read)) for kind in range(4)])
        noise, dropout, flips, drift = (of(world, name)[:, None] for name in ("noise", "dropout", "flips", "drift"))
        sigma = np.array([NOISE.get(channels[index].units, 1e-3) for index in read])
        value = seen[:, read] * (1 + drift * self.frame / rate) + noise * sigma * ndtri(chance[0])
        low, high = (np.array([getattr(channels[index], name) for index in read]) for name in ("lower", "upper"))
        bounded = np.isfinite(low) & np.isfinite(high)
        low, step = np.where(bounded, low, 0.0), np.where(bounded, high - low, 1.0) / (2**BITS - 1)
        code = np.clip(np.round((value - low) / step), 0, 2**BITS - 1).astype(int)
        other = low + step * (code ^ (1 << (chance[1] * BITS).astype(int)))
        value = np.where((chance[2] < flips) & bounded, other, value)
        before = seen[:, read] if self.told is None else self.told[:, read]
        told[:, read] = np.where(chance[3] < dropout, before, value)
        return replace(self, frame=self.frame + 1, told=told)


def _uniform(seed: np.ndarray, frame: int, kind: int, size: int) -> np.ndarray:
    """Numbers in (0, 1), `[count, size]`, that depend on seed, frame and kind alone: SplitMix64 (Steele, Lea & Flood 2014, fig. 17)."""
    counter = np.uint64((frame * 4 + kind) << 20) + np.arange(size, dtype=np.uint64)
    mixed = _mix(_mix(np.asarray(seed, np.uint64))[:, None] + counter[None])
    return (np.asarray(mixed >> np.uint64(11), np.float64) + 0.5) / 2.0**53


def _mix(number: np.ndarray) -> np.ndarray:
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))
