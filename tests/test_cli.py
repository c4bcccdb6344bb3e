"""The command answers fast, knows what was meant, and ends with the exit code it documents."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import yaml

from twinsim import cli, doctor, record, run, train
from twinsim.base import BadInput
from twinsim.mesh import Preempted

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("undrawn")


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code and what was said on stdout and stderr."""
    capsys.readouterr()
    code = cli.main(list(words))
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("words", [[], ["--help"], ["run", "--help"], ["--version"], ["rum"]])
def test_help_imports_nothing_heavy(words):
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from twinsim import cli
cli.main({words!r})
print(sorted({{'jax', 'numpy', 'xarray', 'hydra', 'omegaconf', 'zarr', 'matplotlib', 'pydantic', 'rich', 'yaml'}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines()[-1] == "[]"


def test_help_names_every_verb_exit_code_and_an_example(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for verb in cli.VERBS:
        assert f"\n  {verb} " in out
    for shown in ("exit codes", "75", "130", "twinsim run climate/heatwave", "-m seed=0,1,2", "--cfg"):
        assert shown in out


@pytest.mark.parametrize("words", [["--help"], ["run", "--scenarios"]])
def test_a_reader_that_has_heard_enough_ends_it_quietly(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "twinsim", *words], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_scenarios_are_listed(capsys):
    code, out, _ = call(capsys, "run", "--scenarios")
    assert code == 0 and "climate/heatwave" in out.splitlines()


# ---------------------------------------------------------------- did you mean


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["evalute"], "unknown verb 'evalute', did you mean evaluate?"),
        (["run", "climate/heat_wave"], "did you mean 'climate/heatwave'?"),
        (["run", "heatwve"], "did you mean 'climate/heatwave'?"),
        (["run", "nowhere.yaml"], "scenario 'nowhere.yaml'"),
        (["run", "a", "b"], "expected one scenario, got a and b"),
        (["train", "domain=climate/generate", "train.stepps=3"], "did you mean train.steps?"),
        (["train", "domain=climate/generate", "sed=3"], "did you mean seed?"),
        (["train", "domain=climate/downscal"], "did you mean climate/downscale?"),
        (["train", "domain=climate/generate", "generator=unett"], "did you mean unet?"),
        (["train", "domain=climate/generate", "generatr=unet"], "generatr"),
        (["train", "domain=climate/generate", "train.steps="], "config"),
        (["train", "domain=climate/generate", "train.steps=[1"], "config"),
        (["train", "domain=climate/ncep"], "archive: expected a value, got none; give it as archive=VALUE"),
        (["run", "--fast"], "unknown option --fast; options are"),
        (["run", "set.member=3", "climate/heatwave"], "did you mean 'members'?"),
        (["run", "set.members=none", "climate/heatwave"], "members"),
        (["verify"], "expected the folder of one run, got nothing"),
        (["verify", "nowhere"], "found no folder there"),
        (["reproduce", ".", "tolerance=much"], "tolerance=much: expected a number"),
        (["reproduce", ".", "tolerance=nan"], "tolerance=nan: expected a number"),
        (["plan", "--cfg"], "unknown option --cfg; options are --json, --help"),
        (["train", "-m", "domain=climate/generate", "sed=0,1"], "did you mean seed?"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(capsys, words, says):
    code, out, err = call(capsys, *words)
    assert code == 2 and out == ""
    assert says in err and err.startswith("twinsim: ")
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


# ---------------------------------------------------------------- configuration


def test_cfg_prints_the_resolved_configuration_and_stops(capsys, monkeypatch):
    monkeypatch.setattr(run, "deliver", lambda *_: pytest.fail("ran"))
    code, out, _ = call(capsys, "run", "climate/heatwave", "--cfg", "seed=7", "set.members=3")
    config = yaml.safe_load(out)
    assert code == 0 and config["seed"] == 7 and config["set"] == {"members": 3}
    assert config["scenario"] == "climate/heatwave" and "${" not in out


def test_cfg_of_a_sweep_prints_every_job_and_runs_none(capsys, monkeypatch):
    monkeypatch.setattr(run, "training", lambda *_: pytest.fail("ran"))
    code, out, _ = call(capsys, "train", "-m", "--cfg", "domain=climate/generate", "seed=0,1")
    assert code == 0 and [config["seed"] for config in yaml.safe_load_all(out)] == [0, 1]


def test_a_scenario_brings_its_domain(capsys):
    _, out, _ = call(capsys, "run", "climate/downscaled_month", "--cfg")
    config = yaml.safe_load(out)
    assert config["domain"]["name"] == "climate/downscale" and config["generator"]["net"]["_target_"].endswith("ResidualMLP")


def test_a_scenario_may_lie_anywhere_and_keeps_odd_names(capsys, tmp_path):
    path = toy.write_scenario(tmp_path, "what if (two)", domain="climate/generate")
    code, out, _ = call(capsys, "run", str(path), "--cfg")
    assert code == 0 and yaml.safe_load(out)["scenario"] == str(path)


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInput("wrong"), 2),
        (train.Diverged("step 3"), 3),
        (FloatingPointError("tas is not finite"), 3),
        (Preempted("asked"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 2),
        (PermissionError(13, "Permission denied"), 2),
        (MemoryError(), 2),
        (ModuleNotFoundError("needs jcm: pip install 'twinsim[climate]'"), 2),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code):
    def fails(*_):
        raise error

    monkeypatch.setattr(run, "training", fails)
    found, _, err = call(capsys, "train", "domain=climate/generate")
    assert found == code
    assert len(err.strip().splitlines()) == 1


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "training", fails)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "domain=climate/generate"])


def test_doctor_ends_with_1_on_a_fault(capsys, monkeypatch):
    checks = doctor.checks()
    monkeypatch.setattr(doctor, "checks", lambda: [checks[0]._replace(ok=True)])
    code, out, _ = call(capsys, "doctor", "--json")
    assert code == 0 and len(json.loads(out)) == 1
    monkeypatch.setattr(doctor, "checks", lambda: [checks[0]._replace(ok=False)])
    assert call(capsys, "doctor")[0] == 1


def test_reproduce_ends_with_1_on_a_difference(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "reproduce", lambda folder, progress, tolerance: ["tas: differs"] if tolerance < 1 else [])
    assert call(capsys, "reproduce", str(tmp_path))[:2] == (1, "tas: differs\n")
    code, out, _ = call(capsys, "reproduce", str(tmp_path), "tolerance=1")
    assert code == 0 and "the same to 1" in out


# ---------------------------------------------------------------- progress and sweeps


def test_progress_without_a_terminal_is_a_line_a_stage(capsys, monkeypatch):
    monkeypatch.setattr(cli, "PLAIN_EVERY", 0.0)
    monkeypatch.setattr(cli, "SHORT", 0.0)
    with cli.progress("train") as update:
        update(5, 20, 0.25, 100.0)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train ") and "5/20" in first and "loss 0.2500" in first and "s left" in first
    assert last.startswith("train ") and "done in" in last


def test_a_sweep_runs_every_combination_and_goes_on_after_a_failure(capsys, monkeypatch, tmp_path):
    seen = []

    def training(config, progress):
        seen.append((config["seed"], config["train"]["batch"]))
        if config["seed"] == 0:
            raise BadInput("not this one")

    monkeypatch.setattr(run, "training", training)
    code, _, err = call(capsys, "train", "-m", "domain=climate/generate", f"out={tmp_path}", "seed=0,1", "train.batch=8,16")
    assert seen == [(0, 8), (0, 16), (1, 8), (1, 16)]
    assert code == 2 and err.count("not this one") == 2 and "Traceback" not in err


def test_a_sweep_that_is_asked_to_stop_begins_no_further_job(monkeypatch, tmp_path):
    seen = []

    def training(config, progress):
        seen.append(config["seed"])
        raise Preempted("asked")

    monkeypatch.setattr(run, "training", training)
    assert cli.main(["train", "-m", "domain=climate/generate", f"out={tmp_path}", "seed=0,1"]) == 75
    assert seen == [0]


@pytest.mark.slow
def test_a_sweep_trains_two_models_on_the_same_data(tmp_path):
    data, path = toy.write_data(tmp_path), toy.write_scenario(tmp_path)
    words = ["train", "-m", *toy.words(data, tmp_path / "out"), f"scenario={path}", "seed=0,1"]
    assert cli.main(words) == 0
    assert len([found for found in (tmp_path / "out/models").iterdir() if found.is_dir()]) == 2
    assert len([found for found in (tmp_path / "out/data").iterdir() if found.is_dir()]) == 1


@pytest.mark.slow
def test_the_toy_runs_where_there_is_no_network(tmp_path):
    alone = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine cannot take the network away from a process")
    data, path = toy.write_data(tmp_path), toy.write_scenario(tmp_path)
    words = ["run", *toy.words(data, tmp_path / "out"), f"scenario={path}"]
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from twinsim import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run([*alone, sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (path for path in (tmp_path / "out/runs").iterdir() if path.is_dir())
    graph = {entity["@id"]: entity for entity in json.loads((folder / record.RECORD).read_text())["@graph"]}
    assert graph["#run"]["description"] == shlex.join(["twinsim", *words]) and graph["#seed"]["value"] == 0
    assert graph["#draw-seed"]["value"] == 5
