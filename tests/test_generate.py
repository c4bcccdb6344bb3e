"""Draws are the same whatever the batch, the devices and the interruptions, and are whole, checked and finite."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinsim import generate, mesh
from twinsim.base import BadInput

GRID = (6, 5)
ITEMS = 5
CONDITION = {"level": np.linspace(-1, 1, ITEMS).astype(np.float32), "pattern": np.ones((ITEMS, 5), np.float32)}
STATISTICS = {"scale": np.float32(2.0)}


class Toy:
    """Targets of 30 numbers; a sample is the target, scaled, plus its condition."""

    def encode(self, statistics, condition):
        return jnp.broadcast_to(condition["pattern"], GRID)[..., None], condition["level"][None]

    def decode(self, statistics, target, condition):
        return {"x": target[..., 0] * statistics["scale"] + condition["level"]}

    def simulate(self, sample, condition, key):
        return sample

    def check(self, sample, condition):
        return {"x above 10": jnp.maximum(sample["x"].max() - 10.0, 0.0)}


class Mixer:
    """A generator whose draw goes through products of matrices, so that rounding would show another order of sums."""

    def __init__(self, params):
        self.params = params

    def sample(self, fields, scalars, key, constraints=()):
        x = jax.random.normal(key, (30,))
        for matrix in self.params:
            x = jnp.tanh(matrix @ x + scalars[0] + fields.mean())
        return x.reshape(*GRID, 1)


PARAMS = [jnp.asarray(np.random.default_rng(i).normal(size=(30, 30)).astype(np.float32)) / 5 for i in range(3)]


def sampler(devices=8, domain=None, generator=Mixer, **question):
    return generate.make_sampler(domain or Toy(), generator, mesh.make_mesh({}, jax.devices()[:devices]), **question)


def drawer(devices=8, tile=4, seed=1, **given):
    compiled = sampler(devices, **given)
    where = mesh.make_mesh({}, jax.devices()[:devices])
    return lambda block: generate.compute(compiled, PARAMS, STATISTICS, CONDITION, block, seed, tile, where)


def stream(store, draw, batch=8, members=6, identity="one", **more):
    samples, rules = generate.stream(store, draw, members, ITEMS, batch, identity, **more)
    return np.asarray(samples["x"][...]), rules


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Six members of five items, drawn without interruption."""
    return stream(tmp_path_factory.mktemp("whole"), drawer())[0]


# ---------------------------------------------------------------- the same members


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_any_batch_gives_the_same_members(expected, tmp_path, batch):
    np.testing.assert_array_equal(stream(tmp_path, drawer(), batch)[0], expected)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("batch", [2, 64])
def test_any_number_of_devices_gives_the_same_members(expected, tmp_path, devices, batch):
    np.testing.assert_array_equal(stream(tmp_path, drawer(devices), batch)[0], expected)


def test_fewer_members_are_the_first_of_more(expected, tmp_path):
    np.testing.assert_array_equal(stream(tmp_path, drawer(), members=2)[0], expected[:2])


def test_members_and_items_differ_and_the_seed_decides(expected, tmp_path):
    assert len(np.unique(expected.reshape(30, -1), axis=0)) == 30
    assert not np.isclose(stream(tmp_path, drawer(seed=2))[0], expected).any(axis=(2, 3)).all()


def test_condition_of_an_item_reaches_its_draws(tmp_path):
    silent = lambda params: types.SimpleNamespace(sample=lambda fields, scalars, key, constraints: jnp.zeros((*GRID, 1)))  # noqa: E731
    drawn, _ = stream(tmp_path, drawer(generator=silent), batch=3)
    np.testing.assert_array_equal(drawn, np.broadcast_to(CONDITION["level"][None, :, None, None], drawn.shape))


# ---------------------------------------------------------------- interruptions


class Killed(Exception):
    pass


def counting(draw, fatal=None):
    """The same draws, which are counted; the one numbered `fatal` raises."""

    def counted(block):
        counted.blocks.append(block.name)
        if len(counted.blocks) == fatal:
            raise Killed
        return draw(block)

    counted.blocks = []
    return counted


def test_a_killed_stream_goes_on_where_it_was(expected, tmp_path):
    with pytest.raises(Killed):
        stream(tmp_path, counting(drawer(), fatal=4))
    rest = counting(drawer())
    np.testing.assert_array_equal(stream(tmp_path, rest)[0], expected)
    assert len(rest.blocks) == len(list(generate.blocks(6, ITEMS, 8))) - 3


@pytest.mark.parametrize("torn", ['{"blo', '{"block": "9-', "\x00\x00\x00", '["block"]\n', '{"other": 1}\n'])
def test_a_torn_journal_counts_up_to_the_tear(expected, tmp_path, torn):
    with pytest.raises(Killed):
        stream(tmp_path, counting(drawer(), fatal=4))
    with (tmp_path / generate.journal_name(0)).open("a") as journal:
        journal.write(torn)
    with pytest.raises(Killed):  # killed again, after one more block: its line is not lost behind the torn one
        stream(tmp_path, counting(drawer(), fatal=2))
    lines = [json.loads(line) for line in (tmp_path / generate.journal_name(0)).read_text().splitlines()]
    assert len(lines) == 5 and all("block" in line for line in lines[1:])
    np.testing.assert_array_equal(stream(tmp_path, drawer())[0], expected)


def test_goes_on_with_another_batch(expected, tmp_path):
    with pytest.raises(Killed):
        stream(tmp_path, counting(drawer(), fatal=4), batch=8)
    np.testing.assert_array_equal(stream(tmp_path, drawer(), batch=3)[0], expected)


def test_processes_do_not_share_the_chunks_of_another_batch(tmp_path, monkeypatch):
    stream(tmp_path, drawer(), batch=8)
    monkeypatch.setattr(mesh, "processes", lambda: 2)
    told, (first, *_) = [], generate.blocks(6, ITEMS, 8)
    assert len(generate._done_before(tmp_path, "one", first, told.append)) == 6 and not told
    smaller = next(generate.blocks(6, ITEMS, 3))
    assert generate._done_before(tmp_path, "one", smaller, told.append) == set()
    assert "another generate.batch" in told[0] and not tmp_path.exists()


def test_another_identity_starts_over(expected, tmp_path):
    stream(tmp_path, drawer(seed=2), identity="other")
    again = counting(drawer())
    np.testing.assert_array_equal(stream(tmp_path, again)[0], expected)
    assert len(again.blocks) == len(list(generate.blocks(6, ITEMS, 8)))


def test_a_finished_stream_draws_nothing(expected, tmp_path):
    stream(tmp_path, drawer())
    again = counting(drawer())
    np.testing.assert_array_equal(stream(tmp_path, again)[0], expected)
    assert again.blocks == []


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("batch", [8, 3])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:7])], ids=["flipped", "cut"])
def test_a_damaged_chunk_is_told_and_drawn_again(expected, tmp_path, damage, batch):
    with pytest.raises(Killed):
        stream(tmp_path, counting(drawer(), fatal=4))
    damage(tmp_path / "arrays/sample/x/c/1/0/0/0")
    told = []
    with pytest.raises(Killed):  # killed again: the block must not count as done although its chunk is gone
        stream(tmp_path, counting(drawer(), fatal=1), batch, report=told.append)
    rest = counting(drawer())
    np.testing.assert_array_equal(stream(tmp_path, rest, batch, report=told.append)[0], expected)
    assert len(told) == 1 and "x/c/1/0/0/0: damaged; drawing 1-2:0-5 (members:items) again" in told[0]
    if batch == 8:
        assert rest.blocks == ["1-2:0-5", "3-4:0-5", "4-5:0-5", "5-6:0-5"]


@pytest.mark.parametrize("name", ["zarr.json", "sample/zarr.json", "sample/x/zarr.json"])
def test_damaged_metadata_start_over(expected, tmp_path, name):
    stream(tmp_path, drawer())
    (tmp_path / "arrays" / name).write_text("{")
    told = []
    np.testing.assert_array_equal(stream(tmp_path, drawer(), report=told.append)[0], expected)
    assert len(told) == 1 and "drawing all of them again" in told[0]


def test_a_request_to_stop_is_heard_before_each_block(tmp_path):
    asked = iter([False, False, True])

    def stop():
        if next(asked):
            raise Killed

    made = counting(drawer())
    with pytest.raises(Killed):
        stream(tmp_path, made, stop=stop)
    assert len(made.blocks) == 2


def test_progress_counts_draws(tmp_path):
    seen = []
    stream(tmp_path, drawer(), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (30, 30) and [done for done, _ in seen] == sorted({done for done, _ in seen})


# ---------------------------------------------------------------- checks


class Fragile(Toy):
    """The draws of the last item are not finite."""

    def decode(self, statistics, target, condition):
        return {"x": target[..., 0] / jnp.where(condition["level"] == 1.0, 0.0, 1.0)}


def test_a_draw_that_is_not_finite_stops_and_leaves_nothing_of_its_block(tmp_path):
    with pytest.raises(FloatingPointError, match=r"x is not finite in draws 0-1:3-5"):
        stream(tmp_path, drawer(domain=Fragile()), batch=3)
    lines = (tmp_path / generate.journal_name(0)).read_text().splitlines()
    assert lines[1:] == ['{"block": "0-1:0-3"}']
    assert [path.name for path in (tmp_path / "arrays/sample/x/c/0").iterdir()] == ["0"]


def test_a_simulation_has_chances_of_its_own(tmp_path):
    class Noisy(Toy):
        def simulate(self, sample, condition, key):
            one, two = jax.random.split(key)
            return {"x": jnp.stack([jax.random.normal(each, GRID) for each in (key, one, two)])}

    class Plain(Mixer):
        def sample(self, fields, scalars, key, constraints=()):
            return jax.random.normal(key, (*GRID, 1))

    class Silent(Noisy):
        def simulate(self, sample, condition, key):
            return {"x": jnp.stack([sample["x"]] * 3)}

    noisy = stream(tmp_path / "noisy", drawer(domain=Noisy(), generator=Plain))[0]
    plain = stream(tmp_path / "plain", drawer(domain=Silent(), generator=Plain))[0][:, :, 0]
    own = (plain - CONDITION["level"][:, None, None]) / STATISTICS["scale"]
    assert all(abs(np.corrcoef(noisy[:, :, which].ravel(), own.ravel())[0, 1]) < 0.15 for which in range(3))  # of 900 values: 0.03


def test_a_target_that_is_not_finite_is_found_behind_the_bounds_of_a_domain(tmp_path):
    class Bounded(Toy):
        def decode(self, statistics, target, condition):
            return {"x": jnp.where(target[..., 0] > 0, target[..., 0], 0.0)}

    holed = lambda params: types.SimpleNamespace(sample=lambda *args: jnp.full((*GRID, 1), jnp.nan).at[0].set(1.0))  # noqa: E731
    with pytest.raises(FloatingPointError, match="x is not finite in draws 0-6:0-5"):
        stream(tmp_path, drawer(domain=Bounded(), generator=holed), batch=64)


def test_rules_are_reported_for_every_draw(tmp_path):
    class Strict(Toy):
        def check(self, sample, condition):
            return {"level above 0, in K": jnp.maximum(condition["level"], 0.0)}

    _, rules = stream(tmp_path, drawer(domain=Strict()))
    np.testing.assert_array_equal(rules["level above 0, in K"], np.broadcast_to(np.maximum(CONDITION["level"], 0), (6, ITEMS)))


def misses(sample, condition):
    return jnp.maximum(condition["level"] - sample["x"].mean(), 0.0)  # asks for a mean above the level, which about half have


def test_draws_are_repeated_until_the_constraint_holds(expected, tmp_path):
    once, rules_once = stream(tmp_path / "once", drawer(misses=misses, attempts=1))
    often, rules = stream(tmp_path / "often", drawer(misses=misses, attempts=64))
    held = rules_once["what the scenario imposes"] == 0
    assert 0 < held.sum() < held.size  # the test would say nothing otherwise
    np.testing.assert_array_equal(often[held], once[held])  # a draw that holds is not touched
    assert (rules["what the scenario imposes"] == 0).all()  # 64 misses in a row have a chance of about 2^-64


def test_a_draw_that_was_driven_to_break_a_rule_is_repeated(tmp_path):
    class Strict(Toy):
        def check(self, sample, condition):
            return {"first above last": jnp.maximum(sample["x"][0, 0] - sample["x"][-1, -1], 0.0)}

    free = lambda sample, condition: jnp.float32(0.0)  # noqa: E731
    plain, rules_plain = stream(tmp_path / "plain", drawer(domain=Strict()))
    imposed, rules = stream(tmp_path / "imposed", drawer(domain=Strict(), misses=free, attempts=64))
    kept = rules_plain["first above last"] == 0
    assert 0 < kept.sum() < kept.size, "where nothing is imposed the share that keeps a rule is a score, and nothing is drawn again"
    np.testing.assert_array_equal(imposed[kept], plain[kept])
    assert (rules["first above last"] == 0).all()


def test_attempts_are_bounded_and_a_miss_is_reported(tmp_path):
    never = lambda sample, condition: jnp.float32(3.0)  # noqa: E731
    _, rules = stream(tmp_path, drawer(misses=never, attempts=3))
    assert (rules["what the scenario imposes"] == 3).all()


def test_constraints_reach_the_generator(tmp_path):
    class Obedient(Mixer):
        def sample(self, fields, scalars, key, constraints=()):
            return jnp.full((*GRID, 1), constraints[0])

    obey = lambda decode, condition: [10 * condition["level"]]  # noqa: E731
    drawn, _ = stream(tmp_path, drawer(generator=Obedient, constrain=obey))
    np.testing.assert_allclose(drawn[0, :, 0, 0], 21 * CONDITION["level"], rtol=1e-6)  # 2 x 10 level + level


# ---------------------------------------------------------------- blocks and settings


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100))
def test_blocks_cover_every_draw_once(members, items, batch):
    counts = np.zeros((members, items), int)
    names = set()
    for block in generate.blocks(members, items, batch):
        member, item = block.draws()
        assert 0 < len(member) <= batch
        np.add.at(counts, (member, item), 1)
        names.add(block.name)
    assert (counts == 1).all()
    assert len(names) == len(list(generate.blocks(members, items, batch)))
    assert len(names) <= 3 * math.ceil(members * items / batch) + members  # no crumbs


def test_keys_differ_for_every_draw():
    member, item = generate.Block(range(30), range(40)).draws()
    bits = np.asarray(jax.random.key_data(generate.draw_keys(0, member, item)))
    assert len(np.unique(bits, axis=0)) == 1200


@pytest.mark.parametrize("wrong", [{"tile": 0}, {"batch": 0}, {"attempts": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(BadInput, match="at least 1"):
        generate.Settings(**wrong)
