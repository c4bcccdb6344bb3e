"""Designs of an arm that do a task in a world sooner, or with less work: link lengths, gains and gearing, by CMA-ES over the physics.

Two aims, time and work. Each weighting of the two, a sum of logarithms over the nominal design's, is one search; what no other design
beats in both is the front. All of its designs are judged once more from starts that the search did not use, where they need not be a front
any more, and only those figures are told.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from domains.robotics import arm, cmaes, worlds
from domains.robotics.tasks import Scene, reached
from twinsim.base import BadInput

TASKS: Mapping[str, Any] = {task.name: task for task in (arm.ArmReach(), arm.ArmPush(), arm.ArmPick())}
NAMES = tuple(each.name for each in fields(arm.Build))
BOX: Mapping[str, tuple[float, float]] = {
    "upper": (0.7, 1.3),
    "fore": (0.7, 1.3),
    "stiffness": (0.2, 3.0),
    "lag": (0.4, 2.0),
    "gear": (0.3, 2.0),
}
FAILED = 0.1  # of a share of episodes that fail, in logarithms of the aim: 1 % costs as much as 10 % of time or work


@dataclass(frozen=True)
class Judged:
    """A design and how it does.

    Attributes:
      build: the design. time: to the goal, s, mean; an episode that fails counts in full. work: of the motors, J, mean, braking counted as
        driving. success: share of episodes.
    """

    build: arm.Build
    time: float
    work: float
    success: float


@dataclass(frozen=True)
class Found:
    """A front of designs.

    Attributes:
      nominal: the arm as it is. front: designs that none beat in the search, by time; both judged from starts that it did not use.
      tried: all designs, judged from the starts of the search.
    """

    nominal: Judged
    front: Sequence[Judged]
    tried: Sequence[Judged]


def judge(task: Any, build: arm.Build, start: Mapping[str, np.ndarray], world: np.ndarray) -> Judged:
    """Plays a task's demonstrator with an arm so built, from starts `[count]` in worlds `[count, parameter]`.

    A design that cannot reach all starts and goals has an infinite time and work.
    """
    built = replace(task, build=build)
    try:
        built.place(start)
    except BadInput:
        return Judged(build, np.inf, np.inf, 0.0)
    played = Scene(built).play(start, world, lambda _, seen: built.demonstrate(seen))
    length, success = reached(built, played.after)
    until = np.arange(built.frames)[None] < length[:, None]
    spent = (played.work.astype(np.float64) * until).sum(1)
    return Judged(build, float(length.mean() / built.rate), float(spent.mean()), float(success.mean()))


def optimise(
    task: Any,
    world: np.ndarray,
    *,
    vary: Sequence[str] = NAMES,
    region: str = "wide",
    starts: int = 12,
    weights: Sequence[float] = (0.0, 0.5, 1.0),
    generations: int = 8,
    population: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Found:
    """The front of designs of an arm for a task and a world `[parameter]`. Raises BadInput.

    Args:
      vary: fields of `arm.Build`. weights: of time against work, 0 to 1, a search each.
    """
    _check(vary, starts, weights, generations)
    every = np.repeat(world[None], starts, 0)
    start = task.draw(np.random.default_rng([seed, 0]), starts, region)
    own = judge(task, arm.Build(), start, every)
    if own.success == 0:
        raise BadInput(f"{task.name}: expected a world in which the arm as it is does the task at least once, it failed {starts} times")
    tried = [own]
    lower, upper = np.array([BOX[name] for name in vary]).T
    for number, weight in enumerate(weights):
        search = cmaes.start(lower, upper, mean=np.ones(len(vary)), sigma=0.2, population=population, seed=seed + number)
        for generation in range(generations):
            judged = [
                judge(task, arm.Build(**dict(zip(vary, map(float, point), strict=True))), start, every) for point in cmaes.ask(search)
            ]
            search = cmaes.tell(search, np.array([_aim(each, own, weight) for each in judged]))
            tried += judged
            progress(number * generations + generation + 1, len(weights) * generations)
    fresh = task.draw(np.random.default_rng([seed, 1]), 2 * starts, region)
    twice = np.repeat(world[None], 2 * starts, 0)
    again = [judge(task, each.build, fresh, twice) for each in _front(tried, own.success)]
    nominal = judge(task, arm.Build(), fresh, twice)
    return Found(nominal, sorted(again, key=lambda each: each.time), tried)


def _check(vary: Sequence[str], starts: int, weights: Sequence[float], generations: int) -> None:
    if not vary or set(vary) - set(NAMES) or len(set(vary)) < len(vary):
        raise BadInput(f"vary: expected some of {', '.join(NAMES)}, got {', '.join(map(str, vary)) or 'none'}")
    if starts < 1 or generations < 1:
        raise BadInput(f"starts and generations: expected 1 or more, got {starts} and {generations}")
    if not weights or not all(0 <= weight <= 1 for weight in weights):
        raise BadInput(f"weights: expected numbers from 0 to 1, got {list(weights)}")


def _aim(each: Judged, own: Judged, weight: float) -> float:
    """What a search makes least: infinite where the task is out of reach."""
    gain = weight * np.log(each.time / own.time) + (1 - weight) * np.log(max(each.work, 1e-9) / max(own.work, 1e-9))
    return float(gain + 100 * FAILED * max(own.success - each.success, 0.0)) if np.isfinite(each.time) else np.inf


def _front(judged: Sequence[Judged], success: float) -> list[Judged]:
    """Those that succeed as often and that no other beats in time and work, by time."""
    best: list[Judged] = []
    for each in sorted((each for each in judged if each.success >= success), key=lambda each: (each.time, each.work)):
        if not best or each.work < best[-1].work:
            best.append(each)
    return best


def optimise_files(
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    task: str = "arm_reach",
    world: str | Mapping[str, float] | None = None,
    vary: Sequence[str] = NAMES,
    region: str = "wide",
    starts: int = 12,
    weights: Sequence[float] = (0.0, 0.5, 1.0),
    generations: int = 8,
    population: int = 8,
    seed: int = 0,
) -> list[str]:
    """Optimises an arm's design and writes front.csv, tried.csv, design.json, front.svg and the models, as MJCF, into `folder`.

    `world` is a name of `worlds.PRESETS`, or values of parameters. Returns what came out, in lines. Raises BadInput.
    """
    if task not in TASKS:
        raise BadInput(f"task {task}: expected one of {', '.join(TASKS)}")
    vector = Scene(TASKS[task]).world(worlds.preset(world).values if isinstance(world, str) else world)
    found = optimise(
        TASKS[task],
        vector,
        vary=list(vary),
        region=region,
        starts=starts,
        weights=list(weights),
        generations=generations,
        population=population,
        seed=seed,
        progress=progress,
    )
    for name, rows in (("front.csv", [found.nominal, *found.front]), ("tried.csv", found.tried)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow((*NAMES, "time_s", "work_J", "success"))
            table.writerows(
                [round(value, 5) for value in (*asdict(each.build).values(), each.time, each.work, each.success)] for each in rows
            )
    told = {"task": task, "world": worlds.named(vector), "nominal": asdict(found.nominal), "front": [asdict(each) for each in found.front]}
    (folder / "design.json").write_text(json.dumps(told | {"judged_from": "starts that the search did not use", "seed": seed}, indent=1))
    (folder / "front.svg").write_bytes(picture(found))
    for number, each in enumerate(found.front):
        spec = replace(TASKS[task], build=each.build).spec()
        spec.compile()
        (folder / f"design_{number}.xml").write_text(spec.to_xml())
    return lines(found)


def lines(found: Found) -> list[str]:
    """The front in words."""
    answer = [
        f"{len(found.front)} designs, of {len(found.tried)} tried, that none beat in time and work; figures from starts not used there:"
    ]
    for name, each in [("nominal", found.nominal), *((f"design {index}", each) for index, each in enumerate(found.front))]:
        parts = "  ".join(f"{part} {value:.2f}" for part, value in asdict(each.build).items())
        change = f"{100 * (each.time / found.nominal.time - 1):+.0f} % time, {100 * (each.work / found.nominal.work - 1):+.0f} % work"
        answer.append(f"{name:<9} {each.time:5.2f} s {each.work:6.2f} J {each.success:4.0%}  ({change})  {parts}")
    return answer


def picture(found: Found) -> bytes:
    """The Pareto front, the nominal design and all that was tried, as SVG."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    done = [each for each in found.tried if np.isfinite(each.time) and each.success >= found.nominal.success]
    axes.plot(
        [each.time for each in done], [each.work for each in done], ".", color="#b8bec6", markersize=3, label="tried, starts of the search"
    )
    axes.plot(
        [each.time for each in found.front],
        [each.work for each in found.front],
        color="#542788",
        marker="o",
        markersize=4,
        linewidth=0.8,
        label="front, other starts",
    )
    axes.plot([found.nominal.time], [found.nominal.work], "*", color="#b35806", markersize=12, label="nominal, other starts")
    axes.set(xlabel="time to the goal, s", ylabel="work of the motors, J", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "twinsim", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return stream.getvalue()
