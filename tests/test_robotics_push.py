"""The planar push: its scene, its frame, its demonstrations, and episodes that a generator and the simulator make together."""

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from domains.robotics import archives, demonstrations, lerobot, push, results, worlds
from domains.robotics.domain import Motions
from domains.robotics.episodes import layout_of
from domains.robotics.tasks import LATEST, Scene, reached, wobbling
from twinsim.base import BadInput

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared"))
TASK = push.PlanarPush()
SHORT = dataclasses.replace(TASK, frames=24)


@pytest.fixture(scope="module")
def scene():
    return Scene(TASK)


def nominal(count, **values):
    return np.repeat(worlds.world(values)[None], count, 0)


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]], np.float32)


SEEN = np.array([1.0, 0.5, 0, 0, 0.45, -0.2, 0.5, 0.05, 0, 0, 0.4, 0.25], np.float32)  # peg, puck and goal apart
WAYS = np.array([[0.46, -0.18], [0.48, -0.15], [0.5, -0.1]], np.float32)

# ---------------------------------------------------------------- physics


def test_copies_do_not_know_of_each_other(scene):
    start = TASK.draw(np.random.default_rng(0), 5, "wide")
    together = scene.play(start, nominal(5), lambda _, seen: TASK.demonstrate(seen), 40)
    alone = scene.play({name: values[3:4] for name, values in start.items()}, nominal(1), lambda _, seen: TASK.demonstrate(seen), 40)
    assert np.array_equal(together.observation[3:4], alone.observation) and np.array_equal(together.action[3:4], alone.action)


def test_played_in_pieces_or_at_once_is_the_same_to_the_bit(scene):
    start = TASK.draw(np.random.default_rng(1), 3, "wide")
    demonstrator = lambda _, seen: TASK.demonstrate(seen)  # noqa: E731
    whole = scene.play(start, nominal(3, latency=2), demonstrator, 30)
    state, sent = scene.begin(start, nominal(3, latency=2)), np.zeros((3, LATEST, 2), np.float32)
    pieces = []
    for frames in (7, 13, 10):
        state, sent, played = scene.advance(state, sent, start, nominal(3, latency=2), demonstrator, frames)
        pieces.append(played.observation)
    assert np.array_equal(np.concatenate(pieces, 1), whole.observation)


def test_what_is_kept_of_an_episode_plays_it_again_to_the_bit(scene):
    start = TASK.draw(np.random.default_rng(2), 4, "wide")
    played = scene.play(start, nominal(4), wobbling(TASK, np.random.default_rng(0), 0.25), 60)
    assert np.array_equal(scene.replay(start, nominal(4), played.action).observation, played.observation)


def test_the_demonstrator_reaches_the_goal_from_everywhere_and_bodies_stay_apart(scene):
    start = TASK.draw(np.random.default_rng(3), 40, "wide")
    played = scene.play(start, nominal(40), lambda _, seen: TASK.demonstrate(seen), 130)
    length, success = reached(TASK, played.after)
    assert success.all() and (length < 130).all()
    assert played.depth[:, 0].max() == 0 and played.depth.max() < 1e-3
    assert played.gain.max() == 0


def test_a_puck_that_is_let_go_slides_as_far_as_friction_lets_it(scene):
    """Coulomb: v^2 / (2 mu g), less what the viscous damping takes; twice as far, nearly, on half the friction."""
    start = {"puck_x": np.array([0.5, 0.5]), "puck_y": np.array([0.0, 0.0]), "goal_x": np.array([0.6, 0.6]), "goal_y": np.array([0.2, 0.2])}
    world = np.concatenate([nominal(1), nominal(1, friction=0.5)])
    stepper = scene.stepper(world)
    speed = np.zeros((2, 4))
    speed[:, 2] = 0.5
    stepper.place(TASK.place(start), speed)
    stepper.step(TASK.place(start)[:, :2], 400)
    slid = stepper.position[:, 2] - 0.5
    mass, damping = 0.3, 0.5
    for distance, force in zip(slid, (push.RUBBING, push.RUBBING / 2), strict=True):
        # m v' = -f - c v, from v0 to rest
        exact = mass / damping * (0.5 - force / damping * np.log1p(damping * 0.5 / force))
        assert distance == pytest.approx(exact, rel=0.03)


def test_gravity_weighs_on_the_table(scene):
    moon = TASK.fields(scene.model, nominal(1, gravity=1.62))
    assert moon["dof_frictionloss"][0, 2:] == pytest.approx(push.RUBBING * 1.62 / 9.81)
    assert not TASK.fields(scene.model, nominal(2))


def test_a_slow_line_delays_what_is_sent(scene):
    start = TASK.draw(np.random.default_rng(4), 1, "wide")
    action = np.zeros((1, 20, 2), np.float32)
    action[:, 5:] = 1.0
    now = scene.replay(start, nominal(1), action).observation[0, :, 4]
    late = scene.replay(start, nominal(1, latency=3), action).observation[0, :, 4]
    assert np.allclose(late[3:], now[:-3], atol=1e-5) and abs(now[8] - late[8]) > 1e-3


# ---------------------------------------------------------------- the task's frame


@pytest.mark.parametrize("angle", [0.7, -2.0])
def test_features_and_way_points_turn_with_the_scene(angle):
    turn = rotation(angle)
    features, into_frame = jax.jit(TASK.features), jax.jit(TASK.into_frame)
    turned = SEEN.copy()
    for at in (4, 6, 10):
        turned[at : at + 2] = turn @ SEEN[at : at + 2]
    np.testing.assert_allclose(features(turned), features(SEEN), atol=2e-5)
    np.testing.assert_allclose(into_frame(turned, WAYS @ turn.T), into_frame(SEEN, WAYS), atol=2e-5)


def test_frame_has_an_inverse_and_the_mirror_image_is_its_own():
    seen = jnp.asarray(SEEN)
    np.testing.assert_allclose(TASK.out_of_frame(seen, TASK.into_frame(seen, WAYS)), WAYS, atol=1e-6)
    image, ways = TASK.mirrored(seen, WAYS)
    back, again = TASK.mirrored(image, ways)
    np.testing.assert_allclose(back, seen, atol=1e-6)
    np.testing.assert_allclose(again, WAYS, atol=1e-6)
    across = TASK.into_frame(seen, WAYS)[:, 1]
    np.testing.assert_allclose(TASK.into_frame(image, ways)[:, 1], -across, atol=1e-5)


def test_tracking_the_way_of_an_action_is_the_action():
    noise = np.random.default_rng(0)
    seen, action = np.repeat(SEEN[None], 5, 0).astype(np.float64), noise.uniform(-0.7, 0.7, (5, 2))
    np.testing.assert_allclose(TASK.track(TASK.way(seen, action), seen), action, atol=1e-12)


def test_moved_demonstration_ends_at_the_new_goal_and_stays_where_nothing_moved():
    before, now = jnp.asarray(SEEN), jnp.asarray(SEEN).at[6:8].set(jnp.array([0.4, -0.1])).at[10:12].set(jnp.array([0.55, 0.2]))
    np.testing.assert_allclose(TASK.moved(before, before, WAYS), WAYS, atol=1e-6)
    behind = lambda seen, left: np.asarray(seen[10:12]) - (left + push.CLEAR) * _ahead(seen)  # noqa: E731
    np.testing.assert_allclose(TASK.moved(before, now, behind(SEEN, 0.0)[None])[0], behind(now, 0.0), atol=1e-6)


def _ahead(seen):
    apart = np.asarray(seen[10:12] - seen[6:8])
    return apart / np.linalg.norm(apart)


def test_goal_has_to_be_kept():
    after = np.repeat(SEEN[None, None], 12, 1)
    after[0, :, 6:8] = after[0, :, 10:12] + 0.2
    after[0, 2:6, 6:8] = after[0, 2:6, 10:12]  # four frames, one too few
    assert reached(TASK, after)[1].tolist() == [False] and reached(TASK, after)[0].tolist() == [12]
    after[0, 6, 6:8] = after[0, 6, 10:12]
    assert [part.tolist() for part in reached(TASK, after)] == [[7], [True]]


# ---------------------------------------------------------------- episodes


@pytest.fixture(scope="module")
def twin():
    return Motions("robotics/push", SHORT, demonstrations.scripted(TASK, 3, seed=0), window=6, stride=3)


def leftwards(condition, key):
    """A proposal that always lies 2 cm to the left of the tip."""
    tip = condition["observation"][4:6]
    return {"way_x": jnp.full(6, tip[0] - 0.02), "way_y": jnp.full(6, tip[1])}


def test_unrolled_episode_does_what_is_proposed(twin):
    """A proposal that always lies 2 cm to the left of the tip is carried out frame by frame, and comes out the same when played again."""
    start = TASK.draw(np.random.default_rng(5), 3, "wide")
    question = twin.question(start, nominal(3), 1, "three")

    condition = {name: jnp.asarray(values) for name, values in question.condition.items()}
    keys = jax.random.split(jax.random.key(0), 3)
    outcome = jax.jit(jax.vmap(lambda c, k: twin.unroll(leftwards, c, k)))(condition, keys)
    assert float(outcome["replay_error"].max()) == 0 and not outcome["success"].any()
    assert outcome["tip_x"].shape == (3, 24)
    step = (np.asarray(outcome["tip_x"])[:, 1:] - np.asarray(outcome["tip_x"])[:, :-1])[:, 1:]
    assert (step < 0).all()
    first = np.asarray(outcome["move_x"])[:, ::3]
    np.testing.assert_allclose(first, -0.02 / push.REACH, atol=1e-3)
    alone = jax.jit(lambda c, k: twin.unroll(leftwards, c, k))({name: value[1] for name, value in condition.items()}, keys[1])
    assert all(np.array_equal(alone[name], outcome[name][1]) for name in outcome)


def test_what_is_told_of_an_episode_is_what_the_policy_saw_whatever_ends_before_it(twin):
    """In a noisy world, beside one that begins at its goal and so ends first; to the bit, its last observation too."""
    noisy = dataclasses.replace(twin, task=dataclasses.replace(SHORT, hold=6))
    start = TASK.draw(np.random.default_rng(5), 2, "wide")
    for axis in "xy":
        start[f"goal_{axis}"][0] = start[f"puck_{axis}"][0] = 0.2
    question = noisy.question(start, nominal(2, noise=3.0, dropout=0.1, flips=0.01), 1, "two")

    condition = {name: jnp.asarray(values) for name, values in question.condition.items()}
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.jit(jax.vmap(lambda c, k: noisy.unroll(leftwards, c, k)))(condition, keys)
    assert together["success"].tolist() == [1, 0] and together["length"].tolist() == [6, 24]
    alone = jax.jit(lambda c, k: noisy.unroll(leftwards, c, k))
    for row in range(2):
        single = alone({name: values[row] for name, values in condition.items()}, keys[row])
        assert all(np.array_equal(single[name], together[name][row]) for name in single)
    seen = np.stack([together[f"seen_tip_{axis}"][1] for axis in "xy"], -1).reshape(8, 3, 2)
    way = seen[:, :1] - np.array([0.02, 0])
    done = np.stack([together[f"move_{axis}"][1] for axis in "xy"], -1).reshape(8, 3, 2)
    np.testing.assert_allclose(done, [push.at_most_one(each) for each in (way - seen) / push.REACH], atol=1e-5)
    (kept,) = noisy.episodes({name: np.asarray(values)[None] for name, values in together.items()}, question.condition)
    assert np.abs(kept.final[4:6] - [together["tip_x"][0, 6], together["tip_y"][0, 6]]).max() > 1e-5


def test_a_demonstrator_that_proposes_gets_the_puck_home(twin):
    """Closed loop: with the demonstrator's own way point as every proposal, episodes succeed and keep every rule."""
    whole = dataclasses.replace(twin, task=TASK, window=1, stride=1)
    start = TASK.draw(np.random.default_rng(6), 4, "wide")
    question = whole.question(start, nominal(4), 1, "four")

    def propose(condition, key):
        way = jax.pure_callback(
            lambda seen: TASK.way(seen[None], TASK.demonstrate(seen[None]))[0].astype(np.float32),
            jax.ShapeDtypeStruct((2,), jnp.float32),
            condition["observation"],
            vmap_method="sequential",
        )
        return {"way_x": way[None, 0], "way_y": way[None, 1]}

    condition = {name: jnp.asarray(values) for name, values in question.condition.items()}
    outcome = jax.jit(jax.vmap(lambda c: whole.unroll(propose, c, jax.random.key(0))))(condition)
    assert outcome["success"].all() and float(outcome["replay_error"].max()) == 0
    broken = jax.vmap(whole.check)(outcome, condition)
    assert all(float(values.max()) <= 0 for values in broken.values()), broken
    assert float(question.misses({name: value[0] for name, value in outcome.items()}, condition)) == 0
    episodes = whole.episodes({name: np.asarray(values)[None] for name, values in outcome.items()}, question.condition)
    assert len(episodes) == 4 and [each.frames for each in episodes] == np.asarray(outcome["length"]).astype(int).tolist()
    with_states = whole.episodes({name: np.asarray(values)[None] for name, values in outcome.items()}, question.condition, states=True)
    for each in with_states:  # joints and puck, then their speeds, as observations have them in float32
        np.testing.assert_array_equal(each.states.astype(np.float32), each.observation[:, [0, 1, 6, 7, 2, 3, 8, 9]])


def test_broken_episodes_are_found(twin):
    _, truth = twin.exam(1, 2)
    sample = {name: np.asarray(values[0]) for name, values in truth.items()} | {"length": np.float32(20)}

    def broken(**change):
        return {name for name, value in twin.check({**sample, **change}, {}).items() if float(value) > 0}

    assert broken() == set()
    at = np.zeros(24, np.float32)
    at[0] = 2e-3
    assert broken(depth=at) == {"contact deeper than 1 mm, m"}  # from the first frame on
    at[0], at[22] = 0, 1.0
    assert broken(gain=at) == set()  # after the goal
    at[10] = 1.0
    assert broken(gain=at) == {"energy from nowhere, J"}
    assert broken(joint1=sample["joint1"] + 5) == {"angles beyond their limits"}
    assert broken(replay_error=np.float32(1e-6)) == {"difference when played again"}


def test_what_is_counted_and_shown_is_what_is_delivered(twin):
    question, truth = twin.exam(1, 2)
    samples = {name: np.asarray(values)[None].copy() for name, values in truth.items()}
    samples |= {"success": np.ones((1, 2), np.float32), "length": np.full((1, 2), 20, np.float32)}
    samples["depth"][0, 0, 3] = 2e-3  # deeper than a contact may be
    dataset = twin.dataset_of(samples, question)
    assert len(twin.episodes(samples, question.condition)) == 1
    assert twin.summary(question, dataset).startswith("1 of 2 episodes") and "(20 frames of" in twin.summary(question, dataset)
    assert [int(shown["episode"]) for shown in results._shown(twin, dataset)] == [1]


def test_scores_tell_copies_and_success(twin):
    question, truth = twin.exam(2, 20)
    both = {name: np.stack([values, values]) for name, values in truth.items()}
    table = twin.score(both, truth, question.condition).table
    assert table["paths: novelty, of the demonstrator's"].value == pytest.approx(1.0)
    assert table["episodes: yield"].value == np.mean(truth["success"])
    copied = twin.as_sample(twin.scene.play(*_starts_of(twin), lambda _, seen: TASK.demonstrate(seen), 24))
    copy = {name: np.repeat(np.asarray(values)[:1], 20, 0)[None] for name, values in copied.items()}
    stolen = twin.demonstrations.episodes[0]
    for index, channel in enumerate(TASK.observation):
        copy[channel.name][0, :, : stolen.frames] = stolen.observation[:24, index]
    copy["length"] = np.full((1, 20), stolen.frames, np.float32)
    assert twin.score(copy, truth, question.condition).table["paths: copies"].value == 1.0


def _starts_of(twin):
    return TASK.draw(np.random.default_rng(7), 1, "narrow"), nominal(1)


# ---------------------------------------------------------------- bad input


@pytest.fixture
def archive(tmp_path):
    def write(**change):
        made = demonstrations.scripted(TASK, 2, seed=1)
        arrays = {
            "obs": np.concatenate([each.observation for each in made.episodes]),
            "act": np.concatenate([each.action for each in made.episodes]),
            "length": np.array([each.frames for each in made.episodes]),
        }
        for name, edit in change.items():
            arrays[name] = edit(arrays[name].copy())
        np.savez(tmp_path / "demonstrations.npz", **arrays)
        return str(tmp_path / "demonstrations.npz")

    return write


def test_demonstrations_in_drawn_worlds_make_the_generator_conditional_on_them():
    """What was varied is scaled by how much; a world beyond what never varied looks the same to the generator."""
    ranges = {"friction": [0.2, 2.0, "log"], "payload": [0.5, 2.0]}
    made = demonstrations.scripted(TASK, 6, seed=0, world={"gain": 0.9}, ranges=ranges)
    worlds_of = np.array([[each.environment[name] for name in ("friction", "payload", "gain", "gravity")] for each in made.episodes])
    assert len(np.unique(worlds_of[:, 0])) == 6 and (worlds_of[:, :2] > [0.2, 0.5]).all() and (worlds_of[:, :2] < 2).all()
    assert (worlds_of[:, 2] == np.float32(0.9)).all() and (worlds_of[:, 3] == np.float32(9.81)).all()
    assert "friction 0.2 to 2.0, payload" in made.source
    domain = Motions("robotics/push", SHORT, made, window=6, stride=3)
    statistics = domain.fit()
    seen = made.episodes[0].observation[0]

    def scalars(**values):
        return np.asarray(domain.encode(statistics, {"observation": seen, "world": worlds.world(values)})[1])

    assert np.abs(scalars(friction=0.4) - scalars(friction=1.6)).max() > 1
    np.testing.assert_allclose(scalars(gravity=1.62), scalars(), atol=1e-6)
    with pytest.raises(BadInput, match="friction"):
        demonstrations.scripted(TASK, 2, ranges={"friction": [2.0, 0.2]})


def test_demonstrations_are_what_the_demonstrator_saw():
    """In a world whose sensors fail, up to the last observation."""
    scene, noise = Scene(TASK), np.random.default_rng(0)
    start, world = TASK.draw(noise, 4, "narrow"), nominal(4, noise=2.0, dropout=0.1)
    played = scene.play(start, world, lambda _, seen: TASK.demonstrate(seen))
    for each, row in zip(demonstrations.successes(TASK, played, world), np.flatnonzero(reached(TASK, played.after)[1]), strict=True):
        np.testing.assert_array_equal(each.observation, played.seen[row, : each.frames])
        np.testing.assert_array_equal(each.final, played.seen[row, each.frames])
        assert np.abs(each.observation - played.observation[row, : each.frames]).max() > 1e-4


def test_recorded_demonstrations_are_those_that_were_made(archive):
    made, read = demonstrations.scripted(TASK, 2, seed=1), demonstrations.recorded(TASK, archive())
    for one, other in zip(made.episodes, read.episodes, strict=True):
        assert np.array_equal(one.observation, other.observation) and np.array_equal(one.action, other.action)
    assert len(read.files[0]["sha256"]) == 64


def set_nan(values):
    values[3, 6] = np.nan
    return values


BAD = {
    "NaN": ({"obs": set_nan}, "episode 0, frame 3: puck_x: expected .* got nan"),
    "degrees": (
        {"obs": lambda values: values * np.where(np.arange(12) < 2, 57.3, 1)},
        "joint[12]: expected .* rad, got .* degrees would explain",
    ),
    "another robot": ({"obs": lambda values: values[:, :9]}, "expected .frames, 12. .* got .* another robot"),
    "beyond limits": ({"act": lambda values: values * 3}, "move_[xy]: expected -1 to 1"),
    "lengths": ({"length": lambda values: values + 1}, "length: expected the frames"),
    "broken lengths": ({"length": lambda values: values.astype(float)}, "length: expected whole numbers above 0 .episode., got float64"),
    "one number": ({"obs": lambda values: np.array(1.0)}, "obs: expected numbers .frame, channel., got float64 ..$"),
    "words": ({"act": lambda values: values.astype(str)}, "act: expected numbers .frame, channel., got <U"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_demonstrations_are_refused(archive, name):
    edits, sentence = BAD[name]
    with pytest.raises(BadInput, match=sentence):
        demonstrations.recorded(TASK, archive(**edits))


def test_a_file_that_is_none_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "demonstrations.npz"
    np.savez_compressed(path, obs=np.arange(1000.0), act=np.zeros(3), length=np.zeros(3))
    whole = path.read_bytes()
    method = whole.index(b"PK\x01\x02") + 10  # of compression, as the directory has it
    unknown = whole[:method] + b"\x63" + whole[method + 1 :]
    for bytes_ in (b"", b"PK\x03\x04torn", whole[:80] + bytes(80) + whole[160:], unknown):
        path.write_bytes(bytes_)
        with pytest.raises(BadInput, match="could not read") as refused:
            demonstrations.recorded(TASK, str(path))
        assert "\n" not in str(refused.value)
    path.write_bytes(whole)
    monkeypatch.setattr(archives, "MAX_BYTES", 5000)
    with pytest.raises(BadInput, match="expected at most 0.005 MB unpacked"):
        demonstrations.recorded(TASK, str(path))


def test_a_folder_of_failures_is_refused(tmp_path):
    made = demonstrations.scripted(TASK, 2, seed=1)
    failed = [dataclasses.replace(each, success=False) for each in made.episodes]
    lerobot.write(tmp_path / "set", layout_of(TASK, "", 0, ""), failed)
    with pytest.raises(BadInput, match="expected episodes that succeed, to learn from, none of 2 does"):
        demonstrations.recorded(TASK, str(tmp_path / "set"))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"goal_x": [2.0]}, "goal at .* expected .* from the arm's foot"),
        ({"puck_x": [np.nan]}, "puck: expected finite metres"),
        ({"puck_x": [0.45], "puck_y": [-0.4]}, "puck at .* from the peg"),
    ],
)
def test_a_goal_that_cannot_be_reached_is_refused(change, sentence):
    start = {"puck_x": [0.5], "puck_y": [0.0], "goal_x": [0.5], "goal_y": [0.2], **change}
    with pytest.raises(BadInput, match=sentence):
        TASK.place({name: np.array(values) for name, values in start.items()})


def test_worlds_and_regions_that_are_none_are_refused():
    with pytest.raises(BadInput, match="grvity: expected some of gravity"):
        worlds.world({"grvity": 1.0})
    with pytest.raises(BadInput, match="gravity: expected 0 to 30"):
        worlds.world({"gravity": -1.0})
    with pytest.raises(BadInput, match="region north"):
        TASK.draw(np.random.default_rng(0), 1, "north")


# ---------------------------------------------------------------- beside the peer


def test_the_scene_is_the_one_of_the_published_protocol():
    folder = SHARED / "peers" / "robotics"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    sys.path.insert(0, str(folder))
    try:
        import robotics_baseline as peer
    finally:
        sys.path.remove(str(folder))
    start = TASK.draw(np.random.default_rng(8), 3, "wide")
    puck, goal = (np.stack([start[f"{name}_{axis}"] for axis in "xy"], 1) for name in ("puck", "goal"))
    theirs = peer.run(peer.expert, puck, goal)[0][:, :40]
    ours = Scene(TASK).play(start, nominal(3), lambda _, seen: TASK.demonstrate(seen), 40).observation
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_devices_play_at_the_same_time(scene):
    """Each calls from a thread of its own, for the same worlds."""
    start = [TASK.draw(np.random.default_rng(seed), 3, "wide") for seed in range(6)]
    alone = [scene.play(each, nominal(3), lambda _, seen: TASK.demonstrate(seen), 30).observation for each in start]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: scene.play(each, nominal(3), lambda _, seen: TASK.demonstrate(seen), 30).observation, start))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))
