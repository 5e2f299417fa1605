"""LaTeX tables: marks, escaping, and a real run of LaTeX where there is one."""

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.reports import Results, render
from robench.reports.boards import leaderboards
from robench.reports.latex import PREAMBLE, escape, fragment, table
from robench.reports.tables import leaderboard
from robench.reports.text import Board, Cell, Column

HOSTILE = (r"a_b & c\input{x}", "<img src=x onerror=alert(1)>", "$100 % #1 ~^ {", "[x]", "*",
           'a--b ---c ``d\'\' "e"', "\\\\", "\x00\x1b\x7f", "ünïcödé 中文 🙂 Łódź",
           r"\end{document}", "% comment", "−1 ± 2 – Δ")
# What may stand in escaped text: plain characters, and these commands.
SAFE = re.compile(
    r"(?:[^\\{}$&#%_~^<>|\"'`\[\]*\x00-\x1f\x7f-\U0010ffff]"
    r"|\\(?:textbackslash|textasciitilde|textasciicircum|textasciigrave|textless|textgreater"
    r"|textbar|textendash|textemdash|textquotedblleft|textquotedblright"
    r"|textquoteright|char34|char39|ldots|ss|ae|o|l|i)\{\}"
    r"|\\[{}$&#%_]|\$(?:\\pm|\\Delta|\\times|\\cdot|\\leq|\\geq|\\to|-)\$|\{[\[\]*]\}|\{\}"
    r"|\\[`'^~=u.\"rHvc]\{(?:[A-Za-z]|\\[ij]\{\})\})*")


@given(st.text(max_size=30) | st.lists(st.sampled_from(HOSTILE), max_size=4).map(" ".join))
def test_no_character_of_a_name_is_a_command(text):
    escaped = escape(text)
    assert SAFE.fullmatch(escaped), escaped
    assert "--" not in escaped and escaped.count("{") == escaped.count("}") + (
        escaped.count(r"\{") - escaped.count(r"\}"))


@pytest.mark.parametrize(("text", "tex"), [
    (r"a_b & c\input{x}", r"a\_b \& c\textbackslash{}input\{x\}"),
    ("<img src=x>", r"\textless{}img src=x\textgreater{}"),
    ("50.1 ± 0.2", r"50.1 $\pm$ 0.2"), ("é ñ ï", r"\'{e} \~{n} \"{\i{}}"), ("---", "-{}-{}-"),
    ("?“a”,,", r"?\textquotedblleft{}a\textquotedblright{},{},"),
    ("中", "{[}U+4E2D{]}"), ("two\nlines", "two lines"), ("a--b", "a-{}-b"),
])
def test_escaped(text, tex):
    assert escape(text) == tex


def rows_of(text):
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0]
    return [[cell.strip() for cell in line.removesuffix(r" \\").split(" & ")]
            for line in body.strip().splitlines()]


def column(*texts, contest=True):
    return Column("AA", tuple(Cell(text, "[1, 2]") for text in texts), contest=contest)


@pytest.mark.parametrize(("texts", "marked"), [
    (("1.5", "10.0 ± 0.5", "9.9"), ("1.5", r"\textbf{10.0} $\pm$ 0.5", r"\underline{9.9}")),
    (("3.0", "3.0", "2.0"), (r"\textbf{3.0}", r"\textbf{3.0}", r"\underline{2.0}")),
    (("3.0", "2.0", "2.0"), (r"\textbf{3.0}", r"\underline{2.0}", r"\underline{2.0}")),
    (("failed", "–", "2.0"), ("failed", r"\textendash{}", "2.0")),
    (("3.0", "3.0 (1 failed)"), (r"\textbf{3.0}", r"\textbf{3.0} (1 failed)")),
])
def test_the_best_and_the_second_best_are_marked(texts, marked):
    (cells,) = zip(*rows_of(table(Board("T", (column(*texts),)), "t")), strict=True)
    assert cells == marked


def test_only_what_may_be_compared_is_marked(make_record):
    """Not without a ranking, and not where rows have different numbers of images."""
    plain = table(Board("T", (column("1.0", "2.0", contest=False),)), "t")
    assert "textbf" not in plain and "underline" not in plain
    records = [make_record(), make_record(defense="b", n_robust=210),
               make_record(attack="fgsm", defense="b", n=100, data_sha256="100", n_robust=60)]
    contest = {c.title: c.contest for board in leaderboards(leaderboard(records))
               for c in board.columns}
    assert contest["PGD-20 %, n = 400"] and not contest["Defense"]
    apart = [make_record(attack="fgsm"), make_record(defense="b")]  # no attack on both
    (board,) = leaderboards(leaderboard(apart))
    assert not any(c.contest for c in board.columns)


def test_the_lead_prints_its_interval_and_titles_take_two_lines(campaign):
    text = fragment(leaderboards(leaderboard(campaign.records)), [])
    assert r"\shortstack{AutoAttack \%\\n = 100}" in text
    assert r"{\footnotesize {[}40.4, 59.6{]}}" in text
    assert r"\caption[{digits test, Linf:8/255}]{digits test, Linf:8/255. Ranked by" in text
    assert PREAMBLE in text.splitlines()[0] and r"\label{tab:robench-1}" in text


def test_without_results_it_says_so():
    assert "% Nothing is ranked yet." in fragment([], [])


def engine():
    """The command of an installed LaTeX, or the reason why there is none."""
    if shutil.which("pdflatex") is None:
        return None, "no pdflatex: install texlive-latex-recommended"
    for name in ("booktabs.sty", "graphicx.sty"):
        if subprocess.run(["kpsewhich", name], capture_output=True).returncode:
            return None, f"LaTeX has no {name}: install texlive-latex-recommended"
    return ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"], ""


def test_it_compiles_and_hostile_names_do_nothing(campaign, make_record, tmp_path):
    command, reason = engine()
    if command is None:
        pytest.skip(reason)
    characters = "".join(map(chr, [*range(1, 0x180), 0x4E2D, 0x1F642]))
    hostile = [make_record(defense=name, model=name, attack=name, dataset=HOSTILE[1],
                           notes=(name, characters), warnings=(name,)) for name in HOSTILE]
    render(Results([*campaign.records, *hostile]), tmp_path, ["tex"])
    (tmp_path / "x.tex").write_text(r"\errmessage{the name was run}")
    (tmp_path / "paper.tex").write_text("\n".join([
        r"\documentclass{article}", PREAMBLE, r"\begin{document}", r"\listoftables",
        r"\input{leaderboard}", "The end.", r"\end{document}"]))
    for _ in range(2):  # the second run reads the captions from the list of tables
        done = subprocess.run([*command, "paper.tex"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stdout.decode("utf-8", "replace")[-2000:]
    log = (tmp_path / "paper.log").read_text("utf-8", "replace")
    assert not re.search(r"Overfull \\hbox .* in alignment", log)
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000
