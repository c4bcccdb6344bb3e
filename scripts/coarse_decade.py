"""Makes the background of the scenario climate/downscaled_decade: ten years of a world 1.5 K warmer on a grid of 12 x 24 cells.

    python scripts/coarse_decade.py OUT_FOLDER     (about 40 minutes on one core; a killed run goes on; needs twinsim[climate])

Simulates SPEEDY at T31, takes the means of blocks of 4 x 4 cells and writes tas and pr, rounded to a tenth.
"""

import argparse
from pathlib import Path

import numpy as np
import xarray as xr

from domains.climate import grid, speedy
from twinsim import cli

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "scenarios" / "climate" / "decade_plus1p5K_coarse.nc"
DAYS, WARMING, SEED, FACTOR = 3653, 1.5, 21, 4
STEP = {"tas": 0.1, "pr": 0.1}  # rounding, in the units of the variable; the file ships with twinsim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the simulation is kept")
    with cli.progress("simulate") as update:
        run = speedy.simulate(parser.parse_args().folder, DAYS, WARMING, SEED, progress=update)
    write(coarse(run), FILE)


def coarse(run: xr.Dataset) -> xr.Dataset:
    """Block means of the fields, on the mean latitude and longitude of each block."""
    made = xr.Dataset(attrs={**run.attrs, "title": "SPEEDY T31L8 daily means of blocks of 4 x 4 cells, 1.5 K warmer sea surface"})
    for name in STEP:
        values = np.asarray(grid.coarsen(run[name].values, FACTOR))
        made[name] = (("time", "lat", "lon"), values, run[name].attrs)
    for axis in ("lat", "lon"):
        made[axis] = (axis, run[axis].values.reshape(-1, FACTOR).mean(1), run[axis].attrs)
    return made.assign_coords(time=run["time"])


def write(dataset: xr.Dataset, path: Path) -> None:
    packing = {
        name: {
            "dtype": "int16",
            "_FillValue": -32768,
            "scale_factor": step,
            "add_offset": 270.0 if name == "tas" else 0.0,
            "zlib": True,
            "complevel": 9,
            "shuffle": True,
        }
        for name, step in STEP.items()
    }
    dataset.to_netcdf(path, encoding=packing)


if __name__ == "__main__":
    main()
