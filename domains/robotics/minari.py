"""Minari data sets, for offline reinforcement learning.

Source: Farama-Foundation/Minari, documentation "Dataset standards", MIT.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.robotics.episodes import Episode, Layout, check, transitions, unfinished
from domains.robotics.tasks import Channel
from twinsim.base import BadInput

MAIN = "data/main_data.hdf5"


def write(folder: Path, layout: Layout, episodes: Sequence[Episode], *, name: str = "twinsim/push-v0", environment: str = "") -> None:
    """The data set `name`, "namespace/name-v0", below `folder`, whole or not at all; Minari finds it by MINARI_DATASETS_PATH=folder.

    An episode's last observation is the one after its last action; where it was not kept, the last action is left out. The reward is 1
    where success is reached, which terminates an episode; others are truncated.

    Args:
      environment: Gymnasium id, "twinsim/PlanarPush-v0", which `recover_environment` then makes.
    """
    try:
        import gymnasium
        from gymnasium.spaces import Box
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage

        from domains.robotics import environments  # noqa: F401 (makes them known to Gymnasium)
    except ImportError:
        raise BadInput("Minari: expected minari and h5py, which are not installed: pip install 'twinsim[robotics]'") from None
    namespace, _, last = name.rpartition("/")
    if ".." in name or name.startswith("/") or "-v" not in last:
        raise BadInput(f"Minari: name: expected namespace/name-v0, got {name}")
    check(layout, episodes, str(folder))
    buffers = [EpisodeBuffer(id=index, **_buffer(episode, index, folder)) for index, episode in enumerate(episodes)]
    with unfinished(folder / name, MAIN) as partial:
        (partial / "data").mkdir(parents=True)
        storage = MinariStorage.new(
            partial / "data",
            observation_space=Box(-np.inf, np.inf, (len(layout.observation),), np.float32),
            action_space=Box(*_bounds(layout.action), dtype=np.float32),
            env_spec=gymnasium.spec(environment) if environment else None,
        )
        storage.update_metadata(
            {
                "dataset_id": name,
                "minari_version": _version(),
                "algorithm_name": layout.generator or "unknown",
                "author": {"twinsim"},
                "description": f"{layout.note} {layout.robot}: {layout.task}",
                **{key: str(value) for key, value in layout.describe().items() if key not in ("observation", "action")},
                "observation_names": [channel.name for channel in layout.observation],
                "observation_units": [channel.units for channel in layout.observation],
                "action_names": [channel.name for channel in layout.action],
                "action_units": [channel.units for channel in layout.action],
            }
        )
        storage.update_episodes(buffers)
        storage.update_episode_metadata(
            [{f"environment/{key}": float(value) for key, value in each.environment.items()} for each in episodes]
        )
    for parent in [*Path(namespace).parents, Path(namespace)]:
        if parent != Path("."):
            (folder / parent / "namespace_metadata.json").write_text("{}")


def _buffer(episode: Episode, index: int, folder: Path) -> dict[str, Any]:
    observation, action = transitions(episode)
    if not len(action):
        raise BadInput(f"{folder}: episode {index}: expected two frames or more, or the observation after the last action, got neither")
    last = np.arange(len(action)) == len(action) - 1
    return {
        "seed": episode.seed,
        "observations": observation,
        "actions": action,
        "rewards": (last & episode.success).astype(np.float64),
        "terminations": last & episode.success,
        "truncations": last & (not episode.success),
        "infos": {"success": np.append(False, last & episode.success)},
    }


def _bounds(channels: Sequence[Channel]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array([getattr(channel, side) for channel in channels], np.float32) for side in ("lower", "upper"))  # type: ignore


def _version() -> str:
    from importlib.metadata import version

    return version("minari")
