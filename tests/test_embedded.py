"""The shipped climate: its transform has closed forms, its packing a bound on the error, its data a known climate."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from domains.climate import embedded
from domains.climate.embedded import BRANCHES, DATA, MAX_BYTES, MU, RAIN_STEP, Packing, open_embedded, pack
from domains.climate.speedy import OUTPUTS
from twinsim.base import BadInput

DAYS = 24


def _wander(rng: np.random.Generator, degree: int, order: int) -> np.ndarray:
    """A field `[time, lat, lon]` whose coefficients fall off with degree and remember the day before."""
    n, _, _ = embedded._wavenumbers(degree, order)
    coefficients = np.zeros((DAYS, len(n)))
    for day in range(1, DAYS):
        coefficients[day] = 0.6 * coefficients[day - 1] + rng.normal(size=len(n)) / (1 + n) ** 1.5
    return embedded._synthesise(coefficients, Packing(degree, degree, order, 1.0), np.ones(48)).astype(np.float64)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Four short runs of made-up weather on the T31 grid, band-limited like SPEEDY's."""
    folder, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(1)
    centre = {"tas": 288, "pr": 0, "hus850": 0.005, "ps": np.log(1e5), "zg500": 5600, "ta500": 260, "ua500": 8, "va500": 0}
    size = {"tas": 3, "pr": 3, "hus850": 0.004, "ps": 0.01, "zg500": 60, "ta500": 3, "ua500": 6, "va500": 6}
    cosine = np.sqrt(1 - MU**2)[:, None]
    for branch, offset in BRANCHES.items():
        data = {}
        for name, (units, standard, _) in OUTPUTS.items():
            wind = name in ("ua500", "va500")
            values = centre[name] + size[name] * _wander(rng, 30 if wind else 32, 30 if wind else 31)
            if name in ("pr", "hus850"):
                values = np.maximum(values, 0)
            if name == "ps":
                values = np.exp(values)
            if wind:
                values = values * cosine  # times the cosine once more, as packed, it is of degree 32
            data[name] = (("time", "lat", "lon"), values.astype(np.float32), {"units": units, "standard_name": standard})
        data["orog"] = (("lat", "lon"), np.full((48, 96), 100.0), {"units": "m"})
        data["lsm"] = (("lat", "lon"), np.zeros((48, 96)), {"units": "1"})
        data["sst"] = (("month", "lat", "lon"), np.full((12, 48, 96), 290.123), {"units": "K"})
        coords = {"time": xr.date_range("2000-03-01", periods=DAYS), "lat": np.rad2deg(np.arcsin(MU)), "lon": np.arange(96) * 3.75}
        xr.Dataset(data, coords, {"sst_offset_K": offset, "source": "made up"}).to_netcdf(folder / f"{branch}.nc")
    return folder


@pytest.fixture(scope="module")
def packed(runs, tmp_path_factory) -> Path:
    return pack(runs, tmp_path_factory.mktemp("data") / "small.zarr.zip")


# ---------------------------------------------------------------- the transform


def test_legendre_functions_are_orthonormal_and_known():
    legendre = embedded._legendre()
    for m in (0, 1, 31, 47):
        gram = legendre[m, m:] * embedded.GAUSS_WEIGHTS @ legendre[m, m:].T
        assert np.allclose(gram, np.eye(48 - m), atol=1e-10)  # Gauss quadrature with 48 nodes is exact to degree 95
    assert np.allclose(legendre[0, 1], np.sqrt(3 / 2) * MU)
    assert np.allclose(legendre[2, 2], np.sqrt(15 / 16) * (1 - MU**2))


def test_analysis_undoes_synthesis():
    n, m, part = embedded._wavenumbers(32, 31)
    assert len(n) == 33**2 - 2  # all of degree 32 but order 32
    assert np.unique(np.stack([n, m, part]), axis=1).shape[1] == len(n)
    coefficients = np.random.default_rng(0).normal(size=(2, len(n)))
    fields = embedded._synthesise(coefficients, Packing(32, 32, 31, 1.0), np.ones(48))
    assert np.allclose(embedded._analyse(fields, 32, 31), coefficients, atol=1e-5)  # float32 fields
    power = embedded._global_mean(fields.astype(np.float64) ** 2)
    assert np.allclose(power, (coefficients**2).sum(1) / 2, rtol=1e-5)  # Parseval: the mean over a sphere of area 2 in MU


# ---------------------------------------------------------------- packing


def test_rounding_error_is_bounded_and_stated(runs, packed):
    decoded = open_embedded(tuple(BRANCHES), path=packed)
    raw = xr.concat([xr.open_dataset(runs / f"{branch}.nc") for branch in BRANCHES], "time", data_vars="minimal")
    for name in OUTPUTS:
        error = decoded[name].values.astype(np.float64) - raw[name].values
        rms = embedded._global_mean((error**2).mean(0)) ** 0.5
        assert decoded[name].attrs["quantisation_rms"] == pytest.approx(rms, rel=1e-6)
        assert decoded[name].attrs["quantisation_relative"] < 0.15, name
    # a rounded square root is off by at most half a step, everywhere
    assert np.abs(np.sqrt(decoded["pr"]) - np.sqrt(raw["pr"].values)).max() <= RAIN_STEP / 2 + 1e-6
    assert np.abs(decoded["sst"] - 290.123).max() <= 0.0051


def test_laws_hold_after_packing(runs, packed):
    decoded = open_embedded(("control", "warm2"), path=packed)
    raw = xr.open_dataset(runs / "control.nc")
    assert float(decoded["pr"].min()) == 0 and float(decoded["hus850"].min()) == 0
    mass = embedded._global_mean(decoded["ps"].values[:DAYS])
    assert np.abs(mass - embedded._global_mean(raw["ps"].values)).max() < 0.1  # Pa, of 100000: float32
    for name in ("zg500", "ta500"):  # nothing beyond the model's own truncation
        waves = np.abs(np.fft.rfft(decoded[name].values, axis=-1))
        assert waves[..., 32:].max() < 1e-5 * waves.max()


def test_branches_come_in_the_order_asked_with_their_warming(runs, packed):
    decoded = open_embedded(("warm1", "cold1"), ["tas"], path=packed)
    assert decoded.sizes["time"] == 2 * DAYS and set(decoded.data_vars) == {"tas", "orog", "lsm", "sst"}
    assert decoded["branch"].values.tolist() == ["warm1"] * DAYS + ["cold1"] * DAYS
    assert decoded["sst_offset"].values.tolist() == [1.0] * DAYS + [-1.0] * DAYS
    apart = [open_embedded((branch,), ["tas"], path=packed)["tas"].values for branch in ("warm1", "cold1")]
    assert np.allclose(np.concatenate(apart), decoded["tas"].values, atol=1e-4)  # float32 products of another shape


def test_packing_twice_gives_the_same_bytes_and_its_sum(runs, packed, tmp_path):
    again = pack(runs, tmp_path / packed.name)
    assert again.read_bytes() == packed.read_bytes()
    digest = hashlib.sha256(again.read_bytes()).hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  {packed.name}\n" and digest in (tmp_path / "README.md").read_text()


def test_wrong_runs_are_named(runs, tmp_path):
    with pytest.raises(BadInput, match=r"control\.nc: no such run"):
        pack(tmp_path, tmp_path / "a.zarr.zip")
    for branch in BRANCHES:
        shutil.copy(runs / "control.nc", tmp_path / f"{branch}.nc")
    with pytest.raises(BadInput, match=r"cold1\.nc: sst_offset_K is 0\.0, expected -1\.0"):
        pack(tmp_path, tmp_path / "a.zarr.zip")


def test_wrong_names_and_damage_are_one_sentence(packed, tmp_path):
    with pytest.raises(BadInput, match="branch warm3: .*expected one of control, cold1, warm1, warm2; did you mean warm"):
        open_embedded(("warm3",), path=packed)
    with pytest.raises(BadInput, match="variable taz: .*did you mean tas"):
        open_embedded(variables=["taz"], path=packed)
    with pytest.raises(BadInput, match="are missing"):
        open_embedded(path=tmp_path / "nothing.zip")
    text = packed.read_bytes()
    for broken in (text[: len(text) // 2], b"", text.replace(b"\x28\xb5\x2f\xfd", b"\x00\x00\x00\x00")):  # cut, empty, no Zstandard frame
        (tmp_path / "broken.zarr.zip").write_bytes(broken)
        with pytest.raises(BadInput, match="damaged"):
            open_embedded(path=tmp_path / "broken.zarr.zip")


# ---------------------------------------------------------------- what is shipped


def test_shipped_file_is_small_and_is_the_one_its_readme_describes():
    digest = hashlib.sha256(DATA.read_bytes()).hexdigest()
    readme = (DATA.parent / "README.md").read_text()
    assert DATA.stat().st_size <= MAX_BYTES and f"{DATA.stat().st_size} bytes" in readme
    assert digest in readme and f"{digest}  {DATA.name}" in (DATA.parent / "SHA256SUMS").read_text()


def test_shipped_climate_is_plausible():
    shipped = open_embedded(tuple(BRANCHES), ["tas", "pr", "ps"])
    weights = xr.DataArray(embedded.GAUSS_WEIGHTS, dims="lat")
    mean = shipped[["tas", "pr", "ps"]].weighted(weights).mean(("lat", "lon"))
    by_branch = mean[["tas", "pr"]].groupby("branch").mean()
    assert 285 < float(by_branch["tas"].sel(branch="control")) < 291  # K; observed is 287 to 288
    assert 2.2 < float(by_branch["pr"].sel(branch="control")) < 3.2  # mm day-1; observed is 2.7
    order = ["cold1", "control", "warm1", "warm2"]
    assert (np.diff(by_branch["tas"].sel(branch=order)) > 0.5).all()  # K for each K of sea-surface warming
    assert float(shipped["pr"].min()) == 0.0
    assert float(mean["ps"].std()) < 10  # Pa; no mass is created but by the model's own drift
    assert shipped["branch"].to_series().value_counts().to_dict() == {"control": 730, "cold1": 365, "warm1": 365, "warm2": 365}
    assert np.unique(np.diff(shipped["time"].values[:730])).tolist() == [86400 * 10**9]  # consecutive days
    for name, (units, _, _) in OUTPUTS.items():
        assert name not in shipped or shipped[name].attrs["units"] == units
