"""Samples of several days in a row: which days, how they follow one another, what is imposed on them and how they are judged."""

import jax
import numpy as np
import pytest
import xarray as xr

from domains.climate import domain as climate
from domains.climate import questions
from twinsim.base import BadInput


@pytest.fixture(autouse=True)
def many():
    """Judging works on many samples at once, where a field stands for every sample."""
    with jax.numpy_rank_promotion("allow"):
        yield


YEARS, WINDOW, MEMORY = 4, 5, 0.9


def travelling_wave(seed: int = 0) -> xr.Dataset:
    """Daily temperature on 4 x 8 cells: a season, a wave that moves half a cell a day and slowly changes, and noise."""
    random = np.random.default_rng(seed)
    time = xr.date_range("2001-01-01", periods=365 * YEARS, calendar="standard", use_cftime=False)
    amplitude = np.zeros(len(time), complex)
    turn = MEMORY * np.exp(-2j * np.pi * 0.5 / 8)
    kicks = (random.normal(size=(len(time), 2)) @ [1, 1j]) * np.sqrt((1 - MEMORY**2) / 2)
    for day in range(1, len(time)):
        amplitude[day] = turn * amplitude[day - 1] + kicks[day]
    wave = (amplitude[:, None] * np.exp(2j * np.pi * np.arange(8) / 8)).real
    season = 10 * np.cos(2 * np.pi * np.arange(len(time)) / 365.25)
    field = 280 + season[:, None, None] + 3 * wave[:, None, :] + 0.2 * random.normal(size=(len(time), 4, 8))
    coords = {
        "time": time,
        "lat": ("lat", np.linspace(-60, 60, 4), {"units": "degrees_north"}),
        "lon": ("lon", np.arange(8) * 45.0, {"units": "degrees_east"}),
    }
    return xr.Dataset({"tas": (("time", "lat", "lon"), field.astype(np.float32), {"units": "K"})}, coords)


def twin(**changed) -> climate.Climate:
    given = {
        "name": "climate/wave",
        "dataset": travelling_wave(),
        "quantities": {"tas": climate.Quantity("K", "temperature")},
        "splits": {"train": [{"time": ["2001-01-01", "2003-12-31"]}], "test": [{"time": ["2004-01-01", "2004-12-30"]}]},
        "components": climate.Components(count=20, coupled=4),
        "window": WINDOW,
    }
    return climate.Climate(**{**given, **changed})


@pytest.fixture(scope="module")
def fitted():
    domain = twin()
    return domain, domain.fit()


def drawn(domain, statistics, members: int = 4, most: int = 40):
    """What a silent diffusion model draws: the question, its truth, and samples decoded from white noise."""
    question, truth = domain.exam(members, most)
    items = len(question.condition["day_of_year"])
    spec = domain.spec(statistics)
    noise = jax.random.normal(jax.random.key(0), (members, items, *spec.grid, spec.channels))
    each = jax.jit(jax.vmap(jax.vmap(domain.decode, in_axes=(None, 0, 0)), in_axes=(None, 0, None)))
    return question, truth, {name: np.asarray(v) for name, v in each(statistics, noise, question.condition).items()}


def test_samples_begin_where_enough_days_follow():
    domain = twin(
        splits={"train": [{"time": ["2001-01-01", "2001-01-10"]}, {"time": ["2001-01-20", "2001-01-22"]}], "test": twin().splits["test"]}
    )
    assert domain.starts("train").tolist() == [0, 1, 2, 3, 4, 5]  # three days are too few
    first = domain.source("train")[np.array([5])][0]["tas"]
    np.testing.assert_array_equal(first[0], domain.dataset["tas"].values[5:10])


def test_samples_do_not_cross_a_gap_or_a_branch():
    dataset = travelling_wave().isel(time=[*range(8), *range(20, 40)])
    held_out = travelling_wave().isel(time=slice(-10, None))
    splits = {"train": [{"time": ["2001-01-01", "2001-12-31"]}], "test": [{"time": ["2004-12-01", "2004-12-31"]}]}
    gappy = twin(dataset=xr.concat([dataset, held_out], "time"), splits=splits)
    assert gappy.starts("train").tolist() == [*range(4), *range(8, 24)]
    branches = xr.concat([dataset.isel(time=slice(8, None)), held_out], "time").assign_coords(branch=("time", ["a"] * 10 + ["b"] * 20))
    assert twin(dataset=branches, splits=splits).starts("train").tolist() == [*range(6), *range(10, 16)]


def test_a_split_without_enough_days_in_a_row_is_refused():
    with pytest.raises(BadInput, match="split test: selects nothing from the data, 5 days in a row,"):
        twin(splits={"train": [{"time": ["2001-01-01", "2003-12-31"]}], "test": [{"time": ["2004-01-01", "2004-01-03"]}]})
    with pytest.raises(BadInput, match="window: 5 days in a row want components"):
        twin(components=None)


def test_examples_decode_to_their_own_days(fitted):
    domain, statistics = fitted
    example = next(iter(domain.examples(statistics)))
    sample, condition = domain.source("train")[np.arange(3)]
    for index in range(3):
        back = domain.decode(statistics, example.target[index], {name: np.asarray(v[index]) for name, v in condition.items()})["tas"]
        assert back.shape == (WINDOW, 4, 8)
        error = float(np.sqrt(np.mean((np.asarray(back) - sample["tas"][index]) ** 2)))
        assert error < 0.3  # K: the noise of 0.2 K is partly beyond the components


def test_the_exam_asks_each_day_once(fitted):
    domain, _ = fitted
    question, truth = domain.exam(2, None)
    dates = domain.dates(question)
    assert len(dates) == len(set(dates)) == truth["tas"].shape[0] * WINDOW == 365
    np.testing.assert_array_equal(domain.as_days(truth)["tas"], domain.dataset["tas"].sel(time=dates).values)


@pytest.mark.slow
def test_drawn_days_follow_one_another_as_the_truth_does(fitted):
    domain, statistics = fitted
    question, truth, generated = drawn(domain, statistics)
    table = domain.score(generated, truth, question.condition).table
    assert abs(table["tas: lag-1 correlation error"].value) < 0.05 and abs(table["tas: day-to-day change, ratio"].value - 1) < 0.1
    shuffled = {"tas": generated["tas"][:, ::-1][..., ::-1, :, :]}  # the wave would travel the other way
    wrong = np.random.default_rng(0).permuted(generated["tas"], axis=2)
    alone = domain.score({"tas": wrong}, truth, question.condition).table
    assert alone["tas: lag-1 correlation error"].value < -0.2 and alone["tas: day-to-day change, ratio"].value > 1.2

    def eastward(days: np.ndarray) -> float:
        """Mean turn of the wave's phase from day to day, in cells."""
        phase = np.fft.fft(days.mean(-2), axis=-1)[..., 1]
        return float(-np.angle((phase[..., 1:] * phase[..., :-1].conj()).sum()) * 8 / (2 * np.pi))

    assert eastward(generated["tas"] - 280) == pytest.approx(0.5, abs=0.08)
    assert eastward(shuffled["tas"] - 280) == pytest.approx(-0.5, abs=0.08)


def test_baselines_draw_days_in_a_row(fitted):
    domain, statistics = fitted
    question, truth = domain.exam(2, 6)
    recorded = domain.dataset["tas"].values[domain.rows("train")]
    tables = {}
    for name, baseline in domain.baselines(statistics).items():
        sample = baseline(question.condition, 2, 0)["tas"]
        assert sample.shape == (2, 6, WINDOW, 4, 8)
        tables[name] = sample
    first = tables["5 days of the season"][0, 0]
    begins = np.flatnonzero((recorded == first[0]).all((1, 2)))
    assert len(begins) == 1
    np.testing.assert_array_equal(recorded[begins[0] : begins[0] + WINDOW], first)


def asked(**changed) -> questions.ClimateScenario:
    given = {
        "title": "a question",
        "domain": "climate/wave",
        "members": 2,
        "seed": 1,
        "asks": "what?",
        "command": "twinsim run",
        "takes": "a moment",
        "expect": "waves",
        "period": {"start": "2001-01-01", "end": "2001-01-10"},
    }
    return questions.ClimateScenario.model_validate({**given, **changed})


def test_a_period_is_a_whole_number_of_samples(tmp_path):
    domain = twin()
    question = domain.ask(asked(), tmp_path)
    assert len(question.condition["day_of_year"]) == 2 and len(domain.dates(question)) == 10
    assert "each begins from the day before it" in question.notes[0]
    with pytest.raises(BadInput, match="expected a multiple of 5 days, with every: 1, got 9"):
        domain.ask(asked(period={"start": "2001-01-01", "end": "2001-01-09"}), tmp_path)
    with pytest.raises(BadInput, match="with every: 1, got 5 with every: 2"):
        domain.ask(asked(period={"start": "2001-01-01", "end": "2001-01-10", "every": 2}), tmp_path)


def test_what_is_imposed_is_the_mean_of_all_days(tmp_path):
    domain = twin()
    impose = [{"variable": "tas", "box": {"lat": [-90, 90], "lon": [0, 50]}, "above_quantile": 0.9}]
    question = domain.ask(asked(impose=impose), tmp_path)
    weights = questions.box_weights(domain, question.imposed[0].box)
    days = (domain.dataset["tas"].values * weights).sum((1, 2))[:1095]
    means = np.lib.stride_tricks.sliding_window_view(days, WINDOW).mean(1)
    day_of_year = domain.conditions(domain.starts("train"))["day_of_year"]
    near = np.minimum(day_of_year, 365.25 - day_of_year) <= 15
    assert question.condition["threshold0"][0] == pytest.approx(np.quantile(means[near], 0.9), abs=1e-3)
    hot = np.full((WINDOW, 4, 8), question.condition["threshold0"][0], np.float32)
    one = {name: values[0] for name, values in question.condition.items()}
    assert float(question.misses({"tas": hot + 0.1}, one)) == 0.0
    cooler = hot + 0.1 * np.array([1, 1, 1, 1, -9], np.float32)[:, None, None]
    assert float(question.misses({"tas": cooler}, one)) == pytest.approx(0.1, abs=1e-3)


def test_the_answer_has_a_date_for_every_day(fitted, tmp_path):
    domain, _ = fitted
    question = domain.ask(asked(), tmp_path)
    values = np.arange(2 * 2 * WINDOW * 32, dtype=np.float32).reshape(2, 2, WINDOW, 4, 8)
    made = domain.dataset_of({"tas": values}, question)
    assert made.sizes["time"] == 10 and str(made["time"].values[7])[:10] == "2001-01-08"
    np.testing.assert_array_equal(made["tas"].values[1, 7], values[1, 1, 2])
