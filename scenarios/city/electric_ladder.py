"""Finds how many cars and vans have to be electric until traffic's CO2 has fallen by a wished-for share.

python scenarios/city/electric_ladder.py [GOAL in %, 30 by default] [NAME=VALUE ...]
"""

import json
import sys

import numpy as np

from twinsim import cli, run

SHARES = [0.1, 0.3, 0.5, 0.7, 0.9]


def main(words: list[str]) -> None:
    goal = next((float(word) for word in words if "=" not in word), 30.0)
    falls = [0.0]
    for share in SHARES:
        change = [word for word in words if "=" in word] + [f"set.interventions.0.share={share}"]
        folder = run.deliver(cli.configuration("city/electric_half", *change), cli.progress)
        mean, low, high = json.loads((folder / "indicators.json").read_text())["CO2, t"]["relative"]
        falls.append(-mean)
        print(f"{share:4.0%} electric: CO2 {mean:+.1f} % ({low:+.1f} to {high:+.1f})")
    if goal > falls[-1]:
        print(f"{goal:g} % is not reached with {SHARES[-1]:.0%} electric cars and vans: lorries and buses are left")
    else:
        print(f"{goal:g} % less CO2 takes about {np.interp(goal, falls, [0.0, *SHARES]):.0%} of cars and vans")


if __name__ == "__main__":
    main(sys.argv[1:])
