"""Many copies of one MuJoCo model stepped together, by C MuJoCo or by MJX, behind one face.

C MuJoCo gives the same bits for any number of copies and threads; MJX is for accelerators and for gradients. The two drift apart within
a few steps of contact, so one episode and one figure of merit use one of them only.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from mujoco.batch import Batch

from twinsim.base import BadInput

CURRENT = int(mujoco.mjtStage.mjSTAGE_VEL)  # places, velocities and sensors then describe the new state, not the one before
MJX_FLAG = "--xla_cpu_use_fusion_emitters=false"  # without it MJX on CPU is up to thousands of times slower


class Stepper(Protocol):
    """`count` copies of a model that step together; arrays have a leading axis over the copies."""

    model: mujoco.MjModel

    @property
    def count(self) -> int: ...

    @property
    def position(self) -> np.ndarray:
        """Generalised positions, `[count, nq]`."""
        ...

    @property
    def velocity(self) -> np.ndarray:
        """Generalised velocities, `[count, nv]`."""
        ...

    def place(self, position: np.ndarray, velocity: np.ndarray | None = None) -> None:
        """Starts over from these, with everything else as the model has it."""
        ...

    def step(self, control: np.ndarray, steps: int) -> None:
        """Steps with `control` `[count, nu]` held."""
        ...


class CStepper:
    """C MuJoCo, by its batch interface.

    Args:
      fields: model fields of which every copy has its own, name -> `[count, ...]`; names as in `mujoco.batch.Batch.expand`.
      threads: 1 suits small models, whose copies step faster than threads meet.
    """

    def __init__(self, model: mujoco.MjModel, count: int, fields: Mapping[str, np.ndarray] | None = None, threads: int = 1) -> None:
        self.model = model
        self.count = count
        self._batch = Batch(model, nsim=count, nthread=threads)
        for name, values in (fields or {}).items():
            self._batch.expand(name)[:] = values
        if fields:
            self._batch.set_const()
        self._position, self._velocity = self._batch.bind("qpos"), self._batch.bind("qvel")
        self._control = self._batch.bind("ctrl") if model.nu else np.zeros((count, 0))
        self._read: dict[str, np.ndarray] = {}
        own = {"actuator_biasprm": model.actuator_biasprm[None], "actuator_forcerange": model.actuator_forcerange[None]} | dict(
            fields or {}
        )
        self._slope = own["actuator_biasprm"][:, :, 2]
        self._most = np.where(model.actuator_forcelimited, own["actuator_forcerange"][:, :, 1], np.inf)

    @property
    def position(self) -> np.ndarray:
        return self._position.copy()

    @property
    def velocity(self) -> np.ndarray:
        return self._velocity.copy()

    @property
    def state(self) -> np.ndarray:
        """All that decides what comes next, `[count, size]` float64."""
        return self._batch.state.copy()

    @state.setter
    def state(self, values: np.ndarray) -> None:
        self._batch.state[:] = values
        self._batch.forward(stage=CURRENT)

    def place(self, position: np.ndarray, velocity: np.ndarray | None = None) -> None:
        self._batch.reset(stage=int(mujoco.mjtStage.mjSTAGE_NONE))
        self._position[:] = position
        self._velocity[:] = 0.0 if velocity is None else velocity
        self._batch.forward(stage=CURRENT)

    def step(self, control: np.ndarray, steps: int) -> None:
        self._control[:] = control
        self._batch.step(nstep=steps, stage=CURRENT)

    def work(self, control: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps with `control` held; the work of the actuators, J, `[count]`, net and with all of it counted as positive.

        Actuators carry bodies whose weight the model compensates, too. The sum over steps of force times mean speed, exact to the
        first order of the time step.
        """
        self._control[:] = control
        began = self.velocity
        told = self._batch.rollout(steps, record=("actuator_force", "actuator_velocity", "qfrc_gravcomp", "qvel"))
        self._batch.forward(stage=CURRENT)
        ended = self.read("actuator_velocity")
        moved = np.concatenate([told["actuator_velocity"], ended[:, None]], 1)  # what follows from a state is that before the step ...
        turned = np.concatenate([began[:, None], told["qvel"]], 1)  # ... the state itself that after it
        applied = told["actuator_force"] + self._softer(told["actuator_force"], np.diff(moved, axis=1))
        power = [force * (speed[:, 1:] + speed[:, :-1]) / 2 for force, speed in ((applied, moved), (told["qfrc_gravcomp"], turned))]
        work = np.concatenate(power, 2) * self.model.opt.timestep
        return work.sum((1, 2)), np.abs(work).sum((1, 2))

    def _softer(self, force: np.ndarray, change: np.ndarray) -> np.ndarray:
        """What an implicit integrator adds to the actuators' forces `[count, step, nu]` for the change of speed within the step."""
        if self.model.opt.integrator not in (mujoco.mjtIntegrator.mjINT_IMPLICIT, mujoco.mjtIntegrator.mjINT_IMPLICITFAST):
            return np.zeros_like(force)
        slope, most = self._slope[:, None, :], self._most[:, None, :]
        return np.where(np.abs(force) < most, slope * change, 0.0)  # MuJoCo takes a clamped force as it is

    def read(self, name: str) -> np.ndarray:
        """What follows from the present state, `[count, ...]`, named as in MjData: "site_xpos", "sensordata", "energy" ..."""
        if name not in self._read:
            self._read[name] = self._batch.bind(name)
            self._batch.forward(stage=CURRENT)  # what is bound late is filled by the next call only
        return self._read[name].copy()


def flagged() -> bool:
    """Whether XLA was told what MJX needs on CPU; too late once JAX has started."""
    return MJX_FLAG in os.environ.get("XLA_FLAGS", "")


class MjxStepper:
    """MJX: the same on an accelerator, and differentiable through `advance`. On CPU it needs `MJX_FLAG` in XLA_FLAGS.

    Raises BadInput where MJX is not installed or, on CPU, the flag is not set.
    """

    def __init__(self, model: mujoco.MjModel, count: int) -> None:
        try:
            from mujoco import mjx
        except ImportError as error:
            raise BadInput("MJX: expected the package mujoco-mjx, which is not installed; pip install 'twinsim[robotics]'") from error
        if jax.default_backend() == "cpu" and not flagged():
            raise BadInput(
                f"MJX on CPU: expected {MJX_FLAG} in XLA_FLAGS before Python starts, got {os.environ.get('XLA_FLAGS', 'nothing')!r}"
            )
        self.model = model
        self.count = count
        self._mjx, self._on_device = mjx, mjx.put_model(model)
        self._data = jax.vmap(lambda _: mjx.make_data(model))(jnp.arange(count))
        self._advance = jax.jit(jax.vmap(self.advance, (0, 0, None)), static_argnums=2)

    def advance(self, data: Any, control: jax.Array, steps: int) -> Any:
        """`data` of one copy after `steps` steps with `control` held; differentiable."""
        held = data.replace(ctrl=control)
        return jax.lax.scan(lambda d, _: (self._mjx.step(self._on_device, d), None), held, None, length=steps)[0]

    @property
    def position(self) -> np.ndarray:
        return np.asarray(self._data.qpos, np.float64)

    @property
    def velocity(self) -> np.ndarray:
        return np.asarray(self._data.qvel, np.float64)

    def place(self, position: np.ndarray, velocity: np.ndarray | None = None) -> None:
        fresh = jax.vmap(lambda _: self._mjx.make_data(self.model))(jnp.arange(self.count))
        speed = jnp.zeros_like(fresh.qvel) if velocity is None else jnp.asarray(velocity, fresh.qvel.dtype)
        self._data = fresh.replace(qpos=jnp.asarray(position, fresh.qpos.dtype), qvel=speed)

    def step(self, control: np.ndarray, steps: int) -> None:
        self._data = self._advance(self._data, jnp.asarray(control, jnp.float32), steps)


def compiled(spec: "mujoco.MjSpec") -> mujoco.MjModel:
    """The model of a spec. Raises BadInput with MuJoCo's own sentence."""
    try:
        return spec.compile()
    except ValueError as error:
        raise BadInput(f"model {spec.modelname}: {str(error).splitlines()[0]}") from error


def names(model: mujoco.MjModel, kind: mujoco.mjtObj, count: int) -> Sequence[str]:
    """Names of a model's bodies, joints, ..., in order."""
    return [mujoco.mj_id2name(model, kind, index) or f"{kind.name.removeprefix('mjOBJ_').lower()} {index}" for index in range(count)]
