"""The gate in somebody's project: the example, the action, the GitLab job and the pytest plugin."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import robench as package
from robench.benchmark.cli import cli
from robench.errors import UsageError
from robench.pytest_plugin import assert_robust
from robench.reports.power import power_table

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits"
GATE = (ROOT / "docs" / "gate.md").read_text(encoding="utf-8")
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
THREAT = "Linf:0.1"


def parsed(command):
    """What click makes of the arguments; raises click.UsageError if they are wrong."""
    name, found, rest = cli.resolve_command(click.Context(cli), command)
    return name, found.make_context(name, rest).params


# The example


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the example, in the current directory."""
    shutil.copytree(EXAMPLE, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    yield tmp_path / "project"
    sys.modules.pop("net", None)


@pytest.fixture
def gate(robench, monkeypatch):
    """The commands of the example's README, by a quicker attack: its check."""
    from robench.benchmark import external
    from robench.reports.store import save

    monkeypatch.setattr(external, "render", lambda results, out: save(out, results))

    def run():
        done = robench("eval", "net:trained", "--threat", THREAT, "--attack", "pgd-20",
                       "--device", "cpu", "--out", "runs/gate", "--quiet")
        assert done.code == 0, done.err
        return robench("check", "runs/gate", "--against", "baseline.json", "--max-drop", 2,
                       "--metric", "pgd-20")

    return run


def attacked_accuracy():
    import net

    scores = package.evaluate(net.trained(), *net.held_out(360), threat=THREAT, attacks=["pgd-20"])
    return scores.robust["pgd-20"]


def perturb(path, scale):
    """Weights with normal noise of so many of their standard deviations."""
    noise = torch.Generator().manual_seed(0)
    save_file({name: value + scale * value.std() * torch.randn(value.shape, generator=noise)
               for name, value in load_file(path).items()}, path)


def test_the_gate_is_green_and_a_real_regression_turns_it_red(project, gate):
    before = attacked_accuracy()
    green = gate()
    assert (green.code, green.err) == (0, "") and green.out.startswith("pass: pgd-20")
    perturb(project / "weights.safetensors", 0.3)
    assert before - attacked_accuracy() >= 0.02
    red = gate()
    assert red.code == 3 and red.err.startswith("robench: regressed: pgd-20 on net:trained")


def test_the_examples_baseline_is_of_its_weights(project):
    import net

    from robench.benchmark.checkpoints import weights_sha256

    content = json.loads((project / "baseline.json").read_text())["measured"]
    assert {one["attack"] for one in content} == {"pgd-20", "autoattack"}
    assert {one["weights_sha256"] for one in content} == {weights_sha256(net.trained())}


def test_the_examples_job_uses_the_action_as_it_is():
    path = EXAMPLE / ".github" / "workflows" / "robustness.yml"
    job = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]["gate"]
    (step,) = [step for step in job["steps"] if "robench" in step.get("uses", "")]
    required = {name for name, facts in ACTION["inputs"].items() if facts.get("required")}
    assert required <= step["with"].keys() <= ACTION["inputs"].keys()
    assert all(isinstance(value, str) for value in step["with"].values())


# The action

STUB = """#!/bin/bash
printf '%s\\n' "$#" "$@" >>"$STUB_LOG"
if [[ $1 == check && -n $STUB_VERDICT ]]; then
  mkdir -p "$OUT"
  echo "## Robustness: $STUB_VERDICT" >"$OUT/check.md"
  echo "{\\"verdict\\": \\"$STUB_VERDICT\\"}" >"$OUT/check.json"
fi
[[ $1 == check ]] && exit "$STUB_CODE" || exit 0
"""


def steps_of_action():
    return [step for step in ACTION["runs"]["steps"] if "robench" in step.get("run", "")]


def run_action(folder, given, command, **variables):
    """The scripts that call robench, as the runner would run them in the folder, with `command`
    as their robench; returns (exit code of the last one, summary, outputs)."""
    programs = folder / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "robench").write_text(command)
    (programs / "robench").chmod(0o755)
    if not (programs / "python").is_symlink():
        (programs / "python").symlink_to(sys.executable)
    inputs = {name: given.get(name, facts.get("default")) for name, facts in
              ACTION["inputs"].items()}
    files = {name: programs / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    for path in files.values():
        path.write_text("")
    for step in steps_of_action():
        values = {name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: inputs[m[1]], text)
                  for name, text in step["env"].items()}
        assert not any("${{" in text for text in (*values.values(), step["run"]))
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder, capture_output=True, text=True, timeout=600, env={
                "PATH": f"{programs}:{os.environ['PATH']}", **variables,
                **{k: str(p) for k, p in files.items()}, **values})
        if done.returncode:
            break
    return (done.returncode, *(path.read_text() for path in files.values()))


def run_stub(folder, given, verdict, code):
    """With a robench that only keeps its arguments; returns the command lines as well."""
    log = folder / "log"
    code, *texts = run_action(folder, given, STUB, STUB_VERDICT=verdict, STUB_CODE=str(code),
                              STUB_LOG=str(log))
    words, lines = log.read_text().splitlines(), []
    while words:
        count = int(words.pop(0))
        lines.append(words[:count])
        del words[:count]
    return code, lines, *texts


GIVEN = {"network": "net:trained", "against": "baseline.json"}


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("regressed", 3), ("inconclusive", 4)])
def test_the_action_passes_the_verdict_on(tmp_path, verdict, code):
    got, lines, summary, outputs = run_stub(tmp_path / "a", GIVEN, verdict, code)
    assert (got, summary, outputs) == (code, f"## Robustness: {verdict}\n", f"verdict={verdict}\n")
    (name, eval_), (other, check) = map(parsed, lines)
    assert (name, eval_["sources"], eval_["attacks"]) == ("eval", ("net:trained",), ("autoattack",))
    assert (other, check["max_drop"], check["allow_inconclusive"]) == ("check", 0.5, False)
    assert check["current"] == eval_["out"]


def test_the_action_fails_where_check_cannot_start(tmp_path):
    code, _, summary, outputs = run_stub(tmp_path / "a", GIVEN, "", 2)
    assert (code, summary, outputs) == (2, "", "")


def test_the_action_with_the_real_robench(project):
    """A pass, then with worse weights a regression, then a file that is no baseline."""
    command = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m robench "$@"\n'
    given = {**GIVEN, "threat": THREAT, "attack": "pgd-20", "metric": "pgd-20", "max-drop": "2",
             "limit": ""}
    path = {"PYTHONPATH": f"{ROOT / 'src'}:{project}", "OMP_NUM_THREADS": "1"}
    code, summary, outputs = run_action(project, given, command, **path)
    assert (code, outputs) == (0, "verdict=pass\n")
    assert summary.startswith("## Robustness: pass\n")
    assert re.search(r"^\| pass +\| pgd-20 +\|", summary, flags=re.M)
    perturb(project / "weights.safetensors", 0.3)
    code, summary, outputs = run_action(project, given, command, **path)
    assert (code, outputs) == (3, "verdict=regressed\n")
    assert summary.startswith("## Robustness: regressed\n")
    assert '<failure type="regressed"' in (project / "runs/gate/check.xml").read_text()
    (project / "baseline.json").write_text("{}")
    assert run_action(project, given, command, **path) == (2, "", "")
    assert not (project / "runs/gate/check.xml").exists()  # of the check before


def test_all_inputs_of_the_action_arrive_as_they_are(tmp_path):
    given = {**GIVEN, "network": "-x; touch evil", "dataset": "cifar10", "data-root": "my data",
             "model": "resnet18", "threat": "L2:0.5", "attack": "pgd-20 autoattack,limit=10",
             "limit": "100", "metric": "autoattack,clean", "max-drop": "1", "alpha": "0.01",
             "allow-inconclusive": "true", "out": "$(touch evil)"}
    _, lines, _, _ = run_stub(tmp_path / "a", given, "pass", 0)
    (_, eval_), (_, check) = map(parsed, lines)
    assert not list(tmp_path.rglob("evil"))
    assert eval_["sources"] == ("-x; touch evil",)
    assert eval_["attacks"] == ("pgd-20", "autoattack,limit=10")
    assert (eval_["dataset"], eval_["model"], eval_["threats"], eval_["limit"], eval_["data_root"]
            ) == ("cifar10", "resnet18", ("L2:0.5",), 100, Path("my data"))
    assert (check["metrics"], check["max_drop"], check["alpha"], check["allow_inconclusive"]
            ) == (("autoattack,clean",), 1.0, 0.01, True)


def test_the_action_is_a_composite_action():
    assert ACTION["runs"]["using"] == "composite" and ACTION["name"] and ACTION["description"]
    assert all("shell" in step for step in ACTION["runs"]["steps"] if "run" in step)
    assert all(facts["description"] for facts in ACTION["inputs"].values())
    used = set(re.findall(r"inputs\.([\w-]+)", json.dumps(ACTION["runs"])))
    assert used == set(ACTION["inputs"])
    named = GATE.partition("## GitHub")[2].partition("## GitLab")[0]
    assert all(name in named for name in ACTION["inputs"])


# The documentation


def test_the_gitlab_job():
    text = re.search(r"<!-- gitlab -->\n```yaml\n(.*?)```", GATE, flags=re.S)[1]
    (job,) = yaml.safe_load(text).values()
    commands = [shlex.split(line)[1:] for line in job["script"] if line.startswith("robench ")]
    (name, eval_), (other, check) = map(parsed, commands)
    assert (name, other) == ("eval", "check") and check["current"] == eval_["out"]
    assert "allow_failure" not in job and check["allow_inconclusive"]  # exit code 4 of eval is red
    assert job["artifacts"]["reports"]["junit"] == str(check["junit"])
    assert set(job["artifacts"]["paths"]) == {str(check["markdown"]), str(check["as_json"])}


def test_the_power_table_is_computed():
    """If not: write what reports.power.power_table() returns into docs/gate.md."""
    paired, unpaired = power_table().split("\n\n")
    assert f"\n{paired}\n" in GATE and f"\n{unpaired.strip()}\n" in GATE


# The plugin


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """PYTHONPATH of an environment in which pytest finds the entry points of pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("site")
    info = folder / "robench-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robench\nVersion: 0.1\n")
    points = "".join(f"{name} = {value}\n" for name, value in
                     settings["entry-points"]["pytest11"].items())
    (info / "entry_points.txt").write_text(f"[pytest11]\n{points}")
    return os.pathsep.join([str(folder), str(ROOT / "src")])


def run_pytest(folder, path, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})


LIGHT = """
import sys

def test_a_project_that_does_not_use_it(request):
    assert request.config.pluginmanager.has_plugin("robench")
    heavy = {"torch", "numpy", "scipy", "pandas", "pydantic", "click"} & set(sys.modules)
    assert not heavy, heavy
    assert not [name for name in sys.modules if name.startswith("robench.")
                and name != "robench.pytest_plugin"]
"""


def test_projects_that_do_not_use_the_plugin_do_not_wait_for_it(tmp_path, installed):
    (tmp_path / "test_light.py").write_text(LIGHT)
    # Other plugins of this environment may import what they like.
    done = run_pytest(tmp_path, installed, "-p", "no:hypothesispytest", "-p", "no:anyio")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_examples_tests_pass_and_fail_where_the_network_is_worse(project, installed):
    weights = project / "weights.safetensors"
    done = run_pytest(project, installed)
    assert done.returncode == 0, done.stdout + done.stderr
    perturb(weights, 0.75)
    done = run_pytest(project, installed)
    assert done.returncode == 1
    assert re.search(r"^E +AssertionError: robust accuracy under pgd-20 at Linf:0\.1 is [\d.]+ % "
                     r"\(\d+ of 100 images, 95 % interval [\d.]+ to [\d.]+ %\), below min_accuracy "
                     r"70 %; clean accuracy is [\d.]+ %$", done.stdout, flags=re.M), done.stdout


@pytest.fixture
def half():
    """A network that is right on two of four images, far from where it decides."""

    def model(x):
        score = 5 * (x.mean((1, 2, 3)) - 0.5)  # above 0: class 0
        return torch.stack([score, -score], 1)

    images = torch.stack([torch.full((1, 4, 4), value) for value in (0.2, 0.2, 0.8, 0.8)])
    return model, images, torch.tensor([1, 0, 0, 1])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_share_itself_counts(half):
    scores = assert_robust(*half, attack="fgsm", threat="Linf:0.01", min_accuracy=0.5)
    assert scores.robust["fgsm"] == 0.5
    with pytest.raises(AssertionError, match=r"is 50\.0 % \(2 of 4 images, 95 % interval 15\.0 to "
                                             r"85\.0 %\), below min_accuracy 51 %; clean .* 50"):
        assert_robust(*half, attack="fgsm", threat="Linf:0.01", min_accuracy=0.51)


@pytest.mark.parametrize("wrong", [40, -0.1, float("nan")])
def test_a_percentage_is_no_share(half, wrong):
    with pytest.raises(UsageError, match="write a share from 0 to 1"):
        assert_robust(*half, attack="fgsm", min_accuracy=wrong)


def test_no_network_passes_that_hides_its_gradients(half):
    def rounded(x):
        return half[0]((x * 8).round() / 8)

    with pytest.warns(UserWarning), pytest.raises(AssertionError, match="unreliable: zero-grad"):
        assert_robust(rounded, *half[1:], attack="fgsm", threat="Linf:0.01", min_accuracy=0)


def test_what_the_evaluation_doubts_is_a_warning(half):
    def probabilities(x):
        return torch.softmax(half[0](x), 1)

    with pytest.warns(UserWarning):
        assert_robust(probabilities, *half[1:], attack="fgsm", threat="Linf:0.01", min_accuracy=0)
