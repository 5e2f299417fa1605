"""parity: robench's attacks and those of other libraries on the same images, image by image."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from robench.attacks.adapters import Shield, isolated
from robench.attacks.adapters.pyautoattack import PARTS
from robench.attacks.base import frozen, make_attack
from robench.attacks.minimum import minimum_norm
from robench.attacks.search import Pooled
from robench.attacks.verify import full_precision
from robench.benchmark.data import Held
from robench.benchmark.evaluate import BATCH, Flags, Measurement, Target, measure
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import Reporter
from robench.benchmark.references import (
    csv_text,
    fooled,
    machine,
    networks,
    reference,
    torchattacks_pgd,
)
from robench.benchmark.spec import AttackSpec, RunSpec
from robench.errors import UsageError, one_line
from robench.files import write_atomic
from robench.reports.text import NOTHING, Board, Cell, Column, markdown

LIMIT = 1000
# By how many images ours may differ from the reference beyond what two of its seeds differ by.
TOLERANCE = 2
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # the parts of AutoAttack, in order
CLEAN, STANDS = "clean", ""  # in Run.breaker
TEN_ITERATIONS = "10 iterations, K - 1 targets: not the reference's settings"
PGD_NOTE = "theirs looks at the last iterate alone, ours at all"
FOOLBOX_FMN = {"Linf": "LInfFMNAttack", "L2": "L2FMNAttack", "L1": "L1FMNAttack"}


@dataclass(frozen=True)
class Run:
    """AutoAttack by one implementation on N images.

    Attributes:
        breaker: (N,) the part that fooled the image first, CLEAN where the network is wrong
            without an attack, STANDS where nothing fooled it.
        parts: the names of all parts, in order.
    """

    breaker: npt.NDArray[np.str_]
    parts: tuple[str, ...]

    def robust(self, parts: Sequence[str]) -> Flags:
        """(N,) what stands after these parts."""
        stands: Flags = ~np.isin(self.breaker, [CLEAN, *parts])
        return stands


@dataclass(frozen=True)
class Row:
    """Two implementations of an attack, or of its parts up to `after`, on the same images.

    Attributes:
        ours, theirs: robust images. again: of a second seed of theirs, if it was run.
        only_ours, only_theirs: images that are robust by one of the two alone.
        noise: images on which the two seeds of theirs differ.
    """

    attack: str
    library: str
    after: str
    ours: int
    theirs: int
    again: int | None
    only_ours: int
    only_theirs: int
    noise: int | None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.noise is None:
            return ""
        differ = self.only_ours + self.only_theirs
        return "within" if differ <= self.noise + TOLERANCE else "outside"


@dataclass(frozen=True)
class Disagreement:
    """An image that one AutoAttack fools and the other does not; `breaker` as in Run.

    Attributes:
        margin: of the clean image: true logit minus the largest other, in float32.
    """

    image: int
    margin: float
    ours: str
    theirs: str
    again: str


@dataclass
class Parity:
    """What was found on one network: its tables, and what was skipped or noted."""

    network: str
    n: int
    rows: list[Row] = field(default_factory=list)
    images: list[Disagreement] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def parity(
    sources: Sequence[str], spec: RunSpec, *, zoo: Path = Path("models"), quiet: bool = True
) -> str:
    """Compare on networks given as for `eval`; write parity.csv, .md and parity-images.csv.

    Returns the Markdown. Raises UsageError where pyautoattack is missing.
    """
    matrix = Matrix(spec, Reporter(quiet=quiet))
    make_attack("pyautoattack:standard", matrix.threat)  # or say now that it is missing
    data = matrix.test.take(min(spec.limit or LIMIT, len(matrix.test)))
    found, text = list[Parity](), ""
    for name, net in networks(matrix, sources, zoo):
        target = Target(net, data, spec.batch_size)
        found.append(_Comparison(name, target, matrix, spec.seeds[0]).run())
        text = _write(found, matrix)
    return text


def _write(found: Sequence[Parity], matrix: Matrix) -> str:
    """All that was found so far."""
    out = matrix.spec.out
    rows = [{"network": p.network, "n": p.n, **asdict(r), "verdict": r.verdict}
            for p in found for r in p.rows]
    images = [{"network": p.network, **asdict(i)} for p in found for i in p.images]
    text = "\n".join(["# Parity\n", *(part for p in found for part in _markdown(p, matrix))])
    write_atomic(out / "parity.csv", csv_text(rows))
    write_atomic(out / "parity-images.csv", csv_text(images))
    write_atomic(out / "parity.md", text)
    return text


def stages(ours: Run, theirs: Run, again: Run) -> list[Row]:
    """AutoAttack after each of its parts; two seeds of theirs."""
    parts = list(dict.fromkeys([*ours.parts, *theirs.parts]))
    return [_row("autoattack", "pyautoattack", ours.robust(parts[:k]), theirs.robust(parts[:k]),
                 again.robust(parts[:k]), after=["clean", *parts][k])
            for k in range(len(parts) + 1)]


def _row(
    attack: str, library: str, ours: Flags, theirs: Flags, again: Flags | None = None,
    after: str = "", note: str = "",
) -> Row:
    return Row(
        attack, library, after, int(ours.sum()), int(theirs.sum()),
        None if again is None else int(again.sum()),
        int((ours & ~theirs).sum()), int((theirs & ~ours).sum()),
        None if again is None else int((theirs ^ again).sum()), note,
    )


class _Comparison:
    """All comparisons on one network."""

    def __init__(self, name: str, target: Target, matrix: Matrix, seed: int) -> None:
        self._target, self._threat, self._seed = target, matrix.threat, seed
        self._precision, self._reporter = matrix.spec.precision, matrix.reporter
        self._found = Parity(name, len(target.data))

    def run(self) -> Parity:
        mine, ours = self._found, self._ours(self._measure(AttackSpec(name="autoattack")))
        theirs, again = (self._reference(self._seed + k) for k in (0, 1))
        mine.rows += stages(ours, theirs, again)
        mine.images += self._disagreements(ours, theirs, again)
        with self._skipping():
            self._other("autoattack", AttackSpec(name="torchattacks:AutoAttack"),
                        ours.robust(ours.parts), TEN_ITERATIONS)
        with self._skipping():
            for steps in (20, 40):
                theirs_spec = torchattacks_pgd(self._threat, steps)
                robust = self._measure(AttackSpec(name=f"pgd-{steps}")).robust
                self._other(f"pgd-{steps}", theirs_spec, robust, PGD_NOTE)
        with self._skipping():
            if importlib.util.find_spec("foolbox") is None:
                raise UsageError("foolbox, for LinfPGD, DDN and FMN, is not installed")
            mine.rows += self._foolbox()
        return mine

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        """What is missing, fails, or is not for this norm or number of classes is noted."""
        try:
            yield
        except Exception as error:  # libraries raise whatever they like
            reason = str(error) if isinstance(error, UsageError) else one_line(error)
            self._found.notes.append(f"skipped: {reason}")

    def _measure(self, spec: AttackSpec) -> Measurement:
        spec = spec.at(self._precision)
        with self._reporter.task(f"{self._found.network}: {spec.label}") as update:
            return measure(self._target, spec, self._threat, seed=self._seed, progress=update)

    def _other(self, attack: str, theirs: AttackSpec, ours: Flags, note: str) -> None:
        robust = self._measure(theirs).robust
        self._found.rows.append(_row(attack, theirs.name, ours, robust, note=note))

    def _ours(self, m: Measurement) -> Run:
        breaker = np.full(len(m.correct), CLEAN, dtype="<U32")
        breaker[m.robust] = STANDS
        if m.breaker is not None:
            for index, name in enumerate(m.stages):
                breaker[m.breaker == index] = name
        self._found.notes += m.warnings
        return Run(breaker, m.stages or STANDARD)

    def _reference(self, seed: int) -> Run:
        """The reference, part by part; its own clean pass is ours."""
        target, parts = self._target, [p for p in STANDARD if self._target.classes >= PARTS[p]]
        breaker = np.where(target.correct, STANDS, CLEAN).astype("<U32")
        with self._reporter.task(f"{self._found.network}: pyautoattack seed {seed}") as update:
            for done, part in enumerate(parts):
                update(done / len(parts), f"{part}: robust {int((breaker == STANDS).sum())}")
                rows = np.flatnonzero(breaker == STANDS)
                if len(rows):
                    data = self._at(rows)
                    with full_precision():
                        x_adv = reference(target.model, data.x, data.y, self._threat, seed=seed,
                                          part=part)
                    broken = fooled(target.model, data.x, x_adv, data.y, self._threat)
                    breaker[rows[broken]] = part
        return Run(breaker, tuple(parts))

    def _at(self, rows: npt.NDArray[np.int64]) -> Held:
        return self._target.data.select(torch.from_numpy(rows)).to(self._target.device).held()

    def _disagreements(self, ours: Run, theirs: Run, again: Run) -> list[Disagreement]:
        rows = np.flatnonzero((ours.breaker == STANDS) != (theirs.breaker == STANDS))
        if not len(rows):
            return []
        data = self._at(rows)
        with torch.no_grad(), frozen(self._target.model), full_precision():
            logits = self._target.model(data.x)
        true = logits.gather(1, data.y[:, None]).squeeze(1)
        margins = true - logits.scatter(1, data.y[:, None], -torch.inf).amax(1)
        return [Disagreement(int(row), margin, *(str(run.breaker[row])
                                                 for run in (ours, theirs, again)))
                for row, margin in zip(rows, margins.tolist(), strict=True)]

    def _foolbox(self) -> Iterator[Row]:
        """LinfPGD, and the minimum-norm attacks at the threat's eps."""
        attacks, norm = importlib.import_module("foolbox").attacks, self._threat.norm
        data = self._at(np.flatnonzero(self._target.correct))
        if not len(data):
            return
        if norm == "Linf":
            theirs = attacks.LinfPGD(steps=20, abs_stepsize=self._threat.eps / 4)
            x_adv, _ = self._run_foolbox(theirs, data, self._threat.eps)
            robust = ~fooled(self._target.model, data.x, x_adv, data.y, self._threat)
            ours = self._measure(AttackSpec(name="pgd-20")).robust[self._target.correct]
            yield _row("pgd-20", "foolbox:LinfPGD", ours, robust, note=PGD_NOTE)
        pairs = {"fmn": FOOLBOX_FMN[norm]} | ({"ddn": "DDNAttack"} if norm == "L2" else {})
        for name, theirs_name in pairs.items():
            x_adv, success = self._run_foolbox(getattr(attacks, theirs_name)(), data)
            near = self._threat.distance(x_adv, data.x).where(success, torch.inf).cpu().numpy()
            attack = cast(Pooled, make_attack(name, self._threat, precision=self._precision))
            _, found = minimum_norm(attack, self._target.model, data.x, data.y, seed=self._seed)
            distance = found.cpu().numpy()
            note = (f"theirs with its defaults; median distance {np.median(distance):.4g}, "
                    f"theirs {np.median(near):.4g}")
            eps = self._threat.eps
            yield _row(name, f"foolbox:{theirs_name}", distance > eps, near > eps, note=note)

    def _run_foolbox(
        self, attack: Any, data: Held, eps: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Examples (N, C, H, W) and which of them fool the network."""
        foolbox, model = importlib.import_module("foolbox"), self._target.model
        with isolated(model, self._seed), full_precision():
            shielded = foolbox.PyTorchModel(Shield(model, data.x).eval(), device=data.x.device,
                                            bounds=(self._threat.low, self._threat.high))
            parts = zip(torch.split(data.x, BATCH), torch.split(data.y, BATCH), strict=True)
            found = [attack(shielded, x.contiguous(), y, epsilons=eps)[1:] for x, y in parts]
        x_adv, success = (torch.cat(column).detach() for column in zip(*found, strict=True))
        return x_adv, success


def _markdown(found: Parity, matrix: Matrix) -> list[str]:
    """The tables of one network."""
    parts = [row for row in found.rows if row.noise is not None]
    others = [row for row in found.rows if row.noise is None]
    seed, precision = matrix.spec.seeds[0], matrix.spec.precision
    facts = (
        f"{found.n} images of {matrix.dataset.name}, {matrix.threat}; "
        f"ours: autoattack, {precision}, seed {seed}; " + machine(matrix.device),
        f"robust images after each part; within: ours and seed {seed} of the reference differ on "
        f"at most {TOLERANCE} images more than its seeds {seed} and {seed + 1}",
    )
    boards = [Board(f"{found.network}: AutoAttack", _columns(parts, {
        "After": "after", "Ours": "ours", f"pyautoattack, seed {seed}": "theirs",
        f"seed {seed + 1}": "again", "Robust by ours alone": "only_ours",
        "by the reference alone": "only_theirs", "Its seeds differ": "noise",
        "Verdict": "verdict"}), facts)]
    if others:
        boards.append(Board(f"{found.network}: other implementations", _columns(others, {
            "Attack": "attack", "Theirs": "library", "Robust by ours": "ours",
            "by theirs": "theirs", "by ours alone": "only_ours",
            "by theirs alone": "only_theirs", "Note": "note"})))
    if found.images:
        boards.append(Board(f"{found.network}: where ours and the reference disagree", _columns(
            found.images, {"Image": "image", "Clean margin": "margin", "Broken by ours": "ours",
                           "by the reference": "theirs", "by its other seed": "again"})))
    notes = [f"- {note}" for note in dict.fromkeys(found.notes)]
    return [*map(markdown, boards), *(["\n".join(notes) + "\n"] if notes else [])]


def _columns(rows: Sequence[Any], titles: Mapping[str, str]) -> tuple[Column, ...]:
    """One column per title and attribute."""
    columns = []
    for title, name in titles.items():
        values = [getattr(row, name) for row in rows]
        texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in values]
        cells = tuple(Cell(text or NOTHING) for text in texts)
        columns.append(Column(title, cells, words=isinstance(values[0], str)))
    return tuple(columns)
