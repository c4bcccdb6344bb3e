"""Which examples a batch holds, and that they come back from disk as they went there, or not at all."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr

from twinsim import data
from twinsim import mesh as meshes
from twinsim.base import BadInput, Example, Spec

SPEC = Spec(grid=(4, 6), channels=2, fields=3, scalars=2, periodic=(False, True))
SIZE = 23


def examples(count=SIZE, spec=SPEC, seed=0) -> Example:
    draw = np.random.default_rng(seed)
    shapes = ((*spec.grid, spec.channels), (*spec.grid, spec.fields), (spec.scalars,))
    return Example(*(draw.normal(size=(count, *shape)).astype(np.float32) for shape in shapes))


def blocks(whole: Example, cuts=(7, 8, 20)):
    edges = [0, *cuts, len(whole.target)]
    return [Example(*(part[start:stop] for part in whole)) for start, stop in zip(edges[:-1], edges[1:], strict=True)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "train"
    data.write_examples(path, blocks(examples()), SPEC, SIZE, {"source": "a test"}, file_bytes=5 * 4 * 72)  # 5 examples a file
    return path


# ---------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("batch", [1, 4, 10])
def test_every_epoch_holds_every_example_once(size, batch):
    steps = -(-3 * size // batch)
    order = np.concatenate([data.indices(5, step, batch, size) for step in range(steps)])[: 3 * size].reshape(3, size)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(size), (3, 1)))
    if size > 7:
        assert not (order[0] == order[1]).all()


def test_order_depends_on_seed_alone_not_on_history():
    later = data.indices(1, 10**9, 8, 1000)
    data.indices(1, 3, 8, 1000)
    np.testing.assert_array_equal(later, data.indices(1, 10**9, 8, 1000))
    assert later.dtype == np.int64
    assert (later != data.indices(2, 10**9, 8, 1000)).any()


def test_batch_size_does_not_change_the_order():
    small = np.concatenate([data.indices(0, step, 4, 37) for step in range(30)])
    large = np.concatenate([data.indices(0, step, 120, 37) for step in range(1)])  # longer than three epochs
    np.testing.assert_array_equal(small, large)


def test_permutations_are_spread_evenly():
    epochs, size = 4000, 6
    order = data.indices(3, 0, epochs * size, size).reshape(epochs, size)
    counts = np.stack([np.bincount(order[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 52.6  # 99.9 % quantile of chi-square with 25 degrees of freedom
    pairs = np.bincount(order[:, 0] * size + order[:, 1], minlength=size**2).reshape(size, size)
    off = pairs[~np.eye(size, dtype=bool)]
    assert ((off - epochs / 30) ** 2 / (epochs / 30)).sum() < 58.3  # the same, 29 degrees of freedom


@pytest.mark.parametrize("arguments", [(0, -1, 1, 1), (0, 0, 0, 1), (0, 0, 1, 0)])
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(BadInput, match="indices"):
        data.indices(*arguments)


# ---------------------------------------------------------------- disk


def test_examples_come_back(folder):
    store, truth = data.ExampleStore(folder), examples()
    assert len(store) == SIZE and store.spec == SPEC and store.attributes == {"source": "a test"}
    rows = np.array([22, 0, 5, 5, 13])
    for part, true in zip(store.read(rows), truth, strict=True):
        np.testing.assert_array_equal(part, true[rows])
    for part, true in zip(store.read(slice(3, 9)), truth, strict=True):
        np.testing.assert_array_equal(part, true[3:9])


def test_other_zarr_readers_open_it(folder):
    with xr.open_zarr(folder, consolidated=False) as opened:
        assert opened.target.dims == ("example", "grid0", "grid1", "channel")
        np.testing.assert_array_equal(opened.target, examples().target)
        assert opened.attrs["source"] == "a test"


def test_parts_without_values(tmp_path):
    spec = SPEC._replace(fields=0, scalars=0)
    data.write_examples(tmp_path / "x", [examples(3, spec)], spec, 3)
    read = data.ExampleStore(tmp_path / "x").read([2, 1])
    assert read.fields.shape == (2, 4, 6, 0) and read.scalars.shape == (2, 0)
    np.testing.assert_array_equal(read.target, examples(3, spec).target[[2, 1]])


def test_killed_writing_leaves_nothing_that_opens(tmp_path):
    def broken():
        yield blocks(examples())[0]
        raise KeyboardInterrupt

    path = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt):
        data.write_examples(path, broken(), SPEC, SIZE)
    with pytest.raises(BadInput, match="not written to its end"):
        data.ExampleStore(path)
    data.write_examples(path, blocks(examples()), SPEC, SIZE)  # the second try succeeds
    assert len(data.ExampleStore(path)) == SIZE and [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block._replace(target=block.target[..., :1]), "target from 0: expected shape"),
        (
            lambda block: block._replace(scalars=np.where(np.arange(23)[:, None] == 4, np.nan, block.scalars)),
            "scalars of example 4: expected finite",
        ),
        (lambda block: Example(*(part[:20] for part in block)), "expected 23 as announced, got 20"),
        (lambda block: Example(*(np.concatenate([part, part]) for part in block)), "expected 23 as announced, got 46"),
    ],
)
def test_wrong_blocks_are_refused(tmp_path, change, message):
    with pytest.raises(BadInput, match=message):
        data.write_examples(tmp_path / "x", [change(examples())], SPEC, SIZE)
    assert not (tmp_path / "x").exists()


def test_existing_folder_is_never_written_over(folder):
    with pytest.raises(BadInput, match="expected a new folder"):
        data.write_examples(folder, blocks(examples()), SPEC, SIZE)


@pytest.mark.parametrize("where", ["early", "middle", "end"])
def test_flipped_byte_is_found(folder, where):
    path = folder / "fields" / "c" / "2" / "0" / "0" / "0"  # examples 10 to 14
    content = bytearray(path.read_bytes())
    content[{"early": 3, "middle": len(content) // 2, "end": -3}[where]] ^= 1
    path.write_bytes(content)
    store = data.ExampleStore(folder)
    with pytest.raises(BadInput, match=r"fields of example 1[0-4] is damaged"):
        store.read(np.arange(SIZE))
    store.read(np.arange(10))  # the rest is whole


def test_deleted_and_truncated_files_are_found(folder):
    path = folder / "target" / "c" / "1" / "0" / "0" / "0"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(BadInput, match="target of examples 5 to 9 in .*: expected .* bytes, got"):
        data.ExampleStore(folder)
    path.unlink()
    with pytest.raises(BadInput, match="target of examples 5 to 9 in .* it is missing"):
        data.ExampleStore(folder)


def test_file_lost_after_opening_is_found(folder):
    store = data.ExampleStore(folder)
    (folder / "target" / "c" / "4" / "0" / "0" / "0").unlink()
    with pytest.raises(BadInput, match="target of example 20 is missing"):
        store.read([1, 20])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "other"}'])
def test_damaged_manifest_is_named(folder, content):
    (folder / data.MANIFEST).write_text(content)
    with pytest.raises(BadInput, match="manifest.json is damaged"):
        data.ExampleStore(folder)


def test_row_that_does_not_exist(folder):
    with pytest.raises(BadInput, match="rows from 0 to 22, got 1 to 23"):
        data.ExampleStore(folder).read([1, 23])


# ---------------------------------------------------------------- batches


def test_batches_hold_the_examples_of_their_step_on_any_mesh(folder):
    store, truth = data.ExampleStore(folder), examples()
    for sizes in ({}, {"fsdp": 4}, {"data": 2, "fsdp": 1, "model": 4}):
        mesh = meshes.make_mesh(sizes)
        stream = data.batches(store, seed=4, batch=16, mesh=mesh, first_step=7)
        for step in (7, 8):
            batch, rows = next(stream), data.indices(4, step, 16, SIZE)
            for part, true in zip(batch, truth, strict=True):
                np.testing.assert_array_equal(part, true[rows])
                assert part.sharding.is_equivalent_to(meshes.batch_sharding(mesh), part.ndim)
        stream.close()


def test_rows_of_all_processes_make_the_global_batch(folder):
    store, mesh = data.ExampleStore(folder), meshes.make_mesh()
    rows = data.indices(0, 5, 16, SIZE)
    split = np.array(jax.devices()).reshape(2, -1)
    parts = [store.read(rows[meshes.process_rows(mesh, 16, mine)]).target for mine in split]
    np.testing.assert_array_equal(np.concatenate(parts), store.read(rows).target)


def test_closing_stops_the_reader(folder):
    stream = data.batches(data.ExampleStore(folder), 0, 8, meshes.make_mesh())
    next(stream)
    assert any(thread.name == "batches" for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name == "batches" for thread in threading.enumerate())


def test_error_of_the_reader_surfaces(folder):
    store = data.ExampleStore(folder)
    for path in (folder / "target" / "c").rglob("0"):
        if path.is_file():
            path.unlink()
    stream = data.batches(store, 0, 8, meshes.make_mesh())
    with pytest.raises(BadInput, match="target of example"):
        next(stream)
    assert not any(thread.name == "batches" for thread in threading.enumerate())


# ---------------------------------------------------------------- killed

WRITER = """
import sys, time
sys.path[:0] = {paths!r}
import test_data as t

def slowly():
    for block in t.blocks(t.examples(), range(1, t.SIZE)):
        time.sleep(0.02)
        yield block

print("begun", flush=True)
t.data.write_examples(t.Path(sys.argv[1]), slowly(), t.SPEC, t.SIZE, {{"source": "a test"}}, file_bytes=5 * 4 * 72)
"""


@pytest.mark.slow
def test_killed_at_any_moment_of_writing_it_leaves_nothing_or_all_and_is_made_again_with_the_same_bytes(folder, tmp_path):
    script, target = WRITER.format(paths=[str(Path(__file__).parent), str(Path(__file__).parents[1])]), tmp_path / "killed"
    traces = []
    for moment in np.random.default_rng(0).uniform(0, 0.5, 4):  # of the half a second that writing takes
        with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begun\n"
            time.sleep(moment)
            process.kill()
        traces.append(target.with_name("killed.tmp").exists())
        assert not target.exists() or data.ExampleStore(target)
    assert any(traces)  # the test would say nothing otherwise
    if not target.exists():
        assert subprocess.run([sys.executable, "-c", script, str(target)], check=False, stdout=subprocess.DEVNULL).returncode == 0
    written = [{path.relative_to(where): path.read_bytes() for path in where.rglob("*") if path.is_file()} for where in (folder, target)]
    assert written[0] == written[1] and not target.with_name("killed.tmp").exists()
