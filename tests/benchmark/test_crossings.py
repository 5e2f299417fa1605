"""robench transfer: counts, files, what is taken from earlier runs."""

import json

import pytest
import torch
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark import crossings as module
from robench.benchmark.checkpoints import save_checkpoint
from robench.benchmark.data import Images
from robench.benchmark.transfer import rob_f, transferred
from robench.reports import load

FEW = ("--limit", 20, "--device", "cpu", "--quiet")


@pytest.fixture
def files(tmp_path, make_network, make_header, monkeypatch):
    """Checkpoints of three random networks of seed 0 and one of seed 1."""
    monkeypatch.chdir(tmp_path)
    names = []
    for number, (defense, seed) in enumerate([("a", 0), ("b", 0), ("c", 0), ("a", 1)]):
        names.append(f"{defense}{seed}.safetensors")
        save_checkpoint(tmp_path / names[-1], make_network(number),
                        make_header(defense=defense, seed=seed))
    return names


@pytest.fixture
def no_figures(monkeypatch):
    from robench.benchmark import surveys
    from robench.reports.store import save

    monkeypatch.setattr(surveys, "render", lambda results, out: save(out, results))


def nets(count=3):
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Flatten(), nn.Linear(9, 3)).eval() for _ in range(count)]
    for net in made:
        net[1].weight.data *= 3
    return {f"n{i}": net for i, net in enumerate(made)}


@pytest.mark.parametrize("batch_size", [40, 7])
def test_counts_are_those_of_rob_f_and_of_the_same_images(batch_size):
    threat, three = ThreatModel("Linf", 0.05), nets()
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    y = three["n0"](x).argmax(1)
    y[::4] = (y[::4] + 1) % 3  # of which n0 gets 30 right
    data = Images(x, y)
    named = {"student": three["n0"], **three}
    expected = rob_f(named, data, threat, batch_size=batch_size)
    found = transferred(three["n0"], three, data, threat, batch_size=batch_size)
    for name, counts in found.items():
        assert counts.clean == expected[name].clean
        assert counts.right == expected[name].student_crafted
        assert 0 <= counts.clean + counts.right - counts.kept <= 40
        assert counts.kept <= min(counts.clean, counts.right)
    assert found["n0"].kept < found["n0"].clean == 30  # a telling example
    nothing = transferred(three["n0"], three, data, ThreatModel("Linf", 0))
    assert all(c.clean == c.right == c.kept for c in nothing.values())


def test_networks_meet_those_of_their_seed(robench, files, tmp_path, no_figures):
    done = robench("transfer", *files, *FEW)
    assert done.code == 0, done.err
    found = load([tmp_path / "runs/transfer"]).crossings
    assert [(one.defense, one.seed, len(one.shown)) for one in found] == [
        ("a", 0, 3), ("b", 0, 3), ("c", 0, 3), ("a", 1, 1)]
    assert all({shown.seed for shown in one.shown} == {one.seed} for one in found)
    assert {(one.attack, one.n, one.attack_seed) for one in found} == {("pgd-10", 20, 0)}
    assert len({one.data_sha256 for one in found}) == 1
    assert "| Crafted against |" in done.out and "runs/transfer/transfer.csv" in done.err


def test_what_is_finished_is_taken_and_what_was_interrupted_goes_on(
    robench, files, tmp_path, monkeypatch, no_figures
):
    whole = robench("transfer", *files[:3], *FEW, "--out", "whole")
    calls, original = [], module.transferred

    def interrupted(*arguments, **options):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(module, "transferred", interrupted)
    assert robench("transfer", *files[:3], *FEW, "--out", "parts").code == 130
    assert not (tmp_path / "parts/crossing.jsonl").exists()
    assert robench("transfer", *files[:3], *FEW, "--out", "parts").out == whole.out
    assert len(calls) == 4  # the first network only once
    assert robench("transfer", *files[:3], *FEW, "--out", "parts").out == whole.out
    assert len(calls) == 4
    kept = sorted((tmp_path / "parts/transfer").iterdir())
    kept[0].write_text("{")
    assert robench("transfer", *files[:3], *FEW, "--out", "parts").out == whole.out
    assert len(calls) == 5 and json.loads(kept[0].read_text())["n"] == 20
    assert len(load([tmp_path / "parts"]).crossings) == 3
    assert robench("transfer", *files[:2], *FEW, "--out", "parts").code == 0  # shown to fewer
    found = load([tmp_path / "parts"]).crossings
    assert len(found) == 3 and sorted(len(one.shown) for one in found) == [2, 2, 3]


def test_a_run_with_its_peers_and_the_numbers_of_rob_f(robench, job, tmp_path, monkeypatch):
    from robench.benchmark import matrix
    from robench.reports.store import save

    monkeypatch.setattr(matrix, "render", lambda results, out: save(out, results))
    results = matrix.run(job(defenses=("peeraid",), baselines=("trades",), epochs=1,
                             attacks=("fgsm",), out=tmp_path / "run"))
    done = robench("transfer", tmp_path / "run", *FEW)
    assert done.code == 0, done.err
    after = load([tmp_path / "run"])
    assert after.records == results.records and after.transfers == results.transfers
    found = {(one.defense, one.checkpoint): one for one in after.crossings}
    assert set(found) == {("peeraid", "best"), ("peeraid", "peer"), ("trades", "best")}
    of_student = {(s.defense, s.checkpoint): s for s in found["peeraid", "best"].shown}
    for transfer in results.transfers:
        name = ("peeraid", "peer" if transfer.network == "peer" else "best")
        assert of_student[name].right == transfer.student_crafted
        own = next(s for s in found[name].shown if s.checkpoint == name[1] and s.defense == name[0])
        assert (own.right, own.clean) == (transfer.self_crafted, transfer.clean)
    assert "| peeraid (checkpoint=peer)" in done.out
    names = {path.name for path in (tmp_path / "run/figures").iterdir()}
    assert {"transfer-digits-test-linf-0-2-pgd-10.png",
            "transfer-digits-test-linf-0-2-pgd-10.svg"} <= names
    assert (tmp_path / "run/transfer.csv").exists()
    assert 'id="transfer"' in (tmp_path / "run/leaderboard.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("sources", "message"), [
    (("a0.safetensors",), "name two networks or more that were trained with one seed"),
    (("a0.safetensors", "a0.safetensors"), "name two networks or more"),
    (("b0.safetensors", "a1.safetensors"), "name two networks or more"),
    ((".",), "no run with trained networks"),
    (("a0.safetensors", "no.safetensors"), "there is no file no.safetensors"),
])
def test_mistakes_are_one_line(robench, files, tmp_path, sources, message):
    done = robench("transfer", *sources, *FEW, "--out", "new")
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "new").exists()
