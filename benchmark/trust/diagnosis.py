"""robench doctor NETWORK: all checks, a table of verdicts, what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from robench.benchmark.checks import eps_unit
from robench.benchmark.evaluate import Target
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import Network, load_network
from robench.benchmark.spec import AttackSpec, RunSpec
from robench.benchmark.trust.outcome import OUTCOMES, Number, Patient
from robench.errors import RobenchError, Unreliable, one_line
from robench.files import write_atomic
from robench.reports.judge import ADAPT
from robench.reports.text import NOTHING, Board, Cell, Column, markdown
from robench.reports.trust import CHECKS, Finding

LIMIT = 128
# What is put to the test unless attacks are named: losses of the probabilities and of the margin.
ATTACKS = ("apgd-ce", "apgd-dlr")


@dataclass(frozen=True)
class Diagnosis:
    """What the checks found on one network, in the order of `CHECKS`."""

    network: str
    findings: tuple[Finding, ...]
    facts: tuple[str, ...]

    @property
    def failed(self) -> list[str]:
        return [f.check.id for f in self.findings if f.verdict == "fail"]

    def board(self) -> Board:
        """A row for each check."""
        found = self.findings
        columns: dict[str, list[str]] = {
            "Check": [f.check.id for f in found],
            "Verdict": [str(f.verdict) for f in found],
            "Measured": [NOTHING if f.value is None else f.check.shown(f.value) for f in found],
            "Limit": [NOTHING if f.check.level == "report" else f.check.shown(f.check.limit)
                      for f in found],
            "What is measured": [f.check.tests for f in found],
            "Remark": [f.note or NOTHING for f in found],
            "What to do": [f.check.cure if f.flagged else NOTHING for f in found],
        }
        return Board(self.network, tuple(
            Column(title, tuple(map(Cell, cells)), words=True)
            for title, cells in columns.items()), facts=self.facts)

    def plain(self) -> dict[str, object]:
        """For JSON, which has no NaN."""
        return {"network": self.network, "failed": self.failed, "checks": [
            {"id": f.check.id, "verdict": f.verdict, "limit": f.check.limit, "note": f.note,
             "value": f.value if f.value is None or math.isfinite(f.value) else str(f.value)}
            for f in self.findings]}


def diagnose(
    sources: Sequence[str], spec: RunSpec, *, zoo: Path = Path("models"), quiet: bool = True
) -> list[Diagnosis]:
    """All checks on networks given as for `eval`, on `spec.limit` images or LIMIT."""
    matrix = Matrix(spec, Reporter(quiet=quiet))
    matrix.test = matrix.test.take(min(spec.limit or LIMIT, len(matrix.test))).fitted()
    networks = [load_network(source, matrix.dataset, matrix.threat, model=spec.model, zoo=zoo,
                             reporter=matrix.reporter)
                for source in dict.fromkeys(sources)]
    return [_diagnose(network, matrix) for network in networks]


def report(found: Sequence[Diagnosis]) -> str:
    """All tables, in Markdown."""
    return "\n".join(["# Doctor\n", *(markdown(one.board()) for one in found)])


def save(found: Sequence[Diagnosis], out: Path) -> None:
    """doctor.md and doctor.json. Raises RobenchError if the disk refuses."""
    write_atomic(out / "doctor.md", report(found))
    write_atomic(out / "doctor.json", json.dumps([one.plain() for one in found], indent=1) + "\n")


def require(found: Sequence[Diagnosis]) -> None:
    """Raises Unreliable where a check failed."""
    failed = [f"{one.network}: {', '.join(one.failed)}" for one in found if one.failed]
    if failed:
        raise Unreliable(f"evaluation unreliable: {'; '.join(failed)}")


def examine_attacks(patient: Patient, update: Reporter | None = None) -> list[Finding]:
    """The costly checks."""
    reporter, findings = update or Reporter(quiet=True), []
    for id, measure in OUTCOMES.items():
        with reporter.task(id):
            try:
                number = measure(patient)
            except RobenchError:
                raise
            except Exception as error:  # a user's code may raise anything
                number = Number(None, f"could not be made: {one_line(error)}")
        findings.append(Finding(CHECKS[id], number.value, number.note))
    return findings


def _diagnose(network: Network, matrix: Matrix) -> Diagnosis:
    net = network.net.to(matrix.device)
    target = Target(net, matrix.test, matrix.spec.batch_size)
    patient = Patient(target, matrix.threat, matrix.attacks, matrix.dataset.train,
                      len(matrix.dataset.classes), matrix.spec.seeds[0])
    findings = [
        Finding(CHECKS["eval-mode"], network.in_train_mode),
        *(f for f in target.findings if f.check.id != "eval-mode"),
        Finding(CHECKS["eps-unit"], eps_unit(matrix.threat, matrix.test.x)),
        *examine_attacks(patient, matrix.reporter),
        Finding(CHECKS["transfer-only"], None, "needs a student and its peer: see the Rob_f table "
                "of a run"),
    ]
    findings.append(_adaptive(findings, matrix.attacks))
    by_id = {f.check.id: f for f in findings}
    facts = (f"{matrix.spec.dataset} test, {matrix.threat}, {len(matrix.test)} images",
             f"Attacks put to the test: {', '.join(a.label for a in matrix.attacks)}")
    return Diagnosis(network.source, tuple(by_id[id] for id in CHECKS), facts)


def _adaptive(findings: Sequence[Finding], attacks: Sequence[AttackSpec]) -> Finding:
    """Whether a flag asks for an attack made for the defense, and there is none."""
    asking = sorted(f.check.id for f in findings if f.flagged and f.check.id in ADAPT)
    made = any(a.options.get("adaptive") or a.options.get("eot", 1) > 1 for a in attacks)
    return Finding(CHECKS["adaptive-hook"], *Number(float(bool(asking) and not made),
                                                    ", ".join(asking)))
