"""Measures the city's dispersion and emissions against reference data: `make bench-city_air`.

"dispersion": EPA R-LINE's own output and the SF6 tracer of Idaho Falls 2008, tests 1, 2, 3 and 5 (near neutral, light wind, stable, very
stable). "speed": links x receptors x hours a CPU second, against the same model in plain numpy, by turns. "emissions": a SUMO run of
Bologna with HBEFA4 classes, second by second and from hourly means of links; its driving table was made on acosta, pasubio is held out.
Prints what it finds and writes `benchmarks/results/city_air.json`. Parts whose data or simulator are absent are skipped, and said to be.

  python benchmarks/city_air.py [--shared FOLDER] [--parts dispersion,speed,emissions] [--sumo PATH of the sumo program]
"""

import argparse
import array
import csv
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from _results import ROOT, keep
from scipy.special import erf

from domains.city import dispersion, emissions
from domains.city.dispersion import Heights, Weather

PARTS = ("dispersion", "speed", "emissions")
DISTANCES = (18.0, 36.0, 48.0, 66.0, 90.0, 120.0, 180.0)
TRACER = Heights(1.0, 1.5, 0.0)

# Tests 2 and 5, which the shared files leave out: u* w* mixing height L wind direction, R-LINE v1.2's output at DISTANCES for 1 g/(m s), in
# ug/m3 (EPA R-LINE v1.2 evaluation data, public domain, via paulopimenta6/rline_and_documentation @ 6a8d2c27)
REST = """
2 2 .29 1.19 359 -9.6 1.4 258.3 105339 51871.4 35806.3 22925.5 14413.2 9164.96 4686.02
2 3 .24 .93 270 -7.4 1.6 251.3 131973 66188.3 45705.9 29191.5 18304.9 11617.7 5926.79
2 4 .15 .93 165 -1.7 1.4 260.9 132194 56306.0 36281.8 21625.1 12763.0 7719.11 3748.45
2 9 .2 1.46 1100 -6.8 .7 246 103137 46158.9 30717.1 18932.2 11496.4 7075.62 3430.28
2 10 .34 1.51 1100 -29.8 2.5 247.5 107243 67839.6 52084.6 37293.7 26009.2 18140.3 10480.4
2 11 .29 1.42 1005 -20.2 2.5 248.3 117068 74993.1 57485.9 40842.5 28149.3 19375.2 10977.0
5 1 .19 1 190 17.3 2.4 265.3 208684 154146 137704 119874 102662 87549.0 68594.0
5 2 .14 1 120 10.9 2.1 259.2 265444 195826 175815 156063 137012 119376 96285.7
5 3 .12 1 96 6.9 2.0 251.1 307527 231673 207943 186360 166912 148853 123666
5 4 .12 1 96 7.9 1.6 260.1 318272 236958 212883 189911 168486 148884 122747
5 5 .06 1 34 9 1.7 287.8 350801 297243 260395 227454 202343 181291 151555
5 9 .11 1 84 16.3 2.1 266.3 277406 201675 178440 157182 137511 119362 94991.1
5 10 .05 1 26 4.9 1.8 281.8 323968 333288 298826 258742 226415 202633 174082
"""
CLASSES = {
    "passenger1": "PC_petrol_Euro-4",
    "passenger2a": "PC_diesel_Euro-6d",
    "passenger2b": "PC_petrol_Euro-6d",
    "passenger3": "PC_diesel_Euro-5",
    "passenger4": "PC_petrol_Euro-4",
    "passenger5": "PC_petrol_Euro-4",
}
CLASSES |= {name.replace("passenger", "ignoring"): value for name, value in CLASSES.items()} | {"bus": "UBus_Std_gt15-18t_Euro-VI_D-E"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sumo", default=shutil.which("sumo") or "", help="SUMO's program, of `pip install eclipse-sumo`")
    parser.add_argument("--links", type=int, default=500)
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    data = given.shared / "data" / "mobility"
    for part in parts:
        if part != "speed" and not data.is_dir():
            print(f"{part}: skipped, there is no folder {data}", flush=True)
            continue
        if part == "emissions" and not given.sumo:
            print("emissions: skipped, there is no sumo: pip install eclipse-sumo", flush=True)
            continue
        if part == "dispersion":
            found = tracer(data / "dispersion")
        elif part == "speed":
            found = speed(given.links)
        else:
            found = {city: bologna(data, city, given.sumo) for city in ("acosta", "pasubio")}
        print(json.dumps({part: found}, indent=1), flush=True)
        keep("city_air", part, found)
    return 0


def tracer(folder: Path) -> dict:
    """Ratio to R-LINE's output by test, and FAC2, FB, NMSE and R against what was measured, where the shared files have it."""
    met = [row for row in csv.DictReader((folder / "idaho_falls_2008_met.csv").open())]
    rows = {(r["test"], r["bag"], float(r["x_m"])): r for r in csv.DictReader((folder / "idaho_falls_2008_obs.csv").open())}
    names, table = [], []
    for m in met:
        names.append((m["test"], m["bag"]))
        values = [m["ustar"], m["wstar"], max(m["zic"], m["zim"], key=float), m["L"], m["ws"], m["wd"]]
        table.append([*map(float, values), *(float(rows[m["test"], m["bag"], x]["rline_unit_ugm3"]) for x in DISTANCES)])
    for line in REST.split("\n")[1:-1]:
        names.append(tuple(line.split()[:2]))
        table.append([float(word) for word in line.split()[2:]])
    table = np.array(table)
    found: dict = {}
    for as_given in (True, False):
        u_star, w_star, zi, L, U, direction = table[:, :6].T
        hours = weather(u_star, np.where((L > 0) & (not as_given), 0.0, w_star), zi, L, U, direction)
        receptors = np.array([[x, 0.0] for x in DISTANCES])
        line = np.array([[0.0, -500.0]]), np.array([[0.0, 500.0]])
        ours = 1e6 * np.asarray(dispersion.concentration(*line, receptors, np.ones((len(table), 1)), hours, TRACER))
        ratio = ours / table[:, 6:]
        for test in "1235":
            of_test = np.array([name[0] == test for name in names])
            scores = found.setdefault(f"test {test}", {})
            label = "" if as_given else ", w* 0 in stable air"
            scores[f"ratio to R-LINE: mean, least, most{label}"] = [float(f(ratio[of_test])) for f in (np.mean, np.min, np.max)]
            pairs = [
                (float(rows[*name, x]["obs_ppb"]), c * float(rows[*name, x]["q_gs"]) / 54 / 5.34)
                for name, cs in zip(names, ours, strict=True)
                for x, c in zip(DISTANCES, cs, strict=True)
                if name[0] == test and (*name, x) in rows and rows[*name, x]["obs_ppb"]
            ]
            if pairs:
                scores[f"against the tracer{label}"] = agreement(*np.array(pairs).T)
    return found


def agreement(observed: np.ndarray, modelled: np.ndarray) -> dict[str, float]:
    """The scores of Chang & Hanna (2004)."""
    ratio, mean = modelled / observed, (observed.mean() + modelled.mean()) / 2
    return {
        "n": len(observed),
        "FAC2": float(np.mean((ratio >= 0.5) & (ratio <= 2))),
        "FB": float((observed.mean() - modelled.mean()) / mean),
        "NMSE": float(np.mean((observed - modelled) ** 2) / (observed.mean() * modelled.mean())),
        "R": float(np.corrcoef(observed, modelled)[0, 1]),
    }


def weather(u_star, w_star, zi, L, U, direction) -> Weather:
    values = np.broadcast_arrays(*(np.asarray(x, np.float32) for x in (U, direction, u_star, L, w_star, zi, 0.053, 3.0)))
    return Weather(*values)


def speed(links: int) -> dict:
    """Million pairs of a link and a receptor a CPU second, here and in numpy, in turns; and the largest difference between the two."""
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 3000, (links, 2))
    end, receptors = start + rng.uniform(-100, 100, (links, 2)), rng.uniform(0, 3000, (links, 2))
    hours = weather(*(np.full(4, x) for x in (0.3, 0.0, 800.0, 60.0, 3.5)), np.array([10.0, 100.0, 200.0, 300.0]))
    q = np.ones((4, links), np.float32)
    few = min(200, links)
    jax.block_until_ready(dispersion.concentration(start, end, receptors, q, hours))
    ours, numpys, far = [], [], 0.0
    for _ in range(2):
        begun = time.process_time()
        c = np.asarray(dispersion.concentration(start, end, receptors, q, hours))
        ours.append(4 * links**2 / (time.process_time() - begun) / 1e6)
        begun = time.process_time()
        hour = jax.tree.map(lambda x: float(x[0]), hours)
        peer = sum(plain(a, b, receptors[:few], hour) for a, b in zip(start, end, strict=True))
        numpys.append(few * links / (time.process_time() - begun) / 1e6)
        far = float(np.abs(c[0, :few] / peer - 1).max())
    return {
        "million pairs a CPU s": float(np.median(ours)),
        "in numpy": float(np.median(numpys)),
        "times as fast": float(np.median(ours) / np.median(numpys)),
        "largest relative difference": far,
        "pairs": 4 * links**2,
    }


def plain(start: np.ndarray, end: np.ndarray, receptors: np.ndarray, m: Weather, step: float = 1.0) -> np.ndarray:
    """The same model as one would write it in numpy, all receptors at once: points every metre, their wind by iteration."""
    heights = Heights()
    zs, zr, s0 = heights.source, heights.receptor, heights.initial_sigma_z
    length = np.hypot(*(end - start))
    n = max(int(np.ceil(length / step)), 2)
    points = start + (end - start) * ((np.arange(n) + 0.5) / n)[:, None]
    theta = np.deg2rad(270 - m.wind_direction)
    dx, dy = np.moveaxis(receptors[:, None] - points, -1, 0)  # [receptor, point]
    X, Y = dx * np.cos(theta) + dy * np.sin(theta), dy * np.cos(theta) - dx * np.sin(theta)
    sv, L, d = max(1.9 * m.friction_velocity, 0.2), m.obukhov_length, 5 * m.roughness

    def profile(z):  # stable
        z = z - d
        return np.log(z / m.roughness) + 17 * (np.exp(-0.29 * m.roughness / L) - np.exp(-0.29 * z / L))

    def grown(x):
        x = np.maximum(x, 1.0)
        U = np.full(x.shape, 2.0)
        for _ in range(10):
            k = m.friction_velocity / U
            sz = np.sqrt((0.57 * k * x / (1 + 3 * k * (x / L) ** (2 / 3))) ** 2 + s0**2)
            mean = np.sqrt(2 / np.pi) * sz * np.exp(-0.5 * (zs / sz) ** 2) + zs * erf(zs / (np.sqrt(2) * sz))
            U = np.sqrt(2 * sv**2 + (m.wind_speed * profile(np.maximum(mean, zs)) / profile(m.reference_height)) ** 2)
        own = np.sqrt(np.maximum(sz**2 - s0**2, 1e-12))
        vertical = sum(np.exp(-0.5 * ((zs + sign * zr) / sz) ** 2) for sign in (-1, 1)) / (np.sqrt(2 * np.pi) * sz)
        return 1.6 * sv / m.friction_velocity * own * (1 + 2.5 * own / L), vertical, U

    sy, vertical, U = grown(np.abs(X))
    f = 2 * sv**2 / U**2
    plume = np.where(X > 0, vertical / U * np.exp(-0.5 * (Y / sy) ** 2) / (np.sqrt(2 * np.pi) * sy), 0)
    r = np.maximum(np.hypot(X, Y), 1.0)
    _, vertical, U = grown(r)
    return np.sum((1 - f) * plume + f * vertical / (2 * np.pi * r * U), 1) * length / n


def bologna(data: Path, city: str, sumo: str) -> dict:
    """Emission here over SUMO's, of all normal links: CO2 and NOx, by the second and from means over 900 s of each link."""
    types = f"{city}_vtypes.add.xml"
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at)
        for file in (data / "sumo" / "bologna" / city).iterdir():
            shutil.copyfile(file, folder / file.name)
        text = (folder / types).read_text()
        for name, wanted in CLASSES.items():
            text = re.sub(rf'(id="{name}"[^>]*emissionClass=")[^"]*', rf"\1HBEFA4/{wanted}", text)
        (folder / types).write_text(text)
        (folder / "edges.add.xml").write_text('<additional><edgeData id="e" type="emissions" file="edges.xml" freq="100000"/></additional>')
        more = re.search(r'additional-files value="([^"]*)"', (folder / "run.sumocfg").read_text())
        assert more is not None
        words = [sumo, "-c", "run.sumocfg", "--additional-files", f"{more[1]},edges.add.xml", "--fcd-output", "fcd.csv", "--no-warnings"]
        words += [
            "--fcd-output.acceleration",
            "--fcd-output.attributes",
            "type,speed,acceleration,lane",
            "--device.emissions.probability",
            "1",
        ]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
        reference: dict[str, np.ndarray] = {}
        for line in (folder / "edges.xml").read_text().splitlines():
            if "<edge " in line and "CO2_abs" in line:
                words = dict(re.findall(r'(\w+)="([^"]*)"', line))
                reference[words["id"]] = np.array([float(words["CO2_abs"]), float(words["NOx_abs"])])
        return _of_run(folder / "fcd.csv", reference)


def _of_run(fcd: Path, reference: dict[str, np.ndarray]) -> dict:
    edges = {name: i for i, name in enumerate(reference)}
    names = {name: i for i, name in enumerate(CLASSES)}
    taken = array.array("d")
    with fcd.open(newline="") as lines:
        rows = csv.reader(lines, delimiter=";")
        header = next(rows)
        wanted = "timestep_time", "vehicle_speed", "vehicle_acceleration", "vehicle_type", "vehicle_lane"
        at, v_at, a_at, type_at, lane_at = (header.index(name) for name in wanted)
        for r in rows:
            if r[type_at] and (edge_at := edges.get(r[lane_at].rpartition("_")[0])) is not None:  # a second without vehicles has a row too
                taken.extend((float(r[at]), float(r[v_at]), float(r[a_at]), names[r[type_at]], edge_at))
    t, v, a, kind, edge = np.frombuffer(taken).reshape(-1, 5).T
    kind, edge, window = kind.astype(int), edge.astype(int), (t // 900).astype(int)
    cell = edge * (window.max() + 1) + window
    size = len(edges) * (window.max() + 1)
    seconds, metres = np.bincount(cell, minlength=size), np.bincount(cell, v, size)
    mean_speed = metres / np.maximum(seconds, 1)
    truth = np.array(list(reference.values()))
    exact, mean = np.zeros((len(edges), 2)), np.zeros((len(edges), 2))
    for name, k in names.items():
        hot = emissions.fleet({CLASSES[name]: 1.0}).hot[0]
        mine = kind == k
        driven = np.bincount(cell[mine], v[mine], size)
        for p in (0, 1):
            rate = np.asarray(emissions.rate(hot[p], v[mine].astype(np.float32), a[mine].astype(np.float32)), float)
            exact[:, p] += np.bincount(edge[mine], rate, len(edges))
            link = driven * np.asarray(emissions.per_metre(hot[p], mean_speed.astype(np.float32)), float)
            mean[:, p] += link.reshape(len(edges), -1).sum(1)
    found: dict = {"vehicle seconds": len(t)}
    for p, pollutant in enumerate(("CO2", "NOx")):
        for label, ours in (("by the second", exact), ("by mean speed", mean)):
            found[f"{pollutant}, {label}: ratio to SUMO"] = float(ours[:, p].sum() / truth[:, p].sum())
            found[f"{pollutant}, {label}: R over links"] = float(np.corrcoef(ours[:, p], truth[:, p])[0, 1])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
