import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from robench.reports import Results, provenance, tables
from robench.reports.page import page
from robench.reports.trace import Trace, record_id

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
    assert outline.tags.count("svg") == 7 and outline.tags.count("table") == 11
    assert len(outline.ids) == len(set(outline.ids))
    for section in ("leaderboard", "rob-f", "others", "trade-off", "cost", "over-eps", "overlap",
                    "training", "measured", "records"):
        assert section in outline.ids and ("href", f"#{section}") in outline.attributes


def test_references_inside_figures_lead_somewhere(outline, html):
    references = re.findall(r'(?:url\(|href=")#([^")]+)', html)
    assert references and set(references) <= set(outline.ids)


def test_every_link_leads_to_a_row_or_a_section(outline):
    links = {part for name, value in outline.attributes if name in ("href", "data-rows")
             for part in value.split() if part.startswith("#")}
    assert len(links) > 80 and {link[1:] for link in links} <= set(outline.ids)


def test_every_record_is_there_once(outline, campaign):
    ids = {record_id(record) for record in (*campaign.records, *campaign.transfers)}
    assert len(ids) == len(campaign.records) + len(campaign.transfers)
    assert {one for one in outline.ids if one.startswith("r-")} == ids


def test_numbers_know_their_records(campaign):
    trace = Trace(campaign.records)
    for line in tables.leaderboard(campaign.records).to_dict("records"):
        records = {f"#{record_id(r)}": r for r in campaign.records}
        for name in ("clean", "fgsm", "pgd-20", "cw", "autoattack", "worst", "delta"):
            behind = [records[link] for link in trace(line, name)]
            if name == "delta":
                both = {line["defense"], "trades"}
                assert {r.defense for r in behind} == (set() if line["baseline"] else both)
                continue
            assert {r.defense for r in behind} == {line["defense"]}
            assert {r.seed for r in behind} == {0, 1} and all(r.ranked for r in behind)
            if name != "worst":
                counts = [r.n_correct if name == "clean" else r.n_robust for r in behind]
                assert line[name] == pytest.approx(100 * sum(counts) / len(counts) / behind[0].n)


def test_flags_are_linked_from_where_the_page_lies(campaign):
    folder = Path(campaign.records[0].flags).parent
    names = [Path(record.flags).name for record in campaign.records if record.flags]
    links = re.findall(r'href="\./([^"]+)"', page(campaign, folder))
    assert sorted(links) == sorted(names)
    assert str(folder) not in page(campaign) and str(folder) not in page(campaign, folder)


def test_only_the_script_of_the_page_may_run(html):
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    code = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{code}'" in html and "unsafe-eval" not in html


def test_the_page_needs_no_network(outline, html):
    assert not {"link", "img", "iframe", "object"} & set(outline.tags)
    fetching = [value for name, value in outline.attributes
                if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert all(value.startswith("#") for value in fetching)
    assert "default-src 'none'" in html
    assert not re.search(r"url\((?!#)|@import", html)


def test_figures_are_described_and_take_the_colors_of_the_page(html):
    assert html.count('<svg role="img" aria-label="') == 7
    assert "peeraid 85.2 and 50.0" in html
    assert "stroke: var(--ink)" in html and "color-scheme: light dark" in html
    assert "#ffffff" not in "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))


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
    assert re.search(r'<td class="[^"]*alarm"><a [^>]+>failed</a>\n?</td>', html)
    assert re.search(r'<td class="words alarm">test \(!\)\n?</td>', html)
    assert "trades (best): cw: failed: no memory" in html


def test_numbers_with_units_carry_their_sort_key(html):
    assert 'data-sort="11173962">11.2 M' in html


def test_hostile_text_has_no_way_into_a_link(make_record):
    cell = provenance._flags(make_record(flags="javascript:alert(1)//\\x"), Path("/"))
    assert cell.links == ("./javascript%3Aalert%281%29//%5Cx",)


def test_an_empty_page_says_so():
    assert "Nothing is ranked yet." in page(Results())
