"""Frames that tasks are learnt in, and starts drawn from regions: what several tasks share."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domains.robotics.tasks import Start
from twinsim.base import BadInput


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
