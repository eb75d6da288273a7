import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memloc import models, training
from memloc.gradients import GradientAccounting, random_control
from memloc.observers import Batch, Predictions
from memloc.randomness import seeded
from memloc.recipes import Recipe, Settings
from memloc.training import fit, train

PARTS = ("clean", "noisy", "total")
QUICK = {"examples": 64, "epochs": 3, "batch_size": 24, "learning_rate": 0.1, "width": 4, "noise_rate": 0.25}


def network():
    return models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=4, seed=0)


def weights(model):
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


class ThreeBackwardPasses(GradientAccounting):
    """The oracle: clean, noisy and total loss, each propagated back on its own, vectors summed over the epoch.

    Everything else is the observer's own, so that both can watch one training.
    """

    def __init__(self, examples=None):
        super().__init__(examples, "oracle")
        self.sums, self.epochs = {}, []

    def before_backward(self, model, losses, batch):
        noisy = batch.noise_mask if self._examples is None else self._examples.to(batch.indices.device)[batch.indices]
        parts = {"clean": losses[~noisy].sum() / len(losses), "noisy": losses[noisy].sum() / len(losses)}
        parts["total"] = losses.mean()
        for part, loss in parts.items():
            for name, parameter in model.named_parameters():
                found = None
                if parameter.requires_grad:
                    (found,) = torch.autograd.grad(loss, [parameter], retain_graph=True, allow_unused=True)
                found = torch.zeros_like(parameter) if found is None else found
                self.sums[part, name] = self.sums.get((part, name), 0) + found.detach().double()

    def after_backward(self, model, batch):
        pass

    def after_epoch(self, epoch, model, evaluation=None):
        self.epochs.append(self.sums)
        self.sums = {}


class Vectors(GradientAccounting):
    """Ours, which also remembers the vectors of each epoch."""

    def __init__(self, examples=None, name="gradients"):
        super().__init__(examples, name)
        self.epochs = []

    def after_epoch(self, epoch, model, evaluation=None):
        self.epochs.append(self.gradients())
        super().after_epoch(epoch, model, evaluation)


def by_formula(sums, group_names):
    """Norms and cosine of one layer group from the vectors of one epoch, written as the paper defines them."""
    norms, cosines = dict.fromkeys(PARTS, 0.0), []
    for name in group_names:
        for part in PARTS:
            vector = sums[part, name].flatten().tolist()
            norms[part] += sum(value**2 for value in vector) ** 0.5 / len(vector) ** 0.5
        clean, noisy = (sums[part, name].flatten().tolist() for part in ("clean", "noisy"))
        product = sum(a * b for a, b in zip(clean, noisy, strict=True))
        lengths = sum(a * a for a in clean) ** 0.5 * sum(b * b for b in noisy) ** 0.5
        if lengths:
            cosines.append(product / lengths)
    return [*norms.values(), sum(cosines) / len(cosines) if cosines else float("nan")]


class ViT(nn.Module):
    """Attention, a class token and positions that belong to no layer, a shared weight, and one that is never used."""

    def __init__(self):
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.blocks[1].linear1.weight = self.blocks[0].linear1.weight
        self.norm, self.unused = nn.LayerNorm(8), nn.Linear(3, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def any_network(name):
    with seeded(0, "test"):
        if name == "small_cnn":
            return network()
        if name == "mlp":
            return models.mlp(64, width=8)
        return ViT()


def watched(model, data, settings, examples=None, frozen=()):
    """Train under ours and under the oracle at once."""
    ours, oracle = Vectors(examples), ThreeBackwardPasses(examples)
    train(model, data, settings, observers=[ours, oracle], frozen=frozen)
    return ours, oracle


# Against three backward passes.


@pytest.mark.parametrize("name", ["small_cnn", "mlp", "vit"])
@pytest.mark.parametrize("own_subset", [False, True])
def test_clean_noisy_and_total_are_those_of_three_backward_passes(tiny, name, own_subset):
    examples = torch.arange(64) % 3 == 0 if own_subset else None
    settings = Settings(epochs=2, batch_size=24, learning_rate=0.1)
    ours, oracle = watched(any_network(name), tiny, settings, examples)
    for found, expected in zip(ours.epochs[1:], oracle.epochs[1:], strict=True):
        assert {key for _, key in expected} == found.keys()
        for key, (clean, noisy) in found.items():
            larger = max(expected["clean", key].norm(), expected["noisy", key].norm())
            for part, vector in zip(PARTS, (clean, noisy, clean + noisy), strict=True):
                assert (vector.double() - expected[part, key]).norm() <= 1e-5 * larger, (key, part)


@pytest.mark.parametrize("name", ["small_cnn", "vit"])
def test_norms_and_cosines_are_the_papers_of_vectors_summed_over_the_epoch(tiny, name):
    model = any_network(name)
    ours, oracle = watched(model, tiny, Settings(epochs=2, batch_size=24, learning_rate=0.1))
    groups, table = models.layer_groups(model), ours.result().table()
    rows = [by_formula(sums, names) for sums in oracle.epochs[1:] for names in groups.values()]
    found = table[["clean_norm", "noisy_norm", "total_norm", "cosine"]].to_numpy().tolist()
    for (epoch, group), row, expected in zip(table[["epoch", "layer_group"]].to_numpy(), found, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-9, nan_ok=True), (epoch, group)
    assert list(table.layer_group) == 2 * list(groups)
    assert list(table.epoch) == [1] * len(groups) + [2] * len(groups)


def test_every_parameters_gradient_is_counted_in_its_own_group_and_none_is_left_out(tiny):
    """The reference's list of the ViT's layers lacks two tensors and shifts all that follow them."""
    model = any_network("vit")
    ours = Vectors()
    train(model, tiny, Settings(epochs=1, batch_size=24), observers=[ours])
    table = ours.result().table().set_index("layer_group")
    assert ours.epochs[1].keys() == dict(model.named_parameters()).keys()
    for group, names in models.layer_groups(model).items():
        norms = [
            ours.epochs[1][name][1].double().norm().item() / model.get_parameter(name).numel() ** 0.5 for name in names
        ]
        assert table.noisy_norm[group] == pytest.approx(sum(norms))
    assert table.noisy_norm["unused"] == 0
    assert {"token", "positions"} <= set(models.layer_groups(model)["patches"])


def test_vectors_are_summed_over_the_epoch_not_their_norms(tiny):
    """The reference keeps norms where its analysis needs vectors; two opposite steps would add up instead of cancel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).to(tiny.train.images.device)
    batch = Batch(
        tiny.train.images, tiny.train.labels, tiny.train.noise_mask, torch.arange(64, device=tiny.train.images.device)
    )
    accounting = GradientAccounting()
    for sign in (1, -1):
        model.zero_grad()
        losses = sign * F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        accounting.before_backward(model, losses, batch)
        losses.mean().backward()
        accounting.after_backward(model, batch)
    accounting.after_epoch(1, model)
    table = accounting.result().table()
    assert (table[["clean_norm", "noisy_norm", "total_norm"]] == 0).all(axis=None)
    assert table.cosine.isna().all()


def test_each_epoch_begins_anew(tiny):
    settings = Settings(epochs=2, batch_size=64, learning_rate=0.0)
    accounting = GradientAccounting()
    train(models.mlp(64, width=8), tiny, settings, observers=[accounting])
    first, second = (rows.drop(columns="epoch") for _, rows in accounting.result().table().groupby("epoch"))
    assert second.set_index("layer_group").clean_norm.to_dict() == pytest.approx(
        first.set_index("layer_group").clean_norm.to_dict(), rel=1e-5
    )


# What it must not do: change the training.


class Dropping(nn.Sequential):
    """Batch-norm, dropout and several channels, so that memory layout and random numbers matter."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(0.3), nn.Conv2d(4, 8, 3),
            nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(128, 10),
        )  # fmt: skip


@pytest.mark.usefixtures("global_generator_untouched")
@pytest.mark.parametrize(
    ("precision", "channels_last"), [("fp32", False), ("fp32", True), ("bf16", True), ("fp16", False)]
)
def test_the_training_is_the_same_to_the_bit_with_and_without_accounting(tiny, precision, channels_last):
    settings = Settings(epochs=2, batch_size=24, learning_rate=0.1, precision=precision, channels_last=channels_last)
    control = random_control(tiny.train.noise_mask, 0)
    trained, histories = [], []
    for observers in ([], [GradientAccounting(), GradientAccounting(control, name="control")]):
        with seeded(0, "test"):
            model = Dropping()
        histories.append(train(model, tiny, settings, observers=observers))
        trained.append(weights(model))
    assert same(*trained)
    assert list(histories[0].loss) == list(histories[1].loss)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_gives_nearly_the_same_account(tiny, precision):
    tables = {}
    for each in ("fp32", precision):
        accounting = GradientAccounting()
        model = network()
        train(model, tiny, Settings(epochs=1, batch_size=64, precision=each), observers=[accounting])
        tables[each] = accounting.result().table().set_index("layer_group")
    for column in ("clean_norm", "noisy_norm", "total_norm"):
        assert tables[precision][column].to_dict() == pytest.approx(tables["fp32"][column].to_dict(), rel=0.1)


def own_loop(model, data, accounting, scale=1.0, steps=2, precision=None):
    """A reader's own loop over two batches, with torch's optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for indices in torch.arange(64, device=data.train.images.device).split(64 // steps):
        batch = Batch(data.train.images[indices], data.train.labels[indices], data.train.noise_mask[indices], indices)
        optimizer.zero_grad()
        with torch.autocast(batch.images.device.type, precision, enabled=precision is not None):
            losses = scale * F.cross_entropy(model(batch.images), batch.labels, reduction="none")
        accounting.before_backward(model, losses, batch)
        losses.mean().backward()
        accounting.after_backward(model, batch)
        optimizer.step()
    accounting.after_epoch(1, model)


def test_it_serves_in_a_readers_own_loop(tiny):
    model = network().to(tiny.train.images.device)
    ours, oracle = GradientAccounting(), ThreeBackwardPasses()
    own_loop(model, tiny, oracle)
    own_loop(network().to(tiny.train.images.device), tiny, ours)
    rows = [by_formula(oracle.epochs[0], names) for names in models.layer_groups(model).values()]
    found = ours.result().table()[["clean_norm", "noisy_norm", "total_norm", "cosine"]].to_numpy()
    assert found.flatten().tolist() == pytest.approx([value for row in rows for value in row], rel=1e-3)


def test_small_gradients_of_the_noisy_part_are_not_lost_in_fp16(tiny):
    norms = []
    for precision in (None, torch.float16):
        accounting = GradientAccounting()
        model = models.mlp(64, width=8)
        nn.init.zeros_(model.linear2.weight)
        nn.init.constant_(model.linear2.bias, 0.0)
        own_loop(model.to(tiny.train.images.device), tiny, accounting, scale=1e-6, steps=1, precision=precision)
        norms.append(accounting.result().noisy_norm[0, -1].item())
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


def test_a_step_that_overflows_is_left_out_of_both_parts(tiny):
    model = models.mlp(64, width=8).to(tiny.train.images.device)
    one, two = GradientAccounting(), GradientAccounting()
    batch = Batch(*(getattr(tiny.train, name)[:32] for name in ("images", "labels", "noise_mask")), torch.arange(32))
    for accounting, factors in ((one, [1.0]), (two, [1.0, float("inf")])):
        for factor in factors:
            model.zero_grad()
            losses = factor * F.cross_entropy(model(batch.images), batch.labels, reduction="none")
            accounting.before_backward(model, losses, batch)
            losses.mean().backward()
            accounting.after_backward(model, batch)
        accounting.after_epoch(1, model)
    assert same(one.table(), two.table())


def test_gradients_of_a_network_in_bf16_are_summed_in_fp32(tiny):
    model = models.mlp(64, width=8).to(tiny.train.images.device, torch.bfloat16)
    losses = F.cross_entropy(model(tiny.train.images.bfloat16()), tiny.train.labels, reduction="none")
    batch = Batch(tiny.train.images, tiny.train.labels, tiny.train.noise_mask, torch.arange(64))
    accounting = GradientAccounting()
    for _ in range(2):
        accounting.before_backward(model, losses, batch)
        accounting.after_backward(model, batch)
    assert {part.dtype for pair in accounting.gradients().values() for part in pair} == {torch.float32}


# Which examples.


def with_noise(data, mask):
    return replace(data, train=replace(data.train, noise_mask=mask.to(data.train.images.device)))


def test_batches_without_a_noisy_example_count_as_clean_and_cost_no_backward_pass(tiny, monkeypatch):
    none = with_noise(tiny, torch.zeros(64, dtype=torch.bool))
    monkeypatch.setattr(torch.autograd, "grad", None)
    accounting = GradientAccounting()
    train(network(), none, Settings(epochs=1, batch_size=24), observers=[accounting])
    result = accounting.result()
    assert (result.noisy_norm == 0).all()
    assert torch.equal(result.clean_norm, result.total_norm)
    assert (result.total_norm > 0).all()
    assert result.cosine.isnan().all()


def test_where_all_examples_are_noisy_the_clean_part_is_zero_and_not_a_rounding_error(tiny, monkeypatch):
    every = with_noise(tiny, torch.ones(64, dtype=torch.bool))
    monkeypatch.setattr(torch.autograd, "grad", None)
    accounting = GradientAccounting()
    train(network(), every, Settings(epochs=1, batch_size=24), observers=[accounting])
    result = accounting.result()
    assert (result.clean_norm == 0).all()
    assert torch.equal(result.noisy_norm, result.total_norm)
    assert (result.total_norm > 0).all()
    assert result.cosine.isnan().all()


def test_one_noisy_example_in_one_batch_is_found(tiny):
    mask = torch.zeros(64, dtype=torch.bool)
    mask[5] = True
    ours, oracle = watched(network(), with_noise(tiny, mask), Settings(epochs=1, batch_size=16))
    for key, (_, noisy) in ours.epochs[1].items():
        expected = oracle.epochs[1]["noisy", key]
        assert (noisy.double() - expected).norm() <= 1e-5 * oracle.epochs[1]["clean", key].norm().clamp(expected.norm())
    assert (ours.result().noisy_norm > 0).all()


def test_a_frozen_layer_group_has_norm_zero_whatever_an_earlier_training_left_in_it(tiny):
    model = network()
    train(model, tiny, Settings(epochs=1, batch_size=24))
    assert model.conv1[0].weight.grad.norm() > 0
    ours, oracle = watched(model, tiny, Settings(epochs=1, batch_size=24), frozen=["conv1"])
    table = ours.result().table().set_index("layer_group")
    assert table.loc["conv1", ["clean_norm", "noisy_norm", "total_norm"]].tolist() == [0, 0, 0]
    assert table.cosine.isna().to_dict() == {group: group == "conv1" for group in table.index}
    for group, names in models.layer_groups(model).items():
        expected = by_formula(oracle.epochs[1], names)
        row = table.loc[group, ["clean_norm", "noisy_norm", "total_norm", "cosine"]].astype(float).tolist()
        assert row == pytest.approx(expected, rel=1e-3, nan_ok=True), group


def test_a_parameter_without_gradients_does_not_hide_the_cosine_of_its_group(tiny):
    model = network()
    model.conv1[1].bias.requires_grad_(False)
    accounting = Vectors()
    train(model, tiny, Settings(epochs=1, batch_size=24), observers=[accounting])
    vectors = [
        [part.double().flatten() for part in accounting.epochs[1][f"conv1.{name}"]] for name in ("0.weight", "1.weight")
    ]
    expected = torch.stack([torch.cosine_similarity(*pair, dim=0) for pair in vectors]).mean()
    assert accounting.result().cosine[0, 1].item() == pytest.approx(expected.item(), rel=1e-6)


# In a run.


def accountings(recipe):
    control = random_control(training.prepare(recipe).train.noise_mask, recipe.seed)
    return [Predictions(), GradientAccounting(), GradientAccounting(control, name="control")]


def test_two_observers_with_names_of_their_own_watch_one_training():
    recipe = Recipe(**QUICK)
    _, noisy, control = accountings(recipe)
    run = fit(recipe, observers=[noisy, control])
    assert same(run.table("gradients"), noisy.table())
    assert same(run.table("control"), control.table())
    noisy, control = noisy.result(), control.result()
    assert not torch.allclose(noisy.noisy_norm, control.noisy_norm)
    torch.testing.assert_close(noisy.total_norm, control.total_norm, rtol=1e-4, atol=1e-9)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_training_that_was_interrupted_has_the_same_tables(monkeypatch, own_run_store, last):
    recipe, original = Recipe(**QUICK), training._Loop.epoch
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole = fit(recipe, observers=accountings(recipe))

    def stop_after(loop, epoch):
        if epoch > last:
            raise Interrupted
        return original(loop, epoch)

    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    monkeypatch.setattr(training._Loop, "epoch", stop_after)
    with pytest.raises(Interrupted):
        fit(recipe, observers=accountings(recipe))
    monkeypatch.setattr(training._Loop, "epoch", original)
    resumed = fit(recipe, observers=accountings(recipe))
    for name in ("gradients", "control"):
        assert same(whole.table(name), resumed.table(name))
        assert whole.table(name)["conv0"].shape == (3, 4)


@pytest.mark.parametrize("step", [1, 4, 6])
def test_an_observer_that_saw_an_interrupted_epoch_forgets_it_when_the_training_goes_on(
    monkeypatch, own_run_store, step
):
    recipe, original = Recipe(**QUICK), training._Loop.step
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "whole"))
    whole, steps, observers = fit(recipe, observers=accountings(recipe)), itertools.count(), accountings(recipe)

    def stop_in_the_middle(loop, batch, rate):
        original(loop, batch, rate)
        if next(steps) == step:
            raise KeyboardInterrupt

    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "interrupted"))
    monkeypatch.setattr(training._Loop, "step", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, observers=observers)
    monkeypatch.setattr(training._Loop, "step", original)
    resumed = fit(recipe, observers=observers)
    for name in whole.tables:
        assert same(whole.table(name), resumed.table(name))


def test_an_observer_of_two_trainings_gives_each_run_its_own_table(monkeypatch, own_run_store):
    recipes = [Recipe(**QUICK), Recipe(**QUICK | {"seed": 7})]
    accounting = GradientAccounting()
    ours = [fit(recipe, observers=[accounting]).table("gradients") for recipe in recipes]
    monkeypatch.setenv("MEMLOC_RUNS", str(own_run_store / "alone"))
    alone = [fit(recipe, observers=[GradientAccounting()]).table("gradients") for recipe in recipes]
    assert all(same(a, b) for a, b in zip(ours, alone, strict=True))


def test_the_observers_of_a_run_that_was_loaded_are_as_if_they_had_watched_it():
    recipe, other = Recipe(**QUICK), accountings(Recipe(**QUICK))
    observers = accountings(recipe)
    fit(recipe, observers=observers)
    fit(recipe, observers=other)
    for first, second in zip(observers[1:], other[1:], strict=True):
        assert first.result().table().equals(second.result().table())
    assert list(other[1].result().groups) == ["conv0", "conv1", "conv2", "conv3", "linear"]


# What is refused.


def test_a_compiled_network_is_refused_because_its_graph_is_gone_after_one_backward_pass(tiny):
    with pytest.raises(ValueError, match=r"compile must be False .* got True with \['gradients'\]"):
        train(network(), tiny, Settings(epochs=1, compile=True), observers=[GradientAccounting()])


@pytest.mark.parametrize("mask", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.bool), torch.arange(4)])
def test_a_mask_that_is_none_is_refused_by_name(mask):
    with pytest.raises(ValueError, match=r"examples must be a bool mask \(N,\) over the training set, got torch"):
        GradientAccounting(mask)
    with pytest.raises(ValueError, match=r"noise_mask must be a bool mask \(N,\) over the training set, got torch"):
        random_control(mask, 0)


def test_a_mask_of_fewer_examples_than_the_training_set_has_is_refused(tiny):
    accounting = GradientAccounting(torch.ones(10, dtype=torch.bool))
    with pytest.raises(ValueError, match="examples must cover the whole training set, got 10 of them and index"):
        train(network(), tiny, Settings(epochs=1), observers=[accounting])


def test_a_loss_that_is_no_longer_one_an_example_is_refused(tiny):
    model = models.mlp(64).to(tiny.train.images.device)
    batch = Batch(tiny.train.images, tiny.train.labels, tiny.train.noise_mask, torch.arange(64))
    losses = F.cross_entropy(model(batch.images), batch.labels)
    with pytest.raises(ValueError, match=r"losses must have shape \(64,\), got \(\): use reduction='none'"):
        GradientAccounting().before_backward(model, losses, batch)


def test_before_the_first_epoch_has_ended_there_is_no_result(tiny):
    accounting = GradientAccounting()
    with pytest.raises(ValueError, match="no epoch has ended yet"):
        accounting.result()
    train(network(), tiny, Settings(epochs=0), observers=[accounting])
    with pytest.raises(ValueError, match="no epoch has ended yet"):
        accounting.result()
    assert {(tuple(rows.shape), rows.dtype) for rows in accounting.table().values()} == {((0, 4), torch.float64)}


# The control.


@pytest.mark.usefixtures("global_generator_untouched")
def test_the_control_is_as_many_clean_examples_at_random():
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[:100] = True
    controls = torch.stack([random_control(mask, seed) for seed in range(50)])
    assert (controls.sum(1) == 100).all()
    assert not (controls & mask).any()
    assert torch.equal(controls[3], random_control(mask, 3))
    assert not torch.equal(controls[0], controls[1])
    drawn = controls[:, ~mask].double().mean(0)  # each of 900 examples in 1/9 of 50 draws
    assert drawn.mean() == pytest.approx(1 / 9)
    assert drawn.std() == pytest.approx((1 / 9 * 8 / 9 / 50) ** 0.5, rel=0.15)


def test_where_most_examples_are_noisy_the_control_is_all_clean_ones():
    mask = torch.tensor([True, True, False, True, False])
    assert torch.equal(random_control(mask, 0), ~mask)
    assert not random_control(torch.zeros(5, dtype=torch.bool), 0).any()
    assert not random_control(torch.ones(5, dtype=torch.bool), 0).any()


def test_the_control_of_a_data_set_holds_no_example_with_a_wrong_label(tiny, device):
    control = random_control(tiny.train.noise_mask, 0)
    assert control.device.type == device.type
    assert torch.equal(tiny.train.labels[control], tiny.train.true_labels[control])
    assert control.sum() == tiny.train.noise_mask.sum()
