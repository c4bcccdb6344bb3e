"""The built wheel: holds everything that the checkout has, and alone, in an empty environment, does the main job."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("twinsim", "domains", "generators", "conf", "scenarios", "hydra_plugins")
LARGEST = 16e6  # bytes: 12 MB of embedded data and the code


def call(*command: object, cwd: Path, seconds: float = 600, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, timeout=seconds, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


def test_holds_the_whole_checkout(wheel: Path) -> None:
    there = {
        file.relative_to(ROOT).as_posix()
        for part in PARTS
        for file in (ROOT / part).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry_points = archive.read(next(name for name in held if name.endswith("entry_points.txt"))).decode()
    assert there - held == set()
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} <= set(PARTS)
    assert "twinsim = twinsim.cli:main" in entry_points
    assert wheel.stat().st_size < LARGEST


@pytest.mark.parametrize("recipe", ["cuda.def", "rocm.def", "Dockerfile"])
def test_a_container_takes_all_that_the_wheel_is_built_of_and_says_that_nobody_built_it(recipe: str) -> None:
    text = (ROOT / "scripts/containers" / recipe).read_text()
    taken = [name for line in re.findall(r"^(?:COPY|   (?! bash)) ([\w./ ]+) /opt/twinsim", text, re.MULTILINE) for name in line.split()]
    assert set(taken) > {*PARTS, "pyproject.toml", "README.md", "LICENSE", "requirements"}
    assert all((ROOT / name).exists() for name in taken)
    assert "not built and not run yet" in text
    call("bash", "-n", ROOT / "scripts/containers/install.sh", cwd=ROOT)


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_hydra_finds_the_launcher(wheel: Path, tmp_path: Path, installed: bool) -> None:
    if installed:
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    place = tmp_path / "site" if installed else ROOT
    words = "from hydra.core.plugins import Plugins; from hydra.plugins.launcher import Launcher; import sys"
    words += "; print([sys.modules[each.__module__].__file__ for each in Plugins.instance().discover(Launcher)])"
    found = call(sys.executable, "-c", words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(place)})
    assert str(place / "hydra_plugins/twinsim_slurm/launcher.py") in found


@pytest.mark.slow
def test_alone_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ours = ("PYTHON", "VIRTUAL_ENV", "PYTEST", "JAX_NUMPY", "XLA_FLAGS")  # what these tests run under, and a user does not
    home = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    code = call(python, "-c", "import twinsim; print(twinsim.__file__)", cwd=elsewhere, env=home)
    assert Path(code.strip()).is_relative_to(tmp_path)
    call(python.parent / "twinsim", "run", "scale=tiny", f"out={tmp_path / 'out'}", cwd=elsewhere, env=home)
    assert list((tmp_path / "out").rglob("report.html"))
    assert list((tmp_path / "out").rglob("ro-crate-metadata.json"))
    assert not [path for path in elsewhere.rglob("*") if path.is_file()], "nothing is written but below out="


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a new environment that holds the wheel and its pinned dependencies, nothing else.

    Where no registry can be reached the test is skipped, but not in CI.
    """
    pinned = ROOT / f"requirements/py3{min(sys.version_info[1], 12)}.txt"
    bounds = folder / "pinned.txt"  # without hashes: the wheel itself has none to compare with
    bounds.write_text("\n".join(re.findall(r"^[\w.-]+==[^\\\n]+", pinned.read_text(), re.MULTILINE)))
    python = folder / "venv/bin/python"
    uv = shutil.which("uv")
    if uv and subprocess.run([uv, "--version"], capture_output=True).returncode == 0:
        make = [uv, "venv", "--python", sys.executable, folder / "venv"]
        fill = [uv, "pip", "install", "--python", python, "--constraint", bounds, wheel]
    else:
        make = [sys.executable, "-m", "venv", folder / "venv"]
        fill = [python, "-m", "pip", "install", "--quiet", "--constraint", bounds, wheel]
    call(*make, cwd=folder)
    try:
        call(*fill, cwd=folder)
    except AssertionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the dependencies could not be installed: {error}")
    return python
