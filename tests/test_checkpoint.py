"""What is saved comes back bit for bit on any mesh; what is damaged is put aside and the step before it is used."""

import json
import shutil
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from twinsim import checkpoint
from twinsim import mesh as meshes
from twinsim.base import BadInput


def tree(step=0, sizes=None):
    mesh = meshes.make_mesh(sizes or {"data": 2, "fsdp": 4})
    draw = np.random.default_rng(step)
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {
        "params": {"dense": {"kernel": jax.device_put(draw.normal(size=(64, 32)).astype(np.float32), split)}},
        "opt": (
            jax.device_put(jnp.int32(step), meshes.replicated(mesh)),
            [jax.device_put(draw.normal(size=8).astype(jnp.bfloat16), split)],
        ),
        "key": jax.device_put(jax.random.key(step), meshes.replicated(mesh)),
    }


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    bits = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(bits(left)), np.asarray(bits(right)))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Steps 1, 2 and 3, saved once and copied by each test."""
    folder = tmp_path_factory.mktemp("three")
    for step in (1, 2, 3):
        checkpoint.save(folder, step, tree(step))
    checkpoint.finish(folder)
    return folder


@pytest.fixture
def folder(three, tmp_path):
    return shutil.copytree(three, tmp_path / "checkpoints")


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 8}, {"data": 1, "fsdp": 8}])
def test_state_comes_back_on_any_mesh(folder, sizes):
    like = tree(0, sizes)
    step, restored = checkpoint.restore(folder, like)
    assert step == 3
    same(restored, tree(3))
    for leaf, wished in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(wished.sharding, leaf.ndim)


def test_shapes_alone_are_enough(folder):
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree())
    same(checkpoint.restore(folder, like, step=2)[1], tree(2))


def test_unknown_structure_comes_back_as_dicts(tmp_path):
    statistics = {
        "mean": {"tas": np.arange(6.0).reshape(2, 3), "a/b~c": np.float32(2.5)},
        "months": np.arange(12),
        "wet": np.array([True, False]),
        "none": np.zeros((0, 4), np.float32),
        "pair": (np.ones(2), 7),
        "nothing": {},
    }
    checkpoint.save(tmp_path, 0, statistics, wait=True)
    step, restored = checkpoint.restore_raw(tmp_path)
    assert step == 0
    expected = statistics | {"pair": {"0": np.ones(2), "1": np.array(7)}}
    del expected["nothing"]
    same(restored, jax.tree.map(np.asarray, expected))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    same(checkpoint.restore(tmp_path, statistics)[1]["mean"], jax.tree.map(np.asarray, statistics["mean"]))


def test_donated_right_after_saving(tmp_path):
    clear = jax.jit(lambda x: x * 0.0, donate_argnums=0)
    x = jnp.arange(1_000_000, dtype=jnp.float32)
    checkpoint.save(tmp_path, 1, {"x": x})
    for _ in range(3):
        x = clear(x)
    np.testing.assert_array_equal(checkpoint.restore_raw(tmp_path)[1]["x"], np.arange(1_000_000, dtype=np.float32))


def test_no_save_is_skipped_and_the_newest_are_kept(tmp_path):
    for step in range(5):  # faster than they are written
        checkpoint.save(tmp_path, step, tree(step), keep=2)
    checkpoint.finish(tmp_path)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]
    same(checkpoint.restore(tmp_path, tree())[1], tree(4))


def test_step_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": np.zeros(3)})
    checkpoint.save(tmp_path, 1, {"x": np.ones(3)}, wait=True)
    np.testing.assert_array_equal(checkpoint.restore_raw(tmp_path)[1]["x"], np.ones(3))


def test_fingerprint_tells_values_not_shardings(folder, tmp_path):
    checkpoint.save(tmp_path / "other", 3, tree(3, {"data": 8}), wait=True)
    prints = [checkpoint.fingerprint(folder, step) for step in (1, 2, 3)]
    assert len(set(prints)) == 3 and all(len(text) == 16 for text in prints)
    assert checkpoint.fingerprint(tmp_path / "other", 3) == prints[2]


# ---------------------------------------------------------------- damage


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"), key=lambda path: path.stat().st_size)


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "bit in the middle of the data": (lambda step: flip(largest(step), 0.5), "checksum|unreadable"),
    "bit early in the data": (lambda step: flip(largest(step), 0.1), "checksum|unreadable"),
    "truncated data": (lambda step: largest(step).write_bytes(largest(step).read_bytes()[:100]), "truncated"),
    "empty data": (lambda step: largest(step).write_bytes(b""), "truncated"),
    "missing data": (lambda step: largest(step).unlink(), "missing"),
    "missing metadata": (lambda step: (step / "state" / "state" / "_METADATA").unlink(), "missing"),
    "bit in the metadata": (lambda step: flip(step / "state" / "state" / "manifest.ocdbt", 0.5), "unreadable|checksum"),
    "missing manifest": (lambda step: (step / "manifest.json").unlink(), "manifest"),
    "garbled manifest": (lambda step: (step / "manifest.json").write_text("{"), "manifest"),
    "changed checksum": (
        lambda step: (step / "manifest.json").write_text(
            (step / "manifest.json").read_text().replace('"checksum": "', '"checksum": "f', 1)
        ),
        "manifest",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_step_is_put_aside_and_the_one_before_is_used(folder, name):
    damage, reason = DAMAGE[name]
    damage(folder / "3")
    told = []
    step, restored = checkpoint.restore(folder, tree(), report=told.append)
    assert step == 2
    same(restored, tree(2))
    assert checkpoint.steps(folder) == [1, 2]
    (aside,) = folder.glob("3.quarantined-*")
    assert aside.name.split("-", 1)[1] in reason.split("|")
    assert len(told) == 1 and str(folder / "3") in told[0] and "\n" not in told[0]
    assert checkpoint.restore(folder, tree(), report=told.append)[0] == 2 and len(told) == 1


FORGED = {
    "terabytes": {"shape": [10**13]},
    "a negative size": {"shape": [-1]},
    "text as a shape": {"shape": "abc"},
    "objects": {"dtype": "object"},
    "no type": {"dtype": "nonsense"},
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", FORGED)
def test_manifest_from_outside_makes_no_room_for_what_cannot_be(tmp_path, name, alone):
    checkpoint.save(tmp_path, 1, {"a": np.ones(3, np.float32)}, wait=True, alone=alone)
    manifest = json.loads((tmp_path / "1/manifest.json").read_text())
    manifest["leaves"]["a"] |= FORGED[name]
    manifest["digest"] = checkpoint._digest(manifest["leaves"])  # no signature: whoever writes the folder can make it
    (tmp_path / "1/manifest.json").write_text(json.dumps(manifest))
    told = []
    with pytest.raises(BadInput, match="no whole step is left"):
        checkpoint.restore_raw(tmp_path, report=told.append)
    assert "manifest.json" in told[0] and (tmp_path / "1.quarantined-manifest").is_dir()


def test_archive_from_outside_makes_no_room_and_runs_nothing(tmp_path):
    for step, declared in enumerate(("(10000000000000,), 'descr': '<f4'", "(1,), 'descr': '|O'")):
        checkpoint.save(tmp_path, step, {"a": np.ones(3, np.float32)}, wait=True, alone=True)
        archive, manifest = tmp_path / f"{step}/state.npz", tmp_path / f"{step}/manifest.json"
        header = f"{{'shape': {declared}, 'fortran_order': False}}\n".encode()
        with zipfile.ZipFile(archive, "w") as made:
            made.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**facts, "files": {"state.npz": archive.stat().st_size}}))
        told = []
        with pytest.raises(BadInput, match="no whole step is left"):
            checkpoint.restore_raw(tmp_path, report=told.append)
        assert "its arrays cannot be read (a has" in told[0]


def test_value_changed_on_disk_without_a_trace_is_named_by_its_leaf(folder, monkeypatch):
    load = checkpoint.ocp.load

    def altered(path, like):
        values = load(path, like)
        if "/3/" in str(path):
            values["params/dense/kernel"] = values["params/dense/kernel"].at[5, 6].multiply(1 + 2**-23)  # the last bit
        return values

    monkeypatch.setattr(checkpoint.ocp, "load", altered)
    told = []
    assert checkpoint.restore(folder, tree(), report=told.append)[0] == 2
    assert "params/dense/kernel differs from its checksum" in told[0]


def test_all_steps_damaged(folder):
    for step in (1, 2, 3):
        largest(folder / str(step)).unlink()
    with warnings.catch_warnings(record=True) as caught, pytest.raises(BadInput, match="no whole step is left"):
        warnings.simplefilter("always")
        checkpoint.restore(folder, tree())
    assert sum("is damaged and not used" in str(warning.message) for warning in caught) == 3


def test_nothing_saved(tmp_path):
    with pytest.raises(BadInput, match="expected a step in .*nowhere, but there is none"):
        checkpoint.restore_raw(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="expected step 7"):
        checkpoint.restore_raw(tmp_path, step=7)


def test_another_model_is_no_damage(folder):
    with pytest.raises(BadInput, match="it lacks params/new"):
        checkpoint.restore(folder, tree() | {"params": {"dense": tree()["params"]["dense"], "new": jnp.ones(3)}})
    with pytest.raises(BadInput, match="params/dense/kernel: expected float32.2, 2., got float32.64, 32."):
        checkpoint.restore(folder, tree() | {"params": {"dense": {"kernel": jnp.ones((2, 2))}}})
    assert checkpoint.steps(folder) == [1, 2, 3]


def test_unfinished_step_is_not_seen_and_goes_away(folder):
    shutil.copytree(folder / "3", folder / "4.saving")
    assert checkpoint.restore(folder, tree())[0] == 3
    checkpoint.save(folder, 5, tree(5), wait=True)
    assert not list(folder.glob("*.saving"))


def test_error_while_saving_is_raised_by_finish(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "publish", full)
    checkpoint.save(tmp_path, 1, tree())
    with pytest.raises(BadInput, match="checkpoint 1 in .* was not written .*No space left.*the same command goes on"):
        checkpoint.finish(tmp_path)
    assert checkpoint.steps(tmp_path) == []


def test_full_disk_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(BadInput, match="needs .* MiB, but .* free"):
        checkpoint.save(tmp_path, 1, tree())


def test_text_is_refused(tmp_path):
    with pytest.raises(BadInput, match="name: expected an array of numbers, got str"):
        checkpoint.save(tmp_path, 1, {"name": "tas"})


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3, 2)])
def test_checksum_is_the_same_on_host_and_device(dtype, shape):
    values = (np.random.default_rng(0).normal(size=shape) * 3).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(
        checkpoint._checksums({"x": np.asarray(values)})["x"], checkpoint._checksums({"x": jnp.asarray(values)})["x"]
    )


def test_checksum_sees_every_bit_and_every_place():
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    sums = {tuple(checkpoint._checksums({"x": values})["x"])}
    for place in range(50):
        for bit in range(32):
            changed = values.copy()
            changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
            sums.add(tuple(checkpoint._checksums({"x": changed})["x"]))
    sums.add(tuple(checkpoint._checksums({"x": np.roll(values, 1)})["x"]))
    assert len(sums) == 1 + 50 * 32 + 1


def test_nonfinite_leaves_are_named():
    leaves = {"a": jnp.array([1.0, jnp.nan]), "b": {"c": np.array([np.inf]), "d": np.ones(2)}, "n": jnp.arange(3), "k": jax.random.key(0)}
    assert checkpoint.nonfinite(leaves) == ["a", "b/c"]
