"""Measures the dynamic traffic model of the city twin against UNsim, and its gradients against finite differences.

"dynamic": Chicago-Sketch, a million vehicles in two of three hours, steps of 30 s, routes updated every 300 s: CPU seconds of one core
for the run and for the gradient of the vehicle-hours by all tolls, ours and UNsim's in the same run, each without compiling; the
gradient by tolls and demand in float64 against finite differences. Zones stand at the nodes that their connectors lead to, speeds are
kept between 10 and 30 m/s and links at 1,000 m or more, as UNsim's own example does, so that both engines get the same links, capacities
and jam densities. UNsim lives in an environment of its own (pip install unsim==0.13.1 jax), named by --peer. Writes
`benchmarks/results/city.json` and prints one table.

  taskset -c 0 python benchmarks/city_dynamic.py --peer VENV/bin/python [--shared FOLDER]
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from _results import ROOT, keep

from domains.city import tntp  # noqa: E402
from domains.city.network import Network, build  # noqa: E402
from domains.city.transmission import given, plan, simulate  # noqa: E402

VEHICLES, DURATION, LOADED, DT = 1e6, 10_800.0, 7_200.0, 30.0
JAM = 0.2  # vehicles a metre and lane, and w = 5 m/s: capacities of the triangle follow
WORST_GRADIENT = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--peer", type=Path, help="a python with unsim; without it nothing is compared")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    folder = arguments.shared / "data" / "mobility" / "tntp"
    if not folder.is_dir():
        print(f"dynamic: skipped, there is no folder {folder}")
        return 0
    network, trips = chicago(folder)
    measured = ours(network, trips, arguments.repeats)
    keep("city", "dynamic", measured)
    measured["gradient_check"] = check()
    if arguments.peer:
        measured["peer"] = peer(network, trips, arguments.peer)
    keep("city", "dynamic", measured)
    print("\n".join(table(measured)))
    return 0


def chicago(folder: Path) -> tuple[Network, np.ndarray]:
    """The roads of Chicago-Sketch, and its trips scaled to a million, veh/h."""
    net, trips = (next((folder / "Chicago-Sketch").glob(f"*_{what}.tntp")) for what in ("net", "trips"))
    whole = tntp.read_network(net)
    zones = whole.zones
    connector = (whole.start < zones) | (whole.end < zones)
    at = np.empty(zones, np.int64)
    out = whole.start < zones
    at[whole.start[out]] = whole.end[out] - zones
    roads = ~connector
    speed = np.clip(whole.free_speed[roads], 10.0, 30.0)
    lanes = np.where(whole.capacity[roads] > 2500, 3.0, 1.0)
    network = build(
        start=whole.start[roads] - zones,
        end=whole.end[roads] - zones,
        length=np.maximum(whole.length[roads], 1000.0),
        free_speed=speed,
        lanes=lanes,
        capacity=3600 * JAM * lanes * speed * 5 / (speed + 5),
        zone=at,
    )
    matrix = tntp.read_trips(trips).trips * ~np.eye(zones, dtype=bool)
    return network, matrix * VEHICLES / matrix.sum() / (LOADED / 3600)


def ours(network: Network, trips: np.ndarray, repeats: int) -> dict:
    """Seconds of the run and of the gradient by all tolls."""
    laid = plan(network, DURATION, dt=DT, update=300, destinations=np.flatnonzero(trips.sum(0) > 0))
    profile = (np.arange(3) * 3600 < LOADED).astype(float)
    inputs = given(laid, trips, profile=profile, toll=np.zeros((laid.steps // laid.every, network.links)))
    result: dict = {"links": network.links, "steps": laid.steps, "destinations": len(laid.destinations), "memory": laid.memory}

    def hours(p: dict) -> jax.Array:
        return simulate(laid, p).vehicle_hours

    def totals(p: dict) -> tuple[jax.Array, ...]:
        run = simulate(laid, p)
        return run.vehicle_hours, run.delay, run.started[-1], run.ended[-1], (run.entered[-1] - run.left[-1]).sum() + run.waiting[-1].sum()

    result["run"], answer = timed(totals, inputs, repeats)
    result["run"] |= dict(zip(("vehicle_hours", "delay", "started", "ended", "underway"), map(float, answer), strict=True))

    def by_toll(p: dict) -> jax.Array:
        return jax.grad(lambda toll: hours({**p, "toll": toll}))(p["toll"])

    result["gradient"], slope = timed(by_toll, inputs, 1)
    result["gradient"]["finite"] = bool(jnp.isfinite(slope).all())
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"ours: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def timed(call: Callable, inputs: dict, repeats: int) -> tuple[dict, object]:
    """CPU seconds to compile and to run, and what it gives."""
    began = time.process_time()
    run = jax.jit(call).lower(inputs).compile()
    seconds = {"compile_s": time.process_time() - began, "cpu_s": float("inf")}
    for _ in range(repeats):
        began = time.process_time()
        answer = jax.block_until_ready(run(inputs))
        seconds["cpu_s"] = min(seconds["cpu_s"], time.process_time() - began)
    return seconds, answer


def check() -> dict:
    """Worst relative error of gradients by tolls and demand, float64, on a congested grid of 5 x 5 nodes."""
    rng = np.random.default_rng(0)
    node = np.arange(25).reshape(5, 5)
    ways = np.concatenate([np.stack([node[:, :-1], node[:, 1:]], -1).reshape(-1, 2), np.stack([node[:-1], node[1:]], -1).reshape(-1, 2)])
    start, end = np.concatenate([ways, ways[:, ::-1]]).T
    network = build(start=start, end=end, length=rng.uniform(400, 900, len(start)), capacity=900.0, zone=node[::2, ::2].ravel())
    with jax.enable_x64():
        laid = plan(network, 2400, dt=20, update=200)
        inputs = given(laid, rng.uniform(50, 250, (9, 9)), profile=np.array([1.0, 0.5]), toll=rng.uniform(0, 20, network.links))

        def hours(p: dict) -> jax.Array:
            return simulate(laid, p).vehicle_hours

        value, slope = jax.jit(hours), jax.jit(jax.grad(hours))(inputs)
        errors: dict = {"delay_share": float(jax.jit(lambda p: simulate(laid, p).delay)(inputs) / value(inputs))}
        for name in ("toll", "demand"):
            along = jnp.asarray(rng.standard_normal(inputs[name].shape) * (np.asarray(inputs[name]) > 0))
            step = 1e-6
            high, low = (value({**inputs, name: inputs[name] + sign * step * along}) for sign in (1, -1))
            expected = float((high - low) / (2 * step))
            errors[name] = abs(float((slope[name] * along).sum()) / expected - 1)
    print(f"gradients: {json.dumps(errors)}", file=sys.stderr, flush=True)
    return errors


def peer(network: Network, trips: np.ndarray, python: Path) -> dict:
    """What UNsim measured of itself."""
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.npz"
        np.savez(
            case, dt=DT, duration=DURATION, until=LOADED, nodes=network.nodes, start=network.start, end=network.end, length=network.length,
            speed=network.free_speed, capacity=network.capacity, jam_density=JAM * network.lanes, zone=network.zone, trips=trips,
        )  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        words = [python, Path(__file__).with_name("_unsim_dynamic.py"), case]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"the peer ended with {done.returncode}: {done.stderr[-500:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"peer: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def table(measured: dict) -> list[str]:
    """Markdown: seconds, times faster, what is reached."""
    theirs = measured.get("peer", {})
    runs = {"run": ("duo", "duo_logit"), "gradient by tolls": ("gradient",)}
    lines = [
        f"\n**a million vehicles on Chicago-Sketch**, {measured['links']} links, {measured['steps']} steps, CPU seconds of one core",
        "",
        "| what | s | to compile | UNsim | times faster | target | reached |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for what, kinds in runs.items():
        one = measured["run" if what == "run" else "gradient"]
        for kind in kinds:
            seconds = theirs.get(kind, {}).get("cpu_s")
            times = seconds / one["cpu_s"] if seconds else None
            reached = "yes" if times is not None and times >= 1 else "**no**"
            shown = "-" if seconds is None else f"{seconds:.2f} ({kind})"
            lines.append(f"| {what} | {one['cpu_s']:.2f} | {one['compile_s']:.1f} | {shown} | {times or 0:.1f} | 1 | {reached} |")
    worst = max(measured["gradient_check"][name] for name in ("toll", "demand"))
    reached = "yes" if worst <= WORST_GRADIENT else "**no**"
    return [*lines, "", f"gradients differ from finite differences by {worst:.1e}, target {WORST_GRADIENT:g}: {reached}"]


if __name__ == "__main__":
    sys.exit(main())
