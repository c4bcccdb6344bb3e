"""Measures whether generated pushes make policies better, and what a thousand of them cost.

policy: an unchanged behaviour-cloning policy is trained on N narrow demonstrations, alone and with 100 synthetic episodes, and judged by
its success in the simulator on 100 narrow and 100 wide starts, five seeds each. The peer's script holds demonstrations, policy, replay,
filter and its own MimicGen-style and jitter arms; it replays our proposals itself. The yield is that of all proposals, failures included.
Intervals are 95 % bootstraps over seeds, paired by seed; of five seeds they are optimistic.
thousand: CPU and wall seconds of `twinsim run robotics/thousand_pushes`, from 25 demonstrations to a LeRobot folder of 1,000 episodes.
Trainings that are done lie in --out and are found again. Writes `benchmarks/results/robotics.json`; --readme shows it in README.md.

  python benchmarks/robotics.py [--shared FOLDER] [--out FOLDER] [--parts policy,thousand] [--demos 10,25,50] [--seeds 5] [--arms real,...]
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep, read, write_readme, yes

from domains.robotics import worlds  # noqa: E402
from domains.robotics.push import REACH  # noqa: E402
from twinsim import cli, run  # noqa: E402

TARGETS = {10: 0.30, 25: 0.38, 50: 0.42}
PROPOSALS, ACCEPTED, FRAMES = 150, 100, 150


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-robotics")
    parser.add_argument("--parts", default="policy,thousand")
    parser.add_argument("--demos", default="10,25,50")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default="real,jitter,mimic,oracle,paths")
    parser.add_argument("--readme", action="store_true", help="show what was measured so far in README.md, measure nothing")
    parser.add_argument("words", nargs="*", help="overrides of the configuration")
    given = parser.parse_args()
    if given.readme:
        write_readme("results-robotics", table(read("robotics")))
        return 0
    peer = given.shared / "peers" / "robotics" / "robotics_baseline.py"
    if "policy" in given.parts:
        if not peer.is_file():
            print(f"policy: skipped, there is no file {peer}")
        else:
            policy(given, peer.absolute())
    if "thousand" in given.parts:
        thousand(given)
    return 0


def policy(given: argparse.Namespace, peer: Path) -> None:
    """The success of policies trained with and without synthetic episodes."""
    given.out.mkdir(parents=True, exist_ok=True)
    counts = [int(each) for each in given.demos.split(",")]
    shared = ["--demos", given.demos, "--seeds", str(given.seeds)]
    demos = given.out / "demos"
    called(peer, *shared, "--arms", "real", "--steps", "1", "--eval", "2", "--export-demos", str(demos))
    for count in counts:
        for seed in range(given.seeds):
            propose(given, demos / f"demos_n{count}_s{seed}.npz", count, seed)
    result = given.out / "result.json"
    paths = str(given.out / "paths_n{n}_s{s}.npz")
    called(peer, *shared, "--arms", given.arms, "--syn", str(ACCEPTED), "--steps", "2500", "--paths", paths, "--out", str(result))
    rows = json.loads(result.read_text())
    measured = {str(count): told([row for row in rows if row["n"] == count], given.arms.split(",")) for count in counts}
    for count in counts:
        ours = measured[str(count)]["paths"]
        print(f"N={count}: {json.dumps(ours)} target {TARGETS.get(count)}")
    keep("robotics", "policy", {"seeds": given.seeds, "accepted": ACCEPTED, "proposals": PROPOSALS, "by demonstrations": measured})


def propose(given: argparse.Namespace, file: Path, count: int, seed: int) -> None:
    """Paths of the tip for wide starts of our own, as the peer's script reads them: where the tip was sent at each control step."""
    out = given.out / f"paths_n{count}_s{seed}.npz"
    if out.exists():
        return
    folder = given.out / f"demos_n{count}_s{seed}"
    folder.mkdir(exist_ok=True)
    (folder / "demonstrations.npz").write_bytes(file.read_bytes())
    words = ["domain=robotics/push_recorded", f"archive={folder.absolute()}", f"out={given.out.absolute()}", f"seed={seed}", *given.words]
    config = run.resolve(cli._compose(words))
    trained = run.training(config, quiet)
    domain: Any = trained.domain
    start = domain.task.draw(np.random.default_rng(777_000 + 1000 * count + seed), PROPOSALS, "wide")
    world = np.repeat(worlds.world()[None], PROPOSALS, 0)
    question = domain.question(start, world, 1, "proposals", must=False)
    drawn, _ = run.draw(trained, question, run.drawing_settings(config), seed, folder / "draws", f"{words}", lambda *_: None)
    samples = {name: np.asarray(values[...])[0] for name, values in drawn.items()}
    tip = np.stack([samples["tip_x"], samples["tip_y"]], -1)
    sent = tip + REACH * np.stack([samples["move_x"], samples["move_y"]], -1)
    for row, length in enumerate(samples["length"].astype(int)):
        sent[row, length:] = sent[row, length - 1]
    # float32 starts, as the twin used them
    puck, goal = (np.stack([np.asarray(start[f"{name}_{axis}"], np.float32) for axis in "xy"], -1) for name in ("puck", "goal"))
    print(f"N={count} seed {seed}: {samples['success'].mean():.2f} of {PROPOSALS} proposals succeed", flush=True)
    np.savez(out, puck=puck.astype(np.float64), goal=goal.astype(np.float64), tip=sent[:, :FRAMES].astype(np.float64))


def thousand(given: argparse.Namespace) -> None:
    """What 1,000 verified episodes cost, training included, with whatever programs JAX keeps compiled."""
    out = given.out / "thousand"
    shutil.rmtree(out, ignore_errors=True)
    before, began = os.times(), time.perf_counter()
    command = ["-c", "import sys; from twinsim.cli import main; sys.exit(main())", "run", "robotics/thousand_pushes", f"out={out}"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after, wall = os.times(), time.perf_counter() - began
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    (info_file,) = out.glob("runs/*/lerobot/meta/info.json")
    with info_file.open() as file:
        info = json.load(file)
    measured = {"episodes": info["total_episodes"], "frames": info["total_frames"], "cpu_s": round(spent), "wall_s": round(wall)}
    print(json.dumps(measured))
    keep("robotics", "thousand", measured)


def table(measured: dict[str, Any]) -> list[str]:
    """What was measured, as lines of README.md."""
    lines = []
    if "policy" in measured:
        part = measured["policy"]
        names = {"real": "alone", "jitter": "+ jitter", "mimic": "+ MimicGen-style", "paths": "+ twinsim", "oracle": "+ 100 new real"}
        arms = [arm for arm in names if all(arm in each for each in part["by demonstrations"].values())]
        lines += [
            "",
            f"Success of an unchanged behaviour-cloning policy on wide / narrow starts, mean of {part['seeds']} seeds, trained on N"
            " demonstrations"
            f" from narrow starts and {part['accepted']} synthetic episodes:",
            "",
            "| N | " + " | ".join(names[arm] for arm in arms) + " | yield of twinsim | gain over alone, wide | target, wide | reached |",
            "| --- |" + " --- |" * (len(arms) + 4),
        ]
        for count, rows in part["by demonstrations"].items():
            cells = [f"{rows[arm]['wide']:.2f} ± {rows[arm]['wide_sd']:.2f} / {rows[arm]['narrow']:.2f}" for arm in arms]
            gain, target = rows["paths"]["wide_gain"], TARGETS[int(count)]
            reached = rows["paths"]["wide"] >= target and rows["paths"]["narrow"] >= rows["real"]["narrow"]
            more = [f"{rows['paths']['yield']:.1%}", f"{gain[0]:+.2f} [{gain[1]:.2f}, {gain[2]:.2f}]", f">= {target:.2f}", yes(reached)]
            lines.append(f"| {count} | " + " | ".join([*cells, *more]) + " |")
    if "thousand" in measured:
        part = measured["thousand"]
        fast = yes(part["wall_s"] < 300 and part["episodes"] >= 1000)
        told = (
            f"{part['episodes']} verified episodes of the push ({part['frames']} frames), from demonstrations to a LeRobot folder, training"
        )
        cost = f"{part['cpu_s']} CPU s, {part['wall_s']} s on two cores (target: 1,000 in 300 s, reached: {fast})"
        lines += ["", f"{told} and report included: {cost}."]
    if "physics" in measured:
        part = measured["physics"]
        ratios = {name: row["ratio"] for name, row in part.items() if isinstance(row, dict) and "ratio" in row}
        short, long = ([ratio for name, ratio in ratios.items() if name.endswith(each)] for each in (" 10", " 20"))
        speed = part["mjx free"]["steps_per_cpu_s"]
        lines += [
            "",
            f"Physics of the arm of seven joints, {part['count']} copies, steps per CPU second in ratio to `mujoco.rollout`"
            f" ({', '.join(dict.fromkeys(name.rsplit(' ', 1)[0] for name in ratios))}): {' / '.join(f'{each:.2f}' for each in long)} at 20"
            f" physics steps a control step, as the tasks have them, {' / '.join(f'{each:.2f}' for each in short)} at 10 (target: 0.90,"
            f" reached: {yes(min(long) >= 0.9)} and {yes(min(short) >= 0.9)}). MJX on a processor, free arm: {speed:,.0f} steps per CPU"
            f" second (target: 10,000, reached: {yes(speed > 1e4)}). By `make bench-robotics_physics`.",
        ]
    return [*lines, ""]


def told(rows: list[dict[str, Any]], arms: list[str]) -> dict[str, Any]:
    """Means over seeds by arm, and the gain over demonstrations alone, paired by seed, with its interval."""
    draw = np.random.default_rng(0)
    answer = {}
    alone = {row["seed"]: row for row in rows if row["arm"] == "real"}
    for arm in arms:
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        figures: dict[str, Any] = {}
        for region, name in (("id", "narrow"), ("wide", "wide")):
            values = np.array([row[region] for row in own])
            figures[name] = round(float(values.mean()), 3)
            figures[f"{name}_sd"] = round(float(values.std()), 3)
            if alone and arm != "real":
                gain = values - np.array([alone[row["seed"]][region] for row in own])
                means = gain[draw.integers(len(gain), size=(5000, len(gain)))].mean(1)
                figures[f"{name}_gain"] = [round(float(value), 3) for value in (gain.mean(), *np.percentile(means, [2.5, 97.5]))]
        if own[0]["yield_"] is not None:
            figures["yield"] = round(float(np.mean([row["yield_"] for row in own])), 3)
        answer[arm] = figures
    return answer


def called(script: Path, *words: str) -> None:
    """Runs a script of the peer. Raises where it fails."""
    subprocess.run([sys.executable, str(script), *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def quiet(_: str) -> Iterator[Callable[..., None]]:
    yield lambda *_: None


if __name__ == "__main__":
    sys.exit(main())
