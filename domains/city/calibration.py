"""Demand that agrees with counts: a matrix of trips moved from a prior, no further than it takes, until assigned flows match counted ones.

Trips from i to j are the prior's times exp(x), so never negative; x = level + that of i + that of j + one of the pair, each normal about 0
with the deviations of `Spread`. Counts err by `TOLERANCE` in GEH. The most probable x is found by Gauss and Newton: `equilibrium` gives the
flows of the present trips and the ways in use, `sensitivity` how the flows answer to each pair's trips, rerouting included, by the implicit
function theorem, and the step is solved for in the space of counts, which are few (Tarantola & Valette 1982, "Generalized nonlinear inverse
problems solved using the least squares criterion": the fixed-point form with G C G' + C_d). Matrices from counts by least squares: Cascetta
(1984); multiplicative steps along the gradient: Spiess (1990); sensitivity of equilibria: Tobin & Friesz (1988).

GEH = sqrt(2 (m - c)^2 / (m + c)) with flows in veh/h; below 5 on 85 % of the links is a usable model (UK Department for Transport, TAG
unit M3.1). Its tolerance of 1 is the Poisson noise of one hour's count.
"""

import csv
import dataclasses
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order
from scipy.spatial import cKDTree

from domains.city import files, gmns, place, simplify, tntp
from domains.city.counts import Counts, read_counts
from domains.city.demand import cpc
from domains.city.equilibrium import Equilibrium, equilibrium
from domains.city.network import Demand, Network, reached, turns
from domains.city.readers import read_network
from twinsim.base import BadInput

GEH_GOOD = 5.0
TOLERANCE = 1.0  # GEH
ITERATIONS = 30
SHARPNESS = 10.0  # 1/s: drivers tell ways apart that differ by a tenth of a second
LEAST_GAIN = 1e-4  # of the objective; an iteration that promises less is the last
_LONGEST = 2.0  # of one step in x: the flows answer to exp(x), far from where they were linearised
_SHARES = 0.5 ** np.arange(6)  # of a step that are tried
_CONJUGATE, _CG_TOLERANCE, _BLOCK = 200, 1e-9, 64
# Guesses, no statistics: trips an hour a person or job; a km of street within a zone; and of a gate's capacity
HOURLY, PER_STREET, GATE = 0.1, 20.0, 0.2
FOLDS = 20  # up to so many counts each is left out by itself


@dataclass(frozen=True)
class Spread:
    """How far trips may lie from the prior: standard deviations of ln(trips / prior), before any count is known.

    What is counted one way tells much of the other way too: who drives to a place drives off again.

    Attributes:
      level: of all trips together. zone: of a zone, from and to it alike; end: of its origins, or its destinations, alone.
      pair: of what two zones have of their own, both ways alike; way: one way alone.
    """

    level: float = 1.0
    zone: float = 0.4
    end: float = 0.1
    pair: float = 0.4
    way: float = 0.1

    @classmethod
    def level_only(cls, level: float = 3.0) -> "Spread":
        """The prior times one factor."""
        return cls(level, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Fit:
    """How modelled flows agree with counted ones.

    Attributes:
      geh: of each count, `[count]`. share: of counts with a GEH below 5, 0 to 1.
      rmse_percent: root mean square error over the mean count, %. r2: 1 - squared errors / squared deviations of the counts from their
        mean; nan where all counts are the same.
    """

    geh: np.ndarray
    share: float
    rmse_percent: float
    r2: float


@dataclass(frozen=True)
class Calibration:
    """Trips that agree with counts, and how well.

    Attributes:
      trips, prior: veh/h, `[zone, zone]`; those within a zone are the prior's.
      counts: what was fitted to.
      prior_flow, flow: on the counted links before and after, veh/h, `[count]`.
      held_out_flow: on each counted link when its own count was left out of the fit, `[count]`; None where that was not asked for.
      equilibrium: of the fitted trips. objective: the value that was made least, by iteration.
      converged: whether the last step promised less than `LEAST_GAIN` of it.
      sensitivity: of the counted flows to ln trips in GEH tolerances, `[count, zone * zone]`.
      spread: what the trips were let to differ by.
    """

    trips: np.ndarray
    prior: np.ndarray
    counts: Counts
    prior_flow: np.ndarray
    flow: np.ndarray
    held_out_flow: np.ndarray | None
    equilibrium: Equilibrium
    objective: tuple[float, ...]
    converged: bool
    sensitivity: sparse.csr_matrix
    spread: Spread

    @property
    def before(self) -> Fit:
        return fit(self.prior_flow, self.counts.flow)

    @property
    def after(self) -> Fit:
        return fit(self.flow, self.counts.flow)

    @property
    def held_out(self) -> Fit | None:
        return None if self.held_out_flow is None else fit(self.held_out_flow, self.counts.flow)

    @property
    def unreached(self) -> np.ndarray:
        """Counts on whose link nobody's cheapest way leads, though some way does: the trips cannot mend these. Indices `[n]`."""
        return np.flatnonzero((self.flow == 0) & (self.counts.flow > 0))

    @property
    def moved(self) -> dict[str, float]:
        """How far the trips are from the prior: totals in veh/h, their factor, the deviation of ln(trips / prior) about it (weighted by
        trips), and the common part of commuters, 2 sum min / (sum + sum) of the two once their totals are the same (1: alike)."""
        used = ~np.eye(len(self.prior), dtype=bool) & (self.prior > 0)
        prior, trips = self.prior[used], self.trips[used]
        factor = trips.sum() / prior.sum()
        log = np.log(trips / prior / factor)
        return {
            "prior_total": float(prior.sum()),
            "total": float(trips.sum()),
            "factor": float(factor),
            "log_deviation": float(np.sqrt(np.average(log**2, weights=trips))),
            "common_part": cpc(trips, factor * prior),
        }


def geh(modelled: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """GEH statistic of hourly flows, veh/h; 0 where both are 0."""
    m, c = np.asarray(modelled, float), np.asarray(counted, float)
    return np.sqrt(2 * (m - c) ** 2 / np.where(m + c > 0, m + c, 1.0))


def fit(modelled: np.ndarray, counted: np.ndarray) -> Fit:
    """How modelled flows agree with counted ones, veh/h, `[count]`."""
    each = geh(modelled, counted)
    error = np.asarray(modelled, float) - counted
    spread = float(((counted - np.mean(counted)) ** 2).sum())
    rmse = 100 * float(np.sqrt((error**2).mean()) / max(np.mean(counted), 1e-300))
    return Fit(each, float((each < GEH_GOOD).mean()), rmse, 1 - float((error**2).sum()) / spread if spread > 0 else float("nan"))


def guessed_trips(network: Network, *, tau: float = 600.0) -> Demand:
    """Trips of an hour by a doubly constrained gravity model: a_i b_j exp(-t_ij / tau), `tau` in s, t_ij the time on empty roads.

    Trips that start and end in a zone follow from what is known of it: `HOURLY` of each person and job; or else, as a guess by which
    to begin, `PER_STREET` of each km of street nearest to it, and `GATE` of the capacity of the roads where it is a gate, which is
    a zone tied to ends of roads alone. Wilson (1967), balanced as Furness (1965) does.
    """
    ends = _trip_ends(network)
    way = reached(network) & ~np.eye(network.zones, dtype=bool) & (ends[:, None] > 0) & (ends > 0)
    if not way.any():
        raise BadInput(f"gravity prior: expected people, jobs or streets in zones with ways between them, got none in {network.zones}")
    time = equilibrium(network, 1e-9 * way, iterations=1, gap=1.0).cost[0]
    trips = np.where(way, np.exp(-np.where(way, time, 0.0) / tau), 0.0)
    for _ in range(100):  # ends with the columns kept; where the rows cannot be as well, they are nearly
        trips *= (ends / np.maximum(trips.sum(1), 1e-300))[:, None]
        trips *= ends / np.maximum(trips.sum(0), 1e-300)
    return Demand(trips)


def calibrate(
    network: Network,
    prior: Demand | np.ndarray,
    counts: Counts,
    *,
    spread: Spread | None = None,
    tolerance: float = TOLERANCE,
    gap: float = 1e-6,
    iterations: int = ITERATIONS,
    folds: int | np.ndarray | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """The most probable trips, given a prior `[zone, zone]` in veh/h and counts in veh/h.

    A pair without trips in the prior stays without. `tolerance` is the GEH that counts themselves err by. `folds` counts how often a part
    of the counts is left out and predicted from the others: by default each count by itself, from 20 counts on 20 parts; 0 for never; or it
    says which part each count is left out with, `[count]`.
    Raises BadInput on numbers that make no sense and where a link is counted that no trip of the prior can reach.
    """
    matrix, spread = np.asarray(prior.trips if isinstance(prior, Demand) else prior, float), spread or Spread()
    if matrix.shape != (network.zones, network.zones):
        raise BadInput(
            f"calibrate: expected a prior [{network.zones}, {network.zones}], one row and column a zone, got {list(matrix.shape)}"
        )
    wrong_trips = np.argwhere(~(np.isfinite(matrix) & (matrix >= 0)))
    if len(wrong_trips):
        a, b = network.node_id[network.zone[wrong_trips[0]]]
        raise BadInput(f"prior from zone {a} to zone {b}: expected trips of 0 or more, got {matrix[tuple(wrong_trips[0])]:g}")
    for name, value in vars(spread).items():
        if not (np.isfinite(value) and value >= 0):
            raise BadInput(f"calibrate: expected a spread.{name} of 0 or more, got {value}")
    if not (np.isfinite(tolerance) and tolerance > 0):
        raise BadInput(f"calibrate: expected a tolerance above 0 (GEH), got {tolerance}")
    _check_counts(network, matrix, counts)
    number = len(counts.link)
    parts = _parts(folds, number)
    search = _Search(network, matrix, spread, tolerance, gap, iterations)
    start = search.look(np.zeros_like(matrix))
    x, found, objective, converged, response = search.most_probable(counts, start)
    progress(1, len(parts) + 1)
    held_out = np.full(number, np.nan) if parts else None
    for done, out in enumerate(parts, 2):
        assert held_out is not None
        without = search.most_probable(Counts(counts.link[~out], counts.flow[~out]), start)
        held_out[out] = without[1].flow[counts.link[out]]
        progress(done, len(parts) + 1)
    x[np.diag_indices_from(x)] = 0.0
    return Calibration(
        matrix * np.exp(x), matrix, counts, start.flow[counts.link], found.flow[counts.link], held_out, found, objective, converged,
        response, spread,
    )  # fmt: skip


def calibrate_files(
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    network: str,
    counts: str,
    prior: str = "gravity",
    hour: int | None = None,
    zones: int = 40,
    junction_delay: float = place.JUNCTION_DELAY,
    tolerance: float = TOLERANCE,
    spread: Mapping[str, float] | None = None,
    folds: int | None = None,
) -> list[str]:
    """Calibrates what lies in files and writes the answer into `folder`; returns what came out, in lines.

    A network without zones gets one at each road out and `zones` districts. `prior` is "gravity" or a matrix: TNTP, a CSV with
    o_zone_id, d_zone_id, volume (GMNS), or an .npz with `trips`. The junction at the end of a link costs `junction_delay`, s, as in
    `place.junction_delay`; it is not in what is written: a city made of that has it again. Written: gmns/ (network and demand.csv),
    trips.npz, counts.csv, fit.json, scatter.svg. Raises BadInput.
    """
    if unknown := sorted(set(spread or {}) - {each.name for each in dataclasses.fields(Spread)}):
        known = ", ".join(each.name for each in dataclasses.fields(Spread))
        raise BadInput(f"spread: expected some of {known}, got {unknown[0]}")
    roads = with_zones(read_network(network), zones)
    counted, driven = read_counts(counts, roads, hour), place.stopped(roads, place.junction_delay(roads, junction_delay))
    matrix = guessed_trips(driven) if prior == "gravity" else read_trips(prior, roads)
    found = calibrate(driven, matrix, counted, spread=Spread(**(spread or {})), tolerance=tolerance, folds=folds, progress=progress)
    return _write(found, roads, prior, Path(folder))


def with_zones(network: Network, zones: int) -> Network:
    """The network itself where it has zones; else its largest part with a zone at each road out and `zones` districts, every link kept
    under its name. Raises BadInput."""
    if network.zones:
        return network
    return simplify.drop_lost_zones(simplify.add_zones(simplify.drop_lost_zones(simplify.largest_part(simplify.add_gates(network))), zones))


def read_trips(path: str | os.PathLike, network: Network) -> np.ndarray:
    """A matrix of trips, veh/h `[zone, zone]`, of a `.tntp` file, a GMNS demand `.csv` or an `.npz` with `trips`. Raises BadInput."""
    path = Path(path)
    if path.name.endswith(".tntp"):
        trips = tntp.read_trips(path).trips
    elif path.suffix == ".csv":
        trips = _read_demand(path, network.zone_names)
    elif path.suffix == ".npz":
        try:
            with files.opened(path) as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as kept:
                trips = np.asarray(kept["trips"], float)
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise BadInput(f"{path}: expected an .npz with an array trips [zone, zone], got: {error}") from None
    else:
        raise BadInput(f"{path}: expected a prior as gravity, .tntp, .csv (o_zone_id, d_zone_id, volume) or .npz (trips)")
    if trips.shape != (network.zones, network.zones):
        raise BadInput(f"{path}: expected trips between {network.zones} zones, as the network has, got {list(trips.shape)}")
    wrong = np.argwhere(~(np.isfinite(trips) & (trips >= 0)))
    if len(wrong):
        a, b = (network.zone_names[zone] for zone in wrong[0])
        raise BadInput(f"{path}: from zone {a} to zone {b}: expected trips of 0 or more, got {trips[tuple(wrong[0])]:g}")
    return trips


def draws(found: Calibration, members: int, seed: int = 0) -> np.ndarray:
    """Matrices that the counts leave open, veh/h, `[member, zone, zone]`: what they do not tell varies as `Spread` lets it.

    Normal in ln trips about the fit, with the flows linear there (Laplace); drawn by conditioning draws of the prior on noisy counts
    (Matheron's rule; Journel & Huijbregts 1978).
    """
    random, J = np.random.default_rng(seed), found.sensitivity
    zones = len(found.prior)
    gram = _gram(J, zones, found.spread) + np.eye(J.shape[0])
    answer = np.empty((members, zones, zones))
    for member in range(members):
        wild = _wild(random, zones, found.spread)
        weight = np.linalg.solve(gram, J @ wild.ravel() + random.normal(size=J.shape[0]))
        turn = wild - _spread_out((J.T @ weight).reshape(zones, zones), found.spread)
        answer[member] = found.trips * np.exp(np.where(np.eye(zones, dtype=bool), 0.0, turn))
    return answer


def sensitivity(
    network: Network, trips: Demand | np.ndarray, found: Equilibrium, links: np.ndarray, sharpness: float = SHARPNESS
) -> sparse.csr_matrix:
    """Vehicles more on each of `links` for a trip more between two zones, `[n, zone * zone]`; drivers turn away from full links.

    Trips choose among the ways in use by a logit with sharpness in 1/s, whose constants are such that it has the flows of the
    equilibrium; the larger the sharpness, the closer to the equilibrium's own derivative (Tobin & Friesz 1988). With load A dT, T' the
    slopes of the travel times and B the fall of flows by a rise of costs, dv = A dT - B T' dv; here its transpose is solved.
    """
    matrix = np.asarray(trips.trips if isinstance(trips, Demand) else trips, float)
    paths, zones = found.paths, network.zones
    key, pair = np.unique(paths.origin * zones + paths.destination, return_inverse=True)
    share = paths.flow / np.maximum(np.bincount(pair, paths.flow), 1e-300)[pair]
    average = sparse.csr_matrix((share, (pair, np.arange(len(pair)))), shape=(len(key), len(pair)))
    answer = sparse.lil_matrix((len(links), zones * zones)).tocsr()
    several = np.flatnonzero((np.bincount(pair) > 1)[pair])  # only these can turn to another way
    choice, own, mean = paths.links[several], pair[several], average[:, several]
    weight = (sharpness * paths.flow[several])[:, None]
    root = np.sqrt(_slope(network, found.flow))[:, None]

    def spread(rise: np.ndarray) -> np.ndarray:
        """B: the fall of link flows `[link, n]` by a rise of link costs."""
        cost = choice @ rise
        return choice.T @ (weight * (cost - (mean @ cost)[own]))

    rows = []
    for begin in range(0, len(links), _BLOCK):
        some = links[begin : begin + _BLOCK]
        unit = np.zeros((network.links, len(some)))
        unit[some, np.arange(len(some))] = 1.0
        # (I + T' B) y = unit, T' = root^2: y = unit - root z with (I + root B root) z = root B unit
        z = _definite(lambda y: y + root * spread(root * y), root * spread(unit))
        row = (average @ (paths.links @ (unit - root * z))).T  # [n, pair]
        row[np.abs(row) < 1e-9] = 0.0
        rows.append(sparse.csr_matrix(row))
    if not rows:
        return answer
    by_pair = sparse.vstack(rows, format="coo")
    answer = sparse.csr_matrix((by_pair.data, (by_pair.row, key[by_pair.col])), shape=answer.shape)
    answer = answer.multiply((matrix.ravel() > 0)[None]).tocsr()
    return answer


# ---- what goes out


def _write(found: Calibration, network: Network, prior: str, folder: Path) -> list[str]:
    gmns.write_network(network, folder / "gmns")
    with (folder / "gmns" / "demand.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("o_zone_id", "d_zone_id", "volume"))
        name = network.zone_names
        table.writerows((name[a], name[b], repr(float(found.trips[a, b]))) for a, b in np.argwhere(found.trips > 0).tolist())
    np.savez_compressed(folder / "trips.npz", trips=found.trips, prior=found.prior, zone=network.node_id[network.zone])
    columns = {"counted": found.counts.flow, "prior": found.prior_flow, "fitted": found.flow, "GEH": found.after.geh}
    if found.held_out_flow is not None:
        columns |= {"held_out": found.held_out_flow}
    with (folder / "counts.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("link", *columns))
        table.writerows(zip(network.link_id[found.counts.link], *(value.round(3) for value in columns.values()), strict=True))
    (folder / "fit.json").write_text(json.dumps({"prior_from": prior, **summary(found, network)}, indent=1))
    (folder / "scatter.svg").write_bytes(scatter(found))
    return lines(found, network)


def summary(found: Calibration, network: Network) -> dict:
    """The fit in plain numbers: before, after and held out, how far the trips moved, counts that nothing reaches."""
    fits = {"before": found.before, "after": found.after} | ({} if found.held_out is None else {"held_out": found.held_out})
    numbers = {
        name: {
            "GEH_below_5": one.share, "GEH_mean": float(one.geh.mean()), "GEH_largest": float(one.geh.max()),
            "RMSE_percent": one.rmse_percent, "R2": one.r2 if np.isfinite(one.r2) else None,
        }
        for name, one in fits.items()
    }  # fmt: skip
    unreached = network.link_id[found.counts.link[found.unreached]].tolist()
    about = {"counts": len(found.counts.link), "zones": network.zones, "iterations": len(found.objective) - 1, "converged": found.converged}
    return {**about, **numbers, "moved": found.moved, "on_nobodys_way": unreached}


def lines(found: Calibration, network: Network) -> list[str]:
    """The fit in words."""
    fits = {"prior": found.before, "fitted": found.after} | ({} if found.held_out is None else {"held out": found.held_out})
    answer = [
        f"{name:<9} GEH below 5 on {one.share:6.1%} of {len(one.geh)} counts, RMSE {one.rmse_percent:5.1f} %, R2 {one.r2:.3f}"
        for name, one in fits.items()
    ]
    moved = found.moved
    answer.append(
        f"trips     {moved['prior_total']:.0f} -> {moved['total']:.0f} veh/h; beyond that a pair is moved by a factor of "
        f"{np.exp(moved['log_deviation']):.1f} (root mean square of its log), common part {moved['common_part']:.2f}"
    )
    if not found.converged:
        answer.append(
            f"not converged after {len(found.objective) - 1} iterations: trips jump from way to way, or more iterations are needed"
        )
    if len(found.unreached):
        some = ", ".join(network.link_id[found.counts.link[found.unreached]][:5])
        answer.append(f"{len(found.unreached)} counted links lie on nobody's cheapest way, their counts are missed: {some}")
    return answer


def scatter(found: Calibration) -> bytes:
    """Counted against modelled flows as an SVG picture: the prior, the fit, the band of GEH below 5."""
    counted = found.counts.flow
    most = 1.05 * max(float(each.max()) for each in (counted, found.prior_flow, found.flow)) + 1.0
    series = [("prior", found.prior_flow, "x", "#8a5a00"), ("fitted", found.flow, "o", "#0b5394")]
    if found.held_out_flow is not None:
        most = max(most, 1.05 * float(found.held_out_flow.max()))
        series.insert(1, ("held out", found.held_out_flow, "+", "#4a525c"))
    figure = Figure(figsize=(5.2, 5.2))
    axes = figure.subplots()
    c = np.linspace(0, most, 200)
    # 2 (m - c)^2 = 25 (m + c), a quadratic in m
    root = np.sqrt(GEH_GOOD**4 / 16 + GEH_GOOD**2 * c)
    low, high = (c + GEH_GOOD**2 / 4 + sign * root for sign in (-1, 1))
    axes.fill_between(c, np.maximum(low, 0), high, color="#d8dde3", label="GEH below 5", linewidth=0)
    axes.plot(c, c, color="#1b1f24", linewidth=0.8)
    for name, flow, marker, colour in series:
        axes.scatter(counted, flow, marker=marker, s=28, color=colour, label=name, linewidths=1.2)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="counted, veh/h", ylabel="modelled, veh/h", aspect="equal")
    axes.legend(loc="upper left", frameon=False)
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "twinsim", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return stream.getvalue()


# ---- the fit


@dataclass(frozen=True)
class _Search:
    """A prior on a network, and how the most probable trips are looked for."""

    network: Network
    prior: np.ndarray
    spread: Spread
    tolerance: float
    gap: float
    iterations: int

    def look(self, x: np.ndarray) -> Equilibrium:
        """The equilibrium of the prior's trips times exp(x), `[zone, zone]`."""
        return equilibrium(self.network, self.prior * np.exp(x), self.gap)

    def most_probable(
        self, counts: Counts, start: Equilibrium
    ) -> tuple[np.ndarray, Equilibrium, tuple[float, ...], bool, sparse.csr_matrix]:
        """x, the equilibrium there, the objective by iteration, whether it converged, and the sensitivity at the end.

        x = C w with the covariance C, so that x' C^-1 x = x w. `start` is the equilibrium at x = 0.
        """
        zones = len(self.prior)
        x, w, found = np.zeros((zones, zones)), np.zeros((zones, zones)), start
        value, history, converged = self._objective(found, counts, x, w), [], False
        for _ in range(self.iterations):
            history.append(value)
            residual, J = self._linear(found, counts, x)
            gram = _gram(J, zones, self.spread)
            lift = np.linalg.solve(gram + np.eye(len(gram)), J @ x.ravel() - residual)
            new_w = (J.T @ lift).reshape(zones, zones)
            step, turn = _spread_out(new_w, self.spread) - x, new_w - w
            ahead = residual + J @ step.ravel()
            promised = value - 0.5 * (ahead @ ahead + float(((x + step) * (w + turn)).sum()))
            converged = bool(promised <= LEAST_GAIN * value + 1e-12)
            if converged:
                break
            longest = min(1.0, _LONGEST / float(np.abs(step).max(initial=1e-300)))
            for share in longest * _SHARES:
                there = self.look(x + share * step)
                new = self._objective(there, counts, x + share * step, w + share * turn)
                if new < value:
                    x, w, found, value = x + share * step, w + share * turn, there, new
                    break
            else:  # trips that jump from way to way leave no descent
                break
        return x, found, (*history, value), converged, self._linear(found, counts, x)[1]

    def _objective(self, found: Equilibrium, counts: Counts, x: np.ndarray, w: np.ndarray) -> float:
        residual, _ = self._miss(found, counts)
        return 0.5 * float(residual @ residual + (x * w).sum())

    def _miss(self, found: Equilibrium, counts: Counts) -> tuple[np.ndarray, np.ndarray]:
        """Signed GEH over its tolerance, and its derivative by the flow, `[count]`; 1 veh/h more in the denominator, against 0 / 0."""
        m, c = found.flow[counts.link], counts.flow
        total = m + c + 1.0
        return np.sqrt(2 / total) * (m - c) / self.tolerance, np.sqrt(2 / total) * (1 - 0.5 * (m - c) / total) / self.tolerance

    def _linear(self, found: Equilibrium, counts: Counts, x: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
        """What is missed, and its derivative by x, `[count, zone * zone]`."""
        trips = self.prior * np.exp(x)
        residual, slope = self._miss(found, counts)
        return residual, sensitivity(self.network, trips, found, counts.link).multiply(slope[:, None]).multiply(
            trips.reshape(1, -1)
        ).tocsr()


def _wild(random: np.random.Generator, zones: int, spread: Spread) -> np.ndarray:
    """Ln trips over the prior's, as the prior has them, `[zone, zone]`."""
    size, out, into = random.normal(size=(3, zones))
    own, way = random.normal(size=(2, zones, zones))
    pair = np.triu(own) + np.triu(own, 1).T
    ends = spread.zone * np.add.outer(size, size) + spread.end * np.add.outer(out, into)
    return spread.level * random.normal() + ends + spread.pair * pair + spread.way * way


def _spread_out(w: np.ndarray, spread: Spread) -> np.ndarray:
    """The prior's covariance of ln trips, times w, both `[zone, zone]`."""
    out, into = w.sum(1), w.sum(0)
    both = out + into
    ends = spread.zone**2 * np.add.outer(both, both) + spread.end**2 * np.add.outer(out, into)
    return spread.level**2 * w.sum() + ends + spread.pair**2 * (w + w.T) + spread.way**2 * w


def _gram(J: sparse.csr_matrix, zones: int, spread: Spread) -> np.ndarray:
    """J C J', `[count, count]`."""
    table = J.tocoo()
    origin, destination = table.col // zones, table.col % zones
    turned = sparse.csr_matrix((table.data, (table.row, destination * zones + origin)), shape=J.shape)

    def sums(zone: np.ndarray) -> sparse.csr_matrix:
        return sparse.csr_matrix((table.data, (table.row, zone)), shape=(J.shape[0], zones))

    out, into = sums(origin), sums(destination)
    parts = ((spread.level, sums(0 * origin)), (spread.zone, out + into), (spread.end, out), (spread.end, into), (spread.way, J))
    answer = sum(deviation**2 * (part @ part.T).toarray() for deviation, part in parts)
    return answer + spread.pair**2 * (J @ (J + turned).T).toarray()


def _slope(network: Network, flow: np.ndarray) -> np.ndarray:
    """Derivative of the BPR time by the flow, s h/veh, `[link]`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steep = network.free_time * network.alpha * network.beta / network.capacity * (flow / network.capacity) ** (network.beta - 1)
    return np.where(np.isfinite(steep), steep, 0.0)


def _definite(matrix: Callable[[np.ndarray], np.ndarray], right: np.ndarray) -> np.ndarray:
    """Conjugate gradients for the columns of `right`, `[link, n]`, side by side."""
    x, residual = np.zeros_like(right), right.copy()
    direction, square = residual.copy(), (residual**2).sum(0)
    enough = _CG_TOLERANCE**2 * np.maximum(square, 1e-300)
    for _ in range(_CONJUGATE):
        if (square <= enough).all():
            break
        bent = matrix(direction)
        length = np.where(square > enough, square / np.maximum((direction * bent).sum(0), 1e-300), 0.0)
        x += length * direction
        residual -= length * bent
        old, square = square, (residual**2).sum(0)
        direction = residual + square / np.maximum(old, 1e-300) * direction
    return x


# ---- what comes in


def _parts(folds: int | np.ndarray | None, counts: int) -> list[np.ndarray]:
    """Which counts are left out together, `[count]` bool for each time."""
    if folds is None or isinstance(folds, int):
        number = min(counts, FOLDS) if folds is None else folds
        if folds is None and counts < 2:
            number = 0
        if number != 0 and not 2 <= number <= counts:
            raise BadInput(f"calibrate: expected 0 or 2 to {counts} folds for {counts} counts, got {number}")
        label = np.random.default_rng(0).permutation(counts) % max(number, 1)
        return [label == fold for fold in range(number)]
    label = np.asarray(folds)
    if label.shape != (counts,) or len(np.unique(label)) < 2:
        raise BadInput(f"calibrate: expected folds that name a part for each of {counts} counts, at least two parts, got {label.tolist()}")
    return [label == fold for fold in np.unique(label)]


def _check_counts(network: Network, prior: np.ndarray, counts: Counts) -> None:
    if not len(counts.link):
        raise BadInput("calibrate: expected at least one count, got none")
    outside = np.flatnonzero((counts.link < 0) | (counts.link >= network.links))
    if len(outside):
        raise BadInput(f"calibrate: expected counted links 0 to {network.links - 1}, got {counts.link[outside[0]]}")
    wrong = np.flatnonzero(~(np.isfinite(counts.flow) & (counts.flow >= 0)))
    if len(wrong):
        at = counts.link[wrong[0]]
        raise BadInput(f"count on link {network.link_id[at]}: expected 0 or more veh/h, got {counts.flow[wrong[0]]:g}")
    trips = (prior > 0) & ~np.eye(network.zones, dtype=bool)
    if not trips.any():
        raise BadInput("calibrate: expected a prior with trips between zones, got none; a pair without trips stays without")
    some = counts.link[counts.flow > 0]
    for link, comes, goes in zip(some, *_reach(network, some), strict=True):
        if not trips[np.ix_(comes, goes)].any():
            ends = f"{network.node_id[network.start[link]]} to {network.node_id[network.end[link]]}"
            raise BadInput(
                f"count on link {network.link_id[link]} from node {ends}: no trip of the prior can reach it, expected a way over it "
                "between two zones with trips"
            )


def _reach(network: Network, links: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each of `links`, the zones that trips over it may come from and go to."""
    pairs = turns(network)
    ahead = sparse.csr_matrix((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(network.links,) * 2)
    zone_at = np.full(network.nodes, -1)
    zone_at[network.zone] = np.arange(network.zones)
    comes, goes = [], []
    for link in links:
        before, after = (breadth_first_order(graph, link, return_predecessors=False) for graph in (ahead.T.tocsr(), ahead))
        zones = zone_at[network.start[before]], zone_at[network.end[after]]
        comes.append(np.unique(zones[0][zones[0] >= 0]))
        goes.append(np.unique(zones[1][zones[1] >= 0]))
    return comes, goes


def _read_demand(path: Path, zones: list[str]) -> np.ndarray:
    """Trips between zones, which the file calls by the names `zones`, `[zone, zone]`."""
    reader = csv.DictReader(files.lines(path), strict=True)
    trips = np.zeros((len(zones), len(zones)))
    index = {name: k for k, name in enumerate(zones)}
    try:
        if missing := {"o_zone_id", "d_zone_id", "volume"} - set(reader.fieldnames or ()):
            raise BadInput(f"{path}: expected columns o_zone_id, d_zone_id and volume, found no {sorted(missing)[0]}")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            try:
                ends, volume = [row[key].strip() for key in ("o_zone_id", "d_zone_id")], float(row["volume"])
            except (AttributeError, TypeError, ValueError):
                raise BadInput(f"{where}: expected two zones and a volume, got {list(row.values())}") from None
            for end in ends:
                if end not in index:
                    raise BadInput(
                        f"{where}: the network has no zone {end!r}; its zones are {', '.join(zones[:8])}{', ...' * (len(zones) > 8)}"
                    )
            trips[index[ends[0]], index[ends[1]]] += volume
    except csv.Error as error:
        raise BadInput(f"{path} line {reader.line_num}: expected CSV, got: {error}") from None
    return trips


def _trip_ends(network: Network) -> np.ndarray:
    """Trips an hour that start, and that end, in each zone, veh/h, `[zone]`."""
    if network.population is not None or network.jobs is not None:
        return HOURLY * np.sum([one for one in (network.population, network.jobs) if one is not None], axis=0)
    street = network.kind != "connector"
    zone_at = np.full(network.nodes, -1)
    zone_at[network.zone] = np.arange(network.zones)
    sides = np.unique(np.sort(np.stack([network.start, network.end], 1)[street], 1), axis=0)
    lone = np.bincount(sides.ravel(), minlength=network.nodes) == 1
    capacity = np.bincount(network.end[street], network.capacity[street], network.nodes)
    gate = np.zeros(network.zones, bool)
    answer = np.zeros(network.zones)
    for zone in range(network.zones):
        ties = network.start[(network.end == network.zone[zone]) & ~street]
        gate[zone] = len(ties) > 0 and bool(lone[ties].all())
        answer[zone] = GATE * capacity[ties].sum()
    district = np.flatnonzero(~gate)
    if not len(district):
        return answer
    if not network.has_map:
        raise BadInput("gravity prior: expected people, jobs or a map in the network, by which trips are guessed, got none of them")
    middle = np.stack([network.x, network.y], 1)
    _, nearest = cKDTree(middle[network.zone[district]]).query((middle[network.start[street]] + middle[network.end[street]]) / 2)
    answer[district] = PER_STREET / 2 * np.bincount(nearest, network.length[street] / 1000, len(district))  # a street has two sides
    return answer
