"""The doctor: each check passes on what is whole, and names the fault and the next command on what was broken on purpose."""

import hashlib
import json
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from twinsim import doctor

ROOT = Path(__file__).parent.parent


def test_every_check_is_made_and_says_something(tmp_path: Path) -> None:
    found = doctor.checks(tmp_path)
    assert [check.name for check in found] == [
        "python",
        "packages",
        "devices",
        "slurm",
        "disk",
        "clock",
        "data",
        "pictures",
        "climate",
        "robotics",
    ]
    assert all(check.text for check in found)
    by_name = {check.name: check for check in found}
    assert all(by_name[name].ok for name in ("python", "packages", "devices", "clock", "pictures"))
    assert json.loads(json.dumps([check._asdict() for check in found]))[0]["ok"] is True
    assert list(tmp_path.iterdir()) == []  # it leaves nothing behind


def test_lines_are_aligned() -> None:
    assert doctor.lines([doctor.Check("disk", True, "fine"), doctor.Check("devices", False, "none")]) == [
        "ok    disk     fine",
        "FAIL  devices  none",
    ]


def test_tested_versions_are_the_pinned_ones() -> None:
    for python, jax in doctor.TESTED.items():
        pinned = (ROOT / f"requirements/py{python.replace('.', '')}.txt").read_text()
        assert f"\njax=={jax} " in pinned


def test_pinned_files_have_hashes_and_no_address() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        text = file.read_text()
        assert "://" not in text and "index-url" not in text
        blocks = re.split(r"\n(?=[a-zA-Z])", text)[1:]
        assert len(blocks) > 50 and all("==" in block and "--hash=sha256:" in block for block in blocks)


def test_every_base_dependency_is_bounded_and_pinned() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = {re.split("==", line)[0] for line in (ROOT / "requirements/py311.txt").read_text().splitlines() if "==" in line}
    for requirement in declared:
        assert ">=" in requirement
        assert re.split(r"[><=\[]", requirement)[0].lower() in pinned


@pytest.mark.parametrize(
    ("environment", "ok", "says"),
    [
        ({}, True, "not inside"),
        ({"SLURM_JOB_ID": "7"}, True, "one process"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False, "srun twinsim"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}, True, "process 2 of 4"),
    ],
)
def test_slurm(environment: dict[str, str], ok: bool, says: str) -> None:
    assert doctor.slurm(environment)[0] is ok
    assert says in doctor.slurm(environment)[1]


def test_slurm_first_node_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(host: str, port: None) -> None:
        asked.append(host)
        raise OSError("unknown")

    monkeypatch.setattr(doctor.socket, "getaddrinfo", refuse)
    ok, text = doctor.slurm({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_STEP_NODELIST": "gpu[03-07,9],login"})
    assert not ok and asked == ["gpu03"] and "getent hosts gpu03" in text


def test_disk_full_and_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.disk(tmp_path)[0]
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "FREE_BYTES", 1e30)
        assert not doctor.disk(tmp_path)[0] and "out=" in doctor.disk(tmp_path)[1]
    with monkeypatch.context() as patch:
        patch.setattr(doctor.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert doctor.disk(tmp_path)[0] is False and "No space left" in doctor.disk(tmp_path)[1]


def test_clock_before_any_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.clock(tmp_path)[0]
    real = doctor.time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: real - 3600)
    assert not doctor.clock(tmp_path)[0] and "+3600 s" in doctor.clock(tmp_path)[1]
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert not doctor.clock(tmp_path)[0] and doctor.clock(tmp_path)[1].startswith("1970-01-01")


def test_data_whole_changed_missing(tmp_path: Path) -> None:
    assert not doctor.data([tmp_path])[0]
    folder = tmp_path / "climate" / "data"
    folder.mkdir(parents=True)
    (folder / "a.nc").write_bytes(b"abc")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(b'abc').hexdigest()}  a.nc\n")
    assert doctor.data([tmp_path]) == (True, "1 embedded files as shipped, 0.0 MB")
    (folder / "a.nc").write_bytes(b"abd")
    assert not doctor.data([tmp_path])[0] and "a.nc has changed" in doctor.data([tmp_path])[1]
    (folder / "a.nc").unlink()
    assert not doctor.data([tmp_path])[0] and "a.nc is missing" in doctor.data([tmp_path])[1]


def test_a_wrong_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = metadata.version("numpy")
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["numpy>=99", "no-such-package-here>1", "scipy>99; extra == 'x'"])
    ok, text = doctor.packages()
    assert (
        not ok
        and f"numpy is {numpy}, twinsim needs >=99" in text
        and "no-such-package-here is not installed" in text
        and "scipy" not in text
    )


def test_a_missing_extra_is_no_fault_and_names_its_command() -> None:
    ok, text = doctor.optional("climate", "no_such_package_here")
    assert ok and sys.executable in text and text.endswith("[climate]'")


def test_a_check_that_breaks_is_a_fault_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "pictures", lambda: 1 / 0)
    assert [check.name for check in doctor.checks() if "ZeroDivisionError" in check.text] == ["pictures"]
