"""Training examples on disk, and the endless stream of batches drawn from them.

Which examples a batch holds is a pure function of seed and step (`indices`), never the state of an iterator: training resumes
anywhere, on any number of processes, with the same order. Each process reads only its rows, some batches ahead.

On disk: Zarr v3, one array for each part of an `Example` that has values. Each example is a chunk of its own with a CRC32C checksum,
many chunks share a file, and `manifest.json`, written last, lists every file with its size.
"""

import json
import math
import os
import queue
import shutil
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from twinsim import mesh as meshes
from twinsim.base import BadInput, Example, Spec

FORMAT = "twinsim-examples-1"
MANIFEST = "manifest.json"
FILE_BYTES = 32 << 20  # about the size of one file of many examples
CACHE_BYTES = 64 << 20  # for the indices of those files and what was read last

# ---------------------------------------------------------------- which examples


def indices(seed: int, step: int, batch: int, size: int) -> np.ndarray:
    """The examples of the batch of `step`, int64 `[batch]`.

    The concatenated batches walk through one epoch after the other, each a permutation of `range(size)` of its own. A batch may
    begin in one epoch and end in the next, and may be longer than an epoch.
    """
    if step < 0 or batch < 1 or size < 1:
        raise BadInput(f"indices: expected step >= 0, batch >= 1 and size >= 1, got {step}, {batch} and {size}")
    position = np.arange(batch, dtype=np.uint64) + np.uint64(step * batch)
    epoch, place = np.divmod(position, np.uint64(size))
    key = _mix(_mix(np.full(batch, seed % 2**64, np.uint64)) ^ epoch)
    return _permute(place, key, size).astype(np.int64)


def _permute(place: np.ndarray, key: np.ndarray, size: int) -> np.ndarray:
    """A permutation of `range(size)` chosen by `key`: a Feistel cipher on the next power of four, repeated until the value is inside.

    Source: Luby & Rackoff (1988); cycle walking: Black & Rogaway (2002), section 3.
    """
    bits = np.uint64(max(3, (int(size - 1).bit_length() + 1) // 2))  # of each half; below 3 a cipher has too few permutations
    mask = (np.uint64(1) << bits) - np.uint64(1)
    value, outside = place.copy(), np.ones(place.shape, bool)
    while outside.any():
        left, right = value[outside] >> bits, value[outside] & mask
        for number in range(8):
            left, right = right, left ^ (_mix(_mix(key[outside] + np.uint64(number)) ^ right) & mask)
        value[outside] = (left << bits) | right
        outside = value >= np.uint64(size)
    return value


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijective scrambling of 64-bit integers. Source: Steele, Lea & Flood (2014), SplitMix64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---------------------------------------------------------------- writing


def publish(unfinished: Path, folder: Path) -> None:
    """Makes `unfinished` appear as `folder`, whole or not at all: everything in it is on disk before it gets its name."""
    for parent, _, names in os.walk(unfinished):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))
    os.replace(unfinished, folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_examples(
    folder: Path,
    blocks: Iterable[Example],
    spec: Spec,
    size: int,
    attributes: Mapping[str, Any] | None = None,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes `size` examples, given in order as blocks `[n, ...]` of any n, into `folder`, float32.

    Args:
      attributes: JSON values about the data, kept with it.

    Raises:
      BadInput: the folder exists, or a block has another shape than `spec`, values that are not finite, or too few or many examples.
    """
    if folder.exists():
        raise BadInput(f"examples: expected a new folder, but {folder} exists")
    if size < 1:
        raise BadInput(f"examples for {folder}: expected at least one, got {size}")
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shapes = _shapes(spec)
    rows = max(1, min(size, file_bytes // (4 * max(1, *(math.prod(shape) for shape in shapes.values())))))
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}
    (unfinished / "zarr.json").write_text(json.dumps(group))
    arrays = {name: _create(unfinished / name, name, size, shape, rows) for name, shape in shapes.items() if math.prod(shape)}
    done = 0
    for block in _regroup(_checked(blocks, shapes, folder), rows):
        count = len(block.target)
        if done + count <= size:
            for future in [array[done : done + count].write(getattr(block, name)) for name, array in arrays.items()]:
                future.result()
        done += count
    if done != size:
        raise BadInput(f"examples for {folder}: expected {size} as announced, got {done}")
    files = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in sorted(unfinished.rglob("*")) if path.is_file()}
    manifest = {
        "format": FORMAT,
        "size": size,
        "spec": spec._asdict(),
        "rows_per_file": rows,
        "attributes": dict(attributes or {}),
        "files": files,
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    publish(unfinished, folder)


def _shapes(spec: Spec) -> dict[str, tuple[int, ...]]:
    return {"target": (*spec.grid, spec.channels), "fields": (*spec.grid, spec.fields), "scalars": (spec.scalars,)}


def _create(path: Path, name: str, size: int, shape: tuple[int, ...], rows: int) -> ts.TensorStore:
    plain = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    many = {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, *shape], "codecs": plain, "index_codecs": plain}}
    last = {"target": "channel", "fields": "field", "scalars": "scalar"}[name]
    metadata = {
        "shape": [size, *shape],
        "data_type": "float32",
        "fill_value": "NaN",  # values are finite, so a hole never passes for data
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *shape]}},
        "codecs": [many],
        "dimension_names": ["example", *(f"grid{axis}" for axis in range(len(shape) - 1)), last],
    }
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}, "metadata": metadata}, create=True).result()


def _checked(blocks: Iterable[Example], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Iterator[Example]:
    start = 0
    for block in blocks:
        parts = {name: np.asarray(getattr(block, name), np.float32) for name in shapes}
        count = len(parts["target"])
        for name, part in parts.items():
            if part.shape != (count, *shapes[name]):
                raise BadInput(f"examples for {folder}: {name} from {start}: expected shape {(count, *shapes[name])}, got {part.shape}")
            if len(bad := _not_finite(part)):
                raise BadInput(f"examples for {folder}: {name} of example {start + bad[0]}: expected finite values, got NaN or infinity")
        yield Example(**parts)
        start += count


def _not_finite(part: np.ndarray) -> np.ndarray:
    return np.flatnonzero(~np.isfinite(part).all(axis=tuple(range(1, part.ndim))))


def _regroup(blocks: Iterable[Example], rows: int) -> Iterator[Example]:
    """The same examples in blocks of `rows`, the last one shorter: a file is written once."""
    held: list[Example] = []
    for block in blocks:
        while count := len(block.target):
            room = rows - sum(len(part.target) for part in held)
            held.append(Example(*(part[:room] for part in block)))
            block = Example(*(part[room:] for part in block))
            if count >= room:
                yield Example(*(np.concatenate(parts) for parts in zip(*held, strict=True)))
                held = []
    if held:
        yield Example(*(np.concatenate(parts) for parts in zip(*held, strict=True)))


# ---------------------------------------------------------------- reading


class ExampleStore:
    """Examples on disk.

    Attributes:
      spec: their shape.
      attributes: what was kept about them.
    """

    def __init__(self, folder: Path):
        """Opens the examples that `write_examples` left in `folder`. Raises BadInput where they are not whole."""
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.spec = _read_spec(manifest["spec"])
            self._size, files, self.attributes = int(manifest["size"]), dict(manifest["files"]), dict(manifest["attributes"])
            form = manifest["format"]
        except FileNotFoundError as error:
            raise BadInput(f"examples: expected {folder / MANIFEST}, but there is none: the data was not written to its end") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"examples: {folder / MANIFEST} is damaged: {error}") from error
        if form != FORMAT:
            raise BadInput(f"examples: {folder / MANIFEST}: expected format {FORMAT}, got {form}")
        for name, length in files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != length:
                came = "it is missing" if found is None else f"got {found}"
                raise BadInput(
                    f"examples: {_named(name, int(manifest['rows_per_file']), self._size)} in {path}: expected {length} bytes, {came}"
                )
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
        self._arrays: dict[str, ts.TensorStore] = {}
        for name, shape in _shapes(self.spec).items():
            if math.prod(shape):
                self._arrays[name] = _open(folder / name, (self._size, *shape), context)

    def __len__(self) -> int:
        return self._size

    def read(self, rows: np.ndarray | list[int] | slice) -> Example:
        """Examples of `rows`, `[n, ...]` float32, all read at once.

        Raises:
          BadInput: a row does not exist, or does not have the checksum it was written with.
        """
        rows = np.arange(self._size)[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= self._size):
            raise BadInput(f"examples in {self.folder}: expected rows from 0 to {self._size - 1}, got {rows.min()} to {rows.max()}")
        futures = {name: array[rows].read() for name, array in self._arrays.items()}
        parts = {name: np.zeros((len(rows), *shape), np.float32) for name, shape in _shapes(self.spec).items()}
        for name, future in futures.items():
            try:
                parts[name] = future.result()
            except ValueError as error:
                what = f"{self._culprit(name, rows)} is damaged: {_reason(error)}"
                raise BadInput(f"examples in {self.folder}: {what}; remove the folder to have it written again") from error
            if len(bad := _not_finite(parts[name])):
                raise BadInput(f"examples in {self.folder}: {name} of example {rows[bad[0]]} is missing")
        return Example(**parts)

    def _culprit(self, name: str, rows: np.ndarray) -> str:
        for row in rows:
            try:
                self._arrays[name][int(row)].read().result()
            except ValueError:
                return f"{name} of example {row}"
        return name


def _read_spec(spec: Mapping[str, Any]) -> Spec:
    return Spec(tuple(spec["grid"]), spec["channels"], spec["fields"], spec["scalars"], tuple(spec["periodic"]))


def _open(path: Path, shape: tuple[int, ...], context: ts.Context) -> ts.TensorStore:
    try:
        array = ts.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}},
            read=True,
            context=context,
            recheck_cached_data=False,
            recheck_cached_metadata=False,
        ).result()
    except ValueError as error:
        raise BadInput(f"examples: {path / 'zarr.json'} is damaged: {_reason(error)}") from error
    if array.shape != shape:
        raise BadInput(f"examples: array {path}: expected shape {shape}, got {array.shape}")
    return array


def _named(name: str, rows: int, size: int) -> str:
    """What the file `target/c/3/0/0/0` holds, in words."""
    parts = name.split("/")
    if len(parts) < 3 or parts[1] != "c":
        return "metadata"
    first = int(parts[2]) * rows
    return f"{parts[0]} of examples {first} to {min(first + rows, size) - 1}"


def _reason(error: ValueError) -> str:
    return str(error).split(" [")[0]


# ---------------------------------------------------------------- batches


def batches(
    store: ExampleStore, seed: int, batch: int, mesh: jax.sharding.Mesh, first_step: int = 0, ahead: int = 2
) -> Generator[Example, None, None]:
    """Global batches `[batch, ...]` on `mesh` for `first_step` and all steps after it, up to `ahead` of them read in advance.

    Each process reads only the rows its devices hold. An error while reading is raised here; closing the iterator stops the reading.
    """
    meshes.check_batch(mesh, batch)
    rows = meshes.process_rows(mesh, batch)
    ready: queue.Queue[Example | Exception] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def hand_over(item: Example | Exception) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        step = first_step
        try:
            while not closed.is_set():
                local = store.read(indices(seed, step, batch, len(store))[rows])
                hand_over(Example(*(meshes.place(rows, np.asarray(part), mesh, batch) for part in local)))
                step += 1
        except Exception as error:  # whatever it is, it belongs to the one who waits for the batch
            hand_over(error)

    reader = threading.Thread(target=work, name="batches", daemon=True)
    reader.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()
        reader.join()
