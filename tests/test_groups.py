import dataclasses
import math

import pytest
import torch

from memloc import labelnoise, models
from memloc.groups import GroupedData, group_accuracies, group_counts, grouped, worst_group_accuracy
from memloc.recipes import Settings
from memloc.training import train

NAMES = ("bird", "fish", "frog"), ("land", "water")


@pytest.fixture
def split(device):
    labels = torch.tensor([0, 1, 2, 2, 1, 0, 2], device=device)
    attributes = torch.tensor([0, 0, 1, 1, 1, 0, 0], device=device)
    images = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(0)).to(device)
    return grouped(images, labels, attributes)


@pytest.fixture
def data(split):
    return GroupedData("animals", NAMES[0], split, split, split, NAMES[1])


@pytest.fixture
def several():
    """Predictions of three networks on forty examples of which group 4 has none."""
    rng = torch.Generator().manual_seed(0)
    labels, groups = torch.randint(3, (40,), generator=rng), torch.randint(4, (40,), generator=rng)
    return torch.randint(3, (3, 40), generator=rng), labels, groups


def test_a_group_is_label_times_attributes_plus_attribute(split):
    assert split.groups.tolist() == [0, 2, 5, 5, 3, 0, 4]


def test_names_and_counts_of_groups_are_in_the_order_of_their_numbers(data):
    table = data.table()
    assert data.num_groups == 6
    assert list(data.group_names[:3]) == ["bird, land", "bird, water", "fish, land"]
    assert table["group"].tolist() == list(data.group_names)
    assert (table["label"] * 2 + table["attribute"]).tolist() == list(range(6))
    assert table["train"].tolist() == [2, 0, 1, 1, 1, 2]
    assert table["validation"].sum() == table["test"].sum() == 7


def test_the_table_counts_each_split_by_itself(data, split):
    part = grouped(split.images[:3], split.labels[:3], split.attributes[:3])
    one = grouped(split.images[:1], split.labels[:1], split.attributes[:1])
    table = dataclasses.replace(data, validation=part, test=one).table()
    assert table[["train", "validation", "test"]].sum().tolist() == [7, 3, 1]


def test_labels_that_differ_from_the_true_ones_are_noisy(split):
    flipped = grouped(split.images, split.labels.roll(1), split.attributes, true_labels=split.labels)
    assert torch.equal(flipped.noise_mask, split.labels.roll(1) != split.labels)
    assert torch.equal(flipped.groups, 2 * split.labels.roll(1) + split.attributes)
    assert not split.noise_mask.any()


def test_true_labels_are_a_copy(split):
    split.labels.zero_()
    assert split.true_labels.tolist() == [0, 1, 2, 2, 1, 0, 2]


def test_label_noise_keeps_attributes_validation_and_test(data):
    noisy = labelnoise.apply(data, "flip", 0.5, seed=0)
    assert isinstance(noisy, GroupedData)
    assert noisy.train.noise_mask.sum() == 3
    assert torch.equal(noisy.train.attributes, data.train.attributes)
    assert torch.equal(noisy.train.groups, 2 * noisy.train.labels + data.train.attributes)
    assert noisy.validation is data.validation
    assert noisy.test is data.test


def test_moving_to_a_device_takes_everything_along(data):
    moved = data.to("meta")
    for part in (moved.train, moved.validation, moved.test):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            assert value == 2 if field.name == "num_attributes" else value.device.type == "meta"
    assert (moved.name, moved.classes, moved.attribute_names) == ("animals", *NAMES)


def test_a_training_takes_grouped_images_and_feature_vectors(data, split):
    vectors = grouped(split.images.flatten(1), split.labels, split.attributes)
    features = GroupedData("vectors", NAMES[0], vectors, vectors, vectors, NAMES[1])
    settings = Settings(epochs=1, batch_size=4, learning_rate=0.1)
    for each, model in ((data, models.mlp(16, 3, 4)), (features, torch.nn.Linear(16, 3))):
        assert len(train(model, each, settings, progress=False)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributes": torch.zeros(7)}, r"attributes must be int64 \(7,\), one per image, got torch.float32 \(7,\)"),
        (
            {"attributes": torch.zeros(6, dtype=torch.int64)},
            r"attributes must be int64 \(7,\).* got torch.int64 \(6,\)",
        ),
        ({"attributes": torch.arange(7)}, "attributes must be from 0 to 1, got 0 to 6"),
        ({"attributes": -torch.ones(7, dtype=torch.int64)}, "attributes must be from 0 to 1, got -1 to -1"),
        ({"labels": torch.zeros(7)}, r"labels must be int64 \(7,\), one per image, got torch.float32"),
        ({"labels": torch.zeros(1, dtype=torch.int64)}, r"labels must be int64 \(7,\).* got torch.int64 \(1,\)"),
        ({"true_labels": torch.zeros(6, dtype=torch.int64)}, r"true_labels must be int64 \(7,\)"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(changes, message):
    ones = torch.ones(7, dtype=torch.int64)
    arguments = {"images": torch.zeros(7, 2), "labels": ones, "attributes": ones} | changes
    with pytest.raises(ValueError, match=message):
        grouped(**arguments)


def test_names_have_to_be_as_many_as_attributes(split):
    with pytest.raises(ValueError, match=r"attribute_names must be one per attribute, 2, got 3 \(a, b, c\)"):
        GroupedData("animals", NAMES[0], split, split, split, ("a", "b", "c"))


def test_counts_are_those_of_a_loop_and_empty_groups_count(several, device):
    _, _, groups = several
    counts = group_counts(groups.to(device), 5)
    assert counts.tolist() == [sum(group == wanted for group in groups.tolist()) for wanted in range(5)]
    assert group_counts(groups[:0], 2).tolist() == [0, 0]


@pytest.mark.parametrize(("groups", "found"), [([0, 4], "0 to 4"), ([-1, 0], "-1 to 0")])
def test_groups_out_of_range_are_refused(groups, found):
    with pytest.raises(ValueError, match=f"groups must be from 0 to 3, got {found}"):
        group_counts(torch.tensor(groups), 4)


def test_accuracies_of_several_networks_are_those_of_a_loop(several, device):
    predictions, labels, groups = several
    found = group_accuracies(*(tensor.to(device) for tensor in several), 5)
    assert found.shape == (3, 5)
    for network in range(3):
        for group in range(4):
            right = [int(predictions[network, index] == labels[index]) for index in range(40) if groups[index] == group]
            assert found[network, group].item() == sum(right) / len(right)
        assert found[network, 4].isnan()
        one = group_accuracies(predictions[network], labels, groups, 5)
        assert torch.equal(one.nan_to_num(2), found[network].cpu().nan_to_num(2))


def test_the_counts_weigh_group_accuracies_to_the_accuracy(several):
    predictions, labels, groups = several
    weighted = (group_accuracies(predictions, labels, groups, 4) * group_counts(groups, 4)).sum(1) / 40
    torch.testing.assert_close(weighted, (predictions == labels).double().mean(1))


@pytest.mark.parametrize("shapes", [((3,), (4,), (4,)), ((4,), (4,), (3,)), ((), (4,), (4,)), ((4, 4), (4, 4), (4, 4))])
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match=r"predictions, labels and groups must be \(..., N\), \(N,\) and \(N,\), got"):
        group_accuracies(*(torch.zeros(shape, dtype=torch.int64) for shape in shapes), 2)


def test_the_worst_group_is_the_minimum_over_groups_with_examples():
    nan = math.nan
    found = worst_group_accuracy(torch.tensor([[0.5, nan, 0.25], [nan, 1.0, 1.0], [nan, nan, nan], [0.0, nan, 1.0]]))
    assert found[[0, 1, 3]].tolist() == [0.25, 1.0, 0.0]
    assert found[2].isnan()
