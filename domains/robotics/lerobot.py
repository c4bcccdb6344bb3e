"""LeRobotDataset folders: version 3.0 written and read, 2.0 and 2.1 read, without torch.

Source: huggingface/lerobot, src/lerobot/datasets (`dataset_metadata`, `dataset_writer`, `io_utils`, `compute_stats`), Apache-2.0.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.robotics import video
from domains.robotics.episodes import Episode, Layout, check, check_same_robot, unfinished
from domains.robotics.tasks import Channel
from twinsim.base import BadInput
from twinsim.files import check_room

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = "v3.0"
READABLE = ("v2.0", "v2.1", "v3.0")
INFO = "meta/info.json"
ABOUT = "meta/twinsim.json"  # what the format has no place for; its own files stay as its readers expect them
CHUNK_FILES = 1000
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATE, ACTION, SIMULATED, SUCCESS, DONE = "observation.state", "action", "simulator.state", "next.success", "next.done"
TIME = "timestamp"
JITTER = 0.1  # of the time between two frames; LeRobot's own tolerance is 1e-4 s
PICTURES = 20  # frames of an episode, about, that its colours' statistics are taken from
UNSTATED = "Read from a LeRobot folder, which does not say whether it was recorded or made."
MEGA = 1024**2


# ---------------------------------------------------------------- write


def write(
    folder: Path,
    layout: Layout,
    episodes: Sequence[Episode],
    *,
    data_files_size_in_mb: float = 100,
    video_files_size_in_mb: float = 200,
    camera: str = "top",
) -> None:
    """A LeRobotDataset v3.0 folder, whole or not at all. Raises BadInput.

    Simulator states are the column `simulator.state`, which policies do not take for an observation. Success stands in the last frame's
    `next.success`; seeds and worlds are further columns of the episodes' table; units, bounds and origin are in `meta/twinsim.json`.
    """
    arrow = _arrow()
    check(layout, episodes, str(folder))
    with unfinished(folder, INFO) as partial:
        lengths = np.array([episode.frames for episode in episodes])
        values = _columns(layout, episodes, lengths)
        features = _features(layout, episodes[0], values, camera)
        ends = np.cumsum(lengths)
        table: dict[str, Any] = {
            "episode_index": np.arange(len(episodes)),
            "tasks": [[layout.task]] * len(episodes),
            "length": lengths,
            "dataset_from_index": ends - lengths,
            "dataset_to_index": ends,
            "meta/episodes/chunk_index": np.zeros(len(episodes), np.int64),
            "meta/episodes/file_index": np.zeros(len(episodes), np.int64),
        }
        table |= _write_data(partial, _frames(values, features, layout), lengths, data_files_size_in_mb)
        statistics = {}
        for name, column in values.items():
            each, together = _statistics(column.reshape(len(column), -1), lengths)
            statistics[name] = together
            table |= {f"stats/{name}/{key}": kept for key, kept in each.items()}
        if episodes[0].images is not None:
            name = f"observation.images.{camera}"
            table |= _write_videos(partial, name, layout.fps, episodes, video_files_size_in_mb)
            each, together = _colours([episode.images for episode in episodes if episode.images is not None])
            statistics[name] = together
            table |= {f"stats/{name}/{key}": kept for key, kept in each.items()}
        table["twinsim/seed"] = np.array([episode.seed for episode in episodes])
        for name in episodes[0].environment:
            table[f"twinsim/environment/{name}"] = np.array([float(episode.environment[name]) for episode in episodes])
        if all(episode.final is not None for episode in episodes):
            table["twinsim/final"] = np.stack([np.asarray(episode.final, np.float32) for episode in episodes])
        _write_table(partial / "meta/episodes" / f"{FILE.format(chunk_index=0, file_index=0)}.parquet", table)
        _write_tasks(partial / "meta/tasks.parquet", layout.task)
        info = {
            "codebase_version": VERSION,
            "robot_type": layout.robot,
            "total_episodes": len(episodes),
            "total_frames": int(ends[-1]),
            "total_tasks": 1,
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": data_files_size_in_mb,
            "video_files_size_in_mb": video_files_size_in_mb,
            "fps": _whole(layout.fps),
            "splits": {"train": f"0:{len(episodes)}"},
            "data_path": f"data/{FILE}.parquet",
            "video_path": None if episodes[0].images is None else f"videos/{{video_key}}/{FILE}.mp4",
            "features": features,
        }
        about = layout.describe() | {"pyarrow": arrow.__version__}
        for path, content in ((INFO, info), ("meta/stats.json", statistics), (ABOUT, about)):
            (partial / path).write_text(json.dumps(content, indent=2, default=np.ndarray.tolist, allow_nan=False) + "\n")
        (partial / "README.md").write_text(_card(layout, len(episodes), int(ends[-1])))


def _columns(layout: Layout, episodes: Sequence[Episode], lengths: np.ndarray) -> dict[str, np.ndarray]:
    """One value a frame for each feature but the pictures."""
    values = {STATE: np.concatenate([episode.observation for episode in episodes], dtype=np.float32)}
    values[ACTION] = np.concatenate([episode.action for episode in episodes], dtype=np.float32)
    if episodes[0].states is not None:
        values[SIMULATED] = np.concatenate([np.asarray(episode.states, np.float64) for episode in episodes])
    index, ends = np.arange(lengths.sum()), np.cumsum(lengths)
    values[DONE] = np.zeros(len(index), bool)
    values[SUCCESS] = np.zeros(len(index), bool)
    values[DONE][ends - 1] = True
    values[SUCCESS][ends - 1] = [episode.success for episode in episodes]
    frame = index - np.repeat(ends - lengths, lengths)
    values[TIME] = (frame / layout.fps).astype(np.float32)
    values["frame_index"] = frame
    values["episode_index"] = np.repeat(np.arange(len(lengths)), lengths)
    values["index"] = index
    values["task_index"] = np.zeros(len(index), np.int64)
    return values


def _features(layout: Layout, first: Episode, values: Mapping[str, np.ndarray], camera: str) -> dict[str, Any]:
    names: dict[str, list[str]] = {STATE: [each.name for each in layout.observation], ACTION: [each.name for each in layout.action]}
    if first.states is not None:
        names[SIMULATED] = [f"state_{index}" for index in range(first.states.shape[1])]
    features: dict[str, Any] = {
        name: {"dtype": str(column.dtype), "shape": [*column.shape[1:]] or [1], "names": names.get(name)} for name, column in values.items()
    }
    if first.images is not None:
        height, width = first.images.shape[1:3]
        told = {"height": height, "width": width, "codec": "h264", "pix_fmt": "yuv420p", "is_depth_map": False, "fps": _whole(layout.fps)}
        told |= {"channels": 3, "has_audio": False}
        features[f"observation.images.{camera}"] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {key if key == "has_audio" else f"video.{key}": value for key, value in told.items()},
        }
    return features


def _frames(values: Mapping[str, np.ndarray], features: Mapping[str, Any], layout: Layout) -> "pa.Table":
    """The table of frames; its metadata tell the `datasets` library the types, and everybody that it is synthetic."""
    types = {}
    for name in values:
        kind, (size,) = {"_type": "Value", "dtype": features[name]["dtype"]}, features[name]["shape"]
        types[name] = kind if size == 1 else {"_type": "Sequence", "feature": kind, "length": size}
    metadata = {"huggingface": json.dumps({"info": {"features": types}}), "twinsim": json.dumps(layout.describe())}
    arrow = _arrow()
    return arrow.table({name: _array(column) for name, column in values.items()}).replace_schema_metadata(metadata)


def _array(values: np.ndarray, fixed: bool = True) -> "pa.Array":
    """An Arrow array of numbers or, for more than one axis, of lists; a vector of one number is a number, as `datasets` has it."""
    arrow = _arrow()
    if fixed and values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    array = arrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in values.shape[:0:-1]:
        if fixed:
            array = arrow.FixedSizeListArray.from_arrays(array, size)
        else:
            array = arrow.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def _write_data(folder: Path, frames: "pa.Table", lengths: np.ndarray, most: float) -> dict[str, np.ndarray]:
    """Files of up to `most` MB, one row group an episode; gives the place of each episode."""
    arrow, parquet = _arrow(), _parquet()
    places = np.zeros(len(lengths), np.int64)
    starts, file = np.cumsum(lengths) - lengths, -1
    with ExitStack() as open_file:
        written = np.inf
        for episode, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            if written >= most * MEGA:
                open_file.close()
                file += 1
                path = folder / "data" / f"{_place(file)}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                sink = open_file.enter_context(arrow.OSFile(str(path), "wb"))
                columns = ["episode_index", "task_index"]  # the others hardly repeat
                writer = open_file.enter_context(parquet.ParquetWriter(sink, frames.schema, compression="snappy", use_dictionary=columns))
            writer.write_table(frames.slice(start, length), row_group_size=length)
            written = sink.tell()
            places[episode] = file
    return {"data/chunk_index": places // CHUNK_FILES, "data/file_index": places % CHUNK_FILES}


def _write_videos(folder: Path, name: str, fps: float, episodes: Sequence[Episode], most: float) -> dict[str, np.ndarray]:
    """Videos of up to about `most` MB, episodes one after the other; gives the place of each in seconds of its video."""
    places = np.zeros(len(episodes), np.int64)
    spans = np.zeros((len(episodes), 2))
    with ExitStack() as open_file:
        file, path = -1, folder
        for index, episode in enumerate(episodes):
            assert episode.images is not None  # checked
            if file < 0 or path.stat().st_size >= most * MEGA:
                open_file.close()
                file += 1
                path = folder / "videos" / name / f"{_place(file)}.mp4"
                encoding = open_file.enter_context(video.encoder(path, fps, *episode.images.shape[1:3]))
            first = encoding.frames
            encoding.add(episode.images)
            places[index], spans[index] = file, np.array([first, encoding.frames]) / fps
    columns: dict[str, np.ndarray] = {"chunk_index": places // CHUNK_FILES, "file_index": places % CHUNK_FILES}
    columns |= {"from_timestamp": spans[:, 0], "to_timestamp": spans[:, 1]}
    return {f"videos/{name}/{key}": column for key, column in columns.items()}


def _place(file: int) -> str:
    return FILE.format(chunk_index=file // CHUNK_FILES, file_index=file % CHUNK_FILES)


def _write_table(path: Path, columns: Mapping[str, Any]) -> None:
    arrow, parquet = _arrow(), _parquet()
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: _array(column, fixed=False) if isinstance(column, np.ndarray) else arrow.array(column) for name, column in columns.items()
    }
    parquet.write_table(arrow.table(arrays), path, compression="snappy", use_dictionary=False)


def _write_tasks(path: Path, task: str) -> None:
    """The table of tasks, which pandas reads as indexed by the sentence."""
    arrow, parquet = _arrow(), _parquet()
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None} | text | {"metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
            {"name": "task", "field_name": "task"} | text,
        ],
        "creator": {"library": "pyarrow", "version": arrow.__version__},
        "pandas_version": "2.2.0",
    }
    table = arrow.table({"task_index": arrow.array([0], arrow.int64()), "task": [task]})
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _statistics(values: np.ndarray, lengths: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of each episode, `[episode, channel]`, and of all frames, `[channel]`; exact. Episodes of one length are reduced together."""
    starts = np.cumsum(lengths) - lengths
    each: dict[str, np.ndarray] = {}
    for length in np.unique(lengths):
        which = np.flatnonzero(lengths == length)
        for name, reduced in _reduced(values[starts[which, None] + np.arange(length)], 1).items():
            each.setdefault(name, np.empty((len(lengths), *reduced.shape[1:]), reduced.dtype))[which] = reduced
    each["count"] = lengths[:, None]
    return each, _reduced(values, 0) | {"count": np.array([len(values)])}


def _reduced(values: np.ndarray, axis: int) -> dict[str, np.ndarray]:
    values = values.astype(np.float64)
    found = {name: getattr(values, name)(axis) for name in ("min", "max", "mean", "std")}
    return found | dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values()), axis), strict=True))


def _colours(images: Sequence[np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Statistics of red, green and blue, 0 to 1, `[3, 1, 1]`, of each episode and of all, from counts of the 256 levels."""
    counts = np.zeros((len(images), 3, 256))
    frames = np.zeros((len(images), 1), np.int64)
    for index, pictures in enumerate(images):
        some = pictures[:: max(1, len(pictures) // PICTURES)]
        frames[index] = len(some)
        for colour in range(3):
            counts[index, colour] = np.bincount(some[..., colour].reshape(-1), minlength=256)
    together = {name: column[0] for name, column in _levels(counts.sum(0, keepdims=True)).items()}
    return _levels(counts) | {"count": frames}, together | {"count": frames.sum(0)}


def _levels(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Counts `[episode, colour, level]` -> statistics `[episode, colour, 1, 1]`."""
    level = np.arange(256) / 255
    share = counts / counts.sum(-1, keepdims=True)
    mean = share @ level
    below = np.cumsum(share, -1)
    found = {"min": level[(counts > 0).argmax(-1)], "max": level[255 - (counts[..., ::-1] > 0).argmax(-1)]}
    found |= {"mean": mean, "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0))}
    found |= {name: level[(below >= q - 1e-12).argmax(-1)] for name, q in QUANTILES.items()}
    return {name: column[..., None, None] for name, column in found.items()}


def _whole(fps: float) -> float | int:
    return int(fps) if float(fps).is_integer() else fps


def _card(layout: Layout, episodes: int, frames: int) -> str:
    """The dataset card; its heading says to the hub what this is."""
    heading = ["---", "license: other", "task_categories:", "- robotics", "tags:", "- LeRobot", "configs:", "- config_name: default"]
    heading += ["  data_files: data/*/*.parquet", "---", ""]
    rows = {"robot": layout.robot, "task": layout.task, "episodes": episodes, "frames": frames, "frames a second": _whole(layout.fps)}
    rows |= {"made by": layout.generator, "seed": layout.seed, "holds in": f"MuJoCo {layout.mujoco}" if layout.mujoco else "no simulator"}
    rows |= {"licence": layout.licence or "not stated"}
    lines = [layout.note, "", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    return "\n".join([*heading, *lines, "Units and bounds of all channels stand in `meta/twinsim.json`.", ""])


# ---------------------------------------------------------------- read


def read(folder: Path, expected: Layout | None = None, *, images: bool = False) -> tuple[Layout, list[Episode]]:
    """Layout and episodes of a LeRobot folder, v2.0 to v3.0. Raises BadInput.

    Where a folder does not say which episodes succeeded, all are taken to have.

    Args:
      expected: gives units and bounds, which the format has no place for; a folder of another robot or frame rate is refused.
      images: whether the pictures of the first camera are decoded too.
    """
    info = _json(folder / INFO)
    version, features = info.get("codebase_version"), info.get("features")
    if version not in READABLE or not isinstance(features, dict):
        raise BadInput(f"{folder / INFO}: expected a LeRobot dataset of version {', '.join(READABLE)}, got {version}")
    for name in (STATE, ACTION):
        if not isinstance(features.get(name), dict):
            raise BadInput(f"{folder / INFO}: expected the feature {name}, got {', '.join(features) or 'none'}")
    layout = _layout(folder, info, features)
    if expected is not None:
        check_same_robot(expected, layout, str(folder))
        layout = replace(layout, observation=expected.observation, action=expected.action)
    wanted = {name for name in (STATE, ACTION, SIMULATED, SUCCESS, TIME) if name in features}
    columns = _read_frames(folder, [*sorted(wanted), "episode_index", "frame_index", "task_index"])
    index = columns["episode_index"]
    order = np.lexsort((columns["frame_index"], index))
    starts = np.flatnonzero(np.diff(index[order], prepend=index[order[0]] - 1)) if len(order) else np.zeros(0, int)
    if version == VERSION and (len(starts), len(order)) != (info.get("total_episodes"), info.get("total_frames")):
        raise BadInput(
            f"{folder}: expected {info.get('total_episodes')} episodes and {info.get('total_frames')} frames, as {INFO} says,"
            f" got {len(starts)} and {len(order)}"
        )
    _check_times(folder, np.split(columns["frame_index"][order], starts[1:]), "frame_index", 1.0, "one after the other")
    if TIME in columns:
        times = _vectors(columns[TIME], {"shape": [1]}, folder, TIME)[order, 0].astype(np.float64)
        _check_times(folder, np.split(times, starts[1:]), TIME, 1 / layout.fps, f"at {layout.fps:g} frames a second")
    tasks = _tasks(folder)
    found = [tasks.get(int(task), "") for task in np.unique(columns["task_index"])]
    if len(found) > 1:
        raise BadInput(f"{folder}: expected episodes of one task, got {len(found)}: {'; '.join(found[:3])}")
    split = {
        name: np.split(_vectors(columns[name], features[name], folder, name)[order], starts[1:]) if name in columns else None
        for name in (STATE, ACTION, SIMULATED, SUCCESS)
    }
    which = index[order][starts]
    kept = _kept(folder, which)
    pictures = _pictures(folder, features, which, layout.fps) if images else None
    episodes = []
    for number in range(len(starts)):
        succeeded = split[SUCCESS]
        simulated = split[SIMULATED]
        episodes.append(
            Episode(
                split[STATE][number].astype(np.float32),  # type: ignore[index]
                split[ACTION][number].astype(np.float32),  # type: ignore[index]
                success=bool(succeeded[number].any()) if succeeded is not None else True,
                states=None if simulated is None else simulated[number].astype(np.float64),
                images=None if pictures is None else pictures[number],
                **kept[number],
            )
        )
    layout = replace(layout, task=layout.task or (found[0] if found else ""))
    check(layout, episodes, str(folder))
    return layout, episodes


def _layout(folder: Path, info: Mapping[str, Any], features: Mapping[str, Any]) -> Layout:
    """From our own description where there is one, else from the names in the info file."""
    named = {name: _names(features[name], f"{folder / INFO}: {name}") for name in (STATE, ACTION)}
    fps = info.get("fps")
    if not isinstance(fps, (int, float)):
        raise BadInput(f"{folder / INFO}: expected fps, a number, got {fps}")
    plain = Layout(
        robot=str(info.get("robot_type") or "unknown"),
        task="",
        fps=fps,
        observation=tuple(Channel(name, "") for name in named[STATE]),
        action=tuple(Channel(name, "") for name in named[ACTION]),
        note=UNSTATED,
    )
    if not (folder / ABOUT).exists():
        return plain
    about = _json(folder / ABOUT)
    try:
        channels = {kind: tuple(map(_channel, about[kind])) for kind in ("observation", "action")}
        texts = {name: str(about[name]) for name in ("task", "mujoco", "generator", "licence", "note")}
        told = replace(plain, **texts, **channels, seed=int(about["seed"]))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{folder / ABOUT}: expected the description that twinsim writes, got another ({error})") from error
    check_same_robot(plain, told, str(folder / ABOUT))
    return told


def _check_times(folder: Path, episodes: Sequence[np.ndarray], name: str, step: float, wanted: str) -> None:
    """Raises BadInput where numbers `[frame]` of an episode do not go on by a step a frame."""
    for number, values in enumerate(episodes):
        wrong = np.abs(np.diff(values) - step) > JITTER * step
        if wrong.any():
            frame = int(wrong.argmax())
            got = f"{values[frame]:g} and then {values[frame + 1]:g}"
            raise BadInput(f"{folder / 'data'}: {name}: episode {number}, frame {frame}: expected frames {wanted}, got {got}")


def _channel(told: Mapping[str, Any]) -> Channel:
    return Channel(str(told["name"]), str(told["units"]), float(told.get("lower", -np.inf)), float(told.get("upper", np.inf)))


def _names(feature: Mapping[str, Any], where: str) -> list[str]:
    """Channel names; the format has them as a list, as lists in a list, by kind, or not at all."""
    shape, names = feature.get("shape"), feature.get("names")
    if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int)):
        raise BadInput(f"{where}: expected a vector, got shape {shape}")
    if isinstance(names, dict):
        names = [*names.values()]
    if isinstance(names, list) and any(isinstance(each, list) for each in names):
        names = [name for each in names for name in (each if isinstance(each, list) else [each])]
    if not names:
        return [f"channel_{index}" for index in range(shape[0])]
    if len(names) != shape[0]:
        raise BadInput(f"{where}: expected {shape[0]} names, got {len(names)}")
    return list(map(str, names))


def _read_frames(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Columns of all files of frames, one after the other: numbers as numpy arrays, vectors as Arrow lists."""
    arrow = _arrow()
    paths = sorted((folder / "data").glob("*/*.parquet"))
    if not paths:
        raise BadInput(f"{folder / 'data'}: expected Parquet files in folders, got none")
    files = [_open(path) for path in paths]
    for path, file in zip(paths, files, strict=True):
        missing = {*names} - {*file.schema_arrow.names}
        if missing:
            raise BadInput(f"{path}: expected the columns {', '.join(names)}, got none of the name {', '.join(sorted(missing))}")
    rows = sum(file.metadata.num_rows for file in files)
    widths = [max(getattr(field.type, "list_size", 64), 1) for field in files[0].schema_arrow]
    check_room(folder, 0, rows * sum(widths) * 16, f"reading {rows} frames")
    try:
        table = arrow.concat_tables([file.read(columns=list(names)) for file in files])
    except arrow.ArrowException as error:
        raise BadInput(f"{folder / 'data'}: expected whole Parquet files of the same columns: {_first_line(error)}") from error
    columns = {name: table[name].combine_chunks() for name in names}
    for name, column in columns.items():
        if column.null_count:
            raise BadInput(f"{folder / 'data'}: {name}: expected a value in every frame, got {column.null_count} frames without one")
    for name in ("episode_index", "frame_index", "task_index"):
        if not arrow.types.is_integer(columns[name].type):
            raise BadInput(f"{folder / 'data'}: {name}: expected integers, got {columns[name].type}")
    return {
        name: column if arrow.types.is_nested(column.type) else column.to_numpy(zero_copy_only=False) for name, column in columns.items()
    }


def _vectors(column: Any, feature: Mapping[str, Any], folder: Path, name: str) -> np.ndarray:
    """`[frame, channel]` of an Arrow column of lists, or of numbers."""
    size = feature["shape"][0]
    flat = column if isinstance(column, np.ndarray) else column.flatten().to_numpy(zero_copy_only=False)
    if len(flat) != len(column) * size or flat.dtype.kind not in "fiub":
        raise BadInput(f"{folder / 'data'}: {name}: expected {size} numbers in every frame, got {len(flat)} in {len(column)} frames")
    return flat.reshape(len(column), size)


def _tasks(folder: Path) -> dict[int, str]:
    if (folder / "meta/tasks.parquet").exists():
        table = _open(folder / "meta/tasks.parquet").read()
        texts = [name for name in table.column_names if name != "task_index"]
        if len(texts) != 1 or "task_index" not in table.column_names:
            raise BadInput(
                f"{folder / 'meta/tasks.parquet'}: expected the columns task_index and task, got {', '.join(table.column_names)}"
            )
        return dict(zip(table["task_index"].to_pylist(), map(str, table[texts[0]].to_pylist()), strict=True))
    lines = folder / "meta/tasks.jsonl"
    if not lines.exists():
        return {}
    try:
        rows = [json.loads(line) for line in lines.read_text().splitlines() if line.strip()]
        return {int(row["task_index"]): str(row["task"]) for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{lines}: expected a JSON object with task_index and task on each line ({error})") from error


def _episodes_table(folder: Path, wanted: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Rows of the episodes' table by episode, with the columns whose names begin with one of `wanted`; empty before v3.0."""
    rows: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / "meta/episodes").glob("*/*.parquet")):
        file = _open(path)
        names = [field.name for field in file.schema_arrow if field.name.startswith((*wanted, "episode_index"))]
        if "episode_index" not in names:
            raise BadInput(f"{path}: expected the column episode_index, got none of that name")
        rows |= {int(row["episode_index"]): row for row in file.read(columns=names).to_pylist()}
    return rows


def _kept(folder: Path, which: np.ndarray) -> list[dict[str, Any]]:
    """Seed, world and last observation of each episode, where they were written."""
    rows, prefix = _episodes_table(folder, ["twinsim/"]), "twinsim/environment/"
    found = []
    for row in (rows.get(int(number), {}) for number in which):
        final = row.get("twinsim/final")
        world = {name.removeprefix(prefix): float(value) for name, value in row.items() if name.startswith(prefix)}
        seed = int(row.get("twinsim/seed") or 0)
        found.append({"seed": seed, "environment": world, "final": None if final is None else np.asarray(final, np.float32)})
    return found


def _pictures(folder: Path, features: Mapping[str, Any], which: np.ndarray, fps: float) -> list[np.ndarray]:
    cameras = [name for name, feature in features.items() if feature.get("dtype") == "video"]
    if not cameras:
        raise BadInput(f"{folder}: expected a video, got features without one")
    prefix = f"videos/{cameras[0]}/"
    rows = _episodes_table(folder, [prefix])
    videos: dict[str, np.ndarray] = {}
    found = []
    for row in (rows.get(int(number), {}) for number in which):
        try:
            place = FILE.format(chunk_index=int(row[f"{prefix}chunk_index"]), file_index=int(row[f"{prefix}file_index"]))
            first, last = (round(row[f"{prefix}{end}_timestamp"] * fps) for end in ("from", "to"))
        except KeyError as error:
            raise BadInput(f"{folder / 'meta/episodes'}: expected the column {error} (videos are read from v3.0)") from error
        if place not in videos:
            videos[place] = video.read(folder / "videos" / cameras[0] / f"{place}.mp4")
        found.append(videos[place][first:last])
    return found


def _open(path: Path) -> Any:
    """A Parquet file. Raises BadInput for one that was not finished."""
    arrow, parquet = _arrow(), _parquet()
    try:
        return parquet.ParquetFile(path)
    except arrow.ArrowInvalid as error:
        if "magic bytes" in str(error) or "footer" in str(error).lower() or "too small" in str(error) or "is 0 bytes" in str(error):
            raise BadInput(f"{path}: expected a whole Parquet file, got one without its footer: its recorder did not close it") from error
        raise BadInput(f"{path}: expected a Parquet file: {_first_line(error)}") from error
    except OSError as error:
        raise BadInput(f"{path}: expected a Parquet file: {_first_line(error)}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: expected a LeRobot dataset with this file, got none") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: expected JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _arrow() -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise BadInput("LeRobot: expected pyarrow, which is not installed: pip install 'twinsim[robotics]'") from None
    return pyarrow


def _parquet() -> Any:
    _arrow()
    import pyarrow.parquet

    return pyarrow.parquet
