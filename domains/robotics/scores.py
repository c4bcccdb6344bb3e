"""What generated episodes are judged by: whether they succeed, how long they take, and whether they are new.

Sources: yield as in Mandlekar et al. (2023), "MimicGen"; novelty and copies by the nearest demonstration, after Lee et al. (2024), "GTA".
"""

from typing import TYPE_CHECKING

import numpy as np

from twinsim import metrics
from twinsim.base import Sample, Score, Scores

if TYPE_CHECKING:
    from domains.robotics.domain import Motions

PHASES = 16  # points of an episode, evenly over its length, at which it is compared
COPY = 1.0  # %: held-out episodes that are nearer to a demonstration than what counts as a copy


def judged(domain: "Motions", generated: Sample, truth: Sample) -> Scores:
    """Judges episodes `[member, n, ...]` beside the demonstrator's own from the same starts, `[n, ...]`."""
    success = np.asarray(generated["success"], np.float64)
    table = {"episodes: yield": metrics.interval(success.mean(0), block=1, ideal=1.0)}
    seconds = np.where(success > 0, np.asarray(generated["length"]), np.nan) / domain.task.rate
    told = np.flatnonzero((success > 0).any(0) & (np.asarray(truth["success"]) > 0))
    own = np.asarray(truth["length"])[told] / domain.task.rate
    times = np.nanmean(seconds[:, told], 0) if len(told) else np.array([np.nan])
    parts = [times, own if len(told) else np.array([np.nan])]
    table["episodes: time to the goal, of the demonstrator's"] = metrics.interval(parts, metrics.ratio, block=1, ideal=1.0)
    drawn, true, learnt = (paths(domain, samples) for samples in (generated, truth, None))
    if len(drawn) > 1:
        table["paths: energy score"] = metrics.interval(metrics.energy_score(drawn, true), block=1)
    else:
        table["paths: energy score"] = Score(np.nan)
    far, usual = metrics.nearest_distance(drawn.reshape(-1, *drawn.shape[2:]), learnt), metrics.nearest_distance(true, learnt)
    table["paths: novelty, of the demonstrator's"] = Score(metrics.ratio(float(far.mean()), float(usual.mean())), 1.0)
    copies = far.reshape(success.shape) < np.percentile(usual, COPY)
    table["paths: copies"] = metrics.interval(copies.mean(0), block=1, units="1")
    return Scores(table)


def paths(domain: "Motions", samples: Sample | None) -> np.ndarray:
    """Observations at `PHASES` points of each episode, in units of their spread among demonstrations, `[..., phase, channel]`.

    Of the demonstrations where `samples` is None.
    """
    demonstrations = domain.demonstrations.episodes
    spread = np.concatenate([each.observation for each in demonstrations]).std(0)
    spread = np.where(spread > 1e-6, spread, 1.0)
    if samples is None:
        return np.stack([_at_phases(each.observation, each.frames) for each in demonstrations]) / spread
    seen = np.stack([np.asarray(samples[each.name], np.float32) for each in domain.task.observation], -1)
    length = np.asarray(samples["length"]).astype(int)
    flat = seen.reshape(-1, *seen.shape[-2:])
    each = np.stack([_at_phases(one, size) for one, size in zip(flat, length.ravel(), strict=True)])
    return each.reshape(*length.shape, PHASES, -1) / spread


def _at_phases(seen: np.ndarray, length: int) -> np.ndarray:
    rows = np.linspace(0, max(min(length, len(seen)) - 1, 0), PHASES).round().astype(int)
    return seen[rows]
