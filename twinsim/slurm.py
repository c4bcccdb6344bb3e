"""A sweep on SLURM: the commands of its jobs, the array script that runs them, and how each of them stands.

All of it lies in one folder as plain text: a person can read it and run a line of it by hand, and what was done is known without SLURM.

  jobs.txt       one command a line; job N is line N
  sweep.sbatch   the array script, also sweep-1001.sbatch and so on where SLURM's arrays are shorter than the sweep
  slurm.log      what SLURM itself says of the jobs
  N.out          what job N said, over all its starts
  N.STATE        where job N stands, one of MARKERS, and what it said last
"""

import contextlib
import difflib
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from twinsim.base import BadInput

MARKERS = ("done", "queued", "running", "requeued", "stopped", "failed")  # where there are two, the first holds
STATES = ("done", "running", "queued", "requeued", "stopped", "failed", "not submitted")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}
NOWHERE = (None, "")  # a job that SLURM does not know
TAIL = 8000  # bytes at the end of an output that are looked at
# lines of an output that the job itself did not say: SLURM's, Gloo's, absl's log and its stack trace
NOISE = r"(srun|slurmstepd)[^ ]*: |\[Gloo\]|[IWEF][0-9]{4} [0-9:.]+ | *@ +0x|\*\*\* "
TIME = re.compile(r"\d+-\d{1,2}(:\d{2}){0,2}|\d+:\d{2}:\d{2}")


# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What is asked of SLURM for each job of a sweep: `scale.slurm` and `scale.environment`.

    Attributes:
      time: limit of one start, `hh:mm:ss` or `d-hh:mm:ss`; a job that is not through by then goes on in its next start.
      mem: memory per node, as SLURM writes it.
      max_parallel: jobs of one array that run at the same time.
      max_array: SLURM's MaxArraySize; a longer sweep becomes several arrays.
      grace: the job is asked to stop this long before its limit, s.
      prologue: lines of shell before the command, such as `module load`.
      run: starts the tasks; the signal to stop reaches only what `srun` has started.
      python: the interpreter in the jobs, where it is not the one that submits: in a container.
      sbatch: further options of sbatch, such as `--constraint=gpu`.
      submit: false only writes the files.
      environment: variables of each job.
    """

    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    time: str = "01:00:00"
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    mem: str | None = None
    max_parallel: int = 16
    max_array: int = 1001
    grace: int = 120
    prologue: tuple[str, ...] = ()
    run: str = "srun --kill-on-bad-exit=1"
    python: str = sys.executable
    sbatch: tuple[str, ...] = ()
    submit: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


def settings(scale: Mapping[str, Any]) -> Settings:
    """The checked settings of a scale. Raises BadInput."""
    given = scale.get("slurm") or {}
    if not isinstance(given, Mapping):
        raise BadInput(f"config scale.slurm: expected a table, got {given!r}")
    known = {each.name: each for each in fields(Settings) if each.name != "environment"}
    if unknown := sorted(set(map(str, given)) - set(known)):
        close = difflib.get_close_matches(unknown[0], known, 1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise BadInput(f"config scale.slurm.{unknown[0]}: expected one of {', '.join(known)}{hint}")
    values: dict[str, Any] = {name: _checked(name, value, known[name].default) for name, value in given.items() if value is not None}
    return Settings(**values, environment=_environment(scale.get("environment") or {}))


LEAST = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "gpus_per_node": 0, "max_parallel": 1, "max_array": 2, "grace": 1}


def _checked(name: str, value: Any, default: Any) -> Any:
    place = f"config scale.slurm.{name}"
    if value == "???":
        raise BadInput(f"{place}: expected a value, got none; give it as scale.slurm.{name}=VALUE")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise BadInput(f"{place}: expected true or false, got {value!r}")
        return value
    if name in LEAST:
        if isinstance(value, bool) or not isinstance(value, int) or value < LEAST[name]:
            raise BadInput(f"{place}: expected a whole number of at least {LEAST[name]}, got {value!r}")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple):
            raise BadInput(f"{place}: expected a list of lines, got {value!r}")
        lines = tuple(_line(f"{place}[{index}]", line) for index, line in enumerate(value))
        if name == "sbatch" and (wrong := [line for line in lines if not line.startswith("-")]):
            raise BadInput(f"{place}: expected options such as --constraint=gpu, got {wrong[0]!r}")
        return lines
    if name == "time" and not (isinstance(value, str) and TIME.fullmatch(value)):
        # YAML reads 12:00:00 as a number to the base of 60, which SLURM would take for minutes
        raise BadInput(f"{place}: expected hh:mm:ss or d-hh:mm:ss, in quotes, got {value!r}")
    text = _line(place, value)
    if not text.strip() or (name not in ("run", "python") and re.search(r"[\s'\"\\#]", text)):
        raise BadInput(f"{place}: expected {'text' if name in ('run', 'python') else 'one word'}, got {text!r}")
    return text


def _line(place: str, value: Any) -> str:
    """`value` as text of one line; a number counts as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadInput(f"{place}: expected text, got {value!r}")
    if re.search(r"[\n\r\0]", text := str(value)):
        raise BadInput(f"{place}: expected one line, got {text!r}")
    return text


def _environment(given: Any) -> dict[str, str]:
    if not isinstance(given, Mapping):
        raise BadInput(f"config scale.environment: expected a table of variables, got {given!r}")
    if wrong := [name for name in given if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII)]:
        raise BadInput(f"config scale.environment: expected names of variables, got {wrong[0]!r}")
    return {str(name): _line(f"config scale.environment.{name}", value) for name, value in given.items()}


# ---------------------------------------------------------------- the files of a sweep


def sweep_name(verb: str, jobs: Sequence[Sequence[str]]) -> str:
    """The folder's name, the same for the same work: where all jobs run on one scale, the scale does not count."""
    shared = set(jobs[0]).intersection(*jobs)
    place = {word for word in shared if re.match(r"[+~]*(scale|hydra)\b", word)}
    work = [[word for word in words if word not in place] for words in jobs]
    return f"{verb}-{hashlib.sha256(json.dumps([verb, work]).encode()).hexdigest()[:10]}"


def command(python: str, verb: str, words: Sequence[str]) -> str:
    """One job as a line for a shell. Raises BadInput."""
    return _line("sweep: a job", shlex.join([python, "-m", "twinsim", verb, *words]))


def script(folder: Path, numbers: Sequence[int], asked: Settings, directory: Path, before: int = 0) -> str:
    """The array script for the jobs `numbers` of the sweep in `folder`, run in `directory`; job N is task N - `before`."""
    options = {
        "job-name": folder.name,
        "array": f"{_spans([number - before for number in numbers])}%{asked.max_parallel}",
        "chdir": _quoted(directory),
        "output": _quoted(folder / "slurm.log").replace("%", "%%"),
        "open-mode": "append",
        "nodes": asked.nodes,
        "ntasks-per-node": asked.tasks_per_node,
        "cpus-per-task": asked.cpus_per_task,
        "gpus-per-node": asked.gpus_per_node or None,
        "mem": asked.mem,
        "time": asked.time,
        "signal": f"TERM@{asked.grace}",
        "account": asked.account,
        "partition": asked.partition,
        "qos": asked.qos,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {line}" for line in asked.sbatch)]
    exports = [f"export {name}={shlex.quote(value)}" for name, value in asked.environment.items()]
    place = [f"folder={shlex.quote(str(folder))}", f"number=$((SLURM_ARRAY_TASK_ID + {before}))"]
    body = [START, *exports, *asked.prologue, f"run={shlex.quote(asked.run)}", END.replace("NOISE", NOISE)]
    return "\n".join(["#!/bin/bash", *lines, "", *place, *body])


START = r"""
trap : TERM # meant for the job, not for this script, which waits for what the job says
exec >>"$folder/$number.out" 2>&1
begun=$(stat -c %s "$folder/$number.out")
said() { tail -c "+$((begun + 1))" "$folder/$number.out" | tail -c 100000; } # in this start
mark() { # STATE TEXT
    rm -f "$folder/$number".{queued,running,requeued,stopped,failed}
    printf '%s\n' "$2" >"$folder/$number.$1"
}
trap 'code=$?; [ ! -e "$folder/$number.running" ] || mark failed "exit code $code before the command: $(said | tail -n 1)"' EXIT
mark running "SLURM job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID on $(hostname -s), start $((${SLURM_RESTART_COUNT:-0} + 1))"
"""

END = r"""
code=0
eval "$run $(sed -n "${number}p" "$folder/jobs.txt")" || code=$?
set +euo pipefail # where the prologue has set them

# of several tasks the first that ended tells why: srun ends the others, and they say that they were asked to stop
why=$(said | sed -nE 's/^srun: error: [^ ]+: tasks? [^ ]+: //p' | head -n 1)
why=${why:-Exited with exit code $code}
last=$(said | grep -avE '^(NOISE|\s*$)' | tail -n 1)
last=${last:-$(said | tail -n 1)}
if [ "$code" -eq 0 ]; then
    mark done "$last"
    exit 0
fi
case $why in
"Exited with exit code 75" | "Exited with exit code 143" | Terminated*)
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # SLURM_JOB_ID may be that of the whole array
    # COMPLETING, but not for its limit: somebody has cancelled the job, and means it
    case $(squeue -h -j "$task" -o '%T %r') in
    RUNNING* | *TimeLimit*) mark requeued "$last" && scontrol requeue "$task" ;;
    *) mark stopped "$last" ;;
    esac
    exit 75
    ;;
esac
mark failed "${why#Exited with }: $last"
exit "$code"
"""


def _quoted(path: Path) -> str:
    """A path as an option of sbatch."""
    return '"' + re.sub(r'(["\\])', r"\\\1", _line("sweep: its folder", str(path))) + '"'


def _spans(numbers: Sequence[int]) -> str:
    """`[1, 2, 3, 5]` -> `1-3,5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)


# ---------------------------------------------------------------- submit


def submit(sweeps: Path, verb: str, jobs: Sequence[Sequence[str]], asked: Settings) -> list[str]:
    """Writes the files of a sweep and submits what is neither done nor in the queue. Returns what to tell. Raises BadInput."""
    folder = (sweeps / sweep_name(verb, jobs)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [command(asked.python, verb, words) for words in jobs]
    queue = _queue(folder, must_answer=asked.submit) or {}
    markers = _markers(folder)  # after the queue: a job that ends in between has left its marker
    states = [_state(markers.get(number), queue.get(number, NOWHERE)[0], known=True) for number in range(1, len(lines) + 1)]
    queued = [number for number, state in enumerate(states, 1) if state in ("running", "queued", "requeued")]
    todo = [number for number, state in enumerate(states, 1) if state != "done" and number not in queued]
    if queued:  # their array asked for the nodes that their command expects
        before = (folder / "jobs.txt").read_text().splitlines()
        lines = [before[index] if index + 1 in queued else line for index, line in enumerate(lines)]
    _write(folder / "jobs.txt", "".join(f"{line}\n" for line in lines))
    told = [f"sweep: {folder}"]
    left = [f"{count} {what}" for count, what in ((states.count("done"), "done"), (len(queued), "in the queue")) if count]
    for file, numbers in _write_scripts(folder, todo, asked):
        if asked.submit:
            told.append(f"submitted {len(numbers)} of {len(lines)} jobs as {_sbatch(folder, file, numbers)}")
        else:
            told.append(f"written: {len(numbers)} of {len(lines)} jobs, to be submitted with\n  {shlex.join(['sbatch', str(file)])}")
    if left:
        told.append(f"{'' if todo else 'nothing to submit: '}{', '.join(left)}")
    return [*told, f"how they stand: twinsim status {shlex.quote(str(folder))}"]


def _write_scripts(folder: Path, todo: Sequence[int], asked: Settings) -> list[tuple[Path, list[int]]]:
    """The array scripts for the jobs `todo`, each with the numbers of its jobs."""
    longest, made = asked.max_array - 1, []  # SLURM's largest index is one less
    for old in folder.glob("sweep*.sbatch") if todo else ():
        old.unlink()
    for before in range(0, max(todo, default=0), longest):
        if numbers := [number for number in todo if before < number <= before + longest]:
            file = folder / (f"sweep-{before + 1}.sbatch" if before else "sweep.sbatch")
            _write(file, script(folder, numbers, asked, Path.cwd(), before))
            made.append((file, numbers))
    return made


def _sbatch(folder: Path, file: Path, numbers: Sequence[int]) -> str:
    """Submits a script and returns the number that SLURM gave it. Raises BadInput."""
    marks = [folder / f"{number}.queued" for number in numbers]
    for mark in marks:  # before SLURM knows: a job that begins takes its mark away
        mark.write_text("")
    try:
        return _call("sbatch", "--parsable", str(file)).partition(";")[0]
    except BadInput:
        for mark in marks:
            mark.unlink(missing_ok=True)
        raise


def _call(*words: str) -> str:
    """What a command of SLURM says. Raises BadInput where there is none or it refuses."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise BadInput(f"{words[0]}: not found, expected SLURM on this machine; scale.slurm.submit=false only writes the sweep") from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"{words[0]}: expected an answer of SLURM within 120 s, got none") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise BadInput(f"{shlex.join(words)}: refused by SLURM: {said}")
    return done.stdout.strip()


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


# ---------------------------------------------------------------- status


@dataclass(frozen=True)
class Job:
    """How job `number` stands: one of STATES, the words that tell it from the others, and what it said last or why it waits."""

    number: int
    state: str
    words: str
    said: str


@dataclass(frozen=True)
class Status:
    """How a sweep stands; `asked` is false where there was no SLURM to ask, and the files alone tell."""

    folder: Path
    verb: str
    asked: bool
    jobs: Sequence[Job]

    @property
    def counts(self) -> dict[str, int]:
        counted = Counter(job.state for job in self.jobs)
        return {state: counted[state] for state in STATES if counted[state]}


def find(folder: Path) -> list[Path]:
    """The sweeps in `folder`, which may be one itself; the newest last."""
    files = [folder / "jobs.txt"] if (folder / "jobs.txt").is_file() else folder.glob("*/jobs.txt")
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime)]


def status(folder: Path) -> Status:
    """How each job of the sweep in `folder` stands. Raises BadInput where its list of jobs is damaged."""
    try:
        commands = [shlex.split(line)[3:] for line in (folder / "jobs.txt").read_text().splitlines()]  # without PYTHON -m twinsim
    except ValueError:
        commands = []
    if not commands or not all(commands):
        raise BadInput(f"{folder / 'jobs.txt'}: damaged, expected a command a line; the command of the sweep writes it again")
    queue = _queue(folder.resolve())
    markers = _markers(folder)
    shared = set(commands[0]).intersection(*commands)
    jobs = []
    for number, words in enumerate(commands, 1):
        marker = markers.get(number)
        queued, reason = (queue or {}).get(number, NOWHERE)
        state = _state(marker, queued, known=queue is not None)
        own = [word for word in words[1:] if word not in shared or len(commands) == 1]
        jobs.append(Job(number, state, " ".join(own), _said(folder, number, marker, state) or (state == "queued" and reason) or ""))
    return Status(folder, commands[0][0], queue is not None, jobs)


def lines(found: Status) -> list[str]:
    """A summary and a line a job, to read."""
    counts = ", ".join(f"{count} {state}" for state, count in found.counts.items())
    alone = "" if found.asked else " (no SLURM here: as its files tell)"
    wide = max(len(job.words) for job in found.jobs)
    rows = [f"  {job.number:>4}  {job.state:<13}  {job.words:<{min(wide, 60)}}  {job.said}".rstrip() for job in found.jobs]
    jobs = "1 job" if len(found.jobs) == 1 else f"{len(found.jobs)} jobs"
    return [f"{found.folder}: {jobs}: {counts}{alone}", *rows]


def table(found: Status) -> dict[str, Any]:
    """The same for a program."""
    return {
        "folder": str(found.folder),
        "verb": found.verb,
        "asked_slurm": found.asked,
        "counts": found.counts,
        "jobs": [vars(job) for job in found.jobs],
    }


def _state(marker: str | None, queued: str | None, known: bool) -> str:
    """One of STATES, from the marker that the job left and its state in SLURM's queue, where that is `known`."""
    if marker == "done":
        return "done"
    if queued == "PENDING":
        return "requeued" if marker in ("running", "requeued", "stopped") else "queued"
    if queued is not None:
        return marker if marker in ("requeued", "failed") else "running"
    if marker is None:
        return "not submitted"
    if not known:
        return marker
    return {"queued": "failed", "running": "failed", "requeued": "stopped"}.get(marker, marker)


def _said(folder: Path, number: int, marker: str | None, state: str) -> str:
    if state == "failed" and marker == "queued":
        return "left the queue before it began"
    if state == "failed" and marker == "running":
        return f"killed; its last line: {_last_line(folder / f'{number}.out')}"
    if state == "running":
        return _last_line(folder / f"{number}.out")
    if state in ("failed", "stopped", "requeued"):
        with contextlib.suppress(FileNotFoundError):  # of a job that begins again at this moment
            return (folder / f"{number}.{marker}").read_text(errors="replace").strip()
    return ""


def _last_line(path: Path) -> str:
    """The last line of an output that the job itself said."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        found = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(found) if line and not re.match(NOISE, line)), "")


def _markers(folder: Path) -> dict[int, str]:
    """Job -> its marker."""
    found: dict[int, str] = {}
    for marker in reversed(MARKERS):
        found |= {int(file.stem): marker for file in folder.glob(f"*.{marker}") if file.stem.isdecimal()}
    return found


def _queue(folder: Path, must_answer: bool = False) -> dict[int, tuple[str, str]] | None:
    """Job -> its state in SLURM's queue, and why it waits there; None where there is no SLURM.

    Raises BadInput where it is there and must answer, but does not.
    """
    if shutil.which("squeue") is None:
        return None
    try:
        answer = _call("squeue", "--noheader", "--array", "--states=all", f"--name={folder.name}", "--format=%K|%T|%r|%o")
    except BadInput:
        if must_answer:
            raise
        return None
    found = {}
    for line in answer.splitlines():
        task, state, reason, path = line.split("|", 3)
        if Path(path).parent == folder and task.isdecimal() and state not in ENDED:
            first = re.fullmatch(r"sweep-(\d+)", Path(path).stem)
            found[int(task) + (int(first[1]) - 1 if first else 0)] = state, f"waits: {reason}"
    return found
