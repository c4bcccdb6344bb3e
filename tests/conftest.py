"""What every test runs under: eight devices on the host, a compile cache, and no silent promotion of ranks or types."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before numpy and jax are imported for the first time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # workers fill the cores: threads of small solves would only wait for one another
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"

# in this order, before all others: a worker is not left alone with one of them at the end
LONGEST = (
    *("slurm", "wheel", "distributed", "contract", "city_transmission", "city_dispersion", "nets", "city_optimise", "run"),
    *("city_twin", "train", "robotics_tasks", "window", "plan", "bad_input"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are empty: more than half of a tiny run is spent on drawing, and most tests of runs do not look at them."""
    from toy import draw_nothing

    draw_nothing(monkeypatch.setattr)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Path]:
    """A real SLURM of two nodes; skipped, with the reason, where there can be none. Gives the folder of its logs."""
    from local_slurm import cluster

    with cluster() as folder:
        yield folder
