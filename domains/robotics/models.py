"""Robots of the user, MJCF or URDF: screened as data from outside, compiled apart under limits, and only then a model of this process.

What MuJoCo itself lets pass is refused here (seen on 3.17 and 4.0): positions that are not finite load without a word, `replicate` may ask
for 10^8 bodies, `include` opens any path. The compiler sees copies of the files that were screened, and nothing else.
"""

import math
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NoReturn
from xml.parsers import expat

import mujoco
import numpy as np

from twinsim.base import BadInput


@dataclass(frozen=True)
class Limits:
    """What a model may cost.

    Attributes:
      xml_bytes: of one XML file. file_bytes: of a mesh, height field or texture; all_bytes: of all files together.
      elements: of XML, each counted as often as it is repeated. depth: of elements, and of files in files.
      cells: of a height field, a texture or a grid of particles.
      memory: bytes of the compiler. cpu, wall: its seconds.
    """

    xml_bytes: int = 10_000_000
    file_bytes: int = 50_000_000
    all_bytes: int = 300_000_000
    elements: int = 50_000
    depth: int = 64
    cells: int = 20_000_000
    memory: int = 3_000_000_000
    cpu: int = 60
    wall: int = 120


@dataclass(frozen=True)
class Opened:
    """A compiled model.

    Attributes:
      model: of MuJoCo. form: "MJCF" or "URDF". files: that it was made of, relative to the folder of the first.
      notes: what its author may not have meant, a sentence each.
      copies: the folder of the screened files, which lasts as long as this; `main`: the first of them.
    """

    model: mujoco.MjModel
    form: str
    files: tuple[str, ...]
    notes: tuple[str, ...]
    copies: "tempfile.TemporaryDirectory[str]"
    main: str

    def spec(self) -> mujoco.MjSpec:
        """What the model is compiled from, to add to. Its meshes are read from the copies when it is compiled."""
        spec = mujoco.MjSpec.from_file(str(Path(self.copies.name) / self.main))
        spec.compiler.fusestatic = False  # bodies keep their names
        return spec

    def assets(self) -> dict[str, Path]:
        """The meshes, textures and height fields that the spec names, by where within the model's folder it names them."""
        folder, spec = Path(self.copies.name), self.spec()
        found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS}
        named = {}  # where the copies have them, or, of models that were attached, beside these
        for file in (mesh.file for mesh in spec.meshes if mesh.file):
            place = str(PurePosixPath(spec.meshdir) / file)
            named[place] = found.get(place) or next(path for path in found.values() if path.name == PurePosixPath(file).name)
        return (found if self.form == "MJCF" else {}) | named  # a URDF's are copied to several places


LIMITS = Limits()
ENDINGS = (".stl", ".obj", ".msh", ".png", ".bin", ".hf", ".hfield", ".skn")
FOLDERS = ("meshdir", "texturedir", "assetdir")
TEXT = ("name", "class", "childclass", "prefix", "model", "material", "content", "user_name")  # may be called inf
COUNTED = {"nconmax": 10**6, "njmax": 10**6, "nstack": 10**8, "nuserdata": 10**6, "nkey": 10**4, "nuser_geom": 10**3, "nuser_body": 10**3}
MEMORY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40, "p": 2**50, "e": 2**60}
TURN = 2 * math.pi
PACKAGE = "package://"  # of ROS, which MuJoCo does not know


def read(path: str | os.PathLike, limits: Limits = LIMITS) -> Opened:
    """A model of a .xml, .mjcf or .urdf file and what lies beside it. Raises BadInput in one sentence: file, element, what was expected."""
    main = Path(path)
    found = screen(main, limits)
    copies = tempfile.TemporaryDirectory(prefix="twinsim-model-")
    model = _compiled(main, found, limits, Path(copies.name))
    for name in ("qpos0", "body_pos", "body_quat", "body_mass", "body_inertia", "geom_size", "geom_pos", "jnt_range", "mesh_vert"):
        if not np.isfinite(getattr(model, name)).all():
            raise BadInput(f"{main}: expected a model of finite numbers, got others in {name} once it was compiled")
    files = tuple(sorted(name for name in found.files if (found.folder / name).is_file()))
    return Opened(model, found.form, files, tuple(found.notes), copies, main.name)


# ---------------------------------------------------------------- what is written


@dataclass
class Screened:
    """What a model is made of, as far as its text says.

    Attributes:
      form: "MJCF" or "URDF". files: bytes by the path within the folder. elements: repeated ones counted as often as they are.
    """

    folder: Path
    limits: Limits
    form: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    elements: int = 0
    folders: set[str] = field(default_factory=lambda: {""})
    assets: list[tuple[str, str, str, bool]] = field(default_factory=list)  # where and how it is named, that file's folder, if visual only
    visuals: bool = False  # whether a URDF's are kept, which MuJoCo discards unless told otherwise
    radian: bool = False
    ranges: list[tuple[str, float]] = field(default_factory=list)  # joints with ranges, and the largest value of each


@dataclass
class Document:
    """An MJCF file and those that it includes, which may attach the models that any of them names.

    Attributes:
      folder: of the first of them. models: elements of each, by name. attached: which, and how often.
    """

    folder: str
    models: dict[str, int] = field(default_factory=dict)
    attached: list[tuple[str, int]] = field(default_factory=list)


def screen(path: str | os.PathLike, limits: Limits = LIMITS) -> Screened:
    """Looks through the text of a model and gathers its files; compiles nothing. Raises BadInput."""
    main = Path(path)
    if main.suffix.lower() not in (".xml", ".mjcf", ".urdf"):
        raise BadInput(f"{main}: expected a model as .xml, .mjcf or .urdf")
    found = Screened(main.parent, limits)
    found.elements = _walk(found, main.name, (), 1)
    for where, name, beside, visual in found.assets:
        if found.visuals or not visual:
            _take(found, where, name, beside)
    if found.form == "MJCF" and not found.radian and found.ranges:
        joint, largest = max(found.ranges, key=lambda each: each[1])
        if 0 < largest <= TURN:
            found.notes.append(
                f'{main}: ranges of joints are in degrees unless <compiler angle="radian"/>; the widest, of joint {joint}, ends at'
                f" {largest:g} degrees: are radians meant?"
            )
    return found


def _walk(found: Screened, name: str, above: tuple[str, ...], times: int, within: Document | None = None) -> int:
    """Screens an XML file, included `within` a document or a whole one, and those that it names; their elements, repeated ones counted."""
    limits, path = found.limits, found.folder / name
    if name in above:
        raise BadInput(f"{path}: expected files that do not include themselves, got {' in '.join([name, *reversed(above)])}")
    if len(above) > 8:
        raise BadInput(f"{path}: expected files within files to a depth of 8, got more")
    text = _bytes(found, name, limits.xml_bytes)
    beside = str(PurePosixPath(name).parent)
    document = within or Document(beside)
    parser = expat.ParserCreate("utf-8")
    repeats: list[int] = [times]  # of the elements open now
    tags: list[str] = []
    count = 0

    def where(tag: str) -> str:
        return f"{path} line {parser.CurrentLineNumber}: <{tag}>"

    def few(where: str) -> None:
        if count > limits.elements:
            raise BadInput(f"{where}: expected at most {limits.elements:,} elements, repeated ones counted, got {count:,} or more")

    def start(tag: str, attributes: Mapping[str, str]) -> None:
        nonlocal count
        here, kind = where(tag), tag.lower()
        given = {key.lower(): value for key, value in attributes.items()}
        if not tags:
            _root(found, here, kind, above)
        tags.append(kind)
        if len(tags) > limits.depth:
            raise BadInput(f"{here}: expected at most {limits.depth} elements within each other, got more")
        _numbers(here, given)
        if not (found.form == "URDF" and "gazebo" in tags):  # which MuJoCo passes over
            _names(found, here, kind, given, beside, found.form == "URDF" and "visual" in tags)
        inner = repeats[-1] * _copies(limits, here, kind, given)
        repeats.append(inner)
        count += inner
        if kind == "include":
            places = [_inside(here, given.get("file", ""), folder) for folder in (document.folder, beside)]  # as MuJoCo looks for it
            there = [place for place in places if (found.folder / place).is_file()]
            count += _walk(found, (there or places)[0], (*above, name), repeats[-1], document)
        elif kind == "model" and "file" in given and found.form == "MJCF":
            own = given.get("name", PurePosixPath(given["file"]).stem)
            document.models[own] = _walk(found, _inside(here, given["file"], beside), (*above, name), 1)
            count += document.models[own]
        elif kind == "attach":
            document.attached.append((given.get("model", ""), repeats[-1]))
        few(here)

    def end(tag: str) -> None:
        tags.pop()
        repeats.pop()

    def refuse(*_: object) -> NoReturn:
        raise BadInput(f"{path}: expected XML without a document type definition (it can hide an entity bomb), got one")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        raise BadInput(f"{path}: expected well-formed XML, got {error}") from None
    if within is None:
        count += sum(often * document.models.get(model, 0) for model, often in document.attached)
        few(str(path))
    return count


def _root(found: Screened, here: str, kind: str, above: tuple[str, ...]) -> None:
    forms = {"mujoco": "MJCF", "robot": "URDF"}
    if above and (kind == "mujoco" or kind == "mujocoinclude"):
        return
    if above or kind not in forms:
        raise BadInput(f"{here}: expected <mujoco>{' or <mujocoinclude>' if above else ' or <robot>'} as the first element")
    found.form = forms[kind]


def _numbers(here: str, given: Mapping[str, str]) -> None:
    """Raises BadInput where a list of numbers holds one that is not finite."""
    for key, value in given.items():
        if key in TEXT:
            continue
        try:
            numbers = [float(word) for word in value.split()]
        except ValueError:
            continue
        if any(not math.isfinite(number) for number in numbers):
            raise BadInput(f"{here} {key}: expected finite numbers, got {_show(value)}")


def _names(found: Screened, here: str, kind: str, given: Mapping[str, str], beside: str, visual: bool) -> None:
    """Files and folders that an element names; raises BadInput for plugins and for folders that lie elsewhere."""
    if kind in ("plugin", "extension"):
        raise BadInput(f"{here}: expected a model without plugins, which are code")
    if kind.startswith("xacro:"):
        raise BadInput(f"{here}: expected a URDF whose macros are expanded; run xacro on it first")
    if kind == "compiler":
        found.radian |= given.get("angle") == "radian"
        found.visuals |= given.get("discardvisual") == "false"
        for key in FOLDERS:
            if given.get(key):
                found.folders.add(_inside(f"{here} {key}", given[key], ""))
    if kind == "joint" and "range" in given and given.get("type", "hinge") in ("hinge", "ball"):
        found.ranges.append((given.get("name", "without a name"), max((abs(number) for number in _floats(given["range"])), default=0.0)))
    if "content_type" in given:
        raise BadInput(f"{here} content_type: expected files known by their endings, got {_show(given['content_type'])}")
    if kind in ("include", "model"):
        return
    for key, value in given.items():
        if key.startswith("file") and value:
            found.assets.append((f"{here} {key}", value.removeprefix(PACKAGE) if found.form == "URDF" else value, beside, visual))


def _inside(here: str, name: str, beside: str) -> str:
    """A path within the folder, as POSIX text relative to it. Raises BadInput for one that leads out of it."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith(("/", "~")) or ".." in parts or "\\" in name or ":" in name or not name.isprintable():
        raise BadInput(f"{here}: expected a relative path within the model's folder, got {_show(name)}")
    return str(PurePosixPath(beside) / name) if beside not in ("", ".") else str(PurePosixPath(name))


def _copies(limits: Limits, here: str, kind: str, given: Mapping[str, str]) -> int:
    """How often what an element holds, or makes, is there. Raises BadInput where it is too large by itself."""
    for key, most in COUNTED.items():
        if kind == "size" and any(value > most for value in _floats(given.get(key, ""))):
            raise BadInput(f"{here} {key}: expected at most {most:,}, got {_show(given[key])}")
    if kind == "size" and (memory := given.get("memory", "").strip().lower()):
        digits = memory.rstrip("kmgtpe")
        value = math.prod([*_floats(digits), MEMORY.get(memory[len(digits) :], math.inf)])
        if value > limits.memory / 2:
            raise BadInput(f"{here} memory: expected at most {limits.memory / 2e9:g} GB, got {_show(given['memory'])}")
    if kind in ("hfield", "texture"):
        cells = math.prod(max(value, 1.0) for key in ("nrow", "ncol", "width", "height") for value in _floats(given.get(key, "")))
        if cells > limits.cells:
            raise BadInput(f"{here}: expected at most {limits.cells:,} cells, got {cells:,.0f}")
    if kind in ("replicate", "composite", "flexcomp") and "count" in given:
        count = math.prod(max(value, 1.0) for value in _floats(given["count"]))
        if count > limits.elements:
            raise BadInput(f"{here} count: expected at most {limits.elements:,} elements, repeated ones counted, got {count:,.0f}")
        return int(count)
    return 1


def _floats(text: str) -> Iterator[float]:
    for word in text.split():
        try:
            yield float(word)
        except ValueError:
            return


def _take(found: Screened, where: str, name: str, beside: str) -> None:
    """The bytes of an asset, wherever the compiler would look for it within the folder."""
    if not name.lower().endswith(ENDINGS):
        raise BadInput(f"{where}: expected a file that ends in {', '.join(ENDINGS)}, got {_show(name)}")
    names, parts = [_inside(where, name, "")], PurePosixPath(name).parts
    if found.form == "URDF":  # within a package whose folder is this one, or all in one folder; the compiler may look for either
        names += ["/".join(parts[1:] or parts), parts[-1]]
    places = {str(PurePosixPath(one) / folder / each) for one in ("", beside) for folder in sorted(found.folders) for each in names}
    there = sorted(place for place in places if (found.folder / place).is_file())
    if not there:
        raise BadInput(f"{where}: expected the file {name} in {found.folder}, found none")
    if found.form == "URDF":
        found.files |= {place: _bytes(found, there[0], found.limits.file_bytes) for place in places}
    for place in there:
        data = _bytes(found, place, found.limits.file_bytes)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
            width, height = struct.unpack(">II", data[16:24])
            if width * height > found.limits.cells:
                raise BadInput(
                    f"{found.folder / place}: expected a picture of at most {found.limits.cells:,} pixels, got {width} x {height}"
                )


def _bytes(found: Screened, name: str, most: int) -> bytes:
    """A file of the model, kept for the compiler."""
    path = found.folder / name
    if not path.is_file():
        raise BadInput(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    if not path.resolve().is_relative_to(found.folder.resolve()):
        raise BadInput(f"{path}: expected a file within the model's folder, got a link out of it")
    if path.stat().st_size > most:
        raise BadInput(f"{path}: expected at most {most / 1e6:g} MB, got {path.stat().st_size / 1e6:.1f} MB")
    if name not in found.files:
        found.files[name] = path.read_bytes()
    if sum(map(len, found.files.values())) > found.limits.all_bytes:
        raise BadInput(f"{path}: expected a model of at most {found.limits.all_bytes / 1e6:g} MB, got more")
    return found.files[name]


def _show(value: str) -> str:
    return repr(value if len(value) <= 60 else f"{value[:57]}...")


# ---------------------------------------------------------------- what is compiled

# a process of its own sets its limits before it loads MuJoCo; what fails in C ends with it
COMPILER = """
import resource, sys
source, target, memory, cpu = *sys.argv[1:3], *map(int, sys.argv[3:5])
for limit, most in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_FSIZE, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory)):
    if limit != resource.RLIMIT_AS or sys.platform == "linux":
        resource.setrlimit(limit, (most, most))
sys.path.insert(0, sys.argv[5])  # the same MuJoCo as that of the process that asked
import mujoco
try:
    mujoco.mj_saveModel(mujoco.MjModel.from_xml_path(source), target, None)
except (ValueError, MemoryError, RuntimeError, mujoco.FatalError) as error:
    sys.exit(" ".join(str(error).split())[:300] or type(error).__name__)
"""


def _compiled(main: Path, found: Screened, limits: Limits, copies: Path) -> mujoco.MjModel:
    """The model, compiled by another process from copies of the screened files, which are put into a folder."""
    for name, data in found.files.items():
        copy = copies / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(data.replace(PACKAGE.encode(), b"") if name == main.name and found.form == "URDF" else data)
    with tempfile.TemporaryDirectory(prefix="twinsim-model-") as scratch:
        source, target = copies / main.name, Path(scratch) / "model.mjb"
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
        words = [source, target, limits.memory, limits.cpu, Path(mujoco.__file__).parents[1]]
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", COMPILER, *map(str, words)],
                cwd=scratch, env={**kept, "OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, errors="replace",
                timeout=limits.wall, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise BadInput(f"{main}: expected a model that compiles within {limits.wall} s, got one that does not") from None
        if done.returncode == 0 and target.is_file():
            return mujoco.MjModel.from_binary_path(str(target))
        said = done.stderr.strip().splitlines()
        if done.returncode < 0 or not said:
            raise BadInput(
                f"{main}: expected a model that compiles within {limits.cpu} s of CPU and {limits.memory / 1e9:g} GB,"
                f" the compiler was stopped (signal {-done.returncode})"
            )
        raise BadInput(f"{main}: expected a model that MuJoCo compiles, got: {said[-1].replace(f'{copies}/', '')}")
