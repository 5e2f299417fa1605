"""verify: what counts as an adversarial example."""

import pytest
import torch
from torch import nn

from robench.attacks import ThreatModel, verify
from robench.attacks.verify import full_precision

THREAT = ThreatModel("Linf", 0.1)
Y = torch.zeros(4, dtype=torch.int64)


def always_wrong(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([0.0, 1.0]).repeat(len(x), 1)


def gray(value: float = 0.5) -> torch.Tensor:
    return torch.full((4, 1, 2, 2), value)


def test_inside_and_misclassified_counts():
    verdict = verify(always_wrong, gray(), gray(0.6), Y, THREAT)
    assert verdict.fooled.all() and not verdict.outside.any()
    torch.testing.assert_close(verdict.distance, torch.full((4,), 0.1, dtype=torch.float64))
    assert not verify(always_wrong, gray(), gray(0.6), Y + 1, THREAT).fooled.any()


@pytest.mark.parametrize("threat", ["Linf:0.1", "L2:0.1", "L1:0.1"])
@pytest.mark.parametrize(
    "pixel", [0.601, 0.399, float("nan"), float("inf"), -float("inf")]
)
def test_outside_the_ball_never_counts(threat, pixel):
    x_adv = gray()
    x_adv[1, 0, 1, 1] = pixel
    verdict = verify(always_wrong, gray(), x_adv, Y, ThreatModel.parse(threat))
    assert verdict.outside.tolist() == [False, True, False, False]
    assert verdict.fooled.tolist() == [True, False, True, True]


@pytest.mark.parametrize(("edge", "beyond"), [(0.0, -1e-6), (1.0, 1 + 1e-6)])
def test_outside_the_box_never_counts(edge, beyond):
    assert verify(always_wrong, gray(edge), gray(edge), Y, THREAT).fooled.all()
    assert not verify(always_wrong, gray(edge), gray(beyond), Y, THREAT).fooled.any()


def test_tolerance_is_rounding_and_no_more():
    x = gray().double()
    for excess, outside in [(5e-6, False), (2e-5, True)]:
        x_adv = x + THREAT.eps * (1 + excess)
        assert verify(always_wrong, x, x_adv, Y, THREAT).outside.all() == outside
    zero = ThreatModel("Linf", 0.0)
    assert not verify(always_wrong, gray(), gray(), Y, zero).outside.any()
    assert verify(always_wrong, gray(), gray(0.5 + 1e-6), Y, zero).outside.all()


def test_modes_are_eval_inside_and_restored():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[2].eval()
    modes = [module.training for module in net.modules()]
    statistics = net[1].running_mean.clone()
    seen = []
    net.register_forward_hook(lambda module, *_: seen.extend(m.training for m in module.modules()))
    verify(net, gray(), gray(0.55), Y, THREAT)
    assert seen == [False] * 5
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(net[1].running_mean, statistics)


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_inside_and_restored(tf32):
    conv, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = conv.allow_tf32, matmul.allow_tf32
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append((conv.allow_tf32, matmul.allow_tf32))
        return always_wrong(x)

    try:
        conv.allow_tf32 = matmul.allow_tf32 = tf32
        verify(model, gray(), gray(), Y, THREAT)
        assert seen == [(False, False)]
        assert (conv.allow_tf32, matmul.allow_tf32) == (tf32, tf32)
        with pytest.raises(ZeroDivisionError), full_precision():
            raise ZeroDivisionError
        assert (conv.allow_tf32, matmul.allow_tf32) == (tf32, tf32)
    finally:
        conv.allow_tf32, matmul.allow_tf32 = before


BACKENDS = torch.backends
NEWER = hasattr(BACKENDS.cudnn, "conv")  # from torch 2.9 on
KINDS = [BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.cuda.matmul,
         BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn, BACKENDS.mkldnn.matmul] if NEWER else []


def switches() -> list[object]:
    """All that torch says of float32, by both of its interfaces."""
    def older(read):
        try:
            return read()
        except RuntimeError:
            return "contradicted"

    return [older(lambda: BACKENDS.cudnn.allow_tf32), older(torch.get_float32_matmul_precision),
            older(lambda: BACKENDS.cuda.matmul.allow_tf32),
            BACKENDS.fp32_precision, BACKENDS.cudnn.fp32_precision,
            *(kind.fp32_precision for kind in KINDS)]


@pytest.fixture
def restored():
    older = BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    newer = [kind.fp32_precision for kind in KINDS]
    yield
    BACKENDS.fp32_precision = BACKENDS.cudnn.fp32_precision = "none"
    BACKENDS.cudnn.allow_tf32 = older[0]
    torch.set_float32_matmul_precision(older[1])
    for kind, before in zip(KINDS, newer, strict=True):
        kind.fp32_precision = before


SETTINGS = {
    "nothing": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "all": lambda: setattr(BACKENDS, "fp32_precision", "tf32"),
    "cudnn": lambda: setattr(BACKENDS.cudnn, "fp32_precision", "tf32"),
    "matmul": lambda: setattr(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "one of cudnn": lambda: setattr(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.mark.skipif(not NEWER, reason="this torch has one interface")
@pytest.mark.parametrize("name", SETTINGS)
def test_float32_is_float32_whatever_was_set_and_by_which_interface(name, restored):
    SETTINGS[name]()
    before = switches()
    with full_precision():
        inside = switches()
        with full_precision():
            assert switches() == inside
        assert switches() == inside
    assert inside[5:] == ["ieee"] * 6
    if "contradicted" not in before:  # nor is it for a network that asks
        assert inside[:3] == [False, "highest", False]
    assert switches() == before


def test_no_autocast_inside():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    dtypes = []
    net.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        verify(net, gray(), gray(), Y, THREAT)
    assert dtypes == [torch.float32]


@pytest.mark.parametrize(
    ("dtype", "seen"), [(torch.float16, torch.float32), (torch.float64, torch.float64)]
)
def test_precision_of_the_check(dtype, seen):
    dtypes = []

    def model(x: torch.Tensor) -> torch.Tensor:
        dtypes.append(x.dtype)
        return always_wrong(x)

    verify(model, gray().to(dtype), gray().to(dtype), Y, THREAT)
    assert dtypes == [seen]


def test_the_prediction_is_that_of_the_example_wherever_it_lies():
    """-1 where the logits are no numbers, which is wrong whatever the label."""
    def model(x):
        low = torch.where(x.flatten(1)[:, :1] > 0.55, torch.nan, 0.0)
        return torch.cat([low, torch.ones(len(x), 1), torch.full((len(x), 1), -1.0)], 1)

    x_adv = gray()
    x_adv[1], x_adv[2] = 0.6, 0.9
    verdict = verify(model, gray(), x_adv, torch.tensor([1, 1, 1, 0]), THREAT)
    assert verdict.predicted.tolist() == [1, -1, -1, 1]
    assert verdict.fooled.tolist() == [False, True, False, True]
