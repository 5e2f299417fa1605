"""The Markdown files: links lead somewhere, Python runs, command lines are understood.

A Python block that cannot run here is marked on the line before it, and listed as skipped:

    <!-- not run: trains for an hour -->
"""

import json
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from robench.benchmark.cli import cli
from robench.reports.embed import MARK, embedded

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", flags=re.S | re.M)
LINK = re.compile(r"""\]\(([^)\s]+)[^)]*\)|\b(?:href|src|srcset)="([^"]+)\"""")
NOT_RUN = re.compile(r"<!-- not run: (.+) -->\n*$")
INLINE = re.compile(r"(?<!`)`((?:python -m )?robench [^`]+)`(?!`)")
OPERATORS = set("();<>|&")  # of the shell


def _markdown() -> list[Path]:
    found = []
    for folder, folders, files in os.walk(ROOT):
        hidden = ("build", "dist", "runs", "data", ".git", ".hypothesis")
        folders[:] = [f for f in folders if f not in hidden and not f.endswith("_cache")
                      and not f.startswith(".venv")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


class Block(NamedTuple):
    """A fenced block of a Markdown file."""

    path: Path
    line: int  # of its first line of code
    language: str
    code: str
    not_run: str | None  # why

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def _blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    blocks = []
    for match in FENCE.finditer(text):
        before = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start(2)) + 1
        blocks.append(Block(path, line, match[1], match[2], before and before[1]))
    return blocks


MARKDOWN = _markdown()
BLOCKS = [block for path in MARKDOWN for block in _blocks(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def _prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


# Links


def _anchors(path: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", _prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    broken = []
    prose = re.sub(r"`[^`]*`", "", _prose(path))
    for link in ("".join(groups) for groups in LINK.findall(prose)):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        inside = target.resolve().is_relative_to(ROOT.resolve())
        if not (inside and target.exists()):
            broken.append(link)
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target):
            broken.append(link)
    assert not broken


# Python

# One process for all files: the examples register attacks and defenses, which no other test may
# see. The blocks of a file share their names.
RUN_BLOCKS = """
import json, pathlib, sys, traceback
failed = 0
for path, blocks in json.loads(pathlib.Path(sys.argv[1]).read_text("utf-8")).items():
    names = {"__name__": "__main__"}
    try:
        for line, code in blocks:
            exec(compile("\\n" * (line - 1) + code, path, "exec", dont_inherit=True), names)
    except BaseException:
        failed += 1
        traceback.print_exc()
sys.exit(bool(failed))
"""


def test_python_blocks_run(python, tmp_path):
    work: dict[str, list[tuple[int, str]]] = {}
    for block in PYTHON:
        if not block.not_run:
            work.setdefault(str(block.path), []).append((block.line, block.code))
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps(work), encoding="utf-8")
    (tmp_path / "here").mkdir()
    done = python("-c", RUN_BLOCKS, str(file), cwd=tmp_path / "here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_are_python(block):
    compile(block.code, str(block), "exec", dont_inherit=True)
    if block.not_run:
        pytest.skip(f"{block} is not run: {block.not_run}")


# Command lines


def _commands() -> list[tuple[str, list[str]]]:
    """Every `robench ...` in shell blocks and in prose, as (place, arguments)."""
    found = []
    for block in BLOCKS:
        if block.language in ("sh", "bash", "shell", "console"):
            prompt = "$ " if block.language == "console" else ""
            lines = block.code.replace("\\\n", " ").splitlines()
            found += [(str(block), line.strip().removeprefix(prompt))
                      for line in lines if line.strip().startswith(prompt)]
    for path in MARKDOWN:
        found += [(str(path.relative_to(ROOT)), " ".join(text.split()))
                  for text in INLINE.findall(_prose(path))]
    return [(where, arguments) for where, line in found for arguments in _arguments(line)]


def _arguments(line: str) -> list[list[str]]:
    """What comes after `robench` in each command of a shell line."""
    if "robench" not in line:
        return []
    lexer = shlex.shlex(re.sub(r" \d>", " >", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= OPERATORS:
            commands.append([])
        else:
            commands[-1].append(word)
    found = []
    for words in commands:
        while words and re.match(r"\w+=", words[0]):  # CUDA_VISIBLE_DEVICES=0
            del words[0]
        if words[1:3] == ["-m", "robench"]:
            found.append(words[3:])
        elif words and words[0].rpartition("/")[2] == "robench":
            found.append(words[1:])
    return found


def _parse(arguments: list[str]) -> None:
    """Let click check command, options and their types; runs nothing."""
    root = click.Context(cli, info_name="robench")
    try:
        if not arguments or arguments[0].startswith("-"):
            cli.make_context("robench", arguments or ["--help"])
            return
        name, command, rest = cli.resolve_command(root, arguments)
        if rest and command is not None:  # the bare name of a command is a mention of it
            command.make_context(name, rest, parent=root)
    except click.exceptions.Exit:  # --help, --version
        pass


@pytest.mark.parametrize(("where", "arguments"), [
    pytest.param(where, arguments, id=f"{where} {' '.join(arguments)}")
    for where, arguments in _commands()
])
def test_command_lines_are_understood(where, arguments):
    _parse(arguments)


@pytest.mark.parametrize(("line", "arguments"), [
    ("A=1 robench run --threat 'Linf:8/255' | tee log", [["run", "--threat", "Linf:8/255"]]),
    ("cd x && python -m robench list; echo robench", [["list"]]),
    (".venv/bin/robench eval a  # robench run", [["eval", "a"]]),
    ("pip install robench", []),
    ("robench list models > a 2>&1", [["list", "models"]]),
])
def test_command_lines_are_found(line, arguments):
    assert _arguments(line) == arguments


@pytest.mark.parametrize("line", ["run --epoch-s 3", "runn", "run --epochs many", "--hepl"])
def test_wrong_command_lines_are_noticed(line):
    with pytest.raises(click.UsageError):
        _parse(line.split())


def test_the_readme_says_how_to_run_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^<!-- ci: tests -->\n```sh\n", text, flags=re.M)) == 1


@pytest.mark.parametrize("path", [p for p in MARKDOWN if MARK.search(p.read_text("utf-8"))],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_marked_tables_are_those_of_the_records(path):
    """If not: robench report --into FILE."""
    text = path.read_text(encoding="utf-8")
    assert embedded(text, path.parent)[0] == text


def test_the_readme_has_such_tables():
    assert MARK.search((ROOT / "README.md").read_text(encoding="utf-8"))
