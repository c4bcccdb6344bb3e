"""A city scenario in the formats of its field: GeoJSON, GeoPackage, NGSI-LD and GMNS, beside the Zarr that every run writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from domains.city import geojson, gmns
from domains.city.days import LENGTHS, PERIODS
from domains.city.place import Place
from domains.city.projection import to_degrees
from twinsim.base import BadInput

CONTEXT = [
    "https://uri.etsi.org/ngsi-ld/v1/ngsi-ld-core-context-v1.8.jsonld",
    "https://raw.githubusercontent.com/smart-data-models/dataModel.Transportation/master/context.jsonld",
    "https://raw.githubusercontent.com/smart-data-models/dataModel.Environment/master/context.jsonld",
]
UNITS = {"speed": "KMH", "ug/m3": "GQ"}  # UN/CEFACT common codes


def write(place: Place, dataset: xr.Dataset, indicators: Mapping[str, Mapping[str, Any]], formats: Sequence[str], folder: Path) -> None:
    """Writes each of `formats`; `indicators.json` always."""
    (folder / "indicators.json").write_text(json.dumps(indicators, indent=1))
    if "flow" not in dataset:
        return
    makers = {"geojson": write_geojson, "geopackage": write_geopackage, "ngsi-ld": write_ngsi_ld, "gmns": write_gmns}
    for name in formats:
        if name in makers:
            makers[name](place, dataset, folder)


def check(place: Place, formats: Sequence[str]) -> None:
    """Raises BadInput where a format cannot be written for this place, or here."""
    network = place.network
    if (degrees := [name for name in formats if name in ("geojson", "geopackage", "ngsi-ld")]) and (
        network.utm is None or network.lon is None
    ):
        raise BadInput(f"format {degrees[0]}: it is in degrees; expected a network whose projection is known, got {network.source}")
    if "geopackage" in formats:
        _pyogrio()


def link_values(dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """Means over days of each link: flow by case and part of the day, and its change, veh/h; vehicles a day."""
    flow = dataset["flow"].values[:, 0].mean(0)  # [case, period, link]
    found = {}
    for index, period in enumerate(PERIODS):
        for case, name in enumerate(("base", "scenario")):
            found[f"flow_{name}_{period.name}_veh_h"] = np.round(flow[case, index], 1)
    day = (flow * LENGTHS[:, None]).sum(1)
    return {
        **found,
        "vehicles_base_day": np.round(day[0]),
        "vehicles_scenario_day": np.round(day[1]),
        "change_day": np.round(day[1] - day[0]),
    }


def receptor_values(place: Place, dataset: xr.Dataset) -> dict[str, np.ndarray]:
    """Means over days at each receptor, ug/m3, by case, and the people who live there."""
    found = {"people": np.round(place.people, 1)}
    for name in ("NO2", "PM2_5", "PM10"):
        mean = dataset[f"air_{name}"].values[:, 0].mean(0)
        found |= {f"{name}_base_ug_m3": np.round(mean[0], 3), f"{name}_scenario_ug_m3": np.round(mean[1], 3)}
    return found


def write_geojson(place: Place, dataset: xr.Dataset, folder: Path) -> None:
    """`links.geojson` and `air.geojson` (RFC 7946)."""
    geojson.write_network(place.network, folder / "links.geojson", link_values(dataset))
    values = receptor_values(place, dataset)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": [round(float(lon), 7), round(float(lat), 7)]},
            "properties": {name: float(column[index]) for name, column in values.items()},
        }
        for index, (lon, lat) in enumerate(_degrees(place))
    ]
    text = ",\n".join(json.dumps(each, allow_nan=False) for each in features)
    (folder / "air.geojson").write_text(f'{{"type": "FeatureCollection", "features": [\n{text}\n]}}\n')


def write_geopackage(place: Place, dataset: xr.Dataset, folder: Path) -> None:
    """`city.gpkg` with the layers links and air, in degrees (WGS 84). Raises BadInput without pyogrio."""
    pyogrio, network = _pyogrio(), place.network
    lines = [_wkb_line(geojson.course(network, link)) for link in range(network.links)]
    fixed = {"link_id": network.link_id.astype(object), "street": network.name.astype(object), "length_m": network.length}
    layers = {
        "links": (lines, "LineString", {**fixed, **link_values(dataset)}),
        "air": ([_wkb_point(point) for point in _degrees(place)], "Point", receptor_values(place, dataset)),
    }
    for layer, (geometry, kind, columns) in layers.items():
        pyogrio.write(
            folder / "city.gpkg", np.array(geometry, object), [np.asarray(values) for values in columns.values()], list(columns),
            layer=layer, driver="GPKG", geometry_type=kind, crs="EPSG:4326", append=(folder / "city.gpkg").exists(),
        )  # fmt: skip


def write_ngsi_ld(place: Place, dataset: xr.Dataset, folder: Path) -> None:
    """`ngsi-ld.json`: RoadSegment, TrafficFlowObserved and AirQualityObserved entities of the smart data models, both cases.

    They are simulated: every entity says so in its description and in `dataProvider`, and none claims to be a measurement.
    """
    network, roads = place.network, place.roads
    time = np.datetime_as_string(dataset["time"].values[0].astype("datetime64[s]")) + "Z"
    flow, spent = (dataset[name].values[:, 0].mean(0) for name in ("flow", "travel_time"))
    entities: list[dict[str, Any]] = []
    for link in roads:
        name = f"urn:ngsi-ld:RoadSegment:{network.link_id[link]}"
        course = [[round(float(x), 7), round(float(y), 7)] for x, y in geojson.course(network, int(link))]
        segment = {"id": name, "type": "RoadSegment", "name": _property(str(network.name[link])), "@context": CONTEXT}
        segment |= {"location": {"type": "GeoProperty", "value": {"type": "LineString", "coordinates": course}}}
        segment |= {"length": _property(round(float(network.length[link]) / 1000, 4), "KMT")}
        segment |= {"totalLaneNumber": _property(int(max(1, network.lanes[link])))}
        entities.append(segment)
        for case, words in enumerate(("base", "scenario")):
            for index, period in enumerate(PERIODS):
                speed = 3.6 * network.length[link] / spent[case, index, link]
                entities.append(
                    {
                        "id": f"urn:ngsi-ld:TrafficFlowObserved:{network.link_id[link]}:{words}:{period.name}",
                        "type": "TrafficFlowObserved",
                        **_simulated(words, time),
                        "refRoadSegment": {"type": "Relationship", "object": name},
                        "intensity": _property(round(float(flow[case, index, link]), 1)),  # vehicles an hour
                        "averageVehicleSpeed": _property(round(float(speed), 1), UNITS["speed"]),
                        "@context": CONTEXT,
                    }
                )
    air = {name: dataset[f"air_{name}"].values[:, 0].mean(0) for name in ("NO2", "PM2_5", "PM10")}
    for index, (lon, lat) in enumerate(_degrees(place)):
        for case, words in enumerate(("base", "scenario")):
            entities.append(
                {
                    "id": f"urn:ngsi-ld:AirQualityObserved:{index}:{words}",
                    "type": "AirQualityObserved",
                    **_simulated(words, time),
                    "location": {
                        "type": "GeoProperty",
                        "value": {"type": "Point", "coordinates": [round(float(lon), 7), round(float(lat), 7)]},
                    },
                    **{
                        key: _property(round(float(air[name][case, index]), 3), UNITS["ug/m3"])
                        for key, name in (("no2", "NO2"), ("pm25", "PM2_5"), ("pm10", "PM10"))
                    },
                    "@context": CONTEXT,
                }
            )
    (folder / "ngsi-ld.json").write_text("[\n" + ",\n".join(json.dumps(each, allow_nan=False) for each in entities) + "\n]\n")


def write_gmns(place: Place, dataset: xr.Dataset, folder: Path) -> None:
    """A GMNS folder `gmns/` of the network, with the flows of both cases in `link_performance.csv`."""
    gmns.write_network(place.network, folder / "gmns")
    values = link_values(dataset)
    rows = [",".join(["link_id", *values])]
    rows += [",".join([str(name), *(f"{column[k]:g}" for column in values.values())]) for k, name in enumerate(place.network.link_id)]
    (folder / "gmns" / "link_performance.csv").write_text("\n".join(rows) + "\n")


def _pyogrio() -> Any:
    try:
        import pyogrio.raw
    except ModuleNotFoundError:
        raise BadInput("format geopackage: expected pyogrio, which is not installed: pip install 'twinsim[city]'") from None
    return pyogrio.raw


def _simulated(case: str, time: str) -> dict[str, Any]:
    return {
        "dateObserved": _property(time),
        "dataProvider": _property("twinsim (simulated, not measured)"),
        "description": _property(f"synthetic: mean of sampled days, {case}"),
    }


def _property(value: Any, unit: str = "") -> dict[str, Any]:
    return {"type": "Property", "value": value} | ({"unitCode": unit} if unit else {})


def _degrees(place: Place) -> np.ndarray:
    """Longitude and latitude of the receptors, `[receptor, 2]`."""
    assert place.network.utm is not None  # see `check`
    return np.stack(to_degrees(place.receptors[:, 0], place.receptors[:, 1], place.network.utm), axis=1)


def _wkb_point(point: np.ndarray) -> bytes:
    """Well-known binary, little endian (OGC 06-103r4)."""
    return b"\x01" + np.array([1], "<u4").tobytes() + np.asarray(point, "<f8").tobytes()


def _wkb_line(points: np.ndarray) -> bytes:
    return b"\x01" + np.array([2, len(points)], "<u4").tobytes() + np.asarray(points, "<f8").tobytes()
