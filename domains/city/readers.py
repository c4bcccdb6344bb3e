"""One door for road networks of any format: the name of the file says which."""

import os
from pathlib import Path
from typing import Any

from domains.city import gmns, osm, sumo_net, tntp
from domains.city.network import Network
from twinsim.base import BadInput


def read_network(path: str | os.PathLike, **options: Any) -> Network:
    """The network of a `_net.tntp`, `.net.xml`, `.osm`, `.osm.xml` (each also `.gz`) or `.osm.pbf` file, or of a GMNS folder.

    Options are those of the format's own reader. Those of OSM and SUMO have no zones: see `simplify.prepare`. Raises BadInput.
    """
    path = Path(path)
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        return gmns.read_network(path, **options)
    if name.endswith(".tntp"):
        return tntp.read_network(path, **options)
    if name.endswith(".net.xml"):
        return sumo_net.read_network(path, **options)
    if name.endswith((".osm", ".osm.xml", ".osm.pbf")):
        return osm.read_network(path, **options)
    raise BadInput(f"{path}: expected a network as .tntp, .net.xml, .osm, .osm.xml, .osm.pbf, or a folder with node.csv and link.csv")
