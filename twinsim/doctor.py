"""What of this machine and this installation fits twinsim, and the next command for each thing that does not."""

import hashlib
import importlib.util
import io
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

# The pinned lines of requirements/: everything was tested with these.
TESTED = {"3.11": "0.10.2", "3.12": "0.12.0.1"}  # Python -> jax
EXTRAS = {"climate": "jcm", "robotics": "mujoco"}  # extra -> the package that it brings
FREE_BYTES = 2e9  # a run on the default: checkpoint, members and report
EARLIEST = 1_767_225_600  # s since 1970: 2026-01-01, before any release
SKEW = 60.0  # s between this machine's clock and that of the file system, beyond which the order of files misleads


class Check(NamedTuple):
    """One thing that was looked at; `text` says what was found and, where it is not `ok`, the next command."""

    name: str
    ok: bool
    text: str


def checks(folder: Path = Path()) -> list[Check]:
    """Looks at everything; results would be written below `folder`. Touches no network, but for a node's name under SLURM."""
    return [
        _guarded("python", python),
        _guarded("packages", packages),
        _guarded("devices", devices),
        _guarded("slurm", lambda: slurm(os.environ)),
        _guarded("disk", lambda: disk(folder)),
        _guarded("clock", lambda: clock(folder)),
        _guarded("data", lambda: data(_domain_folders())),
        _guarded("pictures", pictures),
        *(_guarded(extra, partial(optional, extra, package)) for extra, package in EXTRAS.items()),
    ]


def lines(found: Sequence[Check]) -> list[str]:
    """The checks as text, one line each, aligned."""
    width = max((len(check.name) for check in found), default=0)
    return [f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<{width}}  {check.text}" for check in found]


def python() -> tuple[bool, str]:
    line = f"{sys.version_info[0]}.{sys.version_info[1]}"
    tested = "" if line in TESTED else f"; tested on {' and '.join(TESTED)}"
    return True, f"Python {line} at {sys.executable}{tested}"


def packages() -> tuple[bool, str]:
    """Compares what is installed with what twinsim declares, and jax with its pinned line."""
    jax, line = metadata.version("jax"), f"{sys.version_info[0]}.{sys.version_info[1]}"
    tested = TESTED.get(line, TESTED["3.12"])
    text = f"jax {jax}" if jax == tested else f"jax {jax} (tested with {tested})"
    try:
        unmet = _unmet("twinsim")
    except metadata.PackageNotFoundError:
        return True, f"{text}; runs from a checkout that is not installed, so versions were not compared"
    if unmet:
        return False, f"{text}; {'; '.join(unmet)}; {_install()}"
    return True, f"{text}; every package is within the declared versions"


def devices() -> tuple[bool, str]:
    """Computes something on the first device; an accelerator that jax does not use is a fault."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()
    total = float(jnp.ones((64, 64)).sum())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{len(found)} {found[0].platform} ({found[0].device_kind}), {cores} CPU cores, default type {jnp.zeros(()).dtype}"
    if total != 64 * 64:
        return (
            False,
            f"{text}: the sum of 4096 ones came out as {total}; JAX_PLATFORMS=cpu twinsim doctor tells whether the device is at fault",
        )
    if found[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS", "") != "cpu":
        if Path("/dev/nvidiactl").exists():
            return False, f"{text}; an NVIDIA device is there but not used; {_install('[hpc]')}"
        if Path("/dev/kfd").exists():
            return False, f"{text}; an AMD device is there but not used; pip install 'jax[rocm7-local]=={metadata.version('jax')}'"
    return True, text


def slurm(environment: Mapping[str, str]) -> tuple[bool, str]:
    """Judges the variables from which jax finds its peers: number of tasks, rank, and the first node's name."""
    job, tasks = environment.get("SLURM_JOB_ID"), environment.get("SLURM_NTASKS", "1")
    if job is None:
        return True, "not inside a SLURM job"
    if tasks == "1":
        return True, f"job {job}, one process"
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NODELIST" not in environment:
        return False, f"job {job} has {tasks} tasks, but this process was not started as one of them; srun twinsim ..."
    head = _first_node(environment["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(head, None)
    except OSError:
        return False, f"job {job}: the first node's name {head} does not resolve, so the processes cannot meet; getent hosts {head}"
    return True, f"job {job}, process {environment['SLURM_PROCID']} of {tasks}, meeting at {head}"


def disk(folder: Path) -> tuple[bool, str]:
    """Writes a file as a run does: whole under another name, then renamed."""
    place = folder.resolve()
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free in {place}"
    try:
        with tempfile.TemporaryDirectory(prefix=".twinsim-doctor-", dir=place) as scratch:
            part, whole = Path(scratch, "part"), Path(scratch, "whole")
            with part.open("wb") as file:
                file.write(bytes(1 << 20))
                file.flush()
                os.fsync(file.fileno())
            part.replace(whole)
    except OSError as error:
        return False, f"{text}, but writing there fails ({error.strerror}); name another folder: twinsim run out=/path/to/folder"
    if free < FREE_BYTES:
        return False, f"{text}; a run needs about {FREE_BYTES / 1e9:.0f} GB; name another folder: twinsim run out=/path/to/folder"
    return True, f"{text}, writable"


def clock(folder: Path) -> tuple[bool, str]:
    """Compares the machine's clock with the calendar and with the file system's clock."""
    now = time.time()
    try:
        with tempfile.NamedTemporaryFile(prefix=".twinsim-doctor-", dir=folder.resolve()) as file:
            skew = os.fstat(file.fileno()).st_mtime - now
    except OSError:
        skew = 0.0  # what cannot be written is told by `disk`
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < EARLIEST:
        return False, f"{text} cannot be: records would carry a wrong date; timedatectl set-ntp true"
    if abs(skew) > SKEW:
        return False, f"{text}, but the file system's clock differs by {skew:+.0f} s; timedatectl set-ntp true, on both machines"
    return True, text


def data(folders: Sequence[Path]) -> tuple[bool, str]:
    """Compares the embedded data below `folders` with the `SHA256SUMS` beside it."""
    sums = sorted(file for folder in folders for file in folder.rglob("SHA256SUMS"))
    if not sums:
        return False, f"no embedded data (no SHA256SUMS below domains/); {_restore()}"
    bad, count, size = [], 0, 0
    for listing in sums:
        for line in listing.read_text().splitlines():
            expected, _, name = line.replace(" *", "  ", 1).partition("  ")
            file = listing.parent / name
            if not file.is_file():
                bad.append(f"{file} is missing")
            elif hashlib.sha256(file.read_bytes()).hexdigest() != expected:
                bad.append(f"{file} has changed")
            else:
                count, size = count + 1, size + file.stat().st_size
    if bad:
        return False, f"{'; '.join(bad)}; {_restore()}"
    return True, f"{count} embedded files as shipped, {size / 1e6:.1f} MB"


def pictures() -> tuple[bool, str]:
    """Draws as a report does: no window, no screen."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1], [0, 1])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg")
    backend = matplotlib.rcParams._get_backend_or_none() or "chosen when first needed"  # type: ignore[attr-defined]
    if b"</svg>" not in drawn.getvalue():
        return False, f"matplotlib {matplotlib.__version__} draws no SVG (backend: {backend}); MPLBACKEND=agg twinsim doctor"
    return True, f"matplotlib {matplotlib.__version__} draws (backend: {backend})"


def optional(extra: str, package: str) -> tuple[bool, str]:
    """An extra that is absent is no fault; one that is there with the wrong company is."""
    if importlib.util.find_spec(package) is None:
        return True, f"not installed; where it is wanted: {_install(f'[{extra}]')}"
    unmet = _unmet(package)
    if unmet:
        return False, f"{package} {metadata.version(package)} is installed, but {'; '.join(unmet)}; {_install(f'[{extra}]')}"
    return True, f"{package} {metadata.version(package)}"


def _guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:  # a broken package may raise anything at import; the other checks still have to be made
        return Check(name, False, f"{type(error).__name__}: {error}; {_install()}")


def _unmet(package: str) -> list[str]:
    """Each requirement of an installed package that is absent or of another version, in words."""
    unmet = []
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unmet.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            unmet.append(f"{requirement.name} is {version}, {package} needs {requirement.specifier}")
    return unmet


def _install(extra: str = "") -> str:
    """The command that puts this installation right, an extra included."""
    checkout = Path(__file__).parent.parent
    what = f"-e '{checkout}{extra}'" if (checkout / "pyproject.toml").exists() else f"'twinsim{extra}'"
    pip = f"{sys.executable} -m pip install" if importlib.util.find_spec("pip") else f"uv pip install --python {sys.executable}"
    return f"{pip} {what}"


def _restore() -> str:
    """The command that brings back files of the distribution."""
    checkout = Path(__file__).parent.parent
    return f"git -C {checkout} restore domains" if (checkout / "pyproject.toml").exists() else f"{_install()} --force-reinstall --no-deps"


def _domain_folders() -> list[Path]:
    spec = importlib.util.find_spec("domains")
    return [Path(place) for place in (spec.submodule_search_locations or [] if spec else [])]


def _first_node(nodes: str) -> str:
    """The first name of a SLURM node list: `gpu[03-07,9],login` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
