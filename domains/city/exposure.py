"""How many people breathe what: population-weighted means, people above the EU's limits, and who gains and who loses.

Concentrations are annual (or any period's) means in ug/m3 at points, `[..., point]`; `people` lives at those points, `[point]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

from twinsim.base import Array, BadInput

# Annual means, ug/m3: EU Directive 2008/50/EC, in force till the end of 2029, and (EU) 2024/2881, from 2030 on; WHO guideline 2021.
LIMITS = {
    "NO2": {"EU 2010": 40.0, "EU 2030": 20.0, "WHO 2021": 10.0},
    "PM2.5": {"EU 2010": 25.0, "EU 2030": 10.0, "WHO 2021": 5.0},
    "PM10": {"EU 2010": 40.0, "EU 2030": 20.0, "WHO 2021": 15.0},
}


def period_mean(hourly: Array, hours: Array | None = None) -> jax.Array:
    """Mean over the first axis, `[hour, ...]` to `[...]`; `hours` says how many of the period each stands for, `[hour]`."""
    x = jnp.asarray(hourly)
    if hours is None:
        return jnp.mean(x, 0)
    weight = jnp.asarray(hours, x.dtype)
    return jnp.tensordot(weight / jnp.sum(weight), x, 1, precision="highest")


def population_mean(concentration: Array, people: Array) -> jax.Array:
    """Mean of what people breathe at home, ug/m3, `[...]`; 0 where nobody lives."""
    people = jnp.asarray(people, jnp.float32)
    total = jnp.dot(jnp.asarray(concentration, jnp.float32), people, precision="highest")
    return total / jnp.maximum(jnp.sum(people), 1e-12)


def people_above(concentration: Array, people: Array, limit: float, softness: float = 0.0) -> jax.Array:
    """People whose air is above a limit, `[...]`.

    Args:
      limit: ug/m3. softness: width, ug/m3, over which a person counts by degrees, for a gradient that is not 0; 0 counts heads.
    """
    excess = jnp.asarray(concentration, jnp.float32) - limit
    counts = jax.nn.sigmoid(excess / softness) if softness else (excess > 0).astype(jnp.float32)
    return jnp.dot(counts, jnp.asarray(people, jnp.float32), precision="highest")


def group_means(concentration: Array, people: Array, group: Array, groups: int) -> jax.Array:
    """Population-weighted mean of each group of points, as zones or income bands, `[..., group]`; 0 for one without people.

    Args:
      group: index of each point's group, 0 to groups - 1, `[point]`.
    """
    member = jax.nn.one_hot(jnp.asarray(group), groups, dtype=jnp.float32) * jnp.asarray(people, jnp.float32)[:, None]
    share = member / jnp.maximum(jnp.sum(member, 0, keepdims=True), 1e-12)
    return jnp.dot(jnp.asarray(concentration, jnp.float32), share, precision="highest")


def summary(means: dict[str, Array], people: Array) -> dict[str, float]:
    """The figures of a report: for NO2, PM2.5 and PM10 among `means` `[point]`, the mean people breathe and the people above each limit."""
    people = np.asarray(people, float)
    found = {}
    for name, x in means.items():
        if np.shape(x) != people.shape:
            raise BadInput(f"exposure: {name}: expected one mean for each of the {people.size} points with people, got shape {np.shape(x)}")
        found[f"{name}: population-weighted mean, ug/m3"] = float(population_mean(x, people))
        for limit, value in LIMITS.get(name, {}).items():
            found[f"{name}: people above {value:g} ug/m3 ({limit})"] = float(people_above(x, people, value))
    return found


def gains_and_losses(before: Array, after: Array, people: Array, least: float = 0.1) -> dict[str, float]:
    """People whose air gets better, worse, or by less than `least` ug/m3 neither; of means `[point]`."""
    change = np.asarray(after, float) - np.asarray(before, float)
    people = np.asarray(people, float)
    better, worse = people[change <= -least].sum(), people[change >= least].sum()
    return {"better": float(better), "worse": float(worse), "as before": float(people.sum() - better - worse)}


def people_at(receptors: np.ndarray, homes: np.ndarray, people: np.ndarray, farthest: float = np.inf) -> np.ndarray:
    """People of each home counted at its nearest receptor, `[receptor]`; homes farther than `farthest` m from any are left out.

    Args:
      receptors, homes: m, `[receptor, 2]`, `[home, 2]`. people: at each home, `[home]`.
    """
    if np.shape(homes) != (*np.shape(people), 2):
        raise BadInput(f"exposure: expected a place [home, 2] for each of the people [home], got {np.shape(homes)} and {np.shape(people)}")
    distance, nearest = cKDTree(receptors).query(homes)
    near = distance <= farthest
    return np.bincount(nearest[near], np.asarray(people, float)[near], len(receptors))
