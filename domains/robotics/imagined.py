"""A trained world model in the simulator's place: what is played in a `tasks.Scene` can be played in it, and planned in.

It steps what is seen alone: there is no depth of contact, no energy, and one world only, that of its training.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from domains.robotics.dynamics import Dynamics
from domains.robotics.tasks import Played, Policy, Start
from twinsim.base import Array, BadInput, Statistics


class Model(Protocol):
    """What a world model can do, with one normalised observation `[channel]`; pure. `generators.world_model.WorldModel` is one."""

    def encode(self, seen: Array) -> Any: ...

    def step(self, latent: Any, action: Array) -> Any: ...

    def decode(self, latent: Any) -> Array: ...

    def predict(self, seen: Array, actions: Array) -> Any: ...


class ModelStepper:
    """Copies of the modelled world that step together; in the units of the task's channels.

    Args:
      assemble, params: the trained model and its parameters, as `twinsim.run.training` gives them.
    """

    def __init__(self, domain: Dynamics, statistics: Statistics, assemble: Callable[[Any], Model], params: Any) -> None:
        self.domain, self.task, self._params = domain, domain.task, params
        mean, scale = jnp.asarray(statistics["mean"]), jnp.asarray(statistics["scale"])
        moving = domain.moving

        def normalised(seen: Array) -> jax.Array:
            return (jnp.asarray(seen)[moving] - mean) / scale

        def physical(seen: Array, told: Array) -> jax.Array:
            return jnp.asarray(seen).at[moving].set(told * scale + mean)

        def begin(params: Any, seen: Array) -> Any:
            return assemble(params).encode(normalised(seen))

        def step(params: Any, latent: Any, seen: Array, action: Array) -> tuple[Any, jax.Array]:
            model = assemble(params)
            latent = model.step(latent, action)
            return latent, physical(seen, model.decode(latent))

        def unrolled(params: Any, seen: Array, actions: jax.Array) -> jax.Array:
            def advance(latent: Any, action: jax.Array) -> tuple[Any, jax.Array]:
                return step(params, latent, seen, action)

            return jax.lax.scan(advance, begin(params, seen), actions)[1]

        def predicted(params: Any, seen: Array, actions: Array) -> tuple[jax.Array, jax.Array]:
            told = assemble(params).predict(normalised(seen), actions)
            width = len(self.task.observation)
            apart = jax.vmap(lambda spread: jnp.zeros(width).at[moving].set(spread * scale))(told.spread)
            return jax.vmap(physical, (None, 0))(seen, told.mean), apart

        self._begin, self._step = jax.jit(jax.vmap(begin, (None, 0))), jax.jit(jax.vmap(step, (None, 0, 0, 0)))
        self._unrolled = jax.jit(jax.vmap(jax.vmap(unrolled, (None, None, 0)), (None, 0, 0)))
        self._predicted = jax.jit(jax.vmap(predicted, (None, 0, 0)))

    # ------------------------------------------------------------ step by step

    @property
    def count(self) -> int:
        return len(self.observation)

    def place(self, observation: np.ndarray) -> None:
        """Starts over from what is seen, `[count, channel]`."""
        self.observation = np.asarray(observation, np.float32)
        self._latent = self._begin(self._params, self.observation)

    def step(self, action: np.ndarray) -> None:
        """A control step with actions `[count, channel]`; `observation` then tells what is seen."""
        self._latent, seen = self._step(self._params, self._latent, self.observation, np.asarray(action, np.float32))
        self.observation = np.asarray(seen)

    # ------------------------------------------------------------ in the place of a scene

    def play(self, start: Start, world: np.ndarray, policy: Policy, frames: int | None = None) -> Played:
        """Episodes from the start on, as `tasks.Scene.play` has them. Raises BadInput for worlds other than the scene's own."""
        if not np.allclose(world, self.domain.scene.world()):
            raise BadInput(f"{self.domain.name}: expected the scene's own world, since the model has learnt no other")
        frames = self.task.frames if frames is None else frames
        self.place(self.domain.at_rest(start))
        seen, done = [self.observation], []
        for frame in range(frames):
            done.append(np.asarray(policy(frame, self.observation.astype(np.float64)), np.float32))
            self.step(done[-1])
            seen.append(self.observation)
        nothing = np.zeros((self.count, frames), np.float32)
        both = np.stack(seen[:-1], 1), seen[-1]
        return Played(*both, *both, np.stack(done, 1), nothing, nothing, nothing)

    def replay(self, start: Start, world: np.ndarray, action: np.ndarray) -> Played:
        """Episodes from the start on with given actions `[count, frame, channel]`."""
        return self.play(start, world, lambda frame, _: action[:, frame], action.shape[1])

    # ------------------------------------------------------------ many steps

    def imagine(self, state: object, seen: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """A `planning.Imagine`, from what is seen: the `state` of simulator and line is not known to the model."""
        return np.asarray(self._unrolled(self._params, np.asarray(seen, np.float32), np.asarray(actions, np.float32)))

    def predict(self, seen: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and disagreement of the members after each action, `[count, step, channel]`; actions are `[count, step, channel]`."""
        mean, spread = self._predicted(self._params, np.asarray(seen, np.float32), np.asarray(actions, np.float32))
        return np.asarray(mean), np.asarray(spread)


def trained(domain: Dynamics, model: Any) -> ModelStepper:
    """The stepper of what `twinsim.run.training` gives."""
    return ModelStepper(domain, model.statistics, model.assemble, model.params)
