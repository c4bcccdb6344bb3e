"""Measures the engine's speed on one processor core, by turns with the same model in PyTorch: `make bench-engine`.

"dit" and "unet": the training step (noise, EDM loss, gradient, clipping, AdamW, one average of the parameters) and one denoising of a
batch, in processor seconds, of `twinsim.train.make_update` and of `engine_torch.py`, whose output is first found equal. The two
processes take turns on one core, so that what else the machine does meets both; the figure is the median of the ratios of turns.
"loop": what training costs beside the compiled update, how fast batches are read, and a warm start of `twinsim train`.
Writes `benchmarks/results/engine.json` and, with --readme (`make bench-engine ARGS=--readme`), the table between the marker lines
of README.md.

  python benchmarks/engine.py [--torch PYTHON] [--only dit,unet,loop] [--turns 10] [--core 0] [--readme]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from _results import ROOT, keep, read, write_readme, yes

BATCH, SIZE, CHANNELS = 16, 32, 3
SIZES = {
    "dit": {"width": 256, "depth": 6, "heads": 4, "patch": 4, "embedding": 256},
    "unet": {"widths": [48, 96, 96], "blocks": 3, "embedding": 192},
}
NAMES = {"dit": "DiT", "unet": "U-Net"}
WORK = {"train": 2, "denoise": 6}  # what is measured, and how many in one turn
ONE_CORE = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
TARGETS = {"train": 1.0, "denoise": 1.25}  # PyTorch's seconds over ours, at least
MOST_OVERHEAD_MS, LEAST_INPUT, MOST_START_S = 2.0, 5.0, 5.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--only", default="dit,unet,loop")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.serve:
        name, argument = given.serve
        serve_loop(int(argument)) if name == "loop" else serve(name, argument)
        return 0
    os.sched_setaffinity(0, {given.core})
    for name in given.only.split(","):
        measured = loop() if name == "loop" else compare(name, given.torch, given.turns)
        keep("engine", name, measured)
    print("\n".join(table(read("engine"))))
    if given.readme:
        write_readme("speed", ["", *table(read("engine")), ""])
    return 0


# ---------------------------------------------------------------- two programs by turns


class Runner:
    """A process that computes when it is asked to, and tells the processor seconds of each."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **ONE_CORE}
        )
        self.version = self._answer().removeprefix("ready ")

    def __call__(self, what: str) -> float:
        self.process.stdin.write(f"{what} {WORK[what]}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return line

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, torch: str, turns: int) -> dict:
    """Seconds and ratios of one network; those of PyTorch are left out where it is absent."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        path = Path(folder) / "parameters.npz"

        def start(command: list[str]) -> Runner:
            return running.enter_context(contextlib.closing(Runner(command)))

        runners = {"twinsim": start([sys.executable, __file__, "--serve", name, str(path)])}
        if subprocess.run([torch, "-c", "import torch"], capture_output=True, check=False).returncode:
            print(f"{name}: PyTorch skipped, {torch} has none; name a Python that does by --torch", flush=True)
        else:
            for format in ("contiguous", "channels-last") if name == "unet" else ("contiguous",):
                runners[f"torch {format}"] = start([torch, str(ROOT / "benchmarks" / "engine_torch.py"), name, str(path), f"--{format}"])
                ours, theirs = np.load(path.with_suffix(".twinsim.npy")), np.load(path.with_suffix(".torch.npy"))
                np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(np.abs(ours).max()))
        for runner in runners.values():
            for what in WORK:
                runner(what)  # what is slow only once
        seconds: dict[str, dict[str, list[float]]] = {who: {what: [] for what in WORK} for who in runners}
        for _ in range(turns):
            for what in WORK:
                for who, runner in runners.items():
                    seconds[who][what].append(runner(what))
        parameters = sum(value.size for key, value in np.load(path).items() if key not in ("x", "sigma", "sizes"))
    measured: dict = {"parameters": parameters, "versions": {who: runner.version for who, runner in runners.items()}, "turns": turns}
    for what in WORK:
        median = {who: float(np.median(spent[what])) for who, spent in seconds.items()}
        best = min((who for who in runners if who != "twinsim"), key=lambda who: median[who], default=None)
        measured[what] = {"cpu_s": median, "peer": best}
        if best:
            ratios = np.array(seconds[best][what]) / np.array(seconds["twinsim"][what])
            measured[what]["ratio"] = {"median": float(np.median(ratios)), "low": float(ratios.min()), "high": float(ratios.max())}
    return measured


def serve(name: str, path: str) -> None:
    """Our side: writes random parameters and what we make of them to `path`, then computes as asked."""
    from twinsim import cli

    cli._prepare_process()  # as every command does

    from functools import partial

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from generators import diffusion, nets
    from twinsim import mesh, train
    from twinsim.base import Example, Spec

    spec = Spec((SIZE, SIZE), CHANNELS, 0, 0, (False, False))
    sizes = SIZES[name] | ({"attention": True} if name == "unet" else {})
    module = diffusion.Diffusion(spec, partial({"dit": nets.DiT, "unet": nets.UNet}[name], **sizes), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf + 0.02 * draw.normal(size=leaf.shape), jnp.float32), params)
    module = nnx.merge(graph, params, rest)
    x = draw.normal(size=(BATCH, SIZE, SIZE, CHANNELS)).astype(np.float32)
    batch = Example(jnp.asarray(x), jnp.zeros((BATCH, SIZE, SIZE, 0)), jnp.zeros((BATCH, 0)))
    sigma = jnp.exp(jnp.linspace(-3.0, 3.0, BATCH))

    settings = train.Settings(steps=10_000, batch=BATCH, ema=(0.05,))
    optimizer = train.adamw(1e-3, settings.steps, weight_decay=1e-2)
    assemble, state = train.init(module, optimizer, 0, mesh.make_mesh(), averages=1)
    update = train.make_update(lambda params, example, key: assemble(params).loss(example, key), optimizer, settings, train.where(state))
    one = lambda params, example, x, sigma: assemble(params).denoiser(example.fields, example.scalars)(x, sigma)  # noqa: E731
    denoise = jax.jit(jax.vmap(one, (None, 0, 0, 0)))

    flat = {mesh.leaf_path(key).removeprefix("net/"): np.asarray(leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    shape = {"channels": CHANNELS} | ({"size": SIZE} if name == "dit" else {})
    np.savez(path, x=x, sigma=np.asarray(sigma), sizes=json.dumps(SIZES[name] | shape), **flat)
    fixed = jax.tree.map(jnp.copy, state.params)
    np.save(Path(path).with_suffix(".twinsim.npy"), np.asarray(denoise(fixed, batch, batch.target, sigma)))

    print(f"ready jax {jax.__version__}", flush=True)
    for line in sys.stdin:
        what, count = line.split()
        begun = time.process_time()
        for _ in range(int(count)):
            if what == "train":
                state, metrics = update(state, batch)
                float(metrics["loss"])
            else:
                denoise(fixed, batch, batch.target, sigma).block_until_ready()
        print((time.process_time() - begun) / int(count), flush=True)


# ---------------------------------------------------------------- around the update


def loop(steps: int = 2000) -> dict:
    """Milliseconds a step costs beside its computation, examples read a second, and processor seconds to the first step of a warm start."""
    command = [sys.executable, __file__, "--serve", "loop", str(steps)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True, env={**os.environ, **ONE_CORE})
    with tempfile.TemporaryDirectory() as folder:
        first_step(Path(folder), 0)  # fills the compilation cache, writes the data
        starts = [first_step(Path(folder), seed) for seed in (1, 2, 3)]
    return {**json.loads(done.stdout.splitlines()[-1]), "start_s": float(np.median(starts))}


def serve_loop(steps: int) -> None:
    """Trains a model of one number for `steps`, once to compile; prints what a step of it costs, and how fast its data are read alone."""
    from twinsim import cli

    cli._prepare_process()

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from twinsim import data, mesh, train
    from twinsim.base import Example, Spec

    class Constant(nnx.Module):
        def __init__(self) -> None:
            self.value = nnx.Param(jnp.zeros(()))

        def loss(self, example: Example, key: jax.Array) -> jax.Array:
            return jnp.square(self.value[...] - example.target[0, 0, 0])

    spec = Spec((SIZE, SIZE), CHANNELS, 0, 0, (False, False))
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        target = draw.normal(size=(1000, SIZE, SIZE, CHANNELS))
        data.write_examples(Path(folder, "data"), [Example(target, target[..., :0], np.zeros((1000, 0)))], spec, 1000)
        store, devices = data.ExampleStore(Path(folder, "data")), mesh.make_mesh()

        def fit(count: int, name: str) -> float:
            settings = train.Settings(steps=count, batch=BATCH, save_every=10 * steps, log_every=10)
            begun = time.process_time()
            train.fit(Constant(), store, train.adamw(1e-3, 10 * steps), settings, Path(folder, name), devices, 0)
            return time.process_time() - begun

        fit(2, "first")
        short, long = fit(2, "short"), fit(steps + 2, "long")
        stream = data.batches(store, 0, BATCH, devices)
        begun = time.process_time()
        for _ in range(steps):
            next(stream)
        read = time.process_time() - begun
        stream.close()
    print(json.dumps({"overhead_ms": (long - short) / steps * 1e3, "examples_per_s": steps * BATCH / read}))


def first_step(folder: Path, seed: int) -> float:
    """Processor seconds from the command `twinsim train` to the first line of its log, written after the first step.

    On one core that has nothing else to do they are what a clock shows.
    """
    code = "import sys; from twinsim.cli import main; sys.exit(main())"
    words = ["train", f"out={folder / 'out'}", f"seed={seed}", "train.steps=3", "train.log_every=1", "optimizer.warmup=1"]
    environment = {**os.environ, **ONE_CORE, "XDG_CACHE_HOME": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    known = set(folder.rglob("train.jsonl"))
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=environment
    ) as run:
        while run.poll() is None and not any(path.stat().st_size for path in set(folder.rglob("train.jsonl")) - known):
            time.sleep(0.02)
        fields = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
        passed = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system, proc(5)
        message = run.communicate()[1].decode()
    if run.returncode:
        sys.exit(f"twinsim {' '.join(words)} ended with {run.returncode}: {message}")
    return passed


# ---------------------------------------------------------------- the table


def table(results: dict) -> list[str]:
    """Markdown: seconds of both, their ratio with its range, the target, and whether it is reached."""
    lines = [
        "| one processor core | twinsim | PyTorch eager | ratio of turns (range) | target | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    words = {"train": "training step", "denoise": "denoising a batch"}
    for name in (name for name in SIZES if name in results):
        measured = results[name]
        for what, target in TARGETS.items():
            seconds, peer = measured[what]["cpu_s"], measured[what]["peer"]
            label = f"{NAMES[name]}, {measured['parameters'] / 1e6:.1f} M parameters, {words[what]}"
            ours = f"{seconds['twinsim'] * 1e3:.0f} ms"
            if peer is None:
                lines.append(f"| {label} | {ours} | skipped | - | >= {target:g} | - |")
                continue
            ratio = measured[what]["ratio"]
            span = f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
            lines.append(f"| {label} | {ours} | {seconds[peer] * 1e3:.0f} ms | {span} | >= {target:g} | {yes(ratio['median'] >= target)} |")
    if "loop" in results:
        around = results["loop"]
        needed = BATCH / min((results[name]["train"]["cpu_s"]["twinsim"] for name in SIZES if name in results), default=float("nan"))
        times = around["examples_per_s"] / needed
        for label, value, target, reached in (
            (
                "a step beside its computation",
                f"{around['overhead_ms']:.2f} ms",
                f"< {MOST_OVERHEAD_MS:g} ms",
                around["overhead_ms"] < MOST_OVERHEAD_MS,
            ),
            ("examples read, times what the fastest step takes in", f"{times:.0f}", f">= {LEAST_INPUT:g}", times >= LEAST_INPUT),
            (
                "warm start: from the command to the first step, processor seconds",
                f"{around['start_s']:.1f} s",
                f"< {MOST_START_S:g} s",
                around["start_s"] < MOST_START_S,
            ),
        ):
            lines.append(f"| {label} | {value} | - | - | {target} | {yes(reached)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
