"""A run on a Ray cluster of several nodes, one of which is killed: the numbers are the same.

The nodes are processes of this machine, with everything that a machine of its own would have.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from robench.benchmark.executors import check_executor
from robench.benchmark.executors import ray as ray_executor
from robench.benchmark.graph import Estimate, Task
from robench.benchmark.progress import Reporter
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError
from robench.reports.store import load

from .kills import living, until

SRC = Path(__file__).parents[2] / "src"
CLOCK = {"created", "seconds", "train_seconds", "teacher_seconds", "peak_bytes"}
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

nodes, each = json.loads(sys.argv[1])

small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={
    **small, "num_cpus": 0, "include_dashboard": False,
    # Losses are noticed sooner; on a machine of many tests not too soon.
    "_system_config": {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000,
                       "health_check_failure_threshold": 4}})
raylets = [cluster.add_node(**each, **small).all_processes["raylet"][0].process.pid
           for _ in range(nodes)]
print(json.dumps([cluster.address, raylets]), flush=True)
sys.stdin.read()
cluster.shutdown()
"""
# The command line; figures are no part of what is compared.
ROBENCH = """
import sys
from robench.benchmark import cli, matrix
from robench.reports.store import save

matrix.render = lambda results, out: save(out, results)
sys.argv[0] = "robench"
cli.main()
"""
SMALL = ("run", "--defense", "pgd-at", "--baseline", "trades", "--epochs", "5", "--train-limit",
         "384", "--limit", "30", "--attack", "pgd-5", "--attack", "square,queries=50", "--set",
         "validation=20", "--set", "select_steps=2", "--device", "cpu", "--threads", "1",
         "--jobs", "2", "--shards", "2")
MAIN_JOB = ("run", "--defense", "trades", "--defense", "ard", "--defense", "rslad", "--defense",
            "adaad", "--defense", "akd2", "--defense", "peeraid", "--baseline", "pgd-at",
            "--seeds", "0,1,2", "--epochs", "4", "--set", "swa_start=1", "--device", "cpu",
            "--threads", "1", "--jobs", "3", "--shards", "3", "--limit", "120")


def start(folder, code, *arguments, env=None, **options):
    env = {**os.environ, **(env or {}), "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1",
           "GIT_DIR": os.devnull, "RAY_USAGE_STATS_ENABLED": "0",
           "RAY_worker_niceness": "0"}  # the tests are nice as a whole, where they are
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=folder,
                            env=env, stdout=subprocess.PIPE, text=True, **options)


def robench(folder, command, *arguments, **options):
    return start(folder, ROBENCH, *command, *arguments, stderr=subprocess.PIPE, **options)


def finish(process):
    _, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err
    return err


def tree(pid):
    """A process and all that it started."""
    children = set()
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children.update(map(int, tasks.read_text().split()))
    return {pid}.union(*map(tree, children))


@contextlib.contextmanager
def cluster(nodes, **each):
    """(address, pids of the nodes' main processes); the head does no tasks. each: what a node
    has, one CPU if nothing is said."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: there are sockets in it
    process = start(folder, CLUSTER, json.dumps([nodes, each or {"num_cpus": 1}]),
                    env={"RAY_TMPDIR": folder}, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        line = process.stdout.readline()
        assert line, "no cluster could be started"
        yield json.loads(line)
    finally:
        process.communicate(timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


def outcome(out):
    """Everything that a run found, to the bit, without the clock."""
    results = load([out])
    records = [record.model_dump(exclude=CLOCK) | {"flags": Path(record.flags).name}
               for record in results.records]
    epochs = [epoch.model_dump(exclude={"created", "seconds"}) for epoch in results.epochs]
    files = {path.relative_to(out): path.read_bytes() for suffix in ("safetensors", "npz")
             for path in (out / "cells").rglob(f"*.{suffix}")}
    transfers = [transfer.model_dump(exclude={"created"}) for transfer in results.transfers]
    return records, transfers, epochs, files


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(("command", "nodes", "trained"), [
    (SMALL, 2, 0), pytest.param(MAIN_JOB, 3, 4, marks=pytest.mark.slow)])
def test_a_node_that_is_killed_costs_time_alone(tmp_path, command, nodes, trained):
    """trained: so many cells are finished when it happens, others are under way."""
    finish(robench(tmp_path, command, "--out", "local", "--quiet"))
    with cluster(nodes) as (address, raylets):
        process = robench(tmp_path, command, "--out", "ray", "--executor", "ray",
                          "--ray-address", address)
        cells = tmp_path / "ray" / "cells"
        until(lambda: len(list(cells.glob("*/state.pt"))) > 1
              and len(list(cells.glob("*/done.json"))) >= trained, process)
        for pid in tree(raylets[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.poll() is None
        err = finish(process)
    one, other = outcome(tmp_path / "ray"), outcome(tmp_path / "local")
    assert one[:3] == other[:3]
    assert one[3].keys() == other[3].keys() and one[3] == other[3]
    assert len(one[0]) > 10 and {record["threads"] for record in one[0]} == {1}
    assert "Traceback" not in err
    assert "train " in err  # progress of the workers; at least what was killed took a second


# What tasks get from a machine that says it has a GPU: (beginning, end, GPUs) of each.
SHARED = """
import json, os, sys, time
from pathlib import Path
import torch
from robench.benchmark.executors import Request, ray, share_of
from robench.benchmark.executors.work import Outcome
from robench.benchmark.graph import Estimate, Task
from robench.benchmark.progress import Reporter
from robench.benchmark.spec import RunSpec

def perform(request, task, messages, folder, *before):
    import ray
    folder, began = Path(folder, str(task.gpu)), time.monotonic()
    folder.mkdir(exist_ok=True)
    (folder / f"{task.key}.begun").touch()
    while len(list(folder.glob("*.begun"))) * task.gpu < 1:  # so many run at once
        assert time.monotonic() < began + 60
        time.sleep(0.01)
    time.sleep(0.3)
    (folder / task.key).write_text(json.dumps([began, time.monotonic(), ray.get_gpu_ids()]))
    return Outcome(1, True)

ray._perform = perform
for part in (1.0, 0.5):
    spec = RunSpec(executor="ray", ray_address=sys.argv[1], threads=1, gpus_per_task=part)
    share = share_of(spec, torch.device("cuda"))
    tasks = [Task(str(i), "train", "", threads=share.threads, gpu=share.gpu) for i in range(4)]
    assert ray.work_ahead(Request((spec,)), tasks, Reporter()) == 4
    print(json.dumps([json.loads(Path(str(part), task.key).read_text()) for task in tasks]))
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_tasks_share_a_gpu_as_the_request_says(tmp_path):
    with cluster(1, num_cpus=4, num_gpus=1) as (address, _):
        process = start(tmp_path, SHARED, address, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err == ""
    for most, line in zip((1, 2), out.splitlines(), strict=True):
        tasks = json.loads(line)
        assert {tuple(gpus) for *_, gpus in tasks} == {(0,)}
        assert most == max(sum(one <= began < end for one, end, _ in tasks)
                           for began, *_ in tasks)


def test_a_process_that_gets_another_gpu_goes_over_to_it(monkeypatch):
    """CUDA would stay at the one that it saw first."""
    chosen, hidden = [], "CUDA_VISIBLE_DEVICES"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: hidden not in os.environ)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for given in ([3], ["1"]):
        monkeypatch.setenv(hidden, str(given[0]))
        assert ray_executor._choose_gpu(given) == str(given[0])
    assert chosen == [3, 1]
    monkeypatch.setenv(hidden, "MIG-1")
    assert (ray_executor._choose_gpu(["MIG-1"]), ray_executor._choose_gpu([])) == ("MIG-1", "")
    assert chosen == [3, 1] and os.environ[hidden] == "MIG-1"


@pytest.mark.parametrize(("gpu", "machines", "told"), [
    (0.0, [{"CPU": 4.0}], False), (0.0, [{"CPU": 3.0}, {"GPU": 8.0}], True),
    (0.5, [{"CPU": 4.0, "GPU": 1.0}], False),
    (0.5, [{"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}], True)])
def test_tasks_that_fit_on_no_machine_are_told(capfd, gpu, machines, told):
    """Ray only waits."""
    ray_executor._check_room(machines, Task("", "train", "", threads=4, gpu=gpu),
                             Reporter(quiet=True))
    _, err = capfd.readouterr()
    assert err.startswith(f"warning: no machine of this Ray has 4 CPUs and {gpu:g} GPUs, ") is told
    assert told or err == ""


@pytest.mark.parametrize(("memory", "gpu", "asked"), [
    (None, 0.0, None), (3 * 2**30, 0.0, 3 * 2**30), (9 * 2**30, 0.0, 4 * 2**30),
    (2**30, 0.5, None)])
def test_what_a_task_takes_is_asked_for(memory, gpu, asked):
    """At most what a machine has, or it would never run; a GPU's memory is its own."""
    machines = [{"CPU": 4.0, "memory": 2.0 * 2**30}, {"memory": 4.0 * 2**30}, {"CPU": 1.0}]
    task = Task("", "train", "", gpu=gpu, estimate=Estimate(memory=memory))
    assert ray_executor._memory(task, machines) == asked


def test_a_lost_queue_is_told_in_one_line(capfd):
    class Lost:
        def get(self):
            raise ConnectionError("the actor died\nTraceback of its own")

    Reporter(quiet=True).relay(ray_executor._Ending(Lost()))
    _, err = capfd.readouterr()
    assert " ".join(err.split()).startswith(
        "warning: no progress is shown from here on: Ray's queue is gone (")


def test_without_ray_there_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match='pip install "robench\\[ray\\]"'):
        check_executor(RunSpec(executor="ray"))
    with pytest.raises(UsageError, match="--ray-address is for --executor ray"):
        check_executor(RunSpec(ray_address="auto"))


def test_ray_chooses_the_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_executor(RunSpec(executor="ray", device="cuda"))
    with pytest.raises(UsageError, match="--device cuda:1: Ray chooses .*write --device cuda$"):
        check_executor(RunSpec(executor="ray", device="cuda:1"))


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_ctrl_c_ends_a_run_on_its_own_ray(tmp_path):
    """As a terminal sends it: to the command and to all that it started. So many epochs that the
    student is not through before Ray has told its task to end."""
    command = ("run", "--defense", "rslad", "--baseline", "trades", "--epochs", "30",
               "--train-limit", "384", "--limit", "10", "--attack", "fgsm", "--set",
               "validation=20", "--device", "cpu", "--threads", "1", "--jobs", "1", "--quiet",
               "--executor", "ray", "--out", "out")
    process = robench(tmp_path, command, start_new_session=True,
                      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    cells, started = tmp_path / "out" / "cells", {process.pid}
    try:  # the student is under way, its teacher is trained
        until(lambda: list(cells.glob("*/done.json")) and list(cells.glob("*/state.pt")), process)
        started = tree(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        last = time.monotonic() + 15
        while (left := set(filter(living, started))) and time.monotonic() < last:
            time.sleep(0.05)
    finally:
        for pid in filter(living, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert err.split("\n") == ["", "robench: interrupted; run the same command again to go on", ""]
    assert process.returncode == 130
    assert len(started) > 3 and not left
    (teacher,), (state,) = cells.glob("*/done.json"), cells.glob("*/state.pt")
    kept = teacher.read_bytes()
    assert finish(robench(tmp_path, command)).startswith("reports: ")
    assert teacher.read_bytes() == kept and (state.parent / "done.json").exists()
