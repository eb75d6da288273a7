import pandas as pd
import pytest
import torch

from memloc.copies import Descent, make_copies
from memloc.ensembles import Grouped, train_copies
from memloc.leave_one_out import leave_one_out


def some(size=12, features=5, classes=2, sets=2, seed=0):
    """Examples that can be fitted, each copy's own, and linear networks that are not zero."""
    draw = torch.Generator().manual_seed(seed)
    data = torch.randn(sets, size, features, generator=draw)
    labels = torch.randint(classes, (sets, size), generator=draw)
    labels[:, :classes] = torch.arange(classes)
    groups = torch.randint(3, (sets, size), generator=draw)
    networks = make_copies(features, classes, range(sets), bias=False)
    shift = torch.randn(sets, size, classes, generator=draw)
    weights = torch.rand(sets, size, generator=draw)
    return Grouped(data, labels, groups), networks, shift, weights


def without(data, example):
    """The same examples but one, of every set."""
    rest = [index for index in range(len(data)) if index != example]
    return Grouped(data.features[:, rest], data.labels[:, rest], data.groups[:, rest]), rest


CASES = {
    "plain": {},
    "shift": {"shift": True},
    "weights": {"weights": True},
    "group weights that move": {"group_rate": 0.5},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.1},
    "a learning rate for each": {"learning_rate": (0.5, 0.1)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("features", "classes"), [(5, 2), (30, 2), (5, 4), (30, 4)])
def test_each_training_is_that_of_a_loop_which_trains_without_the_example(case, features, classes):
    data, networks, shift, weights = some(features=features, classes=classes)
    how = {"learning_rate": 0.3} | {key: value for key, value in case.items() if key not in ("shift", "weights")}
    group_rate = how.pop("group_rate", None)
    descent = Descent(steps=30, **how)
    shift, weights = (shift if "shift" in case else None), (weights if "weights" in case else None)
    groups = data.groups if group_rate is not None else None
    left_out = torch.tensor([0, 3, 11])
    found = leave_one_out(
        data.features, data.labels, left_out, descent,
        start=networks.logits(data.features), shift=shift, weights=weights, groups=groups, group_rate=group_rate,
    )  # fmt: skip
    whole = train_copies(networks, data, descent, shift=shift, weights=weights, group_rate=group_rate)
    expected = whole.copies.logits(data.features).log_softmax(2)
    torch.testing.assert_close(found.logits.log_softmax(2), expected, rtol=1e-4, atol=1e-5)
    for place, example in enumerate(left_out.tolist()):
        few, rest = without(data, example)
        theirs = {"shift": None if shift is None else shift[:, rest], "group_rate": group_rate}
        theirs["weights"] = None if weights is None else weights[:, rest]
        logits = train_copies(networks, few, descent, **theirs).copies.logits(data.features)[:, example]
        label = data.labels[:, example]
        for kept, values in ((found.without, logits), (found.probabilities, expected[:, example])):
            probability = values.softmax(1).gather(1, label[:, None])[:, 0]
            torch.testing.assert_close(kept[:, place], probability, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.is_right[:, place], logits.argmax(1) == label)


def test_weights_are_those_of_the_last_step_and_one_on_average():
    data, networks, _, weights = some()
    start, descent = networks.logits(data.features), Descent(steps=3)
    found = leave_one_out(data.features, data.labels, torch.tensor([0]), descent, start=start, weights=weights)
    torch.testing.assert_close(found.weights, weights / weights.mean(1, keepdim=True))
    found = leave_one_out(
        data.features, data.labels, torch.tensor([0]), descent, start=start, groups=data.groups, group_rate=0.0
    )
    counts = torch.stack([row.bincount()[row] for row in data.groups])
    torch.testing.assert_close(found.weights, 12 / (3 * counts))


def test_a_group_that_loses_its_only_example_counts_no_more():
    data, networks, _, _ = some(sets=1)
    alone = Grouped(data.features, data.labels, torch.tensor([[5] + [0] * 11]))
    descent, start = Descent(steps=30, learning_rate=0.3), networks.logits(data.features)
    given = {"start": start, "groups": alone.groups, "group_rate": 0.5}
    found = leave_one_out(alone.features, alone.labels, torch.tensor([0]), descent, **given)
    few, _ = without(alone, 0)
    logits = train_copies(networks, few, descent, group_rate=0.5).copies.logits(data.features)[:, 0]
    expected = logits.softmax(1)[0, data.labels[0, 0]]
    torch.testing.assert_close(found.without[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_examples_that_differ_from_set_to_set_and_sets_that_are_shared():
    data, networks, _, _ = some()
    descent, start = Descent(steps=10, learning_rate=0.3), networks.logits(data.features)
    left_out = torch.tensor([[1, 2], [5, 6]])
    both = leave_one_out(data.features, data.labels, left_out, descent, start=start)
    for copy in range(2):
        one = leave_one_out(data.features[copy], data.labels[copy], left_out[copy], descent, start=start[copy])
        torch.testing.assert_close(both.drops[copy], one.drops[0])
    shared = leave_one_out(data.features[0], data.labels[0], left_out[0], descent, start=start[:1].expand(2, -1, -1))
    torch.testing.assert_close(shared.drops[0], both.drops[0])
    assert torch.equal(shared.drops[0], shared.drops[1])


def test_one_example_and_one_class_can_be_left_out_too():
    descent = Descent(steps=5)
    alone = leave_one_out(torch.ones(1, 2), torch.tensor([0]), torch.tensor([0]), descent, start=torch.zeros(1, 2))
    assert alone.without.item() == 0.5
    assert alone.probabilities.item() > 0.5
    sure = leave_one_out(
        torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 2]), descent, start=torch.zeros(3, 1)
    )
    assert sure.drops.tolist() == [[0, 0]]


def test_features_of_less_precision_are_taken_as_they_are():
    data, networks, _, _ = some()
    start, descent = networks.logits(data.features), Descent(steps=10, learning_rate=0.3)
    rough = data.features.bfloat16()
    found = leave_one_out(rough, data.labels, torch.tensor([1, 2]), descent, start=start)
    expected = leave_one_out(rough.float(), data.labels, torch.tensor([1, 2]), descent, start=start)
    assert torch.equal(found.drops, expected.drops)


def test_nothing_left_out_is_the_training_alone():
    data, networks, _, _ = some()
    empty = torch.zeros(0, dtype=torch.int64)
    found = leave_one_out(data.features, data.labels, empty, Descent(steps=2), start=networks.logits(data.features))
    assert found.drops.shape == (2, 0)
    assert found.logits.shape == (2, 12, 2)


def test_the_table_has_a_row_for_each_copy_and_example():
    data, networks, _, _ = some()
    found = leave_one_out(
        data.features, data.labels, torch.tensor([4, 7]), Descent(steps=9), start=networks.logits(data.features)
    )
    table = found.table()
    assert list(table.columns) == ["copy", "example", "probability", "without", "drop", "is_right"]
    assert list(zip(table["copy"], table.example, strict=True)) == [(0, 4), (0, 7), (1, 4), (1, 7)]
    pd.testing.assert_series_equal(table["drop"], table.probability - table.without, check_names=False)
    assert table.without[2] == found.without[1, 0].item()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left_out": torch.tensor([12])}, r"left_out must be int64 \(M,\) or \(2, M\), positions from 0 to 11"),
        ({"left_out": torch.tensor([1.0])}, "left_out must be int64"),
        ({"left_out": torch.tensor([[1]])}, "left_out must be int64"),
        (
            {"descent": Descent(optimizer="adam")},
            "descent must be sgd on all examples .* got adam with batch_size None",
        ),
        ({"descent": Descent(batch_size=3)}, "got sgd with batch_size 3"),
        ({"group_rate": 0.1}, "group_rate must be at least 0 and come with groups and without weights"),
        ({"shift": torch.zeros(12, 3)}, r"shift must have shape \(12, 2\) or \(2, 12, 2\), got \(12, 3\)"),
        ({"weights": torch.ones(3)}, r"weights must have shape \(12,\) or \(2, 12\), got \(3,\)"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, "groups must be 12 int64"),
        ({"start": torch.zeros(2, 12, 1)}, "start must have a row for each of 12 examples and more than 1 classes"),
        ({"start": torch.zeros(2, 11, 2)}, r"start must have a row for each of 12 .* got \(2, 11, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    data, networks, _, _ = some()
    given = {"features": data.features, "labels": data.labels, "left_out": torch.tensor([0]), "descent": Descent()}
    given["start"] = networks.logits(data.features)
    with pytest.raises(ValueError, match=message):
        leave_one_out(**given | changes)
