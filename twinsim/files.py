"""Files and folders that appear whole or not at all, made by one process at a time, and the Zarr stores among them."""

import contextlib
import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from twinsim import mesh
from twinsim.base import BadInput
from twinsim.data import publish

CHUNK_ITEMS = 64  # along the item axis


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name when the block ends well; one that was broken off is gone on with.

    All processes of a run write into the same one.
    """
    unfinished = folder.with_name(folder.name + ".partial")
    unfinished.mkdir(parents=True, exist_ok=True)
    yield unfinished
    mesh.wait_for_all(f"{unfinished} written")
    with mesh.first_leads():
        if mesh.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            publish(unfinished, folder)


def write_text(path: Path, text: str) -> None:
    """A small file, written whole or not at all."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


@contextmanager
def alone(folder: Path, tell: Callable[[str], None] = lambda sentence: None) -> Iterator[None]:
    """Lets one run at a time make `folder`: jobs of a sweep share data and models. The lock ends with its process.

    Of the processes of a run, the first takes the lock, and all enter the block together.
    """
    with _locked(folder, tell) if mesh.is_first() else contextlib.nullcontext():
        mesh.wait_for_all(f"{folder} is ours")
        yield


@contextmanager
def _locked(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        # ENOLCK and the like: a file system without locks is worked on without them
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another process makes {folder}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_zarr(part: Callable[[range], xr.Dataset], members: int, at_once: int, path: Path) -> xr.Dataset:
    """A Zarr v3 store whose chunks carry a CRC32C, so that a flipped bit is an error and not a value; `at_once` members at a time.

    The files are the same for every `at_once`, which is as much as is held in memory.

    Args:
      part: the answer of some members; what depends on the member, beside its number, is a variable and no coordinate.

    Returns:
      The whole answer, coordinates in memory, the variables read where they are looked at.
    """
    some = [range(first, min(first + at_once, members)) for first in range(0, members, at_once)]
    first = part(some[0])
    texts = [name for name, values in first.variables.items() if values.dtype.kind == "U"]  # Zarr v3 has no type for a fixed length
    encoding = {
        name: {
            "chunks": tuple(
                1 if dim == "member" else min(size, CHUNK_ITEMS) if dim == first[name].dims[1] else size
                for dim, size in first[name].sizes.items()
            ),
            "serializer": BytesCodec(),
            "compressors": [ZstdCodec(level=3), Crc32cCodec()],
        }
        for name in first.data_vars
    }
    stored = first.assign_coords({name: first[name].astype(object) for name in texts})
    stored.to_zarr(path, mode="w", zarr_format=3, encoding=encoding, consolidated=False)
    whole = first.drop_vars(["member", *first.data_vars])
    whole = whole.assign_coords(member=("member", np.arange(members), first["member"].attrs))
    attrs = {name: values.attrs for name, values in first.data_vars.items()}
    del first, stored
    if len(some) > 1:  # room for the others
        shutil.rmtree(path / "member")
        whole[["member"]].reset_coords(drop=True).to_zarr(path, mode="a", zarr_format=3, consolidated=False)
        for name in attrs:
            array = zarr.open_array(path / str(name), mode="r+")
            array.resize((members, *array.shape[1:]))
    for these in some[1:]:
        region = {"member": slice(these.start, these.stop)}
        part(these).drop_vars(whole.coords).to_zarr(path, region=region, zarr_format=3, consolidated=False)
    with warnings.catch_warnings(action="ignore"):  # Zarr v3 does not name consolidated metadata yet, but xarray and zarr read it
        zarr.consolidate_metadata(path)
    lazy = xr.open_dataset(path, engine="zarr", consolidated=False, chunks=None, cache=False, decode_timedelta=False)
    return whole.assign({name: lazy[name].assign_attrs(attrs[name]).variable for name in attrs}).drop_encoding()


def check_room(place: Path, disk: int, memory: int, what: str) -> None:
    """Refuses before it begins what the disk or the memory cannot hold; sizes in bytes. Raises BadInput."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if disk > free:
        raise BadInput(f"{what} needs about {_size(disk)} in {place}, {_size(free)} are free")
    available = memory_available()
    if available is not None and memory > available:
        raise BadInput(f"{what} needs about {_size(memory)} of memory, {_size(available)} are available")


def memory_available() -> int | None:
    """Bytes that this machine can still give without swapping; None where it does not say."""
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def unusable(error: BaseException) -> bool:
    """Whether an error comes from the disk or its permissions, which a user can mend."""
    mended = (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.EMFILE, errno.ELOOP),
    )
    text = str(error)
    codes = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return (isinstance(error, OSError) and error.errno in mended) or any(code in text for code in codes)
