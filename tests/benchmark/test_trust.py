"""The checks of an evaluation: each planted fraud raises its flag, sound networks raise none."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robench.attacks.base import ATTACKS, make_attack
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import ABSOLUTE, RELATIVE, verify
from robench.benchmark import checks
from robench.benchmark.checkpoints import save_checkpoint
from robench.benchmark.checks import examine
from robench.benchmark.data import Images
from robench.benchmark.evaluate import Target, evaluate
from robench.benchmark.spec import AttackSpec
from robench.benchmark.trust import outcome
from robench.benchmark.trust.active import (
    Binary,
    Features,
    _apart,
    _boundary,
    _planted,
    active_test,
)
from robench.benchmark.trust.diagnosis import ATTACKS as EXAMINED
from robench.benchmark.trust.diagnosis import examine_attacks
from robench.benchmark.trust.outcome import OUTCOMES, Patient
from robench.reports.judge import FALLS, NETWORK
from robench.reports.store import save
from robench.reports.trust import CHECKS, LUCK, Finding, id_of, texts

from .frauds import EPOCHS, FRAUDS, SOUND, THREAT, digits, plant, sound

DOCS = Path(__file__).parents[2] / "docs" / "trust.md"
FEW = 32  # images
QUICK = 3  # epochs of the networks of quick tests


def flags(findings):
    return [f.check.id for f in findings if f.flagged]


def planted(name, epochs=QUICK):
    return plant(name, sound("standard", epochs), digits().test.x, THREAT)


def patient(net, threat=THREAT, n=FEW, attacks=EXAMINED):
    target = Target(net, digits().test.take(n))
    specs = tuple(AttackSpec.parse(text) for text in attacks)
    return Patient(target, threat, specs, digits().train, 10)


# The definitions


def test_the_24_checks_are_there_and_each_is_measured_somewhere():
    numbers = sorted(check.number for check in CHECKS.values() if check.number)
    assert numbers == list(range(1, 25))
    beside = {"eval-mode", "eps-unit", "adaptive-hook", "transfer-only"}  # see the tests below
    assert {*checks.PROBES, *OUTCOMES, *NETWORK, *beside} == set(CHECKS)
    order = list(checks.PROBES)
    for check in CHECKS.values():
        assert set(check.unless) <= set(order[: order.index(check.id)] if check.unless else [])


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_check_flags_what_is_above_its_limit(check):
    levels = {value: Finding(check, value).verdict
              for value in (check.limit, check.limit + 1e-6, float("nan"), None)}
    worst = check.level
    good = "report" if worst == "report" else "ok"
    assert levels == {check.limit: good, check.limit + 1e-6: worst, None: "not applicable",
                      **{k: worst for k in levels if k is not None and k != k}}
    (text,) = texts([Finding(check, 1e9)]) or (check.text(1e9),)
    assert id_of(text) == check.id and "{" not in text and text.endswith(".") and "\n" not in text


# The frauds, by the checks that every evaluation makes


@pytest.mark.parametrize("name", FRAUDS)
def test_a_fraud_raises_its_flag_and_no_other(name):
    images = digits().test.take(2 * FEW)
    net, threat, check = planted(name)
    scores = evaluate(net, images.x, images.y, threat=threat, attacks=["fgsm"])
    assert [id_of(text) for text in scores.warnings] == [check]
    assert f"| {name} | `{check}` |" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("defense", SOUND)
def test_a_sound_network_raises_none(defense):
    images = digits().test.take(2 * FEW)
    net = sound(defense, QUICK)
    scores = evaluate(net, images.x, images.y, threat=THREAT, attacks=["fgsm"])
    assert scores.clean > 0.85 and scores.warnings == ()
    as_function = evaluate(lambda x: net(x), images.x, images.y, threat=THREAT, attacks=["fgsm"])
    assert as_function.warnings == ()


def test_the_frauds_are_frauds():
    """They seem robust to PGD, and the network inside falls to what was crafted against it."""
    images = digits().test.take(FEW)
    inside = sound("standard", QUICK)
    x_adv = make_attack("pgd-20", THREAT)(inside, images.x, images.y)
    for name in ("quantized input", "saturated logits"):
        fraud, *_ = planted(name)
        claimed = evaluate(fraud, images.x, images.y, threat=THREAT, attacks=["pgd-20"])
        truth = verify(fraud, images.x, x_adv, images.y, THREAT).fooled.float().mean()
        assert claimed.worst_case > 0.9 and truth > 0.5


def test_the_checks_are_cheap():
    """AutoAttack passes thousands of images for each that stands."""
    net, passed = sound("standard", QUICK), 0

    def counting(x):
        nonlocal passed
        passed += len(x)
        return net(x)

    assert flags(examine(counting, digits().test.x, digits().test.y)) == []
    assert passed <= 1500


def test_the_checks_leave_everything_as_it_was():
    net, *_ = planted("left in train mode")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hooks, random, autograd = dict(net._forward_hooks), torch.get_rng_state(), torch.autograd.grad
    findings = examine(net, digits().test.x, digits().test.y)
    assert [f.check.id for f in findings] == ["eval-mode", *checks.PROBES]
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert net._forward_hooks == hooks and torch.equal(torch.get_rng_state(), random)
    assert torch.autograd.grad is autograd
    assert all(p.grad is None and p.requires_grad for p in net.net.parameters())


def test_a_check_that_cannot_be_made_says_why():
    """A network that wants 32 images, no more and no less."""
    def stubborn(x):
        if len(x) != FEW:
            raise RuntimeError("32 images, please")
        return sound("standard", QUICK)(x)

    found = {f.check.id: f for f in examine(stubborn, digits().test.x, digits().test.y)}
    assert found["batch-invariant"].verdict == "not applicable"
    assert found["batch-invariant"].note == "RuntimeError: 32 images, please"
    assert found["zero-grad"].verdict == "ok"


def test_checks_take_fewer_images_where_memory_is_short():
    def short(x):
        if len(x) > FEW // 2:
            raise torch.OutOfMemoryError("out of memory")
        return sound("standard", QUICK)((x * 8).round() / 8)

    found = {f.check.id: f for f in examine(short, digits().test.x, digits().test.y)}
    assert found["zero-grad"].flagged


def test_nan_in_another_batch_is_found():
    def moody(x):
        return sound("standard", QUICK)(x) * (1.0 if len(x) == FEW else float("nan"))

    found = {f.check.id: f for f in examine(moody, digits().test.x, digits().test.y)}
    assert found["batch-invariant"].flagged


class AsksInAHelper(nn.Module):
    def forward(self, x):
        return self.noisy(x)

    def noisy(self, x):
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize(("net", "count"), [
    (nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU()), 0),
    (nn.Sequential(nn.Dropout(0.1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 1)), 2),
    (nn.Sequential(nn.Dropout(0.1).eval(), nn.BatchNorm2d(1)), 1),
    (nn.Sequential(AsksInAHelper()), 1),
    (nn.Sequential(AsksInAHelper(), nn.Dropout()).eval(), 0),
    (lambda x: x, 0),
])
def test_only_modules_whose_mode_matters_are_counted(net, count):
    assert checks.eval_mode(net) == count


@pytest.mark.parametrize(("threat", "wrong"), [
    ("Linf:8/255", False), ("Linf:0.5/255", False), ("Linf:0.3", False), ("Linf:0", False),
    ("Linf:8/65025", True), ("Linf:0.6", True),
    ("L2:0.5", False), ("L2:128/255", False), ("L2:0.03137", True), ("L2:8", True),
    ("L1:12", False), ("L1:8/255", True), ("L1:3060", True),
])
def test_eps_in_another_unit(threat, wrong):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 8, 8, generator=generator)  # about 4 from grey in L2, 48 in L1
    assert (checks.eps_unit(ThreatModel.parse(threat), x) > 1) is wrong


class Mixed(nn.Module):
    """Lets a share of the gradient through; `single`: computes in float32 whatever it is given."""

    def __init__(self, share, single=False):
        super().__init__()
        self.net, self.share, self.single = sound("standard", QUICK), share, single

    def forward(self, x):
        mixed = self.share * x + (1 - self.share) * x.detach()
        return sound("standard", QUICK)(mixed.float()) if self.single else self.net(mixed)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("share", "wrong"), [(1.0, False), (0.95, False), (0.5, True)])
def test_finite_differences_find_a_wrong_gradient_alone(share, wrong, single):
    found = flags(examine(Mixed(share, single), digits().test.x, digits().test.y))
    assert found == (["grad-vs-fd"] if wrong else [])


# The active test


@dataclass
class Centers:
    """Images far apart in the middle of the box, and features that are the pixels themselves."""

    n: int = 16

    def images(self):
        x = 0.3 + 0.4 * torch.rand(self.n, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        return Images(x, torch.zeros(self.n, dtype=torch.int64))


class Pixels(nn.Module):
    """Logits that are a linear map of the pixels; `hidden` rounds them away from gradients."""

    def __init__(self, hidden=False):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = hidden, nn.Linear(16, 10)

    def forward(self, x):
        return self.head((x.flatten(1) * 200).round() / 200 if self.hidden else x.flatten(1))


@pytest.mark.parametrize("norm", ["Linf:0.05", "L2:0.15"])
def test_planted_examples_are_in_the_ball_and_found_unless_gradients_are_hidden(norm):
    threat, images = ThreatModel.parse(norm), Centers().images()
    attacks = {"pgd-20": make_attack("pgd-20", threat)}
    seen = active_test(Pixels(), images, attacks, threat)
    assert seen.valid and seen.features == 16
    assert (seen.found, seen.missed) == ({"pgd-20": seen.tests}, 0)
    hidden = active_test(Pixels(hidden=True), images, attacks, threat)
    assert hidden.valid and hidden.missed > 0.5 * hidden.tests


class Crowded(Pixels):
    """Has no room for more than 50 images; notes how many it was given."""

    def forward(self, x):
        self.given = [*getattr(self, "given", ()), len(x)]
        if len(x) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)


def test_planted_points_that_do_not_fit_into_memory_are_looked_at_in_parts():
    threat, images, found = ThreatModel("Linf", 0.05), Centers().images(), []
    for net in (Pixels(), crowded := Crowded()):
        torch.manual_seed(1)
        found.append(active_test(net, images, {"pgd-20": make_attack("pgd-20", threat)}, threat))
    assert found[0] == found[1] and found[0].valid
    assert crowded.given.count(401) == 1 and crowded.given.count(50) >= 8 * 16


def test_what_is_planted_is_confirmed_before_it_counts():
    threat, x = ThreatModel("Linf", 0.05), Centers().images().x
    with Features.of(Pixels(), x[:2]) as features:
        kept, heads = _planted(features, x, threat)
        binary, zeros = Binary(features, kept, heads, threat), torch.zeros(len(kept)).long()
        assert len(kept) > 8 and (binary(kept).argmax(1) == 0).all()
        # Class 1 is there, inside the ball: the corner to which the head points.
        corner = threat.project(kept + heads.weight.view_as(kept).sign().float(), kept)
        assert verify(binary, kept, corner, zeros, threat).fooled.all()
        # And next to nothing of the ball is: hardly any random corner.
        assert verify(binary, kept, _boundary(kept, threat), zeros, threat).fooled.sum() <= 1


def test_images_within_each_others_balls_are_left_out():
    x = torch.tensor([0.5, 0.55, 0.7, 0.72, 0.95]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    assert _apart(x, ThreatModel("Linf", 0.05)).tolist() == [0, 2, 4]


def test_features_are_the_input_of_the_last_layer_or_else_the_logits():
    x, net = torch.rand(5, 1, 4, 4), Pixels()
    for model, wanted in ((net, x.flatten(1)), (lambda z: net(z), net(x)),
                          (nn.Sequential(net, nn.Softmax(1)), net(x).softmax(1))):
        with Features.of(model, x[:2]) as features:
            assert torch.allclose(features(x), wanted)
    assert not net.head._forward_pre_hooks


def test_a_test_that_random_search_passes_is_not_counted():
    """One pixel: random search finds the one way that leads there."""
    images = Images(torch.linspace(0.2, 0.8, 10).view(10, 1, 1, 1), torch.zeros(10).long())
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    threat = ThreatModel("Linf", 0.02)
    outcome = active_test(net, images, {"pgd-20": make_attack("pgd-20", threat)}, threat)
    assert outcome.easy > 5 and not outcome.valid and "too easy" in str(outcome)


# The checks of attacks


@pytest.fixture
def register(monkeypatch):
    """Registers an attack for one test: a function (model, x, y, threat) -> x_adv."""
    ATTACKS.names()
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))

    def register(name, function):
        def make(threat):
            def attack(model, x, y):
                return function(model, x, y, threat)

            attack.threat = threat
            return attack

        ATTACKS.register(name, description="for a test")(make)

    return register


def test_an_attack_that_forgets_what_it_saw(register):
    def forgetful(model, x, y, threat):
        x_adv = make_attack("pgd-20", threat)(model, x, y)
        model(x_adv)
        return x

    register("forgetful", forgetful)
    net = sound("standard", QUICK)
    assert outcome.silent_success(patient(net, attacks=["forgetful"])).value > 0.5
    assert outcome.silent_success(patient(net, attacks=["pgd-20"])).value == 0
    both = outcome.silent_success(patient(net, attacks=["pgd-20", "forgetful"]))
    assert both.value > 0.5 and "by forgetful" in both.note and "pgd-20" not in both.note


def test_one_attack_that_finds_nothing_fails_the_active_test_beside_others_that_do(register):
    register("lazy", lambda model, x, y, threat: x)
    value, note = outcome.active(patient(sound("standard", QUICK), attacks=["pgd-20", "lazy"]))
    assert value > CHECKS["active-test"].limit
    assert re.search(r"\b[1-9]\d* by pgd-20, 0 by lazy", note)


def test_an_attack_that_does_nothing_is_found_out_by_all_others(register):
    register("lazy", lambda model, x, y, threat: x)
    lazy = patient(sound("standard", QUICK), n=FEW // 2, attacks=["lazy"])
    for check in ("masking", "transfer<=whitebox", "noise", "active-test"):
        number = OUTCOMES[check](lazy)
        assert Finding(CHECKS[check], number.value).flagged, check
    assert OUTCOMES["steps-converged"](lazy).value is None


def test_an_attack_that_leaves_the_ball(register):
    register("far", lambda model, x, y, threat: (x + 3 * threat.eps).clamp(0, 1))
    far = patient(sound("standard", QUICK), attacks=["far"])
    assert outcome.outside(far).value == far.target.correct.sum() > 0


def test_rounding_to_8_bits_is_reported_apart():
    """Images whose only way out is smaller than a level, and images with room."""
    class Thin(nn.Module):
        def forward(self, x):
            score = x.flatten(1).sum(1) - 4 * 100.2 / 255
            return torch.stack([-score, score], 1) * 100

    x = torch.full((10, 1, 2, 2), 100 / 255)
    images = Images(x, torch.zeros(10, dtype=torch.int64))
    for eps, share in ((0.4 / 255, 1.0), (3 / 255, 0.0)):
        threat = ThreatModel("Linf", eps)
        p = Patient(Target(Thin(), images), threat, (AttackSpec(name="fgsm"),), images, 2)
        number = outcome.eight_bit(p)
        assert number.value == share
        assert number.note.startswith("of 10 examples 10 are inside after rounding")


def test_more_steps_help_an_attack_that_was_too_short():
    net = sound("pgd-at", QUICK)
    short = patient(net, n=2 * FEW, attacks=["pgd,steps=1,step_size=0.02"])
    assert outcome.steps_converged(short).value > CHECKS["steps-converged"].limit
    assert [s.label for s in (outcome._longer(AttackSpec(name="pgd-20"), THREAT),)] == [
        "pgd,restarts=5,steps=40"]
    assert outcome._longer(AttackSpec(name="fgsm"), THREAT) is None


def test_numbers_of_a_network_solved_by_hand():
    """Class 1 where the mean pixel is above a half: who is how far from it is known."""
    class Mean(nn.Module):
        def forward(self, x):
            score = 100 * (x.flatten(1).mean(1) - 0.5)
            return torch.stack([-score, score], 1)

    x = torch.linspace(0.31, 0.69, 20).view(20, 1, 1, 1).expand(20, 1, 4, 4).contiguous()
    images = Images(x, (x[:, 0, 0, 0] > 0.5).long())
    p = Patient(Target(Mean(), images), ThreatModel("Linf", 0.1), (AttackSpec(name="pgd-20"),),
                images, 2)
    stands = np.abs(x[:, 0, 0, 0].numpy() - 0.5) > 0.1
    assert (p.standing == stands).all()
    for check in ("masking", "noise", "iter>=single", "monotone-eps", "eps->100%",
                  "steps-converged", "loss-plateau", "silent-success", "outside", "seed-spread",
                  "overfit-gap", "catastrophic-overfitting"):
        assert OUTCOMES[check](p).value == pytest.approx(0, abs=1e-6), check
    assert OUTCOMES["uncertainty"](p).value == pytest.approx(0.2, abs=0.01)  # Wilson at 20


@pytest.mark.parametrize("edge", ["constant", "one image", "one class", "eps 0", "none right"])
def test_numbers_at_the_edges(edge):
    """Each check has a number, or says why it cannot have one."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        net[1].weight.mul_(0 if edge == "constant" else 1)
    images = digits().test.take(1 if edge == "one image" else 12)
    y = {"one class": torch.zeros_like(images.y),
         "none right": (net(images.x).argmax(1) + 1) % 10}.get(edge, images.y)
    threat = ThreatModel("Linf", 0.0 if edge == "eps 0" else 0.1)
    p = Patient(Target(net, Images(images.x, y)), threat, (AttackSpec(name="pgd-5"),),
                digits().train.take(200), 10)
    for found in examine_attacks(p):
        assert not found.note.startswith("could not be made"), found
        assert found.value is None and found.note or 0 <= found.value < float("inf"), found


# The command


def test_doctor_of_a_sound_network(robench, tmp_path, make_header):
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, sound("standard", QUICK), make_header())
    done = robench("doctor", path, "--limit", FEW // 2, "--out", tmp_path / "out", "--quiet")
    assert done.code == 0, done.err
    assert done.out == (tmp_path / "out" / "doctor.md").read_text()
    (found,) = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert [c["id"] for c in found["checks"]] == list(CHECKS)
    assert {c["verdict"] for c in found["checks"]} <= {"ok", "report", "not applicable"}
    assert found["failed"] == []


ROUNDED = """
import torch
from torch import nn

class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Linear(64, 10)
        self.drop = nn.Dropout()
    def forward(self, x):
        return self.drop(self.flat((x.flatten(1) * 8).round() / 8))
"""


def test_doctor_and_eval_of_a_fraud_exit_with_4(robench, tmp_path, monkeypatch):
    monkeypatch.setattr("robench.benchmark.external.render",  # without its figures
                        lambda results, out: save(out, results))
    (tmp_path / "frauds_here.py").write_text(ROUNDED)
    monkeypatch.chdir(tmp_path)
    done = robench("doctor", "frauds_here:Rounded", "--limit", FEW // 2, "--quiet",
                   "--attack", "pgd-5")
    assert done.code == 4
    assert done.err.count("\n") == 1 and "evaluation unreliable: frauds_here:Rounded" in done.err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.out.splitlines()
            if line.startswith("|")]
    verdicts = {row[0]: row[1] for row in rows}
    assert verdicts["zero-grad"] == "fail" and verdicts["eval-mode"] == "warn"
    done = robench("eval", "frauds_here:Rounded", "--limit", FEW, "--attack", "fgsm", "--quiet")
    assert done.code == 4 and "zero-grad" in done.err
    (line,) = (tmp_path / "runs" / "eval" / "results.jsonl").read_text().splitlines()
    assert {id_of(text) for text in json.loads(line)["warnings"]} == {"zero-grad", "eval-mode"}
    assert "zero-grad: " in done.out and "BPDA" in done.out  # the leaderboard explains it


def test_doctor_without_a_network_takes_no_options_of_one(robench):
    for options in (("--limit", 10), ("--threat", "Linf:0.1"), ("--out", "a"), ("--seed", 0)):
        done = robench("doctor", *options)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "name a NETWORK" in done.err


# The documentation


def check_table():
    """The table of all checks in docs/trust.md."""
    from robench.reports.trust import WHERE

    lines = ["| # | check | measures | limit | level | made by |", "|--:|---|---|--:|---|---|"]
    for c in CHECKS.values():
        limit = "" if c.level == "report" else c.shown(c.limit)
        lines.append(f"| {c.number or ''} | `{c.id}` | {c.tests} | {limit} | {c.level} | "
                     f"{WHERE[c.when]} |")
    return "\n".join(lines)


def test_the_documented_checks_are_these():
    assert check_table() in DOCS.read_text(encoding="utf-8")


def test_the_documented_rules_are_compared_with_these_limits():
    text = DOCS.read_text(encoding="utf-8").partition("| the checklist's rule |")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]
            if line.startswith("|")]
    numbered = sorted((c for c in CHECKS.values() if c.number), key=lambda c: c.number)
    assert [(number, id, limit, level) for number, id, _, limit, level, _ in rows] == [
        (str(c.number), f"`{c.id}`", "" if c.level == "report" else c.shown(c.limit), c.level)
        for c in numbered]
    why = {id.strip("`"): f"{rule} {text}" for _, id, rule, _, _, text in rows}
    for id, number in (("zero-grad", checks.SAMPLE), ("masking", LUCK), ("noise", outcome.DRAWS),
                       ("steps-converged", outcome.SOME), ("grad-vs-fd", checks.STEP),
                       ("outside", RELATIVE), ("outside", ABSOLUTE)):
        assert f"{number:g}".replace("e-0", "e-") in why[id].replace("e-0", "e-"), id
    assert f"fewer than {FALLS:.0%}".replace("%", " %") in why["catastrophic-overfitting"]


@pytest.mark.parametrize("name", SOUND)
def test_the_documented_rows_of_sound_networks_are_empty(name):
    assert f"\n| {name} |  |  |\n" in DOCS.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", SOUND)
def test_doctor_raises_no_flag_of_a_sound_network(name):
    found = patient(sound(name), n=2 * FEW)
    assert flags([*found.target.findings, *examine_attacks(found)]) == []


@pytest.mark.slow
def test_doctor_sees_what_follows_from_a_fraud():
    raised = set(flags(examine_attacks(patient(planted("quantized input", EPOCHS)[0], n=FEW))))
    assert {"masking", "transfer<=whitebox", "noise", "eps->100%"} <= raised
