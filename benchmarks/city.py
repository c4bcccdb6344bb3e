"""Measures the city twin against its peers and its targets.

"assignment": user equilibria of the TNTP networks to a gap of 1e-6 against AequilibraE's bi-conjugate Frank-Wolfe in the same run, in CPU
seconds of one core, the fastest of `--repeats`; their objectives and flows against the published ones; and 64 scenarios of Anaheim in one
call against 64 calls of ours and 64 runs of the peer's. The peer lives in an environment of its own (pip install aequilibrae), named by
--peer; without it the table has no times to compare with.
"scenario": seconds from `twinsim run city/thirty` to its report, on the default city with 20 sampled days, once the model is trained and
programs are compiled. Both write `benchmarks/results/city.json` and print a table; --readme puts all that the benchmarks of the city have
measured (city, city_air, city_calibration, city_demand, city_dynamic, city_optimise, city_sensors, city_sumo) into README.md.

  taskset -c 0 python benchmarks/city.py --peer VENV/bin/python [--shared FOLDER] [--networks SiouxFalls,Anaheim] [--readme]
  python benchmarks/city.py --parts scenario
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep, read, write_readme, yes

from domains.city import tntp  # noqa: E402
from domains.city.equilibrium import equilibria, equilibrium  # noqa: E402
from domains.city.network import Network  # noqa: E402

GAP, TIGHT, ROUGH = 1e-6, 1e-10, 1e-4
SCENARIOS = 64
FEWEST_TIMES_FASTER = {"SiouxFalls": 20.0, "Anaheim": 2.0, "Chicago-Sketch": 1.0}
FEWEST_TIMES_FASTER_BATCH, MOST_SECONDS = 5.0, 60.0
WORST_OBJECTIVE, WORST_FLOWS_PERCENT = 1e-6, 0.02
OPTIMA = {"SiouxFalls": 4_231_335.287, "Anaheim": 1_286_032.171, "Barcelona": 1_265_654.922, "Chicago-Sketch": 17_313_018.739}  # veh/h min
WEIGHTS = {"Chicago-Sketch": {"toll_weight": 0.02, "distance_weight": 0.04}}  # min a cent, min a mile: its README


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--peer", type=Path, help="a python with aequilibrae; without it nothing is compared")
    parser.add_argument("--networks", default=",".join(OPTIMA))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default="assignment,scenario")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-city")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    given = parser.parse_args()
    folder = given.shared / "data" / "mobility" / "tntp"
    parts = [part for part in given.parts.split(",") if part]
    if "assignment" in parts and not folder.is_dir():
        print(f"assignment: skipped, there is no folder {folder}")
        parts.remove("assignment")
    if "assignment" in parts:
        assignments(parser, given, folder)
    if "scenario" in parts:
        keep("city", "scenario", scenario(given.out.absolute()))
        print(json.dumps(read("city")["scenario"]))
    if given.readme:
        write_readme("city", ["", *summary(read("city"), read("city_air")), ""])
    return 0


def assignments(parser: argparse.ArgumentParser, given: argparse.Namespace, folder: Path) -> None:
    """Measures, keeps and prints the user equilibria."""
    names = given.networks.split(",")
    if unknown := set(names) - set(OPTIMA):
        parser.error(f"--networks: expected some of {', '.join(OPTIMA)}, got {', '.join(sorted(unknown))}")
    measured = {name: assignment(name, folder, given) for name in names}
    if "Anaheim" in names:
        measured["64 scenarios"] = batch(folder, given)
    keep("city", "assignment", {**read("city").get("assignment", {}), **measured})
    print("\n".join(table(measured)))


def scenario(out: Path, first: str = "city/low_emission_zone", then: str = "city/thirty") -> dict:
    """Wall and CPU seconds of a scenario of 20 days, report included, after another one has trained the model and compiled."""

    def run(name: str) -> tuple[float, float]:
        code = "import sys; from twinsim.cli import main; sys.exit(main())"
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, "run", name, f"out={out}", "set.members=20"], cwd=ROOT, check=False)
        if done.returncode:
            sys.exit(f"twinsim run {name} ended with {done.returncode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter() - begun, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    run(first)
    shutil.rmtree(out / "runs", ignore_errors=True)
    wall, cpu = run(then)
    return {"scenario": then, "days": 20, "wall_s": wall, "cpu_s": cpu}


def summary(city: dict, air: dict) -> list[str]:
    """Markdown: every target of the city twin for which something was measured."""
    rows = ["| test | measured | to reach | reached |", "| --- | --- | --- | --- |"]

    def row(test: str, measured: str, target: str, reached: bool) -> None:
        rows.append(f"| {test} | {measured} | {target} | {yes(reached)} |")

    if known := {name: one for name, one in city.get("assignment", {}).items() if name in OPTIMA}:
        tight = {name: one[f"gap {TIGHT:g}"] for name, one in known.items()}
        worst = max(one["objective_error"] for one in tight.values())
        row(
            f"user equilibrium to a gap of {TIGHT:g}, {', '.join(known)}: objective",
            f"{worst:.0e}",
            "within 1e-6",
            worst <= WORST_OBJECTIVE,
        )
        off = max(one["flows_rmse_percent"] for one in tight.values())
        row("its flows, RMSE where unique", f"{off:.0e} %", "<= 0.02 %", off <= WORST_FLOWS_PERCENT)
        for name, least in FEWEST_TIMES_FASTER.items():
            if "peer" in known.get(name, {}):
                times = known[name]["peer"]["cpu_s"] / tight[name]["cpu_s"]
                shown = f"{times:.0f} times, {tight[name]['cpu_s']:.2g} CPU s"
                row(f"{name} to {TIGHT:g} against AequilibraE to {GAP:g}", shown, f">= {least:g} times faster", times >= least)
    if many := city.get("assignment", {}).get("64 scenarios", {}).get(f"gap {GAP:g}"):
        own = many["single_calls_s"] / many["one_call_s"]
        row("64 scenarios of Anaheim in one call, against 64 of ours", f"{own:.1f} times", ">= 5 times faster", own >= 5)
        if "peer_run_s" in many:
            times = SCENARIOS * many["peer_run_s"] / many["one_call_s"]
            row("the same against 64 of AequilibraE", f"{times:.0f} times", ">= 5 times faster", times >= 5)
    if dynamic := city.get("dynamic"):
        if "peer" in dynamic:
            forward = dynamic["peer"]["duo"]["cpu_s"] / dynamic["run"]["cpu_s"]
            back = dynamic["peer"]["gradient"]["cpu_s"] / dynamic["gradient"]["cpu_s"]
            shown = f"{forward:.1f} times forward ({dynamic['run']['cpu_s']:.1f} CPU s), {back:.1f} times with gradient"
            row("dynamic model, Chicago-Sketch, 1 M vehicles, against UNsim", shown, ">= 1", forward >= 1)
        off = max(dynamic["gradient_check"]["toll"], dynamic["gradient_check"]["demand"])
        row("its gradients against finite differences, float64", f"{off:.0e}", "<= 1e-3", off <= 1e-3)
    if tracer := air.get("dispersion"):
        ratios = [one["ratio to R-LINE: mean, least, most"] for one in tracer.values()]
        low, high = min(r[1] for r in ratios), max(r[2] for r in ratios)
        row(
            f"dispersion against R-LINE, {len(ratios)} tests",
            f"{low:.3f} to {high:.3f} of its output",
            "within 10 %",
            low >= 0.9 and high <= 1.1,
        )
        against = [one["against the tracer"] for one in tracer.values() if "against the tracer" in one]
        fac2, bias = min(one["FAC2"] for one in against), max((one["FB"] for one in against), key=abs)
        row(
            "against the tracer of Idaho Falls",
            f"FAC2 {fac2:.2f}, FB {bias:.2f}",
            "FAC2 >= 0.9, abs(FB) <= 0.2",
            fac2 >= 0.9 and abs(bias) <= 0.2,
        )
    if emitted := air.get("emissions"):
        ratios = {
            f"{kind} {name}": one[f"{kind}, by mean speed: ratio to SUMO"] for name, one in emitted.items() for kind in ("CO2", "NOx")
        }
        shown = ", ".join(f"{name} {value:.3f}" for name, value in ratios.items())
        row(
            "emissions of Bologna by links' mean speeds, of SUMO's by the second",
            shown,
            "within 5 %",
            all(abs(v - 1) <= 0.05 for v in ratios.values()),
        )
    if fits := {name: one for name, one in city.get("calibration", {}).items() if name.startswith("Wildau")}:
        share = min(one["calibrated"]["GEH below 5"] for one in fits.values())
        out = [one["calibrated, held out one by one"]["GEH below 5"] for one in fits.values()]
        before = max(one["prior"]["GEH below 5"] for one in fits.values())
        shown = f"{share:.0%} (before {before:.0%}; counts left out one by one {min(out):.0%} to {max(out):.0%})"
        row("calibration on Wildau's counts, GEH < 5", shown, ">= 85 %", share >= 0.85)
    if demand := city.get("demand", {}).get("told", {}).get("nothing"):
        ours, single, gravity = (demand[name]["cpc"] for name in ("mean of draws", "single draws", "gravity"))
        shown = f"{ours[0]:.3f} ({ours[1]:.3f} to {ours[2]:.3f}); single draws {single[0]:.3f}; gravity {gravity[0]:.3f}"
        row("OD matrices, five-fold over 223 counties, CPC of the mean of draws", shown, ">= 0.54", ours[0] >= 0.54)
    if loops := city.get("loops", {}).get("seeds"):
        errors = [one["mae_mph"]["60"]["median"] for one in loops.values()]
        last = next(iter(loops.values()))["mae_mph"]["60"]
        beside = ", ".join(f"{name} {last[name]:.2f}" for name in ("persistence", "historic average"))
        shown = f"{np.mean(errors):.2f} mph ({len(errors)} seeds); {beside}"
        row("METR-LA 60 min ahead, MAE", shown, "< 5.15 mph", float(np.mean(errors)) < 5.15)
    if roadside := city.get("roadside", {}).get("seeds"):
        kinds = [name for name in next(iter(roadside.values()))["scores"]["twinsim"] if name.endswith(": CRPS")]
        means = {
            who: {k: np.mean([one["scores"][who][k] for one in roadside.values()]) for k in kinds} for who in ("twinsim", "days like it")
        }
        share = {k: means["twinsim"][k] / means["days like it"][k] for k in kinds}
        shown = ", ".join(f"{k.partition(':')[0]} {v:.2f}" for k, v in share.items())
        row(f"Marylebone Road air, CRPS over climatology's, {len(roadside)} seeds", shown, "< 1", max(share.values()) < 1)
    if tolls := city.get("optimise", {}).get("tolls on every link"):
        shown = f"{tolls['share_of_the_possible_gain']:.1%} of what marginal-cost tolls gain, {tolls['cpu_s']:.0f} CPU s"
        row(
            "tolls on Sioux Falls by gradient, judged by the exact equilibrium",
            shown,
            ">= 95 %",
            tolls["share_of_the_possible_gain"] >= 0.95,
        )
    if timed := city.get("scenario"):
        shown = f"{timed['wall_s']:.0f} s ({timed['cpu_s']:.0f} CPU s)"
        row(
            f"`{timed['scenario']}` with {timed['days']} sampled days to its report, compiled",
            shown,
            "< 60 s",
            timed["wall_s"] < MOST_SECONDS,
        )
    return rows


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
