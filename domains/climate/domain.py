"""The climate domain: daily fields of several variables, conditioned on season, sea-surface warming or a coarse background.

One model serves several tasks by the choice of its conditions: none or scalars (generate, what-if), a coarse background
(downscale). What the generator learns is always a residual: of a seasonal climatology with its response to warming, or
of the interpolated background corrected by a regression that is fitted out of fold. The residual is handed over cell by
cell or as joint principal components (`Components`); of several days in a row (`window`), as the first and what is new on each
that follows.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view

from domains.climate import baselines, grid, means, physics, questions, scores, sources
from domains.climate.sources import day_of_year
from twinsim import codec
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

SPLITS = ("train", "validation", "test")
NORMAL_SCORE = "normal_score"
NUMBER = "number"  # the condition of a model that has no other
ROUNDING = 1e-6  # of the largest value: twice what float32 leaves of an exact block mean
GLOBAL = 150.0  # degrees of latitude that a grid covers which holds the mass of the atmosphere
BALANCE_KEPT = 1.5  # times the largest imbalance of a training day
SPREAD_FLOOR = 1e-3  # of a transformed variable: where the truth never varies, the residual is not blown up


@dataclass(frozen=True)
class Quantity:
    """One generated variable: what it is, how it is transformed towards a Gaussian, what it must obey.

    Attributes:
      transform: "identity", "sqrt", "log1p" or "log" (see twinsim.codec), of the value divided by `unit`; or "normal_score", which
        makes each cell's values Gaussian by its own quantiles, zeros included (see `means.fit_scores`).
      conserve: how a block mean is kept in downscaling: "shift" (temperature) or "scale" (rain).
      wet: the value above which a cell counts as wet, for non-negative quantities with many zeros; 0 for others.
    """

    units: str
    long_name: str
    standard_name: str = ""
    cell_methods: str = "time: mean"
    lower: float = -np.inf
    upper: float = np.inf
    transform: str = "identity"
    unit: float = 1.0
    conserve: Literal["shift", "scale"] = "shift"
    wet: float = 0.0

    def __post_init__(self) -> None:
        if self.transform != NORMAL_SCORE:
            codec.transform(self.transform, self.unit)
        if self.lower >= self.upper:
            raise BadInput(f"variable {self.long_name}: expected lower < upper, got {self.lower} and {self.upper}")

    @property
    def maps(self) -> codec.Transform:
        return codec.transform(self.transform, self.unit)

    def variable(self, dims: tuple[str, ...]) -> Variable:
        return Variable(dims, self.units, self.long_name, self.standard_name, self.lower, self.upper, self.cell_methods)


@dataclass(frozen=True)
class Background:
    """Coarse fields that a finer state is generated from.

    Attributes:
      factor: coarse cell size in fine cells.
      climatology: correct the interpolation by the mean of each cell; false for patches that have no fixed place.
      regression: of the rest on "cells" (all coarse cells), on the "neighbourhood" (3 x 3), or "none".
      penalty: of that ridge regression, relative to the mean diagonal of X'X.
      conserve: make the block means of every sample equal the background, exactly.
    """

    factor: int
    climatology: bool = True
    regression: Literal["none", "cells", "neighbourhood"] = "cells"
    penalty: float = 0.1
    conserve: bool = True

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise BadInput(f"background: expected a factor of at least 2, got {self.factor}")
        if self.regression not in ("none", "cells", "neighbourhood"):
            raise BadInput(f"background: regression is one of none, cells, neighbourhood, got {self.regression!r}")


@dataclass(frozen=True)
class Components:
    """Hand the residual over as joint principal components of all variables.

    Their distribution starts as a unit Gaussian, which is what a diffusion model with a silent network draws: training
    starts at the joint PCA-Gaussian and learns what is not Gaussian, seasonal or linear.

    Attributes:
      count: components kept.
      coupled: leading components that may lead to one another from day to day, where a sample is several days; each of the others
        leads to itself alone.
      background: leading components of the coarse background that the network is given, where there is one.
    """

    count: int = 300
    coupled: int = 300
    background: int = 60


@dataclass(frozen=True, eq=False)
class Climate:
    """A climate twin.

    Attributes:
      dataset: truth with dims (time or patch, y, x) and one variable a quantity; opened by the config's `truth`.
      quantities: what is generated.
      splits: split -> selections; each selection maps a coordinate to a value, or to an inclusive [first, last].
      season: condition on the day of the year.
      forcing: name of a coordinate along time to condition on, such as "sst_offset"; the mean responds linearly to it.
      learn_forcing: give the forcing to the network as well, clipped to the range it was seen in, so that it may learn what mean and
        spread do not carry; wants many years at each of several values.
      seasonal_spread: divide the residual by the annual cycle of its spread in each cell; sharpens the tails of one variable, and
        weakens laws between cells and variables (geostrophic balance), which hold for the residual as it is.
      statics: fields in the dataset that do not change (orography, land), given to a network on cells.
      components: how the residual is represented; None = cell by cell.
      window: days in a row that make one sample, which is then `[day, y, x]`; more than one wants components and no background.
      folds: contiguous pieces of the training split for out-of-fold means.
    """

    name: str
    dataset: xr.Dataset
    quantities: Mapping[str, Quantity]
    splits: Mapping[str, Sequence[Mapping[str, Any]]]
    season: bool = True
    forcing: str | None = None
    learn_forcing: bool = False
    seasonal_spread: bool = False
    background: Background | None = None
    statics: Sequence[str] = ()
    components: Components | None = None
    window: int = 1
    folds: int = 5
    judge: scores.Judge = field(default_factory=scores.Judge)

    def __post_init__(self) -> None:
        for name in self.quantities:
            if name not in self.dataset:
                raise BadInput(f"variable {name}: not in the data, which has {', '.join(map(str, self.dataset.data_vars))}")
            if self.dataset[name].ndim != 3:
                raise BadInput(f"variable {name}: expected dims (time, y, x), got {self.dataset[name].dims}")
            stated, said = self.dataset[name].attrs.get("units"), self.quantities[name].units
            if stated is not None and stated != said:
                raise BadInput(f"variable {name}: it is read in {stated}, but quantities.{name}.units says {said}, expected the same")
        for name in self.statics:
            if name not in self.dataset:
                raise BadInput(f"static field {name}: not in the data, which has {', '.join(map(str, self.dataset.data_vars))}")
        if self.forcing and self.forcing not in self.dataset.coords:
            raise BadInput(
                f"forcing {self.forcing}: expected a coordinate along {self.item}, got {', '.join(map(str, self.dataset.coords))}"
            )
        if self.season and self.item != "time":
            raise BadInput(f"{self.name}: season: expected false, the samples lie along {self.item} and not along time")
        if self.seasonal_spread and not self.season:
            raise BadInput(f"{self.name}: seasonal_spread needs season: true")
        if self.window < 1 or (self.window > 1 and (self.background or not self.components or self.item != "time")):
            raise BadInput(f"{self.name}: window: {self.window} days in a row want components, a time axis and no background")
        if self.background:
            ny, nx = self.grid
            if ny % self.background.factor or nx % self.background.factor:
                raise BadInput(f"background: factor {self.background.factor} does not divide the grid of {ny} x {nx} cells")
        for first, second in itertools.combinations(SPLITS, 2):
            if both := len(np.intersect1d(self.rows(first), self.rows(second))):
                raise BadInput(f"splits: {first} and {second} share {both} of the samples, expected none; {self._extent()}")
        for split in SPLITS:
            if split != "validation" and not len(self.starts(split)):
                raise BadInput(f"split {split}: selects nothing from the data{self._in_a_row()}; {self._extent()}")

    # ------------------------------------------------------------ the grid and the truth

    @property
    def dims(self) -> tuple[str, str]:
        _, y, x = self.dataset[next(iter(self.quantities))].dims
        return str(y), str(x)

    @property
    def item(self) -> str:
        """The name of the axis of samples, "time" or "patch"."""
        return str(self.dataset[next(iter(self.quantities))].dims[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Cells along y and x."""
        return self.dataset.sizes[self.dims[0]], self.dataset.sizes[self.dims[1]]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid if self.window == 1 else (self.window, *self.grid)

    @property
    def periodic(self) -> tuple[bool, bool]:
        """A regular longitude axis that goes all the way round closes on itself."""
        x = self.dims[1]
        if x not in self.dataset.coords or not str(self.dataset[x].attrs.get("units", "")).startswith("degree"):
            return False, False
        values = self.dataset[x].values
        return False, bool(len(values) > 1 and np.isclose(len(values) * (values[1] - values[0]), 360.0, atol=0.5))

    @cached_property
    def weights(self) -> np.ndarray:
        """Area weights with mean 1, `[y, x]`; the cosine of latitude on a regular grid, else 1."""
        y = self.dims[0]
        if y == sources.coordinate_of(self.dataset, "latitude"):
            return np.broadcast_to(grid.area_weights(self.dataset[y].values)[:, None], self.grid).astype(np.float32)
        return np.ones(self.grid, np.float32)

    @property
    def sample(self) -> Mapping[str, Variable]:
        dims = self.dims if self.window == 1 else ("day", *self.dims)
        return {name: quantity.variable(dims) for name, quantity in self.quantities.items()}

    @property
    def condition(self) -> Mapping[str, Variable]:
        named: dict[str, Variable] = {}
        if self.season:
            named["day_of_year"] = Variable((), "day", "day of the year, 0 at its start")
        if self.forcing:
            what, units = questions.forcing_words(self)
            named[self.forcing] = Variable((), units or "1", what)
        if self.background:
            coarse = tuple(f"{dim}_coarse" for dim in self.dims)
            for name, quantity in self.quantities.items():
                named[f"coarse_{name}"] = quantity.variable(coarse)
        return named or {NUMBER: Variable((), "1", "number of the sample, which tells nothing")}

    def rows(self, split: str) -> np.ndarray:
        """Positions of a split's samples along the item axis, in order. Raises BadInput."""
        if split not in self._selected:
            self._selected[split] = self._select(split)
        return self._selected[split]

    @cached_property
    def _selected(self) -> dict[str, np.ndarray]:
        """The rows of the splits that were asked for."""
        return {}

    def _select(self, split: str) -> np.ndarray:
        if split not in self.splits:
            if split == "validation":
                return np.array([], int)
            raise BadInput(f"split {split}: not configured; there are {', '.join(self.splits)}")
        chosen = np.zeros(self.dataset.sizes[self.item], bool)
        for selection in self.splits[split]:
            chosen |= np.all([self._matches(name, wanted) for name, wanted in selection.items()], axis=0)
        return np.flatnonzero(chosen)

    def starts(self, split: str) -> np.ndarray:
        """Position of the first day of every sample of a split; samples of several days overlap."""
        rows = self.rows(split)
        if self.window == 1:
            return rows
        inside = np.isin(np.arange(self.dataset.sizes["time"]), rows)
        if len(inside) < self.window:
            return rows[:0]
        next_day = np.diff(self.dataset["time"].values).astype("timedelta64[D]") == np.timedelta64(1, "D")
        if "branch" in self.dataset.coords:
            next_day &= self.dataset["branch"].values[1:] == self.dataset["branch"].values[:-1]
        in_a_row = sliding_window_view(inside, self.window).all(1) & sliding_window_view(next_day, self.window - 1).all(1)
        return np.flatnonzero(in_a_row)

    def days(self, starts: np.ndarray) -> np.ndarray:
        """Positions of all days of the samples that begin at `starts` `[n]`: `[n * window]`, in order."""
        return (starts[:, None] + np.arange(self.window)).ravel()

    def _matches(self, coordinate: str, wanted: Any) -> np.ndarray:
        if coordinate not in self.dataset.coords:
            raise BadInput(f"split: no coordinate {coordinate}; there are {', '.join(map(str, self.dataset.coords))}")
        values = self.dataset[coordinate]
        if coordinate == "time":
            return sources.within(values, wanted if isinstance(wanted, list | tuple) else [wanted, wanted])
        if not isinstance(wanted, Sequence) or isinstance(wanted, str):
            return (values == wanted).values
        if len(wanted) != 2:
            raise BadInput(f"split: {coordinate}: expected a value or [first, last], got {wanted!r}")
        first, last = wanted
        return ((values >= first) & (values <= last)).values

    def _in_a_row(self) -> str:
        return f", {self.window} days in a row," if self.window > 1 else ""

    def _extent(self) -> str:
        axis = self.dataset[self.item] if self.item in self.dataset.coords else np.arange(self.dataset.sizes[self.item])
        return f"it goes from {np.asarray(axis)[0]} to {np.asarray(axis)[-1]}" if np.size(axis) else "it is empty"

    @cached_property
    def climatology(self) -> Mapping[str, Statistics]:
        """Harmonics of each variable in its own units over the training split, with its response to the forcing: for judging."""
        rows = self.rows("train")
        recorded = self.conditions(rows) if self.season or self.forcing else {}
        days = np.asarray(recorded.get("day_of_year", np.zeros(len(rows), np.float32)))
        forcing = np.asarray(self._departure(recorded)) if self.forcing else None
        return {name: means.fit_harmonics(np.asarray(values), days, forcing) for name, values in self.truth(rows).items()}

    @cached_property
    def reference(self) -> float:
        """The forcing that counts as none: 0 where training saw both sides of it or itself, else the mean of what it saw."""
        seen = self.dataset[self.forcing].values[self.rows("train")].astype(np.float64) if self.forcing else np.zeros(1)
        return 0.0 if seen.min() <= 0 <= seen.max() else float(seen.mean())

    def _departure(self, condition: Condition) -> Array:
        """How far the forcing of a condition is from none, `[...]`."""
        assert self.forcing
        return condition[self.forcing] - np.float32(self.reference)

    @cached_property
    def extremes(self) -> Mapping[str, np.ndarray]:
        """High quantile of each variable over the training split: of each cell, `[y, x]`, or of all where cells have no place, `[]`."""
        cellwise = 0 if not self.background or self.background.climatology else None
        rows = self.rows("train")
        return {name: np.quantile(self.dataset[name].values[rows], scores.EXTREME, axis=cellwise) for name in self.quantities}

    def source(self, split: str) -> Source:
        return Rows(self._recorded, self.starts(split))

    def _recorded(self, starts: np.ndarray) -> tuple[Sample, Condition]:
        sample = self.samples(starts)
        return sample, self.conditions(starts, sample)

    def truth(self, rows: np.ndarray) -> Sample:
        """Single days `[n, y, x]` in float32."""
        return {name: self.dataset[name].values[rows].astype(np.float32) for name in self.quantities}

    def samples(self, starts: np.ndarray) -> Sample:
        """Samples `[n, *shape]` that begin at `starts`."""
        return {name: values.reshape(len(starts), *self.shape) for name, values in self.truth(self.days(starts)).items()}

    def conditions(self, rows: np.ndarray, sample: Sample | None = None) -> Condition:
        """Conditions `[n, ...]` of recorded days, or of the samples that begin there; the background is the block mean of the truth."""
        named: dict[str, Array] = {}
        if self.season:
            named["day_of_year"] = (means.YEAR * day_of_year(self.dataset["time"][rows])).astype(np.float32)
        if self.forcing:
            named[self.forcing] = self.dataset[self.forcing].values[rows].astype(np.float32)
        if self.background:
            sample = self.truth(rows) if sample is None else sample
            named |= {f"coarse_{name}": grid.coarsen(np.asarray(values), self.background.factor) for name, values in sample.items()}
        return named or self.unconditioned(len(rows))

    def unconditioned(self, count: int) -> Condition:
        """The conditions of `count` samples of a model that has none."""
        return {NUMBER: np.arange(count, dtype=np.float32)}

    def daily(self, condition: Condition) -> Condition:
        """Conditions `[...]` of samples as those of each of their days, `[..., day]`."""
        named = {name: jnp.repeat(jnp.asarray(v)[..., None], self.window, axis=-1) for name, v in condition.items()}
        if "day_of_year" in named:
            first = named["day_of_year"]
            named["day_of_year"] = (first + jnp.broadcast_to(jnp.arange(self.window, dtype=np.float32), first.shape)) % means.YEAR
        return named

    def each_day(self, condition: Condition) -> Condition:
        """Conditions `[n, ...]` of samples as those of all their days, `[n * window, ...]`, on the host."""
        if self.window == 1:
            return condition
        return {name: np.asarray(values).ravel() for name, values in self.daily(condition).items()}

    def as_days(self, samples: Sample) -> Sample:
        """Samples `[..., n, *shape]` as single days `[..., n * window, y, x]`."""
        if self.window == 1:
            return samples
        return {name: np.asarray(v).reshape(*v.shape[: v.ndim - 4], -1, *self.grid) for name, v in samples.items()}

    # ------------------------------------------------------------ statistics

    def fit(self) -> Statistics:
        rows = self.rows("train")
        truth = self.truth(rows)
        condition = self.conditions(rows, truth)
        statistics: dict[str, Any] = {"scalars": self._fit_scalars(condition)}
        statistics["scores"] = self._fit_scores(truth, condition)
        transformed = self._transformed(statistics, truth, condition)
        if self.background:
            statistics["interpolation"] = self._fit_interpolation(transformed, condition)
            raw = {name: self._interpolate(statistics, name, condition) for name in self.quantities}
            fitted = self._fit_regression({name: transformed[name] - raw[name] for name in raw}, condition)
            statistics["regression"] = {name: stat for name, (stat, _) in fitted.items()}
            expected = {name: raw[name] + fitted[name][1] if name in fitted else raw[name] for name in raw}
            cellwise = (0,) if self.background.climatology else None
            statistics["field_mean"] = {name: np.float32(1) * v.mean(cellwise) for name, v in transformed.items()}
            statistics["field_scale"] = {name: v.std(cellwise) + np.float32(SPREAD_FLOOR) for name, v in transformed.items()}
        else:
            extra = np.asarray(self._departure(condition)) if self.forcing else None
            days = np.asarray(condition.get("day_of_year", np.zeros(len(rows), np.float32)))
            own = {name: None if name in statistics["scores"] else extra for name in transformed}  # scores carry their response
            statistics["climatology"] = {name: self._fit_mean(v, days, own[name]) for name, v in transformed.items()}
            expected = {name: np.asarray(self._expected(statistics, name, condition)) for name in transformed}
            cellwise = (0,)
        residual = {name: transformed[name] - expected[name] for name in transformed}
        if not self.background:
            residual = self._fit_spreads(statistics, residual, condition)
        elif self.components:
            statistics["background"] = self._fit_background(condition)
            statistics["background_spread"] = {
                name: means.fit_spread_of_expected(residual[name], np.asarray(expected[name])) for name in residual
            }
            residual = {
                name: v / means.spread_of_expected(statistics["background_spread"][name], expected[name]) for name, v in residual.items()
            }
        statistics["residual_scale"] = {name: v.std(cellwise) + np.float32(SPREAD_FLOOR) for name, v in residual.items()}
        if self.components:
            stacked = np.stack([residual[name] for name in self.quantities], axis=-1)
            statistics["components"] = codec.fit_components(stacked, self.weights, self.components.count)
            if self.window > 1:
                statistics["memory"] = self._fit_memory(statistics["components"], stacked, rows)
        if self.statics:
            fixed = np.stack([self.dataset[name].values for name in self.statics], axis=-1).astype(np.float32)
            statistics["statics"] = (fixed - fixed.mean((0, 1))) / (fixed.std((0, 1)) + np.float32(SPREAD_FLOOR))
        return statistics

    def _fit_background(self, condition: Condition) -> Statistics:
        """Joint principal components of the transformed background of all variables."""
        assert self.background and self.components
        coarse = np.asarray(self._coarse(condition))
        weights = np.asarray(grid.coarsen(self.weights, self.background.factor))
        mean = coarse.mean(0)
        return {"field_mean": mean, **codec.fit_components(coarse - mean, weights, self.components.background)}

    def _coarse(self, condition: Condition) -> Array:
        """The transformed background of all variables, `[..., y, x, variable]`."""
        return jnp.stack([jnp.asarray(q.maps.forward(condition[f"coarse_{name}"])) for name, q in self.quantities.items()], axis=-1)

    def _fit_memory(self, components: Statistics, residual: np.ndarray, rows: np.ndarray) -> Statistics:
        """How the components of one day lead to those of the next, from residuals `[n, y, x, channel]` of the days `rows`."""
        assert self.components
        states = np.asarray(jax.vmap(codec.project, in_axes=(None, 0))(components, residual))[..., 0]
        first = np.searchsorted(rows, self.starts("train"))
        pairs = np.unique((first[:, None] + np.arange(self.window - 1)).ravel())
        return codec.fit_memory(states[pairs], states[pairs + 1], self.components.coupled)

    def _fit_scores(self, truth: Sample, condition: Condition) -> dict[str, Statistics]:
        """Normal-score tables of the variables that want one, with the response of their means taken out."""
        fitted: dict[str, Statistics] = {}
        for name, quantity in self.quantities.items():
            if quantity.transform != NORMAL_SCORE:
                continue
            if self.background:
                raise BadInput(f"variable {name}: transform normal_score is for models without a background, use log1p or sqrt")
            values = np.asarray(truth[name])
            if not self.forcing:
                fitted[name] = means.fit_scores(values)
                continue
            days = np.asarray(condition.get("day_of_year", np.zeros(len(values), np.float32)))
            departure = np.asarray(self._departure(condition))
            response = means.fit_relative_response(values, days, departure, self.weights)
            factor = means.relative_response(response, departure)
            fitted[name] = {**means.fit_scores(values / factor), **response}
        return fitted

    def _transformed(self, statistics: Statistics, truth: Sample, condition: Condition) -> dict[str, np.ndarray]:
        """Recorded samples `[n, y, x]` as the generator's mean and residual see them."""
        transformed = {}
        for name, quantity in self.quantities.items():
            values = np.asarray(truth[name])
            if name in statistics.get("scores", {}):
                stat = statistics["scores"][name]
                factor = means.relative_response(stat, np.asarray(self._departure(condition))) if self.forcing else np.float32(1)
                transformed[name] = means.to_scores(stat, values / factor)
            else:
                transformed[name] = np.asarray(quantity.maps.forward(values))
        return transformed

    def _restored(self, statistics: Statistics, name: str, transformed: Array, condition: Condition) -> Array:
        """Physical values `[y, x]` of one variable."""
        if name not in statistics.get("scores", {}):
            return self.quantities[name].maps.inverse(transformed)
        stat = statistics["scores"][name]
        factor = means.relative_response(stat, self._departure(condition)) if self.forcing else 1.0
        value = means.from_scores(stat, transformed) * factor
        lower = self.quantities[name].lower
        return jnp.maximum(value, lower) if np.isfinite(lower) else value

    def _fit_mean(self, values: np.ndarray, days: np.ndarray, extra: np.ndarray | None) -> Statistics:
        """Climatology of a transformed variable; the pattern of its response is trusted as far as two halves of the data agree."""
        stat = dict(means.fit_harmonics(values, days, extra))
        if extra is not None:
            halves = [(np.arange(len(values)) // means.HALF_DAYS) % 2 == half for half in (0, 1)]
            parts = [means.fit_harmonics(values[half], days[half], extra[half])["response"] for half in halves]
            stat["response"] = means.shrink_pattern(stat["response"], parts[0], parts[1], self.weights)
        return stat

    def _fit_scalars(self, condition: Condition) -> Statistics:
        """The range in which a scalar was seen: outside it the network is asked for the nearest it knows, the mean goes on."""
        if not (self.forcing and self.learn_forcing):
            return {}
        values = np.asarray(condition[self.forcing])
        span = max(float(values.max() - values.min()), SPREAD_FLOOR)
        return {self.forcing: {"low": np.float32(values.min()), "high": np.float32(values.max()), "span": np.float32(span)}}

    def _fit_interpolation(self, transformed: Sample, condition: Condition) -> Statistics:
        """Seasonal climatology of each variable on both grids; constant where the season is no condition."""
        if not self.background or not self.background.climatology:
            return {}
        coarse = {name: np.asarray(q.maps.forward(condition[f"coarse_{name}"])) for name, q in self.quantities.items()}
        if not self.season:
            return {name: {"coarse": coarse[name].mean(0), "fine": np.asarray(transformed[name]).mean(0)} for name in self.quantities}
        days = np.asarray(condition["day_of_year"])
        both = {name: {"coarse": coarse[name], "fine": np.asarray(transformed[name])} for name in self.quantities}
        return {name: {which: means.fit_harmonics(v, days)["climatology"] for which, v in each.items()} for name, each in both.items()}

    def _fit_regression(self, residual: Sample, condition: Condition) -> dict[str, tuple[Statistics, np.ndarray]]:
        """Per variable: regression of what interpolation misses, and its out-of-fold prediction of the training samples."""
        background = self.background
        if background is None or background.regression == "none":
            return {}
        predictors = np.stack([np.asarray(condition[f"coarse_{name}"]) for name in self.quantities], axis=1)
        if background.regression == "cells":
            flat = predictors.reshape(len(predictors), -1)
            return {name: means.fit_ridge(flat, np.asarray(v), background.penalty, self.folds) for name, v in residual.items()}
        return {
            name: means.fit_local_ridge(predictors, np.asarray(v), background.penalty, self.folds, self.periodic)
            for name, v in residual.items()
        }

    # ------------------------------------------------------------ one sample <-> one example

    def _interpolate(self, statistics: Statistics, name: str, condition: Condition) -> Array:
        """The background of one variable on the fine grid, transformed, `[..., y, x]`."""
        assert self.background
        coarse = jnp.asarray(self.quantities[name].maps.forward(condition[f"coarse_{name}"]))
        if not self.background.climatology:
            return grid.refine(coarse, self.background.factor, 1, self.periodic)
        usual = {which: self._usual(stat, condition) for which, stat in statistics["interpolation"][name].items()}
        return grid.refine(coarse - usual["coarse"], self.background.factor, 1, self.periodic) + usual["fine"]

    def _usual(self, stat: Array, condition: Condition) -> Array:
        """A climatology `[y, x]`, or that of the day from its harmonics `[harmonic, y, x]`: `[..., y, x]`."""
        return means.harmonics({"climatology": stat}, condition["day_of_year"]) if self.season else stat

    def _regress(self, statistics: Statistics, name: str, condition: Condition) -> Array:
        """What the coarse cells say beyond their interpolation, `[..., y, x]`."""
        assert self.background
        if name not in statistics.get("regression", {}):
            return jnp.zeros(())
        stat = statistics["regression"][name]
        predictors = jnp.stack([jnp.asarray(condition[f"coarse_{each}"]) for each in self.quantities], axis=-3)
        if self.background.regression == "cells":
            return means.predict_ridge(stat, predictors.reshape(*predictors.shape[:-3], -1))
        return means.predict_local_ridge(stat, predictors, self.periodic)

    def _expected(self, statistics: Statistics, name: str, condition: Condition) -> Array:
        """The transformed variable as far as the condition alone tells it, `[..., y, x]`."""
        if self.background:
            return self._interpolate(statistics, name, condition) + self._regress(statistics, name, condition)
        extra = self._departure(condition) if self.forcing else None
        days = condition["day_of_year"] if self.season else jnp.zeros_like(condition[self.forcing or NUMBER])
        return means.harmonics(statistics["climatology"][name], days, extra)

    def _fit_spreads(self, statistics: dict[str, Any], residual: dict[str, np.ndarray], condition: Condition) -> dict[str, np.ndarray]:
        """Fits how the residual's spread changes with season and forcing; returns residuals `[n, y, x]` freed of both."""
        if self.seasonal_spread:
            days = np.asarray(condition["day_of_year"])
            statistics["season_spread"] = {name: means.fit_season_spread(v, days) for name, v in residual.items()}
            residual = {name: v / np.asarray(self._spread(statistics, name, condition)) for name, v in residual.items()}
        if self.forcing:
            forcing = np.asarray(self._departure(condition))
            spread = {name: means.fit_spread(v, forcing, self.weights) for name, v in residual.items()}
            spread |= dict.fromkeys(statistics["scores"], np.float32(0))  # a wider score would change the mean again
            residual = {name: v / np.exp(spread[name] * forcing)[:, None, None] for name, v in residual.items()}
            statistics["spread"] = spread
        return residual

    def _spread(self, statistics: Statistics, name: str, condition: Condition, expected: Array | None = None) -> Array:
        """Relative standard deviation of the residual on this day, at this forcing and where so much is expected, `[..., y, x]`."""
        factor: Array = np.ones((), np.float32)
        if "season_spread" in statistics:
            factor = means.season_spread(statistics["season_spread"][name], condition["day_of_year"])
        if "background_spread" in statistics:
            expected = self._expected(statistics, name, condition) if expected is None else expected
            factor = means.spread_of_expected(statistics["background_spread"][name], expected)
        if "spread" in statistics and self.forcing:
            factor = factor * jnp.exp(statistics["spread"][name] * jnp.asarray(self._departure(condition)))[..., None, None]
        return factor

    def spec(self, statistics: Statistics | None = None) -> Spec:
        scalars = 2 * self.season + (1 if self.forcing and self.learn_forcing else 0)
        if self.components:
            count, background = self._component_counts(statistics)
            return Spec((self.window,), count, 0, scalars + background, (False,))
        fields = 2 * len(self.quantities) * bool(self.background) + len(self.statics)
        return Spec(self.grid, len(self.quantities), fields, scalars, self.periodic)

    def _component_counts(self, statistics: Statistics | None) -> tuple[int, int]:
        """Components of the residual and of the background: those fitted, or before the fit as many as there can be."""
        assert self.components
        if statistics is not None:
            return len(statistics["components"]["scale"]), len(statistics["background"]["scale"]) if self.background else 0
        most, values = len(self.source("train")) - 1, math.prod(self.grid) * len(self.quantities)
        coarse = values // self.background.factor**2 if self.background else 0
        return min(self.components.count, most, values), min(self.components.background, most, coarse)

    def examples(self, statistics: Statistics, split: str = "train", block: int = 256) -> Iterator[Example]:
        """Examples of a split in blocks `[n, ...]`; those of "train" with means predicted out of fold."""
        of_days = self._examples_of_days(statistics, split, block)
        return of_days if self.window == 1 else self._in_a_row_of(statistics, of_days, split, block)

    def _examples_of_days(self, statistics: Statistics, split: str, block: int) -> Iterator[Example]:
        rows = self.rows(split)
        truth = self.truth(rows)
        condition = self.conditions(rows, truth)
        transformed = self._transformed(statistics, truth, condition)
        expected = {name: np.asarray(self._expected(statistics, name, condition)) for name in transformed}
        if self.background and split == "train":
            raw = {name: np.asarray(self._interpolate(statistics, name, condition)) for name in self.quantities}
            fitted = self._fit_regression({name: transformed[name] - raw[name] for name in raw}, condition)
            expected |= {name: raw[name] + out_of_fold for name, (_, out_of_fold) in fitted.items()}
        encode = jax.jit(jax.vmap(self._example, in_axes=(None, 0, 0, 0)))
        for first in range(0, len(rows), block):
            part = slice(first, first + block)
            parts = ({name: v[part] for name, v in values.items()} for values in (transformed, expected, condition))
            yield jax.tree.map(np.asarray, encode(statistics, *parts))

    def _in_a_row_of(self, statistics: Statistics, of_days: Iterator[Example], split: str, block: int) -> Iterator[Example]:
        """Examples of single days as those of several in a row: the first day, and what is new on each that follows."""
        daily: Example = jax.tree.map(lambda *parts: np.concatenate(parts), *of_days)
        states = daily.target[:, 0]
        new = codec.to_innovations(statistics["memory"], states)  # where two days do not follow one another it is not looked at
        first = np.searchsorted(self.rows(split), self.starts(split))
        for begin in range(0, len(first), block):
            chosen = first[begin : begin + block]
            later = new[chosen[:, None] + np.arange(1, self.window)]
            target = np.concatenate([states[chosen][:, None], later], axis=1)
            yield Example(target, np.zeros((len(chosen), self.window, 0), np.float32), daily.scalars[chosen])

    def _example(self, statistics: Statistics, transformed: Sample, expected: Sample, condition: Condition) -> Example:
        spread = {name: self._spread(statistics, name, condition, expected[name]) for name in self.quantities}
        residual = {name: (transformed[name] - expected[name]) / spread[name] for name in self.quantities}
        fields, scalars = self._encode(statistics, condition, expected)
        if self.components:
            target = codec.project(statistics["components"], codec.stack(residual, list(self.quantities)))
            return Example(target.T, fields, scalars)
        scaled = {name: residual[name] / statistics["residual_scale"][name] for name in self.quantities}
        return Example(codec.stack(scaled, list(self.quantities)), fields, scalars)

    def encode(self, statistics: Statistics, condition: Condition) -> tuple[Array, Array]:
        expected = {name: self._expected(statistics, name, condition) for name in self.quantities} if self.background else {}
        return self._encode(statistics, condition, expected)

    def _encode(self, statistics: Statistics, condition: Condition, expected: Sample) -> tuple[Array, Array]:
        scalars = []
        if self.season:
            phase = 2 * jnp.pi * condition["day_of_year"] / means.YEAR
            scalars += [jnp.sqrt(2.0) * jnp.cos(phase), jnp.sqrt(2.0) * jnp.sin(phase)]
        if self.forcing and self.learn_forcing:
            seen = statistics["scalars"][self.forcing]
            middle = (seen["low"] + seen["high"]) / 2
            scalars.append(2 * (jnp.clip(condition[self.forcing], seen["low"], seen["high"]) - middle) / seen["span"])
        if self.components:
            if self.background:
                of_background = statistics["background"]
                scalars += list(codec.project(of_background, self._coarse(condition) - of_background["field_mean"])[:, 0])
            return jnp.zeros((self.window, 0)), jnp.stack(scalars) if scalars else jnp.zeros(0)
        fields = []
        if self.background:
            for name in self.quantities:
                mean, scale = statistics["field_mean"][name], statistics["field_scale"][name]
                fields += [(expected[name] - mean) / scale, (self._interpolate(statistics, name, condition) - mean) / scale]
        stacked = jnp.stack(fields, axis=-1) if fields else jnp.zeros((*self.grid, 0))
        if self.statics:
            stacked = jnp.concatenate([stacked, statistics["statics"]], axis=-1)
        return stacked, jnp.stack(scalars) if scalars else jnp.zeros(0)

    def decode(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        if self.window == 1:
            return self._decode_day(statistics, target, condition)
        states = codec.from_innovations(statistics["memory"], target)
        each_day = jax.vmap(lambda state, day: self._decode_day(statistics, state[None], day))
        return each_day(states, self.daily(condition))

    def _decode_day(self, statistics: Statistics, target: Target, condition: Condition) -> Sample:
        names = list(self.quantities)
        if self.components:
            residual = codec.unstack(codec.expand(statistics["components"], target.T), names)
        else:
            residual = {name: v * statistics["residual_scale"][name] for name, v in codec.unstack(target, names).items()}
        sample = {}
        for name, quantity in self.quantities.items():
            expected = self._expected(statistics, name, condition)
            spread = self._spread(statistics, name, condition, expected)
            value = self._restored(statistics, name, expected + spread * residual[name], condition)
            if self.background and self.background.conserve:
                coarse = condition[f"coarse_{name}"]
                value = grid.conserve_block_mean(value, coarse, self.background.factor, quantity.conserve)
            sample[name] = value
        return sample

    # ------------------------------------------------------------ questions, checks, scores, files

    Scenario: ClassVar[type[scenarios.Scenario]] = questions.ClimateScenario

    def ask(self, scenario: questions.ClimateScenario, folder: Path) -> Question:
        return questions.ask(self, scenario, folder)

    def _apart(self, starts: np.ndarray) -> np.ndarray:
        """The first of `starts`, and each that does not overlap the one chosen before it."""
        chosen: list[int] = []
        for start in starts:
            if not chosen or start >= chosen[-1] + self.window:
                chosen.append(start)
        return np.array(chosen, starts.dtype)

    def exam(self, members: int, most: int | None = None) -> tuple[Question, Sample]:
        """The held-out test as a question, with its true answer `[n, y, x]`; at most `most` evenly spaced items."""
        rows = self._apart(self.starts("test"))
        if most and len(rows) > most:
            rows = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
        truth = self.samples(rows)
        question = Question(
            condition=self.conditions(rows, truth),
            members=members,
            coords={self.item: (self.item, self.dataset[self.item].values[rows] if self.item in self.dataset.coords else rows)},
            title=f"{self.name}: the {len(rows)} held-out samples of the test split",
        )
        return question, truth

    def simulate(self, sample: Sample, condition: Condition, key: Array) -> Sample:
        """The identity: a daily state is judged by `check`, not stepped on."""
        return sample

    def check(self, sample: Sample, condition: Condition) -> Mapping[str, Array]:
        broken: dict[str, Array] = {}
        for name, quantity in self.quantities.items():
            if np.isfinite(quantity.lower):
                broken[f"{name} below {quantity.lower:g} {quantity.units}"] = physics.below(sample[name], quantity.lower)
            if np.isfinite(quantity.upper):
                broken[f"{name} above {quantity.upper:g} {quantity.units}"] = physics.above(sample[name], quantity.upper)
            if self.background and self.background.conserve:
                coarse = condition[f"coarse_{name}"]
                mismatch = physics.block_mean_mismatch(sample[name], coarse, self.background.factor)
                broken[f"{name} block mean, {quantity.units}"] = jnp.maximum(mismatch - ROUNDING * jnp.max(jnp.abs(coarse)), 0.0)
        return {**broken, **self._balance(sample)}

    def _balance(self, sample: Sample) -> dict[str, Array]:
        """How far global mass and the balance of wind and mass lie beyond what the training days show, where they can be told."""
        broken: dict[str, Array] = {}
        if "mass" in self._usual_balance:
            mean, most = self._usual_balance["mass"]
            off = jax.vmap(lambda ps: physics.mass_deviation(ps, self.weights[:, 0], mean))(self._stacked_days(sample["ps"]))
            broken["mass of the atmosphere, Pa of global mean pressure"] = jnp.maximum(jnp.max(off) - most, 0.0)
        if "geostrophic" in self._usual_balance:
            (most,) = self._usual_balance["geostrophic"]
            residual = self._imbalance({name: self._stacked_days(sample[name]) for name in scores.GEOSTROPHIC})
            broken["geostrophic balance, residual / spread of the wind"] = jnp.maximum(jnp.max(residual) - most, 0.0)
        return broken

    def _stacked_days(self, values: Array) -> Array:
        """The days of one sample, `[day, y, x]`."""
        return jnp.reshape(values, (-1, *self.grid))

    def _imbalance(self, days: Sample) -> Array:
        """The geostrophic residual of each day `[day, y, x]`."""
        residual = functools.partial(physics.geostrophic_residual, lat=self.dataset[self.dims[0]].values)
        return jax.vmap(residual)(*(days[name] for name in scores.GEOSTROPHIC))

    @property
    def tells_balance(self) -> bool:
        """Whether the balance of wind and mass can be told: on a sigma level, which the source of the data has to say, in SI units."""
        if self.dataset.attrs.get("levels") != physics.SIGMA or not set(scores.GEOSTROPHIC) <= set(self.quantities):
            return False
        si = all(self.quantities[name].units == units for name, units in scores.GEOSTROPHIC.items())
        return si and bool(physics.mid_latitudes(self.dataset[self.dims[0]].values).any())

    @cached_property
    def _usual_balance(self) -> Mapping[str, tuple[float, ...]]:
        """Mean mass and how far a day may be from it; how large the geostrophic residual of a day may be: from training days."""
        usual: dict[str, tuple[float, ...]] = {}
        if self.background or not self.periodic[1]:
            return usual
        rows = self.rows("train")
        latitude = self.dataset[self.dims[0]].values
        if "ps" in self.quantities and self.quantities["ps"].units == "Pa" and float(np.ptp(latitude)) > GLOBAL:
            pressure = (self.dataset["ps"].values[rows].astype(np.float64) * self.weights).mean((1, 2))
            mean = float(pressure.mean())
            usual["mass"] = (mean, BALANCE_KEPT * float(np.abs(pressure - mean).max()))
        if self.tells_balance:
            few = rows[:: max(1, len(rows) // 200)]
            with jax.ensure_compile_time_eval():  # it may be asked for first while a draw is traced
                residual = np.asarray(self._imbalance({name: self.dataset[name].values[few] for name in scores.GEOSTROPHIC}))
            usual["geostrophic"] = (BALANCE_KEPT * float(residual.max()),)
        return usual

    def baselines(self, statistics: Statistics) -> Mapping[str, Baseline]:
        rows = self.rows("train")
        truth = self.truth(rows)
        condition = self.conditions(rows, truth)
        non_negative = [name for name, quantity in self.quantities.items() if quantity.lower >= 0 and quantity.wet]
        if self.background is None:
            return self._unconditional_baselines(truth, condition, non_negative)
        factor, periodic = self.background.factor, self.periodic
        bicubic = baselines.Interpolation(factor, 3, non_negative=non_negative, periodic=periodic)
        if not self.background.climatology:
            analogues = baselines.Analogues(truth, factor, non_negative=non_negative)
            return {"bicubic": bicubic, "analogues": analogues, "RainFARM": baselines.RainFARM(truth, factor)}
        given: dict[str, Any] = {"non_negative": non_negative, "periodic": periodic}
        near: dict[str, Any] = {"neighbourhood": self.background.regression == "neighbourhood"}
        return {
            "bicubic": bicubic,
            "quantile mapping": baselines.QuantileMapping(truth, factor, **given),
            "analogues": baselines.Analogues(truth, factor, non_negative=non_negative),
            "ridge and analogue errors": baselines.RidgeAnalogue(truth, factor, **near, **given),
            "ridge and analogue errors, block means kept": baselines.RidgeAnalogue(truth, factor, conserve=True, **near, **given),
        }

    def _unconditional_baselines(self, truth: Sample, condition: Condition, non_negative: list[str]) -> Mapping[str, Baseline]:
        """Recorded days of the season and a joint Gaussian; with a forcing, shifted by one number a variable, or by a pattern."""
        first = np.searchsorted(self.rows("train"), self.starts("train"))
        season = {1: "days of the season", 7: "weeks of the season"}.get(self.window, f"{self.window} days of the season")

        def recorded(response: baselines.Response) -> Baseline:
            return baselines.ClimatologyBootstrap(
                truth, condition, weights=self.weights, non_negative=non_negative, forcing=self.forcing, response=response,
                reference=self.reference, in_a_row=self.window, starts=first,
            )  # fmt: skip

        def gaussian(response: baselines.Response) -> Baseline:
            return baselines.PCAGaussian(
                truth, condition, weights=self.weights, forcing=self.forcing, response=response, reference=self.reference
            )

        if self.forcing:
            named = {
                f"{season}, shifted uniformly": recorded("uniform"),
                f"{season}, shifted by a pattern": recorded("pattern"),
                "PCA-Gaussian, shifted uniformly": gaussian("uniform"),
            }
        else:
            named = {season: recorded("none"), "PCA-Gaussian": gaussian("none")}
        return {name: baselines.InARow(each, self.window, self.each_day) if self.window > 1 else each for name, each in named.items()}

    def membership(self, generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score | None:
        """Whether samples betray the training data; where samples depend on a background, training days are drawn as well.

        None where the held-out samples come from another climate than the training samples, which would decide the test.
        """
        if self.another_climate:
            return None
        generated, truth = self.as_days(generated), self.as_days(truth)
        held_out = len(next(iter(truth.values())))
        rows = self.rows("train")
        members = len(next(iter(generated.values())))
        if self.background:
            rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), held_out)).round().astype(int)]
            members = min(members, self.judge.remembered)
        recorded = self.truth(rows)
        drawn: dict[str, tuple[Sample, Sample]] = {
            "train": ({}, recorded),
            "held out": ({name: np.asarray(v)[:members] for name, v in generated.items()}, truth),
        }
        if self.background:
            question = Question(self.conditions(rows, recorded), members, {self.item: (self.item, rows)}, "the training samples")
            drawn["train"] = ({name: np.asarray(v[...]) for name, v in ask(question).items()}, recorded)
        return scores.membership(self, drawn)

    @cached_property
    def another_climate(self) -> bool:
        """Whether the held-out samples were simulated with another warming than any training sample."""
        warming = self.forcing or "sst_offset"
        if warming not in self.dataset.coords:
            return False
        values = self.dataset[warming].values
        return not set(values[self.rows("test")]) <= set(values[self.rows("train")])

    def score(self, generated: Sample, truth: Sample, condition: Condition) -> Scores:
        return scores.score(self, generated, truth, condition)

    def dataset_of(self, samples: Sample, question: Question) -> xr.Dataset:
        """Generated samples `[member, item, y, x]` as a CF dataset that says it is synthetic."""
        keep = [name for name in self.dataset.coords if set(self.dataset[name].dims) <= set(self.dims)]
        cell_number = {"units": "1", "long_name": "cell number"}
        data = {}
        samples = self.as_days(samples)
        coords = {**question.coords, self.item: (self.item, self.dates(question))}
        for name, variable in self.sample.items():
            attrs = {"units": variable.units, "long_name": f"synthetic {variable.long_name}", "cell_methods": variable.cell_methods}
            attrs |= {"standard_name": variable.standard_name} if variable.standard_name else {}
            mapping = str(self.dataset[name].attrs.get("grid_mapping") or self.dataset[name].encoding.get("grid_mapping"))
            attrs |= {"grid_mapping": mapping} if mapping in keep else {}
            data[name] = (("member", self.item, *self.dims), samples[name], attrs)
        axes = {name: (self.dataset[name].dims, self.dataset[name].values, self.dataset[name].attrs or cell_number) for name in keep}
        members = next(iter(samples.values())).shape[0]
        realization = ("member", np.arange(members), {"standard_name": "realization", "long_name": "member", "units": "1"})
        made = xr.Dataset(data, {**axes, **coords, "member": realization})
        if self.item == "time":
            made["time"].attrs |= {"standard_name": "time", "axis": "T"}
        return made

    def write(self, **_: Any) -> None:
        """Nothing: the formats of this field are Zarr and NetCDF."""

    def dates(self, question: Question) -> np.ndarray:
        """The axis of the answer: a date a day, or the number of a patch."""
        starts = np.asarray(question.coords[self.item][1])
        if self.window == 1:
            return starts
        return (starts[:, None] + np.arange(self.window) * np.timedelta64(1, "D")).ravel()

    def inputs(self) -> Sequence[Mapping[str, Any]]:
        """The files the truth came from: name, place, licence, sha256, size."""
        return json.loads(self.dataset.attrs.get("inputs", "[]"))

    @property
    def licence(self) -> str:
        return str(self.dataset.attrs.get("license", "no licence stated"))

    def summary(self, question: Question, dataset: xr.Dataset) -> str:
        """The answer in a sentence."""
        from domains.climate import figures  # with matplotlib: only a report waits for it

        return figures.summary(self, question, dataset)

    @property
    def limits(self) -> Sequence[str]:
        """What this twin cannot tell, in plain words."""
        told = [f"The truth is {self.dataset.attrs.get('source', 'a recorded data set')}; its errors are learnt with it."]
        if gaps := self.dataset.attrs.get("gaps"):
            told.append(f"Gaps in the truth: {gaps}.")
        if self.another_climate:
            told.append("Whether it gives away training days is not tested beyond exact copies: the held-out climate is another one.")
        if self.background:
            told.append("Detail below the background's cells is plausible, not observed; block means are those of the background.")
        else:
            told.append("Weather that never occurred in the training split, and changes beyond a linear response, are not represented.")
        return told

    def sections(self, **parts: Any) -> Sequence[Section]:
        from domains.climate import figures

        return figures.sections(self, **parts)


if TYPE_CHECKING:  # the type checker proves that a Climate keeps the protocol
    from twinsim.base import Domain

    _kept: Callable[..., Domain] = Climate
