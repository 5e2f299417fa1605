"""The job files for SLURM and KubeRay: the shell and the command line understand them."""

import re
import shlex
import subprocess
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
