"""Diffusion: learns to remove noise from targets, and draws new ones by removing it from pure noise, step by step.

Everything speaks of one *denoiser*, `denoiser(x, sigma) -> x0`: the expected target given `x = target + sigma * noise`.
The two processes, EDM and rectified flow, differ only in how the network's output becomes that estimate.

Sources: Karras et al. (2022), "Elucidating the design space of diffusion-based generative models" (EDM);
Liu et al. (2022), "Flow straight and fast" (rectified flow); Lu et al. (2022), "DPM-Solver++".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from generators.guidance import Denoiser, classifier_free, guide
from twinsim.base import Array as AnyArray
from twinsim.base import BadInput, Constraint, Example, Spec, Target
from twinsim.mesh import RULES

# ---------------------------------------------------------------- the generator


class Diffusion(nnx.Module):
    """A generator that denoises.

    Attributes:
      spec: the shape of an example.
      net: the backbone.
      process: "edm" or "flow".
      objective: what training minimises.
      sampler: how a draw is made.
      condition_dropout: share of training examples whose fields and scalars are hidden, for classifier-free guidance.
      precision, remat: of the backbone, in place of its own; parameters, preconditioning and loss stay float32.
      rules: how the backbone is split over devices; those of the engine where it has none of its own.
    """

    def __init__(
        self,
        spec: Spec,
        net: Callable[..., nnx.Module],
        process: str = "edm",
        objective: "Objective | None" = None,
        sampler: "Sampler | None" = None,
        condition_dropout: float = 0.0,
        *,
        rngs: nnx.Rngs,
        precision: str | None = None,
        remat: bool | None = None,
    ):
        sampler = Sampler() if sampler is None else sampler
        if process not in PROCESSES:
            raise BadInput(f"diffusion: process must be one of {sorted(PROCESSES)}, got {process!r}")
        if not 0.0 <= condition_dropout < 1.0:
            raise BadInput(f"diffusion: condition_dropout must lie in [0, 1), got {condition_dropout}")
        if sampler.guidance_scale != 1.0 and condition_dropout == 0.0:
            raise BadInput(f"diffusion: guidance_scale={sampler.guidance_scale} needs a model trained with condition_dropout > 0")
        self.spec, self.process, self.sampler, self.condition_dropout = spec, process, sampler, condition_dropout
        self.objective = DEFAULT_OBJECTIVES[process] if objective is None else objective
        # With condition dropout the net reads one scalar more: 1 where the condition is hidden.
        seen = spec._replace(scalars=spec.scalars + 1) if condition_dropout else spec
        computing = {name: value for name, value in {"dtype": precision, "remat": remat}.items() if value is not None}
        self.net = net(spec=seen, rngs=rngs, **computing)
        self.rules = getattr(self.net, "rules", RULES)

    def loss(self, example: Example, key: Array) -> Array:
        """The objective for one example."""
        drop_key, net_key, objective_key = jax.random.split(key, 3)
        hidden = jax.random.bernoulli(drop_key, self.condition_dropout)
        denoiser = self.denoiser(example.fields, example.scalars, hidden, net_key)
        return self.objective(denoiser, PROCESSES[self.process], example.target, objective_key)

    def sample(self, fields: AnyArray, scalars: AnyArray, key: Array, constraints: Sequence[Constraint] = ()) -> Array:
        """One draw, under `constraints` applied in their order."""
        denoiser = self.denoiser(fields, scalars)
        if self.sampler.guidance_scale != 1.0:
            denoiser = classifier_free(denoiser, self.denoiser(fields, scalars, hidden=True), self.sampler.guidance_scale)
        return self.sampler(guide(denoiser, constraints), (*self.spec.grid, self.spec.channels), key)

    def denoiser(self, fields: AnyArray, scalars: AnyArray, hidden: Array | bool = False, key: Array | None = None) -> Denoiser:
        """The expected target given a noisy one and a condition; `hidden` conditions are left out, a `key` drops activations."""
        if self.condition_dropout:
            fields, scalars = (jnp.where(hidden, jnp.zeros_like(a), a) for a in (fields, scalars))
            scalars = jnp.concatenate([scalars, jnp.asarray(hidden, scalars.dtype)[None]])

        def denoise(x: Array, sigma: Array) -> Array:
            c = PROCESSES[self.process](sigma)
            return c.skip * x + c.out * self.net(c.inward * x, c.noise, fields, scalars, key)

        return denoise


# ---------------------------------------------------------------- processes


class Preconditioning(NamedTuple):
    """Scalars that turn the network F into a denoiser: `D(x, sigma) = skip * x + out * F(inward * x, noise)`."""

    skip: Array
    out: Array
    inward: Array
    noise: Array


Process = Callable[[Array], Preconditioning]


def edm(sigma: Array) -> Preconditioning:
    """Variance exploding, with unit-variance inputs and outputs of the network (Karras et al. 2022, Table 1, sigma_data = 1)."""
    sigma = jnp.asarray(sigma)
    total = 1 + jnp.square(sigma)
    return Preconditioning(1 / total, sigma * lax.rsqrt(total), lax.rsqrt(total), jnp.log(sigma) / 4)


def flow(sigma: Array) -> Preconditioning:
    """Rectified flow (Liu et al. 2022): the network is the velocity `noise - target` at `z = (1 - t) target + t noise`.

    With `t = sigma / (1 + sigma)` the path's `z` is `x / (1 + sigma)`, exactly, and the target is `z - t * velocity`.
    """
    sigma = jnp.asarray(sigma)
    t = sigma / (1 + sigma)
    return Preconditioning(1 - t, -t, 1 - t, t)


PROCESSES: dict[str, Process] = {"edm": edm, "flow": flow}


# ---------------------------------------------------------------- objectives


class Objective(Protocol):
    """What training minimises, for one target; hashable."""

    def __call__(self, denoiser: Denoiser, process: Process, target: Target, key: Array) -> Array: ...


@dataclass(frozen=True)
class Denoising:
    """Mean square error of the denoised target at a random noise level.

    The level is log-normal, `log sigma ~ N(log_mean, log_std^2)`, which for the flow is a logit-normal `t`. The weight
    `1 / out^2` makes the loss the plain square error of the network's own output: Karras et al. (2022) Table 1 for EDM,
    Liu et al. (2022) eq. 1 for the flow.
    """

    log_mean: float = -1.2
    log_std: float = 1.2

    def __call__(self, denoiser: Denoiser, process: Process, target: Target, key: Array) -> Array:
        level_key, noise_key = jax.random.split(key)
        sigma = jnp.exp(self.log_mean + self.log_std * jax.random.normal(level_key))
        x = sigma * jax.random.normal(noise_key, target.shape) + target
        return jnp.mean(jnp.square((denoiser(x, sigma) - target) / process(sigma).out))


# Noise levels of Karras et al. (2022), Table 1, and of Esser et al. (2024), section 3.1.
DEFAULT_OBJECTIVES: dict[str, Objective] = {"edm": Denoising(-1.2, 1.2), "flow": Denoising(0.0, 1.0)}


# ---------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Sampler:
    """How a draw is made.

    Attributes:
      name: two evaluations a step: "midpoint" and "angle" (exact for white unit-variance targets), "heun", "dpmpp_2s";
        one: "euler", "dpmpp" (DPM-Solver++ 2M). On Gaussians of standard deviation 0.1 to 10, ten steps of midpoint err by
        at most 4 % in the spread of the draws; eighteen of heun (the default of Karras et al.) widen it by 1 to 9 %.
      steps: noise levels; the last step goes from `sigma_min` to the denoised target.
      sigma_min, sigma_max: lowest and highest level; the highest should exceed by far the standard deviation of the target's
        strongest pattern (the root of its largest covariance eigenvalue).
      schedule: "tangent" or "karras"; None is the one that suits the name. `rho` is its exponent, None its usual one.
      churn: noise put back before each step, `S_churn` of Karras et al. (2022) Algorithm 2; 0 solves the deterministic ODE.
      churn_min, churn_max: noise levels between which noise is put back.
      churn_scale: standard deviation of that noise, `S_noise`.
      guidance_scale: weight of the condition, 1 = as trained (classifier-free guidance).
    """

    name: str = "midpoint"
    steps: int = 12
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    schedule: str | None = None
    rho: float | None = None
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = np.inf
    churn_scale: float = 1.0
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in STEPS:
            raise BadInput(f"sampler: name must be one of {sorted(STEPS)}, got {self.name!r}")
        if self.steps < 1 or not 0 < self.sigma_min < self.sigma_max:
            raise BadInput(
                f"sampler: expected steps >= 1 and 0 < sigma_min < sigma_max, got {self.steps}, {self.sigma_min}, {self.sigma_max}"
            )
        if self.schedule is not None and self.schedule not in SCHEDULES:
            raise BadInput(f"sampler: schedule must be one of {sorted(SCHEDULES)}, got {self.schedule!r}")
        if self.churn > 0 and self.name == "dpmpp":
            raise BadInput("sampler: dpmpp remembers its last step, which churn makes worthless; use dpmpp_2s or heun with churn")

    def __call__(self, denoiser: Denoiser, shape: tuple[int, ...], key: Array) -> Array:
        """One draw: pure noise, denoised."""
        start_key, churn_key = jax.random.split(key)
        sigmas = self.levels()
        x = sigmas[0] * jax.random.normal(start_key, shape)
        gammas = churn_schedule(sigmas, self.churn, self.churn_min, self.churn_max)
        x = solve(STEPS[self.name], denoiser, x, sigmas, churn_key, gammas, self.churn_scale)
        return denoiser(x, jnp.asarray(sigmas[-1]))  # = an Euler step to sigma 0

    def levels(self) -> np.ndarray:
        """Falling noise levels, `[steps]`."""
        schedule, rho = SCHEDULES[self.schedule or ("tangent" if self.name == "midpoint" else "karras")]
        return schedule(self.steps, self.sigma_min, self.sigma_max, rho if self.rho is None else self.rho)


def karras_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> np.ndarray:
    """Falling noise levels, `[steps]` (Karras et al. 2022, eq. 5, without its last, 0)."""
    ramp = np.linspace(0.0, 1.0, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return ((high + ramp * (low - high)) ** rho).astype(np.float32)


def tangent_schedule(steps: int, sigma_min: float, sigma_max: float, rho: float = 2.0) -> np.ndarray:
    """Falling noise levels, `[steps]`: `tan(u)^rho` at even steps of `u`, densest where noise and target are of one size.

    Chosen by the exact error on Gaussians of standard deviation 0.03 to 20, see `test_few_midpoint_steps_keep_the_spread`.
    """
    high, low = (np.arctan(sigma ** (1 / rho)) for sigma in (sigma_max, sigma_min))
    return (np.tan(np.linspace(high, low, steps)) ** rho).astype(np.float32)


SCHEDULES: dict[str, tuple[Callable[..., np.ndarray], float]] = {"karras": (karras_schedule, 7.0), "tangent": (tangent_schedule, 2.0)}


def churn_schedule(sigmas: np.ndarray, churn: float, low: float = 0.0, high: float = np.inf) -> np.ndarray:
    """The relative rise of the noise level before each step, `[step]` (Karras et al. 2022, Algorithm 2)."""
    start = sigmas[:-1]
    return np.where((start >= low) & (start <= high), min(churn / len(sigmas), np.sqrt(2) - 1), 0.0).astype(np.float32)


class Past(NamedTuple):
    """What a multistep solver remembers: the last estimate and its noise level."""

    x0: Array
    sigma: Array


Step = Callable[[Denoiser, Array, Array, Array, Past], tuple[Array, Past]]


def solve(
    step: Step,
    denoiser: Denoiser,
    x: Array,
    sigmas: Array | np.ndarray,
    key: Array | None = None,
    gammas: np.ndarray | None = None,
    noise_scale: float = 1.0,
) -> Array:
    """`x` carried from `sigmas[0]` to `sigmas[-1]`, all positive and falling, by one `step` between neighbours.

    Solves `dx/dsigma = (x - denoiser(x, sigma)) / sigma` (Karras et al. 2022, eq. 3); with `gammas`, `[step]`, noise is put
    back before each step, which solves the stochastic equation.
    """
    stochastic = gammas is not None and bool(np.any(gammas > 0))
    if stochastic and key is None:
        raise BadInput("sampler: churn needs a random key, got none")

    def advance(carry: tuple[Array, Past], inputs: tuple[Array, ...]) -> tuple[tuple[Array, Past], None]:
        x, past = carry
        index, start, stop, rise = inputs
        if stochastic and key is not None:
            lifted = start * (1 + rise)
            extra = noise_scale * start * jnp.sqrt(rise * (2 + rise))  # = sqrt(lifted^2 - start^2), which rounding can take below 0
            x, start = x + extra * jax.random.normal(jax.random.fold_in(key, index), x.shape), lifted
        return step(denoiser, x, start, stop, past), None

    levels = jnp.asarray(sigmas, x.dtype)
    rises = jnp.zeros_like(levels[1:]) if gammas is None else jnp.asarray(gammas, x.dtype)
    past = Past(jnp.zeros_like(x), jnp.full_like(levels[0], jnp.inf))
    (x, _), _ = lax.scan(advance, (x, past), (jnp.arange(len(levels) - 1), levels[:-1], levels[1:], rises))
    return x


def euler(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """First order: straight on, which in every parametrisation of time is the same step (DDIM)."""
    x0 = denoiser(x, start)
    return blend(x, x0, stop / start), Past(x0, start)


def heun(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """Second order, the mean of the slopes at both ends (Karras et al. 2022, Algorithm 1)."""
    x0 = denoiser(x, start)
    slope = (x - x0) / start
    end = x + (stop - start) * slope
    slope_end = (end - denoiser(end, stop)) / stop
    return x + (stop - start) * (slope + slope_end) / 2, Past(x0, start)


def midpoint(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """Second order in the angle `t = atan(sigma)`, by the slope half way (see `turning`)."""
    t, t_stop = jnp.arctan(start), jnp.arctan(stop)
    t_half = (t + t_stop) / 2
    z = x * jnp.cos(t)
    slope, x0 = turning(denoiser, z, t)
    slope, _ = turning(denoiser, z + (t_half - t) * slope, t_half)
    return (z + (t_stop - t) * slope) / jnp.cos(t_stop), Past(x0, start)


def angle(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """Second order in the angle `t = atan(sigma)`, by the mean of the slopes at both ends (see `turning`)."""
    t, t_stop = jnp.arctan(start), jnp.arctan(stop)
    z = x * jnp.cos(t)
    slope, x0 = turning(denoiser, z, t)
    slope_end, _ = turning(denoiser, z + (t_stop - t) * slope, t_stop)
    return (z + (t_stop - t) * (slope + slope_end) / 2) / jnp.cos(t_stop), Past(x0, start)


def turning(denoiser: Denoiser, z: Array, t: Array) -> tuple[Array, Array]:
    """`dz/dt` of `z = x cos(t)`, `t = atan(sigma)`, and the estimate (Salimans & Ho 2022, app. D; TrigFlow, Lu & Song 2024).

    `z` keeps the variance 1 of the target, and for EDM the slope is the network's own output up to its sign: for white noise of
    unit variance it is 0, and what a solver integrates is only how the target differs from that.
    """
    x0 = denoiser(z / jnp.cos(t), jnp.tan(t))
    return (z * jnp.cos(t) - x0) / jnp.sin(t), x0


def dpmpp(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """Second order from the last two estimates, DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2); the first step is Euler's."""
    x0 = denoiser(x, start)
    ratio = jnp.log(start / stop) / (2 * jnp.log(past.sigma / start))  # 1 / (2 r); 0 where nothing is past, as log(inf) = inf
    return blend(x, x0 + ratio * (x0 - past.x0), stop / start), Past(x0, start)


def dpmpp_2s(denoiser: Denoiser, x: Array, start: Array, stop: Array, past: Past) -> tuple[Array, Past]:
    """Second order from the geometric midpoint, DPM-Solver++(2S) with r = 1/2 (Lu et al. 2022, Algorithm 1)."""
    x0 = denoiser(x, start)
    middle = jnp.sqrt(start * stop)
    return blend(x, denoiser(blend(x, x0, middle / start), middle), stop / start), Past(x0, start)


def blend(x: Array, x0: Array, share: Array) -> Array:
    """What is left of `x` when its noise shrinks to `share` around the estimate `x0`."""
    return share * x + (1 - share) * x0


STEPS: dict[str, Step] = {"euler": euler, "heun": heun, "midpoint": midpoint, "angle": angle, "dpmpp": dpmpp, "dpmpp_2s": dpmpp_2s}
