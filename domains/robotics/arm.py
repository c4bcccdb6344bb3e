"""An arm of seven joints, made of primitives, and what it does: reach a place, push a cube over a table, pick a cube and carry it.

Way points are places of the tool, m, which looks straight down and keeps its heading; joint angles follow by inverse kinematics. Lengths,
limits and torques are close to those of a Franka Research 3 (FCI documentation, "Robot and interface specifications").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.frames import (
    at_most_one,
    drawn,
    expect_finite,
    less,
    mirror,
    moves,
    place_channels,
    places,
    scalars,
    stretched,
    towards,
)
from domains.robotics.kinematics import Chain
from domains.robotics.physics import CStepper
from domains.robotics.reach import Reaching
from domains.robotics.tasks import Channel, Start
from twinsim.base import Array, BadInput, Variable

JOINTS = 7
OFFSET = np.array(  # m, of each joint from the one before, and of the tool from the last, where all angles are 0
    [[0, 0, 0.333], [0, 0, 0], [0, 0, 0.316], [0.083, 0, 0], [-0.083, 0, 0.384], [0, 0, 0], [0.088, 0, 0], [0, 0, -0.21]]
)
AXIS = np.array([[0, 0, 1], [0, 1, 0], [0, 0, 1], [0, -1, 0], [0, 0, 1], [0, -1, 0], [0, 0, -1]], float)
LOWER = np.array([-2.74, -1.78, -2.90, -3.04, -2.80, 0.54, -3.01])  # rad
UPPER = np.array([2.74, 1.78, 2.90, -0.15, 2.80, 4.51, 3.01])
TORQUE = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # N m
STIFFNESS = (2500.0, 2500.0, 2000.0, 2000.0, 600.0, 600.0, 400.0)  # N m/rad
MASS = (3.0, 3.0, 2.5, 2.5, 2.0, 1.5, 0.6)  # kg
REST = np.array([0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, 0.0])  # rad, where the arm would rather be
LAG = 0.08  # s, of a joint behind what it is told
REACH = 0.035  # m the tool is sent off by an action of 1
HASTE = 0.2  # rad a joint is sent off at most
FASTEST = 6.0  # rad/s; demonstrations stay below 2
FINGER = 0.04  # m, that each finger opens
GRIP = 500.0  # N/m, of a finger
CUBE = 0.02  # m, half its width
PEG = 0.02  # m, radius
LOWEST = 0.015  # m above the table, of the tool


@dataclass(frozen=True)
class Build:
    """What may be built otherwise, each relative to the arm as it is.

    Attributes:
      upper, fore: length of the upper arm and of the forearm; they weigh by length.
      stiffness, lag: of the joints' controllers.
      gear: reduction of the motors: torque grows with it, inertia of rotors and drag of back-EMF with its square.
    """

    upper: float = 1.0
    fore: float = 1.0
    stiffness: float = 1.0
    lag: float = 1.0
    gear: float = 1.0

    @property
    def offset(self) -> np.ndarray:
        """As OFFSET, m."""
        scale = np.ones((len(OFFSET), 1))
        scale[2], scale[4] = self.upper, self.fore
        return np.where(np.eye(3)[2] > 0, OFFSET * scale, OFFSET)  # elbows stay as wide as they are

    @property
    def chain(self) -> Chain:
        return _chain(self.offset)


# ---------------------------------------------------------------- kinematics


def _chain(offset: np.ndarray) -> Chain:
    return Chain(offset, np.tile(np.eye(3), (JOINTS + 1, 1, 1)), AXIS, np.zeros(JOINTS, bool), LOWER, UPPER, REST)


def tool(joints: np.ndarray, offset: np.ndarray = OFFSET) -> np.ndarray:
    """Where the tool is, m, `[count, 3]`, for joint angles `[count, 7]`, rad."""
    return _chain(offset).tool(joints)


def joints_at(place: np.ndarray, near: np.ndarray | None = None, rounds: int = 40, offset: np.ndarray = OFFSET) -> np.ndarray:
    """Joint angles, rad, `[count, 7]`, that bring the tool to `place`, m, `[count, 3]`, looking down (see `Chain.joints_at`)."""
    return _chain(offset).joints_at(place, near, rounds, upright=True)


# ---------------------------------------------------------------- scene


def arm_spec(name: str, rate: float, steps: int, gripper: bool, cube: bool, build: Build) -> mujoco.MjSpec:
    """The arm at the edge of a table, with a gripper or a peg; and a cube. The arm carries its own weight, as such arms do."""
    spec, offset = mujoco.MjSpec(), build.offset
    spec.modelname = name
    spec.compiler.degree = False
    spec.option.timestep = 1 / (rate * steps)
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    if cube:  # what is held does not creep out of the fingers; MJX 3.17 fails on such cones where nothing can touch
        spec.option.cone, spec.option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10
    geom, world = mujoco.mjtGeom, spec.worldbody
    world.add_light(pos=[0.5, 0, 2])
    world.add_camera(name="side", pos=[1.5, -1.0, 1.0], xyaxes=[0.66, 0.75, 0, -0.42, 0.37, 0.83])
    touching: dict[str, Any] = {"solref": [0.005, 1], "solimp": [0.95, 0.99, 0.001, 0.5, 2]}
    plain = {"contype": 0, "conaffinity": 0}
    world.add_geom(name="table", type=geom.mjGEOM_PLANE, size=[1, 1, 0.1], rgba=[0.8, 0.8, 0.8, 1], friction=[0.4, 0.005, 1e-4], **touching)
    world.add_site(name="goal", pos=[0.5, 0, 0.2], size=[0.02] * 3, rgba=[0, 0.6, 0.3, 0.6])
    mass = np.array(MASS) * np.array([1, build.upper, 1, build.fore, 1, 1, 1])
    body = world
    for joint in range(JOINTS):
        body = body.add_body(name=f"link{joint + 1}", pos=offset[joint], gravcomp=1)
        body.add_joint(
            name=f"joint{joint + 1}",
            axis=AXIS[joint],
            range=[LOWER[joint], UPPER[joint]],
            limited=True,
            armature=0.1 * build.gear**2,
            damping=[1.0 * build.gear**2, 0, 0],
        )
        end = offset[joint + 1] if joint < JOINTS - 1 else np.array([0, 0, -0.1])
        end = end if end.any() else np.array([0, 0, 0.06])
        body.add_geom(type=geom.mjGEOM_CAPSULE, fromto=[0, 0, 0, *end], size=[0.045, 0, 0], mass=mass[joint], **plain)
        motor = spec.add_actuator(name=f"joint{joint + 1}", target=f"joint{joint + 1}", trntype=mujoco.mjtTrn.mjTRN_JOINT)
        stiffness, torque = STIFFNESS[joint] * build.stiffness, TORQUE[joint] * build.gear
        motor.set_to_position(kp=stiffness, kv=stiffness * LAG * build.lag)
        motor.forcelimited, motor.forcerange = True, [-torque, torque]
        motor.ctrllimited, motor.ctrlrange = True, [LOWER[joint], UPPER[joint]]
    touches = ["table"]
    if gripper:
        body.add_geom(name="palm", type=geom.mjGEOM_BOX, pos=[0, 0, -0.13], size=[0.02, 0.08, 0.02], mass=0.3, **plain)
        for side, name in ((1, "left"), (-1, "right")):
            finger = body.add_body(name=name, pos=[0, 0, OFFSET[JOINTS][2]], gravcomp=1)
            finger.add_joint(
                name=name,
                type=mujoco.mjtJoint.mjJNT_SLIDE,
                axis=[0, side, 0],
                range=[0, FINGER],
                limited=True,
                armature=0.1,
                damping=[5, 0, 0],
            )
            finger.add_geom(
                name=name,
                type=geom.mjGEOM_BOX,
                pos=[0, side * 0.006, 0.025],
                size=[0.01, 0.006, 0.037],
                mass=0.05,
                friction=[1.0, 0.02, 1e-3],
                condim=4,
                **touching,
            )
            motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_position(kp=GRIP, kv=30)
            motor.forcelimited, motor.forcerange = True, [-20, 20]
            motor.ctrllimited, motor.ctrlrange = True, [0, FINGER]
            touches.append(name)
        spec.add_exclude(bodyname1="left", bodyname2="right")
    else:
        body.add_geom(
            name="peg",
            type=geom.mjGEOM_CAPSULE,
            fromto=[0, 0, -0.12, 0, 0, OFFSET[JOINTS][2] + PEG],
            size=[PEG, 0, 0],
            mass=0.3,
            friction=[0.2, 0.005, 1e-4],
            **touching,
        )
        touches.append("peg")
    if cube:
        thing = world.add_body(name="cube", pos=[0.5, 0, CUBE])
        thing.add_freejoint(name="cube")
        thing.add_geom(
            name="cube",
            type=geom.mjGEOM_BOX,
            size=[CUBE] * 3,
            mass=0.1,
            rgba=[0.8, 0.3, 0.2, 1],
            friction=[0.4, 0.005, 1e-4],
            condim=4 if gripper else 3,
            **touching,
        )
        touches.append("cube")
    pairs = [(one, "cube") for one in touches if one != "cube"] if cube else []
    pairs += [("table", one) for one in touches if one not in ("table", "cube")]
    for one, other in pairs:
        spec.add_sensor(
            name=f"gap {one} {other}",
            type=mujoco.mjtSensor.mjSENS_GEOMDIST,
            objtype=mujoco.mjtObj.mjOBJ_GEOM,
            objname=one,
            reftype=mujoco.mjtObj.mjOBJ_GEOM,
            refname=other,
            cutoff=0.05,
        )
    return spec


def _joint_channels() -> tuple[Channel, ...]:
    angles = [Channel(f"joint{i + 1}", "rad", float(LOWER[i]), float(UPPER[i])) for i in range(JOINTS)]
    return (*angles, *(Channel(f"joint{i + 1}_speed", "rad s-1", -FASTEST, FASTEST) for i in range(JOINTS)))


def _checked(task: str, thing: str, place: np.ndarray, offset: np.ndarray) -> None:
    """Raises BadInput where the tool cannot be brought to places `[count, 3]`."""
    expect_finite(task, thing, place)
    missed = np.linalg.norm(tool(joints_at(place, offset=offset), offset) - place, axis=1)
    if (missed > 0.005).any():
        worst = int(missed.argmax())
        raise BadInput(
            f"{task}: {thing} at {place[worst].round(3).tolist()} m: expected a place within the arm's reach, its tool stays"
            f" {missed[worst]:.2f} m away"
        )


def _command(joints: np.ndarray, place: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Joint angles to tell the motors, rad; never so far off that joints race where the arm is stretched out."""
    wanted = joints_at(np.concatenate([place[:, :2], np.maximum(place[:, 2:], LOWEST)], 1), joints, 3, offset)
    return joints + np.clip(wanted - joints, -HASTE, HASTE)


# ---------------------------------------------------------------- reach


@dataclass(frozen=True)
class ArmReach(Reaching):
    """The arm of this module brings its tool to a place."""

    name: str = "arm_reach"
    robot: str = "arm of seven joints with peg"
    sentence: str = "Bring the tool to the goal."
    rate: float = 20.0
    steps: int = 20
    frames: int = 80
    hold: int = 5
    build: Build = Build()
    observation: Sequence[Channel] = (*_joint_channels(), *place_channels("tool"), *place_channels("goal"))
    action: Sequence[Channel] = moves("xyz")
    planned: Sequence[Channel] = place_channels("way")
    handled: Sequence[str] = ("link7",)
    load: float = 20.0

    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.tile([0.45, -0.12, 0.15], 2), np.tile([0.60, 0.12, 0.35], 2)),
        "wide": (np.tile([0.35, -0.35, 0.08], 2), np.tile([0.65, 0.35, 0.50], 2)),
    }
    tolerance: float = 0.02
    pace: float = REACH
    slow: float = 0.05

    def spec(self) -> mujoco.MjSpec:
        return arm_spec(self.name, self.rate, self.steps, gripper=False, cube=False, build=self.build)

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        return drawn(self, noise, count, region)

    def place(self, start: Start) -> np.ndarray:
        for thing in ("tool", "goal"):
            _checked(self.name, thing, places(start, thing, "xyz"), self.build.offset)
        return joints_at(places(start, "tool", "xyz"), offset=self.build.offset)

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        goal = np.broadcast_to(places(start, "goal", "xyz"), (stepper.count, 3))
        return np.concatenate([stepper.position, stepper.velocity, tool(stepper.position, self.build.offset), goal], 1)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        joints = observation[:, :JOINTS]
        return _command(joints, tool(joints, self.build.offset) + REACH * np.clip(action, -1, 1), self.build.offset)


# ---------------------------------------------------------------- push


@dataclass(frozen=True)
class ArmPush:
    """The task (see `tasks.Task`). The peg stays low; the task's own frame stands on the cube and looks at the goal."""

    name: str = "arm_push"
    robot: str = "arm of seven joints with peg"
    sentence: str = "Push the cube to the goal."
    rate: float = 20.0
    steps: int = 20
    frames: int = 160
    hold: int = 5
    build: Build = Build()
    observation: Sequence[Channel] = (
        *_joint_channels(),
        *place_channels("tool"),
        *place_channels("cube"),
        Channel("cube_heading", "rad", -np.pi, np.pi),
        *(Channel(f"cube_speed_{axis}", "m s-1", -3.0, 3.0) for axis in "xyz"),
        Channel("goal_x", "m", -2.0, 2.0),
        Channel("goal_y", "m", -2.0, 2.0),
    )
    action: Sequence[Channel] = moves("xy")
    planned: Sequence[Channel] = place_channels("way")[:2]
    handled: Sequence[str] = ("cube",)
    load: float = 20.0

    start: ClassVar[Mapping[str, Variable]] = scalars(cube="xy", goal="xy")
    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.tile([0.44, -0.12], 2), np.tile([0.60, 0.12], 2)),
        "wide": (np.tile([0.38, -0.25], 2), np.tile([0.64, 0.25], 2)),
    }
    apart: ClassVar[tuple[float, float]] = (0.10, 0.40)  # m, cube from goal
    home: ClassVar[tuple[float, float, float]] = (0.32, 0.0, 0.03)  # m, where the peg starts
    clear: ClassVar[float] = PEG + CUBE  # m, between centres that touch, face on
    tolerance: ClassVar[float] = 0.04  # m

    def spec(self) -> mujoco.MjSpec:
        return arm_spec(self.name, self.rate, self.steps, gripper=False, cube=True, build=self.build)

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        found = np.zeros((0, 4))
        while len(found) < count:
            starts = np.stack([*drawn(self, noise, max(2 * count, 16), region).values()], 1)
            apart = np.hypot(starts[:, 0] - starts[:, 2], starts[:, 1] - starts[:, 3])
            found = np.concatenate([found, starts[(apart > self.apart[0]) & (apart < self.apart[1])]])
        return dict(zip(self.start, found[:count].T, strict=True))

    def place(self, start: Start) -> np.ndarray:
        cube, goal = (np.insert(places(start, thing, "xy"), 2, self.home[2], 1) for thing in ("cube", "goal"))
        for thing, place in (("cube", cube), ("goal", goal)):
            _checked(self.name, thing, place, self.build.offset)
        apart = np.hypot(cube[:, 0] - self.home[0], cube[:, 1] - self.home[1])
        least = PEG + CUBE * np.sqrt(2)
        if (apart < least).any():
            worst = cube[apart.argmin(), :2].round(3).tolist()
            raise BadInput(f"{self.name}: cube at {worst} m: expected {least:.3f} m or more from the peg at {list(self.home[:2])}")
        return np.concatenate(
            [np.repeat(joints_at(np.array([self.home]), offset=self.build.offset), len(cube), 0), _cube_at(cube[:, :2])], 1
        )

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return start["goal_x"], start["goal_y"], CUBE

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        position, velocity = stepper.position, stepper.velocity
        goal = np.broadcast_to(places(start, "goal", "xy"), (stepper.count, 2))
        joints, cube = position[:, :JOINTS], position[:, JOINTS:]
        w, x, y, z = cube[:, 3:].T
        heading = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y**2 + z**2))
        speed = velocity[:, JOINTS : JOINTS + 3]
        return np.concatenate(
            [joints, velocity[:, :JOINTS], tool(joints, self.build.offset), cube[:, :3], heading[:, None], speed, goal], 1
        )

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        joints = observation[:, :JOINTS]
        place = tool(joints, self.build.offset)
        place[:, :2] += REACH * np.clip(action, -1, 1)
        place[:, 2] = self.home[2]
        return _command(joints, place, self.build.offset)

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Goes round the cube until behind it, then pushes it home, and looks again at every step."""
        tip, cube, goal = observation[:, 14:16], observation[:, 17:19], observation[:, 24:26]
        clear = self.clear
        left = np.linalg.norm(goal - cube, axis=1, keepdims=True)
        ahead = (goal - cube) / (left + 1e-9)
        beside = tip - cube
        apart = np.linalg.norm(beside, axis=1, keepdims=True)
        outward = beside / (apart + 1e-9)
        behind = -(outward * ahead).sum(1, keepdims=True)  # 1 = exactly behind the cube
        turn = np.where(outward[:, 1:] * ahead[:, :1] >= outward[:, :1] * ahead[:, 1:], 1.0, -1.0)
        around = turn * np.stack([-outward[:, 1], outward[:, 0]], 1) + outward * np.clip((clear + 0.03 - apart) / 0.03, -1, 1)
        line_up = (cube - ahead * (clear + 0.012) - tip) / REACH
        across = beside - (beside * ahead).sum(1, keepdims=True) * ahead
        push = ahead * np.clip(left / 0.1, 0.25, 0.6) - across / 0.03
        lined_up = (np.linalg.norm(across, axis=1, keepdims=True) < 0.015) & (apart < clear + 0.03)
        action = np.where(behind < 0.85, around, np.where(lined_up, push, line_up))
        return np.where(left < 0.5 * self.tolerance, 0.0, at_most_one(action))

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        return at_most_one((way - observation[:, 14:16]) / REACH)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return observation[..., 14:16] + REACH * action

    def off(self, observation: Array) -> jax.Array:
        apart = jnp.asarray(observation[..., 17:19] - observation[..., 24:26])
        return jnp.maximum(jnp.linalg.norm(apart, axis=-1) - self.tolerance, 0.0)

    def _axes(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes, left = towards(observation[24:26] - observation[17:19])
        return axes[:2, :2], left

    def features(self, observation: jax.Array) -> jax.Array:
        axes, left = self._axes(observation)
        along, across = axes @ (observation[14:16] - observation[17:19])
        apart = jnp.sqrt(along**2 + across**2 + 1e-12)
        clear = self.clear
        near = [jnp.clip((apart - clear) / 0.03, -1.0, 2.0), jnp.clip(across / 0.02, -2.0, 2.0), jnp.clip(along / clear, -2.0, 2.0)]
        turned = 4 * (observation[20] - jnp.arctan2(axes[0, 1], axes[0, 0]))  # a cube looks the same after a quarter of a turn
        faces = [0.5 * jnp.sin(turned), 0.5 * jnp.cos(turned)]
        return jnp.stack([along / apart, across / apart, jnp.log(apart / clear), *near, jnp.minimum(left, 0.15) / 0.06, *faces])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(way, observation[14:16]) @ self._axes(observation)[0].T / REACH

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(REACH * way @ self._axes(observation)[0], -observation[14:16])

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned about the cube towards the new goal, and beyond the cube stretched to it."""
        (old, far), (new, wide) = self._axes(before), self._axes(now)
        along, across = (less(way, before[17:19]) @ old.T).T
        along = jnp.where(along > -self.clear, -self.clear + (along + self.clear) * wide / far, along)
        return less(jnp.stack([along, across], -1) @ new, -now[17:19])

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of the line from the cube to the goal; the arm's joints, which the features leave out, stay."""
        axes, _ = self._axes(observation)
        flip = axes.T @ jnp.diag(jnp.array([1.0, -1.0], axes.dtype)) @ axes
        cube = observation[17:19]
        heading = 2 * jnp.arctan2(axes[0, 1], axes[0, 0]) - observation[20]
        turned = (
            observation.at[14:16].set(cube + flip @ (observation[14:16] - cube)).at[20].set(jnp.arctan2(jnp.sin(heading), jnp.cos(heading)))
        )
        return turned, less(less(way, cube) @ flip, -cube)


# ---------------------------------------------------------------- pick


@dataclass(frozen=True)
class ArmPick:
    """The task (see `tasks.Task`). Its own frame stands on the tool and looks at the cube or, once that is held, at the goal."""

    name: str = "arm_pick"
    robot: str = "arm of seven joints with gripper"
    sentence: str = "Pick the cube up and carry it to the goal."
    rate: float = 20.0
    steps: int = 20
    frames: int = 160
    hold: int = 5
    build: Build = Build()
    observation: Sequence[Channel] = (
        *_joint_channels(),
        *place_channels("tool"),
        Channel("opening", "m", -0.01, 2 * FINGER + 0.01),
        *place_channels("cube"),
        *(Channel(f"cube_speed_{axis}", "m s-1", -3.0, 3.0) for axis in "xyz"),
        *place_channels("goal"),
    )
    action: Sequence[Channel] = (*moves("xyz"), Channel("open", "1", -1.0, 1.0))
    planned: Sequence[Channel] = (*place_channels("way"), Channel("open", "1", -1.0, 1.0))
    handled: Sequence[str] = ("cube",)
    load: float = 20.0

    start: ClassVar[Mapping[str, Variable]] = scalars(cube="xy", goal="xyz")
    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.array([0.45, -0.12, 0.45, -0.12, 0.15]), np.array([0.60, 0.12, 0.60, 0.12, 0.25])),
        "wide": (np.array([0.36, -0.30, 0.36, -0.30, 0.10]), np.array([0.64, 0.30, 0.64, 0.30, 0.40])),
    }
    home: ClassVar[tuple[float, float, float]] = (0.48, 0.0, 0.25)  # m, where the tool starts
    tolerance: ClassVar[float] = 0.025  # m

    def spec(self) -> mujoco.MjSpec:
        return arm_spec(self.name, self.rate, self.steps, gripper=True, cube=True, build=self.build)

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        return drawn(self, noise, count, region)

    def place(self, start: Start) -> np.ndarray:
        cube, goal = np.insert(places(start, "cube", "xy"), 2, CUBE, 1), places(start, "goal", "xyz")
        for thing, place in (("cube", cube), ("goal", goal)):
            _checked(self.name, thing, place, self.build.offset)
        if (goal[:, 2] < CUBE).any():
            raise BadInput(f"{self.name}: goal_z {goal[:, 2].min():.3f} m: expected {CUBE} m or more, the cube lies on the table there")
        joints = np.repeat(joints_at(np.array([self.home]), offset=self.build.offset), len(cube), 0)
        return np.concatenate([joints, np.full((len(cube), 2), FINGER), _cube_at(cube[:, :2])], 1)

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return start["goal_x"], start["goal_y"], start["goal_z"]

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        position, velocity = stepper.position, stepper.velocity
        goal = np.broadcast_to(places(start, "goal", "xyz"), (stepper.count, 3))
        joints, opening, cube = position[:, :7], position[:, 7:9].sum(1, keepdims=True), position[:, 9:12]
        return np.concatenate([joints, velocity[:, :7], tool(joints, self.build.offset), opening, cube, velocity[:, 9:12], goal], 1)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        joints, action = observation[:, :JOINTS], np.clip(action, -1, 1)
        fingers = np.repeat(0.5 * FINGER * (1 + action[:, 3:]), 2, 1)
        return np.concatenate([_command(joints, tool(joints, self.build.offset) + REACH * action[:, :3], self.build.offset), fingers], 1)

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Comes down on the cube as into a funnel, closes the fingers on it, and carries it to the goal."""
        tip, cube, goal = observation[:, 14:17], observation[:, 18:21], observation[:, 24:27]
        held = self._held(observation)[:, None]
        beside = np.linalg.norm(cube[:, :2] - tip[:, :2], axis=1, keepdims=True)
        high = np.clip(4 * (beside - 0.008), 0, 0.10)
        above = (cube[:, 2:] + high - tip[:, 2:]) / 0.05
        too_low = np.clip(above - 0.4, 0, 1)  # then up first, lest the fingers sweep the cube away
        fetch = at_most_one(np.concatenate([(cube[:, :2] - tip[:, :2]) / 0.05 * (1 - too_low), above], 1))
        ready = (beside < 0.01) & (np.abs(cube[:, 2:] - tip[:, 2:]) < 0.012)
        carry = at_most_one((goal - cube) / 0.05)
        close = np.where(held | ready, -1.0, 1.0)
        return np.concatenate([np.where(held, carry, np.where(ready, 0.3 * fetch, fetch)), close], 1)

    def _held(self, observation: Any) -> Any:
        """Whether the fingers have closed on the cube."""
        apart = observation[..., 14:17] - observation[..., 18:21]
        return ((apart**2).sum(-1) < 0.02**2) & (observation[..., 17] < 2 * CUBE + 0.002)

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        move = at_most_one((way[:, :3] - observation[:, 14:17]) / REACH)
        return np.concatenate([move, np.clip(way[:, 3:], -1, 1)], 1)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return np.concatenate([observation[..., 14:17] + REACH * action[..., :3], action[..., 3:]], -1)

    def off(self, observation: Array) -> jax.Array:
        apart = jnp.asarray(observation[..., 18:21] - observation[..., 24:27])
        return jnp.maximum(jnp.linalg.norm(apart, axis=-1) - self.tolerance, 0.0)

    def _apart(self, observation: jax.Array) -> jax.Array:
        """What the tool has still to go, m, `[3]`."""
        return jnp.where(self._held(observation), observation[24:27] - observation[18:21], observation[18:21] - observation[14:17])

    def features(self, observation: jax.Array) -> jax.Array:
        apart = self._apart(observation)
        _, far = towards(apart)
        height = apart[2]
        left = jnp.sqrt(far**2 + height**2 + 1e-12)
        near = [jnp.minimum(far, 0.03) / 0.01, jnp.minimum(far, 0.15) / 0.05, jnp.clip(height, -0.03, 0.03) / 0.01]
        opening = observation[17] / FINGER - 1
        held = jnp.where(self._held(observation), 1.0, -1.0).astype(far.dtype)
        return jnp.stack([far / left, height / left, *near, jnp.clip(height, -0.15, 0.15) / 0.05, opening, held])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes = towards(self._apart(observation))[0]
        return jnp.concatenate([less(way[..., :3], observation[14:17]) @ axes.T / REACH, way[..., 3:]], -1)

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes = towards(self._apart(observation))[0]
        return jnp.concatenate([less(REACH * way[..., :3] @ axes, -observation[14:17]), way[..., 3:]], -1)

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned and stretched from where the tool begins to the cube and, once the fingers close, from there to the goal."""
        fetch, carry = (
            stretched(way[:, :3], (before[one], before[other]), (now[one], now[other]))
            for one, other in ((slice(14, 17), slice(18, 21)), (slice(18, 21), slice(24, 27)))
        )
        closed = jnp.cumsum(way[:, 3:] < 0, 0) > 2  # a wobbling hand closes for a moment
        return jnp.concatenate([jnp.where(closed, carry, fetch), way[:, 3:]], -1)

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of where the tool has to go; the arm's joints, which the features leave out, stay."""
        tip = observation[14:17]
        flip = mirror(towards(self._apart(observation))[0])
        return observation, jnp.concatenate([less(less(way[..., :3], tip) @ flip, -tip), way[..., 3:]], -1)


def _cube_at(place: np.ndarray) -> np.ndarray:
    """Position and quaternion, `[count, 7]`, of a cube on the table at `place`, m, `[count, 2]`."""
    cube = np.zeros((len(place), 7))
    cube[:, :2], cube[:, 2], cube[:, 3] = place, CUBE, 1.0
    return cube
