import re
from html.parser import HTMLParser

import pytest

from robench.reports import Results
from robench.reports.page import page

HOSTILE = "<img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Checks that elements are closed in order; collects tags, ids, attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.text = [], [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html(campaign):
    return page(campaign)


@pytest.fixture(scope="module")
def outline(html):
    return Outline(html)


def test_the_page_is_whole(outline, html):
    assert html.startswith("<!doctype html>\n<html lang=\"en\">")
    assert outline.tags.count("svg") == 4 and outline.tags.count("table") == 6
    assert len(outline.ids) == len(set(outline.ids))
    for section in ("leaderboard", "rob-f", "others", "figures", "measured"):
        assert section in outline.ids and ("href", f"#{section}") in outline.attributes


def test_references_inside_figures_lead_somewhere(outline, html):
    references = re.findall(r'(?:url\(|href=")#([^")]+)', html)
    assert references and set(references) <= set(outline.ids)


def test_the_page_needs_no_network(outline, html):
    assert not {"link", "img", "iframe", "object"} & set(outline.tags)
    fetching = [value for name, value in outline.attributes
                if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith("#") for value in fetching)
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)|@import", html)


def test_figures_are_described_and_take_the_colors_of_the_page(html):
    assert html.count('<svg role="img" aria-label="') == 4
    assert "peeraid 85.2 and 50.0" in html
    assert "stroke: var(--ink)" in html and "prefers-color-scheme: dark" in html


def test_everything_is_escaped(make_record, make_epoch, make_transfer):
    evil = dict(defense=HOSTILE, model=HOSTILE, recipe=HOSTILE, checkpoint=HOSTILE, dataset=HOSTILE)
    known = dict(evil, attack=HOSTILE, threat=f"Linf:{HOSTILE}")
    results = Results(
        [
            make_record(**known, source=HOSTILE, device=HOSTILE, warnings=(HOSTILE,),
                        notes=(HOSTILE,), defense_config={HOSTILE: HOSTILE}, selection=HOSTILE,
                        teacher_sha256={HOSTILE: HOSTILE}, attack_config={"x": HOSTILE}),
            make_record(**known, seed=1, status="failed", n_robust=0, error=HOSTILE),
            make_record(**evil, ranked=False),
            make_record(**evil, role="curve", threat="Linf:2/255"),
        ],
        [make_transfer(**known, network=HOSTILE)],
        [make_epoch(defense=HOSTILE, model=HOSTILE, dataset=HOSTILE, recipe=HOSTILE)],
    )
    html = page(results)
    outline = Outline(html)
    assert "<img" not in html and "img" not in outline.tags
    assert not [name for name, _ in outline.attributes if name.startswith("on")]
    assert any(HOSTILE in text for text in outline.text)


def test_failures_and_test_selection_stand_out(make_record):
    records = [make_record(selection="test"),
               make_record(selection="test", attack="cw", status="failed", n_robust=0,
                           error="no memory")]
    html = page(Results(records))
    assert re.search(r'<td class="[^"]*alarm">failed</td>', html)
    assert re.search(r'<td class="words alarm">test \(!\)</td>', html)
    assert "trades (best): cw: failed: no memory" in html


def test_numbers_with_units_carry_their_sort_key(html):
    assert 'data-sort="11173962">11.2 M' in html


def test_an_empty_page_says_so():
    assert "Nothing is ranked yet." in page(Results())
