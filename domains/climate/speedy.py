"""The physics source: daily climate simulated by SPEEDY, a JAX general-circulation model, for a given sea-surface warming.

Source: Molteni (2003), Climate Dynamics 20, 175-191, as implemented by the package `jcm` (T31, 8 sigma levels, 30 min step).
The run goes on in blocks of ten days; each block is written whole with the model's state at its end, so that a killed run
continues from its last block to the same bytes.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

GRAVITY = 9.80665  # m s-2, standard gravity (CGPM 1901)
SURFACE_PRESSURE = 1e5  # Pa, the unit of jcm's normalised surface pressure
BLOCK_DAYS = 10
SPINUP_DAYS = 60  # from rest to a climate of its own
ADJUST_DAYS = 35  # to a sea surface that was warmed at once
FIRST_DAY = "2000-01-01"  # jcm's default start, in its 365.25-day calendar

# name -> (units, CF standard name, what it is). "500" is sigma 0.51, "850" is sigma 0.835.
OUTPUTS: dict[str, tuple[str, str, str]] = {
    "tas": ("K", "air_temperature", "near-surface air temperature"),
    "pr": ("mm day-1", "lwe_precipitation_rate", "precipitation"),
    "hus850": ("1", "specific_humidity", "specific humidity at sigma 0.835"),
    "ps": ("Pa", "surface_air_pressure", "surface air pressure"),
    "zg500": ("m", "geopotential_height", "geopotential height at sigma 0.51"),
    "ta500": ("K", "air_temperature", "air temperature at sigma 0.51"),
    "ua500": ("m s-1", "eastward_wind", "eastward wind at sigma 0.51"),
    "va500": ("m s-1", "northward_wind", "northward wind at sigma 0.51"),
}


class SimulationDiverged(RuntimeError):
    """The simulated state is no longer finite."""


def simulate(
    folder: Path,
    days: int,
    sst_offset: float = 0.0,
    seed: int = 1,
    spinup_days: int = SPINUP_DAYS,
    adjust_days: int = ADJUST_DAYS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> xr.Dataset:
    """Daily means of a SPEEDY run with the sea surface warmed uniformly by `sst_offset` K.

    The run starts at rest, spins up `spinup_days` on climatological sea-surface temperature and, where an offset is asked
    for, `adjust_days` more with it; both are dropped. Blocks already in `folder` are not computed again.

    Returns:
      variables of `OUTPUTS` on `[time, lat, lon]`, and `orog` m, `lsm` 0-1, `sst` K (day 1 of each month) on the same grid.

    Raises:
      ModuleNotFoundError: `jcm` is not installed.
      SimulationDiverged: a block is not finite; blocks before it stay.
    """
    adjust_days = adjust_days if sst_offset else 0
    lead = spinup_days + adjust_days
    total = -(-(lead + days) // BLOCK_DAYS) * BLOCK_DAYS
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"day{first:05d}.npz" for first in range(0, total, BLOCK_DAYS)]
    statics, blocks = _blocks(sst_offset, seed, spinup_days, files)
    for index, _ in enumerate(blocks):
        progress((index + 1) * BLOCK_DAYS, total)
    fields = [np.load(file, allow_pickle=False) for file in files]
    daily = {name: np.concatenate([block[name] for block in fields])[lead : lead + days] for name in OUTPUTS}
    time = np.datetime64(FIRST_DAY, "ns") + np.arange(lead, lead + days) * np.timedelta64(86400 * 10**9, "ns")
    made_with = {"spinup_days": spinup_days, "adjust_days": adjust_days}
    return _dataset(daily, statics, time, sst_offset, seed).assign_attrs(made_with)


def _blocks(sst_offset: float, seed: int, spinup_days: int, files: list[Path]) -> tuple[dict[str, np.ndarray], Iterator[Path]]:
    """The static fields, and an iterator that makes each missing block file in turn."""
    try:
        import jax
        import jax.numpy as jnp
        import jcm
        from hydra import compose, initialize_config_module
        from hydra.core.global_hydra import GlobalHydra
        from jcm import runners
        from jcm.model import RunState
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the SPEEDY source needs jcm: pip install 'twinsim[climate]'") from error

    boundary = Path(jcm.__file__).parent / "data/bc/t63"
    outer = GlobalHydra.instance().hydra  # jcm composes its own configuration inside ours
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("jcm.config", version_base=None):
            config = compose(
                "config",
                overrides=[
                    "+configuration=speedy-t31",
                    f"terrain.file={boundary}/terrain.nc",
                    f"forcing.file={boundary}/forcing.nc",
                    "run.time_step=30",
                ],
            )
    finally:
        GlobalHydra.instance().hydra = outer
    model = runners.build_model(config)
    forcing = runners.build_forcing(config, model.coords)

    def warmed(offset: jax.Array) -> Any:
        sst = forcing.sea_surface_temperature
        return forcing.replace(sea_surface_temperature=sst.replace(values=sst.values + offset))

    @jax.jit
    def advance(state: Any, offset: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        state, predictions = model.run_from_state_with_carry(
            state.dynamics,
            warmed(offset),
            save_interval=1.0,
            total_time=float(BLOCK_DAYS),
            output_averages=True,
            initial_physics_state=state.physics,
            initial_time=state.time,
            initial_step=state.step,
        )
        air, physics = predictions._predictions.dynamics, predictions._predictions.physics
        daily = {
            "tas": physics["_surface_flux"].t0,
            "pr": physics["surface_exchange"].precipitation * 86400.0,
            "hus850": air.specific_humidity[:, 6],
            "ps": air.normalized_surface_pressure * SURFACE_PRESSURE,
            "zg500": air.geopotential[:, 4] / GRAVITY,
            "ta500": air.temperature[:, 4],
            "ua500": air.u_wind[:, 4],
            "va500": air.v_wind[:, 4],
        }
        return state, {name: jnp.swapaxes(field, 1, 2).astype(jnp.float32) for name, field in daily.items()}

    start = RunState(model.initial_state(random_seed=seed), model.initial_physics_carry(), model.start_time, jnp.int32(0))
    structure: Any = jax.tree.structure(start)
    sst = np.asarray(forcing.sea_surface_temperature.values)[[0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334]]
    statics = {
        "orog": np.asarray(model.terrain.orog).T,
        "lsm": np.asarray(model.terrain.fmask).T,
        "sst": np.swapaxes(sst, 1, 2),
    }

    def run() -> Iterator[Path]:
        done = sum(1 for _ in _leading(files))
        state = start
        if done:
            last = np.load(files[done - 1], allow_pickle=False)
            leaves = [last[f"state{i:03d}"] for i in range(structure.num_leaves)]
            state = jax.tree.unflatten(structure, leaves)
        yield from files[:done]
        for index in range(done, len(files)):
            offset = sst_offset if index * BLOCK_DAYS >= spinup_days else 0.0
            state, daily = advance(state, jnp.float32(offset))
            fields: Any = {name: np.asarray(field) for name, field in daily.items()}
            if not all(np.isfinite(field).all() for field in fields.values()):
                raise SimulationDiverged(f"SPEEDY: not finite after day {index * BLOCK_DAYS}; the days before are in {files[index].parent}")
            saved: dict[str, Any] = {f"state{i:03d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
            partial = files[index].with_suffix(".tmp")
            with partial.open("wb") as out:
                np.savez(out, **fields, **saved)
                out.flush()
                os.fsync(out.fileno())
            partial.rename(files[index])
            yield files[index]

    return statics, run()


def _leading(files: list[Path]) -> Iterator[Path]:
    """The files that exist, up to the first that does not."""
    for file in files:
        if not file.exists():
            return
        yield file


def _dataset(daily: dict[str, np.ndarray], statics: dict[str, np.ndarray], time: np.ndarray, sst_offset: float, seed: int) -> xr.Dataset:
    """A CF dataset on the T31 Gaussian grid."""
    latitude = np.rad2deg(np.arcsin(np.polynomial.legendre.leggauss(48)[0]))
    data: dict[str, tuple] = {
        name: (
            ("time", "lat", "lon"),
            daily[name],
            {"units": units, "standard_name": standard, "long_name": long, "cell_methods": "time: mean"},
        )
        for name, (units, standard, long) in OUTPUTS.items()
    }
    data["orog"] = (("lat", "lon"), statics["orog"], {"units": "m", "standard_name": "surface_altitude", "long_name": "surface altitude"})
    data["lsm"] = (("lat", "lon"), statics["lsm"], {"units": "1", "standard_name": "land_area_fraction", "long_name": "land area fraction"})
    data["sst"] = (
        ("month", "lat", "lon"),
        statics["sst"],
        {"units": "K", "standard_name": "sea_surface_temperature", "long_name": "climatological sea surface temperature, before warming"},
    )
    coords = {
        "time": ("time", time),
        "lat": ("lat", latitude, {"units": "degrees_north", "standard_name": "latitude"}),
        "lon": ("lon", np.arange(96) * 3.75, {"units": "degrees_east", "standard_name": "longitude"}),
        "month": ("month", np.arange(1, 13)),
    }
    attrs = {
        "Conventions": "CF-1.8",
        "title": "SPEEDY T31L8 daily means",
        "source": "jcm SPEEDY T31L8, a simulation, not an observation",
        "sst_offset_K": float(sst_offset),
        "seed": int(seed),
        "license": "Apache-2.0",
    }
    return xr.Dataset(data, coords, attrs)
