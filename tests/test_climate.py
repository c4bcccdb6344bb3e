"""What a climate twin is made of on tiny data of its own: conditions, splits, rules, deliveries, scores that see a copy."""

import dataclasses

import jax
import numpy as np
import pytest
import xarray as xr

from domains.climate import domain as climate
from domains.climate import scores
from domains.climate import truth as climate_truth
from twinsim.base import BadInput


@pytest.fixture(autouse=True)
def many():
    """Judging works on many samples at once, where a field stands for every sample."""
    with jax.numpy_rank_promotion("allow"):
        yield


def truth(days: int = 240, latitudes: int = 8, seed: int = 0) -> xr.Dataset:
    """Independent days of a skewed positive field on a global grid."""
    random = np.random.default_rng(seed)
    coords = {
        "time": xr.date_range("2001-01-01", periods=days, use_cftime=False),
        "lat": ("lat", np.linspace(-80, 80, latitudes), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(8) * 45.0, {"units": "degrees_east"}),
    }
    wave = random.normal(size=(days, 1, 1)) * np.cos(np.arange(8) * np.pi / 4)
    field = np.exp(0.5 * (wave + random.normal(size=(days, latitudes, 8))))
    return xr.Dataset({"pr": (("time", "lat", "lon"), field.astype(np.float32), {"units": "mm day-1"})}, coords)


def twin(dataset: xr.Dataset | None = None, quantity: dict | None = None, **changed) -> climate.Climate:
    given = {
        "name": "climate/tiny",
        "dataset": truth() if dataset is None else dataset,
        "quantities": {"pr": climate.Quantity("mm day-1", "precipitation", lower=0, wet=1.0, **(quantity or {"transform": "log1p"}))},
        "splits": {"train": [{"time": ["2001-01-01", "2001-06-30"]}], "test": [{"time": ["2001-07-05", "2001-08-28"]}]},
        "season": False,
        "components": climate.Components(count=64),
    }
    return climate.Climate(**{**given, **changed})


def drawn(domain, members: int = 4):
    """Question, truth and what a silent diffusion model draws."""
    statistics = domain.fit()
    question, answer = domain.exam(members, None)
    spec = domain.spec(statistics)
    noise = jax.random.normal(jax.random.key(0), (members, len(answer["pr"]), *spec.grid, spec.channels))
    each = jax.jit(jax.vmap(jax.vmap(domain.decode, in_axes=(None, 0, 0)), in_axes=(None, 0, None)))
    return question, answer, {name: np.asarray(v) for name, v in each(statistics, noise, question.condition).items()}


def test_a_model_without_any_condition_is_fitted_drawn_and_judged():
    domain = twin()
    assert list(domain.condition) == ["number"]
    statistics = domain.fit()
    blocks = list(domain.examples(statistics))
    assert sum(len(block.target) for block in blocks) == len(domain.rows("train")) and blocks[0].scalars.shape[1] == 0
    question, answer, generated = drawn(domain)
    names = set(domain.baselines(statistics))
    assert names == {"days of the season", "PCA-Gaussian"}
    for baseline in domain.baselines(statistics).values():
        assert baseline(question.condition, 2, 0)["pr"].shape == (2, *answer["pr"].shape)
    table = domain.score(generated, answer, question.condition).table
    assert table["pr: spread-skill ratio"].value == pytest.approx(1, abs=0.25)  # the logarithm of 1 + rain is not quite Gaussian
    without = [name for name, score in table.items() if not score.low <= score.value <= score.high]
    assert without == ["copies of training days"], without  # a count, not an estimate


def test_splits_that_share_days_are_refused():
    with pytest.raises(BadInput, match="splits: train and test share 5 of the samples"):
        twin(splits={"train": [{"time": ["2001-01-01", "2001-07-05"]}], "test": [{"time": ["2001-07-01", "2001-08-28"]}]})


@pytest.mark.parametrize("calendar", ["standard", "360_day"])
def test_splits_in_every_calendar_and_of_days_in_no_order(calendar):
    time = xr.date_range("2001-01-01", periods=720, calendar=calendar, use_cftime=calendar != "standard")
    dataset = truth(days=720).assign_coords(time=time)
    splits = {"train": [{"time": ["2001-01-01", "2001-12-31"]}], "test": [{"time": "2002-02"}, {"time": ["2002-03", "2002-04"]}]}
    domain = twin(dataset, splits=splits)
    assert len(domain.rows("train")) == (365 if calendar == "standard" else 360)
    assert len(domain.rows("test")) == (89 if calendar == "standard" else 90)
    shuffled = dataset.isel(time=np.random.default_rng(0).permutation(720))
    assert {len(twin(shuffled, splits=splits).rows(split)) for split in splits} == {len(domain.rows(split)) for split in splits}


def test_units_of_the_data_and_of_the_quantity_are_the_same_or_refused():
    with pytest.raises(BadInput, match=r"variable pr: it is read in mm day-1, but quantities.pr.units says m s-1"):
        twin(quantities={"pr": climate.Quantity("m s-1", "precipitation")})


def test_patches_have_no_season():
    with pytest.raises(BadInput, match="season: expected false, the samples lie along patch"):
        twin(truth().drop_vars("time").rename(time="patch"), season=True)


def test_a_forcing_far_from_zero_is_seen_from_its_own_middle():
    # 30 years of a gas that grows from 350 to 410, and 0.03 K for each of it
    days = 3600
    random = np.random.default_rng(0)
    gas = np.linspace(350, 410, days)
    time = xr.DataArray(xr.date_range("1981-01-01", periods=days, freq="3D", use_cftime=False), dims="time")
    coords = {
        "time": time,
        "lat": ("lat", np.linspace(-60, 60, 4), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(6) * 60.0, {"units": "degrees_east"}),
        "co2": ("time", gas, {"units": "ppm"}),
    }
    field = 280 + 0.03 * (gas - 380)[:, None, None] + 2 * random.normal(size=(days, 4, 6))
    rain = np.exp(0.3 * random.normal(size=(days, 4, 6))) * (1 + 0.005 * (gas - 380)[:, None, None])
    shape, units = ("time", "lat", "lon"), {"units": "mm day-1"}
    dataset = xr.Dataset({"tas": (shape, field.astype(np.float32), {"units": "K"}), "pr": (shape, rain.astype(np.float32), units)}, coords)
    domain = twin(
        dataset,
        quantities={
            "tas": climate.Quantity("K", "temperature"),
            "pr": climate.Quantity("mm day-1", "precipitation", lower=0, transform="normal_score"),
        },
        splits={"train": [{"time": ["1981", "2005"]}], "test": [{"time": ["2006", "2010"]}]},
        forcing="co2",
        components=climate.Components(count=48),
    )
    statistics = domain.fit()
    noise = jax.random.normal(jax.random.key(0), (200, *domain.spec(statistics).grid, domain.spec(statistics).channels))
    decode = jax.jit(jax.vmap(domain.decode, in_axes=(None, 0, None)))
    for level in (350.0, 380.0, 430.0):
        made = decode(statistics, noise, {"co2": np.float32(level)})
        assert float(made["tas"].mean()) == pytest.approx(280 + 0.03 * (level - 380), abs=0.15)
        assert float(made["tas"].std()) == pytest.approx(2, abs=0.2)
        assert float(made["pr"].mean()) == pytest.approx(np.exp(0.045) * (1 + 0.005 * (level - 380)), rel=0.05)
    usual = scores.training_climatology(domain, {"co2": np.full(1, 400, np.float32)})["tas"]
    assert float(usual.mean()) == pytest.approx(280 + 0.03 * (domain.reference - 380), abs=0.1)
    baseline = domain.baselines(statistics)["days of the season, shifted by a pattern"]
    drawn = baseline({"co2": np.array([430.0], np.float32)}, 40, 0)["tas"]
    assert drawn.mean() == pytest.approx(281.5, abs=0.3) and drawn.std(0).mean() == pytest.approx(2, abs=0.3)


def test_copies_of_training_days_are_seen():
    domain = twin()
    question, answer, generated = drawn(domain, members=2)
    copied = {"pr": domain.truth(domain.rows("train")[: 2 * len(answer["pr"])])["pr"].reshape(generated["pr"].shape)}
    assert domain.score(generated, answer, question.condition).table["copies of training days"].value == 0
    assert domain.score(copied, answer, question.condition).table["copies of training days"].value == 1


def test_a_normal_score_goes_on_beyond_both_ends_and_stops_at_the_bound():
    pressure = truth()
    pressure["pr"] = 990 + 5 * np.log(pressure["pr"])
    bound = {"transform": "normal_score"}
    domain = twin(pressure, bound)
    domain = dataclasses.replace(domain, quantities={"pr": climate.Quantity("mm day-1", "departure", transform="normal_score")})
    statistics = domain.fit()
    low, lower = (float(domain._restored(statistics, "pr", np.full((8, 8), z, np.float32), {}).min()) for z in (-3.0, -4.0))
    assert lower < low - 0.1
    rain = twin(quantity=bound)
    statistics = rain.fit()
    assert float(rain._restored(statistics, "pr", np.full((8, 8), -30.0, np.float32), {}).min()) == 0.0


def test_a_ring_in_the_tropics_is_scored_over_all_its_latitudes():
    dataset = truth().isel(lat=slice(3, 5))
    assert np.abs(dataset["lat"]).max() < 30
    question, answer, generated = drawn(twin(dataset, components=climate.Components(count=10)))
    assert len(question.condition["number"]) == len(answer["pr"]) == 55
    assert np.isfinite(scores.spectrum(twin(dataset), generated["pr"])).all()


def test_reliability_of_exact_and_of_blind_probabilities():
    random = np.random.default_rng(0)
    answer = random.normal(size=(400, 6, 6))
    sure = scores.reliability(np.repeat(answer[None], 4, axis=0), answer)
    np.testing.assert_array_equal(sure, [[0, 1], [0, 1]])
    given, observed = scores.reliability(random.normal(size=(4, 400, 6, 6)), answer)
    np.testing.assert_allclose(given, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(observed[:4], 0.25, atol=0.03)  # what happens has nothing to do with what was said


def test_balance_and_mass_are_known_as_well_as_so_many_states_tell():
    states, sigma, off = 300, 150.0, 2.0
    random = np.random.default_rng(0)
    domain = twin(truth(latitudes=24))
    latitude = domain.dataset["lat"].values
    wave = random.normal(size=(states, 1, 1)) * np.sin(np.deg2rad(latitude))[:, None] * np.ones(8)
    z, t, p = 5600 + 60 * wave, 255 + wave, 1e5 + sigma * random.normal(size=(states, 1, 1)) + 0 * wave
    balanced = np.stack([np.asarray(scores.physics.geostrophic_wind(*each, latitude)) for each in zip(z, t, p, strict=True)])
    inside = scores.physics.mid_latitudes(latitude)
    wind = balanced + off * random.normal(size=balanced.shape)
    given = dict(zip(scores.GEOSTROPHIC, (z, t, p, wind), strict=True))
    table: dict = {}
    scores._score_balance(domain, {name: values[None] for name, values in given.items()}, table)
    u, ug = (scores.pool(of[None], 200)[:, inside].ravel() for of in (wind, balanced))
    residual, correlation, mass = (
        table[name] for name in ("geostrophic residual", "correlation with the geostrophic wind", "deviation of global mean pressure")
    )
    assert residual.value == pytest.approx(np.sqrt(((u - ug) ** 2).mean()) / u.std(), rel=1e-5)  # float32 winds
    assert correlation.value == pytest.approx(np.corrcoef(u, ug)[0, 1], rel=1e-5)
    assert all(score.low < score.value < score.high for score in (residual, correlation, mass))
    assert mass.value == pytest.approx(sigma / 100, rel=0.2)
    assert mass.high - mass.low == pytest.approx(2 * 1.96 * mass.value / np.sqrt(2 * 200), rel=0.2)  # of a Gaussian's deviation


def stacked(day: dict) -> dict:
    """One day as a batch of one."""
    return {name: values[None] for name, values in day.items()}


def test_a_state_out_of_balance_or_with_other_mass_breaks_a_rule():
    random = np.random.default_rng(0)
    time = xr.date_range("2001-01-01", periods=60, use_cftime=False)
    latitude, longitude = np.linspace(-87, 87, 24), np.arange(16) * 22.5
    wave = random.normal(size=(60, 1, 1)) * np.sin(np.deg2rad(latitude))[:, None] * np.cos(np.deg2rad(longitude))
    fields = {"zg500": 5600 + 60 * wave, "ta500": 255 + wave, "ps": 1e5 + 100 * wave, "ua500": 10 + 3 * wave}
    coords = {"time": time, "lat": ("lat", latitude, {"units": "degrees_north"}), "lon": ("lon", longitude, {"units": "degrees_east"})}
    dataset = xr.Dataset({name: (("time", "lat", "lon"), v.astype(np.float32)) for name, v in fields.items()}, coords)
    domain = twin(
        dataset.assign_attrs(levels=scores.physics.SIGMA),
        quantities={name: climate.Quantity(units, name) for name, units in scores.GEOSTROPHIC.items()},
        splits={"train": [{"time": ["2001-01-01", "2001-01-31"]}], "test": [{"time": ["2001-02-05", "2001-02-28"]}]},
    )
    day = {name: values[0] for name, values in domain.truth(domain.rows("test")).items()}
    kept = {rule: float(broken[0]) for rule, broken in jax.jit(jax.vmap(domain.check, in_axes=(0, None)))(stacked(day), {}).items()}
    assert kept == {rule: 0.0 for rule in kept} and len(kept) == 2
    balance, mass = sorted(kept)
    assert float(domain.check({**day, "ps": day["ps"] + 500}, {})[mass]) > 100
    assert float(domain.check({**day, "ua500": 10 + 0.01 * (day["ua500"] - 10)}, {})[balance]) > 0


def test_the_answer_keeps_the_map_projection_and_names_cell_numbers():
    dataset = truth().rename(lat="y", lon="x").drop_vars(["y", "x"])
    dataset = dataset.assign_coords(y=np.arange(8), x=np.arange(8), rotated_pole=0)
    dataset["pr"].attrs["grid_mapping"] = "rotated_pole"
    domain = twin(dataset)
    question, answer = domain.exam(1, 3)
    made = domain.dataset_of({"pr": answer["pr"][None]}, question)
    assert made["pr"].attrs["grid_mapping"] == "rotated_pole" and "rotated_pole" in made.coords
    assert made["y"].attrs == {"units": "1", "long_name": "cell number"}


def test_levels_are_sigma_or_not_told():
    with pytest.raises(BadInput, match="levels: expected sigma or nothing, got 'pressure'"):
        climate_truth.recorded("nowhere.nc", {"tas": {"units": "K"}}, levels="pressure")
