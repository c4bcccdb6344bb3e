"""Every task of the robotics twin: clean starts, a demonstrator that succeeds, exact replay, and features that keep to the task's frame."""

from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from building import rough_jit

from domains.robotics import arm, tasks, worlds
from domains.robotics.physics import compiled
from domains.robotics.push import PlanarPush
from domains.robotics.tasks import Scene
from twinsim.base import BadInput

TASKS: dict[str, Any] = {"push": PlanarPush(), "arm_reach": arm.ArmReach(), "arm_push": arm.ArmPush(), "arm_pick": arm.ArmPick()}
COUNT = 16


def earth(count: int, **values: float) -> np.ndarray:
    return np.repeat(worlds.world(values)[None], count, 0)


@pytest.fixture(scope="module", params=list(TASKS))
def played(request: Any) -> tuple[Any, Scene, dict[str, np.ndarray], tasks.Played]:
    """A task, its scene, and the wobbling demonstrator from wide starts."""
    task = TASKS[request.param]
    noise, scene = np.random.default_rng(0), Scene(task)
    start = task.draw(noise, COUNT, "wide")
    return task, scene, start, scene.play(start, earth(COUNT), tasks.wobbling(task, noise, 0.25))


def test_demonstrations_succeed_and_stay_within_bounds(played: Any) -> None:
    task, scene, _, wide = played
    assert tasks.reached(task, wide.after)[1].mean() > 0.9
    narrow = scene.play(task.draw(np.random.default_rng(1), COUNT, "narrow"), earth(COUNT), lambda _, o: task.demonstrate(o))
    assert tasks.reached(task, narrow.after)[1].mean() > 0.9
    for channel, values in zip(task.observation, np.moveaxis(wide.observation, -1, 0), strict=True):
        assert values.min() >= channel.lower - 0.01 and values.max() <= channel.upper + 0.01, channel.name
    assert wide.depth[:, 0].max() == 0.0  # nothing starts inside anything else
    assert wide.depth.max() < 0.005
    assert wide.gain.max() < 0.01  # J from nowhere


def test_replay_of_kept_actions_is_exact(played: Any) -> None:
    """For any number of copies: rounded actions, no policy in the loop, the same bits."""
    task, scene, start, wide = played
    some = slice(3, 8)
    again = scene.replay({k: v[some] for k, v in start.items()}, earth(5), wide.action[some, :60])
    assert np.array_equal(again.observation, wide.observation[some, :60])


def test_way_points_lead_to_the_action(played: Any) -> None:
    task, _, _, wide = played
    seen, done = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (wide.observation, wide.action))
    demonstrated = task.demonstrate(seen)
    np.testing.assert_allclose(task.track(task.way(seen, demonstrated), seen), demonstrated, atol=1e-6)
    assert np.isfinite(task.control(seen, done)).all()


def test_frames_are_turned_back_and_mirrored(played: Any) -> None:
    task, _, _, wide = played
    seen = jnp.asarray(wide.observation[:4, ::9].reshape(-1, wide.observation.shape[-1]))
    way = jnp.asarray(task.way(np.asarray(seen), wide.action[:4, ::9].reshape(len(seen), -1)), jnp.float32)
    many = [rough_jit(jax.vmap(f)) for f in (task.features, task.into_frame, task.out_of_frame, task.mirrored)]
    features, into, out, mirrored = many
    inside = into(seen, way)
    assert np.isfinite(features(seen)).all() and np.abs(features(seen)).max() <= 5  # of order one
    assert np.abs(inside).max() < 3
    np.testing.assert_allclose(out(seen, inside), way, atol=1e-5)
    other, other_way = mirrored(seen, way)
    np.testing.assert_allclose(mirrored(other, other_way)[1], way, atol=1e-5)
    np.testing.assert_allclose(np.abs(into(other, other_way)), np.abs(inside), atol=2e-3)  # the mirror changes signs alone
    np.testing.assert_allclose(task.off(other), task.off(seen), atol=1e-5)


def test_way_points_move_with_the_scene(played: Any) -> None:
    """A scene turned about the vertical has its way points turned; one that stays leaves them where they are."""
    task, _, _, wide = played
    seen = wide.observation[0].astype(np.float64)
    names = [each.name for each in task.planned]
    way = task.way(seen, wide.action[0].astype(np.float64))
    other = moved(task, seen[:1], 0.7, np.array([0.11, -0.23]))[0]
    turned, turn = way.copy(), np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    at = [names.index("way_x"), names.index("way_y")]
    turned[:, at] = way[:, at] @ turn.T + [0.11, -0.23]
    with jax.enable_x64(True):
        first, whole = jnp.asarray(seen[0]), jnp.asarray(way)
        move = rough_jit(task.moved)
        np.testing.assert_allclose(move(first, first, whole), way, atol=1e-9)
        np.testing.assert_allclose(move(first, jnp.asarray(other), whole), turned, atol=1e-6)


def moved(task: Any, seen: np.ndarray, angle: float, by: np.ndarray) -> np.ndarray:
    """Observations `[n, channel]` of the same scene, turned about the vertical and moved; joints, which features leave out, stay."""
    names = [channel.name for channel in task.observation]
    other = seen.copy()
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for name in names:
        if name.endswith("_x"):
            at = [names.index(name), names.index(name[:-1] + "y")]
            other[:, at] = seen[:, at] @ turn.T + (0 if "speed" in name else by)
        if name.endswith("heading"):
            other[:, names.index(name)] += angle
    return other


def test_features_do_not_see_where_in_the_world_the_scene_is(played: Any) -> None:
    task, _, _, wide = played
    seen = wide.observation[:4, ::9].reshape(-1, wide.observation.shape[-1]).astype(np.float64)
    other = moved(task, seen, 0.7, np.array([0.11, -0.23]))
    with jax.enable_x64(True):  # where the direction to the goal is a matter of millimetres, float32 is too coarse
        features = rough_jit(jax.vmap(task.features))
        one, two = (np.asarray(features(jnp.asarray(values))) for values in (seen, other))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_starts_are_checked(played: Any) -> None:
    task, _, start, _ = played
    with pytest.raises(BadInput, match="region"):
        task.draw(np.random.default_rng(0), 2, "sideways")
    first = next(iter(start))
    with pytest.raises(BadInput, match="finite"):
        task.place({**start, first: np.full(COUNT, np.nan)})
    far = next(name for name in start if name.startswith("goal"))
    with pytest.raises(BadInput, match="expected"):
        task.place({**start, far: np.full(COUNT, 50.0)})


# ---------------------------------------------------------------- the arm


def test_the_chain_is_the_models() -> None:
    """Own kinematics against MuJoCo's, and the Jacobian against differences."""
    model = compiled(arm.ArmPick().spec())
    data = mujoco.MjData(model)
    joints = np.random.default_rng(0).uniform(arm.LOWER, arm.UPPER, (5, arm.JOINTS))
    for angles, place in zip(joints, arm.tool(joints), strict=True):
        data.qpos[: arm.JOINTS] = angles
        mujoco.mj_kinematics(model, data)
        hand = model.body("link7").id
        np.testing.assert_allclose(data.xpos[hand] + data.xmat[hand].reshape(3, 3) @ arm.OFFSET[-1], place, atol=1e-12)
    jacobian, step = arm.jacobian(joints), 1e-6
    for joint in range(arm.JOINTS):
        change = step * np.eye(arm.JOINTS)[joint]
        slope = (arm.tool(joints + change) - arm.tool(joints - change)) / (2 * step)
        np.testing.assert_allclose(jacobian[:, :3, joint], slope, atol=1e-7)


def test_inverse_kinematics_is_the_inverse() -> None:
    place = np.random.default_rng(1).uniform([0.35, -0.3, 0.05], [0.65, 0.3, 0.5], (50, 3))
    joints = arm.joints_at(place)
    np.testing.assert_allclose(arm.tool(joints), place, atol=5e-4)
    assert (joints >= arm.LOWER).all() and (joints <= arm.UPPER).all()
    assert np.array_equal(arm.joints_at(place[:7]), joints[:7])  # whatever else is asked with it


@pytest.mark.parametrize("gravity", [worlds.EARTH, 1.62])
def test_what_is_held_stays_held(gravity: float) -> None:
    """Five seconds above the table without a slip."""
    task = arm.ArmPick(frames=200)
    goal = {"cube_x": 0.5, "cube_y": 0.1, "goal_x": 0.5, "goal_y": -0.1, "goal_z": 0.3}
    start = {name: np.array([value]) for name, value in goal.items()}
    held = Scene(task).play(start, earth(1, gravity=gravity), lambda _, o: task.demonstrate(o)).observation[0, 100:]
    slip = held[:, 18:21] - held[:, 14:17]
    assert np.abs(held[-1, 18:21] - [0.5, -0.1, 0.3]).max() < 0.01
    assert np.abs(slip - slip[0]).max() < 5e-4
