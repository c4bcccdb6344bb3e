"""A Gaussian model of what sensors say over a window of time, given any part of it: factors that all share, and the rest of each.

    a = V z + e,   z_j(t) = B y_j,  y_j ~ N(0, S_j),   e_i ~ N(0, R_i)
with spatial patterns V `[sensor, factor]`, smooth functions of time B `[time, mode]` (leading cosines), covariances S_j of a factor's modes
and R_i of a sensor's rest over time. Given cells of `a`, the factors have a Gaussian posterior by the Woodbury identity (Rasmussen &
Williams 2006, app. A.3), and the rest is drawn by Matheron's rule (Journel & Huijbregts 1978): a draw of the prior, corrected by what it
misses at the given cells. So white noise `(u, epsilon)` becomes a draw that keeps what is given, whatever part that is, and back.

One sample: `a` and masks are `[sensor, time]`. Missing cells carry no information: what stands in them is never looked at.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular, toeplitz

from twinsim.base import Array

NUGGET = 0.02  # of the variance of a sensor's rest: what does not last from one step to the next
FLOOR = 1e-3  # of the largest eigenvalue of a covariance


class Posterior(NamedTuple):
    """What the given cells tell.

    Attributes:
      precision: inverse covariance of the rests at the given cells, 0 elsewhere, `[sensor, time, time]`.
      lower, inverse: Cholesky factor of the posterior precision of the whitened factors, and its inverse, `[factor * mode, factor * mode]`.
      mean: their posterior mean, `[factor * mode]`.
    """

    precision: jax.Array
    lower: jax.Array
    inverse: jax.Array
    mean: jax.Array


def fit(anomaly: np.ndarray, measured: np.ndarray, starts: np.ndarray, window: int, factors: int, modes: int) -> dict[str, np.ndarray]:
    """The model of a record `[time, sensor]` and its mask, over windows that begin at `starts`; covariances depend on lags alone."""
    a = np.where(measured, anomaly, 0.0).astype(np.float64)
    seen = measured.astype(np.float64)
    covariance = (a.T @ a) / np.maximum(seen.T @ seen, 1.0)
    patterns = np.linalg.eigh(covariance)[1][:, ::-1][:, :factors]  # [sensor, factor]
    basis = cosines(window, modes)
    scores = a @ patterns
    rows = starts[:, None] + np.arange(window)
    inside = scores[rows]  # [n, time, factor]
    lagged = np.stack([(inside[:, : window - lag] * inside[:, lag:]).mean((0, 1)) for lag in range(window)])
    roots = [_root(basis.T @ toeplitz(lagged[:, factor]) @ basis) for factor in range(patterns.shape[1])]
    smooth = np.einsum("tb,sb,nsk->ntk", basis, basis, inside)
    rest = (a[rows] - smooth @ patterns.T) * seen[rows]
    there = seen[rows]
    own = [
        (rest[:, : window - lag] * rest[:, lag:]).sum((0, 1)) / np.maximum((there[:, : window - lag] * there[:, lag:]).sum((0, 1)), 1.0)
        for lag in range(window)
    ]
    rests = np.stack([_floored(toeplitz(column)) for column in np.stack(own).T])
    rests = rests + (NUGGET * own[0] + 1e-6)[:, None, None] * np.eye(window)
    rest_root = np.linalg.cholesky(rests)
    whitener = np.stack([solve_triangular(each, np.eye(window), lower=True) for each in rest_root])
    fitted = {
        "patterns": patterns, "basis": basis, "root": np.stack(roots), "rest": rests, "rest_root": rest_root, "rest_whitener": whitener,
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in fitted.items()}


def cosines(window: int, modes: int) -> np.ndarray:
    """The leading functions of the orthonormal cosine transform, `[time, mode]`."""
    step, mode = np.arange(window)[:, None], np.arange(modes)[None]
    return np.cos(np.pi * (step + 0.5) * mode / window) * np.sqrt(np.where(mode == 0, 1.0, 2.0) / window)


def _floored(covariance: np.ndarray) -> np.ndarray:
    power, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(power, FLOOR * max(power.max(), 1e-9))) @ vectors.T


def _root(covariance: np.ndarray) -> np.ndarray:
    power, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(power, FLOOR * max(power.max(), 1e-9)))


# ---------------------------------------------------------------- one sample


def posterior(model: Mapping[str, Any], anomaly: Array, given: Array) -> Posterior:
    """What the `given` cells (1, others 0) of `anomaly` tell of the factors."""
    patterns, basis, root = (jnp.asarray(model[name]) for name in ("patterns", "basis", "root"))
    window = basis.shape[0]
    given = jnp.asarray(given)
    pairs = given[:, :, None] * given[:, None, :]
    identity = jnp.broadcast_to(jnp.eye(window), pairs.shape)
    covariance = pairs * model["rest"] + (1.0 - given)[:, :, None] * identity
    _, inverse = jax.vmap(factorised)(covariance)
    precision = pairs * jnp.einsum("isu,isv->iuv", inverse, inverse)
    of_modes = jnp.einsum("tb,itu,uc->ibc", basis, precision, basis)
    information = jnp.einsum("ij,ik,ibc->jbkc", patterns, patterns, of_modes)
    information = jnp.einsum("jbx,jbkc,kcy->jxky", root, information, root)
    size = root.shape[0] * root.shape[2]
    lower, inverse = factorised(jnp.eye(size) + information.reshape(size, size))
    weighed = jnp.einsum("itu,iu->it", precision, given * anomaly)
    told = jnp.einsum("jbx,ij,tb,it->jx", root, patterns, basis, weighed).reshape(size)
    return Posterior(precision, lower, inverse, inverse.T @ (inverse @ told))


def factorised(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cholesky factor of a positive definite matrix, and its inverse, `[n, n]`; column by column.

    Not by LAPACK: its calls inside one compiled program can wait for one another for ever on a CPU of few cores.
    """
    rows = jnp.arange(matrix.shape[0])

    def eliminate(j: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        left, lower, inverse = state
        column = jnp.where(rows >= j, left[:, j] / jnp.sqrt(left[j, j]), 0.0)
        row = inverse[j] / column[j]
        inverse = (inverse - jnp.where(rows > j, column, 0.0)[:, None] * row[None, :]).at[j].set(row)
        return left - column[:, None] * column[None, :], lower.at[:, j].set(column), inverse

    start = (matrix, jnp.zeros_like(matrix), jnp.eye(matrix.shape[0], dtype=matrix.dtype))
    _, lower, inverse = jax.lax.fori_loop(0, matrix.shape[0], eliminate, start)
    return lower, inverse


def common(model: Mapping[str, Any], whitened: Array) -> jax.Array:
    """What whitened factors `[factor * mode]` stand for, `[sensor, time]`."""
    root = jnp.asarray(model["root"])
    modes = jnp.einsum("jbx,jx->jb", root, jnp.reshape(whitened, (root.shape[0], root.shape[2])))
    return jnp.einsum("ij,tb,jb->it", jnp.asarray(model["patterns"]), jnp.asarray(model["basis"]), modes)


def from_noise(model: Mapping[str, Any], told: Posterior, anomaly: Array, given: Array, u: Array, epsilon: Array) -> jax.Array:
    """White noise `u [factor * mode]` and `epsilon [sensor, time]` as a draw of `a`, which is `anomaly` at the given cells."""
    shared = common(model, told.mean + told.inverse.T @ u)
    return shared + _rest(model, told, given * (anomaly - shared), given, epsilon)


def to_noise(model: Mapping[str, Any], told: Posterior, anomaly: Array, measured: Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse of `from_noise` at every measured cell; where nothing was measured, and in what factors and rests leave open, drawn.

    The draw is one of the posterior given all that was measured, so that `(u, epsilon)` is white where the model is right.
    """
    first, second = jax.random.split(key)
    every = posterior(model, anomaly, measured)
    whitened = every.mean + every.inverse.T @ jax.random.normal(first, every.mean.shape)
    rest = _rest(model, every, measured * (anomaly - common(model, whitened)), measured, jax.random.normal(second, anomaly.shape))
    epsilon = jnp.einsum("itu,iu->it", jnp.asarray(model["rest_whitener"]), rest)
    return told.lower.T @ (whitened - told.mean), epsilon


def _rest(model: Mapping[str, Any], told: Posterior, known: Array, given: Array, epsilon: Array) -> jax.Array:
    """A draw of the rests that is `known` at the given cells (Matheron's rule)."""
    prior = jnp.einsum("itu,iu->it", jnp.asarray(model["rest_root"]), epsilon)
    missed = jnp.einsum("itu,iu->it", told.precision, given * (known - prior))
    return prior + jnp.einsum("itu,iu->it", jnp.asarray(model["rest"]), missed)
