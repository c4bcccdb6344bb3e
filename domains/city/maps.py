"""Pictures of a city: its own roads as the base map, what flows on them, the air around them, and trips between its districts.

Nothing is fetched. Changes are drawn on a scale centred on zero, from purple (less) to orange (more), which the colour-blind tell apart.
"""

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from domains.city.place import Place

CHANGE, AMOUNT = "PuOr_r", "viridis"
WIDEST = 4.5  # points, of a line
SIZE = (10.5, 5.2)  # inches, of two maps
RESOLUTION = 110  # dots an inch


def traffic(place: Place, flow: np.ndarray, change: np.ndarray, capacity: np.ndarray) -> bytes:
    """Flow as width and its share of the capacity as colour; beside it the change. `[link]` each, veh/h."""
    roads = place.roads
    figure, axes = _pair(place)
    widest = max(float(np.quantile(flow[roads], 0.995)), 1.0)
    width = 0.4 + WIDEST * np.clip(flow[roads] / widest, 0, 1)
    full = np.clip(flow[roads] / np.maximum(capacity[roads], 1e-9), 0, 1.2)
    _draw(figure, axes[0], place, roads, full, width, AMOUNT, Normalize(0, 1.0), "share of the capacity", "now: width is traffic")
    most = max(float(np.quantile(np.abs(change[roads]), 0.99)), 1.0)
    width = 0.4 + WIDEST * np.clip(np.abs(change[roads]) / most, 0, 1)
    norm = TwoSlopeNorm(0.0, -most, most)
    _draw(figure, axes[1], place, roads, change[roads], width, CHANGE, norm, "change, vehicles an hour", "change")
    return _png(figure)


def measures(place: Place, toll: np.ndarray, capacity: np.ndarray, change: np.ndarray) -> bytes:
    """Tolls, euro, or, where there are none, changes of capacity as a share of it; beside them the change of flow, veh/h. `[link]`."""
    roads = place.roads
    figure, axes = _pair(place)
    priced = bool((toll[roads] > 0).any())
    shown = toll[roads] if priced else capacity[roads]
    most = max(float(np.abs(shown).max()), 1e-3)
    norm = Normalize(0.0, most) if priced else TwoSlopeNorm(0.0, -most, most)
    width = 0.4 + WIDEST * np.abs(shown) / most
    label, title = ("euro", "tolls") if priced else ("share of the capacity", "change of capacity by new green splits")
    _draw(figure, axes[0], place, roads, shown, width, AMOUNT if priced else CHANGE, norm, label, title)
    most = max(float(np.quantile(np.abs(change[roads]), 0.99)), 1.0)
    width = 0.4 + WIDEST * np.clip(np.abs(change[roads]) / most, 0, 1)
    norm = TwoSlopeNorm(0.0, -most, most)
    _draw(figure, axes[1], place, roads, change[roads], width, CHANGE, norm, "change, vehicles an hour", "change of traffic")
    return _png(figure)


def air(place: Place, before: np.ndarray, change: np.ndarray, label: str) -> bytes:
    """Concentrations at the receptors and their change, `[receptor]` each."""
    figure, axes = _pair(place)
    most = max(float(np.abs(change).max()), 1e-3)
    for at, values, colours, norm, title in (
        (axes[0], before, AMOUNT, Normalize(float(before.min()), float(before.max())), "now"),
        (axes[1], change, CHANGE, TwoSlopeNorm(0.0, -most, most), "change"),
    ):
        _roads(at, place)
        x, y = (place.receptors - _middle(place)).T / 1000
        shown = at.tricontourf(x, y, values, levels=24, cmap=colours, norm=norm, zorder=1, alpha=0.85)
        figure.colorbar(shown, ax=at, shrink=0.75, label=label)
        at.set_title(title)
    return _png(figure)


def matrices(panels: Mapping[str, np.ndarray]) -> bytes:
    """Matrices `[origin, destination]` side by side on one scale of square roots."""
    figure = Figure(figsize=(2.6 * len(panels) + 0.8, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    most = max(float(np.sqrt(values.max())) for values in panels.values())
    for at, (name, values) in zip(axes, panels.items(), strict=True):
        shown = at.imshow(np.sqrt(values), cmap="viridis", vmin=0, vmax=most)
        at.set_title(name, fontsize=9)
        at.set_xticks([]), at.set_yticks([])
        at.set_xlabel("to"), at.set_ylabel("from")
    figure.colorbar(shown, ax=list(axes), label="square root of vehicles", shrink=0.8)
    return _png(figure)


def _pair(place: Place) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    low, high = np.quantile(place.receptors, [0, 1], axis=0) - _middle(place)
    margin = 0.06 * (high - low)
    for at in axes:
        at.set_xlim((low[0] - margin[0]) / 1000, (high[0] + margin[0]) / 1000)
        at.set_ylim((low[1] - margin[1]) / 1000, (high[1] + margin[1]) / 1000)
        at.set_aspect("equal")
        at.set_xlabel("km east of the middle"), at.set_ylabel("km north of it")
        at.tick_params(labelsize=7)
        if place.water is not None:
            at.plot(*((place.water - _middle(place)) / 1000).T, color="#9ecae1", linewidth=7, alpha=0.7, zorder=0, solid_capstyle="round")
    return figure, axes


def _middle(place: Place) -> np.ndarray:
    """The point that maps count kilometres from, m, `[2]`."""
    return place.receptors.mean(0)


def _courses(place: Place, links: np.ndarray) -> list[np.ndarray]:
    """The course of each link, km, set off to the right of its middle line, so that both directions are seen."""
    network = place.network
    xy = np.stack([network.x, network.y], axis=1)
    found = []
    for link in links:
        points = network.shape[link] if network.shape is not None else xy[[network.start[link], network.end[link]]]
        along = points[-1] - points[0]
        right = np.array([along[1], -along[0]]) / max(float(np.hypot(*along)), 1e-9)
        found.append((points + 14.0 * right - _middle(place)) / 1000)
    return found


def _roads(at: Axes, place: Place) -> None:
    at.add_collection(LineCollection(_courses(place, place.roads), colors="#555555", linewidths=0.5, zorder=2))


def _draw(
    figure: Figure, at: Axes, place: Place, links: np.ndarray, values: np.ndarray, width: np.ndarray, colours: str, norm: Normalize,
    label: str, title: str,
) -> None:  # fmt: skip
    order = np.argsort(width)
    courses = _courses(place, links)
    lines = LineCollection([courses[k] for k in order], linewidths=width[order], cmap=matplotlib.colormaps[colours], norm=norm, zorder=2)
    lines.set_array(values[order])
    at.add_collection(lines)
    at.set_facecolor("#f2f2f0")
    figure.colorbar(lines, ax=at, shrink=0.75, label=label)
    at.set_title(title)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=RESOLUTION)
    return out.getvalue()
