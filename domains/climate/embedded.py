"""The climate that ships with twinsim: daily SPEEDY fields of a control run and of warmed and cooled branches, packed small.

What is band-limited on the sphere is kept as spherical-harmonic coefficients: the anomaly from the control's mean, divided by a
zonal profile of its day-to-day variability (so that the tropics keep their accuracy), is expanded on the Gaussian grid and each
coefficient is rounded to a step that follows the spectrum; a day's integers are then predicted from the day before, and the
remainders are stored. Precipitation is rounded on its own grid in square-root space, which keeps it non-negative and dry where
it is dry. Surface pressure is packed as its logarithm and rescaled to the exact global mean of each day, so that no mass is lost.
The file is a Zarr v3 store in a zip: `xarray.open_zarr(zarr.storage.ZipStore(path))` shows its integers.

    python -m domains.climate.embedded pack RUNS_FOLDER

Source: Washington & Parkinson (2005), An Introduction to Three-Dimensional Climate Modeling, ch. 4, for the spectral transform.
"""

import argparse
import difflib
import functools
import hashlib
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import ZstdCodec

from domains.climate.speedy import OUTPUTS
from twinsim.base import BadInput

DATA = Path(__file__).parent / "data" / "speedy_t31.zarr.zip"
BRANCHES = {"control": 0.0, "cold1": -1.0, "warm1": 1.0, "warm2": 2.0}  # name -> warming of the sea surface, K
MAX_BYTES = 12_000_000

LATITUDES, LONGITUDES = 48, 96
MU, GAUSS_WEIGHTS = np.polynomial.legendre.leggauss(LATITUDES)  # sine of latitude, and the area it stands for (sum 2)
COS_LATITUDE = np.sqrt(1 - MU**2)
DAYS_A_CHUNK = 365
DAYS_A_BLOCK = 64  # what is synthesised at a time, so that it stays in the processor's cache
MEMORY_UNIT = 64  # a coefficient's day-to-day memory is a whole number of 1/64, so that decoding is exact everywhere
RAIN_STEP = 2 / 9  # (mm day-1)^0.5; 1 mm day-1 then lies between two levels, so that wet days stay wet days


@dataclass(frozen=True)
class Packing:
    """How one variable becomes spherical-harmonic coefficients.

    Attributes:
      truncation: highest total wavenumber of the variable itself.
      degree: highest total wavenumber kept after division by the zonal profile, which widens the spectrum.
      order: highest zonal wavenumber.
      step: rounding step of a coefficient, in the scale of `_steps`.
      logarithm: the logarithm is packed instead of the value.
      times_cosine: the value is multiplied by the cosine of latitude first, which makes a wind component band-limited.
    """

    truncation: int
    degree: int
    order: int
    step: float
    logarithm: bool = False
    times_cosine: bool = False


SPECTRAL = {
    "tas": Packing(47, 47, 47, 0.25),
    "hus850": Packing(32, 38, 31, 0.26),
    "zg500": Packing(32, 38, 31, 0.26),
    "ua500": Packing(32, 38, 31, 0.26, times_cosine=True),
    "ta500": Packing(32, 38, 31, 0.26),
    "ps": Packing(32, 38, 31, 0.26, logarithm=True),
    "va500": Packing(32, 38, 31, 0.26, times_cosine=True),
}


def open_embedded(branches: Sequence[str] = ("control",), variables: Sequence[str] | None = None, path: Path = DATA) -> xr.Dataset:
    """The shipped daily fields of the named branches, one after the other along `time`.

    Args:
      branches: names out of `BRANCHES`; "warm2" is the control's climate with a sea surface 2 K warmer.
      variables: which of `speedy.OUTPUTS`; all of them by default. The static fields always come along.

    Returns:
      float32 `[time, lat, lon]` and the static `orog`, `lsm` `[lat, lon]` and `sst` `[month, lat, lon]`, with the coordinates
      `branch` and `sst_offset` (K) on `time`. Times of different branches overlap. Each variable's attributes state the
      rounding error: `quantisation_rms` in its units, `quantisation_relative` to the local day-to-day standard deviation.

    Raises:
      BadInput: an unknown branch or variable, or the file is missing or damaged.
    """
    names = list(OUTPUTS) if variables is None else list(variables)
    _known("branch", branches, BRANCHES)
    _known("variable", names, OUTPUTS)
    if not path.is_file():
        raise BadInput(
            f"{path}: the shipped climate data are missing; expected the file that `python -m domains.climate.embedded pack` writes"
        )
    try:
        store: Any = zarr.storage.ZipStore(path, mode="r")
        with xr.open_dataset(store, engine="zarr", consolidated=False, chunks=None) as packed:
            return _unpack(packed, list(branches), names)
    except (OSError, ValueError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: damaged, expected the Zarr zip that twinsim ships: {error}") from error


def pack(runs: Path, path: Path = DATA) -> Path:
    """Packs `control.nc`, `cold1.nc`, `warm1.nc` and `warm2.nc` of a folder, made by `speedy.simulate`.

    Writes `README.md` and `SHA256SUMS` beside the data file.

    Raises:
      BadInput: a run is missing, of another warming or on another grid, or the packed file is larger than `MAX_BYTES`.
    """
    raw = {branch: _run(runs / f"{branch}.nc", offset) for branch, offset in BRANCHES.items()}
    encoding = {}
    packed = _pack(raw)
    for name, variable in packed.variables.items():
        chunks = tuple(min(DAYS_A_CHUNK, size) if dim == "time" else size for dim, size in variable.sizes.items())
        encoding[name] = {"compressors": [ZstdCodec(level=22)], **({"chunks": chunks} if chunks else {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packed.to_zarr(folder, mode="w", zarr_format=3, consolidated=False, encoding=encoding)
        partial = path.with_suffix(".tmp")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as out:
            for file in sorted(item for item in Path(folder).rglob("*") if item.is_file()):
                out.writestr(zipfile.ZipInfo(file.relative_to(folder).as_posix()), file.read_bytes())  # no clock: same runs, same bytes
    if partial.stat().st_size > MAX_BYTES:
        raise BadInput(f"{partial}: {partial.stat().st_size} bytes, expected at most {MAX_BYTES}; coarsen a step of SPECTRAL or RAIN_STEP")
    partial.replace(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "SHA256SUMS").write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    (path.parent / "README.md").write_text(_readme(path, digest, packed), encoding="utf-8")
    return path


# ---------------------------------------------------------------- the spherical-harmonic transform of the 48 x 96 Gaussian grid


@functools.cache
def _legendre() -> np.ndarray:
    """Associated Legendre functions `[order, degree, lat]`, normalised so that the integral of each squared over MU is 1."""
    size = LATITUDES
    values = np.zeros((size, size, LATITUDES))
    diagonal = np.full(LATITUDES, np.sqrt(0.5))
    for m in range(size):
        if m:
            diagonal = diagonal * np.sqrt((2 * m + 1) / (2 * m)) * COS_LATITUDE
        values[m, m] = diagonal
        if m + 1 < size:
            values[m, m + 1] = np.sqrt(2 * m + 3) * MU * diagonal
        for n in range(m + 2, size):
            a = np.sqrt((4 * n * n - 1) / (n * n - m * m))
            b = np.sqrt(((n - 1) ** 2 - m * m) / (4 * (n - 1) ** 2 - 1))
            values[m, n] = a * (MU * values[m, n - 1] - b * values[m, n - 2])
    return values


def _wavenumbers(degree: int, order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Degree, order and part (0 cosine, 1 sine) of each real coefficient, `[coefficient]`, by rising degree."""
    n, m, part = np.meshgrid(np.arange(degree + 1), np.arange(order + 1), np.arange(2), indexing="ij")
    real = (m <= n) & ~((m == 0) & (part == 1))
    return n[real], m[real], part[real]


def _analyse(field: np.ndarray, degree: int, order: int) -> np.ndarray:
    """Real coefficients `[..., coefficient]` of fields `[..., lat, lon]`."""
    waves = np.fft.rfft(field, axis=-1)[..., :LATITUDES] / LONGITUDES
    complex_ = np.einsum("...jm,mnj,j->...mn", waves, _legendre(), GAUSS_WEIGHTS, optimize=True)
    n, m, part = _wavenumbers(degree, order)
    picked = complex_[..., m, n]
    return np.where(part == 0, picked.real, picked.imag) * np.where(m == 0, 1.0, np.sqrt(2.0))


def _synthesise(coefficients: np.ndarray, packing: Packing, profile: np.ndarray) -> np.ndarray:
    """Fields `[time, lat, lon]`, float32, of real coefficients `[time, coefficient]` of a field divided by `profile` `[lat]`.

    Dividing widened the spectrum, and rounding filled what it gained with noise; a field that was band-limited is therefore
    projected back on its own truncation. This is done once, on the Legendre functions.
    """
    n, m, part = _wavenumbers(packing.degree, packing.order)
    scale = (np.where(m == 0, 1.0, np.sqrt(0.5)) * LONGITUDES).astype(np.float32)
    columns, bases = {}, {}
    for zonal in range(packing.order + 1):
        kept = _legendre()[zonal, zonal : packing.truncation + 1]
        basis = (_legendre()[zonal] * (profile * GAUSS_WEIGHTS)) @ kept.T @ kept
        for axis in range(1 if zonal == 0 else 2):
            columns[zonal, axis] = np.flatnonzero((m == zonal) & (part == axis))
            bases[zonal, axis] = basis[n[columns[zonal, axis]]].astype(np.float32) * scale[columns[zonal, axis], None]
    fields = np.empty((len(coefficients), LATITUDES, LONGITUDES), np.float32)
    for first in range(0, len(fields), DAYS_A_BLOCK):
        days = slice(first, first + DAYS_A_BLOCK)
        block = np.ascontiguousarray(coefficients[days].T, np.float32)
        waves = np.zeros((2, LONGITUDES // 2 + 1, LATITUDES, block.shape[1]), np.float32)
        for (zonal, axis), basis in bases.items():
            np.matmul(basis.T, block[columns[zonal, axis]], out=waves[axis, zonal])
        fields[days] = np.fft.irfft((waves[0] + 1j * waves[1]).T, axis=-1)
    return fields


# ---------------------------------------------------------------- packing


def _pack(raw: dict[str, xr.Dataset]) -> xr.Dataset:
    """The integers and tables of all branches, joined along `time`."""
    control = raw["control"]
    branch = np.concatenate([np.full(run.sizes["time"], index, np.int8) for index, run in enumerate(raw.values())])
    data: dict[str, tuple] = {
        "branch_of_day": (("time",), branch),
        "sst_offset": (("branch",), np.array(list(BRANCHES.values()), np.float32)),
    }
    for name in ("orog", "lsm"):
        data[name] = (("lat", "lon"), control[name].values.astype(np.float32), control[name].attrs)
    hundredths = np.rint(control["sst"].values * 100).astype(np.uint16)
    data["sst_levels"] = (("month", "lat", "lon"), hundredths, {**control["sst"].attrs, "step": 0.01, "quantisation_rms": 0.01 / 12**0.5})
    for name in OUTPUTS:
        values = [run[name].values.astype(np.float64) for run in raw.values()]
        tables = _pack_rain(values) if name == "pr" else _pack_spectral(name, values)
        data |= {f"{name}_{key}": table for key, table in tables.items()}
    coords = {
        "time": np.concatenate([run["time"].values for run in raw.values()]),
        "lat": ("lat", control["lat"].values, control["lat"].attrs),
        "lon": ("lon", control["lon"].values, control["lon"].attrs),
        "month": np.arange(1, 13),
    }
    attrs = {
        "branches": list(BRANCHES),
        "Conventions": "CF-1.8",
        "title": "SPEEDY T31L8 daily means, packed with loss",
        "source": control.attrs["source"],
        "license": "Apache-2.0",
        "comment": "integers and tables; domains.climate.embedded.open_embedded gives the fields",
    }
    packed = xr.Dataset(data, coords, attrs)
    decoded = _unpack(packed, list(BRANCHES), list(OUTPUTS))
    for name in OUTPUTS:
        rms, relative = _errors(decoded[name].values, [run[name].values for run in raw.values()])
        packed[f"{name}_levels"].attrs |= {**control[name].attrs, "quantisation_rms": rms, "quantisation_relative": relative}
    return packed


def _pack_rain(values: list[np.ndarray]) -> dict[str, tuple]:
    """Levels of the square root `[lat, time, lon]`."""
    root = np.rint(np.sqrt(np.maximum(np.concatenate(values), 0)) / RAIN_STEP)
    return {"levels": (("lat", "time", "lon"), _narrow(root, np.int8, "pr").transpose(1, 0, 2), {"step": RAIN_STEP})}


def _pack_spectral(name: str, values: list[np.ndarray]) -> dict[str, tuple]:
    """Remainders `[coefficient, time]` of the predicted levels, and the tables that undo them."""
    packing = SPECTRAL[name]
    scaled = [(np.log(value) if packing.logarithm else value) * (COS_LATITUDE[:, None] if packing.times_cosine else 1) for value in values]
    mean = scaled[0].mean(0).astype(np.float32)
    profile = _profile(scaled[0])
    runs = [_analyse((value - mean) / profile[:, None], packing.degree, packing.order) for value in scaled]
    n, _, _ = _wavenumbers(packing.degree, packing.order)
    step = _steps(runs[0], n, packing.step)
    levels = [np.rint(run / step[n]).astype(np.int64) for run in runs]
    before, after = levels[0][:-1], levels[0][1:]
    memory = np.clip((before * after).sum(0) / np.maximum((before**2).sum(0), 1), 0, 1)
    memory = np.rint(memory * MEMORY_UNIT).astype(np.int64)
    remainders = []
    for run in levels:
        rest = np.zeros_like(run)
        rest[1:] = run[1:] - _expected(run[:-1], memory)
        remainders.append(rest)
    coefficient = f"{name}_coefficient"
    tables: dict[str, tuple] = {
        "levels": ((coefficient, "time"), _narrow(np.concatenate(remainders).T, np.int8, name)),
        "start": (("branch", coefficient), _narrow(np.stack([run[0] for run in levels]), np.int16, name)),
        "memory": ((coefficient,), memory.astype(np.uint8)),
        "step": ((f"{name}_degree",), step),
        "profile": (("lat",), profile),
        "mean": (("lat", "lon"), mean),
    }
    if name == "ps":
        tables["global_mean"] = (("time",), _global_mean(np.concatenate(values)).astype(np.float32))
    return tables


def _profile(values: np.ndarray) -> np.ndarray:
    """Day-to-day standard deviation by latitude `[lat]`, smoothed so that dividing by it hardly widens the spectrum."""
    deviation = np.sqrt(np.mean(np.diff(values, axis=0) ** 2, axis=(0, 2)) / 2)
    fitted = np.polynomial.legendre.Legendre.fit(MU, np.log(deviation), 6)(MU)
    return np.exp(fitted).astype(np.float32)


def _steps(run: np.ndarray, n: np.ndarray, step: float) -> np.ndarray:
    """Rounding step by degree `[degree]`: the geometric mean of white noise and of noise shaped like the signal."""
    variance = np.mean(np.diff(run, axis=0) ** 2, axis=0) / 2
    by_degree = np.sqrt(np.bincount(n, variance) / np.bincount(n))
    return (step * np.sqrt(by_degree * np.sqrt(np.mean(by_degree**2)))).astype(np.float32)


def _expected(levels: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """Levels one day later, in whole numbers."""
    return (levels * memory + MEMORY_UNIT // 2) // MEMORY_UNIT


def _narrow(values: np.ndarray, dtype: type, name: str) -> np.ndarray:
    if np.abs(values).max() > np.iinfo(dtype).max:
        raise BadInput(f"variable {name}: a level of {np.abs(values).max():.0f} does not fit {np.dtype(dtype)}; expected a larger step")
    return values.astype(dtype)


def _errors(decoded: np.ndarray, raw: list[np.ndarray]) -> tuple[float, float]:
    """Area-weighted rms of the rounding error, and the median over cells of its ratio to the day-to-day standard deviation."""
    square = ((decoded - np.concatenate(raw)).astype(np.float64) ** 2).mean(0)
    deviation = np.sqrt(np.mean(np.diff(raw[0].astype(np.float64), axis=0) ** 2, axis=0) / 2)
    ratio = np.sqrt(square)[deviation > 0] / deviation[deviation > 0]
    return float(_global_mean(square)) ** 0.5, float(np.median(ratio))


def _global_mean(field: np.ndarray) -> np.ndarray:
    """Area mean of `[..., lat, lon]` on the Gaussian grid."""
    return np.einsum("...jk,j->...", field, GAUSS_WEIGHTS, dtype=np.float64) / (2 * LONGITUDES)


# ---------------------------------------------------------------- unpacking


def _unpack(packed: xr.Dataset, branches: list[str], names: list[str]) -> xr.Dataset:
    """Fields of the branches, in the order asked."""
    index = [packed.attrs["branches"].index(branch) for branch in branches]
    branch_of_day = packed["branch_of_day"].values
    days = [np.flatnonzero(branch_of_day == i) for i in index]
    order = np.concatenate(days)
    data: dict[str, Any] = {}
    for name in names:
        runs = [packed[f"{name}_levels"].isel(time=slice(day[0], day[-1] + 1)).values for day in days]
        if name == "pr":
            values = _unpack_rain(np.concatenate(runs, axis=1), packed["pr_levels"].attrs["step"])
        else:
            values = _unpack_spectral(packed, name, runs, index)
            if name == "ps":
                values *= (packed["ps_global_mean"].values[order] / _global_mean(values))[:, None, None].astype(np.float32)
            if name == "hus850":
                values = np.maximum(values, 0)
        attrs = {key: value for key, value in packed[f"{name}_levels"].attrs.items() if key != "step"}
        data[name] = (("time", "lat", "lon"), values, attrs)
    for name in ("orog", "lsm"):
        data[name] = packed[name].load().variable
    sst = packed["sst_levels"]
    data["sst"] = (
        sst.dims,
        (sst.values * sst.attrs["step"]).astype(np.float32),
        {key: value for key, value in sst.attrs.items() if key != "step"},
    )
    coords = {
        "time": packed["time"].values[order],
        "lat": packed["lat"].load().variable,
        "lon": packed["lon"].load().variable,
        "month": packed["month"].values,
        "branch": ("time", np.repeat(branches, [len(day) for day in days])),
        "sst_offset": (
            "time",
            np.repeat(packed["sst_offset"].values[index], [len(day) for day in days]),
            {"units": "K", "long_name": "uniform warming of the sea surface"},
        ),
    }
    attrs = {key: value for key, value in packed.attrs.items() if key != "branches"}
    attrs |= {"title": "SPEEDY T31L8 daily means", "comment": "packed with loss; the errors are attributes of the variables"}
    return xr.Dataset(data, coords, attrs)


def _unpack_rain(levels: np.ndarray, step: float) -> np.ndarray:
    """Precipitation `[time, lat, lon]` of levels `[lat, time, lon]`."""
    return (levels.transpose(1, 0, 2).astype(np.float32) * np.float32(step)) ** 2


def _unpack_spectral(packed: xr.Dataset, name: str, runs: list[np.ndarray], index: list[int]) -> np.ndarray:
    """Fields `[time, lat, lon]` of remainders `[coefficient, time]`, one array a branch."""
    packing = SPECTRAL[name]
    table = {key: packed[f"{name}_{key}"].values for key in ("start", "memory", "step", "profile", "mean")}
    memory = table["memory"].astype(np.int32)
    n, _, _ = _wavenumbers(packing.degree, packing.order)
    levels = []
    for run, branch in zip(runs, index, strict=True):
        level = np.ascontiguousarray(run.T).astype(np.int32)
        level[0] = table["start"][branch]
        for day in range(1, len(level)):
            level[day] += _expected(level[day - 1], memory)
        levels.append(level)
    values = _synthesise(np.concatenate(levels) * table["step"][n], packing, table["profile"])
    values += table["mean"]
    if packing.times_cosine:
        values /= COS_LATITUDE[:, None].astype(np.float32)
    return np.exp(values, out=values) if packing.logarithm else values


# ---------------------------------------------------------------- the border


def _known(what: str, asked: Sequence[str], known: Sequence[str] | dict) -> None:
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise BadInput(f"{what} {name}: not among the shipped climate data, expected one of {', '.join(known)}{hint}")
    if not asked or len(set(asked)) < len(asked):
        raise BadInput(f"{what}: expected different names out of {', '.join(known)}, got {list(asked)}")


def _run(path: Path, sst_offset: float) -> xr.Dataset:
    if not path.is_file():
        raise BadInput(f"{path}: no such run; expected a file of speedy.simulate(..., sst_offset={sst_offset})")
    with xr.open_dataset(path) as opened:
        run = opened.load()
    if run.attrs.get("sst_offset_K") != sst_offset:
        raise BadInput(f"{path}: sst_offset_K is {run.attrs.get('sst_offset_K')}, expected {sst_offset}")
    for name in OUTPUTS:
        shape = run[name].shape[1:] if name in run else None
        if shape != (LATITUDES, LONGITUDES):
            raise BadInput(f"{path}: variable {name} has the grid {shape}, expected {(LATITUDES, LONGITUDES)}")
    return run


def _readme(path: Path, digest: str, packed: xr.Dataset) -> str:
    branch_of_day = packed["branch_of_day"].values
    days = ", ".join(f"{name} ({BRANCHES[name]:+.0f} K, {int((branch_of_day == index).sum())} days)" for index, name in enumerate(BRANCHES))
    rows = "\n".join(
        f"| {name} | {units} | {packed[f'{name}_levels'].attrs['quantisation_rms']:.3g} | "
        f"{100 * packed[f'{name}_levels'].attrs['quantisation_relative']:.0f} % |"
        for name, (units, _, _) in OUTPUTS.items()
    )
    return f"""# The shipped climate

`{path.name}`: {path.stat().st_size} bytes, sha256 `{digest}`.

Daily means on the T31 Gaussian grid (48 x 96 cells) of the general-circulation model SPEEDY, as run by `domains/climate/speedy.py`
(package `jcm`): a simulation, not an observation. Runs, with the uniform warming of the sea surface:
{days}.
Static fields: surface altitude `orog`, land fraction `lsm`, climatological sea-surface temperature `sst` (to 0.01 K).

Made by these two commands (extra `[climate]`; the seeds of the runs stand in `conf/domain/climate/simulate.yaml`)

    twinsim data domain=climate/simulate
    python -m domains.climate.embedded pack out/speedy

of which the second also writes this page. Read it with `domains.climate.embedded.open_embedded(branches=("control",))`.

Packing loses a little. Root-mean-square rounding error (area mean), and its median ratio to the local day-to-day standard deviation:

| variable | units | rms error | ratio |
| --- | --- | --- | --- |
{rows}

Precipitation and humidity are non-negative; the global mean of surface pressure is kept for each day. The winds, `zg500`, `ta500`,
`ps` and `hus850` are band-limited: they hold nothing of weight beyond zonal wavenumber 31.

Licence: Apache-2.0, as the rest of twinsim.
"""


def main() -> None:
    """`python -m domains.climate.embedded pack RUNS_FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m domains.climate.embedded", description="Packs SPEEDY runs into the shipped data file.")
    parser.add_argument("verb", choices=["pack"])
    parser.add_argument("runs", type=Path, help="folder with " + ", ".join(f"{name}.nc" for name in BRANCHES))
    arguments = parser.parse_args()
    try:
        print(pack(arguments.runs))
    except BadInput as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
