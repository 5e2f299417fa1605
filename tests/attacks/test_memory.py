"""A network that takes few images at a time: the same verdicts, and a note."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import robench
from robench.attacks.base import ATTACKS, make_attack
from robench.attacks.memory import Batches, out_of_memory
from robench.attacks.search import Search
from robench.attacks.threat import ThreatModel
from robench.benchmark.models import build_model
from robench.errors import RobenchError
from robench.registry import Entry

CPU = ("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: "
       "you tried to allocate 1024000000000 bytes. Error code 12 (Cannot allocate memory)")


class Small(nn.Module):
    """A network with room for so many images."""

    def __init__(self, room, error=torch.OutOfMemoryError):
        super().__init__()
        self.room, self.error = room, error
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x):
        if len(x) > self.room:
            raise self.error(CPU)
        return self.net(x)


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    x = torch.rand(20, 1, 4, 4)
    with torch.no_grad():
        return x, Small(99)(x).argmax(1)


def measure(net, data, attack, **options):
    (measured,) = robench.evaluate(net, *data, threat="Linf:0.05", attacks=[attack],
                                   **options).measurements
    return measured


@pytest.mark.parametrize(("attack", "room", "error"), [
    ("fgsm", 7, torch.OutOfMemoryError), ("pgd-10", 1, MemoryError),
    ("pgd,steps=5,restarts=3", 9, RuntimeError), ("square,queries=30", 6, torch.OutOfMemoryError),
    pytest.param("autoattack", 7, torch.OutOfMemoryError, marks=pytest.mark.slow),
])
def test_smaller_batches_find_the_same(data, attack, room, error):
    roomy = measure(Small(1000), data, attack)
    assert 0 < roomy.robust.sum() < len(roomy.robust)
    assert "memory" not in roomy.prepared
    tight = measure(Small(room, error), data, attack)
    assert np.array_equal(tight.robust, roomy.robust)
    assert tight.batch_size <= room
    assert tight.prepared.endswith(f"short of memory: {tight.batch_size} at a time")


def test_steps_that_did_not_fit_are_not_counted(data):
    roomy, tight = (measure(Small(room), data, "pgd-10") for room in (1000, 7))
    assert (tight.forwards, tight.backwards) == (roomy.forwards, roomy.backwards)


def test_an_attack_from_elsewhere_gets_smaller_batches(data, monkeypatch):
    """One without random numbers, so that the parts change nothing."""

    class Elsewhere:
        def __init__(self, threat):
            self.threat = threat

        def __call__(self, model, x, y):
            x = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y,
                                                                      reduction="sum"), x)
            return self.threat.project((x + self.threat.eps * grad.sign()).detach(), x.detach())

    monkeypatch.setitem(ATTACKS._entries, "elsewhere",
                        Entry("elsewhere", Elsewhere, "", ""))
    roomy = measure(Small(1000), data, "elsewhere", batch_size=16)
    tight = measure(Small(5), data, "elsewhere", batch_size=16)
    assert np.array_equal(tight.robust, roomy.robust)
    assert 0 < roomy.robust.sum() < len(roomy.robust)
    assert roomy.warnings == ()
    (note,) = tight.warnings
    assert note.startswith("memory: only 4 images at a time fitted")


def test_one_image_that_does_not_fit_is_one_line(data):
    with pytest.raises(RobenchError, match="cannot take images|one image at a time"):
        measure(Small(0), data, "fgsm")


@pytest.mark.parametrize(("error", "is_one"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (MemoryError(), True),
    (RuntimeError(CPU), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("out of memory"), False),
])
def test_which_errors_mean_memory(error, is_one):
    assert out_of_memory(error) is is_one


def test_a_real_allocation_that_fails_is_recognized():
    with pytest.raises(Exception) as caught:  # whatever this torch raises
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_memory_of_a_try_that_failed_is_given_back(monkeypatch):
    """torch's cache gives back to the device only what nobody holds any more."""
    held, seen = [], []

    def work():
        pixels = torch.ones(3)
        held.append(weakref.ref(pixels))
        raise torch.OutOfMemoryError(CPU)

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append(held[0]()))
    with Batches(4).fitted():
        work()
    assert seen == [None]


def test_batches_pass_other_errors_and_empty_tensors_on():
    batches = Batches(4)
    assert batches(lambda x: 2 * x, torch.arange(0)).tolist() == []
    assert batches(lambda x, y: x + y, torch.arange(6), torch.arange(6)).tolist() == [
        0, 2, 4, 6, 8, 10]
    assert (batches.size, batches.halved) == (4, False)
    with pytest.raises(ZeroDivisionError):
        batches(lambda x: 1 // 0, torch.arange(6))


@pytest.mark.parametrize(("attack", "options"), [
    ("pgd", {"steps": 2}), ("square", {"queries": 30, "p_init": 0.01})])
@pytest.mark.parametrize("precision", ["exact", "bf16"])
def test_a_search_leaves_nothing_behind(attack, options, precision):
    """Not even until the garbage collector comes: copies of large networks would pile up."""
    torch.manual_seed(0)
    net = build_model("small-resnet", classes=10, channels=3, size=32, normalize="cifar10").eval()
    x = torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        y = net(x).argmax(1)
    made = make_attack(attack, ThreatModel("Linf", 0.001), precision=precision, **options)

    def tensors():
        return sum(type(held) in (torch.Tensor, nn.Parameter) for held in gc.get_objects())

    Search(made, net, x, y, seed=0).run()  # what is kept for all searches is kept now
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        found = Search(made, net, x, y, seed=0).run()
        del found
        assert tensors() == before
    finally:
        gc.enable()
