"""Answers on disk: written some members at a time, with the same bytes for any number of them."""

import tracemalloc
import warnings

import numpy as np
import pytest
import xarray as xr

from twinsim import files

MEMBERS, DAYS = 5, 70  # days of more than one chunk


def answer(some: range) -> xr.Dataset:
    """What a member holds is a function of its number; one of them is nothing but zeros, the fill value."""
    day = np.arange(DAYS)
    values = np.stack([(member - 2) * np.outer(day, [1, 2, 3]) for member in some]).astype(np.float32)
    members = ("member", np.asarray(some), {"standard_name": "realization"})
    time = np.datetime64("2001-01-01", "ns") + day * np.timedelta64(1, "D")
    return xr.Dataset(
        {
            "tas": (("member", "time", "place"), values, {"units": "K", "long_name": "synthetic temperature"}),
            "wait": (("member", "time"), values[..., 0], {"units": "s"}),
            "warm": (("member", "time"), values[..., 0] > 10),
        },
        {"member": members, "time": time, "name": ("place", np.array(["a", "bb", "c"])), "height": ((), 2.0, {"units": "m"})},
        {"source": "made for a test"},
    )


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_any_number_of_members_at_once_gives_the_same_files_and_answer(tmp_path, at_once):
    asked = []

    def part(some: range) -> xr.Dataset:
        asked.append(len(some))
        return answer(some)

    whole = files.write_zarr(answer, MEMBERS, MEMBERS, tmp_path / "whole.zarr")
    parts = files.write_zarr(part, MEMBERS, at_once, tmp_path / "parts.zarr")
    assert max(asked) <= at_once and sum(asked) == MEMBERS
    xr.testing.assert_identical(whole, answer(range(MEMBERS)))
    with warnings.catch_warnings(action="error"), xr.open_zarr(tmp_path / "whole.zarr", chunks=None) as opened:  # as a user would
        xr.testing.assert_identical(opened.load(), answer(range(MEMBERS)))
    xr.testing.assert_identical(parts, answer(range(MEMBERS)))
    of_whole, of_parts = (
        {path.relative_to(store): path.read_bytes() for path in store.rglob("*") if path.is_file()}
        for store in (tmp_path / "whole.zarr", tmp_path / "parts.zarr")
    )
    assert of_whole == of_parts and len(of_whole) > 2 * MEMBERS


def test_an_answer_larger_than_what_is_held_of_it(tmp_path):
    members, cells = 20, 2**19  # of 2 MiB each

    def part(some: range) -> xr.Dataset:
        values = np.full((len(some), 1, cells), 1.0, np.float32) * np.asarray(some, np.float32)[:, None, None]
        return xr.Dataset({"tas": (("member", "time", "cell"), values)}, {"member": np.asarray(some)})

    tracemalloc.start()
    made = files.write_zarr(part, members, 1, tmp_path / "large.zarr")
    assert [float(member.mean()) for member in made["tas"]] == list(range(members))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6 * 4 * cells  # a few copies of one member, on its way through xarray and the codecs, and not twenty
