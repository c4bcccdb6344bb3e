"""Robots with thrusters: a free-flyer that inspects a structure in free fall, and a lander that comes down softly on the Moon.

Both are told way points; thrust follows from a spring and a damper towards them. Roll and pitch are kept by reaction wheels, which
the models leave out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.frames import at_most_one, drawn, given, less, mirror, moves, rows, scalars, towards, wrapped
from domains.robotics.physics import CStepper
from domains.robotics.tasks import Channel, Start
from twinsim.base import Array, Variable

MOON = 1.62  # m/s2, NASA Moon Fact Sheet (NSSDCA)


def _thrusters(spec: mujoco.MjSpec, body: Any, strength: Mapping[str, tuple[float, float]], damping: float = 0.0) -> None:
    """Slides along the world's axes, and a motor for each, N."""
    for index, (axis, (least, most)) in enumerate(strength.items()):
        body.add_joint(name=axis, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=np.eye(3)[index], damping=[damping, 0, 0])
        motor = spec.add_actuator(name=axis, target=axis, trntype=mujoco.mjtTrn.mjTRN_JOINT)
        motor.set_to_motor()
        motor.forcelimited, motor.forcerange = True, [least, most]


def _spec(name: str, rate: float, steps: int) -> mujoco.MjSpec:
    spec = mujoco.MjSpec()
    spec.modelname = name
    spec.compiler.degree = False
    spec.option.timestep = 1 / (rate * steps)
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.worldbody.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=[3, 0, 10], dir=[0.5, 0.4, -1], castshadow=False)
    return spec


def _gap(spec: mujoco.MjSpec, one: str, other: str) -> None:
    spec.add_sensor(
        name=f"gap {one} {other}",
        type=mujoco.mjtSensor.mjSENS_GEOMDIST,
        objtype=mujoco.mjtObj.mjOBJ_GEOM,
        objname=one,
        reftype=mujoco.mjtObj.mjOBJ_GEOM,
        refname=other,
        cutoff=0.05,
    )


# ---------------------------------------------------------------- inspection


@dataclass(frozen=True)
class Inspection:
    """The task (see `tasks.Task`): fly round a module to a target on its wall and look at it, without touching.

    Size, mass and thrust are about those of NASA's Astrobee (Bualat et al. 2015, AIAA SPACE). The frame stands on the flyer, looks out
    from the module's axis, and has the target ahead on its way round. `target` is the angle of the target round the axis.
    """

    name: str = "inspection"
    robot: str = "free-flyer"
    sentence: str = "Fly to the target on the module and look at it."
    rate: float = 5.0
    steps: int = 20
    frames: int = 160
    hold: int = 5
    observation: Sequence[Channel] = (
        *(Channel(f"flyer_{axis}", "m", -4.0, 4.0) for axis in "xyz"),
        Channel("heading", "rad", -2 * np.pi, 2 * np.pi),
        *(Channel(f"flyer_speed_{axis}", "m s-1", -1.0, 1.0) for axis in "xyz"),
        Channel("turning", "rad s-1", -2.0, 2.0),
        *(Channel(f"goal_{axis}", "m", -4.0, 4.0) for axis in "xyz"),
    )
    action: Sequence[Channel] = tuple(Channel(name, "1", -1.0, 1.0) for name in ("move_x", "move_y", "move_z", "turn"))
    planned: Sequence[Channel] = (
        *(Channel(f"way_{axis}", "m", -4.0, 4.0) for axis in "xyz"),
        Channel("way_heading", "rad", -3 * np.pi, 3 * np.pi),
    )
    handled: Sequence[str] = ("flyer",)
    load: float = 20.0

    start: ClassVar[Mapping[str, Variable]] = {
        "angle": Variable((), "rad", "of the flyer round the module"),
        "far": Variable((), "m", "the flyer from the module's axis"),
        "height": Variable((), "m", "the flyer above the module's middle"),
        "goal_angle": Variable((), "rad", "of the target round the module"),
        "goal_height": Variable((), "m", "the target above the module's middle"),
    }
    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.array([-1.0, 1.2, -0.5, -0.4, -0.3]), np.array([1.0, 1.8, 0.5, 0.4, 0.3])),
        "wide": (np.array([-2.2, 1.0, -0.8, -0.4, -0.5]), np.array([2.2, 2.2, 0.8, 0.4, 0.5])),
    }
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "angle": (-np.pi, np.pi),
        "far": (0.9, 3.0),
        "height": (-1.5, 1.5),
        "goal_angle": (-np.pi, np.pi),
        "goal_height": (-0.8, 0.8),
    }
    radius: ClassVar[float] = 0.5  # m, of the module
    standoff: ClassVar[float] = 0.6  # m, of the flyer's middle from the wall
    half: ClassVar[float] = 0.16  # m, of the flyer's width
    mass: ClassVar[float] = 9.6  # kg
    reach: ClassVar[float] = 0.3  # m
    turn: ClassVar[float] = 0.6  # rad
    tolerance: ClassVar[tuple[float, float]] = (0.08, 0.15)  # m, rad

    def spec(self) -> mujoco.MjSpec:
        spec = _spec(self.name, self.rate, self.steps)
        spec.option.gravity = [0, 0, 0]
        world, geom = spec.worldbody, mujoco.mjtGeom
        world.add_camera(name="side", pos=[0, -4.2, 1.4], xyaxes=[1, 0, 0, 0, 0.32, 0.95])
        world.add_geom(
            name="module", type=geom.mjGEOM_CAPSULE, fromto=[0, 0, -1.2, 0, 0, 1.2], size=[self.radius, 0, 0], rgba=[0.8, 0.8, 0.8, 1]
        )
        world.add_site(name="goal", pos=[0.5, 0, 0], size=[0.05] * 3, rgba=[0, 0.6, 0.3, 0.8])
        flyer = world.add_body(name="flyer")
        flyer.add_geom(name="flyer", type=geom.mjGEOM_BOX, size=[self.half] * 3, mass=self.mass, rgba=[0.3, 0.4, 0.8, 1])
        flyer.add_geom(
            type=geom.mjGEOM_SPHERE, pos=[self.half, 0, 0], size=[0.04, 0, 0], mass=0, contype=0, conaffinity=0, rgba=[0, 0, 0, 1]
        )
        _thrusters(spec, flyer, {axis: (-1.2, 1.2) for axis in "xyz"})
        flyer.add_joint(name="heading", type=mujoco.mjtJoint.mjJNT_HINGE, axis=[0, 0, 1])
        motor = spec.add_actuator(name="heading", target="heading", trntype=mujoco.mjtTrn.mjTRN_JOINT)
        motor.set_to_motor()
        motor.forcelimited, motor.forcerange = True, [-0.1, 0.1]
        _gap(spec, "flyer", "module")
        return spec

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        return drawn(self, noise, count, region)

    def place(self, start: Start) -> np.ndarray:
        angle, far, height, _, _ = given(self, start, self.bounds).T
        return np.stack([far * np.cos(angle), far * np.sin(angle), height, wrapped(angle + np.pi)], 1)

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        angle = start["goal_angle"]
        return float(self.radius * np.cos(angle)), float(self.radius * np.sin(angle)), start["goal_height"]

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        angle, height = (np.broadcast_to(np.asarray(start[name], np.float64), stepper.count) for name in ("goal_angle", "goal_height"))
        stand = self.radius + self.standoff
        goal = np.stack([stand * np.cos(angle), stand * np.sin(angle), height], 1)
        position = stepper.position
        position[:, 3] = wrapped(position[:, 3])
        return np.concatenate([position, stepper.velocity, goal], 1)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        action = np.clip(action, -1, 1)
        force = self.mass * (0.5 * self.reach * action[:, :3] - observation[:, 4:7])
        inertia = self.mass * (2 * self.half) ** 2 / 6
        torque = inertia * (0.5 * self.turn * action[:, 3:] - observation[:, 7:8])
        return np.concatenate([force, torque], 1)

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Flies round at a safe distance, always looking at the module, and comes nearer where the target is."""
        x, y, z, heading = observation[:, :4].T
        goal = observation[:, 8:11]
        angle, far, stand = np.arctan2(y, x), np.hypot(x, y), np.hypot(goal[:, 0], goal[:, 1])
        round_ = wrapped(np.arctan2(goal[:, 1], goal[:, 0]) - angle)
        safe = stand + np.clip(0.5 * np.abs(round_), 0, 0.3)
        out, across = (safe - far) / 0.3, far * round_ / 0.3
        move = np.stack(
            [out * np.cos(angle) - across * np.sin(angle), out * np.sin(angle) + across * np.cos(angle), (goal[:, 2] - z) / 0.3], 1
        )
        return np.concatenate([at_most_one(move), np.clip(wrapped(angle + np.pi - heading) / 0.4, -1, 1)[:, None]], 1)

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        turn = np.clip(wrapped(way[:, 3:] - observation[:, 3:4]) / self.turn, -1, 1)
        return np.concatenate([at_most_one((way[:, :3] - observation[:, :3]) / self.reach), turn], 1)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return observation[..., :4] + np.array([self.reach] * 3 + [self.turn]) * action

    def off(self, observation: Array) -> jax.Array:
        """How far off, m, that it is or looks, beyond the tolerance; 1 rad counts as 1 m."""
        seen = jnp.asarray(observation)
        apart = jnp.linalg.norm(seen[..., :3] - seen[..., 8:11], axis=-1)
        wrong = jnp.abs(wrapped(jnp.arctan2(seen[..., 9], seen[..., 8]) + np.pi - seen[..., 3]))
        return jnp.maximum(apart - self.tolerance[0], 0.0) + jnp.maximum(wrong - self.tolerance[1], 0.0)

    def _axes(self, observation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit vectors out, on and up, `[3, 3]`; the angle still to fly round, rad; and to which side, 1 or -1."""
        far = jnp.sqrt((observation[:2] ** 2).sum() + 1e-12)
        left = wrapped(jnp.arctan2(observation[9], observation[8]) - jnp.arctan2(observation[1], observation[0]))
        side = jnp.where(left < 0, -jnp.ones_like(left), jnp.ones_like(left))
        return rows(observation[0] / far, observation[1] / far, side), jnp.abs(left), side

    def features(self, observation: jax.Array) -> jax.Array:
        axes, left, side = self._axes(observation)
        out = observation[:3] @ axes[0] - self.radius - self.standoff
        high = observation[10] - observation[2]
        wrong = side * wrapped(jnp.arctan2(observation[1], observation[0]) + np.pi - observation[3])
        speed = (axes @ observation[4:7]) / 0.15
        scales = [jnp.clip(out, -0.5, 0.5) / 0.3, jnp.minimum(left, 0.6) / 0.3, left, jnp.clip(high, -0.3, 0.3) / 0.15]
        return jnp.stack([*scales, jnp.clip(wrong, -0.6, 0.6) / 0.3, *speed, side * observation[7] / 0.3])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes, _, side = self._axes(observation)
        turn = side * wrapped(less(way[..., 3:], observation[3:4])) / self.turn
        return jnp.concatenate([less(way[..., :3], observation[:3]) @ axes.T / self.reach, turn], -1)

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes, _, side = self._axes(observation)
        heading = less(side * way[..., 3:] * self.turn, -observation[3:4])
        return jnp.concatenate([less(self.reach * way[..., :3] @ axes, -observation[:3]), heading], -1)

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Round the module's axis, stretched to the new angle and height."""
        (_, old, one), (_, new, two) = self._axes(before), self._axes(now)
        first, second = jnp.arctan2(before[1], before[0]), jnp.arctan2(now[1], now[0])
        far, angle = jnp.hypot(way[..., 0], way[..., 1]), jnp.arctan2(way[..., 1], way[..., 0])
        on = one * wrapped(less(angle, first))
        share = jnp.clip(on / jnp.maximum(old, 1e-3), 0.0, 1.0)
        then = second + two * (on + share * (new - old))
        shift = (now[2] - before[2]) + share * ((now[10] - now[2]) - (before[10] - before[2]))
        looks = then + two * one * wrapped(way[..., 3] - angle)
        return jnp.stack([far * jnp.cos(then), far * jnp.sin(then), way[..., 2] + shift, wrapped(looks)], -1)

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As in a mirror through the module's axis and the target."""
        about = 2 * jnp.arctan2(observation[9], observation[8])
        cos, sin = jnp.cos(about), jnp.sin(about)
        zero, one = jnp.zeros_like(cos), jnp.ones_like(cos)
        flip = jnp.stack([jnp.stack([cos, sin, zero]), jnp.stack([sin, -cos, zero]), jnp.stack([zero, zero, one])])
        other = observation.at[:3].set(flip @ observation[:3]).at[3].set(wrapped(about - observation[3]))
        other = other.at[4:7].set(flip @ observation[4:7]).at[7].set(-observation[7])
        return other, jnp.concatenate([way[..., :3] @ flip, wrapped(about - way[..., 3:])], -1)


# ---------------------------------------------------------------- landing


@dataclass(frozen=True)
class Landing:
    """The task (see `tasks.Task`): come down on the pad so softly that the legs, which crush for good, are hardly crushed.

    Legs take a hard landing by a constant force over their stroke, as the honeycomb of the Apollo lunar module's did (Rogers 1972, NASA
    TN D-6850). The frame stands on the lander and looks at the pad.
    """

    name: str = "landing"
    robot: str = "lander"
    sentence: str = "Land softly on the pad."
    rate: float = 5.0
    steps: int = 100
    frames: int = 250
    hold: int = 5
    observation: Sequence[Channel] = (
        *(Channel(f"lander_{axis}", "m", -60.0, 60.0) for axis in "xyz"),
        *(Channel(f"lander_speed_{axis}", "m s-1", -10.0, 10.0) for axis in "xyz"),
        Channel("crush", "m", -0.01, 0.31),
        *(Channel(f"goal_{axis}", "m", -60.0, 60.0) for axis in "xyz"),
    )
    action: Sequence[Channel] = moves("xyz")
    planned: Sequence[Channel] = tuple(Channel(f"way_{axis}", "m", -60.0, 60.0) for axis in "xyz")
    handled: Sequence[str] = ("lander",)
    load: float = 170.0

    start: ClassVar[Mapping[str, Variable]] = scalars(lander="xyz", goal="xy")
    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.array([-3.0, -3.0, 8.0, -1.0, -1.0]), np.array([3.0, 3.0, 12.0, 1.0, 1.0])),
        "wide": (np.array([-8.0, -8.0, 6.0, -2.0, -2.0]), np.array([8.0, 8.0, 18.0, 2.0, 2.0])),
    }
    mass: ClassVar[float] = 100.0  # kg, without legs
    legs: ClassVar[float] = 5.0  # kg
    stroke: ClassVar[float] = 0.3  # m
    reach: ClassVar[float] = 2.0  # m
    tolerance: ClassVar[tuple[float, float, float, float]] = (1.0, 0.04, 0.1, 0.05)  # m from the pad, m above it, m/s, m of crush

    def spec(self) -> mujoco.MjSpec:
        spec = _spec(self.name, self.rate, self.steps)
        weight = (self.mass + self.legs) * MOON
        spec.option.gravity = [0, 0, -MOON]
        world, geom = spec.worldbody, mujoco.mjtGeom
        world.add_geom(name="ground", type=geom.mjGEOM_PLANE, size=[60, 60, 1], rgba=[0.6, 0.6, 0.6, 1])
        world.add_site(name="goal", type=geom.mjGEOM_CYLINDER, size=[self.tolerance[0], 0.01, 0], rgba=[0, 0.6, 0.3, 0.6])
        lander = world.add_body(name="lander")
        lander.add_camera(name="side", pos=[0, -9, 4], xyaxes=[1, 0, 0, 0, 0.32, 0.95], mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACK)
        _thrusters(spec, lander, {"x": (-weight, weight), "y": (-weight, weight), "z": (0, 3 * weight)})
        lander.add_geom(
            type=geom.mjGEOM_BOX, pos=[0, 0, 1.2], size=[0.5, 0.5, 0.4], mass=self.mass, contype=0, conaffinity=0, rgba=[0.8, 0.7, 0.3, 1]
        )
        legs = lander.add_body(name="legs")
        legs.add_joint(
            name="crush",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, 0, 1],
            range=[0, self.stroke],
            limited=True,
            frictionloss=4 * weight,
            solref_friction=[0.01, 1],
            solimp_friction=[0.99, 0.999, 0.001, 0.5, 2],
        )
        for index, (x, y) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1))):
            legs.add_geom(
                name=f"foot{index}",
                type=geom.mjGEOM_SPHERE,
                pos=[0.8 * x, 0.8 * y, 0.1],
                size=[0.1, 0, 0],
                mass=self.legs / 4,
                friction=[0.8, 0.01, 1e-3],
                solref=[0.004, 1],
            )
            legs.add_geom(
                type=geom.mjGEOM_CAPSULE,
                fromto=[0.8 * x, 0.8 * y, 0.1, 0.4 * x, 0.4 * y, 0.9],
                size=[0.03, 0, 0],
                mass=0,
                contype=0,
                conaffinity=0,
            )
        _gap(spec, "foot0", "ground")
        return spec

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        return drawn(self, noise, count, region)

    def place(self, start: Start) -> np.ndarray:
        bounds = {name: (0.5, 40.0) if name == "lander_z" else (-40.0, 40.0) for name in self.start}
        return np.pad(given(self, start, bounds)[:, :3], ((0, 0), (0, 1)))

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return start["goal_x"], start["goal_y"], 0.0

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        goal = np.stack([np.broadcast_to(np.asarray(start[f"goal_{axis}"], np.float64), stepper.count) for axis in "xy"], 1)
        position = stepper.position
        feet = position[:, :3] + position[:, 3:] * np.array([0.0, 0.0, 1.0])
        return np.concatenate([feet, stepper.velocity[:, :3], position[:, 3:], goal, np.zeros((stepper.count, 1))], 1)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        push = 0.5 * self.reach * np.clip(action, -1, 1) - observation[:, 3:6] + np.array([0.0, 0.0, MOON])
        return (self.mass + self.legs) * push

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Comes down as into a funnel over the pad, slower and slower."""
        apart = observation[:, 7:10] - observation[:, :3]
        beside = np.linalg.norm(apart[:, :2], axis=1, keepdims=True)
        floor = np.clip(2 * (beside - 0.6), 0, 6)  # m, not below it so far from the pad
        down = np.clip((apart[:, 2:] + floor) / 4, -1, 1)
        down = np.where(floor > 0, down, np.minimum(down, -0.2))
        return at_most_one(np.concatenate([apart[:, :2] / 4, down], 1))

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        return at_most_one((way - observation[:, :3]) / self.reach)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return observation[..., :3] + self.reach * action

    def off(self, observation: Array) -> jax.Array:
        """How far off, m, m/s: from the pad, above it, in speed and in crush, each beyond its tolerance."""
        seen = jnp.asarray(observation)
        beside = jnp.linalg.norm(seen[..., :2] - seen[..., 7:9], axis=-1)
        speed = jnp.linalg.norm(seen[..., 3:6], axis=-1)
        each = jnp.stack([beside, jnp.abs(seen[..., 2]), speed, seen[..., 6]], -1)
        limits = jnp.broadcast_to(jnp.array(self.tolerance, each.dtype), each.shape)
        return jnp.maximum(each - limits, 0.0).sum(-1)

    def _axes(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        return towards(observation[7:9] - observation[:2])

    def features(self, observation: jax.Array) -> jax.Array:
        axes, far = self._axes(observation)
        high = observation[2]
        near = [jnp.minimum(far, 1.5) / 0.75, jnp.minimum(far, 6.0) / 3, jnp.minimum(high, 1.0), jnp.minimum(high, 10.0) / 5]
        return jnp.stack([*near, *(axes @ observation[3:6])])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(way, observation[:3]) @ self._axes(observation)[0].T / self.reach

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(self.reach * way @ self._axes(observation)[0], -observation[:3])

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned about the pad and stretched to where the lander begins."""
        (old, far), (new, wide) = self._axes(before), self._axes(now)
        along, across, up = (less(way, before[7:10]) @ old.T).T
        return less(jnp.stack([along * wide / far, across, up * now[2] / before[2]], -1) @ new, -now[7:10])

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of the line to the pad."""
        axes, _ = self._axes(observation)
        flip = mirror(axes)
        at = observation[:3]
        return observation.at[3:6].set(flip @ observation[3:6]), less(less(way, at) @ flip, -at)
