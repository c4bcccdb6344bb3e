"""A small neural network for the trips between two zones, from what is known of either zone, of the region and of the way.

Trips are ln T_ij = ln people_i + F(zone i, zone j, region, pair ij): two layers read each zone beside the mean of its region, one as an
origin and one as a destination, and two more read both with the pair; gravity is the special case whose F is linear in logarithms. The
loss is what the common part of commuters counts, sum |T - O|, with a share of Poisson likelihood that keeps totals and small flows
honest; every region weighs the same.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twinsim.base import Array, BadInput

Parameters = Mapping[str, Any]
CLIP = 5.0  # standard deviations: a zone stranger than that is taken to be that strange
TOP = 12.0  # ln of the most trips of a pair


class Blocks(NamedTuple):
    """Rectangles of origins and destinations, each of one region; one of them without the leading axis.

    Attributes:
      origin, destination: of each zone, `[n, zone, feature]`, both of the same features.
      region: the mean of the features over all zones of the region, and then what is known of the region alone, `[n, known]`.
      pair: `[n, origin, destination, feature]`.
      people: of each origin, `[n, origin]`.
      within: 1 where there is an origin and a destination, 0 where the grid is filled up, `[n, origin, destination]`.
    """

    origin: Array
    destination: Array
    region: Array
    pair: Array
    people: Array
    within: Array


@dataclass(frozen=True)
class Fit:
    """How the network is fitted.

    Attributes:
      rounds: passes over the blocks. batch: blocks a step. rate: of learning, falls to 0 as a cosine.
      likelihood: weight of the Poisson likelihood beside the absolute error. dropout: of hidden values and of features.
      apart: c in the error |T - O| - c T: one less the common part that is expected. To make the ratio 1 - CPC = sum |T - O| / (sum T +
        sum O) least is to make its numerator less c times its denominator least, c the ratio itself (Dinkelbach 1967, On nonlinear
        fractional programming); plain absolute errors (c = 0) would have too few trips, as a median has.
      decay: of weights, decoupled (Loshchilov & Hutter 2019, AdamW).
      zone, hidden: widths of the layers for zones and for pairs.
      members: networks, each from its own start, whose mean is the estimate.
    """

    rounds: int = 30
    batch: int = 16
    rate: float = 3e-3
    likelihood: float = 0.1
    apart: float = 0.35
    dropout: float = 0.25
    decay: float = 1e-2
    zone: int = 48
    hidden: int = 32
    members: int = 1

    def __post_init__(self) -> None:
        if min(self.rounds, self.batch, self.zone, self.hidden, self.members) < 1 or not 0 <= self.dropout < 1 or not 0 <= self.apart < 1:
            raise BadInput(f"regression: expected sizes of at least 1 and shares of 0 to 1, got {self}")


def expected(parameters: Parameters, blocks: Blocks) -> jax.Array:
    """Trips of one block, `[origin, destination]`: the mean over the networks of an ensemble."""
    each = jax.vmap(lambda network: _trips(network, _standard(parameters["scales"], blocks)))(parameters["networks"])
    return each.mean(0)


def fit(blocks: Blocks, trips: np.ndarray, weight: np.ndarray, how: Fit, seed: int = 0) -> Parameters:
    """The network for observed trips `[n, origin, destination]`.

    Args:
      weight: of each block, `[n]`: one over all trips of its region, so that a region counts once however many blocks it has.
    """
    scales = _scales(blocks)
    networks = [_fit_one(_standard(scales, blocks), trips, weight, how, seed + 1000 * member) for member in range(how.members)]
    return {"scales": scales, "networks": jax.tree.map(lambda *leaves: np.stack(leaves), *networks)}


def _scales(blocks: Blocks) -> dict[str, dict[str, np.ndarray]]:
    """Mean and standard deviation of every feature, over what is within."""

    def of(values: Array, weight: Array) -> dict[str, np.ndarray]:
        flat, w = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1]), np.asarray(weight, np.float64).reshape(-1, 1)
        mean = (flat * w).sum(0) / w.sum()
        spread = np.sqrt(((flat - mean) ** 2 * w).sum(0) / w.sum())
        return {"mean": mean.astype(np.float32), "scale": np.where(spread > 1e-6, spread, 1).astype(np.float32)}

    within = np.asarray(blocks.within)
    features = np.shape(blocks.origin)[-1]
    return {
        "zone": of(blocks.origin, within.max(2)),
        "region": of(np.asarray(blocks.region)[:, features:], np.ones(len(within))),
        "pair": of(blocks.pair, within),
    }


def _standard(scales: Mapping[str, Any], blocks: Blocks) -> Blocks:
    """Features in standard deviations; works on one block and on many."""

    def of(values: Array, name: str) -> jax.Array:
        scale = scales[name]
        shape = (1,) * (jnp.ndim(values) - 1) + (-1,)
        z = (jnp.asarray(values) - jnp.reshape(scale["mean"], shape)) / jnp.reshape(scale["scale"], shape)
        return jnp.clip(z, -CLIP, CLIP)

    features = jnp.shape(blocks.origin)[-1]
    region = jnp.concatenate([of(blocks.region[..., :features], "zone"), of(blocks.region[..., features:], "region")], -1)
    return blocks._replace(
        origin=of(blocks.origin, "zone"), destination=of(blocks.destination, "zone"), region=region, pair=of(blocks.pair, "pair")
    )


def _trips(p: Mapping[str, Array], blocks: Blocks, key: Array | None = None, dropout: float = 0.0) -> jax.Array:
    """Trips of one block of standardised features, by one network; a key drops features and hidden values."""
    features = blocks.origin.shape[-1]
    keys = jax.random.split(key, 4) if key is not None else (None,) * 4
    mean, known = blocks.region[:features], blocks.region[features:]
    kept = _dropped(jnp.ones(features), dropout / 2, keys[0])

    def hidden(zones: Array, which: str, key: Array | None) -> jax.Array:
        beside = jnp.broadcast_to(jnp.concatenate([mean * kept, known]), (len(zones), len(blocks.region)))
        x = jnp.concatenate([zones * kept[None], (zones - mean[None]) * kept[None], beside], -1)
        h = _dropped(jax.nn.silu(x @ p[f"{which}1"] + p[f"{which}1 bias"][None]), dropout, key)
        return jax.nn.silu(h @ p[f"{which}2"] + p[f"{which}2 bias"][None])

    i, j = hidden(blocks.origin, "origin", keys[1]), hidden(blocks.destination, "destination", keys[2])
    both = (i @ p["from"])[:, None, :] + (j @ p["to"])[None, :, :] + blocks.pair @ p["pair"] + p["pair bias"][None, None]
    both = _dropped(jax.nn.silu(both), dropout / 4, keys[3])
    both = jax.nn.silu(both @ p["both"] + p["both bias"][None, None])
    log = (both @ p["out"]) + (blocks.pair @ p["gravity"]) + (i @ p["leave"])[:, None] + (j @ p["draw"])[None, :] + p["level"]
    log = log + jnp.log1p(jnp.asarray(blocks.people))[:, None]
    return jnp.exp(jnp.minimum(log, TOP)) * blocks.within


def _dropped(x: jax.Array, share: float, key: Array | None) -> jax.Array:
    if key is None or share == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), jnp.zeros_like(x))


def _start(blocks: Blocks, trips: np.ndarray, how: Fit, seed: int) -> dict[str, jax.Array]:
    """Random hidden layers whose output is silent: at first every origin's people go everywhere alike."""
    features, known, pairs = blocks.origin.shape[-1], blocks.region.shape[-1], blocks.pair.shape[-1]
    sizes = {"origin1": (2 * features + known, how.zone), "origin2": (how.zone, how.zone)}
    sizes |= {"destination1": sizes["origin1"], "destination2": sizes["origin2"]}
    sizes |= {"from": (how.zone, how.hidden), "to": (how.zone, how.hidden), "pair": (pairs, how.hidden), "both": (how.hidden, how.hidden)}
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    p = {name: jax.random.normal(key, size) / np.float32(np.sqrt(size[0])) for key, (name, size) in zip(keys, sizes.items(), strict=True)}
    for name in ("origin1", "origin2", "destination1", "destination2", "pair", "both"):
        p[f"{name} bias"] = jnp.zeros(sizes[name][1])
    everywhere = float(
        (np.log1p(np.asarray(blocks.people))[:, :, None] * np.asarray(blocks.within)).sum() / np.asarray(blocks.within).sum()
    )
    level = np.log(max(float(np.sum(trips)) / float(np.asarray(blocks.within).sum()), 1e-6)) - everywhere
    return p | {
        "out": jnp.zeros(how.hidden), "gravity": jnp.zeros(pairs), "leave": jnp.zeros(how.zone), "draw": jnp.zeros(how.zone),
        "level": jnp.asarray(level, jnp.float32),
    }  # fmt: skip


def _fit_one(blocks: Blocks, trips: np.ndarray, weight: np.ndarray, how: Fit, seed: int) -> dict[str, np.ndarray]:
    data = jax.tree.map(np.asarray, blocks)
    trips, weight = np.asarray(trips, np.float32), np.asarray(weight, np.float32)
    count = len(trips)
    batch = min(how.batch, count)
    steps = how.rounds * (count // batch)
    regions = max(float((trips.sum((1, 2)) * weight).sum()), 1e-12)
    weight = weight * np.float32(count / regions)  # the loss is of order one, however many blocks a region has
    p = _start(blocks, trips, how, seed)
    m = v = jax.tree.map(jnp.zeros_like, p)
    random, key = np.random.default_rng(seed), jax.random.key(seed + 1)
    order = np.concatenate([random.permutation(count)[: count // batch * batch] for _ in range(how.rounds)]).reshape(steps, batch)
    for number, rows in enumerate(order):
        chosen = (jax.tree.map(lambda x, rows=rows: x[rows], data), trips[rows], weight[rows])
        rate = how.rate * 0.5 * (1 + np.cos(np.pi * number / steps))
        p, m, v = _step(how, p, m, v, np.float32(number), np.float32(rate), chosen, jax.random.fold_in(key, number))
    return jax.tree.map(np.asarray, p)


def _loss(how: Fit, p: Mapping[str, Array], block: Blocks, trips: Array, weight: Array, key: Array) -> Array:
    """Of one block: the errors that the common part counts, and a share of the Poisson likelihood."""
    modelled = _trips(p, block, key, how.dropout)
    absolute = jnp.sum(jnp.abs(modelled - trips) - how.apart * modelled) / 2
    poisson = jnp.sum(jnp.where(block.within > 0, modelled - trips * jnp.log(modelled + 1e-6), 0.0))
    return weight * (absolute + how.likelihood * poisson)


@functools.partial(jax.jit, static_argnums=0)
def _step(how: Fit, p: dict, m: dict, v: dict, number: Array, rate: Array, rows: tuple, key: Array) -> tuple[dict, dict, dict]:
    """One step of AdamW (Loshchilov & Hutter 2019), the gradient no longer than 1; biases and single weights do not decay."""

    blocks, trips, weight = rows

    def mean_loss(p: dict) -> Array:
        each = jax.vmap(functools.partial(_loss, how), (None, 0, 0, 0, 0))
        return jnp.mean(each(p, blocks, trips, weight, jax.random.split(key, len(weight))))

    gradient = jax.grad(mean_loss)(p)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradient)))
    gradient = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), gradient)
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, gradient)
    v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * jnp.square(g), v, gradient)
    first, second = 1 - 0.9 ** (number + 1), 1 - 0.99 ** (number + 1)

    def moved(p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        shrunk = p * (1 - rate * how.decay) if p.ndim > 1 else p
        return shrunk - rate * (m / first) / (jnp.sqrt(v / second) + 1e-8)

    return jax.tree.map(moved, p, m, v), m, v
