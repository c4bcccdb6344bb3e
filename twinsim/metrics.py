"""Scores of an ensemble against truth, of a set of samples against another, and the intervals they come with.

An ensemble is `[member, n, *grid]`, truth `[n, *grid]`; `weights` broadcast to `grid` and need not be normalised. Most scores
return a series, one row a sample `[n]` or `[n, k]`: `interval` turns series into a figure with its bootstrap interval, and
a function of their means is how a ratio such as spread over skill is formed. Nothing here knows a domain.

The fair CRPS and the threshold-weighted one are those of the `scores` library, which the tests hold them to; they are
written out here because a domain scores hundreds of millions of values, ten times faster without labelled axes.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.fft import dctn
from scipy.special import gamma, ndtri, stdtrit

from twinsim.base import BadInput, Score

BLOCK = 1 << 22  # values handled at once, so that float64 copies stay small
LEVEL = (2.5, 97.5)  # per cent, of the interval

# ---------------------------------------------------------------- series and their intervals


def interval(
    series: np.ndarray | Sequence[np.ndarray],
    statistic: Callable[..., float] | None = None,
    *,
    block: int = 10,
    draws: int = 1000,
    seed: int = 0,
    ideal: float = 0.0,
    units: str = "",
) -> Score:
    """A statistic of means of series, with its 95 % moving-block bootstrap interval (Kuensch 1989).

    Args:
      series: one array `[n, ...]`, or several that are resampled together.
      statistic: takes the mean of each series over `n`, returns a number; the mean itself by default.
      block: samples that follow one another and may depend on one another; 1 for independent samples.

    The interval is NaN where fewer than three blocks fit into the record.
    """
    parts = [series] if isinstance(series, np.ndarray) else list(series)
    n = len(parts[0])
    if n == 0 or any(len(part) != n for part in parts):
        raise BadInput(f"interval: expected series of one common length above 0, got lengths {[len(part) for part in parts]}")
    apply = statistic or (lambda mean: float(mean))
    parts = [np.asarray(part, np.float64) for part in parts]
    value = float(apply(*[part.mean(0) for part in parts]))
    if n < 3 * block:
        return Score(value, ideal, units)
    share = _block_counts(n, block, draws, seed) / n
    means = [(share @ part.reshape(n, -1)).reshape((draws,) + part.shape[1:]) for part in parts]
    drawn = np.array([apply(*[mean[d] for mean in means]) for d in range(draws)], np.float64)
    return Score(value, ideal, units, *around(value, drawn, n / block))


def around(value: float, drawn: np.ndarray, blocks: float) -> tuple[float, float]:
    """The 95 % interval of resampled values, laid around the `value` of the whole record; NaN where no value is finite.

    A resample repeats samples, which adds a distance of its own to a statistic that is not linear: their mean lies beside the value, and
    what it lies beside is taken off (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 10.2). Of few `blocks`
    resamples spread too little, by sqrt(1 - 1 / blocks), and know their spread too little for a normal law: the interval is widened to
    Student's (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.2). What is never negative has no negative end.
    """
    if not np.isfinite(drawn).any() or blocks <= 1:
        return np.nan, np.nan
    wider = stdtrit(blocks - 1, LEVEL[1] / 100) / ndtri(LEVEL[1] / 100) * np.sqrt(blocks / (blocks - 1))
    low, high = wider * (np.nanpercentile(drawn, LEVEL) - np.nanmean(drawn)) + value
    return float(max(low, 0.0) if np.nanmin(drawn) >= 0 else low), float(high)


def block_rows(n: int, block: int, draws: int, seed: int) -> np.ndarray:
    """Rows `[draws, n]` of moving-block resamples of a record of `n`: pieces of `block` rows that follow one another."""
    if not 1 <= block <= n:
        raise BadInput(f"bootstrap: expected a block between 1 and {n} samples, got {block}")
    pieces = -(-n // block)
    start = np.random.default_rng(seed).integers(n - block + 1, size=(draws, pieces))
    return (start[:, :, None] + np.arange(block)).reshape(draws, -1)[:, :n]


def _block_counts(n: int, block: int, draws: int, seed: int) -> np.ndarray:
    """How often each sample is in each resample, `[draws, n]`."""
    rows = block_rows(n, block, draws, seed)
    flat = (rows + n * np.arange(draws)[:, None]).ravel()
    return np.bincount(flat, minlength=draws * n).reshape(draws, n).astype(np.float64)


# ---------------------------------------------------------------- ensemble scores, one value a sample


def squared_error(ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Squared error of the ensemble mean `[n]`; `rmse` of its mean is the root mean square error."""
    return _by_rows(lambda e, t: (_mean(e) - t) ** 2, ensemble, truth, weights)


def variance(ensemble: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Variance among members (with ddof 1), averaged over the grid, `[n]`."""
    _check_members(ensemble, 2)
    return _by_rows(lambda e, t: e.var(0, ddof=1, dtype=np.float64), ensemble, ensemble[0], weights)


def crps(ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Fair continuous ranked probability score `[n]`; with one member the absolute error.

    mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)); the double sum by sorting (Hersbach 2000; Ferro 2014 for fairness).
    """
    return _by_rows(_fair_crps, ensemble, truth, weights)


def tail_crps(ensemble: np.ndarray, truth: np.ndarray, threshold: np.ndarray | float, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Fair CRPS with weight on values above `threshold` (broadcastable to `grid`) only, `[n]` (Gneiting & Ranjan 2011)."""
    return _by_rows(lambda e, t: _fair_crps(np.maximum(e, threshold), np.maximum(t, threshold)), ensemble, truth, weights)


def energy_score(ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Fair energy score `[n]` of weighted fields, divided by the root of the number of cells (Gneiting & Raftery 2007)."""
    _check_shapes(ensemble, truth)
    members, n, grid = len(ensemble), len(truth), truth.shape[1:]
    root = np.sqrt(_weights(weights, grid).ravel() * np.prod(grid))
    out = np.empty(n)
    for i in range(n):
        gap = (ensemble[:, i].reshape(members, -1).astype(np.float64) - truth[i].reshape(-1)) * root
        gram = gap @ gap.T
        size = np.diag(gram)
        out[i] = np.sqrt(size).mean()
        if members > 1:
            pair = np.sqrt(np.maximum(size[:, None] + size - 2 * gram, 0))
            np.fill_diagonal(pair, 0)
            out[i] -= pair.sum() / (2 * members * (members - 1))
    return out / np.sqrt(np.prod(grid))


def rank_counts(ensemble: np.ndarray, truth: np.ndarray, seed: int = 0) -> np.ndarray:
    """Share of the grid at which truth has each rank among the members, `[n, member + 1]`; ties broken at random."""
    _check_shapes(ensemble, truth)
    members, n = len(ensemble), len(truth)
    random = np.random.default_rng(seed)
    out = np.empty((n, members + 1))
    for i in range(n):
        below = (ensemble[:, i] < truth[i]).sum(0)
        equal = (ensemble[:, i] == truth[i]).sum(0)
        rank = below + np.floor(random.random(truth[i].shape) * (equal + 1)).astype(int)
        out[i] = np.bincount(rank.ravel(), minlength=members + 1) / rank.size
    return out


# ---------------------------------------------------------------- statistics of mean series


def rmse(squared: float | np.ndarray) -> float:
    """Root of a mean squared error."""
    return float(np.sqrt(squared))


def spread_skill_ratio(members: int) -> Callable[[float, float], float]:
    """(mean variance, mean squared error) -> sqrt((M + 1) / M * variance / error); 1 is best (Fortin et al. 2014)."""
    return lambda spread, squared: float(np.sqrt((members + 1) / members * spread / squared)) if squared > 0 else np.nan


def rank_deviation(shares: np.ndarray) -> float:
    """Sum over ranks of |share - 1 / (M + 1)|; 0 for a calibrated ensemble."""
    return float(np.abs(shares - 1 / len(shares)).sum())


def log_spectral_distance(power: np.ndarray, reference: np.ndarray) -> float:
    """Rms over wavenumbers of 10 log10(power / reference), dB."""
    floor = 1e-12
    return float(np.sqrt(np.mean((10 * np.log10((power + floor) / (reference + floor))) ** 2)))


def ratio(a: float, b: float) -> float:
    """a / b, NaN where there is nothing to divide by."""
    return float(a / b) if b else np.nan


# ---------------------------------------------------------------- spectra


def radial_spectrum(x: np.ndarray) -> np.ndarray:
    """Mean power of fields `[..., y, x]` in integer radial wavenumbers 1 .. min(y, x) - 1, orthonormal DCT-II, `[..., k]`.

    The cosine transform takes a field of a limited area as it is, without a jump at its edge (Denis et al. 2002).
    """
    ny, nx = x.shape[-2:]
    side = min(ny, nx)
    radius = np.hypot(np.arange(ny)[:, None] / ny, np.arange(nx) / nx) * side
    ring = np.rint(radius).astype(int).ravel()
    members = (ring[:, None] == np.arange(1, side)) / np.maximum(np.bincount(ring, minlength=side)[1:side], 1)
    flat = x.reshape((-1, ny, nx))
    out = np.empty((len(flat), side - 1))
    for rows in _pieces(len(flat), ny * nx):
        power = dctn(flat[rows].astype(np.float64), axes=(-2, -1), norm="ortho") ** 2
        out[rows] = power.reshape(len(power), -1) @ members
    return out.reshape(x.shape[:-2] + (side - 1,))


def zonal_spectrum(x: np.ndarray, lat: np.ndarray, band: tuple[float, float] = (30.0, 60.0)) -> np.ndarray:
    """Mean zonal power of `[..., lat, lon]` in a band of latitudes, without the first and last wavenumber, `[..., k]`."""
    inside = (np.asarray(lat) >= band[0]) & (np.asarray(lat) <= band[1])
    if not inside.any():
        raise BadInput(f"zonal_spectrum: expected latitudes between {band[0]} and {band[1]}, got {np.min(lat)} to {np.max(lat)}")
    return (np.abs(np.fft.rfft(x[..., inside, :], axis=-1)) ** 2).mean(-2)[..., 1:-1]


# ---------------------------------------------------------------- distributions


def sliced_wasserstein(
    x: np.ndarray, reference: np.ndarray, weights: np.ndarray | float = 1.0, directions: int = 256, levels: int = 200, seed: int = 0
) -> float:
    """Mean Wasserstein-1 distance of two sets of fields `[n, *grid]` along random unit directions (Bonneel et al. 2015).

    Fields are scaled by the reference's standard deviation a cell (at least 1 % of its grid mean), and by the root of the
    normalised weights.
    """
    grid = reference.shape[1:]
    spread = reference.reshape(len(reference), -1).std(0)
    spread = np.maximum(spread, 0.01 * spread.mean() + 1e-9)  # where it never rains, the first drop is no infinite distance
    scale = np.sqrt(_weights(weights, grid).ravel() * np.prod(grid)) / spread
    towards = np.random.default_rng(seed).normal(size=(scale.size, directions))
    towards *= scale[:, None] / np.linalg.norm(towards, axis=0)
    level = (np.arange(levels) + 0.5) / levels
    centre = reference.reshape(len(reference), -1).mean(0, dtype=np.float64)
    a, b = (np.quantile((part.reshape(len(part), -1) - centre) @ towards, level, axis=0) for part in (x, reference))
    return float(np.abs(a - b).mean())


def quantile_error(
    generated: np.ndarray, truth: np.ndarray, level: float, weights: np.ndarray | float = 1.0, relative: bool = False
) -> float:
    """Mean over cells of |quantile of `generated` - quantile of `truth`|, `[n, *grid]`; over truth's mean deviation if `relative`."""
    a, b = np.quantile(generated, level, axis=0), np.quantile(truth, level, axis=0)
    error = float((np.abs(a - b) * _weights(weights, truth.shape[1:])).sum())
    return ratio(error, float(truth.std(0).mean())) if relative else error


def pooled_quantile_ratio(generated: np.ndarray, truth: np.ndarray, level: float) -> float:
    """Quantile of all values of `generated` over that of `truth`; 1 is best."""
    return ratio(float(np.quantile(generated, level)), float(np.quantile(truth, level)))


def exceedance(x: np.ndarray, threshold: float, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Share of members and grid above `threshold`, of an ensemble `[member, n, *grid]`: `[n]`; truth goes in as `truth[None]`.

    The `ratio` of the means of two such series is the wet-fraction ratio.
    """
    return _by_rows(lambda e, t: (e > threshold).mean(0, dtype=np.float64), x, x[0], weights)


def _products(z: np.ndarray, lag: int, axis: int) -> np.ndarray:
    """Products of cells `lag` apart along a grid axis, `[n, *grid less lag]`."""
    size = z.shape[axis]
    return np.take(z, np.arange(size - lag), axis) * np.take(z, np.arange(lag, size), axis)


def lag_products(x: np.ndarray, lags: Sequence[int] = (1, 3, 6)) -> np.ndarray:
    """Products of standardised cells `lags` apart along the two grid axes of `[n, y, x]`, means over the grid `[n, pair]`.

    Their mean over samples is the correlation.
    """
    z = _standardised(x)
    pairs = [(lag, axis) for axis in (-2, -1) for lag in lags if lag < x.shape[axis]]
    return np.stack([np.nanmean(_products(z, lag, axis), axis=(1, 2)) for lag, axis in pairs], axis=1)


def spatial_correlation_error(generated: np.ndarray, truth: np.ndarray, lags: Sequence[int] = (1, 3, 6)) -> Score:
    """Mean |difference| of the grid-mean correlation between cells `lags` apart, over lags and the two grid axes of `[n, y, x]`.

    The interval is that of independent generated samples, whose mean and deviation are taken as they are.
    """
    of_truth = lag_products(truth, lags).mean(0)
    return interval(lag_products(generated, lags), lambda mean: float(np.mean(np.abs(mean - of_truth))), block=1)


def correlation_error(generated: tuple[np.ndarray, np.ndarray], truth: tuple[np.ndarray, np.ndarray]) -> float:
    """Mean over cells of |difference| of the correlation between two variables, each pair of arrays `[n, *grid]`."""
    of = [(_standardised(a) * _standardised(b)).mean(0) for a, b in (generated, truth)]
    return float(np.nanmean(np.abs(of[0] - of[1])))


# ---------------------------------------------------------------- return levels


def gev_by_l_moments(maxima: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Location, scale and shape of the generalised extreme value distribution of block maxima `[block, ...]`.

    Estimates by L-moments: Hosking (1990), J. R. Stat. Soc. B 52, table 2; the shape k by the approximation of Hosking,
    Wallis & Wood (1985). Positive k means a bounded upper tail (scipy's `genextreme` has the same sign).
    """
    n = len(maxima)
    if n < 3:
        raise BadInput(f"gev_by_l_moments: expected at least 3 block maxima, got {n}")
    x = np.sort(maxima.astype(np.float64), axis=0)
    i = np.arange(n).reshape((-1,) + (1,) * (x.ndim - 1))
    b0, b1, b2 = x.mean(0), (i * x).mean(0) / (n - 1), (i * (i - 1) * x).mean(0) / ((n - 1) * (n - 2))
    l1, l2, l3 = b0, 2 * b1 - b0, 6 * b2 - 6 * b1 + b0
    with np.errstate(invalid="ignore", divide="ignore"):
        c = 2 / (3 + l3 / l2) - np.log(2) / np.log(3)
        k = 7.8590 * c + 2.9554 * c**2
        k = np.where(np.abs(k) < 1e-6, 1e-6, k)  # the Gumbel limit, to working precision
        scale = l2 * k / ((1 - 2.0**-k) * gamma(1 + k))
        location = l1 - scale * (1 - gamma(1 + k)) / k
    return location, scale, k


def return_level(maxima: np.ndarray, period: float) -> np.ndarray:
    """Value exceeded once in `period` blocks, of block maxima `[block, ...]`."""
    location, scale, k = gev_by_l_moments(maxima)
    return location + scale / k * (1 - (-np.log(1 - 1 / period)) ** k)


def return_level_score(
    maxima: np.ndarray, period: float, *, weights: np.ndarray | float = 1.0, draws: int = 500, seed: int = 0, units: str = ""
) -> Score:
    """Grid-mean return level of block maxima `[block, *grid]` with a 95 % interval from resampled blocks."""
    weight = _weights(weights, maxima.shape[1:])

    def level(rows: np.ndarray | slice) -> float:
        of_cell = return_level(maxima[rows], period)
        return float((of_cell * weight).sum()) if np.isfinite(of_cell).all() else np.nan

    value, drawn = level(slice(None)), np.array([level(rows) for rows in block_rows(len(maxima), 1, draws, seed)])
    return Score(value, np.nan, units, *around(value, drawn, len(maxima)))


# ---------------------------------------------------------------- memorisation


def nearest_distance(x: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Root-mean-square distance of every `x` `[n, ...]` to its nearest neighbour in `among` `[m, ...]`, `[n]`.

    Divide variables by their spread beforehand. An exact copy has distance 0.
    """
    a, b = x.reshape(len(x), -1), among.reshape(len(among), -1)
    if a.shape[1] != b.shape[1]:
        raise BadInput(f"nearest_distance: expected samples of {b.shape[1]} values, got {a.shape[1]}")
    centre = b.mean(0, dtype=np.float64).astype(np.float32)
    other = (b - centre).astype(np.float32)
    half = 0.5 * np.einsum("ij,ij->i", other, other, dtype=np.float64)
    nearest = np.empty(len(a), int)
    for rows in _pieces(len(a), max(len(b), a.shape[1])):
        nearest[rows] = np.argmin(half - (a[rows] - centre).astype(np.float32) @ other.T, axis=1)
    out = np.empty(len(a))
    for rows in _pieces(len(a), a.shape[1]):
        out[rows] = np.sqrt(np.mean((a[rows].astype(np.float64) - b[nearest[rows]]) ** 2, axis=1))
    return out


def nearest_member_distance(ensemble: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Root-mean-square distance of each truth `[n, ...]` to the nearest member drawn for it, `[member, n, ...]`: `[n]`."""
    _check_shapes(ensemble, truth)
    gaps = [np.mean((member.reshape(len(truth), -1) - truth.reshape(len(truth), -1)) ** 2, axis=1, dtype=np.float64) for member in ensemble]
    return np.sqrt(np.min(gaps, axis=0))


def distance_ratio(
    generated: np.ndarray, train: np.ndarray, held_out: np.ndarray, *, block: int = 10, draws: int = 500, seed: int = 0
) -> Score:
    """Median distance of generated samples to training samples over that of held-out samples; well below 1 is suspicious.

    A screening only: a set that passes may still leak (use `membership_auc`). The held-out record should cover the same
    seasons as training; its interval resamples blocks of held-out samples, and single generated samples.
    """
    a, b = nearest_distance(generated, train), nearest_distance(held_out, train)
    value = ratio(float(np.median(a)), float(np.median(b)))
    if len(b) < 3 * block:
        return Score(value, 1.0)
    drawn_a = np.median(a[block_rows(len(a), 1, draws, seed)], axis=1)
    drawn_b = np.median(b[block_rows(len(b), block, draws, seed + 1)], axis=1)
    return Score(value, 1.0, "", *around(value, drawn_a / np.maximum(drawn_b, np.finfo(np.float64).tiny), len(b) / block))


def exact_match_share(generated: np.ndarray, train: np.ndarray, tolerance: float = 1e-5) -> float:
    """Share of generated samples that copy a training sample, to `tolerance` of the training samples' spread."""
    spread = float(np.sqrt(train.reshape(len(train), -1).var(0, dtype=np.float64).mean()))
    return float((nearest_distance(generated, train) <= tolerance * spread).mean())


def membership_auc(
    train_distance: np.ndarray, held_out_distance: np.ndarray, *, block: int = 10, draws: int = 1000, seed: int = 0
) -> Score:
    """How well the distance to the nearest generated sample tells training items `[n]` from held-out items `[m]`: the AUC.

    0.5 is a guess; a generator that memorises gives 1. The attack of Chen et al. (2020), "GAN-Leaks". Distances come from
    `nearest_distance(items, generated)` for an unconditional generator, and from `nearest_member_distance`, with draws for
    the conditions of training and held-out items alike, for a conditional one. Both records are resampled in blocks, as
    days that follow one another are not independent. A held-out record of another season or climate moves the AUC from 0.5
    by itself, so give one that training could have come from, and name it where the figure is shown.
    """
    n, m = len(train_distance), len(held_out_distance)
    if not n or not m:
        raise BadInput(f"membership_auc: expected distances of training and held-out items, got {n} and {m}")
    pooled = np.concatenate([train_distance, held_out_distance])
    level, rank = np.unique(pooled, return_inverse=True)

    def auc(of_train: np.ndarray, of_held: np.ndarray) -> float:
        near = np.bincount(rank[:n], of_train, len(level))
        far = np.bincount(rank[n:], of_held, len(level))
        beyond = far.sum() - np.cumsum(far)
        return float((near * (beyond + 0.5 * far)).sum() / (near.sum() * far.sum()))

    value = auc(np.ones(n), np.ones(m))
    if min(n, m) < 3 * block:
        return Score(value, 0.5)
    resampled = zip(_block_counts(n, block, draws, seed), _block_counts(m, block, draws, seed + 1), strict=True)
    return Score(value, 0.5, "", *around(value, np.array([auc(a, b) for a, b in resampled]), min(n, m) / block))


# ---------------------------------------------------------------- parts


def _fair_crps(ensemble: np.ndarray, truth: np.ndarray) -> np.ndarray:
    members = len(ensemble)
    error = np.abs(ensemble - truth).mean(0, dtype=np.float64)
    if members == 1:
        return error
    order = (2 * np.arange(1, members + 1) - members - 1) / (members * (members - 1))
    deviation = np.sort(ensemble - truth, axis=0)  # differences, so that a large mean costs no digits
    return error - np.tensordot(order, deviation, axes=1)


def _mean(ensemble: np.ndarray) -> np.ndarray:
    return ensemble.mean(0, dtype=np.float64)


def _standardised(x: np.ndarray) -> np.ndarray:
    z = x - x.mean(0, dtype=np.float64)
    spread = z.std(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return z / np.where(spread > 0, spread, np.nan)


def _by_rows(
    score: Callable[[np.ndarray, np.ndarray], np.ndarray], ensemble: np.ndarray, truth: np.ndarray, weights: np.ndarray | float
) -> np.ndarray:
    """Weighted grid mean of a pointwise score, a sample at a time as far as memory asks for it, `[n]`."""
    _check_shapes(ensemble, truth)
    weight = _weights(weights, truth.shape[1:]).ravel()
    out = np.empty(len(truth))
    for rows in _pieces(len(truth), ensemble[:, 0].size if len(truth) else 1):
        value = score(ensemble[:, rows], truth[rows])
        out[rows] = value.reshape(len(value), -1) @ weight
    return out


def _pieces(n: int, size: int) -> list[slice]:
    step = max(1, BLOCK // max(size, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _weights(weights: np.ndarray | float, grid: tuple[int, ...]) -> np.ndarray:
    """Weights on the whole grid, summing to one."""
    try:
        full = np.broadcast_to(np.asarray(weights, np.float64), grid)
    except ValueError as error:
        raise BadInput(f"weights: expected a shape that broadcasts to {grid}, got {np.shape(weights)}") from error
    return full / full.sum()


def _check_shapes(ensemble: np.ndarray, truth: np.ndarray) -> None:
    if ensemble.shape[1:] != truth.shape:
        raise BadInput(f"scores: expected an ensemble of shape [member, {', '.join(map(str, truth.shape))}], got {list(ensemble.shape)}")


def _check_members(ensemble: np.ndarray, least: int) -> None:
    if len(ensemble) < least:
        raise BadInput(f"spread: expected at least {least} members, got {len(ensemble)}")
