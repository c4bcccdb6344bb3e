"""Objects from config: only ours and optax's are built, and everything is checked before anything is."""

import functools
import sys
import types
from importlib import metadata

import numpy as np
import optax
import pytest
from omegaconf import OmegaConf

import domains
from twinsim.base import BadInput, Bounds, Variable
from twinsim.build import build, config_hash, resolve
from twinsim.mesh import Preempted

VARIABLE = {"_target_": "twinsim.base.Variable", "dims": ["lat"], "units": "K", "long_name": "temperature"}


@pytest.fixture
def parts(monkeypatch):
    """A module `generators.parts_for_test` that counts what is built."""
    module = types.ModuleType("generators.parts_for_test")
    source = """
import functools, os, subprocess
from pathlib import Path
from numpy import load
built = []
class Leaf:
    def __init__(self, size, depth=1): built.append(self); self.size, self.depth = size, depth
class Tree:
    def __init__(self, left, right=None, *, name="tree"): built.append(self); self.left, self.right, self.name = left, right, name
    @classmethod
    def pair(cls, leaf): return cls(leaf, leaf)
def fails(): raise ValueError("the reason\\nand more")
later = functools.partial(os.system, "true")
number = 3
"""
    exec(source, module.__dict__)
    import generators

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(generators, "parts_for_test", module, raising=False)
    return module


HERE = "generators.parts_for_test"

HOSTILE = [
    "os.system",
    "builtins.eval",
    "eval",
    "",
    ".",
    "subprocess.run",
    "pickle.loads",
    "numpy.load",
    "pathlib.Path",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "twinsimx.base.Variable",
    "twinsim",
    "twinsim.base",
    "twinsim.base.np.load",
    "twinsim.base.np.ctypeslib.load_library",
    "twinsim.base.Path",
    "twinsim.base.jax.device_get",
    "twinsim.base.Array",
    "twinsim.base.Variable.__init__",
    "twinsim.base.Variable.__class__.__base__.__subclasses__",
    "twinsim.base.Variable.mro",
    "twinsim.base.__loader__.load_module",
    "twinsim..base.Variable",
    "twinsim.base.Variable ",
    "twinsim.base.Vаriable",  # a Cyrillic a
    "twinsim.build.build",
    "twinsim.build.instantiate",
    "twinsim.build.importlib.import_module",
    "twinsim.build.os.system",
    "twinsim.record.write",
    "twinsim.data.publish",
    "twinsim.files.write_text",
    "twinsim.checkpoint.save",
    "twinsim.scenario.find",
    "twinsim.slurm.submit",
    "twinsim.mesh.leave",
    "domains.city.gmns.write_network",
    "domains.city.geojson.write_network",
    "domains.city.outputs.write",
    "domains.climate.embedded.pack",
    "domains.robotics.mcap.write",
    "twinsim.scenario.os.system",
    f"{HERE}.os.system",
    f"{HERE}.subprocess.run",
    f"{HERE}.Path",
    f"{HERE}.load",
    f"{HERE}.later",
    f"{HERE}.number",
    "optax._src.base.jax.device_get",
    "optax.jax.device_get",
    "optax.losses.jnp.load",
    "${oc.env:HOME}",
    "twinsim.base.${x}",
    3,
    None,
    ["os", "system"],
    {"a": 1},
    print,
]


@pytest.mark.parametrize("target", HOSTILE, ids=str)
def test_hostile_targets_are_refused(parts, target):
    with pytest.raises(BadInput, match="^config"):
        build({"_target_": target})


def test_a_config_from_outside_moves_no_file(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name, (first, second) in {"data.publish": ("unfinished", "folder"), "files.write_text": ("path", "text")}.items():
        with pytest.raises(BadInput, match="there for what it does"):
            build({"_target_": f"twinsim.{name}", first: str(tmp_path / "mine"), second: str(tmp_path / "theirs")})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda bad: {"_target_": f"{HERE}.Tree", "left": {"_target_": f"{HERE}.Leaf", "size": 1}, "right": bad},
        lambda bad: {"_target_": f"{HERE}.Tree", "left": [{"_target_": f"{HERE}.Leaf", "size": 1}, [bad]]},
        lambda bad: {"_target_": f"{HERE}.Tree", "left": {"deep": {"deeper": (1, bad)}}},
        lambda bad: {"_target_": f"{HERE}.Tree", "_args_": [{"_target_": f"{HERE}.Leaf", "size": 1}, bad]},
        lambda bad: {"_target_": f"{HERE}.Tree", "left": bad, "_recursive_": False},
        lambda bad: {"_target_": f"{HERE}.Tree", "left": bad, "_partial_": True},
    ],
)
@pytest.mark.parametrize("bad", [{"_target_": "os.system", "command": "true"}, "${oc.env:HOME}", {"_call_": 1}, {3: 4}])
def test_nothing_is_built_when_a_nested_part_is_refused(parts, wrap, bad):
    with pytest.raises(BadInput):
        build(wrap(bad))
    assert parts.built == []


def test_omegaconf_nested_in_a_plain_table_is_refused(parts):
    with pytest.raises(BadInput, match="OmegaConf node"):
        build({"_target_": f"{HERE}.Leaf", "size": OmegaConf.create({"a": "${oc.env:HOME}"})})


def test_deep_nesting_ends_in_a_sentence():
    node = {}
    for _ in range(5000):
        node = {"a": node}
    with pytest.raises(BadInput, match="at most 32 levels"):
        build({"_target_": "twinsim.base.Variable", "dims": node})
    with pytest.raises(BadInput, match="at most 32 levels"):
        config_hash(node)


def test_alias_bomb_ends_in_a_sentence():
    node = ["x"] * 9
    for _ in range(9):
        node = [node] * 9  # what a YAML file with aliases becomes: small in memory, 9 to the 10th when walked
    for verb in (config_hash, lambda bomb: build({"_target_": "twinsim.base.Variable", "dims": bomb})):
        with pytest.raises(BadInput, match="at most 100000 values"):
            verb(node)


def test_builds_nested_lists_and_partials(parts):
    tree = build({"_target_": f"{HERE}.Tree", "left": [{"_target_": f"{HERE}.Leaf", "size": 1}], "name": "x"}, right=(1, 2))
    assert (tree.left[0].size, tree.right, tree.name) == (1, (1, 2), "x")
    make = build({"_target_": f"{HERE}.Leaf", "_partial_": True, "depth": 4})
    assert isinstance(make, functools.partial) and make(size=2).depth == 4
    assert build({"_target_": f"{HERE}.Tree", "_args_": [1, 2]}).right == 2
    assert build({"_target_": f"{HERE}.Tree.pair", "leaf": 5}).right == 5


def test_run_time_arguments_arrive_untouched_and_win(parts):
    lower, variable = np.zeros(3), Variable((), "K", "t")
    assert build({"_target_": "twinsim.base.Bounds", "upper": 1.0}, lower=lower).lower is lower
    assert build({"_target_": f"{HERE}.Leaf", "size": 1}, size=variable).size is variable
    assert build({"_target_": f"{HERE}.Leaf", "size": 1}, size={"_target_": "os.system"}).size == {"_target_": "os.system"}  # never built


def test_omegaconf_resolves_and_matches_plain():
    config = OmegaConf.create({"units": "K", "node": {**VARIABLE, "units": "${units}"}})
    assert build(config.node) == build(VARIABLE)
    assert build(VARIABLE) == Variable(["lat"], "K", "temperature")
    assert isinstance(build({"_target_": "twinsim.base.Bounds", "lower": 0.0, "upper": 1.0}), Bounds)
    assert isinstance(build({"_target_": "optax.adamw", "learning_rate": 1e-3}), optax.GradientTransformation)
    with pytest.raises(BadInput, match="config: "):
        build(OmegaConf.create({"_target_": "optax.sgd", "learning_rate": "${nowhere}"}))
    with pytest.raises(BadInput, match="config: "):
        build(OmegaConf.create({"_target_": "optax.sgd", "learning_rate": "???"}))


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"_target_": "twinsim.base.Variabel"}, "twinsim.base has no 'Variabel', did you mean twinsim.base.Variable?"),
        ({"_target_": "twinsim.bse.Variable"}, "twinsim has no 'bse', did you mean twinsim.base?"),
        ({"_target_": "optax.admw"}, "did you mean optax.ad"),
        ({**VARIABLE, "unit": "K"}, "twinsim.base.Variable has no argument 'unit', did you mean 'units'? It takes dims, units, long_name"),
        ({"_target_": "twinsim.base.Variable", "dims": []}, "missing a required argument: 'units', it takes dims, units"),
        ({"_target_": "optax.sgd", "learning_rate": 1, "_args_": 3}, "expected a list as `_args_`"),
        ({"_target_": "optax.sgd", "_args_": [1], "learning_rate": 1}, "multiple values for argument 'learning_rate'"),
        ({"_target_": f"{HERE}.Tree", "left": {"_target_": f"{HERE}.fails"}}, "could not be built: the reason"),
        ({"units": "K"}, "expected a table with a `_target_`"),
        ([VARIABLE], "expected a table with a `_target_`"),
    ],
)
def test_wrong_names_and_arguments_are_one_sentence(parts, node, says):
    with pytest.raises(BadInput) as caught:
        build(node)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_missing_package_is_named(parts, monkeypatch, tmp_path):
    import generators

    (tmp_path / "needs_more.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.setattr(generators, "__path__", [*generators.__path__, str(tmp_path)])
    with pytest.raises(BadInput, match="needs the package 'a_package_that_is_nowhere'"):
        resolve("generators.needs_more.Net")


def test_config_hash():
    config = {"a": 1, "b": {"c": [1.5, None, True], "d": "é"}}
    assert config_hash(config) == "46d5b27088" == config_hash({"b": {"d": "é", "c": (1.5, None, True)}, "a": np.int64(1)})
    assert config_hash(OmegaConf.create({"a": 1, "b": "${a}"})) == config_hash({"a": 1, "b": 1})
    assert len({config_hash(one) for one in ({"a": 1}, {"a": 2}, {"a": "1"}, {"a": True}, {"b": 1}, {"a": [1]}, {})}) == 7
    for wrong in ({"a": float("nan")}, {"a": {1: 2}}, {"a": object()}, {"a": b"x"}):
        with pytest.raises(BadInput, match="^config"):
            config_hash(wrong)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"components": 5}, "config domain.components: expected a table with the `_target_` of a Components or null, got 5"),
        ({"splits": 5}, "config domain.splits: expected a table, got 5"),
        ({"splits": {"train": {"time": 3}}}, "config domain.splits.train: expected a list, got {'time': 3}"),
        ({"season": 1}, "config domain.season: expected true or false, got 1"),
        ({"window": 1.5}, "config domain.window: expected a whole number, got 1.5"),
        ({"quantities": {"tas": "K"}}, "config domain.quantities.tas: expected a table with the `_target_` of a Quantity, got 'K'"),
        ({"dataset": 5}, "config domain: domains.climate.domain.Climate could not be built from "),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_by_its_place(values, says):
    node = {"_target_": "domains.climate.domain.Climate", "name": "n", "dataset": None, "quantities": {"tas": None}, "splits": {}}
    node["quantities"] = {"tas": {"_target_": "domains.climate.domain.Quantity", "units": "K", "long_name": "t"}}
    with pytest.raises(BadInput) as caught:
        build({**node, **values}, "domain")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_of_a_part_keeps_its_words_its_place_and_its_cause(parts):
    with pytest.raises(
        BadInput, match=r"config it: generators.parts_for_test.fails could not be built: the reason \(ValueError in "
    ) as caught:
        build({"_target_": f"{HERE}.fails"}, "it")
    assert isinstance(caught.value.__cause__, ValueError)
    parts.ZeroDivision = type("Leaf", (), {"__init__": lambda self: 1 / 0, "__module__": HERE})
    with pytest.raises(ZeroDivisionError):  # no mistake of a config
        build({"_target_": f"{HERE}.ZeroDivision"})


def test_a_part_that_was_asked_to_stop_says_so_itself(parts):
    def leaves():
        raise Preempted("asked")

    leaves.__module__ = HERE
    parts.leaves = leaves
    with pytest.raises(Preempted, match="asked"):
        build({"_target_": f"{HERE}.Tree", "left": {"_target_": f"{HERE}.leaves"}})


def test_a_package_that_an_extra_brings_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for name in [name for name in sys.modules if name.startswith("domains.robotics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(domains, "robotics", raising=False)
    brought = [f'mujoco<5,>=3.17; extra == "{extra}"' for extra in ("dev", "robotics")]
    monkeypatch.setattr(metadata, "requires", lambda _: brought)
    with pytest.raises(BadInput, match=r"'mujoco', which is not installed: pip install 'twinsim\[robotics\]'"):
        resolve("domains.robotics.push.PlanarPush", "domain")
