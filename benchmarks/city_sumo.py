"""Sets the city's static traffic beside SUMO's, vehicle by vehicle on the same ways: `make bench-city_sumo`.

A synthetic city under light and heavy demand, and Wildau with the trips that its counts lead to; SUMO's mesoscopic and microscopic models
in the same run. GEH of the links' flows, mean speed, CO2 and NOx of an hour. Writes "sumo" into `benchmarks/results/city.json`. Without
SUMO (pip install 'twinsim[sumo]') nothing is measured, which is said.

  python benchmarks/city_sumo.py [--shared FOLDER]
"""

import argparse
import os
import resource
import sys
from pathlib import Path

import numpy as np
from _results import ROOT, keep

sys.path.insert(0, str(ROOT))

from domains.city import sumo  # noqa: E402
from domains.city.calibration import calibrate, guessed_trips, with_zones  # noqa: E402
from domains.city.counts import read_counts  # noqa: E402
from domains.city.network import Network  # noqa: E402
from domains.city.sumo_net import read_network  # noqa: E402
from domains.city.synthetic import city  # noqa: E402
from twinsim.base import BadInput  # noqa: E402

LIGHT, HEAVY = 2500.0, 8000.0  # veh/h


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    given = parser.parse_args()
    try:
        sumo.program("sumo")
    except BadInput as absent:
        print(f"sumo: skipped, {absent}")
        return 0
    cases: dict[str, tuple[Network, np.ndarray]] = {}
    made = city(seed=3, districts=6, towns=3, radius=2000, block=600).network
    trips = guessed_trips(made).trips
    for name, total in (("light", LIGHT), ("heavy", HEAVY)):
        cases[f"synthetic city, {total:.0f} veh/h, {name}"] = made, trips * total / trips.sum()
    folder = given.shared / "data" / "mobility" / "sumo" / "Wildau"
    if folder.is_dir():
        town = with_zones(read_network(folder / "Netzmodell2.net.xml.gz"), 40)
        counts = read_counts(folder / "edgedata-file_Wildau.xml", town)
        cases["Wildau, calibrated"] = town, calibrate(town, guessed_trips(town), counts, folds=0).trips
    else:
        print(f"Wildau: skipped, there is no folder {folder}")
    measured = {}
    for name, (network, demand) in cases.items():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        report, rows = sumo.cross_check(network, demand)
        measured[name] = {**report, "sumo_cpu_s": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before}
        print(
            f"\n**{name}**\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}",
            *(f"| {' | '.join(row)} |" for row in rows[1:]),
            sep="\n",
        )
    keep("city", "sumo", measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
