"""The job files for SLURM and KubeRay: the shell and the command line understand them."""

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest
import yaml

from robench.benchmark.cli import cli

EXAMPLES = Path(__file__).parents[2] / "examples"
SLURM = EXAMPLES / "slurm" / "robench.sbatch"
KUBERAY = EXAMPLES / "kuberay" / "robench.yaml"


def understood(words):
    """The options of a `robench run`, read by the command line itself."""
    assert words[:2] == ["robench", "run"]
    command = cli.get_command(click.Context(cli), "run")
    return command.make_context("run", words[2:]).params


def test_the_slurm_script():
    text = SLURM.read_text()
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    assert re.search(r"^#SBATCH --nodes=\d+$", text, flags=re.M)
    joined = text.replace("\\\n", " ")
    (line,) = re.findall(r"^robench run .*$", joined, flags=re.M)
    options = understood(shlex.split(line))
    assert (options["executor"], options["ray_address"]) == ("ray", "$address")
    starts = re.findall(r"ray start .*--block", joined)
    assert len(starts) == 2 and sum("--head" in start for start in starts) == 1


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
ROBENCH = """#!{python}
import sys, time
import ray
ray.init(address=sys.argv[sys.argv.index("--ray-address") + 1], log_to_driver=False)
last = time.monotonic() + 120
while sum(node["Alive"] for node in ray.nodes()) < 2 and time.monotonic() < last:
    time.sleep(0.2)
print("found", sorted(ray.cluster_resources()[kind] for kind in ("CPU", "GPU")))
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
@pytest.mark.parametrize("token", [None, "another"])
def test_the_slurm_script_joins_its_nodes(token, tmp_path):
    """With a stand-in for srun, which starts both nodes here; in a home with a token, too."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: there are sockets in it
    (folder / "srun").write_text(SRUN)
    (folder / "robench").write_text(ROBENCH.format(python=sys.executable))
    for name in ("srun", "robench"):
        (folder / name).chmod(0o755)
    if token is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    with socket.socket() as free:
        free.bind(("", 0))
        port = 20000 + free.getsockname()[1] % 20000
    environment = {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path), "RAY_TMPDIR": str(folder), "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": str(port - 20000), "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3",
        "SLURM_GPUS_ON_NODE": "2", "SLURMD_NODENAME": "here"}
    try:
        with (tmp_path / "log").open("w") as log:  # what goes on in the background holds it open
            done = subprocess.run(["bash", SLURM], env=environment, stdout=log, stderr=log,
                                  timeout=240)
    finally:
        for pid in marked(f"RAY_TMPDIR={folder}"):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0
    assert "found [4.0, 6.0]" in (tmp_path / "log").read_text()


def marked(entry):
    """Processes that have this in their environment; SLURM ends what a job has left."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if entry.encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def test_the_kuberay_job():
    job = yaml.safe_load(KUBERAY.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    folder, _, command = job["spec"]["entrypoint"].partition(" && ")
    options = understood(shlex.split(command))
    assert (options["executor"], options["ray_address"]) == ("ray", "auto")
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:  # all see the same folder at the same place
        spec = pod["template"]["spec"]
        (container,), (volume,) = spec["containers"], spec["volumes"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] == volume["name"] and folder == f"cd {mount['mountPath']}"
        assert options["out"].is_relative_to(mount["mountPath"])
        assert container["image"] == pods[0]["template"]["spec"]["containers"][0]["image"]
    # The command needs a share of a GPU itself, and leaves one for the tasks.
    gpus = float(pods[1]["template"]["spec"]["containers"][0]["resources"]["limits"][
        "nvidia.com/gpu"])
    assert 0 < job["spec"]["entrypointNumGpus"] <= gpus - options["gpus_per_task"]


@pytest.mark.parametrize("path", [SLURM, KUBERAY], ids=lambda path: path.name)
def test_the_files_say_how_they_are_used(path):
    assert path.relative_to(EXAMPLES.parent).as_posix() in path.read_text()
