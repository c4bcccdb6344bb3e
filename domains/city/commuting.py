"""The commuting domain: whole matrices of trips between the zones of a region, drawn as they could be, given what is known of its zones.

A regression predicts the trips of every pair (`pairwise`); what the generator learns is how real matrices scatter about that: each pair's
rank among training pairs of like prediction, as a standard normal score. The regression is fitted out of fold, so the scatter is that of
regions it has not seen. A draw is whole: a destination that draws more than expected does so for all its origins, as far as the
generator has learnt it.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import xarray as xr
from scipy.special import ndtr, ndtri

from domains.city import demand, pairwise, regions
from domains.city.pairwise import Blocks
from domains.city.regions import Cut, Region, Regions
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

TRIPS, TOTAL = "trips", "total"
LEVELS = np.linspace(-4.0, 4.0, 65)  # normal scores at which the quantiles of the scatter are kept
SHARES = 24  # classes of predicted trips, each with a scatter of its own
FEWEST_PAIRS = 200  # of a class
FEWEST = 1e-2  # trips: below, all predictions count as alike
ROUNDING = 1e-5  # of the total: what float32 sums of a block lose
FIELDS = 4


class CommutingScenario(scenarios.Scenario):
    """A question to a twin of commuting.

    Attributes:
      regions: names of held-out regions; all of them where there are none.
      file: an .npz of other regions beside the scenario, as `regions.recorded` reads it; trips are not needed.
      total: trips a day in each region asked for, which every draw then has exactly; as many as come where it is left out.
    """

    regions: list[str] = pydantic.Field(default=[], max_length=1000)
    file: str | None = None
    total: float | None = pydantic.Field(default=None, gt=0, le=1e8)

    def files(self) -> list[str]:
        return [self.file] if self.file else []


@dataclass(frozen=True, eq=False)
class Commuting:
    """A twin of commuting; its samples are blocks of regions, `[origin, destination]`, filled up with zeros.

    Attributes:
      dataset: the regions.
      size: most origins, and most destinations, of a block.
      folds: region number i, in the order of names, belongs to fold i mod `folds`; fold `held_out` is the test, the others are also
        the folds of what is predicted out of fold.
      regression: how the network behind the prediction is fitted.
    """

    name: str
    dataset: Regions
    size: int = 32
    folds: int = 5
    held_out: int = 0
    regression: pairwise.Fit = field(default_factory=pairwise.Fit)

    def __post_init__(self) -> None:
        count = len(self.dataset.regions)
        if not (3 <= self.folds <= count and 0 <= self.held_out < self.folds):
            raise BadInput(
                f"{self.name}: expected 3 to {count} folds, as there are {count} regions, and one of them held out,"
                f" got folds={self.folds}, held_out={self.held_out}"
            )
        if self.size < 2:
            raise BadInput(f"{self.name}: size: expected blocks of at least 2 zones, got {self.size}")
        if nameless := [region.name for region in self.dataset.regions if region.trips is None or not region.trips.sum() > 0]:
            raise BadInput(f"region {nameless[0]}: expected trips to learn from, got none")

    # ------------------------------------------------------------ the grid and the truth

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    @property
    def sample(self) -> Mapping[str, Variable]:
        return {TRIPS: Variable(("origin", "destination"), "day-1", "trips from a zone to a zone", lower=0.0)}

    @property
    def condition(self) -> Mapping[str, Variable]:
        zone = "logarithms of what is counted in a zone, and how near others are"
        return {
            "origin": Variable(("origin", "feature"), "1", zone),
            "destination": Variable(("destination", "feature"), "1", zone),
            "region": Variable(("known",), "1", "means over the zones of the region, and its size"),
            "pair": Variable(("origin", "destination", "way"), "1", "distance, and what lies between"),
            "people": Variable(("origin",), "1", "people in a zone"),
            "within": Variable(("origin", "destination"), "1", "1 where there is a pair of zones, 0 where the grid is filled up"),
            TOTAL: Variable((), "day-1", "trips in the block, 0 for as many as come"),
        }

    @cached_property
    def cut(self) -> Cut:
        """All regions in blocks."""
        return regions.cut(self.dataset.regions, self.size)

    def rows(self, split: str) -> np.ndarray:
        """Positions of a split's blocks. Raises BadInput."""
        fold = self.cut.region % self.folds
        if split == "validation":
            return np.array([], np.int64)
        if split not in ("train", "test"):
            raise BadInput(f"split {split}: expected train, validation or test")
        return np.flatnonzero((fold == self.held_out) == (split == "test"))

    def truth(self, rows: np.ndarray) -> Sample:
        """Recorded trips of some blocks, `[n, origin, destination]`."""
        return {TRIPS: self.cut.trips[rows]}

    def conditions(self, cut: Cut, totals: np.ndarray) -> Condition:
        """Conditions of blocks `[n, ...]`, given the trips in each, `[n]`."""
        parts = {name: np.asarray(part, np.float32) for name, part in cut.blocks._asdict().items()}
        return {**parts, TOTAL: np.asarray(totals, np.float32)}

    def source(self, split: str) -> Source:
        return Rows(self._recorded, self.rows(split))

    def _recorded(self, blocks: np.ndarray) -> tuple[Sample, Condition]:
        sample = self.truth(blocks)
        return sample, self.conditions(self.cut.rows(blocks), np.asarray(sample[TRIPS]).sum((1, 2)))

    # ------------------------------------------------------------ what is fitted

    def fit(self) -> Statistics:
        """The regression on all training regions and without each fold; the scatter about what is predicted out of fold."""
        rows = self.rows("train")
        folds = {str(fold): self._regression(rows[self._fold(rows) != fold]) for fold in np.unique(self._fold(rows))}
        of_all = self._regression(rows)
        statistics: dict[str, Any] = {"all": of_all, "folds": folds}
        trips = self.cut.trips[rows]
        mean = self._out_of_fold(statistics, rows)
        total = np.log1p(trips.sum((1, 2)))
        zones = self.cut.blocks.region[rows][:, -regions.KNOWN]
        scalars = np.stack([total, zones], 1)
        statistics["scalars"] = {"mean": scalars.mean(0), "scale": np.maximum(scalars.std(0), 0.1).astype(np.float32)}
        statistics["scatter"] = self._scatter(mean, trips, np.asarray(self.cut.blocks.within)[rows] > 0)
        return statistics

    def _fold(self, rows: np.ndarray) -> np.ndarray:
        return self.cut.region[rows] % self.folds

    def _regression(self, rows: np.ndarray) -> pairwise.Parameters:
        part = self.cut.rows(rows)
        of_region = np.bincount(part.region, part.trips.sum((1, 2)))
        return pairwise.fit(part.blocks, part.trips, 1 / of_region[part.region], self.regression)

    def _out_of_fold(self, statistics: Statistics, rows: np.ndarray) -> np.ndarray:
        """Trips predicted by the regression that has not seen the block's region, scaled to its total, `[n, origin, destination]`."""
        mean = np.zeros((len(rows), *self.shape), np.float32)
        for fold, parameters in statistics["folds"].items():
            own = np.flatnonzero(self._fold(rows) == int(fold))
            mean[own] = predicted(parameters, self.cut.rows(rows[own]).blocks)
        given = self.cut.trips[rows].sum((1, 2))
        scale = np.where(given > 0, given / np.maximum(mean.sum((1, 2)), 1e-6), 1)
        return (mean * scale[:, None, None]).astype(np.float32)

    def _scatter(self, mean: np.ndarray, trips: np.ndarray, within: np.ndarray) -> dict[str, np.ndarray]:
        """Quantiles of ln(1 + trips) - ln(1 + predicted) by class of ln predicted, `[class, level]`."""
        x, y = np.log(np.maximum(mean[within], FEWEST)), (self._dithered(trips) - np.log1p(mean))[within]
        order = np.argsort(x, kind="stable")
        classes = np.array_split(order, int(np.clip(len(x) // FEWEST_PAIRS, 1, SHARES)))
        at = np.maximum.accumulate(np.array([x[part].mean() for part in classes]) + 1e-4 * np.arange(len(classes)))
        rising = np.stack([_quantiles(y[part]) for part in classes]) + 1e-3 * LEVELS  # strictly, so that there is an inverse
        return {"at": at.astype(np.float32), "quantiles": rising.astype(np.float32)}

    @staticmethod
    def _dithered(trips: np.ndarray) -> np.ndarray:
        """ln(1 + trips), each count spread evenly over half a trip either way, so that there are as many ranks as pairs."""
        return np.log1p(trips + np.random.default_rng(0).uniform(-0.49, 0.49, trips.shape))

    # ------------------------------------------------------------ examples

    def spec(self, statistics: Statistics | None = None) -> Spec:
        return Spec(self.shape, 1, FIELDS, 2, (False, False))

    def examples(self, statistics: Statistics) -> Iterator[Example]:
        rows = self.rows("train")
        for part in np.array_split(rows, max(1, len(rows) // 64)):
            yield self._examples(statistics, part)

    def _examples(self, statistics: Statistics, rows: np.ndarray) -> Example:
        mean, trips = self._out_of_fold(statistics, rows), self.cut.trips[rows]
        cut = self.cut.rows(rows)
        total = trips.sum((1, 2))
        score = np.stack([_score(statistics["scatter"], m, y) for m, y in zip(mean, self._dithered(trips), strict=True)])
        within = np.asarray(cut.blocks.within)
        fields = np.asarray(self._fields(mean, cut.blocks), np.float32)
        scalars = np.asarray(self._scalars(statistics, total, cut.blocks), np.float32)
        return Example((score * within)[..., None].astype(np.float32), fields, scalars)

    def _fields(self, mean: Array, block: Blocks) -> Array:
        """What the network sees of each pair, `[..., origin, destination, field]`, of order one."""
        way = jnp.asarray(block.pair)
        shown = [jnp.log1p(mean) / 2 - 1, way[..., regions.LN_DISTANCE] / 2 - 1, way[..., regions.SAME], jnp.asarray(block.within)]
        return jnp.stack([part * block.within for part in shown], -1)

    def _scalars(self, statistics: Statistics, total: Array, block: Blocks) -> Array:
        """Of one block or of many, `[..., 2]`."""
        raw = jnp.stack([jnp.log1p(jnp.asarray(total)), jnp.asarray(block.region)[..., -regions.KNOWN]], -1)
        mean, scale = (jnp.broadcast_to(statistics["scalars"][name], raw.shape) for name in ("mean", "scale"))
        return (raw - mean) / scale

    def _expected(self, statistics: Statistics, condition: Condition) -> jax.Array:
        """Predicted trips, scaled to the total where one is given."""
        mean = pairwise.expected(statistics["all"], _block(condition))
        given, own = jnp.asarray(condition[TOTAL]), jnp.maximum(mean.sum(), 1e-6)
        return mean * jnp.where(given > 0, given / own, jnp.ones_like(own))

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        mean = self._expected(statistics, condition)
        block = _block(condition)
        return self._fields(mean, block), self._scalars(statistics, mean.sum(), block)

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        """Whole trips, then scaled to the total where one is given; the gradient is that of the unrounded ones."""
        mean = self._expected(statistics, condition)
        scatter = statistics["scatter"]
        level = (jnp.asarray(target)[..., 0] - float(LEVELS[0])) / float(LEVELS[1] - LEVELS[0])
        at = _position(scatter["at"], mean)
        trips = jnp.expm1(_bilinear(jnp.asarray(scatter["quantiles"]), at, level) + jnp.log1p(mean))
        trips = jnp.maximum(trips + jax.lax.stop_gradient(jnp.round(trips) - trips), 0.0) * jnp.asarray(condition["within"])
        given, drawn = jnp.asarray(condition[TOTAL]), trips.sum()
        scaled = jnp.where(drawn > 0, trips * (given / jnp.maximum(drawn, 1.0)), mean)
        return {TRIPS: jnp.where(given > 0, scaled, trips)}

    # ------------------------------------------------------------ questions and checks

    Scenario: ClassVar[type[scenarios.Scenario]] = CommutingScenario

    def ask(self, scenario: CommutingScenario, folder: Path) -> Question:
        where = f"scenario {scenario.title!r}"
        if scenario.file:
            found = regions.recorded(str(scenarios.inside(folder, scenario.file)), trips=False).regions
            ours = self.dataset.regions[0].features.shape[1]
            if found[0].features.shape[1] != ours:
                raise BadInput(f"{where}: {scenario.file}: expected {ours + 1} features a zone, got {found[0].features.shape[1] + 1}")
        else:
            found = [each for index, each in enumerate(self.dataset.regions) if index % self.folds == self.held_out]
        names = {each.name: each for each in found}
        if unknown := [name for name in scenario.regions if name not in names]:
            raise BadInput(f"{where}: region {unknown[0]}: expected some of {', '.join(list(names)[:20])}")
        chosen = [names[name] for name in scenario.regions] or list(found)
        if scenario.total is not None and (large := [each for each in chosen if each.zones > self.size]):
            raise BadInput(f"{where}: total: expected regions of at most {self.size} zones, {large[0].name} has {large[0].zones}")
        cut = regions.cut(chosen, self.size)
        condition = self.conditions(cut, np.full(len(cut.region), scenario.total or 0.0))
        notes = [] if scenario.total else ["No total was given: how many trips there are is as expected of such zones."]
        return Question(condition, scenario.members, self._coords(cut, chosen), scenario.title, notes=notes)

    def _coords(self, cut: Cut, found: Sequence[Region]) -> dict[str, Any]:
        names = " ".join(region.name.replace(" ", "_") for region in found)
        return {
            "block": ("block", np.arange(len(cut.region))),
            "region": (
                "block",
                cut.region.astype(np.int32),
                {"flag_values": np.arange(len(found), dtype=np.int32), "flag_meanings": names},
            ),
            "origin_zone": (("block", "origin"), cut.origins),
            "destination_zone": (("block", "destination"), cut.destinations),
        }

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        """Blocks of the held-out regions with their totals given; at most `most`, evenly spaced."""
        rows = self.rows("test")
        if most and len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        truth, cut = self.truth(rows), self.cut.rows(rows)
        title = f"{self.name}: {len(rows)} blocks of the held-out regions"
        condition = self.conditions(cut, np.asarray(truth[TRIPS]).sum((1, 2)))
        return Question(condition, members, self._coords(cut, self.dataset.regions), title), truth

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: a matrix is judged by `check`, not stepped on."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        trips, given = jnp.asarray(sample[TRIPS]), jnp.asarray(condition[TOTAL])
        apart = jnp.abs(trips.sum() - given)
        return {
            "trips below 0 a day": jnp.maximum(-trips.min(), 0.0),
            "trips where there is no zone, a day": jnp.max(jnp.abs(trips) * (1 - jnp.asarray(condition["within"]))),
            "total of trips, a day off": jnp.where(given > 0, jnp.maximum(apart - ROUNDING * given, 0.0), jnp.zeros_like(given)),
        }

    # ------------------------------------------------------------ judges

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        return {"gravity": self._gravity(), "each pair on its own": self._apart(statistics)}

    def _gravity(self) -> Baseline:
        """Poisson trips about a gravity model whose exponents are likeliest on the training regions."""
        part = self.cut.rows(self.rows("train"))
        inside = np.asarray(part.blocks.within) > 0
        exponents = demand.poisson_regression(_gravity_features(part.blocks)[inside], part.trips[inside])

        def draw(condition: Condition, members: int, seed: int) -> Sample:
            mean = np.exp(np.clip(_gravity_features(_block(condition)) @ exponents, -20, 12)) * np.asarray(condition["within"])
            mean = _to_totals(mean, np.asarray(condition[TOTAL]))
            drawn = np.random.default_rng(seed).poisson(mean, (members, *mean.shape)).astype(np.float32)
            return {TRIPS: _to_totals(drawn, np.asarray(condition[TOTAL]))}

        return draw

    def _apart(self, statistics: Statistics) -> Baseline:
        """The same prediction and scatter, every pair drawn without regard to the others."""
        decode = jax.jit(jax.vmap(self.decode, (None, 0, 0)))

        def draw(condition: Condition, members: int, seed: int) -> Sample:
            noise = np.random.default_rng(seed)
            count = len(condition[TOTAL])
            each = [decode(statistics, noise.normal(size=(count, *self.shape, 1)).astype(np.float32), condition) for _ in range(members)]
            return {TRIPS: np.stack([np.asarray(one[TRIPS]) for one in each])}

        return draw

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        drawn, true = np.asarray(generated[TRIPS], np.float64), np.asarray(truth[TRIPS], np.float64)
        mean = drawn.mean(0)
        table: dict[str, Score] = {}

        def judged(name: str, values: Sequence[float] | np.ndarray, ideal: float = 0.0, units: str = "") -> None:
            table[f"{TRIPS}: {name}"] = metrics.interval(np.asarray(values, np.float64), block=1, ideal=ideal, units=units)

        few = drawn[: min(len(drawn), 8)]
        told = [index for index in range(len(true)) if true[index].sum() > 0 and (drawn[:, index].sum((1, 2)) > 0).all()]
        judged("CPC of the mean", [demand.cpc(mean[n], true[n]) for n in range(len(true))], 1.0)
        judged("CPC of a draw", [float(np.mean([demand.cpc(one[n], true[n]) for one in few])) for n in range(len(true))], 1.0)
        judged("CRPS", metrics.crps(drawn, true), units="day-1")
        for name, axis in (("departures", 2), ("arrivals", 1)):
            judged(f"energy score of {name}", metrics.energy_score(drawn.sum(axis + 1), true.sum(axis)), units="day-1")
        judged("JSD of a draw", [float(np.mean([demand.jsd(one[n], true[n]) for one in few])) for n in told] or [np.nan], units="bit")
        inside = np.asarray(condition["within"]) > 0
        zero = [[float((x == 0).mean()) for x in (few[:, n][:, inside[n]], true[n][inside[n]])] for n in range(len(true))]
        judged("share of empty pairs, drawn - true", [a - b for a, b in zero])
        return Scores(table)

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """None: a draw lies about a prediction, whose error on training regions tells nothing of the generator."""
        return None

    # ------------------------------------------------------------ what is delivered

    def write(self, **_: Any) -> None:
        """Nothing: Zarr and NetCDF are all there is."""

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        variable = self.sample[TRIPS]
        attrs = {"units": variable.units, "long_name": f"synthetic {variable.long_name}"}
        values = np.asarray(samples[TRIPS])
        realization = ("member", np.arange(len(values)), {"standard_name": "realization", "long_name": "member", "units": "1"})
        coords = {**question.coords, "member": realization}
        return xr.Dataset({TRIPS: (("member", "block", "origin", "destination"), values, attrs)}, coords)

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        return self.dataset.files

    @property
    def licence(self) -> str:
        return self.dataset.licence

    @property
    def limits(self) -> Sequence[str]:
        return [
            f"The truth is {self.dataset.source}; its errors are learnt with it.",
            "Trips that leave the region or come from outside are not represented.",
            f"Regions of more than {self.size} zones are drawn in blocks that know of each other by expectation alone.",
            "Whether samples give away training regions is not tested.",
        ]

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        totals = dataset[TRIPS].sum(("block", "origin", "destination")).values
        within = np.asarray(question.condition["within"]).sum()
        return (
            f"{len(np.unique(dataset['region'].values))} regions with {totals.mean():,.0f} trips a day"
            f" ({totals.min():,.0f} to {totals.max():,.0f} among members) between {within:,.0f} pairs of zones."
        )

    def sections(
        self, *, asked: Any, question: Question, dataset: xr.Dataset, rules: Mapping[str, Any], evaluation: Any
    ) -> Sequence[Section]:
        by_region = dataset[TRIPS].sum(("origin", "destination")).groupby("region").sum()
        names = str(dataset["region"].attrs["flag_meanings"]).split()
        rows = [["Region", "Trips a day, mean", "Least", "Most"]]
        for index, total in zip(by_region["region"].values, by_region.transpose("region", "member").values, strict=True):
            rows.append([names[index], f"{total.mean():,.0f}", f"{total.min():,.0f}", f"{total.max():,.0f}"])
        text = [asked.asks, f"To expect: {asked.expect.strip()}"]
        caption = "Trips between the zones of the first block: the mean of all members and one of them, ln(1 + trips)"
        return [Section("What was asked", text, {"Trips by region": rows[:41]}, {caption: _picture(dataset)})]


def predicted(parameters: pairwise.Parameters, blocks: Blocks) -> np.ndarray:
    """What the regression expects of many blocks, `[n, origin, destination]`."""
    return np.asarray(_predict(parameters, jax.tree.map(jnp.asarray, blocks)))


_predict = jax.jit(lambda parameters, blocks: jax.lax.map(lambda block: pairwise.expected(parameters, block), blocks))


def _block(condition: Condition) -> Blocks:
    return Blocks(*(condition[name] for name in Blocks._fields))


def _position(at: Array, mean: Array) -> jax.Array:
    """Where ln `mean` lies among the classes, a fractional index, `[...]`."""
    x = jnp.log(jnp.maximum(jnp.asarray(mean), FEWEST))
    return jnp.interp(x, jnp.asarray(at), jnp.arange(len(at), dtype=jnp.float32))


def _bilinear(table: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Values of `table` at fractional indices `[...]`; beyond its edges, those of the edges."""

    def split(position: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        inside = jnp.clip(position, 0.0, size - 1.0)
        low = jnp.clip(jnp.floor(inside), 0.0, max(size - 2.0, 0.0))
        return low.astype(jnp.int32), inside - low

    (i, a), (j, b) = split(row, table.shape[0]), split(column, table.shape[1])
    below, right = jnp.minimum(i + 1, table.shape[0] - 1), j + 1
    return (1 - a) * ((1 - b) * table[i, j] + b * table[i, right]) + a * ((1 - b) * table[below, j] + b * table[below, right])


def _score(scatter: Mapping[str, Any], mean: np.ndarray, log_trips: np.ndarray) -> np.ndarray:
    """Normal score of ln(1 + trips) among pairs of like prediction, `[origin, destination]`: the inverse of what `decode` looks up."""
    at = np.asarray(_position(scatter["at"], mean))
    table = np.asarray(scatter["quantiles"])
    low = np.clip(np.floor(at).astype(int), 0, max(len(table) - 2, 0))
    share = (at - low)[..., None]
    row = (1 - share) * table[low] + share * table[np.minimum(low + 1, len(table) - 1)]
    y = (log_trips - np.log1p(mean))[..., None]
    k = np.clip((row <= y).sum(-1) - 1, 0, len(LEVELS) - 2)[..., None]
    left, right = np.take_along_axis(row, k, -1), np.take_along_axis(row, k + 1, -1)
    step = LEVELS[1] - LEVELS[0]
    return np.clip(LEVELS[0] + step * (k + (y - left) / (right - left)), LEVELS[0], LEVELS[-1])[..., 0]


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Quantiles of values at the normal scores `LEVELS`; beyond those that so many values can tell, they go on as a straight line."""
    told = np.abs(LEVELS) <= max(float(ndtri(1 - 0.5 / len(values))), 1.0)
    found = np.maximum.accumulate(np.quantile(values, np.asarray(ndtr(LEVELS[told])), method="hazen"))
    z = LEVELS[told]
    low, high = ((found[end] - found[inner]) / (z[end] - z[inner]) for end, inner in ((0, 4), (-1, -5)))
    inside = np.interp(LEVELS, z, found)
    return inside + low * np.minimum(LEVELS - z[0], 0) + high * np.maximum(LEVELS - z[-1], 0)


def _gravity_features(blocks: Blocks) -> np.ndarray:
    """1, ln people of either zone, ln km and whether they are one zone, `[..., origin, destination, 5]`."""
    pair = np.asarray(blocks.pair, np.float64)
    own, theirs = np.log1p(np.asarray(blocks.people, np.float64)), np.asarray(blocks.destination, np.float64)[..., 0]
    ones = np.ones(pair.shape[:-1])
    return np.stack([ones, own[..., :, None] * ones, theirs[..., None, :] * ones, pair[..., 0], pair[..., regions.SAME]], -1)


def _to_totals(trips: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Trips `[..., n, origin, destination]` scaled to totals `[n]`, where these are above 0 and there are trips to scale."""
    drawn = trips.sum((-1, -2))
    scale = np.where((totals > 0) & (drawn > 0), totals / np.maximum(drawn, 1e-9), 1.0)
    return (trips * scale[..., None, None]).astype(np.float32)


def _picture(dataset: xr.Dataset) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = np.log1p(dataset[TRIPS].isel(block=0).values)
    most = max(float(first.max()), 1e-6)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, values, title in zip(axes, (first.mean(0), first[0]), ("mean of all members", "one member"), strict=True):
        shown = axis.imshow(values, vmin=0, vmax=most)
        axis.set(title=title, xlabel="destination", ylabel="origin")
    figure.colorbar(shown, ax=axes, label="ln(1 + trips a day)")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100, metadata={"Software": None, "Title": "synthetic data, generated by twinsim"})
    plt.close(figure)
    return out.getvalue()


if TYPE_CHECKING:  # the type checker proves that a Commuting keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Commuting
