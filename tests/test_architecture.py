"""The rules of the layout, kept over the syntax tree: who may import whom, one home for each outside library, names and first lines."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("twinsim", "domains", "generators")
FOLDERS = (*PACKAGES, "conf", "scenarios", "hydra_plugins", "tests", "benchmarks", "scripts")
MODULES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

# outside library -> the only files or folders of the three packages that import it
HOMES = {
    "hydra": ("twinsim/run.py", "twinsim/build.py", "twinsim/cli.py", "domains/climate/speedy.py"),
    "omegaconf": ("twinsim/run.py", "twinsim/build.py", "twinsim/cli.py"),
    "tensorboardX": ("twinsim/log.py",),
    "orbax": ("twinsim/checkpoint.py",),
    "optax": ("twinsim/train.py",),
    "jcm": ("domains/climate/speedy.py",),
    "mujoco": ("domains/robotics/",),
    "pyarrow": ("domains/robotics/lerobot.py",),
    "h5py": ("domains/robotics/robomimic.py",),
    "av": ("domains/robotics/video.py",),
    "minari": ("domains/robotics/minari.py",),
    "mcap": ("domains/robotics/mcap.py",),
    "gymnasium": ("domains/robotics/environments.py", "domains/robotics/minari.py"),
}
REMOVED = {"pmap", "pjit"}  # jax.jit with shardings, and jax.shard_map, do their work


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


class RunTime(ast.NodeTransformer):
    """Leaves out what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.If | None:  # noqa: N802 (the name is ast's)
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def imports(tree: ast.AST) -> Iterator[str]:
    """Every absolute module a source imports, at any depth; `from a import b` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def forbidden(file: str, module: str) -> bool:
    """Whether `file`, as named from the root, must not import `module`."""
    here, there = file.split("/"), module.split(".")
    if here[0] == "twinsim":
        return there[0] in ("domains", "generators")
    if here[0] == "generators":
        return there[0] == "domains"
    if here[0] == "domains":
        return there[0] == "generators" or (there[0] == "domains" and len(here) > 2 and there[1:2] != here[1:2])
    return False


def homeless(file: str, module: str) -> bool:
    homes = HOMES.get(module.split(".")[0], (file,))
    return file.split("/")[0] in PACKAGES and not any(file == home or (home.endswith("/") and file.startswith(home)) for home in homes)


def removed_names(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
    return found & REMOVED


def opens_well(source: str) -> bool:
    """Whether the first line is a docstring of one sentence."""
    first = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]
    return first.endswith(".") and not re.search(r"[.!?] [A-Z]", first)


def test_there_are_modules_to_judge() -> None:
    assert {name(file).split("/")[0] for file in MODULES} >= {*PACKAGES, "conf", "scenarios", "tests"}


@pytest.mark.parametrize("file", MODULES, ids=name)
def test_module(file: Path) -> None:
    source = file.read_text()
    assert file.name != "utils.py", "a helper stands beside its only user, or has a name that says what it is"
    assert opens_well(source), "the first line says in one sentence what the file is"
    assert not removed_names(source)
    for module in imports(ast.parse(source)):
        assert not forbidden(name(file), module), f"imports point down, and never sideways: {module}"
        assert not homeless(name(file), module), f"{module} has its home in {HOMES[module.split('.')[0]]}"


def test_no_circle_of_imports() -> None:
    """Modules of the three packages can be put in an order in which each imports only earlier ones when it runs."""
    files = {file: name(file).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for file in MODULES}
    modules = {module: file for file, module in files.items() if module.split(".")[0] in PACKAGES}
    arrows = {}
    for module, file in modules.items():
        found = list(imports(RunTime().visit(ast.parse(file.read_text()))))
        targets = {target for path in found for target in (path, path.rpartition(".")[0])}
        # a package comes before its parts; it may gather names from them
        arrows[module] = (targets & modules.keys()) - {module, module.rpartition(".")[0]}
    graphlib.TopologicalSorter(arrows).prepare()  # raises CycleError, with the circle


def test_imports_for_a_type_checker_make_no_circle() -> None:
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    import b\nif x:\n    from c import d\n")
    assert list(imports(RunTime().visit(tree))) == ["a", "c.d"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), f"{name(page)} links to {link}"


@pytest.mark.parametrize(
    ("file", "module", "answer"),
    [
        ("twinsim/run.py", "domains.climate", True),
        ("twinsim/run.py", "generators", True),
        ("twinsim/run.py", "twinsim.base.Domain", False),
        ("domains/climate/fields.py", "domains.city.maps", True),
        ("domains/climate/fields.py", "domains.climate.scores", False),
        ("domains/climate/fields.py", "generators.nets", True),
        ("generators/nets.py", "domains.climate", True),
        ("generators/nets.py", "twinsim.base", False),
        ("benchmarks/climate.py", "domains.climate", False),
    ],
)
def test_direction_is_judged(file: str, module: str, answer: bool) -> None:
    assert forbidden(file, module) is answer


def test_homes_are_judged() -> None:
    assert (
        homeless("twinsim/report.py", "hydra.utils")
        and homeless("domains/climate/x.py", "optax")
        and homeless("generators/x.py", "mujoco.mjx")
    )
    assert (
        not homeless("twinsim/run.py", "hydra")
        and not homeless("domains/robotics/arm.py", "mujoco")
        and not homeless("tests/test_x.py", "optax")
    )


def test_names_and_first_lines_are_judged() -> None:
    assert removed_names("from jax import pmap") == {"pmap"} and removed_names("jax.experimental.pjit.f()") == {"pjit"}
    assert not removed_names('"""In place of pmap."""')
    assert opens_well('"""Nodes, e.g. crossings."""') and opens_well('"""One.\n\nMore. And more."""')
    assert not any(map(opens_well, ["x = 1", '"""No full stop"""', '"""Two. Sentences."""']))
