"""What the benchmarks measured, kept in `benchmarks/results/` and shown in README.md."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a benchmark runs from a checkout that is not installed
FOLDER = ROOT / "benchmarks" / "results"


def read(name: str) -> dict[str, Any]:
    """What was measured so far, by part."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(name: str, part: str, measured: Any) -> None:
    """Adds a part to what was measured, read anew: another run may have added to it."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps({**read(name), part: measured}, indent=1) + "\n")


def write_readme(marker: str, lines: list[str]) -> None:
    """Replaces what stands between two marker lines of the README."""
    readme = ROOT / "README.md"
    before, opening, rest = readme.read_text().partition(f"<!-- {marker} -->")
    _, closing, after = rest.partition(f"<!-- /{marker} -->")
    readme.write_text("\n".join([before + opening, *lines, closing + after]))


def yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
