"""The judge of the climate domain: which scores a generated ensemble earns on held-out truth, variable by variable.

Definitions are those of `twinsim.metrics`. Distributions are judged on anomalies from the training climatology, so that the
seasonal cycle, which every competitor is given, does not hide what differs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from domains.climate import grid, means, physics
from twinsim import metrics
from twinsim.base import Condition, Sample, Score, Scores

if TYPE_CHECKING:
    from domains.climate.domain import Climate

GEOSTROPHIC = {"zg500": "m", "ta500": "K", "ps": "Pa", "ua500": "m s-1"}  # what the balance of wind and mass needs
HECTOPASCAL = 100.0  # Pa
SPECTRAL_BAND = (30.0, 60.0)  # degrees north, where zonal spectra are compared; all latitudes where the grid has none of these
COMPARED = 300  # generated samples that are looked for among the training days
THIN_CELLS = 16  # about so many along an axis suffice for an interval, and to tell two days apart
EXTREME = 0.95  # quantile of the training samples above which the CRPS of extremes counts
UPPER = 0.75  # quantile of the truth in a cell: the event whose probability is judged
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)


@dataclass(frozen=True)
class Judge:
    """What is scored.

    Attributes:
      block: days that follow one another and may depend on one another, for the bootstrap; 1 for independent samples.
      pooled: generated samples at most in scores of the whole distribution (sliced Wasserstein, quantiles, memory).
      remembered: members drawn for training samples in the test of memory.
      resolved: highest zonal wavenumber whose power is compared, where the truth is band-limited; None compares all.
      period: return period in blocks of `days` consecutive days.
    """

    block: int = 10
    pooled: int = 1000
    remembered: int = 8
    resolved: int | None = None
    period: float = 20.0
    days: int = 30


def score(domain: "Climate", generated: Sample, truth: Sample, condition: Condition) -> Scores:
    """Scores of `generated` `[member, n, *shape]` by `truth` `[n, *shape]`; conditions `[n, ...]`.

    Samples of several days are scored as single days, and by how one day follows another.
    """
    table: dict[str, Score] = {}
    curves: dict[str, np.ndarray] = {}
    condition = domain.each_day(condition)
    climatology = {} if domain.background else training_climatology(domain, condition)
    if domain.window > 1:
        for name in domain.quantities:
            _score_succession(domain, name, np.asarray(generated[name]), np.asarray(truth[name]), climatology[name], table)
    generated, truth = domain.as_days(generated), domain.as_days(truth)
    for name in domain.quantities:
        _score_ensemble(domain, name, np.asarray(generated[name]), np.asarray(truth[name]), table, curves)
    if domain.background:
        for name in domain.quantities:
            _score_downscaling(domain, name, np.asarray(generated[name]), np.asarray(truth[name]), condition, table)
            curves[f"calibration/{name}"] = reliability(np.asarray(generated[name]), np.asarray(truth[name]))
    else:
        for name in domain.quantities:
            _score_distribution(domain, name, np.asarray(generated[name]), np.asarray(truth[name]), climatology[name], table)
        if domain.forcing:
            _score_change(domain, generated, truth, climatology, table)
        _score_memory(domain, generated, truth, table)
    if domain.tells_balance:
        _score_balance(domain, generated, table)
    names = list(domain.quantities)
    for first, second in zip(names, names[1:], strict=False):
        both = np.stack([pool(np.asarray(generated[name]), domain.judge.pooled) for name in (first, second)], -1)
        of_truth = np.stack([np.asarray(truth[name]) for name in (first, second)], -1)
        block = domain.judge.block if domain.background else domain.window
        table[f"{first}, {second}: correlation error"] = _around(_correlation_error, both, of_truth, _thin(domain), block=block)
    return Scores(table, curves)


def _correlation_error(generated: np.ndarray, truth: np.ndarray) -> float:
    """Of two variables that stand along the last axis."""
    return metrics.correlation_error((generated[..., 0], generated[..., 1]), (truth[..., 0], truth[..., 1]))


def _score_succession(domain: "Climate", name: str, ensemble: np.ndarray, truth: np.ndarray, climatology: np.ndarray, table: dict) -> None:
    """How one day follows another in samples of several days: the change from day to day, and its correlation at one day's lag."""
    weights = domain.weights / domain.weights.sum()
    usual = climatology.reshape(-1, *domain.shape)

    def steps(samples: np.ndarray) -> tuple[np.ndarray, ...]:
        """Area means of the products of anomalies of a day and the next, and of their squares, `[n]`."""
        first, then = samples[..., :-1, :, :], samples[..., 1:, :, :]
        return tuple((part * weights).sum((-1, -2)).mean(-1) for part in (first * then, (first**2 + then**2) / 2, (then - first) ** 2))

    of_truth = steps(truth - usual)
    of_members = tuple(part.mean(0) for part in steps(ensemble - usual))

    def correlation_error(together: np.ndarray, square: np.ndarray, true_together: np.ndarray, true_square: np.ndarray) -> float:
        return float(together.mean() / square.mean() - true_together.mean() / true_square.mean())

    def change_ratio(change: np.ndarray, true_change: np.ndarray) -> float:
        return float(np.sqrt(change.mean() / true_change.mean()))

    table[f"{name}: lag-1 correlation error"] = metrics.interval([*of_members[:2], *of_truth[:2]], correlation_error, block=1)
    table[f"{name}: day-to-day change, ratio"] = metrics.interval([of_members[2], of_truth[2]], change_ratio, block=1, ideal=1.0)


def reliability(ensemble: np.ndarray, truth: np.ndarray, level: float = UPPER) -> np.ndarray:
    """Probability given and observed frequency, `[2, probability]`, of the event that a cell is above its `level` quantile of truth."""
    threshold = np.quantile(truth, level, axis=0)
    share = (ensemble > threshold).sum(0).ravel()
    happened = np.bincount(share, (truth > threshold).ravel(), len(ensemble) + 1)
    count = np.bincount(share, minlength=len(ensemble) + 1)
    told = count > 0
    return np.stack([np.flatnonzero(told) / len(ensemble), happened[told] / count[told]])


def _score_memory(domain: "Climate", generated: Sample, truth: Sample, table: dict) -> None:
    """How near generated samples come to training days, in every variable at once on a thinned grid: copies, and distances."""
    thin = _thin(domain)
    train = {name: domain.dataset[name].values[domain.rows("train")][:, *thin] for name in domain.quantities}
    spread = {name: np.float32(values.std() + 1e-12) for name, values in train.items()}

    def stacked(fields: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([fields[name] / spread[name] for name in domain.quantities], axis=-1)

    drawn = stacked({name: pool(np.asarray(generated[name]), COMPARED)[:, *thin] for name in domain.quantities})
    table["copies of training days"] = Score(metrics.exact_match_share(drawn, stacked(train)), 0.0)
    if not domain.another_climate:
        held_out = stacked({name: np.asarray(truth[name])[:, *thin] for name in domain.quantities})
        table["distance to the nearest training day, ratio"] = metrics.distance_ratio(
            drawn, stacked(train), held_out, block=domain.judge.block
        )


def _thin(domain: "Climate") -> tuple[slice, ...]:
    """Every so manieth cell along each axis of the grid."""
    return tuple(slice(None, None, max(1, cells // THIN_CELLS)) for cells in domain.grid)


def pool(ensemble: np.ndarray, most: int) -> np.ndarray:
    """Members and items as one set of at most `most` samples, evenly picked."""
    flat = ensemble.reshape(-1, *ensemble.shape[2:])
    return flat if len(flat) <= most else flat[np.linspace(0, len(flat) - 1, most).round().astype(int)]


def training_climatology(domain: "Climate", condition: Condition) -> Mapping[str, np.ndarray]:
    """Seasonal mean of the training split at no forcing, for the days of `condition`, `[n, y, x]`."""
    items = len(next(iter(condition.values()))) if condition else 1
    days = np.asarray(condition.get("day_of_year", np.zeros(items, np.float32)))
    return {name: np.asarray(means.harmonics(stat, days)) for name, stat in domain.climatology.items()}


def spectrum(domain: "Climate", fields: np.ndarray) -> np.ndarray:
    """Power by wavenumber `[..., k]`: zonal on the globe, radial on a limited area."""
    if domain.periodic[1]:
        latitude = domain.dataset[domain.dims[0]].values
        band = SPECTRAL_BAND if ((latitude >= SPECTRAL_BAND[0]) & (latitude <= SPECTRAL_BAND[1])).any() else (-90.0, 90.0)
        return metrics.zonal_spectrum(fields, latitude, band)[..., : domain.judge.resolved]
    return metrics.radial_spectrum(fields)


def _score_ensemble(domain: "Climate", name: str, ensemble: np.ndarray, truth: np.ndarray, table: dict, curves: dict) -> None:
    units, weights, block = domain.quantities[name].units, domain.weights, domain.judge.block
    squared = metrics.squared_error(ensemble, truth, weights)
    table[f"{name}: RMSE of the mean"] = metrics.interval(squared, metrics.rmse, block=block, units=units)
    table[f"{name}: CRPS"] = metrics.interval(metrics.crps(ensemble, truth, weights), block=block, units=units)
    table[f"{name}: energy score"] = metrics.interval(metrics.energy_score(ensemble, truth, weights), block=block, units=units)
    if len(ensemble) > 1:
        spread = metrics.variance(ensemble, weights)
        ratio = metrics.spread_skill_ratio(len(ensemble))
        table[f"{name}: spread-skill ratio"] = metrics.interval([spread, squared], ratio, block=block, ideal=1.0)
        ranks = metrics.rank_counts(ensemble, truth)
        table[f"{name}: rank deviation"] = metrics.interval(ranks, metrics.rank_deviation, block=block)
        curves[f"ranks/{name}"] = ranks.mean(0)
    power, reference = spectrum(domain, ensemble).mean(0), spectrum(domain, truth)
    table[f"{name}: log-spectral distance"] = metrics.interval([power, reference], metrics.log_spectral_distance, block=block, units="dB")
    curves[f"spectrum/{name}"] = power.mean(0)
    curves[f"spectrum of truth/{name}"] = reference.mean(0)
    curves[f"quantiles/{name}"] = np.quantile(pool(ensemble, domain.judge.pooled), QUANTILES)
    curves[f"quantiles of truth/{name}"] = np.quantile(truth, QUANTILES)


def _score_downscaling(domain: "Climate", name: str, ensemble: np.ndarray, truth: np.ndarray, condition: Condition, table: dict) -> None:
    assert domain.background
    quantity, block = domain.quantities[name], domain.judge.block
    coarse = np.asarray(condition[f"coarse_{name}"])
    mismatch = np.stack([(grid.coarsen(ensemble[:, i], domain.background.factor) - coarse[i]) ** 2 for i in range(len(truth))])
    table[f"{name}: coarse RMSE"] = metrics.interval(mismatch.mean((1, 2, 3)), metrics.rmse, block=block, units=quantity.units)
    if quantity.wet:
        wet = [metrics.exceedance(ensemble, quantity.wet), metrics.exceedance(truth[None], quantity.wet)]
        table[f"{name}: wet fraction ratio"] = metrics.interval(wet, metrics.ratio, block=block, ideal=1.0)
        tail = metrics.tail_crps(ensemble, truth, domain.extremes[name], domain.weights)
        table[f"{name}: CRPS above the {EXTREME:.0%} quantile"] = metrics.interval(tail, block=block, units=quantity.units)
        for level, label in ((0.99, "99 % quantile ratio"), (0.999, "99.9 % quantile ratio")):
            table[f"{name}: {label}"] = _bootstrap_ratio(ensemble, truth, level, block)
    else:
        flat = ensemble.reshape(-1, *truth.shape[1:])
        thin = _thin(domain)
        for level, label in ((0.01, "1 % quantile error"), (0.99, "99 % quantile error")):

            def error(g: np.ndarray, r: np.ndarray, level: float = level) -> float:
                weights = domain.weights if g.shape[1:] == domain.weights.shape else domain.weights[thin]
                return metrics.quantile_error(g, r, level, weights)

            table[f"{name}: {label}"] = _around(error, flat, truth, thin, block=block, units=quantity.units)
    _score_return_level(domain, name, ensemble, truth, table)


def _bootstrap_ratio(ensemble: np.ndarray, truth: np.ndarray, level: float, block: int, draws: int = 100) -> Score:
    """Ratio of pooled quantiles with an interval from resampled days; few draws, since each sorts every value."""
    value = metrics.pooled_quantile_ratio(ensemble, truth, level)
    if len(truth) < 3 * block:
        return Score(value, 1.0)
    few = ensemble[: max(1, min(len(ensemble), 4))]
    rows = metrics.block_rows(len(truth), block, draws, 0)
    drawn = [metrics.pooled_quantile_ratio(few[:, r], truth[r], level) for r in rows]
    return Score(value, 1.0, "", *metrics.around(value, np.array(drawn), len(truth) / block))


def _score_distribution(
    domain: "Climate", name: str, ensemble: np.ndarray, truth: np.ndarray, climatology: np.ndarray, table: dict
) -> None:
    weights, most = domain.weights, domain.judge.pooled
    generated, reference = pool(ensemble - climatology, most), truth - climatology
    thin = _thin(domain)

    def distance(g: np.ndarray, r: np.ndarray) -> float:
        return metrics.sliced_wasserstein(g, r, weights if g.shape[1:] == weights.shape else weights[thin])

    table[f"{name}: sliced Wasserstein"] = _around(distance, generated, reference, thin)
    for level, label in ((0.01, "1 % quantile error / sd"), (0.99, "99 % quantile error / sd")):

        def error(g: np.ndarray, r: np.ndarray, level: float = level) -> float:
            return metrics.quantile_error(g, r, level, relative=True)

        table[f"{name}: {label}"] = _around(error, generated, reference, thin)

    def deviation(g: np.ndarray, r: np.ndarray) -> float:
        return float(np.sqrt(g.var(0).mean() / r.var(0).mean()))

    table[f"{name}: deviation ratio"] = _around(deviation, generated, reference, thin, ideal=1.0)
    table[f"{name}: spatial correlation error"] = metrics.spatial_correlation_error(generated, reference)
    _score_return_level(domain, name, ensemble, truth, table)


def _around(
    statistic: Callable[..., float],
    generated: np.ndarray,
    reference: np.ndarray,
    thin: tuple[slice, ...],
    *,
    block: int = 1,
    ideal: float = 0.0,
    units: str = "",
    draws: int = 20,
) -> Score:
    """A statistic of two sets `[n, y, x, ...]`, with an interval from resampling the generated set on a thinned grid.

    The truth is one record; its own sampling error is the same for all competitors and shows in the bootstrap baseline.
    The interval is NaN where fewer than three blocks fit into the set.
    """
    value = statistic(generated, reference)
    few, of_truth = generated[:, *thin], reference[:, *thin]
    if len(few) < 3 * block:
        return Score(value, ideal, units)
    drawn = np.array([statistic(few[rows], of_truth) for rows in metrics.block_rows(len(few), block, draws, 0)])
    return Score(value, ideal, units, *metrics.around(value, drawn, len(few) / block))


def _score_return_level(domain: "Climate", name: str, ensemble: np.ndarray, truth: np.ndarray, table: dict) -> None:
    """Return level of maxima over blocks of days, generated less true; the interval covers the error of both."""
    days, period = domain.judge.days, domain.judge.period
    count = len(truth) // days
    if count < 5 or domain.item != "time":
        return
    coarse = max(1, min(domain.grid) // 12)  # a dozen cells across suffice, and keep the fits quick
    at = (slice(None), slice(None, None, coarse), slice(None, None, coarse))
    of_truth = truth[: count * days].reshape(count, days, *truth.shape[1:]).max(1)[at]
    each = ensemble[:, : count * days].reshape(len(ensemble) * count, days, *truth.shape[1:]).max(1)[:200][at]
    units = domain.quantities[name].units
    drawn, true = (metrics.return_level_score(m, period, weights=domain.weights[at[1:]], draws=50, units=units) for m in (each, of_truth))
    table[f"{name}: {period:g}-block return level error"] = Score(
        drawn.value - true.value, 0.0, units, drawn.low - true.high, drawn.high - true.low
    )


def _score_change(
    domain: "Climate", generated: Sample, truth: Sample, climatology: Mapping[str, np.ndarray], table: dict[str, Score]
) -> None:
    """The response to the forcing, from the climatology at no forcing: its global mean and its pattern."""
    area, block = domain.weights / domain.weights.sum(), domain.judge.block

    def pattern(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2 * area).sum()))

    for name, quantity in domain.quantities.items():
        members = np.asarray(generated[name]).mean(0) - climatology[name]
        true = np.asarray(truth[name]) - climatology[name]
        series = [(members * area).sum((1, 2)), (true * area).sum((1, 2))]
        low, high = _ends(metrics.interval(series[1], block=block))
        if low * high > 0:  # a change of nothing has no ratio
            table[f"{name}: change of the mean, ratio"] = metrics.interval(series, metrics.ratio, block=block, ideal=1.0)
        table[f"{name}: pattern error of the change"] = metrics.interval(
            [members, true], pattern, block=block, units=quantity.units, draws=100
        )


def _ends(score: Score) -> tuple[float, float]:
    """The interval of a score, or its value twice where none could be given."""
    return (score.low, score.high) if np.isfinite(score.low) else (score.value, score.value)


def _score_balance(domain: "Climate", generated: Sample, table: dict) -> None:
    """Geostrophic balance and mass of generated states; the ideal is the truth's own figure, given in the documentation."""
    latitude = domain.dataset[domain.dims[0]].values
    pick = {name: pool(np.asarray(generated[name]), 200) for name in GEOSTROPHIC}
    zg, ta, ps, ua = (pick[name] for name in GEOSTROPHIC)
    wind = np.stack([physics.geostrophic_wind(*each, latitude) for each in zip(zg, ta, ps, strict=True)])
    inside = physics.mid_latitudes(latitude)
    u, balanced = (values[:, inside].reshape(len(values), -1).astype(np.float64) for values in (ua, wind))
    series = [part.mean(1) for part in (u, balanced, u**2, balanced**2, u * balanced)]
    one = domain.window  # of the days that belong together
    table["geostrophic residual"] = metrics.interval(series, _residual, block=one)
    table["correlation with the geostrophic wind"] = metrics.interval(series, _correlation, block=one, ideal=1.0)
    mass = (ps.astype(np.float64) * domain.weights).mean((1, 2)) / HECTOPASCAL
    about = [mass - mass.mean(), (mass - mass.mean()) ** 2]
    table["deviation of global mean pressure"] = metrics.interval(about, _deviation, block=one, units="hPa")


def _deviation(mean: float, square: float) -> float:
    return float(np.sqrt(max(square - mean**2, 0.0)))


def _residual(u: float, balanced: float, u2: float, balanced2: float, both: float) -> float:
    """Rms of u - balanced over the deviation of u, from means of u, of balanced, of their squares and of their product."""
    return metrics.ratio(float(np.sqrt(max(u2 - 2 * both + balanced2, 0.0))), _deviation(u, u2))


def _correlation(u: float, balanced: float, u2: float, balanced2: float, both: float) -> float:
    return metrics.ratio(both - u * balanced, _deviation(u, u2) * _deviation(balanced, balanced2))


def membership(domain: "Climate", drawn: Mapping[str, tuple[Sample, Sample]]) -> Score:
    """Whether samples betray what the generator was trained on: AUC of telling training days from held-out days.

    Args:
      drawn: "train" and "held out" -> (generated `[member, n, ...]`, truth `[n, ...]`) for days of that split.
    """
    scaled = {}
    spread = {name: np.asarray(drawn["train"][1][name]).std() + 1e-12 for name in domain.quantities}

    def stacked(sample: Sample) -> np.ndarray:
        return np.stack([np.asarray(sample[name], np.float32) / spread[name] for name in domain.quantities], axis=-1)

    every = [pool(stacked(generated), domain.judge.pooled) for generated, _ in drawn.values() if generated]
    for split, (generated, truth) in drawn.items():
        if domain.background:
            scaled[split] = metrics.nearest_member_distance(stacked(generated), stacked(truth))
        else:
            scaled[split] = metrics.nearest_distance(stacked(truth), np.concatenate(every))
    return metrics.membership_auc(scaled["train"], scaled["held out"], block=domain.judge.block)
