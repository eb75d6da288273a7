import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memloc import labelnoise, models
from memloc.early_gradients import BATCH_NORM, covariance_norm, gradient_parts, permuted_norm
from memloc.randomness import generator


class Tied(nn.Module):
    """A weight that two layers share, one that is never used, a norm without batches, and no layer groups declared."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.norm, self.unused, self.head = nn.LayerNorm(64), nn.Linear(2, 2), nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.norm(self.second(self.first(images.flatten(1)).relu())))


def network(name, device):
    built = {"mlp": lambda: models.mlp(64, width=8), "tied": Tied, "small_cnn": lambda: models.small_cnn(width=4)}
    return built[name]().to(device)


@pytest.fixture(scope="module")
def examples(tiny):
    return tiny.train.images[:21], tiny.train.labels[:21]


def by_example(model, images, labels, centered):
    """Both parts as the definition has them: every example and every class alone."""
    named = dict(model.named_parameters())
    dependent, independent = ({name: torch.zeros_like(p).double() for name, p in named.items()} for _ in range(2))
    for image, label in zip(images, labels.tolist(), strict=True):
        logits = model(image[None])[0]
        probabilities = logits.softmax(0).tolist()
        if centered:
            logits = logits - logits.mean()
        for k, logit in enumerate(logits):
            found = torch.autograd.grad(logit, list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, found, strict=True):
                if gradient is not None:
                    dependent[name] -= (k == label) * gradient / len(images)
                    independent[name] += probabilities[k] * gradient / len(images)
    return dependent, independent


def close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    scale = max(vector.norm() for vector in expected.values())
    for name, vector in expected.items():
        assert float((found[name] - vector).norm()) <= tolerance * float(scale), name


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", ["mlp", "tied", "small_cnn"])
def test_the_parts_agree_with_a_loop_over_examples_and_classes(examples, device, name, centered):
    model = network(name, device)
    found = gradient_parts(model, *examples, centered=centered, batch_size=8)
    dependent, independent = by_example(model.eval(), *examples, centered)
    close(found.dependent, dependent)
    close(found.independent, independent)
    assert found.examples == 21


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.parametrize("centered", [False, True])
def test_the_parts_add_up_to_the_gradient_of_the_mean_loss(examples, device, batch_norm, centered):
    model = network("small_cnn", device)
    found = gradient_parts(model, *examples, centered=centered, batch_norm=batch_norm)
    model.train(batch_norm == "batch")
    F.cross_entropy(model(examples[0]), examples[1]).backward()
    expected = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    close(found.total, expected)
    close({name: found.dependent[name] + part for name, part in found.independent.items()}, expected)


def test_the_sum_is_exact_where_the_parts_cancel(trained, tiny):
    found = gradient_parts(trained, tiny.train.images, tiny.train.labels)
    double = models.small_cnn(width=4).double().to(tiny.train.images.device)
    double.load_state_dict(trained.state_dict())
    images = tiny.train.images.double()
    exact = gradient_parts(double, images, tiny.train.labels)
    size = math.sqrt(sum(float(vector.square().sum()) for vector in exact.total.values()))
    parts = math.sqrt(sum(float(vector.square().sum()) for vector in exact.dependent.values()))
    assert size < 0.05 * parts
    close(found.total, exact.total, tolerance=1e-3)


def test_what_is_left_of_an_example_that_the_network_is_sure_of_does_not_round_to_zero(device):
    model = nn.Linear(1, 2, bias=False).to(device)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[20.0], [0.0]]))
    found = gradient_parts(model, torch.ones(1, 1, device=device), torch.zeros(1, device=device).long())
    left = 1 / (1 + math.exp(20))
    assert found.total["weight"].flatten().tolist() == pytest.approx([-left, left], rel=1e-5)


def test_a_parameter_of_integers_is_left_out(device):
    model = nn.Sequential(nn.Linear(1, 2, bias=False)).to(device)
    model.register_parameter("steps", nn.Parameter(torch.zeros(1, device=device).long(), requires_grad=False))
    found = gradient_parts(model, torch.ones(1, 1, device=device), torch.zeros(1, device=device).long())
    assert list(found.total) == ["0.weight"]
    assert list(found.table().layer_group) == ["0"]


def test_with_the_batchs_statistics_the_examples_of_a_batch_share_them(examples, device):
    model = network("small_cnn", device)
    whole = gradient_parts(model, *examples, batch_norm="batch", batch_size=100)
    split = gradient_parts(model, *examples, batch_norm="batch", batch_size=11)
    images, labels = examples
    first = gradient_parts(model, images[:11], labels[:11], batch_norm="batch")
    second = gradient_parts(model, images[11:], labels[11:], batch_norm="batch")
    mean = {name: (11 * first.total[name] + 10 * second.total[name]) / 21 for name in whole.total}
    close(split.total, mean)
    with pytest.raises(AssertionError):
        close(whole.total, split.total)


@pytest.mark.parametrize("batch_norm", BATCH_NORM)
@pytest.mark.usefixtures("global_generator_untouched")
def test_the_network_is_as_before_afterwards_to_the_bit(examples, trained, batch_norm):
    model = copy.deepcopy(trained)
    model.zero_grad()
    model.linear.weight.requires_grad_(False)
    model.conv0[1].eval()
    model.conv1[0].weight.grad = torch.ones_like(model.conv1[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = gradient_parts(model, *examples, batch_norm=batch_norm)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["conv1.0.weight"]
    assert (model.conv1[0].weight.grad == 1).all()
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["linear.weight"]
    assert [name for name, m in model.named_modules() if not m.training] == ["conv0.1"]
    assert found.total["linear.weight"].norm() > 0  # of a frozen parameter, too


class NeverStopsDropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(F.dropout(images.flatten(1), 0.5, training=True))


@pytest.mark.usefixtures("global_generator_untouched")
def test_a_network_that_never_stops_dropping_draws_from_a_generator_of_its_own(examples, device):
    state = torch.get_rng_state()
    model = NeverStopsDropping().to(device)
    torch.set_rng_state(state)
    first, second = (gradient_parts(model, *examples).total["head.weight"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_it_computes_gradients_where_they_are_switched_off(examples, device, switched_off):
    model = network("mlp", device)
    expected = gradient_parts(model, *examples)
    with switched_off():
        found = gradient_parts(model, *examples)
    close(found.total, expected.total, tolerance=0)


def test_one_example_and_one_class_will_do(examples, device):
    images, _ = examples
    labels = torch.full((21,), 3, device=device)
    model = network("small_cnn", device)
    alone = gradient_parts(model, images[:1], labels[:1])
    close(alone.dependent, by_example(model.eval(), images[:1], labels[:1], False)[0])
    assert alone.examples == 1
    close(gradient_parts(model, images, labels).dependent, by_example(model, images, labels, False)[0])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_comes_close(examples, device, precision):
    model = network("small_cnn", device)
    keywords = {"precision": precision, "channels_last": True, "batch_size": 7}
    lower, full = gradient_parts(model, *examples, **keywords).total, gradient_parts(model, *examples).total
    close(lower, full, tolerance=0.05)
    with pytest.raises(AssertionError):
        close(lower, full, tolerance=1e-5)
    half = network("mlp", device).bfloat16()
    found = gradient_parts(half, examples[0].bfloat16(), examples[1])
    assert {vector.dtype for vector in found.total.values()} == {torch.float64}
    close(found.total, gradient_parts(half.float(), *examples).total, tolerance=0.05)


def test_the_table_measures_each_layer_group_as_one_vector(examples, device):
    model = network("small_cnn", device)
    found = gradient_parts(model, *examples)
    table = found.table().set_index("layer_group")
    assert list(table.index) == list(models.layer_groups(model))
    for group, names in models.layer_groups(model).items():
        a, b = (
            [value for name in names for value in part[name].flatten().tolist()]
            for part in (found.dependent, found.independent)
        )
        norm_a, norm_b = math.hypot(*a), math.hypot(*b)
        cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norm_a * norm_b)
        total = math.hypot(*(x + y for x, y in zip(a, b, strict=True)))
        assert table.loc[group].tolist() == pytest.approx([norm_a, norm_b, total, cosine])


def test_a_part_that_is_zero_has_no_cosine(examples, device):
    table = gradient_parts(network("tied", device), *examples).table().set_index("layer_group")
    assert table.loc["unused", ["dependent_norm", "independent_norm", "total_norm"]].tolist() == [0, 0, 0]
    assert math.isnan(table.loc["unused", "cosine"])


def test_centring_the_logits_changes_the_parts_and_not_their_sum(examples, device):
    model = network("mlp", device)
    plain, centered = (gradient_parts(model, *examples, centered=each) for each in (False, True))
    close(plain.total, centered.total, tolerance=1e-12)
    shared = {name: centered.dependent[name] - plain.dependent[name] for name in plain.dependent}
    model(examples[0]).mean(1).mean().backward()
    close(shared, {name: parameter.grad.double() for name, parameter in model.named_parameters()})


class Detached(nn.Linear):
    def forward(self, images):
        return super().forward(images.flatten(1)).detach()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0).long()}, "images must hold at least one example"),
        ({"labels": torch.zeros(3).long()}, r"labels must be int64 \(4,\), one per image, got torch.int64 \(3,\)"),
        ({"labels": torch.zeros(4)}, r"labels must be int64 \(4,\), one per image, got torch.float32 \(4,\)"),
        (
            {"labels": torch.tensor([0, 1, 2, 10])},
            "labels must be from 0 to 9, the outputs of the network, got 0 to 10",
        ),
        (
            {"labels": torch.tensor([0, 1, 2, -1])},
            "labels must be from 0 to 9, the outputs of the network, got -1 to 2",
        ),
        ({"batch_norm": "keep"}, "batch_norm must be one of running, batch, got 'keep'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp16, got 'int8'"),
        ({"model": nn.Conv2d(1, 10, 3)}, r"model must give logits of shape \(4, K\), got \(4, 10, 6, 6\)"),
        ({"model": nn.Flatten()}, "model must give logits that depend on parameters, got a Flatten without any"),
        ({"model": Detached(64, 10)}, "model must give logits that depend on parameters, got a Detached without any"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64)), "batch_norm": "batch", "batch_size": 1},
            "batch_norm='batch' needs more than one value per channel, got batches of 1",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(changes, message):
    arguments = {"model": models.mlp(64, width=8), "images": torch.zeros(4, 1, 8, 8), "labels": torch.arange(4)}
    with pytest.raises(ValueError, match=message) as caught:
        gradient_parts(**arguments | changes)
    assert "\n" not in str(caught.value)


def linear_head(count, seed):
    """Data of the finite-sample check: half the labels permuted, class means of half a standard deviation."""
    means = 0.5 * torch.randn(10, 100, generator=generator(seed, "means"))
    true = torch.randint(10, (count,), generator=generator(seed, "labels"))
    features = means[true] + torch.randn(count, 100, generator=generator(seed, "features"))
    noisy = labelnoise.permute_labels(true, 0.5, seed)
    return features - features.mean(0), noisy.labels, noisy.noise_mask


# Norms measured once by an independent program, on data of its own.
@pytest.mark.parametrize(
    ("count", "draws", "permuted", "unpermuted"),
    [(500, 20, 0.665, 1.625), (2000, 20, 0.331, 1.514), (8000, 12, 0.166, 1.491), (32000, 8, 0.0828, 1.479),
     (128000, 2, 0.0414, 1.478)],
)  # fmt: skip
def test_random_labels_give_a_gradient_that_falls_with_the_root_of_their_number(count, draws, permuted, unpermuted):
    head = nn.Linear(100, 10, bias=False)
    nn.init.zeros_(head.weight)
    squares, predicted = [], []
    for seed in range(draws):
        features, labels, mask = linear_head(count, seed)
        pair = []
        for chosen in (mask, ~mask):
            parts = gradient_parts(head, features[chosen], labels[chosen], batch_size=count)
            pair.append(float(parts.table().total_norm.iloc[0]) ** 2)
        squares.append(pair)
        predicted.append(permuted_norm(features, 10, int(mask.sum())))
    found = torch.tensor(squares).mean(0).sqrt().tolist()
    assert sum(predicted) / draws == pytest.approx(permuted, rel=0.05)
    assert found == pytest.approx([permuted, unpermuted], rel=0.05)


def test_with_centred_logits_any_network_follows_the_law_that_its_single_examples_give(examples, device):
    model, images = network("mlp", device), examples[0][:8]
    singles = [
        gradient_parts(model, image[None], torch.tensor([label], device=device), centered=True).table().dependent_norm
        for image in images for label in range(10)
    ]  # fmt: skip
    expected = sum(float((norms**2).sum()) for norms in singles) / len(singles) / len(images)
    rng = generator(0, "labels")
    draws = [torch.randint(10, (len(images),), generator=rng).to(device) for _ in range(100)]
    found = [gradient_parts(model, images, labels, centered=True).table().dependent_norm for labels in draws]
    assert sum(float((norms**2).sum()) for norms in found) / len(found) == pytest.approx(expected, rel=0.1)


def test_true_labels_leave_the_covariance_of_labels_and_features():
    features, labels, mask = linear_head(2000, seed=0)
    features, labels = features[~mask], labels[~mask]
    means = torch.stack([features[labels == k].mean(0) for k in range(10)]) - features.mean(0)
    shares = labels.bincount(minlength=10) / len(labels)
    expected = float((shares[:, None] * means).norm())
    assert covariance_norm(features + 3, labels, 10) == pytest.approx(expected, rel=1e-4)
    head = nn.Linear(100, 10, bias=False)
    parts = gradient_parts(head, features - features.mean(0), labels)
    assert float(parts.dependent["weight"].norm()) == pytest.approx(expected, rel=1e-4)


def test_the_prediction_is_the_mean_square_over_all_labels():
    features = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    squares = []
    for first in range(3):
        for second in range(3):
            residual = 1 / 3 - F.one_hot(torch.tensor([first, second]), 3).float()
            squares.append(float((residual.T @ features / 2).square().sum()))
    assert permuted_norm(features, 3, 2) ** 2 == pytest.approx(sum(squares) / 9, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permuted_norm(torch.zeros(3), 2, 1), r"features must have shape \(N, D\) .*, got \(3,\)"),
        (lambda: permuted_norm(torch.zeros(0, 3), 2, 1), r"features must have shape \(N, D\) .*, got \(0, 3\)"),
        (lambda: permuted_norm(torch.zeros(3, 1), 2, 0), "num_classes and examples must be at least 1, got 2 and 0"),
        (lambda: covariance_norm(torch.zeros(2, 1), torch.tensor([0, 2]), 2), "labels must be from 0 to 1, got 0 to 2"),
        (
            lambda: covariance_norm(torch.zeros(2, 1), torch.tensor([0]), 2),
            r"labels must be int64 of shape \(2,\), got torch.int64 \(1,\)",
        ),
    ],
)
def test_features_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_network_that_works_in_place_does_not_overwrite_the_images():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 2))
    images = torch.randn(5, 6, generator=generator(0, "images"))
    before = images.clone()
    gradient_parts(model, images, torch.tensor([0, 1, 0, 1, 1]))
    assert torch.equal(images, before)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 0], dtype=torch.int32), torch.tensor([], dtype=torch.int64)])
def test_labels_of_another_kind_or_number_have_no_covariance(labels):
    with pytest.raises(ValueError, match=r"labels must be int64 of shape \(3,\)"):
        covariance_norm(torch.ones(3, 2), labels, 2)
