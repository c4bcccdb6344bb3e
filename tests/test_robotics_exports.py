"""Episodes leave in the formats that trainers read, each read back by its own reader; what comes in is checked."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco", reason="pip install 'twinsim[robotics]'")

from domains.robotics import lerobot, mcap, minari, robomimic, sheet, video, worlds  # noqa: E402
from domains.robotics.episodes import SYNTHETIC, Episode, Layout, check, check_same_robot, layout_of, transitions  # noqa: E402
from domains.robotics.push import PlanarPush  # noqa: E402
from domains.robotics.tasks import Channel, Scene  # noqa: E402
from twinsim.base import BadInput  # noqa: E402

SHARED = Path(os.environ.get("TWINSIM_SHARED", Path(__file__).parents[2] / "shared"))
G1 = SHARED / "data" / "robotics"
READER = SHARED / "peers" / "robotics" / "robotics_lerobot_read.py"
LEROBOT = os.environ.get("LEROBOT_PYTHON", "")
needs_g1 = pytest.mark.skipif(not (G1 / "g1_pick_bottle_train.parquet").exists(), reason=f"there is no G1 data in {G1}")
needs_lerobot = pytest.mark.skipif(
    not LEROBOT or not READER.exists(), reason=f"LEROBOT_PYTHON names no interpreter that has LeRobot, or there is no {READER}"
)

LAYOUT = Layout(
    robot="arm",
    task="Push the puck.",
    fps=20,
    observation=(Channel("joint", "rad", -2.6, 2.6), Channel("speed", "rad s-1"), Channel("turntable", "rad")),
    action=(Channel("move", "1", -1, 1),),
    mujoco="4.0.0",
    generator="diffusion",
    seed=7,
    licence="CC0-1.0",
)


def episodes(lengths: tuple[int, ...] = (7, 4, 7), **more: Any) -> list[Episode]:
    noise = np.random.default_rng(0)
    return [
        Episode(
            noise.uniform(-2.5, 2.5, (length, 3)).astype(np.float32),
            noise.uniform(-1, 1, (length, 1)).astype(np.float32),
            success=index != 1,
            seed=index + 10,
            environment={"gravity": 1.62 + index},
            **{name: make(length) for name, make in more.items()},
        )
        for index, length in enumerate(lengths)
    ]


def full() -> list[Episode]:
    """With everything that an episode may have: a red square that moves right by two pixels a frame."""

    def picture(length: int) -> np.ndarray:
        frames = np.full((length, 16, 32, 3), 40, np.uint8)
        for frame in range(length):
            frames[frame, 4:12, 2 * frame : 2 * frame + 8] = (200, 30, 30)
        return frames

    return episodes(
        final=lambda _: np.float32([0.5, 0.25, 0]), states=lambda length: np.arange(length * 4.0).reshape(-1, 4), images=picture
    )


def same(got: list[Episode], wanted: list[Episode]) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.observation, other.observation)
        np.testing.assert_array_equal(one.action, other.action)
        assert (one.success, one.seed, one.environment) == (other.success, other.seed, other.environment)


# ---------------------------------------------------------------- LeRobot


def test_lerobot_gives_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    wanted = full()
    lerobot.write(tmp_path / "set", LAYOUT, wanted)
    layout, got = lerobot.read(tmp_path / "set", images=True)
    assert layout == LAYOUT
    same(got, wanted)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(one.states, other.states)
        np.testing.assert_array_equal(one.final, other.final)
        assert one.images is not None and other.images is not None
        assert np.abs(one.images[..., 0].astype(float) - other.images[..., 0]).mean() < 8  # H.264 is lossy
    # a second time, over the first
    lerobot.write(tmp_path / "set", LAYOUT, episodes())
    assert not (tmp_path / "set" / "videos").exists() and not list(tmp_path.glob("*.partial"))


def test_lerobot_folder_is_as_the_format_has_it(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    wanted = episodes()
    lerobot.write(tmp_path / "set", LAYOUT, wanted)
    info = json.loads((tmp_path / "set/meta/info.json").read_text())
    assert (info["codebase_version"], info["total_episodes"], info["total_frames"], info["fps"]) == ("v3.0", 3, 18, 20)
    assert info["features"]["action"] == {"dtype": "float32", "shape": [1], "names": ["move"]}
    data = parquet.ParquetFile(tmp_path / "set" / info["data_path"].format(chunk_index=0, file_index=0))
    assert [data.metadata.row_group(group).num_rows for group in range(3)] == [7, 4, 7]
    frames = data.read()
    assert frames.column_names == list(info["features"])
    assert json.loads(frames.schema.metadata[b"twinsim"])["note"] == SYNTHETIC
    assert frames["index"].to_pylist() == list(range(18)) and frames["frame_index"].to_pylist()[6:9] == [6, 0, 1]
    np.testing.assert_array_equal(frames["timestamp"].to_numpy()[:3], np.float32([0, 0.05, 0.1]))
    assert frames["next.success"].to_pylist() == [row in (6, 17) for row in range(18)]
    tasks = parquet.read_table(tmp_path / "set/meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    # statistics are those of numpy
    rows = parquet.read_table(tmp_path / "set/meta/episodes/chunk-000/file-000.parquet")
    assert rows["dataset_to_index"].to_pylist() == [7, 11, 18] and rows["tasks"].to_pylist() == [["Push the puck."]] * 3
    whole = json.loads((tmp_path / "set/meta/stats.json").read_text())["observation.state"]
    every = np.concatenate([episode.observation for episode in wanted]).astype(np.float64)
    for name, reduce in {"mean": np.mean, "std": np.std, "min": np.min, "q10": lambda x, axis: np.quantile(x, 0.1, axis)}.items():
        np.testing.assert_allclose(whole[name], reduce(every, axis=0), rtol=1e-12)
        each = [reduce(episode.observation.astype(np.float64), axis=0) for episode in wanted]
        np.testing.assert_allclose(rows[f"stats/observation.state/{name}"].to_pylist(), each, rtol=1e-12)
    assert whole["count"] == [18] and rows["stats/action/count"].to_pylist() == [[7], [4], [7]]


def test_lerobot_rolls_over_to_a_new_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    wanted = episodes((50, 60, 70, 80))
    lerobot.write(tmp_path / "set", LAYOUT, wanted, data_files_size_in_mb=0.002)
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) > 1
    same(lerobot.read(tmp_path / "set")[1], wanted)


def test_lerobot_same_episodes_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("av")
    for name in "ab":
        lerobot.write(tmp_path / name, LAYOUT, full())
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 8
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_colours_have_the_statistics_of_numpy() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 6, 3)).astype(np.uint8)
    each, together = lerobot._colours(list(pictures))
    for name in ("min", "max", "mean", "std"):
        wanted = getattr(pictures.astype(np.float64) / 255, name)
        np.testing.assert_allclose(together[name].ravel(), wanted(axis=(0, 1, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(each[name][..., 0, 0], wanted(axis=(1, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(together["q50"].ravel(), np.median(pictures, axis=(0, 1, 2, 3)) / 255, atol=1 / 255)
    assert together["mean"].shape == (3, 1, 1) and together["count"] == [15]


def test_lerobot_broken_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    lerobot.write(tmp_path / "set", LAYOUT, episodes((3,)))
    monkeypatch.setattr(lerobot, "_write_tasks", full_disk)
    with pytest.raises(OSError, match="No space"):
        lerobot.write(tmp_path / "set", LAYOUT, episodes())
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(lerobot.read(tmp_path / "set")[1]) == 1  # the one before


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(BadInput, match="expected a new or empty folder, or one with meta/info.json"):
        lerobot.write(tmp_path, LAYOUT, episodes())
    assert (tmp_path / "thesis.tex").exists()


def test_lerobot_2_1_is_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    vector = {"dtype": "float32", "shape": [2], "names": [["left", "right"]]}
    info = {"codebase_version": "v2.1", "robot_type": "pair", "fps": 30, "features": {"observation.state": vector, "action": vector}}
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text(json.dumps(info))
    (tmp_path / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "Wave."}\n')
    for episode, length in enumerate((3, 2)):
        values = arrow.array((np.arange(2.0 * length).reshape(-1, 2) + 10 * episode).tolist(), arrow.list_(arrow.float32()))
        columns = {"observation.state": values, "action": values, "frame_index": range(length), "task_index": [0] * length}
        path = tmp_path / f"data/chunk-000/episode_{episode:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns | {"episode_index": [episode] * length}), path)
    layout, got = lerobot.read(tmp_path)
    assert (layout.robot, layout.task, layout.fps) == ("pair", "Wave.", 30)
    assert [channel.name for channel in layout.action] == ["left", "right"] and layout.note != SYNTHETIC
    assert [episode.frames for episode in got] == [3, 2] and got[1].observation[0, 0] == 10 and got[0].success


def g1(folder: Path) -> Path:
    """The G1 episodes as a LeRobot v2.1 folder."""
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    shutil.copy(G1 / "g1_pick_bottle_info.json", folder / "meta/info.json")
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "Pick up the yellow bottle on the table."}\n')
    (folder / "data/chunk-000/file-000.parquet").symlink_to(G1 / "g1_pick_bottle_train.parquet")
    return folder


@needs_g1
def test_real_episodes_are_rewritten_as_v3(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    layout, got = lerobot.read(g1(tmp_path / "real"))
    assert len(got) == 80 and sum(episode.frames for episode in got) == 29_417 and len(layout.action) == 26
    assert "which does not say" in layout.note
    lerobot.write(tmp_path / "v3", layout, got)
    again, rewritten = lerobot.read(tmp_path / "v3")
    assert again == layout
    same(rewritten, got)


@needs_g1
@needs_lerobot
@pytest.mark.slow
def test_lerobot_reads_real_episodes_with_its_own_reader(tmp_path: Path) -> None:
    layout, got = lerobot.read(g1(tmp_path / "real"))
    lerobot.write(tmp_path / "v3", layout, got)
    assert "OK" in read_by_lerobot(tmp_path / "v3", 80, 29_417)


@needs_lerobot
@pytest.mark.slow
@pytest.mark.parametrize("fps", [20.0, 12.5])
def test_lerobot_reads_ours_with_its_own_reader(tmp_path: Path, fps: float) -> None:
    lerobot.write(tmp_path / "set", replace(LAYOUT, fps=fps), episodes((30, 40, 50, 60), states=lambda n: np.ones((n, 4))))
    assert "OK" in read_by_lerobot(tmp_path / "set", 4, 180)


def read_by_lerobot(folder: Path, count: int, frames: int) -> str:
    environment = {**os.environ, "HF_HOME": str(folder.parent / "cache"), "PYTHONPATH": ""}
    command = [LEROBOT, str(READER), str(folder), str(count), str(frames)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


# ---------------------------------------------------------------- other formats


def test_robomimic_has_the_fields_of_its_loader(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    wanted = full()
    robomimic.write(tmp_path / "set.hdf5", LAYOUT, wanted, model="<mujoco/>", environment="twinsim/PlanarPush-v0")
    with h5py.File(tmp_path / "set.hdf5") as file:
        data = file["data"]
        assert list(data) == ["demo_0", "demo_1", "demo_2"] and data.attrs["total"] == 18
        assert json.loads(data.attrs["env_args"])["env_name"] == "twinsim/PlanarPush-v0"
        assert json.loads(data.attrs["twinsim"])["note"] == SYNTHETIC
        demo = data["demo_0"]
        assert demo.attrs["num_samples"] == 7 and demo.attrs["model_file"] == "<mujoco/>"
        np.testing.assert_array_equal(demo["actions"], wanted[0].action)
        np.testing.assert_array_equal(demo["states"], wanted[0].states)
        np.testing.assert_array_equal(demo["obs/top_image"], wanted[0].images)
        np.testing.assert_array_equal(demo["obs/state"][1:], demo["next_obs/state"][:-1])
        np.testing.assert_array_equal(demo["next_obs/state"][-1], wanted[0].final)
        assert demo["rewards"][:].sum() == 1 and data["demo_1/rewards"][:].sum() == 0 and demo["dones"][-1] == 1
        assert file["mask/train"][:].tolist() == [b"demo_0", b"demo_1"] and file["mask/valid"][:].tolist() == [b"demo_2"]


@pytest.mark.parametrize("known", [True, False])
def test_minari_reads_its_data_set(tmp_path: Path, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("minari", reason="pip install 'twinsim[robotics]'")
    pytest.importorskip("h5py")
    wanted = full() if known else episodes()
    minari.write(tmp_path, LAYOUT, wanted, name="twinsim/push-v0")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert list(reader.list_local_datasets()) == ["twinsim/push-v0"]
    got = reader.load_dataset("twinsim/push-v0")
    assert got.total_episodes == 3 and got.total_steps == (18 if known else 15)
    for episode, other in zip(got.iterate_episodes(), wanted, strict=True):
        observation, action = transitions(other)
        np.testing.assert_array_equal(episode.observations, observation)
        np.testing.assert_array_equal(episode.actions, action)
        assert len(episode.observations) == len(episode.actions) + 1
        assert (bool(episode.terminations[-1]), bool(episode.truncations[-1])) == (other.success, not other.success)
    metadata = got.storage.metadata
    assert metadata["description"].startswith(SYNTHETIC) and metadata["observation_units"] == ["rad", "rad s-1", "rad"]
    told = [*got.storage.get_episode_metadata([0, 1])]
    assert [each["seed"] for each in told] == [10, 11]


def test_mcap_reads_its_recording(tmp_path: Path) -> None:
    pytest.importorskip("mcap")
    from mcap.reader import make_reader

    wanted = episodes()
    mcap.write(tmp_path / "set.mcap", LAYOUT, wanted)
    with (tmp_path / "set.mcap").open("rb") as stream:
        reader = make_reader(stream)
        summary = reader.get_summary()
        assert summary is not None and summary.statistics is not None
        assert summary.statistics.message_count == 18 and summary.statistics.metadata_count == 4
        messages = [(message.log_time, json.loads(message.data), schema) for schema, _, message in reader.iter_messages()]
        told = {record.name: record.metadata for record in reader.iter_metadata()}
    seen = np.array([[message["observation"][channel.name] for channel in LAYOUT.observation] for _, message, _ in messages])
    np.testing.assert_array_equal(seen.astype(np.float32), np.concatenate([episode.observation for episode in wanted]))
    times = [time for time, _, _ in messages]
    assert times == sorted(times) and times[1] - times[0] == 50_000_000
    schema = messages[0][2]
    assert schema is not None and json.loads(schema.data)["properties"]["observation"]["properties"]["joint"]["description"] == "rad"
    assert told["twinsim"]["note"] == SYNTHETIC and json.loads(told["episode 1"]["environment"]) == {"gravity": 2.62}


@pytest.mark.parametrize(
    ("missing", "write"),
    [
        ("pyarrow", lambda folder: lerobot.write(folder / "set", LAYOUT, episodes())),
        ("av", lambda folder: video.read(folder / "x.mp4")),
        ("h5py", lambda folder: robomimic.write(folder / "x.hdf5", LAYOUT, episodes())),
        ("minari", lambda folder: minari.write(folder, LAYOUT, episodes())),
        ("mcap", lambda folder: mcap.write(folder / "x.mcap", LAYOUT, episodes())),
    ],
)
def test_a_missing_package_is_named_with_its_command(missing: str, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=r"not installed: pip install 'twinsim\[robotics\]'"):
        write(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what comes in


def spoilt(**changes: Any) -> list[Episode]:
    good = episodes()
    return [good[0], replace(good[1], **changes), good[2]]


def with_value(column: int, value: float) -> list[Episode]:
    seen = episodes()[1].observation.copy()
    seen[2, column] = value
    return spoilt(observation=seen)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([], "x: expected episodes, got none"),
        (with_value(0, np.nan), r"x: episode 1, frame 2: joint: expected -2.6 to 2.6 rad, got nan"),
        (with_value(0, 90), r"x: episode 1, frame 2: joint: expected -2.6 to 2.6 rad, got 90, which degrees would explain"),
        (with_value(0, 3), r"x: episode 1, frame 2: joint: expected -2.6 to 2.6 rad, got 3"),
        (with_value(2, 90), r"turntable: expected finite rad, got 90, 14 turns: degrees taken for radians\?"),
        (
            spoilt(observation=np.zeros((4, 26), np.float32)),
            r"episode 1: observation: expected \[frames, 3\] for 3 .*, got \[4, 26\]: another",
        ),
        (spoilt(observation=np.zeros((0, 3)), action=np.zeros((0, 1))), "episode 1: observation: expected one frame or more, got none"),
        (spoilt(observation=np.zeros((5, 3))), "episode 1: observation: expected as many frames as actions, 4, got 5"),
        (spoilt(states=np.zeros((4, 8))), r"episode 1: states: expected the same as in episode 0, none, got \[frames, 8\]"),
        (spoilt(environment={}), r"episode 1: environment: expected 1 \(gravity\), got none"),
        (spoilt(final=np.float32([1, 2, np.nan])), "episode 1: final observation: expected 3 finite numbers"),
    ],
)
def test_bad_episodes_are_answered_by_a_sentence(bad: list[Episode], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence) as error:
        check(LAYOUT, bad, "x")
    assert "\n" not in str(error.value)


def test_a_joint_that_winds_up_or_overshoots_a_little_is_accepted() -> None:
    check(LAYOUT, with_value(2, 7.0), "x")
    check(LAYOUT, with_value(0, 2.65), "x")


def test_another_robot_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    lerobot.write(tmp_path / "set", LAYOUT, episodes())
    push = layout_of(PlanarPush(), "none", 0, "CC0-1.0")  # type: ignore[arg-type]
    with pytest.raises(
        BadInput, match=r"observation of another robot: expected 12 \(joint1, joint2, .*\), got 3 \(joint, speed, turntable\)"
    ):
        lerobot.read(tmp_path / "set", push)
    with pytest.raises(BadInput, match="expected 20 frames a second, got 30"):
        check_same_robot(LAYOUT, replace(LAYOUT, fps=30), "x")


def test_units_of_a_foreign_folder_come_from_the_layout_that_is_expected(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    bare = replace(LAYOUT, observation=tuple(Channel(channel.name, "") for channel in LAYOUT.observation))
    lerobot.write(tmp_path / "set", bare, with_value(0, 90))
    (tmp_path / "set/meta/twinsim.json").unlink()
    assert lerobot.read(tmp_path / "set")[0].observation[0].units == ""
    with pytest.raises(BadInput, match="which degrees would explain"):
        lerobot.read(tmp_path / "set", LAYOUT)


def drop_footer(folder: Path) -> None:
    file = next((folder / "data").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:-200])


def change_info(folder: Path, **changes: Any) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    (folder / "meta/info.json").write_text(json.dumps(info | changes))


def change_frames(folder: Path, **changes: Any) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    (file,) = (folder / "data").rglob("*.parquet")
    table = parquet.read_table(file)
    for name, change in changes.items():
        table = table.set_column(table.column_names.index(name), name, arrow.array(change(table[name].to_numpy())))
    parquet.write_table(table, file)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (drop_footer, "file-000.parquet: expected a whole Parquet file, got one without its footer"),
        (lambda folder: next((folder / "data").rglob("*.parquet")).write_bytes(b""), "got one without its footer"),
        (lambda folder: (folder / "meta/info.json").unlink(), "info.json: expected a LeRobot dataset with this file, got none"),
        (lambda folder: (folder / "meta/info.json").write_text("{"), "info.json: expected JSON"),
        (lambda folder: (folder / "meta/info.json").write_text("[]"), "info.json: expected a JSON object, got list"),
        (lambda folder: change_info(folder, codebase_version="v1.6"), "expected a LeRobot dataset of version v2.0, v2.1, v3.0, got v1.6"),
        (lambda folder: change_info(folder, features={}), "expected the feature observation.state, got"),
        (lambda folder: change_info(folder, features={"observation.state": 3}), "expected the feature observation.state, got"),
        (
            lambda folder: (folder / "meta/twinsim.json").write_text('{"observation": [3], "action": []}'),
            "that twinsim writes, got another",
        ),
        (lambda folder: change_info(folder, fps="fast"), "expected fps, a number, got fast"),
        (lambda folder: change_info(folder, total_frames=19), "expected 3 episodes and 19 frames, as meta/info.json says, got 3 and 18"),
        (lambda folder: (folder / "meta/twinsim.json").write_text("{}"), "twinsim.json: expected the description that twinsim writes"),
        (lambda folder: shutil.rmtree(folder / "data"), "data: expected Parquet files in folders, got none"),
        (
            lambda folder: change_frames(folder, frame_index=lambda values: values + (values > 2)),
            "frame_index: episode 0, frame 2: expected frames one after the other, got 2 and then 4",
        ),
        (
            lambda folder: change_frames(folder, timestamp=lambda values: values * np.float32(20 / 30)),
            "timestamp: episode 0, frame 0: expected frames at 20 frames a second, got 0 and then 0.0333333",
        ),
    ],
)
def test_a_damaged_folder_is_answered_by_a_sentence(spoil: Any, sentence: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    lerobot.write(tmp_path / "set", LAYOUT, episodes())
    spoil(tmp_path / "set")
    with pytest.raises(BadInput, match=sentence) as error:
        lerobot.read(tmp_path / "set")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- contact sheets


def moving(count: int = 5) -> tuple[Any, np.ndarray]:
    """The push with the puck going right, the goal and the arm out of its way."""
    model = Scene(PlanarPush()).marked({"goal_x": 0.5, "goal_y": -0.3})
    positions = np.zeros((count, model.nq))
    positions[:, 0] = 1.5
    positions[:, 2] = np.linspace(0.3, 0.6, count)
    return model, positions


def redness(frames: np.ndarray) -> np.ndarray:
    """Mean column of what is red, a frame."""
    red = (frames[..., 0].astype(int) > frames[..., 1].astype(int) + 60).astype(float)
    assert red.sum((1, 2)).min() > 0
    return (red.sum(1) * np.arange(frames.shape[2])).sum(1) / red.sum((1, 2))


def test_a_drawing_from_above_shows_what_moves() -> None:
    model, positions = moving()
    frames = sheet.draw(model, positions, size=64)
    assert frames.shape == (5, 64, 64, 3) and frames.dtype == np.uint8
    column = redness(frames)
    # linear in the puck's place, at the scale of the drawing
    pixels = 64 * np.diff(positions[:, 2]) / (model.stat.extent * sheet.WINDOW)
    np.testing.assert_allclose(np.diff(column), pixels, atol=0.3)


def test_rendering_shows_what_moves() -> None:
    if not sheet._backend():
        pytest.skip("there is no GL library that works")
    model, positions = moving()
    frames = sheet.render(model, positions, size=64, camera="top")
    assert frames.shape == (5, 64, 64, 3) and (np.diff(redness(frames)) > 0.5).all()
    with pytest.raises(BadInput, match="camera side: expected one of top"):
        sheet.render(model, positions, camera="side")


def test_without_a_gl_library_it_is_drawn_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sheet, "_backend", lambda: "")
    model, positions = moving()
    told: list[str] = []
    np.testing.assert_array_equal(sheet.pictures(model, positions, size=32, tell=told.append), sheet.draw(model, positions, size=32))
    assert len(told) == 1 and "expected a GL library" in told[0]
    with pytest.raises(BadInput, match=r"expected finite positions \[frame, 4\], got \[3, 7\]"):
        sheet.draw(model, np.zeros((3, 7)))


def test_goals_stand_where_the_start_has_them() -> None:
    scene = Scene(PlanarPush())
    moved = scene.marked({"goal_x": 0.4, "goal_y": -0.2, "puck_x": 9.0})
    np.testing.assert_allclose(moved.site("goal").pos, [0.4, -0.2, 0])
    np.testing.assert_allclose(scene.model.site("goal").pos, [0.5, 0, 0])


def test_light_is_that_of_the_pictures() -> None:
    model, positions = moving()
    plain, dark = (sheet.draw(model, positions, size=32, light=light).astype(float) for light in (1.0, 0.5))
    np.testing.assert_allclose(dark, plain / 2, atol=1)
    assert sheet.lit(model, 0.25).light_diffuse.sum() == pytest.approx(model.light_diffuse.sum() / 4)
    if sheet._backend():
        assert sheet.render(model, positions[:1], size=32, light=0.3).mean() < 0.6 * sheet.render(model, positions[:1], size=32).mean()


def test_a_contact_sheet_is_a_video_and_a_still(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from matplotlib import image

    grey = [np.full((length, 20, 20, 3), level, np.uint8) for length, level in ((2, 60), (4, 120), (3, 240))]
    sheet.write(tmp_path / "sheet.mp4", tmp_path / "sheet.png", grey, fps=10)
    frames = video.read(tmp_path / "sheet.mp4")
    assert frames.shape == (4, 46, 46, 3)  # 2 x 2 of 20 pixels, between borders of 2
    middle = [frames[-1][row, column].mean() for row, column in ((12, 12), (12, 34), (34, 12))]
    np.testing.assert_allclose(middle, [60, 120, 240], atol=4)
    still = (255 * image.imread(tmp_path / "sheet.png"))[..., :3]
    assert still.shape == (46, 46, 3) and still[12, 34, 0] == pytest.approx(120, abs=0.5)
    with pytest.raises(BadInput, match="expected episodes of one frame or more"):
        sheet.write(tmp_path / "none.mp4", tmp_path / "none.png", [], fps=10)
    assert not (tmp_path / "none.mp4").exists()


def test_a_video_of_odd_size_or_no_video_is_answered_by_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(BadInput, match="15 x 16 pixels: expected even numbers"), video.encoder(tmp_path / "x.mp4", 10, 15, 16):
        pass
    (tmp_path / "y.mp4").write_bytes(b"no video")
    with pytest.raises(BadInput, match="expected a video, got a file that cannot be decoded"):
        video.read(tmp_path / "y.mp4")


# ---------------------------------------------------------------- Gymnasium


@pytest.mark.parametrize("name", ["PlanarPush", "ArmReach", "ArmPush", "ArmPick", "Inspection", "Landing", "Walk"])
def test_gymnasium_accepts_the_environments(name: str) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env

    check_env(gymnasium.make(f"domains.robotics.environments:twinsim/{name}-v0").unwrapped)


def test_the_demonstrator_reaches_the_goal_in_the_environment() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    environment = gymnasium.make("domains.robotics.environments:twinsim/PlanarPush-v0", region="narrow")
    start = {"puck_x": 0.4, "puck_y": 0.1, "goal_x": 0.5, "goal_y": -0.05}
    seen, told = environment.reset(seed=1, options={"start": start})
    np.testing.assert_allclose(seen[6:8], [0.4, 0.1], atol=1e-6)
    assert told["off"] == pytest.approx(np.hypot(0.1, 0.15) - 0.04, abs=1e-5)
    task = environment.unwrapped.task
    total, steps = 0.0, 0
    while not (told["success"] or steps == task.frames):
        seen, reward, terminated, truncated, told = environment.step(task.demonstrate(seen[None].astype(np.float64))[0].astype(np.float32))
        total, steps = total + reward, steps + 1
    assert terminated and not truncated and total == 1 and told["off"] == 0
    with pytest.raises(BadInput, match="push: start: expected some of puck_x"):
        environment.reset(options={"start": {"cup_x": 0.1}})


def test_a_policy_in_the_environment_sees_what_the_sensors_tell() -> None:
    """The same faults as those of an episode that is played at once; success goes by what is."""
    gymnasium = pytest.importorskip("gymnasium")
    world, start = {"noise": 20.0, "dropout": 0.3}, {"puck_x": 0.4, "puck_y": 0.1, "goal_x": 0.4, "goal_y": 0.1}

    def told(seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        environment = gymnasium.make("domains.robotics.environments:twinsim/PlanarPush-v0", **options).unwrapped
        seen = [environment.reset(seed=seed, options={"start": start})[0]]
        faults = environment._sensors.seed
        for _ in range(5):
            now, _, success, _, info = environment.step(np.zeros(2, np.float32))
            seen.append(now)
        assert success and info == {"success": True, "off": 0.0}
        return np.stack(seen), faults

    seen, faults = told(3, world=world)
    scene, once = Scene(PlanarPush()), {name: np.array([value]) for name, value in start.items()}
    played = scene.replay(once, scene.world(world)[None], np.zeros((1, 5, 2), np.float32), worlds.Sensors(faults))
    np.testing.assert_array_equal(seen, np.concatenate([played.seen[0], played.last_seen]))
    np.testing.assert_array_equal(told(3)[0], np.concatenate([played.observation[0], played.last]))
    assert np.abs(seen - told(4, world=world)[0])[:, 6:8].max() > 1e-3  # another seed, other faults


def test_an_episode_that_does_not_succeed_is_truncated() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    environment = gymnasium.make("domains.robotics.environments:twinsim/PlanarPush-v0")
    environment.reset(seed=2)
    ends = [environment.step(np.zeros(2, np.float32))[2:4] for _ in range(environment.unwrapped.task.frames)]
    assert ends[-1] == (False, True) and not any(any(end) for end in ends[:-1])
