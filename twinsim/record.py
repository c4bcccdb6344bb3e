"""The record of a run: what went in, what ran and what came out, as an RO-Crate beside the data; and its verification.

Format: RO-Crate 1.1, profile Process Run Crate 0.5 (https://w3id.org/ro/wfrun/process/0.5), plain JSON-LD. The same facts and
files give the same bytes. Nothing here reaches the network.
"""

import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from twinsim import __version__
from twinsim.base import BadInput

RECORD = "ro-crate-metadata.json"
MANIFEST = "manifest-sha256.txt"  # the format of sha256sum: `sha256sum -c` reads it too
LISTED_FILES = 2000  # a folder with more files than this lists those in its subfolders in the manifest
MAX_RECORD = 64 * 2**20  # bytes

PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
SYNTHETIC = "https://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
CONTEXT = [
    "https://w3id.org/ro/crate/1.1/context",
    # Terms that the 1.1 context lacks, written out so that no second context has to be fetched.
    {
        "sha256": "https://w3id.org/ro/terms/workflow-run#sha256",
        "environment": "https://w3id.org/ro/terms/workflow-run#environment",
        "digitalSourceType": "https://schema.org/digitalSourceType",
    },
]
_PACKAGE = "https://pypi.org/project/"
_MEDIA_TYPES = {
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".nc": "application/x-netcdf",
    ".npz": "application/x-npz",
    ".parquet": "application/vnd.apache.parquet",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".xml": "application/xml",
    ".yaml": "application/yaml",
    ".zip": "application/zip",
}

Entity = dict[str, Any]


@dataclass(frozen=True)
class Input:
    """A source that the run read.

    Attributes:
      place: its URL, or its path.
      licence: an SPDX name ("CC-BY-4.0"), a URL or a sentence.
      size: bytes.
    """

    name: str
    place: str
    licence: str
    sha256: str
    size: int


def environment() -> dict[str, Any]:
    """Python, platform, devices, the XLA settings, and the version of every package that this process has imported."""
    import jax  # here, so that `verify` does not wait for it

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()],
        # Named one by one: the rest of the environment may hold secrets.
        "variables": {name: os.environ[name] for name in ("JAX_ENABLE_X64", "JAX_PLATFORMS", "XLA_FLAGS") if name in os.environ},
        "packages": _packages(),
    }


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _packages() -> dict[str, str]:
    imported = {name.partition(".")[0] for name in sys.modules}
    found = {dist for module, dists in _distributions().items() if module in imported for dist in dists}
    return {name: importlib.metadata.version(name) for name in sorted(found, key=str.lower)}


def git_state(root: Path | None = None) -> dict[str, Any]:
    """`{"commit": ..., "dirty": ...}` of the checkout that twinsim runs from; empty outside of one, or without git."""
    root = Path(__file__).resolve().parents[1] if root is None else Path(root).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20, env={**clean, "GIT_OPTIONAL_LOCKS": "0"}
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {}  # installed somewhere inside another project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return {}


def code_version(code: Mapping[str, Any]) -> str:
    """The version of twinsim, with what `git_state` tells of it."""
    commit = code.get("commit")
    return __version__ + (f"+{commit[:12]}{'.dirty' if code.get('dirty') else ''}" if commit else "")


@dataclass(frozen=True)
class Facts:
    """What a run says about itself, in its record and in its report.

    Attributes:
      title, description: what was asked and what came out, a line each.
      command: what to type to do it again.
      config: path of the resolved config within the run's folder.
      seed: of the training; draw_seed: of what was drawn with it, None where nothing was.
      started, ended: ISO 8601, with their offset from UTC.
      checkpoint: the fingerprints of the trained parameters and of the statistics, empty where none was used.
      licence: of the output; an SPDX name, a URL or a sentence.
      agent: who ran it, empty for nobody named.
      code: of `git_state`; environment: of `environment`.
    """

    title: str
    description: str
    command: str
    config: str
    config_hash: str
    seed: int
    started: str
    ended: str
    inputs: Sequence[Input] = ()
    checkpoint: str = ""
    licence: str = "no licence stated"
    agent: str = ""
    draw_seed: int | None = None
    code: Mapping[str, Any] = field(default_factory=git_state)
    environment: Mapping[str, Any] = field(default_factory=environment)


@dataclass(frozen=True)
class Entry:
    """A file as recorded: sha256 in hexadecimal, size in bytes (-1 where the manifest lists it)."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Finding:
    """One way in which a folder differs from its record: `kind` is "changed", "missing" or "added"."""

    kind: str
    path: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.path} ({self.detail})"


# ---------------------------------------------------------------- writing


def write(folder: Path, facts: Facts) -> Path:
    """Writes the record of everything that lies in `folder`; the last file of a run to be written. Raises BadInput."""
    folder = Path(folder)
    _check(folder, facts)
    (folder / RECORD).unlink(missing_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    present = {path: _entry(folder / path) for path in _walk(folder)}
    if facts.config not in present:
        raise BadInput(f"{folder}: expected the resolved config at {facts.config}, found no such file")
    listed = present
    if len(present) > LISTED_FILES:
        listed = {path: entry for path, entry in present.items() if "/" not in path}
        hidden = {path: entry for path, entry in present.items() if "/" in path}
        _replace(folder / MANIFEST, "".join(f"{entry.sha256}  {path}\n" for path, entry in hidden.items()).encode())
        listed[MANIFEST] = _entry(folder / MANIFEST)
    _replace(folder / RECORD, _dump(_sealed(_crate(facts, present, dict(sorted(listed.items()))))))
    return folder / RECORD


def _check(folder: Path, facts: Facts) -> None:
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected a folder to record, found none")
    for name in ("started", "ended"):
        try:
            time = datetime.datetime.fromisoformat(getattr(facts, name))
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise BadInput(f"record: expected {name} as ISO 8601 with an offset from UTC, got {getattr(facts, name)!r}")
    for source in facts.inputs:
        if not re.fullmatch(r"[0-9a-f]{64}", source.sha256):
            raise BadInput(f"record: expected 64 hexadecimal digits as sha256 of the input {source.name}, got {source.sha256!r:.80}")
        if not source.licence:
            raise BadInput(f"record: expected a licence for the input {source.name}, got none; say so in words where it is unknown")


def _crate(facts: Facts, present: Mapping[str, Entry], listed: Mapping[str, Entry]) -> list[Entity]:
    """The entities of the crate, in a fixed order."""
    folders = sorted({path.partition("/")[0] for path in present if "/" in path})
    top = [_id(path) for path in listed if "/" not in path] + [_id(path) + "/" for path in folders]
    licences = {text: _licence(text) for text in sorted({facts.licence, *(source.licence for source in facts.inputs)})}
    inputs = [_input(source, licences) for source in facts.inputs]
    software, requirements = _software(facts)
    values = [
        _value("#seed", "seed", facts.seed),
        _value("#config-hash", "config hash", facts.config_hash),
    ]
    if facts.draw_seed is not None:
        values.append(_value("#draw-seed", "seed of the draws", facts.draw_seed))
    if facts.checkpoint:
        values.append(
            {
                **_value("#checkpoint", "checkpoint", facts.checkpoint),
                "description": "Fingerprints of the trained parameters and of the statistics.",
            }
        )
    machine = [
        _value(f"#environment/{name}", name, ", ".join(value) if isinstance(value, list) else value)
        for name, value in facts.environment.items()
        if name not in ("packages", "variables")
    ]
    variables = [_value(f"#variable/{_id(name)}", name, value) for name, value in facts.environment.get("variables", {}).items()]
    synthetic = {
        **_value("#synthetic", "synthetic", True),
        "description": "The generated data in this folder are synthetic. They are not observations.",
    }
    agent = [{"@id": "#agent", "@type": "Person", "name": facts.agent}] if facts.agent else []
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": facts.title,
        "description": f"Synthetic data. {facts.description}",
        "datePublished": facts.ended,
        "license": _ref(licences[facts.licence]),
        "conformsTo": {"@id": PROFILE},
        "digitalSourceType": {"@id": SYNTHETIC},
        **({"author": _ref(agent[0])} if agent else {}),
        "additionalProperty": _ref(synthetic),
        "identifier": {"@id": "#seal"},
        "hasPart": _many([{"@id": name} for name in top]),
        "mentions": {"@id": "#run"},
    }
    run = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": facts.title,
        "description": facts.command,
        "instrument": _ref(software),
        **({"agent": _ref(agent[0])} if agent else {}),
        "startTime": facts.started,
        "endTime": facts.ended,
        "actionStatus": {"@id": "http://schema.org/CompletedActionStatus"},
        "object": [{"@id": _id(facts.config)}, *map(_ref, values), *map(_ref, inputs)],
        "result": _many([{"@id": name} for name in top if name != _id(facts.config)]),
        "environment": _many([_ref(one) for one in machine + variables]),
    }
    return [
        {
            "@id": RECORD,
            "@type": "CreativeWork",
            "about": {"@id": "./"},
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
        },
        root,
        {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"},
        {"@id": SYNTHETIC, "@type": "DefinedTerm", "name": "Created using generative AI (IPTC digital source type)"},
        run,
        *agent,
        software,
        *values,
        *inputs,
        *(_file(path, entry) for path, entry in listed.items()),
        *(_folder(name, present, listed) for name in folders),
        synthetic,
        *machine,
        *variables,
        *requirements,
        *licences.values(),
        {
            "@id": "#seal",
            "@type": "PropertyValue",
            "name": "seal",
            "description": f"sha256 of {RECORD} with this value empty; shows damage to the record, not forgery.",
            "value": "",
        },
    ]


def _file(path: str, entry: Entry) -> Entity:
    return {
        "@id": _id(path),
        "@type": "File",
        "name": path,
        "contentSize": str(entry.size),
        "encodingFormat": _MEDIA_TYPES.get(PurePosixPath(path).suffix, "application/octet-stream"),
        "sha256": entry.sha256,
    }


def _folder(name: str, present: Mapping[str, Entry], listed: Mapping[str, Entry]) -> Entity:
    """A subfolder with the hash of its tree: sha256 over the `sha256sum` lines of its files, sorted by path."""
    inner = {path: entry for path, entry in present.items() if path.startswith(f"{name}/")}
    lines = "".join(f"{entry.sha256}  {path}\n" for path, entry in inner.items())
    size = sum(entry.size for entry in inner.values())
    where = "listed here" if all(path in listed for path in inner) else f"listed in {MANIFEST}"
    entity = {
        "@id": f"{_id(name)}/",
        "@type": "Dataset",
        "name": name,
        "description": f"{len(inner)} files, {size} bytes, each {where} with its sha256; the sha256 here is that of the sorted list.",
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
    }
    if name.endswith(".zarr"):
        entity["encodingFormat"] = "application/vnd.zarr; version=3"
    parts = [{"@id": _id(path)} for path in inner if path in listed]
    return {**entity, "hasPart": _many(parts)} if parts else entity


def _input(source: Input, licences: Mapping[str, Entity]) -> Entity:
    is_url = urllib.parse.urlsplit(source.place).scheme in ("http", "https", "s3", "gs", "doi")
    return {
        "@id": f"#input/{_id(source.name)}",
        "@type": "CreativeWork",
        "name": source.name,
        ("url" if is_url else "identifier"): source.place,
        "license": _ref(licences[source.licence]),
        "contentSize": str(source.size),
        "sha256": source.sha256,
    }


def _software(facts: Facts) -> tuple[Entity, list[Entity]]:
    """twinsim as it ran, and the packages that it ran with."""
    commit, dirty = facts.code.get("commit"), facts.code.get("dirty")
    state = f" at commit {commit}{', with changes that are not committed' if dirty else ''}" if commit else ", commit unknown"
    requirements = [
        {
            "@id": f"{_PACKAGE}{_id(name)}/{_id(version)}/",
            "@type": "SoftwareApplication",
            "name": name,
            "softwareVersion": version,
            "url": f"{_PACKAGE}{_id(name)}/",
        }
        for name, version in facts.environment.get("packages", {}).items()
    ]
    software = {
        "@id": "#twinsim",
        "@type": "SoftwareApplication",
        "name": "twinsim",
        "description": f"twinsim {__version__}{state}.",
        "softwareVersion": code_version(facts.code),
        "softwareRequirements": _many([_ref(one) for one in requirements]),
    }
    return software, requirements


def _licence(text: str) -> Entity:
    if re.fullmatch(r"https?://\S+", text):
        return {"@id": text, "@type": "CreativeWork", "name": text}
    if re.fullmatch(r"[A-Za-z]+[A-Za-z0-9]*(?:-[A-Za-z0-9.]+)+", text):
        return {"@id": f"https://spdx.org/licenses/{text}", "@type": "CreativeWork", "name": text}
    return {"@id": f"#licence/{_id(text)}", "@type": "CreativeWork", "name": text}


def _value(identifier: str, name: str, value: Any) -> Entity:
    return {"@id": identifier, "@type": "PropertyValue", "name": name, "value": value}


def _many(values: list[Entity]) -> Any:
    """RO-Crate wants one value where there is one, and a list where there are several or none."""
    return values[0] if len(values) == 1 else values


def _ref(entity: Entity) -> Entity:
    return {"@id": entity["@id"]}


def _id(path: str) -> str:
    return urllib.parse.quote(path)


# ---------------------------------------------------------------- reading and verifying


@dataclass(frozen=True)
class Recorded:
    """What a record says.

    Attributes:
      files: path -> its entry, every file of the folder but the record itself.
      config: path of the resolved config; inputs: name -> sha256; packages: name -> version.
      code: of `code_version`.
    """

    files: Mapping[str, Entry]
    config: str
    config_hash: str
    seed: int
    checkpoint: str
    inputs: Mapping[str, str]
    packages: Mapping[str, str]
    code: str


def read(folder: Path) -> Recorded:
    """What the record in `folder` says; does not look at the files. Raises BadInput."""
    folder = Path(folder)
    try:
        entities = {entity["@id"]: entity for entity in json.loads(_bytes(folder / RECORD))["@graph"]}
        files = {
            urllib.parse.unquote(name): Entry(entity["sha256"], int(entity["contentSize"]))
            for name, entity in entities.items()
            if entity["@type"] == "File"
        }
        config = urllib.parse.unquote(entities["#run"]["object"][0]["@id"])
        recorded = Recorded(
            files=files,
            config=config,
            config_hash=entities["#config-hash"]["value"],
            seed=entities["#seed"]["value"],
            checkpoint=entities.get("#checkpoint", {}).get("value", ""),
            inputs={one["name"]: one["sha256"] for name, one in entities.items() if name.startswith("#input/")},
            packages={one["name"]: one["softwareVersion"] for name, one in entities.items() if name.startswith(_PACKAGE)},
            code=entities["#twinsim"]["softwareVersion"],
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError, OSError) as error:
        raise BadInput(f"{folder / RECORD}: expected the record of a twinsim run, {_reason(error)}") from None
    for path in [config, *files]:
        if not _is_safe(path):
            raise BadInput(f"{folder / RECORD}: expected files inside the folder, got {path!r:.80}")
    if MANIFEST in files:
        files.update(_manifest(folder / MANIFEST))
    return recorded


def verify(folder: Path) -> list[Finding]:
    """Every file of `folder` that differs from the record, sorted by path; empty when all is as recorded. Raises BadInput."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: expected the folder of a run, found none")
    if not os.path.lexists(folder / RECORD):
        return [Finding("missing", RECORD, "without the record nothing else can be checked")]
    findings = []
    try:
        if not _is_intact(_bytes(folder / RECORD)):
            findings.append(Finding("changed", RECORD, "its seal does not match"))
        recorded = read(folder).files
    except (BadInput, OSError):
        return [Finding("changed", RECORD, "it cannot be read, so nothing else can be checked")]
    present = _walk(folder, links=True)
    for path in sorted({*recorded, *present} - {RECORD}):
        if path not in present:
            findings.append(Finding("missing", path, "recorded, not in the folder"))
        elif path not in recorded:
            findings.append(Finding("added", path, "in the folder, not recorded"))
        elif (detail := _difference(folder / path, recorded[path])) is not None:
            findings.append(Finding("changed", path, detail))
    return findings


def proof(findings: Sequence[Finding]) -> str:
    """What the outcome of `verify` does and does not mean, in plain words."""
    limits = (
        "Not shown: who made it, since a record without a signature can be rewritten together with the files; "
        "that the data are right or fit for a purpose; that a second run gives the same, which `twinsim reproduce` tests."
    )
    if findings:
        names = ", ".join(finding.path for finding in findings[:5]) + (f" and {len(findings) - 5} more" if len(findings) > 5 else "")
        return f"Shown: the folder is not as it was when the run ended ({names}). Do not rely on these files. {limits}"
    return f"Shown: every file has the bytes it had when the run ended, none is missing and none was added. {limits}"


def _difference(path: Path, expected: Entry) -> str | None:
    if path.is_symlink() or not path.is_file():
        return f"a {'link' if path.is_symlink() else 'device'} stands in its place"
    try:
        if expected.size >= 0 and path.stat().st_size != expected.size:
            return f"{expected.size} bytes recorded, {path.stat().st_size} found"
        return None if _entry(path).sha256 == expected.sha256 else "its sha256 differs"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _manifest(path: Path) -> dict[str, Entry]:
    """Entries of a manifest; a damaged line is skipped, for the manifest itself is in the record and its damage is found there."""
    try:
        lines = _bytes(path).decode(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.partition("  ") for line in lines)
    return {name: Entry(digest, -1) for digest, _, name in pairs if re.fullmatch("[0-9a-f]{64}", digest) and _is_safe(name)}


def _is_safe(path: str) -> bool:
    parts = path.split("/")
    return "" not in parts and ".." not in parts and "." not in parts and "\0" not in path and "\\" not in path


def _walk(folder: Path, links: bool = False) -> list[str]:
    """Paths of all files below `folder`, sorted. Raises BadInput for what is no plain file, unless `links` lets it stand."""
    found = []
    stack = [""]
    while stack:
        inner = stack.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                path = f"{inner}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    stack.append(f"{path}/")
                    continue
                if not links and not entry.is_file(follow_symlinks=False):
                    raise BadInput(f"{folder / path}: expected plain files in a run's folder, got a link or a device")
                if not links and not (path.isprintable() and _is_safe(path)):
                    raise BadInput(f"{folder}: expected printable file names, got {path!r:.80}")
                found.append(path)
    return sorted(found)


def _entry(path: Path) -> Entry:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(digest, file.tell())


def _bytes(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_RECORD:
        raise OSError(f"not a plain file of at most {MAX_RECORD // 2**20} MB")
    return path.read_bytes()


def _sealed(graph: list[Entity]) -> list[Entity]:
    """The entities with the hash of all of them in the seal."""
    graph[-1]["value"] = hashlib.sha256(_dump(graph)).hexdigest()
    return graph


def _is_intact(raw: bytes) -> bool:
    """Whether the record's bytes are those that were written."""
    try:
        graph = json.loads(raw)["@graph"]
        if _dump(graph) != raw:
            return False
        seal = graph[-1]["value"]
        graph[-1]["value"] = ""
        return hashlib.sha256(_dump(graph)).hexdigest() == seal
    except (KeyError, TypeError, ValueError, IndexError, RecursionError):
        return False


def _dump(graph: list[Entity]) -> bytes:
    return (json.dumps({"@context": CONTEXT, "@graph": graph}, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
