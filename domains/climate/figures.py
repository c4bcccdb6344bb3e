"""The climate part of a report: what was asked, what came out, and samples beside truth and baseline, as maps."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import xarray as xr

from domains.climate import scores
from twinsim.base import Question, Sample, Section

if TYPE_CHECKING:
    from domains.climate.domain import Climate

MAPS = {"K": "inferno", "mm day-1": "YlGnBu", "mm h-1": "YlGnBu", "1": "YlGnBu"}  # colour maps by unit, readable by all
SHOWN = 3  # variables in maps, at most


def sections(domain: "Climate", asked: Any, question: Question, dataset: xr.Dataset, evaluation: Any, **_: Any) -> Sequence[Section]:
    """What was asked, the answer, and a look at samples next to truth and baselines."""
    return [_asked(domain, asked, question), _answer(domain, asked, question, dataset), _look(domain, evaluation)]


def summary(domain: "Climate", question: Question, dataset: xr.Dataset) -> str:
    """The answer in a sentence: how the area mean of each variable differs from the training climatology."""
    parts = []
    climatology = _climatology(domain, question, dataset)
    for name, quantity in domain.quantities.items():
        change, low, high = _change(domain, name, climatology[name], dataset)
        parts.append(f"{quantity.long_name} {change:+.3g} {quantity.units} ({low:+.3g} to {high:+.3g} among members)")
    return f"Area mean against the training climate of the same days: {'; '.join(parts)}."


def _asked(domain: "Climate", asked: Any, question: Question) -> Section:
    item = dataset_item = domain.item
    axis = np.asarray(question.coords[dataset_item][1])
    rows = [["What", "Value"], ["Twin", domain.name], ["Members", str(question.members)], [f"{item} steps of each", str(len(axis))]]
    if item == "time":
        rows.append(["From, to", f"{str(axis[0])[:10]}, {str(axis[-1])[:10]}"])
    if domain.forcing and asked.sst_offset is not None:
        rows.append(["Warming of the sea surface", f"{asked.sst_offset:+g} K"])
    for impose in asked.impose:
        level = impose.above_quantile or impose.below_quantile
        side = "above" if impose.above_quantile else "below"
        where = f"lat {impose.box.lat[0]:g} to {impose.box.lat[1]:g}, lon {impose.box.lon[0]:g} to {impose.box.lon[1]:g}"
        rows.append(
            ["Imposed", f"mean of {impose.variable} over {where} {side} the {level:.0%} quantile of the training days of the season"]
        )
    if asked.observe:
        rows.append(["Observations", "; ".join(f"{o.variable} = {o.value:g} at {o.lat:g}, {o.lon:g}" for o in asked.observe[:5])])
    variables = [["Variable", "Name", "Units"]] + [[q.long_name, name, q.units] for name, q in domain.quantities.items()]
    return Section(
        "What was asked", [asked.asks, f"To expect: {asked.expect.strip()}"], {"The question": rows, "What is generated": variables}
    )


def _answer(domain: "Climate", asked: Any, question: Question, dataset: xr.Dataset) -> Section:
    table = [["Area mean", "Answer", "Training climate", "Change", "Among members"]]
    pictures = {}
    climatology = _climatology(domain, question, dataset)
    for index, (name, quantity) in enumerate(domain.quantities.items()):
        change, low, high = _change(domain, name, climatology[name], dataset)
        mean = float((dataset[name].mean(["member", domain.item]).values * domain.weights).mean())
        table.append(
            [
                f"{quantity.long_name}, {quantity.units}",
                f"{mean:.5g}",
                f"{mean - change:.5g}",
                f"{change:+.3g}",
                f"{low:+.3g} to {high:+.3g}",
            ]
        )
        if index < SHOWN:
            base = climatology[name]
            state = dataset[name].mean(["member", domain.item]).values
            spread = dataset[name].std(["member", domain.item]).values
            fields = {
                "answer, mean": (state, ""),
                "change": (state - base, "difference"),
                "one member, first day": (dataset[name].values[0, 0], ""),
            }
            fields["spread of days and members"] = (spread, "spread")
            caption = (
                f"{quantity.long_name.capitalize()}: mean answer, its change from the training climate, one drawn state, and the standard "
                f"deviation over days and members. The mean change is {change:+.3g} {quantity.units}, "
                f"from {(state - base).min():+.3g} to {(state - base).max():+.3g} among cells."
            )
            pictures[caption] = maps(domain, fields, quantity.units)
    text = ["The change is that of the mean over all days and members; the range is that of members' own means."]
    return Section("The answer", [*text, *question.notes], {"Area means against the training climate of the same days": table}, pictures)


def _look(domain: "Climate", evaluation: Any) -> Section:
    """The same held-out day: truth, two members of the model, and each baseline's first."""
    pictures = {}
    drawn = {name: sample for name, sample in evaluation.examples.items() if name != "truth"}
    for name, quantity in list(domain.quantities.items())[:SHOWN]:
        fields: dict[str, tuple[np.ndarray, str]] = {"truth": (evaluation.examples["truth"][name][0], "")}
        for who, sample in drawn.items():
            fields[who] = (sample[name][0, 0], "")
            if who == next(iter(drawn)):
                fields[f"{who}, another member"] = (sample[name][1, 0], "")
        caption = f"{quantity.long_name.capitalize()}, one held-out sample: the truth, two members of the model, and one of each baseline."
        pictures[caption] = maps(domain, fields, quantity.units)
    text = ["Without a background, members of one day need not look like that day's truth: they share its season, not its weather."]
    return Section("Samples beside truth and baselines", [] if domain.background else text, {}, pictures)


def _climatology(domain: "Climate", question: Question, dataset: xr.Dataset) -> Mapping[str, np.ndarray]:
    """Mean of the training climate over the question's days, `[y, x]`; with a background, over all training days."""
    if domain.background:
        rows = domain.rows("train")
        return {name: np.asarray(values).mean(0) for name, values in domain.truth(rows).items()}
    plain: Sample = {name: v for name, v in question.condition.items() if name == "day_of_year"}
    count = dataset.sizes[domain.item]
    return {
        name: values[:count].mean(0) for name, values in scores.training_climatology(domain, plain or {"item": np.zeros(count)}).items()
    }


def _change(domain: "Climate", name: str, base: np.ndarray, dataset: xr.Dataset) -> tuple[float, float, float]:
    """Change of the area mean, and the lowest and highest among members' means."""
    area = domain.weights / domain.weights.sum()
    of_members = ((dataset[name].mean(domain.item).values - base) * area).sum((1, 2))
    return float(of_members.mean()), float(of_members.min()), float(of_members.max())


def maps(domain: "Climate", fields: Mapping[str, tuple[np.ndarray, str]], units: str) -> bytes:
    """A PNG of fields `[y, x]` side by side; those of the same kind ("", "difference", "spread") share their scale."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {kind: [values for values, k in fields.values() if k == kind] for kind in {k for _, k in fields.values()}}
    scale = {}
    for kind, members in kinds.items():
        low, high = float(min(np.quantile(m, 0.005) for m in members)), float(max(np.quantile(m, 0.995) for m in members))
        if kind == "difference":
            high = max(abs(low), abs(high), 1e-12)
            low = -high
        scale[kind] = (low, high if high > low else low + 1e-12)
    columns = 2 if domain.shape[1] >= 1.5 * domain.shape[0] else min(4, len(fields))
    rows = -(-len(fields) // columns)
    aspect = domain.shape[0] / domain.shape[1]
    width = 9.0 / columns
    figure, axes = plt.subplots(rows, columns, figsize=(9.0, rows * (width * aspect + 0.55)), squeeze=False, layout="constrained")
    x, y = _axes(domain)
    for axis in axes.flat[len(fields) :]:
        axis.set_visible(False)
    for axis, (label, (values, kind)) in zip(axes.flat, fields.items(), strict=False):
        colours = "RdBu_r" if kind == "difference" else "viridis" if kind == "spread" else MAPS.get(units, "cividis")
        drawn = axis.pcolormesh(x, y, values, cmap=colours, vmin=scale[kind][0], vmax=scale[kind][1], rasterized=True)
        if "lsm" in domain.dataset:
            axis.contour(x, y, domain.dataset["lsm"].values, [0.5], colors="0.35", linewidths=0.6)
        axis.set_title(label, fontsize=9, loc="left")
        axis.tick_params(labelsize=7, length=2)
        bar = figure.colorbar(drawn, ax=axis, shrink=0.85, pad=0.01)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.set_label(units, fontsize=7)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None, "Title": "synthetic data, generated by twinsim"})
    plt.close(figure)
    return out.getvalue()


def _axes(domain: "Climate") -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the grid for drawing: its own axes where they have values, else counts."""
    y, x = domain.dims
    take = lambda name, size: domain.dataset[name].values if name in domain.dataset.coords else np.arange(size)  # noqa: E731
    return take(x, domain.shape[1]), take(y, domain.shape[0])
