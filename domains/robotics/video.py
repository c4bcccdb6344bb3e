"""MP4 videos (H.264) of pictures, and pictures of videos."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from twinsim.base import BadInput

# a key picture every second frame, so that a trainer finds any frame quickly, and one thread, so that the same pictures give the same bytes
OPTIONS = {"g": "2", "bf": "0", "crf": "20", "preset": "fast", "threads": "1"}


class Encoder:
    """An MP4 file being written; frames are `[height, width, 3]` uint8, with even height and width."""

    def __init__(self, container: Any, fps: float, height: int, width: int) -> None:
        self.frames = 0
        self._container = container
        self._stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=OPTIONS)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    def add(self, pictures: np.ndarray) -> None:
        """Appends pictures, `[frame, height, width, 3]` uint8."""
        av = _av()
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = self.frames
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))


@contextmanager
def encoder(path: Path, fps: float, height: int, width: int) -> Iterator[Encoder]:
    """Writes `path`, which is whole when the block has ended. Raises BadInput without PyAV, or for an odd size."""
    if height % 2 or width % 2:
        raise BadInput(f"{path.name}: video of {height} x {width} pixels: expected even numbers, which H.264 needs")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _av().open(str(path), "w", format="mp4") as container:
        encoding = Encoder(container, fps, height, width)
        yield encoding
        encoding.finish()


def read(path: Path) -> np.ndarray:
    """All frames of a video, `[frame, height, width, 3]` uint8. Raises BadInput."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise BadInput(f"{path}: expected a video, got a file that cannot be decoded ({error})") from error


def _av() -> Any:
    try:
        import av
        import av.error
    except ModuleNotFoundError:
        raise BadInput("video: expected PyAV, which is not installed: pip install 'twinsim[robotics]'") from None
    return av
