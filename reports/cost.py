"""What a run cost: time, passes and memory, each thing once, and what nobody counted said so."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from robench.reports.columns import make_frame
from robench.reports.grouping import canonical
from robench.reports.record import Record, Survey
from robench.reports.runs import run_labels, trainings
from robench.reports.store import Results
from robench.reports.surveys import identity, survey_labels
from robench.reports.text import NOTHING, Board, Cell, Column, count, duration

TRAINING, TEACHERS, ATTACKS, SURVEYS = "training", "teachers", "attacks", "surveys"
COLUMNS = ("part", "what", "device", "networks", "measured", "seconds", "forwards", "backwards",
           "peak_bytes", "untimed", "uncounted")

Line = dict[str, Any]


def cost(results: Results) -> pd.DataFrame:
    """What the trainings, the attacks and the other measurements of a run took.

    A line for each defense that was trained, for the teachers, for each attack and each kind of
    survey, by device. `networks` and `measured` are how many there are of them; `seconds` of wall
    time, `forwards` and `backwards`, passes of single images, are sums over those of which they
    are known; `untimed` and `uncounted` say of how many they are not. A training is counted once,
    however many checkpoints of it were attacked, and for the device on which they were; a teacher
    once, however many students it has; an attack once, whatever its record is a row of (see
    `measurements`). `peak_bytes` is the largest of all.
    """
    lines = [*_trainings(results), *_teachers(results.records), *_attacks(results.records),
             *_surveys(results)]
    return make_frame(lines, COLUMNS)


def measurements(records: Iterable[Record]) -> list[Record]:
    """A record of each measurement, the first. One that was made once may be in several: where the
    best epoch of a training is its last, both checkpoints are one network."""
    found: dict[tuple[object, ...], Record] = {}
    for r in records:
        found.setdefault((r.run, r.seed, r.weights_sha256, r.data_sha256, r.threat, r.attack,
                          canonical(r.attack_config), r.attack_seed, r.created, r.seconds), r)
    return list(found.values())


def cost_boards(results: Results) -> list[Board]:
    """The table for people, with the sums above it."""
    frame = cost(results)
    if frame.empty:
        return []
    lines: list[Line] = [{str(k): v for k, v in line.items()} for line in frame.to_dict("records")]

    def words(title: str, name: str) -> Column:
        return Column(title, tuple(Cell(line[name] or NOTHING) for line in lines), words=True)

    def numbers(title: str, name: str, text: Any) -> Column:
        return Column(title, tuple(Cell(NOTHING) if pd.isna(line[name]) else
                                   Cell(text(line[name]), sort=float(line[name]))
                                   for line in lines))

    return [Board("Cost", (
        words("Part", "part"), words("What", "what"), words("Device", "device"),
        numbers("Networks", "networks", "{:,}".format),
        numbers("Measurements", "measured", "{:,}".format),
        numbers("Wall time", "seconds", duration),
        numbers("Forward passes", "forwards", count),
        numbers("Backward passes", "backwards", count),
        numbers("Peak memory", "peak_bytes", _bytes),
        Column("Not known", tuple(Cell(_gaps(line) or NOTHING) for line in lines), words=True),
    ), tuple(in_words(frame)))]


def in_words(frame: pd.DataFrame) -> list[str]:
    """The sums of `cost`: a line for each device, and one for what is not known."""
    said = []
    for device, some in frame[frame["device"] != ""].groupby("device", sort=False):
        parts = []
        for part in (TRAINING, TEACHERS, ATTACKS, SURVEYS):
            mine = some[some["part"] == part]
            if mine["seconds"].notna().any():
                parts.append(f"{part} {duration(float(mine['seconds'].sum()))}")
        if some["forwards"].notna().any():
            passes = [float(some[name].sum()) for name in ("forwards", "backwards")]
            parts.append(f"{count(passes[0])} forward and {count(passes[1])} backward passes")
        if some["peak_bytes"].notna().any():
            parts.append(f"largest peak memory {_bytes(some['peak_bytes'].max())}")
        said.append(f"{device}: {', '.join(parts)}")
    gaps = [f"{line['part']}, {line['what']}: {_gaps(line)}" for line in frame.to_dict("records")
            if _gaps(line)]
    return said + ([f"Not known, and in no sum: {'; '.join(gaps)}"] if gaps else [])


def _trainings(results: Results) -> list[Line]:
    """One for each defense and device, and one for the networks that came from outside."""
    labels = run_labels(results.records, results.epochs)
    found: dict[tuple[str, float], tuple[str, str]] = {}
    for r in results.records:
        if r.run:  # the same run on another machine took another time
            found.setdefault((r.run, r.train_seconds), (labels[r.run], r.device))
    for one in trainings(results.epochs):
        if not any(run == one.run and math.isclose(seconds, one.seconds)
                   for run, seconds in found):  # nothing of it was attacked
            found[one.run, one.seconds] = labels[one.run], ""
    lines: dict[tuple[str, str], Line] = {}

    def line(what: str, device: str) -> Line:
        return lines.setdefault((what, device), {
            "part": TRAINING, "what": what, "device": device, "networks": 0, "untimed": 0})

    for (_, seconds), place in found.items():
        mine = line(*place)
        mine["networks"] += 1
        mine["seconds"] = mine.get("seconds", 0.0) + seconds
    surveys = [one for some in _kinds(results).values() for one in some]
    timed, names = {run for run, _ in found}, survey_labels(surveys, results.records)
    untimed = {one.run: names[identity(one)] for one in surveys
               if one.run and one.run not in timed}
    networks = [*((r.run, r.weights_sha256) for r in results.records),
                *((one.run, one.weights_sha256) for one in surveys)]
    outside = {weights for _, weights in networks} - {weights for run, weights in networks if run}
    for what in (*untimed.values(), *["networks from outside"] * len(outside)):
        mine = line(what, "")
        mine["networks"] += 1
        mine["untimed"] += 1
    return list(lines.values())


def _teachers(records: Sequence[Record]) -> list[Line]:
    """The teachers that are no rows of their own, each once, by device.

    A record has the time of all its teachers that were trained for it in one number: what of them
    is known from another record is taken off, and the rest is that of the others together.
    """
    times = {frozenset({r.weights_sha256}): r.train_seconds + r.teacher_seconds
             for r in records if r.run}
    rows = frozenset().union(*times)
    taught, given = dict[frozenset[str], Record](), set[str]()
    for r in records:
        brought = set((r.defense_config.get("teachers") or {}).values())  # are not in the number
        given |= brought
        taught[frozenset(r.teacher_sha256.values()) - brought] = r
    lines, timed = dict[str, Line](), set[str]()

    def line(device: str, networks: int) -> Line:
        mine = lines.setdefault(device, {"part": TEACHERS, "what": "that are no rows",
                                         "device": device, "networks": 0, "untimed": 0})
        mine["networks"] += networks
        return mine

    for teachers, r in sorted(taught.items(), key=lambda item: len(item[0])):
        parts = [some for some in times if some <= teachers]
        new = teachers.difference(*parts)
        left = r.teacher_seconds - sum(times[some] for some in parts)
        if not new or any(new & some for some in times):  # or nobody knows which took how much
            continue
        times[new] = max(left, 0.0)
        if left > 1e-6:  # else nobody trained them here
            mine = line(r.device, len(new))
            mine["seconds"] = mine.get("seconds", 0.0) + left
            timed |= new
    untimed = given.union(*taught) - rows - timed
    if untimed:
        line("", len(untimed))["untimed"] = len(untimed)
    return list(lines.values())


def _attacks(records: Sequence[Record]) -> list[Line]:
    """One for each attack and device. Points of the accuracy-over-eps figure are apart."""
    found: dict[tuple[str, str], list[Record]] = {}
    for r in measurements(records):
        what = r.attack + (" over eps" if r.role == "curve" else "")
        found.setdefault((what, r.device), []).append(r)
    return [{
        "part": ATTACKS, "what": what, "device": device,
        "networks": len({r.weights_sha256 for r in some}), "measured": len(some),
        "seconds": sum(r.seconds for r in some if r.status != "failed")
        if any(r.status != "failed" for r in some) else None,
        "forwards": _passes(some, "forwards"), "backwards": _passes(some, "backwards"),
        "peak_bytes": max(r.peak_bytes for r in some),
        "untimed": sum(r.status == "failed" for r in some),
        "uncounted": sum(not _counted(r) for r in some),
    } for (what, device), some in found.items()]


def _counted(r: Record) -> bool:
    """Whether the passes are known; there are none where no image was attacked."""
    if r.status == "failed":
        return False
    return r.n_correct == 0 or (r.forwards is not None and r.backwards is not None)


def _passes(records: Iterable[Record], name: str) -> float | None:
    """Of single images: a record has the mean over those that were attacked."""
    known = [(getattr(r, name) or 0.0) * r.n_correct for r in records if _counted(r)]
    return sum(known) if known else None


def _surveys(results: Results) -> list[Line]:
    """What commands of their own measured; Rob_f has no clock."""
    lines: list[Line] = []
    for what, surveys in _kinds(results).items():
        for device in dict.fromkeys(one.device for one in surveys):
            some = [one for one in surveys if one.device == device]
            lines.append({
                "part": SURVEYS, "what": what, "device": device, "measured": len(some),
                "networks": len({one.weights_sha256 for one in some}),
                "seconds": sum(one.seconds for one in some), "untimed": 0,
                "uncounted": len(some)})
    if results.transfers:
        n = len(results.transfers)
        lines.append({"part": SURVEYS, "what": "Rob_f", "device": "", "measured": n,
                      "untimed": n, "uncounted": n})
    return lines


def _kinds(results: Results) -> dict[str, Sequence[Survey]]:
    return {"landscape": results.landscapes, "transfer": results.crossings,
            "steps": results.steps, "gallery": results.galleries,
            "corruptions": results.corruptions}


def _gaps(line: Any) -> str:
    """What is not known of a line, in words."""
    untimed, uncounted = (0 if pd.isna(line[name]) else int(line[name])
                          for name in ("untimed", "uncounted"))
    return ", ".join([*([f"time of {untimed:,}"] if untimed else []),
                      *([f"passes of {uncounted:,}"] if uncounted else [])])


def _bytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
