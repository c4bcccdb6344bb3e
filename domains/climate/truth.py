"""The truths a configuration can name: recorded CF data, radar patches, the shipped simulation, and SPEEDY run on demand.

Each returns a dataset that carries its inputs (place, licence, sha256, size) in its attributes, for the record of a run.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from domains.climate import embedded, physics, sources, speedy
from twinsim import mesh
from twinsim.base import BadInput, makes_data
from twinsim.build import config_hash


def recorded(paths: Any, variables: Mapping[str, Any], licence: str = "", levels: str = "", **selection: Any) -> xr.Dataset:
    """Any CF dataset that xarray opens, without a missing value; `variables` and `selection` as in `sources.open_cf`. Raises BadInput.

    Args:
      levels: "sigma" where variables such as `ua500` lie on a sigma level of a model: the balance of wind and mass is then judged.
    """
    if levels not in ("", physics.SIGMA):
        raise BadInput(f"levels: expected {physics.SIGMA} or nothing, got {levels!r}")
    dataset = _opened(paths, variables, licence, **selection).assign_attrs({"levels": levels} if levels else {})
    for name, values in dataset.data_vars.items():
        if missing := int(np.isnan(values.values).sum()):
            raise BadInput(f"{paths}: gaps='keep' leaves {missing} missing values of {name}, expected none; use gaps='drop'")
    return dataset


def _opened(paths: Any, variables: Mapping[str, Any], licence: str, **selection: Any) -> xr.Dataset:
    named = {name: {"name": name, **dict(wanted)} for name, wanted in variables.items()}
    dataset = sources.open_cf(paths, named, **selection)
    return _with_inputs(dataset, _pinned(sources.inputs(paths, licence), dataset))


def patches(path: str, variable: str, units: str, licence: str = "", **cut: Any) -> xr.Dataset:
    """Wet square patches of radar frames, as in `sources.patches`."""
    frames = _opened(path, {variable: {"units": units}}, licence, gaps="keep")
    return _with_inputs(sources.patches(frames, variable, **cut), json.loads(frames.attrs["inputs"]))


def shipped(branches: Sequence[str], variables: Sequence[str]) -> xr.Dataset:
    """The SPEEDY runs that ship with twinsim; see `embedded.open_embedded`."""
    dataset = embedded.open_embedded(tuple(branches), tuple(variables)).assign_attrs(levels=physics.SIGMA)
    return _with_inputs(dataset, sources.inputs(embedded.DATA, "Apache-2.0"))


@makes_data
def simulated(
    folder: str, runs: Mapping[str, Mapping[str, Any]], variables: Sequence[str], branches: Sequence[str] | None = None
) -> xr.Dataset:
    """SPEEDY runs, simulated into `folder` where they are not there yet, one after the other along time.

    Args:
      runs: name -> arguments of `speedy.simulate` (days, sst_offset, seed); each run wants a seed of its own.
      branches: which of the runs to simulate and open, and in which order; all by default.

    Raises:
      BadInput: two runs share a seed, the name of one is no plain name, or a branch is no run.
      Preempted: asked to stop; the blocks made so far stay.
    """
    seeds = [run.get("seed", 1) for run in runs.values()]
    if len(set(seeds)) < len(seeds):
        raise BadInput(f"simulated: expected a seed of its own for each run, got {', '.join(map(str, seeds))}")
    if odd := [name for name in runs if not re.fullmatch(r"\w[\w.-]*", name)]:
        raise BadInput(f"simulated: expected a plain name for each run, which is that of its file, got {odd[0]!r}")
    branches = list(runs) if branches is None else branches
    if unknown := [name for name in branches if name not in runs]:
        raise BadInput(f"simulated: branch {unknown[0]}: expected one of the runs {', '.join(runs)}")
    parts, files = [], []
    with mesh.preemption() as asked:
        for name, run in ((branch, runs[branch]) for branch in branches):
            path = Path(folder) / f"{name}.nc"
            if not path.exists():
                _simulate(path, name, run, asked)
            part = sources.open_cf(path, {v: {"name": v, "units": speedy.OUTPUTS[v][0]} for v in variables})
            with xr.open_dataset(path) as whole:
                statics = whole[["orog", "lsm"]].load()
                offset = float(whole.attrs["sst_offset_K"])
                asked_for, held = _facts(run), {"days": whole.sizes["time"], "sst_offset": offset, **whole.attrs}
                if other := [name for name, value in asked_for.items() if held.get(name, value) != value]:
                    raise BadInput(
                        f"{path}: {other[0]}: expected {asked_for[other[0]]:g} as configured, it was made with {held[other[0]]:g};"
                        " move it away to simulate again"
                    )
            length = part.sizes["time"]
            part = part.merge(statics)
            parts.append(part.assign_coords(branch=("time", [name] * length), sst_offset=("time", np.full(length, offset))))
            files.append(path)
    joined = xr.concat(parts, "time", data_vars="minimal", coords="minimal", compat="override", join="override")
    told = {"source": parts[0].attrs.get("source", "jcm SPEEDY T31L8"), "levels": physics.SIGMA}
    return _with_inputs(joined.assign_attrs(told), sources.inputs(files, "Apache-2.0"))


def _facts(run: Mapping[str, Any]) -> dict[str, float]:
    """What a run is made with, by the names of `speedy.simulate`."""
    usual = {"sst_offset": 0.0, "seed": 1, "spinup_days": speedy.SPINUP_DAYS, "adjust_days": speedy.ADJUST_DAYS}
    made_with = {name: float(value) for name, value in {**usual, **run}.items()}
    return made_with if made_with["sst_offset"] else {**made_with, "adjust_days": 0.0}


def _simulate(path: Path, name: str, run: Mapping[str, Any], asked: Any) -> None:
    from twinsim.cli import progress

    with progress(f"simulate {name}") as update:

        def show(done: int, total: int) -> None:
            if asked():
                raise mesh.Preempted(f"asked to stop; {done} of {total} days of {name} are simulated, the same command goes on")
            update(done, total)

        made_with = {fact: value for fact, value in _facts(run).items() if fact not in ("days", "adjust_days")}  # as blocks are
        blocks = path.parent / f"{name}.blocks-{config_hash(made_with)}"
        dataset = speedy.simulate(blocks, **run, progress=show)
    unfinished = path.with_suffix(".tmp")
    dataset.to_netcdf(unfinished)
    unfinished.rename(path)


def _pinned(files: Sequence[Mapping[str, Any]], dataset: xr.Dataset) -> list[Mapping[str, Any]]:
    """Inputs with their digests; that of a URL, which is not read as a whole, is the digest of all values that were read."""
    if all(file["sha256"] is not None for file in files):
        return list(files)
    digest = hashlib.sha256()
    for name in sorted(map(str, dataset.variables)):
        values = dataset[name].values
        digest.update(f"{name} {values.shape}\n".encode())
        digest.update(str(values.tolist()).encode() if values.dtype == object else np.ascontiguousarray(values).tobytes())
    read = "the values read" if len(files) == 1 else f"the values read from all {len(files)} inputs"
    pin = {"sha256": digest.hexdigest(), "size": int(dataset.nbytes)}
    return [file if file["sha256"] is not None else {**file, "name": f"{file['name']}, {read}", **pin} for file in files]


def _with_inputs(dataset: xr.Dataset, files: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    kept = [{("place" if key == "path" else key): value for key, value in file.items()} for file in files]
    known = "; ".join(sorted({str(file["licence"]) for file in kept}))
    return dataset.assign_attrs(inputs=json.dumps(kept), license=known)
