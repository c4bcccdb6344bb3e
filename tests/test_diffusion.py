"""Diffusion against closed forms: the Gaussian's exact denoiser in, its moments out; orders of convergence; a short training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from building import built, rough_jit
from flax import nnx

from generators.diffusion import PROCESSES, STEPS, Denoising, Diffusion, Sampler, karras_schedule, solve, tangent_schedule
from generators.nets import ResidualMLP
from twinsim.base import BadInput, Example, Spec

KEY = jax.random.key(0)
MEAN = jnp.array([1.0, -0.5, 0.0])
VARIANCE = jnp.array([0.25, 1.0, 4.0])


def gaussian(x, sigma):
    """E[x0 | x] for x0 ~ N(MEAN, diag(VARIANCE))."""
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


def draws(sampler: Sampler, denoiser, count: int, shape: tuple[int, ...]):
    return rough_jit(jax.vmap(lambda key: sampler(denoiser, shape, key)))(jax.random.split(KEY, count))


@pytest.mark.parametrize(
    "sampler",
    [
        Sampler("euler", steps=400),
        Sampler("midpoint", steps=16),
        Sampler("heun", steps=64),
        Sampler("dpmpp", steps=64),
        Sampler("dpmpp_2s", steps=64),
        Sampler("heun", steps=64, churn=10.0),
        Sampler("dpmpp_2s", steps=64, churn=10.0),
        Sampler("midpoint", steps=64, churn=10.0),
        Sampler("midpoint", steps=64, churn=10.0, churn_min=0.3, churn_max=50.0),
    ],
    ids=lambda s: f"{s.name}-churn{s.churn:g}-{s.churn_min:g}",
)
def test_samples_of_a_gaussian_have_its_moments(sampler):
    count = 8000
    x = draws(sampler, gaussian, count, (3,))
    # 4 standard errors of the mean and of the covariance, plus 2 % for the finite number of steps.
    assert (jnp.abs(x.mean(0) - MEAN) < (4 / count**0.5 + 0.02) * jnp.sqrt(VARIANCE)).all()
    scale = jnp.sqrt(VARIANCE[:, None] * VARIANCE[None, :])
    assert (jnp.abs(jnp.cov(x.T) - jnp.diag(VARIANCE)) < (4 * (2 / count) ** 0.5 + 0.02) * scale).all()


@pytest.mark.parametrize("name, order", [("euler", 1), ("midpoint", 2), ("angle", 2), ("heun", 2), ("dpmpp", 2), ("dpmpp_2s", 2)])
def test_order_of_convergence(name, order):
    # Along the deterministic path each component shrinks as its standard deviation: x - m ~ sqrt(variance + sigma^2).
    high, low = 8.0, 0.5
    x = jnp.array([7.0, -6.0, 9.0])
    exact = MEAN + jnp.sqrt((VARIANCE + low**2) / (VARIANCE + high**2)) * (x - MEAN)
    counts = np.array([16, 32, 64])
    errors = [float(jnp.linalg.norm(solve(STEPS[name], gaussian, x, karras_schedule(n + 1, low, high)) - exact)) for n in counts]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, (slope, errors)  # the next order of the error still counts at 16 steps


def test_schedule_is_that_of_karras():
    sigmas = karras_schedule(5, 0.002, 80.0)
    third = (80 ** (1 / 7) + 2 / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(sigmas[[0, 2, 4]], [80.0, third, 0.002], rtol=1e-5)
    assert (np.diff(sigmas) < 0).all()


def test_tangent_schedule_is_symmetric_about_one():
    sigmas = tangent_schedule(7, 0.01, 100.0)
    np.testing.assert_allclose(sigmas * sigmas[::-1], 1, rtol=1e-3)
    np.testing.assert_allclose(sigmas[[0, -1]], [100.0, 0.01], rtol=1e-4)


def test_few_midpoint_steps_keep_the_spread():
    # Deterministic solvers are linear maps of a Gaussian's noise, so the spread of the draws is known without drawing.
    spread = jnp.array([0.1, 0.3, 1.0, 3.0, 10.0])

    def denoiser(x, sigma):
        return spread**2 / (spread**2 + sigma**2) * x

    def ratio(sampler):
        levels = sampler.levels()
        return denoiser(solve(STEPS[sampler.name], denoiser, jnp.full(5, levels[0]), levels), levels[-1]) / spread

    assert jnp.abs(ratio(Sampler("midpoint", steps=10)) - 1).max() < 0.04
    assert jnp.abs(ratio(Sampler("midpoint", steps=18)) - 1).max() < 0.01
    assert jnp.abs(ratio(Sampler("midpoint", steps=3, sigma_max=1e4)) - 1)[2] < 1e-3  # exact at unit variance
    assert jnp.abs(ratio(Sampler("heun", steps=18)) - 1).max() > 0.05  # why midpoint is the default


def test_one_euler_step_is_the_denoised_noise():
    x = draws(Sampler("euler", steps=1), gaussian, 2, (3,))
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], (3,)))(jax.random.split(KEY, 2))
    np.testing.assert_allclose(x, jax.vmap(lambda e: gaussian(80 * e, 80.0))(noise), rtol=1e-5)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("sigma", [0.01, 0.5, 2.0, 50.0])
def test_edm_keeps_the_network_at_unit_variance(sigma):
    c = PROCESSES["edm"](sigma)
    assert np.isclose(c.inward**2 * (1 + sigma**2), 1, rtol=1e-5)  # its input
    assert np.isclose(((1 - c.skip) ** 2 + c.skip**2 * sigma**2) / c.out**2, 1, rtol=1e-4)  # its target, (x0 - skip x) / out
    assert np.isclose(1 / c.out**2, (sigma**2 + 1) / sigma**2, rtol=1e-5)  # the weight of Table 1


@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_flow_predicts_the_velocity_of_its_straight_path(t):
    target, noise = jax.random.normal(KEY, (2, 10))
    sigma = t / (1 - t)
    c = PROCESSES["flow"](sigma)
    x = target + sigma * noise
    np.testing.assert_allclose(c.inward * x, (1 - t) * target + t * noise, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose((target - c.skip * x) / c.out, noise - target, rtol=1e-3, atol=1e-4)
    assert np.isclose(c.noise, t)


class ExactVelocity(nnx.Module):
    """E[noise - x0 | z] on the straight path for x0 ~ N(MEAN, diag(VARIANCE))."""

    def __init__(self, spec, rngs):
        pass

    def __call__(self, z, t, fields, scalars, key=None):
        s, n = VARIANCE.reshape(3, 1), jnp.square(t)
        mean = MEAN.reshape(3, 1)
        spread = jnp.square(1 - t) * s + n
        left = z - (1 - t) * mean
        return t / spread * left - (mean + (1 - t) * s / spread * left)


def test_rectified_flow_draws_a_gaussian_from_its_exact_velocity():
    spec = Spec((3,), 1, 0, 0, (False,))
    model = Diffusion(spec, ExactVelocity, "flow", rngs=nnx.Rngs(0))
    empty = jnp.zeros((3, 0)), jnp.zeros(0)
    x = jnp.array([[0.3], [2.0], [-1.0]])
    for sigma in (0.1, 1.0, 20.0):
        np.testing.assert_allclose(model.denoiser(*empty)(x, sigma)[:, 0], gaussian(x[:, 0], sigma), rtol=1e-4, atol=1e-4)
    y = rough_jit(jax.vmap(lambda key: model.sample(*empty, key)))(jax.random.split(KEY, 8000))[..., 0]
    np.testing.assert_allclose(y.mean(0), MEAN, atol=0.13)  # 4 standard errors of the widest component + 2 %
    np.testing.assert_allclose(y.var(0), VARIANCE, rtol=4 * (2 / 8000) ** 0.5 + 0.02)


@pytest.mark.parametrize("process, expected", [("edm", 1.0), ("flow", 2.0)])
def test_loss_of_an_untrained_model(process, expected):
    # The network says 0: EDM's target then has variance 1, the flow's velocity variance 1 + 1.
    spec = Spec((8,), 1, 0, 0, (False,))
    model = built(lambda: Diffusion(spec, partial(ResidualMLP, width=8, depth=1), process, rngs=nnx.Rngs(0)))
    targets = jax.random.normal(KEY, (4000, 8, 1))
    empty = jnp.zeros((8, 0)), jnp.zeros(0)
    losses = rough_jit(jax.vmap(lambda y, key: model.loss(Example(y, *empty), key)))(targets, jax.random.split(KEY, 4000))
    assert abs(losses.mean() / expected - 1) < 0.05  # 32000 squared normals: standard error below 1 %


# ---------------------------------------------------------------- training


def train(model: Diffusion, examples: Example, steps: int):
    graph, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(3e-3)

    def loss(params, batch, keys):
        return jax.vmap(nnx.merge(graph, params).loss)(batch, keys).mean()

    def update(carry, key):
        params, memory = carry
        rows = jax.random.randint(key, (128,), 0, len(examples.target))
        batch = jax.tree.map(lambda a: a[rows], examples)
        value, slope = jax.value_and_grad(loss)(params, batch, jax.random.split(key, 128))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its step count with floats
            change, memory = optimizer.update(slope, memory)
        return (optax.apply_updates(params, change), memory), value

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(update, (p, optimizer.init(p)), jax.random.split(KEY, steps)))(params)
    return nnx.merge(graph, params)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["edm", "flow"])
def test_learns_which_half_of_a_mixture_a_scalar_names(process):
    # Two Gaussians at +-(1, -0.6), standard deviation 0.3; the scalar says which.
    n, spread = 2000, 0.3
    label = jnp.sign(jax.random.normal(jax.random.key(1), (n, 1)))
    centre = jnp.array([1.0, -0.6])
    target = label * centre[None, :] + spread * jax.random.normal(jax.random.key(2), (n, 2))
    spec = Spec((2,), 1, 0, 1, (False,))
    net = partial(ResidualMLP, width=48, depth=2, embedding=32)
    model = built(lambda: Diffusion(spec, net, process, condition_dropout=0.2, sampler=Sampler(steps=10), rngs=nnx.Rngs(0)))
    trained = train(model, Example(target[..., None], jnp.zeros((n, 2, 0)), label), 400)

    keys = jax.random.split(jax.random.key(3), 500)
    fields, up = jnp.zeros((2, 0)), jnp.ones(1)

    def sample(model, **options):
        return rough_jit(jax.vmap(lambda key: model.sample(fields, up, key)))(keys)[..., 0]

    y = sample(trained)
    assert jnp.abs(y.mean(0) - centre).max() < 0.1 < jnp.abs(sample(model).mean(0) - centre).max()
    assert jnp.abs(y.std(0) / spread - 1).max() < 0.25  # a short training: about right, and not collapsed
    hidden = jax.vmap(lambda key: trained.sampler(trained.denoiser(fields, up, hidden=True), (2, 1), key))(keys)[..., 0]
    assert 0.35 < (hidden[:, 0] > 0).mean() < 0.65  # both halves, where the condition is hidden
    x = jax.random.normal(KEY, (2, 1))
    same = [trained.denoiser(fields, s, hidden=True)(x, 1.0) for s in (up, -up)]
    np.testing.assert_array_equal(*same)
    # More guidance pushes the halves apart.
    trained.sampler = Sampler(steps=10, guidance_scale=2.0)
    assert sample(trained)[:, 0].mean() > y[:, 0].mean()


def test_a_key_gives_the_same_draw_alone_and_in_a_batch():
    spec = Spec((4, 4), 1, 0, 0, (True, True))
    model = built(lambda: Diffusion(spec, partial(ResidualMLP, width=8, depth=1), rngs=nnx.Rngs(0)))
    fields, scalars = jnp.zeros((4, 4, 0)), jnp.zeros(0)
    keys = jax.random.split(KEY, 3)

    def sample(key):
        return model.sample(fields, scalars, key)

    many = rough_jit(jax.vmap(sample))(keys)
    np.testing.assert_allclose(rough_jit(sample)(keys[1]), many[1], atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"process": "vp"}, "process must be"),
        ({"condition_dropout": 1.0}, "condition_dropout"),
        ({"sampler": Sampler(guidance_scale=2.0)}, "guidance_scale"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(BadInput, match=words):
        Diffusion(Spec((2,), 1, 0, 0, (False,)), ResidualMLP, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "options",
    [{"name": "rk4"}, {"schedule": "cosine"}, {"steps": 0}, {"sigma_min": 1.0, "sigma_max": 0.5}, {"name": "dpmpp", "churn": 2.0}],
)
def test_wrong_samplers_are_refused(options):
    with pytest.raises(BadInput, match="sampler"):
        Sampler(**options)


def test_the_objective_is_a_part_handed_in():
    def miss(denoiser, process, target, key):
        return jnp.mean(jnp.abs(denoiser(target, 1.0)))

    spec = Spec((2,), 1, 0, 0, (False,))
    model = built(lambda: Diffusion(spec, partial(ResidualMLP, width=8, depth=1), objective=miss, rngs=nnx.Rngs(0)))
    example = Example(jnp.ones((2, 1)), jnp.zeros((2, 0)), jnp.zeros(0))
    assert np.isclose(model.loss(example, KEY), 0.5)  # the zero network leaves skip(1) * target
    assert Denoising() == Denoising(-1.2, 1.2)
