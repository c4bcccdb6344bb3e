"""What a question to a climate twin may say, and what its benchmark makes of models that were trained before."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from domains.climate import domain as climate
from domains.climate import figures, means, questions, sources, speedy
from twinsim import cli, run
from twinsim.base import BadInput

LATITUDE, LONGITUDE = np.linspace(-70, 70, 8), np.arange(12) * 30.0
SPLITS = {"train": [{"time": ["2001-01-01", "2001-06-30"]}], "test": [{"time": ["2001-07-01", "2001-12-31"]}]}
COARSE = climate.Background(factor=2, regression="none")
DEGREES = ({"units": "degrees_north", "standard_name": "latitude"}, {"units": "degrees_east", "standard_name": "longitude"})


def days(latitude: np.ndarray = LATITUDE, longitude: np.ndarray = LONGITUDE, count: int = 365, **coords) -> xr.Dataset:
    """Daily temperature; that of a cell is its longitude in [0, 360), and a little of the day."""
    field = 200 + np.zeros((count, len(latitude), 1)) + longitude % 360 + 0.01 * np.arange(count)[:, None, None]
    axes = {
        "time": ("time", (np.datetime64("2001-01-01") + np.arange(count)).astype("datetime64[ns]")),
        "lat": ("lat", latitude, DEGREES[0]),
        "lon": ("lon", longitude, DEGREES[1]),
    }
    return xr.Dataset({"tas": (("time", "lat", "lon"), field.astype(np.float32), {"units": "K"})}, {**axes, **coords})


def twin(**changed) -> climate.Climate:
    given = {"name": "climate/toy", "dataset": days(), "quantities": {"tas": climate.Quantity("K", "temperature")}, "splits": SPLITS}
    return climate.Climate(**{**given, **changed})


def asked(**changed) -> questions.ClimateScenario:
    said = {"title": "a question", "domain": "climate/toy", "members": 2, "asks": "what?", "command": "twinsim run", "takes": "a moment"}
    return questions.ClimateScenario.model_validate({**said, "expect": "an answer", **changed})


TWO_DAYS = {"period": {"start": "2001-01-01", "end": "2001-01-02"}}


# ---------------------------------------------------------------- places


def test_places_are_found_under_any_name():
    named = days().rename(lat="latitude", lon="y_is_not_longitude")
    assert [part.shape for part in questions.positions(twin(dataset=named))] == [(8, 12)] * 2
    np.testing.assert_array_equal(twin(dataset=named).weights, twin().weights)
    assert twin().weights.std() > 0.1
    with pytest.raises(BadInput, match="no latitude and longitude in degrees"):
        questions.positions(twin(dataset=days().drop_vars("lon").assign_coords(lon=np.arange(12))))


@pytest.mark.parametrize(("lat", "lon"), [(75.0, 0.0), (-60.0, 359.0), (10.0, -15.0)])
def test_an_observation_in_the_grid_is_that_of_its_cell(lat, lon):
    europe = twin(dataset=days(latitude=np.arange(36.0, 61, 2), longitude=np.arange(-10.0, 31, 2)))
    assert callable(questions._observed(twin(), questions.Observe(variable="tas", lat=lat, lon=lon, value=280, error=1))[0])
    with pytest.raises(BadInput, match=r"observe: tas at -35 N, 150 E: outside the grid, its nearest cell lies at 36 N, 30 E"):
        questions._observed(europe, questions.Observe(variable="tas", lat=-35, lon=150, value=280, error=1))


# ---------------------------------------------------------------- a background file


def from_file(domain: climate.Climate, folder: Path, file: xr.Dataset) -> np.ndarray:
    """The coarse temperature `[time, y, x]` that a question takes from a file beside it."""
    file.to_netcdf(folder / "coarse.nc")
    question = domain.ask(asked(background={"file": "coarse.nc"}), folder)
    return np.asarray(question.condition["coarse_tas"])


def test_a_background_lies_on_the_blocks_of_the_grid(tmp_path):
    fine = days(count=3)
    coarse = sources.coarsened(fine, 2)
    domain = twin(background=COARSE)
    np.testing.assert_array_equal(from_file(domain, tmp_path, coarse), coarse["tas"])
    near = coarse.assign_coords(lat=("lat", coarse["lat"].values + 1.0, DEGREES[0]))  # a fortieth of a cell
    np.testing.assert_array_equal(from_file(domain, tmp_path, near), coarse["tas"])


def test_longitudes_of_a_background_are_rolled_into_place(tmp_path):
    coarse = sources.coarsened(days(count=3), 2)
    west = coarse.assign_coords(lon=("lon", (coarse["lon"].values + 180) % 360 - 180, DEGREES[1])).sortby("lon")
    assert west["lon"].values[0] < 0 and not np.array_equal(west["tas"], coarse["tas"])
    np.testing.assert_array_equal(from_file(twin(background=COARSE), tmp_path, west), coarse["tas"])
    region = days(longitude=np.arange(-60, 60, 10.0))  # across Greenwich, where the file has both ends
    ends = sources.coarsened(region.isel(time=slice(3)), 2)
    turned = ends.assign_coords(lon=("lon", ends["lon"].values % 360, DEGREES[1])).sortby("lon")
    np.testing.assert_array_equal(from_file(twin(dataset=region, background=COARSE), tmp_path, turned), ends["tas"])


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        ({"lon": 30.0}, r"lon: expected the centres of the model's blocks, 15 to 315, got 45 to 345, up to 30 apart"),
        ({"lat": 10.0}, r"lat: expected the centres of the model's blocks, -60 to 60, got -50 to 70, up to 10 apart"),
    ],
)
def test_a_shifted_background_is_refused(tmp_path, moved, says):
    coarse = sources.coarsened(days(count=3), 2)
    attrs = dict(zip(("lat", "lon"), DEGREES, strict=True))
    shifted = coarse.assign_coords({name: (name, coarse[name].values + by, attrs[name]) for name, by in moved.items()})
    with pytest.raises(BadInput, match=says):
        from_file(twin(background=COARSE), tmp_path, shifted)


def test_a_background_without_coordinates_is_taken_by_its_shape(tmp_path):
    coarse = sources.coarsened(days(count=3), 2)
    np.testing.assert_array_equal(from_file(twin(background=COARSE), tmp_path, coarse.drop_vars(["lat", "lon"])), coarse["tas"])
    with pytest.raises(BadInput, match="expected a grid of 4 x 6 cells, got"):
        from_file(twin(background=COARSE), tmp_path, coarse.drop_vars(["lat", "lon"]).isel(lat=slice(3)))


# ---------------------------------------------------------------- samples without a place


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"background": {"file": "coarse.nc"}}, "a file holds days"),
        ({"impose": [{"variable": "rain", "box": {"lat": [0, 4], "lon": [0, 4]}, "above_quantile": 0.9}]}, "no latitude and longitude"),
        ({"observe": [{"variable": "rain", "lat": 1.0, "lon": 1.0, "value": 1.0, "error": 0.1}]}, "no latitude and longitude"),
        (TWO_DAYS, "period: the samples of climate/radar lie along patch and have no dates"),
    ],
)
def test_patches_have_neither_place_nor_date(tmp_path, said, says):
    rain = np.random.default_rng(0).gamma(1.0, size=(6, 8, 8)).astype(np.float32)
    coords = {"centre": ("patch", np.arange(6) / 6), "lat": np.arange(8), "lon": np.arange(8)}
    domain = twin(
        name="climate/radar",
        dataset=xr.Dataset({"rain": (("patch", "lat", "lon"), rain, {"units": "mm h-1"})}, coords),
        quantities={"rain": climate.Quantity("mm h-1", "rain rate")},
        splits={"train": [{"centre": [0.0, 0.5]}], "test": [{"centre": [0.6, 1.0]}]},
        season=False,
        background=climate.Background(factor=2, climatology=False, regression="none"),
    )
    held_out = {"background": {"held_out": True}}
    assert domain.ask(asked(**held_out), tmp_path).condition["coarse_rain"].shape == (2, 4, 4)
    with pytest.raises(BadInput, match=says):
        domain.ask(asked(**{**held_out, **said}), tmp_path)


def test_a_model_without_conditions_is_asked_for_a_number_of_samples(tmp_path):
    question = twin(season=False).ask(asked(**TWO_DAYS), tmp_path)
    assert list(question.condition) == ["number"] and question.condition["number"].shape == (2,)


# ---------------------------------------------------------------- what-ifs


def forced(name: str, attrs: dict[str, str], **changed) -> climate.Climate:
    dataset = days().assign_coords({name: ("time", 300 + np.arange(365) % 3 * 100.0 if name == "co2" else np.arange(365) % 2 * 1.0, attrs)})
    return twin(dataset=dataset, forcing=name, **changed)


def test_a_forcing_of_any_name(tmp_path):
    domain = forced("co2", {"units": "ppm", "long_name": "carbon dioxide"})
    question = domain.ask(asked(forcing=400.0, **TWO_DAYS), tmp_path)
    assert question.condition["co2"].tolist() == [400.0, 400.0] and not any("outside" in note for note in question.notes)
    beyond = domain.ask(asked(forcing=800.0, **TWO_DAYS), tmp_path)
    assert any("carbon dioxide = 800 ppm lies outside the training data (300 to 500 ppm)" in note for note in beyond.notes)
    for said, says in (
        ({}, "expected a forcing, climate/toy was trained with co2 from 300 to 500 ppm"),
        ({"sst_offset": 1.0}, "sst_offset is set, but climate/toy was not trained with one; give co2 as forcing"),
        ({"sst_offset": 1.0, "forcing": 400.0}, "expected one of sst_offset and forcing, got both"),
    ):
        with pytest.raises(BadInput, match=says):
            domain.ask(asked(**said, **TWO_DAYS), tmp_path)
    with pytest.raises(BadInput, match="forcing is set, but climate/toy was not trained with one"):
        twin().ask(asked(forcing=400.0, **TWO_DAYS), tmp_path)


def test_the_warming_of_the_sea_surface_has_a_name_of_its_own(tmp_path):
    domain = forced("sst_offset", {})
    for said, value in (({}, 0.0), ({"sst_offset": 2.0}, 2.0), ({"forcing": 2.0}, 2.0)):
        question = domain.ask(asked(**said, **TWO_DAYS), tmp_path)
        assert question.condition["sst_offset"].tolist() == [value, value]
        told = [note for note in question.notes if "A warming of +2 K lies outside the training data (+0 to +1 K)" in note]
        assert len(told) == (value > 1)
    with pytest.raises(BadInput, match="expected a warming from -10 to 10 K, got 11"):
        domain.ask(asked(forcing=11.0, **TWO_DAYS), tmp_path)


def test_held_out_days_keep_their_own_forcing(tmp_path):
    domain = forced("co2", {}, background=COARSE)
    question = domain.ask(asked(background={"held_out": True}), tmp_path)
    np.testing.assert_array_equal(question.condition["co2"], domain.dataset["co2"].values[domain.rows("test")])


def test_the_season_of_a_threshold_closes_on_itself(tmp_path):
    impose = [{"variable": "tas", "box": {"lat": [-90, 90], "lon": [0, 360]}, "above_quantile": 0.995}]
    domain = twin(dataset=days(count=366), splits={"train": [{"time": ["2001", "2001"]}], "test": [{"time": ["2002", "2002"]}]})
    new_year = {"start": "2001-01-01", "end": "2001-01-01"}
    threshold = domain.ask(asked(impose=impose, period=new_year), tmp_path).condition["threshold0"]
    series = domain.dataset["tas"].values[:365].astype(np.float64).mean(2)[:, 0]  # the same in every row
    day = np.asarray(domain.conditions(np.arange(365))["day_of_year"])
    near = np.minimum(day, means.YEAR - day) <= means.SEASON
    assert near[0] and near[-1] and not near.all()
    assert threshold[0] == pytest.approx(np.quantile(series[near], 0.995), abs=1e-3)


# ---------------------------------------------------------------- pictures and words of the answer


def test_a_quantile_is_not_rounded(tmp_path):
    impose = [{"variable": "tas", "box": {"lat": [-90, 90], "lon": [0, 90]}, "above_quantile": 0.995}]
    domain = forced("co2", {"units": "ppm", "long_name": "carbon dioxide"})
    scenario = asked(impose=impose, forcing=400.0, **TWO_DAYS)
    rows = figures._asked(domain, scenario, domain.ask(scenario, tmp_path)).tables["The question"]
    assert any("above the 99.5% quantile" in value for _, value in rows) and ["Carbon dioxide", "400 ppm"] in rows


@pytest.mark.parametrize("edges", [(0, 360), (-180, 180)])
def test_a_box_of_all_longitudes_shows_them_all(edges):
    around = figures._around(twin(), questions.Box(lat=(-20, 20), lon=edges))
    assert around is not None
    rows, columns = around
    assert LATITUDE[rows].tolist() == [-30, -10, 10, 30]
    assert LONGITUDE[columns].tolist() == ((LONGITUDE + edges[0]) % 360).tolist()


def test_a_narrow_box_shows_its_surroundings_from_west_to_east():
    around = figures._around(twin(), questions.Box(lat=(-20, 20), lon=(-30, 30)))
    assert around is not None and LONGITUDE[around[1]].tolist() == [300, 330, 0, 30, 60]


# ---------------------------------------------------------------- the benchmark


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_climate", Path(__file__).parents[1] / "benchmarks" / "climate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(spec.origin or "").parent)
        spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def trainer(bench, monkeypatch, tmp_path):
    """A training that reaches a step and takes some seconds of CPU; called with both, it says what the benchmark recorded."""
    clock, plan = [0.0], {}
    model = tmp_path / "model"
    monkeypatch.setattr(cli, "_compose", lambda words: words)
    monkeypatch.setattr(run, "resolve", lambda composed: composed)
    monkeypatch.setattr(run, "places", lambda config: SimpleNamespace(model=model))
    monkeypatch.setattr(bench, "_spent", lambda: clock[0])

    def twinsim(verb, words):
        clock[0] += plan["seconds"]
        if plan["step"]:
            (model / "checkpoints" / str(plan["step"])).mkdir(parents=True, exist_ok=True)
        if plan["stopped"]:
            sys.exit("stopped")

    monkeypatch.setattr(bench, "_twinsim", twinsim)

    def train(step: int, seconds: float, stopped: bool = False) -> float | None:
        plan.update(step=step, seconds=seconds, stopped=stopped)
        return bench.train(["domain=climate/racmo"])

    train.record = model / "training-cpu-s.json"
    return train


def test_seconds_of_a_training_are_those_of_all_its_parts(trainer):
    with pytest.raises(SystemExit):
        trainer(0, 5.0, stopped=True)  # nothing was saved: it begins anew
    with pytest.raises(SystemExit):
        trainer(100, 50.0, stopped=True)
    assert trainer(200, 70.0) == 120.0
    assert trainer(200, 9.0) == 120.0  # found trained
    assert json.loads(trainer.record.read_text()) == 120.0


def test_seconds_of_a_training_are_not_known_once_a_part_went_unmeasured(trainer, bench, monkeypatch):
    trainer(100, 50.0)
    assert trainer.record.exists()
    with monkeypatch.context() as killed:
        killed.setattr(bench, "_twinsim", lambda *_: pytest.fail("the record is still there") if trainer.record.exists() else None)
        killed.setattr(Path, "write_text", lambda *_: 0)  # the benchmark itself was killed
        bench.train([])
    assert trainer(200, 70.0) is None


def test_seconds_of_a_training_begun_elsewhere_are_not_known(trainer):
    trainer(100, 50.0)
    trainer.record.unlink()
    assert trainer(100, 9.0) is None and trainer(200, 70.0) is None
    assert not trainer.record.exists()


def test_the_table_says_what_was_not_measured(bench):
    scored = {"value": 1.0, "ideal": 1.0, "units": "1"}
    lines = {target.score: {**scored} for target in bench.TASKS["generate"] if not target.score.startswith("pr")}
    uniform = "days of the season, shifted uniformly"
    result = {"seeds": [0, 1], "training_cpu_s": [None, 120.0], "scores": [{"twinsim": lines, uniform: lines}] * 2}
    table = bench.table("generate", result)
    assert "2.0 CPU minutes of training (1 of 2 seeds measured)" in table[0]
    assert "| pr: change of the mean, ratio | - | - | 0.8 to 1.2 | **no** |" in table
    assert f"| pr: pattern error of the change | - | - | < - ({uniform}) | **no** |" in table
    assert any(line.startswith("| tas: change of the mean, ratio | 1 ± 0 | 1 (") and line.endswith("| yes |") for line in table)
    assert "CPU time of training not measured" in bench.table("generate", {**result, "training_cpu_s": [None, None]})[0]
    without = {"seeds": [0], "training_cpu_s": [60.0], "scores": [{"twinsim": {}}]}
    assert "| membership-inference AUC | - | - | interval contains 0.5 | **no** |" in bench.table("ncep", without)


def test_cost_is_measured_by_turns(bench, monkeypatch, tmp_path):
    clock, order = [0.0], []

    def simulate(folder, days, spinup_days, progress):
        for block in range(days // speedy.BLOCK_DAYS):
            clock[0] += 100.0 if block == 0 else 20.0  # the first compiles
            order.append("simulated")
            progress((block + 1) * speedy.BLOCK_DAYS, days)

    def draw(trained, question, settings, seed, store, identity, update):
        assert not store.exists()
        clock[0] += 50.0 if seed == 0 else 4.0
        order.append("drawn")

    question = SimpleNamespace(members=8, coords={"time": ("time", np.arange(5))})
    domain = SimpleNamespace(exam=lambda members, most: (question, None))
    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(speedy, "simulate", simulate)
    monkeypatch.setattr(cli, "_compose", lambda words: words)
    monkeypatch.setattr(run, "resolve", lambda composed: composed)
    monkeypatch.setattr(run, "training", lambda config, progress: SimpleNamespace(domain=domain))
    monkeypatch.setattr(run, "drawing_settings", lambda config: None)
    monkeypatch.setattr(run, "draw", draw)
    assert bench.cost(tmp_path) == {"simulated_day_cpu_s": 2.0, "generated_state_cpu_s": 0.1}
    assert order == ["simulated", "drawn"] * 4


def test_the_coarse_decade_is_made_of_block_means_and_comes_back_from_its_file(tmp_path):
    spec = importlib.util.spec_from_file_location("coarse_decade", Path(__file__).parents[1] / "scripts" / "coarse_decade.py")
    decade = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(decade)
    random = np.random.default_rng(0)
    fields = {"tas": 280 + 20 * random.normal(size=(3, 8, 16)), "pr": random.exponential(3.0, (3, 8, 16))}
    run = xr.Dataset(
        {name: (("time", "lat", "lon"), values, {"units": "K" if name == "tas" else "mm day-1"}) for name, values in fields.items()},
        {"time": xr.date_range("2000-04-05", periods=3), "lat": np.linspace(-70, 70, 8), "lon": np.arange(16) * 22.5},
    )
    decade.write(decade.coarse(run), tmp_path / "coarse.nc")
    with xr.open_dataset(tmp_path / "coarse.nc") as back:
        assert back.sizes == {"time": 3, "lat": 2, "lon": 4} and back["lon"].values[0] == 33.75
        for name, values in fields.items():
            np.testing.assert_allclose(back[name][1, 1, 2], values[1, 4:, 8:12].mean(), atol=0.051)  # half a rounding step
