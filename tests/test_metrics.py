"""Every score against its closed form, a brute-force sum, or the `scores` library; every attack on a generator that cheats."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import genextreme, norm
from scores.probability import crps_for_ensemble, rank_histogram, tail_tw_crps_for_ensemble

from twinsim import metrics
from twinsim.base import BadInput


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def labelled(ensemble: np.ndarray, truth: np.ndarray) -> tuple[xr.DataArray, xr.DataArray]:
    return xr.DataArray(ensemble, dims=("member", "n", "y", "x")), xr.DataArray(truth, dims=("n", "y", "x"))


# ---------------------------------------------------------------- ensembles


@pytest.mark.parametrize("members", [2, 7])
def test_crps_is_that_of_the_scores_library(members):
    ensemble, truth, lat = normal(members, 9, 4, 5), normal(9, 4, 5, seed=1), np.cos(np.linspace(0, 1, 4))[:, None]
    e, t = labelled(ensemble, truth)
    weights = xr.DataArray(np.broadcast_to(lat, (4, 5)), dims=("y", "x"))
    expected = crps_for_ensemble(e, t, "member", method="fair", preserve_dims="n", weights=weights)
    np.testing.assert_allclose(metrics.crps(ensemble, truth, lat), expected, rtol=1e-10)


def test_tail_crps_is_that_of_the_scores_library():
    ensemble, truth = normal(6, 9, 4, 5), normal(9, 4, 5, seed=1)
    e, t = labelled(ensemble, truth)
    expected = tail_tw_crps_for_ensemble(e, t, "member", 0.8, method="fair", tail="upper", preserve_dims="n")
    np.testing.assert_allclose(metrics.tail_crps(ensemble, truth, 0.8), expected, rtol=1e-10)


def test_crps_of_a_gaussian_is_its_closed_form():
    y, members = 0.7, 4000
    ensemble = norm.ppf((np.arange(members) + 0.5) / members)[:, None, None]
    closed = y * (2 * norm.cdf(y) - 1) + 2 * norm.pdf(y) - 1 / np.sqrt(np.pi)  # Gneiting & Raftery (2007), eq. 21
    assert metrics.crps(ensemble, np.array([[y]]))[0] == pytest.approx(closed, abs=1e-3)  # quantiles in place of draws: O(1 / M)


def test_crps_of_one_member_is_the_absolute_error_and_a_large_mean_costs_no_digits():
    ensemble, truth = normal(1, 5, 3), normal(5, 3, seed=1)
    np.testing.assert_allclose(metrics.crps(ensemble, truth), np.abs(ensemble[0] - truth).mean(1))
    many = normal(6, 5, 3).astype(np.float32)
    raised = metrics.crps(many + np.float32(1024), truth.astype(np.float32) + np.float32(1024))
    np.testing.assert_allclose(raised, metrics.crps(many, truth), atol=1e-4)  # float32 has 1e-4 left at 1024


def test_fair_crps_does_not_depend_on_the_number_of_members():
    truth = normal(20000, 1)
    few, many = (metrics.crps(normal(m, 20000, 1, seed=m), truth).mean() for m in (2, 8))
    assert few == pytest.approx(1 / np.sqrt(np.pi), abs=0.02)  # E|X - Y| / 2; standard error 0.005
    assert many == pytest.approx(few, abs=0.02)


def test_energy_score_is_its_double_sum_and_the_crps_in_one_cell():
    ensemble, truth, w = normal(5, 4, 2, 3), normal(4, 2, 3, seed=1), np.array([[1.0], [3.0]])
    full = np.broadcast_to(w / 2, (2, 3))
    size = lambda v: np.sqrt((v**2 * full).sum((-2, -1)))  # noqa: E731
    pairs = sum(size(ensemble[i] - ensemble[j]) for i in range(5) for j in range(5))
    expected = (size(ensemble - truth).mean(0) - pairs / (2 * 5 * 4)) / np.sqrt(6)
    np.testing.assert_allclose(metrics.energy_score(ensemble, truth, w), expected, rtol=1e-10)
    cell = ensemble[:, :, :1, :1], truth[:, :1, :1]
    np.testing.assert_allclose(metrics.energy_score(*cell), metrics.crps(*cell), atol=1e-12)


@pytest.mark.parametrize(("width", "expected"), [(1.0, 1.0), (0.5, 0.54)])
def test_spread_skill_ratio_is_one_when_truth_is_one_of_the_members(width, expected):
    ensemble, truth = width * normal(10, 4000, 1), normal(4000, 1, seed=1)
    spread, error = metrics.variance(ensemble), metrics.squared_error(ensemble, truth)
    # under-dispersed: sqrt(1.1 * 0.25 / (1 + 0.25 / 10)) = 0.518
    score = metrics.interval([spread, error], metrics.spread_skill_ratio(10), block=1, draws=200)
    assert score.value == pytest.approx(1.0 if width == 1 else 0.518, abs=0.03)
    assert score.low < score.value < score.high


def test_rank_counts_are_flat_for_ties_and_exchangeable_members_and_agree_with_scores():
    assert metrics.rank_deviation(metrics.rank_counts(np.zeros((9, 50, 40)), np.zeros((50, 40))).mean(0)) < 0.1  # 2000 ranks in 10 bins
    ensemble, truth = normal(4, 30, 5, 6), normal(30, 5, 6, seed=1)
    e, t = labelled(ensemble, truth)
    np.testing.assert_allclose(metrics.rank_counts(ensemble, truth).mean(0), rank_histogram(e, t, "member"), atol=1e-12)
    narrow = metrics.rank_counts(0.1 * ensemble, truth).mean(0)
    assert narrow[0] + narrow[-1] > 0.8 and metrics.rank_deviation(narrow) > 0.8


def test_scores_name_the_shape_they_expected():
    with pytest.raises(BadInput, match=r"\[member, 5, 3\], got \[2, 4, 3\]"):
        metrics.crps(np.zeros((2, 4, 3)), np.zeros((5, 3)))
    with pytest.raises(BadInput, match="weights"):
        metrics.crps(np.zeros((2, 5, 3)), np.zeros((5, 3)), np.ones(4))
    with pytest.raises(BadInput, match="2 members"):
        metrics.variance(np.zeros((1, 5, 3)))


# ---------------------------------------------------------------- intervals


def test_interval_of_independent_samples_is_that_of_the_normal_law():
    score = metrics.interval(normal(900), block=1, draws=2000)
    assert score.high - score.low == pytest.approx(2 * 1.96 / 30, rel=0.08)  # 2000 draws: 3 % a quantile


def test_interval_of_dependent_samples_is_wider_in_blocks():
    noise, x = normal(4000), np.zeros(4000)
    for i in range(1, 4000):
        x[i] = 0.8 * x[i - 1] + noise[i]
    single, blocks = (metrics.interval(x, block=b) for b in (1, 40))
    # AR(1): the variance of the mean grows by (1 + 0.8) / (1 - 0.8) = 9
    assert 2.3 < (blocks.high - blocks.low) / (single.high - single.low) < 3.5


def test_interval_is_nan_for_a_short_record_and_paired_series_move_together():
    short = metrics.interval(np.arange(20.0), block=10)
    assert short.value == 9.5 and np.isnan(short.low)
    x = 5 + normal(300)
    paired = metrics.interval([2 * x, x], metrics.ratio, block=5)
    assert paired.low == pytest.approx(2.0) and paired.high == pytest.approx(2.0)
    with pytest.raises(BadInput, match="one common length"):
        metrics.interval([np.zeros(3), np.zeros(4)])


def test_interval_of_a_distance_holds_its_value():
    # log-spectral distances are not linear: any resample of equal spectra lies further apart than all of them do
    x, y = np.random.default_rng(0).exponential(size=(2, 60, 40))
    score = metrics.interval([x, y], lambda a, b: float(np.sqrt(np.mean((10 * np.log10(a / b)) ** 2))), block=1)
    assert 0 <= score.low < score.value < score.high
    low, high = metrics.around(0.1, np.array([0.2, 0.3, 0.7]), 1e9)
    assert low == 0.0 and high == pytest.approx(0.1 + 0.68 - 0.4)
    assert np.isnan(metrics.around(0.1, np.full(3, np.nan), 9)).all() and np.isnan(metrics.around(0.1, np.arange(3.0), 1)).all()


@pytest.mark.parametrize("blocks", [3, 4, 12])
def test_interval_of_few_blocks_holds_the_mean_as_often_as_it_says(blocks):
    # of blocks that differ among themselves alone, a resample by blocks is one of their means
    held = []
    for seed in range(400):
        means = np.random.default_rng(seed).normal(size=blocks)
        drawn = means[np.random.default_rng(seed + 1000).integers(blocks, size=(500, blocks))].mean(1)
        low, high = metrics.around(means.mean(), drawn, blocks)
        held.append(low <= 0 <= high)
    assert 0.92 < np.mean(held) < 0.985  # 95 % of 400: 0.93 to 0.97; without Student's law 0.76, 0.83 and 0.92


# ---------------------------------------------------------------- spectra


def test_radial_spectrum_of_one_cosine_has_one_ring_and_of_white_noise_is_flat():
    wave = np.cos(np.pi * 5 * (np.arange(16) + 0.5) / 16)
    power = metrics.radial_spectrum(np.broadcast_to(wave, (3, 16, 16)))
    assert power.shape == (3, 15)
    assert power[0].argmax() == 4 and np.delete(power[0], 4).max() < 1e-20
    np.testing.assert_allclose(metrics.radial_spectrum(normal(4000, 8, 10)).mean(0), 1.0, atol=0.05)  # at least 4000 * 2 values a ring


def test_zonal_spectrum_finds_its_wave_within_the_band():
    lat, lon = np.linspace(-80, 80, 33), np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = np.where((lat >= 30) & (lat <= 60), 1.0, 7.0)[:, None] * np.cos(5 * lon)
    power = metrics.zonal_spectrum(x[None], lat)
    assert power.shape == (1, 11) and power[0].argmax() == 4
    assert power[0, 4] == pytest.approx(12.0**2)  # (amplitude 1 * 24 / 2)^2
    with pytest.raises(BadInput, match="latitudes"):
        metrics.zonal_spectrum(x[None], lat, (85, 90))


def test_twice_the_power_is_three_decibel():
    p = np.arange(1.0, 9.0)
    assert metrics.log_spectral_distance(2 * p, p) == pytest.approx(10 * np.log10(2))


# ---------------------------------------------------------------- distributions


def test_sliced_wasserstein_of_shifted_scalars_is_the_shift_in_deviations():
    x = normal(500, 1)
    assert metrics.sliced_wasserstein(x, x) == 0
    assert metrics.sliced_wasserstein(x + 2 * x.std(), x) == pytest.approx(2.0, rel=1e-6)


def test_quantile_errors_of_a_shift_and_a_stretch():
    x = normal(1000, 3, 2)
    assert metrics.quantile_error(x + 0.5, x, 0.99) == pytest.approx(0.5)
    assert metrics.quantile_error(3 * x + 0.3, 3 * x, 0.01, relative=True) == pytest.approx(0.1, rel=0.05)
    rain = np.abs(x)
    assert metrics.pooled_quantile_ratio(1.2 * rain, rain, 0.999) == pytest.approx(1.2)


def test_wet_fraction_ratio_counts_cells():
    truth = np.zeros((4, 2, 2))
    truth[:, 0] = 2.0
    generated = np.stack([truth, np.full_like(truth, 2.0)])
    wet = [metrics.exceedance(generated, 1.0), metrics.exceedance(truth[None], 1.0)]
    assert metrics.interval(wet, metrics.ratio, block=1).value == pytest.approx(1.5)


def test_spatial_correlation_error_of_a_markov_row_is_a_power():
    x = normal(20000, 1, 12)
    for j in range(1, 12):
        x[..., j] = 0.7 * x[..., j - 1] + np.sqrt(1 - 0.49) * x[..., j]
    for lag in (1, 3):
        assert metrics.spatial_correlation_error(normal(20000, 1, 12), x, lags=(lag,)).value == pytest.approx(0.7**lag, abs=0.02)


def test_spatial_correlation_error_knows_how_well_it_is_known():
    grid, days = (4, 8), 400
    x, truth = normal(days, *grid), np.cumsum(normal(days, *grid, seed=1), axis=2)
    score = metrics.spatial_correlation_error(x, truth, lags=(3,))

    def apart(v, first, then):  # the mean correlation of cells three apart
        z = (v - v.mean(0)) / v.std(0)
        return (z[first] * z[then]).mean()

    rows, columns = (np.s_[:, :-3], np.s_[:, 3:]), (np.s_[..., :-3], np.s_[..., 3:])
    of = [[apart(v, *pair) for pair in (columns, rows)] for v in (x, truth)]
    assert score.value == pytest.approx(np.abs(np.subtract(*of)).mean(), rel=1e-9)
    # products of two independent cells have variance 1; 8 pairs one way, 20 the other, and the mean of both
    error = np.sqrt((1 / 8 + 1 / 20) / days) / 2
    assert score.low < score.value < score.high
    assert score.high - score.low == pytest.approx(2 * 1.96 * error, rel=0.2)  # 1000 resamples know an end within 5 %


def test_correlation_between_variables_is_compared_cell_by_cell():
    a, b = normal(5000, 2, 2), normal(5000, 2, 2, seed=1)
    tied = 0.6 * a + 0.8 * b
    assert metrics.correlation_error((a, tied), (a, tied)) == 0
    assert metrics.correlation_error((a, b), (a, tied)) == pytest.approx(0.6, abs=0.03)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("shape", [-0.15, 0.2])
def test_gev_parameters_and_return_levels_are_recovered(shape):
    law = genextreme(shape, loc=30.0, scale=4.0)
    maxima = law.rvs(size=(4000, 2), random_state=5)
    location, scale, k = metrics.gev_by_l_moments(maxima)
    np.testing.assert_allclose(location, 30.0, atol=0.3)  # standard error 0.07
    np.testing.assert_allclose(scale, 4.0, atol=0.2)
    np.testing.assert_allclose(k, shape, atol=0.06)  # standard error 0.013, and 0.001 of the approximation
    score = metrics.return_level_score(maxima[:400], 50, draws=200)
    assert score.low < law.isf(1 / 50) < score.high


def test_return_levels_need_maxima():
    with pytest.raises(BadInput, match="3 block maxima"):
        metrics.return_level(np.zeros((2, 4)), 10)


# ---------------------------------------------------------------- memorisation


def test_nearest_distance_is_brute_force_and_zero_for_a_copy():
    a, b = normal(20, 3, 4), normal(50, 3, 4, seed=1) + 1000
    expected = np.sqrt(((a[:, None] - b[None]) ** 2).mean((2, 3))).min(1)
    np.testing.assert_allclose(metrics.nearest_distance(a, b), expected, rtol=1e-5)
    assert (metrics.nearest_distance(b[7:9], b) == 0).all()


def test_a_generator_that_copies_is_caught_and_an_honest_one_is_not():
    train, held_out, fresh = normal(400, 4, 5), normal(400, 4, 5, seed=1), normal(400, 4, 5, seed=2)
    copied = np.concatenate([train[:20], fresh[20:]])
    memorised = train + 0.05 * normal(400, 4, 5, seed=3)

    def attack(generated: np.ndarray):
        return metrics.membership_auc(metrics.nearest_distance(train, generated), metrics.nearest_distance(held_out, generated), block=1)

    honest, leak, some = attack(fresh), attack(memorised), attack(copied)
    assert honest.low < 0.5 < honest.high
    assert leak.value > 0.99 and leak.low > 0.95
    assert some.value > honest.value
    assert metrics.exact_match_share(copied, train) == 20 / 400
    assert metrics.exact_match_share(fresh, train) == 0
    ratio = metrics.distance_ratio(fresh, train, held_out, block=1)
    assert ratio.low < 1 < ratio.high
    assert metrics.distance_ratio(memorised, train, held_out, block=1).high < 0.2


def test_membership_auc_is_the_share_of_pairs_with_ties_counted_half():
    assert metrics.membership_auc(np.array([1.0, 2.0]), np.array([2.0, 3.0])).value == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_nearest_member_distance_takes_the_members_of_its_own_item():
    truth = normal(5, 2, 2)
    ensemble = np.stack([truth + 3.0, truth - 1.0, truth[::-1] * 50])
    np.testing.assert_allclose(metrics.nearest_member_distance(ensemble, truth)[[0, 1, 3, 4]], 1.0)
