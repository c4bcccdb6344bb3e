"""Runs several scenarios and draws beside each other what they do for the climate, the air and the roads.

python scenarios/city/compare_measures.py [SCENARIO ...] [NAME=VALUE ...]
"""

import json
import sys

import matplotlib.pyplot as plt

from twinsim import cli, run

MEASURES = ["city/low_emission_zone", "city/thirty", "city/cordon_charge", "city/electric_half", "city/modal_shift", "city/package"]
SHOWN = {"CO2, t": "CO2", "NO2 that people breathe, ug/m3": "NO2 breathed", "hours of delay": "delay"}


def main(words: list[str]) -> None:
    measures = [word for word in words if "=" not in word] or MEASURES
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(11, 1 + 0.4 * len(measures)), sharey=True, layout="constrained")
    for row, measure in enumerate(measures):
        folder = run.deliver(cli.configuration(measure, *(word for word in words if "=" in word)), cli.progress)
        found = json.loads((folder / "indicators.json").read_text())
        for at, (name, label) in zip(axes, SHOWN.items(), strict=True):
            mean, low, high = found[name]["relative"]
            at.errorbar(mean, row, xerr=[[mean - low], [high - mean]], fmt="o", color="#5e3c99", capsize=3)
            at.set_xlabel(f"change of {label}, % (90 % of days)")
            print(f"{measure:<26} {label:<14} {mean:+7.2f} % ({low:+.2f} to {high:+.2f})")
    for at in axes:
        at.axvline(0, color="grey", linewidth=0.8)
    axes[0].set_yticks(range(len(measures)), [measure.removeprefix("city/") for measure in measures])
    figure.savefig("measures.png", dpi=120)
    print("picture: measures.png")


if __name__ == "__main__":
    main(sys.argv[1:])
