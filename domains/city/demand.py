"""Travel demand: how many trips go between zones, when they set out, and how many of them are vehicles of which class.

Trips between zones follow a gravity model, T_ij = A_i O_i B_j D_j f(c_ij) (Wilson 1967, A statistical theory of spatial distribution
models, eq. 1 and 2): O are the trips that leave a zone, D what draws them, c what the way costs, f the deterrence. Matrices are
`[origin, destination]`; what is not read from a file or fitted is an assumption, and says so where it stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import brentq

from twinsim.base import BadInput

Constraint = Literal["production", "both"]
Day = Literal["weekday", "weekend"]
ENOUGH = 1e-9  # of all trips: how well margins are met
MOST_ROUNDS = 10_000
STEEPEST = 60.0  # |d ln f| over the range of costs at which a fit gives up: nobody takes any but the cheapest way


# ---------------------------------------------------------------- deterrence


@dataclass(frozen=True)
class Deterrence:
    """How a way's cost keeps people from going: f(c) = exp(-beta g(c)).

    Attributes:
      kind: "exponential", g = c, what follows from the most likely state at a given total cost (Wilson 1967, eq. 13); or "power",
        g = ln c, f = c^-beta, Newton's form (as in Zipf 1946, The P1 P2 / D hypothesis), which wants costs above 0.
      beta: 1/[cost] where exponential, a pure number where power. The default, 0.1 a minute, is an assumption for costs in minutes:
        a mean way to work of some 20 minutes; `fit_deterrence` finds that of observed trips.
    """

    kind: Literal["exponential", "power"] = "exponential"
    beta: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("exponential", "power"):
            raise BadInput(f"deterrence: expected exponential or power, got {self.kind!r}")

    def felt(self, cost: np.ndarray) -> np.ndarray:
        """g(c). Raises BadInput for a cost of 0 where the power of it is asked for."""
        if self.kind == "exponential":
            return cost
        if (cost <= 0).any():
            row, column = np.argwhere(cost <= 0)[0]
            raise BadInput(f"cost from zone {row} to zone {column}: expected more than 0 for a power, got {cost[row, column]:g}")
        return np.log(cost)

    def __call__(self, cost: np.ndarray) -> np.ndarray:
        """f(c) up to a factor a row, which no constrained model feels: the cheapest way of each row is 1, so that none vanish."""
        felt = self.beta * self.felt(cost)
        return np.exp(felt.min(axis=1, keepdims=True) - felt)


def gravity(
    production: np.ndarray,
    attraction: np.ndarray,
    cost: np.ndarray,
    deterrence: Deterrence = Deterrence(),
    constraint: Constraint = "both",
) -> np.ndarray:
    """Trips between zones, `[zone, zone]`, in the unit of `production`. Raises BadInput.

    Args:
      production: trips that leave a zone, `[zone]`, such as its working population.
      attraction: what draws them, `[zone]`, in any unit, such as its jobs: it is scaled to the sum of `production`.
      cost: of each way, `[zone, zone]`, in the unit that `deterrence` is for, such as minutes.
      constraint: "production" keeps row sums alone, T_ij = O_i D_j f_ij / sum_k D_k f_ik; "both" keeps column sums too.
    """
    production, attraction, cost = _zones(production, attraction, cost)
    if not attraction.sum() > 0:
        raise BadInput("attraction: expected a zone that draws trips, got 0 everywhere")
    pull = attraction * deterrence(cost)
    if constraint == "production":
        reached = pull.sum(axis=1, keepdims=True)
        return production[:, None] * np.divide(pull, reached, out=np.zeros_like(pull), where=reached > 0)
    if constraint != "both":
        raise BadInput(f"gravity: expected the constraint production or both, got {constraint!r}")
    return balance(pull, production, attraction * (production.sum() / attraction.sum()))


def balance(seed: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The matrix nearest to `seed` with the given margins: iterative proportional fitting. Raises BadInput where there is none.

    Source: Deming & Stephan (1940), On a least squares adjustment of a sampled frequency table; Furness (1965), Time function iteration.

    Args:
      seed: not negative, `[zone, zone]`; what is 0 stays 0. rows, columns: sums to be met, `[zone]`, of one total.
    """
    seed, rows, columns = (np.asarray(part, float) for part in (seed, rows, columns))
    if seed.shape != (len(rows), len(columns)) or not (np.isfinite(seed) & (seed >= 0)).all():
        raise BadInput(f"balance: expected a matrix [{len(rows)}, {len(columns)}] of finite values of 0 or more, got {list(seed.shape)}")
    total = rows.sum()
    if not abs(columns.sum() - total) <= ENOUGH * max(total, 1):
        raise BadInput(f"balance: expected rows and columns of one total, got {total:g} and {columns.sum():g}")
    trips = seed.copy()
    for _ in range(MOST_ROUNDS):
        for axis, wanted in ((1, rows), (0, columns)):
            sums = trips.sum(axis=axis)
            factor = np.divide(wanted, sums, out=np.zeros_like(wanted), where=sums > 0)
            trips *= np.expand_dims(factor, axis)
        if np.abs(trips.sum(axis=1) - rows).sum() + np.abs(trips.sum(axis=0) - columns).sum() <= ENOUGH * max(total, 1):
            return trips
    missed = float(np.abs(trips.sum(axis=1) - rows).sum())
    raise BadInput(f"balance: {missed:g} of {total:g} trips cannot be placed after {MOST_ROUNDS} rounds; expected ways where margins are")


def fit_deterrence(
    trips: np.ndarray, cost: np.ndarray, kind: Literal["exponential", "power"] = "exponential", constraint: Constraint = "both"
) -> Deterrence:
    """The deterrence under which observed trips `[zone, zone]` are likeliest, their margins kept. Raises BadInput.

    The likelihood of a multinomial or Poisson matrix is greatest where the modelled mean of g(c) over all trips is the observed one
    (Hyman 1969, The calibration of trip distribution models, eq. 12; Evans 1971), which has one solution.
    """
    trips = np.asarray(trips, float)
    production, attraction = trips.sum(axis=1), trips.sum(axis=0)
    production, attraction, cost = _zones(production, attraction, cost)
    if not (trips >= 0).all() or not trips.sum() > 0:
        raise BadInput("trips: expected values of 0 or more, some above 0")
    felt = Deterrence(kind).felt(cost)
    observed = float((trips * felt).sum() / trips.sum())
    span = float(np.ptp(felt))
    if not span > 0:
        raise BadInput(f"cost: expected ways of different cost to fit a deterrence, all cost {cost.flat[0]:g}")

    def too_far(beta: float) -> float:
        modelled = gravity(production, attraction, cost, Deterrence(kind, beta), constraint)
        return float((modelled * felt).sum() / trips.sum()) - observed

    low, high = -1 / span, 1 / span
    while too_far(high) > 0 and high * span < STEEPEST:
        high *= 2
    while too_far(low) < 0 and -low * span < STEEPEST:
        low *= 2
    if too_far(low) < 0 or too_far(high) > 0:
        raise BadInput("trips: no finite deterrence explains them; expected some trips on other than the cheapest ways")
    return Deterrence(kind, float(brentq(too_far, low, high, xtol=1e-10 / span, rtol=1e-10)))


def poisson_regression(features: np.ndarray, counts: np.ndarray, rounds: int = 100) -> np.ndarray:
    """Coefficients b of ln E[counts] = features b, likeliest for Poisson counts: gravity whose totals are not given.

    Newton's method, steps kept short. Source: Flowerdew & Aitkin (1982), A method of fitting the gravity model based on the Poisson
    distribution.

    Args:
      features: `[pair, feature]`, the first of them 1, so that coefficients of logarithms are exponents. counts: `[pair]`.
    """
    features, counts = np.asarray(features, float), np.asarray(counts, float)
    if not (np.isfinite(features).all() and np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise BadInput("poisson regression: expected finite features and counts of 0 or more, some above 0")
    spread = features.std(axis=0)
    coefficients = np.zeros(features.shape[1])
    coefficients[0] = np.log(counts.mean() / features[0, 0])
    for _ in range(rounds):
        expected = np.exp(np.clip(features @ coefficients, -30, 30))
        hessian = (features * expected[:, None]).T @ features
        hessian[np.diag_indices_from(hessian)] += 1e-9 * np.trace(hessian) / len(hessian)
        step = np.linalg.solve(hessian, features.T @ (counts - expected))
        coefficients += step * min(1.0, 2.0 / max(float(np.abs(step * np.maximum(spread, 1e-12)).max()), 1e-12))
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def _zones(production: np.ndarray, attraction: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As float arrays, checked."""
    parts = {"production": np.asarray(production, float), "attraction": np.asarray(attraction, float), "cost": np.asarray(cost, float)}
    zones = len(parts["production"])
    for name, shape in (("production", (zones,)), ("attraction", (zones,)), ("cost", (zones, zones))):
        values = parts[name]
        if values.shape != shape:
            raise BadInput(f"{name}: expected {list(shape)}, as production has {zones} zones, got {list(values.shape)}")
        wrong = np.argwhere(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            raise BadInput(f"{name} of zone {', '.join(map(str, wrong[0]))}: expected 0 or more, got {values[tuple(wrong[0])]}")
    return parts["production"], parts["attraction"], parts["cost"]


# ---------------------------------------------------------------- trip ends and hours of the day

PURPOSES = ("work", "school", "other")

# Ways from home to somewhere, a person a weekday; each is followed by its way back. Assumption: 2 x (0.42 + 0.16 + 0.95) is about the
# three trips a person a day that household travel surveys find, a quarter to a third of them to and from work.
TRIPS_A_PERSON: Mapping[str, float] = {"work": 0.42, "school": 0.16, "other": 0.95}
WEEKEND_FACTOR: Mapping[str, float] = {"work": 0.30, "school": 0.02, "other": 1.15}  # assumption


@dataclass(frozen=True)
class Peak:
    """Some departures about an hour of the day: Gaussian, closed over midnight.

    Attributes:
      hour: the middle, h. spread: standard deviation, h. weight: share of the departures.
    """

    hour: float
    spread: float
    weight: float

    def hours(self) -> np.ndarray:
        """Share of departures in each hour of the day, `[24]`, sum 1."""
        middle = np.arange(24) + 0.5
        apart = (middle - self.hour + 12) % 24 - 12
        shape = np.exp(-0.5 * (apart / self.spread) ** 2)
        return shape / shape.sum()


# Departures out and back. Assumption: shaped by eye after the two commuting peaks, the sharper one of schools and the broad one of errands
# that household travel surveys show; to be replaced by the local survey where there is one.
DEPARTURES: Mapping[Day, Mapping[str, tuple[tuple[Peak, ...], tuple[Peak, ...]]]] = {
    "weekday": {
        "work": ((Peak(7.3, 1.1, 0.80), Peak(13.0, 3.0, 0.20)), (Peak(16.8, 1.3, 0.75), Peak(13.0, 2.0, 0.13), Peak(21.5, 2.0, 0.12))),
        "school": ((Peak(7.8, 0.6, 0.90), Peak(12.0, 2.5, 0.10)), (Peak(14.8, 1.3, 0.85), Peak(18.0, 2.0, 0.15))),
        "other": ((Peak(10.5, 2.2, 0.50), Peak(16.5, 2.3, 0.50)), (Peak(11.8, 2.0, 0.42), Peak(18.5, 2.6, 0.58))),
    },
    "weekend": {
        "work": ((Peak(8.0, 1.8, 0.65), Peak(14.0, 3.0, 0.35)), (Peak(16.5, 2.5, 0.75), Peak(22.0, 2.0, 0.25))),
        "school": ((Peak(9.0, 1.0, 1.0),), (Peak(14.0, 2.0, 1.0),)),
        "other": ((Peak(11.5, 2.3, 0.62), Peak(17.0, 2.5, 0.38)), (Peak(13.5, 2.5, 0.45), Peak(18.8, 2.8, 0.55))),
    },
}


def departures(purpose: str, day: Day = "weekday") -> tuple[np.ndarray, np.ndarray]:
    """Share of the day's departures in each hour, out and back, `[24]` each, sum 1. Raises BadInput."""
    if day not in DEPARTURES:
        raise BadInput(f"day: expected {' or '.join(DEPARTURES)}, got {day!r}")
    if purpose not in DEPARTURES[day]:
        raise BadInput(f"purpose: expected one of {', '.join(DEPARTURES[day])}, got {purpose!r}")
    out, back = (sum((peak.weight * peak.hours() for peak in peaks), np.zeros(24)) for peaks in DEPARTURES[day][purpose])
    return out, back


def trip_ends(population: np.ndarray, jobs: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Production and attraction of each purpose on a weekday, `[zone]` each, ways out alone.

    Work is drawn by jobs, school by people, other errands by both alike; attraction is scaled to production by `gravity`.
    """
    population, jobs = np.asarray(population, float), np.asarray(jobs, float)
    draws = {"work": jobs, "school": population, "other": population / max(population.sum(), 1e-12) + jobs / max(jobs.sum(), 1e-12)}
    return {purpose: (TRIPS_A_PERSON[purpose] * population, draws[purpose]) for purpose in PURPOSES}


def hourly(trips_by_purpose: Mapping[str, np.ndarray], day: Day = "weekday") -> np.ndarray:
    """Trips that set out in each hour of a day, `[24, zone, zone]`, ways back included.

    Args:
      trips_by_purpose: purpose -> ways out on a weekday, from home, `[zone, zone]`.
    """
    if not trips_by_purpose:
        raise BadInput(f"trips: expected some of the purposes {', '.join(PURPOSES)}, got none")
    total = None
    for purpose, trips in trips_by_purpose.items():
        out, back = departures(purpose, day)
        trips = np.asarray(trips, float) * (WEEKEND_FACTOR[purpose] if day == "weekend" else 1.0)
        part = out[:, None, None] * trips + back[:, None, None] * trips.T
        total = part if total is None else total + part
    assert total is not None
    return total


# ---------------------------------------------------------------- from people to vehicles

# Persons in a car. Assumption, near the 1.1 to 1.2 to work and 1.4 to 1.7 otherwise that surveys find in Europe.
OCCUPANCY = 1.4
# Vehicle miles, 10^9, of cars, vans and lorries: UK Department for Transport, Road Traffic Estimates: Great Britain 2019.
VEHICLE_MILES: Mapping[str, float] = {"car": 278.2, "van": 55.5, "truck": 17.4}
CAR_AT_MOST, HALF_WAY = 0.88, 1800.0  # share of long ways within a city, and m at which half of it drives: assumptions


def car_share(distance: np.ndarray, at_most: float = CAR_AT_MOST, half_way: float = HALF_WAY) -> np.ndarray:
    """Share of trips by car, `[...]`, by distance in m: at_most d^2 / (d^2 + half_way^2), few on foot's ways, most on long ones.

    The S-shape is that of a binary logit in ln d; its two numbers are assumptions, to be replaced by the local survey.
    """
    squared = np.asarray(distance, float) ** 2
    return at_most * squared / (squared + half_way**2)


def vehicles(trips: np.ndarray, distance: np.ndarray, occupancy: float = OCCUPANCY, **share: float) -> dict[str, np.ndarray]:
    """Vehicles of each class, `[..., zone, zone]`, for person trips.

    Vans and trucks go where cars go, in the proportion of `VEHICLE_MILES`: goods have no matrix of their own here.

    Args:
      trips: person trips, `[..., zone, zone]`. distance: m, `[zone, zone]`. share: arguments of `car_share`.
    """
    cars = np.asarray(trips, float) * car_share(distance, **share) / occupancy
    return {name: cars * (miles / VEHICLE_MILES["car"]) for name, miles in VEHICLE_MILES.items()}


# ---------------------------------------------------------------- how alike two matrices are


def cpc(modelled: np.ndarray, observed: np.ndarray) -> float:
    """Common part of commuters, 2 sum min(T, O) / (sum T + sum O): 1 for equal matrices, 0 for disjoint ones.

    Source: Gargiulo et al. (2012), Commuting network models: getting the essentials; Lenormand et al. (2012), eq. 7.
    """
    modelled, observed = _pair(modelled, observed)
    total = modelled.sum() + observed.sum()
    return float(2 * np.minimum(modelled, observed).sum() / total) if total > 0 else 1.0


def nrmse(modelled: np.ndarray, observed: np.ndarray) -> float:
    """Root mean square error over the standard deviation of what was observed."""
    modelled, observed = _pair(modelled, observed)
    spread = observed.std()
    if not spread > 0:
        raise BadInput("nrmse: expected observed trips that differ, got one value everywhere")
    return float(np.sqrt(np.mean((modelled - observed) ** 2)) / spread)


def jsd(modelled: np.ndarray, observed: np.ndarray) -> float:
    """Jensen-Shannon divergence, bits, of where trips are, `[...]`, each normalised to sum 1: 0 for alike, 1 for disjoint (Lin 1991)."""
    modelled, observed = _pair(modelled, observed)
    if not (modelled.sum() > 0 and observed.sum() > 0):
        raise BadInput("jsd: expected trips in both matrices, got none in one")
    p, q = modelled / modelled.sum(), observed / observed.sum()
    middle = (p + q) / 2
    entropy: Callable[[np.ndarray], float] = lambda x: float(-(x[x > 0] * np.log2(x[x > 0])).sum())  # noqa: E731
    return max(entropy(middle) - (entropy(p) + entropy(q)) / 2, 0.0)


def _pair(modelled: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    modelled, observed = np.asarray(modelled, float), np.asarray(observed, float)
    if modelled.shape != observed.shape:
        raise BadInput(f"trips: expected two matrices of one shape, got {list(modelled.shape)} and {list(observed.shape)}")
    for name, values in (("modelled", modelled), ("observed", observed)):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise BadInput(f"{name} trips: expected finite values of 0 or more, got {values[~(np.isfinite(values) & (values >= 0))][0]}")
    return modelled, observed
