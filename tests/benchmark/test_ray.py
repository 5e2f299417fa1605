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

from robench.benchmark.executors import check_executor
from robench.benchmark.executors import ray as ray_executor
from robench.benchmark.progress import Reporter
from robench.benchmark.spec import RunSpec
from robench.errors import UsageError
from robench.reports.store import load

SRC = Path(__file__).parents[2] / "src"
CLOCK = {"created", "seconds", "train_seconds", "teacher_seconds", "peak_bytes"}
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster

small = {"object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={
    **small, "num_cpus": 0, "include_dashboard": False,
    # Losses are noticed sooner; on a machine of many tests not too soon.
    "_system_config": {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000,
                       "health_check_failure_threshold": 4}})
raylets = [cluster.add_node(num_cpus=1, **small).all_processes["raylet"][0].process.pid
           for _ in range(int(sys.argv[1]))]
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


def robench(folder, command, *arguments):
    return start(folder, ROBENCH, *command, *arguments, stderr=subprocess.PIPE)


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
def cluster(nodes):
    """(address, pids of the nodes' main processes); the head does no tasks."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: there are sockets in it
    process = start(folder, CLUSTER, nodes, env={"RAY_TMPDIR": folder}, stdin=subprocess.PIPE,
                    stderr=subprocess.DEVNULL)
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
        cells, last = tmp_path / "ray" / "cells", time.monotonic() + 900
        while not (len(list(cells.glob("*/state.pt"))) > 1
                   and len(list(cells.glob("*/done.json"))) >= trained):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < last
            time.sleep(0.02)
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
