"""From named physical arrays to one normalised array and back: transforms, stacked channels, principal components, sequences.

Each function is written for one sample, takes its fitted statistics as an argument and works on numpy and JAX arrays alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twinsim.base import Array, BadInput

STILL = 1e-8  # of the variance of the first component: what has less is rounding


class Transform(NamedTuple):
    """A monotone map of a physical quantity to one that is closer to Gaussian, and its inverse."""

    forward: Callable[[Array], Array]
    inverse: Callable[[Array], Array]


def transform(name: str, unit: float = 1.0) -> Transform:
    """The transform called `name`, with `unit` the physical value that counts as one.

    "identity" | "sqrt" and "log1p" for non-negative quantities with many zeros (their inverse is never negative) |
    "log" for positive ones, where a relative error matters (humidity).

    Raises:
      BadInput: the name is none of these, or the unit is not positive.
    """
    if unit <= 0:
        raise BadInput(f"transform {name}: expected a positive unit, got {unit}")
    transforms = {
        "identity": Transform(lambda x: x / unit, lambda y: y * unit),
        "sqrt": Transform(lambda x: jnp.sqrt(jnp.maximum(x, 0.0) / unit), lambda y: jnp.maximum(y, 0.0) ** 2 * unit),
        "log1p": Transform(lambda x: jnp.log1p(jnp.maximum(x, 0.0) / unit), lambda y: jnp.expm1(jnp.maximum(y, 0.0)) * unit),
        "log": Transform(lambda x: jnp.log(jnp.maximum(x / unit, 1e-2)), lambda y: jnp.exp(y) * unit),
    }
    if name not in transforms:
        raise BadInput(f"transform: expected one of {', '.join(transforms)}, got {name!r}")
    return transforms[name]


def stack(values: Mapping[str, Array], names: Sequence[str]) -> Array:
    """Fields `[*grid]` by name -> `[*grid, channel]` in the order of `names`."""
    return jnp.stack([values[name] for name in names], axis=-1)


def unstack(channels: Array, names: Sequence[str]) -> dict[str, Array]:
    """The inverse of `stack`."""
    return {name: channels[..., index] for index, name in enumerate(names)}


def fit_components(residuals: np.ndarray, weights: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Joint principal components (EOFs) of all channels of zero-mean residuals, each channel first divided by its own scale.

    Args:
      residuals: `[n, *grid, channel]`.
      weights: area weights with mean 1, `[*grid]`.
      count: components kept, at most n - 1, and none that does not vary.

    Returns:
      `channel_scale [channel]`, `weights [*grid]`, `mean [feature]`, `basis [component, feature]` orthonormal,
      `scale [component]` standard deviations, `explained` share of variance.
    """
    samples = len(residuals)
    root = np.sqrt(weights)[..., None]
    channel_scale = np.sqrt((residuals**2 * weights[..., None]).mean(axis=tuple(range(residuals.ndim - 1)))) + 1e-12
    features = (residuals / channel_scale * root).reshape(samples, -1).astype(np.float32)
    mean = features.mean(0)
    # The eigenvectors of the smaller Gram matrix give the same components as a singular value decomposition, faster.
    centred = features - mean
    wide = features.shape[1] > samples
    power, vectors = np.linalg.eigh((centred @ centred.T if wide else centred.T @ centred).astype(np.float64))
    count = int(min(count, samples - 1, features.shape[1]))
    count = max(1, min(count, int((power > STILL * power[-1]).sum())))  # means taken out before leave fewer than n - 1
    power, vectors = np.maximum(power[::-1][:count], 1e-12), vectors[:, ::-1][:, :count]
    basis = (vectors / np.sqrt(power)).T.astype(np.float32) @ centred if wide else vectors.T
    scale = np.sqrt(power / (samples - 1)).astype(np.float32)
    explained = np.float32(power.sum() / (centred.astype(np.float64) ** 2).sum())
    return {
        "channel_scale": channel_scale.astype(np.float32),
        "weights": weights.astype(np.float32),
        "mean": mean.astype(np.float32),
        "basis": basis.astype(np.float32),
        "scale": scale,
        "explained": explained,
    }


def project(components: Mapping[str, Any], residual: Array) -> Array:
    """Residual `[*grid, channel]` -> standardised principal components `[component, 1]`."""
    feature = jnp.reshape(residual / _units(components), -1) - components["mean"]
    return ((components["basis"] @ feature) / components["scale"])[:, None]


def expand(components: Mapping[str, Any], target: Array) -> Array:
    """Standardised principal components `[component, 1]` -> residual `[*grid, channel]`."""
    feature = (target[:, 0] * components["scale"]) @ components["basis"] + components["mean"]
    units = _units(components)
    return feature.reshape(units.shape) * units


def _units(components: Mapping[str, Any]) -> Array:
    """What a feature of one stands for in each cell and channel, `[*grid, channel]`."""
    weights, scale = components["weights"], components["channel_scale"]
    return jnp.broadcast_to(scale, (*weights.shape, *scale.shape)) / jnp.sqrt(weights)[..., None]


# ---------------------------------------------------------------- sequences

LONGEST_MEMORY = 0.99  # of a singular value of the propagator: at 1 a state would never be forgotten


def fit_memory(before: np.ndarray, after: np.ndarray, coupled: int, penalty: float = 0.001) -> dict[str, np.ndarray]:
    """How standardised components lead from one step to the next: x' = A x + L e, where x, x' and e have unit covariance.

    The `coupled` leading components may lead to one another (a linear inverse model; Penland & Sardeshmukh 1995, J. Climate 8,
    1999-2024), so that what travels keeps travelling; each of the others leads to itself alone. L L' = 1 - A A', which makes the
    distribution of a single step the same at every step.

    Args:
      before, after: components of consecutive steps, `[pair, component]`.
      penalty: of the ridge regression of the coupled ones, relative to the number of pairs.

    Returns:
      `propagator [coupled, coupled]`, `kick [coupled, coupled]` lower triangular, `own [component - coupled]`.
    """
    coupled = min(coupled, before.shape[1])
    x, y = before[:, :coupled].astype(np.float64), after[:, :coupled].astype(np.float64)
    least_squares = np.linalg.solve(x.T @ x + penalty * len(x) * np.eye(coupled), x.T @ y).T
    left, strength, right = np.linalg.svd(least_squares)
    strength = np.minimum(strength, LONGEST_MEMORY)
    kick = np.linalg.cholesky(np.eye(coupled) - (left * strength**2) @ left.T)
    rest = before[:, coupled:].astype(np.float64), after[:, coupled:].astype(np.float64)
    own = np.clip((rest[0] * rest[1]).sum(0) / ((rest[0] ** 2).sum(0) + 1e-12), -LONGEST_MEMORY, LONGEST_MEMORY)
    fitted = {"propagator": (left * strength) @ right, "kick": kick, "own": own}
    return {name: values.astype(np.float32) for name, values in fitted.items()}


def to_innovations(memory: Mapping[str, Any], states: Array) -> Array:
    """A sequence `[step, component]` -> its first state and then what is new at each step, all of unit variance, on the host."""
    coupled = len(memory["propagator"])
    before, after = states[:-1], states[1:]
    surprise = after[:, :coupled] - before[:, :coupled] @ memory["propagator"].T
    leading = np.linalg.solve(memory["kick"].astype(np.float64), np.asarray(surprise, np.float64).T).T
    others = (after[:, coupled:] - before[:, coupled:] * memory["own"]) / np.sqrt(1 - memory["own"] ** 2)
    return np.concatenate([states[:1], np.concatenate([leading.astype(np.float32), others], 1)])


def from_innovations(memory: Mapping[str, Any], target: Array) -> Array:
    """The inverse of `to_innovations`, `[step, component]`; can be traced."""
    coupled = memory["propagator"].shape[0]
    spread = jnp.sqrt(1 - jnp.square(memory["own"]))

    def step(state: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        leading = memory["propagator"] @ state[:coupled] + memory["kick"] @ new[:coupled]
        state = jnp.concatenate([leading, memory["own"] * state[coupled:] + spread * new[coupled:]])
        return state, state

    first = jnp.asarray(target[0])
    _, later = jax.lax.scan(step, first, jnp.asarray(target[1:]))
    return jnp.concatenate([first[None], later])
