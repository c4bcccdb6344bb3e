"""Measures the twins of city sensors on recorded data, against their targets and their baselines.

"loops": METR-LA, one week of 207 loops, trained on its first 80 %: error of the ensemble's median 15, 30 and 60 min ahead, from every
step of the last 20 %, beside the last speed held and the historic average, which are measured in the same run on the same cells.
"roadside": London Marylebone Road, trained on 1998-2001: CRPS of three-day windows of 2002 to mid 2004 given the wind, beside days of the
same season, weekday and hour. Trains through the engine, three seeds each. Writes `benchmarks/results/city.json`, prints a table.

  python benchmarks/city_sensors.py [--shared FOLDER] [--parts loops,roadside] [--seeds 0,1,2] [--out FOLDER]
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep

from twinsim import cli, evaluation, run  # noqa: E402

WORST_60_MIN = 5.15  # mph, the historic average's
BORDER = 0.6154  # of the record of Marylebone Road lies before 2002
LEADS = (3, 6, 12)
MEMBERS = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--parts", default="loops,roadside")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", default="out/benchmarks")
    parser.add_argument("words", nargs="*", help="further overrides of the configuration")
    given = parser.parse_args()
    data = given.shared / "data" / "mobility"
    if not data.is_dir():
        print(f"sensors: skipped, there is no folder {data}")
        return 0
    for part in given.parts.split(","):
        measured = {"loops": loops, "roadside": roadside}[part](data, given)
        keep("city", part, measured)
        print("\n".join(table(part, measured)))
    return 0


def loops(data: Path, given: argparse.Namespace) -> dict:
    """Errors of the median ahead of every step of the held-out fifth of METR-LA, and scores of its windows."""
    words = ["domain=city/loops", f"domain.dataset.path={data}/sensors/metr_la_week/los_speed.csv.gz", "domain.gaussian=0.75"]
    result: dict[str, Any] = {"seeds": {}}
    for seed in given.seeds.split(","):
        config = composed([*words, f"seed={seed}"], given)
        began = time.process_time()
        trained = run.training(config, quiet)
        trained_s = time.process_time() - began
        domain, border = trained.domain, int(len(trained.domain.values) * 0.8)
        issued = np.arange(border, len(domain.values) - LEADS[-1])  # the step whose speeds are the last known
        starts = issued - domain.past + 1
        began = time.process_time()
        question = domain.held_out(starts, MEMBERS, domain.shown(starts, "forecast"))
        drawn = drawn_of(config, trained, question, int(seed), given)
        drawn_s = time.process_time() - began
        truth = domain.values
        median = np.median(drawn["speed"], 0)  # [issue, sensor, step]
        ahead = {}
        for lead in LEADS:
            true = truth[issued + lead]
            ok = np.isfinite(true) & np.isfinite(truth[issued])
            ahead[str(5 * lead)] = {
                "median": mae(median[:, :, domain.past - 1 + lead], true, ok),
                "persistence": mae(truth[issued], true, ok),
                "historic average": mae(historic(truth[:border])[(issued + lead) % 288], true, ok),
            }
        scores = domain.score(drawn, question.truth, question.condition).table
        gauss = domain.baselines(trained.statistics)["Gaussian model"](question.condition, MEMBERS, int(seed))
        silent = {str(5 * lead): mae(np.median(gauss["speed"], 0)[:, :, domain.past - 1 + lead], truth[issued + lead]) for lead in LEADS}
        result["seeds"][seed] = {
            "train_cpu_s": trained_s, "draw_cpu_s": drawn_s, "draws": MEMBERS * len(issued), "mae_mph": ahead,
            "gaussian_model_mae_mph": silent, "scores": {name: score.value for name, score in scores.items()},
            "gaussian_model_scores": {
                name: score.value for name, score in domain.score(gauss, question.truth, question.condition).table.items()
            },
        }  # fmt: skip
        print(f"loops, seed {seed}: {json.dumps(result['seeds'][seed])}", file=sys.stderr, flush=True)
    return result


def roadside(data: Path, given: argparse.Namespace) -> dict:
    """Scores of held-out windows of the model and its baselines."""
    path = data / "airquality" / "london_marylebone_1998_2004h1.csv.gz"
    words = ["domain=city/roadside", f"domain.dataset.path={path}", f"domain.test_share={1 - BORDER:.4f}", "evaluate.most=100"]
    result: dict[str, Any] = {"seeds": {}}
    for seed in given.seeds.split(","):
        config = composed([*words, f"seed={seed}"], given)
        began = time.process_time()
        trained = run.training(config, quiet)
        trained_s = time.process_time() - began
        judged = run.evaluate(config, quiet, trained)
        scores = {who: {name: score.value for name, score in each.table.items()} for who, each in judged.scores.items()}
        result["seeds"][seed] = {"train_cpu_s": trained_s, "scores": scores}
        print(f"roadside, seed {seed}: {json.dumps(result['seeds'][seed])}", file=sys.stderr, flush=True)
    return result


def composed(words: list[str], given: argparse.Namespace) -> dict:
    return run.resolve(cli._compose([*words, f"out={given.out}", f"evaluate.members={MEMBERS}", *given.words]))


@contextlib.contextmanager
def quiet(stage: str) -> Iterator[Any]:
    yield lambda done, total, *note: None


def drawn_of(config: dict, trained: Any, question: Any, seed: int, given: argparse.Namespace) -> dict:
    folder = Path(given.out) / f"draws-{run.places(config).model.name}"
    drawn, _ = run.draw(trained, question, run.drawing_settings(config), seed, folder, f"benchmark {seed}", lambda *_: None)
    return {name: np.asarray(values[...]) for name, values in drawn.items()}


def mae(guess: np.ndarray, true: np.ndarray, ok: np.ndarray | None = None) -> float:
    ok = np.isfinite(true) if ok is None else ok
    return float(np.abs(guess - true)[ok].mean())


def historic(train: np.ndarray) -> np.ndarray:
    """Mean of each time of the day and sensor, `[288, sensor]`."""
    return np.stack([np.nanmean(train[first::288], 0) for first in range(288)])


def table(part: str, measured: dict) -> list[str]:
    """Markdown: the mean and the range over seeds, and what is reached."""
    seeds = list(measured["seeds"].values())
    if part == "loops":
        lines = ["\n**METR-LA**, MAE of the median, mph", "", "| min ahead | twinsim | Gaussian model | persistence | historic average |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for lead in (str(5 * lead) for lead in LEADS):
            ours = [seed["mae_mph"][lead]["median"] for seed in seeds]
            other = seeds[0]["mae_mph"][lead]
            silent = np.mean([seed["gaussian_model_mae_mph"][lead] for seed in seeds])
            lines.append(f"| {lead} | {over(ours)} | {silent:.2f} | {other['persistence']:.2f} | {other['historic average']:.2f} |")
        worst = max(seed["mae_mph"]["60"]["median"] for seed in seeds)
        return [*lines, "", f"60 min ahead below {WORST_60_MIN} mph in every seed: {'yes' if worst < WORST_60_MIN else '**no**'}"]
    names = [name for name in seeds[0]["scores"][evaluation.MODEL] if name.endswith(": CRPS")]
    others = [who for who in seeds[0]["scores"] if who != evaluation.MODEL]
    lines = ["\n**Marylebone Road**, CRPS given the wind", "", f"| | twinsim | {' | '.join(others)} | below climatology |"]
    lines.append("| --- |" + " --- |" * (len(others) + 2))
    for name in names:
        ours = [seed["scores"][evaluation.MODEL][name] for seed in seeds]
        theirs = {who: float(np.mean([seed["scores"][who][name] for seed in seeds])) for who in others}
        reached = "yes" if max(ours) < theirs["days like it"] else "**no**"
        lines.append(f"| {name} | {over(ours)} | {' | '.join(f'{value:.2f}' for value in theirs.values())} | {reached} |")
    return lines


def over(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main())
