"""Reference generators: what each must keep, and (slow, where the data is at hand) the published figures."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from domains.climate import baselines, grid, means, physics
from twinsim import metrics
from twinsim.base import BadInput

DATA = Path(__file__).parents[2] / "shared" / "data" / "climate"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no climate sample data beside the checkout")


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def states(n: int = 800) -> tuple[dict, dict]:
    """Two variables with a season, a warming that is stronger in one half, and a shared anomaly."""
    r = random()
    day, offset = np.arange(n) % 365.25, r.choice([0.0, 1.0], n)
    cycle = 10 * np.cos(2 * np.pi * day / 365.25)[:, None, None]
    common = r.normal(size=(n, 4, 6))
    warmer = np.where(np.arange(6) < 3, 1.0, 3.0) * offset[:, None, None]
    tas = 280 + cycle + common + warmer
    pr = np.maximum(1 + 0.8 * common + 0.1 * r.normal(size=common.shape), 0)
    return {"tas": tas, "pr": pr}, {"day_of_year": day, "sst_offset": offset}


def downscaling(n: int = 300, factor: int = 4) -> tuple[dict, dict, dict]:
    """Training samples, test samples and their backgrounds: fine structure fixed in place plus noise."""
    r = random(1)

    def draw(n: int, seed: int) -> dict:
        r2 = random(seed)
        coarse = r2.normal(size=(n, 2, 3))
        tas = grid.refine(coarse, factor) * 3 + relief + 0.3 * r2.normal(size=(n, 8, 12))
        pr = np.maximum(grid.refine(coarse, factor) + 0.5 + 0.3 * r2.normal(size=(n, 8, 12)), 0) * np.exp(relief / 4)
        return {"tas": (tas + 280).astype(np.float32), "pr": pr.astype(np.float32)}

    relief = r.normal(size=(8, 12))
    test = draw(20, 3)
    return draw(n, 2), test, {f"coarse_{name}": grid.coarsen(values, factor) for name, values in test.items()}


# ---------------------------------------------------------------- states


def test_bootstrap_draws_training_days_of_the_season_once_each():
    sample, condition = states()
    drawn = baselines.ClimatologyBootstrap(sample, condition)({"day_of_year": np.array([3.0, 180.0])}, members=30, seed=1)
    assert drawn["tas"].shape == (30, 2, 4, 6)
    for item, day in enumerate((3.0, 180.0)):
        source = [int(np.flatnonzero((sample["tas"].astype(np.float32) == x).all((1, 2)))[0]) for x in drawn["tas"][:, item]]
        gap = np.abs(condition["day_of_year"][source] - day)
        assert np.minimum(gap, 365.25 - gap).max() <= means.SEASON
        assert len(set(source)) == 30
        np.testing.assert_array_equal(drawn["pr"][:, item], sample["pr"][source].astype(np.float32))  # the same day for all variables


@pytest.mark.parametrize(("response", "left", "right"), [("none", 0.0, 0.0), ("uniform", 6.0, 6.0), ("pattern", 3.0, 9.0)])
@pytest.mark.parametrize("kind", [baselines.ClimatologyBootstrap, baselines.PCAGaussian])
def test_response_to_a_warming_never_seen(kind, response, left, right):
    sample, condition = states()
    fitted = kind(sample, condition, forcing="sst_offset", response=response, non_negative=["pr"])
    days = np.arange(0, 365, 5.0)
    cold, warm = (fitted({"day_of_year": days, "sst_offset": np.full(len(days), k)}, members=20, seed=4) for k in (0.0, 3.0))
    change = (warm["tas"] - cold["tas"]).mean((0, 1, 2))  # the same seed: the same days
    np.testing.assert_allclose(change, np.repeat([left, right], 3), atol=0.7)  # 3 K times slopes with standard error 0.07 to 0.2
    assert (warm["pr"] >= 0).all()


def test_pca_gaussian_keeps_mean_season_spread_and_correlation_but_not_tails():
    sample, condition = states()
    fitted = baselines.PCAGaussian(sample, condition, forcing="sst_offset", response="pattern", non_negative=["pr"])
    drawn = fitted({name: values[:365] for name, values in condition.items()}, members=8, seed=0)
    np.testing.assert_allclose(drawn["tas"].mean((0, 1)), sample["tas"][:365].mean(0), atol=0.3)  # 365 days of deviation 1
    anomaly = drawn["tas"] - drawn["tas"].mean(0)
    assert anomaly.std() * np.sqrt(8 / 7) == pytest.approx(1.0, abs=0.05)
    rain = drawn["pr"] - drawn["pr"].mean(0)
    assert np.corrcoef(anomaly.ravel(), rain.ravel())[0, 1] > 0.9
    assert drawn["pr"].min() == 0


def test_draws_repeat_with_the_seed_and_change_with_it():
    sample, condition = states(200)
    for fitted in (baselines.ClimatologyBootstrap(sample, condition), baselines.PCAGaussian(sample, condition, count=5)):
        one, two, other = (fitted({"day_of_year": np.arange(4.0)}, members=3, seed=s)["tas"] for s in (0, 0, 1))
        np.testing.assert_array_equal(one, two)
        assert (one != other).any() and one.dtype == np.float32


# ---------------------------------------------------------------- downscaling


def test_interpolation_is_refine_repeated():
    _, _, background = downscaling()
    drawn = baselines.Interpolation(4, 3, non_negative=["pr"])(background, members=3, seed=0)
    np.testing.assert_allclose(drawn["tas"][2], grid.refine(background["coarse_tas"], 4, 3), rtol=1e-5)
    assert drawn["pr"].min() >= 0


def test_quantile_mapping_gives_training_data_its_own_quantiles():
    train, _, _ = downscaling()
    fitted = baselines.QuantileMapping(train, 4, non_negative=["pr"])
    mapped = fitted({f"coarse_{name}": grid.coarsen(values, 4) for name, values in train.items()}, members=1, seed=0)
    for name in train:
        for level in (0.1, 0.5, 0.9):
            expected = np.quantile(train[name], level, axis=0)
            np.testing.assert_allclose(np.quantile(mapped[name][0], level, axis=0), expected, atol=0.2)  # 300 days, 100 levels, 3 K


def test_analogues_find_the_day_itself_and_keep_block_means():
    train, _, background = downscaling()
    fitted = baselines.Analogues(train, 4, non_negative=["pr"])
    seen = {f"coarse_{name}": grid.coarsen(values[5:8], 4) for name, values in train.items()}
    np.testing.assert_allclose(fitted(seen, members=2, seed=0)["tas"][0], train["tas"][5:8], atol=1e-3)
    drawn = fitted(background, members=5, seed=0)
    for name in train:
        assert physics.block_mean_mismatch(drawn[name], np.broadcast_to(background[f"coarse_{name}"], (5, 20, 2, 3)), 4) < 1e-3


@pytest.mark.parametrize("neighbourhood", [False, True])
def test_ridge_analogue_is_calibrated_and_beats_what_it_is_built_on(neighbourhood):
    train, test, background = downscaling()
    fitted = baselines.RidgeAnalogue(train, 4, non_negative=["pr"], neighbourhood=neighbourhood)
    drawn = fitted(background, members=10, seed=0)
    mapped = baselines.QuantileMapping(train, 4, non_negative=["pr"])(background, members=10, seed=0)
    for name in train:
        assert metrics.crps(drawn[name], test[name]).mean() < metrics.crps(mapped[name], test[name]).mean()
    spread, error = metrics.variance(drawn["tas"]).mean(), metrics.squared_error(drawn["tas"], test["tas"]).mean()
    assert metrics.spread_skill_ratio(10)(spread, error) == pytest.approx(1.0, abs=0.1)
    kept = baselines.RidgeAnalogue(train, 4, non_negative=["pr"], neighbourhood=neighbourhood, conserve=True)(background, 4, 0)
    assert physics.block_mean_mismatch(kept["pr"], np.broadcast_to(background["coarse_pr"], (4, 20, 2, 3)), 4) < 1e-5


def test_rainfarm_keeps_block_means_and_recovers_a_spectral_slope():
    amplitude, shape = baselines._power_law((32, 32), 2.5)
    field = np.fft.irfft2(np.fft.rfft2(random(5).normal(size=(200, 32, 32))) * amplitude, shape)
    # a cosine transform of a periodic field sees a jump of slope at the edge: a little flatter
    assert baselines._spectral_slope(field, (4, 12)) == pytest.approx(2.5, abs=0.3)
    rain = {"pr": np.exp(2 * field / field.std()).astype(np.float32)}
    coarse = grid.coarsen(rain["pr"][:6], 8)
    coarse[0] = 0.0
    drawn = baselines.RainFARM(rain, 8, band=(4, 12))({"coarse_pr": coarse}, members=3, seed=0)["pr"]
    np.testing.assert_allclose(grid.coarsen(drawn, 8), np.broadcast_to(coarse, (3, 6, 4, 4)), rtol=1e-5)
    assert (drawn[:, 0] == 0).all() and drawn.min() >= 0


def test_a_short_record_still_gives_as_many_members_as_asked():
    train, _, background = downscaling(n=6)
    for fitted in (baselines.Analogues(train, 4), baselines.RidgeAnalogue(train, 4)):
        assert fitted(background, members=9, seed=0)["tas"].shape == (9, 20, 8, 12)


def test_downscaling_baselines_ask_for_a_background():
    with pytest.raises(BadInput, match="coarse_<variable>"):
        baselines.Interpolation(4)({"day_of_year": np.zeros(3)}, 1, 0)


# ---------------------------------------------------------------- published figures


@pytest.mark.slow
@needs_data
def test_ridge_analogue_reaches_its_published_crps_on_racmo():
    data = xr.open_dataset(DATA / "cordex_racmo22e_iberia_djf_hist_1983-1999.nc").isel(rlon=slice(0, 28))
    winter = (data.time.dt.year + (data.time.dt.month == 12)).values
    train, test = ({v: data[v].values[rows].astype(np.float32) for v in ("tas", "pr")} for rows in (winter <= 1995, winter >= 1998))
    fitted = baselines.RidgeAnalogue(train, 4, non_negative=["pr"])
    drawn = fitted({f"coarse_{v}": grid.coarsen(x, 4) for v, x in test.items()}, members=20, seed=0)
    assert metrics.crps(drawn["tas"], test["tas"]).mean() == pytest.approx(0.191, abs=0.005)
    assert metrics.crps(drawn["pr"], test["pr"]).mean() == pytest.approx(0.517, abs=0.005)


@pytest.mark.slow
@needs_data
def test_rainfarm_reaches_its_published_crps_on_mrms():
    rate = xr.open_dataset(DATA / "mrms_preciprate_conus_2019-06-10.nc").rain_rate.values
    west, east = [], []
    for i in range(0, rate.shape[1] - 63, 64):
        for j in range(0, rate.shape[2] - 63, 64):
            part = rate[:, i : i + 64, j : j + 64]
            wet = np.isfinite(part).all((1, 2)) & ((part > 0.1).mean((1, 2)) > 0.05)
            (west if (j + 32) / rate.shape[2] < 0.5 else east).extend((t, i, j) for t in np.flatnonzero(wet))
    cut = lambda places: np.stack([rate[t, i : i + 64, j : j + 64] for t, i, j in sorted(places)]).astype(np.float32)  # noqa: E731
    train, test = cut(west), cut(east)
    test = test[random(20260101).permutation(len(test))[:400]]
    drawn = baselines.RainFARM({"pr": train}, 8)({"coarse_pr": grid.coarsen(test, 8)}, members=20, seed=0)["pr"]
    assert metrics.crps(drawn, test).mean() == pytest.approx(0.346, abs=0.01)


@pytest.mark.slow
@needs_data
def test_pca_gaussian_reaches_its_published_distance_on_sea_level_pressure():
    data = xr.open_dataset(DATA / "ncep_r1_psl_natl_daily_2001-2008.nc").psl / 100
    weights = np.cos(np.deg2rad(data.lat.values))[:, None]
    train, test = data.sel(time=slice("2001", "2006")), data.sel(time=slice("2007", "2008"))
    days = [part.time.dt.dayofyear.values for part in (train, test)]
    stat = means.fit_harmonics(train.values, days[0])
    anomaly, reference = (part.values - means.harmonics(stat, day) for part, day in zip((train, test), days, strict=True))
    fitted = baselines.PCAGaussian({"psl": anomaly}, {"day_of_year": days[0]}, weights=weights)
    drawn = [fitted({"day_of_year": random(seed).integers(1, 366, 1000)}, members=1, seed=seed)["psl"][0] for seed in range(10)]
    distance = np.mean([metrics.sliced_wasserstein(x, reference, weights) for x in drawn])  # one set of 1000 differs by 0.006
    assert distance == pytest.approx(0.106, abs=0.004)


@pytest.mark.slow
@needs_data
def test_speedy_days_are_in_the_published_balance():
    data = xr.open_dataset(DATA / "speedy_t31_control_2000-2003.nc").isel(time=slice(-365, None))
    lat = data.lat.values
    z, t, p, u = (data[name].values.astype(np.float32) for name in ("zg500", "ta500", "ps", "ua500"))
    balanced = np.stack([physics.geostrophic_wind(*day, lat) for day in zip(z, t, p, strict=True)])
    inside = (np.abs(lat) > 25) & (np.abs(lat) < 65)
    residual = np.sqrt(((u - balanced)[:, inside] ** 2).mean()) / u[:, inside].std()
    assert residual == pytest.approx(0.201, abs=0.001)
    assert np.corrcoef(u[:, inside].ravel(), balanced[:, inside].ravel())[0, 1] == pytest.approx(0.983, abs=0.001)
    mass = grid.global_mean(p.astype(np.float64), grid.area_weights(lat))
    assert mass.std() / 100 == pytest.approx(0.047, abs=0.001)
