"""The least of a function over a box, from its values alone: CMA-ES, for simulations that have no gradient.

Source: Hansen (2016), "The CMA evolution strategy: a tutorial", arXiv 1604.00772v2; numbers in brackets are its equations, constants are
those of its table 1 with the negative weights left out (its figure 6, c_m = 1). The search runs without bounds in z, where
x = lower + (upper - lower) sin^2(pi z / 2): the box in mirror images of itself, smooth, where an optimum on the border is like one within.

  state = start(lower, upper, seed=0)
  while not settled(state):
      points = ask(state)                                        # [population, n]
      state = tell(state, np.array([f(x) for x in points]))
  state.best, state.least
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from twinsim.base import BadInput

SMALLEST = 1e-9  # of a side of the box: steps below it are the end


class State(NamedTuple):
    """Where a search stands.

    Attributes:
      lower, upper: the box, `[n]`, in the units of the problem. population: points asked for at a time.
      mean: of the next draws of z, `[n]`. sigma: size of their steps; 1 is about the width of the box. covariance: of the steps, `[n, n]`.
      path, path_sigma: evolution paths of the covariance and of the step size, `[n]`.
      generation: how often was told. seed: of all draws.
      best: the best point told, in the units of the problem, `[n]`; least: its value.
    """

    lower: np.ndarray
    upper: np.ndarray
    population: int
    mean: np.ndarray
    sigma: float
    covariance: np.ndarray
    path: np.ndarray
    path_sigma: np.ndarray
    generation: int
    seed: int
    best: np.ndarray
    least: float


def start(
    lower: Sequence[float] | np.ndarray,
    upper: Sequence[float] | np.ndarray,
    *,
    mean: Sequence[float] | np.ndarray | None = None,
    sigma: float = 0.25,
    population: int | None = None,
    seed: int = 0,
) -> State:
    """A search over a box, from `mean` (its middle where there is none) with steps of `sigma` of its sides. Raises BadInput."""
    low, high = np.asarray(lower, float), np.asarray(upper, float)
    if low.ndim != 1 or low.shape != high.shape or not len(low) or not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
        raise BadInput(f"search: expected a box whose lower bounds lie below the upper ones, got {lower} and {upper}")
    n = len(low)
    middle = (low + high) / 2 if mean is None else np.asarray(mean, float)
    if middle.shape != low.shape or not ((low <= middle) & (middle <= high)).all():
        raise BadInput(f"search: expected a start within the box {low} to {high}, got {middle}")
    size = 4 + int(3 * np.log(n)) if population is None else population  # (48)
    if size < 4 or not 0 < sigma <= 1:
        raise BadInput(f"search: expected a population of at least 4 and a sigma in (0, 1], got {size} and {sigma}")
    zero = np.zeros(n)
    place = 2 / np.pi * np.arcsin(np.sqrt((middle - low) / (high - low)))
    return State(low, high, size, place, float(sigma), np.eye(n), zero, zero, 0, seed, middle, np.inf)


def ask(state: State) -> np.ndarray:
    """Points to be judged, `[population, n]`, within the box; the same for the same state."""
    return _in_box(state, _drawn(state))


def tell(state: State, values: np.ndarray) -> State:
    """The search after the points that it asks for have been judged, `[population]`; what is not finite counts as worst."""
    n, population = len(state.mean), state.population
    judged = np.where(np.isfinite(values), values, np.inf)
    order = np.argsort(judged, kind="stable")
    mu = population // 2
    raw = np.log((population + 1) / 2) - np.log(np.arange(1, mu + 1))  # (49), those above 0
    weight = raw / raw.sum()
    mu_eff = 1 / (weight**2).sum()  # (8)
    c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # (55)
    d_sigma = 1 + 2 * max(0.0, np.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
    c_path = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)  # (56)
    c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)  # (57)
    c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))  # (58)
    expected = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # E |N(0, I)|

    drawn = _drawn(state)
    steps = (drawn[order[:mu]] - state.mean) / state.sigma
    step = weight @ steps  # (41)
    mean = state.mean + state.sigma * step  # (42)
    _, inverse_root = _roots(state.covariance)
    path_sigma = (1 - c_sigma) * state.path_sigma + np.sqrt(c_sigma * (2 - c_sigma) * mu_eff) * (inverse_root @ step)  # (43)
    length = np.linalg.norm(path_sigma)
    sigma = state.sigma * np.exp(min(1.0, c_sigma / d_sigma * (length / expected - 1)))  # (44)
    settled_in = np.sqrt(1 - (1 - c_sigma) ** (2 * (state.generation + 1)))
    goes_on = float(length / settled_in < (1.4 + 2 / (n + 1)) * expected)
    path = (1 - c_path) * state.path + goes_on * np.sqrt(c_path * (2 - c_path) * mu_eff) * step  # (45)
    kept = 1 - c_1 * (1 - (1 - goes_on) * c_path * (2 - c_path)) - c_mu  # (47)
    covariance = kept * state.covariance + c_1 * np.outer(path, path) + c_mu * (steps.T * weight) @ steps
    better = judged[order[0]] < state.least
    best, least = (_in_box(state, drawn[order[0]]), float(judged[order[0]])) if better else (state.best, state.least)
    return state._replace(
        mean=mean, sigma=min(float(sigma), 1.0), covariance=(covariance + covariance.T) / 2, path=path, path_sigma=path_sigma,
        generation=state.generation + 1, best=best, least=least,
    )  # fmt: skip


def centre(state: State) -> np.ndarray:
    """The mean of the next draws in the units of the problem, `[n]`: where values are noisy, a better answer than the best point."""
    return _in_box(state, state.mean)


def settled(state: State, smallest: float = SMALLEST) -> bool:
    """Whether steps have become smaller than `smallest` of the box in every direction."""
    return bool(state.sigma * np.sqrt(np.diag(state.covariance).max()) < smallest)


def minimise(
    function: Callable[[np.ndarray], float],
    search: State,
    *,
    evaluations: int,
    smallest: float = SMALLEST,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> State:
    """Asks and tells until the search has settled or `function` has been called `evaluations` times, if not a full generation more."""
    most = max(1, evaluations // search.population)
    for done in range(1, most + 1):
        points = ask(search)
        search = tell(search, np.array([function(point) for point in points]))
        progress(done, most)
        if settled(search, smallest):
            break
    return search


def _drawn(state: State) -> np.ndarray:
    """Draws of this generation, `[population, n]`, (38) to (40)."""
    normal = np.random.default_rng([state.seed, state.generation]).normal(size=(state.population, len(state.mean)))
    return state.mean + state.sigma * normal @ _roots(state.covariance)[0]


def _in_box(state: State, draws: np.ndarray) -> np.ndarray:
    """Draws of z, `[..., n]`, in the units of the problem."""
    return state.lower + (state.upper - state.lower) * np.sin(np.pi / 2 * draws) ** 2


def _roots(covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """C^(1/2) and C^(-1/2)."""
    values, vectors = np.linalg.eigh(covariance)
    scale = np.sqrt(np.maximum(values, 1e-20))
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
