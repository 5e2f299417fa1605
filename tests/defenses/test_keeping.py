"""What a training on a GPU goes on from: played by what records or refuses, without one."""

import pytest
import torch

from robench.defenses.config import TrainConfig, make_optimizer
from robench.defenses.keeping import Progress
from robench.randomness import generators, set_generators

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """The states of the generators of two GPUs."""
    states = [torch.tensor([i], dtype=torch.uint8) for i in (1, 2)]

    def put(state, device):
        states[device.index] = state

    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", put)
    return states


def test_a_gpu_goes_on_where_another_one_was(gpus):
    kept = generators(torch.device("cuda:1"))
    before = torch.rand(3)
    set_generators(kept, torch.device("cuda:0"))
    assert [state.item() for state in gpus] == [2, 2]
    assert torch.equal(torch.rand(3), before)


def test_a_training_goes_on_on_another_kind_of_device(gpus):
    for one, other in ((CPU, torch.device("cuda:0")), (torch.device("cuda:0"), CPU)):
        kept = generators(one)
        before = torch.rand(3)
        set_generators(kept, other)
        assert torch.equal(torch.rand(3), before)
    assert [state.item() for state in gpus] == [1, 2]


class OnGpu(torch.Tensor):
    """One that is elsewhere until it is asked for."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_adamw_counts_its_steps_on_the_cpu_when_it_goes_on():
    def progress():
        net = torch.nn.Linear(2, 2)
        optimizer = make_optimizer(TrainConfig(epochs=1, optimizer="adamw"), net)
        return Progress({"student": net}, {"student": optimizer}, {}, {})

    begun, again = progress(), progress()
    begun.nets["student"](torch.ones(1, 2)).sum().backward()
    begun.optimizers["student"].step()
    state = begun.state_dict()
    for kept in state["optimizers"]["student"]["state"].values():
        kept["step"] = kept["step"].as_subclass(OnGpu)  # where all of the file is read to
    again.load_state_dict(state)
    steps = [kept["step"] for kept in again.optimizers["student"].state.values()]
    assert [(type(step), step.item()) for step in steps] == [(torch.Tensor, 1.0)] * 2
