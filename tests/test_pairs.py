import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memloc import datasets, dropout, evaluation, models, observers, pairs, training
from memloc.observers import Batch
from memloc.pairs import Pair, cross_mistakes, environments, held_out_logits
from memloc.randomness import derive, generator, seeded
from memloc.recipes import Settings, learning_rate

QUICK = Settings(epochs=3, batch_size=24, learning_rate=0.1)


def network(tiny, seed, model="mlp", **options):
    channels, size = tiny.train.images.shape[1:3]
    return models.build(model, in_channels=channels, size=size, seed=seed, **{"num_classes": 10, "width": 8} | options)


def make(tiny, seed=0, **options):
    """Two networks with initial weights of their own."""
    pair = Pair(*(network(tiny, derive(seed, twin), **options) for twin in "AB"), tiny.train.labels, seed)
    return pair.to(tiny.train.labels.device)


def fitted(tiny, settings=QUICK, **options):
    pair = make(tiny, **options)
    training.train(pair, tiny, settings, loss=pair.loss)
    return pair


def batch(indices, labels):
    return Batch(torch.zeros(len(indices), 1, 8, 8), labels, torch.zeros(len(indices), dtype=torch.bool), indices)


class Constant(nn.Module):
    """Gives the same logits for every image."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


def misled(count=300):
    """Images with a strong attribute that goes along with the label of nine in ten, and a weak one that always does."""
    draw = generator(0, "test")
    labels = torch.arange(count) % 2
    attributes = labels ^ (torch.rand(count, generator=draw) < 0.1).long()
    images = torch.randn(count, 1, 8, 8, generator=draw)
    images[:, 0, 0] += 0.7 * (2 * labels - 1)[:, None]
    images[:, 0, 7] += 2.0 * (2 * attributes - 1)[:, None]
    return images, labels, attributes


# The loss.


def by_loops(tiny, settings, seed, **options):
    """The definition, one example at a time, with the order and the random numbers of the training."""
    device = tiny.train.images.device
    twins = [network(tiny, derive(seed, twin), **options).to(device) for twin in "AB"]
    parameters = [parameter for twin in twins for parameter in twin.parameters()]
    optimizer = torch.optim.SGD(
        parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    is_first = torch.rand(64, generator=generator(seed, "twins")) < 0.5
    flipped, step, masks = tiny.train.labels.tolist(), 0, []
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(64, generator=generator(settings.seed, "order", epoch))
        for indices in order.split(settings.batch_size):
            uniform = torch.rand(len(indices), generator=generator(seed, "flips", step))
            logits = [twin(tiny.train.images[indices]) for twin in twins]
            of_class, taken, mask = {}, {}, []
            for row, index in enumerate(indices.tolist()):
                own, other = (0, 1) if is_first[index] else (1, 0)
                loss = -logits[own][row].log_softmax(0)[flipped[index]]
                of_class.setdefault(flipped[index], []).append(loss)
                shares = logits[other][row].detach().softmax(0)
                classes = len(shares)
                mask.append(bool(uniform[row] < (shares.max() - 1 / classes) * classes / (classes - 1)))
                if mask[-1]:
                    taken[index] = int(shares.argmax())
            optimizer.param_groups[0]["lr"] = learning_rate(settings, (step + 0.5) / (3 * settings.epochs))
            optimizer.zero_grad()
            sum(sum(losses) / len(losses) for losses in of_class.values()).backward()
            optimizer.step()
            for index, label in taken.items():
                flipped[index] = label
            masks.append(mask)
            step += 1
    return twins, flipped, masks


@pytest.mark.parametrize("num_classes", [10, 12])
def test_a_pair_learns_and_flips_as_the_definition_says(tiny, num_classes):
    # 24 of 64 digits leave classes out, and of 12 outputs two have no example at all.
    settings = Settings(epochs=4, batch_size=24, learning_rate=0.2, momentum=0.7, weight_decay=0.01, seed=5)
    pair = fitted(tiny, settings, seed=3, num_classes=num_classes)
    twins, flipped, masks = by_loops(tiny, settings, 3, num_classes=num_classes)
    assert sum(map(sum, masks)) > 5, "the test needs flips"
    assert pair.flipped_labels.tolist() == flipped
    for ours, theirs in zip((pair.first, pair.second), twins, strict=True):
        for name, value in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-4, atol=1e-5, msg=name)


def test_recorded_flips_give_the_weights_and_mistakes_of_the_reference_code(monkeypatch):
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    recorded = np.load(Path(folder) / "xrm_mat_synthetic.npz")
    data = {name: torch.from_numpy(recorded[name]) for name in recorded}
    images, labels = data["x_tr"][:, None, None], data["y_tr"].long()
    flips = iter(torch.from_numpy(np.unpackbits(recorded["flips_packed"], axis=1)[:, :800]))
    twins = [nn.Sequential(nn.Flatten(), nn.Linear(40, 2, bias=False)) for _ in "AB"]
    pair = Pair(*twins, labels)
    for parameter in pair.parameters():
        nn.init.zeros_(parameter)
    pair.assignment.copy_(data["assign_a"].flatten().bool())
    monkeypatch.setattr(pairs, "flip_probability", lambda held_out: (next(flips).float(), held_out.argmax(1)))
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.01)
    for _ in range(1500):
        optimizer.zero_grad()
        pair.loss(pair(images), batch(torch.arange(800), labels)).mean().backward()
        optimizer.step()
    for ours, theirs in zip((pair.first, pair.second), ("W_a", "W_b"), strict=True):
        torch.testing.assert_close(ours[1].weight.data, data[theirs], rtol=0, atol=1e-6)
    torch.testing.assert_close(held_out_logits(pair, images), data["ho_logits"], rtol=0, atol=1e-5)
    assert torch.equal(cross_mistakes(pair, images, labels), data["cross_mistake_tr"].bool())
    validation = data["x_va"][:, None, None], data["y_va"].long()
    assert torch.equal(cross_mistakes(pair, *validation), data["cross_mistake_va"].bool())


def test_the_mean_of_the_losses_is_the_sum_of_the_means_of_the_classes_there_are():
    labels = torch.tensor([0, 0, 0, 2, 2, 1])
    pair = Pair(Constant(1.0, 0.0, -1.0), Constant(0.5, 2.0, 0.0), labels)
    for indices in (torch.arange(6), torch.tensor([0, 1]), torch.tensor([5, 3])):
        pair.flipped_labels.copy_(labels)
        logits = torch.randn(len(indices), 2, 3)
        losses = pair.loss(logits, batch(indices, labels[indices]))
        own = torch.where(pair.assignment[indices, None], logits[:, 0], logits[:, 1])
        each = F.cross_entropy(own, labels[indices], reduction="none")
        means = [each[labels[indices] == label].mean() for label in labels[indices].unique()]
        torch.testing.assert_close(losses.mean(), sum(means))


def test_logits_of_low_precision_have_the_loss_and_the_flips_of_full_precision():
    labels, logits = torch.arange(64) % 3, torch.randn(64, 2, 3).bfloat16()
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        pair = Pair(Constant(0.0, 0.0, 0.0), Constant(1.0, 0.0, 0.0), labels)
        found[dtype] = pair.loss(logits.to(dtype), batch(torch.arange(64), labels)), pair.flipped_labels
    for low, full in zip(*found.values(), strict=True):
        assert low.dtype == full.dtype
        assert torch.equal(low, full)


def test_only_its_own_half_moves_a_network(tiny):
    pair = make(tiny)
    logits = pair(tiny.train.images)
    gradient = torch.autograd.grad(pair.loss(logits, batch(tiny.train.indices, tiny.train.labels)).sum(), logits)[0]
    assert ((gradient[:, 0] != 0).any(1) == pair.assignment).all()
    assert ((gradient[:, 1] != 0).any(1) == ~pair.assignment).all()


def test_a_sure_network_gives_its_class_to_the_others_half_and_one_that_knows_nothing_gives_none():
    labels = torch.zeros(64, dtype=torch.int64)
    pair = Pair(Constant(0.0, 0.0, 100.0), Constant(0.0, 0.0, 0.0), labels)
    pair.loss(pair(torch.zeros(64, 1, 8, 8)), batch(torch.arange(64), labels))
    assert torch.equal(pair.flipped_labels, torch.where(pair.assignment, 0, 2))


def test_logits_of_one_network_are_refused(tiny):
    pair = make(tiny).eval()
    with pytest.raises(ValueError, match=r"shape \(B, 2, K\), got \(64, 10\): put the pair in training mode"):
        pair.loss(pair(tiny.train.images), batch(tiny.train.indices, tiny.train.labels))


@pytest.mark.parametrize(("logits", "wrong"), [((0.0, 1.0), 2), ((0.0, 1.0), -1), ((0.0,), 0)])
def test_labels_that_are_no_class_are_refused_in_the_first_step(logits, wrong):
    labels = torch.tensor([0, 0, wrong])
    pair = Pair(Constant(*logits), Constant(*logits), labels)
    with pytest.raises(ValueError, match=r"labels must be from 0 to K - 1, and K at least 2, got .* with K = [12]"):
        pair.loss(pair(torch.zeros(2, 1, 8, 8)), batch(torch.arange(2), labels[:2]))
    assert torch.equal(pair.flipped_labels, labels)


def test_examples_that_the_pair_has_no_labels_of_are_refused_in_the_first_step():
    pair = Pair(Constant(0.0, 0.0), Constant(0.0, 0.0), torch.tensor([0, 1]))
    with pytest.raises(
        ValueError, match="indices must be below 2, the labels of the pair, got 0 to 2: give it them all"
    ):
        pair.loss(pair(torch.zeros(3, 1, 8, 8)), batch(torch.arange(3), torch.tensor([0, 1, 0])))


# Its training.


def test_in_evaluation_mode_a_pair_gives_the_mean_of_both_which_the_history_measures(tiny):
    pair, watch = make(tiny), observers.Predictions()
    history = training.train(pair, tiny, QUICK, loss=pair.loss, observers=[watch])
    mean = (evaluation.predict(pair.first, tiny.train.images) + evaluation.predict(pair.second, tiny.train.images)) / 2
    torch.testing.assert_close(evaluation.predict(pair, tiny.train.images), mean)
    assert history.loss.iloc[-1] == pytest.approx(F.cross_entropy(mean, tiny.train.labels).item())
    assert torch.equal(watch.table()["predictions"][-1].long(), mean.argmax(1).cpu())
    assert pair.train()(tiny.train.images).shape == (64, 2, 10)


@pytest.mark.usefixtures("global_generator_untouched")
def test_a_pair_depends_on_its_seed_alone(tiny):
    one, again, other = (fitted(tiny, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.flipped_labels, again.flipped_labels)
    assert torch.equal(held_out_logits(one, tiny.train.images), held_out_logits(again, tiny.train.images))
    assert not torch.equal(one.assignment, other.assignment)
    with seeded(7, "test"):
        draws = fitted(tiny)  # whatever the global generator's state is
    assert torch.equal(one.flipped_labels, draws.flipped_labels)


def test_a_copy_from_a_state_dict_flips_the_same_labels(tiny):
    pair = fitted(tiny, Settings(epochs=1, batch_size=16, learning_rate=0.5))
    other = make(tiny, seed=0)
    other.load_state_dict(copy.deepcopy(pair.state_dict()))
    for _ in range(5):
        for each in (pair, other):
            each.loss(each(tiny.train.images), batch(tiny.train.indices, tiny.train.labels))
        assert torch.equal(pair.flipped_labels, other.flipped_labels)
    assert (pair.flipped_labels != tiny.train.labels).any(), "the test needs flips"


def test_fp16_trains_once_its_scale_has_come_down_to_the_sum_over_classes(tiny):
    pair = fitted(tiny, Settings(epochs=3, batch_size=16, learning_rate=0.1, precision="fp16"), model="small_cnn")
    before = held_out_logits(make(tiny, model="small_cnn"), tiny.train.images)
    assert (held_out_logits(pair, tiny.train.images) - before).abs().amax(1).min() > 0


@pytest.mark.parametrize("numerics", [{"precision": "bf16"}, {"channels_last": True}])
def test_networks_with_batch_norm_are_trained_in_low_precision_and_any_layout(tiny, numerics):
    settings = Settings(epochs=1, batch_size=64, learning_rate=0.1, **numerics)
    plain = fitted(tiny, Settings(epochs=1, batch_size=64, learning_rate=0.1), model="small_cnn")  # one step
    kinds = set()

    def watched(logits, seen):
        losses = pair.loss(logits, seen)
        kinds.add(losses.dtype)
        return losses

    pair = make(tiny, model="small_cnn")
    history = training.train(pair, tiny, settings, loss=watched)
    assert kinds == {torch.float32}
    assert history.loss.notna().all()
    found, before = (
        held_out_logits(each, tiny.train.images, **numerics) for each in (pair, make(tiny, model="small_cnn"))
    )
    expected = held_out_logits(plain, tiny.train.images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1 * (before - expected).abs().max()


def test_the_networks_own_dropout_and_example_tied_dropout_are_switched_off_for_held_out_predictions(tiny):
    pair = make(tiny)
    for twin, kind in ((pair.first, "tied"), (pair.second, "standard")):
        dropout.insert(twin, kind, count=64)
    training.train(pair, tiny, QUICK, loss=pair.loss)
    found = held_out_logits(pair, tiny.train.images)
    first = evaluation.predict(pair.first, tiny.train.images, mode="drop")
    assert torch.equal(found[~pair.assignment], first[~pair.assignment])
    assert torch.equal(found, held_out_logits(pair, tiny.train.images))


def test_a_network_that_writes_into_its_images_leaves_those_of_the_other_alone(tiny):
    def rectified():
        return nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 10))

    first, second = rectified(), nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(64, 10))
    pair = Pair(first, second, tiny.train.labels.cpu())
    images = tiny.train.images.cpu()
    assert torch.equal(pair(images.clone())[:, 1], second(images))


def test_layer_groups_are_those_of_both_networks(tiny):
    twins = (models.resnet9(1, width=2) for _ in range(2))
    pair = Pair(*twins, tiny.train.labels)
    groups = models.layer_groups(pair)
    assert list(groups)[:2] == ["first.conv0", "first.conv1"]
    assert groups["second.linear"] == ["second.linear.weight"]
    assert len(groups) == 18


# What it finds.


def test_held_out_logits_are_those_of_the_network_that_did_not_learn_from_the_example():
    labels = torch.zeros(50, dtype=torch.int64)
    pair = Pair(Constant(1.0, 0.0), Constant(0.0, 2.0), labels)
    found = held_out_logits(pair, torch.zeros(50, 1, 8, 8))
    assert pair.assignment.any()
    assert (found[pair.assignment] == torch.tensor([0.0, 2.0])).all()
    assert (found[~pair.assignment] == torch.tensor([1.0, 0.0])).all()
    assert all(module.training for module in pair.modules())


@pytest.mark.parametrize(
    ("second", "expected"), [((0.0, 1.0), [True, True]), ((1.0, 0.0), [False, True]), ((0.0, float("nan")), [True] * 2)]
)
def test_a_cross_mistake_is_one_of_either_network(second, expected):
    labels = torch.tensor([0, 1])
    pair = Pair(Constant(1.0, 0.0), Constant(*second), torch.tensor([0, 0, 1]))
    images = torch.zeros(2, 1, 8, 8)
    assert cross_mistakes(pair, images, labels).tolist() == expected
    assert environments(pair, images, labels).tolist() == [expected[0], 2 + expected[1]]


def test_the_examples_that_a_strong_attribute_misleads_are_found(device):
    images, labels, attributes = misled()
    data = datasets.from_arrays(images, labels, images, labels, device=device)
    for seed in range(3):
        twins = (models.build("mlp", in_channels=1, size=8, num_classes=2, width=16, seed=9 * seed + n) for n in (1, 2))
        pair = Pair(*twins, labels, seed)
        settings = Settings(epochs=10, batch_size=32, learning_rate=0.05, weight_decay=0.0, seed=seed)
        training.train(pair, data, settings, loss=pair.loss)
        found, minority = cross_mistakes(pair, data.train.images, data.train.labels).cpu(), attributes != labels
        assert (found & minority).sum() >= 0.95 * minority.sum()
        assert (found & minority).sum() >= 0.95 * found.sum()
        assert torch.equal(environments(pair, data.train.images, data.train.labels).cpu(), 2 * labels + found)
        assert (pair.flipped_labels.cpu() != labels)[minority].float().mean() > 0.9


def test_what_cannot_be_a_pair_is_refused(tiny):
    labels = tiny.train.labels
    one, other = network(tiny, 0), network(tiny, 1)
    with pytest.raises(ValueError, match="two networks of one architecture, got the same one twice"):
        Pair(one, one, labels)
    with pytest.raises(ValueError, match="two networks of one architecture, got the same one twice"):
        Pair(nn.Sequential(one), nn.Sequential(one), labels)
    with pytest.raises(ValueError, match=r"got parameters linear0.weight \(8, 64\) and linear0.weight \(9, 64\)"):
        Pair(one, network(tiny, 1, width=9), labels)
    with pytest.raises(ValueError, match=r"got parameters 2.weight \(4, 4\) and none"):
        layers = nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4)
        Pair(nn.Sequential(*layers), nn.Sequential(*copy.deepcopy(layers[:2])), labels)
    with pytest.raises(ValueError, match=r"labels must be int64 \(N,\), got torch.float32 \(64,\)"):
        Pair(one, other, labels.float())


def test_what_does_not_fit_a_pair_is_refused(tiny):
    pair = make(tiny)
    with pytest.raises(ValueError, match="images must be all 64 training examples, got 3"):
        held_out_logits(pair, torch.zeros(3, 1, 8, 8))
    for labels in (torch.zeros(2, dtype=torch.int64), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"labels must be int64 \(3,\), one per image, got torch.(int64|float32)"):
            cross_mistakes(pair, torch.zeros(3, 1, 8, 8), labels)
    for method in (held_out_logits, cross_mistakes, environments):
        with pytest.raises(ValueError, match="pair must be a Pair, got Sequential: fit a recipe with loss='xrm'"):
            method(network(tiny, 0), tiny.train.images, *[tiny.train.labels][: method is not held_out_logits])
