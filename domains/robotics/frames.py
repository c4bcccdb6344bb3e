"""Frames that tasks are learnt in, and starts drawn from regions or given: what several tasks share."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domains.robotics.tasks import Channel, Start
from twinsim.base import BadInput, Variable


def less(way: jax.Array, place: jax.Array) -> jax.Array:
    """`way` `[..., n]` seen from `place` `[n]`."""
    return jnp.asarray(way) - jnp.broadcast_to(place, way.shape)


def at_most_one(action: np.ndarray) -> np.ndarray:
    """Actions `[count, n]`, those longer than 1 shortened to 1."""
    return action / np.maximum(1, np.linalg.norm(action, axis=1, keepdims=True))


def wrapped(angle: Any) -> Any:
    """Angles, rad, in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rows(x: jax.Array, y: jax.Array, side: jax.Array) -> jax.Array:
    """Unit vectors along a horizontal direction, across it to the left, or to the right for a `side` of -1, and up, `[3, 3]`."""
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)
    return jnp.stack([jnp.stack([x, y, zero]), jnp.stack([-side * y, side * x, zero]), jnp.stack([zero, zero, one])])


def drawn(task: Any, noise: np.random.Generator, count: int, region: str) -> dict[str, np.ndarray]:
    """Starts uniform in one of `task.regions`, `[count]` each. Raises BadInput for another region."""
    if region not in task.regions:
        raise BadInput(f"{task.name}: region {region}: expected {' or '.join(task.regions)}")
    lower, upper = task.regions[region]
    return dict(zip(task.start, noise.uniform(lower, upper, (count, len(lower))).T, strict=True))


def given(task: Any, start: Start, bounds: Mapping[str, tuple[float, float]]) -> np.ndarray:
    """The start as an array `[count, scalar]`. Raises BadInput where a scalar is outside its bounds."""
    for name, (lower, upper) in bounds.items():
        values = np.atleast_1d(np.asarray(start[name], np.float64))
        wrong = ~((lower <= values) & (values <= upper))
        if wrong.any():
            kind = "finite" if not np.isfinite(values[wrong][0]) else f"{lower:g} to {upper:g}"
            raise BadInput(f"{task.name}: {name}: expected {kind} {task.start[name].units}, got {values[wrong][0]:g}")
    return np.stack([np.atleast_1d(np.asarray(start[name], np.float64)) for name in task.start], -1)


def scalars(**axes: str) -> dict[str, Variable]:
    """Of each thing, where it is at the start along each of its axes, m."""
    return {f"{thing}_{axis}": Variable((), "m", f"{thing} at the start, {axis}") for thing, each in axes.items() for axis in each}


def places(start: Start, thing: str, axes: str) -> np.ndarray:
    """Where a thing is at the start, m, `[count, axis]`."""
    return np.stack([np.atleast_1d(np.asarray(start[f"{thing}_{axis}"], np.float64)) for axis in axes], -1)


def expect_finite(task: str, thing: str, place: np.ndarray) -> None:
    """Raises BadInput where places `[count, axis]` are not finite."""
    finite = np.isfinite(place).all(1)
    if not finite.all():
        raise BadInput(f"{task}: {thing}: expected finite metres, got {place[~finite][0]}")


def place_channels(name: str, lower: Sequence[float] = (-2.0,) * 3, upper: Sequence[float] = (2.0,) * 3) -> tuple[Channel, ...]:
    """Of a place; by default near a robot on a table."""
    return tuple(Channel(f"{name}_{axis}", "m", *bounds) for axis, *bounds in zip("xyz", lower, upper, strict=True))


def moves(axes: str) -> tuple[Channel, ...]:
    """Actions that send something off along axes, 1 at most."""
    return tuple(Channel(f"move_{axis}", "1", -1.0, 1.0) for axis in axes)


def towards(apart: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors along the horizontal direction of `apart`, across and up, as rows `[3, 3]`, and the horizontal distance, m."""
    far = jnp.sqrt((apart[:2] ** 2).sum() + 1e-12)
    return rows(apart[0] / far, apart[1] / far, jnp.ones_like(far)), far


def mirror(axes: jax.Array) -> jax.Array:
    """The matrix that swaps left and right of the line that `axes` look along, `[2, 2]` or `[3, 3]` as they are."""
    return axes.T @ jnp.diag(jnp.array([1.0, -1.0, 1.0], axes.dtype)[: len(axes)]) @ axes


def stretched(way: jax.Array, old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Points `[frame, 3]` about a line from one place to another, turned, stretched and sheared with it to another line."""
    (before, far), (now, wide) = towards(old[1] - old[0]), towards(new[1] - new[0])
    along, across, up = (less(way, old[0]) @ before.T).T
    share = jnp.clip(along / far, 0.0, 1.0)
    up = up + share * ((new[1] - new[0])[2] - (old[1] - old[0])[2])
    return less(jnp.stack([along * wide / far, across, up], -1) @ now, -new[0])
