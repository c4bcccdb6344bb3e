"""Reference generators of climate states: what a model has to beat.

Each is fitted by its constructor from training samples `{name: [n, y, x]}` and conditions `{name: [n, ...]}`, and is then a
`twinsim.base.Baseline`: `(condition, members, seed) -> {name: [member, n, y, x]}`. Unconditional ones know the season
(`day_of_year`) and a scalar forcing; downscaling ones start from `coarse_<name>` `[n, y / factor, x / factor]`. Deterministic
ones repeat their one answer. What is drawn for one item is drawn for all its variables at once, so that they fit together.
"""

from collections.abc import Callable, Collection
from typing import Literal

import jax
import numpy as np

from domains.climate import means
from domains.climate.grid import coarsen, conserve_block_mean, refine
from twinsim import codec
from twinsim.base import BadInput, Baseline, Condition, Sample
from twinsim.metrics import radial_spectrum

QUANTILES = 100  # of an empirical quantile mapping
RATIO_FLOOR = 0.02  # of the mean climatology: smallest value that a ratio is formed with
POOL = 3  # analogue days kept for each member drawn from them
Response = Literal["none", "uniform", "pattern"]

# ---------------------------------------------------------------- states from season and forcing


class Warming:
    """How the mean of each variable answers to a scalar forcing, from training samples of several values of it.

    "uniform": one number a variable, the regression of its area mean (the same shift everywhere). "pattern": a number a
    cell with an annual cycle, scaled with the forcing (pattern scaling, Santer et al. 1990). "none": no answer.
    """

    def __init__(
        self, sample: Sample, condition: Condition, weights: np.ndarray | float, forcing: str | None, kind: Response, reference: float = 0.0
    ) -> None:
        if kind not in ("none", "uniform", "pattern"):
            raise BadInput(f"warming: expected a response of none, uniform or pattern, got {kind!r}")
        self.forcing, self.reference = forcing if kind != "none" else None, np.float32(reference)
        if not self.forcing:
            return
        if self.forcing not in condition:
            raise BadInput(f"warming: expected a condition {self.forcing}, got {', '.join(condition)}")
        days, offset = _days(condition, len(next(iter(sample.values())))), self.departure(condition)
        self.stat = {}
        for name, values in sample.items():
            fitted = means.fit_harmonics(np.asarray(values), days, offset)["response"]
            if kind == "uniform":
                weight = np.broadcast_to(weights, fitted.shape[1:])
                slope = np.float32((fitted[0] * weight).sum() / weight.sum())
                fitted = np.zeros((3, 1, 1), np.float32) + np.array([slope, 0, 0], np.float32)[:, None, None]
            self.stat[name] = {"climatology": np.zeros((5,) + fitted.shape[1:], np.float32), "response": fitted}

    def departure(self, condition: Condition) -> np.ndarray:
        """How far the forcing of samples is from none, `[n]`."""
        assert self.forcing
        return np.asarray(condition[self.forcing]) - self.reference

    def __call__(self, name: str, condition: Condition, rows: np.ndarray | slice = slice(None)) -> np.ndarray | np.float32:
        """Change of a variable's mean against no forcing, `[n, y, x]` or broadcastable to it."""
        if not self.forcing:
            return np.float32(0)
        offset = self.departure(condition)
        return np.asarray(means.harmonics(self.stat[name], _days(condition, len(offset))[rows], offset[rows]))


class ClimatologyBootstrap:
    """Training days of the same season, drawn at random; with a `response`, days of the control run shifted by it.

    The control run is the part of the training samples whose forcing is nearest to none, `reference`; all of them, each freed of its
    response, where that is less than a tenth.

    Args:
      in_a_row: items that belong together and are drawn as that many training days in a row.
      starts: rows of the training samples from which so many follow one another; all rows by default.
    """

    def __init__(
        self,
        sample: Sample,
        condition: Condition,
        *,
        weights: np.ndarray | float = 1.0,
        non_negative: Collection[str] = (),
        forcing: str | None = None,
        response: Response = "none",
        reference: float = 0.0,
        in_a_row: int = 1,
        starts: np.ndarray | None = None,
    ) -> None:
        self.warming = Warming(sample, condition, weights, forcing, response, reference)
        kept = np.arange(_count(sample))
        starts = kept if starts is None else starts
        if self.warming.forcing:
            size = np.abs(self.warming.departure(condition))
            control = np.flatnonzero(size <= size[starts].min() + 1e-6)
            kept = control if 10 * len(control) >= len(kept) else kept
        self.condition = {name: np.asarray(values)[kept] for name, values in condition.items() if np.ndim(values) == 1}
        self.sample = {name: _float32(values)[kept] for name, values in sample.items()}
        self.non_negative = frozenset(non_negative)
        self.in_a_row, self.starts = in_a_row, np.searchsorted(kept, starts[np.isin(starts, kept)])

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        n = _items(condition)
        pick = self._days(condition, n, members, np.random.default_rng(seed))
        drawn = {}
        for name, values in self.sample.items():
            here, wanted = self.warming(name, self.condition), self.warming(name, condition)
            base = values - here if self.warming.forcing else values
            drawn[name] = base[pick]
            if self.warming.forcing:
                drawn[name] += wanted
            _clip(drawn, name, self.non_negative)
        return drawn

    def _days(self, condition: Condition, n: int, members: int, random: np.random.Generator) -> np.ndarray:
        """Rows of training days, `[member, n]`, without repeats among the members of an item where there are enough."""
        pick = np.empty((members, n), int)
        for i in range(0, n, self.in_a_row):
            near = self.starts
            if "day_of_year" in condition:
                gap = means.days_apart(self.condition["day_of_year"][near], np.asarray(condition["day_of_year"])[i])
                season = near[gap <= means.SEASON]
                near = season if len(season) else near
            first = random.choice(near, members, replace=len(near) < members)
            pick[:, i : i + self.in_a_row] = first[:, None] + np.arange(self.in_a_row)
        return pick


class InARow:
    """A generator of single days, asked for samples of `window` days in a row; `each_day` gives the conditions of their days."""

    def __init__(self, of_days: Baseline, window: int, each_day: Callable[[Condition], Condition]) -> None:
        self.of_days, self.window, self.each_day = of_days, window, each_day

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        drawn = self.of_days(self.each_day(condition), members, seed)
        return {name: v.reshape(members, -1, self.window, *v.shape[2:]) for name, v in drawn.items()}


class PCAGaussian:
    """Gaussian draws along the joint components of all variables (`codec.fit_components`), around a seasonal climatology.

    What is linear between variables comes out right; bounds and tails do not.

    Args:
      count: leading components to use; None uses all.
    """

    def __init__(
        self,
        sample: Sample,
        condition: Condition,
        *,
        weights: np.ndarray | float = 1.0,
        count: int | None = None,
        non_negative: Collection[str] = (),
        forcing: str | None = None,
        response: Response = "none",
        reference: float = 0.0,
    ) -> None:
        self.warming = Warming(sample, condition, weights, forcing, response, reference)
        days = _days(condition, _count(sample))
        self.climatology, anomalies = {}, {}
        for name, values in sample.items():
            rest = _float32(values) - self.warming(name, condition)
            self.climatology[name] = means.fit_harmonics(rest, days)
            anomalies[name] = rest - np.asarray(means.harmonics(self.climatology[name], days))
        stacked = np.stack(list(anomalies.values()), axis=-1)
        area = np.broadcast_to(np.asarray(weights, np.float32), stacked.shape[1:-1])
        self.components = codec.fit_components(stacked, area / area.mean(), len(stacked) if count is None else count)
        self.non_negative = frozenset(non_negative)

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        random = np.random.default_rng(seed)
        n, count = _items(condition), len(self.components["scale"])
        days = _days(condition, n)
        mean = {name: np.asarray(means.harmonics(stat, days)) + self.warming(name, condition) for name, stat in self.climatology.items()}
        drawn = {name: np.empty((members,) + values.shape, np.float32) for name, values in mean.items()}
        for member in range(members):
            anomaly = np.asarray(_expand(self.components, random.standard_normal((n, count, 1), np.float32)))
            for i, name in enumerate(mean):
                drawn[name][member] = mean[name] + anomaly[..., i]
        for name in drawn:
            _clip(drawn, name, self.non_negative)
        return drawn


_expand = jax.jit(jax.vmap(codec.expand, in_axes=(None, 0)))


# ---------------------------------------------------------------- fine states from a coarse background


class Interpolation:
    """Spline interpolation of the background, cell-centred: order 3 is bicubic, 1 bilinear. One answer."""

    def __init__(
        self, factor: int, order: Literal[1, 3] = 3, *, non_negative: Collection[str] = (), periodic: tuple[bool, bool] = (False, False)
    ) -> None:
        self.factor, self.order, self.periodic = factor, order, periodic
        self.non_negative = frozenset(non_negative)

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        fine = {}
        for name, values in _backgrounds(condition).items():
            fine[name] = np.asarray(refine(_float32(values), self.factor, self.order, self.periodic))
            _clip(fine, name, self.non_negative)
        return _repeat(fine, members)


class Disaggregation:
    """Spatial disaggregation: the background's anomaly (rain: ratio) to its own climatology, put on the fine climatology.

    Wood et al. (2004). Deterministic, and the base of the methods below.
    """

    def __init__(
        self, sample: Sample, factor: int, *, non_negative: Collection[str] = (), periodic: tuple[bool, bool] = (False, False)
    ) -> None:
        self.factor, self.periodic, self.non_negative = factor, periodic, frozenset(non_negative)
        self.fine = {name: np.asarray(values).mean(0, dtype=np.float64).astype(np.float32) for name, values in sample.items()}
        self.coarse = {name: np.asarray(coarsen(values, factor)) for name, values in self.fine.items()}

    def __call__(self, name: str, coarse: np.ndarray) -> np.ndarray:
        """Fine fields `[n, y, x]` of coarse ones `[n, y / factor, x / factor]`."""
        if name not in self.non_negative:
            return np.asarray(refine(coarse - self.coarse[name], self.factor, 1, self.periodic)) + self.fine[name]
        floor = RATIO_FLOOR * max(float(self.fine[name].mean()), 1e-30)
        ratio = np.asarray(refine(coarse / np.maximum(self.coarse[name], floor), self.factor, 1, self.periodic))
        return np.maximum(ratio, 0) * self.fine[name]


class QuantileMapping:
    """Bias correction and spatial disaggregation (BCSD): disaggregation, then empirical quantile mapping in each cell."""

    def __init__(
        self, sample: Sample, factor: int, *, non_negative: Collection[str] = (), periodic: tuple[bool, bool] = (False, False)
    ) -> None:
        self.base = Disaggregation(sample, factor, non_negative=non_negative, periodic=periodic)
        level = (np.arange(QUANTILES) + 0.5) / QUANTILES
        self.quantiles = {}
        for name, values in sample.items():
            values = _float32(values)
            guess = self.base(name, np.asarray(coarsen(values, factor)))
            self.quantiles[name] = np.quantile(guess, level, axis=0), np.quantile(values, level, axis=0)

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        mapped = {}
        for name, coarse in _backgrounds(condition).items():
            mapped[name] = _map_quantiles(self.base(name, _float32(coarse)), *self.quantiles[name])
            _clip(mapped, name, self.base.non_negative)
        return _repeat(mapped, members)


class Analogues:
    """The training days whose background is nearest, each brought to the block means asked for. Members go from near to far."""

    def __init__(self, sample: Sample, factor: int, *, non_negative: Collection[str] = ()) -> None:
        self.sample = {name: _float32(values) for name, values in sample.items()}
        self.factor, self.non_negative = factor, frozenset(non_negative)
        self.near = Nearest({name: np.asarray(coarsen(values, factor)) for name, values in self.sample.items()})

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        coarse = _backgrounds(condition)
        pick = self.near(coarse, members).T
        drawn = {}
        for name, values in self.sample.items():
            kind: Literal["shift", "scale"] = "scale" if name in self.non_negative else "shift"
            members_of = [np.asarray(conserve_block_mean(values[rows], _float32(coarse[name]), self.factor, kind)) for rows in pick]
            drawn[name] = np.stack(members_of)
        return drawn


class RidgeAnalogue:
    """Disaggregation, a ridge regression of what it misses on the background, and errors of analogue days on top.

    The errors are out of fold: those of days the regression had not seen, so that their spread is that of new days. A member
    takes the error fields of all variables from one of the 3 x members nearest days.

    Args:
      neighbourhood: regress on the 3 x 3 coarse cells around a block rather than on all, for grids with more cells than days.
      penalty: of the regression, relative to the mean diagonal of X'X.
      conserve: bring every member to the block means asked for.
    """

    def __init__(
        self,
        sample: Sample,
        factor: int,
        *,
        non_negative: Collection[str] = (),
        periodic: tuple[bool, bool] = (False, False),
        neighbourhood: bool = False,
        penalty: float | None = None,
        folds: int = 5,
        conserve: bool = False,
    ) -> None:
        self.base = Disaggregation(sample, factor, non_negative=non_negative, periodic=periodic)
        self.neighbourhood, self.conserve = neighbourhood, conserve
        coarse = {name: np.asarray(coarsen(_float32(values), factor)) for name, values in sample.items()}
        self.near = Nearest(coarse)
        self.regression, self.error = {}, {}
        predictors = self._predictors(coarse)
        penalty = (0.02 if neighbourhood else 0.1) if penalty is None else penalty
        for name, values in sample.items():
            rest = _float32(values) - self.base(name, coarse[name])
            if neighbourhood:
                self.regression[name], guess = means.fit_local_ridge(predictors, rest, penalty, folds, periodic)
            else:
                self.regression[name], guess = means.fit_ridge(predictors, rest, penalty, folds)
            self.error[name] = rest - guess

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        coarse = {name: _float32(values) for name, values in _backgrounds(condition).items()}
        random = np.random.default_rng(seed)
        nearest = self.near(coarse, POOL * members)
        pick = np.stack([random.permutation(rows)[:members] for rows in nearest], axis=1)
        drawn = {}
        for name, mean in self.mean(coarse).items():
            drawn[name] = mean + self.error[name][pick]
            _clip(drawn, name, self.base.non_negative)
            if self.conserve:
                kind: Literal["shift", "scale"] = "scale" if name in self.base.non_negative else "shift"
                for member in drawn[name]:
                    member[...] = conserve_block_mean(member, coarse[name], self.base.factor, kind)
        return drawn

    def mean(self, coarse: Sample) -> Sample:
        """What the background tells of every variable, `[n, y, x]`; rain may be below 0 here."""
        predictors = self._predictors(coarse)
        guess = {}
        for name, stat in self.regression.items():
            if self.neighbourhood:
                correction = means.predict_local_ridge(stat, predictors, self.base.periodic)
            else:
                correction = means.predict_ridge(stat, predictors)
            guess[name] = self.base(name, np.asarray(coarse[name])) + np.asarray(correction)
        return guess

    def _predictors(self, coarse: Sample) -> np.ndarray:
        stacked = np.stack([np.asarray(coarse[name]) for name in self.base.fine], axis=1)
        return stacked if self.neighbourhood else stacked.reshape(len(stacked), -1)


class RainFARM:
    """Rain of a given block mean with small scales from a power-law random field (Rebora et al. 2006, in its simplest form).

    The field is Gaussian with the mean spectral slope of the training patches, made positive by an exponential and scaled
    block by block to the background. Needs no fixed place.

    Args:
      band: radial wavenumbers the slope is fitted over.
    """

    def __init__(self, sample: Sample, factor: int, *, band: tuple[int, int] = (4, 24)) -> None:
        self.factor = factor
        self.slope = {name: _spectral_slope(_float32(values), band) for name, values in sample.items()}

    def __call__(self, condition: Condition, members: int, seed: int) -> Sample:
        random = np.random.default_rng(seed)
        coarse = {name: _float32(values) for name, values in _backgrounds(condition).items()}
        drawn = {}
        for name, slope in self.slope.items():
            n, ny, nx = coarse[name].shape
            amplitude = _power_law((ny * self.factor, nx * self.factor), slope)
            drawn[name] = np.empty((members, n, *amplitude[1]), np.float32)
            for member in range(members):
                noise = random.standard_normal((n, *amplitude[1]), np.float32)
                field = np.fft.irfft2(np.fft.rfft2(noise) * amplitude[0], amplitude[1])
                field = np.exp(field / field.std((-2, -1), keepdims=True)).astype(np.float32)
                drawn[name][member] = conserve_block_mean(field, coarse[name], self.factor, "scale")
        return drawn


class Nearest:
    """Training days near a background, by the Euclidean distance of its standardised cells over all variables."""

    def __init__(self, coarse: Sample) -> None:
        self.names = tuple(coarse)
        x = self._flat(coarse)
        self.mean, self.spread = x.mean(0), x.std(0) + 1e-6
        self.x = (x - self.mean) / self.spread

    def __call__(self, coarse: Sample, count: int) -> np.ndarray:
        """Rows of the `count` nearest training days of each background, `[n, count]`, nearest first; a short record repeats."""
        z = (self._flat(coarse) - self.mean) / self.spread
        distance = (self.x**2).sum(1) - 2 * z @ self.x.T
        return np.argsort(distance, axis=1, kind="stable")[:, np.arange(count) % len(self.x)]

    def _flat(self, coarse: Sample) -> np.ndarray:
        return np.concatenate([np.asarray(coarse[name], np.float64).reshape(len(coarse[name]), -1) for name in self.names], axis=1)


# ---------------------------------------------------------------- parts


def _map_quantiles(x: np.ndarray, source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """`x` `[n, *grid]` from the distribution with quantiles `source` `[q, *grid]` to that of `target`, cell by cell."""
    out = np.empty_like(x)
    rising = 1e-9 * np.arange(len(source))  # equal quantiles (dry days) made distinct
    for cell in np.ndindex(x.shape[1:]):
        at = (slice(None), *cell)
        out[at] = np.interp(x[at], np.maximum.accumulate(source[at] + rising), target[at])
    return out


def _spectral_slope(values: np.ndarray, band: tuple[int, int]) -> float:
    """Slope b of mean power ~ k^-b over the wavenumbers of `band` that the grid has."""
    power = radial_spectrum(values).mean(0)
    k = np.arange(1, len(power) + 1)
    inside = (k >= band[0]) & (k <= band[1]) & (power > 0)
    if inside.sum() < 2:
        raise BadInput(f"RainFARM: expected at least two wavenumbers with rain in {band}, got a grid with {len(power)}")
    return float(-np.polyfit(np.log(k[inside]), np.log(power[inside]), 1)[0])


def _power_law(shape: tuple[int, int], slope: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Fourier amplitudes of a field with power ~ k^-slope and mean zero, and the shape of the field."""
    k = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])[None])
    k[0, 0] = 1.0
    amplitude = k ** (-slope / 2)
    amplitude[0, 0] = 0.0
    return amplitude, shape


def _backgrounds(condition: Condition) -> dict[str, np.ndarray]:
    found = {name.removeprefix("coarse_"): np.asarray(values) for name, values in condition.items() if name.startswith("coarse_")}
    if not found:
        raise BadInput(f"downscaling baseline: expected conditions named coarse_<variable>, got {', '.join(condition) or 'none'}")
    return found


def _days(condition: Condition, n: int) -> np.ndarray:
    """Days of the year `[n]`; all the same where the season is not a condition, which leaves the climatology a constant."""
    return np.asarray(condition.get("day_of_year", np.zeros(n)), np.float64)


def _items(condition: Condition) -> int:
    if not condition:
        raise BadInput("baseline: expected at least one condition, whose length says how many items to draw")
    return len(next(iter(condition.values())))


def _count(sample: Sample) -> int:
    return len(next(iter(sample.values())))


def _float32(values: object) -> np.ndarray:
    return np.asarray(values, np.float32)


def _clip(sample: dict[str, np.ndarray], name: str, non_negative: Collection[str]) -> None:
    if name in non_negative:
        np.maximum(sample[name], 0, out=sample[name])


def _repeat(sample: Sample, members: int) -> Sample:
    """A deterministic answer as an ensemble of equal members, without copies."""
    return {name: np.broadcast_to(values, (members,) + values.shape) for name, values in sample.items()}
