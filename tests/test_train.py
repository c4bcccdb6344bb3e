"""Training gives the same result on any number of devices and after any interruption, and stops where numbers turn bad."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import pytest
from building import built
from flax import nnx

from twinsim import checkpoint, data, train
from twinsim import mesh as meshes
from twinsim.base import BadInput, Example, Spec

SPEC = Spec(grid=(8,), channels=2, fields=1, scalars=3, periodic=(False,))
SIZE, BATCH, SEED = 40, 16, 3


class Denoiser(nnx.Module):
    """A tiny generator: predicts the target from a noisy copy of it and the conditions."""

    def __init__(self, width=32, *, rngs):
        self.into = nnx.Linear(8 * 3 + 3, width, rngs=rngs)
        self.middle = nnx.List([nnx.Linear(width, width, rngs=rngs)])
        self.out = nnx.Linear(width, 16, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(0.5))  # fixed, not trained

    def loss(self, example, key):
        noisy = example.target + self.scale[...] * jax.random.normal(key, example.target.shape)
        x = nnx.silu(self.into(jnp.concatenate([noisy.ravel(), example.fields.ravel(), example.scalars])))
        for layer in self.middle:
            x = nnx.silu(layer(x))
        return jnp.mean((self.out(x) - example.target.ravel()) ** 2)


def module() -> Denoiser:
    return built(lambda: Denoiser(rngs=nnx.Rngs(0)))


def loss_of(assemble):
    return lambda params, example, key: assemble(params).loss(example, key)


def settings(steps=12, **changes) -> train.Settings:
    return train.Settings(**({"steps": steps, "batch": BATCH, "save_every": 5, "log_every": 1} | changes))


def adamw():
    return train.adamw(1e-2, steps=50, warmup=3, weight_decay=1e-2)


def examples() -> Example:
    draw = np.random.default_rng(0)
    return Example(*(draw.normal(size=(SIZE, *shape)).astype(np.float32) for shape in ((8, 2), (8, 1), (3,))))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    data.write_examples(folder, [examples()], SPEC, SIZE)
    return data.ExampleStore(folder)


def mesh(count=8, **sizes):
    return meshes.make_mesh(sizes, jax.devices()[:count])


def fit(store, folder, steps=12, where=None, optimizer=None, generator=None, **changes):
    where = where or mesh(2, fsdp=2)
    return train.fit(generator or module(), store, optimizer or adamw(), settings(steps, **changes), folder, where, SEED)


def log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def assert_same(one, two):
    bits = lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf  # noqa: E731
    jax.tree.map(lambda left, right: np.testing.assert_array_equal(bits(left), bits(right)), one, two)


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """The state after 12 uninterrupted steps, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(store, folder), folder


# ---------------------------------------------------------------- averages and optimizer


@pytest.mark.parametrize("width", [0.05, 0.10, 0.25])
def test_ema_exponent_gives_the_width(width):
    gamma = train.ema_exponent(width)
    t = (np.arange(1_000_000) + 0.5) / 1_000_000  # weights t^gamma over training time, Karras et al. (2024) eq. 121
    weight = t**gamma / (t**gamma).sum()
    mean = (weight * t).sum()
    assert np.sqrt((weight * (t - mean) ** 2).sum()) == pytest.approx(width, rel=1e-4)


def test_ema_exponent_matches_published_value():
    assert train.ema_exponent(0.10) == pytest.approx(6.94, abs=0.005)  # Karras et al. (2024), section 3.1
    assert train.ema_exponent(0.05) == pytest.approx(16.97, abs=0.005)


def test_average_has_closed_form_weights():
    gamma, steps = train.ema_exponent(0.10), 40
    values = np.random.default_rng(0).normal(size=(steps, 3)).astype(np.float32)
    average = {"x": jnp.full(3, 100.0)}  # forgotten at the first step
    for step, value in enumerate(values, 1):
        average = train._average(average, {"x": jnp.asarray(value)}, gamma, jnp.int32(step))
    edges = np.arange(steps + 1) ** (gamma + 1)  # the product of betas telescopes to ((i^(g+1) - (i-1)^(g+1)) / n^(g+1)
    weights = np.diff(edges) / edges[-1]
    np.testing.assert_allclose(average["x"], weights @ values, rtol=1e-5, atol=1e-6)  # 40 roundings of float32


def test_rate_rises_and_falls():
    params = {"bias": jnp.zeros(1)}
    optimizer = train.adamw(0.1, steps=20, warmup=4, final=0.1, b1=0.0, b2=0.0, weight_decay=0.5)
    state, rates = optimizer.init(params), []
    for _ in range(21):
        with jax.numpy_dtype_promotion("standard"):
            change, state = optimizer.update({"bias": jnp.ones(1)}, state, params)  # without memory, Adam moves by the rate
        rates.append(-float(change["bias"][0]))
    assert rates[0] == pytest.approx(0.02, rel=1e-4) and rates[4] == pytest.approx(0.1, rel=1e-4)
    assert rates[12] == pytest.approx(0.1 * 0.55, rel=1e-4) and rates[20] == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch": 0},
        {"microbatches": 3},
        {"ema": ()},
        {"ema": (0.3,)},
        {"ema": (0.0,)},
        {"max_grad_norm": 0.0},
        {"save_every": 0},
    ],
)
def test_senseless_settings_are_refused(changes):
    with pytest.raises(BadInput, match="training"):
        train.Settings(**({"steps": 10, "batch": 16} | changes))


def test_senseless_optimizer_is_refused():
    with pytest.raises(BadInput, match="warmup < steps"):
        train.adamw(1e-3, steps=5, warmup=5)


# ---------------------------------------------------------------- one update


def one_update(where, **changes):
    given, optimizer = settings(**changes), optax.sgd(0.1)
    assemble, state = train.init(module(), optimizer, SEED, where)
    update = train.make_update(loss_of(assemble), optimizer, given, train.where(state))
    rows = meshes.process_rows(where, BATCH)
    batch = Example(*(meshes.place(rows, part[rows], where, BATCH) for part in examples()))
    return update(state, batch)


def test_update_is_a_step_down_the_mean_gradient():
    state, metrics = one_update(mesh(1), max_grad_norm=None)
    assemble, params = train.split(module())
    keys = train.row_keys(jax.random.key(SEED), 0, BATCH)

    def mean(params):
        rows = Example(*(jnp.asarray(part[:BATCH]) for part in examples()))
        return jax.lax.map(lambda row: assemble(params).loss(*row), (rows, keys)).sum() / BATCH

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    expected = jax.tree.map(lambda param, grad: param - 0.1 * grad, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected)
    first = train.ema_params(state, 1)  # the first average is the value itself, up to a rounding
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-8), first, state.params)


def test_long_gradient_is_shortened():
    state, metrics = one_update(mesh(1), max_grad_norm=0.01)
    _, before = train.split(module())
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))
    assert float(metrics["grad_norm"]) > 0.01
    assert float(moved) == pytest.approx(0.1 * 0.01, rel=1e-3)


@pytest.mark.parametrize("count", [1, 4])
def test_microbatches_change_nothing(count):
    whole, at_once = one_update(mesh(count), microbatches=1)
    parts, in_parts = one_update(mesh(count), microbatches=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole.params, parts.params)  # another order of summation
    np.testing.assert_allclose(at_once["grad_norm"], in_parts["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"data": 4}, {"data": 1, "fsdp": 4}, {"data": 2, "fsdp": 2}, {"data": 1, "fsdp": 2, "model": 2}])
def test_every_mesh_takes_the_same_step(sizes):
    alone, metrics = one_update(mesh(1))
    spread, spread_metrics = one_update(mesh(4, **sizes))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone.params, spread.params)  # another order of summation
    np.testing.assert_allclose(metrics["grad_norm"], spread_metrics["grad_norm"], rtol=1e-5)


def test_bfloat16_keeps_the_state_in_float32_and_the_loss_close():
    found = {}
    for precision in ("float32", "bfloat16"):
        where, optimizer = mesh(4, fsdp=2), optax.sgd(0.1)
        assemble, state = train.init(module(), optimizer, SEED, where)
        update = train.make_update(loss_of(assemble), optimizer, settings(), train.where(state), precision)
        rows = meshes.process_rows(where, BATCH)
        batch = Example(*(meshes.place(rows, part[rows], where, BATCH) for part in examples()))
        with jax.numpy_dtype_promotion("standard"):  # the toy multiplies float32 by what it is given
            state, found[precision] = update(state, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    for name in ("loss", "grad_norm"):
        assert found["bfloat16"][name].dtype == jnp.float32
        np.testing.assert_allclose(found["bfloat16"][name], found["float32"][name], rtol=0.02)  # weights of 8 bits, three layers


def test_state_is_split_over_fsdp_and_model():
    state, _ = one_update(mesh(8, data=2, fsdp=2, model=2))
    for tree in (state.params, state.ema[0], state.ema[1]):
        kernel = tree["middle"][0]["kernel"]
        assert kernel.shape == (32, 32) and kernel.addressable_shards[0].data.shape == (16, 16)
    state, _ = train.init(module(), adamw(), SEED, mesh(8, fsdp=8))[1], None
    moments = [leaf for leaf in jax.tree.leaves(state.opt) if leaf.shape == (32, 32)]
    assert len(moments) == 2 and all(leaf.addressable_shards[0].data.shape == (4, 32) for leaf in moments)


# ---------------------------------------------------------------- the loop


def test_smoke_loss_falls_and_log_is_written(whole, store):
    state, folder = whole
    lines = log(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert np.mean([line["loss"] for line in lines[-3:]]) < np.mean([line["loss"] for line in lines[:3]])
    assert all(line["examples_per_s"] > 0 for line in lines)
    assert int(state.step) == 12 and checkpoint.steps(folder / "checkpoints") == [5, 10, 12]


def test_finished_training_is_not_repeated(whole, store):
    state, folder = whole
    assert_same(fit(store, folder), state)
    assert len(log(folder)) == 12
    with pytest.raises(BadInput, match="at least the 12 steps"):
        fit(store, folder, steps=7)


def test_other_seed_in_the_same_folder_is_refused(whole, store):
    with pytest.raises(BadInput, match="another seed"):
        train.fit(module(), store, adamw(), settings(20), whole[1], mesh(2, fsdp=2), SEED + 1)


@pytest.mark.slow
def test_one_and_eight_devices_agree(store, tmp_path):
    runs = {
        name: fit(store, tmp_path / name, 50, where, save_every=50) for name, where in {"one": mesh(1), "eight": mesh(8, fsdp=4)}.items()
    }
    losses = {name: np.array([line["loss"] for line in log(tmp_path / name)]) for name in runs}
    np.testing.assert_allclose(losses["one"], losses["eight"], atol=1e-5)  # sums in another order, over 50 steps
    assert losses["one"].shape == (50,)


def test_interrupted_training_ends_in_the_same_bits(whole, store, tmp_path):
    def stop(step, *_):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.fit(module(), store, adamw(), settings(), tmp_path, mesh(2, fsdp=2), SEED, progress=stop)
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    assert_same(fit(store, tmp_path), whole[0])
    assert [line["loss"] for line in log(tmp_path)] == [line["loss"] for line in log(whole[1])]


def test_sigterm_saves_once_and_leaves(whole, store, tmp_path):
    def leave(step, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(meshes.Preempted, match="asked to leave at step") as error:
        train.fit(module(), store, adamw(), settings(save_every=100), tmp_path, mesh(2, fsdp=2), SEED, progress=leave)
    (step,) = checkpoint.steps(tmp_path / "checkpoints")
    assert 3 <= step <= 3 + train.LAG + 1 and error.value.exit_code == 75
    assert_same(fit(store, tmp_path), whole[0])


def test_damaged_newest_checkpoint_costs_steps_not_the_run(whole, store, tmp_path):
    fit(store, tmp_path, 12)
    (tmp_path / "checkpoints" / "12" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="12 is damaged and not used"):
        assert_same(fit(store, tmp_path), whole[0])


class Trap(Denoiser):
    """Its loss is NaN once its bias has moved, that is from the second step on."""

    def __init__(self, *, rngs):
        super().__init__(rngs=rngs)
        self.calls = nnx.Param(jnp.zeros(()))

    def loss(self, example, key):
        return super().loss(example, key) + jnp.where(self.calls[...] < -0.055, jnp.nan, self.calls[...])


def test_nan_stops_and_names_the_batch(store, tmp_path):
    optimizer = optax.sgd(0.01)
    with pytest.raises(train.Diverged, match="step 7: loss nan.*checkpoint 5.*names the batch") as error:
        fit(store, tmp_path, 30, optimizer=optimizer, generator=built(lambda: Trap(rngs=nnx.Rngs(0))), max_grad_norm=None)
    assert error.value.exit_code == 3
    facts = json.loads((tmp_path / "diverged.json").read_text())
    assert facts["step"] == 7 and facts["rows"] == data.indices(SEED, 6, BATCH, SIZE).tolist()
    assert facts["key"] == np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(SEED), 6))).tolist()
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    assert checkpoint.nonfinite(checkpoint.restore_raw(tmp_path / "checkpoints")[1]) == []


class Jump(Trap):
    """Its loss falls by a tenth a step, and is a million from step 17 on."""

    def loss(self, example, key):
        return jnp.where(self.calls[...] < -1.55, 1e6, 2.0 + self.calls[...])


def test_a_loss_that_jumps_stops_before_it_is_saved(store, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RECENT", 5)
    module, optimizer = built(lambda: Jump(rngs=nnx.Rngs(0))), optax.sgd(0.1)
    with pytest.raises(
        train.Diverged, match="step 17: loss 1000000.*expected a loss of at most 700, as the last 5 tell; .* checkpoint 15"
    ) as error:
        fit(store, tmp_path / "stopped", 30, optimizer=optimizer, generator=module, max_grad_norm=None)
    assert error.value.exit_code == 3 and checkpoint.steps(tmp_path / "stopped" / "checkpoints") == [5, 10, 15]
    fit(store, tmp_path / "never", 18, optimizer=optimizer, generator=module, max_grad_norm=None, max_loss_jump=None)


def test_batch_that_does_not_fit_the_mesh_is_refused(store, tmp_path):
    with pytest.raises(BadInput, match="multiple of data x fsdp = 8, got 4"):
        fit(store, tmp_path, where=mesh(8), microbatches=4)


# ---------------------------------------------------------------- other processes

PROGRAM = """
import sys, os, signal, threading
from pathlib import Path
folder, store, name, rank, count, port = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:7]
sys.path.insert(0, {tests!r})
import jax
jax.config.update("jax_num_cpu_devices", 2 // int(count))
if int(count) > 1:
    jax.distributed.initialize(f"127.0.0.1:{{port}}", num_processes=int(count), process_id=int(rank))
import test_train as t

def kill(step, *_):
    if name == "kill" and step == 8:
        os.kill(os.getpid(), signal.SIGKILL)

mesh = t.meshes.make_mesh({{"fsdp": 2}})
state = t.train.fit(t.module(), t.data.ExampleStore(store), t.adamw(), t.settings(), folder, mesh, t.SEED, progress=kill)
print("done", int(state.step), t.checkpoint.fingerprint(folder / "checkpoints", 12))
"""


def start(folder, store, name="run", rank=0, count=1, port=0):
    tests = str(Path(__file__).parent)
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": processes.flags()}
    command = [sys.executable, "-c", PROGRAM.format(tests=tests), folder, store.folder, name, str(rank), str(count), str(port)]
    return subprocess.Popen([str(part) for part in command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_bits(whole, store, tmp_path):
    killed = start(tmp_path, store, "kill")
    assert killed.wait(120) == -signal.SIGKILL
    again = start(tmp_path, store)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert checkpoint.fingerprint(tmp_path / "checkpoints", 12) == checkpoint.fingerprint(whole[1] / "checkpoints", 12)


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(whole, store, tmp_path):
    port = 20000 + os.getpid() % 20000
    both = [start(tmp_path, store, rank=rank, count=2, port=port) for rank in (0, 1)]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert checkpoint.fingerprint(tmp_path / "checkpoints", 12) == checkpoint.fingerprint(whole[1] / "checkpoints", 12)
    step, state = checkpoint.restore(tmp_path / "checkpoints", whole[0])  # saved by two, read by one
    assert step == 12
    assert_same(state, whole[0])


@pytest.mark.slow
def test_host_time_of_a_step_is_small(tmp_path):
    """Sending an update off takes less than 2 ms of the host, for a state of about 400 leaves."""
    params = {str(number): {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for number in range(40)}
    optimizer = adamw()
    state = train.TrainState(jnp.int32(0), params, optimizer.init(params), (params, params), jax.random.key(0))
    there = jax.tree.map(lambda leaf: meshes.replicated(mesh(1)), state)
    state = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=there)(state)
    loss = lambda params, example, key: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))  # noqa: E731
    update = train.make_update(loss, optimizer, settings(), there)
    batch = Example(*(jnp.zeros((BATCH, 1)) for _ in range(3)))
    state, _ = update(state, batch)
    spent = []
    for _ in range(20):
        begin = time.thread_time()
        state, metrics = update(state, batch)
        spent.append(time.thread_time() - begin)
        metrics["loss"].block_until_ready()
    assert np.median(spent) < 2e-3
