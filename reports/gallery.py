"""All figures for some results, by analysis, under names that are unique and fit for files."""

from __future__ import annotations

import re
from dataclasses import replace

from robench.reports.analyses import ANALYSES, Analysis
from robench.reports.grouping import rows
from robench.reports.runs import run_labels
from robench.reports.store import Results
from robench.reports.style import Drawing, Looks, looks
from robench.reports.surveys import survey_labels
from robench.reports.tables import ranked_groups


def draw_all(results: Results) -> list[Drawing]:
    """Every figure for which there are data."""
    look = looks_of(results)
    return [drawing for one in ANALYSES.values() for drawing in draw(one, results, look)]


def draw(analysis: Analysis, results: Results, look: Looks) -> list[Drawing]:
    """The figures of one analysis, named as in `draw_all`: their names begin with their kind."""
    drawings: dict[str, Drawing] = {}
    for drawing in analysis.draw(results, look):
        name = re.sub(r"[^a-z0-9]+", "-", drawing.name.lower()).strip("-")[:80]
        copies = sum(known == name or known.startswith(f"{name}--") for known in drawings)
        unique = f"{name}--{copies + 1}" if copies else name
        drawings[unique] = replace(drawing, name=unique)
    return list(drawings.values())


def looks_of(results: Results) -> Looks:
    """A look for every label in the results, the same in all figures."""
    return looks([
        *(row.label for row in rows(results.records)),
        # One kind at a time, as the tables label them.
        *run_labels(results.records, results.transfers).values(),
        *run_labels(results.records, results.epochs).values(),
        *survey_labels(results.landscapes, results.records).values(),
        *survey_labels(results.steps, results.records).values(),
        *survey_labels(results.corruptions, results.records).values(),
        # Rows are told apart by what they differ in, which may be less among the ranked ones.
        *(row.label for group in ranked_groups(results.records) for row in group),
    ])
