import copy

import pytest
import torch
from torch.nn import functional as F

from memloc import models
from memloc.gates import ZERO, Gates, Unit


def test_what_lies_before_the_first_removed_unit_is_not_computed_again(trained, tiny):
    gates, calls = Gates(trained, tiny.train.images), []
    at = [gates.position(Unit("conv2.0", 1)), gates.position(Unit("conv3.0", 2))]
    for module in (trained.conv1[0], trained.conv2[0], trained.conv3[0]):
        module.forward = lambda images, module=module: (calls.append(module), type(module).forward(module, images))[1]
    try:
        with gates.attached():
            _, recorded = gates.record(tiny.train.images)
            calls.clear()
            behind = gates.logits(tiny.train.images, [[at[1]], [at[0]]])
            whole = len(calls)
    finally:
        for module in (trained.conv1[0], trained.conv2[0], trained.conv3[0]):
            del module.forward
    with gates.attached():
        _, recorded = gates.record(tiny.train.images)
        handles = [m.register_forward_pre_hook(lambda m, i: calls.append(m)) for m in trained.modules()]
        calls.clear()
        again = gates.logits(tiny.train.images, [[at[1]], [at[0]]], recorded)
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(again, behind)
    assert whole == 3
    assert trained.conv1[0] not in calls  # nor is the block around it entered
    assert trained.conv3[0] in calls


@pytest.mark.parametrize("zero", ZERO)
def test_the_score_of_a_channel_is_the_gradient_of_its_gate(trained, tiny, zero):
    images, labels = tiny.train.images[:9], tiny.train.labels[:9]
    gates = Gates(trained, images, zero=zero)
    owner = torch.zeros(9, dtype=torch.int64, device=images.device)
    with gates.attached():
        scores = gates.scores(images, owner, [[]], lambda logits: logits.softmax(1) - F.one_hot(labels, 10))
    network, by_gates = copy.deepcopy(trained).eval(), []
    for block in (network.conv0, network.conv1, network.conv2, network.conv3):
        gate = torch.ones(block[0].out_channels, 1, 1, device=images.device, requires_grad=True)
        module = block[0] if zero == "before norm" else block[2]
        module.register_forward_hook(lambda module, inputs, output, gate=gate: output * gate)
        by_gates.append(gate)
    F.cross_entropy(network(images), labels, reduction="sum").backward()
    torch.testing.assert_close(scores[0], torch.cat([gate.grad.flatten() for gate in by_gates]), rtol=1e-4, atol=1e-5)


def test_a_hidden_linear_layer_has_channels_and_the_classifier_has_none(tiny):
    gates = Gates(models.mlp(64, width=8), tiny.train.images.cpu())
    assert {gates.unit(at).path for at in range(gates.count)} == {"linear0", "linear1"}
    assert gates.count == 16


def test_resnet9_has_as_many_units_as_the_paper():
    images = torch.zeros(1, 3, 32, 32)
    assert Gates(models.resnet9(), images).count == 1344
    assert Gates(models.resnet9(), images, units="all").count == 5312


def test_an_error_inside_the_network_leaves_no_hook_behind(trained, tiny):
    gates = Gates(trained, tiny.train.images)
    with pytest.raises(RuntimeError), gates.attached():
        gates.logits(tiny.train.images.expand(-1, 3, -1, -1), [[0]])
    assert not any(module._forward_hooks for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_networks_score_alike_in_batches_of_any_size(trained, tiny):
    images, owner = tiny.train.images[:6], torch.tensor([0, 0, 0, 1, 1, 1], device=tiny.train.images.device)
    found = []
    for batch_size in (2, 256):
        gates = Gates(trained, images, units="all", batch_size=batch_size)
        with gates.attached():
            found.append(gates.scores(images, owner, [[0, 1], [5]], lambda logits: logits.softmax(1)))
    torch.testing.assert_close(*found)
