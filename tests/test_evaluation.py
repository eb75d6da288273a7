import math

import pytest
import torch
from torch import nn

from memloc import datasets, evaluation, models


class Answers(nn.Module):
    """Gives fixed answers: the class written in the first pixel."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), self.num_classes).float()


def data_with(predictions, labels, true_labels, test_predictions, test_labels):
    def images(values):
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)

    true, test = torch.tensor(true_labels), torch.tensor(test_labels, dtype=torch.int64)
    data = datasets.from_arrays(images(predictions), true, images(test_predictions), test, classes="abcdefghij")
    return data.with_labels(torch.tensor(labels))


def test_the_four_accuracies_count_what_their_names_say():
    data = data_with(
        predictions=[0, 1, 5, 3, 9, 5],
        labels=[0, 1, 2, 3, 9, 9],
        true_labels=[0, 1, 2, 4, 5, 5],
        test_predictions=[1, 2, 3, 4],
        test_labels=[1, 2, 3, 0],
    )
    found = evaluation.evaluate(Answers(), data)
    assert found.accuracies == evaluation.Accuracies(clean=2 / 3, noisy=2 / 3, restored=1 / 3, test=3 / 4)
    assert found.predictions.tolist() == [0, 1, 5, 3, 9, 5]


def test_an_accuracy_over_no_examples_is_nan():
    data = data_with([0, 1], [0, 1], [0, 1], [0], [0])
    found = evaluation.evaluate(Answers(), data).accuracies
    assert found.clean == 1
    assert math.isnan(found.noisy)
    assert math.isnan(found.restored)


def test_a_network_that_has_diverged_is_never_right():
    class Diverged(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), float("nan"))

    data = data_with([0, 0, 0], [0, 0, 1], [0, 0, 0], [0], [0])
    assert evaluation.evaluate(Diverged(), data).accuracies == evaluation.Accuracies(0, 0, 0, 0)


@pytest.mark.parametrize("name", models.NAMES)
def test_a_test_set_may_be_empty(name):
    size = 32 if name == "vgg16" else 12
    images = torch.zeros(3, 1, size, size)
    data = datasets.from_arrays(images, torch.tensor([0, 1, 2]), images[:0], torch.zeros(0, dtype=torch.int64))
    model = models.build(name, in_channels=1, size=size, num_classes=3, width=4, seed=0)
    assert math.isnan(evaluation.evaluate(model, data).accuracies.test)


def test_the_loss_is_the_mean_cross_entropy_with_the_given_labels(tiny):
    model = models.small_cnn(width=4).to(tiny.train.images.device)
    with models.evaluation_mode(model), torch.no_grad():
        expected = nn.functional.cross_entropy(model(tiny.train.images), tiny.train.labels).item()
    assert evaluation.evaluate(model, tiny).loss == pytest.approx(expected, rel=1e-5)


def test_predictions_do_not_depend_on_the_size_of_a_batch(tiny):
    model = models.small_cnn(width=4).to(tiny.train.images.device)
    whole = evaluation.predict(model, tiny.train.images)
    for size in (1, 7, 64):
        torch.testing.assert_close(evaluation.predict(model, tiny.train.images, batch_size=size), whole)


def test_evaluation_leaves_the_network_as_it_was(tiny):
    model = models.small_cnn(width=4).to(tiny.train.images.device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluation.evaluate(model, tiny)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_close_to_full_precision_and_answers_in_float32(tiny, precision):
    model = models.small_cnn(width=4).to(tiny.train.images.device)
    low = evaluation.predict(model, tiny.train.images, precision=precision, channels_last=True)
    full = evaluation.predict(model, tiny.train.images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, atol=0.05, rtol=0.05)


def test_an_unknown_precision_is_refused_by_name(tiny):
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'int4'"):
        evaluation.predict(models.mlp(64), tiny.train.images, precision="int4")


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_network_that_writes_into_its_images_leaves_the_callers_as_they_were(channels_last):
    images = torch.randn(6, 1, 2, 2)
    before = images.clone()
    evaluation.predict(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), images, channels_last=channels_last)
    assert images.equal(before)
