"""What robustness costs: clean accuracy, with the Pareto front, and time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

import pandas as pd

from robench.reports.grouping import Key, Row, canonical, distinct
from robench.reports.record import Record
from robench.reports.tables import leaderboard, ranked_groups

SHORT = ("group", "rank", "dataset", "split", "threat", "name", "label", "seeds", "clean", "robust",
         "rank_attack", "pareto", "train_seconds", "train_and_teacher_seconds", "attack_seconds",
         "machine")
DETAILS = ("checkpoint", "model", "recipe", "epochs", "source")


def tradeoff(records: Sequence[Record]) -> pd.DataFrame:
    """The rows of `tables.leaderboard` that have a rank, with four columns more.

    `name`: the label, with what tells the row from others of its group.
    `pareto`: no other row of the group is at least as good in clean accuracy and under
    `rank_attack`, and better in one of the two. `attack_seconds`: how long `rank_attack` took on
    one network, the mean over seeds. `machine`: the devices and threads on which it took so long.
    Rows of a group have the same images for this attack, so times differ by network and machine.
    """
    frame = leaderboard(records)
    frame = frame[frame["rank"].notna()]
    table = {(number, row.key): row
             for number, group in enumerate(ranked_groups(records), start=1) for row in group}
    found = {i: table[line["group"], Key(*(line[name] for name in Key._fields))]
             for i, line in frame.iterrows()}
    names: dict[Hashable, str] = {}
    for _, group in frame.groupby("group", sort=False):
        known = row_names([found[i] for i in group.index])
        names |= {i: known[found[i].key] for i in group.index}
    seconds, machines = [], []
    for i, attack in frame["rank_attack"].items():
        passed = found[i].passed(attack)
        seconds.append(fmean(record.seconds for record in passed))
        machines.append(", ".join(sorted({_machine(record) for record in passed})))
    fronts = [on_front([(line["clean"], line[line["rank_attack"]])
                        for line in group.to_dict("records")])
              for _, group in frame.groupby("group", sort=False)]
    return frame.assign(name=pd.Series(names, frame.index, dtype=object),
                        pareto=pd.Series([on for front in fronts for on in front], frame.index,
                                         dtype=bool),
                        attack_seconds=pd.Series(seconds, frame.index, dtype=float),
                        machine=pd.Series(machines, frame.index, dtype=object))


def tradeoff_table(records: Sequence[Record]) -> pd.DataFrame:
    """`tradeoff` in short: `robust` is the accuracy under `rank_attack`."""
    frame = tradeoff(records)
    robust = [line[line["rank_attack"]] for line in frame.to_dict("records")]
    return frame.assign(robust=pd.Series(robust, frame.index, dtype=float))[list(SHORT)]


def row_names(group: Sequence[Row]) -> dict[Key, str]:
    """For rows of one group, labels that tell them apart where their settings do."""
    return distinct({
        row.key: ((), row.label, canonical({name: str(getattr(row.key, name)) for name in DETAILS}))
        for row in group
    })


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point, whether none is at least as large in both numbers and larger in one."""
    return [
        not any(other[0] >= point[0] and other[1] >= point[1] and other != point
                for other in points)
        for point in points
    ]


def _machine(record: Record) -> str:
    threads = "thread" if record.threads == 1 else "threads"
    return f"{record.device} with {record.threads} {threads}"
