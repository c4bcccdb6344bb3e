"""Recorded climate: any CF dataset that xarray opens, brought to one shape, with its gaps counted and its files hashed.

Whatever comes in (NetCDF, Zarr v2 or v3, a URL, several files), what comes out has float32 variables with our names and units on
`[time, y, x]`, both horizontal axes ascending, and says in `attrs["gaps"]` what was missing. Nothing is read before its declared
size is known, and a Zarr store may only use codecs that cannot run code.

Source: CF conventions 1.8, ch. 4 (coordinates), 5.6 (grid mappings) and 7.3 (cell methods).
"""

import dataclasses
import difflib
import glob
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cf_xarray  # noqa: F401  (registers Dataset.cf)
import numpy as np
import xarray as xr
import zarr

from twinsim.base import BadInput

GRAVITY = 9.80665  # m s-2, standard gravity (CGPM 1901)
WATER_DENSITY = 1000.0  # kg m-3: 1 kg m-2 of rain is 1 mm, by convention
MAX_BYTES = 16_000_000_000
MAX_MISSING_STEPS = 1_000_000

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
        time steps with missing values) or "keep". Cells that are missing at every time (sea in land data) are no gap.
      max_bytes: largest size to load, and largest chunk.

    Returns:
      float32 variables with `units`, `standard_name`, `cell_methods` and `grid_mapping` kept; 2-D `lat`, `lon` and the grid mapping
      are coordinates; `attrs["gaps"]` is JSON text.

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
                    array = _subset(array, region, period, months, file)
                except _OutsideTime as error:
                    outside = str(error)  # another file may hold the period
                    continue
                declared += array.size * array.dtype.itemsize
                if declared > max_bytes:
                    raise BadInput(
                        f"{file}: variable {spec.name} would load {declared / 1e9:.3g} GB, expected at most {max_bytes / 1e9:.3g} GB; choose a region or period"
                    )
                pieces[ours].append(_load(array, spec.name, file))
    for ours, spec in wanted.items():
        if spec.name not in present:
            raise BadInput(f"{where}: no variable {spec.name}; present: {', '.join(present) or 'none'}{_near(spec.name, present)}")
        if not pieces[ours]:
            raise BadInput(outside)

    arrays = {ours: _to_units(_join(parts, ours, where), wanted[ours], where).rename(ours) for ours, parts in pieces.items()}
    dataset = _merge(arrays, where)
    if isel:
        dataset = _take(dataset, isel, where)
    dataset = _fill_report(dataset, gaps, where)
    if coarsen is not None:
        dataset = coarsened(dataset, coarsen)
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

    The licence is the one given, or the file's own global attribute. A Zarr folder's digest is that of its files' relative paths
    and contents in sorted order; of a URL digest and size are None.
    """
    records: list[dict[str, Any]] = []
    for path in find(paths):
        digest, size = (None, None) if _is_url(path) else _digest(Path(path))
        stated = licence or ("not stated" if _is_url(path) else _licence(path))
        records.append({"name": path.rstrip("/").split("/")[-1], "path": path, "licence": stated, "sha256": digest, "size": size})
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
    if bare.endswith((".zarr", ".zarr.zip")):
        return True
    return any((Path(path) / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _open(path: str, max_bytes: int) -> xr.Dataset:
    """The dataset, nothing of it loaded but the coordinates of its dimensions."""
    try:
        if _is_zarr(path):
            store: Any = zarr.storage.ZipStore(path, mode="r") if path.endswith(".zip") else path
            _refuse_foreign_codecs(store, path)
            options: dict[str, Any] = {"filename_or_obj": store, "engine": "zarr"}
        else:
            options = {"filename_or_obj": path}
        with xr.open_dataset(**options, decode_times=False, create_default_indexes=False) as bare:
            for name, variable in bare.variables.items():
                if (name in bare.dims or name in bare.coords) and variable.size * variable.dtype.itemsize > max_bytes / 8:
                    raise BadInput(
                        f"{path}: coordinate {name} declares {variable.size} values, too many for a limit of {max_bytes / 1e9:.3g} GB"
                    )
                if name in bare.dims and variable.dtype.kind not in "iufMmSUO":
                    raise BadInput(f"{path}: coordinate {name} is of type {variable.dtype}, expected numbers")
        return xr.open_dataset(**options, decode_timedelta=False, chunks=None)
    except BadInput:
        raise
    except _UNREADABLE as error:
        raise BadInput(f"{path}: cannot be opened as NetCDF or Zarr, damaged or of another format: {_first_line(error)}") from error


def _refuse_foreign_codecs(store: Any, path: str) -> None:
    """Looks at the metadata of every array of a Zarr store; a codec such as pickle would run code when it decodes."""
    group = zarr.open_group(store, mode="r")
    for name, array in [*group.members(max_depth=None)]:
        for codec in _codec_names(array.metadata.to_dict()):
            if codec.removeprefix("numcodecs.") not in _SAFE_CODECS:
                raise BadInput(
                    f"{path}: array {name} is encoded with {codec}, which is not allowed; expected one of {', '.join(sorted(_SAFE_CODECS))}"
                )


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
        raise BadInput(
            f"{path}: variable {name} does not fit in memory ({array.nbytes / 1e9:.3g} GB); choose a region or period"
        ) from error
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
    chunks = array.encoding.get("chunksizes") or array.encoding.get("preferred_chunks") or array.encoding.get("chunks") or ()
    chunk = (
        int(np.prod([int(size) for size in (chunks.values() if isinstance(chunks, Mapping) else chunks)], dtype=object))
        * array.dtype.itemsize
    )
    if chunk > MAX_BYTES / 4:
        raise BadInput(
            f"{path}: variable {spec.name} is stored in chunks of {chunk / 1e9:.3g} GB, expected at most {MAX_BYTES / 4e9:.3g} GB"
        )
    array = _at_levels(array, spec, path)
    axes = _axes(array, spec.name, path)
    extra = [dim for dim in array.dims if dim not in axes and array.sizes[dim] > 1]
    if extra:
        choices = "; ".join(f"{dim} has {array.sizes[dim]} values" for dim in extra)
        raise BadInput(
            f"{path}: variable {spec.name} has more dimensions than time and the horizontal ({choices}), expected one picked with `at`"
        )
    array = array.squeeze([dim for dim in array.dims if dim not in axes], drop=True)
    if 0 in array.shape:
        raise BadInput(f"{path}: variable {spec.name} is empty, its dimensions are {dict(array.sizes)}")
    if axes.time is not None and axes.time != "time":
        array = array.drop_vars("time", errors="ignore").rename({axes.time: "time"})
    array = array.transpose(*(["time"] if axes.time else []), axes.y, axes.x)
    mapping = str(array.attrs.get("grid_mapping") or array.encoding.get("grid_mapping") or "")
    keep = {"time", axes.y, axes.x}
    latitude, longitude = _position(array, axes)
    keep |= {name for name in (latitude, longitude) if name}
    array = array.drop_vars([name for name in array.coords if name not in keep])
    array = array.rename(
        {name: ours for name, ours in ((latitude, "lat"), (longitude, "lon")) if name and name != ours and name not in array.dims}
    )
    if mapping in dataset.variables:
        array = array.assign_coords({mapping: dataset[mapping].drop_vars(list(dataset[mapping].coords))})
        array.attrs["grid_mapping"] = mapping
    for dim in (axes.y, axes.x):
        if dim not in array.coords:
            array = array.assign_coords({dim: np.arange(array.sizes[dim], dtype=np.float64)})
        values = _finite(array, dim, path)
        if len(values) > 1 and values[0] > values[-1]:
            array = array.isel({dim: slice(None, None, -1)})
            values = values[::-1]
        if (np.diff(values) <= 0).any():
            array = array.isel({dim: np.argsort(values, kind="stable")})
            if (np.diff(array[dim].values) <= 0).any():
                raise BadInput(f"{path}: coordinate {dim} has the same value twice, expected a monotonic axis")
    for name, axis in (("lat", "Y"), ("lon", "X")):
        if name in array.coords:
            array[name].attrs.setdefault("units", "degrees_north" if axis == "Y" else "degrees_east")
            array[name].attrs.setdefault("standard_name", "latitude" if axis == "Y" else "longitude")
    return array


def _at_levels(array: xr.DataArray, spec: Wanted, path: str) -> xr.DataArray:
    for name, value in spec.at.items():
        if name not in array.coords or array[name].ndim > 1:
            raise BadInput(
                f"{path}: variable {spec.name} has no coordinate {name}; present: {', '.join(map(str, array.coords))}{_near(name, array.coords)}"
            )
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
    names = []
    for kind, units, plain in (
        ("latitude", "degrees?_?n(orth)?", "lat|latitude|xlat|nav_lat"),
        ("longitude", "degrees?_?e(ast)?", "lon|longitude|xlong|nav_lon"),
    ):
        candidates = [
            str(name)
            for name, coordinate in array.coords.items()
            if set(coordinate.dims) <= {axes.y, axes.x}
            and coordinate.ndim
            and (
                coordinate.attrs.get("standard_name") == kind
                or re.fullmatch(units, str(coordinate.attrs.get("units", "")), re.IGNORECASE)
                or re.fullmatch(plain, str(name), re.IGNORECASE)
            )
        ]
        names.append(next((name for name in candidates if name in (axes.y, axes.x)), candidates[0] if candidates else ""))
    return names[0], names[1]


def _finite(array: xr.DataArray, dim: str, path: str) -> np.ndarray:
    values = np.asarray(array[dim].values)
    if values.dtype.kind not in "iuf" or not np.isfinite(values).all():
        raise BadInput(f"{path}: coordinate {dim} is not finite or not a number, expected a monotonic axis")
    return values


def _subset(
    array: xr.DataArray, region: Mapping[str, Sequence[float]] | None, period: Span | None, months: Sequence[int] | None, path: str
) -> xr.DataArray:
    if "time" in array.dims:
        if "time" not in array.coords or not _is_time(array["time"].values):
            raise BadInput(f"{path}: time is not decodable, expected units such as 'days since 2000-01-01' and a CF calendar")
        kept = np.ones(array.sizes["time"], bool)
        if period is not None:
            kept &= within(array["time"], period)
        if months is not None:
            if not months or not set(months) <= set(range(1, 13)):
                raise BadInput(f"months: expected numbers from 1 to 12, got {list(months)}")
            kept &= np.isin(array["time"].dt.month.values, list(months))
        if not kept.any():
            first, last = _iso(array["time"])[[0, -1]]
            raise _OutsideTime(
                f"{path}: no time step in period {_shown(period)}, months {_shown(months)}; the data run from {first} to {last}"
            )
        array = array.isel(time=_compact(kept))
    return _box(array, dict(region or {}), path)


def _box(array: xr.DataArray, region: dict[str, Sequence[float]], path: str) -> xr.DataArray:
    """The cells inside `region`; longitudes ascend from its western edge."""
    for name, edges in region.items():
        if len(edges) != 2 or not np.isfinite(np.asarray(edges, float)).all():
            raise BadInput(f"region {name}: expected [first, last], got {list(edges)}")
        if name not in array.coords:
            raise BadInput(f"{path}: region names {name}; present: {', '.join(map(str, array.coords))}{_near(name, array.coords)}")
    *_, y, x = map(str, array.dims)
    inside = np.ones((array.sizes[y], array.sizes[x]), bool)
    start = None
    for name, (first, last) in region.items():
        values = array[name].values.astype(np.float64)
        is_longitude = name == "lon" or array[name].attrs.get("standard_name") == "longitude"
        if is_longitude:
            width = 360.0 if last - first >= 360 else (last - first) % 360
            offset = (values - first + 1e-6) % 360 - 1e-6
            chosen = offset <= width + 1e-6
            if values.ndim == 1:
                start = (str(array[name].dims[0]), offset + first)
        else:
            if first > last:
                raise BadInput(f"region {name}: expected [first, last] ascending, got {[first, last]}")
            chosen = (values >= first - 1e-6) & (values <= last + 1e-6)
        inside &= chosen if values.ndim == 2 else (chosen[:, None] if array[name].dims == (y,) else chosen[None, :])
    if not inside.any():
        spans = ", ".join(f"{name} {float(array[name].min()):.4g}..{float(array[name].max()):.4g}" for name in region)
        raise BadInput(f"{path}: no cell in the region { ({key: list(value) for key, value in region.items()}) }; the data cover {spans}")
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    array = array.isel({y: slice(rows[0], rows[-1] + 1)})
    if start is None:
        return array.isel({x: slice(columns[0], columns[-1] + 1)})
    dim, shifted = start
    columns = columns[np.argsort(shifted[columns], kind="stable")]
    columns = columns[np.concatenate([[True], np.diff(shifted[columns]) > 1e-6])]  # a cyclic point, 0 and 360, is kept once
    longitude = array[dim].attrs
    parts = np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)
    pieces = [array.isel({dim: slice(part[0], part[-1] + 1)}) for part in parts]
    if len(pieces) > 1:
        pieces = [_load(piece, str(array.name), path) for piece in pieces]
    joined = pieces[0] if len(pieces) == 1 else xr.concat(pieces, dim, coords="different", compat="equals", join="override")
    joined = joined.assign_coords({dim: (dim, np.round(shifted[columns], 6), longitude)})
    return joined


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
            if not np.allclose(part[dim], first[dim], rtol=0, atol=1e-4 * max(1.0, float(abs(first[dim]).max()) * 1e-2)):
                raise BadInput(f"{where}: variable {name} is on different grids: coordinate {dim} differs between the files")
        if part.attrs.get("units") != first.attrs.get("units"):
            raise BadInput(
                f"{where}: variable {name} has the units {first.attrs.get('units')} in one file and {part.attrs.get('units')} in another"
            )
    if "time" not in first.dims:
        return first
    calendars = {part["time"].dt.calendar for part in parts}
    if len(calendars) > 1:
        raise BadInput(f"{where}: variable {name} has different calendars: {', '.join(sorted(calendars))}")
    joined = (
        first
        if len(parts) == 1
        else xr.concat(parts, "time", coords="minimal", compat="override", join="override", combine_attrs="override")
    )
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


def _merge(arrays: dict[str, xr.DataArray], where: str) -> xr.Dataset:
    """All variables on one grid and one time axis; a time that a variable lacks is missing there."""
    grids = {array.dims[-2:] + array.shape[-2:]: name for name, array in arrays.items()}
    if len(grids) > 1:
        shown = "; ".join(f"{name} on {dict(zip(grid[:2], grid[2:], strict=True))}" for grid, name in grids.items())
        raise BadInput(f"{where}: the variables are on different grids, expected one grid an open_cf call: {shown}")
    first = next(iter(arrays.values()))
    for name, array in arrays.items():
        for dim in first.dims[-2:]:
            if not np.allclose(array[dim], first[dim], rtol=0, atol=1e-4 * max(1.0, float(abs(first[dim]).max()) * 1e-2)):
                raise BadInput(f"{where}: variable {name} is on another grid: coordinate {dim} differs")
            arrays[name] = arrays[name].assign_coords({dim: first[dim]})
    calendars = {array["time"].dt.calendar for array in arrays.values() if "time" in array.dims}
    if len(calendars) > 1:
        raise BadInput(f"{where}: the variables have different calendars: {', '.join(sorted(calendars))}")
    return xr.merge(arrays.values(), join="outer", compat="override", combine_attrs="drop")


def _take(dataset: xr.Dataset, isel: Mapping[str, Sequence[int]], where: str) -> xr.Dataset:
    for dim, (start, stop) in isel.items():
        if dim not in dataset.dims:
            raise BadInput(f"{where}: isel names {dim}; present: {', '.join(map(str, dataset.dims))}{_near(dim, dataset.dims)}")
        if not 0 <= start < stop <= dataset.sizes[dim]:
            raise BadInput(f"{where}: isel {dim}: expected 0 <= start < stop <= {dataset.sizes[dim]}, got {[start, stop]}")
    return dataset.isel({dim: slice(*bounds) for dim, bounds in isel.items()})


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


def conversion(stated: str, wanted: str, where: str) -> tuple[float, float]:
    """Scale and offset from one unit to another: `wanted = stated * scale + offset`.

    Water may go between mass per area and depth (1000 kg m-3), geopotential to height (standard gravity).

    Raises:
      BadInput: a unit is unknown, or they do not convert.
    """
    from cf_xarray.units import units  # here: half a second that most files do not need

    def parsed(text: str) -> Any:
        try:
            return units.Quantity(np.array([0.0, 1.0]), units.Unit(text or "1"))
        except Exception as error:  # pint, its tokenizer and the UDUNITS preprocessor raise whatever they like on nonsense
            raise BadInput(f"{where}: unit {text!r} is not known, expected a UDUNITS one such as K, mm day-1, m s-1") from error

    source, target = parsed(stated), parsed(wanted)
    depth_of_water = units.Unit("m2 kg-1").dimensionality  # a depth per (mass per area)
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


def _fill_report(dataset: xr.Dataset, policy: str, where: str) -> xr.Dataset:
    """Counts what is missing, applies the policy and notes both in `attrs["gaps"]`."""
    missing, masked = {}, {}
    broken = np.zeros(dataset.sizes.get("time", 1), bool)
    for name, array in dataset.data_vars.items():
        bad = ~np.isfinite(array.values)
        if bad.all():
            raise BadInput(f"{where}: variable {name} has no finite value in the chosen part")
        if "time" in array.dims:
            never = bad.all(0)
            # A variable absent from whole time steps must not make a mask of them, nor may the mask hide them.
            bad = bad & ~never
            broken |= bad.any((1, 2))
            masked[str(name)] = int(never.sum())
            missing[str(name)] = int(bad.sum())
        else:
            masked[str(name)], missing[str(name)] = int(bad.sum()), 0
    steps, step, examples = _missing_steps(dataset["time"], where) if "time" in dataset.dims else (0, "", [])
    report = {
        "policy": policy,
        "missing_values": missing,
        "always_missing_cells": masked,
        "time_steps_with_missing_values": int(broken.sum()) if "time" in dataset.dims else 0,
        "missing_time_steps": steps,
        "first_missing_time_steps": examples,
        "time_step": step,
    }
    if policy == "error" and (sum(missing.values()) or steps):
        counted = ", ".join(f"{count} of {name}" for name, count in missing.items() if count)
        parts = ([f"missing values ({counted})"] if counted else []) + (
            [f"{steps} missing time steps, first {examples[0]}"] if steps else []
        )
        raise BadInput(f"{where}: has {' and '.join(parts)}; expected none, or gaps='drop' or gaps='keep'")
    if policy == "drop" and broken.any():
        if broken.all():
            raise BadInput(f"{where}: every time step has missing values, nothing is left after gaps='drop'")
        dataset = dataset.isel(time=np.flatnonzero(~broken))
    infinite = {name: array.where(np.isfinite(array)) for name, array in dataset.data_vars.items() if np.isinf(array.values).any()}
    dataset = dataset.assign(infinite) if infinite else dataset
    dataset.attrs["gaps"] = json.dumps(report)
    return dataset


def _missing_steps(time: xr.DataArray, where: str) -> tuple[int, str, list[str]]:
    """How many steps of the regular axis are absent, the step in words, and the first absent times.

    Regular is the median step. A gap counts only within calendar months that occur in the data, so that a file of winters has
    none. Steps of 28 to 31 days are calendar months.
    """
    seconds = _seconds(time)
    if len(seconds) < 3:
        return 0, "", []
    gaps = np.diff(seconds)
    step = float(np.median(gaps))
    months = time.dt.year.values * 12 + time.dt.month.values
    present = set(time.dt.month.values.tolist())
    if 28 * 86400 <= step <= 31 * 86400:
        absent = [month for month in range(months[0], months[-1]) if (month - 1) % 12 + 1 in present and month not in set(months.tolist())]
        return len(absent), "1 month", [f"{(month - 1) // 12:04d}-{(month - 1) % 12 + 1:02d}" for month in absent[:5]]
    counts = np.maximum(np.rint(gaps / step).astype(np.int64) - 1, 0)
    if counts.sum() > MAX_MISSING_STEPS:
        raise BadInput(f"{where}: the time axis is irregular, {int(counts.sum())} steps of {step:g} s would be missing")
    total, examples = 0, []
    for index in np.flatnonzero(counts):
        jumps = np.arange(1, counts[index] + 1) * step
        start = time.values[index]
        if time.dtype.kind == "M":
            between = xr.DataArray(start + np.rint(jumps * 1e9).astype("timedelta64[ns]"), dims="time")
        else:
            from datetime import timedelta

            between = xr.DataArray(np.array([start + timedelta(seconds=float(jump)) for jump in jumps]), dims="time")
        inside = np.isin(between.dt.month.values, list(present))
        total += int(inside.sum())
        if len(examples) < 5 and inside.any():
            examples += [str(text)[:16] for text in _iso(between)[inside][: 5 - len(examples)]]
    words = f"{step / 86400:g} day" if step >= 86400 else f"{step / 60:g} min"
    return total, words, examples


# ---------------------------------------------------------------- coarser


def coarsened(dataset: xr.Dataset, factor: int | Sequence[int]) -> xr.Dataset:
    """Block means over `factor` cells, one number or (y, x), weighted by the cosine of latitude where latitude is known.

    A block's mean is over its cells that are not missing; it is missing where all are.

    Raises:
      BadInput: the grid is not a whole number of blocks.
    """
    y, x = _grid_dims(dataset)
    factors = dict(zip((y, x), (factor, factor) if isinstance(factor, int) else factor, strict=True))
    for dim, size in factors.items():
        if size < 1 or dataset.sizes[dim] % size:
            raise BadInput(f"coarsen: {dim} has {dataset.sizes[dim]} cells, not a whole number of blocks of {size}; cut it with isel")
    blocks = dataset.coarsen({dim: size for dim, size in factors.items() if size > 1}) if max(factors.values()) > 1 else None
    if blocks is None:
        return dataset
    latitude = dataset["lat"] if "lat" in dataset.coords else dataset[y]
    known = "lat" in dataset.coords or dataset[y].attrs.get("standard_name") == "latitude"
    area = np.cos(np.deg2rad(latitude)) if known else xr.ones_like(latitude, float)
    area = (
        area.clip(1e-6)
        .broadcast_like(xr.DataArray(np.ones((dataset.sizes[y], dataset.sizes[x])), dims=(y, x)))
        .astype(np.float64)
        .drop_vars(list(area.coords))
    )
    windows = {dim: size for dim, size in factors.items() if size > 1}
    result: dict[str, xr.DataArray] = {}
    for name, array in dataset.data_vars.items():
        if not {y, x} <= set(array.dims):
            result[str(name)] = array
            continue
        bare = array.drop_vars(list(array.coords))
        valid = np.isfinite(bare)
        weight = (area * valid).coarsen(windows).sum()
        mean = (bare.fillna(0) * area).coarsen(windows).sum() / weight.where(weight > 0)
        mean.attrs = dict(array.attrs)
        methods = str(array.attrs.get("cell_methods", ""))
        mean.attrs["cell_methods"] = f"{methods} area: mean".strip()
        result[str(name)] = mean.transpose(*array.dims).astype(np.float32)
    coords: dict[str, Any] = {}
    for name, coordinate in dataset.coords.items():
        if not set(coordinate.dims) & {y, x}:
            coords[str(name)] = coordinate
            continue
        bare = coordinate.drop_vars(list(coordinate.coords))
        window = {dim: size for dim, size in windows.items() if dim in bare.dims}
        if name == "lon" and bare.ndim == 2:  # the mean direction: 359 and 1 degree give 0
            angle = np.deg2rad(bare)
            mean = np.rad2deg(np.arctan2(np.sin(angle).coarsen(window).mean(), np.cos(angle).coarsen(window).mean()))
            mean = mean % 360 if float(bare.max()) > 180 else mean
        else:
            mean = bare.coarsen(window).mean() if window else bare
        mean.attrs = dict(coordinate.attrs)
        coords[str(name)] = mean
    return xr.Dataset(result, coords, dataset.attrs)


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


def split_periods(dataset: xr.Dataset, periods: Mapping[str, Span | Sequence[Span]]) -> dict[str, xr.Dataset]:
    """The dataset cut by time into named splits; each takes one span [first, last] or several.

    Raises:
      BadInput: a split is empty, or two splits share a time.
    """
    taken = np.full(dataset.sizes["time"], "", dtype=object)
    splits = {}
    for name, spans in periods.items():
        single = len(spans) == 2 and not isinstance(spans[0], list | tuple)
        kept = np.zeros(dataset.sizes["time"], bool)
        for span in [spans] if single else spans:
            kept |= within(dataset["time"], span)
        if not kept.any():
            first, last = _iso(dataset["time"])[[0, -1]]
            raise BadInput(f"split {name}: no time step in {_shown(spans)}; the data run from {first} to {last}")
        if (taken[kept] != "").any():
            where = np.flatnonzero(kept & (taken != ""))[0]
            raise BadInput(f"splits {taken[where]} and {name} share {_iso(dataset['time'])[where]}, expected periods that do not overlap")
        taken[kept] = name
        splits[name] = dataset.isel(time=_compact(kept))
    return splits


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


def patches(
    dataset: xr.Dataset, variable: str, size: int = 64, stride: int = 64, wet_threshold: float = 0.1, wet_fraction: float = 0.05
) -> xr.Dataset:
    """Wet square patches of radar frames, `[patch, y, x]`.

    Patches are cut from the north-western corner of each frame in steps of `stride`, frame by frame and row by row southward; one is
    kept if all its values are finite and more than `wet_fraction` of them exceed `wet_threshold` (in the variable's units).

    Returns:
      the variable on `(patch, y, x)` with the names of the horizontal dimensions, `y` and `x` being cell numbers, and on `patch` the
      coordinates `frame_time` and `centre`, the column of the patch's centre as a fraction of the width.

    Raises:
      BadInput: no such variable, frames smaller than a patch, or no wet patch.
    """
    if variable not in dataset:
        raise BadInput(
            f"patches: no variable {variable}; present: {', '.join(map(str, dataset.data_vars))}{_near(variable, dataset.data_vars)}"
        )
    array = dataset[variable]
    y, x = str(array.dims[-2]), str(array.dims[-1])
    frames = array.transpose("time", y, x).values[:, ::-1]  # from north to south
    if size < 1 or stride < 1 or min(frames.shape[1:]) < size:
        raise BadInput(
            f"patches: frames of {frames.shape[1:]} cells, expected at least {size} x {size} and a stride of at least 1, got {stride}"
        )
    kept, centre, when = [], [], []
    for frame in range(len(frames)):
        for row in range(0, frames.shape[1] - size + 1, stride):
            for column in range(0, frames.shape[2] - size + 1, stride):
                patch = frames[frame, row : row + size, column : column + size]
                if np.isfinite(patch).all() and (patch > wet_threshold).mean() > wet_fraction:
                    kept.append(patch[::-1])
                    centre.append((column + size / 2) / frames.shape[2])
                    when.append(frame)
    if not kept:
        raise BadInput(
            f"patches: no {size} x {size} patch has more than {wet_fraction:.0%} of its cells above {wet_threshold} {array.attrs.get('units', '')}"
        )
    attrs = {key: value for key, value in array.attrs.items() if key != "grid_mapping"}
    coords = {
        "centre": ("patch", np.array(centre), {"long_name": "column of the centre as a fraction of the width"}),
        "frame_time": ("patch", dataset["time"].values[when]),
        y: np.arange(size),
        x: np.arange(size),
    }
    return xr.Dataset({variable: (("patch", y, x), np.stack(kept).astype(np.float32), attrs)}, coords, dataset.attrs)


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
    return str(found) or "not stated"


def _near(name: Any, known: Any) -> str:
    match = difflib.get_close_matches(str(name), [str(item) for item in known], 1, 0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _shown(value: Any) -> str:
    return "any" if value is None else str(list(value) if not isinstance(value, str) else value)


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()
    return text[0][:200] if text else type(error).__name__
