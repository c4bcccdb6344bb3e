"""The weather that disperses what traffic emits: some types of it, how often each comes by part of the day, what a road adds in each.

A day has one wind direction, which turns a little from part to part, and a stability that goes with the hour. Concentrations are linear
in emissions, so that what a unit of emission of each road adds at each receptor is computed once a type and kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from domains.city import dispersion
from domains.city.dispersion import Heights
from domains.city.network import courses
from domains.city.place import Place
from twinsim.base import BadInput

DIRECTIONS = 12
BLOCK = 128  # roads that are computed together
SHIFT = 0.25  # probability that the wind has turned by one sector, to either side, from the day's own


@dataclass(frozen=True)
class Stability:
    """A state of the air near the ground.

    Attributes:
      wind: m/s at 10 m. heat_flux: W/m2, upwards. mixing_height: m.
      often: how often it comes in each period of the day, relative to the other states, `[period]`; times `wet` on wet days.
    """

    wind: float
    heat_flux: float
    mixing_height: float
    often: Sequence[float]
    wet: float = 1.0


# A temperate, half-maritime climate, by periods morning, day, evening, night. Assumed: no station's record.
STABILITIES = (
    Stability(5.5, 10.0, 1000.0, (0.35, 0.40, 0.35, 0.30), wet=2.0),  # windy, near neutral
    Stability(2.5, 20.0, 600.0, (0.35, 0.15, 0.30, 0.15)),
    Stability(2.5, 150.0, 1200.0, (0.05, 0.45, 0.15, 0.0), wet=0.3),  # sunny
    Stability(1.5, -15.0, 150.0, (0.25, 0.0, 0.20, 0.55), wet=0.3),  # clear night, light wind
)
ROSE = (7, 6, 6, 5, 5, 7, 11, 15, 14, 10, 8, 6)  # % of days by where the wind comes from, north first, clockwise; assumed, south-west


@dataclass(frozen=True)
class Background:
    """The air that comes into the city, ug/m3, NOx as NO2, the same at all hours. Assumed: of the order of European urban background."""

    nox: float = 14.0
    no2: float = 11.0
    o3: float = 55.0
    pm25: float = 8.0
    pm10: float = 14.0


@dataclass(frozen=True, eq=False)
class Winds:
    """The weather of a place.

    Attributes:
      rose: how often the wind comes from each of `DIRECTIONS` sectors, north first.
      roughness: z0, m. photolysis: J of NO2 in each period, 1/s, 0 at night.
    """

    place: Place
    rose: Sequence[float] = ROSE
    stabilities: Sequence[Stability] = STABILITIES
    roughness: float = 0.6
    photolysis: Sequence[float] = (3e-3, 6e-3, 3e-3, 0.0)

    def __post_init__(self) -> None:
        if len(self.rose) != DIRECTIONS or min(self.rose) < 0 or not sum(self.rose) > 0:
            raise BadInput(f"winds: expected a rose of {DIRECTIONS} frequencies of 0 or more, got {list(self.rose)}")

    @property
    def types(self) -> int:
        """How many types there are: a direction and a stability each, the stability running faster."""
        return DIRECTIONS * len(self.stabilities)

    def draw(self, key: jax.Array, wet: jax.Array) -> jax.Array:
        """The type of weather in each period of one day, `[period]`; `wet` is whether it rains."""
        of_day, of_shift, of_state = jax.random.split(key, 3)
        often = np.array([state.often for state in self.stabilities], np.float32).T  # [period, state]
        on_wet = np.array([state.wet for state in self.stabilities], np.float32)
        weight = jnp.where(wet, often * on_wet[None], often)
        periods = len(often)
        day = jax.random.categorical(of_day, jnp.log(jnp.asarray(self.rose, jnp.float32) + 1e-9))
        turns = jax.random.categorical(of_shift, jnp.log(jnp.array([SHIFT, 1 - 2 * SHIFT, SHIFT], jnp.float32)), shape=(periods,)) - 1
        state = jax.random.categorical(of_state, jnp.log(weight + 1e-9))
        return ((day + turns) % DIRECTIONS) * len(self.stabilities) + state

    @cached_property
    def unit(self) -> np.ndarray:
        """What 1 g/(m s) of each road adds at each receptor in each type of weather, s/m2 (g/m3 of it), `[type, receptor, road]`.

        A road's whole emission, by its length, lies evenly along its course, however roughly that is drawn.
        """
        states = [state for _ in range(DIRECTIONS) for state in self.stabilities]
        direction = np.repeat(np.arange(DIRECTIONS) * 360.0 / DIRECTIONS, len(self.stabilities))
        network, roads = self.place.network, self.place.roads
        start, end, owner = courses(network, roads)
        drawn = np.bincount(owner, np.maximum(np.hypot(*(end - start).T), 1e-3), len(roads))
        strength = (network.length[roads] / drawn)[owner]
        borders = np.searchsorted(owner, np.arange(0, len(roads) + BLOCK, BLOCK))
        most = np.diff(borders).max()  # all blocks are filled up to it, so that they are compiled once
        unit = np.empty((self.types, len(self.place.receptors), len(roads)), np.float32)
        with jax.ensure_compile_time_eval():  # it may be asked for first while a draw is traced
            for chosen in np.array_split(np.arange(self.types), DIRECTIONS):
                weather = dispersion.surface_layer(
                    np.array([states[i].wind for i in chosen]), direction[chosen], np.array([states[i].heat_flux for i in chosen]),
                    np.array([states[i].mixing_height for i in chosen]), np.full(len(chosen), self.roughness), np.full(len(chosen), 10.0),
                )  # fmt: skip
                for block, first in enumerate(range(0, len(roads), BLOCK)):
                    pieces = np.minimum(borders[block] + np.arange(most), borders[block + 1] - 1)
                    count = borders[block + 1] - borders[block]
                    each = np.zeros((BLOCK, most), np.float32)
                    each[owner[pieces[:count]] - first, np.arange(count)] = strength[pieces[:count]]
                    emission = np.broadcast_to(each, (len(chosen), *each.shape))
                    found = dispersion.concentration(start[pieces], end[pieces], self.place.receptors, emission, weather, Heights())
                    unit[chosen, :, first : first + BLOCK] = np.asarray(found).transpose(0, 2, 1)[..., : len(roads) - first]
        return unit
