"""Runs: what they leave behind, what they do not do twice, and what a failure costs."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robench.attacks.base import ATTACKS
from robench.attacks.threat import ThreatModel
from robench.benchmark import matrix
from robench.benchmark.checkpoints import load_checkpoint, weights_sha256
from robench.benchmark.data import hold_out, load_dataset
from robench.benchmark.matrix import Matrix, run
from robench.benchmark.progress import Reporter
from robench.benchmark.recipe import Settings
from robench.benchmark.spec import RunSpec
from robench.benchmark.transfer import rob_f
from robench.errors import RobenchError, UsageError
from robench.reports.store import RECORDS, load, save

from .kills import kill_until, seconds_of_writing

SRC = Path(__file__).parents[2] / "src"
# What two runs of the same job may differ in.
RECORD_CLOCK = {"created", "seconds", "train_seconds", "teacher_seconds", "peak_bytes"}
CLOCK = {"results.jsonl": RECORD_CLOCK, "transfer.jsonl": {"created"},
         "training.jsonl": {"created", "seconds"}}
BOARD_CLOCK = {"train_seconds", "train_and_teacher_seconds"}
CURVE = 6  # points of the accuracy-over-eps figure


def read(out):
    """The data files of a run without the clock: name -> rows."""
    files = {}
    for name, clock in CLOCK.items():
        rows = [json.loads(line) for line in (out / name).read_text().splitlines()]
        files[name] = [{k: v for k, v in row.items() if k not in clock} for row in rows]
    with (out / "leaderboard.csv").open(newline="") as file:
        files["leaderboard.csv"] = [
            {k: v for k, v in row.items() if k not in BOARD_CLOCK} for row in csv.DictReader(file)
        ]
    return files


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def no_figures(monkeypatch):
    """Reports take most of the time of a small run; the data files are enough for most tests."""
    monkeypatch.setattr(matrix, "render", lambda results, out: save(out, results))


@pytest.fixture
def measured(monkeypatch):
    """The attacks that a run measured, by label."""
    labels, original = [], matrix.measure

    def spy(target, spec, *arguments, **options):
        labels.append(spec.label)
        return original(target, spec, *arguments, **options)

    monkeypatch.setattr(matrix, "measure", spy)
    return labels


@pytest.fixture
def trained(monkeypatch):
    """The defenses that a run trained, by class name."""
    from robench.benchmark import cells

    names, original = [], cells.fit

    def spy(defense, *arguments, **options):
        names.append(type(defense).__name__)
        return original(defense, *arguments, **options)

    monkeypatch.setattr(cells, "fit", spy)
    return names


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """A finished run of two methods with a common teacher, which is a row too."""
    out = tmp_path_factory.mktemp("run") / "out"
    run(job(defenses=("rslad", "ard"), baselines=("trades",), out=out))
    return out


@pytest.fixture
def again(finished, job, tmp_path):
    """A copy of that run, and a function that runs the same job in it, with changes."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)

    def rerun(**changes):
        spec = {"defenses": ("rslad", "ard"), "baselines": ("trades",), "out": out, **changes}
        return run(job(**spec))

    return out, rerun


# What is written


def test_the_files_of_a_run(finished):
    assert {p.name for p in finished.iterdir()} == {
        "results.jsonl", "transfer.jsonl", "training.jsonl", "landscape.jsonl", "leaderboard.csv",
        "leaderboard.md", "leaderboard.html", "leaderboard.tex", "leaderboard.json", "rob_f.csv",
        "rob_f_training.csv", "others.csv", "trade_off.csv", "cost.csv", "over_eps.csv",
        "overlap.csv", "training.csv", "cells", "classes.csv", "confusion.csv", "figures",
    }
    cells = list((finished / "cells").iterdir())
    assert len(cells) == 3  # the teacher was trained once
    for cell in cells:
        names = {p.name for p in cell.iterdir()}
        assert names == {"spec.json", "done.json", "training.csv", "best.safetensors",
                         "last.safetensors", "swa.safetensors", "swa-last.safetensors", "eval"}
        assert {p.suffix for p in (cell / "eval").iterdir()} == {".json", ".npz"}
        spec = json.loads((cell / "spec.json").read_text())
        assert spec["train_limit"] == 128


def test_the_rows_of_a_run(finished):
    results = load([finished])
    table = [(r.defense, r.checkpoint, r.attack) for r in results.records if r.role == "table"]
    assert table == [
        (defense, checkpoint, attack)
        for defense in ("trades", "rslad", "ard")
        for checkpoint, attacks in (("best", ("fgsm", "pgd-5")), ("swa", ("fgsm", "pgd-5")),
                                    ("last", ("pgd-20",)), ("swa-last", ("pgd-20",)))
        for attack in attacks
    ]
    curve = [r for r in results.records if r.role == "curve"]
    assert len(curve) == 3 * 2 * CURVE
    assert {r.threat for r in curve} == {f"Linf:{e}" for e in (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)}
    for r in results.records:
        assert (r.status, r.violations, r.n, r.split, r.dataset) == ("ok", 0, 20, "test", "digits")
        assert 0 <= r.n_robust <= r.n_correct <= 20
        assert (r.baseline, r.ranked) == (r.defense == "trades", r.checkpoint in ("best", "swa"))
        assert (r.selection, r.epochs, r.seed) == ("val", 2, 0)
    assert len(results.epochs) == 3 * 2
    spec = json.loads(next((finished / "cells").glob("*/spec.json")).read_text())
    for e in results.epochs:
        assert (e.threat, e.attack, e.data_sha256) == (
            spec["threat"], f"pgd-{spec['train']['select_steps']}", spec["data_sha256"])
        assert e.n == spec["train"]["validation"] > 0
        assert e.attack_config["step_size"] == pytest.approx(0.2 / 4)
    # What differs only in the seed has the same settings; here are three defenses.
    assert len({e.settings for e in results.epochs} - {""}) == 3
    assert all(row.created > "2026" for row in (*results.epochs, *results.transfers))
    assert {t.settings for t in results.transfers} < {e.settings for e in results.epochs}
    assert [(t.defense, t.network) for t in results.transfers] == [
        ("rslad", "teacher"), ("rslad", "student"), ("ard", "teacher"), ("ard", "student")]


def test_flags_agree_with_the_counts(finished):
    import numpy as np

    for r in load([finished]).records:
        with np.load(r.flags) as flags:
            assert (flags["correct"].sum(), flags["robust"].sum()) == (r.n_correct, r.n_robust)
            assert len(flags["robust"]) == r.n


def test_the_teacher_is_the_checkpoint_of_its_own_row(finished):
    records = load([finished]).records
    best = {r.weights_sha256 for r in records if (r.defense, r.checkpoint) == ("trades", "best")}
    (trades,) = best
    seconds = next(r.train_seconds for r in records if r.defense == "trades")
    for r in records:
        if r.defense == "trades":
            assert (r.teacher_sha256, r.teacher_seconds) == ({}, 0)
        else:
            assert (r.teacher_sha256, r.teacher_seconds) == ({"teacher": trades}, seconds)


def test_checkpoints_are_the_networks_of_the_records(finished):
    for r in load([finished]).records:
        net, header = load_checkpoint(finished / "cells" / r.run / f"{r.checkpoint}.safetensors")
        assert weights_sha256(net) == r.weights_sha256
        assert (header.checkpoint, header.epoch, header.defense) == (
            r.checkpoint, r.epoch, r.defense)
        assert sum(p.numel() for p in net.parameters()) == r.parameters


def test_the_selected_epoch_is_that_of_the_log(finished):
    results = load([finished])
    for r in results.records:
        logs = [e for e in results.epochs if e.run == r.run]
        if r.checkpoint == "best":
            assert logs[r.epoch].robust == max(e.robust for e in logs)
        elif r.checkpoint in ("last", "swa-last"):
            assert r.epoch == 1


def test_rob_f_of_an_epoch_is_that_of_its_networks_on_the_held_out_images(finished, job):
    def network(r):
        return load_checkpoint(finished / "cells" / r.run / f"{r.checkpoint}.safetensors")[0]

    results, n = load([finished]), job()["train"]["validation"]
    held_out = hold_out(load_dataset("digits").train, n)[1]
    last = {r.run: r for r in results.records if r.checkpoint == "last"}
    teacher = next(r for r in results.records if (r.defense, r.checkpoint) == ("trades", "best"))
    for epoch in results.epochs:
        if epoch.defense == "trades":
            assert epoch.rob_f == {}
        elif epoch.epoch == 1:
            nets = {"student": network(last[epoch.run]), "teacher": network(teacher)}
            threat = ThreatModel.parse(teacher.threat)
            again = rob_f(nets, held_out, threat, seed=epoch.seed)
            assert epoch.rob_f == {name: (row.self_crafted / n, row.student_crafted / n)
                                   for name, row in again.items()}


# Nothing is done twice


def test_running_again_measures_nothing_says_so_and_changes_no_byte(
    again, job, trained, measured, capsys
):
    out, _ = again
    before = contents(out)
    spec = job(defenses=("rslad", "ard"), baselines=("trades",), out=out)
    run(spec, quiet=False)
    assert trained == measured == []
    assert contents(out) == before
    err = capsys.readouterr().err
    assert "3 rows, 3 trainings (3 finished before), 2 attacks at Linf:0.2 on 20 images" in err
    assert f"nothing to do: every training and every measurement is there already; {out}/" in err


def test_the_first_run_does_not_say_that_there_is_nothing_to_do(
    tmp_path, job, capsys, no_figures
):
    run(job(defenses=("standard",), epochs=1, out=tmp_path), quiet=False)
    err = capsys.readouterr().err
    assert "1 rows, 1 trainings (0 finished before)" in err
    assert "nothing to do" not in err


def test_an_added_attack_is_all_that_is_measured(again, trained, measured, no_figures):
    out, rerun = again
    before = read(out)["results.jsonl"]
    rerun(attacks=("fgsm", "cw", "pgd-5"))
    assert (trained, measured) == ([], ["cw"] * 6)  # best and swa of three methods
    after = read(out)["results.jsonl"]
    assert [r for r in after if r["attack"] != "cw"] == before
    rerun()
    assert read(out)["results.jsonl"] == before


def test_an_added_defense_is_all_that_is_trained(again, trained, measured, no_figures):
    out, rerun = again
    before = read(out)["results.jsonl"]
    rerun(defenses=("rslad", "ard", "standard"))
    assert trained == ["Standard"]
    after = read(out)["results.jsonl"]
    assert after[: len(before)] == before
    assert {r["defense"] for r in after[len(before):]} == {"standard"}
    assert len(measured) == len(after) - len(before)


def test_other_images_another_threat_or_seed_are_measured_anew(again, measured, no_figures):
    _, rerun = again
    one = {"defenses": (), "attacks": "fgsm"}
    rerun(**one)
    assert measured == []
    rerun(**one, limit=19)
    assert measured.count("fgsm") == 2
    measured.clear()
    rerun(**one, limit=19)
    assert measured == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", "half"])
def test_a_damaged_record_is_measured_again(again, measured, no_figures, content):
    out, rerun = again
    before = read(out)
    path = next((out / "cells").glob("*/eval/pgd-5-*.json"))
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    rerun()
    assert measured == ["pgd-5"]
    assert read(out) == before


def test_missing_flags_are_measured_again(again, measured, no_figures):
    out, rerun = again
    before = read(out)
    next((out / "cells").glob("*/eval/fgsm-*.npz")).unlink()
    rerun()
    assert measured == ["fgsm"]
    assert read(out) == before


@pytest.mark.parametrize("content", [b"", b"garbage\n", b"{}\n"])
def test_a_damaged_transfer_is_measured_again(again, no_figures, content):
    out, rerun = again
    before = read(out)
    next((out / "cells").glob("*/eval/rob_f-*.json")).write_bytes(content)
    rerun()
    assert read(out) == before


def test_a_damaged_training_result_names_what_to_delete(again):
    out, rerun = again
    path = next((out / "cells").glob("*/done.json"))
    for content in ("", "{}", '{"seconds": 1, "history": [{}]}', "[]"):
        path.write_text(content)
        with pytest.raises(UsageError, match=f"is damaged: delete {path.parent} to train again"):
            rerun()


def test_a_damaged_checkpoint_costs_its_own_rows_only(again, no_figures):
    out, rerun = again
    cells = {json.loads((c / "spec.json").read_text())["defense"]: c
             for c in (out / "cells").iterdir()}
    (cells["ard"] / "swa.safetensors").write_bytes(b"garbage")
    with pytest.raises(RobenchError, match="ard seed 0: .*swa.safetensors: cannot be read"):
        rerun()
    defenses = [r["defense"] for r in read(out)["results.jsonl"]]
    assert defenses.count("trades") == defenses.count("rslad") == 4 + 2 + 2 * CURVE


# Failures


def test_a_training_that_fails_leaves_the_rest_alone(tmp_path, job, no_figures):
    spec = job(defenses=("trades", "standard", "ard"), epochs=1, out=tmp_path,
               options={"trades": {"beta": 1e38}})
    with pytest.raises(RobenchError) as error:
        run(spec)
    assert error.value.exit_code == 1
    message = str(error.value)
    assert "trades seed 0: the loss is not finite in epoch 0, step " in message
    assert "ard seed 0: not trained, its teacher failed" in message
    assert "\n" not in message
    results = load([tmp_path])
    assert {r.defense for r in results.records} == {"standard"}
    assert {e.defense for e in results.epochs} == {"standard"}
    with pytest.raises(RobenchError, match="trades seed 0: the loss is not finite"):
        run(spec)  # it is tried again


def test_weights_that_diverge_in_the_very_last_step_are_no_usage_error(tmp_path, job, no_figures):
    spec = job(defenses=("standard",), epochs=1, train_limit=64, out=tmp_path,
               train={"lr": 1e38, "swa_start": None})
    with pytest.raises(RobenchError, match="standard seed 0: the model returns NaN") as error:
        run(spec)
    assert error.value.exit_code == 1
    assert load([tmp_path]).records == []
    assert len(load([tmp_path]).epochs) == 1


@pytest.fixture
def register(monkeypatch):
    """Registers an attack for one test: a function (model, x, y, threat) -> x_adv."""
    ATTACKS.names()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))

    def add(name, function):
        def make(threat):
            return lambda model, x, y: function(model, x, y, threat)

        ATTACKS.register(name, description="for a test")(make)

    return add


def test_an_attack_that_fails_is_a_row_that_says_so(again, register, measured, no_figures):
    out, rerun = again

    def broken(model, x, y, threat):
        raise IndexError("first line\nsecond line")

    register("broken", broken)
    before = read(out)["results.jsonl"]
    for _ in range(2):  # it is tried again
        measured.clear()
        with pytest.raises(RobenchError) as error:
            rerun(attacks=("fgsm", "pgd-5", "broken"))
        assert "trades seed 0 best, broken: IndexError: first line second line" in str(error.value)
        assert "\n" not in str(error.value)
        rows = read(out)["results.jsonl"]
        # Where no image is right there is nothing to attack, and nothing to fail.
        attacked = [r for r in rows if r["attack"] == "broken" and r["n_correct"]]
        assert len(measured) >= len(attacked) >= 2
        assert {(r["status"], r["n_robust"], r["error"]) for r in attacked} == {
            ("failed", 0, "IndexError: first line second line")}
        assert [r for r in rows if r["attack"] != "broken"] == before


def test_an_attack_that_leaves_the_ball_is_reported(again, register, no_figures):
    out, rerun = again
    register("cheat", lambda model, x, y, threat: (x + 2 * threat.eps).clamp(0, 1))
    rerun(attacks=("cheat",))
    rows = [r for r in read(out)["results.jsonl"] if r["attack"] == "cheat"]
    assert len(rows) == 6
    for row in rows:
        assert row["violations"] == row["n_correct"]
        assert row["n_robust"] == row["n_correct"]
        if row["n_correct"]:
            (warning,) = [text for text in row["warnings"] if text.startswith("outside")]
            assert warning.startswith(f"outside: {row['n_correct']} claimed examples were outside "
                                      "the threat model and were not counted")


def test_a_warning_about_a_network_is_said_once(tmp_path, job, capsys, no_figures):
    (tmp_path / "soft.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run(job(defenses=("standard",), model="soft:net", epochs=1, out=tmp_path / "out",
                train={"swa_start": None, "select": "last"}))
    err = capsys.readouterr().err
    assert err.count("softmax probabilities") == 1  # for two attacks and a curve
    assert err.startswith("warning: standard seed 0 last: probabilities: ")


# Teachers of the user


def test_a_checkpoint_as_teacher(again, trained, no_figures, tmp_path, job):
    out, _ = again
    cells = {json.loads((c / "spec.json").read_text())["defense"]: c
             for c in (out / "cells").iterdir()}
    path = cells["trades"] / "best.safetensors"
    teacher = weights_sha256(load_checkpoint(path)[0])
    changes = {"defenses": ("rslad",), "epochs": 1, "teacher": str(path), "attacks": "fgsm"}
    for name, model in (("same", None), ("other", "small-resnet")):  # --model is the student's
        run(job(**changes, model=model, out=tmp_path / name))
        records = load([tmp_path / name]).records
        assert {r.defense for r in records} == {"rslad"}
        assert {tuple(r.teacher_sha256.items()) for r in records} == {(("teacher", teacher),)}
        assert {r.teacher_seconds for r in records} == {0}
        assert {r.defense_config["teachers"]["teacher"] for r in records} == {teacher}
        assert {r.model for r in records} == {model or "smallcnn"}
    assert trained == ["RSLAD", "RSLAD"]


def test_a_state_dict_as_teacher_needs_the_model(tmp_path, job, make_network, no_figures):
    torch.save(make_network().state_dict(), tmp_path / "teacher.pt")
    spec = job(defenses=("rslad",), epochs=1, attacks="fgsm", out=tmp_path / "out",
               teacher=str(tmp_path / "teacher.pt"))
    with pytest.raises(UsageError, match="does not say which network it holds: add --model"):
        run(spec)
    assert not (tmp_path / "out").exists()
    run({**spec, "model": "smallcnn"})
    (sha,) = {r.teacher_sha256["teacher"] for r in load([tmp_path / "out"]).records}
    assert sha == weights_sha256(make_network())


# Settings that reach the training


def test_all_training_images_are_used_without_a_validation_split(
    tmp_path, job, no_figures, monkeypatch
):
    """As all recipes of `as-released` do. No other recipe may select on the test images."""
    from robench.benchmark import cells

    original = cells.settings_for
    monkeypatch.setattr(cells, "settings_for", lambda *names: Settings(
        train={"select": "test"}).over(original(*names)))
    run(job(defenses=("trades",), epochs=1, attacks="fgsm", out=tmp_path / "last",
            train={"validation": 0, "select": "last"}))
    run(job(defenses=("trades",), epochs=1, attacks="fgsm", out=tmp_path / "test",
            train={"validation": 0}))
    last, test = load([tmp_path / "last"]), load([tmp_path / "test"])
    assert {r.selection for r in last.records} == {"none"}
    assert {r.selection for r in test.records} == {"test"}
    assert last.epochs[0].losses == test.epochs[0].losses
    assert last.epochs[0].robust is None and test.epochs[0].robust is not None


def test_a_smoke_run(tmp_path, no_figures):
    run({"defenses": ("peeraid",), "smoke": True, "attacks": ("fgsm",), "out": tmp_path})
    results = load([tmp_path])
    assert {(r.n, r.epochs) for r in results.records} == {(32, 1)}
    assert [t.network for t in results.transfers] == ["peer", "student"]
    assert {r.checkpoint for r in results.records} == {"best", "swa", "last", "swa-last", "peer"}


def test_seeds_are_rows_of_their_own(tmp_path, job, no_figures):
    run(job(defenses=("standard",), epochs=1, attacks="fgsm", seeds=(0, 1), out=tmp_path))
    records = load([tmp_path]).records
    assert {r.seed for r in records} == {0, 1}
    assert len({r.weights_sha256 for r in records if r.checkpoint == "last"}) == 2


def test_everything_wrong_is_found_before_anything_is_written(tmp_path, job):
    for changes in ({"limit": 10**6}, {"threat": "L3:1"}, {"attacks": "fgms"},
                    {"device": "cuda:77"}, {"dataset": "digitz"}, {"model": "resnet81"},
                    {"teacher": "nothing.pt"}, {"defenses": ("trades", "ardd")},
                    {"model": "torch.nn:Identity"}, {"teacher": "torch.nn:Identity"},
                    {"train": {"validation": 10**6}}):
        with pytest.raises(UsageError):
            run(job(**{"out": tmp_path / "out", **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_run_can_be_given_as_a_mapping_or_a_spec(again, job, measured, no_figures):
    out, _ = again
    spec = job(baselines=("trades",), defenses=(), out=out)
    from_mapping, from_spec = run(spec), run(RunSpec.create(spec))
    assert from_mapping == from_spec
    assert from_mapping.records == load([out]).records
    assert (out / RECORDS).is_file()
    assert Matrix(RunSpec.create(spec), Reporter(quiet=True)).run() == from_mapping
    assert measured == []


def test_several_processes_find_the_same(tmp_path, job, finished, no_figures):
    run(job(defenses=("rslad", "ard"), baselines=("trades",), out=tmp_path, jobs=2))
    one, two = read(finished), {}
    for name in CLOCK:
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        two[name] = [{k: v for k, v in row.items() if k not in CLOCK[name]} for row in rows]
        assert two[name] == one[name]


# kill -9


KILLED = ("--defense", "peeraid", "--baseline", "trades", "--epochs", "3", "--train-limit", "192",
          "--limit", "60", "--batch-size", "20", "--attack", "fgsm", "--attack", "pgd-5",
          "--set", "validation=30", "--device", "cpu", "--quiet", "--out", "out")


def start(folder, jobs):
    folder.mkdir(exist_ok=True)
    # Without a repository, so that a commit while the test runs does not show in the records.
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    return subprocess.Popen([sys.executable, "-m", "robench", "run", *KILLED, "--jobs", jobs],
                            cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True)


def finish(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    seconds = seconds_of_writing(start(folder, "1"), folder)
    return read(folder / "out"), seconds


@pytest.mark.parametrize(
    ("kills", "jobs"), [(2, "1"), pytest.param(20, "1", marks=pytest.mark.slow),
                        pytest.param(10, "2", marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_was_not(
    tmp_path, undisturbed, check_files, kills, jobs
):
    expected, seconds = undisturbed

    def ended():
        assert not [path for path in tmp_path.rglob(".*") if path.is_file()]
        result = read(tmp_path / "out")
        if jobs != "1":  # processes have other shares of the cores
            for rows in (*expected.values(), *result.values()):
                for row in rows:
                    row.pop("threads", None)
        assert result == expected
        shutil.rmtree(tmp_path / "out")

    kill_until(kills, lambda: start(tmp_path, jobs), tmp_path, 0.6 * seconds,
               killed=lambda: check_files(tmp_path), ended=ended)
    finish(start(tmp_path, jobs))
    ended()
