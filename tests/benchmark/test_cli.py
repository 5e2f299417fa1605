"""The command line: one line for every mistake, and what each command shows and leaves behind."""

import json
import shutil
import sys

import pytest
import torch
from click.testing import CliRunner

from robench.attacks.base import ADAPTERS, ATTACKS
from robench.benchmark.cli import cli
from robench.benchmark.data import DATASETS
from robench.benchmark.models import MODELS
from robench.benchmark.recipe import recipe_names
from robench.defenses import DEFENSES
from robench.reports.store import load

# A training of two steps, and attacks on 20 images.
SMALL = ("--epochs", 1, "--train-limit", 128, "--limit", 20, "--device", "cpu", "--jobs", 1,
         "--set", "validation=20", "--set", "select_steps=2")
NETS = """
import torch
from torch import nn

def logits(classes, size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))

def soft(classes, size):
    return nn.Sequential(logits(classes, size), nn.Softmax(1))

def few(size):
    return logits(3, size)

def nan(classes, size):
    net = logits(classes, size)
    nn.init.constant_(net[1].bias, float("nan"))
    return net
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory with a module my_nets and a few unfit files."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_nets", None)


@pytest.fixture
def no_figures(monkeypatch):
    """Reports take most of the time of a small run; the data files are enough for most tests."""
    from robench.benchmark import external, matrix
    from robench.reports.store import save

    for module in (external, matrix):
        monkeypatch.setattr(module, "render", lambda results, out: save(out, results))


@pytest.fixture
def files(here, checkpoint, make_network):
    """Checkpoints in the current directory, good and bad."""
    content = checkpoint.read_bytes()
    (here / "cut.safetensors").write_bytes(content[: len(content) // 2])
    (here / "garbage.safetensors").write_bytes(b"garbage")
    (here / "garbage.pt").write_bytes(b"garbage")
    torch.save(make_network().state_dict(), here / "plain.pt")
    torch.save(make_network(classes=7).state_dict(), here / "seven.pt")
    (here / "list.yaml").write_text("- a\n- b\n")
    (here / "broken.yaml").write_text("a: [")
    (here / "unknown.yaml").write_text("defence: trades\n")
    (here / "attack.yaml").write_text("attacks: pgdd\n")
    (here / "train.yaml").write_text("train: 3\n")
    (here / "options.yaml").write_text("options: {trades: }\n")
    return here


def snapshot(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}


RUN = ("run", "--defense", "trades")
EVAL = ("eval", "net.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "name at least one --defense"),
        (("run", "--defense", "trads"), "unknown defense 'trads'. Did you mean: trades?"),
        ((*RUN, "--baseline", "pgdat"), "unknown defense 'pgdat'. Did you mean: pgd-at?"),
        ((*RUN, "--attack", "pgdd"), "unknown attack 'pgdd'. Did you mean: pgd?"),
        ((*RUN, "--attack", "torchattack:PGD"), "Did you mean: torchattacks?"),
        ((*RUN, "--attack", "pgd,stpes=3"), "stpes"),
        ((*RUN, "--attack", "pgd,steps=["), "cannot read the value '['"),
        ((*RUN, "--attack", "fgsm", "--attack", "fgsm"), "'fgsm' is listed twice"),
        ((*RUN, "--model", "smallcn"), "unknown model 'smallcn'. Did you mean: smallcnn?"),
        ((*RUN, "--model", "my_nets:missing"), "has no 'missing'"),
        ((*RUN, "--model", "no_such_module:net"), "cannot import 'no_such_module'"),
        ((*RUN, "--model", "my_nets:few"), "the model has 3 outputs, but there are labels up to 9"),
        ((*RUN, "--dataset", "digit"), "unknown dataset 'digit'. Did you mean: digits?"),
        ((*RUN, "--dataset", "cifar10", "--data-root", "nowhere"), "read cifar10 in nowhere"),
        ((*RUN, "--dataset", "cifar10"), "cannot read cifar10 in data"),
        ((*RUN, "--dataset", "folder:nowhere"), "no folder nowhere: images go to nowhere/tr"),
        ((*RUN, "--recipe", "unifed"), "unknown recipe 'unifed'. Did you mean: unified?"),
        ((*RUN, "--recipe", "as-released"), "only on cifar10, not on 'digits'"),
        ((*RUN, "--threat", "Linf:8"), "write Linf:8/255"),
        ((*RUN, "--threat", "L3:1"), "write NORM:EPS"),
        ((*RUN, "--threat", "Linf:x"), "'x' is not a number"),
        ((*RUN, "--device", "cuda:77"), "device 'cuda:77' is not there"),
        ((*RUN, "--device", "toaster"), "device 'toaster' is not there"),
        ((*RUN, "--limit", "0"), "limit: "),
        ((*RUN, "--limit", "100000"), "cannot take 100000 of 360 images"),
        ((*RUN, "--limit", "some"), "'some' is not a valid integer"),
        ((*RUN, "--epochs", "0"), "epochs: "),
        ((*RUN, "--train-limit", "1"), "train_limit: "),
        ((*RUN, "--batch-size", "0"), "batch_size: "),
        ((*RUN, "--jobs", "0"), "jobs: "),
        ((*RUN, "--seeds", "0;1"), "--seeds 0;1: write whole numbers"),
        ((*RUN, "--seeds", ""), "write whole numbers"),
        ((*RUN, "--set", "lr"), "--set lr: write KEY=VALUE"),
        ((*RUN, "--set", "lrr=1"), "unknown training setting 'lrr'. Did you mean: lr?"),
        ((*RUN, "--set", "lr=fast"), "train.lr: "),
        ((*RUN, "--set", "lr=["), "cannot read the value '['"),
        ((*RUN, "--set", "=3"), "unknown training setting ''"),
        ((*RUN, "--set", "trads.beta=3"), "unknown defense 'trads'. Did you mean: trades?"),
        ((*RUN, "--set", "trades.betta=3"), "defense 'trades' has no option 'betta'"),
        ((*RUN, "--set", "trades.beta=much"), "defense 'trades', option beta: "),
        ((*RUN, "--set", "trades.threat=L2:1"), "has no option 'threat'"),
        ((*RUN, "--set", "validation=0"), "select: val needs validation images"),
        ((*RUN, "--set", "validation=5000"), "cannot hold out 5000 of 1437 images"),
        ((*RUN, "--set", "batch_size=1"), "train.batch_size: "),
        ((*RUN, "--config", "nowhere.yaml"), "cannot read nowhere.yaml: No such file"),
        ((*RUN, "--config", "list.yaml"), "must hold settings, one `name: value` a line"),
        ((*RUN, "--config", "broken.yaml"), "broken.yaml is not valid YAML"),
        ((*RUN, "--config", "unknown.yaml"), "unknown setting 'defence'. Did you mean: defenses?"),
        (("run", "--config", "attack.yaml", "--defense", "trades"), "Did you mean: pgd?"),
        ((*RUN, "--config", "train.yaml"), "train must hold settings, not 3"),
        ((*RUN, "--config", "train.yaml", "--set", "lr=1"), "train must hold settings, not 3"),
        ((*RUN, "--config", "options.yaml", "--set", "trades.beta=1"), "trades: write settings"),
        ((*RUN, "--teacher", "nowhere.pt"), "there is no file nowhere.pt"),
        ((*RUN, "--teacher", "cut.safetensors"), "cut.safetensors: cannot be read"),
        ((*RUN, "--teacher", "my_nets:few"), "the model has 3 outputs"),
        ((*RUN, "--frobnicate"), "No such option '--frobnicate'"),
        ((*RUN, "stray"), "unexpected extra argument"),
        (("runn",), "No such command 'runn'"),
        (("eval",), "Missing argument"),
        (("eval", "nowhere.pt"), "there is no file nowhere.pt"),
        (("eval", "nowhere"), "'nowhere' is none of a file, package.module:factory, robustbench"),
        (("eval", "cut.safetensors"), "cut.safetensors: cannot be read, it is truncated"),
        (("eval", "garbage.safetensors"), "garbage.safetensors: cannot be read"),
        (("eval", "garbage.pt", "--model", "smallcnn"), "holds more than tensors, or is damaged"),
        (("eval", "plain.pt"), "does not say which network it holds: add --model NAME"),
        (("eval", "plain.pt", "--model", "small-resnet"), "plain.pt does not fit Sequential: "),
        (("eval", "seven.pt", "--model", "smallcnn"), "is (7,), not (10,)"),
        ((*EVAL, "--model", "small-resnet"), "net.safetensors does not fit Sequential: "),
        ((*EVAL, "--attack", "pgdd"), "Did you mean: pgd?"),
        ((*EVAL, "nowhere.pt"), "there is no file nowhere.pt"),
        (("eval", "my_nets:missing"), "has no 'missing'"),
        (("eval", "my_nets:few"), "the model has 3 outputs, but there are labels up to 9"),
        (("eval", "my_nets:nan"), "the model returns NaN or infinite logits"),
        (("eval", "robustbench:Standard"), "has no models for digits under Linf"),
        (("report", "nowhere"), "nowhere: no results.jsonl there"),
        (("list", "everything"), "'everything' is not one of"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")  # on importing robustbench
def test_a_mistake_is_one_line_and_leaves_nothing_behind(files, robench, arguments, message):
    before = snapshot(files)
    done = robench(*arguments)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("robench: ")
    assert done.err.count("\n") == 1 and done.err.endswith("\n")
    assert done.out == ""
    assert snapshot(files) == before


# The entry point itself


def test_the_module_is_the_entry_point(python, tmp_path):
    done = python("-m", "robench", "run", "--defense", "trads", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("robench: unknown defense 'trads'. Did you mean: trades?")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("eval", "-h"), ("-h",),
                                       ("report", "--help"), ("--version",), ("runn",),
                                       ("run", "--frobnicate")])
def test_help_and_wrong_options_do_not_import_torch(python, arguments):
    done = python("-c", "import sys\n"
                  "from robench.benchmark.cli import main\n"
                  f"sys.argv = ['robench', *{arguments!r}]\n"
                  "try:\n"
                  "    main()\n"
                  "finally:\n"
                  "    heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'pydantic', 'yaml'}\n"
                  "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n")
    assert "AssertionError" not in done.stderr
    assert done.returncode == (2 if arguments[-1] in ("runn", "--frobnicate") else 0)


def test_help_names_every_command_and_the_exit_codes(robench):
    done = robench("--help")
    assert (done.code, done.err) == (0, "")
    for command in ("run", "eval", "report", "list", "doctor", "Exit codes"):
        assert command in done.out
    assert "robench run --defense peeraid --baseline trades" in robench("run", "--help").out


def test_without_a_command_the_help_is_shown(robench):
    done = robench()
    assert (done.code, done.out) == (2, "")
    assert "Commands:" in done.err


def test_every_command_has_a_help_text():
    for name in cli.commands:
        shown = CliRunner().invoke(cli, [name, "--help"])
        assert shown.exit_code == 0 and "Usage:" in shown.output


def test_an_interrupt_says_how_to_go_on(here, robench, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("robench.benchmark.matrix.train", interrupted)
    done = robench(*RUN, *SMALL, "--quiet")
    assert done.code == 130
    assert done.err.strip() == "robench: interrupted; run the same command again to go on"


# list


@pytest.mark.parametrize(
    ("kind", "names"),
    [("attacks", [*ATTACKS.names(), *(f"{n}:NAME" for n in ADAPTERS.names())]),
     ("defenses", DEFENSES.names()), ("datasets", DATASETS.names()), ("models", MODELS.names()),
     ("recipes", list(recipe_names()))],
)
def test_list_shows_every_registered_thing(robench, kind, names):
    done = robench("list", kind)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) > 2 for line in lines)  # a description, too
    everything = robench("list").out
    assert done.out in everything
    assert f"{kind}:\n" in everything


# run


def test_run_prints_the_leaderboard_and_says_where_the_reports_are(here, robench):
    done = robench(*RUN, "--attack", "fgsm", "--attack", "pgd,steps=3", *SMALL, "--out", "there",
                   "--set", "trades.beta=3", "--seeds", "1")
    assert done.code == 0
    assert "trades" in done.out and "pgd,steps=3" in done.out
    assert "reports: there/leaderboard.html" in done.err
    assert (here / "there" / "leaderboard.html").is_file()
    records = load([here / "there"]).records
    assert {r.defense_config["beta"] for r in records} == {3.0}
    assert {r.seed for r in records} == {1}
    assert {r.attack for r in records} == {"fgsm", "pgd,steps=3", "pgd-20"}

    again = robench(*RUN, "--attack", "fgsm", "--attack", "pgd,steps=3", *SMALL, "--out", "there",
                    "--set", "trades.beta=3", "--seeds", "1")
    assert again.out == done.out
    assert "nothing to do" in again.err


def test_options_override_the_configuration_file(here, robench, no_figures):
    (here / "config.yaml").write_text(
        "defenses: standard\nattacks: fgsm\nepochs: 1\nlimit: 5\ntrain_limit: 64\nout: there\n"
        "train: {validation: 20, lr: 1e-3, select: last}\nseeds: [3]\njobs: 1\n"
    )
    assert robench("run", "--config", "config.yaml", "--limit", 6, "--set", "lr=0.5",
                   "--quiet").code == 0
    records = load([here / "there"]).records
    assert {(r.defense, r.n, r.seed) for r in records} == {("standard", 6, 3)}
    assert {r.defense_config["train"]["lr"] for r in records} == {0.5}
    assert {r.defense_config["train"]["validation"] for r in records} == {20}
    assert {r.defense_config["train_limit"] for r in records} == {64}  # a row of its own


def test_a_training_that_fails_is_one_line_and_exit_code_1(here, robench, no_figures):
    done = robench("run", "--defense", "pgd-at", "--baseline", "standard", "--attack", "fgsm",
                   *SMALL, "--set", "lr=1e30", "--quiet")
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "pgd-at seed 0: the loss is not finite in epoch 0, step 1" in done.err
    assert "Try a smaller learning rate (--set lr=...)" in done.err


def test_quiet_is_quiet(here, robench, no_figures):
    done = robench("run", "--defense", "standard", "--attack", "fgsm", *SMALL, "--quiet")
    assert done.err == "reports: runs/leaderboard.html\n"


# eval


def test_eval_of_checkpoints_and_factories(files, robench, no_figures):
    done = robench("eval", "net.safetensors", "my_nets:logits", "--attack", "fgsm", "--attack",
                   "pgd-3", "--limit", 30, "--quiet", "--device", "cpu")
    assert (done.code, done.err) == (0, "reports: runs/eval/leaderboard.html\n")
    records = load([files / "runs" / "eval"]).records
    assert [(r.source, r.attack) for r in records] == [
        ("net.safetensors", "fgsm"), ("net.safetensors", "pgd-3"),
        ("my_nets:logits", "fgsm"), ("my_nets:logits", "pgd-3")]
    ours, foreign = records[0], records[2]
    assert (ours.model, ours.defense, ours.checkpoint, ours.epoch) == (
        "smallcnn", "trades", "best", 3)
    assert (foreign.model, foreign.defense, foreign.epoch) == (
        "my_nets:logits", "my_nets:logits", -1)
    for r in records:
        assert (r.n, r.threat, r.dataset, r.status) == (30, "Linf:0.2", "digits", "ok")


def test_eval_agrees_with_the_function(files, robench, no_figures, make_network):
    from robench import evaluate
    from robench.benchmark.data import load_dataset

    robench("eval", "net.safetensors", "--attack", "pgd-3", "--limit", 50, "--seed", 4, "--quiet")
    (record,) = load([files / "runs" / "eval"]).records
    test = load_dataset("digits").test.take(50)
    scores = evaluate(make_network(), test.x, test.y, threat="Linf:0.2", attacks=["pgd-3"], seed=4)
    assert (record.n_correct, record.n_robust) == (
        round(50 * scores.clean), round(50 * scores.robust["pgd-3"]))


def test_eval_of_a_plain_state_dict(files, robench, no_figures):
    for out, name in (("one", "net.safetensors"), ("two", "plain.pt")):
        done = robench("eval", name, "--model", "smallcnn", "--attack", "fgsm", "--limit", 10,
                       "--out", out, "--quiet")
        assert done.code == 0
    one, two = (load([files / out]).records[0] for out in ("one", "two"))
    assert one.weights_sha256 == two.weights_sha256
    assert (one.n_correct, one.n_robust) == (two.n_correct, two.n_robust)


def test_of_a_file_whose_weights_changed_only_the_present_ones_are_reported(
    files, robench, no_figures, make_network, make_header
):
    """There and back again: what was measured first is taken, and nothing else is left."""
    from robench.benchmark.checkpoints import save_checkpoint

    path, out = files / "changing.safetensors", files / "there"
    weights = []
    for seed in (5, 6, 5):
        save_checkpoint(path, make_network(seed), make_header())
        done = robench("eval", path, "--attack", "fgsm", "--limit", 10, "--out", out, "--quiet")
        assert done.code in (0, 4)
        (record,) = load([out]).records
        weights.append(record.weights_sha256)
    assert weights[0] == weights[2] != weights[1]


def test_eval_again_measures_nothing(files, robench, no_figures):
    arguments = ("eval", "my_nets:soft", "--attack", "fgsm", "--limit", 10)
    robench(*arguments)
    before = snapshot(files)
    robench(*arguments)
    assert snapshot(files) == before


def test_eval_warns_of_probabilities_on_stderr_and_in_the_record(files, robench, no_figures):
    done = robench("eval", "my_nets:soft", "--attack", "fgsm", "--attack", "cw", "--limit", 10,
                   "--quiet")
    assert done.code == 0
    warning = "probabilities: the outputs look like softmax probabilities, not logits"
    assert done.err.startswith(f"warning: my_nets:soft: {warning}")
    assert done.err.count("warning") == 1
    for record in load([files / "runs" / "eval"]).records:
        assert record.warnings[0].startswith(warning)


def test_eval_of_a_network_for_other_data(files, robench, make_network, make_header):
    from robench.benchmark.checkpoints import save_checkpoint

    save_checkpoint(files / "rgb.safetensors", make_network(channels=3, dataset="cifar10"),
                    make_header(channels=3, dataset="cifar10"))
    done = robench("eval", "rgb.safetensors")
    assert done.code == 2
    assert "was trained on cifar10 (10 classes, 3 channels) and does not fit" in done.err


# report


@pytest.fixture
def two_runs(files, robench, no_figures):
    for out, network in (("one", "net.safetensors"), ("two", "my_nets:logits")):
        robench("eval", network, "--attack", "fgsm", "--limit", 10, "--out", out, "--quiet")
    return files


def test_report_merges_runs(two_runs, robench):
    done = robench("report", "one", "two/results.jsonl", "--out", "merged")
    assert done.code == 0
    assert "my_nets:logits" in done.out and "trades" in done.out
    assert done.err.splitlines()[-1] == "wrote the reports to merged/"
    merged = load([two_runs / "merged"]).records
    assert [r.source for r in merged] == ["net.safetensors", "my_nets:logits"]
    assert (two_runs / "merged" / "leaderboard.csv").is_file()
    for record in merged:  # the flags lie where they were
        assert "merged" not in record.flags


def test_report_writes_into_the_first_run(two_runs, robench):
    shutil.rmtree(two_runs / "two" / "eval")
    done = robench("report", "two")
    assert done.err.splitlines()[-1] == "wrote the reports to two/"
    assert (two_runs / "two" / "leaderboard.html").is_file()


def test_report_names_the_damaged_line(two_runs, robench):
    with (two_runs / "one" / "results.jsonl").open("a") as file:
        file.write(json.dumps({"schema_version": 1}) + "\n")
    done = robench("report", "one")
    assert done.code == 2
    assert done.err.startswith("robench: one/results.jsonl:2: not a Record")
    assert done.err.count("\n") == 1


# doctor


@pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")  # on importing robustbench
def test_doctor(files, robench):
    done = robench("doctor", "--data-root", files)
    assert done.code == 0, done.err
    assert all(line.startswith("ok   ") for line in done.out.splitlines())
    for word in ("package torch: ", "threads: ", "CUDA devices: ", "data root: "):
        assert word in done.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")
def test_doctor_names_what_is_wrong_and_its_cure(here, robench):
    done = robench("doctor", "--data-root", "nowhere")
    assert done.code == 1
    assert "BAD  data root: " in done.out
    assert done.err == ("robench: 1 problems. data root: put torchvision's data folders into "
                        "nowhere\n")
