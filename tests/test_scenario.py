"""Scenario files: what is wrong is said in one sentence with its line, and nothing in a file can run."""

import datetime
import os
import time
from typing import Annotated, Literal

import pydantic
import pytest

from twinsim import scenario
from twinsim.base import BadInput


class Period(pydantic.BaseModel):
    start: datetime.date
    days: int = 7


class Heat(pydantic.BaseModel):
    kind: Literal["heat"]
    quantile: float = pydantic.Field(gt=0, lt=1)


class Rain(pydantic.BaseModel):
    kind: Literal["rain"]
    amount: float


class Weather(scenario.Scenario):
    warming: float = 0.0
    period: Period | None = None
    events: list[Annotated[Heat | Rain, pydantic.Field(discriminator="kind")]] = []
    area: str = "europe"


HEAD = """\
title: A hot week
domain: climate/generate
asks: What does a heatwave look like?
command: twinsim run scenarios/climate/heatwave.yaml
takes: a minute on two cores
expect: higher temperatures over land
members: 5
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refusal(path, overrides=None):
    with pytest.raises(BadInput) as caught:
        scenario.load(path, Weather, overrides)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_good_file(write):
    text = HEAD + "warming: 2\nperiod: {start: 2020-07-01, days: 3}\nevents:\n  - {kind: heat, quantile: 1e-1}\narea: no\n"
    got = scenario.load(write(text), Weather)
    assert got.members == 5 and got.warming == 2.0 and got.seed == 0 and got.formats == []
    assert got.period == Period(start=datetime.date(2020, 7, 1), days=3)
    assert got.events == [Heat(kind="heat", quantile=0.1)]  # YAML 1.1 reads 1e-1 as text
    assert got.area == "no"  # YAML 1.1 reads a flag


def test_comments_and_byte_order_mark_are_fine(write):
    assert scenario.load(write(b"\xef\xbb\xbf# costs ${5} & more\n" + HEAD.encode()), Weather).members == 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("membrs: 3", "unknown key 'membrs', did you mean 'members'?"),
        ("warming: true", "warming: expected a number, got True"),
        ("seed: true", "seed: expected a whole number, got True"),
        ("seed: '3'", "seed: expected a whole number, got '3'"),
        ("seed: 1.5", "seed: expected a "),
        ("seed: -1", "seed: expected greater than or equal to 0, got -1"),
        ("formats: [netcfd]", "formats.0: expected 'netcdf', got 'netcfd'"),
        ("period: {start: 2020-07-01, dayz: 3}", "unknown key 'dayz', did you mean 'days'?"),
        ("events: [{kind: hail}]", "events.0: expected 'kind' to be one of 'heat', 'rain', got 'hail'"),
        ("events: [{kind: heat, quantil: 0.1}]", "unknown key 'quantil', did you mean 'quantile'?"),
        ("events: [{kind: heat}]", "key events.0.quantile is missing"),
        ("period: {start: 2020-13-01}", "period.start: expected"),
        ("members: 5", "expected each key once, got 'members' again"),
        ("warming: .nan", "expected a finite number, got '.nan'"),
        ("warming: -.inf", "expected a finite number"),
        ("warming: 1e999", "expected a finite number"),
        ("seed: " + "9" * 5000, "expected a number of at most 18 digits"),
        ("area: ${oc.env:HOME}", "got the interpolation '${oc.env:HOME}'"),
        ("${area}: x", "got the interpolation"),
        ("_target_: os.system", "names that start with an underscore are refused"),
        ("period: {_target_: os.system}", "names that start with an underscore are refused"),
        ("area: !!python/object/apply:os.system [id]", "got the YAML tag"),
        ("area: !!str 3", "got the YAML tag"),
        ("area: ! 3", "got the YAML tag '!'"),
        ("area: &a x", "alias or anchor 'a'"),
        ("area: *a", "alias or anchor 'a'"),
        ("<<: {seed: 3}", "got '<<'"),
        ("? [a, b]\n: c", "expected a name before the colon, got a list or a table"),
        ("area: " + "[" * 13 + "]" * 13, "expected at most 12 levels"),
        ("area: " + "[" * 100_000, "expected at most 12 levels"),
        ("area: [" + "1," * 20_000 + "]", "expected at most 10000 values"),
        ('area: "\\ud800"', "half of a surrogate pair"),
        ("area: [1, 2", "expected one YAML document"),
        ("area: 'x", "expected one YAML document"),
        ("--- {}", "expected one YAML document"),
    ],
)
def test_each_fault_is_one_sentence_with_its_line(write, line, says):
    began = time.process_time()
    message = refusal(write(HEAD + line + "\n"))
    assert says in message
    assert f"a.yaml, line {8 if 'YAML document' not in says else ''}" in message
    assert time.process_time() - began < 5  # what is hostile must not cost more than this


@pytest.mark.parametrize("key", ["title", "asks", "command", "takes", "expect", "members"])
def test_opening_is_required(write, key):
    text = "".join(line for line in HEAD.splitlines(True) if not line.startswith(key))
    assert f"key {key} is missing" in refusal(write(text))


def test_opening_is_one_line_each(write):
    assert "asks: expected one line" in refusal(write(HEAD.replace("asks: What", "asks: |\n  Why?\n  What")))


def test_union_fault_names_the_line_inside_it(write):
    message = refusal(write(HEAD + "events:\n  - kind: heat\n    quantile: 0.5\n  - kind: heat\n    quantile: 2.0\n"))
    assert "line 12: events.1.quantile: expected less than 1, got 2.0" in message


def test_further_faults_are_counted(write):
    message = refusal(write(HEAD + "seed: -1\nwarming: x\n"))
    assert message.endswith("line 8: seed: expected greater than or equal to 0, got -1 (so has one more place something wrong)")


def test_alias_bomb_is_refused_at_once(write):
    rows = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    began = time.process_time()
    assert "alias or anchor" in refusal(write("\n".join(rows)))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "got an empty file"),
        (b"- 1\n", "expected `name: value` lines"),
        (b"just words\n", "expected `name: value` lines"),
        (b"title: a\n\0\n", "line 2: expected text, got a binary file"),
        (b"title: a\nasks: \xff\n", "line 2: expected UTF-8 text, got byte 0xff"),
        (b"title: a\x07\n", "control character"),
        (b"#" * (256 * 1024 + 1), "expected at most 256 kB"),
    ],
)
def test_files_that_are_no_text(write, raw, says):
    assert says in refusal(write(raw))


def test_what_is_no_file(tmp_path, write):
    link = tmp_path / "link.yaml"
    link.symlink_to(write(HEAD))
    assert "got a link" in refusal(link)
    assert "got a folder" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "device" in refusal(tmp_path / "pipe.yaml")  # and does not wait for a writer


def test_overrides(write):
    path = write(HEAD + "period:\n  start: 2020-07-01\nevents:\n  - {kind: rain, amount: 3}\n")
    changes = {"members": "7", "period.days": 2, "events.0.amount": "4.5", "title": "Hot: and dry", "formats": "[netcdf]", "area": '"3"'}
    got = scenario.load(path, Weather, changes)
    assert (got.members, got.period.days, got.events[0].amount, got.title) == (7, 2, 4.5, "Hot: and dry")
    assert got.formats == ["netcdf"] and got.area == "3"
    merged = scenario.load(path, Weather, {"period": {"days": 4}})  # a table changes only what it names
    assert merged.period == Period(start=datetime.date(2020, 7, 1), days=4)
    assert scenario.load(write(HEAD, "b.yaml"), Weather, {"period.start": "2021-01-01"}).period.days == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"membrs": "3"}, "set.membrs: unknown key 'membrs', did you mean 'members'?"),
        ({"members": "0"}, "set.members: members: expected greater than or equal to 1, got 0"),
        ({"members": True}, "set.members: members: expected a whole number, got True"),
        ({"area": "${oc.env:HOME}"}, "set.area: expected plain text, got the interpolation"),
        ({"_target_": "os.system"}, "underscore"),
        ({"period.__class__": "x"}, "underscore"),
        ({"period": {"_target_": "x"}}, "underscore"),
        ({"area": "[&a 1, *a]"}, "set.area: expected plain values, got the YAML alias"),
        ({"area": "[1"}, "set.area: expected a YAML value"),
        ({"title.x": "1"}, "expected a table or a list at title"),
        ({"events.3.amount": "1"}, "expected an index below 0, got '3'"),
        ({"warming": float("nan")}, "expected a finite number"),
        ({"area": object()}, "expected a short text"),
    ],
)
def test_bad_overrides_name_themselves(write, change, says):
    assert says in refusal(write(HEAD + "events: []\n"), change)


def test_find(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "climate").mkdir()
    path = write(HEAD, "climate/heatwave.yaml")
    assert scenario.find("climate/heatwave", tmp_path) == path
    assert scenario.find("scenarios/climate/heatwave.yaml", tmp_path) == path  # as typed in the checkout, from anywhere
    assert scenario.find(str(path), tmp_path) == path
    for wrong in ("climate/heatwav", "heatwave", "climat/heatwave", "heatwve.yaml"):
        with pytest.raises(BadInput, match="did you mean 'climate/heatwave'"):
            scenario.find(wrong, tmp_path)
    for wrong in ("../../etc/passwd", "/etc/nothing.yaml", "../x.yaml", "zzz", ""):
        with pytest.raises(BadInput, match=r"scenario .*expected"):
            scenario.find(wrong, tmp_path)


def test_inside(tmp_path):
    (tmp_path / "data").mkdir()
    assert scenario.inside(tmp_path, "data/a.nc") == (tmp_path / "data/a.nc").resolve()
    (tmp_path / "data" / "out").symlink_to("/etc")
    for wrong in ("../a.nc", "/etc/passwd", "data/../../a", "data/out/passwd", "a\0b"):
        with pytest.raises(BadInput, match="expected a file"):
            scenario.inside(tmp_path, wrong)
