"""A climate small enough for the whole chain in seconds: two variables on 8 x 12 cells, two years of days, as a NetCDF file."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from twinsim import cli, run

QUANTITY = "_target_: domains.climate.domain.Quantity"


def write_data(folder: Path, days: int = 730) -> Path:
    """Temperature and rain with a season, a slow wave and noise; fixed."""
    draw = np.random.default_rng(0)
    time = np.datetime64("2001-01-01") + np.arange(days)
    lat, lon = np.linspace(-70, 70, 8), np.arange(12) * 30.0
    season = np.cos(2 * np.pi * np.arange(days) / 365.25)[:, None, None]
    wave = np.cos(np.deg2rad(lon)[None, None] + draw.normal(size=(days, 1, 1))) * np.cos(np.deg2rad(lat))[None, :, None]
    tas = 280 + 10 * season * np.sign(lat)[None, :, None] + 3 * wave + draw.normal(size=(days, 8, 12))
    pr = np.maximum(2 * wave + draw.normal(size=(days, 8, 12)), 0)
    made = xr.Dataset(
        {
            "tas": (("time", "lat", "lon"), tas.astype(np.float32), {"units": "K", "cell_methods": "time: mean"}),
            "pr": (("time", "lat", "lon"), pr.astype(np.float32), {"units": "mm day-1", "cell_methods": "time: mean"}),
        },
        {
            "time": ("time", time.astype("datetime64[ns]")),
            "lat": ("lat", lat, {"units": "degrees_north", "standard_name": "latitude"}),
            "lon": ("lon", lon, {"units": "degrees_east", "standard_name": "longitude"}),
        },
        {"license": "CC0-1.0", "source": "made for a test"},
    )
    path = folder / "toy.nc"
    made.to_netcdf(path)
    return path


def write_scenario(folder: Path, name: str = "toy", **changes: str) -> Path:
    lines = {
        "title": "Ten days",
        "domain": "climate/ncep",
        "asks": "What do ten days look like?",
        "command": "twinsim run toy.yaml",
        "takes": "seconds",
        "expect": "Ten days.",
        "members": "3",
        "seed": "5",
        "period": '{start: "2001-06-01", end: "2001-06-10"}',
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def place(folder: Path) -> Path:
    """Puts the toy's data and scenario into `folder`, and returns it."""
    write_data(folder)
    write_scenario(folder)
    return folder


@contextlib.contextmanager
def quiet(stage: str) -> Iterator[Callable[..., None]]:
    """A progress that shows nothing."""
    yield lambda *_: None


def draw_nothing(put: Callable = setattr) -> None:
    """Leaves every picture empty, but of its size and format."""
    drawn = Figure.savefig
    put(Figure, "savefig", lambda figure, *given, **named: drawn(Figure(figure.get_size_inches()), *given, **named))


def words(data: Path, out: Path) -> list[str]:
    """The toy as overrides of the configuration that reads any recorded file."""
    tas = f"{{{QUANTITY}, units: K, long_name: air temperature, standard_name: air_temperature, lower: 150, upper: 350}}"
    pr = f"{{{QUANTITY}, units: mm day-1, long_name: precipitation, transform: sqrt, lower: 0, wet: 1.0}}"
    return [
        "domain=climate/ncep",
        "scale=tiny",
        f"out={out}",
        f"archive={data.parent}",
        f"domain.dataset.paths=[{data}]",
        "~domain.dataset.variables.psl",
        "+domain.dataset.variables.tas={units: K}",
        "+domain.dataset.variables.pr={units: mm day-1}",
        "~domain.quantities.psl",
        f"+domain.quantities.tas={tas}",
        f"+domain.quantities.pr={pr}",
        'domain.splits.train=[{time: ["2001-01-01", "2001-12-31"]}]',
        'domain.splits.test=[{time: ["2002-01-01", "2002-12-31"]}]',
        "domain.components.count=8",
        "generator.net.width=16",
        "generator.net.depth=1",
        "generator.sampler.steps=4",
    ]


def config(folder: Path, *more: str) -> dict:
    """The resolved configuration of the toy whose data and scenario lie in `folder`; `out` is a folder beside them."""
    overrides = [*words(folder / "toy.nc", folder / "out"), f"scenario={folder / 'toy.yaml'}", *more]
    return run.resolve(cli._compose(overrides))
