"""A real SLURM of two nodes on this machine, for the tests marked `slurm`: private daemons that end with the test.

It needs root, and Debian's `slurm-wlm` and `munge`, whose slurmd may run twice on one host. The nodes are called `node1` and `node2` and
have two cores each; their names stand in /etc/hosts meanwhile, because the processes of a job find each other by them.
"""

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scontrol", "scancel", "setpriv")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
HOSTS = Path("/etc/hosts")
CONFIG = """
ClusterName=twinsim
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
FirstJobId={first_job}
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=2 RealMemory=2000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=01:00:00 State=UP OverSubscribe=NO
"""


def missing() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if os.geteuid():
        return "a SLURM of one's own needs root"
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    return f"no {', '.join(absent)} here: apt-get install slurm-wlm munge" if absent else ""


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """Two idle nodes, to which SLURM_CONF points while the block lasts; gives the folder of the daemons' logs."""
    if reason := missing():
        pytest.skip(reason)
    # short, because the name of a socket is, and not below a folder of pytest, which munge would not trust
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    conf, daemons = folder / "slurm.conf", []
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}

    def start(name: str, *words: str) -> None:
        log = (folder / f"{name}.log").open("wb")
        # a daemon ends with the tests, also where these are killed
        command = ["setpriv", "--pdeathsig", "KILL", *words]
        daemons.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True))

    try:
        os.environ |= {"SLURM_CONF": str(conf), "PATH": PATH}
        controller, node1, node2 = free_ports(3)
        host = socket.gethostname().split(".")[0]
        # the port at which the processes of a job meet follows from its number: two clusters at once must not number alike
        first_job = 1000 + os.getpid() % 3000
        values = {"host": host, "folder": folder, "controller": controller, "node1": node1, "node2": node2, "first_job": first_job}
        conf.write_text(CONFIG.format(**values))
        for name in ("state", "spool.node1", "spool.node2"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = [
            f"--key-file={key}",
            f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munge.seed",
            f"--log-file={folder}/munged.log",
        ]
        folder.chmod(0o755)
        with named_nodes():
            start("munged.out", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
            until((folder / "munge.socket").exists, 20, "munged does not answer", folder)
            start("slurmctld", "slurmctld", "-D", "-f", str(conf))
            for node in ("node1", "node2"):
                start(node, "slurmd", "-D", "-N", node, "-f", str(conf))
            until(lambda: said("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 30, "two nodes are not idle", folder)
            yield folder
            until(lambda: said("scancel", "--user=root") + said("squeue", "-h") == "", 60, "jobs do not end", folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def named_nodes() -> Iterator[None]:
    """Lets node1 and node2 stand for this machine."""
    line = f"127.0.0.1 node1 node2 # tests of twinsim, process {os.getpid()}\n"

    def change(edit: Callable[[str], str]) -> None:
        with HOSTS.open("r+") as file:  # in place: a container's may not be replaced
            fcntl.flock(file, fcntl.LOCK_EX)
            text = edit(file.read())
            file.seek(0)
            file.write(text)
            file.truncate()

    change(lambda text: text + ("" if text.endswith("\n") else "\n") + line)
    try:
        yield
    finally:
        change(lambda text: text.replace(line, ""))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(holds: Callable[[], object], seconds: float, otherwise: str, folder: Path | None = None) -> None:
    """Waits until something holds; fails with the ends of the logs in `folder` where it does not."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = sorted(folder.glob("*.log")) if folder else []
            pytest.fail("\n".join([otherwise, *(f"{log.name}: {log.read_text(errors='replace')[-1000:]}" for log in logs)]))
        time.sleep(0.2)


def said(*words: str) -> str:
    """What a command says on stdout."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60).stdout.strip()


def restarts(job: str) -> int:
    """How often SLURM has started the job again, such as `1000_2`."""
    found = re.search(r"Restarts=(\d+)", said("scontrol", "show", "job", job))
    return int(found[1]) if found else -1


def start_now(job: str) -> None:
    """Spares a job that was put back into the queue SLURM's two minutes there."""

    def state() -> str:
        return said("scontrol", "show", "job", job)

    until(lambda: "JobState=PENDING Reason=BeginTime" in state(), 40, f"job {job} does not wait")
    time.sleep(2)  # what those minutes are for: the end of the first start, told late, would count as that of the second
    said("scontrol", "update", f"JobId={job}", "StartTime=now")
    until(lambda: re.search(r"JobState=(RUNNING|COMPLETED)", state()), 40, f"job {job} does not begin")
