"""The whole chain on a toy climate: what a run leaves behind, and that it is the same after any interruption."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
import xarray as xr
import yaml

from domains.climate.domain import Climate
from twinsim import cli, evaluation, files, generate, record, report, run, train
from twinsim.base import BadInput

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("undrawn")


@contextlib.contextmanager
def telling(stage):
    """A progress that fails the test: nothing is left to do."""
    raise AssertionError(f"{stage} was done again")
    yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of the toy, in which its run is made."""
    folder = toy.place(tmp_path_factory.mktemp("toy"))
    asked = []

    def refuse(*place, **_):
        asked.append(place)
        raise OSError("there is no network")

    with pytest.MonkeyPatch.context() as patch:  # no command touches the network: whoever tries is told on below
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        run.deliver(toy.config(folder), toy.quiet)
    assert asked == [], "the network was asked for"
    return folder


@pytest.fixture
def begun(made, tmp_path):
    """A copy of the toy with the data and the model that were made, but no run."""
    for name in ("out/data", "out/models"):
        shutil.copytree(made / name, tmp_path / name)
    toy.write_scenario(tmp_path)
    shutil.copy2(made / "toy.nc", tmp_path / "toy.nc")
    return tmp_path


def config(made, here, *more):
    """The toy's configuration with its output in `here`, its data where they were first."""
    return {**toy.config(made, *more), "out": str(here / "out")}


def folder_of(here: Path) -> Path:
    (found,) = [path for path in (here / "out" / "runs").iterdir() if path.is_dir() and path.suffix != ".partial"]
    return found


def content(folder: Path) -> dict[str, bytes]:
    """What has to be the same after any interruption."""
    chosen = [*folder.glob("samples.zarr/**/*"), *folder.glob("evaluation/*"), folder / "metrics.json", folder / "checks.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in chosen if path.is_file() and path.suffix != ".npz"}


def assert_same(one: Path, two: Path) -> None:
    left, right = content(one), content(two)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == []


# ---------------------------------------------------------------- what a run leaves behind


def test_samples_open_with_names_units_coordinates_and_say_that_they_are_synthetic(made):
    with xr.open_zarr(folder_of(made) / "samples.zarr", consolidated=False) as data:
        assert dict(data.sizes) == {"member": 3, "time": 10, "lat": 8, "lon": 12}
        assert data["tas"].attrs["units"] == "K" and data["pr"].attrs["units"] == "mm day-1"
        assert data["lat"].attrs["units"] == "degrees_north" and str(data["time"].values[0])[:10] == "2001-06-01"
        assert "synthetic" in data["tas"].attrs["long_name"] and "not an observation" in data.attrs["source"]
        assert np.isfinite(data["tas"].values).all() and (data["pr"].values >= 0).all()
        assert 230 < float(data["tas"].mean()) < 330


def test_scores_stand_beside_those_of_baselines_and_are_plain_json(made):
    text = (folder_of(made) / "metrics.json").read_text()
    scores = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["scores"]
    assert len(scores) >= 3 and evaluation.MODEL in scores
    own = {key for key in scores[evaluation.MODEL] if not key.startswith("rule kept")} - {evaluation.MEMORY}
    for name in set(scores) - {evaluation.MODEL}:
        assert own == set(scores[name]) - {evaluation.MEMORY}


def test_folder_is_complete_and_its_record_holds(made):
    folder = folder_of(made)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("samples.zarr", "metrics.json", "checks.json", "config.yaml", "report.html", "question", "evaluation"),
        record.RECORD,
    }
    assert record.verify(folder) == []
    page = (folder / "report.html").read_text()
    assert "Ten days" in page and "synthetic" in page and 'src="http' not in page


def test_a_flipped_byte_is_named(made, tmp_path):
    folder = shutil.copytree(folder_of(made), tmp_path / "run")
    chunk = next(path for path in sorted((folder / "samples.zarr/tas/c").rglob("*")) if path.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    (finding,) = record.verify(folder)
    assert finding.kind == "changed" and finding.path == chunk.relative_to(folder).as_posix()
    with xr.open_zarr(folder / "samples.zarr", consolidated=False) as data, pytest.raises(ValueError, match=r"(?i)crc|checksum"):
        data["tas"].load()  # the data themselves tell as well


def test_second_run_returns_at_once(made):
    assert run.deliver(toy.config(made), telling) == folder_of(made)
    assert run.evaluate(toy.config(made), telling).scores.keys() == run.evaluate(toy.config(made), telling).scores.keys()


def test_evaluation_reads_back_what_was_judged(made, tmp_path):
    judged = run.evaluate(toy.config(made), telling)
    evaluation.write(tmp_path, judged, {"seed": 0})
    again = evaluation.read(tmp_path)
    for name, scores in judged.scores.items():
        for key, score in scores.table.items():
            np.testing.assert_equal(again.scores[name].table[key], score)
        for key, curve in scores.curves.items():
            np.testing.assert_array_equal(again.scores[name].curves[key], curve)
    np.testing.assert_array_equal(again.examples["truth"]["tas"], judged.examples["truth"]["tas"])


def test_hashes_name_what_decides_and_nothing_else(made):
    plain = run.places(toy.config(made))
    assert run.places({**toy.config(made), "out": "elsewhere"}).model.name == plain.model.name
    assert run.places(toy.config(made, "generate.batch=16", "train.log_every=2", "train.save_every=3")) == plain
    assert run.places(toy.config(made, "scale.precision=bfloat16", "scale.remat=true", "scale.mesh.fsdp=2")) == plain
    for change in ("seed=1", "train.steps=5", "generator.net.width=24", "domain.season=false"):
        assert run.places(toy.config(made, change)).model != plain.model
    settings = toy.config(made)
    quantities = dict(reversed(settings["domain"]["quantities"].items()))  # their order is that of the channels
    assert run.places({**settings, "domain": {**settings["domain"], "quantities": quantities}}).data != plain.data
    for change in ("generate.tile=4", "evaluate.members=5", "generator.sampler.steps=5"):
        changed = run.places(toy.config(made, change))
        assert changed.model == plain.model and changed.evaluation.name != plain.evaluation.name


@pytest.mark.slow
def test_precision_and_remat_of_the_scale_are_those_of_training(made, begun):
    shutil.rmtree(begun / "out" / "models")
    plain = run.training(config(made, begun), toy.quiet)
    shutil.rmtree(begun / "out" / "models")
    rough = run.training(config(made, begun, "scale.precision=bfloat16", "scale.remat=true", "scale.mesh.fsdp=2"), toy.quiet)
    assert rough.assemble(rough.params).net.dtype == np.float32 and not rough.assemble(rough.params).net.remat  # for drawing
    gap = [float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(rough.params), strict=True)]
    assert 1e-6 < max(gap) < 1e-2  # four steps of Adam, each at most its rate


def test_a_finished_run_says_what_has_changed_since(made, capsys, monkeypatch):
    again = lambda: run.deliver(toy.config(made), telling)  # noqa: E731
    truth, folder = made / "toy.nc", folder_of(made)
    whole = truth.read_bytes()
    assert again() == folder and not capsys.readouterr().err
    try:
        truth.write_bytes(whole + b"\0")
        with pytest.raises(BadInput, match="toy.nc: its content has changed since"):
            again()
        truth.unlink()
        assert again() == folder and "is not known" in capsys.readouterr().err
    finally:
        truth.write_bytes(whole)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_fingerprint_kept", lambda _: "of-another")
        assert again() == folder and "has been trained anew since" in capsys.readouterr().err
    monkeypatch.setattr(record, "git_state", lambda: {"commit": "0123456789abcdef", "dirty": False})
    assert again() == folder
    (said,) = capsys.readouterr().err.splitlines()
    assert f"was made by twinsim {record.read(folder).code}, this is 0.1.0+0123456789ab" in said


def test_answer_is_written_member_by_member_with_the_same_bytes(made, begun, monkeypatch):
    monkeypatch.setattr(run, "PART_BYTES", 1)
    asked, opened = [], Climate.dataset_of

    def counted(domain, samples, question):
        asked.append({len(values) for values in samples.values()})
        return opened(domain, samples, question)

    monkeypatch.setattr(Climate, "dataset_of", counted)
    monkeypatch.setattr(report, "write", lambda path, *_, **__: path.write_text(""))
    folder, whole = run.deliver(config(made, begun, "generate.batch=10"), toy.quiet) / "samples.zarr", folder_of(made) / "samples.zarr"
    assert asked == [{1}] * 3
    files_of = [{path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()} for store in (folder, whole)]
    assert files_of[0] and files_of[0] == files_of[1]


def test_netcdf_on_request_and_overrides_of_the_scenario(made, begun):
    folder = run.deliver(config(made, begun, "+set.formats=[netcdf]", "+set.members=2", "+set.period.every=5"), toy.quiet)
    with xr.open_dataset(folder / "samples.nc") as written, xr.open_zarr(folder / "samples.zarr", consolidated=False) as data:
        assert dict(data.sizes)["member"] == 2 and dict(data.sizes)["time"] == 2
        np.testing.assert_array_equal(written["tas"].values, data["tas"].values)
        assert "not an observation" in written.attrs["source"]
    with xr.open_zarr(folder_of(made) / "samples.zarr", consolidated=False) as whole:  # a draw is keyed by its place in the answer
        np.testing.assert_array_equal(data["tas"].values[:, 0], whole["tas"].values[:2, 0])


@pytest.mark.slow
def test_reproduce_finds_every_value_the_same_and_a_changed_one(made, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda path, *_, **__: path.write_text(""))  # pictures are compared by no one
    folder = folder_of(made)
    assert run.reproduce(folder, toy.quiet, 0.0) == []
    changed = shutil.copytree(folder, tmp_path / "changed")
    with xr.open_zarr(folder / "samples.zarr", consolidated=False) as data:
        other = data.load().assign(tas=data["tas"] + 0.5).drop_encoding()
    files.write_zarr(lambda some: other.isel(member=slice(some.start, some.stop)), 3, 3, changed / "samples.zarr")
    (difference,) = run._differing_values(changed / "samples.zarr", folder / "samples.zarr", 0.1)
    assert "tas: differs by up to 0.5" in difference and "tolerance 0.1" in difference
    assert list(run._differing_values(changed / "samples.zarr", folder / "samples.zarr", 0.6)) == []


# ---------------------------------------------------------------- interruptions


def hit(monkeypatch, owner, name, after, number=signal.SIGTERM):
    """Sends this process a signal when `owner.name` has been called `after` times."""
    original, calls = getattr(owner, name), []

    def wrapped(*given, **named):
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), number)
        return original(*given, **named)

    monkeypatch.setattr(owner, name, wrapped)


def blocks_of(original):
    def yields(*given, **named):
        for index, block in enumerate(original(*given, **named)):
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield block

    return yields


STOPS = {
    "encode examples": ("out", lambda patch: patch.setattr(Climate, "examples", blocks_of(Climate.examples))),
    "train": ("out", lambda patch: hit(patch, train.checkpoint, "save", 2)),  # the first save is that of the statistics
    "draw held-out": ("out/models/*/evaluation-*", lambda patch: hit(patch, generate, "compute", 2)),
    "score": ("out/models/*/evaluation-*", lambda patch: hit(patch, Climate, "score", 1)),
    "generate": ("out/runs", lambda patch: hit(patch, generate, "compute", 1)),
    "report": ("out/runs", lambda patch: hit(patch, report, "write", 1)),
}


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.slow) for stage in STOPS])
def test_asked_to_stop_it_leaves_with_75_and_goes_on_to_the_same_result(made, begun, stage, monkeypatch, capsys):
    absent, patch = STOPS[stage]
    for path in begun.glob(absent):
        shutil.rmtree(path)
    words = [*toy.words(made / "toy.nc", begun / "out"), f"scenario={made / 'toy.yaml'}", "generate.batch=16"]
    with monkeypatch.context() as patched:
        patch(patched)
        assert cli.main(["run", *words]) == 75
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # no handler is left behind
    monkeypatch.setattr(report, "write", lambda path, *_, **__: path.write_text(""))
    assert cli.main(["run", *words]) == 0
    assert_same(folder_of(begun), folder_of(made))


@pytest.mark.slow
def test_a_run_broken_off_in_the_report_draws_nothing_again(made, begun, monkeypatch):
    def broken(*_, **__):
        raise OSError(28, "No space left on device")

    settings = config(made, begun)
    with monkeypatch.context() as patched:
        patched.setattr(report, "write", broken)
        with pytest.raises(OSError, match="No space"):
            run.deliver(settings, toy.quiet)
    monkeypatch.setattr(generate, "compute", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(report, "write", lambda path, *_, **__: path.write_text(""))
    assert_same(run.deliver(settings, toy.quiet), folder_of(made))


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}, {tests!r}]
    from twinsim import cli, generate, train
    owner, name, after = {target}
    original, calls = getattr(owner, name), []
    def wrapped(*given, **named):
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*given, **named)
    setattr(owner, name, wrapped)
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "trace"),
    [
        ("train.checkpoint, '_complete', 3", "out/models/*/checkpoints/2"),  # after the statistics and the first of two checkpoints
        ("generate, 'compute', 2", "out/models/*/*.partial"),
        ("generate, 'compute', 10", "out/runs/*.partial"),
    ],
)
def test_killed_it_goes_on_to_the_same_bytes(made, tmp_path, target, trace):
    words = ["run", *toy.words(made / "toy.nc", tmp_path / "out"), f"scenario={made / 'toy.yaml'}", "generate.batch=16"]
    script = textwrap.dedent(KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), target=target))
    killed = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(tmp_path.glob(trace))
    assert not [path for path in (tmp_path / "out").glob("runs/*") if path.suffix != ".partial" and not path.name.startswith(".")]
    assert cli.main(words) == 0
    assert_same(folder_of(tmp_path), folder_of(made))


# ---------------------------------------------------------------- alone, and whole or not at all


def test_one_process_at_a_time_makes_a_folder(tmp_path):
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        from twinsim import files
        with files.alone(Path({str(tmp_path / "model")!r})):
            print("held", flush=True)
            sys.stdin.readline()
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            told = []

            def heard(sentence):
                told.append(sentence)
                other.stdin.write("\n")
                other.stdin.flush()

            with files.alone(tmp_path / "model", heard):
                pass
            assert len(told) == 1 and "waiting" in told[0]
        finally:
            other.kill()


def test_a_whole_folder_appears_at_its_end_only(tmp_path):
    with pytest.raises(RuntimeError), files.whole(tmp_path / "run") as folder:
        (folder / "half").write_text("1")
        raise RuntimeError
    assert not (tmp_path / "run").exists()
    with files.whole(tmp_path / "run") as folder:
        assert (folder / "half").exists()  # what was done is there to go on with
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---------------------------------------------------------------- what is looked at before anything begins


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("seed=-1", "config seed: expected a whole number from 0"),
        ("seed=one", "config seed: expected a whole number from 0"),
        ("train.steps=0", "training: steps: expected at least 1"),
        ("train.steps=many", "config train.steps: expected a number, got 'many'"),
        ("+train.step=7", "config train: train.Settings has no argument|has no argument 'step', did you mean 'steps'"),
        ("~train.batch", "config train"),
        ("evaluate.members=1", "config members: expected a whole number of at least 2"),
        ("generate.ema=2", "config ema: expected a whole number from 0 to 1, got 2"),
        ("generate.tile=0", "generate: expected tile"),
        ("optimizer.learning_rate=-1", "optimizer: expected learning_rate > 0"),
        ("scale.mesh.model=3", "mesh"),
        ("scale.precision=float16", "config scale.precision: expected one of float32, bfloat16, got .float16."),
        ("scale.remat=1", "config scale.remat: expected true or false, got 1"),
        ("domain._target_=os.system", "which may not be built"),
        ("generator.net._target_=builtins.exec", "which may not be built"),
        ("optimizer._target_=subprocess.run", "which may not be built"),
        ("domain._target_=twinsim.train.adamw", "has no scenarios"),
        ("scenario=climate/heat_wave", "did you mean 'climate/heatwave'"),
        ("scenario=climate/heatwave", "asks climate/generate, but the configured domain is climate/ncep"),
        ("+set.members=0", "members"),
    ],
)
def test_wrong_settings_are_answered_before_anything_begins(made, change, says, monkeypatch):
    monkeypatch.setattr(
        run, "build", lambda node, *at, **given: pytest.fail("built") if "dataset" in node else run_build(node, *at, **given)
    )
    with pytest.raises(BadInput, match=says):
        run.deliver({**toy.config(made, change), "out": str(made / "none")}, telling)
    assert not (made / "none").exists()


run_build = run.build


def test_a_file_that_changed_is_named(made, begun):
    data = begun / "toy.nc"
    toy.write_data(begun, days=720)
    settings = {**toy.config(made, "+set.seed=9"), "out": str(begun / "out")}
    kept = next(begun.glob("out/data/*/inputs.json"))
    kept.write_text(json.dumps({str(made / "toy.nc"): "0" * 64}))
    with pytest.raises(BadInput, match="its content has changed since"):
        run.deliver(settings, toy.quiet)
    assert data.exists()


def test_stored_scores_are_not_returned_for_another_file(made, begun):
    next(begun.glob("out/data/*/inputs.json")).write_text(json.dumps({str(made / "toy.nc"): "0" * 64}))
    with pytest.raises(BadInput, match="its content has changed since"):
        run.evaluate({**toy.config(made), "out": str(begun / "out")}, telling)
    next(begun.glob("out/data/*/inputs.json")).write_text("{")
    with pytest.raises(BadInput, match="damaged, expected the sha256"):
        run.evaluate({**toy.config(made), "out": str(begun / "out")}, telling)


@pytest.mark.parametrize(
    ("name", "text"), [("metrics.json", b'{"scores": {"twins'), ("metrics.json", b"[]"), ("curves.npz", b"PK\x03\x04")]
)
def test_damaged_scores_count_as_not_judged(made, begun, name, text, monkeypatch, capsys):
    (judged,) = begun.glob("out/models/*/evaluation-*")
    (judged / name).write_bytes(text)
    with pytest.raises(BadInput, match=f"{name}: expected .* it is damaged"):
        evaluation.read(judged)

    class Again(Exception):
        pass

    def again(*_):
        raise Again

    monkeypatch.setattr(run, "training", again)
    with pytest.raises(Again):
        run.evaluate(config(made, begun), telling)
    told = [line for line in capsys.readouterr().err.splitlines() if "judging again" in line]
    assert len(told) == 1 and name in told[0]


def test_scores_and_draws_of_other_weights_are_not_taken_for_those_of_the_model(made, begun, monkeypatch, capsys):
    (judged,) = begun.glob("out/models/*/evaluation-*")
    facts = json.loads((judged / "metrics.json").read_text())
    (judged / "metrics.json").write_text(json.dumps({**facts, "model": "of-another"}))
    model = run.training(config(made, begun), toy.quiet)
    drawn = []
    monkeypatch.setattr(generate, "stream", lambda *given: drawn.append(given[5]))
    with pytest.raises(TypeError):
        run.evaluate(config(made, begun), toy.quiet)
    assert "trained anew" in capsys.readouterr().err and drawn == [f"{judged.name} test {model.fingerprint}"]


def test_reproduce_compares_what_is_not_finite(tmp_path):
    values = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
    holed = values.copy()
    holed[1, 0, 0] = np.nan
    for name, data in (("whole", values), ("holed", holed), ("same", holed)):
        xr.Dataset({"x": (("member", "time", "y"), data)}).to_zarr(tmp_path / name, zarr_format=3, consolidated=False)
    assert "differs by up to inf" in next(run._differing_values(tmp_path / "whole", tmp_path / "holed", 1.0))
    assert list(run._differing_values(tmp_path / "holed", tmp_path / "same", 0.0)) == []


def test_what_is_never_done_is_null(made, tmp_path):
    never = config(made, tmp_path, "train.max_grad_norm=null", "train.max_loss_jump=null")
    run.check(never)
    assert run.training_settings(never).max_grad_norm is None
    assert run.places(never).model.name != run.places(toy.config(made)).model.name
    with pytest.raises(BadInput, match=r"config train.steps: expected a number, got None"):
        run.check(config(made, tmp_path, "train.steps=null"))


def test_reproduce_names_a_damaged_file_before_it_begins(made, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "deliver", lambda *_: pytest.fail("ran"))
    folder = shutil.copytree(folder_of(made), tmp_path / "run")
    chunk = next(path for path in sorted((folder / "samples.zarr/tas/c").rglob("*")) if path.is_file())
    metadata = folder / "samples.zarr/tas/zarr.json"
    endless = json.dumps({**json.loads(metadata.read_text()), "shape": [10**13, 10, 8, 12]}).encode()
    cut = chunk.read_bytes()[:9]
    for path, text in ((chunk, cut), (metadata, b"{"), (metadata, endless), (folder / "metrics.json", b"{")):
        whole = path.read_bytes()
        path.write_bytes(text)
        with pytest.raises(BadInput, match="damaged") as caught:
            run.reproduce(folder, telling, 0.0)
        assert (str(path) if path.name != "zarr.json" else "samples.zarr") in str(caught.value)
        path.write_bytes(whole)


def test_a_rule_is_kept_where_nothing_of_it_is_broken():
    broken = np.array([[0.0, 9e-6], [np.nan, 0.0]])  # 9e-6 kg kg-1 of humidity are a thousandth of it
    assert evaluation.kept({"hus850 above 0.05": broken})["rule kept: hus850 above 0.05"].value == 0.5


def test_the_record_of_a_hostile_folder_runs_nothing(made, tmp_path):
    folder = shutil.copytree(folder_of(made), tmp_path / "run")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    for hostile, says in (
        (yaml.safe_dump({**saved, "domain": {**saved["domain"], "_target_": "os.system"}}), "may not be built"),
        (yaml.safe_dump({**saved, "optimizer": {"_target_": "twinsim.data.publish", "unfinished": "a", "folder": "b"}}), "for what it"),
        (yaml.safe_dump({**saved, "scale": {"_target_": "twinsim.train.adamw", "learning_rate": 1.0}}), "names of settings"),
        ("a: &a [1, 2]\nb: *a\n", "alias or anchor"),
        ("!!python/object/apply:os.system ['true']", "expected"),
        (yaml.safe_dump({**saved, "seed": "${oc.env:HOME}"}), "interpolation"),
        ("x" * 2**20, "at most 256 kB"),
    ):
        (folder / "config.yaml").write_text(hostile)
        with pytest.raises(BadInput, match=says):
            run.reproduce(folder, telling, 0.0)
