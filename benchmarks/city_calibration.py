"""Measures the calibration of a city's demand to real traffic counts: `make bench-city_calibration`.

Wildau (Germany): SUMO's network of the town and 18 counts of an afternoon. The prior is the module's gravity model, which knows the network
and nothing of the counts; beside it stands the prior times the one factor that suits the counts best. Each is judged on counts that were
left out: one by one, and by place, both directions of a road at once. Then networks whose trips are known (TNTP): counts of their
equilibrium on some links, a prior 30 % too high whose pairs are off at random, and the links that nobody counted as judge. Writes
"calibration" into `benchmarks/results/city.json`.

  python benchmarks/city_calibration.py [--shared FOLDER] [--zones 40]
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from _results import ROOT, keep, yes

sys.path.insert(0, str(ROOT))

from domains.city import tntp  # noqa: E402
from domains.city.calibration import Fit, Spread, calibrate, fit, guessed_trips, with_zones  # noqa: E402
from domains.city.counts import Counts, read_counts  # noqa: E402
from domains.city.demand import cpc  # noqa: E402
from domains.city.equilibrium import equilibrium  # noqa: E402
from domains.city.sumo_net import read_network  # noqa: E402

TARGET = 0.85  # share of counts with a GEH below 5
ZONES = (20, 40, 60)
KNOWN = {"SiouxFalls": 30, "Anaheim": 100}  # counts
TOO_MANY, OFF = 1.3, 0.4  # the wrong prior: times the true trips, and the deviation of ln trips
SEEN = 100.0  # veh/h, least flow of a link that is judged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--zones", type=int, nargs="*", default=list(ZONES), help="districts laid over the town")
    given = parser.parse_args()
    folder = given.shared / "data" / "mobility"
    if not folder.is_dir():
        print(f"calibration: skipped, there is no folder {folder}")
        return 0
    measured = {f"Wildau, {zones} districts": wildau(folder / "sumo" / "Wildau", zones) for zones in given.zones}
    known = {f"{name}, {counts} counts": known_trips(folder / "tntp" / name, counts) for name, counts in KNOWN.items()}
    keep("city", "calibration", {**measured, **known})
    print("\n".join([*table(measured), *known_table(known)]))
    return 0


def wildau(folder: Path, zones: int) -> dict:
    """Fits of the prior, of the prior scaled and of the calibrated trips, CPU seconds of one calibration, and how far it moved."""
    network = with_zones(read_network(folder / "Netzmodell2.net.xml.gz"), zones)
    counts = read_counts(folder / "edgedata-file_Wildau.xml", network)
    prior = guessed_trips(network)
    began = time.process_time()
    calibrate(network, prior, counts, folds=0)
    seconds = time.process_time() - began
    # the two directions of a road are named alike but for a sign and the number of the part
    roads = [str(name).lstrip("-").partition("#")[0] for name in network.link_id[counts.link]]
    place = np.unique(roads, return_inverse=True)[1]
    result: dict = {"zones": network.zones, "counts": len(counts.link), "cpu_s": seconds}
    for name, spread in (("prior scaled", Spread.level_only()), ("calibrated", Spread())):
        each, by_place = (calibrate(network, prior, counts, spread=spread, folds=folds) for folds in (None, place))
        if "prior" not in result:
            result["prior"] = numbers(each.before)
        assert each.held_out and by_place.held_out
        result[name] = numbers(each.after)
        result[f"{name}, held out one by one"] = numbers(each.held_out)
        result[f"{name}, held out by place"] = numbers(by_place.held_out)
    result["moved"] = {**each.moved, "converged": each.converged, "iterations": len(each.objective) - 1}
    return result


def known_trips(folder: Path, number: int) -> dict:
    """Fits on counted and on never counted links of the prior and of the calibrated trips."""
    network, trips = (read(next(folder.glob(f"*_{what}.tntp"))) for read, what in ((tntp.read_network, "net"), (tntp.read_trips, "trips")))
    true = trips.trips
    random = np.random.default_rng(0)
    flow = equilibrium(network, true).flow
    seen = np.flatnonzero(flow > SEEN)
    links = random.choice(seen, number, replace=False)
    rest = np.setdiff1d(seen, links)
    prior = TOO_MANY * true * np.exp(random.normal(0, OFF, true.shape))
    began = time.process_time()
    found = calibrate(network, prior, Counts(links, flow[links]), folds=0)
    seconds = time.process_time() - began
    first = equilibrium(network, prior).flow
    off = ~np.eye(len(true), dtype=bool)
    return {
        "cpu_s": seconds,
        "converged": found.converged,
        "counted: before": numbers(found.before),
        "counted: after": numbers(found.after),
        "never counted": len(rest),
        "never counted: before": numbers(fit(first[rest], flow[rest])),
        "never counted: after": numbers(fit(found.equilibrium.flow[rest], flow[rest])),
        "common part of the trips with the true ones: before, after": [cpc(each[off], true[off]) for each in (prior, found.trips)],
    }


def known_table(measured: dict) -> list[str]:
    """Markdown: a row for each network."""
    lines = [
        "\n**known trips**, share with a GEH below 5 (RMSE in %), before -> after",
        "",
        "| case | CPU s | counted links | links never counted | common part of the trips |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in measured.items():
        cells = []
        for which in ("counted", "never counted"):
            each = (one[f"{which}: {when}"] for when in ("before", "after"))
            cells.append(" -> ".join(f"{fit['GEH below 5']:.0%} ({fit['RMSE percent']:.1f})" for fit in each))
        common = " -> ".join(f"{value:.3f}" for value in one["common part of the trips with the true ones: before, after"])
        lines.append(f"| {name} | {one['cpu_s']:.1f} | {' | '.join(cells)} | {common} |")
    return lines


def numbers(one: Fit) -> dict:
    return {"GEH below 5": one.share, "mean GEH": float(one.geh.mean()), "RMSE percent": one.rmse_percent, "R2": one.r2}


def table(measured: dict) -> list[str]:
    """Markdown: a row for each matrix of trips."""
    lines = [
        "\n**real counts of Wildau**, share with a GEH below 5 (RMSE in %)",
        "",
        "| case | CPU s | prior | scaled | calibrated | target | reached | held out one by one: scaled, calibrated | by place |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in measured.items():
        fits = {key: fit for key, fit in one.items() if isinstance(fit, dict) and "GEH below 5" in fit}
        shown = {key: f"{fit['GEH below 5']:.0%} ({fit['RMSE percent']:.0f})" for key, fit in fits.items()}
        reached = yes(one["calibrated"]["GEH below 5"] >= TARGET)
        held = [", ".join(shown[f"{key}, held out {how}"] for key in ("prior scaled", "calibrated")) for how in ("one by one", "by place")]
        lines.append(
            f"| {name} | {one['cpu_s']:.2f} | {shown['prior']} | {shown['prior scaled']} | {shown['calibrated']} | {TARGET:.0%} | {reached}"
            f" | {' | '.join(held)} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
