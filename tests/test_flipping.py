import copy
import itertools
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memloc import datasets, evaluation, models, vision
from memloc.flipping import (
    NOISE,
    OBJECTIVES,
    PARITY,
    ZERO,
    Unit,
    choose_targets,
    critical_channels,
    edited_accuracies,
    smallest_sets,
    without,
)
from memloc.gates import Gates
from memloc.randomness import generator
from memloc.recipes import Settings
from memloc.training import train

BENCHMARK = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "flipping.py"))
reference_search, reference_units = BENCHMARK["reference_search"], BENCHMARK["reference_units"]
EXACT = {"copies": 1, "noise_scale": 0.0}


class WithBiases(nn.Module):
    """Convolutions with a bias and no norm, one called twice; activations and sums write in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 10)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.norm(self.twice(x))
        y += self.twice(x)
        y = self.relu(y)
        return self.head((x + y).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers and layer norms over four tokens, as in a transformer; an activation writes in place."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(16, 6)
        self.norm = nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10))

    def forward(self, x):
        x = self.embed(x.flatten(1).unflatten(1, (4, 16)))
        x = x + self.down(F.relu_(self.up(self.norm(x))))
        return self.head(x.mean(1))


def resnet18():
    resnet = vision.torchvision().models.resnet18(num_classes=10)
    resnet.conv1 = nn.Conv2d(1, 64, 3, bias=False)
    return resnet


NETWORKS = {"biases": WithBiases, "tokens": Tokens, "mlp": lambda: models.mlp(64, width=8), "resnet18": resnet18}
NAMES = ["biases", "tokens", "mlp", pytest.param("resnet18", marks=pytest.mark.slow)]


def fitted(name, tiny):
    """Any network, with predictions for labels, so that there is something to flip."""
    model = NETWORKS[name]().to(tiny.train.images.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) - 0.4)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):  # with 0, a filter before a norm is worth what the norm's scale is
                buffer.add_(torch.rand_like(buffer) - 0.5)
    return model, evaluation.predict(model, tiny.train.images).argmax(1)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def pairs(units):
    return [(unit.path, unit.index) for unit in units]


def disturbed(images, copies, noise, draw):
    """Copies of a batch, each noise scaled to 1 % of the batch's norm, written out."""
    drawn = torch.randn(copies, *images.shape, generator=draw).to(images)
    made, total = [], torch.zeros_like(images)
    for each in drawn:
        each = each * (0.01 * images.norm() / each.norm())
        total = total + each
        made.append(images + (total if noise == "accumulated" else each))
    return torch.stack(made)


@pytest.mark.parametrize("noise", NOISE)
def test_parity_removes_the_units_of_the_reference_code_in_its_order(trained, tiny, noise):
    batch, targets = torch.arange(8, 24), torch.arange(10, 20)
    images, labels = tiny.train.images, tiny.train.labels
    found = critical_channels(
        trained, images, labels, targets, reference=batch, noise=noise, generator=generator(1), **PARITY
    )
    copies = disturbed(images[batch], 5, noise, generator(1))
    with models.evaluation_mode(trained):
        expected = [reference_search(trained, copies, labels[batch], at, noise=noise) for at in range(2, 12)]
    assert [pairs(units) for units in found.units] == expected
    assert max(map(len, expected)) > 2
    assert len({path for units in expected for path, _ in units}) > 4


@pytest.mark.parametrize("name", NAMES)
def test_parity_holds_on_any_network(tiny, name):
    model, labels = fitted(name, tiny)
    images, targets = tiny.train.images, torch.arange(3)
    options = {"reference": torch.arange(8), "max_units": 4, "generator": generator(1)} | PARITY
    found = critical_channels(model, images, labels, targets, **options)
    copies = disturbed(images[:8], 5, "independent", generator(1))
    with models.evaluation_mode(model):
        expected = [reference_search(model, copies, labels[:8], t, noise="independent", max_units=4) for t in range(3)]
    assert [pairs(units) for units in found.units] == expected
    assert any(expected)


def by_hand(model, images, labels, batch, target, objective, max_units=200):
    """The search of the default mode as an explicit loop: no noise, weights edited, autograd on them."""
    model = copy.deepcopy(model).eval()
    others = [j for j in batch if j != target]
    label, removed = labels[target], []
    while True:
        model.zero_grad()
        logits = model(images)
        other = logits[target].masked_fill(F.one_hot(label, 10) > 0, -torch.inf).max()
        held = F.cross_entropy(logits[target], label) if objective == "loss" else other - logits[target, label]
        rest = F.cross_entropy(logits[others], labels[others], reduction="sum") / len(batch)
        if logits[target].argmax() != label or len(removed) == max_units:
            return removed
        (rest - held).backward()
        scores = {}
        for name, tensor, bias in reference_units(model):
            score = tensor * tensor.grad
            score = score.flatten(1).sum(1) if tensor.ndim == 4 else score.flatten()
            score = score if bias is None else score + bias * bias.grad
            scores |= {(name, index): value for index, value in enumerate(score.tolist())}
        best = max(scores, key=scores.get)
        if scores[best] <= 0:
            return removed
        removed.append(best)
        with torch.no_grad():
            for name, tensor, bias in reference_units(model):
                if name == best[0]:
                    (tensor if tensor.ndim == 4 else tensor.view(-1))[best[1]] = 0
                    if bias is not None:
                        bias[best[1]] = 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("skipped", [0, 1e-7])
def test_the_default_search_agrees_with_an_explicit_loop(trained, tiny, objective, skipped):
    images, labels = tiny.train.images, tiny.train.labels
    batch, targets = torch.arange(12), torch.arange(6, 18)  # half of them are in the reference batch
    found = critical_channels(
        trained, images, labels, targets, reference=batch, objective=objective, skipped=skipped, batch_size=40, **EXACT
    )
    expected = [by_hand(trained, images, labels, batch.tolist(), t, objective) for t in targets.tolist()]
    assert [pairs(units) for units in found.units] == expected


def test_leaving_out_examples_of_little_weight_leaves_most_units_as_they_are(trained, tiny):
    images, labels = tiny.train.images, tiny.train.labels
    exact, brief = (critical_channels(trained, images, labels, skipped=skipped) for skipped in (0, 0.05))
    assert sum(a == b for a, b in zip(exact.units, brief.units, strict=True)) >= 58
    assert abs(exact.table().units.median() - brief.table().units.median()) <= 1


@pytest.mark.parametrize("zero", ZERO)
def test_a_channel_is_switched_off_where_asked(trained, tiny, zero):
    images = tiny.train.images
    edited = copy.deepcopy(trained).eval()
    if zero == "before norm":
        edited.conv1[0].weight.data[3] = 0
    else:
        mask = torch.ones(8, 1, 1, device=images.device)
        mask[3] = 0
        edited.conv1[2].register_forward_hook(lambda module, inputs, output: output * mask)
    expected = edited(images)
    before = trained.eval()(images)
    with without(trained, [Unit("conv1.0", 3)], images, zero=zero):
        torch.testing.assert_close(trained(images), expected)
        assert not torch.allclose(trained(images), before)
    assert torch.equal(trained(images), before)
    trained.train()


@pytest.mark.parametrize("name", NAMES)
def test_edits_by_hooks_compute_what_zeroed_weights_do(tiny, name):
    model, _ = fitted(name, tiny)
    images, edited, units = tiny.train.images[:4], copy.deepcopy(model).eval(), []
    with torch.no_grad():
        for path, tensor, bias in list(reference_units(edited))[::3]:
            (tensor if tensor.ndim == 4 else tensor.view(-1))[1] = 0
            if bias is not None:
                bias[1] = 0
            units.append(Unit(path, 1))
    with models.evaluation_mode(model), without(model, units, images):
        torch.testing.assert_close(model(images), edited(images), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("global_generator_untouched")
def test_the_network_is_as_before_to_the_bit(trained, tiny):
    model = copy.deepcopy(trained)
    model.conv1.eval()
    model.conv2[0].weight.requires_grad_(False)
    before, modes = state(model), [module.training for module in model.modules()]
    found = critical_channels(model, tiny.train.images, tiny.train.labels, torch.arange(5))
    edited_accuracies(model, found, tiny)
    smallest_sets(model, tiny.train.images, tiny.train.labels, torch.arange(2), largest=1)
    with pytest.raises(KeyError), without(model, found.units[0], tiny.train.images):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6])
def test_an_interruption_leaves_the_network_as_it_was(trained, tiny, monkeypatch, call):
    """While it is tried, traced, recorded, scored, or searched."""
    original, calls, before = trained.pool.forward, itertools.count(1), state(trained)

    def interrupted(activations):
        if next(calls) == call:
            raise KeyboardInterrupt
        return original(activations)

    monkeypatch.setattr(trained.pool, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        critical_channels(trained, tiny.train.images, tiny.train.labels)
    assert all(value.equal(before[name]) for name, value in state(trained).items())
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())
    assert [path for path, module in trained.named_modules() if "forward" in vars(module)] == ["pool"]  # ours


def test_the_same_seed_gives_the_same_units_whoever_else_is_a_target(trained, tiny):
    images, labels, batch = tiny.train.images, tiny.train.labels, torch.arange(16)
    options = {"reference": batch, "skipped": 0, **EXACT}
    together = critical_channels(trained, images, labels, torch.arange(9), batch_size=60, **options)
    alone = [critical_channels(trained, images, labels, torch.tensor([t]), **options).units[0] for t in range(9)]
    assert list(together.units) == alone


def test_units_flip_the_prediction_they_were_found_for(trained, tiny):
    images, labels = tiny.train.images, tiny.train.labels
    found = critical_channels(trained, images, labels, torch.arange(20), **EXACT)
    assert all(found.flipped)
    with models.evaluation_mode(trained):
        for target, units, margins in zip(found.targets, found.units, found.margins, strict=True):
            for count, margin in enumerate(margins):
                with without(trained, units[:count], images):
                    logits = trained(images[target : target + 1])[0].detach()
                assert (logits.argmax() != labels[target]) == (count == len(units))
                label = int(labels[target])
                other = torch.cat([logits[:label], logits[label + 1 :]]).max()
                assert float(logits[label] - other) == pytest.approx(margin, rel=1e-3, abs=1e-3)


def test_a_prediction_that_is_wrong_already_needs_no_unit(trained, tiny):
    wrong = (tiny.train.labels + 1) % 10
    found = critical_channels(trained, tiny.train.images, wrong, torch.arange(3))
    assert found.units == ((), (), ())
    assert found.flipped == (True, True, True)
    assert found.steps().empty
    table = edited_accuracies(trained, found, tiny).table()
    assert (table.filter(like="_lost").fillna(0) == 0).all(axis=None)


@pytest.mark.parametrize("options", [{}, PARITY])
def test_a_search_ends_at_its_limit(trained, tiny, options):
    options = {"reference": torch.arange(12), **options}
    images, labels, targets = tiny.train.images, tiny.train.labels, torch.arange(12)
    free, limited = (
        critical_channels(trained, images, labels, targets, max_units=most, **options) for most in (200, 2)
    )
    assert max(len(units) for units in free.units) > 2
    assert limited.units == tuple(units[:2] for units in free.units)
    assert limited.flipped == tuple(len(units) <= 2 for units in free.units)


def test_a_target_does_not_count_as_its_own_reference(trained, tiny):
    images, labels, target = tiny.train.images, tiny.train.labels, torch.tensor([4])
    alone = critical_channels(trained, images, labels, target, reference=target, **EXACT)
    assert pairs(alone.units[0]) == by_hand(trained, images, labels, [4], 4, "loss")
    assert alone.flipped == (True,)


class NeverFlips(nn.Module):
    """Its logits depend on a channel, which can be removed, but the first class always wins."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        with torch.no_grad():
            self.head.bias.copy_(torch.tensor([100.0, 0.0, 0.0]))

    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)).tanh())


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", [{}, PARITY, {"units": "channels"}])
def test_a_search_without_an_end_is_ended(objective, options):
    images, labels = torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.int64)
    model = NeverFlips()
    found = critical_channels(model, images, labels, objective=objective, max_units=3, **options)
    assert max(len(units) for units in found.units) <= 3
    unlimited = critical_channels(model, images, labels, objective=objective, max_units=10_000, **options)
    for units, flipped in zip(unlimited.units, unlimited.flipped, strict=True):
        assert len(set(units)) == len(units)  # none is removed twice, so that there is an end
        if options.get("units") == "channels":
            assert not flipped
            assert len(units) <= 4


def test_a_network_that_ignores_its_units_has_nothing_to_remove():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, images):
            return self.conv(images).mean((2, 3)) * 0 + torch.tensor([1.0, 0.0])

    found = critical_channels(Constant(), torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
    assert found.units == ((),) * 4
    assert found.flipped == (False,) * 4


@pytest.mark.parametrize("options", [{}, PARITY, {"objective": "margin"}, {"noise": "accumulated"}])
def test_one_example_or_one_class_will_do(options):
    images, labels = torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)
    one_class = models.build("small_cnn", in_channels=1, size=8, num_classes=1, width=2, seed=0)
    assert critical_channels(one_class, images, labels, **options).flipped == (False,) * 3
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=3, width=2, seed=0)
    label = evaluation.predict(model, images[:1]).argmax(1)
    assert critical_channels(model, images[:1], label, **options).table().shape == (1, 6)


@pytest.mark.parametrize("options", [{}, PARITY])
def test_without_targets_the_result_is_empty(trained, tiny, options):
    none = torch.empty(0, dtype=torch.int64)
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, none, **options)
    assert len(found.table()) == len(found.steps()) == 0
    assert len(edited_accuracies(trained, found, tiny).table()) == 0


def test_without_noise_the_search_runs(trained, tiny):
    """The reference code fails on it."""
    images, labels = tiny.train.images, tiny.train.labels
    quiet = critical_channels(trained, images, labels, torch.arange(8), noise_scale=0)
    single = critical_channels(trained, images, labels, torch.arange(8), noise_scale=0, copies=1)
    assert quiet.units == single.units


def test_every_target_of_a_large_request_is_another(trained, tiny):
    """The reference code goes through its first batch again and again."""
    mask = torch.zeros(2000, dtype=torch.bool)
    mask[::8] = True
    chosen = choose_targets(mask, 100, generator(0))
    assert len(chosen.unique()) == 200
    assert mask[chosen].sum() == 100
    assert chosen.max() > 1000
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, reference=10, max_units=1, **PARITY)
    assert found.targets == tuple(range(64))


class Tied(nn.Module):
    """A layer without parameters of its own, because it shares another's weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(64, 10))

    def forward(self, images):
        return self.head(F.relu(self.second(F.relu(self.first(images.flatten(1))))))


@pytest.mark.parametrize("units", ["channels", "all"])
def test_units_of_shared_and_of_parametrized_weights_have_a_layer_group(tiny, units):
    model = Tied().to(tiny.train.images.device)
    labels = evaluation.predict(model, tiny.train.images).argmax(1)
    steps = critical_channels(model, tiny.train.images, labels, units=units).steps()
    groups = dict(zip(steps.path.str.partition(".")[0], steps.layer_group, strict=True))
    assert groups.keys() > {"second"} if units == "channels" else "head" in groups
    assert all(group == ("head" if path == "head" else "first") for path, group in groups.items())


def test_images_of_inference_mode_will_do(trained):
    with torch.inference_mode():
        images = torch.rand(4, 1, 8, 8).to(next(trained.parameters()).device)
    labels = evaluation.predict(trained, images).argmax(1)
    with torch.inference_mode():
        inside = critical_channels(trained, images, labels)
    assert inside == critical_channels(trained, images.clone(), labels)


def test_an_edited_network_can_be_called_with_named_images(trained, tiny):
    with without(trained, [Unit("conv0.0", 0)], tiny.train.images), models.evaluation_mode(trained):
        assert trained(input=tiny.train.images).equal(trained(tiny.train.images))


def test_targets_are_drawn_with_the_generator_alone():
    mask = torch.arange(100) % 3 == 0
    first, again, other = (choose_targets(mask, 5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert mask[first].tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("zero", ZERO)
def test_edited_accuracies_agree_with_an_explicit_loop(trained, tiny, zero):
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, torch.arange(6), zero=zero)
    before = evaluation.predict(trained, tiny.train.images).argmax(1)
    table = edited_accuracies(trained, found, tiny, batch_size=30).table()
    for (_, row), units in zip(table.iterrows(), found.units, strict=True):
        with without(trained, units, tiny.train.images, zero=zero):
            train_classes = evaluation.predict(trained, tiny.train.images).argmax(1)
            test_classes = evaluation.predict(trained, tiny.test.images).argmax(1)
        rest = torch.arange(64, device=before.device) != row.target
        clean, noisy = rest & ~tiny.train.noise_mask, rest & tiny.train.noise_mask
        right = (train_classes == tiny.train.labels).double()
        assert row.clean_accuracy == pytest.approx(right[clean].mean().item())
        assert row.noisy_accuracy == pytest.approx(right[noisy].mean().item())
        assert row.test_accuracy == pytest.approx((test_classes == tiny.test.labels).double().mean().item())
        was = (before == tiny.train.labels).double()
        assert row.clean_lost == pytest.approx((was[clean].mean() - right[clean].mean()).item())


def test_accuracies_of_a_sample_are_those_of_its_examples(trained, tiny):
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, torch.arange(2))
    result = edited_accuracies(trained, found, tiny, examples=7, generator=generator(3))
    draw = generator(3)
    sample, test = torch.randperm(64, generator=draw)[:7], torch.randperm(500, generator=draw)[:7]
    with without(trained, found.units[0], tiny.train.images):
        right = evaluation.predict(trained, tiny.train.images).argmax(1) == tiny.train.labels
        fits = evaluation.predict(trained, tiny.test.images).argmax(1) == tiny.test.labels
    clean = sample[~tiny.train.noise_mask.cpu()[sample] & (sample != 0)]
    assert result.after[0].clean == pytest.approx(right.cpu()[clean].double().mean().item())
    assert result.after[0].test == pytest.approx(fits.cpu()[test].double().mean().item())


@pytest.fixture(scope="module")
def narrow(tiny):
    """A network of nine channels."""
    model = models.build("small_cnn", in_channels=1, size=8, num_classes=10, width=1, seed=0)
    train(model, tiny, Settings(epochs=15, batch_size=16, learning_rate=0.1))
    return model


def test_the_smallest_set_is_that_of_trying_them_all(narrow, tiny):
    labels = evaluation.predict(narrow, tiny.train.images).argmax(1)
    paths = [f"conv{block}.0" for block in range(4)]
    units = [Unit(path, index) for path, n in zip(paths, (1, 2, 2, 4), strict=True) for index in range(n)]
    expected = torch.full((64,), 4)
    for size in (3, 2, 1):
        for chosen in itertools.combinations(units, size):
            with without(narrow, chosen, tiny.train.images):
                flips = evaluation.predict(narrow, tiny.train.images).argmax(1) != labels
            expected[flips.cpu()] = size
    found = smallest_sets(narrow, tiny.train.images, labels, torch.arange(64), batch_size=500)
    assert found.table().at_least.tolist() == expected.tolist()
    assert found.table().smallest.tolist() == ["> 3" if size == 4 else str(size) for size in expected.tolist()]
    for target, each, margin in zip(found.targets, found.units, found.margins, strict=True):
        if each:
            with without(narrow, each, tiny.train.images), models.evaluation_mode(narrow):
                logits = narrow(tiny.train.images[target : target + 1])
            assert logits.argmax() != labels[target]
            assert margin < 0


def test_the_greedy_search_never_beats_the_minimum(trained, tiny):
    images, labels, targets = tiny.train.images, tiny.train.labels, torch.arange(30)
    greedy = critical_channels(trained, images, labels, targets, units="channels", **EXACT)
    minimum = smallest_sets(trained, images, labels, targets, largest=2).table()
    assert (greedy.table().units >= minimum.at_least)[list(greedy.flipped)].all()
    assert minimum.at_least.nunique() > 1


@pytest.mark.parametrize("label", [0, 2])
def test_a_tie_flips_the_label_that_comes_second_for_the_search_and_for_the_minimum(label):
    """Without its one channel the network gives zeros, of which class 0 is predicted."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 3, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[3].weight.copy_(F.one_hot(torch.tensor(label), 3)[:, None])
    image, labels = torch.ones(1, 1, 1, 1), torch.tensor([label])
    greedy = critical_channels(model, image, labels, units="channels", **EXACT)
    minimum = smallest_sets(model, image, labels, torch.arange(1))  # no set is as large as three
    assert greedy.flipped == (label == 2,)
    assert minimum.units == (greedy.units if label == 2 else (None,))
    assert minimum.margins == (0.0,)


def test_a_network_of_64_channels_has_43744_sets_of_up_to_three_and_a_larger_one_is_refused(tiny):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 2))
    assert Gates(model, tiny.train.images.cpu()).count == 64
    assert sum(len(list(itertools.combinations(range(64), size))) for size in (1, 2, 3)) == 43_744
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 65), nn.Linear(65, 2))
    with pytest.raises(ValueError, match="model must have at most 64 channels to try all sets, has 65"):
        smallest_sets(model, tiny.train.images.cpu(), tiny.train.labels.cpu(), torch.arange(1))


def test_tables_say_what_was_removed_where(trained, tiny):
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, torch.tensor([5, 3]), **EXACT)
    table, steps = found.table(), found.steps()
    assert list(table.columns) == ["target", "label", "units", "flipped", "margin_before", "margin_after"]
    assert list(table.target) == [5, 3]
    assert list(table.label) == tiny.train.labels[[5, 3]].tolist()
    assert list(steps.columns) == ["target", "step", "layer_group", "path", "index", "margin"]
    assert steps.groupby("target").size()[5] == table.units[0] == len(found.units[0])
    assert list(steps[steps.target == 5].step) == list(range(1, table.units[0] + 1))
    assert all(path.startswith(group) for group, path in zip(steps.layer_group, steps.path, strict=True))
    assert (table.margin_before > 0).all()
    assert (table.margin_after < 0).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, PARITY])
def test_everything_runs_in_the_precision_and_layout_asked_for(tiny, precision, options):
    model, seen = models.small_cnn(3, width=2).to(tiny.train.images.device), set()
    images = torch.rand(4, 3, 8, 8).to(tiny.train.images.device)
    labels = evaluation.predict(model, images).argmax(1)
    data = datasets.from_arrays(images, labels, images, labels, device=images.device)
    numerics = {"precision": precision, "channels_last": True}

    def look(module, inputs, output):
        if output.shape[0] > 1:  # one image is traced to see the order of calls
            seen.add((output.dtype, inputs[0].is_contiguous(memory_format=torch.channels_last)))

    model.conv0[0].register_forward_hook(look)
    found = critical_channels(model, images, labels, **numerics, **options)
    edited_accuracies(model, found, data, **numerics)
    assert seen == {(evaluation.PRECISIONS[precision], True)}


def test_in_bf16_most_targets_keep_their_number_of_units(trained, tiny):
    images, labels = tiny.train.images, tiny.train.labels
    full, half = (critical_channels(trained, images, labels, precision=name).table().units for name in ("fp32", "bf16"))
    assert (full - half).abs().median() == 0
    assert abs(full.median() - half.median()) <= 1


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"units": "weights"}, "units must be one of channels, all, got 'weights'"),
        ({"zero": "never"}, "zero must be one of before norm, after activation, got 'never'"),
        ({"objective": "hinge"}, "objective must be one of loss, margin, got 'hinge'"),
        ({"copied": "none"}, "copied must be one of target, batch, got 'none'"),
        ({"noise": "loud"}, "noise must be one of independent, accumulated, got 'loud'"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"noise_scale": -1.0}, "noise_scale must be at least 0, got -1.0"),
        ({"max_units": -1}, "max_units must be at least 0, got -1"),
        ({"reference": 0}, "reference must be at least 1, got 0"),
        ({"skipped": 1.0}, "skipped must be at least 0 and below 1, got 1.0"),
        ({"targets": torch.tensor([1, 2, 1])}, "targets must be distinct, got 2 of 3"),
        ({"targets": torch.tensor([64])}, "targets must be from 0 to 63, got 64 to 64"),
        ({"targets": torch.tensor([0.5])}, "targets must be int64 indices of one dimension, got torch.float32"),
        ({"reference": torch.tensor([1, 1])}, "reference must be distinct, got 1 of 2"),
        (
            {"labels": torch.zeros(3, dtype=torch.int64)},
            r"labels must be int64 of shape \(64,\), .* got torch.int64 \(3,\)",
        ),
        (
            {"labels": torch.zeros(64)},
            r"labels must be int64 of shape \(64,\), one an image, got torch.float32 \(64,\)",
        ),
        ({"labels": torch.full((64,), 10)}, "labels must be from 0 to 9, .* got 10 to 10"),
        ({"labels": torch.full((64,), -1)}, "labels must be from 0 to 9, .* got -1 to -1"),
        ({"images": torch.zeros(64, 1, 8, 8).double()}, r"images of shape \(1, 8, 8\) do not fit SmallCNN"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "int4"}, "precision must be one of fp32, bf16, fp16, got 'int4'"),
        (
            {"targets": torch.tensor([9]), "reference": torch.tensor([1]), "copied": "batch"},
            r"reference must hold the targets when the batch is copied, lacks \[9\]",
        ),
    ],
)
def test_wrong_arguments_are_refused(trained, tiny, keywords, message):
    arguments = {"images": tiny.train.images, "labels": tiny.train.labels} | keywords
    with pytest.raises(ValueError, match=message):
        critical_channels(trained, **arguments)


def test_wrong_arguments_of_the_other_functions_are_refused(trained, tiny):
    images, labels = tiny.train.images, tiny.train.labels
    found = critical_channels(trained, images, labels, torch.arange(1), max_units=1)
    with pytest.raises(ValueError, match="examples must be at least 1, or None for all, got 0"):
        edited_accuracies(trained, found, tiny, examples=0)
    with pytest.raises(ValueError, match="largest must be 1, 2 or 3, got 4"):
        smallest_sets(trained, images, labels, torch.arange(1), largest=4)
    with pytest.raises(ValueError, match=r"labels must be from 0 to 9, .* got 10 to 10"):
        smallest_sets(trained, images, torch.full((64,), 10), torch.arange(1))
    with pytest.raises(ValueError, match="each must be at least 0, got -1"):
        choose_targets(tiny.train.noise_mask, -1, generator(0))
    with (
        pytest.raises(ValueError, match=r"units must be units of the network, such as conv0.0 \(0 to 3\)"),
        without(trained, [Unit("conv0.0", 4)], images),
    ):
        pass
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        critical_channels(trained, images[:0], labels[:0])


def test_networks_that_cannot_be_searched_are_refused(tiny):
    images = torch.rand(2, 1, 4, 4)
    labels = torch.zeros(2, dtype=torch.int64)
    statistics = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False), nn.Flatten())
    with pytest.raises(ValueError, match="model must have batch-norms with running statistics"):
        critical_channels(statistics, images, labels)
    with pytest.raises(ValueError, match="model must call a convolution or a hidden linear layer as a module"):
        critical_channels(nn.Flatten(), images, labels)

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, images):
            return self.conv(images.reshape(-1, 1, 2, 2)).reshape(len(images), -1)

    with pytest.raises(ValueError, match="model must keep images apart along the first dimension, conv does not"):
        critical_channels(Windows(), images, labels, units="channels")


def test_the_result_is_frozen(trained, tiny):
    found = critical_channels(trained, tiny.train.images, tiny.train.labels, torch.arange(1))
    assert replace(found, zero="x").zero == "x"
    with pytest.raises(AttributeError):
        found.zero = "x"
