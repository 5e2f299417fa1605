"""The outcome of the gate for people and machines: text, Markdown, JUnit XML and JSON."""

from __future__ import annotations

import dataclasses
import json
from xml.etree import ElementTree

from robench.reports.drop import Drop
from robench.reports.gate import Comparison, Outcome, Side
from robench.reports.measured import Measured
from robench.reports.text import (
    NOTHING,
    Board,
    Cell,
    Column,
    markdown,
    p_value,
    percent,
    plain,
    points,
    table,
)

FAILING = ("regressed", "inconclusive")


def outcome_text(outcome: Outcome) -> str:
    """A few lines for the terminal."""
    lines = []
    for one in outcome.comparisons:
        lines.append(f"{one.verdict}: {one.metric} on {one.setting} ({one.network})")
        lines += [f"  {said}" for said in sentences(one, outcome)]
    return "\n".join(map(_line, lines)) + "\n"


def summary(outcome: Outcome) -> str:
    """The verdict and what led to it, in one line."""
    causes = [one for one in outcome.comparisons if one.verdict == outcome.verdict]
    said = plain(f"{causes[0].metric} on {causes[0].network}: {sentences(causes[0], outcome)[0]}")
    return f"{outcome.verdict}: {said}" + f" (and {len(causes) - 1} more)" * (len(causes) > 1)


def _line(text: str) -> str:
    """Plain, but with its indentation."""
    return "  " * text.startswith("  ") + plain(text)


def sentences(one: Comparison, outcome: Outcome) -> list[str]:
    """What was found, by which question, and what follows."""
    if one.drop is None or one.baseline is None or one.current is None:
        return list(one.reasons)
    n = min(one.baseline.n, one.current.n)
    said = [f"{_side(one.baseline)} -> {_side(one.current)}: {_change(one.drop, n)}, "
            f"{_level(outcome)} interval {_interval(one.drop, n)}"]
    adjusted = " after Holm's correction" if len(outcome.comparisons) > 1 else ""
    many = max(len(one.baseline.entries), len(one.current.entries)) > 1
    if one.drop.lost is None or one.drop.gained is None:
        images = f"{one.baseline.n:,} and {one.current.n:,} images; pooled z"
    else:
        images = (f"lost {one.drop.lost:.4g} and gained {one.drop.gained:.4g} of {n:,} images"
                  f"{', effectively' * many}; exact McNemar")
    said.append(f"are these networks less robust on other images, too? {p_value(one.p)}"
                f"{adjusted} ({images}, one-sided)")
    if one.seeds is not None:
        count = " and ".join(str(len(side.entries)) for side in (one.baseline, one.current))
        said.append(f"would other training runs be? {p_value(one.seeds.p)}, interval "
                    f"{_interval(one.seeds, n)} ({count} seeds; Student's t, one-sided)")
    if one.verdict == "inconclusive":
        said.append(_decide(one))
    return said + [f"note: {note}" for note in one.notes]


def _decide(one: Comparison) -> str:
    if one.needed is None:
        return "no number of images up to a million would decide: the drop is too close to max-drop"
    sides = "" if one.paired else " on each side"
    return f"about {one.needed:,} images{sides} would decide, if the shares stay as they are"


def outcome_markdown(outcome: Outcome) -> str:
    """For the summary of a CI job."""
    found = outcome.comparisons
    board = Board(f"Robustness: {outcome.verdict}", (
        _column("Verdict", *(one.verdict for one in found), words=True),
        _column("Metric", *(one.metric for one in found), words=True),
        _column("Network", *(one.network for one in found), words=True),
        _column("Data, threat model", *(one.setting for one in found), words=True),
        _column("Baseline", *(_side(one.baseline) for one in found)),
        _column("Current", *(_side(one.current) for one in found)),
        _column("Drop, points", *(NOTHING if one.drop is None or one.current is None else
                                 f"{points(one.drop.points, one.current.n)} "
                                 f"{_interval(one.drop, one.current.n)}" for one in found)),
        _column("p", *(NOTHING if one.drop is None else p_value(one.p) for one in found)),
    ), facts=(
        f"max-drop {outcome.max_drop:g} points, alpha {outcome.alpha:g}, "
        f"{_level(outcome)} intervals; a positive drop is worse",
    ), remarks=tuple(f"{one.metric}, {one.network}: {said}" for one in found
                     for said in sentences(one, outcome)[0 if one.drop is None else 1:]))
    return markdown(board)


def outcome_junit(outcome: Outcome, *, allow_inconclusive: bool = False) -> str:
    """A test case for each comparison, as CI systems read it."""
    failing = FAILING[:1] if allow_inconclusive else FAILING
    counts = {kind: sum(one.verdict in verdicts for one in outcome.comparisons)
              for kind, verdicts in (("failures", failing), ("errors", ("incomparable",)))}
    suite = ElementTree.Element("testsuite", {
        "name": "robench check", "tests": str(len(outcome.comparisons)),
        **{kind: str(count) for kind, count in counts.items()}})
    for one in outcome.comparisons:
        case = ElementTree.SubElement(suite, "testcase", {
            "classname": plain(one.network), "name": plain(f"{one.metric} on {one.setting}")})
        said = [plain(text) for text in sentences(one, outcome)]
        if one.verdict in failing or one.verdict == "incomparable":
            kind = "error" if one.verdict == "incomparable" else "failure"
            ElementTree.SubElement(case, kind, {
                "type": one.verdict, "message": f"{one.verdict}: {said[0]}"}).text = "\n".join(said)
        else:
            ElementTree.SubElement(case, "system-out").text = "\n".join([one.verdict, *said])
    ElementTree.indent(suite)
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text.decode() + "\n"


def outcome_json(outcome: Outcome) -> str:
    """Everything but the flags, for programs. Shares are in [0, 1], drops in points."""
    def side(one: Side | None) -> dict[str, object] | None:
        return None if one is None else {
            "n": one.n, "share": one.share, "shares": one.shares,
            "seeds": [entry.seed for entry in one.entries],
            "weights_sha256": [entry.weights_sha256 for entry in one.entries],
            "data_sha256": one.entries[0].data_sha256}

    comparisons = []
    for one in outcome.comparisons:
        values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        for name in ("drop", "seeds"):
            values[name] = None if values[name] is None else dataclasses.asdict(values[name])
        comparisons.append({**values, "baseline": side(one.baseline), "current": side(one.current)})
    return json.dumps({"verdict": outcome.verdict, "max_drop": outcome.max_drop,
                       "alpha": outcome.alpha, "comparisons": comparisons}, indent=1) + "\n"


def baseline_text(entries: list[Measured]) -> str:
    """What a baseline file holds, as a table."""
    return "\n".join(table((
        _column("Network", *(one.network for one in entries), words=True),
        _column("Checkpoint", *(one.checkpoint or NOTHING for one in entries), words=True),
        _column("Seed", *(str(one.seed) for one in entries)),
        _column("Data", *(f"{one.dataset} {one.split}" for one in entries), words=True),
        _column("Threat model", *(one.threat for one in entries), words=True),
        _column("Attack", *(one.attack for one in entries), words=True),
        _column("Images", *(f"{one.n:,}" for one in entries)),
        _column("Clean %", *(percent(100 * one.n_correct / one.n, one.n) for one in entries)),
        _column("Robust %", *(percent(100 * one.n_robust / one.n, one.n) for one in entries)),
        _column("Failed checks", *(", ".join(one.failed) or NOTHING for one in entries),
                words=True),
        _column("Weights", *(one.weights_sha256[:12] for one in entries)),
        _column("Measured", *(one.created[:10] for one in entries), words=True),
        _column("robench", *(one.robench for one in entries)),
        _column("torch", *(one.torch for one in entries)),
    ))) + "\n"


def _column(title: str, *texts: str, words: bool = False) -> Column:
    return Column(title, tuple(map(Cell, texts)), words=words)


def _side(side: Side | None) -> str:
    if side is None:
        return NOTHING
    return f"{percent(100 * side.share, side.n)} %"


def _change(drop: Drop, n: int) -> str:
    if drop.points == 0:
        return "no drop"
    kind = "a drop" if drop.points > 0 else "a gain"
    return f"{kind} of {percent(abs(drop.points), n)} points"


def _interval(drop: Drop, n: int) -> str:
    """Of the drop: positive is worse."""
    return f"[{points(drop.low, n)}, {points(drop.high, n)}]"


def _level(outcome: Outcome) -> str:
    return f"{100 * (1 - 2 * outcome.alpha):g} %"
