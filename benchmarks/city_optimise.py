"""Measures how much of the time that tolls can save optimised tolls save: `make bench-city_optimise`.

Sioux Falls (TNTP), fixed trips. The reference is the system optimum, the equilibrium under marginal costs t + v dt/dv, which tolls of
v dt/dv lead to; checked here by an equilibrium with these tolls. The optimiser begins without tolls and is not told of them. It may toll
every link, then only the links with most traffic. Every figure is that of an exact user equilibrium. Then green splits at all
junctions, whose best is not known. Writes "optimise" into `benchmarks/results/city.json`.

  python benchmarks/city_optimise.py [--shared FOLDER]
"""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from _results import ROOT, keep, yes

sys.path.insert(0, str(ROOT))

from domains.city import tntp  # noqa: E402
from domains.city.equilibrium import equilibrium  # noqa: E402
from domains.city.network import Network  # noqa: E402
from domains.city.optimise import Levers, optimise, signals  # noqa: E402

MOST = 3600.0  # s, highest toll; those of the system optimum go up to 3483
TARGET = 0.95  # share of the possible gain, where every link may be tolled
FEW = 20  # links with most traffic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    given = parser.parse_args()
    folder = given.shared / "data" / "mobility" / "tntp" / "SiouxFalls"
    if not folder.is_dir():
        print(f"optimise: skipped, there is no folder {folder}")
        return 0
    network, trips = (read(next(folder.glob(f"*_{what}.tntp"))) for read, what in ((tntp.read_network, "net"), (tntp.read_trips, "trips")))
    today = equilibrium(network, trips, 1e-8)
    least, toll = system_optimum(network, trips.trips)
    tolled = equilibrium(network, trips, 1e-8, toll=toll).total_time / 3600
    busiest = np.sort(np.argsort(today.flow)[-FEW:])
    none = np.zeros(0, int)
    cases = {
        "tolls on every link": Levers(np.arange(network.links), np.full(network.links, MOST)),
        f"tolls on the {FEW} busiest links": Levers(busiest, np.full(FEW, MOST)),
        "green splits": Levers(none, np.zeros(0), signals(network)),
    }
    measured: dict = {
        "network": "SiouxFalls",
        "equilibrium_vehicle_hours": today.total_time / 3600,
        "system_optimum_vehicle_hours": least,
        "with_marginal_cost_tolls_vehicle_hours": tolled,
    }
    for name, levers in cases.items():
        began = time.process_time()
        found = optimise(network, trips, levers)
        seconds = time.process_time() - began
        after = found.values_after["time"]
        measured[name] = {
            "vehicle_hours": after,
            "gain": 1 - after / found.values_before["time"],
            "cpu_s": seconds,
            "rounds": len(found.rounds),
            "evaluations": sum(one.evaluations for one in found.rounds),
            "converged": found.converged,
            "smooth_minus_exact": found.smooth - found.aim[-1],
            "smooth_flow_error": found.flow_error,
            "gap_of_the_equilibrium": found.after.gap,
        }
        if len(levers.links):
            measured[name]["share_of_the_possible_gain"] = (today.total_time / 3600 - after) / (today.total_time / 3600 - least)
    keep("city", "optimise", measured)
    print("\n".join(table(measured)))
    return 0


def system_optimum(network: Network, trips: np.ndarray) -> tuple[float, np.ndarray]:
    """Vehicle hours of the system optimum, and the tolls that lead to it, s: t + v dt/dv is BPR with alpha (1 + beta) for alpha."""
    best = equilibrium(replace(network, alpha=network.alpha * (1 + network.beta)), trips, 1e-8).flow
    delay = network.free_time * network.alpha * (best / network.capacity) ** network.beta
    return float(best @ (network.free_time + delay)) / 3600, network.beta * delay


def table(measured: dict) -> list[str]:
    """Markdown: a row for each kind of measure."""
    before, least = measured["equilibrium_vehicle_hours"], measured["system_optimum_vehicle_hours"]
    lines = [
        f"\n**measures for Sioux Falls**: {before:.0f} vehicle hours in the equilibrium, {least:.0f} in the system optimum "
        f"({measured['with_marginal_cost_tolls_vehicle_hours']:.0f} with marginal-cost tolls)",
        "",
        "| measure | CPU s | vehicle hours | gain | of the possible gain by tolls | target | reached | smooth model off by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in measured.items():
        if not isinstance(one, dict):
            continue
        share = one.get("share_of_the_possible_gain")
        full = name == "tolls on every link"
        reached = yes(share >= TARGET) if full and share is not None else "-"
        cells = ["-" if share is None else f"{share:.1%}", f"{TARGET:.0%}" if full else "-", reached, f"{one['smooth_minus_exact']:.1e}"]
        lines.append(f"| {name} | {one['cpu_s']:.1f} | {one['vehicle_hours']:.0f} | {one['gain']:.2%} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
