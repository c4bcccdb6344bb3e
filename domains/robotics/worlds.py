"""Worlds: the physical conditions a robot works in, as numbers that change a model and what its sensors tell.

A world is a vector, one number a parameter, so that it can be drawn at random, be learnt from and be a condition of what is generated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from twinsim.base import BadInput, Variable

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
}
NAMES = tuple(PARAMETERS)
NOMINAL = {"gravity": EARTH, "friction": 1.0, "payload": 1.0, "gain": 1.0, "torque": 1.0, "damping": 1.0} | dict.fromkeys(NAMES[6:], 0.0)


@dataclass(frozen=True)
class Preset:
    """A named world: what differs from the scene's own, and where the figures are from."""

    values: Mapping[str, float]
    source: str


def world(values: Mapping[str, float] | None = None) -> np.ndarray:
    """The vector of a world, `[parameter]`: the scene's own but for `values`. Raises BadInput."""
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
