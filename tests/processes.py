"""Runs of several real processes on this machine, found through the variables that SLURM sets."""

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TWINSIM = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import toy; toy.draw_nothing(); sys.exit(toy.cli.main())"


def flags() -> str:
    """The flags of XLA under which the tests run, on which the bits of a result depend, without the number of devices."""
    return " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)


def start(words: Sequence[str], count: int = 1, devices: int = 1, code: str = TWINSIM) -> list[subprocess.Popen]:
    """`count` processes of one run, each with `devices` devices; by default they are `twinsim WORDS`, with empty pictures."""
    job = random.randrange(4096)  # the port on which they meet is made of it
    common = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    common["XLA_FLAGS"] = f"{flags()} --xla_force_host_platform_device_count={devices}".strip()
    common.pop("JAX_NUMPY_RANK_PROMOTION", None)
    common.pop("JAX_NUMPY_DTYPE_PROMOTION", None)
    started = []
    for number in range(count):
        slurm = {"SLURM_NTASKS": count, "SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_JOB_ID": job}
        environ = {**common, **{name: str(value) for name, value in slurm.items()}, "SLURM_STEP_NODELIST": "localhost"}
        command = [sys.executable, "-c", code, *words]
        started.append(subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return started


def end(started: Sequence[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(started, told, strict=True)]
