"""What can be known without a generator: seasonal climatology and regression on the coarse field.

Every `fit_*` takes training arrays with a leading day axis and returns statistics, a dict of float32 arrays; the function
that applies them takes any leading axes, numpy or jax, and can be traced. Fits run in float64 on the host.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr, ndtri

from domains.climate.grid import array_module, matmul
from twinsim.base import Array, BadInput, Statistics

YEAR = 365.25  # days
CHUNK = 8192  # cells handled at once in float64, so that a global data set fits into memory
UNDETERMINED = 1e-2  # relative singular value below which the days do not tell harmonics apart (a winter-only record)
HALF_DAYS = 60  # length of the alternating pieces that make two halves of a record, longer than weather remembers
STILL = 1e-6  # spread below which a predictor is taken as constant


# ---------------------------------------------------------------- climatology


def fit_harmonics(values: np.ndarray, day_of_year: np.ndarray, extra: np.ndarray | None = None) -> Statistics:
    """Annual and semi-annual harmonics of `values` `[n, ...]` per cell, by least squares.

    Args:
      extra: a scalar a day `[n]` on which values depend linearly, such as sea-surface warming in K; its pattern has an
        annual harmonic of its own.

    Returns:
      `climatology` `[5, ...]`, and with `extra` `response` `[3, ...]`, per unit of `extra`. Raises BadInput.
    """
    n = len(values)
    if np.shape(day_of_year) != (n,) or (extra is not None and np.shape(extra) != (n,)):
        raise BadInput(f"fit_harmonics: expected one day of year (and one extra) for each of {n} samples, got {np.shape(day_of_year)}")
    basis = _harmonic_basis(np.asarray(day_of_year, np.float64))
    if not np.ptp(day_of_year):
        basis[:, 1:] = 0  # all of one day, or of no season: it is the mean
    scale = 0.0 if extra is None else float(np.std(extra))
    if extra is not None and scale > STILL:
        offset = np.asarray(extra, np.float64)[:, None] / scale
        basis = np.concatenate([basis, offset * basis[:, :3]], axis=1)
    solve = np.linalg.pinv(basis, rcond=UNDETERMINED)
    coefficients = np.zeros((basis.shape[1], values[0].size), np.float32)
    for cells, chunk in _chunks(values):
        coefficients[:, cells] = solve @ chunk
    coefficients = coefficients.reshape((-1,) + values.shape[1:])
    if extra is None:
        return {"climatology": coefficients}
    response = coefficients[5:] / np.float32(scale) if len(coefficients) > 5 else np.zeros_like(coefficients[:3])
    return {"climatology": coefficients[:5], "response": response}


def harmonics(stat: Statistics, day_of_year: Array, extra: Array | None = None) -> Array:
    """Climatology `[..., *grid]` of days `[...]`, with the response to `extra` `[...]` where one was fitted and is given."""
    xp = array_module(day_of_year, extra, stat["climatology"])
    basis = _harmonic_basis(xp.asarray(day_of_year, dtype=xp.float32))
    mean = _tensordot(basis, stat["climatology"])
    if extra is None or "response" not in stat:
        return mean
    return mean + _tensordot(basis[..., :3] * xp.asarray(extra, dtype=xp.float32)[..., None], stat["response"])


def shrink_pattern(response: np.ndarray, first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A response `[harmonic, y, x]` whose pattern is shrunk by its reliability, so that noise is not extrapolated.

    Each harmonic's departure from its area mean is multiplied by the share of its variance that is signal: the covariance of
    the departures in two halves of the record over the variance in the whole (split-half reliability, Spearman 1910 and
    Brown 1910). The area mean of the constant term stays as it is.
    """
    area = weights / weights.sum()
    out = np.empty_like(response)
    for k in range(len(response)):
        mean = (response[k] * area).sum()
        whole, a, b = (part[k] - (part[k] * area).sum() for part in (response, first, second))
        signal, power = float((a * b * area).sum()), float((whole**2 * area).sum())
        share = np.clip(signal / power, 0.0, 1.0) if power > 0 else 0.0
        out[k] = (mean if k == 0 else share * mean) + share * whole
    return out


def fit_season_spread(residual: np.ndarray, days: np.ndarray) -> np.ndarray:
    """The annual cycle of the variance of residuals `[n, y, x]` in each cell, relative to its mean: coefficients `[3, y, x]`."""
    coefficients = fit_harmonics(residual**2, days)["climatology"][:3]
    return coefficients / np.maximum(coefficients[:1], np.finfo(np.float32).tiny)


def season_spread(coefficients: Array, days: Array) -> Array:
    """Standard deviation of the residual on days `[...]`, relative to that of all days, `[..., y, x]`, between a third and three."""
    xp = array_module(days, coefficients)
    basis = _harmonic_basis(xp.asarray(days))[..., :3].astype(xp.float32)
    return xp.sqrt(xp.clip(_tensordot(basis, coefficients), 1 / 9, 9.0))


def fit_spread(residual: np.ndarray, extra: np.ndarray, weights: np.ndarray) -> np.float32:
    """How the standard deviation of residuals `[n, y, x]` grows per unit of `extra` `[n]`: the slope of its logarithm.

    One number for the whole grid, by least squares on the logarithm of the area-mean variance at each value of `extra`,
    each weighted by its number of days.
    """
    power = (residual**2 * (weights / weights.sum())).sum((1, 2), dtype=np.float64)
    levels, group = np.unique(np.round(extra, 3), return_inverse=True)
    if len(levels) < 2:
        return np.float32(0)
    count = np.bincount(group)
    log_variance = np.log(np.bincount(group, power) / count)
    return np.float32(np.polyfit(levels, log_variance, 1, w=np.sqrt(count))[0] / 2)


SEASON = 15  # days before and after that count as the same season


def days_apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How far two days of the year lie apart, the shorter way round, in days."""
    return np.abs((first - second + YEAR / 2) % YEAR - YEAR / 2)


SPREAD_NODES = 17  # of a spread that depends on the expected value


def fit_spread_of_expected(residual: np.ndarray, expected: np.ndarray) -> Statistics:
    """How the standard deviation of residuals `[n, y, x]` depends on the expected value, such as that of rain: `node`, `spread` `[node]`.

    One table for the whole grid: the nodes are the means of classes of equal size, and the mean square over all is one.
    """
    value, square = np.asarray(expected, np.float64).ravel(), np.asarray(residual, np.float64).ravel() ** 2
    edges = np.quantile(value, np.linspace(0, 1, SPREAD_NODES + 1)[1:-1])
    group = np.searchsorted(edges, value)
    count = np.bincount(group, minlength=SPREAD_NODES)
    filled = count > 0  # classes of many equal values (no rain) fall together
    node = np.bincount(group, value, SPREAD_NODES)[filled] / count[filled]
    spread = np.sqrt(np.bincount(group, square, SPREAD_NODES)[filled] / count[filled] / square.mean()) + STILL
    return {"node": node.astype(np.float32), "spread": spread.astype(np.float32)}


def spread_of_expected(stat: Statistics, expected: Array) -> Array:
    """The relative standard deviation of the residual where `expected` is expected, linear between nodes, of the same shape."""
    return jnp.interp(jnp.asarray(expected), stat["node"], stat["spread"])


def _harmonic_basis(day_of_year: Array) -> Array:
    xp = array_module(day_of_year)
    t = 2 * np.pi * day_of_year / YEAR
    return xp.stack([xp.ones_like(t), xp.cos(t), xp.sin(t), xp.cos(2 * t), xp.sin(2 * t)], axis=-1)


# ---------------------------------------------------------------- normal scores

SCORE_STEP = 0.125  # between nodes of a normal-score table, in standard deviations
SCORE_ENDS = (-3.0, 3.25)  # the outermost nodes; 3.25 is the expected largest of about 1,000 independent values
DRY_FLOOR = 0.05  # of the grid-mean value: below it a relative response means nothing


def fit_scores(values: np.ndarray) -> Statistics:
    """Quantiles of `values` `[n, y, x]` of each cell at evenly spaced standard-normal scores: `quantiles [node, y, x]`.

    The normal-score transform (Gaussian anamorphosis; Chiles & Delfiner 2012, section 6.2) makes a variable with many zeros and a
    long tail, such as rain, Gaussian in each cell.
    """
    nodes = np.arange(SCORE_ENDS[0], SCORE_ENDS[1] + SCORE_STEP / 2, SCORE_STEP)
    return {"quantiles": np.quantile(values, ndtr(nodes), axis=0).astype(np.float32)}


def to_scores(stat: Statistics, values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Standard-normal scores of `values` `[n, y, x]`, on the host. Equal values (no rain) share their scores out at random."""
    table = stat["quantiles"]
    out = np.empty(values.shape, np.float32)
    random = np.random.default_rng(seed).random(values.shape, np.float32)
    low, high = ndtr(SCORE_ENDS)
    share = ndtr(np.arange(len(table)) * SCORE_STEP + SCORE_ENDS[0])
    for i in np.ndindex(values.shape[1:]):
        column, at = values[(slice(None), *i)], table[(slice(None), *i)]
        left = np.interp(column, at, share)  # of equal nodes, numpy takes the last
        tied = column <= at[0]
        if tied.any():
            last = share[np.searchsorted(at, at[0], side="right") - 1]
            left = np.where(tied, random[(slice(None), *i)] * last, left)
        out[(slice(None), *i)] = ndtri(np.clip(left, low / 4, 1 - (1 - high) / 4))
    return out


def from_scores(stat: Statistics, scores: Array) -> Array:
    """The values `[y, x]` of standard-normal scores `[y, x]`, linear between nodes and, with the outermost slopes, beyond them.

    Below the lowest node a variable with a bound, such as rain, has to be clipped by the caller.
    """
    xp = array_module(scores, stat["quantiles"])
    place = (scores - SCORE_ENDS[0]) / SCORE_STEP
    node = xp.clip(xp.floor(place), 0, len(stat["quantiles"]) - 2).astype(xp.int32)
    below = xp.take_along_axis(stat["quantiles"], node[None], axis=0)[0]
    above = xp.take_along_axis(stat["quantiles"], node[None] + 1, axis=0)[0]
    return below + (above - below) * (place - node.astype(place.dtype))


def fit_relative_response(values: np.ndarray, days: np.ndarray, extra: np.ndarray, weights: np.ndarray) -> Statistics:
    """How the mean of a non-negative variable `[n, y, x]` answers to `extra`, relative to itself: `slope`, `mean` `[y, x]`.

    The pattern of the slope is shrunk by its split-half reliability (`shrink_pattern`).
    """
    halves = [(np.arange(len(values)) // HALF_DAYS) % 2 == half for half in (0, 1)]
    whole = fit_harmonics(values, days, extra)
    parts = [fit_harmonics(values[half], days[half], extra[half])["response"] for half in halves]
    slope = shrink_pattern(whole["response"], parts[0], parts[1], weights)[0]
    mean = whole["climatology"][0]
    floor = np.float32(DRY_FLOOR) * max(float(mean.mean()), float(np.finfo(np.float32).tiny))
    return {"slope": slope, "mean": np.maximum(mean, 0) + floor}


def relative_response(stat: Statistics, extra: Array) -> Array:
    """The factor by which the mean of each cell changes, `[..., y, x]`, between a fifth and five."""
    xp = array_module(extra, stat["slope"])
    return xp.clip(1 + xp.asarray(extra)[..., None, None] * stat["slope"] / stat["mean"], 0.2, 5.0)


# ---------------------------------------------------------------- regression


def fit_ridge(x: np.ndarray, y: np.ndarray, penalty: float, folds: int = 5) -> tuple[Statistics, np.ndarray]:
    """Ridge regression of `y` `[n, ...]` on `x` `[n, predictor]`, and what it predicts for days it has not seen.

    Predictors are standardised; `penalty` is relative to the mean diagonal of X'X. The second result `[n, ...]` is out of
    fold: each of `folds` contiguous pieces of the record is predicted from the others.
    """
    _check_folds(len(x), len(y), folds)
    mean_x = x.mean(0, dtype=np.float64)
    scale_x = x.std(0, dtype=np.float64) + STILL
    z = (x - mean_x) / scale_x
    weights_all = _ridge_weights(z, penalty)
    by_fold = _fold_weights(z, penalty, folds)
    width = y[0].size
    mean_y, coefficients = np.empty(width, np.float32), np.empty((z.shape[1], width), np.float32)
    out_of_fold = np.empty((len(y), width), np.float32)
    for cells, chunk in _chunks(y):
        mean_y[cells] = chunk.mean(0)
        coefficients[:, cells] = weights_all @ chunk
        for held, seen, weights, centre in by_fold:
            out_of_fold[held, cells] = chunk[seen].mean(0) + (z[held] - centre) @ (weights @ chunk[seen])
    grid = y.shape[1:]
    stat = {
        "mean_x": mean_x.astype(np.float32),
        "scale_x": scale_x.astype(np.float32),
        "mean_y": mean_y.reshape(grid),
        "coefficients": coefficients.reshape((-1,) + grid),
    }
    return stat, out_of_fold.reshape(y.shape)


def predict_ridge(stat: Statistics, x: Array) -> Array:
    """Prediction `[..., *grid]` for predictors `[..., predictor]`."""
    z = (x - _lift(stat["mean_x"], x.ndim)) / _lift(stat["scale_x"], x.ndim)
    y = _tensordot(z, stat["coefficients"])
    return y + _lift(stat["mean_y"], y.ndim)


def fit_local_ridge(
    coarse: np.ndarray, y: np.ndarray, penalty: float, folds: int = 5, periodic: tuple[bool, bool] = (False, True)
) -> tuple[Statistics, np.ndarray]:
    """Ridge regression of every block of fine cells on the 3 x 3 coarse cells around it: for grids with more cells than days.

    Args:
      coarse: predictors `[n, channel, cy, cx]`. A channel is scaled by its spread over the neighbourhood.
      y: `[n, ..., y, x]` on a grid an integer number of times finer.
      penalty: relative to the mean diagonal of X'X.

    Returns:
      Statistics for `predict_local_ridge`, and out-of-fold predictions `[n, ..., y, x]`. Raises BadInput.
    """
    n, channel, cy, cx = coarse.shape
    _check_folds(n, len(y), folds)
    factor = y.shape[-1] // cx
    if y.shape[-2:] != (cy * factor, cx * factor):
        raise BadInput(f"fit_local_ridge: expected a fine grid that is a multiple of {cy} x {cx}, got {y.shape[-2]} x {y.shape[-1]}")
    lead = y.shape[1:-2]
    mean_x = coarse.mean(0, dtype=np.float64)
    near = np.asarray(_neighbours(coarse - mean_x, periodic))
    blocks = y.reshape((n, -1, cy, factor, cx, factor))
    width = blocks[0, :, 0, :, 0].size
    coefficients = np.empty((cy, cx, 9 * channel, width), np.float32)
    mean_y = np.empty((cy, cx, width), np.float32)
    out_of_fold = np.empty(blocks.shape, np.float32)
    for i in range(cy):
        for j in range(cx):
            raw = near[:, i, j].reshape(n, channel, 9)
            scale = np.repeat(np.sqrt((raw**2).mean((0, 2))) + STILL, 9)
            z = near[:, i, j] / scale
            target = blocks[:, :, i, :, j].reshape(n, width).astype(np.float64)
            mean_y[i, j] = target.mean(0)
            coefficients[i, j] = _ridge_weights(z, penalty) @ target / scale[:, None]
            for held, seen, weights, centre in _fold_weights(z, penalty, folds):
                guess = target[seen].mean(0) + (z[held] - centre) @ (weights @ target[seen])
                out_of_fold[held, :, i, :, j] = guess.reshape(len(guess), -1, factor, factor)
    stat = {"mean_x": mean_x.astype(np.float32), "mean_y": _unblock(mean_y, lead, factor), "coefficients": coefficients}
    return stat, out_of_fold.reshape(y.shape)


def predict_local_ridge(stat: Statistics, coarse: Array, periodic: tuple[bool, bool] = (False, True)) -> Array:
    """Prediction `[..., *lead, y, x]` for coarse predictors `[..., channel, cy, cx]`; `periodic` as in the fit."""
    xp = array_module(coarse, stat["coefficients"])
    near = _neighbours(coarse - _lift(stat["mean_x"], coarse.ndim), periodic)
    many = near.reshape((-1,) + near.shape[-3:])
    blocks = matmul(xp.transpose(many, (1, 2, 0, 3)), stat["coefficients"])  # cells first: one product for all samples of a cell
    blocks = xp.moveaxis(blocks, 2, 0).reshape(near.shape[:-1] + (-1,))
    fine = stat["mean_y"].shape
    y = _unblock(blocks, fine[:-2], fine[-2] // coarse.shape[-2])
    return y + _lift(stat["mean_y"], y.ndim)


def _neighbours(x: Array, periodic: tuple[bool, bool]) -> Array:
    """The 3 x 3 cells around each cell of `[..., channel, y, x]`: `[..., y, x, channel * 9]`; edges repeat or wrap."""
    xp = array_module(x)
    ny, nx = x.shape[-2:]
    for axis, wraps in ((x.ndim - 2, periodic[0]), (x.ndim - 1, periodic[1])):
        width = [(0, 0)] * x.ndim
        width[axis] = (1, 1)
        x = xp.pad(x, width, mode="wrap" if wraps else "edge")
    around = xp.stack([x[..., i : i + ny, j : j + nx] for i in range(3) for j in range(3)], axis=-1)
    around = xp.moveaxis(around, -4, -2)
    return around.reshape(around.shape[:-2] + (-1,))


def _unblock(blocks: Array, lead: tuple[int, ...], factor: int) -> Array:
    """Blocks `[..., cy, cx, lead * factor * factor]` laid out on the fine grid, `[..., *lead, y, x]`."""
    xp = array_module(blocks)
    first, (cy, cx) = blocks.shape[:-3], blocks.shape[-3:-1]
    x = blocks.reshape((-1, cy, cx, int(np.prod(lead, dtype=int)), factor, factor))
    return xp.transpose(x, (0, 3, 1, 4, 2, 5)).reshape(first + lead + (cy * factor, cx * factor))


def _ridge_weights(z: np.ndarray, penalty: float) -> np.ndarray:
    """The matrix `[predictor, n]` that turns targets into ridge coefficients, for centred predictors `z` `[n, predictor]`."""
    gram = z.T @ z
    return np.linalg.solve(gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram)), z.T)


def _fold_weights(z: np.ndarray, penalty: float, folds: int) -> list[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """For each contiguous fold: its rows, the other rows, their ridge weights and the centre of their predictors."""
    parts = []
    for rows in np.array_split(np.arange(len(z)), folds):
        seen = np.ones(len(z), bool)
        seen[rows] = False
        centre = z[seen].mean(0)
        parts.append((slice(rows[0], rows[-1] + 1), seen, _ridge_weights(z[seen] - centre, penalty), centre))
    return parts


def _check_folds(n: int, targets: int, folds: int) -> None:
    if n != targets:
        raise BadInput(f"ridge: expected as many targets as predictors, got {targets} and {n}")
    if not 2 <= folds <= n:
        raise BadInput(f"ridge: expected between 2 and {n} folds for {n} samples, got {folds}")


# ---------------------------------------------------------------- products


def _chunks(values: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Pieces of `values` `[n, ...]` in float64, `[n, cells]`, with the cells they cover."""
    flat = values.reshape(len(values), -1)
    for start in range(0, flat.shape[1], CHUNK):
        cells = slice(start, start + CHUNK)
        yield cells, flat[:, cells].astype(np.float64)


def _lift(a: Array, ndim: int) -> Array:
    """`a` with axes of length one in front, so that ranks agree without silent promotion."""
    return a.reshape((1,) * (ndim - a.ndim) + a.shape)


def _tensordot(a: Array, b: Array) -> Array:
    """`a` `[..., k]` times `b` `[k, *grid]`, at full precision."""
    return matmul(a, b.reshape(b.shape[0], -1)).reshape(a.shape[:-1] + b.shape[1:])
