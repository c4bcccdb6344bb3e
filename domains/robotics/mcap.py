"""MCAP recordings, which Foxglove and other viewers of robot logs open.

Source: mcap.dev, "MCAP format specification", and its registry: JSON messages with a JSON schema.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.robotics.episodes import Episode, Layout, check, unfinished
from domains.robotics.tasks import Channel
from twinsim.base import BadInput

TOPIC = "/frame"
PAUSE = 1.0  # s, between episodes on the time line
NANO = 1_000_000_000


def write(path: Path, layout: Layout, episodes: Sequence[Episode]) -> None:
    """One file, whole or not at all: the episodes one after the other on one time line, a message a frame. Raises BadInput.

    A message holds `episode`, `frame`, and observation and action by name; units stand in its schema, the layout and each episode's seed,
    success and world in metadata records. Pictures are left out.
    """
    try:
        from mcap.writer import Writer
    except ModuleNotFoundError:
        raise BadInput("MCAP: expected the package mcap, which is not installed: pip install 'twinsim[robotics]'") from None
    check(layout, episodes, str(path))
    with unfinished(path) as partial, partial.open("wb") as stream:
        writer = Writer(stream)
        writer.start(profile="", library="twinsim")
        schema = writer.register_schema("twinsim.Frame", "jsonschema", json.dumps(_schema(layout)).encode())
        channel = writer.register_channel(TOPIC, "json", schema)
        described = layout.describe()
        writer.add_metadata("twinsim", {key: value if isinstance(value, str) else json.dumps(value) for key, value in described.items()})
        begin = 0.0
        for index, episode in enumerate(episodes):
            told: dict[str, Any] = {"seed": episode.seed, "success": episode.success, "frames": episode.frames, "begins": begin}
            told |= {"environment": dict(episode.environment)}
            writer.add_metadata(f"episode {index}", {key: json.dumps(value) for key, value in told.items()})
            for frame, (message, time) in enumerate(zip(_messages(layout, episode, index), _times(begin, episode, layout), strict=True)):
                writer.add_message(channel, log_time=time, publish_time=time, sequence=frame, data=message)
            begin += episode.frames / layout.fps + PAUSE
        writer.finish()


def _messages(layout: Layout, episode: Episode, index: int) -> list[bytes]:
    names = {kind: [channel.name for channel in getattr(layout, kind)] for kind in ("observation", "action")}
    rows = zip(_short(episode.observation), _short(episode.action), strict=True)
    return [
        json.dumps(
            {
                "episode": index,
                "frame": frame,
                "observation": dict(zip(names["observation"], seen, strict=True)),
                "action": dict(zip(names["action"], done, strict=True)),
            },
            allow_nan=False,
        ).encode()
        for frame, (seen, done) in enumerate(rows)
    ]


def _short(values: np.ndarray) -> list[list[float]]:
    """float32 by its shortest decimal, which gives the same float32 back."""
    return values.astype(np.float32).astype("U32").astype(np.float64).tolist()


def _times(begin: float, episode: Episode, layout: Layout) -> list[int]:
    return np.round((begin + np.arange(episode.frames) / layout.fps) * NANO).astype(np.int64).tolist()


def _schema(layout: Layout) -> dict[str, Any]:
    def numbers(channels: Sequence[Channel]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {each.name: {"type": "number", "description": each.units or "no unit"} for each in channels},
        }

    whole = {"type": "integer"}
    properties = {"episode": whole, "frame": whole, "observation": numbers(layout.observation), "action": numbers(layout.action)}
    return {"type": "object", "description": layout.note, "properties": properties}
