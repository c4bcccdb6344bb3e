"""The robotics twin from demonstrations to delivery, in a tiny version: what a trainer reads is what was played and checked."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from domains.robotics import lerobot
from domains.robotics.push import PlanarPush
from domains.robotics.tasks import Scene
from domains.robotics.worlds import world
from twinsim import cli

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn")]
TINY = [
    *("set.starts=6", "domain.exam_starts=4", "domain.demonstrations.count=6"),
    *("train.steps=400", "train.batch=64", "generate.tile=6", "evaluate.members=2"),
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robotics")


def test_a_run_delivers_episodes_that_play_again(out: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "robotics/thousand_pushes", *TINY, f"out={out}", "set.formats=[lerobot,robomimic,mcap]"]) == 0
    (folder,) = (each for each in (out / "runs").iterdir() if each.is_dir())
    with xr.open_zarr(folder / "samples.zarr", consolidated=False) as answer:
        success, start = answer["success"].values, {name: answer[f"start_{name}"].values for name in PlanarPush.start}
    assert success.mean() >= 0.5
    layout, episodes = lerobot.read(folder / "lerobot")
    assert len(episodes) == success.sum() and "Synthetic" in layout.note
    held = np.flatnonzero(success[0] > 0)
    for episode, row in zip(episodes, held, strict=True):  # from the file alone: the same frames, to the bit
        again = Scene(PlanarPush()).replay(
            {name: np.asarray(values[row : row + 1], np.float64) for name, values in start.items()},
            world(episode.environment)[None],
            episode.action[None],
        )
        assert np.array_equal(again.observation[0], episode.observation)
    assert all(
        (folder / name).stat().st_size for name in ("robomimic.hdf5", "episodes.mcap", "scene.xml", "contact_sheet.mp4", "report.html")
    )
    assert "Why episodes were rejected" in (folder / "report.html").read_text()
    capsys.readouterr()
    assert cli.main(["verify", str(folder)]) == 0


def test_no_episode_that_holds_is_no_dataset(out: Path, capsys: pytest.CaptureFixture) -> None:
    words = [*TINY, f"out={out}", "set.world=nuclear_high_dose", "set.parameters={torque: 0.02}", "generate.attempts=1"]
    assert cli.main(["run", "robotics/thousand_pushes", *words]) == 2
    assert "expected episodes that hold" in capsys.readouterr().err


def test_a_world_that_is_none_is_one_sentence(out: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["run", "robotics/slippery_push", *TINY, f"out={out}", "set.world=venus"]) == 2
    assert "world venus: expected one of space_moon" in capsys.readouterr().err
