"""Measures models of tosses calibrated from real ones: `make bench-robotics_tosses`.

calibration: the contact of a cube is fitted to the first 370 of 470 recorded tosses and judged on the last 100, beside the peer's script,
which fits a grid to 24 of the first 370 and is judged on the same 100. Two seeds of the search.
posterior: `twinsim run` learns p(contact | four tosses) from simulated tosses; its exam is on held-out simulated ones, beside the prior,
a linear regression and rejection; then it is asked of the recorded tosses, 30 groups of four, for the mass of friction within 0.15 to 0.25.
Writes `benchmarks/results/robotics_tosses.json` and, with --docs, the tables between the marker lines of docs/robotics.md.

  python benchmarks/robotics_tosses.py [--shared FOLDER] [--out FOLDER] [--parts calibration,posterior] [--seeds 3] [--docs]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import xarray as xr
import yaml
from _results import ROOT, keep, read, yes

from domains.robotics import tosses

TARGET = 14.0  # % of the width
MASS = (0.15, 0.25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-tosses")
    parser.add_argument("--parts", default="calibration,posterior")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/robotics.md")
    given = parser.parse_args()
    file = given.shared / "data" / "robotics" / "contactnets_tosses_train.npz"
    if not file.is_file():
        print(f"tosses: skipped, there is no file {file}")
        return 0
    for part, measure in {"calibration": calibration, "posterior": posterior}.items():
        if part in given.parts.split(","):
            keep("robotics_tosses", part, measure(given, file))
    measured = read("robotics_tosses")
    lines = [*(calibration_table(measured["calibration"]) if "calibration" in measured else []),
             *(posterior_table(measured["posterior"]) if "posterior" in measured else [])]  # fmt: skip
    print("\n".join(lines))
    if given.docs:
        page = ROOT / "docs" / "robotics.md"
        before, opening, rest = page.read_text().partition("<!-- tosses -->")
        _, closing, after = rest.partition("<!-- /tosses -->")
        page.write_text("\n".join([before + opening, "", *lines, "", closing + after]))
    return 0


def calibration(given: argparse.Namespace, file: Path) -> dict:
    """Errors on the last 100 tosses by method, and CPU seconds."""
    peer = given.shared / "peers" / "robotics" / "toss_baseline.py"
    answer: dict = {"peer": {}, "ours": []}
    if peer.is_file():
        said = subprocess.run([sys.executable, str(peer), str(file)], check=True, capture_output=True, text=True).stdout.splitlines()
        for line in said:
            if line.startswith("{"):
                row = json.loads(line)
                answer["peer"][row.pop("name")] = row
            else:
                answer["peer cpu_s"] = float(line.split()[0])
    for seed in range(given.seeds):
        folder = given.out / f"fit-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        tosses.calibrate_files(folder, tosses=str(file), seed=seed)
        found = json.loads((folder / "fit.json").read_text())
        answer["ours"].append({"seed": seed, "cpu_s": time.process_time() - began, **found})
    recorded = tosses.read(file)
    unseen = recorded.part(slice(370, None))
    for name, values in {"default": {}, "published friction": {"friction": recorded.published}}.items():
        answer[name] = tosses.judge(unseen, tosses.DEFAULT | values).means()
    # the contact alone: what the fit leaves of its gain where the recorder is not corrected
    alone = tosses.fit(recorded.part(slice(0, 370)), list(tosses.CONTACT), seed=0)
    answer["contact alone"] = tosses.judge(unseen, alone.values).means()
    return answer


def calibration_table(measured: dict) -> list[str]:
    lines = [
        "**Last 100 of 470 recorded tosses**, fitted to the first 370",
        "",
        "| method | position, % of the width | rotation, degrees | last position, mm | CPU s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in measured["peer"].items():
        cpu = f"{measured['peer cpu_s']:.0f}, all" if name.startswith("grid") else ""
        lines.append(f"| script: {name} | {row['pos']:.1f} | {row['rot']:.1f} | {1000 * row['final']:.1f} | {cpu} |")
    means = measured["contact alone"]
    lines.append(
        f"| twinsim, contact alone | {means['position_percent']:.1f} | {means['rotation_deg']:.1f} | {1000 * means['final_m']:.1f} | |"
    )
    for one in measured["ours"]:
        means = one["errors"]["fitted"]
        lines.append(
            f"| **twinsim**, contact and recorder, seed {one['seed']} | **{means['position_percent']:.1f}** | {means['rotation_deg']:.1f}"
            f" | {1000 * means['final_m']:.1f} | {one['cpu_s']:.0f} |"
        )
    worst = max(one["errors"]["fitted"]["position_percent"] for one in measured["ours"])
    return [*lines, "", f"Target: at most {TARGET:g} %. Reached by every seed: {yes(worst <= TARGET)} ({worst:.2f} %).", ""]


def posterior(given: argparse.Namespace, file: Path) -> dict:
    """The exam's scores of the model and its baselines; quantiles of friction and its mass, by group of recorded tosses."""
    folder = given.out / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(file, folder / "tosses.npz")
    asked = yaml.safe_load((ROOT / "scenarios/robotics/cube_friction.yaml").read_text())
    asked |= {"file": "tosses.npz", "groups": 30, "members": 200, "command": "twinsim run cube.yaml"}
    (folder / "cube.yaml").write_text(yaml.safe_dump(asked))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "twinsim", "run", str(folder / "cube.yaml"), f"out={given.out}"]
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = max((given.out / "runs").iterdir(), key=lambda each: each.stat().st_mtime)
    drawn = xr.open_zarr(run / "samples.zarr")["friction"].values  # [member, group]
    within = ((drawn >= MASS[0]) & (drawn <= MASS[1])).mean(0)
    return {
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "exam": json.loads((run / "metrics.json").read_text()),
        "friction": {"medians": np.median(drawn, 0).round(4).tolist(), "mass_within": float(within.mean()),
                     "quantiles": np.quantile(drawn, [0.05, 0.5, 0.95]).round(4).tolist()},
    }  # fmt: skip


def posterior_table(measured: dict) -> list[str]:
    scores = measured["exam"]["scores"]
    rows = ("CRPS of the logarithm", "truth within the 90 % interval", "width of the 90 % interval of the logarithm")
    lines = [
        "**Held-out simulated tosses**, groups of four",
        "",
        f"| parameter | score | {' | '.join(scores)} |",
        "| --- " * (2 + len(scores)) + "|",
    ]
    for name in ("friction", "time_constant", "damping_ratio"):
        for row in rows:
            cells = [f"{table[f'{name}: {row}']['value']:.3f}" for table in scores.values()]
            lines.append(f"| {name.replace('_', ' ')} | {row} | {' | '.join(cells)} |")
    found = measured["friction"]
    low, middle, high = found["quantiles"]
    told = (
        f"friction {middle:.3f} (90 % of draws {low:.3f} to {high:.3f}), mass within {MASS[0]:g} to {MASS[1]:g}: {found['mass_within']:.2f}"
    )
    cpu = f"{measured['cpu_s']:.0f} CPU s, simulation and training included"
    return [*lines, "", f"Recorded tosses, {len(found['medians'])} groups of four: {told}. {cpu}.", ""]


if __name__ == "__main__":
    sys.exit(main())
