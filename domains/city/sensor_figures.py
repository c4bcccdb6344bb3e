"""The sensors' part of a report: what was asked, fans of the answer beside truth and simple guesses, and windows as pictures."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import xarray as xr

from twinsim.base import Question, Section

if TYPE_CHECKING:
    from domains.city.sensors import Sensors

FANS = 6  # sensors shown as fans, at most
INK, TRUTH, USUAL, LAST = "#1b6ca8", "black", "#c05a00", "#7a7a7a"
TASKS = {
    "forecast": "the first steps of each window",
    "gaps": "what is left beside gaps",
    "sensors": "all of some sensors, nothing of the others",
    "none": "nothing but calendar and weather",
}


def sections(domain: "Sensors", asked: Any, question: Question, dataset: xr.Dataset, evaluation: Any, **_: Any) -> Sequence[Section]:
    """What was asked, the answer, and samples next to truth and baselines."""
    return [_asked(domain, asked, question), _answer(domain, question, dataset), _look(domain, evaluation)]


def summary(domain: "Sensors", question: Question, dataset: xr.Dataset) -> str:
    """The answer in a sentence: the mean of each quantity where nothing is given, and how far it is from the truth where that is known."""
    truth = getattr(question, "truth", None)
    parts = []
    for name, quantity in domain.quantities.items():
        free = np.asarray(question.condition[f"is_given_{name}"]) == 0
        if not free.any():
            continue
        drawn = dataset[name].values
        means = [float(member[free].mean()) for member in drawn]
        said = f"mean {quantity.long_name} {np.mean(means):.4g} {quantity.units} ({min(means):.4g} to {max(means):.4g} among members)"
        judged = free & (np.asarray(question.condition[f"measured_{name}"]) > 0)
        if truth is not None and judged.any():
            error = np.abs(np.median(drawn, 0) - np.asarray(truth[name]))[judged].mean()
            said += f", the median off the measured by {error:.3g} on average"
        parts.append(said)
    return f"Where nothing is given: {'; '.join(parts)}." if parts else "Everything is given."


def _asked(domain: "Sensors", asked: Any, question: Question) -> Section:
    times = np.asarray(question.coords["time"][1])
    minutes = domain.step / np.timedelta64(1, "m")
    rows = [
        ["What", "Value"],
        ["Twin", domain.name],
        ["Given", TASKS[asked.task]],
        ["Windows", f"{len(times)} of {domain.window} steps of {minutes:g} min"],
        ["First, last", f"{str(times[0])[:16]}, {str(times[-1])[:16]}"],
        ["Members", str(question.members)],
    ]
    if asked.weather is not None:
        rows.append(["Wind", f"{asked.weather.wind_speed:g} m/s from {asked.weather.wind_from:g} degrees, all the time"])
    if asked.without:
        rows.append(["Hidden sensors", ", ".join(asked.without[:10])])
    if asked.observe:
        rows.append(["Observed", "; ".join(f"{o.sensor} {o.value:g} +- {o.error:g} after {o.minute:g} min" for o in asked.observe[:5])])
    variables = [["Quantity", "Name", "Units"]] + [[q.long_name, name, q.units] for name, q in domain.quantities.items()]
    return Section(
        "What was asked", [asked.asks, f"To expect: {asked.expect.strip()}"], {"The question": rows, "What is generated": variables}
    )


def _answer(domain: "Sensors", question: Question, dataset: xr.Dataset) -> Section:
    stacked = _stacked(domain, {name: dataset[name].values for name in domain.quantities})  # [member, item, sensor, time]
    given, known, measured = (np.asarray(domain.stack(question.condition, each)) for each in ("is_given_", "given_", "measured_"))
    truth = getattr(question, "truth", None)
    true = None if truth is None else np.where(measured > 0, _stacked(domain, truth), np.nan)
    usual = _usual(domain, question)
    item = _busiest(domain, stacked.mean(0) if true is None else np.where(np.isnan(true), usual, true))
    shown = _spread_out(domain, given[item])
    start = str(np.asarray(question.coords["time"][1])[item])[:16]
    lines = {"usual for the hour": (usual[item], USUAL, "--")}
    if 0 < given[item].sum() < given[item].size:
        lines["last value given"] = (_last(known[item], given[item]), LAST, ":")
    beside = "and what was measured (black) " if true is not None else ""
    caption = (
        f"The window from {start}: median and the ranges that hold 50 and 90 % of the {len(stacked)} members (blue), {beside}"
        "beside simple guesses; dots are given."
    )
    pictures = {caption: fans(domain, stacked[:, item], shown, lines, None if true is None else true[item], given[item], known[item])}
    if domain.along_sensors:
        panels = {} if true is None else {"measured": true[item]}
        panels |= {"given": np.where(given[item] > 0, known[item], np.nan), "median of members": np.median(stacked[:, item], 0)}
        panels |= {"one member": stacked[0, item], "another member": stacked[-1, item], "usual for the hour": usual[item]}
        pictures[f"Every sensor over the window from {start}; white is not measured or not given."] = maps(domain, panels)
    table = [["Quantity", "Where", "Mean", "Among members"]]
    for row, name in enumerate(domain.sensors):
        if row in shown:
            mean = stacked[:, :, row].mean((1, 2))
            table.append([domain_name(domain, row), name, f"{mean.mean():.4g}", f"{mean.min():.4g} to {mean.max():.4g}"])
    return Section("The answer", list(question.notes), {"Means over all windows": table}, pictures)


def _look(domain: "Sensors", evaluation: Any) -> Section:
    """A held-out window: the truth, members of the model, and each baseline's first."""
    drawn = {name: _stacked(domain, sample) for name, sample in evaluation.examples.items() if name != "truth"}
    true = _stacked(domain, evaluation.examples["truth"])
    item = _busiest(domain, true)
    text = ["The same held-out window. Cells that are given are the same in all; the others are one draw of each."]
    if domain.along_sensors:
        panels = {"truth": true[item]}
        for who, values in drawn.items():
            panels[who] = values[0, item]
            if who == next(iter(drawn)):
                panels[f"{who}, another member"] = values[1, item]
        return Section("Samples beside truth and baselines", text, {}, {"Every sensor over one held-out window.": maps(domain, panels)})
    pictures = {}
    for row in range(min(len(domain.sensors), FANS)):
        panels_of = {who: values[0, item, row] for who, values in drawn.items()}
        caption = f"{domain_name(domain, row).capitalize()} in one held-out window: the truth (black) and one draw of each."
        pictures[caption] = courses(domain, true[item, row], panels_of)
    return Section("Samples beside truth and baselines", text, {}, pictures)


# ---------------------------------------------------------------- what to show


def domain_name(domain: "Sensors", row: int) -> str:
    """The quantity of a row of a stacked window, with its units."""
    quantity = next(iter(domain.quantities.values())) if domain.along_sensors else domain.quantities[domain.sensors[row]]
    return f"{quantity.long_name}, {quantity.units}"


def _stacked(domain: "Sensors", sample: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(domain.stack({name: np.asarray(values) for name, values in sample.items()}))


def _usual(domain: "Sensors", question: Question) -> np.ndarray:
    """Medians that calendar and weather tell, `[item, sensor, time]`."""
    statistics = domain._fill
    return np.asarray(domain._restored(statistics, domain._expected(statistics, question.condition)[0]))


def _busiest(domain: "Sensors", windows: np.ndarray) -> int:
    """The window `[item, sensor, time]` with most going on: its sensors vary most, each against its own spread."""
    spread = windows.std((0, 2), keepdims=True) + 1e-6
    return int(np.argmax((np.abs(windows - windows.mean((0, 2), keepdims=True)) / spread).mean((1, 2)))) if len(windows) > 1 else 0


def _spread_out(domain: "Sensors", given: np.ndarray) -> np.ndarray:
    """Rows to show: those of which something is asked, evenly spaced."""
    asked = np.flatnonzero((given == 0).any(1))
    asked = asked if len(asked) else np.arange(len(given))
    return asked[np.linspace(0, len(asked) - 1, min(FANS, len(asked))).round().astype(int)]


def _last(known: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The last given value of each sensor, held; NaN where there is none yet."""
    last = np.maximum.accumulate(np.where(given > 0, np.arange(given.shape[1]), -1), axis=1)
    return np.where(last >= 0, np.take_along_axis(known, np.maximum(last, 0), 1), np.nan)


# ---------------------------------------------------------------- pictures


def fans(
    domain: "Sensors", drawn: np.ndarray, rows: np.ndarray, lines: Mapping[str, tuple[np.ndarray, str, str]], true: np.ndarray | None,
    given: np.ndarray, known: np.ndarray,
) -> bytes:  # fmt: skip
    """Ranges of draws `[member, sensor, time]` over time, a panel for each of `rows`."""
    hours, unit = _axis(domain)

    def draw(plt: Any) -> Any:
        columns = 2 if len(rows) > 1 and domain.window <= 48 else 1
        down = -(-len(rows) // columns)
        figure, axes = plt.subplots(down, columns, figsize=(9.0, 1.9 * down + 0.5), squeeze=False, sharex=True, layout="constrained")
        for axis in axes.flat[len(rows) :]:
            axis.set_visible(False)
        for axis, row in zip(axes.flat, rows, strict=False):
            levels = np.quantile(drawn[:, row], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
            axis.fill_between(hours, levels[0], levels[4], color=INK, alpha=0.18, lw=0, label="90 % of members")
            axis.fill_between(hours, levels[1], levels[3], color=INK, alpha=0.32, lw=0, label="50 %")
            axis.plot(hours, levels[2], color=INK, lw=1.4, label="median")
            for label, (values, colour, style) in lines.items():
                axis.plot(hours, values[row], color=colour, ls=style, lw=1.0, label=label)
            if true is not None:
                axis.plot(hours, true[row], color=TRUTH, lw=1.1, label="measured")
            at = given[row] > 0
            axis.plot(hours[at], known[row][at], ".", color=TRUTH, ms=3)
            where = domain.sensors[row] if domain.along_sensors else ""
            axis.set_title(f"{where}  {domain_name(domain, row)}".strip(), fontsize=8, loc="left")
            axis.tick_params(labelsize=7, length=2)
            axis.margins(x=0)
        for axis in axes[-1]:
            axis.set_xlabel(unit, fontsize=8)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=7, frameon=False)
        return figure

    return _png(draw)


def maps(domain: "Sensors", panels: Mapping[str, np.ndarray]) -> bytes:
    """Windows `[sensor, time]` side by side in one scale; low is red, as a jam is."""
    hours, unit = _axis(domain)
    values = np.concatenate([panel[np.isfinite(panel)] for panel in panels.values()])
    low, high = np.quantile(values, [0.005, 0.995])

    def draw(plt: Any) -> Any:
        columns = min(3, len(panels))
        down = -(-len(panels) // columns)
        figure, axes = plt.subplots(down, columns, figsize=(9.0, 2.4 * down), squeeze=False, sharex=True, sharey=True, layout="constrained")
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        step = hours[1] - hours[0]
        for axis, (label, panel) in zip(axes.flat, panels.items(), strict=False):
            box = (hours[0] - step / 2, hours[-1] + step / 2, len(panel) - 0.5, -0.5)
            image = axis.imshow(
                panel, aspect="auto", cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), extent=box, interpolation="none"
            )
            axis.set_title(label, fontsize=8, loc="left")
            axis.tick_params(labelsize=7, length=2)
        for axis in axes[:, 0]:
            axis.set_ylabel("sensor", fontsize=8)
        for axis in axes[-1]:
            axis.set_xlabel(unit, fontsize=8)
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.01)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.set_label(domain_name(domain, 0), fontsize=8)
        return figure

    return _png(draw)


def courses(domain: "Sensors", true: np.ndarray, drawn: Mapping[str, np.ndarray]) -> bytes:
    """One quantity over time, a panel for each who drew it, the truth behind."""
    hours, unit = _axis(domain)

    def draw(plt: Any) -> Any:
        size = (9.0, 1.1 * len(drawn) + 0.4)
        figure, axes = plt.subplots(len(drawn), 1, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
        for axis, (who, values) in zip(axes[:, 0], drawn.items(), strict=True):
            axis.plot(hours, true, color=TRUTH, lw=0.8)
            axis.plot(hours, values, color=INK, lw=1.0)
            axis.set_title(who, fontsize=8, loc="left")
            axis.tick_params(labelsize=7, length=2)
            axis.margins(x=0)
        axes[-1, 0].set_xlabel(unit, fontsize=8)
        return figure

    return _png(draw)


def _axis(domain: "Sensors") -> tuple[np.ndarray, str]:
    hours = np.arange(domain.window) * (domain.step / np.timedelta64(1, "h"))
    if domain.past / domain.window == 0.5:
        hours = hours - hours[domain.past - 1]
        return hours * 60, "minutes from the last step of the first half"
    return (hours, "hours from the beginning") if hours[-1] > 3 else (hours * 60, "minutes from the beginning")


def _png(draw: Callable[[Any], Any]) -> bytes:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(plt)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120, metadata={"Software": None, "Title": "synthetic data, generated by twinsim"})
    plt.close(figure)
    return out.getvalue()
