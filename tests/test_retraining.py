import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from memloc import evaluation, models, retraining, vision
from memloc.observers import Checkpoints
from memloc.randomness import generator
from memloc.recipes import Recipe, Settings, learning_rate
from memloc.retraining import BATCH_NORM, PAPER, retrain
from memloc.rewinding import rewind
from memloc.training import fit, load_model, prepare, train

QUICK = Settings(epochs=2, batch_size=16, learning_rate=0.05, schedule="triangle")


@pytest.fixture(scope="module")
def trained(tiny):
    """A network trained for eight epochs, and its initial weights."""
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    checkpoints = Checkpoints([0])
    train(model, tiny, Settings(epochs=8, batch_size=16, learning_rate=0.1), observers=[checkpoints])
    return model, checkpoints.states[0]


def weights(model):
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def states(trained, data, group, settings=QUICK, **keywords):
    """The weights after each epoch of a retraining."""
    checkpoints = Checkpoints()
    retrain(*trained, group, data, settings, observers=[checkpoints], **keywords)
    return checkpoints.states


def changed(before, after):
    return {name for name in before if not torch.equal(before[name].cpu(), after[name].cpu())}


@pytest.mark.usefixtures("global_generator_untouched")
@pytest.mark.parametrize("keywords", [{"batch_norm": "keep"}, {"batch_norm": "follow"}, {"whole": True}], ids=str)
def test_the_network_is_as_before_afterwards_to_the_bit(trained, tiny, keywords):
    model, before = trained[0], weights(trained[0])
    model.conv2.eval()
    retrain(*trained, "conv1", tiny, QUICK, **keywords)
    assert changed(before, weights(model)) == set()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [model.conv1.training, model.conv2.training] == [True, False]
    model.train()


@pytest.mark.parametrize("group", ["conv0", "conv2", "linear"])
def test_nothing_but_the_group_and_its_own_statistics_changes_to_the_bit(trained, tiny, group):
    before = weights(trained[0])
    for epoch, state in states(trained, tiny, group, batch_norm="keep").items():
        if epoch > 0:
            assert changed(before, state) == {name for name in before if name.startswith(group)}


@pytest.mark.parametrize("group", ["conv0", "conv2", "linear"])
def test_when_the_statistics_follow_all_of_them_change_but_no_other_parameter(trained, tiny, group):
    before = weights(trained[0])
    state = states(trained, tiny, group, batch_norm="follow")[2]
    assert changed(before, state) == set(models.layer_groups(trained[0])[group]) | (
        set(before) - {name for name, _ in trained[0].named_parameters()}
    )


def test_the_whole_network_is_trained_when_asked(trained, tiny):
    state = states(trained, tiny, "conv1", whole=True)[2]
    assert changed(weights(trained[0]), state) == set(state)


@pytest.mark.parametrize("whole", [False, True])
def test_epoch_zero_is_the_network_with_the_parameters_of_one_group_reset(trained, tiny, whole):
    (model, initial), before = trained, weights(trained[0])
    state = states(trained, tiny, "conv1", whole=whole)[0]
    names = models.layer_groups(model)["conv1"]
    assert changed(before, state) == set(names)
    assert all(torch.equal(state[name], initial[name].cpu()) for name in names)


def by_hand(trained, data, group, settings, batch_norm, whole):
    """The accuracies of a retraining as an explicit loop with torch's optimizer."""
    model = copy.deepcopy(trained[0])
    for name in models.layer_groups(model)[group]:
        model.get_parameter(name).data.copy_(trained[1][name])
    clean = (~data.train.noise_mask).nonzero()[:, 0]
    optimizer = torch.optim.SGD(
        model.parameters() if whole else model.get_submodule(group).parameters(),
        lr=1.0, momentum=settings.momentum, weight_decay=settings.weight_decay,
    )  # fmt: skip
    found, steps, done = [evaluation.evaluate(model, data).accuracies], math.ceil(len(clean) / settings.batch_size), 0
    for epoch in range(1, settings.epochs + 1):
        order = torch.randperm(len(clean), generator=generator(settings.seed, "order", epoch))
        for indices in clean[order].split(settings.batch_size):
            optimizer.param_groups[0]["lr"] = learning_rate(settings, (done + 0.5) / steps / settings.epochs)
            if batch_norm == "keep" and not whole:
                model.eval()
                model.get_submodule(group).train()
            else:
                model.train()
            model.zero_grad()
            nn.functional.cross_entropy(model(data.train.images[indices]), data.train.labels[indices]).backward()
            optimizer.step()
            done += 1
        found.append(evaluation.evaluate(model, data).accuracies)
    return tuple(found)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize("group", ["conv1", "linear"])
def test_it_agrees_with_an_explicit_loop_over_the_clean_examples(trained, tiny, group, batch_norm, whole):
    keywords = {"batch_norm": batch_norm, "whole": whole}
    found = retrain(*trained, group, tiny, QUICK, **keywords).accuracies
    assert found == by_hand(trained, tiny, group, QUICK, **keywords)
    assert len(set(found)) == 3


@pytest.mark.parametrize("keywords", [{"batch_norm": "keep"}, {"batch_norm": "follow"}, {"whole": True}], ids=str)
def test_no_noisy_example_ever_enters_a_step(trained, tiny, keywords):
    images = tiny.train.images.clone()
    images[tiny.train.noise_mask] = float("nan")
    poisoned = replace(tiny, train=replace(tiny.train, images=images))
    before = states(trained, tiny, "conv1", **keywords)[2]
    after = states(trained, poisoned, "conv1", **keywords)[2]
    assert changed(before, after) == set()


def test_a_retraining_depends_on_the_seed_of_its_settings(trained, tiny):
    first, again, other = (states(trained, tiny, "conv1", replace(QUICK, seed=seed))[2] for seed in (0, 0, 1))
    assert changed(first, again) == set()
    assert "conv1.0.weight" in changed(first, other)


def test_it_works_on_the_network_and_the_checkpoints_of_a_kept_run(device):
    recipe = Recipe(examples=64, epochs=2, batch_size=16, width=4, noise_rate=0.25)
    run, data = fit(recipe, device=device), prepare(recipe, device)
    model, initial = load_model(run, device=device), run.checkpoint(0)
    found = retrain(model, initial, "conv3", data, replace(recipe, epochs=1))
    with rewind(model, initial, "conv3"):
        assert found.accuracies[0] == evaluation.evaluate(model, data).accuracies
    assert len(found.accuracies) == 2


@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_after_so_many_epochs_with_every_clean_example_right(tiny, patience):
    model = models.mlp(64, width=64).to(tiny.train.images.device)
    train(model, tiny, Settings(epochs=30, batch_size=16, learning_rate=0.1))
    settings = Settings(epochs=9, learning_rate=0)  # nothing is lost, and nothing is learned
    found = retrain(model, model.state_dict(), "linear1", tiny, settings, patience=patience)
    assert [each.clean for each in found.accuracies] == [1.0] * (patience + 1)


def test_epochs_that_count_for_stopping_need_not_follow_each_other_and_the_reset_is_none(trained, tiny, monkeypatch):
    asked = []

    def fake(model, data, settings, *, stop, **keywords):
        rows = [{"clean_accuracy": value} for value in (1.0, 1.0, 0.9, 1.0, 0.99, 1.0)]
        asked.extend(stop(rows[:count]) for count in range(1, 7))
        return train(model, data, settings, **keywords)

    monkeypatch.setattr(retraining, "train", fake)
    retrain(*trained, "linear", tiny, QUICK)
    assert asked == [False, False, False, False, False, True]


def test_it_trains_for_all_epochs_while_clean_examples_are_wrong(trained, tiny):
    found = retrain(*trained, "conv1", tiny, replace(QUICK, epochs=4, learning_rate=1e-6), patience=1)
    assert len(found.accuracies) == 5


def test_without_noisy_examples_clean_ones_are_trained_on_and_noisy_accuracy_is_no_number(trained, tiny):
    clean = tiny.with_labels(tiny.train.true_labels)
    table = retrain(*trained, "conv1", clean, QUICK).table()
    assert table.noisy_accuracy.isna().all()
    assert table.clean_accuracy.between(0, 1).all()


@pytest.mark.parametrize("count", [0, 1])
def test_without_clean_examples_it_is_refused(trained, tiny, count):
    mask = tiny.train.indices >= count
    data = tiny.with_labels(tiny.train.labels, mask)
    with pytest.raises(ValueError, match=f"at least two clean examples to train on, got {count} of 64"):
        retrain(*trained, "conv1", data, QUICK)


@pytest.mark.parametrize("batch_size", [47, 512])
def test_no_batch_of_one_example_reaches_batch_norm(tiny, batch_size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    assert int((~tiny.train.noise_mask).sum()) == 48  # and 48 = 47 + 1
    found = retrain(model, model.state_dict(), "1", tiny, Settings(epochs=1, batch_size=batch_size))
    assert len(found.accuracies) == 2


def test_batches_grow_by_as_little_as_leaves_no_single_example():
    for examples in range(2, 40):
        for batch_size in range(2, 45):
            found = retraining._without_batch_of_one(batch_size, examples)
            assert found == next(size for size in range(batch_size, 100) if examples % size != 1)


def test_gradients_of_layers_below_the_group_are_not_computed(trained, tiny):
    model, needed = copy.deepcopy(trained[0]), {}
    for name, block in model.named_children():
        block.register_forward_hook(
            lambda module, inputs, output, name=name: needed.setdefault(name, set()).add(output.requires_grad)
        )
    retrain(model, trained[1], "conv2", tiny, QUICK)
    with_a_gradient = {name for name, seen in needed.items() if True in seen and name[-1].isdigit()}
    assert with_a_gradient == {"conv2", "after2", "conv3", "after3"}


@pytest.mark.parametrize(
    ("group", "keywords", "message"),
    [
        ("conv9", {}, "group must be one of conv0, .*, got 'conv9'"),
        ("conv1", {"batch_norm": "freeze"}, "batch_norm must be one of keep, follow, got 'freeze'"),
        ("conv1", {"patience": 0}, "patience must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(trained, tiny, group, keywords, message):
    with pytest.raises(ValueError, match=message):
        retrain(*trained, group, tiny, QUICK, **keywords)


def test_initial_weights_of_another_network_are_refused(trained, tiny):
    model, initial = trained
    with pytest.raises(ValueError, match=r"initial must hold linear.weight of shape \(10, 16\), got nothing"):
        retrain(model, {}, "linear", tiny, QUICK)
    with pytest.raises(ValueError, match=r"of shape \(10, 16\), got \(10, 3\)"):
        retrain(model, initial | {"linear.weight": torch.zeros(10, 3)}, "linear", tiny, QUICK)


def test_the_table_has_a_row_for_every_epoch(trained, tiny):
    found = retrain(*trained, "conv1", tiny, QUICK)
    table = found.table()
    assert list(table.columns) == [
        "layer_group", "whole", "batch_norm", "epoch",
        "clean_accuracy", "noisy_accuracy", "restored_accuracy", "test_accuracy",
    ]  # fmt: skip
    assert list(table.epoch) == [0, 1, 2]
    assert list(table.restored_accuracy) == [each.restored for each in found.accuracies]
    assert (set(table.layer_group), set(table.batch_norm), set(table.whole)) == ({"conv1"}, {"keep"}, {False})


def test_a_retraining_of_the_whole_network_says_that_all_statistics_followed(trained, tiny):
    assert retrain(*trained, "conv1", tiny, QUICK, batch_norm="keep", whole=True).batch_norm == "follow"


def test_the_papers_settings_are_those_of_the_reference_code():
    assert (PAPER.epochs, PAPER.batch_size, PAPER.learning_rate, PAPER.schedule) == (20, 512, 0.01, "triangle")
    assert (PAPER.momentum, PAPER.weight_decay) == (0.9, 5e-4)


def any_network(name):
    if name == "vit_small":
        return models.vit_small(in_channels=1, width=8, size=8)
    resnet = vision.torchvision().models.resnet18(num_classes=10)
    resnet.conv1 = nn.Conv2d(1, 64, 3, bias=False)
    return resnet


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize(
    ("name", "group"), [("vit_small", "block2"), pytest.param("resnet18", "layer3.0.conv1", marks=pytest.mark.slow)]
)
def test_any_network_will_do_in_any_precision_and_layout(tiny, name, group, batch_norm):
    model = any_network(name).to(tiny.train.images.device)
    before, settings = weights(model), Settings(epochs=1, batch_size=48, precision="bf16", channels_last=True)
    state = states((model, any_network(name).state_dict()), tiny, group, settings, batch_norm=batch_norm)[1]
    names, parameters = set(models.layer_groups(model)[group]), {name for name, _ in model.named_parameters()}
    assert changed(before, weights(model)) == set()
    assert changed(before, state) & parameters == names
    buffers = changed(before, state) - parameters
    if batch_norm == "keep":
        assert all(buffer.startswith(("layer3.0.conv1", "layer3.0.bn1")) for buffer in buffers)
    elif name == "resnet18":
        assert len(buffers) == 3 * 20


def test_dropout_stays_on_while_a_layer_is_retrained(tiny):
    class Drops(nn.Module):
        def forward(self, activations):
            seen.append(self.training)
            return activations

    seen = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Drops(), nn.Linear(8, 10))
    retrain(model, model.state_dict(), "3", tiny, replace(QUICK, epochs=1), batch_norm="keep")
    assert True in seen
