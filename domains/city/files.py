"""Files from outside, opened with care: never more than a stated size, no XML that defines entities, one sentence where it fails."""

import gzip
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from twinsim.base import BadInput

MAX_BYTES = 2_000_000_000  # unpacked
MAX_LINKS = 3_000_000  # a state; what comes after needs about 1 kB a link

Start = Callable[[str, Mapping[str, str]], None]


def opened(path: str | os.PathLike) -> io.BufferedIOBase:
    """The bytes of a file, unpacked where its name ends in .gz. Raises BadInput where there is none or it is too large."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: expected a file, found {'a folder' if path.is_dir() else 'nothing'}")
    if path.stat().st_size > MAX_BYTES:
        raise BadInput(f"{path}: expected at most {MAX_BYTES / 1e9:g} GB, got {path.stat().st_size / 1e9:.1f} GB; cut out a region first")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def blocks(path: str | os.PathLike, size: int = 1 << 20) -> Iterator[bytes]:
    """The file in blocks of at most `size` bytes. Raises BadInput as soon as there are more than MAX_BYTES, or it is damaged."""
    seen = 0
    with opened(path) as file:
        while block := _readable(path, file, size):
            seen += len(block)
            if seen > MAX_BYTES:
                raise BadInput(f"{path}: expected at most {MAX_BYTES / 1e9:g} GB once unpacked, got more; cut out a region first")
            yield block


def lines(path: str | os.PathLike) -> Iterator[str]:
    """The file's lines without their ends. Raises BadInput, also where it is not UTF-8 text."""
    rest = b""
    number = 0
    for block in blocks(path):
        *whole, rest = (rest + block).split(b"\n")
        if len(rest) > 1 << 24:
            raise BadInput(f"{path}: expected lines of text, got one of more than 16 MB after line {number + len(whole)}")
        for line in whole:
            number += 1
            yield _text(path, line, number).rstrip("\r")
    if rest:
        yield _text(path, rest, number + 1).rstrip("\r")


def parse_xml(path: str | os.PathLike, start: Start, end: Callable[[str], None] = lambda name: None) -> None:
    """Walks an XML file: `start(tag, attributes)` and `end(tag)` for each element. Nothing is kept.

    Raises BadInput for a document type definition, and with it every entity bomb and reference to another file, and for bad XML.
    """
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end

    def refuse(*_: object) -> NoReturn:
        raise BadInput(f"{path}: expected XML without a document type definition (it can hide an entity bomb), got one")

    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        for block in blocks(path):
            parser.Parse(block, False)
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise BadInput(f"{path}: expected well-formed XML, got {error}") from None


def number(text: str, where: str, name: str = "") -> float:
    """A finite number written in a file. Raises BadInput, `where` and of which `name` it should have been."""
    what = f" for {name}" if name else ""
    try:
        value = float(text)
    except ValueError:
        raise BadInput(f"{where}: expected a number{what}, got {text.strip()!r}") from None
    if not math.isfinite(value):
        raise BadInput(f"{where}: expected a finite number{what}, got {text.strip()}")
    return value


def at_most(links: int, path: str | os.PathLike) -> None:
    """Raises BadInput where a file says, or has so far shown, more links than MAX_LINKS."""
    if links > MAX_LINKS:
        raise BadInput(f"{path}: expected at most {MAX_LINKS:,} links, got {links:,} or more; cut out a region or drop minor roads first")


def _readable(path: str | os.PathLike, file: io.BufferedIOBase, size: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise BadInput(f"{path}: expected a readable{' gzip' if str(path).endswith('.gz') else ''} file, got: {error}") from None


def _text(path: str | os.PathLike, line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise BadInput(f"{path} line {number}: expected UTF-8 text, got bytes that are none") from None
