"""robench parity: what is counted, how the reference is run, and what the command leaves."""

import csv
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robench.attacks import ThreatModel, make_attack
from robench.benchmark import parity
from robench.benchmark.parity import CLEAN, STANDARD, STANDS, TOLERANCE, Row, Run, stages
from robench.benchmark.references import csv_text, fooled, reference

# A linear network that is right on most digits and that any attack fools at Linf:0.4.
NETS = """
import torch
from torch import nn
from robench.benchmark.data import load_dataset

def means(classes, size):
    train = load_dataset("digits").train
    centers = torch.stack([train.x[train.y == k].flatten(1).mean(0) for k in range(classes)])
    net = nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))
    net[1].weight.data, net[1].bias.data = 2 * centers, -centers.square().sum(1)
    return net
"""
THREAT = ThreatModel("Linf", 0.4)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "my_means.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_means", None)


@pytest.fixture
def pyautoattack():
    return pytest.importorskip("pyautoattack")


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def run(*breaker, parts=STANDARD):
    return Run(np.array(breaker, dtype="<U32"), parts)


# Counting


def test_stages_by_hand():
    ours = run(CLEAN, "apgd-ce", "apgd-t", "square", STANDS, STANDS)
    theirs = run(CLEAN, "apgd-ce", "apgd-ce", STANDS, "fab-t", STANDS)
    again = run(CLEAN, "apgd-t", "apgd-ce", "square", STANDS, STANDS)
    counted = {r.after: (r.ours, r.theirs, r.again, r.only_ours, r.only_theirs, r.noise)
               for r in stages(ours, theirs, again)}
    assert counted == {
        "clean": (5, 5, 5, 0, 0, 0),
        "apgd-ce": (4, 3, 4, 1, 0, 1),
        "apgd-t": (3, 3, 3, 0, 0, 0),
        "fab-t": (3, 2, 3, 1, 0, 1),
        "square": (2, 2, 2, 1, 1, 2),
    }


RUNS = st.lists(st.tuples(*[st.sampled_from([CLEAN, STANDS, *STANDARD])] * 3), min_size=1)


@given(RUNS)
def test_counts_fit_together(images):
    ours, theirs, again = (run(*column) for column in zip(*images, strict=True))
    rows = stages(ours, theirs, again)
    for before, after in zip(rows, rows[1:], strict=False):
        assert after.ours <= before.ours and after.theirs <= before.theirs
    for row in rows:
        assert row.ours - row.theirs == row.only_ours - row.only_theirs
    last = rows[-1]
    assert last.ours == (ours.breaker == STANDS).sum()
    assert all(row.verdict == "within" and row.only_ours == row.only_theirs == 0
               for row in stages(theirs, theirs, again))


@pytest.mark.parametrize(("only_ours", "only_theirs", "noise", "verdict"), [
    (TOLERANCE, 0, 0, "within"), (TOLERANCE, 1, 0, "outside"), (3, TOLERANCE, 3, "within"),
    (3, TOLERANCE, 2, "outside"), (9, 9, None, ""),
])
def test_verdict(only_ours, only_theirs, noise, verdict):
    row = Row("autoattack", "pyautoattack", "square", 20, 20, 20, only_ours, only_theirs, noise)
    assert row.verdict == verdict


def test_a_part_that_only_one_side_has_is_a_row():
    ours = run("apgd-t-cw", STANDS, parts=("apgd-ce", "apgd-t-cw", "fab-t", "square"))
    theirs = run("fab-t", STANDS, parts=("apgd-ce", "fab-t", "square"))
    rows = stages(ours, theirs, theirs)
    assert [r.after for r in rows] == ["clean", "apgd-ce", "apgd-t-cw", "fab-t", "square"]
    assert [r.only_theirs for r in rows] == [0, 0, 1, 0, 0]


def test_csv_of_rows():
    assert csv_text([]) == ""
    assert csv_text([{"a": 1, "b": "x,y"}, {"a": None, "b": ""}]) == 'a,b\n1,"x,y"\n,\n'


# The reference


@pytest.fixture
def case(here, pyautoattack):
    from robench.benchmark.data import load_dataset
    from robench.benchmark.sources import load_network

    data = load_dataset("digits")
    net = load_network("my_means:means", data, THREAT).net
    x, y = data.test.x[:7], data.test.y[:7]
    return net, x, y


def test_reference_is_the_adapter_but_for_the_batches(case):
    net, x, y = case
    once = reference(net, x, y, THREAT, seed=3)
    assert torch.equal(once, make_attack("pyautoattack:standard", THREAT, seed=3)(net, x, y))
    assert not fooled(net, x, x, y, THREAT).all()
    assert fooled(net, x, once, y, THREAT).all()
    batches = reference(net, x, y, THREAT, seed=3, batch_size=3)
    assert fooled(net, x, batches, y, THREAT).all()


def test_reference_packs_what_survives_into_new_batches(case, monkeypatch):
    net, x, y = case
    sizes = []
    weak = ThreatModel("Linf", 1e-4)  # which breaks nothing

    def perturb(self, x, y):
        sizes.append(len(x))
        return x.flip(3) if len(sizes) == 1 else x  # the first batch falls

    module = sys.modules["pyautoattack"].AutoAttack.__init__.__globals__
    for name in ("APGDAttack", "APGDAttack_targeted", "FABAttack_PT", "SquareAttack"):
        monkeypatch.setattr(module[name], "perturb", perturb)
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    flipped = int((net(x.flip(3)).argmax(1) != y)[:4].sum())
    assert len(x) > 4 and flipped == 4
    reference(net, x, y, weak, seed=0, batch_size=4)
    survivors = len(x) - flipped
    assert sizes == [4, survivors, *[survivors] * 3]


# The command


@pytest.mark.filterwarnings("ignore::DeprecationWarning:foolbox")
def test_parity_writes_tables(here, pyautoattack, robench):
    pytest.importorskip("torchattacks")
    done = robench("parity", "my_means:means", "--limit", 6, "--quiet", "--device", "cpu",
                   "--threat", "Linf:0.4", "--out", "there", "--seed", 5)
    assert done.code == 0
    assert done.err == "wrote there/parity.md and .csv\n"
    assert done.out == (here / "there" / "parity.md").read_text()
    rows = read(here / "there" / "parity.csv")
    after = [(r["after"], r["ours"], r["theirs"], r["verdict"])
             for r in rows if r["library"] == "pyautoattack"]
    clean = after[0][1]
    assert int(clean) > 3
    assert after == [("clean", clean, clean, "within"),
                     *[(part, "0", "0", "within") for part in STANDARD]]
    others = {(r["attack"], r["library"]): r for r in rows if r["library"] != "pyautoattack"}
    assert {("autoattack", "torchattacks:AutoAttack"), ("pgd-20", "torchattacks:PGD"),
            ("pgd-40", "torchattacks:PGD")} <= set(others)
    assert "not the reference's settings" in others["autoattack", "torchattacks:AutoAttack"]["note"]
    assert "seed 5" in done.out and "seed 6" in done.out
    assert (here / "there" / "parity-images.csv").read_text() == ""
    assert "foolbox" in done.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning:foolbox")
def test_images_on_which_the_two_disagree(here, pyautoattack, robench, monkeypatch):
    """A reference that finds nothing."""
    monkeypatch.setattr(parity, "reference", lambda model, x, *args, **options: x)
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    done = robench("parity", "my_means:means", "--limit", 6, "--quiet", "--device", "cpu",
                   "--threat", "Linf:0.4")
    rows = [r for r in read(here / "runs" / "parity" / "parity.csv")
            if r["library"] == "pyautoattack"]
    clean = int(rows[0]["ours"])
    assert [(r["after"], int(r["only_theirs"]), r["verdict"]) for r in rows[1:]] == [
        (part, clean, "outside") for part in STANDARD]
    images = read(here / "runs" / "parity" / "parity-images.csv")
    assert len(images) == clean
    assert {(i["ours"], i["theirs"], i["again"]) for i in images} == {("apgd-ce", "", "")}
    assert all(float(i["margin"]) > 0 for i in images)
    assert done.out.count("skipped: torchattacks cannot be imported") == 1
    assert "disagree" in done.out


@pytest.mark.parametrize(("arguments", "message"), [
    ((), "Missing argument"),
    (("nowhere.pt",), "there is no file nowhere.pt"),
    (("my_means:means", "--limit", 0), "limit: "),
    (("my_means:means", "--threat", "Linf:8"), "write Linf:8/255"),
    (("my_means:means", "--precision", "half"), "precision: Input should be"),
])
def test_a_mistake_is_one_line(here, pyautoattack, robench, arguments, message):
    done = robench("parity", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert not (here / "runs").exists()


def test_without_the_reference(here, robench, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    done = robench("parity", "my_means:means")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert 'pip install "robench[attacks]"' in done.err
