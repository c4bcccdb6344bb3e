"""Steps per CPU second of the steppers on the arm of seven joints: C MuJoCo's batch against `mujoco.rollout`, and MJX on CPU.

    python benchmarks/robotics_physics.py        # about 3 minutes of CPU, most of it MJX's compilation

Both C rows take turns in one process on the same model, starts and controls, one thread each. MJX runs in a process of its own, started
with the flag that it needs on CPU; its compilation is not counted.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _results
import mujoco
import numpy as np
from mujoco import rollout

from domains.robotics import arm
from domains.robotics.physics import MJX_FLAG, CStepper, MjxStepper, compiled

COUNT, CONTROLS, ROUNDS = 64, 25, 9
MJX_COUNT, MJX_CONTROLS, MJX_STEPS = 256, 10, 20
TARGET, MJX_TARGET = 0.9, 1e4  # of rollout; steps per CPU second


def model(kind: str) -> mujoco.MjModel:
    task = arm.ArmPick() if kind == "pick" else arm.ArmReach()
    spec = task.spec()
    if kind == "free":  # no sensors, no contacts
        for sensor in list(spec.sensors):
            spec.delete(sensor)
        for geom in spec.geoms:
            geom.contype = geom.conaffinity = 0
    return compiled(spec)


def start(kind: str, count: int) -> np.ndarray:
    task = arm.ArmPick() if kind == "pick" else arm.ArmReach()
    return task.place(task.draw(np.random.default_rng(0), count, "wide"))


def controls(found: mujoco.MjModel, kind: str, count: int, number: int) -> np.ndarray:
    """About the rest pose, `[control step, count, nu]`."""
    wanted = np.zeros((number, count, found.nu))
    wanted[..., : arm.JOINTS] = arm.REST + 0.1 * np.random.default_rng(1).standard_normal((number, count, arm.JOINTS))
    return wanted


def against_rollout(kind: str, steps: int) -> dict[str, float]:
    """Steps per CPU second of both, medians of interleaved rounds."""
    found, begin = model(kind), start(kind, COUNT)
    wanted = controls(found, kind, COUNT, CONTROLS)
    stepper = CStepper(found, COUNT)
    data = mujoco.MjData(found)
    size = mujoco.mj_stateSize(found, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    states = np.zeros((COUNT, size))
    for index in range(COUNT):
        data.qpos[:], data.qvel[:] = begin[index], 0.0
        mujoco.mj_getState(found, data, states[index], mujoco.mjtState.mjSTATE_FULLPHYSICS)
    each = np.repeat(wanted.swapaxes(0, 1), steps, 1)

    def batch() -> None:
        stepper.place(begin)
        for control in wanted:
            stepper.step(control, steps)

    with rollout.Rollout(nthread=0) as pool:

        def rolled() -> None:
            pool.rollout([found] * COUNT, [data], states, each)

        spent = _interleaved([batch, rolled])
        last = pool.rollout([found] * COUNT, [data], states, each)[0][:, -1, 1 : 1 + found.nq]
    total = COUNT * CONTROLS * steps
    speeds = {name: total / seconds for name, seconds in zip(("batch", "rollout"), spent, strict=True)}
    return speeds | {"ratio": speeds["batch"] / speeds["rollout"], "difference": float(np.abs(last - stepper.position).max())}


def _interleaved(runs: list[Callable[[], None]]) -> list[float]:
    """CPU seconds of each, medians; every round runs all of them."""
    spent: list[list[float]] = [[] for _ in runs]
    for each in range(ROUNDS + 1):
        for times, run in zip(spent, runs, strict=True):
            began = time.process_time()
            run()
            if each:
                times.append(time.process_time() - began)
    return [float(np.median(times)) for times in spent]


def mjx(kind: str) -> None:
    """Prints steps per CPU second; for a process of its own."""
    found = model(kind)
    stepper = MjxStepper(found, MJX_COUNT)
    stepper.place(start(kind, MJX_COUNT))
    wanted = controls(found, kind, MJX_COUNT, MJX_CONTROLS)
    for _ in range(2):  # the state that comes out has other weak types than the fresh one, so that the second call compiles again
        stepper.step(wanted[0], MJX_STEPS)
        np.asarray(stepper.position)
    began = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for control in wanted:
        stepper.step(control, MJX_STEPS)
    finite = bool(np.isfinite(stepper.position).all())
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - began
    print(json.dumps({"steps_per_cpu_s": MJX_COUNT * MJX_CONTROLS * MJX_STEPS / spent, "compile_cpu_s": began, "finite": finite}))


def main() -> None:
    if len(sys.argv) > 2:
        mjx(sys.argv[2])
        return
    measured: dict[str, Any] = {"mujoco": mujoco.__version__, "count": COUNT}
    for kind in ("free", "reach", "pick"):
        for steps in (10, 20):
            row = against_rollout(kind, steps)
            measured[f"{kind} {steps}"] = row
            reached = f"{row['ratio']:.2f} of it, {TARGET} wanted: {_results.yes(row['ratio'] >= TARGET)}"
            print(
                f"{kind:<6} {steps} steps a control: batch {row['batch']:,.0f}, rollout {row['rollout']:,.0f} steps/CPU s; {reached}",
                flush=True,
            )
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {MJX_FLAG}".strip(), "JAX_PLATFORMS": "cpu"}
    child = subprocess.run([sys.executable, __file__, "--mjx", "free"], env=env, capture_output=True, text=True, check=True)
    row = json.loads(child.stdout.splitlines()[-1])
    measured["mjx free"] = row
    reached = f"{MJX_TARGET:,.0f} wanted: {_results.yes(row['steps_per_cpu_s'] >= MJX_TARGET)}"
    print(f"MJX, free arm, {MJX_COUNT} copies: {row['steps_per_cpu_s']:,.0f} steps/CPU s; {reached}")
    _results.keep("robotics", "physics", measured)


if __name__ == "__main__":
    main()
