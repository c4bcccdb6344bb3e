"""Small road networks that tests of the city share."""

import numpy as np

from domains.city.network import Network, build


def linear(ends: list[tuple[int, int]], base: list[float], slope: list[float], **more) -> Network:
    """Links whose time is base + slope * flow, s: BPR with power 1."""
    start, end = np.array(ends).T
    free = np.maximum(np.array(base, float), 1e-6)
    return build(start=start, end=end, length=free, free_speed=1.0, capacity=1.0, alpha=np.array(slope) / free, beta=1.0, **more)


def pair(trips: float) -> np.ndarray:
    """Trips from the first of two zones to the second."""
    return np.array([[0, trips], [0, 0]])
