"""One folder, two processes; signals; disks that are full; memory that does not suffice."""

import contextlib
import errno
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from robench import files
from robench.attacks.network import Network
from robench.attacks.search import Search
from robench.benchmark.executors import local
from robench.benchmark.matrix import run
from robench.benchmark.progress import Reporter, relayed
from robench.errors import DiskError, RobenchError
from robench.files import LOCK, locked, write_atomic
from robench.reports.store import load, save

from .kills import kill_until, living, seconds_of_writing, until

SRC = Path(__file__).parents[2] / "src"
LONG = ("run", "--defense", "pgd-at", "--baseline", "trades", "--epochs", "500", "--device", "cpu",
        "--train-limit", "256", "--quiet")
SHORT = ("run", "--defense", "pgd-at", "--epochs", "1", "--train-limit", "64", "--limit", "10",
         "--attack", "fgsm", "--device", "cpu", "--set", "validation=10", "--quiet")


def start(folder, *arguments, **options):
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    return subprocess.Popen([sys.executable, "-m", "robench", *map(str, arguments)], cwd=folder,
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def left_over(folder):
    return [p.name for p in folder.rglob(".*") if p.is_file()]


# Files


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "results.jsonl"
    (tmp_path / ".results.jsonl.abcd.robench.tmp").write_text("half")
    (tmp_path / ".other").write_text("not ours")
    handle, living = files._temporary(path)
    write_atomic(path, "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".other", Path(living).name, "results.jsonl"])
    os.close(handle)
    write_atomic(path, "again")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other", "results.jsonl"]


def test_file_and_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_mode),
                                                     real(handle)))
    write_atomic(tmp_path / "a", "b")
    assert [mode & 0o170000 for mode in synced] == [0o100000, 0o040000]  # a file, a folder


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_a_name_that_no_file_can_have_is_one_line(tmp_path, name):
    with pytest.raises(DiskError, match="cannot write"):
        write_atomic(tmp_path / name, "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["written", "flushed", "moved"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, how):
    path = tmp_path / "results.jsonl"
    write_atomic(path, "old")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if how == "written":
        monkeypatch.setattr(files.tempfile, "mkstemp", full)
    else:
        monkeypatch.setattr(os, "fsync" if how == "flushed" else "replace", full)
    with pytest.raises(DiskError, match="No space left on device"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


# One folder, two processes


def test_a_lock_is_gone_with_its_holder_and_leaves_nothing(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        text = (folder / LOCK).read_text()
        assert text.startswith(f"process {os.getpid()} on ") and text.endswith(" UTC")
        with pytest.raises(RobenchError, match=f"in use by process {os.getpid()} on .* since "), \
                locked(folder):
            pass
    assert not folder.exists()  # nothing was written
    with locked(folder):
        (folder / "x").touch()
    assert [p.name for p in folder.iterdir()] == ["x"]


def test_the_text_of_a_lock_is_not_trusted(tmp_path):
    with locked(tmp_path):
        (tmp_path / LOCK).write_bytes(b"\x1b[2J\n\xff" + b"x" * 10**6)
        with pytest.raises(RobenchError) as caught, locked(tmp_path):
            pass
    assert len(str(caught.value)) < 500
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


def test_file_systems_without_locks_guard_nothing_and_work(tmp_path, monkeypatch):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    (tmp_path / ".x.abcd.robench.tmp").touch()
    with locked(tmp_path), locked(tmp_path):
        write_atomic(tmp_path / "x", "y")
    assert (tmp_path / "x").read_text() == "y"
    assert (tmp_path / ".x.abcd.robench.tmp").exists()  # perhaps somebody writes it


@pytest.mark.parametrize("command", [
    SHORT, ("eval", "net.safetensors"), ("landscape", "net.safetensors"), ("report", "out")])
def test_every_command_that_fills_a_folder_holds_it(
    tmp_path, monkeypatch, checkpoint, robench, command
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").touch()
    with locked(Path("out")):
        done = robench(*command, "--out", "out")
    assert done.code == 1
    assert done.err.startswith(f"robench: out is in use by process {os.getpid()} on ")
    assert done.err.count("\n") == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.jsonl"]


def test_a_folder_is_free_when_its_holder_is_killed(tmp_path, robench, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from robench.files import *; import time\nwith locked(Path('out')): time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(SRC)})
    until(lambda: list(tmp_path.glob(f"out/{LOCK}")) and (tmp_path / "out" / LOCK).read_text(),
          holder)
    done = robench(*SHORT, "--jobs", 1, "--out", "out")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith(f"robench: out is in use by process {holder.pid} on ")
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    done = robench(*SHORT, "--jobs", 1, "--out", "out")
    assert done.code == 0, done.err
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_two_processes_on_one_folder(tmp_path):
    """The second one says who works there, and the first is not disturbed."""
    first = start(tmp_path, *LONG, "--jobs", 1, "--out", "out")
    try:
        until(lambda: list(tmp_path.glob("out/cells/*/training.csv")), first)
        second = start(tmp_path, *SHORT, "--jobs", 1, "--out", "out")
        _, err = second.communicate(timeout=120)
        assert second.returncode == 1, err
        assert err.startswith(f"robench: out is in use by process {first.pid} on ")
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    last = start(tmp_path, *SHORT, "--jobs", 1, "--out", "out")
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert left_over(tmp_path) == []


# Signals


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "group"), [
    (signal.SIGTERM, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_with_its_workers(tmp_path, number, group):
    """group: as a terminal and most schedulers do, the workers get it, too."""
    process = start(tmp_path, *LONG, "--jobs", 2, "--out", "out", start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        until(lambda: len(list(tmp_path.glob("out/cells/*/state.pt"))) == 2, process)
        workers = children(process.pid)
        assert len(workers) >= 2
        (os.killpg if group else os.kill)(process.pid, number)
        out, err = process.communicate(timeout=60)
        patience = time.monotonic() + 15  # a worker may still be on its way out
        while any(map(living, workers)) and time.monotonic() < patience:
            time.sleep(0.05)
        left = [worker for worker in workers if living(worker)]
    finally:
        with contextlib.suppress(ProcessLookupError):  # it is in a session of its own
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err
    assert err.split("\n") == ["", "robench: interrupted; run the same command again to go on", ""]
    assert left == []
    assert len(list(tmp_path.glob("out/cells/*/state.pt"))) == 2
    assert left_over(tmp_path) == []


def test_nothing_of_a_relay_is_left_to_hold_its_semaphores():
    """A thread that drops them while the process ends leaks them."""
    said, before = [], set(threading.enumerate())
    reporter = Reporter(quiet=True)
    reporter.say = said.append
    with relayed(reporter) as messages:
        writer = multiprocessing.get_context("spawn").Process(
            target=messages.put, args=(("say", None, "last words", None),))
        writer.start()
        writer.join()
    assert said == ["last words"]
    assert set(threading.enumerate()) <= before


def test_a_worker_that_is_told_to_end_twice_ends_once(monkeypatch):
    monkeypatch.setattr(local, "_leaving", False)
    with pytest.raises(SystemExit):
        local._leave(signal.SIGTERM, None)
    local._leave(signal.SIGTERM, None)  # while the first is on its way


def test_a_search_that_is_interrupted_has_kept_its_last_step(tmp_path, robench, monkeypatch):
    """It ends after a step, with all units that were under way in its file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Search, "save_every", 1e9)
    (tmp_path / "interrupted.py").write_text("""
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
""")
    gradients, passes = Network.gradients, []

    def counted(self, *arguments):
        passes.append(1)
        if len(passes) == 5:  # in the middle of a step
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(self, *arguments)

    monkeypatch.setattr(Network, "gradients", counted)
    done = robench("eval", "interrupted:net", "--attack", "pgd-30,restarts=2", "--threat",
                   "Linf:0.001", "--limit", 100, "--device", "cpu", "--precision", "ieee",
                   "--quiet", "--out", "out")
    assert done.code == 130, done.err
    (partial,) = (tmp_path / "out").rglob("*.partial")
    with np.load(partial) as kept:
        steps = kept["unit.step"].tolist()  # some units began later
    assert max(steps) == 5 and min(steps) > 0


# Disks that are full


@pytest.fixture
def finished(tmp_path, robench, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = robench(*SHORT, "--jobs", 1, "--out", "out")
    assert done.code == 0, done.err
    return tmp_path / "out"


# kill -9; that of `run` and of `eval` is in test_matrix.py and test_resume.py


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_report_that_is_killed_is_written_again(finished, robench, check_files, kills):
    before, data = contents(finished), finished / "results.jsonl"

    def begin():
        return start(finished.parent, "report", "out")

    def killed():
        assert check_files(finished) >= 5
        assert data.read_bytes() == before[Path("results.jsonl")]

    def ended():
        assert contents(finished) == before

    seconds = seconds_of_writing(begin(), finished)
    for path in [*finished.glob("leaderboard.*"), *finished.glob("figures/*")]:
        path.unlink()
    kill_until(kills, begin, finished, seconds, killed=killed, ended=ended)
    done = robench("report", "out")
    assert done.code == 0, done.err
    ended()


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


MORE = (*SHORT[:-1], "--baseline", "trades", "--quiet", "--jobs", 1)


def survives(folder, before, done):
    """One line, and what was there is there."""
    assert done.code == 1
    assert done.err.startswith("robench: cannot write ") and done.err.count("\n") == 1, done.err
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert left_over(folder) == []


def test_a_limit_on_the_size_of_files_is_a_full_disk(finished, robench):
    before, limits = contents(finished), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        done = robench(*MORE, "--out", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in done.err
    survives(finished, before, done)


def test_a_full_tmpfs(finished, robench, monkeypatch, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run([shutil.which("mount") or "false", "-t", "tmpfs", "-o", "size=32m",
                              "tmpfs", str(disk)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        subprocess.run(["cp", "-r", str(finished), str(disk / "out")], check=True)
        free = os.statvfs(disk)
        (disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 40_000))
        before = contents(disk / "out")
        done = robench(*MORE, "--out", disk / "out")
        assert "No space left on device" in done.err
        survives(disk / "out", before, done)
        (disk / "filler").unlink()
        done = robench(*MORE, "--out", disk / "out")
        assert done.code == 0, done.err
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# Memory


class Roomy(nn.Module):
    """A linear network with room for so many images while it is trained."""

    room = 1000

    def __init__(self, classes=10):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(self, x):
        if self.training and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.net(x)


@pytest.mark.parametrize(("room", "advice"), [
    (20, "batches of 16 fit: --set batch_size=16"), (1, "not even batches of two images fit")])
def test_a_training_out_of_memory_names_a_batch_size_that_fits(
    tmp_path, monkeypatch, job, room, advice
):
    monkeypatch.setitem(sys.modules, "roomy_net", SimpleNamespace(Roomy=Roomy))
    monkeypatch.setattr(Roomy, "room", room)
    spec = job(defenses=("pgd-at",), model="roomy_net:Roomy", out=tmp_path,
               train={"batch_size": 64})
    with pytest.raises(RobenchError, match=f"out of memory with batches of 64; {advice}"):
        run(spec)
    assert not list(tmp_path.rglob("done.json"))


def test_an_evaluation_out_of_memory_goes_on_in_halves_and_its_record_says_so(
    tmp_path, robench, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("robench.benchmark.external.render",  # without its figures
                        lambda results, out: save(out, results))
    (tmp_path / "tight_net.py").write_text("""
import torch
from torch import nn

class Tight(nn.Sequential):
    def __init__(self, room):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.room = room

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)

def tight(): return Tight(1)
def roomy(): return Tight(1000)
""")
    for name in ("tight", "roomy"):
        done = robench("eval", f"tight_net:{name}", "--attack", "pgd-3", "--limit", 300,
                       "--threat", "Linf:0.02", "--device", "cpu", "--quiet", "--out", name)
        assert done.code == 0, done.err
    tight, roomy = (load([tmp_path / name]).records[0] for name in ("tight", "roomy"))
    assert 1 < tight.n_correct == roomy.n_correct and tight.n_robust == roomy.n_robust
    assert re.search(r"short of memory: 1 at a time$", tight.prepared)
    assert "memory" not in roomy.prepared
