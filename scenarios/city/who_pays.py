"""Raises the price of a cordon, and names at each price the districts whose trips become dearest and cheapest.

python scenarios/city/who_pays.py [NAME=VALUE ...]
"""

import sys

import xarray as xr

from twinsim import cli, run

PRICES = [1, 2, 4, 8]


def main(words: list[str]) -> None:
    for euro in PRICES:
        folder = run.deliver(cli.configuration("city/cordon_charge", f"set.interventions.0.euro={euro}", *words), cli.progress)
        with xr.open_zarr(folder / "samples.zarr", consolidated=False) as data:
            cost = (data["trip_cost"].sel(case="scenario") - data["trip_cost"].sel(case="base")).mean(["member", "time"]) / 60
            trips = data["car_trips"].sum("zone").mean(["member", "time"])
            fewer = 100 * (1 - float(trips.sel(case="scenario") / trips.sel(case="base")))
            most, least = (str(cost["zone"].values[int(pick(cost.values))]) for pick in (lambda x: x.argmax(), lambda x: x.argmin()))
            print(f"{euro} euro: {fewer:.1f} % fewer car trips; a trip costs {cost.max().item():+.1f} min more from {most},", end=" ")
            print(f"{cost.min().item():+.1f} min from {least}")


if __name__ == "__main__":
    main(sys.argv[1:])
