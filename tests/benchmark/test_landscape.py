"""Landscapes: directions and losses against their definitions, networks left as they were."""

import json

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn

from robench.attacks.threat import ThreatModel
from robench.benchmark import landscape as module
from robench.benchmark.data import Images
from robench.benchmark.landscape import Survey, displaced, filter_normalized, survey_lines
from robench.errors import UsageError
from robench.reports import load
from robench.reports.landscape import sharpness_by_direction

THREAT = ThreatModel("Linf", 0.1)
SMALL = ("--points", 5, "--directions", 3, "--steps", 2, "--limit", 20, "--device", "cpu")


@pytest.fixture
def data():
    """24 images so far from black and white that no example meets them, labels 0 and 1."""
    x = 0.3 + 0.4 * torch.rand(24, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    return Images(x, torch.arange(24) % 2)


@pytest.fixture
def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 2)).eval()


@pytest.fixture
def normalized():
    """Convolution and batch-norm with statistics of its own, a linear layer."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(4, 3))
    for _ in range(50):
        net(torch.rand(64, 1, 3, 3))
    return net.eval()


def bits(net):
    return {name: value.detach().clone().view(-1).view(torch.uint8)
            for name, value in net.state_dict().items()}


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def lines(net, data, survey, threat=THREAT, **options):
    return list(survey_lines(survey, net, data, threat, **options))


# Directions


@given(
    widths=st.lists(st.integers(1, 4), min_size=2, max_size=4), kernel=st.integers(1, 3),
    seed=st.integers(0, 99), number=st.integers(0, 9), scale=st.floats(0.01, 100),
)
def test_each_filter_is_as_long_as_the_networks_own(widths, kernel, seed, number, scale):
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, kernel), nn.BatchNorm2d(after)]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], 3))
    other = nn.Sequential(*layers, nn.Linear(widths[-1], 3))  # shares all but the last layer
    with torch.no_grad():
        net[0].weight *= scale
        net[-1].weight[1] = 0
    direction = filter_normalized(net, seed, number)
    assert direction.keys() == {n for n, p in net.named_parameters() if p.ndim > 1}
    for name, step in direction.items():
        weight = net.get_parameter(name).detach()
        assert step.shape == weight.shape and step.dtype == weight.dtype
        for mine, own in zip(step, weight, strict=True):  # index by index of the first dimension
            assert float(mine.norm()) == pytest.approx(float(own.norm()), rel=1e-4)
    last = [name for name in direction if name.startswith(str(len(net) - 1))][0]
    assert not direction[last][1].any()
    # The Gaussians are those of all networks of the architecture.
    theirs = filter_normalized(other, seed, number)
    for name in direction.keys() - {last}:
        assert torch.equal(direction[name], theirs[name])
    assert F.cosine_similarity(direction[last][0], theirs[last][0], dim=0) > 0.9999
    again = filter_normalized(net, seed, number)
    assert all(torch.equal(again[name], step) for name, step in direction.items())


def test_directions_are_gaussian_and_differ():
    net = nn.Linear(3000, 4)
    with torch.no_grad():
        net.weight.fill_(1.0)  # filters of length sqrt(3000): the noise keeps its scale
    made = [filter_normalized(net, seed, k)["weight"] for seed, k in ((0, 0), (0, 1), (1, 0))]
    for one in made:
        assert abs(one.mean()) < 0.05 and abs(one.std() - 1) < 0.02
        assert abs((one**4).mean() - 3) < 0.3 and abs((one > 1).float().mean() - 0.1587) < 0.02
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(F.cosine_similarity(made[one].flatten(), made[other].flatten(), dim=0)) < 0.05


@pytest.mark.gpu
def test_directions_are_the_same_on_a_gpu(normalized):
    here = filter_normalized(normalized, 0, 0)
    there = filter_normalized(normalized.to("cuda"), 0, 0)
    assert all(torch.equal(here[name], step.cpu()) for name, step in there.items())


# Losses


@pytest.mark.parametrize("kind", ["weight", "weight-2d"])
def test_the_loss_of_a_linear_network_in_closed_form(linear, data, kind):
    """Its worst examples are known: -eps sign(w_y - w_other). They move with the weights."""
    survey = Survey.create(kind, 5, 2 if kind == "weight" else None, 9)
    measured = lines(linear, data, survey, seed=3)
    steps = [filter_normalized(linear, 3, k)["1.weight"] for k in (0, 1)]
    weight, bias = linear[1].weight.detach(), linear[1].bias.detach()
    sign = 1.0 - 2.0 * data.y
    for i, line in enumerate(measured):
        for alpha, loss in zip(survey.alphas, line, strict=True):
            moved = (weight + alpha * steps[i] if kind == "weight"
                     else weight + alpha * steps[0] + survey.alphas[i] * steps[1])
            w, b = moved[0] - moved[1], bias[0] - bias[1]
            margin = sign * (data.x.flatten(1) @ w + b) - THREAT.eps * w.abs().sum()
            assert loss == pytest.approx(float(F.softplus(-margin).mean()), rel=1e-5)


def test_the_loss_over_images_in_closed_form(linear, data):
    survey = Survey.create("input", 5)
    measured = lines(linear, data, survey)
    w, b = (p[0] - p[1] for p in (linear[1].weight.detach(), linear[1].bias.detach()))
    margin = (1.0 - 2.0 * data.y) * (data.x.flatten(1) @ w + b)
    for alpha, loss in zip(survey.alphas, measured[2], strict=True):
        rise = alpha * THREAT.eps * w.abs().sum()
        assert loss == pytest.approx(float(F.softplus(rise - margin).mean()), rel=1e-5)
    center = measured[2][2]
    assert all(abs(line[2] - center) < measured[2][4] - center for line in measured)


@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.3", "L1:0.5"])
def test_the_axes_around_images_are_eps_long(linear, data, threat):
    threat = ThreatModel.parse(threat)
    plane = module.InputPlane(linear, data, threat, seed=0, batch_size=7)
    for x, _, *axes in plane._batches:
        for axis in axes:
            assert threat.distance(x + axis, x).tolist() == pytest.approx([threat.eps] * len(x),
                                                                          rel=1e-4)


@pytest.mark.parametrize("kind", ["weight", "weight-2d", "input"])
def test_numbers_depend_on_no_batch_and_no_order(normalized, data, kind):
    survey = Survey.create(kind, 3)
    expected = torch.tensor(lines(normalized, data, survey))
    for size in (1, 7):
        got = torch.tensor(lines(normalized, data, survey, batch_size=size))
        assert torch.allclose(got, expected, rtol=1e-4)
    order = torch.randperm(len(data))
    assert torch.allclose(torch.tensor(lines(normalized, data.select(order), survey)), expected,
                          rtol=1e-4)


def test_the_rest_of_the_lines_are_those_of_the_whole(normalized, data):
    for kind in ("weight", "weight-2d", "input"):
        survey = Survey.create(kind, 5)
        assert lines(normalized, data, survey, first=2) == lines(normalized, data, survey)[2:]


def test_batch_norm_keeps_its_statistics_and_the_scale_of_weights_does_not_count(normalized, data):
    """Filters ten times as long, and statistics to match, are the same function."""
    survey = Survey.create("weight", 5, 2, 3)
    expected = torch.tensor(lines(normalized, data, survey))
    with torch.no_grad():
        normalized[0].weight *= 10
        normalized[1].running_mean *= 10
        normalized[1].running_var.add_(normalized[1].eps).mul_(100).sub_(normalized[1].eps)
    before = bits(normalized)
    assert torch.allclose(torch.tensor(lines(normalized, data, survey)), expected, rtol=1e-3)
    assert same_bits(bits(normalized), before)


def test_a_normalization_inside_the_network_does_not_move(normalized, data):
    from robench.benchmark.models.build import Normalize

    net = nn.Sequential(Normalize([0.5], [0.25]), normalized)
    assert all(name.startswith("1.") for name in filter_normalized(net, 0, 0))


def test_a_flatter_network_has_a_smaller_number(linear, data):
    """Both are right on all images; the logits of one are small, and so is what moves them."""
    class Surveyed:
        def __init__(self, net):
            survey = Survey.create("weight", 11, 4, 9)
            self.alphas, self.losses = survey.alphas, lines(net, data, survey)

    with torch.no_grad():
        linear[1].weight *= 0.2
        flat = sharpness_by_direction(Surveyed(linear))
        linear[1].weight *= 20
        sharp = sharpness_by_direction(Surveyed(linear))
    assert max(flat) < min(sharp)


# The network afterwards


def test_weights_come_back_bit_for_bit(normalized):
    with torch.no_grad():  # what an inverse step would not restore
        normalized[0].weight[0, 0, 0, 0] = float("nan")
        normalized[0].weight[0, 0, 0, 1] = -0.0
        normalized[4].weight[0, 0] = 1e30
    normalized.to(memory_format=torch.channels_last)
    before, direction = bits(normalized), filter_normalized(normalized, 0, 0)
    with displaced(normalized, (0.37, direction), (-2.0, filter_normalized(normalized, 0, 1))):
        assert not torch.equal(normalized[4].weight.view(-1).view(torch.uint8), before["4.weight"])
    assert same_bits(bits(normalized), before)
    with pytest.raises(ZeroDivisionError), displaced(normalized, (1.0, direction)):
        raise ZeroDivisionError
    assert same_bits(bits(normalized), before)


@pytest.mark.parametrize("kind", ["weight", "weight-2d", "input"])
def test_a_survey_leaves_the_network_and_the_generator_alone(normalized, data, kind):
    normalized.train()
    normalized[0].weight.requires_grad_(False)
    before, state = bits(normalized), torch.get_rng_state()
    lines(normalized, data, Survey.create(kind, 3))
    assert same_bits(bits(normalized), before) and torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in normalized.modules())
    assert [p.requires_grad for p in normalized.parameters()] == [False, *[True] * 4]
    assert all(p.grad is None for p in normalized.parameters())


def test_a_network_that_fails_in_between_is_restored(normalized, data):
    calls, before = 0, bits(normalized)

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise RuntimeError("out of luck")

    normalized.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        lines(normalized, data, Survey.create("weight", 5, 2, 5))
    assert calls == 30 and same_bits(bits(normalized), before)


@pytest.mark.parametrize(("arguments", "message"), [
    (("weight", 4), "points must be odd"), (("weight", 1), "points must be odd"),
    (("weight", 5, 0), "directions must be >= 1"), (("weight", 5, 1, 0), "steps must be >= 1"),
    (("input", 5, None, 3), "has no --steps"), (("input", 5, 3), "is for --kind weight"),
    (("weight-2d", 5, 3), "is for --kind weight"),
])
def test_wrong_surveys(arguments, message):
    with pytest.raises(UsageError, match=message):
        Survey.create(*arguments)


@given(st.integers(1, 60))
def test_the_network_itself_is_a_point(half):
    alphas = Survey.create("weight", 2 * half + 1).alphas
    assert alphas[half] == 0.0 and alphas == tuple(-a for a in reversed(alphas))
    assert (alphas[0], alphas[-1]) == (-1, 1) and len(set(alphas)) == 2 * half + 1


# The command


@pytest.fixture
def survey(robench, checkpoint, monkeypatch):
    """robench landscape on a random network for digits, in an empty current directory."""
    monkeypatch.chdir(checkpoint.parent)
    return lambda *options: robench("landscape", checkpoint.name, *SMALL, *options)


@pytest.fixture
def no_figures(monkeypatch):
    from robench.benchmark import external, matrix, studies
    from robench.reports.store import save

    for one in (external, studies, matrix):
        monkeypatch.setattr(one, "render", lambda results, out: save(out, results))


def test_the_command_from_end_to_end(survey, tmp_path):
    done = survey()
    assert done.code == 0, done.err
    assert done.out.startswith("# Sharpness\n") and "| trades " in done.out
    (one,) = load([tmp_path / "runs/landscape"]).landscapes
    assert (one.kind, one.n, one.attack, one.split) == ("weight", 20, "pgd-2", "test")
    assert one.alphas == (-1, -0.5, 0, 0.5, 1) and len(one.losses) == 3
    assert len({line[2] for line in one.losses}) == 1 and len({line[4] for line in one.losses}) == 3
    assert (one.defense, one.checkpoint, one.run) == ("trades", "best", "")
    assert "runs/landscape/landscape.jsonl" in done.err
    names = {p.name for p in (tmp_path / "runs/landscape/figures").iterdir()}
    assert names == {f"weight-landscape-digits-test-linf-0-2-pgd-2-smallcnn.{end}"
                     for end in ("png", "svg")}


def test_planes_and_training_images(robench, checkpoint, monkeypatch, tmp_path, no_figures):
    monkeypatch.chdir(tmp_path)
    few = ("--points", 3, "--limit", 10, "--device", "cpu", "--quiet")
    for extra in (("--kind", "weight-2d"), ("--kind", "input"),
                  ("--kind", "input", "--split", "train")):
        done = robench("landscape", checkpoint, *few, *extra)
        assert (done.code, done.out) == (0, ""), done.err
    found = load([tmp_path / "runs/landscape"]).landscapes
    assert [(one.kind, one.split, one.attack) for one in found] == [
        ("weight-2d", "test", "pgd-10"), ("input", "test", ""), ("input", "train", "")]
    assert len({one.data_sha256 for one in found}) == 2
    assert all(len(one.losses) == 3 for one in found)


@pytest.mark.parametrize(("options", "message"), [
    (("--points", 4), "points must be odd and at least 3, not 4"),
    (("--kind", "input", "--steps", 3), "--directions is for --kind weight"),
    (("--kind", "3d"), "'3d' is not one of"),
    (("--limit", 361), "cannot take 361 of 360 images"),
    (("--limit", 0), "limit: "),
    (("--split", "train", "--limit", 1438), "cannot take 1438 of 1437 images"),
    (("--dataset", "cifar10"), "cannot read cifar10"),
    (("no.safetensors",), "there is no file no.safetensors"),
])
def test_mistakes_are_one_line(survey, tmp_path, options, message):
    done = survey(*options)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_what_is_finished_is_taken_as_it_is(survey, monkeypatch, tmp_path, no_figures):
    assert survey().code == 0
    before = load([tmp_path / "runs/landscape"])

    def never(*_, **__):
        raise AssertionError("surveyed again")

    monkeypatch.setattr("robench.benchmark.landscapes.survey_lines", never)
    assert survey().code == 0
    assert load([tmp_path / "runs/landscape"]) == before
    with pytest.raises(AssertionError):
        survey("--seed", 1)


def test_an_interrupted_survey_goes_on(survey, monkeypatch, tmp_path, no_figures):
    """Each of the 3 lines has 4 points besides the network itself, which takes one more a run."""
    assert survey("--out", "whole").code == 0
    calls = 0
    original = module.AdversarialLoss.__call__

    def interrupted(self):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(module.AdversarialLoss, "__call__", interrupted)
    assert survey("--out", "parts").code == 130
    assert not (tmp_path / "parts/landscape.jsonl").exists()
    (partial,) = (tmp_path / "parts/landscape").glob("*.partial")
    assert len(json.loads(partial.read_text())["losses"]) == 1
    assert survey("--out", "parts").code == 0
    assert calls == 8 + 1 + 2 * 4
    (one,), (other,) = (load([tmp_path / name]).landscapes for name in ("whole", "parts"))
    assert one.losses == other.losses and not partial.exists()


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"losses": [[0.1]], "fingerprint": [1.0]}'])
def test_damaged_files_of_earlier_runs_are_ignored(survey, tmp_path, no_figures, damage):
    assert survey().code == 0
    (kept,) = (tmp_path / "runs/landscape/landscape").iterdir()
    good = json.loads(kept.read_text())
    kept.write_text(damage)
    kept.with_suffix(".partial").write_text(damage)
    assert survey().code == 0
    assert json.loads(kept.read_text())["losses"] == good["losses"]


def test_other_results_in_the_folder_stay(survey, robench, tmp_path, no_figures):
    evaluate = ("eval", "net.safetensors", "--limit", 10, "--device", "cpu", "--out",
                "runs/landscape", "--attack")
    assert survey().code == 0
    assert robench(*evaluate, "fgsm").code == 0
    assert survey("--seed", 1).code == 0
    assert robench(*evaluate, "pgd-2").code == 0
    results = load([tmp_path / "runs/landscape"])
    assert {record.attack for record in results.records} == {"fgsm", "pgd-2"}
    assert [one.direction_seed for one in results.landscapes] == [0, 1]
    assert results.landscapes[0].losses != results.landscapes[1].losses


def test_a_network_of_a_run_knows_its_cell(robench, job, tmp_path, monkeypatch, no_figures):
    from robench.benchmark.matrix import run

    monkeypatch.chdir(tmp_path)
    results = run(job(seeds=(0, 1), epochs=1, attacks=("fgsm",), out=tmp_path / "runs"))
    cells = sorted((tmp_path / "runs/cells").glob("*/best.safetensors"))
    done = robench("landscape", *cells, *SMALL, "--out", "runs")
    assert done.code == 0, done.err
    both = load([tmp_path / "runs"])
    assert both.records == results.records
    assert sorted(one.run for one in both.landscapes) == [path.parent.name for path in cells]
    record = both.records[0]
    for one in both.landscapes:
        assert (one.defense, one.defense_config, one.recipe, one.selection, one.checkpoint) == (
            record.defense, record.defense_config, record.recipe, record.selection, "best")
    assert "|     2 |" in done.out and "[" in done.out  # seeds, and an interval over them
