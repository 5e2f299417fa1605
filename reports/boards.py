"""The pandas tables as tables for people: rounded, with units, nothing dropped in silence."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from robench.reports.columns import PARTS, measured
from robench.reports.grouping import trained_at
from robench.reports.text import (
    NOTHING,
    TITLES,
    Board,
    Cell,
    Column,
    accuracy,
    count,
    duration,
    p_value,
    percent,
    points,
)
from robench.reports.trust import flag
from robench.reports.uncertainty import estimate

# Shown as a column where rows differ, otherwise said once above the table.
SHARED = {"recipe": "Recipe", "epochs": "Epochs", "model": "Model", "source": "Source"}
ROB_F = {"rob_f_self": "Rob_f(x_f*) %", "rob_f_student": "Rob_f(x_S*) %",
         "student_robust": "Student on x_S* %", "clean": "Clean %"}

FACETS = {"dataset": "Data set", "threat": "Threat model", "model": "Model", "recipe": "Recipe"}
SIGNIFICANT = 0.05  # of a p-value; a difference above it is printed faint

Line = dict[Hashable, Any]  # a row of a frame
Links = Callable[[Mapping[Any, Any], str], tuple[str, ...]]  # of a line and the name of a number


def unlinked(line: Mapping[Any, Any], name: str) -> tuple[str, ...]:
    """For boards that stand alone; a page has `trace.Trace`."""
    return ()


def leaderboards(frame: pd.DataFrame, links: Links = unlinked) -> list[Board]:
    """A board for each group of `tables.leaderboard`."""
    return [_leaderboard(group, links) for _, group in frame.groupby("group", sort=False)]


def checkpoint_boards(frame: pd.DataFrame, links: Links = unlinked) -> list[Board]:
    """A board for each data set and threat model of `tables.other_checkpoints`."""
    return [
        Board(group_title(group), _networks(group, links), _shared(group), _remarks(group),
              facets=_facets(group))
        for _, group in frame.groupby(["dataset", "split", "threat"], sort=False)
    ]


def rob_f_boards(frame: pd.DataFrame, ids: Sequence[str] = ()) -> list[Board]:
    """A board for each data set, threat model and attack of `tables.rob_f`.

    `ids` are those of the frame's rows, for links to their records.
    """
    links: list[tuple[str, ...]] = [(f"#{one}",) for one in ids] or [()] * len(frame)
    boards = []
    for _, group in frame.groupby(["dataset", "threat", "attack"], sort=False):
        boards += [*_rob_f_means(group), _rob_f(group, [links[i] for i in group.index])]
    return boards


def rob_f_summary(frame: pd.DataFrame) -> list[Board]:
    """Like `rob_f_boards`, but a line for each network where there are several seeds."""
    return [board for _, group in frame.groupby(["dataset", "threat", "attack"], sort=False)
            for board in _rob_f_means(group) or [_rob_f(group, [()] * len(group))]]


def group_title(group: pd.DataFrame) -> str:
    """Data set, split and threat model of the rows of a frame."""
    first = group.iloc[0]
    return f"{first['dataset']} {first['split']}, {first['threat']}"


def _leaderboard(group: pd.DataFrame, links: Links) -> Board:
    lines = group.to_dict("records")
    attack = lines[0]["rank_attack"]
    rank = _column("#", lines, lambda line: Cell(_known(line["rank"])))
    ranked = (f"Ranked by {TITLES.get(attack, attack)}" if attack
              else "Not ranked: no attack was tried on every row")
    return Board(
        title=group_title(group),
        columns=(rank, *_networks(group, links, ranked=bool(attack))),
        facts=(ranked, *_shared(group), f"Images: sha256 {lines[0]['images']}"),
        remarks=_remarks(group),
        lead=_accuracy_title(attack, lines) if attack else None,
        facets=_facets(group),
    )


def _rob_f(group: pd.DataFrame, links: Sequence[tuple[str, ...]]) -> Board:
    lines = group.to_dict("records")
    columns = [
        *(_words(title, lines, name) for name, title in _rob_f_words(group).items()),
        _column("Seed", lines, lambda line: Cell(str(line["seed"]))),
        *(Column(title, tuple(Cell(percent(line[name], line["n"]), links=link)
                              for line, link in zip(lines, links, strict=True)))
          for name, title in ROB_F.items()),
        _column("Images", lines, lambda line: Cell(f"{line['n']:,}", sort=line["n"])),
        _column("Warnings", lines, _transfer_flag),
    ]
    return Board(_rob_f_title(lines[0]), tuple(columns), facets=_facets(group))


def _rob_f_means(group: pd.DataFrame) -> list[Board]:
    """A line for each network, mean and standard deviation over its seeds; none without several."""
    words = _rob_f_words(group)
    nets = [net for _, net in group.groupby([*words, "n"], sort=False, dropna=False)]
    if all(len(net) < 2 for net in nets):
        return []
    first = [net.iloc[0].to_dict() for net in nets]

    def mean(net: pd.DataFrame, name: str) -> Cell:
        n = int(net["n"].iloc[0])
        got = estimate((net[name] * n / 100).tolist(), n)
        return accuracy(100 * got.mean, 100 * got.std, 100 * got.low, 100 * got.high, n=n,
                        failed=0, show_n=False)

    columns = [
        *(_words(title, first, name) for name, title in words.items()),
        Column("Seeds", tuple(Cell(str(len(net))) for net in nets)),
        *(Column(title, tuple(mean(net, name) for net in nets)) for name, title in ROB_F.items()),
        _column("Images", first, lambda line: Cell(f"{line['n']:,}", sort=line["n"])),
    ]
    return [Board(f"{_rob_f_title(first[0])}: means over seeds", tuple(columns),
                  ("± is the standard deviation over seeds",))]


def _rob_f_words(group: pd.DataFrame) -> dict[str, str]:
    several = [name for name in ("recipe", "model") if group[name].nunique() > 1]
    return {"label": "Defense", **{name: SHARED[name] for name in several},
            "checkpoint": "Checkpoint", "selection": "Selected on", "network": "Network f"}


def _rob_f_title(line: Line) -> str:
    return f"{line['dataset']}, {line['threat']}, {line['attack']}"


def _transfer_flag(line: Line) -> Cell:
    """Of a peer or teacher that withstands the student's examples alone."""
    gap = (line["rob_f_student"] - line["rob_f_self"]) / 100
    found = flag("transfer-only", gap)
    return Cell(str(len(found)), more="; ".join(found))


def _networks(group: pd.DataFrame, links: Links, ranked: bool = False) -> tuple[Column, ...]:
    """What leaderboards and other checkpoints have in common.

    Only in a ranking, and where all rows have the same number of images, an accuracy is a contest.
    """
    lines = group.to_dict("records")
    columns = [
        _words("Defense", lines, "label"),
        *(_words(title, lines, name) for name, title in SHARED.items()
          if group[name].nunique() > 1),
        *_trained_at(lines),
        _words("Checkpoint", lines, "checkpoint"),
        _words("Selected on", lines, "selection"),
        _column("Seeds", lines, lambda line: Cell(str(line["seeds"]))),
        *(replace(_column(_accuracy_title(name, lines), lines, _accuracy_cell(name, lines, links)),
                  contest=ranked and len(_sizes(name, lines)) == 1)
          for name in measured(group)),
    ]
    if "delta" in group and group["baseline"].any():
        columns.append(_column(_delta_title(lines), lines,
                               _delta_cell(lines, links)))
    return (
        *columns,
        _column("Training", lines, _training),
        _column("Parameters", lines,
                lambda line: Cell(count(line["parameters"]), sort=line["parameters"])),
        _column("Warnings", lines,
                lambda line: Cell(str(line["warnings"]), more=line["warning_text"])),
    )


def _trained_at(lines: Sequence[Line]) -> tuple[Column, ...]:
    """The threat models of the trainings, where one of them is not that of the table.

    Of natural training it says nothing: that attacks no more than to choose its checkpoint.
    """
    at = ["" if line["defense"].partition("+")[0] == "standard" else trained_at(line["options"])
          for line in lines]
    if not any(text and text != line["threat"] for line, text in zip(lines, at, strict=True)):
        return ()
    return (Column("Trained at", tuple(Cell(text or NOTHING) for text in at), words=True),)


def _column(title: str, lines: Sequence[Line], cell: Callable[[Line], Cell]) -> Column:
    return Column(title, tuple(map(cell, lines)))


def _words(title: str, lines: Sequence[Line], name: str) -> Column:
    return Column(title, tuple(Cell(str(line[name]) or NOTHING) for line in lines), words=True)


def _known(value: Any) -> str:
    return NOTHING if pd.isna(value) else str(value)


def _sizes(name: str, lines: Sequence[Line]) -> set[int]:
    return {line[f"{name}_n"] for line in lines if not pd.isna(line[f"{name}_n"])}


def _accuracy_title(name: str, lines: Sequence[Line]) -> str:
    sizes = _sizes(name, lines)
    images = f", n = {sizes.pop():,}" if len(sizes) == 1 else ""
    return f"{TITLES.get(name, name)} %{images}"


def _accuracy_cell(name: str, lines: Sequence[Line], links: Links) -> Callable[[Line], Cell]:
    """How to write one accuracy; its n goes into the cell where rows differ in it."""
    mixed = len(_sizes(name, lines)) > 1

    def cell(line: Line) -> Cell:
        values = [line[name + part] for part in PARTS[:4]]
        n, failed = line[f"{name}_n"], line[f"{name}_failed"]
        found = accuracy(*values, n=0 if pd.isna(n) else n,
                         failed=0 if pd.isna(failed) else failed, show_n=mixed)
        return replace(found, links=links(line, name))

    return cell


def _baselines(lines: Sequence[Line]) -> set[str]:
    return {line["delta_to"] for line in lines if line["delta_to"]}


def _delta_title(lines: Sequence[Line]) -> str:
    baselines = _baselines(lines)
    return f"Δ to {baselines.pop()}, points" if len(baselines) == 1 else "Δ to baseline, points"


def _delta_cell(lines: Sequence[Line], links: Links) -> Callable[[Line], Cell]:
    """The difference, the test, and what it is about where that is not said by the title."""
    several = len(_baselines(lines)) > 1

    def cell(line: Line) -> Cell:
        if pd.isna(line["delta"]):
            return Cell("baseline" if line["baseline"] else NOTHING)
        attack = line["delta_attack"]
        about = "" if attack == line["rank_attack"] else f", {TITLES.get(attack, attack)}"
        text = f"{points(line['delta'], line[f'{attack}_n'])} ({p_value(line['delta_p'])}{about})"
        return Cell(text, f"to {line['delta_to']}" if several else "", sort=line["delta"],
                    minor=not line["delta_p"] < SIGNIFICANT,  # NaN is not significant either
                    links=links(line, "delta"))

    return cell


def _training(line: Line) -> Cell:
    own, total = line["train_seconds"], line["train_and_teacher_seconds"]
    teacher = f" + {duration(total - own)} teacher" if total > own else ""
    return Cell(duration(own) + teacher if total else NOTHING, sort=own)


def _shared(group: pd.DataFrame) -> tuple[str, ...]:
    same = [f"{title}: {group[name].iloc[0]}" for name, title in SHARED.items()
            if group[name].nunique() == 1 and str(group[name].iloc[0])]
    return (", ".join(same),) if same else ()


def _facets(group: pd.DataFrame) -> tuple[Mapping[str, str], ...]:
    return tuple({name: str(line[name]) for name in FACETS} for line in group.to_dict("records"))


def _remarks(group: pd.DataFrame) -> tuple[str, ...]:
    """Notes on the recipe and warnings of the evaluation, row by row."""
    return tuple(
        f"{line['label']} ({line['checkpoint']}): {text}"
        for line in group.to_dict("records")
        for text in (line["notes"], line["warning_text"]) if text
    )
