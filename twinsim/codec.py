"""From named physical arrays to one normalised array and back: variable transforms, stacked channels, principal components.

Each function is written for one sample, takes its fitted statistics as an argument and works on numpy and JAX arrays alike.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from twinsim.base import Array, BadInput


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
      count: components kept, at most n - 1.

    Returns:
      `channel_scale [channel]`, `weights [*grid]`, `mean [feature]`, `basis [component, feature]` orthonormal,
      `scale [component]` standard deviations, `explained` share of variance.
    """
    samples = len(residuals)
    root = np.sqrt(weights)[..., None]
    channel_scale = np.sqrt((residuals**2 * weights[..., None]).mean(axis=tuple(range(residuals.ndim - 1)))) + 1e-12
    features = (residuals / channel_scale * root).reshape(samples, -1).astype(np.float32)
    mean = features.mean(0)
    # The eigenvectors of the small Gram matrix [n, n] give the same components as a singular value decomposition, faster.
    centred = features - mean
    power, vectors = np.linalg.eigh((centred @ centred.T).astype(np.float64))
    count = int(min(count, samples - 1, features.shape[1]))
    power, vectors = np.maximum(power[::-1][:count], 1e-12), vectors[:, ::-1][:, :count]
    basis = (vectors / np.sqrt(power)).T.astype(np.float32) @ centred
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
