"""Arms of the user: kinematics against MuJoCo's, servos where there are none, goals that are reached, and models that will not do."""

from pathlib import Path
from typing import Any, cast

import mujoco
import numpy as np
import pytest

from domains.robotics import results, tasks, worlds
from domains.robotics.kinematics import chain_of
from domains.robotics.physics import compiled
from domains.robotics.reach import BANDWIDTH, OwnReach
from domains.robotics.tasks import Scene
from twinsim.base import BadInput

INERTIA = '<inertial><origin xyz="0 0 .15"/><mass value="1.5"/><inertia ixx=".01" iyy=".01" izz=".002" ixy="0" ixz="0" iyz="0"/></inertial>'


def link(name: str) -> str:
    shape = '<origin xyz="0 0 .15"/><geometry><cylinder radius=".03" length=".2"/></geometry>'
    return f'<link name="{name}">{INERTIA}<collision>{shape}</collision></link>'


def joint(name: str, parent: str, child: str, xyz: str, axis: str, kind: str = "revolute", least: float = -2.5, most: float = 2.5) -> str:
    limit = f'<axis xyz="{axis}"/><limit lower="{least}" upper="{most}" effort="80" velocity="2"/>' if kind != "fixed" else ""
    place = f'<parent link="{parent}"/><child link="{child}"/><origin xyz="{xyz}" rpy=".1 -.2 .3"/>'
    return f'<joint name="{name}" type="{kind}">{place}{limit}</joint>'


# six joints, one a slide, frames turned against each other, a flange that is fixed to the last link; no actuator, as URDF has none
URDF = "".join(
    [
        '<robot name="six"><link name="base"/>',
        *(link(f"link{index}") for index in range(1, 7)),
        '<link name="flange"/>',
        joint("turn", "base", "link1", "0 0 .3", "0 0 1"),
        joint("lift", "link1", "link2", "0 0 .3", "0 1 0"),
        joint("stretch", "link2", "link3", "0 0 .3", "0 0 1", "prismatic", 0, 0.3),
        joint("elbow", "link3", "link4", "0 0 .3", "0 1 0"),
        joint("roll", "link4", "link5", "0 0 .3", "0 0 1"),
        joint("wrist/bend", "link5", "link6", "0 0 .3", "1 0 0"),
        joint("end", "link6", "flange", "0 .02 .3", "0 0 1", "fixed"),
        "</robot>",
    ]
)
SERVOED = """<mujoco model="two"><option timestep="0.004"/><default><geom type="capsule" size=".03"/></default><worldbody>
  <geom type="plane" size="2 2 .1"/>
  <body name="upper" pos="0 0 .5"><joint name="shoulder" axis="0 0 1" range="-170 170"/><geom fromto="0 0 0 .4 0 0"/>
    <body name="lower" pos=".4 0 0"><joint name="elbow" axis="0 1 0" range="-150 150"/><geom fromto="0 0 0 .3 0 0"/>
      <body name="wrist" pos=".3 0 0"><joint name="bend" axis="0 1 0" range="-150 150"/><geom fromto="0 0 0 .1 0 0"/>
        <site name="tip" pos=".15 0 0"/>
        <body name="finger" pos=".1 0 0"><joint name="grip" type="slide" range="0 .02"/><geom type="sphere" size=".01"/></body>
  </body></body></body></worldbody>
  <actuator><position name="p1" joint="shoulder" kp="400" kv="40"/><position name="hand" joint="grip" kp="50" kv="5"/>
    <position name="p2" joint="elbow" kp="400" kv="40"/><motor joint="bend"/></actuator>
  <keyframe><key name="home" qpos="0 .8 .6 .01" ctrl="0 .8 .01 0"/></keyframe></mujoco>"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: Any) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("robots")
    (folder / "six.urdf").write_text(URDF)
    (folder / "two.xml").write_text(SERVOED)
    return {"six": OwnReach(model=str(folder / "six.urdf"), tool="flange"), "two": OwnReach(model=str(folder / "two.xml"), tool="tip")}


@pytest.mark.parametrize("name", ["six", "two"])
def test_the_chain_is_the_models(own: dict[str, Any], name: str) -> None:
    model = compiled(own[name].spec())
    chain, joints = chain_of(model, own[name].tool)
    data, at = mujoco.MjData(model), model.jnt_qposadr[joints]
    poses = np.random.default_rng(0).uniform(chain.lower, chain.upper, (4, len(joints)))
    place, slopes = chain.tool(poses), chain.jacobian(poses)
    for index, pose in enumerate(poses):
        data.qpos[at] = pose
        mujoco.mj_forward(model, data)
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        if name == "two":
            found = data.site("tip").xpos
            mujoco.mj_jacSite(model, data, linear, angular, model.site("tip").id)
        else:
            found = data.body("flange").xpos
            mujoco.mj_jacBody(model, data, linear, angular, model.body("flange").id)
        np.testing.assert_allclose(place[index], found, atol=1e-12)
        np.testing.assert_allclose(slopes[index], np.concatenate([linear, angular])[:, model.jnt_dofadr[joints]], atol=1e-12)
    near = chain.joints_at(chain.tool(chain.rest[None] + 0.05))
    np.testing.assert_allclose(chain.tool(near), chain.tool(chain.rest[None] + 0.05), atol=1e-3)


@pytest.mark.parametrize("name", ["six", "two"])
def test_the_demonstrator_reaches_its_goals_and_replay_is_exact(own: dict[str, Any], name: str) -> None:
    task: Any = own[name]
    noise, scene = np.random.default_rng(0), Scene(task)
    world = np.repeat(worlds.world()[None], 12, 0)
    for region in ("narrow", "wide"):
        start = task.draw(noise, 12, region)
        played = scene.play(start, world, tasks.wobbling(task, noise, 0.25))
        assert tasks.reached(task, played.after)[1].mean() >= (0.9 if region == "narrow" else 0.6)  # straight ways may end at a limit
        assert played.depth[:, 0].max() == 0 and played.depth.max() < 0.005 and played.gain.max() < 0.01
    some = {key: values[2:5] for key, values in start.items()}
    again = scene.replay(some, world[:3], played.action[2:5, :40])
    assert np.array_equal(again.observation, played.observation[2:5, :40])
    assert [channel.name for channel in task.observation][-6:] == ["tool_x", "tool_y", "tool_z", "goal_x", "goal_y", "goal_z"]


def test_places_are_bounded_by_the_reach_of_the_arm(tmp_path: Path) -> None:
    """Links of 1.2 m on a pedestal 3 m away: nothing that the arm does is beyond its limits."""
    text = SERVOED.replace('pos="0 0 .5"', 'pos="3 0 1.5"')
    for one, other in ((".4 0 0", "1.2 0 0"), (".3 0 0", "1.2 0 0")):
        text = text.replace(f'0 0 0 {one}"', f'0 0 0 {other}"').replace(f'pos="{one}"', f'pos="{other}"')
    (tmp_path / "long.xml").write_text(text)
    task: Any = OwnReach(model=str(tmp_path / "long.xml"), tool="tip")
    scene = Scene(task)
    played = scene.play(
        task.draw(np.random.default_rng(0), 4, "narrow"), np.repeat(scene.world()[None], 4, 0), lambda _, o: task.demonstrate(o), 5
    )
    for channel, values in zip(task.observation, np.moveaxis(played.observation, -1, 0), strict=True):
        assert channel.lower <= values.min() and values.max() <= channel.upper, channel.name
    bounds = {channel.name: (channel.lower, channel.upper) for channel in task.planned}
    np.testing.assert_allclose(list(bounds.values()), [(0.45, 5.55), (-2.55, 2.55), (-1.05, 4.05)])


def test_places_of_a_tool_on_a_slide_are_bounded_by_it_too(own: dict[str, Any]) -> None:
    task = own["six"]
    far = task._chained[0].length + 0.3
    np.testing.assert_allclose([channel.upper for channel in task.planned], np.array([0, 0, 0.3]) + far)


def test_joints_without_a_servo_get_one_and_others_keep_theirs(own: dict[str, Any]) -> None:
    six, two = compiled(own["six"].spec()), compiled(own["two"].spec())
    assert six.nu == 6
    np.testing.assert_allclose(six.actuator_biasprm[:, 1] / six.actuator_biasprm[:, 2], BANDWIDTH / 2)  # critically damped
    assert (six.body_gravcomp[1:] == 1).sum() == 7  # all that the joints carry
    kept = {two.actuator(index).name: two.actuator_gainprm[index, 0] for index in range(two.nu)}
    assert two.nu == 4 and kept["p1"] == kept["p2"] == 400 and kept["hand"] == 50 and "servo of bend" in kept
    held = own["two"].control(np.zeros((1, 12)), np.zeros((1, 3)))[0]
    assert held[[two.actuator("hand").id]] == pytest.approx(0.01)  # the gripper stays as the keyframe has it
    np.testing.assert_allclose(own["two"]._chained[0].rest, [0, 0.8, 0.6])
    assert own["two"].steps == round(1 / (20 * 0.004)) and two.opt.timestep == pytest.approx(0.05 / 12)
    assert [channel.name for channel in own["six"].observation][5] == "joint_wrist_bend"


@pytest.mark.parametrize("gravity", [[0.0, 0.0, 0.0], [0.0, 0.0, -1.62], [0.0, 0.0, -9.80665], [3.0, 0.0, -4.0]])
def test_gravity_is_that_of_the_file(tmp_path: Path, gravity: list[float]) -> None:
    told = '<option gravity="{}" timestep'.format(" ".join(map(str, gravity)))
    (tmp_path / "two.xml").write_text(SERVOED.replace("<option timestep", told))
    scene = Scene(cast(Any, OwnReach(model=str(tmp_path / "two.xml"), tool="tip")))
    assert worlds.of(scene.world(), "gravity") == pytest.approx(np.linalg.norm(gravity))
    assert not scene.task.fields(scene.model, scene.world()[None])
    down = gravity if any(gravity) else [0.0, 0.0, -1.0]
    ten = scene.task.fields(scene.model, scene.world({"gravity": 10.0})[None])["opt.gravity"][0]
    np.testing.assert_allclose(ten, 10 * np.array(down) / np.linalg.norm(down))


def test_sensors_of_motors_go_with_them_and_others_are_no_gaps(tmp_path: Path) -> None:
    """A sensor of a motor that a servo replaces, and one of the user's own that is called a gap."""
    told = '<sensor><actuatorfrc actuator="push"/><actuatorfrc name="kept" actuator="p1"/><jointpos name="gap 1" joint="bend"/></sensor>'
    text = SERVOED.replace("<motor ", '<motor name="push" ').replace("<keyframe>", f"{told}<keyframe>")
    (tmp_path / "two.xml").write_text(text)
    task: Any = OwnReach(model=str(tmp_path / "two.xml"), tool="tip", rest=[0.0, 0.8, -0.6])
    scene = Scene(task)
    assert [scene.model.sensor(index).name for index in range(scene.model.nsensor)] == ["kept", "gap 1", tasks.ALL]
    played = scene.replay(task.draw(np.random.default_rng(0), 2, "narrow"), scene.world()[None].repeat(2, 0), np.zeros((2, 3, 3)))
    assert played.observation[:, 0, 2].max() < -0.3 and played.depth.max() < 1e-3


def test_scene_of_an_arm_with_meshes_is_delivered_with_them(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/bob.obj").write_text("v 0 0 0\nv .1 0 0\nv 0 .1 0\nv 0 0 .1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    mesh = '<compiler meshdir="parts"/><asset><mesh name="bob" file="bob.obj"/></asset><worldbody><geom type="mesh" mesh="bob"/>'
    (tmp_path / "two.xml").write_text(SERVOED.replace("<worldbody>", mesh))
    shape = '<collision><geometry><mesh filename="package://six/parts/bob.obj"/></geometry></collision></link>'
    (tmp_path / "six.urdf").write_text(URDF.replace("</link>", shape, 1))
    for file, tool in (("two.xml", "tip"), ("six.urdf", "flange")):
        out = tmp_path / f"out_{tool}"
        out.mkdir()
        results.write_scene(OwnReach(model=str(tmp_path / file), tool=tool), out)
        assert mujoco.MjModel.from_xml_path(str(out / "scene.xml")).nmesh == 1
        assert len(list(out.rglob("*.obj"))) == 1


def test_files_are_told(own: dict[str, Any]) -> None:
    (told,) = tasks.inputs(own["six"])
    assert told["name"] == "six.urdf" and len(told["sha256"]) == 64 and told["size"] == len(URDF)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tool": "hand"}, "tool hand: expected a body or site of the model: upper, lower, wrist, finger, tip"),
        ({"rest": [0.0]}, "rest: expected 3 numbers within the limits of the joints"),
        ({"rest": [0.0, 9.0, 0.0]}, "rest: expected 3 numbers within the limits of the joints"),
    ],
)
def test_what_a_model_does_not_have_is_refused(own: dict[str, Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        OwnReach(**{"model": own["two"].model, "tool": "tip", **options}).observation  # noqa: B018 (read for what it raises)


@pytest.mark.parametrize(
    ("inside", "said"),
    [
        ('<body name="tip"><freejoint name="float"/><geom size=".1"/></body>', "joint float is free or a ball"),
        ('<body name="tip"><geom size=".1"/></body>', "expected it on a chain of joints, none moves it"),
        ('<body name="tip"><joint name="a" ref="10"/><geom size=".1"/></body>', "joint a: expected the reference position 0"),
        ('<body name="tip"><joint/><geom size=".1"/></body><site name="goal"/>', "expected no site called goal"),
        ('<body name="tip"><joint/><geom size=".1"/></body>', "expected names of all joints"),
    ],
)
def test_models_that_are_no_arms_are_refused(tmp_path: Path, inside: str, said: str) -> None:
    (tmp_path / "some.xml").write_text(f"<mujoco><worldbody>{inside}</worldbody></mujoco>")
    task = OwnReach(model=str(tmp_path / "some.xml"), tool="tip")
    with pytest.raises(BadInput, match=said):
        task.spec()


def test_places_out_of_reach_are_refused(own: dict[str, Any]) -> None:
    task = own["six"]
    start = {name: values[:1] for name, values in task.draw(np.random.default_rng(0), 1, "narrow").items()}
    with pytest.raises(BadInput, match=r"own_reach: goal at \[9.0, .* m: expected a place that flange can be brought to"):
        task.place({**start, "goal_x": np.array([9.0])})
    with pytest.raises(BadInput, match="own_reach: tool: expected finite metres"):
        task.place({**start, "tool_z": np.array([np.nan])})
    with pytest.raises(BadInput, match="region moon: expected narrow or wide"):
        task.draw(np.random.default_rng(0), 1, "moon")


def test_an_arm_that_somebody_else_made() -> None:
    """The seven joints of Gymnasium's Pusher: motors without position servos, other joints beside the arm's."""
    gymnasium = pytest.importorskip("gymnasium")
    file = Path(gymnasium.__file__).parent / "envs/mujoco/assets/pusher_v5.xml"
    task: Any = OwnReach(model=str(file), tool="tips_arm")
    noise, scene = np.random.default_rng(1), Scene(task)
    played = scene.play(task.draw(noise, 16, "wide"), np.repeat(worlds.world()[None], 16, 0), tasks.wobbling(task, noise, 0.25))
    assert len(task.observation) == 20 and tasks.reached(task, played.after)[1].mean() > 0.9
    environment = gymnasium.make("domains.robotics.environments:twinsim/OwnReach-v0", model=str(file), tool="tips_arm", region="narrow")
    assert environment.reset(seed=0)[0].shape == (20,)
