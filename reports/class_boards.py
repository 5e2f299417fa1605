"""The tables of classes: the worst class of each network, its classes, what they are taken for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from robench.reports.boards import FACETS, Links, group_title, unlinked
from robench.reports.classes import class_accuracy, confusion, worst_of
from robench.reports.record import Record
from robench.reports.text import NOTHING, TITLES, Board, Cell, Column, accuracy, percent

FEW = 10  # classes that all fit into one table or figure; of more, so many at either end
CONFUSIONS = 10  # shown of each network
Lines = Sequence[Mapping[Hashable, Any]]


def class_boards(records: Sequence[Record], links: Links = unlinked) -> list[Board]:
    """For each group of the leaderboard: networks by their worst class, with all classes where
    these are few and else the lowest and highest ones, and the most frequent confusions."""
    classes, confused = class_accuracy(records), confusion(records)
    boards = []
    for number, group in worst_of(classes).groupby("group", sort=False):
        mine = classes[classes["group"] == number]
        boards.append(_networks(group, mine, links))
        if mine["class"].nunique() > FEW:
            boards.append(_extremes(mine))
        boards.append(_confusions(confused[confused["group"] == number]))
    return boards


def extremes(some: pd.DataFrame) -> pd.DataFrame:
    """The classes of one network from the lowest robust accuracy to the highest; of many those at
    the two ends."""
    found = some.sort_values(["robust", "clean", "class"], kind="stable")
    return found if len(found) <= 2 * FEW else pd.concat([found.head(FEW), found.tail(FEW)])


def attack_title(group: pd.DataFrame) -> str:
    """The attack that ranks a group, as in titles."""
    attack = str(group["attack"].iloc[0])
    return TITLES.get(attack, attack)


def _networks(group: pd.DataFrame, classes: pd.DataFrame, links: Links) -> Board:
    """A row for each network."""
    lines = group.to_dict("records")
    columns = [
        _words("Defense", lines, "name"),
        _numbers("Seeds", [Cell(str(line["seeds"])) for line in lines]),
        _numbers(f"{attack_title(group)} %", [
            Cell(percent(line["robust"], _images(classes, line)), sort=line["robust"],
                 links=links(line, line["attack"])) for line in lines]),
        _numbers("Worst class %", [_cell(line, "worst_class", line["worst_class_n"])
                                   for line in lines]),
        _words("Worst class", lines, "worst_name"),
        _numbers("Best class %", [Cell(percent(line["best_class"], line["worst_class_n"]))
                                  for line in lines]),
        _words("Best class", lines, "best_name"),
    ]
    known = classes.drop_duplicates("class").sort_values("class")
    if len(known) <= FEW:
        by_class = {(line["name"], line["class"]): line for line in classes.to_dict("records")}
        columns += [
            _numbers(f"{one['class_name']} %, n = {one['n']:,}",
                     [_cell(by_class[place], "robust", one["n"]) if place in by_class
                      else Cell(NOTHING)
                      for place in ((line["name"], one["class"]) for line in lines)])
            for one in known.to_dict("records")
        ]
    return Board(f"{group_title(group)}: robust accuracy by class", tuple(columns),
                 (f"Under {attack_title(group)}", f"{len(known)} classes"), facets=_facets(lines))


def _extremes(classes: pd.DataFrame) -> Board:
    """A row for each network and class at the ends."""
    lines = [line for _, some in classes.groupby("name", sort=False)
             for line in extremes(some).to_dict("records")]
    return Board(
        f"{group_title(classes)}: the lowest and the highest classes",
        (_words("Defense", lines, "name"), _words("Class", lines, "class_name"),
         _numbers(f"{attack_title(classes)} %",
                  [_cell(line, "robust", line["n"]) for line in lines]),
         _numbers("Clean %", [_cell(line, "clean", line["n"]) for line in lines]),
         _numbers("Images", [Cell(f"{line['n']:,}", sort=line["n"]) for line in lines])),
        facets=_facets(lines))


def _confusions(confused: pd.DataFrame) -> Board:
    """A row for each network and each of the pairs of classes that it confuses most."""
    wrong = confused[confused["true"] != confused["predicted"]]
    most = wrong.sort_values(["count", "clean_count"], ascending=False, kind="stable")
    lines = [line for name in dict.fromkeys(confused["name"])
             for line in most[most["name"] == name].head(CONFUSIONS).to_dict("records")]
    return Board(
        f"{group_title(confused)}: the most frequent confusions",
        (_words("Defense", lines, "name"), _words("True class", lines, "true_name"),
         _words("Taken for", lines, "predicted_name"),
         _numbers(f"Under {attack_title(confused)} %",
                  [Cell(percent(line["share"], line["n"])) for line in lines]),
         _numbers("Clean %", [Cell(percent(line["clean_share"], line["n"])) for line in lines]),
         _numbers("Images of the class",
                  [Cell(f"{line['n']:,}", sort=line["n"]) for line in lines])),
        ("In percent of the images of the true class",), facets=_facets(lines))


def _images(classes: pd.DataFrame, line: Mapping[Hashable, Any]) -> int:
    return int(classes.loc[classes["name"] == line["name"], "n"].sum())


def _cell(line: Mapping[Hashable, Any], name: str, n: int) -> Cell:
    values = [line[name + part] for part in ("", "_std", "_low", "_high")]
    return replace(accuracy(*values, n=n, failed=0, show_n=False), sort=line[name])


def _words(title: str, lines: Lines, name: str) -> Column:
    return Column(title, tuple(Cell(str(line[name])) for line in lines), words=True)


def _numbers(title: str, cells: Sequence[Cell]) -> Column:
    return Column(title, tuple(cells))


def _facets(lines: Lines) -> tuple[Mapping[str, str], ...]:
    return tuple({name: str(line[name]) for name in FACETS} for line in lines)
