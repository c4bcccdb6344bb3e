"""robomimic HDF5 files.

Source: robomimic documentation, "Dataset structure"; ARISE-Initiative/robomimic, robomimic/utils/dataset.py, MIT.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.robotics.episodes import Episode, Layout, check, transitions, unfinished
from twinsim.base import BadInput

GYM = 2  # robomimic.envs.env_base.EnvType.GYM_TYPE
EVERY = 10  # of as many episodes one is kept for validation


def write(path: Path, layout: Layout, episodes: Sequence[Episode], *, model: str = "", environment: str = "", camera: str = "top") -> None:
    """One file, whole or not at all. Raises BadInput.

    Observations are `obs/state`, pictures `obs/CAMERA_image`; the reward is 1 where success is reached, which ends an episode.
    Every tenth episode, of fewer the last, is in `mask/valid`, the others in `mask/train`.

    Args:
      model: MJCF of the scene, as text.
      environment: Gymnasium id, "twinsim/PlanarPush-v0", of what the episodes happened in.
    """
    try:
        import h5py
    except ModuleNotFoundError:
        raise BadInput("robomimic: expected h5py, which is not installed: pip install 'twinsim[robotics]'") from None
    check(layout, episodes, str(path))
    for index, episode in enumerate(episodes):
        if len(transitions(episode)[1]) == 0:
            raise BadInput(f"{path}: episode {index}: expected two frames or more, or the observation after the last action, got neither")
    names = [f"demo_{index}" for index in range(len(episodes))]
    with unfinished(path) as partial, h5py.File(partial, "w", track_order=True) as file:
        data = file.create_group("data", track_order=True)
        data.attrs["total"] = sum(len(transitions(episode)[1]) for episode in episodes)
        data.attrs["env_args"] = json.dumps({"env_name": environment or layout.robot, "type": GYM, "env_kwargs": {}})
        data.attrs["twinsim"] = json.dumps(layout.describe())
        for name, episode in zip(names, episodes, strict=True):
            _add(data.create_group(name), episode, model, f"{camera}_image")
        every = min(EVERY, max(len(names), 2))
        valid = np.arange(len(names)) % every == every - 1
        for mask, chosen in (("train", ~valid), ("valid", valid)):
            file[f"mask/{mask}"] = np.array(names, "S")[chosen]


def _add(group: Any, episode: Episode, model: str, picture: str) -> None:
    observation, action = transitions(episode)
    steps = len(action)
    group.attrs["num_samples"] = steps
    group.attrs["seed"] = episode.seed
    group.attrs["success"] = episode.success
    group.attrs["environment"] = json.dumps(dict(episode.environment))
    if model:
        group.attrs["model_file"] = model
    last = np.arange(steps) == steps - 1
    values = {
        "actions": action,
        "rewards": (last & episode.success).astype(np.float64),
        "dones": last.astype(np.int64),
        "obs/state": observation[:-1],
        "next_obs/state": observation[1:],
    }
    if episode.states is not None:
        values |= {"states": episode.states[:steps]}
    if episode.images is not None:
        # what is seen after the last action was not drawn; trainers that need it are those of images and values, and read it once more
        after = np.minimum(np.arange(steps) + 1, len(episode.images) - 1)
        values |= {f"obs/{picture}": episode.images[:steps], f"next_obs/{picture}": episode.images[after]}
    for name, array in values.items():
        group.create_dataset(name, data=array)
