"""The vocabulary of twinsim: what a variable, a sample, a condition, a domain, a generator and a question are.

Shapes are written for one sample; `n` is a leading axis of many. Physical arrays are in the units of their `Variable`;
an `Example` is what a generator sees of them: normalised, without names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np

if TYPE_CHECKING:
    import xarray as xr

    from twinsim import scenario as scenarios

Array = jax.Array | np.ndarray
Sample = Mapping[str, Array]  # variable name -> physical values, e.g. `[lat, lon]`
Condition = Mapping[str, Array]  # name -> physical values a sample depends on, scalars or fields
Statistics = Mapping[str, Any]  # pytree of arrays fitted on the training split; kept beside the checkpoint
Target = Array  # `[*grid, channel]`, normalised: zero mean, unit variance by construction


class BadInput(ValueError):
    """Something from outside is wrong. The message is one sentence: what, where, what was expected."""


def makes_data(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function of the configuration that may simulate for hours and write what it made: a plan does not call it."""
    vars(function)["makes_data"] = True
    return function


@dataclass(frozen=True)
class Variable:
    """A named physical quantity.

    Attributes:
      dims: names of its axes, `("lat", "lon")`; empty for a scalar.
      units: UDUNITS string, "K".
      lower, upper: hard physical bounds in `units`; a value beyond them is a broken law, not an outlier.
    """

    dims: tuple[str, ...]
    units: str
    long_name: str
    standard_name: str = ""
    lower: float = -np.inf
    upper: float = np.inf
    cell_methods: str = ""


class Example(NamedTuple):
    """One training example as the generator sees it.

    Attributes:
      target: what is generated, `[*grid, channel]`.
      fields: conditions on the same grid, `[*grid, field]`; the last axis may be 0.
      scalars: conditions without a grid, `[scalar]`; may be 0.
    """

    target: Target
    fields: Array
    scalars: Array


class Spec(NamedTuple):
    """The shape of an `Example`, and which grid axes close on themselves."""

    grid: tuple[int, ...]
    channels: int
    fields: int
    scalars: int
    periodic: tuple[bool, ...]


class Source(Protocol):
    """True samples, recorded or simulated, in order."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> tuple[Sample, Condition]:
        """Samples and conditions with a leading axis over `rows`."""
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """A `Source` whose samples are read by their position.

    Attributes:
      read: positions `[n]` -> samples and conditions `[n, ...]`.
      positions: of the samples, in order.
    """

    read: Callable[[np.ndarray], tuple[Sample, Condition]]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, rows: slice | np.ndarray) -> tuple[Sample, Condition]:
        return self.read(self.positions[rows])


# ---------------------------------------------------------------- constraints a scenario imposes while sampling


@dataclass(frozen=True)
class Observation:
    """`operator(target)` was observed to be `value`, with independent Gaussian errors of `noise_std`.

    Attributes:
      operator: maps a `Target` to observed quantities, `[m]`; differentiable.
      value, noise_std: `[m]`.
    """

    operator: Callable[[Target], Array]
    value: Array
    noise_std: Array


@dataclass(frozen=True)
class Exceedance:
    """`functional(target)` is at least `threshold`; `functional` returns a scalar and is differentiable."""

    functional: Callable[[Target], Array]
    threshold: Array


@dataclass(frozen=True)
class Bounds:
    """Every value of the target lies between `lower` and `upper` (broadcastable to the target)."""

    lower: Array
    upper: Array


Constraint = Observation | Exceedance | Bounds


@dataclass(frozen=True)
class Question:
    """A scenario in a domain's terms: what to draw.

    Attributes:
      condition: name -> values for each item of one member, `[item, ...]` (items are days, hours, ...).
      members: how many draws of the whole item axis.
      coords: coordinates of the output, among them the item axis (a `time`).
      title: one line that says what is asked.
      constrain: `(decode, condition) -> constraints` of one item; None where nothing is imposed.
      misses: `(sample, condition) -> ` how far a finished sample is from what is imposed; 0 = it holds.
      notes: what a reader of the answer must know.
      unroll: `(propose, condition, key) -> ` an outcome that is made of many draws, each given what came of the ones before;
        `propose(condition, key)` is one draw as a sample. None where one draw is simulated by the domain and that is all.
    """

    condition: Condition
    members: int
    coords: Mapping[str, Any]
    title: str
    constrain: Callable[[Callable[[Target], Sample], Condition], Sequence[Constraint]] | None = None
    misses: Callable[[Sample, Condition], Array] | None = None
    notes: Sequence[str] = ()
    unroll: "Callable[[Propose, Condition, Array], Sample] | None" = field(default=None, kw_only=True)


Propose = Callable[[Condition, Array], Sample]  # condition, key -> one draw of the generator, decoded


# ---------------------------------------------------------------- scores


@dataclass(frozen=True)
class Score:
    """One figure of merit with its interval.

    Attributes:
      value: the score; `low`, `high`: its 95 % bootstrap interval, NaN where none can be given.
      ideal: the value that a perfect generator tends to with endless draws and truth; NaN where there is none.
      units: of `value`.
    """

    value: float
    ideal: float = 0.0
    units: str = ""
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True)
class Scores:
    """What a generator earns on held-out truth.

    Attributes:
      table: `"variable: metric"` -> Score; the names are the same for the model and its baselines, the engine adds its own.
      curves: arrays behind the pictures, `"spectrum/tas"` -> 1-D or 2-D array.
    """

    table: dict[str, Score]
    curves: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """A part of a report: a heading, paragraphs, tables and pictures.

    Attributes:
      text: paragraphs, plain text.
      tables: caption -> rows; the first row is the heading.
      figures: caption -> an SVG or PNG picture; the caption says in words what the picture shows.
    """

    title: str
    text: Sequence[str] = ()
    tables: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    figures: Mapping[str, bytes] = field(default_factory=dict)


# ---------------------------------------------------------------- the two protocols


class Domain(Protocol):
    """A system: its samples, its truth, its physics and its judges. Names no generator.

    `encode`, `decode`, `simulate` and `check` are written for one sample, are pure and can be traced; the engine maps them
    over many. Everything else runs on the host and may take `n` samples at once.
    """

    Scenario: ClassVar[type["scenarios.Scenario"]]  # the schema of this domain's scenario files

    # ---- what it is

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells of one variable."""
        ...

    @property
    def sample(self) -> Mapping[str, Variable]: ...

    @property
    def condition(self) -> Mapping[str, Variable]: ...

    @property
    def licence(self) -> str:
        """Of what is made from the truth."""
        ...

    @property
    def limits(self) -> Sequence[str]:
        """What this twin cannot tell, a sentence each, for the report."""
        ...

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """The files the truth came from: `name`, `place`, `licence`, `sha256`, `size` in bytes."""
        ...

    # ---- truth, and what is estimated from it

    def source(self, split: str) -> Source:
        """Truth of the split "train", "validation" or "test". Raises BadInput."""
        ...

    def fit(self) -> Statistics:
        """Everything that is estimated from the training split: means, scales, regressions."""
        ...

    def spec(self, statistics: Statistics | None = None) -> Spec:
        """The shape of an example; without statistics, which may take long to fit, the largest that it can come to be."""
        ...

    def examples(self, statistics: Statistics) -> Iterator[Example]:
        """Training examples in order, in blocks `[n, ...]`; what is predicted for them is predicted out of fold."""
        ...

    # ---- one sample

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        """Fields `[*grid, field]` and scalars `[scalar]` of one condition."""
        ...

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        """The physical sample a target stands for; differentiable."""
        ...

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """What the physics makes of a sample, which is what gets checked and written; the identity where nothing is stepped on."""
        ...

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        """Each physical rule -> how far it is broken, in the rule's unit; 0 = kept."""
        ...

    # ---- questions

    def ask(self, scenario: Any, folder: Path) -> Question:
        """A checked `Scenario` in this domain's terms; files it names lie in `folder`. Raises BadInput."""
        ...

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        """The held-out test as a question of at most `most` items, and its true answer `[n, ...]`."""
        ...

    # ---- judges

    def baselines(self, statistics: Statistics) -> "Mapping[str, Baseline]":
        """Reference generators, fitted on the training split."""
        ...

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        """Judges `generated` `[member, n, ...]` by `truth` `[n, ...]`; the same table for the model and its baselines."""
        ...

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """How well samples betray which data the model saw: an AUC, 0.5 = not at all; None where no fair test exists.

        `generated` and `truth` are those of the exam; `ask` draws the answer to a further question.
        """
        ...

    # ---- what is delivered

    def dataset_of(self, samples: Sample, question: Question) -> "xr.Dataset":
        """Generated samples `[member, item, ...]` with names, units and coordinates."""
        ...

    def write(self, *, asked: Any, question: Question, dataset: "xr.Dataset", folder: Path) -> None:
        """The formats of the field that the scenario `asked` for, beside Zarr and NetCDF, which the engine writes."""
        ...

    def summary(self, question: Question, dataset: "xr.Dataset") -> str:
        """The answer in a sentence or two."""
        ...

    def sections(
        self, *, asked: Any, question: Question, dataset: "xr.Dataset", rules: Mapping[str, Any], evaluation: Any
    ) -> Sequence[Section]:
        """The domain's part of the report.

        Args:
          asked: the checked scenario.
          rules: physical rule -> how far each draw breaks it, `[member, item]`.
          evaluation: `scores` and `examples` (a few samples to look at) by competitor: the model, the baselines, "truth".
        """
        ...


class Baseline(Protocol):
    """A reference generator: draws samples without having been trained by the engine."""

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        """Samples `[member, n, ...]` for conditions `[n, ...]`."""
        ...


class Generator(Protocol):
    """A flax nnx module that learns p(target | fields, scalars). Written for one example."""

    def loss(self, example: Example, key: Array) -> Array:
        """Training loss of one example, a scalar."""
        ...

    def sample(self, fields: Array, scalars: Array, key: Array, constraints: Sequence[Constraint] = ()) -> Target:
        """One draw."""
        ...
