"""The report: one page that loads nothing, says everything in words, and is the same every time."""

import base64
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from twinsim import record, report
from twinsim.base import BadInput, Score, Scores, Section

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==")
HOSTILE = "<script src='https://evil.example/x.js'>alert(1)</script>\" onload=\"x"
FACTS = record.Facts(
    title="A run",
    description="A run.",
    command="twinsim run",
    config="config.yaml",
    config_hash="0123456789",
    seed=3,
    started="2026-01-01T00:00:00+00:00",
    ended="2026-01-01T00:05:00+00:00",
    inputs=[record.Input("control run", "https://example.org/a.zarr", "CC-BY-4.0", "ab" * 32, 1_500_000)],
    checkpoint="c" * 64,
    code={"commit": "d" * 40, "dirty": True},
    environment={"python": "3.11.7", "platform": "Linux", "devices": ["cpu:0 cpu", "cpu:1 cpu"], "packages": {"jax": "0.10.2"}},
)


SAYS = {"summary": "It is warm.", "highlights": {"Warming": "2.1 K"}, "limits": ["Rare events."]}


def two(better=0.1, worse=0.2, ideal=0.0, width=0.01):
    def scores(value):
        table = {
            "tas: CRPS": Score(value, ideal, "K", value - width, value + width),
            "tas: bias": Score(-value, 0.0, "K"),
            "residual": Score(value),
        }
        ramp = np.arange(1.0, 9.0)
        curves = {
            "spectrum/tas": ramp**-2,
            "spectrum of truth/tas": ramp**-2,
            "ranks/tas": np.ones(11) / 11,
            "quantiles/tas": ramp,
            "quantiles of truth/tas": ramp,
            "calibration/tas": np.stack([ramp / 9, ramp / 9]),
            "loss/step": ramp,
        }
        return Scores(table, curves)

    return {"model": scores(better), "climatology": scores(worse)}


@pytest.fixture(scope="module")
def sections():
    asked = Section(
        "What was asked",
        ["A warm winter."],
        {"The scenario": [["Field", "Value"], ["members", "5"]]},
        {"A map of temperature.": PNG},
    )
    return [asked, report.scorecard(two()), report.curves(two())]


@pytest.fixture(scope="module")
def page(sections, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write(path, "A warm winter", sections, FACTS, **SAYS)
    return path.read_text()


class Tags(html.parser.HTMLParser):
    """Tags with their attributes, whether each is closed in turn, and the text between them."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    def of(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def loads(tags):
    """Everything that a browser would fetch, run or go to."""
    for tag, attrs in tags.tags:
        for name, value in attrs.items():
            if name in ("src", "srcset", "href", "action", "data", "poster", "background", "style") or name.startswith("on"):
                yield f"{tag} {name}", value


def test_loads_nothing_from_outside(page):
    tags = Tags(page)
    found = list(loads(tags))
    assert all(
        value.startswith("#") if what == "a href" else what == "img src" and value.startswith("data:image/") for what, value in found
    )
    assert not tags.of("script") and not tags.of("link") and not tags.of("iframe") and not tags.of("base")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page  # and the browser is told to refuse anything else


def test_every_jump_has_its_place_and_every_name_is_used_once(page):
    tags = Tags(page)
    names = [attrs["id"] for _, attrs in tags.tags if "id" in attrs]
    assert len(names) == len(set(names))
    wanted = {attrs["href"][1:] for attrs in tags.of("a")}
    wanted |= {attrs["aria-labelledby"] for _, attrs in tags.tags if "aria-labelledby" in attrs}
    assert wanted <= set(names)


def test_says_what_it_must(page):
    tags = Tags(page)
    words = " ".join(" ".join(tags.words).split())
    assert tags.of("html") == [{"lang": "en"}]
    assert words.index("Synthetic data") < words.index("It is warm.") < words.index("What this cannot tell you")
    for said in ("Rare events.", "0123456789", "abababababab", "CC-BY-4.0", "1.5 MB", "c" * 64, "d" * 12, "not committed", "jax 0.10.2"):
        assert said in words
    assert "https://example.org/a.zarr" in words and "2 x cpu cpu" in words and "2.1 K" in words
    assert "@page { size: A4" in page and "color-scheme" in page


def test_pictures_and_tables_are_said_in_words(page):
    tags = Tags(page)
    assert len(tags.of("figure")) == len(tags.of("figcaption")) == len(tags.of("img")) == 8
    assert all(attrs["alt"] for attrs in tags.of("img"))
    assert len(tags.of("table")) == len(tags.of("caption")) and all(attrs["scope"] in ("col", "row") for attrs in tags.of("th"))
    for rows in re.findall(r"<tbody>(.*?)</tbody>", page, re.S):
        assert rows.count("<tr>") == rows.count('<th scope="row">')


def test_same_arguments_give_the_same_bytes(sections, page, tmp_path):
    again = [sections[0], report.scorecard(two()), report.curves(two())]
    report.write(tmp_path / "a.html", "A warm winter", again, FACTS, **SAYS)
    assert (tmp_path / "a.html").read_text() == page
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_hostile_text_stays_text(tmp_path):
    facts = record.Facts(
        **{
            **vars(FACTS),
            "command": HOSTILE,
            "agent": HOSTILE,
            "inputs": [record.Input(HOSTILE, HOSTILE, HOSTILE, "a" * 64, 1)],
            "environment": {"platform": HOSTILE, "variables": {"XLA_FLAGS": HOSTILE}, "packages": {HOSTILE: HOSTILE}},
        }
    )
    svg = f"<svg xmlns='http://www.w3.org/2000/svg'>{HOSTILE}</svg>".encode()
    section = Section(HOSTILE, [HOSTILE], {HOSTILE: [[HOSTILE, "a"], [HOSTILE, f"{HOSTILE}\n{HOSTILE}\0"]]}, {HOSTILE: svg})
    path = report.write(tmp_path / "a.html", HOSTILE, [section], facts, summary=HOSTILE, highlights={HOSTILE: HOSTILE}, limits=[HOSTILE])
    tags = Tags(path.read_text())
    assert not tags.of("script") and "\0" not in path.read_text()
    assert all(what in ("a href", "img src") for what, _ in loads(tags))
    assert " ".join(tags.words).count("alert(1)") >= 12


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (Section("a", (), {"t": [["a", "b"], ["c"]]}), "rows of one length"),
        (Section("a", (), {"t": []}), "rows of one length"),
        (Section("a", (), {}, {"f": b"GIF89a"}), "expected an SVG or PNG"),
        (Section("a", (), {}, {" ": PNG}), "expected a caption"),
    ],
)
def test_wrong_sections_are_one_sentence(tmp_path, section, says):
    with pytest.raises(BadInput, match=says):
        report.write(tmp_path / "a.html", "x", [section], FACTS)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def undrawn(monkeypatch):
    """Scorecards without their pictures, which take most of the time."""
    monkeypatch.setattr(report, "intervals", lambda scores: b"<svg/>")


def test_scorecard_marks_the_best_in_words(undrawn):
    section = report.scorecard(two(better=0.1, worse=0.2))
    rows = section.tables["tas: each score with its 95 % interval"]
    assert rows[0] == ["Score", "model", "climatology", "Ideal"]
    assert rows[1] == ["CRPS\nK", "0.100\n0.0900 to 0.110\nbest", "0.200\n0.190 to 0.210", "0"]
    assert rows[2] == ["bias\nK", "−0.100\nno interval\nbest", "−0.200\nno interval", "0"]
    assert list(section.tables)[1].startswith(report.TOGETHER)
    assert any("model in CRPS, bias" in caption for caption in section.figures)


def test_scorecard_is_fair_to_what_the_intervals_cannot_tell_apart(undrawn):
    cells = report.scorecard(two(better=0.1, worse=0.12, width=0.03)).tables["tas: each score with its 95 % interval"][1]
    assert cells[1].endswith("\nbest") and cells[2].endswith("\nlevel with best")
    cells = report.scorecard(two(better=1.2, worse=0.9, ideal=1.0)).tables["tas: each score with its 95 % interval"][1]
    assert cells[2].endswith("\nbest") and not cells[1].endswith("best")  # nearer to the ideal, not smaller
    cells = report.scorecard(two(better=float("nan"), worse=0.9)).tables["tas: each score with its 95 % interval"][1]
    assert cells[1] == "none" and cells[2].endswith("\nbest")
    same = report.scorecard(two(better=0.1, worse=0.1)).tables["tas: each score with its 95 % interval"][1]
    assert same[1].endswith("\nbest") and same[2].endswith("\nbest")


def test_text_scorecard_is_aligned_and_names_the_best():
    text = report.text_scorecard(two(better=0.1, worse=0.12, width=0.03))
    assert text.splitlines() == [
        "score           model  climatology  ideal",
        "tas: CRPS [K]   0.100        0.120      0  best: model; level: climatology",
        "tas: bias [K]  −0.100       −0.120      0  best: model",
        "residual        0.100        0.120      0  best: model",
    ]


def test_no_score_without_a_baseline():
    with pytest.raises(BadInput, match="expected a baseline beside the model"):
        report.scorecard({"model": two()["model"]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.1, "0.100"),
        (-1.234, "−1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (1234.6, "1235"),
        (123456.0, "1.23e+05"),
        (1.2e-5, "1.20e−05"),
        (0.9999, "1.00"),
        (float("inf"), "none"),
    ],
)
def test_numbers_have_at_least_three_digits(value, text):
    assert report._number(value) == text


def test_pictures_are_svg_that_refers_to_nothing(sections):
    pictures = [picture for section in sections[1:] for picture in section.figures.values()]
    assert len(pictures) == 7
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        links = [value for node in tree.iter() for name, value in node.attrib.items() if name.endswith("href")]
        assert all(link.startswith("#") for link in links)


def test_odd_curves():
    broken = {"a": Scores({}, {"spectrum/x": np.array([np.nan, 0.0, -1.0]), "ranks/x": np.zeros(3), "quantiles/x": np.full(3, np.nan)})}
    assert len(report.curves(broken).figures) == 3
    with pytest.raises(BadInput, match=r"got shape \(3, 4, 5\)"):
        report.curves({"a": Scores({}, {"x/y": np.zeros((3, 4, 5))})})


def luminance(colour):
    """Relative luminance, WCAG 2.1, definitions."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast():
    named = dict(re.findall(r"--(\S+): (#\w{6})", report._STYLE))
    for ink in (named["ink"], named["quiet"], named["accent"]):
        for paper in ("#ffffff", named["pale"], named["warm"]):
            assert contrast(ink, paper) >= 4.5  # WCAG 2.1 AA, 1.4.3
    assert contrast("#6b4500", named["warm"]) >= 4.5
    assert all(contrast(colour, "#ffffff") >= 3 for colour in report.COLOURS)  # 1.4.11, what carries meaning in a picture
