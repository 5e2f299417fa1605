"""Weight averages are arithmetic means, and their batch-norm statistics are exact."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robench.defenses.averaging import (
    MovingAverage,
    WeightAverage,
    ema_update,
    reestimate_batch_norm,
)


def randomize(net, generator):
    for p in net.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))


@given(n=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_the_average_is_the_arithmetic_mean(make_net, n, seed):
    net, average, seen = make_net(), WeightAverage(), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        randomize(net, generator)
        seen.append({name: p.detach().clone() for name, p in net.named_parameters()})
        average.update(net)
    assert average.count == n
    for name, mean in average.mean.items():
        exact = torch.stack([weights[name].double() for weights in seen]).mean(0)
        torch.testing.assert_close(mean.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_average_keeps_no_reference_to_the_network(make_net):
    net, average = make_net(), WeightAverage()
    average.update(net)
    before = {name: mean.clone() for name, mean in average.mean.items()}
    randomize(net, torch.Generator().manual_seed(1))
    assert all(torch.equal(before[name], mean) for name, mean in average.mean.items())


def test_the_averaged_network_is_a_copy_in_which_nothing_else_changes(make_net):
    net, average = make_net(), WeightAverage()
    average.update(net)
    randomize(net, torch.Generator().manual_seed(1))
    net.eval()
    net[1].train()  # a mode of its own
    net[1].momentum = 0.3
    before = copy.deepcopy(net.state_dict())
    averaged = average.network(net, [torch.rand(5, 1, 4, 4), torch.rand(3, 1, 4, 4)])

    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for name, p in averaged.named_parameters():
        assert torch.equal(p, average.mean[name])
    assert not torch.equal(averaged[1].running_mean, net[1].running_mean)
    assert [m.training for m in averaged.modules()] == [m.training for m in net.modules()]
    assert averaged[1].momentum == net[1].momentum == 0.3


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_statistics_are_means_over_batches_weighted_by_their_sizes(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.BatchNorm2d(3)
    batches = [torch.randn(n, 3, 2, 2, generator=generator) * 2 + 5 for n in sizes]
    layer(torch.randn(4, 3, 2, 2, generator=generator))  # statistics that must be forgotten
    reestimate_batch_norm(layer, batches)

    weights = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    means = torch.stack([x.double().mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.double().var((0, 2, 3)) for x in batches])  # unbiased, as torch's
    for got, per_batch in ((layer.running_mean, means), (layer.running_var, variances)):
        exact = (weights[:, None] * per_batch).sum(0)
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    # The weighted mean of batch means is the mean over all images.
    everything = torch.cat(batches).double().mean((0, 2, 3))
    torch.testing.assert_close(layer.running_mean.double(), everything, rtol=1e-5, atol=1e-5)
    assert layer.num_batches_tracked == len(sizes)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_momentum_and_modes_are_restored(momentum):
    net = nn.Sequential(nn.BatchNorm2d(2, momentum=momentum), nn.Dropout(0.5), nn.BatchNorm2d(2))
    net[1].eval()
    net[2].eval()
    modes = [module.training for module in net.modules()]
    reestimate_batch_norm(net, [torch.rand(4, 2, 3, 3)])
    assert [module.training for module in net.modules()] == modes
    assert net[0].momentum == momentum
    assert net[2].momentum == 0.1


def test_the_rest_is_in_eval_mode_meanwhile():
    dropout, norm = nn.Dropout(0.9), nn.BatchNorm2d(1)
    reestimate_batch_norm(nn.Sequential(dropout, norm), [torch.ones(8, 1, 2, 2)])
    assert norm.running_mean.item() == 1  # nothing was dropped
    assert dropout.training


def test_networks_without_statistics_see_no_batches():
    def batches():
        raise AssertionError("a pass over the data for nothing")
        yield

    for net in (nn.Linear(2, 2), nn.BatchNorm2d(2, track_running_stats=False)):
        reestimate_batch_norm(net, batches())


def test_a_restored_average_goes_on(make_net):
    net, whole = make_net(), WeightAverage()
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        randomize(net, generator)
        whole.update(net)
        if step == 1:
            restored = WeightAverage()
            restored.load_state_dict(copy.deepcopy(whole.state_dict()))
        elif step > 1:
            restored.update(net)
    assert restored.count == 4
    assert all(torch.equal(restored.mean[name], mean) for name, mean in whole.mean.items())


@given(decay=st.floats(0.01, 0.99), n=st.integers(1, 8))
def test_the_moving_average_by_its_definition(make_net, decay, n):
    net = make_net()
    average, expected = MovingAverage(net, decay), None
    generator = torch.Generator().manual_seed(n)
    for _ in range(n):
        randomize(net, generator)
        net(torch.rand(4, 1, 4, 4, generator=generator))  # moves the statistics
        average.update(net)
        now = {k: v.clone().double() for k, v in net.state_dict().items()}
        expected = now if expected is None else {
            k: decay * v + (1 - decay) * now[k] for k, v in expected.items()}
    for name, value in average.network(net, []).state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert value == net.state_dict()[name]


def test_the_first_update_is_a_copy_and_the_network_is_left_alone(make_net):
    net = make_net()
    average = MovingAverage(make_net(1), 0.9)
    before = copy.deepcopy(net.state_dict())
    average.update(net)
    kept = average.network(net, []).state_dict()
    assert all(torch.equal(kept[k], v) and torch.equal(net.state_dict()[k], v)
               for k, v in before.items())
    randomize(net, torch.Generator().manual_seed(1))
    assert torch.equal(kept["4.weight"], before["4.weight"])
    assert not average.network(net, []).training


def test_a_restored_moving_average_goes_on(make_net):
    net, whole, restored = make_net(), MovingAverage(make_net(), 0.7), None
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        randomize(net, generator)
        whole.update(net)
        if step == 1:
            restored = MovingAverage(make_net(3), 0.7)
            restored.load_state_dict(copy.deepcopy(whole.state_dict()))
        elif step > 1:
            restored.update(net)
    first, second = (a.network(net, []).state_dict() for a in (whole, restored))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_ema_update(make_net):
    average, net = make_net(0), make_net(1)
    before = copy.deepcopy(average.state_dict())
    net[1].num_batches_tracked.fill_(7)
    ema_update(average, net, 0.75)
    for name, value in average.state_dict().items():
        new = net.state_dict()[name]
        expected = 0.75 * before[name] + 0.25 * new if value.is_floating_point() else new
        torch.testing.assert_close(value, expected)
