import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest
import torch
from torch import nn

from memloc import (
    datasets,
    evaluation,
    groups,
    labelnoise,
    mat,
    models,
    observers,
    pairs,
    runs,
    spurious_images,
    training,
)
from memloc.randomness import seeded
from memloc.recipes import VERSION, Recipe, Settings, learning_rate
from memloc.training import fit, train

QUICK = {"examples": 64, "epochs": 3, "batch_size": 24, "learning_rate": 0.1, "width": 4}


def network(tiny, **keywords):
    channels, size = tiny.train.images.shape[1:3]
    return models.build("small_cnn", in_channels=channels, size=size, num_classes=10, width=4, seed=0, **keywords)


def weights(model):
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The loop.


def test_training_lowers_the_loss_and_the_history_has_a_row_for_every_epoch(tiny):
    history = train(network(tiny), tiny, Settings(epochs=5, batch_size=16, learning_rate=0.1))
    assert list(history.epoch) == [0, 1, 2, 3, 4, 5]
    assert history.loss.iloc[-1] < 0.8 * history.loss.iloc[0]
    assert set(history.columns) == {"epoch", "loss", "seconds"} | {
        f"{name}_accuracy" for name in ("clean", "noisy", "restored", "test")
    }


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_shown_when_asked_for_and_otherwise_on_a_terminal_only(tiny, capsys, progress):
    train(network(tiny), tiny, Settings(epochs=1), progress=progress)
    assert ("2/2" in capsys.readouterr().err) == (progress is True)


def test_a_step_is_that_of_an_explicit_loop_with_torchs_optimizer(tiny):
    settings = Settings(epochs=2, batch_size=24, learning_rate=0.1, momentum=0.7, weight_decay=0.01)
    model, oracle = network(tiny), network(tiny).to(tiny.train.images.device)
    train(model, tiny, settings)

    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.1, momentum=0.7, weight_decay=0.01)
    done = 0
    for epoch in (1, 2):
        order = torch.randperm(64, generator=training.generator(0, "order", epoch))
        for indices in order.split(24):
            optimizer.param_groups[0]["lr"] = learning_rate(settings, (done + 0.5) / 6)
            optimizer.zero_grad()
            nn.functional.cross_entropy(oracle(tiny.train.images[indices]), tiny.train.labels[indices]).backward()
            optimizer.step()
            done += 1
    for name, value in weights(oracle).items():
        torch.testing.assert_close(weights(model)[name], value, msg=name)


@pytest.mark.usefixtures("global_generator_untouched")
def test_a_training_depends_on_its_seed_alone(tiny):
    a, b, c = network(tiny), network(tiny), network(tiny)
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        train(model, tiny, Settings(epochs=1, batch_size=16, seed=seed))
    assert same(weights(a), weights(b))
    assert not same(weights(a), weights(c))


@pytest.mark.usefixtures("global_generator_untouched")
def test_a_networks_own_dropout_depends_on_the_seed_too(tiny):
    def trained():
        with seeded(0, "test"):
            model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        train(model, tiny, Settings(epochs=2, batch_size=64))
        return weights(model)

    assert same(trained(), trained())


def test_a_network_draws_other_numbers_in_every_epoch_and_under_every_seed(tiny):
    class Draws(nn.Linear):
        def forward(self, images):
            if self.training:
                drawn.append(torch.rand(()).item())
            return super().forward(images.flatten(1))

    drawn = []
    for seed in (0, 1):
        train(Draws(64, 10), tiny, Settings(epochs=2, batch_size=64, seed=seed))
    assert len(set(drawn)) == 4


@pytest.mark.usefixtures("global_generator_untouched")
def test_a_network_that_drops_in_evaluation_too_has_a_history_that_depends_on_the_seed(tiny):
    class AlwaysDrops(nn.Linear):
        def forward(self, images):
            return super().forward(nn.functional.dropout(images.flatten(1)))

    def history():
        with seeded(0, "test"):
            model = AlwaysDrops(64, 10)
        return train(model, tiny, Settings(epochs=2, batch_size=64)).drop(columns="seconds")

    pd.testing.assert_frame_equal(history(), history())


def test_every_batch_holds_what_its_indices_say(tiny):
    def checked(logits, batch):
        for field in ("images", "labels", "noise_mask"):
            assert torch.equal(getattr(batch, field), getattr(tiny.train, field)[batch.indices]), field
        return training.cross_entropy(logits, batch)

    train(network(tiny), tiny, Settings(epochs=1, batch_size=24), loss=checked)


def test_a_network_in_evaluation_mode_is_trained_in_training_mode(tiny):
    model = network(tiny).eval()
    before = weights(model)
    train(model, tiny, Settings(epochs=1))
    assert not torch.equal(weights(model)["conv1.1.running_mean"], before["conv1.1.running_mean"])


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_weights_are_laid_out_as_asked_in_training_and_evaluation(tiny, channels_last):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    data = datasets.load("digits", examples=64, size=12)
    images, test = data.train.images.expand(-1, 3, -1, -1), data.test.images.expand(-1, 3, -1, -1)
    data = datasets.from_arrays(images, data.train.labels, test, data.test.labels, device=tiny.train.images.device)
    model, seen = models.small_cnn(3, width=4), []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), inputs[0].is_contiguous(memory_format=memory_format)))
    )
    train(model, data, Settings(epochs=1, channels_last=channels_last))
    assert model.conv1[0].weight.is_contiguous(memory_format=memory_format)
    assert {right for size, right in seen if size > 1} == {True}  # a first image alone only tries the network


def test_the_history_is_measured_in_the_precision_of_the_training(tiny):
    model = network(tiny)
    history = train(model, tiny, Settings(epochs=1, precision="bf16"))
    assert history.loss.iloc[-1] == evaluation.evaluate(model, tiny, precision="bf16").loss
    assert history.loss.iloc[-1] != evaluation.evaluate(model, tiny).loss


def test_frozen_layer_groups_do_not_move_and_can_be_trained_again_afterwards(tiny):
    model = network(tiny)
    before = weights(model)
    train(model, tiny, Settings(epochs=1, batch_size=16, learning_rate=0.1), frozen=["conv1", "linear"])
    moved = {name for name, _ in model.named_parameters() if not torch.equal(before[name], weights(model)[name])}
    still = {name for group in ("conv1", "linear") for name in models.layer_groups(model)[group]}
    assert moved == {name for name, _ in model.named_parameters()} - still
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_buffers_of_frozen_layer_groups_stay_when_asked_and_those_of_others_move(tiny):
    model = network(tiny)
    before = weights(model)
    settings, groups = Settings(epochs=1, batch_size=16), models.layer_groups(model)
    train(model, tiny, settings, frozen=[name for name in groups if name != "conv1"], frozen_buffers=True)
    moved = {name for name, value in weights(model).items() if not torch.equal(before[name], value)}
    assert moved == {name for name in before if name.startswith("conv1")}
    assert all(module.training for module in model.modules())


def test_frozen_buffers_are_those_of_norms_without_weights_and_of_containers_too(tiny):
    class Counts(nn.Sequential):
        def __init__(self, *layers):
            super().__init__(*layers)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, images):
            self.steps += self.training
            return super().forward(images)

    def trained(frozen):
        norms = [nn.BatchNorm1d(8, affine=False) for _ in range(2)]
        layers = nn.Flatten(), nn.Linear(64, 8), norms[0], nn.Linear(8, 8), norms[1], nn.Linear(8, 10)
        model = Counts(*layers).to(tiny.train.images.device)
        train(model, tiny, Settings(epochs=1), frozen=frozen, frozen_buffers=True)
        return [model.steps.item(), *(norm.num_batches_tracked.item() for norm in norms)]

    assert trained(["1", "5"]) == [0, 0, 1]
    assert trained(["3", "5"]) == [1, 1, 0]


def test_only_the_chosen_examples_are_trained_on_and_all_are_evaluated(tiny):
    chosen, watch = ~tiny.train.noise_mask, Nosy()
    history = train(
        network(tiny),
        tiny,
        Settings(epochs=2, batch_size=20),
        examples=chosen,
        observers=[watch],
        stop=lambda rows: False,
    )
    assert sorted(watch.seen) == sorted(2 * chosen.nonzero()[:, 0].tolist())
    assert watch.seen != sorted(watch.seen)
    assert history.noisy_accuracy.notna().all()


def test_the_steps_of_chosen_examples_have_the_rates_of_a_training_set_that_holds_no_others(tiny):
    images, labels = tiny.train.images[16:], tiny.train.labels[16:]
    alone = datasets.from_arrays(images, labels, images, labels, device=images.device)
    chosen = tiny.train.indices >= 16
    models_ = [network(tiny), network(tiny)]
    settings = Settings(epochs=3, batch_size=20, learning_rate=0.1)
    train(models_[0], tiny, settings, examples=chosen)
    train(models_[1], alone, settings)
    assert same(weights(models_[0]), weights(models_[1]))


@pytest.mark.parametrize(
    "wrong", [torch.zeros(64, dtype=torch.bool), torch.ones(63, dtype=torch.bool), torch.ones(64)], ids=str
)
def test_no_example_or_a_mask_that_does_not_fit_is_refused(tiny, wrong):
    with pytest.raises(ValueError, match=r"examples must be bool \(64,\) and choose at least one, got torch"):
        train(network(tiny), tiny, Settings(epochs=1), examples=wrong)


def test_a_training_ends_after_the_epoch_at_which_it_is_told_to_stop(tiny):
    asked = []

    def stop(rows):
        asked.append([row["epoch"] for row in rows])
        return len(rows) == 3

    history = train(network(tiny), tiny, Settings(epochs=5), stop=stop)
    assert list(history.epoch) == [0, 1, 2]
    assert asked == [[0], [0, 1], [0, 1, 2]]


def test_a_loss_of_ones_own_is_what_is_minimised(tiny):
    def towards_class_three(logits, batch):
        assert batch.images.shape[0] == len(batch.labels) == len(batch.indices) == len(batch.noise_mask)
        return nn.functional.cross_entropy(logits, torch.full_like(batch.labels, 3), reduction="none")

    model = network(tiny)
    train(model, tiny, Settings(epochs=10, batch_size=16, learning_rate=0.1), loss=towards_class_three)
    predicted = evaluation.predict(model, tiny.train.images).argmax(1)
    assert (predicted == 3).all()


class Nosy(observers.Observer):
    """Looks at everything and draws random numbers."""

    name = "nosy"

    def __init__(self):
        self.seen, self.gradients = [], []

    def before_backward(self, model, losses, batch):
        torch.rand(3, generator=torch.Generator())
        torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
        self.seen += batch.indices.tolist()

    def after_backward(self, model, batch):
        self.gradients.append(sum(p.grad.norm().item() for p in model.parameters()))

    def table(self):
        return {"seen": torch.tensor(self.seen), "gradients": torch.tensor(self.gradients)}

    def restore(self, table):
        self.seen, self.gradients = table["seen"].tolist(), table["gradients"].tolist()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_observers_see_every_example_and_change_nothing(tiny, precision):
    plain, watched, observer = network(tiny), network(tiny), Nosy()
    settings = Settings(epochs=2, batch_size=24, precision=precision, channels_last=True)
    train(plain, tiny, settings)
    train(watched, tiny, settings, observers=[observer, observers.Predictions(), observers.Checkpoints()])
    assert same(weights(plain), weights(watched))
    assert sorted(observer.seen) == sorted(2 * list(range(64)))
    assert len(observer.gradients) == 6
    assert all(norm > 0 for norm in observer.gradients)


def test_gradients_too_small_for_fp16_are_not_lost(tiny):
    def hardly_any(logits, batch):
        return 1e-7 * nn.functional.cross_entropy(logits, batch.labels, reduction="none")

    model = network(tiny)
    before = weights(model)
    settings = Settings(epochs=1, learning_rate=1e6, momentum=0, weight_decay=0, precision="fp16")
    train(model, tiny, settings, loss=hardly_any)
    assert not any(torch.equal(before[name], value.cpu()) for name, value in model.named_parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close_to_full_and_observers_see_gradients_of_the_same_size(tiny, precision):
    full, low, seen = network(tiny), network(tiny), {}
    for model, chosen in ((full, "fp32"), (low, precision)):
        observer = Nosy()
        train(model, tiny, Settings(epochs=1, batch_size=64, precision=chosen), observers=[observer])
        seen[chosen] = observer.gradients
    assert seen[precision] == pytest.approx(seen["fp32"], rel=0.1)
    assert not same(weights(full), weights(low))


@pytest.mark.parametrize("batch_size", [1, 63, 64, 1000])
def test_any_batch_size_will_do(tiny, batch_size):
    history = train(network(tiny), tiny, Settings(epochs=1, batch_size=batch_size))
    assert history.loss.notna().all()


def test_a_last_batch_of_one_that_batch_norm_cannot_take_is_refused_by_name(tiny):
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"batch_size must not leave a batch of one, got 21 for 64 examples"):
        train(model, tiny, Settings(epochs=1, batch_size=21))


def test_augmentation_changes_the_training_and_depends_on_the_seed(tiny):
    models_ = [network(tiny) for _ in range(3)]
    for model, augment in zip(models_, (True, True, False), strict=True):
        train(model, tiny, Settings(epochs=1, augment=augment))
    assert same(weights(models_[0]), weights(models_[1]))
    assert not same(weights(models_[0]), weights(models_[2]))


def test_a_training_is_compiled_by_choice_and_agrees_with_a_plain_one(tiny, monkeypatch):
    compiled = []

    def compiler(model):  # stands in for torch.compile, which takes half a minute here
        compiled.append(model)
        return lambda images: model(images)

    monkeypatch.setattr(torch, "compile", compiler)
    plain, other = network(tiny), network(tiny)
    train(plain, tiny, Settings(epochs=1))
    assert compiled == []
    train(other, tiny, Settings(epochs=1, compile=True))
    assert compiled == [other]
    assert same(weights(plain), weights(other))


def test_an_unknown_or_complete_set_of_frozen_groups_is_refused(tiny):
    model = network(tiny)
    with pytest.raises(ValueError, match=r"frozen must be one of conv0, .*, got 'conv9'"):
        train(model, tiny, Settings(epochs=1), frozen=["conv9"])
    with pytest.raises(ValueError, match="model must have a parameter to train, got none"):
        train(model, tiny, Settings(epochs=1), frozen=list(models.layer_groups(model)))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_training_where_gradients_are_off_is_refused(tiny, off):
    model = network(tiny)
    with off(), pytest.raises(RuntimeError, match="gradients are off here and a training needs them"):
        train(model, tiny, Settings(epochs=1))


def test_a_network_with_too_few_outputs_is_refused(tiny):
    with pytest.raises(ValueError, match="must have an output for each of 10 classes, has 5"):
        train(models.mlp(64, num_classes=5), tiny, Settings(epochs=1))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="device must be one that this machine has, got 'gpu'"):
        training.pick_device("gpu")
    with pytest.raises(ValueError, match="device must be one that this machine has, got 'mps'"):
        training.pick_device("mps")
    assert training.pick_device("auto").type in ("cpu", "cuda")


# What the history says.


def test_the_first_epoch_at_a_level_is_beyond_the_last_when_it_is_never_reached():
    history = pd.DataFrame({"epoch": [0, 1, 2, 3], "noisy_accuracy": [0.1, 0.5, 0.4, 0.6]})
    levels = (0.05, 0.5, 0.6, 0.7)
    assert [training.first_epoch(history, "noisy_accuracy", level) for level in levels] == [0, 1, 3, 4]


def test_learned_epochs_agree_with_a_look_at_each_example():
    predictions = torch.randint(0, 2, (6, 50))
    labels = torch.randint(0, 2, (50,))
    for index, found in enumerate(training.learned_epoch(predictions, labels).tolist()):
        right = (predictions[:, index] == labels[index]).tolist()
        assert all(right[found:])
        assert found == 0 or not right[found - 1]


def test_learned_epochs_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3,\)"):
        training.learned_epoch(torch.zeros(3), torch.zeros(3))


# The same, kept in a run.


def test_fit_trains_what_train_trains(tiny):
    recipe = Recipe(**QUICK)
    run = fit(recipe)
    data = labelnoise.apply(training.datasets.load("digits", examples=64), "flip", 0.1, seed=0)
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    history = train(model, data, recipe)
    assert same(run.checkpoint(3), weights(model))
    assert same(weights(training.load_model(run)), weights(model))
    assert same(weights(training.load_model(run, 1)), run.checkpoint(1))
    assert next(training.load_model(run, device="meta").parameters()).is_meta
    assert run.provenance == {
        "shape": {"in_channels": 1, "size": 8, "num_classes": 10}, "version": VERSION, "torch": torch.__version__,
        "examples": 64, "device": "cpu", "seconds": pytest.approx(run.history.seconds.sum()),
    }  # fmt: skip
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), history.drop(columns="seconds"))


def test_a_whole_run_is_loaded_and_not_trained_again(monkeypatch):
    first = fit(Recipe(**QUICK), observers=[observers.Predictions()])
    monkeypatch.delattr(training._Loop, "epoch")
    observer = observers.Predictions()
    again = fit(Recipe(**QUICK), checkpoints=[0, 3], observers=[observer])
    assert again == first
    assert torch.equal(observer.table()["predictions"], first.table("predictions")["predictions"])


def test_a_run_that_lacks_an_epoch_or_an_observer_is_trained_again_and_keeps_what_it_had():
    recipe = Recipe(**QUICK)
    few = fit(recipe, checkpoints=[1], observers=[observers.Predictions()])
    assert few.epochs == [1, 3]
    before = few.checkpoint(1), few.table("predictions")
    more = fit(recipe, checkpoints=[0], observers=[Nosy()])
    assert more.epochs == [0, 1, 3]
    assert set(more.tables) == {"predictions", "nosy"}
    assert same(more.checkpoint(1), before[0])
    assert same(more.table("predictions"), before[1])


def test_checkpoints_outside_the_training_and_twins_among_observers_are_refused():
    with pytest.raises(ValueError, match=r"checkpoints must be epochs from 0 to 3, got \[3, 4\]"):
        fit(Recipe(**QUICK), checkpoints=[4])
    with pytest.raises(ValueError, match="observers must have different names"):
        fit(Recipe(**QUICK), observers=[Nosy(), Nosy()])


@pytest.mark.parametrize("name", ["epoch_losses", "resume_x", "a/b", "../a", "a.b", ""])
def test_an_observer_whose_name_cannot_be_a_tables_is_refused_before_training(own_run_store, name):
    observer = Nosy()
    observer.name = name
    with pytest.raises(ValueError, match=f"observers must have a word for a name, .*, got '{name}'"):
        fit(Recipe(**QUICK), observers=[observer])
    assert not own_run_store.exists()


@pytest.mark.parametrize(("noise_rate", "missing"), [(0.0, ["noisy", "restored"]), (1.0, ["clean"])])
def test_accuracies_over_no_examples_are_nan_in_every_history(noise_rate, missing):
    recipe = Recipe(**QUICK, noise_rate=noise_rate)
    fitted, trained = fit(recipe).history, train(models.mlp(64), training.prepare(recipe), recipe)
    for history in (fitted, trained):
        assert set(history.dtypes.astype(str)) == {"int64", "float64"}
        assert [name for name in ("clean", "noisy", "restored") if history[f"{name}_accuracy"].isna().all()] == missing


@pytest.mark.parametrize("chosen", [{"attribute": "colour", "noise_rate": 0}, {"attribute": "samples", "size": 8}])
def test_data_with_an_attribute_are_trained_on_like_any_other(chosen):
    recipe = Recipe(**QUICK | chosen, seed=3)
    run, data = fit(recipe, observers=[observers.Predictions()]), training.prepare(recipe)
    made = spurious_images.load("digits", recipe.attribute, seed=3, size=recipe.size, examples=64)
    assert torch.equal(data.train.images, made.train.images)
    assert torch.equal(data.validation.attributes, made.validation.attributes)
    model = models.build(
        "small_cnn", in_channels=made.train.images.shape[1], size=made.train.images.shape[2], num_classes=2, width=4,
        seed=3,
    )  # fmt: skip
    train(model, data, recipe)
    assert same(weights(training.load_model(run)), weights(model))
    assert run.table("predictions")["predictions"].shape == (4, 64)


def test_coloured_digits_keep_the_wrong_labels_that_they_bring():
    data = training.prepare(Recipe(attribute="colour", noise_rate=0))
    assert data.train.noise_mask.double().mean() > 0.2
    assert torch.equal(data.train.noise_mask, data.train.labels != data.train.true_labels)


def test_noise_on_grouped_data_replaces_labels_and_keeps_attributes_and_the_other_splits():
    clean, noisy = (
        training.prepare(Recipe(attribute="samples", size=8, noise_rate=rate, correlation=0.8)) for rate in (0.0, 0.25)
    )
    assert noisy.train.noise_mask.sum() == 270
    assert torch.equal(noisy.train.labels ^ noisy.train.noise_mask, clean.train.labels)
    assert torch.equal(noisy.train.attributes, clean.train.attributes)
    assert torch.equal(noisy.train.groups, 2 * noisy.train.labels + clean.train.attributes)
    assert torch.equal(noisy.validation.groups, clean.validation.groups)
    assert (clean.train.attributes != clean.train.labels).sum() == int((1 - 0.8) * 1080)


def test_data_that_can_have_no_attribute_are_refused():
    with pytest.raises(ValueError, match="labels are of cifar10, got digits on samples"):
        training.prepare(Recipe(attribute="samples", noise="human-worse"))
    with pytest.raises(ValueError, match=r"opacity must be above 0 and at most 1, got 0.0"):
        training.prepare(Recipe(attribute="samples", opacity=0))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_an_interrupted_training_goes_on_and_ends_with_the_same_bits(monkeypatch, own_run_store, precision, last):
    recipe = Recipe(**QUICK, precision=precision, augment=True)
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole = fit(recipe, observers=[Nosy()])

    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    original = training._Loop.epoch

    def stop_after(loop, epoch):
        if epoch > last:
            raise Interrupted
        return original(loop, epoch)

    monkeypatch.setattr(training._Loop, "epoch", stop_after)
    if last < recipe.epochs:
        with pytest.raises(Interrupted):
            fit(recipe, observers=[Nosy()])
        assert not (own_run_store / "interrupted" / recipe.address).exists()

    trained = []
    monkeypatch.setattr(training._Loop, "epoch", lambda loop, epoch: trained.append(epoch) or original(loop, epoch))
    resumed = fit(recipe, observers=[Nosy()])
    assert trained == list(range(last + 1, 4)) if last < 3 else list(range(4))
    assert all(same(whole.checkpoint(epoch), resumed.checkpoint(epoch)) for epoch in whole.epochs)
    assert same(whole.table("nosy"), resumed.table("nosy"))
    assert list(whole.history.loss) == list(resumed.history.loss)


def test_the_scale_of_the_gradients_is_taken_up_again(tiny):
    settings = Settings(epochs=1, precision="fp16")
    first, second = (training._Loop(network(tiny), tiny, settings, training.cross_entropy, []) for _ in range(2))
    first.epoch(1)
    first.scaler.update(1024.0)
    second.load(first.state())
    assert second.scaler.get_scale() == 1024


def test_an_interrupted_training_with_other_wishes_starts_anew(monkeypatch):
    recipe, original = Recipe(**QUICK), training._Loop.epoch
    monkeypatch.setattr(training._Loop, "epoch", lambda loop, epoch: original(loop, epoch) if epoch < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(recipe, checkpoints=[])
    trained = []
    monkeypatch.setattr(training._Loop, "epoch", lambda loop, epoch: trained.append(epoch) or original(loop, epoch))
    assert fit(recipe, checkpoints=[1]).epochs == [1, 3]
    assert trained == [0, 1, 2, 3]


# Other losses.


def test_labels_are_smoothed_as_torch_does():
    recipe = Recipe(**QUICK, label_smoothing=0.3)

    def smoothed(logits, batch):
        return nn.functional.cross_entropy(logits, batch.labels, reduction="none", label_smoothing=0.3)

    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    train(model, training.prepare(recipe), recipe, loss=smoothed)
    assert same(fit(recipe).checkpoint(3), weights(model))
    assert not same(fit(Recipe(**QUICK)).checkpoint(3), weights(model))


XRM = Recipe(**QUICK | {"learning_rate": 0.3, "epochs": 4}, loss="xrm", augment=True)


@pytest.mark.parametrize("last", [0, 1, 3])
def test_a_pair_that_was_interrupted_flips_the_same_labels_and_ends_with_the_same_bits(
    monkeypatch, own_run_store, last
):
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole = fit(XRM)
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    original = training._Loop.epoch
    monkeypatch.setattr(training._Loop, "epoch", lambda loop, epoch: original(loop, epoch) if epoch <= last else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(XRM)
    monkeypatch.setattr(training._Loop, "epoch", original)
    resumed = fit(XRM)
    assert all(same(whole.checkpoint(epoch), resumed.checkpoint(epoch)) for epoch in whole.epochs)
    flipped = [whole.checkpoint(epoch)["flipped_labels"] for epoch in whole.epochs]
    assert torch.equal(flipped[0], training.prepare(XRM).train.labels)
    assert all((a != b).any() for a, b in pairwise(flipped[last:])), "the test needs flips after the interruption"


def test_the_pair_of_a_run_is_loaded_with_its_halves_and_labels():
    run, labels = fit(XRM), training.prepare(XRM).train.labels
    pair = training.load_model(run)
    assert same(weights(pair), run.checkpoint(4))
    start = training.load_model(run, 0)
    assert torch.equal(start.assignment, pairs.Pair(*other_networks(), labels).assignment)
    first, second = (value for name, value in weights(start).items() if name.endswith("linear.weight"))
    assert not torch.equal(first, second)


def other_networks():
    return (models.small_cnn(width=4) for _ in range(2))


def misleading():
    """Images in groups: a strong attribute goes along with the label of nine in ten, and a weak one always does."""

    def split(name, share, count):
        draw = training.generator(0, "test", name)
        labels = torch.arange(count) % 2
        attributes = labels ^ (torch.rand(count, generator=draw) >= share).long()
        images = torch.randn(count, 1, 8, 8, generator=draw)
        images[:, 0, 0] += 0.7 * (2 * labels - 1)[:, None]
        images[:, 0, 7] += 2.0 * (2 * attributes - 1)[:, None]
        return groups.grouped(images, labels, attributes)

    train, test, validation = split("train", 0.9, 300), split("test", 0.5, 400), split("validation", 0.5, 100)
    return groups.GroupedData("misleading", ("-", "+"), train, test, validation, ("-", "+"))


MAT = Recipe(
    loss="mat", model="mlp", width=16, epochs=10, learning_rate=0.05, batch_size=32, weight_decay=0, noise_rate=0
)


def test_memorization_aware_training_raises_the_accuracy_of_the_worst_group(monkeypatch):
    data = misleading()
    monkeypatch.setattr(training, "prepare", lambda recipe, device: data)

    def worst(recipe):
        network = training.load_model(fit(recipe, checkpoints=[]))
        predictions = evaluation.classes(evaluation.predict(network, data.test.images))
        shares = groups.group_accuracies(predictions, data.test.labels, data.test.groups, 4)
        return groups.worst_group_accuracy(shares)

    for seed in (0, 1):
        recipe = replace(MAT, seed=seed)
        assert worst(recipe) > worst(replace(recipe, loss="cross_entropy")) + 0.15


def test_memorization_aware_training_follows_the_held_out_predictions_of_its_pair():
    recipe = Recipe(**QUICK, loss="mat", temperature=0.3, precision="bf16", channels_last=True)
    run, data = fit(recipe), training.prepare(recipe)
    pair = training.load_model(fit(replace(recipe, loss="xrm", temperature=0.1)))
    held_out = pairs.held_out_logits(pair, data.train.images, precision="bf16", channels_last=True)
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)
    train(model, data, recipe, loss=mat.MATLoss(held_out, data.train.labels, 0.3))
    assert same(run.checkpoint(3), weights(model))
    assert same(weights(training.load_model(run)), weights(model))


def test_all_temperatures_share_a_pair_and_a_whole_run_does_not_ask_for_it(monkeypatch):
    recipe, trained, original = Recipe(**QUICK, loss="mat"), [], training._Loop.epoch

    def counted(loop, epoch):
        trained.append(type(loop.model).__name__)
        return original(loop, epoch)

    monkeypatch.setattr(training._Loop, "epoch", counted)
    for temperature in (0.1, 0.01):
        fit(replace(recipe, temperature=temperature), checkpoints=[])
    assert trained == ["Pair"] * 4 + ["_SmallCNN"] * 8
    assert len(runs.addresses()) == 3
    runs.delete(recipe.pair.address)
    fit(recipe, checkpoints=[])
    assert len(trained) == 12


def test_memorization_aware_training_goes_on_where_it_was_interrupted(monkeypatch, own_run_store):
    recipe, original = Recipe(**QUICK, loss="mat"), training._Loop.epoch
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole = fit(recipe)
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    trained = []
    for last in (2, 5):  # in the pair, then in the network itself

        def stop_after(loop, epoch, last=last):
            trained.append(epoch)
            return original(loop, epoch) if len(trained) <= last + 1 else 1 / 0

        monkeypatch.setattr(training._Loop, "epoch", stop_after)
        with pytest.raises(ZeroDivisionError):
            fit(recipe)
    monkeypatch.setattr(training._Loop, "epoch", original)
    assert trained == [0, 1, 2, 3, 3, 0, 1]
    assert same(fit(recipe).checkpoint(3), whole.checkpoint(3))


@pytest.mark.parametrize("kind", ["tied", "standard"])
def test_dropout_of_any_kind_goes_along_with_memorization_aware_training(kind):
    recipe = Recipe(**QUICK, loss="mat", dropout=kind)
    watch = observers.Predictions()
    assert fit(recipe, observers=[watch]).history.loss.notna().all()
    assert watch.table()["predictions"].shape == (4, 64)
    assert fit(recipe.pair).recipe.dropout == kind


LONG = Recipe(epochs=60, examples=640, batch_size=32, learning_rate=0.1)


def fit_long(store):
    os.environ["MEMLOC_RUNS"] = str(store)
    torch.set_num_threads(1)
    fit(LONG, checkpoints=[30])


@pytest.fixture(scope="module")
def processes():
    """Processes that start in no time, because torch is there already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memloc.training", "sklearn.datasets"])
    return context


@pytest.mark.slow
def test_a_training_killed_at_ten_random_moments_ends_with_the_same_bits(monkeypatch, own_run_store, processes):
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole = fit(LONG, checkpoints=[30])

    store = own_run_store / "killed"
    monkeypatch.setenv("MEMLOC_RUNS", str(store))
    history, moments, done = store / f"{LONG.address}.partial" / "history.json", random.Random(0), []
    for _ in range(10):
        seen = history.stat().st_mtime_ns if history.exists() else 0
        process = processes.Process(target=fit_long, args=(store,))
        process.start()
        while process.is_alive() and (not history.exists() or history.stat().st_mtime_ns == seen):
            time.sleep(0.01)  # until it has taken up the training
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the training ended before it was killed: make it longer"
        done.append(len(json.loads(history.read_text())["rows"]))
    assert done == sorted(done)
    resumed = fit(LONG, checkpoints=[30])
    assert same(whole.checkpoint(30), resumed.checkpoint(30))
    assert same(whole.checkpoint(60), resumed.checkpoint(60))
    assert [path.name for path in store.iterdir() if not path.name.startswith(".")] == [LONG.address]


def fit_and_tell(store, told):
    os.environ["MEMLOC_RUNS"] = str(store)
    original = training._Loop.epoch
    training._Loop.epoch = lambda loop, epoch: told.put(epoch) or original(loop, epoch)
    fit(Recipe(**QUICK))


@pytest.mark.slow
def test_two_processes_that_ask_for_the_same_run_train_it_once(own_run_store, processes):
    told = processes.Queue()
    both = [processes.Process(target=fit_and_tell, args=(own_run_store, told)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [told.get() for _ in range(4)] == [0, 1, 2, 3]
    assert told.empty()


@pytest.mark.slow
def test_ctrl_c_in_a_training_loses_nothing_that_was_kept(own_run_store, processes):
    process = processes.Process(target=fit_long, args=(own_run_store,))
    process.start()
    while process.is_alive() and not list(own_run_store.glob("*/history.json")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode != 0
    (info,) = runs.listing()
    assert not info.is_whole
    assert 0 <= info.epochs_done < 60
    assert runs.Writer(LONG.address, LONG).resume(set(), {30, 60}) is not None


GOLDEN = {
    # A weighted sum of all weights after 20 steps. A change of these numbers is a change of what a recipe means:
    # raise training.VERSION with it, so that no run of the old loop is taken for one of the new.
    ("small_cnn", "flip"): -0.978,
    ("small_cnn", "parity"): -3.323,
    ("small_cnn", "permute"): -4.290,
    ("mlp", "flip"): -1.834,
    ("resnet9", "flip"): -1.214,
}


@pytest.mark.parametrize(("model", "noise"), GOLDEN)
def test_a_recipe_still_means_what_it_meant_in_this_version(model, noise):
    recipe = Recipe(
        model=model, noise=noise, noise_rate=0.3, size=12, examples=500, batch_size=100, epochs=4, width=4,
        learning_rate=0.1, augment=True, seed=3,
    )  # fmt: skip
    state = sorted(fit(recipe).checkpoint(4).items())
    found = torch.cat([value.double().flatten() for name, value in state if value.ndim])
    fingerprint = (found * torch.linspace(-1, 1, len(found), dtype=torch.float64)).sum().item()
    assert VERSION == 1
    assert fingerprint == pytest.approx(GOLDEN[model, noise], abs=0.02)
