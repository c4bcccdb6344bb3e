"""Every task of the robotics twin: clean starts, a demonstrator that succeeds, exact replay, and features that keep to the task's frame."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import pytest
from building import rough_jit

from domains.robotics import arm, flyer, tasks, walker, worlds
from domains.robotics.demonstrations import Demonstrations
from domains.robotics.domain import Motions, MotionScenario
from domains.robotics.physics import CStepper, compiled
from domains.robotics.push import PlanarPush
from domains.robotics.tasks import Scene
from twinsim.base import BadInput

ALL = (PlanarPush(), arm.ArmReach(), arm.ArmPush(), arm.ArmPick(), flyer.Inspection(), flyer.Landing(), walker.Walk())
TASKS: dict[str, Any] = {task.name: task for task in ALL}
FIXED = ("inspection", "walk")  # whose world has a middle that does not move
COUNT = 16


def earth(count: int, **values: float) -> np.ndarray:
    return np.repeat(worlds.world(values)[None], count, 0)


def own(scene: Scene, count: int) -> np.ndarray:
    return np.repeat(scene.world()[None], count, 0)


@pytest.fixture(scope="module", params=list(TASKS))
def played(request: Any) -> tuple[Any, Scene, dict[str, np.ndarray], tasks.Played]:
    """A task, its scene, and the wobbling demonstrator from wide starts."""
    task = TASKS[request.param]
    noise, scene = np.random.default_rng(0), Scene(task)
    start = task.draw(noise, COUNT, "wide")
    return task, scene, start, scene.play(start, own(scene, COUNT), tasks.wobbling(task, noise, 0.25))


def test_demonstrations_succeed_and_stay_within_bounds(played: Any) -> None:
    task, scene, _, wide = played
    assert tasks.reached(task, wide.after)[1].mean() > 0.9
    narrow = scene.play(task.draw(np.random.default_rng(1), COUNT, "narrow"), own(scene, COUNT), lambda _, o: task.demonstrate(o))
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
    again = scene.replay({k: v[some] for k, v in start.items()}, own(scene, 5), wide.action[some, :60])
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
    np.testing.assert_allclose(np.sin(mirrored(other, other_way)[1] - way), 0.0, atol=1e-5)  # angles, too
    np.testing.assert_allclose(np.abs(into(other, other_way)), np.abs(inside), atol=2e-3)  # the mirror changes signs alone
    np.testing.assert_allclose(task.off(other), task.off(seen), atol=1e-5)


def test_way_points_move_with_the_scene(played: Any) -> None:
    """A scene turned about the vertical has its way points turned; one that stays leaves them where they are."""
    task, _, _, wide = played
    seen = wide.observation[0].astype(np.float64)
    names, by = [each.name for each in task.planned], shift(task)
    way = task.way(seen, wide.action[0].astype(np.float64))
    other = moved(task, seen[:1], 0.7, by)[0]
    turned, turn = way.copy(), np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    at = [names.index("way_x"), names.index("way_y")]
    turned[:, at] = way[:, at] @ turn.T + by
    turned += 0.7 * np.array([name == "way_heading" for name in names])
    with jax.enable_x64(True):
        first, whole = jnp.asarray(seen[0]), jnp.asarray(way)
        move = rough_jit(task.moved)
        for then, wanted in ((first, way), (jnp.asarray(other), turned)):
            np.testing.assert_allclose(np.exp(1j * np.asarray(move(first, then, whole))), np.exp(1j * wanted), atol=1e-6)  # angles, too


def shift(task: Any) -> np.ndarray:
    return np.array([0.0, 0.0] if task.name in FIXED else [0.11, -0.23])


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
    other = moved(task, seen, 0.7, shift(task))
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


def test_goals_stand_where_the_start_has_them(played: Any) -> None:
    task, scene, start, _ = played
    one = {name: float(values[2]) for name, values in start.items()}
    model = scene.marked(one)
    data = mujoco.MjData(model)
    mujoco.mj_kinematics(model, data)
    np.testing.assert_allclose(data.site("goal").xpos, task.goal(one), atol=1e-9)


def test_copies_and_threads_do_not_matter(played: Any) -> None:
    task, scene, start, _ = played
    position = task.place(start)
    control = np.random.default_rng(2).uniform(-0.1, 0.1, (COUNT, scene.model.nu)) + position[:, : scene.model.nu]
    found = []
    for some, threads in ((slice(0, COUNT), 1), (slice(0, COUNT), 2), (slice(5, 6), 1)):
        stepper = CStepper(scene.model, len(position[some]), threads=threads)
        stepper.place(position[some])
        stepper.step(control[some], 60)
        found.append(stepper.state)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0][5:6], found[2])


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
    jacobian, step = arm.Build().chain.jacobian(joints), 1e-6
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


# ---------------------------------------------------------------- robots with thrusters


def test_legs_crush_by_what_the_fall_brings() -> None:
    """m v2 / 2 at touch-down against the legs' four weights, less the one they carry: v from a thrustless fall of 2 m on the Moon."""
    task = flyer.Landing(frames=40)
    model = Scene(task).model
    data = mujoco.MjData(model)
    data.qpos[2] = 2.0
    mujoco.mj_step(model, data, round(4.0 / model.opt.timestep))
    assert data.qpos[3] == pytest.approx(min(2.0 / 3, task.stroke), rel=0.05)  # here they are crushed to the stop
    data = mujoco.MjData(model)
    data.qpos[2] = 0.5
    mujoco.mj_step(model, data, round(4.0 / model.opt.timestep))
    assert data.qpos[3] == pytest.approx(0.5 / 3, rel=0.1)


# ---------------------------------------------------------------- the walker


def test_legs_stand_where_they_are_told() -> None:
    """Own kinematics against MuJoCo's, and back."""
    task = TASKS["walk"]
    model = Scene(task).model
    data = mujoco.MjData(model)
    foot = walker.HIP[None] + np.random.default_rng(0).uniform([-0.1, -0.06, -0.33], [0.1, 0.06, -0.2], (5, 4, 3))
    foot[..., 1] += walker.OUT * walker.SIDE
    joints = walker.joints_at(foot - walker.HIP)
    np.testing.assert_allclose(walker.feet_at(joints), foot - walker.HIP, atol=1e-12)
    for angles, wanted in zip(joints, foot, strict=True):
        data.qpos[:] = [0, 0, 1, 1, 0, 0, 0, *angles.ravel()]
        mujoco.mj_kinematics(model, data)
        there = np.array([data.geom(f"{leg}_foot").xpos for leg in walker.LEGS])
        np.testing.assert_allclose(there - [0, 0, 1], wanted, atol=1e-12)


def test_terrain_is_the_share_of_the_relief_that_stands_out() -> None:
    """Balls dropped on the ground lie on the relief, sunk by the share that does not stand out, or on level ground."""
    task = walker.Walk()
    heights = task.height * walker.relief(task.extent, task.spacing, task.pad, 1.0, task.seed)
    assert heights.max() == pytest.approx(task.height) and heights.min() == 0.0
    axis = np.linspace(-task.extent, task.extent, len(heights))
    assert (heights[np.hypot(*np.meshgrid(axis, axis)) < task.pad] == 0).all()
    world = np.stack([worlds.world({"terrain": share}) for share in (0.0, 0.5, 1.0)])
    top = np.array([-task.height, -task.height / 2, 0.0]) - walker.SUNK
    model = Scene(task).model
    place = task.fields(model, world)["geom_pos"][:, model.geom("relief").id, 2]
    np.testing.assert_allclose(place, top)


def test_walking_is_harder_the_rougher_the_ground() -> None:
    task, scene = TASKS["walk"], Scene(TASKS["walk"])
    start = task.draw(np.random.default_rng(3), 8, "wide")
    tilt = [
        np.abs(scene.play(start, earth(8, terrain=share), lambda _, o: task.demonstrate(o), 200).observation[..., 3:5]).mean()
        for share in (0.0, 1.0)
    ]
    assert tilt[1] > 1.3 * tilt[0]


# ---------------------------------------------------------------- worlds


def test_gravity_is_the_scenes_own_unless_a_world_says_otherwise(played: Any) -> None:
    task, scene, _, _ = played
    gravity = {"landing": 1.62, "inspection": 0.0}.get(task.name, 9.81)
    assert worlds.of(scene.world(), "gravity") == pytest.approx(gravity) and not task.fields(scene.model, own(scene, 2))
    for other in (9.81, 1.62, 0.0):
        changed = task.fields(scene.model, scene.world({"gravity": other})[None])
        np.testing.assert_allclose(changed.get("opt.gravity", scene.model.opt.gravity[None])[0], [0, 0, -other], atol=1e-6)


def test_an_answer_says_the_gravity_that_it_is_made_in() -> None:
    domain = Motions("robotics/landing", TASKS["landing"], Demonstrations((), "", ""), stride=5)
    for parameters, gravity in (({}, 1.62), ({"gravity": 9.81}, 9.81)):
        told = {name: "t" for name in ("title", "domain", "asks", "command", "takes", "expect")}
        asked = MotionScenario(**told, members=1, seed=0, starts=2, parameters=parameters)
        np.testing.assert_allclose(domain.ask(asked, Path()).coords["world_gravity"][1], gravity, rtol=1e-6)


def test_named_worlds_are_worlds_with_a_source() -> None:
    for name, each in worlds.PRESETS.items():
        assert worlds.of(worlds.world(worlds.preset(name).values), next(iter(each.values))) == pytest.approx(
            next(iter(each.values.values()))
        )
        assert len(each.source) > 10
    with pytest.raises(BadInput, match="space_moon"):
        worlds.preset("venus")


def test_drawn_worlds_stay_in_their_ranges() -> None:
    drawn = worlds.draw(np.random.default_rng(0), 2000, {"gravity": [1.0, 4.0], "friction": [0.1, 10.0, "log"]})
    gravity, friction = worlds.of(drawn, "gravity"), worlds.of(drawn, "friction")
    assert gravity.min() >= 1 and gravity.max() <= 4 and gravity.mean() == pytest.approx(2.5, abs=0.1)
    assert np.median(friction) == pytest.approx(1.0, rel=0.15)
    assert (worlds.of(drawn, "payload") == 1).all()
    for wrong in (
        {"gravity": [4, 1]},
        {"gravity": [1]},
        {"wind": [0, 1]},
        {"friction": [0, 1, "log"]},
        {"gravity": [0, 99]},
        {"gravity": "1"},
        {"friction": 0.5},
    ):
        with pytest.raises(BadInput, match="world"):
            worlds.draw(np.random.default_rng(0), 2, wrong)


def told(seen: np.ndarray, frames: int = 200, **values: float) -> np.ndarray:
    """What sensors of a push tell of a scene that stands still, `[frame, count, channel]`."""
    sensors, answer = worlds.Sensors(np.arange(len(seen)) + 7), []
    for _ in range(frames):
        sensors = sensors.tell(seen, earth(len(seen), **values), TASKS["push"].observation, 20.0)
        answer.append(sensors.told)
    return np.array(answer)


def test_faults_are_what_their_names_say() -> None:
    channels = TASKS["push"].observation
    goal = [index for index, each in enumerate(channels) if each.name.startswith("goal")]
    read = [index for index in range(len(channels)) if index not in goal]
    seen = np.full((20, len(channels)), 0.3)
    assert (told(seen)[..., read] == 0.3).all()
    noisy = told(seen, noise=2.0)
    sigma = np.array([worlds.NOISE[each.units] for each in channels])
    np.testing.assert_allclose((noisy - 0.3).std((0, 1))[read], 2 * sigma[read], rtol=0.08)
    assert (noisy[..., goal] == 0.3).all()  # nobody measures a goal
    np.testing.assert_allclose(told(seen, drift=0.01)[100, :, read], 0.3 * (1 + 0.01 * 5.0))
    flipped = told(seen, flips=0.1)[..., read]
    moved_by = np.abs(flipped - 0.3) / np.array([each.upper - each.lower for each in channels])[read]
    assert (moved_by > 0).mean() == pytest.approx(0.1, abs=0.01)
    assert moved_by.max() < 0.51
    twice = told(seen, noise=1.0, dropout=0.3)[..., read]
    assert (np.diff(twice, axis=0) == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert np.array_equal(told(seen, noise=1.0, flips=0.1)[:, 3:5], told(seen[:5], noise=1.0, flips=0.1)[:, 3:5])  # by seed alone


def test_a_policy_sees_what_sensors_tell() -> None:
    task = TASKS["arm_reach"]
    start, world = task.draw(np.random.default_rng(0), 3, "narrow"), earth(3, noise=5.0, dropout=0.1)
    given: list[np.ndarray] = []

    def policy(_: int, seen: np.ndarray) -> np.ndarray:
        given.append(seen.astype(np.float32))
        return task.demonstrate(seen)

    played = Scene(task).play(start, world, policy, 10)
    assert np.array_equal(np.stack(given, 1), played.seen)
    assert 1e-3 < np.abs(played.seen - played.observation)[..., :7].std() < 1e-2
    again = Scene(task).replay(start, world, played.action)
    assert np.array_equal(again.observation, played.observation)
