"""Views: the same networks in bfloat16, the same training, and nothing computed twice."""

import copy

import pytest
import torch
from torch import nn

from robench.attacks.base import frozen
from robench.attacks.folding import close, look
from robench.attacks.objectives import ce
from robench.attacks.threat import ThreatModel
from robench.benchmark.models import MODELS
from robench.defenses import DEFENSES, Remembered, make_defense
from robench.defenses.base import clean_logits, take_step
from robench.defenses.fast import REMEMBERED, Changes, Mixed, Twin, View, accelerated
from robench.defenses.trainer import TrainConfig, fit

THREAT = ThreatModel("Linf", 8 / 255)
X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 10


def build(name="small-resnet", seed=0):
    """A network whose batch-norm does something."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MODELS[name].value(10, 3).to(memory_format=torch.channels_last)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.bias, -0.5, 0.5)
    return net


def view_of(net):
    (view,) = accelerated({"student": net}, "bf16", X).values()
    return view


def twin_of(view):
    """Whether the view has one."""
    return view.compute._twin


def step(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        ce(net(X), Y).mean().backward()
        optimizer.step()


# The twin


def new_statistics(net):
    with torch.no_grad():
        net.train()(X * 3)


def loaded(net):
    net.load_state_dict(build(seed=7).state_dict())


def shifted(net):
    with torch.no_grad():
        for w in net.parameters():
            w.add_(0.2 * w.abs().mean() * torch.randn_like(w))


def assert_same(twin, net):
    with frozen(net):
        for got, wanted in zip(look(twin, X), look(net, X), strict=True):
            assert close(got, wanted, 3e-5)


@pytest.mark.parametrize(("name", "change"), [
    ("small-resnet", step), ("small-resnet", new_statistics), ("small-resnet", loaded),
    ("small-resnet", shifted), ("preactresnet18", step), ("mobilenetv2", step)])
def test_the_twin_follows_the_network(name, change):
    net = build(name)
    twin = Twin(net, X, torch.float32)
    assert_same(twin, net)
    before = twin(X)
    change(net)
    assert not torch.allclose(twin(X), before, rtol=1e-2)
    assert_same(twin, net)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_of_an_optimizer_is_noticed(kind, foreach):
    net = Block()
    optimizer, changes = kind(net.parameters(), lr=0.1, foreach=foreach), Changes(net)
    net.eval()(X).sum().backward()
    for w in net.parameters():
        before = changes()
        optimizer.param_groups[0]["params"] = [w]
        optimizer.step()
        assert changes() != before


@pytest.mark.parametrize("name", ["smallcnn", "small-resnet", "resnet18", "preactresnet18",
                                  "mobilenetv2"])
def test_our_networks_have_twins(name):
    offered = {"size": 8} if name == "smallcnn" else {}
    view = view_of(MODELS[name].value(10, 3, **offered))
    assert twin_of(view) is not None


def test_the_twin_follows_inside_awp():
    nets, defense = {"student": build()}, make_defense("pgd-at+awp", THREAT, **{"awp.gamma": 0.1})
    twin = Twin(nets["student"], X, torch.float32)
    before = twin(X)
    with defense.perturbed(nets, lambda nets: defense.loss(nets, X, X, Y)):
        assert not torch.allclose(twin(X), before, rtol=1e-3)
        assert_same(twin, nets["student"])
    torch.testing.assert_close(twin(X), before, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_logits_and_gradients_are_close_and_in_float32():
    net = build()
    view = view_of(net)
    step(net)
    with frozen(net):
        wanted, true = look(net, X)
        got, grad = look(view, X)
    assert got.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.1)
    assert torch.cosine_similarity(grad.flatten(), true.flatten(), dim=0) > 0.98
    assert len(got.unique()) == got.numel()  # bfloat16 logits would coincide


def test_outer_passes_have_float32_logits_and_close_gradients():
    net = build()
    view, grads = view_of(net), []
    for seen in (net, view):
        logits = seen(X)
        assert logits.dtype == torch.float32
        grads.append(torch.autograd.grad(ce(logits, Y).mean(), list(net.parameters())))
    assert len(logits.unique()) == logits.numel()
    for wanted, got in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.95
    assert not any(module._forward_hooks for module in net.modules())


def test_crafting_computes_no_gradients_of_parameters():
    net, defense = build().train(), make_defense("trades", THREAT)
    view = view_of(net)
    assert defense.craft({"student": view}, X, Y).dtype == torch.float32
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert all(module.training for module in view.modules())
    assert not any(p.requires_grad for p in twin_of(view)._model.parameters())
    with frozen(view):
        assert view.compute._at_rest()
    assert not view.compute._at_rest()


# What is not computed twice


class Counted:
    """Counts the passes under a view's memory."""

    def __init__(self, view):
        self.passes, self._compute = 0, view.compute
        view.compute = self

    def __call__(self, x):
        self.passes += 1
        return self._compute(x)


def test_a_teacher_sees_clean_images_once_per_batch():
    nets = {"student": build(seed=1).train(), "teacher": build().eval().requires_grad_(False)}
    views = accelerated(nets, "bf16", X)
    counted = Counted(views["teacher"])
    defense = make_defense("rslad", THREAT, steps=2)
    optimizer = torch.optim.SGD(nets["student"].parameters(), lr=0.1)
    for batch in range(3):
        take_step(defense, views, [optimizer], X.clone(), Y)
        assert counted.passes == batch + 1


def test_changed_images_weights_or_logits_are_not_remembered():
    net, x = build(), X.clone()
    view = view_of(net)
    counted = Counted(view)

    def look_again():
        before = counted.passes
        logits = clean_logits(view, x)
        return logits, counted.passes - before

    first, computed = look_again()
    assert computed == 1
    assert look_again()[0] is first and counted.passes == 1
    x.mul_(0.5)
    assert look_again()[1] == 1
    shifted(net)
    assert look_again()[1] == 1
    new_statistics(net)
    assert look_again()[1] == 1
    look_again()[0].zero_()
    logits, computed = look_again()
    assert computed == 1 and logits.any()
    assert clean_logits(view, x.clone()) is not logits
    assert len(view._passes) == REMEMBERED


def test_passes_with_gradients_and_in_train_mode_are_all_made():
    net = build()
    view = view_of(net)
    counted = Counted(view)
    with frozen(view):
        view(X), view(X)
    view.train()
    with torch.no_grad():
        view(X), view(X)
    assert counted.passes == 4


def networks(defense):
    names = [*defense.trained, *defense.given]
    nets = {name: build(seed=seed) for seed, name in enumerate(names)}
    for name, net in nets.items():
        net.train(name in defense.trained).requires_grad_(name in defense.trained)
    return nets


@pytest.mark.parametrize("name", [*DEFENSES.names(), "trades+awp"])
def test_statistics_move_as_often_as_in_float32(name):
    defense, counts, modes = make_defense(name, THREAT), [], []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        nets = networks(defense)
        views = accelerated(nets, precision, X)
        memory = {key: module.eval().requires_grad_(False)
                  for key, module in defense.memory(views, 10).items()}
        optimizers = [torch.optim.SGD(nets[key].parameters(), lr=0.01) for key in defense.trained]
        losses = take_step(defense, {**views, **memory}, optimizers, X, Y)
        with torch.no_grad():
            defense.after_epoch({**views, **memory})
        assert losses.total.isfinite() and losses.total.dtype == torch.float32
        counts.append([int(module.num_batches_tracked) for net in nets.values()
                       for module in net.modules() if isinstance(module, nn.BatchNorm2d)])
        modes.append([module.training for net in nets.values() for module in net.modules()])
    assert counts[0] == counts[1] and modes[0] == modes[1]


# Where there is no view, or no twin


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


class Constant(Block):
    """Tracing makes a constant of what depends on a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(3, 1, 1))

    def forward(self, x):
        return super().forward(x + (self.shift * 2).neg())


class Insists(Block):
    def forward(self, x):
        if torch.is_autocast_enabled("cpu") or x.dtype != torch.float32:
            raise TypeError("float32 only")
        return super().forward(x)


class Random(Block):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.rand(()))


@pytest.mark.parametrize("cls", [Branching, Constant])
def test_without_a_twin_there_is_autocast(cls):
    net = cls()
    view = view_of(net)
    assert isinstance(view, View) and twin_of(view) is None
    logits = clean_logits(view, X)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, clean_logits(net, X), rtol=0.05, atol=0.05)
    view(X).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("net", [Insists(), Random(), Block().double(), Remembered(a=X)])
def test_what_cannot_be_viewed_is_left_alone_and_everything_in_fp32(net):
    assert view_of(net) is net
    nets = {"student": build()}
    assert accelerated(nets, "fp32", X) == nets


def test_looking_for_a_view_changes_nothing():
    net, randomized = build(), Random()
    net.bn1.eval()
    before = copy.deepcopy(net.state_dict())
    state, modes = torch.get_rng_state(), [m.training for m in net.modules()]
    view_of(net)
    view_of(randomized)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in net.modules()]
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_a_mode_of_a_part_is_respected():
    """A network that is in eval mode but for one batch-norm has no twin at that moment."""
    net = build().eval()
    view = view_of(net)
    net.bn1.train()
    with torch.no_grad():
        view(X)
        view(X)
    assert net.bn1.num_batches_tracked == 2
    assert net.layer1[0].bn1.num_batches_tracked == 0


# Copies and training


def test_a_copy_follows_its_own_weights():
    net = build()
    view = view_of(net)
    before = clean_logits(view, X)
    copied = copy.deepcopy(view)
    assert isinstance(copied, View) and isinstance(copied.compute, Mixed)
    assert torch.equal(clean_logits(copied, X), before)
    # As many changes as the original had seen when it was last followed.
    copied.load_state_dict({k: v * 1.5 for k, v in view.state_dict().items()})
    moved = clean_logits(copied, X)
    assert not torch.allclose(moved, before, rtol=0.1)
    torch.testing.assert_close(moved, clean_logits(copied.net, X), rtol=0.05, atol=0.5)
    assert torch.equal(clean_logits(view, X), before)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in view.parameters()}


def test_a_view_has_the_state_of_its_network_and_nothing_more():
    net = build()
    view = view_of(net)
    assert [id(p) for p in view.parameters()] == [id(p) for p in net.parameters()]
    for mode in (True, False):
        assert net.train(mode).training == view.training == mode
        assert view.train(not mode).training == net.training == (not mode)
    assert [key.removeprefix("net.") for key in view.state_dict()] == [*net.state_dict()]


@pytest.mark.parametrize("defense", ["pgd-at", "peeraid"])
def test_training_in_bf16_learns_as_well_as_in_fp32(make_net, make_data, make_keeper, defense):
    threat, found = ThreatModel("Linf", 0.02), {}
    made = make_defense(defense, threat, steps=3)
    for precision in ("fp32", "bf16"):
        nets = {name: make_net(seed) for seed, name in enumerate([*made.trained, *made.given])}
        config = TrainConfig(epochs=12, batch_size=32, select_steps=3, precision=precision)
        history = fit(made, nets, make_data(256), config, threat=threat, keeper=make_keeper(),
                      selection=make_data(200, seed=1))
        found[precision] = max(log.clean for log in history)
    assert found["fp32"] > 0.75
    assert found["bf16"] > found["fp32"] - 0.05


@pytest.mark.parametrize("defense", ["trades", "adr"])  # adr: its memory is a copy of a view
def test_an_interruption_changes_nothing_in_bf16(
    make_net, make_data, make_keeper, stop_after, defense
):
    made, weights = make_defense(defense, THREAT, steps=2), []
    config = TrainConfig(epochs=3, batch_size=8, select="last", precision="bf16")
    for watchers in ([None], [stop_after(4), None]):
        keeper = make_keeper()
        for watcher in watchers:
            nets = {"student": make_net()}
            try:
                fit(made, nets, make_data(24), config, threat=THREAT, keeper=keeper,
                    watcher=watcher)
            except KeyboardInterrupt:
                continue
        weights.append(nets["student"].state_dict())
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())
