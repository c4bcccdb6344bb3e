"""The search without gradients finds optima that are known, on slopes, in curved valleys and at the border of its box."""

import numpy as np
import pytest

from domains.robotics import cmaes
from twinsim.base import BadInput

HERE = np.array([0.3, -1.0, 2.0, 0.5, -0.2])


def sphere(x: np.ndarray) -> float:
    return float(((x - HERE[: len(x)]) ** 2).sum())


def ellipsoid(x: np.ndarray) -> float:
    """Axes from 1 to 1000, turned by a fixed rotation."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(len(x), len(x))))[0]
    return float((np.geomspace(1, 1e6, len(x)) * (turn @ (x - HERE[: len(x)])) ** 2).sum())


def rosenbrock(x: np.ndarray) -> float:
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


@pytest.mark.parametrize(
    ("function", "optimum", "evaluations"),
    [(sphere, HERE, 2000), (ellipsoid, HERE, 5000), (rosenbrock, np.ones(3), 6000)],
)
def test_known_optimum_is_found(function, optimum, evaluations):
    search = cmaes.start([-5.0] * len(optimum), [5.0] * len(optimum), mean=[-2.0] * len(optimum), seed=3)
    found = cmaes.minimise(function, search, evaluations=evaluations)
    np.testing.assert_allclose(found.best, optimum, atol=1e-6)  # the box is 10 wide, steps end at 1e-9 of it
    assert found.least == function(found.best)


def test_steps_follow_the_scale_of_the_box_not_of_the_units():
    wide = cmaes.minimise(lambda x: sphere(x * 1e-6), cmaes.start([-5e6] * 2, [5e6] * 2), evaluations=300)
    unit = cmaes.minimise(sphere, cmaes.start([-5.0] * 2, [5.0] * 2), evaluations=300)
    np.testing.assert_allclose(wide.best / 1e6, unit.best, rtol=1e-6)


def test_optimum_on_the_border_is_reached_and_no_point_lies_beyond():
    search = cmaes.start([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    for _ in range(100):
        points = cmaes.ask(search)
        assert points.shape == (search.population, 3) and (points >= 0).all() and (points <= 1).all()
        search = cmaes.tell(search, np.array([sphere(point) for point in points]))  # least at (0.3, -1, 2): beyond
    np.testing.assert_allclose(search.best, [0.3, 0.0, 1.0], atol=1e-3)


def test_same_seed_draws_the_same_points_and_nothing_finite_counts_as_worst():
    one, two, other = (cmaes.start([-1.0] * 3, [1.0] * 3, seed=seed) for seed in (1, 1, 2))
    assert (cmaes.ask(one) == cmaes.ask(two)).all() and (cmaes.ask(one) != cmaes.ask(other)).any()
    holes = cmaes.minimise(lambda x: sphere(x) if x[0] > 0 else float("nan"), one, evaluations=600)
    np.testing.assert_allclose(holes.best[0], 0.3, atol=1e-2)


@pytest.mark.parametrize(
    "wrong",
    [{"lower": [0.0, 1.0], "upper": [1.0, 1.0]}, {"lower": [0.0], "upper": [1.0], "mean": [2.0]}, {"lower": [0], "upper": [1], "sigma": 0}],
)
def test_box_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(BadInput, match="search: expected"):
        cmaes.start(**wrong)
