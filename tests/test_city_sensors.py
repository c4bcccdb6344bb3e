"""Windows of sensors by time: closed forms, inverses, gaps that may not count, and files that are not as they should be."""

import gzip
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from building import rough_jit

from domains.city import kriging, records
from domains.city.sensors import Calendar, Observe, Quantity, Sensors, SensorScenario, Weather, ask
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared"))
METR = SHARED / "data" / "mobility" / "sensors" / "metr_la_week" / "los_speed.csv.gz"
MARYLEBONE = SHARED / "data" / "mobility" / "airquality" / "london_marylebone_1998_2004h1.csv.gz"
DAYS, STEPS = 14, 48  # of half an hour


@pytest.fixture(autouse=True)
def many():
    with jax.numpy_rank_promotion("allow"):
        yield


def record(noise: float = 1.0, sensors: int = 3, seed: int = 0) -> np.ndarray:
    """Speeds `[time, sensor]` that have their hour and kind of day, and a remainder of AR(1) that the sensors share."""
    draw = np.random.default_rng(seed)
    time = np.arange(DAYS * STEPS)
    usual = 50 + 8 * np.cos(2 * np.pi * (time % STEPS) / STEPS) * np.where(time // STEPS % 7 >= 5, 0.3, 1.0)
    rest = np.zeros(len(time))
    for step in range(1, len(time)):
        rest[step] = 0.9 * rest[step - 1] + draw.normal()
    return usual[:, None] + noise * (rest[:, None] + 0.3 * draw.normal(size=(len(time), sensors)))


def twin(values: np.ndarray, **changes) -> Sensors:
    times = np.datetime64("2012-03-05T00:00", "ns") + np.arange(len(values)) * np.timedelta64(30, "m")
    names = [f"s{i}" for i in range(values.shape[1])]
    dataset = xr.Dataset({"speed": (("time", "sensor"), values.astype(np.float32))}, {"time": times, "sensor": names})
    given = {"window": 8, "past": 4, "stride": 2, "factors": 2, "modes": 4, "fold_steps": STEPS, "calendar": Calendar(knots=24)}
    return Sensors("city/test", dataset, {"speed": Quantity("mph", "speed", 0, 150)}, **{**given, **changes})


@pytest.fixture(scope="module")
def toy():
    with jax.numpy_rank_promotion("allow"):
        values = record()
        values[np.random.default_rng(1).random(values.shape) < 0.1] = np.nan
        domain = twin(values)
        return domain, domain.fit()


# ---------------------------------------------------------------- the Gaussian model


@pytest.fixture(scope="module")
def model():
    draw = np.random.default_rng(3)
    state = np.zeros((400, 3))
    for step in range(1, 400):
        state[step] = 0.8 * state[step - 1] + draw.normal(size=3) @ np.array([[1, 0.8, 0.2], [0, 0.5, 0], [0, 0, 0.4]])
    return kriging.fit(state, np.ones(state.shape, bool), np.arange(0, 390, 3), 6, 2, 4)


def dense(model) -> np.ndarray:
    """The model's covariance, `[sensor * time, sensor * time]`."""
    load = np.einsum("ij,tb,jbx->itjx", model["patterns"], model["basis"], model["root"]).reshape(18, -1)
    whole = load @ load.T
    for i in range(3):
        whole[6 * i : 6 * i + 6, 6 * i : 6 * i + 6] += model["rest"][i]
    return whole


def test_draws_given_some_cells_have_the_mean_and_covariance_of_the_textbook(model):
    """Conditioning of a joint Gaussian by dense matrices; 20000 draws, tolerance five standard errors."""
    draw = np.random.default_rng(0)
    given = (draw.random((3, 6)) < 0.5).astype(np.float32)
    known = (given * draw.normal(size=(3, 6))).astype(np.float32)
    told = kriging.posterior(model, known, given)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), 2)
    u, e = jax.random.normal(keys[0], (count, 8)), jax.random.normal(keys[1], (count, 3, 6))
    drawn = np.asarray(jax.jit(jax.vmap(lambda u, e: kriging.from_noise(model, told, known, given, u, e)))(u, e))
    assert np.abs(drawn - known)[:, given > 0].max() < 1e-4
    covariance, g = dense(model), given.ravel() > 0
    weight = covariance[~g][:, g] @ np.linalg.inv(covariance[g][:, g])
    mean, left = weight @ known.ravel()[g], covariance[~g][:, ~g] - weight @ covariance[g][:, ~g]
    free = drawn.reshape(count, -1)[:, ~g]
    error = 5 * np.sqrt(np.diag(left) / count)
    assert (np.abs(free.mean(0) - mean) < error).all()
    scale = np.sqrt(np.outer(np.diag(left), np.diag(left)))
    assert np.abs(np.cov(free.T) - left).max() < 5 * np.sqrt(2 / count) * scale.max()


def test_factorisation_is_that_of_numpy():
    root = np.random.default_rng(0).normal(size=(9, 9))
    matrix = (root @ root.T + np.eye(9)).astype(np.float32)
    lower, inverse = kriging.factorised(jnp.asarray(matrix))
    np.testing.assert_allclose(lower, np.linalg.cholesky(matrix), atol=1e-4)
    np.testing.assert_allclose(inverse @ lower, np.eye(9), atol=1e-4)


def test_noise_is_the_inverse_of_a_draw_at_measured_cells_and_never_looks_at_the_others(model):
    draw = np.random.default_rng(2)
    measured = (draw.random((3, 6)) < 0.8).astype(np.float32)
    given = measured * (draw.random((3, 6)) < 0.5)
    values = draw.normal(size=(3, 6)).astype(np.float32)
    told = kriging.posterior(model, values, given)
    found = [kriging.to_noise(model, told, np.where(measured > 0, values, wrong), measured, jax.random.key(0)) for wrong in (0.0, 1e3)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    back = kriging.from_noise(model, told, values, given, *found[0])
    np.testing.assert_allclose(np.asarray(back)[measured > 0], values[measured > 0], atol=1e-3)


# ---------------------------------------------------------------- the twin


def test_a_record_that_is_its_climatology_leaves_nothing():
    domain = twin(record(noise=0.0))
    statistics, anomaly = domain._usual_fit
    condition = domain.conditions_of(domain.starts("train"))
    usual = np.asarray(domain._restored(statistics, domain._expected(statistics, condition)[0]))
    rows = domain.starts("train")[:, None] + np.arange(domain.window)
    # a ridge of one step on ten days of an hour shrinks by a tenth at most; knots of an hour bend a cosine of 8 mph by 0.07
    assert np.abs(usual - np.swapaxes(domain.values[rows], 1, 2)).max() < 1.2
    assert np.isfinite(anomaly).all()


def test_decode_gives_back_what_was_measured(toy):
    domain, statistics = toy
    starts = domain.starts("test")[:3]
    condition = domain.conditions(starts, domain.shown(starts, "gaps", share=0.5))
    anomaly = domain._anomaly(statistics, condition, starts)
    values, measured = domain.windows(starts)
    encode, decode = rough_jit(domain._example), rough_jit(domain.decode)
    for row in range(3):
        one = {name: np.asarray(each)[row] for name, each in condition.items()}
        example = encode(statistics, one, anomaly[row], measured[row].astype(np.float32), jax.random.key(row))
        back = np.asarray(decode(statistics, example.target, one)["speed"])
        table = statistics["tables"]
        inside = measured[row] & (values[row] > table[:, :1]) & (values[row] < table[:, -1:])
        np.testing.assert_allclose(back[inside], values[row][inside], atol=2e-2)
        given = one["is_given_speed"] > 0
        np.testing.assert_array_equal(back[given], values[row][given])


def test_tasks_show_what_they_say(toy):
    domain, _ = toy
    starts = domain.starts("test")
    forecast = domain.shown(starts, "forecast", without=["s1"])
    assert forecast[:, [0, 2], :4].all() and not forecast[:, :, 4:].any() and not forecast[:, 1].any()
    assert not domain.shown(starts, "none").any()
    lost = domain.shown(starts, "sensors", share=0.34).all(2)
    assert (lost.sum(1) == 2).all()
    assert abs(domain.shown(starts, "gaps", share=0.3).mean() - 0.7) < 0.1
    np.testing.assert_array_equal(domain.shown(starts, "practice")[5:], domain.shown(starts[5:], "practice"))
    _, measured = domain.windows(starts)
    assert not (np.asarray(domain.conditions(starts, forecast)["is_given_speed"]) > measured).any()


def test_missing_cells_enter_neither_fit_nor_example_nor_score(toy):
    """A detector that says nonsense while it is out: everything is the same to the bit as with the nonsense marked missing."""
    domain, statistics = toy
    gone = ~domain.measured
    broken = twin(np.where(gone, np.nan, domain.values))
    vars(broken)["values"] = np.where(gone, np.float32(1e4), domain.values)  # broken on purpose: values stand in the gaps
    vars(broken)["measured"] = ~gone
    for a, b in zip(jax.tree.leaves(statistics), jax.tree.leaves(broken.fit()), strict=True):
        np.testing.assert_array_equal(a, b)
    blocks = [next(iter(each.examples(statistics))) for each in (domain, broken)]
    for a, b in zip(*blocks, strict=True):
        np.testing.assert_array_equal(a, b)
    question, truth = domain.exam(members=4, most=8)
    drawn = {"speed": np.repeat(truth["speed"][None], 4, 0) + np.arange(4, dtype=np.float32)[:, None, None, None]}
    measured = np.asarray(question.condition["measured_speed"]) > 0
    assert not measured.all()
    spoilt = {"speed": np.where(measured, truth["speed"], 1e4)}
    table, other = (domain.score(drawn, each, question.condition).table for each in (truth, spoilt))
    assert table == other and table["speed: MAE of the median"].value == pytest.approx(1.5)
    wrong = domain.score(drawn, spoilt, {**question.condition, "measured_speed": np.ones_like(measured)}).table
    assert wrong["speed: MAE of the median"].value > 100  # without the mask it would have counted


def test_silent_network_forecasts_better_than_climatology(toy):
    """A remainder of AR(1) with 0.9 a step: two hours ahead the Gaussian model keeps 0.1 to 0.8 of it, climatology nothing."""
    domain, statistics = toy
    question, truth = domain.exam(members=10, most=20)
    named = domain.baselines(statistics)
    scores = {who: domain.score(named[who](question.condition, 10, 0), truth, question.condition).table for who in named}
    assert scores["Gaussian model"]["speed: CRPS"].value < 0.9 * scores["days like it"]["speed: CRPS"].value
    assert 0.6 < scores["Gaussian model"]["speed: spread / skill"].value < 1.6


def test_scenarios(toy):
    domain, statistics = toy
    said = {"title": "t", "domain": "city/test", "asks": "a", "command": "c", "takes": "t", "expect": "e", "members": 2}
    with pytest.raises(BadInput, match="no sensor s9"):
        ask(domain, SensorScenario(**said, task="gaps", without=["s9"]))
    with pytest.raises(BadInput, match="start: expected every window to begin at a step of the held-out record"):
        ask(domain, SensorScenario(**said, task="forecast", start="2012-03-05T00:00"))
    with pytest.raises(BadInput, match="expected a date and time that exist"):
        ask(domain, SensorScenario(**said, task="none", start="2012-02-31T00:00"))
    with pytest.raises(BadInput, match="weather: expected task: none"):
        ask(domain, SensorScenario(**said, task="none", weather=Weather(wind_speed=1.0, wind_from=1.0)))
    with pytest.raises(BadInput, match="minute: expected a step of the window"):
        ask(domain, SensorScenario(**said, task="none", observe=[Observe(sensor="s0", minute=31, value=50, error=1)]))
    question = ask(domain, SensorScenario(**said, task="none", observe=[Observe(sensor="s1", minute=60, value=44, error=1)]))
    one = {name: jnp.asarray(values)[0] for name, values in question.condition.items()}
    (seen,) = question.constrain(lambda target: domain.decode(statistics, target, one), one)
    spec = domain.spec()
    middle = jnp.zeros((*spec.grid, spec.channels))
    assert seen.operator(middle).shape == (1,) and float(seen.value[0]) == 44
    assert float(question.misses(domain.decode(statistics, middle, one), one)) > 0
    elsewhere = ask(domain, SensorScenario(**said, task="none", start="2031-01-01T00:00", windows=2))
    assert np.asarray(elsewhere.condition["hour"]).shape == (2, 8) and elsewhere.truth is None


# ---------------------------------------------------------------- what comes from outside


def test_twin_names_what_is_wrong():
    values = record()
    empty = values.copy()
    empty[:, 1] = np.nan
    with pytest.raises(BadInput, match="sensor s1: expected values in the training split, all are missing"):
        twin(empty)
    with pytest.raises(BadInput, match="0 < past < window"):
        twin(values, past=8)
    with pytest.raises(BadInput, match="each weekday 0 to 6 once"):
        Calendar(kinds_of_day=[[0, 1]])
    with pytest.raises(BadInput, match="wind_speed: expected a value at every time"):
        twin(values, calendar=Calendar(wind=True))
    with pytest.raises(BadInput, match="task 'all'"):
        twin(values, practice={"all": 1.0})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n60,50\n61\n", "line 3: expected 2 values"),
        ("a,b\n60,50\n61,fast\n", "line 3: b: expected a number or nothing, got 'fast'"),
        ("a,b\n60,50\n61,900\n", "line 3: sensor b: expected a speed of 0 .missing. to 150 mph, got 900"),
        ("a,a\n60,50\n61,50\n", "line 1: expected the names of the columns, each once"),
        ("a,b\n60,50\n", "expected two time steps or more"),
        ("time,a\n2012-03-01T00:05,60\n2012-03-01T00:00,61\n", "expected times in order"),
        ("time,a\nnoon,60\n2012-03-01T00:00,61\n", "expected an ISO time"),
    ],
)
def test_loop_files_that_are_wrong(tmp_path, text, said):
    path = tmp_path / "loops.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        records.loops(str(path))


def test_loop_file_is_read_with_zeros_as_missing(tmp_path):
    path = tmp_path / "loops.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n60,0\n61.5,50\n"))
    made = records.loops(str(path), step_minutes=10)
    assert np.isnan(made["speed"].values[0, 1]) and made["speed"].values[1, 0] == 61.5
    assert (made["time"].values[1] - made["time"].values[0]) == np.timedelta64(10, "m")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date,ws,wd,no2\n2001-01-01T00:00:00Z,1,2,3\n2001-01-01T01:00:00Z,1,2,3\n", "expected a column nox"),
        ("date,ws,wd,nox\n2001-01-01T01:00:00Z,1,2,3\n2001-01-01T00:00:00Z,1,2,3\n", "expected times in order"),
        ("date,ws,wd,nox\n2001-01-01T00:00:00Z,1,2,3\n2001-01-01T01:00:00Z,1,2,-3\n", "line 3: nox: expected at least 0"),
        ("date,ws,wd,nox\n2001-01-01T00:00:00Z,,2,3\n2001-01-01T01:00:00Z,,2,3\n", "ws: expected values, all are missing"),
    ],
)
def test_roadside_files_that_are_wrong(tmp_path, text, said):
    path = tmp_path / "air.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=said):
        records.roadside(str(path), species=["nox"])


def test_synthetic_records_keep_their_laws():
    speeds, air = records.corridor(), records.street()
    free = np.nanquantile(speeds["speed"].values, 0.5)
    assert 62 < free < 68 and np.nanmin(speeds["speed"].values) >= 0  # 29 m/s are 64.9 mph
    assert 0.02 < np.isnan(speeds["speed"].values).mean() < 0.04
    both = np.isfinite(air["nox"].values) & np.isfinite(air["no2"].values)
    assert (air["no2"].values[both] <= air["nox"].values[both]).all()


@pytest.mark.skipif(not METR.is_file(), reason=f"there is no file {METR}")
def test_metr_la_week_is_what_is_published():
    """Persistence and the historic average 60 min ahead on the last fifth: 5.77 and 5.15 mph."""
    speed = records.loops(str(METR))["speed"].values
    border = int(len(speed) * 0.8)
    usual = np.stack([np.nanmean(speed[:border][first::288], 0) for first in range(288)])
    true, held = speed[border + 12 :], speed[border:-12]
    assert np.nanmean(np.abs(true - held)) == pytest.approx(5.77, abs=0.01)
    assert np.nanmean(np.abs(true - usual[np.arange(border + 12, len(speed)) % 288])) == pytest.approx(5.15, abs=0.01)


@pytest.mark.skipif(not MARYLEBONE.is_file(), reason=f"there is no file {MARYLEBONE}")
def test_marylebone_is_read():
    air = records.roadside(str(MARYLEBONE))
    assert air.sizes["time"] == 56_952 and np.isfinite(air["wind_speed"].values).all()
    assert np.nanmean(air["no2"].values) == pytest.approx(48.1, abs=0.1) and not (air["nox"].values == 0).any()
