"""Draws members of a question in tiles, checks each draw, and streams them to Zarr so that a killed run goes on where it was.

Every draw has its own random key, made from the seed, the member and the item alone, and is computed in a tile of fixed
size; batches, devices and restarts only decide when and where a tile is computed. So the members are always the same.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import zarr
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from zarr.codecs import BytesCodec, Crc32cCodec

from twinsim import files, mesh
from twinsim.base import Array, BadInput, Condition, Constraint, Domain, Generator, Propose, Sample, Statistics, Target

DAMAGED = (EOFError, KeyError, OSError, RuntimeError, TypeError, ValueError)  # what zarr raises for a chunk or metadata cut or flipped


@dataclass(frozen=True)
class Settings:
    """How draws are made.

    Attributes:
      tile: draws computed together; part of what is drawn, so change it and last bits change.
      batch: draws held in memory at once, rounded up to whole tiles a device.
      attempts: a draw that misses what the question imposes, or that was driven by it to break a physical rule, is drawn again, with
        a new key, up to this often.
    """

    tile: int = 8
    batch: int = 64
    attempts: int = 4

    def __post_init__(self) -> None:
        if self.tile < 1 or self.batch < 1 or self.attempts < 1:
            raise BadInput(f"generate: expected tile, batch and attempts of at least 1, got {self.tile}, {self.batch}, {self.attempts}")


Constrain = Callable[[Callable[[Target], Sample], Condition], Sequence[Constraint]]
Misses = Callable[[Sample, Condition], Array]  # how far a sample is from what the question imposes; 0 = holds
Unroll = Callable[[Propose, Condition, Array], Sample]
Drawn = tuple[Sample, Mapping[str, Array]]  # what a draw comes to, and how far it breaks each rule
SIMULATE = 0x73696D  # the key of a simulation, apart from those of the attempts, which count from 0
IMPOSED = "what the scenario imposes"


def make_sampler(
    domain: Domain,
    generator: Callable[[Any], Generator],
    mesh: Mesh,
    constrain: Constrain | None = None,
    misses: Misses | None = None,
    attempts: int = 1,
    unroll: Unroll | None = None,
) -> Callable[..., tuple[Sample, Mapping[str, Array]]]:
    """A compiled `(params, statistics, keys [tile, draw], condition [tile, draw, ...]) -> (samples, broken rules)`.

    Tiles are spread over all devices of the mesh; inside a device they are computed one after the other, without any
    communication.
    """

    def draw(params: Any, statistics: Statistics, key: Array, condition: Condition) -> Drawn:
        model = generator(params)

        def propose(condition: Condition, key: Array) -> Sample:
            fields, scalars = domain.encode(statistics, condition)

            def decode(target: Target) -> Sample:
                return domain.decode(statistics, target, condition)

            target = model.sample(fields, scalars, key, constrain(decode, condition) if constrain else ())
            finite = jnp.isfinite(target).all()  # a domain's bounds could make a plausible number of what is none
            return {name: jnp.where(finite, values, jnp.nan) for name, values in decode(target).items()}

        def attempt(number: jax.Array) -> Drawn:
            own = jax.random.fold_in(key, number)
            if unroll:
                outcome = unroll(propose, condition, own)
            else:
                simulating = jax.random.fold_in(jax.random.fold_in(key, SIMULATE), number)
                outcome = domain.simulate(propose(condition, own), condition, simulating)
            broken = dict(domain.check(outcome, condition))
            if misses is not None:
                broken[IMPOSED] = misses(outcome, condition)
            return outcome, broken

        def again(carry: tuple[jax.Array, Drawn]) -> tuple[jax.Array, Drawn]:
            number, _ = carry
            return number + 1, attempt(number)

        def unmet(carry: tuple[jax.Array, Drawn]) -> Array:
            number, (_, broken) = carry
            return (number < attempts) & ~(functools.reduce(jnp.maximum, broken.values()) <= 0)  # NaN is no rule kept

        drawn = attempt(jnp.asarray(0))
        if misses is None or attempts == 1:
            return drawn
        return jax.lax.while_loop(unmet, again, (jnp.asarray(1), drawn))[1]

    def tiles(params: Any, statistics: Statistics, keys: Array, condition: Condition) -> Drawn:
        one_tile = jax.vmap(draw, in_axes=(None, None, 0, 0))
        return jax.lax.map(lambda inputs: one_tile(params, statistics, *inputs), (keys, condition))

    spread = P(mesh.axis_names)
    return jax.jit(
        jax.shard_map(tiles, mesh=mesh, in_specs=(P(), P(), spread, spread), out_specs=(spread, spread), check_vma=False),
        in_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P()), NamedSharding(mesh, spread), NamedSharding(mesh, spread)),
    )


def draw_keys(seed: int, members: np.ndarray, items: np.ndarray) -> Array:
    """One key a draw, from the seed, its member and its item alone."""
    base = jax.random.fold_in(jax.random.key(seed), 0x67656E)  # apart from the keys that training uses
    return jax.vmap(lambda m, i: jax.random.fold_in(jax.random.fold_in(base, m), i))(jnp.asarray(members), jnp.asarray(items))


@dataclass(frozen=True)
class Block:
    """A rectangle of draws that is computed and written at once, and is one Zarr chunk."""

    members: range
    items: range

    @property
    def name(self) -> str:
        return f"{self.members.start}-{self.members.stop}:{self.items.start}-{self.items.stop}"

    @property
    def size(self) -> int:
        return len(self.members) * len(self.items)

    def draws(self) -> tuple[np.ndarray, np.ndarray]:
        """Member and item of each draw, flat."""
        member, item = np.meshgrid(np.asarray(self.members), np.asarray(self.items), indexing="ij")
        return member.ravel(), item.ravel()


def blocks(members: int, items: int, batch: int) -> Iterator[Block]:
    """All draws, in rectangles of at most about `batch`."""
    wide = min(items, batch)
    high = max(1, min(members, batch // wide))
    for first_member in range(0, members, high):
        for first_item in range(0, items, wide):
            yield Block(
                range(first_member, min(first_member + high, members)),
                range(first_item, min(first_item + wide, items)),
            )


def compute(
    sampler: Callable[..., tuple[Sample, Mapping[str, Array]]],
    params: Any,
    statistics: Statistics,
    condition: Condition,
    block: Block,
    seed: int,
    tile: int,
    devices: Mesh,
) -> tuple[Sample, Mapping[str, np.ndarray]]:
    """The draws of one block, `[member, item, ...]`. Raises FloatingPointError where a value is not finite."""
    member, item = block.draws()
    count = len(member)
    padded = -(-count // (tile * devices.size)) * tile * devices.size
    fill = np.resize(np.arange(count), padded)  # the last tile is filled with draws that are thrown away

    def tiled(values: Array) -> Array:
        return jax.device_put(values[fill].reshape(padded // tile, tile, *values.shape[1:]), NamedSharding(devices, P(devices.axis_names)))

    keys = tiled(draw_keys(seed, member, item))
    chosen = {name: tiled(np.asarray(values)[item]) for name, values in condition.items()}
    samples, broken = jax.device_get(sampler(params, statistics, keys, chosen))

    def untiled(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(padded, *values.shape[2:])[:count]
        return flat.reshape(len(block.members), len(block.items), *flat.shape[1:])

    samples, broken = {k: untiled(v) for k, v in samples.items()}, {k: untiled(v) for k, v in broken.items()}
    for name, values in samples.items():
        if not np.isfinite(values).all():
            raise FloatingPointError(f"generate: {name} is not finite in draws {block.name} (members:items); nothing of them was written")
    return samples, broken


def stream(
    store: Path,
    draw: Callable[[Block], tuple[Sample, Mapping[str, np.ndarray]]],
    members: int,
    items: int,
    batch: int,
    identity: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda sentence: None,
) -> tuple[Sample, Mapping[str, np.ndarray]]:
    """Draws every block that is not yet in `store`, and returns all, memory-mapped by Zarr.

    A block counts as done when its line is in a journal, which is written after the block's chunks. `identity` names
    what is drawn; a store begun for something else is started over. `stop` is called before each block and may raise.
    What was drawn before is read first: blocks of which a chunk is damaged are drawn again, and `report` is told.
    Several processes share the blocks, each with a journal of its own; the first of them draws the first block, which
    makes the arrays.

    Returns:
      samples `[member, item, ...]` and broken rules `[member, item]` as Zarr arrays.
    """
    every = list(blocks(members, items, batch))

    def write(block: Block) -> None:
        group = zarr.open_group(store / "arrays", mode="a")
        for kind, values in zip(("sample", "rule"), draw(block), strict=True):
            for name, array in values.items():
                chunk = (every[0].members.stop, every[0].items.stop, *array.shape[2:])
                leaf = name.encode().hex() if kind == "rule" else name  # a rule's name is a sentence, not a file name
                stored = _array(group.require_group(kind), leaf, (members, items, *array.shape[2:]), chunk, array.dtype)
                stored[block.members.start : block.members.stop, block.items.start : block.items.stop] = array
                _flush(store / "arrays" / stored.path, stored.chunks, block)
        _note(store / journal_name(mesh.process()), identity, block)

    with mesh.first_leads():
        done = _done_before(store, identity, every[0], report)
        if not done:
            store.mkdir(parents=True, exist_ok=True)
            stop()
            write(every[0])
            done = {every[0].name}
    left = [block for block in every if block.name not in done]
    drawn = members * items - sum(block.size for block in left)
    count = mesh.processes()
    for first in range(0, len(left), count):  # every process asks before each round whether to stop
        stop()
        together = left[first : first + count]
        for block in together[mesh.process() :][:1]:
            write(block)
        if not first:  # whoever found the program compiled does not run ahead of the others, who would have to catch up before they leave
            mesh.wait_for_all(f"{store} begun")
        drawn += sum(block.size for block in together)
        progress(drawn, members * items)
    mesh.wait_for_all(f"{store} drawn")
    group = zarr.open_group(store / "arrays", mode="r")
    samples: dict[str, Any] = dict(sorted(_arrays(group, "sample")))
    rules = {bytes.fromhex(name).decode(): np.asarray(array[...]) for name, array in sorted(_arrays(group, "rule"))}
    return samples, rules


def journal_name(process: int | str) -> str:
    """The file in which a process notes the blocks that it has drawn; "*" for all of them."""
    return f"journal-{process}.jsonl"


def _note(journal: Path, identity: str, block: Block) -> None:
    """Adds a line to a journal, which tells first what is drawn."""
    with journal.open("ab") as lines:
        if not lines.tell():
            lines.write(json.dumps({"identity": identity}).encode() + b"\n")
        lines.write(json.dumps({"block": block.name}).encode() + b"\n")
        lines.flush()
        os.fsync(lines.fileno())


def _done_before(store: Path, identity: str, first: Block, report: Callable[[str], None]) -> set[str]:
    """The blocks in `store` that can be read back.

    The first process makes the store fit to go on with: it cuts off the line that a kill tore, and removes a store of something
    else, or without a journal.
    """
    journals = {journal: _read_journal(journal, identity) for journal in store.glob(journal_name("*"))}
    done = {name for names, _ in journals.values() for name in names}
    if not mesh.is_first():
        return done
    if done:
        for journal, (_, whole) in journals.items():
            os.truncate(journal, whole)
        return _without_damage(store, done, identity, first, report)
    if store.exists():
        shutil.rmtree(store)
    return set()


def _arrays(group: zarr.Group, kind: str) -> Iterator[tuple[str, zarr.Array]]:
    inner = group.get(kind)
    yield from inner.arrays() if isinstance(inner, zarr.Group) else ()


def _array(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> zarr.Array:
    if isinstance(found := group.get(name), zarr.Array):
        return found
    return group.create_array(name, shape=shape, chunks=chunks, dtype=dtype, serializer=BytesCodec(), compressors=[Crc32cCodec()])


def _without_damage(store: Path, done: set[str], identity: str, first: Block, report: Callable[[str], None]) -> set[str]:
    """The blocks of `done` that can be read back; what is damaged is removed, all of it where the arrays do not open.

    So is what several processes could not share: where a chunk is not the block that one of them writes, they would write it together.
    """
    try:
        arrays = [array for _, group in zarr.open_group(store / "arrays", mode="r").groups() for _, array in group.arrays()]
    except DAMAGED as error:
        report(f"{store / 'arrays'}: the draws made before are damaged ({type(error).__name__}); drawing all of them again")
        shutil.rmtree(store)
        return set()
    if mesh.processes() > 1 and any(array.chunks[:2] != (first.members.stop, first.items.stop) for array in arrays):
        report(f"{store}: begun with another generate.batch, which several processes cannot go on with; drawing all of it again")
        shutil.rmtree(store)
        return set()
    damaged: list[Path] = []
    lost: set[str] = set()
    for array in arrays:
        for file, part in damaged_chunks(array):
            damaged.append(store / "arrays" / file)
            lost |= {name for name in done if _overlaps(name, part[0], part[1])}
    if not damaged:
        return done
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    report(f"{damaged[0]}{more}: damaged; drawing {', '.join(sorted(lost)) or 'nothing'} (members:items) again")
    kept = done - lost
    entries = [{"identity": identity}, *({"block": name} for name in sorted(kept))] if kept else []
    rewritten = store / journal_name(0)
    files.write_text(rewritten, "".join(json.dumps(entry) + "\n" for entry in entries))  # first: a chunk that is absent reads as zeros
    for path in [*(path for path in store.glob(journal_name("*")) if path != rewritten), *damaged]:
        path.unlink(missing_ok=True)
    return kept


def damaged_chunks(array: zarr.Array) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Every chunk that cannot be read back: its file, seen from the store, and the part of the array that it holds."""
    for place in np.ndindex(*(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks, strict=True))):
        part = tuple(slice(index * chunk, (index + 1) * chunk) for index, chunk in zip(place, array.chunks, strict=True))
        try:
            array[part]
        except DAMAGED:
            yield "/".join([array.path, "c", *map(str, place)]), part


def _overlaps(block: str, members: slice, items: slice) -> bool:
    """Whether a block of the journal has draws in a rectangle; one whose name is not readable may have."""
    found = re.fullmatch(r"(\d+)-(\d+):(\d+)-(\d+)", block)
    if found is None:
        return True
    first, last, start, stop = map(int, found.groups())
    return first < members.stop and members.start < last and start < items.stop and items.start < stop


def _flush(folder: Path, chunks: tuple[int, ...], block: Block) -> None:
    """Puts the chunks of a block on the disk: the journal must not be there before them."""
    for member in range(block.members.start // chunks[0], -(-block.members.stop // chunks[0])):
        for item in range(block.items.start // chunks[1], -(-block.items.stop // chunks[1])):
            path = Path(folder, "c", str(member), str(item), *("0" for _ in chunks[2:]))
            if path.exists():  # a chunk of zeros, the fill value, is not stored
                with path.open("rb") as file:
                    os.fsync(file.fileno())


def _read_journal(journal: Path, identity: str) -> tuple[set[str], int]:
    """Names of the blocks that are done, and up to which byte the journal is whole.

    No block where the journal belongs to something else. Nothing after a torn line counts.
    """
    if not journal.exists():
        return set(), 0
    done: set[str] = set()
    whole = 0
    for number, line in enumerate(journal.read_bytes().splitlines(keepends=True)):
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            break
        name = entry.get("identity" if number == 0 else "block") if isinstance(entry, dict) else None
        if not isinstance(name, str) or (number == 0 and name != identity):
            break
        if number:
            done.add(name)
        whole += len(line)
    return done, whole
