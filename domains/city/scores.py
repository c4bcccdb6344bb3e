"""How good generated days of demand are, by days that no model saw, and the reference generators they stand beside."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from domains.city.demand import cpc
from twinsim import metrics
from twinsim.base import Baseline, Condition, Question, Sample, Score, Scores, Statistics

if TYPE_CHECKING:
    from domains.city.domain import CityTwin

BLOCK = 7  # days that are resampled together
MEMBERS = 8  # draws of a day by which memory is judged, at most


def score(twin: "CityTwin", generated: Sample, truth: Sample, condition: Condition) -> Scores:
    """Scores of `generated` `[member, n, zone, zone]` by `truth` `[n, zone, zone]`: pairs of zones, districts' totals, the whole city."""
    table: dict[str, Score] = {}
    curves: dict[str, np.ndarray] = {}
    drawn = {name: np.asarray(generated[name], np.float32) for name in twin.sample}
    true = {name: np.asarray(truth[name], np.float32) for name in twin.sample}
    for name in twin.sample:
        _ensemble(f"{name}: ", "pair", drawn[name], true[name], table)
        curves[f"ranks/{name}"] = metrics.rank_counts(drawn[name], true[name]).mean(0)
    day, true_day = np.sum(list(drawn.values()), axis=0), np.sum(list(true.values()), axis=0)
    _ensemble("day: ", "pair", day, true_day, table)
    _ensemble("day: ", "district", day.sum(-1), true_day.sum(-1), table)
    _ensemble("day: ", "city", day.sum((-1, -2))[..., None], true_day.sum((-1, -2))[..., None], table)
    share = np.array([cpc(day[0, one], true_day[one]) for one in range(len(true_day))])
    table["day: common part of trips, one draw"] = metrics.interval(share, block=BLOCK, ideal=1.0)
    table["day: energy score"] = metrics.interval(metrics.energy_score(day, true_day), block=BLOCK, units="1")
    return Scores(table, curves)


def _ensemble(of: str, level: str, drawn: np.ndarray, true: np.ndarray, table: dict[str, Score]) -> None:
    """Adds the CRPS and the spread-skill ratio of `drawn` `[member, n, ...]` by `true` `[n, ...]`."""
    table[f"{of}CRPS of a {level}'s trips"] = metrics.interval(metrics.crps(drawn, true), block=BLOCK, units="1")
    parts = [metrics.variance(drawn), metrics.squared_error(drawn, true)]
    table[f"{of}spread-skill ratio, {level}"] = metrics.interval(parts, metrics.spread_skill_ratio(len(drawn)), block=BLOCK, ideal=1.0)


def membership(twin: "CityTwin", generated: Sample, truth: Sample, ask: Callable[[Question], Sample]) -> Score:
    """Whether draws betray the recorded days the model was trained on; 0.5 is a guess."""
    rows = twin.rows("train")
    held_out = len(next(iter(truth.values())))
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), held_out)).round().astype(int)]
    recorded, condition = twin.days(rows)
    members = min(MEMBERS, len(next(iter(generated.values()))))
    question = Question(condition, members, {"time": ("time", twin.record["time"].values[rows])}, "the training days")
    drawn = ask(question)
    near = metrics.nearest_member_distance(_roots(twin, {k: np.asarray(v[...]) for k, v in drawn.items()}), _roots(twin, recorded))
    far = metrics.nearest_member_distance(_roots(twin, {k: np.asarray(v)[:members] for k, v in generated.items()}), _roots(twin, truth))
    return metrics.membership_auc(near, far, block=BLOCK)


def baselines(twin: "CityTwin", statistics: Statistics) -> Mapping[str, Baseline]:
    """Recorded days of the same kind; and counts that are independent given the kind of day."""
    recorded, conditions = twin.days(twin.rows("train"))
    kind = _kind(conditions)
    names = list(twin.sample)

    def same_kind(condition: Condition, members: int, seed: int) -> Sample:
        random = np.random.default_rng(seed)
        chosen = np.stack([random.choice(np.flatnonzero(kind == one), members) for one in _known(_kind(condition), kind)], axis=1)
        return {name: np.asarray(recorded[name])[chosen] for name in names}

    def independent(condition: Condition, members: int, seed: int) -> Sample:
        random = np.random.default_rng(seed)
        root = np.asarray(jax.vmap(lambda one: twin._expected(statistics, one))(condition))  # [n, period, zone, zone]
        rate = np.maximum(root**2 - 1 / 8, 0.0)  # E sqrt(k + 3/8)^2 is about rate + 3/8 - 1/4
        counts = random.poisson(rate, (members, *rate.shape)).astype(np.float32)
        counts *= 1 - np.eye(rate.shape[-1], dtype=np.float32)
        return {name: counts[:, :, index] for index, name in enumerate(names)}

    return {"recorded days of that kind": same_kind, "independent counts": independent}


def _kind(condition: Condition) -> np.ndarray:
    """Weekday, and whether it rains, as one number, `[n]`."""
    return 2 * np.asarray(condition["weekday"]).astype(int) + (np.asarray(condition["rain"]) > 0)


def _known(asked: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each kind, or where no day of it was recorded the same weekday in other weather, or else any."""
    there = set(known.tolist())
    return np.array([one if one in there else one ^ 1 if (one ^ 1) in there else known[0] for one in asked.tolist()])


def _roots(twin: "CityTwin", sample: Sample) -> np.ndarray:
    """Square roots of counts, by which every pair weighs alike, `[..., zone, zone, period]`."""
    return np.stack([np.sqrt(np.maximum(np.asarray(sample[name], np.float32), 0)) for name in twin.sample], axis=-1)
