"""robench check and baseline through the real command line, and the contract of exit codes."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import click
import numpy as np
import pytest

from robench.benchmark import cli
from robench.benchmark.commands.check import names_of
from robench.errors import EXIT_CODES, Partial, Regression, RobenchError, Unreliable, UsageError
from robench.reports.measured import Measured, save_baseline
from robench.reports.trust import CHECKS, Finding, texts

DOC = Path(__file__).parents[2] / "docs" / "exit-codes.md"


def write(path, survivors, n=1000, **changes):
    robust = np.zeros(n, bool)
    robust[list(survivors)] = True
    values = dict(
        network="net", model="net", checkpoint="", seed=0, weights_sha256="a" * 64,
        dataset="digits", split="test", n=n, data_sha256="images", threat="Linf:0.1",
        attack="pgd-20", attack_config={"steps": 20}, attack_seed=0, precision="exact",
        n_correct=n, n_robust=int(robust.sum()), robench="0.1.0", torch="2.15.0",
        created="2026-11-22T10:00:00+00:00", correct=np.ones(n, bool), robust=robust)
    save_baseline(path, [Measured(**{**values, **changes})])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with baseline.json and what it is compared with."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "baseline.json", range(500))
    write(tmp_path / "same.json", range(500))
    write(tmp_path / "better.json", range(530))
    write(tmp_path / "worse.json", range(470))
    write(tmp_path / "little.json", range(2, 500))
    write(tmp_path / "other.json", range(500), threat="L2:1")
    return tmp_path


@pytest.mark.parametrize(("current", "options", "code", "verdict"), [
    ("same", (), 0, "pass"),
    ("better", (), 0, "improved"),
    ("worse", (), 3, "regressed"),
    ("worse", ("--max-drop", 3), 4, "inconclusive"),
    ("worse", ("--max-drop", 5), 0, "pass"),
    ("worse", ("--allow-inconclusive",), 3, "regressed"),
    ("little", (), 4, "inconclusive"),
    ("little", ("--allow-inconclusive",), 0, "inconclusive"),
    ("other", (), 2, "incomparable"),
    ("other", ("--allow-inconclusive",), 2, "incomparable"),
    ("worse", ("--metric", "clean"), 0, "pass"),
    ("worse", ("--alpha", 1e-12), 4, "inconclusive"),
])
def test_verdicts_set_the_exit_code(here, robench, current, options, code, verdict):
    done = robench("check", f"{current}.json", "--against", "baseline.json", *options)
    assert done.code == code
    assert done.out.startswith(f"{verdict}: ")
    if code:
        assert done.err.startswith(f"robench: {verdict}: ") and done.err.count("\n") == 1
    else:
        assert done.err == ""


@pytest.mark.parametrize("current", ["same", "better"])
def test_no_verdict_on_a_network_that_hides_its_gradients(here, robench, current):
    survivors = range(530 if current == "better" else 500)
    write(here / "masked.json", survivors, warnings=texts([Finding(CHECKS["zero-grad"], 1.0)]))
    for options in ((), ("--allow-inconclusive",)):
        done = robench("check", "masked.json", "--against", "baseline.json", *options)
        assert done.code == 4 and "unreliable: zero-grad" in done.err
    random = texts([Finding(CHECKS["random"], 1.0)])
    write(here / "random.json", survivors, warnings=random)
    write(here / "eot.json", survivors, warnings=random, attack_config={"steps": 20, "eot": 20})
    assert robench("check", "random.json", "--against", "random.json").code == 4
    assert robench("check", "eot.json", "--against", "eot.json").code == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (("same.json",), "Missing option '--against'"),
    (("nowhere.json", "--against", "baseline.json"), "cannot read nowhere.json"),
    (("same.json", "--against", "nowhere"), "no results.jsonl there"),
    (("same.json", "--against", "baseline.json", "--metric", "pgd"), "Did you mean: pgd-20?"),
    (("same.json", "--against", "baseline.json", "--alpha", 2), "between 0 and 0.5"),
    (("same.json", "--against", "baseline.json", "--max-drop", "nan"), "from 0 to 100"),
])
def test_mistakes_are_one_line(here, robench, arguments, words):
    done = robench("check", *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err and done.err.count("\n") == 1


def test_files_are_written_whatever_the_verdict(here, robench):
    done = robench("check", "worse.json", "--against", "baseline.json", "--markdown", "a/check.md",
                   "--junit", "check.xml", "--json", "check.json")
    assert done.code == 3
    page = (here / "a/check.md").read_text()
    assert page.startswith("## Robustness: regressed\n") and "| regressed | pgd-20 " in page
    suite = ElementTree.parse(here / "check.xml").getroot()
    assert (suite.tag, suite.get("failures")) == ("testsuite", "1")
    assert "drop of 3.00 points" in suite.find("testcase/failure").get("message")
    assert json.loads((here / "check.json").read_text())["verdict"] == "regressed"


def test_inconclusive_is_no_failure_in_junit_where_it_is_allowed(here, robench):
    for options, failures in (((), "1"), (("--allow-inconclusive",), "0")):
        robench("check", "little.json", "--against", "baseline.json", "--junit", "x.xml", *options)
        assert ElementTree.parse(here / "x.xml").getroot().get("failures") == failures


def test_a_baseline_is_saved_shown_and_saved_again(here, robench):
    assert robench("baseline", "save", "baseline.json", "--out", "copy.json").code == 0
    assert (here / "copy.json").read_bytes() == (here / "baseline.json").read_bytes()
    shown = robench("baseline", "show", "copy.json")
    assert shown.code == 0
    for fact in ("net", "digits test", "Linf:0.1", "pgd-20", "1,000", "50.00", "aaaaaaaaaaaa"):
        assert fact in shown.out
    assert robench("baseline", "save", "same.json", "--out", "x.yaml").code == 2
    wrong = robench("baseline", "save", "same.json", "--out", "x.json", "--metric", "pgd-2")
    assert wrong.code == 2 and "Did you mean: pgd-20?" in wrong.err


def test_an_unreliable_baseline_is_refused_or_marked(here, robench):
    write(here / "masked.json", range(500), warnings=texts([Finding(CHECKS["zero-grad"], 1.0)]))
    refused = robench("baseline", "save", "masked.json", "--out", "new.json")
    assert refused.code == 4 and refused.err.count("\n") == 1
    assert "nothing is saved" in refused.err and "zero-grad on net" in refused.err
    assert not (here / "new.json").exists()
    kept = robench("baseline", "save", "masked.json", "--out", "new.json", "--allow-unreliable")
    assert kept.code == 0
    assert "zero-grad" in robench("baseline", "show", "new.json").out
    assert "zero-grad" not in robench("baseline", "show", "baseline.json").out
    done = robench("check", "same.json", "--against", "new.json")
    assert done.code == 0 and "the baseline is unreliable: zero-grad" in done.out


def test_metrics_are_chosen_for_a_baseline(here, robench, make_run):
    make_run(here / "run", attacks=("pgd-20", "fgsm"))
    assert robench("baseline", "save", "run", "--out", "two.json").code == 0
    assert robench("baseline", "save", "run", "--out", "one.json", "--metric", "fgsm").code == 0
    count = [len(json.loads((here / name).read_text())["measured"])
             for name in ("two.json", "one.json")]
    assert count == [2, 1]
    assert robench("check", "run", "--against", "two.json", "--metric", "fgsm,pgd-20").code == 0


@pytest.fixture
def make_run(robench, checkpoint):
    """A run folder of `robench eval` on a few images."""

    def make(out, attacks):
        options = [word for name in attacks for word in ("--attack", name)]
        done = robench("eval", checkpoint, "--limit", 20, "--device", "cpu", *options, "--out", out)
        assert done.code == 0, done.err

    return make


@pytest.mark.parametrize(("texts", "names"), [
    (("autoattack,clean",), ["autoattack", "clean"]),
    (("autoattack", "pgd,steps=50,restarts=5,clean"), ["autoattack", "pgd,steps=50,restarts=5",
                                                        "clean"]),
    (("a, b,,a",), ["a", "b"]),
    ((), []),
])
def test_names_with_options_keep_their_commas(texts, names):
    assert names_of(texts) == names


# The contract


def commands(group=cli.cli, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_keeps_the_contract(robench, path, monkeypatch):
    assert robench(*path, "--help").code == 0
    wrong = robench(*path, "--no-such-option")
    assert wrong.code == 2 and wrong.err.startswith("robench: ") and wrong.err.count("\n") == 1
    command = cli.cli
    for name in path:
        command = command.commands[name]
    needed = [word for p in command.params if p.required
              for word in ((p.opts[0], "x") if isinstance(p, click.Option) else ("x",))]

    for error, code in ((KeyboardInterrupt(), 130), (RobenchError("a"), 1), (UsageError("a"), 2),
                        (Regression("a"), 3), (Unreliable("a"), 4), (Partial("a", None), 5)):
        def stop(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(command, "callback", stop)
        done = robench(*path, *needed)
        assert done.code == code and done.err.lstrip().startswith("robench: ")  # after a ^C


def test_the_documented_codes_are_those_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", DOC.read_text(encoding="utf-8"), flags=re.M)
    assert {int(code): text for code, text in rows} == EXIT_CODES
    kinds = (RobenchError, UsageError, Regression, Unreliable, Partial)
    errors = {kind.exit_code for kind in kinds}
    assert errors | {0, cli.INTERRUPTED} == set(EXIT_CODES)


def test_the_help_names_the_codes(robench):
    text = " ".join(robench("--help").out.split())
    assert all(f"{code} {what}" in text for code, what in EXIT_CODES.items())
