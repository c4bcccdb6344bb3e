"""A simulated cube that falls, slides and comes to rest as a recorded one did: contact parameters fitted to tosses.

A toss starts in the simulator at its first recorded frame and runs for as long as it was recorded, at a tenth of a frame a step. Contact
follows MuJoCo's soft constraints (elliptic cones, Newton's solver): https://mujoco.readthedocs.io/en/stable/modeling.html#solver-parameters.
What the recorder does to a first frame is measured where the cube flies freely: the unit of length, velocities that are differences over
the frame before and so half a frame late, what smoothing takes from spin.

Errors as Pfrommer, Halm & Posa (2021), "ContactNets", arXiv 2009.11193, judge theirs: over a whole toss from its start alone, of the
position in % of the cube's width and of the orientation as an angle.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from domains.robotics import archives, cmaes
from twinsim.base import BadInput

GRAVITY = 9.81  # m/s2
STEPS = 10  # of the simulator in a frame

UNIT = 0.02  # a quaternion's length may differ from 1 by so much
FASTEST = 100.0  # rad/s, 16 turns a second: beyond, an angular velocity is in degrees
LEAST_FRAMES = 3


class Parameter(NamedTuple):
    """What may be fitted: its default, the bounds of the search, its unit, whether it is searched on a logarithmic scale, what it is."""

    default: float
    lower: float
    upper: float
    units: str
    log: bool
    long_name: str


CONTACT = {
    "friction": Parameter(1.0, 0.03, 1.2, "1", True, "friction of sliding"),
    "torsional": Parameter(0.005, 1e-5, 2e-2, "m", True, "friction of spinning on a point"),
    "rolling": Parameter(0.0001, 1e-6, 2e-3, "m", True, "friction of rolling"),
    "time_constant": Parameter(0.02, 0.0015, 0.04, "s", True, "time constant of the contact (solref)"),
    "damping_ratio": Parameter(1.0, 0.2, 2.5, "1", False, "damping ratio of the contact (solref)"),
    "impedance_least": Parameter(0.9, 0.1, 0.95, "1", False, "impedance of the first touch (solimp)"),
    "impedance_most": Parameter(0.95, 0.6, 0.999, "1", False, "impedance of a deep contact (solimp)"),
    "impedance_width": Parameter(0.001, 1e-4, 1e-2, "m", True, "depth at which the impedance is that of a deep contact (solimp)"),
}
RECORDER = {
    "length_scale": Parameter(1.0, 0.9, 1.1, "1", False, "recorded metres a metre"),
    "lag": Parameter(0.0, 0.0, 1.0, "frame", False, "how late recorded velocities are"),
    "speed_gain": Parameter(1.0, 0.95, 1.05, "1", False, "true over recorded speed along the ground"),
    "spin_gain": Parameter(1.0, 0.9, 1.1, "1", False, "true over recorded angular velocity"),
}
PARAMETERS = CONTACT | RECORDER
DEFAULT = {name: parameter.default for name, parameter in PARAMETERS.items()}
ALONE = 1e-9  # m: a torsional or rolling friction below it does nothing


@dataclass(frozen=True)
class Tosses:
    """Recorded tosses of one cube.

    Attributes:
      states: of each toss, `[frame, 13]`: position m, quaternion w x y z, velocity m/s in the world, angular velocity rad/s in the body.
      rate: Hz. half_width: of the cube, m. mass: kg. inertia: about any axis, kg m2. published: its friction, where known, else nan.
    """

    states: tuple[np.ndarray, ...]
    rate: float
    half_width: float
    mass: float
    inertia: float
    published: float = float("nan")

    @property
    def width(self) -> float:
        return 2 * self.half_width

    def part(self, rows: Sequence[int] | slice | np.ndarray) -> "Tosses":
        """Some of them."""
        found = np.arange(len(self.states))[rows]
        return Tosses(tuple(self.states[row] for row in found), self.rate, self.half_width, self.mass, self.inertia, self.published)


class Errors(NamedTuple):
    """Of each toss, `[toss]`: over frames, mean distance in % of the cube's width and angle, degrees; the last distance, m."""

    position: np.ndarray
    rotation: np.ndarray
    final: np.ndarray

    def means(self) -> dict[str, float]:
        return {
            "position_percent": float(self.position.mean()),
            "rotation_deg": float(self.rotation.mean()),
            "final_m": float(self.final.mean()),
        }


# ---------------------------------------------------------------- what was recorded


def read(path: str | os.PathLike) -> Tosses:
    """Tosses of an .npz with `state` `[frame, 13]` of all tosses one after the other, `length` `[toss]`, and the numbers `rate_hz`,
    `half_width_m`, `mass_kg`, `inertia_kgm2` and, if known, `mu_paper`. Raises BadInput."""
    path, needed = Path(path), ("state", "length", "rate_hz", "half_width_m", "mass_kg", "inertia_kgm2")
    arrays = archives.read(path, "an .npz of tosses", needed)
    numbers = {name: _number(path, name, arrays[name]) for name in needed[2:]}
    published = _number(path, "mu_paper", arrays["mu_paper"]) if "mu_paper" in arrays else float("nan")
    states = _cut(path, arrays["state"], arrays["length"])
    for index, state in enumerate(states):
        check(state, f"{path}: toss {index}", numbers["rate_hz"])
    return Tosses(states, numbers["rate_hz"], numbers["half_width_m"], numbers["mass_kg"], numbers["inertia_kgm2"], published)


def _number(path: Path, name: str, value: np.ndarray) -> float:
    if value.size != 1 or value.dtype.kind not in "fiu" or not (np.isfinite(value).all() and value.item() > 0):
        raise BadInput(f"{path}: {name}: expected one number above 0, got {str(value)[:60]}")
    return float(value.item())


def _cut(path: Path, state: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, ...]:
    if state.ndim != 2 or state.shape[1] != 13 or state.dtype.kind != "f":
        raise BadInput(f"{path}: state: expected floating-point numbers [frame, 13], got {state.dtype} {list(state.shape)}")
    if length.ndim != 1 or length.dtype.kind not in "iu" or not len(length):
        raise BadInput(f"{path}: length: expected whole numbers [toss], got {length.dtype} {list(length.shape)}")
    if (length < LEAST_FRAMES).any():
        short = int(np.argmin(length))
        raise BadInput(f"{path}: length: expected at least {LEAST_FRAMES} frames a toss, toss {short} has {length[short]}")
    if int(length.sum()) != len(state):
        raise BadInput(f"{path}: expected lengths that add up to the {len(state)} frames of state, they add up to {int(length.sum())}")
    return tuple(np.split(np.asarray(state, float), np.cumsum(length)[:-1]))


def check(state: np.ndarray, where: str, rate: float) -> None:
    """Raises BadInput where a toss `[frame, 13]` has holes, no unit quaternions, angles in degrees, or velocities that are not its own."""
    wrong = np.argwhere(~np.isfinite(state))
    if len(wrong):
        raise BadInput(f"{where}, frame {wrong[0][0]}: expected finite numbers, got {state[tuple(wrong[0])]} in column {wrong[0][1]}")
    length = np.linalg.norm(state[:, 3:7], axis=1)
    off = int(np.argmax(np.abs(length - 1)))
    if abs(length[off] - 1) > UNIT:
        raise BadInput(f"{where}, frame {off}: expected a unit quaternion (w, x, y, z), got one of length {length[off]:.3g}")
    turned = np.median(_turns(state) * rate)  # rad/s as the orientations have it
    said = np.median(np.linalg.norm(state[:, 10:13], axis=1))
    if said > FASTEST or (turned > 0.5 and 20 < said / turned < 150):  # 57.3 where degrees are taken for radians
        raise BadInput(
            f"{where}: expected angular velocities in rad/s, got a median of {said:.3g} where orientations turn at {turned:.3g} rad/s"
        )


def _turns(state: np.ndarray) -> np.ndarray:
    """Angle from each frame to the next, rad."""
    unit = state[:, 3:7] / np.linalg.norm(state[:, 3:7], axis=1, keepdims=True)
    return _angle(unit[1:], unit[:-1])


def _angle(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Between two orientations, rad, `[...]`."""
    return 2 * np.arccos(np.clip(np.abs((p * q).sum(-1)), 0, 1))


# ---------------------------------------------------------------- the simulator


def simulate(starts: np.ndarray, frames: Sequence[int], cube: Tosses, values: Mapping[str, float] | Sequence[Mapping[str, float]],
             steps: int = STEPS) -> list[np.ndarray]:  # fmt: skip
    """Tosses from their first states `[toss, 13]`: poses `[frame, 7]` of each, the first of them its start.

    `values` are those of PARAMETERS, of all tosses or of each; what is not named has its default. One model is changed in place from toss
    to toss, which costs nothing beside the steps: a loop like this takes 5 us a step, as long as `mujoco.rollout` and `mujoco.batch.Batch`.
    """
    each = [values] * len(starts) if isinstance(values, Mapping) else values
    world = _World(cube, steps)
    return [world.toss(start, count, dict(DEFAULT) | dict(of)) for start, count, of in zip(starts, frames, each, strict=True)]


class _World:
    """A cube over a plane whose parameters can be set."""

    def __init__(self, cube: Tosses, steps: int):
        h, i = cube.half_width, cube.inertia
        self.cube, self.steps = cube, steps
        self.model = mujoco.MjModel.from_xml_string(f"""
          <mujoco><option timestep="{1 / cube.rate / steps}" cone="elliptic" gravity="0 0 -{GRAVITY}"/><worldbody>
            <geom type="plane" size="9 9 .1" condim="6"/>
            <body><freejoint/><inertial pos="0 0 0" mass="{cube.mass}" diaginertia="{i} {i} {i}"/>
              <geom type="box" size="{h} {h} {h}" condim="6"/></body>
          </worldbody></mujoco>""")
        self.data = mujoco.MjData(self.model)

    def toss(self, start: np.ndarray, frames: int, values: Mapping[str, float]) -> np.ndarray:
        model, data = self.model, self.data
        self._set(values)
        mujoco.mj_resetData(model, data)
        data.qpos[:] = start[:7]
        data.qvel[:] = start[7:]
        data.qvel[:2] *= values["speed_gain"]
        data.qvel[2] += model.opt.gravity[2] * values["lag"] / self.cube.rate
        data.qvel[3:] *= values["spin_gain"]
        poses = np.empty((frames, 7))
        poses[0] = data.qpos
        for frame in range(1, frames):
            mujoco.mj_step(model, data, self.steps)
            poses[frame] = data.qpos
        return poses

    def _set(self, values: Mapping[str, float]) -> None:
        model, scale = self.model, values["length_scale"]
        model.geom_friction[:] = values["friction"], values["torsional"], values["rolling"]
        model.geom_condim[:] = 6 if max(values["torsional"], values["rolling"]) > ALONE else 3
        model.geom_solref[:] = values["time_constant"], values["damping_ratio"]
        model.geom_solimp[:, :3] = values["impedance_least"], values["impedance_most"], values["impedance_width"]
        model.opt.gravity[2] = -GRAVITY * scale
        model.geom_size[1] = self.cube.half_width * scale
        model.geom_rbound[1] = np.sqrt(3) * self.cube.half_width * scale
        model.body_inertia[1] = self.cube.inertia * scale**2


def errors(poses: Sequence[np.ndarray], cube: Tosses) -> Errors:
    """Of simulated poses `[frame, 7]` against what was recorded."""
    rows = []
    for pose, state in zip(poses, cube.states, strict=True):
        apart = np.linalg.norm(pose[:, :3] - state[:, :3], axis=1)
        unit = state[:, 3:7] / np.linalg.norm(state[:, 3:7], axis=1, keepdims=True)
        angle = _angle(pose[:, 3:7] / np.linalg.norm(pose[:, 3:7], axis=1, keepdims=True), unit)
        rows.append((100 * apart.mean() / cube.width, np.degrees(angle).mean(), apart[-1]))
    return Errors(*np.array(rows).T)


def judge(tosses: Tosses, values: Mapping[str, float]) -> Errors:
    """Errors of the simulator with these values."""
    starts = np.array([state[0] for state in tosses.states])
    return errors(simulate(starts, [len(state) for state in tosses.states], tosses, values), tosses)


def no_motion(tosses: Tosses) -> Errors:
    """Errors of a cube that stays where it starts."""
    return errors([np.repeat(state[:1, :7], len(state), 0) for state in tosses.states], tosses)


# ---------------------------------------------------------------- what the recorder does

CLEAR = 0.005  # m above the table: nearer, a corner may touch
FLOWN = 6  # frames of free flight that tell something


def recorder(tosses: Tosses) -> dict[str, float]:
    """The RECORDER values of some tosses, from the frames before the first touch; defaults where no toss flies for long enough.

    There z falls with the local g in recorded metres, the true velocities are those of a parabola through the positions, and a cube,
    whose moments of inertia are all the same, keeps its angular velocity. No contact is looked at.
    """
    rows = []
    for state in tosses.states:
        frames = _flight(state, tosses.half_width)
        if frames < FLOWN:
            continue
        time = np.arange(frames) / tosses.rate
        fall = np.polyfit(time, state[:frames, 2], 2)
        late = (state[:frames, 9] - np.polyval(np.polyder(fall), time)).mean()
        along = state[0, 7:9] / max(float(np.linalg.norm(state[0, 7:9])), 1e-6)
        speed = np.polyfit(time, state[:frames, :2] @ along, 1)[0]
        settled = frames // 3  # smoothing has to find its way first
        spin = rotation_vector(state[settled, 3:7], state[frames - 1, 3:7]) / (time[-1] - time[settled])
        said = state[0, 10:13]
        rows.append((frames**5, -2 * fall[0], late, speed, np.linalg.norm(state[0, 7:9]), spin @ said, said @ said))
    if not rows:
        return {name: about.default for name, about in RECORDER.items()}
    weight, g, late, speed, said_speed, spin, said_spin = np.array(rows).T  # the variance of a parabola's curvature goes with frames^-5
    local = np.average(g, weights=weight)
    found = {
        "length_scale": local / GRAVITY,
        "lag": np.average(late, weights=weight) * tosses.rate / local,
        "speed_gain": speed.sum() / max(said_speed.sum(), 1e-9),
        "spin_gain": spin.sum() / max(said_spin.sum(), 1e-9),
    }
    return {name: float(np.clip(value, RECORDER[name].lower, RECORDER[name].upper)) for name, value in found.items()}


def _flight(state: np.ndarray, half_width: float) -> int:
    """Frames before the lowest corner is near the table."""
    w, x, y, z = state[:, 3:7].T
    upward = np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x**2 + y**2)])  # the vertical in the body
    near = state[:, 2] - half_width * np.abs(upward).sum(0) < CLEAR
    return int(np.argmax(near)) if near.any() else len(state)


def rotation_vector(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Axis times angle, rad `[3]`, that turns orientation `p` into `q`, in the frame of the body."""
    turn = np.array([p @ q, *(p[0] * q[1:] - q[0] * p[1:] - np.cross(p[1:], q[1:]))])
    turn *= np.sign(turn[0]) or 1.0
    size = np.linalg.norm(turn[1:])
    return turn[1:] * (2 * np.arctan2(size, turn[0]) / size if size > 1e-9 else 2.0)


# ---------------------------------------------------------------- the fit

STARTS = {  # where the search begins: a hard cube
    "torsional": 1e-3, "rolling": 1e-5, "time_constant": 0.003, "damping_ratio": 1.1, "impedance_least": 0.4, "impedance_most": 0.9,
    "impedance_width": 0.0015,
}  # fmt: skip
SCANNED = np.geomspace(0.04, 1.1, 21)  # frictions tried before the search, 18 % apart
AROUND = 1.25  # the search keeps within this factor of the best of them: distances answer to friction before all else
FITTED = tuple(CONTACT)
RESAMPLED = 400  # times that tosses are drawn with replacement, for the intervals
NEAR = 5  # of the points judged: their mean answers for a resample


@dataclass(frozen=True)
class Fitted:
    """Parameters that bring simulated tosses nearest to recorded ones.

    Attributes:
      values: of all PARAMETERS. low, high: 90 % intervals of those that were fitted, from resampled tosses.
      least: of each generation, the least mean position error, % of the width; of few tosses at first, of more at the end.
      evaluations: how often those tosses were simulated.
    """

    values: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    least: tuple[float, ...]
    evaluations: int


def fit(
    tosses: Tosses,
    names: Sequence[str] = FITTED,
    *,
    fixed: Mapping[str, float] | None = None,
    evaluations: int = 300,
    batch: int = 120,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Fitted:
    """The values of the parameters `names` with the least mean position error; the others are `fixed`, or keep their defaults.

    Friction is scanned first, alone; then CMA-ES moves all. Two thirds of the evaluations are made on at most `batch` tosses, evenly
    spaced, to come near; the rest on three times as many, of which the best point is the answer.
    Intervals: of the points that this second part judged, the mean of the best few on tosses drawn with replacement, again and again. They
    tell how far the data decide among the points that were tried, with the model taken for true. Raises BadInput.
    """
    if unknown := [name for name in names if name not in PARAMETERS]:
        raise BadInput(f"calibrate tosses: expected parameters among {', '.join(PARAMETERS)}, got {unknown[0]}")
    if not names or len(set(names)) < len(names):
        raise BadInput("calibrate tosses: expected some parameters to fit, each once")
    base = DEFAULT | dict(fixed or {})
    base |= {name: STARTS.get(name, base[name]) for name in names}
    few, many = (tosses.part(_spread(len(tosses.states), size)) for size in (batch, 3 * batch))
    if "friction" in names:
        scanned = [judge(few, base | {"friction": float(mu)}).position.mean() for mu in SCANNED]
        base["friction"] = float(SCANNED[int(np.argmin(scanned))])
    box = _Box(names, base)
    population = 4 + int(3 * np.log(len(names)))
    state = cmaes.start(box.lower, box.upper, mean=box.middle, sigma=0.1, population=population, seed=seed)
    total = max(2, evaluations // population)
    early = min((2 * total) // 3, total - 1)
    least, judged = [], []
    for generation in range(total):
        points = cmaes.ask(state)
        found = [judge(few if generation < early else many, base | box.values(point)).position for point in points]
        state = cmaes.tell(state, np.array([each.mean() for each in found]))
        least.append(float(min(each.mean() for each in found)))
        if generation >= early:
            judged += list(zip(points, found, strict=True))
        progress(generation + 1, total)
    points, of_each = np.array([point for point, _ in judged]), np.array([found for _, found in judged])
    best = points[int(np.argmin(of_each.mean(1)))]
    count = of_each.shape[1]
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLED) / count
    near = np.argsort(weights @ of_each.T, axis=1, kind="stable")[:, :NEAR]
    low, high = np.quantile(points[near].mean(1), [0.05, 0.95], axis=0)
    low, high = np.minimum(low, best), np.maximum(high, best)
    return Fitted(base | box.values(best), box.values(low), box.values(high), tuple(least), total * population)


def _spread(count: int, size: int) -> np.ndarray:
    """At most `size` of `count` rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(size, count)).round().astype(int))


class _Box:
    """The box of a search and what its points mean: parameters, some of them by their logarithm."""

    def __init__(self, names: Sequence[str], base: Mapping[str, float]):
        self.names = names
        self.log = np.array([PARAMETERS[name].log for name in names])
        bounds = {name: (PARAMETERS[name].lower, PARAMETERS[name].upper) for name in names}
        if "friction" in bounds:
            bounds["friction"] = (base["friction"] / AROUND, base["friction"] * AROUND)
        self.lower, self.upper = (self._scaled([bounds[name][end] for name in names]) for end in (0, 1))
        self.middle = np.clip(self._scaled([base[name] for name in names]), self.lower, self.upper)

    def _scaled(self, values: Sequence[float]) -> np.ndarray:
        given = np.asarray(values, float)
        return np.where(self.log, np.log(np.where(self.log, given, 1.0)), given)

    def values(self, point: np.ndarray) -> dict[str, float]:
        return {name: float(np.exp(x)) if log else float(x) for name, log, x in zip(self.names, self.log, point, strict=True)}


# ---------------------------------------------------------------- the verb


def calibrate_files(
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    tosses: str,
    judged: int = 100,
    fit_to: Sequence[str] = FITTED,
    correct: bool = True,
    evaluations: int = 300,
    batch: int = 120,
    seed: int = 0,
) -> list[str]:
    """Fits the contact of a cube to the recorded tosses of a file, all but the last `judged`, and judges it on these; returns lines.

    With `correct`, what the recorder does to a first frame is measured on the same tosses and made good; else recordings are taken as is.
    Written into `folder`: fit.json (parameters, intervals, errors beside those of defaults, of the published friction and of no motion),
    errors.csv (of each judged toss), contact.xml (the cube and the plane as MJCF), tosses.svg (some judged tosses). Raises BadInput.
    """
    recorded = read(tosses)
    count = len(recorded.states)
    if not 1 <= judged < count:
        raise BadInput(f"{tosses}: expected to judge by 1 to {count - 1} of its {count} tosses, got judged={judged}")
    seen, unseen = recorded.part(slice(0, count - judged)), recorded.part(slice(count - judged, None))
    fixed = recorder(seen) if correct else {}
    found = fit(seen, fit_to, fixed=fixed, evaluations=evaluations, batch=batch, seed=seed, progress=progress)
    scores = {"fitted": judge(unseen, found.values), "no motion": no_motion(unseen), "default": judge(unseen, DEFAULT)}
    if np.isfinite(recorded.published):
        scores["published friction"] = judge(unseen, DEFAULT | {"friction": recorded.published})
    _write(Path(folder), unseen, found, scores)
    return lines(found, scores)


def lines(found: Fitted, scores: Mapping[str, Errors]) -> list[str]:
    """The fit in words."""
    answer = []
    for name, each in scores.items():
        means = each.means()
        answer.append(
            f"{name:<18} position {means['position_percent']:6.1f} % of the width, rotation {means['rotation_deg']:5.1f} deg,"
            f" last position {1000 * means['final_m']:6.1f} mm, on {len(each.position)} tosses that were not fitted to"
        )
    for name in found.low:
        about = PARAMETERS[name]
        answer.append(
            f"{name:<18} {found.values[name]:.4g} {about.units} ({found.low[name]:.4g} to {found.high[name]:.4g}): {about.long_name}"
        )
    return answer


def _write(folder: Path, unseen: Tosses, found: Fitted, scores: Mapping[str, Errors]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {
        name: {
            "value": found.values[name],
            "low": found.low.get(name),
            "high": found.high.get(name),
            "units": about.units,
            "what": about.long_name,
        }
        for name, about in PARAMETERS.items()
    }
    answer = {
        "parameters": parameters,
        "errors": {name: each.means() for name, each in scores.items()},
        "judged": len(unseen.states),
        "evaluations": found.evaluations,
        "position_percent_by_generation": found.least,
        "mujoco": mujoco.__version__,
    }
    (folder / "fit.json").write_text(json.dumps(answer, indent=1) + "\n")
    header = ["toss", *(f"{name}: {column}" for name in scores for column in ("position_percent", "rotation_deg", "final_m"))]
    table = np.column_stack([np.column_stack(each) for each in scores.values()])
    rows = [",".join([str(index), *(f"{value:.5g}" for value in row)]) for index, row in enumerate(table)]
    (folder / "errors.csv").write_text("\n".join([",".join(header), *rows]) + "\n")
    (folder / "contact.xml").write_text(scene(unseen, found.values))
    (folder / "tosses.svg").write_bytes(picture(unseen, found.values))


def scene(cube: Tosses, values: Mapping[str, float]) -> str:
    """The cube over its plane as MJCF, in true metres: contact as fitted, without what the recorder does."""
    h, i = cube.half_width, cube.inertia
    contact = (
        f'condim="6" friction="{values["friction"]:.6g} {values["torsional"]:.6g} {values["rolling"]:.6g}"'
        f' solref="{values["time_constant"]:.6g} {values["damping_ratio"]:.6g}"'
        f' solimp="{values["impedance_least"]:.6g} {values["impedance_most"]:.6g} {values["impedance_width"]:.6g}"'
    )
    return f"""<mujoco model="a cube whose contact was fitted to recorded tosses">
  <option timestep="{1 / cube.rate / STEPS:.9g}" cone="elliptic" gravity="0 0 -{GRAVITY}"/>
  <worldbody>
    <geom name="table" type="plane" size="9 9 .1" {contact}/>
    <body name="cube" pos="0 0 {h}"><freejoint/>
      <inertial pos="0 0 0" mass="{cube.mass}" diaginertia="{i} {i} {i}"/>
      <geom name="cube" type="box" size="{h} {h} {h}" {contact}/>
    </body>
  </worldbody>
</mujoco>
"""


def picture(tosses: Tosses, values: Mapping[str, float], shown: int = 6) -> bytes:
    """Some tosses from above and from the side, recorded and simulated, as an SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    some = tosses.part(np.unique(np.linspace(0, len(tosses.states) - 1, min(shown, len(tosses.states))).round().astype(int)))
    poses = simulate(np.array([state[0] for state in some.states]), [len(state) for state in some.states], some, values)
    of = errors(poses, some)
    figure = Figure(figsize=(2.2 * len(poses), 4.2), layout="constrained")
    axes = figure.subplots(2, len(poses), squeeze=False)
    for column, (state, pose, missed) in enumerate(zip(some.states, poses, of.position, strict=True)):
        time = np.arange(len(state)) / tosses.rate
        for path, colour, style, name in ((state, "#1b1f24", "-", "recorded"), (pose, "#c2410c", "--", "simulated")):
            axes[0, column].plot(path[:, 0], path[:, 1], style, color=colour, label=name)
            axes[1, column].plot(time, path[:, 2], style, color=colour)
        axes[0, column].set(title=f"{missed:.0f} % of the width off", xlabel="x, m", aspect="equal", adjustable="datalim")
        axes[1, column].set(xlabel="time, s")
    axes[0, 0].set(ylabel="y, m")
    axes[1, 0].set(ylabel="height of the centre, m")
    axes[0, 0].legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "twinsim", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
