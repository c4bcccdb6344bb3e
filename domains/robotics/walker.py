"""A walker on four legs, and what it does: cross a height field to a goal.

It is told where its trunk shall be next; a trot under way points is the controller's, a function of what is seen and of the gait's clock.
Sizes, mass and torques are about those of a small quadruped (Unitree Go1: 12 kg, thigh and shank of 0.213 m, 23.7 and 35.5 N m;
its maker's URDF).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import mujoco
import numpy as np

from domains.robotics import worlds
from domains.robotics.frames import drawn, given, less, mirror, towards, wrapped
from domains.robotics.physics import CStepper
from domains.robotics.tasks import Channel, Start
from twinsim.base import Array, Variable

LEGS = ("front_left", "front_right", "rear_left", "rear_right")
JOINTS = ("hip", "thigh", "knee")
SIDE = np.array([1.0, -1.0, 1.0, -1.0])  # left, right
HIP = np.array([[0.188, 0.047, 0], [0.188, -0.047, 0], [-0.188, 0.047, 0], [-0.188, -0.047, 0]])  # m, of the trunk's middle
OUT = 0.08  # m, of the leg's plane beside the hip
LENGTH = 0.213  # m, of thigh and shank
FOOT = 0.023  # m, radius
LOWER, UPPER = np.array([-0.8, -0.6, -2.7]), np.array([0.8, 2.6, -0.6])  # rad, of the joints of a leg
TORQUE = (23.7, 23.7, 35.5)  # N m
STIFFNESS, DAMPING = 200.0, 5.0  # N m/rad, N m s/rad
BEAT = np.array([0.0, 0.5, 0.5, 0.0])  # of a stride, when a leg's stance begins: a trot
STRIDE, STANCE = 0.4, 0.6  # s; share of it that a foot is on the ground
STEP = 0.08  # m, that a foot is lifted
HIGH = 0.28  # m, of the hips over the feet
BALANCE = 0.05  # s, of the trunk's wrong speed, that a foot is put down further off
SUNK = 1e-3  # m, that the relief lies below level ground where it has no height, so that no foot stands on both
FASTEST = np.array([0.5, 0.25, 1.0])  # m/s on, m/s aside, rad/s


# ---------------------------------------------------------------- legs


def joints_at(foot: np.ndarray) -> np.ndarray:
    """Joint angles, rad, `[count, leg, 3]`, that bring the feet to `foot`, m from their hips, `[count, leg, 3]`, or as near as it gets."""
    x, y, z = np.moveaxis(foot, -1, 0)
    side = OUT * SIDE
    down = np.sqrt(np.maximum(y**2 + z**2 - side**2, 1e-4))
    hip = wrapped(np.arctan2(z, y) - np.arctan2(-down, side))
    far = np.minimum(np.hypot(x, down), 1.98 * LENGTH)
    knee = -2 * np.arccos(far / (2 * LENGTH))
    thigh = np.arctan2(-x, down) - knee / 2  # thigh and shank are equally long
    return np.clip(np.stack([hip, thigh, knee], -1), LOWER, UPPER)


def feet_at(joints: np.ndarray) -> np.ndarray:
    """The inverse of `joints_at`: feet, m from their hips, `[count, leg, 3]`."""
    hip, thigh, knee = np.moveaxis(joints, -1, 0)
    x = -LENGTH * (np.sin(thigh) + np.sin(thigh + knee))
    down = LENGTH * (np.cos(thigh) + np.cos(thigh + knee))
    side = OUT * SIDE
    return np.stack([x, side * np.cos(hip) + down * np.sin(hip), side * np.sin(hip) - down * np.cos(hip)], -1)


# ---------------------------------------------------------------- ground


def relief(extent: float, spacing: float, pad: float, height: float, seed: int) -> np.ndarray:
    """Heights of the ground, m, `[row, column]` over a square of half width `extent`, m: 0 on the pad in its middle.

    A Gaussian random field whose power falls with the wave number to the power of -(2 H + 2), H = 0.5 a typical Hurst exponent of natural
    ground over metres (Shepard et al. 2001, J. Geophys. Res. 106, 32777), for waves of 0.25 m to 2 m; hollows are filled.

    Args:
      pad: radius of level ground, m, from which the relief rises over half a metre. height: of its highest place, m.
    """
    count = round(2 * extent / spacing) + 1
    noise = np.random.default_rng(seed)
    wave = np.hypot(*np.meshgrid(np.fft.fftfreq(count, spacing), np.fft.fftfreq(count, spacing)))  # cycles per metre
    power = np.where((wave > 0.5) & (wave < 4.0), np.maximum(wave, 0.5) ** -3.0, 0.0)
    field = np.real(np.fft.ifft2(np.sqrt(power) * np.fft.fft2(noise.standard_normal((count, count)))))
    axis = np.linspace(-extent, extent, count)
    away = np.hypot(*np.meshgrid(axis, axis))
    field = np.maximum(field / field.std() + 0.5, 0.0) * np.clip((away - pad) / 0.5, 0, 1)
    return height * field / field.max()


@dataclass(frozen=True)
class Walk:
    """The task (see `tasks.Task`): walk over rough ground to a goal and stay there upright.

    The frame stands on the trunk and looks at the goal.
    """

    name: str = "walk"
    robot: str = "walker on four legs"
    sentence: str = "Walk over the rough ground to the goal."
    rate: float = 50.0
    steps: int = 20
    frames: int = 400
    hold: int = 10
    height: float = 0.08  # m, of the highest place
    seed: int = 0  # of the ground
    observation: Sequence[Channel] = (
        *(Channel(f"trunk_{axis}", "m", -5.0, 5.0) for axis in "xyz"),
        Channel("roll", "rad", -0.6, 0.6),
        Channel("pitch", "rad", -0.6, 0.6),
        Channel("heading", "rad", -2 * np.pi, 2 * np.pi),
        *(Channel(f"trunk_speed_{axis}", "m s-1", -3.0, 3.0) for axis in "xyz"),
        *(Channel(f"{name}_speed", "rad s-1", -15.0, 15.0) for name in ("roll", "pitch", "heading")),
        *(Channel(f"{leg}_{joint}", "rad", low, high) for leg in LEGS for joint, low, high in zip(JOINTS, LOWER, UPPER, strict=True)),
        Channel("clock_sin", "1", -1.0, 1.0),
        Channel("clock_cos", "1", -1.0, 1.0),
        *(Channel(f"goal_{axis}", "m", -5.0, 5.0) for axis in "xy"),
    )
    action: Sequence[Channel] = tuple(Channel(name, "1", -1.0, 1.0) for name in ("move_on", "move_aside", "turn"))
    planned: Sequence[Channel] = (
        *(Channel(f"way_{axis}", "m", -6.0, 6.0) for axis in "xy"),
        Channel("way_heading", "rad", -3 * np.pi, 3 * np.pi),
    )
    handled: Sequence[str] = ("trunk",)
    load: float = 120.0

    start: ClassVar[Mapping[str, Variable]] = {
        "heading": Variable((), "rad", "of the walker at the start"),
        "goal_angle": Variable((), "rad", "direction of the goal, seen from the middle"),
        "goal_far": Variable((), "m", "the goal from the middle"),
    }
    regions: ClassVar[Mapping[str, Any]] = {
        "narrow": (np.array([-0.5, -0.5, 1.0]), np.array([0.5, 0.5, 1.6])),
        "wide": (np.array([-np.pi, -np.pi, 0.8]), np.array([np.pi, np.pi, 2.0])),
    }
    bounds: ClassVar[Mapping[str, tuple[float, float]]] = {
        "heading": (-np.pi, np.pi),
        "goal_angle": (-np.pi, np.pi),
        "goal_far": (0.0, 2.4),  # m, what can be walked within the frames
    }
    mass: ClassVar[float] = 6.5  # kg, of the trunk
    extent: ClassVar[float] = 3.0  # m, half the width of the relief
    spacing: ClassVar[float] = 0.05  # m, of its grid
    pad: ClassVar[float] = 0.4  # m, radius of level ground about the middle
    reach: ClassVar[np.ndarray] = np.array([0.25, 0.125, 0.5])  # m on, m aside, rad that an action of 1 looks ahead
    tolerance: ClassVar[tuple[float, float]] = (0.1, 0.5)  # m; rad of roll and pitch

    def spec(self) -> mujoco.MjSpec:
        spec = mujoco.MjSpec()
        spec.modelname = self.name
        spec.compiler.degree = False
        spec.option.timestep = 1 / (self.rate * self.steps)
        spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
        geom, world = mujoco.mjtGeom, spec.worldbody
        touching: dict[str, Any] = {"friction": [0.8, 0.02, 1e-3], "solref": [0.002, 1], "solimp": [0.95, 0.99, 0.001, 0.5, 2]}
        plain = {"contype": 0, "conaffinity": 0}
        world.add_light(type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL, pos=[0, 0, 4], dir=[0.4, 0.3, -1], castshadow=False)
        sky = spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=64, height=64)
        sky.builtin, sky.rgb1, sky.rgb2 = mujoco.mjtBuiltin.mjBUILTIN_GRADIENT, [0.85, 0.88, 0.92], [0.6, 0.7, 0.82]
        heights = relief(self.extent, self.spacing, self.pad, 1.0, self.seed)
        spec.add_hfield(
            name="relief", nrow=len(heights), ncol=len(heights), size=[self.extent, self.extent, self.height, 0.1], userdata=heights.ravel()
        )
        world.add_geom(name="ground", type=geom.mjGEOM_PLANE, size=[6, 6, 0.1], rgba=[0.75, 0.72, 0.68, 1], **touching)
        # just below the level ground where it has no height, so that no foot touches both
        world.add_geom(
            name="relief", type=geom.mjGEOM_HFIELD, hfieldname="relief", pos=[0, 0, -SUNK], rgba=[0.72, 0.66, 0.58, 1], **touching
        )
        world.add_site(name="goal", type=geom.mjGEOM_CYLINDER, size=[self.tolerance[0], 0.01, 0], rgba=[0, 0.6, 0.3, 0.6])
        trunk = world.add_body(name="trunk", pos=[0, 0, HIGH + FOOT])
        trunk.add_freejoint(name="trunk")
        trunk.add_camera(name="side", pos=[0, -1.6, 0.8], xyaxes=[1, 0, 0, 0, 0.45, 0.9], mode=mujoco.mjtCamLight.mjCAMLIGHT_TRACK)
        trunk.add_geom(name="trunk", type=geom.mjGEOM_BOX, size=[0.19, 0.06, 0.05], mass=self.mass, rgba=[0.3, 0.4, 0.8, 1], **touching)
        for index, leg in enumerate(LEGS):
            self._leg(spec, trunk, leg, index, touching, plain)
        spec.add_sensor(
            name="gap walker",
            type=mujoco.mjtSensor.mjSENS_CONTACT,
            objtype=mujoco.mjtObj.mjOBJ_XBODY,
            objname="world",
            intprm=[1 << int(mujoco.mjtConDataField.mjCONDATA_DIST), 1, 1],  # the distance alone, of the deepest
        )
        return spec

    def _leg(self, spec: mujoco.MjSpec, trunk: Any, leg: str, index: int, touching: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
        geom, side = mujoco.mjtGeom, SIDE[index]
        hip = trunk.add_body(name=f"{leg}_hip", pos=HIP[index])
        thigh = hip.add_body(name=f"{leg}_thigh", pos=[0, OUT * side, 0])
        shank = thigh.add_body(name=f"{leg}_shank", pos=[0, 0, -LENGTH])
        hip.add_geom(type=geom.mjGEOM_CAPSULE, fromto=[0, 0, 0, 0, OUT * side, 0], size=[0.04, 0, 0], mass=0.5, **plain)
        thigh.add_geom(type=geom.mjGEOM_CAPSULE, fromto=[0, 0, 0, 0, 0, -LENGTH], size=[0.025, 0, 0], mass=0.7, **plain)
        shank.add_geom(type=geom.mjGEOM_CAPSULE, fromto=[0, 0, 0, 0, 0, -LENGTH], size=[0.015, 0, 0], mass=0.14, **plain)
        shank.add_geom(
            name=f"{leg}_foot",
            type=geom.mjGEOM_SPHERE,
            pos=[0, 0, -LENGTH],
            size=[FOOT, 0, 0],
            mass=0.06,
            rgba=[0.1, 0.1, 0.1, 1],
            **touching,
        )
        for joint, body, axis, low, high, torque in zip(
            JOINTS, (hip, thigh, shank), ([1, 0, 0], [0, 1, 0], [0, 1, 0]), LOWER, UPPER, TORQUE, strict=True
        ):
            name = f"{leg}_{joint}"
            body.add_joint(name=name, axis=axis, range=[low, high], limited=True, armature=0.01, damping=[0.1, 0, 0])
            motor = spec.add_actuator(name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT)
            motor.set_to_position(kp=STIFFNESS, kv=DAMPING)
            motor.forcelimited, motor.forcerange = True, [-torque, torque]
            motor.ctrllimited, motor.ctrlrange = True, [low, high]

    def draw(self, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
        return drawn(self, noise, count, region)

    def place(self, start: Start) -> np.ndarray:
        heading = given(self, start, self.bounds)[:, 0]
        position = np.zeros((len(heading), 19))
        position[:, 2] = HIGH + FOOT + 5e-4
        position[:, 3], position[:, 6] = np.cos(heading / 2), np.sin(heading / 2)
        stand = joints_at(np.array([0.0, 0.0, -HIGH]) + OUT * SIDE[:, None] * np.eye(3)[1])
        position[:, 7:] = stand.ravel()
        return position

    def fields(self, model: mujoco.MjModel, world: np.ndarray) -> dict[str, np.ndarray]:
        """As `worlds.fields`; of the relief, the terrain's share stands out of the level ground."""
        changed = worlds.fields(model, world, self.handled)
        sunk = (1 - worlds.of(world, "terrain")) * self.height
        if (sunk != 0).any():
            place = np.repeat(model.geom_pos[None], len(world), 0)
            place[:, model.geom("relief").id, 2] -= sunk
            changed["geom_pos"] = place
        return changed

    def goal(self, start: Mapping[str, float]) -> tuple[float, float, float]:
        return float(start["goal_far"] * np.cos(start["goal_angle"])), float(start["goal_far"] * np.sin(start["goal_angle"])), self.height

    def observe(self, stepper: CStepper, start: Start) -> np.ndarray:
        count, position, velocity = stepper.count, stepper.position, stepper.velocity
        w, x, y, z = position[:, 3:7].T
        angles = np.stack(
            [
                np.arctan2(2 * (w * x + y * z), 1 - 2 * (x * x + y * y)),
                np.arcsin(np.clip(2 * (w * y - z * x), -1, 1)),
                np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)),
            ],
            1,
        )
        beat = 2 * np.pi * stepper.read("time").reshape(count, 1) / STRIDE
        angle, far = (np.broadcast_to(np.asarray(start[name], np.float64), count) for name in ("goal_angle", "goal_far"))
        goal = np.stack([far * np.cos(angle), far * np.sin(angle)], 1)
        return np.concatenate(
            [position[:, :3], angles, velocity[:, :6], position[:, 7:], np.sin(beat), np.cos(beat), goal],
            1,
        )

    def control(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        """A trot: feet on the ground go back as fast as the trunk shall go on, then swing to where they next carry it evenly.

        Where a foot is put down answers to the trunk's speed (Raibert 1986, Legged Robots That Balance, section 2).
        """
        heading = observation[:, 5]
        wanted = FASTEST * np.clip(action, -1, 1)
        cos, sin = np.cos(heading), np.sin(heading)
        vx, vy = observation[:, 6], observation[:, 7]
        speed = np.stack([cos * vx + sin * vy, -sin * vx + cos * vy], 1)
        beat = np.arctan2(observation[:, 24], observation[:, 25]) / (2 * np.pi)
        phase = (beat[:, None] + BEAT) % 1.0
        swing = np.clip((phase - STANCE) / (1 - STANCE), 0, 1)  # 0 on the ground
        share = np.where(phase < STANCE, 0.5 - phase / STANCE, -0.5 + swing - np.sin(2 * np.pi * swing) / (2 * np.pi))
        home = HIP + np.array([0.0, OUT, 0.0]) * SIDE[:, None]
        velocity = wanted[:, None, :2] + wanted[:, 2, None, None] * np.stack([-home[:, 1], home[:, 0]], -1)  # of each foot over ground
        foot = np.zeros((len(observation), 4, 3))
        foot[..., :2] = home[:, :2] + velocity * STANCE * STRIDE * share[..., None]
        airborne = (phase >= STANCE) * 1.0
        foot[..., :2] += (airborne * swing)[..., None] * BALANCE * (speed - wanted[:, :2])[:, None]
        foot[..., 2] = -HIGH + STEP * airborne * np.sin(np.pi * swing) ** 2
        return joints_at(foot - HIP).reshape(len(observation), 12)

    def demonstrate(self, observation: np.ndarray) -> np.ndarray:
        """Turns to the goal, and goes there as far as it looks there."""
        apart = observation[:, 26:28] - observation[:, :2]
        far = np.linalg.norm(apart, axis=1)
        wrong = wrapped(np.arctan2(apart[:, 1], apart[:, 0]) - observation[:, 5])
        near = np.clip(far / 0.2, 0, 1)
        on, aside = far * np.cos(wrong) / 0.15, far * np.sin(wrong) / 0.08
        return np.clip(np.stack([on * np.clip(np.cos(wrong), 0.2, 1), aside, wrong * near / 0.5], 1), -1, 1)

    def track(self, way: np.ndarray, observation: np.ndarray) -> np.ndarray:
        heading = observation[:, 5]
        dx, dy = (way[:, :2] - observation[:, :2]).T
        cos, sin = np.cos(heading), np.sin(heading)
        ahead = np.stack([cos * dx + sin * dy, -sin * dx + cos * dy, wrapped(way[:, 2] - heading)], 1)
        return np.clip(ahead / self.reach, -1, 1)

    def way(self, observation: np.ndarray, action: np.ndarray) -> np.ndarray:
        heading = observation[..., 5]
        on, aside = self.reach[0] * action[..., 0], self.reach[1] * action[..., 1]
        cos, sin = np.cos(heading), np.sin(heading)
        return np.stack(
            [
                observation[..., 0] + cos * on - sin * aside,
                observation[..., 1] + sin * on + cos * aside,
                heading + self.reach[2] * action[..., 2],
            ],
            -1,
        )

    def off(self, observation: Array) -> jax.Array:
        """How far from the goal, m, and from upright, rad, beyond the tolerance; 1 rad counts as 1 m."""
        seen = jnp.asarray(observation)
        apart = jnp.linalg.norm(seen[..., :2] - seen[..., 26:28], axis=-1)
        tilt = jnp.abs(seen[..., 3:5]).max(-1)
        return jnp.maximum(apart - self.tolerance[0], 0.0) + jnp.maximum(tilt - self.tolerance[1], 0.0)

    def _axes(self, observation: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit vectors to the goal and across as rows `[2, 2]`; how far it is, m; and its direction, rad."""
        apart = observation[26:28] - observation[:2]
        axes, far = towards(apart)
        return axes[:2, :2], far, jnp.arctan2(apart[1], apart[0])

    def features(self, observation: jax.Array) -> jax.Array:
        axes, far, angle = self._axes(observation)
        wrong = wrapped(angle - observation[5])
        speed = axes @ observation[6:8] / 0.4
        near = [jnp.minimum(far, 0.2) / 0.1, jnp.minimum(far, 1.0) / 0.5]
        return jnp.stack([*near, jnp.sin(wrong), jnp.cos(wrong), wrong, *speed, observation[11]])

    def into_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes, _, angle = self._axes(observation)
        place = less(way[..., :2], observation[:2]) @ axes.T / self.reach[0]
        turn = wrapped(less(way[..., 2:], observation[5:6])) / self.reach[2]
        return jnp.concatenate([place, turn], -1)

    def out_of_frame(self, observation: jax.Array, way: jax.Array) -> jax.Array:
        axes, _, _ = self._axes(observation)
        place = less(self.reach[0] * way[..., :2] @ axes, -observation[:2])
        return jnp.concatenate([place, less(self.reach[2] * way[..., 2:], -observation[5:6])], -1)

    def moved(self, before: jax.Array, now: jax.Array, way: jax.Array) -> jax.Array:
        """Turned about the walker and stretched to where the goal now is; the turn to it stretched, too."""
        (old, far, one), (new, wide, two) = self._axes(before), self._axes(now)
        place = less(way[..., :2], before[:2]) @ old.T * (wide / far) @ new
        turn, began = wrapped(way[..., 2] - one), wrapped(before[5] - one)
        left = jnp.clip(turn / jnp.where(jnp.abs(began) < 1e-3, 1e-3, began), 0.0, 1.0)
        heading = two + turn + left * (wrapped(now[5] - two) - began)
        return jnp.concatenate([less(place, -now[:2]), heading[..., None]], -1)

    def mirrored(self, observation: jax.Array, way: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Left and right of the line to the goal; legs and the gait's clock, which the features leave out, stay."""
        axes, _, angle = self._axes(observation)
        flip = mirror(axes)
        other = observation.at[5].set(wrapped(2 * angle - observation[5]))
        other = other.at[6:8].set(flip @ observation[6:8]).at[11].set(-observation[11])
        place = less(less(way[..., :2], observation[:2]) @ flip, -observation[:2])
        return other, jnp.concatenate([place, 2 * angle - way[..., 2:]], -1)
