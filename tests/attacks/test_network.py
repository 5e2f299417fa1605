"""The network as the search sees it: same function, less work, and honest counts."""

import warnings

import pytest
import torch
from torch import nn

from robench.attacks.base import frozen
from robench.attacks.local import Change
from robench.attacks.network import MICRO_BATCH, Network, in_micro_batches, searching
from robench.attacks.objectives import ce


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Linear(8, 5)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))


class Branching(Block):
    def forward(self, x):
        return super().forward(x) if float(x.detach().sum()) > -1 else x.flatten(1)


class NoGradient(Block):
    """fx does not see `no_grad`: a traced copy would have a gradient where the model has none."""

    def forward(self, x):
        with torch.no_grad():
            hidden = torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.last(hidden) + 0 * x.sum()


def trained(cls=Block):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = cls()
        net.norm.weight.data.uniform_(0.5, 2)
        net.norm.bias.data.uniform_(-1, 1)
        net.norm.running_mean.uniform_(-1, 1)
        net.norm.running_var.uniform_(0.2, 3)
    return net.eval()


X = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 5


def objective(logits):
    return ce(logits, Y[: len(logits)])


def look(net, precision, x=X):
    with frozen(net), searching(precision):
        prepared = Network(net, precision, x[:8])
        logits, values, grad = prepared.gradient(x, objective)
        return prepared, logits, values, grad, prepared.logits(x)


@pytest.mark.parametrize("precision", ["exact", "ieee"])
@pytest.mark.parametrize("cls", [Block, Branching])
def test_logits_and_gradients_are_those_of_the_model(cls, precision):
    net = trained(cls)
    z = X.clone().requires_grad_(True)
    wanted = net(z)
    (grad,) = torch.autograd.grad(ce(wanted, Y).sum(), z)
    _, logits, values, found, again = look(net, precision)
    torch.testing.assert_close(logits, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, wanted.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values, ce(wanted, Y).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-6)
    assert not found.requires_grad and not logits.requires_grad


def test_batch_norm_is_folded_where_it_can_be_and_the_model_is_not_touched():
    net = trained()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert look(net, "exact")[0].prepared in (
        "batch-norm folded, channels_last", "batch-norm folded, channels_last, fused")
    assert look(trained(Branching), "exact")[0].prepared == "channels_last"
    assert look(net, "ieee")[0].prepared == "as it is"
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.conv.weight.is_contiguous() and all(p.requires_grad for p in net.parameters())


def test_a_copy_with_another_gradient_is_not_used():
    prepared, *_, grad, _ = look(trained(NoGradient), "exact")
    assert "folded" not in prepared.prepared
    assert not grad.any()


def test_bf16_is_close_and_its_logits_are_float32():
    _, logits, _, grad, _ = look(trained(), "bf16")
    _, wanted, _, true, _ = look(trained(), "ieee")
    assert logits.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=0.05, atol=0.05)
    assert torch.cosine_similarity(grad.flatten(), true.flatten(), dim=0) > 0.99
    assert len(logits.unique()) > 150  # bfloat16 logits would coincide


def test_in_ieee_an_image_has_the_same_bits_in_every_batch():
    net = trained()
    whole = look(net, "ieee")
    for rows in (slice(0, 1), slice(3, 20), slice(7, 40)):
        part = look(net, "ieee", X[rows])
        assert torch.equal(part[4], whole[4][rows])
    padded = in_micro_batches(net)
    assert torch.equal(padded(X[5:6]), padded(X)[5:6])


def test_passes_are_counted_per_image():
    prepared = look(trained(), "exact")[0]
    assert (prepared.forwards, prepared.backwards) == (80, 40)


def test_ieee_passes_have_one_shape():
    shapes = set()
    net = trained()
    net.register_forward_pre_hook(lambda module, args: shapes.add(args[0].shape))
    look(net, "ieee")
    assert shapes == {(MICRO_BATCH, 3, 8, 8)}


def test_a_gradient_that_is_not_finite_is_zero():
    def model(x):
        return torch.stack([x.sum(dim=(1, 2, 3)) * 0, (x - x).flatten(1).norm(dim=1)], 1)

    _, _, grad = Network(model, "exact", X[:8]).gradient(X, lambda z: z[:, 1])
    assert torch.equal(grad, torch.zeros_like(X))


def switches():
    return (torch.backends.cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


def test_the_global_switches_come_back():
    before = switches()
    assert before == (True, False, True, True, True)
    with searching("ieee"):
        assert switches() == (False, True, False, False, True)
    assert switches() == before


def test_of_warnings_about_determinism_only_the_true_ones_are_shown():
    """torch looks at CUBLAS_WORKSPACE_CONFIG at the first product of the process, never again."""
    cublas = ("Deterministic behavior was enabled with either `torch.use_deterministic_algorithms("
              "True)` or `at::Context::setDeterministicAlgorithms(true)`, but this operation is "
              "not deterministic because it uses CuBLAS and you have CUDA >= 10.2.")
    with searching("ieee"):
        warnings.warn(cublas, UserWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="upsample"):
            warnings.warn("upsample_backward does not have a deterministic implementation",
                          UserWarning, stacklevel=1)


def test_several_gradients_take_one_forward_pass():
    net = trained()
    with frozen(net):
        prepared = Network(net, "exact", X[:8])
        wanted = [prepared.gradient(X, lambda z, k=k: z[:, k]) for k in range(5)]
        prepared.forwards = prepared.backwards = 0
        found = list(prepared.gradients(
            X, lambda classes: [lambda z, k=k: z[:, k] for k in range(classes)]))
    assert (prepared.forwards, prepared.backwards) == (40, 200)
    for one, other in zip(wanted, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_randomized_network_is_left_as_it_is():
    """Tracing would keep one of its two branches for ever."""
    class Flipping(Block):
        def forward(self, x):
            return super().forward(x.flip(3) if torch.rand(()) < 0.5 else x + 0.1)

    net = trained(Flipping)
    for _ in range(10):
        assert look(net, "exact")[0].prepared == "as it is: randomized"


def test_windows_are_computed_only_in_a_network_of_our_own():
    """A user's own GraphModule is none: in ieee every pass has one shape."""
    net = torch.fx.symbolic_trace(torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(144, 3)).eval().requires_grad_(False))
    x, zeros = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)

    class Same:
        def images(self, rows):
            return x[rows]

        known = images

        def squares(self, rows, size):
            return x[rows, :, :size, :size]

    for precision, ours in (("ieee", False), ("exact", True)):
        network = Network(net, precision, x)
        network.near(Change(zeros, zeros, zeros + 1, zeros, zeros, zeros + 3), Same())
        assert (network._local is not None) == ours, precision
