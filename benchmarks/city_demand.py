"""Measures the commuting twin against gravity on recorded counties, five-fold: every county is predicted by a fit without it.

The counties are those of the CommutingODGen data set in `us_county_commuting_od.npz` (for tests and benchmarks, never shipped), in the
order of their codes; county number i belongs to fold i mod 5. Gravity is a Poisson regression on ln population of both zones, ln points of
interest of the destination, ln distance and whether origin and destination are one zone; like the twin it is told no totals, and in the
second table both are told the county's total. Seeds: 0 everywhere. Intervals are 95 % bootstraps over counties. Folds that are done lie
in --out and are found again. Writes the key "demand" of `benchmarks/results/city.json` and prints the tables.

  python benchmarks/city_demand.py [--shared FOLDER] [--out out/bench-demand] [--folds 0,1]
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _results import ROOT, keep

from domains.city import commuting, demand, pairwise, regions  # noqa: E402
from twinsim import cli, metrics, run  # noqa: E402
from twinsim.base import Question  # noqa: E402
from twinsim.build import build  # noqa: E402

FOLDS, MEMBERS, TARGET, STRETCH = 5, 10, 0.54, 0.59
FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "cpc": demand.cpc, "nrmse": demand.nrmse, "jsd": demand.jsd,
    "jsd_arrivals": lambda modelled, true: demand.jsd(modelled.sum(0), true.sum(0)),
    "jsd_departures": lambda modelled, true: demand.jsd(modelled.sum(1), true.sum(1)),
}  # fmt: skip
GRAVITY, MEAN, ENSEMBLE, DRAW, APART = "gravity", "conditional mean", "mean of draws", "single draws", "single draws, each pair on its own"


class Remembering(commuting.Commuting):
    """Fits each regression once: without folds 0 and 1 is without folds 1 and 0."""

    fitted: dict[bytes, Any] = {}

    def _regression(self, rows: np.ndarray) -> pairwise.Parameters:
        if rows.tobytes() not in self.fitted:
            self.fitted[rows.tobytes()] = super()._regression(rows)
        return self.fitted[rows.tobytes()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("TWINSIM_SHARED", ROOT.parent / "shared")))
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "bench-demand")
    parser.add_argument("--folds", default=",".join(map(str, range(FOLDS))))
    given = parser.parse_args()
    path = given.shared / "data" / "mobility" / "od" / "us_county_commuting_od.npz"
    if not path.is_file():
        print(f"demand: skipped, there is no file {path}")
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    for fold in map(int, given.folds.split(",")):
        kept = given.out / f"fold{fold}.json"
        if not kept.exists():
            kept.write_text(json.dumps(measured(fold, path, given.out)))
        done = json.loads(kept.read_text())
        shares = {
            name: round(float(np.mean([each[name]["nothing"]["cpc"] for each in done["regions"].values()])), 4)
            for name in (GRAVITY, MEAN, ENSEMBLE, DRAW, APART)
        }
        print(f"fold {fold}: CPC {shares}, CPU s {done['cpu_s']}", file=sys.stderr, flush=True)
    files = [given.out / f"fold{fold}.json" for fold in range(FOLDS)]
    if not all(file.exists() for file in files):
        print("demand: not all folds are done, nothing is written")
        return 0
    result = summed([json.loads(file.read_text()) for file in files])
    keep("city", "demand", result)
    print("\n".join(table(result)))
    return 0


def measured(fold: int, path: Path, out: Path) -> dict:
    """Figures of each held-out county by each model, and the CPU seconds that went into them."""
    words = ["domain=city/commuting_recorded", f"archive={path.parent}", f"domain.dataset.path={path}", f"domain.held_out={fold}"]
    config = run.resolve(cli._compose([*words, f"out={out.absolute()}"]))
    plain = build(config["domain"])
    domain = Remembering(**{name: getattr(plain, name) for name in (field.name for field in dataclasses.fields(plain))})
    clock = [time.process_time()]
    prepared = run.data(config, quiet, domain)
    clock.append(time.process_time())
    trained = run.training(config, quiet, domain)
    clock.append(time.process_time())

    cut = domain.cut.rows(domain.rows("test"))
    condition = domain.conditions(cut, np.zeros(len(cut.region)))  # no totals
    question = Question(condition, MEMBERS, {"block": ("block", np.arange(len(cut.region)))}, "the held-out counties")
    drawn, _ = run.draw(trained, question, run.drawing_settings(config), 0, out / f"draws{fold}", f"fold{fold}", lambda *_: None)
    clock.append(time.process_time())
    together = np.asarray(drawn[commuting.TRIPS][...], np.float64)
    apart = np.asarray(domain.baselines(prepared.statistics)["each pair on its own"](condition, MEMBERS, 0)[commuting.TRIPS], np.float64)
    mean = commuting.predicted(prepared.statistics["all"], cut.blocks).astype(np.float64)
    gravity = by_gravity(fold, path)
    found = {}
    for index in np.unique(cut.region):
        region = domain.dataset.regions[index]
        zones, true = region.zones, region.trips
        assert true is not None
        whole = {name: cut.whole(values, index, zones) for name, values in (("together", together), ("apart", apart))}
        models = {
            GRAVITY: [gravity[region.name]], MEAN: [cut.whole(mean, index, zones)], ENSEMBLE: [whole["together"].mean(0)],
            DRAW: list(whole["together"]), APART: list(whole["apart"]),
        }  # fmt: skip
        found[region.name] = {name: figures(matrices, true) for name, matrices in models.items()} | {
            f"arrivals {name}": float(metrics.energy_score(values.sum(1)[:, None], true.sum(0)[None])[0] / true.sum(0).mean())
            for name, values in whole.items()
        }
    spent = dict(zip(("regressions", "training", "draws"), np.diff(clock).round(1).tolist(), strict=True))
    return {"regions": found, "cpu_s": spent}


def figures(matrices: list[np.ndarray], true: np.ndarray) -> dict:
    """The mean of each figure over matrices, told nothing and told the total."""
    told = {"nothing": matrices, "total": [each * true.sum() / max(each.sum(), 1e-9) for each in matrices]}
    return {
        what: {name: float(np.mean([figure(each, true) for each in many])) for name, figure in FIGURES.items()}
        for what, many in told.items()
    }


def by_gravity(fold: int, path: Path) -> dict[str, np.ndarray]:
    """The matrices of the held-out counties by a Poisson gravity model fitted on the others."""
    names = [region.name for region in regions.recorded(str(path)).regions]
    features, trips = {}, {}
    with np.load(path) as held:
        for name in names:
            people, shops = held[f"{name}/demos"][:, 0].astype(float), held[f"{name}/pois"].sum(1).astype(float)
            distance, zones = held[f"{name}/dis"].astype(float), len(people)
            ones, same = np.ones((zones, zones)), np.eye(zones)
            floor = 0.05 * np.median(distance[same == 0])
            known = [ones, np.log1p(people)[:, None] * ones, np.log1p(people) * ones, np.log1p(shops) * ones]
            features[name] = np.stack([*known, np.log(np.maximum(distance, floor)), same], -1)
            trips[name] = held[f"{name}/od"].astype(float)
    others = [name for index, name in enumerate(names) if index % FOLDS != fold]
    exponents = demand.poisson_regression(
        np.concatenate([features[name].reshape(-1, 6) for name in others]), np.concatenate([trips[name].ravel() for name in others])
    )
    return {name: np.exp(np.clip(features[name] @ exponents, -20, 12)) for name in names[fold::FOLDS]}


def summed(folds: list[dict]) -> dict:
    """Means over all counties with their intervals."""
    counties = {name: each for fold in folds for name, each in fold["regions"].items()}
    result: dict = {"counties": len(counties), "members": MEMBERS, "told": {}}
    for told in ("nothing", "total"):
        result["told"][told] = {
            name: {figure: interval([each[name][told][figure] for each in counties.values()]) for figure in FIGURES}
            for name in (GRAVITY, MEAN, ENSEMBLE, DRAW, APART)
        }
    result["energy score of arrivals over their mean"] = {
        name: interval([each[f"arrivals {name}"] for each in counties.values()]) for name in ("together", "apart")
    }
    result["cpu_s"] = {name: round(sum(fold["cpu_s"][name] for fold in folds), 1) for name in folds[0]["cpu_s"]}
    return result


def interval(values: list[float]) -> list[float]:
    """Mean, and the ends of its 95 % interval."""
    score = metrics.interval(np.array(values), block=1)
    return [round(each, 4) for each in (score.value, score.low, score.high)]


def table(result: dict) -> list[str]:
    """Markdown."""
    lines = []
    for told, models in result["told"].items():
        what = "no totals are told" if told == "nothing" else "each county's total is told"
        lines += [f"\n**commuting**, {result['counties']} counties, five-fold, {what}", ""]
        lines += ["| model | CPC | NRMSE | JSD, bit | JSD of arrivals | JSD of departures | target | reached |", "| " + "--- | " * 8]
        for name, each in models.items():
            aim = told == "nothing" and name in (MEAN, ENSEMBLE)
            reached = f"{TARGET} ({STRETCH})", "yes" if each["cpc"][0] >= TARGET else "**no**"
            cells = [
                f"{value:.3f} ({low:.3f} to {high:.3f})" if figure == "cpc" else f"{value:.3f}"
                for figure, (value, low, high) in each.items()
            ]
            lines.append(f"| {name} | {' | '.join(cells)} | {' | '.join(reached if aim else ('-', '-'))} |")
    return lines


@contextlib.contextmanager
def quiet(stage: str) -> Iterator[Callable[..., None]]:
    print(f"  {stage}", file=sys.stderr, flush=True)
    yield lambda *_: None


if __name__ == "__main__":
    sys.exit(main())
