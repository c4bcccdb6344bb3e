"""How the planar push looks to a world model: seen from the line between peg and puck, with what mechanics tells of both beforehand.

The way the arm moves depends on its joints alone, not on where it points; what the peg does to the puck depends on how they lie to each
other, and on the axes of the table since these rub one by one; a puck that is not touched is slowed down by friction and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from domains.robotics.push import CLEAR, FORE, LIMITS, REACH, RUBBING, UPPER

PERIOD = 0.05  # s, a control step
MASS = 0.3  # kg, of the puck
NEAR = 0.05  # m that the peg can come nearer in a control step


@dataclass(frozen=True)
class PushView:
    """The view of `generators.world_model.View` on two joints, their speeds, the peg's place, the puck's place and its speed.

    Attributes:
      mean, scale: by which the domain normalises what is seen, in the units of its channels.
    """

    mean: Sequence[float] = (-0.8, 1.6, 0.0, 0.0, 0.45, 0.0, 0.46, 0.0, 0.0, 0.0)
    scale: Sequence[float] = (0.5, 0.4, 0.6, 0.6, 0.2, 0.2, 0.12, 0.15, 0.1, 0.1)

    def motions(self, channels: int) -> int:
        return 8

    def _parts(self, seen: jax.Array) -> tuple[jax.Array, ...]:
        physical = seen * jnp.asarray(self.scale, jnp.float32) + jnp.asarray(self.mean, jnp.float32)
        joints, speed, _, puck, drift = jnp.split(physical, [2, 4, 6, 8])
        return joints, speed, hand(joints), puck, drift

    def features(self, seen: jax.Array, action: jax.Array) -> jax.Array:
        joints, speed, tip, puck, drift = self._parts(seen)
        frame, gap = _frame(tip, puck)
        aim = joints_at(tip + REACH * jnp.clip(action, -1.0, 1.0))
        limit = jnp.array(LIMITS)
        late = jnp.clip(aim, -limit, limit) - joints
        upper, fore = _direction(joints[0]), _direction(joints[0] + joints[1])
        sides = jnp.stack([UPPER * _left(upper) + FORE * _left(fore), FORE * _left(fore)])  # the Jacobian's columns, as rows
        near = jax.nn.sigmoid((NEAR - gap) / 0.01)
        double = jnp.square(frame[0]) @ jnp.array([1.0, -1.0]), 2 * frame[0, 0] * frame[0, 1]  # cos and sin of twice the angle
        fourfold = jnp.stack([double[0] ** 2 - double[1] ** 2, 2 * double[0] * double[1]])
        parts = [
            jnp.stack([jnp.cos(joints[1]), jnp.sin(joints[1])]),
            late / 0.05,
            speed / 0.5,
            frame @ (speed @ sides) / 0.3 * near,
            (sides @ frame.T).ravel() * near,
            frame @ (late @ sides) / REACH * near,
            frame @ drift / 0.1,
            fourfold * near,
            jnp.stack([jnp.clip(gap / 0.02, -1.0, 3.0), jnp.clip(gap / 0.004, -1.0, 3.0), near]),
        ]
        return jnp.concatenate(parts)

    def moved(self, seen: jax.Array, action: jax.Array, motion: jax.Array) -> jax.Array:
        joints, speed, tip, puck, drift = self._parts(seen)
        frame, gap = _frame(tip, puck)
        turn, faster, push, kick = jnp.split(motion, 4)
        joints = joints + PERIOD * speed + 0.01 * turn
        touched = jax.nn.sigmoid((NEAR - gap) / 0.004)
        most = RUBBING / MASS * PERIOD  # m/s by which friction slows each axis down
        lasts = jnp.minimum(jnp.abs(drift) / most, 1.0)  # of a control step, until it stands
        slid = drift * PERIOD * lasts * (1 - lasts * most / (2 * jnp.maximum(jnp.abs(drift), 1e-6)))
        puck = puck + slid + touched * 0.01 * push @ frame
        drift = drift - jnp.clip(drift, -most, most) + touched * 0.1 * kick @ frame
        after = jnp.concatenate([joints, speed + 0.3 * faster, hand(joints), puck, drift])
        return (after - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.scale, jnp.float32)


def hand(joints: jax.Array) -> jax.Array:
    """As `push.hand`, traced, of one arm."""
    return UPPER * _direction(joints[0]) + FORE * _direction(joints[0] + joints[1])


def joints_at(place: jax.Array) -> jax.Array:
    """As `push.joints_at`, traced, of one place."""
    far = jnp.clip(jnp.sqrt(jnp.square(place).sum() + 1e-12), 0.12, UPPER + FORE - 0.005)
    second = jnp.arccos(jnp.clip((far**2 - UPPER**2 - FORE**2) / (2 * UPPER * FORE), -1, 1))
    bend = jnp.arctan2(FORE * jnp.sin(second), UPPER + FORE * jnp.cos(second))
    return jnp.stack([jnp.arctan2(place[1], place[0]) - bend, second])


def _frame(tip: jax.Array, puck: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors from the peg to the puck and to its left, as rows `[2, 2]`, and the gap between them, m."""
    apart = puck - tip
    far = jnp.sqrt(jnp.square(apart).sum() + 1e-12)
    ahead = apart / far
    return jnp.stack([ahead, _left(ahead)]), far - CLEAR


def _direction(angle: jax.Array) -> jax.Array:
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _left(vector: jax.Array) -> jax.Array:
    return jnp.stack([-vector[1], vector[0]])
