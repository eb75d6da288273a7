import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from memloc.copies import Copies, Descent, make_copies
from memloc.ensembles import Grouped, Training, _drawn, _prioritise, train_copies
from memloc.randomness import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"))


def examples(count=60, features=5, classes=3, groups=4, seed=0):
    draw = generator(seed, "labels")
    labels = torch.randint(0, classes, (count,), generator=draw)
    return Grouped(normal(count, features, seed=seed), labels, torch.randint(0, groups, (count,), generator=draw))


def by_hand(copies, copy, data, steps, rate, loss):
    """Train one copy as a plain module on all examples; the loss is of logits and labels of all of them."""
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    model.load_state_dict(copies.state(copy))
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(model(data.features), data.labels), tuple(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return model


def assert_same(copies, copy, model):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(copies.state(copy)[name], value, rtol=1e-4, atol=1e-5)


def test_weighted_and_shifted_training_is_that_of_a_loop_over_copies():
    data, rates = examples(), (0.1, 0.5)
    copies = make_copies(5, 3, [0, 1], hidden=[4])
    weights, shift = torch.rand(2, 60, generator=generator(0, "weights")), normal(2, 60, 3, seed=3)
    descent = Descent(steps=8, learning_rate=rates)
    found = train_copies(copies, data, descent, weights=weights, shift=shift)
    for copy, rate in enumerate(rates):

        def loss(logits, labels, copy=copy):
            losses = cross_entropy(logits + shift[copy], labels, reduction="none")
            return (weights[copy] * losses).sum() / weights[copy].sum()

        assert_same(found.copies, copy, by_hand(copies, copy, data, 8, rate, loss))
    plain = train_copies(copies, data, descent)
    assert_same(plain.copies, 0, by_hand(copies, 0, data, 8, 0.1, cross_entropy))


def test_smoothed_labels_are_torch_s():
    data, copies = examples(), make_copies(5, 3, [0], hidden=[4])
    found = train_copies(copies, data, Descent(steps=8, learning_rate=0.3), smoothing=0.2)

    def loss(logits, labels):
        return cross_entropy(logits, labels, label_smoothing=0.2)

    assert_same(found.copies, 0, by_hand(copies, 0, data, 8, 0.3, loss))


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_dropout_switches_off_what_the_last_layer_sees_and_scales_the_rest(hidden):
    data, copies = examples(), make_copies(5, 3, [0, 1], hidden=hidden)
    found = train_copies(copies, data, Descent(steps=1, learning_rate=0.3), dropout=0.25).copies
    for copy in range(2):
        state = {name: value.clone().requires_grad_() for name, value in copies.state(copy).items()}
        *body, head = (nn.functional.linear,) * (len(hidden) + 1)
        seen = data.features
        for _ in body:
            seen = nn.functional.relu(nn.functional.linear(seen, state["0.weight"], state["0.bias"]))
        kept = torch.rand(seen.shape, generator=generator(copy, "dropout")) >= 0.25
        last = f"{2 * len(hidden)}"
        logits = head(seen * kept / 0.75, state[f"{last}.weight"], state[f"{last}.bias"])
        cross_entropy(logits, data.labels).backward()
        for name, value in state.items():
            torch.testing.assert_close(found.state(copy)[name], (value - 0.3 * value.grad).detach())


def test_group_dro_is_that_of_a_loop_over_groups():
    data = examples(groups=6)
    data = replace(data, groups=torch.where(data.groups == 2, 1, data.groups))  # a group without examples
    copies = make_copies(5, 3, [0, 1], hidden=[4])
    found = train_copies(copies, data, Descent(steps=8, learning_rate=0.2), group_rate=0.5)
    present = [0, 1, 3, 4, 5]
    for copy in range(2):
        q = dict.fromkeys(present, 1 / 5)

        def loss(logits, labels, q=q):
            losses = cross_entropy(logits, labels, reduction="none")
            means = {group: losses[data.groups == group].mean() for group in present}
            for group in present:
                q[group] *= math.exp(0.5 * means[group].item())
            total = sum(q.values())
            for group in present:
                q[group] /= total
            return sum(q[group] * means[group] for group in present)

        assert_same(found.copies, copy, by_hand(copies, copy, data, 8, 0.2, loss))
        assert max(q.values()) > 0.21, "the test needs groups that differ"


def test_groups_that_a_batch_lacks_keep_their_weight_but_for_the_sum():
    priority = torch.tensor([[0.5, 0.25, 0.25]])
    losses, groups = torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[0, 0, 2]])
    found, factors = _prioritise(priority, losses, groups, 0.1)
    expected = torch.tensor([0.5 * math.exp(0.2), 0.25, 0.25 * math.exp(0.5)])
    torch.testing.assert_close(found[0], expected / expected.sum())
    torch.testing.assert_close(factors[0], torch.stack([found[0, 0] / 2, found[0, 0] / 2, found[0, 2]]))


def test_priorities_of_great_losses_do_not_overflow():
    priority, losses, groups = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[300.0, 301.0]]), torch.tensor([[0, 1]])
    found, factors = _prioritise(priority, losses, groups, 1.0)
    expected = torch.tensor([[1 / (1 + math.e), math.e / (1 + math.e), 0.0]])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(factors, expected[:, :2])


def test_with_rate_0_groups_count_alike():
    data = examples()
    copies = make_copies(5, 3, [0], hidden=[4])
    descent = Descent(steps=5, learning_rate=0.3)
    counts = torch.tensor([(data.groups == group).sum() for group in data.groups])
    ours = train_copies(copies, data, descent, group_rate=0.0).copies
    theirs = train_copies(copies, data, descent, weights=1 / counts).copies
    for one, other in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("global_generator_untouched")
@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("how", [{}, {"group_rate": 0.1}, {"smoothing": 0.1, "dropout": 0.5}])
def test_a_copy_is_trained_as_it_would_be_alone(batch_size, how):
    data = examples()
    together = train_copies(
        make_copies(5, 3, [0, 1, 1], hidden=[4]),
        data,
        Descent(steps=70, learning_rate=(0.1, 0.1, 0.3), batch_size=batch_size),
        **how,
    )
    descent = Descent(steps=70, learning_rate=0.3, batch_size=batch_size)
    alone = train_copies(make_copies(5, 3, [1], hidden=[4]), data, descent, **how)
    for ours, theirs in zip(together.copies.parameters, alone.copies.parameters, strict=True):
        torch.testing.assert_close(ours[2], theirs[0], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(ours[1], ours[2])


def test_copies_may_have_examples_of_their_own():
    sets = [examples(seed=seed) for seed in (0, 1)]
    data = Grouped(*(torch.stack([getattr(each, name) for each in sets]) for name in ("features", "labels", "groups")))
    copies, descent = make_copies(5, 3, [0, 1]), Descent(steps=20, learning_rate=0.1, batch_size=8, every=20)
    together = train_copies(copies, data, descent, group_rate=0.1, watch={"train": data})
    for copy in range(2):
        one = make_copies(5, 3, [copy])
        alone = train_copies(one, sets[copy], descent, group_rate=0.1, watch={"train": sets[copy]})
        torch.testing.assert_close(together.copies.weights[0][copy], alone.copies.weights[0][0])
        torch.testing.assert_close(together.accuracies("train")[:, copy], alone.accuracies("train")[:, 0])


def test_minibatches_draw_examples_by_their_weight():
    share = torch.tensor([[0.0, 0.5, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    drawn = torch.cat(list(_drawn(share, Descent(steps=200, batch_size=20), [0, 1])), 1)
    assert drawn.shape == (2, 4000)
    assert (drawn[1] == 0).all()
    torch.testing.assert_close(drawn[0].bincount() / 4000, share[0], rtol=0, atol=0.03)


def test_minibatches_of_a_shifted_loss_take_the_shift_of_their_examples():
    """A shift that tells the labels leaves nothing to learn, wherever the batch is from."""
    data = examples()
    shift = 100.0 * nn.functional.one_hot(data.labels, 3)
    copies = make_copies(5, 3, [0])
    found = train_copies(copies, data, Descent(steps=20, learning_rate=1.0, batch_size=5), shift=shift)
    torch.testing.assert_close(found.copies.weights[0], copies.weights[0])


def test_the_networks_given_stay_as_they_are_and_those_returned_have_no_graph():
    copies = make_copies(5, 3, [0])
    before = copies.clone()
    found = train_copies(copies, examples(), Descent(steps=3, learning_rate=1.0))
    assert torch.equal(copies.weights[0], before.weights[0])
    assert not torch.equal(found.copies.weights[0], before.weights[0])
    assert not found.copies.weights[0].requires_grad


def watched():
    """Three evaluations of two copies on five examples of groups 0, 1 and 3."""
    labels = torch.tensor([0, 1, 1, 0, 1])
    data = Grouped(torch.zeros(5, 1), labels, torch.tensor([0, 0, 1, 1, 3]))
    right = torch.tensor(
        [[[1, 1, 1, 0, 1], [1, 0, 0, 0, 0]], [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]], [[0, 1, 1, 0, 1]] * 2]
    )
    predictions = torch.where(right.bool(), labels, 1 - labels).to(torch.int16)
    none = Copies((0, 1), (torch.zeros(2, 2, 1),))
    return Training(none, torch.tensor([0, 10, 20]), {"test": predictions}, {"test": data}, 1.0)


def test_accuracies_are_those_of_a_loop_and_nan_for_a_group_without_examples():
    training = watched()
    found, data = training.accuracies("test"), training.watched["test"]
    assert found.shape == (3, 2, 4)
    for step in range(3):
        for copy in range(2):
            right = training.predictions["test"][step, copy] == data.labels
            for group in (0, 1, 3):
                assert found[step, copy, group] == right[data.groups == group].float().mean()
            assert found[step, copy, 2].isnan()
            assert training.average_accuracy("test")[step, copy].item() == pytest.approx(right.float().mean().item())
    expected = torch.tensor([[0.5, 0.0], [0.5, 1.0], [0.5, 0.5]])
    assert torch.equal(training.worst_group_accuracy("test"), expected)


def test_the_last_of_the_best_checkpoints_is_chosen_by_whatever_groups():
    training = watched()
    assert training.selected("test").tolist() == [2, 1]
    others = torch.tensor([0, 1, 0, 2, 0])
    scores = training.worst_group_accuracy("test", others)
    assert scores[:, 0].tolist() == [0, 0, 0]
    assert training.worst_group_accuracy("test", torch.zeros(5, dtype=torch.int64))[:, 0].tolist() == pytest.approx(
        [0.8, 0.8, 0.6]
    )
    assert training.selected("test", torch.zeros(5, dtype=torch.int64)).tolist() == [1, 1]
    own = torch.stack([others, torch.zeros(5, dtype=torch.int64)])
    assert training.selected("test", own).tolist() == [2, 1]


def test_evaluations_come_every_so_many_steps_and_at_both_ends():
    data = examples()
    copies = make_copies(5, 3, [0, 1])
    found = train_copies(copies, data, Descent(steps=25, every=10), watch={"train": data, "test": examples(seed=1)})
    assert found.steps.tolist() == [0, 10, 20, 25]
    assert torch.equal(found.predictions["train"][0], copies(data.features).argmax(2).short())
    assert torch.equal(found.predictions["train"][-1], found.copies(data.features).argmax(2).short())
    assert train_copies(copies, data, Descent(steps=1)).table().empty
    exact = train_copies(copies, data, Descent(steps=20, every=10), watch={"train": data})
    assert exact.steps.tolist() == [0, 10, 20]
    table = found.table()
    assert list(table.columns) == ["split", "step", "copy", "group", "accuracy"]
    assert len(table) == 2 * 4 * 2 * 4
    row = table[(table.split == "test") & (table.step == 20) & (table["copy"] == 1) & (table.group == 2)]
    assert row.accuracy.item() == found.accuracies("test")[2, 1, 2].item()


def test_what_does_not_fit_is_refused_in_one_line():
    data, copies, descent = examples(), make_copies(5, 3, [0, 1]), Descent(steps=1)
    with pytest.raises(ValueError, match=r"weights must have shape \(60,\) or \(2, 60\), got \(3, 60\)"):
        train_copies(copies, data, descent, weights=torch.ones(3, 60))
    with pytest.raises(ValueError, match=r"shift must have shape \(60, 3\) or \(2, 60, 3\), got \(60, 2\)"):
        train_copies(copies, data, descent, shift=torch.ones(60, 2))
    for bad in (-torch.ones(60), torch.zeros(60), torch.full((60,), math.inf), torch.full((60,), math.nan)):
        with pytest.raises(ValueError, match="weights must be finite, at least 0, and above 0 for an example of every"):
            train_copies(copies, data, descent, weights=bad)
    for bad in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"group_rate must be a finite number at least 0, got {bad}"):
            train_copies(copies, data, descent, group_rate=bad)
    with pytest.raises(
        ValueError, match=r"shift must give one number for each logit, shape \(2, 60, 3\), got \(2, 60, 1\)"
    ):
        train_copies(copies, data, descent, shift=lambda indices: torch.zeros(*indices.shape, 1))
    for bad in ({"smoothing": 1.5}, {"dropout": 1.0}, {"smoothing": float("nan")}):
        with pytest.raises(ValueError, match="smoothing must be from 0 to 1 and dropout from 0 to below 1, got"):
            train_copies(copies, data, descent, **bad)
    with pytest.raises(ValueError, match="weights must be None with group_rate in full batches"):
        train_copies(copies, data, descent, group_rate=0.1, weights=torch.ones(60))
    with pytest.raises(ValueError, match="labels must be below 3"):
        train_copies(copies, replace(data, labels=data.labels + 1), descent)
    with pytest.raises(ValueError, match="features and groups must have shapes"):
        replace(data, groups=torch.zeros(1, 1, 60, dtype=torch.int64))
    wide = replace(data, features=data.features.expand(3, -1, -1))
    with pytest.raises(ValueError, match="S = 2, got"):
        train_copies(copies, wide, descent)
    with pytest.raises(ValueError, match="S = 2, got"):
        train_copies(copies, data, descent, watch={"test": replace(data, labels=data.labels.expand(3, -1))})


def test_groups_and_splits_that_were_not_watched_are_refused_in_one_line():
    training = watched()
    for ask in (training.accuracies, training.average_accuracy, training.selected):
        with pytest.raises(ValueError, match="split must be one of test, got 'train'"):
            ask("train")
    with pytest.raises(
        ValueError, match=r"features and groups must have shapes .* with S = 2, got \(5, 1\) and \(3, 5\)"
    ):
        training.selected("test", torch.zeros(3, 5, dtype=torch.int64))


def test_a_network_that_has_diverged_is_right_about_nothing():
    data = examples()
    weights = torch.stack([torch.zeros(3, 5), torch.full((3, 5), math.nan)])
    found = train_copies(Copies((0, 1), (weights,)), data, Descent(steps=1, learning_rate=0.0), watch={"test": data})
    assert (found.predictions["test"][:, 1] == -1).all()
    assert found.average_accuracy("test")[:, 1].tolist() == [0, 0]
    assert (found.average_accuracy("test")[:, 0] > 0).all()
