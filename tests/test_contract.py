"""Every domain, generator and scenario found under conf/ and scenarios/ keeps the contract of `twinsim.base`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import yaml
from building import built as made
from building import rough_jit
from flax import nnx

from twinsim import cli, run, scenario
from twinsim.base import Domain, Example, Question, Score, Spec
from twinsim.build import build, resolve

ROOT = Path(__file__).parents[1]
DOMAINS = sorted(path.relative_to(ROOT / "conf/domain").with_suffix("").as_posix() for path in (ROOT / "conf/domain").rglob("*.yaml"))
GENERATORS = sorted(path.stem for path in (ROOT / "conf/generator").glob("*.yaml"))
SCENARIOS = scenario.names()
TRIMMED = {  # what one year or two show of a domain, four years show no better
    "climate/week": ["domain.splits.train=[{branch: cold1}]"],
    "city/twin": ["domain.record.days=400", "domain.splits={train: [2022-01-01, 2022-10-31], test: [2022-11-01, 2023-02-01]}"],
    "city/commuting": ["domain.dataset.count=40", "domain.regression.rounds=4"],
    "city/roadside": ["domain.factors=3", "domain.modes=6"],
    "city/loops": ["domain.factors=6", "domain.modes=4"],
    **{
        f"robotics/{name}": ["domain.demonstrations.count=4", "domain.exam_starts=6"]
        for name in ("push", "arm_push", "pick", "reach", "inspect", "landing", "walk")
    },
    "robotics/tosses": ["domain.groups=60", "domain.tested=12", "domain.components=6"],
    "robotics/push_model": ["domain.record.count=6", "domain.record.held_out=6"],
    **{
        name: ["domain.splits.train=[{branch: cold1}, {branch: warm1}]", "domain.components.count=200"]
        for name in ("climate/generate", "climate/downscale")
    },
}


NOWHERE = {"archive": f"{ROOT}/nowhere", "robot": f"{ROOT}/nowhere/arm.urdf", "tool": "flange"}  # what a user gives


FEW = 6  # samples at a time, everywhere: what works on another number is another program to compile


class Built(NamedTuple):
    """A domain with what takes seconds to make: all of it made once, and its functions compiled once."""

    domain: Domain
    statistics: Any
    rows: tuple  # a few training samples and their conditions, `[FEW, ...]`, from all over the split
    opening: tuple  # the first ones, and their conditions
    examples: Example  # the first block of them
    encode: Callable
    decode: Callable


BUILT: dict[str, Built] = {}


def composed(name: str, *more: str) -> dict:
    text = (ROOT / f"conf/domain/{name}.yaml").read_text()
    given = [f"{key}={value}" for key, value in NOWHERE.items() if f"{key}: ???" in text]
    return run.resolve(cli._compose([f"domain={name}", *given, *TRIMMED.get(name, []), *more]))


def ships(name: str) -> bool:
    """Whether the domain's truth comes with twinsim: nothing to download and nothing to simulate.

    Read from the files, of which it is asked before the first test runs: to compose all of them takes seconds.
    """
    text = (ROOT / f"conf/domain/{name}.yaml").read_text()
    made = any(getattr(resolve(target, "domain"), "makes_data", False) for target in re.findall(r"_target_: ([\w.]+)", text))
    parents = [each for each in yaml.safe_load(text).get("defaults", []) if isinstance(each, str) and each != "_self_"]
    return "???" not in text and not made and all(ships(parent) for parent in parents)


SHIPPED = [name for name in DOMAINS if ships(name)]


@pytest.fixture(autouse=True)
def many():
    """Fitting and judging work on many samples at once, where a field stands for every sample; what is traced may not do so."""
    with jax.numpy_rank_promotion("allow"):
        yield


def strictly(function):
    """`function` of one sample as one program, in which no rank is promoted."""
    program = rough_jit(function)

    def called(*given):
        with jax.numpy_rank_promotion("raise"):
            return program(*given)

    return called


def built_once(name: str) -> Built:
    if name not in BUILT:
        domain = build(composed(name)["domain"])
        statistics, source = domain.fit(), domain.source("train")
        rows = source[np.linspace(0, len(source) - 1, FEW).round().astype(int)]
        opening, examples = source[np.arange(FEW)], next(iter(domain.examples(statistics)))
        BUILT[name] = Built(domain, statistics, rows, opening, examples, strictly(domain.encode), strictly(domain.decode))
    return BUILT[name]


@pytest.fixture
def built(request):
    return built_once(request.param)


every_shipped = pytest.mark.parametrize("built", SHIPPED, indirect=True)


def one(values, index=0):
    return {name: jnp.asarray(value[index]) for name, value in values.items()}


# ---------------------------------------------------------------- configuration


def test_there_is_something_to_judge():
    assert len(DOMAINS) >= 5 and len(GENERATORS) >= 3 and len(SCENARIOS) >= 4 and len(SHIPPED) >= 2


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_composes_and_may_be_built(name):
    config = composed(name)
    run.check(config)
    assert run.places(config).model.parent == Path("out/models")
    assert (name in SHIPPED) <= ("nowhere" not in str(config["domain"]))


@pytest.mark.parametrize("name", DOMAINS)
def test_domain_and_its_scenario_belong_together(name):
    config = composed(name)
    assert config["scenario"] in SCENARIOS
    assert run.read_scenario(config).scenario.domain == config["domain"]["name"]


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_composes_with_every_scale(name):
    for path in sorted((ROOT / "conf/scale").glob("*.yaml")):
        required = ["scale.slurm.account=a", "scale.slurm.partition=p"] if "???" in path.read_text() else []
        run.check(run.resolve(cli._compose([f"generator={name}", f"scale={path.stem}", *required])))


# ---------------------------------------------------------------- domains


@every_shipped
def test_variables_are_described(built):
    domain, (sample, condition) = built.domain, built.rows
    assert set(sample) == set(domain.sample) and set(condition) == set(domain.condition)
    for name, variable in domain.sample.items():
        assert variable.units and variable.long_name and variable.lower < variable.upper
        assert sample[name].shape == (FEW, *domain.shape) and sample[name].dtype == np.float32


@every_shipped
def test_examples_have_the_shape_that_the_spec_says_and_are_normalised(built):
    spec, block = built.domain.spec(built.statistics), built.examples
    count = len(block.target)
    assert block.target.shape == (count, *spec.grid, spec.channels)
    assert block.fields.shape == (count, *spec.grid, spec.fields) and block.scalars.shape == (count, spec.scalars)
    assert len(spec.periodic) == len(spec.grid)
    assert all(np.isfinite(part).all() for part in block)
    assert 0.3 < np.asarray(block.target).std() < 3  # of order one, which the noise levels of a generator stand on


@every_shipped
def test_encode_agrees_with_the_spec(built):
    spec = built.domain.spec(built.statistics)
    fields, scalars = built.encode(built.statistics, one(built.rows[1]))
    assert fields.shape == (*spec.grid, spec.fields) and scalars.shape == (spec.scalars,)


@every_shipped
def test_decode_gives_back_a_training_sample(built):
    """Of the first examples, as the variables of the domain. Exact up to rounding where nothing is left out.

    Components leave out what lies beyond them, and means predicted out of fold differ from those fitted on all: there the
    decoded sample has to be closer to its own truth than any other day is.
    """
    domain, (sample, condition) = built.domain, built.opening
    for index in range(FEW):
        back = built.decode(built.statistics, jnp.asarray(built.examples.target[index]), one(condition, index))
        for name, truth in sample.items():
            assert back[name].shape == domain.shape
            there = condition.get(f"measured_{name}", np.ones_like(truth))[index] > 0  # where a record has a gap, nothing is known
            own = float(np.sqrt(np.square(back[name] - truth[index])[there].mean()))
            apart = float(np.sqrt(np.square(truth[(index + 2) % FEW] - truth[index])[there].mean()))
            assert own < 0.75 * apart, name


@every_shipped
def test_decode_is_differentiable(built):
    condition, target = one(built.rows[1]), jnp.asarray(built.examples.target[0])

    def total(target):
        decoded = built.domain.decode(built.statistics, target, condition)
        return sum(jnp.sum(values / jax.lax.stop_gradient(jnp.max(jnp.abs(values)))) for values in decoded.values())

    gradient = strictly(jax.grad(total))(target)
    assert gradient.shape == target.shape and bool(jnp.isfinite(gradient).all()) and bool((gradient != 0).any())


@every_shipped
def test_decode_of_noise_keeps_the_rules(built):
    spec, condition = built.domain.spec(built.statistics), one(built.rows[1])
    noise = jax.random.normal(jax.random.key(0), (*spec.grid, spec.channels))
    sample = built.decode(built.statistics, noise, condition)
    assert all(bool(jnp.isfinite(values).all()) for values in sample.values())
    for rule, broken in strictly(built.domain.check)(sample, condition).items():
        if "block mean" in rule or rule.endswith("below 0") or " below 0 " in rule:  # enforced, not learnt
            assert float(broken) <= run.TOLERANCE, rule


@every_shipped
def test_truth_keeps_the_rules_and_a_broken_sample_does_not(built):
    domain, (sample, condition) = built.domain, built.rows
    check = rough_jit(domain.check)
    for index in range(len(next(iter(sample.values())))):
        kept = check(one(sample, index), one(condition, index))
        assert kept and all(float(broken) <= run.TOLERANCE for broken in kept.values()), kept
    ruined = {name: -1e6 * jnp.ones(domain.shape) for name in domain.sample}
    assert any(float(broken) > 1 for broken in check(ruined, one(condition)).values())


@every_shipped
def test_simulate_returns_a_sample(built):
    domain, (sample, condition) = built.domain, built.rows
    outcome = domain.simulate(one(sample), one(condition), jax.random.key(0))
    assert {name: values.shape for name, values in outcome.items()} == {name: domain.shape for name in domain.sample}


@every_shipped
def test_exam_is_not_made_of_what_was_trained_on(built):
    domain = built.domain
    question, truth = domain.exam(members=3, most=FEW)
    assert isinstance(question, Question) and question.members == 3
    assert run.items_of(question) == FEW and all(len(values) == FEW for values in truth.values())
    assert all(len(values) == FEW for values in question.condition.values())
    days = getattr(domain, "as_days", lambda samples: samples)  # samples of several days overlap
    train, truth = days(domain.source("train")[slice(None)][0]), days(truth)
    for name, values in truth.items():
        if name not in train or train[name].shape[1:] != values.shape[1:]:
            continue  # answers of many draws each, whose domain has a test of its own
        seen = np.asarray(train[name]).reshape(len(train[name]), -1)
        assert not any((seen == each.ravel()).all(1).any() for each in values), name


@pytest.mark.slow
@every_shipped
def test_baselines_draw_what_the_domain_generates_and_earn_the_same_scores(built):
    domain, statistics = built.domain, built.statistics
    question, truth = domain.exam(members=2, most=FEW)
    tables = {}
    for name, baseline in domain.baselines(statistics).items():
        drawn = baseline(question.condition, 2, 0)
        assert {key: values.shape for key, values in drawn.items()} == {key: (2, *values.shape) for key, values in truth.items()}
        assert all(np.isfinite(values).all() for values in drawn.values()), name
        tables[name] = domain.score(drawn, truth, question.condition).table
    assert len(tables) >= 2
    (keys,) = {tuple(table) for table in tables.values()}
    assert keys and all(isinstance(score, Score) for table in tables.values() for score in table.values())


@every_shipped
def test_answer_has_names_units_and_says_that_it_is_synthetic(built):
    domain = built.domain
    question, truth = domain.exam(members=2, most=FEW)
    made = domain.dataset_of({name: np.stack([values, values]) for name, values in truth.items()}, question)
    assert made.sizes["member"] == 2
    alone = domain.dataset_of({name: values[None] for name, values in truth.items()}, question)  # as it is written, some at a time
    xr.testing.assert_identical(alone.drop_vars("member"), made.isel(member=[1]).drop_vars("member"))
    assert all("member" not in made[name].dims for name in set(made.coords) - {"member"})
    assert set(truth) <= set(made.data_vars)
    for name, variable in getattr(domain, "outcome", domain.sample).items():
        assert made[name].attrs["units"] == variable.units and "synthetic" in made[name].attrs["long_name"]
    assert domain.licence and domain.limits and all(len(each["sha256"]) == 64 for each in domain.inputs())


# ---------------------------------------------------------------- generators

FIELD = Spec((8, 8), 2, 3, 2, (False, True))
SPECS = {"field": FIELD, "vector": Spec((1,), 12, 0, 3, (False,)), "motion": Spec((6,), 4, 2, 5, (False,))}
OWN = {"ResidualMLP": "vector", "Ensemble": "motion"}  # networks that read no fields of any grid


SMALL = {  # of the same parts, fewer of each: most of this test is compilation
    "dit": ["generator.net.width=32", "generator.net.depth=1"],
    "components": ["generator.net.width=32", "generator.net.depth=1"],
    "world_model": ["generator.net.width=32", "generator.net.depth=1"],
    **{name: ["generator.net.widths=[8,12]", "generator.net.embedding=32"] for name in ("unet", "flow")},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_learns_and_draws_on_a_tiny_spec(name):
    node = run.resolve(cli._compose([f"generator={name}", *SMALL.get(name, [])]))["generator"]
    spec = SPECS[OWN.get(node["net"]["_target_"].rpartition(".")[2], "field")]
    module = made(lambda: build(node, spec=spec, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    shapes = ((*spec.grid, spec.channels), (*spec.grid, spec.fields), (spec.scalars,))
    example = Example(*(jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    @rough_jit
    def step(params):
        return jax.value_and_grad(lambda p: nnx.merge(graph, p, rest).loss(example, jax.random.key(0)))(params)

    loss, gradient = step(params)
    assert loss.shape == () and bool(jnp.isfinite(loss)) and 0 < float(loss) < 100
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))
    sample = rough_jit(lambda key: module.sample(example.fields, example.scalars, key))
    one, two = sample(jax.random.key(1)), sample(jax.random.key(2))
    assert one.shape == example.target.shape and bool(jnp.isfinite(one).all())
    assert bool((one != two).any()) and bool((sample(jax.random.key(1)) == one).all())
    assert 0.1 < float(one.std()) < 10  # silent at the start, it draws about a unit Gaussian


# ---------------------------------------------------------------- scenarios


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario_loads_and_asks(name):
    path = scenario.find(name)
    (brought,) = (word for word in cli._overrides([name]) if word.startswith("domain="))
    config = composed(brought.removeprefix("domain="), f"scenario={name}")
    asked = run.read_scenario(config).scenario
    text = (ROOT / f"conf/domain/{asked.domain}.yaml").read_text()
    elsewhere = " archive=FOLDER" * ("archive: ???" in text) + " robot=ARM.urdf tool=NAME" * ("robot: ???" in text)
    assert asked.domain in DOMAINS and asked.command == f"twinsim run {name}{elsewhere}"
    assert asked.title and asked.takes and asked.expect
    if elsewhere:
        return  # its truth is not here to be asked
    built = built_once(asked.domain)
    domain, statistics = built.domain, built.statistics
    question = domain.ask(asked, path.parent)
    items = run.items_of(question)
    assert question.members == asked.members and items >= 1
    assert set(domain.condition) <= set(question.condition)
    assert all(len(values) == items and np.isfinite(values).all() for values in question.condition.values())
    condition = one(question.condition)
    fields, scalars = built.encode(statistics, condition)
    spec = domain.spec(statistics)
    assert fields.shape[-1] == spec.fields and scalars.shape == (spec.scalars,)
    if question.constrain is not None:
        decode = lambda target: domain.decode(statistics, target, condition)  # noqa: E731
        assert question.constrain(decode, condition)
        missed = question.misses(built.decode(statistics, jnp.zeros((*spec.grid, spec.channels)), condition), condition)
        assert missed.shape == () and float(missed) > 0  # the mean day is no heat wave
