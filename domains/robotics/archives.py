"""Archives of arrays from outside, .npz, read as data alone."""

import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from twinsim.base import BadInput

MAX_BYTES = 200_000_000
BROKEN = (OSError, ValueError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


def read(path: Path, what: str, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays of `what`, "an .npz of tosses", by name. Raises BadInput where it is too large, unpacked too, or lacks a `needed` one."""
    if not path.is_file():
        raise BadInput(f"{path}: expected {what}, found {'a folder' if path.is_dir() else 'nothing'}")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path}: expected at most {MAX_BYTES / 1e6:g} MB, got {path.stat().st_size / 1e6:.0f} MB")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(each.file_size for each in archive.infolist())
        if unpacked > MAX_BYTES:
            raise BadInput(f"{path}: expected at most {MAX_BYTES / 1e6:g} MB unpacked, got {unpacked / 1e6:.0f} MB")
        with np.load(path, allow_pickle=False) as kept:
            arrays = {name: np.asarray(kept[name]) for name in kept.files}
    except BROKEN as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(f"{path}: expected {what}, of plain arrays, could not read it: {said}") from None
    if absent := [name for name in needed if name not in arrays]:
        raise BadInput(f"{path}: expected the arrays {', '.join(needed)}, {absent[0]} is missing")
    return arrays
