"""Measures the climate twin against its baselines and its targets: `make bench-climate`.

Every task is trained and judged for each seed by the command a user would type, `twinsim evaluate domain=climate/TASK`, on a fixed
split; what is there already is found again. "cost" sets a generated global state against simulating the next independent one,
by turns. Prints one table a task, writes `benchmarks/results/climate.json` and, with --readme (`make bench-climate ARGS=--readme`),
the tables between the marker lines of README.md. Tasks whose data or simulator are absent are skipped, and said to be.

  python benchmarks/climate.py [--archive FOLDER] [--tasks racmo,ncep] [--seeds 0,1,2] [--out out/bench] [--readme]
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _results import ROOT, keep, read, write_readme, yes

MODEL = "twinsim"


@dataclass(frozen=True)
class Target:
    """A figure to reach: the mean over seeds lies in [low, high]. `beat` names a baseline whose score is the upper end."""

    score: str
    low: float = -np.inf
    high: float = np.inf
    beat: str = ""


TASKS = {
    "racmo": [
        Target("tas: CRPS", high=0.165),
        Target("tas: spread-skill ratio", 0.95, 1.05),
        Target("tas: log-spectral distance", high=0.3),
        Target("tas: coarse RMSE", high=0.01),
        Target("pr: CRPS", high=0.37),
        Target("pr: spread-skill ratio", 0.95, 1.05),
        Target("pr: log-spectral distance", high=1.0),
        Target("pr: coarse RMSE", high=0.01),
        Target("pr: 99.9 % quantile ratio", 0.95, 1.05),
        Target("pr: wet fraction ratio", 0.97, 1.03),
    ],
    "mrms": [
        Target("rain_rate: CRPS", high=0.31),
        Target("rain_rate: log-spectral distance", high=1.5),
        Target("rain_rate: 99.9 % quantile ratio", 0.9, 1.1),
    ],
    "ncep": [
        Target("psl: sliced Wasserstein", high=0.105),
        Target("psl: 1 % quantile error / sd", beat="PCA-Gaussian"),
        Target("psl: 99 % quantile error / sd", beat="PCA-Gaussian"),
        Target("membership-inference AUC"),  # its interval has to contain 0.5
    ],
    "speedy": [
        Target("geostrophic residual", high=0.25),
        Target("correlation with the geostrophic wind", low=0.97),
        Target("deviation of global mean pressure", high=0.1),
        Target("rule kept: pr below 0 mm day-1", low=1.0),
        Target("rule kept: hus850 below 0 1", low=1.0),
    ],
    "generate": [
        Target("tas: change of the mean, ratio", 0.8, 1.2),
        Target("hus850: change of the mean, ratio", 0.8, 1.2),
        Target("pr: change of the mean, ratio", 0.8, 1.2),
        Target("tas: pattern error of the change", beat="days of the season, shifted uniformly"),
        Target("hus850: pattern error of the change", beat="days of the season, shifted uniformly"),
        Target("pr: pattern error of the change", beat="days of the season, shifted uniformly"),
    ],
}
SHIPPED = {"generate"}  # tasks whose data come with twinsim
COST = "cost"
FEWEST_TIMES_CHEAPER, DEAREST_STATE = 50.0, 0.3  # to reach; CPU s a state
INDEPENDENT_DAYS = 10  # days of simulation from one state to the next that has forgotten it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, default=ROOT.parent / "shared" / "data" / "climate", help="folder of the benchmark files")
    parser.add_argument("--tasks", default=",".join([*TASKS, COST]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    tasks, seeds = given.tasks.split(","), [int(seed) for seed in given.seeds.split(",")]
    out = given.out.absolute()  # the commands run in the root of the checkout
    if unknown := set(tasks) - {*TASKS, COST}:
        parser.error(f"--tasks: expected some of {', '.join([*TASKS, COST])}, got {', '.join(sorted(unknown))}")
    for task in tasks:
        if task == COST and importlib.util.find_spec("jcm") is None:
            print("cost: skipped, there is no simulator to compare with: pip install 'twinsim[climate]'", flush=True)
            continue
        if task not in SHIPPED | {COST} and not given.archive.is_dir():
            print(f"{task}: skipped, there is no folder {given.archive}", flush=True)
            continue
        measured = cost(out) if task == COST else run(task, seeds, given.archive, out)
        print("\n".join(table(task, measured)), flush=True)
        keep("climate", task, measured)
    if given.readme:
        write_readme("results", [*(line for task, measured in read("climate").items() for line in table(task, measured)), ""])
    return 0


def run(task: str, seeds: list[int], archive: Path, out: Path) -> dict:
    """Scores of every generator by seed, and the CPU seconds of training, None where it was not measured from its beginning."""
    scores, cpu = [], []
    for seed in seeds:
        words = [f"domain=climate/{task}", f"seed={seed}", f"out={out}"] + ([] if task in SHIPPED else [f"archive={archive}"])
        cpu.append(train(words))
        folder = Path(_twinsim("evaluate", words).rsplit("evaluation: ", 1)[1].strip())
        scores.append(json.loads((folder / "metrics.json").read_text())["scores"])
    return {"seeds": seeds, "training_cpu_s": cpu, "scores": scores}


def train(words: list[str]) -> float | None:
    """Trains a model, or goes on with it, or finds it trained; returns the CPU seconds of all its training, None if not all were measured.

    The seconds are kept beside the model, those of an interrupted training too; finding a model trained adds none. The record is away
    while the training goes on, so that where this process is killed, what it did not measure is not taken for nothing.
    """
    from twinsim import checkpoint, cli
    from twinsim.run import places, resolve

    model = places(resolve(cli._compose(words))).model
    kept, saved = model / "training-cpu-s.json", model / "checkpoints"
    begun = checkpoint.steps(saved)[-1:]
    total = 0.0 if not begun else json.loads(kept.read_text()) if kept.exists() else None
    kept.unlink(missing_ok=True)
    spent = _spent()
    try:
        _twinsim("train", words)
    finally:
        reached = checkpoint.steps(saved)[-1:]
        if total is not None and reached:
            total += _spent() - spent if reached != begun else 0.0
            kept.write_text(json.dumps(total))
    return total


def cost(out: Path, blocks: int = 4, states: int = 512) -> dict:
    """CPU seconds of one generated daily state and of one simulated day, at T31, by turns on this machine; the median of each."""
    from domains.climate import speedy
    from twinsim import cli, run

    config = run.resolve(cli._compose(["domain=climate/generate", f"out={out}"]))
    trained = run.training(config, cli.progress)
    question, _ = trained.domain.exam(members=8, most=states // 8)
    simulated: list[float] = []
    drawn: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()

        def turn(*_: int) -> None:
            """After each block of days: takes its time, and draws once."""
            nonlocal begun
            simulated.append(time.process_time() - begun)
            begun = time.process_time()
            place = Path(folder) / f"drawn{len(drawn)}"
            run.draw(trained, question, run.drawing_settings(config), len(drawn), place, "cost", lambda *_: None)
            drawn.append(time.process_time() - begun)
            begun = time.process_time()

        speedy.simulate(Path(folder) / "simulated", blocks * speedy.BLOCK_DAYS, spinup_days=0, progress=turn)
    day = np.median(simulated[1:]) / speedy.BLOCK_DAYS  # the first of each holds the compilation
    state = np.median(drawn[1:]) / (question.members * run.items_of(question))
    return {"simulated_day_cpu_s": float(day), "generated_state_cpu_s": float(state)}


def _cost_table(result: dict) -> list[str]:
    state, day = result["generated_state_cpu_s"], result["simulated_day_cpu_s"]
    next_state = INDEPENDENT_DAYS * day
    times, cheap = next_state / state, yes(state <= DEAREST_STATE)
    return [
        "\n**cost** of an independent global daily state at T31, 48 x 96 cells, seven variables generated, one core's seconds",
        "",
        "| score | twinsim | SPEEDY (jcm) | target | reached |",
        "| --- | --- | --- | --- | --- |",
        f"| CPU s a state | {state:.4f} | {next_state:.2f} ({INDEPENDENT_DAYS} days) | <= {DEAREST_STATE} | {cheap} |",
        f"| times cheaper | {times:.0f} | 1 | >= {FEWEST_TIMES_CHEAPER:g} | {yes(times >= FEWEST_TIMES_CHEAPER)} |",
    ]


def _spent() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _twinsim(verb: str, words: list[str]) -> str:
    began = time.perf_counter()
    print(f"twinsim {verb} {' '.join(words)}", file=sys.stderr, flush=True)
    code = "import sys; from twinsim.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, verb, *words], stdout=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"twinsim {verb} {' '.join(words)} ended with {done.returncode} after {time.perf_counter() - began:.0f} s")
    return done.stdout


def mean(result: dict, who: str, score: str) -> tuple[float, float]:
    """Mean over seeds, and their standard deviation; not a number where no seed has the score."""
    values = [one[who][score]["value"] for one in result["scores"] if score in one.get(who, {})]
    return (float(np.mean(values)), float(np.std(values))) if values else (np.nan, np.nan)


def judged(result: dict, target: Target) -> tuple[str, bool]:
    """What was asked, in words, and whether the mean over seeds reaches it."""
    value, _ = mean(result, MODEL, target.score)
    if target.score == "membership-inference AUC":
        spans = [one[MODEL][target.score] for one in result["scores"] if target.score in one[MODEL]]
        return "interval contains 0.5", bool(spans) and all(span["low"] <= 0.5 <= span["high"] for span in spans)
    if target.beat:
        bar, _ = mean(result, target.beat, target.score)
        return f"< {_shown(bar)} ({target.beat})", value < bar
    low, high = target.low, target.high
    words = f"{low:g} to {high:g}" if np.isfinite(low) and np.isfinite(high) else f"<= {high:g}" if np.isfinite(high) else f">= {low:g}"
    return words, low <= value <= high


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4g}"


def _training(seconds: list[float | None]) -> str:
    """How long the trainings took, in words."""
    measured = [each for each in seconds if each is not None]
    if not measured:
        return "CPU time of training not measured"
    of = "" if len(measured) == len(seconds) else f" ({len(measured)} of {len(seconds)} seeds measured)"
    return f"{np.mean(measured) / 60:.1f} CPU minutes of training{of}"


def table(task: str, result: dict) -> list[str]:
    """Markdown: the model's mean and spread over seeds, its best baseline, the target, and whether it is reached.

    A score that is left out (a change, where the true one may be none) shows as "-" and does not reach its target.
    """
    if task == COST:
        return _cost_table(result)
    lines = [
        f"\n**{task}**, seeds {', '.join(map(str, result['seeds']))}, {_training(result['training_cpu_s'])}",
        "",
        "| score | twinsim | best baseline | target | reached |",
        "| --- | --- | --- | --- | --- |",
    ]
    for target in TASKS[task]:
        value, spread = mean(result, MODEL, target.score)
        words, reached = judged(result, target)
        if np.isnan(value):
            lines.append(f"| {target.score} | - | - | {words} | {yes(False)} |")
            continue
        ideal = next(one[MODEL][target.score]["ideal"] for one in result["scores"] if target.score in one[MODEL])
        others = [who for who in result["scores"][0] if who != MODEL and target.score in result["scores"][0][who]]
        best = min(others, key=lambda who: abs(mean(result, who, target.score)[0] - ideal), default="")
        beside = f"{mean(result, best, target.score)[0]:.4g} ({best})" if best else "none"
        lines.append(f"| {target.score} | {value:.4g} ± {spread:.2g} | {beside} | {words} | {yes(reached)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
