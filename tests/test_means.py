"""Climatology and regression recover what made the data; predictions of unseen days do not see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domains.climate import means
from twinsim.base import BadInput

RANDOM = np.random.default_rng(11)
DAYS = np.arange(1460) % 365.25


def test_harmonics_recover_a_seasonal_cycle():
    phase = 2 * np.pi * DAYS[:, None, None] / 365.25
    mean, amplitude, second = RANDOM.normal(size=(3, 3, 4))
    truth = 280 + mean + amplitude * np.cos(phase - 0.4) + second * np.sin(2 * phase)
    stat = means.fit_harmonics(truth, DAYS)
    np.testing.assert_allclose(means.harmonics(stat, DAYS), truth, atol=1e-4)  # float32 of 280 K
    one = jax.jit(lambda day: means.harmonics(stat, day))(jnp.float32(DAYS[5]))
    np.testing.assert_allclose(one, truth[5], atol=1e-4)


def test_the_response_to_warming_is_recovered_and_extrapolated():
    offset = RANDOM.choice([-1.0, 0.0, 1.0], len(DAYS))
    pattern, swing = RANDOM.normal(size=(2, 3, 4))
    phase = 2 * np.pi * DAYS[:, None, None] / 365.25
    values = 5 + np.cos(phase) + offset[:, None, None] * (pattern + swing * np.sin(phase))
    stat = means.fit_harmonics(values, DAYS, offset)
    day = 40.0
    expected = 5 + np.cos(2 * np.pi * day / 365.25) + 3.0 * (pattern + swing * np.sin(2 * np.pi * day / 365.25))
    np.testing.assert_allclose(means.harmonics(stat, day, 3.0), expected, atol=1e-4)
    np.testing.assert_allclose(means.harmonics(stat, day), means.harmonics(stat, day, 0.0))


def test_a_forcing_that_never_changes_has_no_response():
    stat = means.fit_harmonics(RANDOM.normal(size=(400, 2)), DAYS[:400], np.ones(400))
    assert (stat["response"] == 0).all()


def test_a_winter_record_gets_a_climatology_that_stays_near_the_data():
    winter = np.flatnonzero((DAYS < 60) | (DAYS > 335))
    values = 10 + RANDOM.normal(size=(len(winter), 5))
    clim = means.harmonics(means.fit_harmonics(values, DAYS[winter]), DAYS[winter])
    assert np.abs(clim - 10).max() < 0.5  # 400 days: four coefficients of about 1/20 each


def test_harmonics_refuse_days_of_another_length():
    with pytest.raises(BadInput, match="one day of year"):
        means.fit_harmonics(np.zeros((5, 2)), np.zeros(4))


def test_ridge_recovers_a_linear_law():
    x = RANDOM.normal(size=(400, 6)) * [1, 10, 0.1, 1, 1, 1] + 270
    a = RANDOM.normal(size=(6, 2, 3)) / np.array([1, 10, 0.1, 1, 1, 1])[:, None, None]
    y = np.tensordot(x - 270, a, axes=1) + 4
    stat, out_of_fold = means.fit_ridge(x, y, penalty=1e-8)
    np.testing.assert_allclose(means.predict_ridge(stat, x), y, atol=2e-3)  # float32 of predictors near 270
    np.testing.assert_allclose(out_of_fold, y, atol=1e-4)
    traced = jax.jit(lambda v: means.predict_ridge(stat, v))(jnp.asarray(x[0], jnp.float32))
    np.testing.assert_allclose(traced, y[0], atol=2e-3)
    np.testing.assert_allclose(means.predict_ridge(stat, jnp.asarray(x[:3], jnp.float32)), y[:3], atol=2e-3)


def test_ridge_is_the_normal_equations_with_a_relative_penalty():
    x, y = RANDOM.normal(size=(50, 4)), RANDOM.normal(size=(50, 3))
    stat, _ = means.fit_ridge(x, y, penalty=0.3)
    z = (x - x.mean(0)) / x.std(0)
    gram = z.T @ z
    expected = np.linalg.solve(gram + 0.3 * np.trace(gram) / 4 * np.eye(4), z.T @ (y - y.mean(0)))
    np.testing.assert_allclose(stat["coefficients"], expected, atol=1e-5)


def test_out_of_fold_predictions_do_not_see_their_day():
    x, y = RANDOM.normal(size=(60, 40)), RANDOM.normal(size=(60, 1))  # nothing to learn, much to remember
    stat, out_of_fold = means.fit_ridge(x, y, penalty=1e-6, folds=5)
    assert np.corrcoef(means.predict_ridge(stat, x)[:, 0], y[:, 0])[0, 1] > 0.7
    assert abs(np.corrcoef(out_of_fold[:, 0], y[:, 0])[0, 1]) < 0.4  # 60 days: three standard errors
    changed = y.copy()
    changed[:12] += 100.0  # the first of five folds
    np.testing.assert_array_equal(means.fit_ridge(x, changed, penalty=1e-6, folds=5)[1][:12], out_of_fold[:12])


def test_ridge_refuses_more_folds_than_days():
    with pytest.raises(BadInput, match="folds"):
        means.fit_ridge(np.zeros((3, 1)), np.zeros((3, 1)), 0.1, folds=5)


def test_local_ridge_recovers_a_law_of_neighbouring_cells():
    coarse = RANDOM.normal(size=(500, 2, 3, 4))
    east = np.roll(coarse[:, 1], -1, axis=-1)  # periodic in x: the last column looks at the first
    fine = np.repeat(np.repeat(2 * coarse[:, 0] - east, 2, axis=1), 2, axis=2) + 7.0
    fine = np.stack([fine, -fine], axis=1)  # two variables
    stat, out_of_fold = means.fit_local_ridge(coarse, fine, penalty=1e-7)
    np.testing.assert_allclose(out_of_fold, fine, atol=1e-3)
    np.testing.assert_allclose(means.predict_local_ridge(stat, coarse), fine, atol=1e-3)
    traced = jax.jit(lambda v: means.predict_local_ridge(stat, v))(jnp.asarray(coarse[3], jnp.float32))
    np.testing.assert_allclose(traced, fine[3], atol=1e-3)


def test_local_ridge_of_one_cell_is_the_ridge():
    coarse, fine = RANDOM.normal(size=(80, 1, 1, 1)), RANDOM.normal(size=(80, 2, 2))
    _, local = means.fit_local_ridge(coarse, fine, 0.1, periodic=(False, False))
    # the same predictor nine times: the penalty, relative to the mean diagonal, counts a ninth
    _, plain = means.fit_ridge(coarse.reshape(80, 1), fine, 0.1 / 9)
    np.testing.assert_allclose(local, plain, atol=1e-5)


# ---------------------------------------------------------------- normal scores, spread and response


def test_normal_scores_of_training_values_are_gaussian_and_come_back():
    rain = np.maximum(np.random.default_rng(0).gamma(0.5, 4.0, (2000, 2, 3)) - 1.0, 0.0).astype(np.float32)
    stat = means.fit_scores(rain)
    scores = means.to_scores(stat, rain)
    assert abs(scores.mean()) < 0.04 and abs(scores.std() - 1) < 0.04  # the dry share is known to half a node, an eighth of a deviation
    wet = (rain > 0) & (scores < means.SCORE_ENDS[1])
    back = np.stack([np.asarray(means.from_scores(stat, s)) for s in scores])
    # Linear between nodes an eighth of a deviation apart: a small share of the value.
    assert np.abs(back - rain)[wet].max() < 0.05 * rain.max()
    assert (back[rain == 0] == 0).mean() > 0.97  # the node above the last dry one already rains


def test_normal_scores_go_on_beyond_both_ends_with_the_last_slopes():
    stat = {"quantiles": np.linspace(1.0, 5.0, 51, dtype=np.float32)[:, None, None] ** 2}
    lower, low, high, higher = (float(means.from_scores(stat, np.full((1, 1), s, np.float32))[0, 0]) for s in (-4.0, -3.0, 3.25, 4.25))
    assert low == pytest.approx(1.0) and lower == pytest.approx(1 - 8 * (1.08**2 - 1), abs=1e-4)
    assert high == pytest.approx(25.0) and higher == pytest.approx(25 + 8 * (25 - 4.92**2), abs=1e-3)


def test_season_spread_finds_a_known_annual_cycle_of_the_variance():
    days = np.arange(3650) % 365.25
    true = np.sqrt(1 + 0.6 * np.cos(2 * np.pi * days / means.YEAR))
    residual = (true * np.random.default_rng(0).standard_normal(3650))[:, None, None].astype(np.float32)
    found = means.season_spread(means.fit_season_spread(residual, days), days)[:, 0, 0]
    np.testing.assert_allclose(found, true, atol=0.1)  # a variance from 3650 values has an error of 2.3 % per degree of freedom


def test_spread_grows_with_forcing_as_it_was_made_to():
    extra = np.repeat([-1.0, 0.0, 1.0], 2000)
    residual = (np.exp(0.1 * extra)[:, None, None] * np.random.default_rng(0).standard_normal((6000, 3, 3))).astype(np.float32)
    assert means.fit_spread(residual, extra, np.ones((3, 3))) == pytest.approx(0.1, abs=0.01)
    assert means.fit_spread(residual, np.zeros(6000), np.ones((3, 3))) == 0


def test_a_response_pattern_of_pure_noise_is_shrunk_to_its_mean_and_a_true_one_kept():
    random, weights = np.random.default_rng(0), np.ones((20, 20))
    pattern = random.standard_normal((1, 20, 20))
    kept = means.shrink_pattern(pattern, pattern, pattern, weights)
    np.testing.assert_allclose(kept, pattern, atol=1e-12)
    noise = [2.0 + random.standard_normal((1, 20, 20)) for _ in range(2)]
    shrunk = means.shrink_pattern(np.mean(noise, 0), *noise, weights)
    assert shrunk.mean() == pytest.approx(np.mean(noise)) and shrunk.std() < 0.2 * np.mean(noise, 0).std()


def test_relative_response_is_linear_in_the_mean_and_bounded():
    extra = np.repeat([-1.0, 0.0, 1.0], 400)
    values = (4.0 * (1 + 0.1 * extra))[:, None, None] * np.ones((1200, 4, 4))
    stat = means.fit_relative_response(values, np.tile(np.arange(400.0) % 365, 3), extra, np.ones((4, 4)))
    np.testing.assert_allclose(means.relative_response(stat, np.array([0.0, 2.0]))[:, 0, 0], [1.0, 1.2], atol=0.01)  # 5 % for the floor
    assert means.relative_response(stat, np.float32(1000.0)).max() == 5.0


def test_spread_of_the_expected_value_is_the_one_it_was_made_with():
    random = np.random.default_rng(0)
    expected = random.gamma(1.0, 2.0, (300, 8, 8)).astype(np.float32)
    residual = (0.1 + 0.5 * expected) * random.normal(size=expected.shape)
    stat = means.fit_spread_of_expected(residual, expected)
    at = np.array([0.5, 2.0, 5.0], np.float32)
    found = np.asarray(means.spread_of_expected(stat, at)) * np.sqrt(np.mean(residual**2))
    np.testing.assert_allclose(found, 0.1 + 0.5 * at, rtol=0.1)
    evened = residual / np.asarray(means.spread_of_expected(stat, expected))
    np.testing.assert_allclose(np.mean(evened**2), np.mean(residual**2), rtol=0.1)


def test_spread_where_most_is_expected_to_be_nothing():
    expected = np.zeros((50, 4, 4), np.float32)
    expected[:, 0] = np.arange(50)[:, None]
    stat = means.fit_spread_of_expected(expected * 0.5, expected)
    assert (np.diff(stat["node"]) > 0).all() and np.isfinite(means.spread_of_expected(stat, expected)).all()
