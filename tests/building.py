"""Programs and modules of tests, compiled in a fraction of the time: for claims with a tolerance, never for claims about bits."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

# As jax.jit, but LLVM does not optimise the code, which takes most of the time of a program that runs once on a few numbers.
rough_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def built(make: Callable[[], nnx.Module]) -> nnx.Module:
    """What `make` builds, as one program."""
    kept = []

    def state() -> nnx.State:
        graph, state = nnx.split(make())
        kept.append(graph)
        return state

    values = rough_jit(state)()
    return nnx.merge(kept[0], values)
