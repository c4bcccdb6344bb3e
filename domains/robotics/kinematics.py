"""Chains of joints from the ground to a tool: where the tool is, how it moves with each joint, and the joints that bring it to a place."""

from collections.abc import Sequence
from dataclasses import dataclass

import mujoco
import numpy as np

from twinsim.base import BadInput

NEAR = 0.1  # m that the tool is moved by a round at most, so that a round stays where its slopes hold
DAMPING = 1e-4  # m2
HINGE, SLIDE = int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)


@dataclass(frozen=True, eq=False)
class Chain:
    """Joints one after the other.

    Attributes:
      offset: m, of each joint from the one before, and of the tool from the last, where all joints are at 0, `[joint + 1, 3]`.
      turn: how each is turned against the one before, `[joint + 1, 3, 3]`.
      axis: unit vectors in the joint's own frame, `[joint, 3]`.
      sliding: which are slides, m, and not hinges, rad, `[joint]`.
      lower, upper: limits, infinite where there are none; rest: where they would rather be, `[joint]`.
    """

    offset: np.ndarray
    turn: np.ndarray
    axis: np.ndarray
    sliding: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    rest: np.ndarray

    @property
    def length(self) -> float:
        """From the first joint to the tool along the links, m."""
        return float(np.linalg.norm(self.offset[1:], axis=1).sum())

    def follow(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Place of the tool `[count, 3]`, its rotation `[count, 3, 3]`, and of all joints their places and axes `[count, joint, 3]`."""
        count, size = joints.shape
        place, turn = np.zeros((count, 3)), np.tile(np.eye(3), (count, 1, 1))
        places, axes = np.zeros((count, size, 3)), np.zeros((count, size, 3))
        for joint in range(size):
            place, turn = self._fixed(joint, place, turn)
            axis = self.axis[joint]
            places[:, joint], axes[:, joint] = place, np.einsum("nij,j->ni", turn, axis)
            if self.sliding[joint]:
                place = place + axes[:, joint] * joints[:, joint, None]
                continue
            k = np.cross(np.eye(3), axis)  # Rodrigues: R = I + sin K + (1 - cos) K K
            sine, cosine = np.sin(joints[:, joint])[:, None, None], np.cos(joints[:, joint])[:, None, None]
            turn = np.einsum("nij,njk->nik", turn, np.eye(3) + sine * k + (1 - cosine) * (k @ k))
        place, turn = self._fixed(size, place, turn)
        return place, turn, places, axes

    def _fixed(self, link: int, place: np.ndarray, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        place = place + np.einsum("nij,j->ni", turn, self.offset[link])
        return place, turn if np.array_equal(self.turn[link], np.eye(3)) else turn @ self.turn[link]

    def tool(self, joints: np.ndarray) -> np.ndarray:
        """Where the tool is, m, `[count, 3]`, for joints `[count, joint]`."""
        return self.follow(joints)[0]

    def jacobian(self, joints: np.ndarray) -> np.ndarray:
        """Velocity of the tool, m/s, and its rotation, rad/s, for the speed of each joint: `[count, 6, joint]`."""
        place, _, places, axes = self.follow(joints)
        return self._slopes(place, places, axes)

    def _slopes(self, place: np.ndarray, places: np.ndarray, axes: np.ndarray) -> np.ndarray:
        sliding = self.sliding[:, None]
        moved = np.where(sliding, axes, np.cross(axes, place[:, None] - places))
        return np.concatenate([moved, np.where(sliding, 0.0, axes)], 2).swapaxes(1, 2)

    def joints_at(self, place: np.ndarray, near: np.ndarray | None = None, rounds: int = 40, upright: bool = False) -> np.ndarray:
        """Joints `[count, joint]` that bring the tool to `place`, m, `[count, 3]`, or as near as it gets.

        Damped least squares (Wampler 1986, IEEE Trans. SMC 16:93), spare freedom drawn towards `rest`.

        Args:
          near: joints to begin from; `rest` by default.
          upright: whether the tool is to be turned as the ground is.
        """
        joints = np.repeat(self.rest[None], len(place), 0) if near is None else np.clip(near, self.lower, self.upper)
        size = 6 if upright else 3
        for _ in range(rounds):
            at, turn, places, axes = self.follow(joints)
            error = np.clip(place - at, -NEAR, NEAR)
            if upright:
                tilt = 0.5 * np.cross(turn.swapaxes(1, 2), np.eye(3)).sum(1)  # axis times sine of the angle back to upright
                error = np.concatenate([error, tilt], 1)
            j = self._slopes(at, places, axes)[:, :size]
            inverse = j.swapaxes(1, 2) @ np.linalg.inv(j @ j.swapaxes(1, 2) + DAMPING * np.eye(size))
            spare = 0.05 * (self.rest - joints)
            spare = spare - np.einsum("nij,nj->ni", inverse, np.einsum("nij,nj->ni", j, spare))
            joints = np.clip(joints + np.einsum("nij,nj->ni", inverse, error) + spare, self.lower, self.upper)
        return joints


def dexterity(chain: Chain, joints: np.ndarray) -> np.ndarray:
    """How well the tool can be moved anywhere, `[count]`: sqrt(det(J J^T)) of its place (Yoshikawa 1985, IJRR 4(2):3)."""
    j = chain.jacobian(joints)[:, :3]
    return np.sqrt(np.maximum(np.linalg.det(j @ j.swapaxes(1, 2)), 0.0))


def chain_of(model: mujoco.MjModel, tool: str, rest: Sequence[float] | None = None) -> tuple[Chain, np.ndarray]:
    """The chain that carries a body or site, and which joints of the model it is made of, `[joint]`. Raises BadInput.

    Args:
      rest: where the joints would rather be; where the model has them at the start by default.
    """
    kind = mujoco.mjtObj
    site, body = mujoco.mj_name2id(model, kind.mjOBJ_SITE, tool), mujoco.mj_name2id(model, kind.mjOBJ_BODY, tool)
    if site < 0 and body < 1:
        known = [mujoco.mj_id2name(model, kind.mjOBJ_BODY, index) for index in range(1, model.nbody)]
        known += [mujoco.mj_id2name(model, kind.mjOBJ_SITE, index) for index in range(model.nsite)]
        raise BadInput(f"tool {tool}: expected a body or site of the model: {', '.join(name for name in known if name)[:300]}")
    body = model.site_bodyid[site] if site >= 0 else body
    above = [body]
    while model.body_parentid[above[0]]:
        above.insert(0, int(model.body_parentid[above[0]]))
    found: list[int] = []
    offsets, turns, axes = [], [], []
    offset, turn = np.zeros(3), np.eye(3)
    for each in above:
        offset, turn = offset + turn @ model.body_pos[each], turn @ _matrix(model.body_quat[each])
        for joint in range(model.body_jntadr[each], model.body_jntadr[each] + model.body_jntnum[each]):
            name = mujoco.mj_id2name(model, kind.mjOBJ_JOINT, joint) or f"joint {joint}"
            if model.jnt_type[joint] not in (HINGE, SLIDE):
                raise BadInput(
                    f"tool {tool}: expected it on a chain of hinges and slides that stands on the ground, joint {name} is free or a ball"
                )
            at, start = model.jnt_pos[joint], model.qpos0[model.jnt_qposadr[joint]]
            if start != 0:
                raise BadInput(f"joint {name}: expected the reference position 0, got {start:g}")
            offsets.append(offset + turn @ at)
            turns.append(turn)
            axes.append(model.jnt_axis[joint])
            found.append(joint)
            offset, turn = -at, np.eye(3)
    if not found:
        raise BadInput(f"tool {tool}: expected it on a chain of joints, none moves it")
    if site >= 0:
        offset, turn = offset + turn @ model.site_pos[site], turn @ _matrix(model.site_quat[site])
    limited = model.jnt_limited[found].astype(bool)
    lower, upper = (np.where(limited, model.jnt_range[found, side], sign * np.inf) for side, sign in ((0, -1), (1, 1)))
    resting = model.qpos0[model.jnt_qposadr[found]] if rest is None else np.array(rest, float)
    if resting.shape != (len(found),) or not ((resting >= lower) & (resting <= upper)).all():
        if rest is not None:
            raise BadInput(f"rest: expected {len(found)} numbers within the limits of the joints, got {list(rest)}")
        resting = np.clip(resting, lower, upper)
    sliding = model.jnt_type[found] == SLIDE
    chain = Chain(np.array([*offsets, offset]), np.array([*turns, turn]), np.array(axes), sliding, lower, upper, resting)
    return chain, np.array(found)


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
