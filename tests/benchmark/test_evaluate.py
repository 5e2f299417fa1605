"""Evaluation: counts on a model that can be solved by hand, and what is refused."""

import io
import time
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import robench as package
from robench.attacks.base import ATTACKS
from robench.attacks.threat import ThreatModel
from robench.benchmark.data import Images
from robench.benchmark.evaluate import (
    Measurement,
    Target,
    attack_config,
    evaluate,
    measure,
    save_flags,
)
from robench.benchmark.spec import AttackSpec
from robench.errors import UsageError
from robench.files import pack_arrays

THREAT = ThreatModel("Linf", 0.1)


class Linear(nn.Module):
    """Class 1 where w.x + b > 0. The Linf distance of x to the boundary is |w.x + b| / |w|_1."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(12, generator=generator))
        self.norm = nn.BatchNorm2d(3)  # its statistics leave images as they are
        self.norm.eps = 0.0
        self.drop = nn.Dropout(0.5)

    def score(self, x):
        return x.flatten(1) @ self.w - self.w.sum() / 2

    def forward(self, x):
        score = self.drop(self.score(self.norm(x))[:, None])
        return torch.cat([-score, score], 1)

    @torch.no_grad()
    def distance(self, x):
        return self.score(x).abs() / self.w.abs().sum()


@pytest.fixture
def model():
    return Linear().eval()


@pytest.fixture
def data(model):
    """60 images far from 0 and 1, a quarter of them with the wrong label."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(60, 3, 2, 2, generator=generator) * 0.5 + 0.25
    with torch.no_grad():
        y = model(x).argmax(1)
    y[::4] = 1 - y[::4]
    return Images(x, y)


def refused(*arguments, **options):
    """The message of the UsageError, which has one line."""
    with pytest.raises(UsageError) as error:
        evaluate(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@dataclass
class Register:
    """Registers attacks for one test: functions (model, x, y, threat) -> x_adv."""

    entries: dict

    def __call__(self, name, function, notes=()):
        def make(threat):
            def attack(model, x, y):
                return function(model, x, y, threat)

            attack.threat, attack.notes = threat, notes
            return attack

        ATTACKS.register(name, description="for a test")(make)


@pytest.fixture
def register(monkeypatch):
    ATTACKS.names()  # loads the built-in ones
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    return Register(ATTACKS._entries)


# What is counted


def test_a_linear_model_is_counted_exactly(model, data):
    distances = model.distance(data.x)
    right = np.arange(60) % 4 != 0
    eps = float(distances.median())
    survives = right & (distances > eps).numpy()
    assert 10 < survives.sum() < 35

    scores = evaluate(model, data.x, data.y, threat=ThreatModel("Linf", eps),
                      attacks=["fgsm", "pgd-10", "pgd,steps=8,restarts=2"], batch_size=25)
    assert scores.clean == 45 / 60
    assert scores.robust == dict.fromkeys(
        ["fgsm", "pgd-10", "pgd,restarts=2,steps=8"], survives.sum() / 60)
    assert scores.worst_case == survives.sum() / 60
    assert scores.warnings == ()
    for m in scores.measurements:
        assert (m.correct == right).all()
        assert (m.robust == survives).all()
        assert m.violations == 0
        assert m.max_distance == pytest.approx(eps, rel=1e-5)
    assert "measurements" not in repr(scores)


def test_it_is_the_function_of_the_package():
    assert package.evaluate is evaluate


def test_a_plain_function_is_a_model_too(model, data):
    as_function = evaluate(lambda x: model(x), data.x, data.y, threat="Linf:0.05",
                           attacks=["pgd-5"])
    as_module = evaluate(model, data.x, data.y, threat="Linf:0.05", attacks=["pgd-5"])
    assert as_function.robust == as_module.robust


def test_worst_case_is_over_the_images_that_all_attacks_saw(model, data, register):
    def only_even(model, x, y, threat):
        sign = model.w.detach().sign().view(1, 3, 2, 2) * (1 - 2 * y.float()).view(-1, 1, 1, 1)
        return torch.where(y.view(-1, 1, 1, 1) == 0, x + threat.eps * sign, x)

    def only_odd(model, x, y, threat):
        return only_even(model, x, 1 - y, threat) * 0 + torch.where(
            y.view(-1, 1, 1, 1) == 1,
            x - threat.eps * model.w.detach().sign().view(1, 3, 2, 2), x)

    register("even", only_even)
    register("odd", only_odd)
    scores = evaluate(model, data.x, data.y, threat="Linf:0.2", attacks=["even", "odd,limit=20"])
    even, odd = (m.robust for m in scores.measurements)
    assert (len(even), len(odd)) == (60, 20)
    assert scores.worst_case == (even[:20] & odd).mean() == 0
    assert 0 < scores.robust["even"] < scores.clean
    assert scores.robust["odd"] > 0


def test_only_images_that_are_right_are_attacked(model, data, register):
    seen = []

    def spy(model, x, y, threat):
        seen.append((x.clone(), y.clone()))
        return x

    register("spy", spy)
    scores = evaluate(model, data.x, data.y, attacks=["spy"], batch_size=7)
    assert torch.equal(torch.cat([x for x, _ in seen]), data.x[torch.arange(60) % 4 != 0])
    assert torch.equal(torch.cat([y for _, y in seen]), data.y[torch.arange(60) % 4 != 0])
    assert scores.robust == {"spy": scores.clean}


def test_a_batch_without_a_right_image_is_not_attacked(model, data, register):
    def refuse(model, x, y, threat):
        raise AssertionError("nothing is there to attack")

    register("refuse", refuse)
    scores = evaluate(model, data.x, 1 - model(data.x).argmax(1), attacks=["refuse"])
    assert (scores.clean, scores.robust) == (0, {"refuse": 0})


@pytest.mark.parametrize("leave", ["ball", "box", "nan"])
def test_examples_outside_the_threat_model_do_not_count(model, data, register, leave):
    def cheat(model, x, y, threat):
        far = torch.full_like(x, float("nan"))
        if leave != "nan":  # to the far side of the boundary
            sign = model.w.detach().sign().view(1, 3, 2, 2) * (1 - 2 * y.float()).view(-1, 1, 1, 1)
            far = x + (0.3 if leave == "ball" else 2.0) * sign
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) < 10, far, x)

    register("cheat", cheat)
    threat = ThreatModel("Linf", 0.1 if leave == "ball" else 0.99)
    (m,) = evaluate(model, data.x, data.y, threat=threat, attacks=["cheat"]).measurements
    assert m.violations == 10
    assert (m.robust == m.correct).all()
    assert m.max_distance == 0  # of the counted ones


def test_the_model_keeps_its_modes_and_its_gradients(data):
    model = Linear()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    scores = evaluate(model, data.x, data.y, threat=THREAT, attacks=["pgd-3"])
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert scores.clean == 45 / 60  # measured in eval mode


def test_the_callers_random_numbers_are_not_disturbed(model, data):
    before = torch.get_rng_state()
    evaluate(model, data.x, data.y, attacks=["pgd-3"])
    assert torch.equal(torch.get_rng_state(), before)


# What is refused, and what is warned of


def test_images_and_labels_that_are_refused(model, data):
    x, y = data.x, data.y
    for images, message in (
        (x * 255, "images must be in [0, 1], not [64"),
        (x - 1, "images must be in [0, 1]"),
        ((x * 255).byte(), "images must be float in [0, 1], not torch.uint8"),
        (torch.where(x > 0.7, torch.nan, x), "images contain NaN"),
        (x[0], "shape (N, C, H, W)"),
        (x[:0], "shape (N, C, H, W)"),
    ):
        assert message in refused(model, images, y[: len(images)])
    for labels, message in (
        (y[:-1], "need labels of shape (60,), not (59,)"),
        (y.int(), "labels must be int64, not torch.int32"),
        (y.float() * torch.nan, "labels must be int64"),
        (y - 1, "labels must be in"),
        (y + 1, "the model has 2 outputs, but there are labels up to 2"),
        (y[:0], "need labels of shape"),
        (nn.functional.one_hot(y), "need labels of shape"),
    ):
        assert message in refused(model, x, labels)


def test_a_label_beyond_the_outputs_is_found_in_any_batch(model, data):
    y = data.y.clone()
    y[-1] = 7
    assert "labels up to 7" in refused(model, data.x, y, batch_size=10)


@pytest.mark.parametrize("attacks", [["pgdd"], ["fgsm", "pgdd"], ["fgsm", "fgsm,limit=3"], []])
def test_wrong_attacks_are_refused_before_the_model_is_called(data, attacks):
    def model(x):
        raise AssertionError("too early")

    refused(model, data.x, data.y, attacks=attacks)


def test_models_that_are_refused(data):
    def nan_at_the_end(x):
        logits = torch.rand(len(x), 2)
        logits[(x == data.x[-1]).flatten(1).all(1)] = torch.nan
        return logits

    for model, message in (
        (lambda x: x.new_full((len(x), 2), torch.nan), "NaN or infinite logits"),
        (lambda x: x.new_full((len(x), 2), torch.inf), "NaN or infinite logits"),
        (nan_at_the_end, "NaN or infinite logits"),
        (lambda x: x.mean((1, 2, 3)), "must return logits (N, K) for images (N, C, H, W), not"),
        (lambda x: torch.rand(1, 2), "not (1, 2)"),
        (lambda x: (torch.rand(len(x), 2),), "not tuple"),
        (nn.Linear(7, 2), "the model cannot take images of shape (60, 3, 2, 2)"),
    ):
        assert message in refused(model, data.x, data.y, attacks=["fgsm"], batch_size=20)


def test_probabilities_are_warned_of(model, data):
    scores = evaluate(lambda x: model(x).softmax(1), data.x, data.y, attacks=["fgsm"])
    (warning,) = scores.warnings
    assert warning.startswith("probabilities: the outputs look like softmax probabilities")


def test_a_randomized_model_is_warned_of(model, data):
    def noisy(x):
        return model(x) + 0.01 * torch.randn(len(x), 2)

    (warning,) = evaluate(noisy, data.x, data.y, attacks=["fgsm"]).warnings
    assert warning.startswith("random: two passes over the same images differ")


# Parts of a measurement


@pytest.fixture
def close(model, register):
    """60 images so close to the boundary that the noise of NOISY decides about each verdict."""
    register("noisy", lambda model, x, y, threat: threat.sample(x))
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + 0.03 * torch.randn(60, 3, 2, 2, generator=generator)
    with torch.no_grad():
        data = Images(x, model(x).argmax(1))
    assert 0.2 < measure(Target(model, data, 60), NOISY, THREAT).robust.mean() < 0.8
    return data


NOISY = AttackSpec(name="noisy")  # an attack without a pool
POOLED = AttackSpec(name="pgd", options={"steps": 1, "step_size": 0.0})


def test_the_seed_and_the_attack_decide_about_the_noise(model, close):
    target = Target(model, close, 20)
    flags = [measure(target, NOISY, THREAT, seed=seed).robust for seed in (0, 0, 1)]
    assert (flags[0] == flags[1]).all()
    assert (flags[0] != flags[2]).any()


@pytest.mark.parametrize("limit", [1, 20, 33, 59])
def test_more_images_do_not_change_the_flags_of_the_first_batches(model, close, limit):
    whole = measure(Target(model, close, 20), NOISY, THREAT)
    part = measure(Target(model, close, 20), NOISY.model_copy(update={"limit": limit}), THREAT)
    cut = Target(model, close.take(limit), 20)
    full_batches = limit // 20 * 20
    assert len(part.robust) == len(part.correct) == limit
    assert (part.robust[:full_batches] == whole.robust[:full_batches]).all()
    assert (measure(cut, NOISY, THREAT).robust == part.robust).all()


def test_a_limit_beyond_the_images_is_all_of_them(model, close):
    m = measure(Target(model, close, 20), AttackSpec(name="fgsm", limit=1000), THREAT)
    assert len(m.robust) == 60


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_an_interrupted_measurement_goes_on_with_the_same_flags(model, close, tmp_path, after):
    whole = measure(Target(model, close, 15), NOISY, THREAT)
    partial, batches = tmp_path / "a.partial", []

    def stop(share, text):
        batches.append((share, text))
        if len(batches) == after:
            raise KeyboardInterrupt

    if after:
        with pytest.raises(KeyboardInterrupt):
            measure(Target(model, close, 15), NOISY, THREAT, partial=partial, progress=stop)
    assert partial.exists() == bool(after)
    again = measure(Target(model, close, 15), NOISY, THREAT, partial=partial, progress=stop)
    assert [share for share, _ in batches] == [0.25, 0.5, 0.75, 1]  # no batch twice
    assert batches[-1][1] == f"robust {whole.robust.sum()}/60"
    assert (again.predicted == whole.predicted).all()
    assert (again.violations, again.max_distance) == (whole.violations, whole.max_distance)


def test_notes_survive_an_interruption(model, data, register, tmp_path):
    register("noted", lambda model, x, y, threat: x, notes=("something was left out",))
    target, partial = Target(model, data, 60), tmp_path / "a.partial"
    for _ in range(2):  # the second has no batch left to run
        m = measure(target, AttackSpec(name="noted"), THREAT, partial=partial)
        assert m.notes == ("something was left out",)


@pytest.mark.parametrize("content", [b"", b"garbage", None, "cut", "other", "old"])
def test_a_damaged_partial_file_only_costs_time(model, close, tmp_path, content):
    target, partial = Target(model, close, 20), tmp_path / "a.partial"
    whole = measure(target, NOISY, THREAT, partial=partial)
    if content == "cut":
        partial.write_bytes(partial.read_bytes()[:-30])
    elif content == "other":  # of another number of images
        measure(Target(model, close.take(10), 5), NOISY, THREAT, partial=partial)
    elif content is None:
        partial.write_bytes(pack_arrays({"done": 60}))
    elif content == "old":  # of before predictions were kept
        with np.load(partial) as kept:
            arrays = {name: kept[name] for name in kept if name != "predicted"}
        partial.write_bytes(pack_arrays({**arrays, "robust": np.zeros(60, dtype=bool)}))
    else:
        partial.write_bytes(content)
    again = measure(target, NOISY, THREAT, partial=partial)
    assert (again.robust == whole.robust).all()


def test_a_deadline_ends_between_batches_and_says_what_is_open(model, close, tmp_path):
    target, partial = Target(model, close, 15), tmp_path / "a.partial"
    whole = measure(target, NOISY, THREAT)
    none = measure(target, NOISY, THREAT, partial=partial, deadline=time.monotonic())
    assert none.open == none.robust.sum() == 60
    assert measure(target, NOISY, THREAT, partial=partial).open == 0
    assert (measure(target, NOISY, THREAT, partial=partial).robust == whole.robust).all()


# Attacks of the pool


@pytest.mark.parametrize("precision", ["exact", "ieee"])
def test_in_the_pool_no_verdict_depends_on_the_batch_the_limit_or_the_order(
    model, close, precision
):
    spec = POOLED.at(precision)
    whole = measure(Target(model, close), spec, THREAT)
    assert 10 < whole.robust.sum() < 50
    for size in (1, 7, 16, 60):
        assert (measure(Target(model, close, size), spec, THREAT).robust == whole.robust).all()
    for limit in (1, 33):
        part = measure(Target(model, close.take(limit)), spec, THREAT)
        assert (part.robust == whole.robust[:limit]).all()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    mixed = Images(close.x[order], close.y[order])
    assert (measure(Target(model, mixed), spec, THREAT).robust == whole.robust[order]).all()
    assert (measure(Target(model, close), spec, THREAT, seed=1).robust != whole.robust).any()


def test_the_pool_says_what_it_did(model, data):
    two = AttackSpec.parse("pgd,steps=2,restarts=3")
    m = measure(Target(model, data), two, ThreatModel("Linf", 0.02))
    assert (m.stages, m.precision, m.batch_size, m.open) == (("pgd",), "exact", 45, 0)
    assert m.breakers == {"pgd": int((m.correct & ~m.robust).sum())}
    assert ((m.breaker == 0) == (m.correct & ~m.robust)).all()
    assert m.backwards <= 6 and m.forwards <= 9
    stage = m.config["stages"]["pgd"]
    assert (m.config["precision"], stage["steps"], stage["units"]) == ("exact", 2, 3)


def test_it_is_remarked_when_square_finds_what_gradients_do_not():
    """The classifier rounds its input: no gradient anywhere, and easily fooled."""
    def rounded(x):
        value = (x.flatten(1) * 4).round().sum(1) + 0 * x.flatten(1).sum(1)
        return torch.stack([value - 23.5, 23.5 - value, 0 * value - 99], 1)

    x = 0.5 + 0.1 * torch.rand(20, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    m = measure(Target(rounded, Images(x, rounded(x).argmax(1))),
                AttackSpec(name="autoattack"), ThreatModel("Linf", 0.15))
    (note,) = [note for note in m.notes if note.startswith("masking")]
    share = f"{100 * (m.breakers['square'] - 4) / 20:.1f} %"  # 4 may be chance
    assert f"Square, which uses no gradients, broke {share} of the images" in note
    assert m.breakers["square"] > 10
    both = measure(Target(rounded, Images(x, rounded(x).argmax(1))),
                   AttackSpec.parse("union,also=L2:0.1"), ThreatModel("Linf", 0.15))
    assert [note for note in both.notes if note.startswith("masking")] == [note]


def test_the_unit_of_every_threat_model_of_a_union_is_checked(model, data):
    def units(also):
        m = measure(Target(model, data.take(2)), AttackSpec.parse(f"union,also={also}"),
                    ThreatModel("Linf", 0.02))
        return [note for note in m.notes if note.startswith("eps-unit")]

    assert units("L2:0.2") == [] and len(units("L2:0.2+L1:255")) == 1


def test_where_no_image_is_right_the_pool_has_nothing_to_do(model, data):
    m = measure(Target(model, Images(data.x, 1 - model(data.x).argmax(1))), POOLED, THREAT)
    assert not m.robust.any() and m.seconds == 0 and m.breakers == {}


def test_progress_shows_stage_runs_left_accuracy_and_its_interval(model, data, monkeypatch):
    shown = []
    monkeypatch.setattr("robench.attacks.search.Search.show_every", 0.0)
    measure(Target(model, data), AttackSpec(name="pgd-10"), ThreatModel("Linf", 0.01),
            progress=lambda share, text: shown.append((share, text)))
    shares = [share for share, _ in shown]
    assert shares == sorted(shares) and 0 <= shares[0] and shares[-1] <= 1
    assert shown[0][1].startswith("pgd: 45 runs left, robust 45/60 (62.8% to 84.2%)")


def test_an_interrupted_search_goes_on(model, data, monkeypatch, tmp_path):
    monkeypatch.setattr("robench.attacks.search.Search.show_every", 0.0)
    spec, threat, partial = AttackSpec(name="pgd-10"), ThreatModel("Linf", 0.05), tmp_path / "a"
    whole = measure(Target(model, data, 8), spec, threat)
    steps = 0

    def stop(share, text):
        nonlocal steps
        steps += 1
        if steps == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Target(model, data, 8), spec, threat, partial=partial, progress=stop)
    again = measure(Target(model, data, 8), spec, threat, partial=partial, progress=stop)
    assert (again.predicted == whole.predicted).all() and (again.breaker == whole.breaker).all()
    assert again.max_distance == whole.max_distance
    # A unit that was in flight begins again; its steps until then are counted too.
    assert whole.backwards <= again.backwards <= whole.backwards + 8 * 10 / 45


# Predictions


@pytest.mark.parametrize("name", ["batched", "pgd-2"])
@pytest.mark.parametrize("limit", [None, 33])
def test_predictions_are_those_of_the_counted_examples(model, data, register, name, limit):
    """Of two classes: the other one where the image was fooled, else that of the clean image."""
    register("batched", lambda model, x, y, threat: x - threat.eps * model.w.detach().sign()
             .view(3, 2, 2) * (2 * y - 1)[:, None, None, None])
    spec = AttackSpec(name=name, limit=limit)
    m = measure(Target(model, data, 20), spec, ThreatModel("Linf", 0.05))
    clean = model(data.x).argmax(1).numpy()[:limit]
    right = clean == data.y.numpy()[:limit]
    assert (m.label == data.y.numpy()[:limit]).all() and (m.clean == clean).all()
    assert (m.correct == right).all() and not (m.robust & ~right).any()
    fell = right & ~m.robust
    assert 0 < fell.sum() < right.sum()
    assert (m.predicted == np.where(fell, 1 - clean, clean)).all()


@pytest.mark.parametrize("name", ["outside", "pgd-2"])
def test_who_answers_no_number_predicts_nothing(model, data, register, name):
    """The counted prediction is -1; a claim outside the ball changes nothing."""
    register("outside", lambda model, x, y, threat: x + 0.2)

    def nan_around(x):
        known = (x.flatten(1)[:, None] - data.x.flatten(1)[None]).abs().amax(2).amin(1) < 1e-6
        return torch.where(known[:, None], model(x), torch.nan)

    m = measure(Target(nan_around, data, 60), AttackSpec(name=name), THREAT)
    assert m.predicted[~m.correct].tolist() == m.clean[~m.correct].tolist()
    assert (m.predicted[m.correct] == (m.label[m.correct] if name == "outside" else -1)).all()


# Files of flags

FLAGS = {"correct", "robust", "label", "clean", "predicted"}


def a_measurement(**fields):
    labels = {name: np.array(some) for name, some in {
        "label": [3, 1, 0], "clean": [3, 1, 2], "predicted": [3, -1, 2], **fields}.items()
        if name in ("label", "clean", "predicted")}
    others = {name: value for name, value in fields.items() if name not in labels}
    return Measurement(attack=NOISY, config={}, threat=THREAT, seconds=0.0, max_distance=0.0,
                       violations=0, **labels, **others)


@pytest.mark.parametrize(("last", "kind"), [(9, "int8"), (127, "int8"), (128, "int16"),
                                            (999, "int16"), (40_000, "int32")])
def test_predictions_are_kept_in_small_integers(tmp_path, last, kind):
    m = a_measurement(clean=[3, 1, last], predicted=[3, -1, last])
    save_flags(tmp_path / "a.npz", m, ("cat", "模型"))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as kept:
        assert kept["classes"].tolist() == ["cat", "模型"]
        for name in ("label", "clean", "predicted"):
            assert kept[name].tolist() == getattr(m, name).tolist() and kept[name].dtype == kind
        assert kept["correct"].tolist() == [True, True, False]
        assert kept["robust"].tolist() == [True, False, False]


def test_the_file_of_a_pooled_attack_says_what_broke_each_image(tmp_path):
    m = a_measurement(stages=("apgd-ce", "square"), breaker=np.array([-1, 1, -1], dtype=np.int8))
    save_flags(tmp_path / "a.npz", m)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as kept:
        assert set(kept) == {*FLAGS, "breaker", "stages"}
        assert kept["breaker"].tolist() == [-1, 1, -1]
        assert kept["stages"].tolist() == ["apgd-ce", "square"]


def test_files_of_flags_are_plain_numpy_and_have_no_clock(tmp_path, monkeypatch):
    correct = a_measurement().correct
    save_flags(tmp_path / "a.npz", a_measurement())
    monkeypatch.setattr("time.time", lambda: 0.0)
    monkeypatch.setattr("time.localtime", lambda *a: (2040, 1, 1, 0, 0, 0, 0, 1, 0))
    save_flags(tmp_path / "b.npz", a_measurement())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as kept:
        assert set(kept) == FLAGS
        assert kept["correct"].tolist() == correct.tolist()
        assert kept["robust"].dtype == bool
    stamps = {e.date_time for e in zipfile.ZipFile(tmp_path / "a.npz").infolist()}
    assert stamps == {(1980, 1, 1, 0, 0, 0)}


def test_different_flags_have_different_bytes():
    def packed(**arrays):
        return pack_arrays({k: np.array(v) for k, v in arrays.items()})

    assert packed(a=[True]) == packed(a=[True])
    assert len({packed(a=[True]), packed(a=[False]), packed(b=[True]), packed(a=[1])}) == 4
    with np.load(io.BytesIO(packed(a=[1, 2])), allow_pickle=False) as kept:
        assert kept["a"].tolist() == [1, 2]


def test_the_configuration_of_an_attack_for_the_record(register):
    config = attack_config(AttackSpec.parse("pgd,steps=7").build(THREAT), 10)
    assert config == {"precision": "exact", "stages": {"pgd": {
        "steps": 7, "step_size": None, "restarts": 1, "loss": "ce", "start": "uniform",
        "momentum": 0.0, "targets": 9, "units": 1, "share": 1.0}}}
    assert attack_config(lambda model, x, y: x, 10) == {}
