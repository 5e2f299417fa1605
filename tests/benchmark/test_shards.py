"""Shards: an attack in parts finds what the whole finds, image by image, and can be resumed."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robench.attacks.autoattack import AutoAttack
from robench.attacks.base import ATTACKS
from robench.attacks.search import Stage
from robench.attacks.threat import ThreatModel
from robench.benchmark import matrix
from robench.benchmark.data import load_dataset
from robench.benchmark.evaluate import Target, measure, merged
from robench.benchmark.graph import Share
from robench.benchmark.parts import Part, attack_part, slices, together
from robench.benchmark.spec import AttackSpec
from robench.reports.store import load, save

N = 30
CLOCK = {"created", "seconds", "peak_bytes", "flags"}
WORK = {"batch_size", "forwards", "backwards"}  # how it was done, not what was found


@pytest.fixture(scope="module")
def target(make_network):
    """A network that has seen the digits for a moment, and 30 of them: 20 or so are right."""
    data, net = load_dataset("digits"), make_network()
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.train().parameters(), 3e-3)
    for _ in range(25):
        rows = torch.randint(len(data.train), (128,))
        loss = torch.nn.functional.cross_entropy(net(data.train.x[rows]), data.train.y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Target(net.eval(), data.test.take(N))


@pytest.fixture
def short(monkeypatch):
    """AutoAttack with all of its parts, but few steps of each."""
    def steppers(stages):
        for stage in stages:
            names = {f.name for f in fields(stage.stepper)} & {"steps", "queries"}
            assert len(names) == 1
            yield Stage(replace(stage.stepper, **dict.fromkeys(names, 5)), stage.share)

    original = AutoAttack.stages
    monkeypatch.setattr(AutoAttack, "stages",
                        lambda self, classes: tuple(steppers(original(self, classes))))


# Slices


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 60))
def test_slices_cover_every_image_once_and_cut_between_batches(n, shards, step):
    spans = slices(n, shards, step)
    assert [k for a, b in spans for k in range(a, b)] == list(range(n))
    assert 1 <= len(spans) <= shards and all(a % step == 0 for a, _ in spans)
    sizes = [b - a for a, b in spans[:-1]]
    assert not sizes or max(sizes) - min(sizes) <= step


# Together


def parts_of(target, spec, threat, shards, **options):
    return [attack_part(target, spec, threat, span, **options)
            for span in slices(N, shards)]


VERDICTS = ("config", "threat", "label", "clean", "robust", "violations", "notes", "precision",
            "stages", "breaker", "open", "prepared", "breakers", "warnings")
EXAMPLES = ("predicted", "max_distance")


def assert_same(one, other, names):
    for name in names:
        np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize(("attack", "eps", "units"), [
    ("pgd-10", "Linf:0.1", 1), ("pgd,steps=10,restarts=2", "Linf:0.1", 2),
    ("square,queries=40", "Linf:0.15", 1), ("autoattack", "Linf:0.1", 9),
    ("autoattack-lite,share=0.5", "Linf:0.1", 9)])
def test_seven_shards_find_what_one_process_finds(target, short, attack, eps, units):
    spec = AttackSpec.parse(attack).at("ieee")
    threat = ThreatModel.parse(eps)
    whole = measure(target, spec, threat, seed=3, keep=True)
    parts = parts_of(target, spec, threat, 7, seed=3, keep=True)
    split = merged(target, spec, threat, parts)
    assert 0 < whole.robust.sum() < whole.correct.sum()  # else it shows nothing
    assert_same(split, whole, VERDICTS)
    assert torch.equal(split.examples[0], whole.examples[0])
    if units == 1:  # of several restarts or targets in flight the first to fool counts
        assert_same(split, whole, EXAMPLES)
        assert torch.equal(split.examples[1], whole.examples[1])
    if attack == "pgd-10":  # the others do more at once where the batch has room
        assert_same(split, whole, ("forwards", "backwards"))
    assert split.seconds == sum(part.seconds for part in parts)
    assert split.forwards == pytest.approx(
        sum(part.forwards for part in parts) / whole.correct.sum())


def test_sums_by_hand():
    def part(start, stop, **changes):
        values = {"predicted": np.zeros(stop - start, dtype=np.int64), "attacked": stop - start,
                  "stages": ("a", "square"), "prepared": "as it is", "forwards": 5,
                  "breaker": np.array([1] * (stop - start), dtype=np.int8), **changes}
        return Part(start, stop, **values)

    found = together([
        part(0, 2, seconds=1.0, max_distance=0.1, violations=1, open=1, seen=2, broke=0,
             batch_size=16, notes=("x",), backwards=3),
        # nobody was right here
        Part(2, 3, np.zeros(1, dtype=np.int64), notes=("x", "y")),
        part(3, 5, seconds=2.0, max_distance=0.3, seen=1, broke=1, batch_size=20, backwards=4),
    ])
    assert (found.start, found.stop, found.attacked, found.seconds) == (0, 5, 4, 3.0)
    assert (found.max_distance, found.violations, found.open) == (0.3, 1, 1)
    assert (found.forwards, found.backwards, found.seen, found.broke) == (10, 7, 3, 1)
    assert (found.batch_size, found.notes, found.prepared) == (20, ("x", "y"), "as it is")
    assert found.breaker.tolist() == [1, 1, -1, 1, 1] and found.stages == ("a", "square")


def test_nothing_is_right(target):
    blind = Target(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
                   target.data.take(6))
    blind.correct[:] = False
    spec, threat = AttackSpec(name="pgd-5"), ThreatModel("Linf", 0.1)
    split = merged(blind, spec, threat,
                   [attack_part(blind, spec, threat, span) for span in slices(6, 3)])
    assert (split.forwards, split.stages, split.breaker) == (None, (), None)


# Attacks from elsewhere


def test_attacks_that_draw_per_batch_are_cut_between_batches(target, monkeypatch):
    ATTACKS.names()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    ATTACKS.register("noise", description="for a test")(
        lambda threat: lambda model, x, y: threat.sample(x))
    spec, threat = AttackSpec(name="noise"), ThreatModel("Linf", 0.9)
    batches = Target(target.model, target.data, batch_size=4)
    spans = Share(shards=3, batch_size=4).spans(spec, threat, N)
    assert spans == [(0, 8), (8, 20), (20, 30)]
    assert Share(shards=3).spans(spec, threat, N) == [(0, 30)]  # one batch of 500
    whole = measure(batches, spec, threat, seed=3)
    split = merged(batches, spec, threat, [attack_part(batches, spec, threat, span, seed=3)
                                           for span in spans])
    assert 0 < whole.robust.sum() < whole.correct.sum()
    assert_same(split, whole, (*VERDICTS, *EXAMPLES))


# On disk


def test_a_part_is_read_back_and_another_is_not(target, tmp_path):
    spec, threat = AttackSpec(name="pgd-5"), ThreatModel("Linf", 0.1)
    part = attack_part(target, spec, threat, (10, 20), keep=True)
    path = tmp_path / "part.npz"
    part.save(path, {"fingerprint": [1.5], "threads": 1})
    again, known = Part.load(path, (10, 20))
    assert known == {"fingerprint": [1.5], "threads": 1}
    for field in fields(Part):
        one, other = getattr(part, field.name), getattr(again, field.name)
        if field.name == "examples":
            assert all(map(torch.equal, one, other))
        else:
            np.testing.assert_equal(other, one)
    assert Part.load(path, (10, 21)) is None
    assert Part.load(tmp_path / "none.npz", (10, 20)) is None
    for size in (0, 100, len(path.read_bytes()) - 1):
        (tmp_path / "cut.npz").write_bytes(path.read_bytes()[:size])
        assert Part.load(tmp_path / "cut.npz", (10, 20)) is None


# The command


@pytest.fixture
def no_figures(monkeypatch):
    from robench.benchmark import external

    for module in (external, matrix):
        monkeypatch.setattr(module, "render", lambda results, out: save(out, results))


def results(out):
    """The records of a run, without time and work, and all their flags."""
    found = []
    for record in load([out]).records:
        with np.load(record.flags) as flags:
            arrays = {name: flags[name].tolist() for name in flags}
        known = record.model_dump(exclude=CLOCK | WORK)
        found.append((known, arrays))
    return found


EVAL = ("--limit", 20, "--threat", "Linf:0.1", "--precision", "ieee", "--device", "cpu",
        "--attack", "pgd-5", "--attack", "fgsm", "--quiet")


def test_eval_in_shards_leaves_the_same_records_and_flags_and_nothing_else(
    tmp_path, checkpoint, robench, no_figures
):
    for shards in (1, 7):
        done = robench("eval", checkpoint, *EVAL, "--shards", shards, "--out",
                       tmp_path / str(shards))
        assert done.code in (0, 4), done.err  # a random network may not be trusted
    assert results(tmp_path / "7") == results(tmp_path / "1")
    names = [{p.name for p in (tmp_path / shards / "eval").iterdir()} for shards in "17"]
    assert names[0] == names[1]


def test_shards_that_are_there_are_not_made_again(
    tmp_path, checkpoint, robench, no_figures, monkeypatch
):
    made, original = [], matrix.attack_part

    def spy(target, spec, threat, span, **options):
        if spec.label.startswith("pgd") and span == broken:
            raise RuntimeError("the machine is gone")
        made.append(span)
        return original(target, spec, threat, span, **options)

    monkeypatch.setattr(matrix, "attack_part", spy)
    broken = (10, 15)
    command = ("eval", checkpoint, *EVAL, "--shards", 4, "--out", tmp_path / "out")
    done = robench(*command)
    assert done.code == 1 and "the machine is gone" in done.err
    assert made == [(0, 5), (5, 10), *slices(20, 4)]
    assert len(list((tmp_path / "out" / "eval").glob("pgd-5*.npz"))) == 2
    broken, first = None, made.copy()
    assert robench(*command).code in (0, 4)
    assert made == [*first, (10, 15), (15, 20)]
    whole = robench("eval", checkpoint, *EVAL, "--out", tmp_path / "whole")
    assert whole.code in (0, 4)
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert not list((tmp_path / "out" / "eval").glob("*.0-5*"))


def test_shards_made_with_other_threads_are_told(
    tmp_path, checkpoint, robench, no_figures, monkeypatch
):
    numbers, original = iter([1, 4, *[1] * 20]), matrix.environment
    monkeypatch.setattr(matrix, "environment",
                        lambda device: {**original(device), "threads": next(numbers)})
    robench("eval", checkpoint, *EVAL, "--shards", 3, "--out", tmp_path)
    told = [[text for text in record.warnings if text.startswith("shards: ")]
            for record in load([tmp_path]).records]
    assert told == [["shards: not all were made with the same threads: 1, 4"], []]


def test_a_budget_in_shards_leaves_open_what_was_not_begun(
    tmp_path, checkpoint, robench, no_figures
):
    command = ("eval", checkpoint, "--limit", 20, "--threat", "Linf:0.001", "--attack",
               "pgd,steps=100000", "--device", "cpu", "--quiet", "--shards", 2, "--out",
               tmp_path / "out")
    done = robench(*command, "--budget", "1s")
    assert done.code == 5, done.err
    (record,) = load([tmp_path / "out"]).records
    assert record.status == "partial" and record.n_open == record.n_correct > 0
    assert not list((tmp_path / "out" / "eval").glob("*-*.json"))
