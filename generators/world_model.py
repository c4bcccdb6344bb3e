"""A world model: learns how what is seen changes when something is done, and then steps as a simulator does.

An example is a stretch of motion: the target is what is seen after each step, `[step, channel]`; the fields are what is done,
`[step, action]`; the scalars are what is seen before, `[channel]`, and then what stays, `[context]`. The latent state is what is seen and
beside it a hidden code that an encoder reads off it; several networks, which differ by their first values alone, predict how both move on.

Sources: open-loop training over several steps with a consistent latent, and SimNorm, from Hansen et al. (2024), "TD-MPC2"; ensembles from
Lakshminarayanan et al. (2017), "Deep ensembles", and Chua et al. (2018), "PETS", whose TS-infinity is how a draw keeps to its member.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from twinsim.base import Array as AnyArray
from twinsim.base import BadInput, Constraint, Example, Spec
from twinsim.mesh import Rules

RULES: Rules = ((r"kernel$", P("fsdp", "model")),)
GROUP = 8  # hidden numbers that sum to one, as in TD-MPC2
FAN_IN = nnx.initializers.lecun_normal()


# ---------------------------------------------------------------- what is known beforehand


class View(Protocol):
    """What is known of a system before anything is learnt: in which frame its motions look alike, and what cannot move by itself.

    Pure functions of one normalised observation `[channel]` and one action `[action]`; hashable.
    """

    def features(self, seen: Array, action: Array) -> Array:
        """What decides the motion, of order one, `[feature]`."""
        ...

    def moved(self, seen: Array, action: Array, motion: Array) -> Array:
        """What is seen after a motion `[motion]`, as the network tells it, of order one."""
        ...

    def motions(self, channels: int) -> int:
        """How many numbers a motion has."""
        ...


@dataclass(frozen=True)
class Plain:
    """Nothing is known: the network sees everything and tells the differences, in `scale` standard deviations."""

    scale: float = 0.1

    def features(self, seen: Array, action: Array) -> Array:
        return jnp.concatenate([seen, action])

    def moved(self, seen: Array, action: Array, motion: Array) -> Array:
        return seen + self.scale * motion

    def motions(self, channels: int) -> int:
        return channels


# ---------------------------------------------------------------- the model


class Latent(NamedTuple):
    """A state of the model: what is seen, normalised, `[channel]`, the hidden code `[hidden]`, and what stays, `[context]`."""

    seen: Array
    hidden: Array
    context: Array


class Prediction(NamedTuple):
    """What is expected after each action.

    Attributes:
      mean, spread: over the members, `[step, channel]`; the spread, a standard deviation, is how much they disagree.
      members: each one's own, `[member, step, channel]`.
    """

    mean: Array
    spread: Array
    members: Array


class WorldModel(nnx.Module):
    """An ensemble of latent dynamics.

    Attributes:
      spec: the shape of an example; a grid of rank 1, the steps.
      net: the networks, `net(inputs, outputs, members, rngs=...)`.
      view: what is known beforehand.
      hidden: numbers of the hidden code, a multiple of 8; 0 where what is seen is the whole state.
      unroll: steps predicted open loop in training, from a random step of the example on.
      discount: weight of each step's error, relative to the one before.
      tolerance: error below which the loss is square and above which it is linear, in standard deviations.
      consistency: weight of the distance of the hidden code from what the encoder reads off the truth.
      precision, remat: of the networks in training, in place of their own; parameters, states and loss stay float32.
    """

    rules = RULES

    def __init__(
        self,
        spec: Spec,
        net: Callable[..., "Ensemble"],
        view: View | None = None,
        members: int = 3,
        hidden: int = 0,
        unroll: int = 8,
        discount: float = 0.98,
        tolerance: float = 0.02,
        consistency: float = 1.0,
        *,
        rngs: nnx.Rngs,
        precision: str | None = None,
        remat: bool | None = None,
    ):
        if len(spec.grid) != 1 or spec.fields < 1 or spec.scalars < spec.channels:
            raise BadInput(
                "world model: expected steps of one axis, actions as fields and what is seen before among the scalars,"
                f" got a grid {tuple(spec.grid)}, {spec.fields} fields, and {spec.scalars} scalars for {spec.channels} channels"
            )
        if members < 1 or unroll < 1 or hidden < 0 or hidden % GROUP or not 0 < discount <= 1 or not tolerance > 0:
            raise BadInput(
                f"world model: expected members and unroll of at least 1, hidden a multiple of {GROUP}, discount in (0, 1]"
                f" and tolerance > 0, got {members}, {unroll}, {hidden}, {discount} and {tolerance}"
            )
        self.spec, self.view, self.hidden = spec, Plain() if view is None else view, hidden
        self.unroll, self.discount, self.tolerance, self.consistency = min(unroll, spec.grid[0]), discount, tolerance, consistency
        self.remat = bool(remat)
        computing = {} if precision is None else {"dtype": precision}
        seen, action = jnp.zeros(spec.channels), jnp.zeros(spec.fields)
        (features,) = jax.eval_shape(self.view.features, seen, action).shape
        inputs = features + hidden + spec.scalars - spec.channels
        self.net = net(inputs, self.view.motions(spec.channels) + hidden, members, rngs=rngs, **computing)
        self.encoder = net(features, hidden, 1, rngs=rngs, **computing) if hidden else None

    # ------------------------------------------------------------ one state

    def encode(self, seen: AnyArray, context: AnyArray | None = None) -> Latent:
        """The state in which `seen`, normalised, is seen."""
        seen = jnp.asarray(seen)
        context = jnp.zeros(self.spec.scalars - self.spec.channels) if context is None else jnp.asarray(context)
        if self.encoder is None:
            return Latent(seen, jnp.zeros(0), context)
        code = self.encoder(self.view.features(seen, jnp.zeros(self.spec.fields))[None])[0]
        return Latent(seen, simnorm(code), context)

    def decode(self, latent: Latent) -> Array:
        """What is seen in a state, normalised."""
        return latent.seen

    def step(self, latent: Latent, action: Array) -> Latent:
        """The next state, the mean of what the members expect."""
        after = self._each(self._apart(latent), action)
        return Latent(after.seen.mean(0), after.hidden.mean(0), latent.context)

    def _apart(self, latent: Latent) -> Latent:
        """The same state for each member, `[member, ...]`."""
        return Latent(*(jnp.repeat(part[None], self.net.members, 0) for part in latent))

    def _each(self, latent: Latent, action: Array) -> Latent:
        """The next state of each member from its own, `[member, ...]`."""
        features = jax.vmap(self.view.features, (0, None))(latent.seen, action)
        out = self.net(jnp.concatenate([features, latent.hidden, latent.context], -1))
        motion, code = out[:, : out.shape[1] - self.hidden], out[:, out.shape[1] - self.hidden :]
        moved = jax.vmap(self.view.moved, (0, None, 0))(latent.seen, action, motion)
        return Latent(moved, simnorm(code) if self.hidden else latent.hidden, latent.context)

    # ------------------------------------------------------------ many steps

    def rollout(self, latent: Latent, actions: AnyArray) -> Latent:
        """Each member's states after each action when nothing is seen in between, `[step, member, ...]`."""

        def advance(state: Latent, action: Array) -> tuple[Latent, Latent]:
            after = self._each(state, action)
            return after, after

        return lax.scan(jax.checkpoint(advance) if self.remat else advance, self._apart(latent), jnp.asarray(actions))[1]

    def predict(self, seen: AnyArray, actions: AnyArray, context: AnyArray | None = None) -> Prediction:
        """What is expected after each of the actions `[step, action]` from where `seen` is seen; all normalised."""
        members = jnp.swapaxes(self.rollout(self.encode(seen, context), actions).seen, 0, 1)
        return Prediction(members.mean(0), members.std(0), members)

    # ------------------------------------------------------------ as a generator

    def loss(self, example: Example, key: Array) -> Array:
        """The open-loop error of `unroll` steps from a random step of the example on, the mean over the members."""
        channels = self.spec.channels
        first = jax.random.randint(key, (), 0, self.spec.grid[0] - self.unroll + 1)
        path = jnp.concatenate([example.scalars[None, :channels], example.target])
        true = lax.dynamic_slice_in_dim(path, first, self.unroll + 1)
        actions = lax.dynamic_slice_in_dim(jnp.asarray(example.fields), first, self.unroll)
        context = jnp.asarray(example.scalars)[channels:]
        state = self.rollout(self.encode(true[0], context), actions)
        weight = self.discount ** jnp.arange(self.unroll, dtype=jnp.float32)
        weight = (weight / weight.sum())[:, None]
        square = jnp.square(state.seen - true[1:, None]).mean(-1)
        total = (weight * rounded(square, self.tolerance)).sum(0).mean()
        if not self.hidden:
            return total
        codes = lax.stop_gradient(jax.vmap(lambda after: self.encode(after, context).hidden)(true[1:]))
        return total + self.consistency * (weight * jnp.square(state.hidden - codes[:, None]).mean(-1)).sum(0).mean()

    def sample(self, fields: AnyArray, scalars: AnyArray, key: Array, constraints: Sequence[Constraint] = ()) -> Array:
        """What a random member expects. Raises BadInput for constraints: what follows from actions cannot be imposed."""
        if constraints:
            raise BadInput("world model: expected no constraints, since what is seen follows from what is done")
        channels = self.spec.channels
        states = self.rollout(self.encode(scalars[:channels], scalars[channels:]), fields)
        return states.seen[:, jax.random.randint(key, (), 0, self.net.members)]


# ---------------------------------------------------------------- networks


class Ensemble(nnx.Module):
    """Networks of equal shape, side by side: called with `[member, input]` or, for all the same, `[1, input]` -> `[member, output]`.

    Attributes:
      width, depth: hidden layers.
      start: size of what they tell at first, relative to the usual.
      dtype: of the arithmetic; parameters stay float32.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        members: int,
        *,
        rngs: nnx.Rngs,
        width: int = 128,
        depth: int = 2,
        start: float = 0.3,
        dtype: Any = jnp.float32,
    ):
        if min(width, depth, inputs, outputs, members) < 1:
            raise BadInput(f"ensemble: expected positive sizes, got {width=}, {depth=}, {inputs=}, {outputs=}, {members=}")
        self.members, self.dtype = members, jnp.dtype(dtype)
        sizes = [inputs, *[width] * depth, outputs]
        self.layers = nnx.List([Dense(*pair, members, rngs=rngs) for pair in zip(sizes, sizes[1:], strict=False)])
        self.layers[-1].kernel[...] *= start

    def __call__(self, x: Array) -> Array:
        h = jnp.repeat(x, self.members // len(x), 0).astype(self.dtype)
        for layer in self.layers[:-1]:
            h = nnx.silu(layer(h))
        return self.layers[-1](h).astype(jnp.float32)


class Dense(nnx.Module):
    """A linear layer of each member."""

    def __init__(self, inputs: int, outputs: int, members: int, *, rngs: nnx.Rngs):
        keys = jax.random.split(rngs.params(), members)
        self.kernel = nnx.Param(jax.vmap(lambda key: FAN_IN(key, (inputs, outputs), jnp.float32))(keys))
        self.bias = nnx.Param(jnp.zeros((members, outputs)))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("mi,mio->mo", x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)


def simnorm(code: Array) -> Array:
    """Groups of `GROUP` numbers that are positive and sum to one (Hansen et al. 2024, eq. 5, temperature 1)."""
    return jax.nn.softmax(code.reshape(*code.shape[:-1], -1, GROUP), -1).reshape(code.shape)


def rounded(square: Array, tolerance: float) -> Array:
    """The root of a square error, but itself square, with the same slope at infinity, where it is below the tolerance (pseudo-Huber)."""
    return jnp.sqrt(square + tolerance**2) - tolerance
