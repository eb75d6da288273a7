import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from memloc import models
from memloc.copies import Descent, make_copies
from memloc.ensembles import Grouped, train_copies
from memloc.mat import MATLoss, batch_shift, logit_shift
from memloc.observers import Batch
from memloc.randomness import generator
from memloc.recipes import Settings
from memloc.training import train


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"))


def some(count=50, classes=3, seed=0):
    """Held-out logits that are right about two thirds of the labels."""
    labels = torch.randint(0, classes, (count,), generator=generator(seed, "labels"))
    held_out = normal(count, classes, seed=seed)
    held_out[torch.arange(count), labels] += 1
    return held_out, labels


def shift_by_loops(held_out, labels, temperature):
    """The definition, one example and class at a time."""
    count, classes = held_out.shape
    predicted = np.zeros((count, classes))
    for i, logits in enumerate(held_out.double().numpy()):
        powers = [math.exp((logit - logits.max()) / temperature) for logit in logits]
        predicted[i] = [power / sum(powers) for power in powers]
    joint = np.zeros((classes, classes))
    for i, label in enumerate(labels.tolist()):
        for k in range(classes):
            joint[k, label] += predicted[i, k] / count
    shift = np.zeros((count, classes))
    for i in range(count):
        for label in range(classes):
            p = sum(predicted[i, k] * joint[k, label] / joint[k].sum() for k in range(classes) if joint[k].sum() > 0)
            shift[i, label] = math.log(p + 1e-6)
    return torch.from_numpy(shift).float()


@pytest.mark.parametrize(
    ("held_out", "labels", "expected", "temperature"),
    [
        *(("ho_logits", "y_tr", f"shift_tau{temperature}", temperature) for temperature in (0.001, 0.01, 0.1, 1)),
        *(("ho3", "y3", f"shift3_tau{temperature}", temperature) for temperature in (0.1, 1)),
    ],
)
def test_shifts_are_those_of_the_reference_code(held_out, labels, expected, temperature):
    folder = os.environ.get("MEMLOC_REFDATA")
    if not folder:
        pytest.skip("MEMLOC_REFDATA is not set: tests against the reference code need its recorded results")
    data = np.load(Path(folder) / "xrm_mat_synthetic.npz")
    found = logit_shift(torch.from_numpy(data[held_out]), torch.from_numpy(data[labels]).long(), temperature)
    np.testing.assert_allclose(found.numpy(), data[expected], rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1, 5])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_shifts_are_those_of_the_definition(classes, temperature):
    held_out, labels = some(classes=classes)
    expected = shift_by_loops(held_out, labels, temperature)
    torch.testing.assert_close(logit_shift(held_out, labels, temperature), expected, rtol=1e-5, atol=1e-5)


def test_sure_twins_leave_the_logs_of_the_rows_of_the_confusion_matrix():
    held_out, labels = some(200)
    predicted = held_out.argmax(1)
    confusion = torch.zeros(3, 3)
    for k, label in zip(predicted, labels, strict=True):
        confusion[k, label] += 1
    expected = (confusion / confusion.sum(1, keepdim=True) + 1e-6).log()[predicted]
    torch.testing.assert_close(logit_shift(held_out, labels, 1e-5), expected)


def test_batches_are_calibrated_by_themselves():
    held_out, labels = some(50)
    parts = [shift_by_loops(h, y, 0.5) for h, y in zip(held_out.split(16), labels.split(16), strict=True)]
    torch.testing.assert_close(logit_shift(held_out, labels, 0.5, 16), torch.cat(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [None, 16])
def test_copies_trained_with_a_shift_of_each_batch_calibrate_what_they_are_shown(batch_size):
    (a, labels), (b, others) = some(seed=0), some(seed=1)
    shift, seen = batch_shift(torch.stack([a, b]), torch.stack([labels, others]), 0.5), []

    def noting(indices):
        seen.append(indices)
        return shift(indices)

    indices = torch.tensor([[0, 7, 7, 3], [9, 1, 2, 49]])
    expected = [shift_by_loops(h[i], y[i], 0.5) for h, y, i in zip((a, b), (labels, others), indices, strict=True)]
    torch.testing.assert_close(shift(indices), torch.stack(expected), rtol=1e-5, atol=1e-5)
    one = batch_shift(a, labels, 0.5)(indices)
    torch.testing.assert_close(one[1], shift_by_loops(a[indices[1]], labels[indices[1]], 0.5), rtol=1e-5, atol=1e-5)
    data = Grouped(normal(50, 4), torch.stack([labels, others]), torch.zeros(50, dtype=torch.int64))
    descent = Descent(steps=3, learning_rate=0.5, batch_size=batch_size)
    found = train_copies(make_copies(4, 3, [0, 1]), data, descent, shift=noting).copies
    assert {each.shape for each in seen} == {(2, batch_size or 50)}
    if batch_size is None:
        whole = logit_shift(torch.stack([a, b]), torch.stack([labels, others]), 0.5)
        same = train_copies(make_copies(4, 3, [0, 1]), data, descent, shift=whole).copies
        torch.testing.assert_close(found.weights[0], same.weights[0])
    plain = train_copies(make_copies(4, 3, [0, 1]), data, descent).copies
    assert not torch.allclose(found.weights[0], plain.weights[0])


def test_copies_are_calibrated_by_themselves():
    (a, labels), (b, others) = some(seed=0), some(seed=1)
    found = logit_shift(torch.stack([a, b]), torch.stack([labels, others]))
    torch.testing.assert_close(found, torch.stack([logit_shift(a, labels), logit_shift(b, others)]))
    torch.testing.assert_close(logit_shift(torch.stack([a, b]), labels)[1], logit_shift(b, labels))


@pytest.mark.parametrize("temperature", [0.001, 0.1])
def test_a_class_that_no_label_has_and_one_that_no_twin_predicts_are_no_obstacle(temperature):
    held_out = torch.tensor([[5.0, -5.0, -5.0], [5.0, -5.0, -5.0], [-5.0, 5.0, -5.0], [5.0, -5.0, -5.0]])
    labels = torch.tensor([0, 0, 1, 1])
    found = logit_shift(held_out, labels, temperature)
    p = torch.tensor([[2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0], [0, 1, 0], [2 / 3, 1 / 3, 0]])
    torch.testing.assert_close(found, (p + 1e-6).log())
    assert logit_shift(held_out[:1], labels[:1], temperature).isfinite().all()


def test_shifts_have_no_gradient_and_at_least_single_precision():
    held_out, labels = some()
    held_out.requires_grad_()
    assert not logit_shift(held_out, labels).requires_grad
    assert logit_shift(held_out.double(), labels).dtype == torch.float64
    low = logit_shift(held_out.bfloat16(), labels, 1.0)
    torch.testing.assert_close(low, logit_shift(held_out, labels, 1.0), atol=0.05, rtol=0.05)


def test_the_loss_is_cross_entropy_of_shifted_logits():
    held_out, labels = some()
    logits, indices = normal(8, 3, seed=5), torch.tensor([3, 9, 0, 49, 7, 7, 20, 21])
    batch = Batch(normal(8, 1, 2, 2), labels[indices], torch.zeros(8, dtype=torch.bool), indices)
    whole = shift_by_loops(held_out, labels, 0.5)[indices]
    found = MATLoss(held_out, labels, 0.5)(logits, batch)
    torch.testing.assert_close(found, cross_entropy(logits + whole, labels[indices], reduction="none"))
    part = shift_by_loops(held_out[indices], labels[indices], 0.5)
    found = MATLoss(held_out, labels, 0.5, per_batch=True)(logits, batch)
    torch.testing.assert_close(found, cross_entropy(logits + part, labels[indices], reduction="none"))
    assert MATLoss(held_out, labels)(logits.bfloat16(), batch).dtype == torch.float32


def test_training_with_the_loss_follows_its_gradient(tiny):
    """One step of the loop against the same step by hand."""
    labels = tiny.train.labels
    held_out = normal(64, 10).to(labels.device)
    settings = Settings(epochs=1, batch_size=64, learning_rate=0.1, momentum=0, weight_decay=0)
    ours, theirs, plain = (models.build("mlp", in_channels=1, size=8, num_classes=10, seed=0) for _ in range(3))
    train(ours, tiny, settings, loss=MATLoss(held_out, labels, 0.5))
    train(plain, tiny, settings)
    theirs.to(labels.device)
    shift = shift_by_loops(held_out.cpu(), labels.cpu(), 0.5).to(labels.device)

    def by_hand(logits, batch):
        return cross_entropy(logits + shift[batch.indices], batch.labels, reduction="none")

    train(theirs, tiny, settings, loss=by_hand)
    for mine, his, other in zip(ours.parameters(), theirs.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, his)
        assert not torch.allclose(mine, other)


def test_what_cannot_be_calibrated_is_refused_in_one_line():
    held_out, labels = some()
    for bad in (labels[1:], labels[:, None]):
        with pytest.raises(ValueError, match=r"shapes \(N, K\) or \(S, N, K\) and \(N,\) or \(S, N\), got"):
            logit_shift(held_out, bad)
    for bad in (labels + 1, labels - 1, labels.float()):
        with pytest.raises(ValueError, match="labels must be int64 from 0 to 2, got"):
            logit_shift(held_out, bad)
    with pytest.raises(ValueError, match="held_out must be finite"):
        logit_shift(held_out / 0, labels)
    for temperature in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be above 0"):
            logit_shift(held_out, labels, temperature)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        logit_shift(held_out, labels, batch_size=0)
    with pytest.raises(ValueError, match=r"held_out must have shape \(N, K\), got \(1, 50, 3\)"):
        MATLoss(held_out[None], labels)
    with pytest.raises(ValueError, match="logits must have 3 classes as held_out, got 4"):
        MATLoss(held_out, labels).losses(normal(2, 4), labels[:2], torch.arange(2))
