"""Measures writing a LeRobotDataset folder against LeRobot's own writer: CPU seconds for the same episodes, read back by LeRobot.

1,000 episodes of 100 frames, 12 numbers observed and 2 done, no pictures; LeRobot writes fewer (--peer-episodes), as it is slower, and both
are given per 1,000 frames. Each is a process of its own, less what it costs to import. LeRobot lives in an environment of its own (pip
install lerobot), named by --peer. Writes `benchmarks/results/robotics_exports.json` and prints one table.

  python benchmarks/robotics_exports.py --peer VENV/bin/python
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from _results import keep

from domains.robotics import lerobot, mcap, minari, robomimic
from domains.robotics.episodes import Episode, layout_of
from domains.robotics.push import PlanarPush

FRAMES = 100
PEER = """
import importlib.machinery, sys, time, types
def mod(name, **attrs):  # torchvision, which need not be there beside torch, is not used here
    m = types.ModuleType(name); m.__spec__ = importlib.machinery.ModuleSpec(name, None); m.__path__ = []
    m.__dict__.update(attrs); sys.modules[name] = m; return m
try:
    import torchvision
except Exception:
    Stub = type("Stub", (), {"__init__": lambda self, *a, **k: None})
    tv, tr = mod("torchvision", __version__="0"), mod("torchvision.transforms", ToTensor=Stub)
    v2 = mod("torchvision.transforms.v2", Transform=Stub); tv.transforms, tr.v2 = tr, v2
    v2.functional = mod("torchvision.transforms.v2.functional"); tv.io = mod("torchvision.io", VideoReader=Stub)
import lerobot, numpy as np
from importlib.metadata import version
from lerobot.datasets.lerobot_dataset import LeRobotDataset
ours, folder, episodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = np.load(folder + ".npz")
vector = lambda size: {"dtype": "float32", "shape": (size,), "names": [str(i) for i in range(size)]}
features = {"observation.state": vector(data["observation"].shape[-1]), "action": vector(data["action"].shape[-1])}
begin = time.process_time()
made = LeRobotDataset.create("local/peer", fps=20, features=features, root=folder, use_videos=False)
for observation, action in zip(data["observation"][:episodes], data["action"][:episodes]):
    for seen, done in zip(observation, action):
        made.add_frame({"observation.state": seen, "action": done, "task": "Push."})
    made.save_episode()
made.finalize()
print(version("lerobot"), time.process_time() - begin)
read = LeRobotDataset("local/ours", root=ours)
assert np.array_equal(read[len(read) - 1]["action"].numpy(), data["action"][-1, -1])
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="a python with LeRobot; without it nothing is compared")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--peer-episodes", type=int, default=100)
    arguments = parser.parse_args()
    layout = layout_of(PlanarPush(), "noise", 0, "CC0-1.0")  # type: ignore[arg-type]
    noise = np.random.default_rng(0)
    observation = noise.uniform(-0.5, 0.5, (arguments.episodes, FRAMES, len(layout.observation))).astype(np.float32)
    action = noise.uniform(-1, 1, (arguments.episodes, FRAMES, len(layout.action))).astype(np.float32)
    episodes = [Episode(*each) for each in zip(observation, action, strict=True)]
    measured: dict[str, object] = {"episodes": arguments.episodes, "frames": FRAMES * arguments.episodes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        writers = {
            "lerobot": (lerobot, "lerobot"),
            "robomimic": (robomimic, "r.hdf5"),
            "minari": (minari, "minari"),
            "mcap": (mcap, "x.mcap"),
        }
        for format, (writer, place) in writers.items():
            begin = time.process_time()
            writer.write(folder / place, layout, episodes)  # type: ignore[attr-defined]
            measured[f"{format}_cpu_seconds"] = time.process_time() - begin
        begin = time.process_time()
        lerobot.read(folder / "lerobot", layout)
        measured["lerobot_read_cpu_seconds"] = time.process_time() - begin
        if arguments.peer:
            np.savez(folder / "peer.npz", observation=observation, action=action)
            count = min(arguments.peer_episodes, arguments.episodes)
            command = [arguments.peer, "-c", PEER, folder / "lerobot", folder / "peer", str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            version, seconds = done.stdout.split()[-2:]
            measured |= {"peer": f"lerobot {version}", "peer_episodes": count, "peer_cpu_seconds": float(seconds)}
    keep("robotics_exports", "lerobot", measured)
    for title, value in measured.items():
        print(f"{title:28} {value if isinstance(value, (str, int)) else round(float(str(value)), 3)}")
    if arguments.peer:
        ours, theirs = (float(str(measured[f"{who}_cpu_seconds"])) for who in ("lerobot", "peer"))
        per = ours / arguments.episodes, theirs / float(str(measured["peer_episodes"]))
        print(f"CPU ms per 1,000 frames: ours {1e4 * per[0]:.1f}, LeRobot's own {1e4 * per[1]:.1f} ({per[1] / per[0]:.0f} times)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
