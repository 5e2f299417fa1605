"""Kept examples: verified again, replayed on a later model, refused when they are of others."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

from robench.benchmark.cli import cli
from robench.benchmark.data import load_dataset
from robench.benchmark.examples import Examples
from robench.benchmark.models import build_model
from robench.errors import UsageError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two networks for the digits, the second a little further trained than the first."""
    data, folder = load_dataset("digits").train, tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model("smallcnn", classes=10, channels=1, size=8)
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        for name, steps in (("first", 40), ("second", 10)):
            for _ in range(steps):
                rows = torch.randint(len(data), (64,))
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
                optimizer.step()
            torch.save(net.state_dict(), folder / f"{name}.pt")
    return folder


def robench(*arguments):
    return cli.main([str(a) for a in arguments], prog_name="robench", standalone_mode=False)


COMMON = ("--model", "smallcnn", "--limit", "30", "--device", "cpu")
ATTACK = ("--threat", "Linf:0.1", "--attack", "pgd-10", "--quiet")


def record(out):
    (line,) = (out / "results.jsonl").read_text().splitlines()
    return json.loads(line)


@pytest.fixture(scope="module")
def kept(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("kept")
    robench("eval", weights / "first.pt", *COMMON, *ATTACK, "--keep-examples", "--out", out)
    return out, out / record(out)["flags"].replace(".npz", ".safetensors")


def test_examples_are_kept_and_verified_again(weights, kept, capsys):
    out, file = kept
    fell = record(out)["n_correct"] - record(out)["n_robust"]
    assert fell > 5
    robench("verify", weights / "first.pt", "--examples", file, *COMMON)
    assert f"{fell} of {fell} examples fool it, 0 are outside Linf:0.1" in capsys.readouterr().out
    robench("verify", weights / "second.pt", "--examples", file, *COMMON)
    assert f"of {fell} examples fool it" in capsys.readouterr().out


def test_examples_of_another_threat_model_are_refused(weights, kept, tmp_path, capsys):
    """Whether an option names it or a file; the file of examples says what is true."""
    verify = ("verify", weights / "first.pt", "--examples", kept[1], *COMMON)
    with pytest.raises(UsageError, match="holds examples at Linf:0.1, not at L2:0.5: leave"):
        robench(*verify, "--threat", "L2:0.5")
    config = tmp_path / "eval.yaml"
    config.write_text("threat: [L2:0.5, linf:1/10]\n")
    for same in (("--threat", "Linf:1e-1"), ("--config", config)):
        robench(*verify, *same)
        assert "0 are outside Linf:0.1" in capsys.readouterr().out


def test_they_are_replayed_before_the_attack_and_tables_say_so(weights, kept, tmp_path):
    out, file = kept
    robench("eval", weights / "first.pt", *COMMON, *ATTACK, "--replay", file, "--out", tmp_path)
    replayed = record(tmp_path)
    assert replayed["attack"] == "pgd-10,replay"
    assert replayed["breakers"] == {"pgd": 0, "replay": record(out)["breakers"]["pgd"]}
    assert replayed["n_robust"] == record(out)["n_robust"]
    assert replayed["backwards"] < record(out)["backwards"]


def test_a_finished_measurement_is_made_again_if_its_examples_are_missing(weights, kept):
    out, file = kept
    before = Examples.load(file)
    file.unlink()
    robench("eval", weights / "first.pt", *COMMON, *ATTACK, "--keep-examples", "--out", out)
    again = Examples.load(file)
    assert torch.equal(again.x_adv, before.x_adv) and torch.equal(again.image, before.image)


def test_examples_of_other_images_and_other_files_are_refused(weights, kept, tmp_path):
    _, file = kept
    with pytest.raises(UsageError, match="of other images"):
        robench("verify", weights / "first.pt", "--examples", file, *COMMON[:-4], "--limit", "29")
    with pytest.raises(UsageError, match="holds no adversarial examples"):
        Examples.load(tmp_path / "missing.safetensors")
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"garbage", safetensors.torch.save({"w": torch.zeros(2)})):
        bad.write_bytes(content)
        with pytest.raises(UsageError, match="holds no adversarial examples"):
            Examples.load(bad)
    bad.write_bytes(safetensors.torch.save(
        {"image": torch.arange(3), "x_adv": torch.zeros(2, 1, 8, 8)},
        {"threat": "Linf:0.1", "data_sha256": ""}))
    with pytest.raises(UsageError, match="wrong shapes"):
        Examples.load(bad)


def test_other_libraries_keep_no_examples(weights, tmp_path):
    pytest.importorskip("torchattacks")
    with pytest.raises(UsageError, match="is no attack of robench: it keeps no examples"):
        robench("eval", weights / "first.pt", *COMMON, "--attack", "torchattacks:PGD", "--quiet",
                "--keep-examples", "--out", tmp_path)
