"""Links as GeoJSON lines in degrees (RFC 7946), for maps and for geographic information systems."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from domains.city.network import Network
from domains.city.projection import to_degrees
from twinsim.base import BadInput


def write_network(network: Network, path: str | os.PathLike, values: Mapping[str, np.ndarray] | None = None) -> Path:
    """Writes one line a link with its properties and `values`, `[link]` each, beside them. Raises BadInput without a map in degrees.

    Units are in the names: length_m, free_speed_km_h, capacity_veh_h. Seven decimals of a degree are a centimetre.
    """
    path = Path(path)
    if network.lon is None or network.lat is None:
        raise BadInput(f"{path}: GeoJSON is in degrees; expected a network with lon and lat, this one has none ({network.source})")
    values = values or {}
    for name, value in values.items():
        if np.shape(value) != (network.links,):
            raise BadInput(f"{path}: expected {network.links} values of {name}, one a link, got an array of shape {np.shape(value)}")
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for k in range(network.links):
            file.write(",\n" if k else "\n")
            json.dump(_feature(network, k, values), file, ensure_ascii=False, allow_nan=False)
        file.write("\n]}\n")
    return path


def course(network: Network, link: int) -> np.ndarray:
    """Longitude and latitude along a link, `[point, 2]`, degrees: its shape, or the straight line between its nodes."""
    if network.shape is not None and network.utm is not None:
        points = network.shape[link]
        return np.stack(to_degrees(points[:, 0], points[:, 1], network.utm), axis=1)
    ends = [network.start[link], network.end[link]]
    assert network.lon is not None and network.lat is not None  # checked by the caller
    return np.stack([network.lon[ends], network.lat[ends]], axis=1)


def _feature(network: Network, k: int, values: Mapping[str, np.ndarray]) -> dict:
    properties = {
        "link_id": str(network.link_id[k]),
        "from": str(network.node_id[network.start[k]]),
        "to": str(network.node_id[network.end[k]]),
        "name": str(network.name[k]),
        "kind": str(network.kind[k]),
        "lanes": float(network.lanes[k]),
        "length_m": round(float(network.length[k]), 3),
        "free_speed_km_h": round(float(network.free_speed[k]) * 3.6, 3),
        "capacity_veh_h": round(float(network.capacity[k]), 3),
    }
    properties |= {name: _plain(value[k]) for name, value in values.items()}
    line = [[round(float(lon), 7), round(float(lat), 7)] for lon, lat in course(network, k)]
    return {"type": "Feature", "properties": properties, "geometry": {"type": "LineString", "coordinates": line}}


def _plain(value: object) -> object:
    """A number or a text as JSON has it; null for NaN."""
    item = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(item, float) and not np.isfinite(item) else item
