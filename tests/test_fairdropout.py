import copy

import pytest
import torch
from torch import nn

from memloc import dropout, models, training
from memloc.dropout import ExampleTiedDropout, examples
from memloc.evaluation import classes, predict
from memloc.fairdropout import KINDS, TREATMENTS, FairDropout, ablate, by_group, insert, masked, treatments
from memloc.groups import GroupedData, group_accuracies, grouped
from memloc.randomness import derive, seeded
from memloc.recipes import Recipe

INDICES = torch.tensor([5, 0, 99, 5, 42])


def mixed(number):
    """SplitMix64's finaliser on an unsigned number of 64 bits, after Steele et al. (2014)."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


@pytest.fixture
def data():
    """Five features and two groups: a group of label 0, one of label 1, and two that are empty."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 2
    split = grouped(torch.randn(12, 5, generator=rng)[..., None, None], labels, labels)
    return GroupedData("made up", ("a", "b"), split, split, split, ("left", "right"))


def perceptron(**keywords):
    with seeded(0, "network"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 2))
    return insert(model, "2", shape=12, **keywords)


# Masks.


def test_masks_agree_with_an_explicit_loop_that_sorts_the_channels_of_each_example():
    step, key = 0x9E3779B97F4A7C15, derive(3, "masks", 2)
    indices = torch.tensor([0, 9, 10**12])
    found = FairDropout(20, p_gen=0.25, p_mem=0.3, seed=3, salt=2).masks_of(indices)
    for row, index in zip(found.tolist(), indices.tolist(), strict=True):
        number = {c: mixed((mixed((index * step + key) % 2**64) + c * step) % 2**64) for c in range(5, 20)}
        own = sorted(number, key=number.get)[:4]  # 0.3 of 15 is 4.5, rounded to even
        assert [channel for channel, is_on in enumerate(row) if is_on] == [*range(5), *sorted(own)]


@pytest.mark.parametrize(
    ("p_gen", "p_mem", "own"),
    [(0.2, 0.2, 10), (0.2, 0.0, 1), (0.2, 0.001, 1), (0.2, 1.0, 52), (0.0, 0.5, 32), (1.0, 0.5, 0)],
)
def test_every_example_has_the_same_number_of_memorization_channels(p_gen, p_mem, own):
    layer = FairDropout(64, 500, p_gen=p_gen, p_mem=p_mem)
    on = layer.masks_of(torch.arange(500))
    shared = int(p_gen * 64)
    assert layer.own == own
    assert (on.sum(1) == shared + own).all()
    assert on[:, :shared].all()


def test_the_share_is_the_one_that_is_on_so_that_scaled_activations_have_the_mean_of_the_masks():
    layer = FairDropout(10, 50, p_gen=0.2, p_mem=0.3)
    activations = torch.ones(50, 10)
    with examples(layer, torch.arange(50)):
        own = layer(activations)
    with examples(layer, mode="scaled"):
        torch.testing.assert_close(layer(activations).sum(1), own.sum(1))
    assert layer.p_mem == 0.25


def test_channels_are_used_evenly_and_examples_differ():
    on = FairDropout(64, p_gen=0.2, p_mem=0.1).masks_of(torch.arange(20_000))[:, 12:].double()
    share = 5 / 52
    assert ((on.mean(0) - share).abs() <= 5 * (share * (1 - share) / 20_000) ** 0.5).all()
    assert len(on.unique(dim=0)) > 19_900


def test_a_mask_depends_on_seed_salt_and_index_alone(device, global_generator_untouched):
    expected = FairDropout(64, 100).masks_of(INDICES)
    for count in (100, 4097, None):
        layer = FairDropout(64, count).to(device)
        torch.testing.assert_close(layer.masks_of(INDICES.to(device)).cpu(), expected)
    others = [FairDropout(64, seed=1), FairDropout(64, salt=1)]
    assert not any(torch.equal(other.masks_of(INDICES), expected) for other in others)


def test_more_channels_of_ones_own_include_the_fewer():
    few, many = (FairDropout(64, p_mem=share).masks_of(INDICES) for share in (0.1, 0.3))
    assert (many | ~few).all()


def test_where_as_many_are_on_by_chance_the_tied_masks_are_the_fair_ones():
    """Both rank the same random numbers: by chance all those below a level are on, here the first few."""
    tied = ExampleTiedDropout(64, p_gen=0.2, p_mem=0.1).masks_of(torch.arange(200))
    fair = FairDropout(64, p_gen=0.2, p_mem=0.1).masks_of(torch.arange(200))
    same = tied.sum(1) == fair.sum(1)
    assert same.sum() > 10
    assert torch.equal(tied[same], fair[same])


# Where it is put.


def test_it_comes_behind_any_module_and_the_rest_stays():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 2))
    images = torch.randn(4, 1, 8, 8)
    plain = model(images)
    assert insert(model, "1", shape=6, p_gen=0.5) is model
    with examples(model, mode="all"):
        assert torch.equal(model(images), plain)
    with examples(model, torch.arange(4)):
        assert not torch.equal(model(images), plain)
    assert model.get_submodule("1.0").__class__ is nn.ReLU


def test_it_replaces_a_slot_and_each_layer_has_masks_of_its_own():
    model = models.mlp(64, width=16)
    insert(insert(model, "after0", count=9), "after1", count=9)
    first, second = model.after0, model.after1
    assert (type(first), first.shape, first.salt, second.salt) == (FairDropout, (16,), 0, 1)
    assert not torch.equal(first.masks, second.masks)
    assert dropout.slots(model) == {}


@pytest.mark.parametrize(
    ("place", "keywords", "message"),
    [
        ("after7", {}, "place must be a module of the network, got 'after7'; its slots for dropout: after0, after1"),
        ("", {}, "place must be a module of the network, got ''"),
        ("relu0", {}, "shape must be the channels behind 'relu0', which is no slot for dropout, got None"),
        ("after0", {"p_gen": 2.0}, "p_gen must be a fraction from 0 to 1, got 2.0"),
        ("after0", {"count": 0}, "count must be the number of examples, at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(place, keywords, message):
    with pytest.raises(ValueError, match=message):
        insert(models.mlp(64), place, **keywords)


def test_a_recipe_can_have_it_and_its_run_comes_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMLOC_RUNS", str(tmp_path))
    recipe = Recipe(
        dropout="fair", dropout_places="after0", p_mem=0.25, model="mlp", width=12, examples=30, epochs=1, seed=3
    )
    model = training.load_model(training.fit(recipe))
    assert (type(model.after0), model.after0.own, model.after0.count) == (FairDropout, 2, 30)
    assert type(model.after1) is dropout.Slot
    assert torch.equal(model.after0.masks, FairDropout(12, 30, p_gen=0.2, p_mem=0.25, seed=3).masks)
    everywhere = training.load_model(training.fit(Recipe(dropout="fair", model="mlp", examples=30, epochs=0)))
    assert (everywhere.after0.salt, everywhere.after1.salt) == (0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_that_recipes_know(kind):
    assert Recipe(dropout=kind).dropout == kind


# Other masks.


def test_inside_the_block_examples_have_other_masks_and_afterwards_their_own(data):
    layer = FairDropout(12, 3)
    before, activations = layer.masks, torch.ones(2, 12)
    other = torch.arange(36).reshape(3, 12) % 5 == 0
    with pytest.raises(RuntimeError, match="stop"), masked(layer, other), examples(layer, torch.tensor([2, 0])):
        assert torch.equal(layer(activations).bool(), other[[2, 0]])
        raise RuntimeError("stop")
    assert layer.masks is before


@pytest.mark.parametrize("masks", [torch.ones(3, 12), torch.ones(3, 11).bool(), torch.ones(2, 12).bool()])
def test_masks_of_another_kind_or_shape_are_refused(masks):
    with pytest.raises(ValueError, match=r"masks must be bool \(3, 12\), got"), masked(FairDropout(12, 3), masks):
        pass


@pytest.mark.parametrize("kind", [FairDropout, ExampleTiedDropout])
def test_treatments_agree_with_an_explicit_loop_over_examples_and_channels(kind):
    layer = kind(12, 9, p_gen=0.5, p_mem=0.4)
    indices = torch.tensor([3, 0, 7])
    found = treatments(layer, indices, seed=1)
    assert tuple(found) == TREATMENTS
    own = layer.masks_of(indices)
    for row, channel in [(row, channel) for row in range(3) for channel in range(12)]:
        mine, another, shared = own[row, channel], own[row - 1, channel], channel < 6
        expected = {
            "own": shared or mine,
            "another's": shared or another,
            "none": shared,
            "all": True,
            "all but own": shared or not mine,
            "all but another's": shared or not another,
        }
        assert {name: bool(found[name][row, channel]) for name in expected} == {k: bool(v) for k, v in expected.items()}
    fewer = found["own, fewer shared"]
    assert torch.equal(fewer[:, 6:], own[:, 6:])
    assert (6 - fewer[:, :6].sum(1)).tolist() == own[:, 6:].sum(1).clamp(max=6).tolist()
    assert not torch.equal(fewer, treatments(layer, indices, seed=2)["own, fewer shared"])


def test_where_there_are_fewer_generalization_channels_than_own_ones_all_of_them_go():
    layer = FairDropout(10, p_gen=0.2, p_mem=0.5)
    fewer = treatments(layer, torch.arange(4))["own, fewer shared"]
    assert not fewer[:, :2].any()
    assert (fewer[:, 2:].sum(1) == 4).all()


def test_ablation_agrees_with_networks_whose_activations_are_masked_by_hand(data, global_generator_untouched):
    model = perceptron(count=12, p_gen=0.25, p_mem=0.3)
    state = copy.deepcopy(model.state_dict())
    found = ablate(model, data, seed=4, batch_size=5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    train, layer = data.train, model[2][1]
    hidden = model[2][0](model[1](train.images.flatten(1)))
    for row, masks in zip(found.accuracies, treatments(layer, train.indices, seed=4).values(), strict=True):
        predictions = model[3](hidden * masks).argmax(1)
        torch.testing.assert_close(row, group_accuracies(predictions, train.labels, train.groups, 4), equal_nan=True)
    table = found.table()
    assert list(table.columns) == ["a, left", "a, right", "b, left", "b, right"]
    assert list(table.index) == list(TREATMENTS)
    assert table.loc["own", "a, left"] == found.accuracies[0, 0]


def test_own_and_none_are_the_modes_of_the_layer(data):
    model = perceptron(p_gen=0.25, p_mem=0.3)
    found = ablate(model, data).table()
    for mode, name in {"own": "own", "drop": "none", "all": "all"}.items():
        expected = by_group(model, data.train, 4, mode=mode)
        torch.testing.assert_close(torch.tensor(found.loc[name].to_numpy()), expected, equal_nan=True)


def test_a_network_without_tied_dropout_has_nothing_to_switch(data):
    with pytest.raises(ValueError, match="model must have a layer of example-tied dropout, got none"):
        ablate(nn.Sequential(nn.Flatten(), nn.Linear(5, 2)), data)


def test_accuracies_of_groups_are_of_the_first_examples_in_the_mode_asked_for(data):
    model = perceptron(p_gen=0.5)
    few = data.train
    answers = classes(predict(model, few.images[:7], mode="scaled"))
    expected = group_accuracies(answers, few.labels[:7], few.groups[:7], 4)
    torch.testing.assert_close(by_group(model, few, 4, mode="scaled", most=7), expected, equal_nan=True)
