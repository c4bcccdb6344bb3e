"""A day's traffic: trips of each part of the day settle into equilibria, before and after a change, and demand answers to what it costs.

On the host, in float64, by `equilibrium.equilibria`: every draw by itself, so that its numbers do not depend on which others are computed
with it. The response of demand is a pivot-point logit (Kumar 1980; Ben-Akiva & Lerman 1985, ch. 5): with s the share of trips that go by
car and dc the change of a trip's cost, the new share is s exp(-l dc) / (s exp(-l dc) + 1 - s). Its elasticity at cost c is -l c (1 - s).
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np

from domains.city import equilibrium
from domains.city.interventions import MEETS, City
from domains.city.network import Network
from domains.city.place import stopped

ROUNDS = 3  # of traffic and demand in turn after a change


@dataclass(frozen=True)
class Response:
    """How demand answers to cost.

    Attributes:
      sensitivity: l, 1/s; 0 for none. With 4e-4 a trip of 15 min in a city where 55 % drive has an elasticity of -0.16, the order of the
        short-run elasticity of car trips to time (Goodwin 1996, Transportation 23, 35: -0.27 short-run; the lower figure is an assumption).
      car_share: s, 0-1, an assumption.
    """

    sensitivity: float = 4e-4
    car_share: float = 0.55

    def __call__(self, change: np.ndarray) -> np.ndarray:
        """Car trips, times those before, for a change of cost in s."""
        pull = self.car_share * np.exp(np.clip(-self.sensitivity * change, -50, 50))
        return pull / (pull + 1 - self.car_share) / self.car_share


@dataclass(frozen=True)
class Traffic:
    """Before ([0]) and after ([1]) a change.

    Attributes:
      flow: veh/h by class of users, `[case, period, user, link]`. time: s, `[case, period, link]`.
      cost: time and charges of a trip from each zone, s, mean over its trips, `[case, zone]`.
      trips: vehicles that leave each zone in a day, `[case, zone]`.
      gap: relative gap of the worst period, `[case]`. unsettled: change of all trips in the last round, relative, `[case]`.
    """

    flow: np.ndarray
    time: np.ndarray
    cost: np.ndarray
    trips: np.ndarray
    gap: np.ndarray
    unsettled: np.ndarray


def day(
    network: Network,
    delay: np.ndarray,
    trips: np.ndarray,
    hours: np.ndarray,
    city: City,
    response: Response,
    gap: float = 1e-5,
) -> Traffic:
    """The traffic of a day before and after a change.

    Args:
      delay: at the end of each link, s, `[link]`.
      trips: vehicles of each period, `[period, zone, zone]`. hours: that each period has, `[period]`.
      city: before and after, host arrays `[case, ...]`.
    """
    free_speed, capacity, charge = (np.asarray(part, float) for part in (city.free_speed, city.capacity, city.charge))
    wanted = trips[None, :, None] * np.asarray(city.trips)[:, None]
    wanted[:, :, MEETS] += city.extra
    wanted = np.maximum(wanted, 0.0) / hours[:, None, None, None]  # veh/h, [case, period, user, zone, zone]
    found, settled, unsettled = [], [], np.zeros(len(wanted))
    before: np.ndarray | None = None
    for case in range(len(wanted)):
        there = replace(network, free_speed=free_speed[case], capacity=np.maximum(capacity[case], 1.0))
        there = stopped(there, delay)
        prices = np.broadcast_to(charge[case], (len(hours), *charge[case].shape))
        closed = np.broadcast_to(capacity[case] <= 0, (len(hours), network.links))
        demand = wanted[case]
        for again in range(ROUNDS if before is not None and response.sensitivity else 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a gap that is missed stands in the result, where it is checked
                at = equilibrium.equilibria(there, demand, gap, toll=prices, closed=closed)
            cost = np.stack([one.cost for one in at])
            if before is None or not response.sensitivity or again == ROUNDS - 1:
                break
            answer = wanted[case] * response(np.where(np.isfinite(cost), cost, 0.0) - before)
            answer = answer if again == 0 else (answer + demand) / 2
            unsettled[case] = np.abs(answer - demand).sum() / max(demand.sum(), 1e-12) if again == ROUNDS - 2 else 0.0
            demand = answer
        if before is None:
            before = np.where(np.isfinite(cost), cost, 0.0)
        found.append(at)
        settled.append((demand, cost))
    vehicles = [demand * hours[:, None, None, None] for demand, _ in settled]
    paid = [
        (v * np.where(np.isfinite(cost), cost, 0.0)).sum((0, 1, 3)) / np.maximum(v.sum((0, 1, 3)), 1e-12)
        for v, (_, cost) in zip(vehicles, settled, strict=True)
    ]
    return Traffic(
        flow=np.array([[one.user_flow for one in at] for at in found]),
        time=np.array([[one.time for one in at] for at in found]),
        cost=np.array(paid),
        trips=np.array([v.sum((0, 1, 3)) for v in vehicles]),
        gap=np.array([max(one.gap for one in at) for at in found]),
        unsettled=unsettled,
    )
