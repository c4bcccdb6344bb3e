"""What a road of each class carries where nothing better is known, and how a speed limit or a lane count in words becomes a number.

Source of lanes and capacities: MATSim's OsmNetworkReader (setHighwayDefaults; Zilske, Neumann & Nagel 2011, OpenStreetMap for traffic
simulation). Source of speeds: the same for motorways and trunk roads; below them the limit in built-up areas of most of Europe, 50
km/h, 30 in residential streets and 20 in living streets (OSM wiki, Default speed limits), because a city is what this is for.
"""

import re
from typing import NamedTuple

MILE = 1.609344  # km
KNOT = 1.852  # km/h


class Road(NamedTuple):
    """Defaults of a road class: free speed km/h, lanes a direction, capacity veh/h a lane, and whether it is one-way of itself."""

    speed: float
    lanes: int
    lane_capacity: float
    oneway: bool = False


ROADS = {
    "motorway": Road(120, 2, 2000, True),
    "motorway_link": Road(80, 1, 1500, True),
    "trunk": Road(80, 1, 2000),
    "trunk_link": Road(50, 1, 1500),
    "primary": Road(50, 1, 1500),
    "primary_link": Road(50, 1, 1500),
    "secondary": Road(50, 1, 1000),
    "secondary_link": Road(50, 1, 1000),
    "tertiary": Road(50, 1, 600),
    "tertiary_link": Road(50, 1, 600),
    "unclassified": Road(50, 1, 600),
    "residential": Road(30, 1, 600),
    "living_street": Road(20, 1, 300),
    "road": Road(50, 1, 600),
    "service": Road(20, 1, 300),
}

# OSM wiki, Key:maxspeed, implicit values. A zone's number stands in its name: DE:zone30.
_IMPLICIT = {
    "urban": 50.0,
    "rural": 80.0,
    "trunk": 100.0,
    "motorway": 120.0,
    "living_street": 20.0,
    "bicycle_road": 30.0,
    "nsl_single": 60 * MILE,
}


def speed(text: str) -> float | None:
    """A speed limit in OSM's words, km/h; None where it says none or cannot be read. The lower of several is taken."""
    found = []
    for part in re.split(r"[;|,]", text.strip().lower()):
        part = part.strip()
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(km/h|kmh|kph|mph|knots)?", part)
        zone = re.fullmatch(r"[a-z]{2}(?:-[a-z]+)?:(?:zone:?)?(\w+)", part)
        if number:
            found.append(float(number[1]) * {"mph": MILE, "knots": KNOT}.get(number[2] or "", 1.0))
        elif zone and zone[1].isdigit():
            found.append(float(zone[1]))
        elif zone and zone[1] in _IMPLICIT:
            found.append(_IMPLICIT[zone[1]])
        elif part == "walk":
            found.append(7.0)  # walking pace
    good = [value for value in found if 1 <= value <= 200]
    return min(good) if good else None


def lanes(text: str) -> float | None:
    """A lane count in OSM's words; None where it cannot be read. The lower of several is taken."""
    found = [float(part) for part in re.split(r"[;|,]", text) if re.fullmatch(r"\s*\d{1,2}(\.\d)?\s*", part)]
    good = [value for value in found if 0.5 <= value <= 20]
    return min(good) if good else None
