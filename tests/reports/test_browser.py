"""The page in a real browser: Chromium without a window, driven by Playwright."""

import hashlib
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from robench.reports import Results
from robench.reports.page import page

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = (HOSTILE, "</script><script>alert(1)</script>", "<!--", '"><svg onload=alert(1)>',
         "' onfocus=alert(1) x='", "${alert(1)}{{ 7 * 7 }}", "javascript:alert(1)")


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the dev extra")
    known = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, known)), None)
    if path is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def show(chromium, tmp_path):
    """Opens a page, and checks in the end that it was quiet and asked for nothing but itself."""
    contexts, noise, asked = [], [], set()
    path = tmp_path / "leaderboard.html"

    def opened(html, hash="", **options):
        path.write_text(html, encoding="utf-8")
        context = chromium.new_context(viewport={"width": 1300, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(10_000)
        tab.on("console", lambda message: noise.append(message.text))
        tab.on("pageerror", lambda error: noise.append(str(error)))
        tab.on("dialog", lambda dialog: (noise.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: asked.add(request.url.partition("#")[0]))
        tab.goto(path.as_uri() + hash)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not noise and asked == {path.as_uri()}


@pytest.fixture(scope="module")
def varied(make_record):
    """Two data sets, threat models, models and recipes; a failure, a warning, a test selection."""
    def record(dataset, threat, attack, i, model, recipe):
        failed = {"status": "failed", "n_robust": 0, "error": "no memory"}
        return make_record(**{
            "run": f"{dataset}-{i}", "dataset": dataset, "model": model, "recipe": recipe,
            "threat": threat, "attack": attack, "defense": f"d{i}", "n_robust": 100 + 10 * i,
            "selection": "test" if i == 3 else "val", "baseline": i == 0,
            "data_sha256": hashlib.sha256(dataset.encode()).hexdigest(),
            "warnings": ("gradients vanish",) if i == 1 else (),
            **(failed if (i, attack) == (2, "cw") else {}),
        })

    networks = enumerate(itertools.product(("resnet18", "wrn"), ("unified", "as-released")))
    return Results([
        record(dataset, threat, attack, i, model, recipe)
        for i, (model, recipe) in networks
        for dataset in ("digits", "blobs")
        for threat in ("Linf:8/255", "L2:1/2")
        for attack in ("pgd-20", "cw")
    ])


@pytest.fixture(scope="module")
def campaign_html(campaign):
    return page(campaign)


@pytest.fixture(scope="module")
def varied_html(varied):
    return page(varied)


def column(tab, title, board=0):
    """The texts of a column of a board of the leaderboard, in the rows that are to be seen."""
    return tab.locator("#leaderboard .board").nth(board).evaluate("""(board, title) => {
        const heads = [...board.querySelectorAll("thead th")];
        const index = heads.findIndex((th) => th.textContent.startsWith(title));
        return [...board.querySelectorAll("tbody tr")].filter((row) => row.checkVisibility())
            .map((row) => row.cells[index].firstChild.textContent.trim());
    }""", title)


def choose(tab, label, value):
    tab.get_by_role("combobox", name=label, exact=True).select_option(value)


def seen(tab, selector):
    return [one for one in tab.locator(selector).all() if one.is_visible()]


def titles(tab):
    return [one.inner_text() for one in seen(tab, "#leaderboard h3")]


# Sorting


def test_sorting_by_numbers_and_words(show, varied_html):
    tab = show(varied_html)
    before = column(tab, "PGD-20")
    heading = tab.locator("#leaderboard thead").first.get_by_role("button", name="PGD-20")
    cell = heading.locator("xpath=..")
    heading.click()
    assert column(tab, "PGD-20") == sorted(before, key=float, reverse=True)
    assert cell.get_attribute("aria-sort") == "descending"
    heading.click()
    assert column(tab, "PGD-20") == sorted(before, key=float)
    assert cell.get_attribute("aria-sort") == "ascending"
    tab.locator("#leaderboard thead").first.get_by_role("button", name="Defense").click()
    assert column(tab, "Defense") == ["d0", "d1", "d2", "d3"]
    assert tab.locator("#leaderboard thead").first.locator("[aria-sort]").count() == 1
    assert column(tab, "PGD-20", board=1) == before  # the other boards stay


def test_words_among_numbers_come_last(show, varied_html):
    tab = show(varied_html)
    heading = tab.locator("#leaderboard thead").first.get_by_role("button", name="CW")
    for _ in range(2):
        heading.click()
        assert column(tab, "CW")[-1] == "failed"


def test_sorting_with_the_keyboard(show, varied_html):
    tab = show(varied_html)
    tab.locator("#leaderboard thead").first.get_by_role("button", name="Defense").focus()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Space")
    assert column(tab, "Defense") == ["d3", "d2", "d1", "d0"]


# Filters


@pytest.mark.parametrize(("label", "value", "boards", "rows"), [
    ("Data set", "blobs", 2, 8), ("Threat model", "L2:1/2", 2, 8),
    ("Model", "wrn", 4, 8), ("Recipe", "unified", 4, 8),
])
def test_filters_hide_rows_and_empty_boards(show, varied_html, label, value, boards, rows):
    tab = show(varied_html)
    assert (len(titles(tab)), len(seen(tab, "#leaderboard tbody tr"))) == (4, 16)
    choose(tab, label, value)
    assert (len(titles(tab)), len(seen(tab, "#leaderboard tbody tr"))) == (boards, rows)
    assert tab.locator("output").inner_text() == "8 of 16 rows"
    tab.get_by_role("button", name="Reset").click()
    assert len(seen(tab, "#leaderboard tbody tr")) == 16
    assert tab.locator("output").inner_text() == ""


def test_filters_combine_and_keep_the_ranks(show, varied_html):
    tab = show(varied_html)
    ranks = dict(zip(column(tab, "Defense"), column(tab, "#"), strict=True))
    assert len(set(ranks.values())) == 4
    choose(tab, "Model", "wrn")
    tab.get_by_role("searchbox", name="Find").fill("AS-REL")
    assert column(tab, "Defense") == ["d3"]
    tab.get_by_role("searchbox", name="Find").fill("as-rel d2")  # d2 is a wrn, but unified
    assert column(tab, "Defense") == [] and not titles(tab)
    tab.get_by_role("searchbox", name="Find").fill("d3 test")
    assert column(tab, "Defense") == ["d3"] and column(tab, "#") == [ranks["d3"]]
    assert len(titles(tab)) == 4


# Tabs


def test_tabs_show_one_section_each(show, campaign_html):
    tab = show(campaign_html)
    links = tab.locator("nav a").all()
    assert len(links) == 11
    for link in links:
        link.click()
        assert [f"#{section.get_attribute('id')}" for section in seen(tab, "main > section")] == [
            link.get_attribute("href")]
        assert tab.locator("nav [aria-current]").all_inner_texts() == [link.inner_text()]
        assert tab.evaluate("scrollY") == 0
    tab.go_back()
    assert tab.locator("nav [aria-current]").inner_text() == links[-2].inner_text()


def test_a_tab_can_be_linked_to(show, campaign_html):
    tab = show(campaign_html, "#over-eps")
    assert len(seen(tab, "main svg")) == 1 and not seen(tab, "#tools")


# Columns


def test_columns_can_be_hidden_and_come_back(show, varied_html):
    tab = show(varied_html)
    tab.locator("#tools summary").click()
    assert tab.get_by_role("checkbox", name="Defense").count() == 0  # what names the row stays
    tab.get_by_role("checkbox", name="CW").uncheck()
    for board in tab.locator("#leaderboard table").all():
        assert not [th for th in board.locator("thead th").all()
                    if th.is_visible() and "CW" in th.inner_text()]
        widths = board.evaluate("""(table) => [...table.rows].map(
            (row) => [...row.cells].filter((cell) => cell.checkVisibility()).length)""")
        assert len(set(widths)) == 1
    tab.get_by_role("button", name="Reset").click()
    assert "failed" in column(tab, "CW") and tab.get_by_role("checkbox", name="CW").is_checked()


# Light and dark

PAPER = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(20, 23, 28)"


@pytest.mark.parametrize(("system", "first", "second"), [("light", LIGHT, DARK),
                                                         ("dark", DARK, LIGHT)])
def test_dark_mode_follows_the_system_and_the_reader(show, varied_html, system, first, second):
    tab = show(varied_html, color_scheme=system)
    button = tab.get_by_role("button", name="Dark mode")
    assert tab.evaluate(PAPER) == first
    assert button.get_attribute("aria-pressed") == str(system == "dark").lower()
    button.click()
    assert tab.evaluate(PAPER) == second
    tab.reload()
    assert tab.evaluate(PAPER) == second  # remembered
    button.click()
    assert tab.evaluate(PAPER) == first
    tab.emulate_media(color_scheme="dark" if system == "light" else "light")
    assert tab.evaluate(PAPER) == second  # with the system again


def test_it_works_where_storage_is_refused(show, varied_html):
    tab = show(varied_html)
    tab.add_init_script("Object.defineProperty(window, 'localStorage', "
                        "{get() { throw new DOMException('no', 'SecurityError'); }})")
    tab.reload()
    tab.get_by_role("button", name="Dark mode").click()
    assert tab.evaluate(PAPER) == DARK


# Records


def test_a_number_leads_to_its_record(show, make_record):
    record = make_record(
        flags="cells/0123/eval/pgd 20.npz", breakers={"apgd-ce": 7}, forwards=1234.5,
        backwards=617.2, prepared="batch-norm folded", teacher_sha256={"teacher": "f" * 64},
        notes=("a note",), warnings=("a warning",), robust_overfitting=0.0321,
        device="cpu of a kind", catastrophic_epoch=17, n_open=3, attack_seed=4711, violations=5)
    tab = show(page(Results([record]), folder=Path("/")))
    link = tab.locator("#leaderboard td.lead a")
    link.click()
    panel = tab.get_by_role("dialog", name="How this was measured")
    text = panel.inner_text()
    shown = ["0123456789ab", "2026-11-20T10:00:00+00:00", "0.1.0", "2.15.0", "cpu of a kind",
             record.commit, "digits test", "400", record.data_sha256, "resnet18", "trained",
             "11,173,962", record.weights_sha256, "1.5, -2", "trades", '{"beta": 6.0}', "unified",
             "30", "1.1 h", "3.21", "18", "val", "best", "28", "a note", "ranked, table",
             "teacher " + "f" * 64, "pgd-20", '{"restarts": 1, "steps": 20}', "4711", "Linf:8/255",
             "320", "200", "apgd-ce 7", "1,234.5", "617.2", "30 s", "fp32", "batch-norm folded",
             "250", "1000.0 MB", "0.0313725", "a warning", "ok", "cells/0123/eval/pgd 20.npz"]
    assert [one for one in shown if one not in text] == []
    files = panel.locator("a:not([href^='#'])")
    assert files.get_attribute("href") == "./cells/0123/eval/pgd%2020.npz"
    tab.keyboard.press("Escape")
    assert not panel.is_visible() and link.evaluate("(a) => a === document.activeElement")


def test_all_seeds_lie_side_by_side(show, campaign_html):
    tab = show(campaign_html)
    tab.locator("#leaderboard td.lead a").first.click()
    panel = tab.locator("#panel")
    lines = panel.locator("tr").all_inner_texts()
    seeds = [line.split("\t") for line in lines if line.startswith("Seed")]
    assert seeds[0] == ["Seed", "0", "1"]
    assert panel.locator("caption").all_inner_texts() == ["Records", "Attacks", "Networks",
                                                          "Training"]
    assert panel.locator("tr:has-text('Options') td").first.get_attribute("colspan") == "1"
    tab.get_by_role("button", name="Close").click()
    assert not panel.is_visible()


def test_every_accuracy_of_every_board_opens_its_records(show, campaign_html):
    tab = show(campaign_html)
    wrong = tab.evaluate("""() => {
        const wrong = [];
        for (const link of document.querySelectorAll(".board a[href^='#']")) {
            link.click();
            const panel = document.getElementById("panel");
            if (!panel.open || !panel.querySelector("tr")) wrong.push(link.outerHTML);
            panel.close();
        }
        return wrong;
    }""")
    assert wrong == []
    accuracies = tab.locator("#leaderboard td:has(small):not(:has(a)), #others "
                             "td:has(small):not(:has(a))")
    assert accuracies.count() == 0


def test_a_record_can_be_linked_to(show, varied_html):
    tab = show(varied_html)
    name = tab.locator("#records tbody th a").nth(3).get_attribute("href")
    other = show(varied_html, name)
    assert name[1:] in other.locator("#panel").inner_text()
    assert other.locator("#leaderboard").is_visible()


def test_warnings_are_explained_where_they_are_counted(show, varied_html):
    tab = show(varied_html)
    cell = tab.locator("#leaderboard td:has(details)").first
    assert not cell.get_by_text("gradients vanish").is_visible()
    cell.locator("summary").click()
    assert cell.get_by_text("gradients vanish").is_visible()


# Without JavaScript


def test_without_javascript_everything_is_there(show, campaign_html):
    tab = show(campaign_html, java_script_enabled=False)
    sections = tab.locator("main > section")
    assert len(seen(tab, "main > section")) == sections.count() == 11
    assert len(seen(tab, "main table")) == tab.locator("main table").count() == 11
    assert not seen(tab, "button, select, input, dialog")
    link = tab.locator("#leaderboard td.lead a").first
    link.click()
    assert tab.url.endswith(link.get_attribute("href"))
    row = tab.locator(link.get_attribute("href"))
    assert row.is_visible() and row.bounding_box()["y"] < 900


# Hostile names


def test_hostile_names_are_text(show, make_record):
    records = [
        make_record(defense=name, model=name, recipe=name, dataset=name, checkpoint=name,
                    device=name, warnings=(name,), notes=(name,), error=name, source=name,
                    run=name, selection=name, flags=name, threat=f"Linf:{name}",
                    attack_config={name: name}, defense_config={name: name})
        for name in NAMES
    ]
    tab = show(page(Results(records), folder=Path("/")))
    board = tab.locator("#leaderboard")
    for name in NAMES:
        assert name in board.inner_text()
        choose(tab, "Data set", name)
        assert len(seen(tab, "#leaderboard tbody tr")) == 1
        tab.get_by_role("searchbox", name="Find").fill(name)
        board.locator("td.lead a:visible").click()
        assert tab.locator("#panel").inner_text().count(name) > 10
        tab.keyboard.press("Escape")
        tab.get_by_role("button", name="Reset").click()
    files = tab.locator("#records a:not([href^='#'])").all()
    assert len(files) == len(NAMES)
    assert all(link.get_attribute("href").startswith("./") for link in files)
    injected = "main img, [onload], [onfocus], [onerror], script:not(head script)"
    assert tab.locator(injected).count() == 0


def test_the_page_runs_no_script_but_its_own(chromium, varied_html, tmp_path):
    """The second line of defense: even if something were not escaped, it would not run."""
    path = tmp_path / "broken.html"
    path.write_text(varied_html.replace(
        "<main", "<script>document.title = 1</script><img src=x onerror='document.title = 2'>"
        "<a id=bad href='javascript:void(document.title = 3)'>x</a><main"))
    tab = chromium.new_page()
    tab.goto(path.as_uri())
    tab.locator("#bad").click()
    assert tab.title() == "robench leaderboard"
    tab.close()


# For everybody

# What a person with a screen reader, a keyboard or weak eyes would stumble over, as sentences.
AUDIT = """() => {
    const found = [], visible = (e) => e.checkVisibility({visibilityProperty: true});
    const all = (selector) => [...document.querySelectorAll(selector)].filter(visible);
    const say = (what, e) => found.push(`${what}: ${e.outerHTML.slice(0, 120)}`);
    const named = (e) => (e.getAttribute("aria-label") || e.innerText || "").trim() ||
        (e.getAttribute("aria-labelledby") || "").split(" ").some(
            (id) => document.getElementById(id)?.textContent.trim()) ||
        [...(e.labels || [])].some((label) => label.innerText.trim());

    if (!document.documentElement.lang) found.push("no language");
    if (!document.title.trim()) found.push("no title");
    for (const e of all("a, button, select, input, summary, [role], nav, dialog, section"))
        if (!named(e)) say("no name", e);
    for (const e of all("svg, img")) if (!e.getAttribute("aria-label")) say("no text for", e);
    for (const landmark of ["body > header", "nav", "main", "body > footer", "h1"])
        if (all(landmark).length !== 1) found.push(`not one ${landmark}`);
    for (const e of all("body > *"))
        if (!e.matches("header, nav, main, footer, form[role=search], dialog, a.skip"))
            say("outside the landmarks", e);

    let level = 0;
    for (const e of all("h1, h2, h3, h4, h5, h6")) {
        if (+e.tagName[1] > level + 1) say("skips a level", e);
        level = +e.tagName[1];
    }
    for (const table of all("table")) {
        if (!table.caption?.textContent.trim()) say("no caption", table);
        for (const th of table.querySelectorAll("th")) {
            if (!th.scope) say("no scope", th);
            if (!th.textContent.trim()) say("empty heading", th);
        }
        for (const row of table.tBodies[0].rows)
            if (!row.querySelector("th[scope=row]")) say("a row without a name", row);
    }
    const ids = [...document.querySelectorAll("[id]")].map((e) => e.id);
    const seen = new Set();
    for (const id of ids) seen.has(id) ? found.push(`twice ${id}`) : seen.add(id);
    for (const e of all("[tabindex]")) if (e.tabIndex > 0) say("its own focus order", e);

    // WCAG 2.1: contrast of text 4.5, of large text and of the edges of controls 3.
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const rgba = (color) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
    };
    const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]);
    const paper = (e) => {
        const below = e.parentElement ? paper(e.parentElement) : [255, 255, 255];
        return over(rgba(getComputedStyle(e).backgroundColor), below);
    };
    const light = (color) => color.map((c) => c / 255).map(
        (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
    ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (a, b) => {
        const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    // The numbers of a heat map stand on its cells.
    const cell = (e) => document.querySelector(
        `#${e.closest("g[id*='-on-cell-']")?.id.replace("-on-cell-", "-cell-")} path`);
    const judged = new Map();
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim() || !visible(e) || e.closest("script, style")) continue;
        const style = getComputedStyle(e);
        const below = cell(e) ? rgba(getComputedStyle(cell(e)).fill).slice(0, 3) : paper(e);
        const ink = over(rgba(e.closest("svg") ? style.fill : style.color), below);
        const large = parseFloat(style.fontSize) >= 24;
        judged.set(`${ink} ${below} ${large}`, contrast(ink, below));
        if (contrast(ink, below) < (large ? 3 : 4.5)) say("hard to read", e);
    }
    for (const e of all("button, select, input:not([type=checkbox])")) {
        const style = getComputedStyle(e);
        if (parseFloat(style.borderTopWidth) && contrast(
            over(rgba(style.borderTopColor), paper(e)), paper(e.parentElement)) < 3)
            say("no edge to be seen", e);
    }
    return [found, Math.min(...judged.values()), judged.size];
}"""


@pytest.fixture(scope="module")
def full_html(varied, campaign, make_crossings, make_steps):
    """A page with a tab of every kind but landscapes."""
    names = ("peeraid", "trades", "pgd_at", HOSTILE)
    crossings = make_crossings({source: {name: 40 + 90 * i + 20 * (source == name)
                                         for i, name in enumerate(names)} for source in names})
    return page(Results([*campaign.records, *varied.records], campaign.transfers, campaign.epochs,
                        crossings=crossings, steps=[make_steps(), make_steps(defense=HOSTILE)]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_everybody_can_read_every_tab(show, full_html, scheme, width):
    tab = show(full_html, color_scheme=scheme)
    tab.set_viewport_size({"width": width, "height": 844})
    for link in tab.locator("nav a").all():
        link.click()
        found, lowest, colors = tab.evaluate(AUDIT)
        assert found == [] and lowest >= 4.5 and colors >= 3
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tab.locator("nav a").first.click()
    tab.locator("#leaderboard td.lead a").first.click()
    found, lowest, _ = tab.evaluate(AUDIT)
    assert found == [] and lowest >= 4.5


def axe_violations(tab):
    """What axe-core finds on the page as it is, and where."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the dev extra")
    found = axe.Axe().run(tab).response
    assert len(found["passes"]) > 20
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"]
            for node in rule["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(show, full_html, scheme):
    """axe-core with all its rules, on all tabs at once and on the panel of a record."""
    tab = show(full_html, color_scheme=scheme)
    tab.add_style_tag(content="main > section { display: block !important; }")
    assert axe_violations(tab) == []
    tab.locator("#leaderboard td.lead a").first.click()
    assert axe_violations(tab) == []
    tab.keyboard.press("Escape")
    tab.evaluate("document.querySelector('table').insertAdjacentHTML('afterend', '<button>')")
    assert [one.partition(":")[0] for one in axe_violations(tab)] == ["button-name"]


def test_the_audit_finds_what_is_wrong(show, varied_html):
    tab = show(varied_html)
    tab.evaluate("""() => {
        document.querySelector("#leaderboard").insertAdjacentHTML("beforeend", `
            <button></button> <h6>deep</h6> <table><tr><td>1</td></tr></table>
            <p style='color: #999; background: #fff'>pale</p> <a href='#' tabindex=3>x</a>
            <p id=main>twice</p>`);
        document.body.append(document.createElement("div"));
        document.querySelector("footer").remove();
    }""")
    text = "\n".join(tab.evaluate(AUDIT)[0])
    for what in ("no name", "no caption", "skips a level", "a row without a name",
                 "hard to read: <p",
                 "its own focus order", "twice main", "not one body > footer",
                 "outside the landmarks"):
        assert what in text


def test_the_keyboard_reaches_everything_in_order_and_is_seen(show, varied_html):
    tab = show(varied_html)
    places = []
    for _ in range(400):
        tab.keyboard.press("Tab")
        place = tab.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            const order = [...document.querySelectorAll("*")].indexOf(e);
            const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 1;
            return e === document.body ? null : [order, ring, e.className || e.tagName];
        }""")
        if place is None or (places and place[0] <= places[-1][0]):
            break
        places.append(place)
    assert places[0][2] == "skip" and all(ring for _, ring, _ in places)
    expected = tab.evaluate("""() => [...document.querySelectorAll(
        "a[href], button, select, input, summary, [tabindex='0']")].filter(
        (e) => e.checkVisibility()).length""")
    assert len(places) == expected > 50


def test_on_paper_every_section_is_there_in_ink_on_white(show, campaign_html):
    tab = show(campaign_html)
    tab.get_by_role("button", name="Dark mode").click()
    assert tab.evaluate(PAPER) == DARK
    tab.emulate_media(media="print")
    assert tab.evaluate(PAPER) == LIGHT
    assert len(seen(tab, "main > section")) == tab.locator("main > section").count() - 1
    assert not seen(tab, "nav, #tools, #theme, #records")


# Size


@pytest.fixture(scope="module")
def large(make_record, make_transfer, make_epoch, write_flags, tmp_path_factory):
    """1,000 records of 60 trainings: 20 defenses, 3 seeds, 2 checkpoints, 4 attacks, 4 budgets."""
    folder, random, results = tmp_path_factory.mktemp("large"), np.random.default_rng(0), Results()
    settings = {"beta": 6.0, "threat": "Linf:8/255",
                "train": {f"a setting of the training {i}": [0.5, 0.75, i] for i in range(20)}}
    for defense, seed in itertools.product(range(20), range(3)):
        run = f"{defense:06x}{seed:06x}"
        known = dict(run=run, seed=seed, defense=f"defense-{defense}", n=1000,
                     model=f"model-{defense % 4}", baseline=defense < 4,
                     defense_config={**settings, "number": defense},
                     weights_sha256=hashlib.sha256(run.encode()).hexdigest(),
                     fingerprint=tuple(random.normal(size=8).round(5)))
        attacks = [{"attack": attack, "breakers": {"apgd-ce": 300, "apgd-t": 40},
                    "warnings": ("a warning of a usual length about what may be wrong",)}
                   for attack in ("fgsm", "pgd-20", "cw", "autoattack")]
        curve = [{"role": "curve", "threat": f"Linf:{eps}/255"} for eps in (2, 4, 12, 16)]
        measured = [{"checkpoint": checkpoint, **how}
                    for checkpoint in ("best", "last") for how in (*attacks, *curve)]
        if len(results.records) < 17 * 40:
            measured.append({"threat": "L2:1/2"})
        for how in measured:
            correct = random.random(1000) < 0.8
            robust = correct & (random.random(1000) < 0.5)
            path = folder / f"{run}-{len(results.records)}.npz"
            results.records.append(make_record(
                **known, **how, n_correct=int(correct.sum()), n_robust=int(robust.sum()),
                flags=write_flags(path, correct, robust)))
        results.transfers.append(make_transfer(run=run, seed=seed, defense=f"defense-{defense}"))
        results.epochs.extend(make_epoch(run=run, seed=seed, defense=f"defense-{defense}",
                                         model=f"model-{defense % 4}", epoch=epoch)
                              for epoch in range(30))
    return results, folder


def test_a_large_report_is_small(large, show, capsys):
    """1,000 records of 60 trainings. Times are told, not judged: they depend on the machine."""
    results, folder = large
    assert len(results.records) == 1000 and len({r.run for r in results.records}) == 60
    start = time.perf_counter()
    html = page(results, folder)
    built = time.perf_counter() - start
    size = len(html.encode())
    assert size < 5_000_000
    tab = show(html)
    loaded = tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    tab.locator("nav a", has_text="Records").click()
    rows = tab.locator("#records table").first.locator("tbody tr")
    assert rows.count() == 1000
    sort = """([section, name]) => {
        const button = [...document.querySelectorAll(`#${section} th button`)]
            .find((one) => one.textContent.startsWith(name));
        const start = performance.now();
        button.click();
        document.body.offsetHeight;  // until the rows are where they belong
        return performance.now() - start;
    }"""
    records = tab.evaluate(sort, ["records", "Robust"])
    tab.locator("nav a").first.click()
    board = tab.evaluate(sort, ["leaderboard", "FGSM"])
    start = time.perf_counter()
    tab.get_by_role("searchbox", name="Find").fill("defense-7")
    assert tab.locator("output").inner_text() == "3 of 54 rows"
    filtered = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n1,000 records: built in {built:.1f} s, {size / 1e6:.2f} MB, loaded in "
              f"{loaded / 1000:.2f} s, the leaderboard sorted in {board:.0f} ms, all records in "
              f"{records:.0f} ms, filtered in {1000 * filtered:.0f} ms")
