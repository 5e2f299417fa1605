"""What a request becomes: cells that can be trained, or one line that says why not."""

import json
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robench.attacks.threat import ThreatModel
from robench.benchmark import matrix, outline
from robench.benchmark.cells import plan
from robench.benchmark.data import load_dataset
from robench.benchmark.graph import (
    Estimate,
    Share,
    Task,
    critical_path,
    graph,
    pending,
    ready,
    urgent_first,
    without,
)
from robench.benchmark.kept import shard_path
from robench.benchmark.matrix import run
from robench.benchmark.plan import Plan
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError
from robench.reports.store import load, save

SMALL = {"model": "smallcnn"}


@pytest.fixture(scope="module")
def named():
    """The digits under the name of another data set, for its recipes."""
    digits = load_dataset("digits")
    return lambda name: replace(digits, name=name)


def planned(dataset, **request):
    cells, rows = plan(RunSpec.create({**SMALL, **request}), dataset, None)
    return {cell.spec.defense: cell for cell in cells}, rows


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny-imagenet"])
def test_everything_as_released_can_be_planned(named, dataset):
    """Teachers whose training no source documents are trained by the unified recipe."""
    cells, rows = planned(named(dataset), defenses="all", recipe="as-released",
                          train={"validation": 144})
    assert len(rows) >= 2 and {row.spec.recipe for row in rows} == {"as-released"}
    natural = [cell for cell in cells.values() if set(cell.teachers) & {"natural", "helper"}]
    if natural:
        assert cells["standard"].spec.recipe == "unified"
        for cell in natural:
            role = (set(cell.teachers) & {"natural", "helper"}).pop()
            assert cell.spec.teachers[role] == cells["standard"].spec.key()
            assert f"its {role} is trained by the recipe unified" in cell.spec.notes


@pytest.mark.parametrize(("defense", "option", "epochs", "begins"), [
    ("trades+awp", {"awp.warm_up": 9}, 9, 10), ("iad", {"begin": 60}, 60, 61),
    ("iad-ii", {"begin": 3}, 3, 4),
    ("iad+awp", {"begin": 4, "awp.warm_up": 2}, 4, 5)])
def test_a_method_that_would_never_begin_is_refused(named, defense, option, epochs, begins):
    request = {"defenses": (defense,), "options": {defense: option},
               "train": {"swa_start": None}}
    with pytest.raises(UsageError, match=f"the last of {epochs} epochs"):
        planned(named("digits"), epochs=epochs, **request)
    planned(named("digits"), epochs=begins, **request)
    planned(named("digits"), epochs=epochs, smoke=True, **request)


def test_smoke_runs_what_is_as_released(named):
    cells, _ = planned(named("cifar10"), defenses=("peeraid", "ikl+awp"), recipe="as-released",
                       smoke=True)
    assert cells["peeraid"].spec.train.swa_start == 0 and cells["peeraid"].spec.train.epochs == 1
    assert cells["ikl+awp"].spec.train.ema_start == 0


# The graph


def task(key, *needs, seconds=None, done=False, kind="train"):
    return Task(key, kind, key, needs, estimate=Estimate(seconds), done=done)


CHAIN = [task("teacher", seconds=5.0), task("other", seconds=6.0),
         task("student", "teacher", seconds=4.0),
         task("attack teacher", "teacher", seconds=1.0, kind="attack"),
         task("attack student", "student", seconds=2.0, kind="attack")]


def test_the_longest_chain_by_hand():
    assert [t.key for t in critical_path(CHAIN)] == ["teacher", "student", "attack student"]
    # What is done takes no time; then the other training alone is longest.
    done = [replace(t, done="teacher" in t.needs or t.key == "teacher") for t in CHAIN]
    assert [t.key for t in critical_path(done)] == ["other"]
    # Without times the number of tasks decides.
    unknown = [replace(t, estimate=Estimate()) for t in CHAIN]
    assert [t.key for t in critical_path(unknown)] == ["teacher", "student", "attack student"]
    assert critical_path([]) == []


def simulated(tasks, jobs, fails=()):
    """The order in which tasks begin, if the one that began first ends first."""
    left, running, begun = {t.key: t for t in urgent_first(tasks)}, [], []
    while True:
        for one in ready(left, running, jobs - len(running)):
            running.append(left.pop(one.key).key)
            begun.append(one.key)
        if not running:
            return begun
        ended = running.pop(0)
        if ended in fails:
            left = without(left, ended)


def test_a_student_begins_as_soon_as_its_own_teacher_is_there():
    assert simulated(CHAIN, 2) == ["teacher", "other", "student", "attack teacher",
                                   "attack student"]
    # `other` runs on: nobody waits for the end of a wave.
    assert simulated(CHAIN, 1)[:2] == ["teacher", "student"]


def test_what_waits_for_a_failure_is_left_out_and_nothing_else():
    assert simulated(CHAIN, 2, fails={"teacher"}) == ["teacher", "other"]
    assert simulated(CHAIN, 2, fails={"student"}) == ["teacher", "other", "student",
                                                      "attack teacher"]


@given(st.lists(st.lists(st.integers(0, 30), max_size=3), max_size=12), st.integers(1, 4))
def test_every_task_begins_once_and_after_what_it_needs(needs, jobs):
    tasks = [task(str(i), *{str(n % i) for n in wanted} if i else ())
             for i, wanted in enumerate(needs)]
    begun = simulated(tasks, jobs)
    assert sorted(begun) == sorted(t.key for t in tasks)
    assert all(begun.index(n) < begun.index(t.key) for t in tasks for n in t.needs)


def test_pending_leaves_out_what_is_done_also_as_a_need():
    left = pending([replace(CHAIN[0], done=True), *CHAIN[1:]])
    assert [t.key for t in left] == [t.key for t in CHAIN[1:]]
    assert {t.key: t.needs for t in left}["student"] == ()


# robench plan


@pytest.fixture
def no_data(monkeypatch):
    def load(*arguments, **options):
        raise AssertionError("the plan read a data set")

    monkeypatch.setattr(outline, "load_dataset", load)


PAPER = ("plan", *(word for name in ("trades", "ard", "rslad", "adaad", "akd2", "iad", "peeraid")
                   for word in ("--defense", name)),
         "--baseline", "pgd-at", "--seeds", "0,1,2", "--dataset", "cifar10", "--dataset",
         "cifar100", "--dataset", "svhn", "--model", "resnet18", "--model", "mobilenetv2")


def test_a_papers_matrix_without_the_data(tmp_path, monkeypatch, robench, no_data):
    monkeypatch.chdir(tmp_path)
    done = robench(*PAPER, "--shards", 4)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    # akd2 and nobody else of them wants a natural teacher, too.
    cells = [line for line in lines if line.startswith("unknown  ")]
    assert len(cells) == 9 * 3 * 2 * 3
    assert sum("rslad" in line and "trades" in line for line in cells) == 3 * 2 * 3
    assert f"{8 * 3 * 2 * 3} rows, {len(cells)} trainings (0 done), " in done.out
    assert "total: unknown" in done.out
    for name in ("cifar10", "cifar100", "svhn"):
        assert f"{name}: the data were not read, so that the keys of cells are unknown" in done.out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_knows_what_is_done_and_how_long_the_rest_may_take(
    tmp_path, job, robench, monkeypatch
):
    monkeypatch.setattr(matrix, "render", lambda results, out: save(out, results))
    monkeypatch.chdir(tmp_path)
    run(job(defenses=("rslad",), baselines=("trades",), out=tmp_path / "runs"))
    command = ("plan", "--defense", "rslad", "--baseline", "trades", "--train-limit", 128,
               "--limit", 20, "--set", "validation=20", "--set", "select_steps=2", "--device",
               "cpu")
    two = (*command, "--attack", "fgsm", "--attack", "pgd-5")
    done = robench(*two, "--epochs", 2)
    keys = {path.name for path in (tmp_path / "runs" / "cells").iterdir()}
    assert {line.split()[0] for line in done.out.splitlines()[1:3]} == keys
    assert "2 rows, 2 trainings (2 done), 36 attacks (36 done), 1 Rob_f analyses (1 done)" in (
        done.out)
    assert "total: 0 s" in done.out and "nothing" in done.out
    # An attack of which a part is there.
    record = min((tmp_path / "runs").glob("cells/*/eval/pgd-5-*.json"))
    record.rename(tmp_path / record.name)
    shard_path(record, (5, 10)).touch()
    done = robench(*two, "--epochs", 2, "--shards", 4)
    assert "36 attacks (35 done), 144 shards of them (141 done)" in done.out
    done = robench(*two, "--epochs", 2, "--shards", 4, "--keep-examples")
    assert "(0 done)" in done.out.partition("shards of them")[2]
    (tmp_path / record.name).rename(record)
    # Another attack, of which nothing is known; and the same ones on other seeds.
    done = robench(*command, "--epochs", 2, "--attack", "fgsm", "--attack", "cw")
    assert "36 attacks (32 done)" in done.out and "total: unknown" in done.out
    plan = Plan.of([RunSpec.create(job(defenses=("trades",), out=tmp_path / "runs", epochs=6,
                                       seeds=(0, 1)))])
    trainings = [t for t in plan.tasks if t.kind == "train"]
    (seconds,) = [json.loads((tmp_path / "runs" / "cells" / key / "done.json").read_text())[
        "seconds"] for key in keys
        if json.loads((tmp_path / "runs/cells" / key / "spec.json").read_text())["defense"]
        == "trades"]
    assert [t.estimate.seconds for t in trainings] == pytest.approx([3 * seconds] * 2)
    assert {t.estimate.basis for t in trainings} == {"1 earlier training"}
    records = load([tmp_path / "runs"]).records
    known = [r.seconds for r in records if (r.attack, r.threat) == ("pgd-5", "Linf:0.2")]
    (wanted,) = {t.estimate.seconds for t in plan.tasks if "pgd-5" in t.label}
    assert wanted == pytest.approx(fmean(known))
    assert {t.estimate.memory for t in plan.tasks} == {max(r.peak_bytes for r in records)}
    # Of another kind of device nothing is known.
    other = Plan.of([RunSpec.create(job(out=tmp_path / "runs", epochs=6, device="cuda"))])
    assert {t.estimate.seconds for t in other.tasks if t.kind == "attack"} == {None}


def test_shards_share_the_time_of_their_attack(tmp_path, job):
    spec = RunSpec.create(job(out=tmp_path, shards=3, limit=10))
    cells, rows = plan(spec, load_dataset("digits"), None)

    class Known:
        trained = transferred = attacked = staticmethod(lambda *arguments: False)
        training = staticmethod(lambda cell: Estimate(7.0))
        attack = staticmethod(lambda cell, pair, images: Estimate(10.0))

    tasks = graph(cells, rows, spec.attacks, [ThreatModel("Linf", 0.2)], 10, Share(shards=3),
                  Known())
    (whole,) = [t for t in tasks if t.label == "trades seed 0 best: fgsm at Linf:0.2"]
    shards = [t for t in tasks if t.key in whole.needs and t.kind == "shard"]
    assert [t.span for t in shards] == [(0, 3), (3, 6), (6, 10)]
    assert [t.estimate.seconds for t in shards] == [3.0, 3.0, 4.0]
    assert whole.estimate.seconds == 0.0 and all(t.needs == (tasks[0].key,) for t in shards)
    assert sum(t.estimate.seconds for t in tasks) == 7 + 10 * sum(
        t.kind == "attack" for t in tasks)


@pytest.mark.parametrize("shards", [1, 3])
def test_no_two_tasks_are_taken_for_one(tmp_path, job, shards):
    """The curve over eps has an attack of the table's name, at its eps, on fewer images."""
    request = job(out=tmp_path, dataset="cifar10", recipe="unified", model="small-resnet",
                  attacks=("pgd-20",), shards=shards, limit=None, device="cpu")
    tasks = Plan.of([RunSpec.create(request)]).tasks
    assert len({task.key for task in tasks}) == len(tasks)
    best = [t for t in tasks
            if t.kind == "attack" and t.label.endswith("best: pgd-20 at Linf:8/255")]
    assert len(best) == 2, "the table's and the curve's"


@pytest.mark.parametrize(("options", "message"), [
    (("--dataset", "cifar1"), "unknown dataset 'cifar1'. Did you mean: cifar10"),
    (("--dataset", "cifar10", "--model", "resnt18"), "unknown model 'resnt18'"),
    (("--executor", "slurm"), "executor: "), (("--shards", 0), "shards: "),
    (("--ray-address", "auto"), "--ray-address is for --executor ray"),
    (("--device", "tpu0"), "device 'tpu0': write auto"),
    (("--devices", 2, "--executor", "ray"), "several devices"),
])
def test_a_wrong_plan_is_one_line(tmp_path, monkeypatch, robench, options, message):
    monkeypatch.chdir(tmp_path)
    done = robench("plan", "--defense", "trades", *options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["cifar10"])
def test_outlines_are_those_of_the_data(data_root, name):
    real = outline.Outline.of(load_dataset(name, data_root))
    assert outline.SHAPES[name] == (real.train, real.test, real.classes, real.channels, real.size)


# Several data sets and models


def test_a_run_of_two_models_is_both_runs(tmp_path, job, robench, monkeypatch):
    monkeypatch.setattr(matrix, "render", lambda results, out: save(out, results))
    monkeypatch.chdir(tmp_path)
    command = ("run", "--defense", "standard", "--epochs", 1, "--train-limit", 64, "--limit", 10,
               "--attack", "fgsm", "--set", "validation=10", "--device", "cpu", "--jobs", 1,
               "--quiet")
    models = ("--model", "smallcnn", "--model", "small-resnet", "--model", "smallcnn")
    assert robench(*command, *models, "--out", "both").code in (0, 4)
    both = load([tmp_path / "both"])
    for model in ("smallcnn", "small-resnet"):
        assert robench(*command, "--model", model, "--out", model).code in (0, 4)
        alone = load([tmp_path / model])
        mine = [r for r in both.records if r.model == model]
        assert len(mine) == len(alone.records) > 0
        for one, other in zip(mine, alone.records, strict=True):
            assert (one.run, one.weights_sha256, one.threat, one.n_robust) == (
                other.run, other.weights_sha256, other.threat, other.n_robust)
    assert len({r.model for r in both.records}) == 2
