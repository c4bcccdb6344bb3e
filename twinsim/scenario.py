"""A scenario file: finds it by name, reads it as data that can run nothing, and checks it against a domain's schema.

A scenario comes from outside, so its YAML is a small subset: plain values of YAML 1.2 (`1e-3` is a number, `no` is text), and
no anchors, aliases, tags, merge keys, repeated keys, interpolation (`${...}`) or names that start with an underscore.
"""

import difflib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import pydantic
import yaml

from twinsim.base import BadInput

MAX_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_NODES = 10_000
TARGETS = ("_target_", "_partial_", "_convert_", "_args_", "_recursive_")
MAX_DIGITS = 18  # a longer integer does not fit in 64 bits

Line = str  # "line 7" of the file, or "set.members" of the command line
Spot = tuple[str | int, ...]  # keys and indices from the top of the file down to a value
Schema = TypeVar("Schema", bound=pydantic.BaseModel)


class Scenario(pydantic.BaseModel):
    """What every scenario says, in any domain; a domain's own schema adds to it.

    Attributes:
      asks: the question, in one line.
      command: the command that runs it.
      takes: how long that takes, on which machine.
      expect: what to expect of the answer.
      formats: to write beside Zarr; a domain's schema says which.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)

    title: str = pydantic.Field(min_length=1, max_length=200)
    domain: str = pydantic.Field(min_length=1, max_length=200)
    asks: str = pydantic.Field(min_length=1, max_length=500)
    command: str = pydantic.Field(min_length=1, max_length=500)
    takes: str = pydantic.Field(min_length=1, max_length=500)
    expect: str = pydantic.Field(min_length=1, max_length=2000)
    members: int = pydantic.Field(ge=1, le=10_000)
    seed: int = pydantic.Field(default=0, ge=0, le=2**32 - 1)
    formats: list[Literal["netcdf"]] = []

    def files(self) -> list[str]:
        """Files beside the scenario that it names, relative to its folder; a run keeps a copy of them."""
        return []

    @pydantic.field_validator("title", "asks", "command", "takes")
    @classmethod
    def _one_line(cls, text: str) -> str:
        if "\n" in text.strip():
            raise ValueError("expected one line")
        return text.strip()


# ---------------------------------------------------------------- finding


def folder() -> Path:
    """The scenarios that come with twinsim: beside the package in a checkout and in an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / "scenarios", package / "scenarios"):
        if candidate.is_dir():
            return candidate
    raise BadInput(f"scenarios: expected a folder {package.parent / 'scenarios'}, found none; is twinsim installed whole?")


def names(within: Path | None = None) -> list[str]:
    """The names that `find` knows, as "climate/heatwave"."""
    within = folder() if within is None else within
    return sorted(path.relative_to(within).with_suffix("").as_posix() for path in within.rglob("*.yaml"))


def find(name: str | Path, within: Path | None = None) -> Path:
    """The file of a scenario that is named ("climate/heatwave") or given by its path. Raises BadInput."""
    given, path = str(name), Path(name)
    if path.is_absolute() or path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        if not path.is_absolute() and path.parts[:1] == ("scenarios",):  # "scenarios/climate/heatwave.yaml" from anywhere
            path = Path(*path.parts[1:])
        if path.is_absolute() or ".." in path.parts:
            raise BadInput(
                f"scenario {_show(str(name))}: no such file, expected a YAML file or one of the names of `twinsim run --scenarios`"
            )
        name = path.with_suffix("").as_posix()
    within = folder() if within is None else within
    known = names(within)
    if str(name) in known:
        return within / f"{name}.yaml"
    raise BadInput(f"scenario {_show(given)}: not found, {_nearest(str(name), known, by_last_part=True)}")


def inside(folder: Path, path: str | Path) -> Path:
    """`path` made absolute, which has to lie in `folder`; links are followed before that is decided. Raises BadInput."""
    if "\0" in str(path):
        raise BadInput(f"path {_show(str(path))}: expected a file name, got one with a zero byte")
    root = Path(folder).resolve()
    full = (root / path).resolve()
    if not full.is_relative_to(root):
        raise BadInput(f"path {_show(str(path))}: expected a file inside {root}, got one outside of it")
    return full


# ---------------------------------------------------------------- loading


def load(path: str | Path, schema: type[Schema], overrides: Mapping[str, Any] | None = None) -> Schema:
    """The scenario in `path`, checked.

    Args:
      schema: what the domain expects; unknown keys are refused and numbers are strict whatever its own settings say.
      overrides: `set.NAME=value` of the command line, NAME dotted ("period.start", "areas.0"); text is read as a YAML value.

    Raises:
      BadInput: names the file, the line and what was expected.
    """
    path = Path(path)
    data, lines = parse(read(path), str(path))
    for name, value in (overrides or {}).items():
        _override(data, lines, name, value)
    try:
        # Checked as JSON: there `strict` still takes a date or a path from text, but never a number from text or a flag.
        return schema.model_validate_json(json.dumps(data), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        raise BadInput(_sentence(str(path), schema, error, lines)) from None


def read(path: Path) -> str:
    """The text of a small regular file. Raises BadInput for a link, a large, a binary or a non-UTF-8 file."""
    try:
        if path.is_symlink():
            raise BadInput(f"{path}: expected a file, got a link; name the file that it points to")
        if path.is_dir():
            raise BadInput(f"{path}: expected a file, got a folder")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise BadInput(f"{path}: expected a file, got a pipe or a device")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadInput(f"{path}: expected a readable file, got: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path}: expected at most {MAX_BYTES // 1024} kB, got more; a scenario is a question, data go beside it")
    if b"\0" in raw:
        raise BadInput(f"{path}, line {_line(raw, raw.index(0))}: expected text, got a binary file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}, line {_line(raw, error.start)}: expected UTF-8 text, got byte 0x{raw[error.start]:02x}") from None


def parse(text: str, name: str, targets: bool = False) -> tuple[dict[str, Any], dict[Spot, Line]]:
    """Plain values of YAML text, and the line that each stands on. Raises BadInput.

    Args:
      name: of the file, for messages.
      targets: let names such as `_target_` through: the text is the config of a run, which `build` judges.
    """
    try:
        node = _compose(text)
    except _RefusedError as refusal:
        raise BadInput(f"{name}, {refusal}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise BadInput(f"{name}{where}: expected one YAML document, {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise BadInput(f"{name}, line {text.count(chr(10), 0, error.position) + 1}: expected text, got a control character") from None
    lines: dict[Spot, Line] = {(): "line 1"}
    if not isinstance(node, yaml.MappingNode):
        raise BadInput(f"{name}, line 1: expected `name: value` lines, got {'an empty file' if node is None else 'something else'}")
    try:
        return _plain(node, (), lines, targets), lines
    except _RefusedError as refusal:
        raise BadInput(f"{name}, {refusal}") from None


class _RefusedError(Exception):
    """A construct that a scenario may not hold; the message starts with its place."""


class _Loader(yaml.SafeLoader):
    """Composes a bounded tree of untagged nodes; builds no object."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, text: str):
        super().__init__(text)
        self.depth = self.count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _RefusedError(f"{where}: expected plain values, got the YAML alias or anchor {_show(event.anchor)}")
        if event.tag is not None:
            raise _RefusedError(f"{where}: expected plain values, got the YAML tag {_show(event.tag)}")
        self.count += 1
        if self.count > MAX_NODES:
            raise _RefusedError(f"{where}: expected at most {MAX_NODES} values, got more")
        if self.depth >= MAX_DEPTH:
            raise _RefusedError(f"{where}: expected at most {MAX_DEPTH} levels, got deeper nesting")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


# YAML 1.2 core schema, chapter 10.3, without octal and hexadecimal.
_NUMBERS = {
    "int": re.compile(r"[-+]?[0-9]+\Z"),
    "float": re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"),
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"))
for _kind, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list("-+.0123456789"))


def _plain(node: Any, spot: Spot, lines: dict[Spot, Line], targets: bool = False) -> Any:
    """The value of a node; its place and those below go to `lines`."""
    where = lines[spot] = f"line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*spot, index), lines, targets) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            here = f"line {key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise _RefusedError(f"{here}: expected a name before the colon, got a list or a table")
            key = key_node.value if targets and key_node.value in TARGETS else _name(key_node.value, here)
            if key in values:
                raise _RefusedError(f"{here}: expected each key once, got {_show(key)} again")
            values[key] = _plain(value_node, (*spot, key), lines, targets)
            lines[(*spot, key)] = here
        return values
    return _scalar(node.tag.rpartition(":")[2], node.value, where)


def _scalar(kind: str, text: str, where: Line) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        if len(text) > MAX_DIGITS:
            raise _RefusedError(f"{where}: expected a number of at most {MAX_DIGITS} digits, got {_show(text)}")
        return int(text)
    if kind == "float":
        number = math.nan if "n" in text.lower() else float(text)
        if not math.isfinite(number):
            raise _RefusedError(f"{where}: expected a finite number, got {_show(text)}")
        return number
    return _text(text, where)


def _name(key: str, where: Line) -> str:
    if key.startswith("_"):
        raise _RefusedError(f"{where}: expected a scenario's own names, got {_show(key)}; names that start with an underscore are refused")
    if key in ("", "<<"):
        raise _RefusedError(f"{where}: expected a name before the colon, got {_show(key)}")
    return _text(key, where)


def _text(text: str, where: Line) -> str:
    if "${" in text:
        raise _RefusedError(f"{where}: expected plain text, got the interpolation {_show(text)}; a scenario is not evaluated")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _RefusedError(f"{where}: expected Unicode text, got half of a surrogate pair")
    return text


# ---------------------------------------------------------------- overrides


def _override(data: dict[str, Any], lines: dict[Spot, Line], name: str, value: Any) -> None:
    """Sets one value in place; a table given for a table is merged into it."""
    where = f"set.{name}"
    try:
        parts = [_name(part, where) for part in str(name).split(".")]
        value = _given(value, where, MAX_DEPTH)
    except _RefusedError as refusal:
        raise BadInput(str(refusal)) from None
    owner: Any = data
    spot: Spot = ()
    for part in parts[:-1]:
        owner, spot = _step(owner, spot, part, where)
    last: str | int = parts[-1]
    if isinstance(owner, list):
        last = _index(owner, parts[-1], where)
    elif not isinstance(owner, dict):
        raise BadInput(f"{where}: expected a table or a list at {'.'.join(map(str, spot))}, got {_show(owner)}")
    if isinstance(value, dict) and isinstance(owner, dict) and isinstance(owner.get(parts[-1]), dict):
        for key, item in value.items():
            _override(data, lines, f"{name}.{key}", item)
        return
    owner[last] = value
    spot = (*spot, last)
    for known in [known for known in lines if known[: len(spot)] == spot]:
        del lines[known]
    lines[spot] = where


def _step(owner: Any, spot: Spot, part: str, where: Line) -> tuple[Any, Spot]:
    if isinstance(owner, list):
        index = _index(owner, part, where)
        return owner[index], (*spot, index)
    if not isinstance(owner, dict):
        raise BadInput(f"{where}: expected a table or a list at {'.'.join(map(str, spot))}, got {_show(owner)}")
    return owner.setdefault(part, {}), (*spot, part)


def _index(owner: list, part: str, where: Line) -> int:
    if not part.isascii() or not part.isdigit() or len(part) > 6 or int(part) >= len(owner):
        raise BadInput(f"{where}: expected an index below {len(owner)}, got {_show(part)}")
    return int(part)


def _given(value: Any, where: Line, depth: int) -> Any:
    """An override's value as plain data; text is read as YAML where that is one value, and stays text otherwise."""
    if depth == 0:
        raise _RefusedError(f"{where}: expected at most {MAX_DEPTH} levels, got deeper nesting")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _RefusedError(f"{where}: expected a finite number, got {value}")
        return value
    if isinstance(value, Mapping):
        return {_name(str(key), where): _given(item, where, depth - 1) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_given(item, where, depth - 1) for item in value]
    if not isinstance(value, str) or len(value) > MAX_BYTES:
        raise _RefusedError(f"{where}: expected a short text, a number or a list, got {_show(value)}")
    text = value.strip()
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return _plain(_compose(text), (), {})
        except yaml.YAMLError:
            raise _RefusedError(f"{where}: expected a YAML value, got {_show(text)}") from None
        except _RefusedError as refusal:
            raise _RefusedError(f"{where}: {str(refusal).split(': ', 1)[1]}") from None
    loader = _Loader("")
    kind = loader.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    loader.dispose()
    return _scalar(kind, text, where)


# ---------------------------------------------------------------- one sentence


def _sentence(name: str, schema: type[pydantic.BaseModel], error: pydantic.ValidationError, lines: Mapping[Spot, Line]) -> str:
    """The first complaint in the file, in words; how many more there are is said at the end."""
    found = []
    for one in error.errors(include_url=False):
        spot: Spot = ()
        for part in one["loc"]:  # tags of a union stand in `loc` and not in the file
            if (*spot, part) in lines:
                spot = (*spot, part)
        where = lines[spot]
        what = (*spot, one["loc"][-1]) if one["type"] == "missing" else spot
        line = int(where.split()[1]) if where.startswith("line ") else 0
        rank = one["type"] != "extra_forbidden"  # a misspelt key comes before the missing one that it causes
        found.append((line, rank, where, _complaint(schema, one, what)))
    found.sort(key=lambda item: item[:2])
    _, _, where, complaint = found[0]
    places = {where for _, _, where, _ in found} - {where}
    more = f"; so have {len(places)} more places" if len(places) > 1 else "; so has one more place" if places else ""
    return f"{name}, {where}: {complaint}" + (f" ({more[2:]} something wrong)" if more else "")


_EXPECTED = {
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}


def _complaint(schema: type[pydantic.BaseModel], error: Any, spot: Spot) -> str:
    loc, kind = error["loc"], error["type"]
    what = ".".join(str(part) for part in spot) or "the scenario"
    if kind == "extra_forbidden":
        return f"unknown key {_show(loc[-1])}, {_nearest(str(loc[-1]), _keys(schema, loc[:-1]))}"
    if kind == "missing":
        return f"key {what} is missing"
    if kind == "union_tag_invalid":
        return f"{what}: expected {error['ctx']['discriminator']} to be one of {error['ctx']['expected_tags']}, got {error['ctx']['tag']!r}"
    if kind in _EXPECTED:
        return f"{what}: expected {_EXPECTED[kind]}, got {_show(error.get('input'))}"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should ").replace("be ", "", 1)
    message = message if message.startswith("expected") else f"expected {message}"
    return f"{what}: {message}, got {_show(error.get('input'))}"


def _keys(schema: type[pydantic.BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Keys that the schema knows at `loc`."""
    models = {schema}
    for part in loc:
        fields = [model.model_fields[str(part)].annotation for model in models if str(part) in model.model_fields]
        models = {inner for annotation in fields for inner in _models(annotation)} or models
    return sorted({name for model in models for name in model.model_fields})


def _models(annotation: Any) -> set[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return {annotation}
    return {model for inner in get_args(annotation) for model in _models(inner)}


def _nearest(name: str, known: list[str], by_last_part: bool = False) -> str:
    """ "did you mean ...?", or the names there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close and by_last_part:
        last = {item.rpartition("/")[2]: item for item in known}
        close = [last[item] for item in difflib.get_close_matches(name.rpartition("/")[2], list(last), n=1, cutoff=0.6)]
    if close:
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(known[:20])}" if known else "there is none to choose from"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(raw: bytes, offset: int) -> int:
    return raw.count(b"\n", 0, offset) + 1
