"""The posterior of a contact: its features know no heading, and its exam tells honest draws from sure ones."""

from pathlib import Path

import numpy as np
import pytest

from domains.robotics import posterior, tosses
from domains.robotics.posterior import FRAMES, PRIOR, Contacts, ContactScenario
from twinsim.base import BadInput

ASKED = {"title": "t", "domain": "robotics/tosses", "asks": "a", "command": "c", "takes": "t", "expect": "e", "members": 5, "seed": 0}


@pytest.fixture(scope="module")
def contacts() -> Contacts:
    return Contacts("robotics/tosses", groups=60, tested=20, pooled=2, components=6)


def thrown(count: int, friction: float) -> list[np.ndarray]:
    starts = posterior.Throws().draw(count, np.random.default_rng(5))
    return tosses.simulate(starts, [FRAMES] * count, posterior.CUBE, {"friction": friction, "time_constant": 0.006}, posterior.STEPS)


def recording(path: Path, count: int, **changed) -> Path:
    poses = thrown(count, 0.2)
    state = np.concatenate([np.column_stack([pose, np.zeros((FRAMES, 6))]) for pose in poses]).astype(np.float32)
    about = {"rate_hz": 148.0, "half_width_m": 0.0524, "mass_kg": 0.37, "inertia_kgm2": 8.1e-4} | changed
    np.savez(path, state=state, length=np.full(count, FRAMES), **about)
    return path


def test_features_know_neither_place_nor_heading():
    (pose,) = thrown(1, 0.2)
    turn = np.array([np.cos(0.4), 0, 0, np.sin(0.4)])
    moved = np.column_stack([posterior.turned(turn, pose[:, :3]) + [3.0, -2.0, 0.0], posterior.times(turn[None], pose[:, 3:7])])
    np.testing.assert_allclose(posterior.features(moved, posterior.CUBE), posterior.features(pose, posterior.CUBE), atol=1e-4)


def test_features_know_no_size_of_the_cube_as_froude_says():
    (pose,) = thrown(1, 0.2)
    large = tosses.Tosses((), 148.0 / np.sqrt(4.0), 4 * 0.0524, 1.0, 1.0)  # lengths times 4, times of a frame times 2
    grown = np.column_stack([4 * pose[:, :3], pose[:, 3:7]])
    np.testing.assert_allclose(posterior.features(grown, large), posterior.features(pose, posterior.CUBE), rtol=1e-3, atol=1e-4)


def test_rougher_contact_is_seen_to_stop_sooner():
    smooth, rough = (np.mean([posterior.features(pose, posterior.CUBE) for pose in thrown(6, friction)], 0) for friction in (0.1, 0.5))
    gone = len(posterior.SEEN) - 1
    assert rough[gone] < 0.7 * smooth[gone]


def test_throws_begin_with_unit_quaternions_above_the_ground_and_roll_forwards():
    state = posterior.Throws().draw(500, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(state[:, 3:7], axis=1), 1)
    assert (state[:, 2] > posterior.CUBE.half_width).all()
    spin = posterior.turned(state[:, 3:7], state[:, 10:13])  # in the world
    along = state[:, 7:9] / np.linalg.norm(state[:, 7:9], axis=1, keepdims=True)
    assert np.mean(spin[:, 1] * along[:, 0] - spin[:, 0] * along[:, 1]) == pytest.approx(2.0, abs=0.3)


def test_shares_are_the_inverse_and_scores_are_normal_over_the_prior():
    share = np.random.default_rng(0).random((400, len(PRIOR)))
    parameters = posterior.physical(share)
    np.testing.assert_allclose(posterior.shares(parameters.astype(np.float32)), share, atol=1e-5)
    scores = posterior.normal_scores(parameters.astype(np.float32))
    assert abs(scores.mean()) < 0.1 and scores.std() == pytest.approx(1, abs=0.1)


def test_exam_tells_honest_draws_from_sure_ones(contacts):
    random = np.random.default_rng(0)
    count, members = 300, 60
    centre, true = random.normal(size=(2, count, len(PRIOR))) * [[[1.0]], [[0.3]]]
    honest = centre + 0.3 * random.normal(size=(members, count, len(PRIOR)))
    sure = centre + 0.1 * random.normal(size=(members, count, len(PRIOR)))
    as_sample = lambda x: {name: np.exp(x[..., n]) for n, name in enumerate(PRIOR)}  # noqa: E731
    (good, bad) = (contacts.score(as_sample(drawn), as_sample(centre + true), {}).table for drawn in (honest, sure))
    for name in PRIOR:
        assert good[f"{name}: truth within the 90 % interval"].value == pytest.approx(0.9, abs=0.06)
        assert bad[f"{name}: truth within the 90 % interval"].value < 0.6
        assert good[f"{name}: CRPS of the logarithm"].value < bad[f"{name}: CRPS of the logarithm"].value


def test_known_friction_is_nearer_than_the_prior_says(contacts):
    statistics = contacts.fit()
    question, truth = contacts.exam(members=40)
    tables = {
        name: contacts.score(draw(question.condition, 40, 0), truth, question.condition).table
        for name, draw in contacts.baselines(statistics).items()
    }
    crps = {name: table["friction: CRPS of the logarithm"].value for name, table in tables.items()}
    assert crps["linear"] < 0.5 * crps["prior"] and crps["nearest"] < crps["prior"]


def test_recorded_tosses_are_asked_in_groups(contacts, tmp_path):
    recording(tmp_path / "t.npz", 7)
    question = contacts.ask(ContactScenario(**ASKED, file="t.npz", groups=8), tmp_path)
    assert question.condition["features"].shape == (3, 2 * posterior.PER_TOSS) and len(question.notes) == 2
    assert contacts.ask(ContactScenario(**ASKED, file="t.npz", groups=2), tmp_path).condition["features"].shape[0] == 2


@pytest.mark.parametrize(
    ("count", "changed", "said"),
    [
        (1, {}, "at least 2 tosses of 72 frames"),
        (4, {"rate_hz": 60.0}, "recorded at 148 Hz"),
        (4, {"half_width_m": 0.03}, "width: expected 0.1048 m to 10%, the cube that is learnt, got 0.06 m"),
        (4, {"mass_kg": 0.42}, "mass: expected 0.37 kg"),
        (4, {"inertia_kgm2": 6e-4}, "inertia: expected 0.00081 kg m2"),
    ],
)
def test_recording_it_has_not_learnt_is_refused(contacts, tmp_path, count, changed, said):
    recording(tmp_path / "t.npz", count, **changed)
    with pytest.raises(BadInput, match=said):
        contacts.ask(ContactScenario(**ASKED, file="t.npz"), tmp_path)


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(BadInput, match="fewer than groups"):
        Contacts("robotics/tosses", groups=10, components=20)
