import os
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from memloc import ensembles
from memloc.baselines import METHODS, balanced_subset, compare
from memloc.copies import Descent, balancing_weights, make_copies
from memloc.ensembles import Grouped, train_copies
from memloc.mat import logit_shift
from memloc.randomness import generator
from memloc.twins import train_twins

SEEDS = (0, 3)
DESCENT = Descent(steps=200, learning_rate=0.02)


def examples(count, share, seed, noise=60):
    """A weak feature that is right, a strong one that misleads about a share, and noise to memorize by."""
    draw = generator(seed, "test")
    labels = torch.arange(count) % 2
    attributes = torch.where(torch.arange(count) < share * count, 1 - labels, labels)
    signal = torch.stack([2 * labels - 1, 3 * (2 * attributes - 1)], 1)
    features = torch.cat([signal, torch.randn(count, noise, generator=draw)], 1)
    return Grouped(features, labels, 2 * labels + attributes)


TRAIN, VALIDATION, TEST = examples(200, 0.1, 0), examples(200, 0.5, 1), examples(600, 0.5, 2)


@pytest.fixture(scope="module")
def found():
    twins = train_twins(TRAIN.features, TRAIN.labels, DESCENT, seeds=SEEDS)
    return compare(
        TRAIN,
        VALIDATION,
        TEST,
        DESCENT,
        seeds=SEEDS,
        methods=tuple(METHODS),
        environments=twins.environments,
        inferred=twins.infer(VALIDATION.features, VALIDATION.labels),
        shift=logit_shift(twins.held_out, TRAIN.labels),
        group_rate=0.1,
        first_steps=30,
    )


def last_loss(found, method, weights, shift=0.0):
    """What a method should have made small, and the same for plain training, for the first copy."""
    losses = []
    for name in (method, "erm"):
        logits = found.trainings[name].copies.logits(TRAIN.features)[0]
        losses.append((weights * cross_entropy(logits + shift, TRAIN.labels, reduction="none")).sum().item())
    return losses


def test_weights_and_subsets_make_small_what_they_say(found):
    for method, groups in (("class_weights", TRAIN.labels), ("group_weights", TRAIN.groups)):
        weights = balancing_weights(groups)
        mine, plain = last_loss(found, method, weights)
        assert mine <= plain * 1.001
        again = train_copies(make_copies(62, 2, SEEDS, zero=True), TRAIN, DESCENT, weights=weights)
        torch.testing.assert_close(found.trainings[method].copies.weights[0], again.copies.weights[0])
    for method, groups in (("class_subset", TRAIN.labels), ("group_subset", TRAIN.groups)):
        chosen = balanced_subset(groups, SEEDS)
        mine, plain = last_loss(found, method, chosen[0].float())
        assert mine <= plain * 1.001
        again = train_copies(make_copies(62, 2, SEEDS, zero=True), TRAIN, DESCENT, weights=chosen.float())
        torch.testing.assert_close(found.trainings[method].copies.weights[0], again.copies.weights[0])


def test_group_dro_takes_the_groups_that_its_name_says(found):
    twins = train_twins(TRAIN.features, TRAIN.labels, DESCENT, seeds=SEEDS)
    for method, groups in (
        ("groupdro_class", TRAIN.labels),
        ("groupdro", TRAIN.groups),
        ("groupdro_xrm", twins.environments),
    ):
        data = replace(TRAIN, groups=groups)
        again = train_copies(make_copies(62, 2, SEEDS, zero=True), data, DESCENT, group_rate=0.1)
        torch.testing.assert_close(found.trainings[method].copies.weights[0], again.copies.weights[0])


def test_mat_follows_the_shift_and_every_method_starts_alike(found):
    start = {name: training.predictions["test"][0] for name, training in found.trainings.items()}
    assert all(torch.equal(each, start["erm"]) for each in start.values())
    assert not torch.equal(found.trainings["mat"].copies.weights[0], found.trainings["erm"].copies.weights[0])


def test_the_controls_are_plain_training_but_for_the_labels_or_the_dropout(found):
    for method, how in (("label_smoothing", {"smoothing": 0.1}), ("dropout", {"dropout": 0.5})):
        again = train_copies(make_copies(62, 2, SEEDS, zero=True), TRAIN, DESCENT, **how)
        torch.testing.assert_close(found.trainings[method].copies.weights[0], again.copies.weights[0])
        assert not torch.equal(again.copies.weights[0], found.trainings["erm"].copies.weights[0])


def test_the_mistakes_of_a_short_training_count_more_in_jtt(found):
    start = make_copies(62, 2, SEEDS, zero=True)
    first = train_copies(start, TRAIN, replace(DESCENT, steps=30)).copies
    wrong = first.logits(TRAIN.features).argmax(2) != TRAIN.labels
    assert wrong.any(1).all(), "the test needs mistakes"
    again = train_copies(start, TRAIN, DESCENT, weights=torch.where(wrong, 20.0, 1.0))
    torch.testing.assert_close(found.trainings["jtt"].copies.weights[0], again.copies.weights[0])


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_the_last_layer_is_trained_again_on_validation_examples_whose_groups_count_alike(hidden):
    descent = Descent(steps=20, learning_rate=0.05)
    tilted = Grouped(VALIDATION.features[60:], VALIDATION.labels[60:], VALIDATION.groups[60:])
    found = compare(TRAIN, tilted, TEST, descent, seeds=SEEDS, methods=["erm", "dfr"], hidden=hidden).trainings
    base, heads = found["erm"].copies, found["dfr"].copies
    for copy in range(2):
        state = base.state(copy)
        body = nn.Sequential(nn.Linear(62, 8), nn.ReLU()) if hidden else nn.Sequential()
        body.load_state_dict({name: value for name, value in state.items() if hidden and name.startswith("0")})
        seen = body(tilted.features).detach()
        head = nn.Linear(seen.shape[1], 2)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        for _ in range(20):
            losses = cross_entropy(head(seen), tilted.labels, reduction="none")
            optimizer.zero_grad()
            torch.stack([losses[tilted.groups == group].mean() for group in range(4)]).mean().backward()
            optimizer.step()
        torch.testing.assert_close(heads.state(copy)["0.weight"], head.weight.detach(), rtol=1e-4, atol=1e-5)
        predicted = head(body(TEST.features)).argmax(1)
        assert torch.equal(found["dfr"].predictions["test"][-1, copy].long(), predicted)


def test_methods_that_know_or_infer_the_attribute_beat_plain_training_in_the_worst_group(found):
    table = found.table()
    worst = table[table.selection == "last"].groupby("method").worst_group_accuracy.mean()
    assert worst.erm < 0.4
    for method in ("group_weights", "groupdro", "groupdro_xrm", "mat", "jtt", "dfr"):
        assert worst[method] > worst.erm + 0.1, method


def test_the_table_says_how_every_checkpoint_was_chosen(found):
    table = found.table()
    assert len(table) == len(METHODS) * 3 * 2
    assert set(table.selection) == {"true", "inferred", "last"}
    training = found.trainings["mat"]
    for selection, groups in (("true", None), ("inferred", found.inferred)):
        chosen = training.selected("validation", groups)
        rows = table[(table.method == "mat") & (table.selection == selection)]
        assert rows.step.tolist() == training.steps[chosen].tolist()
        scores, test = training.worst_group_accuracy("validation", groups), training.worst_group_accuracy("test")
        assert rows.score.tolist() == [scores[index, copy] for copy, index in enumerate(chosen)]
        assert rows.worst_group_accuracy.tolist() == [test[index, copy] for copy, index in enumerate(chosen)]
        assert rows.seed.tolist() == list(SEEDS)
    last = table[table.selection == "last"]
    assert (last.step == 200).all()
    assert not torch.equal(found.inferred, VALIDATION.groups.expand(2, -1)), "the test needs groups that differ"
    without = replace(found, inferred=None).table()
    assert set(without.selection) == {"true", "last"}


def test_methods_of_two_trainings_take_the_time_of_both(monkeypatch):
    clock = count()
    monkeypatch.setattr(ensembles, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = compare(TRAIN, VALIDATION, TEST, Descent(steps=1), seeds=[0, 1], methods=["erm", "jtt", "dfr"]).table()
    assert found.groupby("method").seconds.unique().map(list).to_dict() == {"erm": [0.5], "jtt": [1.0], "dfr": [1.0]}


def test_all_of_it_runs_where_the_examples_are(device):
    train, validation, test = (
        Grouped(split.features.to(device), split.labels.to(device), split.groups.to(device))
        for split in (TRAIN, VALIDATION, TEST)
    )
    descent = Descent(steps=5, learning_rate=0.02, batch_size=50, every=2)
    twins = train_twins(train.features, train.labels, descent, seeds=SEEDS, hidden=[4])
    found = compare(
        train,
        validation,
        test,
        descent,
        seeds=SEEDS,
        methods=tuple(METHODS),
        hidden=[4],
        environments=twins.environments,
        inferred=twins.infer(validation.features, validation.labels),
        shift=logit_shift(twins.held_out, train.labels),
    )
    assert len(twins.table()) == 2
    assert found.table().average_accuracy.between(0, 1).all()
    training = found.trainings["mat"]
    assert training.steps[training.selected("validation")].shape == (2,)
    assert {each.device.type for each in training.copies.parameters} == {device.type}


def test_a_subset_has_equally_many_of_each_group_and_depends_on_the_seed_alone():
    groups = torch.stack([torch.randint(0, 3, (40,), generator=generator(seed, "test")) for seed in (0, 1)])
    groups[groups == 1] = 4
    chosen = balanced_subset(groups, [5, 6])
    for own, row in zip(groups, chosen, strict=True):
        least = min((own == 0).sum(), (own == 2).sum(), (own == 4).sum())
        assert [(own[row] == group).sum() for group in (0, 2, 4)] == [least] * 3
    assert torch.equal(balanced_subset(groups[1], [9, 6])[1], chosen[1])


def test_groups_of_twins_serve_group_dro_as_well_as_true_ones_on_recorded_data():
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    data = np.load(Path(folder) / "xrm_mat_synthetic.npz")
    splits = {}
    for name in ("tr", "va", "te"):
        labels, attributes = (torch.from_numpy(data[f"{each}_{name}"]).long() for each in ("y", "m"))
        splits[name] = Grouped(torch.from_numpy(data[f"x_{name}"]).float(), labels, 2 * labels + attributes)
    twins = train_twins(splits["tr"].features, splits["tr"].labels, Descent(steps=1500, learning_rate=0.01))
    methods = ["groupdro_class", "groupdro", "groupdro_xrm"]
    table = compare(
        *splits.values(), Descent(steps=1500), seeds=[0], methods=methods, environments=twins.environments
    ).table()
    worst = table[table.selection == "last"].set_index("method").worst_group_accuracy
    recorded = {"groupdro_class": 0.606, "groupdro": 0.922, "groupdro_xrm": 0.922}
    for method, expected in recorded.items():
        assert worst[method] == pytest.approx(expected, abs=0.03), method


def test_what_is_missing_or_unknown_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"methods must be one of erm, .*, got 'irm'"):
        compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["irm"])
    with pytest.raises(ValueError, match="environments must be given for groupdro_xrm, got None"):
        compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["groupdro_xrm"])
    with pytest.raises(ValueError, match="shift must be given for mat, got None: compute it with logit_shift"):
        compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["mat"])
    with pytest.raises(ValueError, match="features and groups must have shapes"):
        environments = one_hot(TRAIN.groups)[None]
        compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["groupdro_xrm"], environments=environments)
    for bad in (VALIDATION.groups[1:], VALIDATION.groups.expand(3, -1)):
        with pytest.raises(ValueError, match="inferred groups must"):
            compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["erm"], inferred=bad)
    for bad in ({"first_steps": 0}, {"upweight": -1.0}, {"upweight": float("nan")}):
        with pytest.raises(
            ValueError, match="first_steps must be at least 1 and upweight a finite number at least 0, got"
        ):
            compare(TRAIN, VALIDATION, TEST, DESCENT, seeds=[0], methods=["jtt"], **bad)
    own = Grouped(TEST.features.expand(3, -1, -1), TEST.labels, TEST.groups)
    with pytest.raises(ValueError, match="with S = 1, got"):
        compare(TRAIN, VALIDATION, own, DESCENT, seeds=[0], methods=["erm"])
