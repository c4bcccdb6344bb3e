"""Measures the city twin against its peers and its targets.

"assignment": user equilibria of the TNTP networks to a gap of 1e-6 against AequilibraE's bi-conjugate Frank-Wolfe in the same run, in CPU
seconds of one core, the fastest of `--repeats`; their objectives and flows against the published ones; and 64 scenarios of Anaheim in one
call against 64 calls of ours and 64 runs of the peer's. The peer lives in an environment of its own (pip install aequilibrae), named by
--peer; without it the table has no times to compare with. Writes `benchmarks/results/city.json` and prints one table.

  taskset -c 0 python benchmarks/city.py --peer VENV/bin/python [--shared FOLDER] [--networks SiouxFalls,Anaheim]
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep, read, yes

from domains.city import tntp  # noqa: E402
from domains.city.equilibrium import equilibria, equilibrium  # noqa: E402
from domains.city.network import Network  # noqa: E402

GAP, TIGHT, ROUGH = 1e-6, 1e-10, 1e-4
SCENARIOS = 64
FEWEST_TIMES_FASTER = {"SiouxFalls": 20.0, "Anaheim": 2.0, "Chicago-Sketch": 1.0}
FEWEST_TIMES_FASTER_BATCH = 5.0
WORST_OBJECTIVE, WORST_FLOWS_PERCENT = 1e-6, 0.02
OPTIMA = {"SiouxFalls": 4_231_335.287, "Anaheim": 1_286_032.171, "Barcelona": 1_265_654.922, "Chicago-Sketch": 17_313_018.739}  # veh/h min
WEIGHTS = {"Chicago-Sketch": {"toll_weight": 0.02, "distance_weight": 0.04}}  # min a cent, min a mile: its README


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--peer", type=Path, help="a python with aequilibrae; without it nothing is compared")
    parser.add_argument("--networks", default=",".join(OPTIMA))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    folder = given.shared / "data" / "mobility" / "tntp"
    if not folder.is_dir():
        print(f"assignment: skipped, there is no folder {folder}")
        return 0
    names = given.networks.split(",")
    if unknown := set(names) - set(OPTIMA):
        parser.error(f"--networks: expected some of {', '.join(OPTIMA)}, got {', '.join(sorted(unknown))}")
    measured = {name: assignment(name, folder, given) for name in names}
    if "Anaheim" in names:
        measured["64 scenarios"] = batch(folder, given)
    keep("city", "assignment", {**read("city").get("assignment", {}), **measured})
    print("\n".join(table(measured)))
    return 0


def assignment(name: str, folder: Path, given: argparse.Namespace) -> dict:
    """Seconds, accuracy and the peer's, of one network."""
    network, trips, flow = case(name, folder)
    unique = network.alpha * network.beta > 0
    result: dict = {}
    for gap in (GAP, TIGHT):
        ours: list[float] = []
        for _ in range(given.repeats):
            seconds, found = timed(lambda gap=gap: equilibrium(network, trips, gap))
            ours.append(seconds)
        result[f"gap {gap:g}"] = {
            "cpu_s": min(ours),
            "gap": found.gap,
            "objective_error": abs(found.objective / 60 / OPTIMA[name] - 1),
            "flows_rmse_percent": float(100 * np.sqrt(np.mean((found.flow - flow)[unique] ** 2)) / flow[unique].mean()),
            "searches": found.iterations,
        }
    if given.peer and name in FEWEST_TIMES_FASTER:
        runs = [peer(name, given, GAP) for _ in range(1 if name == "Chicago-Sketch" else given.repeats)]
        best = min(runs, key=lambda one: one["cpu_s"])
        result["peer"] = {key: best[key] for key in ("solve_s", "cpu_s", "iters", "rgap", "our_rgap", "beckmann", "rmse_pct")}
    print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def batch(folder: Path, given: argparse.Namespace) -> dict:
    """Seconds of many scenarios of Anaheim, trips +-30 % and tolls here and there, in one call, in as many calls, and by the peer."""
    network, trips, _ = case("Anaheim", folder)
    rng = np.random.default_rng(0)
    trips = trips * rng.uniform(0.7, 1.3, (SCENARIOS, 1, 1))
    toll = 30 * rng.random((SCENARIOS, network.links)) * (rng.random((SCENARIOS, network.links)) < 0.03)
    result: dict = {}
    for gap in (ROUGH, GAP):
        one, many = [], []
        for _ in range(given.repeats):
            seconds, together = timed(lambda gap=gap: equilibria(network, trips, gap, toll=toll))
            many.append(seconds)
            seconds, apart = timed(lambda gap=gap: [equilibrium(network, trips[i], gap, toll=toll[i]) for i in range(SCENARIOS)])
            one.append(seconds)
        difference = max(abs(a.objective / b.objective - 1) for a, b in zip(together, apart, strict=True))
        result[f"gap {gap:g}"] = {
            "one_call_s": min(many), "single_calls_s": min(one), "worst_gap": max(each.gap for each in together),
            "objectives_differ_by": difference,
        }  # fmt: skip
        if given.peer:  # the demand varies about 1, so the plain case stands for them
            result[f"gap {gap:g}"]["peer_run_s"] = min(peer("Anaheim", given, gap)["cpu_s"] for _ in range(given.repeats))
    print(f"{SCENARIOS} scenarios: {json.dumps(result)}", file=sys.stderr, flush=True)
    return result


def case(name: str, folder: Path) -> tuple[Network, np.ndarray, np.ndarray]:
    """Network, trips and published flows."""
    net, trips, flow = (next((folder / name).glob(f"*_{what}.tntp")) for what in ("net", "trips", "flow"))
    network = tntp.read_network(net, **WEIGHTS.get(name, {}))
    return network, tntp.read_trips(trips).trips, tntp.read_flows(flow, network)[0]


def timed(call: Callable) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gives; a missed gap ends the benchmark."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began = time.process_time()
        answer = call()
        return time.process_time() - began, answer


def peer(name: str, given: argparse.Namespace, gap: float) -> dict:
    """What AequilibraE measured of itself, its own set-up left out."""
    script, data = given.shared / "peers" / "mobility" / "aequilibrae_ue.py", given.shared / "data" / "mobility" / "tntp"
    weights = ["--toll", "0.02", "--dist", "0.04"] if name in WEIGHTS else []
    words = [given.peer, script, data, name, "--alg", "bfw", "--gap", str(gap), "--cores", "1", *weights]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"the peer ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout[done.stdout.index('{"net"') :])


def table(measured: dict) -> list[str]:
    """Markdown: seconds, times faster, accuracy, and what is reached."""
    lines = [
        "\n**user equilibrium**, CPU seconds of one core",
        "",
        "| network | s to 1e-6 | AequilibraE bfw | times faster | target | reached | objective error | RMSE | s to 1e-10 | RMSE |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in measured.items():
        if name not in OPTIMA:
            continue
        loose, tight = one[f"gap {GAP:g}"], one[f"gap {TIGHT:g}"]
        target = FEWEST_TIMES_FASTER.get(name)
        times = one["peer"]["cpu_s"] / loose["cpu_s"] if "peer" in one else None
        reached = loose["objective_error"] <= WORST_OBJECTIVE and tight["flows_rmse_percent"] <= WORST_FLOWS_PERCENT
        reached = reached and (target is None or (times is not None and times >= target))
        peers = _shown(one.get("peer", {}).get("cpu_s"))
        lines.append(
            f"| {name} | {loose['cpu_s']:.3f} | {peers} | {_shown(times)} | {_shown(target)} | {yes(reached)}"
            f" | {loose['objective_error']:.1e} | {loose['flows_rmse_percent']:.4f} %"
            f" | {tight['cpu_s']:.3f} | {tight['flows_rmse_percent']:.6f} % |"
        )
    if "64 scenarios" in measured:
        lines += [
            f"\n**{SCENARIOS} scenarios of Anaheim** in one call, CPU seconds",
            "",
            "| gap | one call | single calls | times | AequilibraE, 64 runs | times faster | target | reached |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for gap, one in measured["64 scenarios"].items():
            runs = SCENARIOS * one["peer_run_s"] if "peer_run_s" in one else None
            times = runs / one["one_call_s"] if runs else None
            reached = times is not None and times >= FEWEST_TIMES_FASTER_BATCH
            lines.append(
                f"| {gap[4:]} | {one['one_call_s']:.2f} | {one['single_calls_s']:.2f} | {one['single_calls_s'] / one['one_call_s']:.1f}"
                f" | {_shown(runs)} | {_shown(times)} | {FEWEST_TIMES_FASTER_BATCH:g} | {yes(reached)} |"
            )
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
