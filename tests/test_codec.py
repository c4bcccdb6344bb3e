"""Transforms have inverses, components are orthonormal and make a Gaussian of the training covariance out of noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinsim import codec
from twinsim.base import BadInput

NAMES = ["a", "b"]


def residuals(samples=12, shape=(3, 4), channels=2, seed=0):
    """Correlated residuals of channels with very different units, `[n, *shape, channel]`."""
    draw = np.random.default_rng(seed)
    size = int(np.prod(shape)) * channels
    mixed = draw.normal(size=(samples, size)) @ draw.normal(size=(size, size))
    return (mixed.reshape(samples, *shape, channels) * np.array([1e-3, 1e4])[:channels]).astype(np.float32)


def weights(shape=(3, 4)):
    cosine = np.cos(np.linspace(-1.2, 1.2, shape[0]))[:, None] * np.ones(shape)
    return (cosine / cosine.mean()).astype(np.float32)


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("name", ["identity", "sqrt", "log1p", "log"])
@pytest.mark.parametrize("unit", [1.0, 0.001, 40.0])
@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0.03125, 256, width=32), min_size=1, max_size=5))
def test_inverse_undoes_forward(name, unit, values):
    transform = codec.transform(name, unit)
    physical = np.array(values, np.float32) * np.float32(unit)
    # float32 has 2^-24; a logarithm of up to 9 and its exponential lose another factor of ten
    np.testing.assert_allclose(transform.inverse(transform.forward(physical)), physical, rtol=2e-5)


@pytest.mark.parametrize("name", ["identity", "sqrt", "log1p", "log"])
def test_forward_is_monotone_and_of_order_one_at_the_unit(name):
    x = np.linspace(0.02, 5, 50, dtype=np.float32) * 7
    y = np.asarray(codec.transform(name, 7.0).forward(x))
    assert (np.diff(y) > 0).all()
    assert abs(float(codec.transform(name, 7.0).forward(np.float32(7.0)))) <= 1


@pytest.mark.parametrize("name", ["sqrt", "log1p", "log"])
def test_inverse_is_never_negative(name):
    assert (np.asarray(codec.transform(name).inverse(np.linspace(-30, 3, 100, dtype=np.float32))) >= 0).all()


@pytest.mark.parametrize("name", ["sqrt", "log1p"])
def test_zero_stays_zero(name):
    transform = codec.transform(name, 0.1)
    assert float(transform.inverse(transform.forward(np.float32(0)))) == 0


def test_wrong_transforms_are_named():
    with pytest.raises(BadInput, match="one of identity, sqrt, log1p, log, got 'cbrt'"):
        codec.transform("cbrt")
    with pytest.raises(BadInput, match="positive unit, got 0"):
        codec.transform("sqrt", 0.0)


def test_stack_and_unstack_are_inverse():
    values = {"b": np.arange(6.0).reshape(2, 3), "a": -np.ones((2, 3))}
    stacked = codec.stack(values, NAMES)
    assert stacked.shape == (2, 3, 2)
    back = codec.unstack(stacked, NAMES)
    assert list(back) == NAMES
    for name in NAMES:
        np.testing.assert_array_equal(back[name], values[name])


# ---------------------------------------------------------------- components


def test_basis_is_orthonormal_and_sorted():
    fitted = codec.fit_components(residuals(40), weights(), 10)
    np.testing.assert_allclose(fitted["basis"] @ fitted["basis"].T, np.eye(10), atol=2e-4)  # float32 products of 24 terms
    assert (np.diff(fitted["scale"]) <= 0).all() and 0 < fitted["explained"] <= 1


def test_components_are_those_of_a_singular_value_decomposition():
    samples = residuals(40)
    fitted = codec.fit_components(samples, weights(), 6)
    features = (samples / fitted["channel_scale"] * np.sqrt(weights())[..., None]).reshape(40, -1).astype(np.float64)
    _, singular, right = np.linalg.svd(features - features.mean(0), full_matrices=False)
    np.testing.assert_allclose(fitted["scale"], singular[:6] / np.sqrt(39), rtol=1e-4)
    np.testing.assert_allclose(np.abs((fitted["basis"] * right[:6]).sum(1)), 1, atol=1e-4)  # up to sign
    assert fitted["explained"] == pytest.approx((singular[:6] ** 2).sum() / (singular**2).sum(), rel=1e-5)


def test_projections_of_the_training_data_have_unit_variance_and_no_correlation():
    samples = residuals(40)
    fitted = codec.fit_components(samples, weights(), 8)
    projected = np.asarray(jax.vmap(lambda r: codec.project(fitted, r))(samples))
    assert projected.shape == (40, 8, 1)
    np.testing.assert_allclose(projected.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(projected[..., 0].T), np.eye(8), atol=1e-3)


def test_expand_undoes_project_at_full_rank():
    samples = residuals(12)  # rank 11 < 24 features: the training samples lie in the span
    fitted = codec.fit_components(samples, weights(), 99)
    assert len(fitted["scale"]) == 11
    for sample in samples:
        back = np.asarray(codec.expand(fitted, codec.project(fitted, sample)))
        np.testing.assert_allclose(back / fitted["channel_scale"], sample / fitted["channel_scale"], atol=1e-3)


def test_project_undoes_expand_at_any_rank():
    fitted = codec.fit_components(residuals(40), weights(), 5)
    target = np.random.default_rng(1).normal(size=(5, 1)).astype(np.float32)
    np.testing.assert_allclose(codec.project(fitted, codec.expand(fitted, target)), target, atol=1e-3)


def test_noise_expands_to_the_training_covariance():
    samples = residuals(200)
    fitted = codec.fit_components(samples, weights(), 24)  # full rank: 24 features
    noise = jax.random.normal(jax.random.key(0), (20_000, 24, 1))
    drawn = np.asarray(jax.vmap(lambda z: codec.expand(fitted, z))(noise)) / fitted["channel_scale"]
    wanted = samples / fitted["channel_scale"]
    ours, theirs = (np.cov(each.reshape(len(each), -1).T) for each in (drawn, wanted))
    # a covariance of n draws is off by about sqrt(2/n) of the variances, 1 %; four times that
    assert np.abs(ours - theirs).max() < 0.04 * np.abs(np.diag(theirs)).max()
    np.testing.assert_allclose(drawn.mean(0), wanted.mean(0), atol=0.04 * np.sqrt(np.diag(theirs).max()))


def test_each_variable_counts_alike_whatever_its_units():
    samples = residuals(40)
    rescaled = samples * np.array([273.0, 1e-6], np.float32)
    one, two = (codec.fit_components(each, weights(), 5) for each in (samples, rescaled))
    np.testing.assert_allclose(one["scale"], two["scale"], rtol=1e-3)


def test_expand_is_differentiable_and_linear():
    fitted = codec.fit_components(residuals(40), weights(), 5)
    target = jnp.ones((5, 1))
    gradient = jax.grad(lambda z: codec.expand(fitted, z)[0, 0, 0])(target)
    expected = codec.expand(fitted, target)[0, 0, 0] - codec.expand(fitted, 0 * target)[0, 0, 0]
    np.testing.assert_allclose(gradient.sum(), expected, rtol=1e-3)


# ---------------------------------------------------------------- sequences


def vector_autoregression(steps=20_000):
    """A stationary sequence of four standardised components: two that rotate into one another and two that decay alone."""
    turn = 0.9 * np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
    propagator = np.zeros((4, 4))
    propagator[:2, :2], propagator[2, 2], propagator[3, 3] = turn, 0.6, -0.3
    noise = np.random.default_rng(0).normal(size=(steps, 4)) * np.sqrt(1 - np.array([0.81, 0.81, 0.36, 0.09]))
    states = np.zeros((steps, 4))
    for step in range(1, steps):
        states[step] = propagator @ states[step - 1] + noise[step]
    return propagator, states[100:].astype(np.float32)


def test_memory_is_that_of_a_known_autoregression():
    propagator, states = vector_autoregression()
    memory = codec.fit_memory(states[:-1], states[1:], coupled=3, penalty=0.0)
    np.testing.assert_allclose(memory["propagator"], propagator[:3, :3], atol=0.03)  # 4 standard errors of 20,000 steps
    np.testing.assert_allclose(memory["own"], [-0.3], atol=0.03)
    np.testing.assert_allclose(memory["kick"] @ memory["kick"].T, np.eye(3) - memory["propagator"] @ memory["propagator"].T, atol=1e-5)


def test_innovations_are_white_and_give_the_sequence_back():
    _, states = vector_autoregression()
    memory = codec.fit_memory(states[:-1], states[1:], coupled=2)
    new = codec.to_innovations(memory, states)
    assert np.abs((new[2:, :, None] * new[1:-1, None]).mean(0)).max() < 0.03  # no memory is left
    np.testing.assert_allclose(new[1:].std(0), 1, atol=0.03)
    np.testing.assert_allclose(codec.from_innovations(memory, new[:50]), states[:50], atol=1e-4)


def test_white_noise_becomes_a_sequence_with_unit_variance_at_every_step():
    _, states = vector_autoregression()
    memory = codec.fit_memory(states[:-1], states[1:], coupled=3)
    noise = np.random.default_rng(1).normal(size=(20_000, 7, 4)).astype(np.float32)
    drawn = np.asarray(jax.vmap(lambda each: codec.from_innovations(memory, each))(noise))
    covariance = np.einsum("nti,ntj->tij", drawn, drawn) / len(drawn)
    np.testing.assert_allclose(covariance, np.broadcast_to(np.eye(4), (7, 4, 4)), atol=0.04)
    lagged = np.einsum("ni,nj->ij", drawn[:, 6], drawn[:, 5]) / len(drawn)
    np.testing.assert_allclose(lagged[:3, :3], memory["propagator"], atol=0.04)


def test_a_memory_that_never_forgets_is_shortened():
    states = np.repeat(np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32), 2, axis=0)
    memory = codec.fit_memory(states[::2], states[1::2], coupled=2, penalty=0.0)
    assert np.linalg.norm(memory["propagator"], 2) <= codec.LONGEST_MEMORY + 1e-6 and (np.abs(memory["own"]) <= codec.LONGEST_MEMORY).all()
    assert np.isfinite(codec.to_innovations(memory, states)).all()
