import pytest
import torch
from torch import nn

from memloc.replay import Calls


class Counting(nn.Linear):
    """Counts how often it runs."""

    runs = 0

    def forward(self, images):
        self.runs += 1
        return super().forward(images)


@pytest.fixture
def model():
    return nn.Sequential(Counting(3, 3), Counting(3, 3), Counting(3, 2))


def test_what_ended_before_is_not_run_again_and_the_result_is_the_same(model):
    calls, images = Calls(model), torch.rand(4, 3)
    with calls.recorded():
        logits = model(images)
    with calls.replayed(before=calls.start([model[2]])):
        assert model(images).equal(logits)
    assert [layer.runs for layer in model] == [1, 1, 2]


def test_a_replayed_batch_is_repeated(model):
    calls, images = Calls(model), torch.rand(4, 3)
    with calls.recorded():
        logits = model(images)
    with calls.replayed(before=calls.start([model[1]]), times=3):
        assert torch.allclose(model(torch.cat([images] * 3)), torch.cat([logits] * 3))
    assert model[0].runs == 1


def test_what_was_written_into_since_runs_again():
    model, images = nn.Sequential(Counting(3, 3), nn.ReLU(inplace=True), Counting(3, 2)), torch.randn(4, 3)
    calls = Calls(model)
    with torch.no_grad(), calls.recorded():
        logits = model(images)
    with torch.no_grad(), calls.replayed(before=calls.start([model[2]])):
        assert model(images).equal(logits)


def test_afterwards_everything_runs_again_also_after_an_error(model):
    calls, images = Calls(model), torch.rand(4, 3)
    with calls.recorded():
        model(images)
    with pytest.raises(ZeroDivisionError), calls.replayed(before=float("inf")):
        raise ZeroDivisionError
    model(images)
    assert [layer.runs for layer in model] == [2, 2, 2]
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model)
