"""One run of several real processes: the same bits as one process gives, and nothing lost when one of them goes."""

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import processes
import pytest
import toy
import xarray as xr

from twinsim import checkpoint

STEPS = 300
MESH = "scale.mesh={data: 2, fsdp: 2, model: 1}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.place(tmp_path_factory.mktemp("toy"))


def words(folder: Path, out: str, *more: str) -> list[str]:
    given = ["scale.start={initialization_timeout: 60, heartbeat_timeout: 10}", MESH, "generate.batch=8", f"scenario={folder / 'toy.yaml'}"]
    return [*toy.words(folder / "toy.nc", folder / out), *given, *more]


@pytest.fixture(scope="module")
def of_one(folder: Path) -> Path:
    """The whole chain by one process with four devices."""
    assert codes(processes.end(processes.start(["run", *words(folder, "one")], devices=4))) == [0]
    return folder / "one"


def model(out: Path) -> Path:
    (found,) = (out / "models").glob("climate-ncep-*")
    return found


def fingerprint(out: Path) -> tuple[int, str]:
    """The last step and the print of all its bits: parameters, optimizer, averages, key."""
    saved = model(out) / "checkpoints"
    step = checkpoint.steps(saved)[-1]
    return step, checkpoint.fingerprint(saved, step)


def codes(ended: Sequence[tuple[int, str, str]]) -> list[int]:
    return [code for code, _, _ in ended]


def wait_until(there, started, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until and all(process.poll() is None for process in started), "it ended before it could be disturbed"
        time.sleep(0.05)


def logged(out: Path) -> list[dict]:
    paths = list(out.glob("models/climate-ncep-*/train.jsonl"))
    return [json.loads(line) for line in paths[0].read_text().splitlines() if line.endswith("}")] if paths else []


def test_two_processes_give_the_bits_of_one(folder: Path, of_one: Path) -> None:
    ended = processes.end(processes.start(["run", *words(folder, "two")], 2, 2))
    assert codes(ended) == [0, 0], ended
    assert fingerprint(folder / "two") == fingerprint(of_one)
    (two,), (one,) = ((out / "runs").glob("toy-*") for out in (folder / "two", of_one))
    assert (two / "metrics.json").read_text() == (one / "metrics.json").read_text()
    with (
        xr.open_zarr(two / "samples.zarr", consolidated=False) as of_two,
        xr.open_zarr(one / "samples.zarr", consolidated=False) as of_one_alone,
    ):
        assert set(of_two.variables) == set(of_one_alone.variables)
        for name in of_two.variables:
            np.testing.assert_array_equal(of_two[name].values, of_one_alone[name].values)
    assert "report.html" in ended[0][1] and "report.html" not in ended[1][1], "the first process speaks for both"
    assert "draw held-out" not in ended[1][2]


def test_an_error_of_the_first_process_is_said_once_and_ends_both(folder: Path) -> None:
    ended = processes.end(processes.start(["train", *words(folder, "bad", "domain.dataset.variables.tas={units: m}")], 2, 2))
    assert codes(ended) == [2, 2]
    assert "tas" in ended[0][2] and "Traceback" not in ended[0][2] + ended[1][2] and "twinsim:" not in ended[1][2]


LONG = (f"train.steps={STEPS}", "train.save_every=20")


@pytest.fixture(scope="module")
def long_of_one(folder: Path) -> tuple[int, str]:
    assert codes(processes.end(processes.start(["train", *words(folder, "long", *LONG)], devices=4))) == [0]
    return fingerprint(folder / "long")


def test_a_sigterm_to_one_lets_both_leave_at_the_same_step_and_another_layout_goes_on(folder: Path, long_of_one: tuple[int, str]) -> None:
    started = processes.start(["train", *words(folder, "left", *LONG)], 2, 2)
    wait_until(lambda: len(logged(folder / "left")) > 5, started)
    started[1].send_signal(signal.SIGTERM)
    ended = processes.end(started)
    assert codes(ended) == [75, 75], ended
    assert "asked to leave at step" in ended[0][2] and checkpoint.steps(model(folder / "left") / "checkpoints")[-1] < STEPS
    assert codes(processes.end(processes.start(["train", *words(folder, "left", *LONG)], devices=4))) == [0]
    assert fingerprint(folder / "left") == long_of_one


def test_the_death_of_one_ends_the_other_and_loses_nothing(folder: Path, long_of_one: tuple[int, str]) -> None:
    started = processes.start(["train", *words(folder, "killed", *LONG)], 2, 2)
    wait_until(lambda: len(logged(folder / "killed")) > 30, started)
    started[1].kill()
    ended = processes.end(started, timeout=60)
    assert codes(ended)[0] not in (0, 75)
    assert codes(processes.end(processes.start(["train", *words(folder, "killed", *LONG)], 2, 2))) == [0, 0]
    assert fingerprint(folder / "killed") == long_of_one


def test_processes_that_draw_leave_together_and_others_go_on(folder: Path, of_one: Path) -> None:
    more = ("set.members=400",)
    (folder / "drawn").symlink_to(of_one)  # with its model
    started = processes.start(["run", *words(folder, "drawn", *more)], 2, 2)
    journals = lambda: list((folder / "drawn").glob("runs/toy-*.partial/draws/journal-1.jsonl"))  # noqa: E731
    wait_until(journals, started)
    started[0].send_signal(signal.SIGTERM)
    ended = processes.end(started)
    assert codes(ended) == [75, 75], ended
    drawn = sum(len(path.read_text().splitlines()) - 1 for path in (folder / "drawn").glob("runs/*.partial/draws/journal-*.jsonl"))
    assert 0 < drawn < 400 * 10 / 8
    assert codes(processes.end(processes.start(["run", *words(folder, "drawn", *more)], devices=4))) == [0]
    (made,) = (path for path in (folder / "drawn" / "runs").glob("toy-*") if (path / "metrics.json").exists() and _members(path) == 400)
    (first,) = (path for path in (folder / "drawn" / "runs").glob("toy-*") if _members(path) == 3)
    with xr.open_zarr(made / "samples.zarr", consolidated=False) as many, xr.open_zarr(first / "samples.zarr", consolidated=False) as few:
        np.testing.assert_array_equal(many["tas"].values[:3], few["tas"].values)


def _members(run: Path) -> int:
    with xr.open_zarr(run / "samples.zarr", consolidated=False) as samples:
        return samples.sizes["member"]
