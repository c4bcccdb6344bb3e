"""Recorded climate: every file here is written with known contents, so what comes out is known too."""

import functools
import hashlib
import http.server
import importlib
import json
import os
import sys
import threading
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr

from domains.climate import sources, truth
from domains.climate.sources import Heavy, Wanted, coarsened, day_of_year, inputs, open_cf, patches, within
from twinsim import record
from twinsim.base import BadInput

LAT = np.array([40.0, 45.0, 50.0, 55.0])
LON = np.arange(0.0, 360.0, 45.0)
TAS = {"tas": Wanted("t2m", "K")}


def dataset(days=4, lat=LAT, lon=LON, start="2001-01-01", units="K", calendar="standard", **attrs) -> xr.Dataset:
    """`t2m` is 1000 day + latitude + longitude / 1000: each value says where it belongs. Float64, so float32 rounds below 1e-4."""
    time = xr.date_range(start, periods=days, freq="D", calendar=calendar, use_cftime=calendar != "standard")
    values = 1000.0 * np.arange(days)[:, None, None] + np.asarray(lat)[:, None] + np.mod(lon, 360) / 1000
    data = {"t2m": (("time", "lat", "lon"), values, {"units": units, "standard_name": "air_temperature", "cell_methods": "time: mean"})}
    coords = {
        "time": time,
        "lat": ("lat", lat, {"units": "degrees_north"}),
        "lon": ("lon", lon, {"units": "degrees_east"}),
    }
    return xr.Dataset(data, coords, attrs)


def save(made: xr.Dataset, path: Path) -> Path:
    made.to_netcdf(path)
    return path


def belongs(result: xr.Dataset, first_day: int = 0) -> bool:
    """Every value is that of its own latitude and longitude."""
    days = first_day + np.arange(result.sizes["time"])
    expected = 1000.0 * days[:, None, None] + result["lat"].values[:, None] + np.mod(result["lon"].values, 360) / 1000
    return np.allclose(result["tas"], expected, atol=1e-3)  # float32 of 3000 is exact to 2e-4


# ---------------------------------------------------------------- formats and files


@pytest.mark.parametrize("kind", ["netcdf", "zarr2", "zarr3", "zip"])
def test_every_format_gives_the_same_dataset(tmp_path, kind):
    made, path = dataset(), tmp_path / ("a.nc" if kind == "netcdf" else "a.zarr.zip" if kind == "zip" else "a.zarr")
    if kind == "netcdf":
        made.to_netcdf(path)
    elif kind == "zip":
        made.to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=False)
        with zipfile.ZipFile(path, "w") as out:
            for file in (tmp_path / "a.zarr").rglob("*"):
                out.write(file, file.relative_to(tmp_path / "a.zarr"))
    else:
        made.to_zarr(path, zarr_format=int(kind[-1]), consolidated=kind == "zarr2")
    result = open_cf(path, TAS)
    assert result["tas"].dtype == np.float32 and result["tas"].dims == ("time", "lat", "lon")
    assert result["tas"].attrs == {"units": "K", "standard_name": "air_temperature", "cell_methods": "time: mean"}
    assert belongs(result)


def test_files_join_along_time_in_order_and_variables_may_be_spread(tmp_path):
    whole = dataset(days=6)
    for name, part in (("b", slice(0, 2)), ("a", slice(2, 6))):
        save(whole.isel(time=part), tmp_path / f"t2m_{name}.nc")
    save((whole * 0 + 1).rename(t2m="rain").assign_attrs(), tmp_path / "rain.nc")
    result = open_cf(str(tmp_path / "*.nc"), {"tas": Wanted("t2m", "K"), "pr": Wanted("rain", "mm day-1", file_units="mm day-1")})
    assert belongs(result) and result.sizes["time"] == 6
    assert (result["pr"] == 1).all()
    with pytest.raises(BadInput, match="2001-01-03T00:00:00 twice"):
        open_cf([tmp_path / "t2m_a.nc", save(whole.isel(time=slice(0, 3)), tmp_path / "again.nc")], TAS)


def test_variables_with_levels_pick_one(tmp_path):
    made = xr.concat([dataset() + level for level in (0, 100)], xr.DataArray([85000.0, 50000.0], dims="plev", name="plev"))
    made["t2m"].attrs["units"] = "K"
    path = save(made, tmp_path / "levels.nc")
    result = open_cf(path, {"tas": Wanted("t2m", "K", at={"plev": 50000})})
    assert np.allclose(result["tas"], dataset()["t2m"] + 100)
    with pytest.raises(BadInput, match="plev has 2 values"):
        open_cf(path, TAS)
    with pytest.raises(BadInput, match="no single value 70000; present: 85000"):
        open_cf(path, {"tas": Wanted("t2m", "K", at={"plev": 70000})})


def test_rotated_grid_keeps_its_axes_its_mapping_and_both_positions(tmp_path):
    lat2, lon2 = np.meshgrid([50.0, 45.0], [358.0, 0.0, 2.0, 4.0], indexing="ij")
    made = xr.Dataset(
        {
            "t2m": (("time", "rlat", "rlon"), np.arange(16.0).reshape(2, 2, 4), {"units": "K", "grid_mapping": "pole"}),
            "pole": ((), 0, {"grid_mapping_name": "rotated_latitude_longitude"}),
        },
        {
            "time": xr.date_range("2001", periods=2),
            "rlat": ("rlat", [1.0, 0.0], {"standard_name": "grid_latitude"}),
            "rlon": ("rlon", [0.0, 1.0, 2.0, 3.0], {"standard_name": "grid_longitude"}),
            "latitude": (("rlat", "rlon"), lat2, {"standard_name": "latitude"}),
            "longitude": (("rlat", "rlon"), lon2, {"standard_name": "longitude"}),
        },
    )
    path = save(made, tmp_path / "rotated.nc")
    result = open_cf(path, TAS)
    assert result["tas"].dims == ("time", "rlat", "rlon") and result["tas"].attrs["grid_mapping"] == "pole" and "pole" in result.coords
    assert result["rlat"].values.tolist() == [0, 1] and result["latitude"].values[:, 0].tolist() == [45, 50]  # ascending, with its position
    assert result["tas"].values[0, :, 0].tolist() == [4, 0]
    west = open_cf(path, TAS, region={"lon": [-3, 1], "lat": [47, 60]})
    assert west["tas"].values[0].tolist() == [[0, 1]]
    assert open_cf(path, TAS, isel={"rlon": [1, 3]})["rlon"].values.tolist() == [1, 2]
    assert np.allclose(open_cf(path, TAS, coarsen=(1, 2))["longitude"], [[359, 3], [359, 3]], atol=1e-3)  # 358 and 0 meet at 359
    with pytest.raises(BadInput, match="expected 0 <= start < stop <= 4"):
        open_cf(path, TAS, isel={"rlon": [0, 5]})


# ---------------------------------------------------------------- where and when


@pytest.mark.parametrize("lon", [LON, LON - 180.0], ids=["0..360", "-180..180"])
@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ([-50, 50], [-45, 0, 45]),  # across Greenwich
        ([310, 410], [315, 360, 405]),  # the same, counted from 0
        ([130, -130], [135, 180, 225]),  # across the date line
        ([-180, 180], [-180, -135, -90, -45, 0, 45, 90, 135]),
        ([90, 90], [90]),
    ],
)
def test_longitudes_ascend_from_the_western_edge_in_any_convention(tmp_path, lon, edges, expected):
    result = open_cf(save(dataset(lon=lon), tmp_path / "a.nc"), TAS, region={"lon": edges})
    assert result["lon"].values.tolist() == expected and belongs(result)


def test_cells_are_counted_in_the_region_as_a_whole(tmp_path):
    path = save(dataset(), tmp_path / "a.nc")
    result = open_cf(path, TAS, region={"lon": [-50, 50]}, isel={"lon": [0, 2], "lat": [1, 4]})
    assert result["lon"].values.tolist() == [-45, 0] and result["lat"].values.tolist() == [45, 50, 55] and belongs(result)
    with pytest.raises(BadInput, match=r"isel lon: expected 0 <= start < stop <= 3, got \[0, 4\]"):
        open_cf(path, TAS, region={"lon": [-50, 50]}, isel={"lon": [0, 4]})
    with pytest.raises(BadInput, match="isel names level"):
        open_cf(path, TAS, isel={"level": [0, 1]})


@pytest.mark.parametrize("lon", [[315.0, 0, 45, 90], [315.0, 360, 405, 450]])
def test_a_region_over_greenwich_stays_in_one_piece(tmp_path, lon):
    result = open_cf(save(dataset(lon=np.array(lon)), tmp_path / "a.nc"), TAS)
    assert (result["lon"].values % 360).tolist() == [315, 0, 45, 90] and (np.diff(result["lon"]) == 45).all() and belongs(result)
    whole = open_cf(save(dataset(lon=np.roll(LON, 4)), tmp_path / "b.nc"), TAS)
    assert whole["lon"].values.tolist() == LON.tolist() and belongs(whole)


def test_what_tells_days_apart_is_kept_and_the_edges_of_cells_are_not(tmp_path):
    made = dataset(days=6, source="the file's own").assign_coords(co2=("time", np.arange(6.0)), run=("time", list("aabbcc")))
    made["lat"].attrs["bounds"] = "lat_bnds"
    made["t2m"].attrs["source"] = "of one variable"
    for name, part in (("a", slice(0, 4)), ("b", slice(4, 6))):
        save(made.isel(time=part), tmp_path / f"{name}.nc")
    result = open_cf(str(tmp_path / "*.nc"), TAS)
    assert result["co2"].values.tolist() == [0, 1, 2, 3, 4, 5] and "".join(result["run"].values.astype(str)) == "aabbcc"
    assert "bounds" not in result["lat"].attrs and result.attrs["source"] == "the file's own"
    save(made.isel(time=slice(4, 6)).drop_vars("run"), tmp_path / "b.nc")
    assert "run" not in open_cf(str(tmp_path / "*.nc"), TAS).coords  # not known of every day


def test_cyclic_point_is_kept_once(tmp_path):
    result = open_cf(save(dataset(lon=np.append(LON, 360.0)), tmp_path / "a.nc"), TAS, region={"lon": [0, 360]})
    assert result["lon"].values.tolist() == LON.tolist() and belongs(result)


def test_latitude_ascends_and_region_is_inclusive(tmp_path):
    result = open_cf(save(dataset(lat=LAT[::-1]), tmp_path / "a.nc"), TAS, region={"lat": [45, 50]})
    assert result["lat"].values.tolist() == [45, 50] and belongs(result)


@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
def test_periods_and_months_in_every_calendar(tmp_path, calendar):
    path = save(dataset(days=720, start="2003-06-01", calendar=calendar, lon=LON[:1]), tmp_path / "a.nc")
    year = {"standard": 366, "noleap": 365, "360_day": 360}[calendar]
    assert open_cf(path, TAS, period=[2004, 2004]).sizes["time"] == year
    assert open_cf(path, TAS, period=["2004-01-30", "2004-02"]).sizes["time"] == {"standard": 31, "noleap": 30, "360_day": 31}[calendar]
    winter = open_cf(path, TAS, period=["2003-12", "2004-02"], months=[12, 1, 2])
    assert winter.sizes["time"] == {"standard": 91, "noleap": 90, "360_day": 90}[calendar]
    assert json.loads(winter.attrs["gap_counts"])["missing_time_steps"] == 0


@pytest.mark.parametrize(("calendar", "length"), [("standard", 366), ("noleap", 365), ("360_day", 360), ("julian", 366)])
def test_day_of_year_is_the_passed_fraction(calendar, length):
    time = xr.DataArray(xr.date_range("2004-01-01", periods=2 * length, freq="12h", calendar=calendar, use_cftime=True), dims="time")
    assert np.allclose(day_of_year(time), np.arange(2 * length) / (2 * length), atol=1e-12)


@pytest.mark.parametrize("span", [["2001"], ["2001-13-41x", "2002"], [2003, 2001], "2001"])
def test_a_period_is_two_dates_in_order(span):
    with pytest.raises(BadInput, match="period"):
        within(dataset()["time"], span)


# ---------------------------------------------------------------- units


@pytest.mark.parametrize(
    ("stated", "wanted", "value", "expected"),
    [
        ("degC", "K", 10, 283.15),
        ("K", "degC", 283.15, 10),
        ("hPa", "Pa", 1013.25, 101325),
        ("kg m-2 s-1", "mm day-1", 1 / 86400, 1),
        ("mm/day", "kg m-2 s-1", 1, 1 / 86400),
        ("kg m-2", "mm", 3, 3),
        ("m s-1", "mm h-1", 1e-6, 3.6),
        ("m2 s-2", "m", 9.80665, 1),
        ("g kg-1", "1", 8, 0.008),
        ("%", "1", 50, 0.5),
        ("degrees Celsius", "K", 15, 288.15),  # which pint reads as an angle times a temperature
        ("deg C", "K", 15, 288.15),
        ("degree_celsius", "K", 15, 288.15),
        ("degrees K", "degC", 288.15, 15),
        ("Kelvin", "K", 288, 288),
        ("0.1 K", "K", 2880, 288),
        ("mb", "Pa", 1000, 1e5),
        ("rad s-1", "s-1", 2, 2),
    ],
)
def test_units_convert(stated, wanted, value, expected):
    scale, offset = sources.conversion(stated, wanted, "here")
    assert value * scale + offset == pytest.approx(expected, rel=1e-9)


def test_units_reach_the_data_and_the_standard_name(tmp_path):
    made = dataset(units="kg m-2 s-1")
    made["t2m"].attrs["standard_name"] = "precipitation_flux"
    result = open_cf(save(made, tmp_path / "a.nc"), {"pr": Wanted("t2m", "mm day-1")})
    assert np.allclose(result["pr"], made["t2m"] * 86400, rtol=1e-6)
    assert result["pr"].attrs["units"] == "mm day-1" and result["pr"].attrs["standard_name"] == "lwe_precipitation_rate"


@pytest.mark.parametrize(
    ("units", "message"),
    [("Pa", "units Pa do not convert to K"), ("warmth", "'warmth' is not known"), ("degree degC", "is not known"), ("", "states no units")],
)
def test_wrong_units_are_named(tmp_path, units, message):
    with pytest.raises(BadInput, match=message):
        open_cf(save(dataset(units=units), tmp_path / "a.nc"), TAS)


# ---------------------------------------------------------------- gaps


def test_gaps_are_counted_reported_and_settled(tmp_path):
    made = dataset(days=10).isel(time=[0, 1, 2, 3, 6, 7, 8, 9])
    made["t2m"][:, 0, 0] = np.nan  # a cell that is always missing is no gap
    made["t2m"][1, 2, 3] = np.nan
    made["t2m"][4, 1, 1:3] = np.nan
    path = save(made, tmp_path / "a.nc")
    with pytest.raises(BadInput, match="3 missing values of tas and 2 missing time steps from 2001-01-05T00:00:00 on"):
        open_cf(path, TAS)
    kept = open_cf(path, TAS, gaps="keep")
    assert kept.attrs["gaps"].split("; ") == [
        "3 values of tas missing in 2 time steps",
        "1 cells of tas missing at every time",
        "2 time steps absent, the first at 2001-01-05T00:00:00",
    ]
    report = json.loads(kept.attrs["gap_counts"])
    assert (report["missing_values"], report["always_missing_cells"]) == ({"tas": 3}, {"tas": 1})
    assert (report["time_steps_with_missing_values"], report["missing_time_steps"]) == (2, 2)
    assert report["first_missing_time_steps"] == ["2001-01-05T00:00:00", "2001-01-06T00:00:00"] and report["time_step"] == "1 day"
    assert np.isnan(kept["tas"]).sum() == 8 + 3
    with pytest.raises(BadInput, match="1 of 32 cells of tas have no value at any time .* choose a region"):
        open_cf(path, TAS, gaps="drop")
    dropped = open_cf(path, TAS, gaps="drop", region={"lat": [45, 90]})
    assert dropped["time"].dt.day.values.tolist() == [1, 3, 4, 8, 9, 10] and np.isfinite(dropped["tas"]).all()
    assert "which were left out" in dropped.attrs["gaps"]
    with pytest.raises(BadInput, match="gaps='keep' leaves 11 missing values of t2m"):
        truth.recorded(path, {"t2m": {"units": "K"}}, gaps="keep")


def test_no_gap_is_no_word_and_a_block_with_some_values_is_no_gap(tmp_path):
    made = dataset()
    assert open_cf(save(made, tmp_path / "a.nc"), TAS).attrs["gaps"] == ""
    made["t2m"][:, 0, 0] = np.nan
    path = save(made, tmp_path / "b.nc")
    with pytest.raises(BadInput, match="1 of 32 cells of tas have no value at any time"):
        open_cf(path, TAS)
    assert np.isfinite(open_cf(path, TAS, coarsen=2)["tas"]).all()


def test_winters_and_months_are_regular(tmp_path):
    winters = dataset(days=800, start="2001-12-01", lon=LON[:1])
    winters = winters.isel(time=np.isin(winters["time"].dt.month, [12, 1, 2]))
    assert json.loads(open_cf(save(winters, tmp_path / "a.nc"), TAS).attrs["gap_counts"])["missing_time_steps"] == 0
    monthly = dataset(days=24, lon=LON[:1]).assign_coords(time=xr.date_range("2001-01-16", periods=24, freq="MS"))
    report = json.loads(open_cf(save(monthly.isel(time=np.arange(24) != 7), tmp_path / "b.nc"), TAS, gaps="keep").attrs["gap_counts"])
    assert report["missing_time_steps"] == 1 and report["time_step"] == "1 month"


def test_infinite_counts_as_missing_and_all_missing_is_refused(tmp_path):
    made = dataset()
    made["t2m"][0, 0, 0] = np.inf
    assert np.isnan(open_cf(save(made, tmp_path / "a.nc"), TAS, gaps="keep")["tas"]).sum() == 1
    with pytest.raises(BadInput, match="variable tas has no finite value"):
        open_cf(save(made * np.nan, tmp_path / "b.nc").as_posix(), {"tas": Wanted("t2m", "K", file_units="K")}, gaps="keep")


# ---------------------------------------------------------------- coarser


def test_block_mean_is_area_weighted_and_keeps_the_global_mean():
    made = dataset(lat=np.array([-75.0, -25.0, 25.0, 75.0])).rename(t2m="tas")
    made["lat"].attrs["standard_name"] = "latitude"
    result = coarsened(made, 2)
    weight = np.cos(np.deg2rad([25.0, 75.0]))
    north = (made["tas"].values[0, 2:, :2].mean(1) * weight).sum() / weight.sum()
    assert result["tas"].values[0, 1, 0] == pytest.approx(north, rel=1e-6)
    assert result["lat"].values.tolist() == [-50, 50] and result["lon"].values.tolist() == [22.5, 112.5, 202.5, 292.5]
    assert result["tas"].attrs["cell_methods"] == "time: mean area: mean"
    fine = np.average(made["tas"].values, axis=1, weights=np.cos(np.deg2rad(made["lat"]))).mean(1)
    assert np.allclose(result["tas"].values.mean((1, 2)), fine, atol=1e-4)  # both coarse bands have the same area
    with pytest.raises(BadInput, match="lon has 8 cells, not a whole number of blocks of 3"):
        coarsened(made, (2, 3))


def test_block_mean_skips_what_is_missing():
    made = dataset().rename(t2m="tas").isel(time=[0])
    made["tas"][0, :2, :2] = np.nan
    made["tas"][0, 2, 0] = np.nan
    result = coarsened(made.assign_coords(lat=LAT), 2)["tas"].values[0]
    assert np.isnan(result[0, 0]) and result[1, 0] == pytest.approx(
        made["tas"].values[0, 2:, :2][np.isfinite(made["tas"].values[0, 2:, :2])].mean()
    )


def test_a_url_is_pinned_by_the_values_that_were_read(tmp_path):
    time = xr.date_range("2001-01-01", periods=3)
    grid = {"time": time, "lat": ("lat", [10.0, 20.0], {"units": "degrees_north"}), "lon": ("lon", [0.0, 10.0], {"units": "degrees_east"})}

    def pinned(name: str, warmer: float) -> dict:
        values = warmer + np.arange(12, dtype=np.float32).reshape(3, 2, 2)
        made = xr.Dataset({"tas": (("time", "lat", "lon"), values, {"units": "K"})}, grid)
        made.to_zarr(tmp_path / name, zarr_format=3, consolidated=False)
        (entry,) = json.loads(truth.recorded(f"file://{tmp_path / name}", {"tas": {"units": "K"}}).attrs["inputs"])
        return entry

    same, again, other = pinned("a.zarr", 280.0), pinned("b.zarr", 280.0), pinned("c.zarr", 281.0)
    assert same["sha256"] == again["sha256"] != other["sha256"] and len(same["sha256"]) == 64 and same["size"] > 0
    record.Input(**same)  # what a run's record takes
    several = truth._pinned([{"name": name, "sha256": None, "size": None} for name in "ab"], xr.Dataset({"tas": ("x", [1.0])}))
    assert [each["name"] for each in several] == [f"{name}, the values read from all 2 inputs" for name in "ab"]
    assert several[0]["sha256"] == several[1]["sha256"]


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A Zarr store, and its address on a server of this process."""
    dataset().to_zarr(tmp_path / "a.zarr", zarr_format=3, consolidated=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/a.zarr"
        server.shutdown()
        thread.join()


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_a_zarr_store_behind_http_opens(served):
    pytest.importorskip("aiohttp")
    pytest.importorskip("requests")
    assert belongs(open_cf(served, TAS))
    with pytest.raises(BadInput, match="b.zarr: "):
        open_cf(served.replace("a.zarr", "b.zarr"), TAS)


def test_a_url_whose_package_is_not_installed_names_the_command(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "http", raising=False)
    with pytest.raises(BadInput, match=r"a.zarr: .*aiohttp.* pip install 'twinsim\[remote\]'"):
        open_cf(served, TAS)


# ---------------------------------------------------------------- patches


def test_patches_are_cut_from_the_north_west_and_are_wet():
    rain = np.zeros((2, 10, 12), np.float32)
    rain[0, 6:, :4] = 1.0  # north is the last row: the north-western 4 x 4 corner of the first frame
    rain[1, 2:6, 8:] = np.arange(16).reshape(4, 4)
    rain[1, 2, 8] = np.nan
    rain[1, 2:6, 4:8] = 2.0
    made = xr.Dataset({"rain": (("time", "y", "x"), rain, {"units": "mm h-1"})}, {"time": xr.date_range("2001", periods=2)})
    result = patches(made, "rain", size=4, stride=4)
    assert result["rain"].dims == ("patch", "y", "x")
    assert result["rain"].values.mean((1, 2)).tolist() == [1, 2]  # the patch with a missing value is left out
    assert result["centre"].values.tolist() == [2 / 12, 6 / 12]
    assert (result["frame_time"].values == made["time"].values).all()
    eight = patches(made, "rain", size=4, stride=4, symmetries=True)
    assert eight["symmetry"].values.tolist() == sorted(2 * [*range(8)]) and eight["centre"].values.tolist() == 8 * [2 / 12, 6 / 12]
    as_it_is = eight["rain"].values[eight["symmetry"].values == 0]
    np.testing.assert_array_equal(as_it_is, result["rain"].values)
    marked = np.arange(16.0, dtype=np.float32).reshape(1, 4, 4)
    turned = patches(
        xr.Dataset({"rain": (("time", "y", "x"), marked)}, {"time": xr.date_range("2001", periods=1)}), "rain", 4, 4, symmetries=True
    )
    assert len(np.unique(turned["rain"].values.reshape(8, -1), axis=0)) == 8  # the eight symmetries of a square
    with pytest.raises(BadInput, match="none of 4 x 4 cells has more than 5% of its cells above 50"):
        patches(made, "rain", size=4, stride=4, wet_threshold=50)


def test_turned_copies_are_cut_from_moved_grids():
    rain = 1 + np.arange(20.0 * 24, dtype=np.float32).reshape(1, 20, 24)
    made = xr.Dataset({"rain": (("time", "y", "x"), rain)}, {"time": xr.date_range("2001", periods=1)})
    cut = patches(made, "rain", size=8, stride=8, symmetries=True, moved=3)
    plain = patches(made, "rain", size=8, stride=8)
    np.testing.assert_array_equal(cut["rain"].values[cut["symmetry"].values == 0], plain["rain"].values)
    third = cut.isel(patch=cut["symmetry"].values == 2)  # half a turn, six cells from the corner
    assert third["centre"].values.tolist() == [10 / 24, 18 / 24]
    np.testing.assert_array_equal(third["rain"].values[0], rain[0, ::-1][6:14, 6:14][::-1][::-1, ::-1])
    heavy = patches(made, "rain", size=8, stride=8, symmetries=True, moved=3, heavy=Heavy(above=400.0, block=4, times=2))
    again = heavy.isel(patch=heavy["symmetry"].values >= 8)  # of the first eight, none is left out
    assert heavy.sizes["patch"] - again.sizes["patch"] == cut.sizes["patch"] and again.sizes["patch"]
    assert (again["rain"].values.reshape(-1, 2, 4, 2, 4).mean((2, 4)).max((1, 2)) >= 400).all()
    with pytest.raises(BadInput, match="heavy: expected a block and times of at least 1, got 4 and 0"):
        Heavy(above=1.0, block=4, times=0)
    with pytest.raises(BadInput, match="moved: expected 0, or with symmetries a number of cells, got 3"):
        patches(made, "rain", size=8, stride=8, moved=3)


# ---------------------------------------------------------------- bad input


def test_missing_file_and_variable_say_what_was_expected(tmp_path):
    with pytest.raises(BadInput, match=r"nowhere\.nc: no such file"):
        open_cf(tmp_path / "nowhere.nc", TAS)
    path = save(dataset(), tmp_path / "a.nc")
    with pytest.raises(BadInput, match="no variable t2n; present: t2m; did you mean t2m"):
        open_cf(path, {"tas": Wanted("t2n", "K")})
    with pytest.raises(BadInput, match=r"no time step in period \['1990', '1991'\].*run from 2001-01-01"):
        open_cf(path, TAS, period=["1990", "1991"])
    with pytest.raises(BadInput, match=r"no cell in the region .*cover lat 40 to 55"):
        open_cf(path, TAS, region={"lat": [0, 10]})
    with pytest.raises(BadInput, match="region names latt; present: .*did you mean lat"):
        open_cf(path, TAS, region={"latt": [0, 10]})
    with pytest.raises(BadInput, match="months: expected numbers from 1 to 12"):
        open_cf(path, TAS, months=[13])


def test_no_horizontal_axes_and_text_are_refused(tmp_path):
    path = tmp_path / "a.nc"
    xr.Dataset({"t2m": (("time", "station"), np.ones((2, 3)), {"units": "K"}), "name": ("station", ["a", "b", "c"])}).to_netcdf(path)
    with pytest.raises(BadInput, match=r"dimensions \('time', 'station'\) and no recognisable horizontal axes"):
        open_cf(path, TAS)
    with pytest.raises(BadInput, match="variable name is of type .*, expected numbers"):
        open_cf(path, {"tas": Wanted("name", "K")})


def test_damaged_files_are_one_sentence(tmp_path):
    path = save(dataset(days=400), tmp_path / "a.nc")
    text = path.read_bytes()
    path.write_bytes(text[: len(text) // 2])
    with pytest.raises(BadInput, match="damaged"):
        open_cf(path, TAS)
    path.write_bytes(b"not a dataset")
    with pytest.raises(BadInput, match=r"a\.nc: cannot be opened as NetCDF or Zarr") as caught:
        open_cf(path, TAS)
    assert "\n" not in str(caught.value)
    store = tmp_path / "a.zarr"
    dataset().to_zarr(store, zarr_format=3)
    chunk = next(file for file in (store / "t2m" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(b"\x00\x01" + os.urandom(8))
    with pytest.raises(BadInput, match="variable t2m cannot be read, the file is damaged"):
        open_cf(store, TAS)
    (store / "t2m" / "zarr.json").write_text("{")
    (store / "zarr.json").write_text("{")
    with pytest.raises(BadInput, match="cannot be opened"):
        open_cf(store, TAS)


def _declares(store: Path, shape: tuple[int, int, int], chunks: tuple[int, int, int]) -> Path:
    """A Zarr store of a few hundred bytes that claims to be large."""
    group = zarr.open_group(store, mode="w", zarr_format=3)
    big = group.create_array("t2m", shape=shape, chunks=chunks, dtype="f4", dimension_names=("time", "lat", "lon"))
    big.attrs["units"] = "K"
    for name, size, units in zip(("time", "lat", "lon"), shape, ("days since 1900-01-01", "degrees_north", "degrees_east"), strict=True):
        axis = group.create_array(name, shape=(size,), chunks=(min(size, 1000),), dtype="f4", dimension_names=(name,))
        if size < 1e6:
            axis[:] = np.arange(size) / size
        axis.attrs["units"] = units
    return store


@pytest.mark.parametrize(
    ("shape", "chunks", "message"),
    [
        ((10**5, 1000, 1000), (1, 1000, 1000), "would load 400 GB, expected at most 16 GB"),
        ((10**5, 1000, 1000), (10**5, 1000, 1000), "stored in chunks of 400 GB"),
        ((1, 10**12, 10), (1, 1000, 10), "coordinate lat declares 1000000000000 values"),
    ],
)
def test_a_small_file_that_declares_terabytes_is_refused_before_it_is_read(tmp_path, shape, chunks, message):
    path = _declares(tmp_path / "big.zarr", shape, chunks)
    with pytest.raises(BadInput, match=message):
        open_cf(path, TAS)


@pytest.mark.parametrize("codec", [numcodecs.Pickle(), numcodecs.Categorize(["a"], "<U1", "f8")], ids=lambda codec: codec.codec_id)
def test_a_codec_that_could_run_code_is_refused_unread(tmp_path, codec, monkeypatch):
    path = tmp_path / "a.zarr"
    dataset().to_zarr(path, zarr_format=2, consolidated=False)
    metadata = json.loads((path / "t2m" / ".zarray").read_text())
    metadata["filters"] = [codec.get_config()]
    (path / "t2m" / ".zarray").write_text(json.dumps(metadata))
    monkeypatch.setattr(type(codec), "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadInput, match=codec.codec_id):
        open_cf(path, TAS)


# ---------------------------------------------------------------- provenance


def test_inputs_are_hashed(tmp_path):
    path = save(dataset(license="CC BY 4.0"), tmp_path / "a.nc")
    (record,) = inputs(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert record == {"name": "a.nc", "path": str(path), "licence": "CC BY 4.0", "sha256": digest, "size": path.stat().st_size}
    store = tmp_path / "a.zarr"
    dataset().to_zarr(store, zarr_format=3)
    before = inputs(store, "own")[0]
    assert before["licence"] == "own" and before["size"] == sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    (store / "t2m" / "extra").write_text("x")
    assert inputs(store, "own")[0]["sha256"] != before["sha256"]


@pytest.mark.skipif(not (Path(__file__).parents[2] / "shared/data/climate").is_dir(), reason="the sample data are not here")
def test_radar_patches_of_the_reference_split():
    """542 wet patches lie in the western half of the radar sample, as the reference table states."""
    path = Path(__file__).parents[2] / "shared/data/climate/mrms_preciprate_conus_2019-06-10.nc"
    result = patches(open_cf(path, {"rain": Wanted("rain_rate", "mm h-1")}, gaps="keep"), "rain")
    assert int((result["centre"] < 0.5).sum()) == 542
