"""Objects from trusted configuration: an allow-list in front of Hydra's `instantiate`, and the hash that names a config.

A `_target_` names a part: a class of twinsim, domains, generators or optax, or a function of them that gives one; not what moves
files or runs commands. The whole node is checked before anything is built, since a config also comes back from checkpoints, which
travel. Hydra's own blocklist is no boundary (hydra issue 3258).
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import pkgutil
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from packaging.requirements import Requirement

from twinsim.base import BadInput

ALLOWED = ("twinsim", "domains", "generators", "optax")
# The engine's parts. Its other modules read and write files, submit jobs or build again: a config names what they work on, never them.
PARTS = ("twinsim.base", "twinsim.generate", "twinsim.scale", "twinsim.train")
FILES = {None, Path, list[Path]}  # what a function gives that is called for what it writes
MAX_DEPTH = 32
MAX_VALUES = 100_000  # of a config read back from a file, aliases written out
_RESERVED = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def build(node: Any, place: str = "", /, **given: Any) -> Any:
    """The object that `node` describes; `given` are arguments that exist only at run time, and win over the node's.

    Nested nodes are built first. With `_partial_: true` it returns a function that waits for the rest of its arguments.
    `place` is where the node stands in its configuration, for what is said about it.

    Raises:
      BadInput: a target outside the allow-list, one that does not exist, arguments that it does not take, or values of which it
        can make nothing; the error that said so is its cause.
    """
    node = plain(node)
    _check_size(node)
    if not isinstance(node, dict) or "_target_" not in node:
        raise BadInput(f"config: expected a table with a `_target_`, got {_show(node)}")
    for where, inner in list(targets(node, place)):  # the whole shape first
        _check_call(inner, where, given if inner is node else {})
    # Hydra would copy `given` into a config and turn tuples and dataclasses into something else: they are bound outside of it.
    try:
        make = instantiate({**node, "_partial_": True, "_convert_": node.get("_convert_", "all")})
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        if isinstance(cause, BadInput) or hasattr(cause, "exit_code"):  # a part that was asked to stop says so itself
            raise cause from None
        raise _unbuilt(node, place, cause) from error
    if node.get("_partial_"):
        return functools.partial(make, **given)
    try:
        return make(**given)
    except BadInput:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unbuilt(node, place, error) from error


def _unbuilt(node: Mapping[str, Any], place: str, error: BaseException) -> BadInput:
    """What was to be built, of which values, and what was said where: the place tells a wrong value from a fault of the code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {os.path.basename(frames[-1].filename)} line {frames[-1].lineno}" if frames else ""
    values = ", ".join(f"{name}={_show(value)}" for name, value in node.items() if name not in _RESERVED and not _holds_target(value))
    made_of = f" from {values}" if values else ""
    said = f"{_first_line(error)} ({type(error).__name__}{where})"
    return BadInput(f"config {place}: {node['_target_']} could not be built{made_of}: {said}".replace(" :", ":", 1))


def _holds_target(node: Any) -> bool:
    if isinstance(node, Mapping):
        return "_target_" in node or any(map(_holds_target, node.values()))
    return isinstance(node, list | tuple) and any(map(_holds_target, node))


def check_targets(node: Any, place: str) -> None:
    """Raises BadInput where a `_target_` in `node`, at any depth, may not be built; builds nothing."""
    node = plain(node)
    _check_size(node)
    if not isinstance(node, dict) or "_target_" not in node:
        raise BadInput(f"config {place}: expected a table with a `_target_`, got {_show(node)}")
    for where, inner in targets(node, place):
        resolve(inner["_target_"], where)


def plain(node: Any) -> Any:
    """`node` as dicts, lists and values, its interpolations resolved. Raises BadInput."""
    if isinstance(node, DictConfig | ListConfig):
        try:
            return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise BadInput(f"config: {_first_line(error)}") from None
    return node


def config_hash(config: Any) -> str:
    """Ten hexadecimal digits that name a config: equal for equal content, whatever the order of its keys. Raises BadInput."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:10]


def canonical(config: Any) -> str:
    """JSON with sorted keys and no spaces; the same text on every machine."""
    config = plain(config)
    _check_size(config)
    return json.dumps(_jsonable(config, "config"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


# ---------------------------------------------------------------- the walk


def _check_size(node: Any) -> None:
    """Raises BadInput for a config that would take long to walk: too deep, or grown by aliases."""
    stack, count = [(node, 0)], 0
    while stack:
        value, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise BadInput(f"config: expected at most {MAX_DEPTH} levels, got deeper nesting")
        if count > MAX_VALUES:
            raise BadInput(f"config: expected at most {MAX_VALUES} values, got more")
        if isinstance(value, Mapping):
            stack += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            stack += [(inner, depth + 1) for inner in value]


def targets(node: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every table with a `_target_`, at any depth. Raises BadInput for what no config of ours holds."""
    if isinstance(node, DictConfig | ListConfig):
        raise BadInput(f"config {place}: expected plain tables and lists, got an OmegaConf node inside of one")
    if isinstance(node, str) and "${" in node:
        raise BadInput(f"config {place}: expected a resolved value, got the interpolation {_show(node)}")
    if isinstance(node, Mapping):
        if not isinstance(node, dict):
            raise BadInput(f"config {place}: expected a plain table, got {type(node).__name__}")
        for key in node:
            if not isinstance(key, str):
                raise BadInput(f"config {place}: expected names as keys, got {_show(key)}")
            if "${" in key or (key.startswith("_") and key.endswith("_") and key not in _RESERVED):
                raise BadInput(f"config {place}: expected an argument's name, got {_show(key)}")
        if "_target_" in node:
            yield place, node
        for key, value in node.items():
            yield from targets(value, f"{place}.{key}" if place else key)
    elif isinstance(node, Sequence) and not isinstance(node, str | bytes):
        for index, value in enumerate(node):
            yield from targets(value, f"{place}.{index}")


def _check_call(node: Mapping[str, Any], place: str, given: Mapping[str, Any]) -> None:
    """Raises BadInput unless the node's target may be called, and takes its arguments."""
    target = resolve(node["_target_"], place)
    name = node["_target_"]
    arguments = {key for key in node if key not in _RESERVED} | set(given)
    positional = node.get("_args_", [])
    if not isinstance(positional, list):
        raise BadInput(f"config {place}: expected a list as `_args_` of {name}, got {_show(positional)}")
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some callables of C have none
        return
    parameters = signature.parameters.values()
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    anything = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = sorted(arguments - set(named))
    if unknown and not anything:
        close = difflib.get_close_matches(unknown[0], named, n=1)
        hint = f"did you mean {close[0]!r}? It takes" if close else "it takes"
        raise BadInput(f"config {place}: {name} has no argument {unknown[0]!r}, {hint} {', '.join(named) or 'none'}".replace(" :", ":"))
    try:
        binding = signature.bind_partial if node.get("_partial_") else signature.bind
        binding(*positional, **dict.fromkeys(arguments))
    except TypeError as error:
        raise BadInput(f"config {place}: {name} has {error}, it takes {', '.join(named) or 'none'}".replace(" :", ":")) from None
    if name.partition(".")[0] != "optax":  # whose annotations are wider than ours
        _check_values(target, {key: node[key] for key in node if key not in _RESERVED and key not in given}, place)


def _check_values(target: Callable[..., Any], values: Mapping[str, Any], place: str) -> None:
    """Raises BadInput where a value is plainly not of the kind that the target's annotation asks for."""
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError):  # a name that only the type checker imports
        return
    for name, value in values.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind is parameter.VAR_KEYWORD or parameter.annotation is parameter.empty:
            continue
        if value is None and parameter.default is None:
            continue
        if misfit := _misfit(value, parameter.annotation, f"{place}.{name}" if place else name):
            raise BadInput(f"config {misfit[0]}: expected {misfit[1]}, got {_show(misfit[2])}")


def _misfit(value: Any, kind: Any, place: str) -> tuple[str, str, Any] | None:
    """The first part of `value` that does not fit an annotation: where it stands, what was expected, and what is there.

    Knows tables, lists, numbers, text, choices and our own dataclasses, which want a `_target_`; any other kind fits.
    """
    if isinstance(value, Mapping) and "_target_" in value:  # built, or called, before it is handed over
        return None if _named(kind) not in ("true or false", "a whole number", "a number", "text") else (place, _named(kind), value)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        misfits = [_misfit(value, part, place) for part in parts]
        if None in misfits:
            return None
        deeper = [misfit for misfit in misfits if misfit and misfit[0] != place]
        return deeper[0] if len(deeper) == 1 else (place, _named(kind), value)
    if origin is typing.Literal:
        return None if value in parts else (place, _named(kind), value)
    shape = origin or kind
    wanted = _named(kind)
    if not wanted:
        return None
    if wanted == "a table":
        if not isinstance(value, Mapping):
            return place, wanted, value
        inner = parts[1] if len(parts) == 2 else Any
        return next((found for key, each in value.items() if (found := _misfit(each, inner, f"{place}.{key}"))), None)
    if wanted == "a list":
        if not isinstance(value, list | tuple):
            return place, wanted, value
        each_kind = [parts[0]] * len(value) if len(parts) == 1 or (len(parts) == 2 and parts[1] is Ellipsis) else list(parts)
        if parts and len(each_kind) != len(value):
            return place, f"a list of {len(parts)} values", value
        pairs = enumerate(zip(value, each_kind, strict=True)) if parts else ()
        return next((found for index, (each, one) in pairs if (found := _misfit(each, one, f"{place}.{index}"))), None)
    if wanted == "a number":
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool)
    elif wanted == "a whole number":
        fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    else:
        fits = isinstance(value, shape)
    return None if fits else (place, wanted, value)


def _named(kind: Any) -> str:
    """What a user would call a kind of value; "" for those that are not checked."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(part) for part in parts))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    shape = origin or kind
    plain_kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if shape in plain_kinds:
        return plain_kinds[shape]
    if shape in (dict, Mapping):
        return "a table"
    if shape in (list, tuple, Sequence):
        return "a list"
    if inspect.isclass(shape) and dataclasses.is_dataclass(shape) and _ours(shape.__module__):
        return f"a table with the `_target_` of a {shape.__name__}"
    return ""


# ---------------------------------------------------------------- names


def resolve(target: Any, place: str = "") -> Callable[..., Any]:
    """The class or function that `target` names, if it is one of ours or optax's own. Raises BadInput."""
    where = f"config {place}".rstrip()
    if not isinstance(target, str):
        raise BadInput(f"{where}: expected a name as `_target_`, got {_show(target)}")
    parts = target.split(".")
    if len(parts) < 2 or parts[0] not in ALLOWED:
        raise BadInput(f"{where}: expected a `_target_` in {', '.join(ALLOWED)}, got {_show(target)}, which may not be built")
    if not all(part.isascii() and part.isidentifier() and not part.startswith("_") for part in parts):
        raise BadInput(f"{where}: expected public dotted names as `_target_`, got {_show(target)}")
    owner: Any = _import(parts[0], where)
    path = parts[0]
    for part in parts[1:]:
        inner = getattr(owner, part, None)
        if inner is None and isinstance(owner, ModuleType) and hasattr(owner, "__path__"):
            inner = _import(f"{path}.{part}", where)
        if inner is None:
            close = difflib.get_close_matches(part, _public(owner), n=1)
            hint = f", did you mean {path}.{close[0]}?" if close else f", expected one of {', '.join(_public(owner)[:20])}"
            raise BadInput(f"{where}: {path} has no {part!r}{hint}")
        if isinstance(inner, ModuleType) and not _ours(inner.__name__):
            raise BadInput(f"{where}: expected a `_target_` of {path} itself, got {_show(target)}, which reaches into {inner.__name__}")
        owner, path = inner, f"{path}.{part}"
    home = getattr(owner, "__module__", None)
    if isinstance(owner, ModuleType) or not callable(owner):
        raise BadInput(f"{where}: expected a class or a function as `_target_`, got {_show(target)}")
    if not isinstance(home, str) or not _ours(home):
        raise BadInput(f"{where}: expected a `_target_` of {', '.join(ALLOWED)}, got {_show(target)}, which belongs to {home}")
    if (parts[0] == "twinsim" and home not in PARTS) or _writes(owner):
        raise BadInput(f"{where}: expected a part to build as `_target_`, got {_show(target)}, which is there for what it does")
    return owner


def _writes(target: Callable[..., Any]) -> bool:
    """Whether a function of ours says of itself that nothing but files comes of it."""
    if inspect.isclass(target):
        return False
    try:
        return inspect.signature(target, eval_str=True).return_annotation in FILES
    except (AttributeError, NameError, SyntaxError, TypeError, ValueError):  # a name that only the type checker imports
        return False


def _ours(module: str) -> bool:
    return module.partition(".")[0] in ALLOWED


def _import(name: str, where: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise BadInput(f"{where}: {name} needs the package {error.name!r}, which is not installed{_how(str(error.name))}") from None


def _how(package: str) -> str:
    """The command that installs a package which an extra of twinsim brings; nothing where none does."""
    try:
        wanted = [Requirement(each) for each in metadata.requires("twinsim") or []]
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return ""
    extras = re.findall(r"extra == ['\"](\w+)['\"]", " ".join(str(each.marker) for each in wanted if each.name == package))
    return next((f": pip install 'twinsim[{extra}]'" for extra in extras if extra != "dev"), "")


def _public(owner: Any) -> list[str]:
    found = {name for name in dir(owner) if not name.startswith("_")}
    if isinstance(owner, ModuleType):
        found = {name for name in found if _ours(getattr(getattr(owner, name), "__module__", None) or "")}
        found |= {module.name for module in pkgutil.iter_modules(getattr(owner, "__path__", []))}
    return sorted(found)


# ---------------------------------------------------------------- plain values


def _jsonable(value: Any, place: str) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadInput(f"{place}: expected a finite number, got {value}")
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise BadInput(f"{place}: expected names as keys, got {_show(list(value))}")
        return {key: _jsonable(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_jsonable(item, f"{place}.{index}") for index, item in enumerate(value)]
    raise BadInput(f"{place}: expected a plain value, got {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
