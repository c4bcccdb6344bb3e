"""The command `twinsim`: reads its verb and overrides, runs them, and answers every mistake with one sentence.

Heavy imports wait until a verb needs them, so that `--help` is immediate.
"""

import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

VERBS = {
    "run": "the whole chain: data, train, evaluate, generate, check, report, record",
    "data": "open or simulate the truth, fit statistics, write training examples",
    "train": "train the generator, or go on with it",
    "generate": "the same as run, for a scenario on a trained model",
    "evaluate": "score the model and its baselines on held-out truth",
    "calibrate": "fit what a domain leaves open to observations: a city's trips to traffic counts, a contact to recorded tosses",
    "optimise": "find what serves an aim best: a city's tolls and signals, an arm's lengths, gains and gears",
    "report": "print where the report of a run lies, making the run first if need be",
    "verify": "prove that a run's folder is unchanged",
    "reproduce": "run again what a folder records and compare every value",
    "plan": "say what training will need: memory, time, energy, storage; trains and writes nothing",
    "status": "how the jobs of a sweep on SLURM stand: done, running, queued, failed",
    "doctor": "look at this machine and installation",
}
EXIT = """exit codes: 0 done | 1 verify or reproduce found a difference, doctor a fault, status a failed job | 2 bad input or full disk
            3 a number is not finite | 75 asked to stop, state saved, the same command goes on | 130 interrupted"""
HELP = f"""twinsim: learn how a real system behaves, generate scenarios of it, check each by its physics, score them on held-out truth

usage: twinsim VERB [SCENARIO] [NAME=VALUE ...] [-m]

{chr(10).join(f"  {verb:<10} {text}" for verb, text in VERBS.items())}

examples:
  twinsim run                                            the default: a winter in a world two degrees warmer
  twinsim run climate/heatwave set.members=50            a scenario by name, one of its fields changed
  twinsim run my/question.yaml                           a scenario of your own
  twinsim train domain=climate/downscale seed=1          a model; the same command goes on where it was stopped
  twinsim evaluate domain=climate/downscale -m seed=0,1,2   a sweep
  twinsim calibrate city network=NET counts=FILE out=FOLDER   trips that agree with traffic counts; or a YAML file with these words
  twinsim optimise city aim.CO2=1 out=FOLDER             tolls or signals that cost least time and CO2; network= and demand= for another
  twinsim calibrate tosses tosses=FILE out=FOLDER        friction and stiffness of a contact from recorded tosses
  twinsim optimise robotics task=arm_reach out=FOLDER    arms that reach sooner with less work: a Pareto front
  twinsim plan domain=climate/downscale scale=lumi scale.slurm.nodes=8   what that training will need there; --json
  twinsim status                                         how the sweeps that SLURM runs stand
  twinsim verify out/runs/warm-winter-1a2b3c4d5e         is anything changed, missing or added?
  twinsim reproduce out/runs/warm-winter-1a2b3c4d5e

NAME=VALUE sets any value of the configuration (see conf/), set.NAME=VALUE a field of the scenario.
`twinsim VERB --cfg` prints the resolved configuration and stops. `twinsim run --scenarios` lists the scenarios.

{EXIT}
"""
SHORT = 0.05  # seconds; a shorter stage goes without a line
STOPPED = (75, 130)  # exit codes after which a sweep does not begin its next job
PLAIN_EVERY = 10.0  # seconds between lines of progress where there is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        code = _main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has heard enough, such as `| head`; nor may Python say more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if words[0] in ("-V", "--version"):
        from twinsim import __version__

        print(f"twinsim {__version__}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        return _fail(f"unknown verb {verb!r}{_near(verb, VERBS)}; `twinsim --help` lists them")
    if any(word in ("-h", "--help") for word in rest):
        print(HELP)
        return 0
    try:
        with _sentences() as outcome:
            outcome.code = _dispatch(verb, rest)
    except Exception:
        if not (mesh := _joined()):
            raise
        traceback.print_exc()
        mesh.leave(1)
    if outcome.code and (mesh := _joined()):
        mesh.leave(outcome.code)
    return outcome.code


def _joined() -> Any:
    """The module `twinsim.mesh` where this process has joined others, else None."""
    if "jax" not in sys.modules:
        return None
    from twinsim import mesh

    return mesh if mesh.processes() > 1 else None


def _dispatch(verb: str, words: list[str]) -> int:
    if verb == "verify":
        return _verify(_folder(verb, words))
    if verb == "doctor":
        return _doctor("--json" in words)
    if verb == "status":
        return _status(words)
    _prepare_process()
    if verb == "reproduce":
        return _reproduce(words)
    if verb == "plan":
        return _plan(words)
    if verb in ("calibrate", "optimise"):
        return _fit(verb, words)
    if "--scenarios" in words:
        from twinsim import scenario

        print("\n".join(scenario.names()))
        return 0
    sweep = [word for word in words if word in ("-m", "--multirun")]
    words = [word for word in words if word not in sweep]
    show = "--cfg" in words
    words = [word for word in words if word != "--cfg"]
    overrides = _overrides(words)
    if sweep:
        return _sweep(verb, overrides, show)
    return _one(verb, _compose(overrides), show, words)


# ---------------------------------------------------------------- verbs


def _one(verb: str, composed: Any, show: bool, words: Sequence[str]) -> int:
    """Runs a verb on the configuration that was composed of `words`."""
    from twinsim import mesh, run, scale

    config = run.resolve(composed)
    if show:
        _show(config)
        return 0
    mesh.start_distributed(**vars(scale.read(config["scale"]).start))
    with _asked_to_stop():
        return _act(verb, config, shlex.join(["twinsim", verb, *words]))


def _show(config: Mapping[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(dict(config), sort_keys=False), end="")


def _act(verb: str, config: dict[str, Any], command: str) -> int:
    from twinsim import mesh, run

    say = print if mesh.is_first() else lambda line: None
    if verb == "data":
        run.data(config, progress)
        say(f"data: {run.places(config).data}")
    elif verb == "train":
        run.training(config, progress)
        say(f"model: {run.places(config).model}")
    elif verb == "evaluate":
        evaluation = run.evaluate(config, progress)
        from twinsim import report

        say(report.text_scorecard(evaluation.scores))
        say(f"evaluation: {run.places(config).evaluation}")
    else:
        folder = run.deliver(config, progress, command)
        say(f"run:    {folder}\nreport: {folder / 'report.html'}\ndata:   {folder / 'samples.zarr'}")
    return 0


def _verify(folder: Path) -> int:
    from twinsim import record

    findings = record.verify(folder)
    for finding in findings:
        print(finding)
    print(record.proof(findings))
    return 1 if findings else 0


def _reproduce(words: list[str]) -> int:
    from twinsim import run
    from twinsim.base import BadInput

    options = [word for word in words if word.startswith("tolerance=")]
    try:
        tolerance = float(options[-1].partition("=")[2]) if options else 0.0
    except ValueError:
        tolerance = -1.0
    if not 0 <= tolerance < float("inf"):
        raise BadInput(f"reproduce: {options[-1]}: expected a number from 0, in the units of each variable")
    folder = _folder("reproduce", [word for word in words if word not in options])
    with _asked_to_stop():
        differences = run.reproduce(folder, progress, tolerance)
    same = f"reproduced: every value of {folder} is the same" + (f" to {tolerance:g}" if tolerance else ", bit by bit")
    print("\n".join(differences) if differences else same)
    return 1 if differences else 0


def _plan(words: list[str]) -> int:
    from omegaconf import OmegaConf

    from twinsim import plan, run

    composed = _compose(_overrides([word for word in words if word != "--json"], "--json"))
    slurm = composed.scale.get("slurm")
    for name in ("account", "partition"):  # who pays and which queue change nothing of what is needed
        if slurm is not None and OmegaConf.is_missing(slurm, name):
            slurm[name] = None
    found = plan.plan(run.resolve(composed), progress)
    print(plan.as_json(found) if "--json" in words else "\n".join(plan.lines(found)))
    return _fail(found.misfit) if found.misfit else 0


def _fit(verb: str, words: list[str]) -> int:
    """`city NAME=VALUE ...`, a name of conf/VERB, or a YAML file that says `VERB: city` and the values."""
    from twinsim import run, scenario
    from twinsim.base import BadInput

    named = [word for word in words if "=" not in word and word != "--cfg"]
    if len(named) != 1:
        choices = ", ".join(_choices(verb))
        raise BadInput(f"{verb}: expected one of {choices}, or a YAML file, then NAME=VALUE; got {' and '.join(named) or 'no name'}")
    given: dict[str, Any] = {}
    name = named[0]
    if name.endswith((".yaml", ".yml")):
        given, _ = scenario.parse(scenario.read(Path(name)), name)
        name = given.pop(verb, "")
        given = run.beside(given, Path(named[0]))
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_/]+", name):
        raise BadInput(f"{named[0]}: {verb}: expected one of {', '.join(_choices(verb))}, got {name!r}")
    options = [word for word in words if word not in (named[0], "--cfg")]
    config, out = run.fitting(verb, _compose([f"+{verb}={name}"])[verb], given, options)
    if "--cfg" in words:
        _show(config)
        return 0
    folder = Path(out or f"out/{run.FITS[verb]}s/{name.replace('/', '-')}")
    asked = [named[0], *(word for word in options if not word.startswith("out="))]
    with _asked_to_stop():
        lines = run.fit(verb, asked, config, folder, progress)
    print("\n".join([*lines, f"{run.FITS[verb]}: {folder}"]))
    return 0


def _doctor(as_json: bool) -> int:
    import json

    from twinsim import doctor

    found = doctor.checks()
    print(json.dumps([check._asdict() for check in found], indent=1) if as_json else "\n".join(doctor.lines(found)))
    return 0 if all(check.ok for check in found) else 1


def _status(words: list[str]) -> int:
    import json

    from twinsim import slurm
    from twinsim.base import BadInput

    folders = [word for word in words if word != "--json"]
    where = _folder("status", folders, "sweep") if folders else Path("out/sweeps")
    sweeps = [slurm.status(folder) for folder in slurm.find(where)]
    if folders and not sweeps:
        raise BadInput(f"status: {where}: expected the folder of a sweep, with jobs.txt, or one of several, found none")
    if "--json" in words:
        print(json.dumps([slurm.table(sweep) for sweep in sweeps], indent=1))
    else:
        print("\n".join(line for sweep in sweeps for line in slurm.lines(sweep)) or f"no sweep in {where}")
    return 1 if any("failed" in sweep.counts for sweep in sweeps) else 0


def _folder(verb: str, words: list[str], kind: str = "run") -> Path:
    from twinsim.base import BadInput

    if len(words) != 1:
        raise BadInput(f"{verb}: expected the folder of one {kind}, got {' '.join(words) or 'nothing'}")
    if not Path(words[0]).is_dir():
        raise BadInput(f"{verb}: {words[0]}: expected the folder of a {kind}, found no folder there")
    return Path(words[0])


# ---------------------------------------------------------------- configuration


def configuration(*words: str) -> dict[str, Any]:
    """The resolved configuration that a command line of these words, without its verb, has: for scripts. Raises BadInput."""
    from twinsim import run

    return run.resolve(_compose(_overrides(list(words))))


def _overrides(words: list[str], options: str = "-m, --cfg, --scenarios") -> list[str]:
    """Words of the command line as Hydra overrides; a word without `=` is a scenario, and brings its domain."""
    from twinsim import scenario
    from twinsim.base import BadInput

    named = [word for word in words if "=" not in word and not word.startswith(("-", "~"))]
    if unknown := [word for word in words if word.startswith("-")]:
        raise BadInput(f"unknown option {unknown[0]}; options are {options}, --help")
    if len(named) > 1:
        raise BadInput(f"expected one scenario, got {' and '.join(named)}")
    overrides = [f"+{word}" if word.startswith("set.") else word for word in words if word not in named]
    overrides += [f"scenario='{named[0]}'"] if named else []
    asked = next((word.partition("=")[2].strip("'\"") for word in reversed(overrides) if word.startswith("scenario=")), None)
    if asked and "," not in asked and not any(word.startswith("domain=") for word in overrides):
        path = scenario.find(asked)
        data, _ = scenario.parse(scenario.read(path), str(path))
        domain = data.get("domain")
        if not isinstance(domain, str) or not re.fullmatch(r"[a-z0-9_/]+", domain):
            raise BadInput(f"{path}: domain: expected the name of a domain such as climate/generate, got {domain!r}")
        overrides.append(f"domain={domain}")
    return overrides


def _compose(overrides: list[str]) -> Any:
    """The configuration with its overrides applied. Raises BadInput with the nearest known name."""
    from hydra import compose, initialize_config_module
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_module("conf", version_base="1.3"):
        try:
            return compose("twinsim", overrides=overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(error, overrides) from None


def _explained(error: Exception, overrides: list[str]) -> Exception:
    """A Hydra error as one sentence."""
    from hydra import compose
    from omegaconf import OmegaConf

    from twinsim.base import BadInput

    first = str(error).strip().splitlines()[0]
    cause = str(error.__cause__ or error).strip().splitlines()[0]
    if found := re.search(r"Could not override '([^']+)'", first):
        name = found[1]
        known = _paths(OmegaConf.to_container(compose("twinsim"), resolve=False))
        return BadInput(f"config: no value is called {name}{_near(name, known)}")
    if found := re.search(r"Could not find '([^']+)'", first):
        group, _, wanted = found[1].partition("/")
        choices = _choices(group)
        return BadInput(f"config: no {group} is called {wanted}{_near(wanted, choices)}; there are {', '.join(choices) or 'none'}")
    if found := re.search(r"Could not override '([^']+)'.*No match in the defaults list", " ".join(str(error).split())):
        return BadInput(f"config: no group is called {found[1]}")
    return BadInput(f"config: {first}{'' if cause in first else '; ' + cause}")


def _choices(group: str) -> list[str]:
    """The names in a group of the configuration, such as "climate/generate" in "domain"."""
    import importlib.resources

    with importlib.resources.as_file(importlib.resources.files("conf")) as root:
        return sorted(path.relative_to(root / group).with_suffix("").as_posix() for path in (root / group).rglob("*.yaml"))


def _paths(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [prefix]
    return [prefix] * bool(prefix) + [
        path for key, value in node.items() for path in _paths(value, f"{prefix}.{key}" if prefix else str(key))
    ]


def _sweep(verb: str, overrides: list[str], show: bool) -> int:
    """Hydra's own sweep: every combination of comma-separated values, one after the other or by a launcher.

    A job that fails does not keep the others from running; one that was asked to stop does.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from twinsim import run

    jobs = [run.resolve(_compose(each)) for each in _jobs(overrides)]  # a wrong or missing value is answered before the first job begins
    if show:
        for config in jobs:
            print("---")
            _show(config)
        return 0
    codes: list[int] = []

    def job(config: Any) -> int:
        with _sentences() as outcome:
            words = [word.removeprefix("+") if word.startswith("+set.") else word for word in HydraConfig.get().overrides.task]
            outcome.code = _one(verb, config, False, words)
        codes.append(outcome.code)
        if outcome.code in STOPPED:
            raise SystemExit(outcome.code)
        return outcome.code

    before, told = sys.argv, os.environ.get("HYDRA_FULL_ERROR", "")
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.output_subdir=null", "hydra.sweep.dir=${out}/sweeps"]
    sys.argv = ["twinsim", "-m", *overrides, f"hydra.job.name={verb}", *quiet]  # a launcher of commands needs the verb
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a launcher's mistake comes out as it is, to be told in one sentence
    try:
        hydra.main(version_base="1.3", config_path="pkg://conf", config_name="twinsim")(job)()
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else 1
    finally:
        sys.argv = before
        os.environ["HYDRA_FULL_ERROR"] = told
    return max(codes, default=0)


def _jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of a sweep. Raises BadInput."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from twinsim.base import BadInput

    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]
    except HydraException as error:
        raise BadInput(f"sweep: {str(error).strip().splitlines()[0]}") from None


# ---------------------------------------------------------------- process, progress, mistakes


def _prepare_process() -> None:
    """Settings that have to stand before JAX starts."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "twinsim" / "jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _keep_memory()


def _keep_memory() -> None:
    """Tells glibc to keep freed memory: XLA frees and takes hundreds of MB a step, a fifth of its time on a CPU is page faults."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        libc = ctypes.CDLL("libc.so.6")
        trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # <malloc.h>
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**28), (arena_max, 1)):
            libc.mallopt(option, value)


@contextlib.contextmanager
def progress(stage: str) -> Iterator[Any]:
    """Shows a stage while it lasts: a bar with its ETA on a terminal, a line now and then elsewhere, both on stderr.

    Of several processes, the first shows it.
    """
    if (mesh := _joined()) and not mesh.is_first():
        yield lambda done, total, *note: None
        return
    began = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<18}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total} {task.fields[note]}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(stage, total=None, note="")

            def show(done: int, total: int, *note: Any) -> None:
                bar.update(task, completed=done, total=total, note=_note(note))

            yield show
            bar.update(task, completed=bar.tasks[0].total or 1, total=bar.tasks[0].total or 1)
        return
    last = [began]

    def line(done: int, total: int, *note: Any) -> None:
        now = time.perf_counter()
        if now - last[0] >= PLAIN_EVERY and done:
            last[0] = now
            left = (now - began) / done * (total - done)
            told = f"{done}/{total}  {_note(note):<14} {now - began:6.1f} s, about {left:.0f} s left"
            print(f"{stage:<18} {told}", file=sys.stderr, flush=True)

    yield line
    if (passed := time.perf_counter() - began) >= SHORT:
        print(f"{stage:<18} done in {passed:.1f} s", file=sys.stderr, flush=True)


def _note(note: Sequence[Any]) -> str:
    if len(note) == 2:  # of a training
        return f"loss {note[0]:.4f}, {note[1]:.0f} examples/s"
    return " ".join(map(str, note))


class _Outcome:
    code = 0


@contextlib.contextmanager
def _sentences() -> Iterator[_Outcome]:
    """Turns the errors that a user can mend into one sentence on stderr and an exit code."""
    outcome = _Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        outcome.code = 130
        print("interrupted; the same command goes on from the last whole state", file=sys.stderr)
    except Exception as error:
        outcome.code = _code(error)
        if not outcome.code:
            raise
        mesh = _joined()
        if not (mesh and hasattr(error, "exit_code")) or mesh.is_first():  # all processes have such an error together
            _fail(" ".join(str(error).split()) or type(error).__name__)


def _code(error: Exception) -> int:
    """The exit code of an error; 0 for one that is ours to mend and deserves its traceback."""
    from twinsim.base import BadInput

    if isinstance(code := getattr(error, "exit_code", None), int):
        return code
    if isinstance(error, FloatingPointError):
        return 3
    if isinstance(error, BadInput | ModuleNotFoundError | MemoryError):
        return 2
    from twinsim import files

    return 2 if files.unusable(error) else 0


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[None]:
    """Leaves with exit code 75 on SIGTERM, also between the loops that listen to it themselves."""
    from twinsim.mesh import Preempted

    def leave(*_: Any) -> None:
        raise Preempted("asked to stop; the same command goes on from the last whole state")

    if _joined():  # JAX listens already, and lets all processes leave at the same step
        yield
        return
    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # only the main thread may listen to signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(sentence: str) -> int:
    print(f"twinsim: {sentence}", file=sys.stderr)
    return 2


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f", did you mean {close[0]}?" if close else ""
