"""A sweep on SLURM: the text that is submitted, what the script makes of each ending, and the whole on a real SLURM of two nodes."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import toy
from local_slurm import PATH, restarts, said, start_now, until

from twinsim import checkpoint, cli, slurm
from twinsim.base import BadInput

ROOT = Path(__file__).parents[1]
NASTY = ["set.title=it's", 'a="b c"', "b=$HOME", "c=`id`;$(id)", "d=!1 *", "e=\\n", "f=#x", "g=%a"]


def call(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code and what was said on stdout and stderr."""
    capsys.readouterr()
    code = cli.main(list(words))
    return code, *capsys.readouterr()


def programs(folder: Path, monkeypatch, **texts: str) -> None:
    """Lets commands of SLURM be the given lines of bash."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.fixture
def no_slurm(tmp_path, monkeypatch):
    """A PATH without the commands of SLURM."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"slurm": [1]}, "scale.slurm: expected a table"),
        ({"slurm": {"nods": 2}}, "scale.slurm.nods: expected one of nodes, tasks_per_node"),
        ({"slurm": {"account": "???"}}, "scale.slurm.account: expected a value, got none; give it as scale.slurm.account=VALUE"),
        ({"slurm": {"nodes": 0}}, "scale.slurm.nodes: expected a whole number of at least 1, got 0"),
        ({"slurm": {"nodes": True}}, "scale.slurm.nodes: expected a whole number"),
        ({"slurm": {"tasks_per_node": "4"}}, "scale.slurm.tasks_per_node: expected a whole number"),
        ({"slurm": {"grace": 1.5}}, "scale.slurm.grace: expected a whole number"),
        ({"slurm": {"submit": "no"}}, "scale.slurm.submit: expected true or false, got 'no'"),
        ({"slurm": {"time": 43200}}, "scale.slurm.time: expected hh:mm:ss or d-hh:mm:ss, in quotes, got 43200"),
        ({"slurm": {"time": "30"}}, "scale.slurm.time: expected hh:mm:ss"),
        ({"slurm": {"partition": "a\n#SBATCH --x"}}, "scale.slurm.partition: expected one line"),
        ({"slurm": {"partition": "a --x"}}, "scale.slurm.partition: expected one word"),
        ({"slurm": {"prologue": "module load x"}}, "scale.slurm.prologue: expected a list of lines"),
        ({"slurm": {"prologue": ["a\rb"]}}, "scale.slurm.prologue[0]: expected one line"),
        ({"slurm": {"sbatch": ["constraint=gpu"]}}, "scale.slurm.sbatch: expected options such as --constraint=gpu"),
        ({"slurm": {"run": ""}}, "scale.slurm.run: expected text"),
        ({"environment": ["A=1"]}, "scale.environment: expected a table"),
        ({"environment": {"A B": 1}}, "scale.environment: expected names of variables, got 'A B'"),
        ({"environment": {"A": True}}, "scale.environment.A: expected text, got True"),
        ({"environment": {"A": "1\n2"}}, "scale.environment.A: expected one line"),
    ],
)
def test_a_wrong_setting_is_named(scale, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        slurm.settings(scale)


def test_every_setting_has_a_default():
    nulls = {name: None for name in vars(slurm.Settings()) if name != "environment"}
    assert (
        slurm.settings({}) == slurm.settings({"slurm": None, "environment": None}) == slurm.settings({"slurm": nulls}) == slurm.Settings()
    )
    assert slurm.settings({"slurm": {"account": 465, "mem": 0}}).account == "465"


# ---------------------------------------------------------------- the script


def test_the_script_holds_what_was_asked():
    asked = slurm.settings(
        {
            "slurm": {
                "nodes": 2,
                "tasks_per_node": 4,
                "cpus_per_task": 8,
                "gpus_per_node": 4,
                "time": "2-00:00:00",
                "account": "acc",
                "partition": "gpu",
                "qos": "normal",
                "mem": "64G",
                "max_parallel": 3,
                "grace": 90,
                "prologue": ["module load x", "export SIF=$HOME/x.sif"],
                "run": "srun singularity exec $SIF",
                "sbatch": ["--constraint=a100"],
            },
            "environment": {"XLA_FLAGS": "--a=1 --b='$x'", "OMP_NUM_THREADS": 4},
        }
    )
    made = slurm.script(Path("/w/it's 1%/train-ab"), [1, 2, 3, 5], asked, Path("/home/me"))
    head, body = made.split("\n\n", 1)
    assert head.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=train-ab",
        "#SBATCH --array=1-3,5%3",
        '#SBATCH --chdir="/home/me"',
        '#SBATCH --output="/w/it\'s 1%%/train-ab/slurm.log"',
        "#SBATCH --open-mode=append",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --mem=64G",
        "#SBATCH --time=2-00:00:00",
        "#SBATCH --signal=TERM@90",
        "#SBATCH --account=acc",
        "#SBATCH --partition=gpu",
        "#SBATCH --qos=normal",
        "#SBATCH --requeue",
        "#SBATCH --constraint=a100",
    ]
    order = [
        "exec >>",
        "export XLA_FLAGS=",
        "export OMP_NUM_THREADS=4",
        "module load x",
        "export SIF=$HOME/x.sif",
        "run='srun sing",
        "eval ",
    ]
    assert sorted(order, key=body.index) == order
    assert 'scontrol requeue "$task"' in body


def run_script(folder: Path, asked: slurm.Settings, words: list[str], task: int = 1, before: int = 0) -> int:
    """Runs the script of a sweep of one job, as SLURM would; gives its exit code."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.txt").write_text("\n" * (task + before - 1) + slurm.command(asked.python, "train", words) + "\n")
    (folder / "sweep.sbatch").write_text(slurm.script(folder, [task + before], asked, folder, before))
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "77"}
    return subprocess.run(["bash", str(folder / "sweep.sbatch")], env=environ, timeout=30).returncode


def test_values_arrive_as_they_were_given(tmp_path, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, srun='exec "$@"', show='for word; do printf "%s\\n" "$word"; done; echo "<$X>"')
    asked = slurm.settings({"slurm": {"python": "show", "run": "srun"}, "environment": {"X": 'it\'s "$HOME"\\ `id`'}})
    assert run_script(folder := tmp_path / "it's $1", asked, NASTY) == 0
    assert (folder / "1.out").read_text().splitlines() == ["-m", "twinsim", "train", *NASTY, '<it\'s "$HOME"\\ `id`>']
    assert (folder / "1.done").read_text() == '<it\'s "$HOME"\\ `id`>\n'
    with pytest.raises(BadInput, match="expected one line"):
        slurm.command("python", "train", ["a=1\nrm"])


SRUN_ERROR = "srun: error: node1: task"


@pytest.mark.parametrize(
    ("says", "code", "queue", "marker", "ends", "requeued"),
    [
        ("echo fine", 0, "RUNNING None", "done:fine", 0, False),
        ("echo 'twinsim: bad'", 2, "RUNNING None", "failed:exit code 2: twinsim: bad", 2, False),
        ("echo saved", 75, "RUNNING None", "requeued:saved", 75, True),
        ("echo saved", 75, "COMPLETING TimeLimit", "requeued:saved", 75, True),
        ("echo saved", 75, "COMPLETING None", "stopped:saved", 75, False),
        ("true", 143, "RUNNING None", "requeued:", 75, True),
        ("echo saved; echo 'W1128 17:15:31.497574   19 notifier.cc:90] SIGTERM caught'; echo '*** Check failure'; echo '  @   0x7f'",
         75, "RUNNING None", "requeued:saved", 75, True),
        # several tasks: the others are ended when the first fails, and say that they were asked to stop
        (f"echo bad; echo '{SRUN_ERROR} 0: Exited with exit code 2'; echo '{SRUN_ERROR}s 1-3: Exited with exit code 75'",
         75, "RUNNING None", "failed:exit code 2: bad", 75, False),
        (f"echo '{SRUN_ERROR} 3: Out Of Memory'; echo '{SRUN_ERROR} 0: Exited with exit code 75'", 75, "RUNNING None",
         f"failed:Out Of Memory: {SRUN_ERROR} 0: Exited with exit code 75", 75, False),
        (f"echo saved; echo '{SRUN_ERROR}s 0-1: Exited with exit code 75'; echo '{SRUN_ERROR} 2: Killed'", 137, "RUNNING None",
         "requeued:saved", 75, True),
        ("echo 'srun: error: no such node'", 1, "RUNNING None", "failed:exit code 1: srun: error: no such node", 1, False),
    ],
)  # fmt: skip
def test_each_ending_leaves_its_marker(tmp_path, monkeypatch, says, code, queue, marker, ends, requeued):
    programs(tmp_path / "bin", monkeypatch, srun=f"{says}\nexit {code}", squeue=f"echo {queue}", scontrol='echo "$@" >requeued')
    asked = slurm.settings({"slurm": {"prologue": ["set -euo pipefail", f"cd {tmp_path}"]}})
    folder = tmp_path / "train-x"
    folder.mkdir()
    (folder / "1.failed").write_text("before")
    (folder / "1.out").write_text(f"{SRUN_ERROR} 0: Exited with exit code 9\nof an earlier start\n")
    assert run_script(folder, asked, []) == ends
    (left,) = [file for file in folder.glob("1.*") if file.suffix != ".out"]
    assert f"{left.suffix[1:]}:{left.read_text().strip()}" in (marker, marker.replace("requeued:", "requeued:requeue "))
    assert (tmp_path / "requeued").exists() is requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 77_1\n"


@pytest.mark.parametrize(("line", "says"), [("test -n '' || { echo no SIF >&2; exit 2; }", "exit code 2 before the command: no SIF"),
                                            ("set -e; module load x", "exit code 127 before the command")])  # fmt: skip
def test_a_prologue_that_ends_the_job_is_told(tmp_path, monkeypatch, line, says):
    programs(tmp_path / "bin", monkeypatch, srun="touch began")
    assert run_script(tmp_path / "train-x", slurm.settings({"slurm": {"prologue": [line]}}), []) in (2, 127)
    assert (tmp_path / "train-x/1.failed").read_text().startswith(says)
    assert not list((tmp_path / "train-x").glob("1.running"))


def test_a_long_sweep_becomes_several_arrays(tmp_path, monkeypatch):
    jobs = [[f"seed={seed}"] for seed in range(2500)]
    asked = slurm.settings({"slurm": {"submit": False, "max_array": 1001}})
    slurm.submit(tmp_path, "train", jobs, asked)
    (folder,) = tmp_path.glob("train-*")
    arrays = {file.name: re.search(r"--array=(\S+)%16", file.read_text())[1] for file in folder.glob("*.sbatch")}
    assert arrays == {"sweep.sbatch": "1-1000", "sweep-1001.sbatch": "1-1000", "sweep-2001.sbatch": "1-500"}
    for number in set(range(1, 2501)) - {7, 1500, 2000}:
        (folder / f"{number}.done").touch()
    slurm.submit(tmp_path, "train", jobs, asked)
    arrays = {file.name: re.search(r"--array=(\S+)%16", file.read_text())[1] for file in folder.glob("*.sbatch")}
    assert arrays == {"sweep.sbatch": "7", "sweep-1001.sbatch": "500,1000"}
    programs(tmp_path / "bin", monkeypatch, srun='echo "$*"')
    assert run_script(folder, asked, ["seed=1499"], task=500, before=1000) == 0
    assert (folder / "1500.out").read_text().endswith("twinsim train seed=1499\n")


def test_the_scale_does_not_count_in_the_name_unless_it_is_swept():
    named = slurm.sweep_name("train", [["seed=0", "scale=lumi"], ["seed=1", "scale=lumi"]])
    assert re.fullmatch(r"train-[0-9a-f]{10}", named)
    assert named == slurm.sweep_name("train", [["++scale.slurm={time: x}", "seed=0"], ["++scale.slurm={time: x}", "seed=1"]])
    others = [("train", [["seed=0"]]), ("data", [["seed=0"], ["seed=1"]]), ("train", [["seed=1"], ["seed=0"]]),
              ("train", [["seed=0", "scale=a"], ["seed=1", "scale=b"]])]  # fmt: skip
    assert len({named, *(slurm.sweep_name(*each) for each in others)}) == 5


# ---------------------------------------------------------------- submit and status


def test_the_same_sweep_again_submits_what_is_neither_done_nor_queued(tmp_path, monkeypatch):
    jobs = [[f"seed={seed}"] for seed in range(5)]
    programs(tmp_path / "bin", monkeypatch, sbatch='echo "77;cluster"', squeue="true")
    first = slurm.submit(tmp_path, "train", jobs, slurm.settings({}))
    (folder,) = tmp_path.glob("train-*")
    assert first[1] == "submitted 5 of 5 jobs as 77" and len(list(folder.glob("*.queued"))) == 5
    for name in ("1.done", "2.failed"):  # as the script leaves them
        (folder / f"{name[0]}.queued").unlink()
        (folder / name).write_text("said\n")
    script = folder / "sweep.sbatch"
    queue = [f"echo '{task}|{state}|{why}|{script}'" for task, state, why in ((3, "RUNNING", "None"), (4, "PENDING", "PartitionTimeLimit"))]
    queue.append(f"echo '2|FAILED|None|{script}'")
    queue.append("echo '5|RUNNING|None|/elsewhere/train-x/sweep.sbatch'")  # another sweep of that name
    programs(tmp_path / "bin", monkeypatch, squeue="\n".join(queue))
    assert slurm.status(folder).jobs[3].said == "waits: PartitionTimeLimit", "what will never begin is seen"
    again = slurm.submit(tmp_path, "train", jobs, slurm.settings({"slurm": {"python": "other"}}))
    assert again[1:3] == ["submitted 2 of 5 jobs as 77", "1 done, 2 in the queue"]
    assert "--array=2,5%16" in script.read_text()
    lines = (folder / "jobs.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["other", "other", sys.executable, sys.executable, "other"]
    for number in range(1, 6):
        (folder / f"{number}.done").touch()
    assert slurm.submit(tmp_path, "train", jobs, slurm.settings({}))[1] == "nothing to submit: 5 done"


@pytest.mark.parametrize(
    ("marker", "queued", "state"),
    [
        ("done", "COMPLETING", "done"),
        ("queued", "PENDING", "queued"),
        (None, "PENDING", "queued"),
        ("failed", "PENDING", "queued"),
        ("queued", "RUNNING", "running"),
        ("running", "RUNNING", "running"),
        ("failed", "COMPLETING", "failed"),
        ("requeued", "COMPLETING", "requeued"),
        ("requeued", "PENDING", "requeued"),
        ("running", "PENDING", "requeued"),  # its node failed
        (None, None, "not submitted"),
        ("queued", None, "failed"),
        ("running", None, "failed"),
        ("requeued", None, "stopped"),
        ("stopped", None, "stopped"),
    ],
)
def test_where_a_job_stands(marker, queued, state):
    assert slurm._state(marker, queued, known=True) == state
    assert queued or slurm._state(marker, None, known=False) == (marker or "not submitted")


@pytest.mark.parametrize("content", [b"", b"\n", b"python -m twinsim train 'a\n", b"python\n", b"\xff\xfe"])
def test_a_damaged_list_of_jobs_is_one_sentence(capsys, tmp_path, monkeypatch, no_slurm, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/sweeps/train-x").mkdir(parents=True)
    (tmp_path / "out/sweeps/train-x/jobs.txt").write_bytes(content)
    code, _, err = call(capsys, "status")
    assert code == 2 and "jobs.txt: damaged, expected a command a line" in err and len(err.splitlines()) == 1


def test_status_tells_from_the_files_alone(capsys, tmp_path, monkeypatch, no_slurm):
    monkeypatch.chdir(tmp_path)
    assert call(capsys, "status")[:2] == (0, "no sweep in out/sweeps\n")
    slurm.submit(
        Path("out/sweeps"), "train", [[f"seed={seed}", "out=o"] for seed in range(6)], slurm.settings({"slurm": {"submit": False}})
    )
    (folder,) = Path("out/sweeps").glob("train-*")
    (folder / "1.done").touch()
    (folder / "2.running").write_text("SLURM job 7\n")
    (folder / "2.out").write_text("train  10/40\nsrun: got SIGCONT\n[Gloo] Rank 0 is connected\n@  0x7f\n")
    (folder / "3.queued").touch()
    (folder / "4.requeued").write_text("asked to stop\n")
    code, out, _ = call(capsys, "status")
    summary, *rows = out.splitlines()
    assert code == 0 and summary.startswith(f"{folder}: 6 jobs: 1 done, 1 running, 1 queued, 1 requeued, 2 not submitted (no SLURM here")
    assert [row.split() for row in rows[:4]] == [
        ["1", "done", "seed=0"], ["2", "running", "seed=1", "train", "10/40"], ["3", "queued", "seed=2"],
        ["4", "requeued", "seed=3", "asked", "to", "stop"]]  # fmt: skip
    (folder / "5.failed").write_text("exit code 2: twinsim: bad\n")
    code, out, _ = call(capsys, "status", "--json", str(folder))
    (told,) = json.loads(out)
    assert code == 1 and told["counts"]["failed"] == 1 and told["asked_slurm"] is False
    assert told["jobs"][4] == {"number": 5, "state": "failed", "words": "seed=4", "said": "exit code 2: twinsim: bad"}
    code, _, err = call(capsys, "status", str(tmp_path / "empty"))
    assert code == 2 and "expected the folder of a sweep" in err


def test_the_command_reaches_the_launcher(capsys, tmp_path, monkeypatch, no_slurm):
    monkeypatch.chdir(tmp_path)
    words = ["evaluate", "-m", "domain=climate/generate", "seed=0,1", "hydra/launcher=slurm"]
    code, out, err = call(capsys, *words, "++scale.slurm={submit: false}", '+set.asks="it\'s"')
    assert code == 0, err
    (folder,) = (tmp_path / "out/sweeps").glob("evaluate-*")
    assert out.splitlines()[0] == f"sweep: {folder}" and f"sbatch {folder}/sweep.sbatch" in out
    for seed, line in enumerate((folder / "jobs.txt").read_text().splitlines()):
        assert shlex.split(line)[:6] == [sys.executable, "-m", "twinsim", "evaluate", "domain=climate/generate", f"seed={seed}"]
        assert "launcher" not in line
    # each mistake is one sentence
    for more, says in (
        (
            ["++scale.slurm={submit: true}"],
            "sbatch: not found, expected SLURM on this machine; scale.slurm.submit=false only writes the sweep",
        ),
        (["++scale.slurm={nods: 1}"], "scale.slurm.nods: expected one of nodes"),
        (["++scale.slurm={account: ???}"], "scale.slurm.account"),
    ):
        code, out, err = call(capsys, *words, *more)
        assert code == 2 and says in err and len(err.splitlines()) == 1, err
    programs(tmp_path / "bin", monkeypatch, squeue="true", sbatch="echo 'sbatch: error: invalid account' >&2; exit 1")
    code, out, err = call(capsys, *words, "++scale.slurm={account: x}")
    assert code == 2 and "refused by SLURM: sbatch: error: invalid account" in err
    assert not list(folder.glob("*.queued"))


def test_a_scale_file_selects_the_launcher(capsys, tmp_path, monkeypatch, no_slurm):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf/scale").mkdir(parents=True)
    lines = ["# @package _global_", "defaults:", "  - override /hydra/launcher: slurm", "scale:", "  mesh: {data: -1, fsdp: 1, model: 1}",
             "  slurm: {submit: false, nodes: 2, time: 12:00:00}"]  # fmt: skip
    (tmp_path / "conf/scale/machine.yaml").write_text("\n".join(lines))
    words = ["train", "-m", f"hydra.searchpath=[file://{tmp_path}/conf]", "domain=climate/generate", "scale=machine", "seed=0,1"]
    code, _, err = call(capsys, *words)
    assert code == 2 and "in quotes, got 43200" in err
    code, _, err = call(capsys, *words, "scale.slurm.time=12:00:00")
    assert code == 0, err
    assert "--time=12:00:00" in next((tmp_path / "out/sweeps").glob("train-*/sweep.sbatch")).read_text()


# ---------------------------------------------------------------- on a real SLURM

# in place of Python: the ways in which a job may end
ENDINGS = r"""
case "$*" in
*seed=0*) echo "train 4/4" ;;
*seed=1*)
    [ "$SLURM_PROCID" = 0 ] && sleep 1 && echo "twinsim: bad number" && exit 2
    trap 'exit 75' TERM; sleep 60 & wait $! ;;
*seed=2*)
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo "went on"; exit 0; }
    trap 'exit 75' TERM; echo "train 1/4"; sleep 60 & wait $! ;;
*seed=3*) trap 'exit 75' TERM; echo "train 2/4"; sleep 60 & wait $! ;;
esac
"""


def standing(folder: Path) -> dict[int, str]:
    return {job.number: job.state for job in slurm.status(folder).jobs}


def numbered(folder: Path, number: int) -> str:
    """SLURM's number of a job of the sweep, such as 1000_2."""
    return next(line for line in said("squeue", "-h", "-r", "-n", folder.name, "-o", "%F_%K").split() if line.endswith(f"_{number}"))


@pytest.mark.slurm
def test_every_ending_on_two_nodes(two_nodes, tmp_path, monkeypatch):
    place = tmp_path / "it's here"
    place.mkdir()
    programs(place, monkeypatch, endings=ENDINGS)
    monkeypatch.setenv("PATH", f"{place}:{PATH}")
    monkeypatch.chdir(place)
    asked = slurm.settings({"slurm": {"nodes": 2, "python": str(place / "endings"), "time": "00:05:00", "max_parallel": 1}})
    jobs = [[f"seed={seed}"] for seed in range(4)]
    slurm.submit(place, "train", jobs, asked)
    (folder,) = place.glob("train-*")
    until(lambda: standing(folder)[3] == "running" and "train 1/4" in slurm.status(folder).jobs[2].said, 40, "job 3 does not run", folder)
    assert standing(folder) == {1: "done", 2: "failed", 3: "running", 4: "queued"}
    found = slurm.status(folder)
    assert found.asked and found.jobs[1].said == "exit code 2: twinsim: bad number", "the first task that ends tells why"
    again = slurm.submit(place, "train", jobs, dataclasses.replace(asked, submit=False))
    assert again[1].startswith("written: 1 of 4 jobs") and again[2] == "1 done, 2 in the queue"

    job = numbered(folder, 3)
    said("scancel", "--signal=TERM", job)
    until(lambda: standing(folder)[3] == "requeued" and standing(folder)[4] == "running", 30, "job 3 is not put back", folder)
    assert restarts(job) == 1
    until(lambda: slurm.status(folder).jobs[3].said == "train 2/4", 20, "job 4 says nothing", folder)
    said("scancel", numbered(folder, 4))
    start_now(job)
    until(lambda: standing(folder) == {1: "done", 2: "failed", 3: "done", 4: "stopped"}, 30, f"{standing(folder)}", folder)
    assert (folder / "3.out").read_text().count("train 1/4") == 2 and (folder / "3.done").read_text() == "went on\n"
    until(lambda: not said("squeue", "-h"), 20, "what was cancelled comes back", folder)
    assert cli.main(["status", str(folder)]) == 1


@pytest.mark.slurm
def test_a_training_that_is_asked_to_stop_goes_on_where_it_was(capsys, two_nodes, tmp_path, monkeypatch):
    """Two trainings over two nodes as one array; one of them is stopped on the way, and both come to their end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    data, path, steps = toy.write_data(tmp_path), toy.write_scenario(tmp_path), 400
    words = ["train", "-m", *toy.words(data, Path("out")), f"scenario={path}", f"train.steps=4,{steps}", f"train.save_every={steps}"]
    words += [
        "hydra/launcher=slurm",
        '++scale.slurm={nodes: 2, time: "00:10:00"}',
        f"++scale.environment={{XLA_FLAGS: '{processes.flags()}'}}",
    ]
    assert call(capsys, *words)[0] == 0
    (folder,) = (tmp_path / "out/sweeps").glob("train-*")
    assert "nothing to submit: 2 in the queue" in call(capsys, *words)[1]

    def seen() -> list[int]:
        logs = [[json.loads(line)["step"] for line in log.read_text().splitlines()] for log in tmp_path.glob("out/models/*/train.jsonl")]
        return max(logs, key=len, default=[])

    until(lambda: len(seen()) > 4 or "failed" in standing(folder).values(), 300, "no step of the long training", folder)
    job = numbered(folder, 2)
    said("scancel", "--signal=TERM", job)
    until(lambda: standing(folder)[2] == "requeued" and restarts(job) == 1, 60, f"{slurm.status(folder)}", folder)
    stopped = re.search(rf"asked to leave at step (\d+) of {steps}; the state is saved", slurm.status(folder).jobs[1].said)
    assert stopped and seen() == list(range(1, int(stopped[1]) + 1))
    start_now(job)
    assert restarts(job.replace("_2", "_1")) == 0, "the other job is left alone"
    until(lambda: standing(folder) == {1: "done", 2: "done"}, 300, f"{slurm.status(folder)}", folder)
    assert seen() == list(range(1, steps + 1)), "each step was made once"
    assert (folder / "2.out").read_text().count("model: ") == 1
    code, out, _ = call(capsys, "status")
    assert code == 0 and out.startswith("out/sweeps/") and "2 jobs: 2 done" in out
    assert "nothing to submit: 2 done" in call(capsys, *words)[1]

    alone = ["train", *toy.words(data, Path("alone")), f"scenario={path}", f"train.steps={steps}", f"train.save_every={steps}"]
    assert processes.end(processes.start(alone, devices=2))[0][0] == 0
    assert last_state(Path("out"), steps) == last_state(Path("alone"), steps), "the bits that one process with two devices gives"


def last_state(out: Path, step: int) -> str:
    (saved,) = (folder for folder in out.glob("models/*/checkpoints") if checkpoint.steps(folder)[-1] == step)
    return checkpoint.fingerprint(saved, step)


@pytest.mark.slurm
def test_draws_that_are_asked_to_stop_go_on_in_the_next_start(capsys, two_nodes, tmp_path, monkeypatch):
    """Those of an evaluation over two nodes, between whose processes nothing moves; a generation draws in the same way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["-m", *toy.words(toy.write_data(tmp_path), Path("out")), f"scenario={toy.write_scenario(tmp_path)}", "hydra/launcher=slurm"]
    words += ["generate.batch=8", "evaluate.members=40", '++scale.slurm={nodes: 2, time: "00:10:00"}']
    assert call(capsys, "evaluate", *words, f"++scale.environment={{XLA_FLAGS: '{processes.flags()}'}}")[0] == 0
    (folder,) = tmp_path.glob("out/sweeps/evaluate-*")

    def drawn() -> int:
        """Blocks in the journals."""
        return sum(len(path.read_text().splitlines()) - 1 for path in tmp_path.glob("out/models/*/*.partial/test/journal-*.jsonl"))

    until(lambda: drawn() > 4 or "failed" in standing(folder).values(), 200, "nothing is drawn", folder)
    said("scancel", "--signal=TERM", numbered(folder, 1))
    until(lambda: standing(folder)[1] == "requeued", 90, f"{slurm.status(folder)}", folder)
    assert "the same command goes on" in slurm.status(folder).jobs[0].said
    assert 4 < (before := drawn()) < 40 * 24 / 8
    start_now(numbered(folder, 1))
    seen: list[int] = []
    until(lambda: seen.append(drawn()) or standing(folder) == {1: "done"}, 200, f"{slurm.status(folder)}", folder)
    assert min(filter(None, seen)) == before and max(seen) > before, "nothing is drawn again"
    assert list(tmp_path.glob("out/models/*/evaluation-*/metrics.json"))
