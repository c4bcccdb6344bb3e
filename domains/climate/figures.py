"""The climate part of a report: what was asked, what came out, and samples beside truth and baseline, as maps."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import xarray as xr

from domains.climate import questions, scores
from twinsim.base import Question, Section

if TYPE_CHECKING:
    from domains.climate.domain import Climate

MAPS = {"K": "inferno", "mm day-1": "YlGnBu", "mm h-1": "YlGnBu", "1": "YlGnBu"}  # colour maps by unit, readable by all
SHOWN = 3  # variables in maps, at most
MARGIN = 25.0  # degrees of latitude shown around a box, and 1.5 times as many of longitude


def sections(domain: "Climate", asked: Any, question: Question, dataset: xr.Dataset, evaluation: Any, **_: Any) -> Sequence[Section]:
    """What was asked, the answer, and a look at samples next to truth and baselines."""
    return [_asked(domain, asked, question), _answer(domain, asked, question, dataset), _look(domain, evaluation)]


def summary(domain: "Climate", question: Question, dataset: xr.Dataset) -> str:
    """The answer in a sentence: what is imposed and the leading variables, against the training climatology."""
    climatology = _climatology(domain, question)
    parts = []
    names = dict.fromkeys([*(impose.variable for impose in _imposed(question)), *_shown(domain, question)])
    means = {name: _member_means(domain, dataset[name]) for name in names}
    for impose in _imposed(question):
        weights = questions.box_weights(domain, impose.box)
        change, low, high = _change(means[impose.variable], climatology[impose.variable], weights)
        quantity = domain.quantities[impose.variable]
        parts.append(f"in the box {quantity.long_name} {change:+.3g} {_units(quantity.units)} ({low:+.3g} to {high:+.3g} among members)")
    for name in _shown(domain, question):
        quantity = domain.quantities[name]
        change, low, high = _change(means[name], climatology[name], domain.weights)
        parts.append(f"area mean of {quantity.long_name} {change:+.3g} {_units(quantity.units)} ({low:+.3g} to {high:+.3g})")
    return f"Against the training climate{'' if domain.background else ' of the same days'}: {'; '.join(parts)}."


def _imposed(question: Question) -> Sequence[questions.Impose]:
    return question.imposed if isinstance(question, questions.ClimateQuestion) else ()


def _shown(domain: "Climate", question: Question) -> Sequence[str]:
    """The variables to look at: what is imposed first, then in the order of the configuration."""
    return list(dict.fromkeys([*(impose.variable for impose in _imposed(question)), *domain.quantities]))[:SHOWN]


def _units(units: str) -> str:
    return "" if units == "1" else units


def _asked(domain: "Climate", asked: Any, question: Question) -> Section:
    item = domain.item
    axis = domain.dates(question)
    rows = [["What", "Value"], ["Twin", domain.name], ["Members", str(question.members)], [f"{item} steps of each", str(len(axis))]]
    if item == "time":
        rows.append(["From, to", f"{str(axis[0])[:10]}, {str(axis[-1])[:10]}"])
    if domain.forcing and asked.forced is not None:
        what, units = questions.forcing_words(domain)
        sign = "+" if domain.forcing == questions.SST else ""
        rows.append([what[:1].upper() + what[1:], f"{asked.forced:{sign}g} {_units(units)}".strip()])
    for impose in asked.impose:
        level = impose.above_quantile or impose.below_quantile
        side = "above" if impose.above_quantile else "below"
        where = f"lat {impose.box.lat[0]:g} to {impose.box.lat[1]:g}, lon {impose.box.lon[0]:g} to {impose.box.lon[1]:g}"
        rows.append(
            [
                "Imposed",
                f"mean of {impose.variable} over {where} {side} the {100 * level:g}% quantile of the season's training {_items(domain)}",
            ]
        )
    if asked.observe:
        rows.append(["Observations", "; ".join(f"{o.variable} = {o.value:g} at {o.lat:g}, {o.lon:g}" for o in asked.observe[:5])])
    variables = [["Variable", "Name", "Units"]] + [[q.long_name, name, q.units] for name, q in domain.quantities.items()]
    return Section(
        "What was asked", [asked.asks, f"To expect: {asked.expect.strip()}"], {"The question": rows, "What is generated": variables}
    )


def _items(domain: "Climate") -> str:
    return "days" if domain.window == 1 else f"means of {domain.window} days"


def _answer(domain: "Climate", asked: Any, question: Question, dataset: xr.Dataset) -> Section:
    table = [["Area mean", "Answer", "Training climate", "Change", "Among members"]]
    pictures = {}
    climatology = _climatology(domain, question)
    seasonal = _seasonal(domain, question) if domain.window > 1 else {}
    shown = _shown(domain, question)
    for name in [*shown, *(name for name in domain.quantities if name not in shown)]:
        quantity = domain.quantities[name]
        means = _member_means(domain, dataset[name])
        change, low, high = _change(means, climatology[name], domain.weights)
        state = means.mean(0)
        mean = float((state * domain.weights).mean())
        table.append(
            [
                f"{quantity.long_name}, {quantity.units}",
                f"{mean:.5g}",
                f"{mean - change:.5g}",
                f"{change:+.3g}",
                f"{low:+.3g} to {high:+.3g}",
            ]
        )
        if name in shown:
            base = climatology[name]
            spread = np.sqrt(np.mean([np.square(member.values - state).mean(0) for member in dataset[name]], axis=0))
            fields = {
                "answer, mean": (state, ""),
                "change": (state - base, "difference"),
                "one member, first day": (dataset[name][0, 0].values, ""),
            }
            fields["spread of days and members"] = (spread, "spread")
            caption = (
                f"{quantity.long_name.capitalize()}: mean answer, its change from the training climate, one drawn state, and the standard "
                f"deviation over days and members. The mean change is {change:+.3g} {quantity.units}, "
                f"from {(state - base).min():+.3g} to {(state - base).max():+.3g} among cells."
            )
            pictures[caption] = maps(domain, fields, quantity.units)
            if domain.window > 1:
                pictures |= _film(domain, name, seasonal[name], question, dataset)
    text = ["The change is that of the mean over all days and members; the range is that of members' own means."]
    return Section("The answer", [*text, *question.notes], {"Area means against the training climate of the same days": table}, pictures)


def _look(domain: "Climate", evaluation: Any) -> Section:
    """The same held-out day: truth, two members of the model, and each baseline's first."""
    pictures = {}
    drawn = {name: sample for name, sample in evaluation.examples.items() if name != "truth"}
    for name, quantity in list(domain.quantities.items())[:SHOWN]:
        fields: dict[str, tuple[np.ndarray, str]] = {"truth": (np.asarray(domain.as_days(evaluation.examples["truth"])[name])[0], "")}
        for who, sample in drawn.items():
            days = np.asarray(domain.as_days(sample)[name])
            fields[who] = (days[0, 0], "")
            if who == next(iter(drawn)):
                fields[f"{who}, another member"] = (days[1, 0], "")
        caption = f"{quantity.long_name.capitalize()}, one held-out sample: the truth, two members of the model, and one of each baseline."
        pictures[caption] = maps(domain, fields, quantity.units)
    text = ["Without a background, members of one day need not look like that day's truth: they share its season, not its weather."]
    return Section("Samples beside truth and baselines", [] if domain.background else text, {}, pictures)


def _climatology(domain: "Climate", question: Question) -> Mapping[str, np.ndarray]:
    """Mean of the training climate over the question's days, `[y, x]`; with a background, over all training days."""
    if domain.background:
        rows = domain.rows("train")
        return {name: np.asarray(values).mean(0) for name, values in domain.truth(rows).items()}
    return {name: values.mean(0) for name, values in _seasonal(domain, question).items()}


def _seasonal(domain: "Climate", question: Question) -> Mapping[str, np.ndarray]:
    """Mean of the training climate on each day of a question, `[day, y, x]`."""
    return scores.training_climatology(domain, domain.each_day(question.condition))


def _film(domain: "Climate", name: str, usual: np.ndarray, question: Question, dataset: xr.Dataset) -> dict[str, bytes]:
    """The first days in a row of one member less the usual ones `[day, y, x]`, around what is imposed: caption -> picture."""
    boxes = [impose.box for impose in _imposed(question)]
    around = _around(domain, boxes[0]) if boxes else None
    days = list(zip(domain.dates(question), dataset[name][0].values, usual, strict=True))[: domain.window]
    fields = {str(day)[:10]: (field - mean, "difference") for day, field, mean in days}
    quantity = domain.quantities[name]
    where = ", around the box that is imposed on" if boxes else ""
    caption = f"{quantity.long_name.capitalize()}, {domain.window} days in a row of one member, less the season's mean{where}."
    return {caption: maps(domain, fields, quantity.units, around)}


def _around(domain: "Climate", box: questions.Box) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows and columns around a box of a regular grid, columns in the order from west to east; None on another grid."""
    y, x = domain.dims
    if not domain.periodic[1]:
        return None
    latitude, longitude = domain.dataset[y].values, domain.dataset[x].values
    rows = np.flatnonzero((latitude >= box.lat[0] - MARGIN) & (latitude <= box.lat[1] + MARGIN))
    width = (box.lon[1] - box.lon[0]) % 360 or 360.0  # as `questions.box_weights` has it
    margin = 1.5 * MARGIN if width < 360 else 0.0
    east = (longitude - box.lon[0] + margin) % 360
    columns = np.argsort(east, kind="stable")[: int((east <= min(width + 2 * margin, 360)).sum())]
    return rows, columns


def _member_means(domain: "Climate", values: xr.DataArray) -> np.ndarray:
    """Mean over the items of each member, `[member, y, x]`; one member is in memory at a time."""
    return np.stack([member.mean(domain.item).values for member in values])


def _change(means: np.ndarray, base: np.ndarray, weights: np.ndarray) -> tuple[float, float, float]:
    """Change of the weighted area mean, and the lowest and highest among members' means `[member, y, x]`."""
    of_members = ((means - base) * (weights / weights.sum())).sum((1, 2))
    return float(of_members.mean()), float(of_members.min()), float(of_members.max())


def maps(
    domain: "Climate", fields: Mapping[str, tuple[np.ndarray, str]], units: str, part: tuple[np.ndarray, np.ndarray] | None = None
) -> bytes:
    """A PNG of fields `[y, x]` side by side; those of the same kind ("", "difference", "spread") share their scale.

    Args:
      part: rows and columns to show; all by default.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, y = _axes(domain)
    land = domain.dataset["lsm"].values if "lsm" in domain.dataset else None
    if part:
        at = np.ix_(*part)
        fields = {label: (values[at], kind) for label, (values, kind) in fields.items()}
        land = land[at] if land is not None else None
        x, y = x[part[1]].astype(float), y[part[0]]
        x = np.where(x < x[0], x, x - 360) if (np.diff(x) < 0).any() else x  # degrees east rise across Greenwich

    kinds = {kind: [values for values, k in fields.values() if k == kind] for kind in {k for _, k in fields.values()}}
    scale = {}
    for kind, members in kinds.items():
        low, high = float(min(np.quantile(m, 0.005) for m in members)), float(max(np.quantile(m, 0.995) for m in members))
        if kind == "difference":
            high = max(abs(low), abs(high), 1e-12)
            low = -high
        scale[kind] = (low, high if high > low else low + 1e-12)
    aspect = len(y) / len(x)
    columns = 2 if aspect <= 1 / 1.5 and len(fields) < 6 else min(4, len(fields))
    rows = -(-len(fields) // columns)
    width = 9.0 / columns
    figure, axes = plt.subplots(rows, columns, figsize=(9.0, rows * (width * aspect + 0.55)), squeeze=False, layout="constrained")
    for axis in axes.flat[len(fields) :]:
        axis.set_visible(False)
    for axis, (label, (values, kind)) in zip(axes.flat, fields.items(), strict=False):
        colours = "RdBu_r" if kind == "difference" else "viridis" if kind == "spread" else MAPS.get(units, "cividis")
        drawn = axis.pcolormesh(x, y, values, cmap=colours, vmin=scale[kind][0], vmax=scale[kind][1], rasterized=True)
        if land is not None:
            axis.contour(x, y, land, [0.5], colors="0.35", linewidths=0.6)
        axis.set_title(textwrap.fill(label, 60 // columns), fontsize=9, loc="left")
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
    return take(x, domain.grid[1]), take(y, domain.grid[0])
