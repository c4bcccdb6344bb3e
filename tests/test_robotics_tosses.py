"""Simulated tosses obey the laws of falling and sliding, parameters that made tosses are found again, and bad recordings are refused."""

import json
import os
from pathlib import Path

import mujoco
import numpy as np
import pytest

from domains.robotics import tosses
from domains.robotics.tosses import DEFAULT, Tosses
from twinsim import run
from twinsim.base import BadInput

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")) / "data/robotics/contactnets_tosses_train.npz"
CUBE = Tosses((), 148.0, 0.0524, 0.37, 8.1e-4, 0.18)
TRUE = DEFAULT | {"friction": 0.2, "time_constant": 0.006}


def starts(count: int, seed: int = 0) -> np.ndarray:
    """Thrown level, turning, 7 cm above the table."""
    draw = np.random.default_rng(seed)
    state = np.zeros((count, 13))
    state[:, 2], state[:, 3:7] = 0.14, draw.normal(size=(count, 4))
    state[:, 3:7] /= np.linalg.norm(state[:, 3:7], axis=1, keepdims=True)
    state[:, 7:9], state[:, 10:13] = draw.normal(0, 0.8, (count, 2)), draw.normal(0, 2, (count, 3))
    return state


def made(count: int = 6, frames: int = 60, values: dict = TRUE) -> Tosses:
    """Tosses that the simulator itself threw; velocities are those of the start throughout, which nothing but the start is read from."""
    first = starts(count)
    poses = tosses.simulate(first, [frames] * count, CUBE, values)
    states = tuple(np.column_stack([pose, np.tile(start[7:], (frames, 1))]) for pose, start in zip(poses, first, strict=True))
    return Tosses(states, CUBE.rate, CUBE.half_width, CUBE.mass, CUBE.inertia, 0.18)


def write(path: Path, recorded: Tosses, **changed) -> Path:
    arrays = {
        "state": np.concatenate(recorded.states).astype(np.float32),
        "length": np.array([len(state) for state in recorded.states]),
        "rate_hz": recorded.rate, "half_width_m": recorded.half_width, "mass_kg": recorded.mass, "inertia_kgm2": recorded.inertia,
        "mu_paper": recorded.published,
    }  # fmt: skip
    np.savez(path, **{name: value for name, value in (arrays | changed).items() if value is not None})
    return path


# ---------------------------------------------------------------- the simulator


def test_flat_cube_slides_as_far_as_coulomb_says():
    start = np.zeros((1, 13))
    start[0, [2, 3, 7]] = 0.0524 - 2e-4, 1.0, 0.8  # pressed in a little, so that it does not hop
    (pose,) = tosses.simulate(start, [120], CUBE, DEFAULT | {"friction": 0.2, "time_constant": 0.004})
    assert pose[-1, 0] == pytest.approx(0.8**2 / (2 * 0.2 * tosses.GRAVITY), rel=0.03)  # contact is soft: it creeps


def test_free_fall_is_gravity_and_the_recorder_changes_only_what_it_says():
    start = np.zeros((1, 13))
    start[0, [2, 3, 7, 12]] = 1.0, 1.0, 1.0, 2.0
    time = 20 / CUBE.rate
    plain, late = (
        tosses.simulate(start, [21], CUBE, DEFAULT | more)[0][-1] for more in ({}, {"lag": 0.5, "speed_gain": 0.99, "length_scale": 0.98})
    )
    assert 1 - plain[2] == pytest.approx(tosses.GRAVITY * time**2 / 2, rel=0.01)  # a tenth of a frame a step
    assert plain[0] == pytest.approx(time) and late[0] == pytest.approx(0.99 * time)
    g = 0.98 * tosses.GRAVITY
    assert 1 - late[2] == pytest.approx(g * time**2 / 2 + 0.5 * g / CUBE.rate * time, rel=0.01)
    assert 2 * np.arccos(plain[3]) == pytest.approx(2 * time, rel=1e-6)


def test_each_toss_has_values_of_its_own_and_the_next_does_not_inherit_them():
    first = starts(3)
    apart = tosses.simulate(first, [40, 50, 60], CUBE, [TRUE, {"friction": 0.6}, TRUE])
    alike = tosses.simulate(first, [40, 50, 60], CUBE, TRUE)
    assert [len(pose) for pose in apart] == [40, 50, 60]
    assert (apart[0] == alike[0]).all() and (apart[2] == alike[2]).all() and (apart[1] != alike[1]).any()


def test_errors_are_nought_for_what_made_them_and_those_of_a_shift_are_known():
    recorded = made()
    assert max(np.abs(each).max() for each in tosses.judge(recorded, TRUE)) < 1e-5
    shifted = [state[:, :7] + np.array([0.0524, 0, 0, 0, 0, 0, 0]) for state in recorded.states]
    found = tosses.errors(shifted, recorded)
    np.testing.assert_allclose(found.position, 50)  # half a width
    np.testing.assert_allclose(found.final, 0.0524)
    np.testing.assert_allclose(found.rotation, 0, atol=1e-5)  # arccos near 1


def test_parameters_that_made_the_tosses_are_found_again():
    recorded = made(4, 50)
    found = tosses.fit(recorded, ["friction"], fixed={"time_constant": 0.006}, evaluations=24, batch=4)
    assert found.values["friction"] == pytest.approx(0.2, rel=0.03)
    assert 0.1 < found.low["friction"] <= found.high["friction"] < 0.3
    assert found.values["time_constant"] == 0.006 and found.least[-1] <= found.least[0]


def flown(scale: float, lag: float, speed_gain: float, spin_gain: float) -> Tosses:
    """Free flights by hand, 20 frames from 0.4 m, as a recorder with these faults would have them."""
    states, draw = [], np.random.default_rng(1)
    time = np.arange(20) / CUBE.rate
    g = scale * tosses.GRAVITY
    for _ in range(5):
        state = np.zeros((20, 13))
        velocity, spin = draw.normal(0, 1, 2), draw.normal(0, 2, 3)
        state[:, :2], state[:, 2] = time[:, None] * velocity, 0.4 - g * time**2 / 2
        rate = np.linalg.norm(spin)
        state[:, 3], state[:, 4:7] = np.cos(rate * time / 2), np.sin(rate * time / 2)[:, None] * spin / rate
        state[:, 7:9], state[:, 9] = velocity / speed_gain, -g * (time - lag / CUBE.rate)
        state[:, 10:] = spin / spin_gain
        states.append(state)
    return Tosses(tuple(states), CUBE.rate, CUBE.half_width, CUBE.mass, CUBE.inertia)


def test_faults_of_a_recorder_are_measured_in_free_flight_and_made_good():
    recorded = flown(0.978, 0.5, 0.992, 1.03)
    found = tosses.recorder(recorded)
    np.testing.assert_allclose([found[name] for name in tosses.RECORDER], [0.978, 0.5, 0.992, 1.03], rtol=1e-6)
    assert tosses.judge(recorded, found).position.max() < 0.3 < tosses.judge(recorded, {}).position.max()  # ten steps a frame
    lying = Tosses(tuple(state[-3:] * [1, 1, 0, *[1] * 10] for state in recorded.states), 148.0, 0.0524, 0.37, 8.1e-4)
    assert tosses.recorder(lying) == {name: about.default for name, about in tosses.RECORDER.items()}  # nothing flew


# ---------------------------------------------------------------- files


def test_file_is_read_as_it_was_written(tmp_path):
    recorded = made(3, 20)
    back = tosses.read(write(tmp_path / "t.npz", recorded))
    assert (back.rate, back.half_width, back.published) == (148.0, 0.0524, 0.18) and len(back.states) == 3
    np.testing.assert_allclose(np.concatenate(back.states), np.concatenate(recorded.states), rtol=1e-6, atol=1e-6)


def broken(column: int, value: float) -> np.ndarray:
    state = np.concatenate(made(3, 20).states)
    state[25, column] = value
    return state


def in_degrees() -> np.ndarray:
    state = np.concatenate(made(3, 20).states)
    state[:, 10:13] *= 180 / np.pi
    return state


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"state": broken(1, np.nan)}, "toss 1, frame 5: expected finite numbers"),
        ({"state": broken(3, 2.0)}, "toss 1, frame 5: expected a unit quaternion"),
        ({"state": in_degrees()}, "expected angular velocities in rad/s"),
        ({"length": np.array([20, 20, 21])}, "lengths that add up to the 60 frames of state, they add up to 61"),
        ({"length": np.array([58, 1, 1])}, "at least 3 frames a toss, toss 1 has 1"),
        ({"length": np.array([20.0, 20.0, 20.0])}, "length: expected whole numbers"),
        ({"state": np.zeros((60, 7))}, r"state: expected floating-point numbers \[frame, 13\]"),
        ({"mass_kg": -1.0}, "mass_kg: expected one number above 0"),
        ({"rate_hz": None}, "rate_hz is missing"),
    ],
)  # fmt: skip
def test_recording_that_makes_no_sense_is_refused_in_a_sentence(tmp_path, changed, said):
    path = write(tmp_path / "t.npz", made(3, 20), **changed)
    with pytest.raises(BadInput, match=said) as refused:
        tosses.read(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "t.npz").write_text("no archive")
    for path in (tmp_path / "t.npz", tmp_path / "absent.npz", tmp_path):
        with pytest.raises(BadInput, match="expected an .npz"):
            tosses.read(path)
    np.savez(tmp_path / "objects.npz", state=np.array([{}], object))
    with pytest.raises(BadInput, match="plain arrays"):
        tosses.read(tmp_path / "objects.npz")


# ---------------------------------------------------------------- the verb


def test_command_writes_a_fit_that_mujoco_opens(tmp_path):
    from twinsim import cli

    path = write(tmp_path / "t.npz", made(5, 40))
    words = ["tosses", f"tosses={path}", "judged=2", "evaluations=16", "fit_to=[friction]", f"out={tmp_path / 'out'}"]
    assert cli.main(["calibrate", *words]) == 0
    answer = json.loads((tmp_path / "out/fit.json").read_text())
    assert answer["judged"] == 2 and set(answer["errors"]) == {"fitted", "no motion", "default", "published friction"}
    assert answer["errors"]["fitted"]["position_percent"] < answer["errors"]["default"]["position_percent"]
    assert set(answer["parameters"]) == set(tosses.PARAMETERS)
    model = mujoco.MjModel.from_xml_string((tmp_path / "out/contact.xml").read_text())
    assert model.geom_friction[0, 0] == pytest.approx(answer["parameters"]["friction"]["value"], rel=1e-5)
    assert len((tmp_path / "out/errors.csv").read_text().splitlines()) == 3
    assert (tmp_path / "out/tosses.svg").read_bytes().startswith(b"<?xml")
    run.record.verify(tmp_path / "out")


def test_more_is_judged_than_there_is(tmp_path):
    with pytest.raises(BadInput, match="judge by 1 to 4 of its 5 tosses"):
        tosses.calibrate_files(tmp_path / "out", tosses=str(write(tmp_path / "t.npz", made(5, 20))), judged=5)


@pytest.mark.skipif(not REAL.exists(), reason=f"no recorded tosses at {REAL}")
def test_real_tosses_prefer_the_published_friction_to_the_default():
    recorded = tosses.read(REAL)
    assert len(recorded.states) == 470 and sum(map(len, recorded.states)) == 49678
    some = recorded.part(slice(0, 370, 74))
    default, published = (tosses.judge(some, DEFAULT | more).means()["position_percent"] for more in ({}, {"friction": recorded.published}))
    assert published < 30 < default
