"""What a training tells while it runs: lines of JSON, TensorBoard's event files, and a line of status.

Nothing leaves the machine.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from twinsim import mesh

LINES = "train.jsonl"
EVENTS = "tensorboard"

Progress = Callable[[int, int, float, float], None]  # step, steps, loss, examples/s


class TrainingLog:
    """A line every `every` steps in `train.jsonl` and in `tensorboard/`, written by the first process, and the progress shown.

    A line holds, of the step itself, `loss` and `grad_norm`, and of all steps since the line before it: `examples_per_s`; `step_s`;
    `waiting`, the share of time in which the devices' next batch was not there yet; `tflops`, TFLOP/s of a device, where the
    compiler tells the operations of a step; `utilisation`, their share of `peak_tflops`, where that is given; and
    `memory_bytes`, the most that a device has held so far, where it tells.

    A training that goes on after `first` steps takes back what a run that was killed had written beyond.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        steps: int,
        batch: int,
        every: int = 1,
        progress: Progress | None = None,
        peak_tflops: float | None = None,
    ):
        self.steps, self.batch, self.every, self.progress, self.peak_tflops = steps, batch, every, progress, peak_tflops
        self.flops: float | None = None  # of one step on one device
        self.since, self.at, self.waited = time.perf_counter(), first, 0.0
        self.file, self.events = None, None
        folder.mkdir(parents=True, exist_ok=True)
        if mesh.is_first():
            path = folder / LINES
            lines = path.read_text().splitlines() if path.exists() else []
            path.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= first))
            self.file = path.open("a")
            self.events = SummaryWriter(str(folder / EVENTS), purge_step=first + 1, filename_suffix=f".{first}")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what keeps the devices waiting."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def __call__(self, step: int, loss: float, norm: float) -> None:
        if step % self.every and step != self.steps:
            return
        now = time.perf_counter()
        passed, done = max(now - self.since, 1e-9), step - self.at
        line = {"step": step, "loss": loss, "grad_norm": norm, **self._speed(passed, done)}
        self.since, self.at, self.waited = now, step, 0.0
        if self.file and self.events:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            for name, value in line.items():
                if name != "step":
                    self.events.add_scalar(name, value, step)
            self.events.flush()
        if self.progress:
            self.progress(step, self.steps, loss, line["examples_per_s"])

    def _speed(self, passed: float, done: int) -> dict[str, float]:
        told = {
            "examples_per_s": round(done * self.batch / passed, 2),
            "step_s": round(passed / max(done, 1), 6),
            "waiting": round(min(1.0, self.waited / passed), 4),
        }
        if self.flops:
            told["tflops"] = round(self.flops * done / passed / 1e12, 6)
            if self.peak_tflops:
                told["utilisation"] = round(told["tflops"] / self.peak_tflops, 4)
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            told["memory_bytes"] = memory["peak_bytes_in_use"]
        return told

    def close(self) -> None:
        if self.file and self.events:
            self.file.close()
            self.events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return math.inf
