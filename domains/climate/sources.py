"""Recorded climate: any CF dataset that xarray opens, brought to one shape, with its gaps counted and its files hashed.

Whatever comes in (NetCDF, Zarr v2 or v3, a URL, several files), what comes out has float32 variables with our names and units on
`[time, y, x]`, both horizontal axes ascending, and says in `attrs["gaps"]` what was missing, in words. Nothing is read before its
declared size is known, and a Zarr store may only use codecs that cannot run code.

Source: CF conventions 1.8, ch. 4 (coordinates), 5.6 (grid mappings) and 7.3 (cell methods).
"""

import dataclasses
import difflib
import glob
import hashlib
import json
import logging
import math
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import cf_xarray  # noqa: F401  (registers Dataset.cf)
import numpy as np
import xarray as xr
import zarr

from domains.climate import grid
from twinsim.base import BadInput

GRAVITY = 9.80665  # m s-2, standard gravity (CGPM 1901)
WATER_DENSITY = 1000.0  # kg m-3: 1 kg m-2 of rain is 1 mm, by convention
MAX_BYTES = 16_000_000_000
MAX_MISSING_STEPS = 1_000_000
EDGE = 1e-6  # degrees or axis units by which a cell may lie outside a region's edge: float32 coordinates

Paths = str | os.PathLike | Sequence[str | os.PathLike]
Span = Sequence[str | int]  # [first, last], ISO dates or years, both included

# What a damaged or foreign file makes xarray, netCDF4, h5py and zarr raise.
_UNREADABLE = (
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)

# Codecs that only rearrange, compress or check bytes. Anything else (pickle above all) is refused before it is decoded.
_SAFE_CODECS = frozenset(
    ("bytes", "transpose", "sharding_indexed", "reshape", "vlen-utf8", "vlen-bytes")
    + ("blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd", "packbits", "shuffle")
    + ("astype", "bitround", "cast_value", "delta", "fixedscaleoffset", "quantize", "scale_offset")
    + ("adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3")
)


@dataclass(frozen=True)
class Wanted:
    """A variable to take from a file.

    Attributes:
      name: its name in the file.
      units: the units to bring it to, UDUNITS.
      at: level or member to pick where it has more dimensions than time and the horizontal: coordinate name -> value.
      file_units: the file's units, where the file states none or wrong ones.
    """

    name: str
    units: str
    at: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    file_units: str = ""


class Axes(NamedTuple):
    """Dimension names of a variable; `time` is None for a static field."""

    time: str | None
    y: str
    x: str


# ---------------------------------------------------------------- opening


def open_cf(
    paths: Paths,
    variables: Mapping[str, Wanted | Mapping[str, Any]],
    region: Mapping[str, Sequence[float]] | None = None,
    period: Span | None = None,
    months: Sequence[int] | None = None,
    isel: Mapping[str, Sequence[int]] | None = None,
    coarsen: int | Sequence[int] | None = None,
    gaps: str = "error",
    max_bytes: int = MAX_BYTES,
) -> xr.Dataset:
    """The variables of a CF dataset, loaded, on `[time, y, x]` (static ones `[y, x]`), both horizontal axes ascending.

    Args:
      paths: a file, Zarr folder or zip, URL, glob pattern, or several of them. Files are joined along time, and variables may be
        spread over files.
      variables: our name -> what to take.
      region: coordinate -> [first, last], both included. `lon` runs eastward from first to last in either convention, across
        Greenwich or the date line, and the result's longitudes ascend from first. On a grid with 2-D `lat` and `lon` the smallest
        index box that holds the region is taken. A dimension's own name works too.
      period: [first, last]; "2005" as an end includes all of it.
      months: calendar months to keep, winter is [12, 1, 2].
      isel: dimension -> [start, stop) after sorting; applied after `region`.
      coarsen: block size, one number or (y, x): area-weighted mean over the cells that are not missing.
      gaps: what to do about missing values in cells that are not always missing, and about missing time steps: "error", "drop" (the
        time steps with missing values) or "keep". Cells that are missing at every time (sea in land data) are refused unless kept.
      max_bytes: largest size to load, and largest chunk.

    Returns:
      float32 variables with `units`, `standard_name`, `cell_methods` and `grid_mapping` kept; 2-D `lat`, `lon` and the grid mapping
      are coordinates. `attrs["gaps"]` says in a few words, without a full stop, what was missing and was dropped or kept; "" where
      nothing was. `attrs["gap_counts"]` has the numbers, as JSON text.

    Raises:
      BadInput: whatever is wrong with the files or the choice, in one sentence.
    """
    if not variables:
        raise BadInput("variables: none given, expected our name -> {name: name in the file, units: wanted units}")
    if gaps not in ("error", "drop", "keep"):
        raise BadInput(f"gaps: expected error, drop or keep, got {gaps!r}")
    wanted = {ours: _wanted(ours, spec) for ours, spec in variables.items()}
    files = find(paths)
    where = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"

    pieces: dict[str, list[xr.DataArray]] = {ours: [] for ours in wanted}
    present: dict[str, None] = {}
    attrs: dict[str, Any] = {}
    declared, outside = 0, ""
    for file in files:
        with _open(file, max_bytes) as opened:
            attrs = attrs or dict(opened.attrs)
            present |= dict.fromkeys(str(name) for name in opened.data_vars)
            for ours, spec in wanted.items():
                if spec.name not in opened.variables:
                    continue
                try:
                    array = _pick(opened, spec, file)
                    array = _within_time(array, period, months, file)
                except _OutsideTime as error:
                    outside = str(error)  # another file may hold the period
                    continue
                boxes = _boxes(array, region or {}, isel or {}, file)
                declared += sum(box.size * box.dtype.itemsize for box in boxes)
                if declared > max_bytes:
                    raise BadInput(
                        f"{file}: variable {spec.name} would load {declared / 1e9:.3g} GB,"
                        f" expected at most {max_bytes / 1e9:.3g} GB; choose a region or period"
                    )
                pieces[ours].append(_side_by_side([_load(box, spec.name, file) for box in boxes]))
    for ours, spec in wanted.items():
        if spec.name not in present:
            raise BadInput(f"{where}: no variable {spec.name}; {_present(spec.name, present)}")
        if not pieces[ours]:
            raise BadInput(outside)

    arrays = {ours: _to_units(_join(parts, ours, where), wanted[ours], where).rename(ours) for ours, parts in pieces.items()}
    dataset = _merge(arrays, where)
    dataset = _settle_gaps(dataset, gaps, where)
    if coarsen is not None:
        dataset = coarsened(dataset, coarsen)
    if gaps != "keep":
        _refuse_absent_cells(dataset, where)
    kept = {key: value for key, value in attrs.items() if isinstance(value, str | int | float | np.number)}
    dataset.attrs = {**kept, **dataset.attrs}
    return dataset


def find(paths: Paths) -> list[str]:
    """The files, Zarr stores and URLs that `paths` stands for, globs expanded, in order.

    Raises:
      BadInput: one does not exist.
    """
    found: list[str] = []
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        text = os.fspath(path)
        if _is_url(text) or os.path.exists(text):
            matches = [text]
        else:
            matches = sorted(glob.glob(text)) if glob.has_magic(text) else []
        if not matches:
            raise BadInput(f"{text}: no such file, expected a NetCDF file, a Zarr store, a URL or a glob pattern that matches some")
        found += [match for match in matches if match not in found]
    if not found:
        raise BadInput("paths: none given, expected at least one file")
    return found


def inputs(paths: Paths, licence: str = "") -> list[dict[str, Any]]:
    """Where the data came from, one dict a file: `name`, `path`, `licence`, `sha256` and `size` in bytes.

    The licence is the file's own global attribute, or the one given where it has none. A Zarr folder's digest is that of its files'
    relative paths and contents in sorted order; of a URL, which is not read as a whole, digest and size are None.
    """
    records: list[dict[str, Any]] = []
    for path in find(paths):
        digest, size = (None, None) if _is_url(path) else _digest(Path(path))
        stated = "" if _is_url(path) else _licence(path)
        records.append(
            {
                "name": path.rstrip("/").split("/")[-1],
                "path": path,
                "licence": stated or licence or "not stated",
                "sha256": digest,
                "size": size,
            }
        )
    return records


def _wanted(ours: str, spec: Wanted | Mapping[str, Any]) -> Wanted:
    if isinstance(spec, Wanted):
        return spec
    try:
        return Wanted(**spec)
    except TypeError as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Wanted))
        raise BadInput(f"variable {ours}: expected a mapping with {fields}, got {dict(spec)}") from error


def _is_url(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def _is_zarr(path: str) -> bool:
    bare = path.split("?")[0].rstrip("/")
    if bare.endswith((".zarr", ".zarr.zip", ".zarr-v2", ".zarr-v3")):
        return True
    return any((Path(path) / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _open(path: str, max_bytes: int) -> xr.Dataset:
    """The dataset, nothing of it loaded but the coordinates of its dimensions."""
    try:
        options: dict[str, Any] = {"chunks": None}
        if _is_zarr(path):
            group = zarr.open_group(_store(path), mode="r")
            _refuse_foreign_codecs(group, path)
            options |= {"engine": "zarr", "consolidated": group.metadata.consolidated_metadata is not None}
        with xr.open_dataset(_store(path), decode_times=False, create_default_indexes=False, **options) as bare:
            for name, variable in bare.coords.items():
                if variable.size * variable.dtype.itemsize > max_bytes / 8:
                    raise BadInput(
                        f"{path}: coordinate {name} declares {variable.size} values, too many for a limit of {max_bytes / 1e9:.3g} GB"
                    )
        return xr.open_dataset(_store(path), decode_timedelta=False, **options)
    except BadInput:
        raise
    except ImportError as error:
        raise BadInput(f"{path}: a package that reads it is not installed ({_first_line(error)}); pip install 'twinsim[remote]'") from error
    except _unanswered(path) as error:
        raise BadInput(f"{path}: the server did not give it ({type(error).__name__}): {_first_line(error)}") from error
    except _UNREADABLE as error:
        raise BadInput(f"{path}: cannot be opened as NetCDF or Zarr, damaged or of another format: {_first_line(error)}") from error


def _unanswered(path: str) -> tuple[type[Exception], ...]:
    """What the packages that speak with the servers of a URL raise, as far as they are there."""
    if not _is_url(path):
        return ()
    names = {
        "aiohttp": "ClientError",
        "botocore.exceptions": "BotoCoreError",
        "gcsfs.retry": "HttpError",
        "google.auth.exceptions": "GoogleAuthError",
    }
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


def _store(path: str) -> Any:
    """What xarray opens."""
    return zarr.storage.ZipStore(path, mode="r") if _is_zarr(path) and path.endswith(".zip") else path


def _refuse_foreign_codecs(group: zarr.Group, path: str) -> None:
    """Looks at the metadata of every array of a Zarr store; a codec such as pickle would run code when it decodes."""
    for name, array in [*group.members(max_depth=None)]:
        for codec in _codec_names(array.metadata.to_dict()):
            if codec.removeprefix("numcodecs.") not in _SAFE_CODECS:
                allowed = ", ".join(sorted(_SAFE_CODECS))
                raise BadInput(f"{path}: array {name} is encoded with {codec}, which is not allowed; expected one of {allowed}")


def _codec_names(metadata: Any) -> Iterator[str]:
    """Names of all codecs in the metadata of a Zarr v2 or v3 array, nested ones included."""
    if not isinstance(metadata, Mapping):
        return
    for key in ("codecs", "index_codecs", "filters", "compressor"):
        entries = metadata.get(key) or ()
        for entry in entries if isinstance(entries, list | tuple) else (entries,):
            described = entry if isinstance(entry, Mapping) else (entry.get_config() if hasattr(entry, "get_config") else entry.to_dict())
            yield str(described.get("name") or described.get("id"))
            yield from _codec_names(described.get("configuration"))


def _load(array: xr.DataArray, name: str, path: str) -> xr.DataArray:
    try:
        loaded = array.astype(np.float32 if array.dtype.itemsize <= 4 else np.float64).load()
    except MemoryError as error:
        size = f"{array.nbytes / 1e9:.3g} GB"
        raise BadInput(f"{path}: variable {name} does not fit in memory ({size}); choose a region or period") from error
    except _unanswered(path) as error:
        raise BadInput(f"{path}: the server did not give variable {name} ({type(error).__name__}): {_first_line(error)}") from error
    except _UNREADABLE as error:
        raise BadInput(f"{path}: variable {name} cannot be read, the file is damaged: {_first_line(error)}") from error
    return loaded


# ---------------------------------------------------------------- one variable of one file: its axes and the part that is wanted


class _OutsideTime(BadInput):
    """A file has no time step in the period."""


def _pick(dataset: xr.Dataset, spec: Wanted, path: str) -> xr.DataArray:
    """The variable on `(time, y, x)` or `(y, x)`, axes ascending, auxiliary coordinates kept; not loaded."""
    array = dataset[spec.name]
    if array.dtype.kind not in "iuf":
        raise BadInput(f"{path}: variable {spec.name} is of type {array.dtype}, expected numbers")
    chunk = _chunk_bytes(array)
    if chunk > MAX_BYTES / 4:
        limit = f"{MAX_BYTES / 4e9:.3g} GB"
        raise BadInput(f"{path}: variable {spec.name} is stored in chunks of {chunk / 1e9:.3g} GB, expected at most {limit}")
    array = _at_levels(array, spec, path)
    axes = _axes(array, spec.name, path)
    extra = [dim for dim in array.dims if dim not in axes and array.sizes[dim] > 1]
    if extra:
        choices = "; ".join(f"{dim} has {array.sizes[dim]} values" for dim in extra)
        raise BadInput(
            f"{path}: variable {spec.name} has more dimensions than time and the horizontal ({choices}),"
            " expected one value of each picked with `at`"
        )
    array = array.squeeze([dim for dim in array.dims if dim not in axes], drop=True)
    if 0 in array.shape:
        raise BadInput(f"{path}: variable {spec.name} is empty, its dimensions are {dict(array.sizes)}")
    if axes.time is not None and axes.time != "time":
        array = array.drop_vars("time", errors="ignore").rename({axes.time: "time"})
    array = array.transpose(*(["time"] if axes.time else []), axes.y, axes.x)
    latitude, longitude = _position(array, axes)
    kept = {"time", axes.y, axes.x, latitude, longitude, *_told_of_days(array)}
    array = array.drop_vars([name for name in array.coords if name not in kept])
    for name, standard, units in ((latitude, "latitude", "degrees_north"), (longitude, "longitude", "degrees_east")):
        if name:
            stated = {key: value for key, value in array[name].attrs.items() if key not in ("bounds", "_FillValue")}  # edges are not kept
            attrs = {"units": units, **stated, "standard_name": standard}
            coordinate = array[name].variable.copy(deep=False)
            coordinate.attrs = attrs
            array = array.assign_coords({name: coordinate})
    mapping = str(array.attrs.get("grid_mapping") or array.encoding.get("grid_mapping") or "")
    if mapping in dataset.variables:
        array = array.assign_coords({mapping: dataset[mapping].drop_vars(list(dataset[mapping].coords))})
        array.attrs["grid_mapping"] = mapping
    for dim in (axes.y, axes.x):
        array = _ascending(array, dim, path)
    return array


def _told_of_days(array: xr.DataArray) -> list[str]:
    """Coordinates along time that tell days apart, such as a forcing or the name of a run: what a split or a condition may name."""
    along = [str(name) for name, values in array.coords.items() if values.dims == ("time",) and name != "time"]
    return [name for name in along if array[name].dtype.kind in "iufbUSO"]


def _chunk_bytes(array: xr.DataArray) -> int:
    """Size of the chunk that has to be decoded to read one value."""
    chunks = array.encoding.get("preferred_chunks") or dict(enumerate(array.encoding.get("chunksizes") or ()))
    return math.prod(int(size) for size in chunks.values()) * array.dtype.itemsize if chunks else 0


def _ascending(array: xr.DataArray, dim: str, path: str) -> xr.DataArray:
    """The array with `dim` in rising order; cells are numbered where the dimension has no coordinate."""
    if dim not in array.coords:
        return array.assign_coords({dim: np.arange(array.sizes[dim], dtype=np.float64)})
    values = array[dim].values
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise BadInput(f"{path}: coordinate {dim} is not finite or not a number, expected a monotonic axis")
    steps = np.diff(values)
    if (steps > 0).all():
        return array
    if (steps < 0).all():
        return array.isel({dim: slice(None, None, -1)})
    eastward = np.unwrap(values, period=360)
    if array[dim].attrs.get("standard_name") == "longitude" and (np.diff(eastward) > 0).all() and np.ptp(eastward) < 360 - steps.max():
        return array.assign_coords({dim: (dim, eastward - 360 * (eastward[-1] >= 360), array[dim].attrs)})  # a region over the seam
    array = array.isel({dim: np.argsort(values, kind="stable")})
    if (np.diff(array[dim].values) <= 0).any():
        raise BadInput(f"{path}: coordinate {dim} has the same value twice, expected a monotonic axis")
    return array


def _at_levels(array: xr.DataArray, spec: Wanted, path: str) -> xr.DataArray:
    for name, value in spec.at.items():
        if name not in array.coords or array[name].ndim > 1:
            raise BadInput(f"{path}: variable {spec.name} has no coordinate {name}; {_present(name, array.coords)}")
        if array[name].ndim == 0:
            continue
        levels = array[name].values
        numeric = levels.dtype.kind in "iuf"
        index = np.flatnonzero(np.isclose(levels, float(value), rtol=1e-6) if numeric else levels.astype(str) == str(value))
        if len(index) != 1:
            shown = ", ".join(str(level) for level in levels[:20])
            raise BadInput(f"{path}: coordinate {name} of {spec.name} has no single value {value}; present: {shown}")
        array = array.isel({array[name].dims[0]: int(index[0])})
    return array


def _axes(array: xr.DataArray, name: str, path: str) -> Axes:
    """Finds the axes by CF attributes, then by the habits of names and units."""
    guessed = array.cf.guess_coord_axis()

    def axis(letter: str, coordinate: str, names: str) -> str | None:
        for source in (array, guessed):
            for keys in (source.cf.axes.get(letter, []), source.cf.coordinates.get(coordinate, [])):
                dims = [key for key in keys if key in array.dims]
                if len(dims) == 1:
                    return str(dims[0])
        dims = [dim for dim in array.dims if re.fullmatch(names, str(dim), re.IGNORECASE)]
        return str(dims[0]) if len(dims) == 1 else None

    time = axis("T", "time", r"time|t|date|valid_time")
    y = axis("Y", "latitude", r"lat.*|rlat|y|yc|j|south_north|nav_lat|projection_y.*")
    x = axis("X", "longitude", r"lon.*|rlon|x|xc|i|west_east|nav_lon|projection_x.*")
    if y is None or x is None or y == x:
        raise BadInput(
            f"{path}: variable {name} has the dimensions {tuple(array.dims)} and no recognisable horizontal axes;"
            " expected coordinates with axis, standard_name or units by the CF conventions"
        )
    return Axes(time, y, x)


def _position(array: xr.DataArray, axes: Axes) -> tuple[str, str]:
    """Names of the latitude and longitude coordinates, "" where there are none."""

    def named(kind: str, units: str, plain: str, axis: str) -> str:
        found = []
        for name, coordinate in array.coords.items():
            stated = coordinate.attrs.get("standard_name")
            plausible = re.fullmatch(units, str(coordinate.attrs.get("units", "")), re.I) or re.fullmatch(plain, str(name), re.I)
            if coordinate.ndim and set(coordinate.dims) <= {axes.y, axes.x} and (stated == kind or (plausible and stated is None)):
                found.append(str(name))
        return axis if axis in found else (found[0] if found else "")

    latitude = named("latitude", "degrees?_?n(orth)?", r"lat.*|xlat|nav_lat", axes.y)
    longitude = named("longitude", "degrees?_?e(ast)?", r"lon.*|xlong|nav_lon", axes.x)
    return latitude, longitude


def _within_time(array: xr.DataArray, period: Span | None, months: Sequence[int] | None, path: str) -> xr.DataArray:
    """The time steps in `period` and `months`; a static field as it is."""
    if months is not None and (not months or not set(months) <= set(range(1, 13))):
        raise BadInput(f"months: expected numbers from 1 to 12, got {list(months)}")
    if "time" not in array.dims:
        return array
    if "time" not in array.coords or not _is_time(array["time"].values):
        raise BadInput(f"{path}: time is not decodable, expected units such as 'days since 2000-01-01' and a CF calendar")
    kept = np.ones(array.sizes["time"], bool)
    if period is not None:
        kept &= within(array["time"], period)
    if months is not None:
        kept &= np.isin(array["time"].dt.month.values, list(months))
    if not kept.any():
        first, last = _iso(array["time"])[[0, -1]]
        raise _OutsideTime(f"{path}: no time step in period {_shown(period)}, months {_shown(months)}; the data run from {first} to {last}")
    return array.isel(time=_compact(kept))


def _boxes(array: xr.DataArray, region: Mapping[str, Sequence[float]], isel: Mapping[str, Sequence[int]], path: str) -> list[xr.DataArray]:
    """The cells [start, stop) of `isel` inside `region`, as boxes from west to east: two where it crosses the seam of the longitudes.

    Longitudes of a regular grid become those that ascend from the western edge of the region.
    """
    y, x = str(array.dims[-2]), str(array.dims[-1])
    inside = np.ones((array.sizes[y], array.sizes[x]), bool)
    east = None  # longitude of each column, counted eastward from the region's western edge
    for key, edges in region.items():
        name = _coordinate(array, key, path)
        if len(edges) != 2 or not np.isfinite(np.asarray(edges, np.float64)).all():
            raise BadInput(f"region {key}: expected [first, last], got {list(edges)}")
        first, last = map(float, edges)
        values = array[name].values.astype(np.float64)
        if array[name].attrs.get("standard_name") == "longitude":
            width = 360.0 if last - first >= 360 else (last - first) % 360
            offset = (values - first + EDGE) % 360 - EDGE
            chosen = offset <= width + EDGE
            if array[name].dims == (x,):
                east = first + offset
        elif first > last:
            raise BadInput(f"region {key}: expected [first, last] ascending, got {[first, last]}")
        else:
            chosen = (values >= first - EDGE) & (values <= last + EDGE)
        inside &= chosen[:, None] if array[name].dims == (y,) else chosen
    if not inside.any():
        covered = ", ".join(f"{key} {float(array[_coordinate(array, key, path)].min()):.6g}" for key in region)
        covered += " to " + ", ".join(f"{float(array[_coordinate(array, key, path)].max()):.6g}" for key in region)
        raise BadInput(f"{path}: no cell in the region { ({key: list(edges) for key, edges in region.items()}) }; the data cover {covered}")
    if unknown := [dim for dim in isel if dim not in (y, x)]:
        raise BadInput(f"{path}: isel names {unknown[0]}; {_present(unknown[0], (y, x))}")
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    rows, columns = np.arange(rows[0], rows[-1] + 1), np.arange(columns[0], columns[-1] + 1) if east is None else columns
    if east is not None:
        columns = columns[np.argsort(east[columns], kind="stable")]
        columns = columns[np.concatenate([[True], np.diff(east[columns]) > EDGE])]  # a cyclic point, 0 and 360, is kept once
    rows, columns = (_taken(cells, dim, isel, path) for cells, dim in ((rows, y), (columns, x)))
    array = array.isel({y: slice(rows[0], rows[-1] + 1)})
    if east is None:
        return [array.isel({x: slice(columns[0], columns[-1] + 1)})]
    boxes = []
    for part in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1):
        longitude = (x, np.round(east[part], 9), array[x].attrs)
        boxes.append(array.isel({x: slice(part[0], part[-1] + 1)}).assign_coords({x: longitude}))
    return boxes


def _coordinate(array: xr.DataArray, key: str, path: str) -> str:
    """The coordinate that a region's key names: `lat` and `lon` are whatever the file calls latitude and longitude."""
    standard = {"lat": "latitude", "lon": "longitude"}.get(key)
    if key in array.coords:
        return key
    for name, coordinate in array.coords.items():
        if standard and coordinate.attrs.get("standard_name") == standard:
            return str(name)
    raise BadInput(f"{path}: region names {key}; {_present(key, array.coords)}")


def _taken(cells: np.ndarray, dim: str, isel: Mapping[str, Sequence[int]], path: str) -> np.ndarray:
    """Of the cells of one dimension those that `isel` asks for."""
    if dim not in isel:
        return cells
    start, stop = isel[dim]
    if not 0 <= start < stop <= len(cells):
        raise BadInput(f"{path}: isel {dim}: expected 0 <= start < stop <= {len(cells)}, got {[start, stop]}")
    return cells[start:stop]


def _side_by_side(boxes: list[xr.DataArray]) -> xr.DataArray:
    if len(boxes) == 1:
        return boxes[0]
    return xr.concat(boxes, boxes[0].dims[-1], coords="different", compat="equals", join="override", combine_attrs="override")


def _compact(kept: np.ndarray) -> slice | np.ndarray:
    """A slice where the kept rows are contiguous: files are read faster so."""
    rows = np.flatnonzero(kept)
    return slice(rows[0], rows[-1] + 1) if len(rows) == rows[-1] - rows[0] + 1 else rows


# ---------------------------------------------------------------- joining


def _join(parts: list[xr.DataArray], name: str, where: str) -> xr.DataArray:
    """One variable of several files, along time, in order."""
    first = parts[0]
    for part in parts[1:]:
        if part.dims != first.dims or part.shape[-2:] != first.shape[-2:]:
            raise BadInput(f"{where}: variable {name} is on different grids: {dict(first.sizes)} and {dict(part.sizes)}")
        for dim in first.dims[-2:]:
            if not _same(part[dim], first[dim]):
                raise BadInput(f"{where}: variable {name} is on different grids: coordinate {dim} differs between the files")
        ours, theirs = first.attrs.get("units"), part.attrs.get("units")
        if ours != theirs:
            raise BadInput(f"{where}: variable {name} has the units {ours} in one file and {theirs} in another")
    if "time" not in first.dims:
        return first
    calendars = {part["time"].dt.calendar for part in parts}
    if len(calendars) > 1:
        raise BadInput(f"{where}: variable {name} has different calendars: {', '.join(sorted(calendars))}")
    joined = first
    if len(parts) > 1:
        shared = set.intersection(*(set(part.coords) for part in parts))
        parts = [part.drop_vars([name for name in part.coords if name not in shared and part[name].dims == ("time",)]) for part in parts]
        joined = xr.concat(parts, "time", coords="minimal", compat="override", join="override", combine_attrs="override")
    seconds = _seconds(joined["time"])
    if not np.isfinite(seconds).all():
        raise BadInput(f"{where}: time of variable {name} has missing values")
    if (np.diff(seconds) <= 0).any():
        order = np.argsort(seconds, kind="stable")
        joined = joined.isel(time=order)
        same = np.flatnonzero(np.diff(seconds[order]) == 0)
        if len(same):
            raise BadInput(f"{where}: variable {name} has the time {_iso(joined['time'])[same[0]]} twice, expected each once")
    return joined


def _same(axis: xr.DataArray, other: xr.DataArray) -> bool:
    """Two axes differ by no more than rounding: a hundredth of a cell."""
    cell = float(np.abs(np.diff(axis.values)).min()) if axis.size > 1 else 1.0
    return axis.size == other.size and bool(np.allclose(axis, other, rtol=0, atol=0.01 * cell))


def _merge(arrays: dict[str, xr.DataArray], where: str) -> xr.Dataset:
    """All variables on one grid and one time axis; a time that a variable lacks is missing there."""
    grids = {array.dims[-2:] + array.shape[-2:]: name for name, array in arrays.items()}
    if len(grids) > 1:
        shown = "; ".join(f"{name} on {dict(zip(grid[:2], grid[2:], strict=True))}" for grid, name in grids.items())
        raise BadInput(f"{where}: the variables are on different grids, expected one grid an open_cf call: {shown}")
    first = next(iter(arrays.values()))
    for name, array in arrays.items():
        for dim in first.dims[-2:]:
            if not _same(array[dim], first[dim]):
                raise BadInput(f"{where}: variable {name} is on another grid: coordinate {dim} differs")
            arrays[name] = arrays[name].assign_coords({dim: first[dim]})
    calendars = {array["time"].dt.calendar for array in arrays.values() if "time" in array.dims}
    if len(calendars) > 1:
        raise BadInput(f"{where}: the variables have different calendars: {', '.join(sorted(calendars))}")
    merged = xr.merge(arrays.values(), join="outer", compat="override", combine_attrs="override")
    merged.attrs = {}  # those of one variable say nothing of the others
    return merged


# ---------------------------------------------------------------- units


def _to_units(array: xr.DataArray, spec: Wanted, where: str) -> xr.DataArray:
    """The array in the wanted units, float32."""
    stated = spec.file_units or str(array.attrs.get("units", ""))
    if not stated:
        raise BadInput(
            f"{where}: variable {spec.name} states no units, expected some that convert to {spec.units}; give them as file_units"
        )
    scale, offset = (1.0, 0.0) if stated == spec.units else conversion(stated, spec.units, f"{where}: variable {spec.name}")
    values = array.values
    if (scale, offset) != (1.0, 0.0):
        values = values * np.float64(scale) + np.float64(offset)
    converted = array.copy(data=values.astype(np.float32, copy=False))
    attrs = {**array.attrs, "units": spec.units}
    if attrs.get("standard_name") == "precipitation_flux" and "kg" in stated and "kg" not in spec.units:
        attrs["standard_name"] = "lwe_precipitation_rate"
    if attrs.get("standard_name") == "geopotential" and spec.units == "m":
        attrs["standard_name"] = "geopotential_height"
    converted.attrs = attrs
    return converted


_USUAL_UNITS = {  # what pint reads as something else or not at all: degrees as angles, mb as millibarns
    r"(deg(ree)?s?[ ._]*|°\s*)c(elsius)?|celsius": "degC",
    r"(deg(ree)?s?[ ._]*)?k(elvin)?": "K",
    r"mb": "mbar",
}


def conversion(stated: str, wanted: str, where: str) -> tuple[float, float]:
    """Scale and offset from one unit to another: `wanted = stated * scale + offset`.

    Water may go between mass per area and depth (1000 kg m-3), geopotential to height (standard gravity).

    Raises:
      BadInput: a unit is unknown, or they do not convert.
    """
    logging.getLogger("pint.util").setLevel(logging.ERROR)  # cf_xarray redefines some units, which pint would tell of
    from cf_xarray.units import units  # here: half a second that most files do not need

    def parsed(text: str) -> Any:
        number = re.match(r"\s*[-+]?[\d.]+([eE][-+]?\d+)?(?=\s+\D)", text)  # "0.1 K"
        name = text[number.end() if number else 0 :].strip()
        for pattern, usual in _USUAL_UNITS.items():
            name = usual if re.fullmatch(pattern, name, re.IGNORECASE) else name
        try:
            found = units.Quantity(np.array([0.0, 1.0]) * float(number[0] if number else 1), units.Unit(name or "1"))
            if "[temperature]" in found.dimensionality and "degree" in found.units._units:
                raise ValueError("a temperature times an angle")
            return found
        except Exception as error:  # pint, its tokenizer and the UDUNITS preprocessor raise whatever they like on nonsense
            raise BadInput(f"{where}: unit {text!r} is not known, expected a UDUNITS one such as K, mm day-1, m s-1") from error

    source, target = parsed(stated), parsed(wanted)
    depth_of_water = units.Unit("m3 kg-1").dimensionality  # a depth per (mass per area)
    ratio = target.dimensionality / source.dimensionality
    factor = units.Quantity(1.0, "")
    if ratio == depth_of_water:
        factor = units.Quantity(1 / WATER_DENSITY, "m3 kg-1")
    elif 1 / ratio == depth_of_water:
        factor = units.Quantity(WATER_DENSITY, "kg m-3")
    elif source.dimensionality == units.Unit("m2 s-2").dimensionality and target.dimensionality == units.Unit("m").dimensionality:
        factor = units.Quantity(1 / GRAVITY, "s2 m-1")
    elif source.dimensionality != target.dimensionality:
        raise BadInput(f"{where}: its units {stated} do not convert to {wanted}")
    low, high = ((source * factor) if factor.units != units.Unit("") else source).to(target.units).magnitude
    return float(high - low), float(low)


# ---------------------------------------------------------------- gaps


def _settle_gaps(dataset: xr.Dataset, policy: str, where: str) -> xr.Dataset:
    """Counts what is missing, applies the policy and notes both in `attrs["gaps"]`. Infinite values count as missing."""
    missing: dict[str, int] = {}
    masked: dict[str, int] = {}
    broken = np.zeros(dataset.sizes.get("time", 0), bool)
    for name, array in dataset.data_vars.items():
        bad = ~np.isfinite(array.values)
        if bad.all():
            raise BadInput(f"{where}: variable {name} has no finite value in the chosen part")
        if np.isinf(array.values).any():
            dataset = dataset.assign({name: array.where(~bad)})
        if "time" in array.dims:
            never = bad.all(0)
            bad &= ~never
            broken |= bad.any((1, 2))
        else:
            never, bad = bad, np.zeros_like(bad)
        masked[str(name)], missing[str(name)] = int(never.sum()), int(bad.sum())
    steps = _missing_steps(dataset["time"], where) if "time" in dataset.dims else {}
    report = {
        "policy": policy,
        "missing_values": missing,
        "always_missing_cells": masked,
        "time_steps_with_missing_values": int(broken.sum()),
        **steps,
    }
    absent = steps.get("missing_time_steps", 0)
    if policy == "error" and (any(missing.values()) or absent):
        parts = [f"{count} missing values of {name}" for name, count in missing.items() if count]
        parts += [f"{absent} missing time steps from {steps['first_missing_time_steps'][0]} on"] if absent else []
        raise BadInput(f"{where}: {' and '.join(parts)}; expected none, or gaps='drop' or gaps='keep'")
    if policy == "drop" and broken.any():
        if broken.all():
            raise BadInput(f"{where}: every time step has missing values, nothing is left after gaps='drop'")
        dataset = dataset.isel(time=np.flatnonzero(~broken))
    return dataset.assign_attrs(gaps=_in_words(report), gap_counts=json.dumps(report))


def _in_words(report: Mapping[str, Any]) -> str:
    """What was missing, and what was done about it; "" where nothing was."""
    told = [f"{count} values of {name}" for name, count in report["missing_values"].items() if count]
    told = [f"{', '.join(told)} missing in {report['time_steps_with_missing_values']} time steps"] if told else []
    if told and report["policy"] == "drop":
        told[0] += ", which were left out"
    told += [f"{count} cells of {name} missing at every time" for name, count in report["always_missing_cells"].items() if count]
    if absent := report.get("missing_time_steps", 0):
        told.append(f"{absent} time steps absent, the first at {report['first_missing_time_steps'][0]}")
    return "; ".join(told)


def _refuse_absent_cells(dataset: xr.Dataset, where: str) -> None:
    """Raises BadInput where a variable has cells without any value: nothing could be learnt of them."""
    for name, array in dataset.data_vars.items():
        absent = np.isnan(array.values)
        absent = absent.all(0) if "time" in array.dims else absent
        if absent.any():
            raise BadInput(
                f"{where}: {int(absent.sum())} of {absent.size} cells of {name} have no value at any time (sea in data of land?);"
                " expected values in every cell; choose a region without such cells, with region or isel"
            )


def _missing_steps(time: xr.DataArray, where: str) -> dict[str, Any]:
    """How many steps of the regular axis are absent, the first of them, the step, and the first and last time there is.

    Regular is the median step. A gap counts only within calendar months that occur in the data, so that a file of winters has
    none. Steps of 28 to 31 days are calendar months.
    """
    seconds = _seconds(time)
    first, last = _iso(time)[[0, -1]]
    report: dict[str, Any] = {"missing_time_steps": 0, "first_missing_time_steps": [], "first_time": str(first), "last_time": str(last)}
    if len(seconds) < 3:
        return report
    gaps = np.diff(seconds)
    step = float(np.median(gaps))
    months = set(time.dt.month.values.tolist())
    if 28 * 86400 <= step <= 31 * 86400:
        there = set((time.dt.year.values * 12 + time.dt.month.values - 1).tolist())
        absent = [month for month in range(min(there), max(there)) if month % 12 + 1 in months and month not in there]
        names = [f"{month // 12:04d}-{month % 12 + 1:02d}" for month in absent]
        return report | {"missing_time_steps": len(absent), "first_missing_time_steps": names[:5], "time_step": "1 month"}
    counts = np.maximum(np.rint(gaps / step).astype(np.int64) - 1, 0)
    if counts.sum() > MAX_MISSING_STEPS:
        raise BadInput(f"{where}: the time axis is irregular, {int(counts.sum())} steps of {step:g} s would be missing")
    absent_times: list[str] = []
    for index in np.flatnonzero(counts):
        start = time.values[index]
        jumps = [timedelta(seconds=step * jump) for jump in range(1, counts[index] + 1)]
        steps = [start + (np.timedelta64(jump, "ns") if time.dtype.kind == "M" else jump) for jump in jumps]
        between = _iso(xr.DataArray(np.array(steps), dims="time"))
        absent_times += [text for text in between.tolist() if int(text[5:7]) in months]
    words = f"{step / 86400:g} day" if step >= 86400 else f"{step / 60:g} min"
    return report | {"missing_time_steps": len(absent_times), "first_missing_time_steps": absent_times[:5], "time_step": words}


# ---------------------------------------------------------------- coarser


def coordinate_of(dataset: xr.Dataset, kind: str) -> str | None:
    """The coordinate that says it is the "latitude" or "longitude", else the one in degrees called lat or lon; None where there is none."""
    for name, values in dataset.coords.items():
        if values.attrs.get("standard_name") == kind and values.ndim:
            return str(name)
    plain = {"latitude": "lat", "longitude": "lon"}[kind]
    in_degrees = plain in dataset.coords and str(dataset[plain].attrs.get("units", "")).startswith("degree")
    return plain if in_degrees and "standard_name" not in dataset[plain].attrs else None


def coarsened(dataset: xr.Dataset, factor: int | Sequence[int]) -> xr.Dataset:
    """Block means over `factor` cells, one number or (y, x), weighted by the cosine of latitude on a latitude-longitude grid.

    Cells of a projected or rotated grid count as equal. A block's mean is over its cells that are not missing; it is missing
    where all are.

    Raises:
      BadInput: the grid is not a whole number of blocks.
    """
    y, x = _grid_dims(dataset)
    blocks = dict(zip((y, x), (factor, factor) if isinstance(factor, int) else tuple(factor), strict=True))
    for dim, size in blocks.items():
        if size < 1 or dataset.sizes[dim] % size:
            raise BadInput(f"coarsen: {dim} has {dataset.sizes[dim]} cells, not a whole number of blocks of {size}; cut it with isel")

    def total(values: np.ndarray) -> np.ndarray:
        """Sums over blocks of `[..., y, x]`."""
        rows, columns = values.shape[-2] // blocks[y], values.shape[-1] // blocks[x]
        return values.reshape(*values.shape[:-2], rows, blocks[y], columns, blocks[x]).sum((-3, -1))

    area = _area(dataset, y, x)
    data: dict[Any, Any] = {}
    for name, array in dataset.data_vars.items():
        if array.dims[-2:] != (y, x):
            data[name] = array.variable
            continue
        valid = np.isfinite(array.values)
        weight = total(valid * area)
        mean = total(np.where(valid, array.values, 0) * area) / np.where(weight > 0, weight, np.nan)
        methods = f"{array.attrs.get('cell_methods', '')} area: mean".strip()
        data[name] = (array.dims, mean.astype(np.float32), {**array.attrs, "cell_methods": methods})
    coords: dict[Any, Any] = {}
    for name, coordinate in dataset.coords.items():
        values = coordinate.values
        if coordinate.dims == (y, x):
            turn = np.exp(1j * np.deg2rad(values))  # angles: the mean of 359 and 1 degree is 0
            values = np.rad2deg(np.angle(total(turn)))
            values = values % 360 if coordinate.values.max() > 180 else values
        elif coordinate.dims in ((y,), (x,)):
            values = values.reshape(-1, blocks[str(coordinate.dims[0])]).mean(1)
        coords[name] = (coordinate.dims, values, coordinate.attrs)
    return xr.Dataset(data, coords, dataset.attrs)


def _area(dataset: xr.Dataset, y: str, x: str) -> np.ndarray:
    """Relative cell areas `[y, x]`: the cosine of latitude, or 1 on a projected or rotated grid."""
    shape = (dataset.sizes[y], dataset.sizes[x])
    if dataset[y].attrs.get("standard_name") != "latitude":
        return np.ones(shape)
    return np.broadcast_to(np.maximum(np.cos(np.deg2rad(dataset[y].values)), 1e-6)[:, None], shape)


def _grid_dims(dataset: xr.Dataset) -> tuple[str, str]:
    """The two horizontal dimensions: the last two of the first variable that has them."""
    array = next((array for array in dataset.data_vars.values() if array.ndim >= 2), None)
    if array is None:
        raise BadInput("dataset: no variable with two horizontal dimensions")
    return str(array.dims[-2]), str(array.dims[-1])


# ---------------------------------------------------------------- time


def day_of_year(time: xr.DataArray) -> np.ndarray:
    """The part of the year that has passed, in [0, 1), `[time]`; right in every CF calendar."""
    days = (time.dt.dayofyear.values - 1) + (time.dt.hour.values + time.dt.minute.values / 60 + time.dt.second.values / 3600) / 24
    return days / year_length(time)


def year_length(time: xr.DataArray) -> np.ndarray:
    """Days in the year of each time, `[time]`."""
    calendar, year = time.dt.calendar, time.dt.year.values
    if calendar == "360_day":
        return np.full(len(year), 360)
    if calendar in ("noleap", "365_day"):
        return np.full(len(year), 365)
    if calendar in ("all_leap", "366_day"):
        return np.full(len(year), 366)
    leap = year % 4 == 0
    if calendar != "julian":
        leap &= (year % 100 != 0) | (year % 400 == 0)
    return np.where(leap, 366, 365)


def within(time: xr.DataArray, span: Span) -> np.ndarray:
    """Which times lie in [first, last], `[time]`; ISO dates or years, both included, in every calendar.

    Raises:
      BadInput: the span is not two ISO dates in order.
    """
    first, last = _span(span)
    iso = _iso(time)
    return (iso.astype(f"U{len(first)}") >= first) & (iso.astype(f"U{len(last)}") <= last)


def _span(span: Span) -> tuple[str, str]:
    texts = [f"{part:04d}" if isinstance(part, int) else str(part).strip() for part in span] if not isinstance(span, str) else []
    pattern = r"\d{4}(-\d{2}(-\d{2}([T ]\d{2}(:\d{2}(:\d{2})?)?)?)?)?"
    if len(texts) != 2 or not all(re.fullmatch(pattern, text) for text in texts):
        raise BadInput(f"period: expected [first, last] as ISO dates or years, got {_shown(span)}")
    first, last = (text.replace(" ", "T") for text in texts)
    if first[: len(last)] > last[: len(first)]:
        raise BadInput(f"period: {first} is after {last}, expected [first, last]")
    return first, last


def _iso(time: xr.DataArray) -> np.ndarray:
    """Times as text, `2000-01-31T12:00:00`, `[time]`."""
    if time.dtype.kind == "M":
        return np.datetime_as_string(time.values, unit="s")
    return np.array([value.isoformat()[:19] for value in time.values])


def _seconds(time: xr.DataArray) -> np.ndarray:
    """Seconds since the first time, `[time]`."""
    values = time.values
    if time.dtype.kind == "M":
        elapsed = (values - values[0]) / np.timedelta64(1, "s")
        return np.where(np.isnat(values), np.nan, elapsed)
    return np.array([(value - values[0]).total_seconds() for value in values])


def _is_time(values: np.ndarray) -> bool:
    return values.dtype.kind == "M" or (values.dtype == object and all(hasattr(value, "isoformat") for value in values))


# ---------------------------------------------------------------- patches


@dataclass(frozen=True)
class Heavy:
    """Which patches are cut more often. As `block` means alone decide, what is learnt of a patch given these stays as it was.

    Attributes:
      above: the least that the highest mean of `block` x `block` cells has to reach, in the variable's units.
      block: cells a side; it divides the patch.
      times: how often all grids of the others are gone through for these, each time from where the last one ended.
    """

    above: float
    block: int
    times: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.times < 1:
            raise BadInput(f"patches: heavy: expected a block and times of at least 1, got {self.block} and {self.times}")


def patches(
    dataset: xr.Dataset,
    variable: str,
    size: int = 64,
    stride: int = 64,
    wet_threshold: float = 0.1,
    wet_fraction: float = 0.05,
    symmetries: bool = False,
    moved: int = 0,
    heavy: Heavy | None = None,
) -> xr.Dataset:
    """Wet square patches of radar frames, `[patch, y, x]`.

    Patches are cut from the north-western corner of each frame in steps of `stride`, frame by frame and row by row southward; one is
    kept if all its values are finite and more than `wet_fraction` of them exceed `wet_threshold` (in the variable's units). With
    `symmetries` they are cut eight times, then turned and mirrored, for a quantity that knows no direction: number n from a grid moved
    by n * `moved` cells along both axes, so that storms lie differently in their patches and coarse cells. `heavy` patches, which are rare,
    are cut from further grids still. To be trained on, not judged by; moved patches reach up to `size / 2` cells across a border drawn at a
    `centre`.

    Returns:
      the variable on `(patch, y, x)` with the names of the horizontal dimensions, `y` and `x` being cell numbers, and on `patch` the
      coordinates `frame_time`, `centre`, the column of the patch's centre as a fraction of the width, and `symmetry`, the number of the
      copy, 0 as it is.

    Raises:
      BadInput: no such variable, a grid moved backwards or without symmetries, frames smaller than a patch, or no wet patch.
    """
    if moved < 0 or (moved and not symmetries):
        raise BadInput(f"patches: moved: expected 0, or with symmetries a number of cells, got {moved}")
    if variable not in dataset:
        raise BadInput(f"patches: no variable {variable}; {_present(variable, dataset.data_vars)}")
    array = dataset[variable]
    y, x = str(array.dims[-2]), str(array.dims[-1])
    frames = array.transpose("time", y, x).values[:, ::-1]  # from north to south
    if size < 1 or stride < 1 or min(frames.shape[1:]) < size:
        raise BadInput(
            f"patches: frames of {frames.shape[1:]} cells, expected at least {size} x {size} and a stride of at least 1, got {stride}"
        )
    kept, symmetry, centre, when = [], [], [], []
    turns = 8 if symmetries else 1
    for copy in range(turns * (heavy.times if heavy else 1)):
        offset, turn = copy * moved % stride, copy % turns
        for frame, row, column in np.ndindex(len(frames), *((n - size - offset) // stride + 1 for n in frames.shape[1:])):
            top, left = offset + row * stride, offset + column * stride
            patch = frames[frame, top : top + size, left : left + size]
            wet = np.isfinite(patch).all() and (patch > wet_threshold).mean() > wet_fraction
            if wet and (copy < turns or (heavy and grid.coarsen(patch, heavy.block).max() >= heavy.above)):
                turned = np.rot90(patch[::-1], turn % 4)
                kept.append(turned[:, ::-1] if turn >= 4 else turned)
                symmetry.append(copy)
                centre.append((left + size / 2) / frames.shape[2])
                when.append(frame)
    if not kept:
        rule = f"more than {wet_fraction:.0%} of its cells above {wet_threshold} {array.attrs.get('units', '')}"
        raise BadInput(f"patches: none of {size} x {size} cells has {rule}, expected at least one")
    attrs = {key: value for key, value in array.attrs.items() if key != "grid_mapping"}
    values = np.stack(kept).astype(np.float32)
    coords = {
        "symmetry": ("patch", symmetry, {"long_name": "number of the copy; modulo 8, quarter turns, from 4 on mirrored"}),
        "centre": ("patch", centre, {"long_name": "column of the centre as a fraction of the width"}),
        "frame_time": ("patch", dataset["time"].values[when]),
        y: np.arange(size),
        x: np.arange(size),
    }
    return xr.Dataset({variable: (("patch", y, x), values, attrs)}, coords, dataset.attrs)


# ---------------------------------------------------------------- provenance and words


def _digest(path: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of a file, or of a folder's files."""
    total, outer = 0, hashlib.sha256()
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    for file in files:
        if path.is_dir():
            outer.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                outer.update(block)
                total += len(block)
    return outer.hexdigest(), total


def _licence(path: str) -> str:
    with _open(path, MAX_BYTES) as opened:
        found = next((value for key, value in opened.attrs.items() if str(key).lower() in ("license", "licence", "rights")), "")
    return str(found)


def _present(name: Any, known: Iterable[Any]) -> str:
    """What there is instead, and which of it may have been meant."""
    names = [str(item) for item in known]
    near = difflib.get_close_matches(str(name), names, 1, 0.5)
    return f"present: {', '.join(names) or 'none'}" + (f"; did you mean {near[0]}?" if near else "")


def _shown(value: Any) -> str:
    return "any" if value is None else str(list(value) if not isinstance(value, str) else value)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0][:200] if lines else type(error).__name__
