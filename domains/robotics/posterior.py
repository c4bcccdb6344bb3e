"""The contact-posterior domain: which contact parameters a few observed tosses of a cube leave open, learnt from simulated tosses.

A sample is the contact (friction, time constant and damping ratio of the soft constraint); its condition is what some tosses of one cube
look like: features of each toss, their mean and their scatter over the tosses. The generator learns p(parameters | features) from tosses
simulated with parameters of a wide prior, which is simulation-based inference by a conditional density (Cranmer, Brehmer & Louppe 2020,
doi 10.1073/pnas.1912789117; with diffusion: Geffner, Papamakarios & Mnih 2023, arXiv 2209.14249). Where it is right, the rank of the true
parameter among draws is uniform (Talts et al. 2018, arXiv 1804.06788), which the exam looks at.

Several tosses are combined by conditioning on what they have in common: each group of the training set was simulated with one contact
and as many tosses as are pooled when asked. Groups of a recording are answered each by itself; their posteriors are not multiplied,
since the simulator's own error is shared by all of them.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr
from scipy.special import ndtri

from domains.robotics import tosses
from domains.robotics.tosses import Tosses
from twinsim import metrics
from twinsim import scenario as scenarios
from twinsim.base import (
    Array,
    BadInput,
    Baseline,
    Condition,
    Example,
    Question,
    Rows,
    Sample,
    Score,
    Scores,
    Section,
    Source,
    Spec,
    Statistics,
    Target,
    Variable,
)

CUBE = Tosses((), 148.0, 0.0524, 0.37, 8.1e-4)  # of 10 cm, plastic, recorded at a rate of motion capture: the one that is learnt
ALIKE = 0.1  # how far off it, relatively, the width, mass and inertia of a recorded cube may be
PRIOR = {"friction": (0.05, 0.6), "time_constant": (0.003, 0.03), "damping_ratio": (0.3, 2.0)}  # uniform in the logarithm
LONG = {name: tosses.CONTACT[name] for name in PRIOR}
STEPS = 5  # of the simulator in a frame: half of those of a calibration, enough to tell contacts apart
SEEN = np.array([6, 12, 18, 24, 30, 36, 42, 48, 54, 60, 66, 71])  # frames whose motion is a feature
FRAMES = 72
PER_TOSS = 5 * len(SEEN) + 5
COVERED = 0.9


class ContactScenario(scenarios.Scenario):
    """A question to the posterior.

    Attributes:
      file: recorded tosses beside the scenario, as `tosses.read` reads them; without one, a group of held-out simulated tosses is asked.
      groups: at most so many groups of tosses are asked, evenly spaced.
    """

    file: str | None = None
    groups: int = pydantic.Field(default=8, ge=1, le=1000)

    def files(self) -> list[str]:
        return [self.file] if self.file else []


@dataclass(frozen=True)
class Throws:
    """How simulated tosses begin, and what the recorder adds: normal deviations about a throw by hand, level or slightly up.

    Attributes:
      height, height_spread: of the centre, m. speed, speed_spread: along the ground, m/s. rise_spread: m/s.
      spin: deviation of each component of the angular velocity, rad/s. forward: mean about the axis that rolls forwards, rad/s.
      jitter: of recorded positions, m. turn_jitter: of recorded orientations, rad.
    """

    height: float = 0.14
    height_spread: float = 0.02
    speed: float = 1.1
    speed_spread: float = 0.25
    rise_spread: float = 0.2
    spin: float = 2.0
    forward: float = 2.0
    jitter: float = 3e-4
    turn_jitter: float = 3e-3

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """First states `[count, 13]`."""
        state = np.zeros((count, 13))
        heading = random.uniform(0, 2 * np.pi, count)
        along = np.stack([np.cos(heading), np.sin(heading)], 1)
        q = random.normal(size=(count, 4))
        state[:, 3:7] = q / np.linalg.norm(q, axis=1, keepdims=True)
        state[:, 2] = np.maximum(random.normal(self.height, self.height_spread, count), 1.8 * CUBE.half_width)
        state[:, 7:9] = along * np.maximum(random.normal(self.speed, self.speed_spread, count), 0.2)[:, None]
        state[:, 9] = random.normal(0, self.rise_spread, count)
        spin = random.normal(0, self.spin, (count, 3))
        spin[:, 0] -= self.forward * along[:, 1]
        spin[:, 1] += self.forward * along[:, 0]
        state[:, 10:] = turned(state[:, 3:7] * np.array([1, -1, -1, -1]), spin)  # into the frame of the body
        return state

    def recorded(self, pose: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Poses `[frame, 7]` as a recorder would have them."""
        off = np.column_stack([np.ones(len(pose)), random.normal(0, self.turn_jitter / 2, (len(pose), 3))])
        q = times(pose[:, 3:7], off)
        return np.column_stack([pose[:, :3] + random.normal(0, self.jitter, (len(pose), 3)), q / np.linalg.norm(q, axis=1, keepdims=True)])


@dataclass(frozen=True)
class Simulated:
    """Groups of tosses, each with a contact of its own.

    Attributes:
      parameters: `[group, parameter]`, in the order of PRIOR. features: mean and scatter over the group, `[group, 2 * PER_TOSS]`.
    """

    parameters: np.ndarray
    features: np.ndarray


def simulated(groups: int, pooled: int, seed: int, throws: Throws | None = None) -> Simulated:
    """Groups of `pooled` tosses with parameters of the prior; 2 ms of CPU a toss."""
    random, throws = np.random.default_rng(seed), throws or Throws()
    parameters = physical(random.random((groups, len(PRIOR))))
    starts = throws.draw(groups * pooled, random)
    values = [dict(zip(PRIOR, row, strict=True)) for row in np.repeat(parameters, pooled, 0)]
    poses = tosses.simulate(starts, [FRAMES] * len(starts), CUBE, values, STEPS)
    each = np.stack([features(throws.recorded(pose, random), CUBE) for pose in poses])
    return Simulated(parameters.astype(np.float32), pool(each.reshape(groups, pooled, -1)))


def physical(share: np.ndarray) -> np.ndarray:
    """Parameters at shares of the prior, `[..., parameter]`, 0 to 1."""
    low, high = np.log(np.array(list(PRIOR.values()))).T
    return np.exp(low + (high - low) * share)


def shares(parameters: Array) -> jax.Array:
    """The inverse of `physical`."""
    low, high = np.log(np.array(list(PRIOR.values()), np.float32)).T
    low, high = (jnp.broadcast_to(each, jnp.shape(parameters)) for each in (low, high))
    return (jnp.log(jnp.asarray(parameters)) - low) / (high - low)


def features(pose: np.ndarray, cube: Tosses) -> np.ndarray:
    """What tells contacts apart in a toss `[frame, 7]`, without its place and heading, `[PER_TOSS]`.

    Speeds are in units of sqrt(g w), lengths in widths w: at each frame of SEEN the distance gone, the speed, the height, the rise and the
    spin; and of the whole toss how far, how straight, how bouncing and how steady it was. A cube of another size is not asked for all that:
    its frames are other shares of its fall, and the time constant of its contact scales with nothing.
    """
    width, unit = cube.width, np.sqrt(tosses.GRAVITY * cube.width)
    dt = 1 / cube.rate
    velocity = np.gradient(pose[:, :3], dt, axis=0)
    turn = 2 * np.arccos(np.clip(np.abs((pose[2:, 3:7] * pose[:-2, 3:7]).sum(1)), 0, 1)) / (2 * dt)
    spin = np.concatenate([turn[:1], turn, turn[-1:]])
    start = np.polynomial.polynomial.polyfit(np.arange(5) * dt, pose[:5, :2], 1)[1]  # in the air
    along = start / max(float(np.linalg.norm(start)), 1e-3)
    gone = pose[:, :2] - pose[0, :2]
    speed = velocity[:, :2] @ along
    x, height = gone @ along / width, pose[:, 2] / width
    landed = int(np.argmin(pose[:40, 2]))  # the lowest of the first fall
    whole = [
        np.linalg.norm(start) / unit,
        float(x[-1] * unit**2 / max(float(start @ start), 1e-3)),  # of twice the way that friction 1 would leave
        float(np.linalg.norm(gone[-1] - along * (gone[-1] @ along)) / width),
        float(height[landed:].max() - height[landed]),
        float(np.abs(np.diff(velocity[:, 2])).max() / unit),
    ]
    parts = [x[SEEN], speed[SEEN] / unit, height[SEEN], velocity[SEEN, 2] / unit, spin[SEEN] * width / unit]
    return np.concatenate([*parts, whole]).astype(np.float32)


def pool(each: np.ndarray) -> np.ndarray:
    """Features of groups `[group, toss, PER_TOSS]` -> mean and scatter over their tosses, `[group, 2 * PER_TOSS]`."""
    return np.concatenate([each.mean(1), each.std(1)], -1).astype(np.float32)


def pooled_features(recorded: Tosses, pooled: int, groups: int, where: str) -> np.ndarray:
    """Features of groups of consecutive tosses of a recording, `[group, 2 * PER_TOSS]`. Raises BadInput."""
    long = [state for state in recorded.states if len(state) >= FRAMES]
    count = len(long) // pooled
    if not count:
        raise BadInput(f"{where}: expected at least {pooled} tosses of {FRAMES} frames or more, got {len(long)} of {len(recorded.states)}")
    if abs(recorded.rate / CUBE.rate - 1) > 0.02:
        raise BadInput(f"{where}: expected tosses recorded at {CUBE.rate:g} Hz, as the posterior has learnt them, got {recorded.rate:g} Hz")
    for name, units in (("width", "m"), ("mass", "kg"), ("inertia", "kg m2")):
        got, learnt = getattr(recorded, name), getattr(CUBE, name)
        if abs(got / learnt - 1) > ALIKE:
            raise BadInput(f"{where}: {name}: expected {learnt:g} {units} to {ALIKE:.0%}, the cube that is learnt, got {got:g} {units}")
    chosen = np.unique(np.linspace(0, count - 1, min(groups, count)).round().astype(int))
    return pool(np.stack([[features(long[k * pooled + n][:FRAMES, :7], recorded) for n in range(pooled)] for k in chosen]))


def turned(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors `[..., 3]` turned by unit quaternions `[..., 4]`."""
    w, r = q[..., :1], q[..., 1:]
    return v + 2 * np.cross(r, np.cross(r, v) + w * v)


def times(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Hamilton's product of quaternions `[..., 4]`."""
    w = p[..., :1] * q[..., :1] - (p[..., 1:] * q[..., 1:]).sum(-1, keepdims=True)
    return np.concatenate([w, p[..., :1] * q[..., 1:] + q[..., :1] * p[..., 1:] + np.cross(p[..., 1:], q[..., 1:])], -1)


# ---------------------------------------------------------------- the domain


@dataclass(frozen=True, eq=False)
class Contacts:
    """A twin of what is not known of a contact; a sample is one set of parameters.

    Attributes:
      groups: simulated for training; tested: for the exam. pooled: tosses of a group.
      components: of the features, that the generator sees. seed: of all that is simulated.
    """

    name: str
    groups: int = 1500
    tested: int = 200
    pooled: int = 4
    components: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.groups, self.tested, self.pooled) < 2 or not 1 <= self.components <= min(2 * PER_TOSS, self.groups - 1):
            raise BadInput(
                f"{self.name}: expected at least 2 groups, tested groups and pooled tosses, and 1 to {2 * PER_TOSS} components, fewer than"
                f" groups; got groups={self.groups}, tested={self.tested}, pooled={self.pooled}, components={self.components}"
            )

    # ------------------------------------------------------------ the grid and the truth

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {name: Variable((), LONG[name].units, LONG[name].long_name, lower=low, upper=high) for name, (low, high) in PRIOR.items()}

    @property
    def condition(self) -> Mapping[str, Variable]:
        return {"features": Variable(("feature",), "1", f"motion of {self.pooled} tosses: its mean and its scatter")}

    @cached_property
    def _made(self) -> Mapping[str, Simulated]:
        return {
            "train": simulated(self.groups, self.pooled, 2 * self.seed),
            "test": simulated(self.tested, self.pooled, 2 * self.seed + 1),
        }

    def source(self, split: str) -> Source:
        if split == "validation":
            return Rows(self._rows("test"), np.array([], np.int64))
        if split not in ("train", "test"):
            raise BadInput(f"split {split}: expected train, validation or test")
        return Rows(self._rows(split), np.arange(self.groups if split == "train" else self.tested))

    def _rows(self, split: str) -> Callable[[np.ndarray], tuple[Sample, Condition]]:
        def read(rows: np.ndarray) -> tuple[Sample, Condition]:
            made = self._made[split]
            return {name: made.parameters[rows, n] for n, name in enumerate(PRIOR)}, {"features": made.features[rows]}

        return read

    # ------------------------------------------------------------ what is fitted

    def fit(self) -> Statistics:
        """Mean, scale and leading components of the features, and a linear regression of the normal scores upon them."""
        made = self._made["train"]
        mean, scale = made.features.mean(0), np.maximum(made.features.std(0), 1e-3)
        of_unit = (made.features - mean) / scale
        _, size, axes = np.linalg.svd(of_unit, full_matrices=False)
        axes = axes[: self.components]
        spread = size[: self.components] / np.sqrt(len(of_unit))
        return {
            "mean": mean.astype(np.float32),
            "scale": scale.astype(np.float32),
            "axes": (axes / spread[:, None]).astype(np.float32),
        }

    def spec(self, statistics: Statistics | None = None) -> Spec:
        return Spec((1,), len(PRIOR), 0, self.components, (False,))

    def examples(self, statistics: Statistics) -> Iterator[Example]:
        made = self._made["train"]
        target = normal_scores(made.parameters)[:, None]
        scalars = np.asarray(self._scalars(statistics, made.features), np.float32)
        yield Example(target, np.zeros((len(target), 1, 0), np.float32), scalars)

    def _scalars(self, statistics: Statistics, features: Array) -> jax.Array:
        """Leading components of features `[..., feature]`, of order one; far outside of training they are drawn in."""
        given = jnp.asarray(features)
        mean, scale = (jnp.broadcast_to(jnp.asarray(statistics[name]), given.shape) for name in ("mean", "scale"))
        return 4 * jnp.tanh((given - mean) / scale @ jnp.asarray(statistics["axes"]).T / 4)

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        return jnp.zeros((1, 0)), self._scalars(statistics, condition["features"])

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        """Parameters at the prior's shares that the normal scores stand for: always within the prior."""
        low, high = np.log(np.array(list(PRIOR.values()), np.float32)).T
        values = jnp.exp(low + (high - low) * jax.scipy.special.ndtr(jnp.asarray(target)[0]))
        values = jnp.clip(values, *(np.array(list(PRIOR.values()), np.float32).T))
        return {name: values[n] for n, name in enumerate(PRIOR)}

    # ------------------------------------------------------------ questions and checks

    Scenario: ClassVar[type[scenarios.Scenario]] = ContactScenario

    def ask(self, scenario: ContactScenario, folder: Path) -> Question:
        where = f"scenario {scenario.title!r}"
        notes = ["The posterior takes the simulator for true; what it cannot do shows as parameters that are sure of themselves and wrong."]
        if scenario.file:
            recorded = tosses.read(scenarios.inside(folder, scenario.file))
            asked = pooled_features(recorded, self.pooled, scenario.groups, f"{where}: {scenario.file}")
            seen = self._made["train"].features
            off = np.abs((asked - seen.mean(0)) / np.maximum(seen.std(0), 1e-3)).mean()
            usual = np.abs((seen - seen.mean(0)) / np.maximum(seen.std(0), 1e-3)).mean()
            notes.append(
                f"Features of the file lie {off:.2f} deviations from the mean of simulated ones, which themselves lie {usual:.2f}."
            )
        else:
            asked = self._made["test"].features[: scenario.groups]
            notes.append("No file was given: the tosses are simulated ones that were held out, with contacts drawn from the prior.")
        return Question({"features": asked}, scenario.members, self._coords(len(asked)), scenario.title, notes=notes)

    @staticmethod
    def _coords(count: int) -> dict[str, Any]:
        return {"group": ("group", np.arange(count), {"long_name": "group of tosses of one cube"})}

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        rows = np.arange(self.tested)
        if most and len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        truth, condition = self.source("test")[rows]
        title = f"{self.name}: {len(rows)} groups of held-out simulated tosses"
        return Question(condition, members, self._coords(len(rows)), title), truth

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: the simulator has spoken in training."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        """How far a parameter lies beyond the prior, as a share of its bound."""
        rules = {}
        for name, (low, high) in PRIOR.items():
            value = jnp.asarray(sample[name])
            rules[f"{name} beyond its prior, of the bound"] = jnp.maximum(jnp.maximum(low - value, value - high) / high - 1e-6, 0.0)
        return rules

    # ------------------------------------------------------------ judges

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        return {"prior": _prior, "linear": self._linear(statistics), "nearest": self._nearest(statistics)}

    def _linear(self, statistics: Statistics) -> Baseline:
        """Normal scores by linear regression on the components, with its residuals as a Gaussian."""
        made = self._made["train"]
        design = _with_one(np.asarray(self._scalars(statistics, made.features)))
        scores = normal_scores(made.parameters)
        weights = np.linalg.lstsq(design, scores, rcond=None)[0]
        root = np.linalg.cholesky(np.cov((scores - design @ weights).T) + 1e-9 * np.eye(len(PRIOR)))

        def draw(condition: Condition, members: int, seed: int) -> Sample:
            mean = _with_one(np.asarray(self._scalars(statistics, condition["features"]))) @ weights
            noise = np.random.default_rng(seed).normal(size=(members, *mean.shape)) @ root.T
            return _named(physical(np.asarray(jax.scipy.special.ndtr(mean + noise))))

        return draw

    def _nearest(self, statistics: Statistics) -> Baseline:
        """Rejection: the parameters of the 2 % of simulated groups whose components are nearest (approximate Bayesian computation)."""
        made = self._made["train"]
        known = np.asarray(self._scalars(statistics, made.features))
        kept = max(5, len(known) // 50)

        def draw(condition: Condition, members: int, seed: int) -> Sample:
            random = np.random.default_rng(seed)
            asked = np.asarray(self._scalars(statistics, condition["features"]))
            apart = (known**2).sum(1)[None] - 2 * asked @ known.T
            near = np.argpartition(apart, kept, axis=1)[:, :kept]
            chosen = np.take_along_axis(near, random.integers(0, kept, (len(asked), members)), 1)
            return _named(made.parameters[chosen.T])

        return draw

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        """CRPS of ln(parameter), coverage of the 90 % interval, and how uneven the ranks of the truth are."""
        table: dict[str, Score] = {}
        curves: dict[str, np.ndarray] = {}
        for name in PRIOR:
            drawn, true = (np.log(np.asarray(values[name], np.float64)) for values in (generated, truth))
            low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2], axis=0, method="weibull")
            covered = ((low <= true) & (true <= high)).astype(float)
            table[f"{name}: CRPS of the logarithm"] = metrics.interval(metrics.crps(drawn, true), block=1)
            table[f"{name}: truth within the 90 % interval"] = metrics.interval(covered, block=1, ideal=COVERED)
            width = metrics.interval(high - low, block=1)
            table[f"{name}: width of the 90 % interval of the logarithm"] = width
            curves[f"ranks/{name}"] = np.bincount((drawn < true).sum(0), minlength=len(drawn) + 1).astype(float)
        return Scores(table, curves)

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """None: simulated tosses are nobody's."""
        return None

    # ------------------------------------------------------------ what is delivered

    def write(self, **_: Any) -> None:
        """Nothing: Zarr and NetCDF are all there is."""

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        count = len(np.asarray(samples["friction"]))
        realization = ("member", np.arange(count), {"standard_name": "realization", "long_name": "member", "units": "1"})
        variables = {
            name: (("member", "group"), np.asarray(samples[name]), {"units": about.units, "long_name": f"synthetic {about.long_name}"})
            for name, about in self.sample.items()
        }
        return xr.Dataset(variables, {**question.coords, "member": realization})

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        text = tosses.scene(CUBE, tosses.DEFAULT).encode()
        return [
            {
                "name": "the simulated cube",
                "place": "domains/robotics/tosses.py",
                "licence": "Apache-2.0",
                "sha256": hashlib.sha256(text).hexdigest(),
                "size": len(text),
            }
        ]

    @property
    def licence(self) -> str:
        return "Apache-2.0"

    @property
    def limits(self) -> Sequence[str]:
        return [
            "The truth is MuJoCo's soft contact of a rigid cube on a rigid plane, with throws and a recorder that are assumed.",
            f"Nothing beyond the prior is ever found: {', '.join(f'{name} {low:g} to {high:g}' for name, (low, high) in PRIOR.items())}.",
            f"One cube is known, of {CUBE.width:g} m and {CUBE.mass:g} kg.",
            "Groups of tosses are answered each by itself: agreement between them is a check, not more evidence.",
        ]

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        parts = []
        for name in PRIOR:
            low, middle, high = np.quantile(dataset[name].values, [0.05, 0.5, 0.95])
            parts.append(f"{name.replace('_', ' ')} {middle:.3g} {self.sample[name].units} (90 % of draws within {low:.3g} to {high:.3g})")
        return f"{dataset.sizes['group']} groups of {self.pooled} tosses: {'; '.join(parts)}.".replace(" 1 (", " (")

    def sections(
        self, *, asked: Any, question: Question, dataset: xr.Dataset, rules: Mapping[str, Any], evaluation: Any
    ) -> Sequence[Section]:
        rows = [["Group", *(f"{name.replace('_', ' ')}, {about.units}" for name, about in self.sample.items())]]
        for group in range(min(dataset.sizes["group"], 40)):
            cells = []
            for name in PRIOR:
                low, middle, high = np.quantile(dataset[name].values[:, group], [0.05, 0.5, 0.95])
                cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
            rows.append([str(group), *cells])
        text = [asked.asks, f"To expect: {asked.expect.strip()}", *question.notes]
        caption = "Draws of each group of tosses: friction against the time constant of the contact, within the prior"
        return [Section("What was asked", text, {"Median and 90 % of draws by group": rows}, {caption: _picture(dataset)})]


def normal_scores(parameters: np.ndarray) -> np.ndarray:
    """Of parameters `[..., parameter]` within the prior: standard normal over it."""
    return np.asarray(ndtri(np.clip(np.asarray(shares(parameters)), 1e-4, 1 - 1e-4)), np.float32)


def _prior(condition: Condition, members: int, seed: int) -> Sample:
    return _named(physical(np.random.default_rng(seed).random((members, len(condition["features"]), len(PRIOR)))))


def _named(parameters: np.ndarray) -> Sample:
    return {name: parameters[..., n].astype(np.float32) for n, name in enumerate(PRIOR)}


def _with_one(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((*x.shape[:-1], 1)), x, x**2], -1)


def _picture(dataset: xr.Dataset) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for group in range(min(dataset.sizes["group"], 8)):
        axes.scatter(
            dataset["friction"].values[:, group], dataset["time_constant"].values[:, group], s=6, alpha=0.6, label=f"group {group}"
        )
    axes.set(xlim=PRIOR["friction"], ylim=PRIOR["time_constant"], yscale="log", xlabel="friction", ylabel="time constant of the contact, s")
    axes.legend(frameon=False, fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None, "Title": "synthetic data, generated by twinsim"})
    return out.getvalue()


if TYPE_CHECKING:  # the type checker proves that a Contacts keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Contacts
