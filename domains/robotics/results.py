"""The robotics part of a report, and what is delivered: verified episodes in the formats that trainers read."""

import io
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from domains.robotics import lerobot, mcap, minari, robomimic, sheet, worlds
from domains.robotics.episodes import layout_of
from domains.robotics.tasks import Task, environment_id, inputs
from twinsim import files
from twinsim.base import BadInput, Question, Section

if TYPE_CHECKING:
    from domains.robotics.domain import Motions

INK, FAILED, TRUTH = "#1b6ca8", "#c05a00", "#444444"
DRAWN = 60  # episodes of a picture
FILMED, SIZE = 9, 128  # episodes of a film, and pixels of each


def limits(domain: "Motions") -> Sequence[str]:
    """What a twin of a robot cannot tell."""
    return [
        f"Learnt from {len(domain.demonstrations.episodes)} demonstrations: {domain.demonstrations.source}.",
        "An episode that holds in MuJoCo need not hold on the real robot: contacts, friction and delays of the simulator are models.",
        "The scene is made of simple shapes; nothing is seen by a camera.",
        "Success says that the goal was reached, not that the way there is what a person would call good.",
    ]


def summary(domain: "Motions", question: Question, dataset: xr.Dataset) -> str:
    """The answer in a sentence or two."""
    held, length = domain.holds(_samples(dataset)), dataset["length"].values
    seconds = length[held] / domain.task.rate if held.any() else np.array([np.nan])
    return (
        f"{held.sum()} of {held.size} episodes of “{domain.task.sentence}” reach their goal and keep every rule when they are played again,"
        f" in {np.nanmedian(seconds):.1f} s at the median ({int(length[held].sum())} frames of training data)."
    )


def sections(
    domain: "Motions", asked: Any, question: Question, dataset: xr.Dataset, rules: Mapping[str, Any], evaluation: Any
) -> Sequence[Section]:
    """What was asked, what came of it, and why what was rejected was rejected."""
    start = {name: dataset[f"start_{name}"].values for name in domain.task.start}
    rows = [["What", "Value"], ["Task", domain.task.sentence], ["Robot", domain.task.robot]]
    rows += [["Starts", f"{dataset.sizes['episode']}, {asked.region}"], ["Episodes from each", str(question.members)]]
    changed = [
        (name, float(dataset[f"world_{name}"].values.flat[0])) for name in worlds.NAMES if np.ptp(dataset[f"world_{name}"].values) == 0
    ]
    own = worlds.named(domain.scene.world())
    for name, value in changed:
        if value != own[name]:
            parameter = worlds.PARAMETERS[name]
            rows.append([parameter.long_name, f"{value:g} {parameter.units if parameter.units != '1' else ''}".strip()])
    text = [asked.asks, f"To expect: {asked.expect.strip()}"]
    asked_for = Section("What was asked", text, {"The question": rows})
    size = dataset["success"].size
    reasons = [["Reason", "Episodes"]]
    reasons += [[name, f"{int((np.asarray(broken) > 0).sum())} of {size}"] for name, broken in sorted(rules.items())]
    told = [
        "An episode becomes data where it reaches its goal, keeps every rule, and comes out the same when its actions are played again."
        f" {int(verified(rules).sum())} of {size} do."
    ]
    shown = _shown(domain, dataset)
    pictures = {
        f"Paths of {min(DRAWN, size)} episodes seen from above: blue reach the goal, orange do not": _paths(domain, dataset),
        f"A film of {len(shown)} of them": _film(domain, shown),
        "Where the episodes start, and how long they take": _starts(domain, dataset, start),
    }
    return [asked_for, Section("Episodes", told, {"Why episodes were rejected": reasons}, pictures)]


def verified(rules: Mapping[str, Any]) -> np.ndarray:
    """Which draws keep every rule, `[member, item]`."""
    return np.all([np.asarray(broken) <= 0 for broken in rules.values()], axis=0)


def write(domain: "Motions", asked: Any, question: Question, dataset: xr.Dataset, folder: Path) -> None:
    """The formats that were asked for, of the episodes that hold, and a film of some of them. Raises BadInput where none holds."""
    formats = set(asked.formats) - {"netcdf"}
    episodes = domain.episodes(_samples(dataset), question.condition, asked.seed, states="robomimic" in formats)
    told = layout_of(domain.task, "twinsim", asked.seed, domain.licence)
    if formats & {"lerobot", "robomimic", "minari", "mcap"} and not episodes:
        raise BadInput(f"scenario {asked.title!r}: expected episodes that hold, to write as {', '.join(sorted(formats))}, none does")
    scene = write_scene(domain.task, folder)
    environment = "" if inputs(domain.task) else environment_id(type(domain.task))  # one whose files are elsewhere cannot be made again
    if "lerobot" in formats:
        lerobot.write(folder / "lerobot", told, episodes)
    if "robomimic" in formats:
        robomimic.write(folder / "robomimic.hdf5", told, episodes, model=scene, environment=environment)
    if "minari" in formats:
        name = f"twinsim/{domain.name.replace('/', '-')}-v0"
        minari.write(folder / "minari", told, episodes, name=name, environment=environment)
    if "mcap" in formats:
        mcap.write(folder / "episodes.mcap", told, episodes)
    films = [filmed(domain, row) for row in _shown(domain, dataset)]
    sheet.write(folder / "contact_sheet.mp4", folder / "contact_sheet.png", films, fps=pace(domain))


def write_scene(task: Task, folder: Path) -> str:
    """Writes `scene.xml`, and beside it the meshes and textures that it names; gives its text."""
    scene: str = task.spec().to_xml()
    files.write_text(folder / "scene.xml", scene)
    for name, path in getattr(task, "assets", {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return scene


def _samples(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    return {str(name): values.values for name, values in dataset.data_vars.items()}


def _shown(domain: "Motions", dataset: xr.Dataset) -> list[xr.Dataset]:
    """A few episodes that hold, from starts all over the region; the first where none does."""
    good = np.argwhere(domain.holds(_samples(dataset)))
    chosen = good[np.linspace(0, len(good) - 1, min(FILMED, len(good))).round().astype(int)] if len(good) else np.zeros((1, 2), int)
    return [dataset.isel(member=int(member), episode=int(episode)) for member, episode in chosen]


def pace(domain: "Motions") -> float:
    """Pictures a second of a film: every control step's, or every second's, ..., but no more than 25."""
    return domain.task.rate / math.ceil(domain.task.rate / 25)


def filmed(domain: "Motions", episode: xr.Dataset) -> np.ndarray:
    """Pictures of one episode, `[frame, height, width, 3]`, `pace` a second: its actions are played again."""
    length = int(episode["length"].values)
    start = {name: np.asarray(episode[f"start_{name}"].values, np.float64)[None] for name in domain.task.start}
    world = np.array([[float(episode[f"world_{name}"].values) for name in worlds.NAMES]], np.float32)
    action = np.stack([episode[each.name].values for each in domain.task.action], -1)[None, :length]
    states = domain.scene.states(start, world, action)[0, :: round(domain.task.rate / pace(domain))]
    model = domain.scene.marked({name: float(value[0]) for name, value in start.items()})
    return sheet.pictures(model, states[:, : model.nq], size=SIZE, light=float(worlds.of(world, "light")[0]))


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)


def _png(figure: Any) -> bytes:
    import matplotlib.pyplot as plt

    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None, "Title": "synthetic data, generated by twinsim"})
    plt.close(figure)
    return out.getvalue()


def _paths(domain: "Motions", dataset: xr.Dataset) -> bytes:
    """Every pair of channels NAME_x, NAME_y seen from above."""
    things = [each.name.removesuffix("_x") for each in domain.task.observation if each.name.endswith("_x") and "speed" not in each.name]
    moving = [name for name in things if f"{name}_y" in dataset and np.ptp(dataset[f"{name}_x"].values, -1).max() > 1e-6]
    figure, axes = _figure(4.2 * len(moving), 4.2, len(moving))
    success, length = dataset["success"].values.ravel() > 0, dataset["length"].values.ravel().astype(int)
    for axis, name in zip(axes[0], moving, strict=True):
        x, y = (dataset[f"{name}_{side}"].values.reshape(len(success), -1) for side in "xy")
        for row in range(min(DRAWN, len(success))):
            colour = INK if success[row] else FAILED
            axis.plot(x[row, : length[row]], y[row, : length[row]], color=colour, lw=0.7, alpha=0.6)
        axis.set(title=name, xlabel="x / m", ylabel="y / m", aspect="equal")
    return _png(figure)


def _film(domain: "Motions", shown: Sequence[xr.Dataset]) -> bytes:
    """An animated PNG of a few episodes side by side, which stand still when they have ended; on paper, its first picture."""
    from PIL import Image

    films = [filmed(domain, row)[::2] for row in shown]
    longest = max(map(len, films))
    columns = math.ceil(math.sqrt(len(films)))
    films += [np.full_like(films[0], 255)] * (-len(films) % columns)
    whole = [np.concatenate([film, np.repeat(film[-1:], longest - len(film), 0)]) for film in films]
    rows = [np.concatenate(whole[first : first + columns], 2) for first in range(0, len(whole), columns)]
    pictures = [Image.fromarray(frame).quantize(64) for frame in np.concatenate(rows, 1)]
    out = io.BytesIO()
    pictures[0].save(out, format="png", save_all=True, append_images=pictures[1:], duration=round(2000 / pace(domain)), loop=0)
    return out.getvalue()


def _starts(domain: "Motions", dataset: xr.Dataset, start: Mapping[str, np.ndarray]) -> bytes:
    figure, axes = _figure(8.4, 3.6, 2)
    x, y = list(start)[:2]
    rate = dataset["success"].values.mean(0)
    shown = axes[0, 0].scatter(start[x], start[y], c=rate, vmin=0, vmax=1, cmap="cividis", s=14)
    axes[0, 0].set(xlabel=f"{x} / {domain.task.start[x].units}", ylabel=f"{y} / {domain.task.start[y].units}", title="starts")
    figure.colorbar(shown, ax=axes[0, 0], label="share that succeeds")
    good = dataset["success"].values > 0
    axes[0, 1].hist(dataset["length"].values[good] / domain.task.rate, bins=20, color=INK)
    axes[0, 1].set(xlabel="time to the goal / s", ylabel="episodes")
    return _png(figure)
