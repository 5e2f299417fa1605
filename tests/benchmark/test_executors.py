"""What a worker process makes of trouble, its threads, and where the progress of all is shown."""

import sys
from dataclasses import replace

import pytest
import torch

from robench.benchmark.doctor import examine
from robench.benchmark.executors import Request, local, threads_of, work
from robench.benchmark.executors.work import Outcome, Worker
from robench.benchmark.matrix import Matrix
from robench.benchmark.progress import FINISHED_BARS, Reporter
from robench.benchmark.sources import pick_device
from robench.benchmark.spec import RunSpec
from robench.defenses.trainer import TrainingFailed
from robench.errors import DiskError, UsageError


@pytest.fixture
def training(tmp_path, job):
    """(a worker, its one training)"""
    spec = RunSpec.create(job(out=tmp_path))
    matrix = Matrix(spec, Reporter(quiet=True))
    task, *_ = matrix.tasks(*matrix.plan())
    return Worker(Request((spec,)), Reporter(quiet=True)), task


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


def test_a_training_that_fails_is_left_to_the_command(training, monkeypatch):
    worker, task = training
    monkeypatch.setattr(Matrix, "train", failing(TrainingFailed("NaN")))
    assert worker.do(task) == Outcome(0, False)


def test_a_full_disk_ends_the_run_and_not_every_task_in_turn(training, monkeypatch):
    worker, task = training
    monkeypatch.setattr(Matrix, "train", failing(DiskError("cannot write x")))
    with pytest.raises(DiskError, match="cannot write x"):
        worker.do(task)


def test_a_machine_without_the_data_does_not_swallow_the_run(training, monkeypatch):
    """It would fail at every task in a moment, and so get all of them."""
    worker, task = training
    monkeypatch.setattr(work, "opened", failing(UsageError("there is no data here")))
    with pytest.raises(UsageError, match="there is no data here"):
        worker.do(task)


def test_a_machine_without_the_network_does_not_swallow_it_either(
    training, monkeypatch, tmp_path, job
):
    spec = RunSpec.create(job(out=tmp_path))
    worker = Worker(Request((spec,), ("gone.safetensors",)), Reporter(quiet=True))
    task = replace(training[1], kind="attack", owner="gone.safetensors")
    with pytest.raises(UsageError, match=r"there is no file gone\.safetensors"):
        worker.do(task)


@pytest.mark.parametrize(("variable", "threads"), [
    ("3", 3), ("4,2", 4), ("", 2), (" 5 ", 5), ("many", 2), ("0", 2)])
def test_threads_of_a_worker(monkeypatch, variable, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr("robench.benchmark.executors.cores", lambda: 8)
    assert threads_of(RunSpec(jobs=4)) == threads
    assert threads_of(RunSpec(jobs=4, threads=7)) == 7


def test_the_bars_of_what_has_ended_leave_room_for_what_runs(monkeypatch):
    """While one worker is at work the others may end thousands of tasks."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter, opened, messages = Reporter(), [], []
    monkeypatch.setattr(reporter._bars, "start", lambda: None)

    class Messages:
        def get(self):
            opened.append([task.description for task in reporter._bars.tasks])
            return messages.pop(0)

    def short(key):
        return [("open", key, f"short {key}", None), ("close", key, None, None)]

    messages += [("open", -1, "long", None), *(one for key in range(30) for one in short(key)),
                 ("close", -1, None, None), ("end", None, None, None)]
    reporter.relay(Messages())
    assert max(map(len, opened)) == FINISHED_BARS + 2  # the long one, and the short one that runs
    assert all("long" in descriptions for descriptions in opened[1:-1]) and opened[-1] == []
    assert opened[-2] == ["long", *(f"short {key}" for key in range(30 - FINISHED_BARS, 30))]


@pytest.mark.parametrize(("device", "chosen"), [
    ("auto", [1]), ("cuda", [1]), ("cpu", []), ("cuda:0", []),
])
def test_a_process_touches_no_gpu_but_its_own(monkeypatch, device, chosen):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    local._choose_gpu(device, 3)
    assert seen == chosen


def test_a_gpu_that_cannot_compute_is_one_line(monkeypatch):
    def refused(*size, device):
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", refused)
    with pytest.raises(UsageError, match="^device 'cuda' is not there .*no kernel image"):
        pick_device("auto")
    (found,) = (finding for finding in examine() if finding.name == "CUDA devices")
    assert not found.ok and "no kernel image" in found.text and "\n" not in found.text
    assert "nvidia-smi" in found.cure
