"""What a training tells can be read back, and goes on where the training does."""

import json
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from twinsim.log import EVENTS, LINES, TrainingLog


def events(folder):
    """Every event of the files in the order in which they were written; a TFRecord is length, checksum, bytes, checksum."""
    for path in sorted((folder / EVENTS).iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_lines_and_events_tell_the_same(tmp_path):
    log = TrainingLog(tmp_path, 0, steps=7, batch=16, every=3, peak_tflops=1e-6)
    log.flops = 1e3
    for step in range(1, 8):
        log(step, 1.0 / step, 2.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6, 7], "every third, and the last"
    scalars = [(event.step, value.tag, value.simple_value) for event in events(tmp_path) for value in event.summary.value]
    told = [(line["step"], name, pytest.approx(value, rel=1e-6)) for line in lines for name, value in line.items() if name != "step"]
    assert scalars == told and {"loss", "grad_norm", "examples_per_s", "waiting", "tflops", "utilisation"} <= {tag for _, tag, _ in scalars}
    assert lines[0]["utilisation"] == pytest.approx(lines[0]["tflops"] / 1e-6, rel=1e-2, abs=1e-4)


def test_throughput_counts_the_steps_since_the_line_before(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    log = TrainingLog(tmp_path, 0, steps=10, batch=8, every=5)
    with log.waiting():
        clock[0] += 1.0
    clock[0] += 3.0
    log(5, 1.0, 1.0)
    log.close()
    (line,) = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert (line["examples_per_s"], line["step_s"], line["waiting"]) == (10.0, 0.8, 0.25) and "tflops" not in line


def test_what_a_killed_run_wrote_beyond_its_last_save_is_taken_back(tmp_path):
    for first, last in ((0, 6), (4, 7)):
        log = TrainingLog(tmp_path, first, steps=9, batch=1)
        for step in range(first + 1, last + 1):
            log(step, float(first), 1.0)
        log.file.write('{"step": 8, "lo')  # torn by the kill
        log.close()
    log = TrainingLog(tmp_path, 7, steps=9, batch=1)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / LINES).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0), (2, 0), (3, 0), (4, 0), (5, 4), (6, 4), (7, 4)]
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [1, 5, 8], "TensorBoard drops what an earlier file holds from there on"
