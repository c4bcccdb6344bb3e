"""The record of a run: a crate that other tools read, and a verification that names whatever changed."""

import hashlib
import json
import os
import shutil
import subprocess

import pytest

from twinsim import __version__, record
from twinsim.base import BadInput

FILES = {
    "config.yaml": b"seed: 3\n",
    "report.html": b"<p>x</p>",
    "metrics.json": b"{}",
    "samples.zarr/zarr.json": b'{"zarr_format": 3}',
    "samples.zarr/tas/c/0/0": b"\x00\x01\x02",
    "samples.zarr/tas/zarr.json": b"{}",
    "a name & more é.txt": b"",
}
FACTS = record.Facts(
    title="A warm winter",
    description="Five members of a warm winter.",
    command="twinsim run scenarios/climate/warm_winter.yaml",
    config="config.yaml",
    config_hash="0123456789",
    seed=3,
    started="2026-01-01T00:00:00+00:00",
    ended="2026-01-01T00:05:00+00:00",
    inputs=[
        record.Input("control run", "https://example.org/control.zarr", "CC-BY-4.0", "a" * 64, 123),
        record.Input("own data", "/data/own.nc", "all rights reserved, used with permission", "b" * 64, 4),
    ],
    checkpoint="c" * 64,
    licence="CC-BY-4.0",
    agent="A. Scientist",
    code={"commit": "d" * 40, "dirty": True},
    environment={
        "python": "3.11.7",
        "platform": "Linux",
        "devices": ["cpu:0 cpu", "cpu:1 cpu"],
        "variables": {"XLA_FLAGS": "--x=1"},
        "packages": {"jax": "0.10.2", "numpy": "2.4.6"},
    },
)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    record.write(folder, FACTS)
    return folder


def entities(folder):
    return {entity["@id"]: entity for entity in json.loads((folder / record.RECORD).read_text())["@graph"]}


def test_same_facts_and_files_give_the_same_bytes(run, tmp_path):
    first = (run / record.RECORD).read_bytes()
    assert record.write(run, FACTS).read_bytes() == first
    other = tmp_path / "other"
    other.mkdir()
    for name in reversed(FILES):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_bytes(FILES[name])
    assert record.write(other, FACTS).read_bytes() == first


def test_says_what_went_in_what_ran_and_what_came_out(run):
    crate = entities(run)
    assert crate["samples.zarr/tas/c/0/0"]["sha256"] == hashlib.sha256(b"\x00\x01\x02").hexdigest()
    assert crate["samples.zarr/tas/c/0/0"]["contentSize"] == "3"
    assert crate["report.html"]["encodingFormat"] == "text/html"
    assert crate["a%20name%20%26%20more%20%C3%A9.txt"]["contentSize"] == "0"
    action = crate["#run"]
    assert [one["@id"] for one in action["object"]] == [
        "config.yaml",
        "#seed",
        "#config-hash",
        "#checkpoint",
        "#input/control%20run",
        "#input/own%20data",
    ]
    assert crate["#input/control%20run"]["license"]["@id"] == "https://spdx.org/licenses/CC-BY-4.0"
    assert crate["#input/own%20data"]["sha256"] == "b" * 64
    assert (crate["#seed"]["value"], crate["#config-hash"]["value"], crate["#checkpoint"]["value"]) == (3, "0123456789", "c" * 64)
    assert crate["#twinsim"]["softwareVersion"] == f"{__version__}+dddddddddddd.dirty"
    assert crate["https://pypi.org/project/jax/0.10.2/"]["softwareVersion"] == "0.10.2" and crate["#variable/XLA_FLAGS"]["value"] == "--x=1"
    assert crate["./"]["digitalSourceType"]["@id"].endswith("trainedAlgorithmicMedia") and crate["#synthetic"]["value"] is True
    assert crate["./"]["description"].startswith("Synthetic data.")


def test_every_reference_has_its_entity(run):
    crate = entities(run)

    def references(value):
        if isinstance(value, dict):
            yield from [value["@id"]] if set(value) == {"@id"} else (name for one in value.values() for name in references(one))
        if isinstance(value, list):
            yield from (name for one in value for name in references(one))

    outside = {"https://w3id.org/ro/crate/1.1", "http://schema.org/CompletedActionStatus"}
    for entity in crate.values():
        assert {name for name in references({**entity, "@id": ""})} <= set(crate) | outside


def test_rocrate_reads_it(run):
    rocrate = pytest.importorskip("rocrate.rocrate")
    crate = rocrate.ROCrate(run)
    assert crate.root_dataset["name"] == "A warm winter"
    assert {entity.id for entity in crate.data_entities if entity.type == "File"} >= {"report.html", "samples.zarr/tas/c/0/0"}
    action = crate.dereference("#run")
    assert action["instrument"]["name"] == "twinsim" and action["agent"]["name"] == "A. Scientist"
    assert action["result"] and all(not isinstance(one, str) for one in action["result"])


def test_read_gives_back_what_was_written(run):
    said = record.read(run)
    assert (said.seed, said.config, said.config_hash, said.checkpoint) == (3, "config.yaml", "0123456789", "c" * 64)
    assert said.inputs == {"control run": "a" * 64, "own data": "b" * 64} and said.packages == FACTS.environment["packages"]
    assert {name: entry.size for name, entry in said.files.items()} == {name: len(content) for name, content in FILES.items()}


def test_unchanged_folder_verifies_and_says_what_that_means(run):
    assert record.verify(run) == []
    said = record.proof([])
    assert "every file has the bytes" in said and "Not shown: who made it" in said


def test_every_changed_byte_is_found_and_named(run):
    for name in [*FILES, record.RECORD]:
        content = (run / name).read_bytes()
        places = range(len(content)) if len(content) < 100 else range(0, len(content), max(1, len(content) // 150))
        for place in places:
            (run / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            found = record.verify(run)
            assert ("changed", name) in [(one.kind, one.path) for one in found], (name, place)
            assert name in record.proof(found)
        (run / name).write_bytes(content + b"\n")
        assert ("changed", name) in [(one.kind, one.path) for one in record.verify(run)]
        (run / name).write_bytes(content)
    assert record.verify(run) == []


def test_missing_and_added_files_are_named(run):
    for name in [*FILES, record.RECORD]:
        content = (run / name).read_bytes()
        (run / name).unlink()
        assert ("missing", name) in [(one.kind, one.path) for one in record.verify(run)]
        (run / name).write_bytes(content)
    for name in ("extra.txt", "samples.zarr/tas/c/0/1", record.MANIFEST, ".hidden"):
        (run / name).write_bytes(b"")
        assert [str(one) for one in record.verify(run)] == [f"added: {name} (in the folder, not recorded)"]
        (run / name).unlink()


def test_links_are_found(run, tmp_path):
    (tmp_path / "copy.html").write_bytes(FILES["report.html"])
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(tmp_path / "copy.html")
    (run / "away").symlink_to("/etc")
    assert [(one.kind, one.path) for one in record.verify(run)] == [("added", "away"), ("changed", "report.html")]
    with pytest.raises(BadInput, match="got a link"):
        record.write(run, FACTS)


def test_what_is_no_file_is_found_and_not_waited_for(run):
    for name in (next(iter(FILES)), record.RECORD):
        content = (run / name).read_bytes()
        (run / name).unlink()
        os.mkfifo(run / name)
        (finding,) = record.verify(run)
        assert (finding.kind, finding.path) == ("changed", name)
        (run / name).unlink()
        (run / name).write_bytes(content)


def test_many_files_go_to_a_manifest_and_are_still_named(run, monkeypatch):
    monkeypatch.setattr(record, "LISTED_FILES", 5)
    record.write(run, FACTS)
    assert "samples.zarr/tas/c/0/0" not in entities(run) and len(entities(run)["samples.zarr/"]["sha256"]) == 64
    subprocess.run(["sha256sum", "--quiet", "-c", record.MANIFEST], cwd=run, check=True)
    assert record.verify(run) == []
    test_every_changed_byte_is_found_and_named(run)
    for name in [name for name in FILES if "/" in name]:
        content = (run / name).read_bytes()
        (run / name).unlink()
        assert [(one.kind, one.path) for one in record.verify(run)] == [("missing", name)]
        (run / name).write_bytes(content)
    (run / "samples.zarr/new").write_bytes(b"")
    assert [(one.kind, one.path) for one in record.verify(run)] == [("added", "samples.zarr/new")]
    (run / "samples.zarr/new").unlink()
    (run / record.MANIFEST).unlink()
    assert ("missing", record.MANIFEST) in [(one.kind, one.path) for one in record.verify(run)]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"@graph": 3}',
        b'{"@graph": [3]}',
        b'{"@graph": [{"@id": 3, "@type": "File"}]}',
        b"[" * 100_000,
        b"\xff",
        b'{"@graph": [{"@id": "../../etc/passwd", "@type": "File", "sha256": "", "contentSize": "1"}]}',
    ],
)
def test_hostile_records_are_one_finding(run, raw):
    (run / record.RECORD).write_bytes(raw)
    assert [(one.kind, one.path) for one in record.verify(run)] == [("changed", record.RECORD)]
    with pytest.raises(BadInput, match="expected"):
        record.read(run)


def test_a_record_cannot_point_outside(run):
    text = (run / record.RECORD).read_text().replace('"report.html"', '"../report.html"')
    (run / record.RECORD).write_text(text)
    with pytest.raises(BadInput, match="expected files inside the folder"):
        record.read(run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"started": "yesterday"}, "expected started as ISO 8601"),
        ({"ended": "2026-01-01T00:00:00"}, "with an offset"),
        ({"config": "none.yaml"}, "expected the resolved config at none.yaml"),
        ({"inputs": [record.Input("x", "y", "CC0-1.0", "12", 1)]}, "expected 64 hexadecimal digits"),
        ({"inputs": [record.Input("x", "y", "", "a" * 64, 1)]}, "expected a licence for the input x"),
    ],
)
def test_wrong_facts_are_refused(run, change, says):
    with pytest.raises(BadInput, match=says):
        record.write(run, record.Facts(**{**vars(FACTS), **change}))


def test_folders_that_are_none(tmp_path):
    for verb in (record.verify, lambda folder: record.write(folder, FACTS)):
        with pytest.raises(BadInput, match="expected"):
            verb(tmp_path / "none")


def test_git_state(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    assert record.git_state(tmp_path) == {} == record.git_state(tmp_path / "none")

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert record.git_state(tmp_path) == {}  # no commit yet
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert record.git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new").write_text("")
    assert record.git_state(tmp_path)["dirty"] is True
    (tmp_path / "lib").mkdir()
    assert record.git_state(tmp_path / "lib") == {}  # installed inside of another project
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git_state(tmp_path) == {}  # no git on this machine


def test_environment_holds_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("JAX_ENABLE_X64", "0")
    said = record.environment()
    assert said["packages"]["numpy"] and said["python"].startswith("3.") and said["devices"]
    assert said["variables"]["JAX_ENABLE_X64"] == "0" and "hunter2" not in json.dumps(said)
