"""Guidance: functions denoiser -> denoiser that bend a draw towards what is asked; they stack.

By Tweedie's formula the posterior of the target given its noisy version `x` has mean `D(x)` and covariance
`V = sigma^2 dD/dx`. Where that posterior is Gaussian (always, for a Gaussian prior), adding
`sigma^2 * grad_x log p(what is asked | x)` to `D` gives the posterior mean under what is asked, exactly.

Sources: Ho & Salimans (2022), classifier-free guidance; Boys et al. (2023), "Tweedie moment projected diffusions";
Song et al. (2023), "Pseudoinverse-guided diffusion models" (PiGDM).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.scipy.sparse.linalg import cg
from jax.scipy.stats import norm

from twinsim.base import BadInput, Bounds, Constraint, Exceedance, Observation

Denoiser = Callable[[Array, Array], Array]  # (x, sigma) -> x0
Transform = Callable[[Denoiser], Denoiser]

EXACT_LIMIT = 64  # observations beyond which a gradient each costs too much and the covariance is taken as isotropic


def guide(denoiser: Denoiser, constraints: Sequence[Constraint]) -> Denoiser:
    """`denoiser` under each constraint, in their order: a later one acts on what the earlier ones left."""
    for constraint in constraints:
        match constraint:
            case Observation():
                denoiser = observe(constraint)(denoiser)
            case Exceedance():
                denoiser = exceed(constraint)(denoiser)
            case Bounds():
                denoiser = bound(constraint)(denoiser)
            case _:
                raise BadInput(f"constraint: expected an Observation, Exceedance or Bounds, got {type(constraint).__name__}")
    return denoiser


def classifier_free(conditional: Denoiser, unconditional: Denoiser, scale: float) -> Denoiser:
    """The conditional estimate, moved away from the unconditional one `scale` times as far (Ho & Salimans 2022, eq. 6)."""

    def denoise(x: Array, sigma: Array) -> Array:
        base = unconditional(x, sigma)
        return base + scale * (conditional(x, sigma) - base)

    return denoise


def observe(observation: Observation, covariance: Literal["exact", "isotropic"] | None = None) -> Transform:
    """Draws agree with an observation within its error.

    Args:
      covariance: of the target given its noisy version. "exact" is Tweedie's second moment (Boys et al. 2023), one gradient
        through the network an observation. "isotropic" is `sigma^2 / (1 + sigma^2)` (Song et al. 2023), one gradient in all.
        None: exact up to 64 observations.
    """
    value, noise_std = jnp.atleast_1d(jnp.asarray(observation.value)), jnp.asarray(observation.noise_std)
    if value.ndim != 1 or noise_std.ndim > 1:
        raise BadInput(f"observation: expected value and noise_std [m], got shapes {value.shape} and {noise_std.shape}")
    variance = jnp.square(jnp.broadcast_to(noise_std, value.shape))
    if covariance is None:
        covariance = "exact" if value.size <= EXACT_LIMIT else "isotropic"
    if covariance not in ("exact", "isotropic"):
        raise BadInput(f"observation: covariance must be 'exact' or 'isotropic', got {covariance!r}")

    def operator(x0: Array) -> Array:
        return jnp.reshape(observation.operator(x0), value.shape)

    def exact(denoiser: Denoiser) -> Denoiser:
        def denoise(x: Array, sigma: Array) -> Array:
            x0, pull = jax.vjp(lambda x: denoiser(x, sigma), x)
            y, pull_operator = jax.vjp(operator, x0)
            rows = jax.vmap(lambda row: pull(pull_operator(row)[0])[0])(jnp.eye(value.size, dtype=y.dtype))  # A J, [m, *grid, channel]
            rows = jnp.square(sigma) * lax.stop_gradient(rows)  # A V
            spread = jax.vmap(lambda row: jax.jvp(operator, (x0,), (row,))[1])(rows)  # A V A^T
            weights = gain(lax.stop_gradient(spread), variance) @ (value - y)
            return x0 + jnp.tensordot(weights, rows, 1)

        return denoise

    def isotropic(denoiser: Denoiser) -> Denoiser:
        def denoise(x: Array, sigma: Array) -> Array:
            x0, pull = jax.vjp(lambda x: denoiser(x, sigma), x)
            y, pull_operator = jax.vjp(operator, x0)
            prior = jnp.square(sigma) / (1 + jnp.square(sigma))
            error = jnp.maximum(variance, 1e-6 * prior)

            def covariance_times(w: Array) -> Array:  # (r^2 A A^T + R) w
                return prior * jax.jvp(operator, (x0,), (pull_operator(w)[0],))[1] + error * w

            weights, _ = cg(covariance_times, value - y, tol=1e-4, maxiter=50)
            return x0 + jnp.square(sigma) * pull(pull_operator(weights)[0])[0]

        return denoise

    return exact if covariance == "exact" else isotropic


def exceed(exceedance: Exceedance) -> Transform:
    """Draws whose functional reaches a threshold, however far in the tail; in proportion to their probability."""

    def transform(denoiser: Denoiser) -> Denoiser:
        def denoise(x: Array, sigma: Array) -> Array:
            x0, pull = jax.vjp(lambda x: denoiser(x, sigma), x)
            value, pull_functional = jax.vjp(lambda x0: jnp.reshape(exceedance.functional(x0), ()), x0)
            slope = pull_functional(jnp.ones_like(value))[0]
            direction = jnp.square(sigma) * lax.stop_gradient(pull(slope)[0])  # V times the functional's gradient
            variance = lax.stop_gradient(jnp.sum(slope * direction))
            known = variance > 0  # a network's Jacobian may fail to be positive; then nothing is known, and nothing is moved
            s = jnp.sqrt(jnp.where(known, variance, 1.0))
            push = hazard((value - exceedance.threshold) / s) / s
            return x0 + jnp.where(known, push, 0.0) * direction

        return denoise

    return transform


def bound(bounds: Bounds) -> Transform:
    """Every value of the estimate is clipped to the bounds."""

    def transform(denoiser: Denoiser) -> Denoiser:
        def denoise(x: Array, sigma: Array) -> Array:
            x0 = denoiser(x, sigma)
            lower, upper = (jnp.broadcast_to(jnp.asarray(b, x0.dtype), x0.shape) for b in (bounds.lower, bounds.upper))
            return jnp.clip(x0, lower, upper)

        return denoise

    return transform


def gain(spread: Array, error_variance: Array) -> Array:
    """Inverse of `spread + diag(error_variance)`, `[m, m]`, on the directions in which `spread` is positive.

    A network's Jacobian is symmetric and positive only about; a direction with negative variance is left alone.
    """
    values, vectors = jnp.linalg.eigh((spread + spread.T) / 2)
    floor = 1e-6 * jnp.max(jnp.abs(values))
    seen = vectors * (values > floor).astype(vectors.dtype)[None, :]
    total = (vectors * jnp.maximum(values, floor)[None, :]) @ vectors.T + jnp.diag(error_variance)
    inverse = jnp.linalg.inv(total + 1e-30 * jnp.eye(len(values), dtype=total.dtype))
    return seen @ (seen.T @ inverse @ seen) @ seen.T


def hazard(z: Array) -> Array:
    """`phi(z) / Phi(z)`, the slope of `log Phi`; by its asymptotic series where `z < -10` (Abramowitz & Stegun 26.2.12)."""
    far = z < -10.0
    a = jnp.where(far, -z, 10.0)
    near = jnp.where(far, 0.0, z)
    return jnp.where(far, a + 1 / a - 2 / a**3 + 10 / a**5, jnp.exp(norm.logpdf(near) - norm.logcdf(near)))
