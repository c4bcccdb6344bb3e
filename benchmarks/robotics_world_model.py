"""Measures a world model of the planar push: how far it can be trusted, and how well one plans in it.

errors: for each seed, 200 mixed episodes are recorded and learnt from, and stretches of 60 others predicted; mean distance of the puck from
where it then is, with 95 % bootstrap intervals, beside no motion, a linear model and the same ensemble without its view ("plain").
played: success of the scripted demonstrator, and of its actions sent open loop and shaken, in the model and in the simulator.
planning: success in the simulator, on wide starts, of one planner with one cost that looks ahead in each seed's model or in the simulator.
CPU seconds are of the whole process. Trainings that are done lie in --out and are found again.

  python benchmarks/robotics_world_model.py [--out out/bench-robotics-world-model] [--parts errors,played,planning] [--seeds 3] [--tasks 40]
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep, yes

from domains.robotics import imagined, planning, worlds  # noqa: E402
from domains.robotics.push import PlanarPush  # noqa: E402
from domains.robotics.tasks import Played, Scene, reached  # noqa: E402
from twinsim import cli, run  # noqa: E402

HORIZONS = (1, 5, 10, 20, 50)
REFERENCE = {"first model": (0.2, 1.1, 2.5, 9.1, 38.9), "no motion": (0.7, 3.5, 7.9, 18.8, 71.3), "linear": (0.4, 4.8, 13.4, 29.9, 77.6)}
AT_20 = 9.0  # mm
SHARE = 0.7  # of the success of planning in the simulator
PLANNER = {"cem": planning.Planner("cem", samples=48, iterations=2), "mppi": planning.Planner("mppi", samples=48, iterations=2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-robotics-world-model")
    parser.add_argument("--parts", default="errors,played,planning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=40)
    given = parser.parse_args()
    for part in given.parts.split(","):
        {"errors": errors, "played": played, "planning": plans}[part](given)
    return 0


def configured(given: argparse.Namespace, seed: int, *words: str) -> dict[str, Any]:
    named = ["domain=robotics/push_model", f"out={given.out.absolute()}", f"seed={seed}", f"domain.record.seed={seed}", *words]
    return run.resolve(cli._compose(named))


def stepper(given: argparse.Namespace, seed: int) -> imagined.ModelStepper:
    model: Any = run.training(configured(given, seed), quiet)
    return imagined.trained(model.domain, model)


def errors(given: argparse.Namespace) -> None:
    """Open-loop errors of the puck, mm, at each horizon."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in range(given.seeds):
        for name, words in (("twinsim", []), ("plain", ["domain.view=null", "generator.view=null"])):
            config = configured(given, seed, *words)
            prepared = run.data(config, quiet)
            begun = time.process_time()
            model = run.training(config, quiet, prepared.domain)
            kept = run.places(config).model / "train_cpu_s"  # of the run that trained it
            if not kept.exists():
                kept.write_text(f"{time.process_time() - begun:.1f}")
            spent = float(kept.read_text())
            judged = run.evaluate(config, quiet, model)
            for competitor, scores in judged.scores.items():
                if name == "plain" and competitor != "twinsim":
                    continue
                table = {
                    f"{kind} {step}": [round(1000 * value, 3) for value in (score.value, score.low, score.high)]
                    for kind in ("error", "CRPS")
                    for step in HORIZONS
                    for score in [scores.table[f"puck: {kind} after {step}"]]
                }
                trained = {"train_cpu_s": spent} if competitor == "twinsim" else {}
                rows.setdefault(name if competitor == "twinsim" else competitor, []).append({"seed": seed, **trained, **table})
    told = {
        name: {
            "mean": {step: round(float(np.mean([row[f"error {step}"][0] for row in each])), 2) for step in HORIZONS},
            "crps": {step: round(float(np.mean([row[f"CRPS {step}"][0] for row in each])), 2) for step in HORIZONS},
            "seeds": each,
        }
        for name, each in rows.items()
    }
    for name, each in told.items():
        print(f"{name:10} puck error / mm at {HORIZONS}: {list(each['mean'].values())}  CRPS {list(each['crps'].values())}", flush=True)
    best = all(told["twinsim"]["mean"][step] < told[other]["mean"][step] for step in HORIZONS for other in ("no motion", "linear"))
    worst = max(row["error 20"][2] for row in rows["twinsim"])
    print(
        f"below no motion and linear at every horizon: {yes(best)}; at 20 below {AT_20} mm for every seed: {yes(worst < AT_20)}", flush=True
    )
    keep("robotics_world_model", "errors", {"units": "mm", "reference": REFERENCE, **told})


def played(given: argparse.Namespace) -> None:
    """The demonstrator, and its actions without it, in the model and in the simulator, from 100 wide starts."""
    task = PlanarPush()
    scene, start, world = Scene(task), task.draw(np.random.default_rng(4711), 100, "wide"), np.repeat(worlds.world()[None], 100, 0)
    found: dict[str, Any] = {}
    for wobble in (0.0, 0.5):
        policies = {name: _shaky(task, wobble) for name in ("simulator", *range(given.seeds))}
        own = reached(task, scene.play(start, world, policies["simulator"]).after)[1]
        in_model = [reached(task, stepper(given, seed).play(start, world, policies[seed]).after)[1] for seed in range(given.seeds)]
        found[f"wobble {wobble:g}"] = told(own, in_model)
        print(f"demonstrator, wobble {wobble:g}: {found[f'wobble {wobble:g}']}", flush=True)
    done = scene.play(start, world, lambda _, seen: task.demonstrate(seen)).action
    noise = np.random.default_rng(2)
    for shake in (0.0, 0.1, 0.3):  # open loop, where nothing puts right what the model has wrong
        actions = np.clip(done + shake * noise.standard_normal(done.shape).astype(np.float32), -1, 1)
        own = reached(task, scene.replay(start, world, actions).after)[1]
        in_model = [reached(task, stepper(given, seed).replay(start, world, actions).after)[1] for seed in range(given.seeds)]
        found[f"open loop, shaken by {shake:g}"] = told(own, in_model)
        print(f"open loop, shaken by {shake:g}: {found[f'open loop, shaken by {shake:g}']}", flush=True)
    keep("robotics_world_model", "played", found)


def told(own: np.ndarray, in_model: list[np.ndarray]) -> dict[str, Any]:
    """Success in the simulator, in each model, and how often the outcome is the same."""
    same = [float((each == own).mean()) for each in in_model]
    return {"simulator": float(own.mean()), "model": [float(each.mean()) for each in in_model], "same outcome": same}


def _shaky(task: PlanarPush, wobble: float) -> Callable[[int, np.ndarray], np.ndarray]:
    noise = np.random.default_rng(1)
    return lambda frame, seen: np.clip(task.demonstrate(seen) + wobble * noise.standard_normal((len(seen), 2)), -1, 1)


def plans(given: argparse.Namespace) -> None:
    """Success of planning, in the simulator, by what is planned in."""
    task, count = PlanarPush(), given.tasks
    scene, start, world = Scene(task), task.draw(np.random.default_rng(555), count, "wide"), np.repeat(worlds.world()[None], count, 0)
    found: dict[str, Any] = {}
    for method, planner in PLANNER.items():
        figures: dict[str, Any] = {}
        for name in ("model", "simulator") if method == "cem" else ("model",):
            for seed in range(given.seeds if name == "model" else 1):
                imagine = stepper(given, seed).imagine if name == "model" else planning.in_simulator(scene, start, world, planner.samples)
                begun = time.process_time()
                played = planning.pursue(planner, scene, start, world, imagine, planning.push_cost, seed)
                figures.setdefault(name, []).append({"seed": seed, **judged(task, played), "cpu_s": round(time.process_time() - begun, 1)})
                print(f"planning, {method} in the {name}, seed {seed}: {figures[name][-1]}", flush=True)
        found[method] = figures
    ours = float(np.mean([each["success"] for each in found["cem"]["model"]]))
    theirs = found["cem"]["simulator"][0]["success"]
    print(f"model {ours:.2f}, simulator {theirs:.2f}: at least {SHARE:.0%} of it: {yes(ours >= SHARE * theirs)}", flush=True)
    keep("robotics_world_model", "planning", {"tasks": count, **found})


def judged(task: PlanarPush, played: Played) -> dict[str, Any]:
    """Success with its 95 % interval (Wilson 1927), seconds to the goal, and how far the puck was off, mean over the episode."""
    length, success = reached(task, played.after)
    n, share, z = len(success), float(success.mean()), 1.96
    middle, half = (share + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    apart = np.linalg.norm(played.after[..., 6:8] - played.after[..., 10:12], axis=-1)
    seconds = float(np.median(length[success])) / task.rate if success.any() else float("nan")
    interval = [round(float(middle - half), 3), round(float(min(middle + half, 1.0)), 3)]
    return {"success": share, "interval": interval, "median_s": seconds, "mean_distance_mm": round(1000 * float(apart.mean()), 1)}


@contextlib.contextmanager
def quiet(_: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


if __name__ == "__main__":
    sys.exit(main())
