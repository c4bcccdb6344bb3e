"""The simulated truth: what its configuration asks for, what it makes of runs that are there, and how a killed run goes on."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr
from hydra import compose, initialize_config_module

from domains.climate import embedded, speedy, truth
from twinsim import mesh
from twinsim.base import BadInput

RUNS: dict[str, dict[str, Any]] = {"control": {"days": 3, "seed": 1}, "warm": {"days": 2, "seed": 2, "sst_offset": 1.5}}


def run_of(days: int, sst_offset: float = 0.0, seed: int = 1) -> xr.Dataset:
    """A run of constant fields, each of its own seed."""
    daily = {name: np.full((days, 48, 96), seed, np.float32) for name in speedy.OUTPUTS}
    statics = {"orog": np.zeros((48, 96)), "lsm": np.ones((48, 96)), "sst": np.full((12, 48, 96), 290.0)}
    time = np.datetime64("2000-03-01", "ns") + np.arange(days) * np.timedelta64(1, "D")
    return speedy._dataset(daily, statics, time, sst_offset, seed)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that `speedy.simulate` is asked to fill, which it does at once."""
    folders = []

    def simulate(folder: Path, progress: Callable[[int, int], None], **run: Any) -> xr.Dataset:
        folders.append(folder)
        progress(10, 10)
        return run_of(**{name: run[name] for name in ("days", "sst_offset", "seed") if name in run})

    monkeypatch.setattr(speedy, "simulate", simulate)
    return folders


def test_the_configuration_asks_for_the_shipped_runs() -> None:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("twinsim", overrides=["domain=climate/simulate"])
        shipped = compose("twinsim", overrides=["domain=climate/generate"])
    runs = config.domain.dataset.runs
    assert {name: run.sst_offset for name, run in runs.items()} == embedded.BRANCHES
    readme = (embedded.DATA.parent / "README.md").read_text()
    for name, run in runs.items():
        assert f"{name} ({run.sst_offset:+.0f} K, {run.days} days)" in readme
    assert config.domain.quantities == shipped.domain.quantities and config.domain.splits == shipped.domain.splits


def test_runs_are_joined_with_their_warming_and_made_once(tmp_path: Path, asked: list[Path]) -> None:
    joined = truth.simulated(str(tmp_path), RUNS, ["tas", "ps"])
    assert joined["branch"].values.tolist() == ["control"] * 3 + ["warm"] * 2
    np.testing.assert_array_equal(joined["sst_offset"], [0, 0, 0, 1.5, 1.5])
    np.testing.assert_array_equal(joined["tas"].mean(("lat", "lon")), [1, 1, 1, 2, 2])
    assert joined["lsm"].dims == ("lat", "lon") and "ua500" not in joined and joined.attrs["levels"] == "sigma"
    assert truth.shipped(["control"], ["tas"]).attrs["levels"] == "sigma"  # or the balance would not be judged
    again = truth.simulated(str(tmp_path), RUNS, ["tas"], branches=["warm"])
    assert again["branch"].values.tolist() == ["warm"] * 2
    assert [folder.name.partition("-")[0] for folder in asked] == ["control.blocks", "warm.blocks"], "a run that is there is not made again"
    truth._simulate(tmp_path / "warm.nc", "warm", {**RUNS["warm"], "days": 9, "adjust_days": 5}, lambda: False)  # more days of the same
    truth._simulate(tmp_path / "warm.nc", "warm", {**RUNS["warm"], "seed": 3}, lambda: False)
    assert asked[1] == asked[2] != asked[3], "blocks of another seed are not mixed"


def test_runs_that_do_not_fit_are_one_sentence(tmp_path: Path, asked: list[Path]) -> None:
    truth.simulated(str(tmp_path), RUNS, ["tas"])
    for other, says in (({"days": 4}, "days: expected 4 as configured, it was made with 3"), ({"days": 3, "seed": 7}, "seed: expected 7")):
        with pytest.raises(BadInput, match=says):
            truth.simulated(str(tmp_path), {"control": other}, ["tas"])
    with pytest.raises(BadInput, match="a seed of its own"):
        truth.simulated(str(tmp_path), {"a": {"days": 1}, "b": {"days": 1}}, ["tas"])
    with pytest.raises(BadInput, match="plain name for each run.*got '../warm'"):
        truth.simulated(str(tmp_path), {"../warm": {"days": 1}}, ["tas"])
    with pytest.raises(BadInput, match="branch cold.*control, warm"):
        truth.simulated(str(tmp_path), RUNS, ["tas"], branches=["cold"])


def test_a_request_to_stop_leaves_no_half_run(tmp_path: Path, asked: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    stop = mesh.preemption
    monkeypatch.setattr(mesh, "preemption", lambda: _Asked())
    with pytest.raises(mesh.Preempted, match="the same command goes on"):
        truth.simulated(str(tmp_path), RUNS, ["tas"])
    assert not list(tmp_path.glob("*.nc"))
    monkeypatch.setattr(mesh, "preemption", stop)
    assert truth.simulated(str(tmp_path), RUNS, ["tas"]).sizes["time"] == 5


class _Asked:
    def __enter__(self) -> Callable[[], bool]:
        return lambda: True

    def __exit__(self, *error: object) -> None:
        return None


@pytest.fixture
def as_usual() -> Iterator[None]:
    """Promotion of ranks and types as JAX does it by itself, which jcm counts on."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
def test_a_killed_simulation_goes_on_to_the_same_bytes(tmp_path: Path, as_usual: None) -> None:
    pytest.importorskip("jcm")
    whole = speedy.simulate(tmp_path / "whole", days=20, seed=11, spinup_days=0)
    killed = tmp_path / "killed"
    killed.mkdir()
    first, second = sorted((tmp_path / "whole").iterdir())
    shutil.copy2(first, killed)
    (killed / second.name).with_suffix(".tmp").write_bytes(b"torn")
    seen: list[int] = []
    resumed = speedy.simulate(killed, days=20, seed=11, spinup_days=0, progress=lambda done, total: seen.append(done))
    assert (killed / first.name).stat().st_mtime_ns == first.stat().st_mtime_ns, "the block that was there is read, not made"
    assert (killed / second.name).read_bytes() == second.read_bytes()
    xr.testing.assert_identical(resumed, whole)
    assert seen == [10, 20] and sorted(path.suffix for path in killed.iterdir()) == [".npz", ".npz"]
