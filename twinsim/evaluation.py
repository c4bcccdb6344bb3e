"""What a trained generator and its baselines earn on held-out truth: judged, written to a folder and read back."""

import dataclasses
import functools
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twinsim import files, mesh
from twinsim.base import BadInput, Baseline, Domain, Question, Sample, Score, Scores, Statistics

MODEL = "twinsim"  # the generator's name among its baselines
DONE = "metrics.json"  # written last
TOLERANCE = 0.0  # up to which a broken rule counts as kept: a domain's `check` has cleared the rounding of its fields already
MEMORY = "membership-inference AUC"

Drawn = tuple[Sample, Mapping[str, np.ndarray]]  # samples `[member, item, ...]` and broken rules `[member, item]`
Draw = Callable[[Question, str, int, Callable[..., None]], Drawn]  # question, name of the draws, seed, progress


@dataclass(frozen=True)
class Evaluation:
    """Scores of the generator and its baselines, and a few samples to look at.

    Attributes:
      scores: `MODEL` first, then each baseline.
      examples: the same names and "truth" -> samples `[member, item, ...]` (truth `[item, ...]`).
      model: fingerprint of what was judged, "" where it is not told.
    """

    scores: Mapping[str, Scores]
    examples: Mapping[str, Mapping[str, np.ndarray]]
    model: str = ""


def judge(
    domain: Domain,
    statistics: Statistics,
    draw: Draw,
    members: int,
    most: int | None,
    seed: int,
    progress: Callable[[str], Any],
    stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Scores `members` draws of at most `most` held-out items, and as many of each baseline. `stop` may raise between two of them.

    All processes draw; the first scores, and the others get an evaluation of nothing.
    """
    question, truth = domain.exam(members, most)
    with progress("draw held-out") as update:
        samples, rules = draw(question, "test", seed, update)
    generated = {name: np.asarray(values[...]) for name, values in samples.items()}
    scores: dict[str, Scores] = {}
    examples: dict[str, Mapping[str, np.ndarray]] = {}
    with mesh.first_leads():
        if mesh.is_first():
            with progress("score"):
                scores[MODEL] = domain.score(generated, truth, question.condition)
            examples |= {MODEL: _few(generated), "truth": {name: np.asarray(values)[:8] for name, values in truth.items()}}
            baselines = domain.baselines(statistics)
            with progress("baselines") as update:
                for index, (name, baseline) in enumerate(baselines.items()):
                    stop()
                    drawn = baseline(question.condition, members, seed)
                    remembered = domain.membership(drawn, truth, functools.partial(_ask, baseline, seed + 1))
                    scores[name] = _with(domain.score(drawn, truth, question.condition), {}, remembered)
                    examples[name] = _few(drawn)
                    update(index + 1, len(baselines), name)
    stop()
    with progress("memorisation") as update:
        remembered = domain.membership(generated, truth, lambda further: draw(further, "train", seed + 1, update)[0])
    if mesh.is_first():
        scores[MODEL] = _with(scores[MODEL], kept(rules), remembered)
    return Evaluation(scores, examples)


def _ask(baseline: Baseline, seed: int, question: Question) -> Sample:
    return baseline(question.condition, question.members, seed)


def _with(scores: Scores, rules: Mapping[str, Score], remembered: Score | None) -> Scores:
    """Scores with the rules that were kept and, where it could be told, what is remembered of the training samples."""
    memory = {} if remembered is None else {MEMORY: remembered}
    return dataclasses.replace(scores, table={**scores.table, **rules, **memory})


def kept(rules: Mapping[str, np.ndarray]) -> dict[str, Score]:
    """The share of draws that keep each physical rule."""
    return {f"rule kept: {name}": Score(float((broken <= TOLERANCE).mean()), 1.0) for name, broken in rules.items()}


def _few(samples: Sample, members: int = 3, items: int = 8) -> dict[str, np.ndarray]:
    return {name: np.asarray(values[:members, :items], np.float32) for name, values in samples.items()}


# ---------------------------------------------------------------- on disk


def write(folder: Path, evaluation: Evaluation, facts: Mapping[str, Any]) -> None:
    """`curves.npz`, `examples.npz` and, last, `metrics.json`: JSON with null where a number is not finite."""
    scores = {name: {key: _finite(score) for key, score in each.table.items()} for name, each in evaluation.scores.items()}
    curves = {f"{name}|{key}": value for name, each in evaluation.scores.items() for key, value in each.curves.items()}
    examples = {f"{name}|{key}": value for name, each in evaluation.examples.items() for key, value in each.items()}
    for name, arrays in (("curves", curves), ("examples", examples)):
        stored: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
        np.savez(folder / f"{name}.npz", **stored)
    files.write_text(folder / DONE, json.dumps({**facts, "scores": scores}, indent=1, allow_nan=False))


def read(folder: Path) -> Evaluation:
    """What `write` left. Raises BadInput where it is damaged."""
    table, model = _stored(folder / DONE)
    curves, examples = (_arrays(folder / f"{name}.npz") for name in ("curves", "examples"))
    return Evaluation({name: Scores(table[name], curves.get(name, {})) for name in table}, examples, model)


def read_scores(path: Path) -> dict[str, dict[str, Score]]:
    """The scores in a `metrics.json`: of `MODEL`, then of each baseline. Raises BadInput where it is damaged."""
    return _stored(path)[0]


def _stored(path: Path) -> tuple[dict[str, dict[str, Score]], str]:
    """The scores in a `metrics.json`, and the fingerprint of the model that earned them."""
    try:
        told = json.loads(path.read_text())
        table = {name: {key: _score(score) for key, score in each.items()} for name, each in told["scores"].items()}
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: expected the scores of an evaluation, it is damaged ({type(error).__name__})") from error
    if MODEL not in table:
        raise BadInput(f"{path}: expected the scores of {MODEL}, got those of {', '.join(table) or 'nobody'}")
    return table, str(told.get("model", ""))


def _arrays(path: Path) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                owner, _, key = name.partition("|")
                found.setdefault(owner, {})[key] = arrays[name]
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{path}: expected arrays of an evaluation, it is damaged ({type(error).__name__})") from error
    return found


def _finite(score: Score) -> dict[str, Any]:
    numbers = dataclasses.asdict(score)
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in numbers.items()}


def _score(stored: Mapping[str, Any]) -> Score:
    numbers: dict[str, Any] = {key: math.nan if value is None else value for key, value in stored.items()}
    return Score(**numbers)
