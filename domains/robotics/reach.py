"""Reaching: what every arm that brings its tool to a place has in common, and the task for an arm of the user, MJCF or URDF."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from domains.robotics import models, worlds
from domains.robotics.frames import at_most_one, expect_finite, less, mirror, moves, place_channels, places, scalars, stretched, towards
from domains.robotics.kinematics import HINGE, Chain, chain_of, dexterity
from domains.robotics.physics import CStepper, compiled
from domains.robotics.tasks import ALL, Channel, Start, file_records
from twinsim.base import Array, BadInput, Variable


class Reaching(ABC):
    """Bring the tool to the goal; observations end with the places of both. The task's own frame stands on the tool and looks at the goal.

    Attributes:
      tolerance: m.
    """

    tolerance: float
    start: ClassVar[Mapping[str, Variable]] = scalars(tool="xyz", goal="xyz")

    @property
    @abstractmethod
    def pace(self) -> float:
        """m that the tool is sent off by an action of 1."""

    @property
    @abstractmethod
    def slow(self) -> float:
        """m from the goal from where on the demonstrator slows down."""

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return start["goal_x"], start["goal_y"], start["goal_z"]

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        return at_most_one((observation[:, -3:] - observation[:, -6:-3]) / self.slow)

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        return at_most_one((way - observation[:, -6:-3]) / self.pace)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        return observation[..., -6:-3] + self.pace * action

    def off(self, observation: Array) -> jax.Array:
        apart = jnp.asarray(observation[..., -6:-3] - observation[..., -3:])
        return jnp.maximum(jnp.linalg.norm(apart, axis=-1) - self.tolerance, 0.0)

    def features(self, observation: jax.Array) -> jax.Array:
        apart = observation[-3:] - observation[-6:-3]
        _, far = towards(apart)
        left = jnp.sqrt(far**2 + apart[2] ** 2)
        most = 3 * self.slow
        return jnp.stack([far / left, apart[2] / left, jnp.minimum(far, most) / self.slow, jnp.clip(apart[2], -most, most) / self.slow])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(way, observation[-6:-3]) @ towards(observation[-3:] - observation[-6:-3])[0].T / self.pace

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        return less(self.pace * way @ towards(observation[-3:] - observation[-6:-3])[0], -observation[-6:-3])

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned and stretched from where the tool begins to the goal."""
        return stretched(way, (before[-6:-3], before[-3:]), (now[-6:-3], now[-3:]))

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of the line to the goal; the arm's joints, which the features leave out, stay."""
        tip = observation[-6:-3]
        return observation, less(less(way, tip) @ mirror(towards(observation[-3:] - tip)[0]), -tip)


# ---------------------------------------------------------------- an arm of the user

HASTE = 0.2  # rad a joint is sent off at most
DEEPEST = 0.001  # m that bodies may be in each other where an episode begins
MISSED = 0.005  # m that the tool may stay away from a place that counts as within reach
BANDWIDTH = 20.0  # rad/s, of the servos that are added to joints without; about those of light industrial arms: assumption
TRIED = 512  # poses among which the one to start around is chosen
ROUNDS = 50  # of drawing starts, until the goal is said to be out of reach


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnReach(Reaching):
    """An arm of the user brings its tool to a place.

    Joints of the chain that have no position servo are given one, critically damped, and the arm then carries its own weight; other
    actuators hold still. Starts lie about `rest`: each joint within a share of its range, at most of half a turn.

    Attributes:
      model: MJCF or URDF, screened as data from outside. tool: name of the body or site that is brought to the goal.
      rest: of the joints that carry the tool, rad or m; by default the model's first keyframe, else the pose from which the tool can
        best be moved (see `kinematics.dexterity`).
      share: of the chain's length, that the tool is sent off by an action of 1.
      spread: share of the joints' ranges that starts and goals come from, by region.
      fastest: speed of a joint, rad/s or m/s, above which an episode is broken.
    """

    model: str
    tool: str
    rest: Sequence[float] | None = None
    name: str = "own_reach"
    sentence: str = "Bring the tool to the goal."
    rate: float = 20.0
    frames: int = 120
    hold: int = 5
    tolerance: float = 0.02
    share: float = 0.03
    fastest: float = 10.0
    load: float = 20.0
    spread: Mapping[str, float] | None = None

    action: ClassVar[Sequence[Channel]] = moves("xyz")

    # ---- what the file says

    @cached_property
    def _opened(self) -> models.Opened:
        return models.read(self.model)

    @cached_property
    def files(self) -> Sequence[Mapping[str, Any]]:
        """What the model was read from, as records of inputs."""
        folder = Path(self.model).parent
        return file_records([folder / name for name in self._opened.files], "as the owner of the robot's model has it")

    @cached_property
    def assets(self) -> Mapping[str, Path]:
        """Files that the scene names, by where it names them."""
        return self._opened.assets()

    @cached_property
    def _plain(self) -> mujoco.MjModel:
        """The user's model, all bodies kept, nothing added."""
        return compiled(self._opened.spec())

    @cached_property
    def _chained(self) -> tuple[Chain, np.ndarray]:
        """The chain that carries the tool, and its joints."""
        model = self._plain
        if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, "goal") >= 0:
            raise BadInput(f"{self.model}: expected no site called goal, the name of the mark of an episode's goal")
        try:
            chain, joints = chain_of(model, self.tool, self.rest)
            if self.rest is None and model.nkey:
                chain = replace(chain, rest=np.clip(model.key_qpos[0][model.jnt_qposadr[joints]], chain.lower, chain.upper))
            elif self.rest is None:
                chain = replace(chain, rest=self._dexterous(chain, joints))
        except BadInput as error:
            raise BadInput(f"{self.model}: {error}") from None
        return chain, joints

    def _dexterous(self, chain: Chain, joints: np.ndarray) -> np.ndarray:
        """The pose of the greatest dexterity, of some drawn over the middle half of the ranges, that is clear of all contact."""
        lower, upper = (np.where(np.isfinite(side), side, sign * np.pi) for side, sign in ((chain.lower, -1), (chain.upper, 1)))
        half = np.where(chain.sliding, 0.25, 0.5) * np.minimum(upper - lower, 2 * np.pi) / 2
        poses = (lower + upper) / 2 + half * np.random.default_rng(0).uniform(-1, 1, (TRIED, len(joints)))
        for pose in poses[np.argsort(-dexterity(chain, poses), kind="stable")]:
            if self._clear(self._posed(pose[None], joints))[0]:
                return pose
        raise BadInput("expected a pose in which no bodies are in each other, all that were tried have some; give rest")

    def _posed(self, poses: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Generalised positions `[count, nq]` of poses of the chain; other joints are where the model has them at the start."""
        model = self._plain
        start = model.key_qpos[0] if model.nkey else model.qpos0
        position = np.repeat(start[None], len(poses), 0)
        position[:, model.jnt_qposadr[joints]] = poses
        return position

    def _clear(self, positions: np.ndarray) -> np.ndarray:
        """In which generalised positions `[count, nq]` no bodies are in each other."""
        data, clear = mujoco.MjData(self._plain), np.ones(len(positions), bool)
        for index, position in enumerate(positions):
            data.qpos[:] = position
            mujoco.mj_fwdPosition(self._plain, data)
            clear[index] = (data.contact.dist[: data.ncon] >= -DEEPEST).all()
        return clear

    @cached_property
    def _bare(self) -> np.ndarray:
        """Which joints of the chain have no position servo, `[joint]`."""
        model, (_, joints) = self._plain, self._chained
        found = []
        for joint in joints:
            (ours,) = np.nonzero((model.actuator_trntype == int(mujoco.mjtTrn.mjTRN_JOINT)) & (model.actuator_trnid[:, 0] == joint))
            gain, bias = model.actuator_gainprm[ours, 0], model.actuator_biasprm[ours]
            plain = (model.actuator_dyntype[ours] == int(mujoco.mjtDyn.mjDYN_NONE)) & (model.actuator_gear[ours, 0] == 1)
            is_servo = plain & (gain > 0) & np.isclose(bias[:, 1], -gain) & (bias[:, 0] == 0)
            found.append(len(ours) != 1 or not is_servo[0])
        return np.array(found)

    @property
    def robot(self) -> str:
        return f"{Path(self.model).stem}, tool {self.tool}"

    @cached_property
    def pace(self) -> float:
        return self.share * self._chained[0].length

    @property
    def slow(self) -> float:
        return 1.4 * self.pace

    @cached_property
    def steps(self) -> int:
        """Physics steps of a control step, as close to the model's own time step as they go."""
        return max(1, round(1 / (self.rate * float(self._plain.opt.timestep))))

    @cached_property
    def observation(self) -> Sequence[Channel]:
        chain, joints = self._chained
        names = [self._named(int(joint)) for joint in joints]
        units = ["m" if sliding else "rad" for sliding in chain.sliding]
        bounds = zip(names, units, chain.lower.tolist(), chain.upper.tolist(), strict=True)
        return (
            *(Channel(*each) for each in bounds),
            *(Channel(f"{name}_speed", f"{unit} s-1", -self.fastest, self.fastest) for name, unit in zip(names, units, strict=True)),
            *self._places("tool"),
            *self._places("goal"),
        )

    @cached_property
    def planned(self) -> Sequence[Channel]:
        return self._places("way")

    def _places(self, name: str) -> Sequence[Channel]:
        """Of a place as far from the chain's first joint as the tool gets at most."""
        chain = self._chained[0]
        far = chain.length + np.abs([chain.lower, chain.upper]).max(0)[chain.sliding].sum()
        return place_channels(name, (chain.offset[0] - far).tolist(), (chain.offset[0] + far).tolist())

    def _named(self, joint: int) -> str:
        name = mujoco.mj_id2name(self._plain, mujoco.mjtObj.mjOBJ_JOINT, joint) or f"joint{joint}"
        return "joint_" + "".join(letter if letter.isalnum() else "_" for letter in name).removeprefix("joint_")

    @cached_property
    def handled(self) -> Sequence[str]:
        model = self._plain
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, self.tool)
        return (model.body(model.site_bodyid[site]).name,) if site >= 0 else (self.tool,)

    # ---- the task

    def spec(self) -> mujoco.MjSpec:
        spec, model, joints = self._opened.spec(), self._plain, self._chained[1]
        spec.option.timestep = 1 / (self.rate * self.steps)
        if spec.option.integrator == mujoco.mjtIntegrator.mjINT_EULER:
            spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST  # stiff servos of light links diverge in explicit steps
        self._seen(spec)
        spec.worldbody.add_site(name="goal", size=[0.02] * 3, rgba=[0, 0.6, 0.3, 0.6])
        spec.add_sensor(  # of all contacts, the distance of the deepest
            name=ALL,
            type=mujoco.mjtSensor.mjSENS_CONTACT,
            intprm=[1 << int(mujoco.mjtConDataField.mjCONDATA_DIST), 1, 1],
        )
        for key in list(spec.keys):
            spec.delete(key)  # of another number of controls
        bare = [int(joint) for joint in joints[self._bare]]
        if not bare:
            return spec
        names = {model.joint(joint).name for joint in bare}
        if "" in names:
            raise BadInput(f"{self.model}: expected names of all joints that carry {self.tool} and have no position servo")
        gone = [each for each in spec.actuators if each.trntype == mujoco.mjtTrn.mjTRN_JOINT and each.target in names]
        called = {each.name for each in gone}
        for sensor in list(spec.sensors):
            if sensor.objtype == mujoco.mjtObj.mjOBJ_ACTUATOR and sensor.objname in called:
                spec.delete(sensor)
        for actuator in gone:
            spec.delete(actuator)
        for joint, inertia in zip(bare, self._inertia[self._bare], strict=True):
            name = model.joint(joint).name
            motor = spec.add_actuator(name=f"servo of {name}", target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_position(kp=inertia * BANDWIDTH**2, kv=2 * inertia * BANDWIDTH)
            if model.jnt_limited[joint]:
                motor.ctrllimited, motor.ctrlrange = True, model.jnt_range[joint]
        for body in spec.bodies:
            body.gravcomp = 1 if body.name in self._carried else body.gravcomp
        return spec

    def _seen(self, spec: mujoco.MjSpec) -> None:
        """Adds a camera that has the arm in view, and a light, where the model has no camera, as URDF has not."""
        if not self._plain.ncam:
            middle, far = self._chained[0].follow(self._chained[0].rest[None])[2][0].mean(0), self._chained[0].length
            spec.worldbody.add_camera(name="side", pos=middle + far * np.array([1.0, -1.2, 0.6]), xyaxes=[0.77, 0.64, 0, -0.23, 0.28, 0.93])
            spec.worldbody.add_light(pos=middle + far * np.array([0.0, 0.0, 2.0]))

    @cached_property
    def _inertia(self) -> np.ndarray:
        """About each joint of the chain at rest, kg m2 or kg."""
        model, (chain, joints) = self._plain, self._chained
        data, full = mujoco.MjData(model), np.zeros((model.nv, model.nv))
        data.qpos[:] = self._posed(chain.rest[None], joints)[0]
        mujoco.mj_forward(model, data)
        mujoco.mj_fullM(model, data, full)
        return np.diag(full)[model.jnt_dofadr[joints]]

    @cached_property
    def _carried(self) -> set[str]:
        """Names of the bodies that the chain's joints move."""
        model, (_, joints) = self._plain, self._chained
        roots, moved = {int(model.jnt_bodyid[joint]) for joint in joints}, set()
        for body in range(1, model.nbody):
            if body in roots or int(model.body_parentid[body]) in moved:
                moved.add(body)
        return {model.body(body).name for body in moved}

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        spread = {"narrow": 0.05, "wide": 0.12, **(self.spread or {})}
        if region not in spread:
            raise BadInput(f"{self.name}: region {region}: expected {' or '.join(spread)}")
        chain, _ = self._chained
        half = spread[region] * np.minimum(chain.upper - chain.lower, 2 * np.pi)
        found: list[np.ndarray] = []
        for _ in range(ROUNDS):
            poses = chain.rest + half * noise.uniform(-1, 1, (2, count, len(half)))
            ends = [chain.tool(np.clip(each, chain.lower, chain.upper)) for each in poses]
            good = self._brought(ends[0])[1] & self._brought(ends[1])[1]
            found.extend(np.concatenate(ends, 1)[good])
            if len(found) >= count:
                return dict(zip(self.start, np.array(found[:count]).T, strict=True))
        raise BadInput(
            f"{self.model}: region {region}: expected places that {self.tool} can be brought to with no bodies in each other,"
            f" found {len(found)} of {count}; another rest?"
        )

    def _brought(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions `[count, nq]` with the tool at places `[count, 3]`, and whether it is there with no bodies in each other."""
        chain, joints = self._chained
        poses = chain.joints_at(place)
        near = np.linalg.norm(chain.tool(poses) - place, axis=1) <= MISSED
        positions = self._posed(poses, joints)
        return positions, near & self._clear(positions)

    def place(self, start: Start) -> np.ndarray:
        positions = {}
        for thing in ("tool", "goal"):
            place = places(start, thing, "xyz")
            expect_finite(self.name, thing, place)
            positions[thing], good = self._brought(place)
            if not good.all():
                worst = place[~good][0].round(3).tolist()
                raise BadInput(
                    f"{self.name}: {thing} at {worst} m: expected a place that {self.tool} can be brought to with no bodies in each other"
                )
        return positions["tool"]

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        return worlds.fields(model, world, self.handled)

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        model, (chain, joints) = self._plain, self._chained
        poses = stepper.position[:, model.jnt_qposadr[joints]]
        goal = np.broadcast_to(places(start, "goal", "xyz"), (stepper.count, 3))
        return np.concatenate([poses, stepper.velocity[:, model.jnt_dofadr[joints]], chain.tool(poses), goal], 1)

    @cached_property
    def _held(self) -> tuple[np.ndarray, np.ndarray]:
        """Controls that hold all still, `[nu]`, and which of them are of the chain's joints, in their order."""
        model = compiled(self.spec())
        _, joints = self._chained
        of_joint = model.actuator_trntype == int(mujoco.mjtTrn.mjTRN_JOINT)
        moved = [int(np.nonzero(of_joint & (model.actuator_trnid[:, 0] == joint))[0][0]) for joint in joints]
        still = self._posed(self._chained[0].rest[None], joints)[0]
        held = np.zeros(model.nu)
        for index in range(model.nu):
            if of_joint[index] and model.actuator_biastype[index] == int(mujoco.mjtBias.mjBIAS_AFFINE):
                joint = model.actuator_trnid[index, 0]
                held[index] = still[model.jnt_qposadr[joint]] if model.jnt_type[joint] <= HINGE else 0.0
        return held, np.array(moved)

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        chain, joints = self._chained
        poses = observation[:, : len(joints)].astype(np.float64)
        wanted = chain.joints_at(chain.tool(poses) + self.pace * np.clip(action, -1, 1), poses, 3)
        most = np.where(chain.sliding, 2 * self.pace, HASTE)
        held, moved = self._held
        control = np.repeat(held[None], len(poses), 0)
        control[:, moved] = np.clip(poses + np.clip(wanted - poses, -most, most), chain.lower, chain.upper)
        return control
