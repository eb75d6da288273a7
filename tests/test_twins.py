import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from memloc.copies import Descent
from memloc.randomness import generator
from memloc.twins import _is_degenerate, _visits, flip_probability, train_twins


def recorded():
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    data = np.load(Path(folder) / "xrm_mat_synthetic.npz")
    return {name: torch.from_numpy(data[name]) for name in data}


def misled(count=120, classes=2, share=0.1, features=12, seed=0):
    """Examples with a weak feature that is right and a strong one that misleads about a share of them."""
    draw = generator(seed, "test")
    labels = torch.arange(count) % classes
    is_misled = torch.arange(count) < share * count
    attributes = torch.where(is_misled, (labels + 1) % classes, labels)
    signal = torch.cat([nn.functional.one_hot(labels, classes), 4 * nn.functional.one_hot(attributes, classes)], 1)
    noise = 0.5 * torch.randn(count, features, generator=draw)
    return torch.cat([signal - signal.float().mean(0), noise], 1), labels, is_misled


def test_recorded_flips_give_the_weights_and_mistakes_of_the_reference_code():
    data = recorded()
    labels, validation = data["y_tr"].long(), (data["x_va"], data["y_va"].long())
    flips = np.unpackbits(data["flips_packed"].numpy(), axis=1)[:, None, :800].astype(bool)
    found = train_twins(
        data["x_tr"],
        labels,
        Descent(steps=1500, learning_rate=0.01),
        bias=False,
        flips=torch.from_numpy(flips),
        assignment=data["assign_a"].T.bool(),
        validation=validation,
    )
    for ours, theirs in zip(found.networks.weights[0], (data["W_a"], data["W_b"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-7)
    torch.testing.assert_close(found.held_out[0], data["ho_logits"], rtol=0, atol=1e-5)
    assert torch.equal(found.mistakes[0], data["cross_mistake_tr"].bool())
    assert torch.equal(found.cross_mistakes(*validation)[0], data["cross_mistake_va"].bool())
    assert not found.is_degenerate.any()


def test_the_minority_is_found_by_every_one_of_20_seeds():
    data = recorded()
    minority = data["y_tr"] != data["m_tr"]
    assert minority.sum() == 66
    descent = Descent(steps=1500, learning_rate=0.01)
    found = train_twins(data["x_tr"], data["y_tr"].long(), descent, seeds=range(20)).mistakes
    right = (found & minority).sum(1)
    assert (right / 66).min() >= 0.95
    assert (right / found.sum(1)).min() >= 0.95


def by_loops(features, labels, descent, seed, start, classes):
    """One pair, one example at a time, with the order and random numbers that the function draws."""
    weights = [each.clone().double() for each in start]
    assignment = torch.rand(len(labels), generator=generator(seed, "twins")) < 0.5
    flipped = labels.clone()
    for indices, uniform in islice(_visits([seed], labels[None], descent), descent.steps):
        rows = range(len(labels)) if indices is None else indices[0].tolist()
        gradients = [torch.zeros_like(each) for each in weights]
        taken = {}
        for position, row in enumerate(rows):
            x = features[row].double()
            own, other = (0, 1) if assignment[row] else (1, 0)
            same = sum(int(flipped[each] == flipped[row]) for each in rows)
            error = (weights[own] @ x).softmax(0)
            error[flipped[row]] -= 1
            gradients[own] += torch.outer(error, x) / same
            p = (weights[other] @ x).softmax(0)
            if uniform[0, position] < (p.max() - 1 / classes) * classes / (classes - 1):
                taken[row] = p.argmax()
        for row, label in taken.items():
            flipped[row] = label
        for each, gradient in zip(weights, gradients, strict=True):
            each -= descent.learning_rate * gradient
    return weights, flipped


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("classes", [2, 3])
def test_pairs_learn_and_flip_as_the_definition_says(classes, batch_size):
    features, labels, _ = misled(count=24, classes=classes, share=0.2, features=3)
    descent = Descent(steps=12, learning_rate=0.5, batch_size=batch_size)
    found = train_twins(features, labels, descent, seeds=[3, 5], bias=False)
    width = features.shape[1]
    for pair, seed in enumerate((3, 5)):
        start = torch.zeros(2, classes, width)
        weights, flipped = by_loops(features, labels, descent, seed, start, classes)
        ours = found.networks.weights[0].view(2, 2, classes, width)[pair]
        torch.testing.assert_close(ours, torch.stack(weights).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(found.flipped_labels[pair], flipped)
    assert (found.flipped_labels != labels).any(), "the test needs flips"


@pytest.mark.usefixtures("global_generator_untouched")
@pytest.mark.parametrize("batch_size", [None, 50])
def test_a_pair_is_trained_as_it_would_be_alone(batch_size):
    features, labels, _ = misled()
    rates = (0.05, 0.2, 0.05)
    together = train_twins(
        features, labels, Descent(steps=40, learning_rate=rates, batch_size=batch_size), seeds=[0, 0, 4], hidden=[6]
    )
    for pair, (seed, rate) in enumerate(zip((0, 0, 4), rates, strict=True)):
        descent = Descent(steps=40, learning_rate=rate, batch_size=batch_size)
        alone = train_twins(features, labels, descent, seeds=[seed], hidden=[6])
        torch.testing.assert_close(together.held_out[pair], alone.held_out[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(together.assignment[pair], alone.assignment[0])
    assert not torch.equal(together.assignment[0], together.assignment[2])
    assert not torch.allclose(together.held_out[0], together.held_out[1])


def test_pairs_may_have_examples_of_their_own():
    sets = [misled(seed=seed) for seed in (0, 1)]
    features, labels = (torch.stack([each[part] for each in sets]) for part in (0, 1))
    labels[1] = 1 - labels[1]
    descent = Descent(steps=40, learning_rate=0.05)
    together = train_twins(features, labels, descent, seeds=[0, 1], validation=(features, labels))
    for pair in (0, 1):
        alone = train_twins(features[pair], labels[pair], descent, seeds=[pair])
        torch.testing.assert_close(together.held_out[pair], alone.held_out[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(together.mistakes[pair], alone.mistakes[0])


@pytest.mark.parametrize(("classes", "hidden"), [(2, []), (3, []), (2, [16])])
def test_those_that_the_strong_feature_misleads_are_found(classes, hidden):
    features, labels, is_misled = misled(count=300, classes=classes)
    descent = Descent(steps=300, learning_rate=0.05)
    found = train_twins(features, labels, descent, seeds=[0, 1, 2], hidden=hidden)
    assert torch.equal(found.mistakes, is_misled.expand(3, -1))
    assert torch.equal(found.environments, (2 * labels + is_misled).expand(3, -1))
    assert torch.equal(found.infer(features, labels), found.environments)
    assert not found.is_degenerate.any()
    torch.testing.assert_close(found.flip_rate, (found.flipped_labels != labels).float().mean(1))
    assert (found.flip_rate > 0.05).all()


def test_held_out_logits_are_those_of_the_twin_that_did_not_see_the_example():
    features, labels = torch.randn(120, 14, generator=generator(0, "noise")), torch.arange(120) % 2
    found = train_twins(features, labels, Descent(steps=30, learning_rate=0.1), seeds=[0, 1], flips=False)
    a, b = found.networks.logits(features).view(2, 2, 120, 2).unbind(1)
    for pair in range(2):
        for row in range(120):
            other = b if found.assignment[pair, row] else a
            assert torch.equal(found.held_out[pair, row], other[pair, row])
    wrong = (a.argmax(2) != labels) | (b.argmax(2) != labels)
    assert torch.equal(found.mistakes, wrong)
    assert not torch.equal(a.argmax(2), b.argmax(2)), "twins that find no rule disagree"
    assert 40 < found.assignment[0].sum() < 80


def test_without_flips_labels_stay_and_repeated_flips_repeat_the_training():
    features, labels, _ = misled()
    descent = Descent(steps=30, learning_rate=0.1)
    still = train_twins(features, labels, descent, flips=False)
    assert torch.equal(still.flipped_labels, labels[None])
    never = train_twins(features, labels, descent, flips=torch.zeros(30, 1, 120, dtype=torch.bool))
    assert torch.equal(never.held_out, still.held_out)
    always = train_twins(features, labels, descent, flips=torch.ones(30, 1, 120, dtype=torch.bool))
    assert not torch.equal(always.held_out, still.held_out)


def test_classes_count_alike_unless_examples_are_to():
    features, labels, _ = misled()
    labels[30:] = 0
    one = torch.ones(1, 120, dtype=torch.bool)
    for balanced in (True, False):
        descent = Descent(steps=1, learning_rate=1.0)
        found = train_twins(features, labels, descent, bias=False, assignment=one, flips=False, balanced=balanced)
        weight = torch.zeros(2, features.shape[1], requires_grad=True)
        losses = cross_entropy(features @ weight.T, labels, reduction="none")
        loss = losses[labels == 0].mean() + losses[labels == 1].mean() if balanced else losses.mean()
        (expected,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(found.networks.weights[0][0], -expected)
        assert not found.networks.weights[0][1].any(), "twin B saw nothing"


@pytest.mark.parametrize("classes", [2, 5])
def test_the_sure_flip_and_the_ignorant_do_not(classes):
    logits = torch.randn(30, classes, generator=generator(0, "test"))
    probability, predicted = flip_probability(logits)
    for row, found, k in zip(logits, probability, predicted, strict=True):
        p = row.softmax(0)
        assert k == p.argmax()
        assert found.item() == pytest.approx((p.max().item() - 1 / classes) * classes / (classes - 1), abs=1e-6)
    assert flip_probability(torch.zeros(1, classes))[0].item() == pytest.approx(0, abs=1e-6)


def test_pairs_that_tell_no_examples_of_a_class_apart_are_degenerate():
    features, labels, _ = misled()
    descent = Descent(steps=200, learning_rate=(0.1, 0.0))
    found = train_twins(features, labels, descent, seeds=[0, 0])
    assert found.is_degenerate.tolist() == [False, True]  # a pair that never learned predicts class 0 for all
    assert (found.flipped_labels[0] != labels).any()
    assert found.flip_rate[1] == 0
    easy = features[12:], labels[12:]
    found = train_twins(features, labels, descent, seeds=[0, 0], validation=easy)
    assert found.is_degenerate.tolist() == [True, True]
    assert found.flip_rate[0] == 0
    table = found.table()
    assert list(table.columns) == ["pair", "seed", "learning_rate", "flip_rate", "mistakes", "is_degenerate"]
    assert table.mistakes[0] == pytest.approx(found.mistakes[0].float().mean().item())


def test_a_class_is_split_only_if_some_of_it_are_mistakes_and_some_are_not():
    labels = torch.tensor([[0, 0, 2, 2]])
    for mistakes, expected in (([1, 0, 0, 1], False), ([0, 0, 0, 1], True), ([1, 1, 0, 1], True), ([1, 0, 1, 1], True)):
        assert _is_degenerate(labels, torch.tensor([mistakes]).bool()).tolist() == [expected]


def test_every_pass_visits_each_example_once_with_a_random_number_of_its_own():
    labels = torch.zeros(2, 10, dtype=torch.int64)
    visits = list(islice(_visits([0, 1], labels, Descent(batch_size=4)), 6))
    assert [len(uniform[0]) for _, uniform in visits] == [4, 4, 2, 4, 4, 2]
    orders = []
    for part in (visits[:3], visits[3:]):
        indices, uniform = (torch.cat(each, 1) for each in zip(*part, strict=True))
        assert (indices.sort(1).values == torch.arange(10)).all()
        assert all(len(own.unique()) == 10 for own in uniform)
        orders += [*indices.tolist(), *uniform.tolist()]
    assert len({str(each) for each in orders}) == 8


def test_a_class_that_no_label_has_is_no_obstacle():
    features, labels, _ = misled()
    found = train_twins(features, labels, Descent(steps=20, learning_rate=0.1), classes=4)
    assert found.held_out.shape == (1, 120, 4)
    assert found.held_out.isfinite().all()


def test_twins_that_have_diverged_are_wrong_about_everything():
    features, labels, _ = misled()
    found = train_twins(features * float("nan"), labels, Descent(steps=1))
    assert found.mistakes.all()
    assert found.is_degenerate.all()


def test_nothing_found_hangs_on_a_graph():
    features, labels, _ = misled()
    found = train_twins(features, labels, Descent(steps=2), hidden=[3])
    assert not found.held_out.requires_grad
    assert not any(each.requires_grad for each in found.networks.parameters)


def test_what_does_not_fit_is_refused_in_one_line():
    features, labels, _ = misled()
    descent = Descent(steps=3)
    with pytest.raises(ValueError, match=r"features and labels must have shapes"):
        train_twins(features.expand(2, -1, -1), labels, descent, seeds=[0, 1, 2])
    with pytest.raises(ValueError, match="classes must be at least 2 and more than any label, got 1 with labels to 0"):
        train_twins(features, labels * 0, descent)
    with pytest.raises(ValueError, match="got 2 with labels to 2"):
        train_twins(features, labels + 1, descent, classes=2)
    with pytest.raises(ValueError, match=r"assignment must be bool of shape \(1, 120\), got torch.bool \(120,\)"):
        train_twins(features, labels, descent, assignment=labels.bool())
    with pytest.raises(ValueError, match=r"flips must be bool of shape \(3, 1, 120\), got torch.int64"):
        train_twins(features, labels, descent, flips=torch.ones(3, 1, 120, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"features must be torch.float32 \(N, 16\) or"):
        train_twins(features, labels, descent, validation=(features[:, 1:], labels))
    with pytest.raises(ValueError, match="features and validation labels must have shapes"):
        train_twins(features, labels, descent, validation=(features, labels[:, None, None]))
    with pytest.raises(ValueError, match="labels must be 120 int64 from 0, as many as there are features, got 119"):
        train_twins(features, labels, descent).cross_mistakes(features, labels[1:])
    with pytest.raises(ValueError, match="seeds must hold one for each pair, got none"):
        train_twins(features, labels, descent, seeds=[])
