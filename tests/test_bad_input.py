"""What comes in wrong is answered by one clear sentence and a non-zero exit, before anything long begins, and nothing is lost."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy
import xarray as xr

from twinsim import checkpoint, cli, files, run

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("undrawn")
SECONDS = 20  # a refusal; most of it imports and the reading of a small file


@pytest.fixture
def here(tmp_path):
    """A folder with the toy's data and scenario."""
    return toy.place(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the toy is trained."""
    folder = toy.place(tmp_path_factory.mktemp("toy"))
    assert cli.main(["train", *words(folder)]) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained toy, to be damaged."""
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


def words(folder: Path, out: Path | None = None) -> list[str]:
    return [*toy.words(folder / "toy.nc", out or folder / "out"), f"scenario={folder / 'toy.yaml'}"]


def refused(capsys, *command: str, says: str, code: int = 2) -> str:
    """Runs the command, which has to be refused in one sentence, soon. Returns the sentence."""
    capsys.readouterr()
    began = time.monotonic()
    assert cli.main(list(command)) == code
    assert time.monotonic() - began < SECONDS
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinsim: ")]
    assert len(told) == 1 and says in told[0], told
    return told[0]


# ---------------------------------------------------------------- data


def rewrite(folder: Path, change) -> None:
    with xr.open_dataset(folder / "toy.nc", decode_times=False) as data:
        changed = change(data.load())
    changed.drop_encoding().to_netcdf(folder / "toy.nc")


def renamed(data):
    return data.rename(tas="temperature")


def in_metres(data):
    data["tas"].attrs["units"] = "m"
    return data


def without_units(data):
    del data["tas"].attrs["units"]
    return data


def odd_calendar(data):
    data["time"].attrs["calendar"] = "lunar"
    return data


def no_time(data):
    data["time"].attrs["units"] = "days since the flood"
    return data


def all_nan(data):
    data["tas"][:] = np.nan
    return data


def some_nan(data):
    data["tas"][100:120, 3, 4] = np.nan
    return data


def infinite(data):
    data["tas"][100, 3, 4] = np.inf
    return data


def empty(data):
    return data.isel(time=slice(0, 0))


def other_years(data):
    data["time"].attrs["units"] = data["time"].attrs["units"].replace("2001", "1901")
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed, "no variable tas"),
        (in_metres, "its units m do not convert to K"),
        (without_units, "units"),
        (odd_calendar, "lunar"),
        (no_time, "time"),
        (all_nan, "no finite value"),
        (some_nan, "missing"),
        (infinite, "missing"),
        (empty, "toy.nc"),
        (other_years, "split train: selects nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_wrong_data(capsys, here, change, says):
    rewrite(here, change)
    sentence = refused(capsys, "run", *words(here), says=says)
    assert "toy.nc" in sentence or change is other_years
    assert not list(here.glob("out/models/*/checkpoints")) and not list(here.glob("out/data/*/examples"))


def test_missing_file(capsys, here):
    (here / "toy.nc").unlink()
    refused(capsys, "run", *words(here), says="toy.nc: no such file")


@pytest.mark.parametrize("content", [b"", b"not a data set", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_a_file_that_is_no_data_set(capsys, here, content):
    (here / "toy.nc").write_bytes(content)
    refused(capsys, "data", *words(here), says="toy.nc: cannot be opened")


def test_a_file_cut_short(capsys, here):
    raw = (here / "toy.nc").read_bytes()
    (here / "toy.nc").write_bytes(raw[: len(raw) // 2])
    refused(capsys, "data", *words(here), says="toy.nc")


# ---------------------------------------------------------------- what was written before


def damage(path: Path, every: int = 30) -> None:
    """Flips a bit of one byte in `every`: of each row of the examples, which have 32 bytes and a checksum."""
    raw = bytearray(path.read_bytes())
    for place in range(0, len(raw), every):
        raw[place] ^= 1
    path.write_bytes(raw)


def test_a_corrupted_chunk_of_the_examples_is_named(capsys, trained, copy):
    chunk = next(path for path in copy.glob("out/data/*/examples/target/c/**/*") if path.is_file())
    damage(chunk)
    sentence = refused(capsys, "train", *words(trained, copy / "out"), "seed=3", says="is damaged")
    assert "target of example" in sentence and "remove" in sentence


def test_a_truncated_checkpoint_is_named_and_the_one_before_it_used(capsys, trained, copy):
    (saved,) = copy.glob("out/models/*/checkpoints")
    assert checkpoint.steps(saved) == [2, 4]
    expected = checkpoint.fingerprint(saved, 4)
    largest = max((path for path in (saved / "4").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    capsys.readouterr()
    assert cli.main(["train", *words(trained, copy / "out")]) == 0
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinsim: ")]
    assert "checkpoints/4 is damaged and not used" in told and "bytes instead of" in told and "4.quarantined-truncated" in told
    assert checkpoint.fingerprint(saved, 4) == expected  # trained again from 2, to the same
    assert (saved / "4.quarantined-truncated").is_dir()  # nothing is lost


def test_damaged_statistics_are_fitted_again(capsys, trained, copy):
    (saved,) = copy.glob("out/data/*/statistics")
    before = checkpoint.fingerprint(saved, 0)
    largest = max((path for path in (saved / "0").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    damage(largest)
    capsys.readouterr()
    assert cli.main(["data", *words(trained, copy / "out")]) == 0
    assert "fitting again" in capsys.readouterr().err
    assert checkpoint.fingerprint(saved, 0) == before


# ---------------------------------------------------------------- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "twinsim-test", folder], capture_output=True).returncode
    )
    if not mounted:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk(capsys, here, small_disk):
    (small_disk / "ballast").write_bytes(bytes(2_900_000))
    capsys.readouterr()
    assert cli.main(["run", *words(here, small_disk / "out")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinsim: ")]
    assert len(told) == 1 and ("No space left" in told[0] or "MiB free" in told[0] or "are free" in told[0]), told


def test_full_disk_while_drawing_keeps_the_model(capsys, trained, small_disk, monkeypatch):
    shutil.copytree(trained / "out", small_disk / "out")
    before = {path: path.read_bytes() for path in small_disk.rglob("checkpoints/**/*") if path.is_file()}
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(max(free - 20_000, 0)))
    monkeypatch.setattr(files, "check_room", lambda *_: None)  # it would have said so before
    capsys.readouterr()
    assert cli.main(["run", *words(trained, small_disk / "out")]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twinsim: ")]
    assert len(told) == 1, told
    (small_disk / "ballast").unlink()
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in small_disk.glob("out/runs/*") if path.is_dir() and path.suffix != ".partial"]


@pytest.mark.slow
def test_a_limit_on_file_size_is_one_sentence(here):
    script = f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); from twinsim import cli\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    command = [sys.executable, "-c", script, "train", *words(here)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("twinsim: ")
    assert "File too large" in done.stderr.splitlines()[-1]


def test_too_much_for_disk_or_memory_is_refused_before_training(capsys, here):
    toy.write_scenario(here, members="10000", period='{start: "1950-01-01", end: "2050-01-01"}')
    refused(capsys, "run", *words(here), says="needs about")
    assert not (here / "out/models").exists()


def test_a_place_that_cannot_be_written(capsys, here):
    (here / "file").write_text("")
    refused(capsys, "run", *words(here, here / "file"), says="Not a directory")


# ---------------------------------------------------------------- scenarios


HOSTILE = {
    "alias bomb": ('a: &a ["x","x"]\nb: &b [*a,*a]\nc: &c [*b,*b]\n', "alias or anchor"),
    "tag": ("title: !!python/object/apply:os.system ['touch owned']\n", "YAML tag"),
    "target": ("_target_: os.system\n", "underscore"),
    "environment": ("title: ${oc.env:HOME}\n", "interpolation"),
    "depth": ("a: " + "[" * 500 + "]" * 500 + "\n", "levels"),
    "length": ("title: " + "x" * 10**6 + "\n", "at most 256 kB"),
    "binary": ("title: \0\n", "binary"),
    "empty": ("", "empty file"),
    "list": ("- a\n- b\n", "name: value"),
    "number": ("members: 99999999999999999999999\n", "digits"),
    "twice": ("title: a\ntitle: b\n", "each key once"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_scenario(capsys, here, name):
    text, says = HOSTILE[name]
    (here / "toy.yaml").write_text(text)
    refused(capsys, "run", *words(here), says=says)
    assert not (here / "out").exists() and not Path("owned").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"members": "1000000000"}, "members"),
        ({"members": "0"}, "members"),
        ({"members": "ten"}, "members: expected a whole number"),
        ({"period": '{start: "0001-01-01", end: "9999-12-31"}'}, "period: expected 1 to 40000 days"),
        ({"period": '{start: "2001-06-10", end: "2001-06-01"}'}, "period"),
        ({"period": '{start: "2001-02-30", end: "2001-06-01"}'}, "period"),
        ({"period": '{start: "yesterday", end: "2001-06-01"}'}, "period.start"),
        ({"sst_offset": "2.0"}, "was not trained with one"),
        ({"unknown": "1"}, "unknown key 'unknown'"),
        ({"domain": "climate/generate"}, "add domain=climate/generate"),
        (
            {"impose": "[{variable: psl, box: {lat: [0, 90], lon: [0, 90]}, above_quantile: 0.9}]"},
            "variable 'psl': expected one of tas, pr",
        ),
        ({"impose": "[{variable: tas, box: {lat: [1, 2], lon: [1, 2]}, above_quantile: 0.9}]"}, "no cell of the grid"),
        ({"background": "{file: ../../../etc/passwd}"}, "outside of it"),
        ({"background": "{file: /etc/passwd}"}, "outside of it"),
        ({"background": "{file: toy.nc}"}, "for a model that downscales"),
        ({"background": "{file: absent.nc}"}, "absent.nc: no such file beside it"),
    ],
)
def test_wrong_scenario(capsys, here, changes, says):
    toy.write_scenario(here, **changes)
    refused(capsys, "run", *words(here), says=says)
    assert not (here / "out/models").exists()


def test_a_link_out_of_the_folder_is_not_followed(capsys, here, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.nc"
    secret.write_bytes(b"secret")
    (here / "link.nc").symlink_to(secret)
    toy.write_scenario(here, background="{file: link.nc}")
    assert "secret.nc" not in refused(capsys, "run", *words(here), says="outside of it")


@pytest.mark.parametrize("kind", ["link", "device"])
def test_what_is_no_file_in_a_store_beside_a_scenario_is_refused(capsys, here, kind):
    store = here / "coarse.zarr" / "tas"
    store.mkdir(parents=True)
    store.joinpath("0").symlink_to("/etc/passwd") if kind == "link" else os.mkfifo(store / "0")
    toy.write_scenario(here, background="{file: coarse.zarr}")
    refused(capsys, "run", *words(here), says="coarse.zarr/tas/0: expected a plain file, got a link or a device")


def test_a_file_beside_a_scenario_leaves_its_name_to_the_scenario(capsys, here):
    (here / "scenario.yaml").write_text("x")
    toy.write_scenario(here, background="{file: scenario.yaml}")
    refused(capsys, "run", *words(here), says="scenario.yaml: expected another name")


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    "word",
    [
        "domain._target_=os.system",
        "generator._target_=subprocess.run",
        "domain.dataset._target_=shutil.rmtree",
        "generator.net._target_=builtins.eval",
        "optimizer._target_=twinsim.cli.main",
        "domain.judge._target_=numpy.load",
        "domain._target_=domains.climate.domain.Path.unlink",
    ],
)
def test_hostile_target_is_refused_before_anything_is_built(capsys, here, word, monkeypatch):
    monkeypatch.setattr(run, "build", lambda node, *at, **given: pytest.fail("built"))
    refused(capsys, "run", *words(here), word, says="_target_")
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("set=5", "config set: expected a table, got 5"),
        ("~set", "config set: expected a table, got None"),
        ("out=null", "config out: expected text, got None"),
        ("scenario=5", "config scenario: expected the name or the file of a scenario, got 5"),
        ("scale.mesh=5", "config scale.mesh: expected a table of whole numbers, got 5"),
        ("~generate.tile", "config generate.tile: expected a number, got nothing"),
        ("domain.splits=5", "config domain.splits: expected a table, got 5"),
        ("domain.splits.train=[{time: ['2001']}]", "2001"),
        ("domain.components=5", "config domain.components: expected a table with the `_target_` of a Components or null, got 5"),
        ("optimizer.learning_rate=fast", "config optimizer.learning_rate: expected a number, got 'fast'"),
    ],
)
def test_a_value_of_the_wrong_kind(capsys, here, word, says):
    given = [each for each in words(here) if not (word.startswith("domain.splits") and each.startswith("domain.splits"))]
    refused(capsys, "run", *given, word, says=says)
    assert not list(here.glob("out/models/*/checkpoints"))


def test_an_interpolation_that_does_not_resolve(capsys, here):
    refused(capsys, "run", *words(here), "seed=${nowhere}", says="nowhere")
