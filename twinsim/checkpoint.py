"""Saves pytrees of arrays and restores them, whole or not at all: the only home of orbax.

A step is a folder named by its number. Orbax writes the arrays; we add a manifest with a checksum of every leaf, taken where the values
were before they were written, and give the folder its name last. On the way back every leaf is summed again: a step that lost as much as
a bit is put aside, with the reason in its name, and the one before it is used.

The checksum is a sum over elements, so it is the same for every sharding, is taken on the devices and needs no gathering.
"""

import hashlib
import json
import logging
import math
import re
import shutil
import threading
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from orbax.checkpoint import v1 as ocp

from twinsim import files
from twinsim import mesh as meshes
from twinsim.base import BadInput
from twinsim.data import publish

FORMAT = "twinsim-checkpoint-1"
MANIFEST = "manifest.json"
ALONE = "state.npz"  # the arrays of a step that one process saved by itself
DENSEST = 100_000  # bytes that a byte on disk may stand for: zeros compress well
MORE_ROOM = "those before it are whole, and with more room the same command goes on"
SPARE = 1.05  # disk space asked for before a save, in sizes of the state

Report = Callable[[str], None]
Tree = Any

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells of every step of its work, and of errors that it hands on


class _Damaged(Exception):
    """A step cannot be used. `reason` becomes part of the folder's name."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


# ---------------------------------------------------------------- saving

_saving: dict[Path, "_Save"] = {}  # the one save at work in each folder


class _Save(threading.Thread):
    """Waits for orbax, then completes the step. Not a daemon: the program does not end before it."""

    def __init__(self, step: int, work: Callable[[], None]):
        super().__init__(name=f"checkpoint {step}")
        self.work = work
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.work()
        except Exception as error:  # handed to whoever waits in finish()
            self.error = error


def save(folder: Path, step: int, tree: Tree, *, keep: int = 3, wait: bool = False, alone: bool = False) -> None:
    """Saves `tree` as `step` in the background; its arrays may be donated as soon as this returns.

    A save is never skipped: one that is still at work in `folder` is waited for. Afterwards the `keep` newest steps remain.

    Args:
      tree: nested dicts, tuples and dataclasses of numpy or JAX arrays, random keys among them.
      alone: of several processes, only this one saves, and its own arrays; orbax would have all of them take part.

    Raises:
      BadInput: not enough room on the disk.
    """
    folder = folder.absolute()
    if keep < 1:
        raise BadInput(f"checkpoints in {folder}: expected to keep at least 1, got {keep}")
    finish(folder)
    leaves = _flatten(tree)
    needed = int(sum(leaf.nbytes for leaf in leaves.values()) * SPARE)
    unfinished = folder / f"{step}.saving"
    writes = alone or meshes.is_first()
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise BadInput(f"checkpoint {step} needs {needed / 2**20:.0f} MiB, but {folder} has {free / 2**20:.0f} MiB free; {MORE_ROOM}")
        for stale in folder.glob("*.saving"):  # of a run that was killed
            shutil.rmtree(stale)
    if not alone:
        meshes.wait_for_all(f"checkpoint {step}")
    sums = _checksums(leaves)
    written = _write_alone(unfinished, leaves) if alone else ocp.save_async(unfinished / "state", _with_values(leaves)).result
    described = {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": _hex(sums[path])} for path, leaf in leaves.items()}

    def complete() -> None:
        written()
        if writes:
            _complete(folder, step, unfinished, described, keep)

    _saving[folder] = thread = _Save(step, complete)
    thread.start()
    if wait:
        finish(folder)


def _with_values(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What orbax is given: it refuses arrays without elements, and trees without arrays."""
    return {path: leaf for path, leaf in leaves.items() if leaf.size} or {"": np.zeros(1)}


def _write_alone(unfinished: Path, leaves: Mapping[str, Any]) -> Callable[[], None]:
    host: dict[str, Any] = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    unfinished.mkdir()
    return lambda: np.savez(unfinished / ALONE, **host)


def _complete(folder: Path, step: int, unfinished: Path, leaves: Mapping[str, Any], keep: int) -> None:
    written = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in sorted(unfinished.rglob("*")) if path.is_file()}
    manifest = {"format": FORMAT, "step": step, "digest": _digest(leaves), "leaves": leaves, "files": written}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if (folder / str(step)).exists():  # saved before, then trained again from an earlier step
        _put_aside(folder / str(step), "replaced")
    publish(unfinished, folder / str(step))
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / str(old))


def finish(folder: Path | None = None) -> None:
    """Waits for the save at work in `folder`, or in all folders, and raises its error where it failed; BadInput where the disk did."""
    for one in [folder.absolute()] if folder is not None else list(_saving):
        if thread := _saving.pop(one, None):
            thread.join()
            if thread.error is not None and files.unusable(thread.error):
                said = " ".join(str(thread.error).split())
                raise BadInput(f"{thread.name} in {one} was not written ({said}); {MORE_ROOM}") from thread.error
            if thread.error is not None:
                raise thread.error


# ---------------------------------------------------------------- restoring


def steps(folder: Path) -> list[int]:
    """The steps saved in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch(r"\d+", path.name) and path.is_dir())


def restore(folder: Path, like: Tree, step: int | None = None, report: Report = warnings.warn) -> tuple[int, Tree]:
    """The newest whole step, or `step`, with the structure, types and shardings of `like`.

    A damaged step is renamed `STEP.quarantined-REASON` and reported in one line, and the one before it is tried.

    Args:
      like: a pytree of arrays or of `jax.ShapeDtypeStruct` with shardings; numpy arrays come back as numpy arrays.

    Raises:
      BadInput: there is no whole step, or it holds something else than `like`.
    """
    targets = _flatten(like)

    def load(path: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
        _compare(path, leaves, targets)
        return _load(path, leaves, targets)

    found, values = _newest(folder, step, report, load)
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    restored = [_wrap(values[_pointer(path)], leaf) for path, leaf in paths]
    return found, jax.tree.unflatten(treedef, restored)


def restore_raw(folder: Path, step: int | None = None, report: Report = warnings.warn) -> tuple[int, dict[str, Any]]:
    """As `restore`, without knowing what was saved: nested dicts of numpy arrays. Each process reads on its own.

    Keys come back as text, and tuples and lists as dicts by position; a random key comes back as its bits.
    """

    def load(path: Path, leaves: Mapping[str, Any]) -> dict[str, Any]:
        targets = {name: np.empty(tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])) for name, leaf in leaves.items()}
        return _load(path, leaves, targets)

    found, values = _newest(folder, step, report, load, alone=True)
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = [key.replace("~1", "/").replace("~0", "~") for key in name.split("/")]
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return found, tree


def fingerprint(folder: Path, step: int) -> str:
    """16 hexadecimal digits that change with any value saved in `step`, the same for every sharding."""
    try:
        return _digest(_manifest(folder / str(step))["leaves"])[:16]
    except _Damaged as error:
        raise BadInput(f"checkpoint {folder / str(step)}: {error}") from error


def nonfinite(tree: Tree) -> list[str]:
    """The paths of the leaves that hold NaN or infinity."""
    leaves = {path: leaf for path, leaf in _flatten(tree).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    facts = _of_each(leaves, _finite_on_devices, lambda leaf: np.isfinite(leaf).all())
    return [path for path, fact in facts.items() if not bool(fact)]


@jax.jit
def _finite_on_devices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: jnp.isfinite(leaf).all() for path, leaf in leaves.items()}


def _of_each(
    leaves: Mapping[str, Any], on_devices: Callable[[dict[str, jax.Array]], dict[str, jax.Array]], on_host: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    """A fact of each leaf: of all that lie on devices by one program, since several at once may come to a standstill between processes."""
    placed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, jax.Array)}
    facts = jax.device_get(on_devices(placed)) if placed else {}
    return {path: facts[path] if path in facts else on_host(leaf) for path, leaf in leaves.items()}


def _newest(
    folder: Path, step: int | None, report: Report, load: Callable[[Path, Mapping[str, Any]], dict[str, Any]], alone: bool = False
) -> tuple[int, dict[str, Any]]:
    finish(folder)
    if not alone:
        meshes.wait_for_all(f"saves in {folder} finished")
    candidates = [step] if step is not None else steps(folder)[::-1]
    if not candidates or (step is not None and not (folder / str(step)).is_dir()):
        raise BadInput(f"checkpoints: expected {'a step' if step is None else f'step {step}'} in {folder}, but there is none")
    for number in candidates:
        path = folder.absolute() / str(number)
        trouble, values = None, {}
        try:
            values = load(path, _manifest(path)["leaves"])
        except _Damaged as error:
            trouble = error
        if trouble is None if alone else meshes.all_agree(trouble is None):
            return number, values
        trouble = trouble or _Damaged("elsewhere", "another process could not read it")
        if alone or meshes.is_first():
            report(f"checkpoint {path} is damaged and not used: {trouble}; {_put_aside(path, trouble.reason)}")
        if not alone:
            meshes.wait_for_all(f"{path} put aside")
    raise BadInput(f"checkpoints: no whole step is left in {folder}; damaged ones are kept there as *.quarantined-*")


def _put_aside(path: Path, reason: str) -> str:
    """Renames a step so that it is not used again; says what became of it."""
    aside = path.with_name(f"{path.name}.quarantined-{reason}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        path.rename(aside)
    except OSError as error:
        return f"it could not be renamed ({error.strerror})"
    return f"it is kept as {aside.name}"


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["digest"] != _digest(manifest["leaves"]):
            raise _Damaged("manifest", f"{MANIFEST} does not match its own digest")
        lengths = {str(name): int(length) for name, length in manifest["files"].items()}
        declared = sum(_declared(leaf) for leaf in manifest["leaves"].values())
        if declared > (most := DENSEST * sum(lengths.values())):
            raise _Damaged("manifest", f"{MANIFEST} declares arrays of {declared} bytes, of which its files can hold {most}")
    except FileNotFoundError as error:
        raise _Damaged("manifest", f"{MANIFEST} is missing") from error
    except (AttributeError, OSError, RecursionError, ValueError, KeyError, TypeError) as error:
        raise _Damaged("manifest", f"{MANIFEST} cannot be read ({error})") from error
    for name, length in lengths.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found is None:
            raise _Damaged("missing", f"file {name} is missing")
        if found != length:
            raise _Damaged("truncated", f"file {name} has {found} bytes instead of {length}")
    return manifest


def _declared(leaf: Mapping[str, Any]) -> int:
    """Bytes of a leaf as the manifest describes it. Raises ValueError or TypeError for what no array has."""
    if not all(type(size) is int and size >= 0 for size in leaf["shape"]):
        raise ValueError(f"shape {leaf['shape']!r}")
    if (dtype := jnp.dtype(leaf["dtype"])).hasobject:
        raise ValueError(f"type {dtype}")
    return math.prod(leaf["shape"]) * dtype.itemsize


def _compare(path: Path, leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    if different := sorted(set(leaves) ^ set(targets)):
        name = different[0]
        held, wanted = ("it holds", "is not asked for") if name in leaves else ("it lacks", "is asked for")
        raise BadInput(
            f"checkpoint {path}: {held} {name}, which {wanted}; {len(different)} of {len(targets)} leaves differ: was the model changed?"
        )
    for name, leaf in targets.items():
        saved = (tuple(leaves[name]["shape"]), leaves[name]["dtype"])
        if saved != (tuple(leaf.shape), str(leaf.dtype)):
            raise BadInput(f"checkpoint {path}: {name}: expected {str(leaf.dtype)}{list(leaf.shape)}, got {saved[1]}{list(saved[0])}")


def _load(path: Path, leaves: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    try:
        if (path / ALONE).exists():
            _check_sizes(path / ALONE, targets)
            with np.load(path / ALONE, allow_pickle=False) as arrays:
                values = {name: arrays[name] for name in targets}
        else:
            values = ocp.load(path / "state", _with_values(targets))
    except jax.errors.JaxRuntimeError:  # the devices' trouble, not the file's
        raise
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _Damaged("unreadable", f"its arrays cannot be read ({str(error).splitlines()[0][:200]})") from error
    values = {name: values[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype) for name, leaf in targets.items()}
    sums = _checksums(values)
    if bad := [name for name in targets if _hex(sums[name]) != leaves[name]["checksum"]]:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise _Damaged("checksum", f"{bad[0]}{others} differs from its checksum")
    return values


def _check_sizes(file: Path, targets: Mapping[str, Any]) -> None:
    """Raises ValueError where an array in an archive is not of the size that is asked for: numpy makes room before it reads."""
    with zipfile.ZipFile(file) as archive:
        for name, leaf in targets.items():
            with archive.open(f"{name}.npy") as member:
                np.lib.format.read_magic(member)
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if math.prod(shape) * dtype.itemsize != leaf.size * leaf.dtype.itemsize:
                raise ValueError(f"{name} has {math.prod(shape) * dtype.itemsize} bytes")


# ---------------------------------------------------------------- leaves


def _flatten(tree: Tree) -> dict[str, Any]:
    """The leaves by path; random keys as their bits."""
    return {_pointer(path): _bits(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _pointer(path: Any) -> str:
    """A path in which a slash inside a key is told from one between keys (RFC 6901)."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def _bits(path: Any, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        if isinstance(leaf, jax.Array):
            return jax.random.key_data(leaf)
        shape = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=leaf.sharding)
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufcV" or array.dtype == object:
        raise BadInput(f"checkpoint: {_pointer(path)}: expected an array of numbers, got {type(leaf).__name__}")
    return array


def _wrap(value: Any, like: Any) -> Any:
    """`value` as the kind of leaf that `like` is."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
        return value
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return value if value.size else jnp.zeros(like.shape, like.dtype, device=like.sharding)


def _digest(leaves: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- checksums


def _checksums(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Two 32-bit sums over the elements of each leaf, each scrambled together with its place: `[2]` uint32.

    The scrambling is a bijection of each word, so a single changed word always changes both sums.
    """
    return _of_each(leaves, _sums_on_devices, _sum_on_host)


def _sum_on_host(leaf: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(leaf)
    width = min(words.itemsize, 4)
    words = words.reshape(-1).view(f"u{width}")
    sums = np.zeros(2, np.uint32)
    for first in range(0, words.size, BLOCK):
        part = words[first : first + BLOCK].astype(np.uint32)
        place = np.arange(first, first + part.size, dtype=np.uint64).astype(np.uint32)
        sums += np.stack([_scramble(part ^ _scramble(place + salt)).sum(dtype=np.uint32) for salt in _SALTS])
    return sums


BLOCK = 1 << 14  # words that the host sums at a time: what they become on the way stays in the processor's cache
_SALTS = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))


@jax.jit
def _sums_on_devices(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {path: _sum_on_device(leaf) for path, leaf in leaves.items()}


@jax.jit  # traced once for all leaves of a shape
def _sum_on_device(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        leaf = leaf.astype(jnp.uint8)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
    words = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)  # built axis by axis: the partitioner keeps it where the words are
    stride = 1
    for axis in reversed(range(words.ndim)):
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.stack([_scramble(words ^ _scramble(place + salt)).sum(dtype=jnp.uint32) for salt in _SALTS])


def _scramble(x: Any) -> Any:
    """A bijection of 32-bit words, for numpy and JAX alike. Source: MurmurHash3 finaliser (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _hex(sums: Any) -> str:
    first, second = (int(value) for value in np.asarray(sums))
    return f"{first:08x}{second:08x}"
