"""Designs of an arm: what changes with them, what a search finds, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from domains.robotics import arm, design, worlds
from domains.robotics.physics import compiled
from twinsim.base import BadInput

TASK = arm.ArmReach(frames=40)


def judged(time: float, work: float, success: float = 1.0) -> design.Judged:
    return design.Judged(arm.Build(), time, work, success)


def test_an_arm_built_otherwise_is_the_models() -> None:
    build = arm.Build(upper=1.2, fore=0.8, gear=0.5)
    model = compiled(replace(TASK, build=build).spec())
    data = mujoco.MjData(model)
    joints = np.random.default_rng(0).uniform(arm.LOWER, arm.UPPER, (3, arm.JOINTS))
    for angles, place in zip(joints, arm.tool(joints, build.offset), strict=True):
        data.qpos[: arm.JOINTS] = angles
        mujoco.mj_kinematics(model, data)
        hand = model.body("link7").id
        np.testing.assert_allclose(data.xpos[hand] + data.xmat[hand].reshape(3, 3) @ arm.OFFSET[-1], place, atol=1e-12)
    own = compiled(TASK.spec())
    np.testing.assert_allclose(model.actuator_forcerange, 0.5 * own.actuator_forcerange)
    np.testing.assert_allclose(model.dof_armature, 0.25 * own.dof_armature)


def test_a_front_is_what_none_beats_and_does_not_fail_more() -> None:
    a, b, c, d, e = judged(1, 9), judged(2, 5), judged(2.5, 6), judged(3, 5), judged(0.5, 1, success=0.5)
    assert design._front([d, c, e, b, a], 1.0) == [a, b]


@pytest.mark.slow
def test_a_search_finds_an_arm_that_does_better(tmp_path: Path) -> None:
    """With quicker joints alone, by starts it did not see."""
    found = design.optimise(TASK, worlds.world(), vary=["lag", "gear"], starts=2, weights=[1.0], generations=1, population=4)
    assert found.nominal.success == 1 and len(found.tried) == 5
    assert found.front[0].time < 0.95 * found.nominal.time
    again = design.optimise(TASK, worlds.world(), vary=["lag", "gear"], starts=2, weights=[1.0], generations=1, population=4)
    assert found == again
    assert design.picture(found).startswith(b"<?xml")


def test_files_of_a_search(tmp_path: Path) -> None:
    told: list[int] = []
    lines = design.optimise_files(
        tmp_path,
        lambda done, _: told.append(done),
        world="space_moon",
        vary=["lag"],
        starts=2,
        weights=[1],
        generations=1,
        population=4,
    )
    assert "nominal" in lines[1] and told == [1]
    kept = json.loads((tmp_path / "design.json").read_text())
    assert kept["world"]["gravity"] == pytest.approx(1.62)
    assert len((tmp_path / "tried.csv").read_text().splitlines()) == 6
    assert mujoco.MjModel.from_xml_path(str(tmp_path / "design_0.xml")).nu == arm.JOINTS


def test_a_design_is_judged_in_the_world_as_it_is() -> None:
    """Slower by as many steps as the line is late; and what sensors that fail tell costs work."""
    start = TASK.draw(np.random.default_rng(0), 4, "narrow")

    def judge(**values: float) -> design.Judged:
        return design.judge(TASK, arm.Build(), start, np.repeat(worlds.world(values)[None], 4, 0))

    plain = judge()
    assert judge(latency=3.0).time - plain.time >= 2 / TASK.rate
    assert judge(noise=30.0).work > 1.2 * plain.work


def test_an_arm_too_short_is_worst() -> None:
    values = {"tool_x": 0.5, "tool_y": 0.0, "tool_z": 0.3, "goal_x": 0.65, "goal_y": 0.0, "goal_z": 0.3}
    start = {name: np.array([value]) for name, value in values.items()}
    world = worlds.world()[None]
    assert np.isfinite(design.judge(TASK, arm.Build(), start, world).time)
    assert design.judge(TASK, arm.Build(upper=0.6, fore=0.6), start, world).time == np.inf


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task": "sing"}, "task sing: expected one of arm_reach"),
        ({"world": "venus"}, "world venus: expected one of"),
        ({"vary": ["colour"]}, "vary: expected some of upper"),
        ({"weights": [2.0]}, "weights: expected numbers from 0 to 1"),
        ({"starts": 0}, "starts and generations"),
    ],
)
def test_what_cannot_be_searched_is_one_sentence(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        design.optimise_files(tmp_path, **options)
