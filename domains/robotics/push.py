"""The planar push: an arm of two links with a peg pushes a puck over a table to a goal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.frames import at_most_one, expect_finite, less, moves, scalars
from domains.robotics.physics import CStepper
from domains.robotics.tasks import Channel, Start
from twinsim.base import Array, BadInput, Variable

UPPER, FORE = 0.45, 0.40  # m, lengths of the links
PEG, PUCK = 0.04, 0.05  # m, radii
CLEAR = PEG + PUCK  # m, between centres that touch
REACH = 0.035  # m the peg is sent off by an action of 1
TOLERANCE = 0.04  # m
HOME = (0.45, -0.45)  # m, where the peg starts
RUBBING = 0.8  # N, friction of the puck on the table on Earth
REGIONS = {"narrow": ((0.38, -0.15), (0.54, 0.15)), "wide": ((0.30, -0.30), (0.62, 0.30))}  # m, corners of where puck and goal lie
APART = (0.12, 0.45)  # m, puck from goal
LIMITS = (2.6, 2.7)  # rad, of the joints
FASTEST = 3.0  # rad/s; demonstrations stay below 1


def hand(joints: np.ndarray) -> np.ndarray:
    """Where the peg is, m, `[..., 2]`, for joint angles `[..., 2]`, rad."""
    first, second = joints[..., 0], joints[..., 0] + joints[..., 1]
    return np.stack([UPPER * np.cos(first) + FORE * np.cos(second), UPPER * np.sin(first) + FORE * np.sin(second)], -1)


def joints_at(place: np.ndarray) -> np.ndarray:
    """Joint angles, rad, `[..., 2]`, that bring the peg to `place`, m, or as near as the arm reaches; elbow to the right."""
    far = np.clip(np.hypot(place[..., 0], place[..., 1]), 0.12, UPPER + FORE - 0.005)
    second = np.arccos(np.clip((far**2 - UPPER**2 - FORE**2) / (2 * UPPER * FORE), -1, 1))
    bend = np.arctan2(FORE * np.sin(second), UPPER + FORE * np.cos(second))
    return np.stack([np.arctan2(place[..., 1], place[..., 0]) - bend, second], -1)


@dataclass(frozen=True)
class PlanarPush:
    """The task (see `tasks.Task`). Its own frame stands on the puck and looks at the goal."""

    name: str = "push"
    robot: str = "planar arm with peg"
    sentence: str = "Push the puck to the goal."
    rate: float = 20.0
    steps: int = 20
    frames: int = 150
    hold: int = 5
    observation: Sequence[Channel] = (
        Channel("joint1", "rad", -LIMITS[0], LIMITS[0]),
        Channel("joint2", "rad", -LIMITS[1], LIMITS[1]),
        Channel("joint1_speed", "rad s-1", -FASTEST, FASTEST),
        Channel("joint2_speed", "rad s-1", -FASTEST, FASTEST),
        Channel("tip_x", "m", -1.0, 1.0),
        Channel("tip_y", "m", -1.0, 1.0),
        Channel("puck_x", "m", -2.0, 2.0),
        Channel("puck_y", "m", -2.0, 2.0),
        Channel("puck_speed_x", "m s-1", -3.0, 3.0),
        Channel("puck_speed_y", "m s-1", -3.0, 3.0),
        Channel("goal_x", "m", -1.0, 1.0),
        Channel("goal_y", "m", -1.0, 1.0),
    )
    action: Sequence[Channel] = moves("xy")
    planned: Sequence[Channel] = (Channel("way_x", "m", -1.0, 1.0), Channel("way_y", "m", -1.0, 1.0))
    handled: Sequence[str] = ("puck",)
    load: float = 20.0

    start: ClassVar[Mapping[str, Variable]] = scalars(puck="xy", goal="xy")

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        spec.modelname = "planar_push"
        spec.compiler.degree = False
        spec.option.timestep = 1 / (self.rate * self.steps)
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        world = spec.worldbody
        world.add_light(pos=[0, 0, 2])
        world.add_camera(name="top", pos=[0.45, 0, 1.5])
        plain = {"contype": 0, "conaffinity": 0, "solref": [0.005, 1], "solimp": [0.95, 0.99, 0.001, 0.5, 2]}
        sphere, capsule = mujoco.mjtGeom.mjGEOM_SPHERE, mujoco.mjtGeom.mjGEOM_CAPSULE
        world.add_geom(
            name="table", type=mujoco.mjtGeom.mjGEOM_PLANE, size=[1, 1, 0.1], pos=[0, 0, -0.06], rgba=[0.8, 0.8, 0.8, 1], **plain
        )
        world.add_site(name="goal", pos=[0.5, 0, 0], size=[TOLERANCE] * 3, rgba=[0, 0.6, 0.3, 0.6])
        turning = {"type": mujoco.mjtJoint.mjJNT_HINGE, "axis": [0, 0, 1], "damping": _damping(0.5), "armature": 0.05, "limited": True}
        first = world.add_body(name="upper", pos=[0, 0, 0.12])
        first.add_joint(name="joint1", range=[-LIMITS[0], LIMITS[0]], **turning)
        first.add_geom(type=capsule, fromto=[0, 0, 0, UPPER, 0, 0], size=[0.03, 0, 0], mass=1.0, **plain)
        second = first.add_body(name="fore", pos=[UPPER, 0, 0])
        second.add_joint(name="joint2", range=[-LIMITS[1], LIMITS[1]], **turning)
        second.add_geom(type=capsule, fromto=[0, 0, 0, FORE, 0, 0], size=[0.025, 0, 0], mass=0.7, **plain)
        touching = plain | {"contype": 1, "conaffinity": 1, "friction": [0.3, 0.005, 0.0001]}
        second.add_geom(name="peg", type=sphere, pos=[FORE, 0, -0.12], size=[PEG, 0, 0], mass=0.1, **touching)
        puck = world.add_body(name="puck")
        for name, axis in (("puck_x", [1, 0, 0]), ("puck_y", [0, 1, 0])):
            puck.add_joint(name=name, type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=_damping(0.5), frictionloss=RUBBING)
        puck.add_geom(name="puck", type=sphere, size=[PUCK, 0, 0], mass=0.3, rgba=[0.8, 0.3, 0.2, 1], **touching)
        for joint, kp, kv, limit in (("joint1", 120.0, 12.0, LIMITS[0]), ("joint2", 80.0, 8.0, LIMITS[1])):
            motor = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_position(kp=kp, kv=kv)
            motor.forcelimited, motor.forcerange = True, [-20, 20]
            motor.ctrllimited, motor.ctrlrange = True, [-limit, limit]
        spec.add_sensor(
            name="gap peg puck",
            type=mujoco.mjtSensor.mjSENS_GEOMDIST,
            objtype=mujoco.mjtObj.mjOBJ_GEOM,
            objname="peg",
            reftype=mujoco.mjtObj.mjOBJ_GEOM,
            refname="puck",
            cutoff=0.1,
        )
        return spec

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        if region not in REGIONS:
            raise BadInput(f"push: region {region}: expected {' or '.join(REGIONS)}")
        found = np.zeros((0, 4))
        while len(found) < count:
            lower, upper = np.tile(REGIONS[region], 2)
            drawn = noise.uniform(lower, upper, (max(2 * count, 16), 4))
            apart = np.hypot(drawn[:, 0] - drawn[:, 2], drawn[:, 1] - drawn[:, 3])
            found = np.concatenate([found, drawn[(apart > APART[0]) & (apart < APART[1])]])
        return dict(zip(self.start, found[:count].T, strict=True))

    def place(self, start: Start) -> np.ndarray:
        puck, goal = (np.stack([np.asarray(start[f"{name}_{axis}"], np.float64) for axis in "xy"], -1) for name in ("puck", "goal"))
        for name, place in (("puck", puck), ("goal", goal)):
            expect_finite(self.name, name, place)
            far = np.hypot(place[:, 0], place[:, 1])
            beyond = (far > UPPER + FORE - CLEAR) | (far < 0.12 + CLEAR)
            if beyond.any():
                raise BadInput(
                    f"push: {name} at {place[beyond][0].round(3).tolist()} m: expected {0.12 + CLEAR:.2f} to {UPPER + FORE - CLEAR:.2f} m"
                    " from the arm's foot, where the peg can go round it"
                )
        apart = np.hypot(*(puck - np.array(HOME)).T)
        if (apart < CLEAR).any():
            raise BadInput(f"push: puck at {puck[apart < CLEAR][0].round(3).tolist()} m: expected {CLEAR} m or more from the peg at {HOME}")
        return np.concatenate([np.repeat(joints_at(np.array([HOME])), len(puck), 0), puck], 1)

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        """As `worlds.fields`; the puck rubs on the table as Coulomb has it, by friction, weight and gravity."""
        changed = worlds.fields(model, world, self.handled)
        rubbing = worlds.of(world, "friction") * worlds.of(world, "payload") * worlds.of(world, "gravity") / worlds.EARTH
        if (np.abs(rubbing - 1) > 1e-6).any():
            loss = np.repeat(model.dof_frictionloss[None], len(world), 0)
            loss[:, 2:] *= rubbing[:, None]
            changed["dof_frictionloss"] = loss
        return changed

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return start["goal_x"], start["goal_y"], 0.0

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        position, velocity = stepper.position, stepper.velocity
        goal = np.stack([np.broadcast_to(start[f"goal_{axis}"], stepper.count) for axis in "xy"], -1)
        joints, puck = np.split(position, 2, axis=1)
        return np.concatenate([joints, velocity[:, :2], hand(joints), puck, velocity[:, 2:], goal], 1)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return joints_at(hand(observation[:, :2]) + REACH * np.clip(action, -1, 1))

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Goes round the puck until behind it, then pushes it home, and looks again at every step."""
        tip, puck, goal = observation[:, 4:6], observation[:, 6:8], observation[:, 10:12]
        left = np.linalg.norm(goal - puck, axis=1, keepdims=True)
        ahead = (goal - puck) / (left + 1e-9)
        beside = tip - puck
        apart = np.linalg.norm(beside, axis=1, keepdims=True)
        outward = beside / (apart + 1e-9)
        behind = -(outward * ahead).sum(1, keepdims=True)  # 1 = exactly behind the puck
        turn = np.sign(outward[:, 1:] * ahead[:, :1] - outward[:, :1] * ahead[:, 1:])
        turn = np.where(turn == 0, 1.0, turn)
        around = turn * np.stack([-outward[:, 1], outward[:, 0]], 1) + outward * np.clip((CLEAR + 0.03 - apart) / 0.03, -1, 1)
        line_up = (puck - ahead * (CLEAR + 0.012) - tip) / REACH
        across = beside - (beside * ahead).sum(1, keepdims=True) * ahead
        push = ahead * np.clip(left / 0.06, 0.3, 1) - across / 0.03
        lined_up = (np.linalg.norm(across, axis=1, keepdims=True) < 0.022) & (apart < CLEAR + 0.03)
        action = np.where(behind < 0.85, around, np.where(lined_up, push, line_up))
        return np.where(left < 0.5 * TOLERANCE, 0.0, at_most_one(action))

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        return at_most_one((way - observation[:, 4:6]) / REACH)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return observation[..., 4:6] + REACH * action

    def off(self, observation: Array) -> jax.Array:
        apart = observation[..., 6:8] - observation[..., 10:12]
        return jnp.maximum(jnp.linalg.norm(jnp.asarray(apart), axis=-1) - TOLERANCE, 0.0)

    def _axes(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Unit vectors towards the goal and across, as rows `[2, 2]`, and how far the goal is, m."""
        apart = observation[10:12] - observation[6:8]
        left = jnp.sqrt((apart**2).sum() + 1e-12)
        ahead = apart / left
        return jnp.stack([ahead, jnp.stack([-ahead[1], ahead[0]])]), left

    def features(self, observation: jax.Array) -> jax.Array:
        axes, left = self._axes(observation)
        along, across = axes @ (observation[4:6] - observation[6:8])
        apart = jnp.sqrt(along**2 + across**2 + 1e-12)
        near = [jnp.clip((apart - CLEAR) / 0.03, -1.0, 2.0), jnp.clip(across / 0.03, -2.0, 2.0), jnp.clip(along / CLEAR, -2.0, 2.0)]
        return jnp.stack([along / apart, across / apart, jnp.log(apart / CLEAR), *near, jnp.minimum(left, 0.15) / 0.06])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(way, observation[4:6]) @ self._axes(observation)[0].T / REACH

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(REACH * way @ self._axes(observation)[0], -observation[4:6])

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned about the puck towards the new goal, and beyond the puck stretched to it."""
        (old, far), (new, wide) = self._axes(before), self._axes(now)
        along, across = (less(way, before[6:8]) @ old.T).T
        along = jnp.where(along > -CLEAR, -CLEAR + (along + CLEAR) * wide / far, along)
        return less(jnp.stack([along, across], -1) @ new, -now[6:8])

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of the line from the puck to the goal; the arm's joints, which the features leave out, stay."""
        axes, _ = self._axes(observation)
        flip = axes.T @ jnp.diag(jnp.array([1.0, -1.0])) @ axes
        puck = observation[6:8]
        tip = puck + flip @ (observation[4:6] - puck)
        return observation.at[4:6].set(tip), less(less(way, puck) @ flip, -puck)


def _damping(value: float) -> list[float]:
    """As MjSpec has it since 3.16: a polynomial of the speed, of which only the linear part is set."""
    return [value, 0, 0]
