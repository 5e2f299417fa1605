"""The adapters: what the libraries must not do to us, and what they cannot do."""

import random
import sys

import numpy as np
import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel, make_attack, verify
from robench.attacks.adapters import library
from robench.errors import UsageError

LINF, L2 = ThreatModel("Linf", 0.1), ThreatModel("L2", 1.0)
X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net(classes: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes)
        )
    with torch.no_grad():
        net[-1].bias -= net(X).mean(0)  # every class is somebody's, and margins are small
    return net


def labels(net: nn.Module) -> torch.Tensor:
    return net(X).argmax(1)


@pytest.fixture(autouse=True)
def one_thread():
    """More threads only get in each other's way on images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def torchattacks():
    return pytest.importorskip("torchattacks")


@pytest.fixture
def pyautoattack():
    return pytest.importorskip("pyautoattack")


TORCHATTACKS = [
    ("FGSM", LINF, {}),
    ("PGD", LINF, {"steps": 5, "alpha": 0.03}),
    ("MIFGSM", LINF, {}),
    ("DIFGSM", LINF, {}),
    ("PIFGSM", LINF, {}),
    ("APGD", L2, {}),
    ("APGDT", LINF, {}),
    ("FAB", L2, {}),
    ("Square", LINF, {"n_queries": 200}),
    ("CW", L2, {"c": 10}),
    ("DeepFool", L2, {}),
    ("EADL1", ThreatModel("L1", 5.0), {"max_iterations": 30, "initial_const": 1}),
    ("AutoAttack", LINF, {}),
]
PYAUTOATTACK = ["standard", "apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]


@pytest.mark.parametrize(("name", "threat", "options"), TORCHATTACKS)
def test_torchattacks_fool_inside_the_ball_and_in_silence(
    torchattacks, capfd, name, threat, options
):
    net = make_net(10)
    attack = make_attack(f"torchattacks:{name}", threat, **options)
    verdict = verify(net, X, attack(net, X, labels(net)), labels(net), threat)
    assert verdict.fooled.sum() >= 3 and not verdict.outside.any()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threat", [LINF, L2, ThreatModel("L1", 5.0)], ids=str)
@pytest.mark.parametrize("name", PYAUTOATTACK)
def test_pyautoattack_fools_inside_the_ball_and_in_silence(pyautoattack, capfd, name, threat):
    net = make_net(10)
    attack = make_attack(f"pyautoattack:{name}", threat)
    verdict = verify(net, X, attack(net, X, labels(net)), labels(net), threat)
    assert verdict.fooled.sum() >= 3 and not verdict.outside.any()
    assert not [note for note in attack.notes if "left out" in note]
    assert capfd.readouterr() == ("", "")


ONE_OF_EACH = ["torchattacks:AutoAttack", "torchattacks:FAB", "pyautoattack:standard"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_global_state_comes_back(name):
    pytest.importorskip(name.partition(":")[0])
    net = make_net(10)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    torch.randint(2**31, ())
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    trace = sys.gettrace()

    def tracer(*_):
        return None

    sys.settrace(tracer)  # as coverage and debuggers do; pyautoattack switches it off
    try:
        make_attack(name, LINF)(net, X, labels(net))
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(trace)
    # Torch's generator is one seed further, the others are where they were.
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_gradients_stay_out_of_a_plain_callable(name):
    pytest.importorskip(name.partition(":")[0])
    net = make_net(10)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    make_attack(name, LINF)(lambda z: net(z), X, labels(net))
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in list(net.parameters())[1:])


@pytest.mark.parametrize("name", ["torchattacks:CW", "pyautoattack:square"])
def test_an_empty_batch(name):
    pytest.importorskip(name.partition(":")[0])
    net, empty = make_net(10), torch.zeros(0, dtype=torch.int64)
    assert make_attack(name, L2)(net, X[:0], empty).shape == (0, 3, 8, 8)


def test_minimum_norm_examples_are_projected(torchattacks):
    """DeepFool fools at any distance; a small ball leaves the direction and not the success."""
    net, tiny = make_net(10), ThreatModel("L2", 1e-3)
    x_adv = make_attack("torchattacks:DeepFool", tiny)(net, X, labels(net))
    verdict = verify(net, X, x_adv, labels(net), tiny)
    assert not verdict.outside.any() and not verdict.fooled.all()
    assert verdict.distance.max() > 0.99e-3


def test_torchattacks_is_told_the_number_of_classes(torchattacks):
    net = make_net(5)  # the library's default of 10 would ask for a ninth target
    x_adv = make_attack("torchattacks:APGDT", LINF)(net, X, labels(net))
    assert verify(net, X, x_adv, labels(net), LINF).fooled.sum() >= 3


@pytest.mark.parametrize("name", ["APGDT", "AutoAttack"])
def test_targeted_dlr_of_torchattacks_needs_four_classes(torchattacks, name):
    net = make_net(3)
    with pytest.raises(UsageError, match="needs at least 4 classes, not 3"):
        make_attack(f"torchattacks:{name}", LINF)(net, X, labels(net))


@pytest.mark.parametrize(
    ("classes", "left_out"),
    [(2, ["apgd-dlr", "apgd-t"]), (3, ["apgd-t"]), (4, []), (7, []), (10, [])],
)
def test_pyautoattack_runs_what_is_defined(pyautoattack, capfd, classes, left_out):
    net = make_net(classes)
    attack = make_attack("pyautoattack:plus", LINF)
    verdict = verify(net, X, attack(net, X, labels(net)), labels(net), LINF)
    assert verdict.fooled.sum() >= 3
    assert [note.split()[0] for note in attack.notes if "left out" in note] == left_out
    assert capfd.readouterr() == ("", "")  # no complaint about too many targets either


@pytest.mark.parametrize(("classes", "part"), [(2, "apgd-dlr"), (3, "apgd-t")])
def test_a_part_that_is_undefined_is_an_error(pyautoattack, classes, part):
    net = make_net(classes)
    with pytest.raises(UsageError, match=f"{part} needs at least"):
        make_attack(f"pyautoattack:{part}", LINF)(net, X, labels(net))


@pytest.mark.parametrize("part", ["apgd-t", "fab-t"])
def test_pyautoattack_tries_every_target_of_a_small_model_once(pyautoattack, part):
    """All images survive eps = 0, so every target of every image is tried."""
    net, zero = make_net(4), ThreatModel("Linf", 0.0)
    attack = make_attack(f"pyautoattack:{part}", zero)
    assert torch.equal(attack(net, X, labels(net)), X)


def test_notes_name_what_differs(torchattacks):
    (note,) = make_attack("torchattacks:AutoAttack", LINF).notes
    assert "10 iterations" in note
    assert make_attack("torchattacks:APGD", LINF, steps=100).notes == ()
    # The library's step sizes are made for 8/255.
    (note,) = make_attack("torchattacks:BIM", ThreatModel("Linf", 0.3)).notes
    assert "end inside the ball" in note
    assert make_attack("torchattacks:PGD", ThreatModel("Linf", 8 / 255)).notes == ()


@pytest.mark.parametrize(
    ("name", "threat", "options", "message"),
    [
        ("MIFGSN", LINF, {}, "unknown attack 'MIFGSN'.*MIFGSM"),
        ("MultiAttack", LINF, {}, "unknown attack 'MultiAttack'"),
        ("LGV", LINF, {}, "unknown attack 'LGV'"),
        ("Attack", LINF, {}, "unknown attack 'Attack'"),
        ("MIFGSM", L2, {}, "is an attack for Linf, not for L2:1"),
        ("APGD", ThreatModel("L1", 5.0), {}, "is an attack for Linf and L2, not for L1:5"),
        ("FAB", ThreatModel("L1", 5.0), {}, "is an attack for Linf and L2, not for L1:5"),
        ("Pixle", LINF, {}, "is an attack for L0"),
        ("MIFGSM", LINF, {"step": 3}, "no option 'step'; it has alpha, steps, decay"),
        ("MIFGSM", LINF, {"eps": 0.2}, "no option 'eps'"),
        ("AutoAttack", LINF, {"version": "extra"}, "AutoAttack: ValueError: Not valid version"),
        ("TIFGSM", LINF, {"len_kernel": "x"}, "TIFGSM: [A-Za-z]*Error: "),
    ],
)
def test_torchattacks_errors_are_one_line(torchattacks, name, threat, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_attack(f"torchattacks:{name}", threat, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("standart", {}, "Did you mean: standard?"),
        ("apgd", {}, "unknown attack 'apgd'"),
        ("custom", {}, "unknown attack 'custom'"),
        ("standard", {"n_iter": 5}, "no option 'n_iter'; it has seed"),
    ],
)
def test_pyautoattack_errors_are_one_line(pyautoattack, name, options, message):
    with pytest.raises(UsageError, match=message):
        make_attack(f"pyautoattack:{name}", LINF, **options)


def test_a_seed_of_ones_own(pyautoattack):
    net = make_net(10)
    attack = make_attack("pyautoattack:apgd-ce", LINF, seed=5)
    assert torch.equal(attack(net, X, labels(net)), attack(net, X, labels(net)))


@pytest.mark.parametrize("name", ["torchattacks:PGD", "pyautoattack:standard"])
def test_a_missing_library_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(UsageError, match=r'pip install "robench\[attacks\]"$'):
        make_attack(name, LINF)


def test_the_library_is_not_the_adapter_of_the_same_name(torchattacks, pyautoattack):
    assert library("torchattacks") is torchattacks
    assert library("pyautoattack") is pyautoattack
    assert not torchattacks.__file__.startswith(library("robench.attacks").__path__[0])


def test_what_the_checks_of_pyautoattack_find_is_noted(pyautoattack, capfd):
    """Probabilities instead of logits: the library logs it, here it goes into the notes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Softmax(dim=1))
    attack = make_attack("pyautoattack:apgd-ce", LINF)
    attack(net, torch.rand(4, 3, 4, 4), torch.arange(4))
    assert any("probability distribution" in note for note in attack.notes)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [
    "pyautoattack:apgd-ce", "pyautoattack:apgd-t", "pyautoattack:fab-t", "pyautoattack:square",
    "torchattacks:AutoAttack", "torchattacks:PGDL2",
])
def test_the_libraries_take_color_images_in_channels_last(name):
    """As robench's own networks want them; the libraries call view() on images and gradients."""
    pytest.importorskip(name.partition(":")[0])
    threat = ThreatModel("L2", 0.5) if "L2" in name else LINF
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    net = net.to(memory_format=torch.channels_last)
    x = torch.rand(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    x_adv = make_attack(name, threat)(net, x, net(x).argmax(1))
    assert x_adv.shape == x.shape
