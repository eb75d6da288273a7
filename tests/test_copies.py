from itertools import pairwise

import pytest
import torch
from torch import nn

from memloc.copies import (
    Copies,
    Descent,
    Optimizer,
    balancing_weights,
    check_examples,
    cross_entropies,
    make_copies,
    sum_by,
    take,
)
from memloc.randomness import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"))


def module(copies, copy, hidden, bias):
    """One copy as a plain module."""
    sizes = [copies.weights[0].shape[2], *hidden, copies.weights[-1].shape[1]]
    layers = [nn.Linear(*pair, bias=bias) for pair in pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    model.load_state_dict(copies.state(copy))
    return model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [[], [7], [7, 6]])
def test_each_copy_computes_what_it_would_alone(hidden, bias):
    copies = make_copies(5, 3, range(4), hidden=hidden, bias=bias)
    features = normal(4, 11, 5)
    models = [module(copies, copy, hidden, bias) for copy in range(4)]
    for given, seen in ((features[0], [0, 0, 0, 0]), (features[:2], [0, 0, 1, 1]), (features, [0, 1, 2, 3])):
        expected = torch.stack([model(features[each]) for model, each in zip(models, seen, strict=True)])
        torch.testing.assert_close(copies(given), expected)


def test_evaluation_in_parts_is_evaluation_of_all():
    copies, features = make_copies(5, 3, range(2), hidden=[4]), normal(2001, 5)
    torch.testing.assert_close(copies.logits(features), copies(features))
    assert copies.hidden(features).shape == (2, 2001, 4)
    heads = Copies(copies.seeds, copies.weights[-1:], copies.biases[-1:])
    torch.testing.assert_close(heads(copies.hidden(features)), copies(features))
    assert torch.equal(make_copies(5, 3, range(2)).hidden(features), features)
    assert not copies.clone(trainable=True).logits(features).requires_grad


@pytest.mark.usefixtures("global_generator_untouched")
def test_weights_depend_on_the_copy_s_seed_alone_and_are_those_of_torch():
    copies = make_copies(50, 2, [3, 1], hidden=[40])
    alone = make_copies(50, 2, [1], hidden=[40])
    for ours, theirs in zip(copies.parameters, alone.parameters, strict=True):
        assert torch.equal(ours[1], theirs[0])
        assert not torch.equal(ours[0], theirs[0])
    assert 0.99 / 50**0.5 < copies.weights[0].abs().max() <= 1 / 50**0.5


def test_only_the_last_layer_starts_from_zero():
    copies = make_copies(5, 2, [0], hidden=[4], zero=True)
    assert [bool(each.any()) for each in copies.parameters] == [True, False, True, False]


def test_a_clone_shares_nothing():
    copies = make_copies(5, 2, [0])
    copies.clone().weights[0].zero_()
    assert copies.weights[0].any()


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({}, lambda p, lr: torch.optim.SGD(p, lr)),
        (
            {"momentum": 0.9, "weight_decay": 0.1},
            lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=0.1),
        ),
        ({"optimizer": "adam", "weight_decay": 0.1}, lambda p, lr: torch.optim.Adam(p, lr, weight_decay=0.1)),
    ],
)
def test_steps_are_those_of_torch_with_a_rate_for_each_copy(settings, build):
    rates = (0.1, 0.01, 0.0)
    copies = make_copies(5, 3, range(3), hidden=[4]).clone(trainable=True)
    models = [module(copies, copy, [4], True) for copy in range(3)]
    theirs = [build(model.parameters(), rate) for model, rate in zip(models, rates, strict=True)]
    ours = Optimizer(copies.parameters, Descent(learning_rate=rates, **settings))
    features, labels = normal(20, 5), torch.arange(20) % 3
    for _ in range(6):
        ours.step(cross_entropies(copies(features), labels.expand(3, -1)).mean(1).sum())
        for model, optimizer in zip(models, theirs, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(features), labels).backward()
            optimizer.step()
    for copy, model in enumerate(models):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(copies.state(copy)[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"optimizer": "adam"}])
def test_copies_that_go_on_without_the_others_go_on_as_before(settings):
    descent = Descent(learning_rate=(0.1, 0.2, 0.05), **settings)
    features, labels = normal(20, 5), torch.arange(20) % 3
    together, some = (make_copies(5, 3, [7, 8, 9], hidden=[4]).clone(trainable=True) for _ in range(2))
    of_all, of_some = Optimizer(together.parameters, descent), Optimizer(some.parameters, descent)
    for step in range(6):
        if step == 3:
            which = torch.tensor([True, False, True])
            some = some.only(which).clone(trainable=True)
            of_some = of_some.only(which, some.parameters)
        for copies, optimizer in ((together, of_all), (some, of_some)):
            losses = cross_entropies(copies(features), labels.expand(len(copies), -1))
            optimizer.step(losses.mean(1).sum())
    assert some.seeds == (7, 9)
    for whole, part in zip(together.parameters, some.parameters, strict=True):
        torch.testing.assert_close(part, whole[[0, 2]], rtol=1e-5, atol=1e-6)


def test_sums_and_weights_by_group_are_those_of_a_loop():
    groups, values = torch.randint(0, 4, (3, 30), generator=generator(0, "groups")), normal(3, 30)
    groups[groups == 2] = 1
    for row, (own, numbers) in enumerate(zip(groups, values, strict=True)):
        for each in range(5):
            assert sum_by(groups, values, 5)[row, each].item() == pytest.approx(
                sum(number.item() for group, number in zip(own, numbers, strict=True) if group == each), abs=1e-5
            )
        expected = [1 / sum(other == group for other in own.tolist()) for group in own.tolist()]
        torch.testing.assert_close(balancing_weights(groups)[row], torch.tensor(expected))


def test_examples_are_taken_from_what_all_share_and_from_each_copy_s_own():
    indices = torch.tensor([[4, 0], [1, 1]])
    shared, own = normal(5, 3), normal(2, 5, 3)
    assert torch.equal(take(shared, indices, 2), torch.stack([shared[row] for row in indices]))
    expected = torch.stack([values[row] for values, row in zip(own, indices, strict=True)])
    assert torch.equal(take(own, indices, 2), expected)
    assert take(own, None, 2) is own


def test_what_does_not_fit_is_refused_in_one_line():
    with pytest.raises(ValueError, match="there must be a seed, and sizes of at least 1, got 0 seeds"):
        make_copies(5, 2, [])
    with pytest.raises(ValueError, match=r"sizes \[5, 0, 2\]"):
        make_copies(5, 2, [0], hidden=[0])
    for name, value in (("steps", 0), ("batch_size", 1.5), ("every", 0), ("momentum", -1), ("weight_decay", -1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Descent(**{name: value})
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adam, got 'rmsprop'"):
        Descent(optimizer="rmsprop")
    for rate in ((0.1, 0.2), -1.0, float("nan")):
        with pytest.raises(ValueError, match="one for each of 3 copies"):
            Descent(learning_rate=rate).rates(3)
    copies = make_copies(5, 2, [0, 1])
    for bad in (
        torch.zeros(3, 4),
        torch.zeros(3, 5).double(),
        torch.zeros(3, 3, 5),
        torch.zeros(0, 3, 5),
        torch.zeros(5),
    ):
        with pytest.raises(
            ValueError, match=r"features must be torch.float32 \(N, 5\) or \(F, N, 5\) where F divides 2"
        ):
            copies(bad)
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(5, 4\)"):
        check_examples(torch.zeros(4, 3), torch.zeros(5, 4, dtype=torch.int64), 6)
    with pytest.raises(ValueError, match=r"got \(2, 4, 3\) and \(3, 4\)"):
        check_examples(torch.zeros(2, 4, 3), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"groups must be 4 int64 from 0, .* got 4 torch.float32"):
        check_examples(torch.zeros(4, 3), torch.zeros(4), name="groups")
    with pytest.raises(ValueError, match=r"labels must be 4 int64 from 0, .* got 5"):
        check_examples(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))
