"""Guidance against closed forms: Kalman posteriors, truncated normals, and how constraints stack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from building import rough_jit
from scipy import special, stats

from generators.diffusion import Sampler
from generators.guidance import bound, classifier_free, exceed, gain, guide, hazard, observe
from twinsim.base import BadInput, Bounds, Exceedance, Observation

KEY = jax.random.key(0)
MEAN = np.array([1.0, -0.5, 0.0, 0.3])
ROOT = np.random.default_rng(0).normal(size=(4, 4)) / 2
COVARIANCE = ROOT @ ROOT.T + 0.3 * np.eye(4)
OPERATOR = np.array([[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, -1.0, 0.25]])
VALUE, ERROR = np.array([2.0, -1.5]), np.array([0.2, 0.5])
SIGMAS = [0.02, 0.5, 3.0, 60.0]


def narrow(a):
    return jnp.asarray(a, jnp.float32)


def denoise(x, sigma):
    """E[x0 | x] for x0 ~ N(MEAN, COVARIANCE), on a grid (2, 2) with one channel."""
    weight = jnp.linalg.inv(narrow(COVARIANCE) + sigma**2 * jnp.eye(4))
    return (narrow(MEAN) + narrow(COVARIANCE) @ weight @ (x.ravel() - narrow(MEAN))).reshape(x.shape)


def project(x0):
    return narrow(OPERATOR) @ x0.ravel()


def condition(mean, covariance, operator, value, error):
    """The Kalman update, in float64."""
    k = covariance @ operator.T @ np.linalg.inv(operator @ covariance @ operator.T + np.diag(np.square(error)))
    return mean + k @ (value - operator @ mean), covariance - k @ operator @ covariance


def given_noisy(x, sigma):
    """Mean and covariance of x0 given x = x0 + sigma noise, in float64."""
    return condition(MEAN, COVARIANCE, np.eye(4), np.asarray(x, np.float64).ravel(), np.full(4, sigma))


def draws(denoiser, count, sampler=None):
    sampler = sampler or Sampler(steps=24)
    return rough_jit(jax.vmap(lambda key: sampler(denoiser, (2, 2, 1), key).ravel()))(jax.random.split(KEY, count))


OBSERVATION = Observation(project, VALUE, ERROR)
FUNCTIONAL = np.array([0.25, 0.25, 0.25, 0.25])


def mean_of(x0):
    return jnp.mean(x0)


# ---------------------------------------------------------------- observations


@pytest.mark.parametrize("sigma", SIGMAS)
def test_observed_denoiser_is_the_posterior_mean(sigma):
    x = jax.random.normal(KEY, (2, 2, 1)) * sigma + 0.5
    exact, _ = condition(*given_noisy(x, sigma), OPERATOR, VALUE, ERROR)
    got = observe(OBSERVATION)(denoise)(x, sigma).ravel()
    np.testing.assert_allclose(got, exact, atol=2e-3)  # float32: sigma^2 J loses digits at large sigma


def test_observed_draws_have_the_kalman_posterior():
    count = 6000
    mean, covariance = condition(MEAN, COVARIANCE, OPERATOR, VALUE, ERROR)
    y = draws(observe(OBSERVATION)(denoise), count)
    scale = np.sqrt(np.diag(covariance))
    # 4 standard errors, plus 3 % for the finite number of steps.
    assert (np.abs(y.mean(0) - mean) < (4 / count**0.5 + 0.03) * scale).all()
    assert (np.abs(np.cov(y.T) - covariance) < (4 * (2 / count) ** 0.5 + 0.03) * np.outer(scale, scale)).all()


def test_an_observation_without_error_is_met():
    y = draws(observe(Observation(project, VALUE, np.zeros(2)))(denoise), 20)
    np.testing.assert_allclose(y @ narrow(OPERATOR).T, np.tile(VALUE, (20, 1)), atol=2e-3)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_two_observations_one_after_the_other_are_both(sigma):
    x = jax.random.normal(KEY, (2, 2, 1)) * sigma
    first = Observation(lambda x0: project(x0)[:1], VALUE[:1], ERROR[:1])
    second = Observation(lambda x0: project(x0)[1:], VALUE[1:], ERROR[1:])
    both = observe(OBSERVATION)(denoise)(x, sigma)
    np.testing.assert_allclose(guide(denoise, [first, second])(x, sigma), both, atol=3e-3)  # float32, as above
    np.testing.assert_allclose(guide(denoise, [second, first])(x, sigma), both, atol=3e-3)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_isotropic_is_exact_for_a_white_prior(sigma):
    def white(x, sigma):
        return x / (1 + sigma**2)

    x = jax.random.normal(KEY, (2, 2, 1)) * sigma
    exact, isotropic = (observe(OBSERVATION, covariance)(white)(x, sigma) for covariance in ("exact", "isotropic"))
    np.testing.assert_allclose(isotropic, exact, atol=2e-3)


def test_inpainting_keeps_what_is_seen_and_fills_the_rest():
    # A smooth Gaussian line, every other cell seen; the default takes the covariance as isotropic for this many.
    cells = np.arange(160)
    covariance = np.exp(-np.abs(np.subtract.outer(cells, cells)) / 20.0)
    values, vectors = (narrow(a) for a in np.linalg.eigh(covariance))
    seen = cells[::2]
    truth = np.random.default_rng(1).multivariate_normal(np.zeros(160), covariance)

    def line(x, sigma):
        return (vectors @ (values / (values + sigma**2) * (vectors.T @ x.ravel()))).reshape(x.shape)

    masked = observe(Observation(lambda x0: x0[seen, 0], truth[seen], np.full(80, 0.05)))(line)
    y = rough_jit(jax.vmap(lambda key: Sampler(steps=30)(masked, (160, 1), key)[:, 0]))(jax.random.split(KEY, 60))
    exact, _ = condition(np.zeros(160), covariance, np.eye(160)[seen], truth[seen], np.full(80, 0.05))
    assert np.sqrt(np.mean(np.square(np.asarray(y)[:, seen] - truth[seen]))) < 0.1  # twice the stated error: it is approximate
    assert np.sqrt(np.mean(np.square(np.asarray(y).mean(0) - exact))) < 0.11  # half the standard deviation between two seen cells


# ---------------------------------------------------------------- exceedances


@pytest.mark.parametrize("threshold", [0.5, 4.0])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_exceeding_denoiser_is_the_truncated_mean(sigma, threshold):
    x = jax.random.normal(KEY, (2, 2, 1)) * sigma
    mean, covariance = given_noisy(x, sigma)
    s = np.sqrt(FUNCTIONAL @ covariance @ FUNCTIONAL)
    z = (FUNCTIONAL @ mean - threshold) / s
    exact = mean + covariance @ FUNCTIONAL / s * np.exp(stats.norm.logpdf(z) - special.log_ndtr(z))
    got = exceed(Exceedance(mean_of, threshold))(denoise)(x, sigma).ravel()
    np.testing.assert_allclose(got, exact, atol=3e-3)  # float32: sigma^2 J loses digits at large sigma


@pytest.mark.parametrize("rarity", [1.0, 4.0])
def test_exceeding_draws_have_the_truncated_moments(rarity):
    # Beyond 4 standard deviations: one draw in 30000 would do so unguided.
    count = 4000
    centre, s = FUNCTIONAL @ MEAN, np.sqrt(FUNCTIONAL @ COVARIANCE @ FUNCTIONAL)
    threshold = centre + rarity * s
    y = np.asarray(draws(exceed(Exceedance(mean_of, threshold))(denoise), count, Sampler(steps=40)), np.float64)
    f = y @ FUNCTIONAL
    exact = stats.truncnorm(rarity, np.inf, centre, s)
    assert (f > threshold - 1e-3 * s).all()
    assert abs(f.mean() - exact.mean()) < (4 / count**0.5 + 0.05) * exact.std()
    assert abs(f.std() / exact.std() - 1) < 0.08  # 4 standard errors of a skew distribution, and the steps
    # The rest follows by regression on the functional.
    slope = COVARIANCE @ FUNCTIONAL / s**2
    spread = np.sqrt(np.diag(COVARIANCE))
    assert (np.abs(y.mean(0) - MEAN - slope * (exact.mean() - centre)) < (4 / count**0.5 + 0.02) * spread).all()


@pytest.mark.parametrize("z", [3.0, 0.0, -5.0, -9.99, -10.01, -30.0, -1000.0])
def test_hazard_is_stable_in_the_far_tail(z):
    exact = np.exp(stats.norm.logpdf(z) - special.log_ndtr(z)) if z > -100 else -z - 1 / z
    np.testing.assert_allclose(hazard(jnp.float32(z)), exact, rtol=1e-4)
    assert jnp.isfinite(jax.grad(hazard)(jnp.float32(z)))


def test_a_functional_that_ignores_the_target_changes_nothing():
    x = jax.random.normal(KEY, (2, 2, 1))
    got = exceed(Exceedance(lambda x0: 0.0 * jnp.sum(x0), 1.0))(denoise)(x, 1.0)
    np.testing.assert_array_equal(got, denoise(x, 1.0))


# ---------------------------------------------------------------- the rest


def test_gain_is_the_inverse_where_the_covariance_is_one_and_nothing_elsewhere():
    error = np.array([0.1, 0.2])
    good = np.array([[2.0, 0.5], [0.5, 1.0]])
    np.testing.assert_allclose(gain(narrow(good), narrow(error)), np.linalg.inv(good + np.diag(error)), rtol=1e-4)
    half = gain(narrow([[2.0, 0.0], [0.0, -1.0]]), narrow(error))
    np.testing.assert_allclose(half, [[1 / 2.1, 0], [0, 0]], atol=1e-6)


def test_bounds_clip_and_a_draw_obeys_them():
    y = draws(guide(denoise, [OBSERVATION, Bounds(np.float32(-1.0), np.float32(1.2))]), 50)
    assert y.min() >= -1.0 and y.max() <= 1.2 and (y == jnp.float32(1.2)).any()


def test_bounds_without_reach_leave_the_denoiser_alone():
    x = jax.random.normal(KEY, (2, 2, 1))
    np.testing.assert_array_equal(bound(Bounds(-np.inf, np.inf))(denoise)(x, 1.0), denoise(x, 1.0))


def test_classifier_free_scale():
    x = jnp.ones((2, 2, 1))
    mixed = classifier_free(lambda x, s: 3 * x, lambda x, s: x, 2.0)
    np.testing.assert_allclose(mixed(x, 1.0), 5 * x)


def test_wrong_constraints_are_refused():
    with pytest.raises(BadInput, match="constraint"):
        guide(denoise, ["hot"])
    with pytest.raises(BadInput, match="covariance"):
        observe(OBSERVATION, "diagonal")
    with pytest.raises(BadInput, match="shapes"):
        observe(Observation(project, np.zeros((2, 2)), ERROR))
