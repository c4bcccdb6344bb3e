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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "engine.json"
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
    parser.add_argument("--only", default="dit,unet")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.serve:
        serve(*given.serve)
        return 0
    os.sched_setaffinity(0, {given.core})
    for name in given.only.split(","):
        measured = loop() if name == "loop" else compare(name, given.torch, given.turns)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**results(), name: measured}, indent=1) + "\n")  # read anew: another run may have added to it
    print("\n".join(table(results())))
    if given.readme:
        write_readme(results())
    return 0


def results() -> dict:
    """What was measured so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


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


# ---------------------------------------------------------------- the table


def table(results: dict) -> list[str]:
    return [json.dumps({k: {w: v.get("ratio") for w, v in r.items() if isinstance(v, dict)} for k, r in results.items()}, indent=1)]


if __name__ == "__main__":
    sys.exit(main())
